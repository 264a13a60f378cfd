"""dm-error, dm-flakey and dm-delay below both ends, swapped while blockcopy runs: errors where due, and recovery.

The cases are in `guests.inside.faults`. Whenever a case asks, the host compares the disks from outside. Nothing is
flushed for that: a block on record must be on the disk already.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from guests.comparison import PAGE, different_pages, pages_of, read_record
from guests.inside import INIT, files
from guests.lab import Lab
from guests.machine import Disk, WrongError

SIZE = 16 << 20
SECONDS = 900
"""Time limit from one event to the next."""


def run(lab: Lab) -> dict[str, object]:
    """Boot, and follow the cases. Returns the figures that they tell."""
    source = lab.choose.randbytes(SIZE)
    for name, data in (("source", source), ("device", bytes(SIZE)), ("state", bytes(64 << 20))):
        (lab.folder / name).write_bytes(data)
    guest = lab.machine(
        disks=[
            Disk("source", lab.folder / "source", readonly=True),
            *(Disk(each, lab.folder / each) for each in ("device", "state")),
        ],
        files=files("faults"),
        init=INIT,
        memory=768,
    )
    guest.boot()
    figures: dict[str, object] = {"cases": 0, "comparisons": 0, "blocks on record that differ": 0}
    said: list[str] = []
    while True:
        line = guest.next_event(SECONDS)
        if line is None:
            raise WrongError(f"the guest tells nothing for {SECONDS} s, or has ended: {said[-5:]}; see {guest.log}")
        kind, *values = json.loads(line)
        lab.say(line[:400])
        said.append(line)
        if kind == "done":
            return figures
        if kind == "wrong":
            raise WrongError(f"{values[0]}; before: {said[-6:-1]}")
        if kind == "figure":
            figures[values[0]] = values[1]
        elif kind == "passed":
            figures["cases"] = int(str(figures["cases"])) + 1
        elif kind == "check":
            compare(source, (lab.folder / "device").read_bytes(), guest.share / "left", values[0])
            figures["comparisons"] = int(str(figures["comparisons"])) + 1
            guest.tell("compared")


def compare(source: bytes, data: bytes, left: Path, what: dict[str, Any]) -> None:
    """Compare the destination's `data` with the `source` and the `writes`. Raises WrongError if they differ.

    `what`: a case's `check`. `complete`: all blocks but the `bad` ones are compared, not only those on record.
    `doubtful`: pages that a write may have reached, or not.
    """
    expected = bytearray(source)
    for offset, length, seed in what.get("writes", ()):
        expected[offset : offset + length] = random.Random(seed).randbytes(length)
    blocks, pages = read_record(left, len(source))
    wanted = pages | pages_of(blocks)
    if bad := blocks & set(what.get("bad", ())):
        raise WrongError(f"blocks that cannot be read are on record: {bad}")
    if wrong := different_pages(bytes(expected), data, wanted - set(what.get("doubtful", ()))):
        raise WrongError(f"{len(wrong)} pages on record differ, such as {sorted(wrong)[:5]}")
    if what.get("complete"):
        every = set(range(len(source) // PAGE)) - pages_of(what.get("bad", ())) - set(what.get("doubtful", ()))
        if wrong := different_pages(bytes(expected), data, every):
            raise WrongError(f"the copy differs in {len(wrong)} pages, such as {sorted(wrong)[:5]}")
