"""igsm: the generator, the solver that reads only text, the checker of every step, tokenizers, the command.

The vectors are problems of the two published generators (BRIDGE's and Meta's) with right, corrupted and
malformed solutions."""

import hashlib
import random
import re
import subprocess
import sys
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.rows import IGSM
from igsm import check_solution, corrupt, generate, problems, retell, solve, tokenizer
from igsm.__main__ import main
from igsm.graph import Node
from igsm.solver import Question, canonical, evaluate, parse_expression
from igsm.text import STYLES, formula_text, worked
from igsm.tokens import SYSTEM_PROMPT
from igsm.vocabulary import CATEGORIES, WORLDS
from tests.conftest import ROOT, read_rows, vectors

DIFFICULTIES = [(4, 8), (10, 15), (15, 20)]


def categories_of(record):
    return {layer["category"]: layer["items"] for layer in record["layers"]}


SAMPLES = vectors("igsm_samples")
SAMPLE_CATEGORIES = {record["id"]: categories_of(record) for record in SAMPLES}


# vocabulary


def test_names_are_distinct_and_none_breaks_a_sentence():
    names = [name for items in CATEGORIES.values() for name in items] + list(CATEGORIES)
    assert len(names) == len(set(names))
    for name in names:
        assert not any(mark in f"{name} " for mark in ("'s ", ".", ",", " and ")), name
    for world in WORLDS.values():
        assert len(world) == 4
        assert all(len(group) >= 4 for groups in world.values() for group in groups.values())


# solver


def test_solver_is_right_on_every_question_of_bridge():
    for record in SAMPLES:
        for question in [record["question"], *record["pp_aug"]]:
            assert solve(question, categories_of(record)) == record["answer"]


def test_solver_does_not_mind_more_categories_and_another_order():
    everything = {}
    for record in SAMPLES:
        for category, items in categories_of(record).items():
            everything[category] = sorted({*everything.get(category, ()), *items}, reverse=True)
    for record in SAMPLES:
        assert solve(record["question"], everything) == record["answer"]


def test_solver_is_right_on_every_question_of_meta():
    for record in vectors("igsm_fb_samples"):
        assert solve(record["question"], categories_of(record), modulus=23) == record["answer"]


def test_solver_names_what_is_wrong_with_a_malformed_question():
    for record in vectors("igsm_malformed"):
        its_own = categories_of(record) if "layers" in record else {"zoo": ["Kid's Animal Farm"]}
        for categories in (its_own, None):
            with pytest.raises(ValueError, match="cannot parse"):
                solve(record["question"], categories)
    record = vectors("igsm_malformed")[0]
    with pytest.raises(ValueError, match="'Kid' is not an item"):
        solve(record["question"], categories_of(record))


@pytest.mark.parametrize("modulus", [0, 1, -3, 23.0, "23"])
def test_solver_refuses_a_modulus_that_is_none(modulus):
    with pytest.raises(ValueError, match="modulus must be 2 or more"):
        solve("a=1\na?", modulus=modulus)


FIVE = "The number of each Sloop's Oak Crate equals 5."
ASK = "How many Oak Crate does each Sloop have?"


@pytest.mark.parametrize(
    "question, complaint",
    [
        ("", "cannot parse the sentence"),
        (FIVE, "0 questions"),
        (f"{FIVE}\n{ASK}\nHow many Crate does each Sloop have?", "2 questions"),
        (f"{FIVE}\nHow many Oak Crate does each Boat have?", "'Boat' is not an item"),
        (f"{FIVE}\nHow many Box does each Sloop have?", "'Box' is neither"),
        (f"{FIVE}\n{ASK.replace('Oak', 'Pine')}", "no sentence gives the number of each Sloop's Pine Crate"),
        (f"{FIVE}\nHow many Fruit does each Sloop have?", "how each Sloop comes to have any Fruit"),
        (f"{FIVE}\n{FIVE}\n{ASK}", "given twice"),
        ("The number of each Sloop's Crate equals 5.\nHow many Crate does each Sloop have?", "is a category"),
        (f"Each Sloop has 5.\n{FIVE}\n{ASK}", "cannot parse the sentence 'Each Sloop"),
        (FIVE.replace("5", "each Sloop's Oak Crate") + f"\n{ASK}", "depends on itself"),
        (FIVE.replace("5", "five") + f"\n{ASK}", "cannot parse 'five'"),
        (FIVE.replace("5", "the difference of each Ketch's Crate, each Dory's Crate and each Barge's Crate")
         + f"\n{ASK}", 'cannot parse "the difference'),
        ("a=b\nb=a\na?", "depends on itself"),
        ("a=b\na?", "no condition gives 'b'"),
        ("a=2\na=3\na?", "given twice"),
        ("a=2+\na?", "cannot parse the expression '2\\+'"),
        ("a=__import__\na?", "cannot parse the expression"),
        ("A=2\na?", "cannot parse the condition 'A=2'"),
    ],
)  # fmt: skip
def test_solver_names_what_cannot_be_parsed(question, complaint):
    with pytest.raises(ValueError, match=complaint):
        solve(question)


@pytest.mark.parametrize(
    "categories",
    [
        {"Ship": ["Sloop"], "Crate": ["Oak"], "Fruit": ["Oak", "Pear"]},
        {"Ship": ["Sloop"], "Crate": ["Oak", "Fruit"], "Fruit": ["Pear"]},
        {"Ship": ["Sloop", "Sloop's Oak"], "Crate": ["Oak", "Oak's Pear"], "Fruit": ["Pear"]},
    ],
)
def test_solver_refuses_names_that_can_be_read_in_two_ways(categories):
    question = "The number of each Sloop's Oak equals 3.\nThe number of each Sloop's Oak's Pear equals 4.\n"
    if "Sloop's Oak" not in categories["Ship"]:
        question = question.replace("Sloop's Oak's", "Oak's")
    for order in (categories, dict(reversed(categories.items()))):
        with pytest.raises(ValueError, match="cannot parse .*can be read in two ways"):
            solve(question + "How many Fruit does each Sloop have?", order)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from(STYLES))
def test_solver_raises_nothing_but_value_error(seed, cut, style):
    [problem] = generate(1, seed=seed, style=style)
    at = seed % len(problem.question)
    try:
        assert isinstance(solve(problem.question[:at] + problem.question[at + cut :]), int)
    except ValueError as error:
        assert str(error)


def numbers_and_texts():
    """(value, text) of arithmetic expressions, made together."""
    numbers = st.integers(-50, 50).map(lambda n: (n, str(n), 3))  # 3: binds tightest

    def combine(parts):
        def join(operator, left, right):
            level = 2 if operator == "*" else 1
            left_text = left[1] if left[2] >= level else f"({left[1]})"
            right_text = right[1] if right[2] > level else f"({right[1]})"
            value = {"+": left[0] + right[0], "-": left[0] - right[0], "*": left[0] * right[0]}[operator]
            return value, f"{left_text} {operator} {right_text}", level

        return st.builds(join, st.sampled_from("+-*"), parts, parts)

    return st.recursive(numbers, combine, max_leaves=12)


@given(numbers_and_texts())
def test_expressions_are_read_with_the_usual_precedence(made):
    value, text, _ = made
    assert evaluate(parse_expression(text), {}) == value
    assert evaluate(parse_expression(text.replace(" ", "")), {}) == value
    assert evaluate(parse_expression(text), {}, modulus=23) == value % 23


def test_canonical_forms_are_equal_for_reordered_sums_and_products_only():
    def form(text):
        return canonical(parse_expression(text))

    assert form("2 + (a + b * c)") == form("c * b + a + 2")
    assert form("a - b") != form("b - a")
    assert form("2 * (a + b)") != form("2 + (a + b)") != form("2 + a * b")


# checker, on the published solutions


def test_checker_accepts_every_right_solution_of_bridge_and_counts_its_behaviors():
    for record in SAMPLES:
        solutions = {key: record[key] for key in record if key.startswith("solution_")}
        solutions |= {f"rc_aug {i}": solution for i, solution in enumerate(record["rc_aug"])}
        for kind, solution in solutions.items():
            check = check_solution(record["question"], solution, categories_of(record))
            assert check.correct and check.answer_correct and not check.errors, (record["id"], kind, check.errors)
            if stats := record.get(kind.replace("solution", "stats")):
                counted = dict(steps=check.steps, solved=check.solved)
                assert counted | dict(reflections=check.reflections, analyses=check.analyses) == stats
                assert check.solved == len(record["necessary"]) + check.redundant
            if kind in ("solution_define", "solution_vanilla"):
                assert (check.reflections, check.analyses, check.redundant, check.remembered) == (0, 0, 0, 0)
            if kind in ("solution_subgoal_only", "solution_bridge"):
                # every intermediate result is written: a chain is longer wherever two operations remain
                assert check.subgoals >= sum(node["ops"] > 1 for node in record["necessary"])


REASONS = {
    "wrong_final": "wrong answer",
    "answer_only": "question not solved",
    "deleted_step": "parents unsolved",
    "order_swap": "parents unsolved",
    "false_reflection": "bad reflection",
    "arithmetic_slip": "arithmetic",
    "wrong_operator_in_formula": "wrong formula",
}


def test_checker_rejects_every_corrupted_solution_for_its_reason():
    kinds = Counter()
    for record in vectors("igsm_corrupt"):
        check = check_solution(record["question"], record["solution"], SAMPLE_CATEGORIES[record["id"]])
        assert check.correct == record["fully_correct"], (record["id"], record["kind"], check.errors)
        assert check.answer_correct == record["boxed_answer_correct"]
        if not check.correct:
            assert any(REASONS[record["kind"]] in error for error in check.errors), (record["kind"], check.errors)
        kinds[record["kind"]] += 1
    assert set(kinds) == {*REASONS, "unmodified"} and min(kinds.values()) >= 40


def test_checker_accepts_the_solutions_of_meta_and_rejects_changed_ones():
    for record in vectors("igsm_fb_samples"):
        question, solution, categories = record["question"], record["solution"], categories_of(record)
        check = check_solution(question, solution, categories)
        assert check.correct and check.answer_correct, (record["id"], check.errors)
        assert check_solution(question, solution, categories, modulus=23).correct
        wrong = f"{solution.rpartition(' = ')[0]} = {(record['answer'] + 1) % 23}."
        check = check_solution(question, wrong, categories)
        assert not check.correct and not check.answer_correct
        first, _, rest = solution.strip().partition(". Define ")
        if rest:
            assert not check_solution(question, " Define " + rest, categories).correct


def test_a_solution_of_meta_ends_with_what_is_asked_and_uses_its_helpers():
    question = "The number of each A's B equals 5. The number of each A's C equals 5. How many B does A have?"
    categories = {"As": ["A"], "Bs": ["B", "C"]}
    b, c = "Define A's B as b; so b = 5.", "Define A's C as c; so c = 5."
    helper = "Define A's B as b; r = c + 1 = 5 + 1 = 6; so b = 5."
    cases = [([c, b], None), ([b, c], "wrong answer: the last step is of"), ([c, helper], "r of \"A's B\" not used")]
    for steps, error in cases:
        check = check_solution(question, " ".join(steps), categories)
        assert check.correct == (error is None) and check.answer_correct
        assert error is None or error in check.errors[0]


def test_a_solution_of_meta_that_repeats_itself_is_rejected_at_once():
    record = next(record for record in vectors("igsm_fb_samples") if "; r = " in record["solution"])
    wrong = re.sub("(; r = [^;]*; )", r"\1" + "r = r + r = 13 + 13 = 3; " * 40, record["solution"], count=1)
    start = time.process_time()
    check = check_solution(record["question"], wrong, categories_of(record))
    assert not check.correct and time.process_time() - start < 1


# generator


@pytest.mark.parametrize("ops", DIFFICULTIES)
@pytest.mark.parametrize("style", STYLES)
def test_own_problems_are_solved_from_text_and_their_solutions_accepted(ops, style):
    for modulus, subgoals in ((None, True), (23, False)):
        for p in problems(150, ops=ops, style=style, modulus=modulus, subgoals=subgoals, seed=1):
            assert solve(p.question, modulus=modulus) == p.answer
            check = check_solution(p.question, p.solution, p.categories, modulus=modulus)
            assert check.correct and check.answer_correct, check.errors
            assert check.steps == check.solved == p.num_necessary and not check.redundant
            long_ones = sum(len(node.parents) + (node.const is not None) > 2 for node in p.necessary)
            assert check.subgoals == (long_ones if subgoals else 0)


def test_a_problem_has_exactly_the_operations_asked_for_and_nothing_beyond_the_bound():
    zeros = 0
    everything = [p for ops in DIFFICULTIES for p in problems(1000, ops=ops, seed=2, subgoals=True)]
    for p in everything:
        assert sum(node.ops for node in p.necessary) == p.ops
        assert p.answer == p.necessary[-1].value
        for i, node in enumerate(p.nodes):
            assert node.const is None or 1 <= node.const <= 9  # never a zero, not even as a multiplier
            assert all(parent < i for parent in node.parents)
            assert abs(node.value) < 1000
        assert all(abs(int(number)) < 1000 for number in re.findall(r"-?\d+", p.solution))
        used = {parent for node in p.necessary for parent in node.parents}
        assert used == set(range(p.num_necessary - 1))  # every step is needed for the last
        zeros += p.answer == 0
    assert zeros / len(everything) < 0.08


def test_what_a_solution_does_not_need_has_the_value_that_the_text_gives_it():
    """Also where a narrow bound leaves it a number alone."""
    for p in problems(100, ops=(3, 8), seed=1, max_value=15, max_params=26, style="symbolic"):
        question = Question(p.question)
        assert [question.value(letter) for letter in p.letters] == [node.value for node in p.nodes]


def test_zero_is_no_shortcut_with_a_modulus_either():
    for ops in DIFFICULTIES:
        answers = Counter(p.answer for p in problems(1000, ops=ops, modulus=23))
        assert set(answers) == set(range(23)) and answers[0] < 95  # 4.3 % by chance, some 6.5 % by products


def skeleton(p):
    """A symbolic solution without names and numbers."""
    place = {}
    lines = p.solution.split("\n")[1:-2]
    for line in lines:
        place[line.split("=")[0]] = f"x{len(place)}"
    formulas = [line.split("=")[1] for line in lines]
    return ";".join(re.sub("[a-z]+", lambda m: place[m[0]], re.sub(r"\d+", "#", formula)) for formula in formulas)


def test_no_template_is_in_both_splits():
    for ops, n in (((1, 4), 700), ((4, 8), 700), ((15, 20), 70)):
        train = generate(n, ops=ops, split="train", style="symbolic")
        test = generate(n // 2, ops=ops, split="test", style="symbolic", seed=1)
        assert not {p.template for p in train} & {p.template for p in test}
        others = [retell(p, solution_variant=variant) for p in train for variant in (1, 2, 3)]
        assert not {skeleton(p) for p in [*train, *others]} & {skeleton(p) for p in test}
        both = generate(n // 2, ops=ops)
        assert {p.template for p in both} & {p.template for p in train} or ops == (15, 20)
    assert {p.ops for p in generate(100, ops=(1, 4), split="train")} == {1, 2, 3, 4}
    assert {p.ops for p in generate(100, ops=(2, 4), split="test")} == {2, 3, 4}


def test_structure_and_values_depend_on_seed_and_index_only():
    first = generate(5, seed=3)
    assert generate(10, seed=3)[:5] == first
    assert generate(2, seed=3, start=3) == first[3:]
    assert generate(5, seed=4) != first
    for style in STYLES:
        for subgoals in (False, True):
            for p, same in zip(generate(5, seed=3, style=style, subgoals=subgoals), first):
                assert (p.nodes, p.num_necessary, p.template) == (same.nodes, same.num_necessary, same.template)
                if style != "symbolic":
                    assert p.question == same.question


def test_the_same_seed_gives_the_same_text_in_another_process():
    code = "import igsm; print(*(p.question + p.solution for p in igsm.generate(5, ops=(4, 20), seed=9)))"
    texts = set()
    for hash_seed in "01":
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
        texts.add(done.stdout)
    assert len(texts) == 1


def test_a_seed_names_the_same_data_forever():
    """Change this on purpose only: data sets, base models and results refer to seeds."""
    texts = [p.question + p.solution for style in STYLES for p in problems(50, ops=(2, 20), seed=0, style=style)]
    texts += [p.question + p.solution for p in problems(50, modulus=23, max_params=8, split="test", seed=1)]
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    assert digest.startswith("d736a260ff20bb52")


@pytest.mark.parametrize("max_params", range(1, 13))
def test_any_max_params_works(max_params):
    for p in problems(40, ops=(1, 2), max_params=max_params, modulus=23):
        assert sum(not node.abstract for node in p.nodes) <= max_params
        assert solve(p.question, modulus=23) == p.answer


def test_many_params_get_names_of_two_characters():
    for style in STYLES:
        [p] = generate(1, ops=(2, 4), max_params=48, style=style, seed=1, start=889)
        assert len(p.nodes) > 52  # one in 2,000
        assert re.search(r"\n[a-z]{2}=" if style == "symbolic" else r"So [a-zA-Z]\d = ", p.solution)
        assert check_solution(p.question, p.solution).correct and solve(p.question) == p.answer
        assert tokenizer(style).unk_token_id not in tokenizer(style).encode(p.question + p.solution)


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        (dict(ops=(0, 3)), "ops must be"),
        (dict(ops=(5, 3)), "ops must be"),
        (dict(style="latin"), "style must be"),
        (dict(split="dev"), "split must be"),
        (dict(modulus=1), "modulus must be"),
        (dict(max_params=0), "max_params must be"),
        (dict(max_literal=0), "max_literal must be"),
        (dict(max_literal=1000), "max_literal must be"),
        (dict(max_literal=7, modulus=7), "max_literal must be at least 1 and below modulus"),
        (dict(start=-1), "must not be negative"),
        (dict(ops=(30, 30), max_params=3), "no problem of 30 to 30 operations was found with max_params=3"),
        (dict(ops=(1, 1), split="test"), "no problem of 1 to 1 operations"),  # "equals 5" is one template, in train
    ],
)
def test_settings_that_cannot_be_met_are_named(wrong, complaint):
    with pytest.raises(ValueError, match=complaint):
        generate(3, **wrong)


def test_subgoals_write_one_operator_at_a_time():
    def node(value, const=None, const_op="", sign="+", terms=()):
        return Node("A", "B", False, const, const_op, sign, terms, value)

    def chain(this, numbers, modulus=None):
        nodes = [node(number, const=number) for number in numbers]
        values = [str(number) for number in numbers]
        return " = ".join([formula_text(this, "abcd"), *worked(this, nodes, values, True, modulus, " ")])

    this = node(25, 7, "+", "+", ((0,), (1,), (2,)))
    assert chain(this, [0, 9, 9]) == "7 + (a + b + c) = 7 + (0 + 9 + 9) = 7 + (9 + 9) = 7 + 18 = 25"
    this = node(25, 5, "*", "-", ((0,), (1,)))
    assert chain(this, [2, -3]) == "5 * (a - b) = 5 * (2 - -3) = 5 * 5 = 25"
    this = node(26, terms=((0, 1), (2, 3)))
    assert chain(this, [2, 3, 4, 5]) == "a * b + c * d = 2 * 3 + 4 * 5 = 6 + 4 * 5 = 6 + 20 = 26"
    this = node(3, terms=((0, 1), (2, 3)))
    assert chain(this, [2, 3, 4, 5], 23) == "a * b + c * d = 2 * 3 + 4 * 5 = 6 + 4 * 5 = 6 + 20 = 3"
    assert chain(node(-4, terms=((0,),)), [-4]) == "a = -4"


def test_a_symbolic_solution_is_a_chain_a_line_and_a_natural_one_is_sentences_both_with_a_box():
    [p] = generate(1, style="symbolic", modulus=23, max_params=8, seed=12)
    *conditions, asked = p.question.split("\n")
    assert all(re.fullmatch(r"[a-z]=[a-z0-9+*()-]+", line) for line in conditions)
    assert re.fullmatch(r"[a-z]\?", asked)
    assert re.fullmatch(r"<think>\n([a-z](=[a-z0-9+*()-]+)+\n)+</think>\n\\boxed\{\d+\}", p.solution)
    assert p.solution.endswith(f"\\boxed{{{p.answer}}}")
    [p] = generate(1, style="natural")
    assert p.solution.startswith("<think>\nLet's compute the answer step by step.\n- ")
    assert p.solution.endswith(f"</think>\n<answer>\nThe final answer is \\boxed{{{p.answer}}}.\n</answer>")


def test_a_thousand_problems_take_about_a_second():
    start = time.process_time()
    generate(300, ops=(15, 20), split="train")
    rate = 300 / (time.process_time() - start)
    assert rate > 500, f"{rate:.0f} problems a second"  # 2,600 on the machine where it was written


# checker, on our own solutions


@pytest.mark.parametrize("style", STYLES)
def test_every_number_of_a_solution_matters(style):
    for p in problems(6, ops=(4, 10), style=style, subgoals=True, seed=5):
        for number in re.finditer(r"\d+", p.solution):
            other = p.solution[: number.start()] + str(int(number[0]) + 1) + p.solution[number.end() :]
            assert not check_solution(p.question, other).correct, number


@pytest.mark.parametrize("style", STYLES)
def test_every_letter_name_and_operator_of_a_solution_matters(style):
    rng = random.Random(0)
    word = r"\b[a-zA-Z]\b(?!')" if style != "symbolic" else r"\b[a-z]\b(?![^=]*\})"
    for p in problems(6, ops=(4, 10), style=style, seed=6):
        letters = list(re.finditer(word, p.solution))
        used = sorted({match[0] for match in letters})
        for match in letters:
            other = rng.choice([letter for letter in used if letter != match[0]] or ["Q"])
            changed = p.solution[: match.start()] + other + p.solution[match.end() :]
            assert not check_solution(p.question, changed).correct, changed
        for match in re.finditer(r"(?<=[\w)]) ?[-+*] ?(?=[\w(])", p.solution):
            other = match[0].replace("+", "!").replace("*", "+").replace("-", "*").replace("!", "-")
            changed = p.solution[: match.start()] + other + p.solution[match.end() :]
            assert not check_solution(p.question, changed).correct, changed
        if style != "symbolic":
            names = sorted({node.name for node in p.nodes})
            for match in re.finditer("|".join(names), p.solution):
                other = rng.choice([name for name in names if name != match[0]])
                changed = p.solution[: match.start()] + other + p.solution[match.end() :]
                assert not check_solution(p.question, changed).correct, changed


@pytest.mark.parametrize("style", STYLES)
def test_every_step_matters_and_its_place_too(style):
    for p in problems(10, ops=(4, 10), style=style, seed=7):
        lines = p.solution.split("\n")
        first = 1 if style == "symbolic" else 2
        steps = range(first, first + p.num_necessary)
        for i in steps:
            assert not check_solution(p.question, "\n".join(lines[:i] + lines[i + 1 :])).correct
            assert not check_solution(p.question, "\n".join(lines[:i] + [lines[i]] + lines[i:])).correct
        moved = [*lines[:first], lines[steps[-1]], *lines[first : steps[-1]], *lines[steps[-1] + 1 :]]
        assert not check_solution(p.question, "\n".join(moved)).correct or p.num_necessary == 1


def test_a_step_that_is_not_needed_is_counted_whether_or_not_the_others_are_complete():
    check = check_solution("a=5\nb=7\nc=a+1\nc?", "<think>\na=5\nb=7\n</think>\n\\boxed{6}")
    assert (check.solved, check.redundant, check.correct) == (2, 1, False)


def test_a_completion_without_the_prompts_think_tag_is_as_good():
    for style in STYLES:
        for p in problems(3, style=style):
            assert check_solution(p.question, p.solution.removeprefix("<think>\n")).correct
            assert not check_solution(p.question, p.solution[: -len("</answer>") - 5]).correct


@pytest.mark.parametrize("box, right", [("{}", True), (" {}", False), ("0{}", False), ("{}.0", False), ("", False)])
def test_answer_correct_is_what_a_reward_for_the_first_box_says(box, right):
    [p] = generate(1, style="natural")
    said = f"I guess \\boxed{{{box.format(p.answer)}}}, not \\boxed{{{p.answer}}}"
    assert check_solution(p.question, said).answer_correct == right


def test_a_box_that_stays_open_holds_no_answer():
    for style in STYLES:
        [p] = generate(1, style=style)
        assert not check_solution(p.question, p.solution.rpartition("}")[0]).answer_correct
        assert not check_solution(p.question, f"\\boxed{{{p.answer}").answer_correct


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12), st.text(max_size=12), st.sampled_from(STYLES))
def test_checker_never_raises_for_a_solution(seed, cut, insert, style):
    [p] = generate(1, seed=seed % 50, style=style)
    at = seed % len(p.solution)
    changed = p.solution[:at] + insert + p.solution[at + cut :]
    check = check_solution(p.question, changed)
    assert check.correct == (not check.errors)


def test_checker_is_quick_with_endless_nonsense():
    [p] = generate(1, style="natural")
    [symbolic] = generate(1, style="symbolic")
    step = "- Next, let v represent the number of each "
    start = time.process_time()
    texts = ["\\boxed{", "(", "-", "1+", "a=", "=", "9" * 9, "\n", " as a. So a = ", "each A's ", step, step + "\n"]
    for nonsense in texts:
        long = nonsense * (200_000 // len(nonsense))
        places = [(p.question, "{}"), (p.question, step + "A's B. Then v = {}."), (symbolic.question, "a={}\n")]
        for question, around in places:
            check = check_solution(question, around.format(long))
            assert not check.correct and check.errors
    assert time.process_time() - start < 20


@pytest.mark.parametrize("style", STYLES)
def test_without_shuffle_the_conditions_stand_in_the_solutions_order(style):
    settings = dict(ops=(3, 8), seed=3, style=style, max_params=8)
    for plain, ordered in zip(problems(40, **settings), problems(40, **settings, shuffle=False), strict=True):
        assert sorted(plain.question.split("\n")) == sorted(ordered.question.split("\n"))
        assert plain.solution == ordered.solution
        assert solve(ordered.question) == ordered.answer
        if style == "symbolic":
            left_sides = [line.split("=")[0] for line in ordered.question.split("\n")]
            solved = [line.split("=")[0] for line in ordered.solution.split("\n")[1:-2]]
            assert [name for name in left_sides if name in solved] == solved


# tokenizers


@pytest.mark.parametrize("style", STYLES)
def test_decode_of_encode_is_the_text(style):
    tok = tokenizer(style)
    texts = [SYSTEM_PROMPT] if style != "symbolic" else []
    for ops, modulus in (((1, 6), 23), ((15, 20), None)):
        for p in problems(150, ops=ops, style=style, modulus=modulus, subgoals=True):
            texts += [p.question, p.solution]
    for text in texts:
        ids = tok.encode(text, add_special_tokens=False)
        assert tok.decode(ids) == text == tok.decode(ids, skip_special_tokens=True)
        assert tok.unk_token_id not in ids
    assert len({tok.pad_token_id, tok.eos_token_id, tok.unk_token_id}) == 3
    assert sorted(tok.get_vocab().values()) == list(range(len(tok)))
    assert len(tok) == {"symbolic": 54, "natural": 512, "define": 512}[style]


def test_with_a_modulus_every_number_is_one_token():
    tok = tokenizer("symbolic", modulus=23)
    assert len(tok) == 54 + 13
    for p in problems(150, ops=(1, 6), style="symbolic", modulus=23):
        text = p.question + p.solution
        ids = tok.encode(text, add_special_tokens=False)
        assert tok.decode(ids) == text and tok.unk_token_id not in ids
        assert sum(tok.decode([i]).isdigit() for i in ids) == len(re.findall(r"\d+", text))


@pytest.mark.parametrize("style", STYLES)
def test_a_prompt_ends_where_the_solution_goes_on(style, tmp_path):
    from transformers import AutoTokenizer

    tokenizer(style).save_pretrained(tmp_path)
    for tok in (tokenizer(style), AutoTokenizer.from_pretrained(tmp_path)):
        [p] = generate(1, style=style)
        system, user = {"role": "system", "content": p.question}, {"role": "user", "content": p.question}
        assistant = {"role": "assistant", "content": p.solution}
        for messages in ([user], [system, user]):
            prompt = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert prompt.endswith("<|assistant|><think>\n")
            whole = tok.apply_chat_template([*messages, assistant], tokenize=False)
            assert whole == prompt + p.solution.removeprefix("<think>\n") + tok.eos_token
            ids = tok.encode(whole, add_special_tokens=False)
            rest = tok.encode(p.solution.removeprefix("<think>\n"), add_special_tokens=False)
            assert ids == tok.encode(prompt, add_special_tokens=False) + rest + [tok.eos_token_id]
            assert tok.decode(ids) == whole


# the command


def test_command_writes_the_columns_of_luffy(tmp_path, monkeypatch):
    out = tmp_path / "problems.jsonl"
    words = ["--n", "20", "--ops", "4", "8", "--seed", "0", "--split", "train", "--out"]
    assert main([*words, str(out)]) == 0
    rows = read_rows(out)
    assert len(rows) == 20
    for i, (row, p) in enumerate(zip(rows, generate(20, ops=(4, 8), seed=0, split="train"))):
        assert list(row) == ["data_source", "prompt", "target", "ability", "reward_model", "extra_info"]
        assert row["data_source"] == "igsm-natural" and row["ability"] == "math"
        assert row["prompt"] == [{"role": "user", "content": p.question}]
        assert row["target"] == [{"role": "assistant", "content": p.solution}]
        assert row["reward_model"] == {"style": "rule", "ground_truth": str(p.answer)}
        assert row["extra_info"].items() >= {"split": "train", "index": i, "ops": p.ops}.items()
    from pyarrow import parquet

    monkeypatch.setattr("igsm.__main__.ROWS_AT_ONCE", 8)
    assert main([*words, str(tmp_path / "problems.parquet")]) == 0
    assert parquet.read_table(tmp_path / "problems.parquet").to_pylist() == rows
    assert main(["--out", str(out), "--n", "2", "--style", "symbolic", "--modulus", "23", "--system_prompt"]) == 0
    rows = read_rows(out)
    assert len(rows) == 2 and rows[0]["prompt"][0]["content"] == SYSTEM_PROMPT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["problems.jsonl", "problems.parquet"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--n 5", "--out FILE or --draw FILE is needed"),
        ("--n 0 --out {}/a.jsonl", "--n must be 1 or more, got 0"),
        ("--out {}/a.csv", "--out must end in .jsonl or .parquet"),
        ("--draw {}/a.pdf", "--draw must end in .svg or .png"),
        ("--out=~/a.jsonl", "--out ~/a.jsonl: the shell has not replaced ~"),
        ("--ops 5 3 --out {}/a.jsonl", "ops must be (fewest, most)"),
        ("--ops 4 --out {}/a.jsonl", "--ops"),
        ("--style latin --out {}/a.jsonl", "--style"),
        ("--colour red --out {}/a.jsonl", "Unrecognized options: --colour"),
        ("--ops 30 30 --max_params 3 --out {}/a.parquet", "of 30 to 30 operations was found with max_params=3"),
        ("--analysis 2 --out {}/a.jsonl", "analysis must be a chance from 0 to 1"),
        ("--retry 1 --out {}/a.jsonl", "retry must be a chance"),
    ],
)
def test_bad_flags_give_a_message_exit_code_2_and_no_file(words, message, tmp_path, capsys):
    try:
        code = main([word.format(tmp_path) for word in words.split()])
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and message in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_the_old_file_as_it_was(tmp_path, monkeypatch):
    out = tmp_path / "problems.jsonl"
    assert main(["--n", "3", "--out", str(out)]) == 0
    before = out.read_text()

    def interrupted(n, **_):
        yield from generate(2)
        raise KeyboardInterrupt

    monkeypatch.setattr("igsm.__main__.problems", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["--n", "5", "--out", str(out)])
    assert out.read_text() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_help_explains_the_flags():
    shown = subprocess.run([sys.executable, "-m", "igsm", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    flags = ("--out", "--n", "--ops", "--seed", "--split", "--style", "--modulus", "--max_params", "--subgoals")
    assert not [flag for flag in flags if flag not in shown.stdout]


# What the documentation says of it.


def test_the_benchmark_counts_problems_and_behaviors():
    from benchmarks.igsm import STYLES, count_behaviors, count_problems, tables

    counted = count_problems(40, (4, 8))
    assert counted["solved"] == 40 and [counted[style] for style in STYLES] == [40, 40, 40]
    assert counted["templates_in_both_splits"] == 0 and counted["largest"] < 1000 and 0 <= counted["zero"] < 20
    told = count_behaviors(60, (10, 15))
    assert told["accepted"] == 1 and told["lines"] > told["vanilla_lines"] >= 10 - 1
    assert 0 < told["reflections"] < 3 and 0 < told["flat_analyses"] < told["analyses"] < told["lines"]
    text = tables({"problems": {"4-8": counted}, "behaviors": {"10-15": told}})
    assert "| 4-8 | 40 of 40 | 40 40 40 |" in text and "| accepted | 100 % |" in text


def test_a_corrupted_solution_has_the_right_form_and_a_wrong_answer():
    for problem in generate(200, ops=(1, 6), **IGSM):
        wrong = corrupt(problem.solution, random.Random(problem.index), 23)
        check = check_solution(problem.question, wrong, modulus=23)
        assert not check.correct and not check.answer_correct
        changed = [a != b for a, b in zip(wrong.split("\n"), problem.solution.split("\n"), strict=True)]
        assert sum(changed) == 2 and changed[-1]
