"""The command `state`: which copies have a state file, and the removal of one."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from blockcopy.block.claim import open_destination
from blockcopy.block.geometry import Geometry
from blockcopy.block.records import default_folder, default_path, invalidate_records
from blockcopy.errors import StateBusyError, StateError, UserWritesError
from blockcopy.paths import durable
from blockcopy.progress.rate import floored_percent, human_size
from blockcopy.replica.state.blockmap import BlockMap
from blockcopy.replica.state.statefile import Record, StateFile
from blockcopy.untrusted_text import printable

_SUFFIX = ".state"

_HEADINGS = ("DESTINATION", "SOURCE", "SIZE", "PRESENT", "LAST WRITTEN", "STATE FILE")


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
    written_at: str = _field("", "When the state file was last written, in ISO 8601.")
    error: str | None = _field(None, "Why the state file cannot be read now, or null.")

    def cells(self) -> list[str]:
        """Return the texts of the table's row, by `_HEADINGS`."""
        size, present = self.size or 0, self.hydrated_bytes or 0
        known = (
            [human_size(size), f"{floored_percent(present, size):.2f} %"] if self.size is not None else ["?", "?"]
        )
        place = f"{self.state_file} ({self.error})" if self.error else self.state_file
        return [self.destination or "?", self.source or "?", *known, self.written_at, place]


def states() -> list[ListedState]:
    """Return all state files of this user at their default places, the latest first.

    Each is locked for a moment while it is read.
    """
    folder = default_folder()
    paths = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [_listed(path) for path in paths]


def _listed(path: Path) -> ListedState:
    written_at = datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "seconds")
    try:
        state_file = StateFile(path, must_be_usable=True)
    except StateBusyError:
        return ListedState(state_file=str(path), written_at=written_at, error="in use")
    except StateError as error:
        return ListedState(state_file=str(path), written_at=written_at, error=str(error))
    record = state_file.record
    state_file.close()
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
    with open_destination(path) as device:  # no other process writes to it, and no user has
        if not any(default_path(device).with_suffix(suffix).exists() for suffix in (_SUFFIX, ".elsewhere")):
            raise StateError(f"there is no state file of {path}")
        invalidate_records(device)
    return f"forgot what was present in {path}; the next mount or sync checks every block"


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
    if has_user_writes or path.with_suffix(".writes").exists():
        raise UserWritesError(
            f"{path} says what a user wrote to its destination. To throw that away, use: blockcopy discard-writes "
            "DESTINATION"
        )
    for each in (path, *(path.with_name(f"{path.name}-{kind}") for kind in ("journal", "wal", "shm"))):
        try:
            durable.remove(each)
        except OSError as error:
            raise StateError(f"cannot remove {each}: {error.strerror}") from error
