"""A mounted, busy ext4 moves from a writable mount to the destination by device-mapper. Then the power is cut.

The steps are those of the manual. Each file whose fsync returned must be there after the cut.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil

from debian import run as run_program
from guests.disks import ForgetfulDisk
from guests.lab import Lab
from guests.machine import Disk
from guests.play import INSIDE, play, stage
from guests.steps import empty_file

SIZE = 64 << 20
SECONDS = 600
"""Time limit of a life. On an idle machine it takes a minute."""


def run(lab: Lab) -> dict[str, object]:
    """Mount, write, hand off, cut, check. Returns how long users waited."""
    source, copy = (empty_file(lab, name, SIZE) for name in ("source", "copy"))
    tree = lab.folder / "tree"
    tree.mkdir()
    noise = lab.choose.randbytes(SIZE // 2)
    (tree / "noise").write_bytes(noise)
    (tree / "noise.sha256").write_text(f"{hashlib.sha256(noise).hexdigest()}  noise\n")
    run_program("mkfs.ext4", "-q", "-F", "-d", tree, source)
    shutil.rmtree(tree)
    disk = ForgetfulDisk(copy, lab.folder / "copy.nbd", lab.choose)
    lab.on_end(disk.close)
    disks = [Disk("source", source, readonly=True), Disk("copy", disk.url)]
    guest = stage(lab, "hand_off", disks=disks, files={"writer.py": INSIDE / "writer.py"})
    acknowledged: dict[str, None] = {}

    def note(line: str) -> None:
        with contextlib.suppress(ValueError):
            kind, number = line.split()
            if kind == "@wrote":
                acknowledged[number] = None

    figures = play(lab, guest, SECONDS, note)
    figures["files acknowledged"] = len(acknowledged)
    figures["sectors lost by the cut"] = disk.cut().lost
    (guest.share / "acknowledged").write_text("".join(f"{each}\n" for each in acknowledged))
    return figures | play(lab, guest, SECONDS)
