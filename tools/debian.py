"""A minimal Debian for the tools, by debootstrap, in a cache; it gets the settings of apt and pip of this machine.

Needs root. Uses the standard library only: `tools/fresh` runs before there is an environment.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

CACHE = Path("/var/cache/blockcopy-fresh")
"""The folder of the minimal Debians."""

_CARRIED = ("etc/resolv.conf", "etc/hosts", "etc/pip.conf", "etc/xdg/pip", "usr/local/share/ca-certificates")
"""Settings of this machine that hold in the Debian."""

_CARRIED_VARIABLES = re.compile(r"TERM|PIP_(?!FIND_LINKS)\w+|\w+_(proxy|PROXY)|(SSL|REQUESTS)_\w*(FILE|DIR|BUNDLE)")


class ToolError(Exception):
    """Something that a tool needs is missing or failed."""


def run(*words: object, env: dict[str, str] | None = None) -> str:
    """Return the standard output of a program. `env`: its environment. Raises ToolError if the program fails."""
    command = [str(each) for each in words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    except FileNotFoundError:
        raise ToolError(f"{command[0]} is not installed here: apt-get install {command[0]}") from None
    if done.returncode:
        said = [*done.stdout.splitlines()[-20:], *done.stderr.splitlines()[-20:]]
        raise ToolError("\n    ".join([f"`{' '.join(command)}` ended with {done.returncode}:", *said]))
    return done.stdout


def minimal(release: str, cache: Path, say: Callable[[str], None], *, again: bool = False) -> Path:
    """Return the folder of a Debian in which nothing has run yet. `say` is called with lines about a long wait.

    Installs one if the cache has none, or if `again`.
    """
    tree = cache / release
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be installing it
        if not tree.exists() or again:
            if shutil.which("debootstrap") is None:
                raise ToolError("debootstrap is not installed here: apt-get install debootstrap")
            say(f"installing a minimal Debian {release} into {tree}; this takes some minutes, once")
            with tempfile.TemporaryDirectory(prefix=f"{release}.", dir=cache) as folder:
                made = Path(folder) / "debian"
                run("debootstrap", "--variant=minbase", "--include=sudo", release, made, *_mirror())
                shutil.rmtree(tree, ignore_errors=True)
                made.rename(tree)
    return tree


def _mirror() -> list[str]:
    """Return a list with the URL of the archive that apt uses here. Returns [] if this machine is no Debian.

    debootstrap uses its own default then.
    """
    if "\nID=debian\n" not in f"\n{Path('/etc/os-release').read_text()}":
        return []
    folder = Path("/etc/apt/sources.list.d")
    for file in (Path("/etc/apt/sources.list"), folder / "debian.sources", *sorted(folder.glob("*"))):
        if file.is_file():
            lines = file.read_text(errors="replace")
            if found := re.search(r"^(?:URIs:|deb(?: +\[.*?\])?)\s+(https?://\S+)", lines, re.MULTILINE):
                return [found[1]]
    return []


def carry_settings(root: Path, name: str) -> None:
    """Copy this machine's settings of network, apt and pip into the Debian at `root`, whose host name is `name`.

    Creates files that a boot would create, too.
    """
    for each in _CARRIED:
        here, there = Path("/", each), root / each
        there.parent.mkdir(parents=True, exist_ok=True)
        if here.is_dir():
            shutil.copytree(here, there, dirs_exist_ok=True)
        elif here.exists():
            there.unlink(missing_ok=True)
            shutil.copy(here, there)
    with (root / "etc/hosts").open("a") as hosts:
        hosts.write(f"127.0.0.1 localhost {name}\n")
    if shutil.which("apt-config"):
        settings = re.findall(r"^Acquire::https?::.*\n", run("apt-config", "dump"), re.MULTILINE)
        (root / "etc/apt/apt.conf.d/90host").write_text("".join(settings))
    (root / "etc/mtab").symlink_to("../proc/self/mounts")
    (root / "run/lock").mkdir(mode=0o1777, exist_ok=True)


def login_environment(name: str, home: Path) -> dict[str, str]:
    """Return the environment of a login of the user `name` in the Debian, with our variables of apt and pip."""
    carried = {each: value for each, value in os.environ.items() if _CARRIED_VARIABLES.fullmatch(each)}
    path = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
    if name == "root":
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {**carried, "PATH": path, "HOME": str(home), "USER": name, "LOGNAME": name, "LANG": "C.UTF-8"}
