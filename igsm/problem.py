"""Problems as a caller sees them, and where their randomness comes from."""

import random
from dataclasses import dataclass, field, replace
from numbers import Integral

from igsm.behaviors import plan_steps, reordered
from igsm.graph import Node, draw_problem, template_of
from igsm.text import STYLES, draw_letters, draw_phrases, question_text, solution_text
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
    template: str  # hash of the drawn solution without its names and numbers; train and test share none
    seed: int
    index: int
    categories: dict  # {category: [item, ...]} from top to bottom, as `solve` takes them
    nodes: list[Node]
    num_necessary: int
    letters: list[str] = field(default_factory=list, repr=False)  # a variable for each node, in solution variant 0
    phrases: list[int] = field(default_factory=list, repr=False)  # which phrases its line uses there

    @property
    def necessary(self):
        return self.nodes[: self.num_necessary]


def generate(n, **settings):
    """The first n problems of `problems(...)` as a list; see there for the settings.

    >>> [problem] = generate(1, ops=(4, 8), seed=0, split="train", style="symbolic", modulus=23, max_params=8)
    """
    return list(problems(n, **settings))


def problems(
    n, *, ops=(4, 8), seed=0, split=None, style="natural", modulus=None, max_params=20, max_value=1000,
    max_literal=None, subgoals=False, shuffle=True, start=0, reflection=0.0, analysis=0.0, retry=0.0,
    question_variant=0, solution_variant=0,
):  # fmt: skip
    """An iterator over n problems, the ones numbered start, start + 1, ... of this seed.

    ops: (fewest, most) operations; the smaller of two uniform draws, so easier ones are more frequent.
    split: "train", "test" or None for both together. By hash of the solution's template, the same for all
    styles.
    style: "natural", "define" or "symbolic": the same problem in other words.
    modulus: None for plain integers; m, better a prime, for arithmetic on 0..m-1.
    max_params: largest number of instance parameters, each of which is a sentence (the symbolic style has one more
    line for each abstract parameter); a smaller one leaves fewer redundant sentences.
    max_value: without a modulus, every number in a solution is smaller than this in size.
    max_literal: literals and multipliers are 1..max_literal; None for 9, or modulus - 1 if there is a
    modulus.
    subgoals: solutions write every intermediate result.
    shuffle: conditions in random order; False: in the solution's order, unneeded ones in between, which is easier.
    reflection, analysis, retry, question_variant, solution_variant: as for `retell`.

    Problem i depends on (seed, i) and the settings only, not on n: any part of a set can be made on its own,
    and structure and values do not depend on style, subgoals, behaviors or variants.

    Raises ValueError at once if a setting makes no sense, and while iterating if no problem fits all settings.
    """
    if max_literal is None:
        max_literal = 9 if modulus is None else modulus - 1
    _check_drawing(n, ops, split, style, modulus, max_params, max_value, max_literal, start)
    telling = dict(subgoals=subgoals, reflection=reflection, analysis=analysis, retry=retry,
                   question_variant=question_variant, solution_variant=solution_variant)  # fmt: skip
    _check_telling(style, **telling)

    def make(index):
        rng = random.Random(f"igsm {seed} {index} problem")
        nodes, num_necessary, categories, template, num_ops = draw_problem(
            rng, ops, split, max_params, max_value, modulus, max_literal
        )
        rng = random.Random(f"igsm {seed} {index} text")
        letters = draw_letters(len(nodes), style, rng)
        question = question_text(nodes, num_necessary, style, rng, letters, shuffle=shuffle)
        problem = Problem(
            question=question, solution="", answer=nodes[num_necessary - 1].value, ops=num_ops, style=style,
            modulus=modulus, template=template, seed=seed, index=index, categories=categories, nodes=nodes,
            num_necessary=num_necessary, letters=letters, phrases=draw_phrases(len(nodes), rng),
        )  # fmt: skip
        return retell(problem, **telling)

    return map(make, range(start, start + n))


def retell(problem, *, subgoals=False, reflection=0.0, analysis=0.0, retry=0.0, question_variant=0, solution_variant=0):
    """The same problem in the same style with other behaviors (behaviors.py), several times faster than drawn anew.

    subgoals: the solution writes every intermediate result.
    reflection: chance of a look-ahead before a line (BRIDGE: 0.1).
    analysis: chance that a line repeats the question's sentence, or "table": 0.1, 0.4, 0.8, 1 for 1, 2, 3, more
    parents (BRIDGE's code; its text says 0.1).
    retry: chance of a retry before a line: a parameter that cannot be computed yet is begun and left (Meta's). It is
    drawn again after each retry.
    question_variant: 0, or the number of another random order of the conditions (BRIDGE's PP-Aug has 1, 2, 3). It
    shuffles `problem.question`: give it a problem of variant 0.
    solution_variant: 0, or the number of another order of the steps, told with other letters and words
    (RC-Aug has 1, 2, 3); in the symbolic style the letters stay, because the question has them. The order's template
    is on the problem's side of the split. If there is no other such order, the order stays.

    Each behavior draws from a stream of its own, made of the problem's seed, its index and the variant.
    Raises ValueError for a chance outside 0 to 1, and for behaviors in the style "define", which has no words for
    them.

    >>> [p] = generate(1, style="symbolic", modulus=23, max_params=4, max_literal=9, seed=3)
    >>> p.solution.split("\\n")[1:-2]
    ['a=9', 'x=8*a=8*9=3', 'n=x=3', 'p=9*(x+n+a)=9*(3+3+9)=20']
    >>> retell(p, subgoals=True, analysis=1.0).solution.split("\\n")[1:-2]
    ['a=9', 'x(8*a)=8*a=8*9=3', 'n=x=3', 'p(9*(x+n+a))=9*(x+n+a)=9*(3+3+9)=9*(6+9)=9*15=20']
    """
    _check_telling(problem.style, subgoals, reflection, analysis, retry, question_variant, solution_variant)
    nodes, num_necessary = problem.nodes, problem.num_necessary
    letters, phrases, order = problem.letters, problem.phrases, range(num_necessary)

    def stream(name, variant=solution_variant):
        return random.Random(f"igsm {problem.seed} {problem.index} {name} {variant or ''}")

    question = problem.question
    if question_variant:
        *conditions, asked = question.split("\n")
        stream("question", question_variant).shuffle(conditions)
        question = "\n".join([*conditions, asked])
    if solution_variant:
        rng = stream("solution")
        order = _another_order(nodes, num_necessary, rng)
        if problem.style != "symbolic":
            letters = draw_letters(len(nodes), problem.style, rng)
        phrases = draw_phrases(len(nodes), rng)
    steps = plan_steps(
        nodes, num_necessary, order, reflection=reflection, analysis=analysis, retry=retry, stream=stream
    )
    solution = solution_text(
        steps, nodes, problem.answer, problem.style, letters, phrases, modulus=problem.modulus, subgoals=subgoals
    )
    return replace(problem, question=question, solution=solution)


def _another_order(nodes, num_necessary, rng):
    """An order of the necessary nodes on the same side of the split; the same one if none is found."""
    formulas = [(node.const, node.const_op, node.sign, node.terms) for node in nodes[:num_necessary]]
    order = range(num_necessary)
    side = template_of(formulas, order)[1]
    for _ in range(100):
        other = reordered(nodes, num_necessary, rng)
        if list(other) != list(order) and template_of(formulas, other)[1] == side:
            return other
    return order


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
            "split": split, "index": problem.index, "ops": problem.ops, "seed": problem.seed,
            "template": problem.template, "modulus": problem.modulus,
        },
    }  # fmt: skip


def _check_drawing(n, ops, split, style, modulus, max_params, max_value, max_literal, start):
    numbers = (n, start, *ops, modulus or 2, max_params, max_value, max_literal)
    if not all(isinstance(number, Integral) for number in numbers):
        raise ValueError(f"n, start, ops, modulus and the max_... must be whole numbers, got {numbers}")
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
    bound, name = (max_value, "max_value") if modulus is None else (modulus, "modulus")
    if not 1 <= max_literal < bound:
        raise ValueError(f"max_literal must be at least 1 and below {name} ({bound}), got {max_literal}")


def _check_telling(style, subgoals, reflection, analysis, retry, question_variant, solution_variant):
    if not 0 <= reflection <= 1:
        raise ValueError(f"reflection must be a chance from 0 to 1, got {reflection}")
    if analysis != "table" and (isinstance(analysis, str) or not 0 <= analysis <= 1):
        raise ValueError(f'analysis must be a chance from 0 to 1 or "table", got {analysis!r}')
    if not 0 <= retry < 1:
        raise ValueError(f"retry must be a chance from 0 to below 1, got {retry}")
    if style == "define" and (reflection or analysis or retry):
        raise ValueError("the style 'define' has no words for reflection, analysis and retry: use 'natural'")
    if question_variant < 0 or solution_variant < 0:
        raise ValueError(f"variants are numbered from 0, got {question_variant} and {solution_variant}")
