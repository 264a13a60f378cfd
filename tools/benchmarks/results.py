"""What was measured: every run of every figure, medians, and ratios to a reference of the same run."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Kind:
    """Of a figure: how it is called, and which is better."""

    label: str
    more_is_better: bool = False


KINDS = {
    "seconds": Kind("s"),
    "durable": Kind("s, synced"),
    "cpu": Kind("CPU s"),
    "cpu_per_gib": Kind("CPU s/GiB"),
    "peak": Kind("MiB, largest process"),
    "peak_all": Kind("MiB, all processes"),
    "p50": Kind("p50 ms"),
    "p99": Kind("p99 ms"),
    "waited": Kind("% that waited", more_is_better=True),
    "first": Kind("first MB/s", more_is_better=True),
    "again": Kind("again MB/s", more_is_better=True),
    "depth_1": Kind("IOPS, depth 1", more_is_better=True),
    "depth_16": Kind("IOPS, depth 16", more_is_better=True),
    "state": Kind("KiB of state"),
    "complete": Kind("% complete", more_is_better=True),
}
"""In the order of a table's columns. MB are 10⁶ bytes."""

Runs = dict[str, list[float]]


@dataclass
class Group:
    """One table: contestants that did the same."""

    part: str
    case: str
    words: str = ""
    reference: str = ""
    """The contestant that all ratios are to."""
    rows: dict[str, Runs] = field(default_factory=dict)

    def add(self, who: str, **figures: float) -> None:
        row = self.rows.setdefault(who, {})
        for name, value in figures.items():
            row.setdefault(name, []).append(value)

    def median(self, who: str, figure: str) -> float | None:
        runs = self.rows.get(who, {}).get(figure)
        return statistics.median(runs) if runs else None

    def ratio(self, who: str, figure: str) -> float | None:
        """How many times better than the reference. None where there is nothing to compare."""
        value, to = self.median(who, figure), self.median(self.reference, figure)
        if not value or not to:
            return None
        return value / to if KINDS[figure].more_is_better else to / value

    @property
    def figures(self) -> list[str]:
        return [name for name in KINDS if any(name in row for row in self.rows.values())]


class Results:
    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.notes: list[str] = []

    def group(self, part: str, case: str, words: str = "", reference: str = "") -> Group:
        """The one of that name, or a new one."""
        if (found := self.find(part, case)) is None:
            found = Group(part, case, words, reference)
            self.groups.append(found)
        return found

    def find(self, part: str, case: str) -> Group | None:
        return next((each for each in self.groups if (each.part, each.case) == (part, case)), None)

    def of(self, part: str) -> list[Group]:
        return [each for each in self.groups if each.part == part]

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def as_json(self) -> dict[str, Any]:
        return {
            "groups": [
                {
                    "part": group.part,
                    "case": group.case,
                    "words": group.words,
                    "reference": group.reference,
                    "rows": {
                        who: {
                            name: {
                                "label": KINDS[name].label,
                                "runs": runs,
                                "median": group.median(who, name),
                                "times_better_than_reference": group.ratio(who, name),
                            }
                            for name, runs in row.items()
                        }
                        for who, row in group.rows.items()
                    },
                }
                for group in self.groups
            ],
            "notes": self.notes,
        }
