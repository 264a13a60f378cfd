"""The environment of Ansible: installed once, and kept in a cache outside of the checkout."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from checkout import CHECKOUT

CACHE = Path("/var/cache/blockcopy-fleet")
COLLECTION = CHECKOUT / "tools" / "ansible"


def requirements(version: str | None = None) -> list[str]:
    """Return what the extra `fleet` of the checkout's package requires, or a `version` of Ansible, such as 2.14."""
    if version is not None:
        return [f"ansible-core=={version}.*"]
    with (CHECKOUT / "pyproject.toml").open("rb") as file:
        found: list[str] = tomllib.load(file)["project"]["optional-dependencies"]["fleet"]
    return found


def _folder(cache: Path, version: str | None) -> Path:
    wanted = "\n".join([sys.version, *requirements(version)])
    return cache / hashlib.sha256(wanted.encode()).hexdigest()[:16]


def installed(cache: Path = CACHE, version: str | None = None) -> Path | None:
    """Return the folder of the programs of Ansible. Returns None if they are not installed in `cache`."""
    folder = _folder(cache, version)
    return folder / "bin" if (folder / "complete").exists() else None


def install(cache: Path = CACHE, version: str | None = None) -> Path:
    """Install Ansible into `cache`, unless that was done. Returns the folder of its programs.

    `version`: as for `requirements`. Raises CalledProcessError if pip fails.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = installed(cache, version)
        if found is not None:
            return found
        folder = _folder(cache, version)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run(
            [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *requirements(version)], check=True
        )
        (folder / "complete").touch()
        return folder / "bin"


def variables(folder: Path) -> dict[str, str]:
    """Return the environment of a run of Ansible, whose files go to `folder`.

    The collection is a copy of the checkout's: who edits the checkout meanwhile disturbs no run.
    """
    place = folder / "collections" / "ansible_collections" / "blockcopy" / "move"
    if not place.exists():
        shutil.copytree(COLLECTION, place)
    (folder / "ansible.cfg").touch()
    ours = {
        "ANSIBLE_HOME": folder / "home",
        "ANSIBLE_LOCAL_TEMP": folder / "local",
        "ANSIBLE_COLLECTIONS_PATH": folder / "collections",
        "ANSIBLE_CONFIG": folder / "ansible.cfg",
        "ANSIBLE_PIPELINING": "True",
        "ANSIBLE_SSH_RETRIES": "0",
        "ANSIBLE_TIMEOUT": "10",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.default",
        "ANSIBLE_DISPLAY_SKIPPED_HOSTS": "False",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LC_ALL": "C.UTF-8",
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    return {**kept, **{name: str(value) for name, value in ours.items()}}
