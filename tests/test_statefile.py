"""The state file by itself: what is recorded is what is read again, and of a damaged one nothing is."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import random
import shutil
import sqlite3
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import support
from hypothesis import given, settings
from hypothesis import strategies as st

from blockcopy.block.device import open_source
from blockcopy.block.geometry import BLOCK_SIZE, Geometry
from blockcopy.block.identity import sample_extents
from blockcopy.block.records import default_path, invalidate
from blockcopy.errors import StateError, StateUnusableError, StateWriteError
from blockcopy.replica.state.blockmap import CHUNK_BLOCKS, BlockMap, Changes
from blockcopy.replica.state.statefile import Binding, Record, StateFile, WriteTimes

FULL = b"\xff" * (CHUNK_BLOCKS // 8)
PARTIAL = random.Random(1).randbytes(len(FULL))
SHORT = random.Random(2).randbytes(905)
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None

CHUNKS = {0: FULL, 1: PARTIAL, 2: SHORT}


def binding(size: int = 40000 * BLOCK_SIZE, inode: int = 3) -> Binding:
    identity = {
        "size": size,
        "sample": ["ab" * 32] * len(sample_extents(size)),
        "inode": inode,
        "mtime_ns": 4,
        "ctime_ns": 5,
    }
    return Binding(identity, {"file": 1, "file_system": "f"}, size, BLOCK_SIZE)


@pytest.fixture
def path() -> Iterator[Path]:
    """Return a folder in memory, if there is one: these tests sync often."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder) / "state"


def clock(time_ns: int, until_ns: int | None = 1 << 62) -> WriteTimes:
    return WriteTimes(time_ns, time_ns + 1, until_ns)


def changes(chunks: dict[int, bytes]) -> Changes:
    """Return `chunks` as changes in which no user has written."""
    return Changes(chunks, {}, {})


def begun(path: Path, chunks: dict[int, bytes] | None = None, *, of: Binding | None = None) -> Record:
    """A record as a run leaves it, and what is read from it."""
    with contextlib.closing(StateFile(path)) as journal:
        journal.begin_record(of or binding(), clock(10))
        journal.write_changes(changes(CHUNKS if chunks is None else chunks), clock(20))
        journal.write_times(clock(30, None))
    record = load(path)
    assert record
    return record


def load(path: Path) -> Record | None:
    with contextlib.closing(StateFile(path)) as journal:
        return journal.record


def is_set_aside(path: Path, data: bytes) -> bool:
    """Return whether the record was set aside: kept unchanged, under another name."""
    found = load(path)
    kept = path.with_name("state.unusable-1")
    return found is None and kept.exists() and kept.read_bytes() == data


@contextlib.contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    support.require_root()
    folder.mkdir()
    support.output("mount", "-t", "tmpfs", "-o", f"mode=755,{options}", "tmpfs", folder)
    try:
        yield folder
    finally:
        support.output("umount", folder)


# Round trips


def test_what_is_recorded_is_read_again(path: Path) -> None:
    record = begun(path)
    assert (record.binding, record.rows.chunks) == (binding(), CHUNKS)
    assert record.times == clock(30, None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with contextlib.closing(StateFile(path)) as journal:
        journal.write_times(clock(40))
        journal.write_changes(changes({1: FULL}), clock(50))
    found = load(path)
    assert found
    assert found.rows.chunks == {**CHUNKS, 1: FULL}
    assert found.times == clock(50)
    with contextlib.closing(StateFile(path)) as journal:
        journal.begin_record(binding(inode=9), clock(60))
    found = load(path)
    assert found
    assert (found.binding, found.rows.chunks) == (binding(inode=9), {})
    assert sorted(each.name for each in path.parent.iterdir()) == ["state"]


def test_a_file_with_nothing_in_it_does_not_stay(path: Path) -> None:
    assert load(path) is None
    assert not path.exists()


def test_sixteen_tebibytes_are_small_and_a_commit_writes_what_changed(path: Path) -> None:
    size = 1 << 44
    blockmap = BlockMap(Geometry(size))
    chunks = dict.fromkeys(range(size // BLOCK_SIZE // CHUNK_BLOCKS), FULL)
    record = begun(path, {number: bits for number, bits in chunks.items() if number != 5000}, of=binding(size))
    blockmap.resume(record.rows)
    assert blockmap.resumed_bytes == size - (2 << 30)
    assert path.stat().st_size < 1 << 20
    before = path.read_bytes()
    with contextlib.closing(StateFile(path)) as journal:
        journal.write_changes(changes({5000: PARTIAL}), clock(40))
    after = path.read_bytes()
    pages = range(0, max(len(before), len(after)), 4096)
    assert sum(before[at : at + 4096] != after[at : at + 4096] for at in pages) <= 10
    found = load(path)
    assert found
    assert found.rows.chunks == {**chunks, 5000: PARTIAL}


TIMES = st.integers(0, 1 << 62)
BITS = st.sampled_from([FULL, PARTIAL, SHORT, bytes(len(FULL))])
STEPS = st.one_of(
    st.tuples(st.just("begin"), st.integers(0, 3)),
    st.tuples(st.just("add"), st.dictionaries(st.integers(0, 5), BITS, max_size=4)),
    st.tuples(st.just("tell"), st.builds(WriteTimes, TIMES, TIMES, st.none() | TIMES)),
    st.tuples(st.sampled_from(["forget", "reopen"]), st.none()),
)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(st.lists(STEPS, max_size=20))
def test_any_steps_leave_what_a_dictionary_would(steps: list[tuple[str, Any]]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, contextlib.ExitStack() as stack:
        path = Path(folder) / "state"
        journal = stack.enter_context(contextlib.closing(StateFile(path)))
        model: dict[str, Any] = {}
        for step, value in [*steps, ("reopen", None)]:
            if step == "begin":
                model = {"binding": binding(inode=value), "clock": clock(7), "chunks": {}}
                journal.begin_record(model["binding"], clock(7))
            elif step == "forget":
                model["chunks"] = {}
                journal.clear()
            elif step == "reopen":
                journal.close()
                journal = stack.enter_context(contextlib.closing(StateFile(path)))
                found = journal.record
                if "binding" not in model:
                    assert found is None
                else:
                    assert found
                    assert found.binding == model["binding"]
                    assert found.rows.chunks == model["chunks"]
                    assert found.times == model["clock"]
            elif "binding" not in model:
                continue  # nobody does it before
            elif step == "add":
                model["chunks"].update(value)
                model["clock"] = clock(11)
                journal.write_changes(changes(value), clock(11))
            else:
                model["clock"] = value
                journal.write_times(value)


# Writes of a user


PAGES = {0: FULL, 3: PARTIAL, 9: bytes(len(FULL))}
LOST = {3: FULL}


def test_the_pages_of_a_user_are_read_again(path: Path) -> None:
    with contextlib.closing(StateFile(path)) as journal:
        journal.begin_record(binding(), clock(10))
        assert journal.commits == 1
        journal.write_changes(Changes(CHUNKS, PAGES, LOST), clock(20))
        journal.note_user_writes(clock(30))
        journal.write_changes(Changes({}, {3: FULL}, {3: PARTIAL}), clock(40, None))
        assert journal.commits == 4
    with contextlib.closing(StateFile(path)) as journal:
        record = journal.record
        assert record
        assert record.rows == Changes(CHUNKS, {**PAGES, 3: FULL}, {3: PARTIAL})
        assert record.has_user_writes
        assert journal.commits == 4  # it goes on from there
        journal.write_times(clock(50))
        assert journal.commits == 5
    found = load(path)
    assert found
    assert found.has_user_writes
    with contextlib.closing(StateFile(path)) as journal:
        journal.begin_record(binding(), clock(60))
        assert journal.commits == 6
    found = load(path)
    assert found
    assert (found.rows, found.has_user_writes) == (Changes({}, {}, {}), False)


def test_a_row_of_another_table_is_not_believed(path: Path) -> None:
    for sql in (
        "INSERT OR REPLACE INTO lost SELECT * FROM pages",
        "INSERT OR REPLACE INTO pages SELECT * FROM lost",
        "INSERT OR REPLACE INTO chunks SELECT * FROM pages",
    ):
        with contextlib.closing(StateFile(path)) as journal:
            journal.begin_record(binding(), clock(10))
            journal.write_changes(Changes(CHUNKS, {7: FULL}, {8: FULL}), clock(20))
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.executescript(sql)
        with pytest.raises(StateUnusableError, match="it is damaged"):
            StateFile(path, must_be_usable=True)
        path.unlink()


def test_what_must_be_usable_is_neither_made_nor_set_aside(path: Path) -> None:
    with pytest.raises(StateUnusableError, match="is missing"):
        StateFile(path, must_be_usable=True)
    path.write_text("my diary")
    with pytest.raises(StateUnusableError, match="cannot be used"):
        StateFile(path, must_be_usable=True)
    assert [each.name for each in path.parent.iterdir()] == ["state"]
    path.unlink()
    record = begun(path)
    with contextlib.closing(StateFile(path, must_be_usable=True)) as journal:
        assert journal.record == record


def test_the_log_is_overwritten_and_does_not_grow(path: Path) -> None:
    """The file system then has no new size to record: a flush takes half the time."""
    log, sizes = path.with_name("state-wal"), []
    with contextlib.closing(StateFile(path)) as journal:
        journal.begin_record(binding(), clock(10))
        for number in range(300):
            journal.write_changes(changes({number: FULL}), clock(20 + number))
            sizes.append(log.stat().st_size)
    assert max(sizes) < 400_000


def test_a_crash_leaves_the_log_and_the_next_run_ends_it(path: Path) -> None:
    with contextlib.closing(StateFile(path)) as journal:
        journal.begin_record(binding(), clock(10))
        journal.write_changes(changes(CHUNKS), clock(20))
        assert sorted(each.name for each in path.parent.iterdir()) == ["state", "state-wal"]
        crashed = {each.name: each.read_bytes() for each in path.parent.iterdir()}
    assert [each.name for each in path.parent.iterdir()] == ["state"]
    folder = path.parent / "crashed"
    folder.mkdir()
    for name, content in crashed.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o600)
    found = load(folder / "state")
    assert found
    assert (found.rows.chunks, found.times) == (CHUNKS, clock(20))
    assert [each.name for each in folder.iterdir()] == ["state"]
    assert (folder / "state").read_bytes()[18:20] == b"\1\1"


@pytest.mark.parametrize("kind", ["journal", "wal", "shm"])
def test_a_file_beside_it_that_others_can_write_is_not_believed(kind: str, path: Path) -> None:
    begun(path)
    Path(f"{path}-{kind}").touch()
    Path(f"{path}-{kind}").chmod(0o666)
    assert is_set_aside(path, path.read_bytes())


OLD_SCHEMA = """
CREATE TABLE facts (id INTEGER PRIMARY KEY, text TEXT NOT NULL, seal BLOB NOT NULL);
CREATE TABLE chunks (number INTEGER PRIMARY KEY, bits BLOB NOT NULL, seal BLOB NOT NULL);
PRAGMA application_id = 0x62637079;
PRAGMA user_version = 2;
"""
"""Format 2, of blockcopy before there was a writable replica."""

OLD_FACTS = (
    '{"token": "5e", "binding": {"source": {"size": 5242880000, "sample": %s, "inode": 3, "mtime_ns": 4, '
    '"ctime_ns": 5}, "destination": {"file": 1, "file_system": "f"}, "destination_size": 5242880000, '
    '"block_size": 131072}, "clock": {"mtime_ns": 30, "ctime_ns": 31, "until_ns": null}}'
)


def old_seal(key: str, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, key=hashlib.sha256(key.encode()).digest()).digest()


def test_a_record_of_format_2_is_read_and_brought_to_this_format(path: Path) -> None:
    path.touch(0o600)
    text = OLD_FACTS % json.dumps(binding().source["sample"])
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(OLD_SCHEMA)
        database.execute("INSERT INTO facts VALUES (1, ?, ?)", [text, old_seal("facts", text.encode())])
        for number, bits in {**CHUNKS, 0: b""}.items():  # a full chunk is stored empty
            seal = old_seal(f"5e {number}", bits)
            database.execute("INSERT INTO chunks VALUES (?, ?, ?)", [number, bits, seal])
        database.commit()
    before = path.read_bytes()
    expected = Record(binding(), clock(30, None), changes(CHUNKS))
    assert load(path) == expected
    assert path.read_bytes() == before  # until the first write
    with contextlib.closing(StateFile(path)) as journal:
        journal.write_changes(Changes({}, PAGES, {}), clock(40, None))
        journal.note_user_writes(clock(40, None))
    found = load(path)
    assert found
    assert (found.rows, found.has_user_writes) == (Changes(CHUNKS, PAGES, {}), True)
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (3,)


# Who may have it


HOLD = "import sys; from pathlib import Path; from blockcopy.replica.state.statefile import StateFile\n"
HOLD += "journal = StateFile(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"


def test_one_process_at_a_time(path: Path) -> None:
    record = begun(path)
    command = [support.PYTHON, "-P", "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        before = path.read_bytes()
        with pytest.raises(StateError, match="in use by another process") as error:
            StateFile(path)
        assert not isinstance(error.value, StateWriteError)  # the copy would go on
        assert path.read_bytes() == before
        process.communicate()
    assert load(path) == record


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_what_others_can_write_is_not_believed(mode: int, path: Path) -> None:
    begun(path)
    path.chmod(mode)
    assert is_set_aside(path, path.read_bytes())


def test_a_file_of_somebody_else_is_not_believed(path: Path) -> None:
    support.require_root()
    begun(path)
    os.chown(path, 1234, 1234)
    assert is_set_aside(path, path.read_bytes())


@pytest.mark.parametrize("kind", ["folder", "device", "pipe", "dangling link"])
def test_what_is_no_regular_file_is_refused(kind: str, path: Path) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null" if kind == "device" else "nowhere")
    with pytest.raises(StateError, match="not a regular file"):
        StateFile(path)
    assert [each.name for each in path.parent.iterdir()] == ["state"]


def test_where_nothing_can_be_written_no_state_is_kept(path: Path) -> None:
    with tmpfs(path, "size=1m") as folder:
        record = begun(folder / "old")
        (folder / "text").write_text("my diary")
        before = (folder / "old").read_bytes()
        support.output("mount", "-o", "remount,ro", folder)
        for each in ("new", "deeper/new", "text"):
            with pytest.raises(StateWriteError):
                StateFile(folder / each)
        with contextlib.closing(StateFile(folder / "old")) as journal:
            assert journal.record == record
            with pytest.raises(StateWriteError):
                journal.write_times(clock(40))
            with pytest.raises(StateWriteError):
                journal.begin_record(binding(inode=9), clock(50))
            with pytest.raises(StateError, match="is no longer valid, and cannot be removed"):
                journal.delete()
        assert (folder / "old").read_bytes() == before
        assert sorted(each.name for each in folder.iterdir()) == ["old", "text"]


def filled(folder: Path) -> None:
    with (folder / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while ballast.write(bytes(4096)):
            pass


def test_a_full_disk_leaves_what_was_recorded(path: Path) -> None:
    with tmpfs(path, "size=256k") as folder:
        record = begun(folder / "old")
        with contextlib.closing(StateFile(folder / "old")) as journal:
            filled(folder)
            for write in (
                lambda: journal.write_changes(changes({7: PARTIAL}), clock(40)),
                lambda: journal.begin_record(binding(inode=9), clock(50)),
                lambda: journal.write_times(clock(60)),
                journal.clear,
            ):
                with pytest.raises(StateWriteError, match="cannot record in"):
                    write()
        assert load(folder / "old") == record
        with pytest.raises(StateWriteError):
            StateFile(folder / "new")
        assert sorted(each.name for each in folder.iterdir()) == ["ballast", "old"]


# What is not ours


DEEP: Any = functools.reduce(lambda inner, _: [inner], range(100), 0)


@pytest.mark.parametrize(
    "odd",
    [
        {"mtime_ns": "10"},
        {"ctime_ns": 1.5},
        {"until_ns": []},
        {"until_ns": True},
        {"destination_size": None},
        {"block_size": {}},
        {"destination": [DEEP]},
        {"source": {**binding().source, "id": DEEP}},
        {"source": {**binding().source, "mtime_ns": float("nan")}},
        {"source": {**binding().source, "inode": 1 << 64}},
    ],
    ids=lambda odd: next(iter(odd)),
)
def test_facts_of_another_kind_are_set_aside(path: Path, odd: dict[str, Any]) -> None:
    """They are sealed, as by a newer version or by a hand that knows how."""
    of_clock = {name: value for name, value in odd.items() if name.endswith("_ns")}
    of_binding = {name: value for name, value in odd.items() if name not in of_clock}
    with contextlib.closing(StateFile(path)) as journal:
        journal.begin_record(replace(binding(), **of_binding), replace(clock(10), **of_clock))
    assert is_set_aside(path, path.read_bytes())


def test_a_text_is_set_aside_with_what_is_beside_it(path: Path) -> None:
    path.write_text("my diary\n" * 1000)
    Path(f"{path}-journal").write_text("and more of it")
    assert is_set_aside(path, b"my diary\n" * 1000)
    assert path.with_name("state.unusable-1-journal").read_text() == "and more of it"


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
@pytest.mark.parametrize("in_use", [True, False])
def test_another_programs_database_is_not_touched(mode: str, in_use: bool, path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA journal_mode = {mode}")
        database.execute("CREATE TABLE diary (text)")
        database.execute("INSERT INTO diary VALUES ('dear diary')")
        database.commit()
        before = {each.name: each.read_bytes() for each in path.parent.iterdir()}
        if in_use:  # and not yet checkpointed
            assert load(path) is None
    if not in_use:
        before = {path.name: path.read_bytes()}
        assert load(path) is None
    after = {each.name.replace(".unusable-1", ""): each.read_bytes() for each in path.parent.iterdir()}
    if in_use and mode == "WAL":
        assert len(before) == 3
        del before["state-shm"], after["state-shm"]  # the database's own locks
    assert all(after.get(name) == data for name, data in before.items())


def test_a_newer_format_is_not_believed(path: Path) -> None:
    begun(path)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 4")
    assert is_set_aside(path, path.read_bytes())


def test_a_file_whose_making_was_cut_off_is_made_again(path: Path) -> None:
    """SQLite rolls such a file back to nothing: its journal says that the database had no page before."""
    begun(path)
    header = bytes.fromhex("d9d505f920a163d7") + struct.pack(">5I", 0, 1, 0, 512, 4096)
    journal = path.with_name("state-journal")
    journal.write_bytes(header.ljust(512, b"\0"))
    journal.chmod(0o600)
    assert load(path) is None
    assert begun(path).rows.chunks == CHUNKS
    assert [each.name for each in path.parent.iterdir()] == ["state"]


def test_an_empty_file_becomes_one(path: Path) -> None:
    path.touch(0o600)
    assert load(path) is None
    assert begun(path).rows.chunks == CHUNKS
    assert [each.name for each in path.parent.iterdir()] == ["state"]


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT OR REPLACE INTO chunks SELECT * FROM other.chunks WHERE number = 1",
        "INSERT OR REPLACE INTO facts SELECT * FROM other.facts",
        "UPDATE chunks SET number = 5 WHERE number = 1",
        "UPDATE chunks SET bits = x'' WHERE number = 1",
        "UPDATE facts SET text = replace(text, '\"inode\": 3', '\"inode\": 5')",
        "DELETE FROM facts",
    ],
)
def test_rows_that_belong_elsewhere_are_not_believed(sql: str, path: Path) -> None:
    begun(path)
    other = path.with_name("other")
    begun(other, {1: FULL})
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("ATTACH ? AS other", [str(other)])
        database.execute(sql)
        database.commit()
    assert is_set_aside(path, path.read_bytes())


def test_what_a_killed_commit_left_beside_a_retired_record_does_not_come_back(path: Path) -> None:
    begun(path)
    hot = Path(f"{path}-journal")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA cache_size = 1")
        database.execute("BEGIN")
        for number in range(3, 200):
            database.execute("INSERT INTO chunks VALUES (?, ?, x'00')", [number, PARTIAL])
        left = hot.read_bytes()
        database.execute("ROLLBACK")
    assert int.from_bytes(left[8:12], "big") > 0  # pages to roll back
    invalidate(path)
    hot.write_bytes(left)
    assert begun(path, {4: PARTIAL}).rows.chunks == {4: PARTIAL}
    assert not hot.exists()


# Damage


class Damaged:
    """Loads what is left of one state file: the whole record, or nothing and the file set aside."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder = path.parent
        self.record = begun(path)
        self.data = path.read_bytes()

    def verdict(self, data: bytes) -> str:
        """Return what is wrong with the result, or an empty text."""
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        self._path.write_bytes(data)
        self._path.chmod(0o600)
        found, aside = load(self._path), self._path.with_name("state.unusable-1")
        if not data:
            return "believed" if found else ""
        if found is not None:
            return "" if found == self.record and not aside.exists() else f"believed: {found}"
        if not aside.exists():
            return "neither believed nor set aside"
        return "" if aside.read_bytes() == data else "altered"


@pytest.fixture
def damaged(path: Path, caplog: pytest.LogCaptureFixture) -> Damaged:
    made = Damaged(path.parent / "folder/state")
    caplog.set_level(logging.ERROR)  # thousands of warnings
    return made


NO_TABLES = (104, 1)
"""Byte and bit: of two tables, none is left."""


def test_a_file_that_has_lost_its_tables_is_set_aside(damaged: Damaged) -> None:
    at, bit = NO_TABLES
    data = bytearray(damaged.data)
    data[at] ^= 1 << bit
    assert damaged.verdict(bytes(data)) == ""


@pytest.mark.long
def test_no_flipped_bit_is_believed(damaged: Damaged) -> None:
    """Flip a bit of every seventh byte in use, and each bit where the file and its pages describe themselves."""
    used = [at for at, byte in enumerate(damaged.data) if byte or at % 31 == 0][::7]
    flips = [(at, at * 7 % 8) for at in used] + [
        (page + at, bit)
        for page in range(0, len(damaged.data), 4096)
        for at in (range(100, 124) if page == 0 else range(20))
        for bit in range(8)
    ]
    flips += [(at, bit) for at in range(16, 100) for bit in range(8)]
    flips.remove(NO_TABLES)
    verdicts = {}
    for at, bit in flips:
        data = bytearray(damaged.data)
        data[at] ^= 1 << bit
        verdicts[f"bit {bit} of byte {at}"] = damaged.verdict(bytes(data))
    assert {flip: verdict for flip, verdict in verdicts.items() if verdict} == {}


def test_no_truncated_file_is_believed(damaged: Damaged) -> None:
    data, size = damaged.data, len(damaged.data)
    lengths = [0, 1, 15, 16, 99, 100, 101, *range(0, size, 509), *range(0, size, 4096), size - 1]
    verdicts = {f"{length} bytes": damaged.verdict(data[:length]) for length in lengths}
    for at in range(0, size, 512):
        verdicts[f"zeros at {at}"] = damaged.verdict(data[:at] + bytes(512) + data[at + 512 :])
    assert {damage: verdict for damage, verdict in verdicts.items() if verdict} == {}


@pytest.mark.parametrize(
    "change",
    [
        {"binding": 7},
        {"binding": {**vars(binding()), "source": {"size": -1}}},
        {"binding": {**vars(binding()), "more": 1}},
        {"clock": {}},
        {"clock": None},
    ],
    ids=["binding", "source", "more", "clock", "no clock"],
)
def test_facts_that_are_none_are_not_believed(change: dict[str, Any], path: Path) -> None:
    """With a seal that is right: by another program, or a fault of ours."""
    from blockcopy.replica.state.statefile import _seal

    begun(path, {})
    with contextlib.closing(sqlite3.connect(path)) as database:
        ((text,),) = database.execute("SELECT text FROM facts")
        text = json.dumps({**json.loads(text), **change})
        database.execute("UPDATE facts SET text = ?, seal = ?", [text, _seal("facts", text.encode())])
        database.commit()
    assert is_set_aside(path, path.read_bytes())


# Where it is


@pytest.mark.parametrize(
    ("uid", "environment", "folder"),
    [
        (0, {}, "/var/lib/blockcopy"),
        (0, {"XDG_STATE_HOME": "/x", "HOME": "/h"}, "/var/lib/blockcopy"),
        (0, {"STATE_DIRECTORY": "/s/one:/s/two"}, "/s/one"),
        (1000, {"STATE_DIRECTORY": "/s/one", "XDG_STATE_HOME": "/x"}, "/s/one"),
        (1000, {"XDG_STATE_HOME": "/x"}, "/x/blockcopy"),
        (1000, {"HOME": "/h"}, "/h/.local/state/blockcopy"),
    ],
)
def test_the_folder_is_the_users(
    uid: int, environment: dict[str, str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    one, other = support.written(tmp_path / "one", b"1"), support.written(tmp_path / "other", b"1")
    (tmp_path / "link").symlink_to(one)
    with (
        open_source(str(one)) as device,
        open_source(str(tmp_path / "link")) as link,
        open_source(str(other)) as different,
    ):
        assert default_path(device).parent == Path(folder)
        assert default_path(device) == default_path(link)
        assert default_path(device) != default_path(different)


def test_a_retired_record_is_gone(path: Path) -> None:
    invalidate(path)
    begun(path)
    invalidate(path)
    path.symlink_to("nowhere")
    invalidate(path)
    assert list(path.parent.iterdir()) == []
    path.mkdir()
    with pytest.raises(StateError, match="cannot be removed"):
        invalidate(path)
