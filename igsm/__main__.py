"""`python -m igsm`: writes a file of problems with the columns that LUFFY's data has, or draws a problem."""

import contextlib
import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from igsm.problem import problems, row

ROWS_AT_ONCE = 10_000  # of a parquet file


@dataclass
class Args:
    """Synthetic word problems of an exact number of operations, with their solutions.

    Each row has data_source (igsm-STYLE), prompt and target (lists of messages), ability, reward_model (its
    ground_truth is the answer) and extra_info. The file is complete or absent: never half-written.

    Training and held-out problems that share no solution template, 4 to 8 operations:

        python -m igsm --n 100000 --ops 4 8 --split train --out train.parquet

        python -m igsm --n 500 --ops 4 8 --split test --out test.jsonl

    The same for a model of under a million parameters: letters only, numbers mod 23:

        python -m igsm --n 100000 --style symbolic --modulus 23 --max_params 8 --out train.jsonl

    BRIDGE's three behaviors in the solutions; one problem drawn as a graph:

        python -m igsm --n 2000 --ops 15 20 --subgoals --reflection 0.1 --analysis table --out bridge.jsonl

        python -m igsm --ops 7 8 --max_params 6 --start 355 --draw problem.svg
    """

    out: Path | None = None
    """File to write, .jsonl or .parquet; an existing one is replaced."""
    draw: Path | None = None
    """Instead of --out, or besides: draw the first problem as a graph into this .svg or .png file, and print it."""
    n: int = 1000
    """How many problems."""
    ops: tuple[int, int] = (4, 8)
    """Fewest and most operations of a solution. The number is exact for each problem (extra_info.ops), and
    the smaller of two draws, so that easier problems are more frequent. `--ops 20 20` for exactly 20."""
    seed: int = 0
    """The same seed and settings give the same file; half of --n gives the first half of it."""
    start: int = 0
    """Number of the first problem of this seed."""
    split: Literal["train", "test"] | None = None
    """Problems whose solution's template hashes to this side; None for both. Train is 16 of 23 bins."""
    style: Literal["natural", "define", "symbolic"] = "natural"
    """natural: sentences, and a solution in sentences. define: the same question with a terse solution.
    symbolic: equations between letters, for tiny models. The same seed gives the same problems in each."""
    modulus: int | None = None
    """Arithmetic mod this number (Meta's is 23), else plain integers, which can be negative."""
    max_params: int = 20
    """Largest number of sentences in a question. A smaller one leaves fewer that the solution does not need."""
    max_value: int = 1000
    """Without a modulus, the absolute value of every number in a solution is below this."""
    max_literal: int | None = None
    """Numbers given in the question are 1 to this; None for 9, or modulus - 1 if there is a modulus."""
    subgoals: bool = False
    """Solutions write every intermediate result: 2 + (34 + 15) = 2 + 49 = 51."""
    reflection: float = 0.0
    """Chance of a look-ahead before a line: "we don't know ... yet", and back to it later (BRIDGE: 0.1)."""
    analysis: float | Literal["table"] = 0.0
    """Chance that a line repeats the question's sentence, or "table": a higher chance for more parents (BRIDGE's
    code)."""
    retry: float = 0.0
    """Chance of a retry before a line: a parameter that cannot be computed yet, then "BACK" (Meta's). It is drawn again
    after each retry."""
    question_variant: int = 0
    """1, 2, ...: the same problems with their conditions in other orders (BRIDGE's PP-Aug)."""
    solution_variant: int = 0
    """1, 2, ...: the same problems, solved in other orders and words (RC-Aug)."""
    shuffle: bool = True
    """Conditions in random order. --no_shuffle: in the order of the solution, unneeded ones in between."""
    system_prompt: bool = False
    """Begin each prompt with BRIDGE's system message, which explains the <think> and <answer> tags."""


def write_jsonl(path, rows):
    """One JSON object a line, UTF-8."""
    with open(path, "w", encoding="utf-8") as file:
        for one in rows:
            file.write(json.dumps(one) + "\n")


def write_parquet(path, rows):
    """The same rows as parquet, ROWS_AT_ONCE to a row group: memory does not grow with their number."""
    import pyarrow as pa
    from pyarrow import parquet

    text, number = pa.string(), pa.int64()
    turns = pa.list_(pa.struct({"role": text, "content": text}))
    info = {"split": text, "index": number, "ops": number, "seed": number, "template": text, "modulus": number}
    schema = pa.schema({
        "data_source": text, "prompt": turns, "target": turns, "ability": text,
        "reward_model": pa.struct({"style": text, "ground_truth": text}), "extra_info": pa.struct(info),
    })  # fmt: skip
    rows = iter(rows)
    with parquet.ParquetWriter(path, schema) as writer:
        while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(batch, schema))


def main(argv=None):
    """Writes the file; returns the exit code: 2 with one line on stderr where the settings cannot be met."""
    try:
        args = tyro.cli(Args, args=argv, prog="python -m igsm", use_underscores=True)
    except BrokenPipeError:  # --help | less, left with q
        os._exit(0)
    out = args.out or Path()
    partial = out.parent / f".{out.name}.{os.getpid()}"
    try:
        if args.n < 1:
            raise ValueError(f"--n must be 1 or more, got {args.n}")
        if args.out is None and args.draw is None:
            raise ValueError("--out FILE or --draw FILE is needed")
        for flag, path, endings in (("out", args.out, [".jsonl", ".parquet"]), ("draw", args.draw, [".svg", ".png"])):
            if path is None:
                continue
            if path.suffix not in endings:
                raise ValueError(f"--{flag} must end in {' or '.join(endings)}, got {path}")
            if str(path).startswith("~"):  # bash leaves --out=~/file as it is
                raise ValueError(f"--{flag} {path}: the shell has not replaced ~; write it without = and quotes")
            if path.is_dir():
                raise ValueError(f"--{flag} {path} is a folder")
        not_problems = ("out", "draw", "n", "system_prompt")
        settings = {name: value for name, value in vars(args).items() if name not in not_problems}
        if args.draw:
            from igsm.draw import draw

            [problem] = problems(1, **settings)
            args.draw.parent.mkdir(parents=True, exist_ok=True)
            draw(problem, args.draw)
            print(f"{problem.question}\n\n{problem.solution}\n")
        if args.out is None:
            return 0
        made = problems(args.n, **settings)
        made = itertools.chain([next(made)], made)  # if there is no such problem, say so before anything else
        out.parent.mkdir(parents=True, exist_ok=True)
        rows = (row(problem, args.split or "all", args.system_prompt) for problem in made)
        write = {".jsonl": write_jsonl, ".parquet": write_parquet}[args.out.suffix]
        write(partial, tqdm(rows, total=args.n, unit=" problems", desc=args.out.name))
        os.replace(partial, args.out)
    except (ValueError, OverflowError, OSError) as error:
        print(f"python -m igsm: error: {error}", file=sys.stderr)
        return 2
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    print(f"{args.n} problems in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
