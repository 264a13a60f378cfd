"""The part `ssh`: copies and mounts over a stock sshd, through lines with long round trips."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sshd
from benchmarks import data
from benchmarks.bench import Bench
from benchmarks.contestants import OURS
from benchmarks.data import MIB, Case
from benchmarks.far import HOST, Line, Server
from benchmarks.ground import BenchError
from benchmarks.measure import run
from benchmarks.mounts import Mounted, leave, served
from benchmarks.part_lazy import READER, fresh, quantiles
from benchmarks.results import Group

GIB = 1 << 30
PART = "ssh"
ONE, EIGHT = f"{OURS}, 1 connection", f"{OURS}, 8 connections"
MOUNT, MOUNT_ONE = "blockcopy mount", "blockcopy mount, 1 connection"
CEILING = "the line: head -c, 8 channels"
LINE = "the line: head -c, 1 channel"
ROUND_TRIPS = (100, 10, 0)
"""Milliseconds."""

RATE, RATE_ROUND_TRIP = 12_500_000, 50
"""Bytes per second, milliseconds: the line of 100 Mbit/s."""

STEADY, RAMP = 20.0, 3.0
"""Seconds of background hydration that are measured, and seconds before."""

QUICK_STEADY, QUICK_RAMP = 2.0, 0.5


def ssh(bench: Bench) -> None:
    """Measure the part `ssh`. Only notes what is missing if there is no ssh or sshd."""
    if missing := [each for each in ("ssh", "ssh-keygen", "sshd") if sshd.find(each) is None]:
        bench.results.note(f"ssh: skipped, {', '.join(missing)}: not installed (openssh-client, openssh-server)")
        return
    folder = bench.ground.folder / "ssh"
    folder.mkdir()
    equal, some, zero, _ = data.cases(folder, bench.size, bench.args.seed)
    with Server(bench.ground) as server:
        for round_trip in ROUND_TRIPS:
            with server.line(round_trip) as line:
                copies(bench, server, line, zero, round_trip)
                if round_trip == ROUND_TRIPS[0]:
                    copies(bench, server, line, some, round_trip)
                    in_order(bench, line, equal.source)
        for each in (some, zero):
            each.before.unlink()
        slow_line(bench, server, equal.source)
        without_differences(bench, server, folder)


def sync(bench: Bench, line: Line, source: Path, destination: Path, *options: str) -> list[Any]:
    """Return the command line of `blockcopy sync` over `line`, with `options`."""
    return [
        *bench.ground.blockcopy,
        "sync",
        "--no-state",
        *options,
        *line.options,
        f"{HOST}:{source}",
        destination,
    ]


def rsync(line: Line, case: Case, destination: Path) -> list[Any]:
    """Return the command line of rsync over `line`, in the fastest form that was found for `case`."""
    is_delta = len(case.differing) != 1
    form = ["--no-whole-file", "--block-size=65536"] if is_delta else ["--whole-file"]
    remote = ["-e", shlex.join(line.ssh), f"{HOST}:{case.source}"]
    return ["rsync", "--inplace", "--ignore-times", *form, *remote, destination]


def copies(bench: Bench, server: Server, line: Line, case: Case, round_trip: int) -> None:
    """Measure copies of `case` over `line`."""
    size = case.source.stat().st_size
    name = f"{case.name}, {round_trip} ms"
    words = f"{size // MIB} MiB, {case.words}; {round_trip} ms round trip"
    group = bench.results.group(PART, name, words, ONE)
    destination = bench.ground.folder / "destination"
    data.copy(case.before, destination, [(0, size)])
    commands = {
        OURS: sync(bench, line, case.source, destination),
        ONE: sync(bench, line, case.source, destination, "--connections", "1"),
    }
    is_whole = len(case.differing) == 1
    if is_whole and round_trip == ROUND_TRIPS[1]:
        commands[EIGHT] = sync(bench, line, case.source, destination, "--connections", "8")
    if round_trip == ROUND_TRIPS[0]:
        if shutil.which("rsync"):
            commands["rsync"] = rsync(line, case, destination)
        else:
            bench.results.note("rsync: not installed (apt-get install rsync)")
    ceiling = [(CEILING, None)] if is_whole else []
    for _, (who, command) in bench.alternating([*ceiling, *commands.items()]):
        bench.say(f"{PART}, {name}: {who}")
        if command is None:
            group.add(who, seconds=line.channels(8, size))
        else:
            copy(bench, server, group, case, who, command, destination)
    destination.unlink()


def copy(
    bench: Bench, server: Server, group: Group, case: Case, who: str, command: list[Any], destination: Path
) -> None:
    """Measure one `command` that copies `case`: restore the destination, copy, compare, and add to `group`."""
    data.copy(case.before, destination, case.differing)
    data.warm(case.source, destination)
    with server.cpu() as far:
        cost = run(bench.ground, [command], str(destination))
    data.compare(case.source, destination, who)
    part = GIB / case.source.stat().st_size
    group.add(who, seconds=cost.seconds, durable=cost.durable, cpu_per_gib=cost.cpu * part)
    group.add(who, cpu_far=far["all"] * part)
    if who != "rsync":
        group.add(who, cpu_stages=far["stages"] * part)


def without_differences(bench: Bench, server: Server, folder: Path) -> None:
    """Measure copies of equal ends, of the whole --size: what the round trip adds."""
    size = bench.args.size << 20
    source = data.noise(folder / "large", [(0, size)], size, f"{bench.args.seed} large")
    destination = bench.ground.folder / "destination"
    data.copy(source, destination, [(0, size)])
    case = Case("equal", "", source, source, [])
    words = f"{size // MIB} MiB, the destination is equal to the source"
    group = bench.results.group(PART, case.name, words, at(ROUND_TRIPS[-1]))
    for _, round_trip in bench.alternating(ROUND_TRIPS):
        bench.say(f"{PART}, equal: {round_trip} ms")
        with server.line(round_trip) as line:
            command = sync(bench, line, source, destination)
            copy(bench, server, group, case, at(round_trip), command, destination)
    source.unlink()
    destination.unlink()


def at(round_trip: int) -> str:
    """Return the contestant's name at a round trip, in milliseconds."""
    return f"{OURS}, {round_trip} ms"


@contextmanager
def mount(bench: Bench, line: Line, source: Path, *options: Any) -> Iterator[Mounted]:
    """Run `blockcopy mount` over `line` with `options` and a new destination."""
    destination, point = fresh(bench.ground, source.stat().st_size), bench.ground.point()
    words = [*bench.ground.blockcopy, "mount", "-f", "--no-state", *options, *line.options]
    words += [f"{HOST}:{source}", destination, point]
    with served(bench.ground, words, point, point / destination.name) as mounted:
        yield mounted
        leave(bench.ground, mounted, [])
    destination.unlink()


def in_order(bench: Bench, line: Line, source: Path) -> None:
    """Measure sequential reads of missing blocks."""
    size = min(source.stat().st_size, 256 * MIB)
    words = f"{size // MIB} MiB of missing blocks in order, {ROUND_TRIPS[0]} ms round trip, and again"
    group = bench.results.group(PART, "in order", words, MOUNT_ONE)
    rows = {MOUNT: [], MOUNT_ONE: ["--connections", "1"]}
    for _, (who, options) in bench.alternating(rows.items()):
        bench.say(f"{PART}, in order: {who}")
        with mount(bench, line, source, "--no-background", *options) as mounted:
            read = [bench.ground.python, "-I", READER, "order", mounted.file, source, size]
            report = json.loads(bench.ground.output(read, seconds=900))
        group.add(who, first=report["first"], again=report["again"])


def slow_line(bench: Bench, server: Server, source: Path) -> None:
    """Measure background hydration that fills a slow line, and the reads beside it.

    Reads that take less than a round trip are not counted: their blocks were present, or nearly.
    """
    words = f"{RATE * 8 // 10**6} Mbit/s, {RATE_ROUND_TRIP} ms round trip: hydration beside random 4 KiB reads"
    group = bench.results.group(PART, "a slow line", words, LINE)
    with server.line(RATE_ROUND_TRIP, RATE) as line:
        for run_, who in bench.alternating([LINE, MOUNT]):
            bench.say(f"{PART}, a slow line: {who}")
            if who == LINE:
                size = RATE if bench.args.quick else 10 * RATE
                times, rate = line.round_trips(20), size / line.channels(1, size)
            else:
                times, rate = beside_hydration(bench, line, source, f"{bench.args.seed} {run_}")
                times = [each for each in times if each >= RATE_ROUND_TRIP]
            group.add(who, share=100 * rate / RATE)
            if times:
                group.add(who, **quantiles(times), trips=quantiles(times)["p50"] / RATE_ROUND_TRIP)


def beside_hydration(bench: Bench, line: Line, source: Path, seed: str) -> tuple[list[float], float]:
    """Return the milliseconds of random reads, and the bytes per second that arrive meanwhile.

    `seed`: decides what is read. Raises BenchError if the copy was complete before the end.
    """
    seconds, ramp = (QUICK_STEADY, QUICK_RAMP) if bench.args.quick else (STEADY, RAMP)
    ground = bench.ground
    with mount(bench, line, source) as mounted:

        def received() -> tuple[float, int]:
            status = json.loads(ground.output([*ground.blockcopy, "status", "--json", mounted.point]))
            if status["hydrated_percent"] == 100:
                raise BenchError("the copy was complete too early; use a larger --size")
            return time.monotonic(), status["received_bytes"]

        time.sleep(ramp)  # what the start costs is not to be measured
        began, before = received()
        read = [ground.python, "-I", READER, "random", mounted.file, source, seed, 10**6, seconds]
        report = json.loads(ground.output(read))
        ended, after = received()
    return report["ms"], (after - before) / (ended - began)
