"""Files of earlier versions: state files are resumed, recorded peers are understood, interfaces are kept."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import record_golden as golden
import support
from record_golden import BLOCK_SIZE, CONVERSATIONS, DESTINATION, GOLDEN, PAGE, PRESENT, SOURCE, WRITTEN_AT
from support import PYTHON, STANDINS, FedDecoder, Mount, run, succeeded, written

from blockcopy.block import user_writes
from blockcopy.block.device import open_source
from blockcopy.block.identity import destination_identity, source_identity
from blockcopy.block.records import default_path
from blockcopy.protocol import wire, zstd
from blockcopy.protocol.compression import expand
from blockcopy.replica.state import statefile

DATA, OLD = SOURCE, DESTINATION
COPIED = DATA[: len(PRESENT) * BLOCK_SIZE] + OLD[len(PRESENT) * BLOCK_SIZE :]
"""The destination of a state file: PRESENT are copied."""

VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
RELEASED = [name for name in VERSIONS if (GOLDEN / name / "interface.xz").exists()]
STATES = sorted(path.name[:-3] for path in GOLDEN.glob("*/*.state.xz"))


def files(pattern: str) -> list[Any]:
    """Return a parameter for each golden file of this `pattern`: version, name."""
    found = [path.relative_to(GOLDEN) for path in sorted(GOLDEN.glob(f"*/{pattern}.xz"))]
    return [pytest.param(path.parent.name, path.name.removesuffix(".xz"), id=str(path)[:-3]) for path in found]


# State files


def rebound(version: str, name: str, source: Path, destination: Path) -> Path:
    """Make the golden state file `name` the one of `destination`, and return its path.

    The identities and times in it become those of today's two files. All else stays as the old program wrote it,
    and an identity gets no field that the old one lacks.
    """
    with open_source(str(source)) as near, open_source(str(destination)) as far:
        path = default_path(far)
        written(path, golden.content(version, name)).chmod(0o600)
        status = destination.stat()
        with closing(sqlite3.connect(path)) as db:
            facts = json.loads(db.execute("SELECT text FROM facts").fetchone()[0])
            for end, today in (("source", source_identity(near)), ("destination", destination_identity(far))):
                facts["binding"][end] = {field: today[field] for field in facts["binding"][end]}
            facts["clock"].update(mtime_ns=status.st_mtime_ns, ctime_ns=status.st_ctime_ns)
            text = json.dumps(facts)
            db.execute("UPDATE facts SET text = ?, seal = ?", (text, statefile._seal("facts", text.encode())))
            db.commit()
    return path


@pytest.mark.parametrize(("version", "name"), files("read-only.state"))
def test_a_copy_resumes_from_an_old_state_file(source: Path, destination: Path, version: str, name: str) -> None:
    written(destination, COPIED)
    rebound(version, name, source, destination)
    done = run("sync", "-q", "--json", source, destination)
    succeeded(done)
    assert json.loads(done.stdout)["resumed_bytes"] == len(PRESENT) * BLOCK_SIZE
    assert destination.read_bytes() == DATA


@pytest.mark.parametrize(("version", "name"), files("writable.state"))
def test_writes_of_a_user_are_kept_by_an_old_state_file(
    source: Path, destination: Path, tmp_path: Path, version: str, name: str
) -> None:
    support.require_fuse()
    wanted = bytearray(DATA)
    wanted[WRITTEN_AT : WRITTEN_AT + len(PAGE)] = PAGE
    before = bytearray(COPIED)
    before[WRITTEN_AT : WRITTEN_AT + len(PAGE)] = PAGE
    written(destination, bytes(before))
    with open_source(str(destination)) as device:
        note = golden.content(version, name.replace(".state", ".writes")).splitlines(keepends=True)
        note[1] = b"\n"  # the state file is in its default place
        written(user_writes.note_path(device), b"".join(note))
        device.set_attribute(user_writes._ATTRIBUTE, f"{note[2].decode().strip()} {int(note[4])}".encode())
    rebound(version, name, source, destination)
    (tmp_path / "mnt").mkdir()
    mount = Mount(tmp_path / "mnt", source, destination, "--writable", wait=True)
    status = mount.status()
    assert (status["resumed_bytes"], status["written_bytes"]) == (len(PRESENT) * BLOCK_SIZE, BLOCK_SIZE)
    assert mount.file.read_bytes() == wanted
    mount.umount()
    assert destination.read_bytes() == wanted


# Recorded peers


@pytest.fixture(scope="module", params=RELEASED)
def old_stages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write the stages of an earlier version, and return the command line that runs them."""
    stages = json.loads(golden.content(request.param, "stages"))
    folder = tmp_path_factory.mktemp("stages") / "program"
    golden.write_stages(stages["modules"], stages["packages"], folder)
    return f"{PYTHON} -P {folder}"


LINK = f"{PYTHON} {STANDINS / 'link'}"


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_a_sync_speaks_with_an_old_source(source: Path, destination: Path, old_stages: str, compress: str) -> None:
    done = run("sync", "-q", "--json", "--verify", f"--compress={compress}", "--blockcopy-path", old_stages,
               source, destination)  # fmt: skip
    succeeded(done)
    assert destination.read_bytes() == DATA
    assert json.loads(done.stdout)["same_bytes"] == len(DATA) - 3 * BLOCK_SIZE - 1000  # the rest did not travel


def test_a_sync_over_several_connections_speaks_with_an_old_source(
    source: Path, destination: Path, old_stages: str
) -> None:
    succeeded(run("sync", "-q", "-e", LINK, "--connections", 3, "--blockcopy-path", old_stages,
                  f"host:{source}", destination))  # fmt: skip
    assert destination.read_bytes() == DATA


@pytest.mark.parametrize("connections", ["1", "3"])
def test_a_push_speaks_with_an_old_destination(
    source: Path, destination: Path, old_stages: str, connections: str
) -> None:
    succeeded(run("sync", "-q", "-e", LINK, "--connections", connections, "--blockcopy-path", old_stages,
                  source, f"host:{destination}"))  # fmt: skip
    assert destination.read_bytes() == DATA


def recorded(version: str, name: str, end: str) -> list[wire.Message]:
    """Return the messages of the `end` of a recorded conversation, as this program reads them."""
    commands = wire.NEGOTIATED_BLOCK_STREAM if end == "source" else wire.HASH_STREAM
    return read(golden.content(version, f"{name}.{end}"), commands)


def read(stream: bytes, commands: Any = wire.NEGOTIATED_BLOCK_STREAM) -> list[wire.Message]:
    decoder = FedDecoder(commands)
    decoder.feed(stream)
    found = list(iter(decoder.next, None))
    decoder.feed_eof()
    return found


def answers(messages: list[wire.Message]) -> list[object]:
    """Return what `messages` say, without what one compressor or host does otherwise than another."""
    found: list[object] = []
    for each in messages:
        if isinstance(each, wire.Hello):
            found.append((each.facts["protocol"], each.facts["digest"], each.facts["compress"]))
        elif isinstance(each, (wire.Data, wire.ZstdData)):
            found.append((each.position, bytes(expand(each))))
        else:
            found.append(each)
    return found


@pytest.mark.parametrize("version", RELEASED)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_an_old_client_gets_the_answers_that_it_got(source: Path, tmp_path: Path, version: str, name: str) -> None:
    if name.endswith("zstd") and not zstd.available():
        pytest.skip("this host has no zstd")
    recorded(version, name, "client")
    done = run("retrieve", source, input=golden.content(version, f"{name}.client"))
    succeeded(done)
    assert answers(read(done.stdout)) == answers(recorded(version, name, "source"))


@pytest.mark.parametrize("version", RELEASED)
def test_old_answers_are_saved(destination: Path, version: str) -> None:
    succeeded(run("save", destination, input=golden.content(version, "extended.source")))
    assert destination.read_bytes() == DATA


@pytest.mark.parametrize("version", RELEASED)
def test_the_answers_of_an_old_push_are_received(destination: Path, version: str) -> None:
    succeeded(run("receive", destination, input=golden.content(version, "push.source")))
    assert destination.read_bytes() == DATA


# Interfaces


@pytest.mark.parametrize("version", RELEASED)
def test_no_option_exit_status_or_metric_is_lost(version: str) -> None:
    before, today = json.loads(golden.content(version, "interface")), golden.interface()
    for command, options in before["options"].items():
        assert set(options) <= set(today["options"][command]), command
    assert before["exit statuses"].items() <= today["exit statuses"].items()
    assert set(before["metrics"]) <= set(today["metrics"])


@pytest.mark.parametrize("version", RELEASED)
def test_json_keeps_its_fields_and_their_types(
    source: Path, destination: Path, tmp_path: Path, version: str
) -> None:
    support.require_fuse()
    shutil.copy(source, tmp_path / "copy")
    (tmp_path / "mnt").mkdir()
    mount = Mount(tmp_path / "mnt", source, tmp_path / "copy", wait=True)
    today = {
        "status": mount.status(),
        "sync": json.loads(run("sync", "-q", "--json", source, destination).stdout),
        "verify": json.loads(run("verify", "-q", "--json", source, destination).stdout),
        "states": json.loads(run("state", "list", "--json").stdout),
        "discard": json.loads(run("discard-writes", "--dry-run", "--json", destination).stdout),
    }
    mount.umount()
    for name, value in today.items():
        before = json.loads(golden.content(version, name))
        if name == "states":
            before, value = before[0], value[0]
        assert_kept(name, golden.types_of(before), golden.types_of(value))


def assert_kept(name: str, before: Any, today: Any) -> None:
    """Check that the types `today` have all that `before` has. A null may be anything."""
    if isinstance(before, dict):
        for field, kind in before.items():
            assert field in today, f"{name}.{field}"
            assert_kept(f"{name}.{field}", kind, today[field])
    elif "NoneType" not in (before, today):
        assert before == today, name
