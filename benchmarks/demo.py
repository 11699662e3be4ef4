"""`make demo`: LUFFY against on-policy GRPO from the same base model, on problems that are too hard for it.

Both runs have the same number of steps and of sampled rows (LUFFY's eighth row is the teacher's trace instead),
the same data, seed and settings. Accuracy is measured on held-out problems, whose solution templates occur in no
training problem: 8 answers each at temperature 1. "Never solved" are the problems that the base gets wrong 8 times
out of 8. Everything lands in --out: results.json, curves.png, and the two ordinary run folders grpo/ and luffy/.
"""

import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tyro  # noqa: E402

import luffy  # noqa: E402
from common.rollout import EmbeddedSampler, Sampling  # noqa: E402
from common.trainer import init_world, load_policy, load_tokenizer, parse_args, plot_curves, read_metrics  # noqa: E402
from common.verifiers import grade  # noqa: E402


@dataclass
class Demo:
    out: str = "runs/demo"
    """Folder for everything."""
    seed: int = 0
    """Seed of both runs; the held-out problems stay the same."""
    problems: int = 300
    """Held-out problems."""
    tries: int = 8
    """Answers to each."""
    methods: tuple[str, ...] = ("grpo", "luffy")
    """What to train, each for the same number of steps."""
    extra: str = ""
    """More flags for every run, as in --extra="--steps 20"."""


def solve_rates(model: str, demo: Demo, name: str) -> list[float]:
    """Share of right answers to each held-out problem, [problems]."""
    world, tokenizer = init_world(), load_tokenizer(model)
    args = parse_args(luffy.Args, ["--preset", "tiny"], method=luffy.METHODS, preset=luffy.PRESETS)
    [source] = args.eval_data
    examples, _ = luffy.read_examples(
        source, tokenizer, dataclasses.replace(args, seed=0), split="test", traces="ignored", limit=demo.problems
    )
    policy = load_policy(model, world)
    sampler = EmbeddedSampler(policy, stop_ids=[tokenizer.eos_token_id])
    sampler.sync(policy, version=0)
    groups = sampler.generate(
        [e.prompt for e in examples], n=demo.tries, keys=[e.index for e in examples], seed=12345,
        sampling=Sampling(args.max_response_tokens), progress=f"evaluate {name}",
    )
    texts = [tokenizer.decode(c.ids) for group in groups for c in group]
    golds = [e.gold for e in examples for _ in range(demo.tries)]
    rewards = [v.reward for v in grade(texts, golds, verifier=args.verifier)]
    return [sum(rewards[i : i + demo.tries]) / demo.tries for i in range(0, len(rewards), demo.tries)]


def mean_and_error(rates: list[float]) -> tuple[float, float]:
    """Mean of the problems' solve rates in percent, and its standard error over problems."""
    mean = sum(rates) / len(rates)
    variance = sum((r - mean) ** 2 for r in rates) / max(1, len(rates) - 1)
    return 100 * mean, 100 * math.sqrt(variance / len(rates))


def main(demo: Demo) -> dict:
    out, started = Path(demo.out), time.time()
    base = str(ROOT / luffy.PRESETS["tiny"]["model"])
    rates = {"base": solve_rates(base, demo, "base")}
    results: dict = {"seed": demo.seed, "problems": demo.problems, "tries": demo.tries, "models": {}}
    for method in demo.methods:
        run = out / method
        command = [sys.executable, "luffy.py", "--preset", "tiny", "--method", method, "--model", base]
        command += ["--seed", str(demo.seed), "--out", str(run.absolute()), *shlex.split(demo.extra)]
        print("\n$", " ".join(["python", *command[1:]]), flush=True)
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        rates[method] = solve_rates(str(run / "model"), demo, method)
    never = [i for i, rate in enumerate(rates["base"]) if rate == 0]

    print(f"\n{demo.problems} held-out problems, {demo.tries} answers each at temperature 1, seed {demo.seed}:\n")
    print(f"{'':10}  accuracy        on the {len(never):3} the base never solves   steps  sampled rows")
    for name, rate in rates.items():
        (mean, error), (hard, hard_error) = mean_and_error(rate), mean_and_error([rate[i] for i in never])
        args = json.loads((out / name / "args.json").read_text()) if name != "base" else None
        steps = len([r for r in read_metrics(out / name) if r["step"]]) if args else 0
        sampled = steps * args["batch_size"] * (args["group_size"] - args["teacher_rows"]) if args else 0
        results["models"][name] = {
            "accuracy": mean, "accuracy_se": error, "never_solved": hard, "never_solved_se": hard_error,
            "steps": steps, "sampled_rows": sampled,
        }
        print(f"{name:10}  {mean:4.1f} % ± {error:.1f}    {hard:4.1f} % ± {hard_error:.1f}"
              f"                           {steps:5}  {sampled:6}")
    results |= {"never_solved_problems": len(never), "seconds": time.time() - started}
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    panels = [["eval/mean"], ["reward/own"], ["group/solve_none"], ["policy/entropy"], ["teacher/logp"], ["length/own"]]
    plot_curves({method: out / method for method in demo.methods}, panels, out / "curves.png")
    print(f"\n{out}/curves.png, {out}/results.json and samples worth reading in {out}/luffy/samples.jsonl "
          f"({results['seconds']:.0f} s)")
    return results


if __name__ == "__main__":
    main(tyro.cli(Demo, use_underscores=True))
