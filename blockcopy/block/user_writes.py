"""The note that a destination holds a user's writes. No command of ours may overwrite them.

A writable mount makes the note before the first write of the user. The note outlives the mount, the completion of
the copy, and the loss of the state file. Only `discard-writes` removes it.

    DEFAULT.writes              a file beside the default place of the state file: five lines
    user.blockcopy.writes       an extended attribute of a destination file, if its file system has them: the token
                                of the record, and its commits when the mount began

The attribute tells the file from a later one with its inode number, and from a restored backup. The last line of
the note counts the commits that the state file has acknowledged. It is written after each commit, and never synced.
So it cannot run ahead of the state file. A state file with a lower count has lost acknowledged writes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from blockcopy.block.device import Device
from blockcopy.block.records import FilesInPlace, default_path
from blockcopy.errors import StateError, StateWriteError, UserWritesError
from blockcopy.paths import durable
from blockcopy.paths.trust import distrust_reason

_ATTRIBUTE = "user.blockcopy.writes"

_KEPT = b"attribute"
"""The line of a note whose file has the attribute as well."""

_COUNTER_DIGITS = 20
"""Digits of the counter. Their number is fixed, so that one small write replaces them."""

_MAX_NOTE = 64 * 1024
"""Bytes of a note that are read."""


class Note(NamedTuple):
    """The note of a destination.

    `source`: the source of the mount, as the user named it. `state`: the path of its state file. Both are empty if
    they are unknown. `commits`: the number of commits that the state file has, at least. `token`: of its record, or
    empty if it is unknown. `is_of_another`: the note does not belong to this file, but to an earlier one.
    """

    source: str = ""
    state: str = ""
    commits: int = 0
    token: str = ""
    is_of_another: bool = False


def note_path(device: Device) -> Path:
    """Return the Path of the note of the destination `device`."""
    return beside(default_path(device))


def beside(state_path: Path) -> Path:
    """Return the Path of the note of the destination whose state file has the default place `state_path`."""
    return state_path.with_suffix(".writes")


def find(device: Device) -> Note | None:
    """Return the Note of the destination `device`, or None if it holds no writes of a user.

    A note that cannot be understood is a note too. Raises StateError if the note's place cannot be examined.
    """
    path = note_path(device)
    try:
        with path.open("rb") as file:
            return _parsed(file.read(_MAX_NOTE), device.attribute(_ATTRIBUTE))
    except (FileNotFoundError, NotADirectoryError):
        attribute = device.attribute(_ATTRIBUTE)
        return None if attribute is None else _with_attribute(Note(), attribute)
    except OSError as error:
        raise StateError(
            f"cannot find out whether {device.path} holds writes of a user: cannot read {path}: {error.strerror}"
        ) from error


def _parsed(content: bytes, attribute: bytes | None) -> Note:
    """Return the Note that is the `content` of the file, and of the `attribute`, if there is one."""
    try:
        source, state, token, kept, commits = content.splitlines()
        note = Note(source.decode("unicode_escape"), state.decode("unicode_escape"), int(commits), token.decode())
    except ValueError:
        return Note() if attribute is None else _with_attribute(Note(), attribute)
    if attribute is not None:
        return _with_attribute(note, attribute)
    return note._replace(is_of_another=kept == _KEPT)


def _with_attribute(note: Note, attribute: bytes) -> Note:
    """Return `note` with what the `attribute` of the file says."""
    try:
        token, commits = attribute.decode().split()
        is_of_another = note.token not in ("", token)
        return note._replace(token=token, commits=max(note.commits, int(commits)), is_of_another=is_of_another)
    except ValueError:
        return note


def refuse(device: Device) -> None:
    """Raise UserWritesError if the destination `device` holds writes of a user."""
    note = find(device)
    if note is not None:
        check_is_of_this_file(device, note)
        raise error_for(device.path, "holds what was written to a writable mount", note.source)


def check_is_of_this_file(device: Device, note: Note) -> None:
    """Raise UserWritesError if `note`, which was found for `device`, belongs to an earlier file.

    The file may be a backup with the user's writes, so it is not believed to hold none.
    """
    if note.is_of_another:
        reason = "is a new file, or was brought back from a backup: the note of writes is about an earlier file"
        raise error_for(device.path, reason, note.source, first="bring back the earlier file")


def error_for(path: str, reason: str, source: str = "", *, first: str = "") -> UserWritesError:
    """Return the error that names the two ways on for the destination at `path`.

    `reason`: a verb with its objects, which says what is wrong. `source`: as the user named it, or empty.
    `first`: what the user must do before a mount can go on, as an imperative, or empty.
    """
    first = f"{first}, then " if first else ""
    return UserWritesError(
        f"{path} {reason}. Nothing was changed. To go on, {first}use: blockcopy mount --writable "
        f"{source or 'SOURCE'} {path} MOUNTPOINT. To throw the writes away, use: blockcopy discard-writes {path}"
    )


class Counter:
    """The counter in a note, open for writing."""

    def __init__(self, path: Path) -> None:
        """Open the note at the Path `path`. Raises StateWriteError if the note cannot be written."""
        self._path = path
        try:
            self._file = path.open("r+b", buffering=0)
        except OSError as error:
            raise StateWriteError(f"cannot write {path}: {error.strerror}") from error
        self._commits: int | None = None  # as written last
        self._at = os.fstat(self._file.fileno()).st_size - _COUNTER_DIGITS - 1
        self._in_place = FilesInPlace(path)

    def set(self, commits: int) -> None:
        """Write the number of `commits` that the state file has acknowledged. Thread-safe.

        Raises StateWriteError if the note cannot be written. Raises StateRemovedError if the note was removed.
        """
        self._in_place.check()
        if commits == self._commits:
            return
        try:
            os.pwrite(self._file.fileno(), f"{commits:0{_COUNTER_DIGITS}}".encode(), self._at)
            self._commits = commits
        except OSError as error:
            raise StateWriteError(f"cannot write {self._path}: {error.strerror}") from error

    def close(self) -> None:
        """Close the note."""
        self._file.close()


def check_place(device: Device) -> None:
    """Check that a note of the destination `device` can be kept. Raises StateWriteError if not."""
    path = note_path(device)
    try:
        durable.make_folder(path.parent)
    except OSError as error:
        raise StateWriteError(f"cannot note in {path} that {device.path} is written: {error.strerror}") from error
    if why := distrust_reason(path.parent):
        raise StateWriteError(f"cannot note in {path} that {device.path} is written: {why}")


def make(device: Device, note: Note) -> Counter:
    """Make `note` the note of the destination `device`, durably. Returns its counter, which the caller closes.

    Raises StateWriteError if the note cannot be made, DeviceError if the attribute cannot be made durable.
    """
    path = note_path(device)
    check_place(device)
    # The attribute first: a note that says that there is one must be true.
    is_kept = device.set_attribute(_ATTRIBUTE, f"{note.token} {note.commits}".encode())
    lines = [note.source, note.state, note.token, _KEPT.decode() if is_kept else "-"]
    text = "".join(f"{line.encode('unicode_escape').decode()}\n" for line in lines)
    try:
        durable.write(path, f"{text}{note.commits:0{_COUNTER_DIGITS}}\n")
    except OSError as error:
        raise StateWriteError(f"cannot note in {path} that {device.path} is written: {error.strerror}") from error
    return Counter(path)


def remove(device: Device) -> None:
    """Remove the note of the destination `device`, durably. Raises StateError or DeviceError if that fails."""
    path = note_path(device)
    device.remove_attribute(_ATTRIBUTE)
    try:
        durable.remove(path)
    except OSError as error:
        raise StateError(f"cannot remove {path}, the note of a user's writes: {error.strerror}") from error
