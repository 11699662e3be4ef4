"""What OREO claims, in small: from one collected dataset it ends above rejection sampling, DPO and KTO; the value
guides a search that adds to it; and collecting and training again adds more.

    sft             the base of everything: --model after `oreo.py --preset tiny --stage sft`
    rejection, dpo, kto, oreo-token, oreo-step, oreo-response      one run each for every seed, on the same rows
    search          oreo-token's policy by beams of width 1, 3, 5, 7 with its value; best_of_n as wide, for comparison
    iterations      two further rounds of oreo-token, rejection and dpo, from their first

    python benchmarks/oreo.py                       three seeds, one after the other
    python benchmarks/oreo.py --seeds 0 --widths 1 3 --rounds 1 --extra="--steps 4"

Every model is measured on the same held-out problems (of templates that no training problem has): greedily, and by
8 answers at temperature 1. Searches are measured on the first --search_problems of them. What is complete is not done
again. The comparisons' learning rates are --preset tiny's; --lr sets others, as in --lr dpo=1e-5 kto=3e-6.
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

from benchmarks.held_out import cell, mean, mean_and_spread, save, search_command, searched, solve_rates  # noqa: E402
from common.metrics import read_metrics  # noqa: E402

ARMS = {
    "rejection": ["--stage", "rejection"],
    "dpo": ["--stage", "dpo"],
    "kto": ["--stage", "kto"],
    "oreo-token": ["--stage", "oreo"],
    "oreo-step": ["--stage", "oreo", "--variant", "step"],
    "oreo-response": ["--stage", "oreo", "--variant", "response"],
}
TRIES = 8  # answers at temperature 1


@dataclass
class Bench:
    out: str = "runs/oreo_claim"
    """Folder for the runs."""
    results: str = "benchmarks/results/oreo-tiny"
    """Where the numbers (.json), the table (.md) and the plot (.png) go."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every arm; the rows and the held-out problems stay the same."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Which of the runs to make."""
    iterated: tuple[str, ...] = ("oreo-token", "rejection", "dpo")
    """Which of them go on for further rounds."""
    rounds: int = 2
    """How many further rounds."""
    widths: tuple[int, ...] = (1, 3, 5, 7)
    """Of the searches."""
    model: str = "models/tiny"
    """What is fine-tuned on worked solutions first."""
    data: str = "igsm:5-8"
    """Training problems of all runs, and with other templates the held-out ones."""
    problems: int = 300
    """Held-out problems."""
    search_problems: int = 300
    """Of them, for the searches."""
    lr: tuple[str, ...] = ()
    """ARM=RATE: other learning rates than the preset's."""
    extra: str = ""
    """More flags for every run but sft, as in --extra="--steps 20"."""


def measure(model: str, bench: Bench) -> dict[str, float]:
    """Greedy accuracy, and the mean over 8 sampled answers, in percent; kept beside the model."""
    kept = Path(model).parent / "measured.json"
    settings = [bench.data, bench.problems]
    if kept.exists() and json.loads(kept.read_text())["settings"] == settings:
        return json.loads(kept.read_text())["accuracy"]
    asked = (model, bench.data, bench.problems)
    rates = {"greedy": solve_rates(*asked, tries=1, temperature=0.0), "sampled": solve_rates(*asked, tries=TRIES)}
    accuracy = {name: 100 * mean(rate) for name, rate in rates.items()}
    kept.write_text(json.dumps({"settings": settings, "accuracy": accuracy}) + "\n")
    return accuracy


def call(words: list[str], done: Path) -> None:
    """A script with these flags, unless `done` is there."""
    if not done.exists():
        print("\n$ python", *words, flush=True)
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def run(words: list[str], out: Path, done: Path, bench: Bench) -> None:
    """oreo.py with these flags, unless `done` is there."""
    words = ["oreo.py", "--preset", "tiny", *words, "--data", bench.data, "--eval_data", bench.data]
    call([*words, "--out", str(out.absolute()), *([] if "sft" in words else shlex.split(bench.extra))], done)


def train(arm: str, seed: int, rows: Path, bench: Bench) -> list[Path]:
    """The folders of an arm's first run and its further rounds."""
    rates = dict(word.split("=") for word in bench.lr)
    words = [*ARMS[arm], "--seed", str(seed), *(["--lr", rates[arm]] if arm in rates else [])]
    first, base = (Path(bench.out) / f"{arm}-{seed}").absolute(), (Path(bench.out) / "sft" / "model").absolute()
    run([*words, "--model", str(base), "--rows", str(rows)], first, first / "model", bench)
    if arm not in bench.iterated or not bench.rounds:
        return [first]
    further = Path(f"{first}-more")
    words += ["--model", str(first / "model"), "--rounds", str(bench.rounds)]
    words += ["--value", str(first / "value")] if arm.startswith("oreo") else []
    if bench.rounds > 1:
        folders = [further / f"round-{n + 1}" for n in range(bench.rounds)]
    else:
        folders = [further]
    run(words, further, folders[-1] / "model", bench)
    return [first, *folders]


def search(first: Path, seed: int, bench: Bench) -> dict[str, dict[str, float]]:
    """Accuracy in percent of beam and best_of_n by width."""
    found: dict[str, dict[str, float]] = {"beam": {}, "best_of_n": {}}
    for kind in found:
        for width in bench.widths:
            out = first / f"search-{kind}-{width}"
            words = search_command(first / "model", first / "value", bench.data, bench.search_problems, kind=kind,
                                   width=width, out=out, seed=seed)  # fmt: skip
            call(words, out / "results.json")
            found[kind][str(width)] = 100 * mean(searched(out))
    return found


def tables(results: dict) -> str:
    """Markdown: the arms, the searches, the rounds."""
    lines: list[str] = []

    def row(*cells) -> None:
        lines.append("| " + " | ".join(map(str, cells)) + " |")

    row("", "greedy", "sampled")
    row(*["---"] * 3)
    for arm, runs in {"sft": {"": results["base"]}, **results["runs"]}.items():
        row(arm, *(cell([r[name] for r in runs.values()]) for name in ("greedy", "sampled")))
    if results["search"]:
        found = list(results["search"].values())
        lines.append("")
        row("search", *found[0]["beam"])
        row(*["---"] * (1 + len(found[0]["beam"])))
        for kind in found[0]:
            row(kind, *(cell([seed[kind][width] for seed in found]) for width in found[0][kind]))
    if results["rounds"]:
        n = max(len(r) for runs in results["rounds"].values() for r in runs.values())
        lines.append("")
        row("round", *range(1, n + 1))
        row(*["---"] * (n + 1))
        for arm, runs in results["rounds"].items():
            for kind in ("greedy", "sampled"):
                row(f"{arm}, {kind}", *(cell([r[kind] for r in nth]) for nth in zip(*runs.values(), strict=True)))
    return "\n".join(lines)


def plot(bench: Bench, results: dict, path: Path) -> None:
    """The arms' accuracies, the searches by width, the rounds, and what the runs log on the way (first seed)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), layout="constrained")
    bars = {"sft": [results["base"]["greedy"]]}
    bars |= {arm: [r["greedy"] for r in runs.values()] for arm, runs in results["runs"].items()}
    for i, values in enumerate(bars.values()):
        mean, spread = mean_and_spread(values)
        axes[0, 0].bar(i, mean, yerr=spread, color=f"C{i}", capsize=3)
    axes[0, 0].set_xticks(range(len(bars)), bars, rotation=30, fontsize=8)
    axes[0, 0].set_title("held-out accuracy, greedy", fontsize=10)
    for kind in ("beam", "best_of_n"):
        if results["search"]:
            widths = list(next(iter(results["search"].values()))[kind])
            points = [mean_and_spread([seed[kind][w] for seed in results["search"].values()]) for w in widths]
            axes[0, 1].errorbar([int(w) for w in widths], *zip(*points, strict=True), label=kind, marker=".", capsize=3)
    axes[0, 1].set_title("oreo-token with its value, by width", fontsize=10)
    for axis, kind in ((axes[0, 2], "greedy"), (axes[1, 0], "sampled")):
        for arm, runs in results["rounds"].items():
            points = [mean_and_spread([r[kind] for r in nth]) for nth in zip(*runs.values(), strict=True)]
            axis.errorbar(range(1, 1 + len(points)), *zip(*points, strict=True), label=arm, marker=".", capsize=3)
        axis.set_title(f"held-out accuracy by round, {kind}", fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels = [("value/gap", "value of right minus of wrong answers"), ("policy/kl", "KL to the reference")]
    for axis, (name, title) in zip(axes[1, 1:], panels, strict=True):
        for arm in results["runs"]:
            rows = read_metrics(Path(bench.out) / f"{arm}-{bench.seeds[0]}")
            rows = [r | {"value/gap": r["value/right"] - r["value/wrong"]} if "value/wrong" in r else r for r in rows]
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=arm, lw=1.3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(bench: Bench) -> dict:
    if unknown := set(bench.arms) - set(ARMS):
        raise SystemExit(f"--arms: {', '.join(sorted(unknown))}: choose from {', '.join(ARMS)}")
    started = time.time()
    sft, collected = ((Path(bench.out) / name).absolute() for name in ("sft", "collect"))
    rows = collected / "rows.jsonl"
    run(["--stage", "sft", "--model", bench.model], sft, sft / "model", bench)
    run(["--stage", "collect", "--model", str(sft / "model")], collected, rows, bench)
    rewards = [json.loads(line)["reward"] for line in rows.read_text().splitlines()]
    results: dict = {
        "command": " ".join(["python", "benchmarks/oreo.py", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "problems": bench.problems, "tries": TRIES, "collected": {"rows": len(rewards), "right": sum(rewards)},
        "base": measure(str(sft / "model"), bench), "runs": {}, "search": {}, "rounds": {},
    }
    for seed in bench.seeds:
        for arm in bench.arms:
            folders = train(arm, seed, rows, bench)
            measured = [measure(str(folder / "model"), bench) for folder in folders]
            args = json.loads((folders[0] / "args.json").read_text())
            steps = [row for row in read_metrics(folders[0]) if row["step"]]
            cost = {"lr": args["lr"], "steps": len(steps), "seconds": sum(row["seconds/step"] for row in steps)}
            results["runs"].setdefault(arm, {})[str(seed)] = measured[0] | cost
            if len(folders) > 1:
                results["rounds"].setdefault(arm, {})[str(seed)] = measured
            if arm == "oreo-token" and bench.widths:
                results["search"][str(seed)] = search(folders[0], seed, bench)
    results["seconds"] = time.time() - started
    path = save(results, tables(results), bench.results)
    plot(bench, results, path.with_suffix(".png"))
    print(f"\n{tables(results)}\n\n{path}.json, {path}.md, {path}.png ({results['seconds']:.0f} s)")
    return results


if __name__ == "__main__":
    main(tyro.cli(Bench, use_underscores=True))
