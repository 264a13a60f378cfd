"""Many disks on many hosts: the state of a move, and the short form of `tools/fleet`."""

from __future__ import annotations

import datetime
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
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


def loaded(name: str) -> ModuleType:
    """Load `name`, a module of the collection that runs on managed hosts, without Ansible."""
    spec = importlib.util.spec_from_file_location(Path(name).name, COLLECTION / f"plugins/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


move_state = loaded("module_utils/move_state")


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


# Snapshots of zvols, by a stand-in for zfs; `tools/vm run role_zfs` has the real one


class ModuleEndedError(Exception):
    """The end of a module: `args` has its results."""


class Pool:
    """A stand-in for AnsibleModule, zfs and udev. It has the zvol `tank/disk`.

    `looks`: how often the module must look for a device until there is one. `listed`: whether `zfs list` works.
    """

    def __init__(self, *, looks: int = 0, listed: bool = True) -> None:
        self.origins = {"tank/disk": "-"}
        self.done: list[str] = []
        self.params: dict[str, Any] = {}
        self.check_mode = False
        self._looks, self._listed = looks, listed

    def run_command(self, words: list[str], check_rc: bool = False) -> tuple[int, str, str]:
        name = words[-1]
        match words[:2]:
            case ["zfs", "list"]:
                if name not in self.origins or not self._listed:
                    return 1, "", f"cannot open '{name}'\n"
                kind = "snapshot" if "@" in name else "volume"
                return 0, {"type": kind, "name": name, "origin": self.origins[name]}[words[-3]] + "\n", ""
            case ["zfs", "snapshot"]:
                self.origins[name] = "-"
            case ["zfs", "clone"]:
                self.origins[name] = words[-2]
            case ["zfs", "destroy"]:
                for each in [each for each in self.origins if each == name or ("-r" in words and name in each)]:
                    del self.origins[each]
        self.done.append(" ".join(words))
        return 0, "", ""

    def has_device(self, path: str) -> bool:
        if path.removeprefix("/dev/zvol/") not in self.origins:
            return False
        self._looks -= 1
        return self._looks < 0

    def fail_json(self, **results: Any) -> None:
        raise ModuleEndedError({"failed": True, **results})

    def exit_json(self, **results: Any) -> None:
        raise ModuleEndedError(results)


@pytest.fixture
def snapshot_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return a function that runs the module `blockcopy_snapshot` on a Pool, and returns its results."""
    basic = ModuleType("ansible.module_utils.basic")
    basic.AnsibleModule = None  # type: ignore[attr-defined]
    for name in ("ansible", "ansible.module_utils", "ansible.module_utils.basic"):
        monkeypatch.setitem(sys.modules, name, basic)
    module = loaded("modules/blockcopy_snapshot")

    def snapshot(pool: Pool, state: str = "present", disk: str = "/dev/zvol/tank/disk") -> dict[str, Any]:
        pool.params = {"disk": disk, "name": "snap", "method": "zfs", "state": state}
        system = SimpleNamespace(
            sync=lambda: pool.done.append("sync"), path=SimpleNamespace(exists=pool.has_device)
        )
        monkeypatch.setattr(module, "os", system)
        monkeypatch.setattr(module, "AnsibleModule", lambda *_, **__: pool)
        with pytest.raises(ModuleEndedError) as ended:
            module.main()
        found: dict[str, Any] = ended.value.args[0]
        return found

    monkeypatch.setattr(module, "DEVICE_SECONDS", 1)
    return snapshot


def test_a_snapshot_of_a_zvol_has_what_was_in_memory_and_a_device(
    snapshot_of: Callable[..., dict[str, Any]],
) -> None:
    """ZFS makes the device in its own time: the first looks of the module do not find it."""
    pool = Pool(looks=3)
    pool.check_mode = True
    assert snapshot_of(pool)["changed"]
    assert pool.done == []
    pool.check_mode = False
    path = "/dev/zvol/tank/disk-snap"
    assert snapshot_of(pool) == {"changed": True, "path": path}
    made = ["sync", "zfs snapshot tank/disk@snap", "zfs clone -o readonly=on tank/disk@snap tank/disk-snap"]
    assert pool.done == [*made, "udevadm settle"]
    assert snapshot_of(pool) == {"changed": False, "path": path}
    pool.origins["tank/disk-snap@daily"] = "-"  # by a program that snapshots all volumes
    assert snapshot_of(pool, "absent")["changed"]
    assert pool.origins == {"tank/disk": "-"}
    assert not snapshot_of(pool, "absent")["changed"]


def test_a_snapshot_of_a_zvol_is_absent_only_if_zfs_answers(snapshot_of: Callable[..., dict[str, Any]]) -> None:
    found = snapshot_of(Pool(listed=False), "absent")
    assert found["failed"]
    assert found["msg"] == "/dev/zvol/tank/disk is not a zvol: cannot open 'tank/disk'"
    assert snapshot_of(Pool(), disk="/dev/zd0")["failed"]
    other = Pool()
    other.origins["tank/disk-snap"] = "tank/else@snap"
    assert "is not a clone of tank/disk@snap" in snapshot_of(other, "absent")["msg"]
    assert "has no device" in snapshot_of(Pool(looks=1000))["msg"]


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


GRAFANA = """
import json, sys
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

plugins.register_default_plugins()
print(JSONEncoder().encode(Dashboard.from_json(json.load(sys.stdin))))
"""
"""Read a dashboard as the types that Grafana publishes, and print what they have kept."""


def losses(given: Any, kept: Any, path: str = "") -> list[str]:
    """Return the paths of the parts of `given`, read from JSON, that `kept` lacks or has with another value."""
    if isinstance(given, dict) and isinstance(kept, dict):
        pairs: Iterable[tuple[object, Any, Any]] = ((key, given[key], kept.get(key)) for key in given)
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        pairs = ((index, *both) for index, both in enumerate(zip(given, kept, strict=True)))
    else:
        return [] if given == kept else [path]
    return [lost for name, *both in pairs for lost in losses(*both, f"{path}/{name}")]


@pytest.mark.long
def test_grafanas_types_know_every_field_of_the_dashboard() -> None:
    programs = environment.installed()
    if programs is None:
        pytest.skip("no types of Grafana: tools/fleet --set-up installs them")
    text = (METRICS / "blockcopy-dashboard.json").read_text()
    command = [programs / "python", "-I", "-c", GRAFANA]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    succeeded(done)
    assert losses(json.loads(text), json.loads(done.stdout)) == []


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
