from __future__ import annotations

import contextlib
import math
import os
import random
import shlex
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import support
import trio
import trio.testing
from support import pairwise, written

from blockcopy.block.buffers import Buffer
from blockcopy.block.geometry import BLOCK_SIZE, Geometry
from blockcopy.errors import OriginalProgramError, SourceError
from blockcopy.protocol.handshake import Handshake
from blockcopy.replica.source.batches import Signatures
from blockcopy.replica.source.client import Client
from blockcopy.transport.command import stage_command
from blockcopy.transport.location import Location

BLOCKS = 40
DATA = support.noise(BLOCKS * BLOCK_SIZE - 1000)

FAULTS = {"die": "SIGKILL", "garble": "Last login", "misplace": "position", "oversize": "bytes", "short": ""}
"""--FAULT-at of the stand-in → what the reason has to mention."""

ENDING_FAULTS = [fault for fault in FAULTS if fault != "short"]
"""Those that end the connection; a block that came short is the error of its batch alone."""


PROGRAMS = ["ours", "ours in the original form", "stand-in", "original"]


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> str | None:
    """Return the --blockcopy-path of each `retrieve`. None speaks the negotiated dialect."""
    if request.param == "ours in the original form":
        return shlex.join(support.BLOCKCOPY)
    if request.param == "original":
        return shlex.join(request.getfixturevalue("original"))
    return support.QUEUEING if request.param == "stand-in" else None


@pytest.fixture
def original_form(program: str | None) -> str:
    """Each that is asked in the original form."""
    if program is None:
        pytest.skip("the agreed form has no need of it")
    return program


def script(folder: Path, *lines: str) -> str:
    """Write a script of `lines`, and return it as a --blockcopy-path. "$@" is `retrieve PATH`."""
    path = folder / "program"
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


@contextlib.asynccontextmanager
async def retriever_of(
    source: Path, program: str | None = None, *, timeout: float = math.inf
) -> AsyncIterator[Client]:
    original = program is not None
    command = stage_command(Location(None, str(source)), program=program)
    retriever = Client(command, None if original else Handshake(), timeout=timeout)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(retriever.run)
            try:
                if not original:
                    assert (await retriever.greet())["size"] == source.stat().st_size
                yield retriever
            finally:
                with trio.CancelScope(shield=True):
                    await retriever.close()


class Asked(NamedTuple):
    """A question for one block, of which we have `own`."""

    position: int
    size: int
    own: bytes


def question(data: bytes, block: int, *, equal: bool = False, block_size: int = BLOCK_SIZE) -> Asked:
    """Return the signature of `block` of `data`. Unless `equal`, its digest is of other bytes."""
    offset, length = Geometry(len(data), block_size).extent(block)
    own = data[offset : offset + length]
    return Asked(offset, length, own if equal else own[:-1] + bytes([own[-1] ^ 1]))


def answer(data: bytes, asked: Asked) -> bytes | None:
    """Return the answer of a source with `data`."""
    theirs = data[asked.position : asked.position + asked.size]
    return None if theirs == asked.own else theirs


class Collected:
    """A sink that keeps all it is given."""

    def __init__(self) -> None:
        self.at: dict[int, bytes] = {}

    def data(self, position: int, payload: Buffer) -> None:
        self.at[position] = bytes(payload)

    def zeros(self, position: int, length: int) -> None:
        self.at[position] = bytes(length)


async def ask(retriever: Client, asked: Sequence[Asked]) -> list[bytes | None]:
    """Return the source's bytes of each, or None if it has the same. Raises SourceError for what it cannot read."""
    digest, collected = retriever.digest, Collected()
    questions = [
        Signatures(each.position, each.size, max(each.size, 4096), digest(each.own) if digest else b"x")
        for each in asked
    ]
    differing = await retriever.ask(questions, collected)
    if differing.unreadable:
        raise SourceError(differing.unreadable[0].reason)
    assert sorted(extent.offset for extent in (*differing.data, *differing.zeros)) == sorted(collected.at)
    return [collected.at.get(each.position) for each in asked]


def some_questions(chance: random.Random, count: int, block_size: int) -> list[Asked]:
    blocks = sorted(chance.sample(range(Geometry(len(DATA), block_size).block_count), count))
    return [question(DATA, block, equal=chance.random() < 0.5, block_size=block_size) for block in blocks]


_earlier: set[int] = set()


def _children() -> set[int]:
    listed = Path("/proc/self/task").glob("*/children")
    return {int(pid) for each in listed for pid in each.read_text().split()}


@pytest.fixture(autouse=True)
def _children_of_before() -> None:
    """Note what another test of this process has not reaped: it is none of the retriever's."""
    _earlier.clear()
    _earlier.update(_children())


def unreaped_children() -> list[int]:
    """Return the children of this test, zombies too; but not an sshd that other tests have."""
    return [pid for pid in _children() - _earlier if not support.is_shared(pid)]


# Answers


@pytest.mark.parametrize("equal", [True, False])
def test_equal_is_none_and_different_is_the_bytes_of_the_source(
    equal: bool, source: Path, program: str | None
) -> None:
    async def main() -> None:
        async with retriever_of(source, program) as retriever:
            for block in (0, 17, BLOCKS - 1):
                asked = question(DATA, block, equal=equal)
                expected = None if equal else DATA[asked.position : asked.position + asked.size]
                assert await ask(retriever, [asked]) == [expected]

    trio.run(main)


def test_batches_of_any_length_are_answered_in_their_order(source: Path, program: str | None) -> None:
    chance = random.Random(2)

    async def main() -> None:
        async with retriever_of(source, program) as retriever:
            for count in range(1, BLOCKS + 1):
                questions = some_questions(chance, count, 4096)
                assert await ask(retriever, questions) == [answer(DATA, asked) for asked in questions]

    trio.run(main)


def test_many_tasks_that_ask_at_once_get_their_own_answers(source: Path, program: str | None) -> None:
    answered = 0

    async def ask_many(retriever: Client, chance: random.Random) -> None:
        nonlocal answered
        for _ in range(5):
            questions = some_questions(chance, chance.randint(1, 8), 16384)
            assert await ask(retriever, questions) == [answer(DATA, asked) for asked in questions]
            answered += 1

    async def main() -> None:
        async with retriever_of(source, program) as retriever, trio.open_nursery() as nursery:
            for seed in range(30):
                nursery.start_soon(ask_many, retriever, random.Random(seed))

    trio.run(main)
    assert answered == 150


def test_an_ask_that_is_cancelled_takes_no_answer_from_the_others(source: Path, program: str | None) -> None:
    async def main() -> None:
        async with retriever_of(source, program) as retriever:
            for block in range(10):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await ask(retriever, [question(DATA, block)])
                assert scope.cancelled_caught
                asked = question(DATA, block + 1)
                assert await ask(retriever, [asked]) == [answer(DATA, asked)]

    trio.run(main)


@pytest.mark.parametrize(
    ("size", "program", "equal"),
    pairwise([1, 2, BLOCK_SIZE + 1, BLOCK_SIZE + 2, 2 * BLOCK_SIZE, 17 * BLOCK_SIZE + 1], PROGRAMS, [True, False]),
    indirect=["program"],
)
def test_the_last_block_may_be_of_any_length(size: int, equal: bool, tmp_path: Path, program: str | None) -> None:
    data = support.noise(size)
    questions = [question(data, block, equal=equal) for block in range(Geometry(size).block_count)]
    expected = [answer(data, asked) for asked in questions]

    async def main() -> None:
        async with retriever_of(written(tmp_path / "source", data), program) as retriever:
            assert await ask(retriever, questions) == expected
            assert await ask(retriever, questions[-1:]) == expected[-1:]

    trio.run(main)


def test_reaches_tells_where_the_source_has_a_byte(tmp_path: Path, original_form: str) -> None:
    async def main() -> None:
        async with retriever_of(written(tmp_path / "source", b"x" * 1000), original_form) as retriever:
            positions = [0, 1, 998, 999, 1000, 1001, 10**12]
            assert await retriever.reaches(positions) == [True] * 4 + [False] * 3
            assert await retriever.reaches([0]) == [True]

    trio.run(main)


def test_an_empty_source_reaches_nowhere(tmp_path: Path, original_form: str) -> None:
    async def main() -> None:
        async with retriever_of(written(tmp_path / "source", b""), original_form) as retriever:
            assert await retriever.reaches([0]) == [False]
            assert await retriever.reaches([0, 1]) == [False, False]

    trio.run(main)


def test_what_crosses_the_pipes_is_counted(source: Path, program: str | None) -> None:
    async def main() -> None:
        async with retriever_of(source, program) as retriever:
            greeting = retriever.received_bytes
            await ask(retriever, [question(DATA, block, equal=True) for block in range(10)])
            assert 0 < retriever.received_bytes - greeting < 1000
            before = retriever.received_bytes
            await ask(retriever, [question(DATA, 3)])
            assert BLOCK_SIZE < retriever.received_bytes - before < BLOCK_SIZE + 1000
            assert retriever.sent_bytes > 11 * 32

    trio.run(main)


# A source that changes


@pytest.mark.parametrize(
    ("size", "program", "equal"),
    pairwise([0, 1, 5 * BLOCK_SIZE, 5 * BLOCK_SIZE + 1, len(DATA) - 1], PROGRAMS, [True, False]),
    indirect=["program"],
)
def test_a_source_that_was_truncated_is_no_equal_one(
    size: int, equal: bool, source: Path, program: str | None
) -> None:
    async def main() -> None:
        async with retriever_of(source, program) as retriever:
            blocks = range(BLOCKS)
            assert None not in await ask(retriever, [question(DATA, block) for block in blocks])
            os.truncate(source, size)
            for first in (0, size // BLOCK_SIZE, BLOCKS - 1):
                with pytest.raises(SourceError, match="short"):
                    await ask(retriever, [question(DATA, block, equal=equal) for block in blocks[first:]])

    trio.run(main)


def test_what_a_truncated_source_still_has_can_be_asked(source: Path) -> None:
    async def main() -> None:
        async with retriever_of(source) as retriever:
            os.truncate(source, 5 * BLOCK_SIZE)
            asked = question(DATA, 4)
            assert await ask(retriever, [asked]) == [answer(DATA, asked)]

    trio.run(main)


# A source that fails


@pytest.mark.parametrize("fault", ENDING_FAULTS)
@pytest.mark.parametrize("answer", [1, 2, 17])
def test_a_fault_is_an_error_for_its_batch_and_all_that_follow(fault: str, answer: int, source: Path) -> None:
    questions = [question(DATA, block) for block in range(20)]

    async def main() -> None:
        async with retriever_of(source, f"{support.QUEUEING} --{fault}-at {answer}") as retriever:
            for asked in (questions, questions[:1], questions[5:7]):
                with pytest.raises(SourceError, match=FAULTS[fault]):
                    await ask(retriever, asked)

    trio.run(main)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_an_error_for_all_that_wait(fault: str, source: Path) -> None:
    """Nobody gets bytes that are not the source's, and nobody waits for ever."""
    ends: list[str] = []

    async def ask_for(retriever: Client, block: int) -> None:
        asked = question(DATA, block)
        try:
            assert await ask(retriever, [asked]) == [answer(DATA, asked)]
            ends.append("answer")
        except SourceError:
            ends.append("error")

    async def main() -> None:
        async with (
            retriever_of(source, f"{support.QUEUEING} --{fault}-at 7") as retriever,
            trio.open_nursery() as nursery,
        ):
            for block in range(BLOCKS):
                nursery.start_soon(ask_for, retriever, block)

    trio.run(main)
    assert len(ends) == BLOCKS
    # Each has an answer and a proof, so the seventh answer belongs to the fourth.
    assert ends.count("answer") <= 3 or fault == "short"
    assert "error" in ends


@pytest.mark.parametrize("fault", ENDING_FAULTS)
def test_the_reason_has_what_the_process_said(fault: str, source: Path, tmp_path: Path) -> None:
    program = script(tmp_path, "echo 'the disk is on fire' >&2", f'exec {support.QUEUEING} --{fault}-at 1 "$@"')

    async def main() -> None:
        async with retriever_of(source, program) as retriever:
            with pytest.raises(SourceError, match="the disk is on fire"):
                await ask(retriever, [question(DATA, 0)])
            with pytest.raises(SourceError, match="the disk is on fire"):
                await ask(retriever, [question(DATA, 1)])

    trio.run(main)


def test_one_that_stands_still_is_ended_once_it_is_asked(source: Path) -> None:
    """What it gave before is no sign of life."""

    async def main() -> None:
        async with retriever_of(source, f"{support.QUEUEING} --stall-at 3", timeout=1) as retriever:
            with trio.move_on_after(1.1):
                await retriever.ended.wait()
            assert retriever.failure is None  # it owed no answer
            asked = question(DATA, 0)
            assert await ask(retriever, [asked]) == [answer(DATA, asked)]
            with pytest.raises(SourceError, match=r"no answer from .* for 1 seconds"):
                await ask(retriever, [asked])
            await retriever.ended.wait()
            assert unreaped_children() == []

    trio.run(main)


def test_one_that_trickles_is_ended(source: Path) -> None:
    """Whole answers count as signs of life, and so many bytes as no trickle brings."""
    command = stage_command(Location(None, str(source)), program=f"{support.FAULTY} --trickle-at 2")

    async def main() -> None:
        retriever = Client(command, Handshake(), timeout=1)
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                await nursery.start(retriever.run)
                await retriever.greet()
                with pytest.raises(SourceError, match=r"no answer from .* for 1 seconds"):
                    await ask(retriever, [question(DATA, 0), question(DATA, 1)])
        assert retriever.answered_at is not None

    trio.run(main)


def test_one_that_is_slow_is_left_in_peace(source: Path) -> None:
    """The answers take longer together than it may be silent."""
    slow = f"{support.PYTHON} {support.STANDINS / 'link'} --rate 200K host {support.QUEUEING}"

    async def main() -> None:
        async with retriever_of(source, slow, timeout=1.5) as retriever:
            questions = [question(DATA, block) for block in range(4)]
            before = trio.current_time()
            assert await ask(retriever, questions) == [answer(DATA, asked) for asked in questions]
            assert trio.current_time() - before > 1.5

    trio.run(main)


def test_its_exit_status_and_last_words_are_the_reason(source: Path, tmp_path: Path) -> None:
    program = script(tmp_path, "echo one >&2", "echo two >&2", "exit 7")

    async def main() -> None:
        async with retriever_of(source, program) as retriever:
            with pytest.raises(SourceError, match=r"status 7.*one.*two") as caught:
                await ask(retriever, [question(DATA, 0)])
            assert str(source) in str(caught.value)
            assert caught.value.exit_code == 3

    trio.run(main)


def test_a_missing_source_is_told_in_the_words_of_the_process(tmp_path: Path, program: str | None) -> None:
    command = stage_command(Location(None, str(tmp_path / "absent")), program=program)

    async def main() -> None:
        retriever = Client(command, Handshake() if program is None else None)
        async with trio.open_nursery() as nursery:
            await nursery.start(retriever.run)
            with pytest.raises(SourceError, match="No such file"):
                await (retriever.greet() if program is None else retriever.reaches([0]))

    trio.run(main)


def test_a_process_that_closes_its_output_but_stays_is_ended(source: Path, tmp_path: Path) -> None:
    program = script(tmp_path, "exec >&-", "exec cat >/dev/null")

    async def main() -> None:
        async with retriever_of(source, program) as retriever:
            with pytest.raises(SourceError, match="closed its output"):
                await ask(retriever, [question(DATA, 0)])
            assert unreaped_children() == []

    trio.run(main)


@pytest.mark.parametrize("name", ["/no/such/program", "/dev/null"])
def test_a_program_that_cannot_be_run(name: str, source: Path) -> None:
    async def main() -> None:
        retriever = Client(stage_command(Location(None, str(source)), program=name), Handshake())
        async with trio.open_nursery() as nursery:
            with pytest.raises(SourceError, match=f"cannot run `{name}`"):
                await nursery.start(retriever.run)
        with trio.fail_after(5):
            await retriever.close()
            await retriever.close()

    trio.run(main)


def test_a_login_banner_on_its_output_is_named(source: Path, tmp_path: Path) -> None:
    program = script(tmp_path, "echo Welcome to Debian", f'exec {support.QUEUEING} "$@"')

    async def main() -> None:
        async with retriever_of(source, program) as retriever:
            for _ in range(2):
                with pytest.raises(SourceError, match=r"Welcome to Debian.*login"):
                    await ask(retriever, [question(DATA, 0)])

    trio.run(main)


@pytest.mark.parametrize("flood", ["yes a long complaint | head -c 300000 >&2", "head -c 1000000 /dev/zero >&2"])
def test_a_flood_of_messages_stops_no_answers(
    flood: str, source: Path, tmp_path: Path, program: str | None
) -> None:
    argv = program or shlex.join(support.BLOCKCOPY)
    flooding = script(tmp_path, flood, f"({flood}) &", f'exec {argv} "$@"')

    async def main() -> None:
        async with retriever_of(source, flooding) as retriever:
            for block in range(5):
                asked = question(DATA, block)
                assert await ask(retriever, [asked]) == [answer(DATA, asked)]

    trio.run(main)


def test_the_reason_stays_short_after_a_flood(source: Path, tmp_path: Path) -> None:
    program = script(tmp_path, "head -c 1000000 /dev/zero | tr '\\0' x >&2", "echo the end >&2", "exit 1")

    async def main() -> None:
        async with retriever_of(source, program) as retriever:
            with pytest.raises(SourceError, match="the end") as caught:
                await ask(retriever, [question(DATA, 0)])
            assert len(str(caught.value)) < 65536

    trio.run(main)


# Letting go


def test_close_ends_an_idle_process_with_done(source: Path, tmp_path: Path, program: str | None) -> None:
    argv = program or shlex.join(support.BLOCKCOPY)
    noting = script(tmp_path, f'{argv} "$@"', f"echo $? >{tmp_path}/status")

    async def main() -> None:
        async with retriever_of(source, noting) as retriever:
            await ask(retriever, [question(DATA, 0)])
            await retriever.close()
            assert unreaped_children() == []
            with pytest.raises(SourceError):
                await ask(retriever, [question(DATA, 0)])
            await retriever.close()

    trio.run(main)
    assert (tmp_path / "status").read_text() == "0\n"


def test_close_while_asks_wait_for_a_stalled_process(source: Path) -> None:
    errors: list[SourceError] = []

    async def ask_for(retriever: Client, block: int) -> None:
        with pytest.raises(SourceError) as caught:
            await ask(retriever, [question(DATA, block)])
        errors.append(caught.value)

    async def main() -> None:
        async with (
            retriever_of(source, f"{support.QUEUEING} --stall-at 1") as retriever,
            trio.open_nursery() as nursery,
        ):
            for block in range(5):
                nursery.start_soon(ask_for, retriever, block)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not errors
            with trio.fail_after(1):
                await retriever.close()
            assert unreaped_children() == []

    trio.run(main)
    assert len(errors) == 5


def test_close_while_the_pipe_to_a_process_that_does_not_read_is_full(source: Path, tmp_path: Path) -> None:
    async def ask_much(retriever: Client) -> None:
        with pytest.raises(SourceError):
            await ask(retriever, [question(DATA, 0, block_size=512)] * 100)

    async def main() -> None:
        async with (
            retriever_of(source, script(tmp_path, "exec sleep 1000")) as retriever,
            trio.open_nursery() as nursery,
        ):
            for _ in range(200):
                nursery.start_soon(ask_much, retriever)
            await trio.testing.wait_all_tasks_blocked(0.05)
            await retriever.close()
            assert unreaped_children() == []

    trio.run(main)


def test_close_ends_an_idle_process_that_does_not_listen(source: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with retriever_of(source, script(tmp_path, "trap '' TERM", "exec sleep 1000")) as retriever:
            await retriever.close()
            assert unreaped_children() == []

    trio.run(main)


def test_close_may_be_called_by_several_tasks(source: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            retriever_of(source, script(tmp_path, "exec sleep 1000")) as retriever,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(retriever.close)
            await trio.testing.wait_all_tasks_blocked()
            await retriever.close()
            assert unreaped_children() == []

    trio.run(main)


def test_who_asks_while_it_is_being_closed_gets_an_error(source: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            retriever_of(source, script(tmp_path, "exec sleep 1000")) as retriever,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(retriever.close)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(SourceError):
                await ask(retriever, [question(DATA, 0)])

    trio.run(main)


def test_cancelling_its_task_ends_the_process_and_every_wait(source: Path) -> None:
    async def main() -> None:
        retriever = Client(
            stage_command(Location(None, str(source)), program=f"{support.QUEUEING} --stall-at 1"), Handshake()
        )
        with trio.fail_after(10):
            async with trio.open_nursery() as outer:
                inner = await outer.start(run_in_nursery, retriever)
                outer.start_soon(ask_in_vain, retriever)
                await trio.testing.wait_all_tasks_blocked(0.05)
                inner.cancel()
        assert unreaped_children() == []

    async def run_in_nursery(
        retriever: Client, task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED
    ) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(retriever.run)
            task_status.started(nursery.cancel_scope)

    async def ask_in_vain(retriever: Client) -> None:
        with pytest.raises(SourceError):
            await ask(retriever, [question(DATA, 0)])

    trio.run(main)


# The agreed form


def test_the_original_does_not_know_the_greeting(source: Path, tmp_path: Path) -> None:
    command = stage_command(Location(None, str(source)), program=support.QUEUEING)

    async def main() -> None:
        retriever = Client(command, Handshake())
        async with trio.open_nursery() as nursery:
            await nursery.start(retriever.run)
            with pytest.raises(OriginalProgramError):
                await retriever.greet()

    trio.run(main)


def test_what_cannot_be_read_is_said_and_the_rest_goes_on(tmp_path: Path, loop_device: Callable[..., str]) -> None:
    """A loop device whose backing file was cut gives I/O errors behind the cut."""
    backing = written(tmp_path / "source", DATA[: 16 * BLOCK_SIZE])
    device = loop_device(backing, "--read-only")
    os.truncate(backing, 4 * BLOCK_SIZE)

    async def main() -> None:
        retriever = Client(stage_command(Location(None, device)), Handshake())
        async with trio.open_nursery() as nursery:
            await nursery.start(retriever.run)
            assert (await retriever.greet())["size"] == 16 * BLOCK_SIZE
            for _ in range(2):
                with pytest.raises(SourceError, match=r"cannot read .* Input/output error"):
                    await ask(retriever, [question(DATA, block) for block in range(3, 8)])
                asked = question(DATA, 2)
                assert await ask(retriever, [asked]) == [answer(DATA, asked)]
            await retriever.close()

    trio.run(main)
