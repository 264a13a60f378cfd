"""Blocks as plain text, for people without man(1). On a terminal, headings and what is typed are bold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from blockcopy_fuse.manual.markup import Block, Bullets, Code, Heading, Line, Paragraph, Span, Table, Terms
from blockcopy_fuse.manual.roff import column_widths

_INDENT = 4
"""Columns by which the text of a section is indented."""

_ESCAPES = {"bold": "\x1b[1m{}\x1b[0m", "italic": "\x1b[4m{}\x1b[0m"}

_STYLED = re.compile(r"\x1b\[\d+m")


def page(blocks: Iterable[Block], width: int, *, styled: bool = False) -> str:
    """Return `blocks` as text, lines of at most `width` columns. `styled`: with the escapes of a terminal."""
    lines: list[str] = []
    before: Block | None = None
    for block in blocks:
        if lines and not isinstance(before, Heading):
            lines.append("")
        indent = 2 * (block.level - 2) if isinstance(block, Heading) else _INDENT
        before = block
        lines += [f"{' ' * indent}{each}".rstrip() for each in _lines(block, width - indent, styled)]
    return "\n".join(lines)


def _lines(block: Block, width: int, styled: bool) -> Iterator[str]:
    """Yield the lines of `block`. `width`: their columns. `styled`: as for `page`."""
    if isinstance(block, Heading):
        yield _shown(Span(block.title, "bold"), styled)
    elif isinstance(block, Paragraph):
        yield from _filled(block.line, width, styled)
    elif isinstance(block, Code):
        yield from (f"    {each}" for each in block.text.split("\n"))
    elif isinstance(block, Bullets):
        for item in block.items:
            yield from _hanging("- ", item, width, styled)
    elif isinstance(block, Terms):
        for term, description in block.items:
            yield "".join(_shown(span, styled) for span in term)
            yield from (f"    {each}" for each in _filled(description, width - 4, styled))
    elif isinstance(block, Table):
        yield from _table(block, width, styled)
    else:
        raise TypeError(f"{block} was not replaced")


def _hanging(mark: str, item: Line, width: int, styled: bool) -> Iterator[str]:
    """Yield the lines of `item` behind `mark`. `width`, `styled`: as for `_lines`."""
    for number, each in enumerate(_filled(item, width - len(mark), styled)):
        yield (" " * len(mark) if number else mark) + each


def _table(table: Table, width: int, styled: bool) -> Iterator[str]:
    """Yield the lines of `table`. `width`, `styled`: as for `_lines`."""
    lengths = [[sum(len(span.text) for span in cell) for cell in row] for row in table.rows]
    widths = column_widths(lengths, width - 2 * (len(table.rows[0]) - 1))
    for row in table.rows:
        cells = [[*_filled(cell, columns, styled)] for cell, columns in zip(row, widths, strict=True)]
        for number in range(max(map(len, cells))):
            texts = [cell[number] if number < len(cell) else "" for cell in cells]
            padded = [text + " " * (columns - _length(text)) for text, columns in zip(texts, widths, strict=True)]
            yield "  ".join(padded)


def _filled(line: Line, width: int, styled: bool) -> Iterator[str]:
    """Yield the words of `line` in lines of at most `width` columns. `styled`: as for `page`."""
    shown = ""
    for word in _words(line, styled):
        if shown and _length(shown) + 1 + _length(word) > width:
            yield shown
            shown = word
        else:
            shown = f"{shown} {word}" if shown else word
    if shown:
        yield shown


def _words(line: Line, styled: bool) -> list[str]:
    """Return the words of `line`, each with its own escapes if `styled`."""
    marked = "".join(
        " ".join(_shown(Span(word, span.style), styled) if word else "" for word in span.text.split(" "))
        for span in line
    )
    return marked.split()


def _shown(span: Span, styled: bool) -> str:
    return _ESCAPES[span.style].format(span.text) if styled and span.style else span.text


def _length(text: str) -> int:
    """Return the columns of `text`, without its escapes."""
    return len(_STYLED.sub("", text))
