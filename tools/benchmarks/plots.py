"""Results as pictures, by matplotlib: horizontal bars with numbers, one panel for each case or figure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.results import KINDS, Group, Results
from benchmarks.tables import number

OURS, REFERENCE, OTHERS = "#1f6fb4", "#6b6b6b", "#c9cfd6"
BAR = 0.34
"""Inches of a bar, the same in all pictures."""

Bars = list[tuple[str, float]]
"""Names and values."""


def draw(results: Results, folder: Path, kind: str) -> list[Path]:
    """Draw a picture of each measured part into `folder`. `kind`: svg or png. Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, (part, title, picture) in PICTURES.items():
        if lines := picture([group for group in results.of(part) if group.rows]):
            path = folder / f"{name}.{kind}"
            save(lines, title, path)
            made.append(path)
    return made


@dataclass(frozen=True)
class Panel:
    """A panel of bars, from zero, or on a logarithmic scale if the values are far apart.

    `mark`: a value to mark.
    """

    title: str
    unit: str
    bars: Bars
    reference: str
    mark: float | None = None

    @property
    def is_far_apart(self) -> bool:
        """True if the largest value is more than 40 times the smallest."""
        values = [value for _, value in self.bars if value > 0]
        return max(values) / min(values) > 40


Lines = list[list[Panel]]
"""Lines of one or two panels."""


def panel(group: Group, name: str, title: str) -> Panel:
    """Return a panel of the medians of figure `name`."""
    found = [(who, value) for who in group.rows if (value := group.median(who, name)) is not None]
    return Panel(title, unit(name), found, group.reference)


def unit(name: str) -> str:
    """Return the label of a figure, with the better direction."""
    return f"{KINDS[name].label} ({'more' if KINDS[name].more_is_better else 'less'} is better)"


def ratios(groups: list[Group]) -> Lines:
    """Return a panel for each case: times faster than the reference, with the final sync."""
    panels = []
    for group in groups:
        found = [(who, value) for who in group.rows if (value := group.ratio(who, "durable"))]
        panels.append(Panel(group.case, f"times faster than {group.reference}", found, group.reference, 1))
    return in_twos(panels)


def each_case(name: str) -> Callable[[list[Group]], Lines]:
    """Return a function that makes a panel for each case, of the figure `name`."""
    return lambda groups: in_twos([panel(group, name, group.case) for group in groups])


def each_figure(*names: str) -> Callable[[list[Group]], Lines]:
    """Return a function that makes a panel for each case and figure of `names`. Each case begins a new line."""

    def lines(groups: list[Group]) -> Lines:
        found: Lines = []
        for group in groups:
            here = [name for name in names if name in group.figures]
            found += in_twos([panel(group, name, f"{group.case}: {KINDS[name].label}") for name in here])
        return found

    return lines


def by_size(groups: list[Group]) -> Lines:
    """Return a panel for each figure, with a bar for each size and contestant."""
    panels = []
    for name in ("seconds", "cpu", "peak", "state"):
        found = [
            (f"{group.case}, {who}", value)
            for group in groups
            for who in group.rows
            if (value := group.median(who, name)) is not None
        ]
        if found:
            panels.append(Panel(KINDS[name].label, unit(name), found, ""))
    return in_twos(panels)


def in_twos(panels: list[Panel]) -> Lines:
    """Arrange panels in lines of two."""
    return [panels[at : at + 2] for at in range(0, len(panels), 2)]


PICTURES: dict[str, tuple[str, str, Callable[[list[Group]], Lines]]] = {
    "sync": ("sync", "Making a file equal to another, until it is synced", ratios),
    "sync-loop": ("sync-loop", "Making a loop device equal to another, until it is synced", ratios),
    "cpu": ("sync", "Making a file equal to another: CPU", each_case("cpu_per_gib")),
    "pipes-delay": (
        "pipes-delay",
        "A copy over a link of 10 ms round trip, until it is synced",
        each_case("durable"),
    ),
    "lazy": (
        "lazy",
        "Reading missing blocks, at 10 ms round trip",
        each_figure("seconds", "p50", "p99", "first", "again"),
    ),
    "present": (
        "present",
        "Reading present blocks, through file systems in user space",
        each_figure("first", "again", "depth_1", "depth_16"),
    ),
    "ssh": (
        "ssh",
        "Over a stock sshd",
        each_figure("seconds", "first", "share", "trips", "cpu_far"),
    ),
    "scale": ("scale", "Large and sparse, from the mount to the complete copy", by_size),
}
"""By name of the file: its part, its title, and the function that makes its panels."""


def save(lines: Lines, title: str, path: Path) -> None:
    """Draw a picture, and write it to `path`."""
    columns = max(len(line) for line in lines)
    slots = [max(len(panel.bars) for panel in line) for line in lines]
    heights = [slot * BAR + 1.0 for slot in slots]
    figure, axes = pyplot.subplots(
        len(lines),
        columns,
        figsize=(6.2 * columns, sum(heights) + 0.5),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
        facecolor="white",
    )
    figure.suptitle(title, fontsize=13, fontweight="bold")
    logarithmic = {panel.unit for line in lines for panel in line if panel.is_far_apart}  # the same for a unit
    for cells, line, slot in zip(axes, lines, slots, strict=True):
        for cell, one in itertools.zip_longest(cells, line):
            if one is None:
                cell.set_axis_off()
            else:
                bars(cell, one, slot, is_logarithmic=one.unit in logarithmic)
    figure.savefig(path, dpi=110, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def bars(cell: Any, panel: Panel, slots: int, *, is_logarithmic: bool) -> None:
    """Draw the bars of `panel` into `cell`, axes of matplotlib.

    `slots`: number of bars of the longest panel in the line, so that all bars are equally thick.
    """
    names = [who for who, _ in panel.bars]
    values = [value for _, value in panel.bars]
    colours = [colour(name, panel.reference) for name in names]
    drawn = cell.barh(range(len(names)), values, color=colours, height=0.72)
    labels = cell.bar_label(drawn, labels=[number(value) for value in values], padding=3, fontsize=9)
    for label in labels:  # above the mark
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    cell.set_yticks(range(len(names)), names, fontsize=9)
    cell.set_ylim(slots - 0.4, -0.6)  # the first one on top
    if is_logarithmic:
        cell.set_xscale("log")
        smallest = min(value for value in values if value > 0)
        left = 10 ** math.floor(math.log10(smallest / 1.5))
        cell.set_xlim(left=left, right=max(values) * 6)  # space for the numbers
    else:
        cell.set_xlim(0, max(values) * 1.16)
    if panel.mark is not None:
        cell.axvline(panel.mark, color=REFERENCE, linewidth=0.8, linestyle="--")
    cell.set_xlabel(panel.unit + (", logarithmic" if is_logarithmic else ""), fontsize=9)
    cell.set_title(panel.title, fontsize=11, loc="left")
    cell.tick_params(axis="x", labelsize=8)
    cell.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    cell.set_axisbelow(True)
    for side in ("top", "right", "left"):
        cell.spines[side].set_visible(False)


def colour(name: str, reference: str) -> str:
    """Return the colour of a contestant's bar."""
    if "blockcopy" in name:
        return OURS
    return REFERENCE if name == reference else OTHERS
