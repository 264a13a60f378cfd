"""One snapshot of a replica, as JSON and as a line. Counts completed work; percents are floored."""

from __future__ import annotations

import json
import time
from collections import deque
from typing import Any

_RATE_SECONDS = 10


class RateMeter:
    """Bytes a second over the last ten seconds, of a counter that is sampled each second."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=_RATE_SECONDS)

    def sample(self, count: int) -> None:
        self._samples.append((time.monotonic(), count))

    def rate(self, count: int) -> int:
        """Of the counter that stands at `count` now; 0 as long as nothing can be said."""
        if not self._samples:
            return 0
        then, before = self._samples[0]
        return max(0, int((count - before) / max(time.monotonic() - then, 0.001)))


def floored_percent(part: int, whole: int) -> float:
    """With two digits, and 100 only for the whole."""
    return 100.0 if part >= whole else part * 10000 // whole / 100


def to_json(snapshot: dict[str, Any]) -> bytes:
    return json.dumps(snapshot, indent=2).encode() + b"\n"


def one_line(snapshot: dict[str, Any]) -> str:
    """For people: state, how much is here, what it took, and whether the source is still needed."""
    came = f"{human_size(snapshot['same_bytes'])} were equal, {human_size(snapshot['fetched_bytes'])} fetched"
    if snapshot["zero_bytes"]:
        came += f", {human_size(snapshot['zero_bytes'])} zeros"
    if snapshot["resumed_bytes"]:
        came = f"{human_size(snapshot['resumed_bytes'])} were recorded, {came}"
    parts = [
        f"{snapshot['state']}: {snapshot['hydrated_percent']:.2f} % of {human_size(snapshot['size'])}",
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


def human_size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def human_time(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
