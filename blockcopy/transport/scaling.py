"""How many connections a copy has: as many as pay. No I/O.

OpenSSH gives each channel a window of 2 MiB (CHAN_SES_WINDOW_DEFAULT in its channels.h). So a channel carries at
most 2 MiB a round trip, whatever the line carries. Several channels have several windows.

A copy begins with one connection. It opens more while the window of its channels binds. With a login for each
connection, it also does so while the link binds. Then as much is in flight as the windows allow. It keeps them if
the rate rises by a tenth. Otherwise it takes them back, and tries again later. If it is idle, it keeps one.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

MAX_CONNECTIONS = 10
"""Most connections that pay. sshd allows ten sessions a login (MaxSessions in sshd_config(5))."""

SAMPLE_SECONDS, SLOW_SAMPLE_SECONDS = 0.1, 1
"""Seconds between two samples, and if nothing is in flight or there is one connection at most."""

CHANNEL_WINDOW = 2 << 20
"""Bytes that a channel of OpenSSH carries a round trip, at most."""

_BOUND_SHARE = 0.5
"""Share of the channel's window from which on it binds. ssh grants it anew in steps."""

_GAIN = 1.1
"""Factor by which the rate must rise for more connections to stay."""

_MIN_SECONDS, _MIN_ROUND_TRIPS = 0.3, 3
"""Least duration of a measurement."""

_BOLD_RATE = 400e6
"""Bytes per second that fast links carry. If the window binds, so many connections are opened at once.

Otherwise their number doubles.
"""

_WORTH_SECONDS = 1.5
"""Seconds of work that each connection must have at least: to open one takes time, and CPU at both ends."""

_HOLD_SECONDS, _MAX_HOLD_SECONDS = 30, 600
"""Seconds until more connections are tried again after they did not pay. The time doubles up to the second one."""

_RATE_SECONDS, _PEAK_SECONDS = 2, 60
"""Seconds over which a rate is measured, and for which the highest one is remembered."""

_IDLE_SECONDS = 30
"""Seconds without a byte after which extra connections are taken back."""


class Sample(NamedTuple):
    """The state of all connections at one moment."""

    now: float
    """Seconds, by trio's clock or the monotonic one."""
    received: int
    """Bytes received over all connections so far. For a push, bytes sent."""
    connections: int
    """Connections that can be asked, at least 1."""
    round_trip: float | None
    """Seconds, or None if unknown."""
    is_full: bool
    """Whether as much is in flight as the windows allow."""
    remaining: float = math.inf
    """Bytes that are still to come, as far as that can be told."""


class PeakRate:
    """The highest rate of the last minute, each over two seconds: what a link carries, without bursts."""

    def __init__(self) -> None:
        self._since: tuple[float, int] | None = None
        self._rates: deque[tuple[float, float]] = deque()
        """(time, rate), the rates descending. Each is the highest since its time."""

    @property
    def rate(self) -> float:
        """Bytes per second. 0 if unknown."""
        return self._rates[0][1] if self._rates else 0.0

    def add(self, now: float, received: int) -> None:
        """Note that `received` bytes had come at the time `now`, in seconds."""
        if self._since is None:
            self._since = now, received
        since, before = self._since
        if now - since < _RATE_SECONDS:
            return
        self._since = now, received
        rate = (received - before) / (now - since)
        while self._rates and self._rates[-1][1] <= rate:
            self._rates.pop()
        self._rates.append((now, rate))
        while self._rates[0][0] < now - _PEAK_SECONDS:
            self._rates.popleft()


class Scaling:
    """The number of connections of one pool or push. Call from one thread only."""

    def __init__(self, max_connections: int, *, is_fixed: bool = False, shares_login: bool = True) -> None:
        """Decide on up to `max_connections`. `is_fixed`: always on that number.

        `shares_login`: whether all connections are channels of one login, and so of one TCP connection.
        """
        self.max_connections = max_connections
        self.shares_login = shares_login
        self.is_window_bound = False
        """Whether the window of ssh's channels bound the rate in the last measurement."""
        self.is_full = False
        """Whether in the last measurement mostly as much was in flight as the windows allow."""
        self.is_measured = False
        """Whether there was a measurement. The other attributes mean nothing before."""
        self.rate = 0.0
        """Bytes per second received in the last measurement."""
        self._peak = PeakRate()
        self._is_fixed = is_fixed
        self._is_asked = False  # the fixed number was asked for, and not seen yet
        self._since, self._received, self._full = -math.inf, 0, 0  # the measurement that runs
        self._samples = 0
        self._before: tuple[int, float] | None = None  # connections and rate before the last growth
        self._hold_until = -math.inf
        self._hold = float(_HOLD_SECONDS)
        self._busy_at = -math.inf

    @property
    def peak_rate(self) -> float:
        """The highest rate of the last minute, in bytes per second."""
        return self._peak.rate

    def restart(self, now: float, received: int) -> None:
        """Begin a new measurement at `now`, in seconds, with `received` bytes."""
        self._since, self._received, self._full, self._samples = now, received, 0, 0

    def decide(self, sample: Sample) -> int:
        """Return how many connections there should be after this `sample`, at least 1."""
        if self._samples == 0 and self._since == -math.inf:
            self.restart(sample.now, sample.received)
            self._busy_at = sample.now
        self._samples += 1
        self._peak.add(sample.now, sample.received)
        self._full += sample.is_full
        seconds = max(_MIN_SECONDS, _MIN_ROUND_TRIPS * (sample.round_trip or 0))
        if sample.now - self._since < seconds:
            return self._fixed(sample) if self._is_fixed else sample.connections
        self.rate = (sample.received - self._received) / (sample.now - self._since)
        self.is_full, self.is_measured = self._full > self._samples / 2, True
        share = self.rate * (sample.round_trip or 0) / sample.connections / CHANNEL_WINDOW
        self.is_window_bound = share >= _BOUND_SHARE
        self.restart(sample.now, sample.received)
        if self._is_fixed:
            return self._fixed(sample)
        if self.rate:
            self._busy_at = sample.now
        elif sample.now - self._busy_at > _IDLE_SECONDS:
            self._before = None
            return 1
        return self._judge(sample)

    def _fixed(self, sample: Sample) -> int:
        """Return the fixed number after `sample`. After a refusal, wait before the next attempt."""
        if sample.connections >= self.max_connections:
            self._is_asked = False
            return self.max_connections
        if self._is_asked:  # fewer than asked for: refused
            self._is_asked = False
            self._hold_until = sample.now + _HOLD_SECONDS
        if sample.now < self._hold_until:
            return sample.connections
        self._is_asked = True
        return self.max_connections

    def _judge(self, sample: Sample) -> int:
        """Return the number of connections after the measurement that ends with `sample`."""
        count = sample.connections
        if self._before is not None:
            (before, rate), self._before = self._before, None
            if count <= before or self.rate < rate * _GAIN:
                self._hold_until = sample.now + self._hold
                self._hold = min(2 * self._hold, _MAX_HOLD_SECONDS)
                return before if count > before else count
            self._hold = _HOLD_SECONDS
        may_pay = self.is_window_bound or (self.is_full and not self.shares_login)
        if not may_pay or sample.now < self._hold_until or count >= self.max_connections:
            return count
        worth = min(count * sample.remaining / max(self.rate, 1) / _WORTH_SECONDS, self.max_connections)
        if worth < count + 1:
            return count
        self._before = count, self.rate
        bold = int(count * _BOLD_RATE / self.rate) if self.is_window_bound else 0
        return min(max(2 * count, bold), int(worth))
