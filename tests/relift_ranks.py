"""Run by test_relift_runs.py under torchrun: gradients of RL and SFT updates on fixed rows, and a short run."""

import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, ".")
import common.metrics  # noqa: E402
import relift  # noqa: E402
from common.trainer import init_world, launch, parse_args  # noqa: E402
from relift import Args, Row, accumulate_gradient, accumulate_sft_gradient, policy_logps  # noqa: E402
from tests import ranks  # noqa: E402

VECTORS = json.loads((Path(__file__).parent / "vectors" / "relift.json").read_text())
TOKENS = (32, 100, 10_000)  # of a micro-batch
SMALL = [
    "--preset", "tiny", "--model", "models/scratch", "--data", "igsm:1-2", "--igsm_problems", "40", "--batch_size", "4",
    "--group_size", "4", "--max_response_tokens", "40", "--steps", "3", "--eval_data", "igsm:1-2", "--eval_limit",
    "6", "--eval_every", "2", "--save_every", "0", "--lr", "1e-3", "--sft_lr", "1e-3", "--sft_data_size", "7",
]  # fmt: skip


def settings(*words, **changes) -> Args:
    args = parse_args(Args, [*SMALL, *map(str, words)], method=relift.METHODS, preset=relift.PRESETS)
    return dataclasses.replace(args, **changes)


class Bigram(torch.nn.Module):
    """A policy of one table: logits of the next token = W[token]; what the vectors' SFT updates train."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(table, dtype=torch.float64))

    def forward(self, batch, *, temperature=1.0, entropy=False):
        logits = self.table[batch.input_ids[0, batch.predictors]] / temperature
        logp = logits.log_softmax(-1)
        chosen = logp.gather(1, batch.targets[:, None])[:, 0]
        return (chosen, -(logp.exp() * logp).sum(-1)) if entropy else chosen


def sft_update(name: str, micro_batch_tokens: int) -> tuple[dict, list[Row], Args]:
    """A case of the vectors, its demonstrations, and the settings of its update."""
    data = VECTORS["sft_update_policy"]
    case = data["cases"][name]
    rows = [
        Row(data["prompts"][i], data["targets"][i][: int(sum(data["response_mask"][i]))], i, True) for i in case["rows"]
    ]
    args = Args(
        sft_rows_per_mean=case["sft_micro_batch_size"], sft_entropy_coef=case["entropy_coeff"],
        micro_batch_tokens=micro_batch_tokens,
    )
    return case, rows, args


def gradient(world, kind: str, micro_batch_tokens: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The whole gradient and the metrics of an "rl" or "sft" update on the rows of test_luffy_runs.py."""
    args = Args(
        max_response_tokens=30, micro_batch_tokens=micro_batch_tokens, entropy_coef=0.01, sft_entropy_coef=0.01
    )
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


def main(out: str) -> None:
    world = init_world()
    torch.set_num_threads(1)
    for kind in ("rl", "sft"):
        for tokens in TOKENS:
            grads, metrics = gradient(world, kind, tokens)
            if world.main:
                torch.save((grads, metrics), f"{out}/{kind}-{tokens}.pt")
    for name in VECTORS["sft_update_policy"]["cases"]:
        case, rows, args = sft_update(name, 1000)
        policy = Bigram(case["W_before"])
        accumulate_sft_gradient(policy, rows, args, world)
        dist.all_reduce(policy.table.grad)  # what FSDP does: the mean over ranks
        if world.main:
            torch.save(policy.table.grad / world.size, f"{out}/{name}.pt")
    common.metrics.plot_curves = lambda *_: None  # drawing takes longer than training here
    relift.main(settings("--out", f"{out}/two", "--eval_every", "1", "--save_every", "3"))


if __name__ == "__main__":
    launch(main, sys.argv[1])
