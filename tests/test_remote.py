from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import BLOCKCOPY

from blockcopy.errors import UsageError
from blockcopy.remote import Source, parse_source, retrieve_command
from blockcopy.wire import Data, Done, Rest, encode

REMOTE = Source("host", "/dev/sda")

SHELL = """#!/bin/sh
# What ssh does with its arguments, on this host: joined with spaces, for a shell.
host=$1
shift
exec sh -c "$*"
"""


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("host:/dev/sda", Source("host", "/dev/sda")),
        ("user@host:/dev/sda", Source("user@host", "/dev/sda")),
        ("host:relative/path", Source("host", "relative/path")),
        ("host:/a:b", Source("host", "/a:b")),
        ("host:a b", Source("host", "a b")),
        ("host.example:/-x", Source("host.example", "/-x")),
        ("[::1]:/dev/sda", Source("::1", "/dev/sda")),
        ("[fe80::1%eth0]:/a:b", Source("fe80::1%eth0", "/a:b")),
        ("user@[::1]:/dev/sda", Source("user@::1", "/dev/sda")),
        ("/dev/sda", Source(None, "/dev/sda")),
        ("/dev/disk/by-path/pci-0000:00:1f.2", Source(None, "/dev/disk/by-path/pci-0000:00:1f.2")),
        ("disks/a:b", Source(None, "disks/a:b")),
        ("./a:b", Source(None, "./a:b")),
        ("plain", Source(None, "plain")),
        ("-x", Source(None, "-x")),
        ("[a]", Source(None, "[a]")),
    ],
)
def test_a_source_is_read_as_rsync_reads_it(text: str, source: Source) -> None:
    assert parse_source(text) == source


@pytest.mark.parametrize(
    "text", ["", ":", ":/path", "host:", "[::1]:", "[]:/path", "-oProxyCommand=x:/path", "[-x]:/path", "-:/path"]
)
def test_what_is_no_source_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="SOURCE"):
        parse_source(text)


@pytest.mark.parametrize(
    ("source", "text"), [(REMOTE, "host:/dev/sda"), (Source(None, "/a"), "/a"), (Source("u@h", "p"), "u@h:p")]
)
def test_a_source_is_shown_as_it_was_given(source: Source, text: str) -> None:
    assert str(source) == text


@pytest.mark.parametrize(
    ("rsh", "start"),
    [
        ("ssh", ["ssh", "--", "host"]),
        ("ssh -p 2222 -o 'User=some one'", ["ssh", "-p", "2222", "-o", "User=some one", "--", "host"]),
        ("/usr/bin/ssh -4", ["/usr/bin/ssh", "-4", "--", "host"]),
        ("docker exec -i", ["docker", "exec", "-i", "host"]),
        ("rsh", ["rsh", "host"]),
    ],
)
def test_how_a_host_is_reached(rsh: str, start: list[str]) -> None:
    command = retrieve_command(REMOTE, rsh)
    assert command.argv == [*start, "blockcopy", "retrieve", "/dev/sda"]
    assert command.environment == {}
    assert command.source == REMOTE


def test_ssh_is_the_default_and_notices_a_dead_peer() -> None:
    argv = retrieve_command(REMOTE).argv
    assert argv[0] == "ssh"
    assert "ServerAliveInterval=10" in argv
    assert argv[argv.index("--") :] == retrieve_command(REMOTE, "ssh").argv[1:]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (None, ["blockcopy"]),
        ("sudo blockcopy", ["sudo", "blockcopy"]),
        ("~/bin/blockcopy", ["~/bin/blockcopy"]),
        ("python3 $HOME/blockcopy.py", ["python3", "$HOME/blockcopy.py"]),
    ],
)
def test_the_remote_program_is_left_to_the_remote_shell(program: str | None, words: list[str]) -> None:
    assert retrieve_command(REMOTE, "ssh", program).argv == ["ssh", "--", "host", *words, "retrieve", "/dev/sda"]


@pytest.mark.parametrize("rsh", ["", "  ", "ssh 'x"])
def test_an_rsh_that_is_no_command_is_refused(rsh: str) -> None:
    with pytest.raises(UsageError):
        retrieve_command(REMOTE, rsh)


@pytest.mark.parametrize("program", ["", " ", "blockcopy 'x"])
def test_a_program_that_is_no_command_is_refused(program: str) -> None:
    with pytest.raises(UsageError):
        retrieve_command(Source(None, "/a"), program=program)


@pytest.mark.parametrize("path", ["-x", "--help"])
def test_a_remote_path_is_no_option(path: str) -> None:
    assert retrieve_command(Source("host", path)).argv[-2:] == ["retrieve", f"./{path}"]


def test_a_local_program_gets_the_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = retrieve_command(Source(None, "-a b"), program="sudo 'my blockcopy'")
    assert command.argv == ["sudo", "my blockcopy", "retrieve", f"{tmp_path}/-a b"]
    assert command.environment == {}


def test_a_local_source_runs_this_very_package() -> None:
    command = retrieve_command(Source(None, "/a"))
    assert command.argv[0] == sys.executable
    assert command.argv[-3:] == ["blockcopy", "retrieve", "/a"]


def answer(argv: list[str], environment: dict[str, str], folder: Path) -> bytes:
    """To a question for everything, asked from within `folder`."""
    done = subprocess.run(
        argv,
        input=encode(Rest(0)) + encode(Done()),
        capture_output=True,
        check=False,
        cwd=folder,
        env={**os.environ, **environment},
    )
    assert (done.returncode, done.stderr) == (0, b"")
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
    remote = retrieve_command(Source("host", name), f"{tmp_path}/rsh", program)
    absolute = Source(None, str(tmp_path / name))
    for command in (remote, retrieve_command(absolute, program=program), retrieve_command(absolute)):
        stream = answer(command.argv, command.environment, tmp_path)
        assert stream == encode(Data(0, b"this one")) + encode(Done())


def test_nothing_in_the_working_folder_is_taken_for_the_package(tmp_path: Path) -> None:
    (tmp_path / "blockcopy.py").write_text("raise SystemExit('the wrong one')\n")
    (tmp_path / "file").write_bytes(b"abc")
    command = retrieve_command(Source(None, str(tmp_path / "file")))
    assert answer(command.argv, command.environment, tmp_path) == encode(Data(0, b"abc")) + encode(Done())
