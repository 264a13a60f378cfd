"""Write files, each with fsync, until SIGTERM; or check them.

writer.py FOLDER              print `@wrote NUMBER` for each file that is durable; at the end, the longest wait
writer.py --check FOLDER FILE check those whose numbers are in FILE, one a line
"""

import os
import random
import signal
import sys
import time


def content(number: int) -> bytes:
    """Return the content of the file `number`."""
    choose = random.Random(number)
    return choose.randbytes(choose.choice([100, 5000, 30000]))


def write(folder: str) -> None:
    """Write files to `folder`."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    longest = 0.0
    number = len(os.listdir(folder))
    top = os.open(folder, os.O_RDONLY)
    while not stopped:
        began = time.monotonic()
        with open(f"{folder}/{number}", "wb") as file:
            file.write(content(number))
            file.flush()
            os.fsync(file.fileno())
        os.fsync(top)
        print(f"@wrote {number}", flush=True)
        longest = max(longest, time.monotonic() - began)
        number += 1
        time.sleep(0.02)
    print(f"@figure {longest:.1f} seconds of the longest wait of the writer", flush=True)


def check(folder: str, numbers: str) -> None:
    """Exit with an error unless each file of `numbers` is in `folder` as it was written."""
    with open(numbers) as lines:
        for line in lines:
            with open(f"{folder}/{line.strip()}", "rb") as file:
                if file.read() != content(int(line)):
                    sys.exit(f"@wrong the file {line.strip()} is not what was written and acknowledged")


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        check(*sys.argv[2:])
    else:
        write(sys.argv[1])
