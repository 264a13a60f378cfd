"""Survival of a power loss, on a real file system: the tests copy the image of its disk at that moment."""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
from support import BLOCK_SIZE, BLOCKCOPY, noise, run, succeeded, until, written

from blockcopy.block.claim import open_destination
from blockcopy.block.device import open_source
from blockcopy.block.records import default_path
from blockcopy.paths import durable
from blockcopy.replica.state.blockmap import Changes
from blockcopy.replica.state.statefile import Binding, StateFile, WriteTimes

CHECKOUT = Path(__file__).resolve().parent.parent

DATA = noise(8 * BLOCK_SIZE)
OTHER = noise(8 * BLOCK_SIZE, seed=2)


class Disk:
    """An ext4 file system that writes nothing by itself. `after_power_loss` mounts what its disk has now."""

    def __init__(self, folder: Path) -> None:
        self._image, self._copy = folder / "image", folder / "copy"
        self.point, self._second = folder / "disk", folder / "after"
        self.point.mkdir()
        self._second.mkdir()
        self._image.touch()
        os.truncate(self._image, 32 << 20)
        support.output("mkfs.ext4", "-q", "-F", self._image)

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        support.output("mount", "-o", "loop,commit=300", self._image, self.point)
        try:
            yield
        finally:
            support.output("umount", self.point)

    @contextlib.contextmanager
    def after_power_loss(self) -> Iterator[Path]:
        shutil.copyfile(self._image, self._copy)
        support.output("mount", "-o", "loop", self._copy, self._second)
        try:
            yield self._second
        finally:
            support.output("umount", self._second)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    support.require_root()
    made = Disk(tmp_path)
    with made.mounted():
        yield made


def names(folder: Path) -> set[str]:
    return {each.name for each in folder.rglob("*")} - {"lost+found"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: durable.create(folder / "new"), {"old", "new"}),
        (lambda folder: durable.make_folder(folder / "a/b/c"), {"old", "a", "b", "c"}),
        (lambda folder: durable.rename(folder / "old", folder / "new"), {"new"}),
        (lambda folder: durable.remove(folder / "old"), set()),
        (lambda folder: ((folder / "old").unlink(), durable.remove(folder / "old")), set()),
        (lambda folder: durable.write(folder / "new", "text"), {"old", "new"}),
    ],
    ids=["create", "make_folder", "rename", "remove", "remove what is missing", "write"],
)
def test_name_changes_are_on_the_disk(change: Callable[[Path], object], expected: set[str], disk: Disk) -> None:
    written(disk.point / "old", b"1")
    os.sync()
    change(disk.point)
    with disk.after_power_loss() as folder:
        assert names(folder) == expected
        assert not (folder / "new").exists() or (folder / "new").read_text() in ("", "1", "text")


def test_remove_accepts_a_missing_file(disk: Disk) -> None:
    support.output("mount", "-o", "remount,ro", disk.point)
    for missing in ("name", "folder/name"):
        durable.remove(disk.point / missing)
    durable.remove(Path("/proc/none/name"))
    durable.remove(Path("/dev/null/name"))


def save(source: Path, destination: Path) -> None:
    blocks = run("retrieve", source, input=run("checksum", destination).stdout)
    assert run("save", destination, input=blocks.stdout).returncode == 0


@pytest.mark.parametrize("kept", ["default", "elsewhere"])
def test_a_record_that_save_invalidated_does_not_come_back(
    kept: str, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk of the state lost power, and the disk of the destination is as `save` left it."""
    source, destination = written(tmp_path / "source", DATA), written(tmp_path / "destination", OTHER)
    monkeypatch.setenv("STATE_DIRECTORY", str(disk.point))
    options = ["--state", tmp_path / "state"] if kept == "elsewhere" else []
    assert run("sync", *options, source, destination).returncode == 0
    os.sync()
    save(written(tmp_path / "other", OTHER), destination)
    if options:  # else the times of the file would show it
        with open_source(str(destination)) as device, contextlib.closing(StateFile(tmp_path / "state")) as journal:
            status = device.status()
            journal.write_times(WriteTimes(status.st_mtime_ns, status.st_ctime_ns, None))
    with disk.after_power_loss() as folder:
        assert names(folder) == set()
        monkeypatch.setenv("STATE_DIRECTORY", str(folder))
        assert run("sync", *options, source, destination).returncode == 0
    assert destination.read_bytes() == DATA


@pytest.mark.parametrize("is_new", [True, False])
def test_the_name_of_a_destination_is_durable_before_it_is_written(
    is_new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only some file systems write the name of a file to the disk when the file is synced."""
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync_folder", synced.append)
    (tmp_path / "link").symlink_to("folder/file")
    (tmp_path / "folder").mkdir()
    if not is_new:
        written(tmp_path / "folder/file", b"made just now")
    open_destination(str(tmp_path / "link"), create=is_new).close()
    assert synced == [tmp_path / "folder"]


def test_after_a_power_loss_the_record_of_a_file_is_believed(disk: Disk, tmp_path: Path) -> None:
    """The recorded times are not later than the times on the disk, and nobody else has written."""
    source, destination = written(tmp_path / "source", DATA), written(disk.point / "destination", OTHER)
    os.sync()
    with open_source(str(destination)) as device:
        state = default_path(device)
    command = [*BLOCKCOPY, "sync", "--limit", "200K", str(source), str(destination)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        seen: set[int] = set()

        def records() -> int:
            with contextlib.suppress(FileNotFoundError):
                seen.add(Path(f"{state}-wal").stat().st_mtime_ns)
            return len(seen)

        def has_blocks() -> bool:
            """Return True if a commit of blocks is over: the file and its log have a row of them."""
            copy = Path(tempfile.mkdtemp(dir=tmp_path)) / "state"  # nothing of an earlier look beside it
            for kind in ("", "-wal"):
                with contextlib.suppress(FileNotFoundError):  # there is no log yet
                    shutil.copy(f"{state}{kind}", f"{copy}{kind}")
            with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(copy)) as base:
                [count] = base.execute("SELECT count(*) FROM chunks").fetchone()
                return count > 0  # type: ignore[no-any-return]
            return False

        until(lambda: records() > 2 and has_blocks(), "some commits")
        process.kill()
    with contextlib.closing(StateFile(state)) as journal:
        assert journal.record
        assert journal.record.rows.chunks
    with disk.after_power_loss() as folder:
        done = run("sync", source, folder / "destination")
        succeeded(done)
        assert (folder / "destination").read_bytes() == DATA


def test_a_commit_is_not_rolled_back(disk: Disk, tmp_path: Path) -> None:
    """A commit is on the disk when it returns, and no journal beside the file rolls it back."""
    identity = {"size": 0, "sample": []}
    with contextlib.closing(StateFile(disk.point / "state")) as journal:
        journal.begin_record(Binding(identity, {"file": 1}, 0, BLOCK_SIZE), WriteTimes(1, 1, None))
        journal.write_changes(Changes({0: b"\xff" * 100}, {}, {}), WriteTimes(1, 1, None))
    os.sync()
    with contextlib.closing(StateFile(disk.point / "state")) as journal:
        journal.clear()
        with disk.after_power_loss() as folder, contextlib.closing(StateFile(folder / "state")) as found:
            assert found.record
            assert found.record.rows.chunks == {}
    with disk.after_power_loss() as folder, contextlib.closing(StateFile(folder / "state")) as found:
        assert found.record
        assert found.record.rows.chunks == {}


def test_the_default_folder_of_state_files_is_durable(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = written(tmp_path / "source", DATA), written(tmp_path / "destination", OTHER)
    monkeypatch.setenv("STATE_DIRECTORY", str(disk.point / "var/lib"))
    assert run("sync", source, destination).returncode == 0
    with open_source(str(destination)) as device, disk.after_power_loss() as folder:
        assert (folder / "var/lib" / default_path(device).name).exists()


NO_PROMISE = {
    "blockcopy/paths/durable.py": "is where it is done",
    "blockcopy/paths/runtime_dir.py": "sockets: gone with the machine's run",
    "blockcopy/paths/safe_write.py": "--metrics, --pid-file, --log-file: of a process that runs",
    "fuse/blockcopy_fuse/control_server.py": "sockets",
    "fuse/blockcopy_fuse/manual/pages.py": "manual pages: made again by the same command",
    "blockcopy/block/claim.py": "a destination: its name is made durable by `_sync_name`",
}


CHANGES = {"unlink", "rename", "mkdir", "makedirs", "rmdir", "symlink_to", "hardlink_to"}


def changes_a_name(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "O_CREAT"
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    called = ast.unparse(node.func)
    replaces = node.func.attr == "replace" and len(node.args) == 1 and not node.keywords  # a path, and no text
    return not called.startswith("durable.") and (
        node.func.attr in CHANGES or replaces or called in ("os.replace", "os.remove")
    )


def test_only_durable_changes_names_that_matter() -> None:
    """The list has every other place that creates, removes or renames a file, with the reason why it may."""
    found = {
        str(path.relative_to(CHECKOUT))
        for root in ("blockcopy", "fuse/blockcopy_fuse")
        for path in sorted((CHECKOUT / root).rglob("*.py"))
        if any(map(changes_a_name, ast.walk(ast.parse(path.read_text()))))
    }
    assert found - NO_PROMISE.keys() == set()
