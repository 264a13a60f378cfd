"""The status of a replica: the one description of it, from which all others are made.

    Status ─► status.json, `status --json`    a line for people, a line for systemd    counts of a progress bar
           ─► metrics for Prometheus          the screen, the list of mounts           a section of the manual

The fields are those of the JSON, in its order. The help text of a field describes it wherever it is shown.
`typed_json` makes a Status of the JSON that another process wrote. An unknown state is `State.UNKNOWN`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from blockcopy.block.geometry import Extent
from blockcopy.progress.rate import floored_percent, human_size, human_time
from blockcopy.progress.reporter import Counts

if TYPE_CHECKING:
    import trio

SCHEMA_VERSION = 1
"""Version of the JSON for programs. A new field leaves it as it is."""

SCHEMA_HELP = "Version of these fields. It changes if a field is removed or gets another meaning."

UNKNOWN = "?"
"""A text that the other process did not report, or that this version does not know."""


class _OpenEnum(StrEnum):
    """An enumeration with a member UNKNOWN, for the values of newer versions."""

    @classmethod
    def _missing_(cls, value: object) -> _OpenEnum:
        return cls(UNKNOWN)


class State(_OpenEnum):
    """The state of a copy. `complete`: the destination is synced, and the source is no longer needed."""

    STARTING = "starting"
    HYDRATING = "hydrating"
    PAUSED = "paused"
    RECONNECTING = "reconnecting"
    VERIFYING = "verifying"
    COMPLETE = "complete"
    FAILED = "failed"
    UNKNOWN = UNKNOWN


class LinkState(_OpenEnum):
    """The state of the connections to the source, all together. `closed`: they ended for good."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    RECONNECTING = "reconnecting"
    CLOSED = "closed"
    UNKNOWN = UNKNOWN


class Bottleneck(_OpenEnum):
    """The part that binds the rate of a copy."""

    LIMIT = "limit"
    READERS = "readers"
    SSH_WINDOW = "ssh-window"
    LINK = "link"
    SOURCE = "source"
    CPU = "cpu"
    DESTINATION = "destination"
    UNKNOWN = UNKNOWN


T = TypeVar("T")


def _about(help: str, metric: str = "") -> dict[str, str]:
    """Return a dict: the metadata of a field that `help` describes.

    `metric`: the name for Prometheus, empty for none. The name of a counter ends with `_total`.
    """
    return {"help": help, "metric": metric and f"blockcopy_{metric}"}


def _field(default: T, help: str, metric: str = "") -> T:
    """Return a field with the value `default`, which another process means if it does not report the field.

    `help`, `metric`: as for `_about`.
    """
    return field(default=default, metadata=_about(help, metric))


@dataclass(frozen=True, kw_only=True)
class ReadStatus:
    """The reads of users: their number and bytes, and how long they waited for the source."""

    reads: int = _field(0, "Reads by users.", "reads_total")
    bytes: int = _field(0, "Bytes that users read.", "read_bytes_total")
    waiting: int = _field(0, "Reads that wait for the source now.", "reads_waiting")
    latency_p50_seconds: float | None = _field(
        None, "Median of the last 1000 waits; null if no read waited.", "read_wait_p50_seconds"
    )
    latency_p99_seconds: float | None = _field(
        None, "99th percentile of the last 1000 waits.", "read_wait_p99_seconds"
    )
    latency_max_seconds: float | None = _field(None, "Longest of the last 1000 waits.", "read_wait_max_seconds")


@dataclass(frozen=True, kw_only=True)
class LinkStatus:
    """The connections to the source, all together."""

    state: LinkState = _field(LinkState.UNKNOWN, "connecting, connected, reconnecting or closed.")  # noqa: RUF009
    reconnects: int = _field(0, "How often a lost connection was replaced.", "reconnects_total")
    last_error: str | None = _field(None, "Why the last connection was lost, or null.")
    connections: int = _field(0, "Connections that are open now.", "connections")
    round_trip_seconds: float | None = _field(
        None, "A round trip to the source; null if unknown.", "round_trip_seconds"
    )
    digest: str | None = _field(None, "The digest by which both ends compare blocks, or null.")
    bottleneck: Bottleneck | None = _field(  # noqa: RUF009
        None,
        "What binds the rate: limit (--limit), readers (they go first), ssh-window (more connections would help), "
        "link, source (its disk or CPU), cpu (of this host), destination (its disk); or null.",
    )


@dataclass(frozen=True, kw_only=True)
class Status:
    """The status of a replica at one moment. Sizes are in bytes, times in seconds."""

    schema_version: int = _field(SCHEMA_VERSION, SCHEMA_HELP)
    state: State = field(
        metadata=_about(
            "State: starting (the source was not reached yet), hydrating, paused (also with --no-background), "
            "reconnecting, verifying, complete or failed.",
            "state",
        )
    )
    source: str = _field(UNKNOWN, "The source, as the user named it.")
    destination: str = _field(UNKNOWN, "The path of the destination.")
    pid: int = _field(0, "The process id of the mount or sync.")
    size: int = field(metadata=_about("Size of the source.", "size_bytes"))
    hydrated_bytes: int = _field(
        0, "Bytes of the destination that are the source's or the user's.", "hydrated_bytes"
    )
    hydrated_percent: float = _field(0.0, "Hydrated bytes as a percentage of the size, rounded down.")
    resumed_bytes: int = _field(0, "Hydrated bytes that a state file recorded.", "resumed_bytes")
    same_bytes: int = _field(0, "Hydrated bytes that were equal at both ends.", "same_bytes")
    fetched_bytes: int = _field(0, "Hydrated bytes that the source sent.", "fetched_bytes")
    zero_bytes: int = _field(0, "Hydrated bytes that are zeros, and were not sent.", "zero_bytes")
    hole_bytes: int = _field(0, "Zero bytes that are holes at both ends.")
    unreadable_bytes: int = _field(0, "Bytes that the source cannot read.")
    unreadable_ranges: tuple[Extent, ...] = _field(
        (), "The first 16 ranges that the source cannot read, as [offset, length]."
    )
    written_bytes: int = _field(0, "Bytes of the blocks that the user has written to.", "written_bytes")
    lost_bytes: int = _field(0, "Bytes that the user wrote and a failed sync lost. Their reads fail.", "lost_bytes")
    verified_bytes: int = _field(0, "Bytes that --verify compared again after the copy was complete.")
    verified_percent: float | None = _field(
        None, "Verified bytes as a percentage of the size; null without --verify."
    )
    sent_bytes: int = _field(0, "Bytes sent to the source.", "sent_bytes_total")
    received_bytes: int = _field(0, "Bytes received from the source.", "received_bytes_total")
    rate_bytes_per_s: int = _field(0, "Bytes per second by which the copy grows.", "rate_bytes_per_second")
    limit_bytes_per_s: int | None = _field(None, "Limit of background hydration in bytes per second, or null.")
    eta_seconds: int | None = _field(None, "Seconds until the copy is complete; null if unknown.", "eta_seconds")
    elapsed_seconds: float = _field(0.0, "Seconds since the mount or sync began.", "elapsed_seconds")
    source_needed: bool = field(metadata=_about("Whether the source must stay available.", "source_needed"))
    demand: ReadStatus = _field(ReadStatus(), "Reads by users.")  # noqa: RUF009
    link: LinkStatus = _field(LinkStatus(), "The connections to the source.")  # noqa: RUF009
    state_file: str | None = _field(None, "The path of the state file; null if none is kept.")
    error: str | None = _field(None, "What is wrong now, or null.")
    on_demand: bool = _field(
        False, "Whether only what is read is copied, by --no-background. The state is then paused."
    )
    writable: bool = _field(False, "Whether the mount accepts writes, by --writable.")
    mountpoint: str | None = _field(None, "Where the replica is mounted.")
    control_socket: str | None = _field(None, "The path of the mount's control socket.")

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON, in the order of the class."""
        return dataclasses.asdict(self)

    def as_json(self) -> bytes:
        """Return the content of status.json, as bytes."""
        return json.dumps(self.as_dict(), indent=2).encode() + b"\n"

    @property
    def counts(self) -> Counts:
        """The Counts for a progress bar. Bytes done are those hydrated or, during verification, those verified."""
        if self.state is State.VERIFYING:
            return Counts(self.verified_bytes, self.size, state=self.state)
        word = self.state_word
        parts = {"same": self.same_bytes, "fetched": self.fetched_bytes, "zero": self.zero_bytes}
        if self.resumed_bytes:
            parts["resumed"] = self.resumed_bytes
        return Counts(self.hydrated_bytes, self.size, parts, state=self.state, skipped=self.hole_bytes, word=word)

    @property
    def state_word(self) -> str:
        """The state in a word for people: `on-demand` instead of `paused` if there is nothing that pauses."""
        return "on-demand" if self.on_demand and self.state is State.PAUSED else self.state.value

    @property
    def percent(self) -> float:
        """The percentage that belongs to `counts`, rounded down."""
        return floored_percent(self.counts.done, self.size)

    @property
    def speed(self) -> str:
        """Rate and remaining time, as text for people. Empty if the remaining time is unknown."""
        if self.eta_seconds is None:
            return ""
        return f"{human_size(self.rate_bytes_per_s)}/s, {human_time(self.eta_seconds)} to go"


def summary(status: Status) -> str:
    """Return a line about `status` for people: state, progress, origin of the bytes, need of the source, errors."""
    origin = f"{human_size(status.same_bytes)} were equal, {human_size(status.fetched_bytes)} fetched"
    if status.zero_bytes:
        origin += f", {human_size(status.zero_bytes)} zeros"
    if status.written_bytes:
        origin += f", {human_size(status.written_bytes)} written by the user"
    if status.resumed_bytes:
        origin = f"{human_size(status.resumed_bytes)} were recorded, {origin}"
    parts = [
        _progress(status),
        status.speed,
        origin,
        "the source is still needed" if status.source_needed else "the source is no longer needed",
    ]
    if status.link.state is LinkState.RECONNECTING:
        parts.append(f"connection lost, reconnecting: {status.link.last_error}")
    if status.error:
        parts.append(f"error: {status.error}")
    return "; ".join(filter(None, parts))


def short_summary(status: Status) -> str:
    """Return a line about `status` for `systemctl status`: state, progress, remaining time, and what is wrong."""
    error = status.error
    if status.link.state is LinkState.RECONNECTING:
        error = error or status.link.last_error
    return "; ".join(filter(None, [", ".join(filter(None, [_progress(status), status.speed])), error]))


def _progress(status: Status) -> str:
    return f"{status.state_word}: {status.percent:.2f} % of {human_size(status.size)}"


@dataclass(slots=True)
class MapCell:
    """A range of the device in the map of a replica. All fields count blocks."""

    blocks: int
    present: int
    zero: int
    """Present blocks that are zeros which the source did not send, as far as this run found them."""
    written: int = 0
    """Blocks that the user has written to."""
    in_flight: int = 0
    """Blocks that background hydration fetches now."""
    reading: int = 0
    """Blocks that somebody's read waits for now."""

    def as_dict(self) -> dict[str, int]:
        """Return the fields by name, for JSON."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}


class MonitoredReplica(Protocol):
    """A replica, as those see it who report on it."""

    settled: trio.Event
    """Set when the copy is complete or has failed."""

    @property
    def counts(self) -> Counts:
        """The Counts for a progress bar."""

    @property
    def succeeded(self) -> bool:
        """Whether all that was asked for was copied."""

    def status(self) -> Status:
        """Return the status of this moment."""
