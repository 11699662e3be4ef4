"""Fixed rows and the gradient of one update of luffy.py on them; used by faults/equality.py and relift_ranks.py."""

import dataclasses
import random
import sys

import torch
from torch.distributed.tensor import DTensor

sys.path.insert(0, ".")
from common.trainer import load_policy  # noqa: E402
from luffy import METHODS, Args, Row, accumulate_gradient, accumulate_sft_gradient, policy_logps  # noqa: E402
from tests.conftest import NANO  # noqa: E402


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
    """The whole gradient and the metrics of an update whose behaviour policy is a little different."""
    args = dataclasses.replace(
        Args(method=method, max_response_tokens=30, micro_batch_tokens=micro_batch_tokens, entropy_coef=0.01),
        **{k: v for k, v in METHODS.get(method, {}).items() if k in ("clip",)},
    )
    policy = load_policy("nano", world, from_config=NANO, seed=3)
    rows = fixed_rows()
    if method == "grpo":
        for row in rows:
            row.teacher, row.sampler_logps = False, row.sampler_logps or [-1.0] * len(row.response)
    old = [logp - 0.1 for logp in policy_logps(policy, rows, args, world)]
    if method == "sft":
        metrics = accumulate_sft_gradient(policy, rows, args, world)
    else:
        metrics = accumulate_gradient(policy, rows, old, args, world)
    grads = {}
    for name, p in policy.named_parameters():
        grads[name] = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
    return grads, metrics
