"""The progress bar for terminals. Only the drawing thread loads `rich`, so the command does not wait for that."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from blockcopy.progress.lines import Figures, TimedProgress
from blockcopy.progress.rate import floored_percent, human_size, human_time
from blockcopy.untrusted_text import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_WORDS = {"same": "equal", "zero": "zeros", "resumed": "recorded"}
"""Labels for parts of the counts whose name is not clear to users."""

_MAX_BAR_WIDTH = 60

GOING, DONE = "bright_blue", "green"
"""Styles of a running and a finished bar. The library's default, red, looks like an error."""


def available() -> bool:
    """Return True if a bar can be drawn, because `rich` is installed."""
    from importlib.util import find_spec

    return find_spec("rich") is not None


class Bar(TimedProgress):
    """A progress bar of one or two lines at the bottom of the terminal `stream`.

    Text written to sys.stderr appears above the bar. All other output needs `suspended()`.
    """

    seconds = 0.2

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._live: Live | None = None
        self._drawing = threading.Lock()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._stream, highlight=False)
        with Live(console=console, auto_refresh=False, redirect_stdout=False) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def _report(self, figures: Figures) -> None:
        if figures.counts.total is None and not figures.counts.done:
            return  # the command has not begun
        with self._drawing:
            if self._live is not None:
                self._live.update(render(figures, self._live.console.width), refresh=True)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Return a context manager that removes the bar, while the caller writes to the terminal."""
        with self._drawing:
            live = self._live
            if live is None:
                yield
                return
            live.transient = True  # wiped when it stops
            live.stop()
            try:
                yield
            finally:
                live.transient = False
                live.start()


def render(figures: Figures, width: int) -> RenderableType:
    """Return the bar that shows `figures` on a terminal of `width` columns, as an object that `rich` prints.

    The first line has percent, bar, bytes, rate, and remaining time. The second line has the parts of the counts.
    """
    from rich.console import Group
    from rich.text import Text

    lines: list[RenderableType] = [_first_line(figures, width)]
    parts = [f"{_WORDS.get(name, name)} {human_size(count)}" for name, count in figures.counts.parts.items()]
    words = ", ".join(parts)
    if state := figures.counts.word or figures.counts.state:
        words = printable(f"{state}: {words}" if words else state)
    if words:
        lines.append(Text(f"  {words}", style="dim", no_wrap=True, overflow="ellipsis"))
    return Group(*lines)


def _first_line(figures: Figures, width: int) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    counts = figures.counts
    known = counts.total is not None
    if counts.total is None:
        percent, size = "", human_size(counts.done)
    else:
        percent = f"{floored_percent(counts.done, counts.total):6.2f} %"
        size = f"{human_size(counts.done)} of {human_size(counts.total)}"
    if figures.finished:
        time = f"in {human_time(int(figures.elapsed))}"
    elif known:
        time = "-:--" if figures.eta is None else human_time(figures.eta)
    else:
        time = human_time(int(figures.elapsed))
    words = [percent, size, f"{human_size(figures.rate)}/s", time]
    free = width - sum(map(len, words)) - len(words) - 1
    row = Table.grid(padding=(0, 1, 0, 0))
    for _ in range(len(words) + 1):
        row.add_column(no_wrap=True)
    bar = ProgressBar(
        total=max(1, counts.total or 0) if known else None,
        completed=counts.done if counts.total else 1,
        width=min(_MAX_BAR_WIDTH, max(4, free)),
        pulse=not known and not figures.finished,
        complete_style=GOING,
        finished_style=DONE,
    )
    row.add_row(Text(words[0], style="bold"), bar if known else "", *(Text(each) for each in words[1:]))
    return row
