"""LUFFY's policy shaping: it must help more, the rarer the token that the trace begins with.

Bases: models/tiny is taught its skill again, and then answers without reasoning for a number of habit steps, so that
its probability of beginning to reason, p, is about 0.1, 0.01, 0.001 or 0.0001. LUFFY trains each base with shaping
(f = p / (p + 0.1)) and without (f = p), on traces in the base's own style. The rest of a trace is likely once it has
begun.

Prediction. The gradient w.r.t. log p is 0.1 p / (p + 0.1)^2 with shaping and p without: 0.25 against 0.1 at p = 0.1,
and 0.001 against 0.0001 at p = 0.0001. Relative to a token of p = 0.9 shaping raises the first token 25-fold at 0.1
and 100-fold at 0.0001. So shaping takes up reasoning sooner, the more so the rarer it is: with SGD the unshaped run
does not begin to reason at p = 0.001 within the 30 steps, and the shaped one does. AdamW divides by the gradient's
own scale, which hides most of it: there the unshaped run is late by a few steps at p = 0.0001 (5 points of accuracy
or more) and equal at 0.1.

Refuted if the gain by shaping at the rarest p is not larger than at p = 0.1, under SGD at least.

(In the first quick run, of 20 steps, the shaped run had not begun to reason at p = 0.0001: a full run has 40 steps
since. In it neither had begun at p = 0.0001, at the rates that answer best. In trials of 160 steps on seeds 8 and 9,
at a rate of 2e-4, the shaped run began at steps 130 and 90, and the unshaped one did not; at 5e-4 both began within 25
steps and answered worse. So this level has 200 steps since, and a prediction of its own: 10 points for shaping, each
run at its best rate, and at equal rates of 2e-4 reasoning is taken up sooner. Both arms then chose 2e-4.)

    python -m benchmarks.blocks.shaping habit ROWS.jsonl        answers without reasoning
    python -m benchmarks.blocks.shaping probability MODEL OUT   p, the mean over 300 test problems
    python -m benchmarks.blocks.shaping sgd [luffy.py's flags]  luffy.py with SGD (momentum 0.9) for AdamW
"""

import json
import sys
from functools import partial
from pathlib import Path
from statistics import fmean as mean

from benchmarks.blocks import Claim, Run, made
from common.metrics import read_metrics

RUN = "--preset tiny --seed {seed} --out {out} --eval_every 0 --log_samples 0"
SFT = "luffy.py --method sft --schedule constant --warmup 0 --batch_size 32 " + RUN
LEVELS = {"0.1": (10, 1e-4), "0.01": (15, 1e-4), "0.001": (60, 1e-4), "0.0001": (32, 1e-3)}  # habit steps, rate
LONG = {"0.0001": 200}  # steps of LUFFY, where {steps} are too few to begin
ADAM, SGD = (5e-5, 2e-4, 5e-4), (0.03, 0.1, 0.3)
ARMS = {"shaped": "", "plain": " --shaping_gamma 0"}

TEST, VALID, STEPS, SEEDS, START = "{test}/rows.jsonl", "{valid}/rows.jsonl", (40, 20), 5, ""
PROBLEMS = "-m igsm --ops 5 8 --style symbolic --modulus 23 --max_params 4 --max_literal 9 --no_shuffle --subgoals"
RUNS = {
    "train": made(PROBLEMS + " --n 5000 --split train --out {out}/rows.jsonl", once=True),
    "test": made(PROBLEMS + " --n 300 --split test --out {out}/rows.jsonl", once=True),
    "valid": made(PROBLEMS + " --n 300 --split test --seed 1 --out {out}/rows.jsonl", once=True),
    "habit": made("-m benchmarks.blocks.shaping habit {out}/rows.jsonl", once=True),
    "skill": made(SFT + " --model {tiny} --data {train}/rows.jsonl --lr 3e-4 --steps 80", once=True),
}
for level, (steps, lr) in LEVELS.items():
    RUNS[f"base_{level}"] = Run(
        f"{SFT} --model {{skill}}/model --data {{habit}}/rows.jsonl --lr {lr} --steps {steps}", once=True
    )
    RUNS[f"probability_{level}"] = made(
        f"-m benchmarks.blocks.shaping probability {{base_{level}}}/model {{out}}/p.json", once=True
    )
for optimizer, script, rates, levels in (
    ("", "luffy.py", ADAM, LEVELS),
    ("_sgd", "-m benchmarks.blocks.shaping sgd --weight_decay 0", SGD, ("0.1", "0.001")),
):
    for level in levels:
        steps = LONG.get(level, "{steps}")
        flags = f" --model {{base_{level}}}/model --data {{train}}/rows.jsonl --lr {{lr}} --steps {steps} {RUN}"
        RUNS |= {f"{arm}_{level}{optimizer}": Run(script + flags + f, lrs=rates, trained=7) for arm, f in ARMS.items()}


def taken_up(folder: Path) -> list[float]:
    """How far own answers have the traces' length, by step: 1 if they are as long. Nothing for SFT."""
    rows = [row for row in read_metrics(folder) if "length/own" in row]
    return [min(1.0, row["length/own"] / row["length/teacher"]) for row in rows]


def besides(name: str, seed: int, answered: dict, folder) -> dict:
    """p of a base; for the others the mean over the steps of how far reasoning is taken up."""
    if name.startswith("base_"):
        found = folder(name.replace("base", "probability")) / "p.json"
        return {"probability": json.loads(found.read_text())}
    return {"taken_up": mean(taken_up(folder(name)))}


def gain(level: str, optimizer: str = "", weight: int = 1) -> dict[str, float]:
    """The contrast of shaping against none."""
    return {f"shaped_{level}{optimizer}": weight, f"plain_{level}{optimizer}": -weight}


COLUMNS = {"p of reasoning": "probability", "reasoning taken up (mean over steps)": "taken_up"}
CURVES = {"reasoning taken up": taken_up}
CLAIMS = [
    Claim("shaped over plain at p = 0.0001 (points)", gain("0.0001")),
    Claim("shaped over plain at p = 0.0001 (reasoning taken up)", gain("0.0001"), of="taken_up"),
    Claim("gain by shaping at p = 0.0001 less at 0.1 (points)", gain("0.0001") | gain("0.1", weight=-1)),
    Claim("gain by shaping at p = 0.0001 less at 0.1 (reasoning taken up)",
          gain("0.0001") | gain("0.1", weight=-1), of="taken_up"),
    Claim("SGD: shaped over plain at p = 0.001 (reasoning taken up)", gain("0.001", "_sgd"), of="taken_up"),
    Claim("SGD: gain by shaping at p = 0.001 less at 0.1 (reasoning taken up)",
          gain("0.001", "_sgd") | gain("0.1", "_sgd", weight=-1), of="taken_up"),
]  # fmt: skip


def probability(model: str) -> float:
    """Mean probability that an answer to a test problem begins with anything but the end of the reasoning."""
    import torch

    import luffy
    from common.data import pack
    from common.rows import read_examples
    from common.trainer import init_world, load_policy, load_tokenizer, parse_args

    world, tokenizer = init_world(), load_tokenizer(model)
    args = parse_args(luffy.Args, ["--preset", "tiny"], method=luffy.METHODS, preset=luffy.PRESETS)
    examples, _ = read_examples("igsm:5-8", tokenizer, args, split="test", traces="ignored", limit=300)
    end = tokenizer.convert_tokens_to_ids("</think>")
    with torch.no_grad():
        logp = load_policy(model, world)(pack([(e.prompt, [end]) for e in examples], world.device))  # [300]
    return (1 - logp.exp()).mean().item()


def main(what: str, *words: str) -> None:
    import luffy
    from common.trainer import launch, make_optimizer, parse_args
    from models.tiny.make import habit_rows

    if what == "habit":
        Path(words[0]).write_text("".join(json.dumps(row) + "\n" for row in habit_rows(4000)))
    elif what == "probability":
        Path(words[1]).write_text(json.dumps(probability(words[0])))
    else:  # with an epsilon far above the gradients AdamW is SGD with momentum, its rate lr / epsilon
        luffy.make_optimizer = partial(make_optimizer, eps=1.0)
        launch(luffy.main, parse_args(luffy.Args, list(words), method=luffy.METHODS, preset=luffy.PRESETS))


if __name__ == "__main__":
    main(*sys.argv[1:])
