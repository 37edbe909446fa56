"""Errors as the API shows them: what a client may see of an exception, and what stays in the log."""

from __future__ import annotations

import logging
import secrets

import msgspec

from mullion.base.errors import MullionError
from mullion.model.views import ErrorView

log = logging.getLogger(__name__)


def error_view(error: BaseException) -> ErrorView:
    """The view of an error. An unexpected exception is logged with its traceback under an id that the view carries."""
    if isinstance(error, MullionError):
        return msgspec.convert(error.to_wire(), ErrorView)
    fault = secrets.token_hex(6)
    log.error("unexpected error %s: %s", fault, type(error).__name__, exc_info=error)
    return ErrorView(
        MullionError.code,
        f"an unexpected error happened; the service's log has it under {fault}",
        f"Look for {fault} in the service's log, and report what it says: it is a fault in Mullion.",
        {"id": fault},
    )
