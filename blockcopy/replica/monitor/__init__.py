"""The monitors of a replica: its status, progress, Prometheus metrics, systemd, `--on-complete`.

No monitor changes a copy. The replica itself and the mount may import this room.
"""
