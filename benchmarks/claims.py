"""The five papers side by side: one base model, one set of problems, one set of traces, one table.

    python benchmarks/claims.py --quick                 every row at one seed, short runs
    python benchmarks/claims.py                         three seeds, the runs of `--preset tiny`
    python benchmarks/claims.py --only luffy grpo --seeds 0

Problems: symbolic iGSM of 5 to 8 operations; tests on other templates of 5 to 8 operations and of 9 to 10 (out of
distribution). Base: models/tiny, which could work a problem out and guesses. Traces: the generator's step-by-step
solutions. Every online method has the same questions, steps, updates a step and answers a question; every offline
method starts from one SFT model and its own graded answers, with the same rows a step and steps. What each cost is in
the table: optimizer updates, sampled tokens, demonstrations read, and operations (6 P a token trained, 2 P a token
sampled), of a row's own run, not of what it starts from.
Learning rates are 2e-4 from the base, which has to take up another way of answering, and 5e-5 where RL starts from a
fine-tuned model: 60 steps of GRPO at 5e-5 took SFT's sampled answers from 43 to 52 %, at 2e-4 they became worse.

    base, sft, grpo, sft_grpo, rl_sft, luffy, luffy_unshaped, relift           online (sft: the same traces, no answers)
    rejection, kto, dpo, oreo_token, oreo_step, oreo_response, oreo_beam       offline, from graded answers
    redi, symmetric, simpo; redi_fast, symmetric_fast at ten times the rate    offline, from right and wrong traces
    redi_alpha0                                                                the right traces of redi alone
    vanilla_sft, vanilla_rl, bridge_sft, bridge_rl                             BRIDGE: what SFT data does to RL
    bridge_luffy, bridge_relift                                                behaviours first, then a teacher

A model is measured by --tries answers at temperature 1 to each test problem. Each paper's claims are checked by name:
"yes" or "no" where the difference is over twice its standard error (the larger of that over seeds and that over
problems), else "not significant". What is complete is not done again: give the same command to go on.
"""

import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import tyro  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.held_out import (  # noqa: E402
    answers,
    error,
    mean,
    roc_area,
    save,
    search_command,
    searched,
    valued,
)
from common.metrics import read_metrics  # noqa: E402

TESTS = {"id": "igsm:5-8", "ood": "igsm:9-10"}
ONLINE, OFFLINE, BRIDGE = "online", "offline", "bridge"


@dataclass(frozen=True)
class Run:
    """How a row of the table comes about: a command, and the row whose model it starts from."""

    kind: str
    command: str
    start: str = "base"


RUNS = {
    "sft": Run(ONLINE, "luffy.py --method sft --schedule constant --warmup 0 --lr 2e-4 --batch_size 16"),
    "grpo": Run(ONLINE, "luffy.py --method grpo"),
    "sft_grpo": Run(ONLINE, "luffy.py --method grpo --lr 5e-5", "sft"),
    "rl_sft": Run(ONLINE, "luffy.py --method rl_sft"),
    "luffy": Run(ONLINE, "luffy.py"),
    "luffy_unshaped": Run(ONLINE, "luffy.py --shaping_gamma 0"),
    "relift": Run(ONLINE, "relift.py"),
    "rejection": Run(OFFLINE, "oreo.py --stage rejection", "sft"),
    "kto": Run(OFFLINE, "oreo.py --stage kto", "sft"),
    "dpo": Run(OFFLINE, "oreo.py --stage dpo", "sft"),
    "oreo_token": Run(OFFLINE, "oreo.py --stage oreo", "sft"),
    "oreo_step": Run(OFFLINE, "oreo.py --stage oreo --variant step", "sft"),
    "oreo_response": Run(OFFLINE, "oreo.py --stage oreo --variant response", "sft"),
    "redi": Run(OFFLINE, "redi.py --loss redi", "sft"),
    "redi_alpha0": Run(OFFLINE, "redi.py --loss redi --alpha 0", "sft"),
    "symmetric": Run(OFFLINE, "redi.py --loss symmetric --lr 1e-5", "sft"),
    "simpo": Run(OFFLINE, "redi.py --loss simpo --lr 1e-5", "sft"),
    "redi_fast": Run(OFFLINE, "redi.py --loss redi --lr 1e-4", "sft"),
    "symmetric_fast": Run(OFFLINE, "redi.py --loss symmetric --lr 1e-4", "sft"),
    "vanilla_sft": Run(BRIDGE, "behavior_injection.py --stage sft --arms vanilla"),
    "vanilla_rl": Run(BRIDGE, "behavior_injection.py --stage rl --arms vanilla", "vanilla_sft"),
    "bridge_sft": Run(BRIDGE, "behavior_injection.py --stage sft --arms bridge"),
    "bridge_rl": Run(BRIDGE, "behavior_injection.py --stage rl --arms bridge", "bridge_sft"),
    "bridge_luffy": Run(ONLINE, "luffy.py --lr 5e-5 --max_response_tokens 240", "bridge_sft"),
    "bridge_relift": Run(ONLINE, "relift.py --lr 5e-5 --max_response_tokens 240", "bridge_sft"),
}
ROWS = ["base", *RUNS]
ROWS.insert(ROWS.index("oreo_response") + 1, "oreo_beam")


@dataclass
class Claims:
    quick: bool = False
    """One seed, a third of the steps, half of the test problems and answers."""
    out: str = "runs/claims"
    """Folder for the runs."""
    results: str = "benchmarks/results/claims"
    """Where the numbers (.json), the tables (.md), the rows' figure (.png) and the claims' (-checked.png) go."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every run; problems, traces and tests stay the same."""
    only: tuple[str, ...] = tuple(ROWS)
    """Rows of the table; what they start from is made too."""
    problems: int = 300
    """Test problems of each kind."""
    tries: int = 4
    """Answers to each."""
    steps: int = 60
    """Steps of every online and offline run."""
    jobs: int = 0
    """Runs made at once, with an equal share of the cores each; what they print goes to log-ROW.txt in --out. 0: one a
    core (a tiny model does not use two), 1 on CUDA."""
    extra: str = ""
    """More flags for every run."""


# -------------------------------------------------------------------------------------------------- training


RUNNING: set[subprocess.Popen] = set()
LOCKS: dict[Path, threading.RLock] = defaultdict(threading.RLock)  # what two rows need is made by one of them


def call(command: list, log: Path, claims: Claims) -> None:
    """Run a script of ours; its output goes to `log` where several run at once."""
    command = [sys.executable, *map(str, command)]
    shown = " ".join(["python", *command[1:]])
    threads = max(1, len(os.sched_getaffinity(0)) // claims.jobs)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") if claims.jobs > 1 else nullcontext(sys.stdout) as file:
        print("$", shown, file=file, flush=True)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        RUNNING.add(process)
        code = process.wait()
        RUNNING.discard(process)
    if code and claims.jobs > 1:
        last = "\n".join(log.read_text().replace("\r", "\n").splitlines()[-15:])
        raise SystemExit(f"{shown}\nended with {code}; {log} ends with\n{last}")
    if code:
        raise SystemExit(f"{shown}\nended with {code}")


def model_of(name: str, seed: int, claims: Claims) -> Path:
    """The folder of a row's model."""
    if name == "base":
        return ROOT / "models" / "tiny"
    if RUNS[name].kind == BRIDGE:
        arm, stage = name.split("_")
        return Path(claims.out).absolute() / f"seed-{seed}" / "behaviors" / arm / stage / "model"
    return Path(claims.out).absolute() / f"seed-{seed}" / name / "model"


def train(name: str, seed: int, claims: Claims) -> Path:
    """Make a row's model, and before it what it starts from; -> its folder."""
    model = model_of(name, seed, claims)
    with LOCKS[model]:
        if name != "base" and not model.exists():
            make(name, seed, claims)
    return model


def make(name: str, seed: int, claims: Claims) -> None:
    """Train a row's model by its command, after what it starts from and the data that it shares with other rows."""
    run, folder = RUNS[name], Path(claims.out).absolute() / f"seed-{seed}"
    start, log = train(run.start, seed, claims), folder / f"log-{name}.txt"
    words = [*run.command.split(), "--preset", "tiny", "--seed", seed, "--eval_every", claims.steps]
    if run.kind == BRIDGE:
        behaviors = folder / "behaviors"
        shared = ["--out", behaviors, "--model", model_of("base", seed, claims), "--base_problems", 0]
        sizes = ["--sft_steps", max(2, claims.steps * 5 // 4), "--sft_problems", 2000, "--eval_problems", 20]
        with LOCKS[behaviors]:
            if not (behaviors / "data").exists():
                data = ["--stage", "data", "--arms", "vanilla", "bridge", *shared, *sizes]
                call([*words[:1], "--preset", "tiny", *data], log, claims)
        words += [*shared, *sizes, "--steps", claims.steps]
    else:
        words += ["--model", start, "--out", folder / name]
        words += ["--steps", claims.steps] if run.kind == ONLINE else offline(words[0], start, seed, claims)
    call([*words, *shlex.split(claims.extra)], log, claims)
    if name in ("vanilla_sft", "bridge_sft"):
        words += ["--influence_queries", 200 if claims.steps >= 60 else 60]
        with LOCKS[behaviors / "influence"]:  # the first makes the queries for both
            call(["-m", "tools.influence", *words[1:]], log, claims)


def offline(script: str, start: Path, seed: int, claims: Claims) -> list:
    """Flags for a run on the start model's own graded answers, which are drawn once for all that learn from them."""
    folder = Path(claims.out).absolute() / f"seed-{seed}"
    if script == "oreo.py":
        drawn, flags = folder / "answers" / "rows.jsonl", ["--stage", "collect"]
    else:
        drawn, flags = folder / "pairs" / "pairs.jsonl", ["--igsm_problems", 2000]
    maker = [script] if script == "oreo.py" else ["-m", "tools.redi_data"]
    with LOCKS[drawn]:
        if not drawn.exists():
            flags += ["--preset", "tiny", "--model", start, "--out", drawn.parent, "--seed", seed]
            call([*maker, *flags], folder / f"log-{drawn.parent.name}.txt", claims)
    if script == "oreo.py":
        return ["--rows", drawn, "--steps", claims.steps]
    return ["--data", drawn, "--steps", claims.steps]


# ------------------------------------------------------------------------------------------------- measuring


def measure(model: Path, claims: Claims, name: str) -> dict[str, list[float]]:
    """Share of right answers to every test problem, by test; kept beside the model."""
    kept = model.parent / f"measured-{claims.problems}x{claims.tries}.json"
    if name == "base":
        kept = Path(claims.out) / kept.name
    if kept.exists():
        return json.loads(kept.read_text())
    rates = {}
    for test, source in TESTS.items():
        groups = answers(
            str(model), source, claims.problems, tries=claims.tries, max_tokens=240, name=name,
            progress=claims.jobs == 1,
        )  # fmt: skip
        rates[test] = [mean([reward for reward, _ in group]) for group in groups]
        rates[f"{test}_length"] = [mean([tokens for _, tokens in group]) for group in groups]
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(rates) + "\n")
    return rates


def beam(seed: int, claims: Claims) -> dict[str, list[float]]:
    """oreo_token's model by beam search of width 5 with its value, a verdict a problem."""
    start, rates = model_of("oreo_token", seed, claims).parent, {}
    for test, source in TESTS.items():
        out = start / f"beam-{test}-{claims.problems}"
        if not (out / "results.json").exists():
            words = search_command(start / "model", start / "value", source, claims.problems, kind="beam", width=5,
                                   out=out, seed=seed)  # fmt: skip
            call(words, start.parent / "log-oreo_beam.txt", claims)
        rates[test] = searched(out)
    return rates


def judged(model: Path, claims: Claims) -> dict[str, float]:
    """How well the value beside an OREO model tells right answers of it from wrong ones: the area under the ROC curve
    over all answers, and over those to one problem (its mean and error); kept beside the model."""
    kept = model.parent / f"judged-{claims.problems}.json"
    if not kept.exists():
        groups = valued(str(model), str(model.parent / "value"), TESTS["id"], claims.problems, max_tokens=240,
                        name="V", progress=claims.jobs == 1)  # fmt: skip
        within = [area for area in map(roc_area, groups) if not math.isnan(area)] or [0.5]
        found = {"roc_all": roc_area([pair for group in groups for pair in group]),
                 "roc_within": mean(within), "roc_within_se": error(within)}  # fmt: skip
        kept.write_text(json.dumps(found) + "\n")
    return json.loads(kept.read_text())


def cost(name: str, seed: int, claims: Claims) -> dict[str, float]:
    """What a run did, from its metrics: updates, sampled tokens, demonstrations, operations, seconds (of a step: the
    median), peak memory; of this run alone."""
    if name not in RUNS:
        return {}
    folder = model_of(name, seed, claims).parent
    rows, args = [r for r in read_metrics(folder) if r["step"]], json.loads((folder / "args.json").read_text())
    config = json.loads((folder / "model" / "config.json").read_text())
    h, f, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    weights = config["num_hidden_layers"] * (4 * h * h + 3 * h * f) + h * vocabulary
    trained = sum(r["speed/tokens_per_second"] * r["seconds/step"] for r in rows)
    answers = 0
    if RUNS[name].kind == ONLINE and name != "sft" or name.endswith("_rl"):
        answers = args["batch_size"] * (args["group_size"] - args.get("teacher_rows", 0))
    sampled = sum(r.get("length/own", 0.0) * answers for r in rows)
    drawn = Path(claims.out).absolute() / f"seed-{seed}"
    if "rows" in args:  # oreo.py: learnt from these
        lines = (drawn / "answers" / "rows.jsonl").read_text().splitlines()
        sampled = sum(len(json.loads(line)["response_ids"]) for line in lines)
    elif "alpha" in args:  # redi.py
        sampled = json.loads((drawn / "pairs" / "own_answers.json").read_text())["tokens"]
    taught = len(rows) * args["batch_size"]  # a trace of every question of every step
    demonstrations = {"sft": taught, "rl_sft": taught, "luffy": taught, "luffy_unshaped": taught,
                      "bridge_luffy": taught, "vanilla_sft": taught, "bridge_sft": taught}.get(name, 0)  # fmt: skip
    if "alpha" in args:  # redi.py: the right trace of every pair
        demonstrations = taught
    if "relift" in name:
        demonstrations = rows[-1]["sft/demonstrations"]
    extra = {}
    if (measured := folder.parent / "influence" / "influence.json").exists() and name.endswith("_sft"):
        extra["influence_seconds"] = json.loads(measured.read_text())["seconds/step"]
    if name == "oreo_token":
        extra |= judged(model_of(name, seed, claims), claims)
    acts = {act: median(r.get(f"seconds/{act}", 0.0) for r in rows) for act in ("step", "sample", "update")}
    return {"updates": len(rows) * args.get("updates_per_step", 1), "sampled_tokens": round(sampled),
            "demonstrations": round(demonstrations), "operations": weights * (6 * trained + 2 * sampled),
            "seconds": sum(r["seconds/step"] for r in rows), "seconds_a_step": acts,
            "peak_gb": max(r["memory/peak_gb"] for r in rows)} | extra  # fmt: skip


# ---------------------------------------------------------------------------------------------------- claims


def verdict(values: list[float], errors: list[float]) -> dict:
    """Of the claim that these are positive, a value a seed, each with its own error over problems (NaN: none).

    The standard error is the larger of that over seeds and that over problems: a few seeds can agree by chance."""
    known = [e for e in (error(values), math.hypot(*errors) / len(errors)) if not math.isnan(e)]
    se = max(known, default=math.nan)
    if math.isnan(se) or abs(mean(values)) < 2 * se or not mean(values):
        word = "not significant"
    else:
        word = "yes" if mean(values) > 0 else "no"
    return {"by_seed": values, "mean": mean(values), "se": None if math.isnan(se) else se, "verdict": word}


def paired(a: list[float], b: list[float], among: list[int] | None = None) -> tuple[float, float]:
    """Mean difference in percent over the same problems, and its standard error over them."""
    chosen = range(len(a)) if among is None else among
    if not chosen:
        return 0.0, math.nan
    gaps = [100 * (a[i] - b[i]) for i in chosen]
    return mean(gaps), error(gaps)


def never_solved(base: dict[str, list[float]]) -> list[int]:
    """Problems of the test in distribution that the base got wrong every time."""
    return [i for i, rate in enumerate(base["id"]) if rate == 0]


def curve(name: str, seed: int, metric: str, claims: Claims) -> list[float]:
    """A metric of a row's run, a value for each step that logged it; of the steps alone, not of the start."""
    rows = read_metrics(model_of(name, seed, claims).parent)
    return [r[metric] for r in rows if r["step"] and r.get(metric) is not None]


def influence(name: str, seed: int, claims: Claims) -> list[float]:
    """Per-step influence dJ of each query on the SFT model of a BRIDGE row."""
    lines = (model_of(name, seed, claims).parent.parent / "influence" / "queries.jsonl").read_text().splitlines()
    return [json.loads(line)["dJ"] for line in lines]


def check(found: dict, claims: Claims) -> dict[str, dict]:
    """Every claim whose rows are there: {what is claimed: by seed, mean, standard error, verdict, and what its panel of
    the figure shows: a metric of some rows}."""
    seeds, checked = claims.seeds, {}

    def have(*names):
        return all(name in claims.only for name in names)

    def claim(text: str, rows: tuple[str, ...], metric: str, pairs) -> None:
        values, errors = zip(*pairs, strict=True)
        checked[text] = verdict(list(values), list(errors)) | {"rows": rows, "metric": metric}

    def gap(a: str, b: str, test: str = "id", never: bool = False):
        def one(seed):
            among = never_solved(found["base"][seeds[0]]) if never else None
            return paired(found[a][seed][test], found[b][seed][test], among)

        return [one(seed) for seed in seeds]

    for a in ("luffy", "relift"):
        if have(a, "grpo", "base"):
            three = ("base", "grpo", a)
            claim(f"{a} over grpo where the base never succeeds (points)", three, "never", gap(a, "grpo", never=True))
            claim(f"{a} over grpo, out of distribution (points)", three, "ood", gap(a, "grpo", "ood"))
    for a, b in (("luffy", "sft_grpo"), ("luffy", "rl_sft"), ("luffy", "luffy_unshaped"), ("relift", "luffy"),
                 ("redi", "sft"), ("redi", "redi_alpha0"), ("redi", "symmetric"), ("redi_fast", "symmetric_fast"),
                 ("redi", "dpo"),
                 ("oreo_token", "rejection"), ("oreo_token", "dpo"), ("oreo_token", "kto"), ("oreo_beam", "oreo_token"),
                 ("bridge_rl", "vanilla_rl"), ("bridge_luffy", "luffy"), ("bridge_relift", "relift")):  # fmt: skip
        if have(a, b):
            claim(f"{a} over {b} (points)", (b, a), "id", gap(a, b))
    if have("oreo_token"):
        known = [judged(model_of("oreo_token", s, claims), claims) for s in seeds]
        claim("OREO's value tells right answers from wrong ones (area under the ROC curve, less 0.5)", ("oreo_token",),
              "roc_all", [(k["roc_all"] - 0.5, math.nan) for k in known])  # fmt: skip
        claim("OREO's value tells right from wrong answers to one problem (the same)", ("oreo_token",),
              "roc_within", [(k["roc_within"] - 0.5, k["roc_within_se"]) for k in known])  # fmt: skip
    if have("vanilla_sft", "bridge_sft"):
        def influences(seed):
            pair = [influence(arm, seed, claims) for arm in ("bridge_sft", "vanilla_sft")]
            return mean(pair[0]) - mean(pair[1]), math.hypot(*map(error, pair))

        claim("BRIDGE's per-step influence dJ is larger than vanilla's before RL", ("vanilla_sft", "bridge_sft"), "dJ",
              [influences(s) for s in seeds])  # fmt: skip
    if have("bridge_rl", "bridge_sft", "vanilla_rl", "vanilla_sft"):
        gains = zip(gap("bridge_rl", "bridge_sft"), gap("vanilla_rl", "vanilla_sft"), strict=True)
        claim("BRIDGE gains more from RL than vanilla (points)",
              ("vanilla_sft", "vanilla_rl", "bridge_sft", "bridge_rl"), "id",
              [(a - b, math.hypot(s, t)) for (a, s), (b, t) in gains])  # fmt: skip

    def tail(name, seed, metric):
        return mean(curve(name, seed, metric, claims)[-5:])

    if have("luffy", "luffy_unshaped"):
        claim("shaping keeps entropy up (nats, last five steps)", ("luffy", "luffy_unshaped"), "policy/entropy",
              [(tail("luffy", s, "policy/entropy") - tail("luffy_unshaped", s, "policy/entropy"), math.nan)
               for s in seeds])  # fmt: skip
    if have("redi_fast", "symmetric_fast"):
        claim("at ten times the rate redi keeps the log-prob of right traces above symmetric's (nats a token)",
              ("redi_fast", "symmetric_fast"), "logp/chosen",
              [(tail("redi_fast", s, "logp/chosen") - tail("symmetric_fast", s, "logp/chosen"), math.nan)
               for s in seeds])  # fmt: skip
    if have("grpo"):
        claim("all of grpo's answers to a question fail, and have no advantage (share of questions, first five steps)",
              ("grpo",), "group/solve_none",
              [(mean(curve("grpo", s, "group/solve_none", claims)[:5]), math.nan) for s in seeds])
    if have("luffy", "rl_sft"):
        claim("rl_sft takes the traces' length sooner than luffy (tokens, first half)",
              ("luffy", "rl_sft"), "length/own",
              [(mean(curve("rl_sft", s, "length/own", claims)[: claims.steps // 2])
                - mean(curve("luffy", s, "length/own", claims)[: claims.steps // 2]), math.nan) for s in seeds])
    if have("relift"):
        def fall(seed):
            hardest = curve("relift", seed, "group/hardest", claims)
            third = max(1, len(hardest) // 3)
            return mean(hardest[:third]) - mean(hardest[-third:]), math.nan

        claim("relift teaches fewer questions as it goes (share, first less last third)", ("relift",), "group/hardest",
              [fall(s) for s in seeds])  # fmt: skip
    return checked


# ---------------------------------------------------------------------------------------------------- report


def cost_table(results: dict) -> str:
    """Markdown: seconds of a step and memory of every row that trains; medians over the seeds."""
    lines = ["| | a step, s | of it sampling | of it the update | peak memory, GB |", "| --- " * 5 + "|"]
    for name, row in results["rows"].items():
        if costs := [r for r in row.values() if "peak_gb" in r]:
            cells = [median(r["seconds_a_step"][act] for r in costs) for act in ("step", "sample", "update")]
            cells.append(median(r["peak_gb"] for r in costs))
            lines.append(f"| {name} | " + " | ".join(f"{x:.2f}" if x >= 0.005 else "" for x in cells) + " |")
    return "\n".join(lines)


def cell(values: list[float], digits: int = 1) -> str:
    """Mean, and with several seeds its standard error."""
    return f"{mean(values):,.{digits}f}" + (f" ± {error(values):.{digits}f}" if len(values) > 1 else "")


def tables(results: dict) -> str:
    """Markdown: the rows (costs: medians over the seeds), the claims, what a step costs."""
    lines = ["| | in distribution, % | never solved by the base, % | out of distribution, % | updates | "
             "sampled tokens | demonstrations | operations |", "| --- " * 8 + "|"]  # fmt: skip
    for name, row in results["rows"].items():
        cells = [cell([r[k] for r in row.values()]) for k in ("id", "never", "ood")]
        costs = [r for r in row.values() if "operations" in r]
        for k in ("updates", "sampled_tokens", "demonstrations", "operations"):
            form = ".1e" if k == "operations" else ",.0f"
            cells.append(format(median(r[k] for r in costs), form) if costs else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| claim | found | |", "| --- | --- | --- |"]
    for text, c in results["claims"].items():
        spread = "" if c["se"] is None else f" ± {c['se']:.2g}"
        lines.append(f"| {text} | {c['mean']:.3g}{spread} | {c['verdict']} |")
    return "\n".join([*lines, "", cost_table(results)])


def plot(results: dict, path: Path) -> None:
    """A bar a row: right answers in and out of distribution, in percent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def color(name: str) -> str:  # what a row is one of
        if name not in RUNS:
            return "0.6" if name == "base" else "C1"
        return "C2" if "bridge" in name else {ONLINE: "C0", OFFLINE: "C1", BRIDGE: "C2"}[RUNS[name].kind]

    size = (13, 0.32 * len(results["rows"]) + 1.2)
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    for axis, test, title in zip(axes, ("id", "ood"), ("5 to 8 operations", "9 to 10 operations"), strict=True):
        names = list(results["rows"])
        for i, row in enumerate(results["rows"].values()):
            values = [r[test] for r in row.values()]
            bar = error(values)
            axis.barh(i, mean(values), xerr=None if math.isnan(bar) else bar, color=color(names[i]), capsize=3)
        axis.set_yticks(range(len(results["rows"])), results["rows"])
        axis.set(title=title, xlabel="right answers, %")
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    kinds = {"C0": "online", "C1": "offline, from sft", "C2": "behaviours"}
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in kinds]
    figure.legend(handles, kinds.values(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_claims(results: dict, claims: Claims, path: Path) -> None:
    """A panel for each claim: a dot a row and seed, or the curve of a metric of each row and seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    checked = results["claims"]
    columns = min(4, len(checked))
    figure, axes = plt.subplots(-(-len(checked) // columns), columns, squeeze=False, layout="constrained",
                                figsize=(4.2 * columns, 3.1 * -(-len(checked) // columns)))  # fmt: skip
    for axis, (text, found) in zip(axes.flat, checked.items(), strict=False):
        rows, metric = found["rows"], found["metric"]
        percent = metric in ("id", "ood", "never")
        if dots := percent or metric in ("dJ", "roc_all", "roc_within"):
            by_row = [[influence(name, seed, claims) if metric == "dJ" else [results["rows"][name][str(seed)][metric]]
                       for seed in claims.seeds] for name in rows]  # fmt: skip
            for values in zip(*by_row, strict=True):
                axis.plot(range(len(rows)), [mean(v) for v in values], "o-", color="0.6", mfc="C0", mec="C0", lw=0.8)
            axis.set_xticks(range(len(rows)), rows, fontsize=8)
            axis.margins(x=0.2)
            low, high = axis.get_ylim()
            if percent and high - low < 12:  # a small difference should look like one
                axis.set_ylim((low + high) / 2 - 6, (low + high) / 2 + 6)
        for color, name in enumerate(rows if not dots else ()):
            for seed in claims.seeds:
                line = curve(name, seed, metric, claims)
                label = name if seed == claims.seeds[0] else None
                axis.plot(range(1, len(line) + 1), line, f"C{color}", lw=1, label=label)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_xlabel("step", fontsize=8)
            axis.legend(fontsize=8)
        axis.set_title(f"{textwrap.fill(text, 46)}\n{found['verdict']}", fontsize=8)
        axis.set_ylabel("right answers, %" if percent else metric, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(checked) :]:
        axis.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def commit() -> str:
    """That of this folder, where it is a clone."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def main(claims: Claims) -> dict:
    if unknown := set(claims.only) - set(ROWS):
        raise SystemExit(f"--only: {', '.join(sorted(unknown))}: choose from {', '.join(ROWS)}")
    if claims.quick:
        claims.seeds, claims.steps = claims.seeds[:1], claims.steps // 3
        claims.problems, claims.tries = claims.problems // 2, claims.tries // 2
    claims.jobs = claims.jobs or (1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)))
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // claims.jobs))
    started, found, costs = time.time(), defaultdict(dict), defaultdict(dict)
    wanted = [(name, seed) for seed in claims.seeds for name in ROWS if name in claims.only]
    runners, measurers = ThreadPoolExecutor(claims.jobs), ProcessPoolExecutor(claims.jobs, get_context("spawn"))

    def row(name: str, seed: int) -> dict[str, list[float]]:
        if name == "oreo_beam":
            train("oreo_token", seed, claims)
            return beam(seed, claims)
        model = train(name, seed, claims)
        with LOCKS[model]:  # the base has a row for each seed
            if name == "oreo_token":
                measurers.submit(judged, model, claims).result()
            return measurers.submit(measure, model, claims, name).result()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        waiting = {runners.submit(row, *which): which for which in wanted}
        bar = tqdm(as_completed(waiting), total=len(waiting), desc="rows", disable=claims.jobs == 1)
        for future in bar:
            name, seed = waiting[future]
            found[name][seed], costs[name][seed] = future.result(), cost(name, seed, claims)
            bar.set_postfix_str(f"{name}, seed {seed}")
    finally:  # an interruption ends the runs too; the next call goes on from their checkpoints
        runners.shutdown(wait=False, cancel_futures=True)
        for process in list(RUNNING):
            process.terminate()
        measurers.shutdown()
    never = never_solved(measure(model_of("base", 0, claims), claims, "base"))
    results = {
        "command": " ".join(["python", "benchmarks/claims.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "seeds": list(claims.seeds), "steps": claims.steps, "problems": claims.problems, "tries": claims.tries,
        "never_solved_problems": len(never),
        "rows": {name: {str(seed): {"id": 100 * mean(rates["id"]), "ood": 100 * mean(rates["ood"]),
                                    "never": 100 * mean([rates["id"][i] for i in never] or [0.0])} | costs[name][seed]
                        for seed, rates in sorted(found[name].items())} for name in ROWS if name in found},
        "claims": check(found, claims),
    }  # fmt: skip
    times = os.times()  # of this process and of all that it waited for
    results["seconds"], results["processor_seconds"] = time.time() - started, sum(times[:4])
    path = save(results, tables(results), claims.results + ("-quick" if claims.quick else ""))
    plot(results, path.with_suffix(".png"))
    if results["claims"]:
        plot_claims(results, claims, path.with_name(path.name + "-checked.png"))
    print(f"\n{tables(results)}\n\n{path}.json, {path}.md, {path}.png, {path}-checked.png ({results['seconds']:.0f} s, "
          f"{results['processor_seconds']:.0f} s of processor time)")
    return results


if __name__ == "__main__":
    main(tyro.cli(Claims, use_underscores=True))
