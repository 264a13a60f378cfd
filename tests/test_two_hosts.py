"""Through ssh, to a real sshd on loopback: mount and sync, names, refusals, a connection that breaks."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import support
from support import (
    BLOCK_SIZE,
    BLOCKCOPY,
    PYTHON,
    STANDINS,
    Mount,
    Sshd,
    failed,
    noise,
    output,
    run,
    succeeded,
    until,
    with_changes,
    written,
)

import blockcopy
from blockcopy.transport.command import stage_command
from blockcopy.transport.control_master import control_path, log_in, logging_out
from blockcopy.transport.location import parse_location

Mounter = Callable[..., Mount]
LoopDevice = Callable[..., str]

SIZE = 24 * BLOCK_SIZE + 1000
DATA = noise(SIZE)
ROOT = Path(blockcopy.__file__).resolve().parent.parent

OURS = f"env PYTHONPATH={shlex.quote(str(ROOT))} {shlex.join(BLOCKCOPY)}"
"""--blockcopy-path: this checkout's program, by this interpreter."""
QUEUEING = shlex.join([PYTHON, str(STANDINS / "queueing_retrieve")])

ODD_NAMES = ['it\'s "two words" $HOME `id` $(id) \\ ; & | * ? ~ ümlaut: 100 %', "new\nline"]


def processes_of(source: Path) -> list[int]:
    """Return the processes with the path of `source` among their arguments. Both hosts are this one."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        pid = int(entry.parent.name)
        try:
            mentioned = os.fsencode(source) in entry.read_bytes()
        except OSError:
            continue
        if mentioned and support.alive(pid):
            found.append(pid)
    return found


def refused(sshd: Sshd, rsh: str, source: object, destination: Path, *, told: str, program: str = OURS) -> None:
    """`sync` fails for a fault of the source, with a reason on its last line, and writes nothing."""
    done = run("sync", "-e", rsh, "--blockcopy-path", program, f"{sshd.host}:{source}", destination)
    failed(done, 3, stdout=b"")
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith("ERROR (sync): ")
    assert re.search(told, last)
    assert "Traceback" not in done.stderr.decode()
    assert not destination.exists()


# What works


@pytest.mark.parametrize("program", [OURS, QUEUEING], ids=["ours", "queueing"])
def test_a_mount_from_first_read_to_umount(
    mount: Mounter, sshd: Sshd, source: Path, destination: Path, program: str
) -> None:
    written(destination, with_changes(DATA, [3, 17]))
    mounted = mount(f"{sshd.user}@{sshd.host}:{source}", destination, "-e", sshd.rsh, program=program)
    with mounted.file.open("rb") as file:
        assert os.pread(file.fileno(), 4096, 17 * BLOCK_SIZE) == DATA[17 * BLOCK_SIZE :][:4096]
    mounted.wait()
    status = mounted.status()
    assert status["source"] == f"{sshd.user}@{sshd.host}:{source}"
    assert status["fetched_bytes"] == 2 * BLOCK_SIZE
    assert mounted.retrievers() == []
    until(lambda: not [pid for pid in processes_of(source) if pid != status["pid"]], "the end at the source")
    mounted.umount()
    assert destination.read_bytes() == DATA


def test_a_read_before_the_copy_is_complete(mount: Mounter, sshd: Sshd, source: Path, destination: Path) -> None:
    mounted = mount(f"{sshd.host}:{source}", destination, "-e", sshd.rsh, "--no-background", program=OURS)
    with mounted.file.open("rb") as file:
        assert os.pread(file.fileno(), 10, SIZE - 10) == DATA[-10:]
    status = mounted.status()
    assert 0 < status["hydrated_bytes"] < SIZE
    mounted.umount()
    until(lambda: not processes_of(source), "the end at the source")


def test_a_sync(sshd: Sshd, source: Path, destination: Path) -> None:
    done = run("sync", "-e", sshd.rsh, "--blockcopy-path", OURS, f"{sshd.host}:{source}", destination)
    succeeded(done, stdout=b"")
    assert destination.read_bytes() == DATA
    until(lambda: not processes_of(source), "the end at the source")


def test_a_url_names_the_port_and_a_home(sshd: Sshd, source: Path, destination: Path) -> None:
    rsh = sshd.rsh.replace(f"-p {sshd.port} ", "")
    for path in (source, f"/~/{os.path.relpath(source, sshd.home)}"):
        url = f"ssh://{sshd.user}@{sshd.host}:{sshd.port}{path}"
        done = run("sync", "--no-state", "-e", rsh, "--python", PYTHON, url, destination)
        succeeded(done, stdout=b"")
        assert destination.read_bytes() == DATA
        destination.unlink()
    done = run("doctor", "-e", rsh, "--python", PYTHON, f"ssh://{sshd.host}:{sshd.port}")
    assert done.returncode == 0, done.stdout


def test_a_sync_from_the_original(sshd: Sshd, source: Path, destination: Path, original: list[str]) -> None:
    program = shlex.join(original)
    done = run("sync", "-e", sshd.rsh, "--blockcopy-path", program, f"{sshd.host}:{source}", destination)
    assert done.returncode == 0, done.stderr
    assert destination.read_bytes() == DATA


def test_a_device_at_the_source(sshd: Sshd, loop_device: LoopDevice, source: Path, destination: Path) -> None:
    os.truncate(source, 24 * BLOCK_SIZE)
    device = loop_device(source, "--read-only")
    done = run("sync", "-e", sshd.rsh, "--blockcopy-path", OURS, f"{sshd.host}:{device}", destination)
    assert done.returncode == 0, done.stderr
    assert destination.read_bytes() == DATA[: 24 * BLOCK_SIZE]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_at_the_source(sshd: Sshd, tmp_path: Path, destination: Path, name: str) -> None:
    odd = written(tmp_path / name, b"Hello World!")
    done = run("sync", "-e", sshd.rsh, "--blockcopy-path", OURS, f"{sshd.host}:{odd}", destination)
    assert done.returncode == 0, done.stderr
    assert destination.read_bytes() == b"Hello World!"


def test_the_remote_shell_expands_the_program(sshd: Sshd, source: Path, destination: Path, tmp_path: Path) -> None:
    """As rsync leaves --rsync-path to it: variables and `~` are those of the source's host."""
    script = written(tmp_path / "it", f'#!/bin/sh\nexec {OURS} "$@"\n'.encode())
    script.chmod(0o755)
    program = f"X={tmp_path} && cd / && $X/it"
    done = run("sync", "-e", sshd.rsh, "--blockcopy-path", program, f"{sshd.host}:{source}", destination)
    assert done.returncode == 0, done.stderr
    assert destination.read_bytes() == DATA


# Whatever ssh_config(5) says

SETTINGS = [
    "RemoteCommand echo hello",
    "RequestTTY force",
    "SessionType none",
    "SessionType subsystem",
    "StdinNull yes",
    "ForkAfterAuthentication yes",
    "PermitLocalCommand yes\nLocalCommand echo local; cat",
    "ExitOnForwardFailure yes\nLocalForward 127.0.0.1:{port} 127.0.0.1:9",
    "ExitOnForwardFailure yes\nRemoteForward 127.0.0.1:{port} 127.0.0.1:9",
    "ExitOnForwardFailure yes\nTunnel yes\nTunnelDevice 70000:any",
    "ControlMaster yes\nControlPath {folder}/none/%C\nControlPersist yes",
    "IgnoreUnknown UseKeychain\nUseKeychain yes",
]


def configured(sshd: Sshd, folder: Path, *settings: str) -> str:
    """Return an `-e` whose ssh reads `settings` from its file. The port of forwardings is in use."""
    text = "\n".join(settings).format(port=sshd.port, folder=folder)
    config = written(folder / "ssh_config", f"Host *\n{text}\n".encode())
    return sshd.rsh.replace("-F none", f"-F {config}")


@pytest.mark.parametrize("first", range(4))
def test_no_setting_of_ssh_changes_what_a_connection_is(
    sshd: Sshd, source: Path, destination: Path, tmp_path: Path, first: int
) -> None:
    """Use three settings at once, of different kinds: neighbours in the list can hide each other."""
    rsh = configured(sshd, tmp_path, *SETTINGS[first::4])
    done = run("sync", "-e", rsh, "--python", PYTHON, f"{sshd.host}:{source}", destination)
    succeeded(done, stdout=b"")
    assert destination.read_bytes() == DATA


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("--no-control-master",)], ids=["shared", "not shared"])
def test_nor_do_all_of_them_with_any_command(
    sshd: Sshd, mount: Mounter, source: Path, destination: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Without a shared login all commands connect alike: a push and a mount stand for both directions."""
    together = [each for each in SETTINGS if each != "SessionType subsystem"]  # one of a kind
    way = ["-e", configured(sshd, tmp_path, *together), "--python", PYTHON, *options]
    commands = [
        ["sync", *way, source, f"{sshd.host}:{destination}"],
        ["verify", *way, source, f"{sshd.host}:{destination}"],
        ["verify", *way, f"{sshd.host}:{source}", destination],
        ["doctor", *way, f"{sshd.host}:{source}"],
    ]
    for arguments in commands[:1] if options else commands:
        done = run(*arguments)
        succeeded(done)
    mounted = mount(f"{sshd.host}:{source}", tmp_path / "copy", *way, wait=True)
    assert mounted.file.read_bytes() == DATA


def test_a_shared_login_is_made_whatever_the_settings(sshd: Sshd, source: Path, tmp_path: Path) -> None:
    """As a mount makes it at a terminal."""
    rsh = configured(sshd, tmp_path, *(each for each in SETTINGS if each != "SessionType subsystem"))
    command = stage_command(parse_location(f"{sshd.host}:{source}"), rsh, control=control_path(shared=True))
    with logging_out(command):
        log_in(command)
        assert output(*command.route.argv, "echo", "through", "it") == "through it\n"


def test_what_e_says_wins(sshd: Sshd, source: Path, destination: Path) -> None:
    done = run("sync", "-e", f"{sshd.rsh} -o RemoteCommand=true", f"{sshd.host}:{source}", destination)
    failed(done, 3, b"Cannot execute command-line and remote command")


# What is refused


def test_a_port_where_nobody_listens_is_told(sshd: Sshd, source: Path, destination: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else can
        taken.bind((sshd.host, 0))
        rsh = sshd.rsh.replace(f"-p {sshd.port}", f"-p {taken.getsockname()[1]}")
        refused(sshd, rsh, source, destination, told="ssh to 127.0.0.1 failed: connect to .*Connection refused")


def test_a_refused_key_is_told(sshd: Sshd, source: Path, destination: Path, tmp_path: Path) -> None:
    output("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "stranger")
    rsh = re.sub(r"-i \S+", f"-i {tmp_path}/stranger -o IdentitiesOnly=yes -o IdentityAgent=none", sshd.rsh)
    refused(sshd, rsh, source, destination, told="ssh to 127.0.0.1 failed: .*Permission denied")


def test_a_program_that_is_not_there_is_told(sshd: Sshd, source: Path, destination: Path) -> None:
    refused(sshd, sshd.rsh, source, destination, told="exit status 127.*not found", program="no-such-program")


def test_a_missing_file_is_told_in_the_remotes_words(sshd: Sshd, tmp_path: Path, destination: Path) -> None:
    missing = tmp_path / "nowhere"
    refused(sshd, sshd.rsh, missing, destination, told=f"cannot open {missing}: No such file or directory")


def test_an_rsh_that_is_not_there_is_told(sshd: Sshd, source: Path, destination: Path) -> None:
    refused(sshd, "/no/such/ssh", source, destination, told="/no/such/ssh.*No such file")


def test_a_mount_that_is_refused_leaves_nothing(sshd: Sshd, tmp_path: Path, destination: Path) -> None:
    support.require_fuse()
    point = tmp_path / "mnt"
    point.mkdir()
    missing = f"{sshd.host}:{tmp_path}/nowhere"
    done = run("mount", "-e", sshd.rsh, "--blockcopy-path", OURS, missing, destination, point)
    failed(done, 3)
    assert "nowhere: No such file or directory" in done.stderr.decode().splitlines()[-1]
    assert str(point) not in support.fuse_mounts()
    assert not destination.exists()


# What breaks


def test_a_killed_ssh_is_started_again(mount: Mounter, sshd: Sshd, source: Path, destination: Path) -> None:
    written(destination, with_changes(DATA, [3, 17]))
    mounted = mount(f"{sshd.host}:{source}", destination, "-e", sshd.rsh, "--no-background", program=OURS)
    with mounted.file.open("rb") as file:
        fd = file.fileno()
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        assert os.pread(fd, 100, 3 * BLOCK_SIZE) == DATA[3 * BLOCK_SIZE :][:100]
        for pid in mounted.retrievers():
            os.kill(pid, signal.SIGKILL)
        assert os.pread(fd, 100, 3 * BLOCK_SIZE + 50_000) == DATA[3 * BLOCK_SIZE + 50_000 :][:100]
        assert os.pread(fd, 100, 17 * BLOCK_SIZE) == DATA[17 * BLOCK_SIZE :][:100]
    until(
        lambda: mounted.status()["link"]["state"] == "connected", "the new link"
    )  # the other lane may have served
    link = mounted.status()["link"]
    assert (link["reconnects"], "SIGKILL" in link["last_error"]) == (1, True)
    mounted.umount()
    until(lambda: not processes_of(source), "the end there")


def test_a_killed_remote_process_is_started_again(
    mount: Mounter, sshd: Sshd, source: Path, destination: Path
) -> None:
    mounted = mount(f"{sshd.host}:{source}", destination, "-e", sshd.rsh, "--no-background", program=OURS)
    ours = {mounted.status()["pid"], *mounted.retrievers()}
    for pid in set(processes_of(source)) - ours:
        os.kill(pid, signal.SIGKILL)
    assert mounted.file.read_bytes() == DATA
    mounted.wait()
    assert str(source) in mounted.status()["link"]["last_error"]
    assert mounted.status()["link"]["reconnects"] == 1
    assert mounted.status()["error"] is None
