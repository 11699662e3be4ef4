"""Kill runs at any moment, start them again, and compare with runs that nothing disturbed.

    python -m tests.faults.harness --kills 20                     every script and stage (minutes)
    python -m tests.faults.harness --kills 20 luffy redi-dpo --seed 3

Compared bit for bit: the models that a run leaves, its last checkpoint (weights and optimizers), metrics.jsonl but for
times and memory (no step missing, none doubled), samples.jsonl."""

import argparse
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from common.metrics import read_metrics
from tests.zygote import Zygote

ONLINE = [
    "--preset", "tiny", "--model", "models/scratch", "--data", "igsm:1-2", "--igsm_problems", "40", "--batch_size", "4",
    "--group_size", "4", "--max_response_tokens", "24", "--long_trace", "cut", "--eval_data", "igsm:1-2",
    "--eval_limit", "4", "--eval_every", "3", "--lr", "1e-3", "--steps", "8", "--save_every", "2",
]  # fmt: skip
OFFLINE = [
    "--preset", "tiny", "--data", "igsm:3-4", "--igsm_problems", "24", "--batch_size", "4", "--eval_data", "igsm:1-2",
    "--eval_limit", "4", "--eval_every", "3", "--max_response_tokens", "60", "--lr", "1e-3", "--steps", "8",
    "--save_every", "2",
]  # fmt: skip
RUNS = {
    "luffy": ["luffy.py", *ONLINE],
    "luffy-sft": ["luffy.py", *ONLINE, "--method", "sft"],
    "relift": ["relift.py", *ONLINE, "--sft_data_size", "3"],
    "redi-sft": ["redi.py", *OFFLINE, "--stage", "sft"],
    "redi": ["redi.py", *OFFLINE],
    "redi-dpo": ["redi.py", *OFFLINE, "--loss", "dpo"],
    "oreo": ["oreo.py", *OFFLINE, "--samples", "4"],
    "oreo-dpo": ["oreo.py", *OFFLINE, "--samples", "4", "--stage", "dpo"],
    "behavior_injection": [
        "behavior_injection.py", "--preset", "tiny", "--model", "models/scratch", "--arms", "bridge", "--base_problems",
        "80", "--base_steps", "4",
        "--sft_problems", "12", "--sft_batch_size", "4", "--sft_steps", "4", "--rl_problems", "20", "--eval_problems",
        "6", "--ops", "1", "3", "--val_ops", "2", "2", "--test_ops", "2", "3", "--base_ops", "1", "2", "--batch_size",
        "4", "--group_size", "4", "--max_response_tokens", "24", "--steps", "6", "--eval_every", "2", "--save_every",
        "2",
    ],
}  # fmt: skip
SHORT = ("luffy", "relift", "redi-dpo", "oreo", "behavior_injection")  # those of the ordinary tests
FIRST = "a checkpoint is there"  # when the first kill comes: else no start might ever load one
MOMENTS = ("any time", "first file of a checkpoint", "before its checksums", "after its checksums")  # of later kills


def words_of(name: str, out: Path) -> list[str]:
    """The command of a run into folder `out`."""
    return [*RUNS[name], "--out", str(out)]


def reached(moment: str, out: Path, since: float = 0.0) -> bool:
    """Whether a checkpoint is being written, and how far it is. One that nobody touched `since` was left by a kill."""
    if moment == FIRST:  # of the last stage: the next start trains from it
        found = [*out.glob("checkpoint/step-*"), *out.glob("bridge/rl/checkpoint/step-*")]
        return any(not path.suffix for path in found)
    for folder in ("checkpoint", "base/checkpoint", "bridge/sft/checkpoint", "bridge/rl/checkpoint"):
        try:
            partials = [entry for entry in os.scandir(out / folder) if entry.name.endswith(".partial")]
            partial = next((entry for entry in partials if entry.stat().st_mtime >= since), None)
            names = os.listdir(partial) if partial else []
        except FileNotFoundError:
            continue  # not there yet, or complete meanwhile
        if moment == "first file of a checkpoint" and any(name.endswith(".distcp") for name in names):
            return True
        if moment == "before its checksums" and ".metadata" in names:
            return True
        if moment == "after its checksums" and "SHA256SUMS" in names:
            return True
    return False


def undisturbed(name: str, out: Path, zygote: Zygote) -> float:
    """Run it to its end. -> seconds it took."""
    start = time.monotonic()
    status = zygote.wait(zygote.start(words_of(name, out), out.with_suffix(".log")))
    assert status == 0, out.with_suffix(".log").read_text()[-3000:]
    return time.monotonic() - start


def disturbed(name: str, out: Path, zygote: Zygote, seconds: float, kills: int, rng: random.Random) -> list[str]:
    """Kill the run `kills` times, then let it end. -> at what moments it was killed."""
    log, killed = out.with_suffix(".log"), []
    while True:
        started = time.time()
        pid = zygote.start(words_of(name, out), log)
        if len(killed) == kills:
            assert zygote.wait(pid) == 0, log.read_text()[-3000:]
            return killed
        moment = FIRST
        if killed:
            moment = MOMENTS[len(killed) % len(MOMENTS)] if kills < 8 else rng.choice(MOMENTS)
        if kills < 8:
            share = rng.uniform(0.1, 0.4)
        else:  # few steps between kills, so that there are checkpoints left for the later ones
            share = rng.uniform(0.05, 0.2) if moment == "any time" else rng.uniform(0.2, 0.5)
        deadline = time.monotonic() + (1000 if moment == FIRST else share * seconds)
        while True:
            seen = reached(moment, out, started)
            if seen or time.monotonic() > deadline:  # a moment of milliseconds may have been missed
                zygote.kill(pid)
                killed.append(moment if seen else "any time")
                break
            if (status := zygote.poll(pid)) is not None:
                assert status == 0, log.read_text()[-3000:]
                return killed  # it was faster than the next kill
            time.sleep(0.002)


def assert_equal(a: Path, b: Path) -> int:
    """Compare two run folders. -> how many files and steps were compared."""
    count = 0
    for path in sorted(a.glob("**/model.safetensors")):
        assert path.read_bytes() == (b / path.relative_to(a)).read_bytes(), path
        count += 1
    for path in sorted(a.glob("**/metrics.jsonl")):
        where = path.parent.relative_to(a)
        rows, others = ([untimed(row) for row in read_metrics(folder / where)] for folder in (a, b))
        steps = [row["step"] for row in rows]
        assert steps == list(range(steps[0], steps[-1] + 1)), "a step is missing or doubled"
        assert rows == others, path
        samples = path.with_name("samples.jsonl")
        assert samples.read_bytes() == (b / samples.relative_to(a)).read_bytes()
        newest = sorted((path.parent / "checkpoint").iterdir())[-1]
        assert_same_checkpoint(newest, b / newest.relative_to(a))
        count += len(rows)
    for path in [*a.glob("**/rows.jsonl"), *a.glob("**/queries.jsonl"), *a.glob("data/*.jsonl")]:
        assert path.read_bytes() == (b / path.relative_to(a)).read_bytes(), path
        count += 1
    return count


def untimed(row: dict) -> dict:
    """A row of metrics without what no two runs share."""
    return {k: v for k, v in row.items() if not k.startswith(("seconds/", "memory/", "speed/"))}


def complete_run(out: Path) -> list[dict]:
    """The metrics of a run of three steps and an evaluation before the first, which has left all files."""
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert not [(row["step"], name) for row in rows for name, value in row.items() if not math.isfinite(value)]
    names = ("args.json", "samples.jsonl", "model/model.safetensors", "model/tokenizer.json")
    assert not [name for name in names if not (out / name).exists()]
    return rows


def assert_same_metrics(one: Path, two: Path) -> None:
    """Compare metrics.jsonl of runs on one rank and on more: the same steps and names, and numbers but for rounding."""
    for row, other in zip(read_metrics(one), read_metrics(two), strict=True):
        assert row.keys() == other.keys()
        for name, value in untimed(row).items():
            if not name.startswith("mismatch/"):
                assert other[name] == pytest.approx(value, rel=2e-3, abs=1e-5), (row["step"], name)


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """Compare weights, optimizer states and what else the algorithm keeps (such as ReLIFT's buffer)."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = []
        for i, path in enumerate((a, b)):
            dcp_to_torch_save(path, f"{folder}/{i}.pt")
            loaded.append(torch.load(f"{folder}/{i}.pt", weights_only=False))
            state = json.loads((path / "state.json").read_text())
            named = ("settings", "tokenizer")  # they hold the folder's name
            loaded[-1]["state"] = {k: v for k, v in state.items() if k not in named}
    assert same(*loaded), f"{a} and {b} differ"


def same(a, b) -> bool:
    """Whether two nested structures hold the same tensors and values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=list(RUNS), help=f"of {', '.join(RUNS)}; none: all")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    zygote = Zygote()
    for name in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            whole, killed = Path(folder) / "whole", Path(folder) / "killed"
            seconds = undisturbed(name, whole, zygote)
            moments = disturbed(name, killed, zygote, seconds, options.kills, random.Random(f"{options.seed} {name}"))
            compared = assert_equal(whole, killed)
            said = ", ".join(f"{moments.count(m)} x {m}" for m in (FIRST, *MOMENTS) if m in moments)
            print(f"{name}: {compared} files and steps equal after {len(moments)} kills ({said})", flush=True)
            assert len(moments) == options.kills, f"{name} ended after {len(moments)} kills"
            shutil.rmtree(folder, ignore_errors=True)
    zygote.close()


if __name__ == "__main__":
    sys.exit(main())
