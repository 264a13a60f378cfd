"""Several connections for one copy, with real parts: when there are more, and what becomes of them.

Through tools/standins/link, whose window binds as that of an ssh channel does, and through a real sshd.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import BLOCK_SIZE, PYTHON, QUEUEING, STANDINS, Mount, Sshd, noise, run, succeeded, until, written

Mounter = Callable[..., Mount]

SIZE = 128 * BLOCK_SIZE
DATA = noise(SIZE)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path / "source", DATA)


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return written(tmp_path / "destination", bytes(SIZE))


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """Return the path of a file: while it exists, the link is cut."""
    return tmp_path / "cut"


@pytest.fixture
def narrow(cut: Path) -> str:
    """Return a remote shell with a round trip of 60 ms. Its window lets a connection carry 2 MB/s."""
    options = ["--delay", 30, "--window", "128K", "--cut-while", cut]
    return shlex.join(map(str, [PYTHON, STANDINS / "link", *options]))


def connections(mounted: Mount) -> int:
    """Return how many connections the mount has."""
    found = mounted.status()["link"]["connections"]
    assert isinstance(found, int)
    return found


def complete(mounted: Mount, destination: Path) -> None:
    """Wait for the end of the copy, which must be right."""
    mounted.wait()
    assert mounted.status()["link"]["connections"] == 0
    assert run("umount", mounted.point).returncode == 0
    assert destination.read_bytes() == DATA


@pytest.mark.long
def test_a_window_that_binds_gets_more_connections(
    mount: Mounter, source: Path, destination: Path, narrow: str
) -> None:
    mounted = mount(f"host:{source}", destination, "-e", narrow)
    until(lambda: connections(mounted) >= 3, "more connections")
    assert len(mounted.retrievers()) >= 3, "a process each"
    assert mounted.status()["link"]["round_trip_seconds"] >= 0.06
    complete(mounted, destination)


@pytest.mark.long
def test_a_cut_of_all_connections_is_seen_by_no_reader(
    mount: Mounter, source: Path, destination: Path, narrow: str, cut: Path
) -> None:
    mounted = mount(f"host:{source}", destination, "-e", narrow, "--connections", 4)
    until(lambda: connections(mounted) >= 5, "four connections beside the readers'")
    cut.touch()
    until(lambda: mounted.status()["state"] == "reconnecting", "the end of all")
    cut.unlink()
    assert mounted.file.read_bytes() == DATA
    complete(mounted, destination)


@pytest.mark.long
def test_extra_connections_that_are_killed_are_no_error(
    mount: Mounter, source: Path, destination: Path, narrow: str
) -> None:
    mounted = mount(f"host:{source}", destination, "-e", narrow, "--connections", 4)
    until(lambda: connections(mounted) >= 5, "four connections beside the readers'")
    for pid in sorted(mounted.retrievers())[2:]:
        os.kill(pid, 9)
    until(lambda: connections(mounted) < 5, "their end")
    status = mounted.status()
    assert (status["link"]["last_error"], status["link"]["reconnects"], status["error"]) == (None, 0, None)
    complete(mounted, destination)


@pytest.mark.long
def test_a_reader_in_order_gets_more_connections(mount: Mounter, tmp_path: Path) -> None:
    """The window is that of ssh: at a round trip of 200 ms, a channel carries 10 MB/s."""
    copies = 4
    source = written(tmp_path / "long", DATA * copies)
    destination = written(tmp_path / "destination", bytes(copies * SIZE))
    rsh = shlex.join([PYTHON, str(STANDINS / "link"), "--delay", "100", "--window", "2M"])
    mounted = mount(f"host:{source}", destination, "-e", rsh, "--no-background")
    most = 0
    with mounted.file.open("rb", buffering=0) as file:
        for _ in range(copies):
            for start in range(0, SIZE, BLOCK_SIZE):
                assert file.read(BLOCK_SIZE) == DATA[start : start + BLOCK_SIZE]
                most = max(most, connections(mounted))
            if most >= 3:
                return
    assert most >= 3


def test_the_original_program_keeps_one(mount: Mounter, source: Path, destination: Path, narrow: str) -> None:
    mounted = mount(f"host:{source}", destination, "-e", narrow, "--connections", 4, program=QUEUEING)
    before = mounted.status()["hydrated_bytes"]
    until(lambda: mounted.status()["hydrated_bytes"] > before + SIZE // 8, "some of the copy")
    assert connections(mounted) == 2, "one of the copy, and one of readers"


def test_one_connection_is_one(mount: Mounter, source: Path, destination: Path, narrow: str) -> None:
    mounted = mount(f"host:{source}", destination, "-e", narrow, "--connections", 1)
    until(lambda: mounted.status()["link"]["bottleneck"] == "link", "measurements")
    assert connections(mounted) == 2, "one of the copy, and one of readers"


@pytest.mark.parametrize("value", ["0", "-1", "many", "100", "1.5", ""])
def test_a_number_that_is_none_is_refused(source: Path, destination: Path, value: str) -> None:
    done = run("sync", f"--connections={value}", source, destination)
    assert done.returncode == 2
    assert b"auto" in done.stderr


@pytest.fixture
def strict_sshd(tmp_path: Path) -> Iterator[Sshd]:
    """Run an sshd that allows two sessions a login, and few logins at once."""
    folder = tmp_path / "sshd"
    folder.mkdir()
    with Sshd(folder, "MaxSessions 2", "MaxStartups 3:50:6") as sshd:
        yield sshd


@pytest.mark.parametrize("options", [(), ("--no-control-master",)], ids=["shared", "not shared"])
def test_refused_sessions_are_no_error(
    strict_sshd: Sshd, source: Path, destination: Path, options: tuple[str, ...]
) -> None:
    host = f"{strict_sshd.host}:{source}"
    done = run("sync", "-e", strict_sshd.rsh, "--python", PYTHON, "--connections", 6, *options, host, destination)
    succeeded(done, stdout=b"")
    assert destination.read_bytes() == DATA
