"""Destinations that hold a file system, partition table or the like which the source has not."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest
import support
from support import BLOCKCOPY, failed, noise, run, succeeded, with_changes, written

from blockcopy.block.superblocks import HEAD, superblocks

SIZE = 24 << 20
DATA = noise(3 << 20)

needs_mkfs = pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="mkfs.ext4 is not installed")


PUSH = ["sync", "-e", f"{support.PYTHON} {support.STANDINS / 'link'}", "--python", support.PYTHON]


def ext4(path: Path) -> Path:
    """Make an ext4 of `SIZE` bytes in the file `path`, and return `path`."""
    with path.open("wb") as file:
        file.truncate(SIZE)
    support.output("mkfs.ext4", "-q", "-F", path)
    return path


def uuid_of(path: Path) -> str:
    return str(uuid.UUID(bytes=path.read_bytes()[1024 + 0x68 :][:16]))


@needs_mkfs
def test_a_file_system_that_the_source_has_not_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    destination = ext4(tmp_path / "destination")
    before = destination.read_bytes()
    done = run("sync", source, destination, input=b"y\n")  # no terminal: nobody is asked
    failed(
        done, 1, f"{destination} holds an ext4 file system (UUID {uuid_of(destination)}), which {source} does not"
    )
    assert "--force overwrites it" in done.stderr.decode()
    assert destination.read_bytes() == before
    told = run("sync", "-n", source, destination)
    succeeded(told, "A sync asks before it overwrites that")
    succeeded(run("sync", "--force", source, destination), None)
    assert destination.read_bytes()[: len(DATA)] == DATA


@needs_mkfs
@pytest.mark.parametrize(("answer", "status"), [(b"y\n", 0), (b"\n", 1), (b"no\n", 1), (b"\x04", 1)])
@pytest.mark.parametrize("host", ["", "host:"])
def test_a_yes_on_a_terminal_goes_on(answer: bytes, status: int, host: str, source: Path, tmp_path: Path) -> None:
    destination = ext4(tmp_path / "destination")
    ours, theirs = pty.openpty()
    command = [*BLOCKCOPY, *(PUSH if host else ["sync"]), str(source), f"{host}{destination}"]
    shown = b""
    with subprocess.Popen(command, stdin=theirs, stderr=theirs) as process:
        os.close(theirs)
        while b"[y/N]" not in shown:
            shown += os.read(ours, 4096)
        os.write(ours, answer)
        assert process.wait(20) == status
    os.close(ours)
    assert b"Overwrite it?" in shown
    assert (destination.read_bytes()[: len(DATA)] == DATA) == (status == 0)


@needs_mkfs
@pytest.mark.parametrize("options", [[], ["--no-state"], ["--blockcopy-path", support.QUEUEING]])
def test_an_older_copy_of_the_same_source_is_overwritten_without_a_question(
    options: list[str], tmp_path: Path
) -> None:
    older = ext4(tmp_path / "older").read_bytes()
    source = written(tmp_path / "source", with_changes(older, [0, 1, 30]))
    destination = written(tmp_path / "destination", with_changes(older, [1, 9]))
    succeeded(run("sync", *options, source, destination))
    assert destination.read_bytes() == source.read_bytes()


@needs_mkfs
def test_the_state_file_vouches_for_a_copy_whose_source_was_formatted_anew(tmp_path: Path) -> None:
    source, destination = ext4(tmp_path / "source"), tmp_path / "destination"
    succeeded(run("sync", source, destination))
    support.output("mkfs.ext4", "-q", "-F", source)  # in place: the same file with another UUID
    succeeded(run("sync", source, destination), "the source is another, or has changed")
    assert destination.read_bytes() == source.read_bytes()
    another = ext4(tmp_path / "another")
    failed(run("sync", another, destination), 1, f"that holds an ext4 file system (UUID {uuid_of(another)})")
    support.output("mkfs.ext4", "-q", "-F", destination)  # it is no copy any more
    failed(run("sync", source, destination), 1, "does not hold")


@needs_mkfs
def test_a_mount_refuses_too_and_says_how_to_go_on(source: Path, tmp_path: Path) -> None:
    support.require_fuse()
    (tmp_path / "point").mkdir()
    failed(run("mount", source, ext4(tmp_path / "destination"), tmp_path / "point"), 1, "--force overwrites it")


@needs_mkfs
@pytest.mark.parametrize("size", [0, 100, len(DATA)])
def test_a_push_refuses_too(size: int, tmp_path: Path) -> None:
    source, destination = written(tmp_path / "source", DATA[:size]), ext4(tmp_path / "destination")
    before = destination.read_bytes()
    done = run(*PUSH, "--connections", 3, source, f"host:{destination}", input=b"y\n")
    failed(
        done, 1, f"host: {destination} holds an ext4 file system (UUID {uuid_of(destination)}), which the source"
    )
    assert done.stderr.endswith(b". Nothing was written; --force overwrites it\n")
    assert destination.read_bytes() == before
    if size == len(DATA):  # of a shorter source, the dry run looks at as many bytes
        succeeded(run(*PUSH, "-n", source, f"host:{destination}"), "A sync asks before it overwrites that")
    succeeded(run(*PUSH, "-n", "--force", source, f"host:{destination}"))
    succeeded(run(*PUSH, "--force", source, f"host:{destination}"), None)
    assert destination.read_bytes() == DATA[:size] + before[size:]


@needs_mkfs
@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_a_push_onto_an_older_copy_asks_nothing(compress: str, tmp_path: Path) -> None:
    older = ext4(tmp_path / "older").read_bytes()
    source = written(tmp_path / "source", with_changes(older, [0, 1, 30]))
    destination = written(tmp_path / "destination", with_changes(older, [1, 9]))
    succeeded(run(*PUSH, "--compress", compress, source, f"host:{destination}"))
    assert destination.read_bytes() == source.read_bytes()


@needs_mkfs
def test_save_overwrites_whatever_there_is(tmp_path: Path) -> None:
    """As the original program does: the one who writes `checksum | retrieve | save` decides."""
    destination = ext4(tmp_path / "destination")
    succeeded(
        run("save", destination, input=b"data" + bytes(8) + (4096).to_bytes(4, "big") + DATA[:4096] + b"done")
    )
    assert destination.read_bytes()[:4096] == DATA[:4096]


def test_zeros_and_plain_data_have_no_superblock() -> None:
    assert superblocks(b"") == superblocks(bytes(HEAD)) == superblocks(b"\x55\xaa" * 99) == []
    for seed in range(20):
        assert superblocks(noise(HEAD, seed)) == []


MAKERS = {
    "ext2": ["mkfs.ext2", "-q", "-F"],
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
    "vfat": ["mkfs.vfat"],
    "ntfs": ["mkfs.ntfs", "-q", "-F", "-f"],
    "f2fs": ["mkfs.f2fs", "-q", "-f"],
    "swap": ["mkswap", "-q"],
    "crypto_LUKS": ["cryptsetup", "luksFormat", "-q", "--pbkdf=pbkdf2", "--key-file=/etc/hostname"],
    "gpt": ["sh", "-c", "printf 'label: gpt\\n,\\n' | sfdisk -q \"$1\"", "sh"],
    "dos": ["sh", "-c", "printf 'label: dos\\n,\\n' | sfdisk -q \"$1\"", "sh"],
}


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_found_is_what_blkid_finds(kind: str, tmp_path: Path) -> None:
    maker = MAKERS[kind]
    if not all(map(shutil.which, (maker[0], "blkid", *(["sfdisk"] if maker[0] == "sh" else [])))):
        pytest.skip(f"{maker[0]} is not installed")
    path = tmp_path / "device"
    with path.open("wb") as file:
        file.truncate(320 << 20)
    done = subprocess.run([*maker, str(path)], capture_output=True, check=False, timeout=30)
    assert done.returncode == 0, done
    told = support.output("blkid", "-p", "-o", "export", path)
    values = dict(line.split("=", 1) for line in told.splitlines() if "=" in line)
    assert kind in (values.get("TYPE"), values.get("PTTYPE"))
    with path.open("rb") as file:
        [found] = superblocks(file.read(HEAD))
    known = values.get("UUID") or values["PTUUID"]
    assert found.id.removeprefix("UUID ").replace("-", "") == known.replace("-", "").lower()
