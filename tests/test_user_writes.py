"""The note of a user's writes, and a state file that does not know them: nothing of ours overwrites them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import support
import trio
from support import BLOCK_SIZE, failed, replica_of, run, succeeded

from blockcopy.block import identity, user_writes
from blockcopy.block.claim import check_destination, existing_destination, open_destination
from blockcopy.block.device import Device, open_source
from blockcopy.block.geometry import Geometry
from blockcopy.block.identity import sample_extents
from blockcopy.block.records import default_path
from blockcopy.block.user_writes import Note
from blockcopy.errors import (
    BlockcopyError,
    DeviceError,
    SourceChangedError,
    StateError,
    StateRemovedError,
    StateWriteError,
    UserWritesError,
)
from blockcopy.replica.plan import Plan
from blockcopy.replica.state.recovery import discard_user_writes, recorded_user_pages
from blockcopy.replica.state.statefile import StateFile
from blockcopy.transport.command import stage_command
from blockcopy.transport.location import Location

PAGE = 4096
BLOCKS = 12
DATA = support.noise(BLOCKS * BLOCK_SIZE - 100)
OLD = support.noise(len(DATA), seed=2)
MINE = support.noise(PAGE, seed=3)
AT = 5 * BLOCK_SIZE + 3 * PAGE
"""Where the user writes MINE: a page of a block that is missing."""


@pytest.fixture
def device(destination: Path) -> Iterator[Device]:
    with open_destination(str(destination)) as opened:
        yield opened


# The note


def test_a_note_is_found_again(device: Device) -> None:
    assert user_writes.find(device) is None
    user_writes.refuse(device)  # it does not
    for note in (
        Note("root@host:/dev/vg/disk", "/var/lib/blockcopy/a.state", 7, "0123abcd"),
        Note("a source\nwith \\ and \x85, \u2028 and \udcff", "/a\nstate", 0),
    ):
        user_writes.make(device, note).close()
        assert user_writes.find(device) == note
    with pytest.raises(UserWritesError, match=r"(?s)mount --writable a source.*discard-writes"):
        user_writes.refuse(device)
    user_writes.remove(device)
    assert user_writes.find(device) is None
    user_writes.remove(device)
    assert not user_writes.note_path(device).exists()


def test_the_counter_of_a_note_goes_on(device: Device) -> None:
    with contextlib.closing(user_writes.make(device, Note("source", "state", 3))) as counter:
        for commits in (4, 10**9, 10**19):
            counter.set(commits)
            assert user_writes.find(device) == Note("source", "state", commits)
    assert user_writes.note_path(device).read_text().count("\n") == 5


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"one\ntwo\n",
        b"1\n2\n3\n4\n5\n6\n",
        b"source\nstate\ntoken\n-\nnone\n",
        b"\xff\\x\nstate\ntoken\n-\n7\n",
        bytes(70_000),
    ],
    ids=["empty", "one line", "two lines", "six lines", "no number", "no text", "zeros"],
)
def test_a_damaged_note_is_a_note(content: bytes, device: Device) -> None:
    user_writes.make(device, Note("source", "state", 3)).close()
    user_writes.note_path(device).write_bytes(content)
    assert user_writes.find(device) == Note()
    with pytest.raises(UserWritesError, match="mount --writable SOURCE"):
        user_writes.refuse(device)


def test_the_attribute_alone_is_a_note(device: Device) -> None:
    user_writes.make(device, Note("source", "state", 3)).close()
    user_writes.note_path(device).unlink()
    assert user_writes.find(device) == Note()
    user_writes.remove(device)
    assert user_writes.find(device) is None


def test_a_note_that_cannot_be_read_is_no_answer(device: Device) -> None:
    user_writes.note_path(device).mkdir(parents=True)
    with pytest.raises(StateError, match="cannot find out whether"):
        user_writes.find(device)


def test_no_note_is_made_where_others_could_remove_it(device: Device) -> None:
    folder = user_writes.note_path(device).parent
    folder.chmod(0o777)
    with pytest.raises(StateWriteError, match="cannot note in"):
        user_writes.make(device, Note())
    assert user_writes.find(device) is None


@pytest.mark.parametrize("claim", [open_destination, existing_destination, check_destination])
@pytest.mark.parametrize("force", [False, True])
def test_a_claim_refuses_what_a_user_has_written(
    claim: Callable[..., Device | None], force: bool, destination: Path
) -> None:
    with open_source(str(destination)) as device:
        user_writes.make(device, Note("source", "state", 3)).close()
    with pytest.raises(UserWritesError, match="holds what was written to a writable mount"):
        claim(str(destination), force=force)
    claimed = claim(str(destination), force=force, with_user_writes=True)
    if claimed is not None:
        claimed.close()


def test_a_new_file_has_no_note_of_an_earlier_one(tmp_path: Path, destination: Path) -> None:
    """A file system may give the inode number of a removed file to the next one."""
    with open_source(str(destination)) as device:
        user_writes.make(device, Note("source", "state", 3)).close()
        note = user_writes.note_path(device)
        default_path(device).write_text("its state")
    destination.unlink()
    with open_destination(str(tmp_path / "new"), create=True) as device:
        if user_writes.note_path(device) != note:
            pytest.skip("this file system gives another number")
        assert user_writes.find(device) is None
        assert not default_path(device).exists()


# State files that do not know the writes


def plan_of(source: object, destination: object, **options: Any) -> Plan:
    options = {"hydrate": False, "writable": True, "resume_offline": True, **options}
    return Plan(stage_command(Location(None, str(source))), str(destination), **options)


def states() -> Path:
    return Path(os.environ["STATE_DIRECTORY"])


def state_file() -> Path:
    """Return the only state file in the default folder."""
    (found,) = states().glob("*.state")
    return found


Files = dict[str, bytes]


def saved() -> Files:
    return {path.name: path.read_bytes() for path in states().iterdir()}


def restore(files: Files) -> None:
    """Make the folder of state files as it was when `files` were saved."""
    for path in states().iterdir():
        path.unlink()
    for name, content in files.items():
        (states() / name).write_bytes(content)
        (states() / name).chmod(0o600)


def write(source: Path, destination: Path, *offsets: int, flushes: bool = True, **options: Any) -> Files:
    """Mount, write MINE at each of `offsets`, and unmount. Returns the state files before the end."""
    files: Files = {}

    async def main() -> None:
        async with replica_of(plan_of(source, destination, **options)) as replica:
            for offset in offsets:
                assert await replica.volume.write(offset, MINE) == PAGE
                if flushes:
                    await replica.flush()
            files.update(saved())

    trio.run(main)
    return files


def assert_serves(plan: Plan, *offsets: int) -> None:
    """MINE is at `offsets`; at all others, the source's bytes."""
    expected = bytearray(DATA)
    for offset in offsets:
        expected[offset : offset + PAGE] = MINE

    async def main() -> None:
        async with replica_of(plan) as replica:
            assert await replica.volume.read(0, len(DATA)) == expected

    trio.run(main)


def assert_refuses(plan: Plan, *words: str) -> None:
    """The mount is refused with the two ways on, and changes nothing."""
    path = Path(plan.destination)
    before = path.read_bytes()

    async def main() -> None:
        async with replica_of(plan):
            raise AssertionError("it was mounted")

    with pytest.raises(UserWritesError) as caught:
        trio.run(main)
    for word in (*words, "--writable", "discard-writes", "Nothing was changed"):
        assert word in str(caught.value)
    assert path.read_bytes() == before


def forget_note(destination: Path) -> None:
    """Leave nothing but the fact that there are writes of a user."""
    for note in states().glob("*.writes"):
        note.write_bytes(b"")
    os.setxattr(destination, "user.blockcopy.writes", b"")


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        [(seal,)] = database.execute("SELECT seal FROM pages")
    data = bytearray(path.read_bytes())
    data[data.index(seal)] ^= 1
    path.write_bytes(data)


def without_a_row(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript("DELETE FROM facts")


def newer(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript("PRAGMA user_version = 4")


def text(path: Path) -> None:
    path.write_text("my diary")


@pytest.mark.parametrize("spoil", [remove, truncate, empty, flip, without_a_row, newer, text])
def test_a_spoiled_state_file_refuses(spoil: Callable[[Path], None], source: Path, destination: Path) -> None:
    write(source, destination, AT)
    spoil(state_file())
    names = sorted(path.name for path in states().iterdir())
    for _ in range(2):
        assert_refuses(plan_of(source, destination), "holds writes of a user", "To go on, bring ")
        with open_source(str(destination)) as device, pytest.raises(BlockcopyError):
            recorded_user_pages(device, Geometry(len(DATA)))  # as `verify` asks
    assert sorted(path.name for path in states().iterdir()) == names  # nothing is set aside


def replace(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["*.state", "*.state-wal", "*.writes"])
@pytest.mark.parametrize("change", [remove, replace])
@pytest.mark.parametrize("wrote", ["a page", "nothing", "all"])
def test_a_flush_fails_once_its_record_was_removed(
    wrote: str, change: Callable[[Path], None], kind: str, source: Path, destination: Path
) -> None:
    """No later run would find the record. Without the note, a later sync would overwrite a complete copy too."""

    async def main() -> None:
        async with replica_of(plan_of(source, destination)) as replica:
            await replica.volume.write(AT, MINE)
            if wrote == "all":
                await replica.volume.write(0, support.noise(len(DATA), seed=4))
            await replica.flush()
            await replica.flush()
            [path] = states().glob(kind)
            change(path)
            for _ in range(2):
                if wrote == "a page":
                    await replica.volume.write(AT + 8 * PAGE, MINE)
                with pytest.raises(StateRemovedError, match="while it was in use"):
                    await replica.flush()

    trio.run(main)


def test_an_older_copy_of_the_state_file_refuses(source: Path, destination: Path) -> None:
    write(source, destination, AT)
    older = state_file().read_bytes()
    write(source, destination, AT + PAGE)
    state_file().write_bytes(older)
    assert_refuses(plan_of(source, destination), "is an older one")


def test_a_copy_from_before_the_first_write_refuses(source: Path, destination: Path) -> None:
    write(source, destination)
    older = state_file().read_bytes()
    write(source, destination, AT)
    state_file().write_bytes(older)
    assert_refuses(plan_of(source, destination), "is an older one")
    forget_note(destination)  # so that the count is unknown
    assert_refuses(plan_of(source, destination), "knows nothing of them")


def test_a_crash_that_lost_the_log_refuses(source: Path, destination: Path) -> None:
    files = write(source, destination, AT)
    assert f"{state_file().name}-wal" in files
    restore({name: content for name, content in files.items() if not name.endswith("-wal")})
    assert_refuses(plan_of(source, destination), "is an older one")
    restore(files)
    assert_serves(plan_of(source, destination), AT)


def test_the_state_file_of_another_destination_refuses(source: Path, destination: Path, tmp_path: Path) -> None:
    write(source, destination, AT)
    mine, other = state_file(), support.written(tmp_path / "other", OLD)
    write(source, other, *(page * PAGE for page in range(10)))
    (theirs,) = (path for path in states().glob("*.state") if path != mine)
    content = theirs.read_bytes()
    mine.write_bytes(content)
    assert_refuses(plan_of(source, destination), "is about other writes")
    forget_note(destination)  # so that the record's token is unknown
    assert_refuses(plan_of(source, destination), "the destination is another")


def test_a_state_file_from_before_the_last_discard_refuses(
    tmp_path: Path, source: Path, loop_device: Callable[[Path], str]
) -> None:
    """It has more commits. The times of a device do not tell the two apart either."""
    device = Path(loop_device(support.written(tmp_path / "disk", bytes(len(DATA) // 512 * 512 + 512))))
    write(source, device, *(page * PAGE for page in range(10)))
    before = state_file().read_bytes()
    with open_destination(str(device), with_user_writes=True) as opened:
        discard_user_writes(opened, None)
    write(source, device, AT)
    mine = state_file().read_bytes()
    state_file().write_bytes(before)
    assert_refuses(plan_of(source, device), "is about other writes")
    state_file().write_bytes(mine)
    assert_serves(plan_of(source, device), AT)


def test_another_state_file_refuses(source: Path, destination: Path, tmp_path: Path) -> None:
    """Also one of the same destination, with more commits, that knows nothing of the writes."""
    known = tmp_path / "known"
    for _ in range(5):
        write(source, destination, state=str(known))
    write(source, destination, AT)
    assert_refuses(plan_of(source, destination, state=str(tmp_path / "missing")), "its state was in")
    assert not (tmp_path / "missing").exists()
    assert_refuses(plan_of(source, destination, state=str(known)))
    (note,) = states().glob("*.writes")
    noted = note.read_bytes()
    with contextlib.closing(StateFile(known)) as state:  # the count alone does not tell them apart
        note.write_bytes(b"".join(noted.splitlines(keepends=True)[:2]) + b"\n%020d\n" % state.commits)
    assert_refuses(plan_of(source, destination, state=str(known)))
    note.write_bytes(noted)
    copy = shutil.copy(state_file(), tmp_path / "copy")
    assert_refuses(plan_of(source, destination, state=str(copy)))
    assert_serves(plan_of(source, destination), AT)


@pytest.mark.parametrize(
    "options", [{"recheck": True}, {"keep_state": False}, {"writable": False}], ids=lambda each: next(iter(each))
)
def test_whatever_would_check_every_block_again_refuses(
    options: dict[str, Any], source: Path, destination: Path
) -> None:
    write(source, destination, AT)
    assert_refuses(plan_of(source, destination, **options))
    assert_serves(plan_of(source, destination), AT)


@pytest.mark.parametrize("size", [len(DATA), len(DATA) + PAGE, len(DATA) - PAGE])
def test_nothing_of_a_source_that_has_changed_is_taken(
    size: int, source: Path, destination: Path, tmp_path: Path
) -> None:
    """What is present, and what the user wrote, is served: nobody else has it. It can be written to as well."""
    other = support.written(tmp_path / "other", support.noise(size, seed=7))

    async def first() -> None:
        async with replica_of(plan_of(source, destination)) as replica:
            await replica.volume.read(0, BLOCK_SIZE)
            await replica.volume.write(AT, MINE)

    async def with_other() -> None:
        async with replica_of(plan_of(other, destination, hydrate=True)) as replica:
            await replica.settled.wait()
            told = replica.status()
            assert told.state == "failed"
            assert "without the earlier source" in str(told.error)
            assert replica.volume.size == len(DATA)
            assert await replica.volume.read(0, BLOCK_SIZE) == DATA[:BLOCK_SIZE]
            assert await replica.volume.read(AT, PAGE) == MINE
            with pytest.raises(SourceChangedError):
                await replica.volume.read(AT, 2 * PAGE)
            await replica.volume.write(AT + 2 * PAGE, MINE)
            await replica.flush()

    trio.run(first)
    trio.run(with_other)
    assert_serves(plan_of(source, destination), AT, AT + 2 * PAGE)


def test_what_another_program_wrote_meanwhile_is_checked_again(source: Path, destination: Path) -> None:
    """Not in blocks of the user: of these the source has no say."""
    foreign = b"not of this world"

    async def main() -> None:
        async with replica_of(plan_of(source, destination)) as replica:
            await replica.volume.read(0, len(DATA) // 2)
            await replica.volume.write(AT, MINE)
            await replica.volume.write(PAGE, MINE)
            await replica.flush()
            with destination.open("r+b") as file:
                for offset in (1, 4 * BLOCK_SIZE):
                    file.seek(offset)
                    file.write(foreign)
            with pytest.raises(DeviceError, match="by another program"):
                await replica.flush()

    with pytest.raises(DeviceError, match="by another program"):
        trio.run(main)
    assert_refuses(plan_of(source, destination, writable=False))
    expected = bytearray(DATA)
    for offset in (AT, PAGE):
        expected[offset : offset + PAGE] = MINE
    expected[1 : 1 + len(foreign)] = foreign

    async def again() -> None:
        async with replica_of(plan_of(source, destination)) as replica:
            assert replica.status().hydrated_bytes == 2 * BLOCK_SIZE
            assert await replica.volume.read(0, len(DATA)) == expected

    trio.run(again)


def test_another_program_that_wrote_after_a_clean_end_refuses(source: Path, destination: Path) -> None:
    write(source, destination, AT)
    with destination.open("r+b") as file:
        file.write(b"x")
    assert_refuses(plan_of(source, destination), "another program has written to")


# What goes on


def complete(source: Path, destination: Path) -> None:
    async def main() -> None:
        async with replica_of(plan_of(source, destination, hydrate=True)) as replica:
            await replica.volume.write(AT, MINE)
            await replica.wait_complete()

    trio.run(main)


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_complete_copy_needs_no_source(how: str, source: Path, destination: Path) -> None:
    complete(source, destination)
    if how == "changed":
        source.write_bytes(support.noise(len(DATA), seed=9))
    else:
        source.unlink()
    assert_serves(plan_of(source, destination), AT)
    write(source, destination, AT + PAGE)
    assert_serves(plan_of(source, destination), AT, AT + PAGE)


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_larger_disk_locks_nobody_out(
    is_whole: bool, source: Path, destination: Path, loop_device: Callable[..., str]
) -> None:
    """Its user may have enlarged it. A smaller one has lost something."""
    os.truncate(destination, BLOCKS * BLOCK_SIZE)
    device = Path(loop_device(destination))
    write(source, device, AT)
    if is_whole:
        complete(source, device)
    for size, is_usable in ((2 * len(DATA), True), (len(DATA) + BLOCK_SIZE, True), (4 * BLOCK_SIZE, False)):
        os.truncate(destination, size // 512 * 512)
        support.output("losetup", "--set-capacity", device)
        if is_usable:
            assert_serves(plan_of(source, device), AT)
        else:
            assert_refuses(plan_of(source, device), "size was")


@pytest.mark.parametrize("is_nameless", [False, True])
def test_a_device_that_only_its_number_tells_is_warned_of(
    is_nameless: bool,
    source: Path,
    destination: Path,
    loop_device: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    os.truncate(destination, BLOCKS * BLOCK_SIZE)
    device = Path(loop_device(destination))
    if is_nameless:
        monkeypatch.setattr(identity, "_kernel_name", lambda _: None)
    write(source, device, AT)
    number = device.stat().st_rdev
    words = f"its number, {os.major(number)}:{os.minor(number)}, guards"
    assert (words in caplog.text) == is_nameless


def test_a_mount_that_is_in_use_is_named_and_no_option_that_verify_lacks(source: Path, destination: Path) -> None:
    async def main() -> None:
        async with replica_of(plan_of(source, destination)) as replica:
            await replica.volume.write(AT, MINE)
            with open_source(str(destination)) as device, pytest.raises(StateError, match="in use") as caught:
                recorded_user_pages(device, Geometry(len(DATA)))
            assert "umount" in str(caught.value)
            assert "--state" not in str(caught.value)

    trio.run(main)


def test_writes_that_were_not_flushed_do_not_spoil_the_record_of_a_crash(source: Path, destination: Path) -> None:
    """They change blocks of the sample, and the times of the file. What was flushed is there, and no other page."""
    write(source, destination, AT)

    async def crash() -> None:
        nonlocal files
        async with replica_of(plan_of(source, destination)) as replica:
            await replica.volume.read(0, BLOCK_SIZE)
            await replica.commit()
            files = saved()
            for offset in (0, len(DATA) // PAGE * PAGE - PAGE):  # both are in the sample
                await replica.volume.write(offset, MINE)

    files: Files = {}
    trio.run(crash)
    restore(files)
    # Of a present block, an unflushed write may be there; of a missing one, the source's bytes come back.
    assert_serves(plan_of(source, destination), 0, AT)


def test_a_crash_just_before_the_note_loses_no_later_write(source: Path, destination: Path) -> None:
    """The state file says already that there are writes, and there is no note: none has begun."""
    files: Files = {}

    async def crash() -> None:
        async with replica_of(plan_of(source, destination)) as replica:
            await replica.volume.write(AT, MINE)
            files.update({name: content for name, content in saved().items() if not name.endswith(".writes")})

    trio.run(crash)
    destination.write_bytes(OLD)
    os.removexattr(destination, "user.blockcopy.writes")
    restore(files)
    for offsets in ([], [AT], [AT + PAGE]):
        write(source, destination, *offsets)
    assert_serves(plan_of(source, destination), AT, AT + PAGE)


# Discarding


@pytest.mark.parametrize("spoil", [None, remove, truncate, flip, text])
def test_discarded_writes_are_gone(spoil: Callable[[Path], None] | None, source: Path, destination: Path) -> None:
    write(source, destination, AT)
    if spoil is not None:
        spoil(state_file())
    with open_destination(str(destination), with_user_writes=True) as device:
        told = discard_user_writes(device, None)
        assert told.startswith("an unknown number" if spoil else f"{BLOCK_SIZE} bytes")
        assert discard_user_writes(device, None) == ""
    assert_serves(plan_of(source, destination))
    assert_serves(plan_of(source, destination, writable=False, hydrate=True))


def test_programs_are_told_whether_there_are_writes(source: Path, destination: Path) -> None:
    """With --json, as often as they ask; a dry run changes nothing."""
    write(source, destination, AT)
    told = []
    for option in (["--dry-run"], ["--dry-run"], [], ["--dry-run"], []):
        done = run("discard-writes", "--json", *option, destination)
        succeeded(done)
        found = json.loads(done.stdout)
        told.append((found["dry_run"], found["has_writes"]))
    assert told == [(True, True), (True, True), (False, True), (True, False), (False, False)]
    failed(run("discard-writes", "--dry-run", destination), 1, b"holds no writes of a user")


def test_writes_to_a_destination_in_use_are_not_discarded(destination: Path) -> None:
    """The message names the mount that most likely holds it, and no --force, which the command lacks."""
    with destination.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        done = run("discard-writes", destination)
    failed(done, 1, b"blockcopy umount")
    assert b"--force" not in done.stderr


def test_the_state_file_of_another_destination_is_not_discarded(tmp_path: Path, source: Path) -> None:
    first, second = (support.written(tmp_path / name, bytes(len(DATA))) for name in ("first", "second"))
    write(source, first, AT)
    with open_destination(str(first), with_user_writes=True) as device:
        state = default_path(device)
    with open_destination(str(second)) as device, pytest.raises(StateError, match="another destination"):
        discard_user_writes(device, str(state))
    assert state.exists()


@pytest.mark.parametrize("is_read_only", [True, False])
def test_a_device_that_was_in_use_during_an_earlier_copy_is_compared_anew(
    is_read_only: bool, tmp_path: Path, destination: Path, loop_device: Callable[[Path], str]
) -> None:
    """Its sample does not show a write elsewhere. Only a read-only mount may rely on a source at rest."""
    size = len(DATA) // PAGE * PAGE
    device = loop_device(support.written(tmp_path / "disk", DATA[:size]))
    between = next(
        each for each in range(PAGE, size, PAGE) if not any(each == offset for offset, _ in sample_extents(size))
    )

    async def read(**options: Any) -> bytes:
        async with replica_of(plan_of(device, destination, **options)) as replica:
            return bytes(await replica.volume.read(between, PAGE))

    assert trio.run(lambda: read(writable=False)) == DATA[between : between + PAGE]
    with open(device, "r+b") as file:
        file.seek(between)
        file.write(MINE)
    known = DATA[between : between + PAGE] if is_read_only else MINE
    assert trio.run(lambda: read(writable=not is_read_only)) == known


def test_a_new_file_with_the_inode_of_the_old_one_refuses(source: Path, destination: Path) -> None:
    """A new file has no attribute. After a crash, its times tell nothing."""
    files = write(source, destination, AT)
    restore(files)
    os.removexattr(destination, "user.blockcopy.writes")
    assert_refuses(plan_of(source, destination), "is about an earlier file")
    failed(run("sync", source, destination), 1, "an earlier file. Nothing was changed. To go on, bring back the")
    done = run("discard-writes", destination)
    succeeded(done)
    assert b"threw away a note of writes to an earlier file" in done.stdout


def test_a_state_folder_that_was_brought_back_refuses(source: Path, destination: Path) -> None:
    write(source, destination, AT)
    files = saved()
    write(source, destination, AT + PAGE)
    restore(files)
    assert_refuses(plan_of(source, destination), "is an older one")


def test_a_new_name_and_mode_lock_nobody_out(source: Path, destination: Path) -> None:
    write(source, destination, AT)
    destination.chmod(0o640)
    moved = destination.rename(destination.with_name("moved"))
    assert_serves(plan_of(source, moved), AT)
