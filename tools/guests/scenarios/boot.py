"""Units and lines of fstab, as the manual has them: status, watchdog, shutdown in mid-copy, and the next boot.

A unit and a line of fstab copy from the host `source`, the guest itself, through its sshd. A file system on
each of the two mounts has a line of its own. At the second boot, the sshd of the line begins once the line is
mounted. So the mount must begin without its source. The line's time limit is longer than systemd's 90 s:
emulation is slow.
"""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

from checkout import CHECKOUT
from debian import run as run_program
from guests.lab import Lab
from guests.machine import Disk, Machine, WrongError
from guests.steps import FILES, LOG_IN, empty_file, must_be_equal, percent, status, until

SIZE = 32 << 20
OFF_SECONDS = 85
"""How long a shutdown in mid-copy may take. systemd kills what takes 90 s. Alone on a machine it takes 12 s."""

UNIT = "blockcopy-mount@disk"
LINE = "line.mount"
FILE_SYSTEMS = ("files.mount", "more.mount")

SET_UP = f"""
{LOG_IN}
echo 'timeout = 300' >/etc/blockcopy.toml # an emulated guest on a busy machine is slow
cp {FILES}/systemd/* /etc/systemd/system/
mkdir -p /etc/blockcopy /disk /line /files /more
cat >/etc/blockcopy/disk.conf <<END
SOURCE=root@source:/dev/disk/by-id/virtio-source
DESTINATION=/dev/disk/by-id/virtio-copy1
MOUNTPOINT=/disk
OPTIONS=-o allow_other --limit 64K
END
ln -s /usr/local/bin/mount.blockcopy /sbin/
cat >>/etc/fstab <<END
ssh://root@source:2222/dev/disk/by-id/virtio-source /line blockcopy \
dest=/dev/disk/by-id/virtio-copy2,_netdev,nofail,x-systemd.mount-timeout=5min,replace,limit=64K 0 0
/disk/virtio-copy1 /files ext4 loop,ro,noload,nofail,x-systemd.requires={UNIT}.service 0 0
/line/virtio-copy2 /more ext4 loop,ro,noload,nofail 0 0
END
findmnt --verify
mkdir -p /etc/systemd/system/{UNIT}.service.d
printf '[Service]\\nWatchdogSec=10\\nRestartSec=1\\n' >/etc/systemd/system/{UNIT}.service.d/soon.conf
cat >/etc/systemd/system/late-sshd.service <<END
[Unit]
Before=multi-user.target
[Service]
RuntimeDirectory=sshd
RuntimeDirectoryPreserve=yes
ExecStart=/usr/sbin/sshd -D -p 2222
[Install]
WantedBy=multi-user.target
END
sed -i s/volatile/persistent/ /etc/systemd/journald.conf.d/guest.conf
systemctl daemon-reload
systemctl restart systemd-journald
journalctl --flush
ls /var/log/journal/*/system.journal
systemctl enable --now late-sshd
until ssh -p 2222 -o StrictHostKeyChecking=accept-new root@source true; do sleep 0.2; done
systemctl enable --now {UNIT}
systemctl start line.mount files.mount more.mount
"""

LATE = """
mkdir -p /etc/systemd/system/late-sshd.service.d
cat >/etc/systemd/system/late-sshd.service.d/late.conf <<END
[Service]
TimeoutStartSec=infinity
ExecStartPre=sh -c "until grep -q /line /proc/mounts; do sleep 1; done"
END
"""


def run(lab: Lab) -> dict[str, object]:
    """Copy, stop the program, shut down, boot again, complete. Returns times and percentages."""
    source, copies = _disks(lab)
    disks = [Disk("source", source, readonly=True), *(Disk(each.name, each) for each in copies)]
    units = {f"systemd/{each.name}": each for each in (CHECKOUT / "tools/systemd").iterdir()}
    guest = lab.machine(disks=disks, files=units)
    figures: dict[str, object] = {}
    guest.boot()
    guest.wait_for_ssh()
    guest.ssh(SET_UP, seconds=600)
    _must_show_the_percent(guest)
    figures["seconds from SIGSTOP to a new mount"] = _stop_the_program(guest)
    guest.ssh(LATE)
    before = [status(guest, each) for each in ("/disk", "/line")]
    figures["percent at the shutdown"] = [percent(each) for each in before]
    figures["seconds to power off in mid-copy"] = _power_off(guest)

    began = time.monotonic()
    guest.boot()
    guest.wait_for_ssh()
    figures["seconds to ssh"] = round(time.monotonic() - began)
    _must_have_ended_well(guest)
    until(guest, _active(UNIT, LINE, *FILE_SYSTEMS, "late-sshd"), 240, "the mounts after the boot")
    figures["seconds to the mounts"] = round(time.monotonic() - began)
    after = [status(guest, each) for each in ("/disk", "/line")]
    figures["percent resumed"] = [round(100 * each["resumed_bytes"] / SIZE, 1) for each in after]
    for first, then in zip(before, after, strict=True):
        if then["resumed_bytes"] < first["hydrated_bytes"]:
            raise WrongError(f"blocks are checked again after an orderly shutdown: {first}, then {then}")
    _must_be_in_order(guest)
    guest.ssh("test -f /files/etc/hello && test -f /more/etc/hello")
    guest.ssh("blockcopy limit /disk none && blockcopy limit /line none")
    guest.ssh("blockcopy wait /disk && blockcopy wait /line", seconds=600)
    figures["seconds to the complete copies"] = round(time.monotonic() - began)
    figures["seconds to power off, complete"] = _power_off(guest)
    for each in copies:
        must_be_equal(source, each)
    return figures


def _disks(lab: Lab) -> tuple[Path, list[Path]]:
    """Return a source, which has an ext4, and two empty destinations."""
    source = empty_file(lab, "source", SIZE)
    tree = lab.folder / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/hello").write_text("hello\n")
    (tree / "noise").write_bytes(lab.choose.randbytes(SIZE * 3 // 4))
    run_program("mkfs.ext4", "-q", "-F", "-d", tree, source)
    shutil.rmtree(tree)
    return source, [empty_file(lab, name, SIZE) for name in ("copy1", "copy2")]


def _must_show_the_percent(guest: Machine) -> None:
    shown = guest.ssh(f"systemctl status {UNIT}")
    if not re.search(r'^ *Status: "hydrating: \d+\.\d\d % of 32\.0 MiB', shown, re.MULTILINE):
        raise WrongError(f"systemctl status shows no percent: {shown}")


def _stop_the_program(guest: Machine) -> float:
    """Stop the unit's program by SIGSTOP. Returns how many seconds it took until another serves."""
    began = time.monotonic()
    guest.ssh(f"kill -STOP $(systemctl show --value -p MainPID {UNIT})")
    condition = f"[ $(systemctl show --value -p NRestarts {UNIT}) = 1 ] && {_active(UNIT, 'files.mount')}"
    until(guest, condition, 240, "another program after the watchdog's time")
    return round(time.monotonic() - began)


def _active(*units: str) -> str:
    """Return a shell command that succeeds if all of `units` are active. One is enough for `is-active -q`."""
    return f"! systemctl is-active {' '.join(units)} | grep -qvx active"


def _power_off(guest: Machine) -> float:
    """Shut down. Returns how many seconds that took."""
    began = time.monotonic()
    guest.power_off()
    took = time.monotonic() - began
    if took > OFF_SECONDS:
        raise WrongError(f"the shutdown took {took:.0f} s; its console is in {guest.log}")
    return round(took, 1)


def _must_have_ended_well(guest: Machine) -> None:
    """Look for complaints of systemd in the journal of the boot before."""
    ends = {UNIT: "Stopping", LINE: "Unmounting", **dict.fromkeys(FILE_SYSTEMS, "Unmounting")}
    journals = guest.ssh("; echo @; ".join(f"journalctl -q -b -1 -o cat -u {unit}" for unit in ends)).split("@\n")
    for (unit, word), journal in zip(ends.items(), journals, strict=True):
        end = journal[max(0, journal.rfind(word)) :]
        if "Deactivated successfully" not in end or re.search(r"Failed|Killing|timed out", end):
            raise WrongError(f"{unit} has not ended well: {journal}")


def _must_be_in_order(guest: Machine) -> None:
    """Compare when systemd began what, at this boot. All times are in microseconds."""
    units = ("network-online.target", UNIT, LINE, *FILE_SYSTEMS, "late-sshd.service")
    show = "systemctl show --value -p {}TimestampMonotonic " + " ".join(units)
    began, ended = (
        dict(zip(units, map(int, guest.ssh(show.format(what)).split()), strict=True))
        for what in ("InactiveExit", "ActiveEnter")
    )
    if min(began[UNIT], began[LINE]) < ended["network-online.target"]:
        raise WrongError(f"a mount began before the network was up: {began}, {ended}")
    for each, below in zip(FILE_SYSTEMS, (UNIT, LINE), strict=True):
        if began[each] < ended[below]:
            raise WrongError(f"{each} began before the mount below it was there: {began}, {ended}")
    if ended["late-sshd.service"] < began[LINE]:
        raise WrongError(f"the late sshd was not late, so the test shows nothing: {began}, {ended}")
