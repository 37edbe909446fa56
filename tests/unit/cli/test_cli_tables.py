"""Tables and fields: aligned whatever is in them."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mullion.cli.face import Face
from mullion.cli.tables import fields, printable, state_word, table, width_of

pytestmark = pytest.mark.unit


def test_columns_are_as_wide_as_their_widest_cell():
    text = table(("NAME", "SIZE"), [("web", "40 GiB"), ("database", "1 MiB")], right=(1,))
    assert text.splitlines() == ["NAME        SIZE", "web       40 GiB", "database   1 MiB"]


def test_colours_and_wide_characters_do_not_shift_columns():
    assert width_of("\x1b[32mrunning\x1b[0m") == 7
    assert width_of("窓") == 2
    assert width_of("e\u0301") == 1
    lines = table(("A", "B"), [("\x1b[31mfailed\x1b[0m", "x"), ("窓", "y")]).splitlines()
    assert {width_of(line) for line in lines} == {9}


@given(st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9)), max_size=5))
@settings(max_examples=100)
def test_every_row_is_one_line_whose_columns_begin_together(rows):
    clean = [tuple(printable(cell).replace("\u2028", "").replace("\u2029", "") for cell in row) for row in rows]
    lines = table(("FIRST", "SECOND"), clean).split("\n")
    assert len(lines) == len(rows) + 1
    start = lines[0].index("SECOND")
    for (first, second), line in zip(clean, lines[1:], strict=True):
        assert line == (first + " " * (start - width_of(first)) + second).rstrip()


def test_fields_leave_out_what_is_empty_and_indent_what_is_long():
    assert fields([("a", "1"), ("none", ""), ("longer", "2\n3")]) == "a       1\nlonger  2\n        3"


def test_control_characters_of_others_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\r\n") == "a?[2Jb??"


def test_colours_only_for_a_terminal_that_wants_them(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    assert Face().has_color(terminal)
    assert not Face(no_color=True).has_color(terminal)
    assert not Face().has_color(io.StringIO())
    monkeypatch.setattr("sys.stdout", terminal)
    assert state_word(Face(), "running") == "\x1b[32mrunning\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert state_word(Face(), "running") == "running"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not Face().has_color(terminal)
