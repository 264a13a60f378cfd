"""The status as a screen for a terminal: what a tired operator needs, and a map of the device.

    Status, cells of the map → what `rich` draws

Each kind of cell has a character of its own, so that the map reads without colour too.
"""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from blockcopy.progress.bar import DONE, GOING
from blockcopy.progress.rate import human_size
from blockcopy.protocol.digests import FASTEST
from blockcopy.replica.monitor.status import Bottleneck, LinkState, LinkStatus, MapCell, ReadStatus, State, Status
from blockcopy.untrusted_text import printable

_ATTENTION = "bold black on yellow"

_BOUND_BY = {
    Bottleneck.LIMIT: "the limit",
    Bottleneck.READERS: "readers, who go first",
    Bottleneck.SSH_WINDOW: "the window of ssh's channels",
    Bottleneck.LINK: "the link",
    Bottleneck.SOURCE: "the source",
    Bottleneck.CPU: "the CPU of this host",
    Bottleneck.DESTINATION: "the destination",
}
"""A style. Yellow text by itself cannot be read on a light background."""

_STATE_STYLES = {
    State.COMPLETE: "bold green",
    State.HYDRATING: "bold bright_blue",
    State.STARTING: "bold bright_blue",
    State.VERIFYING: "bold bright_blue",
    State.PAUSED: _ATTENTION,
    State.RECONNECTING: _ATTENTION,
    State.FAILED: "bold red",
}

CELL_KINDS = {
    "reading": ("◆", "R", "bold magenta", "being read now"),
    "in_flight": ("»", ">", "bold bright_blue", "in flight"),
    "written": ("▓", "W", "yellow", "written by the user"),
    "present": ("█", "#", "green", "present"),
    "zero": ("░", "0", "cyan", "zeros"),
    "partly": ("▄", "+", "green", "partly present"),
    "missing": ("·", ".", "dim", "missing"),
}
"""Kinds of cells: character, ASCII character, style, meaning. The legend shows them in this order."""


def cell_kind(cell: MapCell) -> str:
    """Return the name in CELL_KINDS by which `cell` is shown."""
    if cell.reading:
        return "reading"
    if cell.written * 2 > cell.blocks:
        return "written"
    if cell.present == cell.blocks:
        if cell.written:
            return "written"
        return "zero" if cell.zero * 2 > cell.blocks else "present"
    if cell.in_flight:
        return "in_flight"
    return "partly" if cell.present or cell.written else "missing"


class DeviceMap:
    """A map of the device: a character for each cell, in rows that fill the width, and a legend."""

    def __init__(self, cells: list[MapCell]) -> None:
        """Make the map of `cells`, which are in device order."""
        self._kinds = [cell_kind(cell) for cell in cells]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the rows and the legend for rich, in ASCII if the encoding of `console` is no UTF.

        `options`: have the width.
        """
        ascii_only = not console.encoding.lower().startswith("utf")
        drawn, legend = Text(), Text()
        for kind in self._kinds:
            drawn.append(CELL_KINDS[kind][ascii_only], CELL_KINDS[kind][2])
        for kind, (_, _, style, meaning) in CELL_KINDS.items():
            legend.append(CELL_KINDS[kind][ascii_only], style)
            legend.append(f" {meaning}  ")
        for start in range(0, len(drawn), options.max_width):
            yield drawn[start : start + options.max_width]
        yield legend


def screen(status: Status, cells: list[MapCell], *, unanswered_seconds: float = 0) -> RenderableType:
    """Return the whole screen for rich: `status`, and a map of `cells` if there are any.

    `unanswered_seconds`: for how long the mount has not answered. `status` is then the last known one.
    """
    parts = [_headline(status), _source_need(status), _unresponsive(unanswered_seconds), _details(status)]
    if cells:
        parts += ["", DeviceMap(cells)]
    return Group(*parts)


def _headline(status: Status) -> RenderableType:
    columns = Column(no_wrap=True), Column(no_wrap=True), Column(ratio=1)
    row = Table.grid(*columns, padding=(0, 1, 0, 0), expand=True)
    row.add_row(
        Text(status.state_word.upper(), "bold" if status.on_demand else _STATE_STYLES.get(status.state, "bold")),
        Text(f"{status.percent:.2f} %", "bold"),
        ProgressBar(
            total=max(1, status.size),
            completed=status.counts.done if status.size else 1,
            complete_style=GOING,
            finished_style=DONE,
        ),
    )
    return row


def _unresponsive(seconds: float) -> RenderableType:
    """Return a warning that the mount has not answered for `seconds`, or an empty line if they are 0."""
    if not seconds:
        return ""
    return Text(f"The mount has not answered for {seconds:.0f} s. Its last status:", "bold red")


def _source_need(status: Status) -> RenderableType:
    if status.source_needed:
        return Text(f"The source is still needed: {printable(status.source)}", _ATTENTION)
    return Text("The source is no longer needed. The copy is complete, and synced.", "bold green")


def _details(status: Status) -> RenderableType:
    rows = Table.grid(Column(style="dim", no_wrap=True), Column(), padding=(0, 2, 0, 0))
    rows.add_row("Progress", _amount(status))
    rows.add_row("Transferred", _origin(status))
    rows.add_row("Connection", _link(status.link))
    rows.add_row("Reads", _reads(status.demand))
    rows.add_row("Destination", Text(printable(status.destination)))
    if status.error:
        rows.add_row("Error", Text(printable(status.error), "bold red"))
    return rows


def _amount(status: Status) -> Text:
    parts = [f"{human_size(status.hydrated_bytes)} of {human_size(status.size)}"]
    if status.state is State.VERIFYING:
        parts.append(f"{human_size(status.verified_bytes)} of them compared once more")
    if status.speed:
        parts.append(status.speed)
    limit = f" (limited to {human_size(status.limit_bytes_per_s)}/s)" if status.limit_bytes_per_s else ""
    return Text(", ".join(parts) + limit)


def _origin(status: Status) -> Text:
    parts = [
        f"{human_size(status.resumed_bytes)} recorded" if status.resumed_bytes else "",
        f"{human_size(status.same_bytes)} equal",
        f"{human_size(status.fetched_bytes)} fetched",
        f"{human_size(status.zero_bytes)} zeros",
        f"{human_size(status.written_bytes)} written by the user" if status.written_bytes else "",
    ]
    return Text(", ".join(filter(None, parts)))


def _link(link: LinkStatus) -> Text:
    text = Text().append(link.state, _ATTENTION if link.state is LinkState.RECONNECTING else "")
    if link.connections > 1:
        text.append(f", {link.connections} connections")
    if link.round_trip_seconds is not None:
        text.append(f", round trip {_milliseconds(link.round_trip_seconds)} ms")
    if link.digest:
        text.append(
            f", digest {link.digest}" + ("" if link.digest == FASTEST else f" ({FASTEST} needs both hosts)")
        )
    if link.bottleneck:
        text.append(f", bound by {_BOUND_BY.get(link.bottleneck, link.bottleneck)}")
    if link.reconnects:
        text.append(f", reconnected {link.reconnects} times")
    if link.last_error and link.state is not LinkState.CLOSED:
        text.append(f"; last error: {printable(link.last_error)}", "bold")
    return text


def _reads(reads: ReadStatus) -> Text:
    text = f"{reads.reads}, {human_size(reads.bytes)}; {reads.waiting} waiting"
    waits = [reads.latency_p50_seconds, reads.latency_p99_seconds, reads.latency_max_seconds]
    shown = [_milliseconds(seconds) for seconds in waits if seconds is not None]
    if len(shown) == len(waits):
        text += f"; waits {', '.join(shown)} ms (p50, p99, max)"
    return Text(text)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.{0 if seconds >= 0.1 else 1}f}"
