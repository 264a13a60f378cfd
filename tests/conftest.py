"""Fixtures for every level. What they are made of is in support.py."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import support


@pytest.fixture(autouse=True)
def nothing_left_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """A mount, process, thread or file descriptor that outlives its test fails it."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(support.TEST_ID, mark)
    # Where states are kept: a test knows nothing of another, nor of what this machine is used for.
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path_factory.mktemp("state")))
    ours = tmp_path_factory.getbasetemp()
    mounts, threads, descriptors = (
        support.fuse_mounts(below=ours),
        set(threading.enumerate()),
        support.descriptors(),
    )
    yield
    left = [f"process {each}" for each in support.reap(mark)]
    left += [f"mount {each}" for each in support.clear_mounts(support.fuse_mounts(below=ours) - mounts)]
    left += [f"thread {each.name}" for each in support.threads_left(threads)]
    left += [f"descriptor {each}" for each in support.descriptors() - descriptors]
    assert not left, f"left behind: {left}"


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Write `DATA` of the test's module to a new file, and return its path."""
    return support.written(tmp_path / "source", request.module.DATA)


@pytest.fixture
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Write `OLD` of the test's module to a new file, and return its path. Without `OLD` the file is missing."""
    path = tmp_path / "destination"
    return support.written(path, request.module.OLD) if hasattr(request.module, "OLD") else path


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Attach a file to a loop device: `loop_device(path)` → /dev/loopN, detached after the test."""
    support.require_root()
    with ExitStack() as stack:

        def attach(path: Path, *options: str) -> str:
            device = support.output("losetup", "--find", "--show", *options, str(path)).strip()
            stack.callback(support.output, "losetup", "--detach", device)
            return device

        yield attach


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., support.Mount]]:
    """Mount a replica: `mount(source, destination, *options, program=…)`, unmounted after the test."""
    support.require_fuse()
    with ExitStack() as stack:

        def make(*args: object, **options: object) -> support.Mount:
            point = tmp_path / f"mnt{uuid.uuid4().hex[:6]}"
            point.mkdir()
            made = support.Mount(point, *args, **options)
            stack.callback(made.clear)
            return made

        yield make


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[support.Sshd]:
    """A real sshd on loopback, with keys of its own."""
    support.require_sshd()
    with support.Sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(scope="session")
def original() -> list[str]:
    """The original program, where BLOCKCOPY_ORIGINAL names its blockcopy.py."""
    path = os.environ.get("BLOCKCOPY_ORIGINAL")
    if not path:
        pytest.skip("BLOCKCOPY_ORIGINAL does not name the original blockcopy.py")
    return [support.PYTHON, path]
