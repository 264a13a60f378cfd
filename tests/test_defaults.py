"""Defaults of options, from configuration files and the environment: what counts, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support import PYTHON, failed, run, succeeded, written

from blockcopy.cli.parser import parser
from blockcopy.errors import UsageError
from blockcopy.replica import defaults

FILE = """
connections = 4
limit = "20MB"
no-sparse = true
[host."*.example.org"]
rsh = "ssh -p 2222"
connections = 6
[host."old.example.org"]
python = "python3.9"
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return the paths of the system's and the user's file, which do not exist yet."""
    monkeypatch.setattr(defaults, "SYSTEM_FILE", str(tmp_path / "system.toml"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "blockcopy").mkdir()
    return tmp_path / "system.toml", tmp_path / "blockcopy" / "config.toml"


def completed(*words: str) -> dict[str, Any]:
    made = parser()
    return vars(defaults.complete(made, words, made.parse_args(words)))


def test_without_files_nothing_changes(files: tuple[Path, Path]) -> None:
    words = ["sync", "root@a.example.org:/d", "copy"]
    assert completed(*words) == vars(parser().parse_args(words))


def test_an_option_counts_more_than_the_environment_and_that_more_than_a_file(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    written(files[0], b'connections = 2\ntimeout = 7\nlimit = "1M"\n')
    written(files[1], FILE.encode())
    monkeypatch.setenv("BLOCKCOPY_LIMIT", "3M")
    monkeypatch.setenv("BLOCKCOPY_NO_SPARSE", "no")
    found = completed("sync", "root@a.example.org:/d", "copy")
    assert (found["connections"], found["timeout"], found["limit"]) == (6, 7, 3 << 20)
    assert (found["rsh"], found["python"], found["no_sparse"]) == ("ssh -p 2222", None, False)
    found = completed("sync", "--connections", "auto", "--limit=none", "root@old.example.org:/d", "copy")
    assert (found["connections"], found["limit"], found["python"]) == (None, None, "python3.9")
    assert completed("sync", "there:/d", "copy")["connections"] == 4
    assert completed("sync", "here", "copy")["rsh"] is None


def test_a_command_takes_what_it_has(files: tuple[Path, Path]) -> None:
    written(files[1], FILE.encode())
    assert completed("verify", "x.example.org:/d", "copy")["rsh"] == "ssh -p 2222"
    assert completed("doctor", "x.example.org")["rsh"] == "ssh -p 2222"
    assert "rsh" not in completed("status", "point")


def test_of_two_that_exclude_each_other_one_is_left(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    written(files[1], FILE.encode())
    words = ["old.example.org:/d", "copy"]
    found = completed("sync", "--blockcopy-path", "sudo blockcopy", *words)
    assert (found["python"], found["blockcopy_path"]) == (None, "sudo blockcopy")
    monkeypatch.setenv("BLOCKCOPY_PATH", "blockcopy")
    found = completed("sync", *words)
    assert (found["python"], found["blockcopy_path"]) == (None, "blockcopy")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("limit = '1M'\n\nlimits = '1M'\n", "config.toml, line 3: unknown key 'limits' (did you mean limit?)"),
        ("\n[host.'a.*']\nrsh = 'x'\nforce = true", "config.toml, line 4: unknown key 'force'"),
        ("limit = 'fast'", "config.toml, line 1: limit: 'fast' is not a number"),
        ("connections = true", "connections: True is no text or number"),
        ("connections = 99", "connections: '99' is neither auto nor a number from 1 to 32"),
        ("no-sparse = 'perhaps'", "no-sparse: 'perhaps' is neither true nor false"),
        ("limit =\n", "line 1"),
        ("[host]\nrsh = 'x'", 'line 1: write tables such as [host."*.example.org"]'),
    ],
)
def test_what_is_wrong_is_named_with_its_file_and_line(text: str, told: str, files: tuple[Path, Path]) -> None:
    written(files[1], text.encode())
    with pytest.raises(UsageError) as caught:
        completed("sync", "there:/d", "copy")
    assert told in str(caught.value)
    assert str(files[1]) in str(caught.value)


def test_a_wrong_variable_is_named(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKCOPY_CONNECTIONS", "many")
    with pytest.raises(UsageError, match="BLOCKCOPY_CONNECTIONS of the environment: connections: 'many'"):
        completed("mount", "there:/d", "copy", "point")


def test_a_file_that_others_may_write_is_refused(files: tuple[Path, Path]) -> None:
    written(files[1], FILE.encode()).chmod(0o666)
    with pytest.raises(UsageError, match="others must not be able to write it"):
        completed("sync", "there:/d", "copy")


def test_the_program_takes_defaults(tmp_path: Path) -> None:
    """And the stages take none."""
    (tmp_path / "blockcopy").mkdir()
    rsh = written(tmp_path / "rsh", b'#!/bin/sh\nshift\nexec sh -c "$*"\n')
    rsh.chmod(0o755)
    written(tmp_path / "blockcopy" / "config.toml", f'[host.there]\nrsh = "{rsh}"\npython = "{PYTHON}"\n'.encode())
    source = written(tmp_path / "source", b"Hello World!")
    environment = os.environ | {"XDG_CONFIG_HOME": str(tmp_path)}
    succeeded(run("sync", f"there:{source}", tmp_path / "copy", env=environment))
    assert (tmp_path / "copy").read_bytes() == b"Hello World!"
    environment["BLOCKCOPY_LIMIT"] = "0"
    failed(
        run("sync", source, tmp_path / "copy", env=environment), 2, "BLOCKCOPY_LIMIT of the environment: limit: '0'"
    )
    succeeded(run("checksum", source, env=environment))
