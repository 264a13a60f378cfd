"""`mount.blockcopy`, which mount(8) calls for the type blockcopy: its words → those of `blockcopy mount`.

    mount.blockcopy SOURCE MOUNTPOINT [-sfnv] [-N NAMESPACE] [-t TYPE] -o dest=DESTINATION[,OPTION…]

An OPTION that is one of `blockcopy mount`, as limit=20M or no-state, becomes that, `-` and `_` alike. What
mount(8) and systemd see to themselves is passed over. All others are those of `-o` there.
"""

from __future__ import annotations

import argparse

from blockcopy.cli import main as cli
from blockcopy.cli.parser import long_options
from blockcopy.cli.suggestions import ConsoleParser
from blockcopy_fuse import options

_OF_OTHERS = {
    *("defaults", "auto", "noauto", "nofail", "_netdev", "rw", "comment", "pri", "helper", "uhelper"),
    *("user", "nouser", "users", "owner", "noowner", "group", "nogroup"),
}
"""Of mount(8), fstab(5) and systemd.mount(5); so is what begins with x- or X-. (`rw` is said where nothing is.)"""

_NOT_HERE = {"help", "foreground"}


def main() -> None:
    """As mount(8) wants it: return when it is mounted, or exit with a status above 0."""
    args = _parser().parse_args()
    if not args.fake:
        cli.main(command_line(args))


def _parser() -> ConsoleParser:
    parser = ConsoleParser(
        prog="mount.blockcopy", description="For mount(8): mount -t blockcopy SOURCE MOUNTPOINT -o dest=DESTINATION"
    )
    parser.add_argument("source", metavar="SOURCE", help="[user@]host:/path or a local path; only read")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing folder, or a file")
    parser.add_argument(
        "-o", dest="options", metavar="OPTIONS", action="append", default=[], help="with commas between them"
    )
    parser.add_argument("-s", dest="sloppy", action="store_true", help="pass over what is not known")
    parser.add_argument("-f", dest="fake", action="store_true", help="do nothing")
    parser.add_argument("-n", action="store_true", help="no meaning today")
    parser.add_argument("-v", dest="verbose", action="store_true", help="log what is done to standard error")
    parser.add_argument("-N", metavar="NAMESPACE", help="of mount(8), which is in it already")
    parser.add_argument("-t", metavar="TYPE", help="blockcopy")
    return parser


def command_line(args: argparse.Namespace) -> list[str]:
    """The arguments of `blockcopy`."""
    ours = long_options("mount").items()
    known = {name: takes_value for name, takes_value in ours if name not in _NOT_HERE}
    destination = ""
    line = ["--verbose"] * args.verbose + ["mount"]
    for option in (each for text in args.options for each in options.split(text)):
        name, equals, value = option.partition("=")
        key = name.replace("_", "-")
        if name in _OF_OTHERS or name[:2] in ("x-", "X-"):
            continue
        if key in ("dest", "destination"):
            destination = value
        elif known.get(key) == bool(equals):
            line.append(f"--{key}{equals}{value}")
        elif not args.sloppy or name in {*options.FLAGS, *options.VALUES, *options.REFUSED}:
            line += ["-o", option.replace("\\", "\\\\").replace(",", "\\,")]
    if not destination:
        _parser().error("there has to be a dest=DESTINATION among the options")
    return [*line, "--", args.source, destination, args.mountpoint]


if __name__ == "__main__":
    main()
