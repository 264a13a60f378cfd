"""Recovery after a restart: which blocks a state file of an earlier run proves to be present.

A state file names the source and the destination that its record is about. Both must be the same today, and nobody
else may have written to the destination since. Otherwise the record is not believed. The log tells why a record is
ignored.

    open_state_file → usable_record → matches_source → resume_blockmap
"""

from __future__ import annotations

import logging
from pathlib import Path

from blockcopy.block import user_writes
from blockcopy.block.device import Device
from blockcopy.block.geometry import Extent, Geometry
from blockcopy.block.identity import (
    Identity,
    Times,
    destination_identity,
    differences,
    number_of_nameless,
    sample_extents,
    sample_matches,
    shows_writes,
    times_of,
)
from blockcopy.block.records import default_path, invalidate, invalidate_records, is_authoritative
from blockcopy.errors import StateBusyError, StateError, StateUnusableError, StateWriteError, UserWritesError
from blockcopy.replica.state.blockmap import BlockMap
from blockcopy.replica.state.statefile import Record, StateFile, WriteTimes
from blockcopy.replica.state.user_pages import UserPages

logger = logging.getLogger(__name__)


def open_state_file(
    path: str | None,
    destination: Device,
    *,
    keep: bool,
    note: user_writes.Note | None,
    for_writes: bool = False,
) -> StateFile | None:
    """Open or create the state file of `destination`, at `path`, or at the default place if `path` is None.

    `note`: of the user's writes in `destination`, or None. The state file must then be there, and usable.
    `for_writes`: a user is going to write. Raises StateWriteError then if the writes cannot be recorded.
    Returns None if `keep` is false. Returns None with a warning if no state file can be written. In both cases
    every older record of the destination is removed. Raises StateError if an older record cannot be removed. Raises
    StateError if another process uses the file, or if the file is not a regular file. Raises UserWritesError if
    the user's writes cannot be told from the rest.
    """
    wanted = Path(path) if path else default_path(destination) if keep else None
    if for_writes:
        user_writes.check_place(destination)
        if (number := number_of_nameless(destination)) is not None:
            logger.warning(
                "%s has no serial number or UUID: its number, %s, guards what is written to it. If a restart "
                "changes the number, the guard ends",
                destination.path,
                number,
            )
    if note is not None:
        return _state_file_of_writes(wanted, destination, note)
    if wanted is None:
        invalidate_records(destination)
        return None
    try:
        return StateFile(wanted)
    except StateBusyError as error:
        raise StateBusyError(f"{error}; name another with --state") from error
    except StateWriteError as error:
        if for_writes:
            raise
        invalidate_records(destination)
        logger.warning("%s; after a restart, every block will be checked again", error)
        return None


def _state_file_of_writes(path: Path | None, destination: Device, note: user_writes.Note) -> StateFile:
    """Open and return the StateFile at `path` of a `destination` that holds writes of a user, as `note` says.

    Raises StateError if another process uses the file. Raises UserWritesError if the file lacks these writes.
    """
    if path is None:
        raise user_writes.error_for(destination.path, "holds writes of a user, so its state is needed", note.source)
    user_writes.check_is_of_this_file(destination, note)
    try:
        state_file = StateFile(path, must_be_usable=True)
    except StateBusyError as error:
        raise StateBusyError(
            f"{destination.path} holds writes of a user, and {error}, such as its mount. End that first (umount)"
        ) from error
    except StateError as error:
        is_elsewhere = note.state and note.state != str(path)
        hint = f" (its state was in {note.state})" if is_elsewhere else ""
        first = f"name its state with --state {note.state}" if is_elsewhere else f"bring {path} back as it was"
        reason = f"holds writes of a user, and {error}{hint}"
        raise user_writes.error_for(destination.path, reason, note.source, first=first) from error
    record, commits = state_file.record, state_file.commits
    first = "bring back the state file of these writes"
    if record is None or commits < note.commits:
        why = f"is an older one: it has {commits} commits, and {note.commits} were acknowledged"
    elif not record.has_user_writes and commits != note.commits:  # equal: a crash came just after the note
        why = "knows nothing of them"
    elif note.token and state_file.token != note.token:
        why = "is about other writes: those of another destination, or those that were discarded before"
    else:
        return state_file
    state_file.close()
    raise user_writes.error_for(
        destination.path, f"holds writes of a user, and the state file {path} {why}", note.source, first=first
    )


def is_at_default_path(state_file: StateFile, destination: Device) -> bool:
    """Return whether `state_file` is the file at the default place of `destination`, be it by another name."""
    path, default = state_file.path, default_path(destination)
    return path == default or (default.exists() and path.samefile(default))


def usable_record(state_file: StateFile, destination: Device, block_size: int) -> Record | None:
    """Return the record in `state_file` if it is about `destination`, which nobody else has written to since.

    Returns None if there is no such record. `block_size`: bytes in a block today.
    Raises UserWritesError if the destination holds writes of a user, and the record cannot be used.
    """
    record = state_file.record
    if record is None:
        return None
    binding = record.binding
    known_size = binding.destination_size
    if record.has_user_writes and destination.size() > known_size:
        known_size = destination.size()  # its user enlarged the disk: what it held is where it was
    differing = differences(
        {**binding.destination, "size": known_size, "block size": binding.block_size},
        {**destination_identity(destination), "size": destination.size(), "block size": block_size},
    )
    if differing:
        _ignore(state_file, f"the destination is another: {'; '.join(differing)}")
    elif not (is_at_default_path(state_file, destination) or is_authoritative(state_file.token, destination)):
        _ignore(
            state_file, f"another command, with its state elsewhere, may have written to {destination.path} since"
        )
    elif not may_have_changed(record) and was_written_by_others(
        record.times, _times_to_compare(record, destination)
    ):
        _ignore(state_file, f"another program has written to {destination.path} since")
    else:
        return record
    return None


def may_have_changed(record: Record) -> bool:
    """Return whether a destination with `record` may differ from the record by right: by writes of its user.

    After a crash, writes that were not flushed are not on record. Of a complete copy, every block is the user's.
    """
    return record.has_user_writes and (record.times.until_ns is not None or is_complete(record))


def is_complete(record: Record) -> bool:
    """Return whether `record` says that all blocks are present."""
    blockmap = BlockMap(Geometry(record.binding.source["size"]))
    try:
        blockmap.resume(record.rows)
    except ValueError:
        return False  # `resume_blockmap` reports it
    return blockmap.complete


def _times_to_compare(record: Record, destination: Device) -> Times:
    """Return the times of `destination`, to be compared with those of `record`.

    With writes of a user only the mtime counts. A rename or a chmod changes the ctime, and must lock nobody out.
    """
    times = times_of(destination)
    return times._replace(ctime_ns=record.times.ctime_ns) if record.has_user_writes else times


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
    """Return whether `record`, which is in `state_file`, is about this unchanged `source`.

    A destination with writes of a user is held to its source before (`engine`).
    """
    if differing := differences(record.binding.source, source):
        _ignore(state_file, f"the source is another, or has changed: {'; '.join(differing)}")
    return not differing


def resume_blockmap(
    state_file: StateFile, record: Record, destination: Device, geometry: Geometry, source: Identity | None
) -> BlockMap:
    """Return a block map of `destination` in which the blocks of `record` are present, if they still prove right.

    Returns an empty block map if they do not. `source`: the identity of the source today, or None if the source
    cannot be reached. `geometry`: of the source. `state_file`: named in the log.

    A complete copy is checked again unless both ends show whether they were written since. If the source cannot be
    reached, a complete copy is not checked. Nor is a copy that the user has written to.
    Raises UserWritesError if the destination holds writes of a user, and the record does not prove right.
    """
    blockmap = BlockMap(geometry)
    try:
        blockmap.resume(record.rows)
    except ValueError as error:
        _ignore(state_file, f"it is damaged: {error}")
        return BlockMap(geometry)
    recorded = record.binding.source
    is_tracked = destination.has_exact_times() and shows_writes(recorded) and shows_writes(source or recorded)
    if blockmap.complete and source is not None and not (is_tracked or record.has_user_writes):
        logger.warning("the copy was complete; checking every block for changes since")
        return BlockMap(geometry)

    def is_sources(extent: Extent) -> bool:
        blocks = geometry.span(*extent)
        return not blockmap.any_missing(blocks) and not blockmap.user.count_blocks(blocks)

    # A killed run may have left writes of its user that are not on record, also in blocks that are.
    if not (may_have_changed(record) or record.was_killed) and not sample_matches(
        destination, recorded, filter(is_sources, sample_extents(geometry.size))
    ):
        _ignore(state_file, f"another program has written to {destination.path} since")
        return BlockMap(geometry)
    return blockmap


def is_copy_of_same(record: Record, destination: Device, source: Identity) -> bool:
    """Return whether `record`, which is usable, proves that `destination` is a copy of the device `source`.

    An older copy counts, an incomplete one too, and one that holds writes of its user.
    """
    recorded = record.binding.source
    lasting = recorded.keys() & {"id", "inode"} or {
        "size"
    }  # not so of the original program, and of a nameless device
    if any(recorded[name] != source.get(name) for name in lasting):
        return False
    geometry = Geometry(recorded["size"])
    blockmap = BlockMap(geometry)
    try:
        blockmap.resume(record.rows)
    except ValueError:
        return False
    copied = [each for each in sample_extents(geometry.size) if not blockmap.any_missing(geometry.span(*each))]
    return record.has_user_writes or sample_matches(destination, recorded, copied)


def recorded_user_pages(destination: Device, geometry: Geometry) -> UserPages | None:
    """Return the pages of `destination` that the user wrote, as its state file says, or None if there are none.

    `geometry`: of the source. Raises StateError if there are some, and the state file cannot be used or is in use.
    """
    note = user_writes.find(destination)
    if note is None:
        return None
    path = Path(note.state) if note.state else default_path(destination)
    state_file = _state_file_of_writes(path, destination, note)
    try:
        blockmap = BlockMap(geometry)
        if state_file.record is not None:
            blockmap.resume(state_file.record.rows)
            if state_file.record.was_killed:
                logger.warning(
                    "a writable mount of %s was killed: what differs may be writes that were not flushed",
                    destination.path,
                )
        return blockmap.user
    except ValueError as error:
        raise StateError(f"the state file {path} is damaged: {error}") from error
    finally:
        state_file.close()


def discard_user_writes(destination: Device, path: str | None, *, dry_run: bool = False) -> str:
    """Throw away what the user wrote to `destination`: the next run checks every block, and fetches what differs.

    `path`: of the state file, or None for the one that the note names. `dry_run`: changes nothing. Returns in words
    how much that is, or "" if there are no such writes.
    Raises StateError if the state file is in use, is about another destination, or cannot be removed.
    """
    note = user_writes.find(destination)
    wanted = Path(path or (note.state if note else "") or default_path(destination))
    try:
        state_file = StateFile(wanted, must_be_usable=True)
    except (StateUnusableError, StateWriteError) as error:
        logger.debug("%s", error)
        record = None
    else:
        record = state_file.record
        state_file.close()
    if record is not None and record.binding.destination != destination_identity(destination):
        raise StateError(f"the state file {wanted} is about another destination than {destination.path}")
    if note is None and (record is None or not record.has_user_writes):
        return ""
    amount = _amount_noted(note, record)
    if not dry_run:
        invalidate(wanted)
        invalidate_records(destination)
        user_writes.remove(destination)
    return amount


def _amount_noted(note: user_writes.Note | None, record: Record | None) -> str:
    """Return in words how much a user wrote, as `note` and `record` say."""
    return "a note of writes to an earlier file" if note and note.is_of_another else amount_written(record)


def amount_written(record: Record | None) -> str:
    """Return in words how much the user wrote, as `record` says, if there is one."""
    if record is not None and record.has_user_writes:
        user = BlockMap(Geometry(record.binding.source["size"])).user
        try:
            user.resume(record.rows.pages, record.rows.lost)
            return f"{user.written_bytes} bytes of blocks that a user wrote to"
        except ValueError as error:
            logger.debug("%s", error)
    return "an unknown number of bytes that a user wrote"


def _ignore(state_file: StateFile, why: str) -> None:
    """Log `why` the record in `state_file` is ignored.

    Raises UserWritesError if its destination holds writes of a user, because these would be overwritten.
    """
    if state_file.record is not None and state_file.record.has_user_writes:
        raise UserWritesError(
            f"the destination holds writes of a user, and its state file {state_file.path} cannot be used: {why}. "
            "Nothing was changed. To go on, undo that, and mount it with --writable again. To throw the writes "
            "away, use: blockcopy discard-writes DESTINATION"
        )
    logger.warning("ignoring state file %s: %s. Checking every block again", state_file.path, why)
