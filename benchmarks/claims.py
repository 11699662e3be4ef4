"""Each paper's mechanism where it must show, with a control that could refute it: one page of results, seven blocks.

    python benchmarks/claims.py                         every block, three to five seeds
    python benchmarks/claims.py luffy relift            two blocks
    python benchmarks/claims.py --quick                 every block at one seed, shorter runs, rates not chosen

A block is a file in benchmarks/blocks: its docstring holds the prediction, written before the first run. Every run
starts from models/tiny (0.68M parameters) or from scratch, and has one core. Complete runs are not repeated: the same
command resumes.

Measured: --tries answers at temperature 1 and one greedy answer to each of --problems test problems, the same for
all rows of a block. Learning rates are chosen on other problems (validation) at seed 0, for every row with a grid.
Operations are counted per weight and token: 6 for a trained model, 2 for one that is read, 2 for a sampled token.

Verdicts: a contrast between rows must be larger than its 95 % half-width over problems and over seeds (Student's t).
Over problems, it is averaged over the seeds for each problem first: rows and seeds share the problems. p is the larger
of both, corrected for the number of claims on the page (Holm). "hint" passes only without that correction.
"""

import importlib
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean as mean
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mpmath  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402

from benchmarks.blocks import Claim  # noqa: E402
from benchmarks.held_out import drawn, error  # noqa: E402
from common.metrics import line_style, read_metrics  # noqa: E402
from common.trainer import load_tokenizer  # noqa: E402
from eval import difficulty  # noqa: E402

BLOCKS = ("luffy", "shaping", "relift", "relift_long", "redi", "oreo", "bridge")
BUCKETS = ("easy", "medium", "hard", "hardest")
POINTS = ("sampled", "greedy", "searched", "pairs")  # measures in percent
SORT, TEST = 54321, 12345  # seeds of the answers that sort problems by difficulty, and of those that measure


@dataclass
class Flags:
    blocks: tyro.conf.Positional[tuple[str, ...]] = BLOCKS
    """Blocks to run."""
    quick: bool = False
    """One seed, short runs, half of the test problems and tries. Rates are not chosen: the middle of each grid."""
    seeds: tuple[int, ...] = ()
    """Seeds of every run; data and test problems stay the same. Without the flag: 0, 1, 2, or as the block needs."""
    problems: int = 300
    """Test problems; half as many validation problems."""
    tries: int = 8
    """Answers to each at temperature 1."""
    out: str = "runs/claims"
    """Folder for the runs."""
    results: str = "benchmarks/results"
    """Folder for claims-BLOCK.json and claims-BLOCK.png; those of --quick go to its folder quick."""
    document: str = "docs/results.md"
    """Page whose tables are made anew, from all results."""
    jobs: int = 0
    """Runs at once. 0: one per core."""


def p_value(value: float, se: float, n: int) -> float:
    """Two-sided p of a mean of n values with standard error `se`, by Student's t with n - 1 degrees of freedom.

    >>> round(p_value(4.303, 1.0, 3), 3), round(p_value(2.776, 1.0, 5), 3)
    (0.05, 0.05)
    """
    if not se:
        return float(value == 0)
    df = n - 1
    return float(mpmath.betainc(df / 2, 0.5, 0, df / (df + (value / se) ** 2), regularized=True))


def half_width(se: float, n: int) -> float:
    """Half the 95 % interval of a mean of n values: the quantile of Student's t (n = 3: 4.30, 5: 2.78) times `se`.

    >>> [round(half_width(1.0, n), 2) for n in (3, 5, 300)]
    [4.3, 2.78, 1.97]
    """
    return se * float(mpmath.findroot(lambda t: p_value(t, 1.0, n) - 0.05, (1, 20), solver="anderson"))


def contrast(values: list[list[float]] | list[float]) -> dict:
    """Mean, 95 % half-width and p (None: one seed) of a contrast; `values`: one per seed, or [seeds][problems]. Seeds
    share the problems: a problem's mean over seeds is one sample, so more seeds do not count as more problems.

    >>> contrast([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])["half_width"] > 5  # two problems, however many seeds
    True
    """
    by_problem = [mean(column) for column in zip(*values, strict=True)] if isinstance(values[0], list) else []
    by_seed = [mean(v) if isinstance(v, list) else v for v in values]
    samples = [sample for sample in (by_problem, by_seed) if len(sample) > 1]
    value, several = mean(by_seed), len(by_seed) > 1
    widths = [half_width(error(sample), len(sample)) for sample in samples]
    p = max(p_value(value, error(sample), len(sample)) for sample in samples) if several else None
    return {"by_seed": by_seed, "mean": value, "half_width": max(widths, default=None), "p": p}


def holm(ps: list[float]) -> list[float]:
    """p-values corrected for their number (Holm).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def verdict(claim: dict, adjusted: float | None) -> str:
    """Return the verdict on a claim that a contrast is positive: yes, no, hint, hint against, not shown, one seed."""
    if adjusted is None:
        return "one seed"
    if claim["p"] > 0.05:
        return "not shown"
    positive = claim["mean"] > 0
    if adjusted > 0.05:
        return "hint" if positive else "hint against"
    return "yes" if positive else "no"


def measure(model: str, data: str, kept: Path, verifier: str, max_tokens: int, problems: int, tries: tuple) -> dict:
    """Answers to the first problems of a file: {how: rewards and texts, [problems][tries]}; kept in a file.
    tries: pairs of "sampled" (temperature 1), "sort" (other such answers) or "greedy", and a number."""
    if not kept.exists():
        tokenizer, found = load_tokenizer(model), {}
        for how, n in tries:
            groups = drawn(
                model, data, problems, tries=n, temperature=float(how != "greedy"), max_tokens=max_tokens,
                seed=SORT if how == "sort" else TEST, verifier=verifier, progress=False,
            )  # fmt: skip
            found[how] = [[reward for _, _, reward in group] for group in groups]
            found[f"{how}_texts"] = [[tokenizer.decode(ids) for _, ids, _ in group] for group in groups]
        half = kept.with_suffix(".partial")
        half.write_text(json.dumps(found))
        half.rename(kept)
    return json.loads(kept.read_text())


class Block:
    """A block's runs: each is made once, after those that its command names. Threads wait; `slots` of them work."""

    def __init__(self, name: str, flags: Flags, slots: threading.Semaphore, workers: ProcessPoolExecutor):
        self.name, self.flags, self.slots, self.workers = name, flags, slots, workers
        self.module = importlib.import_module(f"benchmarks.blocks.{name}")
        self.out = Path(flags.out).absolute() / ("quick" if flags.quick else "full") / name
        self.futures: dict[tuple, Future] = {}
        self.rates: dict[str, dict] = {}  # row -> what validation found for each rate
        self.lock, self.pool, self.running, self.stopped = threading.Lock(), ThreadPoolExecutor(1000), set(), False

    def setting(self, name: str, default=None):
        return getattr(self.module, name, default)

    def once(self, function: Callable, *args) -> Future:
        """Run function(*args) in a thread, only once for all callers; return its future."""
        with self.lock:
            key = (function.__name__, *args)
            if key not in self.futures:
                self.futures[key] = self.pool.submit(function, *args)
            return self.futures[key]

    def fill(self, text: str, seed: int, **values) -> str:
        """A text whose {NAME}s are replaced, by values and by folders of other runs, which are made first. Folders are
        relative to the repository, so that the runs may move with it."""
        steps = self.setting("STEPS", (0, 0))[self.flags.quick]
        values |= {"seed": seed, "steps": steps, "half": steps // 2, "tiny": ROOT / "models/tiny"}

        def value(match) -> str:
            found = values[match[1]] if match[1] in values else self.folder(match[1], seed)
            return os.path.relpath(found, ROOT) if isinstance(found, Path) else str(found)

        return re.sub(r"\{([\w.]+)\}", value, text)

    def rate(self, name: str) -> float | None:
        """The learning rate of a row."""
        lrs = self.module.RUNS[name].lrs
        if not lrs or self.flags.quick:
            return sorted(lrs)[len(lrs) // 2] if lrs else None
        return self.once(self.choose, name).result()

    def choose(self, name: str) -> float:
        """The rate whose run at seed 0 answers most validation problems."""
        candidates = {lr: self.once(self.validate, name, lr) for lr in self.module.RUNS[name].lrs}
        self.rates[name] = {lr: future.result() for lr, future in candidates.items()}
        return max(self.rates[name], key=self.rates[name].get)

    def validate(self, name: str, lr: float) -> float:
        folder = self.once(self.make, name, 0, lr).result()
        found = self.answers(name, 0, folder, "VALID", self.flags.problems // 2, ("sampled", self.flags.tries))
        return 100 * mean(map(mean, found["sampled"]))

    def folder(self, name: str, seed: int) -> Path:
        """Make a run if it is not complete yet; return its folder."""
        seed = 0 if self.module.RUNS[name].once else seed
        return self.once(self.make, name, seed, self.rate(name)).result()

    def make(self, name: str, seed: int, lr: float | None) -> Path:
        run = self.module.RUNS[name]
        folder = self.out / ("once" if run.once else f"seed-{seed}") / (name + (f"@{lr:g}" if lr else ""))
        folder.mkdir(parents=True, exist_ok=True)
        command, complete = self.fill(run.command, seed, out=folder, lr=lr), folder / "complete.json"
        if complete.exists() and json.loads(complete.read_text())["command"] != command:
            raise SystemExit(f"{folder} was made by another command: remove it to make it again")
        if command and not complete.exists():
            with self.slots:
                started = time.time()
                self.call(command, folder / "log.txt")
            complete.write_text(json.dumps({"command": command, "seconds": time.time() - started}))
        return folder

    def call(self, command: str, log: Path) -> None:
        """Run a command of ours on one core; its output goes to `log`."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if self.stopped:
            raise SystemExit("interrupted")
        with open(log, "a") as file:
            process = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=ROOT, env=environment,
                                       stdout=file, stderr=subprocess.STDOUT)  # fmt: skip
            self.running.add(process)
            code = process.wait()
            self.running.discard(process)
        if code:
            last = "\n".join(log.read_text().replace("\r", "\n").splitlines()[-15:])
            raise SystemExit(f"python {command}\nended with {code}; {log} ends with\n{last}")

    def answers(self, name: str, seed: int, folder: Path, split: str, problems: int, *tries: tuple) -> dict:
        """What a run's model answers to the TEST or VALID problems; tries: as in `measure`."""
        return self.once(self.ask, name, seed, folder, split, problems, tries).result()

    def ask(self, name: str, seed: int, folder: Path, split: str, problems: int, tries: tuple) -> dict:
        run = self.module.RUNS[name]
        model = str(ROOT / self.fill(run.model, seed, out=folder))
        data = str(ROOT / self.fill((split == "TEST" and run.test) or self.setting(split), seed))
        words = "-".join([split.lower(), str(problems), *(f"{how}{n}" for how, n in tries)])
        with self.slots:
            return self.workers.submit(
                measure, model, data, folder / f"{words}.json", self.setting("VERIFIER", "boxed"),
                self.setting("MAX_TOKENS", 160), problems, tries,
            ).result()  # fmt: skip

    def row(self, name: str, seed: int) -> dict:
        """What is measured of a row at a seed: {measure: number, or a list with a number a problem}."""
        run, folder, found, answered = self.module.RUNS[name], self.folder(name, seed), {}, {}
        seed = 0 if run.once else seed
        if run.model:
            tries = ("sampled", self.flags.tries), ("greedy", 1)
            answered = self.answers(name, seed, folder, "TEST", self.flags.problems, *tries)
            found = {how: [100 * mean(rewards) for rewards in answered[how]] for how, _ in tries}
            metrics = (ROOT / self.fill(run.model, seed, out=folder)).parent
            found |= cost(metrics, run.trained) if run.command and (metrics / "metrics.jsonl").exists() else {}
        if besides := self.setting("besides"):
            found |= besides(name, seed, answered, lambda other: self.folder(other, seed))
        print(f"{self.name}: {name}, seed {seed}", *(f"{mean(found[how]):.1f}" for how in ("sampled", "greedy")
              if how in found), flush=True)  # fmt: skip
        return found

    def buckets(self) -> list[str]:
        """The difficulty of each test problem, by answers of the row START that measure nothing."""
        name = self.setting("START", "base")
        if name not in self.module.RUNS:
            return []
        folder = self.folder(name, 0)
        found = self.answers(name, 0, folder, "TEST", self.flags.problems, ("sort", 8))
        return [difficulty(mean(rewards)) for rewards in found["sort"]]

    def run(self) -> dict:
        """Make and measure everything; -> the results of the block."""
        flags = self.flags
        seeds = flags.seeds or tuple(range(1 if flags.quick else self.setting("SEEDS", 3)))
        rows = [name for name, run in self.module.RUNS.items() if run.row]
        waiting = {(name, seed): self.once(self.row, name, seed) for seed in seeds for name in rows}
        buckets = self.once(self.buckets)
        found = {name: {seed: waiting[name, seed].result() for seed in seeds} for name in rows}
        made = [future.result() for (what, *_), future in self.futures.items() if what == "make"]
        if across := self.setting("across"):
            found["all"] = {seed: across({name: found[name][seed] for name in rows}) for seed in seeds}
        return {
            "command": " ".join(["python", "benchmarks/claims.py", *sys.argv[1:]]),
            "commit": commit(), "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
            "seeds": list(seeds), "problems": flags.problems, "tries": flags.tries,
            "buckets": {name: buckets.result().count(name) for name in BUCKETS},
            "rates": {name: {"chosen": self.rate(name), "validation": self.rates.get(name)}
                      for name in rows if self.module.RUNS[name].lrs},
            "rows": {name: {seed: short(measured, buckets.result()) for seed, measured in by_seed.items()}
                     for name, by_seed in found.items()},
            "claims": {claim.text: check(claim, found, buckets.result()) for claim in self.module.CLAIMS},
            "curves": {title: {name: [curve(self.folder(name, seed), metric) for seed in seeds] for name in rows}
                       for title, metric in self.setting("CURVES", {}).items()},
            "columns": self.setting("COLUMNS", {}),
            "core_seconds": sum(map(core_seconds, made)),
        }  # fmt: skip


def core_seconds(folder: Path) -> float:
    """How long a run took on its core; 0 for a row that only measures a model."""
    complete = folder / "complete.json"
    return json.loads(complete.read_text())["seconds"] if complete.exists() else 0.0


def commit() -> str:
    """Return the commit of this repository; "" if it is not a clone."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def curve(folder: Path, metric: str | Callable) -> list[tuple[float, float]]:
    """A metric of a run, or what a function makes of its folder: (step, value), at most 20 means of adjacent steps."""
    if not (folder / "metrics.jsonl").exists():
        return []
    values = metric(folder) if callable(metric) else [row.get(metric) for row in read_metrics(folder)]
    values = [value for value in values if value is not None]  # steps that logged it
    starts = range(0, len(values), width := max(1, -(-len(values) // 20)))
    return [(min(start + width, len(values)), mean(values[start : start + width])) for start in starts]


def cost(folder: Path, per_token: float) -> dict[str, float]:
    """Return the costs of this run alone, from its metrics: updates, sampled tokens, demonstrations, operations."""
    rows, args = [r for r in read_metrics(folder) if r["step"]], json.loads((folder / "args.json").read_text())
    config = json.loads((folder / "model" / "config.json").read_text())
    h, f = config["hidden_size"], config["intermediate_size"]
    weights = config["num_hidden_layers"] * (4 * h * h + 3 * h * f) + h * config["vocab_size"]
    tokens = sum(r["speed/tokens_per_second"] * r["seconds/step"] for r in rows)
    teachers = args.get("teacher_rows", 0)
    answers = args["batch_size"] * (args.get("group_size", 0) - teachers)  # a step
    sampled = sum(r.get("length/own") or 0.0 for r in rows) * answers
    if args.get("rows"):  # oreo.py: graded answers of the start
        sampled = sum(len(json.loads(line)["response_ids"]) for line in (ROOT / args["rows"]).read_text().splitlines())
    taught = len(rows) * args["batch_size"] * teachers
    return {
        "updates": len(rows) * args.get("updates_per_step", 1) + sum(r.get("sft/fired") or 0 for r in rows),
        "sampled_tokens": sampled, "demonstrations": rows[-1].get("sft/demonstrations", taught),
        "operations": weights * (per_token * tokens + 2 * sampled),
        "seconds_a_step": median(r["seconds/step"] for r in rows),
        "peak_gb": max(r["memory/peak_gb"] for r in rows),
    }  # fmt: skip


def short(measured: dict, buckets: list[str]) -> dict[str, float]:
    """Return the means of a row's measures; those of sampled answers also by difficulty."""
    means = {name: mean(v) if isinstance(v, list) else v for name, v in measured.items()}
    for bucket in set(buckets) if "sampled" in measured else ():
        means[bucket] = mean(v for v, b in zip(measured["sampled"], buckets, strict=True) if b == bucket)
    return means


def check(claim: Claim, found: dict, buckets: list[str]) -> dict:
    """A claim's contrast, from {row: {seed: measured}}."""
    def weighted(measured) -> float:
        return sum(w * m for w, m in zip(claim.rows.values(), measured, strict=True)) - claim.less

    values = []
    for seed in next(iter(found.values())):
        measured = [found[name][seed][claim.of] for name in claim.rows]
        if isinstance(measured[0], list):  # one number per problem
            by_problem = map(weighted, zip(*measured, strict=True))
            values.append([v for i, v in enumerate(by_problem) if not claim.among or buckets[i] == claim.among])
        else:
            values.append(weighted(measured))
    return contrast(values) | {"of": claim.of, "among": claim.among}


def cell(values: list[float], digits: int = 1) -> str:
    """Mean, and with several seeds its standard error; two digits more for a small mean."""
    digits += 2 * (digits > 1 and 0 < abs(mean(values)) < 0.05)
    return f"{mean(values):,.{digits}f}" + (f" ± {error(values):.{digits}f}" if len(values) > 1 else "")


def block_table(results: dict) -> str:
    """Markdown: a line for each row; costs are medians over the seeds."""
    sizes = {name: n for name, n in results["buckets"].items() if n}
    columns = {"sampled, %": "sampled", "greedy, %": "greedy"} | {f"{b} ({n}), %": b for b, n in sizes.items()}
    columns |= results["columns"]
    costs = {"updates": ",.0f", "sampled_tokens": ",.0f", "demonstrations": ",.0f", "operations": ".1e"}
    titles = [name.replace("_", " ").replace("operations", "FLOPs") for name in costs]  # a problem has operations too
    lines = ["| | lr | " + " | ".join([*columns, *titles]) + " |"]
    lines.append("| --- " * (2 + len(columns) + len(costs)) + "|")
    for name, row in results["rows"].items():
        rate, seeds = results["rates"].get(name), list(row.values())
        if all(seed == seeds[0] for seed in seeds):  # one model for all seeds
            seeds = seeds[:1]
        cells = [name, f"{rate['chosen']:g}" if rate else ""]
        for title, key in columns.items():
            values = [seed[key] for seed in seeds if key in seed]
            cells.append(cell(values, 1 if "%" in title else 2) if values else "")
        for key, form in costs.items():
            values = [seed[key] for seed in seeds if key in seed]
            cells.append(format(median(values), form) if values else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claims_table(blocks: dict[str, dict]) -> str:
    """Markdown: every claim of the page and its verdict; sets them in `blocks` too."""
    claims = [(block, text, claim) for block, results in blocks.items() for text, claim in results["claims"].items()]
    tested = [claim for _, _, claim in claims if claim["p"] is not None]
    for claim, adjusted in zip(tested, holm([claim["p"] for claim in tested]), strict=True):
        claim["p_adjusted"] = adjusted
    lines = ["| block | claim | found | p | p (Holm) | |", "| --- " * 6 + "|"]
    for block, text, claim in claims:
        claim["verdict"] = verdict(claim, claim.get("p_adjusted"))
        width = "" if claim["half_width"] is None else f" ± {claim['half_width']:.2g}"
        ps = [f"{claim[key]:.2g}" if claim.get(key) is not None else "" for key in ("p", "p_adjusted")]
        lines.append(f"| {block} | {text} | {claim['mean']:.3g}{width} | {ps[0]} | {ps[1]} | {claim['verdict']} |")
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Correct answers of each row (a point is a seed), the claims with their 95 % intervals (those that are not in
    points apart), and the block's curves (thin: a seed; thick: the mean)."""
    from matplotlib.figure import Figure

    units: dict[str, list] = {}  # claims of a panel
    for text, claim in sorted(results["claims"].items(), key=lambda item: item[1]["of"] not in POINTS):
        unit = "difference in points" if claim["of"] in POINTS else "in the unit of the claim"
        units.setdefault(unit, []).append((text, claim))
    rows = {name: row for name, row in results["rows"].items() if any("sampled" in seed for seed in row.values())}
    panels = 1 + len(units) + len(results["curves"])
    # two panels to a line: a page is not wide
    heights = [max(3.2, 0.36 * max(len(rows), len(results["claims"])) + 1), *[3.2] * (math.ceil(panels / 2) - 1)]
    figure = Figure(figsize=(10.5, sum(heights)), layout="constrained")
    axes, unused = np.split(figure.subplots(len(heights), 2, height_ratios=heights).flatten(), [panels])
    for axis in unused:
        axis.remove()
    for i, row in enumerate(rows.values()):
        for how, offset, color in (("sampled", -0.2, "C0"), ("greedy", 0.2, "C1")):
            values = [seed[how] for seed in row.values()]
            axes[0].barh(i + offset, mean(values), 0.4, color=color, label=how if not i else None)
            axes[0].plot(values, [i + offset] * len(values), "k.", ms=3)
    axes[0].set_yticks(range(len(rows)), rows, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("correct answers, %")
    axes[0].legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    for axis, (unit, claims) in zip(axes[1:], units.items(), strict=False):
        for i, (_, claim) in enumerate(claims):
            axis.errorbar(claim["mean"], i, xerr=claim["half_width"], fmt="o", color="C0", capsize=3)
        axis.set_yticks(range(len(claims)), [textwrap.fill(text, 40) for text, _ in claims], fontsize=7)
        axis.set_ylim(len(claims) - 0.5, -0.5)
        axis.axvline(0, color="0.5", lw=1)
        axis.set_xlabel(f"{unit}, 95 %")
    for axis, (title, runs) in zip(axes[1 + len(units) :], results["curves"].items(), strict=True):
        logged = {name: [line for line in lines if line] for name, lines in runs.items() if any(lines)}
        for i, (name, lines) in enumerate(logged.items()):
            for line in lines:
                axis.plot(*zip(*line, strict=True), color=f"C{i % 10}", lw=0.7, alpha=0.3)
            steps, values = np.mean([*zip(*lines, strict=False)], axis=1).T  # to the end of the shortest
            axis.plot(steps, values, **line_style(i), lw=2, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step, of those that logged it")
        axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.16), frameon=False)
    figure.savefig(path, dpi=100)


def load(folder: Path) -> dict[str, dict]:
    """The results of every block that has some in a folder of results: full ones, or else quick ones."""
    blocks = {}
    for name in BLOCKS:
        for file in (folder / f"claims-{name}.json", folder / "quick" / f"claims-{name}.json"):
            if file.exists() and name not in blocks:
                blocks[name] = json.loads(file.read_text()) | {"picture": file.with_suffix(".png")}
    return blocks


def page(folder: Path, document: Path) -> str:
    """Replace what stands between <!-- NAME --> and <!-- end --> in a document: the table and picture of block NAME
    from a folder of results, or the table of all claims. Return the new parts."""
    blocks = load(folder)
    parts = {"claims": claims_table(blocks)}
    for name, found in blocks.items():
        picture = os.path.relpath(found["picture"], document.parent)
        about = (f"{'Quick run: s' if 'quick' in picture else 'S'}eeds {', '.join(map(str, found['seeds']))}; "
                 f"{found['problems']} test problems, {found['tries']} answers each; commit {found['commit']}; "
                 f"{found['machine']}; {found['core_seconds'] / 60:.0f} minutes of one core to train.")  # fmt: skip
        about = textwrap.fill(about, 100, break_on_hyphens=False)
        parts[name] = f"{about}\n\n{block_table(found)}\n\n![Rows, claims and curves of {name}]({picture})"
    text = document.read_text()
    for name, part in parts.items():
        text = re.sub(f"(?s)(<!-- {name} -->\n).*?(\n<!-- end -->)", lambda m, p=part: m[1] + p + m[2], text)
    document.write_text(text)
    return "\n\n".join(parts.values())


def main(flags: Flags) -> None:
    if unknown := set(flags.blocks) - set(BLOCKS):
        raise SystemExit(f"{', '.join(sorted(unknown))}: no such block; choose from {', '.join(BLOCKS)}")
    if flags.quick:
        flags.problems, flags.tries = flags.problems // 2, flags.tries // 2
    jobs = flags.jobs or len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers that measure
    folder = Path(flags.results) / ("quick" if flags.quick else "")
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ProcessPoolExecutor(jobs, get_context("spawn")) as workers:
        slots = threading.Semaphore(jobs)
        blocks = [Block(name, flags, slots, workers) for name in flags.blocks]
        try:
            for block in blocks:
                started = time.time()
                results = json.loads(json.dumps(block.run()))
                path = folder / f"claims-{block.name}.json"
                text = json.dumps(results, indent=1)
                path.write_text(re.sub(r"\[[^][{}]*\]", lambda m: " ".join(m[0].split()), text) + "\n")  # short lists
                plot(results, path.with_suffix(".png"))
                print(f"{path}: {time.time() - started:.0f} s", flush=True)
        finally:  # an interruption ends the runs too
            for block in blocks:
                block.stopped = True
                block.pool.shutdown(wait=False, cancel_futures=True)
                for process in list(block.running):
                    process.terminate()
    print(f"\n{page(Path(flags.results), Path(flags.document))}")


if __name__ == "__main__":
    main(tyro.cli(Flags, use_underscores=True))
