"""The API as an ASGI app: the routes of all services behind one gate.

Order of the layers, outside in: `Gate` (who, how much, last net), `Idempotency` (POST), `Conditional` (GET), Litestar.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

from litestar import Litestar, Router
from litestar.di import NamedDependency, Provide
from litestar.handlers import BaseRouteHandler
from litestar.params import FromPath, SkipValidation

from mullion.parent.api.asgi import App
from mullion.parent.api.auth import Authority
from mullion.parent.api.conditional import Conditional
from mullion.parent.api.errors import answer_exception, keep_exception
from mullion.parent.api.gate import BODY_LIMIT_BYTES, Gate
from mullion.parent.api.idempotency import Idempotency
from mullion.parent.api.openapi import openapi_config
from mullion.parent.api.routes import ROUTES
from mullion.parent.events import Events
from mullion.parent.operations import Operations
from mullion.parent.store import Store

_T = TypeVar("_T")
Route = BaseRouteHandler | Router
Service = NamedDependency[SkipValidation[_T]]
"""A parameter of a route that is one of the services: `disks: Service[DiskService]` gets `services["disks"]`."""
PathName = FromPath[str]
"""A parameter of a route that is a part of its path."""


def create_app(
    *,
    store: Store,
    operations: Operations,
    events: Events,
    authority: Authority,
    closing: asyncio.Event,
    routes: Sequence[Route] = (),
    services: Mapping[str, object] | None = None,
) -> App:
    """The app of all routes: the kernel's own (operations, events, the OpenAPI document) and those given.

    Every route may have a parameter of the name of each service; `store`, `operations`, `events` and `closing` are
    always there.
    """
    known = {"store": store, "operations": operations, "events": events, "closing": closing, **(services or {})}
    app = Litestar(
        route_handlers=[*ROUTES, *routes],
        dependencies={name: _provide(service) for name, service in known.items()},
        exception_handlers={Exception: answer_exception},
        after_exception=[keep_exception],
        openapi_config=openapi_config(),
        logging_config=None,
        request_max_body_size=BODY_LIMIT_BYTES,
        debug=False,
    )
    return Gate(Idempotency(Conditional(cast(App, app)), store), authority)


def _provide(service: object) -> Provide:
    def give() -> object:
        return service

    return Provide(give, sync_to_thread=False)
