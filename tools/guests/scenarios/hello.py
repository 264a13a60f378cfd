"""The guest boots with systemd, runs the program, and powers off."""

from __future__ import annotations

import time

from blockcopy import __version__
from guests.lab import Lab
from guests.machine import WrongError


def run(lab: Lab) -> dict[str, object]:
    """Boot, ask the program for its version, power off."""
    guest = lab.machine()
    began = time.monotonic()
    guest.boot()
    guest.wait_for_ssh()
    booted = time.monotonic()
    version = guest.ssh("blockcopy --version")
    if __version__ not in version:
        raise WrongError(f"the guest has version {version}, not {__version__}")
    kernel = guest.ssh("uname -r")
    off = time.monotonic()
    guest.power_off()
    return {
        "kernel": kernel,
        "seconds to ssh": round(booted - began, 1),
        "seconds to power off": round(time.monotonic() - off, 1),
    }
