#!/usr/bin/env python3
"""Print the copyright notices and licences of the Python packages in a folder, for debian/copyright.

    bundled.py SITE-PACKAGES

A licence that Debian has in /usr/share/common-licenses is named. All others are printed.
"""

from __future__ import annotations

import sys
import textwrap
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

COMMON = {
    "Apache-2.0": "Version 2.0, January 2004",
    "CC0-1.0": "CC0 1.0 Universal",
    "LGPL-2.1": "GNU LESSER GENERAL PUBLIC LICENSE",
    "MPL-2.0": "Mozilla Public License Version 2.0",
}
"""Files in /usr/share/common-licenses, and words that only the texts of these licences have."""

OWN = "blockcopy"
"""The program itself, whose licence stands at the top of debian/copyright."""


def texts(folder: Path) -> list[str]:
    """Return the licences of the package with the metadata in `folder`, each as a text or as the file of Debian."""
    found = []
    for file in sorted(folder.rglob("*")):
        if file.is_file() and any(word in file.name.upper() for word in ("LICENSE", "LICENCE", "COPYING")):
            text = file.read_text(encoding="utf-8")
            known = [name for name, words in COMMON.items() if words in text]
            found += [f"See /usr/share/common-licenses/{name}" for name in known] or [text]
    return found


def notice(distribution: Distribution, licences: list[str]) -> str:
    """Return the part of debian/copyright about `distribution`, which has the texts `licences`."""
    about = distribution.metadata
    author = about.get("Author") or about.get("Author-email") or "see the licence"
    title = f"{about['Name']} {distribution.version}, from the Python Package Index"
    named = about.get("License-Expression") or about.get("License") or ""
    head = [title, f"Author: {author}"] + ([f"License: {named}"] if named and "\n" not in named else [])
    return "\n".join([*head, "", *(textwrap.indent(text.strip(), "    ") + "\n" for text in licences)])


def main() -> None:
    """Print the notices of all packages in the folder that the command line names."""
    for folder in sorted(Path(sys.argv[1]).glob("*.dist-info")):
        distribution = PathDistribution(folder)
        if distribution.metadata["Name"] == OWN:
            continue
        licences = texts(folder)
        if not licences:
            raise SystemExit(f"{folder}: no file with a licence")
        print("-" * 80, notice(distribution, licences), sep="\n")


main()
