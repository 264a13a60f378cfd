"""Destinations that other programs remove, replace, truncate or write: never exit status 0, never zeros."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import support
import trio
from support import (
    BLOCK_SIZE,
    BLOCKCOPY,
    PATIENCE,
    PYTHON,
    STANDINS,
    Mount,
    failed,
    noise,
    output,
    run,
    until,
    written,
)

from blockcopy.block.claim import make_room, open_destination
from blockcopy.errors import DestinationLostError
from blockcopy.protocol import wire
from blockcopy.replica import replica
from blockcopy.replica.engine import open_replica
from blockcopy.transport.command import stage_command
from blockcopy.transport.location import Location

_COARSE_CLOCK = 5  # CLOCK_REALTIME_COARSE of linux/time.h, which times of files are taken from

SIZE = 64 * BLOCK_SIZE
DATA = noise(SIZE)
OLD = bytes(SIZE)


# Changes by other programs


def remove(path: Path) -> None:
    path.unlink()


def move(path: Path) -> None:
    path.rename(path.with_name("moved"))


def replace(path: Path) -> None:
    written(path.with_name("other"), DATA).rename(path)


def cut(path: Path) -> None:
    os.truncate(path, BLOCK_SIZE)


def regrow(path: Path) -> None:
    os.truncate(path, 0)
    os.truncate(path, SIZE)


def write(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(2 * BLOCK_SIZE)
        file.write(b"not ours")


MOVED = {remove: "was removed", move: "was removed", replace: "was replaced"}
CHANGED = {
    cut: "was truncated",
    regrow: "was written by another program",
    write: "was written by another program",
}
ALL = {**MOVED, **CHANGED}
SOME = {act: ALL[act] for act in (remove, replace, regrow)}
CUT, REGROWN, WRITTEN = ({act: text} for act, text in CHANGED.items())
"""Changes for tests that start commands: the tests of `Destination` alone try all of them."""

Act = Callable[[Path], None]


def each(acts: dict[Act, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("act", "told"), acts.items(), ids=[act.__name__ for act in acts])


def let_time_pass(path: Path) -> None:
    """Wait for the next tick of the file system's clock. Before Linux 6.13, all changes in a tick have one time."""
    until(lambda: time.clock_gettime_ns(_COARSE_CLOCK) > path.stat().st_mtime_ns, "a tick")


# Destination alone


@each(CHANGED)
@pytest.mark.parametrize("use", ["read", "read_cached", "write", "write_zeros", "sync", "check_in_place"])
def test_every_use_after_a_foreign_change_fails(destination: Path, act: Act, told: str, use: str) -> None:
    uses: dict[str, Callable[[], object]] = {
        "read": lambda: opened.read(0, 100),
        "read_cached": lambda: opened.read_cached(0, 100),
        "write": lambda: opened.write(40 * BLOCK_SIZE, b"ours"),
        "write_zeros": lambda: opened.write_zeros(40 * BLOCK_SIZE, BLOCK_SIZE, sparse=True),
        "sync": lambda: opened.sync(),
        "check_in_place": lambda: opened.check_in_place(),
    }
    with open_destination(str(destination)) as opened:
        if use == "read_cached" and opened.read_cached(0, 100) is None:
            pytest.skip("this file system does not tell what is in the cache")
        opened.write(0, b"ours")
        opened.check()
        before = destination.stat().st_size
        let_time_pass(destination)
        act(destination)
        size = destination.stat().st_size
        for _ in range(2):
            with pytest.raises(DestinationLostError, match=f"{destination} {told}"):
                uses[use]()
        assert destination.stat().st_size == size <= before  # a later write does not hide the truncation


@each(MOVED)
def test_check_in_place_notices_another_file_at_the_path(destination: Path, act: Act, told: str) -> None:
    with open_destination(str(destination)) as opened:
        opened.check_in_place()
        act(destination)
        with pytest.raises(DestinationLostError, match=f"{destination} {told}"):
            opened.check_in_place()


def test_our_own_writes_are_no_foreign_change(destination: Path) -> None:
    with open_destination(str(destination)) as opened:
        make_room(opened, 2 * SIZE)
        for position in range(0, 2 * SIZE, BLOCK_SIZE):
            opened.write(position, DATA[:BLOCK_SIZE])
            opened.write_zeros(position, 4096, sparse=True)
        opened.sync()
        opened.drop_cache()
        os.chmod(destination, 0o640)
        (destination.parent / "link").hardlink_to(destination)
        assert opened.read(2 * SIZE - 4, 4) == DATA[BLOCK_SIZE - 4 : BLOCK_SIZE]
        opened.check_in_place()


def test_an_unneeded_tail_may_be_truncated(destination: Path) -> None:
    """If no time shows it: for a device, or over a network."""
    with open_destination(str(destination)) as opened:
        opened._has_exact_times = False
        make_room(opened, SIZE - BLOCK_SIZE)
        os.truncate(destination, SIZE - BLOCK_SIZE)
        opened.sync()
        os.truncate(destination, SIZE - BLOCK_SIZE - 1)
        with pytest.raises(
            DestinationLostError, match=f"it has {SIZE - BLOCK_SIZE - 1} bytes of {SIZE - BLOCK_SIZE}"
        ):
            opened.sync()


def test_a_shrunken_device_is_noticed(
    tmp_path: Path, destination: Path, loop_device: Callable[[Path], str]
) -> None:
    device = loop_device(destination)
    with open_destination(device) as opened:
        make_room(opened, SIZE)
        os.truncate(destination, SIZE // 2)
        output("losetup", "-c", device)
        with pytest.raises(DestinationLostError, match=f"{device} was truncated .* {SIZE // 2} bytes of {SIZE}"):
            opened.sync()


def test_a_removed_device_node_is_noticed(
    tmp_path: Path, destination: Path, loop_device: Callable[[Path], str]
) -> None:
    node = tmp_path / "node"
    os.mknod(node, 0o60600, os.stat(loop_device(destination)).st_rdev)
    with open_destination(str(node)) as opened:
        opened.check_in_place()
        node.unlink()
        with pytest.raises(DestinationLostError, match=f"{node} was removed"):
            opened.check_in_place()


def test_a_truncation_during_a_write_is_noticed(destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite

    def cutting(*args: Any) -> int:
        os.truncate(destination, 0)
        return pwrite(*args)

    with open_destination(str(destination)) as opened:
        monkeypatch.setattr(os, "pwrite", cutting)
        with pytest.raises(DestinationLostError, match="was truncated"):
            opened.write(40 * BLOCK_SIZE, DATA[:BLOCK_SIZE])


# In the replica


@each(MOVED)
@pytest.mark.parametrize("looked_at", ["each second", "in the end"])
def test_a_replica_is_not_complete_if_its_destination_was_moved(
    monkeypatch: pytest.MonkeyPatch, source: Path, destination: Path, act: Act, told: str, looked_at: str
) -> None:
    at_the_end = looked_at == "in the end"
    monkeypatch.setattr(replica, "_WATCH_SECONDS", 1000 if at_the_end else 0.01)
    command = stage_command(Location(None, str(source)))

    async def scenario() -> None:
        async with open_replica(replica.Plan(command, str(destination), hydrate=at_the_end)) as made:
            act(destination)
            with trio.fail_after(PATIENCE), pytest.raises(DestinationLostError, match=f"{destination} {told}"):
                await made.wait_complete()
            assert made.state == "failed"
            assert await made.volume.read(0, SIZE) == DATA  # what is here, and what the source has, is still right

    trio.run(scenario)


# In the commands


@contextmanager
def under_way(*command: object) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [*BLOCKCOPY, *map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        yield process


def has_begun(path: Path) -> None:
    until(lambda: path.read_bytes()[:BLOCK_SIZE] == DATA[:BLOCK_SIZE], "the first block")
    let_time_pass(path)


@each(SOME)
def test_sync_fails_after_a_foreign_change(
    tmp_path: Path, source: Path, destination: Path, act: Act, told: str
) -> None:
    mark, state = tmp_path / "complete", tmp_path / "state"
    options = ("--limit", "2M", "--state", state, "--on-complete", f"touch {mark}")
    with under_way("sync", *options, source, destination) as process:
        has_begun(destination)
        act(destination)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"ERROR (sync): {destination} {told}" in said.decode()
    assert not mark.exists()
    if act is not replace:  # by a file that is the copy
        assert not destination.exists() or destination.read_bytes() != DATA
    assert run("sync", "--state", state, source, destination).returncode == 0
    assert destination.read_bytes() == DATA


@pytest.mark.parametrize(
    ("act", "command"),
    [*zip(ALL, cycle(["save", "receive"]), strict=False)],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_stages_that_write_fail_after_a_foreign_change(
    source: Path, destination: Path, act: Act, command: str
) -> None:
    with under_way(command, destination) as process:
        assert process.stdin is not None
        hello = wire.encode(wire.Hello(_facts(source)))
        process.stdin.write((hello if command == "receive" else b"") + wire.encode(wire.Data(0, DATA[:BLOCK_SIZE])))
        process.stdin.flush()
        has_begun(destination)
        act(destination)
        rest = [wire.Data(at, DATA[at : at + BLOCK_SIZE]) for at in range(BLOCK_SIZE, SIZE, BLOCK_SIZE)]
        closing = wire.encode(wire.Fence(1)) + hello if command == "receive" else b""
        _, said = process.communicate(b"".join(map(wire.encode, rest)) + closing + wire.encode(wire.Done()), 60)
    if command == "receive" and process.returncode == -signal.SIGBUS:
        return  # it viewed the page cache in the very moment of the change: see `Device.view`
    assert process.returncode == 1
    assert f"{destination} {ALL[act]}" in said.decode() or "it is shorter than it was" in said.decode()


def _facts(source: Path) -> dict[str, object]:
    from blockcopy.block import identity
    from blockcopy.block.device import open_source

    with open_source(str(source)) as device:
        return {"digest": "sha256", "identity": identity.source_identity(device)}


@each(WRITTEN)
def test_a_complete_mount_reads_only_bytes_of_the_source(
    mount: Callable[..., Mount], source: Path, destination: Path, act: Act, told: str
) -> None:
    """This concerns bytes that are not yet in the page cache of the mount."""
    mounted = mount(source, destination, wait=True)
    let_time_pass(destination)
    act(destination)
    _reads_nothing_wrong(mounted)
    status = mounted.status()
    assert (status["state"], told in status["error"], status["source_needed"]) == ("failed", True, True)
    failed(run("umount", mounted.point), 75)
    again = mount(source, destination, wait=True)
    assert again.file.read_bytes() == DATA
    again.umount()


@each(CUT)
def test_a_complete_mount_fails_after_a_foreign_change(
    mount: Callable[..., Mount], source: Path, destination: Path, act: Act, told: str
) -> None:
    """This happens even if nobody reads the mount."""
    mounted = mount(source, destination, wait=True)
    let_time_pass(destination)
    act(destination)
    until(lambda: mounted.status()["state"] == "failed", "its failure")
    assert told in mounted.status()["error"]
    assert [run(command, mounted.point).returncode for command in ("wait", "umount")] == [75, 75]


@each(REGROWN)
def test_an_incomplete_mount_reads_only_bytes_of_the_source(
    mount: Callable[..., Mount], source: Path, destination: Path, act: Act, told: str
) -> None:
    mounted = mount(source, destination, "--no-background")
    output(*BLOCKCOPY, "prefetch", mounted.point, f"0:{SIZE // 2}")
    let_time_pass(destination)
    act(destination)
    _reads_nothing_wrong(mounted)
    until(lambda: mounted.status()["state"] == "failed", "its failure")
    assert told in mounted.status()["error"]


def _reads_nothing_wrong(mounted: Mount) -> None:
    failed = 0
    with mounted.file.open("rb", buffering=0) as file:
        for position in range(0, SIZE, BLOCK_SIZE):
            try:
                got = os.pread(file.fileno(), BLOCK_SIZE, position)
            except OSError:
                failed += 1
            else:
                assert got == DATA[position : position + BLOCK_SIZE]
    assert failed


def test_a_mount_is_never_complete_if_its_destination_was_removed(
    mount: Callable[..., Mount], source: Path, destination: Path
) -> None:
    mounted = mount(source, destination, "--limit", "2M")
    destination.unlink()
    done = run("wait", mounted.point)
    failed(done, 75, "was removed")
    assert mounted.file.read_bytes() == DATA


# A disk that fails to write what the file system accepted


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[Path]:
    """Make a file of zeros on an ext4 file system, with a bad sector of the disk below the file."""
    support.require_fuse()
    support.require_root()
    backing, faulty, point = written(tmp_path / "backing", b""), tmp_path / "faulty", tmp_path / "point"
    os.truncate(backing, 48 << 20)
    faulty.mkdir()
    command = [PYTHON, str(STANDINS / "faulty_disk"), "--eio-at", str(12 << 20), str(backing)]
    with subprocess.Popen([*command, str(faulty)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        device = output("losetup", "--find", "--show", faulty / "disk").strip()
        try:
            # FUSE splits larger writes. If a later part fails, such a file reports a short write, and the loop
            # device takes that for done.
            Path("/sys/block", Path(device).name, "queue/max_sectors_kb").write_text("512")
            with support.mounted(device, point):
                file = written(point / "file", b"")
                os.truncate(file, 32 << 20)
                yield file
        finally:
            output("losetup", "-d", device)
            process.terminate()


def by_stages(source: Path, destination: Path) -> int:
    asked = run("checksum", destination).stdout
    return run("save", destination, input=run("retrieve", source, input=asked).stdout).returncode


WAYS: dict[str, Callable[[Path, Path], int]] = {
    "sync": lambda source, file: run("sync", source, file).returncode,
    "push": lambda source, file: (
        run("sync", "-e", f"{PYTHON} {STANDINS / 'link'}", "--python", PYTHON, source, f"host:{file}").returncode
    ),
    "stages": by_stages,
}


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_after_a_failed_sync_the_next_run_does_not_believe_the_cache(
    way: str, failing: Path, tmp_path: Path
) -> None:
    source = written(tmp_path / "source", noise(32 << 20))
    assert [WAYS[way](source, failing) for _ in range(2)] == [1, 1]
