"""The paths that a mount uses while it serves: those that it would hide, and those that give no answer.

The event loop touches none of them: what hangs is a thread that is left behind, or a child.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import support
import trio
from support import BLOCK_SIZE, Mount, failed, noise, output, run, until, written

from blockcopy.block.geometry import Geometry
from blockcopy.errors import StateError
from blockcopy.replica.hydration import committer
from blockcopy.replica.source.process import Process
from blockcopy.replica.state.blockmap import BlockMap
from blockcopy.replica.tasks import abandonable

DATA = noise(8 * BLOCK_SIZE)

STAYS_HERE = b'#!/bin/sh\nshift\nexec sh -c "exec $*"\n'
"""A remote shell."""


@pytest.fixture
def point(tmp_path: Path) -> Path:
    support.require_fuse()
    folder = tmp_path / "mnt"
    folder.mkdir()
    return folder


@contextlib.contextmanager
def mounted(*arguments: object) -> Iterator[Mount]:
    made = Mount(*arguments)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.clear()


def read(file: Path) -> bytes:
    """Read it all, by a process that can be left if no answer comes."""
    return subprocess.run(["cat", file], capture_output=True, timeout=support.PATIENCE, check=True).stdout


# Hidden by the mount


def test_a_mountpoint_that_is_first_in_path_is_not_searched_for_a_program(
    point: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    written(programs / "here", STAYS_HERE).chmod(0o755)
    monkeypatch.setenv("PATH", f"{point}:{programs}:{os.environ['PATH']}")
    with mounted(point, f"host:{source}", tmp_path / "copy", "--no-background", "-e", "here") as made:
        for pid in made.retrievers():
            os.kill(pid, signal.SIGKILL)
        assert read(made.file) == DATA
        assert made.status()["link"]["reconnects"]


HIDDEN: dict[str, Callable[[Path], list[object]]] = {
    "pid file": lambda point: ["--pid-file", point / "pid"],
    "metrics file": lambda point: ["--metrics", point / "metrics"],
    "log file": lambda point: ["--log-file", point / "log"],
    "state file": lambda point: ["--state", point / "state"],
    "program": lambda point: ["-e", written(point / "rsh", STAYS_HERE)],
}


@pytest.mark.parametrize("what", HIDDEN)
def test_a_path_that_the_mount_would_hide_is_refused(point: Path, source: Path, tmp_path: Path, what: str) -> None:
    options = HIDDEN[what](point)
    for path in point.iterdir():
        path.chmod(0o755)
    done = run("mount", *options, f"host:{source}", tmp_path / "copy", point)
    failed(done, 2, f"would hide the {what} {point}/")
    assert not (tmp_path / "copy").exists()


def test_a_folder_that_the_mount_would_hide_is_refused(point: Path, source: Path, tmp_path: Path) -> None:
    for options in ({"cwd": point}, {"env": {**os.environ, "PYTHONPATH": str(point)}}):
        done = run("mount", source, tmp_path / "copy", point, **options)
        failed(done, 2, b"would hide the folder")


# That give no answer


def test_a_disk_that_gives_no_answer_does_not_keep_a_mount_from_its_end(
    point: Path, source: Path, tmp_path: Path, loop_device: Callable[[Path], str]
) -> None:
    (tmp_path / "image").touch()
    os.truncate(tmp_path / "image", 64 << 20)
    disk = tmp_path / "disk"
    files = ["--log-file", disk / "log", "--metrics", disk / "metrics", "--pid-file", disk / "pid"]
    with support.mounted(loop_device(tmp_path / "image"), disk):
        with mounted(point, source, tmp_path / "copy", "--no-background", *files) as made:
            pid = made.status()["pid"]
            output("fsfreeze", "--freeze", disk)
            try:
                os.kill(made.retrievers()[0], signal.SIGKILL)  # which is logged
                assert read(made.file) == DATA
                os.kill(pid, signal.SIGTERM)
                until(lambda: str(point) not in support.fuse_mounts(), "the unmount")
                until(lambda: not support.alive(pid), "the end")
            finally:
                output("fsfreeze", "--unfreeze", disk)
        until(lambda: not Path(f"/proc/{pid}").exists(), "the end of its threads")


def test_a_killed_process_whose_disk_gives_no_answer_is_left_behind(
    tmp_path: Path,
    loop_device: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(abandonable, "EXIT_SECONDS", 0.05)
    (tmp_path / "image").touch()
    os.truncate(tmp_path / "image", 64 << 20)
    disk, pipe = tmp_path / "disk", subprocess.PIPE
    with support.mounted(loop_device(tmp_path / "image"), disk):
        output("fsfreeze", "--freeze", disk)
        try:
            writer = subprocess.Popen(["touch", disk / "new"], bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe)
            stat = Path(f"/proc/{writer.pid}/stat")
            until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "D", "a call that cannot be ended")

            async def main() -> None:
                with trio.fail_after(5):
                    await Process(writer).aclose()

            trio.run(main)
            assert "it is left behind" in caplog.text
        finally:
            output("fsfreeze", "--unfreeze", disk)
        until(lambda: not stat.exists(), "its end")  # and it is reaped


class StuckJournal:
    """A state file whose disk gives no answer until `answer` is set."""

    path = Path("state")
    is_stuck = False

    def __init__(self) -> None:
        self.answer = threading.Event()
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*_: object) -> None:
            self.calls.append(name)
            self.answer.wait()

        return call


def stuck_keeper(
    monkeypatch: pytest.MonkeyPatch, **parts: Any
) -> tuple[committer.Committer, StuckJournal, BlockMap]:
    monkeypatch.setattr(committer, "_ANSWER_SECONDS", 0.05)
    journal, blockmap = StuckJournal(), BlockMap(Geometry(len(DATA)))

    async def sync(run: Any = None, *, times: bool = True) -> bool:
        return False

    device: Any = SimpleNamespace(is_block_device=True)
    hydrator: Any = SimpleNamespace(sync=sync, device=device, blockmap=blockmap, **parts)
    return committer.Committer(journal, hydrator), journal, blockmap  # type: ignore[arg-type]


def test_a_state_file_that_gives_no_answer_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, journal, blockmap = stuck_keeper(monkeypatch)

    async def main() -> None:
        blockmap.mark(range(3), "fetched")
        with trio.fail_after(5), caplog.at_level(logging.WARNING):
            await made.commit()
            await made.close()

    try:
        trio.run(main)
    finally:
        journal.answer.set()
    assert journal.calls == ["write_changes"]  # nobody else enters meanwhile
    assert journal.is_stuck
    assert "cannot record in the state file state: Connection timed out" in caplog.text
    assert blockmap.take_changes().chunks  # to be told again


def test_a_lease_that_comes_after_the_end_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was to be recorded before, and its thread came late."""
    made, journal, _ = stuck_keeper(monkeypatch, writer=SimpleNamespace(failure=None))
    journal.answer.set()
    late = journal.write_times

    async def main() -> None:
        await made.close()
        assert await made._write(late)

    trio.run(main)
    assert journal.calls[-1] == "close"
    assert caplog.text == ""


def test_a_record_that_cannot_be_removed_for_a_dead_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made, journal, _ = stuck_keeper(monkeypatch, forget=lambda: None)
    try:
        with pytest.raises(StateError, match="is out of date and cannot be removed"):
            trio.run(made.forget)
    finally:
        journal.answer.set()


def test_a_process_that_comes_to_be_too_late_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abandonable, "EXIT_SECONDS", 0.05)
    may_begin, begun = threading.Event(), []

    def begin() -> subprocess.Popen[bytes]:
        may_begin.wait()
        begun.append(subprocess.Popen(["sleep", "100"], stdout=subprocess.PIPE))
        return begun[0]

    async def main() -> None:
        with trio.move_on_after(0.05) as scope:
            await abandonable.start_process(begin)
        assert scope.cancelled_caught

    trio.run(main)
    may_begin.set()
    until(lambda: begun and begun[0].returncode == -signal.SIGKILL, "the kill")
