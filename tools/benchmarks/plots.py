"""Results as pictures, by matplotlib. Horizontal bars, one panel a case or a figure, each with its number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.results import KINDS, Group, Results
from benchmarks.tables import number

OURS, REFERENCE, OTHERS = "#1f6fb4", "#6b6b6b", "#c9cfd6"
BAR = 0.34
"""Inches a bar, so that all pictures have the same."""

Bars = list[tuple[str, float]]


def draw(results: Results, folder: Path, kind: str) -> list[Path]:
    """A file of each part that was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for part, picture in PICTURES.items():
        if panels := picture([group for group in results.of(part) if group.rows]):
            path = folder / f"{part}.{kind}"
            save(panels, TITLES[part], path)
            made.append(path)
    return made


class Panel:
    """Bars from zero, or on a logarithmic scale where the figures are far apart."""

    def __init__(self, title: str, unit: str, bars: Bars, reference: str, mark: float | None = None) -> None:
        self.title, self.unit, self.bars, self.reference, self.mark = title, unit, bars, reference, mark

    @property
    def is_logarithmic(self) -> bool:
        values = [value for _, value in self.bars if value > 0]
        return max(values) / min(values) > 40


def ratios(groups: list[Group]) -> list[Panel]:
    """Of each case: how many times faster than the reference, with the final sync."""
    panels = []
    for group in groups:
        bars = [(who, group.ratio(who, "durable")) for who in group.rows]
        found = [(who, value) for who, value in bars if value]
        panels.append(Panel(group.case, f"times faster than {group.reference}", found, group.reference, 1))
    return panels


def figures(*names: str) -> Callable[[list[Group]], list[Panel]]:
    """Of each case: these figures, as they are."""

    def panels(groups: list[Group]) -> list[Panel]:
        found = []
        for group in groups:
            for name in names:
                bars = [(who, value) for who in group.rows if (value := group.median(who, name)) is not None]
                if bars:
                    better = "more" if KINDS[name].more_is_better else "less"
                    unit = f"{KINDS[name].label} ({better} is better)"
                    found.append(Panel(group.case, unit, bars, group.reference))
        return found

    return panels


def by_size(groups: list[Group]) -> list[Panel]:
    """Of each figure: a bar for each size and contestant."""
    found = []
    for name in ("seconds", "cpu", "peak", "state"):
        bars = [
            (f"{group.case}, {who}", value)
            for group in groups
            for who in group.rows
            if (value := group.median(who, name)) is not None
        ]
        if bars:
            found.append(Panel("until complete", f"{KINDS[name].label} (less is better)", bars, "cp"))
    return found


PICTURES: dict[str, Callable[[list[Group]], list[Panel]]] = {
    "sync": ratios,
    "sync-loop": ratios,
    "pipes-delay": figures("durable"),
    "lazy": figures("seconds", "p50", "p99", "first", "again"),
    "present": figures("first", "again", "depth_1", "depth_16"),
    "scale": by_size,
}
TITLES = {
    "sync": "Making a file equal to another, until it is synced",
    "sync-loop": "Making a loop device equal to another, until it is synced",
    "pipes-delay": "A copy over a link of 10 ms round trip, until it is synced",
    "lazy": "Reading what is not here yet, at 10 ms round trip",
    "present": "Reading what is here, through file systems in user space",
    "scale": "Large and sparse, from the mount to the complete copy",
}


def save(panels: list[Panel], title: str, path: Path) -> None:
    """Two panels side by side, in as many lines as it takes."""
    columns = min(2, len(panels))
    lines = [panels[at : at + columns] for at in range(0, len(panels), columns)]
    heights = [max(len(panel.bars) for panel in line) * BAR + 1.0 for line in lines]
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
    cells = [cell for line in axes for cell in line]
    for cell, panel in zip(cells, panels, strict=False):
        bars(cell, panel)
    for cell in cells[len(panels) :]:
        cell.set_axis_off()
    figure.savefig(path, dpi=110, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def bars(cell: Any, panel: Panel) -> None:
    names = [who for who, _ in panel.bars]
    values = [value for _, value in panel.bars]
    colours = [colour(name, panel.reference) for name in names]
    drawn = cell.barh(range(len(names)), values, color=colours, height=0.72)
    cell.bar_label(drawn, labels=[number(value) for value in values], padding=3, fontsize=9)
    cell.set_yticks(range(len(names)), names, fontsize=9)
    cell.invert_yaxis()  # the first one on top
    if panel.is_logarithmic:
        cell.set_xscale("log")
        cell.set_xlim(left=min(values) / 2, right=max(values) * 4)  # room for the numbers
    else:
        cell.set_xlim(0, max(values) * 1.16)
    if panel.mark is not None:
        cell.axvline(panel.mark, color=REFERENCE, linewidth=0.8, linestyle="--")
    cell.set_xlabel(panel.unit + (", logarithmic" if panel.is_logarithmic else ""), fontsize=9)
    cell.set_title(panel.title, fontsize=11, loc="left")
    cell.tick_params(axis="x", labelsize=8)
    cell.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    cell.set_axisbelow(True)
    for side in ("top", "right", "left"):
        cell.spines[side].set_visible(False)


def colour(name: str, reference: str) -> str:
    if "blockcopy" in name:
        return OURS
    return REFERENCE if name == reference else OTHERS
