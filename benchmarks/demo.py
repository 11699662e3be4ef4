"""`make demo`: guidance against imitation. LUFFY, SFT on its traces and on-policy GRPO from the same base model.

The teacher's traces leap: they leave out intermediate results that this base needs (benchmarks/blocks/luffy.py). SFT
copies the leaps, GRPO never sees reasoning, and LUFFY's own answers compete with the traces. All three have the same
questions, steps and learning rate. Accuracy is measured on held-out problems, whose solution templates occur in no
training problem: 8 answers each at temperature 1, and a greedy one. LUFFY trains on one core, its output is shown; SFT
and GRPO train on the other, and write to log-METHOD.txt. Everything lands in --out: results.json, curves.png, and the
run folders sft/, grpo/ and luffy/.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tyro  # noqa: E402

from benchmarks.blocks.luffy import PROBLEMS, intermediate_results  # noqa: E402
from benchmarks.claims import measure  # noqa: E402
from benchmarks.held_out import error, mean  # noqa: E402
from common.trainer import plot_curves, read_metrics  # noqa: E402

ARMS = {  # what to train besides the preset's settings
    "luffy": "",
    "sft": "--method sft --schedule constant --warmup 0 --lr 2e-4 --batch_size 16",
    "grpo": "--method grpo",
}


@dataclass
class Demo:
    out: str = "runs/demo"
    """Folder for everything."""
    seed: int = 0
    """Seed of all runs; the problems stay the same."""
    problems: int = 300
    """Held-out problems."""
    tries: int = 8
    """Answers to each."""
    extra: str = ""
    """More flags for every run, as in --extra="--steps 20"."""


def python(words: str, log=None) -> None:
    """Run a command of ours on one core; `log`: file for its output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *shlex.split(words)], cwd=ROOT, check=True, env=environment, stdout=log, stderr=log)


def arm(name: str, demo: Demo) -> dict[str, float]:
    """Train a method (base: nothing) and measure its model."""
    out, steps, sampled = Path(demo.out).absolute(), 0, 0
    model = ROOT / "models" / "tiny"
    if name != "base":
        command = f"luffy.py --preset tiny --model {model} --data {out}/train.jsonl --eval_data {out}/test.jsonl"
        command += f" --seed {demo.seed} --out {out}/{name} {ARMS[name]} {demo.extra}"
        print(f"\n$ python {command}", flush=True)
        with open(out / f"log-{name}.txt", "a") as log:
            python(command, None if name == "luffy" else log)
        model, args = out / name / "model", json.loads((out / name / "args.json").read_text())
        steps = len([row for row in read_metrics(out / name) if row["step"]])
        sampled = steps * args["batch_size"] * (args["group_size"] - args["teacher_rows"])
    found = measure(str(model), str(out / "test.jsonl"), out / f"answers-{name}-{demo.problems}x{demo.tries}.json",
                    "boxed", 160, demo.problems, (("sampled", demo.tries), ("greedy", 1)))  # fmt: skip
    rates = [100 * mean(rewards) for rewards in found["sampled"]]
    return {
        "accuracy": mean(rates), "accuracy_se": error(rates), "greedy": 100 * mean(map(mean, found["greedy"])),
        "intermediate_results": mean(intermediate_results(text) for texts in found["sampled_texts"] for text in texts),
        "steps": steps, "sampled_rows": sampled,
    }  # fmt: skip


def main(demo: Demo) -> dict:
    out, started = Path(demo.out).absolute(), time.time()
    out.mkdir(parents=True, exist_ok=True)
    python(f"{PROBLEMS} --n 5000 --split train --out {out}/train.jsonl")
    python(f"{PROBLEMS} --n {demo.problems} --split test --out {out}/test.jsonl")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the two processes
    with ProcessPoolExecutor(2, get_context("spawn")) as workers:
        waiting = {name: workers.submit(arm, name, demo) for name in (*ARMS, "base")}
        models = {name: waiting[name].result() for name in ("base", "grpo", "sft", "luffy")}
    results = {"seed": demo.seed, "problems": demo.problems, "tries": demo.tries, "models": models}
    results["seconds"] = time.time() - started
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    panels = [["eval/mean"], ["reward/own"], ["group/solve_none"], ["policy/entropy"], ["teacher/logp"], ["length/own"]]
    plot_curves({name: out / name for name in ARMS}, panels, out / "curves.png")
    print(f"\n{demo.problems} held-out problems, {demo.tries} answers each at temperature 1, seed {demo.seed}:\n\n"
          f"{'':6}  accuracy        greedy   intermediate results per answer   steps   sampled rows")  # fmt: skip
    for name, found in models.items():
        print(f"{name:6}  {found['accuracy']:4.1f} % ± {found['accuracy_se']:.1f}    {found['greedy']:4.1f} %   "
              f"{found['intermediate_results']:6.2f}   {found['steps']:30}   {found['sampled_rows']:12}")  # fmt: skip
    print(f"\n{out}/curves.png, {out}/results.json and samples worth reading in {out}/luffy/samples.jsonl "
          f"({results['seconds']:.0f} s)")  # fmt: skip
    return results


if __name__ == "__main__":
    main(tyro.cli(Demo, use_underscores=True))
