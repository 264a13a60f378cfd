"""The copy stages as bytes for the standard input of a remote python3: nothing has to be installed there.

    python3 -c CODE  ◄─  a line, which CODE runs: `bootstrap`; the parcel, which that unpacks; the hash stream

What is in it is read from this package's own files, so both ends are always of the same version.
"""

from __future__ import annotations

import functools
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

PACKAGE = "blockcopy"

PROGRAM = f"{PACKAGE}.cli.stage_main"

TRAVELS = ("paths", "block", "protocol", "progress", "stage", "cli")
"""The rooms that go to a source host, with the modules of the package itself."""

_STAYS = ("push",)
"""Modules of the package itself that a source host has no use for."""

NOT_GIVEN = "what was meant for this python3 did not reach it"
"""Said by CODE where something else has read its standard input, or has not passed it on."""

CODE = (
    'f\'=1;{[exec(l,globals())if(l[:5]==b"exec(")else(__import__("sys").exit("'
    + NOT_GIVEN
    + '"))for(l)in[open(0,"rb",0,closefd=False).readline()]]}\''
)
"""A word that means the same whether a remote shell reads it, as behind ssh, or none does, as behind `docker
exec`. A shell takes the quotes away, and what is left sets `f` and goes on; else it is an f-string. Unbuffered,
so that no byte behind the line is taken. It runs its first line, if that is the one that `opening` makes."""


def opening(arguments: Sequence[str], *, under_home: bool = False) -> bytes:
    """Return the first bytes for a python3 that runs CODE, so that it runs `blockcopy` with `parser`.

    `under_home`: the last argument is a path below the folder that the last word behind CODE names.
    """
    content = {
        "modules": needed_by(arguments[0]),
        "packages": packages(),
        "program": PROGRAM,
        "arguments": [*arguments],
        "under_home": under_home,
    }
    parcel = zlib.compress(json.dumps(content).encode())
    bootstrap = Path(__file__).with_name("bootstrap.py").read_text(encoding="utf-8")
    program = f"{bootstrap}\nbegin({len(parcel)})\n"
    return f"exec({program!a})\n".encode() + parcel


@functools.cache
def modules() -> dict[str, str]:
    """Return the texts of all modules that travel, by name. A package has that of its `__init__`."""
    return {_name_of(path): path.read_text(encoding="utf-8") for path in _files()}


@functools.cache
def needed_by(stage: str) -> dict[str, str]:
    """Return the texts of the modules that one stage loads, by name.

    These are the modules that its command imports, and what those import, and so on. An import inside a
    function does not count: it is for other commands, or for packages that a host may have.
    """
    texts = modules()
    wanted = [PROGRAM, f"{PACKAGE}.stage.{stage}"]
    found: dict[str, str] = {}
    while wanted:
        name = wanted.pop()
        if name in texts and name not in found:
            found[name] = texts[name]
            wanted += [name.rpartition(".")[0], *_imported_by(texts[name])]
    return found


_IMPORT = re.compile(rf"^from ({PACKAGE}[\w.]*) import (\([^)]*\)|.*)$", re.MULTILINE)


def _imported_by(text: str) -> list[str]:
    """Return the names that a module may import from this package: modules, and names in them."""
    names = []
    for module, imported in _IMPORT.findall(text):
        names += [module, *(f"{module}.{word}" for word in re.findall(r"\w+", imported))]
    return names


def packages() -> list[str]:
    """Return the names of those modules that are packages."""
    return [PACKAGE, *(f"{PACKAGE}.{room}" for room in TRAVELS)]


def _files() -> list[Path]:
    package = Path(__file__).parent.parent
    files = [path for path in package.glob("*.py") if path.stem not in _STAYS]
    return sorted([*files, *(path for room in TRAVELS for path in (package / room).glob("*.py"))])


def _name_of(path: Path) -> str:
    parts = path.relative_to(Path(__file__).parent.parent).with_suffix("").parts
    return ".".join([PACKAGE, *(part for part in parts if part != "__init__")])
