"""The parts `sync`, `sync-loop` and `pipes-delay`: copies of files and loop devices."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from benchmarks import data
from benchmarks.bench import Bench
from benchmarks.contestants import (
    FLOOR,
    LINK,
    ORIGINAL,
    OURS,
    Contestant,
    Pipeline,
    contestants,
    stages,
    sync,
)
from benchmarks.data import Case
from benchmarks.measure import Cost, run
from benchmarks.results import Group

GIB = 1 << 30

DELAY = 5
"""Milliseconds each way of the link."""


def files(bench: Bench) -> None:
    """Measure the part `sync`, with --cold also without the page cache."""
    for case in bench.cases:
        measure(bench, "sync", case)
        if bench.args.cold:
            measure(bench, "sync", case, cold=True)


def loop_devices(bench: Bench) -> None:
    """Measure the part `sync-loop`. Only notes that it needs root for other users."""
    if os.geteuid() != 0:
        bench.results.note("sync-loop: skipped, loop devices need root")
        return
    for case in bench.cases:
        measure(bench, "sync-loop", case)


def measure(bench: Bench, part: str, case: Case, *, cold: bool = False) -> None:
    """Measure `case` with every contestant, in files or loop devices, as `part` says.

    `cold`: drop the page cache.
    """
    ground, devices = bench.ground, part == "sync-loop"
    found, notes = contestants(bench.args, ground)
    for note in notes:
        bench.results.note(note)
    name = f"{case.name}, cold" if cold else case.name
    words = f"{bench.args.size} MiB, {case.words}; {'loop devices' if devices else 'files'}"
    words += ", not in the page cache" if cold else ", in the page cache"
    group = bench.results.group(part, name, words, ORIGINAL if bench.args.original else FLOOR)
    file = ground.folder / "destination"
    data.copy(case.before, file, [(0, case.source.stat().st_size)])
    data.cool(case.before)
    source, destination = str(case.source), str(file)
    if devices:
        source, destination = ground.attach(case.source, read_only=True), ground.attach(file)
    for _, contestant in bench.alternating(each for each in found if case.name == "equal" or not each.only_equal):
        if pipeline := contestant.commands(source, destination, devices):
            bench.say(f"{part}, {name}: {contestant.name}")
            one(bench, group, case, contestant, pipeline, (source, destination), cold=cold)
    if devices:
        ground.detach(source)
        ground.detach(destination)
    file.unlink()


def one(
    bench: Bench,
    group: Group,
    case: Case,
    contestant: Contestant,
    pipeline: Pipeline,
    ends: tuple[str, str],
    *,
    cold: bool = False,
) -> None:
    """Measure one run: restore the destination, copy, compare, and add to `group`.

    `ends`: source and destination.
    """
    source, destination = ends
    data.copy(case.before, destination, case.differing)
    if case.before != case.source:
        data.cool(case.before)
    if cold:
        data.cool(source, destination, case.source, bench.ground.folder / "destination")
    else:
        data.warm(source, destination)
    cost = run(bench.ground, pipeline, destination)
    data.compare(source, destination, contestant.name)
    add(group, contestant.name, cost, case.source)


def add(group: Group, who: str, cost: Cost, source: Path) -> None:
    """Add the cost of a copy of `source` to `group`."""
    group.add(
        who,
        seconds=cost.seconds,
        durable=cost.durable,
        cpu=cost.cpu,
        cpu_per_gib=cost.cpu * GIB / source.stat().st_size,
        peak=cost.peak,
        peak_all=cost.peak_all,
    )


def over_a_link(bench: Bench) -> None:
    """Measure the part `pipes-delay`."""
    ground, size = bench.ground, bench.size
    source = data.noise(ground.folder / "remote-source", [(0, size)], size, f"{bench.args.seed} far")
    zeros = data.noise(ground.folder / "remote-zeros", [], size, 0)
    case = Case("destination zero", "the destination is zeros, written out", source, zeros, [(0, size)])
    file = ground.folder / "destination"
    link = [*LINK, "--delay", str(DELAY), "host"]
    # The floor of a link: read all, and send it.
    floor = [[*link, shlex.join(["cat", str(source)])]]
    floor += [["dd", f"of={file}", "bs=1M", "iflag=fullblock", "conv=notrunc", "status=none"]]
    pipelines = {FLOOR: floor}
    if bench.args.original:
        original = [ground.python, str(bench.args.original)]
        pipelines[ORIGINAL] = stages(original, str(source), str(file), checksum=[], link=link)
    pipelines[OURS] = sync(ground, str(source), str(file), link[:-1])
    found = contestants(bench.args, ground)[0]
    if any(each.name == "rsync" for each in found):
        delta = ["rsync", "--no-whole-file", "--ignore-times", "--inplace", "--blocking-io"]
        pipelines["rsync"] = [[*delta, "-e", shlex.join(link[:-1]), f"host:{source}", file]]
    words = f"{size >> 20} MiB, the destination is zeros, written out; {DELAY} ms each way"
    group = bench.results.group("pipes-delay", case.name, words, ORIGINAL if bench.args.original else FLOOR)
    for _, (who, pipeline) in bench.alternating(pipelines.items()):
        bench.say(f"pipes-delay: {who}")
        contestant = Contestant(who, lambda *_: [])
        one(bench, group, case, contestant, pipeline, (str(source), str(file)))
    for each in (source, zeros, file):
        each.unlink()
