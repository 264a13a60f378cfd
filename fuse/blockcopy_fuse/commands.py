"""`mount` as a command, and what is asked of a mount from outside. pyfuse3 and trio are loaded by `mount` alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from blockcopy import console
from blockcopy.errors import IncompleteError, UsageError
from blockcopy.replica.commands import needs_extra, plan_of, run
from blockcopy.replica.status import one_line
from blockcopy_fuse import control, options


def mount(args: argparse.Namespace) -> None:
    with needs_extra():
        from blockcopy.replica.notify import Notifier
        from blockcopy_fuse import daemon, mounting
    plan = plan_of(
        args,
        hydrate=not args.no_background,
        may_be_away=True,
        read_timeout=mounting.longest_request(),
    )
    if plan.prompts and not args.foreground:
        plan = dataclasses.replace(plan, command=plan.command.outliving_terminal())
    fuse_options = options.parse(args.options)
    mountpoint = os.path.abspath(args.mountpoint)
    control.make_way(mountpoint, replace=args.replace, kind=f"fuse.{fuse_options.subtype}")
    shown = mounting.MountPlan(
        plan=plan,
        mountpoint=mountpoint,
        name=_name_in(mountpoint, args),
        options=fuse_options,
        pid_file=os.path.abspath(args.pid_file) if args.pid_file else None,
    )
    mounting.check(shown)
    notifier = Notifier()
    if args.foreground:
        run(lambda: mounting.serve(shown, lambda: None, console.terminal(), notifier))
    elif daemon.run_in_background(lambda ready: run(lambda: mounting.serve(shown, ready, None, notifier))):
        mounting.await_first_answer(shown)


def _name_in(mountpoint: str, args: argparse.Namespace) -> str | None:
    """Of the file in the folder; None where the mountpoint is a file."""
    if not os.path.isfile(mountpoint):
        name: str = args.name or Path(args.destination).name
        return name
    if args.name:
        raise UsageError(f"--name {args.name!r} cannot be: {mountpoint} is a file, and will be the replica itself")
    return None


def status(args: argparse.Namespace) -> None:
    snapshot = control.read_status(args.mountpoint)
    console.write(json.dumps(snapshot, indent=2) if args.json else one_line(snapshot))


def wait(args: argparse.Namespace) -> None:
    control.wait(args.mountpoint)


def umount(args: argparse.Namespace) -> None:
    snapshot = control.umount(args.mountpoint)
    if snapshot is not None and snapshot["source_needed"]:
        kept = (
            f"what is here is recorded in {snapshot['state_file']}"
            if snapshot["state_file"]
            else "no state is kept"
        )
        raise IncompleteError(f"unmounted before the copy was complete; {kept} ({one_line(snapshot)})")


def pause(args: argparse.Namespace) -> None:
    _tell(args)


def resume(args: argparse.Namespace) -> None:
    _tell(args)


def limit(args: argparse.Namespace) -> None:
    _tell(args, rate=args.rate)


def prefetch(args: argparse.Namespace) -> None:
    _tell(args, extents=args.extents)


def _tell(args: argparse.Namespace, **more: Any) -> None:
    control.command(args.mountpoint, {"command": args.command, **more})
