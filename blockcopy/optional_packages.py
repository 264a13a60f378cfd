"""The packages that are optional, and the command that installs them for the Python that runs.

No package index has blockcopy itself, and whoever registers the name there is a stranger: no text advises to
install that from one. The packages below are what pyproject.toml has as `fuse` and `fast`.
"""

from __future__ import annotations

import os
import shlex
import sys
import sysconfig

FUSE = ("pyfuse3>=3.4", "trio>=0.25", "rich>=13", "argparse-manpage>=4.5", "shtab>=1.8")

BLAKE3 = "blake3>=0.4"

ZSTD = "backports.zstd>=1.0"
"""Python 3.14 has it itself."""


def install_command(*requirements: str) -> str:
    """Return the command that installs these for this very Python, or what to do if it takes no packages."""
    if is_externally_managed():
        return (
            f"an environment of its own, as the README makes one (pipx), with {' '.join(requirements)}: "
            f"{sys.executable} is the distribution's, and takes no packages"
        )
    return shlex.join([sys.executable or "python3", "-m", "pip", "install", *requirements])


def is_externally_managed() -> bool:
    """Return whether this Python is one that its distribution keeps to itself (PEP 668)."""
    marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    return sys.prefix == sys.base_prefix and os.path.exists(marker)
