"""`make demo`: LUFFY against on-policy GRPO and SFT from the same base model, on problems that are too hard for it.

All runs have the same steps, questions and seed. GRPO has 8 own answers a question, LUFFY 7 and the teacher's trace,
SFT the trace alone. Accuracy is measured on held-out problems, whose solution templates occur in no training problem: 8
answers each at temperature 1. "Never solved" are the problems that the base gets wrong 8 times out of 8. Everything
lands in --out: results.json, curves.png, and an ordinary run folder for each method.
"""

import json
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tyro  # noqa: E402

import luffy  # noqa: E402
from benchmarks.held_out import drawn, error  # noqa: E402
from common.metrics import finite, plot_curves, read_metrics  # noqa: E402


@dataclass
class Demo:
    out: str = "runs/demo"
    """Folder for everything."""
    seed: int = 0
    """Seed of the runs; the held-out problems stay the same."""
    problems: int = 300
    """Held-out problems."""
    tries: int = 8
    """Answers to each."""
    methods: tuple[str, ...] = ("grpo", "sft", "luffy")
    """What to train, each for the same number of steps."""
    extra: str = ""
    """More flags for every run, as in --extra="--steps 20"."""


def main(demo: Demo) -> dict:
    out, started = Path(demo.out), time.time()
    base = str(ROOT / luffy.PRESETS["tiny"]["model"])
    [source] = luffy.PRESETS["tiny"]["eval_data"]

    def measure(model: str, name: str) -> list[float]:
        groups = drawn(model, source, demo.problems, tries=demo.tries, name=name)
        return [mean(reward for *_, reward in group) for group in groups]

    rates = {"base": measure(base, "base")}
    results: dict = {"seed": demo.seed, "problems": demo.problems, "tries": demo.tries, "models": {}}
    for method in demo.methods:
        run = out / method
        command = [sys.executable, "luffy.py", "--preset", "tiny", "--method", method, "--model", base]
        command += ["--seed", str(demo.seed), "--out", str(run.absolute()), *shlex.split(demo.extra)]
        print("\n$", " ".join(["python", *command[1:]]), flush=True)
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        rates[method] = measure(str(run / "model"), method)
    never = [i for i, rate in enumerate(rates["base"]) if rate == 0]

    print(f"\n{demo.problems} held-out problems, {demo.tries} answers each at temperature 1, seed {demo.seed}:\n")
    print(f"{'':10}  accuracy        on the {len(never):3} the base never solves   steps  sampled rows")
    for name, rate in rates.items():
        everywhere, hard = [100 * r for r in rate], [100 * rate[i] for i in never] or [math.nan]
        args = json.loads((out / name / "args.json").read_text()) if name != "base" else None
        steps = len([r for r in read_metrics(out / name) if r["step"]]) if args else 0
        sampled = steps * args["batch_size"] * (args["group_size"] - args["teacher_rows"]) if args else 0
        results["models"][name] = {
            "accuracy": mean(everywhere), "accuracy_se": error(everywhere),
            "never_solved": mean(hard), "never_solved_se": error(hard),
            "steps": steps, "sampled_rows": sampled,
        }
        print(f"{name:10}  {mean(everywhere):4.1f} % ± {error(everywhere):.1f}"
              f"    {mean(hard):4.1f} % ± {error(hard):.1f}                           {steps:5}  {sampled:6}")
    results |= {"never_solved_problems": len(never), "seconds": time.time() - started}
    out.mkdir(parents=True, exist_ok=True)
    results = finite(results)  # unknown numbers are null
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    panels = [["eval/mean"], ["reward/own"], ["group/solve_none"], ["policy/entropy"], ["teacher/logp"], ["length/own"]]
    plot_curves({method: out / method for method in demo.methods}, panels, out / "curves.png")
    print(f"\n{out}/curves.png, {out}/results.json and samples worth reading in {out}/luffy/samples.jsonl "
          f"({results['seconds']:.0f} s)")
    return results


if __name__ == "__main__":
    main(tyro.cli(Demo, use_underscores=True))
