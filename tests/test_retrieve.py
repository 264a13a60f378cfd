"""`blockcopy retrieve` as a command."""

from __future__ import annotations

import hashlib
import lzma
import os
import select
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import BLOCKCOPY, PATIENCE, FedDecoder, failed, noise, run, succeeded, with_changes

from blockcopy.block.geometry import BLOCK_SIZE
from blockcopy.protocol.digests import NO_DIGEST, ORIGINAL, named
from blockcopy.protocol.wire import (
    BLOCK_STREAM,
    NEGOTIATED_BLOCK_STREAM,
    Data,
    Done,
    Failure,
    Fence,
    Hash,
    Hello,
    LegacyHash,
    Message,
    Rest,
    XzData,
    encode,
)

digest = named(ORIGINAL)

HELLO = b"Hello World!"
DONE = Done()


@pytest.fixture
def source(tmp_path: Path) -> Callable[[bytes], Path]:
    def make(content: bytes) -> Path:
        (tmp_path / "source").write_bytes(content)
        return tmp_path / "source"

    return make


def ask(data: bytes, position: int, size: int = BLOCK_SIZE) -> Hash:
    """Return the signature of `size` bytes of `data` at `position`."""
    return Hash(position, size, digest(data[position : position + size]))


def asks(data: bytes) -> list[Message]:
    """Return the signatures of all of `data`, as checksum writes them, without `rest`."""
    return [ask(data, at, min(BLOCK_SIZE, len(data) - at)) for at in range(0, len(data), BLOCK_SIZE)]


def stream_of(*messages: Message) -> bytes:
    return b"".join(map(encode, messages))


def messages_of(stream: bytes) -> list[Message]:
    decoder = FedDecoder(BLOCK_STREAM)
    decoder.feed(stream)
    return list(iter(decoder.next, None))


def answers(path: object, *messages: Message, options: tuple[str, ...] = ()) -> list[Message]:
    """To a stream that is whole; `done` is left out."""
    done = run("retrieve", *options, path, input=stream_of(*messages, DONE))
    succeeded(done)
    *found, last = messages_of(done.stdout)
    assert last == DONE
    return found


def refused(done: subprocess.CompletedProcess[bytes], *words: str) -> list[Message]:
    """Check the error: status 1, one line with all `words`, no `done`. Returns the answers before the error."""
    failed(done, 1)
    message = done.stderr.decode()
    assert message.startswith("ERROR (retrieve): ")
    assert message.count("\n") == 1
    assert all(word in message for word in words), message
    assert not done.stdout.endswith(b"done")
    return messages_of(done.stdout)


def whole(data: bytes, start: int = 0) -> list[Message]:
    return [Data(at, data[at : at + BLOCK_SIZE]) for at in range(start, len(data), BLOCK_SIZE)]


def test_the_test_vector(source: Callable[[bytes], Path]) -> None:
    stream = b"Hash" + bytes(8) + b"\0\0\0\x0c" + digest(b"-" * 12) + b"done"
    done = run("retrieve", source(HELLO), input=stream)
    succeeded(done)
    assert done.stdout == b"data" + bytes(8) + b"\0\0\0\x0c" + HELLO + b"done"


def test_only_what_differs_is_answered_in_the_order_asked(source: Callable[[bytes], Path]) -> None:
    data = noise(40 * BLOCK_SIZE + 5)
    questions = asks(with_changes(data, [0, 7, 20, 21, 40]))
    questions.reverse()
    expected = [Data(at * BLOCK_SIZE, data[at * BLOCK_SIZE :][:BLOCK_SIZE]) for at in (40, 21, 20, 7, 0)]
    assert answers(source(data), *questions) == expected


def test_equal_blocks_get_no_answer(source: Callable[[bytes], Path]) -> None:
    data = noise(20 * BLOCK_SIZE + 5)
    assert answers(source(data), *asks(data)) == []
    assert answers(source(data)) == []


def test_a_source_that_ends_inside_the_block_sends_what_it_has(source: Callable[[bytes], Path]) -> None:
    """Whatever the digest, even that of what it has."""
    data = noise(BLOCK_SIZE + 100)
    tail = data[BLOCK_SIZE:]
    path = source(data)
    assert answers(path, Hash(BLOCK_SIZE, BLOCK_SIZE, digest(tail))) == [Data(BLOCK_SIZE, tail)]
    assert answers(path, Hash(BLOCK_SIZE, BLOCK_SIZE, NO_DIGEST)) == [Data(BLOCK_SIZE, tail)]


@pytest.mark.parametrize("position", [100, 101, BLOCK_SIZE, 2**62])
def test_a_source_that_ends_before_the_block_is_silent(source: Callable[[bytes], Path], position: int) -> None:
    assert answers(source(noise(100)), Hash(position, 5, NO_DIGEST)) == []


def test_a_block_may_be_asked_again(source: Callable[[bytes], Path]) -> None:
    asked = Hash(5, 3, NO_DIGEST)
    assert answers(source(HELLO), asked, asked) == [Data(5, HELLO[5:8])] * 2


def test_empty_questions_are_fences(source: Callable[[bytes], Path]) -> None:
    """Each with a wrong digest comes back, in order, with its position; one that is right does not."""
    questions: list[Message] = [Hash(3, 2, NO_DIGEST), *(Hash(at % 12, 0, NO_DIGEST) for at in range(200))]
    answered = answers(source(HELLO), *questions, Hash(4, 0, digest(b"")))
    assert answered == [Data(3, HELLO[3:5]), *(Data(at % 12, b"") for at in range(200))]


# rest


@pytest.mark.parametrize("offset", [0, 1, BLOCK_SIZE, 3 * BLOCK_SIZE + 98, 3 * BLOCK_SIZE + 99, 2**50])
def test_rest_before_any_hash_sends_whole_blocks(source: Callable[[bytes], Path], offset: int) -> None:
    data = noise(3 * BLOCK_SIZE + 99)
    assert answers(source(data), Rest(offset)) == whole(data, offset)


def test_rest_of_an_empty_source_is_nothing(source: Callable[[bytes], Path]) -> None:
    assert answers(source(b""), Rest(0)) == []


def test_rest_after_a_short_block_sends_whole_blocks(source: Callable[[bytes], Path]) -> None:
    data = noise(20 * BLOCK_SIZE + 99)
    assert answers(source(data), *asks(data[:100]), Rest(100)) == whole(data, 100)


def test_rest_comes_after_the_answers_to_what_was_asked_before(source: Callable[[bytes], Path]) -> None:
    data = noise(5 * BLOCK_SIZE)
    questions = asks(with_changes(data[: 3 * BLOCK_SIZE], [1]))
    expected = [Data(BLOCK_SIZE, data[BLOCK_SIZE : 2 * BLOCK_SIZE]), *whole(data, 3 * BLOCK_SIZE)]
    assert answers(source(data), *questions, Rest(3 * BLOCK_SIZE)) == expected


# The old form


def test_the_old_form_is_read_from_where_the_last_read_ended(source: Callable[[bytes], Path]) -> None:
    data = noise(9 * BLOCK_SIZE + 10)
    old = LegacyHash(BLOCK_SIZE, NO_DIGEST)
    positions = [0, 1, 5, 6, 8, 9]
    answered = answers(
        source(data),
        old,
        old,
        ask(b"", 5 * BLOCK_SIZE),
        old,
        LegacyHash(BLOCK_SIZE, digest(data[7 * BLOCK_SIZE : 8 * BLOCK_SIZE])),
        old,
        old,  # the short last block
    )
    assert answered == [Data(at * BLOCK_SIZE, data[at * BLOCK_SIZE :][:BLOCK_SIZE]) for at in positions]


def test_the_old_form_goes_on_behind_an_equal_block(source: Callable[[bytes], Path]) -> None:
    data = noise(2 * BLOCK_SIZE)
    assert answers(source(data), ask(data, 0), LegacyHash(10, NO_DIGEST)) == [
        Data(BLOCK_SIZE, data[BLOCK_SIZE:][:10])
    ]


def test_the_old_form_beyond_the_end_is_an_error(source: Callable[[bytes], Path]) -> None:
    stream = stream_of(LegacyHash(12, NO_DIGEST), LegacyHash(1, NO_DIGEST), DONE)
    assert refused(run("retrieve", source(HELLO), input=stream), "hash") == [Data(0, HELLO)]


# Answers at once


@contextmanager
def running(path: object) -> Iterator[subprocess.Popen[bytes]]:
    command = [*BLOCKCOPY, "retrieve", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        try:
            yield process
        finally:
            process.kill()


def read_exactly(process: subprocess.Popen[bytes], size: int) -> bytes:
    assert process.stdout is not None
    data = b""
    while len(data) < size:
        assert select.select([process.stdout], [], [], PATIENCE)[0], "no answer"
        more = os.read(process.stdout.fileno(), size - len(data))
        assert more, "the end"
        data += more
    return data


def test_a_lone_question_is_answered_at_once(source: Callable[[bytes], Path]) -> None:
    data = noise(5 * BLOCK_SIZE)
    with running(source(data)) as process:
        assert process.stdin is not None
        for position in (0, 3 * BLOCK_SIZE, BLOCK_SIZE):
            process.stdin.write(encode(Hash(position, BLOCK_SIZE, NO_DIGEST)))
            expected = encode(Data(position, data[position : position + BLOCK_SIZE]))
            assert read_exactly(process, len(expected)) == expected
        process.stdin.write(encode(DONE))
        assert read_exactly(process, 4) == b"done"
        assert process.wait(PATIENCE) == 0  # although its input stays open


def test_half_a_question_does_not_hold_up_the_one_before(source: Callable[[bytes], Path]) -> None:
    with running(source(HELLO)) as process:
        assert process.stdin is not None
        process.stdin.write(encode(Hash(0, 12, NO_DIGEST)) + encode(Hash(0, 12, NO_DIGEST))[:50])
        expected = encode(Data(0, HELLO))
        assert read_exactly(process, len(expected)) == expected


# Streams that are none


def test_a_stream_that_is_cut_short_is_answered_and_then_an_error(source: Callable[[bytes], Path]) -> None:
    data = noise(40 * BLOCK_SIZE)
    stream = stream_of(*(Hash(at, BLOCK_SIZE, NO_DIGEST) for at in range(0, len(data), BLOCK_SIZE)))
    path = source(data)
    assert refused(run("retrieve", path, input=stream), "without `done`") == whole(data)
    assert refused(run("retrieve", path, input=stream[:-1]), "in the middle of a message") == whole(data)[:-1]
    assert refused(run("retrieve", path, input=b""), "without `done`") == []


def test_an_unknown_command_is_an_error_after_the_answers_before(source: Callable[[bytes], Path]) -> None:
    stream = encode(Hash(0, 12, NO_DIGEST)) + b"Last login: never\n"
    assert refused(run("retrieve", source(HELLO), input=stream), "Last login") == [Data(0, HELLO)]


@pytest.mark.parametrize(
    "bad",
    [
        Hash(0, 2**32 - 1, NO_DIGEST),
        Hash(2**64 - 1, 1, NO_DIGEST),
        LegacyHash(2**32 - 1, NO_DIGEST),
        Rest(2**64 - 1),
    ],
)
def test_questions_out_of_bounds_are_refused(source: Callable[[bytes], Path], bad: Message) -> None:
    assert refused(run("retrieve", source(HELLO), input=stream_of(bad, DONE))) == []


def test_nothing_is_read_behind_done(source: Callable[[bytes], Path]) -> None:
    done = run("retrieve", source(HELLO), input=b"donejunk")
    succeeded(done, stdout=b"done")


# --lzma


def test_compression_is_used_where_it_is_smaller(source: Callable[[bytes], Path]) -> None:
    zeros, random, text = bytes(BLOCK_SIZE), noise(BLOCK_SIZE), b"to be compressed " * 1000
    path = source(zeros + random + text)
    first, second, third = answers(path, Rest(0), options=("--lzma",))
    assert isinstance(first, XzData)
    assert (first.position, lzma.decompress(first.payload, lzma.FORMAT_XZ)) == (0, zeros)
    assert second == Data(BLOCK_SIZE, random)
    assert isinstance(third, XzData)
    assert (third.position, lzma.decompress(third.payload, lzma.FORMAT_XZ)) == (2 * BLOCK_SIZE, text)


def test_a_fence_is_no_compressed_block(source: Callable[[bytes], Path]) -> None:
    assert answers(source(HELLO), Hash(3, 0, NO_DIGEST), options=("--lzma",)) == [Data(3, b"")]


# Sources


def test_a_device_is_a_source(source: Callable[[bytes], Path], loop_device: Callable[[Path], str]) -> None:
    data = noise(8 * BLOCK_SIZE + 512)
    device = loop_device(source(data))
    assert answers(device, *asks(data[: 5 * BLOCK_SIZE]), Rest(5 * BLOCK_SIZE)) == whole(data, 5 * BLOCK_SIZE)
    assert answers(device, Hash(2**40, 5, NO_DIGEST), Hash(2**40, 0, NO_DIGEST)) == [Data(2**40, b"")]


def test_a_source_is_not_written_to(source: Callable[[bytes], Path]) -> None:
    path = source(HELLO)
    before = path.stat()
    answers(path, Rest(0))
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (HELLO, before.st_mtime_ns)


def test_a_read_error_is_told_after_the_answers_before(
    source: Callable[[bytes], Path], loop_device: Callable[..., str]
) -> None:
    """Read a loop device whose backing file became shorter."""
    data = noise(40 * BLOCK_SIZE)
    path = source(data)
    device = loop_device(path, "--direct-io=on")
    os.truncate(path, 8 * BLOCK_SIZE)
    answered = refused(run("retrieve", device, input=stream_of(Rest(0), DONE)), f"of {device}: Input/output error")
    assert answered == whole(data)[: len(answered)]
    assert len(answered) <= 8


@pytest.mark.parametrize("kind", ["-", "missing", "fifo", "folder"])
def test_what_is_no_source_is_refused(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    path = "-" if kind == "-" else tmp_path / kind
    assert refused(run("retrieve", path, input=b"done"), str(path)) == []


def test_a_terminal_is_refused(source: Callable[[bytes], Path]) -> None:
    ours, theirs = os.openpty()
    try:
        done = subprocess.run(
            [*BLOCKCOPY, "retrieve", source(HELLO)],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    failed(done, 1)
    assert done.stderr.startswith(b"ERROR (retrieve): ")
    assert b"terminal" in done.stderr


# The agreed form


def test_a_greeting_is_answered_with_who_it_is_and_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(noise(1000))
    done = run("retrieve", path, input=stream_of(Hello({"protocol": 1, "from": "the future"}), DONE))
    hello, last = agreed_messages_of(done.stdout)
    assert isinstance(hello, Hello)
    identity = hello.facts["identity"]
    assert (identity["size"], identity["inode"]) == (1000, path.stat().st_ino)
    assert identity["sample"] == [hashlib.sha256(noise(1000)).hexdigest()]
    assert hello.facts["digest"] == "sha3_512"
    assert last == DONE


def test_in_the_agreed_form_nothing_is_passed_over_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(noise(1000))
    equal = digest(noise(1000))
    asked = [
        Hash(0, 1000, equal),
        Fence(1),
        Hash(500, 501, equal),
        Hash(2000, 1, equal),
        Hash(0, 1, equal),
        Fence(2),
    ]
    done = run("retrieve", path, input=stream_of(Hello({}), *asked, DONE))
    _, *answers = agreed_messages_of(done.stdout)
    assert [type(each).__name__ for each in answers] == ["Fence", "Failure", "Failure", "Data", "Fence", "Done"]
    assert [each.position for each in answers if isinstance(each, Failure)] == [500, 2000]
    assert all("shorter" in each.reason for each in answers if isinstance(each, Failure))


def test_a_greeting_in_mid_stream_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(noise(1000))
    done = run("retrieve", path, input=stream_of(Rest(1000), Hello({})))
    failed(done, 1, "mid-stream")


def test_a_fence_without_a_greeting_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(noise(1000))
    done = run("retrieve", path, input=stream_of(Fence(1), DONE))
    failed(done, 1, "before `helo`", stdout=b"")


def agreed_messages_of(stream: bytes) -> list[Message]:
    decoder = FedDecoder(NEGOTIATED_BLOCK_STREAM)
    decoder.feed(stream)
    return list(iter(decoder.next, None))
