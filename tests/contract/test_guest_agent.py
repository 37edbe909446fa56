"""The agent's client against an agent that a test plays: late, noisy, wrong, silent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mullion.hypervisor.agent import GuestAgent
from mullion.hypervisor.errors import AgentError, AgentRefusedError

pytestmark = pytest.mark.contract

Play = Callable[["Pipe"], Awaitable[None]]


class Pipe:
    """The guest's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def request(self) -> dict[str, object]:
        line = await self.reader.readline()
        if not line:
            raise EOFError
        return json.loads(line.lstrip(b"\xff"))  # type: ignore[no-any-return]

    async def answer(self, value: object) -> None:
        await self.raw(json.dumps(value).encode() + b"\n")

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def obey(self, results: dict[str, object] | None = None) -> None:
        """A well-behaved agent."""
        while True:
            asked = await self.request()
            name = asked["execute"]
            if name == "guest-sync-delimited":
                await self.raw(b"\xff" + json.dumps({"return": asked["arguments"]["id"]}).encode() + b"\n")  # type: ignore[index]
            elif results is not None and name in results:
                await self.answer(results[str(name)])
            else:
                await self.answer({"return": {}})


@asynccontextmanager
async def played(path: str, play: Play) -> AsyncIterator[GuestAgent]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await play(Pipe(reader, writer))
        except (EOFError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, path)
    agent = GuestAgent(path)
    try:
        async with asyncio.timeout(60):
            yield agent
    finally:
        await agent.close()
        server.close()
        await server.wait_closed()


def told(tmp_path: Path, play: Play, story: Callable[[GuestAgent], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with played(str(tmp_path / "a"), play) as agent:
            await story(agent)

    asyncio.run(whole())


def test_requests_are_answered_in_turn(tmp_path: Path) -> None:
    async def story(agent: GuestAgent) -> None:
        answers = await asyncio.gather(*(agent.command(f"guest-{number}") for number in range(20)))
        assert answers == list(range(20))

    results: dict[str, object] = {f"guest-{number}": {"return": number} for number in range(20)}
    told(tmp_path, lambda pipe: pipe.obey(results), story)


def test_an_agent_that_comes_up_late_and_answers_everything_that_waited(tmp_path: Path) -> None:
    async def play(pipe: Pipe) -> None:
        first = [await pipe.request() for _ in range(3)]
        for asked in first:
            await pipe.raw(b"\xff" + json.dumps({"return": asked["arguments"]["id"]}).encode() + b"\n")  # type: ignore[index]
        await pipe.obey({"guest-info": {"return": {"version": "7.2"}}})

    async def story(agent: GuestAgent) -> None:
        assert await agent.command("guest-info") == {"version": "7.2"}

    told(tmp_path, play, story)


def test_stray_answers_and_noise_before_the_number_are_passed_over(tmp_path: Path) -> None:
    async def play(pipe: Pipe) -> None:
        await pipe.raw(b'{"return": {"stale": true}}\n{"half": ')
        await pipe.raw(b'\xff{"return": 1}\n\xff{"return": "not a number"}\n')
        await pipe.obey({"guest-info": {"return": {"fresh": True}}})

    async def story(agent: GuestAgent) -> None:
        assert await agent.command("guest-info") == {"fresh": True}

    told(tmp_path, play, story)


def test_a_refusal_is_told_and_the_session_goes_on(tmp_path: Path) -> None:
    async def story(agent: GuestAgent) -> None:
        with pytest.raises(AgentRefusedError, match="the guest agent refused guest-bad: no such thing"):
            await agent.command("guest-bad")
        assert await agent.ping()

    told(tmp_path, lambda pipe: pipe.obey({"guest-bad": {"error": {"class": "X", "desc": "no such thing"}}}), story)


@pytest.mark.parametrize("noise", [b"", b"rubbish without an end", b"\xff[1, 2]\n", b"\xffnot json\n", b"\xff\n"])
def test_a_silent_or_mad_agent_is_given_up_in_time(tmp_path: Path, noise: bytes) -> None:
    async def play(pipe: Pipe) -> None:
        await pipe.raw(noise)
        while True:
            await pipe.request()

    async def story(agent: GuestAgent) -> None:
        assert not await agent.ping(0.3)
        with pytest.raises(AgentError):
            await agent.command("guest-info", timeout_s=0.1)

    told(tmp_path, play, story)


def test_an_agent_that_hangs_up_is_met_again(tmp_path: Path) -> None:
    meetings = 0

    async def play(pipe: Pipe) -> None:
        nonlocal meetings
        meetings += 1
        if meetings == 1:
            await pipe.request()
            return
        await pipe.obey()

    async def story(agent: GuestAgent) -> None:
        with pytest.raises(AgentError, match="lost"):
            await agent.command("guest-info")
        assert await agent.ping()

    told(tmp_path, play, story)


def test_what_a_deadline_left_behind_is_not_taken_for_an_answer(tmp_path: Path) -> None:
    late = asyncio.Event()

    async def play(pipe: Pipe) -> None:
        while True:
            asked = await pipe.request()
            if asked["execute"] == "guest-slow":
                await late.wait()
                await pipe.answer({"return": "too late"})
            elif asked["execute"] == "guest-sync-delimited":
                await pipe.raw(b"\xff" + json.dumps({"return": asked["arguments"]["id"]}).encode() + b"\n")  # type: ignore[index]
            else:
                await pipe.answer({"return": "in time"})

    async def story(agent: GuestAgent) -> None:
        with pytest.raises(AgentError, match="did not answer guest-slow within"):
            await agent.command("guest-slow", timeout_s=0.3)
        late.set()
        assert await agent.command("guest-quick") == "in time"

    told(tmp_path, play, story)


def test_shutdown_is_taken_by_silence_or_a_hang_up_and_refused_by_an_answer(tmp_path: Path) -> None:
    async def hang_up(pipe: Pipe) -> None:
        asked = await pipe.request()
        await pipe.raw(b"\xff" + json.dumps({"return": asked["arguments"]["id"]}).encode() + b"\n")  # type: ignore[index]
        asked = await pipe.request()
        assert asked == {"execute": "guest-shutdown", "arguments": {"mode": "powerdown"}}

    async def silent(pipe: Pipe) -> None:
        await hang_up(pipe)
        await pipe.reader.read()

    async def story(agent: GuestAgent) -> None:
        await agent.shutdown()

    async def refused(agent: GuestAgent) -> None:
        with pytest.raises(AgentRefusedError, match="not allowed"):
            await agent.shutdown()

    for number, play in enumerate((silent, hang_up)):
        (tmp_path / str(number)).mkdir()
        told(tmp_path / str(number), play, story)
    told(tmp_path, lambda pipe: pipe.obey({"guest-shutdown": {"error": {"desc": "not allowed"}}}), refused)


def test_without_a_machine_there_is_no_agent(tmp_path: Path) -> None:
    async def story() -> None:
        agent = GuestAgent(str(tmp_path / "nothing"))
        assert not await agent.ping()
        with pytest.raises(AgentError, match="cannot be reached") as caught:
            await agent.command("guest-info")
        assert "Start the partition" in caught.value.remedy

    asyncio.run(story())
