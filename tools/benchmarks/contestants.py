"""Who copies: the commands of blockcopy, of the original, of dd and cmp, and of each peer that is installed."""

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

FLOOR, ORIGINAL, OURS = "dd", "original, 3 pipes", "blockcopy sync"
STAGES, STAGES_BLAKE3 = "blockcopy, 3 stages", "blockcopy, 3 stages, blake3"
LINK = [sys.executable, str(CHECKOUT / "tools/standins/link")]


@dataclass(frozen=True)
class Contestant:
    name: str
    commands: Callable[[str, str, bool], Pipeline]
    """From the source, the destination, and whether they are devices."""
    only_equal: bool = False
    """It writes nothing: it compares."""


def stages(program: list[str], source: str, destination: str, *, checksum: list[str], link: list[str]) -> Pipeline:
    """The three pipes of the original, or of ours."""
    retrieve = [*program, "retrieve", source]
    return [
        [*program, "checksum", *checksum, destination],
        [*link, shlex.join(retrieve)] if link else retrieve,
        [*program, "save", destination],
    ]


def contestants(args: argparse.Namespace, ground: Ground) -> tuple[list[Contestant], list[str]]:
    """Those that can run here, and words on those that cannot. The floor is the first."""
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
        notes.append("the original: not measured; name it by --original PATH")
    found += [Contestant(OURS, lambda *ends: sync(ground, *ends[:2])), Contestant(STAGES, three(ground.blockcopy))]
    if "--digest" in ground.output([*ground.blockcopy, "checksum", "--help"]):
        found.append(Contestant(STAGES_BLAKE3, three(ground.blockcopy, "--digest", "blake3")))
    else:
        notes.append("3 stages with blake3: left out, `blockcopy checksum` has no --digest")
    return found + peers(args, notes), notes


def three(program: list[str], *checksum: str) -> Callable[[str, str, bool], Pipeline]:
    return lambda source, destination, _: stages(program, source, destination, checksum=list(checksum), link=[])


def sync(ground: Ground, source: str, destination: str, link: list[str] | None = None) -> Pipeline:
    """`blockcopy sync`, through a link where one is given."""
    through = []
    if link:
        through = ["-e", shlex.join(link), "--blockcopy-path", shlex.join(ground.blockcopy)]
        source = f"host:{source}"
    return [[*ground.blockcopy, "sync", "--no-state", *through, source, destination]]


def peers(args: argparse.Namespace, notes: list[str]) -> list[Contestant]:
    """Of the programs that are installed, or are named."""
    found: list[Contestant] = []
    if args.no_peers:
        notes.append("peers: not asked for")
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
            notes.append("rsync: not measured on loop devices, it has no --copy-devices or no --write-devices")
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
        notes.append("bdsync: not measured; name it by --bdsync PATH")
    if args.diskrsync:
        program = str(args.diskrsync)
        found.append(
            Contestant(
                "diskrsync", lambda source, destination, _: [[program, "--no-compress", source, destination]]
            )
        )
    else:
        notes.append("diskrsync: not measured; name it by --diskrsync PATH")
    return found


def rsync(source: str, destination: str, devices: bool, *, knows_devices: bool) -> Pipeline:
    """The delta, although both are here; and nothing is taken for equal because of its time."""
    if devices and not knows_devices:
        return []
    extra = ["--copy-devices", "--write-devices"] if devices else ["--inplace"]
    return [["rsync", "--no-whole-file", "--ignore-times", *extra, source, destination]]


def nbdkit_both(source: str, destination: str, _: bool) -> Pipeline:
    ends = [["[", "nbdkit", "--exit-with-parent", "file", f"file={path}", "]"] for path in (source, destination)]
    return [["nbdcopy", "--", *ends[0], *ends[1]]]


def bdsync(program: str, source: str, destination: str) -> Pipeline:
    """With the block size that blockcopy has."""
    return [
        [program, f"--blocksize={BLOCK}", f"{shlex.quote(program)} --server", source, destination],
        [program, f"--patch={destination}"],
    ]


def require(program: object, option: str) -> None:
    """BenchError where a program that an option names is not there."""
    if program is not None and not shutil.which(str(program)) and not os.path.isfile(str(program)):
        raise BenchError(f"{option}: there is no {program}")
