"""Commands where the system refuses what programs take for granted: the cause is named, and nothing crashes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from support import BLOCKCOPY, PATIENCE, PYTHON, STANDINS, failed, noise, require_fuse, require_root, start, written

from blockcopy.errors import BlockcopyError, InternalError, OperatingSystemError, as_user_error

DATA = noise(300_000)

LINK = f"{PYTHON} {STANDINS / 'link'}"


class Surroundings(NamedTuple):
    before: str
    """What a shell does first."""
    told: str | None = None
    """What each command that fails says; None where none may fail."""


FEW_FILES = "files may be open at once, and"

_NO_SUCH = (
    "unset HOME USER LOGNAME; export TMPDIR=/nonexistent STATE_DIRECTORY=/proc/nowhere;"
    "mount --bind /dev/null /etc/passwd; mount -t tmpfs -o ro tmpfs /dev/shm; mount -t tmpfs -o ro tmpfs /run;"
    "export LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0;"
)

_FULL = "mkdir -p /run/blockcopy; mount -t tmpfs -o mode=700,nr_inodes=1 tmpfs /run/blockcopy;"

KINDS = {
    "a folder that was removed": Surroundings("mkdir $$; cd $$; rmdir ../$$;", "current folder was removed"),
    "8 files": Surroundings("ulimit -n 8;", FEW_FILES),
    "16 files": Surroundings("ulimit -n 16;", FEW_FILES),
    "few files, but more are allowed": Surroundings("ulimit -Sn 16;"),
    "closed streams": Surroundings("exec <&- >&- 2>&-;", ""),
    "no home, name, locale, nor places for anything": Surroundings(_NO_SUCH),
    "no room for a socket": Surroundings(_FULL),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_command_names_the_cause_or_works(tmp_path: Path, kind: str) -> None:
    require_fuse()
    require_root()
    surroundings = KINDS[kind]
    source = written(tmp_path / "source", DATA)
    copies = [written(tmp_path / f"ä{number}", b"old") for number in range(4)]
    (tmp_path / "mnt").mkdir()
    way = ["-e", LINK, "--python", PYTHON]
    name = "../source" if "rmdir" in surroundings.before else "source"
    commands = [
        ["checksum", str(copies[0])],
        ["facts", str(source)],
        ["sync", name, str(copies[0])],
        ["sync", *way, f"host:{source}", str(copies[1])],
        ["sync", *way, name, f"host:{copies[2]}"],
        ["doctor", *way, f"host:{source}"],
        ["mount", name, str(copies[3]), str(tmp_path / "mnt")],
    ]
    processes = [(each, started(surroundings.before, each, tmp_path)) for each in commands]
    failed = set()
    for command, process in processes:
        said = "".join(text.decode(errors="replace") for text in process.communicate(timeout=PATIENCE))
        assert process.returncode in (0, 1, 2, 3), (command, said)
        assert "Traceback" not in said
        assert "Exception ignored" not in said
        assert "internal error" not in said
        if process.returncode:
            failed.add(command[0])
            assert surroundings.told is not None, (command, said)
            assert surroundings.told in said, (command, said)
    assert bool(failed) == (surroundings.told is not None)


def started(before: str, arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a command in a mount namespace of its own, after the shell code `before`."""
    script = f"{before} {shlex.join([*BLOCKCOPY, *arguments])}"
    if arguments[0] == "mount":
        script += f" && {{ {shlex.join([*BLOCKCOPY, 'umount', arguments[-1]])} || test $? = 75; }}"
    return subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (OSError(24, "Too many open files"), OperatingSystemError, "ulimit -n"),
        (
            FileNotFoundError(2, "No such file or directory", "/x"),
            OperatingSystemError,
            "No such file or directory: /x",
        ),
        (MemoryError(), OperatingSystemError, "not enough memory"),
        (RuntimeError("can't start new thread"), OperatingSystemError, "ulimit -u"),
        (
            ExceptionGroup("a", [OperatingSystemError("known"), ExceptionGroup("b", [OSError(12, "")])]),
            OperatingSystemError,
            "memory",
        ),
        (KeyError("x"), InternalError, "internal error: KeyError: 'x'"),
    ],
)
def test_whatever_ends_a_command_is_told_in_a_line(error: Exception, kind: type[BlockcopyError], told: str) -> None:
    found = as_user_error(error)
    assert (type(found), told in str(found), found.__cause__) == (kind, True, error)


def test_an_error_that_is_told_already_stays_as_it_is() -> None:
    error = BlockcopyError("known")
    assert as_user_error(error) is error


def test_a_fault_is_in_the_log_with_all_there_is_to_see(tmp_path: Path) -> None:
    trap = written(
        tmp_path / "trap.py", b"import trio\nfrom blockcopy.cli.main import main\ndel trio.run\nmain()\n"
    )
    source, log = written(tmp_path / "source", DATA), tmp_path / "log"
    done = subprocess.run(
        [PYTHON, str(trap), "sync", "--log-file", log, source, tmp_path / "copy"],
        capture_output=True,
        check=False,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    failed(done, 1, b"ERROR (sync): internal error: AttributeError")
    assert b"Traceback" not in done.stderr
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize("module", ["argparse", "trio"])
def test_ctrl_c_while_modules_are_loaded_is_silent(module: str, tmp_path: Path) -> None:
    """Send SIGINT from a module that is loaded early, and from one that a command loads."""
    (tmp_path / "traps").mkdir()
    trap = b"""import os, signal
class Killing:
    def __set_name__(self, *_):  # Python 3.11 wraps what this raises
        os.kill(os.getpid(), signal.SIGINT)
class Trap:
    it = Killing()
os.read(os.pipe()[0], 1)
"""
    written(tmp_path / "traps" / f"{module}.py", trap)
    source = written(tmp_path / "source", b"data")
    done = start("sync", source, tmp_path / "copy", env={**os.environ, "PYTHONPATH": str(tmp_path / "traps")})
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")
