"""Recovery after a restart: which blocks a state file of an earlier run proves to be present.

A state file names the source and the destination that its record is about. Both must be the same today, and nobody
else may have written to the destination since. Otherwise the record is not believed. The log tells why a record is
ignored.

    open_state_file → usable_record → matches_source → resume_blockmap
"""

from __future__ import annotations

import logging
from pathlib import Path

from blockcopy.block.device import Device
from blockcopy.block.geometry import Extent, Geometry
from blockcopy.block.identity import (
    Identity,
    Times,
    destination_identity,
    differences,
    sample_extents,
    sample_matches,
    shows_writes,
    times_of,
)
from blockcopy.block.records import default_path, invalidate_records, is_authoritative
from blockcopy.errors import StateWriteError
from blockcopy.replica.state.blockmap import BlockMap
from blockcopy.replica.state.statefile import Record, StateFile, WriteTimes

logger = logging.getLogger(__name__)


def open_state_file(path: str | None, destination: Device, *, keep: bool) -> StateFile | None:
    """Open or create the state file of `destination`, at `path`, or at the default place if `path` is None.

    Returns None if `keep` is false. Returns None with a warning if no state file can be written. In both cases
    every older record of the destination is removed. Raises StateError if an older record cannot be removed. Raises
    StateError if another process uses the file, or if the file is not a regular file.
    """
    if not keep:
        invalidate_records(destination)
        return None
    wanted = Path(path) if path else default_path(destination)
    try:
        return StateFile(wanted)
    except StateWriteError as error:
        invalidate_records(destination)
        logger.warning("%s; after a restart, every block will be checked again", error)
        return None


def is_at_default_path(state_file: StateFile, destination: Device) -> bool:
    """Return whether `state_file` is the file at the default place of `destination`, be it by another name."""
    path, default = state_file.path, default_path(destination)
    return path == default or (default.exists() and path.samefile(default))


def usable_record(state_file: StateFile, destination: Device, block_size: int) -> Record | None:
    """Return the record in `state_file` if it is about `destination`, which nobody else has written to since.

    Returns None if there is no such record. `block_size`: bytes in a block today.
    """
    record = state_file.record
    if record is None:
        return None
    binding = record.binding
    differing = differences(
        {**binding.destination, "size": binding.destination_size, "block size": binding.block_size},
        {**destination_identity(destination), "size": destination.size(), "block size": block_size},
    )
    if differing:
        _warn_ignored(state_file, f"the destination is another: {'; '.join(differing)}")
    elif not (is_at_default_path(state_file, destination) or is_authoritative(state_file.token, destination)):
        _warn_ignored(
            state_file, f"another command, with its state elsewhere, may have written to {destination.path} since"
        )
    elif was_written_by_others(record.times, times_of(destination)):
        _warn_ignored(state_file, f"another program has written to {destination.path} since")
    else:
        return record
    return None


def was_written_by_others(recorded: WriteTimes, times: Times) -> bool:
    """Return whether another program wrote to a destination that has these `times` now.

    `recorded`: the times on record.
    """
    known = Times(recorded.mtime_ns, recorded.ctime_ns)
    if recorded.until_ns is None:
        return times != known
    return not all(
        before <= now <= max(before, recorded.until_ns) for before, now in zip(known, times, strict=True)
    )


def matches_source(state_file: StateFile, record: Record, source: Identity) -> bool:
    """Return whether `record`, which is in `state_file`, is about this unchanged `source`."""
    if differing := differences(record.binding.source, source):
        _warn_ignored(state_file, f"the source is another, or has changed: {'; '.join(differing)}")
    return not differing


def resume_blockmap(
    state_file: StateFile, record: Record, destination: Device, geometry: Geometry, source: Identity | None
) -> BlockMap:
    """Return a block map of `destination` in which the blocks of `record` are present, if they still prove right.

    Returns an empty block map if they do not. `source`: the identity of the source today, or None if the source
    cannot be reached. `geometry`: of the source. `state_file`: named in the log.

    A complete copy is checked again unless both ends show whether they were written since. If the source cannot be
    reached, a complete copy is not checked.
    """
    blockmap = BlockMap(geometry)
    try:
        blockmap.resume(record.chunks)
    except ValueError as error:
        _warn_ignored(state_file, f"it is damaged: {error}")
        return BlockMap(geometry)
    recorded = record.binding.source
    is_tracked = destination.has_exact_times() and shows_writes(recorded) and shows_writes(source or recorded)
    if blockmap.complete and source is not None and not is_tracked:
        logger.warning("the copy was complete; checking every block for changes since")
        return BlockMap(geometry)

    def is_present(extent: Extent) -> bool:
        return not blockmap.any_missing(geometry.span(*extent))

    if not sample_matches(destination, recorded, filter(is_present, sample_extents(geometry.size))):
        _warn_ignored(state_file, f"another program has written to {destination.path} since")
        return BlockMap(geometry)
    return blockmap


def _warn_ignored(state_file: StateFile, why: str) -> None:
    logger.warning("ignoring state file %s: %s. Checking every block again", state_file.path, why)
