from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import BLOCKCOPY, PYTHON, succeeded

from blockcopy.errors import UsageError
from blockcopy.protocol.wire import Data, Done, Rest, encode
from blockcopy.transport.command import Command, stage_command
from blockcopy.transport.location import Location, parse_location
from blockcopy.transport.payload import CODE

REMOTE = Location("host", "/dev/sda")

SHELL = """#!/bin/sh
# What ssh does with its arguments, on this host: joined with spaces, for a shell.
host=$1
shift
exec sh -c "$*"
"""


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("host:/dev/sda", Location("host", "/dev/sda")),
        ("user@host:/dev/sda", Location("user@host", "/dev/sda")),
        ("host:relative/path", Location("host", "relative/path")),
        ("host:/a:b", Location("host", "/a:b")),
        ("host:a b", Location("host", "a b")),
        ("host.example:/-x", Location("host.example", "/-x")),
        ("[::1]:/dev/sda", Location("::1", "/dev/sda")),
        ("[fe80::1%eth0]:/a:b", Location("fe80::1%eth0", "/a:b")),
        ("user@[::1]:/dev/sda", Location("user@::1", "/dev/sda")),
        ("/dev/sda", Location(None, "/dev/sda")),
        ("/dev/disk/by-path/pci-0000:00:1f.2", Location(None, "/dev/disk/by-path/pci-0000:00:1f.2")),
        ("disks/a:b", Location(None, "disks/a:b")),
        ("./a:b", Location(None, "./a:b")),
        ("plain", Location(None, "plain")),
        ("-x", Location(None, "-x")),
        ("[a]", Location(None, "[a]")),
        ("host:~/a b", Location("host", "~/a b")),
        ("ssh://host/dev/sda", Location("host", "/dev/sda")),
        ("ssh://user@host:2222/dev/sda", Location("user@host", "/dev/sda", 2222)),
        ("ssh://[fe80::1%eth0]:22/x", Location("fe80::1%eth0", "/x", 22)),
        ("ssh://user@[::1]/a%20b%25", Location("user@::1", "/a b%")),
        ("ssh://host/~/x", Location("host", "~/x")),
        ("ssh://host/~user/x", Location("host", "~user/x")),
        ("./sftp://x", Location(None, "./sftp://x")),
        ("./C:\\x", Location(None, "./C:\\x")),
    ],
)
def test_a_source_is_read_as_rsync_reads_it(text: str, source: Location) -> None:
    assert parse_location(text) == source


@pytest.mark.parametrize(
    "text", ["", ":", ":/path", "host:", "[::1]:", "[]:/path", "-oProxyCommand=x:/path", "[-x]:/path", "-:/path"]
)
def test_what_is_no_source_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="SOURCE"):
        parse_location(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sftp://host/x", "write [user@]host:/path"),
        ("rsync://host/module/x", "rsync is not supported"),
        ("nbd://host/x", "nbd is not supported"),
        ("file:///x", "without file://"),
        ("host::module", "write host:/path"),
        ("fe80::1:/x", "as in [fe80::1]:/path"),
        ("C:\\disk.img", "./C:\\disk.img"),
        ("ssh://", "is not ssh://[user@]host[:port]/path"),
        ("ssh://host:/x", "is not ssh://"),
        ("ssh://host:99999/x", "is not ssh://"),
        ("ssh://user:password@host/x", "is not ssh://"),
        ("ssh://::1/x", "is not ssh://"),
        ("ssh://host", "has no path"),
        ("ssh://-oProxyCommand=x/x", "a host cannot begin with"),
        ("user@:/x", "has no"),
        ("host:/a\0b", "NUL"),
    ],
)
def test_what_others_write_is_refused_in_a_line_that_says_what_to_write(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)) as refused:
        parse_location(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("[::1]", "[::1]"), ("user@[::1]:", "user@[::1]"), ("host", "host"), ("ssh://u@h:22", "u@h")],
)
def test_a_host_alone(text: str, shown: str) -> None:
    location = parse_location(text, "HOST", needs_path=False)
    assert (location.host_shown, location.path, str(location)) == (shown, "", text)


@pytest.mark.parametrize(
    "text", ["[::1]:/x", "user@[fe80::1%eth0]:/x", "ssh://[::1]:22/x", "host:~/x", "host:x", "a:b"]
)
def test_a_source_is_shown_as_it_was_typed(text: str) -> None:
    assert str(parse_location(text)) == text


def test_a_port_is_for_ssh() -> None:
    location = parse_location("ssh://host:2222/x")
    assert stage_command(location, "ssh -4").route.by_hand == ["ssh", "-p", "2222", "-4", "host"]
    with pytest.raises(UsageError, match="a port is for ssh only"):
        stage_command(location, "rsh")


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("~/a", "~/a"),
        ("~", "~"),
        ("~/", "~"),
        ("~user/a b", "~user/'a b'"),
        ("~/$(id)", "~/'$(id)'"),
        ("~$(id)/a", "'~$(id)/a'"),
        ("~;id/a", "'~;id/a'"),
        ("~-/a", "'~-/a'"),
        ("./~/a", "'./~/a'"),
    ],
)
def test_a_home_is_left_to_the_remote_shell_and_nothing_else_is(path: str, word: str) -> None:
    assert stage_command(Location("host", path), "rsh", "blockcopy").argv[-1] == word


@pytest.mark.parametrize("script", [SHELL, '#!/bin/sh\nshift\nexec "$@"\n'], ids=["shell", "no shell"])
@pytest.mark.parametrize("path", ["~/it's $HOME", "~root/../{folder}/it's $HOME"])
def test_a_home_is_found_at_the_far_end(tmp_path: Path, script: str, path: str) -> None:
    written = tmp_path / "it's $HOME"
    written.write_bytes(b"this one")
    (tmp_path / "rsh").write_text(script.replace("shift", f"shift; export HOME={tmp_path}"))
    (tmp_path / "rsh").chmod(0o755)
    far = "../" * 8 + str(tmp_path)[1:]
    location = parse_location("host:" + path.replace("../{folder}", far))
    for program in (None, " ".join(BLOCKCOPY)) if script == SHELL else (None,):
        command = stage_command(location, f"{tmp_path}/rsh", program, python=PYTHON)
        stream = answer(command, tmp_path)
        assert stream.endswith(encode(Data(0, b"this one")) + encode(Done()))


@pytest.mark.parametrize(
    ("source", "text"), [(REMOTE, "host:/dev/sda"), (Location(None, "/a"), "/a"), (Location("u@h", "p"), "u@h:p")]
)
def test_a_source_is_shown_as_it_was_given(source: Location, text: str) -> None:
    assert str(source) == text


PLAIN = [
    *("-o", "IgnoreUnknown=*"),
    *("-o", "RemoteCommand=none", "-o", "RequestTTY=no", "-o", "SessionType=default", "-o", "StdinNull=no"),
    *("-o", "ForkAfterAuthentication=no", "-o", "PermitLocalCommand=no"),
    *("-o", "ForwardAgent=no", "-o", "ForwardX11=no"),
]

NO_FORWARDING = ["-o", "ClearAllForwardings=yes"]

KEEP_ALIVE = ["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"]


@pytest.mark.parametrize(
    ("rsh", "start"),
    [
        ("ssh", ["ssh", *PLAIN, *NO_FORWARDING, *KEEP_ALIVE, "--", "host"]),
        (
            "ssh -p 2222 -l me -o 'User=some one'",
            [
                "ssh",
                "-p",
                "2222",
                "-l",
                "me",
                "-o",
                "User=some one",
                *PLAIN,
                *NO_FORWARDING,
                *KEEP_ALIVE,
                "--",
                "host",
            ],
        ),
        ("ssh -L 1:h:2", ["ssh", "-L", "1:h:2", *PLAIN, *KEEP_ALIVE, "--", "host"]),
        ("ssh -oTunnel=yes", ["ssh", "-oTunnel=yes", *PLAIN, *KEEP_ALIVE, "--", "host"]),
        ("/usr/bin/ssh -4", ["/usr/bin/ssh", "-4", *PLAIN, *NO_FORWARDING, *KEEP_ALIVE, "--", "host"]),
        (
            "sshpass -e ssh -p 2",
            ["sshpass", "-e", "ssh", "-p", "2", *PLAIN, *NO_FORWARDING, *KEEP_ALIVE, "--", "host"],
        ),
        ("docker exec -i", ["docker", "exec", "-i", "host"]),
        ("rsh", ["rsh", "host"]),
    ],
)
def test_how_a_host_is_reached(rsh: str, start: list[str]) -> None:
    command = stage_command(REMOTE, rsh, "blockcopy")
    assert command.argv == [*start, "blockcopy", "retrieve", "/dev/sda"]
    assert (command.environment, command.opening, command.mark) == ({}, b"", b"")
    assert command.location == REMOTE


def test_ssh_is_the_default() -> None:
    assert stage_command(REMOTE).argv == stage_command(REMOTE, "ssh").argv


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("sudo blockcopy", ["sudo", "blockcopy"]),
        ("~/bin/blockcopy", ["~/bin/blockcopy"]),
        ("python3 $HOME/blockcopy.py", ["python3", "$HOME/blockcopy.py"]),
    ],
)
def test_the_remote_program_is_left_to_the_remote_shell(program: str, words: list[str]) -> None:
    assert stage_command(REMOTE, "rsh", program).argv == ["rsh", "host", *words, "retrieve", "/dev/sda"]


def test_without_a_program_python_is_run_and_told_what_to_be() -> None:
    command = stage_command(REMOTE, "rsh", python="sudo -n python3")
    assert command.argv == ["rsh", "host", "sudo", "-n", "python3", "-c", CODE, "blockcopy", "retrieve", "/dev/sda"]
    assert command.opening.startswith(b"exec(")
    assert command.mark


def test_a_shared_login_has_a_place_a_beginning_and_an_end() -> None:
    route = stage_command(REMOTE, "ssh -4", control="/run/x-%C").route
    options = [*PLAIN, *NO_FORWARDING, *KEEP_ALIVE, "-o", "ControlPath=/run/x-%C"]
    options += ["-o", "ControlMaster=auto", "-o", "ControlPersist=10"]
    assert route.argv == ["ssh", "-4", *options, "--", "host"]
    assert route.by_hand == ["ssh", "-4", "host"]
    assert route.login == ["ssh", "-4", "-fN", *options, "--", "host"]
    assert route.logout == ["ssh", "-4", *options, "-O", "exit", "--", "host"]


@pytest.mark.parametrize(
    ("rsh", "control"),
    [
        ("rsh", "/run/x"),
        ("ssh", "none"),
        ("ssh", None),
        ("ssh -S ~/mine", "/run/x"),
        ("sudo -u me ssh", "/run/x"),
        ("ssh -o ControlPath=~/mine", "/run/x"),
    ],
)
def test_a_login_that_is_not_shared_or_not_ours_has_no_end(rsh: str, control: str | None) -> None:
    route = stage_command(REMOTE, rsh, control=control).route
    assert (route.login, route.logout) == ((), ())
    assert not any("ControlMaster" in word for word in route.argv)
    assert ("ControlPath=none" in route.argv) == (control == "none")
    assert "ControlPath=/run/x" not in route.argv


@pytest.mark.parametrize("rsh", ["", "  ", "ssh 'x"])
def test_an_rsh_that_is_no_command_is_refused(rsh: str) -> None:
    with pytest.raises(UsageError):
        stage_command(REMOTE, rsh)


@pytest.mark.parametrize("program", ["", " ", "blockcopy 'x"])
def test_a_program_that_is_no_command_is_refused(program: str) -> None:
    with pytest.raises(UsageError):
        stage_command(Location(None, "/a"), program=program)


@pytest.mark.parametrize("path", ["-x", "--help"])
def test_a_remote_path_is_no_option(path: str) -> None:
    assert stage_command(Location("host", path), "rsh", "blockcopy").argv[-2:] == ["retrieve", f"./{path}"]


def test_a_local_program_gets_the_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = stage_command(Location(None, "-a b"), program="sudo 'my blockcopy'")
    assert command.argv == ["sudo", "my blockcopy", "retrieve", f"{tmp_path}/-a b"]
    assert command.environment == {}


def test_a_local_source_runs_this_very_package() -> None:
    command = stage_command(Location(None, "/a"))
    assert command.argv[0] == sys.executable
    assert command.argv[-3:] == ["blockcopy", "retrieve", "/a"]


def answer(command: Command, folder: Path) -> bytes:
    """To a question for everything, asked from within `folder`."""
    done = subprocess.run(
        command.argv,
        input=command.opening + encode(Rest(0)) + encode(Done()),
        capture_output=True,
        check=False,
        cwd=folder,
        env={**os.environ, **command.environment},
    )
    succeeded(done)
    return done.stdout


ODD_PATHS = [
    "plain",
    "a b",
    "it's",
    'quo"ted',
    "$HOME",
    "`id`",
    "back\\slash",
    "new\nline",
    "-v",
    "a;b&c|d",
    "*",
    "ä",
]


@pytest.mark.parametrize("name", ODD_PATHS)
def test_odd_paths_arrive_as_they_are(tmp_path: Path, name: str) -> None:
    """At a remote shell, at a local program, and at our own `retrieve`."""
    (tmp_path / name).write_bytes(b"this one")
    (tmp_path / "rsh").write_text(SHELL)
    (tmp_path / "rsh").chmod(0o755)
    program = " ".join(BLOCKCOPY)
    remote = stage_command(Location("host", name), f"{tmp_path}/rsh", program)
    absolute = Location(None, str(tmp_path / name))
    for command in (remote, stage_command(absolute, program=program), stage_command(absolute)):
        stream = answer(command, tmp_path)
        assert stream == encode(Data(0, b"this one")) + encode(Done())


def test_nothing_in_the_working_folder_is_taken_for_the_package(tmp_path: Path) -> None:
    (tmp_path / "blockcopy.py").write_text("raise SystemExit('the wrong one')\n")
    (tmp_path / "file").write_bytes(b"abc")
    command = stage_command(Location(None, str(tmp_path / "file")))
    assert answer(command, tmp_path) == encode(Data(0, b"abc")) + encode(Done())
