"""Run by test_equality.py under torchrun: gradients of one update of each algorithm, written by rank 0."""

import sys

import torch

sys.path.insert(0, ".")
from common.trainer import init_world, launch  # noqa: E402
from tests import behavior_ranks, oreo_ranks, ranks, redi_ranks, relift_ranks  # noqa: E402

TABLE = {  # loss: function of (world, its name there, tokens of a micro-batch), that name
    **{f"luffy {name}": (ranks.gradient, name) for name in ("luffy", "grpo", "rl_sft", "sft")},
    **{f"relift {name}": (relift_ranks.gradient, name) for name in ("rl", "sft")},
    **{f"redi {name}": (redi_ranks.gradient, name) for name in redi_ranks.CASES},
    **{f"oreo {kind}": (oreo_ranks.gradients, kind) for kind in oreo_ranks.KINDS},
    **{f"behavior_injection {name}": (behavior_ranks.gradient, name) for name in ("rl", "masked", "sft")},
}
# of a micro-batch, by number of ranks: every sequence alone, a few together, all of a rank's in one row
TOKENS = {1: (1, 64, 10_000), 2: (1, 10_000), 4: (64,)}


def update(world, loss: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole gradient as one vector, parameters in the order of their names; and all numbers that were measured."""
    function, name = TABLE[loss]
    grads, measured = function(world, name, tokens)
    return torch.cat([grads[key].flatten() for key in sorted(grads)]).double(), torch.tensor(list(numbers(measured)))


def numbers(nested):
    """The numbers in dictionaries and lists, one after the other."""
    for value in nested.values() if isinstance(nested, dict) else nested:
        if isinstance(value, (dict, list, tuple)):
            yield from numbers(value)
        else:
            yield float(value)


def main(out: str) -> None:
    world = init_world()
    torch.set_num_threads(1)
    for loss in TABLE:
        for tokens in TOKENS[world.size]:
            found = update(world, loss, tokens)
            if world.main:
                torch.save(found, f"{out}/{loss}-{world.size}-{tokens}.pt")


if __name__ == "__main__":
    launch(main, sys.argv[1])
