"""Gradients of updates of behavior_injection.py on fixed rows, used by faults/equality.py; and an influence run, which
test_behavior_runs.py starts on two ranks."""

import sys
from dataclasses import replace

import torch

sys.path.insert(0, ".")
from behavior_injection import Args, accumulate_gradient, accumulate_sft_gradient, policy_logps  # noqa: E402
from common import verifiers  # noqa: E402
from common.trainer import launch  # noqa: E402
from common.verifiers import Verdict  # noqa: E402
from tests.conftest import parsed  # noqa: E402
from tests.ranks import fixed_rows, nano, whole_gradient  # noqa: E402
from tools import influence  # noqa: E402


def odd_length(responses, golds, **_):
    """A verifier by which even an untrained model is right half of the time."""
    return [Verdict(float(len(response) % 2), "ok") for response in responses]


def gradient(world, what: str, micro_batch_tokens: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The whole gradient and the metrics of an update: of RL, of RL with a KL mask, or of SFT."""
    args = Args(
        micro_batch_tokens=micro_batch_tokens, entropy_coef=0.01, kl_coef=0.3, sft_rows_per_mean=4,
        kl_mask=0.01 if what == "masked" else 0.0,
    )  # fmt: skip
    policy = nano(world)
    rows = [replace(row, teacher=False, logps=[-1.0] * len(row.response)) for row in fixed_rows()]
    if what == "sft":
        metrics = accumulate_sft_gradient(policy, rows, args, world)
    else:
        old = [logp - 0.1 for logp in policy_logps(policy, rows, args, world)]
        reference = nano(world, seed=4).requires_grad_(False)
        metrics = accumulate_gradient(policy, rows, old, policy_logps(reference, rows, args, world), args, world)
        assert (0 < metrics["policy/masked"] < 1) == (what == "masked"), "the mask is to leave some rows out"
    return whole_gradient(policy), metrics


def main(words: list[str]) -> None:
    verifiers.grade = odd_length
    influence.main(parsed("tools.influence", *words))


if __name__ == "__main__":
    launch(main, sys.argv[1:])
