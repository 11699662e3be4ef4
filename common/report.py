"""Verdicts on the records of an evaluation (eval.py), and its numbers as Markdown tables and bars.

To read eval.py you can skip this file. It decides which answers are graded again, and makes results.md and .png."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from common.checkpoints import changed_settings, digest_of
from common.data import InputError, check_works
from common.metrics import legend_text, write_whole
from common.rows import gold_unreadable
from common.run import read_records
from common.trainer import World, gather_lists
from common.verifiers import grade, grader_version


def load_run(folder: str, verifier: str | None = None) -> tuple[dict, dict[str, dict]]:
    """Return the settings and the records of a finished evaluation. Raises InputError if the folder holds none, if
    answers are missing, or if they have no verdicts of `verifier`."""
    path = Path(folder)
    if not (path / "args.json").is_file() or not (path / "samples.jsonl").is_file():
        raise InputError(f"{folder}: no evaluation there (args.json and samples.jsonl)")
    settings = json.loads((path / "args.json").read_text())
    if "questions_digest" not in settings:
        raise InputError(f"{folder}: a training run, not an evaluation: run eval.py on it (or benchmarks/compare.py)")
    records = read_records(path / "samples.jsonl")
    if len(records) < (n := settings.get("questions", 0)):
        raise InputError(f"{folder}: {len(records)} of {n} questions are answered; resume it first")
    answers = [answer for record in records.values() for answer in record["answers"]]
    if verifier is not None and any(verifier not in answer.get("verdicts", {}) for answer in answers):
        raise InputError(f"{folder}: answers without a verdict of {verifier}: run its evaluation again with --verifier "
                         f"{verifier} (nothing is sampled twice), or name another with --verifier")  # fmt: skip
    return settings, records


def rewards_of(record: dict, verifier: str) -> list[float]:
    """Return the reward of each answer to a question."""
    return [answer["verdicts"][verifier][0] for answer in record["answers"]]


def grade_records(records: dict[str, dict], verifiers: Iterable[str], world: World, *, again: bool = False) -> None:
    """Give every answer a verdict of each verifier; all ranks get all verdicts. again: also to answers that have one,
    as always by a module:function, whose imports no version covers. InputError if a verifier fails on every answer."""
    mine = list(records.values())[world.rank :: world.size]
    for verifier in verifiers:
        give_verdicts(mine, verifier, again=again or ":" in verifier, progress=world.main)
    graded = [(r["id"], r["graded_by"], [a["verdicts"] for a in r["answers"]]) for r in mine]
    for key, graded_by, verdicts in gather_lists(graded, world):
        records[key]["graded_by"] = graded_by
        for answer, verdict in zip(records[key]["answers"], verdicts, strict=True):
            answer["verdicts"] = verdict
    for verifier in verifiers:
        found = [answer["verdicts"][verifier] for record in records.values() for answer in record["answers"]]
        check_works(verifier, [(status, " ".join(detail)) for _, status, *detail in found])


def give_verdicts(records: list[dict], verifier: str, *, again: bool = False, progress: bool = False) -> None:
    """Give every answer a verdict of this verifier: [reward, status], and the detail if there is one. Without `again`,
    verdicts of the same version are kept, except time-outs and errors. InputError if a reward is not 0 or 1."""
    version = grader_version(verifier)
    todo = []
    for record in records:
        graded_by = record.setdefault("graded_by", {})
        keep = graded_by.get(verifier) == version and not again
        graded_by[verifier] = version
        for answer in record["answers"]:
            old = answer.setdefault("verdicts", {}).get(verifier)
            if not keep or old is None or old[1] in ("timeout", "error"):
                todo.append((record["gold"], answer))
    bar = tqdm(total=len(todo), desc=f"grade {verifier}", disable=not (progress and todo))
    for start in range(0, len(todo), 256):
        part = todo[start : start + 256]
        verdicts = grade([a["text"] for _, a in part], [gold for gold, _ in part], verifier=verifier)
        for (_, answer), verdict in zip(part, verdicts, strict=True):
            if verdict.reward not in (0, 1):
                raise InputError(f"--verifier {verifier}: a reward of {verdict.reward}; here it must be 0 or 1")
            answer["verdicts"][verifier] = list(verdict if verdict.detail else verdict[:2])
        bar.update(len(part))
    bar.close()


def versions_of(records: Iterable[dict], verifier: str) -> str:
    """Return the versions of a grader that graded these records."""
    return "; ".join(sorted({r.get("graded_by", {}).get(verifier, "?") for r in records}))


def unreadable_golds(records: list[dict], verifiers: Iterable[str]) -> list[str]:
    """Return the rows whose gold answer one of the verifiers could not read: their answers count as wrong."""
    return [
        record.get("row", record["id"]) for record in records
        if any(gold_unreadable(*answer["verdicts"][v][2:]) for answer in record["answers"] for v in verifiers)
    ]  # fmt: skip


def disagreements(records: list[dict], verifiers: tuple[str, ...]) -> list[list[str]]:
    """Return rows of a table: how many answers only some graders accept, by benchmark and grader, with an example."""
    found: dict[tuple, list[str]] = {}
    for record in records:
        for answer in record["answers"]:
            accepted = tuple(answer["verdicts"][v][0] > 0 for v in verifiers)
            if len(set(accepted)) > 1:
                found.setdefault((record["benchmark"], accepted), []).append(record["id"])
    rows = [["benchmark", *verifiers, "answers", "example"]]
    for (benchmark, accepted), ids in sorted(found.items(), key=lambda item: (item[0][0], -len(item[1]))):
        rows.append([benchmark, *("right" if yes else "wrong" for yes in accepted), str(len(ids)), ids[0]])
    return rows


def _measured_with(args, names: str) -> dict:
    """Return {name: setting} of space-separated names; for a name in .jsonl, the digest of that file in OUT/data."""
    values = {}
    for name in names.split():
        if name.endswith(".jsonl"):
            values[f"{name}_digest"] = hashlib.sha256(Path(args.out, "data", name).read_bytes()).hexdigest()[:16]
        else:
            values[name] = getattr(args, name)
    return json.loads(json.dumps(values))


def write_results(path: Path, results: dict, args, names: str, models: Iterable[str]) -> None:
    """Write results of model folders to a JSON file, with what they depend on: settings (`_measured_with`), weights and
    the file of --chat_template."""
    files = [*models, *([args.chat_template] if args.chat_template else [])]
    about = {"settings": _measured_with(args, names), "weights": {file: digest_of(file) for file in files}}
    write_whole(path, json.dumps(results | about, indent=2) + "\n")


def read_results(paths: dict[str, Path], args, names: str) -> dict[str, dict]:
    """Return {name: results} of those files that were measured with the settings of `args` and with weights that are
    still there; print the rest."""
    found, settings = {}, _measured_with(args, names)
    for name, path in paths.items():
        if not path.exists():
            continue
        results = json.loads(path.read_text())
        changed = changed_settings(results.pop("settings", {}), settings, settings)
        weights = results.pop("weights", {})
        replaced = [model for model in weights if Path(model).exists() and digest_of(model) != weights[model]]
        if changed:
            print(f"{path} is left out of the table: it was measured with other settings ({changed})")
        elif replaced:
            print(f"{path} is left out of the table: {', '.join(replaced)} changed after it was measured")
        else:
            found[name] = results
    return found


def table(rows: list[list[str]]) -> str:
    """Return rows of cells, the header first, as a Markdown table whose columns are aligned."""
    rows = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]) + "\n"


def numbers(values: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the numbers in (nested) results as (key, text): counts as they are, fractions in percent."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key} ")
        elif isinstance(value, int | float):
            plain = isinstance(value, int) or key == "mean_tokens"
            yield prefix + key, f"{value:.0f}" if plain else f"{100 * value:.1f}"


def results_tables(results: dict, records: list[dict], args) -> str:
    """Return results.md: the numbers, and where the graders disagree."""
    drawn = "greedy" if args.temperature == 0 else f"temperature {args.temperature}, top_p {args.top_p}"
    if args.search != "none":
        drawn = f"{args.search} of width {args.width} by {args.value}, {drawn}"
    first, columns = args.verifier[0], {n: dict(numbers(r)) for n, r in results.items() if n != "average"}
    columns["average"] = dict(numbers({"pass@1": results["average"]}))
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    rows = [[key, *(column.get(key, "") for column in columns.values())] for key in keys]
    text = (f"# {args.model}\n\nTemplate {args.template}, {drawn}, at most {args.max_tokens} tokens, graded by {first} "
            f"({versions_of(records, first)}). Fractions in percent.\n\n{table([['', *columns], *rows])}")  # fmt: skip
    if args.buckets:
        text += f"\nDifficulty by the answers in {args.buckets}.\n"
    if bad := unreadable_golds(records, args.verifier):
        text += (f"\nA grader cannot read the gold answers of {len(bad)} questions, whose answers count as wrong: "
                 f"{'; '.join(bad[:20])}{', ...' if len(bad) > 20 else ''}\n")  # fmt: skip
    if len(args.verifier) > 1:
        rows = disagreements(records, args.verifier)
        text += "\n## Where the graders disagree\n\nAnswers by who accepts them, with a question in samples.jsonl:\n\n"
        text += table(rows) if len(rows) > 1 else "None: they agree on every answer.\n"
    return text


def average(values: Iterable[tuple[float, float | None]]) -> tuple[float, float | None]:
    """Return the unweighted mean of several (mean, its standard error or None), and its standard error."""
    means, errors = zip(*values, strict=True)
    return fmean(means), None if None in errors else math.hypot(*errors) / len(errors)


def plot_bars(bars: dict[str, dict[str, tuple[float, float | None]]], path: Path) -> None:
    """Draw grouped bars of pass@1 in percent with 95 % intervals, and of the average of several benchmarks.

    bars: {run: {benchmark: (mean, standard error or None)}}."""
    from matplotlib.figure import Figure

    benchmarks, width = list(dict.fromkeys(b for run in bars.values() for b in run)), 0.8 / len(bars)
    if len(benchmarks) > 1 and all(len(values) == len(benchmarks) for values in bars.values()):
        benchmarks.append("average")
        bars = {run: values | {"average": average(values.values())} for run, values in bars.items()}
    size = (max(4.5, 0.5 + 0.45 * len(benchmarks) * (len(bars) + 1)), 3.6)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    for i, (run, values) in enumerate(bars.items()):
        at = [benchmarks.index(b) + (i - (len(bars) - 1) / 2) * width for b in values]
        means = [100 * mean for mean, _ in values.values()]
        errors = [196 * (error or 0) for _, error in values.values()]
        drawn = axis.bar(at, means, width * 0.92, label=legend_text(run), yerr=errors)
        axis.bar_label(drawn, [f"{m:.1f}" for m in means], fontsize=7, padding=2)
    turned = dict(rotation=20, ha="right") if sum(map(len, benchmarks)) > 9 * size[0] else {}
    axis.set_xticks(range(len(benchmarks)), benchmarks, parse_math=False, **turned)
    axis.set_ylabel("pass@1, % (and its 95 % interval)", fontsize=8)
    axis.set_ylim(0, max(1, 1.05 * axis.get_ylim()[1]))
    columns = max(1, int(size[0] / (0.6 + 0.075 * max(map(len, bars)))))  # as many names as fit
    figure.legend(loc="outside upper left", ncols=columns, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
