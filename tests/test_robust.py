"""common/robust.py: no wrong answer is accepted, few right ones are refused, and nothing takes long.

tests/vectors/robust_cases.jsonl.gz: answers from public reports on graders (`source` names each), then ours ("own").
robust_blind.jsonl.gz: 400 answers written without knowledge of the rule; no rule was made for them, so they say how
often it errs. Add none to them, and mend none of them alone.
"""

import random
import time

import pytest

from benchmarks.grading import CANARY, hostile_text
from common import robust
from common.verifiers import Verdict, grade
from tests.conftest import vectors

CASES, BLIND = vectors("robust_cases"), vectors("robust_blind")


@pytest.mark.parametrize("own", [False, True], ids=["reported", "own"])
def test_no_wrong_answer_is_accepted_and_97_percent_of_the_right_ones_are(own):
    cases = [case for case in CASES if (case["source"] == "own") == own]
    verdicts = grade([c["response"] for c in cases], [c["gold"] for c in cases], verifier="robust", timeout=20)
    accepted = [verdict.reward == 1 for verdict in verdicts]
    assert [case for case, yes in zip(cases, accepted, strict=True) if yes and not case["right"]] == []
    missed = [case for case, yes in zip(cases, accepted, strict=True) if case["right"] and not yes]
    assert len(missed) <= (5 if own else 3), missed  # of 1380 and of 230 right ones
    assert {verdict.status for verdict in verdicts} <= {"ok", "unparsable"}


def test_of_400_answers_written_blind_no_wrong_one_is_accepted_and_4_percent_of_the_right_ones_are_refused():
    verdicts = grade([c["response"] for c in BLIND], [c["gold"] for c in BLIND], verifier="robust", timeout=20)
    accepted = [case["right"] for case, verdict in zip(BLIND, verdicts, strict=True) if verdict.reward]
    assert (len(BLIND), sum(case["right"] for case in BLIND)) == (400, 200)
    assert (accepted.count(0), accepted.count(1)) == (0, 192)


def test_every_gold_of_the_validation_file_equals_itself_and_no_other_digit():
    golds = vectors("val_golds")[::4]
    rng, changed = random.Random(0), []
    for gold in golds:
        at = rng.choice([i for i, c in enumerate(gold) if c.isdigit()] or [None])
        changed.append("no" if at is None else gold[:at] + str((int(gold[at]) + 1) % 10) + gold[at + 1 :])
    answers = [rf"</think> It is \boxed{{{answer}}}." for answer in golds + changed]
    rewards = [v.reward for v in grade(answers, golds * 2, verifier="robust", timeout=20)]
    assert [g for g, reward in zip(golds, rewards, strict=False) if not reward] == []
    assert [c for c, reward in zip(changed, rewards[len(golds) :], strict=True) if reward] == []


def test_a_gold_that_cannot_be_read_is_named_as_the_fault():
    (verdict,) = grade([r"\boxed{5}"], [r"\int_0^1 \mathfrak{q}"], verifier="robust")
    assert verdict.status == "unparsable" and verdict.detail.startswith(r"gold unreadable: \int_0^1")
    assert grade([r"\boxed{\int_0^1 \mathfrak{q}}"], [r"\int_0^1 \mathfrak{q}"], verifier="robust")[0].reward == 1
    (verdict,) = grade([r"\boxed{\int_0^1 x}"], ["5"], verifier="robust")
    assert verdict.status == "unparsable" and verdict.detail.startswith("answer unreadable")


HUGE = [
    r"\boxed{9^{9^{9^9}}}", r"\boxed{" + "1" * 10**6 + "}", r"\boxed{" + "(" * 20_000 + "1" + ")" * 20_000 + "}",
    r"\boxed{factorial(10**8)}", r"\boxed{100000000!}", r"\boxed{\binom{10^8}{60116421}}", " " * 10**5 + r"\boxed{ }",
    r"\boxed{\lfloor 10^{6402}\pi\rfloor}", r"\boxed{" + "2^" * 90 + "2}", r"\boxed{" * 2000, r"\boxed{&}",
    "answer is " * 5000, r"\boxed{5\text{ km}^{99999999}}", "<answer>" * 8000, "答案" * 30_000, "\n" * 65_000 + "5",
    r"\boxed{5}" + "\n" * 60_000 + "wait", "answer is 7" + ". but it " * 8000 + "not", "answer to " * 6500,
    r"\boxed{5}. Wait, let me check" + " correct" * 8000 + " so", "if the " * 9000 + "answer is 42.",
    "He a" + " 1 a" * 16_000 + ".", r"put it in \boxed{" + "." * 60_000 + "x}",
    "answer is " + "a, " * 20_000 + ")", "is 5 a" + " b" * 30_000, "option a" + " b" * 30_000, "abc " * 16_000 + ".",
    r"\boxed{5}" + r"Answer: \frac12" * 4000, r"\[(" * 20_000, r"\boxed{5}" + "-e^" * 200,
]  # fmt: skip


def test_what_cannot_be_an_answer_is_refused_before_it_is_computed():
    rng = random.Random(0)
    texts = HUGE + [hostile_text(rng) for _ in range(150)]
    grade([r"\boxed{1}"], ["1"], verifier="robust", workers=1)
    start = time.monotonic()
    golds = ["42", "Z"] * len(texts)  # a number, and the label of a choice
    verdicts = grade(["</think>" + text for text in texts for _ in "12"], golds, verifier="robust", workers=1)
    assert {verdict.reward for verdict in verdicts} == {0.0}
    assert {verdict.status for verdict in verdicts} <= {"ok", "unparsable"}
    assert time.monotonic() - start < 60 and not CANARY.exists()


def test_robust_needs_no_tag_and_takes_the_last_box():
    assert grade([r"\boxed{7} no, \boxed{42}"], ["42"], verifier="robust") == [Verdict(1.0, "ok")]


def test_a_last_box_that_stays_open_or_a_doubt_is_no_answer():
    texts = [r"\boxed{42} so \boxed{", r"\boxed{41} or maybe \boxed{42}", "The answer is 42, but it could be 43."]
    assert [v.reward for v in grade(texts, ["42"] * 3, verifier="robust")] == [0, 0, 0]


def test_a_box_without_an_answer_in_a_sentence_repeats_the_request():
    echoes = [r"To put it within \boxed{}, add. The final answer is 3.", r"\boxed{3}, which puts it within \boxed{}.",
              r"The final answer within \boxed{} is 3.", r"\boxed{answer}: the answer is 3"]
    assert [v.reward for v in grade(echoes, ["3"] * 4, verifier="robust")] == [1] * 4
    choice = "My first box was \\boxed{A}.\nThe answer is B.\nI was told to put it into \\boxed{}."
    assert [v.reward for v in grade([choice] * 2, ["A", "B"], verifier="robust")] == [0, 1]
    assert grade(["\\boxed{3}\n\\boxed{}"], ["3"], verifier="robust")[0].reward == 0


def test_a_last_line_without_a_mark_counts_only_if_it_is_nothing_but_an_answer():
    alone = ["Thus x = 18.", "The total is 18", "**18**", "6 * 3 = 18"]
    sentences = ["She has 18 eggs left.", "She lost count at egg 18.", "He made 18.", "Suppose x = 18", "about 18"]
    verdicts = grade(["Add.\n" + line for line in alone + sentences], ["18"] * 9, verifier="robust")
    assert [v.reward for v in verdicts] == [1] * 4 + [0] * 5
    assert {v.status for v in verdicts[4:]} == {"unparsable"}


@pytest.mark.parametrize(
    "text, gold",
    [
        (r"$-\boxed{5}$", "-5"),
        (r"$\boxed{12}\pi$ cm", r"12\pi"),
        (r"$\frac{\boxed{3}}{4}$", "3/4"),
        (r"\boxed{5} million", "5000000"),
        (r"$(\boxed{1}, 2)$", "(1, 2)"),
        (r"- $x = \boxed{5}$ cm.", "5"),
    ],
)
def test_a_box_is_read_with_the_formula_that_it_is_a_part_of(text, gold):
    parts = ["5", "12", "3", "1"]
    assert [v.reward for v in grade([text] * 5, [gold, *parts], verifier="robust")] == [1, *(p == gold for p in parts)]


@pytest.mark.parametrize("mark", [r"The answer is \boxed{5}", "The answer is 5"])
def test_an_answer_that_is_taken_back_or_only_supposed_does_not_count(mark):
    after = [". Wait, that is wrong.", ", but it could be 6", ". Wait, I made a mistake: the answer is 6.", "?"]
    before = ["Suppose ", "It is wrong that ", "Let's check if ", "So maybe "]
    texts = [mark + words for words in after] + [words + mark for words in before]
    assert [v.reward for v in grade(texts, ["5"] * 8, verifier="robust")] == [0] * 8
    assert grade(texts[2:3], ["6"], verifier="robust")[0].reward == 1
    check = "2 + 3 = 5. Yes, that is correct."
    harmless = ["", f".\n\nLet me verify: {check}", f". Wait, let me double-check: {check}"]
    harmless += [". But this is not required here.", ". However, it should be noted that x > 0."]
    assert [v.reward for v in grade([mark + words for words in harmless], ["5"] * 5, verifier="robust")] == [1] * 5


def test_a_comma_before_three_digits_is_decimal_only_after_a_lone_zero():
    golds = ["10,000", "20,500", r"10{,}000", r"\$100,000", "0,125"]
    right, wrong = ["10000", "20500", "10000", "100,000", "0.125"], ["10", "20.5", "10", "100", "125"]
    answers = [rf"\boxed{{{answer}}}" for answer in right + wrong]
    assert [v.reward for v in grade(answers, golds * 2, verifier="robust")] == [1] * 5 + [0] * 5
    assert grade([r"\boxed{10,000}"], ["10"], verifier="robust")[0].reward == 0


def test_a_comma_in_braces_or_before_a_thin_space_marks_thousands_also_in_brackets():
    golds = ["(1{,}234, 5)", r"[0, 10,\!000]", "1{,}000, 2{,}000", "1,000, 2,000", "(1{,}234, 5)", "1{,}25"]
    answers = ["(1234, 5)", "[0, 10000]", "1000, 2000", "1000, 2000", "(1, 234, 5)", "1.25"]
    answers = [rf"\boxed{{{answer}}}" for answer in answers]
    assert [v.reward for v in grade(answers, golds, verifier="robust")] == [1, 1, 1, 1, 0, 1]


@pytest.mark.parametrize("unit", [r"\text{ sec}", " sec", r"\text{m}", r"\mathrm{m}", r"\text{m/s}", r"\text{m}^2",
                                  r"\,\frac{\text{m}}{\text{s}}", r"\text{ m/sec}"])  # fmt: skip
def test_a_unit_of_one_letter_or_called_like_a_function_is_a_unit(unit):
    texts = [rf"\boxed{{5{unit}}}", f"#### 5{unit}", r"\boxed{5}", rf"\boxed{{6{unit}}}"]
    golds = ["5", "5", f"5{unit}", "5"]
    assert [v.reward for v in grade(texts, golds, verifier="robust")] == [1, 1, 1, 0]
    assert not robust.readings(robust.spell("2 sec x"))[0].unit  # the secant


def test_an_escaped_dollar_behind_the_answer_is_no_part_of_a_word():
    texts = [r"The answer is \$18.", r"Answer: **\$18**", r"\boxed{18} each. So the answer is \$36."]
    assert [v.reward for v in grade(texts * 2, ["18"] * 3 + ["36"] * 3, verifier="robust")] == [1, 1, 0, 0, 0, 1]
    assert grade(["The answer is 1/2, .4 and 3."], ["1/2"], verifier="robust")[0].reward == 0


def test_the_ends_of_an_interval_are_not_all_of_it():
    golds = [r"1 \le x \le 2", r"x \in [1, 2]", r"1 < x < 2"]
    ends = [r"\boxed{x = 1 \text{ or } x = 2}", r"\boxed{x = 1, x = 2}", r"$x = \boxed{1}$ or $x = \boxed{2}$"]
    assert [v.reward for v in grade(ends * 3, sorted(golds * 3), verifier="robust")] == [0] * 9
    assert [v.reward for v in grade([r"\boxed{[1, 2]}"] * 3, golds, verifier="robust")] == [1, 1, 0]


def test_numbers_that_differ_in_their_sixtieth_digit_are_not_equal():
    golds = [r"\sqrt{10^{60}+1}", r"\pi + 10^{-60}", r"\sqrt{10^{60}}"]
    answers = [r"\boxed{10^{30}}", r"\boxed{\pi}", r"\boxed{10^{30}}"]
    assert [v.reward for v in grade(answers, golds, verifier="robust")] == [0, 0, 1]


def test_an_odd_root_of_a_negative_number_is_negative():
    golds = ["-2", "2", r"\sqrt[3]{-x}", r"\sqrt{-8}"]
    answers = [r"\sqrt[3]{-8}", r"\sqrt[3]{-8}", r"\sqrt[3]{-x}", r"-\sqrt{8}"]
    assert [v.reward for v in grade([rf"\boxed{{{a}}}" for a in answers], golds, verifier="robust")] == [1, 0, 1, 0]


def test_what_cannot_be_read_as_a_whole_is_not_taken_for_a_part_of_it():
    golds = ["(1, 2), (3, 4)", r"\frac{1}{0}"]
    answers = [r"\boxed{x = 1, x = 2, y = 3, y = 4}", r"\boxed{\frac{5}{0}}"]
    assert [v.status for v in grade(answers, golds, verifier="robust")] == ["unparsable"] * 2


def test_alternatives_of_two_names_are_no_solution():
    answers = [r"x=1 \text{ or } y=2", r"x<1 \text{ or } y<2", r"x=1, y=2 \text{ or } x=3, y=4", "x=1, y=2"]
    golds = ["(1, 2)", "x<1, y<2", "(1, 2), (3, 4)", "(1, 2)"]
    verdicts = grade([rf"\boxed{{{answer}}}" for answer in answers], golds, verifier="robust")
    assert [v.reward for v in verdicts] == [0, 0, 1, 1]


def test_one_answer_said_twice_is_one_and_two_equal_items_are_two():
    answers = [r"\boxed{0.5 \text{ or } \frac12}", r"\boxed{5, 5}", r"\boxed{5, 5}", r"\boxed{5 \text{ and } 5}"]
    golds = ["0.5", "5", "5, 5", "5"]
    assert [v.reward for v in grade(answers, golds, verifier="robust")] == [1, 0, 1, 0]


def test_an_equation_of_numbers_is_its_value_and_not_zero():
    texts = [r"\boxed{6 \times 7 = 42}", "Thus 6 * 7 = 42", "#### 6*7=42", r"\boxed{0}"]
    golds = ["42", "42", "42", "0"] + ["0", "0", "0", r"6 \times 7 = 42"]
    assert [v.reward for v in grade(texts * 2, golds, verifier="robust")] == [1] * 4 + [0] * 4


NAMED = [r"m+n", r"P(X=2)", r"P(A \cap B)", r"f^{-1}(2)", r"\frac{dy}{dx}", r"V_{\text{cone}}", r"\cos\theta", "|AB|",
         r"m\angle A", r"\text{Area of } ABC", r"\Delta H", "[ABC]", "f(g(2))"]  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_the_name_of_a_value_is_no_part_of_it(name):
    texts = [rf"\boxed{{{name} = 29}}", f"The answer is ${name} = 29$.", rf"\boxed{{{name} = 28}}"]
    texts += [rf"\boxed{{{name}}}"]
    assert [v.reward for v in grade(texts, ["29"] * 4, verifier="robust")] == [1, 1, 0, 0]


def test_an_equation_to_solve_is_not_its_right_side():
    texts = ["2x = 5", "x^2 = 5", "|x| = 5", r"\ln x = 5", "n + n = 5", "m + n < 5"]
    assert not any(v.reward for v in grade([rf"\boxed{{{t}}}" for t in texts], ["5"] * 6, verifier="robust"))
    assert not any(v.reward for v in grade([r"\boxed{5}"] * 2, ["x + y = 5", "2x + 3y = 5"], verifier="robust"))


SPELLED = [  # two spellings of an answer, and one that is wrong
    (r"\$12/\text{hour}", "12", "13/hour"), (r"\$12 \text{ per hour}", "12 dollars per hour", r"\$12 \text{ per day}"),
    (r"75 \text{ cents}", r"\$0.75", r"\$75"), (r"\text{Rs. } 500", "500", "Rs. 50"), ("₹500", "500", "₹5"),
    (r"12 \text{ meters squared}", "12 m^2", "12 m"), (r"5{\rm ~cm}", "5 cm", r"5{\rm ~m}"),
    (r"3\,\mathrm{\mu m}", "3 micrometers", "3 mm"), (r"10\,\text{k}\Omega", r"10^4\ \Omega", r"10\ \Omega"),
    (r"\text{Seven}", "7", "Six"), ("07:05 AM", "7:05 AM", "7:50 AM"), (r"\cos{60^\circ}", "1/2", r"\cos{30^\circ}"),
    ("60^{o}", "60 degrees", "6^{o}"), ("0.1(6)", "1/6", "0.6"), (r"0.\dot{3}\dot{6}", "4/11", r"0.3\dot{6}"),
    (r"{1 \over 3}", "1/3", r"{3 \over 1}"), ("(101)_2", "101_2", "(101)_3"), ("5!=120", "120", "5"),
    ("3∶4", "3:4", "4∶3"), (r"\lg 100", "2", r"\lg 10"), ("(-∞,1) U (2,∞)", "x<1 or x>2", "(-∞,1) U (3,∞)"),
    (r"x=2k\pi\ (k\in\mathbb{Z})", r"2n\pi, n\in\mathbb{Z}", r"x=k\pi\ (k\in\mathbb{Z})"),
    ("P(3, -2)", "(3, -2)", "P(-2, 3)"),
    (r"2k\pi, \text{ where } k \text{ is an integer}", r"2k\pi, k\in\mathbb{Z}", r"k\pi, k\in\mathbb{Z}"),
    (r"\begin{cases} x=3 \\ y=-2 \end{cases}", "(3, -2)", r"\begin{cases} x=-2 \\ y=3 \end{cases}"),
    (r"(r, \theta) = (2, \frac{\pi}{3})", r"(2, \pi/3)", r"(r, \theta) = (2, \frac{\pi}{6})"),
    (r"\text{the point } (3, -2)", "(3, -2)", "the point (3, 2)"), (r"\text{on Monday}", "Monday", "on Sunday"),
    (r"\color{blue}{x=3, y=-2}", "(3, -2)", r"\color{blue}{x=-2, y=3}"),
    ("(B)", "B. 42", "(C)"), (r"\text{(B) } 42", "B. 42", "(C) 42"), ("A, C", "(A), (C)", "A"),
    ("C:3", "C. 3", "C:4"), ("A: (D) 12", "(D) 12", "A: (D) 13"), ("A:B = 2:3", "2:3", "A:B = 3:2"),
    (r"\biggl(1, 2\biggr)", "(1, 2)", r"\biggl(2, 1\biggr)"), (r"5\ ", "5", r"6\ "),
    ("V_{1}:V_{2}=11:21", "11:21", "V_{1}:V_{2}=21:11"), (r"\frac{\sqrt{3}}2", r"\sqrt{3}/2", r"\frac{\sqrt{2}}3"),
    (r"3\,\mu m", "3 micrometers", "3 mm"), (r"120\text{ kWh}", "0.12 MWh", "12 MWh"),
    (r"400\text{ cc}", "0.4 L", "4 L"), (r"33.5\text{ percentage}", "0.335", "335"),
    (r"(1, 2) \text{ or } (3, 4)", "(3, 4), (1, 2)", "(3, 4), (2, 1)"), ("x=1或x=2", "1, 2", "1或3"),
    (r"\sinh^{-1} x", r"\ln(x+\sqrt{x^2+1})", r"\frac{1}{\sinh x}"), ("arctanh 0.5", r"\frac12\ln 3", "tanh 0.5"),
]  # fmt: skip


@pytest.mark.parametrize("answer, gold, wrong", SPELLED)
def test_an_answer_may_be_spelled_in_many_ways(answer, gold, wrong):
    texts = [rf"\boxed{{{answer}}}", rf"\boxed{{{gold}}}", rf"\boxed{{{wrong}}}", rf"\boxed{{{wrong}}}"]
    golds = [gold, answer, gold, answer] if answer not in ("(B)", "A, C") else [gold, gold, gold, gold]
    assert [v.reward for v in grade(texts, golds, verifier="robust")] == [1, 1, 0, 0]


def test_a_mark_is_found_in_latex_in_other_languages_and_before_a_time_of_day():
    texts = [r"\textbf{Answer:} $18$", "La réponse est donc 18.", "答え：18", "답: 18", "The answer is Rs. 18.",
             "So we get\n18 hours", "So\n18 km per hour", "So\n18 liters", "The answer to question 3: 18"]  # fmt: skip
    assert [v.reward for v in grade(texts * 2, ["18"] * 9 + ["17"] * 9, verifier="robust")] == [1] * 9 + [0] * 9
    texts = ["The answer to the question is 7:05 PM.", "The answer to the question is 3 : 4."]
    assert [v.reward for v in grade(texts * 2, ["7:05 PM", "3:4", "5", "4"], verifier="robust")] == [1, 1, 0, 0]
    text = "The answer is 5! = 120."
    assert [v.reward for v in grade([text] * 2, ["120", "5"], verifier="robust")] == [1, 0]
    unsure = ["So\n5 hours later", "So\n5 hours or more", "She walked for\n5 hours less", "So\n5 liters left"]
    assert not any(v.reward for v in grade(unsure, ["5"] * 4, verifier="robust"))


def test_a_label_that_was_taken_back_does_not_count_if_what_follows_is_no_label():
    texts = ["The answer is B. Wait, I made a mistake. The answer is AB.", r"The answer is B. Wait, no. \boxed{BC}"]
    assert not any(v.reward for v in grade(texts, ["B", "B"], verifier="robust"))


def test_a_relation_without_symbols_equals_no_other():
    pairs = [("2 < 3", "5 < 7"), ("total = 42", "total = 7"), ("1 = 2", "3 = 5"), ("x > 1, x < 2", "x > 1 or x < 2")]
    answers, golds = zip(*pairs, strict=True)
    assert not any(v.reward for v in grade([rf"\boxed{{{a}}}" for a in answers], golds, verifier="robust"))
    right = [r"\boxed{total = 42}", r"\boxed{2 < 3}"]
    assert [v.reward for v in grade(right, ["42", "2<3"], verifier="robust")] == [1, 1]


def test_an_alternative_in_brackets_a_date_and_what_is_called_wrong_are_no_answer():
    texts = ["The answer is 5 (or 6).", r"\boxed{5} (or 6)", r"\boxed{5 (or 6 apples)}", r"\boxed{5 January}",
             r"\boxed{5 \text{ doubled}}", "Answer: 5 (incorrect)", r"\boxed{5} (wrong)",
             r"\boxed{6} instead of \boxed{5}", r"\boxed{5}或6", r"\boxed{6}、\boxed{5}", r"\boxed{5}，不对，是6",
             r"\boxed{5}是错的"]  # fmt: skip
    assert not any(v.reward for v in grade(texts, ["5"] * len(texts), verifier="robust"))
    texts = ["The answer is 1/2 (or 0.5).", r"\boxed{1/2} (or 0.5)", r"\boxed{1/2 (or 0.5 hours)}",
             "The answer is 1/2 (or a half).", r"\boxed{1/2} instead of \boxed{5}"]  # fmt: skip
    assert all(v.reward for v in grade(texts, ["1/2"] * len(texts), verifier="robust"))


def test_digits_that_cancel_beyond_those_compared_equal_nothing():
    r"""\sqrt{10^{800}+1} - 10^{400} is about 5e-401: its digits cannot be known by computing 300."""
    tiny = r"\sqrt{10^{800}+1}-10^{400}"
    texts = [rf"\boxed{{{text}}}" for text in (tiny, tiny, tiny + "+5", rf"\{{5, {tiny}\}}")]
    assert not any(v.reward for v in grade(texts, ["7", "0", "5", "5, 6"], verifier="robust"))
    texts = [rf"\boxed{{{scale}\sqrt{{2}}+{scale}\sqrt{{3}}}}" for scale in ("", "10^{90}")]
    golds = [rf"{scale}\sqrt{{5+2\sqrt{{6}}}}" for scale in ("", "10^{90}")]
    assert all(v.reward for v in grade(texts, golds, verifier="robust"))


def test_what_is_nearly_equal_is_a_rounded_value_and_not_a_list_of_guesses():
    guesses = [("100.5≈" + "≈".join(map(str, range(96, 106))), "97"), ("41.9≈43", "43"), ("41.5≈41≈42", "42"),
               ("0.34≈0.35", "0.35"), ("10.1≈10.5≈11≈11.5", "11")]  # fmt: skip
    rounded = [("41.9≈42", "42"), (r"\pi/2≈1.5708≈1.57", r"\pi/2"), (r"\pi/2≈1.5708≈1.57", "1.57"), ("2/3≈0.66", "2/3"),
               ("1234.5≈1,235", "1235"), ("1234.5≈1200", "1200"), (r"\pi≈\frac{22}{7}", r"\pi"),
               (r"12345.678≈1.23\times 10^4", "12345.678")]  # fmt: skip
    answers, golds = zip(*guesses, *rounded, strict=True)
    verdicts = grade([rf"\boxed{{{answer}}}" for answer in answers], golds, verifier="robust")
    assert [v.reward for v in verdicts] == [0] * len(guesses) + [1] * len(rounded)


@pytest.mark.parametrize("mark", ["#### 5", "<answer>5</answer>"])
def test_an_answer_behind_another_mark_may_be_taken_back_too(mark):
    after = ["", "\nWait, let me check: 2 + 3 = 5. Correct.", "\nNote that x > 0.",
             "\nWait, that is wrong. It should be 6.", "\nHowever, this is not right."]  # fmt: skip
    assert [v.reward for v in grade([mark + words for words in after], ["5"] * 5, verifier="robust")] == [1, 1, 1, 0, 0]


def test_an_open_answer_tag_json_and_italics_are_marks():
    texts = ["<answer>18", "So\n<answer>\n18 eggs\n", "The answer is _18_.", '{"answer": "18"}',
             '```json\n{"steps": "6*3", "answer": 18}\n```']  # fmt: skip
    others = ["It goes into <answer> tags.\n18 eggs", '{"answer": "18 or 19"}', '{"answer": null}',
              'The answer is 18.\n{"answer": "19"}']  # fmt: skip
    verdicts = grade(texts + others, ["18"] * 9, verifier="robust")
    assert [v.reward for v in verdicts] == [1] * 5 + [0] * 4
    texts = ["<answer>1</answer> in <answer> tags", "The answer is $x_1$.", r"The answer is $\log_ {2} 8$."]
    assert [v.reward for v in grade(texts, ["1", "x_1", "3"], verifier="robust")] == [1, 1, 1]
