"""OREO: a value that learns from outcomes which step was wrong, on walks through a grid (benchmarks/blocks/walks.py).

Whether a step is right stands in the question. A critic of this size must be able to read it, or no value could show
anything. So a gate comes first and never sees OREO: a value model, trained on exact labels of steps, must place the
right next step above the wrong one in over 80 % of matched pairs (same question, same place, right walk so far).

Found before any run of OREO: the gate failed at 56 to 66 % on three tasks (a list of edges, two or one from each node;
a grid of 25) whose start had learned right walks until it found some. Such a start takes wrong steps because it cannot
tell them. So the start here learns from imperfect walks, 12 % of whose steps go wrong and end them: it can tell, and
errs all the same, in two answers of three. There the gate held (90 % after 75 updates).

Prediction, before any run of OREO. OREO's value, which sees only whether a whole answer was right, passes 50 % from
4,000 answers on, and rises with their number: a wrong step makes its answer wrong with certainty, so the mean outcome
after it is 0 and after a right step is not. A beam that keeps what this value prefers drops wrong steps as they come
and is right more often than a sampled answer, by 10 points or more. A beam with random values drops at random and is no
better than sampling. As a policy, OREO tells wrong steps from the right ones before them, which rejection sampling
leaves out and DPO cannot separate: OREO is not below either at 24,000 answers.

Refuted if OREO's value is at 50 %, if it does not rise with the answers, or if the beam with it is not above the beam
with random values. (Greedy answers became a control of the search when the start was found at 35 % sampled and 83 %
greedy.)
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean

import torch
import tyro

from benchmarks.blocks import Claim, Run, made, walks
from common.data import pack
from common.metrics import read_metrics
from common.search import state_values
from common.trainer import ValueModel, export, init_world, load_policy, load_tokenizer

VERIFIER, MAX_TOKENS, START = "benchmarks.blocks.walks:reward", 24, "sft"
COMMON = f"--verifier {VERIFIER} --seed {{seed}} --out {{out}}"
TASK = f"--preset tiny {COMMON} --max_response_tokens {MAX_TOKENS} --eval_every 0"
STEP = f"--step_delimiters {' '.join(walks.NODES)}"  # every node is a step
LEARN = f"oreo.py {TASK} --model {{sft}}/model --steps {{steps}} --lr {{lr}} --stage"
SEARCH = f"eval.py {COMMON} --data {{test}}/rows.jsonl --max_tokens {MAX_TOKENS} --temperature {{t}} {STEP}"
RATES = dict(lrs=(3e-5, 1e-4, 3e-4, 1e-3))
TEST, VALID, STEPS, SEEDS = "{test}/rows.jsonl", "{valid}/rows.jsonl", (0, 60), 5  # 0: one pass over the answers
SIZES = {"4k": 500, "24k": 3000, "80k": 10000}  # problems with 8 answers each


def problems(n: int, seed: int, more: str = "") -> Run:
    """A file of problems."""
    return made(f"-m benchmarks.blocks.walks --n {n} --seed {seed}{more} --out {{out}}/rows.jsonl", once=True)


def sampled(data: str) -> Run:
    """Graded answers of the start, 8 to each problem."""
    command = f"oreo.py {TASK} --stage collect --model {{sft}}/model --data {{{data}}}/rows.jsonl --samples 8"
    return made(command, once=True)


def judge(value: str) -> Run:
    """How many matched pairs a value model orders correctly."""
    return Run(f"-m benchmarks.blocks.oreo --value {value} --pairs {{test_answers}}/rows.jsonl --out {{out}}", model="")


def search(policy: str, how: str, temperature: int = 1) -> Run:
    """A policy's answers to the test problems, chosen by a search."""
    return Run(SEARCH.replace("{t}", str(temperature)) + f" --model {{{policy}}}/model {how}", model="")


RUNS = {
    "test": problems(300, 1),
    "valid": problems(300, 2),
    "walks": problems(20000, 3, " --slips 0.12"),
    **{f"problems_{size}": problems(n, 4) for size, n in SIZES.items()},
    "sft": Run(f"luffy.py {TASK} --method sft --model {{tiny}} --data {{walks}}/rows.jsonl --batch_size 64 --lr 1e-3 "
               "--steps 400 --schedule constant --warmup 0.02", once=True),
    "test_answers": sampled("test"),
    **{f"answers_{size}": sampled(f"problems_{size}") for size in SIZES},
    "gate": Run("-m benchmarks.blocks.oreo --model {sft}/model --labels {answers_24k}/rows.jsonl "
                "--pairs {test_answers}/rows.jsonl --seed {seed} --out {out}", model=""),
    # as many updates as oreo_24k: these read the correct answers, or pairs, which are fewer
    "rejection": Run(LEARN + " rejection --epochs 2.87 --rows {answers_24k}/rows.jsonl", **RATES),
    "dpo": Run(LEARN + " dpo --epochs 1.525 --rows {answers_24k}/rows.jsonl", lrs=(1e-5, 3e-5, 1e-4), trained=8),
    **{f"oreo_{size}": Run(LEARN + f" oreo --rows {{answers_{size}}}/rows.jsonl", trained=14, **RATES)
       for size in SIZES},
    **{f"value_{size}": judge(f"{{oreo_{size}}}/value") for size in SIZES},
    "random": made("-m benchmarks.blocks.oreo --model models/scratch --seed {seed} --out {out}"),
    "greedy": search("oreo_24k", "--search none --n 1", temperature=0),
    "sampling": search("oreo_24k", "--search none --n 8"),
    "best_of_5": search("oreo_24k", "--search best_of_n --width 5 --value {oreo_24k}/value"),
    "beam": search("oreo_24k", "--search beam --width 5 --value {oreo_24k}/value"),
    "beam_random": search("oreo_24k", "--search beam --width 5 --value {random}/value"),
    "sft_sampling": search("sft", "--search none --n 8"),
    "sft_greedy": search("sft", "--search none --n 1", temperature=0),
    "sft_beam": search("sft", "--search beam --width 5 --value {oreo_24k}/value"),
    "sft_beam_random": search("sft", "--search beam --width 5 --value {random}/value"),
}  # fmt: skip


def besides(name: str, seed: int, answered: dict, folder) -> dict:
    """Ordered pairs of the gate and of values (percent, one a pair); correct answers of searches."""
    if (pairs := folder(name) / "pairs.json").exists():
        return {"pairs": [100 * share for share in json.loads(pairs.read_text())]}
    if (samples := folder(name) / "samples.jsonl").exists() and not answered:
        records = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda record: record["gold"])
        return {"searched": [100 * mean(walks.reward(a["text"], r["gold"]) for a in r["answers"]) for r in records]}
    return {}


COLUMNS = {"pairs in order, %": "pairs", "by search, %": "searched"}
CURVES = {"value, correct less incorrect answers": lambda folder: [
    row["value/right"] - row["value/wrong"] for row in read_metrics(folder) if row.get("value/wrong") is not None
]}  # fmt: skip
CONTROLS = {
    "beam": ("beam_random", "sampling", "best_of_5", "greedy"),
    "sft_beam": ("sft_beam_random", "sft_sampling", "sft_greedy"),
}
CLAIMS = [
    Claim("gate: a critic of exact labels orders over 80 % of pairs", {"gate": 1}, of="pairs", less=80),
    *(Claim(f"OREO's value from {size} answers orders over 50 % of pairs", {f"value_{size}": 1}, of="pairs", less=50)
      for size in SIZES),
    Claim("OREO's value from 80k answers over that from 4k", {"value_80k": 1, "value_4k": -1}, of="pairs"),
    *(Claim(f"{beam} (with OREO's value) over {other} (points)", {beam: 1, other: -1}, of="searched")
      for beam, others in CONTROLS.items() for other in others),
    *(Claim(f"OREO's policy over {other} (points)", {"oreo_24k": 1, other: -1}) for other in ("rejection", "dpo")),
    *(Claim(f"OREO's policy over {other}, greedy (points)", {"oreo_24k": 1, other: -1}, of="greedy")
      for other in ("rejection", "dpo")),
]  # fmt: skip


@dataclass
class Flags:
    out: str
    """Folder for value/ and pairs.json."""
    model: str = ""
    """Model to make a critic of, or, without --labels, a value model that knows nothing."""
    labels: str = ""
    """Graded answers whose steps are the critic's labels."""
    value: str = ""
    """Value model to judge instead."""
    pairs: str = ""
    """Graded answers that the matched pairs are taken from."""
    steps: int = 400
    """Updates of the critic, of 64 answers."""
    lr: float = 1e-3
    """Its peak learning rate."""
    seed: int = 0
    """Seed of order and head."""


def read(path: str, tokenizer) -> list[dict]:
    """Return graded answers, with `right`: for each node, is the walk up to it one along edges?"""
    rows = list(map(json.loads, Path(path).read_text().splitlines()))
    texts = tokenizer.batch_decode([row["response_ids"] for row in rows], skip_special_tokens=True)
    return [row | {"right": walks.right_steps(text, row["gold"])} for row, text in zip(rows, texts, strict=True)]


def matched_pairs(rows: list[dict]) -> list[tuple[list[int], list[int], list[int]]]:
    """Return (prompt and right walk so far, right next tokens, wrong ones), as ids, wherever the answers have both."""
    following: dict[tuple, tuple[set, set]] = {}
    for row in rows:
        ids, right = row["response_ids"], row["right"]
        for i in range(right.index(False) + 1 if False in right else len(right)):  # up to the first wrong step
            state = (*row["prompt_ids"], *ids[:i])
            following.setdefault(state, (set(), set()))[not right[i]].add(ids[i])
    return [(list(state), sorted(a), sorted(b)) for state, (a, b) in following.items() if a and b]


def in_order(value, pairs: list, world) -> list[float]:
    """Return for each place the fraction of its (right, wrong) pairs in which the right step has the higher value."""
    values = iter(state_values(value, [state + [x] for state, a, b in pairs for x in a + b], world, 16384))
    shares = []
    for _, right, wrong in pairs:
        high, low = ([next(values) for _ in side] for side in (right, wrong))
        shares.append(mean((x > y) + (x == y) / 2 for x in high for y in low))
    return shares


def train_critic(value, rows: list[dict], flags: Flags) -> None:
    """Fit the value of the prompt to 1, and the value after each node to its label, 1 or 0, by squared error."""
    optimizer, rng = torch.optim.AdamW(value.parameters(), weight_decay=0.0), random.Random(flags.seed)
    for step in range(flags.steps):
        batch = rng.sample(rows, 64)
        labels = [x for row in batch for x in [1.0, *map(float, row["right"])][: len(row["response_ids"])]]  # [N]
        values = value(pack([(row["prompt_ids"], row["response_ids"]) for row in batch]))  # [N]
        loss = (values - torch.tensor(labels)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(value.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = flags.lr * min(1, (step + 1) / 20) * (1 - step / flags.steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.4f}", flush=True)


def main(flags: Flags) -> None:
    world, path, out = init_world(), flags.value or flags.model, Path(flags.out)
    tokenizer = load_tokenizer(path)
    value = load_policy(path, world, kind=ValueModel, new_head=not flags.value, seed=flags.seed)
    if flags.labels:
        train_critic(value, read(flags.labels, tokenizer), flags)
    elif flags.model:
        torch.nn.init.normal_(value.lm.score.weight, generator=torch.Generator().manual_seed(flags.seed))
    if flags.model:
        export(value, tokenizer, out / "value", world)
    if flags.pairs:
        shares = in_order(value, matched_pairs(read(flags.pairs, tokenizer)), world)
        print(f"{len(shares)} places, in order: {mean(shares):.3f}")
        (out / "pairs.json").write_text(json.dumps(shares))


if __name__ == "__main__":
    main(tyro.cli(Flags, use_underscores=True))
