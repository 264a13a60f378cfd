"""Signals that come when nobody in trio receives them; the one error that is told."""

from __future__ import annotations

import os
import signal

import pytest
import trio

from blockcopy.errors import BlockcopyError, Interrupted
from blockcopy.replica.tasks import runner


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_nobody_receives_is_raised_behind_the_run(signum: signal.Signals) -> None:
    ended = []

    async def main() -> None:
        os.kill(os.getpid(), signum)
        await trio.lowlevel.checkpoint()
        ended.append(True)

    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as caught:
        runner.run(main)
    assert (caught.value.signum, ended) == (signum, [True])
    assert signal.getsignal(signum) == before


def test_a_signal_that_came_before_it_is_received() -> None:
    async def main() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        async with runner.receive_signals() as signals:
            with trio.fail_after(5):
                return await anext(aiter(signals))

    assert runner.run(main) == signal.SIGTERM


def test_a_signal_cancels_what_is_interruptible() -> None:
    async def main() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await trio.sleep_forever()

    with pytest.raises(Interrupted):
        runner.run(lambda: runner.run_interruptible(main))


def test_the_error_in_the_groups_is_told() -> None:
    async def main() -> None:
        async with trio.open_nursery(), trio.open_nursery():
            raise BlockcopyError("the disk is on fire")

    with pytest.raises(BlockcopyError, match="on fire"):
        runner.run(main)
