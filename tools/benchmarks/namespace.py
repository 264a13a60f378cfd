"""Where root alone may use /dev/fuse (no udev has seen to it), an ordinary user's mount cannot be measured. Then
the benchmark runs in a mount namespace of its own, with a /dev/fuse as it is elsewhere: for everybody."""

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
    """Begin again in there, where that is needed and can be: this process becomes `unshare`."""
    if os.geteuid() != 0 or ENTERED in os.environ or not FUSE.exists() or FUSE.stat().st_mode & 0o006 == 0o006:
        return
    try:
        can_be = subprocess.run([*UNSHARE, "true"], stderr=subprocess.DEVNULL, check=False).returncode == 0
    except FileNotFoundError:
        return
    if can_be:
        os.environ[ENTERED] = "yes"
        os.execvp(UNSHARE[0], [*UNSHARE, sys.executable, *sys.argv])


def let_everybody_use_fuse(folder: Path) -> None:
    """In there; the folder is one of our own. It is over with the process."""
    if ENTERED not in os.environ:
        return
    devices, number = folder / "devices", FUSE.stat().st_rdev
    devices.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "devices", devices], check=True)
    os.mknod(devices / "fuse", stat.S_IFCHR | 0o666, number)
    (devices / "fuse").chmod(0o666)  # the umask had its say
    subprocess.run(["mount", "--bind", devices / "fuse", FUSE], check=True)
