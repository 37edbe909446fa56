"""What a benchmark says: rows of figures, each with its peer, its ratio and its bar, and how they are printed."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum


class BenchFault(Exception):
    """What was to be measured did not work at all."""


class Measure(Enum):
    """Which figure of a row its limit is held against."""

    RATIO = "ratio"  # median of the rounds' ratios to the peer
    MEDIAN = "median"
    WORST = "worst"


@dataclass(frozen=True, slots=True)
class Row:
    """One thing measured, a figure a round. Without a limit it is said, but promises nothing.

    Rounds of ours and of the peer that are equally many are pairs: their ratios are taken one by one, so that what
    slows the host for a while slows both sides of a pair.
    """

    what: str
    unit: str
    ours: Sequence[float]
    limit: float | None = None
    measure: Measure = Measure.RATIO
    peer: Sequence[float] = ()
    peer_name: str = ""
    note: str = ""

    @property
    def ratios(self) -> tuple[float, ...]:
        if not self.peer:
            return ()
        if len(self.peer) == len(self.ours):
            return tuple(mine / theirs for mine, theirs in zip(self.ours, self.peer, strict=True))
        return (statistics.median(self.ours) / statistics.median(self.peer),)

    @property
    def value(self) -> float:
        """What is held against the limit."""
        match self.measure:
            case Measure.RATIO:
                return statistics.median(self.ratios)
            case Measure.MEDIAN:
                return statistics.median(self.ours)
            case Measure.WORST:
                return max(self.ours)

    @property
    def is_met(self) -> bool | None:
        return None if self.limit is None else self.value <= self.limit

    @property
    def verdict(self) -> str:
        return {None: "", True: "met", False: "NOT MET"}[self.is_met]

    @property
    def bar(self) -> str:
        if self.limit is None:
            return ""
        return f"<= {self.limit:g}" if self.measure is Measure.RATIO else f"<= {self.limit:g} {self.unit}"

    def lines(self) -> str:
        """The row in full."""
        text = f"{self.what}: {spread(self.ours)} {self.unit}"
        if self.peer:
            text += f"\n    {self.peer_name}: {spread(self.peer)} {self.unit}; ratio {spread(self.ratios)}"
        if self.limit is not None:
            text += f"\n    bar: {self.measure.value} {self.value:.4g} {self.bar}: {self.verdict}"
        return text + (f"\n    {self.note}" if self.note else "")

    def to_json(self) -> dict[str, object]:
        fields = dataclasses.asdict(self)
        fields["measure"] = self.measure.value
        return {
            **fields,
            "ratios": self.ratios,
            "value": None if self.limit is None else self.value,
            "met": self.is_met,
        }


def spread(figures: Sequence[float]) -> str:
    """Median, and from the least to the greatest."""
    if len(figures) == 1:
        return f"{figures[0]:.4g}"
    return f"{statistics.median(figures):.4g} ({min(figures):.4g} to {max(figures):.4g})"


def table(results: Iterable[tuple[str, Row]]) -> str:
    """All rows, one line each."""
    lines = [("benchmark", "what", "ours", "ratio to peer", "bar", "")]
    for name, row in results:
        ours = statistics.median(row.ours) if row.measure is not Measure.WORST else max(row.ours)
        ratio = f"{statistics.median(row.ratios):.2f} x {row.peer_name}" if row.ratios else ""
        lines.append((name, row.what, f"{ours:.4g} {row.unit}", ratio, row.bar, row.verdict))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
