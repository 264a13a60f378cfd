"""The state file of a destination: the record of which blocks are present and durable, and of which source.

The file is an SQLite database with four tables:

- `facts` has one row of JSON: the source and destination of the record, and the times of the destination. It also
tells whether the user has written, and how often the record was written.

- `chunks` has the bits of the block map, CHUNK_BLOCKS blocks per row. A chunk with no present block is not stored.

- `pages` and `lost` have the bits of the user's pages, and of those that a failed sync lost. See `user_pages`.

A row whose bits are all set is stored empty. SQLite makes each commit atomic, also if the power fails. Its
write-ahead log needs one sync for a commit. The log ends with the run, or with the next run after a crash. Each row
has a seal, a checksum with the token of its record as key. A seal finds what SQLite does not: a flipped bit, or a
row of another file. A file with any such fault is renamed and kept. It is never overwritten and never believed.

Any thread may call any method, one thread at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockcopy.block.identity import Identity, is_identity
from blockcopy.block.records import FilesInPlace, invalidate
from blockcopy.errors import StateBusyError, StateUnusableError, StateWriteError
from blockcopy.paths import durable
from blockcopy.protocol.strict_json import parse_object
from blockcopy.replica.state import sqlite_files
from blockcopy.replica.state.bits import ROW_BYTES
from blockcopy.replica.state.blockmap import CHUNK_BLOCKS, Changes
from blockcopy.untrusted_text import printable

logger = logging.getLogger(__name__)

_TABLES = Changes._fields
"""The tables of rows of bits."""

_LOG_PAGES = 64
"""Pages of the log after which it is written back and overwritten from its start.

On a disk, a commit that makes the log longer takes twice as long. The file system then records the new size, too.
Source: https://www.sqlite.org/pragma.html#pragma_wal_autocheckpoint
"""

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS facts (id INTEGER PRIMARY KEY, text TEXT NOT NULL, seal BLOB NOT NULL);
{
    " ".join(
        f"CREATE TABLE IF NOT EXISTS {table} (number INTEGER PRIMARY KEY, bits BLOB NOT NULL, seal BLOB NOT NULL);"
        for table in _TABLES
    )
}
PRAGMA application_id = {sqlite_files.APPLICATION_ID};
PRAGMA user_version = {sqlite_files.FORMAT};
"""


@dataclass(frozen=True)
class Binding:
    """The source and destination that a record is about. The sizes are bytes."""

    source: Identity
    destination: Identity
    destination_size: int
    block_size: int


@dataclass(frozen=True)
class WriteTimes:
    """The times when a destination file was written, in nanoseconds. A block device has no such times.

    `mtime_ns`, `ctime_ns`: the durable times of the file. `until_ns`: this program may have written until that time
    of the system's clock. `until_ns` is None once the file is closed, with exactly these times.
    """

    mtime_ns: int
    ctime_ns: int
    until_ns: int | None


@dataclass(frozen=True)
class Record:
    """The content of a state file.

    `rows`: for `BlockMap.resume`. `has_user_writes`: whether the destination holds writes of a user.
    `names`: the source and the path of the destination, as the user named them. Empty texts if unknown.
    `was_killed`: whether a run with such writes has ended without its last record. It may have left writes on the
    destination that are not on record.
    """

    binding: Binding
    times: WriteTimes
    rows: Changes
    has_user_writes: bool = False
    was_killed: bool = False
    names: tuple[str, str] = ("", "")


class StateFile:
    """An open state file, which this process alone can use.

    The attribute `record` is its content when it was opened, or None.
    """

    def __init__(self, path: Path, *, must_be_usable: bool = False) -> None:
        """Open or create the state file at `path`, a Path. Renames a file that cannot be believed, and logs why.

        `must_be_usable`: raise StateUnusableError instead if the file is missing or cannot be believed.
        Raises StateBusyError if another process uses the file, StateError if it is not a regular file. Raises
        StateWriteError if the file cannot be written, or if other users can replace it.
        """
        self.path = path = path.parent.resolve() / path.name
        self.record: Record | None = None
        self.is_stuck = False
        """Set it if a call in another thread may never return. From then on `close` does nothing."""
        self.token = ""
        """The random token of this record, which no other record has, not even an earlier one of this file."""
        self._facts: dict[str, Any] = {}
        self._is_prepared = False
        self.commits = 0
        """How often the record was written."""
        if must_be_usable and not os.path.lexists(path):
            raise StateUnusableError(f"the state file {path} is missing")
        try:
            self._db = self._open()
        except sqlite_files.UnusableError as error:
            if must_be_usable:
                raise StateUnusableError(f"the state file {path} cannot be used ({error})") from error
            aside = sqlite_files.set_aside(path)
            logger.warning(
                "the state file %s cannot be used (%s); it is kept as %s. Checking every block again",
                path,
                error,
                aside,
            )
            self._db = self._open_new()
        self._files = FilesInPlace(path)

    def _open(self) -> sqlite3.Connection:
        made = sqlite_files.make(self.path)
        size = 0 if made else sqlite_files.check(self.path)
        if not (made or size):
            logger.warning("the state file %s is empty. Checking every block", self.path)
        db = self._connect()
        try:
            self.record = self._load(db, is_new=size == 0)
        except (sqlite3.Error, UnicodeError) as error:  # a message of SQLite may quote damaged bytes
            db.close()
            code = getattr(error, "sqlite_errorcode", None)
            if code == sqlite3.SQLITE_BUSY:
                raise StateBusyError(f"the state file {self.path} is in use by another process") from error
            if made:
                durable.remove(self.path)
                raise StateWriteError(f"cannot keep the state in {self.path}: {error}") from error
            raise sqlite_files.UnusableError(str(error)) from error
        except BaseException:
            db.close()
            raise
        self._made = made
        return db

    def _open_new(self) -> sqlite3.Connection:
        try:
            return self._open()
        except sqlite_files.UnusableError as error:
            raise StateWriteError(f"cannot keep the state in {self.path}: {error}") from error

    def _connect(self) -> sqlite3.Connection:
        try:
            return sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise sqlite_files.UnusableError(str(error)) from error

    def _load(self, db: sqlite3.Connection, *, is_new: bool) -> Record | None:
        """Lock the database `db` for this process. Returns its record, or None if it has none.

        `is_new`: make the tables first. Raises sqlite3.Error.
        """
        for pragma in ("locking_mode = EXCLUSIVE", "synchronous = EXTRA"):
            db.execute(f"PRAGMA {pragma}")
        if not is_new:
            (pages,) = db.execute("PRAGMA page_count").fetchone()
            is_new = not pages  # SQLite has rolled it back: the run that created the file was cut off in between
        if is_new:
            db.executescript(f"BEGIN EXCLUSIVE; {_SCHEMA} COMMIT;")
            return None
        record = self._read(db)  # a file that cannot be believed is not written to
        db.executescript("BEGIN EXCLUSIVE; COMMIT;")  # the locking mode keeps this lock until the file is closed
        return record

    def _prepare(self) -> None:
        """Bring the file to this format, and begin the log, before the first write. Raises sqlite3.Error.

        Not when the file is opened: on a full disk, a record that can be read is believed.
        """
        if not self._is_prepared:
            self._db.executescript(f"BEGIN EXCLUSIVE; {_SCHEMA} COMMIT;")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
            self._is_prepared = True

    def _read(self, db: sqlite3.Connection) -> Record | None:
        (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite_files.UnusableError(f"it is damaged: {found}")
        row = db.execute("SELECT text, seal FROM facts").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        tables = _TABLES if version == sqlite_files.FORMAT else _TABLES[:1]
        rows = {table: db.execute(f"SELECT number, bits, seal FROM {table}").fetchall() for table in tables}
        if row is None and not any(rows.values()):
            return None  # the process that created the file ended early
        try:
            return self._believe(row, rows)
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            raise sqlite_files.UnusableError("it is damaged") from error

    def _believe(self, row: tuple[str, bytes], rows: dict[str, list[tuple[int, bytes, bytes]]]) -> Record:
        text, seal = row
        if seal != _seal("facts", text.encode()):
            raise ValueError("the facts")
        facts = parse_object(text.encode())
        token = facts["token"]
        believed: dict[str, dict[int, bytes]] = {table: {} for table in _TABLES}
        for table, found in rows.items():
            for number, bits, seal in found:
                if seal != _row_seal(token, table, number, bits):
                    raise ValueError(f"row {number} of {table}")
                believed[table][number] = bits or _full(table)
        binding, written = Binding(**facts["binding"]), WriteTimes(**facts.pop("clock"))
        if not is_identity(binding.source) or not isinstance(binding.destination, dict):
            raise ValueError("the binding")
        times = [written.mtime_ns, written.ctime_ns, written.until_ns if written.until_ns is not None else 0]
        commits, has_user_writes = facts.pop("commits", 0), facts.get("user_writes", False)
        if not all(type(each) is int for each in (binding.destination_size, binding.block_size, commits, *times)):
            raise ValueError("a size or a time")
        was_killed = facts.get("killed", False)
        if not isinstance(has_user_writes, bool) or not isinstance(was_killed, bool):
            raise ValueError("whether there are writes of a user")  # noqa: TRY004  (of data, not of an argument)
        self.token, self._facts, self.commits = token, facts, commits
        was_killed = has_user_writes and (was_killed or written.until_ns is not None)
        names = (str(facts.get("source", "")), str(facts.get("destination", "")))
        return Record(binding, written, Changes(**believed), has_user_writes, was_killed, names)

    def begin_record(self, binding: Binding, times: WriteTimes, names: tuple[str, str] = ("", "")) -> None:
        """Replace the record by a new one about `binding`, without rows.

        `names`: the source and the destination in words. `times`: when the destination was written.
        Raises StateWriteError if the record cannot be written.
        """
        self.token = secrets.token_hex(16)
        source, destination = map(printable, names)
        self._facts = {
            "token": self.token,
            "binding": vars(binding),
            "source": source,
            "destination": destination,
        }
        with self._transaction():
            self._delete_rows()
            self._write_facts(times)

    def note_user_writes(self, times: WriteTimes) -> None:
        """Record that the destination holds writes of a user, and `times`. Raises StateWriteError if that fails."""
        self._facts["user_writes"] = True
        self._facts["killed"] = self.record is not None and self.record.was_killed
        self.write_times(times)

    def write_changes(self, changes: Changes, times: WriteTimes) -> None:
        """Record `changes`, which are durable, and `times`, as `write_times` does.

        Raises StateWriteError if that fails.
        """
        with self._transaction():
            for table, rows in changes._asdict().items():
                stored = [(number, b"" if bits == _full(table) else bits) for number, bits in rows.items()]
                self._db.executemany(
                    f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)",
                    [(number, bits, _row_seal(self.token, table, number, bits)) for number, bits in stored],
                )
            self._write_facts(times)

    def write_times(self, times: WriteTimes) -> None:
        """Record the `times` when the destination was written, or may be. Raises StateWriteError if that fails."""
        with self._transaction():
            self._write_facts(times)

    def check_in_place(self) -> None:
        """Check that the files that were opened are still at their paths. The next run finds no others.

        Raises StateRemovedError if they are not.
        """
        self._files.check()

    def clear(self) -> None:
        """Remove all rows from the record. Raises StateWriteError if that fails."""
        with self._transaction():
            self._delete_rows()

    def _delete_rows(self) -> None:
        for table in _TABLES:
            self._db.execute(f"DELETE FROM {table}")

    def delete(self) -> None:
        """Close and delete the file, if it cannot be written. Raises StateError if it cannot be deleted."""
        self._db.close()
        invalidate(self.path)

    def close(self) -> None:
        """Close the file. Deletes a file that was created here and has no record."""
        if self.is_stuck:
            return
        with contextlib.suppress(sqlite3.Error):  # the log stays then, and the next run reads it
            self._db.execute("PRAGMA journal_mode = DELETE")
        self._db.close()
        if self._made and not self._facts:
            durable.remove(self.path)

    def _write_facts(self, times: WriteTimes) -> None:
        self.commits += 1
        text = json.dumps({**self._facts, "commits": self.commits, "clock": vars(times)})
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (1, ?, ?)", (text, _seal("facts", text.encode())))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            try:
                self._prepare()
                self._db.execute("BEGIN")
                yield
                self._db.execute("COMMIT")
                self._files.add(sqlite_files.log_of(self.path))
                self.check_in_place()
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise StateWriteError(f"cannot record in the state file {self.path}: {error}") from error


def _full(table: str) -> bytes:
    """Return a row of `table` whose bits are all set."""
    return b"\xff" * (CHUNK_BLOCKS // 8 if table == "chunks" else ROW_BYTES)


def _row_seal(token: str, table: str, number: int, bits: bytes) -> bytes:
    """Return the seal of the row `number` with `bits` in `table`. `token`: of the record."""
    return _seal(f"{token} {number}" if table == "chunks" else f"{token} {table} {number}", bits)


def _seal(key: str, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, key=hashlib.sha256(key.encode()).digest()).digest()
