"""A mount namespace in which every user may open /dev/fuse.

Without udev, only root may open /dev/fuse, and mounts of ordinary users could not be measured.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

FUSE = Path("/dev/fuse")
ENTERED = "BLOCKCOPY_BENCH_NAMESPACE"
UNSHARE = ["unshare", "--mount", "--propagation", "private"]


def enter() -> None:
    """Restart this program in such a namespace, if that is needed and possible. This process becomes `unshare`."""
    if os.geteuid() != 0 or ENTERED in os.environ or not FUSE.exists() or FUSE.stat().st_mode & 0o006 == 0o006:
        return
    try:
        is_possible = subprocess.run([*UNSHARE, "true"], stderr=subprocess.DEVNULL, check=False).returncode == 0
    except FileNotFoundError:
        return
    if is_possible:
        os.environ[ENTERED] = "yes"
        os.execvp(UNSHARE[0], [*UNSHARE, sys.executable, *sys.argv])


def let_everybody_use_fuse(folder: Path) -> None:
    """Mount a /dev/fuse for everybody, if in the namespace.

    It ends with the process. `folder`: a private folder.
    """
    if ENTERED not in os.environ:
        return
    devices, number = folder / "devices", FUSE.stat().st_rdev
    devices.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "devices", devices], check=True)
    os.mknod(devices / "fuse", stat.S_IFCHR | 0o666, number)
    (devices / "fuse").chmod(0o666)  # mknod applied the umask
    subprocess.run(["mount", "--bind", devices / "fuse", FUSE], check=True)
