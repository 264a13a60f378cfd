"""What a replica tells others: its status, Prometheus metrics, systemd, `--on-complete`.

Changes nothing in a copy. The replica itself and the mount may import it.
"""
