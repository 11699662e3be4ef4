"""BRIDGE: behaviors prepare for RL where there is something to look for.

A question's conditions stand in the order of the solution, or in random order. In solution order the next line of the
solution is about the next condition. In random order the model must find which condition can be computed now. The
behaviors are about that: reflection names a later quantity and comes back, analysis repeats a condition.

Prediction, before the first run. In solution order reflection and analysis are noise: RL removes it, and the gain is
certainty, so it hardly shows in greedy answers. In random order analysis and reflection write down what the next line
needs, and RL can choose the helpful ones: with all behaviors RL gains more than without, greedy too. So the difference
between both gains is larger in random order. Subgoals alone gain like vanilla in both. dJ before RL ranks the arms as
their gains do.

Refuted if the interaction of order and behaviors is not positive, or if dJ and gain do not rank alike.

Arms are matched in accuracy after SFT, by trials of SFT alone (seed 0) on other problems: in random order all five
answer 13 to 18 % after 120 updates at one rate; in solution order, where 30 updates are enough, SFT_RATES holds the
rate at which each answers 20 to 26 %. RL has the rate of the preset in all arms.

(The first quick run had 20 updates of SFT in both orders. In random order every arm was then at 4 to 9 %, where RL
finds little to reward. The prediction is the same.)
"""

import json
from statistics import correlation, mean

from benchmarks.blocks import Claim, Run, made

ORDERS = {"ordered": "--no_shuffle", "shuffled": "--shuffle"}
ARMS = ("vanilla", "subgoal", "analysis", "reflection", "bridge")
SFT_STEPS = {"ordered": "30", "shuffled": "{steps}"}
SFT_RATES = {"ordered": (2e-4, 5e-5, 5e-4, 5e-4, 5e-4), "shuffled": (1e-3,) * 5}
PROBLEMS = "-m igsm --n 300 --ops 6 6 --style symbolic --modulus 23 --max_params 4 --max_literal 9 --split test"

TEST, VALID, STEPS, SEEDS, START, MAX_TOKENS = "{test_ordered}/rows.jsonl", "", (120, 20), 4, "", 240


def prepared(order: str, arm: str) -> str:
    """Flags of every command of an arm."""
    return (
        f"--preset tiny --arms {arm} {ORDERS[order]} --model {{tiny}} --base_problems 0 --rl_problems 2000 "
        f"--eval_problems 20 --sft_lr {SFT_RATES[order][ARMS.index(arm)]} --sft_steps {SFT_STEPS[order]} "
        "--steps {half} --eval_every 0 --seed {seed}"
    )


RUNS = {f"test_{order}": made(f"{PROBLEMS} {flag} --seed 400 --out {{out}}/rows.jsonl", once=True)
        for order, flag in ORDERS.items()}  # fmt: skip
for order in ORDERS:
    for arm in ARMS:
        name, flags, test = f"{order}_{arm}", prepared(order, arm), f"{{test_{order}}}/rows.jsonl"
        rl, models = f"{name}_rl", f"{{{name}_rl}}/{arm}"
        RUNS[rl] = Run(f"behavior_injection.py {flags} --out {{out}}", f"{{out}}/{arm}/rl/model", test=test, trained=8)
        RUNS[f"{name}_sft"] = Run(model=f"{models}/sft/model", test=test)
        RUNS[f"{name}_dJ"] = Run(f"-m tools.influence {flags} --influence_queries {{half}} --out {{{rl}}}", model="")


def besides(name: str, seed: int, answered: dict, folder) -> dict:
    """The influence of an arm's SFT model."""
    if not name.endswith("_dJ"):
        return {}
    arm = name.split("_")[1]
    found = folder(name.replace("dJ", "rl")) / arm / "influence" / "influence.json"
    return {"dJ": json.loads(found.read_text())["dJ"]}


def across(found: dict) -> dict:
    """The rank correlation of dJ before RL with the gain of RL, over all arms."""
    names = [name.removesuffix("_dJ") for name in found if name.endswith("_dJ")]
    gains = [mean(found[f"{name}_rl"]["sampled"]) - mean(found[f"{name}_sft"]["sampled"]) for name in names]
    influences = [found[f"{name}_dJ"]["dJ"] for name in names]
    return {"rank correlation": correlation(*([sorted(x).index(v) for v in x] for x in (influences, gains)))}


def gain(order: str, arm: str, weight: int = 1) -> dict[str, float]:
    """RL's gain, as weights of a claim."""
    return {f"{order}_{arm}_rl": weight, f"{order}_{arm}_sft": -weight}


COLUMNS = {"dJ": "dJ", "rank correlation of dJ and gain": "rank correlation"}
CLAIMS = [
    *(Claim(f"random order adds more to RL's gain with {arm} than to vanilla's (points)",
            gain("shuffled", arm) | gain("shuffled", "vanilla", -1)
            | gain("ordered", arm, -1) | gain("ordered", "vanilla")) for arm in ARMS[1:]),
    *(Claim(f"{order}: RL gains more with all behaviors than vanilla, {how} (points)",
            gain(order, "bridge") | gain(order, "vanilla", -1), of=how)
      for order in ORDERS for how in ("sampled", "greedy")),
    Claim("dJ before RL ranks the arms as their gains do (Spearman)", {"all": 1}, of="rank correlation"),
]  # fmt: skip
