"""The part `scale`: large sparse files, from the mount to the complete copy."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from benchmarks import data
from benchmarks.bench import Bench
from benchmarks.ground import BenchError
from benchmarks.measure import Memory, high_water, run
from benchmarks.mounts import Mounted, replica
from benchmarks.part_lazy import fresh
from benchmarks.results import Group

GIB = 1 << 30
SIZES = (1, 16, 256, 1024)
QUICK_SIZES = (1,)
"""GiB of the source."""

FLOOR, OURS = "cp, sparse", "blockcopy mount"
PIECES = 16
"""Number of ranges with data."""


def scale(bench: Bench) -> None:
    """Measure the part `scale`. Stops at the first size that takes longer than --patience."""
    is_in_time = True
    for size in QUICK_SIZES if bench.args.quick else SIZES:
        if not is_in_time:
            bench.results.note(f"scale, {size} GiB: skipped, a smaller one was not complete within --patience")
            continue
        is_in_time = one_size(bench, size * GIB)


def one_size(bench: Bench, size: int) -> bool:
    """Measure a source of `size` bytes. Returns False if a copy was not complete in time."""
    amount = bench.size // PIECES
    extents = [(size // PIECES * piece, amount) for piece in range(PIECES)]
    source = data.noise(bench.ground.folder / "sparse", extents, size, f"{bench.args.seed} sparse")
    words = f"{size // GIB} GiB source and destination, sparse, with {bench.size >> 20} MiB of data: until complete"
    group = bench.results.group("scale", f"{size // GIB:,} GiB", words, FLOOR)
    is_in_time = True
    for _, who in bench.alternating([FLOOR, OURS]):
        bench.say(f"scale, {size // GIB} GiB: {who}")
        for offset, length in extents:
            warm(source, offset, length)
        if who == FLOOR:
            floor(bench, group, source)
        elif is_in_time:
            is_in_time = until_complete(bench, group, source)
    source.unlink()
    return is_in_time


def warm(path: Path, offset: int, length: int) -> None:
    """Read `length` bytes at `offset` into the page cache."""
    with path.open("rb", buffering=0) as file:
        for start, size in data.pieces([(offset, length)]):
            os.pread(file.fileno(), size, start)


def floor(bench: Bench, group: Group, source: Path) -> None:
    """Measure the floor: a copy that knows of holes and compares nothing, with a sync as blockcopy's."""
    destination = fresh(bench.ground, source.stat().st_size)
    words = ["cp", "--reflink=never", "--sparse=auto", source, destination]
    cost = run(bench.ground, [words], str(destination))
    data.compare(source, destination, "cp")
    group.add(FLOOR, seconds=cost.durable, cpu=cost.cpu, peak=cost.peak, peak_all=cost.peak_all)
    destination.unlink()


def until_complete(bench: Bench, group: Group, source: Path) -> bool:
    """Measure a mount until its copy is complete. Returns False if it was not complete in time."""
    destination, state = fresh(bench.ground, source.stat().st_size), bench.ground.name("state")
    began = time.monotonic()
    with Memory() as memory, replica(bench.ground, source, destination, "--state", state) as mounted:
        memory.follow(mounted.process.pid)
        is_complete = True
        try:
            bench.ground.output([*bench.ground.blockcopy, "wait", mounted.point], seconds=bench.args.patience)
        except BenchError:
            is_complete = False
        seconds = time.monotonic() - began
        percent = progress(bench, mounted)
        if is_complete and percent < 100:
            raise BenchError(f"`blockcopy wait` ended at {percent} %")
        peak = high_water(mounted.process.pid)
    size = sum(each.stat().st_size for each in state.parent.glob(f"{state.name}*"))
    group.add(
        OURS, cpu=mounted.cpu, peak=peak / 1024, peak_all=sum(memory.peaks.values()) / 1024, state=size / 1024
    )
    group.add(OURS, complete=percent)
    if is_complete:
        group.add(OURS, seconds=seconds)
        data.compare(source, destination, OURS)
    else:
        bench.results.note(
            f"{group.part}, {group.case}: not complete within {bench.args.patience} seconds (--patience)"
        )
    destination.unlink()
    for each in state.parent.glob(f"{state.name}*"):
        with suppress(OSError):
            each.unlink()
    return is_complete


def progress(bench: Bench, mounted: Mounted) -> float:
    """Return how many percent of a mount are present."""
    status = bench.ground.output([*bench.ground.blockcopy, "status", "--json", mounted.point])
    return json.loads(status)["hydrated_percent"]
