"""`mount` as a command, and what is asked of a mount from outside. pyfuse3 and trio are loaded by `mount` alone."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from blockcopy.block.claim import check_destination
from blockcopy.cli import console, log_sinks
from blockcopy.errors import IncompleteError, MissingRequirementError, RemoteError, UsageError
from blockcopy.paths.places import absolute
from blockcopy.progress.reporter import Progress
from blockcopy.replica.commands import command_for, needs_extra, plan_of, prompts, run, source_command
from blockcopy.replica.monitor.status import one_line
from blockcopy.transport.control_master import log_in, logged_in
from blockcopy.transport.location import parse_location
from blockcopy_fuse import control_client, options
from blockcopy_fuse.probe import MountUnresponsiveError

if TYPE_CHECKING:
    from blockcopy.replica.plan import Plan

logger = logging.getLogger(__name__)


def mount(args: argparse.Namespace) -> None:
    with needs_extra():
        from blockcopy.replica.monitor.sd_notify import Notifier
        from blockcopy_fuse import daemon, mounting
    command = source_command(args).located()
    plan = plan_of(
        args,
        command,
        hydrate=not args.no_background,
        resume_offline=True,
        read_timeout=mounting.longest_request(),
    )
    fuse_options = options.parse(args.options)
    mountpoint = absolute(args.mountpoint)
    control_client.make_way(mountpoint, replace=args.replace, kind=f"fuse.{fuse_options.subtype}")
    shown = mounting.MountPlan(
        plan=plan,
        mountpoint=mountpoint,
        name=_name_in(mountpoint, args),
        options=fuse_options,
        pid_file=absolute(args.pid_file) if args.pid_file else None,
        log_file=absolute(args.log_file) if args.log_file else None,
    )
    mounting.check(shown)
    check_destination(plan.destination, force=plan.force)  # before ssh asks for a password
    if plan.prompts and not args.foreground:
        shown = dataclasses.replace(shown, plan=_asked_beforehand(plan))
    notifier = Notifier()

    def serve(ready: Callable[[], None], progress: Progress) -> dict[str, Any]:
        log_sinks.preload_syslog()
        with logged_in(command), progress:
            return run(lambda: mounting.serve(shown, ready, progress, notifier))

    if args.foreground:
        _tell_if_incomplete("ended", serve(lambda: None, console.progress(args, bar_by_default=True)))
    elif daemon.run_in_background(lambda ready: serve(ready, Progress())):
        mounting.await_first_answer(shown)


def _tell_if_incomplete(what: str, snapshot: dict[str, Any]) -> None:
    """Raises IncompleteError if the copy is not complete."""
    if snapshot["source_needed"]:
        kept = (
            f"what is here is recorded in {snapshot['state_file']}"
            if snapshot["state_file"]
            else "no state is kept"
        )
        raise IncompleteError(f"{what} before the copy was complete; {kept} ({one_line(snapshot)})")


def _asked_beforehand(plan: Plan) -> Plan:
    """The same for processes that will outlive the terminal, at which a password may be asked for now."""
    if plan.command.way.log_in:
        try:
            return dataclasses.replace(plan, command=log_in(plan.command), prompts=False)
        except RemoteError as error:
            logger.info("%s", error)  # a mount may begin without its source; where not, that is told again
    return dataclasses.replace(plan, command=plan.command.outliving_terminal())


def _name_in(mountpoint: str, args: argparse.Namespace) -> str | None:
    """Of the file in the folder; None where the mountpoint is a file."""
    if not os.path.isfile(mountpoint):
        name: str = args.name or Path(args.destination).name
        return name
    if args.name:
        raise UsageError(f"--name {args.name!r} cannot be: {mountpoint} is a file, and will be the replica itself")
    return None


def status(args: argparse.Namespace) -> None:
    if args.watch and not console.can_draw_screens():
        _watch_lines(args)
    if args.watch or (console.can_draw_screens() and not args.json):
        with needs_extra():
            from blockcopy_fuse import watch
        (watch.watch if args.watch else watch.show)(args.mountpoint)
        return
    snapshot = control_client.read_status(args.mountpoint)
    if args.json:
        console.write(json.dumps(snapshot, indent=2))
    else:
        console.write_line(one_line(snapshot))


def _watch_lines(args: argparse.Namespace) -> NoReturn:
    """Write the status as a line, each second if it changed, until the mount goes. Raises MountError then."""
    last = None
    while True:
        try:
            line = one_line(control_client.read_status(args.mountpoint))
        except MountUnresponsiveError as error:
            line = str(error)
        if line != last:
            console.write_line(line)
            last = line
        console.sleep(1)


def list(args: argparse.Namespace) -> None:
    from blockcopy_fuse import listing

    found = listing.replicas()
    console.write(json.dumps(found, indent=2) if args.json else listing.table(found))


def wait(args: argparse.Namespace) -> None:
    with console.progress(args, bar_by_default=True) as progress:
        control_client.wait(args.mountpoint, progress)


def umount(args: argparse.Namespace) -> None:
    snapshot = control_client.umount(args.mountpoint)
    if snapshot is not None:
        _tell_if_incomplete("unmounted", snapshot)


def pause(args: argparse.Namespace) -> None:
    _tell(args)


def resume(args: argparse.Namespace) -> None:
    _tell(args)


def limit(args: argparse.Namespace) -> None:
    _tell(args, rate=args.rate)


def prefetch(args: argparse.Namespace) -> None:
    _tell(args, extents=args.extents)


def doctor(args: argparse.Namespace) -> None:
    from blockcopy_fuse.doctor import examine, examine_host

    findings = examine()
    if args.host is not None:
        location = parse_location(args.host, "HOST", needs_path=False)
        command = command_for(args, location, "facts")
        findings = itertools.chain(findings, examine_host(command, prompts=prompts(location)))
    failures = 0
    for verdict, words in findings:
        console.write_line(f"{verdict:5} {words}")
        failures += verdict == "FAIL"
    if failures:
        raise MissingRequirementError(f"{failures} of these have to be mended first")


def manual(args: argparse.Namespace) -> None:
    with needs_extra():
        from blockcopy_fuse.manual import page
    console.write(page().rstrip())


def completion(args: argparse.Namespace) -> None:
    with needs_extra():
        from blockcopy_fuse.manual import completion as script
    console.write(script(args.shell).rstrip())


def _tell(args: argparse.Namespace, **more: Any) -> None:
    control_client.command(args.mountpoint, {"command": args.command, **more})
