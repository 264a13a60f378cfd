"""What a peer says ends its own connection at most: greetings, streams, words; and what is bounded of them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import support
import trio
from hypothesis import given
from hypothesis import strategies as st
from support import BLOCK_SIZE, Mount, noise, until, written
from test_wire_properties import stable

from blockcopy import packing, wire
from blockcopy.decoder import Decoder
from blockcopy.errors import SourceError, StreamError
from blockcopy.handshake import digest_for, read_source
from blockcopy.identity import differences
from blockcopy.progress import Progress
from blockcopy.remote import Location, stage_command
from blockcopy.replica import metrics
from blockcopy.replica.forms import unconditional
from blockcopy.replica.notify import Notifier
from blockcopy.replica.replica import Plan
from blockcopy.replica.retriever import Retriever
from blockcopy.replica.sync import sync

SIZE = 8 * BLOCK_SIZE
DATA = noise(SIZE)

DEEP = '{"identity": ' + "[" * 980 + "]" * 980 + "}"
ODD_JSON = [
    DEEP,
    "[" * 60000,
    '{"digest": []}',
    '{"digest": {}, "identity": 7}',
    '{"identity": {"size": 1e400}}',
    '{"identity": {"size": NaN, "sample": []}}',
    '{"identity": {"size": 1' + "0" * 4000 + ', "sample": []}}',
    '{"identity": {"size": 0, "sample": [], "id": "\\ud800"}, "digest": "sha256"}',
    '{"identity": {"size": 0, "sample": [], "id": [[]]}, "digest": "sha256"}',
    '{"identity": {"size": true, "sample": []}, "digest": "sha256"}',
    '{"digest": "sha256", "digest": []}',
    "{}",
    "7",
    "",
    "\xff",
]
NUMBERS = st.sampled_from(["NaN", "-Infinity", "1e400", "9" * 400, "-0", "1.5", str(2**63)])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.sampled_from(["sha256", "zstd", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
).map(json.dumps)
NAMES = st.sampled_from(
    ["protocol", "program", "digests", "digest", "compress", "identity", "size", "sample", "inode", "level", "name"]
)
OBJECTS = st.recursive(
    VALUES | NUMBERS,
    lambda inner: st.lists(st.tuples(NAMES, inner), max_size=5).map(
        lambda pairs: "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in pairs) + "}"
    ),
    max_leaves=12,
)


def hello(text: str) -> bytes:
    data = text.encode("latin-1")
    return b"helo" + len(data).to_bytes(4, "big") + data


@given(text=st.sampled_from(ODD_JSON) | OBJECTS)
@stable
def test_any_greeting_is_believed_or_a_stream_error(text: str) -> None:
    """Also what is done with the facts of one that is believed, at either end."""
    decoder = Decoder(wire.AGREED_BLOCK_STREAM)
    decoder.feed(hello(text))
    try:
        message = decoder.next()
        assert isinstance(message, wire.Hello)
        wire.encode(message)
        packing.wish_of(message.facts.get("compress"))
        digest_for(message.facts)
    except StreamError:
        return
    try:
        identity, name = read_source(message, ["sha256"])
    except StreamError:
        return
    assert name == "sha256"
    assert differences(identity, {"size": 1, **identity}) == []


def said_by_a_source(folder: Path, stream: bytes) -> list[str]:
    """What is told to whoever greets a source that says this, and to whoever asks it then."""
    said = written(folder / "said", stream)
    program = shlex.join(["sh", "-c", f"echo words >&2; cat {said}; exec cat >/dev/null"])
    told = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            retriever = Retriever(stage_command(Location(None, "source"), program=program), timeout=20)
            await nursery.start(retriever.run)
            for ask in (retriever.greet, lambda: retriever.ask([unconditional(0, 4096)], Kept())):
                try:
                    await ask()
                except SourceError as error:
                    told.append(str(error))
            await retriever.close()

    trio.run(main)
    return told


class Kept:
    """A sink that takes anything."""

    def data(self, position: int, payload: object) -> None: ...

    def zeros(self, position: int, length: int) -> None: ...


@pytest.mark.parametrize("text", ODD_JSON, ids=range(len(ODD_JSON)))
def test_an_odd_greeting_is_the_error_of_its_connection(tmp_path: Path, text: str) -> None:
    assert len(said_by_a_source(tmp_path, hello(text))) >= 1


def test_a_fault_of_ours_is_the_error_of_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is raised in any part of it; and the log has the traceback."""

    def fail(*_: object) -> NoReturn:
        raise RecursionError("on request")

    for owner, name in ((Decoder, "next"), (Retriever, "_note"), (Retriever, "_owes")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail)
            greeting, _ = said_by_a_source(tmp_path, b"fe")
        assert "on request" in greeting
        assert any(record.exc_info for record in caplog.records)
        caplog.clear()


def test_helpers_end_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Progress):
        silent = False

        def update(self, counts: object) -> None:
            raise RuntimeError("the progress")

    def broken(*_: object) -> NoReturn:
        raise RuntimeError("the metrics")

    monkeypatch.setattr(metrics, "_write", broken)
    monkeypatch.setattr(Notifier, "keep_telling", broken)
    source, destination = written(tmp_path / "source", DATA), tmp_path / "destination"
    plan = Plan(
        stage_command(Location(None, str(source))),
        str(destination),
        metrics=str(tmp_path / "metrics"),
        on_complete="true\0",  # no environment can have it
    )
    trio.run(sync, plan, Broken(), Notifier())
    assert destination.read_bytes() == DATA
    told = [record.getMessage() for record in caplog.records if record.exc_info]
    for name in ("sd_notify", "--metrics", "the progress", "--on-complete"):
        assert any(message.startswith(f"{name} ended") for message in told), told


def test_a_live_mount_outlives_a_source_that_garbles_its_greeting(
    tmp_path: Path, mount: Callable[..., Mount]
) -> None:
    """It dies, comes back with an odd greeting, twice, and is itself again the third time."""
    source, destination = written(tmp_path / "source", DATA), tmp_path / "destination"
    counts = tmp_path / "counts"
    counts.mkdir()
    for number, text in enumerate(['{"digest": []}', DEEP]):
        written(tmp_path / f"odd{number}", hello(text))
    faulty = f"{support.FAULTY} --once {tmp_path}/once --die-at 3"
    program = tmp_path / "program"
    program.write_text(
        f"""#!/bin/sh
        test -e {tmp_path}/once || exec {faulty} "$@"
        for number in 0 1; do
            mkdir {counts}/$number 2>/dev/null && {{ cat {tmp_path}/odd$number; exec cat >/dev/null; }}
        done
        exec {faulty} "$@"
        """
    )
    program.chmod(0o755)
    mounted = mount(source, destination, "--log-file", tmp_path / "log", program=str(program))
    until(lambda: len(list(counts.iterdir())) == 2, "two odd greetings")
    assert mounted.status()["state"] in ("reconnecting", "hydrating")
    mounted.wait()
    assert mounted.file.read_bytes() == DATA
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert "no agreement" in log
    assert "nested too deep" in log
