"""Messages about a stage that ended or could not start: why, and what to do.

The hints rest on the exit status and on the last lines of standard error. The patterns match messages of OpenSSH,
sudo, shells and this program. If none matches, there is no hint.
"""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path

from blockcopy.errors import BlockcopyError, describe_exit
from blockcopy.transport import payload
from blockcopy.transport.command import Command

SSH_FAILED = 255
"""Exit status of ssh if the connection failed or the remote command was killed."""

_BUS_ERRORS = (-signal.SIGBUS, 128 + signal.SIGBUS)
"""Statuses of a process that died of SIGBUS, and of a shell that ran one. A stage dies so in `Device.view`."""


_KILLED = (128 + signal.SIGKILL, 128 + signal.SIGTERM)
"""Statuses of a shell whose program was killed."""

# Known failures: a regular expression for the last lines of stderr → the hint for the user.
_LOGIN = {
    "Could not resolve hostname|Name or service not known": (
        "{host} is not known here: check its spelling, ~/.ssh/config and DNS"
    ),
    "[Hh]ost key .*has changed|HOST IDENTIFICATION HAS CHANGED": (
        "{host} has another key than at the last login: it was installed anew, or another host answers. {login} "
        "prints the new key's fingerprint: compare it there, by ssh-keygen -lf, before you remove the old key"
    ),
    "Host key verification failed": "log in once by hand, and check that it is the right host: {login}",
    r"Permission denied \(|Too many authentication failures": (
        "{host} does not let this user in: check the user's name, and that the key is known there. "
        "Try it by hand: {login}"
    ),
    "Connection refused|timed out|No route to host|unreachable|Connection closed by|Connection reset": (
        "{host} cannot be reached: is it up, and does sshd listen there? Try it by hand: {login}"
    ),
    "must have a tty to run sudo": (
        "sudo there wants a terminal: exempt this user (`Defaults:USER !requiretty` in sudoers), or log in as root"
    ),
    "(sudo|doas): .*(password|terminal|tty|uthentication).* required|(sudo|doas): no tty|doas: Authoriz": (
        "{program} there asks for a password: allow it without one (NOPASSWD in sudoers), or log in as root"
    ),
    "sudoers|not allowed to execute": "sudo there does not let this user do that: see its sudoers",
    "(?m)^(sudo|doas|su): ": "the command must work without a terminal; try it by hand: {login} {program} -V",
    "[Pp]assword (change required|has expired)|account has expired": "log in once by hand: {login}",
    f"(?m)^{payload.STDIN_LOST}": (
        "a start-up file of the login there reads standard input: let it do so only on a terminal "
        "(`[ -t 0 ] && …`); `docker exec` needs `-i`"
    ),
    "restricted": "the login there is restricted: name a program that it may run with --blockcopy-path",
}

_PYTHON = {
    "and blockcopy needs": "name a newer one with --python, or an installed blockcopy with --blockcopy-path",
    "SyntaxError": "`{program}` there is no Python 3: name one with --python",
}

_DEVICE = {
    "cannot open .*: Permission denied": "that user may not open it: {more_rights}",
    "cannot open .*: No such file or directory": "the path is one on {where}: is it spelled right?",
    "Too many open files": "raise the limit on {where} (ulimit -n, or LimitNOFILE= of a unit)",
}


def explain_end(
    command: Command, status: int | None, lines: Sequence[str], *, begun: bool, error: BlockcopyError | None = None
) -> str:
    """Return the message for the stage of `command`, which ended too early: how, what it said, and what to do.

    `status`: exit status, negative for a signal, None if the stage only closed its output. `lines`: the last lines
    of its stderr. `begun`: whether the stage itself ran. `error`: a local error, shown if there are no lines.
    """
    said = " | ".join(lines)
    prefix = f"ERROR ({command.stage}): "
    own = next((line[len(prefix) :] for line in lines if line.startswith(prefix)), None)
    if own is not None and status != SSH_FAILED:
        text = f"{command.location.host_shown}: {own}" if command.location.host_shown else own
    elif _is_ssh_failure(command, status):
        host = command.location.host_shown
        reason = said.removeprefix("ssh: ") or str(error or "")
        text = f"ssh to {host} failed"
        if begun and (command.mark or not reason):  # ssh ends so as well if the stage was killed there
            text = f"the ssh connection for {command.location} was lost"
        text += f": {reason}" if reason else ""
    else:
        how = "closed its output" if status is None else describe_exit(status)
        said = f"; it said: {said}" if said else f": {error}" if error else ""
        text = f"{_culprit(command, status, begun=begun)} {how}{said}"
    return with_hint(text, command, status, lines, begun=begun)


def _is_ssh_failure(command: Command, status: int | None) -> bool:
    """Return whether ssh itself failed with `status`, and not the stage of `command` on the host."""
    return status == SSH_FAILED and any(Path(word).name == "ssh" for word in command.route.by_hand)


def _culprit(command: Command, status: int | None, *, begun: bool) -> str:
    """Return which program of `command` ended with `status`, in words. `begun`: whether the stage itself ran."""
    host = command.location.host_shown
    if host and status is not None and status < 0:
        return f"`{Path(command.argv[0]).name}` to {host}"  # the process on this host
    if host and command.mark and not begun:
        return f"`{command.program}` on {host}"
    return f"the {command.stage} process of {command.location}"


def with_hint(text: str, command: Command, status: int | None, lines: Sequence[str], *, begun: bool) -> str:
    """Return `text` with a hint appended, if one is known.

    `command`, `status`, `lines`, `begun`: as in `explain_end()`.
    """
    hint = _hint(command, status, "\n".join(lines), begun=begun)
    return f"{text} – {hint}" if hint else text


def explain_failed_start(command: Command, error: OSError) -> str:
    """Return the message for `command`, which could not be started on this host because of `error`."""
    program = command.argv[0]
    text = f"cannot run `{program}`: {error.strerror}"
    if isinstance(error, FileNotFoundError):
        text += " – it is not installed here"
        text += " (Debian: apt install openssh-client)" if program == "ssh" else ""
    return text


def _hint(command: Command, status: int | None, said: str, *, begun: bool) -> str | None:
    """Return what to do about the stage of `command`, which ended with `status`. Returns None if unknown.

    `said`: the last lines on standard error, as one text. `begun`: whether the stage itself ran.
    """
    host = command.location.host
    sent = bool(command.mark)
    before_stage = host is not None and not (sent and begun)
    cases = _DEVICE
    if before_stage:
        cases = {**_LOGIN, **_DEVICE, **(_PYTHON if sent else {})}
    found = next((hint for pattern, hint in cases.items() if re.search(pattern, said)), None)
    if found is None and status in _BUS_ERRORS:
        found = (
            "the device was made shorter, or its disk failed, while it was read: see the kernel's log on {where}"
        )
    if found is None and before_stage:
        found = _hint_by_status(status, said, sent=sent)
    if found is None:
        return None
    return found.format(
        host=command.location.host_shown,
        where=command.location.host_shown or "this host",
        program=command.program,
        login=shlex.join(command.route.by_hand),
        more_rights=_more_rights(command),
    )


def _more_rights(command: Command) -> str:
    """Return how to run the stage of `command` as root, in words."""
    if command.location.host is None:
        return "run blockcopy as root"
    option = "--python" if command.mark else "--blockcopy-path"
    return f"{option} {shlex.quote(f'sudo -n {command.program}')}"


def _hint_by_status(status: int | None, said: str, *, sent: bool) -> str | None:
    """Return a hint for `status`. Shells exit with 127 if a program is missing, 126 if it cannot be run.

    `said`: the last lines on standard error, as one text. `sent`: whether the stage is sent to the host. Returns
    None if no hint is known.
    """
    if status == 127 and sent:
        return "there is no `{program}` on {host}: install Python 3.9 or newer there, or name it with --python"
    if status == 127:
        return "there is no `{program}` on {host}: name it with --blockcopy-path, or leave out that option"
    if status == SSH_FAILED and not said:
        return "the connection failed without a word; try it by hand: {login}"
    if status is not None and status < 0:
        return "something on this host ended it: if that was the kernel, its log tells of too little memory"
    if status in _KILLED:
        return "something on {host} ended it: if that was the kernel, its log there tells of too little memory"
    if status == 126:
        return "`{program}` cannot be run there by that user"
    if sent and status != SSH_FAILED:
        return (
            "{host} did not run `{program}`. If the login may run only certain programs, name one with "
            "--blockcopy-path"
        )
    return None
