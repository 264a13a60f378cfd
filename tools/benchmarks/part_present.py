"""The part `present`: how fast a replica is read that is complete, beside other file systems in user space."""

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
"""As FUSE caches, in single pages: what the kernel reads again through any mount is bound by that."""

PRESENT_PEERS = ["passthrough_ll", "nbdfuse"]
PAGE = 4096
PATIENCE = 300
"""Seconds for a local copy to become complete."""


def present(bench: Bench) -> None:
    ground = bench.ground
    folder = ground.folder / "present"
    folder.mkdir()
    source = data.noise(folder / "source", [(0, bench.size)], bench.size, f"{bench.args.seed} present")
    words = f"{bench.size >> 20} MiB that are here and in the page cache; first: new to the mount's own cache"
    group = bench.results.group("present", "a complete replica", words, BACKING)
    those = {
        BACKING: lambda: contextlib.nullcontext(source),
        BY_PAGE: lambda: by_page(bench, source),
        "blockcopy mount": lambda: complete(bench, source),
    }
    for name, maker in peers(PRESENT_PEERS, bench.results.note).items():
        those[name] = partial(file_of, maker, bench, source)
    if not (fio := shutil.which("fio")):
        bench.results.note("present, IOPS: not measured, there is no fio (apt-get install fio)")
    for _, (who, make) in bench.alternating(those.items()):
        bench.say(f"present: {who}")
        data.warm(source)
        with make() as file:
            bench.have_memory(2)
            told = json.loads(ground.output([ground.python, "-I", READER, "order", file, source], seconds=PATIENCE))
            group.add(who, first=told["first"], again=told["again"])
            for depth in (1, 16) if fio else ():
                group.add(who, **{f"depth_{depth}": iops(bench, file, depth, is_backing=who in (BACKING, BY_PAGE))})


@contextmanager
def file_of(maker, bench: Bench, source: Path) -> Iterator[Path]:
    with maker(bench.ground, source, None) as mounted:
        yield mounted.file


@contextmanager
def by_page(bench: Bench, source: Path) -> Iterator[Path]:
    """A file whose pages came into the cache one by one: the kernel keeps together what was written at once."""
    path = bench.ground.name("by-page")
    data.copy(source, path, [(0, bench.size)], piece=PAGE)
    yield path
    path.unlink()


@contextmanager
def complete(bench: Bench, source: Path) -> Iterator[Path]:
    """A mount whose copy is complete, and in the page cache."""
    destination = fresh(bench.ground, bench.size)
    with replica(bench.ground, source, destination, "--no-state") as mounted:
        bench.ground.output([*bench.ground.blockcopy, "wait", mounted.point], seconds=PATIENCE)
        data.warm(destination)
        yield mounted.file
    destination.unlink()


def iops(bench: Bench, file: Path, depth: int, *, is_backing: bool) -> float:
    """Each read is of a page that was not read before: fio repeats none within a job, each job has a share of
    the file of its own, and the mount's cache is dropped first. The backing file's is not: that is the point."""
    share = bench.size // depth
    words = [
        *("fio", "--name=read", f"--filename={file}", "--readonly", "--rw=randread", "--bs=4k", "--ioengine=psync"),
        *(f"--numjobs={depth}", "--thread", "--group_reporting", f"--size={share}", f"--offset_increment={share}"),
        *(f"--invalidate={0 if is_backing else 1}", f"--runtime={1 if bench.args.quick else 4}"),
        *(f"--randseed={bench.args.seed}", "--output-format=json"),
    ]
    told = bench.ground.output(words, seconds=PATIENCE)
    return json.loads(told[told.index("{") :])["jobs"][0]["read"]["iops"]
