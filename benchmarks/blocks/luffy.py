"""LUFFY: guidance against imitation, with traces that leap.

The traces leave out intermediate results: "g=5+(c-q)=5+(15-15)=5", where the base's own style has "=5+(15-15)=5+0=5".
A model of this size computes one operation per token well and two at once badly.

Prediction, from trials of 60 steps. SFT copies the leaps and is limited by them (27 %). RL with an SFT loss keeps the
same pull towards the trace (27 %), and ReLIFT fine-tunes on the same traces (27 %). GRPO after SFT repairs a part
(34 %). LUFFY's own answers compete with the trace: those with intermediate results are right more often and are
rewarded, the trace's advantage falls, and its shaped loss hardly pulls on likely tokens. So LUFFY's own answers keep
some intermediate results, those of the others keep none, and LUFFY is best (40 %). GRPO alone never sees reasoning.

All rows have equal steps and questions; sft_grpo divides the steps between both methods. Refuted if luffy is not above
sft, rl_sft, relift and sft_grpo, or if its answers have no more intermediate results than those of sft.
"""

import json
import re
from statistics import fmean as mean

from benchmarks.blocks import Claim, Run, made

PROBLEMS = "-m igsm --ops 5 8 --style symbolic --modulus 23 --max_params 4 --max_literal 9 --no_shuffle --no_subgoals"
TRAIN = "--preset tiny --data {train}/rows.jsonl --seed {seed} --out {out} --lr {lr} --eval_every 0 --log_samples 16"
SFT = "luffy.py --method sft --schedule constant --warmup 0 --batch_size 16 --model {tiny} " + TRAIN
FROM_BASE = f"--model {{tiny}} --steps {{steps}} {TRAIN}"
RATES = dict(lrs=(5e-5, 2e-4, 5e-4))
RL = RATES | dict(trained=7)  # the rows of a step's second update are read before its first: half of all, 2 operations

TEST, VALID, STEPS, SEEDS = "{test}/rows.jsonl", "{valid}/rows.jsonl", (150, 40), 5
RUNS = {
    "train": made(PROBLEMS + " --n 5000 --split train --out {out}/rows.jsonl", once=True),
    "test": made(PROBLEMS + " --n 300 --split test --out {out}/rows.jsonl", once=True),
    "valid": made(PROBLEMS + " --n 300 --split test --seed 1 --out {out}/rows.jsonl", once=True),
    "base": Run(model="{tiny}", once=True),
    "sft": Run(SFT + " --steps {steps}", **RATES),
    "half_sft": made(SFT + " --steps {half}", **RATES),
    "sft_grpo": Run("luffy.py --method grpo --model {half_sft}/model --steps {half} " + TRAIN, **RL),
    "grpo": Run("luffy.py --method grpo " + FROM_BASE, **RL),
    "rl_sft": Run("luffy.py --method rl_sft " + FROM_BASE, **RL),
    "relift": Run("relift.py --sft_lr {lr} " + FROM_BASE, **RL),
    "luffy": Run("luffy.py " + FROM_BASE, **RL),
    "luffy_unshaped": Run("luffy.py --shaping_gamma 0 " + FROM_BASE, **RL),
}


def intermediate_results(text: str) -> int:
    """How many intermediate results an answer writes: numeric expressions of a line after its first.

    >>> intermediate_results("c=15\\ng=5+(c-q)=5+(15-15)=5+0=5\\nj=6*u=6*22=17")
    1
    """
    count = 0
    for line in text.splitlines():
        expressions = [part for part in line.split("=") if re.fullmatch(r"[\d()+*-]*[+*-][\d()+*-]*", part)]
        count += max(0, len(expressions) - 1)
    return count


def over_training(folder) -> list[float]:
    """Intermediate results of the own answers that were logged, means over five steps each."""
    steps: dict[int, list[int]] = {}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["who"] == "own":
            steps.setdefault(row["step"], []).append(intermediate_results(row["response"]))
    means = [mean(counts) for counts in steps.values()]
    return [mean(means[max(0, i - 4) : i + 1]) for i in range(len(means))]


def besides(name: str, seed: int, answered: dict, folder) -> dict:
    """Intermediate results per answer to the test problems."""
    return {"intermediate": [mean(map(intermediate_results, texts)) for texts in answered["sampled_texts"]]}


CURVES = {"intermediate results per answer": over_training, "reward of own answers": "reward/own"}
COLUMNS = {"intermediate results": "intermediate"}
CLAIMS = [
    *(Claim(f"luffy over {other} (points)", {"luffy": 1, other: -1})
      for other in ("sft", "rl_sft", "sft_grpo", "relift", "grpo", "luffy_unshaped")),
    Claim("luffy over sft, greedy (points)", {"luffy": 1, "sft": -1}, of="greedy"),
    Claim("luffy over grpo on what the base never solves (points)", {"luffy": 1, "grpo": -1}, among="hardest"),
    *(Claim(f"intermediate results per answer, luffy over {other}", {"luffy": 1, other: -1}, of="intermediate")
      for other in ("sft", "rl_sft", "relift")),
]  # fmt: skip
