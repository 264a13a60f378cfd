"""Results: all runs of all figures, medians, and ratios to a reference of the same run."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A kind of figure: its label with the unit, and whether more or less is better."""

    label: str
    more_is_better: bool = False


KINDS = {
    "seconds": Kind("s"),
    "durable": Kind("s, synced"),
    "cpu": Kind("CPU s"),
    "cpu_per_gib": Kind("CPU s/GiB"),
    "cpu_far": Kind("CPU s/GiB, far"),
    "cpu_stages": Kind("CPU s/GiB, far stages"),
    "peak": Kind("MiB, largest process"),
    "peak_all": Kind("MiB, all processes"),
    "p50": Kind("p50 ms"),
    "p99": Kind("p99 ms"),
    "trips": Kind("p50, round trips"),
    "share": Kind("% of the line", more_is_better=True),
    "waited": Kind("% that waited", more_is_better=True),
    "first": Kind("first MB/s", more_is_better=True),
    "again": Kind("again MB/s", more_is_better=True),
    "depth_1": Kind("IOPS, depth 1", more_is_better=True),
    "rate": Kind("MB/s", more_is_better=True),
    "rate_synced": Kind("MB/s, synced", more_is_better=True),
    "tps": Kind("transactions/s", more_is_better=True),
    "depth_16": Kind("IOPS, depth 16", more_is_better=True),
    "state": Kind("KiB of state"),
    "complete": Kind("% complete", more_is_better=True),
}
"""The kinds of figures, in the order of a table's columns. MB are 10⁶ bytes."""

Runs = dict[str, list[float]]
"""The values of all runs, by figure."""


@dataclass
class Group:
    """A table: contestants that did the same task."""

    part: str
    case: str
    words: str = ""
    reference: str = ""
    """The contestant that all others are compared with."""
    rows: dict[str, Runs] = field(default_factory=dict)
    """By contestant."""

    def add(self, who: str, **figures: float) -> None:
        """Add the figures of a run of contestant `who`."""
        row = self.rows.setdefault(who, {})
        for name, value in figures.items():
            row.setdefault(name, []).append(value)

    def median(self, who: str, figure: str) -> float | None:
        """Return the median of a figure. Returns None if it was not measured."""
        runs = self.rows.get(who, {}).get(figure)
        return statistics.median(runs) if runs else None

    def ratio(self, who: str, figure: str) -> float | None:
        """Return how many times better a median is than the reference's.

        Returns None if either is missing or zero.
        """
        value, to = self.median(who, figure), self.median(self.reference, figure)
        if not value or not to:
            return None
        return value / to if KINDS[figure].more_is_better else to / value

    @property
    def figures(self) -> list[str]:
        """The measured figures, in the order of KINDS."""
        return [name for name in KINDS if any(name in row for row in self.rows.values())]


class Results:
    """The results of a run of tools/bench: groups and notes."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.notes: list[str] = []

    def group(self, part: str, case: str, words: str = "", reference: str = "") -> Group:
        """Return the group of this part and case. Creates it if missing."""
        if (found := self.find(part, case)) is None:
            found = Group(part, case, words, reference)
            self.groups.append(found)
        return found

    def find(self, part: str, case: str) -> Group | None:
        """Return the group of this part and case. Returns None if there is none."""
        return next((each for each in self.groups if (each.part, each.case) == (part, case)), None)

    def of(self, part: str) -> list[Group]:
        """Return all groups of a part."""
        return [each for each in self.groups if each.part == part]

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def as_json(self) -> dict[str, Any]:
        """Return all results as objects of JSON."""
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
