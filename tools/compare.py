r"""Compare evaluations that eval.py wrote: tables, confidence intervals, a plot, and a page of samples.

    python -m tools.compare runs/eval/base runs/eval/luffy runs/eval/grpo --out runs/eval/compared

The first folder is what the others are measured against, on the questions that all runs were asked. --out then has

    comparison.md, comparison.csv    pass@1 of each run, and its difference to the first run with a 95 % interval
    comparison.png                   pass@1 as bars, with each run's own error
    comparison.html                  questions on which the runs differ, with answers; one file, needs no network

The intervals are from a paired bootstrap: questions are resampled within each benchmark, the same ones for both runs.
"""

import base64
import csv
import functools
import hashlib
import html
import json
import math
import re
import string
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import tyro

from common.data import InputError
from common.report import average, load_run, plot_bars, rewards_of, table, versions_of
from common.run import Positive, check_ranges, write_whole
from common.trainer import launch, parse_args
from common.verifiers import after_think
from eval import FREE, digest, mean_and_errors


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # Folders of evaluations. The others are compared with the first.
    out: str = "runs/eval/compared"  # Folder for comparison.md, .csv, .png and .html
    verifier: str = "strict_box"  # The grader whose verdicts are compared
    page_questions: Positive[int] = 200  # Most questions on the page of samples: those on which the runs differ most


@dataclass
class Evaluation:
    name: str
    settings: dict
    records: dict[str, dict]  # by id of the question; of those that all runs were asked


def load_runs(folders: tuple[str, ...], verifier: str) -> list[Evaluation]:
    """Return the runs, reduced to the questions that all of them were asked; what is left out is printed."""
    names = [Path(folder).resolve().name for folder in folders]
    names = [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]
    runs = [Evaluation(name, *load_run(folder, verifier)) for name, folder in zip(names, folders, strict=True)]
    common = set.intersection(*(set(run.records) for run in runs))
    if not common:
        raise InputError(f"{' '.join(folders)}: no question was asked in all of them")
    for run in runs:
        if len(run.records) > len(common):
            print(f"{run.name}: {len(run.records) - len(common)} questions were not asked in all runs; left out")
        run.records = {key: record for key, record in run.records.items() if key in common}
    return runs


def bootstrap_interval(differences: list[np.ndarray], *, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean over benchmarks of their mean difference, by a paired bootstrap.

    differences: for each benchmark [Q], Q > 1, run B's fraction of correct answers minus run A's. Questions are
    resampled within each benchmark. Their answers are not: the scatter of the fractions includes their noise already.
    A bootstrap of Q questions gives the mean's variance times (Q - 1) / Q; the deviations are scaled up for that."""
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)
    for values in differences:
        values = values.mean() + (values - values.mean()) * math.sqrt(len(values) / (len(values) - 1))
        for start in range(0, draws, 500):  # [500, Q] indices at a time
            drawn = rng.integers(len(values), size=(min(500, draws - start), len(values)))
            means[start : start + 500] += values[drawn].mean(1) / len(differences)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def compare_rates(rates: dict[str, np.ndarray], names: list[str]) -> list[dict]:
    """Return the rows of comparison.csv: one for each run on each benchmark, and on the benchmarks' unweighted average.
    rates: for each benchmark the fraction of correct answers, [runs, questions]. names: those of the runs."""

    def measure(fractions: np.ndarray) -> tuple[float, float | None]:  # mean, standard error
        return mean_and_errors([[fraction] for fraction in fractions.tolist()])[:2]

    rows = []
    for benchmark, averaged in [*((b, [b]) for b in rates), ("average", list(rates))]:
        for i, name in enumerate(names):
            rate, error = average(measure(rates[b][i]) for b in averaged)
            row = {
                "benchmark": benchmark, "run": name, "questions": sum(rates[b].shape[1] for b in averaged),
                "pass@1": rate, "se": error, "difference": None, "low": None, "high": None,
            }  # fmt: skip
            if i:
                differences = [rates[b][i] - rates[b][0] for b in averaged]
                row["difference"] = float(fmean(d.mean() for d in differences))
                if min(map(len, differences)) > 1:
                    row["low"], row["high"] = bootstrap_interval(differences)
            rows.append(row)
    return rows


def percent(row: dict) -> str:
    """Return pass@1 in percent, with its standard error if it is known."""
    return f"{100 * row['pass@1']:.1f}" + (f" ± {100 * row['se']:.1f}" if row["se"] is not None else "")


def difference(row: dict) -> str:
    """Return the difference to the first run in percent, with its interval if there are several questions."""
    interval = "" if row["low"] is None else f" [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
    return f"{100 * row['difference']:+.1f}{interval}"


def summary_cells(rows: list[dict], names: list[str]) -> list[list]:
    """Return the rows of compare_rates as a table: a line per benchmark, a column per run and per difference."""
    cells = [["benchmark", "questions", *names, *(f"{name} - {names[0]}" for name in names[1:])]]
    for start in range(0, len(rows), len(names)):
        mine = rows[start : start + len(names)]
        cells.append([mine[0]["benchmark"], mine[0]["questions"], *map(percent, mine), *map(difference, mine[1:])])
    return cells


def different_settings(runs: list[Evaluation], verifier: str) -> list[list]:
    """Return a table of what differs between the runs besides their answers."""
    found = {
        "answers": [sum(len(r["answers"]) for r in run.records.values()) for run in runs],
        "prompts": [digest([run.records[k].get("prompt") for k in runs[0].records]) for run in runs],
        "graded by": [versions_of(run.records.values(), verifier) for run in runs],
    }
    found |= {k: [run.settings.get(k) for run in runs] for k in runs[0].settings if k not in FREE and "digest" not in k}
    for flag, i in (("model", 0), ("value", 2)):
        if len({run.settings.get(flag) for run in runs}) == 1:  # else the flag shows it
            found[f"weights of --{flag}"] = [str(run.settings.get("weights_digest")).partition(" ")[i] for run in runs]
    return [["", *(run.name for run in runs)], *([name, *v] for name, v in found.items() if any(x != v[0] for x in v))]


# Models wrote the texts on the page, so it receives them as data and shows them as plain text. Formulas become MathML.
# Only the elements and attributes listed here pass: the converter turns \href into links and does not escape \text.

FORMULA = re.compile(
    r"\$\$(?P<display>.+?)\$\$|\\\[(?P<brackets>.+?)\\\]|\\\((?P<inline>.+?)\\\)"
    r"|(?<![\\$])\$(?=[^\s$])(?P<dollars>[^$\n]{0,400}?[^\s$\\])\$(?!\d)"  # $5 and $10 are no formula
    r"|(?P<box>\\boxed\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})",
    re.DOTALL,
)
MATHML = {"math", "mrow", "mi", "mo", "mn", "mtext", "mspace", "mfrac", "msqrt", "mroot", "msub", "msup", "msubsup",
          "munder", "mover", "munderover", "mtable", "mtr", "mtd", "mstyle", "mpadded", "mphantom",
          "menclose"}  # fmt: skip
MATHML_ATTRIBUTES = {"display", "displaystyle", "scriptlevel", "mathvariant", "stretchy", "fence", "form", "accent",
                     "accentunder", "movablelimits", "minsize", "maxsize", "linethickness", "width",
                     "columnalign"}  # fmt: skip
MAX_SHOWN = 4000  # characters of a text on the page: the end of a longer one, which has its answer


def to_html(text: str) -> str:
    """Return untrusted text as HTML: escaped, with MathML for the formulas that can be read."""
    cut, text = len(text) - MAX_SHOWN, text[-MAX_SHOWN:]
    parts, at = [f'<span class="cut">({cut:,} characters before)</span>\n'] if cut > 0 else [], 0
    for match in FORMULA.finditer(text):
        kind = match.lastgroup
        formula = to_mathml(match[kind], block=kind in ("display", "brackets"))
        parts += [html.escape(text[at : match.start()]), formula or html.escape(match[0])]
        at = match.end()
    return "".join([*parts, html.escape(text[at:])])


@functools.lru_cache(4096)
def to_mathml(formula: str, *, block: bool = False) -> str | None:
    """Return the MathML of a LaTeX formula, or None if it is long, cannot be read, or needs an element that is not in
    MATHML. Attributes that are not in MATHML_ATTRIBUTES are removed."""
    from latex2mathml.converter import convert

    if len(formula) > 1000:
        return None
    try:
        tree = ElementTree.fromstring(convert(formula, display="block" if block else "inline"))
    except Exception:  # the converter raises many types, down to IndexError and RecursionError
        return None
    for element in tree.iter():
        element.tag = element.tag.rpartition("}")[2]
        if element.tag not in MATHML:
            return None
        for name in element.attrib.keys() - MATHML_ATTRIBUTES:
            del element.attrib[name]
    return ElementTree.tostring(tree, encoding="unicode", short_empty_elements=False)


def page(runs: list[Evaluation], rates: dict[str, list[float]], verifier: str, summary: list[list], limit: int) -> str:
    """Return the page of samples, one self-contained file: compare.html around the questions on which runs differ.

    rates: the fraction of correct answers of each run, by id of the question."""
    differing = [key for key, values in rates.items() if max(values) > min(values)]
    most_differing = sorted(differing, key=lambda key: min(rates[key]) - max(rates[key]))[:limit]
    questions = []
    for key in most_differing:
        record = runs[0].records[key]
        questions.append({
            "id": key, "benchmark": record["benchmark"], "gold": record["gold"], "html": to_html(record["question"]),
            "runs": [page_answers(run.records[key], verifier) for run in runs],
        })  # fmt: skip
    note = (f"The runs differ on {len(differing)} of {len(rates)} questions, graded by {verifier}; here are the "
            f"{len(most_differing)} on which they differ most, each with a run's first right and first wrong "
            "answer.")  # fmt: skip
    data = json.dumps({"runs": [run.name for run in runs], "summary": summary, "note": note, "questions": questions})
    frame = string.Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    script = re.search(r"<script>(.*?)</script>", frame.template, re.DOTALL)[1]
    return frame.substitute(
        title=html.escape(" / ".join(run.name for run in runs)), data=data.replace("<", "\\u003c"),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip


def page_answers(record: dict, verifier: str) -> dict:
    """Return what the page shows of a run's answers to a question: how many are correct, and the first of each kind."""
    rewards = rewards_of(record, verifier)
    shown = []
    for right in (True, False):
        for answer in [a for a, x in zip(record["answers"], rewards, strict=True) if (x > 0) == right][:1]:
            thought, tag, _ = answer["text"].partition("</think>")
            shown.append({
                "right": right, "tokens": answer["tokens"], "truncated": answer["truncated"],
                "verdicts": {name: verdict_text(*verdict) for name, verdict in answer["verdicts"].items()},
                "thought": thought[-MAX_SHOWN:] if tag else None, "html": to_html(after_think(answer["text"]).strip()),
            })  # fmt: skip
    return {"right": sum(x > 0 for x in rewards), "answers": len(rewards), "shown": shown}


def verdict_text(reward: float, status: str, *details: str) -> str:
    """Return a verdict as text: right, wrong or the verifier's status, then its details in brackets."""
    verdict = "right" if reward > 0 else "wrong" if status == "ok" else status
    return " ".join([verdict, *(f"({detail})" for detail in details)])


def main(args: Args) -> None:
    check_ranges(args)
    if len(args.runs) < 2:
        raise InputError("two or more folders of evaluations are needed")
    verifier, out = args.verifier, Path(args.out)
    runs = load_runs(args.runs, verifier)
    names = [run.name for run in runs]
    rates, by_benchmark = {}, {}
    for key, record in runs[0].records.items():
        rates[key] = [fmean(rewards_of(run.records[key], verifier)) for run in runs]
        by_benchmark.setdefault(record["benchmark"], []).append(rates[key])
    rows = compare_rates({name: np.array(found).T for name, found in by_benchmark.items()}, names)
    cells, different = summary_cells(rows, names), different_settings(runs, verifier)
    text = (f"# Comparison\n\npass@1 in percent ± standard error, graded by {verifier}. In brackets: 95 % interval "
            f"of the difference on the same questions (paired bootstrap).\n\n{table(cells)}")  # fmt: skip
    if len(different) > 1:
        text += f"\nWhat differs between the runs:\n\n{table(different)}"
    write_whole(out / "comparison.md", text)
    with open(out / "comparison.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    each = [row for row in rows if row["benchmark"] != "average"]
    bars = {name: {r["benchmark"]: (r["pass@1"], r["se"]) for r in each if r["run"] == name} for name in names}
    plot_bars(bars, out / "comparison.png")
    write_whole(out / "comparison.html", page(runs, rates, verifier, cells, args.page_questions))
    print(f"{text}\n{out}/comparison.html shows answers on which the runs differ; comparison.md, .csv, .png")


if __name__ == "__main__":
    launch(main, parse_args(Args, None))
