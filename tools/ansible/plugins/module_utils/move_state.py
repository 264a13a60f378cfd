# Copyright: the authors of blockcopy. MIT License (see LICENSE of blockcopy)
"""The state of a move: which stage it has reached, in one small JSON file on the destination's host.

The file is replaced as a whole and durably: after a crash it is the old or the new one. A change names the revision
that it is based on. So of two controllers that run the same move, the slower one is refused.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
import secrets
import stat
import tempfile

VERSION = 1
MAX_BYTES = 4 << 20
MAX_EVENTS = 2000
"""Bounds of the file, and of the events that it keeps, the last ones."""

NEXT = {
    "new": {"copying"},
    "copying": {"stopping"},
    "stopping": {"stopped"},
    "stopped": {"snapshotted"},
    "snapshotted": {"mounted"},
    "mounted": {"starting"},
    "starting": {"started"},
    "started": {"complete"},
    "complete": {"releasing", "done"},
    "releasing": {"released"},
    "released": {"restarting"},
    "restarting": {"done"},
    "done": set(),
    "aborting": {"starting", "undoing"},
    "undoing": {"aborted"},
    "aborted": {"new"},
}
"""The stages, and those that may follow each. An abort is apart: see `may_abort`."""

STAGES = list(NEXT)
_FIXED = ("source", "destination", "rounds")
_UNSTARTED = STAGES[: STAGES.index("mounted") + 1]
_STARTED = ["starting", "started", "complete"]


class StateRefusedError(Exception):
    """A state file that cannot be used, or a change that may not be made."""


def may_abort(stage, *, without_writes):
    """Return whether a move at `stage` may be aborted.

    `without_writes`: whether it is known that the destination holds no writes, or that they may be lost. This is
    needed as soon as the destination may have been started: the source lacks these writes.
    """
    return stage in _UNSTARTED or stage == "aborting" or (stage in _STARTED and without_writes)


def is_open(window, now):
    """Return whether the time of day `now` lies in `window`, such as 22:00-05:00. An empty window is always open.

    Raises StateRefusedError if `window` is no window.
    """
    if not window:
        return True
    found = re.fullmatch(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)", window)
    if found is None:
        raise StateRefusedError(f"{window!r} is not a window such as 22:00-05:00")
    begins, ends = ((int(found[each]) * 60 + int(found[each + 1])) for each in (1, 3))
    minute = now.hour * 60 + now.minute
    return begins <= minute < ends if begins <= ends else minute >= begins or minute < ends


class MoveState:
    """The state of the move `name`, in the file `path`. Use as a context: it locks the folder.

    `read_only`: the folder is neither created nor locked.
    """

    def __init__(self, path, name, *, read_only=False):
        self._path, self._name, self._read_only = path, name, read_only
        self._folder = None
        self.fields = None
        self.is_new = False

    def __enter__(self):
        if self._read_only:
            return self
        os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
        self._folder = os.open(os.path.dirname(self._path), os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._folder, fcntl.LOCK_EX)
        return self

    def __exit__(self, *exc):
        if self._folder is not None:
            os.close(self._folder)

    def load(self, source_host, disks):
        """Read the file, or begin a new state.

        `source_host`, `disks`: what the move is about; `disks` has source and destination by name.
        Raises StateRefusedError if the file cannot be believed, or is about other disks.
        """
        self.fields = self._read()
        wanted = {"source_host": source_host, "disks": disks}
        if self.fields is None:
            self.is_new = True
            self.fields = {"version": VERSION, "name": self._name, "revision": 0, "events": []}
            self._begin(wanted)
            return
        stage = self.fields["stage"]
        kept = {name: {key: each.get(key) for key in ("source", "destination")} for name, each in self._disks()}
        known = {"source_host": self.fields["source_host"], "disks": kept}
        if known != wanted and stage == "aborted":
            self._begin(wanted)
        elif known != wanted:
            raise StateRefusedError(
                f"{self._path} is about other disks or another source ({json.dumps(known)}), and its stage is "
                f"{stage}: name this move differently, or give it the same disks"
            )

    def _disks(self):
        return self.fields["disks"].items()

    def _begin(self, wanted):
        """Begin anew about `wanted`. A new id keeps names of snapshots apart from those of earlier tries."""
        disks = {name: {**each, "rounds": [], "ready": False} for name, each in wanted["disks"].items()}
        self.fields.update(
            id=secrets.token_hex(4), stage="new", source_host=wanted["source_host"], disks=disks, aborted_from=None
        )
        self._note({"stage": "new"})

    def check(self, revision):
        """Raise StateRefusedError if the state is not at `revision`. None fits always."""
        if revision is not None and revision != self.fields["revision"]:
            raise StateRefusedError(
                f"{self._path} has changed meanwhile (revision {self.fields['revision']}, expected {revision}): "
                "another run of this move is at work"
            )

    def advance(self, stage, *, without_writes=False):
        """Set the stage. `without_writes`: as for `may_abort`. Raises StateRefusedError if it may not follow."""
        now = self.fields["stage"]
        if stage == now:
            return False
        if stage == "aborting" and may_abort(now, without_writes=without_writes):
            self.fields["aborted_from"] = now
        elif stage not in NEXT[now] or (now == "aborting" and not self._may_follow_abort(stage)):
            raise StateRefusedError(f"the move {self._name} is {now}: it cannot become {stage}")
        if stage == "new":
            self._begin({"source_host": self.fields["source_host"], "disks": self._bare_disks()})
        else:
            self.fields["stage"] = stage
            self._note({"stage": stage})
        return True

    def _may_follow_abort(self, stage):
        """Return whether `stage` may follow an abort. An abort that meets writes goes back, to the start."""
        return stage == "undoing" or self.fields["aborted_from"] in _STARTED

    def _bare_disks(self):
        return {name: {key: each[key] for key in ("source", "destination")} for name, each in self._disks()}

    def set_field(self, name, field, value):
        """Set `field` of the disk `name` to `value`. Returns whether it changed.

        Raises StateRefusedError if there is no such disk, or if the field is the state's own.
        """
        if field in _FIXED:
            raise StateRefusedError(f"{field} of a disk cannot be set")
        changed = self._disk(name).get(field) != value
        self._disk(name)[field] = value
        if changed:
            self._note({"disk": name, field: value})
        return changed

    def add_round(self, name, figures):
        """Append `figures`, a dict, to the rounds of the disk `name`. Raises StateRefusedError if there is none."""
        rounds = self._disk(name)["rounds"]
        rounds.append(figures)
        self._note({"disk": name, "round": len(rounds)})

    def _disk(self, name):
        if name not in self.fields["disks"]:
            raise StateRefusedError(f"the move {self._name} has no disk {name}")
        return self.fields["disks"][name]

    def _note(self, event):
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        self.fields["events"] = [*self.fields["events"], {"at": now, **event}][-MAX_EVENTS:]

    def _read(self):
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        with open(fd, "rb") as file:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
                raise StateRefusedError(f"{self._path} is not a file that only this user can write")
            text = file.read(MAX_BYTES + 1)
        try:
            found = json.loads(text)
            fits = found["version"] == VERSION and found["name"] == self._name and found["stage"] in NEXT
            fits = fits and isinstance(found["revision"], int) and isinstance(found["events"], list)
            fits = fits and all(isinstance(each["rounds"], list) for each in found["disks"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise StateRefusedError(f"{self._path} is not the state of the move {self._name}; it was not touched")
        return found

    def save(self):
        """Replace the file, durably. Raises OSError if that fails: the file is then the old one."""
        self.fields["revision"] += 1
        fd, temporary = tempfile.mkstemp(prefix=".", dir=os.path.dirname(self._path))
        try:
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(self.fields, file, indent=1)
                file.flush()
                os.fsync(fd)
            os.rename(temporary, self._path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        os.fsync(self._folder)
