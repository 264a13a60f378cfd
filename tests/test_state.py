"""What an interrupted `mount` or `sync` leaves on record, and what the next one believes of it.

To see what is believed, a block that is on record is changed behind its back, outside of the sample, and the
record is told the new times of the file. The block stays wrong if the record is resumed; otherwise it is repaired.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support
from support import BLOCK_SIZE, BLOCKCOPY, FAULTY, QUEUEING, FedDecoder, Mount, failed, noise, run, until, written

from blockcopy.block.geometry import Extent, Geometry
from blockcopy.block.identity import sample_extents
from blockcopy.protocol import wire
from blockcopy.replica.state.statefile import StateFile, WriteTimes

Mounter = Callable[..., Mount]
LoopDevice = Callable[..., str]
Change = Callable[[Path], Any]

BLOCKS = 48
DATA = noise(BLOCKS * BLOCK_SIZE - 4096)
OLD = noise(len(DATA), seed=2)
"""Differs from DATA in every block."""

KNOWN = 30
"""Blocks from the first on that are on record after `known`."""

LOOP_CHANGE_FD = 0x4C06
"""ioctl: give a read-only loop device another file. Its number stays, which other tests could take meanwhile."""

SLACK = 64 * 1024
"""Bytes on the wire for greetings, and for the digests that are asked with."""

OF_ANOTHER_SOURCE = "the source is another, or has changed"
WAS_WRITTEN = "another program has written to"
CHECKED_AGAIN = "hecking every block"


def changed(data: bytes, *blocks: int) -> bytes:
    """Return `data` with one byte changed in each of `blocks`, outside of the sample."""
    made = bytearray(data)
    for block in blocks:
        made[unsampled(block)] ^= 0x55
    return bytes(made)


def unsampled(block: int) -> int:
    sampled = {extent.offset for extent in sample_extents(len(DATA))}
    return next(offset for offset in range(block * BLOCK_SIZE, len(DATA), 4096) if offset not in sampled)


OTHER = changed(DATA, 3, 20, 40)
"""Another source that the sample does not tell from DATA."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A destination."""
    return written(tmp_path / "file", OLD)


@pytest.fixture
def device(tmp_path: Path, loop_device: LoopDevice) -> Path:
    """A destination."""
    return Path(loop_device(written(tmp_path / "backing", OLD)))


@pytest.fixture
def destination(request: pytest.FixtureRequest) -> Path:
    """Return the fixture `file` or `device`, as the test is parametrized."""
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def state_file() -> Path:
    """Return the only state file."""
    (found,) = Path(os.environ["STATE_DIRECTORY"]).glob("*.state")
    return found


def recorded(path: Path) -> set[int]:
    """Return the recorded blocks."""
    journal = StateFile(path)
    journal.close()
    assert journal.record
    bits = int.from_bytes(journal.record.rows.chunks.get(0, b""), "little")
    return {block for block in range(BLOCKS) if bits >> block & 1}


def known(mount: Mounter, source: Path, destination: Path, *options: object, program: str | None = None) -> None:
    """Mount, fetch the first KNOWN blocks and no others, and unmount."""
    made = mount(source, destination, "--no-background", *options, program=program)
    assert run("prefetch", made.point, f"0:{KNOWN * BLOCK_SIZE}").returncode == 0
    made.umount()


def tamper(path: Path, *blocks: int, state: Path | None = None) -> None:
    """Change what nobody looks at who believes the record; `state` is that of a file."""
    with path.open("r+b") as opened:
        for block in blocks:
            opened.seek(unsampled(block))
            byte = opened.read(1)
            opened.seek(unsampled(block))
            opened.write(bytes([byte[0] ^ 0x55]))
    if state is not None:  # a file's ctime cannot be put back, but the record can be told of it
        status = path.stat()
        with contextlib.closing(StateFile(state)) as journal:
            journal.write_times(WriteTimes(status.st_mtime_ns, status.st_ctime_ns, None))


def sync(*args: object) -> str:
    """Run a sync that must succeed, and return its standard error."""
    done = run("sync", *args)
    assert done.returncode == 0, done.stderr.decode()
    return done.stderr.decode()


def listening(folder: Path) -> str:
    """--blockcopy-path of our own `retrieve`, with its questions kept in the folder."""
    folder.mkdir()
    script = folder / "program"
    script.write_text(f'#!/bin/sh\ntee {folder}/asked.$$ | {" ".join(BLOCKCOPY)} "$@"\n')
    script.chmod(0o755)
    return str(script)


def asked(folder: Path) -> set[int]:
    blocks = set()
    for stream in folder.glob("asked.*"):
        decoder = FedDecoder(wire.HASH_STREAM)
        decoder.feed(stream.read_bytes())
        while message := decoder.next():
            if isinstance(message, wire.Asks):
                blocks |= set(Geometry(len(DATA)).span(message.position, message.length))
    return blocks


def kill(mounted: Mount) -> None:
    pid = mounted.status()["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not support.alive(pid), "its end")
    assert run("umount", mounted.point).returncode == 0


# An interruption, and what goes on


@pytest.mark.parametrize(
    ("again", "destination"), [("sync", "device"), ("mount", "file")], indirect=["destination"]
)
def test_an_interrupted_sync_is_taken_up(
    again: str, source: Path, destination: Path, tmp_path: Path, mount: Mounter
) -> None:
    command = [*BLOCKCOPY, "sync", "--limit", "4M", str(source), str(destination)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        until(lambda: read(destination, 9) == block(DATA, 9) or process.poll() is not None, "some copying")
        process.terminate()
        assert process.communicate() == (None, b"")
        assert process.returncode == -signal.SIGTERM
    here = recorded(state_file())
    assert {0, 5} <= here < set(range(BLOCKS))
    program = listening(tmp_path / "listening")
    if again == "sync":
        assert sync("--blockcopy-path", program, source, destination) == ""
    else:
        made = mount(source, destination, program=program, wait=True)
        assert made.status()["resumed_bytes"] == len(here) * BLOCK_SIZE
        made.umount()
    assert asked(tmp_path / "listening") == set(range(BLOCKS)) - here
    assert destination.read_bytes() == DATA


def block(data: bytes, number: int) -> bytes:
    return data[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE]


def read(path: Path, number: int) -> bytes:
    with path.open("rb", buffering=0) as opened:
        return os.pread(opened.fileno(), BLOCK_SIZE, number * BLOCK_SIZE)


@pytest.mark.parametrize(
    ("again", "destination"), [("sync", "file"), ("mount", "device")], indirect=["destination"]
)
def test_what_was_synced_before_a_kill_is_taken_up(
    again: str, source: Path, destination: Path, tmp_path: Path, mount: Mounter
) -> None:
    made = mount(source, destination, "--no-background", "--name", "disk")
    for number in (0, 7, 8, 44):
        assert run("prefetch", made.point, f"{number * BLOCK_SIZE}:{BLOCK_SIZE}").returncode == 0
    with made.file.open("rb") as opened:
        os.fsync(opened.fileno())
    kill(made)
    program = listening(tmp_path / "listening")
    if again == "sync":
        assert sync("--blockcopy-path", program, source, destination) == ""
        assert asked(tmp_path / "listening") == set(range(BLOCKS)) - {0, 7, 8, 44}
    else:
        made = mount(source, destination, wait=True)
        status = made.status()
        assert status["resumed_bytes"] == 4 * BLOCK_SIZE
        assert status["received_bytes"] <= len(DATA) - 4 * BLOCK_SIZE + SLACK
        made.umount()
    assert destination.read_bytes() == DATA


def test_a_pause_records_as_well(source: Path, file: Path, mount: Mounter) -> None:
    made = mount(source, file, "--limit", "128K")
    assert run("prefetch", made.point, f"0:{KNOWN * BLOCK_SIZE}").returncode == 0
    assert run("pause", made.point).returncode == 0
    kill(made)
    assert recorded(state_file()) >= set(range(KNOWN))


def test_what_is_on_record_is_not_looked_at_again(source: Path, device: Path, mount: Mounter) -> None:
    """And so `tamper` shows what is believed, here and below."""
    known(mount, source, device)
    tamper(device, 7)
    assert sync(source, device) == ""
    assert device.read_bytes() == changed(DATA, 7)


def test_a_complete_copy_of_a_file_is_not_checked_but_by_recheck(source: Path, file: Path, tmp_path: Path) -> None:
    sync(source, file)
    tamper(file, 7, state=state_file())
    assert sync("--blockcopy-path", listening(tmp_path / "listening"), source, file) == ""
    assert asked(tmp_path / "listening") == set()
    assert file.read_bytes() == changed(DATA, 7)
    assert sync("--recheck", source, file) == ""
    assert file.read_bytes() == DATA


def test_a_complete_copy_of_a_device_is_checked_again(tmp_path: Path, loop_device: LoopDevice, file: Path) -> None:
    source = Path(loop_device(written(tmp_path / "source", DATA)))
    sync(source, file)
    tamper(source, 9)
    assert f"the copy was complete; c{CHECKED_AGAIN}" in sync(source, file)
    assert file.read_bytes() == changed(DATA, 9)


# State files that cannot be believed


def spoil(path: Path, sql: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(sql)


def flip(path: Path) -> None:
    """A bit of the seal of what is recorded; the whole chunk is."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        [(seal,)] = database.execute("SELECT seal FROM chunks")
    data = bytearray(path.read_bytes())
    data[data.index(seal)] ^= 1
    path.write_bytes(data)


NEWER_IN_WAL = pytest.param(
    lambda path: spoil(path, "PRAGMA user_version = 4; PRAGMA journal_mode = WAL"),
    "its format is 4",
    id="a newer format, with WAL",
)


@pytest.mark.parametrize(
    ("spoiler", "told"),
    [
        pytest.param(lambda path: os.truncate(path, path.stat().st_size - 4096), "", id="truncated"),
        pytest.param(flip, "it is damaged", id="a flipped bit"),
        NEWER_IN_WAL,
        pytest.param(lambda path: path.chmod(0o666), "others can write to ", id="written by all"),
    ],
)
def test_a_spoiled_state_is_kept_aside_and_not_believed(
    spoiler: Change, told: str, source: Path, file: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    sync("--state", state, source, file)
    tamper(file, 7, state=state)
    spoiler(state)
    data = state.read_bytes()
    written(tmp_path / "state.unusable-1", b"of another time")
    said = sync("--state", state, source, file)
    assert f"the state file {state} cannot be used ({told}" in said
    assert f"it is kept as {state}.unusable-2" in said
    assert (tmp_path / "state.unusable-2").read_bytes() == data
    assert (tmp_path / "state.unusable-1").read_bytes() == b"of another time"
    assert file.read_bytes() == DATA
    assert sync("--state", state, source, file) == ""  # a new one was begun


def test_an_empty_state_is_no_record(source: Path, file: Path) -> None:
    sync(source, file)
    tamper(file, 7, state=state_file())
    os.truncate(state_file(), 0)
    assert "is empty. Checking every block" in sync(source, file)
    assert file.read_bytes() == DATA


def test_the_state_of_another_destination_is_not_believed(source: Path, file: Path, device: Path) -> None:
    sync(source, file)
    of_file = state_file()
    sync("--no-state", source, device)
    tamper(device, 7)
    said = sync("--state", of_file, source, device)
    assert "the destination is another: " in said
    assert CHECKED_AGAIN in said
    assert device.read_bytes() == DATA


def test_a_copy_of_the_destination_under_its_name_is_another_one(source: Path, file: Path) -> None:
    sync(source, file)
    state = state_file()
    tamper(file, 7, state=state)
    shutil.copy2(file, f"{file}.new")
    os.replace(f"{file}.new", file)
    assert "file was " in sync("--state", state, source, file)
    assert file.read_bytes() == DATA


# Another source


def renamed_onto(path: Path, data: bytes) -> None:
    os.replace(written(path.with_name("new"), data), path)


@pytest.mark.parametrize(
    ("replace", "again"),
    [
        pytest.param(partial(renamed_onto, data=OTHER), "sync", id="another file"),
        pytest.param(partial(renamed_onto, data=OTHER[:-8192]), "sync", id="another size"),
        pytest.param(partial(written, data=OTHER), "sync", id="rewritten in place"),
        pytest.param(partial(written, data=OTHER), "mount", id="rewritten in place, then mounted"),
    ],
)
def test_the_blocks_of_another_source_are_not_mixed_in(
    replace: Change, again: str, source: Path, file: Path, mount: Mounter
) -> None:
    sync(source, file)
    replace(source)
    if again == "sync":
        assert OF_ANOTHER_SOURCE in sync(source, file)
    else:
        made = mount(source, file)
        assert made.status()["resumed_bytes"] == 0
        assert made.file.read_bytes() == OTHER
        made.wait()
        made.umount()
    assert file.read_bytes()[: source.stat().st_size] == source.read_bytes()


@pytest.mark.parametrize(
    ("attach", "data"),
    [
        pytest.param(renamed_onto, OTHER, id="another file"),
        pytest.param(written, noise(len(DATA), seed=3), id="the same file, with another sample"),
    ],
)
def test_a_source_device_with_other_bytes_is_another(
    attach: Callable[[Path, bytes], Any],
    data: bytes,
    file: Path,
    tmp_path: Path,
    mount: Mounter,
    loop_device: Callable[..., str],
) -> None:
    """The same device, changed outside of the sample, is what only a snapshot prevents."""
    backing = written(tmp_path / "backing", DATA)
    device = loop_device(backing, "--read-only")
    known(mount, Path(device), file)
    attach(backing, data)
    with open(device, "rb") as loop, backing.open("rb") as now:
        fcntl.ioctl(loop, LOOP_CHANGE_FD, now.fileno())
    support.output("blockdev", "--flushbufs", device)
    assert Path(device).read_bytes() == data
    assert OF_ANOTHER_SOURCE in sync(device, file)
    assert file.read_bytes() == data


def by_no_state(tmp_path: Path, source: Path, destination: Path) -> None:
    sync("--no-state", source, destination)


def by_another_state(tmp_path: Path, source: Path, destination: Path) -> None:
    sync("--state", tmp_path / "elsewhere", source, destination)


def by_save(tmp_path: Path, source: Path, destination: Path) -> None:
    hashes = run("checksum", destination)
    blocks = run("retrieve", source, input=hashes.stdout)
    assert run("save", destination, input=blocks.stdout).returncode == 0


def by_the_default_state(tmp_path: Path, source: Path, destination: Path) -> None:
    sync(source, destination)


def by_push(tmp_path: Path, source: Path, destination: Path) -> None:
    shell = tmp_path / "lrsh"
    shell.write_text('#!/bin/sh\nshift; exec sh -c "$*"\n')
    shell.chmod(0o755)
    sync("-e", shell, source, f"here:{destination}")


@pytest.mark.parametrize(
    ("between", "kept"),
    [
        (by_no_state, "default"),
        (by_another_state, "default"),
        (by_another_state, "elsewhere"),
        (by_save, "elsewhere"),
        (by_push, "elsewhere"),
        (by_the_default_state, "elsewhere"),
    ],
)
def test_what_another_source_wrote_between_ends_the_record(
    between: Callable[..., None], kept: str, source: Path, device: Path, tmp_path: Path, mount: Mounter
) -> None:
    """Nothing of a device tells that it was written; its record is ended wherever it is kept."""
    options = ["--state", tmp_path / "state"] if kept == "elsewhere" else []
    known(mount, source, device, *options)
    between(tmp_path, written(tmp_path / "other", OTHER), device)
    assert device.read_bytes() == OTHER
    said = sync(*options, source, device)
    assert ("may have written to" in said) == (kept == "elsewhere")
    assert device.read_bytes() == DATA


def test_a_record_that_is_kept_elsewhere_is_believed_as_any_other(
    source: Path, device: Path, tmp_path: Path, mount: Mounter
) -> None:
    options = ["--state", tmp_path / "state"]
    for _ in range(2):  # begun, and resumed
        known(mount, source, device, *options)
    tamper(device, 7)
    assert sync(*options, source, device) == ""
    assert device.read_bytes() == changed(DATA, 7)


def test_what_nobody_could_note_is_not_believed(source: Path, device: Path, tmp_path: Path) -> None:
    """No state can be kept at the default place, so no command that comes between could end the record there."""
    Path(os.environ["STATE_DIRECTORY"]).rmdir()
    Path(os.environ["STATE_DIRECTORY"]).touch()
    assert "which names the valid state file" in sync("--state", tmp_path / "state", source, device)
    assert not (tmp_path / "state").exists()
    assert device.read_bytes() == DATA


@pytest.mark.parametrize("complete", [True, False])
def test_a_source_rewritten_and_asked_in_the_original_form(
    complete: bool, source: Path, file: Path, mount: Mounter
) -> None:
    """Which does not tell its time."""
    if complete:
        sync(source, file)
    else:
        known(mount, source, file)
    source.write_bytes(OTHER)
    said = sync("--blockcopy-path", QUEUEING, source, file)
    assert file.read_bytes() == OTHER
    assert CHECKED_AGAIN in said


def test_a_source_file_that_changes_meanwhile_is_told(source: Path, file: Path) -> None:
    command = [*BLOCKCOPY, "sync", "--limit", "16M", str(source), str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        until(lambda: read(file, 20) == block(DATA, 20) or process.poll() is not None, "some copying")
        written(source, OTHER)
        _, said = process.communicate()
    assert process.returncode == 3
    assert b"source changed" in said
    assert OF_ANOTHER_SOURCE in sync(source, file)
    assert file.read_bytes() == OTHER


def written_with_its_mtime_put_back(path: Path) -> None:
    status = path.stat()
    tamper(path, 7)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("again", ["sync", "mount"])
@pytest.mark.parametrize("end", ["source", "file"])
def test_a_write_whose_mtime_was_put_back_is_found(
    end: str, again: str, source: Path, file: Path, mount: Mounter, request: pytest.FixtureRequest
) -> None:
    sync(source, file)
    written_with_its_mtime_put_back(request.getfixturevalue(end))
    if again == "sync":
        said = sync(source, file)
        assert WAS_WRITTEN in said or "its mtime was put back after a write, or its name" in said
    else:
        made = mount(source, file, wait=True)
        assert made.file.read_bytes() == source.read_bytes()
        made.umount()
    assert file.read_bytes() == source.read_bytes()


def test_a_source_whose_mtime_was_put_back_is_found_under_a_live_mount(
    source: Path, file: Path, mount: Mounter
) -> None:
    made = mount(source, file, "--no-background")
    assert run("prefetch", made.point, f"0:{BLOCK_SIZE}").returncode == 0
    written_with_its_mtime_put_back(source)
    run("prefetch", made.point, f"0:{len(DATA)}")
    until(lambda: made.status()["state"] == "failed", "the failure")
    assert "its mtime was put back after a write, or its name" in made.status()["error"]
    made.umount()


def test_a_source_whose_mode_was_changed_costs_a_check(source: Path, file: Path, tmp_path: Path) -> None:
    sync(source, file)
    source.chmod(0o640)
    program = listening(tmp_path / "listening")
    assert OF_ANOTHER_SOURCE in sync("--blockcopy-path", program, source, file)
    assert asked(tmp_path / "listening") == set(range(BLOCKS))
    assert sync(source, file) == ""


def test_an_older_program_at_the_source_is_believed_as_a_device_is(
    source: Path, file: Path, tmp_path: Path
) -> None:
    """It does not tell the ctime, so nobody can say that nothing was written since."""
    old = f"{FAULTY} --no-ctime"
    sync("--blockcopy-path", old, source, file)
    written_with_its_mtime_put_back(source)
    assert f"the copy was complete; c{CHECKED_AGAIN}" in sync("--blockcopy-path", old, source, file)
    assert file.read_bytes() == source.read_bytes()
    assert "ctime_ns was not reported" in sync(source, file)
    assert "ctime_ns is no longer reported" in sync("--blockcopy-path", old, source, file)


@pytest.mark.parametrize("program", ["sync", "verify"])
def test_a_source_that_changes_while_it_is_compared_is_told(
    program: str, source: Path, file: Path, tmp_path: Path
) -> None:
    """All of its blocks are equal when they are asked for, and its times are others in the end."""
    sync(source, file)
    touching = tmp_path / "touching"
    touching.write_text(
        f'#!/bin/sh\n(dd bs=1 count=1000 status=none; chmod 600 {source}; cat) | {" ".join(BLOCKCOPY)} "$@"\n'
    )
    touching.chmod(0o755)
    options = ["--recheck", "--verify"] if program == "sync" else []
    done = run(program, *options, "--blockcopy-path", touching, source, file)
    failed(done, 3, b"source changed")


# A destination that somebody else wrote to


def test_a_destination_file_that_was_written_is_found(source: Path, file: Path) -> None:
    sync(source, file)
    with file.open("r+b") as opened:
        opened.seek(unsampled(7))
        opened.write(b"somebody else")
    assert WAS_WRITTEN in sync(source, file)
    assert file.read_bytes() == DATA


def zeroed(device: Path) -> None:
    written(device, bytes(len(DATA)))


def formatted(device: Path) -> None:
    support.output("mkfs.ext4", "-q", "-F", device)


@pytest.mark.parametrize("how", [zeroed, formatted])
def test_a_destination_device_that_was_written_shows_in_the_sample(
    how: Change, source: Path, device: Path, mount: Mounter
) -> None:
    known(mount, source, device)
    how(device)
    if how is formatted:
        failed(run("sync", source, device), 1, "holds an ext4 file system")
    assert WAS_WRITTEN in sync("--force", source, device)
    assert device.read_bytes() == DATA


# A state file that somebody else can forge

MALLORY = 4321


def plant_journal(state: Path, old: bytes) -> None:
    """Another user puts beside `state` what plays it back to its `old` bytes (sqlite.org/fileformat.html, 3)."""
    header = bytes.fromhex("d9d505f920a163d7")
    numbers = (len(old) // 4096, 0, len(old) // 4096, 512, 4096)
    forged = (header + b"".join(each.to_bytes(4, "big") for each in numbers)).ljust(512, b"\0")
    for at in range(0, len(old), 4096):
        page = old[at : at + 4096]
        checksum = sum(page[4096 - 200 : 0 : -200])
        forged += (at // 4096 + 1).to_bytes(4, "big") + page + checksum.to_bytes(4, "big")
    script = "import os, sys; os.setuid(4321); open(sys.argv[1], 'wb').write(sys.stdin.buffer.read())"
    subprocess.run([support.PYTHON, "-c", script, f"{state}-journal"], input=forged, check=True)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that others can reach, as pytest's cannot be."""
    support.require_root()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize("mode", [0o1777, 0o755])
def test_a_forged_hot_journal_is_not_played_back(mode: int, source: Path, file: Path, shared: Path) -> None:
    """It has the record from before `--verify` found that a block is wrong; the folder was open to others once."""
    folder, state = shared / "states", shared / "states/state"
    folder.mkdir()
    sync("--state", state, source, file)
    tamper(file, 7, state=state)
    old = state.read_bytes()
    failed(run("sync", "--verify", "--state", state, source, file), 5)
    folder.chmod(0o1777)
    plant_journal(state, old)
    folder.chmod(mode)
    said = sync("--state", state, source, file)
    assert (f"others may write to {folder}" if mode == 0o1777 else f"others can write to {state}-journal") in said
    assert file.read_bytes() == DATA


def acl_for_mallory() -> bytes:
    """As `setfacl -m u:4321:rwx` makes it: with the group's bits as its mask."""
    entries = [(1, 7, -1), (2, 7, MALLORY), (4, 0, -1), (16, 7, -1), (32, 0, -1)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda folder: folder.chmod(0o1777), "others may write to {}/a/b"),
        (lambda folder: folder.chmod(0o757), "others may write to {}/a/b"),
        (lambda folder: (os.chown(folder, 0, MALLORY), folder.chmod(0o770)), "others may write to {}/a/b"),
        (
            lambda folder: os.setxattr(folder, "system.posix_acl_access", acl_for_mallory()),
            "others may write to {}/a/b",
        ),
        (lambda folder: os.chown(folder, MALLORY, 0), "{}/a/b belongs to another user"),
        (lambda folder: os.chown(folder.parent, MALLORY, 0), "{}/a belongs to another user"),
        (lambda folder: folder.parent.chmod(0o777), "others may write to {}/a"),
        (lambda folder: folder.parent.chmod(0o1777), None),
        (lambda folder: folder.chmod(0o775), None),
    ],
    ids=[
        "sticky",
        "of all",
        "of a group",
        "by a list",
        "another's",
        "in another's",
        "in one of all",
        "in a sticky one",
        "of our own group",
    ],
)
def test_no_state_is_kept_where_others_decide_what_is_there(
    change: Change, why: str | None, source: Path, file: Path, shared: Path
) -> None:
    folder = shared / "a/b"
    folder.mkdir(parents=True)
    change(folder)
    said = sync("--state", folder / "state", source, file)
    if why is None:
        assert said == ""
    else:
        told = f"cannot keep the state in {folder}/state: {why.format(shared)}; after a restart, every block will"
        assert told in said
        assert list(folder.iterdir()) == []
    assert file.read_bytes() == DATA


def test_a_link_is_no_state_file(source: Path, file: Path, tmp_path: Path) -> None:
    sync("--state", tmp_path / "state", source, file)
    (tmp_path / "link").symlink_to("state")
    done = run("sync", "--state", tmp_path / "link", source, file)
    failed(done, 1, b"not a regular file")


def test_a_note_that_others_can_write_is_not_believed(
    source: Path, device: Path, tmp_path: Path, mount: Mounter
) -> None:
    state, default = tmp_path / "state", Path(os.environ["STATE_DIRECTORY"])
    known(mount, source, device, "--state", state)
    default.chmod(0o777)
    tamper(device, 7)
    said = sync("--state", state, source, device)
    assert "may have written to" in said
    assert f"others may write to {default}" in said
    assert device.read_bytes() == DATA


# Where it is kept


def test_a_state_in_use_is_refused(source: Path, file: Path, tmp_path: Path, mount: Mounter) -> None:
    state = tmp_path / "state"
    made = mount(source, file, "--no-background", "--state", state)
    assert made.status()["state_file"] == str(state)
    other = written(tmp_path / "other", OLD)
    done = run("sync", "--state", state, source, other)
    failed(done, 1, f"{state} is in use by another process")
    assert other.read_bytes() == OLD
    made.umount()
    assert recorded(state) == set()


@pytest.mark.parametrize(
    ("named", "command"), [("source", "sync"), ("destination", "sync"), ("destination", "mount"), ("link", "sync")]
)
def test_a_state_in_either_end_is_refused(
    named: str, command: str, source: Path, file: Path, tmp_path: Path
) -> None:
    state = {"source": source, "destination": file, "link": tmp_path / "link"}[named]
    if named == "link":
        state.hardlink_to(file)
    (tmp_path / "mnt").mkdir()
    point = [tmp_path / "mnt"] if command == "mount" else []
    done = run(command, "--state", state, source, file, *point)
    failed(done, 1, "cannot keep the state in")
    assert (source.read_bytes(), file.read_bytes()) == (DATA, OLD)


def test_a_state_in_a_destination_to_be_made_is_refused(source: Path, tmp_path: Path) -> None:
    done = run("sync", "--state", tmp_path / "new", source, tmp_path / "new")
    failed(done, 1, "cannot keep the state in")


def test_where_no_state_can_be_kept_the_copy_goes_on(source: Path, file: Path) -> None:
    said = sync("--state", "/proc/none/state", source, file)
    assert "cannot keep the state in /proc/none/state" in said
    assert "after a restart, every block will be checked again" in said
    assert file.read_bytes() == DATA


# A source that is away


def away_or_there(folder: Path) -> tuple[str, Path]:
    """--blockcopy-path of a source that is there where the file is."""
    there = written(folder / "there", b"")
    script = folder / "program"
    script.write_text(
        f'#!/bin/sh\n[ -e {there} ] || {{ echo gone fishing >&2; exit 1; }}\nexec {" ".join(BLOCKCOPY)} "$@"\n'
    )
    script.chmod(0o755)
    return str(script), there


def test_what_is_here_is_served_while_the_source_is_away(
    source: Path, device: Path, tmp_path: Path, mount: Mounter
) -> None:
    program, there = away_or_there(tmp_path)
    known(mount, source, device, program=program)
    there.unlink()
    made = mount(source, device, "--reconnect-timeout", 0, "--name", "disk", program=program)
    status = made.status()
    assert (status["state"], status["resumed_bytes"]) == ("reconnecting", KNOWN * BLOCK_SIZE)
    assert "gone fishing" in status["link"]["last_error"]
    with made.file.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for number in (0, 7, KNOWN - 1):
            assert os.pread(opened.fileno(), BLOCK_SIZE, number * BLOCK_SIZE) == block(DATA, number)
        with pytest.raises(OSError) as error:
            os.pread(opened.fileno(), 4096, (KNOWN + 5) * BLOCK_SIZE)
        assert error.value.errno == errno.EIO
        there.touch()
        made.wait()
        assert made.file.read_bytes() == DATA
    made.umount()
    assert device.read_bytes() == DATA


def test_a_complete_copy_of_a_file_needs_no_source(
    source: Path, file: Path, tmp_path: Path, mount: Mounter
) -> None:
    program, there = away_or_there(tmp_path)
    sync("--blockcopy-path", program, source, file)
    there.unlink()
    made = mount(source, file, program=program, wait=True)
    assert made.status()["state"] == "complete"
    assert made.file.read_bytes() == DATA


def test_a_source_that_comes_back_as_another_is_not_mixed_in(
    source: Path, file: Path, tmp_path: Path, mount: Mounter
) -> None:
    program, there = away_or_there(tmp_path)
    known(mount, source, file, program=program)
    there.unlink()
    made = mount(source, file, "--reconnect-timeout", 0, program=program)
    source.write_bytes(OTHER)
    there.touch()
    until(lambda: made.status()["state"] == "failed", "the failure")
    assert "source changed" in made.status()["error"]
    made.umount()
    assert file.read_bytes() == DATA[: KNOWN * BLOCK_SIZE] + OLD[KNOWN * BLOCK_SIZE :]
    assert OF_ANOTHER_SOURCE in sync(source, file)
    assert file.read_bytes() == OTHER


# --verify


def test_a_verified_copy_is_complete(source: Path, file: Path, mount: Mounter) -> None:
    assert sync("--verify", source, file) == ""
    made = mount(source, file, "--verify", wait=True)
    assert made.status()["state"] == "complete"
    made.umount()
    assert file.read_bytes() == DATA


def test_verify_finds_what_the_record_does_not_tell(source: Path, file: Path) -> None:
    sync(source, file)
    tamper(file, 7, state=state_file())
    done = run("sync", "--verify", source, file)
    failed(done, 5)
    extent = Extent(7 * BLOCK_SIZE, BLOCK_SIZE)
    assert f"{BLOCK_SIZE} bytes in 1 ranges differ, the first at {extent.offset}" in done.stderr.decode()
    assert recorded(state_file()) == set()
    sync("--verify", source, file)
    assert file.read_bytes() == DATA


def test_what_verify_found_is_known_though_the_disk_of_the_state_is_full(
    source: Path, file: Path, tmp_path: Path
) -> None:
    support.require_root()
    folder = tmp_path / "small"
    folder.mkdir()
    support.output("mount", "-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs", folder)
    try:
        sync("--state", folder / "state", source, file)
        tamper(file, 7, state=folder / "state")
        with (folder / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(bytes(4096)):
                pass
        failed(run("sync", "--verify", "--state", folder / "state", source, file), 5)
        (folder / "ballast").unlink()
        sync("--state", folder / "state", source, file)
        assert file.read_bytes() == DATA
    finally:
        support.output("umount", folder)


@pytest.mark.parametrize(
    ("command", "destination"), [("sync", "file"), ("mount", "device")], indirect=["destination"]
)
def test_after_a_source_that_lied_all_is_checked_again(
    command: str, source: Path, destination: Path, tmp_path: Path, mount: Mounter
) -> None:
    lies = f"{FAULTY} --other-at 5 {written(tmp_path / 'lies', noise(len(DATA), seed=3))}"
    if command == "sync":
        done = run("sync", "--verify", "--blockcopy-path", lies, source, destination)
        failed(done, 5, "is not a copy of")
    else:
        made = mount(source, destination, "--verify", program=lies)
        until(lambda: made.status()["state"] == "failed", "the failure")
        assert "is not a copy of" in made.status()["error"]
        made.umount()
    program = listening(tmp_path / "listening")
    sync("--blockcopy-path", program, source, destination)
    assert asked(tmp_path / "listening") == set(range(BLOCKS))
    assert destination.read_bytes() == DATA
