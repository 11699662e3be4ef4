"""Thousands of broken rows, to every loader: an InputError that names file and row, or a count; never another
exception, never a row that is gone without being counted."""

import copy
import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval as evaluation
import oreo
import redi
from common.data import InputError
from common.rows import load_rows, make_examples, set_template
from common.trainer import load_tokenizer
from tests.conftest import ROOT, parsed, write_rows
from tools import redi_data

MODEL = str(ROOT / "models/tiny")
DEEP = [[[[[[[[[[]]]]]]]]]]
JUNK = [
    None, True, False, 0, 1, -1, 2**70, 1.5, float("nan"), float("inf"), "", " ", "\0", "\ud800", "\u202eabc",
    "\n" * 50, "9" * 20_000,
    "<|im_end|>", "{{ 7 }}", [], [None], [[]], [1, 2], [-1], [10**9], ["a"], {}, {"role": "user"}, {"content": "a"},
    DEEP,
    [{"role": "user", "content": None}], [{"role": 3, "content": "a"}], [{"role": "user", "content": ["a"]}],
]  # fmt: skip
TURNS = [{"role": "user", "content": "x=1 y=2 z=x+y z=?"}]
LUFFY = {"prompt": TURNS, "target": [{"role": "assistant", "content": "z=3"}], "reward_model": {"ground_truth": "3"},
         "data_source": "a"}  # fmt: skip
GSM8K = {"question": "x=1 x=?", "answer": "x is\n#### 1"}
PAIR = {"prompt": TURNS, "chosen": "z=3", "rejected": [{"role": "assistant", "content": "z=4"}], "weight": 2.0}
TEMPLATE = "{% for m in messages %}{{ m['content'] + ('<|eos|>' if m['role'] == 'assistant' else ' ') }}{% endfor %}"
LABEL = {"prompt": "x=1 x=?", "response": "x=1", "label": 1}
GRADED = {"prompt": TURNS, "response": "z=3", "reward": 1, "question": "a"}
DRAWN = {"prompt_ids": [3, 4, 5], "response_ids": [6, 7, 1], "reward": 0.0, "question": 3, "actions": [1, 1, 1]}
TALK = {"conversations": [*TURNS, {"role": "assistant", "content": "z=3"}], "reward": 1.0}
MATH = {"problem": "x=1 x=?", "solution": "so \\boxed{1}"}
ARC = {"question": "x?", "choices": {"label": ["A", "B"], "text": ["1", "2"]}, "answerKey": "A", "id": "q"}
MMLU = {"question": "x?", "options": ["1", "2", "3"], "answer": "B", "answer_index": 1}
GPQA = {"Question": "x?", "Correct Answer": "1", "Incorrect Answer 1": "2", "Incorrect Answer 2": "3",
        "Incorrect Answer 3": "4"}  # fmt: skip
CEVAL = {"question": "x?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"}
GIVEN = LUFFY | {"target_probs": [0.5, 0.25, 0.125, 1.0]}
CHAT = {"messages": [*TURNS, {"role": "assistant", "content": "z=3"}], "answer": "3"}
ALPACA = {"instruction": "x=1 x=?", "input": "y", "output": "so \\boxed{1}", "answer": "1"}
RESPONSES = {"prompt": TURNS, "responses": ["z=3", "z=4", "z=5"], "rewards": [1.0, 0.0, 0]}
MODELS = {"question": "x?", "ground_truth": "A: 1", "6b": {"solution": "1", "is_correct": True},
          "175b": {"solution": "2", "is_correct": False}}  # fmt: skip
OPENR1 = {"problem": "x=1 x=?", "answer": "1", "source": "a", "generations": ["so \\boxed{1}", "so \\boxed{2}"],
          "correctness": {"llama_verification": [True, False], "math_verify_reparsed_answer": [True, False]}}
OPENR1_220K = {"problem": "x=1 x=?", "answer": "1", "generations": ["so \\boxed{1}", "so \\boxed{2}"],
               "correctness_math_verify": [True, False], "correctness_llama": None}  # fmt: skip

LIMITS = ["--max_prompt_tokens", "500", "--max_response_tokens", "500"]
REDI, OREO = (parsed(name, *LIMITS) for name in ("redi", "oreo"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def mutate(row, rng):
    """A copy with one or two places replaced by junk, removed, wrapped or doubled."""
    row = copy.deepcopy(row)
    for _ in range(rng.choice((1, 1, 1, 2))):
        if not isinstance(row, dict) or rng.random() < 0.03:
            return rng.choice(JUNK)
        node = row
        while True:
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            inner = node[key]
            if isinstance(inner, (dict, list)) and inner and rng.random() < 0.6:
                node = inner
                continue
            break
        act = rng.random()
        if act < 0.6:
            node[key] = rng.choice(JUNK)
        elif act < 0.8:
            del node[key]
        elif act < 0.9:
            node[key] = [node[key]]
        elif isinstance(node, list):
            node.append(node[key])
        else:
            node[f"{key}s"] = node.pop(key)
        if not row:
            break
    return row


def examples(path, tokenizer):
    rows = load_rows(path)
    limits = SimpleNamespace(max_prompt_tokens=500, max_response_tokens=500)
    kept, count = make_examples(rows, tokenizer, limits, source=path)
    assert count["kept"] == len(kept)
    return len(rows), sum(n for name, n in count.items() if name != "rows")


def pairs(path, tokenizer):
    args = dataclasses.replace(REDI, data=path)
    rows = list(redi.read_rows(args))
    kept, count = redi.make_pairs(rows, tokenizer, args, source=path)
    return len(rows), len(kept) + sum(v for k, v in count.items() if k not in ("rows", "kept"))


def problems(path, tokenizer):
    args = redi_data.Args(data=path)
    items, funnel = redi_data.read_problems(args, dataclasses.replace(REDI, data=path), progress=False)
    return funnel["rows"], len(items) - sum(n for rule, n in funnel.items() if rule != "rows")


def graded(path, tokenizer):
    keeps_history = Path(path).with_name("template.jinja")
    keeps_history.write_text(TEMPLATE)
    rows, count = oreo.read_rows(path, set_template(copy.deepcopy(tokenizer), str(keeps_history)), OREO)
    return count["rows"], len(rows) + count["prompt_too_long"] + count["response_too_long"]


def benchmark(path, tokenizer):
    questions = evaluation.read_questions([path])
    evaluation.make_prompts(questions, tokenizer, evaluation.Args(template="no"))
    return len(load_rows(path)), sum(q.rows for q in questions)


CASES = [
    (examples, LUFFY), (examples, GSM8K), (pairs, PAIR), (pairs, LABEL), (pairs, LUFFY), (graded, GRADED),
    (graded, DRAWN), (graded, TALK), (benchmark, LUFFY), (benchmark, GSM8K), (benchmark, MATH), (benchmark, ARC),
    (benchmark, MMLU), (benchmark, GPQA), (benchmark, CEVAL), (examples, GIVEN), (examples, CHAT), (examples, ALPACA),
    (pairs, RESPONSES), (pairs, MODELS), (examples, OPENR1_220K), (problems, OPENR1),
]  # fmt: skip


@pytest.mark.parametrize(("loader", "row"), CASES, ids=[f"{f.__name__}-{i}" for i, (f, _) in enumerate(CASES)])
def test_a_broken_row_is_named_or_counted(loader, row, tokenizer, tmp_path):
    rng, refused = random.Random(f"{loader.__name__} {sorted(row)}"), 0
    for n in range(200):
        rows = [row, mutate(row, rng), row]
        path = tmp_path / f"rows-{n}.jsonl"
        try:
            seen, accounted = loader(write_rows(path, rows), tokenizer)
        except InputError as error:
            refused += 1
            assert f"{path.name}" in str(error), (rows[1], error)
            assert "row 1" in str(error) or "line 2" in str(error), (rows[1], error)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} for {json.dumps(rows[1])[:500]}") from error
        else:
            assert seen == accounted == 3, rows[1]
    assert 20 < refused < 200


def test_a_broken_file_is_named(tmp_path):
    rng = random.Random(0)
    table = tmp_path / "rows.parquet"
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list([LUFFY] * 20).to_parquet(table)
    text = "".join(json.dumps(LUFFY) + "\n" for _ in range(5)).encode()
    for n in range(300):
        kind = rng.choice(("jsonl", "json", "parquet"))
        content = bytearray(table.read_bytes() if kind == "parquet" else text)
        for _ in range(rng.choice((1, 3, 40))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        path = tmp_path / f"broken-{n}.{kind}"
        path.write_bytes(content)
        try:
            load_rows(str(path))
        except InputError as error:
            assert path.name in str(error)
