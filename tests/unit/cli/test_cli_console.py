"""The relay between a terminal and a console, over pipes; the terminal itself is tried in the contract tests."""

import os
import queue
import threading

import pytest

from mullion.base.errors import UnavailableError
from mullion.cli.console import Relay, without_commands

pytestmark = pytest.mark.unit


class Guest:
    """A console whose guest answers what a function says, and that ends when told."""

    def __init__(self, answer=lambda data: data):
        self.received = b""
        self.closed = threading.Event()
        self._answer = answer
        self._said: queue.Queue[bytes | Exception | None] = queue.Queue()

    def say(self, what):
        self._said.put(what)

    def __iter__(self):
        while (item := self._said.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def send(self, data):
        self.received += data
        if answer := self._answer(data):
            self.say(answer)

    def close(self):
        self.closed.set()
        self.say(None)


@pytest.fixture
def pipes():
    stdin_read, stdin_write = os.pipe()
    stdout_read, stdout_write = os.pipe()
    yield stdin_read, stdin_write, stdout_read, stdout_write
    for fd in (stdin_read, stdin_write, stdout_read, stdout_write):
        try:
            os.close(fd)
        except OSError:
            pass


def relay(guest, pipes, *, is_terminal=False, linger_s=0.0):
    return Relay(guest, pipes[0], pipes[3], is_terminal=is_terminal, linger_s=linger_s)


def test_the_scrollback_and_what_the_guest_says_are_printed_until_it_ends(pipes):
    guest = Guest()
    guest.say(b"earlier\r\n")
    guest.say(b"\xff\x00now")
    guest.say(None)
    assert relay(guest, pipes).run()
    assert os.read(pipes[2], 100) == b"earlier\r\n\xff\x00now"
    assert guest.closed.is_set()


@pytest.mark.parametrize(
    ("scrollback", "shown"),
    [
        (b"\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS\r\n", b"\x1b[0mSeaBIOS\r\n"),
        (b"~ # \x1b[6n\x1b[1;31mred\x1b[m", b"~ # \x1b[1;31mred\x1b[m"),
        (b"a\x1b]0;title\x07b\x1bP$q\x1b\\c\x1b(Bd\x1b7e", b"abcde"),
        (b"half \x1b[", b"half \x1b["),
    ],
)
def test_what_the_guest_wrote_earlier_does_not_act_on_the_terminal(pipes, scrollback, shown):
    assert without_commands(scrollback) == shown
    guest = Guest()
    for said in (scrollback, b"\x1bclive", None):
        guest.say(said)
    assert relay(guest, pipes, is_terminal=True).run()
    assert os.read(pipes[2], 100) == shown + b"\x1bclive"


def test_in_a_pipe_nothing_is_left_out(pipes):
    guest = Guest()
    guest.say(b"\x1bc\x1b[6n")
    guest.say(None)
    assert relay(guest, pipes).run()
    assert os.read(pipes[2], 100) == b"\x1bc\x1b[6n"


def test_ctrl_right_bracket_leaves_and_what_was_typed_before_it_is_sent(pipes):
    guest = Guest(answer=lambda data: b"")
    os.write(pipes[1], b"ls\r\x03\x1dnot this")
    assert not relay(guest, pipes, is_terminal=True).run()
    assert guest.received == b"ls\r\x03"


def test_in_a_pipe_every_byte_goes_to_the_guest_and_its_answer_is_awaited(pipes):
    guest = Guest()
    guest._answer = lambda data: (guest.say(data), guest.say(None))[1]
    os.write(pipes[1], bytes(range(256)))
    os.close(pipes[1])
    assert relay(guest, pipes, linger_s=60).run()
    assert guest.received == bytes(range(256))
    assert os.read(pipes[2], 1000) == bytes(range(256))


def test_after_the_end_of_the_input_a_silent_guest_is_left(pipes):
    os.close(pipes[1])
    assert not relay(Guest(), pipes, linger_s=0).run()


def test_a_connection_that_breaks_is_an_error(pipes):
    guest = Guest()
    guest.say(UnavailableError("the service went away"))
    with pytest.raises(UnavailableError, match="went away"):
        relay(guest, pipes).run()


def test_a_reader_that_went_away_is_an_error(pipes):
    guest = Guest()
    os.close(pipes[2])
    guest.say(b"to nobody")
    with pytest.raises(BrokenPipeError):
        relay(guest, pipes).run()
