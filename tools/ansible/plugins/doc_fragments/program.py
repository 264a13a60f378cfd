"""Options that the modules of this collection share."""

from __future__ import annotations


class ModuleDocFragment:
    """The options of the program itself, and those of a copy."""

    DOCUMENTATION = r"""
options:
  executable:
    description:
      - The command line of blockcopy on the managed host.
      - It is split into words as a shell splits them. No shell runs it.
    type: str
    default: blockcopy
requirements:
  - blockcopy on the managed host
"""

    CONNECTION = r"""
options:
  rsh:
    description: The command that reaches the other host, such as C(ssh -p 2222). The default is that of blockcopy.
    type: str
  python:
    description: The Python that runs the stages on the other host, such as C(sudo -n python3).
    type: str
  blockcopy_path:
    description: A program that is run on the other host instead of sending the stages.
    type: str
  control_master:
    description: Whether all connections share one login.
    type: bool
    default: true
  connections:
    description: The number of connections, or V(auto).
    type: str
  compress:
    description: Compression on the source, such as V(zstd:3), V(auto) or V(none).
    type: str
  timeout:
    description: Reconnect after this time without data, in seconds.
    type: float
  reconnect_timeout:
    description: Keep reconnecting for this time, in seconds.
    type: float
"""

    COPY = r"""
options:
  limit:
    description: The limit of background copying in bytes per second, such as V(20M).
    type: str
  force:
    description: Overwrite even a destination that is in use, or that holds what the source lacks.
    type: bool
    default: false
  sparse:
    description: Whether zeros become holes.
    type: bool
    default: true
  verify:
    description: Compare both ends again when the copy is complete.
    type: bool
    default: false
  state_file:
    description: The file that records which blocks are present. The default is that of blockcopy.
    type: path
  keep_state:
    description: Whether a state file is kept.
    type: bool
    default: true
  recheck:
    description: Ignore the state file, and check every block.
    type: bool
    default: false
  metrics:
    description: Write metrics for Prometheus to this file. Its folder must exist.
    type: path
  log_file:
    description: Append the log to this file.
    type: path
"""
