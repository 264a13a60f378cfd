"""The copy stages as bytes for the standard input of a remote python3, so that nothing must be installed there.

    python3 -c CODE  ◄─  a line with `bootstrap`, which CODE runs; the payload, which that unpacks; the hash stream

The payload has the texts of this package's own files, so both ends always have the same version. It leaves out
docstrings, which are nearly half of the bytes. Lines keep their numbers for tracebacks.
"""

from __future__ import annotations

import functools
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from blockcopy.stage import hand_over
from blockcopy.stage.join import address_of
from blockcopy.transport.bootstrap import MARK

PACKAGE = "blockcopy"

PROGRAM = f"{PACKAGE}.cli.stage_main"
"""The module whose `main` runs a stage there."""

TRAVELS = ("paths", "block", "protocol", "progress", "stage", "cli")
"""The rooms whose modules may be sent, besides the modules of the package itself."""

STDIN_LOST = "what was meant for this python3 did not reach it"
"""Message of CODE if another program has read its standard input, or has not passed it on."""

CODE = (
    'f\'=1;{[exec(l,globals())if(l[:5]==b"exec(")else(__import__("sys").exit("'
    + STDIN_LOST
    + '"))for(l)in[open(0,"rb",0,closefd=False).readline()]]}\''
)
"""The program for `python3 -c`. It runs the first line of its standard input, if `opening` made that line.

The word means the same with a remote shell, as behind ssh, and without one, as behind `docker exec`. A shell
removes the quotes, and the rest assigns `f`. Without a shell the word is an f-string. The line is read unbuffered,
so no byte after it is consumed."""


def opening(arguments: Sequence[str], *, under_home: bool = False) -> bytes:
    """Return the first bytes for the standard input of a python3 that runs CODE.

    These bytes make that python3 run `blockcopy` with `arguments`, the first of which is the stage. `under_home`:
    the last argument is a path relative to the folder that the last word after CODE names.
    """
    content = {
        "modules": needed_by(arguments[0]),
        "packages": packages(),
        "program": PROGRAM,
        "arguments": [*arguments],
        "under_home": under_home,
    }
    payload = zlib.compress(json.dumps(content).encode())
    bootstrap = Path(__file__).with_name("bootstrap.py").read_text(encoding="utf-8")
    return _line(f"{bootstrap}\nbegin({len(payload)})\n") + payload


def _line(program: str) -> bytes:
    """Return the line with which CODE runs `program`. That python3 imports no module from the login's folder."""
    path = "import sys; sys.path[:] = [folder for folder in sys.path if folder]"
    return f"exec({path!a}); exec({program!a})\n".encode()


def joining(token: str) -> bytes:
    """Return the first bytes for a python3 that runs CODE and hands its streams over to the stage of `token`."""
    text = _without_docstrings(Path(hand_over.__file__).read_text(encoding="utf-8"))
    return _line(f"{text}\nmain({address_of(token)!r}, {token!r}, {MARK!r})\n")


@functools.cache
def modules() -> dict[str, str]:
    """Return all modules that may be sent: a dict, name → text. A package has the text of its `__init__`."""
    package = Path(__file__).parent.parent
    files = list(package.glob("*.py"))
    files += [path for room in TRAVELS for path in (package / room).glob("*.py")]
    return {_name_of(path): path.read_text(encoding="utf-8") for path in sorted(files)}


@functools.cache
def needed_by(stage: str) -> dict[str, str]:
    """Return the modules that `stage` loads: a dict, name → text without docstrings.

    These are the stage, PROGRAM, the modules that both import, and so on. Imports inside functions do not count:
    they are for other commands, or for packages that a host may have.
    """
    texts = modules()
    wanted = [PROGRAM, f"{PACKAGE}.stage.{stage}"]
    found: dict[str, str] = {}
    while wanted:
        name = wanted.pop()
        if name in texts and name not in found:
            found[name] = _without_docstrings(texts[name])
            wanted += [name.rpartition(".")[0], *_imported_by(texts[name])]
    return found


_DOCSTRING = re.compile(r'^( *)r?"""[\s\S]*?"""|"""[\s\S]*?"""', re.MULTILINE)
"""A string at the beginning of a line. The second alternative passes over other strings, which must stay."""


def _without_docstrings(text: str) -> str:
    """Return the `text` of a module with empty docstrings. Each line keeps its number."""

    def empty(found: re.Match[str]) -> str:
        return found[0] if found[1] is None else f'{found[1]}""' + "\n" * found[0].count("\n")

    return _DOCSTRING.sub(empty, text)


_IMPORT = re.compile(rf"^from ({PACKAGE}[\w.]*) import (\([^)]*\)|.*)$", re.MULTILINE)


def _imported_by(text: str) -> list[str]:
    """Return a list of the names that a module of this `text` imports from the package, also those in modules."""
    names = []
    for module, imported in _IMPORT.findall(text):
        names += [module, *(f"{module}.{word}" for word in re.findall(r"\w+", imported))]
    return names


def packages() -> list[str]:
    """Return the list of the names of sent modules that are packages."""
    return [PACKAGE, *(f"{PACKAGE}.{room}" for room in TRAVELS)]


def _name_of(path: Path) -> str:
    parts = path.relative_to(Path(__file__).parent.parent).with_suffix("").parts
    return ".".join([PACKAGE, *(part for part in parts if part != "__init__")])
