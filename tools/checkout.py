"""The checkout of these programs, and the virtual environment that tools/setup creates there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
PYTHON = CHECKOUT / ".venv/bin/python"


def use_environment() -> None:
    """Restart this program with the Python of the virtual environment, if there is one. Returns if it runs already.

    The check is by path: in a broken environment `sys.prefix` may differ, and the restart would never end.
    """
    if PYTHON.exists() and PYTHON.absolute() != Path(sys.executable):
        os.execv(PYTHON, [str(PYTHON), *sys.argv])
