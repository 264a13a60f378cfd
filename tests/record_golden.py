"""The golden files of a version: what it wrote, and the stages that it sent. See golden/README.md.

    PYTHONPATH=.:tools python tests/record_golden.py       write golden/VERSION, of the version in this checkout

`test_golden` reads the files with the program of today.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import lzma
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import support
from support import BLOCK_SIZE, PYTHON, STANDINS, noise, with_changes

from blockcopy import __version__, errors
from blockcopy.cli.parser import parser
from blockcopy.cli.suggestions import commands_of
from blockcopy.replica.monitor.status import LinkStatus, ReadStatus, Status
from blockcopy.transport import payload

GOLDEN = Path(__file__).resolve().parent / "golden"

SIZE = 24 * BLOCK_SIZE + 1000
SOURCE = b"".join(
    bytes(BLOCK_SIZE) if 12 <= block < 16 else noise(64, seed=block) * (BLOCK_SIZE // 64) for block in range(25)
)[:SIZE]
"""The source of all golden files. Its blocks are unlike each other, and easily compressed; four are zeros."""

DESTINATION = with_changes(SOURCE, [0, 7, 14, 24])
"""Their destination before: equal but for four blocks."""

PRESENT = range(10)
"""The blocks that a state file has as present."""

PAGE, WRITTEN_AT = support.noise(4096, seed=3), 15 * BLOCK_SIZE + 3 * 4096
"""What the user wrote, and where: a page of a block that is missing."""

STAGES = ("checksum", "retrieve", "save", "receive", "facts")

CONVERSATIONS = ("extended", "negotiated", "negotiated-zstd", "push")
"""The conversations that were recorded in both directions, as NAME.client and NAME.source."""

_FOLDER = "/tmp/blockcopy-golden"
"""The folder of both ends. Its name is in state files and results."""

_DIGEST = "sha256"
"""The one digest that clients offer: each host has it, and speeds do not matter."""

_ONE_DIGEST = (
    "import sys; from blockcopy.protocol import digests; from blockcopy.cli.main import main; "
    f"digests.speeds = lambda: {{{_DIGEST!r}: 1000.0}}; sys.argv[0] = 'blockcopy'; main()"
)


def path_of(version: str, name: str) -> Path:
    """Return the path of the golden file `name` of `version`."""
    return GOLDEN / version / f"{name}.xz"


def content(version: str, name: str) -> bytes:
    """Return the content of the golden file `name` of `version`."""
    return lzma.decompress(path_of(version, name).read_bytes())


def interface() -> dict[str, Any]:
    """Return what other programs rely on: options of commands, exit statuses of errors, metrics."""
    options = {
        name: sorted(word for action in command._actions for word in action.option_strings)
        for name, command in commands_of(parser()).items()
    }
    classes = [each for each in vars(errors).values() if inspect.isclass(each) and hasattr(each, "exit_code")]
    fields = [field for kind in (Status, ReadStatus, LinkStatus) for field in dataclasses.fields(kind)]
    return {
        "options": options,
        "exit statuses": {each.__name__: each.exit_code for each in classes},
        "metrics": [field.metadata["metric"] for field in fields if field.metadata["metric"]],
    }


def types_of(value: object) -> object:
    """Return the types of the JSON `value`: of an object a dict of them, of all else a name."""
    if isinstance(value, dict):
        return {name: types_of(each) for name, each in value.items()}
    return "number" if type(value) in (int, float) else type(value).__name__


def stages() -> dict[str, str]:
    """Return the modules of the stages, as they travel to another host: a dict, name → text."""
    return {name: text for stage in STAGES for name, text in payload.needed_by(stage).items()}


def write_stages(modules: dict[str, str], packages: list[str], folder: Path) -> None:
    """Write `modules`, of which `packages` are packages, into `folder`, as a program that Python runs."""
    for name in packages:
        folder.joinpath(*name.split(".")).mkdir(parents=True)
    for name, text in modules.items():
        path = folder.joinpath(*name.split("."))
        (path / "__init__.py" if name in packages else path.with_suffix(".py")).write_text(text)
    (folder / "__main__.py").write_text(f"import sys\nfrom {payload.PROGRAM} import main\nmain(sys.argv[1:])\n")


# Recording


@contextlib.contextmanager
def _both_ends() -> Iterator[Path]:
    """Make source and destination in a new folder, go there, and remove it at the end."""
    folder, before = Path(_FOLDER), Path.cwd()
    folder.mkdir(mode=0o700)
    try:
        (folder / "source").write_bytes(SOURCE)
        (folder / "destination").write_bytes(DESTINATION)
        os.environ["STATE_DIRECTORY"] = str(folder / "states")
        os.chdir(folder)
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def _run(*args: object, one_digest: bool = False, **options: Any) -> bytes:
    """Run a command, and return its output. `one_digest`: it offers no other digest than `_DIGEST`."""
    program = [PYTHON, "-P", "-c", _ONE_DIGEST] if one_digest else support.BLOCKCOPY
    done = subprocess.run([*program, *map(str, args)], stdout=subprocess.PIPE, timeout=60, check=True, **options)
    return bytes(done.stdout)


def _conversation(name: str) -> dict[str, bytes]:
    """Return the two streams of the conversation `name`: a dict, golden file → content."""
    with _both_ends() as folder:
        if name == "extended":
            client = _run("checksum", "--digest", _DIGEST, "destination")
            source = _run("retrieve", "source", input=client)
            return {f"{name}.client": client, f"{name}.source": source}
        tee = folder / "tee"
        tee.write_text(f'#!/bin/sh\ntee in | {" ".join(support.BLOCKCOPY)} "$@" | tee out\n')
        tee.chmod(0o700)
        if name == "push":
            rsh = f"{PYTHON} {STANDINS / 'link'}"
            _run("sync", "-q", "-e", rsh, "--compress=none", f"--blockcopy-path={_one_digest_script(folder)}",
                 "source", f"host:{folder}/destination", one_digest=True)  # fmt: skip
            return {f"{name}.client": (folder / "out").read_bytes(), f"{name}.source": (folder / "in").read_bytes()}
        compress = "zstd" if name.endswith("zstd") else "none"
        _run("sync", "-q", f"--compress={compress}", f"--blockcopy-path={tee}",
             "source", "destination", one_digest=True)  # fmt: skip
        return {f"{name}.client": (folder / "in").read_bytes(), f"{name}.source": (folder / "out").read_bytes()}


def _one_digest_script(folder: Path) -> Path:
    """Write a program into `folder` that records a `receive` with one digest. Returns its path."""
    script = folder / "tee-one"
    script.write_text(f'#!/bin/sh\ntee in | {PYTHON} -P -c "$CODE" "$@" | tee out\n')
    script.chmod(0o700)
    os.environ["CODE"] = _ONE_DIGEST
    return script


def _state(*options: str) -> bytes:
    """Return the state file of a copy of `PRESENT`, made with more `options` of `sync`."""
    with _both_ends() as folder:
        _run("sync", "-q", "--range", f"0:{len(PRESENT) * BLOCK_SIZE}", *options, "source", "destination")
        [state] = (folder / "states").glob("*.state")
        return state.read_bytes()


def _writable_state() -> dict[str, bytes]:
    """Return the state file and the note of a writable mount, some blocks of which are present, and its status."""
    with _both_ends() as folder:
        (folder / "mnt").mkdir()
        _run("mount", "--writable", "--no-background", "source", "destination", "mnt")
        try:
            _run("prefetch", "mnt", f"0:{len(PRESENT) * BLOCK_SIZE}")
            with (folder / "mnt" / "destination").open("r+b") as file:
                file.seek(WRITTEN_AT)
                file.write(PAGE)
                file.flush()
                os.fsync(file.fileno())
            status = _run("status", "--json", "mnt")
        finally:
            subprocess.run([*support.BLOCKCOPY, "umount", "mnt"], check=False)  # 75: it is not complete
        [state], [note] = (folder / "states").glob("*.state"), (folder / "states").glob("*.writes")
        return {"writable.state": state.read_bytes(), "writable.writes": note.read_bytes(), "status": status}


def _results() -> dict[str, Any]:
    """Return the results of commands, as they print them with --json."""
    with _both_ends():
        return {
            "sync": json.loads(_run("sync", "-q", "--json", "source", "destination")),
            "verify": json.loads(_run("verify", "-q", "--json", "source", "destination")),
            "states": json.loads(_run("state", "list", "--json")),
            "discard": json.loads(_run("discard-writes", "--dry-run", "--json", "destination")),
        }


def record() -> None:
    """Write all golden files of this version. Raises FileExistsError if there are any."""
    folder = GOLDEN / __version__
    folder.mkdir()
    files: dict[str, bytes] = {"read-only.state": _state(), **_writable_state()}
    for name in CONVERSATIONS:
        files |= _conversation(name)
    values = {
        "stages": {"packages": payload.packages(), "modules": stages()},
        "interface": interface(),
        **_results(),
    }
    for name, value in values.items():
        files[name] = json.dumps(value, indent=1).encode()
    for name, data in files.items():
        path_of(__version__, name).write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    record()
