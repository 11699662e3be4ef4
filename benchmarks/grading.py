"""What grading costs, and what hostile texts do to it.

    python benchmarks/grading.py --solutions example_model_solutions.jsonl --golds valid.parquet

--solutions: GSM8K's model solutions as its authors graded them (a question, its ground truth and models' solutions a
             line): answers a second by two rules, and how many verdicts are the authors'.
--golds:     LUFFY's validation file; for 300 of its golds 8 answers, half of them with a digit changed: the processor
             time of each.
Hostile texts (towers of exponents, code in every place an expression can stand, a million brackets, random LaTeX) are
graded among as many honest answers, in random order: what becomes of either.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.verifiers import VERIFIERS, Verdict, close, grade  # noqa: E402

PLACES = [r"\boxed{%s}", r"so it is $%s$", r"\boxed{\frac{%s}{2}}", r"\boxed{x^{%s}}", r"\boxed{\text{%s}}",
          r"\boxed{[0, %s)}", r"\boxed{\{1, %s\}}", r"\boxed{\begin{pmatrix}%s\end{pmatrix}}"]  # fmt: skip
CANARY = Path(tempfile.gettempdir()) / f"canary-{os.getpid()}"  # what code in a text would leave
CODE = ['__import__("os").abort()', f'open("{CANARY}", "w")', 'exec("1/0")', "().__class__.__mro__", "lambda: 0",
        r"\input{/etc/passwd}", r"\immediate\write18{ls}", "%s%n{0!r:>99999999}"]  # fmt: skip


def solutions_a_second(path: Path, verifier: str, workers: int) -> dict:
    """The first model's solutions, each last line boxed."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    model = next(name for name in rows[0] if isinstance(rows[0][name], dict))
    answers = [r"</think> \boxed{" + row[model]["solution"].split("\n")[-1].removeprefix("A: ") + "}" for row in rows]
    golds = [row["ground_truth"].split("\n")[-1].removeprefix("A: ") for row in rows]
    grade(answers[:2], golds[:2], verifier=verifier, workers=workers)  # workers have started
    start = time.perf_counter()
    verdicts = grade(answers, golds, verifier=verifier, workers=workers)
    seconds = time.perf_counter() - start
    close()
    agree = sum(v.reward == row[model]["is_correct"] for v, row in zip(verdicts, rows, strict=True))
    return {"model": model, "answers": len(rows), "verdicts_of_the_authors": agree, "per_second": len(rows) / seconds}


def time_an_answer(path: Path, n: int, tries: int) -> dict[str, float]:
    """Processor time of `math` in this process, an answer at a time."""
    import pyarrow.parquet as parquet

    rng = random.Random(0)
    golds = [row["ground_truth"] for row in parquet.read_table(path)["reward_model"].to_pylist()]
    took = []
    for gold in rng.sample(golds, n):
        for i in range(tries):
            digits = [at for at, c in enumerate(gold) if c.isdigit()]
            answer = gold
            if i % 2 and digits:
                at = rng.choice(digits)
                answer = gold[:at] + str((int(gold[at]) + 1) % 10) + gold[at + 1 :]
            start = time.process_time()
            VERIFIERS["math"](f"</think> It is \\boxed{{{answer}}}.", gold)
            took.append(time.process_time() - start)
    took.sort()
    return {"golds": n, "answers": len(took), "median_ms": 1e3 * statistics.median(took), "mean_ms":
            1e3 * statistics.mean(took), "slowest_tenth_share": sum(took[-len(took) // 10 :]) / sum(took),
            "per_second_and_core": len(took) / sum(took)}  # fmt: skip


def hostile_text(rng: random.Random) -> str:
    """One of those that the heading names; a third of them random LaTeX."""
    kind = rng.randrange(6)
    if kind == 0:  # towers of exponents
        text = "".join(f"{rng.randint(2, 99)}^{{" for _ in range(rng.randint(2, 6))) + "9" + "}" * 6
        return r"\boxed{" + text + "}"
    if kind == 1:
        return r"\boxed{" + "(" * 9 + str(rng.randint(5, 99)) + "!)" * 9 + "}"
    if kind == 2:  # code where an expression can stand
        return rng.choice(PLACES).replace("%s", rng.choice(CODE))
    if kind == 3:
        few = rng.choice(["(", "{", r"\frac{", "9", "[", ",", r"\boxed{", "$", "\n"])
        return few * rng.choice([10**3, 10**5, 10**6])
    words = [r"\frac", r"\sqrt", r"\int", r"\sum", r"\left(", r"\right)", "\\\\", "&", *"^_{}x10!="]
    return r"\boxed{" + "".join(rng.choice(words) for _ in range(rng.randint(1, 200))) + "}"


def mixed(n: int, workers: int, timeout: float) -> dict:
    """n hostile texts among n honest answers, half of those right: what became of each."""
    rng = random.Random(0)
    golds = [str(rng.randrange(1000)) for _ in range(n)]
    honest = [(f"</think> It is \\boxed{{{g if i % 2 else '1' + g}}}.", g) for i, g in enumerate(golds)]
    hostile = [("</think>" + hostile_text(rng), "42") for _ in range(n)]
    order = list(range(2 * n))
    rng.shuffle(order)
    items = [(honest + hostile)[i] for i in order]
    start = time.perf_counter()
    verdicts = grade([r for r, _ in items], [g for _, g in items], workers=workers, timeout=timeout)
    found = dict(zip(order, verdicts, strict=True))
    changed = sum(found[i] != Verdict(float(i % 2), "ok") for i in range(n))
    return {"hostile": n, "honest_changed": changed, "hostile_rewarded": sum(found[n + i].reward for i in range(n)),
            "hostile_status": Counter(found[n + i].status for i in range(n)), "seconds": time.perf_counter() - start,
            "timeout": timeout, "canary": CANARY.exists()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solutions", type=Path)
    parser.add_argument("--golds", type=Path)
    parser.add_argument("--hostile", type=int, default=200, help="hostile texts, among as many honest ones")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds an answer")
    parser.add_argument("--note", default="", help="anything a reader of the results must know about this machine")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    results: dict = {"machine": f"{len(os.sched_getaffinity(0))} cores", "workers": args.workers, "note": args.note}
    if args.solutions:
        results["solutions"] = {v: solutions_a_second(args.solutions, v, args.workers) for v in ("math", "strict_box")}
    if args.golds:
        results["answers"] = time_an_answer(args.golds, 300, 8)
    results["mixed"] = mixed(args.hostile, args.workers, args.timeout)
    print(json.dumps(results, indent=1))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "grading.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
