"""The generated parts of the pages: options from the parser, fields from dataclasses, messages from `wire`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Iterator

from blockcopy.block import identity
from blockcopy.cli.parser import parser
from blockcopy.cli.suggestions import commands_of
from blockcopy.protocol import digests, wire
from blockcopy.replica.monitor import status
from blockcopy.replica.monitor.result import Result, SyncResult, VerifyResult
from blockcopy.replica.monitor.status import LinkStatus, ReadStatus, Status
from blockcopy.replica.source import dialects
from blockcopy.stage import join
from blockcopy.transport import bootstrap
from blockcopy_fuse import mount_helper, options
from blockcopy_fuse.manual import common, markup
from blockcopy_fuse.manual.markup import Block, Code, Heading, Line, Paragraph, Span, Table, Terms

_HIDDEN = ("-h", "--version")
"""Options that need no description on a page of a command."""


def synopsis(command: argparse.ArgumentParser) -> Line:
    """Return the usage of `command` as a Line: what is typed bold, what is replaced italic."""
    words = command.format_usage().removeprefix("usage: ").split()
    return _joined(Span(word, "italic" if word.strip("[].").isupper() else "bold") for word in words)


def options_of(command: argparse.ArgumentParser, level: int = 3) -> list[Block]:
    """Return the arguments and options of `command`, by groups with headings of `level`, as blocks."""
    found: list[Block] = []
    for group in command._action_groups:
        actions = [each for each in group._group_actions if not _is_hidden(each)]
        if actions:
            if group.title not in ("positional arguments", "options", "optional arguments"):
                found.append(Heading(level, str(group.title)[0].upper() + str(group.title)[1:]))
            found.append(Terms(tuple((_term(each), markup.line(_help(each))) for each in actions)))
    return found


def _is_hidden(action: argparse.Action) -> bool:
    return action.help == argparse.SUPPRESS or bool(set(action.option_strings) & {*_HIDDEN})


def _help(action: argparse.Action) -> str:
    """Return the help of `action` as sentences: with a capital letter and a full stop."""
    text = str(action.help or "").replace("%%", "%")
    return f"{text[:1].upper()}{text[1:]}."


def _term(action: argparse.Action) -> Line:
    """Return the names of `action`, and its value."""
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    if not action.option_strings:
        return (Span(value, "italic"),)
    names = _joined((Span(name, "bold") for name in action.option_strings), ", ")
    return (*names, Span(" "), Span(value, "italic")) if value else names


def _joined(spans: Iterable[Span], separator: str = " ") -> Line:
    found: list[Span] = []
    for span in spans:
        found += [Span(separator), span] if found else [span]
    return tuple(found)


def common_rows(table: tuple[common.Row, ...], command: str | None = None) -> list[Block]:
    """Return the rows of `table`, one of `common`, as blocks. `command`: as for `common.rows`."""
    found = common.rows(table, command)
    return [Terms(tuple(((Span(row.term, "bold"),), markup.line(row.text)) for row in found))] if found else []


def _commands() -> list[Block]:
    """Return the commands with their summaries."""
    found = commands_of(parser())
    return [
        Terms(
            tuple(
                ((reference(f"blockcopy-{name}", 1)), markup.line(_summary(each))) for name, each in found.items()
            )
        )
    ]


def _summary(command: argparse.ArgumentParser) -> str:
    return str(command.description)


def reference(name: str, section: int) -> Line:
    """Return the Line that refers to the page `name` of `section` of the manual."""
    return Span(name, "bold"), Span(f"({section})")


def _fields(kind: type[Status | ReadStatus | LinkStatus | Result], prefix: str = "") -> Iterator[tuple[Line, Line]]:
    """Yield a term for each field of the class `kind`: `prefix` and its name and type, and its help."""
    for field in dataclasses.fields(kind):
        if isinstance(field.default, (ReadStatus, LinkStatus)):
            yield from _fields(type(field.default), f"{field.name}.")
        else:
            name = Span(prefix + field.name, "bold")
            yield (name, Span(f" ({_json_type(str(field.type))})")), markup.line(field.metadata["help"])


_JSON_TYPES = {"int": "number", "float": "number", "str": "text", "bool": "true or false"}


def _json_type(annotation: str) -> str:
    """Return the type of a field in JSON, for its `annotation` in Python."""
    kind, _, optional = annotation.partition(" | ")
    shown = "array" if kind.startswith("tuple") else _JSON_TYPES.get(kind, "text")
    return f"{shown} or null" if optional else shown


def _status_fields() -> list[Block]:
    return [Terms(tuple(_fields(Status)))]


def _metrics() -> list[Block]:
    found: list[tuple[Line, Line]] = []
    for kind in (Status, ReadStatus, LinkStatus):
        for field in dataclasses.fields(kind):
            if name := field.metadata["metric"]:
                found.append(((Span(name, "bold"),), markup.line(field.metadata["help"])))
    return [Terms(tuple(found))]


def _map_fields() -> list[Block]:
    names = ", ".join(f"`{field.name}`" for field in dataclasses.fields(status.MapCell))
    return [Paragraph(markup.line(f"A cell has the fields {names}, which count blocks."))]


def _docstring_part(text: str | None) -> list[Block]:
    """Return a module's docstring `text` as blocks, without its first line and references to other modules.

    Returns [] if Python has removed the docstrings.
    """
    shown = re.sub(r"\s\(see `[\w.]+`\)", "", inspect.cleandoc(text or ""))
    return markup.parse(shown.partition("\n")[2])


def _layouts() -> list[Block]:
    """Return a table of all messages: their commands, their fixed fields, the limit of their payload."""
    rows = ["command", "hash stream", "block stream", "fixed fields", "payload, at most"]
    found = [tuple(markup.line(cell) for cell in rows)]
    for layout in wire._LAYOUTS.values():
        asked = layout.command in wire.HASH_STREAM
        answered = "any form" if layout.command in wire.BLOCK_STREAM else "negotiated"
        cells = [
            f"`{layout.command.decode()}`",
            "yes" if asked else "–",
            answered if layout.command in wire.NEGOTIATED_BLOCK_STREAM else "–",
            f"{layout.fields.size} bytes",
            "–" if layout.max_payload is None else f"{layout.max_payload} bytes",
        ]
        found.append(tuple(markup.line(cell) for cell in cells))
    return [Table(tuple(found))]


def _digests() -> list[Block]:
    made = {name: digests.named(name).size for name in digests.NAMES if name != digests.FASTEST}
    sizes = {digests.FASTEST: 32, **made}
    return [
        Terms(tuple(((Span(name, "bold"),), markup.line(f"{size} bytes.")) for name, size in sizes.items())),
    ]


def _limits() -> list[Block]:
    """Return the limits of `wire`, each with its docstring."""
    source = inspect.getsource(wire)
    found = re.findall(r'^(MAX_\w+|MIN_\w+|PROTOCOL) = .*\n"""([^"]*)"""', source, re.MULTILINE)
    return [Terms(tuple(((Span(f"{getattr(wire, name)}", "bold"),), markup.line(text)) for name, text in found))]


def _fences() -> list[Block]:
    text = (
        "The original answers when its queue is full. So a client that waits for answers sends "
        f"{dialects.FENCES} messages `Hash` of size 0 with a wrong digest. Each is answered by an empty `data`, "
        "behind all earlier answers."
    )
    return [Paragraph(markup.line(text))]


def _fuse_options() -> list[Block]:
    names = sorted({*options.FLAGS, *(f"{name}=" for name in options.VALUES)})
    refused = " ".join(f"`{name}` is refused: {reason}." for name, reason in options.REFUSED.items())
    return [
        Paragraph(markup.line(f"All options of `-o`: {', '.join(f'`{name}`' for name in names)}.")),
        Paragraph(markup.line(refused)),
    ]


PARTS: dict[str, Callable[[], list[Block]]] = {
    "commands": _commands,
    "global options": lambda: [
        Terms(tuple((_term(each), markup.line(_help(each))) for each in parser()._actions if each.option_strings))
    ],
    "exit statuses": lambda: common_rows(common.EXIT_STATUSES),
    "files": lambda: common_rows(common.FILES),
    "environment": lambda: common_rows(common.ENVIRONMENT),
    "status fields": _status_fields,
    "results": lambda: [Terms(tuple(_fields(Result)))],
    "sync result": lambda: [Terms(tuple(_fields(SyncResult))[len(dataclasses.fields(Result)) :])],
    "verify result": lambda: [Terms(tuple(_fields(VerifyResult))[len(dataclasses.fields(Result)) :])],
    "map fields": _map_fields,
    "metrics": _metrics,
    "options of -o": _fuse_options,
    "the streams": lambda: _docstring_part(wire.__doc__),
    "messages": _layouts,
    "fences": _fences,
    "limits": _limits,
    "digests": _digests,
    "joins": lambda: _docstring_part(join.__doc__),
    "mark": lambda: [Code(repr(bootstrap.MARK.decode()))],
    "options of mount.blockcopy": lambda: options_of(mount_helper.parser()),
    "identity": lambda: _docstring_part(identity.__doc__),
}
"""The generated parts, by the names that topic files use."""
