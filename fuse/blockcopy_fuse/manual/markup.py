"""Markdown of the topic files, parsed into blocks. Both `roff` and `text` render blocks.

A block is a heading, a paragraph, a list, a table, or code. Code is command lines or a picture, never filled.
A table of two columns becomes a list of terms, whose heading is dropped. An HTML comment names a generated part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode


class Span(NamedTuple):
    """A piece of `text` in one `style`: "" for plain, "bold" for what is typed, "italic" for what is replaced."""

    text: str
    style: str = ""


Line = tuple[Span, ...]
"""The text of a paragraph, without line breaks."""


@dataclass(frozen=True)
class Heading:
    """The heading of a section, of `level` 2, or of a part of a section, of level 3."""

    level: int
    title: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph, which is filled."""

    line: Line


@dataclass(frozen=True)
class Code:
    """Lines that are shown as they are."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list. Each of its `items` is a paragraph."""

    items: tuple[Line, ...]


@dataclass(frozen=True)
class Terms:
    """A list of terms, each with its description."""

    items: tuple[tuple[Line, Line], ...]


@dataclass(frozen=True)
class Table:
    """A table of three columns or more. Its first row is the heading."""

    rows: tuple[tuple[Line, ...], ...]


@dataclass(frozen=True)
class Part:
    """The place of a generated part, by its `name`."""

    name: str


Block = Heading | Paragraph | Code | Bullets | Terms | Table | Part

_PARSER = MarkdownIt("commonmark").enable("table")

_STYLES = {"code_inline": "bold", "strong": "bold", "em": "italic"}


class MarkupError(ValueError):
    """A construct of Markdown that the pages do not use."""


def parse(text: str) -> list[Block]:
    """Return the blocks of `text`, Markdown, as a list. Raises MarkupError for a construct that is not known."""
    return [_block(node) for node in SyntaxTreeNode(_PARSER.parse(text)).children]


def line(text: str) -> Line:
    """Return the Line of `text`, Markdown of one paragraph. Indented text is a paragraph too."""
    [inline] = _PARSER.parseInline(" ".join(text.split()))
    return _spans(SyntaxTreeNode([inline]).children[0].children)


def plain(spans: Line) -> str:
    """Return the text of `spans`, a Line, without styles."""
    return "".join(span.text for span in spans)


def _block(node: SyntaxTreeNode) -> Block:
    if node.type == "heading":
        return Heading(int(node.tag[1:]), plain(_inline(node)))
    if node.type == "paragraph":
        return Paragraph(_inline(node))
    if node.type in ("code_block", "fence"):
        return Code(node.content.rstrip("\n"))
    if node.type == "bullet_list":
        return Bullets(tuple(_inline(_only(item.children)) for item in node.children))
    if node.type == "table":
        rows = tuple(
            tuple(_inline(cell) for cell in row.children) for part in node.children for row in part.children
        )
        return Terms(tuple((first, second) for first, second in rows[1:])) if len(rows[0]) == 2 else Table(rows)
    if found := re.fullmatch(r"<!-- (.*) -->\s*", node.content if node.type == "html_block" else ""):
        return Part(found[1])
    raise MarkupError(f"{node.type}: {node.content[:60]!r}")


def _inline(node: SyntaxTreeNode) -> Line:
    """Return the Line in `node`, whose children are at most one node of inline text."""
    return _spans(node.children[0].children) if node.children else ()


def _only(nodes: list[SyntaxTreeNode]) -> SyntaxTreeNode:
    """Return the one member of `nodes`. Raises MarkupError if there are more."""
    if len(nodes) != 1:
        raise MarkupError(f"a list item of {len(nodes)} paragraphs: {nodes[0].content[:60]!r}")
    return nodes[0]


def _spans(nodes: Iterable[SyntaxTreeNode], style: str = "") -> Line:
    """Return the Line of `nodes`, inline text that is in `style`. Raises MarkupError for images and the like."""
    found: list[Span] = []
    for node in nodes:
        if node.type in ("text", "text_special"):
            found.append(Span(node.content, style))
        elif node.type == "softbreak":
            found.append(Span(" ", style))
        elif node.type == "code_inline":
            found.append(Span(node.content, "bold"))
        elif node.type in _STYLES:
            found.extend(_spans(node.children, _STYLES[node.type]))
        elif node.type == "link":
            found.append(Span(str(node.attrs["href"]), "italic"))
        else:
            raise MarkupError(f"{node.type}: {node.content[:60]!r}")
    return tuple(span for span in found if span.text)
