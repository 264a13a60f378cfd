"""tools/bench: its arithmetic, and runs too small for meaningful figures."""

from __future__ import annotations

import json
import signal
import socket
import socketserver
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import support
from support import PYTHON, failed

from benchmarks import data, memory, tables
from benchmarks.bench import Bench
from benchmarks.ground import BenchError
from benchmarks.results import Results

BENCH = Path(__file__).resolve().parent.parent / "tools" / "bench"
SIZE = 8 * data.MIB


def test_whether_free_memory_is_given_back_is_told_by_the_balloon(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "BALLOONS", tmp_path)
    assert not memory.is_given_back()
    (tmp_path / "virtio0").mkdir()
    features = tmp_path / "virtio0" / "features"
    features.write_text("0110000100\n")
    assert not memory.is_given_back()
    features.write_text("0110010100\n")
    assert memory.is_given_back()


def test_memory_is_touched_and_not_kept():
    def kib(what):
        return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current size
    before, size = kib("VmRSS"), 64 << 10
    memory.touch(size << 10)
    assert kib("VmHWM") > before + size // 2
    assert kib("VmRSS") < before + size // 2


def command(folder: Path, *words: object) -> list[str]:
    return [PYTHON, *map(str, (BENCH, "--quick", "--size", 8, "--folder", folder, *words))]


def test_medians_and_ratios() -> None:
    group = Results().group("part", "case", reference="slow")
    for seconds in (4.0, 100.0, 5.0):
        group.add("slow", seconds=seconds, first=10.0)
    group.add("fast", seconds=0.5, first=40.0)
    group.add("other", peak=3.0)
    assert group.median("slow", "seconds") == 5
    assert group.ratio("fast", "seconds") == 10  # less is better
    assert group.ratio("fast", "first") == 4  # more is better
    assert group.ratio("other", "peak") is None  # the reference lacks this figure
    assert "0.50 (10.0×)" in tables.table(group)


def test_order_alternates() -> None:
    class Args:
        runs = 3

    bench = Bench(Args(), ground=None)
    assert [(run, item) for run, item in bench.alternating("ab")] == [
        *[(0, "a"), (0, "b")],
        *[(1, "b"), (1, "a")],
        *[(2, "a"), (2, "b")],
    ]


def test_cases_are_what_they_say(tmp_path: Path) -> None:
    made = {case.name: case for case in data.cases(tmp_path, SIZE, seed=3)}
    for case in made.values():
        source, before = case.source.read_bytes(), case.before.read_bytes()
        assert len(source) == len(before) == SIZE
        destination = support.written(tmp_path / "destination", before)
        if case.differing:
            with pytest.raises(BenchError, match="differs from the source"):
                data.compare(case.source, destination, "nobody")
        data.copy(case.source, destination, case.differing)
        data.compare(case.source, destination, "everybody")
        assert destination.read_bytes() == source
    blocks = SIZE // data.BLOCK
    assert len(made["5 % differ"].differing) == blocks // 20
    half = made["source half zero"].source
    assert half.read_bytes()[SIZE // 2 :] == bytes(SIZE // 2)
    assert half.stat().st_blocks * 512 >= SIZE  # written out


def test_seed_decides_the_data(tmp_path: Path) -> None:
    one, same, other = (data.noise(tmp_path / str(n), [(0, 5000)], 9000, seed) for n, seed in enumerate("112"))
    assert one.read_bytes() == same.read_bytes() != other.read_bytes()
    assert one.read_bytes()[5000:] == bytes(4000)


def test_compare_sees_one_byte_in_a_hole(tmp_path: Path) -> None:
    size = 64 * data.MIB
    source = data.noise(tmp_path / "source", [], size, 0)
    destination = data.noise(tmp_path / "destination", [], size, 0)
    data.compare(source, destination, "holes")
    with destination.open("r+b") as file:
        file.seek(size - 1)
        file.write(b"x")
    with pytest.raises(BenchError, match="from"):
        data.compare(source, destination, "holes")


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(1 << 16):
            self.request.sendall(data)


def said_back(port: int, data: bytes) -> bytes:
    """Send `data` and the end, and return all that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=50) as connection:
        sending = threading.Thread(target=lambda: (connection.sendall(data), connection.shutdown(socket.SHUT_WR)))
        sending.start()
        got = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        sending.join()
    return got


def test_the_relay_delays_each_byte_and_all_connections_share_the_rate() -> None:
    relay = [PYTHON, "-I", str(Path(data.__file__).with_name("relay.py"))]
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        words = [*relay, str(server.server_address[1]), "100", "1000000"]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
            try:
                port = int(process.stdout.readline())
                began = time.monotonic()
                with socket.create_connection(("127.0.0.1", port), timeout=50) as connection:
                    connection.sendall(b"1")
                    assert connection.recv(1) == b"1"
                    assert time.monotonic() - began >= 0.2  # the handshake, then the byte
                    began = time.monotonic()
                    connection.sendall(b"2")
                    assert connection.recv(1) == b"2"
                    assert 0.1 <= time.monotonic() - began < 5
                sent = [support.noise(300_000, seed=seed) for seed in (1, 2)]
                began = time.monotonic()
                with ThreadPoolExecutor() as pool:
                    assert list(pool.map(partial(said_back, port), sent)) == sent
                assert 0.7 <= time.monotonic() - began < 20
            finally:
                process.terminate()
                server.shutdown()


@pytest.mark.long
@pytest.mark.timeout(120)
def test_copies_are_measured_and_nothing_is_left(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    words = command(tmp_path, "--parts", "sync,cpu", "--json", target)
    done = subprocess.run(words, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    groups = {group["case"]: group for group in json.loads(target.read_text())["groups"]}
    assert set(groups) == {"equal", "5 % differ", "destination zero", "source half zero"}
    for group in groups.values():
        ours = group["rows"]["blockcopy sync"]
        assert ours["seconds"]["median"] > 0
        assert ours["seconds"]["times_better_than_reference"] > 0
        assert ours["cpu"]["median"] > 0
        assert ours["peak"]["median"] > 1
        assert group["reference"] == "dd"
    assert "blockcopy sync" in done.stdout
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.long
@pytest.mark.timeout(180)
def test_writes_are_measured_and_nothing_is_left(tmp_path: Path) -> None:
    support.require_fuse()
    target = tmp_path / "figures.json"
    words = command(tmp_path, "--parts", "write", "--json", target)
    done = subprocess.run(words, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    groups = {group["case"]: group["rows"] for group in json.loads(target.read_text())["groups"]}
    assert set(groups) - {"fsync, loop device"} == {"in order", "random", "fsync"}
    assert groups["in order"]["blockcopy mount"]["rate_synced"]["median"] > 0
    assert groups["random"]["blockcopy, missing blocks, hydrating"]["depth_1"]["median"] > 0
    assert groups["fsync"]["blockcopy mount, a new page to record"]["p50"]["times_better_than_reference"] > 0
    assert "fsync, nothing to record: × the destination itself" in done.stdout
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_wrong_copy_fails_loudly(tmp_path: Path) -> None:
    """Measure an original that copies nothing, and ends with status 0."""
    liar = support.written(
        tmp_path / "liar.py", b"import sys; sys.stdin.read() if sys.argv[1] != 'checksum' else 0\n"
    )
    words = command(tmp_path, "--parts", "sync", "--original", liar)
    done = subprocess.run(words, capture_output=True, text=True, timeout=110, check=False)
    failed(done, 1, "original, 3 pipes: the destination differs from the source")


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_signal_takes_everything_down_and_keeps_what_was_measured(tmp_path: Path) -> None:
    """Send the signal in the middle of a mount."""
    support.require_fuse()
    folder, found = tmp_path / "folder", tmp_path / "found"
    folder.mkdir()
    words = command(folder, "--parts", "lazy", "--json", found)
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as bench:
        steps = []
        for line in bench.stderr:
            steps.append(line)
            if "in order: blockcopy" in line:
                break
        bench.send_signal(signal.SIGHUP)
        said, _ = bench.communicate()
    assert bench.returncode == 128 + signal.SIGHUP, "".join(steps)
    assert list(folder.iterdir()) == []
    measured = json.loads(found.read_text())
    assert any(group["rows"] for group in measured["groups"])
    [note] = [each for each in measured["notes"] if "ended in the part lazy" in each]
    assert note in said


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--parts", "sink"], "no part sink"), (["--original", "/nowhere"], "--original: no such program")],
)
def test_what_cannot_be_meant(tmp_path: Path, words: list[str], said: str) -> None:
    done = subprocess.run(command(tmp_path, *words), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []
