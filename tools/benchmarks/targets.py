"""The project's performance targets, and whether a run of the benchmark meets them."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.contestants import OURS, STAGES, STAGES_BLAKE3
from benchmarks.part_present import BY_PAGE
from benchmarks.part_ssh import EIGHT, MOUNT, ONE, at
from benchmarks.part_write import (
    EXAMPLE,
    HYDRATING,
    ITS_LOOP,
    ITSELF,
    MISSING,
    NEW,
    OURS_LOOP,
    SAME,
    WHILE_HYDRATING,
)
from benchmarks.results import KINDS, Group, Results
from benchmarks.tables import grid, number

CASES = ("equal", "5 % differ", "destination zero", "source half zero")
LINK, ROOT, USER = "the link itself", "blockcopy mount", "blockcopy, as an ordinary user"

Target = tuple[str, "float | None", float, bool]
"""A description, the measured figure, the target, and True if the target is a minimum (False: a maximum)."""


def targets(results: Results) -> list[Target]:
    """Return the targets of the parts that were measured."""
    found: list[Target] = []

    def times(who: str, wanted: tuple[float, ...], figure: str = "seconds") -> None:
        for case, value in zip(CASES, wanted, strict=True):
            group = results.find("sync", case)
            if group and group.reference.startswith("original"):
                found.append((f"{who}, {case}: × the original", group.ratio(who, figure), value, True))

    def plain(what: str, part: str, case: str, who: str, figure: str, wanted: float) -> None:
        if group := results.find(part, case):
            is_minimum = KINDS[figure].more_is_better
            found.append((f"{what}: {KINDS[figure].label}", group.median(who, figure), wanted, is_minimum))

    times(OURS, (10, 10, 6, 8))
    times(STAGES_BLAKE3, (8, 8, 5, 6))
    times(STAGES, (1, 1, 1, 1))
    for group in results.of("sync"):
        found += [
            (f"{OURS}, {group.case}: × {peer}", against(group, peer), 1, True)
            for peer in ("rsync", "diskrsync", "bdsync")
            if peer in group.rows
        ]
    if (group := results.find("sync", "5 % differ")) and group.reference.startswith("original"):
        ratio = group.ratio(OURS, "cpu")
        found.append((f"{OURS}, 5 % differ: CPU, part of the original's", ratio and 1 / ratio, 0.12, False))
    plain("link of 10 ms, destination zero", "pipes-delay", "destination zero", OURS, "seconds", 3)
    plain("in order, cold, 10 ms, ordinary user", "lazy", "in order", USER, "first", 400)
    plain("random, idle, 10 ms", "lazy", "random, idle", ROOT, "p50", 12)
    for variant in ("blockcopy, link of 64MiB/s", "blockcopy, both CPUs"):
        plain(f"random, hydrating ({variant})", "lazy", "random, hydrating", variant, "p50", 15)
        plain(f"random, hydrating ({variant})", "lazy", "random, hydrating", variant, "p99", 70)
    if group := results.find("present", "a complete replica"):
        example, value = group.median("passthrough_ll", "first"), group.median(ROOT, "first")
        if example and value:
            found.append(("present, first: × passthrough_ll", value / example, 1, True))
        found.append(("present, again: × the backing file", group.ratio(ROOT, "again"), 0.9, True))
        by_page, value = group.median(BY_PAGE, "again"), group.median(ROOT, "again")
        if by_page and value:
            found.append((f"present, again: × {BY_PAGE}", value / by_page, 0.9, True))
        plain("present", "present", group.case, ROOT, "depth_1", 10_000)
        plain("present", "present", group.case, ROOT, "depth_16", 22_000)
    plain("mount to first byte", "lazy", "mount to first byte", ROOT, "seconds", 0.4)
    plain("1 TiB sparse, until complete", "scale", "1,024 GiB", ROOT, "seconds", 30)
    found.extend(of_writes(results))
    found.extend(of_ssh(results))
    for group in results.of("scale"):
        plain(f"{group.case} sparse", "scale", group.case, ROOT, "peak", 100)
    return found


def of_writes(results: Results) -> Iterator[Target]:
    """Yield the targets of the parts `write` and `write-pgbench`."""

    def ratio(case: str, who: str, to: str, figure: str) -> float | None:
        if (group := results.find("write", case)) is None:
            return None
        value, other = group.median(who, figure), group.median(to, figure)
        return value / other if value and other else None

    if results.of("write"):
        in_order = ratio("in order", ROOT, EXAMPLE, "rate_synced")
        yield "writes in order: × passthrough_ll", in_order, 0.9, True
    if group := results.find("write", "random"):
        yield "random writes, present: IOPS, depth 1", group.median(ROOT, "depth_1"), 8000, True
        for who in (MISSING, HYDRATING):
            yield f"random writes, {who}: × present", ratio("random", who, ROOT, "depth_1"), 0.7, True
    for case, ours, to in (("fsync", ROOT, ITSELF), ("fsync, loop device", OURS_LOOP, ITS_LOOP)):
        if (group := results.find("write", case)) and group.rows:
            for what, wanted in ((SAME, 1.5), (NEW, 4)):
                yield f"{case}, {what}: × {to}", ratio(case, f"{ours}, {what}", to, "p50"), wanted, False
    if group := results.find("write-pgbench", "pgbench"):
        yield f"pgbench, {WHILE_HYDRATING}: × {ITSELF}", group.ratio(WHILE_HYDRATING, "tps"), 0.5, True


def of_ssh(results: Results) -> Iterator[Target]:
    """Yield the targets of the part `ssh`."""
    for case, wanted in (("100 ms", 6), ("10 ms", 2), ("0 ms", 1)):
        if group := results.find("ssh", f"destination zero, {case}"):
            yield f"{OURS}, {group.case}: × 1 connection", group.ratio(OURS, "seconds"), wanted, True
    for case in ("5 % differ", "destination zero"):
        if (group := results.find("ssh", f"{case}, 100 ms")) and "rsync" in group.rows:
            yield f"{OURS} over ssh, {group.case}: × rsync", against(group, "rsync"), 1, True
    if group := results.find("ssh", "a slow line"):
        yield "100 Mbit/s, hydrating: % of the line", group.median(MOUNT, "share"), 95, True
        yield "100 Mbit/s, hydrating: a read, round trips", group.median(MOUNT, "trips"), 1.5, False
    if group := results.find("ssh", "in order"):
        yield "in order, cold, 100 ms: × 1 connection", group.ratio(MOUNT, "first"), 4, True
    if group := results.find("ssh", "equal"):
        far, near = (group.median(at(each), "seconds") for each in (100, 0))
        yield "equal: s that 100 ms add", far - near if far and near else None, 1.5, False
    if (group := results.find("ssh", "destination zero, 10 ms")) and EIGHT in group.rows:
        for figure, what in (("cpu_far", "sshd and below"), ("cpu_stages", "stages")):
            eight, one = group.median(EIGHT, figure), group.median(ONE, figure)
            ratio = eight / one if eight and one else None
            yield f"CPU at the source, {what}: 8 × 1 connection", ratio, 1.3, False


def against(group: Group, peer: str) -> float | None:
    """Return how many times faster blockcopy is, with the final sync of both. Returns None if either is missing."""
    own, others = group.median(OURS, "durable"), group.median(peer, "durable")
    return others / own if own and others else None


def table(results: Results) -> str:
    """Return the table of targets, or "" if none was measured."""
    lines = [["target", "wanted", "measured", ""]]
    for what, value, wanted, is_minimum in targets(results):
        is_met = value is not None and (value >= wanted if is_minimum else value <= wanted)
        outcome = "yes" if is_met else "not measured" if value is None else "NO"
        lines.append([what, f"{'≥' if is_minimum else '≤'} {number(wanted)}", number(value), outcome])
    return grid(lines) if len(lines) > 1 else ""
