"""The root of every error that a person or a program sees, and the few kinds that all floors share.

An error class fixes four things that scripts may rely on: `code` (a stable string, unique), `exit_code` (of the command
line), `http_status` (of the REST API) and `remedy` (what to do next). An instance adds the message, a better remedy
where one is known, and the context (path, offset, partition) as named attributes.

Exit codes: 1 our own fault · 2 wrong usage · 3 not found · 4 conflict · 5 invalid input · 6 wrong state · 7 service or
tool unavailable · 8 disk damaged · 9 no space or memory left · 12 not permitted · 13 deadline passed · 14 operation
failed or cancelled. 10 and 11 are verdicts of `mullion vhd check`: repairable, broken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

_CLASSES: Final[dict[str, type[MullionError]]] = {}
_REMOTE_CODE: Final = "remote_code"
_REMOTE_EXIT_CODE: Final = "remote_exit_code"


class MullionError(Exception):
    """The root: something that Mullion was asked to do did not happen."""

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    default_remedy: ClassVar[str] = "This is a fault in Mullion: report it with the service's log."

    def __init__(self, message: str, *, remedy: str | None = None, **context: object) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy or self.default_remedy
        self.context = {name: value for name, value in context.items() if value is not None}

    def __init_subclass__(cls, **arguments: object) -> None:
        super().__init_subclass__(**arguments)
        if "code" in cls.__dict__:
            _CLASSES[cls.code] = cls

    def __str__(self) -> str:
        return self.message

    def to_wire(self) -> dict[str, object]:
        """The error as another process gets it: ErrorView's fields, with JSON values only.

        One that came from a third process, which knows more kinds than this one, goes on under its own code.
        """
        plain = {
            name: value if isinstance(value, str | int | float) else str(value) for name, value in self.context.items()
        }
        code, exit_code = plain.pop(_REMOTE_CODE, self.code), plain.pop(_REMOTE_EXIT_CODE, self.exit_code)
        return {
            "code": code,
            "message": self.message,
            "remedy": self.remedy,
            "context": plain,
            "exit_code": exit_code,
        }

    @staticmethod
    def from_wire(fields: Mapping[str, object]) -> MullionError:
        """The error that another process reported, of the same class where this process knows it."""
        code = str(fields.get("code", "remote"))
        known = _CLASSES.get(code, RemoteError)
        context = fields.get("context")
        error = known.__new__(known)
        MullionError.__init__(
            error,
            str(fields.get("message", "no reason was given")),
            remedy=str(fields["remedy"]) if fields.get("remedy") else None,
            **{str(name): value for name, value in context.items()} if isinstance(context, Mapping) else {},
        )
        if known is RemoteError:
            error.context[_REMOTE_CODE] = code
            if isinstance(status := fields.get("exit_code"), int):
                error.context[_REMOTE_EXIT_CODE] = status
        return error


class RemoteError(MullionError):
    """Another process reported an error of a kind that this one does not know."""

    code = "remote"
    default_remedy = "Bring both sides to the same version of Mullion; `remote_code` is the error's own code."


class InvalidError(MullionError):
    """A definition, an argument or a request does not say something that can be done."""

    code = "invalid"
    exit_code = 5
    http_status = 400
    default_remedy = "Correct the named field and try again."


class TooLargeError(InvalidError):
    """A request or a foreign structure is larger than its limit."""

    code = "too-large"
    http_status = 413
    default_remedy = "Send less: the limits are listed in docs/limits.md."


class NotFoundError(MullionError):
    """The named thing does not exist."""

    code = "not-found"
    exit_code = 3
    http_status = 404
    default_remedy = "List what exists with the noun's `list` command."


class ConflictError(MullionError):
    """The request collides with something that exists or is going on."""

    code = "conflict"
    exit_code = 4
    http_status = 409
    default_remedy = "Wait for the other operation to end, or choose another name."


class AlreadyExistsError(ConflictError):
    """The name is taken."""

    code = "already-exists"
    default_remedy = "Choose another name, or delete the existing one first."


class PreconditionError(ConflictError):
    """The thing changed since it was read (the ETag in If-Match is not the present one)."""

    code = "precondition-failed"
    http_status = 412
    default_remedy = "Read it again and repeat the change on what it says now."


class StateError(ConflictError):
    """The thing is in a state in which this cannot be done."""

    code = "wrong-state"
    exit_code = 6
    default_remedy = "Bring it into the required state first."

    def __init__(
        self, message: str, *, state: str, required: str, remedy: str | None = None, **context: object
    ) -> None:
        super().__init__(message, remedy=remedy or f"It is {state}; it must be {required}.", **context)
        self.context |= {"state": state, "required": required}


class UnavailableError(MullionError):
    """A service, a process or a device does not answer."""

    code = "unavailable"
    exit_code = 7
    http_status = 503
    default_remedy = "Start the service with `mullion serve --detach`, then try again."


class MissingToolError(UnavailableError):
    """A program of the host that is needed is not installed."""

    code = "missing-tool"
    default_remedy = "Install the named package, then run `mullion doctor`."


class NoSpaceError(MullionError):
    """The storage, or the memory of the host, is full."""

    code = "no-space"
    exit_code = 9
    http_status = 507
    default_remedy = "Make room on the named filesystem: delete or move files, or grow it."


class DeniedError(MullionError):
    """The caller may not do this."""

    code = "denied"
    exit_code = 12
    http_status = 403
    default_remedy = "Use an account or a token that has the right, or run the command as root."


class DeadlineError(MullionError):
    """Something did not happen in the time allowed."""

    code = "deadline"
    exit_code = 13
    http_status = 504
    default_remedy = "Try again; if it repeats, look into the partition's logs."


class OperationFailedError(MullionError):
    """An operation ended without its result."""

    code = "operation-failed"
    exit_code = 14
    http_status = 500
    default_remedy = "Read the operation with `mullion operation show`."


class OperationCancelledError(OperationFailedError):
    """An operation was cancelled; what it had begun was rolled back."""

    code = "operation-cancelled"
    http_status = 409
    default_remedy = "Start it again if it is still wanted."
