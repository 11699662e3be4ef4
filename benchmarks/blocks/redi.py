"""REDI: what incorrect traces add to correct ones, best against best.

All rows learn from the same pairs: a correct trace of the generator and an incorrect answer of another model (the same
SFT at another seed), in equal updates. Alpha 0 gives the incorrect traces no weight and is the control. Each alpha has
the best of four rates, chosen on validation problems. There are two starts: short, an SFT that ended early, and long,
one that more of the same traces hardly improves.

Prediction, before the first run. From the short start correct traces still teach, and incorrect ones add nothing that
can be measured (under a point). From the long start alpha 0 stands still, and alpha 0.8 gains about a point over it:
the traces of a pair share their tokens up to the first wrong one, where the gradients of both cancel for the most part.
What is left pushes down likely mistakes, which correct traces no longer do. Alpha 1 needs a smaller rate than alpha 0.8
and is not above it, because no part of its gradient holds the shared tokens up.

Refuted if alpha 0.8 is not above alpha 0 from the long start. Earlier trials, with the student's own negatives and 40
to 60 updates, found +0.9 +- 0.5 at 1e-5, -5.7 +- 1.5 at 6e-5, and +0.3 +- 0.7 best against best.
"""

import json

from benchmarks.blocks import Claim, Run, made
from common.metrics import read_metrics

PROBLEMS = "-m igsm --ops 5 8 --style symbolic --modulus 23 --max_params 4 --max_literal 9 --no_shuffle --split test"
COMMON = "--preset tiny --eval_every 0 --out {out}"
SFT = f"redi.py {COMMON} --stage sft --model {{tiny}}"
LEARN = f"redi.py {COMMON} --seed {{seed}} --data {{pairs}}/pairs.jsonl --steps {{steps}} --lr {{lr}}"
STARTS, ALPHAS = {"short": "--steps 20", "long": "--epochs 3"}, {"alpha0": 0, "redi": 0.8, "symmetric": 1}

TEST, VALID, STEPS, SEEDS, START = "{test}/rows.jsonl", "{valid}/rows.jsonl", (60, 20), 5, "long_sft"
RUNS = {
    "test": made(PROBLEMS + " --n 300 --out {out}/rows.jsonl", once=True),
    "valid": made(PROBLEMS + " --n 300 --seed 1 --out {out}/rows.jsonl", once=True),
    "peer": made(f"{SFT} --epochs 3 --seed 9{{seed}}"),
    "pairs": made("-m tools.redi_data --preset tiny --model {peer}/model --igsm_problems 3000 --seed {seed} "
                  "--out {out}"),
    **{f"{start}_sft": Run(f"{SFT} {length} --seed {{seed}}") for start, length in STARTS.items()},
    **{f"{start}_{name}": Run(f"{LEARN} --model {{{start}_sft}}/model --alpha {alpha}", lrs=(1e-5, 3e-5, 6e-5, 1e-4))
       for start in STARTS for name, alpha in ALPHAS.items()},
}  # fmt: skip


def besides(name: str, seed: int, answered: dict, folder) -> dict:
    """Correct traces that were read: one a row or pair of every step."""
    args = json.loads((folder(name) / "args.json").read_text())
    return {"demonstrations": args["batch_size"] * sum(row["step"] > 0 for row in read_metrics(folder(name)))}


CURVES = {f"log-prob of {kind} traces, nats a token": f"logp/{name}"
          for kind, name in (("correct", "chosen"), ("incorrect", "rejected"))}  # fmt: skip
CLAIMS = [
    *(Claim(f"{start} start: redi over {other} (points)", {f"{start}_redi": 1, f"{start}_{other}": -1})
      for start in STARTS for other in ("alpha0", "symmetric", "sft")),
    *(Claim(f"{start} start: redi over alpha0, greedy", {f"{start}_redi": 1, f"{start}_alpha0": -1}, of="greedy")
      for start in STARTS),
    Claim("incorrect traces add more from the long start than from the short one (points)",
          {"long_redi": 1, "long_alpha0": -1, "short_redi": -1, "short_alpha0": 1}),
]  # fmt: skip
