"""tools/fuzz without atheris: each target accepts its own seeds, so a campaign begins with valid inputs."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import checkout

FUZZ = Path(__file__).resolve().parent.parent / "tools" / "fuzz"


class FuzzedDataProvider:
    """atheris.FuzzedDataProvider, as far as tools/fuzz uses it: bytes from the front, numbers from the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def remaining_bytes(self) -> int:
        """Return the number of bytes that were not consumed."""
        return len(self._data)

    def ConsumeBytes(self, count: int) -> bytes:
        """Consume up to `count` bytes from the front."""
        consumed, self._data = self._data[:count], self._data[count:]
        return consumed

    def ConsumeIntInRange(self, low: int, high: int) -> int:
        """Consume as many bytes from the end as a number from `low` to `high` needs."""
        count = ((high - low).bit_length() + 7) // 8
        number = 0
        for _ in range(min(count, len(self._data))):
            number = number << 8 | self._data[-1]
            self._data = self._data[:-1]
        return low + number % (high - low + 1)


@pytest.fixture
def fuzz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load the program as a module, with a stand-in for atheris."""
    atheris = SimpleNamespace(
        instrument_imports=lambda include: contextlib.nullcontext(), FuzzedDataProvider=FuzzedDataProvider
    )
    monkeypatch.setitem(sys.modules, "atheris", atheris)
    monkeypatch.setattr(checkout, "use_environment", lambda: None)
    monkeypatch.setenv("BLOCKCOPY_FUZZ_SCRATCH", str(tmp_path))
    monkeypatch.setattr("logging.disable", lambda level: None)
    spec = importlib.util.spec_from_loader("fuzz", SourceFileLoader("fuzz", str(FUZZ)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["decoder", "expand", "state"])
def test_targets_accept_their_seeds(fuzz: ModuleType, name: str) -> None:
    target = fuzz.TARGETS[name]
    for seed in target.seeds():
        target.run(seed)


def test_decoder_seeds_settle_all_batches(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[int] = []
    monkeypatch.setattr(fuzz.streams, "check_answers", lambda dialect, batches, done: settled.append(len(done)))
    for seed in fuzz.streams.decoder_seeds():
        fuzz.streams.decode(seed)
    assert set(settled) == {len(fuzz.streams.ASKED)}


def test_state_seeds_are_believed(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    believed = []
    monkeypatch.setattr(fuzz.states, "check_record", believed.append)
    for seed in fuzz.states.state_seeds():
        fuzz.states.open_state(seed)
    assert len(believed) >= len(fuzz.states.state_files())
