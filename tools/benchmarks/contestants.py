"""The contestants of copies: commands of blockcopy, the original, dd and cmp, and each installed peer."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.data import BLOCK
from benchmarks.ground import BenchError, Ground
from checkout import CHECKOUT

Pipeline = list[list[Any]]
"""Commands that pipes connect. Empty if the contestant cannot make this copy."""

FLOOR, ORIGINAL, OURS = "dd", "original, 3 pipes", "blockcopy sync"
STAGES, STAGES_BLAKE3 = "blockcopy, 3 stages", "blockcopy, 3 stages, blake3"
LINK = [sys.executable, str(CHECKOUT / "tools/standins/link")]


@dataclass(frozen=True)
class Contestant:
    """A program that makes copies."""

    name: str
    commands: Callable[[str, str, bool], Pipeline]
    """Returns the pipeline for a source, a destination, and whether both are devices."""
    only_equal: bool = False
    """The contestant only compares: it can take part only if both are equal."""


def stages(program: list[str], source: str, destination: str, *, checksum: list[str], link: list[str]) -> Pipeline:
    """Return checksum, retrieve and save of `program`.

    `checksum`: options. `link`: the command before retrieve, or [].
    """
    retrieve = [*program, "retrieve", source]
    return [
        [*program, "checksum", *checksum, destination],
        [*link, shlex.join(retrieve)] if link else retrieve,
        [*program, "save", destination],
    ]


def contestants(args: argparse.Namespace, ground: Ground) -> tuple[list[Contestant], list[str]]:
    """Return the contestants that can run here, the floor first, and notes about the others."""
    found = [
        Contestant(
            FLOOR,
            lambda source, destination, _: [
                ["dd", f"if={source}", f"of={destination}", "bs=1M", "conv=notrunc", "status=none"]
            ],
        ),
        Contestant("cmp", lambda source, destination, _: [["cmp", source, destination]], only_equal=True),
    ]
    notes: list[str] = []
    if args.original:
        original = [ground.python, str(args.original)]
        found.append(Contestant(ORIGINAL, three(original)))
    else:
        notes.append("the original: not measured; give --original PATH")
    found += [Contestant(OURS, lambda *ends: sync(ground, *ends[:2])), Contestant(STAGES, three(ground.blockcopy))]
    if "--digest" in ground.output([*ground.blockcopy, "checksum", "--help"]):
        found.append(Contestant(STAGES_BLAKE3, three(ground.blockcopy, "--digest", "blake3")))
    else:
        notes.append("3 stages with blake3: skipped, `blockcopy checksum` has no --digest")
    return found + peers(args, notes), notes


def three(program: list[str], *checksum: str) -> Callable[[str, str, bool], Pipeline]:
    """Return the `commands` of a contestant that runs the three stages of `program`. `checksum`: options."""
    return lambda source, destination, _: stages(program, source, destination, checksum=list(checksum), link=[])


def sync(ground: Ground, source: str, destination: str, link: list[str] | None = None) -> Pipeline:
    """Return `blockcopy sync` as a pipeline, through the command `link` if given."""
    remote = []
    if link:
        remote = ["-e", shlex.join(link), "--blockcopy-path", shlex.join(ground.blockcopy)]
        source = f"host:{source}"
    return [[*ground.blockcopy, "sync", "--no-state", *remote, source, destination]]


def peers(args: argparse.Namespace, notes: list[str]) -> list[Contestant]:
    """Return the peers that are installed or named. Adds a note for each other one to `notes`."""
    found: list[Contestant] = []
    if args.no_peers:
        notes.append("peers: not measured (--no-peers)")
        return found

    def installed(program: str, package: str) -> bool:
        is_here = shutil.which(program) is not None
        if not is_here:
            notes.append(f"{program}: not installed (apt-get install {package})")
        return is_here

    if installed("rsync", "rsync"):
        help_text = subprocess.run(["rsync", "--help"], capture_output=True, text=True, check=False).stdout
        knows_devices = "--copy-devices" in help_text and "--write-devices" in help_text
        if not knows_devices:
            notes.append("rsync: not measured on loop devices, it lacks --copy-devices or --write-devices")
        found.append(Contestant("rsync", lambda *ends: rsync(*ends, knows_devices=knows_devices)))
    if installed("nbdcopy", "libnbd-bin"):
        found.append(Contestant("nbdcopy", lambda source, destination, _: [["nbdcopy", source, destination]]))
        if installed("nbdkit", "nbdkit"):
            found.append(Contestant("nbdcopy, nbdkit", nbdkit_both))
    if installed("qemu-img", "qemu-utils"):
        raw = ["-f", "raw", "-O", "raw"]
        found.append(
            Contestant(
                "qemu-img convert",
                lambda source, destination, _: [["qemu-img", "convert", "-n", *raw, source, destination]],
            )
        )
    if args.bdsync:
        found.append(Contestant("bdsync", lambda *ends: bdsync(str(args.bdsync), *ends[:2])))
    else:
        notes.append("bdsync: not measured; give --bdsync PATH")
    if args.diskrsync:
        program = str(args.diskrsync)
        found.append(
            Contestant(
                "diskrsync", lambda source, destination, _: [[program, "--no-compress", source, destination]]
            )
        )
    else:
        notes.append("diskrsync: not measured; give --diskrsync PATH")
    return found


def rsync(source: str, destination: str, devices: bool, *, knows_devices: bool) -> Pipeline:
    """Return rsync as a pipeline, with a delta although both ends are local, and without trust in file times."""
    if devices and not knows_devices:
        return []
    extra = ["--copy-devices", "--write-devices"] if devices else ["--inplace"]
    return [["rsync", "--no-whole-file", "--ignore-times", *extra, source, destination]]


def nbdkit_both(source: str, destination: str, _: bool) -> Pipeline:
    """Return nbdcopy as a pipeline, with nbdkit at both ends."""
    ends = [["[", "nbdkit", "--exit-with-parent", "file", f"file={path}", "]"] for path in (source, destination)]
    return [["nbdcopy", "--", *ends[0], *ends[1]]]


def bdsync(program: str, source: str, destination: str) -> Pipeline:
    """Return bdsync and its patch as a pipeline, with blockcopy's block size."""
    return [
        [program, f"--blocksize={BLOCK}", f"{shlex.quote(program)} --server", source, destination],
        [program, f"--patch={destination}"],
    ]


def require(program: object, option: str) -> None:
    """Raise BenchError if the program that `option` names does not exist. None as program is right."""
    if program is not None and not shutil.which(str(program)) and not os.path.isfile(str(program)):
        raise BenchError(f"{option}: no such program: {program}")
