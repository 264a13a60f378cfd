"""An ordered pipeline of threads.

    items ──> worker threads ── results, in the order of the items ──> caller

A free worker takes the next item and works on it. Only the result changes threads. The caller of `run_ordered`
consumes the results. All results before an error are delivered, and then the first error is raised. If the caller
stops early, a worker that waits for input is woken. All workers end then, and no thread is left.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Callable, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKERS = min(len(os.sched_getaffinity(0)), 8)
"""Number of worker threads: one a CPU, at most 8."""

DEPTH = WORKERS + 2
"""Maximum number of items in the pipeline. The surplus over WORKERS keeps workers busy behind a slow item."""


def run_ordered(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    consume: Callable[[Result], None],
    *,
    wake: Callable[[], None] | None = None,
    workers: Callable[[], int] = lambda: WORKERS,
) -> None:
    """Call `consume(work(item))` for each item, in order. Returns when all results are consumed.

    WORKERS threads iterate over `items`, one at a time, and call `work`. This thread calls `consume`. At the end,
    this thread calls `wake` without arguments: `wake` must interrupt a worker that waits in `next(items)`.
    `workers`: called without arguments by any thread, returns how many of them may go on. It may become less.

    Raises the first error of `items`, `work` or `consume`, in the order of the items.
    """
    line = _Line(items, work, workers)
    threads = [threading.Thread(target=line.serve, args=[at], name=f"work-{at}") for at in range(WORKERS)]
    try:
        for thread in threads:
            thread.start()
        for result in line.results():
            consume(result)
    finally:
        line.stop()
        if wake is not None:
            wake()
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join()


class _End(Exception):
    """The end of the items. Takes the place of the result after the last."""


class _Line(Generic[Item, Result]):
    """The `items`, the results of `work`, and the permits that bound them. Shared by the workers and the caller."""

    def __init__(self, items: Iterable[Item], work: Callable[[Item], Result], workers: Callable[[], int]) -> None:
        self._items = iter(items)
        self._work = work
        self._workers = workers
        self._taking = threading.Lock()  # held by the worker that takes the next item, or waits for it
        self._taken = 0
        self._ended = False
        self._permits: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: take an item. False: end
        for _ in range(DEPTH):
            self._permits.put(True)
        self._outcomes: queue.SimpleQueue[tuple[int, Future[Result]]] = queue.SimpleQueue()

    def serve(self, at: int) -> None:
        """Take items and work on them until the items end or `stop()` is called. Runs in each worker thread.

        `at`: the number of the thread, from 0. Threads beyond the number of `workers` end, except the first.
        """
        while self._permits.get():
            if 0 < at >= self._workers():
                self._permits.put(True)  # for another thread
                return
            with self._taking:
                if self._ended:
                    return
                number = self._taken
                self._taken += 1
                outcome: Future[Result] = Future()
                try:
                    item = next(self._items)
                except BaseException as error:  # noqa: BLE001  (passed on in order, raised by the caller)
                    self._ended = True
                    outcome.set_exception(_End() if isinstance(error, StopIteration) else error)
                    self._outcomes.put((number, outcome))
                    return
            try:
                outcome.set_result(self._work(item))
            except BaseException as error:  # noqa: BLE001  (as above)
                outcome.set_exception(error)
            self._outcomes.put((number, outcome))
            del item, outcome  # releases their buffers while this thread waits

    def results(self) -> Iterator[Result]:
        """Yield the results in order. Raises an error of a worker in the place of its result."""
        early: dict[int, Future[Result]] = {}
        for number in itertools.count():
            while number not in early:
                early.update([self._outcomes.get()])
            try:
                result = early.pop(number).result()
            except _End:
                return
            self._permits.put(True)
            yield result
            del result

    def stop(self) -> None:
        """End all workers after their current item."""
        self._ended = True
        for _ in range(WORKERS):
            self._permits.put(False)
