"""Names of any bytes, wherever a name can stand: source, destination, mountpoint, --name, -o fsname."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import support
from support import BLOCK_SIZE, failed, noise, run, succeeded, written

from blockcopy.untrusted_text import printable
from blockcopy_fuse import mountinfo

DATA = noise(2 * BLOCK_SIZE)


NAMES = [os.fsdecode(b" b\xfccher,x\nb\\z\t#"), "-\"quoted' ü", "\\012ü,ro"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_any_bytes(tmp_path: Path, name: str) -> None:
    support.require_fuse()
    source, copy, point = tmp_path / f"{name}.img", tmp_path / "copies" / name, tmp_path / name
    copy.parent.mkdir()
    point.mkdir()
    written(source, DATA)
    done = run("mount", "--metrics", "metrics", source, copy, point, cwd=tmp_path)
    succeeded(done)
    try:
        assert Path(point, name).read_bytes() == DATA
        entry = mountinfo.mount_at(str(point))
        assert entry is not None
        assert entry.source == str(source)  # as `mount` and `findmnt` show it
        assert run("wait", point).returncode == 0
        [row] = [each for each in json.loads(run("list", "--json").stdout) if each["mountpoint"] == str(point)]
        assert (row["source"], row["destination"]) == (str(source), str(copy))
        assert run("status", point).stdout.startswith(b"complete")
        assert run("list").stdout.decode().count(f"{tmp_path}/{printable(name)}") == 2  # in one line
    finally:
        assert run("umount", point).returncode == 0
    assert copy.read_bytes() == DATA


def test_a_file_and_a_source_are_called_as_is_wished(tmp_path: Path) -> None:
    support.require_fuse()
    source, point = written(tmp_path / "source", DATA), tmp_path / "mnt"
    point.mkdir()
    name = os.fsdecode(b"\xff,\n")
    options = ["--name", name, "-o", os.fsdecode(b'fsname="d\xfc,x"')]
    assert run("mount", *options, source, tmp_path / "copy", point).returncode == 0
    try:
        assert Path(point, name).read_bytes() == DATA
        entry = mountinfo.mount_at(str(point))
        assert entry is not None
        assert entry.source == os.fsdecode(b"d\xfc,x")
    finally:
        run("umount", point)
    done = run("mount", "-o", "subtype=ü", source, tmp_path / "copy", point)
    failed(done, 2, b"subtype")
