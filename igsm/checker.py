r"""Check every step of a solution against its question: a correct answer for a wrong reason does not pass.

A step of any style gives a parameter, the letter for it, and one of
 - a chain of equal members: the formula in letters, the same with values, intermediate results, the value;
 - a statement that the parameter cannot be computed yet, because certain parents are unknown (a *reflection*);
 - nothing more: the parameter is begun and left (a *retry*).

    - Next, let u represent the number of each A's B.    letter and parameter
      We know that it equals 2 times each C's D.         an *analysis*: the question's sentence once more
      Then u = 2 * p = 2 * 4 = 8.                        chain

A chain is right if all parents were computed before, its first member is the question's formula (the order of
a sum or a product is free), its second member is the first with the letters' values put in, and all members
are worth the same as the true value. A reflection is right if the parents it names are exactly those not
computed, a retry if there are such parents. How each behavior looks in each style: text.py.
"""

import re
from dataclasses import dataclass, field
from string import ascii_lowercase

from igsm import text
from igsm.solver import META_MODULUS, VARIABLE, Question, canonical, evaluate, parents, parse_expression


@dataclass(slots=True)
class Check:
    """What a solution is worth.

    errors: all that is wrong, each as "step 3: wrong formula: ..."; the kinds are "unreadable", "letter",
    "bad reflection", "bad retry", "bad analysis", "solved twice", "parents unsolved", "wrong formula",
    "wrong substitution", "arithmetic", "wrong value", and, of no step, "form", "question not solved",
    "wrong answer".
    """

    correct: bool = False  # every step, and the answer
    answer_correct: bool = False  # what a reward for the answer alone would say
    errors: list[str] = field(default_factory=list)
    steps: int = 0  # lines that compute, reflect or retry
    solved: int = 0  # parameters computed
    redundant: int = 0  # of these, not needed for the answer
    reflections: int = 0
    remembered: int = 0  # steps that come back to a letter given earlier
    analyses: int = 0  # steps that quote the question's sentence
    subgoals: int = 0  # chains that write intermediate results
    retries: int = 0  # begun and left


def check_solution(question, solution, categories=None, *, modulus=None):
    """Reads a solution in any style, step by step, and compares it with what the question says.

    categories, modulus: as for `solve`; Meta's wording is always taken mod 23. `answer_correct` is BRIDGE's
    reward: the content of the first \\boxed{...} is the answer, to the character (Meta's solutions have no
    box: their last value). A leading "<think>\\n" may be missing, as in a completion of a prompt that ends
    with it.
    Raises ValueError if the question cannot be parsed; nothing in a solution makes it raise.
    """
    parsed = Question(question, categories, modulus)
    if parsed.style == "meta" and modulus is None:
        parsed.modulus = META_MODULUS
    answer = str(parsed.value(parsed.asked))
    check = Check()
    steps, stated, box = _read(parsed.style, solution, check)
    state = _State(parsed, check)
    for where, step in steps:
        state.where = where
        try:
            state.add(step)
        except ValueError as error:
            state.wrong("unreadable", error)
    if parsed.asked not in state.solved:
        check.errors.append(f"question not solved: no step computes {parsed.asked!r}")
    elif parsed.style == "meta" and (last := steps[-1][1].name) != parsed.asked:
        check.errors.append(f"wrong answer: the last step is of {last!r}, not of {parsed.asked!r}")
    for number in stated:
        if number != answer:
            check.errors.append(f"wrong answer: {number}, not {answer}")
    check.answer_correct = box == answer
    check.correct = not check.errors
    check.solved = len(state.solved)
    check.redundant = len(state.solved - state.needed())
    return check


@dataclass(slots=True)
class _Step:
    name: str  # of the parameter: "Sloop's Fruit", or its letter in the symbolic style
    letter: str
    chain: list | None = None  # members as text
    helpers: tuple = ()  # (letter, chain) of Meta's helper variables, before the chain
    unknown: list | None = None  # parents that a reflection names
    analysis: str | None = None
    remembered: bool = False
    retry: bool = False


class _State:
    """What has been denoted and computed so far."""

    def __init__(self, question, check):
        self.question, self.check = question, check
        self.letter_of, self.param_of = {}, {}
        self.solved = set()
        self.where = ""  # in the text

    def wrong(self, what, why):
        self.check.errors.append(f"{self.where}: {what}: {why}")

    def add(self, step):
        """Adds one step and what is wrong with it. Raises ValueError if it cannot be judged at all."""
        check, question, param, wrong = self.check, self.question, step.name, self.wrong
        check.steps += 1
        formula = question.formula(param)
        question.value(param)  # raises if the question does not determine it
        unsolved = [parent for parent in dict.fromkeys(parents(formula)) if parent not in self.solved]
        if step.retry:
            check.retries += 1
            if param in self.solved or not unsolved:
                wrong("bad retry", f"{param!r} could be computed, or was")
            return
        if question.style == "symbolic":  # letters are the question's, so there is nothing to say
            step.remembered = param in self.letter_of
        check.reflections += step.unknown is not None
        check.remembered += step.remembered
        check.analyses += step.analysis is not None
        if step.remembered:
            if self.letter_of.get(param) != step.letter:
                wrong("letter", f"{step.letter} was not given to {param!r} before")
        elif param in self.letter_of:
            wrong("letter", f"{param!r} has its letter {self.letter_of[param]} already")
        elif step.letter in self.param_of:
            wrong("letter", f"{step.letter} is {self.param_of[step.letter]!r} already")
        self.letter_of.setdefault(param, step.letter)
        self.param_of.setdefault(step.letter, param)

        if step.unknown is not None:
            if param in self.solved:
                wrong("bad reflection", f"{param!r} is called unknown but was computed")
            if not unsolved or sorted(step.unknown) != sorted(unsolved):
                wrong("bad reflection", f"{param!r} lacks {unsolved}, not {step.unknown}")
        else:
            if param in self.solved:
                wrong("solved twice", f"{param!r}")
            if unsolved:
                wrong("parents unsolved", f"{param!r} needs {unsolved}, not computed yet")
            self._check_chain(step, formula)
            self.solved.add(param)  # even if wrongly: what follows from it is judged for itself
        if step.analysis is not None:
            said = question.said.get(param)
            read = parse_expression if question.style == "symbolic" else question.parse_description
            if said is None or canonical(read(step.analysis)) != canonical(said):
                wrong("bad analysis", f"the question does not say that {param!r} equals {step.analysis!r}")

    def _check_chain(self, step, formula):
        if len(step.helpers) > 12:  # a model that repeats "r = r + r" doubles the formula each time
            raise ValueError(f"{len(step.helpers)} helper variables")
        question, meaning = self.question, dict(self.param_of)  # letter -> parameter, or the formula of a helper
        values = {letter: question.value(param) for letter, param in meaning.items() if param in self.solved}
        for letter, chain in step.helpers:
            if letter in meaning:
                self.wrong("letter", f"{letter} is {meaning[letter]!r} already")
            meaning[letter], values[letter] = self._read_chain(chain, meaning, values)
            self.param_of[letter] = f"a part of {step.name}"  # so it is taken, and no later formula may use it
        tree, value = self._read_chain(step.chain, meaning, values)
        unused = {letter for letter, _ in step.helpers}
        for members in [*(chain for _, chain in step.helpers), step.chain]:
            unused -= set(re.findall(VARIABLE, members[0]))
        if unused:  # it may have taken in a parameter that the formula does not have
            self.wrong("wrong formula", f"{', '.join(sorted(unused))} of {step.name!r} not used")
        self.check.subgoals += len(step.chain) > 3
        if canonical(tree) != canonical(formula):
            self.wrong("wrong formula", f"{step.chain[0]!r} for {step.name!r}")
        elif value != question.value(step.name):
            self.wrong("wrong value", f"{step.name!r} is {question.value(step.name)}, not {value}")

    def _read_chain(self, chain, meaning, values):
        """The formula that a chain's first member stands for, in parameters, and the value it arrives at."""
        first = parse_expression(chain[0])
        expected = chain[:1]
        if parents(first):
            expected.append(re.sub(VARIABLE, lambda match: str(values.get(match[0], "?")), chain[0]))
        if chain[: len(expected)] != expected:
            self.wrong("wrong substitution", f"{chain[0]!r} should be followed by {expected[-1]!r}, not {chain[1:2]}")
        if len(chain) < len(expected):
            raise ValueError(f"nothing follows {chain[0]!r}")
        numeric = chain[len(expected) - 1 :]
        results = [evaluate(parse_expression(member), {}, self.question.modulus) for member in numeric]
        for member, result in zip(numeric, results):
            if result != results[0]:
                self.wrong("arithmetic", f"{member!r} does not equal {results[0]}")
        if chain[-1] != str(results[-1]):
            self.wrong("arithmetic", f"the equation ends with {chain[-1]!r} instead of the number {results[-1]}")

        def spell_out(tree):
            if isinstance(tree, tuple):
                return (tree[0], *map(spell_out, tree[1:]))
            return meaning.get(tree, f"unknown {tree}") if isinstance(tree, str) else tree

        return spell_out(first), results[-1]

    def needed(self):
        """The parameters that the answer depends on."""
        found, stack = set(), [self.question.asked]
        while stack:
            param = stack.pop()
            if param not in found:
                found.add(param)
                stack += parents(self.question.formula(param))
        return found


def _read(style, solution, check):
    """A solution's steps as [(where, step), ...], the answers it states, and what is in its first box."""
    _, opened, rest = solution.partition("\\boxed{")
    box, closed, _ = rest.partition("}")
    box = box if opened and closed else None
    if style == "meta":
        read_line, answers = _read_meta_step, []
        lines = [line for line in re.split(r"(?<=\.)\s+(?=Define )", solution.strip()) if line]
        last = re.search(r"= (\d+)\.\s*$", solution)
        box = last and last[1] if box is None else box
    else:
        read_line, form, starts = _read_line, NATURAL_FORM, ("- ", "Define ")
        if style == "symbolic":
            read_line, form, starts = _read_symbolic_line, SYMBOLIC_FORM, tuple(ascii_lowercase)
        lines = [line for line in solution.split("\n") if line.startswith(starts)]
        match = form.fullmatch(solution.rstrip())
        answers = match.groups() if match else []
        if not match:
            check.errors.append("form: the text as a whole does not have the form of a solution")
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            steps.append((f"step {number}", read_line(line)))
        except ValueError as error:
            check.steps += 1
            check.errors.append(f"step {number}: unreadable: {error}")
    return steps, answers, box


SYMBOLIC_FORM = re.compile(r"(?:<think>\n)?(?:[a-z]+[=(?].*\n)*</think>\n\\boxed\{([^}]*)\}")
NATURAL_FORM = re.compile(
    "(?:<think>\n)?" + re.escape(text.HEAD.removeprefix("<think>\n")) + r"(?:(?:- |Define ).*\n)*"
    r"Thus, the answer is (-?\d+)\.\n</think>\n<answer>\nThe final answer is \\boxed\{([^}]*)\}\.\n</answer>"
)
FIELDS = {
    "name": r"each (?P<name>.+?)",
    "letter": r"(?P<letter>[A-Za-z][0-9]?)",
    "number": r"(?P<number>-?\d+)",
    "names": r"(?P<names>each .+?)",
    "be": r"(?:is|are)",
    "chain": r"(?P<chain>[^.]+)",
    "said": r"(?P<said>.+?)",
}


def _patterns(phrases, *fields):
    """Phrases of text.py as regular expressions, with the named fields in the places of {} or {0}, {1}."""
    groups = [FIELDS[field] for field in fields]
    escaped = [re.sub(r"\\\{(\d?)\\\}", r"{\1}", re.escape(phrase)) for phrase in phrases]  # but not {}, {0}, {1}
    return [re.compile(phrase.format(*groups) + r"(?: |$)") for phrase in escaped]


GIVEN = _patterns(text.GIVEN, "name", "number")
FIND = _patterns(text.FIND, "name")
DEFINE = _patterns(text.DEFINE, "name", "letter")
DENOTE = _patterns(text.DENOTE, "letter")
REMEMBER = _patterns([text.REMEMBER], "letter")
ANALYSIS = _patterns([text.ANALYSIS], "said")
UNKNOWN = [
    *_patterns(text.UNKNOWN[:1], "names", "be"),
    *_patterns(text.UNKNOWN[1:2], "names"),
    *_patterns(text.UNKNOWN[2:], "names", "letter"),
]
EQUATION = _patterns(["Then {} = {}.", "So {} = {}."], "letter", "chain")
RETRY = _patterns([text.RETRY], "name")


def _read_line(line):
    """A step of the natural or the define style. Raises ValueError if it is neither."""
    if match := re.fullmatch(r"Define each (.+?) as ([A-Za-z][0-9]?)\. So \2 = ([^.]+)\.", line):
        return _Step(match[1], match[2], match[3].split(" = "))
    rest = line.removeprefix("- ")

    def take(patterns, wanted=True):
        """Cut off the first matching pattern; return its {field: text}, or {} if none matches and not `wanted`."""
        nonlocal rest
        for pattern in patterns:
            if match := pattern.match(rest):
                rest = rest[match.end() :]
                return match.groupdict()
        if wanted:
            raise ValueError(f"cannot parse {rest!r} in {line!r}")
        return {}

    if begun := take(RETRY, wanted=False):
        if rest:
            raise ValueError(f"cannot parse {rest!r} in {line!r}")
        return _Step(begun["name"], "", retry=True)
    seen = take(GIVEN + FIND + DEFINE)
    remembered = False
    if "letter" not in seen:
        again = take(REMEMBER, wanted=False)
        remembered = bool(again)
        seen |= again or take(DENOTE)
    analysis = take(ANALYSIS, wanted=False).get("said")
    ending = take(EQUATION + UNKNOWN)
    if rest:
        raise ValueError(f"cannot parse {rest!r} in {line!r}")
    if ending.get("letter", seen["letter"]) != seen["letter"]:
        raise ValueError(f"{line!r} speaks of {seen['letter']} and then of {ending['letter']}")
    step = _Step(seen["name"], seen["letter"], analysis=analysis, remembered=remembered)
    if "chain" in ending:
        step.chain = ending["chain"].split(" = ")
    if "number" in seen and step.chain != [seen["number"]]:
        raise ValueError(f"{line!r} gives {seen['number']} and then {step.chain or 'no value'}")
    if "names" in ending:
        step.unknown = [name.removeprefix("each ") for name in re.split(r", (?=each )", ending["names"])]
    return step


def _read_symbolic_line(line):
    """`v=5*b=5*2=10`, with an analysis `v(5*b)=5*b=5*2=10`; a reflection `v?b?c`; a retry `v?`."""
    match = re.fullmatch(r"([a-z]+)(?:\(([^=?]*)\))?([=?])(.*)", line)
    if not match:
        raise ValueError(f"cannot parse {line!r}")
    letter, analysis, kind, rest = match.groups()
    if kind == "=":
        return _Step(letter, letter, rest.split("="), analysis=analysis)
    if not rest and analysis is None:
        return _Step(letter, letter, retry=True)
    if not re.fullmatch(r"[a-z]+(?:\?[a-z]+)*", rest):
        raise ValueError(f"cannot parse {line!r}")
    return _Step(letter, letter, unknown=rest.split("?"), analysis=analysis)


def _read_meta_step(line):
    """`Define A's B as N; r = v - t = 18 - 0 = 18; so N = 7 * r = 7 * 18 = 11.`: one operator at a time.
    `Define A's B as BACK.` is a retry."""
    if match := re.fullmatch(r"Define (.+?) as BACK\.", line):
        return _Step(match[1], "", retry=True)
    match = re.fullmatch(rf"Define (.+?) as ({VARIABLE}); ((?:{VARIABLE} = [^;]+; )*)so \2 = ([^;]+)\.", line)
    if not match:
        raise ValueError(f"cannot parse {line!r}")
    helpers = [part.split(" = ") for part in match[3].split("; ") if part]
    return _Step(match[1], match[2], match[4].split(" = "), tuple((letter, chain) for letter, *chain in helpers))
