"""Fixed pairs and the gradient of one update of redi.py on them; used by faults/equality.py."""

import random
from array import array

from redi import Args, Pair, accumulate_gradient
from tests.ranks import nano, whole_gradient

CASES = ("sft", "redi", "redi-single", "dpo", "simpo")


def fixed_pairs(case: str) -> list[Pair]:
    """Pairs of mixed lengths and weights; in redi-single a third has no right and a third no wrong trace."""
    rng = random.Random(5)

    def ids(low, high):
        return array("i", [rng.randrange(2, 61) for _ in range(rng.randint(low, high))])

    pairs = []
    for i in range(7):
        pair = Pair(ids(1, 20), ids(1, 30), ids(1, 30), rng.uniform(0.5, 2), i, (-50.0 - i, -60.0))
        if case == "sft" or (case == "redi-single" and i % 3 == 1):
            pair.rejected = array("i")
        elif case == "redi-single" and i % 3 == 2:
            pair.chosen = array("i")
        pairs.append(pair)
    return pairs


def gradient(world, case: str, micro_batch_tokens: int):
    """The whole gradient of an update, and the loss, log-probs and entropies of each pair."""
    stage, loss = ("sft", "redi") if case == "sft" else ("redi", case.split("-")[0])
    args = Args(stage=stage, loss=loss, beta=0.3, micro_batch_tokens=micro_batch_tokens)
    policy = nano(world)
    pairs = fixed_pairs(case)
    accumulate_gradient(policy, pairs, args, world)
    return whole_gradient(policy), [(p.loss, *p.logp, *p.entropy) for p in pairs]
