"""The API over its real sockets: who may call, how much may be sent, how errors look, conditional and repeated requests."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import socket
import stat
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from litestar import Request, Response, WebSocket, delete, get, post, put, websocket
from litestar.params import FromPath, JSONBody
from tests.framework.api_service import ApiService

from mullion.base.errors import ConflictError, InvalidError, NotFoundError, PreconditionError, UnavailableError
from mullion.base.paths import HostPaths
from mullion.base.peer import Peer
from mullion.model.definition import PartitionDefinition
from mullion.model.views import ErrorView, OperationView
from mullion.parent.api import Authority, Service, accepted, check_match, load_token
from mullion.parent.api.auth import GROUP, is_member
from mullion.parent.api.server import bind_tcp, bind_unix
from mullion.parent.operations import Operation, Operations

pytestmark = pytest.mark.contract


class Shelf:
    """A service of the test's own: named definitions, and how often each thing was done."""

    def __init__(self) -> None:
        self.items: dict[str, PartitionDefinition] = {}
        self.done = 0
        self.hold = asyncio.Event()


@get("/1.0/things/{name:str}")
async def show_thing(shelf: Service[Shelf], name: FromPath[str]) -> PartitionDefinition:
    if name == "boom":
        raise RuntimeError("an inner detail")
    if name not in shelf.items:
        raise NotFoundError(f"there is no {name}", name=name)
    return shelf.items[name]


@post("/1.0/things")
async def make_thing(shelf: Service[Shelf], data: JSONBody[PartitionDefinition]) -> PartitionDefinition:
    shelf.done += 1
    if data.name == "slow":
        await shelf.hold.wait()
    if data.name in shelf.items:
        raise ConflictError(f"{data.name} is there")
    shelf.items[data.name] = data
    return data


@put("/1.0/things/{name:str}")
async def change_thing(
    shelf: Service[Shelf],
    name: FromPath[str],
    data: JSONBody[PartitionDefinition],
    request: Request[object, object, object],  # type: ignore[type-var]
) -> Response[PartitionDefinition]:
    etag = f"v{shelf.items[name].vcpus}"
    check_match(request.headers.get("if-match"), etag, name)
    shelf.items[name] = data
    return Response(data, headers={"etag": f'"v{data.vcpus}"'})


@post("/1.0/long/{target:str}")
async def begin(operations: Service[Operations], target: FromPath[str]) -> Response[OperationView]:
    async def work(operation: Operation) -> None:
        operation.stage("waiting", 0.25)
        await asyncio.Event().wait()

    return accepted(await operations.start("test.long", target, work, cancellable=True))


@delete("/1.0/things/{name:str}")
async def drop_thing(shelf: Service[Shelf], name: FromPath[str]) -> None:
    del shelf.items[name]


@websocket("/1.0/echo")
async def echo(socket: WebSocket[object, object, object]) -> None:  # type: ignore[type-var]
    await socket.accept()
    async for data in socket.iter_data(mode="binary"):
        await socket.send_bytes(data)


@get("/1.0/views/{number:int}")
async def show_view(number: FromPath[int]) -> dict[str, object]:
    return {"etag": "v7", "changes by itself": number}


ROUTES = (show_view, show_thing, make_thing, change_thing, begin, drop_thing, echo)


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self._path)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, object]:
        found = json.loads(self.body)
        assert isinstance(found, dict)
        return found


class Caller:
    """One connection; `ask` sends a request and reads the answer."""

    def __init__(self, connection: http.client.HTTPConnection, headers: Mapping[str, str]) -> None:
        self.connection = connection
        self.headers = headers

    def ask(self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None) -> Answer:
        content = msgspec.json.encode(body) if isinstance(body, dict) else body
        self.connection.request(method, path, content, {**self.headers, **(headers or {})})  # type: ignore[arg-type]
        response = self.connection.getresponse()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


SHELF = Shelf()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiService]:
    """One service for all tests that leave it as they found it: what they make has names and keys of its own."""
    with ApiService(tmp_path_factory.mktemp("s"), ROUTES, {"shelf": SHELF}) as service:
        yield service


@pytest.fixture
def shelf() -> Shelf:
    """The shelf of the service, empty."""
    SHELF.__init__()  # type: ignore[misc]
    return SHELF


@pytest.fixture
def key() -> dict[str, str]:
    return {"Idempotency-Key": str(uuid.uuid4())}


def tcp(service: ApiService, **headers: str) -> Caller:
    host, _, port = service.server.url.removeprefix("http://").rpartition(":")
    return Caller(http.client.HTTPConnection(host, int(port), timeout=60), headers)


@pytest.fixture(params=["unix", "tcp"])
def caller(request: pytest.FixtureRequest, service: ApiService, shelf: Shelf) -> Iterator[Caller]:
    """An administrator, on either listener."""
    if request.param == "unix":
        caller = Caller(UnixConnection(service.paths.api_socket), {})
    else:
        caller = tcp(service, Authorization=f"Bearer {service.token}")
    yield caller
    caller.connection.close()


def assert_error(answer: Answer, status: int, code: str) -> dict[str, object]:
    assert answer.status == status, answer
    assert answer.headers["content-type"].startswith("application/json")
    assert set(answer.json) == set(ErrorView.__struct_fields__)
    assert answer.json["code"] == code
    assert answer.json["message"]
    assert answer.json["remedy"]
    return answer.json


# Who may call


def test_both_listeners_answer(caller: Caller) -> None:
    answer = caller.ask("GET", "/1.0/operations?target=nothing")
    assert (answer.status, answer.body) == (200, b"[]")


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer wrong", "Bearer {token}x", "Basic {token}", "{token}", "Bearer {token:.20}"]
)
def test_tcp_without_the_token_gets_nothing(service: ApiService, header: str) -> None:
    caller = tcp(service, **({"Authorization": header.format(token=service.token)} if header else {}))
    for path in ("/1.0/operations", "/1.0/openapi.json", "/", "/1.0/nothing"):
        answer = caller.ask("GET", path)
        error = assert_error(answer, 401, "unauthenticated")
        assert "token" in str(error["remedy"])
        assert answer.headers["www-authenticate"].startswith("Bearer")
    caller.connection.close()


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Host": "127.0.0.1.evil.example:80"}, {"Origin": "http://evil.example"}]
)
def test_web_pages_of_others_are_refused_even_with_the_token(service: ApiService, headers: dict[str, str]) -> None:
    caller = tcp(service, Authorization=f"Bearer {service.token}")
    assert_error(caller.ask("GET", "/1.0/operations", headers=headers), 403, "denied")
    assert (
        caller.ask("GET", "/1.0/operations", headers={"Host": "localhost:1", "Origin": "http://127.0.0.1"}).status
        == 200
    )
    caller.connection.close()


def test_a_header_cannot_pretend_to_be_the_unix_socket(service: ApiService) -> None:
    caller = tcp(service, **{"X-Forwarded-For": "unix", "X-Peer-Uid": "0"})
    assert caller.ask("GET", "/1.0/operations").status == 401
    caller.connection.close()


def test_the_socket_is_for_root_and_the_group(service: ApiService) -> None:
    mode = os.stat(service.paths.api_socket).st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o660


def test_peers_are_judged_by_their_user_and_group() -> None:
    authority = Authority("x" * 43)
    assert authority.check(Peer(1, 0, 0), {}).uid == 0
    assert authority.check(Peer(1, os.geteuid(), os.getegid()), {}).uid == os.geteuid()
    stranger = Peer(1, 65534, 65534)
    assert not is_member(stranger)
    with pytest.raises(Exception, match="65534") as caught:
        authority.check(stranger, {})
    assert GROUP in str(getattr(caught.value, "remedy", ""))


def test_the_token_is_made_once_and_kept_private(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "token"
    token = load_token(str(path))
    assert len(token) >= 43, "256 bits"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_token(str(path)) == token
    path.chmod(0o644)
    assert load_token(str(path)) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "could be read by other users" in caplog.text
    for content in (b"", b"short\n", b"\xff" * 50):
        path.write_bytes(content)
        with pytest.raises(UnavailableError, match="token"):
            load_token(str(path))
    with pytest.raises(UnavailableError):
        load_token(str(tmp_path / "no" / "token"))


# How errors look


def test_every_error_has_one_shape(caller: Caller, caplog: pytest.LogCaptureFixture) -> None:
    assert_error(caller.ask("GET", "/1.0/nothing"), 404, "not-found")
    assert_error(caller.ask("GET", "/"), 404, "not-found")
    assert_error(caller.ask("GET", "/1.0/whatever.json"), 404, "not-found")
    assert_error(caller.ask("GET", "/1.0/operations/none"), 404, "not-found")
    error = assert_error(caller.ask("GET", "/1.0/things/web"), 404, "not-found")
    assert error["context"] == {"name": "web"}
    method = caller.ask("DELETE", "/1.0/operations")
    assert_error(method, 405, "method-not-allowed")
    assert "GET" in method.headers["allow"]
    for query in ("limit=0", "limit=x", "after=1.5", "wait_s=61", "wait_s=nan", "after=99999999999999999999"):
        error = assert_error(caller.ask("GET", f"/1.0/events?{query}"), 400, "invalid")
        assert query.partition("=")[0] in str(error["message"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"nam":"web"}', "nam is not a field; did you mean 'name'?; name is missing"),
        (b'{"name":"web","vcpus":0,"firmware":"efi"}', "vcpus is 0; firmware is 'efi'"),
        (b'{"name":"web","disks":[{"path":"a","bus":"scsi"}]}', "disks[0].bus is 'scsi'"),
        (b'{"name"', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "no body"),
        (b"[]", "is a list"),
        (b"null", "is null"),
    ],
)
def test_a_wrong_body_is_explained(caller: Caller, body: bytes, message: str) -> None:
    error = assert_error(caller.ask("POST", "/1.0/things", body), 400, "invalid")
    assert message in str(error["message"])


def test_an_unexpected_exception_stays_in_the_log(caller: Caller, caplog: pytest.LogCaptureFixture) -> None:
    answer = caller.ask("GET", "/1.0/things/boom")
    error = assert_error(answer, 500, "internal")
    assert b"inner detail" not in answer.body
    assert b"Traceback" not in answer.body
    context = error["context"]
    assert isinstance(context, dict)
    assert str(context["id"]) in caplog.text
    assert "an inner detail" in caplog.text


def test_what_is_not_http_gets_an_error_too(service: ApiService) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(60)
        raw.connect(service.paths.api_socket)
        raw.sendall(b"\x00\x01\x02 nonsense\r\n\r\n")
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["code"] == "refused"


# How much may be sent


@pytest.mark.parametrize("kind", ["length", "chunked"])
def test_a_body_over_a_mebibyte_is_refused(caller: Caller, shelf: Shelf, kind: str) -> None:
    size = 1024 * 1024 + 1
    big = b'{"name":"' + b"a" * size + b'"}'
    parts = (big[start : start + 65536] for start in range(0, len(big), 65536))
    for _ in range(2):
        body: object = big if kind == "length" else parts
        error = assert_error(caller.ask("POST", "/1.0/things", body), 413, "too-large")
        assert "1 MiB" in str(error["message"])
        parts = (big[start : start + 65536] for start in range(0, len(big), 65536))
    assert shelf.done == 0
    assert caller.ask("POST", "/1.0/things", {"name": "web"}).status == 201, "the connection can be used further"


def test_a_body_just_below_the_limit_is_read(caller: Caller) -> None:
    body = b'{"name":"web"' + b" " * (1024 * 1024 - 14) + b"}"
    assert len(body) == 1024 * 1024
    assert caller.ask("POST", "/1.0/things", body).status == 201


def test_an_endless_body_is_not_held_in_memory(service: ApiService) -> None:
    caller = Caller(UnixConnection(service.paths.api_socket), {})
    before_kib = peak_kib()
    chunk = bytes(1024 * 1024)
    assert_error(caller.ask("POST", "/1.0/things", (chunk for _ in range(64))), 413, "too-large")
    assert peak_kib() - before_kib < 16 * 1024, "64 MiB were sent"
    caller.connection.close()


def peak_kib() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        found = re.search(r"VmHWM:\s+(\d+) kB", file.read())
    assert found is not None
    return int(found[1])


def test_a_client_that_asks_first_is_told_before_it_sends(service: ApiService) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(60)
        raw.connect(service.paths.api_socket)
        raw.sendall(b"POST /1.0/things HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\nExpect: 100-continue\r\n\r\n")
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")


# Conditional requests


def test_every_read_has_an_etag_and_is_not_sent_twice(caller: Caller) -> None:
    caller.ask("POST", "/1.0/things", {"name": "web"})
    first = caller.ask("GET", "/1.0/things/web")
    etag = first.headers["etag"]
    again = caller.ask("GET", "/1.0/things/web", headers={"If-None-Match": f'"other", {etag}'})
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", etag)
    caller.ask("DELETE", "/1.0/things/web")
    caller.ask("POST", "/1.0/things", {"name": "web", "vcpus": 2})
    changed = caller.ask("GET", "/1.0/things/web", headers={"If-None-Match": etag})
    assert changed.status == 200
    assert changed.headers["etag"] != etag


def test_the_etag_of_a_view_holds_its_revision(caller: Caller) -> None:
    one, two = (caller.ask("GET", f"/1.0/views/{number}").headers["etag"] for number in (1, 2))
    assert one != two, "what is shown has changed"
    for tag in (one, two, '"v7"', "*", f'"x", {one}'):
        check_match(tag, "v7", "the view")
    for tag in ('"v8"', '"v77"', one.replace("v7", "v8"), '""'):
        with pytest.raises(PreconditionError):
            check_match(tag, "v7", "the view")


def test_writes_need_the_present_etag(caller: Caller) -> None:
    caller.ask("POST", "/1.0/things", {"name": "web"})
    body = {"name": "web", "vcpus": 2}
    assert_error(caller.ask("PUT", "/1.0/things/web", body), 428, "precondition-required")
    assert_error(caller.ask("PUT", "/1.0/things/web", body, {"If-Match": '"v9"'}), 412, "precondition-failed")
    changed = caller.ask("PUT", "/1.0/things/web", body, {"If-Match": '"v1"'})
    assert (changed.status, changed.headers["etag"]) == (200, '"v2"')
    assert caller.ask("PUT", "/1.0/things/web", body, {"If-Match": "*"}).status == 200


# Repeated requests


def test_a_repeated_post_is_answered_and_not_done_again(
    caller: Caller, service: ApiService, shelf: Shelf, key: dict[str, str]
) -> None:
    first = caller.ask("POST", "/1.0/things", {"name": "web"}, key)
    second = caller.ask("POST", "/1.0/things", {"name": "web"}, key)
    assert (first.status, second.status, second.body) == (201, 201, first.body)
    assert second.headers["idempotency-replayed"] == "true"
    assert shelf.done == 1
    assert_error(caller.ask("POST", "/1.0/things", {"name": "db"}, key), 409, "conflict")
    assert_error(caller.ask("POST", "/1.0/things", {"name": "web"}, {"Idempotency-Key": "x" * 201}), 400, "invalid")
    assert shelf.done == 1
    other = {"Idempotency-Key": key["Idempotency-Key"] + "-2"}
    begun, again = (caller.ask("POST", "/1.0/long/repeated", None, other) for _ in range(2))
    assert begun.status == 202
    caller.ask("POST", f"{begun.headers['location']}/cancel")
    caller.ask("GET", f"{begun.headers['location']}/wait?timeout_s=60")
    assert (again.json, again.headers["location"]) == (begun.json, begun.headers["location"])


def test_a_refusal_is_not_remembered(caller: Caller, shelf: Shelf, key: dict[str, str]) -> None:
    caller.ask("POST", "/1.0/things", {"name": "web"})
    assert_error(caller.ask("POST", "/1.0/things", {"name": "web"}, key), 409, "conflict")
    caller.ask("DELETE", "/1.0/things/web")
    assert caller.ask("POST", "/1.0/things", {"name": "web"}, key).status == 201


def test_the_answer_survives_a_restart(tmp_path: Path, key: dict[str, str]) -> None:
    answers = []
    for _ in range(2):
        shelf = Shelf()
        with ApiService(tmp_path, ROUTES, {"shelf": shelf}) as service:
            caller = Caller(UnixConnection(service.paths.api_socket), {})
            answers.append(caller.ask("POST", "/1.0/things", {"name": "web"}, key))
            caller.connection.close()
    assert answers[0].body == answers[1].body
    assert shelf.done == 0


def test_two_at_once_with_one_key_are_done_once(service: ApiService, shelf: Shelf, key: dict[str, str]) -> None:
    first = Caller(UnixConnection(service.paths.api_socket), {})
    first.connection.request("POST", "/1.0/things", b'{"name":"slow"}', key)
    second = Caller(UnixConnection(service.paths.api_socket), {})
    while shelf.done == 0:
        second.ask("GET", "/1.0/operations")
    error = assert_error(second.ask("POST", "/1.0/things", {"name": "slow"}, key), 409, "conflict")
    assert "at this moment" not in str(error["message"]) or "Wait" in str(error["remedy"])

    async def let_go() -> None:
        shelf.hold.set()

    service.call(let_go)
    response = first.connection.getresponse()
    assert response.status == 201
    response.read()
    for caller in (first, second):
        caller.connection.close()
    assert shelf.done == 1


def test_a_request_that_was_cut_off_by_a_crash_is_not_done_blindly(service: ApiService, key: dict[str, str]) -> None:
    """The record of a request is there, its answer is not: the service was killed in between."""
    caller = Caller(UnixConnection(service.paths.api_socket), {})
    assert caller.ask("POST", "/1.0/things", {"name": "web"}, key).status == 201

    async def forget_answer() -> None:
        from mullion.parent.store import Put

        entry = max(await service.store.list("idempotency/"), key=lambda entry: entry.revision)
        record = msgspec.json.decode(entry.value)
        record.update(status=0, body="", headers=[])
        await service.store.transact([], [Put(entry.key, msgspec.json.encode(record))])

    service.call(forget_answer)
    error = assert_error(caller.ask("POST", "/1.0/things", {"name": "web"}, key), 409, "conflict")
    assert "unknown" in str(error["message"])
    caller.connection.close()


# Operations and events


def test_an_operation_from_its_start_to_its_end(caller: Caller) -> None:
    begun = caller.ask("POST", "/1.0/long/web")
    assert begun.status == 202
    path = begun.headers["location"]
    assert path == f"/1.0/operations/{begun.json['id']}"
    while not (waited := caller.ask("GET", f"{path}/wait?timeout_s=0.05")).json["stage"]:
        assert waited.json["state"] == "running"
    assert (waited.json["state"], waited.json["stage"]) == ("running", "waiting")
    assert_error(caller.ask("POST", "/1.0/long/web"), 409, "conflict")
    assert caller.ask("POST", f"{path}/cancel").status == 202
    ended = caller.ask("GET", f"{path}/wait?timeout_s=60")
    assert ended.json["state"] == "cancelled"
    assert caller.ask("GET", path).json == ended.json
    assert ended.json in json.loads(caller.ask("GET", "/1.0/operations?target=web&status=cancelled").body)
    assert json.loads(caller.ask("GET", "/1.0/operations?status=running").body) == []
    assert_error(caller.ask("GET", "/1.0/operations?status=odd"), 400, "invalid")


def test_events_by_page_by_long_poll_and_by_stream(tmp_path: Path) -> None:
    with ApiService(tmp_path) as service:
        follow_events(service)


def follow_events(service: ApiService) -> None:
    caller = Caller(UnixConnection(service.paths.api_socket), {})
    assert caller.ask("GET", "/1.0/events").json == {"events": [], "cursor": 0, "truncated": False}

    async def publish() -> None:
        service.events.publish("tick", "test", {"a": [1, 2]})
        await service.events.flush()

    poll = Caller(UnixConnection(service.paths.api_socket), {})
    poll.connection.request("GET", "/1.0/events?after=0&wait_s=60")
    service.call(publish)
    answer = json.loads(poll.connection.getresponse().read())
    assert [event["cursor"] for event in answer["events"]] == [1]
    assert answer["events"][0]["data"] == {"a": [1, 2]}
    stream = Caller(UnixConnection(service.paths.api_socket), {})
    stream.connection.request("GET", "/1.0/events/stream?after=0")
    response = stream.connection.getresponse()
    assert json.loads(response.readline())["cursor"] == 1
    service.call(publish)
    assert json.loads(response.readline())["cursor"] == 2
    for one in (caller, poll, stream):
        one.connection.close()


def test_an_end_of_the_service_ends_polls_and_streams(tmp_path: Path) -> None:
    with ApiService(tmp_path, ROUTES, {"shelf": Shelf()}) as service:
        poll = Caller(UnixConnection(service.paths.api_socket), {})
        poll.connection.request("GET", "/1.0/events?after=0&wait_s=60")
        stream = Caller(UnixConnection(service.paths.api_socket), {})
        stream.connection.request("GET", "/1.0/events/stream?after=0")
        streaming = stream.connection.getresponse()
        ended = threading.Event()

        def read_all() -> None:
            streaming.read()
            ended.set()

        reader = threading.Thread(target=read_all)
        reader.start()
    reader.join(60)
    assert ended.is_set()
    response = poll.connection.getresponse()
    assert (response.status, json.loads(response.read())["events"]) == (200, [])
    for one in (poll, stream):
        one.connection.close()
    assert not os.path.exists(service.paths.api_socket)
    assert not os.path.exists(service.paths.api_url_file)


# The listeners


def test_a_second_service_is_refused_and_stale_sockets_are_replaced(tmp_path: Path) -> None:
    paths = HostPaths(str(tmp_path), str(tmp_path))
    left = socket.socket(socket.AF_UNIX)
    left.bind(paths.api_socket)
    left.close()
    with ApiService(tmp_path, ROUTES, {"shelf": Shelf()}) as service:
        with pytest.raises(ConflictError, match="another service answers"):
            bind_unix(paths.api_socket)
        port = service.server.url.rpartition(":")[2]
        with pytest.raises(ConflictError, match="another program listens"):
            bind_tcp(f"127.0.0.1:{port}")
        assert Path(paths.api_url_file).read_text() == f"{service.server.url}\n"
        caller = Caller(UnixConnection(paths.api_socket), {})
        assert caller.ask("GET", "/1.0/operations").status == 200
        caller.connection.close()


@pytest.mark.parametrize("listen", ["0.0.0.0:8440", "8440", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", "[::]:1"])
def test_only_loopback_addresses_are_listened_on(listen: str) -> None:
    with pytest.raises(InvalidError, match="listen"):
        bind_tcp(listen)


def test_a_busy_port_leaves_nothing_behind(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        service = ApiService(tmp_path, (), {}, f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ConflictError):
            service.__enter__()
    assert not os.path.exists(service.paths.api_socket)


def test_without_tcp(tmp_path: Path) -> None:
    with ApiService(tmp_path, (), {}, "none") as service:
        assert service.server.url == ""
        assert not os.path.exists(service.paths.api_url_file)


def test_a_too_long_run_folder_is_said_plainly(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    with pytest.raises(UnavailableError, match="socket"):
        bind_unix(str(folder / "api.sock"))


@pytest.mark.parametrize("key", ["", "Idempotency-Key: gone\r\n"])
def test_a_client_that_leaves_in_the_middle_is_no_fault(
    service: ApiService, shelf: Shelf, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(60)
        raw.connect(service.paths.api_socket)
        raw.sendall(f'POST /1.0/things HTTP/1.1\r\nHost: x\r\n{key}Content-Length: 100\r\n\r\n{{"name":"web"'.encode())
    caller = Caller(UnixConnection(service.paths.api_socket), {})
    for _ in range(3):
        assert caller.ask("GET", "/1.0/operations").status == 200
    caller.connection.close()
    assert shelf.done == 0
    assert "Traceback" not in caplog.text
    assert "unexpected error" not in caplog.text


def test_a_request_that_runs_while_the_service_ends_gets_its_answer(tmp_path: Path) -> None:
    shelf = Shelf()
    with ApiService(tmp_path, ROUTES, {"shelf": shelf}) as service:
        running = Caller(UnixConnection(service.paths.api_socket), {})
        running.connection.request("POST", "/1.0/things", b'{"name":"slow"}')
        other = Caller(UnixConnection(service.paths.api_socket), {})
        while shelf.done == 0:
            other.ask("GET", "/1.0/operations")
        other.connection.close()

        async def end_soon() -> None:
            asyncio.get_running_loop().call_soon(shelf.hold.set)

        service.call(end_soon)
    assert running.connection.getresponse().status == 201
    running.connection.close()
