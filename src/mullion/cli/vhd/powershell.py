"""The names of Hyper-V's PowerShell module, for hands that know them: `mullion vhd New-VHD -Path a.vhd -SizeBytes 4GB`.

One table. A cmdlet's name becomes the command's, its parameters become the command's arguments and options; names are
compared without case, and a value may follow after a space or a colon, as in PowerShell. What PowerShell has and a
command has not is refused by name, never ignored. Sizes such as 4GB mean powers of 1024 on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import InvalidError


@dataclass(frozen=True, slots=True)
class Parameter:
    """What a cmdlet's parameter becomes: words before its value, and whether it takes one; no words: an argument."""

    words: tuple[str, ...] = ()
    takes_value: bool = True
    values: Mapping[str, str] | None = None
    """The values that are allowed, lower case, and what each becomes."""


@dataclass(frozen=True, slots=True)
class Cmdlet:
    """A cmdlet and the command that it stands for; parameters in the order of the command's arguments."""

    name: str
    command: str
    parameters: Mapping[str, Parameter]


_PATH: Final = Parameter()
_PARENT: Final = Parameter(("--parent",))
_SIZE: Final = Parameter(("--size",))
_BLOCK: Final = Parameter(("--block-size",))

CMDLETS: Final = (
    Cmdlet(
        "New-VHD",
        "create",
        {
            "Path": _PATH,
            "SizeBytes": _SIZE,
            "Dynamic": Parameter(("--type", "dynamic"), takes_value=False),
            "Fixed": Parameter(("--type", "fixed"), takes_value=False),
            "Differencing": Parameter(takes_value=False),
            "ParentPath": _PARENT,
            "BlockSizeBytes": _BLOCK,
        },
    ),
    Cmdlet("Get-VHD", "info", {"Path": _PATH}),
    Cmdlet(
        "Convert-VHD",
        "convert",
        {
            "Path": _PATH,
            "DestinationPath": _PATH,
            "VHDType": Parameter(("--to",), values={"fixed": "fixed", "dynamic": "dynamic"}),
            "BlockSizeBytes": _BLOCK,
        },
    ),
    Cmdlet("Merge-VHD", "merge", {"Path": _PATH, "DestinationPath": Parameter(("--into",))}),
    Cmdlet("Resize-VHD", "resize", {"Path": _PATH, "SizeBytes": _SIZE}),
    Cmdlet("Test-VHD", "check", {"Path": _PATH}),
    Cmdlet("Optimize-VHD", "compact", {"Path": _PATH}),
    Cmdlet(
        "Set-VHD",
        "rebase",
        {"Path": _PATH, "ParentPath": _PARENT, "IgnoreIdMismatch": Parameter(("--unsafe",), takes_value=False)},
    ),
)


def find_cmdlet(word: str) -> Cmdlet | None:
    """The cmdlet of that name, in any case."""
    return next((cmdlet for cmdlet in CMDLETS if cmdlet.name.lower() == word.lower()), None)


def translate(cmdlet: Cmdlet, words: Sequence[str]) -> list[str]:
    """The arguments of our command for those of a cmdlet. Our own options (`--force`) pass as they are.

    Raises: InvalidError for a parameter that the cmdlet, or our command, has not, and for a value that is missing.
    """
    places: dict[str, str] = {}
    options: list[str] = []
    rest: list[str] = []
    known = {name.lower(): name for name in cmdlet.parameters}
    left = list(words)
    while left:
        word = left.pop(0)
        if not _is_parameter(word):
            rest.append(word)
            continue
        given, colon, value = word[1:].partition(":")
        name = known.get(given.lower())
        if name is None:
            raise _unknown(cmdlet, given)
        parameter = cmdlet.parameters[name]
        if not parameter.takes_value:
            options += parameter.words
            continue
        if not colon:
            if not left:
                raise InvalidError(f"-{name} has no value", remedy=f"Write {cmdlet.name} -{name} VALUE.")
            value = left.pop(0)
        value = _allowed(cmdlet, name, parameter, value)
        if parameter.words:
            options += [*parameter.words, value]
        else:
            places[name] = f"./{value}" if value.startswith("-") else value
    return [*options, *(places[name] for name in cmdlet.parameters if name in places), *rest]


def _is_parameter(word: str) -> bool:
    return len(word) > 2 and word[0] == "-" and word[1].isalpha()


def _allowed(cmdlet: Cmdlet, name: str, parameter: Parameter, value: str) -> str:
    if parameter.values is None:
        return value
    found = parameter.values.get(value.lower())
    if found is None:
        allowed = ", ".join(parameter.values)
        raise InvalidError(f"{cmdlet.name} -{name} {value} is not supported", remedy=f"Allowed: {allowed}.")
    return found


def _unknown(cmdlet: Cmdlet, given: str) -> InvalidError:
    allowed = ", ".join(f"-{name}" for name in cmdlet.parameters)
    return InvalidError(
        f"{cmdlet.name} has no parameter -{given} here",
        remedy=f"It takes {allowed}; or see: mullion vhd {cmdlet.command} --help",
    )
