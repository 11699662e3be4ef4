"""What docs/igsm.md says of the problems and the solutions, counted; and how many are made a second.

    python benchmarks/igsm.py                     # 10,000 problems of each kind, into benchmarks/results/igsm.{json,md}
    python benchmarks/igsm.py --problems 500      # a quick look

Every question is solved from its text alone and every solution read back by the checker, in the three styles. The
second table is of natural solutions with BRIDGE's behaviors (subgoals, reflection 0.1, analysis by the number of
parents) and of the same problems without. The original's figures beside them are of its published data.
"""

import argparse
import json
import platform
import re
import sys
import time
from collections import Counter, deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from igsm import check_solution, generate, problems, retell, solve  # noqa: E402

OPS = [(4, 8), (10, 15), (15, 20)]
STYLES = ["natural", "define", "symbolic"]
BRIDGE = dict(subgoals=True, reflection=0.1, analysis="table")


def count_problems(n: int, ops: tuple[int, int]) -> dict[str, float]:
    """Problems of `ops` operations: solved from the text, accepted, zero answers, largest number, made a second."""
    start = time.process_time()
    deque(problems(n, ops=ops), maxlen=0)  # none is kept: the collector would read all that are again and again
    seconds = time.process_time() - start
    made = generate(n, ops=ops)
    found = {"problems": n, "solved": 0, "zero": 0, "largest": 0, "per_second": n / seconds}
    for p in made:
        found["solved"] += solve(p.question, p.categories) == p.answer
        found["zero"] += p.answer == 0
        found["largest"] = max(found["largest"], *(int(number) for number in re.findall(r"\d+", p.solution)))
    for style in STYLES:
        told = made if style == "natural" else problems(n, ops=ops, style=style)
        found[style] = sum(check_solution(p.question, p.solution, p.categories).correct for p in told)
    templates = [{p.template for p in problems(n, ops=ops, split=split)} for split in ("train", "test")]
    found["templates_in_both_splits"] = len(templates[0] & templates[1])
    found["zero_mod_23"] = sum(p.answer == 0 for p in problems(n, ops=ops, modulus=23)) / n
    return found


def count_behaviors(n: int, ops: tuple[int, int]) -> dict[str, float]:
    """Means over solutions with BRIDGE's behaviors: a solution, or a line."""
    found = Counter()
    for p in problems(n, ops=ops):
        told = retell(p, **BRIDGE)
        check, vanilla = (check_solution(x.question, x.solution, x.categories) for x in (told, p))
        found["accepted"] += check.correct
        found["with_reflection"] += check.reflections > 0
        found["reflections"] += check.reflections
        found["analyses"] += check.analyses
        found["redundant"] += check.redundant
        found["long_chains"] += sum(line.count(" = ") > 3 for line in told.solution.split("\n"))
        found["lines"] += check.steps
        found["vanilla_lines"] += vanilla.steps
        found["characters"] += len(told.solution)
        found["vanilla_characters"] += len(p.solution)
        flat = retell(p, analysis=0.1)
        found["flat_analyses"] += check_solution(flat.question, flat.solution, flat.categories).analyses
    return {name: value / n for name, value in found.items()} | {"problems": n}


def tables(results: dict) -> str:
    """Markdown: problems, behaviors."""
    lines = ["| operations | solved from text | accepted: natural, define, symbolic | zero answers | mod 23 | "
             "templates in both splits | largest number | problems a second |", "| --- " * 8 + "|"]  # fmt: skip
    for ops, f in results["problems"].items():
        lines.append(f"| {ops} | {f['solved']:,} of {f['problems']:,} | {' '.join(f'{f[s]:,}' for s in STYLES)} | "
                     f"{100 * f['zero'] / f['problems']:.1f} % | {100 * f['zero_mod_23']:.1f} % | "
                     f"{f['templates_in_both_splits']} | {f['largest']} | {f['per_second']:,.0f} |")  # fmt: skip
    b = results["behaviors"]
    rows = {
        "solutions with a reflection": lambda f: f"{100 * f['with_reflection']:.1f} %",
        "reflections a solution; of the lines":
            lambda f: f"{f['reflections']:.2f}; {100 * f['reflections'] / f['lines']:.1f} %",
        "lines with an analysis (with a flat 0.1: of the vanilla lines)":
            lambda f: f"{100 * f['analyses'] / f['lines']:.1f} % "
                      f"({100 * f['flat_analyses'] / f['vanilla_lines']:.1f} %)",
        "chains of more than three members, of the lines": lambda f: f"{100 * f['long_chains'] / f['lines']:.1f} %",
        "redundant parameters computed, a solution": lambda f: f"{f['redundant']:.2f}",
        "lines; characters (vanilla)":
            lambda f: f"{f['lines']:.1f}; {f['characters']:,.0f} ({f['vanilla_characters']:,.0f})",
        "accepted": lambda f: f"{100 * f['accepted']:.0f} %",
    }  # fmt: skip
    lines += ["", f"| | {' | '.join(b)} |", "| --- " * (1 + len(b)) + "|"]
    lines += [f"| {name} | {' | '.join(show(f) for f in b.values())} |" for name, show in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=10_000, help="of each kind")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    jobs = [("problems", ops, count_problems) for ops in OPS] + [("behaviors", ops, count_behaviors)
                                                                 for ops in (OPS[0], OPS[-1])]  # fmt: skip
    results: dict = {"machine": f"one core, {platform.machine()}, Python {platform.python_version()}",
                     "command": f"python benchmarks/igsm.py --problems {args.problems}"}  # fmt: skip
    for kind, ops, count in tqdm(jobs, desc="igsm"):
        results.setdefault(kind, {})[f"{ops[0]}-{ops[1]}"] = count(args.problems, ops)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "igsm.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "igsm.md").write_text(tables(results) + "\n")
    print(tables(results))


if __name__ == "__main__":
    main()
