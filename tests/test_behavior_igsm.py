"""igsm's behaviors: the same problem in other steps, what the checker knows of them, and the picture of a problem."""

import random
import re
import time
from collections import Counter
from math import sqrt

import pytest

from igsm import check_solution, generate, problems, retell, row, solve, tokenizer
from igsm.__main__ import main
from igsm.behaviors import plan_steps, reordered
from igsm.graph import Node, template_of
from igsm.solver import Question, parents
from tests.conftest import read_rows, run_script, vectors
from tests.test_igsm import SAMPLES, categories_of

BRIDGE = dict(subgoals=True, reflection=0.1, analysis="table")
WAYS = {
    "vanilla": {}, "bridge": BRIDGE, "subgoal": dict(subgoals=True), "reflection": dict(reflection=0.1),
    "analysis": dict(analysis="table"), "flat analysis": dict(analysis=0.1), "retry": dict(retry=0.1),
    "all, often": dict(subgoals=True, reflection=0.5, analysis=0.5, retry=0.3),
    "pp_aug": dict(question_variant=2), "rc_aug": dict(solution_variant=3),
    "rc_aug with behaviors": dict(solution_variant=1, **BRIDGE),
}  # fmt: skip
SETTINGS = [
    (style, ops, modulus) for style in ("natural", "symbolic") for ops, modulus in (((4, 8), 23), ((15, 20), None))
]


def counts(check):
    return {name: getattr(check, name) for name in ("reflections", "analyses", "subgoals", "retries", "remembered")}


@pytest.mark.parametrize(("style", "ops", "modulus"), SETTINGS)
def test_every_behavior_is_accepted_and_counted_and_stays_when_others_join_it(style, ops, modulus):
    total = Counter()
    for p in problems(25, ops=ops, style=style, modulus=modulus, seed=11):
        found = {}
        for name, how in WAYS.items():
            told = retell(p, **how)
            assert solve(told.question, modulus=modulus) == told.answer == p.answer
            check = check_solution(told.question, told.solution, told.categories, modulus=modulus)
            assert check.correct and check.answer_correct, (name, check.errors)
            assert check.solved - check.redundant == p.num_necessary
            found[name] = counts(check)
            total.update({(name, k): v for k, v in found[name].items()})
        assert set(found["vanilla"].values()) == {0}
        assert found["bridge"]["reflections"] == found["reflection"]["reflections"]  # streams of their own
        assert found["bridge"]["subgoals"] >= found["subgoal"]["subgoals"]
        assert found["bridge"]["analyses"] >= found["analysis"]["analyses"]
        for name, kinds in (("subgoal", "subgoals"), ("analysis", "analyses"), ("retry", "retries")):
            assert {k for k, v in found[name].items() if v} <= {kinds}
    for name, kind in (("bridge", "reflections"), ("bridge", "remembered"), ("bridge", "analyses"),
                       ("bridge", "subgoals"), ("retry", "retries"), ("flat analysis", "analyses")):  # fmt: skip
        assert total[name, kind] > 0, (name, kind)


def plain(solution, p, style):
    """The solution without its behaviors: lines that compute nothing needed are dropped, sentences of analyses
    and intermediate results too, a denoted parameter is begun as where it was denoted, and steps are put in order."""
    needed = {node.name if style == "natural" else p.letters[i]: i for i, node in enumerate(p.necessary)}
    head, lines, tail, begun = [], {}, [], {}
    for line in solution.split("\n"):
        if style == "symbolic":
            step = re.fullmatch(r"([a-z]+)(?:\([^=?]*\))?=(.+)", line)
            if step and step[1] in needed:
                chain = step[2].split("=")
                chain = chain if len(chain) < 4 else [*chain[:2], chain[-1]]
                lines[needed[step[1]]] = f"{step[1]}={'='.join(chain)}"
            elif not re.match(r"[a-z]+[=?(]", line):
                (tail if lines else head).append(line)
            continue
        if not line.startswith("- "):
            (tail if lines else head).append(line)
            continue
        name = re.search(r"number of (each .*?'s .*?)(?: is -?\d| as [a-zA-Z]\d?\.| as BACK|\. )", line)[1]
        line = re.sub(r" We know that it equals .+?\.(?= Then | Wait, | However, | But )", "", line)
        if not re.search(r" (?:Then|So) [a-zA-Z]\d? = ", line):
            if not line.endswith("BACK."):
                begun.setdefault(name, re.split(r" (?:Wait, |However, |But )", line)[0])
        elif name in needed:
            start, equation = re.fullmatch(r"(.+) ((?:Then|So) [a-zA-Z]\d? = .+)\.", line).groups()
            chain = equation.split(" = ")
            chain = chain if len(chain) < 5 else [*chain[:3], chain[-1]]
            lines[needed[name]] = f"{begun.get(name, start)} {' = '.join(chain)}."
    return "\n".join([*head, *(lines[i] for i in sorted(lines)), *tail])


@pytest.mark.parametrize(("style", "ops", "modulus"), SETTINGS)
def test_a_solution_without_its_behaviors_is_the_vanilla_one(style, ops, modulus):
    changed = 0
    for p in problems(60, ops=ops, style=style, modulus=modulus, seed=4):
        for how in (BRIDGE, dict(reflection=0.6), dict(subgoals=True, reflection=0.3, analysis=0.5, retry=0.3)):
            told = retell(p, **how)
            assert told.question == p.question
            changed += told.solution != p.solution
            assert plain(told.solution, p, style) == p.solution
    assert changed > 100


def test_the_words_of_each_behavior():
    [p] = generate(1, ops=(7, 8), max_params=6, start=355)
    lines = retell(p, **dict(BRIDGE, reflection=0.3)).solution.split("\n")
    assert lines[3] == (
        "- Next, let's define the number of each Dogwood's Bird as C. But we haven't calculated the number of each "
        "Dogwood's Robin yet, thus the value of C is still unknown."
    )
    assert lines[5] == (
        "- Now, we can find the number of each Dogwood's Bird. Remember that it has been denoted as C. Then C = r = 3."
    )
    assert "Let's denote it as c. We know that it equals 3 times the sum of" not in lines[6]
    assert "as c. We know that it equals 3 times the sum of each Dogwood's Robin, each Elder" in lines[6]
    assert lines[6].endswith("Then c = 3 * (r + Z + C) = 3 * (3 + 3 + 3) = 3 * (6 + 3) = 3 * 9 = 27.")
    for told in problems(50, ops=(10, 15), reflection=0.4):
        for names, be in re.findall(r"Wait, the number of (.+) (is|are) unknown", told.solution):
            assert (be == "are") == (names.count("each ") > 1)
    assert "- Define the number of each Dogwood's Robin as BACK." in retell(p, retry=0.3).solution.split("\n")
    [p] = generate(1, ops=(7, 8), max_params=6, start=355, style="symbolic")
    steps = retell(p, **dict(BRIDGE, reflection=0.3)).solution.split("\n")[1:-2]
    assert steps == ["z=3", "o?i", "i=z=3", "o=i=3",
                     "b(3*(i+z+o))=3*(i+z+o)=3*(3+3+3)=3*(6+3)=3*9=27", "c=b*o=27*3=81"]  # fmt: skip
    assert retell(p, retry=0.3).solution.split("\n")[1:5] == ["i?", "z=3", "c?", "i=z=3"]


# how often


def planned(p, seed=0, **how):
    n = p.num_necessary
    return plan_steps(p.nodes, n, range(n), stream=lambda name: random.Random(f"{seed}{name}"), **how)


def test_analyses_follow_the_table_or_the_flat_chance():
    told, of = Counter(), Counter()
    flat = seen = 0
    for p in problems(500, ops=(15, 20), seed=5):
        for step in planned(p, p.index, analysis="table"):
            node = p.nodes[step.node]
            kind = 0 if node.abstract or not node.terms else min(4, len(node.parents) + (node.const is not None))
            of[kind] += 1
            told[kind] += step.analysis
        steps = planned(p, p.index, analysis=0.1)
        flat += sum(step.analysis for step in steps)
        seen += sum(not p.nodes[step.node].abstract and bool(p.nodes[step.node].terms) for step in steps)
    assert told[0] == 0 and told[4] == of[4] > 300
    for kind, chance in ((1, 0.1), (2, 0.4), (3, 0.8)):
        assert abs(told[kind] / of[kind] - chance) < 4 * sqrt(chance * (1 - chance) / of[kind])
    assert abs(flat / seen - 0.1) < 4 * sqrt(0.09 / seen)


def test_a_behavior_draws_from_a_stream_of_its_own():
    for p in problems(30, ops=(10, 20), seed=3):
        alone = planned(p, reflection=0.4)
        together = [step for step in planned(p, reflection=0.4, analysis=0.5, retry=0.4) if not step.retry]
        assert [step._replace(analysis=False) for step in together] == alone
        lines = {step.node: step.analysis for step in planned(p, analysis=0.5)}
        assert all(lines[step.node] == step.analysis for step in together if not step.missing and step.node in lines)


def test_retries_come_before_every_line_but_the_last_with_their_chance():
    """One more with probability q each time: q / (1 - q) on average, where something cannot be computed yet."""
    made = places = 0
    for p in problems(400, ops=(10, 15), seed=6):
        steps = planned(p, p.index, retry=0.2)
        made += sum(step.retry for step in steps)
        solved = 0
        for step in steps:
            if not step.retry:
                missing = [v for v, node in enumerate(p.nodes) if set(node.parents) - set(range(solved))]
                places += bool(missing)
                solved += 1
    assert abs(made / places - 0.25) < 4 * sqrt(0.2 / 0.64 / places)  # the variance of a geometric number


def test_look_aheads_follow_the_published_procedure():
    """Never before the first or the last line, never two in a row; a share of 0.3 looks at what is redundant."""
    ahead = redundant = 0
    for p in problems(600, ops=(15, 20), seed=7):
        steps, n = planned(p, p.index, reflection=0.3), p.num_necessary
        assert not steps[0].missing and steps[-1].node == n - 1 and not steps[-1].missing
        for before, after in zip(steps, steps[1:], strict=False):
            assert not (before.missing and after.missing)
        if n == len(p.nodes):
            continue
        for step in steps:
            if step.missing:
                ahead += 1
                redundant += step.node >= n
    assert 0.1 < redundant / ahead < 0.3  # a redundant one is often computable at once


def original_graph(record):
    """A published problem as our nodes: (nodes, how many are necessary)."""
    question = Question(record["question"], categories_of(record))
    names = [one["name"] for one in record["necessary"]] + list(record["redundant"])
    names = [name.removeprefix("each ") for name in names]
    place = {name: i for i, name in enumerate(names)}
    nodes = []
    for name in names:
        formula = question.formula(name)
        terms = tuple((place[parent],) for parent in parents(formula))
        literal = isinstance(formula, int) or (isinstance(formula, tuple) and any(isinstance(x, int) for x in formula))
        nodes.append(Node("A", name, name not in question.said, 1 if literal else None, "", "+", terms, 0))
    return nodes, len(record["necessary"])


@pytest.mark.parametrize(
    ("key", "how"),
    [
        ("solution_bridge", dict(reflection=0.1, analysis="table")),
        ("solution_bridge_reflect0.5", dict(reflection=0.5, analysis="table")),
        ("solution_reflection_only", dict(reflection=0.1)),
        ("solution_analysis_only", dict(analysis="table")),
    ],
)
def test_on_the_published_problems_behaviors_are_as_frequent_as_in_the_published_solutions(key, how):
    graphs = [original_graph(record) for record in SAMPLES]
    published = Counter()
    for record in SAMPLES:
        check = check_solution(record["question"], record[key], categories_of(record))
        published.update(lines=check.steps, reflections=check.reflections, analyses=check.analyses,
                         with_reflection=check.reflections > 0, remembered=check.remembered,
                         redundant=check.redundant)  # fmt: skip
    draws = []
    for seed in range(60):
        ours = Counter()
        for i, (nodes, n) in enumerate(graphs):
            steps = plan_steps(
                nodes, n, range(n), stream=lambda name, at=(seed, i): random.Random(f"{at}{name}"), **how
            )
            missing = sum(bool(step.missing) for step in steps)
            ours.update(lines=len(steps), reflections=missing, analyses=sum(step.analysis for step in steps),
                        with_reflection=missing > 0, remembered=sum(step.again for step in steps),
                        redundant=sum(step.node >= n and not step.missing for step in steps))  # fmt: skip
        draws.append(ours)
    for name, value in published.items():
        values = [ours[name] for ours in draws]
        mean = sum(values) / len(values)
        std = sqrt(sum((x - mean) ** 2 for x in values) / len(values))
        assert abs(value - mean) <= 3.5 * std, (name, value, mean, std)


# variants


def test_variants_reorder_the_question_or_the_solution_and_nothing_else():
    orders, questions = set(), set()
    for p in problems(20, ops=(10, 15), seed=8):
        for i in range(1, 4):
            pp, rc = retell(p, question_variant=i), retell(p, solution_variant=i)
            assert pp.solution == p.solution and rc.question == p.question
            *conditions, asked = pp.question.split("\n")
            *plain_conditions, plain_asked = p.question.split("\n")
            assert sorted(conditions) == sorted(plain_conditions) and asked == plain_asked
            check = check_solution(rc.question, rc.solution, rc.categories)
            assert check.correct and check.solved == p.num_necessary
            order = re.findall(r"number of (each .*?'s .*?)(?: is -?\d| as [a-zA-Z]\.|\. )", rc.solution)
            assert order[-1] == p.necessary[-1].name
            orders.add((p.index, tuple(order)))
            questions.add((p.index, pp.question))
            assert rc.solution != p.solution
            [symbolic] = generate(1, ops=(10, 15), seed=8, start=p.index, style="symbolic")
            lines = retell(symbolic, solution_variant=i).solution.split("\n")
            assert sorted(lines) == sorted(symbolic.solution.split("\n"))  # letters are the question's
    assert len(orders) > 35 and len(questions) > 55


def test_a_solution_variant_is_another_order_wherever_there_is_one_on_its_side_of_the_split():
    several = 0
    for p in problems(40, ops=(3, 5), style="symbolic", modulus=23, seed=8):
        formulas = [(node.const, node.const_op, node.sign, node.terms) for node in p.necessary]
        orders = {tuple(reordered(p.nodes, p.num_necessary, random.Random(i))) for i in range(30)}
        sides = [template_of(formulas, order)[1] for order in orders | {tuple(range(p.num_necessary))}]
        if sides.count(template_of(formulas, range(p.num_necessary))[1]) > 1:
            several += 1
            assert all(retell(p, solution_variant=i).solution != p.solution for i in range(1, 5))
    assert several > 5


def test_retold_is_what_the_generator_makes_at_once():
    for style in ("natural", "symbolic"):
        for how in WAYS.values():
            plain_ones = generate(4, ops=(6, 12), seed=3, style=style)
            assert [retell(p, **how) for p in plain_ones] == generate(4, ops=(6, 12), seed=3, style=style, **how)


# checker


def natural(lines):
    steps = "\n".join(f"- {line}" for line in lines)
    return (
        f"<think>\nLet's compute the answer step by step.\n{steps}\nThus, the answer is 6.\n</think>\n"
        "<answer>\nThe final answer is \\boxed{6}.\n</answer>"
    )


SUM = "times the sum of each Oak Crate's Apple and each Ketch's Oak Crate."
QUESTION = f"""The number of each Sloop's Oak Crate equals 2 {SUM}
The number of each Oak Crate's Apple equals 2.
The number of each Ketch's Oak Crate equals 1.
How many Oak Crate does each Sloop have?"""
LEAVES = [
    "The number of each Oak Crate's Apple is 2. Let it be a. So a = 2.",
    "The number of each Ketch's Oak Crate is 1. Let it be b. So b = 1.",
]
BACK = "Define the number of each {} as BACK."
BEGIN = "Next, let c represent the number of each Sloop's Oak Crate."
GIVEN = "The number of each Sloop's Oak Crate is 6. Let it be c."
AGAIN = "Now, we can find the number of each Sloop's Oak Crate. Remember that it has been denoted as c."
SOLVE = "Then c = 2 * (a + b) = 2 * (2 + 1) = 6."
WAIT = "Wait, the number of {} unknown, so we cannot compute it."
BOTH, ONE = "each Oak Crate's Apple, each Ketch's Oak Crate are", "each Ketch's Oak Crate is"


@pytest.mark.parametrize(
    ("steps", "error"),
    [
        ([f"{BEGIN} {WAIT.format(BOTH)}", *LEAVES, f"{AGAIN} {SOLVE}"], None),
        ([LEAVES[0], f"{BEGIN} {WAIT.format(ONE)}", LEAVES[1], f"{AGAIN} {SOLVE}"], None),
        ([LEAVES[0], f"{BEGIN} {WAIT.format(BOTH)}", LEAVES[1], f"{AGAIN} {SOLVE}"], "bad reflection"),
        ([f"{BEGIN} {WAIT.format(ONE)}", *LEAVES, f"{AGAIN} {SOLVE}"], "bad reflection"),
        ([*LEAVES, f"{BEGIN} {WAIT.format(ONE)}", f"{AGAIN} {SOLVE}"], "bad reflection"),
        ([f"{BEGIN} {WAIT.format(BOTH)}", *LEAVES, f"{BEGIN} {SOLVE}"], "has its letter c already"),
        ([f"{GIVEN} {WAIT.format(BOTH)}", *LEAVES, f"{AGAIN} {SOLVE}"], "gives 6 and then no value"),
        ([*LEAVES, f"{AGAIN} {SOLVE}"], "c was not given to"),
        ([*LEAVES, f"{BEGIN} {SOLVE}", f"{AGAIN} {WAIT.format(ONE)}"], "called unknown but was computed"),
        ([LEAVES[0], BACK.format("Sloop's Oak Crate"), LEAVES[1], f"{BEGIN} {SOLVE}"], None),
        ([LEAVES[0], BACK.format("Sloop's Oak Crate") + " So c = 7.", LEAVES[1], f"{BEGIN} {SOLVE}"], "unreadable"),
        ([*LEAVES, BACK.format("Sloop's Oak Crate"), f"{BEGIN} {SOLVE}"], "bad retry"),
        ([LEAVES[0], BACK.format("Oak Crate's Apple"), LEAVES[1], f"{BEGIN} {SOLVE}"], "bad retry"),
        ([*LEAVES, BACK.format("Sloop's Pine Crate"), f"{BEGIN} {SOLVE}"], "unreadable"),
        ([*LEAVES, f"{BEGIN} {SOLVE}".replace(" c ", " a ")], "step 3: letter: a is"),
        ([*LEAVES, f"{BEGIN} We know that it equals 2 {SUM} {SOLVE}"], None),
        ([*LEAVES, f"{BEGIN} We know that it equals 3 {SUM} {SOLVE}"], "bad analysis"),
        ([*LEAVES, f"{BEGIN} Then c = 2 * (a + b) = 2 * (2 + 1) = 2 * 3 = 6."], None),
        ([*LEAVES, f"{BEGIN} Then c = 2 * (a + b) = 2 * (2 + 1) = 2 * 4 = 6."], "arithmetic"),
    ],
)  # fmt: skip
def test_checker_tells_right_behaviors_from_wrong_ones(steps, error):
    check = check_solution(QUESTION, natural(steps))
    assert check.correct == (error is None), check.errors
    assert error is None or any(error in one for one in check.errors), check.errors


@pytest.mark.parametrize(
    ("steps", "error"),
    [
        ("c?a?b\na=2\nb=1\nc=2*(a+b)=2*(2+1)=6", None),
        ("a=2\nc?b\nb=1\nc=2*(a+b)=2*(2+1)=6", None),
        ("a=2\nc(2*(a+b))?b\nb=1\nc(2*(b+a))=2*(a+b)=2*(2+1)=2*3=6", None),
        ("a=2\nc?\nc?\nb=1\nc=2*(a+b)=2*(2+1)=6", None),
        ("a=2\nc?a?b\nb=1\nc=2*(a+b)=2*(2+1)=6", "bad reflection"),
        ("a=2\nb=1\nc?b\nc=2*(a+b)=2*(2+1)=6", "bad reflection"),
        ("a=2\nb=1\nc=2*(a+b)=2*(2+1)=6\nc?b", "bad reflection"),
        ("a=2\nb=1\nc?\nc=2*(a+b)=2*(2+1)=6", "bad retry"),
        ("a=2\na?\nb=1\nc=2*(a+b)=2*(2+1)=6", "bad retry"),
        ("a=2\nb=1\nd?\nc=2*(a+b)=2*(2+1)=6", "unreadable"),
        ("a=2\nb=1\nc(3*(a+b))=2*(a+b)=2*(2+1)=6", "bad analysis"),
        ("a=2\nb=1\nc(2*(a+b)=2*(a+b)=2*(2+1)=6", "unreadable"),
        ("a=2\nb=1\nc(2*(a+b))?\nc=2*(a+b)=2*(2+1)=6", "unreadable"),
        ("a=2\nb=1\nc=2*(a+b)=2*(2+1)=6\nc=2*(a+b)=2*(2+1)=6", "solved twice"),
    ],
)
def test_checker_tells_them_apart_in_symbols_too(steps, error):
    check = check_solution("c=2*(a+b)\na=2\nb=1\nc?", f"<think>\n{steps}\n</think>\n\\boxed{{6}}")
    assert check.correct == (error is None), check.errors
    assert error is None or any(error in one for one in check.errors), check.errors


def test_what_no_sentence_says_cannot_be_said_once_more():
    question = "The number of each Sloop's Oak Crate equals 6.\nHow many Crate does each Sloop have?"
    leaf = "The number of each Sloop's Oak Crate is 6. Let it be a. So a = 6."
    begin = "Next, let c represent the number of each Sloop's Crate."
    assert check_solution(question, natural([leaf, f"{begin} Then c = a = 6."])).correct
    said = f"{begin} We know that it equals each Sloop's Oak Crate. Then c = a = 6."
    check = check_solution(question, natural([leaf, said]))
    assert [error.split(": ")[1] for error in check.errors] == ["bad analysis"]


def test_checker_reads_the_retries_of_meta():
    seen = 0
    for record in vectors("igsm_fb_samples")[:30]:
        steps = re.split(r"(?<=\.) (?=Define )", record["solution"].strip())
        if len(steps) < 3:
            continue
        last, first = (re.match(r"Define (.+?) as ", step)[1] for step in (steps[-1], steps[0]))
        for place, name, right in ((1, last, True), (len(steps) - 1, first, False), (0, "Nobody's Nothing", False)):
            told = " " + " ".join([*steps[:place], f"Define {name} as BACK.", *steps[place:]])
            check = check_solution(record["question"], told, categories_of(record))
            assert check.correct == right and check.retries == (name != "Nobody's Nothing"), check.errors
        seen += 1
    assert seen > 20


@pytest.mark.parametrize("changed", [lambda text: text.replace("?", "??", 1), lambda text: text.replace("(", "((", 1)])
def test_nonsense_in_a_symbolic_behavior_is_unreadable(changed):
    [p] = [p for p in problems(30, ops=(6, 8), style="symbolic", modulus=23, reflection=0.9, analysis=1.0, seed=2)
           if "?" in p.solution][:1]  # fmt: skip
    assert check_solution(p.question, p.solution, modulus=23).correct
    check = check_solution(p.question, changed(p.solution), modulus=23)
    assert not check.correct and any("unreadable" in error or "form" in error for error in check.errors)


# tokenizers, settings, speed


def test_behaviors_need_no_new_token_but_back():
    for style, modulus in (("natural", None), ("symbolic", 23)):
        plain_one, with_back = tokenizer(style, modulus=modulus), tokenizer(style, modulus=modulus, retry=True)
        assert set(plain_one.get_vocab().items()) <= set(with_back.get_vocab().items())
        assert len(with_back) - len(plain_one) == (style == "natural")
        for p in problems(60, ops=(6, 12), style=style, modulus=modulus, seed=1):
            for name, how in WAYS.items():
                tok = with_back if how.get("retry") else plain_one
                told = retell(p, **how)
                ids = tok.encode(told.question + told.solution, add_special_tokens=False)
                assert tok.unk_token_id not in ids, name
                assert tok.decode(ids) == told.question + told.solution


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (dict(reflection=1.5), "reflection must be a chance from 0 to 1, got 1.5"),
        (dict(analysis=-0.1), 'analysis must be a chance from 0 to 1 or "table"'),
        (dict(analysis="often"), "got 'often'"),
        (dict(retry=1.0), "retry must be a chance from 0 to below 1, got 1.0"),
        (dict(question_variant=-1), "variants are numbered from 0"),
        (dict(style="define", reflection=0.1), "the style 'define' has no words for"),
    ],
)
def test_settings_that_make_no_sense_are_named(wrong, complaint):
    with pytest.raises(ValueError, match=complaint):
        generate(1, **wrong)


def test_the_highest_chances_come_to_an_end():
    for p in problems(20, ops=(10, 15), reflection=1.0, analysis=1.0, retry=0.9, seed=1):
        assert check_solution(p.question, p.solution, p.categories).correct


def test_all_arms_of_a_problem_take_a_few_milliseconds():
    ways = [WAYS[name] for name in ("vanilla", "bridge", "subgoal", "reflection", "analysis", "retry")]
    ways += [dict(question_variant=i) for i in range(4)] + [dict(solution_variant=i) for i in range(4)]
    start = time.process_time()
    for p in problems(60, ops=(15, 20), split="train", seed=9):
        for how in ways:
            row(retell(p, **how), "train")
    rate = 60 / (time.process_time() - start)
    assert rate > 100, f"{rate:.0f} problems a second"  # docs/igsm.md: on an idle core


# the command


def test_command_tells_with_behaviors_and_draws(tmp_path, capsys):
    out = tmp_path / "new" / "bridge.jsonl"  # its folder is made
    words = "--n 5 --ops 6 9 --subgoals --reflection 0.2 --analysis table --retry 0.1 --solution_variant 1 --start 3"
    assert main([*words.split(), "--out", str(out)]) == 0
    how = dict(subgoals=True, reflection=0.2, analysis="table", retry=0.1, solution_variant=1, start=3)
    assert read_rows(out) == [row(p, "all") for p in generate(5, ops=(6, 9), **how)]
    capsys.readouterr()
    for name, style in (("natural.svg", "natural"), ("symbolic.png", "symbolic")):
        assert main(["--ops", "4", "6", "--style", style, "--draw", str(tmp_path / name)]) == 0
        [p] = generate(1, ops=(4, 6), style=style)
        assert p.question in capsys.readouterr().out
    text = (tmp_path / "natural.svg").read_text()
    assert all(node.name.removeprefix("each ") in text for node in p.nodes)
    [p] = generate(1, ops=(4, 6))
    told = [f"= {node.value}   [{node.ops} op{'s' * (node.ops > 1)}]" for node in p.necessary]
    assert sorted(re.findall(r"= -?\d+   \[.*?\]", text)) == sorted(told) and f": {p.ops} operations" in text
    assert (tmp_path / "symbolic.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"new", "natural.svg", "symbolic.png"}


@pytest.mark.filterwarnings("error")
def test_the_picture_of_a_single_operation_has_room_for_its_titles(tmp_path):
    assert main(["--ops", "1", "1", "--max_params", "1", "--draw", str(tmp_path / "a.svg")]) == 0
    text = (tmp_path / "a.svg").read_text()
    assert int(re.search(r'width="(\d+)', text)[1]) > 500 and ": 1 operation -->" in text


def test_a_picture_is_the_same_in_another_process(tmp_path):
    words = ["--ops", "4", "4", "--draw"]
    run_script("-m", "igsm", *words, tmp_path / "a.svg")
    assert main([*words, str(tmp_path / "b.svg")]) == 0
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "b.svg").read_text()
