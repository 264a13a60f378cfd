"""`mount.blockcopy`, which mount(8) calls for the type blockcopy: translates its arguments for `blockcopy mount`.

    mount.blockcopy SOURCE MOUNTPOINT [-sfnv] [-N NAMESPACE] [-t TYPE] -o dest=DESTINATION[,OPTION…]

An OPTION with the name of a long option of `blockcopy mount`, such as limit=20M or no-state, becomes that option.
`_` may stand for `-`. Options that mount(8) and systemd handle themselves are ignored. All others go to `-o`.
"""

from __future__ import annotations

import argparse

from blockcopy.cli import main as cli
from blockcopy.cli.parser import long_options
from blockcopy.cli.suggestions import ConsoleParser
from blockcopy_fuse import options

_IGNORED = {
    *("defaults", "auto", "noauto", "nofail", "_netdev", "rw", "comment", "pri", "helper", "uhelper"),
    *("user", "nouser", "users", "owner", "noowner", "group", "nogroup"),
}
"""Options of mount(8), fstab(5) and systemd.mount(5). Names with x- or X- are ignored too.

`rw` is among them because mount(8) adds it by default.
"""

_EXCLUDED = {"help", "foreground"}
"""Long options of `blockcopy mount` that make no sense in fstab."""


def main() -> None:
    """Mount as the command line says. Returns when it is mounted, else exits with a status above 0."""
    args = parser().parse_args()
    if not args.fake:
        cli.main(command_line(args))


def parser() -> ConsoleParser:
    """Return the parser of the helper's arguments."""
    parser = ConsoleParser(
        prog="mount.blockcopy", description="For mount(8): mount -t blockcopy SOURCE MOUNTPOINT -o dest=DESTINATION"
    )
    parser.add_argument("source", metavar="SOURCE", help="[user@]host:/path or a local path; only read")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing folder, or a file")
    parser.add_argument(
        "-o", dest="options", metavar="OPTIONS", action="append", default=[], help="separated by commas"
    )
    parser.add_argument("-s", dest="sloppy", action="store_true", help="ignore unknown options")
    parser.add_argument("-f", dest="fake", action="store_true", help="do nothing")
    parser.add_argument("-n", action="store_true", help="ignored")
    parser.add_argument("-v", dest="verbose", action="store_true", help="log to standard error")
    parser.add_argument("-N", metavar="NAMESPACE", help="ignored: mount(8) has entered it already")
    parser.add_argument("-t", metavar="TYPE", help="the type: blockcopy")
    return parser


def command_line(args: argparse.Namespace) -> list[str]:
    """Return the list of arguments for `blockcopy` that means the same as `args`, the helper's parsed arguments."""
    known = {name: value for name, value in long_options("mount").items() if name not in _EXCLUDED}
    destination = ""
    line = ["--verbose"] * args.verbose + ["mount"]
    for option in (each for text in args.options for each in options.split(text)):
        name, equals, value = option.partition("=")
        key = name.replace("_", "-")
        if name in _IGNORED or name[:2] in ("x-", "X-"):
            continue
        if key in ("dest", "destination"):
            destination = value
        elif known.get(key) == bool(equals):
            line.append(f"--{key}{equals}{value}")
        elif not args.sloppy or name in {*options.FLAGS, *options.VALUES, *options.REFUSED}:
            line += ["-o", option.replace("\\", "\\\\").replace(",", "\\,")]
    if not destination:
        parser().error("the option dest=DESTINATION is missing")
    return [*line, "--", args.source, destination, args.mountpoint]


if __name__ == "__main__":
    main()
