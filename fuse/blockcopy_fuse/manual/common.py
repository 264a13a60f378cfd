"""What the pages of several commands have in common: exit statuses, files, the environment, signals."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from blockcopy.replica.defaults import OPTIONS

_COPIES = {"mount", "sync"}
_REMOTE = {*_COPIES, "verify", "doctor"}
_PIPES = {"checksum", "retrieve", "save", "receive"}
_STATEFUL = {*_COPIES, "save", "receive", "discard-writes"}
_CONTROLS = {"status", "wait", "umount", "pause", "resume", "limit", "prefetch"}
_MOUNTS = {"mount", "list", *_CONTROLS}

_COMPARES = {*_COPIES, "verify"}
_WITH_DEFAULTS = {
    **dict.fromkeys(("rsh", "python", "blockcopy-path", "no-control-master"), _REMOTE),
    **dict.fromkeys(("timeout", "reconnect-timeout"), _COMPARES),
}
"""The commands that have an option with a default. All others belong to copies."""


class Row(NamedTuple):
    """A `term` and its meaning, `text` in Markdown, for the pages of `commands`. None means all commands.

    `short`: the meaning on those pages, if it is not `text`.
    """

    term: str
    text: str
    commands: Collection[str] | None = None
    short: str = ""


EXIT_STATUSES = (
    Row("0", "Done."),
    Row(
        "1",
        "A stream is cut short or invalid. The system refuses files, memory or processes. A device or file cannot "
        "be opened, read, written or synced. The destination is refused. The state file is in use. Or this is a "
        "bug in blockcopy.",
        short="A local device, file or stream failed or was refused.",
    ),
    Row("2", "The command line is invalid."),
    Row(
        "3",
        "The other end cannot be reached, refused, died, sent something that was not requested, or has changed. Or "
        "it cannot read some blocks.",
        _REMOTE,
        "The other end failed, refused or has changed.",
    ),
    Row("4", "A mount cannot be made, found, reached or unmounted.", _MOUNTS),
    Row(
        "5",
        "The destination is not a copy of the source (`verify`, `--verify`).",
        {*_COPIES, "verify"},
        "The two ends differ.",
    ),
    Row(
        "75",
        "`wait`: the copy cannot be completed. `umount`, `mount -f`: the copy is not complete yet, and present "
        "blocks are recorded.",
        {"mount", "wait", "umount"},
        "The copy is not complete.",
    ),
    Row("129, 130, 143", "Ended by SIGHUP, SIGINT, SIGTERM."),
)
"""The exit statuses, as a shell shows them. `errors` has the classes of errors with these statuses."""

FILES = (
    Row(
        "/var/lib/blockcopy, $XDG_STATE_HOME/blockcopy",
        "State files of root and of other users: one for each destination. Beside them lie notes of users' writes.",
        _STATEFUL,
    ),
    Row(
        "/etc/blockcopy.toml, $XDG_CONFIG_HOME/blockcopy/config.toml",
        "Defaults of options, see blockcopy-config(5). Without the variable, the folder is `~/.config`.",
        _REMOTE,
    ),
    Row(
        "/run/blockcopy, $XDG_RUNTIME_DIR/blockcopy",
        "The sockets of mounts, and of shared ssh logins.",
        _REMOTE | _MOUNTS,
    ),
    Row("MOUNTPOINT/status.json", "The status of the mount, as `status --json` prints it.", _MOUNTS),
    Row("/etc/fuse.conf", "`user_allow_other` allows `-o allow_other` for ordinary users.", {"mount", "doctor"}),
)

ENVIRONMENT = (
    Row("BLOCKCOPY_DEBUG", "The same as `-vv`, if it is not empty."),
    *(
        Row(variable, f"The default of `--{option}`, see blockcopy-config(5).", _WITH_DEFAULTS.get(option, _COPIES))
        for option, variable in OPTIONS.items()
    ),
    Row("XDG_CONFIG_HOME", "The folder of `blockcopy/config.toml`. The default is `~/.config`.", _REMOTE),
    Row("STATE_DIRECTORY", "The folder of the state files. systemd sets it for its units.", _STATEFUL),
    Row(
        "XDG_STATE_HOME", "The folder of the state of an ordinary user. The default is `~/.local/state`.", _STATEFUL
    ),
    Row(
        "XDG_RUNTIME_DIR",
        "The folder of an ordinary user's sockets.",
        _REMOTE | _MOUNTS,
    ),
    Row("NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID", "How systemd is told, see sd_notify(3).", _COPIES),
    Row("JOURNAL_STREAM", "If systemd set it, lines of the log have their priority.", _COPIES),
    Row("TERM", "Bars and screens are drawn only if it names a terminal other than `dumb`.", _REMOTE | _MOUNTS),
    Row("COLUMNS", "The width of help texts."),
    Row("PAGER", "The program that shows a page on a terminal. The default is `less`.", {"help"}),
)

SIGNALS = (
    Row(
        "SIGINT, SIGTERM, SIGHUP",
        "End the mount cleanly: it is unmounted, the destination is synced, and present blocks are recorded.",
        {"mount"},
    ),
    Row(
        "SIGINT, SIGTERM, SIGHUP",
        "End the copy cleanly: the destination is synced, and present blocks are recorded.",
        {"sync"},
    ),
    Row(
        "SIGINT, SIGTERM",
        "End the command. A second signal kills it at once.",
        _PIPES | {"verify", "wait", "doctor"},
    ),
)


def rows(table: tuple[Row, ...], command: str | None) -> list[Row]:
    """Return the rows of `table` that belong to `command`, with their short texts.

    Returns all rows as they are if `command` is None.
    """
    if command is None:
        return list(table)
    found = [row for row in table if row.commands is None or command in row.commands]
    return [row._replace(text=row.short or row.text) for row in found]
