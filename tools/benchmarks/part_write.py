"""The parts `write` and `write-pgbench`: a writable replica, beside the destination itself and passthrough_ll."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import data
from benchmarks.bench import Bench
from benchmarks.mounts import peers, replica
from benchmarks.part_lazy import DELAY, fresh, quantiles
from benchmarks.postgres import Postgres

WRITER = Path(__file__).with_name("writer.py")
TIME_LIMIT = 300

ITSELF, ITS_LOOP = "the destination itself", "the loop device itself"
OURS, OURS_LOOP = "blockcopy mount", "blockcopy mount, on the loop device"
EXAMPLE = "passthrough_ll"
MISSING, HYDRATING = "blockcopy, missing blocks", "blockcopy, missing blocks, hydrating"
SAME, NEW = "nothing to record", "a new page to record"

WHILE_HYDRATING = "blockcopy mount, hydrating"

RATE = "32M"
"""Bytes per second of the link while blocks are missing. Hydration outlasts the writes."""

FilePath = AbstractContextManager[Path]


def write(bench: Bench) -> None:
    """Measure the part `write`."""
    warn_of_memory(bench)
    folder = bench.ground.folder / "write"
    folder.mkdir()
    source = data.noise(folder / "source", [(0, bench.size)], bench.size, f"{bench.args.seed} write")
    in_order(bench, source)
    at_random(bench, source)
    syncs(bench, source)


def warn_of_memory(bench: Bench) -> None:
    """Note it if the files lie in memory. A sync does nothing there."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    within = [(words[1], words[2]) for words in mounts if bench.ground.folder.is_relative_to(words[1])]
    if max(within, key=lambda each: len(each[0]))[1] in ("tmpfs", "ramfs"):
        bench.results.note("write: the files lie in memory, where a sync does nothing; give --folder on a disk")


# What is written to


@contextmanager
def itself(bench: Bench, source: Path) -> Iterator[Path]:
    """Yield the path of a copy of the source."""
    path = bench.ground.name("itself")
    data.copy(source, path, [(0, bench.size)])
    yield path
    path.unlink()


@contextmanager
def on_loop(bench: Bench, file: FilePath) -> Iterator[Path]:
    """Yield the path of a loop device on `file`."""
    with file as path:
        device = bench.ground.attach(path)
        yield Path(device)
        bench.ground.detach(device)


@contextmanager
def complete(bench: Bench, source: Path, destination: FilePath) -> Iterator[Path]:
    """Mount the source on a destination that equals it, and wait until it is complete."""
    with destination as path:
        with replica(bench.ground, source, path, "--writable") as mounted:
            bench.ground.output([*bench.ground.blockcopy, "wait", mounted.point], seconds=TIME_LIMIT)
            yield mounted.file
        bench.ground.output([*bench.ground.blockcopy, "discard-writes", path])


@contextmanager
def incomplete(bench: Bench, source: Path, *options: Any) -> Iterator[Path]:
    """Mount the source on an empty destination over a slow link. Each block is missing at first."""
    path = fresh(bench.ground, source.stat().st_size)
    with replica(bench.ground, source, path, "--writable", *options, delay=DELAY, rate=RATE) as mounted:
        yield mounted.file
    bench.ground.output([*bench.ground.blockcopy, "discard-writes", path])
    path.unlink()


@contextmanager
def example(bench: Bench, source: Path) -> Iterator[Path]:
    """Mount a folder with a copy of the source by libfuse's example in C."""
    make = peers([EXAMPLE], bench.results.note)[EXAMPLE]
    with itself(bench, source) as path, make(bench.ground, path, None) as mounted:
        yield mounted.file


def of_copies(bench: Bench, source: Path) -> dict[str, Callable[[], FilePath]]:
    """Return all makers of paths whose blocks are present."""
    found: dict[str, Callable[[], FilePath]] = {
        ITSELF: partial(itself, bench, source),
        OURS: lambda: complete(bench, source, itself(bench, source)),
    }
    if peers([EXAMPLE], bench.results.note):
        found[EXAMPLE] = partial(example, bench, source)
    return found if bench.args.quick else found | of_loops(bench, source)


def of_loops(bench: Bench, source: Path) -> dict[str, Callable[[], FilePath]]:
    """Return the makers of paths whose blocks are present, with a loop device as the destination."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        bench.results.note("write, on loop devices: not measured, this user or this system cannot create them")
        return {}
    return {
        ITS_LOOP: lambda: on_loop(bench, itself(bench, source)),
        OURS_LOOP: lambda: complete(bench, source, on_loop(bench, itself(bench, source))),
    }


def written(bench: Bench, file: Path, how: str, *words: Any) -> dict[str, Any]:
    """Run `writer.py` on `file`, and return its report. `how`, `words`: its arguments before and after the file."""
    command = [bench.ground.python, "-I", WRITER, how, file, *words]
    return json.loads(bench.ground.output(command, seconds=TIME_LIMIT))


# What is measured


def in_order(bench: Bench, source: Path) -> None:
    """Measure writes in order, and a sync."""
    words = f"{bench.size >> 20} MiB in order, by 1 MiB, present blocks; then fdatasync"
    group = bench.results.group("write", "in order", words, EXAMPLE)
    for _, (who, make) in bench.alternating(of_copies(bench, source).items()):
        bench.say(f"write, in order: {who}")
        with make() as file:
            group.add(who, **written(bench, file, "order", bench.size))


def at_random(bench: Bench, source: Path) -> None:
    """Measure writes of pages at random, into present and into missing blocks."""
    words = f"random 4 KiB, one at a time; missing: {2 * DELAY:g} ms round trip, link of {RATE}iB/s"
    group = bench.results.group("write", "random", words, OURS)
    contestants = of_copies(bench, source)
    contestants[MISSING] = partial(incomplete, bench, source, "--no-background")
    contestants[HYDRATING] = partial(incomplete, bench, source)
    for run, (who, make) in bench.alternating(contestants.items()):
        bench.say(f"write, random: {who}")
        with make() as file:
            seed = f"{bench.args.seed} {run}"
            group.add(who, **written(bench, file, "random", seed, 0.3 if bench.args.quick else 4))


def syncs(bench: Bench, source: Path) -> None:
    """Measure the sync after each write of a page, on files and on loop devices."""
    contestants = of_copies(bench, source)
    syncs_of(bench, "fsync", {who: make for who, make in contestants.items() if who in (ITSELF, OURS, EXAMPLE)})
    if loops := of_loops(bench, source):
        syncs_of(bench, "fsync, loop device", loops)


def syncs_of(bench: Bench, case: str, contestants: dict[str, Callable[[], FilePath]]) -> None:
    """Measure the syncs of `contestants`. The first is the reference. Only blockcopy's record anything."""
    words = f"milliseconds of an fdatasync after each write of 4 KiB: {case}"
    group = bench.results.group("write", case, words, next(iter(contestants)))
    count = 50 if bench.args.quick else 400
    for run, (who, make) in bench.alternating(contestants.items()):
        bench.say(f"write, {case}: {who}")
        with make() as file:
            for how, what in (("same", SAME), ("new", NEW)) if who in (OURS, OURS_LOOP) else (("same", ""),):
                report = written(bench, file, "fsync", f"{bench.args.seed} {run}", count, how)
                group.add(f"{who}, {what}" if what else who, **quantiles(report["ms"]))


def pgbench(bench: Bench) -> None:
    """Measure the part `write-pgbench`: PostgreSQL on ext4 on a loop device on the mount, while it hydrates."""
    if (lacking := Postgres.lacking()) is not None:
        bench.results.note(f"write-pgbench: not measured, {lacking}")
        return
    warn_of_memory(bench)
    words = f"pgbench on ext4 on a loop device; hydrating: {2 * DELAY:g} ms round trip, link of {RATE}iB/s"
    group = bench.results.group("write-pgbench", "pgbench", words, ITSELF)
    bench.say("write-pgbench: creating a database")
    database = Postgres(bench)
    source = database.make_image()

    @contextmanager
    def copied() -> Iterator[Path]:
        path = bench.ground.name("database")
        shutil.copy(source, path)
        yield path
        path.unlink()

    contestants: dict[str, Callable[[], FilePath]] = {
        ITSELF: copied,
        WHILE_HYDRATING: partial(incomplete, bench, source),
        "blockcopy mount, complete": lambda: complete(bench, source, copied()),
    }
    for _, (who, make) in bench.alternating(contestants.items()):
        bench.say(f"write-pgbench: {who}")
        with on_loop(bench, make()) as device, database.running(device):
            group.add(who, tps=database.bench(3 if bench.args.quick else 20))
