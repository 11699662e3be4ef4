"""A problem before it is told: which items own which, which number depends on which, and by what formula.

A parameter is a number that a problem speaks of. "each Sloop's Oak Crate" is an *instance* parameter: one
edge of the structure graph (who owns what), one sentence of the question. "each Sloop's Crate" is an
*abstract* one: the sum over all crates, which no sentence gives and the reader has to know how to form.

    structure                     dependencies (an arrow: is needed for)          ops
                                  Oak Crate's Apple   = 5                          1
    Sloop ---> Oak Crate          Sloop's Oak Crate   = Oak Crate's Apple          1
      |           |               Sloop's Pine Crate  = 2 more than that           1
      |           v               Sloop's Crate       = Oak + Pine   (abstract)    1
      +-> Pine -> Apple           Pine Crate's Apple  = 3 times Sloop's Crate      1
                                  Sloop's Fruit       = Oak * Apples of an Oak
                                                      + Pine * Apples of a Pine    3  <- asked: 8 operations

One operation per leaf, copy, sum, difference or product of two. The number of operations of a problem is
exact: every parameter in its solution is needed for the answer, and their operations add up to the number
drawn.

The procedure is that of iGSM (Ye et al., arXiv 2407.20311) in the version of BRIDGE (arXiv 2505.18917), with
faults mended (docs/igsm.md names them). Inside this file parameters are plain ints: instance parameters
first, then abstract ones; -1 stands for a literal number among a parameter's parents.
"""

import hashlib
import math
from itertools import chain
from operator import mul
from typing import NamedTuple

from igsm.vocabulary import WORLDS

LITERAL = -1
MAX_PARENTS = 4  # of an instance parameter, a literal included
SPLIT_BINS, TRAIN_BINS = 23, 16  # templates hash to 23 bins: 0..15 are train, 16..22 test, as Meta's
_WORLDS = [[(category, list(groups.values())) for category, groups in world.items()] for world in WORLDS.values()]
SPLIT_SALT = "igsm/"  # chosen so that the only template of one operation ("equals 5") falls to train


class Node(NamedTuple):
    """One parameter with its formula and value. `terms` holds indices into the problem's list of nodes.

    value = [const const_op] (terms[0] sign terms[1] sign ...), where a term of two indices is their product.
    3 times the difference of each A's B and each C's D: const 3, const_op "*", sign "-", terms ((i,), (j,)).
    """

    owner: str
    thing: str
    abstract: bool
    const: int | None
    const_op: str  # "+" or "*"; "" without a const, and without terms: then the const is the value
    sign: str  # "+" or "-"
    terms: tuple
    value: int

    @property
    def name(self):
        return f"each {self.owner}'s {self.thing}"

    @property
    def parents(self):
        return list(chain.from_iterable(self.terms))

    @property
    def ops(self):
        return max(1, len(self.parents) + (self.const is not None) - 1)


class Structure(NamedTuple):
    """Who owns what. Items are numbered from the lowest layer up."""

    layer_sizes: list
    edges: list  # (owner, thing) of each instance parameter
    abstract: list  # (owner, layer of the things, its distance to the owner's, formula) of each abstract one


def draw_problem(rng, ops, split, max_params, max_value, modulus, max_literal):
    """One problem: (nodes, how many of them the solution needs, {category: items}, template, operations).

    A number of operations is kept for 100 draws of all else, so that a number that fits easily does not become more
    frequent. Raises ValueError if 100 numbers fit nothing.
    """
    rnd = rng.random
    lo, hi = ops
    for _ in range(100):
        target = min(lo + int(rnd() * (hi - lo + 1)), lo + int(rnd() * (hi - lo + 1)))
        for _ in range(100):
            structure = _draw_structure(rnd, target, max_params)
            found = _draw_dependencies(rng, structure, target)
            if found is None:
                continue
            order, parents = found
            for _ in range(4):  # a new set of formulas costs less than a new graph
                drawn = _draw_formulas(rnd, structure, order, parents, max_value, modulus, max_literal)
                if drawn is None:
                    continue
                formulas, values = drawn
                template, side = template_of(formulas, order)
                if split is None or side == split:
                    formulas |= _draw_redundant(rnd, structure, order, parents, values, max_value, modulus, max_literal)
                    nodes, categories = _name(rnd, structure, formulas, values)
                    return nodes, len(order), categories, template, target
    raise ValueError(
        f"no problem of {lo} to {hi} operations was found with max_params={max_params}, split={split!r}, "
        f"max_value={max_value}, modulus={modulus}, max_literal={max_literal}: too many operations for so "
        "few parameters or so narrow a bound, or too few operations for a split of their own"
    )


def _draw_structure(rnd, target, max_params):
    """Layers of items and the edges between them; every item above the lowest layer owns something."""
    # more operations favour more layers and more items, mildly
    wanted = (target - 1) / max(1, max_params - 1)
    weights = [math.exp(-((wanted - position) ** 2)) for position in (0.2, 0.5, 0.8)]

    def two_to_four(most=4):
        return _weighted_choice(rnd, range(2, most + 1), weights[: most - 1])

    layers = two_to_four(max(2, min(4, 1 + max_params // 2)))
    a, b = two_to_four(), two_to_four()
    narrow, wide = min(a, b, max_params // (layers - 1)), max(a, b)
    fewest = (layers - 1) * narrow
    room = max_params - fewest + 1
    num_edges = min(fewest + int(rnd() * room), fewest + int(rnd() * room), (layers - 1) * wide * wide)

    sizes = [narrow] * layers
    eager = rnd()
    # layers grow at least until the edges find room, at most until every owner has one edge
    while sum(sizes) - sizes[0] < num_edges:
        growable = [i for i, size in enumerate(sizes) if size < wide]
        enough = sum(map(mul, sizes, sizes[1:])) >= num_edges
        if not growable or (enough and rnd() >= eager):
            break
        sizes[growable[int(rnd() * len(growable))]] += 1

    first = [0]  # number of the first item of each layer
    for size in sizes:
        first.append(first[-1] + size)
    edges = {}  # (owner, thing) -> None: a set that keeps its order
    for layer in range(1, layers):
        for owner in range(first[layer], first[layer + 1]):
            edges[owner, first[layer - 1] + int(rnd() * sizes[layer - 1])] = None
    while len(edges) < num_edges:
        layer = 1 + int(rnd() * (layers - 1))
        edges[first[layer] + int(rnd() * sizes[layer]), first[layer - 1] + int(rnd() * sizes[layer - 1])] = None
    edges = list(edges)

    owned = [[] for _ in range(first[-1])]  # owner -> [(instance parameter, thing), ...]
    for param, (owner, thing) in enumerate(edges):
        owned[owner].append((param, thing))
    abstract, known = [], {}  # known: (owner, layer of the things) -> parameter
    for layer in range(1, layers):
        for owner in range(first[layer], first[layer + 1]):
            for below in range(layer):
                if below == layer - 1:
                    terms = tuple([(param,) for param, _ in owned[owner]])
                else:
                    terms = tuple([(param, known[thing, below]) for param, thing in owned[owner]])
                known[owner, below] = len(edges) + len(abstract)
                abstract.append((owner, below, layer - below, (None, "", "+", terms)))
    return Structure(sizes, edges, abstract)


def _weighted_choice(rnd, candidates, weights):
    """One of the candidates; the chance of each is proportional to its weight."""
    x = rnd() * sum(weights)
    for candidate, weight in zip(candidates, weights):
        x -= weight
        if x < 0:
            return candidate
    return candidates[-1]


def _draw_dependencies(rng, structure, target):
    """The parameters of the solution, leaves first and the asked one last, and the parents of each.

    They cost exactly `target` operations. None if this draw led nowhere.
    """
    edges, abstract = structure.edges, structure.abstract
    parents = [[] for _ in edges] + [list(chain.from_iterable(terms)) for *_, (*_, terms) in abstract]
    chosen = _choose(rng.random, structure, parents, target)
    order = _order(rng, chosen, parents, len(edges))
    if order is None or not _draw_parents(rng.random, order, parents, len(edges), target):
        return None
    return order, parents


def _choose(rnd, structure, parents, target):
    """The parameters of the solution, unordered. They cost at most `target`; links added later cost the rest."""
    num_instance = len(structure.edges)
    most_abstract = max(1 + int(rnd() * target), 1 + int(rnd() * target))
    most = most_abstract + int(rnd() * (target - most_abstract + 1))

    # abstract parameters with all that they sum over, those that span the most layers first
    chosen, in_chosen, cost = [], bytearray(len(parents)), 0
    waiting = [[] for _ in structure.layer_sizes]  # by the layers that they span
    for param, (_, _, span, _) in enumerate(structure.abstract, num_instance):
        waiting[span].append(param)
    span = len(waiting) - 1
    while span:
        candidates = waiting[span] = [param for param in waiting[span] if not in_chosen[param]]
        if candidates:
            new = [candidates[int(rnd() * len(candidates))]]
            extra = 0
            for param in new:  # grows while it is walked
                extra += max(1, len(parents[param]) - 1)
                if cost + extra > most_abstract:
                    break
                new += [p for p in parents[param] if not in_chosen[p] and p not in new]
            else:  # it fits: begin again with the widest
                for param in new:
                    in_chosen[param] = 1
                chosen += new
                cost += extra
                span = len(waiting)
        span -= 1

    # plain instance parameters, an operation each
    others = [param for param in range(num_instance) if not in_chosen[param]]
    while others and cost < most:
        chosen.append(others.pop(int(rnd() * len(others))))
        cost += 1
    return chosen


def _order(rng, chosen, parents, num_instance):
    """Return an order of the chosen: parents come first, and the last needs all others. None if the walk gets stuck.

    Walks from the asked parameter down to the leaves. Each step takes a parent whose every use is in the order
    already. If there is none, the parameter just taken gets a new parent; sometimes it gets one anyway. Adds at
    most one parent to an instance parameter.
    """
    rnd = rng.random
    uses = [0] * len(parents)
    for param in chosen:
        for p in parents[param]:
            uses[p] += 1

    def pick(candidates):
        boost, known = math.exp(abs(rng.gauss(0, 1))), set(cited)
        weights = [(boost if v >= num_instance else 1) * (boost if v in known else 1) for v in candidates]
        return _weighted_choice(rnd, candidates, weights)

    remaining, cited, order = chosen[:], [], []  # cited: parents of what is in order, with repetitions
    fronts = [v for v in remaining if not uses[v]]
    while True:
        x = fronts[int(rnd() * len(fronts))]
        order.append(x)
        remaining.remove(x)
        uses[x] = -1  # placed
        for p in parents[x]:
            cited.append(p)
            uses[p] -= 1
        if not remaining:
            break
        fronts = [v for v in cited if not uses[v]]
        if not fronts:
            if x >= num_instance:
                return None
            p = pick([v for v in remaining if not uses[v]])
        elif x < num_instance and rnd() < 0.5:
            p = pick(remaining)
        else:
            continue
        parents[x].append(p)
        cited.append(p)
        if not uses[p]:
            fronts.append(p)
    order.reverse()
    return order


def _draw_parents(rnd, order, parents, num_instance, target):
    """Add parents to instance parameters until all operations are exactly `target`; False if they cannot be."""
    ops = [max(1, len(parents[v]) - 1) for v in order]
    most = [0 if v >= num_instance else min(MAX_PARENTS - 1, max(1, i)) for i, v in enumerate(order)]
    growable = [i for i in range(len(order)) if ops[i] < most[i]]
    for _ in range(target - sum(ops)):
        if not growable:
            return False
        i = growable[int(rnd() * len(growable))]
        ops[i] += 1
        if ops[i] == most[i]:
            growable.remove(i)
    for i, v in enumerate(order):
        if v >= num_instance:
            continue
        mine = parents[v]  # none yet, or the one that _order gave it
        pool = order[:i]
        wanted = ops[i] + 1 if ops[i] > 1 else 1 + int(rnd() * 2)  # one operation: a leaf, a copy, or of two
        wanted = min(wanted, len(pool) + 1)
        if mine:
            pool.remove(mine[0])
            wanted -= 1
        if wanted == len(pool) + 1:
            mine += [*pool, LITERAL]
            continue
        if rnd() < 0.5:
            mine.append(LITERAL)
            wanted = max(0, wanted - 1)
        else:
            pool.append(LITERAL)
        for _ in range(wanted):
            mine.append(pool.pop(int(rnd() * len(pool))))
    return True


def _draw_formulas(rnd, structure, order, parents, max_value, modulus, max_literal):
    """{parameter: (const, const_op, sign, terms)} in order, and the values; None if a number is too large."""
    num_instance = len(structure.edges)
    formulas, values = {}, {}
    for v in order:
        if v >= num_instance:
            formulas[v] = structure.abstract[v - num_instance][-1]
            values[v] = _evaluate(formulas[v], values, max_value, modulus)
        else:
            formulas[v], values[v] = _draw_fitting(rnd, parents[v], values, max_value, modulus, max_literal)
        if values[v] is None:
            return None
    return formulas, values


def _draw_fitting(rnd, parents, values, max_value, modulus, max_literal):
    """A formula over these parents and its value; the value is None if four formulas gave too large numbers."""
    for _ in range(4):
        formula = _draw_formula(rnd, parents, max_literal)
        value = _evaluate(formula, values, max_value, modulus)
        if value is not None:
            break
    return formula, value


def _draw_formula(rnd, parents, max_literal):
    """A formula over these parents. Literals begin at 1: no multiplier wipes out what came before it (nor does one
    modulo a prime)."""
    others = [p for p in parents if p != LITERAL]
    const, const_op, sign = None, "", "+"
    if len(others) < len(parents):
        const = 1 + int(rnd() * max_literal)
        if others:
            const_op = "+" if rnd() < 0.5 else "*"
    if len(others) > 1:
        for i in range(len(others) - 1, 0, -1):  # shuffled
            j = int(rnd() * (i + 1))
            others[i], others[j] = others[j], others[i]
        if len(others) == 2 and rnd() < 0.5:
            sign = "-"
    return const, const_op, sign, tuple([(p,) for p in others])


def _evaluate(formula, values, max_value, modulus):
    """The value; None if it, or a number on the way to it, is too large. With a modulus nothing is."""
    const, const_op, sign, terms = formula
    if not terms:
        return const if modulus is None else const % modulus
    total = None
    for term in terms:
        x = values[term[0]]
        if len(term) == 2:
            x *= values[term[1]]
            if modulus is None and not -max_value < x < max_value:
                return None
        total = x if total is None else total - x if sign == "-" else total + x
        if modulus is None and not -max_value < total < max_value:
            return None
    if const is not None:
        total = const * total if const_op == "*" else const + total
    if modulus is not None:
        return total % modulus
    return total if -max_value < total < max_value else None


def _draw_redundant(rnd, structure, order, parents, values, max_value, modulus, max_literal):
    """Formulas for what the solution does not need: every other edge of the structure gets a sentence too.

    So every abstract parameter can be computed from the text alone, and the text does not give away what
    matters. Adds to `values`; returns {parameter: formula} with the abstract parameters that these formulas
    mention.
    """
    edges, abstract = structure.edges, structure.abstract
    num_instance = len(edges)
    told = set(order)  # parameters that have a sentence or stand in a formula of one that has
    computable = list(order)
    pending = [v for v in range(num_instance, len(parents)) if v not in told]  # abstract, without a value
    redundant = [v for v in range(num_instance) if v not in told]
    formulas = {}
    branch = []  # redundant parameters that need nothing but each other

    def tell(v):
        """Add an abstract parameter that a formula mentions, after those that it sums over itself."""
        if v not in told:
            for p in parents[v]:
                tell(p)
            told.add(v)
            formulas[v] = abstract[v - num_instance][-1]

    while redundant:
        still_pending = []  # abstract parameters are listed parts first, so one pass is enough
        for v in pending:
            if [p for p in parents[v] if p not in values]:
                still_pending.append(v)
                continue
            value = _evaluate(abstract[v - num_instance][-1], values, max_value, modulus)
            if value is not None:
                values[v] = value
                computable.append(v)
        pending = still_pending

        v = redundant.pop(int(rnd() * len(redundant)))
        in_branch = rnd() < 0.5
        pool = branch if in_branch else computable
        wanted = 1
        while wanted < min(MAX_PARENTS, len(pool) + 1) and rnd() < 0.5:
            wanted += 1
        if wanted == len(pool) + 1:
            mine = pool + [LITERAL]
        else:
            pool, mine = pool[:], []
            if rnd() < 0.5:
                mine.append(LITERAL)
            while len(mine) < wanted:
                mine.append(pool.pop(int(rnd() * len(pool))))
        formula, value = _draw_fitting(rnd, mine, values, max_value, modulus, max_literal)
        if value is None:  # a literal alone always fits
            formula, value = _draw_fitting(rnd, [LITERAL], values, max_value, modulus, max_literal)
        for term in formula[3]:
            tell(term[0])
        told.add(v)
        formulas[v], values[v] = formula, value
        if in_branch:
            branch.append(v)
    return formulas


def template_of(formulas, order):
    """What is left of a solution without its names and numbers: (hash, "train" or "test").

    "x0 = 5; x1 = 3 * x0; x2 = x1 - x0"  becomes  "#;#*0;1-0"

    formulas: (const, const_op, sign, terms) of each parameter in `order`.

    Formulas of instance and abstract parameters look alike here, so that the split holds for the symbolic
    style too, where they cannot be told apart.
    """
    place = {v: str(i) for i, v in enumerate(order)}
    lines = []
    for v in order:
        const, const_op, sign, terms = formulas[v]
        core = sign.join(["*".join([place[p] for p in term]) for term in terms])
        lines.append(core if const is None else f"#{const_op}{core}")
    digest = hashlib.sha256((SPLIT_SALT + ";".join(lines)).encode()).hexdigest()
    return digest[:16], "train" if int(digest, 16) % SPLIT_BINS < TRAIN_BINS else "test"


def _name(rnd, structure, formulas, values):
    """Names for the items, and the nodes that go by them."""
    sizes = structure.layer_sizes
    world = _WORLDS[int(rnd() * len(_WORLDS))]
    lowest = len(world) - 1 - int(rnd() * (len(world) - len(sizes) + 1))
    categories, items = [], []
    for depth, size in enumerate(sizes):
        category, groups = world[lowest - depth]
        pool = groups[int(rnd() * len(groups))][:]
        categories.append(category)
        items.append([pool.pop(int(rnd() * len(pool))) for _ in range(size)])
    flat = [item for layer in items for item in layer]

    place = {v: i for i, v in enumerate(formulas)}
    num_instance = len(structure.edges)
    nodes = []
    for v, (const, const_op, sign, terms) in formulas.items():
        if v < num_instance:
            owner, thing = structure.edges[v]
            owner, thing = flat[owner], flat[thing]
        else:
            owner, layer, _, _ = structure.abstract[v - num_instance]
            owner, thing = flat[owner], categories[layer]
        terms = tuple([tuple([place[p] for p in term]) for term in terms])
        nodes.append(Node(owner, thing, v >= num_instance, const, const_op, sign, terms, values[v]))
    return nodes, dict(zip(reversed(categories), reversed(items)))
