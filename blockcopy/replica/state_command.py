"""The command `state`: which copies have a state file, and the removal of one."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from blockcopy.block import user_writes
from blockcopy.block.claim import open_destination
from blockcopy.block.geometry import Geometry
from blockcopy.block.records import default_folder, default_path, invalidate_records
from blockcopy.errors import StateBusyError, StateError, StateUnusableError, UserWritesError
from blockcopy.paths import durable
from blockcopy.progress.rate import floored_percent, human_size
from blockcopy.replica.state.blockmap import BlockMap
from blockcopy.replica.state.recovery import amount_written
from blockcopy.replica.state.sqlite_files import log_of
from blockcopy.replica.state.statefile import Record, StateFile
from blockcopy.untrusted_text import printable

_SUFFIX = ".state"

_HEADINGS = ("DESTINATION", "SOURCE", "SIZE", "PRESENT", "USER WROTE", "LAST WRITTEN", "STATE FILE")


def _field(default: Any, help: str) -> Any:
    """Return a field with the value `default`, which `help` describes."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ListedState:
    """A state file and its content."""

    state_file: str = _field("", "The path of the state file.")
    destination: str | None = _field(
        None, "The destination, as it was named when the record began; null if unknown."
    )
    source: str | None = _field(None, "The source, as it was named when the record began; null if unknown.")
    size: int | None = _field(None, "Size of the source in bytes; null if unknown.")
    hydrated_bytes: int | None = _field(None, "Bytes that are on record as present; null if unknown.")
    written_bytes: int | None = _field(None, "Bytes of the blocks that a user has written to; null if unknown.")
    written_at: str = _field("", "When the state file, or its log, was last written, in ISO 8601.")
    error: str | None = _field(None, "Why the state file cannot be read now, or null.")

    def cells(self) -> list[str]:
        """Return the texts of the table's row, by `_HEADINGS`."""
        amounts = ["?", "?", "?"]
        if self.size is not None:
            present, users = self.hydrated_bytes or 0, self.written_bytes or 0
            percent = f"{floored_percent(present, self.size):.2f} %"
            amounts = [human_size(self.size), percent, human_size(users) if users else "-"]
        place = f"{self.state_file} ({self.error})" if self.error else self.state_file
        destination = self.destination or "?"
        if os.path.isabs(destination) and not os.path.exists(destination):
            destination += " (missing)"
        return [destination, self.source or "?", *amounts, self.written_at, place]


def states() -> list[ListedState]:
    """Return all state files of this user at their default places, the latest first.

    Each is locked for a moment while it is read.
    """
    folder = default_folder()
    times = {path: _written_at(path) for path in folder.glob(f"*{_SUFFIX}")}
    return [_listed(path, times[path]) for path in sorted(times, key=times.__getitem__, reverse=True)]


def _written_at(path: Path) -> float:
    """Return when the state file `path`, or its log, was last written. Returns 0 if it was removed a moment ago."""
    found = 0.0
    for each in (path, log_of(path)):
        with contextlib.suppress(FileNotFoundError):
            found = max(found, each.stat().st_mtime)
    return found


def _listed(path: Path, seconds: float) -> ListedState:
    """Return what is in the state file `path`, which was last written at the time `seconds`."""
    written_at = datetime.fromtimestamp(seconds).isoformat(" ", "seconds")
    try:
        state_file = StateFile(path, must_be_usable=True)
    except StateBusyError:
        return ListedState(state_file=str(path), written_at=written_at, error="in use")
    except StateError as error:
        return ListedState(state_file=str(path), written_at=written_at, error=str(error))
    record = state_file.record
    state_file.close()
    with contextlib.suppress(OSError):  # the close has moved the log into the file: nothing new was written
        os.utime(path, (seconds, seconds))
    if record is None:
        return ListedState(state_file=str(path), written_at=written_at, error="empty")
    source, destination = record.names
    present, written = _counts(record)
    return ListedState(
        state_file=str(path),
        destination=destination
        or ", ".join(f"{name} {value}" for name, value in record.binding.destination.items()),
        source=source or None,
        size=record.binding.source["size"],
        hydrated_bytes=present,
        written_bytes=written,
        written_at=written_at,
    )


def _counts(record: Record) -> tuple[int | None, int | None]:
    """Return two numbers of bytes that `record` has: the present ones, and the user's. Returns None if unknown."""
    blockmap = BlockMap(Geometry(record.binding.source["size"]))
    try:
        blockmap.resume(record.rows)
    except ValueError:
        return None, None
    return blockmap.present_bytes, blockmap.user.written_bytes


def as_json(found: list[ListedState]) -> str:
    """Return `found` as JSON."""
    return json.dumps([asdict(each) for each in found], indent=2)


def table(found: list[ListedState]) -> str:
    """Return a table of `found` as text for people."""
    rows = [list(_HEADINGS), *([printable(text, len(text)) for text in each.cells()] for each in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def forget(path: str) -> str:
    """Remove the state file of the destination at `path`, or the state file `path`. Returns in words what was done.

    Raises UserWritesError if the destination holds writes of a user. Raises StateError if no state
    file is there, or if it is in use.
    """
    if path.endswith(_SUFFIX) and os.path.isfile(path):
        _forget_file(Path(path))
        return f"removed {path}; the next mount or sync checks every block"
    check_exists(path)
    with open_destination(path) as device:  # no other process writes to it, and no user has
        if not any(default_path(device).with_suffix(suffix).exists() for suffix in (_SUFFIX, ".elsewhere")):
            raise StateError(f"there is no state file of {path}")
        invalidate_records(device)
    return f"forgot what was present in {path}; the next mount or sync checks every block"


def check_exists(path: str) -> None:
    """Raise StateError if there is no destination at `path`."""
    if not os.path.exists(path):
        raise StateError(
            f"there is no {path}. If the destination is gone, name its state file instead: see blockcopy state list"
        )


def discard(path: str, *, dry_run: bool = False) -> str:
    """Throw away what is on record of a user's writes to a destination that is gone. `path`: of its state file.

    `dry_run`: changes nothing. Returns in words how much that is, or "" if there are no such writes.
    Raises StateError if the state file is in use or cannot be removed, or if the destination is still there.
    """
    file = Path(path)
    note = user_writes.beside(file)
    record = None
    try:
        state_file = StateFile(file, must_be_usable=True)
    except StateUnusableError:
        pass  # it is of no use, and the note may be
    else:
        record = state_file.record
        state_file.close()
    destination = record.names[1] if record is not None else ""
    if destination and os.path.exists(destination):
        raise StateError(f"{path} is the state file of {destination}, which is still there: name that instead")
    if not note.exists() and (record is None or not record.has_user_writes):
        return ""
    amount = amount_written(record)
    if not dry_run:
        _remove(file, note)
    return f"{amount} in {destination or 'a destination'}, which is gone"


def is_state_file(path: str) -> bool:
    """Return whether `path` is that of an existing state file at a default place, by its name."""
    return path.endswith(_SUFFIX) and Path(path).parent == default_folder() and os.path.isfile(path)


def _forget_file(path: Path) -> None:
    """Remove the state file `path`.

    Raises UserWritesError if it has writes of a user, StateError if it is in use or cannot be removed.
    """
    try:
        state_file = StateFile(path, must_be_usable=True)
    except StateBusyError:
        raise
    except StateError:
        has_user_writes = False  # it is of no use to anybody
    else:
        has_user_writes = state_file.record is not None and state_file.record.has_user_writes
        state_file.close()
    if has_user_writes or user_writes.beside(path).exists():
        raise UserWritesError(
            f"{path} says what a user wrote to its destination. To throw that away, use: blockcopy discard-writes "
            f"DESTINATION. If the destination is gone, use: blockcopy discard-writes {path}"
        )
    _remove(path)


def _remove(path: Path, *more: Path) -> None:
    """Remove the state file `path`, the files of SQLite beside it, and `more`. Raises StateError if that fails."""
    for each in (path, *(path.with_name(f"{path.name}-{kind}") for kind in ("journal", "wal", "shm")), *more):
        try:
            durable.remove(each)
        except OSError as error:
            raise StateError(f"cannot remove {each}: {error.strerror}") from error
