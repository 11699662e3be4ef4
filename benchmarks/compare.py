"""Runs side by side: what two run folders logged, as a table and as curves.

    python benchmarks/compare.py runs/tiny runs/mine
    python benchmarks/compare.py runs/tiny runs/mine --metrics eval/mean policy/entropy --out entropy.png

Any script's folders will do. The settings that differ are named first; of each metric the mean of the first and of the
last five steps is shown (of under ten values half of them), of an evaluation the first and the last.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tyro  # noqa: E402

from common.metrics import plot_curves, read_metrics  # noqa: E402

METRICS = (
    "eval/mean", "reward/own", "group/solve_none", "policy/entropy", "teacher/logp", "teacher/shaped_ratio",
    "length/own", "sft/demonstrations", "logp/chosen", "logp/rejected", "value/right", "value/wrong",
    "optim/grad_norm", "seconds/step",
)  # fmt: skip


@dataclass
class Compare:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders."""
    metrics: tuple[str, ...] = METRICS
    """Names in their metrics.jsonl. Of the default ones, what no run has is left out."""
    out: str = "runs/compare.png"
    """Where the curves go."""


def ends(rows: list[dict], name: str) -> tuple[float, float] | None:
    """A metric at a run's start and end: means over five values, or half of them; of an evaluation the ends."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return None
    few = 1 if name.startswith("eval/") else max(1, min(5, len(values) // 2))
    return mean(values[:few]), mean(values[-few:])


def main(compare: Compare) -> str:
    if not compare.runs:
        raise SystemExit("name run folders: python benchmarks/compare.py runs/tiny runs/mine")
    parent = os.path.commonpath([Path(run).absolute().parent for run in compare.runs])
    folders = {os.path.relpath(run, parent): Path(run) for run in compare.runs}  # names without what all share
    if missing := [str(folder) for folder in folders.values() if not (folder / "metrics.jsonl").exists()]:
        raise SystemExit(f"{', '.join(missing)}: no metrics.jsonl there; name the --out folders of runs")
    metrics = {run: read_metrics(folder) for run, folder in folders.items()}
    settings = {run: json.loads((folder / "args.json").read_text()) for run, folder in folders.items()}
    lines = []
    for flag in sorted(set().union(*settings.values()) - {"out"}):
        values = [settings[run].get(flag, "-") for run in folders]
        if any(value != values[0] for value in values):
            name = flag if flag in ("script", "code") else f"--{flag}"  # code: digest of the script and of common/
            lines.append(f"{name:28}" + "".join(f" {value!s:>23}" for value in values))
    lines += [""] if lines else []
    lines.append(f"{'first -> last':28}" + "".join(f"{run[-22:]:>24}" for run in folders))
    found = [name for name in compare.metrics if any(ends(rows, name) for rows in metrics.values())]
    for name in found:
        both = [ends(rows, name) for rows in metrics.values()]
        lines.append(f"{name:28}" + "".join(f"{f'{x[0]:.3g} -> {x[1]:.3g}' if x else '-':>24}" for x in both))
    unknown = [name for name in compare.metrics if name not in found]
    if unknown and (compare.metrics != METRICS or not found):
        raise SystemExit(f"--metrics: no run has logged {', '.join(unknown)}")
    Path(compare.out).parent.mkdir(parents=True, exist_ok=True)
    plot_curves(folders, [[name] for name in found], Path(compare.out))
    text = "\n".join(lines)
    print(f"{text}\n\n{compare.out}")
    return text


if __name__ == "__main__":
    main(tyro.cli(Compare, use_underscores=True))
