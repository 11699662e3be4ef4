"""luffy.py with a fault in rank 1's second step: FAULT=raise, kill, hang; it happens once if ONCE names a file."""

import os
import signal
import sys
import time

sys.path.insert(0, ".")
import luffy  # noqa: E402
from common.trainer import launch  # noqa: E402
from tests.conftest import parsed  # noqa: E402

real, steps = luffy.describe, []


def describe(rows):
    steps.append(1)
    once = os.environ.get("ONCE")
    if os.environ["RANK"] == "1" and len(steps) == 2 and not (once and os.path.exists(once)):
        if once:
            open(once, "w").close()
        if os.environ["FAULT"] == "raise":
            raise ValueError("a deliberate fault")
        if os.environ["FAULT"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    return real(rows)


luffy.describe = describe
if __name__ == "__main__":
    launch(luffy.main, parsed("luffy", *sys.argv[1:]))
