"""Train for long and watch what grows: memory of every process, open files, seconds a step.

    python -m tests.faults.soak --steps 2000                                  luffy.py with the embedded sampler
    python -m tests.faults.soak --steps 200 --rollout vllm                    and with a real vLLM

Every second the run's processes are looked at: resident memory and open files of the trainer, its vLLM process and its
verifier workers. After a warm-up of a fifth of the steps a straight line is laid through each. Exit code 1 if one of
them grew by more than 5 % (and 30 MB, or 3 files), or the steps slowed down by more than 10 %.

No curves are drawn: matplotlib grows by some 100 MB over the first dozen drawings of a run, and then no more."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from common.metrics import read_metrics
from tests.conftest import ROOT
from tests.faults.harness import ONLINE

WITHOUT_CURVES = """if True:
    import runpy, sys
    from common.metrics import Metrics
    Metrics.draw = lambda *_, **__: None
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")"""


def family(pid: int) -> dict[int, str]:
    """{process id: its kind} of a process (the trainer) and all that descend from it."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except (OSError, IndexError):
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    kinds = {"server": "vllm_worker", "worker": "verifiers"}
    kind_of = {p: next((k for k, mark in kinds.items() if mark in names.get(p, "").lower()), "other") for p in found}
    return kind_of | {pid: "trainer"}


def look(pid: int) -> dict[str, tuple[float, int]]:
    """Megabytes of resident memory and open files, summed over the processes of each kind."""
    seen: dict[str, tuple[float, int]] = {}
    for one, kind in family(pid).items():
        try:
            pages = int(Path(f"/proc/{one}/statm").read_text().split()[1])
            files = len(os.listdir(f"/proc/{one}/fd"))
        except OSError:
            continue
        memory, count = seen.get(kind, (0.0, 0))
        seen[kind] = memory + pages * os.sysconf("SC_PAGE_SIZE") / 1e6, count + files
    return seen


def growth(times, values) -> tuple[float, float]:
    """(growth of a fitted line over the time seen, its middle)."""
    slope = np.polyfit(times, values, 1)[0] if len(times) > 2 else 0.0
    return float(slope * (times[-1] - times[0])), float(np.median(values))


def soak(steps: int, out: Path, *words: str) -> dict[str, dict[str, float]]:
    """Run luffy.py -> for every quantity its middle and its growth after the warm-up."""
    command = [sys.executable, "-c", WITHOUT_CURVES, "luffy.py", *ONLINE, "--verifier", "math", "--eval_every", "0"]
    command += ["--save_every", "100", "--steps", str(steps), *words, "--out", str(out)]
    # oneDNN, which vLLM computes with on CPUs, keeps a kernel for each of the last 1,024 shapes: it takes hundreds of
    # steps of ragged batches to fill that (some 150 MB), which would hide what grows for ever
    environment = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
    with open(out.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        watched, start = [], time.monotonic()
        while process.poll() is None:
            log_file = out / "metrics.jsonl"
            done = log_file.read_text().count("\n") if log_file.exists() else 0
            watched.append((time.monotonic() - start, done, look(process.pid)))
            time.sleep(1)
    assert process.returncode == 0, out.with_suffix(".log").read_text()[-3000:]
    rows = [row for row in read_metrics(out) if row["step"]]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))

    report = {}
    warm = [(t, seen) for t, done, seen in watched if steps / 5 <= done < steps]
    for kind in sorted({kind for _, seen in warm for kind in seen}):
        at = [(t, *seen[kind]) for t, seen in warm if kind in seen]
        for i, name in ((1, "MB"), (2, "files")):
            change, middle = growth([a[0] for a in at], [a[i] for a in at])
            report[f"{kind} {name}"] = {"middle": middle, "growth": change}
    late = rows[len(rows) // 5 :]
    change, middle = growth([row["step"] for row in late], [row["seconds/step"] for row in late])
    report["seconds a step"] = {"middle": middle, "growth": change}
    return report


def too_much(report: dict[str, dict[str, float]]) -> list[str]:
    """What has grown by more than is allowed."""
    floor = {"MB": 30, "files": 3, "step": 0.0}
    share = {"MB": 0.05, "files": 0.0, "step": 0.10}
    return [name for name, found in report.items() for unit in [name.split()[-1]]
            if found["growth"] > max(floor[unit], share[unit] * found["middle"])]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rollout", default="embedded")
    parser.add_argument("--results", type=Path, help="also write the report here, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(options.steps, Path(folder) / "run", "--rollout", options.rollout)
    for name, found in report.items():
        print(f"{name:16} {found['middle']:10.3f}   growth {found['growth']:+8.3f}")
    if options.results:
        about = {"steps": options.steps, "rollout": options.rollout, "report": report}
        options.results.write_text(json.dumps(about, indent=1) + "\n")
    bad = too_much(report)
    print(f"grew too much: {', '.join(bad)}" if bad else "flat")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
