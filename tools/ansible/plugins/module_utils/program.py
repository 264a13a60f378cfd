# Copyright: the authors of blockcopy. MIT License (see LICENSE of blockcopy)
"""The blockcopy program, as the modules of this collection run it: options, and answers as JSON.

No module reads words. An exit status and a JSON object tell what happened. Words are handed on to people.
"""

from __future__ import annotations

import json
import os
import shlex

MISMATCH, MOUNT_ERROR, INCOMPLETE = 5, 4, 75
"""Exit statuses: the ends differ; a mount cannot be made, found or ended; the copy is not complete."""

MAX_WORDS = 4000
"""Characters of standard error that a result keeps, the last ones."""

PROGRAM = {"executable": {"type": "str", "default": "blockcopy"}}

CONNECTION = {
    "rsh": {"type": "str"},
    "python": {"type": "str"},
    "blockcopy_path": {"type": "str"},
    "control_master": {"type": "bool", "default": True},
    "connections": {"type": "str"},
    "compress": {"type": "str"},
    "timeout": {"type": "float"},
    "reconnect_timeout": {"type": "float"},
}

COPY = {
    "limit": {"type": "str"},
    "force": {"type": "bool", "default": False},
    "sparse": {"type": "bool", "default": True},
    "verify": {"type": "bool", "default": False},
    "state_file": {"type": "path"},
    "keep_state": {"type": "bool", "default": True},
    "recheck": {"type": "bool", "default": False},
    "metrics": {"type": "path"},
    "log_file": {"type": "path"},
}

_FLAGS = {
    # parameter: the value that needs the option, the option
    "control_master": (False, "--no-control-master"),
    "force": (True, "--force"),
    "sparse": (False, "--no-sparse"),
    "verify": (True, "--verify"),
    "keep_state": (False, "--no-state"),
    "recheck": (True, "--recheck"),
}
_VALUES = {
    "rsh": "--rsh",
    "python": "--python",
    "blockcopy_path": "--blockcopy-path",
    "connections": "--connections",
    "compress": "--compress",
    "timeout": "--timeout",
    "reconnect_timeout": "--reconnect-timeout",
    "limit": "--limit",
    "state_file": "--state",
    "metrics": "--metrics",
    "log_file": "--log-file",
}


def options(params, *, without=()):
    """Return the options of a command for the module parameters `params`. `without`: parameters to leave out."""
    found = []
    for name, (wanted, option) in _FLAGS.items():
        if name not in without and params.get(name) is wanted:
            found.append(option)
    for name, option in _VALUES.items():
        if name not in without and params.get(name) is not None:
            found.append(f"{option}={params[name]}")
    return found


def remote(name):
    """Return whether `name`, of a source or destination, is on another host.

    The rule is blockcopy's: a URL, or a colon before the first slash.
    """
    return name.startswith("ssh://") or ":" in name.split("/", 1)[0]


class Program:
    """The program on the managed host. `module`: the AnsibleModule, whose parameter `executable` names it."""

    def __init__(self, module):
        self._module = module
        words = shlex.split(module.params["executable"])
        if not words:
            module.fail_json(msg="executable is empty")
        self._words = [module.get_bin_path(words[0], required=True), *words[1:]]

    def run(self, *arguments, accept=(0,)):
        """Run the program with `arguments`. Returns the exit status, the standard output and the last words.

        Fails the module if the exit status is not in `accept`.
        """
        status, out, err = self._module.run_command([*self._words, *arguments], handle_exceptions=True)
        words = err.strip()[-MAX_WORDS:]
        if accept is not None and status not in accept:
            self.fail(arguments[0], status, words)
        return status, out, words

    def json(self, *arguments, accept=(0,)):
        """Run the program with `arguments`. Returns the exit status, the JSON that it printed, and the last words.

        The JSON is None if the exit status is not 0 and nothing was printed. Fails the module like `run`,
        and if the output is no JSON.
        """
        status, out, words = self.run(*arguments, accept=None)
        found = None
        if out.strip():
            try:
                found = json.loads(out)
            except ValueError:
                self.fail(arguments[0], status, words, found={"stdout": out[-MAX_WORDS:]})
        if status not in accept or (found is None and status == 0):
            told = found.get("error") if isinstance(found, dict) else None
            self.fail(arguments[0], status, words, told, found={"result": found} if found else None)
        return status, found, words

    def fail(self, command, status, words, told=None, found=None):
        """Fail the module: `command` ended with `status`.

        `words`: its standard error. `told`: the reason as JSON had it, or None. `found`: further results.
        """
        if status < 0:
            reason = f"it was killed by signal {-status}"
        else:
            reason = told or (words.splitlines()[-1] if words else f"exit status {status}")
        self._module.fail_json(msg=f"blockcopy {command}: {reason}", rc=status, stderr=words, **(found or {}))

    def has_writes(self, destination, *, discard=False):
        """Return whether `destination`, which is not in use, holds writes of a user. `discard`: throw them away."""
        dry_run = [] if discard else ["--dry-run"]
        return self.json("discard-writes", "--json", *dry_run, "--", destination)[1]["has_writes"]

    def mounts(self):
        """Return the status of each mount of this host, as `blockcopy list --json` prints them."""
        found = self.json("list", "--json")[1]
        return [each for each in found if isinstance(each, dict)]

    def mount_at(self, mountpoint):
        """Return the status of the mount at `mountpoint`. Returns None if nothing of blockcopy is mounted there.

        `list` waits for a second only. A mount that did not answer is asked once more, with more patience.
        """
        path = os.path.join(os.path.realpath(os.path.dirname(mountpoint)), os.path.basename(mountpoint))
        found = next((each for each in self.mounts() if each.get("mountpoint") in (mountpoint, path)), None)
        if found is not None and not answers(found):
            status, out, _words = self.run("status", "--json", "--", mountpoint, accept=None)
            if status == 0:
                found = json.loads(out)
        return found


def answers(status):
    """Return whether the mount of `status` answers: others have neither a state nor sizes."""
    return status is not None and status.get("state") is not None
