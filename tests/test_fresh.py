"""tools/fresh: the environment of a command, and what is left behind.

The Debian is a few programs of this machine.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import support
from support import PYTHON, failed, output, until

FRESH = Path(__file__).resolve().parent.parent / "tools" / "fresh"
MISSING = "tools/fresh: debootstrap is not installed here: apt-get install debootstrap\n"
NOT_ROOT = "tools/fresh: only root can do this: sudo tools/fresh …\n"
PROGRAMS = ("sh", "env", "losetup", "sleep", "truncate")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Make a cache whose Debian has a shell and a few programs, with their libraries."""
    support.require_root()
    for name in ("git", "mkfs.ext4"):
        if shutil.which(name, path="/usr/bin:/usr/sbin") is None:
            pytest.skip(f"{name} is not installed")
    tree = tmp_path / "trixie"
    for folder in ("etc/apt/apt.conf.d", "dev", "proc", "sys", "run", "tmp", "root", "var/lib"):
        (tree / folder).mkdir(parents=True)
    for name in PROGRAMS:
        program = str(shutil.which(name, path="/usr/bin:/usr/sbin"))
        for file in re.findall(r"/\S+", f"{program} {output('ldd', program)}"):
            (tree / file[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tree / file[1:])
    return tmp_path


def fresh(cache: Path, *words: str) -> list[str]:
    return [PYTHON, str(FRESH), "--cache", str(cache), *words]


def test_a_command_finds_a_clone_and_nothing_of_this_shell(cache: Path) -> None:
    script = "[ -e tools/fresh ] && [ $$ != 1 ] && echo $HOME && echo kept >/file && exit 7"
    for _ in range(2):
        command = fresh(cache, "trixie", "sh", "-c", f"[ ! -e /file ] && {script}")
        done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
        failed(done, 7, stdout="/root\n")
    done = subprocess.run(
        fresh(cache, "env"),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert "BLOCKCOPY_FRESH=1\n" in done.stdout
    assert "PYTHONUNBUFFERED" not in done.stdout
    assert not any((cache / "root").iterdir())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_one_that_is_ended(cache: Path, number: signal.Signals) -> None:
    script = "truncate -s 1M /file; losetup --find --show /file; sleep 1000 & sleep 1000"
    with subprocess.Popen(fresh(cache, "sh", "-c", script), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        device = process.stdout.readline().strip()
        assert device.startswith("/dev/loop")
        process.send_signal(number)
        assert process.stdout.read() == ""  # all processes with this output have ended
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    until(lambda: device not in output("losetup", "--list", "--noheadings", "--output", "NAME").split(), "its end")
    until(
        lambda: str(cache) not in output("losetup", "--list", "--noheadings", "--output", "BACK-FILE"), "its disk"
    )
    assert sorted(each.name for each in cache.iterdir()) == ["lock", "root", "trixie"]


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    support.require_root()
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "git").symlink_to("/bin/true")
    done = subprocess.run(
        fresh(tmp_path, "true"), capture_output=True, text=True, check=False, env={"PATH": str(programs)}
    )
    assert (done.returncode, done.stderr) == (125, MISSING)
    command = ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=+dac_read_search"]
    command += ["--ambient-caps=+dac_read_search", *fresh(tmp_path, "true")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (125, NOT_ROOT)
