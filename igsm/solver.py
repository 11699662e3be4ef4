"""Solve a problem from its text alone: the only part of the generator used here is the default vocabulary.

It reads our three styles, BRIDGE's text (which ours follows) and Meta's. The sentences give each instance
parameter, and thereby who owns what; an abstract parameter is computed from that:

    each Sloop's Fruit = sum over the things T that a Sloop has:
                         each Sloop's T                       if T is a fruit
                         each Sloop's T * each T's Fruit      otherwise

A formula is a small tree: an int, the name of a parameter ("Sloop's Fruit", or a letter in the symbolic
style), or (operator, part, part, ...).

    "3 times the difference of each A's B and each C's D"  is  ("*", 3, ("-", "A's B", "C's D"))
"""

import re
from numbers import Integral

from igsm.vocabulary import CATEGORIES

META_MODULUS = 23  # of all arithmetic in Meta's family
VARIABLE = r"[^\W\d_][^\W_]*"  # a letter, of any alphabet, and letters or digits after it
LONGEST_EXPRESSION, DEEPEST_BRACKET = 200, 30  # what recursion below can bear, and more than anyone writes


def solve(question, categories=None, *, modulus=None):
    """The answer to a question, as an int.

    categories: {category: [item, ...]}, in any order; our own vocabulary when None. The symbolic style needs
    none.
    modulus: None for plain integers, or m for arithmetic on 0..m-1 (Meta's problems: 23).
    Raises ValueError for a modulus under 2 or not whole, and, naming it, for what cannot be parsed: an unknown name,
    a name that is in two categories or is one itself, a sentence of no known form, a parameter without a sentence or
    with two, parameters that depend on each other in a circle.
    """
    parsed = Question(question, categories, modulus)
    return parsed.value(parsed.asked)


class Question:
    """What a question's text says. `style`: "symbolic", "meta" (Meta's wording) or "natural".

    asked: the parameter asked for. said: {instance parameter: formula}, in the order of the text.
    """

    def __init__(self, text, categories=None, modulus=None):
        if modulus is not None and not (isinstance(modulus, Integral) and modulus > 1):  # 23.0: every value is a float
            raise ValueError(f"modulus must be 2 or more and a whole number, or None, got {modulus!r}")
        self.modulus = modulus
        self.said, self._values = {}, {}
        self._formulas, self._split = {}, {}  # caches
        lines = text.strip().split("\n")
        if match := re.fullmatch(r"([a-z]+)\?", lines[-1]):
            self.style, self.asked = "symbolic", match[1]
            for line in lines[:-1]:
                self._read_symbolic(line)
            return
        self._categories = CATEGORIES if categories is None else categories
        self._category_of, self._shared = {}, set()  # shared: items of two categories, or named as a category
        for category, items in self._categories.items():
            for item in items:
                if self._category_of.setdefault(item, category) != category or item in self._categories:
                    self._shared.add(item)
        self._things = self._category_of.keys() | self._categories.keys()
        self._owned = {}  # owner -> things, in the order of the text
        self.style, found = "natural", []
        for sentence in re.split(r"(?<=[.?])\s+(?=The number of |How many )", text.strip()):
            if match := re.fullmatch(r"How many (.+) does (each )?(.+) have\?", sentence):
                found.append((match[3], match[1], sentence))
                if not match[2]:
                    self.style = "meta"
            else:
                self._read_sentence(sentence)
        if len(found) != 1:
            raise ValueError(f"{len(found)} questions 'How many ... does ... have?' instead of one in {text[-200:]!r}")
        owner, thing, sentence = found[0]
        self.asked = f"{owner}'s {thing}"
        if owner not in self._category_of:
            raise ValueError(f"cannot parse {sentence!r}: {owner!r} is not an item of any category")
        if thing not in self._things:
            raise ValueError(f"cannot parse {sentence!r}: {thing!r} is neither an item nor a category")
        self._parts(self.asked, sentence)
        self._below = {}  # category -> categories of what its items own
        for owner, things in self._owned.items():
            self._below.setdefault(self._category_of[owner], set()).update(map(self._category_of.get, things))

    def _read_symbolic(self, line):
        match = re.fullmatch(r"([a-z]+)=(.+)", line)
        if not match:
            raise ValueError(f"cannot parse the condition {line!r}")
        if match[1] in self.said:
            raise ValueError(f"{match[1]!r} is given twice, the second time by {line!r}")
        self.said[match[1]] = parse_expression(match[2])

    def _read_sentence(self, sentence):
        match = re.fullmatch(r"The number of each (.+?) equals (.+)\.", sentence, re.DOTALL)
        if not match:
            raise ValueError(f"cannot parse the sentence {sentence!r}")
        owner, thing = self._parts(match[1], sentence)
        if thing not in self._category_of:
            raise ValueError(f"cannot parse {sentence!r}: {thing!r} is a category, not an item")
        if match[1] in self.said:
            raise ValueError(f"the number of each {match[1]} is given twice, the second time by {sentence!r}")
        self.said[match[1]] = self.parse_description(match[2], sentence)
        self._owned.setdefault(owner, []).append(thing)

    def _parts(self, param, where=None):
        """("A", "B") of "A's B" in the sentence `where`. A may hold "'s " itself: the vocabulary decides."""
        if param not in self._split:
            cuts = ((param[: cut.start()], param[cut.end() :]) for cut in re.finditer("'s ", param))
            read = [(owner, thing) for owner, thing in cuts if owner in self._category_of and thing in self._things]
            if len(read) != 1 or self._shared.intersection(read[0]):
                how = "is not" if not read else "can be read in two ways as"
                raise ValueError(
                    f"cannot parse {where or param!r}: 'each {param}' {how} \"each ITEM's ITEM\" or "
                    '"each ITEM\'s CATEGORY" in names of the vocabulary'
                )
            self._split[param] = read[0]
        return self._split[param]

    def parse_description(self, text, where=None):
        """The formula that the right side of a sentence describes."""
        where = where or text
        if re.fullmatch(r"-?\d+", text):
            return int(text)
        const, link, kind, rest = re.fullmatch(
            r"(?:(-?\d+) (more than|times as much as|times) )?(?:the (sum|difference) of )?(.*)",
            text,
            re.DOTALL,
        ).groups()
        parts = re.split(r"(?:, | and )(?=each )", rest)
        if (len(parts) > 1) != bool(kind) or (kind == "difference" and len(parts) != 2):
            raise ValueError(f"cannot parse {text!r} in {where!r}")
        for part in parts:
            if not part.startswith("each "):
                raise ValueError(f"cannot parse {part!r} in {where!r}")
            self._parts(part[len("each ") :], where)
        params = [part[len("each ") :] for part in parts]
        tree = ("-" if kind == "difference" else "+", *params) if kind else params[0]
        return tree if const is None else ("+" if link == "more than" else "*", int(const), tree)

    def formula(self, param):
        """The formula of a parameter: of its sentence, or formed from the structure if it is abstract."""
        if param in self.said:
            return self.said[param]
        if param not in self._formulas:
            if self.style == "symbolic":
                raise ValueError(f"no condition gives {param!r}")
            self._formulas[param] = self._abstract(param)
        return self._formulas[param]

    def _abstract(self, param):
        owner, thing = self._parts(param)
        if thing not in self._categories:
            raise ValueError(f"no sentence gives the number of each {param}")
        reachable = set(self._below.get(self._category_of[owner], ()))
        for _ in self._below:
            reachable |= {below for category in reachable for below in self._below.get(category, ())}
        if thing not in reachable:
            raise ValueError(f"nothing is said of how each {owner} comes to have any {thing}")
        terms = []
        for child in self._owned.get(owner, ()):
            term = f"{owner}'s {child}"
            if self._category_of[child] != thing:
                term = ("*", term, f"{child}'s {thing}")
            terms.append(term)
        if not terms and self.style != "meta":  # only there may an owner have nothing
            raise ValueError(f"nothing is said of what each {owner} has")
        return ("+", *terms) if len(terms) > 1 else terms[0] if terms else 0

    def value(self, param):
        """The value of a parameter. Raises ValueError if the text does not determine it."""
        values, open_, stack = self._values, set(), [param]
        while stack:
            param = stack[-1]
            if param in values:
                stack.pop()
                continue
            tree = self.formula(param)
            missing = [parent for parent in parents(tree) if parent not in values]
            if not missing:
                values[param] = evaluate(tree, values, self.modulus)
                stack.pop()
            elif param in open_:
                raise ValueError(f"{param!r} depends on itself")
            else:
                open_.add(param)
                stack += missing
        return values[param]


def parse_expression(text):
    """The tree of "3 * (a - b) + -2": ints, variables, + - * and brackets, with or without spaces."""
    tokens = re.findall(rf"[0-9]+|{VARIABLE}|\S", text)
    tokens.append("")  # the end
    position = depth = 0
    if len(tokens) > LONGEST_EXPRESSION:
        raise ValueError(f"an expression of more than {LONGEST_EXPRESSION} tokens: {text[:60]!r} ...")

    def level(operators, operand):
        """Operands with these operators in between: a - b - c is ("-", a, b, c)."""
        nonlocal position
        tree, last = operand(), None
        while tokens[position] in operators:
            operator = tokens[position]
            position += 1
            tree = (*tree, operand()) if operator == last else (operator, tree, operand())
            last = operator
        return tree

    def expression():
        return level(("+", "-"), product)

    def product():
        return level(("*",), factor)

    def factor():
        nonlocal position, depth
        token = tokens[position]
        position += 1
        if token.isascii() and token.isdecimal():
            return int(token)
        if token[:1].isalpha():
            return token
        depth += 1
        if token == "-" and depth < DEEPEST_BRACKET:
            tree = factor()
            depth -= 1
            return -tree if isinstance(tree, int) else ("*", -1, tree)
        if token == "(" and depth < DEEPEST_BRACKET:
            tree = expression()
            if tokens[position] == ")":
                position += 1
                depth -= 1
                return tree
        raise ValueError(f"cannot parse the expression {text!r}")

    tree = expression()
    if tokens[position]:
        raise ValueError(f"cannot parse the expression {text!r}")
    return tree


def parents(tree):
    """The parameters in a formula, from left to right."""
    if isinstance(tree, tuple):
        return [parent for part in tree[1:] for parent in parents(part)]
    return [tree] if isinstance(tree, str) else []


def evaluate(tree, values, modulus=None):
    """The value of a formula. Raises ValueError for a parameter that `values` lacks."""
    if isinstance(tree, tuple):
        operator, result, *others = tree
        result = evaluate(result, values, modulus)
        for other in others:
            x = evaluate(other, values, modulus)
            result = result + x if operator == "+" else result - x if operator == "-" else result * x
    elif isinstance(tree, str):
        if tree not in values:
            raise ValueError(f"{tree!r} has no value")
        result = values[tree]
    else:
        result = tree
    return result if modulus is None else result % modulus


def canonical(tree):
    """Equal for formulas that differ only in the order and grouping of sums and of products."""
    if not isinstance(tree, tuple):
        return tree
    operator, *parts = tree
    parts = [canonical(part) for part in parts]
    if operator == "-":
        return ("-", *parts)
    flat = []
    for part in parts:
        flat += part[1:] if isinstance(part, tuple) and part[0] == operator else [part]
    return (operator, *sorted(flat, key=repr))
