"""The extended and the negotiated form, as `checksum --digest` and `retrieve` speak them.

Runs of blocks, zeros, holes, a choice of digests, compression.
"""

from __future__ import annotations

import hashlib
import os
import select
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import BLOCKCOPY, PATIENCE, FedDecoder, failed, noise, run, succeeded, with_changes, written

from blockcopy.block.geometry import BLOCK_SIZE
from blockcopy.errors import StreamError
from blockcopy.protocol import digests, wire, zstd
from blockcopy.protocol.compression import CompressionSpec
from blockcopy.protocol.digests import NO_DIGEST
from blockcopy.protocol.handshake import Handshake, source_greeting
from blockcopy.protocol.wire import (
    Asks,
    Data,
    DigestName,
    Done,
    Failure,
    Fence,
    Hash,
    Hello,
    Hole,
    Message,
    Rest,
    Zero,
    ZstdData,
    encode,
)

MIB = 1024 * 1024
B = BLOCK_SIZE
SHA = digests.named("sha256")
DONE = Done()


@pytest.fixture
def source(tmp_path: Path) -> Callable[[bytes], Path]:
    return lambda data: written(tmp_path / "source", data)


def sparse(path: Path, size: int, *parts: tuple[int, bytes]) -> Path:
    """Nothing but a hole, and these parts."""
    with path.open("wb") as file:
        for position, data in parts:
            file.seek(position)
            file.write(data)
        file.truncate(size)
    return path


def stream_of(*messages: Message) -> bytes:
    return b"".join(map(encode, messages))


def decoded(stream: bytes, grammar: wire.Grammar = wire.NEGOTIATED_BLOCK_STREAM) -> list[Message]:
    decoder = FedDecoder(grammar)
    decoder.feed(stream)
    return list(iter(decoder.next, None))


def asks(data: bytes, position: int = 0, block_size: int = B, digest: digests.Digest = SHA) -> Asks:
    """Return signatures of `data` for the range at `position`."""
    blocks = [data[at : at + block_size] for at in range(0, len(data), block_size)]
    return Asks(position, block_size, len(data), b"".join(map(digest, blocks)))


def extended(path: object, *messages: Message, options: tuple[object, ...] = ()) -> list[Message]:
    """Return the answers over pipes, without `done`."""
    done = run("retrieve", *options, path, input=stream_of(DigestName("sha256"), *messages, DONE))
    succeeded(done)
    *found, last = decoded(done.stdout, wire.BLOCK_STREAM)
    assert last == DONE
    return found


GREETING = {"protocol": 1, "digests": {"sha256": 100}}


def agreed(path: object, *messages: Message, greeting: dict[str, Any] = GREETING) -> list[Message]:
    """Return the answers in the negotiated dialect, without the greeting and `done`."""
    done = run("retrieve", path, input=stream_of(Hello(greeting), *messages, DONE))
    succeeded(done)
    hello, *found, last = decoded(done.stdout)
    assert (type(hello), last) == (Hello, DONE)
    return found


def greeted(path: object, greeting: dict[str, Any]) -> dict[str, Any]:
    done = run("retrieve", path, input=stream_of(Hello(greeting), DONE))
    succeeded(done)
    hello, _ = decoded(done.stdout)
    assert isinstance(hello, Hello)
    return hello.facts


BOTH = pytest.mark.parametrize("answers", [extended, agreed])
Answers = Callable[..., list[Message]]


# Runs of blocks


@BOTH
def test_consecutive_blocks_that_differ_are_one_frame(source: Callable[[bytes], Path], answers: Answers) -> None:
    data = noise(20 * B + 5)
    found = answers(source(data), asks(with_changes(data, [0, 4, 5, 6, 20])))
    assert found == [Data(0, data[:B]), Data(4 * B, data[4 * B : 7 * B]), Data(20 * B, data[20 * B :])]


@BOTH
def test_no_frame_is_larger_than_a_mib_or_spans_two_questions(
    source: Callable[[bytes], Path], answers: Answers
) -> None:
    data = noise(20 * B)
    none = Asks(0, B, 18 * B, bytes(18 * 32))
    more = Asks(18 * B, B, 2 * B, bytes(2 * 32))
    spans = [(0, 8), (8, 16), (16, 18), (18, 20)]
    assert answers(source(data), none, more) == [Data(a * B, data[a * B : b * B]) for a, b in spans]


@BOTH
@pytest.mark.parametrize("block_size", [4096, 5000, 3 * B, MIB])
def test_blocks_may_be_of_another_size(source: Callable[[bytes], Path], answers: Answers, block_size: int) -> None:
    data = noise(3 * MIB + 7)
    theirs = with_changes(data, [0, 2, len(data) // block_size], block_size)
    found = b"".join(data[each.position :][: len(each.payload)] for each in answers(source(data), asks(data)))  # type: ignore[union-attr]
    assert found == b""
    there = bytearray(theirs)
    for frame in answers(source(data), asks(theirs, block_size=block_size)):
        assert isinstance(frame, Data)
        assert frame.position % block_size == 0
        there[frame.position : frame.position + len(frame.payload)] = frame.payload
    assert there == data


@BOTH
def test_zeros_are_a_word_and_no_bytes(source: Callable[[bytes], Path], answers: Answers) -> None:
    data = noise(2 * B) + bytes(3 * B) + noise(B) + bytes(5)
    found = answers(source(data), asks(noise(6 * B + 5, 2)))
    assert found == [
        Data(0, data[: 2 * B]),
        Zero(2 * B, 3 * B),
        Data(5 * B, data[5 * B : 6 * B]),
        Zero(6 * B, 5),
    ]
    assert answers(source(data), asks(data)) == []


@BOTH
def test_a_block_that_is_zeros_there_differs_from_one_that_is_not(
    source: Callable[[bytes], Path], answers: Answers
) -> None:
    data = noise(B) + bytes(B)
    path = source(data)
    assert answers(path, asks(bytes(2 * B))) == [Data(0, data[:B])]
    assert answers(path, Zero(0, 2 * B)) == [Data(0, data[:B])]
    assert answers(path, Zero(B, B)) == []


@BOTH
def test_holes_of_the_source_are_zeros(tmp_path: Path, answers: Answers) -> None:
    path = sparse(tmp_path / "source", 40 * MIB, (5 * MIB, noise(B)), (20 * MIB + 50_000, b"x"))
    data = path.read_bytes()
    assert answers(path, asks(data[: 16 * MIB])) == []
    assert answers(path, asks(b"x" * (2 * B), 6 * MIB)) == [Zero(6 * MIB, 2 * B)]
    found = [Data(5 * MIB, noise(B)), Data(20 * MIB, data[20 * MIB : 20 * MIB + B])]
    assert answers(path, Zero(0, 40 * MIB)) == found


@BOTH
def test_rest_is_zeros_where_the_source_has_a_hole(tmp_path: Path, answers: Answers) -> None:
    path = sparse(tmp_path / "source", 40 * MIB, (5 * MIB, noise(B) + bytes(2 * B)), (20 * MIB, b"x" * B))
    there = bytearray(b"?" * (40 * MIB))
    frames = answers(path, Rest(MIB))
    for frame in frames:
        payload = bytes(frame.length) if isinstance(frame, Zero) else bytes(frame.payload)  # type: ignore[union-attr]
        there[frame.position : frame.position + len(payload)] = payload  # type: ignore[union-attr]
    assert there[MIB:] == path.read_bytes()[MIB:]
    assert sum(len(each.payload) for each in frames if isinstance(each, Data)) == 2 * B


def test_a_huge_hole_is_passed_over(tmp_path: Path) -> None:
    """Whoever looks at each block of 8 TiB is not done in time."""
    path = sparse(tmp_path / "source", 2**43, (2**42, b"x"))
    block = b"x" + bytes(B - 1)
    assert extended(path, Zero(0, 2**43)) == [Data(2**42, block)]
    assert extended(path, Rest(0))[1] == Data(2**42, block)
    assert agreed(path, Hole(0, 2**50))[0] == Hole(0, 2**42)
    done = run("checksum", "--digest", "sha256", path)
    assert [type(each) for each in decoded(done.stdout, wire.HASH_STREAM)] == [
        DigestName,
        Zero,
        Asks,
        Zero,
        Rest,
        Done,
    ]


# The end of the source


@pytest.mark.parametrize("more", [1, B - 100, B, 3 * B])
def test_over_pipes_what_lies_beyond_the_end_is_silence(source: Callable[[bytes], Path], more: int) -> None:
    data = noise(2 * B + 100)
    assert extended(source(data), asks(data + bytes(more))) == [Data(2 * B, data[2 * B :])]
    assert extended(source(data), asks(noise(B), 5 * B), Zero(2 * B + 100, more), Zero(9 * B, more)) == []


def test_in_the_agreed_form_what_lies_beyond_the_end_is_said(source: Callable[[bytes], Path]) -> None:
    data = noise(2 * B + 100)
    found = agreed(source(data), asks(with_changes(data, [0]) + bytes(2 * B)), Fence(3))
    assert found[0] == Data(0, data[:B])
    failures = found[1:-1]
    assert [each.position for each in failures if isinstance(each, Failure)] == [2 * B, 3 * B, 4 * B]
    assert all("shorter" in each.reason for each in failures if isinstance(each, Failure))
    assert found[-1] == Fence(3)
    beyond = agreed(source(data), Zero(2 * B, 5 * B), Zero(7 * B, 1))
    assert [each.position for each in beyond] == [2 * B, 2 * B + 100, 7 * B]  # type: ignore[union-attr]
    assert [type(each) for each in beyond] == [Data, Failure, Failure]


def test_what_cannot_be_read_fails_alone(source: Callable[[bytes], Path], loop_device: Callable[..., str]) -> None:
    """Read a loop device whose backing file became shorter."""
    data = noise(16 * B)
    path = source(data)
    device = loop_device(path, "--direct-io=on")
    os.truncate(path, 4 * B)
    found = agreed(device, Asks(0, B, 16 * B, bytes(16 * 32)), Fence(1))
    assert found[0] == Data(0, data[: 4 * B])
    failed = [each.position for each in found if isinstance(each, Failure)]
    assert failed == [at * B for at in range(4, 16)]
    assert all("Input/output error" in each.reason for each in found if isinstance(each, Failure))
    assert found[-1] == Fence(1)


# Holes


def test_holes_are_told(tmp_path: Path) -> None:
    path = sparse(tmp_path / "source", 10 * MIB, (2 * MIB, noise(MIB)), (8 * MIB, noise(MIB)))
    assert agreed(path, Hole(0, 10 * MIB), Fence(1)) == [
        Hole(0, 2 * MIB),
        Hole(3 * MIB, 5 * MIB),
        Hole(9 * MIB, MIB),
        Fence(1),
    ]
    assert agreed(path, Hole(MIB, 10), Hole(2 * MIB, MIB), Hole(9 * MIB, 2**40), Hole(2**40, 5)) == [
        Hole(MIB, 10),
        Hole(9 * MIB, MIB),
    ]


# Greetings


def test_the_digest_is_the_one_that_suits_both(source: Callable[[bytes], Path]) -> None:
    path = source(b"Hello World!")
    fast = dict.fromkeys(digests.NAMES, 10**9)
    here = digests.speeds()
    assert greeted(path, {})["digest"] == "sha3_512"
    assert greeted(path, {"digests": {"sha3_512": 5, "unheard_of": 10**9}})["digest"] == "sha3_512"
    assert greeted(path, {"digests": {**fast, "sha3_512": 1}})["digest"] != "sha3_512"
    if "blake3" in here:
        assert greeted(path, {"digests": fast})["digest"] == "blake3"
        assert greeted(path, {"digests": {**fast, "blake3": 1}})["digest"] != "blake3"


@pytest.mark.parametrize(
    "offered", [{}, {"md5": 1000}, [], {"sha256": "fast"}, {"sha256": -1}, 7, {"sha256": True}]
)
def test_without_a_common_digest_there_is_no_form(source: Callable[[bytes], Path], offered: object) -> None:
    done = run("retrieve", source(b""), input=stream_of(Hello({"digests": offered}), DONE))
    failed(done, 1, b"without a digest that both ends have", stdout=b"")


def test_a_greeting_may_come_again_and_agree_anew(source: Callable[[bytes], Path]) -> None:
    data = noise(2 * B)
    first, second = {"digests": {"sha256": 1}}, {"digests": {"blake2b": 1}}
    questions = [asks(data), Hello(second), asks(data, digest=digests.named("blake2b")), Hash(0, 5, NO_DIGEST)]
    again, last = agreed(source(data), *questions, greeting=first)
    assert isinstance(again, Hello)
    assert again.facts["digest"] == "blake2b"
    assert last == Data(0, data[:5])


@pytest.mark.parametrize("message", [asks(b"abc"), Zero(0, 5), Hole(0, 5), Fence(1)])
def test_no_such_question_without_an_opening(source: Callable[[bytes], Path], message: Message) -> None:
    done = run("retrieve", source(noise(100)), input=stream_of(message, DONE))
    failed(done, 1, b"before `helo`", stdout=b"")


@pytest.mark.parametrize("message", [Hole(0, 5), Fence(1), Hello({}), DigestName("sha256")])
def test_over_pipes_there_is_nothing_of_the_agreed_form(source: Callable[[bytes], Path], message: Message) -> None:
    done = run("retrieve", source(noise(100)), input=stream_of(DigestName("sha256"), message, DONE))
    failed(done, 1, stdout=b"")


def test_digests_of_another_length_are_refused(source: Callable[[bytes], Path]) -> None:
    done = run(
        "retrieve", source(noise(100)), input=stream_of(DigestName("sha256"), Asks(0, B, 100, bytes(64)), DONE)
    )
    failed(done, 1, b"other digests than sha256", stdout=b"")


@pytest.mark.parametrize("name", ["md5", "", "sha256\n"])
def test_a_digest_that_is_not_known_is_refused(source: Callable[[bytes], Path], name: str) -> None:
    done = run("retrieve", source(noise(100)), input=stream_of(DigestName(name), DONE))
    failed(done, 1, b"there is no digest", stdout=b"")


def test_a_lone_run_is_answered_at_once(source: Callable[[bytes], Path]) -> None:
    data = noise(5 * B)
    with subprocess.Popen(
        [*BLOCKCOPY, "retrieve", str(source(data))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        decoder = FedDecoder(wire.NEGOTIATED_BLOCK_STREAM)

        def answer() -> Message:
            assert process.stdout is not None
            while (message := decoder.next()) is None:
                assert select.select([process.stdout], [], [], PATIENCE)[0], "no answer"
                decoder.feed(os.read(process.stdout.fileno(), MIB))
            return message

        process.stdin.write(encode(Hello(GREETING)))
        assert isinstance(answer(), Hello)
        for number in range(3):
            process.stdin.write(encode(Asks(0, B, 2 * B, bytes(64))))
            assert answer() == Data(0, data[: 2 * B])
            process.stdin.write(encode(Fence(number)))
            assert answer() == Fence(number)
        process.stdin.write(encode(DONE))
        assert process.wait(PATIENCE) == 0


# Compression

TEXT = b"to be compressed " * (2 * MIB // 17 + 1)


def unpacked(frames: list[Message]) -> bytes:
    return b"".join(zstd.expand(each) if isinstance(each, ZstdData) else each.payload for each in frames)  # type: ignore[union-attr]


needs_zstd = pytest.mark.skipif(not zstd.available(), reason="this host has no zstd")


@needs_zstd
@pytest.mark.parametrize("level", ["zstd", "zstd:1", "zstd:19"])
def test_zstd_is_used_where_it_is_smaller(source: Callable[[bytes], Path], level: str) -> None:
    data = TEXT[:MIB] + noise(MIB)
    first, second = extended(source(data), Rest(0), options=("--compress", level))
    assert (type(first), second) == (ZstdData, Data(MIB, data[MIB:]))
    assert unpacked([first, second]) == data


@needs_zstd
def test_zstd_answers_the_original_form_too(source: Callable[[bytes], Path]) -> None:
    done = run("retrieve", "--compress", "zstd", source(TEXT[:B]), input=stream_of(Hash(0, B, NO_DIGEST), DONE))
    frame, _ = decoded(done.stdout, wire.BLOCK_STREAM)
    assert isinstance(frame, ZstdData)
    assert unpacked([frame]) == TEXT[:B]


@needs_zstd
def test_where_nothing_holds_the_output_up_auto_sends_it_as_it_is(source: Callable[[bytes], Path]) -> None:
    assert extended(source(TEXT[:B]), Rest(0), options=("--compress", "auto")) == [Data(0, TEXT[:B])]


@needs_zstd
def test_where_the_output_is_slow_auto_compresses(source: Callable[[bytes], Path]) -> None:
    """Read 64 KiB at a time, with pauses."""
    data = TEXT * 16
    command = [*BLOCKCOPY, "retrieve", "--compress", "auto", str(source(data))]
    question = stream_of(DigestName("sha256"), Rest(0), DONE)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(question)
        stream = b""
        while piece := process.stdout.read(64 * 1024):
            stream += piece
            select.select([], [], [], 0.01)
    frames = decoded(stream, wire.BLOCK_STREAM)[:-1]
    assert unpacked(frames) == data
    assert {type(each) for each in frames} == {Data, ZstdData}


def test_compression_is_agreed_on(source: Callable[[bytes], Path]) -> None:
    path = source(TEXT[:MIB])
    told = greeted(path, {"compress": {"name": "zstd", "level": 3}})["compress"]
    assert told == ("zstd" if zstd.available() else "none")
    for nothing in ({}, {"compress": {"name": "lzo"}}, {"compress": 7}, {"compress": None}):
        assert greeted(path, nothing)["compress"] == "none"


@needs_zstd
@pytest.mark.parametrize("level", [-(10**9), 0, 22, 2**60, "9", None, True])
def test_no_level_is_taken_beyond_the_bounds(source: Callable[[bytes], Path], level: object) -> None:
    greeting = {**GREETING, "compress": {"name": "zstd", "level": level}}
    frames = agreed(source(TEXT[:MIB]), Asks(0, B, MIB, bytes(8 * 32)), greeting=greeting)
    assert [type(each) for each in frames] == [ZstdData]
    assert unpacked(frames) == TEXT[:MIB]


def without_zstd(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which Python finds no zstd."""
    (tmp_path / "hidden" / "backports").mkdir(parents=True)
    (tmp_path / "hidden" / "backports" / "zstd.py").write_text("raise ImportError")
    (tmp_path / "hidden" / "backports" / "__init__.py").touch()
    return {**os.environ, "PYTHONPATH": str(tmp_path / "hidden")}


@pytest.mark.skipif(zstd.available() and zstd._module().__name__ == "compression.zstd", reason="has its own")
def test_a_host_without_zstd(tmp_path: Path, source: Callable[[bytes], Path]) -> None:
    path, env = source(b"abc"), without_zstd(tmp_path)
    greeting = Hello({"compress": {"name": "zstd", "level": 3}})
    hello, _ = decoded(run("retrieve", path, input=stream_of(greeting, DONE), env=env).stdout)
    assert isinstance(hello, Hello)
    assert hello.facts["compress"] == "none"
    refused = run("retrieve", "--compress", "zstd", path, input=b"done", env=env)
    failed(refused, 1, b"backports.zstd", stdout=b"")
    assert run("retrieve", "--compress", "auto", path, input=b"done", env=env).returncode == 0
    rejected = run("save", path, input=stream_of(ZstdData(0, b"any")), env=env)
    failed(rejected, 1, b"backports.zstd")


# checksum --digest


def checksummed(
    path: object, *options: object, digest: str = "sha256", input: bytes | None = None
) -> list[Message]:
    done = run("checksum", "--digest", digest, *options, path, input=input)
    succeeded(done)
    opening, *found, last = decoded(done.stdout, wire.HASH_STREAM)
    assert (opening, last) == (DigestName(digest), DONE)
    return found


def plain(found: list[Message]) -> list[Message]:
    """Return `found` with bytes in place of views, which cannot be compared."""
    return [each._replace(digests=bytes(each.digests)) if isinstance(each, Asks) else each for each in found]


@pytest.mark.parametrize(
    ("digest", "size"),
    [(digest, 33 * B) for digest in sorted(digests.speeds())]
    + [("sha256", size) for size in (0, 1, B, 9 * B + 777)],
)
def test_every_digest_asks_in_runs(source: Callable[[bytes], Path], digest: str, size: int) -> None:
    data = noise(size)
    runs = [asks(data[at : at + 4 * MIB], at, digest=digests.named(digest)) for at in range(0, len(data), 4 * MIB)]
    assert plain(checksummed(source(data), digest=digest)) == [*runs, Rest(size)]
    assert plain(checksummed("-", digest=digest, input=data)) == runs


def test_zeros_of_the_destination_are_told_as_such(tmp_path: Path) -> None:
    data = noise(B) + bytes(9 * B) + noise(2 * B) + bytes(3)
    found = [asks(data[:B]), Zero(B, 9 * B), asks(data[10 * B : 12 * B], 10 * B), Zero(12 * B, 3), Rest(len(data))]
    assert plain(checksummed(written(tmp_path / "written", data))) == found
    holes = sparse(tmp_path / "sparse", len(data), (0, data[:B]), (10 * B, data[10 * B : 12 * B]))
    assert plain(checksummed(holes)) == found
    assert plain(checksummed("-", input=data)) == found[:-1]


def test_a_part_is_asked_in_blocks_from_its_start(source: Callable[[bytes], Path]) -> None:
    data = noise(5 * B)
    found = plain(checksummed(source(data), "--start", 1000, "--end", 3 * B))
    assert found == [asks(data[1000 : 3 * B], 1000)]
    assert plain(checksummed(source(data), "--start", 5 * B)) == [Rest(5 * B)]


def test_auto_is_a_digest_of_this_host(source: Callable[[bytes], Path]) -> None:
    done = run("checksum", "--digest", "auto", source(b"abc"))
    opening = decoded(done.stdout, wire.HASH_STREAM)[0]
    assert isinstance(opening, DigestName)
    assert opening.name in digests.speeds()


def test_a_digest_that_this_host_has_not_is_told(tmp_path: Path, source: Callable[[bytes], Path]) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "blake3.py").write_text("raise ImportError")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "hidden")}
    done = run("checksum", "--digest", "blake3", source(b"abc"), env=env)
    failed(done, 1, b"-m pip install 'blake3>=", stdout=b"")
    assert run("checksum", "--digest", "auto", source(b"abc"), env=env).stdout.startswith(b"dgst")
    refused = run("retrieve", source(b"abc"), input=stream_of(DigestName("blake3"), DONE), env=env)
    failed(refused, 1, b"-m pip install 'blake3>=", stdout=b"")


def test_the_original_form_is_not_hashed_where_it_is_zeros(tmp_path: Path) -> None:
    """2 GiB of hole take no time, although each block has its message."""
    path = sparse(tmp_path / "file", 2**31)
    done = run("checksum", path)
    zeros = hashlib.sha3_512(bytes(B)).digest()
    assert done.returncode == 0
    assert len(done.stdout) == 2**31 // B * 80 + 16
    assert done.stdout.count(zeros) == 2**31 // B
    assert run("retrieve", path, input=done.stdout).stdout == b"done"


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("none", CompressionSpec()),
        ("auto", CompressionSpec("auto")),
        ("zstd", CompressionSpec("zstd")),
        ("zstd:19", CompressionSpec("zstd", 19)),
    ],
)
def test_a_compression_is_the_same_as_an_option_and_in_a_greeting(text: str, spec: CompressionSpec) -> None:
    assert CompressionSpec.parse(text) == spec
    assert CompressionSpec.parse(str(spec)) == spec
    if zstd.available():
        assert CompressionSpec.from_greeting(spec.to_greeting()) == spec


@pytest.mark.parametrize("text", ["", "zstd:", "zstd:0", "zstd:20", "zstd:x", "auto:3", "none:1", "lzma"])
def test_any_other_compression_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="zstd:1 to zstd:19"):
        CompressionSpec.parse(text)


def test_a_later_greeting_cannot_choose_another_digest() -> None:
    identity = {"size": 0, "sample": []}
    handshake = Handshake()
    for name in ("sha256", "sha256"):
        (greeting,) = decoded(source_greeting(identity, name, "none"))
        assert handshake.read(greeting) == (identity, name, None)
    (other,) = decoded(source_greeting(identity, "sha3_512", "none"))
    with pytest.raises(StreamError, match="no agreement"):
        handshake.read(other)
