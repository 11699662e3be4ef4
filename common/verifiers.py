r"""Completion + gold answer -> reward. Never hangs, never executes what a model wrote.

    grade(responses, golds, verifier="math")  ->  [Verdict(reward=1.0, status="ok"), ...]

The rules, by name (`VERIFIERS`). Your own verifier is a function (response, gold) -> float, or "module:function".

    math        LUFFY's reward: text between the first and second </think>, by Math-Verify; without the tag 0
    full        the same on the whole text (LUFFY's version for models that do not think in tags)
    strict_box  LUFFY's evaluation (as oat): after </think> if there is one; the last \boxed{} alone counts
    robust      for your own data (common/robust.py): whole answers, exact numbers, units, sets, intervals, labels
    boxed       BRIDGE's reward: the FIRST \boxed{...}, up to its first "}", is the gold, letter by letter
    exact       last \boxed{}, else what follows the last ####, else all after </think>: the gold, stripped
    mcq         label of a choice: the last of all boxes and "answer is X", else at the start of the last or first line

Statuses. "ok": a verdict, right or wrong. "unparsable": no answer in the response (or in the gold). "timeout": the
deadline came first. "error": the verifier raised or its process died. All but "ok" have reward 0 and a `detail`.

Traps
- `\boxed{42} no wait \boxed{7}` is 7: the last box wins. Math-Verify 0.6, of LUFFY's runs, joins boxes only
  across a comma, "and" or "or"; 0.9 joins whatever is near and reads {42, 7}. The rule of 0.6 is kept.
- sympy's parse_expr is eval, and lambdify writes Python with the names of symbols in it. Answers reach both:
  Math-Verify 0.9 runs what stands in the brackets of \sum_{n=0}^\infty \frac{1+n\text{[...]}}{n!}. Here both
  are replaced while a text is in its hands, and CPython then refuses to run or open anything (`_audit`).
- Math-Verify's own time-outs are off: SIGALRM needs a main thread, cannot stop a long C call, and leaves sympy's
  caches half-written. Here the parent kills and replaces the process.
"""

import ast
import atexit
import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

MAX_CHARS = 65_536  # math, full, strict_box and mcq look at the end of a longer text: the last answer wins
MEMORY = 4 << 30  # bytes of address space that a worker may have
GROWTH = 512 << 20  # bytes of resident memory by which a worker may grow before it is replaced
START_TIMEOUT = 120.0  # seconds in which a worker must have imported its verifier


class NoAnswer(ValueError):
    """A verifier raises this when there is nothing to compare: reward 0, status "unparsable"."""


class Verdict(NamedTuple):
    reward: float
    status: str  # "ok" | "timeout" | "error" | "unparsable"
    detail: str | None = None  # why it is not "ok"; "gold unreadable: ..." if the gold is at fault


# Rules on text alone. They run in the caller's process without a deadline: nothing is slower than linear.


def boxed_reward(response: str, gold: str) -> float:
    r"""BRIDGE's reward (`naive.py`): 1.0 iff the first `\boxed{...}`, up to its first "}", is exactly `gold`.

    >>> boxed_reward(r"x \boxed{5} then \boxed{4}", "5"), boxed_reward(r"\boxed{5.0}", "5")
    (1.0, 0.0)
    """
    return _judge(_boxed, response, gold).reward


def _boxed(response, gold):
    # The original's \\boxed\{([^}]*)\} takes quadratic time on unclosed boxes.
    start = response.find(r"\boxed{")
    end = response.find("}", start)
    if start < 0 or end < 0:
        raise NoAnswer("no closed box")
    return response[start + len(r"\boxed{") : end] == str(gold)


BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{)?")
OPEN_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
JOIN = re.compile(r"\s*(?:and|or|,)\s*")


def closing_brace(text: str, inside: int, end: int = sys.maxsize, *, signs: str = "[{}]") -> int | None:
    """Return the index of the brace that closes the one just before `inside`; None if it stays open up to `end`."""
    depth = 1
    for sign in re.compile(signs, re.S).finditer(text, inside, end):
        depth += (sign[0] == "{") - (sign[0] == "}")
        if depth == 0:
            return sign.start()
    return None


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{}` or `\fbox{}`, up to its own brace; None if none or it stays open.

    Boxes with only a comma, "and" or "or" between them are one answer: `\boxed{1} and \boxed{2}` is "1,2".
    """
    found, end = collections.deque(), len(text)
    for start, inside in reversed([box.span() for box in BOX.finditer(text)]):
        close = closing_brace(text, inside, end) if text[inside - 1] == "{" else None
        if close is None or (found and not JOIN.fullmatch(text, close + 1, end)):
            break
        found.appendleft(text[inside:close].strip())
        end = start
    return ",".join(found) if found else None


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Return (start, end, content) of the last boxes of a text, without boxes in boxes. `\{` is not a brace."""
    found = []
    for box in [*OPEN_BOX.finditer(text)][-50:]:
        close = closing_brace(text, box.end(), signs=r"\\.|[{}]")
        if close is None:
            found = []  # a box that stays open was to hold the answer
        elif not found or box.start() >= found[-1][1]:
            found.append((box.start(), close + 1, text[box.end() : close].strip()))
    return found


def after_think(response):
    """What follows </think>, up to a second one; the whole text if there is no tag."""
    return response.split("</think>", 2)[:2][-1]


def _exact(response, gold):
    text = after_think(response)
    answer = last_boxed(text)
    if answer is None:
        answer = text.rpartition("####")[2]
    if not answer.strip():
        raise NoAnswer("no answer")
    return without_commas(answer) == without_commas(str(gold))


def without_commas(text: str) -> str:
    """A text without the space around it and the commas of thousands."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.strip())


def _mcq(response, gold):
    truth = choice_label(str(gold))
    if not truth:
        raise NoAnswer(f"gold unreadable: {str(gold)[:100]}")
    label = chosen_label(after_think(response)[-MAX_CHARS:], digits=True)
    if not label:
        raise NoAnswer("no label, or two, or one in doubt")
    return label == truth


LABEL = re.compile(
    r"(?is)(?:[\s\"'“.]|-\s)*(?:(?:the |la |el |die )?"
    r"(?:option|choice|answer|letter|letra|opci[oó]n|r[eé]s?p(?:onse|uesta|osta))\b[\s:]*)?"
    r"([(（]?)([a-z]|\d)(?![a-z0-9_^]|['’][a-z]|(?<!'.)['’])([)）\"]?)(.*)"
)
SECOND_LABEL = re.compile(
    r"(?:(?:(?!\b[A-Z]\b)[^().\n]){1,60}?\bor(?= \([A-Z]\)))?"  # (B) cats or (C) dogs
    r"\s*(?:[,;./&+–—、，；：。-]|and\b|or\b|as well as\b|或者?|[和与及]|또는|または|\\cup|∪|:\s|(?=\())\s*"
    r"\(?(?:and |or )?(?:also )?[(\"]?([A-Z]|\d)[)\"]?\s*(?:$|[).:,;。，、或和]|and\b|or\b)"
)


def choice_label(text: str, *, sentence: bool = False) -> str | None:
    """The label of a choice that starts a text; "" for two labels, None for none. sentence: words may follow it.

    >>> choice_label("(b) dogs"), choice_label("A, B"), choice_label("A dog"), choice_label("B as x < 0", sentence=True)
    ('B', '', None, 'B')
    """
    style = r"\\(?:(?:text|math)(?:bf|rm|it|sf|normal)?|bf|rm|it|sf)(?![a-zA-Z])"
    text = re.sub(style + r"|\\boxed|[{}$*~`\[\]_]|\\[ ,;()]", " ", text)
    if not (found := LABEL.match(re.split("<[|/]", text)[0].strip())):
        return None
    opened, label, closed, rest = found.groups()
    text_of_option = re.fullmatch(r"[\s.:]*(?:Not [a-z]+|(?:False|Incorrect|Wrong)(?:, (?:True|False))?)[\s.]*", rest)
    if not text_of_option and re.match(rf"(?i)[\s.]*(?:{WRONG}|\((?:not|wrong|incorrect|false)\b)", rest):
        return ""
    if (second := SECOND_LABEL.match(rest)) and second[1].isdigit() == label.isdigit():
        return ""
    alone = re.fullmatch(r"[\s.:。!！✅✓\"'”]*", rest)
    # not "A dog", "I think", "V-1"
    after = r"\s*(?:[.:,;](?!\d)|[-–—](?!\w)|[，。；：\u3040-\u9fff\uac00-\ud7af])|\s+\("
    plain = opened or closed or re.match(after, rest)
    needs_reason = label in "AI0123456789"  # "A dog" and "3 dogs" are no labels
    goes_on = sentence and re.match(r"\s+(?:because|since|as|which)\b" if needs_reason else r"\s+[a-z]", rest)
    good = alone or (opened or closed if label.islower() else plain or goes_on)
    return label.upper() if good else None


def line_label(text: str) -> str | None:
    r"""The label of the last line, or else of the first. None if other lines have other labels: they list the options.
    "" if the label of the first line is then retracted.

    >>> line_label("A) no\nB) yes\n\nB) yes"), line_label("A) no\nB) yes"), line_label("B\nFor it is larger.")
    ('B', None, 'B')
    """
    lines = [line for line in text.split("\n") if line.strip()] or [""]
    labels = [choice_label(line) for line in lines[:1] + lines[1:][-50:]]
    found = [label for label in labels if label is not None]
    if labels[-1] is not None and (len(found) == 1 or found.count(labels[-1]) > 1):
        return labels[-1]
    if set(found) != {labels[0]}:
        return None
    return "" if retracted(text, text.index(lines[0]) + len(lines[0]), labels[0]) else labels[0]


ANSWER = r"(?:answers?|ans|final result|antwort|r[eé]s?p(?:uesta|onse)|risposta|resposta|ответ)(?: finale?)?"
IS = (
    r"(?:[:：]|\b(?<!no )(?:(?:must|should|would|will|has to|can only) be|is|are|ist|lautet|est?|[èé])\b"
    r"(?: (?:indeed|clearly|definitely|simply|therefore|thus|donc|also|daher)\b)?)(?![\s*_:$]*(?:not|nicht|pas)\b)"
)
CHINESE = (
    "(?:答案】?|正确选项)(?:是|为|选)?[:：]?|(?:故|因此|所以|本题|(?<!不)应)选[:：]?|"
    "(?:答え|正解)(?:は|[:：])|정?답(?:은|[:：])"
)
LISTED = r"[^\w:：\n]{0,4}\b(?:(?-i:[A-HJ-Z])|\d)\b\W{0,4}[:：]"  # Option A: cats
CHOICE = re.compile(
    rf"(?i)(?:(?:\b|_)(?:{ANSWER}|option|choice|letter)\b(?!{LISTED})[^.\n:：]{{0,40}}?(?:{IS}| [-–—] )|"
    rf"<(?:final_)?answer>|####(?=[ *(]*[A-Z][ *).]*(?:\n|$))|"
    rf"\bI(?:'d|'ll| would| will)? (?:go with|pick|choose|select)\b|{CHINESE})[ *_:$\n]*"
)
CORRECT = re.compile(r"\b([A-J])\b\W{0,3} is (?:the )?(?:correct|right|best|answer)\b")
BETWEEN_BOXES = re.compile(r"[\s$.]*(?:and|or|[,、，和或])?[\s$]*")
PLACEHOLDER = re.compile(r"(?i)[\s.…]*+(?:\\text\s*\{)?(?:your |the )?(?:final )?(?:answer)?[\s.…}]*")  # of a box


def echoed(text: str, start: int, end: int, content: str) -> bool:
    r"""Return whether a box repeats the request for one: `put it within \boxed{}` holds no answer."""
    around = text[max(0, start - 200) : start].rpartition("\n")[2] + text[end : end + 200].partition("\n")[0]
    return bool(PLACEHOLDER.fullmatch(content) and re.search("[A-Za-z]{2}", around))


def chosen_label(text: str, *, digits: bool = False) -> str | None:
    """The label that a response chooses: in its last box, after its last "answer is", or on its last or first line. ""
    for two labels, for one in doubt, and for one before a later mark that names another; None for none. digits: a digit
    is a label too."""
    spans = [m.span() for m in CHOICE.finditer(text)]  # found: (end, start, text with the label, is it a sentence?)
    found = [(end, start, text[end : end + 300].partition("\n")[0], True) for start, end in spans]
    found += [(m.end(), m.start(), m[1], False) for m in CORRECT.finditer(text)]
    if filled := [box for box in boxes(text) if not echoed(text, *box)]:
        start, end, content = filled[-1]
        if len(filled) > 1 and BETWEEN_BOXES.fullmatch(text, filled[-2][1], start):
            content = f"{filled[-2][2]}, {content}"
        line_end = (text + "\n").index("\n", end)
        if second := SECOND_LABEL.match(text, end, line_end):
            end, content = second.end(), f"{content}, {second[1]}"
        found.append((end, start, content, False))
    marks = (mark for mark in sorted(found, reverse=True) if claimed(text, mark[1]))  # most are never looked at
    later = []  # capitals after the marks that hold no label, the last mark first
    for i, (end, start, said, sentence) in enumerate(marks):
        label = choice_label(said, sentence=sentence)
        readable = label is not None and (digits or not label.isdigit())
        if (i == 0 or readable) and retracted(text, end, label):
            return ""
        if readable:
            return "" if later and label not in later else label
        if not later and not re.match("(?i)option|choice", text[start:end]):
            later = re.findall(r"(?<![\w'’])[B-HJ](?![\w'’])", said.partition(". ")[0])
    return line_label(text)


# Doubts, for mcq and robust.

DOUBT = "maybe|perhaps|possibly|probably|could be|might be|may be"
WRONG = (
    r"(?:(?:'s| is| was| can)?(?:(?: ?not| never|n't)(?: be)? (?:the|right|correct|true|possible|valid)| wrong|"
    r" incorrect| false)\b|(?<![\s.])(?:是|也)?(?:不对|不正确|错误|错的))"
)
SECOND_THOUGHT = "|".join([  # how a later sentence may begin
    "(?:wait|hm+|oops|(?<!, )actually|sorry|correction|scratch that|on second thought|(?:up)?on reflection|edit|"
    rf"rechecking|let me correct|{DOUBT})\b",
    r"no[,.:]|no [A-J]\b",
    "等等|等一下|不对|更正|不，",
    r"I (?:made|meant?|was wrong|am not sure|change my|would like to revise)\b",
    rf"(?:that|this|it|which){WRONG}",  # that can't be right
    r"(?:but|however),? (?:it|that|this|I|the answer|[A-J])\b[^.\n]{0,60}"  # but this does not work
    r"(?:(?:not|n't) (?:be |seem |look )?(?:right|correct|true|possible|work|make|match|sure|the answer)|"
    r"wrong|incorrect|should be(?! \w+ed\b))\b",
])  # fmt: skip
RETRACTED = re.compile("(?is)" + "|".join([  # after an answer
    rf"[^.\n]*\b(?:{DOUBT})\b(?! \w+e[dn]\b)",  # 5, or maybe 6
    r"(?-i:[A-J]?[^.!,;\nA-Z]{0,20}\?)",  # 5?
    rf"[\s$*]*(?:{WRONG}|\((?:wrong|incorrect)\b)",  # 5 is not right
    r"[^\n]{0,40}\(should be\b(?! \w+ed\b)",  # 5 (should be 6)
    rf".*(?:[.!?;:,—\n$。，！？；-]\s{{0,3}}|\b(?:but|oh|or),? )(?:{SECOND_THOUGHT})",
]))  # fmt: skip
CHECK = re.compile(
    r"(?is)[^.\n]{0,40}[\s.$]{1,9}(?:wait|hm+)\W{1,3}(?:let me|let's|I)\b[^.:\n]{0,40}(?:check|verify)\b.*\b"
    r"(?:correct|right)\W*$"
)
OTHER_IS_WRONG = re.compile(  # - **A) days**: This is incorrect.
    r"(?m)^[^\w\n]{0,9}(?:\d\.[^\w\n]{1,9})?(?:(?i:option|choice)[^\w\n]{0,9})?[A-J]\b"
    rf"(?=[^\n]*(?i:{WRONG}))(?![^\n]*\b(?i:wait|actually|sorry|I|my)\b)[^\n]*"
)
OBJECTION = re.compile(r"(?i)\b(?:not|no|wrong|incorrect|mistake|error|but|however|instead|should|so)\b|n't\b")
NO_CLAIM = "|".join([
    r"if|suppos\w+|assum\w+|whether|unless|check|verify",
    rf"might|could|may|possible|{DOUBT}",
    r"doubt|wrong|incorrect|false|mistake\w*|not|not convinced|cannot|unlikely|impossible|contradiction|no way",
    r"(?:instead|in place) of|rather than|as opposed to|unlike|worst|second[- ]best|runner-up|least \w+|old|previous",
    r"first (?:glance|sight),?|initial|obvious|apparent|naive|tempting|trap",
    r"(?<!\bI )(?<!\bwe )(?<!\bI would )(?<!\bI'd )(?:says?|thinks?|believes?|claims?|argues?)|(?:student|teacher)'s",
])  # fmt: skip
UNCLAIMED = re.compile(  # before an answer; only such words may stand in between: it is wrong that the answer is
    rf"(?i)(?:\b(?:{NO_CLAIM})|n't)[\s*_$]+(?:(?:that|the|an?|this|it|we|you|one|final|true|is|was|correct|right|answer|"
    r"value|be|to|think|say|believe|assume|claim|guess|my|our|your|h(?:is|er)|[a-z]|\w+'s)\b|[\s*_$={(\\:])*$"
)


def claimed(text: str, start: int) -> bool:
    """Return whether what starts there is claimed: not in "if the answer is" or "it is wrong that the answer is"."""
    return not UNCLAIMED.search(text, max(0, start - 80), start)


def retracted(text: str, end: int, label: str | None = None) -> bool:
    """Return whether what ended there is then doubted or retracted. A check that confirms it does neither, nor does a
    line that calls an option other than `label` wrong."""
    if label:
        text = OTHER_IS_WRONG.sub(lambda line: line[0] if re.search(rf"\b{label}\b", line[0]) else "", text[end:])
        end = 0
    if (check := CHECK.match(text, end)) and not OBJECTION.search(check[0]):
        return False
    return RETRACTED.match(text, end) is not None


# Rules that use Math-Verify. They may hang or use up all memory, so they run only in workers.


def math_reward(response: str, gold: str, *, think_gate: bool = True) -> float:
    r"""LUFFY's reward, 1.0 or 0.0 (`mix_src/math_verify_reward.py`): `grade` of one item.

    think_gate: only what stands between the first and the second </think> counts, and without a tag the reward is 0
    (`reward_impl_version` 3, all published runs); False: the whole text (version 4).

    >>> math_reward("hm </think> It is \\boxed{0.5}", r"\frac{1}{2}"), math_reward(r"\boxed{2}", "2")
    (1.0, 0.0)
    """
    name = "math" if think_gate else "full"
    if _in_worker:  # a user's verifier that builds on this one
        return _judge(VERIFIERS[name], response, gold).reward
    return grade([response], [gold], verifier=name, workers=1)[0].reward


def _math(response, gold):
    if "</think>" not in response:
        raise NoAnswer("no </think>")
    return _compare(after_think(response), gold)


def _strict_box(response, gold):
    box = last_boxed(after_think(response))
    if not box:
        raise NoAnswer("no closed box")
    gold = str(gold).strip()
    # Math-Verify reads 3e8 as 3 times e times 8
    number = re.sub(r"^(-?[\d.]+)e([+-]?\d+)$", r"\1 \\times 10^{\2}", gold)
    return box == gold or _compare(r"\boxed{" + box.replace("\n", " ") + "}", number)


def _robust(response, gold):
    from common.robust import robust  # here: it needs sympy, which a training process does not load

    _math_verify()
    with _seal():
        return robust(response, str(gold))


def _compare(text, gold):
    parse, verify, seed = _math_verify()
    with _seal():
        seed(0)  # sympy draws random points and orders: the same text must get the same verdict
        answer = parse(text[-MAX_CHARS:], parsing_timeout=None)
        truth = parse(f"${gold}$", parsing_timeout=None)
        if not answer or not truth:
            raise NoAnswer("no answer in the response" if truth else f"gold unreadable: {gold[:100]}")
        return verify(truth, answer, timeout_seconds=None)


VERIFIERS = {
    "math": _math, "full": _compare, "strict_box": _strict_box, "robust": _robust, "boxed": _boxed, "exact": _exact,
    "mcq": _mcq,
}  # fmt: skip
# Imports and the parser's tables take a third of a second, which should not count against the first items' timeout.
WARM_UP = [(r"\frac{1}{2}", "0.5"), (r"(1, \sqrt{2})", "1"), ("x^2 - 1", "(x - 1)(x + 1)"), (r"x \in [0, 1)", "x")]
IN_PROCESS = {"boxed", "exact"}  # comparing strings can neither hang nor crash: no worker


# The seal: no model's text can reach eval, exec, a file or a process.

_sealed = False  # True while a model's text is in Math-Verify's hands
_in_worker = False


@contextlib.contextmanager
def _seal():
    global _sealed
    _sealed = True
    try:
        yield
    finally:
        _sealed = False


@functools.cache
def _math_verify():
    """Import Math-Verify, close its ways to eval and exec. -> parse, verify, seed of sympy's randomness."""
    import latex2sympy2_extended.latex2sympy2 as latex
    import latex2sympy2_extended.math_normalization as normalization
    import math_verify.parser
    import sympy.core.evalf
    import sympy.core.random
    import sympy.parsing.sympy_parser
    import sympy.polys.rootoftools

    def swap(function, safe, *modules):
        def either(*args, **kwargs):
            return (safe if _sealed and not _importing() else function)(*args, **kwargs)

        for module in modules:
            setattr(module, function.__name__, either)

    swap(sympy.parse_expr, _arithmetic, sympy.parsing.sympy_parser, math_verify.parser, latex)
    swap(sympy.lambdify, _polynomial, sympy.core.evalf, sympy.polys.rootoftools)

    extract = normalization.extract_boxed_content

    def extract_last_box_wins(text, mode="last"):
        return mode == "last" and last_boxed(text) or extract(text, mode)

    normalization.extract_boxed_content = extract_last_box_wins
    # Rollouts of a prompt share the gold and often the answer; the parser's own cache holds 20.
    uncached = math_verify.parser.parse_latex_cached.__wrapped__
    math_verify.parser.parse_latex_cached = functools.lru_cache(2048)(uncached)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn that its time-outs are off
    sys.addaudithook(_audit)
    return math_verify.parse, math_verify.verify, sympy.core.random.seed


def _arithmetic(text, *_, **__):
    """sympy.parse_expr(text, evaluate=False) of numbers and + - * / ** ( ), without eval."""
    import sympy
    from sympy.parsing.sympy_parser import EvaluateFalseTransformer

    def build(node):
        match node:
            case ast.Constant(value=value) if type(value) is int:
                return sympy.Integer(value)
            case ast.Constant(value=float()):
                return sympy.Float(ast.get_source_segment(text, node))
            case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
                return -build(node.operand) if isinstance(node.op, ast.USub) else build(node.operand)
            case ast.Call(func=ast.Name(id="Add" | "Mul" | "Pow" as name), keywords=[_]):  # of the transformer
                return getattr(sympy, name)(*map(build, node.args), evaluate=False)
        raise SyntaxError("not arithmetic")

    text = text.strip()
    return build(EvaluateFalseTransformer().visit(ast.parse(text, mode="eval").body))


def _polynomial(symbol, expression, *_, **__):
    """For lambdify: its two callers, which sum series and refine roots, want integer polynomials."""
    from sympy import Poly

    coefficients = Poly(expression, symbol).all_coeffs()
    if not all(c.is_Integer for c in coefficients):
        raise NotImplementedError("not a polynomial over the integers")
    return lambda x: functools.reduce(lambda total, c: total * x + int(c), coefficients, 0)


HARMLESS = {"import", "sys._getframe", "array.__new__", "builtins.id", "object.__getattr__", "object.__setattr__"}


def _audit(event, args):
    """The second lock: while sealed, CPython imports what is installed and runs or opens nothing else."""
    if not _sealed or event in HARMLESS or _importing():
        return
    if event == "compile" and args[1] == "<unknown>":  # ast.parse: a tree, not code
        return
    if event in ("compile", "exec") and sys._getframe(1).f_globals["__name__"] == "sympy.polys.monomials":
        return  # a product of monomials, written from the number of variables alone
    raise PermissionError(f"{event} while an answer is verified")


def _importing():
    """Return whether the caller is a module being imported: then the code is not from the answer."""
    frame = sys._getframe(2)
    while frame and frame.f_code is not _compare.__code__:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


# The pool.


def grade(responses, golds, *, verifier="math", workers=None, timeout=5.0) -> list[Verdict]:
    """Grade each response against its gold; return one Verdict per item, in order, whatever the text.

    verifier: a name in VERIFIERS, "module:function", or a function (response, gold) -> float that can be imported.
    workers: number of processes (verdicts do not depend on it); None: cores of this process divided by local ranks.
    timeout: seconds for one item, after which its worker is killed and replaced. Time spent waiting for a core is not
    counted, up to 2 x timeout. The call returns within ceil(items / workers) * (3 * timeout + a start).
    Raises ValueError (lengths differ, no such verifier), TypeError (a response is not a string), ImportError
    (the verifier's module does not import), RuntimeError (a worker does not start)."""
    if len(responses) != len(golds):
        raise ValueError(f"{len(responses)} responses but {len(golds)} golds")
    if not all(isinstance(response, str) for response in responses):
        raise TypeError("every response must be a string")
    golds = [str(gold) for gold in golds]
    spec = _spec(verifier)
    if spec in IN_PROCESS:
        return [_judge(VERIFIERS[spec], *item) for item in zip(responses, golds, strict=True)]
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = _threads("worker", max(1, workers))
    futures = [threads.submit(_grade_one, spec, *item, timeout) for item in zip(responses, golds, strict=True)]
    try:
        verdicts = [future.result() for future in futures]
    except BaseException as error:  # Ctrl-C too: nothing of this call goes on
        for future in futures:
            future.cancel()
        close(error)
        raise
    failed = [verdict for verdict in verdicts if verdict.status == "error"]
    if failed and any(responses) and spec not in _announced:
        _announced.add(spec)
        print(f"--verifier {spec} failed on {len(failed)} of {len(verdicts)} answers, which get reward 0: "
              f"{failed[0].detail}. Further failures are only counted.", file=sys.stderr, flush=True)  # fmt: skip
    return verdicts


def grade_later(responses, golds, **how) -> concurrent.futures.Future:
    """Run `grade` in the background; return a Future of its result. An answer that hangs blocks one worker, not every
    later call."""
    return _threads("call", 64).submit(grade, responses, golds, **how)


def _grade_one(spec, response, gold, timeout):
    """Grade one item with an idle worker, or a new one. No other thread uses the worker meanwhile."""
    idle = _pools.setdefault(spec, [])
    try:
        worker = idle.pop()
        while worker.process.poll() is not None:  # it died
            worker.kill()
            worker = idle.pop()
    except IndexError:
        worker = _Worker(spec)
    verdict = worker.grade(response, gold, timeout)
    if worker.process.returncode is None:
        idle.append(worker)
    return verdict


def grader_version(verifier: str) -> str:
    """Return what a grader's verdicts depend on: a digest of its code, and the version of Math-Verify."""
    modules = [verifier.partition(":")[0]] if ":" in verifier else ["common.verifiers", "common.robust"]
    code = b"".join(Path(importlib.util.find_spec(module).origin).read_bytes() for module in modules)
    return f"code {hashlib.sha256(code).hexdigest()[:8]}, math-verify {importlib.metadata.version('math-verify')}"


def close(cause: BaseException | None = None) -> None:
    """Stop all workers; the next `grade` starts new ones. At exit it happens by itself, after pending calls.

    cause: the reason that the errors of other running calls name."""
    _pools.clear()
    for worker in list(_workers):
        worker.closed = f"closed: {cause!r}" if cause else "closed"
        worker.kill()


@functools.cache
def _threads(kind, count):
    """Threads that wait: a "worker" thread for the verdict on one item, a "call" thread for all items of a call."""
    return concurrent.futures.ThreadPoolExecutor(count, f"grade-{kind}")


_pools: dict[str, list["_Worker"]] = {}  # idle workers by verifier; they live until `close`
_workers: set["_Worker"] = set()  # all
_announced: set[str] = set()  # verifiers whose failure was printed
atexit.register(close)


def _forget():  # a forked child, such as a DataLoader's, must not use our workers, nor keep their pipes open
    for worker in _workers:  # also the busy ones: the threads that wait for them are not in the child
        worker.process.stdin.close()
        os.close(worker.sock.detach())
    _pools.clear()
    _workers.clear()
    _threads.cache_clear()


os.register_at_fork(after_in_child=_forget)


def _spec(verifier):
    """The name by which a worker finds the verifier."""
    if isinstance(verifier, str):
        if verifier not in VERIFIERS and ":" not in verifier:
            raise ValueError(f"no verifier {verifier!r}: {', '.join(VERIFIERS)} or module:function")
        return verifier
    spec = f"{verifier.__module__}:{verifier.__qualname__}"
    if verifier.__module__ == "__main__" or "<" in spec:
        raise ValueError(f"a worker cannot import {spec}: define it at the top of a module of its own")
    return spec


class _Worker:
    """A process that grades one item at a time: the parent's side of it.

    A bare interpreter that imports this module: no fork, which CUDA forbids, and no spawn, which would import torch.
    JSON both ways: what a process that reads a model's text sends is not unpickled."""

    BOOT = """if True:
        import importlib, json, sys
        sys.path[:], name, *args = json.loads(sys.argv[1])
        importlib.import_module(name)._serve(*args)"""
    closed = ""  # why `close` closed it

    def __init__(self, spec):
        self.sock, theirs = socket.socketpair()
        path = [*sys.path, os.path.dirname(os.path.dirname(__file__))]  # "" may be another folder by now
        argument = json.dumps([path, __name__, spec, theirs.fileno(), MEMORY])
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self.BOOT, argument],
                stdin=subprocess.PIPE,  # never written to: it closes when we end, which ends the worker (_serve)
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},  # sympy orders by hash
                start_new_session=True,  # Ctrl-C is for us to handle
            )
        self.lines = self.sock.makefile("r", encoding="ascii")
        _workers.add(self)
        try:
            _, status, detail, _ = self.receive(START_TIMEOUT)
        except (OSError, ValueError):
            raise RuntimeError(f"verifier {spec}: a worker did not start, exit code {self.kill()}") from None
        if status == "failed":
            raise ImportError(f"verifier {spec}: {detail}")

    def grade(self, response, gold, timeout):
        """Return its verdict; if it misses the deadline or dies, it is killed: "timeout" or "error"."""
        try:
            self.sock.settimeout(timeout)
            self.sock.sendall(json.dumps([response, gold]).encode() + b"\n")
            *verdict, retire = self.receive(timeout)
            if retire:
                self.kill()
            return Verdict(*verdict)
        except TimeoutError:
            self.kill()
            return Verdict(0.0, "timeout", "killed at its deadline")
        except (OSError, ValueError):
            if self.closed:
                raise RuntimeError(f"while this call went on its workers were {self.closed}") from None
            return Verdict(0.0, "error", f"worker died, exit code {self.kill()}")

    def receive(self, timeout):
        """Return its next message: [reward, status, detail, whether to replace it]. TimeoutError if none comes."""
        since, starved_before, left = time.monotonic(), self.starved(), timeout
        while left > 0:
            end = time.monotonic() + left
            if wait([self.sock], left):
                self.sock.settimeout(timeout)
                return json.loads(self.lines.readline())
            if time.monotonic() > end + 1:  # we were stopped, as a suspended job is, and the worker with us
                since = time.monotonic()
            starved = self.starved() - starved_before
            left = since + timeout + min(starved, 2 * timeout) - time.monotonic()
        raise TimeoutError

    def starved(self):
        """Seconds in which the process was ready to run and had no core; 0 where there is no /proc."""
        with contextlib.suppress(OSError), open(f"/proc/{self.process.pid}/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
        return 0.0

    def kill(self):
        _workers.discard(self)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: of one that is dead
            os.killpg(self.process.pid, signal.SIGKILL)  # with the programs that its verifier started in this session
        for end in (self.lines, self.sock, self.process.stdin):
            end.close()
        return self.process.wait()


def _judge(verify, response, gold):
    try:
        reward = verify(response, gold)
        if reward is None:
            raise TypeError("the reward function returned None, not a number")
        reward = float(reward)
    except NoAnswer as error:
        return Verdict(0.0, "unparsable", str(error))
    except (Exception, SystemExit) as error:
        return Verdict(0.0, "error", f"{type(error).__name__}: {error}"[:200])
    return Verdict(reward, "ok") if math.isfinite(reward) else Verdict(0.0, "error", f"reward {reward}")


def _serve(spec, fd, memory):
    """Serve as a worker until the parent ends, whatever the worker is doing and however the parent dies."""
    global _in_worker
    _in_worker = True
    # When the parent's end of stdin closes, the kernel sends SIGIO to our group: it ends even a verifier in a C call
    # and the programs that it started. (PR_SET_PDEATHSIG follows the thread that started us, not its process.)
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    if wait([0], 0):  # it has closed already
        os._exit(1)
    with contextlib.suppress(ValueError, OSError):  # a lower limit stands already; macOS has none
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # verifiers may print
    sock = socket.socket(fileno=fd)

    def send(verdict, retire=False):
        sock.sendall(json.dumps([*verdict, retire]).encode() + b"\n")

    try:
        module, _, name = spec.partition(":")
        verify = VERIFIERS.get(spec) or functools.reduce(getattr, name.split("."), importlib.import_module(module))
        for answer, gold in WARM_UP if spec in VERIFIERS else []:
            _judge(verify, r"</think>\boxed{" + answer + "}", gold)
    except Exception as error:
        return send(Verdict(0.0, "failed", f"{type(error).__name__}: {error}"))
    send(Verdict(0.0, "ready"))
    start = _resident()
    for line in sock.makefile("r", encoding="ascii"):
        verdict = _judge(verify, *json.loads(line))
        send(verdict, _resident() - start > GROWTH)


def _resident():
    """Bytes of memory in use; 0 where there is no /proc. (exec hands the parent's ru_maxrss down.)"""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
    return 0
