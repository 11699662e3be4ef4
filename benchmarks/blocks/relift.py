"""ReLIFT: demonstrations belong where RL has no gradient, to the hardest questions.

Start: models/tiny after a little SFT on traces in its own style, so that about a third of the questions are hardest:
all 8 answers fail. From there RL alone, and RL with an SFT update on up to 4 demonstrations after every step: of the
hardest questions, of as many solved ones (the paper's control), or of as many at random. Every arm has equal steps,
answers and, as long as enough questions are hardest, equal numbers of demonstrations.

Prediction. On solved questions the policy writes correct answers already, and RL has a gradient there: a
demonstration adds little. On hardest questions RL has none, so that a demonstration is the only signal. Hence the
hardest arm is above the solved arm on the test problems that the start never solves, by 2 to 5 points, and above RL
alone there. In all the difference is 1 to 2 points, since the demonstrations are 20 times fewer than sampled answers,
and because one distribution makes all questions: what a demonstration of a solved one shows helps the others too. On
easy problems no arm loses.

Refuted if solved questions serve as well as hardest ones on the problems that the start never solves.

(The first quick run had 8 demonstrations after every third step, 80 in all. All arms were equal, also RL alone: too
small a dose to tell. The dose is larger since; the prediction is the same.)
"""

from benchmarks.blocks import Claim, Run, made

PROBLEMS = "-m igsm --ops 5 8 --style symbolic --modulus 23 --max_params 4 --max_literal 9 --no_shuffle --subgoals"
RUN = "--preset tiny --data {train}/rows.jsonl --seed {seed} --out {out} --eval_every 0 --log_samples 0"
ARM = f"relift.py --model {{start}}/model --lr {{lr}} --sft_lr {{lr}} --steps {{steps}} {RUN}"
RATES = dict(lrs=(2e-5, 6e-5, 2e-4), trained=7)  # half of the rows are read once before the second update

TEST, VALID, STEPS, SEEDS, START = "{test}/rows.jsonl", "{valid}/rows.jsonl", (60, 30), 5, "start"
RUNS = {
    "train": made(PROBLEMS + " --n 5000 --split train --out {out}/rows.jsonl", once=True),
    "test": made(PROBLEMS + " --n 300 --split test --out {out}/rows.jsonl", once=True),
    "valid": made(PROBLEMS + " --n 300 --split test --seed 1 --out {out}/rows.jsonl", once=True),
    "start": Run("luffy.py --method sft --schedule constant --warmup 0 --batch_size 16 --lr 2e-4 --steps 12 "
                 "--model {tiny} " + RUN, once=True),
    "rl": Run(ARM + " --sft_data_size -1", **RATES),
    **{name: Run(f"{ARM} --sft_data_size 4 --sft_every 1 --sft_on {name}", **RATES)
       for name in ("hardest", "solved", "random")},
}  # fmt: skip

CURVES = {"hardest questions of a step": "group/hardest", "log-prob of demonstrations": "sft/logp"}
CLAIMS = [
    Claim("hardest over solved on what the start never solves (points)", {"hardest": 1, "solved": -1}, among="hardest"),
    Claim("hardest over solved (points)", {"hardest": 1, "solved": -1}),
    Claim("hardest over solved, greedy (points)", {"hardest": 1, "solved": -1}, of="greedy"),
    Claim("hardest over RL alone on what the start never solves (points)", {"hardest": 1, "rl": -1}, among="hardest"),
    Claim("hardest over RL alone on what the start finds easy (points)", {"hardest": 1, "rl": -1}, among="easy"),
]
