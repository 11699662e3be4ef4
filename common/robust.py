r"""The rule `robust`: is the answer of a response the gold? For one's own data; no published run used it.

    robust(r"So \boxed{x = 1\frac12\text{ cm}}", "1.5")  ->  True

Three steps. `find_answers` takes the answer from the text: the last box, else `<answer>`, ####, "answer is", the last line.
`spell` writes it in one spelling, in which a word is marked by ~ and a sign is one character. `read` takes it apart:
lists, sets, intervals, equations, quantities with units, matrices, texts. Formulas are left to Math-Verify's parser.
`same` compares what was read, part by part. Numbers are compared exactly, or to all digits.

Two principles keep wrong answers out. An answer is read whole or not at all: what no rule below names is `Unreadable`, and
then only the same spelling is right. What would take long is refused by its size before it is computed.
"""

import functools
import re
import unicodedata
from typing import NamedTuple

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from sympy.core.function import AppliedUndef

from common.verifiers import MAX_CHARS, NoAnswer

MAX_ANSWER = 400  # characters of an answer; longer ones are only compared as text
MAX_DEPTH = 12  # brackets within brackets
MAX_BITS = 200_000  # of a number that a formula may lead to
MAX_ITEMS = 40  # of a list


class Unreadable(ValueError):
    """No rule reads the whole of the answer."""


# ---------------------------------------------------------------------------------------------------- tables

SIGNS = {
    name: char
    for line in (
        "≤ le leq leqslant leqq", "≥ ge geq geqslant geqq", "≠ ne neq", "∈ in", "∪ cup", "∩ cap", "∅ emptyset varnothing",
        "± pm", "∓ mp", "∞ infty", "· cdot ast bullet", "× times", "÷ div", "≈ approx simeq", "° degree circ",
        "∖ setminus backslash", "⟨ langle", "⟩ rangle", "| vert lvert rvert", "< lt", "> gt", "… ldots dots cdots dotsc",
        "⦃ lbrace", "⦄ rbrace", "∨ lor vee", "⌊ lfloor", "⌋ rfloor", "⌈ lceil", "⌉ rceil", "¢ cent", "/ slash", "' prime",
    )
    for char, *names in [line.split()]
    for name in names
}  # fmt: skip
CHARACTERS = str.maketrans(
    {c: "-" for c in "−–—‐‑‒﹣－"} | {c: "·" for c in "⋅∙•‧"} | {c: "'" for c in "‘’′＇"} | {c: "/" for c in "⁄∕"}
    | {"。": ".", "、": ",", "∣": "|", "√": r"\sqrt ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}",
       "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "⩽": "≤", "⩾": "≥", "º": "°", "˚": "°", "″": "''", "…": "…", "ø": "∅"}
    | {c: "\\" + (name.lower() if c.islower() else name.capitalize()) + " "
       for c in "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ" for name in [unicodedata.name(c).split()[-1].replace("LAMDA", "LAMBDA")]}
)  # fmt: skip
SCRIPTS = [("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "^"), ("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "_")]
WRAPPERS = r"(?:text(?:bf|it|rm|sf|tt|normal|md|up|sc)?|math(?:rm|bf|it|sf|tt|normal)|boldsymbol|bm|mbox|hbox|emph|operatorname\*?)"
FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot csc sec ln log exp sqrt".split()
GREEK = ("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho sigma tau "
         "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega").split()  # fmt: skip
FORMULA_COMMANDS = {*FUNCTIONS, *GREEK, "frac", "hbar", "cdot", "times", "infty", "binom", "lfloor", "rfloor", "lceil", "rceil"}

UNITS = {  # name: (what is measured, how many of its first unit)
    name: (kind, sympy.Rational(factor))
    for kind, table in {
        "length": "1 m meter metre,1/1000 mm millimeter millimetre,1/100 cm centimeter centimetre,1000 km kilometer kilometre,"
        "127/5000 in inch inches,381/1250 ft foot feet,1143/1250 yd yard,201168/125 mi mile",
        "time": "1 s sec second,60 min minute,3600 h hr hour,86400 day,604800 week",
        "mass": "1 g gram,1/1000 mg milligram,1000 kg kilogram,1000000 ton tonne",
        "volume": "1 L l liter litre,1/1000 mL ml milliliter millilitre",
        "money": "1 dollar USD,1/100 cent ¢",
        "angle": "1 ° degree deg,1/60 arcminute",
    }.items()
    for line in table.split(",")
    for factor, *names in [line.split()]
    for name in names
}  # fmt: skip
LETTER_UNITS = "mgshLNJWVKACFT"
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
NOT_UNITS = set(  # words after a number that change it
    "and or to by of than out not no if for when where with without except plus minus over under below above before after "
    "ago more less fewer greater least most up down between through until score pair half halves third thirds quarter "
    "quarters fourth fourths fifth fifths tenth tenths hundredth hundredths squared cubed factorial root mod modulo "
    "remainder base negative positive north south east west left right choose power larger smaller bigger either neither "
    "hundreds thousands millions dozens is are was be but only odd even prime divides multiple multiples".split()
)
SHORT_WORDS = NOT_UNITS | set("in the yes st nd rd th am pm mph kph oz lb lbs hrs mins secs sq cu gal mol rad per".split()) | {
    unit for unit in UNITS if len(unit) > 1
}
FILLERS = "the|final|answer|answers|is|are|it|exactly|about|around|approximately|approx|roughly|equals|equal|so|thus|hence|therefore|value|total|x|we|get|have"
NO_SOLUTION = {"no solution", "no solutions", "no real solution", "no real solutions", "empty set", "there is no solution",
               "there are no solutions", "no such solution exists"}  # fmt: skip
ALL_REALS = {"all real numbers", "all reals", "real numbers", "any real number", "all real x", "every real number"}

OPEN, CLOSE = "([{⦃⟨", ")]}⦄⟩"
COMPARE = {"<": "<", ">": "<", "≤": "≤", "≥": "≤"}

# ---------------------------------------------------------------------------------------------------- one spelling


def spell(text: str) -> str:
    r"""An answer in one spelling: `\text{Twelve cm}` is "~Twelve ~cm", `\leq` is ≤, `\dfrac12` is \frac{1}{2}.

    >>> spell(r"$x \leq 1\,000\text{ cm}$."), spell("½√2")
    ('x ≤ 1000 ~cm', '\\frac{1}{2}\\sqrt{2}')
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unreadable("half a character") from error
    for chars, mark in SCRIPTS:
        text = re.sub(f"[{chars}]+", lambda m, mark=mark: f"{mark}{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = re.sub(r"[½⅓⅔¼¾⅕-⅞]", lambda m: r"\frac{%s}{%s}" % tuple(unicodedata.normalize("NFKC", m[0]).split("⁄")), text)
    text = unicodedata.normalize("NFKC", text.translate(CHARACTERS)).translate(CHARACTERS)
    text = "".join(c if unicodedata.category(c)[0] != "C" else " " if c in "\n\t\r" else "" for c in text)

    text = text.strip(" \n*`")
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)
        text = re.sub(r"\\\\", " ", text)
    text = re.sub(r"\\\$|\$|\\[()]|[€£¥]", "", text)  # marks of money and of formulas
    text = re.sub(r"\\\[|\\\](?!\s*[\d.])", "", text)
    text = re.sub(r"\{,\}|,\\!", ",", text)
    text = re.sub(r"\.{2,}", "…", text)
    text = re.sub(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|dot|bar) ?\{?(\d+)\}?", _repeating, text)
    text = text.replace(r"\!", "")
    text = re.sub(r"(?<!\\)\\(?:[,;:> ]|q?quad(?![a-zA-Z])|\n)|~|\\(?:hspace|vspace|phantom)\*?\{[^{}]*\}", " ", text)
    text = re.sub(r"\\([dtc]frac|dbinom|tbinom)(?![a-zA-Z])", lambda m: "\\" + m[1][1:], text)
    text = re.sub(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|boxed|fbox|therefore|blacksquare|square|qed|Box|checkmark|ensuremath|large|Large|huge|Huge|normalsize)"
                  r"(?![a-zA-Z])\.?|\\(?:text)?color\s*\{\w*\}|\\(?:rm|bf|it|sf|tt|em)(?![a-zA-Z])", "", text)  # fmt: skip
    text = text.replace(r"\{", "⦃").replace(r"\}", "⦄").replace(r"\%", "%").replace(r"\_", "_").replace(r"\&", "&")
    text = re.sub(r"\\(?:underline\s*\{\d\}\s*\\)*underline\s*\{\d\}", lambda m: "".join(re.findall(r"\d", m[0])), text)
    text = re.sub(r"\\underline(?=\s*\{)", "", text)
    for _ in range(3):
        text = re.sub(r"\\%s\s*\{((?:[^{}]|\{[^{}]*\})*)\}" % WRAPPERS, _words, text)
    text = re.sub(r"\\%s(?![a-zA-Z])" % WRAPPERS, "", text)
    text = re.sub(r"\\([a-zA-Z]+)", lambda m: f"{SIGNS[m[1]]}" if m[1] in SIGNS else m[0], text)
    text = re.sub(r"\^\s*\{?\s*°\s*\}?", "°", text).replace("⦃⦄", "∅").replace("⦃ ⦄", "∅")

    text = re.sub(r"<=|=<", "≤", text)
    text = re.sub(r">=|=>", "≥", text)
    text = re.sub(r"!=|/=", "≠", text)
    text = re.sub(r"(?<![\\~a-zA-Z])(?:%s|pi)(?![a-zA-Z])" % "|".join(FUNCTIONS), _function, text)
    text = re.sub(r"(?<![\\~a-zA-Z])(?:infinity|inf|infty)(?![a-zA-Z])", "∞", text)
    text = re.sub(r"(?<![\\~a-zA-Z])(?<!\\begin\{)(?<!\\end\{)[A-Za-z]{2,}", lambda m: "~" + m[0] if _is_word(m[0]) else m[0], text)
    text = re.sub(r"\\frac\s*([0-9a-zA-Z])", r"\\frac{\1}", text)
    text = re.sub(r"\\frac\s*(\{[^{}]*\})\s*([0-9a-zA-Z])", r"\\frac\1{\2}", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s+(\d+)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s*(\[[^\[\]]*\])?\s*([0-9a-zA-Z]|\\[a-z]+)", r"\\sqrt\1{\2}", text)
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text).replace("**", "^")
    text = re.sub(r"\s*([_^])\s*", r"\1", text)
    text = re.sub(r"\^(-\d+)", r"^{\1}", text)
    text = re.sub(r"\^(?:'|\{(['\s]+)\})", lambda m: (m[1] or "'").replace(" ", ""), text)
    text = re.sub(r"_\{ ?[~\\]*([a-zA-Z]+) ?\}", r"_{\1}", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"\\frac\{ *(~[a-z]+) *\}\{ *(~?[a-z]+) *\}", r"\1/ \2", text)
    text = re.sub(r"(?<![\d.,])\d{1,3}(?:[ ']\s*\d{3})+(?!\d|\s*/)", lambda m: re.sub(r"\D", "", m[0]), text)
    text = _trim(re.sub(r"\s+", " ", text))
    if re.fullmatch(r"[\]\[][^\[\]]*[\]\[]", text) and text[0] + text[-1] != "[]":  # ]0, 1[ is (0, 1)
        text = {"]": "(", "[": "["}[text[0]] + text[1:-1] + {"[": ")", "]": "]"}[text[-1]]
    return text


def _trim(text):
    """Without what stands around an answer and is no part of it."""
    before = None
    while text != before:
        before = text
        text = text.strip(" *`\"").rstrip(".,;:").removeprefix(":").strip()
        if text[:1] == "{" and _closing(text) == len(text) - 1:
            text = text[1:-1]
    return text


def _repeating(match):
    """0.1\\overline{6} as a fraction."""
    whole, fixed, period = match[1] or "0", match[2], match[3]
    top = int(whole + fixed + period) - int(whole + fixed)
    return rf"\frac{{{top}}}{{{'9' * len(period) + '0' * len(fixed)}}}"


def _words(match):
    text = match[1]
    if text.strip() in ("e", "i"):
        return text.strip()
    marked = re.sub(r"(?<![\\~A-Za-z])[A-Za-z]{2,}", lambda m: _function(m) if m[0] in FUNCTIONS else "~" + m[0], text)
    return f" {marked} " if re.search("[A-Za-z]", text) else text


def _function(match):
    return "\\" + match[0] + " "


def _is_word(letters):
    return len(letters) >= 4 or letters in SHORT_WORDS or letters.lower() in SHORT_WORDS


def _closing(text):
    """Where the bracket that opens `text` is closed; -1: nowhere."""
    depth = 0
    for at, char in enumerate(text):
        depth += (char in OPEN) - (char in CLOSE)
        if depth == 0:
            return at
    return -1


def _split(text, pattern):
    """Parts of `text` between matches of `pattern` outside all brackets, and those matches."""
    depth, start, at, parts, found = 0, 0, 0, [], []
    while at < len(text):
        depth += (text[at] in OPEN) - (text[at] in CLOSE)
        match = pattern.match(text, at) if depth == 0 else None
        if match and match.end() > at:
            parts.append(text[start:at])
            found.append(match[0].strip())
            start = at = match.end()
        else:
            at += 1
        if not 0 <= depth <= MAX_DEPTH:
            raise Unreadable("brackets")
    if depth:
        raise Unreadable("brackets")
    return [*parts, text[start:]], found


# ---------------------------------------------------------------------------------------------------- what is read


class Text(NamedTuple):
    words: tuple


class Number(NamedTuple):
    value: sympy.Expr
    unit: str = ""  # "%", or a name in UNITS, with its power: "cm^2"


class Group(NamedTuple):
    kind: str  # "(" tuple or open interval, "[" list or closed interval, "⦃" set, "," items without brackets
    items: list


class Region(NamedTuple):
    """Intervals (low, low is in it, high, high is in it)."""

    parts: list


class Named(NamedTuple):
    name: str
    value: tuple
    sides: tuple = ()


class Relation(NamedTuple):
    """left - right, which is = 0, < 0 or ≤ 0."""

    sign: str
    difference: sympy.Expr


class Table(NamedTuple):
    kind: str  # "matrix" or "cases"
    rows: list


class Ratio(NamedTuple):
    items: list
    clock: str = ""  # "a" or "p" of a.m. and p.m.; "?" may be a time of day


SEPARATOR = re.compile(r"\s*(?:[,;]\s*(?:~(?:and|or|where|with|for)(?![a-z]))?|~(?:and|or|where|with|for)(?![a-z])|∨|&)\s*", re.I)
RELATION = re.compile(r"[=<>≤≥≠≈∈]")
NAME = re.compile(
    r"(?:\\?[A-Za-z]+(?:_(?:\w|\{\w+\}))?'*(?:\([\w ,\\]*\))?|\([a-z](?:, ?[a-z])+\)|(?:~[A-Za-z]+ ?)+|\\(?:angle|overline|triangle|vec)\W*\w+\W*)"
)
UNIT = r"(?:~[A-Za-z]+\.?|°(?: ?[CF](?![A-Za-z]))?|¢|%%|(?<=[ /·])[%s](?![A-Za-z(_]))(?:\^(?:\{-?\d+\}|-?\d))?" % LETTER_UNITS
QUANTITY = re.compile(r"(.*?[^ /·~])\s*((?:(?<=[\d)}]) ?)?%s(?: ?[/·]? ?%s)*)" % (UNIT, UNIT))
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
CONDITION = re.compile(r"(?:~?(?:all|any) |~?integers? )*([a-zA-Z])(?:_\w)?(?: ?∈ ?\\mathbb ?\{?[ZR]\}?| ~is (?:~?an? )?~?(?:integer|real)(?: ~?number)?)")


TABLE = re.compile(r"(?:([^=<>≤≥]*)= ?)?([(\[⦃])? ?\\begin ?\{([a-zA-Z]*matrix|cases|array)\}(?:\{[^{}]*\})?(.*)\\end ?\{\3\} ?[)\]]?")
TABLES = {("", "pmatrix"): "matrix", ("", "bmatrix"): "matrix", ("(", "array"): "matrix", ("[", "array"): "matrix",
          ("(", "matrix"): "matrix", ("[", "matrix"): "matrix", ("⦃", "array"): "cases", ("", "matrix"): "bare"}  # fmt: skip


def readings(text: str) -> list:
    """All that a spelled answer may mean, the likeliest first. Raises Unreadable if it means nothing."""
    if len(text) > MAX_ANSWER:
        raise Unreadable("too long")
    tries = [_join_thousands(text), text, re.sub(r"^\(?[A-J]\)[ .:]*(?=.)|^[A-J][.):] ", "", text)]
    sides, approximately = _split(text, re.compile("≈")) if "≈" in text else ([], [])
    if approximately and sides[0].strip():
        tries = [sides[0], sides[-1]]
        exact, rounded = (readings(side)[-1] for side in (sides[0], sides[-1]))
        exact = exact.value if isinstance(exact, Named) else exact
        if isinstance(exact, Number) and not (isinstance(rounded, Number) and _near(exact.value, rounded.value)):
            raise Unreadable("not nearly equal")
    found, error = [], None
    for attempt in dict.fromkeys(tries):
        for letters_are_units in (False, True):
            try:
                value = _read(attempt, letters_are_units)
                if value not in found:
                    found.append(value)
            except Unreadable as reason:
                error = error or reason
    if not found:
        raise error
    return found


def _join_thousands(text):
    parts, depth = [], 0
    for part in re.split(r"([(\[⦃⟨)\]⦄⟩])", text):
        depth += (part in tuple("([⦃⟨")) - (part in tuple(")]⦄⟩"))
        parts.append(part if depth else THOUSANDS.sub(lambda m: m[0].replace(",", ""), part))
    return "".join(parts)


def _read(text, letters):
    text = _trim(text)
    text = re.sub(rf"^(?:~(?:{FILLERS}|if|when|for)(?![A-Za-z])[ :]*)+(?=.)", "", text, flags=re.I).lstrip("=≈: ")
    plain = text.replace("~", "").lower().strip()
    if not text or re.search(r"[…∀∃≡→\"?#@]|(?<![A-Za-z'])'", text):
        raise Unreadable("empty" if not text else "a sign that no rule reads")
    if plain in NO_SOLUTION or text == "∅":
        return Group("⦃", [])
    if plain in ALL_REALS or re.fullmatch(r"\\mathbb ?\{?R\}?", text):
        return Region([(-sympy.oo, False, sympy.oo, False)])
    if table := TABLE.fullmatch(text):
        name, bracket, kind, body = table.groups()
        rows = [[cell for cell in row.split("&") if cell.strip()] for row in body.split(r"\\") if row.strip()]
        kind = TABLES.get((bracket or "", kind), kind)
        return Named((name or "").strip(), Table(kind, [[_read(cell, letters) for cell in row] for row in rows]))
    items, separators = _split(text, SEPARATOR)
    if separators:
        return _list(items, separators, letters)
    sides, signs = _split(text, RELATION)
    if signs:
        return _relation(sides, signs, letters)
    parts, _ = _split(text, re.compile("∪"))
    if len(parts) > 1:
        regions = [_region(_read(part, letters)) for part in parts]
        if None in regions:
            raise Unreadable("a union of what is no interval")
        return Region([part for region in regions for part in region.parts])
    parts, _ = _split(text, re.compile("∖"))
    if len(parts) == 2:
        whole, holes = _read(parts[0], letters), _read(parts[1], letters)
        if whole == Region([(-sympy.oo, False, sympy.oo, False)]) and isinstance(holes, Group) and holes.kind == "⦃":
            return _without([_value(hole) for hole in holes.items])
        raise Unreadable("a difference of sets")
    if text[0] in "([⦃⟨" and _closing(text) == len(text) - 1:
        return _brackets(text, letters)
    clock = re.fullmatch(r"(\d{1,2}) ?: ?([0-5]\d)(?: ?: ?([0-5]\d))?(?: ?~?([ap])\.? ?~?m\.?)?", text, re.I)
    parts, _ = _split(text, re.compile(":"))
    if clock:
        return Ratio([sympy.Integer(part) for part in clock.groups()[:3] if part], (clock[4] or "?").lower())
    if len(parts) > 1:
        return Ratio([formula(part) for part in parts])
    if "±" in text or "∓" in text:
        swap = text.translate(str.maketrans("±∓", "∓±"))
        return Group(",", [_read(t.replace("±", "+").replace("∓", "-"), letters) for t in (text, swap)])
    return _quantity(text, letters)


def _list(items, separators, letters):
    items = [item for item in items if item.strip()]
    if len(items) > MAX_ITEMS:
        raise Unreadable("too many items")
    conditions = [CONDITION.fullmatch(item.strip()) for item in items]
    rest = [item for item, condition in zip(items, conditions, strict=True) if not condition]
    if rest and all(re.search(rf"(?<![A-Za-z\\]){c[1]}(?![A-Za-z])", rest[0].rpartition("=")[2]) for c in conditions if c):
        items = rest
    values = [_read(item, letters) for item in items]
    if len(values) == 1:
        return values[0]
    values = [v for value in values for v in (value.items if isinstance(value, Group) and value.kind == "," else [value])]
    names = [value.name for value in values if isinstance(value, Named)]
    if len(set(names)) == len(values):  # y = 2, x = 1 is (1, 2)
        values.sort(key=lambda value: value.name)
    if len({value.unit for value in values if isinstance(value, Number)} - {""}) > 1:
        raise Unreadable("several units")
    regions = [_region(value.value if isinstance(value, Named) else value) for value in values]
    if None not in regions and any("or" in s.lower() or s == "∨" for s in separators):
        return Region([part for region in regions for part in region.parts])
    if isinstance(values[0], Named) and not any(isinstance(value, Named | Relation) for value in values[1:]):
        return Named(values[0].name, Group(",", [values[0].value, *values[1:]]))
    return Group(",", values)


def _brackets(text, letters):
    inside, closes = text[1:-1], text[-1]
    if not inside.strip():
        raise Unreadable("empty brackets")
    items, separators = _split(inside, re.compile("[,;]"))
    kind = {"⟨": "("}.get(text[0], text[0])
    if kind == "⦃" and re.search(r"(?<!\|)\|(?!\|)|\\mid|:", inside) and "|" not in inside.replace("|", "", 1):
        raise Unreadable("a set by its property")
    if not separators and kind == "(":
        return _read(inside, letters)
    values = [_read(item, letters) for item in items]
    if kind == "⦃":
        values = [v for value in values for v in (value.items if isinstance(value, Group) and value.kind == "," else [value])]
    if {"(": ")", "[": "]", "⦃": "⦄"}[kind] == closes.replace("⟩", ")"):
        ends = [v.value if isinstance(v, Number) else None for v in values]
        if len(ends) == 2 and kind == "(" and (ends[0] == -sympy.oo or ends[1] == sympy.oo):
            return _region(Group("(", values))
        return Group(kind, values)
    if len(values) != 2 or kind == "⦃":
        raise Unreadable("brackets that do not match")
    return Region([(_value(values[0]), kind == "[", _value(values[1]), closes == "]")])


def _relation(sides, signs, letters):
    sides = [side.strip() for side in sides]
    if "" in sides or len(sides) > 4:
        raise Unreadable("half a relation")
    if set(signs) <= {"≈", "="}:
        name = sides.pop(0) if NAME.fullmatch(sides[0]) and not _is_constant(sides[0]) else None
        if name is None and len(sides) == 2 and NAME.fullmatch(sides[1]) and not _is_constant(sides[1]):
            name = sides.pop(1)
        if name is not None and len(sides) == 1:
            return Named(name.strip(" ~").replace(" ", ""), _read(sides[0], letters), (name, sides[0]))
        values = [formula(side) for side in sides]
        if not any(value.free_symbols for value in values[:2]) and all(equal(values[0], v) for v in values[1:]):
            return Named(name or "", Number(values[-1]))
        if name is not None and all(equal(values[0], v) for v in values[1:]):
            return Named(name, Number(values[-1]))
        if len(values) == 2 and name is None:
            return Relation("=", values[0] - values[1])
        raise Unreadable("a chain of equations")
    if signs == ["∈"] and NAME.fullmatch(sides[0]):
        return Named(sides[0].replace(" ", ""), _read(sides[1], letters))
    if signs == ["≠"] and NAME.fullmatch(sides[0]):
        return Named(sides[0], _without([formula(sides[1])]))
    if not (set(signs) <= {"<", "≤"} or set(signs) <= {">", "≥"}):
        raise Unreadable("a relation that no rule reads")
    values = [formula(side) for side in sides]
    if signs[0] in ">≥":
        values, sides, signs = values[::-1], sides[::-1], [COMPARE[sign] for sign in signs[::-1]]
    middle = [i for i, value in enumerate(values) if value.is_Symbol and NAME.fullmatch(sides[i])]
    if len(values) == 3 and 1 in middle:
        return Named(sides[1], Region([(values[0], signs[0] == "≤", values[2], signs[1] == "≤")]))
    if len(values) == 2 and len(middle) == 1:
        if middle == [0]:
            return Named(sides[0], Region([(-sympy.oo, False, values[1], signs[0] == "≤")]))
        return Named(sides[1], Region([(values[0], signs[0] == "≤", sympy.oo, False)]))
    if len(values) == 2:
        return Relation(signs[0], values[0] - values[1])
    raise Unreadable("a chain of relations")


def _is_constant(side):
    return side in ("e", "i", r"\pi")


def _without(holes):
    """All real numbers but these."""
    if not all(hole.is_Rational for hole in holes):
        if len(holes) > 1:
            raise Unreadable("an order of values that is not known")
    ends = [-sympy.oo, *sorted(holes), sympy.oo]
    return Region([(low, False, high, False) for low, high in zip(ends, ends[1:], strict=False)])


def _region(value):
    """An interval, or a set of numbers, as a Region; None if it is neither."""
    match value:
        case Region():
            return value
        case Group("(" | "[" as kind, [Number(low), Number(high)]):
            return Region([(low, kind == "[", high, kind == "[")])
        case Group("⦃", items) if all(isinstance(item, Number) for item in items):
            return Region([(item.value, True, item.value, True) for item in items])
    return None


def _value(value):
    if not isinstance(value, Number) or value.unit:
        raise Unreadable("a number was expected")
    return value.value


def _quantity(text, letters):
    if based := re.fullmatch(r"(\w+)_(\w|\{\w+\})", text):
        if text[0].isdigit():
            return Text(based.groups())
    if re.fullmatch(r"[~A-Za-z .\-/]+", text) and ("~" in text or len(re.sub("[^A-Za-z]", "", text)) > 2):
        words = re.findall(r"[a-z]+", text.lower())
        return Text(tuple(w for w in words if w not in ("the", "a", "an", "is", "it")) or tuple(words))
    text = re.sub(r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\d)? ?[({]?)(\d+) ?°", r"\1{\\frac{\2\\pi}{180}}", text)
    found = QUANTITY.fullmatch(text)
    if not found or ("~" not in text and "°" not in text and "%" not in text and "¢" not in text and not letters):
        return Number(formula(text))
    value, unit, scale = formula(found[1]), [], 1
    words = re.findall(r"[~]?([A-Za-z]+|[°¢%%/·])\.?(?:\^\{?(-?\d+)\}?)?", found[2])
    power = 1
    for word, exponent in words:
        name = word if word in UNITS or len(word) < 2 else word.lower()
        name = name if name in UNITS else name.removesuffix("s") if name.removesuffix("s") in UNITS else name
        if name in NOT_UNITS:
            raise Unreadable(f"{name} after a number")
        if name in SCALES:
            scale *= SCALES[name]
        elif name in ("percent", "pct", "%"):
            unit.append("%")
        elif name in ("square", "sq", "cubic", "cu"):
            power = 2 if name[0] == "s" else 3
        else:
            unit.append(f"{name}^{exponent or power}")
    single = len(unit) == 1 and (unit[0] == "%" or unit[0].partition("^")[0] in UNITS)
    return Number(value * scale, unit[0] if single else "")


# ---------------------------------------------------------------------------------------------------- formulas

NUMBER = re.compile(r"(?:(\d+)(?:\.(\d*))?|\.(\d+))(?:[eE]([+-]?\d+)| ?[×·*] ?10 ?\^ ?(?:\{ ?([+-]?\d+) ?\}|(\d+)))?")
FRACTION = re.compile(r"(?:(\d+) ?\\frac ?|\\frac ?)\{ ?(-?\d+) ?\} ?\{ ?(\d+) ?\}|(?:(\d+) )?(\d+) ?/ ?(\d+)")
TOKEN = re.compile(r"\\([a-zA-Z]+)|[A-Za-z0-9+\-*/^_!|(){}\[\].,·×÷∞⌊⌋⌈⌉ ]")
NOT_A_FORMULA = re.compile(  # what the parser would read as something else, or as its first half
    r"\d \d|[}\]] ?\d|[\d)}\]] ?_|!!|\d\.(?!\d)|\.\d*\.|[+\-*/^·×÷_]$|^[*/^·×÷_!]|\(\)|\^ ?[*/^)}]|,|\|\|"
)
FORMULA_SIGNS = {"·": r"\cdot ", "×": r"\times ", "÷": "/", "*": r"\cdot ", "∞": r"\infty ", "⌊": r"\lfloor ",
                 "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil "}  # fmt: skip


@functools.lru_cache(4096)
def formula(text: str) -> sympy.Expr:
    """A formula as sympy has it, numbers exact. Raises Unreadable, also for what is too large to be computed."""
    text = _trim(text)
    sign = 1
    while text[:1] in ("+", "-"):
        sign, text = -sign if text[0] == "-" else sign, text[1:].strip()
        if not re.fullmatch(r"[+-]*[^+\-]*(?:[eE{][+-]\d+\}?)?", text):
            sign, text = 1, ("-" if sign < 0 else "") + text
            break
    if number := NUMBER.fullmatch(text):
        whole, decimals, bare, *exponents = number.groups()
        decimals, exponent = decimals or bare or "", int(next((e for e in exponents if e), 0))
        if len(text) > 1000 or abs(exponent) > 5000:
            raise Unreadable("too large a number")
        return sign * sympy.Integer((whole or "") + decimals) * sympy.Integer(10) ** (exponent - len(decimals))
    if fraction := FRACTION.fullmatch(text):
        mixed, top, bottom, mixed2, top2, bottom2 = fraction.groups()
        if int(bottom or bottom2) == 0:
            raise Unreadable("division by zero")
        return sign * (int(mixed or mixed2 or 0) + sympy.Rational(int(top or top2), int(bottom or bottom2)))
    text = re.sub("'+", lambda m: "_{%s}" % ("p" * len(m[0])), text)  # y' and y'' are symbols
    text = re.sub(r"\\(d?)dot ?\{? ?(\\?[A-Za-z]+) ?\}?", r"\2_{\1d}", text)
    tokens = [match[1] for match in TOKEN.finditer(text) if match[1]]
    if TOKEN.sub("", text) or not set(tokens) <= FORMULA_COMMANDS:
        raise Unreadable("a sign that no rule reads")
    try:
        tree = _Latex2Sympy(config=ConversionConfig(lowercase_symbols=False)).parse(_for_parser(text))
    except Exception as error:
        raise Unreadable(f"not a formula: {type(error).__name__}") from error
    if not isinstance(tree, sympy.Expr):
        raise Unreadable("not a formula")
    return sign * _compute(tree)


def _for_parser(text):
    """A spelled formula without the readings that Math-Verify's parser gives to 2(3), log_2 8 or 1.5."""
    text = re.sub(r"(\d)\.(?!\d)", r"\1", text)
    text = re.sub(r"\\gamma(?![a-z])|E(?=_)", lambda m: r"\varsigma " if m[0] != "E" else r"\Upsilon ", text)  # it knows constants
    text = re.sub(r"(\\(?:%s)[_^])(\w)" % "|".join(FUNCTIONS), r"\1{\2}", text)
    text = re.sub(r"(\\(?:%s)[_^]\{[^{}]*\}) ?(\d+)" % "|".join(FUNCTIONS), r"\1{\2}", text)
    if NOT_A_FORMULA.search(text):
        raise Unreadable("not a formula")
    text = re.sub(r"(?<![\d.^_}])(\d+) ?(\\frac ?\{\d+\} ?\{\d+\})", r"(\1+\2)", text)
    text = re.sub(r"(?<![\d.^_}])(\d+) (\d+/\d+)", r"(\1+\2)", text)
    text = re.sub(r"(?<![\d.])(\d*)\.(\d+)", lambda m: rf"(\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}})", text)
    text = re.sub(r"(?<=[\d)]) ?(?=\()|(?<=\)) ?(?=\\frac|\\sqrt|\\binom|[\da-zA-Z])|(?<=!) ?(?=[\d(\\a-zA-Z])", r"\\cdot ", text)
    text = re.sub(r"(?<![\\a-zA-Z])([a-eijk-zA-EI-Z]) ?(?=\()", r"\1\\cdot ", text)
    return re.sub("[%s]" % "".join(FORMULA_SIGNS), lambda m: FORMULA_SIGNS[m[0]], text)


def _compute(tree):
    """The parser's tree, computed from its leaves on, once it is known to be of a size that can be."""
    _bits(tree)
    names = {symbol: sympy.I for symbol in tree.free_symbols if symbol.name == "i"}

    def rebuild(node):
        if isinstance(node, AppliedUndef):
            return sympy.Symbol(str(node))
        if not node.args:
            return names.get(node, node)
        return node.func(*map(rebuild, node.args))

    value = rebuild(tree)
    if value.has(sympy.nan, sympy.zoo):
        raise Unreadable("division by zero")
    return value


def _bits(node):
    """An upper bound of log2 |node|, symbols at most 8. Raises Unreadable where it is over MAX_BITS."""
    parts = [_bits(arg) for arg in node.args]
    if node.is_Integer:
        bits = abs(int(node)).bit_length()
    elif node.is_Rational:
        bits = max(abs(node.p), node.q).bit_length()
    elif node.is_Pow or isinstance(node, sympy.exp):
        base, exponent = parts if node.is_Pow else (2, *parts)
        power = abs(node.args[-1].subs(dict.fromkeys(node.free_symbols, 8)).evalf(3))
        bits = (base + 1) * (power + 1 if power.is_Float or power.is_Rational else MAX_BITS)
    elif isinstance(node, sympy.factorial | sympy.binomial | sympy.gamma):
        bits = 40 * 2 ** parts[0] if parts[0] < 13 else MAX_BITS + 1
    elif node.is_Add:
        bits = max(parts) + len(parts)
    else:
        bits = sum(parts) + 3
    if bits > MAX_BITS:
        raise Unreadable("too large a number")
    return bits


POINTS = [sympy.Rational(p, q) for p, q in [(37, 29), (-53, 31), (101, 41), (17, 43), (-7, 47), (223, 59)]]


def _at(symbols, k):
    return {s: POINTS[(i + k) % len(POINTS)] + sympy.Rational(k * i, 7) for i, s in enumerate(symbols)}


def _zero(value, at):
    """Is it 0 there? None where it is not a number."""
    number = value.evalf(8, subs=at, maxn=300)
    if not number.is_number or number.has(sympy.nan, sympy.zoo, sympy.oo):
        return None
    return number == 0 or all(part == 0 or part._prec == 1 for part in number.as_real_imag())


@functools.lru_cache(4096)
def equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Are two formulas equal? Rational numbers exactly, others to 300 digits, with symbols at points of both signs.

    >>> equal(formula("2^{-60}"), formula("2^{-61}")), equal(formula("(x+1)^2"), formula("x^2+2x+1"))
    (False, True)
    """
    if a == b:
        return True
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if len(symbols) > 8 or (not symbols and a.is_Rational and b.is_Rational) or a.is_infinite or b.is_infinite:
        return False
    tested = 0
    for k in range(4 if symbols else 1):
        at = _at(symbols, k)
        real = [value.evalf(8, subs=at).is_real for value in (a, b)]
        if real[0] != real[1] and symbols:  # outside the domain of one of them
            continue
        zero = _zero(a - b, at)
        if zero is False:
            return False
        tested += zero is True
    return tested > 0


def _near(a, b):
    """Is b a rounded a?"""
    if a.free_symbols or b.free_symbols:
        return False
    return bool(abs((a - b).evalf(8)) <= abs(a.evalf(8)) / 20)


def _proportional(f, g, *, positive):
    symbols = sorted(f.free_symbols | g.free_symbols, key=str)
    if not symbols or len(symbols) > 8 or f.free_symbols != g.free_symbols:
        return False
    at = [_at(symbols, k) for k in range(4)]
    values = [(f.evalf(40, subs=point), g.evalf(40, subs=point)) for point in at]
    if not all(value.is_number and value.is_finite and value != 0 for pair in values for value in pair):
        return False
    ratios = [a / b for a, b in values]
    return all(abs(r - ratios[0]) < abs(ratios[0]) * sympy.Float("1e-30", 40) for r in ratios) and (
        not positive or bool(ratios[0].is_real and ratios[0] > 0)
    )


# ---------------------------------------------------------------------------------------------------- comparison


def same(a, b) -> bool:
    """Do two readings mean the same? Symmetric."""
    return _same(a, b) or _same(b, a)


def _same(a, b):
    match a, b:
        case Text(), Text():
            return a == b
        case Number(), Number():
            return _same_quantity(a, b)
        case Named(), Named() if a.name.strip("~") == b.name.strip("~") or not a.name or not b.name:
            return same(a.value, b.value)
        case Named(), Named() | Relation() if a.sides:
            return (f := _equation(a)) is not None and (g := _equation(b)) is not None and same(f, g)
        case Named(), Named() | Relation():
            return False
        case Named(), _:
            return same(a.value, b)
        case Relation(), Relation():
            return a.sign == b.sign and _proportional(a.difference, b.difference, positive=a.sign != "=")
        case Table(), Table():
            return a.kind == b.kind and len(a.rows) == len(b.rows) and (
                _paired(a.rows, b.rows, _same_items) if a.kind == "cases" else all(map(_same_items, a.rows, b.rows))
            )
        case Table("matrix"), Group("(" | ","):
            vector = a.rows[0] if len(a.rows) == 1 else [row[0] for row in a.rows if len(row) == 1]
            return len(vector) == max(len(a.rows), len(a.rows[0])) and _same_items(vector, b.items)
        case Ratio(), Ratio():
            if a.clock and b.clock:
                return a.items == b.items and (a.clock == b.clock or "?" in (a.clock, b.clock))
            return len(a.items) == len(b.items) and all(
                equal(x * b.items[0], y * a.items[0]) for x, y in zip(a.items, b.items, strict=True)
            )
        case Ratio([top, bottom]), Number(value):
            return bottom != 0 and equal(top, bottom * value)
        case Group("⦃" | "[", [item]), Number() | Text() | Named():
            return same(item, b)
        case Group("⦃", items), Group("⦃" | ",", others):
            return all(any(same(x, y) for y in others) for x in items) and all(any(same(x, y) for x in items) for y in others)
        case Group(",", items), Group(",", others):
            return _paired(items, others, same)
        case Group("(" | "[" as kind, items), Group(other, others):
            return other != "⦃" and (other in (kind, ",") or len(items) != 2) and _same_items(items, others)
        case Region(parts), Region(others):
            return _paired(parts, others, lambda p, q: p[1] == q[1] and p[3] == q[3] and equal(p[0], q[0]) and equal(p[2], q[2]))
        case Region(), Group("(" | "[", _):
            return (region := _region(b)) is not None and _same(a, region)
    return False


def _same_items(items, others):
    return len(items) == len(others) and all(map(same, items, others))


def _paired(items, others, same):
    """Has every item a partner of its own among the others?"""
    others = list(others)
    for item in items:
        partner = next((i for i, other in enumerate(others) if same(item, other)), None)
        if partner is None:
            return False
        del others[partner]
    return not others


def _same_quantity(a, b):
    if (a.unit == "%") != (b.unit == "%"):
        percent, other = (a, b) if a.unit == "%" else (b, a)
        return not other.unit and (equal(percent.value, other.value) or equal(percent.value, 100 * other.value))
    if a.unit == b.unit or not a.unit or not b.unit:
        return equal(a.value, b.value)
    (kind, x, power), (other, y, other_power) = (_unit(q.unit) for q in (a, b))
    return kind == other and power == other_power and equal(a.value * x**power, b.value * y**power)


def _unit(unit):
    name, _, power = unit.partition("^")
    return *UNITS[name], int(power)


def _equation(value):
    if isinstance(value, Relation):
        return value
    try:
        return Relation("=", formula(value.sides[0]) - formula(value.sides[1])) if value.sides else None
    except Unreadable:
        return None


# ---------------------------------------------------------------------------------------------------- the answer of a text

BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
BARE_BOX = re.compile(r"\\[dtc]?frac\s*(?:\w\s*\w|\{[^{}]*\}\s*\{[^{}]*\})|-?[\d.,]*\d|\\?[A-Za-z]+")
BETWEEN = re.compile(r"(?:[\s$,;&]|\\[()\[\],;]|\\q?quad|and\b|or\b|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|[A-Za-z](?:_\w|_\{\w+\})?\s*=)*")
TAG = re.compile(r"<answer>(.*?)</answer>", re.S)
SPECIAL = re.compile(r"(?:\s*(?:<\|[^|<>]{0,40}\|>|</s>|<eos>|<end_of_turn>))+\s*$")
PHRASE = re.compile(r"\b(?:answer|antwort|respuesta|réponse|ответ|answer[ *_]{0,3}(?:to[^.\n]{0,80}))[\s*_$]{0,4}"
                    r"(?:[:：]|\b(?:is|are|ist)\b|=)(?![\s*_:]*not\b)[\s*_:]*", re.I)  # fmt: skip
CHOICE_PHRASE = re.compile(r"\b(?:answer|antwort|option|choice|respuesta|réponse)\b[^.\n:：]{0,40}?(?:[:：]|\bis\b|\bist\b)(?![\s*_:$]*not\b)[\s*_:$]*", re.I)
SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)|,\s(?!and\b|or\b|\d|\\|[A-Za-z]\s*=)|\s(?:because|since|which|so|as|where|but)\b|\s\((?=[a-z])|;\s|<")


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of the last boxes of a text; `\boxed 5` needs no braces, `\{` is not one."""
    found = []
    for box in [*BOX.finditer(text)][-50:]:
        at = box.end()
        if text[at : at + 1] != "{":
            if bare := BARE_BOX.match(text, at):
                found.append((box.start(), bare.end(), bare[0]))
            continue
        depth = 0
        for brace in re.compile(r"\\.|[{}]", re.S).finditer(text, at):
            depth += (brace[0] == "{") - (brace[0] == "}")
            if depth == 0:
                found.append((box.start(), brace.end(), text[at + 1 : brace.start()]))
                break
    return [b for b in found if not any(a[0] < b[0] and b[1] < a[1] for a in found)]


def find_answer(text: str) -> str | None:
    """What a text says the answer is; None if it says nothing that can be told."""
    found = boxes(text)
    if found:
        start, _, content = found.pop()
        contents = [content]
        while found and BETWEEN.fullmatch(text, found[-1][1], start) and re.search(r",|;|and|or", text[found[-1][1] : start]):
            start, _, content = found.pop()
            contents.append(content)
        return ", ".join(dict.fromkeys(reversed(contents)))
    if tags := TAG.findall(text):
        return find_answer(tags[-1]) or tags[-1]
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0]
    if phrases := [*PHRASE.finditer(text)]:
        rest = text[phrases[-1].end() :].lstrip()
        math = re.match(r"\$+([^$\n]+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]|\*\*([^*\n]+)\*\*", rest)
        if math:
            return next(group for group in math.groups() if group)
        end = SENTENCE_END.search(rest)
        return rest[: end.start()] if end else rest
    return None


def _last_line(text):
    """The one number, or what is bold or a formula, of the last line of a text without any mark of an answer."""
    line = text.strip().rpartition("\n")[2]
    if bold := re.findall(r"\*\*([^*\n]+)\*\*|\$([^$\n]+)\$(?!\d)", line):
        return bold[-1][0] or bold[-1][1]
    if re.search(r"\\|[<>≤≥]|\b(?:not|no|never|\w+n't|step|case|part|try|tried|or|and|to|between|than|least|most|if|million|thousand)\b", line, re.I):
        return None
    line = line.rpartition("=")[2]
    numbers = re.findall(r"(?<![\w.])[-−]?[$€£]?\d[\d,]*(?:\.\d+)?%?(?![\w/^])", line)
    if len(line) < 60 and not re.search("[A-Za-z]{2}|=", line):
        return line
    return numbers[0].rstrip(",") if len(numbers) == 1 else None


def _label(text):
    """Label of a choice that an answer starts with; "" for several, None for none."""
    text = re.sub(r"\\(?:text|math)(?:bf|rm|it|normal)?(?![a-zA-Z])|\\boxed|[{}$*~`\[\]]|\\[ ,;]", " ", text).strip()
    found = re.match(r"(?:(?:option|choice|answer)\b[\s:]*)?(\(?)([A-Za-z])(?:\)|(?![A-Za-z0-9_'’^]))(.*)", text, re.I | re.S)
    if not found:
        return None
    opened, label, rest = found.groups()
    if re.match(r"\s*(?:,|/|&|and\b|or\b|[-:]\s)\s*(?:and |or )?\(?[A-Z]\)?\s*(?:$|[).:,]|and\b|or\b)", rest):
        return ""
    if label.islower() and not (opened or re.fullmatch(r"\s*[.:)]?\s*", rest)):
        return None
    plain = re.match(r"\s*$|\s*[.:)\-–—,;]", rest) or opened or re.search(r"\)$", found[0][: len(found[0]) - len(rest)])
    return label.upper() if plain else None


def _chosen(text):
    """The label that a response chooses."""
    found = [(start, _label(content)) for start, _, content in boxes(text)]
    for phrase in CHOICE_PHRASE.finditer(text):
        rest = text[phrase.end() :].lstrip()
        if rest.startswith((r"\boxed", "not ")):
            continue
        line = rest.partition("\n")[0]
        label = _label(line)
        if label is None and (said := re.match(r"\W{0,4}([B-HJ-Z])\s+(?=[a-z])(?!and\b|or\b)", line)):
            label = said[1]
        if label is None and (said := re.match(r"\W{0,4}(A|I)\s+(?=(?:because|since|as|which)\b)", line)):
            label = said[1]
        found.append((phrase.end(), label))
    found = sorted(pair for pair in found if pair[1] is not None)
    joined = [pair for pair in found if pair[1]]
    if not found:
        return _label(text.strip().rpartition("\n")[2])
    answer = find_answer(text) if boxes(text) else None
    if answer is not None and found[-1][0] == boxes(text)[-1][0]:
        return _label(answer)
    return found[-1][1] if joined else ""


def robust(response: str, gold: str) -> bool:
    """The rule. Raises NoAnswer if the response gives no answer, or if the gold cannot be read."""
    whole = SPECIAL.sub("", response[-MAX_CHARS:])
    said = whole.rpartition("</think>")[2]
    gold = find_answer(gold) if boxes(gold) else gold
    if label := re.fullmatch(r"\W*([A-Z])\W*", re.sub(r"\\(?:text|mathrm|textbf|mathbf)", "", gold)):
        chosen = _chosen(said)
        if chosen is not None:
            return chosen == label[1]
    answer = find_answer(said) or find_answer(whole) or _last_line(said)
    if answer is None or not answer.strip():
        raise NoAnswer("no answer in the response")
    try:
        truth = _gold(gold)
    except Unreadable as error:
        truth = error
    if not gold.strip():
        raise NoAnswer("gold unreadable: it is empty")
    if len(answer) > 4 * MAX_ANSWER:
        raise NoAnswer(f"an answer of {len(answer)} characters")
    try:
        spelled = spell(answer)
        if spelled and _key(spelled) == _key(spell(gold)):
            return True
        if isinstance(truth, Unreadable):
            raise NoAnswer(f"gold unreadable: {gold[:100]} ({truth})")
        return any(same(a, b) for a in truth for b in readings(spelled))
    except Unreadable as error:
        raise NoAnswer(f"answer unreadable: {answer[:100]} ({error})") from error


@functools.lru_cache(2048)
def _gold(gold):
    return readings(spell(gold))


def _key(text):
    """Equal for texts that differ in spaces, in marks of words and, if they are words, in case."""
    text = re.sub(r"[~\s]", "", text)
    return text.lower() if re.fullmatch(r"[A-Za-z]{2,}", text) else text
