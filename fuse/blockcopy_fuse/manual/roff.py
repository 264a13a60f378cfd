"""Blocks as roff, for man(1): the macros of man(7), and tbl(1) for tables."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from blockcopy_fuse.manual.markup import Block, Bullets, Code, Heading, Line, Paragraph, Table, Terms

_SPECIAL = {
    ord("\\"): "\\e",
    ord("-"): "\\-",
    ord("'"): "\\(aq",
    ord("`"): "\\(ga",
    ord("^"): "\\(ha",
    ord("~"): "\\(ti",
}
"""Characters that roff would change to typographic ones, or take for its own."""

_FONTS = {"": "\\fR", "bold": "\\fB", "italic": "\\fI"}

_LINE_WIDTH = 70
"""Columns of a table on a terminal of 80 columns."""

_GAP = 3
"""Columns between two columns of a table."""


def page(title: str, section: int, date: str, source: str, blocks: Iterable[Block]) -> str:
    """Return the manual page of `blocks` as roff.

    `title`: name of the page. `section`: its number in the manual. `date`: of the version, as YYYY-MM-DD.
    `source`: program and version.
    """
    lines: list[str] = []
    before: Block | None = None
    for block in blocks:
        if isinstance(block, (Paragraph, Code, Table)) and not isinstance(before, Heading):
            lines.append(".PP")
        lines.append(_rendered(block))
        before = block
    preprocessor = "'\\\" t\n" if ".TS\n" in "\n".join(lines) else ""
    name, about = (
        " ".join(map(_argument, words)) for words in ((title.upper(), str(section)), (source, "blockcopy manual"))
    )
    return "\n".join([f'{preprocessor}.TH {name} "{date}" {about}', ".nh", ".ad l", *lines, ""])


def _rendered(block: Block) -> str:
    if isinstance(block, Heading):
        return f".{'SH' if block.level == 2 else 'SS'} {_argument(block.title)}"
    if isinstance(block, Paragraph):
        return _filled(block.line)
    if isinstance(block, Code):
        lines = "\n".join(_guarded(_escaped(line)) for line in block.text.split("\n"))
        return f".RS 4\n.EX\n{lines}\n.EE\n.RE"
    if isinstance(block, Bullets):
        return "\n".join(f".IP \\(bu 2\n{_filled(item)}" for item in block.items)
    if isinstance(block, Terms):
        return "\n".join(f".TP\n{_text(term)}\n{_filled(description)}" for term, description in block.items)
    if isinstance(block, Table):
        return _table(block.rows)
    raise TypeError(f"{block} was not replaced")


def _table(rows: Sequence[tuple[Line, ...]]) -> str:
    """Return `rows`, the first of which is the heading, as input of tbl."""
    widths = column_widths(
        [[sum(len(span.text) for span in cell) for cell in row] for row in rows],
        _LINE_WIDTH - _GAP * (len(rows[0]) - 1),
    )
    formats = " ".join(f"lw({width}n)" for width in widths)
    heading = " ".join(f"lbw({width}n)" for width in widths)
    lines = ["\t".join(f"T{{\n{_filled(cell)}\nT}}" if cell else "" for cell in row) for row in rows]
    return "\n".join([".na", ".TS", f"{heading}", f"{formats}.", *lines, ".TE", ".ad"])  # narrow cells stay ragged


def column_widths(lengths: Sequence[Sequence[int]], width: int) -> list[int]:
    """Return the list of widths of the columns of a table, together at most `width` if that is possible.

    `lengths`: for each row, the characters of each cell. The widest columns are made narrower.
    """
    widths = [max(column) for column in zip(*lengths, strict=True)]
    while sum(widths) > width and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1
    return widths


def _filled(line: Line) -> str:
    """Return `line` as lines of roff of at most 80 characters, if its words allow this."""
    words = textwrap.wrap(_text(line), 80, break_long_words=False, break_on_hyphens=False)
    return "\n".join(_guarded(each) for each in words)


def _text(line: Line) -> str:
    """Return `line` as one line of roff."""
    words, style = "", ""
    for span in line:
        words += ("" if span.style == style else _FONTS[span.style]) + _escaped(span.text)
        style = span.style
    return _guarded(words) + (_FONTS[""] if style else "") or "\\&"


def _escaped(text: str) -> str:
    return text.translate(_SPECIAL)


def _guarded(line: str) -> str:
    """Return `line` so that roff takes it for text, even if it begins as a request does."""
    return f"\\&{line}" if line.startswith((".", "\\(aq")) else line


def _argument(text: str) -> str:
    """Return `text` as an argument of a macro."""
    return '"' + _escaped(text).replace('"', "\\(dq") + '"'
