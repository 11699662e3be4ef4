"""Walks: a task whose errors can be read from the text. A question lists the directed edges of a graph, a start and a
goal; an answer names the nodes of a walk from the start to the goal. It is correct if every step is an edge and the
last node is the goal.

    python -m benchmarks.blocks.walks --n 1000 --seed 0 --out walks.jsonl
    --verifier benchmarks.blocks.walks:reward --step_delimiters a b c d e f g h        for oreo.py and eval.py

A walk may be longer than the one in the data, and from every node the goal can be reached: as long as the steps are
edges nothing is lost. The one error is a step that is not an edge (or to stop elsewhere), at a known place.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import tyro

NODES = "abcdefgh"
EDGES = 2  # that leave each node
STEPS = (3, 5)  # of the shortest walk


def shortest(edges: set[str], start: str, goal: str) -> str | None:
    """Return the nodes after `start` of a shortest walk to `goal` (the first in the alphabet), or None.

    >>> shortest({"ab", "bc", "ad", "dc"}, "a", "c"), shortest({"ab"}, "b", "a")
    ('bc', None)
    """
    walks, seen = [start], {start}
    for walk in walks:
        if walk[-1] == goal:
            return walk[1:]
        following = sorted(e[1] for e in edges if e[0] == walk[-1] and e[1] not in seen)
        seen.update(following)
        walks += [walk + node for node in following]
    return None


def problem(rng: random.Random) -> tuple[str, str]:
    """Return a question, and a shortest walk of STEPS steps."""
    while True:
        edges = [a + b for a in NODES for b in rng.sample(NODES.replace(a, ""), EDGES)]
        start, goal = rng.sample(NODES, 2)
        walks = [shortest(set(edges), a, goal) for a in NODES]
        walk = walks[NODES.index(start)]
        if None not in walks and STEPS[0] <= len(walk) <= STEPS[1]:
            rng.shuffle(edges)
            return "\n".join(edges) + f"\n{start}-{goal}?", walk


def read(question: str) -> tuple[set[str], str, str]:
    """Return a question's edges, start and goal."""
    *edges, last = question.split("\n")
    return set(edges), last[0], last[2]


def right_steps(nodes: str, question: str) -> list[bool]:
    """For each node of an answer: is the walk up to it one along edges?

    >>> right_steps("bdc", "ab\\nbc\\na-c?")
    [True, False, False]
    """
    edges, start, _ = read(question)
    steps = [a + b in edges for a, b in zip(start + nodes, nodes)]
    return [all(steps[: i + 1]) for i in range(len(steps))]


def reward(response: str, gold: str) -> float:
    """Return 1.0 for a walk along edges that ends at the goal; `gold` is the question.

    >>> [reward(walk, "ab\\nbc\\ncb\\na-c?") for walk in ("bc", "bcbc", "c", "b", "")]
    [1.0, 1.0, 0.0, 0.0, 0.0]
    """
    nodes = response.strip()
    return float(nodes[-1:] == read(gold)[2] and all(right_steps(nodes, gold)))


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


def main(flags: Flags) -> None:
    rng = random.Random(flags.seed)
    rows = (row(*problem(rng), index) for index in range(flags.n))
    Path(flags.out).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(tyro.cli(Flags, use_underscores=True))
