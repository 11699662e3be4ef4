"""eval.py: its numbers against brute-force enumeration, its benchmark rows, prompts and votes. No model is run."""

import itertools
import json
import math
import random
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from common.data import InputError
from common.report import disagreements, results_tables, table
from common.rows import make_examples
from common.run import read_records
from common.search import Candidate
from common.trainer import load_tokenizer
from eval import (
    TEMPLATES,
    Args,
    Question,
    best_answer,
    check_settings,
    chunks,
    count_votes,
    difficulty,
    majority_at_k,
    make_prompts,
    mean_and_errors,
    pass_at_k,
    read_questions,
    summarise,
    vote,
)
from tests.conftest import ROOT, write_rows
from tools.compare import Evaluation, bootstrap_interval, compare_rates, different_settings, summary_cells

# The numbers.


@pytest.mark.parametrize("n, right", [(n, c) for n in (1, 2, 5, 8) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_answer(n, right):
    answers = [i < right for i in range(n)]
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(answers, k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased_for_k_fresh_answers():
    p, n = 0.3, 6
    for k in (1, 2, 4, 6):
        expected = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(
    "right, wrong, blank",
    [(3, [2, 1], 0), (2, [2, 2, 2], 1), (1, [1, 1, 1, 1], 2), (4, [4], 0), (0, [3, 1], 2), (2, [], 5), (0, [], 3),
     (3, [3, 3, 1, 1], 0), (8, [], 0), (1, [5, 2], 0)],
)  # fmt: skip
def test_majority_at_k_is_the_share_of_k_subsets_whose_commonest_answer_is_right(right, wrong, blank):
    answers = ["right"] * right + [None] * blank + [f"wrong {i}" for i, w in enumerate(wrong) for _ in range(w)]
    for k in range(1, len(answers) + 1):
        wins = []
        for subset in itertools.combinations(answers, k):
            votes = Counter(a for a in subset if a is not None)
            first = [a for a, count in votes.items() if count == max(votes.values())]
            wins.append(first.count("right") / len(first) if first else 0)
        assert majority_at_k(right, wrong, blank, k) == pytest.approx(sum(wins) / len(wins), abs=1e-12)


def test_majority_at_k_of_many_answers_is_fast():
    assert 0 < majority_at_k(20, [20, 19, 18] + [1] * 51, 0, 64) < 1


def test_the_error_over_questions_squared_is_unbiased_over_all_draws_of_questions():
    population = [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0, 1.0, 1.0]]
    for size in (2, 3):
        drawn = [mean_and_errors(list(rows)) for rows in itertools.product(population, repeat=size)]
        means, squares = np.array([m for m, _, _ in drawn]), np.array([e**2 for _, e, _ in drawn])
        assert squares.mean() == pytest.approx(means.var(), abs=1e-12)


def test_the_sampling_error_squared_is_unbiased_over_all_answers_that_could_be_drawn():
    p, sizes = [0.2, 0.7, 1.0], [2, 3, 2]
    variance = expected = mean = 0.0
    outcomes = []
    for answers in itertools.product((0.0, 1.0), repeat=sum(sizes)):
        rows, at, weight = [], 0, 1.0
        for rate, size in zip(p, sizes, strict=True):
            rows.append(list(answers[at : at + size]))
            at += size
            weight *= math.prod(rate if x else 1 - rate for x in rows[-1])
        outcomes.append((weight, *mean_and_errors(rows)))
    mean = sum(w * m for w, m, _, _ in outcomes)
    variance = sum(w * (m - mean) ** 2 for w, m, _, _ in outcomes)
    expected = sum(w * e**2 for w, _, _, e in outcomes)
    assert mean == pytest.approx(sum(p) / 3) and expected == pytest.approx(variance, abs=1e-12)


def test_unknown_errors_are_none():
    assert mean_and_errors([[1.0], [0.0]])[2] is None and mean_and_errors([[1.0, 0.0]])[1] is None


def test_the_sampling_error_is_unknown_if_one_question_has_one_answer():
    mean, error, sampling_error = mean_and_errors([[1.0], [0.0, 1.0]])
    assert (mean, error, sampling_error) == (0.75, 0.25, None)


def test_bootstrap_interval_is_that_of_all_resamples():
    given = np.array([0.5, -0.25, 0.0, 1.0]), np.array([0.0, 0.5, -1.0])
    a, b = (x.mean() + (x - x.mean()) * (x.std(ddof=1) / x.std()) for x in given)  # the variance of a sample's mean
    every = [
        (np.mean(x) + np.mean(y)) / 2
        for x in itertools.product(a, repeat=4)
        for y in itertools.product(b, repeat=3)
    ]
    low, high = np.quantile(every, [0.025, 0.975])
    assert bootstrap_interval(given, draws=40_000) == pytest.approx((low, high), abs=0.03)
    assert bootstrap_interval(given) == bootstrap_interval(given)


def test_one_question_has_no_interval():
    rows = compare_rates({"b": np.array([[0.0], [0.5]]), "c": np.array([[0.0, 1.0], [0.5, 1.0]])}, ["one", "two"])
    assert [row["low"] is None for row in rows if row["run"] == "two"] == [True, False, True]  # b, c, average
    gains = [cells[-1] for cells in summary_cells(rows, ["one", "two"])[1:]]
    assert gains == ["+50.0", "+25.0 [-10.4, +60.4]", "+37.5"]


def test_a_paired_interval_is_narrow_where_runs_differ_by_a_constant():
    rates = {"b": np.array([[0.0, 1.0] * 50, [0.1, 1.1] * 50])}
    _, row, *_ = compare_rates(rates, ["one", "two"])
    assert row["difference"] == pytest.approx(0.1) == pytest.approx(row["low"]) == pytest.approx(row["high"])


def test_the_average_counts_benchmarks_once_whatever_their_size():
    rates = {"small": np.array([[1.0, 0.0], [1.0, 1.0]]), "large": np.zeros((2, 100))}
    rows = {(r["benchmark"], r["run"]): r for r in compare_rates(rates, ["a", "b"])}
    assert rows["average", "a"]["pass@1"] == 0.25 and rows["average", "b"]["difference"] == 0.25
    assert rows["average", "a"]["se"] == pytest.approx(rows["small", "a"]["se"] / 2)


def test_buckets_are_relifts_for_eight_base_answers():
    names = [difficulty(right / 8) for right in range(9)]
    assert names == ["hardest", "hard", "hard", "medium", "medium", "medium", "easy", "easy", "easy"]


# What answers vote for.


@pytest.mark.parametrize(
    "one, other",
    [
        (r"\boxed{1,000}", r"so \boxed{1000.0}"), (r"\boxed{\frac{1}{2}}", r"\boxed{0.5}"),
        (r"\boxed{\dfrac12}", "The answer is 1/2."), ("#### 72", "it is 72"), (r"\boxed{x + 1}", r"\boxed{x+1}"),
        ("hm </think> 7", r"3 </think> \boxed{7}"), (r"\boxed{50\%}", r"\boxed{50}"), ("The answer is B.", "#### B"),
        (r"\boxed{-.5}", r"\boxed{-0.50}"), ("I think so:\npositive.", "```\npositive\n```"),
    ],
)  # fmt: skip
def test_equal_answers_vote_alike(one, other):
    assert vote(one) == vote(other) is not None


def test_a_mixed_number_does_not_vote_as_an_improper_fraction():
    assert vote(r"\boxed{1\frac{1}{2}}") != vote(r"\boxed{\frac{11}{2}}") == "11/2"


@pytest.mark.parametrize("text", ["", "\n", "</think>", r"\boxed{}"])
def test_an_answer_that_says_nothing_does_not_vote(text):
    assert vote(text) is None


@pytest.mark.parametrize(
    "text", ["9" * 10**6, "answer is " * 10**5, "#### " * 10**5, r"\boxed{" * 10**5, r"\frac" * 10**5, "1," * 10**6]
)
def test_voting_ends_at_once_whatever_the_text(text):
    start = time.process_time()
    vote(text)
    assert time.process_time() - start < 1


def test_in_a_multiple_choice_wrong_answers_vote_for_their_label():
    texts = ("C", "B", "(B) dogs, 3 of them")
    answers = [dict(text=text, verdicts={"mcq": [float("C" in text), "ok"]}) for text in texts]
    assert count_votes(dict(gold="C", answers=answers), "mcq") == (1, [2], 0)
    assert vote("I choose B.", labels=True) == vote("The answer is (B) as 2 > 1.", labels=True) == "B"
    assert vote(r"\boxed{17}", labels=True) == "17"


def answer(right, text="x", status="ok", *, tokens=10, truncated=False, **others):
    verdicts = {"math": [float(right), status]} | {v: [float(r), "ok"] for v, r in others.items()}
    return {"text": text, "tokens": tokens, "truncated": truncated, "verdicts": verdicts}


def record(name, answers, benchmark="b", rows=1):
    return dict(id=name, benchmark=benchmark, rows=rows, question="?", gold="1", prompt="?", answers=answers)


def test_a_box_in_the_thought_does_not_vote():
    assert vote(r"maybe \boxed{7}?</think> The answer is 8.") == "8"


def test_a_long_text_votes_for_its_end():
    assert vote(r"\boxed{5} " + "so " * 20_000 + r"\boxed{7}") == "7"


def test_right_answers_vote_as_one_and_unparsable_ones_not_at_all():
    answers = [answer(1, r"\boxed{0.5}"), answer(1, "half"), answer(0, "3"), answer(0, r"\boxed{3}"), answer(0, "4")]
    answers += [answer(0, "17", "unparsable"), answer(0, "", "timeout")]
    assert count_votes(record("q", answers), "math") == (2, [1, 2], 1 + 1)


def test_results_have_the_contracts_keys_and_the_right_numbers():
    records = [
        record("p", [answer(1, full=1), answer(0, "5", full=1, truncated=True)], rows=2),
        record("q", [answer(0, "6", "unparsable", full=0), answer(0, "7", full=1, tokens=30)]),
        record("r", [answer(1, full=1), answer(1, full=1)], benchmark="c"),
    ]
    results = summarise(records, ("math", "full"))
    assert list(results) == ["b", "c", "average"] and results["average"] == pytest.approx((0.25 + 1) / 2)
    b = results["b"]
    assert (b["rows"], b["questions"], b["answers"]) == (3, 2, 4)
    assert (b["pass@1"], b["pass@2"], b["maj@2"]) == (0.25, 0.5, 0.25)  # a tie of 1 and 5 counts half
    assert (b["mean_tokens"], b["truncated"], b["no_answer"]) == (15, 0.25, 0.25)
    assert b["verifier"] == {"ok": 3, "unparsable": 1} and b["graders"] == {"math": 0.25, "full": 0.75}
    assert disagreements(records, ("math", "full"))[1:] == [["b", "wrong", "right", "2", "p"]]
    text = results_tables(results, records, Args(model="m", verifier=("math", "full")))
    lines = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (x.split("|") for x in text.splitlines())
             if len(cells) == 6}  # fmt: skip
    assert lines["pass@1"] == ["25.0", "100.0", "62.5"] and lines["pass@1_se"] == ["25.0", "", ""]
    assert lines["mean_tokens"] == ["15", "10", ""]
    assert lines["answers"] == ["4", "2", ""] and lines["graders full"] == ["75.0", "100.0", ""]
    assert text.endswith(table(disagreements(records, ("math", "full")))) and "agree on every answer" not in text
    assert "agree on every answer" in results_tables(results, records[2:], Args(model="m", verifier=("math", "full")))
    searched = results_tables(results, records, Args(model="m", verifier=("math",), search="beam", value="v", width=3))
    assert "beam of width 3 by v, temperature 0.6" in searched and "of width" not in text


def test_pass_at_k_goes_up_to_the_fewest_answers_of_a_question():
    records = [record("p", [answer(1)] * 12), record("q", [answer(0)] * 6)]
    assert [k for k in summarise(records, ("math",))["b"] if "@" in k and "_" not in k] == [
        "pass@1", "pass@2", "pass@4", "pass@6", "maj@2", "maj@4", "maj@6",
    ]  # fmt: skip


def test_accuracy_by_difficulty_counts_every_question_once():
    base = {name: record(name, [answer(i < right) for i in range(8)]) for name, right in dict(a=0, b=2, c=7).items()}
    records = [record(name, [answer(1), answer(name == "c")]) for name in "abcd"]
    found = summarise(records, ("math",), base)["b"]["by_difficulty"]
    assert list(found) == ["easy", "hard", "hardest", "not_in_base"]
    assert all(bucket["questions"] == 1 for bucket in found.values())
    assert found["easy"]["base"] == 7 / 8 and found["easy"]["pass@1"] == 1 and found["hardest"]["pass@1"] == 0.5


def test_every_run_is_measured_against_the_first():
    rates = {"a": np.array([[0.0, 0.5], [0.5, 1.0], [0.0, 0.75]]), "b": np.array([[0.5, 0.5], [0.5, 0.5], [1.0, 1.0]])}
    names = ["one", "two", "three"]
    rows = compare_rates(rates, names)
    assert [row["difference"] for row in rows] == [None, 0.5, 0.125, None, 0.0, 0.5, None, 0.25, 0.3125]
    cells = summary_cells(rows, names)
    assert cells[0][2:] == ["one", "two", "three", "two - one", "three - one"]
    assert [[text.split()[0] for text in line[5:]] for line in cells[1:]] == [
        ["+50.0", "+12.5"], ["+0.0", "+50.0"], ["+25.0", "+31.2"]
    ]  # fmt: skip


def test_a_setting_in_which_any_run_differs_is_shown():
    for model, shown in (("m", "weights of --model"), ("", "model")):  # one path with other weights, or other paths
        runs = [Evaluation(name, {"n": n, "model": model or name, "weights_digest": name, "seed": 0}, {})
                for name, n in (("a", 8), ("b", 4), ("c", 8))]  # fmt: skip
        rows = {row[0]: row[1:] for row in different_settings(runs, "math")}
        assert rows == {"": ["a", "b", "c"], "n": [8, 4, 8], shown: ["a", "b", "c"]}


def test_other_weights_under_one_name_and_other_prompts_are_shown_whatever_else_differs():
    search = {"search": "beam", "value": "v"}
    runs = [Evaluation(name, {"model": "m", "data": name, "weights_digest": weights, "questions_digest": name} | more,
                       {"q": {"answers": [], "prompt": prompt}})
            for name, weights, more, prompt in (("a", "1 ", {"search": "none", "value": ""}, "p"),
                                                ("b", "2 9", search, "other"))]  # fmt: skip
    rows = {row[0]: row[1:] for row in different_settings(runs, "math")}
    assert rows.keys() == {"", "prompts", "model", "data", "search", "value", "weights of --model"} - {"model"}
    assert rows["weights of --model"] == ["1", "2"]


def test_other_versions_of_a_grader_and_other_numbers_of_answers_are_shown():
    runs = [Evaluation(name, {}, {"q": {"answers": [{}] * n, "graded_by": {"math": version}}})
            for name, n, version in (("a", 2, "1"), ("b", 3, "2"))]  # fmt: skip
    assert different_settings(runs, "math") == [["", "a", "b"], ["answers", 2, 3], ["graded by", "1", "2"]]


# Benchmark rows.


def luffy_row(question, gold, source="aime"):
    system = {"role": "system", "content": "Think first."}
    prompt = [system, {"role": "user", "content": question}]
    return {"data_source": source, "prompt": prompt, "reward_model": {"ground_truth": gold, "style": "rule"},
            "extra_info": {"index": random.random()}}  # fmt: skip


def test_repeated_rows_are_one_question_as_in_the_published_layout(tmp_path):
    rows = [luffy_row(f"question {i % 30}", str(i % 30)) for i in range(960)]  # avg@32: the whole set 32 times
    rows += [luffy_row(f"question {i // 4}", str(i // 4), "amc") for i in range(332)]  # or each row 4 times
    rows += [luffy_row(f"question {i}", str(i), "math") for i in range(500)]
    questions = read_questions([write_rows(tmp_path / "valid.jsonl", rows)])
    count = Counter((q.benchmark, q.rows) for q in questions)
    assert count == {("aime", 32): 30, ("amc", 4): 83, ("math", 1): 500}
    make_prompts(questions, load_tokenizer(str(ROOT / "models/tiny")), Args(n=8))
    assert {(q.benchmark, q.n) for q in questions} == {("aime", 32), ("amc", 8), ("math", 8)}
    make_prompts(questions, load_tokenizer(str(ROOT / "models/tiny")), Args(n=8, temperature=0))
    assert {q.n for q in questions} == {1}


def test_the_same_words_with_another_gold_are_another_question(tmp_path):
    rows = [luffy_row("x", "1"), luffy_row("x", "2"), luffy_row("x", "1", "other")]
    assert len(read_questions([write_rows(tmp_path / "rows.jsonl", rows)])) == 3


def test_a_question_of_two_files_of_one_name_has_ids_that_no_path_or_order_changes(tmp_path):
    ids = []
    for folder, order in (("a", ("few", "all")), ("b", ("all", "few"))):
        (tmp_path / folder).mkdir()
        files = {name: write_rows(tmp_path / folder / name, [luffy_row(f"{i}", "1") for i in range(n)])
                 for name, n in (("few.jsonl", 2), ("all.jsonl", 5))}  # fmt: skip
        ids.append({q.id for q in read_questions([files[f"{name}.jsonl"] for name in order])})
    assert len(ids[0]) == 7 and ids[0] == ids[1]


def test_limit_takes_the_first_questions_of_each_benchmark_with_all_their_rows(tmp_path):
    rows = [luffy_row(f"{s}{i}", "1", s) for _ in range(3) for s in "ab" for i in range(5)]
    questions = read_questions([write_rows(tmp_path / "rows.jsonl", rows)], limit=2)
    assert [(q.text, q.rows) for q in questions] == [("a0", 3), ("a1", 3), ("b0", 3), ("b1", 3)]


# Prompts.

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{{ '<think>\n' }}"
)
HEAD = "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
PRIME = "Q?\n\nPresent the answer in LaTex format: \\boxed{Your answer}"
RENDERED = {
    "own": f"<|im_start|>system\nThink first.<|im_end|>\n<|im_start|>user\nQ?{TAIL}<think>\n",
    "no": "Q?",
    "qwen": f"{HEAD}<|im_start|>user\nQ?{TAIL}",
    "simplerl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nQ?\nPlease reason step "
    f"by step, and put your final answer within\\boxed{{{{}}}}.{TAIL}",
    "prime_sft": f"<|im_start|>user\n{PRIME}{TAIL}<think>\n",
    "oreo-gsm8k": "<|im_start|>system\nPlease reason step by step, and produce a final answer following 4 '#', like "
    f"'#### 0'<|im_end|>\n<|im_start|>user\nQ?{TAIL}<think>\n",
    "oreo-math": f"{HEAD}<|im_start|>user\nQ?{TAIL}<think>\n",
    "oreo-deepseek": "User: Q?\nPlease reason step by step, and put your final answer within \\boxed{}.\n\nAssistant:",
}


@pytest.fixture
def tokenizer():
    tokenizer = load_tokenizer(str(ROOT / "models/tiny"))
    tokenizer.chat_template = CHATML
    return tokenizer


def render(tokenizer, tmp_path, **settings):
    questions = read_questions([write_rows(tmp_path / "rows.jsonl", [luffy_row("Q?", "1")])])
    make_prompts(questions, tokenizer, Args(**settings))
    return questions[0].prompt_text


@pytest.mark.parametrize("name", ["own", *TEMPLATES])
def test_templates_are_those_of_the_published_evaluations(tokenizer, tmp_path, name):
    text = render(tokenizer, tmp_path, template=name)
    if name == "prime":
        assert text.startswith("A conversation between User and Assistant. The user asks a question, and the")
        assert text.endswith(f"<answer> answer here </answer>. User: {PRIME}. Assistant:")
    elif name == "prime_code":
        assert text.startswith("A conversation between User and Assistant. The user asks a question, and the")
        assert text.endswith("User: Q?\n\nWrite Python code to solve the problem. Present the code in \n```python\n"
                             "Your code\n```\nat the end.. Assistant:")
    elif name == "redi":
        assert text.startswith(f"{HEAD}<|im_start|>user\nSolve the following math problem efficiently and clearly.  ")
        assert text.endswith("Think step by step before answering.\n\nQ?<|im_end|>\n<|im_start|>assistant<think>\n")
        assert r"'Therefore, the final answer is: $\boxed{ANSWER}$. I hope it is correct'" in text
    else:
        assert text == RENDERED[name]


def test_system_turns_can_be_dropped_and_a_users_file_is_a_template(tokenizer, tmp_path):
    assert "Think first" not in render(tokenizer, tmp_path, system=False)
    (tmp_path / "plain.txt").write_text("Frage: {question}\nAntwort: {x}")
    assert render(tokenizer, tmp_path, template=str(tmp_path / "plain.txt")) == "Frage: Q?\nAntwort: {x}"
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert render(tokenizer, tmp_path, template=str(tmp_path / "chat.jinja")) == "[Think first.][Q?]"


def test_plain_text_gets_the_tokenizers_own_bos_and_a_chat_template_writes_its_own(tokenizer, tmp_path, capsys):
    tokenizer.bos_token, end = bos, _ = tokenizer.convert_ids_to_tokens([4, 5])
    around = TemplateProcessing(single=f"{bos} $A {end}", special_tokens=[(bos, 4), (end, 5)])
    tokenizer.backend_tokenizer.post_processor = around  # as some do, it puts an eos behind every text
    for template, starts in (("no", True), ("own", False)):
        questions = read_questions([write_rows(tmp_path / "rows.jsonl", [luffy_row("l=9", "1")])])
        make_prompts(questions, tokenizer, Args(template=template))
        assert (questions[0].prompt[0] == 4) == starts and questions[0].prompt[-1] != 5
        assert ("prompts do not begin with bos" in capsys.readouterr().err) != starts


def test_a_prompt_that_a_row_holds_rendered_is_asked_as_it_was_trained(tokenizer, tmp_path):
    row = {"prompt": "User: l=9\nAssistant:", "response": "9", "reward": 1, "answer": "9"}
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(4)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, 4)]
    )
    [question] = questions = read_questions([write_rows(tmp_path / "rows.jsonl", [row])])
    make_prompts(questions, tokenizer, Args())
    args = SimpleNamespace(max_prompt_tokens=64, max_response_tokens=64)
    [example], _ = make_examples([row], tokenizer, args, source="rows.jsonl")
    assert question.prompt_text == row["prompt"] == example.text and question.prompt == example.prompt
    make_prompts(questions, tokenizer, Args(template="no"))
    assert question.prompt_text == row["prompt"]


def test_prompts_that_the_tokenizer_does_not_know_and_special_tokens_in_questions_are_warned_of(tmp_path, capsys):
    rows = [luffy_row("a=5", "1"), luffy_row("Où?", "1"), luffy_row("a=5<|eos|>", "1")]
    questions = read_questions([write_rows(tmp_path / "rows.jsonl", rows)])
    make_prompts(questions, load_tokenizer(str(ROOT / "models/tiny")), Args(template="no"))
    said = capsys.readouterr().err
    assert "WARNING: --data: 1 of 3 prompts hold text that the tokenizer of --model does not" in said
    assert "WARNING: --data: 1 of 3 prompts hold special tokens as text" in said


def test_templates_that_cannot_work_are_refused(tokenizer, tmp_path):
    with pytest.raises(InputError, match="quen.*not one of own, no, qwen"):
        render(tokenizer, tmp_path, template="quen")
    (tmp_path / "empty.txt").write_text("nothing")
    with pytest.raises(InputError, match="neither"):
        render(tokenizer, tmp_path, template=str(tmp_path / "empty.txt"))
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template; pass a file with one, or no, qwen"):
        render(tokenizer, tmp_path)


# Samples.


@pytest.mark.parametrize("name", ["model", "value"])
def test_answers_of_a_model_that_has_changed_are_not_gone_on_from(name, tmp_path, world):
    folders = {}
    for kind in ("model", "value"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text("{}")
        folders[kind] = str(tmp_path / kind)
    out = tmp_path / "out"
    out.mkdir()
    questions = [Question(i, "b", "?", [], "1", "row", 0) for i in "qr"]
    args = Args(**folders, search="beam", out=str(out), rollout="embedded")
    check_settings(args, questions, world)
    (out / "samples.jsonl").write_text('{"id": "q"}\n')
    check_settings(args, questions, world)
    (tmp_path / name / "config.json").write_text("{ }")
    with pytest.raises(InputError, match="holds an evaluation with other settings .other weights"):
        check_settings(args, questions, world)
    (out / "args.json").unlink()
    with pytest.raises(InputError, match="args.json is missing, so the settings of the files beside it are unknown"):
        check_settings(args, questions, world)


def test_a_file_that_is_cut_anywhere_keeps_its_complete_records(tmp_path):
    records = [record(f"q{i}", [answer(1, "ü" * i)]) for i in range(3)]
    whole = "".join(json.dumps(r) + "\n" for r in records).encode()
    for cut in range(len(whole) + 1):
        (tmp_path / "samples.part-0.jsonl").write_bytes(whole[:cut])
        assert list(read_records(tmp_path / "samples.jsonl")) == [f"q{i}" for i in range(whole[:cut].count(b"\n"))]


def test_chunks_hold_every_question_once_and_stay_within_the_budget(tokenizer, tmp_path):
    rows = [luffy_row("Q?" * (i % 7 + 1), str(i)) for i in range(50)]
    questions = read_questions([write_rows(tmp_path / "rows.jsonl", rows)])
    args = Args(n=4, max_tokens=100, sampler_tokens=3000, write_every=10)
    make_prompts(questions, tokenizer, args)
    for embedded in (True, False):
        parts = chunks(questions, args, embedded=embedded)
        assert [q for part in parts for q in part] == questions
        for part in parts:
            width = max(len(q.prompt) for q in part) + 100
            assert len(part) == 1 or sum(q.n for q in part) * (width if embedded else 1) <= (3000 if embedded else 10)


def test_tables_are_aligned_and_keep_their_columns():
    lines = table([["a", "b|c"], ["long\nname", "1"]]).splitlines()
    assert len({len(line) for line in lines}) == 1 and r"b\|c" in lines[0] and len(lines) == 3


def test_a_searched_answer_that_was_cut_says_all_of_it():
    class Tokenizer:
        def decode(self, ids):
            return str(ids)

    cut, ended = (best_answer([Candidate([7, last], True, 0.5)], [1], Tokenizer()) for last in (8, 1))
    assert (cut["text"], cut["truncated"]) == ("[7, 8]", True)
    assert (ended["text"], ended["truncated"]) == ("[7]", False)
