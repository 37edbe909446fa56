"""The log: one line per record, with the fields of what was being done, and never a secret.

A line is `TIME LEVEL LOGGER field=value … message`. The fields (partition, disk, operation, host) come from the context
of the task that logs, see `bind`. A line cannot be forged by a guest's or a client's text, because control characters
are escaped; a traceback follows its line, each of its lines indented.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Final

from mullion.base.errors import InvalidError, UnavailableError
from mullion.base.units import MIB, format_time

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}
MAX_LOG_BYTES: Final = 10 * MIB
KEPT_LOGS: Final = 5

_fields: ContextVar[tuple[tuple[str, str], ...]] = ContextVar("mullion_log_fields", default=())
_secrets: set[str] = set()
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_BEARER: Final = re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}")


@contextlib.contextmanager
def bind(**fields: object) -> Iterator[None]:
    """Add fields to every line that this task, and tasks it starts, log in the block."""
    given = tuple((name, str(value)) for name, value in fields.items())
    token = _fields.set((*(pair for pair in _fields.get() if pair[0] not in fields), *given))
    try:
        yield
    finally:
        _fields.reset(token)


def bound() -> dict[str, str]:
    """The fields in force."""
    return dict(_fields.get())


def keep_secret(secret: str) -> None:
    """From now on this text appears in no log line."""
    if secret:
        _secrets.add(secret)


def set_up(level: str = "info", path: str | None = None, *, stderr: bool = True) -> None:
    """Send the log to standard error and to a file that is rotated at 10 MiB, five old ones kept. May be repeated.

    Raises: InvalidError for an unknown level; UnavailableError when the file cannot be opened.
    """
    if level not in LEVELS:
        raise InvalidError(f"{level!r} is not a log level", remedy=f"Allowed: {', '.join(LEVELS)}.")
    handlers: list[logging.Handler] = []
    if path is not None:
        handlers.append(_open_file(path))
    if stderr:
        handlers.append(logging.StreamHandler(sys.stderr))
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old.formatter, LineFormatter):
            root.removeHandler(old)
            old.close()
    for handler in handlers:
        handler.setFormatter(LineFormatter())
        root.addHandler(handler)
    root.setLevel(LEVELS[level])


def _open_file(path: str) -> logging.Handler:
    from logging.handlers import RotatingFileHandler

    class File(RotatingFileHandler):
        """A log that cannot be written (its filesystem is full) must not hide what is said elsewhere."""

        def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
            error = sys.exc_info()[1]
            if not isinstance(error, OSError):  # a fault of ours: shown as logging does
                super().handleError(record)

    try:
        return File(path, maxBytes=MAX_LOG_BYTES, backupCount=KEPT_LOGS, encoding="utf-8")
    except OSError as error:
        raise UnavailableError(
            f"the log {path} cannot be opened: {error.strerror}",
            remedy="Make its folder writable, or choose another one (setting data_dir).",
            path=path,
        ) from error


class LineFormatter(logging.Formatter):
    """Records as lines."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_value(value)}" for name, value in _fields.get())
        time = format_time(int(record.created * 1e9))
        line = f"{time} {record.levelname.lower()} {record.name}{fields} {_escape(record.getMessage())}"
        if record.exc_info and record.exc_info[0] is not None:
            traceback = self.formatException(record.exc_info)
            line += "".join(f"\n    {_escape(part)}" for part in traceback.splitlines())
        for secret in _secrets:
            line = line.replace(secret, "***")
        return _BEARER.sub(r"\1***", line)


def _value(text: str) -> str:
    escaped = _escape(text)
    return f'"{escaped}"' if " " in escaped or not escaped else escaped


def _escape(text: str) -> str:
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}" if match[0] != "\n" else "\\n", text)
