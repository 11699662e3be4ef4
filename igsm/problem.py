"""Problems as a caller sees them, and where their randomness comes from."""

import random
from dataclasses import dataclass

from igsm.graph import Node, draw_problem
from igsm.text import STYLES, draw_letters, question_text, solution_text
from igsm.tokens import SYSTEM_PROMPT


@dataclass(slots=True)
class Problem:
    """A problem in one style. nodes: the parameters of the solution in its order, then the redundant ones."""

    question: str
    solution: str
    answer: int
    ops: int
    style: str
    modulus: int | None
    template: str  # hash of the solution without its names and numbers; train and test share none
    seed: int
    index: int
    categories: dict  # {category: [item, ...]} from top to bottom, as `solve` takes them
    nodes: list[Node]
    num_necessary: int

    @property
    def necessary(self):
        return self.nodes[: self.num_necessary]

    @property
    def redundant(self):
        return self.nodes[self.num_necessary :]


def generate(n, **settings):
    """The first n problems of `problems(...)` as a list; see there for the settings.

    >>> [problem] = generate(1, ops=(4, 8), seed=0, split="train", style="symbolic", modulus=23, max_params=8)
    """
    return list(problems(n, **settings))


def problems(
    n,
    *,
    ops=(4, 8),
    seed=0,
    split=None,
    style="natural",
    modulus=None,
    max_params=20,
    max_value=1000,
    max_literal=None,
    subgoals=False,
    shuffle=True,
    start=0,
):
    """An iterator over n problems, the ones numbered start, start + 1, ... of this seed.

    ops: (fewest, most) operations; the smaller of two uniform draws, so easier ones are more frequent.
    split: "train", "test" or None for both together. By hash of the solution's template, the same for all
    styles.
    style: "natural", "define" or "symbolic": the same problem in other words.
    modulus: None for plain integers; m for arithmetic on 0..m-1.
    max_params: most instance parameters, which is to say sentences; less room leaves fewer redundant ones.
    max_value: without a modulus, every number in a solution is smaller than this in size.
    max_literal: literals and multipliers are 1..max_literal; None for 9, or modulus - 1 if there is a
    modulus.
    subgoals: solutions write every intermediate result.
    shuffle: conditions in random order; False: in the solution's order, unneeded ones in between, which is easier.

    Problem i depends on (seed, i) and the settings only, not on n: any part of a set can be made on its own,
    and structure and values do not depend on style or subgoals.

    Raises ValueError at once where a setting makes no sense, and on the way where no problem fits them all.
    """
    if max_literal is None:
        max_literal = 9 if modulus is None else modulus - 1
    _check(n, ops, split, style, modulus, max_params, max_value, max_literal, start)

    def make(index):
        rng = random.Random(f"igsm {seed} {index} problem")
        nodes, num_necessary, categories, template, num_ops = draw_problem(
            rng, ops, split, max_params, max_value, modulus, max_literal
        )
        rng = random.Random(f"igsm {seed} {index} text")
        letters = draw_letters(len(nodes), style, rng)
        question = question_text(nodes, num_necessary, style, rng, letters, shuffle=shuffle)
        solution = solution_text(
            nodes, num_necessary, style, rng, letters, modulus=modulus, subgoals=subgoals
        )
        return Problem(
            question=question,
            solution=solution,
            answer=nodes[num_necessary - 1].value,
            ops=num_ops,
            style=style,
            modulus=modulus,
            template=template,
            seed=seed,
            index=index,
            categories=categories,
            nodes=nodes,
            num_necessary=num_necessary,
        )

    return map(make, range(start, start + n))


def row(problem, split, system_prompt=False):
    """A problem as a row of a data set, with LUFFY's columns (data_source, prompt, target, ...)."""
    system = [{"role": "system", "content": SYSTEM_PROMPT}] if system_prompt else []
    return {
        "data_source": f"igsm-{problem.style}",
        "prompt": [*system, {"role": "user", "content": problem.question}],
        "target": [{"role": "assistant", "content": problem.solution}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(problem.answer)},
        "extra_info": {
            "split": split,
            "index": problem.index,
            "ops": problem.ops,
            "seed": problem.seed,
            "template": problem.template,
            "modulus": problem.modulus,
        },
    }


def _check(n, ops, split, style, modulus, max_params, max_value, max_literal, start):
    if n < 0 or start < 0:
        raise ValueError(f"n and start must not be negative, got {n} and {start}")
    if len(ops) != 2 or not 1 <= ops[0] <= ops[1]:
        raise ValueError(f"ops must be (fewest, most) with 1 <= fewest <= most, got {tuple(ops)}")
    if split not in (None, "train", "test"):
        raise ValueError(f'split must be "train", "test" or None, got {split!r}')
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    if modulus is not None and modulus < 2:
        raise ValueError(f"modulus must be 2 or more, got {modulus}")
    if max_params < 1:
        raise ValueError(f"max_params must be 1 or more, got {max_params}")
    if max_literal < 1 or (modulus is None and max_literal >= max_value):
        raise ValueError(
            f"max_literal must be at least 1 and below max_value ({max_value}), got {max_literal}"
        )
