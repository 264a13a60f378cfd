"""Our own stages on a host that has python3 and nothing of ours: how they get there, and each way that fails."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import BLOCKCOPY, PYTHON, Mount, Sshd, failed, noise, output, run, succeeded, until, written

from blockcopy.transport import payload

DATA = noise(700_001)

SHELL = 'shift; exec sh -c "$*"'
"""What ssh does with its arguments, on this host: joined with spaces, for a shell."""
NO_SHELL = 'shift; exec "$@"'
"""What `docker exec -i` does."""

Transport = Callable[[str], Path]


@pytest.fixture
def rsh(tmp_path: Path) -> Transport:
    """Return a function that writes a script in place of ssh. Its arguments are HOST COMMAND."""

    def make(script: str) -> Path:
        path = written(tmp_path / "rsh", f"#!/bin/bash\n{script}\n".encode())
        path.chmod(0o755)
        return path

    return make


def sync(source: object, destination: Path, *options: object) -> subprocess.CompletedProcess[bytes]:
    return run("sync", "--no-state", *options, f"host:{source}", destination)


# What works


@pytest.mark.parametrize("script", [SHELL, NO_SHELL], ids=["shell", "no shell"])
@pytest.mark.parametrize("name", ["plain", 'it\'s "odd" $HOME `id` \\ ; ä', "new\nline"])
def test_the_stages_travel(rsh: Transport, tmp_path: Path, script: str, name: str) -> None:
    source = written(tmp_path / name, DATA)
    destination = tmp_path / "destination"
    done = sync(source, destination, "-e", rsh(script), "--python", PYTHON)
    succeeded(done, stdout=b"")
    assert destination.read_bytes() == DATA


def test_nothing_of_ours_is_installed_there_and_nothing_is_left(
    rsh: Transport, source: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for trap in ("zlib", "json", "blockcopy", "importlib"):
        written(home / f"{trap}.py", b"raise SystemExit('taken from the home folder')")
    before = sorted(home.iterdir())
    clean = f"env -i HOME={home} PATH=/usr/bin:/bin TMPDIR={home}"
    script = f'shift; cd {home}; exec {clean} sh -c "$*"'
    destination = tmp_path / "destination"
    # -S: not even the packages that are installed for this interpreter.
    done = sync(source, destination, "-e", rsh(script), "--python", f"{PYTHON} -S")
    succeeded(done)
    assert destination.read_bytes() == DATA
    assert sorted(home.iterdir()) == before


def test_a_login_that_prints_does_not_break_it(rsh: Transport, source: Path, tmp_path: Path) -> None:
    noisy = "echo 'Welcome! data helo done'; head -c 20000 /dev/urandom; echo 'a banner' >&2"
    destination = tmp_path / "destination"
    done = sync(source, destination, "-e", rsh(f"{noisy}; {SHELL}"), "--python", PYTHON)
    assert done.returncode == 0, done.stderr
    assert destination.read_bytes() == DATA


def test_a_login_that_prints_for_ever_is_given_up(rsh: Transport, source: Path, tmp_path: Path) -> None:
    done = sync(source, tmp_path / "destination", "-e", rsh("yes"), "--timeout", "10")
    failed(done, 3, b"were printed before the stream began")


def test_what_is_run_is_seen_in_the_list_of_processes(rsh: Transport, source: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = sync(source, tmp_path / "destination", "-e", rsh(f'echo "$*" >{log}; {NO_SHELL}'), "--python", PYTHON)
    assert done.returncode == 0
    assert log.read_text().endswith(f" blockcopy retrieve {source}\n")


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.12", "3.13"])
def test_other_pythons(rsh: Transport, source: Path, tmp_path: Path, version: str) -> None:
    destination = tmp_path / "destination"
    done = sync(source, destination, "-e", rsh(SHELL), "--python", python_of(version))
    succeeded(done)
    assert destination.read_bytes() == DATA


def python_of(version: str) -> str:
    """Return an interpreter of this version. Skip the test if none runs here."""
    places = [*Path.home().glob(f".pyenv/versions/{version}.*/bin"), *map(Path, os.get_exec_path())]
    for place in places:
        path = shutil.which(f"python{version}", path=str(place))
        if path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            return path
    pytest.skip(f"there is no Python {version} here")


@pytest.mark.parametrize("stage", ["retrieve", "receive", "checksum", "facts"])
def test_what_a_stage_loads_is_sent_and_nothing_else(stage: str) -> None:
    """A stage that begins has loaded all that it needs, from the texts that run here, less their docstrings."""
    script = (
        f"import sys, importlib, {payload.PROGRAM}\n"
        f"importlib.import_module('blockcopy.stage.{stage}')\n"
        "print(*(each for each in sys.modules if each.partition('.')[0] == 'blockcopy'))"
    )
    loaded = output(PYTHON, "-P", "-c", script).split()
    sent = payload.needed_by(stage)
    assert set(loaded) == set(sent)
    for name, text in sent.items():
        found = importlib.util.find_spec(name)
        assert found is not None
        assert found.origin is not None
        here = Path(found.origin).read_text()
        assert ast.dump(without_docstrings(text)) == ast.dump(without_docstrings(here))
        assert len(text.splitlines()) == len(here.splitlines())


def without_docstrings(text: str) -> ast.Module:
    """Parse a module, and empty each string that is a statement by itself."""
    module = ast.parse(text)
    for node in ast.walk(module):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            node.value.value = ""
    return module


# What fails, each with its reason and its advice


def refused(done: subprocess.CompletedProcess[bytes], *told: str) -> None:
    failed(done, 3)
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith("ERROR (sync): ")
    assert [each for each in told if each not in last] == []
    assert "Traceback" not in done.stderr.decode()


def test_no_python(rsh: Transport, source: Path, tmp_path: Path) -> None:
    done = sync(source, tmp_path / "copy", "-e", rsh(SHELL), "--python", "no-such-python3")
    refused(done, "not found", "there is no `no-such-python3` on host", "--python")


@pytest.mark.parametrize("version", ["3.6", "3.7", "3.8"])
def test_a_python_that_is_too_old(rsh: Transport, source: Path, tmp_path: Path, version: str) -> None:
    done = sync(source, tmp_path / "copy", "-e", rsh(NO_SHELL), "--python", python_of(version))
    refused(done, f"is Python {version}, and blockcopy needs 3.9 or newer", "name a newer one with --python")


def test_a_python_2(rsh: Transport, source: Path, tmp_path: Path) -> None:
    python = python_of("2.7")
    done = sync(source, tmp_path / "copy", "-e", rsh(SHELL), "--python", python)
    refused(done, "SyntaxError", f"`{python}` there is no Python 3")


def test_a_restricted_shell(rsh: Transport, source: Path, tmp_path: Path) -> None:
    done = sync(source, tmp_path / "copy", "-e", rsh('shift; exec bash -r -c "/usr/bin/$*"'))
    refused(done, "restricted", "--blockcopy-path")


@pytest.mark.parametrize("script", ["echo 'This account is currently not available.'; exit 1", "exit 0", "cat"])
def test_a_login_that_runs_something_else(rsh: Transport, source: Path, tmp_path: Path, script: str) -> None:
    destination = tmp_path / "copy"
    refused(
        sync(source, destination, "-e", rsh(script), "--timeout", "2"),
        *([] if script == "cat" else ["host did not run `python3`", "--blockcopy-path"]),
    )
    assert not destination.exists()


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("kill -9 $$", "was killed by SIGKILL – something on this host ended it"),
        ("exit 137", "`python3` on host ended with exit status 137 – something on host ended it"),
    ],
)
def test_what_was_killed_is_not_said_to_be_missing(
    rsh: Transport, source: Path, tmp_path: Path, script: str, told: str
) -> None:
    done = sync(source, tmp_path / "copy", "-e", rsh(script))
    refused(done, told)
    assert b"--blockcopy-path" not in done.stderr


@pytest.mark.parametrize("reads", ["read answer", "head -c 300 >/dev/null", "cat >/dev/null", "read -n 3 answer"])
@pytest.mark.parametrize("script", [SHELL, NO_SHELL], ids=["shell", "no shell"])
def test_a_start_up_file_that_reads_standard_input(
    rsh: Transport, source: Path, tmp_path: Path, script: str, reads: str
) -> None:
    limit = ["--timeout", "1"] if reads.startswith("cat") else []
    done = sync(source, tmp_path / "copy", "-e", rsh(f"{reads}; {script}"), "--python", PYTHON, *limit)
    if reads.startswith("cat"):
        refused(done, "gave up waiting for host to start")
    else:
        refused(done, "did not reach it", "a start-up file of the login there reads standard input")


def test_standard_input_that_is_not_passed_on(rsh: Transport, source: Path, tmp_path: Path) -> None:
    """`docker exec` without -i does this."""
    done = sync(source, tmp_path / "copy", "-e", rsh(f"exec </dev/null; {NO_SHELL}"), "--python", PYTHON)
    refused(done, "did not reach it", "`docker exec` needs `-i`")


@pytest.mark.parametrize("direction", ["pull", "push"])
def test_few_files_there(rsh: Transport, source: Path, tmp_path: Path, direction: str) -> None:
    way = ["-e", rsh(f"ulimit -n 10; {SHELL}"), "--python", PYTHON]
    ends = [f"host:{source}", tmp_path / "copy"] if direction == "pull" else [source, f"host:{tmp_path}/copy"]
    done = run("sync", *way, *ends)
    assert b"only 10 files may be open at once" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_full_disk_there(rsh: Transport, source: Path, tmp_path: Path) -> None:
    done = run("sync", "-e", rsh(f"ulimit -f 100; {SHELL}"), "--python", PYTHON, source, f"host:{tmp_path}/copy")
    failed(done, 1, b"ERROR (sync): host: cannot ")
    assert b"File too large" in done.stderr


def test_no_such_device(rsh: Transport, tmp_path: Path) -> None:
    done = sync("/dev/no-such", tmp_path / "copy", "-e", rsh(SHELL), "--python", PYTHON)
    refused(done, "cannot open /dev/no-such: No such file or directory", "the path is one on host")


@pytest.mark.skipif(os.geteuid() != 0, reason="root is who can be somebody else")
@pytest.mark.skipif(not os.path.exists("/usr/bin/python3"), reason="others need a python3 that they can run")
def test_no_permission(rsh: Transport, source: Path, tmp_path: Path) -> None:
    source.chmod(0o600)
    python = "setpriv --reuid 65534 --clear-groups /usr/bin/python3"
    done = sync(source, tmp_path / "copy", "-e", rsh(SHELL), "--python", python)
    refused(done, "Permission denied", f"--python 'sudo -n {python}'")


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("ssh: Could not resolve hostname host: Name or service not known", "host is not known here"),
        ("Host key verification failed.", "log in once by hand"),
        ("Host key for host has changed and you have requested strict checking.", "fingerprint: compare it"),
        ("me@host: Permission denied (publickey,password).", "does not let this user in"),
        ("ssh: connect to host host port 22: Connection refused", "is it up, and does sshd listen there?"),
        ("ssh: connect to host host port 22: No route to host", "cannot be reached"),
        ("sudo: a password is required", "NOPASSWD"),
        ("sudo: sorry, you must have a tty to run sudo", "requiretty"),
        ("sudo: interactive authentication is required", "NOPASSWD"),
        ("doas: a tty is required", "NOPASSWD"),
        ("sudo: unheard-of words", "try it by hand: "),
        ("WARNING: Your password has expired.", "log in once by hand"),
        ("", "failed without a word"),
        ("sudo: a terminal is required to read the password; either use …", "NOPASSWD"),
        ("me is not in the sudoers file.", "see its sudoers"),
    ],
)
def test_what_ssh_and_sudo_say(rsh: Transport, source: Path, tmp_path: Path, said: str, advice: str) -> None:
    done = sync(source, tmp_path / "copy", "-e", rsh(f"echo '{said}' >&2; exit 255"))
    refused(done, said, advice)


@pytest.mark.parametrize("script", ["kill -BUS $$", "exit 135"])
def test_a_source_that_is_cut_off_while_it_is_looked_at(
    rsh: Transport, source: Path, tmp_path: Path, script: str
) -> None:
    done = sync(source, tmp_path / "copy", "-e", rsh(script))
    refused(done, "made shorter, or its disk failed", "the kernel's log on host")


def test_what_the_host_says_is_shown_with_its_name(rsh: Transport, source: Path, tmp_path: Path) -> None:
    """The words are not lost once the stage works."""
    script = "shift; sh -c \"$*\"; echo 'the disk is on fire' >&2"
    done = sync(source, tmp_path / "copy", "-e", rsh(script), "--python", PYTHON)
    succeeded(done, f"host:{source}: the disk is on fire")


# Through a real ssh


def logins(sshd: Sshd) -> int:
    return sshd.log.read_text().count("Accepted publickey")


def test_connections_share_a_login(sshd: Sshd, mount: Callable[..., Mount], source: Path, tmp_path: Path) -> None:
    before = logins(sshd)
    mount(f"{sshd.host}:{source}", tmp_path / "one", "-e", sshd.rsh, "--python", sys.executable, wait=True)
    assert logins(sshd) == before + 1
    way = ["-e", sshd.rsh, "--python", sys.executable, "--no-control-master"]
    mount(f"{sshd.host}:{source}", tmp_path / "two", *way, wait=True)
    until(lambda: logins(sshd) == before + 3, "two logins more")


def test_a_shared_login_ends_with_us(sshd: Sshd, source: Path, tmp_path: Path) -> None:
    done = run("sync", "-e", sshd.rsh, "--python", PYTHON, f"{sshd.host}:{source}", tmp_path / "copy")
    succeeded(done)
    assert (tmp_path / "copy").read_bytes() == DATA
    listed = subprocess.run(
        ["pgrep", "-f", f"ssh.*-p {sshd.port}.*ControlMaster"], capture_output=True, check=False
    )
    assert listed.stdout == b""


def test_a_key_that_is_not_known_there(sshd: Sshd, source: Path, tmp_path: Path) -> None:
    rsh = f"ssh -F none -p {sshd.port} -i /nonexistent -o IdentitiesOnly=yes -o BatchMode=yes "
    rsh += f"-o UserKnownHostsFile={tmp_path}/known -o StrictHostKeyChecking=accept-new -o LogLevel=ERROR"
    done = run("sync", "-e", rsh, f"{sshd.host}:{source}", tmp_path / "copy")
    refused(done, "Permission denied (publickey", "does not let this user in", f"ssh -F none -p {sshd.port}")


def test_a_host_key_that_is_not_known(sshd: Sshd, source: Path, tmp_path: Path) -> None:
    rsh = f"ssh -F none -p {sshd.port} -o BatchMode=yes -o StrictHostKeyChecking=yes "
    rsh += f"-o UserKnownHostsFile={tmp_path}/known"
    done = run("sync", "-e", rsh, f"{sshd.host}:{source}", tmp_path / "copy")
    refused(done, "Host key verification failed", "log in once by hand")


def test_a_host_key_that_has_changed(sshd: Sshd, source: Path, tmp_path: Path) -> None:
    """The last words of ssh are those for a host that is not known."""
    output("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other"))
    key = " ".join((tmp_path / "other.pub").read_text().split()[:2])
    written(tmp_path / "known", f"[{sshd.host}]:{sshd.port} {key}\n".encode())
    rsh = f"ssh -F none -p {sshd.port} -o BatchMode=yes -o UserKnownHostsFile={tmp_path}/known"
    done = run("sync", "-e", rsh, f"{sshd.host}:{source}", tmp_path / "copy")
    refused(done, "Host key verification failed", "has another key than at the last login", "ssh-keygen -lf")


def test_a_port_where_nobody_listens(source: Path, tmp_path: Path) -> None:
    done = run("sync", "-e", "ssh -F none -p 1 -o BatchMode=yes", f"127.0.0.1:{source}", tmp_path / "copy")
    refused(done, "Connection refused", "127.0.0.1 cannot be reached")


def test_a_mount_outlives_the_terminal_it_was_started_at(sshd: Sshd, source: Path, tmp_path: Path) -> None:
    """Where ssh could have asked for a password: nothing that goes through the login is hung up on."""
    point = tmp_path / "mnt"
    point.mkdir()
    way = ["-e", sshd.rsh, "--python", sys.executable, "--no-background", f"{sshd.host}:{source}"]
    child, terminal = pty.fork()
    if not child:
        os.execv(PYTHON, [*BLOCKCOPY, "mount", *way, str(tmp_path / "copy"), str(point)])
    said = b""
    with contextlib.suppress(OSError):  # EIO: nobody has it open any more
        while data := os.read(terminal, 1000):
            said += data
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, said
    try:
        assert (point / "copy").read_bytes() == DATA
        link = json.loads((point / "status.json").read_bytes())["link"]
        assert (link["reconnects"], link["last_error"]) == (0, None)
    finally:
        assert run("umount", point).returncode in (0, 75)
