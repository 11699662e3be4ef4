"""Behaviors: the same problem solved in other steps. What BRIDGE (arXiv 2505.18917) injects before RL.

    reflection   looks ahead at a parameter, lists its unknown parents, and comes back to it later
    analysis     repeats the question's sentence before using it
    subgoals     writes every intermediate result of an equation (text.py, `worked`)
    retry        Meta's comparable behavior (arXiv 2408.16293): begins a parameter too early, then writes "BACK"

A solution is planned here as a list of steps and told in text.py. Nothing planned here is ever wrong: a
reflection or a retry only says that something is not known yet, which is true. Each behavior draws from a
random stream of its own (problem.py), so that the same look-aheads are in a solution with and without
analyses, and all arms of an experiment share their problems.
"""

from typing import NamedTuple

# BRIDGE's level 2: chance of an analysis by the number of parents, a literal counted; beyond it, 1
ANALYSIS_TABLE = (0.0, 0.1, 0.4, 0.8)


class Step(NamedTuple):
    """A line of a solution. It computes `node`, unless something is `missing` or it is a `retry`."""

    node: int
    missing: tuple = ()  # parents not computed yet: the line is a reflection on them
    analysis: bool = False
    retry: bool = False
    again: bool = False  # an earlier reflection has denoted the node already
    phrase: int = 0  # which of the words for what is missing


def plan_steps(nodes, num_necessary, order, *, reflection=0.0, analysis=0.0, retry=0.0, stream):
    """The steps of a solution that computes the necessary nodes in `order`, with its behaviors.

    nodes: graph.Node; order: a topological order of the necessary nodes, the asked one last. stream(name)
    returns the random.Random of a behavior.

    reflection: the chance, before each line but the first and the last, to look at another parameter first.
    With probability 0.3 it is redundant, else a later one of the order. If all its parents are known it is simply
    computed, early or needlessly; if not, the line is a reflection, and the next line follows the order again.
    The last line computes what is asked (BRIDGE's code could go on with something redundant).
    analysis: a chance for each line of an instance parameter with parents, or "table" for ANALYSIS_TABLE.
    retry: the chance to begin a parameter that cannot be computed yet, drawn before each line and after each retry.
    """
    if not (reflection or analysis or retry):
        return [Step(v) for v in order]
    reflecting, analysing, retrying = stream("reflection"), stream("analysis"), retry and stream("retry")
    # a coin for each node, used or not: whether its line is analysed does not depend on the rest
    coins = [analysing.random() for _ in nodes]
    parents = [node.parents for node in nodes]
    solved, denoted, steps = set(), set(), []
    place, reflected = 0, False  # how far in `order`; whether the last line was a reflection
    while order[-1] not in solved:
        if not reflected and 0 < place < num_necessary - 1 and reflecting.random() < reflection:
            if num_necessary < len(nodes) and reflecting.random() < 0.3:
                v = num_necessary + int(reflecting.random() * (len(nodes) - num_necessary))
            else:
                v = order[place + 1 + int(reflecting.random() * (num_necessary - place - 1))]
        else:
            v = order[place]
            place += 1
        if v in solved:
            continue
        while retry and retrying.random() < retry:
            begun = [u for u in range(len(nodes)) if u not in denoted and not solved.issuperset(parents[u])]
            if not begun:
                break
            steps.append(Step(begun[int(retrying.random() * len(begun))], retry=True))
        missing = tuple(dict.fromkeys([p for p in parents[v] if p not in solved]))  # only a look-ahead misses some
        phrase = int(reflecting.random() * 3) if missing else 0
        coin = analysing.random() if missing else coins[v]
        analysed = coin < _analysis_chance(nodes[v], analysis)
        steps.append(Step(v, missing, analysed, again=v in denoted, phrase=phrase))
        denoted.add(v)
        reflected = bool(missing)
        if not missing:
            solved.add(v)
    return steps


def _analysis_chance(node, analysis):
    if node.abstract or not node.terms:
        return 0.0  # an abstract parameter has no sentence to repeat; a leaf's sentence is only a number
    if analysis != "table":
        return analysis
    num_parents = len(node.terms) + (node.const is not None)
    return ANALYSIS_TABLE[num_parents] if num_parents < len(ANALYSIS_TABLE) else 1.0


def reordered(nodes, num_necessary, rng):
    """Another topological order of the necessary nodes, the asked one last: each time one that is computable."""
    uses, waiting = [[] for _ in range(num_necessary)], []
    for v, node in enumerate(nodes[:num_necessary]):
        parents = set(node.parents)
        waiting.append(len(parents))
        for p in parents:
            uses[p].append(v)
    ready, order = [v for v in range(num_necessary) if not waiting[v]], []
    while ready:
        v = ready.pop(int(rng.random() * len(ready)))
        order.append(v)
        for u in uses[v]:
            waiting[u] -= 1
            if not waiting[u]:
                ready.append(u)
    return order
