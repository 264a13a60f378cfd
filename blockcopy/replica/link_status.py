"""The status of all connections to the source together, and what binds the rate of a copy.

If as much is in flight as the windows allow, this end waits for the source or the link. Otherwise this end binds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from blockcopy.errors import SourceError
from blockcopy.replica.hydration.throttle import Throttle
from blockcopy.replica.monitor.status import Bottleneck, LinkState, LinkStatus
from blockcopy.replica.source.pool import Pool

_BUSY_SHARE = 0.8
"""Share of all CPUs from which on this process counts as bound by them."""

_LINK_SHARE = 0.5
"""Bytes that cross the link per byte copied, from which on the link rather than the source's disk binds."""


class LinkMonitor:
    """The LinkStatus of the connections to one source, made on request. Call from trio's thread only."""

    def __init__(self, pools: Sequence[Pool], bulk: Pool, throttle: Throttle) -> None:
        """Watch the connections of `pools`, and what binds the `bulk` one, to which `throttle` admits."""
        self._pools = pools
        self._bulk = bulk
        self._throttle = throttle
        self._cpu = (time.monotonic(), time.process_time())
        self._cpu_share = 0.0

    def sample(self) -> None:
        """Measure how busy this process has been since the last call. Call once a second."""
        now, used = time.monotonic(), time.process_time()
        before, used_before = self._cpu
        cpus = len(os.sched_getaffinity(0))
        self._cpu_share = (used - used_before) / max(now - before, 0.001) / cpus
        self._cpu = now, used

    @property
    def last_error(self) -> SourceError | None:
        """The last error of a connection to the source. None if none has failed."""
        return next((pool.last_error for pool in self._pools if pool.last_error), None)

    def status(self, rate: int, *, is_closing: bool, is_copying: bool) -> LinkStatus:
        """Return the LinkStatus of this moment.

        `rate`: bytes per second by which the copy grows. `is_closing`: whether the connections are closed for good.
        `is_copying`: whether background hydration is at work.
        """
        last_error = self.last_error
        if is_closing:
            state = LinkState.CLOSED
        elif all(pool.is_connected for pool in self._pools):
            state = LinkState.CONNECTED
        else:  # a connection that was up and is not has an error
            state = LinkState.RECONNECTING if last_error else LinkState.CONNECTING
        round_trip = self._bulk.round_trip
        digest = self._bulk.connector.digest
        return LinkStatus(
            state=state,
            reconnects=sum(pool.reconnects for pool in self._pools),
            last_error=str(last_error) if last_error else None,
            connections=sum(pool.connections for pool in self._pools),
            round_trip_seconds=round(round_trip, 6) if round_trip is not None else None,
            digest=digest.name if digest else None,
            bottleneck=self._bottleneck(rate) if is_copying and state is LinkState.CONNECTED else None,
        )

    def _bottleneck(self, rate: int) -> Bottleneck | None:
        """Return what binds now. `rate`: as for `status`. Returns None if nothing was measured yet."""
        if self._throttle.is_limited:
            return Bottleneck.LIMIT
        if self._throttle.yields:
            return Bottleneck.READERS
        scaling = self._bulk.scaling
        if not scaling.is_measured:
            return None
        if scaling.is_window_bound:
            return Bottleneck.SSH_WINDOW
        if scaling.is_full:
            is_remote = self._bulk.connector.command.location.host is not None
            return Bottleneck.LINK if is_remote and scaling.rate > _LINK_SHARE * rate else Bottleneck.SOURCE
        return Bottleneck.CPU if self._cpu_share > _BUSY_SHARE else Bottleneck.DESTINATION
