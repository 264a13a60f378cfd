"""The parts of tools/fleet: its machines and disks, services that write, runs of Ansible, and the verdict."""
