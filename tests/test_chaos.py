"""Rounds of tools/chaos: a mount that is broken at random moments, and readers or writers that check every byte."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import support
from support import PYTHON

CHAOS = Path(__file__).resolve().parent.parent / "tools" / "chaos"
SEED = 2024
WRITABLE_SEED = 7


@pytest.mark.long
@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [1, 2])
def test_rounds(tmp_path: Path, number: int) -> None:
    """A round takes about 5 seconds. The two have 8 kinds of events. The folder of a failed round stays."""
    support.require_fuse()
    support.require_root()
    words = f"--seed {SEED} --first {number} --rounds 1 --size 8 --folder"
    _pass([*words.split(), tmp_path], 1)


@pytest.mark.long
@pytest.mark.timeout(200)
def test_rounds_of_a_writable_mount(tmp_path: Path) -> None:
    """The second round of this seed. It has a disk that loses a part of what was not synced."""
    support.require_fuse()
    support.require_root()
    words = f"--writable --seed {WRITABLE_SEED} --first 2 --rounds 1 --size 4 --folder"
    _pass([*words.split(), tmp_path], 1)


def _pass(options: list[object], rounds: int) -> None:
    command = [PYTHON, CHAOS, *options]
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{rounds} rounds, 0 failed" in done.stdout
    assert " 0 wrong reads" in done.stdout
