"""Train five steps of tiny presets in two checkouts of this repository and compare what they leave behind.

    python tests/compare_checkouts.py OLD NEW [--scripts luffy relift ...] [--methods rl_sft ...] [--ranks 1 2]

A change of form alone leaves weights bit for bit and metrics as they are (times, memory and speeds excepted). Exit
code 1 if weights differ, or a metric that both have."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

COMMON = ["--preset", "tiny", "--rollout", "embedded", "--save_every", "0", "--eval_every", "5", "--steps", "5",
          "--batch_size", "8"]  # fmt: skip
SHORT = [*COMMON, "--eval_limit", "16"]
BRIDGE = ["--arms", "bridge", "--model", "models/tiny", "--base_problems", "0", "--sft_problems", "80",
          "--sft_steps", "5", "--sft_batch_size", "16", "--rl_problems", "80", "--eval_problems", "4"]  # fmt: skip
RELIFT = ["--sft_data_size", "8"]
CASES = {  # script: {method: its flags}
    "luffy": {name: [*SHORT, "--method", name] for name in ("luffy", "grpo", "rl_sft", "sft")},
    "relift": {name: [*SHORT, *RELIFT, "--method", name] for name in ("relift", "grpo", "sft")},
    "redi": {"sft": [*SHORT, "--stage", "sft"]}
    | {name: [*SHORT, "--igsm_problems", "80", "--loss", name] for name in ("redi", "dpo", "simpo")},
    "oreo": {name: [*SHORT, "--igsm_problems", "40", "--samples", "4", *flags] for name, flags in (
        ("token", ["--variant", "token"]), ("step", ["--variant", "step"]), ("response", ["--variant", "response"]),
        ("dqo", ["--variant", "dqo"]), ("iterate", ["--stage", "iterate", "--rounds", "2"]),
        *((stage, ["--stage", stage]) for stage in ("kto", "dpo", "rejection", "sft")),
    )},
    "behavior_injection": {"sft and rl": [*COMMON, *BRIDGE]},
}  # fmt: skip
STAGES = {"behavior_injection": [["--stage", stage] for stage in ("data", "sft", "rl")]}  # one after the other


def train(checkout: Path, script: str, flags: list[str], ranks: int, out: Path) -> tuple[dict, dict]:
    """Run a script; return {model file: digest} and {(log, step, name): value}."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    for stage in STAGES.get(script, [[]]):
        words = [sys.executable, *launcher, f"{script}.py", *flags, *stage, "--out", str(out)]
        done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{checkout}: {' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    models = sorted(out.rglob("*.safetensors"))
    digests = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in models}
    metrics = {}
    for log in sorted(out.rglob("metrics.jsonl")):
        for row in map(json.loads, log.read_text().splitlines()):
            for name, value in row.items():
                if not name.startswith(("seconds/", "memory/", "speed/")):
                    metrics[str(log.relative_to(out)), row["step"], name] = value
    return digests, metrics


def difference(old: dict, new: dict) -> tuple[float, list[str]]:
    """Return the largest relative difference of common metrics, and what one side lacks: -old, +new, !at this step."""
    largest = max((abs(new[k] - old[k]) / max(abs(old[k]), 1e-9) for k in old.keys() & new.keys()), default=0.0)
    a, b = ({name for *_, name in metrics} for metrics in (old, new))
    missing = [key for key in old.keys() ^ new.keys() if key[-1] in a & b]
    return largest, [f"-{n}" for n in sorted(a - b)] + [f"+{n}" for n in sorted(b - a)] + [f"!{m}" for m in missing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=lambda path: Path(path).resolve())
    parser.add_argument("new", type=lambda path: Path(path).resolve())
    parser.add_argument("--scripts", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--methods", nargs="+", help="of these scripts; default: all")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    options, same = parser.parse_args(), True
    print("| script, method | ranks | weights | largest difference of a metric | metrics that one side lacks |")
    print("|---|---|---|---|---|")
    for script in options.scripts:
        for method, flags in CASES[script].items():
            for ranks in options.ranks if method in (options.methods or [method]) else []:
                with tempfile.TemporaryDirectory() as folder:
                    sides = ((options.old, Path(folder, "old")), (options.new, Path(folder, "new")))
                    models, metrics = zip(*[train(side, script, flags, ranks, out) for side, out in sides])
                largest, names = difference(*metrics)
                weights = "bit-equal" if models[0] and models[0] == models[1] else "DIFFERENT"
                same &= weights == "bit-equal" and largest < 1e-9
                print(f"| {script}, {method} | {ranks} | {weights} | {largest:.1e} | {' '.join(names)} |", flush=True)
    sys.exit(not same)


if __name__ == "__main__":
    main()
