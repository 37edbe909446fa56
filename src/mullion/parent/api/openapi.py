"""The OpenAPI document at `/1.0/openapi.json`, made from the routes' types.

Litestar makes the document; what it says about errors is replaced here, once for all addresses, by what this API
answers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from litestar import MediaType, Request, Router
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme
from litestar.routes import BaseRoute
from litestar.types import ControllerRouterHandler

import mullion

PREFIX: Final = "/1.0"
_ERROR_SCHEMA: Final = {
    "type": "object",
    "title": "ErrorView",
    "required": ["code", "message", "remedy", "context", "exit_code"],
    "properties": {
        "code": {"type": "string", "description": "stable, for programs; docs/errors.md lists all"},
        "message": {"type": "string", "description": "what happened"},
        "remedy": {"type": "string", "description": "what to do next"},
        "context": {"type": "object", "description": "what it was about: path, partition, operation"},
        "exit_code": {"type": "integer", "description": "what a command that meets it ends with"},
    },
}
_METHODS: Final = frozenset({"get", "put", "post", "delete", "patch"})


def openapi_config() -> OpenAPIConfig:
    return OpenAPIConfig(
        title="Mullion",
        version=mullion.__version__,
        description="Server virtualization: partitions, disks, images, and the operations and events of one host.",
        use_handler_docstrings=True,
        render_plugins=[_Document()],
        openapi_router=_DocumentRouter(path=PREFIX, route_handlers=[], include_in_schema=False),
        components=Components(
            security_schemes={"token": SecurityScheme(type="http", scheme="bearer", description="The file `token`.")}
        ),
        security=[{"token": []}],
    )


class _DocumentRouter(Router):
    """Takes the document's own address only: Litestar would add pages that load scripts from elsewhere."""

    def register(self, value: ControllerRouterHandler) -> list[BaseRoute]:
        paths: Sequence[str] = tuple(getattr(value, "paths", ()))
        return super().register(value) if "/openapi.json" in paths else []


class _Document(JsonRenderPlugin):
    """The document with every address's errors."""

    def __init__(self) -> None:
        super().__init__(path="/openapi.json", media_type=MediaType.JSON)
        self._rendered = b""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        if not self._rendered:
            self._rendered = msgspec.json.encode(with_errors(openapi_schema))
        return self._rendered


def with_errors(document: dict[str, Any]) -> dict[str, Any]:
    """The document in which every operation may answer with an `ErrorView`, whatever the status."""
    document = copy.deepcopy(document)
    document.setdefault("components", {}).setdefault("schemas", {})["ErrorView"] = _ERROR_SCHEMA
    answer = {
        "description": "What did not work, and what to do next.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorView"}}},
    }
    for path in document["paths"].values():
        for method, operation in path.items():
            if method in _METHODS:
                responses = operation["responses"]
                for status in [status for status in responses if status.startswith(("4", "5"))]:
                    del responses[status]
                responses["default"] = answer
    return document
