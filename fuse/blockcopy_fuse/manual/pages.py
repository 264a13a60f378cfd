"""The pages of the manual: one for each command, made from the parser, and one for each topic file.

A topic file can have the name of a command's page. Then its sections become sections of that page.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from typing import NamedTuple

from blockcopy import __version__
from blockcopy.cli.parser import parser
from blockcopy.cli.suggestions import commands_of
from blockcopy.cli.versions import RELEASED
from blockcopy.errors import DeviceError, UsageError
from blockcopy.paths import safe_write
from blockcopy_fuse.manual import common, generated, markup, roff
from blockcopy_fuse.manual.markup import Block, Code, Heading, Paragraph, Part, Span

_FIRST = ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS")
_LAST = ("EXAMPLES", "EXIT STATUS", "FILES", "ENVIRONMENT", "SIGNALS", "SEE ALSO")
"""Sections of a page, in their order. A topic file's other sections are in between."""


class Title(NamedTuple):
    """The `name` of a page and its `section` of the manual. Pages are sorted by both."""

    section: int
    name: str

    def __str__(self) -> str:
        """Return the title as people write it, such as blockcopy(1)."""
        return f"{self.name}({self.section})"


@dataclass(frozen=True)
class Page:
    """A page: its title, one line about it, and all its blocks."""

    title: Title
    summary: str
    blocks: tuple[Block, ...]

    @property
    def file_name(self) -> str:
        """The page's file below a folder of manuals, such as man1/blockcopy.1."""
        return f"man{self.title.section}/{self.title.name}.{self.title.section}"

    def as_roff(self) -> str:
        """Return the page as text for man(1)."""
        return roff.page(self.title.name, self.title.section, RELEASED, f"blockcopy {__version__}", self.blocks)


def titles() -> list[Title]:
    """Return the titles of all pages, in order."""
    commands = [Title(1, f"blockcopy-{name}") for name in commands_of(parser())]
    return sorted({*commands, *(_title_of(name) for name in topic_files())})


def topic_files() -> dict[str, str]:
    """Return the texts of the topic files: a dict, file name → Markdown."""
    folder = resources.files("blockcopy_fuse.manual").joinpath("topics")
    return {each.name: each.read_text("utf-8") for each in folder.iterdir() if each.name.endswith(".md")}


def find(word: str) -> Page:
    """Return the page that `word` names: a page, a command, or a topic without `blockcopy-`.

    Of pages with the same name, the first section counts, unless `word` names one: `state.7`.
    Raises UsageError if there is no such page.
    """
    known = {title.name: title for title in reversed(titles())}
    sections = {f"{title.name}.{title.section}": title for title in titles()}
    for name in (f"blockcopy-{word}", word):
        if (found := known.get(name) or sections.get(name)) is not None:
            return page(found)
    short = [name.removeprefix("blockcopy-") for name in known]
    nearest = get_close_matches(word, short, 1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(short)}"
    raise UsageError(f"there is no page {word!r}; {hint}")


def page(title: Title) -> Page:
    """Return the page called `title`, one of `titles()`."""
    text = topic_files().get(f"{title.name}.{title.section}.md", "")
    blocks = markup.parse(text)
    summary = ""
    if blocks and isinstance(blocks[0], Heading) and blocks[0].level == 1:
        summary = blocks[0].title.partition(" - ")[2]
        del blocks[0]
    command = commands_of(parser()).get(title.name.removeprefix("blockcopy-")) if title.section == 1 else None
    if command is not None:
        summary = _summary(command)
        blocks = _command_page(title.name.removeprefix("blockcopy-"), command, blocks)
    name: list[Block] = [Heading(2, "NAME"), Paragraph((Span(f"{title.name} - {summary}"),))]
    return Page(title, summary, tuple(_complete(title, [*name, *blocks])))


def overview() -> Page:
    """Return a list of all pages, as a page. It is shown by `help`, and not installed."""
    text = "`blockcopy help PAGE` shows a page: a command, or a topic without `blockcopy-`."
    blocks = (
        Paragraph(markup.line(text)),
        Heading(2, "COMMANDS"),
        *generated.PARTS["commands"](),
        Heading(2, "TOPICS"),
        *_topics(),
    )
    return Page(Title(1, "blockcopy"), "", blocks)


def install(folder: str) -> Iterator[str]:
    """Write all pages below `folder`, into man1 and the like. Yield the path of each file.

    Raises DeviceError if a file cannot be written.
    """
    for title in titles():
        made = page(title)
        path = os.path.join(folder, made.file_name)
        with DeviceError.on_os_error("write", path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            safe_write.replace(path, made.as_roff().encode(), 0o644)
        yield path


def _title_of(file_name: str) -> Title:
    name, section, _ = file_name.rsplit(".", 2)
    return Title(int(section), name)


def _summary(command: argparse.ArgumentParser) -> str:
    """Return the summary of `command`, as in the help of the program: its description without the full stop."""
    text = str(command.description).removesuffix(".")
    return text[0].lower() + text[1:]


def _command_page(name: str, command: argparse.ArgumentParser, more: list[Block]) -> list[Block]:
    """Return the blocks of the page of `command`, called `name`. `more`: blocks of its topic file."""
    sections: dict[str, list[Block]] = {
        "SYNOPSIS": [Paragraph(generated.synopsis(command))],
        "DESCRIPTION": [Paragraph((Span(str(command.description)),))],
        "OPTIONS": generated.options_of(command),
    }
    own = _sections(more)
    if "DESCRIPTION" in own:
        del sections["DESCRIPTION"]
    example = str(command.epilog).removeprefix("example: ")
    common_sections: dict[str, list[Block]] = {
        "EXAMPLES": [] if "EXAMPLES" in own else [Code(example)],
        "EXIT STATUS": [
            *generated.common_rows(common.EXIT_STATUSES, name),
            Paragraph(markup.line("**blockcopy**(1) tells more about each.")),
        ],
        "FILES": generated.common_rows(common.FILES, name),
        "ENVIRONMENT": generated.common_rows(common.ENVIRONMENT, name),
        "SIGNALS": generated.common_rows(common.SIGNALS, name),
    }
    for title in {**own, **common_sections}:
        sections[title] = [*sections.get(title, []), *common_sections.get(title, []), *own.get(title, [])]
    between = [each for each in own if each not in _FIRST + _LAST]
    found: list[Block] = []
    for title in [*_FIRST, *between, *_LAST]:
        if content := sections.get(title):
            found += [Heading(2, title), *content]
    return found


def _sections(blocks: Iterable[Block]) -> dict[str, list[Block]]:
    """Return the sections of `blocks`: a dict, title → blocks. Blocks before a heading belong to DESCRIPTION."""
    found: dict[str, list[Block]] = {}
    title = "DESCRIPTION"
    for block in blocks:
        if isinstance(block, Heading) and block.level == 2:
            title = block.title
        else:
            found.setdefault(title, []).append(block)
    return found


def _complete(title: Title, blocks: Iterable[Block]) -> Iterator[Block]:
    """Yield `blocks` with all generated parts in their places, and SEE ALSO: the pages other than `title`."""
    for block in blocks:
        if isinstance(block, Part):
            yield from _topics() if block.name == "topics" else generated.PARTS[block.name]()
        else:
            yield block
    yield Heading(2, "SEE ALSO")
    others = [each for each in titles() if each != title and not _is_command(each)]
    spans = [span for each in others for span in (Span(", "), Span(each.name, "bold"), Span(f"({each.section})"))]
    yield Paragraph(tuple(spans[1:]))


def _is_command(title: Title) -> bool:
    return title.section == 1 and title.name != "blockcopy"


def _topics() -> list[Block]:
    """Return the pages that are not of a command, with their summaries."""
    found = []
    for name, text in topic_files().items():
        title = _title_of(name)
        if not _is_command(title) and title.name != "blockcopy":
            summary = text.partition("\n")[0].partition(" - ")[2]
            sentence = f"{summary[:1].upper()}{summary[1:]}."
            found.append((title, generated.reference(title.name, title.section), markup.line(sentence)))
    return [markup.Terms(tuple((term, summary) for _, term, summary in sorted(found)))]
