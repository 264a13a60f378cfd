"""The program that `transport.payload` sends to another host: the copy stages alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from blockcopy.cli import commands, program
from blockcopy.cli.stage_parser import add_stages


def main(argv: Sequence[str]) -> NoReturn:
    """Run the stage that the arguments `argv` name, and exit with its status."""
    parser = argparse.ArgumentParser(prog="blockcopy")
    add_stages(parser.add_subparsers(dest="command", required=True))
    program.run(parser, lambda name: getattr(commands, name), argv, {})
