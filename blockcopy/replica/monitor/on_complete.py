"""`--on-complete COMMAND`: what a user has run once the copy is complete, synced, and the source let go.

What it fails with is logged, and is no failure of the copy. It is given the facts of the status in its
environment, and is on its own afterwards: a mount that ends leaves it running. (It may be the one who
ends it: `blockcopy umount "$BLOCKCOPY_MOUNTPOINT" && mount …`.)
"""

from __future__ import annotations

import logging
import os
import subprocess
from functools import partial
from typing import Any

import trio

from blockcopy.errors import describe_exit
from blockcopy.replica.tasks import abandonable

logger = logging.getLogger(__name__)

_FAREWELL_SECONDS = 1
"""How long a command that is nearly done may take to be done, when we end."""


def environment(snapshot: dict[str, Any]) -> dict[str, str]:
    """BLOCKCOPY_SIZE, BLOCKCOPY_FETCHED_BYTES, …: each field of the status that is one value."""
    facts = {name: value for name, value in snapshot.items() if isinstance(value, (str, int, float))}
    return {
        f"BLOCKCOPY_{name.upper()}": str(int(value) if isinstance(value, bool) else value)
        for name, value in facts.items()
    }


async def run(command: str, snapshot: dict[str, Any], folder: str) -> None:
    """Run it by the shell in `folder`, to its end. Cancelled, it is waited for shortly, and left."""
    logger.info("running --on-complete: %s", command)
    try:
        process = await abandonable.start_process(
            partial(_start, command, folder, {**os.environ, **environment(snapshot)})
        )
    except OSError as error:
        logger.error("--on-complete cannot be run: %s", error)
        return
    try:
        status = await abandonable.wait_for_exit(process)
    except trio.Cancelled:
        with trio.CancelScope(shield=True), trio.move_on_after(_FAREWELL_SECONDS):
            _tell(await abandonable.wait_for_exit(process))
            raise
        logger.warning("--on-complete is still running, and is left to itself (process %d)", process.pid)
        raise
    _tell(status)


def _start(command: str, folder: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        cwd=folder if os.path.isdir(folder) else None,
        env=environment,
        start_new_session=True,
    )


def _tell(status: int) -> None:
    if status:
        logger.error("--on-complete failed: it %s", describe_exit(status))
