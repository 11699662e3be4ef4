"""The words for a problem: one problem, three styles.

    natural    question  The number of each Sloop's Oak Crate equals 5 times each Oak Crate's Apple. ...
                         How many Oak Crate does each Sloop have?
               solution  - Next, let v represent the number of each Sloop's Oak Crate. Then v = 5 * b = ...
    define     the same question
               solution  Define each Sloop's Oak Crate as v. So v = 5 * b = 5 * 2 = 10.
    symbolic   question  v=5*b
               solution  v=5*b=5*2=10

The symbolic style has no names that show what an abstract parameter sums over, so its conditions include
these sums. Behaviors (behaviors.py) look like this:

               natural                                                          symbolic
    analysis   We know that it equals 5 times each Oak Crate's Apple.           v(5*b)=5*b=5*2=10
    reflection However, we don't know the number of ..., thus we cannot ...     v?b
    retry      Define the number of each Sloop's Oak Crate as BACK.             v?

What is chosen at random here (order of sentences, letters, phrases) comes from a stream of its own: the
problem is the same in every style. Phrases are drawn for each parameter, used or not, so that a solution with
other steps still says the same things the same way. The sentences of the natural style are BRIDGE's (MIT,
THIRD_PARTY.md).
"""

from string import ascii_letters, ascii_lowercase, digits

STYLES = ("natural", "define", "symbolic")

HEAD = "<think>\nLet's compute the answer step by step.\n"
GIVEN = ("According to the information given, the number of {} is {}.", "The number of {} is {}.")
DENOTE = ("Let it be {}.", "Let's denote it as {}.", "Let's call it {}.")
FIND = ("We can then calculate the number of {}.", "Now, we can find the number of {}.")
DEFINE = (
    "Next, let {1} represent the number of {0}.",
    "Then, let's denote the number of {0} as {1}.",
    "Next, let's define the number of {0} as {1}.",
)
REMEMBER = "Remember that it has been denoted as {}."
ANALYSIS = "We know that it equals {}."
UNKNOWN = (
    "Wait, the number of {} {} unknown, so we cannot compute it.",  # is, are
    "However, we don't know the number of {}, thus we cannot calculate it now.",
    "But we haven't calculated the number of {} yet, thus the value of {} is still unknown.",
)
RETRY = "Define the number of {} as BACK."


def question_text(nodes, num_necessary, style, rng, letters, *, shuffle=True):
    """The conditions in random order, then what is asked for.

    Without `shuffle` they stand in the order of the solution, with those that it does not need strewn in between.
    """
    if style == "symbolic":
        lines = [f"{letter}={formula_text(node, letters, '')}" for node, letter in zip(nodes, letters)]
        needed = num_necessary
        last = f"{letters[num_necessary - 1]}?"
    else:
        names = [node.name for node in nodes]
        lines = [f"The number of {node.name} equals {described(node, names)}." for node in nodes if not node.abstract]
        needed = sum(not node.abstract for node in nodes[:num_necessary])
        last = f"How many {nodes[num_necessary - 1].thing} does each {nodes[num_necessary - 1].owner} have?"
    return "\n".join([*_ordered(lines, needed, rng, shuffle), last])


def _ordered(lines, needed, rng, shuffle):
    """Put lines in the question's order; the first `needed` are the solution's, in its order."""
    order = list(range(len(lines)))
    rng.shuffle(order)
    if not shuffle:  # the same places for the unneeded ones; the needed ones fill the rest in their order
        in_order = iter(range(needed))
        order = [next(in_order) if i < needed else i for i in order]
    return [lines[i] for i in order]


def draw_phrases(count, rng):
    """A number from 0 to 11 for each parameter: modulo 2 and 3 it picks the phrases of the line, which begins with
    FIND and DENOTE if it is below 6, else with DEFINE."""
    return [int(rng.random() * 12) for _ in range(count)]


def solution_text(steps, nodes, answer, style, letters, phrases, *, modulus=None, subgoals=False):
    """One line for each step (behaviors.Step), in an order in which everything is computed before it is used.

    With `subgoals` every intermediate result is written: `2 + (34 + 15) = 2 + 49 = 51`.
    """
    values = [str(node.value) for node in nodes]
    line_of = {"symbolic": _symbolic_line, "define": _define_line, "natural": _natural_line}[style]
    space, equals = ("", "=") if style == "symbolic" else (" ", " = ")
    lines = ""
    for step in steps:
        node, equation = nodes[step.node], ""
        if not (step.missing or step.retry):
            members = worked(node, nodes, values, subgoals, modulus, space)
            equation = equals.join([formula_text(node, letters, space), *members] if node.terms else members)
        lines += line_of(step, nodes, letters, phrases, equation)
    if style == "symbolic":
        return f"<think>\n{lines}</think>\n\\boxed{{{answer}}}"
    return (
        f"{HEAD}{lines}Thus, the answer is {answer}.\n</think>\n"
        f"<answer>\nThe final answer is \\boxed{{{answer}}}.\n</answer>"
    )


def _symbolic_line(step, nodes, letters, phrases, equation):
    letter = letters[step.node]
    if step.retry:
        return f"{letter}?\n"
    analysis = f"({formula_text(nodes[step.node], letters, '')})" if step.analysis else ""
    if step.missing:
        return f"{letter}{analysis}?{'?'.join([letters[p] for p in step.missing])}\n"
    return f"{letter}{analysis}={equation}\n"


def _define_line(step, nodes, letters, phrases, equation):
    letter = letters[step.node]
    return f"Define {nodes[step.node].name} as {letter}. So {letter} = {equation}.\n"


def _natural_line(step, nodes, letters, phrases, equation):
    node, letter, phrase = nodes[step.node], letters[step.node], phrases[step.node]
    if step.retry:
        return f"- {RETRY.format(node.name)}\n"
    if not node.terms:
        begun = f"{GIVEN[phrase % 2].format(node.name, node.value)} {DENOTE[phrase % 3].format(letter)}"
        return f"- {begun} So {letter} = {node.value}.\n"
    if step.again:
        begun = f"{FIND[phrase % 2].format(node.name)} {REMEMBER.format(letter)}"
    elif phrase < 6:
        begun = f"{FIND[phrase % 2].format(node.name)} {DENOTE[phrase % 3].format(letter)}"
    else:
        begun = DEFINE[phrase % 3].format(node.name, letter)
    if step.analysis:
        names = {p: nodes[p].name for p in node.parents}
        begun = f"{begun} {ANALYSIS.format(described(node, names))}"
    if step.missing:
        names = ", ".join([nodes[p].name for p in step.missing])
        be_or_letter = letter if step.phrase == 2 else "is" if len(step.missing) == 1 else "are"
        return f"- {begun} {UNKNOWN[step.phrase].format(names, be_or_letter)}\n"
    return f"- {begun} Then {letter} = {equation}.\n"


def draw_letters(count, style, rng):
    """A variable for each parameter: one letter each, or two characters each if letters do not suffice."""
    if style == "symbolic":
        pool = ascii_lowercase
        if count > len(pool):
            pool = [a + b for a in ascii_lowercase for b in ascii_lowercase]
    else:
        pool = ascii_letters
        if count > len(pool):
            pool = [a + b for a in ascii_letters for b in digits]
    return rng.sample(pool, count)


def described(node, names):
    """The right side of a node's sentence: `3 times the sum of each A's B and each C's D`."""
    if not node.terms:
        return str(node.const)
    parts = [names[p] for (p,) in node.terms]
    text = parts[0]
    if len(parts) > 1:
        kind = "difference" if node.sign == "-" else "sum"
        text = f"the {kind} of {', '.join(parts[:-1])} and {parts[-1]}"
    if node.const is not None:
        text = f"{node.const} {'times' if node.const_op == '*' else 'more than'} {text}"
    return text


def formula_text(node, names, space=" "):
    """The node's formula with a name (or value) for each node: `3 * (a - b)`."""
    return _with_terms(node, _terms(node, names, space), space)


def worked(node, nodes, values, subgoals, modulus, space):
    """The members of an equation after the formula: with values, [intermediate results,] the value.

    ["7 + (0 + 9 + 9)", "7 + (9 + 9)", "7 + 18", "25"] of 7 + (a + b + c) with subgoals. One operator at a
    time: products from left to right, then sums from left to right (a bracket holds sums only), then the
    const.
    """
    value = str(node.value)
    if not node.terms:
        return [value]
    terms = _terms(node, values, space)
    members = [_with_terms(node, terms, space)]
    if subgoals:
        numbers = []
        for i, term in enumerate(node.terms):
            number = nodes[term[0]].value
            if len(term) == 2:
                number *= nodes[term[1]].value
                number = number if modulus is None else number % modulus
                terms[i] = str(number)
                members.append(_with_terms(node, terms, space))
            numbers.append(number)
        total = numbers[0]
        for number in numbers[1:]:
            total = total - number if node.sign == "-" else total + number
            total = total if modulus is None else total % modulus
            terms[:2] = [str(total)]  # in the place of the two that it was made of
            members.append(_with_terms(node, terms, space))
    if members[-1] != value:
        members.append(value)
    return members


def _terms(node, names, space):
    return [
        names[term[0]] if len(term) == 1 else f"{names[term[0]]}{space}*{space}{names[term[1]]}" for term in node.terms
    ]


def _with_terms(node, terms, space):
    """The node's formula with these texts for its terms."""
    if not terms:
        return str(node.const)
    if len(terms) == 1:
        return terms[0] if node.const is None else f"{node.const}{space}{node.const_op}{space}{terms[0]}"
    core = f"{space}{node.sign}{space}".join(terms)
    return core if node.const is None else f"{node.const}{space}{node.const_op}{space}({core})"


def corrupt(solution, rng, modulus):
    r"""A wrong symbolic solution out of a right one: one random line ends in another number, and so does the answer.

    >>> import random
    >>> corrupt("<think>\nz=9\nu=z+1=10\n</think>\n\\boxed{10}", random.Random(1), 23).split("\n")
    ['<think>', 'z=5', 'u=z+1=10', '</think>', '\\boxed{13}']
    """

    def other(number):
        return str((int(number) + rng.randrange(1, modulus)) % modulus)

    lines = solution.split("\n")
    steps = [i for i, line in enumerate(lines) if "=" in line]
    answer, slip = lines[steps[-1]].rpartition("=")[2], rng.choice(steps)
    formula, _, value = lines[slip].rpartition("=")
    value = other(value)
    lines[slip] = f"{formula}={value}"
    lines[-1] = f"\\boxed{{{value if slip == steps[-1] else other(answer)}}}"
    return "\n".join(lines)
