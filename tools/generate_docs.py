"""Write docs/errors.md, docs/settings.md and docs/powershell.md from the code's own tables, so that they cannot differ.

python tools/generate_docs.py            writes the pages
python tools/generate_docs.py --check    exits with 1 when a page is out of date
"""

from __future__ import annotations

import importlib
import inspect
import pathlib
import pkgutil
import sys
from collections.abc import Iterator, Sequence

import mullion
from mullion.base import errors
from mullion.base.errors import MullionError
from mullion.base.settings import SETTINGS, Setting
from mullion.cli.vhd.powershell import CMDLETS, Parameter

DOCS = pathlib.Path(__file__).parent.parent / "docs"
MADE_BY = "*Made by `tools/generate_docs.py` from the code itself: change that, not this page.*"
FOLDERS = {
    "data_dir": "`/var/lib/mullion` for root, else `$XDG_DATA_HOME/mullion` (`~/.local/share/mullion`)",
    "run_dir": "`/run/mullion` for root, else `$XDG_RUNTIME_DIR/mullion` (`/tmp/mullion-UID/mullion`)",
}
"""The defaults that depend on who asks."""


def error_classes() -> list[type[MullionError]]:
    """Every error class of the package, sorted by exit code and code."""
    for module in pkgutil.walk_packages(mullion.__path__, "mullion."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found = {kind for kind in _descendants(MullionError) if kind.__module__.partition(".")[0] == "mullion"}
    return sorted(found, key=lambda kind: (kind.exit_code, kind.code, kind.__qualname__))


def _descendants(kind: type[MullionError]) -> Iterator[type[MullionError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _descendants(child)


def errors_page() -> str:
    """The reference of all errors."""
    exit_codes = _paragraph(inspect.getdoc(errors) or "", "Exit codes:")
    lines = [
        "# Errors",
        "",
        MADE_BY,
        "",
        "Every error has a *code*, which stays the same from version to version, a message that says what happened,",
        "and a remedy that says what to do next. The REST API answers with the *status* and a body of `code`,",
        "`message`, `remedy`, `context` and `exit_code`; the command line ends with the *exit* code. Where more is",
        "known, an error carries a better remedy than the one below.",
        "",
        exit_codes,
        "",
        *_table(
            ("code", "status", "exit", "what happened", "remedy"),
            [
                (f"`{kind.code}`", str(kind.http_status), str(kind.exit_code), _meaning(kind), kind.default_remedy)
                for kind in error_classes()
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """The reference of all settings."""
    lines = [
        "# Settings",
        "",
        MADE_BY,
        "",
        "Order of precedence: command line, environment, file, default. The file is TOML, one `name = value` a line:",
        "for root `/etc/mullion/mullion.toml`, else `~/.local/share/mullion/mullion.toml`; the variable",
        "`MULLION_CONFIG` names another. `MULLION_HOME=DIR` puts the data folder, the run folder and the file below",
        "one `DIR`.",
        "",
        *_table(
            ("name", "variable", "kind", "unit or choice", "default", "meaning"),
            [
                (
                    f"`{setting.name}`",
                    f"`{setting.variable}`",
                    "number" if setting.kind is int else "text",
                    setting.unit.replace("|", ", "),
                    _default(setting),
                    setting.help,
                )
                for setting in SETTINGS
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def powershell_page() -> str:
    """Hyper-V's names and what they stand for."""
    lines = [
        "# Hyper-V's names for `mullion vhd`",
        "",
        MADE_BY,
        "",
        "`mullion vhd New-VHD -Path a.vhd -SizeBytes 4GB` is `mullion vhd create a.vhd --size 4GB`. Names are compared",
        "without case; a value follows after a space or a colon; arguments may be given without their names, in the",
        "order of the command; our own options (`--force`) may be added. What is not listed is refused by name, never",
        "ignored.",
        "",
        *_table(
            ("cmdlet", "parameter", "is", "for"),
            [
                (f"`{cmdlet.name}`", f"`-{name}`", f"`mullion vhd {cmdlet.command}`", _stands_for(parameter))
                for cmdlet in CMDLETS
                for name, parameter in cmdlet.parameters.items()
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def _stands_for(parameter: Parameter) -> str:
    if not parameter.words:
        return "an argument" if parameter.takes_value else "nothing: `-ParentPath` says it"
    values = f" {'|'.join(parameter.values)}" if parameter.values else " VALUE" if parameter.takes_value else ""
    return f"`{' '.join(parameter.words)}{values}`"


PAGES = {"errors.md": errors_page, "settings.md": settings_page, "powershell.md": powershell_page}


def _meaning(kind: type[MullionError]) -> str:
    """The first paragraph of the class's docstring."""
    return " ".join((inspect.cleandoc(kind.__doc__ or "")).split("\n\n", maxsplit=1)[0].split())


def _default(setting: Setting) -> str:
    return FOLDERS.get(setting.name) or f"`{setting.default}`"


def _paragraph(text: str, start: str) -> str:
    """The paragraph that begins with some words, in one line."""
    part = text[text.index(start) :].partition("\n\n")[0]
    return " ".join(part.split())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]


def main(arguments: Sequence[str]) -> int:
    stale = []
    for name, make in PAGES.items():
        page, text = DOCS / name, make()
        if page.exists() and page.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in arguments:
            page.write_text(text, encoding="utf-8")
    if "--check" in arguments and stale:
        print(f"out of date: {', '.join(stale)}; run python tools/generate_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
