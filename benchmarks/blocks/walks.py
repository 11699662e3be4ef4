"""Walks: a task whose errors can be read from the text. The nodes a .. p are a grid of 4 x 4. A question names the
closed nodes, a start and a goal. An answer names the nodes of a walk from the start to the goal. It is correct if each
step is an edge of the grid to an open node, and the last node is the goal.

    python -m benchmarks.blocks.walks --n 1000 --seed 0 --out walks.jsonl
    --verifier benchmarks.blocks.walks:reward --step_delimiters a b c ... p             for oreo.py and eval.py

A walk may be longer than the one in the data: a right step never loses a question. With --slips the walks in the file
are imperfect: each step may go wrong, and then the walk ends. A model that learns from them can tell right steps from
wrong ones and takes wrong ones all the same.
"""

import json
import random
from dataclasses import dataclass

import tyro

SIDE, CLOSED = 4, 4
NODES = "abcdefghijklmnop"
STEPS = (4, 8)  # of the shortest walk


def neighbours(node: str) -> str:
    """Return the nodes that have an edge with a node.

    >>> neighbours("a"), neighbours("f")
    ('be', 'begj')
    """
    row, column = divmod(NODES.index(node), SIDE)
    around = [(row - 1, column), (row, column - 1), (row, column + 1), (row + 1, column)]
    return "".join(NODES[r * SIDE + c] for r, c in around if 0 <= r < SIDE and 0 <= c < SIDE)


def shortest(closed: str, start: str, goal: str, rng: random.Random) -> str | None:
    """Return the nodes after `start` of a shortest walk to `goal`, one of several by chance, or None.

    >>> shortest("bf", "a", "c", random.Random(0)), shortest("be", "a", "c", random.Random(0))
    ('eijkgc', None)
    """
    walks, seen = [start], {start}
    for walk in walks:
        if walk[-1] == goal:
            return walk[1:]
        following = [node for node in neighbours(walk[-1]) if node not in seen and node not in closed]
        rng.shuffle(following)
        seen.update(following)
        walks += [walk + node for node in following]
    return None


def problem(rng: random.Random) -> tuple[str, str]:
    """Return a question, and a shortest walk of STEPS steps."""
    while True:
        start, goal, *closed = rng.sample(NODES, 2 + CLOSED)
        walk = shortest("".join(closed), start, goal, rng)
        if walk and STEPS[0] <= len(walk) <= STEPS[1]:
            return f"{''.join(closed)}\n{start}-{goal}?", walk


def imperfect(question: str, walk: str, slips: float, rng: random.Random) -> str:
    """Return the walk up to its first wrong step, which has this chance at every step: to a closed node if one is
    beside, else to any node that is not."""
    closed, last = question.split("\n")
    for i, at in enumerate(last[0] + walk[:-1]):
        if rng.random() < slips:
            beside = neighbours(at)
            elsewhere = [node for node in NODES if node not in beside + at]
            return walk[:i] + rng.choice([node for node in beside if node in closed] or elsewhere)
    return walk


def right_steps(nodes: str, question: str) -> list[bool]:
    """Return for each node of an answer: is the walk up to it one along edges and open nodes?

    >>> right_steps("efg", "fz\\na-g?")
    [True, False, False]
    """
    closed, last = question.split("\n")
    at, right = last[0], [True]
    for node in nodes:
        right.append(right[-1] and node in neighbours(at) and node not in closed)
        at = node
    return right[1:]


def reward(response: str, gold: str) -> float:
    """Return 1.0 for such a walk that ends at the goal; `gold` is the question.

    >>> [reward(walk, "bf\\na-c?") for walk in ("eijkgc", "eaeijkgc", "bc", "eijkg", "")]
    [1.0, 1.0, 0.0, 0.0, 0.0]
    """
    nodes = response.strip()
    return float(nodes[-1:] == gold.split("\n")[1][2] and all(right_steps(nodes, gold)))


def row(question: str, walk: str, index: int) -> dict:
    """Return a problem as a row of a data file, with the walk as its trace."""
    return {
        "data_source": "walks", "prompt": [{"role": "user", "content": question}],
        "target": [{"role": "assistant", "content": f"<think>\n{walk}"}],
        "reward_model": {"style": "rule", "ground_truth": question}, "extra_info": {"index": index},
    }  # fmt: skip


@dataclass
class Flags:
    out: str
    """File to write."""
    n: int = 1000
    """Problems. The first of a larger file are those of a smaller one with the same seed."""
    seed: int = 0
    """Seed of the problems."""
    slips: float = 0.0
    """Chance that a step of a walk in the file goes wrong."""


def main(flags: Flags) -> None:
    rng, slipping = random.Random(flags.seed), random.Random(flags.seed + 1)
    with open(flags.out, "w") as file:
        for index in range(flags.n):
            question, walk = problem(rng)
            file.write(json.dumps(row(question, imperfect(question, walk, flags.slips, slipping), index)) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Flags, use_underscores=True))
