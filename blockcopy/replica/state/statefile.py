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
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockcopy.block.identity import Identity, is_identity
from blockcopy.block.records import invalidate
from blockcopy.errors import StateError, StateUnusableError, StateWriteError
from blockcopy.paths import durable
from blockcopy.paths.trust import distrust_reason
from blockcopy.protocol.strict_json import parse_object
from blockcopy.replica.state.bits import ROW_BYTES
from blockcopy.replica.state.blockmap import CHUNK_BLOCKS, Changes

logger = logging.getLogger(__name__)

_APPLICATION_ID = 0x62637079  # "bcpy"
_FORMAT, _OLD_FORMAT = 3, 2
"""The version of the format. Version 1 had no ctime, and version 2 no writes of a user. Version 2 is still read."""

_TABLES = Changes._fields
"""The tables of rows of bits."""

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS facts (id INTEGER PRIMARY KEY, text TEXT NOT NULL, seal BLOB NOT NULL);
{
    " ".join(
        f"CREATE TABLE IF NOT EXISTS {table} (number INTEGER PRIMARY KEY, bits BLOB NOT NULL, seal BLOB NOT NULL);"
        for table in _TABLES
    )
}
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_FORMAT};
"""


class _UnusableError(Exception):
    """The content of the file cannot be believed. The message tells why."""


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
    `was_killed`: whether a run with such writes has ended without its last record. It may have left writes on the
    destination that are not on record.
    """

    binding: Binding
    times: WriteTimes
    rows: Changes
    has_user_writes: bool = False
    was_killed: bool = False


class StateFile:
    """An open state file, which this process alone can use.

    The attribute `record` is its content when it was opened, or None.
    """

    def __init__(self, path: Path, *, must_be_usable: bool = False) -> None:
        """Open or create the state file at `path`, a Path. Renames a file that cannot be believed, and logs why.

        `must_be_usable`: raise StateUnusableError instead if the file is missing or cannot be believed.
        Raises StateError if another process uses the file, or if it is not a regular file. Raises StateWriteError
        if the file cannot be written, or if other users can replace it.
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
        except _UnusableError as error:
            if must_be_usable:
                raise StateUnusableError(f"the state file {path} cannot be used ({error})") from error
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
        except (sqlite3.Error, UnicodeError) as error:  # a message of SQLite may quote damaged bytes
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
        """Lock the database `db` for this process. Returns its record, or None if it has none.

        `is_new`: make the tables first. Raises sqlite3.Error.
        """
        for pragma in ("locking_mode = EXCLUSIVE", "synchronous = EXTRA"):
            db.execute(f"PRAGMA {pragma}")
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
            self._is_prepared = True

    def _read(self, db: sqlite3.Connection) -> Record | None:
        (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise _UnusableError(f"it is damaged: {found}")
        row = db.execute("SELECT text, seal FROM facts").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        tables = _TABLES if version == _FORMAT else _TABLES[:1]
        rows = {table: db.execute(f"SELECT number, bits, seal FROM {table}").fetchall() for table in tables}
        if row is None and not any(rows.values()):
            return None  # the process that created the file ended early
        try:
            return self._believe(row, rows)
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            raise _UnusableError("it is damaged") from error

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
        return Record(binding, written, Changes(**believed), has_user_writes, was_killed)

    def begin_record(self, binding: Binding, times: WriteTimes) -> None:
        """Replace the record by a new one about `binding`, without rows.

        `times`: when the destination was written. Raises StateWriteError if the record cannot be written.
        """
        self.token = secrets.token_hex(16)
        self._facts = {"token": self.token, "binding": vars(binding)}
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


def _make(path: Path) -> bool:
    """Create `path` if it does not exist. Returns False if it exists.

    Raises StateError if it is not a regular file. Raises StateWriteError if it cannot be created, or if other users
    can replace it.
    """
    try:
        durable.make_folder(path.parent)
        if why := distrust_reason(
            path.parent
        ):  # or they could replace the file between the check and SQLite's open
            raise StateWriteError(f"cannot keep the state in {path}: {why}")
        durable.create(path)
    except FileExistsError:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise StateError(f"cannot keep the state in {path}: not a regular file") from None
        return False
    except OSError as error:
        raise StateWriteError(f"cannot keep the state in {path}: {error.strerror}") from error
    return True


def _check_files(path: Path) -> int:
    """Check the database `path` and the files beside it, before SQLite opens them: it writes to any database.

    Returns the size of the database in bytes. Raises _UnusableError if a file cannot be believed. The header has
    100 bytes. The write version is at 18, the read version at 19. The user version is at 60, the application id at
    68. Source: https://www.sqlite.org/fileformat.html, section 1.3.
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
    if version not in (_FORMAT, _OLD_FORMAT):
        raise _UnusableError(f"its format is {version}, and this program reads {_FORMAT}")
    if header[18:20] not in (b"\1\1", b"\2\2"):  # 2: a crash has left a write-ahead log
        raise _UnusableError("it is damaged")
    return status.st_size


def _check_owner(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _UnusableError(f"{path} is not a regular file")
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise _UnusableError(f"others can write to {path}")


def _beside(path: Path) -> list[Path]:
    """Return the existing files beside the database `path` that SQLite would read."""
    found = (path.with_name(f"{path.name}-{kind}") for kind in ("journal", "wal", "shm"))
    return [each for each in found if os.path.lexists(each)]


def _set_aside(path: Path) -> Path:
    """Rename `path`, and the files of SQLite beside it, to a free name. Returns the new path."""
    number = 1
    while (aside := path.with_name(f"{path.name}.unusable-{number}")).exists():
        number += 1
    try:
        for each in [path, *_beside(path)]:
            durable.rename(each, path.with_name(each.name.replace(path.name, aside.name, 1)))
    except OSError as error:
        raise StateWriteError(f"cannot set the unusable state file {path} aside: {error.strerror}") from error
    return aside
