"""The state file: which blocks of a destination are right and durable, and of which source.

An SQLite database with two tables. `facts` has one row: what the record is bound to (JSON), and when
the destination was last known to be written by nobody else. `chunks` has the bits of the block map,
CHUNK_BLOCKS blocks a row; a chunk that is wholly present is stored empty, one of which nothing is
known not at all. SQLite makes each commit whole or nothing, also over a loss of power; a check over
each row, keyed with the token of its record, finds what SQLite does not: a bit that flipped, a row
of another file. A file that fails any of it is set aside, never overwritten and never believed.

Every method may be called from any thread, by one at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockcopy.block.identity import Identity, is_identity
from blockcopy.block.records import invalidate
from blockcopy.errors import StateError, StateWriteError
from blockcopy.paths import durable
from blockcopy.paths.trust import distrust_reason
from blockcopy.protocol.strict_json import parse_object
from blockcopy.replica.state.blockmap import CHUNK_BLOCKS

logger = logging.getLogger(__name__)

_APPLICATION_ID = 0x62637079  # "bcpy"
_FORMAT = 2
"""1 had no ctime."""

_SCHEMA = f"""
CREATE TABLE facts (id INTEGER PRIMARY KEY, text TEXT NOT NULL, seal BLOB NOT NULL);
CREATE TABLE chunks (number INTEGER PRIMARY KEY, bits BLOB NOT NULL, seal BLOB NOT NULL);
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_FORMAT};
"""

_FULL = b"\xff" * (CHUNK_BLOCKS // 8)


class _UnusableError(Exception):
    """What is in the file cannot be believed, and why."""


@dataclass(frozen=True)
class Binding:
    """What a record is about. The sizes are bytes."""

    source: Identity
    destination: Identity
    destination_size: int
    block_size: int


@dataclass(frozen=True)
class WriteTimes:
    """When the destination was written, in nanoseconds. Of a file; a device has no such times.

    `mtime_ns`, `ctime_ns`: its times, as they are durable. `until_ns`: we may have written to it since, up to this
    time of the system's clock; None once it is closed, with these times exactly.
    """

    mtime_ns: int
    ctime_ns: int
    until_ns: int | None


@dataclass(frozen=True)
class Record:
    """What an earlier run has left: chunk number → bits, as `BlockMap.resume` takes them."""

    binding: Binding
    clock: WriteTimes
    chunks: dict[int, bytes]


class StateFile:
    """One state file, kept by this process alone as long as it is open; `record` is what was in it."""

    def __init__(self, path: Path) -> None:
        """Open or create `path`; a file that cannot be believed is set aside, and the log says why.

        StateError where another process keeps it or it is no regular file, StateWriteError where
        it cannot be written, or others decide what is there.
        """
        self.path = path = path.parent.resolve() / path.name
        self.record: Record | None = None
        self.is_stuck = False
        """A call of another thread may never return: from then on `close` does nothing."""
        self._token = ""
        self._facts: dict[str, Any] = {}
        try:
            self._db = self._open()
        except _UnusableError as error:
            aside = _set_aside(path)
            logger.warning(
                "the state file %s cannot be used (%s); it is kept as %s. Checking every block again",
                path,
                error,
                aside,
            )
            self._db = self._open_new()

    def _open(self) -> sqlite3.Connection:
        made = _make(self.path)
        size = 0 if made else _check_files(self.path)
        if not (made or size):
            logger.warning("the state file %s is empty. Checking every block", self.path)
        db = self._connect()
        try:
            self.record = self._load(db, is_new=size == 0)
        except (sqlite3.Error, UnicodeError) as error:  # a message of SQLite's can have the damage in it
            db.close()
            code = getattr(error, "sqlite_errorcode", None)
            if code == sqlite3.SQLITE_BUSY:
                raise StateError(
                    f"the state file {self.path} is in use by another process; name another with --state"
                ) from error
            if made:
                durable.remove(self.path)
                raise StateWriteError(f"cannot keep the state in {self.path}: {error}") from error
            raise _UnusableError(str(error)) from error
        except BaseException:
            db.close()
            raise
        self._made = made
        return db

    def _open_new(self) -> sqlite3.Connection:
        try:
            return self._open()
        except _UnusableError as error:
            raise StateWriteError(f"cannot keep the state in {self.path}: {error}") from error

    def _connect(self) -> sqlite3.Connection:
        try:
            return sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise _UnusableError(str(error)) from error

    def _load(self, db: sqlite3.Connection, *, is_new: bool) -> Record | None:
        """What is recorded; the file is this process's own from now on. Raises sqlite3.Error."""
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = DELETE", "synchronous = EXTRA"):
            db.execute(f"PRAGMA {pragma}")
        if is_new:
            db.executescript(f"BEGIN EXCLUSIVE; {_SCHEMA} COMMIT;")
            return None
        record = self._read(db)  # with a lock of its own; what cannot be believed is not written to
        db.execute("BEGIN EXCLUSIVE")  # and the locking mode keeps it, until it is closed
        db.execute("COMMIT")
        return record

    def _read(self, db: sqlite3.Connection) -> Record | None:
        (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise _UnusableError(f"it is damaged: {found}")
        row = db.execute("SELECT text, seal FROM facts").fetchone()
        chunks = db.execute("SELECT number, bits, seal FROM chunks").fetchall()
        if row is None and not chunks:
            return None  # whoever made it ended before anything was known
        try:
            return self._believe(row, chunks)
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            raise _UnusableError("it is damaged") from error

    def _believe(self, row: tuple[str, bytes], chunks: list[tuple[int, bytes, bytes]]) -> Record:
        text, seal = row
        if seal != _seal("facts", text.encode()):
            raise ValueError("the facts")
        facts = parse_object(text.encode())
        token = facts["token"]
        believed = {}
        for number, bits, seal in chunks:
            if seal != _seal(f"{token} {number}", bits):
                raise ValueError(f"chunk {number}")
            believed[number] = bits or _FULL
        binding, clock = Binding(**facts["binding"]), WriteTimes(**facts.pop("clock"))
        if not is_identity(binding.source) or not isinstance(binding.destination, dict):
            raise ValueError("what it is about")
        times = [clock.mtime_ns, clock.ctime_ns, clock.until_ns if clock.until_ns is not None else 0]
        if not all(type(each) is int for each in (binding.destination_size, binding.block_size, *times)):
            raise ValueError("a size or a time")
        self._token, self._facts = token, facts
        return Record(binding, clock, believed)

    @property
    def token(self) -> str:
        """Return the token that tells this record from all others, also from earlier ones of the same file."""
        return self._token

    def begin_record(self, binding: Binding, clock: WriteTimes) -> None:
        """Begin a new record, of which no block is known yet. Raises StateWriteError, here and below."""
        self._token = secrets.token_hex(16)
        self._facts = {"token": self._token, "binding": vars(binding)}
        with self._transaction():
            self._db.execute("DELETE FROM chunks")
            self._write_clock(clock)

    def write_chunks(self, chunks: Mapping[int, bytes], clock: WriteTimes) -> None:
        """Record `chunks`, which are durable on the destination."""
        rows = []
        for number, bits in chunks.items():
            stored = b"" if bits == _FULL else bits
            rows.append((number, stored, _seal(f"{self._token} {number}", stored)))
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO chunks VALUES (?, ?, ?)", rows)
            self._write_clock(clock)

    def write_times(self, clock: WriteTimes) -> None:
        """Record when the destination was written, and will be."""
        with self._transaction():
            self._write_clock(clock)

    def clear(self) -> None:
        """Nothing of what is recorded is known any more."""
        with self._transaction():
            self._db.execute("DELETE FROM chunks")

    def delete(self) -> None:
        """Have no record any more, where none can be written. StateError."""
        self._db.close()
        invalidate(self.path)

    def close(self) -> None:
        """A file that was made here and has nothing in it does not stay."""
        if self.is_stuck:
            return
        self._db.close()
        if self._made and not self._facts:
            durable.remove(self.path)

    def _write_clock(self, clock: WriteTimes) -> None:
        text = json.dumps({**self._facts, "clock": vars(clock)})
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (1, ?, ?)", (text, _seal("facts", text.encode())))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise StateWriteError(f"cannot record in the state file {self.path}: {error}") from error


def _seal(key: str, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, key=hashlib.sha256(key.encode()).digest()).digest()


def _make(path: Path) -> bool:
    """Have a file at `path`; True where it was not there. StateError, StateWriteError."""
    try:
        durable.make_folder(path.parent)
        if why := distrust_reason(path.parent):  # or else they could change what SQLite opens after we looked at it
            raise StateWriteError(f"cannot keep the state in {path}: {why}")
        durable.create(path)
    except FileExistsError:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise StateError(f"cannot keep the state in {path}: that is no regular file") from None
        return False
    except OSError as error:
        raise StateWriteError(f"cannot keep the state in {path}: {error.strerror}") from error
    return True


def _check_files(path: Path) -> int:
    """Look at all files that SQLite would read, which writes to any database that it opens.

    Returns the size of the database. Raises _UnusableError. From https://www.sqlite.org/fileformat.html, 1.3: 100
    bytes; how it is written at 18 and 19, the user's version at 60, the application's id at 68.
    """
    try:
        for each in _beside(path):
            _check_owner(each, each.lstat())
        with path.open("rb") as file:
            status, header = os.fstat(file.fileno()), file.read(100)
    except OSError as error:
        raise _UnusableError(str(error.strerror)) from error
    _check_owner(path, status)
    if not header:
        return 0
    if header[:16] != b"SQLite format 3\0" or header[68:72] != _APPLICATION_ID.to_bytes(4, "big"):
        raise _UnusableError("it is not a state file of blockcopy")
    version = int.from_bytes(header[60:64], "big")
    if version != _FORMAT:
        raise _UnusableError(f"its format is {version}, and this program knows {_FORMAT}")
    if header[18:20] != b"\1\1":  # a write-ahead log, which we never have, would be written back
        raise _UnusableError("it is damaged")
    return status.st_size


def _check_owner(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _UnusableError(f"{path} is no regular file")
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise _UnusableError(f"others can write to {path}")


def _beside(path: Path) -> list[Path]:
    """Return the files beside a database that SQLite would read, whoever left them."""
    found = (path.with_name(f"{path.name}-{kind}") for kind in ("journal", "wal", "shm"))
    return [each for each in found if os.path.lexists(each)]


def _set_aside(path: Path) -> Path:
    """Rename `path` to a name that is free; what SQLite left beside it belongs to it, and goes too."""
    number = 1
    while (aside := path.with_name(f"{path.name}.unusable-{number}")).exists():
        number += 1
    try:
        for each in [path, *_beside(path)]:
            durable.rename(each, path.with_name(each.name.replace(path.name, aside.name, 1)))
    except OSError as error:
        raise StateWriteError(f"cannot set the unusable state file {path} aside: {error.strerror}") from error
    return aside
