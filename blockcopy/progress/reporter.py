"""The interface of all progress reporters. A command gives its counts to a reporter while it runs.

    with PROGRESS as progress:        progress.update(Counts(done, total)), as often as there is news;
        …                             progress.finish() once all is done

`lines` and `bar` have the reporters that report something.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Counts(NamedTuple):
    """How far a command is, in bytes of completed work."""

    done: int
    total: int | None = None
    """None if unknown yet."""
    parts: Mapping[str, int] = {}
    """The bytes done, by what became of them: `same`, `fetched`, `zero` and so on."""
    position: int | None = None
    """The offset on the device, if that differs from `done`."""
    state: str | None = None
    """A word for the current activity, if a command has several."""
    word: str | None = None
    """The word for people if that is another than `state`."""
    skipped: int = 0
    """Bytes done without any work, such as holes. `done` counts them, and no rate includes them."""


class Progress:
    """A reporter that reports nothing. The base class of all others."""

    silent = True
    """True if `update` has no effect, so that callers need not call it."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        """End all reports. `exc`: the exception that ends the `with` statement, as for any context manager."""

    def update(self, counts: Counts) -> None:
        """Take the current `counts`. Thread-safe."""

    def finish(self) -> None:
        """Note that the work is complete."""

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Return a context manager within which nothing is drawn, while the caller writes to the terminal."""
        yield
