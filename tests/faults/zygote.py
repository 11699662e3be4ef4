"""A process that has imported everything and forks: a script starts in a fraction of a second, many times over.

    zygote = Zygote();  pid = zygote.start(["luffy.py", "--out", ...], log);  zygote.wait(pid) -> exit status

What runs in the fork is the script as `python luffy.py ...` runs it, in a session of its own."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT


class Zygote:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self.process.stdout.readline()  # everything is imported

    def _ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, words, log: Path) -> int:
        """Run a script; its output goes to `log`. -> process id, also of its group."""
        return self._ask(words=[str(word) for word in words], log=str(log))

    def poll(self, pid: int) -> int | None:
        """Exit status (negative: the signal), or None while it runs."""
        return self._ask(poll=pid)

    def wait(self, pid: int, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll(pid)) is None:
            assert time.monotonic() < deadline, "the script hangs"
            time.sleep(0.005)
        return status

    def kill(self, pid: int) -> None:
        """SIGKILL to the script alone, as an out-of-memory killer does it: its children must notice by themselves."""
        os.kill(pid, signal.SIGKILL)
        self.wait(pid)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """The other end: fork a script for every line that asks for one."""
    answer, sys.stdout = sys.stdout, sys.stderr
    import torch.distributed.checkpoint  # noqa: F401
    import transformers  # noqa: F401
    from torch.distributed.fsdp import fully_shard  # noqa: F401

    import igsm  # noqa: F401
    from common import data, logprobs, rollout, trainer, verifiers  # noqa: F401

    answer.write("ready\n")
    answer.flush()
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid = request["poll"]
            if pid not in ended:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            reply = ended.get(pid)
        else:
            reply = os.fork()
            if reply == 0:
                os.setsid()
                log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                null = os.open(os.devnull, os.O_RDONLY)
                for source, target in ((null, 0), (log, 1), (log, 2)):
                    os.dup2(source, target)
                sys.stdout = os.fdopen(os.dup(1), "w")
                sys.argv, status = request["words"], 0
                try:
                    runpy.run_path(sys.argv[0], run_name="__main__")
                except SystemExit as stop:
                    status = stop.code or 0
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    status = 1
                sys.stdout.flush()
                os._exit(status)
        answer.write(json.dumps(reply) + "\n")
        answer.flush()


if __name__ == "__main__":
    serve()
