"""Results as text tables."""

from __future__ import annotations

from benchmarks.results import KINDS, Group, Results


def number(value: float | None) -> str:
    """Format a figure with two or three significant digits. Returns "" for None."""
    if value is None:
        return ""
    if value >= 1000:
        return f"{value:,.0f}"
    decimals = next((at for at, minimum in enumerate((100, 10, 0.1, 0.01)) if value >= minimum), 4)
    return f"{value:.{decimals}f}"


def grid(lines: list[list[str]]) -> str:
    """Align cells: the first column left, the others right, and a rule below the first line."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([texts[0], "─" * sum(widths, 2 * (len(widths) - 1)), *texts[1:]])


def table(group: Group) -> str:
    """Return a group as a table of medians, each with its ratio to the reference."""
    lines = [[group.case, *(KINDS[name].label for name in group.figures)]]
    for who in group.rows:
        line = [who]
        for name in group.figures:
            value, ratio = group.median(who, name), group.ratio(who, name)
            line.append(number(value) + (f" ({number(ratio)}×)" if ratio is not None else ""))
        lines.append(line)
    title = f"{group.part}: {group.words or group.case}\n(×: times better than {group.reference})"
    return f"{title}\n{grid(lines)}"


def cpu_table(results: Results) -> str:
    """Return the table of CPU seconds per GiB, of every contestant and case of `sync`."""
    groups = [group for group in results.groups if group.part.startswith("sync")]
    whos = list(dict.fromkeys(who for group in groups for who in group.rows))
    lines = [["", *(f"{group.part}: {group.case}" for group in groups)]]
    for who in whos:
        lines.append([who])
        for group in groups:
            value, ratio = group.median(who, "cpu_per_gib"), group.ratio(who, "cpu_per_gib")
            lines[-1].append(number(value) + (f" ({number(ratio)}×)" if ratio is not None else ""))
    return f"cpu: CPU seconds per GiB\n(×: times better than {groups[0].reference})\n{grid(lines)}"
