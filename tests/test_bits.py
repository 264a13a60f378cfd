"""Sets of numbers, in rows: against Python's sets."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockcopy.replica.state.bits import ROW_BYTES, Bits, add, next_clear, next_set

ROW = ROW_BYTES * 8
END = 3 * ROW + 77

NUMBERS = st.one_of(
    st.integers(0, END), *(st.integers(max(0, edge - 9), edge + 9) for edge in (0, 8, ROW, 2 * ROW, END - 9))
)


@st.composite
def ranges(draw: st.DrawFn) -> range:
    """Return a range of numbers, often at an edge of a row or a byte, and often short."""
    start = draw(NUMBERS)
    stop = draw(st.one_of(st.integers(start, start + 20), NUMBERS))
    return range(start, max(start, stop))


STEPS = st.lists(st.tuples(st.sampled_from(["add", "add", "discard", "update", "take"]), ranges()), max_size=12)


def joined(parts: list[range]) -> list[int]:
    """Return all numbers of `parts`. Raises AssertionError if the parts are not ascending."""
    numbers = [number for part in parts for number in part]
    assert numbers == sorted(set(numbers))
    assert all(parts), "an empty part"
    return numbers


@settings(derandomize=True, max_examples=150, deadline=None)
@given(STEPS, ranges())
def test_bits_are_a_set_of_numbers(steps: list[tuple[str, range]], asked: range) -> None:
    bits, model = Bits(), set[int]()
    recorded: dict[int, bytes] = {}
    for step, numbers in steps:
        if step == "add":
            assert bits.add(numbers) == len(set(numbers) - model)
            model |= set(numbers)
        elif step == "discard":
            bits.discard(numbers)
            model -= set(numbers)
        elif step == "update":
            other = Bits()
            other.add(numbers)
            bits.update(other)
            model |= set(numbers)
        else:
            recorded.update(bits.take_changes())
    assert joined(list(bits.runs())) == sorted(model)
    assert bits.count() == len(model)
    assert bits.count_in(asked) == len(model & set(asked))
    assert bits.has_any(asked) is bool(model & set(asked))
    assert bits.has_all(asked) is (set(asked) <= model)
    assert joined(list(bits.gaps(asked))) == sorted(set(asked) - model)
    recorded.update(bits.take_changes())
    assert bits.take_changes() == {}
    again = Bits()
    again.load(recorded, END + 30 + ROW)
    assert joined(list(again.runs())) == sorted(model)
    assert again.take_changes() == {}  # they are on record already


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.sets(st.integers(0, 100)), st.integers(0, 120))
def test_the_next_number_is_found(numbers: set[int], start: int) -> None:
    bits = bytearray(13)
    for number in numbers:
        assert add(bits, range(number, number + 1)) == 1
    end = len(bits) * 8
    assert next_set(bits, start) == min((each for each in numbers if each >= start), default=None)
    assert next_clear(bits, start) == min((each for each in range(start, end) if each not in numbers), default=None)


def test_changes_that_were_put_back_are_handed_out_as_they_are_then() -> None:
    bits = Bits()
    bits.add(range(3))
    bits.add(range(2 * ROW, 2 * ROW + 1))
    changes = bits.take_changes()
    assert list(changes) == [0, 2]
    bits.add(range(8, 9))
    bits.restore_changes(changes)
    again = bits.take_changes()
    assert list(again) == [0, 2]
    assert again[0][:2] == bytes([0b111, 1])


def test_what_was_in_the_set_before_is_no_change() -> None:
    bits = Bits()
    bits.add(range(10))
    bits.take_changes()
    bits.add(range(5))
    bits.discard(range(20, 30))
    assert bits.take_changes() == {}
    bits.discard(range(9, 12))
    assert list(bits.take_changes()) == [0]


@pytest.mark.parametrize(
    ("row", "bits"),
    [
        pytest.param(0, b"", id="empty"),
        pytest.param(0, bytes(ROW_BYTES - 1), id="too short"),
        pytest.param(0, bytes(ROW_BYTES + 1), id="too long"),
        pytest.param(-1, bytes(ROW_BYTES), id="before the first"),
        pytest.param(1, b"\x08" + bytes(ROW_BYTES - 1), id="the first number after the last"),
        pytest.param(7, b"\x01" + bytes(ROW_BYTES - 1), id="far after the last"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(row: int, bits: bytes) -> None:
    with pytest.raises(ValueError, match=f"row {row} of {len(bits)} bytes"):
        Bits().load({row: bits}, ROW + 3)
    Bits().load({1: b"\x07" + bytes(ROW_BYTES - 1)}, ROW + 3)


def test_memory_grows_with_the_rows_in_use_alone() -> None:
    tracemalloc.start()
    try:
        bits = Bits()
        for number in (5, 1 << 40, 1 << 60):
            bits.add(range(number, number + 1))
            assert bits.has_all(range(number, number + 1))
        assert not bits.has_any(range(6, 1000 * ROW))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000
