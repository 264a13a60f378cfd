"""`--metrics FILE`: the status as text for Prometheus, for node_exporter's textfile collector.

The format is a line of name, labels and a number for each fact (prometheus.io, "Exposition formats"), so it is
written out here: a client library would bring a registry and a server that nobody needs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import trio

from blockcopy.paths import safe_write
from blockcopy.replica.tasks import abandonable

logger = logging.getLogger(__name__)

_SECONDS = 10

_LAST_SECONDS = 2
"""How long the last write may take, when we end."""

STATES = ("starting", "hydrating", "paused", "reconnecting", "verifying", "complete", "failed")

_FACTS = {
    "size": ("blockcopy_size_bytes", "gauge", "Size of the source."),
    "hydrated_bytes": ("blockcopy_hydrated_bytes", "gauge", "Bytes of the copy that are right."),
    "resumed_bytes": ("blockcopy_resumed_bytes", "gauge", "Of these, bytes that were on record."),
    "same_bytes": ("blockcopy_same_bytes", "gauge", "Of these, bytes that were equal."),
    "fetched_bytes": ("blockcopy_fetched_bytes", "gauge", "Of these, bytes that were sent."),
    "zero_bytes": ("blockcopy_zero_bytes", "gauge", "Of these, zeros that were not sent."),
    "sent_bytes": ("blockcopy_sent_bytes_total", "counter", "Bytes sent to the source."),
    "received_bytes": ("blockcopy_received_bytes_total", "counter", "Bytes received from the source."),
    "rate_bytes_per_s": ("blockcopy_rate_bytes_per_second", "gauge", "How fast the copy grows."),
    "eta_seconds": ("blockcopy_eta_seconds", "gauge", "Seconds to go, where that is known."),
    "elapsed_seconds": ("blockcopy_elapsed_seconds", "gauge", "Seconds since it was started."),
    "source_needed": ("blockcopy_source_needed", "gauge", "1 as long as the source must stay."),
}
_DEMAND = {
    "reads": ("blockcopy_reads_total", "counter", "Reads of users."),
    "bytes": ("blockcopy_read_bytes_total", "counter", "Bytes that users read."),
    "waiting": ("blockcopy_reads_waiting", "gauge", "Reads that wait for the source now."),
    "latency_p50_seconds": ("blockcopy_read_wait_p50_seconds", "gauge", "Of late, half of the waits were shorter."),
    "latency_p99_seconds": ("blockcopy_read_wait_p99_seconds", "gauge", "Of late, 99 % of the waits were shorter."),
    "latency_max_seconds": ("blockcopy_read_wait_max_seconds", "gauge", "Of late, the longest wait."),
}


def text(snapshot: dict[str, Any]) -> str:
    """All that is known of a snapshot; what is null is left out."""
    labels: dict[str, str] = {
        name: str(snapshot[name]) for name in ("source", "destination", "mountpoint") if name in snapshot
    }
    lines: list[str] = []

    def describe(name: str, kind: str, words: str) -> None:
        lines.extend([f"# HELP {name} {words}", f"# TYPE {name} {kind}"])

    def add(name: str, value: float, more: dict[str, str] | None = None) -> None:
        described: dict[str, str] = {**labels, **(more or {})}
        pairs = ",".join(f'{key}="{_escaped(label)}"' for key, label in described.items())
        lines.append(f"{name}{{{pairs}}} {float(value):.16g}")

    for facts, values in ((_FACTS, snapshot), (_DEMAND, snapshot["demand"])):
        for field, (name, kind, words) in facts.items():
            if values[field] is not None:
                describe(name, kind, words)
                add(name, values[field])
    describe("blockcopy_reconnects_total", "counter", "Connections made again.")
    add("blockcopy_reconnects_total", snapshot["link"]["reconnects"])
    describe("blockcopy_state", "gauge", "1 for the state it is in.")
    for state in STATES:
        add("blockcopy_state", state == snapshot["state"], {"state": state})
    return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


async def keep_writing(path: str | None, snapshot: Callable[[], dict[str, Any]]) -> None:
    """Each ten seconds, and once more when cancelled. A file that cannot be written is logged, no more."""
    if path is None:
        return
    try:
        while True:
            await abandonable.run(partial(_write, path, snapshot()))
            await trio.sleep(_SECONDS)
    finally:
        try:
            await abandonable.run_within(partial(_write, path, snapshot()), _LAST_SECONDS)
        except TimeoutError as error:
            logger.warning("cannot write --metrics %s: %s", path, error.strerror)


def _write(path: str, snapshot: dict[str, Any]) -> None:
    """Whoever reads it sees all of one moment."""
    try:
        # A path may be any bytes, and a file of metrics is UTF-8.
        safe_write.replace(path, text(snapshot).encode(errors="replace"), 0o644)
    except OSError as error:
        logger.warning("cannot write --metrics %s: %s", path, error.strerror)
