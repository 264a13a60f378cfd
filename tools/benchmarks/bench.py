"""The context of all parts: options, ground and results."""

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
    """A run of tools/bench. Each part gets it, and adds to `results`."""

    args: argparse.Namespace
    ground: Ground
    results: Results = field(default_factory=Results)

    @cached_property
    def cases(self) -> list[Case]:
        """The cases of the parts `sync` and `sync-loop`. Created at first use."""
        self.say("creating sources and destinations")
        folder = self.ground.folder / "cases"
        folder.mkdir()
        return data.cases(folder, self.args.size << 20, self.args.seed)

    @property
    def size(self) -> int:
        """Bytes of the source in all parts but `sync`: at most 1 GiB."""
        return min(self.args.size << 20, 1 << 30)

    def say(self, text: str) -> None:
        """Print the current activity to standard error."""
        print(f"… {text}", file=sys.stderr, flush=True)

    def have_memory(self, times: int) -> None:
        """Touch free memory of `times` the size, before a run that fills the page cache. See `memory`.

        Touch more than the run fills, because nobody knows which free pages the kernel takes next. It takes the
        single pages that were freed last, but any of the larger ones.
        """
        if self.args.quick or not memory.is_given_back():
            return
        self.results.note(memory.NOTE)
        memory.touch(times * self.size)

    def alternating(self, items: Iterable[Item]) -> Iterator[tuple[int, Item]]:
        """Yield (run, item) for each run and item.

        Every other run is backwards, so that no item always follows the same.
        """
        items = list(items)
        for run in range(self.args.runs):
            for item in items if run % 2 == 0 else reversed(items):
                yield run, item
