"""The console on a real terminal: raw while connected, put back whatever ends it."""

import os
import pty
import select
import signal
import subprocess
import sys
import termios

import pytest

pytestmark = pytest.mark.contract

PROGRAM = """
import queue
from mullion.cli.console import attach
from mullion.cli.face import Face

class Link:
    def __init__(self):
        self.said = queue.Queue()
        self.said.put(b"login: ")
    def __iter__(self):
        while (item := self.said.get()) is not None:
            yield item
    def send(self, data):
        self.said.put(b"<" + data.hex().encode() + b">")
        if data == b"q":
            self.said.put(None)
    def close(self):
        self.said.put(None)

class Client:
    def console(self, name):
        return Link()
    def close(self):
        pass

attach(Face(connect=lambda _: Client()), "web")
"""


class Terminal:
    """A terminal with the program on it."""

    def __init__(self):
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
        )
        self.seen = b""

    def read_until(self, text):
        while text not in self.seen:
            assert select.select([self.master], [], [], 60)[0], self.seen
            self.seen += os.read(self.master, 4096)

    def type(self, keys):
        os.write(self.master, keys)

    def close(self):
        self.process.kill()
        self.process.wait(60)
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal():
    made = Terminal()
    yield made
    made.close()


def test_keys_go_to_the_guest_raw_and_ctrl_right_bracket_leaves(terminal):
    terminal.read_until(b"login: ")
    assert b"Leave with Ctrl-]" in terminal.seen
    assert not termios.tcgetattr(terminal.slave)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
    terminal.type(b"\x03")
    terminal.read_until(b"<03>")
    terminal.type(b"\x1d")
    terminal.read_until(b"Left the console of web; it goes on.")
    assert terminal.process.wait(60) == 0
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_the_end_of_the_console_ends_the_command(terminal):
    terminal.read_until(b"login: ")
    terminal.type(b"q")
    terminal.read_until(b"The console of web has closed.")
    assert terminal.process.wait(60) == 0
    assert termios.tcgetattr(terminal.slave) == terminal.before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_puts_the_terminal_back(terminal, number):
    terminal.read_until(b"login: ")
    terminal.process.send_signal(number)
    assert terminal.process.wait(60) == 128 + number
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_a_window_that_changes_its_size_disturbs_nothing(terminal):
    terminal.read_until(b"login: ")
    terminal.process.send_signal(signal.SIGWINCH)
    terminal.type(b"x")
    terminal.read_until(b"<78>")
    terminal.type(b"\x1d")
    assert terminal.process.wait(60) == 0
