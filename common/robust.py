# ruff: noqa: SIM905 (words of a table)
r"""The rule `robust`: is the answer of a response the gold? For your own data; no published run used it.

    robust(r"So \boxed{x = 1\frac12\text{ cm}}", "1.5")  ->  True

Four stages, one section each:
    1. find     `find_answer` takes it from the text: the last box, else <answer>, ####, "answer is", the last line
    2. spell    `spell` writes it in one way: a sign is one character, a word starts with ~, \dfrac12 is \frac{1}{2}
    3. read     `readings` splits it at the loosest operator: list, relation, brackets, quantity; then `formula`
    4. compare  `same` compares two readings part by part, numbers exactly or to 300 digits

Two principles keep wrong answers out. An answer is read whole or not at all: if no rule knows a part, the answer is
`Unreadable`, and only the same spelling as the gold is correct. Sizes are checked before anything is computed.
"""

import functools
import itertools
import operator
import re
import unicodedata
from collections import Counter, namedtuple

import sympy

from common.verifiers import ANSWER, CHINESE, IS, MAX_CHARS, NoAnswer, boxes, chosen_label, claimed, echoed, retracted

MAX_ANSWER = 400  # characters of an answer; longer ones are compared as text only, over 4 times as long ones not at all
MAX_DEPTH = 12  # nested brackets
MAX_BITS = 200_000  # of a number
MAX_ITEMS = 40  # of a list


class Unreadable(ValueError):
    """No rule reads the whole answer."""


FAULTS = (ValueError, ArithmeticError, NotImplementedError, TypeError, AttributeError, RecursionError)  # of reading


# 1. Find the answer of a text.

BOUND_BEFORE = re.compile(r"(?:\\(?:neq?|not ?=|[lg]t)|≠|[\w})] +[<>]) *\$?$")  # x > \boxed{2}
BOUND_AFTER = re.compile(r" *(?:\\(?:neq?|[lg]t)\b|≠|[<>](?!\w+>) *-?[\w\\])")  # but not <answer>\boxed{2}</answer>
BOLD = re.compile(r"\*\*([^*]+)\*\*")
MARKUP = re.compile(r"\\?\$|(?:\*\*|__?)(?!\w|\s*[{\\(])")  # but not in x_1
OPEN_ANSWER = re.compile(r"<answer>\s*+[^<\n]++$")  # its end was the stop string
HEADING = re.compile(r"\d+[.)] +[^\W\d]")  # of Markdown, behind ####
PHRASE = re.compile(
    rf"(?i)(?:\b{ANSWER}(?: (?:with)?in \\boxed\{{ *\}})?"
    rf"(?:[ *_]{{0,3}}to[^.\n]{{0,80}})?[\s*_$}}]{{0,4}}(?:{IS}|=)(?!(?<=\d:)\d|(?<=\d :) ?\d)|{CHINESE})"
    r"(?:[\s*_:$}]|\\[\[(])*"
)
PART_OF = re.compile(r"(?i)\b(?:of|on|than|for|to|times|twice|half) (?:the |this |our )?$")  # half the answer is 42
SENTENCE_END = re.compile("|".join([
    r"\n|[。，]|<[|/]|\s*(?:です|입니다|이다)|(?<!\bRs)[.?](?=\s|$)",
    r"!(?=\s+[A-Z]|\s*$)",  # but not in 5! = 120
    r"[,;]\s(?!(?:and|or|but also)\b|[$*(-]|\.?\d|\\|[A-Za-z ]{1,20}(?:_\{?\w\}?)? ?=|"  # but not between items
    r"[A-J](?:[.)$}\n]|\s*$|[,;] )|[^()\n]{0,40}\))",
    r"\s(?:because|since|which|so|(?<!times )as|where|but(?! also))\b|"
    r"\s\((?=[a-z]{2,}[^)])(?!or [\s$]*[-.\d\\]|wrong|incorrect)",
]))  # fmt: skip

def find_answer(text: str) -> str | None:
    r"""Return what a text marks as its answer: "" if it takes it back, None if it marks nothing.

    >>> find_answer(r"Hence $x=\boxed{1}$ or $x=\boxed{2}$."), find_answer("The answer is 7, since 6 + 1 = 7.")
    ('1, 2', '7')
    """
    found = [box for box in boxes(text) if claimed(text, box[0]) and not echoed(text, *box)]
    found = [box for box in found if not BOUND_BEFORE.search(text, max(0, box[0] - 9), box[0])]
    found = [box for box in found if not BOUND_AFTER.match(text, box[1])]
    if found:
        return _boxed_answer(text, found)
    closed = text if "</answer>" in text else OPEN_ANSWER.sub(r"\g<0></answer>", text)
    before, _, after = closed.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    if opened:
        return "" if retracted(after, 0) else find_answer(inside) or inside
    line, _, more = text.rpartition("####")[2].strip().partition("\n")
    if "####" in text and not PHRASE.search(more) and not (more.strip() and HEADING.match(line)):
        if more.strip() and not re.search(r"\d", line):
            return more.strip().rpartition("\n")[2]
        return "" if retracted("\n" + more, 0) else line
    for phrase in reversed([*PHRASE.finditer(text)]):
        start, end = phrase.span()
        if claimed(text, start) and not PART_OF.search(text, max(0, start - 20), start):
            said = SENTENCE_END.split(text[end:], maxsplit=1)[0]
            return "" if retracted(text, end) else MARKUP.sub("", BOLD.sub(r"\1", said))
    return None


JOINED_BOXES = re.compile(  # what stands between the boxes of a list
    r"(?s)(?=.*(?:[,;、，和或]|and|or))"
    r"(?:[\s$,;}、，和或者]|\\[()\[\],;]|\\q?quad|(?:\\text\s*\{)?\s*(?:and|or)\b|\w(?:_\w|_\{\w+\})?\s*=)*"
)

def _boxed_answer(text, found):
    r"""The last box, or the list of boxes that it ends. But a different answer that is marked after it counts instead,
    and a different number alone on the last line leaves no answer."""
    start, end, content = found.pop()
    contents = [content]
    while found and JOINED_BOXES.fullmatch(text, found[-1][1], start):
        start, _, content = found.pop()
        contents.insert(0, content)
    marked = find_answer(text[end:])
    if retracted(text, end):
        return marked or ""
    answer = _with_its_formula(text, start, end, ", ".join(dict.fromkeys(contents)))
    later = _last_line(text[end:].partition("\n")[2]) if marked is None else marked
    return (marked or "") if re.search(r"\d", later) and _contradicts(later, answer) else answer


def _contradicts(later, answer):
    """Return whether both can be read and no reading of `later` equals or nearly equals one of `answer`. A relation,
    such as a + b = 5, contradicts nothing."""
    if len(later) > 4 * MAX_ANSWER:
        return False
    try:
        pairs = [*itertools.product(readings(spell(answer)), readings(spell(later)))]
        return not any(isinstance(b, Relation) or same(a, b) or _near(a, b) for a, b in pairs)
    except FAULTS:
        return False


LAYOUT = (
    "left right [bB]igg?[lrm]? displaystyle textstyle limits boxed fbox therefore blacksquare square qed Box checkmark "
    "ensuremath large Large huge normalsize rm bf it sf tt em"
).replace(" ", "|")
WRAPPER = (
    r"\\(?:(?:text|math)(?:bf|it|rm|sf|tt|normal|up|bin|rel|ord)|text|ce|hat|boldsymbol|bm|[mh]box|emph|operatorname\*?)"
)
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
GOES_ON = re.compile(  # 5 million, 5 times the height, 5 or 6, 5 or more
    rf"(?:[\s$~,()]|\\[,; ]|\\q?quad)*(?:\\text\s?\{{\s?)?(?:(?:{'|'.join(SCALES)}|squared|cubed|times (?:\w|the))\b|"
    r"(?:or\b|或者?)[\s}$\\(]*(?=[a-z]\s*=|-?\d|\\?(?:frac|sqrt)|(?:more|less|fewer|greater|higher|lower|so)\b)(?:[^.;\n]|\.\d)*)"
)
BORDER = re.compile(rf"\\[()\[\]]|\\\\|(?:{WRAPPER}|\\tag)\s*\{{[^{{}}]*\}}|\\f?box(?:ed)?\s*\{{[^{{}}]*\}}\s*$")
INVISIBLE = re.compile(  # in a formula; BORDER is what ends one
    rf"\\\$|\*\*|\\[,;:!> ]|\\(?:begin|end)\s*\{{\w+\*?\}}(?:\{{\w+\}})?|\\(?:text)?color\s*\{{\w*\}}|"
    rf"(?:{WRAPPER}|\\(?:{LAYOUT}|underline))(?![a-zA-Z])"
)
PART = (  # of a formula
    r"\\(?!implies|iff|to\b|\w*arrow|q?quad|[pb]?mod|approx|[lg]eq?\b|neq?\b|equiv|in\b)[a-zA-Z]+|\\?%|[-+*/^_!×·÷±√|]|\s|"
    r"\.?\d|(?<![A-Za-z])\s?:\s?(?=[\d\\]|$)|(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])|(?<![\sA-Za-z\\])[A-Za-z]{2,3}(?![A-Za-z])"
)
ANY_PART = rf"(?:{PART}|[,(){{}}\[\]])*"
CLOSED_PART = rf"(?:{PART}|\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|\([^()]*\)|\[[^\[\]]*\])*"  # no bracket stays open
BINARY_SIGN = r"[-+*/^×·÷±]|\\(?:times|cdot|div|pm|mp)"

def _with_its_formula(text, start, end, content):
    r"""The content of a box, or the formula on its line that the box is a part of: -\boxed{5} is -(5)."""
    if more := GOES_ON.match(text, end):
        return content + more[0]
    sides = text[max(0, start - 200) : start].rpartition("\n")[2], text[end : end + 200].partition("\n")[0]
    before, after = (INVISIBLE.sub("", BORDER.sub("$", side)) for side in sides)
    left, right = re.search(f"{ANY_PART}$", before)[0], re.match(ANY_PART, after)[0]
    inside_brackets = _depths("." + left)[-1] > 0 == _depths("." + left + right)[-1]  # (\boxed{1}, 2)
    if not inside_brackets:
        left, right = re.search(f"{CLOSED_PART}$", left)[0], re.match(CLOSED_PART, right)[0]
        in_prose = before.count("$") % 2 == 0  # then only what touches the box, or an operator with another operand
        if in_prose and not re.search(rf"(?:[\w^_√)}}\]+*/-]|\\[a-z]+|[\w)}}\]]\s*(?:{BINARY_SIGN})\s*)$", left):
            left = ""
        if in_prose and not re.match(rf"[\w^_\\({{]|\s*(?:{BINARY_SIGN})\s*[\w\\({{]", right):
            right = ""
    left, right = left.strip(" *"), right.lstrip().rstrip(" *-+/:")
    return content if left + right in ("", "{}", "()") or content[:1] == "=" else f"{left}({content}){right}"


NOT_AN_ANSWER = re.compile(  # a box, a condition or a hedge
    r"(?i)\\f?box|\?|\b(?:answer|if|for|when|have|about|approx\w*|not|wrong|incorrect|false|erroneous|previous)\b"
)

def _last_line(text):
    """Return the last line if it has no mark and is nothing but an answer, as `Thus x = 5.`; else ""."""
    end = text.strip()[-8 * MAX_ANSWER :]
    end = re.sub(r"(?:\$\$|\\\[|```\w*)\s*([^\n]*?)\s*(?:\$\$|\\\]|```)$", r"\1", end)  # on lines of its own
    line = BOLD.sub(r"\1", end.rpartition("\n")[2])
    behind_number = re.findall(r"(?<![\\a-z])[a-z]{3,}", re.sub(r"^\D*", "", line.lower()))
    known = {"and", "per", "square", "cubic", "sqrt", *UNITS}
    only_units = all(word in known or word.removesuffix("s") in known for word in behind_number)
    return "" if "<think>" in text or NOT_AN_ANSWER.search(line) or not only_units else line


# 2. Spell it in one way.

SIGNS = {
    name: char
    for line in (
        "≤ le leq leqslant leqq <= =<", "≥ ge geq geqslant geqq >= =>", "< lt", "> gt", "≠ ne neq != /=",
        "≈ approx simeq", "∈ in", "∩ cap", "∪ cup bigcup", "∖ setminus backslash", "∅ emptyset varnothing", "± pm",
        "∓ mp", "· cdot ast bullet", "× times", "÷ div", "/ slash", ": colon", "^ **", "∞ infty", "° degree circ",
        "∧ land wedge", "∨ lor vee", "¬ neg lnot", "→ to rightarrow", "⦃ lbrace {", "⦄ rbrace }", "⟨ langle",
        "⟩ rangle", "⌊ lfloor", "⌋ rfloor", "⌈ lceil", "⌉ rceil", "| vert lvert rvert", "' prime", "¢ cent", "% %",
        "_ _", "& &", "… ldots dots cdots dotsc .. ...",
    )
    for char, *names in [line.split()]
    for name in names
}  # fmt: skip
GREEK = dict(zip("αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ", (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi "
    "omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
).split(), strict=True))  # fmt: skip
LOOKALIKES = {
    **dict.fromkeys("−–—‐‑‒", "-"), **dict.fromkeys("⋅∙•‧", "·"), **dict.fromkeys("‘’′", "'"),
    **dict.fromkeys("✅✔✓∴", ""), "∕": "/", "∶": ":", "。": ".", "、": ",", "∣": "|", "⩽": "≤", "⩾": "≥", "º": "°",
    "˚": "°", "√": r"\sqrt ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "µ": r"\mu ", "\u2126": r"\Omega", "或": " or ",
    "和": " and ", **{char: rf"\{name} " for char, name in GREEK.items()},
}  # fmt: skip
FUNCTIONS = {
    **{name: getattr(sympy, name) for name in "sin cos tan cot csc sec sinh cosh tanh sqrt exp".split()},
    "ln": sympy.log, "log": lambda x: sympy.log(x, 10), "lg": lambda x: sympy.log(x, 10),
    **{f"arc{name}": getattr(sympy, f"a{name}") for name in "sin cos tan sinh cosh tanh".split()},
}  # fmt: skip
PREFIXES = {"": 0, "nano": -9, "micro": -6, "milli": -3, "centi": -2, "kilo": 3, "mega": 6, "giga": 9,
            "p": -12, "n": -9, "m": -3, "c": -2, "d": -1, "h": 2, "k": 3, "M": 6, "G": 9, "T": 12}  # fmt: skip
UNITS = {  # name: (dimension, size in m, s, g, ...); a lower-case letter of a dimension is its inverse: Lt is L / T
    prefix + name: (measured, sympy.Rational(factor) * sympy.Integer(10) ** exponent)
    for measured, table in {
        "L": "1 + m meter metre,127/5000 in inch inches,381/1250 ft foot feet,1143/1250 yd yard,201168/125 mi mile",
        "T": "1 + s second,1 sec,60 min minute,3600 h hr hour,86400 day,604800 week,2629800 month,31557600 yr year,"
             "315576000 decade,3155760000 century centurie",
        "M": "1 + g gram,1000000 ton tonne,453.59237 lb pound,28.349523125 oz ounce,6350.29318 stone", "Q": "1 pm",
        "LL": "4046.8564224 acre,10000 ha hectare",
        "LLL": "0.001 + L l liter litre,0.003785411784 gal gallon,0.000946352946 qt quart,0.000473176473 pt pint,"
               "0.000001 cc,0.0002365882365 cup,0.00001478676478125 tbsp tablespoon,0.00000492892159375 tsp teaspoon",
        "MLtt": "1000 + N newton", "MLLtt": "1000 + J joule Nm,1.602176634e-16 + eV,3600000 + Wh,4184 + cal calorie",
        "MLLttt": "1000 + W watt", "Mltt": "1000 + Pa pascal,101325000 atm,100000000 bar,133322.368421 torr",
        "A": "1 + A amp ampere", "MLLttta": "1000 + V volt", "MLLtttaa": "1000 + ohm", "TA": "1 + C coulomb",
        "TTTTAAmll": "1/1000 + F farad", "MLLttaa": "1000 + H henry henrie",
        "t": "1 + Hz hertz", "Lt": "5/18 kph kmph kmh,0.44704 mph,463/900 knot", "N": "1 + mol mole",
        "B": "1 + B byte,1000 KB", "D": "1 dollar USD,0.01 cent ¢,0.05 nickel,0.1 dime", "K": "1 + K kelvin",
        "C": "1 degC", "F": "1 degF", "R": "1 rad radian", "": "1/100 % percent percentage pct", "P": "1 am",
    }.items()
    for line in table.split(",")
    for factor, *names in [line.split()]
    for prefix, exponent in (PREFIXES if names[0] == "+" else {"": 0}).items()  # for the names after a +
    for name in names
} | dict.fromkeys(["°", "degree", "deg"], ("R", sympy.pi / 180))  # fmt: skip
NOT_UNITS = set(  # words after a number that change it, most of them without a plural's s
    "and or to by of than out not no if for when where with without except plus minus over under below above before "
    "after ago more less fewer greater least most up down between through until score pair half halve third quarter "
    "fourth fifth sixth seventh eighth ninth tenth hundredth thousandth wrong incorrect false lakh crore gross squared "
    "cubed factorial root mod modulo remainder base negative positive north south east west left right choose power "
    "larger smaller bigger either neither is are was be but only odd even prime divide multiple ten basis quadrillion "
    "january february march april may june july august september october november december doubled tripled halved "
    "mil millionen millones milhões mille millier milliard milliarden tausend mio mrd bn mn juta ribu".split()
) | SCALES.keys()
SHORT_WORDS = NOT_UNITS | set("in the yes st nd rd th am pm mph kph oz lb lbs hrs sq cu gal mol rad per mm "
                              "cm km ft yd mi sec min hr pct day mg kg ml usd deg".split())  # fmt: skip
SHORT_UNITS = set(  # behind a number also where the text does not mark them as words
    "Hz kHz MHz GHz THz Pa hPa kPa MPa GPa kJ MJ kW MW GW kN kV mV mA eV keV MeV GeV mL dL kWh MWh kB KB MB GB TB ms "
    "ns ps nm dm cup cal atm bar yr yrs qt".split()
)
COUNTS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()


def _digits(match):
    return re.sub(r"\D", "", match[0])


def _repeating(match):  # 0.1\overline{6} as a fraction
    fixed, period = (match[1] or "0") + match[2], match[3] or match[4]
    return rf"\frac{{{int(fixed + period) - int(fixed)}}}{{{'9' * len(period) + '0' * len(match[2])}}}"


def _is_short_unit(match):
    return match[0] in SHORT_UNITS and match.string[: match.start()].rstrip()[-1:] in {*"0123456789}/·*"}


WORD = re.compile(r"(?<![\\~a-zA-Z])(?<!\\begin\{)(?<!\\end\{)[A-Za-z]{2,}")
PLUS, MINUS = str.maketrans("±∓", "+-"), str.maketrans("±∓", "-+")
UNIT_LETTERS = "[mgshLNJWVKACFT]"  # these may also be variables
TEXT = r"\\(?:text|mathrm)\{ *"
SPELLINGS = [  # (pattern, replacement), applied from top to bottom
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(\\[a-zA-Z]+|[}^_]) +(?=\{)", r"\1"),  # \frac {1} {2}
        (r"^\\(?:f?box(?:ed)?|(?:text)?color\{\w*\})\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}$", r"\1"),
        (r"(?<![\d.,])[1-9]\d{0,2}(?:(?:\{,\}|,\\! ?)\d{3})+(?!\d)", _digits),  # 1{,}000
        (r"\{([,:-])\}", r"\1"),
        (r"\\\\ ?\[[\d.]+ ?\w\w\]", r"\\\\"),  # the height of a row: \\[2pt]
        (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"(?<=\d) ?x ?(?=10 ?\^)", "×"),
        # Money and the marks of a formula
        (r"(?<![A-Za-z])(?:Rs\.?|USD|INR|EUR|GBP|US(?=\\?\$))(?=(?:[ ~}$]|\\[,; $])*\d)", ""),
        (r"\\\$|\$|[€£¥₹₩₽]|\\(?:euro|pounds)(?![a-z])|\\[()\[\]]", ""),
        (r"\\(?:begin|end)\{(?:align|gather)(?:ed)?\*?\}|&(?= ?=)", ""),
        # Numbers that repeat: 0.1(6), 0.\dot{1}2\dot{3}, 0.\overline{3}
        (r"^([^()]*\d\.\d*)\((\d+)\)$", r"\1\\overline{\2}"),
        (r"\\dot *\{?(\d)\}?(\d*)\\dot *\{?(\d)\}?", r"\\overline{\1\2\3}"),
        (r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|dot|bar) ?(?:\{(\d+)\}|(\d+))", _repeating),
        # LaTeX that only looks different
        (r"(?<=[\d}])(?:\\[,;: ]|~) *\\mu *([a-zA-Z]|mol|Pa|Hz|eV)(?=[^a-zA-Z{]*$)", r"\\text{ micro\1}"),
        (r"(?<!\\)\\(?:[,;:> ]|q?quad(?![a-zA-Z]))|~|\\(?:hspace|vspace|phantom)\*?\{[^{}]*\}", " "),
        (r"\\(?:[dtcsx]|nice)(frac|binom)(?![a-zA-Z])", r"\\\1"),
        (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}|^([^{}]*)\\over(?![a-zA-Z])([^{}]*)$", r"\\frac{\1\3}{\2\4}"),
        (r"(?:\\underline\{\d+\} *)+", _digits),  # blanks that are filled in
        (r"\{ *\\rm(?![a-z])[ ~,\\]*([a-zA-Z/]+) *\}|\\rm\{ *([a-zA-Z/]+) *\}", r"\\text{ \1\2}"),
        (rf"\\(?:{LAYOUT})(?![a-zA-Z])\.?|\\!|\\(?:text)?color\{{\w*\}}", ""),
        (r"(?<=\d)!=(?= ?\d)", "! ="),  # 5!=120
        (r"\\([a-zA-Z]+|[{}%_&])|[<>!/]=|=[<>]|\*\*|\.{2,3}", lambda m: SIGNS.get(m[1] or m[0], m[0])),
        # Units and other words
        (rf"\\mu *{TEXT}([a-zA-Z]+) *\}}|{TEXT}\\mu *([a-zA-Z]+) *\}}", r"\\text{ micro\1\2}"),
        (rf"(?<=\d) *(?:{TEXT}([kM]) *\}}|([kM])) *\\Omega|{TEXT}([kM]) *\\Omega *\}}",
         lambda m: rf" \text{{ {m[1] or m[2] or m[3]}ohm}}"),
        (rf"\\frac\{{ *{TEXT}([a-zA-Z]+) *\}} *\}}\{{ *{TEXT}([a-zA-Z]+) *\}}(\^\{{?\d\}}?)? *\}}",
         r" \\text{ \1}/\\text{\2}\3"),  # m over s^2
        (rf"(?<=[\d}}])\\(?:text|mathrm)\{{(?={UNIT_LETTERS}(?![a-zA-Z]))", r" \\text{ "),  # 5\text{m}
        *[(WRAPPER + r"\{((?:[^{}]|\{[^{}]*\})*)\}", lambda m: WORD.sub(r" ~\g<0> ", m[1]))] * 3,
        (WRAPPER + "(?![a-zA-Z])", ""),
        (r"(?<=\d) *[\u4e00-\u9fff]{1,4}(?<![万亿千百十兆折成分半]) *$", ""),  # a unit in Chinese
        (r"^ *(\d+) *~?to *(\d+) *$", r"\1:\2"),
        (r"\\(mathbb|pmod) ?([A-Z]|\d+)", r"\\\1{\2}"),
        (r"(?:\{ ?\})?\^ *(?:\{ *° *\}|°)|(?<=\d) ?\^(?:o(?!\w)|\{ *o *\})", "°"),  # 60^\circ, 60^o
        # Sets
        (r"^(\S+) ?≠ ?([^=≠]+)$", r"\1 ∈ (-∞,\2)∪(\2,∞)"),
        (r"(?<=[)\]]) *U *(?=[(\[])", "∪"),
        (r"^([A-Z]) ?(\([^()]*,[^()]*\))$", r"\1=\2"),  # the point P(1, 2)
        (r"\\mathbb\{R\} ?∖ ?⦃([^⦃⦄,;]+)⦄", r"(-∞,\1)∪(\1,∞)"),
        (r"^[^=()⦃\[]*[±∓][^=()⦃\[]*$",  # 0, ±3 has three items
         lambda m: ",".join(dict.fromkeys(f"{m[0].translate(PLUS)},{m[0].translate(MINUS)}".split(",")))),
        (r".*[±∓].*", lambda m: m[0].translate(PLUS) + "," + m[0].translate(MINUS)),
        # Words that are signs or functions; then every other word is marked
        (r"(?<![\\a-zA-Z])~?(?:infinity|inf|infty)(?![a-zA-Z])", "∞"),
        (r"(?i)(?<![\\a-zA-Z])~?(?:negative|minus) *(?=[\d∞])", "-"),
        (r"(?<=[\d}/]) *~?sec\b\.?(?= *(?:$|[,)/]))", " ~second"),  # else the secant
        (rf"(?<![\\a-zA-Z])~?({'|'.join(FUNCTIONS)}|pi)(?![a-zA-Z])", r"\\\1 "),
        (WORD, lambda m: "~" * (len(m[0]) > 3 or m[0].lower() in SHORT_WORDS or _is_short_unit(m)) + m[0]),
        (r"(?<=\d) *\\Omega *$", " ~ohm"),
        # Braces: \frac12, \sqrt53 is not the root of 53, 12^{th}; 2^{nd} is 2^{n d}
        (r"\\(frac|binom|sqrt(?=\d\d)) *([0-9a-zA-Z])", r"\\\1{\2}"),
        (r"\\(frac|binom)(\{(?:[^{}]|\{[^{}]*\})*\}) *([0-9a-zA-Z])", r"\\\1\2{\3}"),
        (r"(?<=\d) *\^ *(?:\{ *~(th) *\}|\{ +~(st|nd|rd) +\}| +~(st|nd|rd|th) +)", lambda m: f" ~{m[m.lastindex]}"),
        (r" *([_^]) *(?:\{ ?(\w) ?\})?", r"\1\2"),
        (r" +", " "),
        # What a phrase stands for
        (rf"(?i)^ ?~?({'|'.join(COUNTS)})[ .]*$", lambda m: str(COUNTS.index(m[1].lower()))),
        (r"^( ?~[A-Z][a-z]+ \d\d?), ?(?=\d{4}$)", r"\1 "),  # May 5, 2021
        (r"(?:°|~degrees?) ?~?([CF])(?:elsius|ahrenheit)?(?![a-z])", r"~deg\1"),
        (r"~(?:square|sq\.?|(cubic|cu\.?)) ~?([a-z]+)", lambda m: f"~{m[2]}^{3 if m[1] else 2}"),
        (r"(~[a-z]+|(?<=\d) [ms]) ~(?:squared|(cubed))", lambda m: f"{m[1]}^{3 if m[2] else 2}"),
        (r" ?\( ?(?:~(?:since|because|as)\b[^()·×+*/=]*|(~or\b[^()]*|(?:~[a-z]+[ ^\d]*)+))\)$", r" \1"),  # 5 (as x > 0)
        (r",? ?\( ?([a-z] ?∈ ?\\mathbb\{Z\}) ?\)$", r", \1"),
        (r",? ?~(?:where|with|for) (?:([a-z]) ~is ~?an ~integer|~(?:any|all|every|each) ~integers? ([a-z])) ?$",
         r", \1\2 ∈ \\mathbb{Z}"),
        (rf" ?~({'|'.join(SCALES)})s?(?![a-z])", lambda m: f"·{SCALES[m[1]]}"),  # 5 million
        (r"\\frac\{ *(~[a-z]+) *\}\{ *(~?[a-z]+) *\}", r"\1/ \2"),  # km over h
        (r"^[({](\w+)[)}] ?_(?=\{?[\d(])", r"\1_"),  # (101)_2
        (r"^([\dA-Za-z]+) ?(?:_\{)? ?(?:~?in )?~base ?(\d+) ?\}?$",
         lambda m: f"{m[1]}_{m[2]}" if len(m[2]) == 1 else f"{m[1]}_{{{m[2]}}}"),
        (r"(?<![\d.,])\d{1,3}(?:[ '] *\d{3})+(?!\d| */)", _digits),  # 10 080
    ]
]


def spell(text: str) -> str:
    r"""Write an answer in one way. A word starts with ~, a sign is one character, a fraction has braces.

    >>> spell(r"$x \leq 1\,000\text{ cm}$."), spell("½√2"), spell("5 \u2126")
    ('x ≤ 1000 ~cm', '\\frac{1}{2}\\sqrt 2', '5 ~ohm')
    """
    text = text.encode(errors="replace").decode()  # without halves of surrogates
    for chars, mark in [("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "^"), ("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "_")]:  # x² is x^{2}
        text = re.sub(f"[{chars}]+", lambda m, mark=mark: mark + "{" + unicodedata.normalize("NFKC", m[0]) + "}", text)
    text = re.sub(r"(?<=\d) ?[µμ]([a-fh-zA-MO-Z]\w*)", r"\\text{ micro\1}", text)  # but 2μg may be 2·μ·g
    text = re.sub("[½⅓⅔¼¾⅕-⅞]", r" \g<0>", text).translate(str.maketrans(LOOKALIKES))  # 2½ is 2 ½
    text = re.sub(r"(\d+)⁄(\d+)", r"\\frac{\1}{\2}", unicodedata.normalize("NFKC", text))
    text = "".join(c for c in re.sub(r"\s", " ", text) if unicodedata.category(c)[0] != "C").strip(" *`")
    if r"\begin" not in text:  # else \\ ends a row
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text).replace(r"\\", " ")  # \\frac is \frac
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    text = _trim(text)
    if re.fullmatch(r"[\]\[][^\[\]]*[\]\[]", text) and text[0] + text[-1] != "[]":  # ]0, 1[ is (0, 1)
        text = text[0].replace("]", "(") + text[1:-1] + text[-1].replace("[", ")")
    return text


def _trim(text):
    """Remove what stands around an answer and is no part of it. {1, 2} is a set, {5} is 5."""
    text = text.lstrip(' *`":').rstrip(' *`".,;:\\')
    if not (text[:1] == "{" and text[-1] == "}" and _is_wrapped(text)):
        return text
    if any(text[i] == "," and depth == 1 for i, depth in enumerate(_depths(text))) and not THOUSANDS.search(text):
        return f"⦃{text[1:-1]}⦄"
    return _trim(text[1:-1])


def _depths(text):
    """How many brackets are open after each character."""
    return [*itertools.accumulate((char in "([{⦃⟨") - (char in ")]}⦄⟩") for char in text)]


def _is_wrapped(text):
    """Return whether its first bracket closes at its end: (1)(2) is not wrapped."""
    *inside, last = _depths(text)
    return last == 0 and 0 not in inside


def _split(text, pattern):
    """Return the parts of `text` between matches of `pattern` outside all brackets, and these matches."""
    depths = _depths(text)
    if depths and (depths[-1] or min(depths) < 0 or max(depths) > MAX_DEPTH):
        raise Unreadable("brackets")
    matches = [match for match in re.finditer(pattern, text) if not depths[match.start()]]
    ends = [0, *(end for match in matches for end in match.span()), len(text)]
    parts = [text[start:end].strip() for start, end in zip(ends[::2], ends[1::2], strict=True)]
    return parts, [match[0].strip() for match in matches]


# 3. Read it.

Number = namedtuple("Number", "value unit", defaults=[None])  # unit: as _unit returns it
Group = namedtuple("Group", "kind items")  # kind: its brackets, as (] for an interval; "," or ∪ ; matrix, cases or row
Named = namedtuple("Named", "name value")  # x = 5, x ∈ (0, 1)
Relation = namedtuple("Relation", "sign difference")  # left - right, which is = 0, < 0 or ≤ 0

OPTION = re.compile(r"^\(?([A-J])[).:] ?(?=[^ ,;&])(?!~?and\b|\([A-J]\))")  # (C) 42, but not (A) and (C)
LABEL = re.compile(rf"{OPTION.pattern}|^[A-J][).:] ")  # also the A of A: (D) 42, which may stand for Answer
INTEGER = re.compile(r"(?<![\\~A-Za-z])([a-z]) ?∈ ?\\mathbb\{Z")  # a k of ℤ may have another name
LETTER_UNIT = re.compile(rf"(?<=[)}} /·])({UNIT_LETTERS})(?![A-Za-z(_])")
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)(?![^(\[⦃⟨]*[)\]⦄⟩])")  # (1,234) is a pair
DECIMAL_COMMA = re.compile(  # before three digits only after a lone 0: 0,125
    r"^([^,;()⦃\[]*(?<![\d.])(?:0|[1-9]\d*)),(\d+(?<!,\d{3})|(?<=(?<!\d)0,)\d+)(?![\d.,])(?=[^,;]*$)"
)

def _with_letter_unit(text):
    """5 m is 5 ~m, where no other letter says that m is a variable."""
    rest = LETTER_UNIT.sub("", re.sub(r"\\(?:frac|sqrt|pi)(?![a-zA-Z])|(?<=\d)e(?=-?\d)", "", text.rpartition("=")[2]))
    return LETTER_UNIT.sub(r"~\1", text) if not re.search("(?<![~A-Za-z])[A-Za-z]", rest) else text


def _variants(text):
    """Return the text and what it may mean instead: without a label, as an equation = 0, with other units or digits.
    1,234 may be 1234, and 1,25 may be 1.25."""
    texts = [text, LABEL.sub("", text), re.sub("^([^=<>≤≥]+)=([^=<>≤≥]+)$", r"\1-(\2)=0", text)]
    texts += [_with_letter_unit(t) for t in texts]
    texts += [re.sub(rf"(?<![\\~A-Za-z]){m[1]}(?![A-Za-z])", "k_0", t) for t in texts for m in INTEGER.finditer(t)]
    texts += [THOUSANDS.sub(_digits, t) for t in texts]
    texts += [DECIMAL_COMMA.sub(r"\1.\2", t) for t in texts]
    return [*dict.fromkeys(texts)]


@functools.lru_cache(4096)
def readings(text: str) -> list:
    """Return all that a spelled answer may mean. Raises Unreadable if it means nothing."""
    if len(text) > MAX_ANSWER:
        raise Unreadable("too long")
    exact, sign, rounded = text.rpartition("≈")
    if "~" not in exact and NAME.fullmatch(exact.strip()):  # x ≈ 2.5
        return readings(f"{exact}={rounded}")
    if sign and exact.strip():
        before, last = readings(exact), readings(exact.rpartition("≈")[2])
        after, margin = readings(rounded), _rounding(rounded)
        if text.count("≈") > 2 or not any(_near(a, b, margin) for a in last for b in after):
            raise Unreadable("not nearly equal")
        return before + after
    found, error = [], None
    for variant in _variants(text):
        try:
            value = _read(variant)
            zero = isinstance(value, Number) and variant != text and variant.endswith(")=0")  # 6·7 = 42 is not 0
            found += [value] * (value not in found and not zero)
        except Unreadable as reason:
            error = error or reason
    if not found:
        raise error
    return found


SETS = [
    (r"∅|⦃ ?⦄|empty set|(?:there (?:is|are) )?no (?:such |real )?solutions?(?: exists?)?", Group("⦃⦄", [])),
    (r"\\mathbb\{r\}|(?:(?:all|any|every) )?real(s| numbers?| x)", Group("()", [Number(-sympy.oo), Number(sympy.oo)])),
    (r"\\mathbb\{r\}[\^_]\{?(?:\+|> ?0)\}?", Group("()", [Number(sympy.Integer(0)), Number(sympy.oo)])),
]
FILLERS = re.compile(
    "^(?:~?(?:the [^=,;:0-9]{1,60}? ~?(?:is|are|equals)|the|final|answers?|is|are|it|exactly|about|around|"
    "approximately|approx|roughly|equals?|so|thus|hence|therefore|total|we|get|have|obtain|if|when|for|"
    r"points?|line|vertex|cent(?:er|re)|(?:on|at)(?= ~| \d))"
    "(?![A-Za-z])[ :,]*)+(?=.)", re.I
)  # fmt: skip

def _read(text):
    """Read a text by the first rule that applies, the loosest operator first."""
    text = _trim(text)
    text = FILLERS.sub("", text).lstrip("=≈: ")
    if not text or re.search(r"[…∀∃≡→\"?#@]|(?<![A-Za-z'])'|\([b-h]\) ?\d", text):  # (a) 3 (b) 5 has no rule
        raise Unreadable("a sign that no rule reads" if text else "empty")
    for pattern, value in SETS:
        if re.fullmatch(pattern, text.replace("~", "").lower().strip()):
            return value
    for rule in (_table, _compound, _list, _relation, _brackets, _symbol):
        if (value := rule(text)) is not None:
            return value
    return _quantity(text)


TABLE = re.compile(
    r"(?:([^=<>≤≥]*)= ?)?([(\[⦃])? ?\\begin\{([a-zA-Z]*matrix|cases|array)\}(?:\{[^{}]*\})?(.*)\\end\{\3\} ?[)\]]?"
)

def _table(text):
    """A matrix, or f(x) = a list of cases, as a Group of rows."""
    if not (table := TABLE.fullmatch(text)):
        return None
    name, bracket, kind, body = table.groups()
    rows = [[_read(cell) for cell in row.split("&") if cell.strip()] for row in body.split(r"\\") if row.strip()]
    kind = "cases" if bracket == "⦃" else "matrix" if bracket or kind in ("pmatrix", "bmatrix") else kind
    names = {row[0].name for row in rows if len(row) == 1 and isinstance(row[0], Named)}
    if kind == "cases" and not name and len(names) == len(rows) > 1:  # x = 1 above y = 2
        return _solutions([row[0] for row in rows], names)
    value = Group(kind, [Group("row", row) for row in rows])
    return Named(name.strip(), value) if name else value


COMPOUND = r"(\d+(?:\.\d+)?) ?(?!~or\b)(~[A-Za-z]+)\.?(?:,? ?(?:~and )?(?=\d)|$)"

def _compound(text):
    """1 hour 30 minutes is 90 minutes."""
    parts = re.findall(COMPOUND, text) if re.fullmatch(rf"(?:{COMPOUND}){{2,4}}", text) else []
    values = [Number(sympy.Rational(number), _unit(unit)) for number, unit in parts]
    sizes = [value.unit[1] for value in values]
    of_one_kind = len({value.unit[0] for value in values}) == 1
    if not of_one_kind or sizes != sorted({*sizes} - {0}, reverse=True):  # known units, from large to small
        return None
    return Number(sum(value.value * value.unit[1] for value in values) / sizes[-1], values[-1].unit)


INTERVALS = ("()", "[]", "(]", "[)", "∪", "⦃⦄")  # and what may stand in a union
CONJUNCTION = "~(?:and|or|where|with|for)(?![a-z])"
SEPARATOR = rf"(?i)\s*(?:[,;]\s*(?:{CONJUNCTION})?|{CONJUNCTION}|∨|∪|&)\s*"
CONDITION = re.compile(
    r"(?=.*[~∈])(?:~?(?:all|any|some|real|integers?|numbers?|constants?) )*([a-zA-Z])(?:_\w)?"
    r"(?: ?∈ ?\\mathbb\{[ZR]\}| ~is(?: ~?(?:an?|any|integer|real|number|constant|arbitrary))+)?"
)

def _list(text):
    """2, 3 and 4 is a Group; x < 1 or x > 2 is a union of intervals."""
    items, separators = _split(text, SEPARATOR)
    if not separators:
        return None
    items = [item for item in items if item]
    if not 0 < len(items) <= MAX_ITEMS:
        raise Unreadable("no items or too many")
    rest = [item for item in items if not CONDITION.fullmatch(item)]
    if rest and all(c[1] in rest[0].rpartition("=")[2] for c in map(CONDITION.fullmatch, items) if c):  # 3k, k ∈ ℤ
        items = rest
    values = _flat(map(_read, items))
    alternatives = sum("or" in separator.lower() for separator in separators)
    if len(values) == 1 or alternatives and all(same(values[0], v) for v in values):
        return values[0]  # also of 0.5 or 1/2
    if len({value.unit for value in values if isinstance(value, Number)} - {None}) > 1:
        raise Unreadable("several units")
    names = {value.name for value in values if isinstance(value, Named)}
    all_named = all(isinstance(value, Named) for value in values)
    if all_named and len(names) > 1 and alternatives < len(values) / len(names):  # x = 1 or y = 2 is no solution
        return _solutions(values, names)
    regions = [value.value if isinstance(value, Named) else value for value in values]
    if alternatives or {"∨", "∪"} & {*separators}:
        if len(names) < 2 and all(isinstance(region, Group) and region.kind in INTERVALS for region in regions):
            region = Group("∪", regions)
            return Named(*names, region) if names else region
        if "∪" in separators or len(names) > 1:
            raise Unreadable("a union of what is no interval")
    return Group(",", values)


def _solutions(values, names):
    """y = 2, x = 1 is (1, 2); x = 1, y = 2, x = 3, y = 4 are two pairs."""
    solutions = [values[i : i + len(names)] for i in range(0, len(values), len(names))]
    if any({value.name for value in solution} != names for solution in solutions):
        raise Unreadable("solutions of several names")
    if names <= {*"xyz"} or names <= {*"abcd"}:  # other names, such as m and b, have no order of their own
        solutions = [sorted(solution, key=lambda value: value.name) for solution in solutions]
    return Group(",", solutions[0] if len(solutions) == 1 else [Group("()", solution) for solution in solutions])


def _flat(values):
    """The values, with lists without brackets taken apart."""
    return [v for value in values for v in (value.items if isinstance(value, Group) and value.kind == "," else [value])]


NAME = re.compile(r"(?!(?:e|i|\\pi)$)(?:" + "|".join([  # of a value
    r"\\?[A-Za-z]+(?:_(?:\w|\{[^{}=]+\}))?(?:\^\{-1\}(?=\())?'*(?:\([\w ,\\]*\))?",  # x_1, f'(x), f^{-1}(2)
    r"\((?:[a-z]|\\[a-z]+) ?(?:, ?(?:[a-z]|\\[a-z]+) ?)+\)",  # (x, y)
    r"(?:~[A-Za-z]+ ?)+(?:\\triangle *)?(?:[A-Z]{1,4} ?)?",  # Area of ABC
    r"m? ?\\(?:angle|overline|triangle|vec)\W*\w+\W*",
    r"(?:[A-Za-z]{1,2}(?:_(?:\w|\{[^{}=]+\}))? ?: ?)+[A-Za-z]{1,2}(?:_(?:\w|\{[^{}=]+\}))?",  # V_1:V_2
    r"\\Delta ?[A-Za-z]|\|[A-Z]{2}\||\[[A-Z]{3,4}\]",  # \Delta H, the length |AB|, the area [ABC]
    r"\\frac\{[A-Za-z]{1,2}\}\{[A-Za-z]{1,2}\}|[fgh]\([fgh]\([\w-]*\)\)",  # dy over dx, f(g(2))
    r"(?:P|~?Pr|E|~?Var|\\mathbb\{[PE]\}) ?[(\[][^()\[\]]*[)\]]",  # P(A ∩ B)
    r"\\(?:sin|cos|tan) ?\(?(?:[A-Z]+|\\(?:angle|alpha|beta|gamma|theta)\b *[A-Z]*)\)?",
    r"\d*([a-df-hj-w])(?: ?\+ ?\d*(?!\1)[a-df-hj-w])+",  # m + n = 29; but x + y = 29 is a line
]) + ")")  # fmt: skip

def _relation(text):
    """x ∈ S and 1 < x ≤ 2 are Named, x + 2y ≤ 4 is a Relation."""
    sides, signs = _split(text, "[=<>≤≥≠∈]")
    if not signs:
        return None
    if "" in sides or len(sides) > 4:
        raise Unreadable("half a relation")
    if set(signs) == {"="}:
        return _equation(sides)
    name = NAME.fullmatch(sides[0]) and sides[0].strip(" ~").replace(" ", "")
    if name and signs == ["∈"]:
        return Named(name, _read(sides[1]))
    if set(signs) <= {">", "≥"}:
        sides, signs = sides[::-1], [{">": "<", "≥": "≤"}[sign] for sign in signs[::-1]]
    if not set(signs) <= {"<", "≤"} or len(sides) > 3:
        raise Unreadable("a relation that no rule reads")
    values, closed = [formula(side) for side in sides], [sign == "≤" for sign in signs]
    names = [i for i, value in enumerate(values) if value.is_Symbol and NAME.fullmatch(sides[i])]
    if len(sides) == 2 and len(names) != 1 and (values[0] - values[1]).free_symbols:
        return Relation(signs[0], values[0] - values[1])
    if names == [0]:  # x < 1 is -∞ < x < 1
        values, closed = [-sympy.oo, *values], [False, *closed]
    values, (low, high) = [*values, sympy.oo], [*closed, False][:2]
    if not values[1].is_Symbol:
        raise Unreadable("a chain of relations")
    kind = "(["[low] + ")]"[high]
    return Named(str(values[1]), Group(kind, [Number(values[0]), Number(values[2])]))


def _equation(sides):
    """x = 5 and 5 = x name a value, x + y = 5 is a relation, 6·7 = 42 is its last value."""
    name = next(filter(NAME.fullmatch, sides if len(sides) == 2 else sides[:1]), None)
    if name:
        sides.remove(name)
        if len(sides) == 1:
            return Named(name.strip(" ~").replace(" ", ""), _read(sides[0]))
    values = [formula(side) for side in sides]
    if (name or not any(v.free_symbols for v in values)) and all(equal(values[0], v) for v in values):
        return Named(name, Number(values[-1])) if name else Number(values[-1])
    if len(values) == 2 and not name and (values[0] - values[1]).free_symbols:
        return Relation("=", values[0] - values[1])
    raise Unreadable("a chain of equations")


PROPERTY = re.compile(r"⦃ ?[a-z](?: ?∈ ?\\mathbb\{R\})? ?(?:[|:]|\\mid) ?((?=.*[<>≤≥])[^|:]*)⦄")

def _brackets(text):
    """(1, 2) is a tuple or an interval, (1, 2] an interval, ⦃1, 2⦄ a set; (5) is 5."""
    if text[0] not in "([⦃⟨" or not _is_wrapped(text):
        return None
    kind = (text[0] + text[-1]).replace("⟨⟩", "()")
    items, separators = _split(text[1:-1], "[,;]")
    if kind == "()" and not separators:
        return _read(text[1:-1])
    if known := PROPERTY.fullmatch(text):
        return _read(known[1])
    values = [*map(_read, items)]
    return Group(kind, _flat(values) if kind == "⦃⦄" else values)


CLOCK = re.compile(r"(?=.*[:ap])0?(\d{1,2}(?::[0-5]\d){0,2}?)(?::00)?(?: ?~?([ap])\.? ?~?m\.?)?", re.I)
DATE = re.compile(r"\d{4}([/-])\d\d?\1\d\d?|\d\d?([/-])\d\d?\2\d{4}|\d+ ?- ?\d+|\d\w*_(?:\w|\{\w+\})")  # score, base

def _symbol(text):
    """3:4 is a quotient, 7:05 p.m. a symbol with a unit; 5/10/2021, 3-2, 52_8 and words alone are symbols."""
    if clock := CLOCK.fullmatch(text):
        return Number(sympy.Symbol(clock[1]), clock[2] and _unit(f"~{clock[2]}m".lower()))
    if DATE.fullmatch(text):
        return Number(sympy.Symbol(text.replace(" ", "")))
    if re.fullmatch(r"[~A-Za-z .\-/]+", text) and ("~" in text or len(text) > 2 and text.isalpha()):
        words = re.findall("[a-z]+", text.lower())
        return Number(sympy.Symbol(" ".join(w for w in words if w not in ("the", "a", "an", "is", "it")) or text))
    parts, signs = _split(text, ":")
    if not signs:
        return None
    ratios = [Number(formula(a) / formula(b)) for a, b in zip(parts, parts[1:], strict=False)]
    return Group(":", ratios) if len(ratios) > 1 else ratios[0]


UNIT = r"(?:~[A-Za-z]+(?: ?\.)?|°|¢|%)(?:\^(?:\{-?\d\}|-?\d))?"
QUANTITY = re.compile(rf"(.*?[^ /·~])\s*((?:/ ?(?=~))?{UNIT}(?: ?[/·]? ?{UNIT})*)")
UNIT_WORD = re.compile(r"(/ ?)?~?([A-Za-z]+|[°¢%])\.?(?:\^\{?(-?\d)\}?)?")

def _quantity(text):
    """A formula with a unit."""
    text = re.sub(r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\d)? ?[({]?)(\d+) ?°", r"\1{\\frac{\2\\pi}{180}}", text)
    found = QUANTITY.fullmatch(text)
    return Number(formula(found[1]), _unit(found[2])) if found else Number(formula(text))


def _unit(text):
    """Return (dimensions with their powers, size): ({L 1, T -1}, 5/18) for ~km/ ~hr. Unknown units: (their text, 0)."""
    powers, size = Counter(), sympy.Integer(1)
    for over, word, exponent in UNIT_WORD.findall(text.replace("~per ", "/ ")):
        folded = word.lower() if len(word) > 3 else word  # mg is not Mg
        names = (word, folded, folded.removesuffix("s"), word.lower())
        if NOT_UNITS & {*names, word.lower().removesuffix("s")} or re.search("times ~(?!per)", text):
            raise Unreadable(f"{word} after a number")
        kinds, factor = next((UNITS[name] for name in names if name in UNITS), ("", 0))
        power = int(exponent or 1) * (-1 if over else 1)
        for kind in kinds:
            powers[kind.upper()] += power if kind.isupper() else -power
        size *= factor**power if factor else 0
    if len(powers) > 1 and powers["D"] == 1:  # $12 per hour is spelled without its dollar
        del powers["D"]
    return (frozenset((k, n) for k, n in powers.items() if n) if size else text.lower(), size)


MIXED = re.compile(r"(?<![\d.^_}])(\d+) ?(\\frac\{ ?\d+ ?\}\{ ?\d+ ?\}|(?<= )\d+ ?/ ?\d+)")
SYMBOL = re.compile(
    rf"(?:\\(?:(?:var)?(?:{'|'.join(GREEK.values())})|hbar)(?![a-zA-Z])|[A-Za-z])(?:_(?:\w|\{{\w+\}}))?'*"
    r"(?:(?<=[fghFGHP]) ?\(-?[^()+-]*\))?"
)
FUNCTION = re.compile(rf"\\({'|'.join(FUNCTIONS)})(?![a-zA-Z])(?:_(\w|\{{\w+\}}))?")
NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?")
TOKEN = re.compile(
    rf" *({NUMBER.pattern}|{FUNCTION.pattern}|{SYMBOL.pattern}|\\frac|\\binom|[-+*/^!()⟦⟧{{}}\[\]·×÷∞⌊⌋⌈⌉]) *"
)
CONSTANTS = {"e": sympy.E, "i": sympy.I, r"\pi": sympy.pi, "∞": sympy.oo}
AROUND = {"(": (")", sympy.Add), "{": ("}", sympy.Add), "[": ("]", sympy.Add),  # sympy.Add(x) is x
          "⌊": ("⌋", sympy.floor), "⌈": ("⌉", sympy.ceiling), "⟦": ("⟧", sympy.Abs)}  # fmt: skip


@functools.lru_cache(4096)
def formula(text: str) -> sympy.Expr:
    r"""Return a formula as sympy has it, numbers exact. Raises Unreadable, also for what is too large to compute.

    A mixed number is a sum. Factors side by side bind tighter than a division: 1/2x is 1/(2x).

    >>> formula(r"3\frac{1}{2}"), formula(r"\sin 2x\cos x"), formula("1/2x")
    (7/2, sin(2*x)*cos(x), 1/(2*x))
    """
    text = re.sub(r"\|([^|]*)\|", r"⟦\1⟧", MIXED.sub(r"(\1+\2)", _trim(text)))
    tokens = [match[1] for match in TOKEN.finditer(text)]
    for left, right in zip(tokens, tokens[1:], strict=False):
        if NUMBER.match(right) and (left == "}" or NUMBER.match(left) or SYMBOL.fullmatch(left)):
            raise Unreadable("a number after a factor")  # x2, 1 2
    if TOKEN.sub("", text) or "!!" in text.replace(" ", "") or len(text) > 2 * MAX_ANSWER:
        raise Unreadable("a sign that no rule reads")
    tokens = ["", *reversed(tokens)]
    value = _parse(tokens)
    if tokens != [""] or value.has(sympy.nan, sympy.zoo):
        raise Unreadable("not a formula, or a division by zero")
    return value


def _factorial(value):
    """Return value! unless it is too large or no natural number."""
    if value.is_number and not (value.is_Integer and 0 <= value <= 4000):
        raise Unreadable("too large a number")
    return sympy.factorial(value)


def _power(base, exponent):
    """Return base ** exponent unless its rational factor may have more than MAX_BITS bits."""
    if exponent.count_ops() > 20:
        raise Unreadable("too long an exponent")
    factor, _ = base.as_coeff_Mul()
    size = abs(exponent.subs(dict.fromkeys(exponent.free_symbols, 8)).evalf(3))
    bits = max(abs(factor.p), factor.q).bit_length() + 3 if factor.is_Rational else MAX_BITS
    if not size.is_finite or bits * size > MAX_BITS:
        raise Unreadable("too large a number")
    return base**exponent


PRODUCT, ARGUMENT, FACTOR, POWER = 2, 2.5, 3, 4  # 1/2x is 1/(2x), and \sin 2x\cos x is \sin(2x)\cos x
OPERATORS = {  # how tightly they bind on their left and on their right; what ends a formula binds nothing
    **dict.fromkeys(["", *")}]⌋⌉⟧"], (0, 0, None)), "+": (1, 1, operator.add), "-": (1, 1, operator.sub),
    **dict.fromkeys("·*×", (PRODUCT, PRODUCT, operator.mul)),
    **dict.fromkeys("/÷", (PRODUCT, PRODUCT, operator.truediv)),
    "^": (5, POWER, _power), "!": (POWER, POWER, _factorial),
}  # fmt: skip


def _parse(tokens, binds=0):
    """Take from the end of the reversed tokens a formula whose operators bind tighter than `binds`."""
    value = _atom(tokens, binds)
    while True:
        sign = tokens[-1]
        if sign in OPERATORS:
            left, right, apply = OPERATORS[sign]
        else:  # factors side by side; the argument of a function ends at a bracket or at another function
            left = ARGUMENT if sign in AROUND or FUNCTION.fullmatch(sign) else FACTOR
            right, apply = FACTOR, operator.mul
        if left <= binds:
            return value
        if sign in OPERATORS:
            tokens.pop()
        value = apply(value) if sign == "!" else apply(value, _parse(tokens, right))


def _atom(tokens, binds=POWER):
    """Take a sign and its operand, a bracket, a number, a symbol, or a function with its argument."""
    token = tokens.pop()
    if token in ("+", "-"):
        value = _parse(tokens, max(binds, PRODUCT))
        return value if token == "+" else -value
    if token in AROUND:
        close, around = AROUND[token]
        value = _parse(tokens)
        if tokens.pop() != close:
            raise Unreadable("brackets")
        return around(value)
    if NUMBER.fullmatch(token):
        return sympy.Rational(token)
    if token == r"\frac":
        return _atom(tokens) / _atom(tokens)
    if token == r"\binom":
        top, bottom = _atom(tokens), _atom(tokens)
        for value in (top, bottom):
            _factorial(value)  # refuses a large one
        return sympy.binomial(top, bottom)
    if token in CONSTANTS:
        return CONSTANTS[token]
    if SYMBOL.fullmatch(token):
        return sympy.Symbol(re.sub(r"[{} ]", "", token))
    if not (function := FUNCTION.fullmatch(token)):
        raise Unreadable("not a formula")
    name, base = function.groups()
    if name == "sqrt":
        root = _atom(tokens) if tokens[-1] == "[" else 2
        base = _atom(tokens)
        sign = -1 if base.is_negative and root % 2 == 1 else 1  # an odd root of a negative number is negative
        return sign * _power(sign * base, sympy.Integer(1) / root)
    exponent = 1
    if tokens[-1] == "^":
        tokens.pop()
        exponent = _parse(tokens, POWER)
    argument = _atom(tokens) if tokens[-1] in AROUND else _parse(tokens, ARGUMENT)
    if exponent == -1 and "arc" + name in FUNCTIONS:
        return FUNCTIONS["arc" + name](argument)
    if name in ("exp", "sinh", "cosh", "tanh"):
        _power(sympy.E, argument)  # refuses a large argument
    value = sympy.log(argument, formula(base)) if base else FUNCTIONS[name](argument)
    return _power(value, sympy.sympify(exponent))


# 4. Compare.

LARGE, SMALL = sympy.Rational(347, 7), sympy.Rational(1, 9)  # their points hold no integer, for which (-1)^n may be 1

def _points(symbols):
    """Return the points {symbol: number} where formulas are compared: eight, large and small, with every combination of
    the signs of two symbols; one empty point if there are no symbols."""
    ordered = sorted(symbols, key=str)
    return [
        {s: (-1) ** (k >> i % 2) * scale * sympy.Rational(37 + 24 * i + 10 * k, 29 + 2 * i)
         for i, s in enumerate(ordered)}
        for k, scale in enumerate([1, 1, 1, 1, LARGE, LARGE, SMALL, SMALL] if symbols else [1])
    ]


def _equal_at(a, b, at):
    """Are they equal at a point? None if one is no number there, or if roots or logarithms make one not real."""
    difference = (a - b).evalf(8, subs=at, maxn=300)
    real = {x.evalf(8, subs=at).is_real for x in (a, b)} if at else {True}
    if len(real) > 1 or not difference.is_finite:
        return None
    if difference == 0 or all(part == 0 or part._prec == 1 and abs(part) < 1e-99 for part in difference.as_real_imag()):
        return True  # precision 1: all 300 digits cancel, to something small if they were all that there are
    return None if False in real and not (a - b).has(sympy.I) else False


@functools.lru_cache(4096)
def equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Are two formulas equal? Rational numbers exactly, others to 300 digits, with symbols at eight points.

    >>> equal(formula("2^{-60}"), formula("2^{-61}")), equal(formula("(x+1)^2"), formula("x^2+2x+1"))
    (False, True)
    """
    if a == b or a.is_Rational and b.is_Rational or a.is_infinite or b.is_infinite:
        return a == b
    if any(x.free_symbols and x.has(sympy.floor, sympy.ceiling) for x in (a, b)):
        raise Unreadable("a floor of symbols, which stand for integers")
    somewhere = False
    for at in _points(a.free_symbols | b.free_symbols):
        if (alike := _equal_at(a, b, at)) is False:
            return False  # most pairs differ at the first point
        somewhere = somewhere or bool(alike)
    return somewhere


def _rounding(text):
    """How far, relative to its size, a rounded number is from what it rounds: less than 1 in its last digit, at most
    5 %. A text with several numbers is a formula: 5 %."""
    numbers = re.findall(r"[\d,]*\.?\d+", text)
    digits = numbers[0].replace(",", "") if len(numbers) == 1 else ""
    if not digits.strip("0."):
        return 0.05
    unit = 10.0 ** (-len(digits.partition(".")[2]) if "." in digits else len(digits) - len(digits.rstrip("0")))
    return min(0.05, 0.999 * unit / float(digits))


def _near(exact, rounded, margin=0.05):
    """Return whether `rounded` is a number within a margin of `exact`, or equal to it if it is an integer."""
    a, b = (value.value if isinstance(value, Named) else value for value in (exact, rounded))
    if not all(isinstance(x, Number) and x.value.is_number for x in (a, b)):
        return False
    difference, size = (abs(x.evalf(8)) for x in (a.value - b.value, b.value))
    return bool(difference == 0 or not a.value.is_Integer and difference <= margin * size)


def _proportional(f, g, *, positive):
    """Is f a multiple of g at all points, a positive one if asked for?"""
    ratios = [f.subs(at) / g.subs(at) for at in _points(f.free_symbols)]
    alike = all(ratio.is_finite and ratio != 0 and equal(ratio, ratios[0]) for ratio in ratios)
    return alike and bool(not positive or ratios[0].is_positive)


def same(a, b) -> bool:
    """Do two readings mean the same? Symmetric."""
    return _same(a, b) or _same(b, a)


def _same(a, b):
    match a, b:
        case Number(), Number():
            return _same_quantity(a, b)
        case Named(name, Group("()" | "[]")), Group(",") if len(name) == 1 and name.islower():
            return False  # 2 < x < 7 is not 2, 7
        case Named(), Named():
            return a.name == b.name and same(a.value, b.value)
        case Named(), _:
            return same(a.value, b)
        case Relation(), Relation():
            return a.sign == b.sign and _proportional(a.difference, b.difference, positive=a.sign != "=")
        case Group("⦃⦄" | "[]", [item]), Number() | Named():
            return same(item, b)
        case Group("⦃⦄", items), Group("⦃⦄" | ",", others):
            alike = [[same(item, other) for other in others] for item in items]
            return all(map(any, alike)) and all(map(any, zip(*alike, strict=True))) and bool(items) == bool(others)
        case Group("," | "∪" | "cases" as kind, items), Group(other, others) if kind == other:
            return _paired(items, others)
        case Group("∪", items), Group("," | "⦃⦄", others):  # (1, 2) or (3, 4) may be points; x < 1 is no point
            return all(item.kind == "()" and "oo" not in str(item) for item in items) and _paired(items, others)
        case Group("matrix", rows), Group("()" | ",", items):
            row = rows[0].items if len(rows) == 1 else [row.items[0] for row in rows if len(row.items) == 1]
            return len(row) == max(len(rows), len(rows[0].items)) and _in_order(row, items)
        case Group("()" | "[]" as kind, items), Group("()" | "[]" | "," as other, others) if kind != other:
            return (other == "," or len(items) != 2) and _in_order(items, others)
        case Group(kind, items), Group(other, others):
            return kind == other and _in_order(items, others)
    return False


def _in_order(items, others):
    return len(items) == len(others) and all(map(same, items, others))


def _paired(items, others):
    """Return whether items and others match one to one."""
    if not items or not others:
        return items == others
    partner = next((i for i, other in enumerate(others) if same(items[0], other)), None)
    return partner is not None and _paired(items[1:], others[:partner] + others[partner + 1 :])


def _same_quantity(a, b):
    """Are two quantities equal? Units count only if both sides have one and UNITS knows both. 25 % is 25 or 0.25."""
    (kind, size), (other_kind, other_size) = (value.unit or ("", 0) for value in (a, b))
    if size and other_size:
        return kind == other_kind and equal(a.value * size, b.value * other_size)
    percent = not kind and not b.unit and size != 0
    return equal(a.value, b.value) or percent and equal(a.value * size, b.value)


def _money(text, other):
    r"""\$0.75 is 0.75, but 0.75 dollars if it is compared with cents."""
    if not re.search(r"\d\W*(?:text *\{\W*)?cents?\b|¢", other):
        return text
    return re.sub(r"^[\s$\\]*\$ ?([\d.,]*\d)[\s$.]*$", r"\1 dollars", text)


def _letters(text):
    """A spelled text for comparison letter by letter. H_2O is H2O, ~Yes is yes, (A) and (C) is AC."""
    text = re.sub(r"(?<!\d) | (?!\d)|(?<=[A-Za-z)])_", "", text.replace("~", " "))
    if re.fullmatch(r"[A-J](?:(?:[,;&]|and)*[A-J])+", text) and (labels := re.findall("[A-J]", text)) == sorted(labels):
        return "".join(labels)
    return text.lower() if re.fullmatch(r"[A-Za-z]{2,}", text) else text


BARE_BOX = re.compile(
    r"\\(?:boxed|fbox)(?![a-zA-Z{])\s*(\\[dtc]?frac\s*(?:\w\s*\w|(?:\{[^{}]*\}){2})|-?[\d.,]*\d|[A-Z]\b)"
)
JSON_ANSWER = re.compile(r'"(?:final_)?answer"\s*+:\s*+(?:"([^"\n]*+)"|([^"\n{}]*+))\s*+\}[\s`]*+$')
SPECIAL_TOKENS = re.compile(r"(?:\s*(?:<\|[^|<>]{0,40}\|>|</s>|<eos>|<end_of_turn>))+\s*$")
RUN_ON = re.compile(r"\n[ \t]*(?:Question|Q|Problem|Human|User) ?\d*:|<\|im_start\|>user")  # another question begins
LABEL_EDGE = r"[\s$(){}\[\].:*\\]*"
GOLD_LABEL = re.compile(rf"{LABEL_EDGE}(?:(?:text|math)(?:rm|bf)?{LABEL_EDGE})?([A-Z]){LABEL_EDGE}")  # $\text{(B)}$

def robust(response: str, gold: str) -> bool:
    """Apply the rule. Raises NoAnswer if the response gives no answer, or if the gold cannot be read."""
    whole = BARE_BOX.sub(r"\\boxed{\1}", response.rstrip()[-MAX_CHARS:])
    whole = whole[:-400] + SPECIAL_TOKENS.sub("", whole[-400:])
    whole = JSON_ANSWER.sub(r"\\boxed{\1\2}", whole)
    said, *more = RUN_ON.split(whole.rpartition("</think>")[2], 3)
    while more and not find_answer(said):
        said += more.pop(0)
    gold = boxes(gold) and find_answer(gold) or gold
    label = GOLD_LABEL.fullmatch(gold)
    if label and (chosen := chosen_label(said)) is not None:
        return chosen == label[1]
    answer = find_answer(said if said.strip() else whole)
    answer = _last_line(said) if answer is None else answer
    if not answer.strip() or len(answer) > 4 * MAX_ANSWER:
        raise NoAnswer(f"an answer of {len(answer)} characters" if answer.strip() else "no answer in the response")
    spelled, truth = spell(_money(answer, gold)), spell(_money(gold, answer))
    option, other = OPTION.match(truth), OPTION.match(spelled)
    if spelled and (_letters(spelled) == _letters(truth) or option and _letters(spelled).strip("()") == option[1]):
        return True
    if option and other and option[1] != other[1]:
        return False  # (C) 42 is not (B) 42
    at_fault = f"gold unreadable: {gold[:100]}"
    try:
        golds = readings(truth)
        at_fault = f"answer unreadable: {answer[:100]}"
        return any(same(a, b) for a in golds for b in readings(spelled))
    except FAULTS as error:
        raise NoAnswer(f"{at_fault} ({type(error).__name__}: {error})"[:300]) from error
