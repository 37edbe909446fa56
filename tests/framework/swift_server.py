"""An OpenStack Swift with its S3 face, in one process, for the tests: run by Debian's Python, which has the package.

    /usr/bin/python3 swift_server.py FOLDER BUCKET QUOTA_BYTES

Proxy, account, container and object server listen on loopback ports of their own; objects, databases and rings are in
FOLDER. Requests must be signed (AWS signature version 4) by the user `test:tester` with the key in FOLDER/key, which is
new each time. When all listen, and the bucket is there, FOLDER/port has the proxy's port. Ends with its standard input.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys

import eventlet

eventlet.monkey_patch()

import eventlet.wsgi  # noqa: E402
import swift.common.utils  # noqa: E402
from paste.deploy import loadapp  # noqa: E402
from swift.common.ring import RingBuilder  # noqa: E402
from swift.common.swob import Request  # noqa: E402

PROXY = """
[pipeline:main]
pipeline = catch_errors s3api tempauth container-quotas proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
node_timeout = 60
swift_dir = {folder}
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = us-east-1
check_bucket_owner = false
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {key} .admin
user_test_reader = reading
storage_url_scheme = http
[filter:container-quotas]
use = egg:swift#container_quotas
"""

STORAGE = """
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
devices = {folder}/devices
mount_check = false
swift_dir = {folder}
fallocate_reserve = 0
"""


class NoCache:
    """Stands where memcached would: remembers nothing, so that nothing is stale. Signed requests need no more."""

    def get(self, key: str, **_: object) -> None:
        return None

    def set(self, key: str, value: object, **_: object) -> None:
        return None

    def delete(self, key: str, **_: object) -> None:
        return None


def listen() -> object:
    """A listener whose connections do not wait for acknowledgements: an answer would take 40 ms."""
    sock = eventlet.listen(("127.0.0.1", 0))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def serve(sock: object, conf: str, name: str) -> object:
    """Serve the application of a configuration file; the application."""
    inner = loadapp(f"config:{conf}", name="main")

    def application(env: dict[str, object], start_response: object) -> object:
        return inner({**env, "swift.cache": NoCache()}, start_response)

    quiet = open(os.devnull, "w")  # noqa: SIM115
    eventlet.spawn(eventlet.wsgi.server, sock, application, quiet, log_output=False, debug=False)
    print(name, "listens", flush=True)
    return application


def main(folder: str, bucket: str, quota_bytes: str) -> None:
    swift.common.utils.HASH_PATH_SUFFIX = b"mullion"
    os.makedirs(f"{folder}/devices/disk")
    for kind in ("account", "container", "object"):
        sock = listen()
        builder = RingBuilder(1, 1, 0)
        builder.add_dev(
            {
                "id": 0,
                "region": 1,
                "zone": 1,
                "ip": "127.0.0.1",
                "port": sock.getsockname()[1],
                "device": "disk",
                "weight": 1,
            }
        )
        builder.rebalance()
        builder.get_ring().save(f"{folder}/{kind}.ring.gz")
        with open(f"{folder}/{kind}.conf", "w") as file:
            file.write(STORAGE.format(kind=kind, folder=folder))
        serve(sock, f"{folder}/{kind}.conf", kind)
    key = secrets.token_hex(20)
    with open(f"{folder}/key", "w") as file:
        file.write(key)
    with open(f"{folder}/proxy.conf", "w") as file:
        file.write(PROXY.format(folder=folder, key=key))
    sock = listen()
    application = serve(sock, f"{folder}/proxy.conf", "proxy")
    for path, headers in (
        ("/v1/AUTH_test", {}),
        (f"/v1/AUTH_test/{bucket}", {}),
        (f"/v1/AUTH_test/{bucket}-small", {"X-Container-Meta-Quota-Bytes": quota_bytes}),
    ):
        request = Request.blank(path, method="PUT", headers=headers, environ={"swift.authorize_override": True})
        answer = request.get_response(application)
        if not answer.is_success:
            raise SystemExit(f"{path}: {answer.status}")
    with open(f"{folder}/port.new", "w") as file:
        file.write(str(sock.getsockname()[1]))
    os.rename(f"{folder}/port.new", f"{folder}/port")
    print("ready", flush=True)
    eventlet.tpool.execute(sys.stdin.read)


if __name__ == "__main__":
    main(*sys.argv[1:])
