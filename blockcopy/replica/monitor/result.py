"""The results of `sync` and `verify`: a line for people, and the fields of `--json`.

The fields keep their names and meanings. Later versions may add fields. The help text of a field describes it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from blockcopy.block.geometry import BLOCK_SIZE, Extent
from blockcopy.errors import BlockcopyError
from blockcopy.progress.rate import human_size, human_time
from blockcopy.replica.monitor.status import SCHEMA_HELP, SCHEMA_VERSION, Status

T = TypeVar("T")


def _field(default: T, help: str) -> T:
    """Return a field with the value `default`, which `help` describes."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Result:
    """The fields that `sync` and `verify` share. Sizes are in bytes, times in seconds."""

    schema_version: int = _field(SCHEMA_VERSION, SCHEMA_HELP)
    command: str = _field("", "The command: sync or verify.")
    source: str = _field("", "The source, as the user named it.")
    destination: str = _field("", "The destination, as the user named it.")
    complete: bool = _field(False, "Whether the destination is now known to be a copy of the source.")
    error: str | None = _field(None, "Why the command failed, or null.")
    size: int | None = _field(None, "Size of the source; null if unknown.")
    same_bytes: int | None = _field(None, "Bytes that were equal at both ends; null if unknown, as after a push.")
    unreadable_bytes: int = _field(0, "Bytes that an end cannot read.")
    unreadable_ranges: tuple[dict[str, int], ...] = _field(
        (), "The first 16 ranges that an end cannot read, each with offset and length."
    )
    sent_bytes: int | None = _field(None, "Bytes sent to the other end; null if unknown.")
    received_bytes: int | None = _field(None, "Bytes received from the other end; null if unknown.")
    elapsed_seconds: float = _field(0.0, "Seconds that the command took.")
    rate_bytes_per_s: int | None = _field(None, "Bytes compared or copied per second, on average; null if unknown.")

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON, in their order."""
        return dataclasses.asdict(self)

    def as_json(self) -> str:
        """Return the fields as JSON on one line."""
        return json.dumps(self.as_dict())

    def _line(self, done: str, parts: Iterable[str]) -> str:
        """Return a line for people. `done`: a word for the work. `parts`: what became of the bytes, as texts."""
        seconds = self.elapsed_seconds
        time = f"{seconds:.1f} s" if seconds < 60 else human_time(int(seconds))
        rate = "" if self.rate_bytes_per_s is None else f", {human_size(self.rate_bytes_per_s)}/s"
        crossed = ((self.sent_bytes, "sent"), (self.received_bytes, "received"))
        link = [f"{human_size(count)} {word}" for count, word in crossed if count is not None]
        return f"{done} in {time}{rate}: " + "; ".join(filter(None, (", ".join(parts), ", ".join(link))))


@dataclass(frozen=True, kw_only=True)
class SyncResult(Result):
    """The result of a `sync`."""

    fetched_bytes: int | None = _field(None, "Bytes that the source sent; null if unknown, as after a push.")
    zero_bytes: int | None = _field(None, "Bytes that are zeros, and were not sent; null if unknown.")
    hole_bytes: int | None = _field(
        None,
        "Zero bytes that were holes at both ends; null if unknown. "
        "What was written is fetched_bytes + zero_bytes - hole_bytes.",
    )
    resumed_bytes: int = _field(0, "Bytes that a state file recorded as present.")

    dry_run: bool = _field(
        False,
        "Whether nothing was written: the counts say what would be done, and complete whether nothing differs.",
    )
    uncompared_bytes: int = _field(
        0,
        "Of a dry run: fetched bytes that were not compared, because the destination lacks them.",
    )

    def with_status(self, status: Status) -> SyncResult:
        """Return this result with the counts of `status`, the last one of the copy."""
        return dataclasses.replace(
            self,
            size=status.size,
            same_bytes=status.same_bytes,
            fetched_bytes=status.fetched_bytes,
            zero_bytes=status.zero_bytes,
            hole_bytes=status.hole_bytes,
            resumed_bytes=status.resumed_bytes,
            unreadable_bytes=status.unreadable_bytes,
            unreadable_ranges=tuple(each._asdict() for each in map(Extent._make, status.unreadable_ranges)),
            sent_bytes=status.sent_bytes,
            received_bytes=status.received_bytes,
        )

    def ended(self, seconds: float, error: BlockcopyError | None) -> SyncResult:
        """Return this result at the end, after `seconds`. `error`: why the copy failed, or None."""
        known = [each for each in (self.same_bytes, self.fetched_bytes, self.zero_bytes) if each is not None]
        done = sum(known) if known else self.size
        return dataclasses.replace(
            self,
            complete=error is None and not (self.dry_run and (self.fetched_bytes or self.zero_bytes)),
            error=None if error is None else str(error),
            elapsed_seconds=round(seconds, 3),
            rate_bytes_per_s=None if done is None else int(done / max(seconds, 0.001)),
        )

    @property
    def words(self) -> str:
        """The result as a line for people."""
        if self.dry_run:
            fetched = self.fetched_bytes or 0
            words = f"{human_size(fetched)} in {-(-fetched // BLOCK_SIZE)} blocks would be copied"
            if self.uncompared_bytes:
                words = f"up to {words}"
            zeros = f"{human_size(self.zero_bytes)} would become zeros" if self.zero_bytes else ""
            return self._line("compared", filter(None, (words, zeros, f"{human_size(self.same_bytes or 0)} equal")))
        counts = ((self.same_bytes, "equal"), (self.fetched_bytes, "fetched"), (self.zero_bytes, "zeros"))
        parts = [f"{human_size(count)} {word}" for count, word in counts if count is not None]
        if self.resumed_bytes:
            parts.insert(0, f"{human_size(self.resumed_bytes)} recorded")
        return self._line("complete", parts)


@dataclass(frozen=True, kw_only=True)
class VerifyResult(Result):
    """The result of a `verify`."""

    differing_bytes: int = _field(0, "Bytes of the blocks that differ.")
    tail_bytes: int = _field(0, "Bytes of the destination beyond the size of the source. They were not compared.")
    user_bytes: int = _field(0, "Bytes of blocks that a user has written to. They were not compared.")

    @property
    def words(self) -> str:
        """The result as a line for people."""
        parts = [f"{human_size(self.same_bytes or 0)} equal", f"{human_size(self.differing_bytes)} different"]
        for count, word in ((self.user_bytes, "written by the user"), (self.unreadable_bytes, "unreadable")):
            if count:
                parts.append(f"{human_size(count)} {word}")
        return self._line("compared", parts)
