"""A table of logits as a policy; and a small model that is sharded over the ranks, fixed rows, and the gradient of one
update of luffy.py on them; used by faults/equality.py and the other files of this kind."""

import functools
import random

import torch

from common.trainer import Policy, World, load_policy, reshard, whole
from luffy import METHODS, Args, Row, accumulate_gradient, accumulate_sft_gradient, policy_logps
from tests.conftest import NANO, f64

ONE_RANK = World(0, 1, 1, torch.device("cpu"))


class Bigram(torch.nn.Module):
    """A policy of one table: logits of the next token = W[token]; what the vectors of luffy and relift train."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(f64(table))

    def forward(self, batch, *, temperature=1.0, entropy=False):
        logits = self.table[batch.input_ids[0, batch.predictors]] / temperature
        logp = logits.log_softmax(-1)
        chosen = logp.gather(1, batch.targets[:, None])[:, 0]
        return (chosen, -(logp.exp() * logp).sum(-1)) if entropy else chosen


@functools.cache
def _nano(world, seed: int, kind: type) -> Policy:
    return load_policy("nano", world, from_config=NANO, seed=seed, kind=kind)


def nano(world, seed: int = 3, kind: type = Policy) -> Policy:
    """The model of this seed, without a gradient. It is made once: these tests take no optimizer's step."""
    model = _nano(world, seed, kind)
    reshard(model)  # after a forward without gradients the root's parameters are others, without .grad
    model.zero_grad(set_to_none=True)
    return model


def whole_gradient(*models: Policy) -> dict[str, torch.Tensor]:
    """{number of the model and name: gradient} of the models that have one, whole on every rank."""
    found = {}
    for i, model in enumerate(models):
        parameters = dict(model.named_parameters())
        if any(p.grad is not None for p in parameters.values()):  # then all have one
            found |= {f"{i} {name}": whole(p.grad).clone() for name, p in parameters.items()}
    return found


def fixed_rows() -> list[Row]:
    """Rows of mixed lengths, own and teacher's, with advantages whose sum is not zero."""
    rng = random.Random(5)

    def ids(n):
        return [rng.randrange(2, 61) for _ in range(n)]

    rows = []
    for i in range(13):
        response = ids(rng.randint(1, 30))
        teacher = i % 4 == 0
        rows.append(
            Row(ids(rng.randint(1, 20)), response, i // 4, teacher, None if teacher else [-1.0] * len(response),
                advantage=rng.uniform(-1, 1))
        )  # fmt: skip
    return rows


def gradient(world, method: str, micro_batch_tokens: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The whole gradient and the metrics of an update whose behavior policy is a little different."""
    clip = METHODS.get(method, {}).get("clip", 0.0)
    args = Args(
        method=method, max_response_tokens=30, micro_batch_tokens=micro_batch_tokens, entropy_coef=0.01, clip=clip
    )
    policy = nano(world)
    rows = fixed_rows()
    if method == "grpo":
        for row in rows:
            row.teacher, row.logps = False, row.logps or [-1.0] * len(row.response)
    old = [logp - 0.1 for logp in policy_logps(policy, rows, args, world)]
    if method == "sft":
        metrics = accumulate_sft_gradient(policy, rows, args, world)
    else:
        metrics = accumulate_gradient(policy, rows, old, args, world)
    return whole_gradient(policy), metrics
