"""A process that has imported everything and forks: a script starts in a fraction of a second, many times over.

    zygote = Zygote();  pid = zygote.start(["luffy.py", "--out", ...], out, err);  zygote.wait(pid) -> exit status

What runs in the fork is the script as `python luffy.py ...` (or `-m igsm`) runs it, in a session of its own."""

import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Zygote:
    def __init__(self, folder: Path = ROOT, **env: str):
        """Of the scripts in `folder`."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env},
        )  # fmt: skip
        self.process.stdout.readline()  # everything is imported

    def _ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, words, out: Path, err: Path | None = None, **env: str) -> int:
        """Run a script; what it writes is appended to the files `out` and `err` (None: out). -> process id."""
        return self._ask(words=[str(word) for word in words], out=str(out), err=str(err or out), env=env)

    def poll(self, pid: int) -> int | None:
        """Exit status (negative: the signal), or None while it runs."""
        return self._ask(poll=pid)

    def wait(self, pid: int, timeout: float = 300) -> int:
        """Its exit status; after `timeout` seconds it is killed, and AssertionError raised."""
        deadline = time.monotonic() + timeout
        while (status := self.poll(pid)) is None:
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                raise AssertionError("the script hangs")
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
    import matplotlib.backends.backend_agg  # noqa: F401
    import torch.distributed.checkpoint  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import igsm  # noqa: F401
    from common import report, search, vllm  # noqa: F401  and with them all others

    get_checkpoint_conversion_mapping("qwen2")  # half a second, when a process asks for the first time
    gc.collect()
    gc.freeze()  # or each process would search all of this for garbage, again and again

    answer.write("ready\n")
    answer.flush()
    ended: dict[int, int] = {}
    started: list[int] = []
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
                run(request)
            started.append(reply)
        answer.write(json.dumps(reply) + "\n")
        answer.flush()
    for pid in set(started) - ended.keys():  # Ctrl-C
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def run(request: dict) -> None:
    """In the fork: become the script."""
    import atexit
    import traceback

    os.setsid()
    for target, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_APPEND | (os.O_CREAT if target else 0), 0o644), target)
    sys.stdout, sys.stderr = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w", buffering=1)  # as Python has files
    os.environ.update(request["env"])
    words, status = request["words"], 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
