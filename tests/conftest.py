"""Fixtures that several test files use. Their parts are in support.py."""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import support
from forkserver import ForkServer

from libc import CLONE_NEWNS, call


def pytest_sessionstart() -> None:
    """Give each process of tests a mount namespace of its own, if this is root.

    Many tests make namespaces. Those would hold copies of the mounts of other tests, and keep their disks busy.
    """
    if os.geteuid() == 0:
        with contextlib.suppress(PermissionError):  # a container without that right
            call("unshare", CLONE_NEWNS)
            support.output("mount", "--make-rprivate", "/")


@pytest.fixture(scope="session", autouse=True)
def forkserver() -> Iterator[None]:
    """Start the process that forks for the commands of `support.run`."""
    server = ForkServer(support.TEST_ID)
    support.SERVERS.append(server)
    yield
    support.SERVERS.remove(server)
    server.close()


@pytest.fixture(scope="session")
def state_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder for the folders of state files."""
    return tmp_path_factory.mktemp("states")


@pytest.fixture(autouse=True)
def nothing_left_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, state_folders: Path
) -> Iterator[None]:
    """Fail a test that leaves a mount, process, thread or file descriptor behind."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(support.TEST_ID, mark)
    # The folder of state files: a test must not see those of other tests, nor of this machine.
    states = state_folders / mark
    states.mkdir(mode=0o700)
    monkeypatch.setenv("STATE_DIRECTORY", str(states))
    ours = tmp_path_factory.getbasetemp()
    mounts, processes, threads, descriptors = (
        support.fuse_mounts(below=ours),
        support.processes(),
        set(threading.enumerate()),
        support.descriptors(),
    )
    yield
    left = [f"process {each}" for each in support.reap(mark, processes)]
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
    """Return a function that attaches a file to a loop device: `loop_device(path, *options)` → "/dev/loopN".

    The devices are detached after the test.
    """
    support.require_root()
    with ExitStack() as stack:

        def attach(path: Path, *options: str) -> str:
            device = support.output("losetup", "--find", "--show", *options, str(path)).strip()
            stack.callback(support.output, "losetup", "--detach", device)
            return device

        yield attach


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., support.Mount]]:
    """Return a function that mounts a replica: `mount(source, destination, *options, program=…)` → Mount.

    The replicas are unmounted after the test.
    """
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
    """Start an sshd on loopback, with keys of its own. It serves all tests of a session."""
    support.require_sshd()
    with support.Sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(scope="session")
def original() -> list[str]:
    """Return the command line of the original program. Skip the test if BLOCKCOPY_ORIGINAL does not name it."""
    path = os.environ.get("BLOCKCOPY_ORIGINAL")
    if not path:
        pytest.skip("BLOCKCOPY_ORIGINAL does not name the original blockcopy.py")
    return [support.PYTHON, path]
