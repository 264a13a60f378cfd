"""The part `present`: reads of a complete replica, beside other file systems in user space."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks import data
from benchmarks.bench import Bench
from benchmarks.mounts import peers, replica
from benchmarks.part_lazy import READER, fresh

BACKING = "the backing file itself"
BY_PAGE = "the same, cached by the page"
"""A file that is cached in single pages, as FUSE caches. This bounds repeated reads through any mount."""

PRESENT_PEERS = ["passthrough_ll", "nbdfuse"]
PAGE = 4096
TIME_LIMIT = 300
"""Time limit in seconds for completing a local copy."""


def present(bench: Bench) -> None:
    """Measure the part `present`."""
    ground = bench.ground
    folder = ground.folder / "present"
    folder.mkdir()
    source = data.noise(folder / "source", [(0, bench.size)], bench.size, f"{bench.args.seed} present")
    words = f"{bench.size >> 20} MiB, present and in the page cache; first: not in the mount's cache"
    group = bench.results.group("present", "a complete replica", words, BACKING)
    contestants = {
        BACKING: lambda: contextlib.nullcontext(source),
        BY_PAGE: lambda: by_page(bench, source),
        "blockcopy mount": lambda: complete(bench, source),
    }
    for name, maker in peers(PRESENT_PEERS, bench.results.note).items():
        contestants[name] = partial(file_of, maker, bench, source)
    if not (fio := shutil.which("fio")):
        bench.results.note("present, IOPS: not measured, missing fio (apt-get install fio)")
    for _, (who, make) in bench.alternating(contestants.items()):
        bench.say(f"present: {who}")
        data.warm(source)
        with make() as file:
            bench.have_memory(2)
            command = [ground.python, "-I", READER, "order", file, source]
            report = json.loads(ground.output(command, seconds=TIME_LIMIT))
            group.add(who, first=report["first"], again=report["again"])
            for depth in (1, 16) if fio else ():
                group.add(who, **{f"depth_{depth}": iops(bench, file, depth, is_backing=who in (BACKING, BY_PAGE))})


@contextmanager
def file_of(maker, bench: Bench, source: Path) -> Iterator[Path]:
    """Mount a peer without delay, and yield the path of its file."""
    with maker(bench.ground, source, None) as mounted:
        yield mounted.file


@contextmanager
def by_page(bench: Bench, source: Path) -> Iterator[Path]:
    """Yield a copy whose pages entered the cache one by one. The kernel keeps pages of one write together."""
    path = bench.ground.name("by-page")
    data.copy(source, path, [(0, bench.size)], piece=PAGE)
    yield path
    path.unlink()


@contextmanager
def complete(bench: Bench, source: Path) -> Iterator[Path]:
    """Mount the source, wait for the complete copy, and read it into the page cache.

    Yields the path of its file.
    """
    destination = fresh(bench.ground, bench.size)
    with replica(bench.ground, source, destination, "--no-state") as mounted:
        bench.ground.output([*bench.ground.blockcopy, "wait", mounted.point], seconds=TIME_LIMIT)
        data.warm(destination)
        yield mounted.file
    destination.unlink()


def iops(bench: Bench, file: Path, depth: int, *, is_backing: bool) -> float:
    """Measure random 4 KiB reads per second, by `depth` threads.

    Each read is of a page that was not read before: fio repeats none within a job, each job has its own share of
    the file, and the mount's cache is dropped first. The cache of a backing file stays, on purpose.
    """
    share = bench.size // depth
    words = [
        *("fio", "--name=read", f"--filename={file}", "--readonly", "--rw=randread", "--bs=4k", "--ioengine=psync"),
        *(f"--numjobs={depth}", "--thread", "--group_reporting", f"--size={share}", f"--offset_increment={share}"),
        *(f"--invalidate={0 if is_backing else 1}", f"--runtime={1 if bench.args.quick else 4}"),
        *(f"--randseed={bench.args.seed}", "--output-format=json"),
    ]
    report = bench.ground.output(words, seconds=TIME_LIMIT)
    return json.loads(report[report.index("{") :])["jobs"][0]["read"]["iops"]
