"""OREO's agents on TextWorld: a policy that learnt from walkthroughs plays, learns from its own episodes, and plays
games it never saw; then its value chooses among K answers at each turn.

    sft          a model from scratch, trained on the walkthroughs of --train_games
    rejection    sft, trained further on those of its own episodes of --practice_games that won
    oreo         sft, trained further by token-level OREO on all these episodes, right and wrong

    python benchmarks/agents.py                     three seeds (first: pip install -r requirements-agents.txt)
    python benchmarks/agents.py --seeds 0 --train_games 20 --practice_games 10 --test_games 10 --extra="--steps 4"

A seed draws its own episodes, the same for both arms; the games whose walkthroughs it has seen it would win always.
Every policy plays the test games, which nobody has seen: each once greedily, and --tries times at temperature 1;
OREO's also with its value, which chooses among K answers at each turn. Things have few names, so that a model of a
million weights can learn to read about them. What is complete is not done again.
"""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import tyro  # noqa: E402

from common.metrics import read_metrics  # noqa: E402

LONG = ["--max_prompt_tokens", "1000", "--max_response_tokens", "2000", "--eval_every", "0"]
ARMS = ("rejection", "oreo")
AGENTS = ("-m", "tools.agents")


@dataclass
class Bench:
    out: str = "runs/agents_claim"
    """Folder for games and runs."""
    results: str = "benchmarks/results/agents-textworld"
    """Where the numbers (.json), the table (.md) and the plot (.png) go."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the episodes and of the training on them; games and sft stay the same."""
    train_games: int = 200
    """Games whose walkthroughs are learnt. TextWorld takes more than a second to compile one."""
    practice_games: int = 100
    """Games of other seeds, of which it learns by playing."""
    test_games: int = 100
    """Games of other seeds again, to measure by."""
    names: int = 6
    """Of each kind of thing, in all games; 0: as the games call them, which this small model does not learn to read."""
    renamed: int = 9
    """How often sft sees each walkthrough again under other names."""
    sft_epochs: int = 5
    """Passes of sft over the walkthroughs."""
    epochs: int = 4
    """Passes of rejection and oreo over the episodes."""
    repeat: int = 5
    """Episodes of each practice game that are collected."""
    batch_size: int = 32
    """Episodes of an update on them."""
    tries: int = 2
    """Episodes of each test game at temperature 1."""
    candidates: tuple[int, ...] = (3, 5)
    """K: answers among which the value chooses."""
    max_turns: int = 10
    """Actions of an episode; the games can be won in 2."""
    extra: str = ""
    """More flags for the runs of rejection and oreo, as in --extra="--steps 20"."""


def run(*words, done: Path) -> None:
    """A script or module with these flags, unless `done` is there. SystemExit if other flags made it."""
    command = " ".join(os.path.relpath(word, ROOT) if isinstance(word, Path) else str(word) for word in words)
    record = done.parent / "command.txt"
    if record.exists() and record.read_text() != command:
        raise SystemExit(f"{done.parent} was made by another command: remove it, or name another --out")
    if not done.exists():
        print("\n$ python", *words, flush=True)
        subprocess.run(
            [sys.executable, *map(str, words)], cwd=ROOT, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        record.write_text(command)


def success(out: Path, games: Path, bench: Bench, *words) -> float:
    """Percent of episodes won."""
    done = out / "results.json"
    play = ["--names", bench.names, "--max_turns", bench.max_turns, *words]
    run(*AGENTS, "--games", games, "--out", out, *play, done=done)
    return 100 * json.loads(done.read_text())["success"]


def measure(folder: Path, games: Path, seed: int, bench: Bench, values: bool = False) -> dict:
    """Success of the policy in this run folder: greedy, sampled, and by K where it has a value."""
    model = ["--model", folder / "model", "--seed", seed]
    found: dict = {
        "greedy": success(folder / "greedy", games, bench, *model),
        "sampled": success(
            folder / "sampled", games, bench, "--stage", "collect", "--repeat", bench.tries, *model
        ),
    }  # fmt: skip
    if values:
        found["value"] = {
            str(k): success(
                folder / f"value-{k}", games, bench, "--value", folder / "value", "--candidates", k, *model
            ) for k in bench.candidates
        }  # fmt: skip
    return found


def by_policy(results: dict) -> dict[str, list[dict]]:
    """What was measured of each policy, a dictionary for each seed."""
    return {"sft": [results["sft"]]} | {name: list(runs.values()) for name, runs in results["runs"].items()}


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (of the sample; 0 for one value)."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def table(results: dict) -> str:
    """Markdown: success in percent by policy and by how it plays, mean ± standard deviation over the seeds."""
    ways = {"greedy": "greedy", "sampled": "sampled"} | {str(k): f"best of {k} by V" for k in results["candidates"]}
    lines = ["| | " + " | ".join(ways.values()) + " |", "| " + " | ".join(["---"] * (1 + len(ways))) + " |"]
    for name, runs in by_policy(results).items():
        cells = []
        for way in ways:
            values = [(r | r.get("value", {})).get(way) for r in runs]
            if None in values:
                cells.append("")
            else:
                middle, spread = mean_and_spread(values)
                cells.append(f"{middle:.1f} ± {spread:.1f}" if len(values) > 1 else f"{middle:.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict, bench: Bench, path: Path) -> None:
    """Success by policy, by K, and what OREO's value thinks of right and wrong episodes on the way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    bars = by_policy(results)
    for i, way in enumerate(("greedy", "sampled")):
        means, spreads = zip(*(mean_and_spread([r[way] for r in runs]) for runs in bars.values()), strict=True)
        at, spreads = [n + 0.4 * i for n in range(len(bars))], [s or math.nan for s in spreads]  # one value has none
        axes[0].bar(at, means, 0.38, yerr=spreads, capsize=3, label=way)
    axes[0].set_xticks([n + 0.2 for n in range(len(bars))], bars)
    axes[0].set_title("test games won, %", fontsize=10)
    by_k = [[r["value"][str(k)] for r in results["runs"]["oreo"].values()] for k in results["candidates"]]
    axes[1].errorbar(results["candidates"], *zip(*map(mean_and_spread, by_k), strict=True), marker=".", capsize=3)
    axes[1].set_title("oreo: won when V chooses among K, %", fontsize=10)
    axes[1].set_xlabel("K")
    axes[1].set_xticks(results["candidates"])
    for seed in bench.seeds:
        rows = [r for r in read_metrics(Path(bench.out) / f"oreo-{seed}") if r["step"]]
        for name, style in (("value/right", "-"), ("value/wrong", ":")):
            points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
            axes[2].plot(*zip(*points, strict=True), f"C{seed}{style}", label=f"{name[6:]}, seed {seed}", lw=1.2)
    axes[2].set_title("V of right and wrong episodes", fontsize=10)
    axes[2].set_xlabel("step")
    axes[2].set_ylim(top=1.3)  # room for the legend
    for axis in axes:
        axis.grid(alpha=0.3)
        if labels := axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7, ncols=math.ceil(len(labels) / 2), loc="upper right")
    figure.savefig(path, dpi=110)


def main(bench: Bench) -> dict:
    started = time.time()
    out = Path(bench.out).absolute()
    train, practice, test = (out / "games" / name for name in ("train", "practice", "test"))
    expert, sft = out / "expert", out / "sft"
    counts = {train: bench.train_games, practice: bench.practice_games, test: bench.test_games}
    for (games, count), first in zip(counts.items(), (0, 50_000, 100_000), strict=True):
        words = ["--stage", "make", "--games", games, "--count", count, "--first_seed", first]
        run(*AGENTS, *words, done=games / f"seed-{first + count - 1:06d}.z8")
    words = ["--stage", "expert", "--games", train, "--model", "scratch", "--out", expert]
    words += ["--renamed", bench.renamed, "--names", bench.names]
    run(*AGENTS, *words, done=expert / "rows.jsonl")
    words = ["--stage", "rejection", "--model", expert / "model", "--rows", expert / "rows.jsonl"]
    words += ["--batch_size", "16", "--epochs", bench.sft_epochs, "--lr", "1e-3", *LONG]
    run("oreo.py", "--preset", "tiny", *words, "--out", sft, done=sft / "model")
    results: dict = {
        "command": " ".join(["python", "benchmarks/agents.py", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "candidates": list(bench.candidates), "sft": measure(sft, test, 0, bench),
        "collected": {}, "runs": {arm: {} for arm in ARMS},
    }  # fmt: skip
    for seed in bench.seeds:
        rows = out / f"collected-{seed}"
        words = ["--stage", "collect", "--repeat", bench.repeat, "--model", sft / "model", "--seed", seed]
        results["collected"][str(seed)] = success(rows, practice, bench, *words)
        for arm in ARMS:
            folder = out / f"{arm}-{seed}"
            words = ["--stage", arm, "--model", sft / "model", "--rows", rows / "rows.jsonl", "--seed", seed]
            words += ["--epochs", bench.epochs, "--batch_size", bench.batch_size, *LONG, "--out", folder]
            words += shlex.split(bench.extra)
            run("oreo.py", "--preset", "tiny", *words, done=folder / "model")
            results["runs"][arm][str(seed)] = measure(folder, test, seed, bench, values=arm == "oreo")
    results["seconds"] = time.time() - started
    path = Path(bench.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    path.with_suffix(".md").write_text(table(results) + "\n", encoding="utf-8")
    plot(results, bench, path.with_suffix(".png"))
    print(f"\n{table(results)}\n\n{path}.json, {path}.md, {path}.png ({results['seconds']:.0f} s)")
    return results


if __name__ == "__main__":
    main(tyro.cli(Bench, use_underscores=True))
