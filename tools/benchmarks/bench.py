"""What every part is handed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from benchmarks import data, memory
from benchmarks.data import Case
from benchmarks.ground import Ground
from benchmarks.results import Results

Item = TypeVar("Item")


@dataclass
class Bench:
    args: argparse.Namespace
    ground: Ground
    results: Results = field(default_factory=Results)

    @cached_property
    def cases(self) -> list[Case]:
        """Of the parts `sync` and `sync-loop`: made when the first of them asks."""
        self.say("making the sources and destinations")
        folder = self.ground.folder / "cases"
        folder.mkdir()
        return data.cases(folder, self.args.size << 20, self.args.seed)

    @property
    def size(self) -> int:
        """Bytes of the source, for the parts but `sync`."""
        return min(self.args.size << 20, 1 << 30)

    def say(self, text: str) -> None:
        """What is being done, on standard error."""
        print(f"… {text}", file=sys.stderr, flush=True)

    def have_memory(self, times: int) -> None:
        """For a run that fills the page cache, so many times the size: see `memory`. More than it fills, as
        which of what is free is taken next nobody can say: of single pages what was freed last, of larger
        ones anything."""
        if self.args.quick or not memory.is_given_back():
            return
        self.results.note(memory.NOTE)
        memory.touch(times * self.size)

    def alternating(self, items: Iterable[Item]) -> Iterator[tuple[int, Item]]:
        """For each run, all of them; every other run backwards, so that none always follows the same one."""
        items = list(items)
        for run in range(self.args.runs):
            for item in items if run % 2 == 0 else reversed(items):
                yield run, item
