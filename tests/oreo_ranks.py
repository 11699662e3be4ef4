"""Gradients of an update of oreo.py on fixed rows, used by faults/equality.py; and what test_oreo_runs.py runs on two
ranks: collect, train, search."""

import json
import random
import sys

import torch
from torch.distributed.tensor import DTensor

sys.path.insert(0, ".")
import oreo  # noqa: E402
from common.rows import held_out_examples  # noqa: E402
from common.run import open_sampler  # noqa: E402
from common.search import search_answers, state_values, step_ids  # noqa: E402
from common.trainer import ValueModel, init_world, launch, load_policy, load_tokenizer  # noqa: E402
from oreo import Args, Row, accumulate_gradient  # noqa: E402
from tests.conftest import NANO, parsed  # noqa: E402
from tests.ranks import nano, whole_gradient  # noqa: E402

SMALL = [
    "--preset", "tiny", "--data", "igsm:1-2", "--igsm_problems", "12", "--eval_data", "igsm:1-2", "--eval_limit", "4",
    "--max_response_tokens", "40", "--batch_size", "8", "--steps", "3", "--samples", "4", "--eval_every", "2",
    "--save_every", "0", "--lr", "1e-3", "--verifier", "tests.rewards:even_length",
]  # fmt: skip
KINDS = ("oreo-token", "oreo-step", "oreo-response", "rejection", "dpo", "kto")


def fixed_units(kind: str) -> list[list[Row]]:
    """Rows of mixed lengths, some with tokens of an environment in them; pairs for dpo."""
    rng = random.Random(5)
    rows = []
    for i in range(12):
        response = [rng.randrange(2, 61) for _ in range(rng.randint(1, 30))]
        actions = [True] + [rng.random() < 0.8 for _ in response[1:]]
        steps = [k == 0 or (a and rng.random() < 0.3) for k, a in enumerate(actions)]
        prompt = [rng.randrange(2, 61) for _ in range(rng.randint(1, 20))]
        rows.append(Row(prompt, response, actions, steps, float(i % 2 == 0), i // 4, i))
    return [rows[i : i + 2] for i in range(0, 12, 2)] if kind == "dpo" else [[row] for row in rows]


def gradients(world, kind: str, micro_batch_tokens: int):
    """({name: gradient} of policy and value, losses, what was measured of the rows) of an update in which the policy
    is not the reference and the value's head not zero."""
    stage, _, variant = kind.partition("-")
    words = ["--stage", stage, *(["--variant", variant] if variant else [])]
    args = parsed("oreo", *words, beta=0.3, kl_coef=0.3, micro_batch_tokens=micro_batch_tokens)
    policy, reference, value = nano(world), nano(world, seed=4), nano(world, seed=5, kind=ValueModel)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in value.named_parameters():
        if name.endswith("score.weight"):
            head = torch.randn(1, NANO["hidden_size"], generator=generator)
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            rows = head if world.rank == 0 else head[:0]  # one row: it is rank 0's
            local.data.copy_(rows[: len(local)])
    units = fixed_units(kind)
    losses = accumulate_gradient(policy, value, reference.requires_grad_(False), units, args, world)
    grads = whole_gradient(policy, value)
    rows = [row for unit in units for row in unit]
    measured = [[row.logp, row.log_ratio, row.kl, row.last_value, *(row.values or [])] for row in rows]
    values = state_values(value, [row.prompt for row in rows], world, args.micro_batch_tokens)
    return grads, {"losses": losses, "measured": measured, "values": values}


def settings(model: str, *words) -> Args:
    """Those of a run of seconds."""
    return parsed("oreo", *SMALL, "--model", model, *words)


class Counts(torch.nn.Module):
    """A value model: how often one token is in a text."""

    def __init__(self, token: int):
        super().__init__()
        self.token = token

    def forward(self, batch):
        counts = (batch.input_ids[0] == self.token).cumsum(0)
        starts = batch.predictors[:-1] + 1
        return (counts[batch.predictors] - torch.cat([counts.new_zeros(1), counts[starts - 1]])).float()


def search(kind: str, width: int, model: str, value):
    """The held-out examples, and the answers that a search of this kind finds to each."""
    args, world = settings(model), init_world()
    policy, tokenizer = load_policy(model, world), load_tokenizer(model)
    examples = held_out_examples(tokenizer, args)
    sampler = open_sampler(policy, tokenizer, args, world)
    sampler.sync(policy, version=0)
    found = search_answers(
        kind, sampler, value, [e.prompt for e in examples], [e.index for e in examples], world, width=width,
        max_steps=60, max_tokens=args.max_response_tokens, step_ends=step_ids(tokenizer, args.step_delimiters),
        micro_batch_tokens=args.micro_batch_tokens,
    )  # fmt: skip
    return examples, found


def run(model: str, out: str) -> None:
    """Collect and train, then search with what came of it."""
    oreo.main(settings(model, "--out", out))
    world = init_world()
    _, found = search("beam", 2, f"{out}/model", load_policy(f"{out}/value", world, kind=ValueModel))
    if world.main:
        with open(f"{out}/found.json", "w") as file:
            json.dump([[c.response for c in answers] for answers in found], file)


if __name__ == "__main__":
    launch(lambda words: run(*words), sys.argv[1:])
