"""Many disks on many hosts: the state of a move, and the short form of `tools/fleet`."""

from __future__ import annotations

import datetime
import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import support
from support import PYTHON, noise, output, run, succeeded, written

from blockcopy.replica.monitor.prometheus import exposition
from blockcopy.replica.monitor.status import ReadStatus, State, Status
from moving import environment, prometheus

CHECKOUT = Path(__file__).resolve().parent.parent
COLLECTION = CHECKOUT / "tools" / "ansible"
METRICS = CHECKOUT / "tools" / "metrics"
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
    if stage in ("starting", "complete"):
        assert changed(path, "starting")["stage"] == "starting"  # there were writes after all
        changed(path, "aborting", without_writes=True)
    else:
        with pytest.raises(move_state.StateRefusedError, match="cannot become starting"):
            changed(path, "starting")
    changed(path, "undoing")
    with pytest.raises(move_state.StateRefusedError, match="cannot become starting"):
        changed(path, "starting")
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


# Metrics of all hosts in one place


def expressions() -> list[str]:
    """Return the expressions of the dashboard, for all hosts."""
    dashboard = json.loads((METRICS / "blockcopy-dashboard.json").read_text())
    found = [each["expr"] for panel in dashboard["panels"] for each in panel["targets"]]
    return [each.replace("$instance", ".*") for each in found]


def test_the_dashboard_and_the_alerts_use_metrics_that_there_are() -> None:
    waits = ReadStatus(latency_p50_seconds=1, latency_p99_seconds=1, latency_max_seconds=1)
    known = exposition(Status(state=State.FAILED, size=1, source_needed=True, eta_seconds=1, demand=waits))
    names = set(re.findall(r"^# TYPE (\w+)", known, re.MULTILINE))
    texts = [*expressions(), (METRICS / "alerts.yml").read_text(), (METRICS / "alerts_test.yml").read_text()]
    used = {name for text in texts for name in re.findall(r"blockcopy_\w+", text)}
    assert len(used) > 10
    assert used <= names
    states = {
        name for text in texts for each in re.findall(r'state!?=~?"([^"]+)"', text) for name in each.split("|")
    }
    assert states <= set(State)


@pytest.mark.long
def test_promtool_accepts_the_configuration_the_alerts_and_real_metrics(tmp_path: Path) -> None:
    programs = prometheus.found()
    if programs is None:
        pytest.skip("no promtool: tools/fleet --set-up fetches it")
    promtool = str(programs / "promtool")
    output(promtool, "check", "config", METRICS / "prometheus.yml")
    output(promtool, "test", "rules", METRICS / "alerts_test.yml")
    rules = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(expressions())]
    written(tmp_path / "rules.yml", json.dumps({"groups": [{"name": "panels", "rules": rules}]}).encode())
    output(promtool, "check", "rules", tmp_path / "rules.yml")
    source, metrics = written(tmp_path / "source", noise(1 << 20)), tmp_path / "copy.prom"
    succeeded(run("sync", "--metrics", metrics, source, tmp_path / "copy"))
    with metrics.open("rb") as file:
        done = subprocess.run([promtool, "check", "metrics"], stdin=file, capture_output=True, check=False)
    succeeded(done, stdout=b"")


# Real hosts


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_small_fleet(tmp_path: Path) -> None:
    """The controller is killed, one move is aborted, and the other one goes on to its end."""
    support.require_root()
    support.require_fuse()
    support.require_sshd()
    if environment.installed() is None:
        pytest.skip("no Ansible: tools/fleet --set-up installs it")
    words = [PYTHON, CHECKOUT / "tools" / "fleet", "--short", "--folder", tmp_path]
    done = subprocess.run([str(each) for each in words], capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("1 aborts at", "2 disks compared", "passed"):
        assert line in done.stdout
