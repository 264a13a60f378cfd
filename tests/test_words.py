"""The mechanical part of the rules for words (CONTRIBUTING.md), for docstrings, messages and pages.

What a person has to judge is not here. Each finding names its file, line and rule.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for folder in ("blockcopy", "fuse") for path in (CHECKOUT / folder).rglob("*.py"))

MAX_WORDS = 20
"""Words of a sentence. What stands in backticks is one word."""

_NO_BEGINNING = """
    What Where Whether Which Who Whoever Whose How Of As Have That Those This These It Its One All None The A An For
    From In On At By With Without Until Before After While When If Bytes Seconds Thread-safe Same Also And Not No
"""
NO_BEGINNING = frozenset(_NO_BEGINNING.split())
"""Words that no imperative begins with. Docstrings of functions begin with a verb."""

HOME_WORDS = re.compile(
    r"taken up|made again|stands? still|\blet go\b|cannot be meant|is to be\b|has to be had|\bmaterialis|\bsweep\b"
    r"|\bthe pass\b|(?<!in[ -])\bflights?\b|\bparcel\b|\bkeeper\b"
)
"""Home-made words, for which CONTRIBUTING.md has the field's."""

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def is_property(node: ast.AST) -> bool:
    return isinstance(node, Function) and any("property" in ast.unparse(each) for each in node.decorator_list)


def docstrings(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.Constant]]:
    """Find the docstrings of modules, classes and functions, and those behind attributes, with their owners."""
    for node in ast.walk(tree):
        body = getattr(node, "body", [])
        for place, each in enumerate(body if isinstance(body, list) else []):
            if (
                isinstance(each, ast.Expr)
                and isinstance(each.value, ast.Constant)
                and isinstance(each.value.value, str)
            ):
                yield (body[place - 1] if place else node), each.value


def sentences(text: str) -> Iterator[str]:
    """Split the prose of a docstring. Indented lines are pictures, tables and examples."""
    lines = [line for line in text.splitlines() if not re.match(r" {4,}\S", line) or not line.strip()]
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        for part in re.split(r"(?<=[.!?:])\s+(?=[A-Z`(])|\n(?=- )", paragraph.strip()):
            yield re.sub(r"`[^`]*`", "code", part)


def raised_by(node: ast.AST) -> set[str]:
    """Find the error classes that a function itself raises, and does not catch."""
    caught = {
        ast.unparse(each.type) for each in ast.walk(node) if isinstance(each, ast.ExceptHandler) and each.type
    }
    names = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Raise) and isinstance(each.exc, ast.Call):
            name = ast.unparse(each.exc.func).split(".")[0]
            if name.endswith("Error") and name not in caught:
                names.add(name)
    return names


KNOWN = frozenset(["self", "cls", "ctx"])
"""Arguments that need no word: `ctx` is pyfuse3's, and is not used."""


def unmentioned(node: ast.FunctionDef | ast.AsyncFunctionDef, said: str) -> Iterator[str]:
    """Find the arguments and the return value that a docstring does not mention.

    An argument is mentioned in backticks, or by the words of its name.
    """
    words = {word.removesuffix("s").removesuffix("e") for word in re.findall(r"[a-z]+", said.lower())}
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg]
    for argument in filter(None, arguments):
        name = argument.arg
        parts = {part.removesuffix("s").removesuffix("e") for part in name.split("_") if part}
        if name not in KNOWN and not name.startswith("_") and f"`{name}`" not in said and not parts <= words:
            yield f"the argument {name!r}"
    returned = ast.unparse(node.returns) if node.returns else "None"
    has_result = returned not in ("None", "NoReturn", "Self") and not is_property(node)
    if has_result and not re.search(r"\b(return|yield)", said.lower()):
        yield f"that it returns {returned}"


def findings(path: Path) -> Iterator[str]:
    text = path.read_text()
    name = path.relative_to(CHECKOUT)
    for owner, constant in docstrings(ast.parse(text)):
        said = inspect.cleandoc(constant.value)
        at = f"{name}:{constant.lineno}"
        first = re.match(r"[\w-]*", said)
        if isinstance(owner, Function) and not is_property(owner) and first and first[0] in NO_BEGINNING:
            yield f"{at}: begins with {first[0]!r}, not with a verb"
        for sentence in sentences(said):
            if len(sentence.split()) > MAX_WORDS:
                yield f"{at}: {len(sentence.split())} words: {sentence[:60]!r}"
            if ":" in sentence.rstrip(":") and ";" in sentence:
                yield f"{at}: a colon and a semicolon: {sentence[:60]!r}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Function) and (said := ast.get_docstring(node)):
            for each in unmentioned(node, said):
                yield f"{name}:{node.lineno}: {node.name} does not mention {each}"
        if isinstance(node, Function) and not node.name.startswith("_"):
            said = ast.get_docstring(node) or ""
            missing = {each for each in raised_by(node) if each not in said} if said else set()
            if missing:
                yield f"{name}:{node.lineno}: does not tell that it raises {', '.join(sorted(missing))}"
    for number, line in enumerate(text.splitlines(), 1):
        if found := HOME_WORDS.search(line):
            yield f"{name}:{number}: home word {found[0]!r}"


def prose(markdown: str) -> Iterator[str]:
    """Find the sentences of `markdown`, without code, tables, headings and links to pictures."""
    text = re.sub(r"^(```.*?^```|<!--.*?-->)", "", markdown, flags=re.DOTALL | re.MULTILINE)
    lines = ["" if re.match(r" {4}|[|#!]", line) else line for line in text.splitlines()]
    yield from sentences("\n".join(lines).replace("**", "").replace(".)", "."))


def test_pages_follow_the_rules() -> None:
    files = [CHECKOUT / "README.md", *CHECKOUT.glob("fuse/blockcopy_fuse/manual/topics/*.md")]
    found = []
    for path in files:
        for sentence in prose(path.read_text()):
            words = [word for word in sentence.split() if word != "-"]
            if len(words) > MAX_WORDS:
                found.append(f"{path.name}: {len(words)} words: {' '.join(words)[:90]!r}")
            if home := HOME_WORDS.search(sentence):
                found.append(f"{path.name}: home word {home[0]!r}")
    assert not found, "\n".join(found)


def test_words_follow_the_rules() -> None:
    found = [each for path in SOURCES for each in findings(path)]
    assert not found, "\n".join(found)
