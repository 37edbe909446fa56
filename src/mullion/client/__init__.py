"""The typed client of the REST API, synchronous, quick to import."""

from mullion.client.client import Client, operation_error

__all__ = ["Client", "operation_error"]
