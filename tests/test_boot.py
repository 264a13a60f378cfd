"""What starts mounts without anybody there: the units, what systemd is told, the log, and what is run at the end.

No systemd is run here: the unit is read, and its lines are run as systemd runs them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
from support import BLOCK_SIZE, BLOCKCOPY, Mount, failed, noise, run, succeeded, until, with_changes, written

Mounter = Callable[..., Mount]

UNITS = Path(__file__).resolve().parent.parent / "tools" / "systemd"
DATA = noise(16 * BLOCK_SIZE)
OLD = with_changes(DATA, list(range(16)))
SLOW = ("--limit", "64K")


@pytest.fixture
def point(tmp_path: Path) -> Path:
    support.require_fuse()
    (tmp_path / "a disk").mkdir()
    return tmp_path / "a disk"


# sd_notify


class Manager:
    """Someone who listens as systemd does."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.heard = ""

    def next(self) -> str:
        text = self._listener.recv(4096).decode()
        self.heard += f"{text}\n"
        return text

    def until(self, text: str) -> None:
        while text not in self.heard:
            self.next()


@contextlib.contextmanager
def manager(monkeypatch: pytest.MonkeyPatch, address: str) -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        listener.settimeout(support.PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        yield Manager(listener)


@pytest.mark.parametrize("abstract", [False, True])
def test_a_foreground_mount_tells_how_it_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, point: Path, source: Path, destination: Path, abstract: bool
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    command = [*BLOCKCOPY, "mount", "-f", *SLOW, source, destination, point]
    address = f"@{tmp_path}" if abstract else str(tmp_path / "notify")
    with (
        manager(monkeypatch, address) as systemd,
        subprocess.Popen([str(each) for each in command]) as process,
    ):
        try:
            systemd.until("READY=1")
            assert f"READY=1\nMAINPID={process.pid}\n" in systemd.heard
            systemd.until("STATUS=hydrating: ")
            assert (point / "destination").read_bytes() == DATA
            systemd.until("STATUS=complete: 100.00 % of 2.0 MiB\n")
            assert {systemd.next() for _ in range(3)} == {"WATCHDOG=1"}
        finally:
            process.send_signal(signal.SIGTERM)
        systemd.until("STOPPING=1")
        assert process.wait(timeout=20) == 0


def test_a_background_mount_tells_its_process_and_its_children_tell_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mount: Mounter, source: Path, destination: Path
) -> None:
    with manager(monkeypatch, str(tmp_path / "notify")) as systemd:
        mounted = mount(source, destination, *SLOW)
        systemd.until(f"READY=1\nMAINPID={mounted.status()['pid']}\n")
        assert mounted.retrievers()
        for pid in mounted.retrievers():
            assert b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes()
        mounted.umount()


def test_a_link_that_is_down_is_in_the_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mount: Mounter, source: Path, destination: Path
) -> None:
    with manager(monkeypatch, str(tmp_path / "notify")) as systemd:
        mounted = mount(source, destination, *SLOW, "--blockcopy-path", f"sh {_once(tmp_path)}")
        for pid in mounted.retrievers():
            os.kill(pid, signal.SIGKILL)
        systemd.until(" of 2.0 MiB; ")  # and the reason
        mounted.umount()
    assert re.search(r"STATUS=reconnecting: [\d.]+ % of 2.0 MiB; \S", systemd.heard)


def _once(folder: Path) -> Path:
    """Return a program: a `retrieve` that starts twice at most."""
    script = f'mkdir {folder}/one 2>&- || mkdir {folder}/two || exit 9\nexec {shlex.join(BLOCKCOPY)} "$@"\n'
    return written(folder / "once", script.encode())


def test_a_sync_tells_how_it_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path, destination: Path
) -> None:
    with manager(monkeypatch, str(tmp_path / "notify")) as systemd:
        assert run("sync", source, destination).returncode == 0
        assert re.match(r"STATUS=(hydrating|complete): \d+\.\d\d % of 2.0 MiB", systemd.next())


def test_a_manager_that_went_away_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path, destination: Path
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    done = run("sync", source, destination)
    succeeded(done)
    assert destination.read_bytes() == DATA


# --on-complete

FACTS = 'echo "$BLOCKCOPY_SIZE $BLOCKCOPY_SAME_BYTES $BLOCKCOPY_FETCHED_BYTES $BLOCKCOPY_SOURCE_NEEDED" >facts; '


def test_sync_runs_a_command_when_all_is_done(tmp_path: Path, source: Path, destination: Path) -> None:
    """By then, the destination is released: another sync to it is possible."""
    command = f"{FACTS} env | grep ^BLOCKCOPY_DEST; {shlex.join(BLOCKCOPY)} sync source destination && exit 7"
    done = run("sync", "--on-complete", command, source.name, destination.name, cwd=tmp_path)
    succeeded(done, None, stdout=f"BLOCKCOPY_DESTINATION={destination}\n")
    assert done.stderr.decode() == "--on-complete failed: it ended with exit status 7\n"
    assert (tmp_path / "facts").read_text() == f"{len(DATA)} 0 {len(DATA)} 0\n"


def test_a_copy_that_fails_runs_no_command(tmp_path: Path, destination: Path) -> None:
    done = run("sync", "--on-complete", "touch facts", tmp_path / "nothing", destination, cwd=tmp_path)
    failed(done, 3)
    assert not (tmp_path / "facts").exists()


def test_a_mount_runs_a_command_and_serves_meanwhile(
    mount: Mounter, tmp_path: Path, source: Path, destination: Path
) -> None:
    os.mkfifo(tmp_path / "go")
    command = f"cd {tmp_path}; {FACTS} cat go; echo $BLOCKCOPY_MOUNTPOINT >point; kill -9 $$"
    log = tmp_path / "log"
    mounted = mount(source, destination, "--on-complete", command, "--log-file", log, wait=True)
    until((tmp_path / "facts").exists, "the command")
    assert mounted.file.read_bytes() == DATA
    (tmp_path / "go").write_bytes(b"")
    until(lambda: "--on-complete failed: it was killed by SIGKILL" in log.read_text(), "its end")
    assert (tmp_path / "point").read_text() == f"{mounted.point}\n"
    pid = mounted.status()["pid"]
    assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""  # no zombie either
    mounted.umount()


def test_a_command_may_unmount_and_go_on(tmp_path: Path, point: Path, source: Path, destination: Path) -> None:
    command = f'{shlex.join(BLOCKCOPY)} umount "$BLOCKCOPY_MOUNTPOINT" && cmp source destination && echo >done'
    log = tmp_path / "log"
    done = run("mount", "--on-complete", command, "--log-file", log, source, destination, point, cwd=tmp_path)
    assert done.returncode == 0
    until((tmp_path / "done").exists, "the command's end")
    assert str(point) not in support.fuse_mounts()
    assert "continues after this program" in log.read_text()


# The log


def test_the_log_file_has_what_went_well_and_what_ended_it(
    mount: Mounter, tmp_path: Path, source: Path, destination: Path
) -> None:
    log = written(tmp_path / "log", b"what was there\n")
    mounted = mount(source, destination, "--log-file", log, wait=True)
    moved = tmp_path / "log.1"
    log.rename(moved)  # as logrotate does
    pid = mounted.status()["pid"]
    os.kill(pid, signal.SIGTERM)
    until(lambda: log.exists() and "ending on SIGTERM" in log.read_text(), "the new file")
    until(lambda: not support.alive(pid), "its end")
    assert re.fullmatch(
        r"what was there\n\S+ \S+ blockcopy\[\d+\] INFO: \S+ is a complete copy of \S+\n", moved.read_text()
    )


@pytest.mark.parametrize("command", ["sync", "mount"])
def test_an_error_is_once_in_the_log_file(tmp_path: Path, point: Path, destination: Path, command: str) -> None:
    log = tmp_path / "log"
    where = [point] if command == "mount" else []
    done = run(command, "--log-file", log, tmp_path / "nothing", destination, *where)
    failed(done, 3)
    assert log.read_text().count(f"ERROR: ERROR ({command}): ") == 1
    assert done.stderr.decode().count(f"ERROR ({command}): ") == 1


def test_a_log_file_that_cannot_be_written_is_told(source: Path, destination: Path) -> None:
    done = run("sync", "--log-file", "/no/such/folder/log", source, destination)
    failed(done, 1, b"cannot write --log-file")
    assert destination.read_bytes() == OLD


@contextlib.contextmanager
def journal(monkeypatch: pytest.MonkeyPatch, path: Path) -> Iterator[int]:
    """Open `path`, name it in JOURNAL_STREAM as systemd does, and yield its descriptor."""
    with path.open("wb") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        yield stream.fileno()


def test_the_journal_gets_levels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path, destination: Path
) -> None:
    with journal(monkeypatch, tmp_path / "journal") as stream:
        for path in (source, tmp_path / "nothing"):
            command = [*BLOCKCOPY, "sync", str(path), str(destination)]
            subprocess.run(command, stderr=stream, timeout=20, check=False)
    lines = (tmp_path / "journal").read_text().splitlines()
    assert lines[0].startswith(f"<6>{destination} is a complete copy")
    assert lines[-1].startswith("<3>ERROR (sync): ")
    elsewhere = run("sync", tmp_path / "nothing", destination)
    assert elsewhere.stderr.splitlines()[-1].startswith(b"ERROR (sync): ")


def test_a_background_mount_keeps_the_journal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, point: Path, source: Path, destination: Path
) -> None:
    """So has a mount unit, of a line in fstab."""
    with journal(monkeypatch, tmp_path / "journal") as stream:
        command = [*BLOCKCOPY, "mount", str(source), str(destination), str(point)]
        subprocess.run(command, stderr=stream, timeout=20, check=True)
        assert run("wait", point).returncode == 0
        assert run("umount", point).returncode == 0
    assert f"<6>{destination} is a complete copy" in (tmp_path / "journal").read_text()


# The units


def test_the_units_are_right_as_far_as_systemd_can_tell(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    units = []
    for unit in UNITS.iterdir():
        text = unit.read_text().replace("=blockcopy ", f"={support.PYTHON} ")
        units.append(written(tmp_path / unit.name.replace("@", "@disk"), text.encode()))
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, timeout=30, check=False)
    succeeded(done, stdout=b"")
    assert len(units) == 3


def unit_line(name: str, key: str) -> str:
    [value] = re.findall(rf"^{key}=(.*)$", (UNITS / name).read_text(), re.MULTILINE)
    return str(value)


def as_systemd_runs(line: str, variables: dict[str, str]) -> list[str]:
    """systemd.service(5): ${NAME} is one word whatever is in it, $NAME is as many as there are. `-`: may fail."""
    words: list[str] = []
    for word in line.removeprefix("-").split():
        if re.fullmatch(r"\$\w+", word):
            words += shlex.split(variables[word[1:]])
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda found: variables[found[1]], word))
    assert words[0] == "blockcopy"
    return [*BLOCKCOPY, *words[1:]]


def first_bytes(file: Path) -> bytes:
    """Return the first 100 bytes of `file`, read without read-ahead of the kernel."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(fd, 100, 0)
    finally:
        os.close(fd)


def test_the_unit_of_a_mount_through_its_life(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, point: Path, source: Path, destination: Path
) -> None:
    """Started; killed, and started again, over its dead mount; stopped before it is complete."""
    unit = "blockcopy-mount@.service"
    variables = {
        "SOURCE": str(source),
        "DESTINATION": str(destination),
        "MOUNTPOINT": str(point),
        "OPTIONS": "-o umask=022 --no-background",
    }
    start, stop = (as_systemd_runs(unit_line(unit, key), variables) for key in ("ExecStart", "ExecStop"))
    with manager(monkeypatch, str(tmp_path / "notify")) as systemd:
        with subprocess.Popen(start) as first:
            systemd.until(f"MAINPID={first.pid}\n")
            assert first_bytes(point / "destination") == DATA[:100]
            failed(run("pause", point), 2)  # it is the one that was asked for
            first.kill()
        with pytest.raises(OSError, match="not connected"):
            os.listdir(point)
        with subprocess.Popen(start) as second:
            systemd.until(f"MAINPID={second.pid}\n")
            assert first_bytes(point / "destination") == DATA[:100]
            monkeypatch.delenv("NOTIFY_SOCKET")
            stopped = subprocess.run(stop, capture_output=True, timeout=20, check=False)
            assert second.wait(timeout=20) == int(unit_line(unit, "SuccessExitStatus"))
        systemd.until("STOPPING=1")
    assert stopped.returncode == int(unit_line(unit, "SuccessExitStatus"))
    assert os.listdir(point) == []


def test_the_unit_does_not_start_again_what_cannot_be_meant(
    tmp_path: Path, point: Path, source: Path, destination: Path
) -> None:
    unit = "blockcopy-mount@.service"
    variables = {
        "SOURCE": str(source),
        "DESTINATION": str(destination),
        "MOUNTPOINT": str(point),
        "OPTIONS": "-o remount",
    }
    start = as_systemd_runs(unit_line(unit, "ExecStart"), variables)
    done = subprocess.run(start, capture_output=True, timeout=20, check=False)
    assert done.returncode == int(unit_line(unit, "RestartPreventExitStatus"))


def test_the_unit_of_a_sync(source: Path, destination: Path) -> None:
    variables = {"SOURCE": str(source), "DESTINATION": str(destination), "OPTIONS": "--verify --limit 1G"}
    start = as_systemd_runs(unit_line("blockcopy-sync@.service", "ExecStart"), variables)
    subprocess.run(start, timeout=20, check=True)
    assert destination.read_bytes() == DATA
