"""Files that root writes into folders of other users: planted links are not followed, FIFOs not waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import support
import trio
from support import failed, noise, run, written

from blockcopy.cli import console, log_sinks
from blockcopy.paths import safe_write
from blockcopy_fuse import mounting

DATA = noise(300_000)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = written(tmp_path / "secret", b"root's")
    path.chmod(0o600)
    return path


def untouched(secret: Path) -> bool:
    return secret.read_bytes() == b"root's" and secret.stat().st_mode & 0o777 == 0o600


def test_a_planted_link_is_replaced_and_its_target_stays(tmp_path: Path, source: Path, secret: Path) -> None:
    metrics = tmp_path / "metrics.prom"
    metrics.symlink_to(secret)
    assert run("sync", "--metrics", metrics, source, tmp_path / "copy").returncode == 0
    assert untouched(secret)
    assert not metrics.is_symlink()
    assert b"blockcopy_state" in metrics.read_bytes()
    assert metrics.stat().st_mode & 0o777 == 0o644
    assert {each.name for each in tmp_path.iterdir()} >= {"metrics.prom", "source", "secret", "copy"}
    assert not [each for each in tmp_path.iterdir() if each.name.endswith(".new")]


def test_the_temporary_name_cannot_be_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a link at a guessed name is not followed."""
    folder, secret = tmp_path / "folder", written(tmp_path / "secret", b"root's")
    folder.mkdir()
    monkeypatch.setattr(os, "urandom", lambda _: b"known")
    (folder / f".{b'known'.hex()}.new").symlink_to(secret)
    with pytest.raises(FileExistsError):
        safe_write.replace(str(folder / "file"), b"new", 0o644)
    assert secret.read_bytes() == b"root's"


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_fifo_or_device_is_neither_written_nor_waited_for(tmp_path: Path, source: Path, kind: str) -> None:
    path = "/dev/null" if kind == "device" else str(tmp_path / "fifo")
    if kind == "fifo":
        os.mkfifo(path)
    before = os.lstat(path)
    with pytest.raises(OSError, match="it is not a regular file"):
        safe_write.replace(path, b"new", 0o644)
    done = run("sync", "--log-file", path, source, tmp_path / "copy")
    failed(done, 1, b"it is not a regular file")
    assert os.path.samestat(os.lstat(path), before)


@pytest.mark.parametrize("plant", [os.symlink, os.link])
def test_a_log_is_not_written_through_a_planted_link(
    tmp_path: Path, source: Path, secret: Path, plant: Callable[[Path, Path], None]
) -> None:
    plant(secret, tmp_path / "log")
    done = run("sync", "--log-file", tmp_path / "log", source, tmp_path / "copy")
    failed(done, 1, b"cannot write --log-file")
    assert untouched(secret)


def test_a_rotated_log_is_recreated_but_not_through_a_link(
    tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Move the log as logrotate does. If no new file is possible, the log stays in the old one and says so."""
    said: list[str] = []
    monkeypatch.setattr(console, "say", said.append)
    path, moved, more = (tmp_path / name for name in ("log", "log.1", "log.2"))
    monkeypatch.setattr("faulthandler.enable", lambda fd, **_: os.close(fd))
    log_file = log_sinks._FileHandler(str(path))
    log_file._append(0, "one")
    path.rename(moved)
    log_file._append(0, "two")
    path.rename(more)
    path.symlink_to(secret)
    log_file._append(0, "three")
    log_file._append(0, "four")
    os.close(log_file._fd)
    assert (moved.read_text(), more.read_text()) == ("one\n", "two\nthree\nfour\n")
    assert untouched(secret)
    assert [line for line in said if "symbolic link" in line] == said
    assert len(said) == 1


def test_a_pid_file_is_written_safely(tmp_path: Path, secret: Path) -> None:
    pid_file = tmp_path / "pid"
    pid_file.symlink_to(secret)

    async def main() -> None:
        async with mounting._pid_file(str(pid_file)):
            assert pid_file.read_text() == f"{os.getpid()}\n"
            assert not pid_file.is_symlink()
        assert not pid_file.exists()
        async with mounting._pid_file(str(pid_file)):
            pid_file.unlink()
            pid_file.write_text("of another\n")

    trio.run(main)
    assert pid_file.read_text() == "of another\n"
    assert untouched(secret)


@pytest.mark.parametrize("absolute", [True, False])
def test_our_own_link_to_a_folder_is_followed(tmp_path: Path, absolute: bool) -> None:
    real = tmp_path / "real" / "inner"
    real.mkdir(parents=True)
    (tmp_path / "hop").symlink_to(tmp_path / "real" if absolute else "real")
    (tmp_path / "link").symlink_to("./hop//inner/")
    safe_write.replace(str(tmp_path / "link" / "file"), b"new", 0o600)
    assert (real / "file").read_bytes() == b"new"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=r"Too many|Not a directory"):
        safe_write.replace(str(tmp_path / "loop" / "file"), b"new", 0o600)


def test_another_users_link_to_a_folder_is_not_followed(tmp_path: Path) -> None:
    support.require_root()
    real = tmp_path / "real"
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to("real")
    os.chown(link, 65534, 65534, follow_symlinks=False)
    for write in (lambda path: safe_write.replace(path, b"new", 0o600), safe_write.open_log):
        with pytest.raises(OSError, match="another user"):
            write(str(link / "file"))
    assert not list(real.iterdir())
