"""The completion scripts for shells, made from the parser.

Commands to a mount complete the mountpoints of blockcopy. Without a fitting one they complete folders.
The shell reads /proc/self/mounts itself: starting Python at each key would be too slow.
"""

from __future__ import annotations

import argparse

import shtab

from blockcopy.cli.parser import parser
from blockcopy.cli.suggestions import commands_of
from blockcopy_fuse import options
from blockcopy_fuse.manual.pages import titles

_VALUES = {
    "--compress": ["auto", "none", "zstd"],
    "--connections": ["auto", "1", "2", "4", "8"],
    "-o": sorted([*options.FLAGS, *(f"{name}=" for name in options.VALUES)]),
}
"""Values of options that the parser does not have as choices. A colon in one is an error in zsh."""

# Blanks and the like are octal numbers in /proc/self/mounts, as %b understands them. In bash, shtab completes what
# the name of a function calls `_dir` as file names, so blanks are quoted.
_MOUNTED = {
    "bash": """
_blockcopy_dirs_mounted() {
  local point kind found=
  while read -r _ point kind _; do
    if [[ $kind == fuse.blockcopy ]]; then
      printf -v point %b "$point"
      if [[ $point == "$1"* ]]; then printf '%s\\n' "$point"; found=1; fi
    fi
  done </proc/self/mounts
  [[ $found ]] || compgen -d -- "$1"
}
""",
    "zsh": """
_blockcopy_dirs_mounted() {
  local point kind ignored
  local -a points
  while read -r ignored point kind ignored; do
    if [[ $kind == fuse.blockcopy ]]; then points+=("$(printf %b $point)"); fi
  done </proc/self/mounts
  compadd -f -- $points || _files -/
}
""",
    "fish": """
function __blockcopy_mounted
  while read -l device point kind rest
    test $kind = fuse.blockcopy; and printf '%b\\n' $point
  end </proc/self/mounts
end
""",
}
"""The functions of each shell that complete mountpoints of blockcopy."""

_MOUNTPOINTS = {
    "bash": "_blockcopy_dirs_mounted",
    "zsh": "_blockcopy_dirs_mounted",
    "fish": "(__blockcopy_mounted; __fish_complete_directories)",
}


def completion(shell: str) -> str:
    """Return the text of the completion script for `shell`, one of the parser's SHELLS, such as "bash"."""
    all_commands = parser()
    for name, command in commands_of(all_commands).items():
        for action in command._actions:
            _complete(name, action)
    return str(shtab.complete(all_commands, shell, preamble=_MOUNTED))  # type: ignore[arg-type]


def _complete(command: str, action: argparse.Action) -> None:
    """Tell shtab what the values of `action` are, an option or argument of the command named `command`."""
    completed: object = None
    if action.metavar in ("FILE", "SOURCE", "DESTINATION"):
        completed = shtab.FILE
    elif action.metavar == "MOUNTPOINT" and command != "mount":
        completed = _MOUNTPOINTS
    elif action.metavar in ("MOUNTPOINT", "FOLDER"):
        completed = shtab.DIRECTORY
    elif action.metavar == "PAGE":
        action.choices = [title.name.removeprefix("blockcopy-") for title in titles()]
    elif values := [value for option in action.option_strings for value in _VALUES.get(option, [])]:
        action.choices = values
    if completed is not None:
        action.complete = completed  # type: ignore[attr-defined]
