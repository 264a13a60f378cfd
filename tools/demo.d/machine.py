"""A machine for `tools/demo move`: commits numbered rows to an SQLite database until it is terminated.

machine.py DATABASE COMMITTED     COMMITTED: gets the number of the last row, the times of the first and last commit
machine.py --check DATABASE ROWS  check that the database is sound and has just so many rows
"""

import os
import signal
import sqlite3
import sys
import time


def run(database: str, committed: str) -> None:
    """Commit rows to `database`, after those that it has, until SIGTERM."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    db = sqlite3.connect(database, isolation_level=None)
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE IF NOT EXISTS orders (number INTEGER PRIMARY KEY, text BLOB)")
    (number,) = db.execute("SELECT coalesce(max(number), 0) FROM orders").fetchone()
    first = 0.0
    while not stopped:
        number += 1
        db.execute("INSERT INTO orders VALUES (?, ?)", (number, os.urandom(500)))
        last = time.time()
        first = first or last
        with open(f"{committed}.new", "w") as file:
            file.write(f"{number} {first:.6f} {last:.6f}\n")
        os.replace(f"{committed}.new", committed)
    db.close()


def check(database: str, rows: int) -> None:
    """Exit with an error unless `database` is sound, and its rows are those from 1 to `rows`."""
    db = sqlite3.connect(database)
    (integrity,) = db.execute("PRAGMA integrity_check").fetchone()
    found = [number for (number,) in db.execute("SELECT number FROM orders ORDER BY number")]
    print(f"integrity_check: {integrity}; {len(found)} rows")
    if integrity != "ok" or found != list(range(1, rows + 1)):
        sys.exit(f"ERROR: these are not the {rows} rows that were committed")


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        check(sys.argv[2], int(sys.argv[3]))
    else:
        run(*sys.argv[1:])
