"""Signals that come when nobody in trio receives them; the one error that is told; work that may hang."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest
import trio

from blockcopy.errors import BlockcopyError, Interrupted
from blockcopy.replica.tasks import runner
from blockcopy.replica.tasks.one_at_a_time import OneAtATime


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


# Work in turn, which may hang


def test_what_hung_is_never_done_late_and_never_beside_other_work() -> None:
    done: list[str] = []
    began, may_end = threading.Event(), threading.Event()

    def hang() -> None:
        began.set()
        may_end.wait()
        done.append("hung")

    async def main() -> None:
        turns = OneAtATime(0.1)

        async def times_out(work: Callable[[], None]) -> None:
            with pytest.raises(TimeoutError):
                await turns.run(work)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(times_out, hang)
            while not began.is_set():
                await trio.sleep(0.001)
            nursery.start_soon(times_out, lambda: done.append("too late"))
        with pytest.raises(TimeoutError):
            await turns.run(lambda: done.append("too late"), after=lambda: done.append("the sync"))
        may_end.set()
        with trio.fail_after(5):
            while "hung" not in done:
                await trio.sleep(0.01)
        await turns.run(lambda: done.append("in time"))

    trio.run(main)
    assert done == ["the sync", "hung", "in time"]


def test_what_goes_before_has_no_time_limit_and_its_error_is_the_last_word() -> None:
    done: list[str] = []

    def slow() -> None:
        threading.Event().wait(0.5)
        done.append("slow")

    def fail() -> None:
        raise ZeroDivisionError

    async def main() -> None:
        turns = OneAtATime(0.1)
        await turns.run(lambda: done.append("work"), after=slow)
        with pytest.raises(ZeroDivisionError):
            await turns.run(lambda: done.append("never"), after=fail)
        with pytest.raises(ZeroDivisionError):
            await turns.run(fail)
        with trio.CancelScope() as scope:
            scope.cancel()
            await turns.run(lambda: done.append("never"))

    trio.run(main)
    assert done == ["slow", "work"]


def test_a_thread_that_is_left_behind_does_not_disturb_the_end() -> None:
    hung = threading.Event()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await OneAtATime(0.05).run(lambda: hung.wait() and None)

    trio.run(main)
    hung.set()
