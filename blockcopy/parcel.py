"""The copy stages as bytes for the standard input of a remote python3: nothing has to be installed there.

    python3 -c CODE  ◄─  a line, which CODE runs: `bootstrap`; the parcel, which that unpacks; the hash stream

What is in it is read from this package's own files, so both ends are always of the same version.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

PACKAGE = "blockcopy"

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
    """Return the first bytes for a python3 that runs CODE, so that it runs `blockcopy` with `arguments`.

    `under_home`: the last argument is a path below the folder that the last word behind CODE names.
    """
    content = {
        "package": PACKAGE,
        "modules": modules(),
        "program": f"{PACKAGE}.cli",
        "arguments": [*arguments],
        "under_home": under_home,
    }
    parcel = zlib.compress(json.dumps(content).encode())
    program = f"{modules()[f'{PACKAGE}.bootstrap']}\nbegin({len(parcel)})\n"
    return f"exec({program!a})\n".encode() + parcel


@functools.cache
def modules() -> dict[str, str]:
    """Name → text of the stages: the modules of the package itself, and not those of packages in it."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")}
    return {PACKAGE if name == "__init__" else f"{PACKAGE}.{name}": text for name, text in texts.items()}
