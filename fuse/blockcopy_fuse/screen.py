"""The status as a screen, for a terminal: what a tired operator sees in two seconds, and a map of the device.

    snapshot, cells of the map → what `rich` draws

Each kind of cell has a character of its own, so that the map reads without colour too.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from blockcopy.progress.bar import DONE, GOING
from blockcopy.progress.rate import floored_percent, human_size, human_time
from blockcopy.replica.monitor.status import counts_of
from blockcopy.untrusted_text import printable

_ATTENTION = "bold black on yellow"
"""Yellow by itself cannot be read on a light ground."""

_STATES = {
    "complete": "bold green",
    "hydrating": "bold bright_blue",
    "starting": "bold bright_blue",
    "verifying": "bold bright_blue",
    "paused": _ATTENTION,
    "reconnecting": _ATTENTION,
    "failed": "bold red",
}

KINDS = {
    "reading": ("◆", "R", "bold magenta", "being read now"),
    "in_flight": ("»", ">", "bold bright_blue", "on its way"),
    "present": ("█", "#", "green", "here"),
    "zero": ("░", "0", "cyan", "zeros"),
    "partly": ("▄", "+", "green", "partly here"),
    "missing": ("·", ".", "dim", "missing"),
}
"""Of cells of the map: character, the same in ASCII, style, meaning; what comes first is shown first."""


def kind_of(cell: dict[str, int]) -> str:
    """The one of KINDS that a cell of `Replica.map` is shown as."""
    if cell["reading"]:
        return "reading"
    if cell["present"] == cell["blocks"]:
        return "zero" if cell["zero"] * 2 > cell["blocks"] else "present"
    if cell["in_flight"]:
        return "in_flight"
    return "partly" if cell["present"] else "missing"


class Map:
    """The cells in rows that fill the width, and what their characters mean."""

    def __init__(self, cells: list[dict[str, int]]) -> None:
        self._kinds = [kind_of(cell) for cell in cells]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ascii_only = not console.encoding.lower().startswith("utf")
        drawn, legend = Text(), Text()
        for kind in self._kinds:
            drawn.append(KINDS[kind][ascii_only], KINDS[kind][2])
        for kind, (_, _, style, meaning) in KINDS.items():
            legend.append(KINDS[kind][ascii_only], style)
            legend.append(f" {meaning}  ")
        for start in range(0, len(drawn), options.max_width):
            yield drawn[start : start + options.max_width]
        yield legend


def screen(snapshot: dict[str, Any], cells: list[dict[str, int]], *, silence: float = 0) -> RenderableType:
    """All of it; without `cells`, no map. `progress_timeout`: seconds for which the mount has not answered."""
    parts: list[RenderableType] = [_headline(snapshot), _need(snapshot), _silence(silence), _facts(snapshot)]
    if cells:
        parts += ["", Map(cells)]
    return Group(*parts)


def _headline(snapshot: dict[str, Any]) -> RenderableType:
    row = Table.grid(padding=(0, 1, 0, 0), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    state, size, done = snapshot["state"], snapshot["size"], counts_of(snapshot).done
    row.add_row(
        Text(printable(state.upper()), _STATES.get(state, "bold")),
        Text(f"{floored_percent(done, size):.2f} %", "bold"),
        ProgressBar(total=max(1, size), completed=done if size else 1, complete_style=GOING, finished_style=DONE),
    )
    return row


def _silence(seconds: float) -> RenderableType:
    """An empty line, as a rule."""
    if not seconds:
        return ""
    return Text(f"The mount has not answered for {seconds:.0f} s. This is how it was:", "bold red")


def _need(snapshot: dict[str, Any]) -> RenderableType:
    if snapshot["source_needed"]:
        return Text(f"The source is still needed: {printable(snapshot['source'])}", _ATTENTION)
    return Text("The source is no longer needed. The copy is complete, and synced.", "bold green")


def _facts(snapshot: dict[str, Any]) -> RenderableType:
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column()
    rows.add_row("here", _amount(snapshot))
    rows.add_row("came", _origin(snapshot))
    rows.add_row("link", _link(snapshot["link"]))
    rows.add_row("reads", _demand(snapshot["demand"]))
    rows.add_row("copy", Text(printable(snapshot["destination"])))
    if snapshot["error"]:
        rows.add_row("error", Text(printable(snapshot["error"]), "bold red"))
    return rows


def _amount(snapshot: dict[str, Any]) -> Text:
    text = f"{human_size(snapshot['hydrated_bytes'])} of {human_size(snapshot['size'])}"
    if snapshot["state"] == "verifying":
        text += f", {human_size(snapshot['verified_bytes'])} of them compared once more"
    if snapshot["eta_seconds"] is not None:
        text += f", {human_size(snapshot['rate_bytes_per_s'])}/s, {human_time(snapshot['eta_seconds'])} to go"
    if snapshot["limit_bytes_per_s"]:
        text += f" (limited to {human_size(snapshot['limit_bytes_per_s'])}/s)"
    return Text(text)


def _origin(snapshot: dict[str, Any]) -> Text:
    parts = [f"{human_size(snapshot['same_bytes'])} equal", f"{human_size(snapshot['fetched_bytes'])} fetched"]
    parts.append(f"{human_size(snapshot['zero_bytes'])} zeros")
    if snapshot["resumed_bytes"]:
        parts.insert(0, f"{human_size(snapshot['resumed_bytes'])} on record")
    return Text(", ".join(parts))


def _link(link: dict[str, Any]) -> Text:
    text = Text().append(printable(link["state"]), _ATTENTION if link["state"] == "reconnecting" else "")
    if link["reconnects"]:
        text.append(f", made again {link['reconnects']} times")
    if link["last_error"] and link["state"] != "closed":
        text.append(f"; last: {printable(link['last_error'])}", "bold")
    return text


def _demand(demand: dict[str, Any]) -> Text:
    text = f"{demand['reads']}, {human_size(demand['bytes'])}; {demand['waiting']} waiting"
    latencies = [demand[f"latency_{name}_seconds"] for name in ("p50", "p99", "max")]
    if None not in latencies:
        text += f"; waits {', '.join(map(_milliseconds, latencies))} ms (half, 99 %, all)"
    return Text(text)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.{0 if seconds >= 0.1 else 1}f}"
