"""Notifications to systemd by a unit with Type=notify. See sd_notify(3): each is a datagram of NAME=value lines.

    READY=1      reads are served          STATUS=     one line about the copy, when it has changed
    STOPPING=1   the end has begun         WATCHDOG=1  trio's thread is alive, if WatchdogSec= is set

No more of the protocol is needed, so this module speaks it without a library.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket

import trio

from blockcopy.replica.monitor.status import MonitoredReplica, short_summary
from blockcopy.untrusted_text import printable

logger = logging.getLogger(__name__)

_SECONDS = 3
"""Interval between two looks at the status."""


class Notifier:
    """The service manager that started this process, if it listens. Child processes find no NOTIFY_SOCKET."""

    def __init__(self) -> None:
        """Take NOTIFY_SOCKET and the watchdog's variables out of the environment, and connect."""
        self._manager = _connected(os.environ.pop("NOTIFY_SOCKET", ""))
        self._watchdog = _watchdog_seconds() if self._manager else None

    def notify(self, **variables: object) -> None:
        """Send one datagram with a line NAME=value for each keyword of `variables`. Never blocks, never fails."""
        if self._manager is None:
            return
        text = "\n".join(f"{name}={printable(str(value))}" for name, value in variables.items())
        try:
            self._manager.send(text.encode(errors="replace"))
        except OSError as error:
            logger.debug("NOTIFY_SOCKET: %s", error)

    async def keep_notifying(self, replica: MonitoredReplica) -> None:
        """Send the status of `replica` when it changes, and the watchdog's sign of life.

        Returns when the replica is settled or, if a watchdog is set, never. Call from trio's thread only.
        """
        if self._manager is None:
            return
        last = None
        while True:
            settled = replica.settled.is_set()
            if (line := short_summary(replica.status())) != last:
                self.notify(STATUS=line)
                last = line
            if self._watchdog:
                self.notify(WATCHDOG=1)
            elif settled:
                return
            with trio.move_on_after(min(_SECONDS, self._watchdog or _SECONDS)):
                await (trio.sleep_forever() if settled else replica.settled.wait())


def _connected(address: str) -> socket.socket | None:
    """Return a socket connected to `address`, before a mount can hide its path. Returns None if nobody listens."""
    if not address:
        return None
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.setblocking(False)
    try:
        manager.connect(f"\0{address[1:]}" if address.startswith("@") else address)
    except OSError as error:
        manager.close()
        logger.debug("NOTIFY_SOCKET: %s", error)
        return None
    return manager


def _watchdog_seconds() -> float | None:
    """Return half of the watchdog's seconds, as systemd advises. Returns None if this process has no watchdog."""
    microseconds, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
    with contextlib.suppress(ValueError):
        if pid in ("", str(os.getpid())) and int(microseconds) > 0:
            return int(microseconds) / 2e6
    return None
