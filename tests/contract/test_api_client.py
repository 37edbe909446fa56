"""The typed client against the real API on both listeners, and against things that are not the service."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from litestar import Request, Response, WebSocket, delete, get, post, put, websocket
from litestar.params import FromPath, FromQuery, JSONBody
from tests.framework.api_service import ApiService

from mullion.base.errors import (
    AlreadyExistsError,
    ConflictError,
    DeadlineError,
    InvalidError,
    MullionError,
    NoSpaceError,
    NotFoundError,
    OperationCancelledError,
    PreconditionError,
    StateError,
    UnavailableError,
)
from mullion.base.settings import Settings
from mullion.client import Client
from mullion.model.definition import DiskAttachment, PartitionDefinition
from mullion.model.states import OperationState, PartitionState
from mullion.model.views import DiskView, ImageView, OperationView, PartitionView, StatusView
from mullion.parent.api import Service, accepted, check_match
from mullion.parent.api.errors import UnauthenticatedError
from mullion.parent.operations import Operation, Operations

pytestmark = pytest.mark.contract


class House:
    """Partitions and disks with just enough behind them to answer the client's questions."""

    def __init__(self) -> None:
        self.partitions: dict[str, PartitionView] = {}
        self.disks: dict[str, DiskView] = {}
        self.options: dict[str, object] = {}


def view_of(definition: PartitionDefinition, number: int) -> PartitionView:
    return PartitionView(definition.name, "u", PartitionState.STOPPED, definition, f"{number}")


@get("/1.0/status")
async def status() -> StatusView:
    return StatusView("0.1.0", os.getpid(), "t", 1.5, "h", "tcg", "why", {"running": 1}, "s", "u", "d", "r")


@get("/1.0/partitions")
async def partitions(house: Service[House]) -> list[PartitionView]:
    return list(house.partitions.values())


@post("/1.0/partitions")
async def create(house: Service[House], data: JSONBody[PartitionDefinition]) -> PartitionView:
    if data.name in house.partitions:
        raise AlreadyExistsError(f"there is a partition named {data.name}", partition=data.name)
    house.partitions[data.name] = view_of(data, 1)
    return house.partitions[data.name]


def find(house: House, name: str) -> PartitionView:
    if name not in house.partitions:
        raise NotFoundError(f"there is no partition {name!r}", partition=name)
    return house.partitions[name]


@get("/1.0/partitions/{name:str}")
async def show(house: Service[House], name: FromPath[str]) -> PartitionView:
    return find(house, name)


@put("/1.0/partitions/{name:str}")
async def update(
    house: Service[House],
    name: FromPath[str],
    data: JSONBody[PartitionDefinition],
    request: Request[object, object, object],  # type: ignore[type-var]
) -> PartitionView:
    old = find(house, name)
    check_match(request.headers.get("if-match"), old.etag, name)
    house.partitions[name] = view_of(data, int(old.etag) + 1)
    return house.partitions[name]


@delete("/1.0/partitions/{name:str}")
async def remove(
    house: Service[House],
    name: FromPath[str],
    request: Request[object, object, object],  # type: ignore[type-var]
    with_disks: FromQuery[bool] = False,
) -> None:
    check_match(request.headers.get("if-match"), find(house, name).etag, name)
    house.options = {"with_disks": with_disks}
    del house.partitions[name]


@post("/1.0/partitions/{name:str}/{action:str}")
async def act(
    house: Service[House],
    operations: Service[Operations],
    name: FromPath[str],
    action: FromPath[str],
    data: JSONBody[dict[str, object]],
) -> Response[OperationView]:
    house.options = data
    if action == "pause":
        raise StateError(f"{name} is stopped", state="stopped", required="running")

    async def work(operation: Operation) -> dict[str, object]:
        operation.stage("first", 0.3)
        if action == "reset":
            raise NoSpaceError("no space left on /disks", path="/disks")
        if action == "stop":
            await asyncio.Event().wait()
        return {"done": action}

    return accepted(await operations.start(f"partition.{action}", f"partition/{name}", work, cancellable=True))


@get("/1.0/disks")
async def disks(house: Service[House]) -> list[DiskView]:
    return list(house.disks.values())


@get("/1.0/disks/show")
async def show_disk(house: Service[House], path: FromQuery[str]) -> DiskView:
    if path not in house.disks:
        raise NotFoundError(f"there is no disk {path}")
    return house.disks[path]


@post("/1.0/disks")
async def create_disk(house: Service[House], data: JSONBody[dict[str, object]]) -> DiskView:
    path = str(data["path"])
    house.options = data
    house.disks[path] = DiskView(path, path, str(data["type"]), 1, 2, 3, ())
    return house.disks[path]


@delete("/1.0/disks")
async def delete_disk(house: Service[House], path: FromQuery[str]) -> None:
    del house.disks[path]


@get("/1.0/images")
async def images() -> list[ImageView]:
    return [ImageView("demo", "/i/demo.vhd", 1, 2, "t")]


@post("/1.0/images")
async def build(operations: Service[Operations], data: JSONBody[dict[str, str]]) -> Response[OperationView]:
    async def work(_operation: Operation) -> dict[str, object]:
        return {"name": data["name"]}

    return accepted(await operations.start("image.build", f"image/{data['name']}", work))


@websocket("/1.0/partitions/{name:str}/console")
async def console(socket: WebSocket[object, object, object], house: Service[House], name: FromPath[str]) -> None:  # type: ignore[type-var]
    find(house, name)
    await socket.accept()
    async for data in socket.iter_data(mode="binary"):
        if data == b"bye":
            await socket.close()
            return
        await socket.send_bytes(b"<" + bytes(data) + b">")


ROUTES = (
    status, partitions, create, show, update, remove, act, disks, show_disk, create_disk, delete_disk, images, build,
    console,
)  # fmt: skip


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ApiService]:
    with ApiService(tmp_path, ROUTES, {"house": House()}) as service:
        yield service


@pytest.fixture(params=["unix", "tcp"])
def client(request: pytest.FixtureRequest, service: ApiService) -> Iterator[Client]:
    if request.param == "unix":
        settings = Settings.load({}, data_dir=service.paths.data_dir, run_dir=service.paths.run_dir)
        made = Client.local(settings)
    else:
        made = Client(service.server.url, token=service.token)
    with made:
        yield made


def test_partitions(client: Client) -> None:
    assert client.status().pid == os.getpid()
    assert client.partitions() == []
    definition = PartitionDefinition("web", disks=(DiskAttachment("web.vhd"),))
    created = client.create_partition(definition)
    assert created.definition == definition
    with pytest.raises(AlreadyExistsError, match="named web") as caught:
        client.create_partition(definition)
    assert caught.value.context["partition"] == "web"
    assert client.create_partition(PartitionDefinition("db"), idempotency_key="k1") == client.create_partition(
        PartitionDefinition("db"), idempotency_key="k1"
    )
    assert {view.name for view in client.partitions()} == {"web", "db"}
    changed = client.update_partition("web", PartitionDefinition("web", vcpus=2), created.etag)
    assert changed.definition.vcpus == 2
    with pytest.raises(PreconditionError):
        client.update_partition("web", definition, created.etag)
    with pytest.raises(PreconditionError):
        client.delete_partition("web", etag=created.etag)
    client.delete_partition("web", with_disks=True)
    with pytest.raises(NotFoundError, match="'web'"):
        client.partition("web")


def test_a_name_stays_one_part_of_the_path(client: Client) -> None:
    for name in ("..", ".", "a/b", "a?b=c", "a#b", "%2e%2e", "ä ö", "a\r\nX: y", "x" * 3000):
        with pytest.raises(NotFoundError):
            client.partition(name)
    assert client.partitions() == []


def test_actions_and_their_progress(client: Client) -> None:
    client.create_partition(PartitionDefinition("web"))
    begun = client.partition_action("web", "start", timeout_s=5, force=None)
    seen: list[OperationView] = []
    done = client.wait(begun, on_progress=seen.append)
    assert (done.state, done.result) == (OperationState.SUCCEEDED, {"done": "start"})
    assert seen[-1] == done
    assert client.wait(begun.id) == client.operation(begun.id) == done
    with pytest.raises(StateError) as refused:
        client.partition_action("web", "pause")
    assert (refused.value.context["state"], refused.value.exit_code) == ("stopped", 6)
    failing = client.partition_action("web", "reset")
    with pytest.raises(NoSpaceError, match="/disks") as failed:
        client.wait(failing)
    assert failed.value.context["path"] == "/disks"
    assert client.wait(failing, check=False).state is OperationState.FAILED
    stopping = client.partition_action("web", "stop")
    with pytest.raises(ConflictError, match="going on"):
        client.partition_action("web", "start")
    client.cancel(stopping.id)
    with pytest.raises(OperationCancelledError):
        client.wait(stopping)
    with pytest.raises(NotFoundError):
        client.operation("nothing")
    assert [view.kind for view in client.operations()] == ["partition.start", "partition.reset", "partition.stop"]


def test_disks_and_images(client: Client) -> None:
    made = client.create_disk(path="/a b/ü.vhd", size_bytes=4096, type="fixed")
    assert client.disk("/a b/ü.vhd") == made
    assert client.disks() == [made]
    client.delete_disk("/a b/ü.vhd")
    with pytest.raises(NotFoundError):
        client.disk("/a b/ü.vhd")
    assert client.images()[0].name == "demo"
    assert client.wait(client.build_image("demo")).result == {"name": "demo"}


def test_events(client: Client, service: ApiService) -> None:
    async def publish() -> None:
        for number in range(1500):
            service.events.publish("tick", "t", {"n": number})
        await service.events.flush()

    service.call(publish)
    assert [event.cursor for event in client.events()] == list(range(1, 1501))
    assert [event.cursor for event in client.events(after=1498)] == [1499, 1500]
    following = client.events(after=1499, follow=True)
    assert next(following).cursor == 1500
    service.call(publish)
    assert next(following).cursor == 1501
    following.close()  # type: ignore[attr-defined]
    gap, first = list(client.events(after=10**9))[:2]
    assert (gap.kind, gap.cursor, first.cursor) == ("events.truncated", 0, 1)
    assert client.operations() == [], "the connection is still good"


def test_console(client: Client) -> None:
    client.create_partition(PartitionDefinition("web"))
    link = client.console("web")
    link.send(b"\x00\xffhello")
    received = iter(link)
    assert next(received) == b"<\x00\xffhello>"
    link.send(b"bye")
    assert list(received) == []
    link.close()
    link.close()
    with pytest.raises(UnavailableError):
        link.send(b"x")
    with pytest.raises(NotFoundError, match="'nobody'"):
        client.console("nobody")


def test_a_console_that_is_closed_while_somebody_reads(client: Client) -> None:
    client.create_partition(PartitionDefinition("web"))
    link = client.console("web")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.extend(link))
    reader.start()
    link.close()
    reader.join(60)
    assert not reader.is_alive()
    assert found == []


def test_a_wrong_token_is_refused_everywhere(service: ApiService) -> None:
    with Client(service.server.url, token="wrong" * 10) as client:
        with pytest.raises(UnauthenticatedError) as caught:
            client.partitions()
        assert caught.value.exit_code == 12
        with pytest.raises(UnauthenticatedError):
            next(client.events(follow=True))
        with pytest.raises(UnauthenticatedError):
            client.console("web")


def test_a_large_body_is_refused_with_its_reason(client: Client) -> None:
    definition = PartitionDefinition("web", labels={"a": "x" * (1024 * 1024)})
    with pytest.raises(InvalidError, match="larger than 1 MiB") as caught:
        client.create_partition(definition)
    assert caught.value.code == "too-large"
    assert client.partitions() == []


def test_a_restart_of_the_service_goes_unnoticed(tmp_path: Path) -> None:
    client: Client | None = None
    for name in ("one", "two"):
        with ApiService(tmp_path, ROUTES, {"house": House()}) as service:
            client = client or Client(socket_path=service.paths.api_socket)
            assert client.create_partition(PartitionDefinition(name)).name == name
            assert client.partitions()[0].name == name
    assert client is not None
    with pytest.raises(UnavailableError, match="not running") as caught:
        client.partitions()
    assert "mullion serve" in caught.value.remedy
    client.close()


# What is not the service


def test_nobody_is_there(tmp_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "stale.sock"))
    stale.close()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        for client in (
            Client(socket_path=str(tmp_path / "none.sock")),
            Client(socket_path=str(tmp_path / "stale.sock")),
            Client(url, token="x"),
        ):
            with client:
                for ask in (client.status, lambda: next(client.events(follow=True)), lambda: client.console("web")):  # noqa: B023
                    with pytest.raises(UnavailableError, match="not running") as caught:
                        ask()
                    assert "mullion serve" in caught.value.remedy


@pytest.mark.parametrize("url", ["", "localhost:8440", "ftp://x", "http://", "http://x:port", "https://x"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(InvalidError, match="URL"):
        Client(url)


class Impostor:
    """Answers every connection with the same bytes."""

    def __init__(self, path: str, answer: bytes | None) -> None:
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Impostor:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        kept = []
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                break
            connection.recv(65536)
            if self._answer is None:
                kept.append(connection)
                continue
            connection.sendall(self._answer)
            connection.close()
        for connection in kept:
            connection.close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "without an answer"),
        (b"SSH-2.0-OpenSSH\r\n", "cannot be asked"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "cannot be asked"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 5\r\n\r\n<htm>", "not this version of Mullion"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n<htm>", "not this version of Mullion"),
    ],
)
def test_somebody_else_is_there(tmp_path: Path, answer: bytes, message: str) -> None:
    path = str(tmp_path / "s")
    with Impostor(path, answer), Client(socket_path=path) as client, pytest.raises(UnavailableError, match=message):
        client.status()


def test_a_service_that_hangs(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with Impostor(path, None), Client(socket_path=path, timeout_s=0.1) as client:
        with pytest.raises(DeadlineError, match=r"0\.1 s") as caught:
            client.status()
        assert isinstance(caught.value, MullionError)


def test_the_client_imports_nothing_of_the_service() -> None:
    code = "import sys, mullion.client; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stdout.split())
    assert "mullion.client" in loaded
    for module in ("asyncio", "http.client", "litestar", "uvicorn", "websockets", "sqlite3", "mullion.parent", "ssl"):
        assert module not in loaded
