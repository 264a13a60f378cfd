"""`--on-complete COMMAND`: a user's command, run once the copy is complete and synced, and the source disconnected.

A command that fails is logged, and the copy is still a success. The command finds the status in its environment.
It is independent afterwards: a mount that ends leaves it running. The command may even be what ends the mount:
`blockcopy umount "$BLOCKCOPY_MOUNTPOINT" && mount …`.
"""

from __future__ import annotations

import logging
import os
import subprocess
from functools import partial

import trio

from blockcopy.errors import describe_exit
from blockcopy.replica.monitor.status import Status
from blockcopy.replica.plan import Plan
from blockcopy.replica.tasks import abandonable

logger = logging.getLogger(__name__)

_LAST_WAIT_SECONDS = 1
"""How long a running command is waited for when the program ends."""


def environment(status: Status) -> dict[str, str]:
    """Return a dict of environment variables, one for each field of `status` that is one value.

    BLOCKCOPY_SIZE and BLOCKCOPY_STATE are two of them.
    """
    return {
        f"BLOCKCOPY_{name.upper()}": str(int(value) if isinstance(value, bool) else value)
        for name, value in status.as_dict().items()
        if isinstance(value, (str, int, float))
    }


async def run(plan: Plan, status: Status) -> None:
    """Run `plan.on_complete` by /bin/sh, with `status` in its environment, and return when it has ended.

    Does nothing if there is no such command. The command runs in the folder in which this program was started.
    A command that cannot be run, or that fails, is logged. If this function is cancelled, it waits for a second
    and leaves the command running. Call from trio's thread only.
    """
    if not plan.on_complete:
        return
    logger.info("running --on-complete: %s", plan.on_complete)
    variables = {**os.environ, **environment(status)}
    start = partial(_start, plan.on_complete, plan.command.working_dir, variables)
    try:
        process = await abandonable.start_process(start)
    except OSError as error:
        logger.error("cannot run --on-complete: %s", error)
        return
    try:
        exit_status = await abandonable.wait_for_exit(process)
    except trio.Cancelled:
        with trio.CancelScope(shield=True), trio.move_on_after(_LAST_WAIT_SECONDS):
            _log_failure(await abandonable.wait_for_exit(process))
            raise
        logger.warning("--on-complete still runs as process %d, and continues after this program", process.pid)
        raise
    _log_failure(exit_status)


def _start(command: str, folder: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        cwd=folder if os.path.isdir(folder) else None,
        env=environment,
        start_new_session=True,
    )


def _log_failure(exit_status: int) -> None:
    if exit_status:
        logger.error("--on-complete failed: it %s", describe_exit(exit_status))
