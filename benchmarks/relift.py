"""What ReLIFT claims, in small: RL alone hardly moves the questions that the base always fails, ReLIFT does, with
a fraction of the demonstrations. Five runs from one base for each seed, with equal steps, questions a step, sampled
answers a question (SFT samples none) and learning rates:

    rl             ReLIFT without its SFT updates (--sft_data_size -1), so the same clip and gradient clip
    sft            the demonstrations of every question of every step
    luffy          8 own answers and a trace a question, LUFFY's loss
    relift         SFT updates on the hardest questions
    relift_random  SFT updates on as many questions at random

    python benchmarks/relift.py                       three seeds, one after the other
    python benchmarks/relift.py --seeds 0 --extra="--steps 4"

Held-out problems are sorted into easy (6 to 8 right), medium (3 to 5), hard (1 or 2) and hardest (0) by 8 answers of
the base. Every model, the base too, is then measured on 8 *other* answers at temperature 1: measured on the answers
that sorted them, the base would have 0 % on the hardest by construction. A run that is complete is not run again.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import tyro  # noqa: E402

from benchmarks.held_out import answers, mean_and_spread, save  # noqa: E402
from common.metrics import read_metrics  # noqa: E402
from eval import difficulty  # noqa: E402

ARMS = {
    "rl": ["relift.py", "--sft_data_size", "-1"],
    "sft": ["relift.py", "--method", "sft", "--schedule", "constant", "--warmup", "0"],
    "luffy": ["luffy.py", "--group_size", "9"],
    "relift": ["relift.py"],
    "relift_random": ["relift.py", "--sft_on", "random"],
}
BUCKETS = ("easy", "medium", "hard", "hardest")
TRIES = 8  # answers that sort the problems, and again as many that measure


@dataclass
class Bench:
    out: str = "runs/relift_claim"
    """Folder for the runs."""
    results: str = "benchmarks/results/relift-tiny"
    """Where the numbers (.json), the table (.md) and the plot (.png) go."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every arm; the held-out problems stay the same."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Which of the runs to make."""
    model: str = "models/tiny"
    """The base of all runs."""
    data: str = "igsm:5-8"
    """Training problems of all runs, and with other templates the held-out ones."""
    problems: int = 300
    """Held-out problems."""
    extra: str = ""
    """More flags for every run, as in --extra="--steps 20"."""


def measure(model: str, bench: Bench, buckets: list[str]) -> dict[str, float]:
    """Accuracy in percent, in all and by bucket, and mean length of fresh answers."""
    groups = answers(model, bench.data, bench.problems, tries=TRIES)
    rate = [100 * sum(reward for reward, _ in group) / TRIES for group in groups]
    row = {"accuracy": sum(rate) / len(rate)}
    for name in BUCKETS:
        inside = [r for r, bucket in zip(rate, buckets, strict=True) if bucket == name]
        row[name] = sum(inside) / len(inside) if inside else None
    return row | {"length": sum(n for group in groups for _, n in group) / (TRIES * len(groups))}


def train(arm: str, seed: int, bench: Bench) -> Path:
    """The run folder of an arm and a seed, trained unless it is complete."""
    run = (Path(bench.out) / f"{arm}-{seed}").absolute()
    script, *flags = ARMS[arm]
    command = [sys.executable, script, "--preset", "tiny", "--model", bench.model, "--data", bench.data]
    command += ["--eval_data", bench.data, *flags, "--seed", str(seed), "--out", str(run), *shlex.split(bench.extra)]
    if not (run / "model").exists():
        print("\n$", " ".join(["python", *command[1:]]), flush=True)
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return run


def cost(run: Path) -> dict[str, float]:
    """What a run took: steps, sampled answers, demonstrations trained on (each time), seconds of its steps."""
    args, rows = json.loads((run / "args.json").read_text()), [r for r in read_metrics(run) if r["step"]]
    own = 0 if args["method"] == "sft" else args["group_size"] - args.get("teacher_rows", 0)
    luffy = len(rows) * args["batch_size"] * args.get("teacher_rows", 0)
    return {
        "steps": len(rows), "sampled": len(rows) * args["batch_size"] * own,
        "demonstrations": rows[-1].get("sft/demonstrations", luffy),
        "seconds": sum(row["seconds/step"] for row in rows),
    }


def table(results: dict) -> str:
    """Markdown: a line an arm; mean over seeds ± their standard deviation."""
    sizes = results["buckets"]
    head = ["", "all", *(f"{name} ({sizes[name]})" for name in BUCKETS), "demonstrations", "sampled", "tokens"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for arm, runs in {"base": {"": results["base"]}, **results["runs"]}.items():
        cells = [arm]
        for name in ("accuracy", *BUCKETS, "demonstrations", "sampled", "length"):
            values = [row[name] for row in runs.values() if row.get(name) is not None]
            mean, spread = mean_and_spread(values) if values else (None, 0.0)
            exact = name in ("demonstrations", "sampled")
            cells.append("" if mean is None else f"{mean:,.0f}" if exact else
                         f"{mean:.1f}" + (f" ± {spread:.1f}" if len(runs) > 1 else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(bench: Bench, results: dict, path: Path) -> None:
    """Held-out accuracy over the steps (mean over seeds), questions that fail, and demonstrations used."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = {
        "eval/mean": "held-out accuracy", "group/solve_none": "training questions that all rollouts fail",
        "sft/demonstrations": "demonstrations used",
    }  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.5), layout="constrained")
    for axis, (name, title) in zip(axes.flat, titles.items(), strict=True):
        for color, arm in enumerate(results["runs"]):
            runs = [read_metrics(Path(bench.out) / f"{arm}-{seed}") for seed in bench.seeds]
            steps = sorted({row["step"] for rows in runs for row in rows if row.get(name) is not None})
            if steps:
                by_step = [[row[name] for rows in runs for row in rows if row["step"] == s and name in row]
                           for s in steps]
                means = [sum(v) / len(v) for v in by_step]
                if name == "group/solve_none":  # a few questions a step: show the mean of the last 10 steps
                    means = [sum(means[max(0, i - 9) : i + 1]) / min(10, i + 1) for i in range(len(means))]
                axis.plot(steps, means, label=arm, lw=1.4, color=f"C{color}")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(bench: Bench) -> dict:
    if unknown := set(bench.arms) - set(ARMS):
        raise SystemExit(f"--arms: {', '.join(sorted(unknown))}: choose from {', '.join(ARMS)}")
    started = time.time()
    base = str(ROOT / bench.model)
    first = answers(base, bench.data, bench.problems, tries=TRIES, seed=54321)
    right = [sum(reward > 0 for reward, _ in group) for group in first]
    buckets = [difficulty(count / TRIES) for count in right]
    results: dict = {
        "command": " ".join(["python", "benchmarks/relift.py", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "problems": bench.problems, "tries": TRIES, "buckets": {name: buckets.count(name) for name in BUCKETS},
        "base": measure(base, bench, buckets), "runs": {},
    }
    for seed in bench.seeds:
        for arm in bench.arms:
            run = train(arm, seed, bench)
            row = measure(str(run / "model"), bench, buckets) | cost(run)
            results["runs"].setdefault(arm, {})[str(seed)] = row
    results["seconds"] = time.time() - started
    path = save(results, table(results), bench.results)
    plot(bench, results, path.with_suffix(".png"))
    print(f"\n{bench.problems} held-out problems, {TRIES} answers each at temperature 1, {len(bench.seeds)} seeds "
          f"(mean ± standard deviation):\n\n{table(results)}\n\n{path}.json, .md and .png ({results['seconds']:.0f} s)")
    return results


if __name__ == "__main__":
    main(tyro.cli(Bench, use_underscores=True))
