"""Why a stage on a host did not come to work, and what to do about it: told from its exit status and its words.

The words are those of OpenSSH, sudo, shells and ourselves. Where none fits, nothing is advised.
"""

from __future__ import annotations

import re
import shlex
import signal
from typing import NamedTuple

from blockcopy.transport import payload
from blockcopy.transport.command import Command

TRANSPORT_FAILED = 255
"""What ssh ends with where it is the connection that failed, or the command was killed."""

_BUS_ERRORS = (-signal.SIGBUS, 128 + signal.SIGBUS)
"""Of a process, and of a shell that ran one: who looks at a device in place (see `Device.view`) dies of that."""


class _Case(NamedTuple):
    words: str
    """A pattern of what was said."""
    advice: str


_LOGIN = [
    _Case(
        "Could not resolve hostname|Name or service not known",
        "{host} is not known here: look at its spelling, at ~/.ssh/config and at DNS",
    ),
    _Case(
        "Host key verification failed",
        "log in once by hand, and see whether it is the right host: {login}",
    ),
    _Case(
        r"Permission denied \(|Too many authentication failures",
        "{host} does not let this user in: is the name right, and the key known there? Try it by hand: {login}",
    ),
    _Case(
        "Connection refused|timed out|No route to host|unreachable|Connection closed by|Connection reset",
        "{host} cannot be reached: is it up, and does sshd listen there? Try it by hand: {login}",
    ),
    _Case(
        "must have a tty to run sudo",
        "sudo there wants a terminal: exempt this user (`Defaults:USER !requiretty` in sudoers), or log in as root",
    ),
    _Case(
        "(sudo|doas): .*(password|terminal|tty|uthentication).* required|(sudo|doas): no tty|doas: Authoriz",
        "{runs} there asks for a password: let it do without (NOPASSWD in sudoers), or log in as root",
    ),
    _Case("sudoers|not allowed to execute", "sudo there does not let this user do that: see its sudoers"),
    _Case("(?m)^(sudo|doas|su): ", "it has to work without a terminal; try it by hand: {login} {runs} -V"),
    _Case("[Pp]assword (change required|has expired)|account has expired", "log in once by hand: {login}"),
    _Case(
        f"(?m)^{payload.NOT_GIVEN}",
        "a start-up file of the login there reads standard input: have it do so at a terminal only "
        "(`[ -t 0 ] && …`); and `docker exec` needs `-i`",
    ),
    _Case("restricted", "the login there is restricted: name what it may run by --blockcopy-path"),
]

_PYTHON = [
    _Case("and blockcopy needs", "name a newer one by --python, or an installed blockcopy by --blockcopy-path"),
    _Case("SyntaxError", "`{runs}` there is no Python 3: name one by --python"),
]

_DEVICE = [
    _Case("cannot open .*: Permission denied", "that user may not open it: {more_rights}"),
    _Case("cannot open .*: No such file or directory", "the path is one on {where}: is it spelled right?"),
    _Case("Too many open files", "raise the limit on {where} (ulimit -n, or LimitNOFILE= of a unit)"),
]


def advice(command: Command, status: int | None, said: str, *, begun: bool) -> str | None:
    """For a stage that ended with `status`, and `said` this on standard error; `begun`: it came to run at all."""
    host = command.location.host
    ours = bool(command.mark)
    cases = list(_DEVICE)
    if host is not None and not (ours and begun):
        cases = [*_LOGIN, *cases]
        if ours:
            cases += _PYTHON
    found = next((case.advice for case in cases if re.search(case.words, said)), None)
    if found is None and status in _BUS_ERRORS:
        found = "it was made shorter, or its disk failed, while it was looked at: see the kernel's log on {where}"
    if found is None and host is not None and not (ours and begun):
        found = _by_status(status, said, ours=ours)
    if found is None:
        return None
    if host is None:
        more_rights = "run blockcopy as root"
    elif ours:
        more_rights = f"--python {shlex.quote(f'sudo -n {command.runs}')}"
    else:
        more_rights = f"--blockcopy-path {shlex.quote(f'sudo -n {command.runs}')}"
    return found.format(
        host=command.location.host_shown,
        where=command.location.host_shown or "this host",
        runs=command.runs,
        login=shlex.join(command.way.by_hand),
        more_rights=more_rights,
    )


def cannot_run(command: Command, error: OSError) -> str:
    """Return the message for a program of this host that `error` kept from being started."""
    program = command.argv[0]
    told = f"cannot run `{program}`: {error.strerror}"
    if isinstance(error, FileNotFoundError):
        told += " – it is not installed here"
        told += " (Debian: apt install openssh-client)" if program == "ssh" else ""
    return told


def _by_status(status: int | None, said: str, *, ours: bool) -> str | None:
    """As shells have it: 127 for what is not there, 126 for what may not be run."""
    if status == 127 and ours:
        return "there is no `{runs}` on {host}: install Python 3.9 or newer there, or name it by --python"
    if status == 127:
        return "there is no `{runs}` on {host}: name it by --blockcopy-path; without that option python3 will do"
    if status == TRANSPORT_FAILED and not said:
        return "the connection failed without a word; try it by hand: {login}"
    if status == 126:
        return "`{runs}` cannot be run there by that user"
    if ours and status != TRANSPORT_FAILED:
        return (
            "{host} did not run `{runs}`. Where a login may run certain programs only, name one by --blockcopy-path"
        )
    return None
