"""One snapshot of a replica: as JSON, as a line, as counts for a progress bar."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

from blockcopy.progress.rate import floored_percent, human_size, human_time
from blockcopy.progress.reporter import Counts

if TYPE_CHECKING:
    import trio


class Watched(Protocol):
    """A replica, for those who report on it."""

    settled: trio.Event
    """Set when the copy is complete or has failed."""

    def snapshot(self) -> dict[str, Any]:
        """Return the status of now."""


def to_json(snapshot: dict[str, Any]) -> bytes:
    return json.dumps(snapshot, indent=2).encode() + b"\n"


def one_line(snapshot: dict[str, Any]) -> str:
    """For people: state, how much is here, what it took, and whether the source is still needed."""
    came = f"{human_size(snapshot['same_bytes'])} were equal, {human_size(snapshot['fetched_bytes'])} fetched"
    if snapshot["zero_bytes"]:
        came += f", {human_size(snapshot['zero_bytes'])} zeros"
    if snapshot["resumed_bytes"]:
        came = f"{human_size(snapshot['resumed_bytes'])} were recorded, {came}"
    counts = counts_of(snapshot)
    percent = floored_percent(counts.done, snapshot["size"])
    parts = [
        f"{snapshot['state']}: {percent:.2f} % of {human_size(snapshot['size'])}",
        came,
        "the source is still needed" if snapshot["source_needed"] else "the source is no longer needed",
    ]
    if snapshot["eta_seconds"] is not None:
        rate, eta = human_size(snapshot["rate_bytes_per_s"]), human_time(snapshot["eta_seconds"])
        parts.insert(1, f"{rate}/s, {eta} to go")
    if snapshot["link"]["state"] == "reconnecting":
        parts.append(f"the link is down: {snapshot['link']['last_error']}")
    if snapshot["error"]:
        parts.append(f"error: {snapshot['error']}")
    return "; ".join(parts)


def counts_of(snapshot: dict[str, Any]) -> Counts:
    """What a progress bar is told: how much is here; while it is compared once more, how much of that is done."""
    if snapshot["state"] == "verifying":
        return Counts(snapshot["verified_bytes"], snapshot["size"], state="verifying")
    names = ["same", "fetched", "zero", *(["resumed"] if snapshot["resumed_bytes"] else [])]
    parts = {name: snapshot[f"{name}_bytes"] for name in names}
    hydrated, state = snapshot["hydrated_bytes"], snapshot["state"]
    return Counts(hydrated, snapshot["size"], parts, state=state, skipped=snapshot.get("hole_bytes", 0))
