"""REDI's claims in small: do wrong traces help beyond SFT, and is alpha 0.8 stabler than the symmetric loss?

    python benchmarks/redi.py --results benchmarks/results/redi-tiny.json

For every seed, from the base of `--preset tiny`: SFT on right traces (--stage sft), then that model's own wrong answers
to the same problems (tools/redi_data.py), then from the SFT model, on those pairs, one run for each arm:

    redi     every --alphas at every --lrs; alpha 0 is the control: the same steps on the right traces alone
    dpo      every --dpo_betas at every --dpo_lrs
    simpo    every --simpo (beta:gamma) at every --simpo_lrs

Accuracy is measured on held-out problems whose templates occur in no training problem: --tries answers each at
temperature 1. Of dpo, simpo and each alpha's rates the best setting is chosen on --validation other held-out problems,
by the mean over the seeds. Everything lands in --out: results.json, a curves-*.png for each rate, and ordinary run
folders; running it again goes on where it stopped.
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

import redi  # noqa: E402
from benchmarks.held_out import error, mean, solve_rates  # noqa: E402
from common.metrics import plot_curves, read_metrics  # noqa: E402


@dataclass
class Benchmark:
    out: str = "runs/bench-redi"
    """Folder for everything."""
    results: str = ""
    """Also write the table to this file."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A whole pipeline each."""
    alphas: tuple[float, ...] = (0.0, 0.2, 0.5, 0.8, 1.0)
    """redi's; 1 is the symmetric loss."""
    lrs: tuple[float, ...] = (1e-5, 1e-4)
    """redi's learning rates."""
    dpo_betas: tuple[float, ...] = (0.01, 0.1)
    """dpo's."""
    dpo_lrs: tuple[float, ...] = (1e-5, 1e-4)
    """dpo's."""
    simpo: tuple[str, ...] = ("2:1", "10:5")
    """simpo's beta:gamma (the paper's two)."""
    simpo_lrs: tuple[float, ...] = (1e-5, 1e-4)
    """simpo's."""
    problems: int = 300
    """Held-out problems that are reported."""
    validation: int = 150
    """Held-out problems that choose among settings."""
    tries: int = 4
    """Answers to each."""
    extra_sft: str = ""
    """More flags for stage sft, as in --extra_sft="--steps 20"."""
    extra_data: str = ""
    """More flags for tools/redi_data.py."""
    extra: str = ""
    """More flags for every arm."""


def arms(bench: Benchmark) -> dict[str, dict]:
    """Name of each arm -> its flags."""
    settings = [dict(loss="redi", alpha=alpha, lr=lr) for lr in bench.lrs for alpha in bench.alphas]
    settings += [dict(loss="dpo", beta=beta, lr=lr) for lr in bench.dpo_lrs for beta in bench.dpo_betas]
    for lr in bench.simpo_lrs:
        for beta, gamma in (map(float, setting.split(":")) for setting in bench.simpo):
            settings.append(dict(loss="simpo", beta=beta, gamma=gamma, lr=lr))
    return {" ".join([s["loss"], *(f"{k}={v:g}" for k, v in s.items() if k != "loss")]): s for s in settings}


def run(out: Path, extra: str, program: tuple = ("redi.py",), **flags) -> None:
    """Run a program with --preset tiny and these flags, unless it has run to its end."""
    if (out / "model").exists() or (out / "pairs.jsonl").exists():
        return
    command = [sys.executable, *program, "--preset", "tiny", "--out", str(out.absolute())]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))] + shlex.split(extra)
    print("\n$", " ".join(["python", *command[1:]]), flush=True)
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def accuracies(model: Path, bench: Benchmark) -> dict[str, float]:
    """Percent right of the reported and of the validation problems, kept beside the model."""
    kept = model.with_name(f"accuracy-{bench.validation}-{bench.problems}-{bench.tries}.json")
    if kept.exists() and model.parent != ROOT / "models":
        return json.loads(kept.read_text())
    [source] = redi.PRESETS["tiny"]["eval_data"]
    rates = solve_rates(
        str(model), source, bench.validation + bench.problems, tries=bench.tries, name=model.parent.name
    )
    found = {"validation": 100 * mean(rates[: bench.validation]), "test": 100 * mean(rates[bench.validation :])}
    if model.parent != ROOT / "models":
        kept.write_text(json.dumps(found))
    return found


def curve_ends(out: Path) -> dict[str, float | None]:
    """Where a run's curves began and ended: mean of the first and of the last five steps."""
    rows = [row for row in read_metrics(out) if row["step"]]
    ends = {
        f"{name} {when}": mean([row[name] for row in part])
        for name in ("logp/chosen", "logp/rejected", "entropy/chosen")
        for when, part in (("start", rows[:5]), ("end", rows[-5:]))
    }
    return ends | {"collapsed_at": rows[-1].get("alarm/collapsed_at"), "steps": len(rows)}


def main(bench: Benchmark) -> dict:
    out, started = Path(bench.out), time.time()
    table: dict[str, dict] = {"base": {"seeds": [accuracies(ROOT / redi.PRESETS["tiny"]["model"], bench)]}}
    table |= {name: {"flags": flags, "seeds": []} for name, flags in ({"sft": {}} | arms(bench)).items()}
    for seed in bench.seeds:
        folder = out / f"seed{seed}"
        sft, pairs = folder / "sft", (folder / "data").absolute() / "pairs.jsonl"
        model = (sft / "model").absolute()
        run(sft, bench.extra_sft, stage="sft", seed=seed)
        run(folder / "data", bench.extra_data, ("-m", "tools.redi_data"), seed=seed, model=model)
        table["sft"]["seeds"].append(accuracies(model, bench))
        for name, flags in arms(bench).items():
            arm = folder / name.replace(" ", "-")
            run(arm, bench.extra, **flags, seed=seed, model=model, data=pairs)
            table[name]["seeds"].append(accuracies(arm / "model", bench) | curve_ends(arm))

    for row in table.values():
        for split in ("validation", "test"):
            values = [seed[split] for seed in row["seeds"]]
            row[split], row[f"{split}_error"] = mean(values), error(values) if len(values) > 1 else None
        if "collapsed_at" in row["seeds"][0]:
            row["collapsed"] = sum(seed["collapsed_at"] is not None for seed in row["seeds"])
            row |= {name: mean([seed[name] for seed in row["seeds"]]) for name in row["seeds"][0] if "/" in name}

    def best(start: str) -> str:
        return max((name for name in table if name.startswith(start)), key=lambda name: table[name]["validation"])

    chosen = {start: best(start) for start in (*(f"redi alpha={a:g} " for a in bench.alphas), "dpo ", "simpo ")}
    print(f"\n{bench.problems} held-out problems, {bench.tries} answers each, mean over {len(bench.seeds)} seeds\n")
    print(f"{'':34}  test accuracy   collapsed   log p right     log p wrong")
    for name, row in table.items():
        line = f"{name:34}  {row['test']:4.1f} %"
        line += f" ± {row['test_error']:.1f}" if row["test_error"] is not None else " " * 6
        if "collapsed" in row:
            line += f"   {row['collapsed']} of {len(row['seeds'])}     "
            for name_of in ("logp/chosen", "logp/rejected"):
                line += f"{row[f'{name_of} start']:.2f} -> {row[f'{name_of} end']:.2f}   "
        print(line + ("   *" if name in chosen.values() else ""))
    print("\n* the best rate of each alpha, the best setting of dpo and of simpo on the validation problems")

    panels = [["logp/chosen"], ["logp/rejected"], ["logp/gap"], ["entropy/chosen"], ["eval/mean"], ["optim/grad_norm"]]
    first = out / f"seed{bench.seeds[0]}"
    for lr in bench.lrs:
        names = [f"redi alpha={a:g} lr={lr:g}" for a in bench.alphas]
        plot_curves({name: first / name.replace(" ", "-") for name in names}, panels, out / f"curves-lr{lr:g}.png")
    others = [chosen["dpo "], chosen["simpo "], best("redi ")]
    plot_curves({name: first / name.replace(" ", "-") for name in others}, panels, out / "curves-best.png")

    results = {
        "command": "python " + shlex.join(["benchmarks/redi.py", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, float32",
        "seconds": time.time() - started, "best": chosen, "arms": table,
    }  # fmt: skip
    for path in filter(None, (out / "results.json", bench.results)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{out}/results.json, {out}/curves-*.png ({results['seconds']:.0f} s)")
    return results


if __name__ == "__main__":
    main(tyro.cli(Benchmark, use_underscores=True))
