"""The story of a campaign: runs of Ansible, what is killed meanwhile, and the verdict."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moving import metrics
from moving.disks import Journal, wrong_pages
from moving.environment import variables
from moving.fleet import Fleet, Move, left_behind

PLAY = """---
- name: Move
  hosts: moves
  gather_facts: false
  strategy: free
  roles:
    - role: blockcopy.move.move
"""
ALONE = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
"""Words that run the controller as a tree of processes which ends at once: Ansible's workers leave its group."""

MODULES = Path(__file__).with_name("modules.yml")

RUN_SECONDS = 1800
STAGES_AFTER_START = ("starting", "started", "complete", "releasing", "released", "restarting", "done")


class Story:
    """A campaign on `fleet`. `programs`: the folder of Ansible's. `forks`: how many moves at once."""

    def __init__(self, fleet: Fleet, programs: Path, *, forks: int, seed: int, say: Callable[[str], None]) -> None:
        self._fleet, self._programs, self._forks, self._say = fleet, programs, forks, say
        self._choose = random.Random(seed)
        self._environment = variables(fleet.folder / "ansible")
        self._play = fleet.folder / "move.yml"
        self._play.write_text(PLAY)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._sampler = metrics.Sampler(fleet)

    def _start(self, action: str, moves: list[Move], extra: dict[str, Any]) -> tuple[subprocess.Popen[bytes], Path]:
        inventory = self._fleet.write_inventory()
        self.counts["runs"] += 1
        log = self._fleet.folder / f"run-{self.counts['runs']:02}.log"
        play = MODULES if action == "modules" else self._play
        words = [*self._fleet.switch.enter, *ALONE, self._programs / "ansible-playbook", "-i", inventory, play]
        words += ["--forks", self._forks]
        words += ["-e", f"move_action={action}"] if play == self._play else []
        words += ["--limit", ":".join(each.name for each in moves)]
        for name, value in extra.items():
            words += ["-e", f'{{"{name}": {value}}}']
        with log.open("wb") as file:
            process = subprocess.Popen(
                [str(each) for each in words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self._environment,
                start_new_session=True,
                cwd=self._fleet.folder,
            )
        return process, log

    def run(
        self,
        action: str = "move",
        moves: list[Move] | None = None,
        kills: Sequence[tuple[float | str, str]] = (),
        **extra: object,
    ) -> int | None:
        """Run Ansible: `action` is `move`, `abort` or `modules`, which tries the modules. Returns its exit status.

        `moves`: None for all. `kills`: when something is killed, and what: `controller`, `host NAME` or
        `processes NAME`. When is seconds after the start, or a stage that a move reaches. `extra`: variables.
        """
        moves = self._fleet.moves if moves is None else moves
        began = time.monotonic()
        process, log = self._start(action, moves, extra)
        told = []
        try:
            for at, what in kills:
                if self._await(at, moves, process, began):
                    told.append(f"{what} at {at if isinstance(at, str) else f'{at:.0f} s'}")
                    self._kill(what, process)
            status = process.wait(timeout=RUN_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._sampler.sample()
        stages = Counter(each.stage for each in self._fleet.moves)
        words = ", ".join(f"{count} {stage}" for stage, count in sorted(stages.items()))
        killed = f", killed {', '.join(told)}" if told else ""
        seconds = time.monotonic() - began
        self._say(f"{log.stem}: {action} {len(moves)}, {seconds:.0f} s, status {status}{killed}; now {words}")
        return status

    def _await(self, at: float | str, moves: list[Move], process: subprocess.Popen[bytes], began: float) -> bool:
        """Wait for the time `at` of a run that `began` at a monotonic time. `moves`: whose stages count.

        Returns False if `process`, the run, ended before.
        """
        reached = {each.name for each in moves if each.stage == at}  # before the run
        while process.poll() is None:
            if isinstance(at, str):
                if any(each.stage == at for each in moves if each.name not in reached):
                    return True
            elif time.monotonic() >= began + at:
                return True
            time.sleep(0.05)
        return False

    def _kill(self, what: str, process: subprocess.Popen[bytes]) -> None:
        kind, _space, name = what.partition(" ")
        self.counts[f"kills of {kind}"] += 1
        if kind == "controller":
            os.killpg(process.pid, signal.SIGKILL)
        elif kind == "host":
            self._fleet.machines[name].kill()
            time.sleep(1)
            self._fleet.machines[name].start()
        else:
            ended = self._fleet.machines[name].kill_processes("blockcopy (sync|mount)", "sshd: root")
            self.counts["processes killed"] += ended

    def kill_plan(self, count: int, longest: float) -> list[tuple[float | str, str]]:
        """Choose `count` kills within `longest` seconds of a run. The last one is of the controller.

        Returns when what is killed, as `run` wants it.
        """
        names = sorted(self._fleet.machines)
        times = sorted(self._choose.uniform(4, longest) for _ in range(count))
        plan: list[tuple[float | str, str]] = []
        for at in times[:-1]:
            plan.append((at, f"{self._choose.choice(['host', 'processes'])} {self._choose.choice(names)}"))
        return [*plan, (times[-1], "controller")]

    def check(self, condition: object, fault: str) -> None:
        """Note `fault` unless `condition` holds."""
        if not condition:
            self.faults.append(fault)
            self._say(f"FAULT: {fault}")

    # What must hold

    def journals(self, move: Move) -> list[Journal]:
        """Return what the service of `move` wrote, at its source and at its destination."""
        folders = [each.folder / "srv" / "service" for each in (move.source, move.destination)]
        return [Journal.of(folder, move.name) for folder in folders]

    def forget_writes(self, move: Move) -> None:
        """Forget what the service of `move` wrote at its destination: an abort has thrown it away."""
        (move.destination.folder / "srv" / "service" / f"{move.name}.journal").unlink(missing_ok=True)

    def check_aborted(self, move: Move) -> None:
        """Check that `move` left its source as it was: running, without snapshots, with all that was written."""
        self.check(move.stage == "aborted", f"{move.name} is {move.stage}, not aborted")
        runs = (move.source.folder / "srv" / "service" / f"{move.name}.enabled").exists()
        self.check(runs, f"{move.name} does not run at its source after the abort")
        move.source.run(*move.command("stop").split())  # for a moment, to compare
        own = self.journals(move)[:1]
        for disk in move.disks:
            wrong = wrong_pages(disk.source_file.read_bytes(), disk, move.name, own)
            self.check(not wrong, f"{move.name} {disk.name}: wrong pages of the source after an abort: {wrong[:5]}")
        words = move.command("start", "old", [each.source for each in move.disks])
        move.source.run(*words.split())
        self.counts["aborts"] += 1

    def check_all(self) -> None:
        """Check all moves: each is done, no byte is wrong, and nothing was done twice."""
        for move in self._fleet.moves:
            self.check(move.stage == "done", f"{move.name} is {move.stage}, not done")
            move.destination.run(*move.command("stop").split())
            journals = self.journals(move)
            self.counts["writes at sources"] += len(journals[0].writes)
            self.counts["writes at destinations"] += len(journals[1].writes)
            for disk in move.disks:
                wrong = wrong_pages(disk.destination_file.read_bytes(), disk, move.name, journals)
                self.check(not wrong, f"{move.name} {disk.name}: wrong pages of the copy: {wrong[:5]}")
                lost = wrong_pages(disk.source_file.read_bytes(), disk, move.name, journals[:1])
                self.check(not lost, f"{move.name} {disk.name}: wrong pages of the source: {lost[:5]}")
                self.counts["disks compared"] += 1
            self._check_once(move)
        for each in left_behind(self._fleet):
            self.check(False, f"left behind: {each}")

    def _check_once(self, move: Move) -> None:
        """Check by the journal of the state that each step of `move` was done once since it began anew."""
        state = move.state()
        events = state.get("events", [])
        begins = max((at for at, each in enumerate(events) if each.get("stage") == "new"), default=0)
        tries = sum(each.get("stage") == "new" for each in events)
        steps = Counter(
            tuple(sorted((k, str(v)) for k, v in each.items() if k != "at")) for each in events[begins:]
        )
        went_back = any(each.get("stage") == "aborting" for each in events[begins:])
        for step, count in steps.items():
            self.check(count == 1 or went_back, f"{move.name}: {dict(step)} was done {count} times")
        self.counts["steps recorded"] += len(events)
        self.counts["moves begun anew after an abort"] += tries - 1
        for disk in move.disks:
            rounds = state["disks"][disk.name]["rounds"]
            self.counts["rounds"] += len(rounds)
            self.counts["bytes of the disks"] += disk.size
            self.counts["bytes fetched while services ran"] += sum(each["fetched_bytes"] for each in rounds)
            self.counts["bytes taken from the record"] += sum(each["resumed_bytes"] for each in rounds)
            for each in rounds:
                self.check(each["size"] == disk.size, f"{move.name} {disk.name}: size {each['size']}")

    @property
    def samples(self) -> metrics.Sampler:
        """The metrics of all machines, as they were sampled."""
        return self._sampler
