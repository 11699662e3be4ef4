"""Gradients of RL and SFT updates of relift.py on fixed rows, used by faults/equality.py; settings of a short run."""

import torch

from relift import Args, Row, accumulate_gradient, accumulate_sft_gradient, policy_logps
from tests import ranks
from tests.conftest import parsed

SMALL = [
    "--preset", "tiny", "--model", "models/scratch", "--data", "igsm:1-2", "--igsm_problems", "40", "--batch_size", "4",
    "--group_size", "4", "--max_response_tokens", "40", "--steps", "3", "--eval_data", "igsm:1-2", "--eval_limit",
    "6", "--eval_every", "2", "--save_every", "0", "--lr", "1e-3", "--sft_lr", "1e-3", "--sft_data_size", "7",
]  # fmt: skip


def settings(*words, **changes) -> Args:
    return parsed("relift", *SMALL, *words, **changes)


def gradient(world, kind: str, micro_batch_tokens: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The whole gradient and the metrics of an "rl" or "sft" update."""
    args = Args(max_response_tokens=30, micro_batch_tokens=micro_batch_tokens, entropy_coef=0.01, sft_entropy_coef=0.01)
    policy = ranks.nano(world)
    rows = [
        Row(r.prompt, r.response, r.group, kind == "sft", [-1.0] * len(r.response), advantage=r.advantage)
        for r in ranks.fixed_rows()
    ]
    if kind == "sft":
        metrics = accumulate_sft_gradient(policy, rows, args, world)
    else:
        old = [logp - 0.1 for logp in policy_logps(policy, rows, args, world)]
        metrics = accumulate_gradient(policy, rows, old, args, world)
    return ranks.whole_gradient(policy), metrics
