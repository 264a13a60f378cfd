"""The optional packages, and the command that installs them for the running Python.

No package index has blockcopy itself. Anybody could register that name there.
So no message may advise to install blockcopy from an index.
The file pyproject.toml lists the packages below as the extras `fuse` and `fast`.
"""

from __future__ import annotations

import os
import shlex
import sys
import sysconfig

FUSE = ("pyfuse3>=3.4", "trio>=0.25", "rich>=13", "markdown-it-py>=2.1", "shtab>=1.8")

BLAKE3 = "blake3>=0.4"

ZSTD = "backports.zstd>=1.0"
"""Python 3.14 includes zstd and needs no package."""


def install_command(*requirements: str) -> str:
    """Return the shell command that installs `requirements`, such as "blake3>=0.4", for the running Python.

    Returns advice in words instead if this Python is externally managed.
    """
    if is_externally_managed():
        return (
            f"install {' '.join(requirements)} in a virtual environment, as the README does with pipx; "
            f"{sys.executable} is managed by its distribution, and takes no packages"
        )
    return shlex.join([sys.executable or "python3", "-m", "pip", "install", *requirements])


def is_externally_managed() -> bool:
    """Return True if only the distribution may install packages for the running Python (PEP 668)."""
    marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    return sys.prefix == sys.base_prefix and os.path.exists(marker)
