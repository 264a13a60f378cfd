"""What is missing, here and there: `doctor`, `facts`; and the stages as one file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support import PYTHON, Sshd, failed, noise, run, succeeded, written

import blockcopy
from blockcopy import optional_packages
from blockcopy_fuse import doctor

CHECKOUT = Path(__file__).resolve().parent.parent
DATA = noise(300_001)


def test_facts_tell_of_this_host(tmp_path: Path) -> None:
    source = written(tmp_path / "source", DATA)
    found = json.loads(run("facts", source).stdout)
    assert found["program"] == f"blockcopy {blockcopy.__version__}"
    assert found["size"] == len(DATA)
    assert found["digests"]["sha256"] > 0


def test_facts_of_what_cannot_be_opened(tmp_path: Path) -> None:
    done = run("facts", tmp_path / "nowhere")
    failed(done, 1, b"cannot open")


def test_a_host_that_is_well(sshd: Sshd, tmp_path: Path) -> None:
    source = written(tmp_path / "source", DATA)
    done = run("doctor", "-e", sshd.rsh, "--python", sys.executable, f"{sshd.host}:{source}")
    succeeded(done)
    lines = done.stdout.decode().splitlines()
    assert [line for line in lines if line.startswith("FAIL")] == []
    for told in (
        "pyfuse3",
        "/dev/fuse can be used",
        "blocks would be compared by",
        f"{source} can be read: {len(DATA)} bytes",
    ):
        assert any(told in line for line in lines), told


@pytest.mark.parametrize(
    ("options", "host", "told"),
    [
        (["-e", "/no/such/ssh"], "host", "file or directory – it is not installed here"),
        (["-e", "false"], "host", "host did not run `python3`"),
        (["--python", "no-python", "-e", f"{CHECKOUT}/tools/standins/link"], "host", "there is no `no-python`"),
        (["--python", PYTHON, "-e", f"{CHECKOUT}/tools/standins/link"], "host:/no/such", "cannot open /no/such"),
        (["-e", "ssh -F none -p 1 -o BatchMode=yes"], "127.0.0.1", "is it up, and does sshd listen there?"),
    ],
)
def test_a_host_that_is_not(options: list[str], host: str, told: str) -> None:
    done = run("doctor", *options, host)
    failed(done, 1)
    assert any(line.startswith("FAIL") and told in line for line in done.stdout.decode().splitlines())
    assert "ERROR (doctor)" in done.stderr.decode()


def test_what_is_missing_here_is_named(tmp_path: Path) -> None:
    """Without fusermount3, and without the packages."""
    root = Path(blockcopy.__file__).resolve().parent.parent
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": f"{root}:{CHECKOUT / 'fuse'}"}
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-m", "blockcopy", "doctor"],
        capture_output=True,
        check=False,
        env=environment,
    )
    said = done.stdout.decode()
    failed(done, 1)
    assert "FAIL  fusermount3 is not installed: apt install fuse3" in said
    # What is advised depends on the Python: without `site`, one of an environment looks like the distribution's.
    assert "FAIL  the package pyfuse3 is not installed: " in said


def test_a_user_without_a_home_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(Path, "home", nowhere)
    assert ("FAIL", "this user has no home for state files: set HOME or XDG_STATE_HOME") in [*doctor.examine()]


# Advice to install


def test_no_text_advises_to_install_blockcopy_from_an_index() -> None:
    """There is no such distribution: whoever registers the name would be run, as root perhaps."""
    named = re.compile(
        r"""\b(?:install|upgrade|pipx run|uvx)\b[^\n]*?[\s'"`](blockcopy(?:\[[\w,]+\])?)(?=['"`\s;,)=<>~]|$)"""
    )
    folders = [CHECKOUT / name for name in ("blockcopy", "fuse", "tools", "tests")]
    texts = [*CHECKOUT.glob("*.*"), *(path for folder in folders for path in folder.rglob("*"))]
    found = []
    for path in texts:
        if path.suffix in (".svg", ".png", ".pyc") or not path.is_file():
            continue
        for line in path.read_text(errors="replace").splitlines():
            if re.search(r"\b(pip3?|pipx|uv|uvx|easy_install)\b", line) and named.search(line):
                found.append(f"{path}: {line.strip()}")
    assert found == []
    sample = "'blockcopy[fuse]'"  # on a line of its own: this file is read as well
    assert named.search(f"pip install {sample}")


def test_the_packages_that_are_advised_are_those_of_the_project() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    fuse = [f"{each}; python_version >= '3.11'" for each in optional_packages.FUSE]
    assert [*fuse, "blockcopy[fast]"] == project["fuse"], "what is needed, and what is faster"
    assert [each.partition(";")[0] for each in project["fast"]] == [
        optional_packages.BLAKE3,
        optional_packages.ZSTD,
    ]


def test_what_is_advised_installs_for_the_very_python_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/an environment/bin/python")
    assert (
        optional_packages.install_command("blake3>=0.4")
        == "'/opt/an environment/bin/python' -m pip install 'blake3>=0.4'"
    )
    monkeypatch.setattr(optional_packages, "is_externally_managed", lambda: True)
    assert "takes no packages" in optional_packages.install_command("blake3>=0.4")
    assert "pip install" not in optional_packages.install_command("blake3>=0.4")


def test_the_stages_as_one_file(tmp_path: Path) -> None:
    source, destination = written(tmp_path / "source", DATA), written(tmp_path / "copy", DATA[::-1])
    archive = tmp_path / "blockcopy.pyz"
    subprocess.run([CHECKOUT / "tools" / "zipapp", archive], check=True, capture_output=True)
    stage = [PYTHON, "-S", "-E", str(archive)]
    asked = subprocess.run([*stage, "checksum", destination], capture_output=True, check=True).stdout
    sent = subprocess.run([*stage, "retrieve", source], input=asked, capture_output=True, check=True).stdout
    subprocess.run([*stage, "save", destination], input=sent, check=True)
    assert destination.read_bytes() == DATA
    done = subprocess.run([*stage, "sync", source, destination], capture_output=True, check=False)
    failed(done, 2)
    assert b"Traceback" not in done.stderr
