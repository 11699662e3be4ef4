"""A full disk stops a run; what it had saved is intact, and with room again the same command goes on."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.faults.harness import ONLINE

SCRIPT = """
mount -t tmpfs -o size=80m none "$1" || exit 77
folder="$1"; shift
"$@" & run=$!
while [ ! -d "$folder/run/checkpoint/step-00000002" ]; do kill -0 $run || exit 1; sleep 0.01; done
room=$(df --output=avail -k "$folder" | tail -1)
head -c $(((room - 5000) * 1024)) /dev/zero > "$folder/filler"
wait $run; echo "full: $?"
ls "$folder/run/checkpoint" | grep -v partial
rm "$folder/filler"
"$@"; echo "again: $?"
ls "$folder/run/checkpoint"
wc -l < "$folder/run/metrics.jsonl"
"""


def test_a_full_disk_stops_the_run_and_loses_nothing_that_was_saved(tmp_path):
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system of its own (unshare -m)")
    words = [sys.executable, "luffy.py", *ONLINE, "--steps", "30", "--eval_every", "0", "--out", tmp_path / "run"]
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", SCRIPT, "sh", *map(str, [tmp_path, *words])], cwd=ROOT, capture_output=True,
        text=True, timeout=280,
    )  # fmt: skip
    if result.returncode == 77:
        pytest.skip("needs the right to mount a file system of its own")
    said = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr[-3000:]
    assert said[said.index("full: 1") + 1].startswith("step-"), "no checkpoint is left"
    assert re.search(r"the checkpoint of step \d+ in .*could not be written \(.*; 0.0 GB are free", result.stderr)
    assert "is intact: the same command resumes from it" in result.stderr
    assert said[-5:] == ["again: 0", "exported", "step-00000028", "step-00000030", "30"]
