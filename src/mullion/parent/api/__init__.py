"""The REST API `/1.0`. Importing it costs a third of a second: do so after the running partitions are adopted."""

from mullion.parent.api.app import PathName, Route, Service, create_app
from mullion.parent.api.auth import Authority, load_token
from mullion.parent.api.conditional import check_match
from mullion.parent.api.routes import accepted
from mullion.parent.api.server import ApiServer

__all__ = [
    "ApiServer",
    "Authority",
    "PathName",
    "Route",
    "Service",
    "accepted",
    "check_match",
    "create_app",
    "load_token",
]
