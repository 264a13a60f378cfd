"""What the host gives a guest at each boot: the program of this checkout, and files of the scenario.

Both are archives behind the initial RAM disk. So a new commit costs seconds, not a new image.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from checkout import CHECKOUT
from guests.image import Image, compile_for_guest, pack


def pack_program(image: Image, folder: Path, archive: Path) -> None:
    """Pack the program as it lies in the checkout, committed or not, into `archive`. `folder`: for its files."""
    program = folder / "carried/program"
    names = subprocess.run(
        ["git", "-C", CHECKOUT, "ls-files", "-z", "--", "blockcopy", "fuse"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        here, there = CHECKOUT / name, program / name
        if here.exists():  # a file may be removed, and not committed yet
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(here, there)
    compile_for_guest(image, program)
    pack(folder, archive)


def pack_files(files: Mapping[str, bytes | str | Path], folder: Path, archive: Path) -> None:
    """Pack `files` (name → content, or a Path to copy), executable, into `archive`. `folder`: for the files."""
    carried = folder / "carried/files"
    carried.mkdir(parents=True)
    for name, content in files.items():
        path = carried / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.read_bytes() if isinstance(content, Path) else content
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        path.chmod(0o755)
    pack(folder, archive)
