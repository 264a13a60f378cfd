"""An ordered pipeline of threads.

    items ──> worker threads ── results, in the order of the items ──> caller

A free worker takes the next item itself, and works on it. Only the result is handed over. The caller of
`run_ordered` consumes the results. Errors keep the order of the results: all results before an error are
delivered, and the first error is raised. If the caller stops early, a worker that waits for input is woken, all
workers end, and no thread is left.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Callable, Generic, NoReturn, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKERS = min(len(os.sched_getaffinity(0)), 8)

DEPTH = WORKERS + 2
"""Items that are taken before the writer has the first of them: enough that nobody waits for a slow one."""


def run_ordered(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    consume: Callable[[Result], None],
    *,
    wake: Callable[[], None] | None = None,
) -> None:
    """`consume(work(item))` for each item, in order: items are made, one after the other, and worked on
    in WORKERS threads, DEPTH ahead, and consumed here.

    Raises the first error, in the order of the items. `wake` is called, from the caller's thread,
    when a worker has to end although it may be waiting for input.
    """
    line = _Line(items, work)
    workers = [threading.Thread(target=line.serve, name=f"work-{number}") for number in range(WORKERS)]
    try:
        for worker in workers:
            worker.start()
        for result in line.results():
            consume(result)
    finally:
        line.stop()
        if wake is not None:
            wake()
        for worker in workers:
            if worker.ident is not None:  # it was started
                worker.join()


class _End(Exception):
    """There are no more items: what comes in the turn of the one after the last."""


class _Line(Generic[Item, Result]):
    def __init__(self, items: Iterable[Item], work: Callable[[Item], Result]) -> None:
        self._items = iter(items)
        self._work = work
        self._taking = threading.Lock()  # held by the worker that takes the next item, or waits for it
        self._taken = 0
        self._ended = False
        self._may_take: queue.SimpleQueue[bool] = queue.SimpleQueue()  # a permit for each item; False: end
        for _ in range(DEPTH):
            self._may_take.put(True)
        self._outcomes: queue.SimpleQueue[tuple[int, Callable[[], Result]]] = queue.SimpleQueue()

    def serve(self) -> None:
        """A worker's life."""
        while self._may_take.get():
            with self._taking:
                if self._ended:
                    return
                number = self._taken
                self._taken += 1
                try:
                    item = next(self._items)
                except BaseException as error:  # noqa: BLE001  (handed on in order, raised by the caller)
                    self._ended = True
                    self._outcomes.put((number, _raiser(_End() if isinstance(error, StopIteration) else error)))
                    return
            try:
                outcome = _returner(self._work(item))
            except BaseException as error:  # noqa: BLE001  (as above)
                outcome = _raiser(error)
            self._outcomes.put((number, outcome))
            del item, outcome  # not held while the next one is waited for

    def results(self) -> Iterator[Result]:
        """In order; raises what was raised in their place."""
        early: dict[int, Callable[[], Result]] = {}
        for number in itertools.count():
            while number not in early:
                early.update([self._outcomes.get()])
            try:
                result = early.pop(number)()
            except _End:
                return
            self._may_take.put(True)
            yield result
            del result

    def stop(self) -> None:
        """No item is taken from now on."""
        self._ended = True
        for _ in range(WORKERS):
            self._may_take.put(False)


def _returner(result: Result) -> Callable[[], Result]:
    return lambda: result


def _raiser(error: BaseException) -> Callable[[], NoReturn]:
    def throw() -> NoReturn:
        raise error

    return throw
