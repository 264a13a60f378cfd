"""The checkout that the programs here belong to, and the environment that tools/setup made in it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
PYTHON = CHECKOUT / ".venv/bin/python"


def use_environment() -> None:
    """Begin again with that Python, which has all that is needed. (A broken environment may have another prefix
    than its own: once only.)"""
    if PYTHON.exists() and PYTHON.absolute() != Path(sys.executable):
        os.execv(PYTHON, [str(PYTHON), *sys.argv])
