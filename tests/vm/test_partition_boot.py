"""As a new user would: create, start, log in, write a file, stop, start, and it is there."""

from __future__ import annotations

import pytest
from tests.framework.service import Service

pytestmark = pytest.mark.vm


def type_and_wait(service: Service, name: str, script: list[tuple[str, str]]) -> str:
    """Type lines into the console; before each, wait until its prompt is printed."""
    seen = ""
    with service.client() as client:
        console = client.console(name)
        try:
            chunks = iter(console)
            for prompt, line in script:
                position = 0
                while prompt not in seen[position:]:
                    seen += next(chunks).decode(errors="replace")
                seen = seen.split(prompt, 1)[1]
                console.send(line.encode())
        finally:
            console.close()
    return seen


def test_a_file_written_at_the_console_is_there_after_stop_and_start(service: Service) -> None:
    service.start()
    service.cli("partition", "create", "web", "--memory", "256M", "--disk", "web,parent=image:demo")
    service.cli("partition", "start", "web")
    view = service.wait_agent("web")
    assert view.state.value == "running"
    assert view.boot_s is not None
    assert len(view.disks[0].chain) == 2

    type_and_wait(
        service,
        "web",
        [
            ("login:", "root\n"),
            ("# ", "echo kept-$((6*7)) >/root/note; sync\n"),
            ("# ", "cat /root/note\n"),
            ("kept-42", ""),
        ],
    )
    service.cli("partition", "stop", "web")
    assert service.partition("web").state.value == "stopped"
    assert service.provider("web") is None
    assert service.qemu("web") is None

    service.cli("partition", "start", "web")
    service.wait_agent("web")
    type_and_wait(service, "web", [("login:", "root\n"), ("# ", "cat /root/note\n"), ("kept-42", "")])
    service.cli("partition", "stop", "web", "--force")
    service.cli("partition", "delete", "web", "--with-disks", "--yes")
    assert service.cli("partition", "list", "--format", "json").json == []
