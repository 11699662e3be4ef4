"""A rank that raises, dies or hangs ends the run soon, with the first error, and leaves no process behind."""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from common.metrics import read_metrics
from tests.conftest import ROOT, run_script
from tests.faults.harness import ONLINE, assert_equal

STEPS = ["--steps", "4", "--save_every", "1", "--eval_every", "0"]


def torchrun(words, out, ranks=2, restarts=0, **env):
    """-> (exit code, stderr, seconds, processes that are left 5 s later)."""
    tag = uuid.uuid4().hex
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                f"--max_restarts={restarts}"]  # fmt: skip
    start = time.monotonic()
    result = subprocess.run(
        [*launcher, *words, *ONLINE, *STEPS, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=280,
        env={**os.environ, "FAULT_TAG": tag, **env},
    )  # fmt: skip
    seconds, deadline = time.monotonic() - start, time.monotonic() + 5
    while (left := tagged(tag)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return result.returncode, result.stderr, seconds, left


def tagged(tag: str) -> list[str]:
    """Command lines of the processes that a run has started and that still live."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            lives = (folder / "stat").read_text().split()[2] != "Z"
            if lives and tag.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            pass
    return found


@pytest.mark.parametrize("fault", ["raise", "hang"])  # kill: below
def test_the_fault_of_one_rank_ends_the_run(fault, tmp_path):
    words = ["tests/faults/faulty.py", "--timeout_minutes", "0.1"] if fault == "hang" else ["tests/faults/faulty.py"]
    code, error, seconds, left = torchrun(words, tmp_path / "run", FAULT=fault)
    assert code != 0 and left == []
    assert seconds < 100
    assert [row["step"] for row in read_metrics(tmp_path / "run")] in ([1], [1, 2])
    assert error.count("ValueError: a deliberate fault") == (fault == "raise")
    assert error.count("[rank ") <= 1, "the first error is shown once, and no other rank's"
    if fault == "hang":
        assert "timeout" in error.lower() or "timed out" in error.lower()


def test_torchrun_restarts_a_run_which_goes_on_and_then_on_another_number_of_ranks(tmp_path):
    once = str(tmp_path / "once")
    code, error, _, left = torchrun(["tests/faults/faulty.py"], tmp_path / "run", restarts=1, FAULT="kill", ONCE=once)
    assert (code, left) == (0, []), error[-3000:]
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and os.path.exists(once)
    run_script("luffy.py", *ONLINE, *STEPS, "--out", tmp_path / "whole", ranks=2)
    assert assert_equal(tmp_path / "whole", tmp_path / "run") > 4  # to the bit, on two ranks too

    alone = run_script("luffy.py", *ONLINE, *STEPS, "--steps", "5", "--out", tmp_path / "run")
    assert "made by 2 ranks, and 1 resume" in alone.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
