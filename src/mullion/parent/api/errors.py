"""Errors as HTTP answers: `{code, message, remedy, context}` with the status that the error's class fixes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Final

import msgspec
from litestar import Response
from litestar.enums import ScopeType
from litestar.exceptions import HTTPException, ValidationException
from litestar.types import Scope as LitestarScope

from mullion.base.errors import (
    ConflictError,
    DeadlineError,
    DeniedError,
    InvalidError,
    MullionError,
    NoSpaceError,
    NotFoundError,
    RemoteError,
    StateError,
    TooLargeError,
    UnavailableError,
)
from mullion.model.parse import explain
from mullion.model.views import ErrorView
from mullion.parent.api.asgi import AnyRequest, Send
from mullion.parent.faults import error_view

log = logging.getLogger(__name__)
JSON_TYPE = "application/json"


class UnauthenticatedError(DeniedError):
    """The caller has not shown who it is."""

    code = "unauthenticated"
    http_status = 401
    default_remedy = (
        "Send `Authorization: Bearer TOKEN` with the token from the file `token` in the service's data folder, or use "
        "the unix socket."
    )


class MethodError(InvalidError):
    """The address exists, but not for this HTTP method."""

    code = "method-not-allowed"
    http_status = 405
    default_remedy = "GET /1.0/openapi.json lists the methods of every address."


class PreconditionRequiredError(InvalidError):
    """A write does not say which state of the thing it was made for."""

    code = "precondition-required"
    http_status = 428
    default_remedy = "Read it first and send its ETag as If-Match; `If-Match: *` overwrites whatever is there."


class RefusedError(InvalidError):
    """A request that the HTTP layer does not take, for a reason of its own."""

    code = "refused"
    default_remedy = "GET /1.0/openapi.json says what each address takes."


_KINDS: Final = (
    InvalidError,
    NotFoundError,
    ConflictError,
    StateError,
    UnavailableError,
    NoSpaceError,
    DeniedError,
    DeadlineError,
)
_STATUS_BY_EXIT_CODE: Final = {kind.exit_code: kind.http_status for kind in _KINDS}


def status_of(error: BaseException) -> int:
    """The class's; of an error that came from another process, and whose class is not loaded here, its kind's."""
    if isinstance(error, RemoteError):
        exit_code = error.to_wire()["exit_code"]
        return _STATUS_BY_EXIT_CODE.get(exit_code, error.http_status) if isinstance(exit_code, int) else 500
    return error.http_status if isinstance(error, MullionError) else int(HTTPStatus.INTERNAL_SERVER_ERROR)


def headers_of(error: BaseException) -> dict[str, str]:
    return {"www-authenticate": 'Bearer realm="mullion"'} if isinstance(error, UnauthenticatedError) else {}


async def send_error(send: Send, error: BaseException, *, close: bool = False, websocket: bool = False) -> None:
    """Answer a request, or the attempt to open a websocket, with an error."""
    body = msgspec.json.encode(error_view(error))
    headers = [(name.encode(), value.encode()) for name, value in headers_of(error).items()]
    headers += [(b"content-type", JSON_TYPE.encode()), (b"content-length", b"%d" % len(body))]
    if close:
        headers.append((b"connection", b"close"))
    kind = "websocket.http.response" if websocket else "http.response"
    await send({"type": f"{kind}.start", "status": status_of(error), "headers": headers})
    await send({"type": f"{kind}.body", "body": body, "more_body": False})


async def keep_exception(error: Exception, scope: LitestarScope) -> None:
    """Litestar's hook after an exception: a websocket's is kept for the gate, which answers it."""
    if scope["type"] == ScopeType.WEBSOCKET:
        ours = translate_status(error, "websocket", scope["path"]) if isinstance(error, HTTPException) else error
        scope["state"]["exception"] = ours


def answer_exception(request: AnyRequest, error: Exception) -> Response[ErrorView]:
    """Litestar's exception handler for every exception of a route."""
    ours = translate(request, error)
    headers = headers_of(ours)
    if isinstance(error, HTTPException) and error.headers:
        headers |= {name: value for name, value in error.headers.items() if name.lower() == "allow"}
    return Response(error_view(ours), status_code=status_of(ours), headers=headers, media_type=JSON_TYPE)


def translate(request: AnyRequest, error: Exception) -> Exception:
    """Our error for an exception of the HTTP layer; any other is left as it is."""
    if not isinstance(error, HTTPException):
        return error
    if isinstance(error, ValidationException) and isinstance(error.extra, list):
        return _invalid(request, error.extra)
    return translate_status(error, request.method, request.url.path)


def translate_status(error: HTTPException, method: str, path: str) -> Exception:
    """Our error for a status that the HTTP layer has chosen."""
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            return NotFoundError(f"there is nothing at {path}", remedy="GET /1.0/openapi.json lists what there is.")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            return MethodError(f"{method} is not possible at {path}")
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            return TooLargeError("the request is too large")
        case HTTPStatus.SERVICE_UNAVAILABLE:
            return UnavailableError(error.detail)
        case status if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return error
    if error.status_code == HTTPStatus.BAD_REQUEST:
        return InvalidError(f"the request cannot be read: {error.detail}", remedy="Send a body of JSON in UTF-8.")
    return RefusedError(f"{method} {path} is refused: {error.detail}")


def _invalid(request: AnyRequest, problems: Sequence[Mapping[str, str]]) -> InvalidError:
    if any(problem.get("source") == "body" for problem in problems):
        field = request.route_handler.parsed_data_field
        body = request.scope["state"]["body"].content
        if not body.strip():
            return InvalidError("the request has no body", remedy="Send a body of JSON.", field="body")
        if field is not None:
            explained = explain(body, field.annotation, source="the request")
            if explained is not None:
                return explained
    problem = problems[0]
    name = problem.get("key", "")
    return InvalidError(
        f"{_place(problem.get('source'))} parameter {name}: {_plain(problem.get('message', ''))}",
        remedy="GET /1.0/openapi.json says what each parameter takes.",
        field=name,
    )


def _place(source: object) -> str:
    """Where a parameter stands: `query`, `path`, `header`."""
    return str(getattr(source, "value", source or "request"))


def _plain(message: str) -> str:
    """msgspec's words for a person: ``Expected `int` >= 1`` is what is allowed."""
    return message.replace("`", "").replace("Expected ", "expected ")
