"""What can be found wrong with a VHD: one table of kinds, for opening, `check` and `repair` alike.

A kind fixes what programs may rely on: its `code`, the structure of the specification that it is about, and what cures
it. Whoever reads a file makes a `Finding` of a kind and says what he saw and where. Opening turns a finding of a kind
that it cannot live with into an error; `check` lists them all.

Invariants: a verdict follows from the findings' cures alone; a file that opening refuses has a finding whose cure is
not `NOTHING`, so it is never called sound.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, StrEnum

from mullion.vhd.errors import NotVhdError, VhdDamagedError, VhdError, VhdUnsupportedError


class Verdict(StrEnum):
    """What a check comes to; each has an exit code of `mullion vhd check`."""

    SOUND = "sound"
    REPAIRABLE = "repairable"
    BROKEN = "broken"

    @property
    def exit_code(self) -> int:
        return {Verdict.SOUND: 0, Verdict.REPAIRABLE: 10, Verdict.BROKEN: 11}[self]


class Cure(Enum):
    """What makes a finding go away."""

    NOTHING = "nothing"  # a harmless deviation: a warning
    REPAIR = "repair"  # `repair` mends it, and nothing of the disk is lost
    CONSENT = "consent"  # lost already; `repair --allow-loss` makes the lost part readable, as zeros
    COMMAND = "command"  # another command, named in the remedy
    LOSS = "loss"  # `repair --allow-loss` gives up what the file may still have
    NONE = "none"

    @property
    def verdict(self) -> Verdict:
        if self is Cure.NOTHING:
            return Verdict.SOUND
        return Verdict.BROKEN if self in (Cure.LOSS, Cure.NONE) else Verdict.REPAIRABLE


class Kind(Enum):
    """Code, structure and cure. `keeps_from_writing`: the disk can be read, and must not be written as it is."""

    NOT_VHD = "not-a-vhd", "footer", Cure.NONE
    FOOTER_INVALID = "footer-invalid", "footer", Cure.NONE
    FOOTER_CHECKSUM = "footer-checksum", "footer", Cure.REPAIR
    FOOTER_MISSING = "footer-missing", "footer", Cure.REPAIR
    FOOTER_BURIED = "footer-buried", "footer", Cure.REPAIR
    FOOTER_COPY_BAD = "footer-copy-bad", "footer copy", Cure.REPAIR, True
    FOOTERS_DISAGREE = "footers-disagree", "footer", Cure.REPAIR, True
    FOOTER_SHORT = "footer-short", "footer", Cure.NOTHING
    SIZE_TOO_LARGE = "size-too-large", "footer", Cure.NONE
    GAP_BEFORE_FOOTER = "gap-before-footer", "footer", Cure.NOTHING
    RESERVED_FEATURE = "reserved-feature", "footer", Cure.NOTHING
    SAVED_STATE = "saved-state", "footer", Cure.NOTHING
    GEOMETRY_ZERO = "geometry-zero", "footer", Cure.NOTHING
    HEADER_MISPLACED = "header-misplaced", "footer", Cure.NONE
    HEADER_INVALID = "header-invalid", "dynamic disk header", Cure.NONE
    HEADER_CHECKSUM = "header-checksum", "dynamic disk header", Cure.REPAIR
    BAT_TOO_SMALL = "bat-too-small", "BAT", Cure.NONE
    BAT_OUTSIDE = "bat-outside", "BAT", Cure.NONE
    BAT_TOO_LARGE = "bat-too-large", "BAT", Cure.NONE
    BAT_UNREADABLE = "bat-unreadable", "BAT", Cure.NONE
    BAT_SPARE_ENTRIES = "bat-spare-entries", "BAT", Cure.NOTHING
    BAT_PADDING = "bat-padding", "BAT", Cure.NOTHING
    BAT_BEYOND_DISK = "bat-beyond-disk", "BAT", Cure.REPAIR, True
    ENTRIES_BAD = "bat-entries-bad", "BAT", Cure.LOSS, True
    ENTRY_IN_METADATA = "entry-in-metadata", "BAT", Cure.LOSS, True
    ENTRY_OVERLAPS = "entry-overlaps", "BAT", Cure.LOSS, True
    ENTRY_PAST_END = "entry-past-end", "BAT", Cure.LOSS, True
    BLOCK_CUT = "block-cut", "block", Cure.CONSENT, True
    ORPHAN_ROOM = "orphan-room", "block", Cure.NOTHING
    LOCATOR_BAD = "locator-bad", "parent locator", Cure.NOTHING
    PARENT_UNUSABLE = "parent-unusable", "parent locator", Cure.NONE
    PARENT_MISSING = "parent-missing", "parent locator", Cure.NONE
    PARENT_REFUSED = "parent-refused", "parent locator", Cure.NONE
    PARENT_MISMATCH = "parent-mismatch", "dynamic disk header", Cure.NONE
    PARENT_TIMESTAMP = "parent-timestamp", "dynamic disk header", Cure.NOTHING
    PARENT_CHANGED = "parent-changed", "chain", Cure.NOTHING
    SIZES_DIFFER = "sizes-differ", "chain", Cure.NOTHING
    CHAIN_CYCLE = "chain-cycle", "chain", Cure.NONE
    CHAIN_TOO_DEEP = "chain-too-deep", "chain", Cure.NONE
    HALF_MERGED = "half-merged", "merge journal", Cure.COMMAND
    IN_USE = "in-use", "file", Cure.NOTHING
    AZURE_TYPE = "azure-type", "footer", Cure.COMMAND
    AZURE_SIZE = "azure-size", "footer", Cure.COMMAND
    AZURE_LIMIT = "azure-limit", "footer", Cure.NONE
    AZURE_FOOTER = "azure-footer", "footer", Cure.COMMAND
    AZURE_BAT = "azure-bat", "BAT", Cure.COMMAND

    def __init__(self, code: str, structure: str, cure: Cure, keeps_from_writing: bool = False) -> None:
        self.code = code
        self.structure = structure
        self.cure = cure
        self.keeps_from_writing = keeps_from_writing


_ERRORS: dict[Kind, type[VhdError]] = {Kind.NOT_VHD: NotVhdError, Kind.BAT_TOO_LARGE: VhdUnsupportedError}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was found: of what kind, what was seen, and at which byte of the file.

    `own_remedy` is for what the kind's cure does not say. It may hold `{path}`.
    """

    kind: Kind
    what: str
    offset: int
    own_remedy: str | None = None

    @property
    def is_warning(self) -> bool:
        return self.kind.cure is Cure.NOTHING

    def remedy(self, path: str) -> str:
        """What to do, as a command where one helps."""
        quoted = shlex.quote(path)
        if self.own_remedy is not None:
            return self.own_remedy.replace("{path}", quoted)
        match self.kind.cure:
            case Cure.NOTHING:
                return "Nothing needs to be done."
            case Cure.REPAIR:
                return f"Mend it: mullion vhd repair {quoted}"
            case Cure.CONSENT | Cure.LOSS:
                return (
                    f"Restore the file from a backup. Without one, give up what is lost: "
                    f"mullion vhd repair --allow-loss {quoted}"
                )
            case Cure.COMMAND | Cure.NONE:
                return "Restore the file from a backup."

    def as_error(self, path: str) -> VhdError:
        """The error that refuses the file."""
        says = f"{path} {self.what}" if self.kind is Kind.NOT_VHD else f"{path}: {self.what}"
        return _ERRORS.get(self.kind, VhdDamagedError)(
            says, path=path, structure=self.kind.structure, offset=self.offset, remedy=self.remedy(path)
        )


def verdict_of(findings: Iterable[Finding]) -> Verdict:
    """The worst that any of them comes to."""
    found = {finding.kind.cure.verdict for finding in findings}
    return next((verdict for verdict in (Verdict.BROKEN, Verdict.REPAIRABLE) if verdict in found), Verdict.SOUND)
