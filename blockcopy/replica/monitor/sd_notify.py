"""What systemd is told of a unit with Type=notify: sd_notify(3), which is a datagram of a line or more.

    READY=1      reads are served          STATUS=     how the copy is doing, where that has changed
    STOPPING=1   the end has begun         WATCHDOG=1  trio's thread is alive, where WatchdogSec= is set

That is all of the protocol that is needed here, so it is written out rather than taken from a library.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import Any

import trio

from blockcopy.progress.rate import human_size, human_time
from blockcopy.replica.monitor.status import Watched
from blockcopy.untrusted_text import printable

logger = logging.getLogger(__name__)

_SECONDS = 3
"""Between two looks at the status."""


class Notifier:
    """Tells who has started us, if that listens. What we start does not: it finds no NOTIFY_SOCKET."""

    def __init__(self) -> None:
        self._manager = _connected(os.environ.pop("NOTIFY_SOCKET", ""))
        self._watchdog = _watchdog_seconds() if self._manager else None

    def tell(self, **facts: object) -> None:
        """A line NAME=value each. A manager that went away is not an error of ours."""
        if self._manager is None:
            return
        text = "\n".join(f"{name}={printable(str(value))}" for name, value in facts.items())
        try:
            self._manager.send(text.encode(errors="replace"))
        except OSError as error:
            logger.debug("NOTIFY_SOCKET: %s", error)

    async def keep_telling(self, replica: Watched) -> None:
        """The status, and that we live, until cancelled or, without a watchdog, until the replica is settled."""
        if self._manager is None:
            return
        last = None
        while True:
            settled = replica.settled.is_set()
            if (status := one_line(replica.snapshot())) != last:
                self.tell(STATUS=status)
                last = status
            if self._watchdog:
                self.tell(WATCHDOG=1)
            elif settled:
                return
            with trio.move_on_after(min(_SECONDS, self._watchdog or _SECONDS)):
                await (trio.sleep_forever() if settled else replica.settled.wait())


def _connected(address: str) -> socket.socket | None:
    """Connect while no mount of ours can be in the way of the path. Returns None if nobody listens."""
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
    """Half of what systemd waits, as it advises; None where it does not."""
    microseconds, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
    with contextlib.suppress(ValueError):
        if pid in ("", str(os.getpid())) and int(microseconds) > 0:
            return int(microseconds) / 2e6
    return None


def one_line(snapshot: dict[str, Any]) -> str:
    """For `systemctl status`: the state, how much is here, how long still, what is wrong."""
    text = f"{snapshot['state']}: {snapshot['hydrated_percent']:.2f} % of {human_size(snapshot['size'])}"
    if snapshot["eta_seconds"] is not None:
        text += f", {human_size(snapshot['rate_bytes_per_s'])}/s, {human_time(snapshot['eta_seconds'])} to go"
    error = snapshot["error"]
    if snapshot["link"]["state"] == "reconnecting":
        error = error or snapshot["link"]["last_error"]
    return f"{text}; {error}" if error else text
