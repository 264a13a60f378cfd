"""Rounds of tools/chaos: a mount that is broken at random moments, and three readers that check every byte."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import support
from support import PYTHON

CHAOS = Path(__file__).resolve().parent.parent / "tools" / "chaos"
SEED = 2024
ROUNDS = 2


@pytest.mark.timeout(200)
@pytest.mark.parametrize("first", [0, ROUNDS])
def test_rounds(tmp_path: Path, first: int) -> None:
    """A round takes about 5 seconds. The folder of a round that fails stays below pytest's."""
    support.require_fuse()
    support.require_root()
    options = ["--seed", SEED, "--first", first, "--rounds", ROUNDS, "--size", 8, "--folder", tmp_path]
    command = [PYTHON, CHAOS, *options]
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{ROUNDS} rounds, 0 failed" in done.stdout
    assert " 0 wrong reads" in done.stdout
