"""The commands of the mount: `mount`, and requests to a mount from outside. Only `mount` loads pyfuse3 and trio.

Each public function runs the command of its name, and returns nothing: results are printed, failures are raised.
`args` are its parsed arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from blockcopy.block.claim import check_destination
from blockcopy.cli import console, log_sinks
from blockcopy.errors import IncompleteError, MissingRequirementError, RemoteError, SourceChangedError, UsageError
from blockcopy.paths.places import absolute
from blockcopy.progress.rate import human_size
from blockcopy.progress.reporter import Progress
from blockcopy.replica.commands import discard
from blockcopy.replica.monitor.status import Status, summary
from blockcopy.replica.options import command_for, needs_extra, plan_of, prompts, run, source_command
from blockcopy.transport.control_master import log_in, logging_out
from blockcopy.transport.location import parse_location
from blockcopy_fuse import control_client, fuse_support, options, unmount
from blockcopy_fuse.probe import MountUnresponsiveError, await_file

if TYPE_CHECKING:
    from blockcopy.replica.plan import Plan

logger = logging.getLogger(__name__)


def mount(args: argparse.Namespace) -> None:
    """Run `mount`: make the mount that `args` describe, and serve it in the foreground or in the background.

    Raises IncompleteError if a mount in the foreground ends before its copy is complete.
    """
    with needs_extra():
        from blockcopy.replica.monitor.sd_notify import Notifier
        from blockcopy_fuse import daemon, mounting
    command = source_command(args).with_absolute_programs()
    fuse_options = options.parse(args.options)
    writable = _is_writable(args, fuse_options)
    plan = plan_of(
        args,
        command,
        writable=writable,
        hydrate=not args.no_background,
        resume_offline=True,
        read_timeout=fuse_support.longest_read(),
    )
    mountpoint = absolute(args.mountpoint)
    unmount.clear_dead_mount(mountpoint, replace=args.replace, kind=f"fuse.{fuse_options.subtype}")
    mount_plan = mounting.MountPlan(
        plan=plan,
        mountpoint=mountpoint,
        name=_name_in(mountpoint, args),
        options=fuse_options,
        pid_file=absolute(args.pid_file) if args.pid_file else None,
        log_file=absolute(args.log_file) if args.log_file else None,
    )
    mounting.check(mount_plan)
    if args.discard_writes and os.path.exists(plan.destination):
        found = discard(plan.destination, plan.state)
        logger.warning("threw away %s in %s", found or "no writes", plan.destination)
    check_destination(
        plan.destination, force=plan.force, with_user_writes=writable
    )  # before ssh asks for a password
    if plan.prompts and not args.foreground:
        mount_plan = dataclasses.replace(mount_plan, plan=_logged_in_now(plan))
    notifier = Notifier()

    def serve(ready: Callable[[], None], progress: Progress) -> Status:
        log_sinks.preload_syslog()
        with logging_out(command), progress:
            return run(lambda: mounting.serve(mount_plan, ready, progress, notifier))

    if args.foreground:
        _raise_if_incomplete("ended", serve(lambda: None, console.progress(args, bar_by_default=True)))
    elif daemon.run_in_background(lambda ready: serve(ready, Progress())):
        await_file(str(mount_plan.file), mountpoint)  # in another process than the one that serves


def _is_writable(args: argparse.Namespace, fuse_options: options.MountOptions) -> bool:
    """Return whether the mount accepts writes, as `args`, the parsed arguments, and `fuse_options` say.

    Raises UsageError if they contradict each other, or if a writable mount would have no state.
    """
    if args.writable and fuse_options.writable is False:
        raise UsageError("--writable and -o ro exclude each other")
    writable = args.writable or bool(fuse_options.writable)
    if writable and args.no_state:
        raise UsageError("--no-state is not possible with --writable: the state says what the user has written")
    return writable


def _raise_if_incomplete(event: str, status: Status) -> None:
    """Raise IncompleteError if `status` says that the copy is not complete. `event`: "ended" or "unmounted"."""
    if not status.source_needed:
        return
    kept = f"the progress is recorded in {status.state_file}" if status.state_file else "no state is kept"
    if status.error is None:
        raise IncompleteError(f"{event} before the copy was complete; {kept} ({summary(status)})")
    if status.error.startswith(SourceChangedError.BEGINNING):
        kept = "the next mount or sync checks every block"
    present = f"{status.percent:.2f} % of {human_size(status.size)} were present"
    raise IncompleteError(f"{event}; the copy has failed: {status.error}; {kept} ({present})")


def _logged_in_now(plan: Plan) -> Plan:
    """Return a copy of `plan` for processes that outlive the terminal. Asks now for a password if ssh needs one."""
    if plan.command.route.login:
        try:
            return dataclasses.replace(plan, command=log_in(plan.command), prompts=False)
        except RemoteError as error:
            logger.info("%s", error)  # a mount may begin without its source; else this error comes again
    return dataclasses.replace(plan, command=plan.command.with_nohup())


def _name_in(mountpoint: str, args: argparse.Namespace) -> str | None:
    """Return the name of the file in the folder `mountpoint`, as the parsed `args` say.

    Returns None if `mountpoint` is a file. Raises UsageError if --name was given for a mountpoint that is a file.
    """
    if not os.path.isfile(mountpoint):
        name: str = args.name or Path(args.destination).name
        return name
    if args.name:
        raise UsageError(
            f"--name {args.name!r} is not possible: {mountpoint} is a file, and will be the replica itself"
        )
    return None


def status(args: argparse.Namespace) -> None:
    """Print the status of the mount on `args.mountpoint`: as a screen, a line or JSON, once or live.

    Raises MountError if no mount there answers.
    """
    if args.watch and not console.can_draw_screens():
        _watch_lines(args)
    if args.watch or (console.can_draw_screens() and not args.json):
        with needs_extra():
            from blockcopy_fuse import watch
        (watch.watch if args.watch else watch.show)(args.mountpoint)
        return
    found = control_client.read_status(args.mountpoint)
    if args.json:
        console.write(json.dumps(found.as_dict(), indent=2))
    else:
        console.write_line(summary(found))


def _watch_lines(args: argparse.Namespace) -> NoReturn:
    """Print the status of the mount on `args.mountpoint` for ever: a line each second if it changed.

    Raises MountError when the mount goes away.
    """
    last = None
    while True:
        try:
            line = summary(control_client.read_status(args.mountpoint))
        except MountUnresponsiveError as error:
            line = str(error)
        if line != last:
            console.write_line(line)
            last = line
        console.sleep(1)


def list(args: argparse.Namespace) -> None:
    """Print all mounted replicas as a table or, if `args.json` is set, as JSON."""
    from blockcopy_fuse import listing

    found = listing.replicas()
    if args.json:
        console.write(json.dumps([each.as_dict() for each in found], indent=2))
    else:
        console.write(listing.table(found, console.width()))


def wait(args: argparse.Namespace) -> None:
    """Wait until the copy on `args.mountpoint` is complete, and show its progress.

    Raises IncompleteError if the copy fails, MountError if nothing is mounted there.
    """
    with console.progress(args, bar_by_default=True) as progress:
        control_client.wait(args.mountpoint, progress)


def umount(args: argparse.Namespace) -> None:
    """Unmount the replica on `args.mountpoint`. Raises IncompleteError if its copy is not complete."""
    last = unmount.umount(args.mountpoint)
    if last is not None:
        _raise_if_incomplete("unmounted", last)


def pause(args: argparse.Namespace) -> None:
    """Pause background hydration of the mount on `args.mountpoint`. Raises MountError or the mount's error."""
    _request(args)


def resume(args: argparse.Namespace) -> None:
    """Resume background hydration of the mount on `args.mountpoint`. Raises MountError or the mount's error."""
    _request(args)


def limit(args: argparse.Namespace) -> None:
    """Limit background hydration to `args.rate` bytes per second, or lift the limit if it is None.

    Raises MountError or the mount's error.
    """
    _request(args, rate=args.rate)


def prefetch(args: argparse.Namespace) -> None:
    """Fetch the byte ranges `args.extents` first, and end when they are present.

    Raises MountError or the mount's error.
    """
    _request(args, extents=args.extents)


def doctor(args: argparse.Namespace) -> None:
    """Check this host and, if `args.host` is given, a source host. Prints a line for each check.

    Raises MissingRequirementError if a check fails.
    """
    from blockcopy_fuse.doctor import CheckResult, examine, examine_host

    results: Iterable[CheckResult] = examine()
    if args.host is not None:
        location = parse_location(args.host, "HOST", needs_path=False)
        echo = [] if args.blockcopy_path else ["--echo"]  # an installed program may be older
        command = command_for(args, location, "facts", echo)
        results = itertools.chain(results, examine_host(command, prompts=prompts(location)))
    failures = 0
    for verdict, message in results:
        console.write_line(f"{verdict:5} {message}")
        failures += verdict == "FAIL"
    if failures:
        raise MissingRequirementError(f"{failures} of these checks failed: fix them first")


def help(args: argparse.Namespace) -> None:
    """Show the page `args.page` of the manual, or a list of all pages if it is None.

    Raises UsageError if there is no such page.
    """
    with needs_extra():
        from blockcopy_fuse.manual import pager, pages
    pager.show(pages.overview() if args.page is None else pages.find(args.page))


def manual(args: argparse.Namespace) -> None:
    """Print the page `args.page` as roff, or write all pages below the folder `args.install`.

    Raises UsageError if there is no such page, DeviceError if a page cannot be written.
    """
    with needs_extra():
        from blockcopy_fuse.manual import pages
    if args.install is None:
        console.write(pages.find(args.page).as_roff().rstrip())
        return
    for written in pages.install(absolute(args.install)):
        logger.info("wrote %s", written)


def completion(args: argparse.Namespace) -> None:
    """Print the completion script for the shell `args.shell`."""
    with needs_extra():
        from blockcopy_fuse.completion import completion as script
    console.write(script(args.shell).rstrip())


def _request(args: argparse.Namespace, **arguments: Any) -> None:
    """Send the command of `args`, with the keywords `arguments`, to the mount on `args.mountpoint`.

    Raises MountError or the mount's error.
    """
    control_client.command(args.mountpoint, {"command": args.command, **arguments})
