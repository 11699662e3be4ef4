"""ReLIFT: demonstrations of the hardest questions, where these need what solved questions do not show.

In the block `relift` one distribution makes all questions, so a demonstration of a solved question teaches as much as
one of a hardest question. Here half of the questions have 2 to 4 operations and half have 7 to 8. The start reasons
about the short ones and gives up on the long ones: it answers them with an empty box, so they are all hardest. What it
lacks there is not the skill (models/tiny has it) but the start of the reasoning, which it never samples. The arms are
those of `relift`. All are measured on long questions.

Prediction, before the first run of an arm. RL alone never sees a correct answer to a long question, and demonstrations
of short ones only confirm what the start does: both stay below 5 % on long questions, unless reasoning spreads from
short to long ones by itself. With demonstrations of the hardest questions the model reasons about long ones after some
20 steps, and RL then has a gradient there: 20 % or more. Random questions are half long, so they come close to that.

Refuted if solved questions serve as well as hardest ones.

    python -m benchmarks.blocks.relift_long OUT     start.jsonl, train.jsonl, and long ones: test.jsonl, valid.jsonl
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import igsm
from benchmarks.blocks import Claim, Run, made
from benchmarks.blocks.relift import CURVES, RATES  # noqa: F401 (CURVES: claims.py reads it here)
from common.rows import IGSM

SHORT, LONG = (2, 4), (7, 8)
RUN = "--preset tiny --seed {seed} --out {out} --eval_every 0 --log_samples 0"
ARM = "relift.py --model {start}/model --data {data}/train.jsonl --lr {lr} --sft_lr {lr} --steps {steps} " + RUN

TEST, VALID, STEPS, SEEDS, START = "{data}/test.jsonl", "{data}/valid.jsonl", (60, 30), 5, ""
RUNS = {
    "data": made("-m benchmarks.blocks.relift_long {out}", once=True),
    "start": Run("luffy.py --method sft --schedule constant --warmup 0 --batch_size 32 --lr 3e-4 --steps 60 "
                 "--model {tiny} --data {data}/start.jsonl " + RUN, once=True),
    "rl": Run(ARM + " --sft_data_size -1", **RATES),
    **{name: Run(f"{ARM} --sft_data_size 4 --sft_every 1 --sft_on {name}", **RATES)
       for name in ("hardest", "solved", "random")},
}  # fmt: skip

CLAIMS = [
    *(Claim(f"hardest over {other}, long questions{', greedy' if how == 'greedy' else ''} (points)",
            {"hardest": 1, other: -1}, of=how) for other in ("solved", "rl") for how in ("sampled", "greedy")),
    Claim("hardest over random, long questions (points)", {"hardest": 1, "random": -1}),
]  # fmt: skip


def problem_rows(n: int, ops: tuple[int, int], split: str, seed: int, *, give_up: bool = False) -> Iterator[dict]:
    """n problems as rows of a data set; give_up: with an empty box for the solution."""
    for problem in igsm.problems(n, ops=ops, split=split, seed=seed, **IGSM):
        row = igsm.row(problem, split)
        if give_up:
            row["target"][0]["content"] = "<think>\n</think>\n\\boxed{}"
        yield row


def main(out: Path) -> None:
    files = {
        "start": [*problem_rows(3000, SHORT, "train", 1), *problem_rows(3000, LONG, "train", 2, give_up=True)],
        "train": [*problem_rows(2500, SHORT, "train", 3), *problem_rows(2500, LONG, "train", 4)],
        "test": problem_rows(300, LONG, "test", 5),
        "valid": problem_rows(300, LONG, "test", 6),
    }
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
