"""The part `lazy`: reads of blocks that are still missing."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import data
from benchmarks.bench import Bench
from benchmarks.contestants import LINK
from benchmarks.ground import ORDINARY, BenchError, Ground, until
from benchmarks.measure import round_trips
from benchmarks.mounts import Mounted, nbdfuse, peers, replica
from benchmarks.results import Group

DELAY = 5.0
"""Milliseconds each way."""

READER = Path(__file__).with_name("reader.py")
LAZY_PEERS = ["nbdfuse", "sshfs", "qemu, copy-on-read"]
QUICK_BYTES = 32 << 20
READS = 400
SECONDS = 20
"""Time limit in seconds of random reads."""

SATURATED = "64M"
"""Bytes per second of the link that background hydration saturates. Hydration must outlast the reads."""

Make = Callable[[], AbstractContextManager[Mounted]]
"""Creates a mount to read from."""


def lazy(bench: Bench) -> None:
    """Measure the part `lazy`."""
    folder = bench.ground.folder / "lazy"
    folder.mkdir()
    source = data.noise(folder / "source", [(0, bench.size)], bench.size, f"{bench.args.seed} lazy")
    first_byte(bench, source)
    at_random(bench, source)
    during_hydration(bench, source)
    in_order(bench, source)


def first_byte(bench: Bench, source: Path) -> None:
    """Measure the time from the command to the first byte."""
    ground = bench.ground
    words = "from the command to the first byte of a local source"
    group = bench.results.group("lazy", "mount to first byte", words, "python, nothing imported")
    data.warm(source)

    def python() -> bytes | None:
        ground.output([ground.python, "-P", "-c", "pass"])
        return None

    def mount() -> bytes:
        destination, point = fresh(ground, bench.size), ground.point()
        ground.output([*ground.blockcopy, "mount", "--no-state", source, destination, point])
        try:
            return first(point / destination.name)
        finally:
            stop.append(lambda: ground.output([*ground.blockcopy, "umount", point], right=(0, 75)))
            stop.append(destination.unlink)

    def peer() -> bytes:
        made = nbdfuse(ground, source, None)
        mounted = made.__enter__()
        stop.append(lambda: made.__exit__(None, None, None))
        return first(mounted.file)

    contestants: dict[str, Callable[[], bytes | None]] = {
        "python, nothing imported": python,
        "blockcopy mount": mount,
    }
    if "nbdfuse" in peers(["nbdfuse"], bench.results.note):
        contestants["nbdfuse"] = peer
    for _, (who, act) in bench.alternating(contestants.items()):
        bench.say(f"lazy, mount to first byte: {who}")
        stop: list[Callable[[], object]] = []
        began = time.monotonic()
        got = act()
        group.add(who, seconds=time.monotonic() - began)
        for each in stop:
            each()
        if got is not None and got != first(source):
            raise BenchError(f"{who}: the first byte is wrong")


def first(file: Path) -> bytes:
    """Return the first byte of a file."""
    with file.open("rb", buffering=0) as reading:
        return reading.read(1)


def fresh(ground: Ground, size: int, owner: int | None = None) -> Path:
    """Create a destination of `size` bytes, all a hole. `owner`: user id and group id. Returns its path."""
    path = data.noise(ground.name("destination"), [], size, 0)
    if owner is not None:
        os.chown(path, owner, owner)
    return path


def own_maker(bench: Bench, source: Path, *options: Any, user: list[str] | None = None, **more: Any) -> Make:
    """Return a maker of `blockcopy mount` with `options` and a new destination.

    `user`: words that change the user.
    """

    def made() -> AbstractContextManager[Mounted]:
        destination = fresh(bench.ground, bench.size, ORDINARY if user else None)
        return replica(bench.ground, source, destination, "--no-state", *options, delay=DELAY, user=user, **more)

    return made


def peer_makers(bench: Bench, source: Path) -> dict[str, Make]:
    """Return the makers of the peers, with the same round trip. nbdkit delays once for each request."""
    found = peers(LAZY_PEERS, bench.results.note)
    delays = {name: DELAY if name == "sshfs" else 2 * DELAY for name in found}
    return {name: partial(maker, bench.ground, source, delays[name]) for name, maker in found.items()}


def read(bench: Bench, mounted: Mounted, user: list[str] | None, how: str, *words: Any) -> dict[str, Any]:
    """Run `reader.py` on the mount.

    Returns its report. `how`: its first argument. `words`: those after the file.
    """
    command = [*(user or []), bench.ground.python, "-I", READER, how, mounted.file, *words]
    return json.loads(bench.ground.output(command, seconds=900))


def quantiles(times: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile of `times`, by figure."""
    ordered = sorted(times)
    return {"p50": statistics.median(ordered), "p99": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]}


def round_trip(bench: Bench, group: Group) -> None:
    """Add the floor to `group`: the time of a byte through the link and back."""
    words = [*LINK, "--delay", str(DELAY), "host", "cat"]
    process = bench.ground.popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    group.add("the link itself", **quantiles(round_trips(process, 49)))


def at_random(bench: Bench, source: Path) -> None:
    """Measure random reads without background hydration."""
    words = f"random 4 KiB, each in a new 128 KiB block, {2 * DELAY:g} ms round trip, nothing else in flight"
    group = bench.results.group("lazy", "random, idle", words, "the link itself")
    contestants = {"blockcopy mount": own_maker(bench, source, "--no-background"), **peer_makers(bench, source)}
    reads = READS // 4 if bench.args.quick else READS
    for run, (who, make) in bench.alternating([("the link itself", None), *contestants.items()]):
        bench.say(f"lazy, random, idle: {who}")
        if make is None:
            round_trip(bench, group)
            continue
        with make() as mounted:
            report = read(bench, mounted, None, "random", source, f"{bench.args.seed} {run}", reads, SECONDS)
        group.add(who, **quantiles(report["ms"]))


def during_hydration(bench: Bench, source: Path) -> None:
    """Measure random reads beside background hydration.

    Reads that take less than a round trip are not counted: their blocks were present, or nearly. So the figures
    are those of reads that had to wait for the link.
    """
    case = "random, hydrating"
    words = f"random 4 KiB, {2 * DELAY:g} ms round trip, while background hydration saturates "
    variants = {
        f"blockcopy, link of {SATURATED}iB/s": own_maker(bench, source, rate=SATURATED),
        "blockcopy, both CPUs": own_maker(bench, source),
    }
    group = bench.results.group(
        "lazy", case, words + "the link or the CPUs; of reads that waited", "the link itself"
    )
    for run, (who, make) in bench.alternating([("the link itself", None), *variants.items()]):
        bench.say(f"lazy, {case}: {who}")
        if make is None:
            round_trip(bench, group)
            continue
        with make() as mounted:
            seed = f"{bench.args.seed} {run}"
            times = read(bench, mounted, None, "random", source, seed, READS, 3 if bench.args.quick else SECONDS)[
                "ms"
            ]
        waited = [each for each in times if each >= 2 * DELAY]
        if waited:
            group.add(who, **quantiles(waited))
        group.add(who, waited=100 * len(waited) / len(times))


def in_order(bench: Bench, source: Path) -> None:
    """Measure sequential reads, of missing blocks and again."""
    size = QUICK_BYTES if bench.args.quick else bench.size
    words = f"{size >> 20} MiB in order, {2 * DELAY:g} ms round trip, and again (for the link: from the source)"
    group = bench.results.group("lazy", "in order", words, "the link itself")
    as_root = os.geteuid() == 0
    name = "blockcopy, as root" if as_root else "blockcopy, as an ordinary user"
    contestants: dict[str, tuple[Make | None, list[str] | None]] = {"the link itself": (None, None)}
    contestants[name] = (own_maker(bench, source, "--no-background"), None)
    contestants[f"{name}, hydrating"] = (own_maker(bench, source), None)
    user = bench.ground.as_ordinary_user()
    if as_root and user:
        contestants["blockcopy, as an ordinary user"] = (
            own_maker(bench, source, "--no-background", user=user),
            user,
        )
        contestants["blockcopy, as an ordinary user, hydrating"] = (own_maker(bench, source, user=user), user)
    elif as_root:
        bench.results.note("in order, as an ordinary user: skipped, the user nobody cannot run blockcopy here")
    contestants |= {peer: (make, None) for peer, make in peer_makers(bench, source).items()}
    for _, (who, (make, reader)) in bench.alternating(contestants.items()):
        bench.say(f"lazy, in order: {who}")
        if make is None:
            report = json.loads(bench.ground.output([bench.ground.python, "-I", READER, "order", source, source]))
            group.add(who, first=through_the_link(bench, source), again=report["again"])
            continue
        bench.have_memory(8)
        with make() as mounted:
            report = read(bench, mounted, reader, "order", source, size)
        group.add(who, first=report["first"], again=report["again"])


def through_the_link(bench: Bench, source: Path) -> float:
    """Return the floor: MB/s of the source through the link."""
    words = [*LINK, "--delay", str(DELAY), "host", shlex.join(["cat", str(source)])]
    began = time.monotonic()
    process = bench.ground.popen(words, stdout=subprocess.PIPE, bufsize=0)
    buffer = bytearray(1 << 20)
    while process.stdout.readinto(buffer):
        pass
    seconds = time.monotonic() - began
    process.stdout.close()
    until(lambda: process.poll() is not None, "the end of the link")
    return bench.size / seconds / 1e6
