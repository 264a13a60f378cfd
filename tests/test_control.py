"""Commands to a running mount: pause, resume, limit, prefetch, umount, and its control socket."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support
import trio
from support import BLOCK_SIZE, Mount, failed, noise, run, succeeded, until, with_changes

from blockcopy.paths import runtime_dir
from blockcopy_fuse.control_server import ControlServer

Mounter = Callable[..., Mount]

BLOCKS = 32
DATA = noise(BLOCKS * BLOCK_SIZE)
OLD = with_changes(DATA, list(range(BLOCKS)))
"""Differs from DATA in every block."""

SLOW = ("--limit", "64K")
"""The pass takes two seconds a block: within a test it is never complete by itself."""


def at(block: int) -> int:
    return block * BLOCK_SIZE


def test_sockets_of_killed_programs_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A young socket may be one on which nobody listens yet."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(runtime_dir, "runtime_dir_candidates", lambda _: [folder])
    with contextlib.ExitStack() as stack:
        for name in ("left", "young", "served"):
            made = stack.enter_context(socket.socket(socket.AF_UNIX))
            made.bind(str(folder / name))
            if name == "served":
                made.listen(0)
            if name != "young":
                os.utime(folder / name, (1, 1))
        (folder / "file").touch()
        full = stack.enter_context(socket.socket(socket.AF_UNIX))
        full.connect(str(folder / "served"))
        assert runtime_dir.make_runtime_dir() == folder
    assert {each.name for each in folder.iterdir()} == {"young", "served", "file"}


def obeyed(*command: object) -> None:
    done = run(*command)
    succeeded(done, stdout=b"")


def refused(*command: object, status: int, told: str) -> None:
    done = run(*command)
    failed(done, status, told)
    assert "Traceback" not in done.stderr.decode()


def brought(destination: Path) -> set[int]:
    """Return the blocks of the destination that are the source's. Each other block must be unchanged."""
    stored = destination.read_bytes()
    blocks = {
        block for block in range(BLOCKS) if stored[at(block) : at(block + 1)] == DATA[at(block) : at(block + 1)]
    }
    for block in set(range(BLOCKS)) - blocks:
        assert stored[at(block) : at(block + 1)] == OLD[at(block) : at(block + 1)]
    return blocks


def read(mounted: Mount, block: int) -> bytes:
    with mounted.file.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), 4096, at(block))


def is_right(mounted: Mount, block: int) -> bool:
    return read(mounted, block) == DATA[at(block) : at(block) + 4096]


def counts_after(mounted: Mount, *commands: str) -> tuple[int, int]:
    """Run `commands` on the mount, and return the hydrated and the sent bytes afterwards."""
    for command in commands:
        assert run(command, mounted.point).returncode == 0
    status = mounted.status()
    return status["hydrated_bytes"], status["sent_bytes"]


def paused(mount: Mounter, *arguments: object) -> Mount:
    """Mount with `arguments`, pause background hydration in the middle, and return the mount."""
    mounted = mount(*arguments, *SLOW)
    until(lambda: mounted.status()["hydrated_bytes"], "the first block")
    obeyed("pause", mounted.point)
    assert mounted.status()["state"] == "paused"
    return mounted


# pause, resume


def test_a_paused_pass_asks_nothing_and_reads_are_served(mount: Mounter, source: Path, destination: Path) -> None:
    """At a limit of 1M, a batch is asked each quarter of a second. A command takes about as long."""
    mounted = mount(source, destination, "--limit", "1M")
    until(lambda: mounted.status()["hydrated_bytes"], "the first batch")
    obeyed("pause", mounted.point)
    counts_after(mounted, "status", "status")  # what was under way has landed
    before = counts_after(mounted)
    assert counts_after(mounted, *["status"] * 5) == before
    status = mounted.status()
    assert (status["state"], status["source_needed"], status["eta_seconds"]) == ("paused", True, None)
    assert 0 < before[0] < len(DATA)
    last = [BLOCKS - 1, BLOCKS - 5]
    assert all(is_right(mounted, block) for block in last)
    assert counts_after(mounted)[0] > before[0]
    assert mounted.status()["state"] == "paused"


def test_a_resumed_pass_completes(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = paused(mount, source, destination)
    obeyed("pause", mounted.point)  # as often as you like
    obeyed("resume", mounted.point)
    assert mounted.status()["state"] == "hydrating"
    obeyed("resume", mounted.point)
    obeyed("limit", mounted.point, "none")
    mounted.wait()
    obeyed("umount", mounted.point)
    assert destination.read_bytes() == DATA


def test_what_is_here_when_it_is_paused_outlives_a_kill(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = paused(mount, source, destination)
    status = mounted.status()
    os.kill(status["pid"], signal.SIGKILL)
    until(lambda: not support.alive(status["pid"]), "its end")
    assert run("umount", mounted.point).returncode == 0
    again = mount(source, destination, "--no-background")
    assert again.status()["resumed_bytes"] == status["hydrated_bytes"] > 0


@pytest.mark.parametrize("command", [["pause"], ["resume"], ["limit", "1M"]])
def test_a_mount_without_a_pass_tells_so(
    mount: Mounter, source: Path, destination: Path, command: list[str]
) -> None:
    mounted = mount(source, destination, "--no-background")
    name, *words = command
    refused(name, mounted.point, *words, status=2, told="--no-background")
    assert is_right(mounted, 3)


def test_a_complete_mount_takes_commands(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, wait=True)
    for command in (["pause"], ["limit", "1M"], ["prefetch", "0:1G"], ["resume"]):
        obeyed(command[0], mounted.point, *command[1:])
    assert mounted.status()["state"] == "complete"
    obeyed("umount", mounted.point)


# limit


def test_a_limit_at_the_start_and_its_end(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, *SLOW)
    assert mounted.status()["limit_bytes_per_s"] == 64 * 1024
    until(lambda: mounted.status()["hydrated_bytes"], "the first block")
    hydrated, _ = counts_after(mounted, "status", "status")
    assert hydrated <= 4 * BLOCK_SIZE
    assert mounted.status()["state"] == "hydrating"
    obeyed("limit", mounted.point, "none")
    mounted.wait()
    assert mounted.status()["limit_bytes_per_s"] is None


def test_a_limit_that_comes_while_it_runs(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = paused(mount, source, destination)
    obeyed("limit", mounted.point, "32k")
    assert mounted.status()["limit_bytes_per_s"] == 32 * 1024
    obeyed("resume", mounted.point)
    hydrated, _ = counts_after(mounted, "status", "status")
    assert hydrated <= 4 * BLOCK_SIZE
    assert is_right(mounted, BLOCKS - 1)  # by background hydration alone
    obeyed("limit", mounted.point, "1G")
    mounted.wait()
    assert mounted.status()["limit_bytes_per_s"] == 1 << 30


# prefetch


def test_prefetch_brings_its_blocks_and_no_others(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = paused(mount, source, destination)
    before = brought(destination)
    assert before.isdisjoint({8, 9, 16, 17, 20, BLOCKS - 1})
    obeyed("prefetch", mounted.point, "1M:128K", f"{at(17) - 1}:2", f"{at(20)}:0", f"{at(BLOCKS) - 1}:1T")
    assert brought(destination) == before | {8, 16, 17, BLOCKS - 1}
    status = mounted.status()
    assert (status["state"], status["hydrated_bytes"]) == ("paused", (len(before) + 4) * BLOCK_SIZE)
    refused("prefetch", mounted.point, "1M:128K", "1T:1T", status=2, told="there is nothing at 1099511627776")
    assert brought(destination) == before | {8, 16, 17, BLOCKS - 1}


def test_prefetch_of_a_mount_without_a_pass(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, "--no-background")
    obeyed("prefetch", mounted.point, "256K:256K")
    assert brought(destination) == {2, 3}


def test_a_prefetch_that_fails_tells_why(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, "--no-background")
    os.truncate(source, at(10))
    refused("prefetch", mounted.point, "2M:1", status=3, told=str(source))
    obeyed("prefetch", mounted.point, "1M:1")
    assert brought(destination) == {8}


def test_a_prefetch_whose_mount_goes_away_ends(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, "--no-background")
    assert is_right(mounted, 0)  # its process is there
    for pid in mounted.retrievers():
        os.kill(pid, signal.SIGSTOP)
    command = [*support.BLOCKCOPY, "prefetch", str(mounted.point), "0:4M"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        sent = mounted.status()["sent_bytes"]
        until(lambda: mounted.status()["sent_bytes"] > sent, "the questions")
        os.kill(mounted.status()["pid"], signal.SIGTERM)
        _, said = process.communicate(timeout=10)
    assert process.returncode in (3, 4)
    assert b"ERROR (prefetch): " in said


# Invalid commands


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["prefetch", "5"], "OFFSET:LENGTH"),
        (["prefetch", "5:x"], "not a number of bytes"),
        (["prefetch", "-1:5"], ""),
        (["prefetch", "8388608T:1"], "lies beyond 8 EiB"),
        (["prefetch", "0:99999999999999999999"], "lies beyond 8 EiB"),
        (["prefetch"], "OFFSET:LENGTH"),
        (["limit", "0"], "pause"),
        (["limit", "fast"], "not a number of bytes"),
        (["limit"], "RATE"),
        (["pause", "now"], "unrecognized"),
        (["dance"], "invalid choice"),
    ],
)
def test_a_command_that_cannot_be_meant(tmp_path: Path, words: list[str], told: str) -> None:
    """Refused before any mount is asked."""
    refused(words[0], tmp_path, *words[1:], status=2, told=told)


def ask_raw(path: str, sent: bytes) -> dict[str, Any]:
    """Return the socket's answer to `data` and the end of the stream."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(support.PATIENCE)
        connection.connect(path)
        with contextlib.suppress(BrokenPipeError):  # it has heard enough before all is said
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as replies:
            [line] = replies.readlines()
    return json.loads(line)  # type: ignore[no-any-return]


def test_a_mount_that_is_gone_answers_no_request_but_to_end(tmp_path: Path) -> None:
    """A new mount may have its device number, and clients find the socket by this number."""
    path = str(tmp_path / "0:99-1.sock")
    replies: list[bytes] = []
    calls: list[str] = []

    async def ask(command: str) -> None:
        stream = await trio.open_unix_socket(path)
        await stream.send_all(json.dumps({"command": command}).encode() + b"\n")
        replies.append(b"".join([data async for data in stream]))
        await stream.aclose()

    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            server = ControlServer(path, listener)
            async with trio.open_nursery() as nursery:
                serve: Any = partial(
                    server.serve, None, partial(calls.append, "status"), partial(calls.append, "end")
                )
                nursery.start_soon(serve, lambda: True)
                for command in ("status", "pause", "map", "end"):
                    await ask(command)
                nursery.cancel_scope.cancel()

    trio.run(main)
    assert (replies, calls) == ([b"", b"", b"", b'{"ok": true}\n'], ["end"])


GARBAGE = {
    "nothing": b"",
    "an empty line": b"\n",
    "no end": b'{"command": "pause"}',
    "no JSON": b"GET / HTTP/1.1\n",
    "no text": b"\xff\xfe\x00\x80\n",
    "too long": b"x" * 100_000,
    "too long a line": b" " * 100_000 + b"\n",
    "deep": b"[" * 60_000 + b"\n",
    "many digits": b"9" * 60_000 + b"\n",
    "a number": b"5\n",
    "null": b"null\n",
    "a list": b'["pause"]\n',
    "no command": b"{}\n",
    "a command of a list": b'{"command": ["pause"]}\n',
    "an unknown command": b'{"command": "dance"}\n',
    "half a character": b'{"command": "\\ud800"}\n',
    "no rate": b'{"command": "limit", "rate": 0}\n',
    "a negative rate": b'{"command": "limit", "rate": -1}\n',
    "a true rate": b'{"command": "limit", "rate": true}\n',
    "a fraction": b'{"command": "limit", "rate": 0.5}\n',
    "an infinite rate": b'{"command": "limit", "rate": Infinity}\n',
    "a rate beyond all numbers": b'{"command": "limit", "rate": 1%s}\n' % (b"0" * 400),
    "no extents": b'{"command": "prefetch"}\n',
    "extents that are none": b'{"command": "prefetch", "extents": [5, [1], [1, 2, 3], [-1, 5], ["0", 1]]}\n',
    "half an extent": b'{"command": "prefetch", "extents": [[0, 1], [2]]}\n',
    "a position beyond all": b'{"command": "prefetch", "extents": [[%d, 1]]}\n' % (1 << 64),
}


def test_garbage_on_the_socket_is_answered_and_does_no_harm(
    mount: Mounter, source: Path, destination: Path
) -> None:
    mounted = mount(source, destination, *SLOW)
    path = mounted.status()["control_socket"]
    for name, sent in GARBAGE.items():
        reply = ask_raw(path, sent)
        assert (reply.keys(), reply["exit_code"]) == ({"error", "exit_code"}, 2), name
        assert len(reply["error"]) < 500, name
        assert mounted.status()["limit_bytes_per_s"] == 64 * 1024, name
    with socket.socket(socket.AF_UNIX) as silent:  # one that says nothing keeps nobody waiting
        silent.connect(path)
        obeyed("pause", mounted.point)
    with socket.socket(socket.AF_UNIX) as gone:
        gone.connect(path)
        gone.sendall(b'{"command": "resume"}\n')
    until(lambda: mounted.status()["state"] == "hydrating", "the deed of one who does not wait for the answer")
    assert is_right(mounted, 9)
    obeyed("limit", mounted.point, "none")
    mounted.wait()
    mounted.umount()
    assert destination.read_bytes() == DATA


# The socket, and mounts that are none


def test_the_socket_is_the_users_own_and_goes_with_the_mount(
    mount: Mounter, source: Path, destination: Path
) -> None:
    mounted = mount(source, destination, "--no-background")
    path = Path(mounted.status()["control_socket"])
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (stat.S_IMODE(path.parent.stat().st_mode), path.parent.stat().st_uid) == (0o700, os.geteuid())
    mounted.umount()
    assert not path.exists()


@pytest.mark.parametrize(
    "words", [["pause"], ["resume"], ["limit", "1M"], ["prefetch", "0:1"], ["umount"], ["wait"]]
)
def test_a_folder_that_is_no_mount_is_told(tmp_path: Path, words: list[str]) -> None:
    refused(words[0], tmp_path, *words[1:], status=4, told=f"no replica is mounted on {tmp_path}")


def test_a_dead_mount_is_told(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, "--no-background")
    pid = mounted.status()["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not support.alive(pid), "its end")
    refused("pause", mounted.point, status=4, told="program died")


# umount


def test_an_incomplete_umount_tells_where_the_state_is(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = paused(mount, source, destination)
    state = mounted.status()["state_file"]
    refused("umount", mounted.point, status=75, told=f"recorded in {state}")
    assert Path(state).stat().st_size
    assert str(mounted.point) not in support.fuse_mounts()


def test_an_incomplete_umount_without_a_state(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, "--no-background", "--no-state")
    refused("umount", mounted.point, status=75, told="no state is kept")


def test_a_complete_umount(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, wait=True)
    obeyed("umount", mounted.point)
    assert destination.read_bytes() == DATA
