"""Many disks on many hosts: the state of a move, and the short form of `tools/fleet`."""

from __future__ import annotations

import datetime
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
COLLECTION = CHECKOUT / "tools" / "ansible"
DISKS = {"data": {"source": "/dev/vg/data", "destination": "/dev/vg/copy"}}


def module_util(name: str) -> ModuleType:
    """Load `name`, a module of the collection that runs on managed hosts, without Ansible."""
    spec = importlib.util.spec_from_file_location(name, COLLECTION / f"plugins/module_utils/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


move_state = module_util("move_state")


def changed(path: Path, stage: str | None = None, *, revision: int | None = None, **about: Any) -> dict[str, Any]:
    """Load the state in `path`, set `stage`, save it. Returns its fields."""
    with move_state.MoveState(str(path), "shop") as state:
        state.load("old", about.get("disks", DISKS))
        state.check(revision)
        if stage is not None:
            state.advance(stage, without_writes=about.get("without_writes", False))
        state.save()
    assert json.loads(path.read_text()) == state.fields
    fields: dict[str, Any] = state.fields
    return fields


def reached(path: Path, stage: str) -> dict[str, Any]:
    """Bring a new state in `path` to `stage`, one stage after the other."""
    fields = changed(path)
    for each in move_state.STAGES[1 : move_state.STAGES.index(stage) + 1]:
        fields = changed(path, each)
    return fields


def test_a_move_goes_on_from_stage_to_stage_and_never_back(tmp_path: Path) -> None:
    path = tmp_path / "shop.json"
    fields = reached(path, "done")
    assert [each["stage"] for each in fields["events"]] == move_state.STAGES[: move_state.STAGES.index("done") + 1]
    for stage in ("new", "copying", "starting", "aborting"):
        with pytest.raises(move_state.StateRefusedError, match="is done: it cannot become"):
            changed(path, stage)
    assert changed(path)["stage"] == "done"


@pytest.mark.parametrize("stage", ["copying", "stopped", "mounted", "starting", "complete", "releasing"])
def test_an_abort_is_refused_as_soon_as_it_may_lose_writes(tmp_path: Path, stage: str) -> None:
    path = tmp_path / "shop.json"
    first = reached(path, stage)
    if stage in ("starting", "complete", "releasing"):
        with pytest.raises(move_state.StateRefusedError, match="cannot become aborting"):
            changed(path, "aborting")
    if stage == "releasing":
        with pytest.raises(move_state.StateRefusedError, match="cannot become aborting"):
            changed(path, "aborting", without_writes=True)
        return
    assert changed(path, "aborting", without_writes=stage in ("starting", "complete"))["aborted_from"] == stage
    assert changed(path, "aborting")["aborted_from"] == stage  # once more, after an interruption
    changed(path, "aborted")
    again = changed(path, "new")
    assert again["id"] != first["id"]  # the names of its snapshots are others


def test_of_two_runs_the_slower_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shop.json"
    seen = changed(path)["revision"]
    changed(path, "copying", revision=seen)
    with pytest.raises(move_state.StateRefusedError, match="another run of this move is at work"):
        changed(path, "stopping", revision=seen)


def test_a_state_of_other_disks_or_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shop.json"
    changed(path, "copying")
    before = path.read_bytes()
    with pytest.raises(move_state.StateRefusedError, match="is about other disks"):
        changed(path, disks={"data": {"source": "/dev/vg/data", "destination": "/dev/vg/else"}})
    path.chmod(0o666)
    with pytest.raises(move_state.StateRefusedError, match="only this user can write"):
        changed(path)
    path.chmod(0o600)
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(move_state.StateRefusedError, match="is not the state of the move"):
        changed(path)
    assert path.read_bytes() == before[: len(before) // 2]
    assert [each.name for each in tmp_path.iterdir()] == ["shop.json"]


def test_a_window_may_go_over_midnight() -> None:
    at = [datetime.datetime(2026, 1, 1, hour, 30) for hour in range(24)]
    assert [now.hour for now in at if move_state.is_open("22:00-02:00", now)] == [0, 1, 22, 23]
    assert [now.hour for now in at if move_state.is_open("09:30-11:30", now)] == [9, 10]
    assert all(move_state.is_open("", now) for now in at)
    with pytest.raises(move_state.StateRefusedError, match="is not a window"):
        move_state.is_open("9-11", at[0])
