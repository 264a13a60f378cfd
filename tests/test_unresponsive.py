"""Commands on mounts that are unresponsive, or belong to other users.

Every command comes to its end, with a status and words; no other user's word is believed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import threading
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import support
from rich.console import Console
from support import BLOCK_SIZE, PYTHON, Mount, noise, run, until, written

from blockcopy.errors import MountError
from blockcopy.paths import places
from blockcopy.replica.monitor import typed_json
from blockcopy.replica.monitor.status import LinkState, ReadStatus, State, Status, summary
from blockcopy_fuse import control_client, listing, mountinfo, probe, unmount
from blockcopy_fuse.mountinfo import Mount as MountEntry
from blockcopy_fuse.screen import screen

Mounter = Callable[..., Mount]

DATA = noise(8 * BLOCK_SIZE)


@pytest.fixture
def stopped(tmp_path: Path, mount: Mounter) -> Iterator[Mount]:
    """Return an unresponsive mount without a control socket, with a lookup in flight."""
    pid_file = tmp_path / "pid"
    mounted = mount(
        written(tmp_path / "source", DATA), tmp_path / "copy", "--no-background", "--pid-file", pid_file
    )
    entry, pid = mountinfo.mount_at(str(mounted.point)), int(pid_file.read_text())
    assert entry is not None
    Path("/run/blockcopy" if os.geteuid() == 0 else "", probe.socket_name(entry.device, pid)).unlink()
    os.kill(pid, signal.SIGSTOP)
    command = [PYTHON, "-I", "-S", "-c", "import sys; print(flush=True); open(sys.argv[1])"]
    looking = subprocess.Popen([*command, str(mounted.point / "status.json")], stdout=subprocess.PIPE)
    try:
        assert looking.stdout is not None
        looking.stdout.readline()
        until(lambda: state_of(looking.pid) in "SD", "the lookup")
        yield mounted
    finally:
        os.kill(pid, signal.SIGCONT)
        looking.communicate()


@pytest.mark.long
def test_whoever_asks_each_second_gathers_no_processes() -> None:
    def children() -> set[str]:  # zombies too
        return {pid for each in Path("/proc/self/task").glob("*/children") for pid in each.read_text().split()}

    before = children()
    for _ in range(50):
        probe.ForkedCall(lambda: bytes(signal.pause() or 0)).close()
    assert children() <= before


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_every_command_ends_where_a_mount_stands_still_and_another_lookup_is_in_flight(
    stopped: Mount, tmp_path: Path
) -> None:
    commands = [
        ["status", stopped.point],
        ["umount", stopped.point],
        ["pause", stopped.point],
        ["mount", tmp_path / "source", tmp_path / "other", stopped.point],
    ]
    running = [
        subprocess.Popen([*support.BLOCKCOPY, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for words in commands
    ]
    waiting = subprocess.Popen([*support.BLOCKCOPY, "wait", str(stopped.point)], stderr=subprocess.PIPE)
    [row] = [each for each in json.loads(run("list", "--json").stdout) if each["mountpoint"] == str(stopped.point)]
    assert row["error"] == "no answer within 1 s"
    for words, process in zip(commands, running, strict=True):
        said = process.communicate(timeout=support.PATIENCE)[1]
        assert (process.returncode, b"gave no answer within 5 s" in said) == (4, True), (words, said)
        if words[0] == "umount":
            assert b"fusermount3 -uz" in said
            assert b"/abort" in said
    assert waiting.stderr is not None
    assert b"waiting for it" in waiting.stderr.readline()
    waiting.terminate()
    waiting.communicate(timeout=support.PATIENCE)
    assert waiting.returncode == -signal.SIGTERM


# What another user says


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the control sockets of a user."""
    made = tmp_path / "run"
    made.mkdir(mode=0o700)
    monkeypatch.setattr(probe, "runtime_dir_candidates", lambda _: [made])
    return made


def folder_as_mount(tmp_path: Path) -> MountEntry:
    """Return a folder in place of a mount: only its content is read."""
    (tmp_path / "mnt").mkdir(exist_ok=True)
    return MountEntry(str(tmp_path / "mnt"), "0:4095", control_client.KIND, "source", os.geteuid())


@contextlib.contextmanager
def saying(path: Path, answer: bytes, *, without_end: bool = False) -> Iterator[None]:
    """Serve a control socket that answers the first request with `answer`."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection = listener.accept()[0]
                with connection:
                    connection.recv(4096)
                    connection.sendall(answer)
                    while without_end:
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            with socket.socket(socket.AF_UNIX) as last, contextlib.suppress(OSError):
                last.connect(str(path))  # where nobody asked
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


GOOD: dict[str, Any] = {"state": "hydrating", "size": 5, "source_needed": True}

BAD: dict[str, object] = {
    "nothing of it": {},
    "no object": [],
    "a number": 5,
    "deep": json.loads("[" * 900 + "]" * 900),
    "a state of a list": {**GOOD, "state": ["complete"]},
    "a negative size": {**GOOD, "size": -1},
    "a size beyond all": {**GOOD, "size": 1 << 70},
    "no number": {**GOOD, "hydrated_percent": float("nan")},
    "a time without end": {**GOOD, "eta_seconds": float("inf")},
    "a true rate": {**GOOD, "rate_bytes_per_s": True},
    "a text for a number": {**GOOD, "pid": "1"},
    "no link": {**GOOD, "link": 5},
    "half a character": {**GOOD, "error": "\ud800"},
    "a demand of texts": {**GOOD, "demand": {"reads": "many"}},
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("way", ["socket", "file"])
def test_what_is_no_status_is_one_bad_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    told = folder_as_mount(tmp_path)
    text = json.dumps(BAD[name] if way == "file" else {"ok": True, "status": BAD[name]}).encode()
    monkeypatch.setattr(mountinfo, "mounts", lambda: [told])
    with saying(folder / "0:4095-1.sock", text) if way == "socket" else contextlib.nullcontext():
        written(Path(told.mountpoint, "status.json"), text)
        [row] = listing.replicas()
    assert "sent an invalid reply" in row.error
    assert listing.table([row])


@pytest.mark.parametrize("way", ["socket", "file"])
def test_a_flood_is_cut_off(folder: Path, tmp_path: Path, way: str) -> None:
    told = folder_as_mount(tmp_path)
    flood = b" " * (1 << 20)
    with saying(folder / "0:4095-1.sock", flood, without_end=True) if way == "socket" else contextlib.nullcontext():
        written(Path(told.mountpoint, "status.json"), flood + b" ")
        with (
            contextlib.closing(control_client.StatusRequest(told)) as request,
            pytest.raises(MountError, match="more than"),
        ):
            request.status(10)


def test_what_is_not_told_has_a_default_and_can_be_shown(tmp_path: Path, folder: Path) -> None:
    told = folder_as_mount(tmp_path)
    written(Path(told.mountpoint, "status.json"), json.dumps(GOOD).encode())
    with contextlib.closing(control_client.StatusRequest(told)) as request:
        status = request.status(10)
    assert status == Status(state=State.HYDRATING, size=5, source_needed=True, pid=status.pid)
    assert listing.table([listing.ListedMount(told, status)])


@pytest.mark.parametrize("numbers", [0, 1 << 62])
def test_any_field_of_a_status_can_be_missing_beside_others_that_are_told(tmp_path: Path, numbers: int) -> None:
    mounted = folder_as_mount(tmp_path)
    counts = [name for name, hint in typing.get_type_hints(Status).items() if hint in (int, int | None)]
    demand = dict.fromkeys([field.name for field in dataclasses.fields(ReadStatus)], numbers)
    full = {**GOOD, **dict.fromkeys(counts, 1 << 62), "size": numbers, "demand": demand}
    missing = [{name: value for name, value in full.items() if name != each} for each in counts if each != "size"]
    missing += [{**full, "demand": {name: demand[name] for name in demand if name != each}} for each in demand]
    for status in (typed_json.parse(Status, each) for each in missing):
        assert summary(status)
        assert listing.table([listing.ListedMount(mounted, status)])
        Console(file=io.StringIO()).print(screen(status, []))


def test_a_newer_mount_may_tell_more() -> None:
    newer = {**GOOD, "state": "resting", "link": {"state": "sleeping", "colour": 5}, "moon": {"phase": [1]}}
    status = typed_json.parse(Status, newer)
    assert (status.state, status.link.state) == (State.UNKNOWN, LinkState.UNKNOWN)
    assert status.as_dict().keys() == {field.name for field in dataclasses.fields(Status)}
    Console(file=io.StringIO()).print(screen(status, []))


@pytest.mark.parametrize(("owner", "bound"), [(0, "SYNC_SECONDS"), (65534, "_UNTRUSTED_SYNC_SECONDS")])
def test_a_mount_that_never_comes_to_rest_is_unmounted_all_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: int, bound: str
) -> None:
    """Another user's is waited for by seconds, and ours by minutes."""
    told = folder_as_mount(tmp_path)._replace(owner=owner or os.geteuid())
    monkeypatch.setattr(unmount, bound, 0.01)
    monkeypatch.setattr(unmount, "_unmount", lambda *_: None)
    monkeypatch.setattr(control_client, "find_mount", lambda _: told)
    restless = {**GOOD, "hydrated_bytes": 5, "pid": 0}
    written(Path(told.mountpoint, "status.json"), json.dumps(restless).encode())
    status = unmount.umount(told.mountpoint)
    assert status is not None
    assert status.state is State.HYDRATING


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_a_status_file_is_a_regular_file_or_none(folder: Path, tmp_path: Path, kind: str) -> None:
    """Another user may plant a link to what only root can read, or a FIFO that keeps the reader waiting."""
    told = folder_as_mount(tmp_path)
    status = Path(told.mountpoint, "status.json")
    if kind == "link":
        status.symlink_to(written(tmp_path / "secret", json.dumps(GOOD).encode()))
    elif kind == "fifo":
        os.mkfifo(status)
    else:
        status.mkdir()
    with (
        contextlib.closing(control_client.StatusRequest(told)) as request,
        pytest.raises(MountError, match=r"status\.json is no status file"),
    ):
        request.status(10)


def test_a_name_of_any_characters_hides_no_other_mount(tmp_path: Path) -> None:
    """A name with a carriage return is one line of mountinfo, as the kernel writes it."""
    support.require_root()
    point = tmp_path / "a\rb \\- \x85"
    point.mkdir()
    support.output("mount", "-t", "tmpfs", "c\rd\x0b", point)
    try:
        entry = mountinfo.mount_at(str(point))
        assert entry is not None
        assert (entry.kind, entry.source) == ("tmpfs", "c\rd\x0b")
        assert not places.holds_devices(str(point))
    finally:
        support.output("umount", point)


def test_a_status_survives_json(mount: Mounter, tmp_path: Path) -> None:
    status = mount(written(tmp_path / "source", DATA), tmp_path / "copy").status()
    assert json.loads(typed_json.parse(Status, status).as_json()) == status


OF_ANOTHER = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o777)
os.setuid(65534)
listener.listen()
print(flush=True)
connection = listener.accept()[0]
print(connection.recv(100), flush=True)
"""


def test_a_socket_of_another_user_is_told_nothing(folder: Path, tmp_path: Path) -> None:
    support.require_root()
    told = folder_as_mount(tmp_path)
    command = [PYTHON, "-I", "-S", "-c", OF_ANOTHER, str(folder / "0:4095-1.sock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with contextlib.closing(control_client.StatusRequest(told)) as request, pytest.raises(MountError):
            request.status(10)
        assert other.stdout.readline() == b"b''\n"


@pytest.mark.parametrize("name", ["pause", "resume", "limit"])
def test_a_mount_that_tells_its_status_and_does_nothing_keeps_no_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    told = folder_as_mount(tmp_path)
    monkeypatch.setattr(control_client, "find_mount", lambda _: told)
    monkeypatch.setattr(control_client, "status_of", lambda _: typed_json.parse(Status, GOOD))
    monkeypatch.setattr(control_client, "ANSWER_SECONDS", 0.01)
    monkeypatch.setattr(control_client, "SYNC_SECONDS", 0.01)
    monkeypatch.setattr(
        control_client.MountRequest, "reply", lambda _, seconds: threading.Event().wait(seconds) or None
    )
    with pytest.raises(MountError, match="did not finish"):
        control_client.command(told.mountpoint, {"command": name})


def test_a_process_that_a_mount_names_is_never_signalled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = folder_as_mount(tmp_path)
    monkeypatch.setattr(unmount, "_OWN_END_SECONDS", 0.01)
    monkeypatch.setattr(unmount, "SYNC_SECONDS", 0.01)
    monkeypatch.setattr(unmount, "_unmount", lambda *_: None)
    monkeypatch.setattr(control_client, "find_mount", lambda _: told)
    with subprocess.Popen(["sleep", "100"]) as innocent:
        status = {**GOOD, "pid": innocent.pid, "state": "paused"}
        written(Path(told.mountpoint, "status.json"), json.dumps(status).encode())
        with pytest.raises(MountError, match="has not ended"):
            unmount.umount(told.mountpoint)
        told = told._replace(owner=65534)  # then it is not that user's at all, and nobody waits for it
        monkeypatch.setattr(unmount, "_OWN_END_SECONDS", 100)
        unmount.umount(told.mountpoint)
        assert innocent.poll() is None
        innocent.kill()
