"""common/rows.py: files, shapes of rows, templates, traces."""

import json
from collections import Counter

import pytest

import igsm
from common.data import InputError
from common.rows import check_gold, load_rows, make_examples, read_row, set_template, trace_text

TOKENIZER = igsm.tokenizer("symbolic")


def row(question="a=5\na?", trace="<think>\na=5\n</think>\n\\boxed{5}", gold="5", **extra):
    return {
        "data_source": "toy", "prompt": [{"role": "user", "content": question}],
        "target": [{"role": "assistant", "content": trace}], "reward_model": {"style": "rule", "ground_truth": gold},
    } | extra


def examples(rows, **options):
    options = {"source": "toy.jsonl", "max_prompt_tokens": 64, "max_response_tokens": 32} | options
    return make_examples(rows, TOKENIZER, **options)


# -------------------------------------------------------------------------------------------------- loading


def test_rows_load_from_parquet_json_jsonl_and_folders(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [row(gold=str(i)) for i in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.json", "c.parquet"):
        assert load_rows(str(tmp_path / name)) == rows
    assert load_rows(str(tmp_path)) == rows * 3
    assert load_rows(str(tmp_path), limit=7) == (rows * 3)[:7]


def test_a_json_line_may_hold_unicode_line_separators(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\n")
    assert load_rows(str(tmp_path / "a.jsonl")) == [{"text": "a\u2028b"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.jsonl", None, "no such file"),
        ("bad.jsonl", '{"a": 1}\n{"a": ', "line 2: not valid JSON"),
        ("bad.json", "[1, 2", "not valid JSON"),
        ("bad.parquet", "not parquet", "not a readable parquet"),
        ("empty.jsonl", "", "no rows"),
    ],
)
def test_unreadable_files_are_named_with_the_reason(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        load_rows(str(tmp_path / name))
    assert name in str(error.value)


def test_a_hub_name_may_carry_its_configuration(monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *given, **named: asked.append((given, named)) or [{"a": 1}])
    assert load_rows("openai/gsm8k:main", split="test") == load_rows("some/data") == [{"a": 1}]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"}), (("some/data", None), {"split": "train"})]


@pytest.mark.parametrize(
    ("answer", "message"),
    [("(1, 2)", "the trace is empty"), ("so\n####", "the gold answer is missing"), ("#### 5", "the trace is empty")],
)
def test_an_answer_that_is_not_gsm8ks_is_refused(answer, message):
    with pytest.raises(InputError, match=f"toy.jsonl, row 0: {message}"):
        examples([{"question": "Q?", "answer": answer}], max_prompt_tokens=400)


def test_where_no_trace_is_needed_an_answer_alone_will_do():
    rows = [{"question": "Q?", "answer": answer} for answer in ("(1, 2)", "#### 1,200")]
    found, _ = examples(rows, traces="ignored", max_prompt_tokens=400)
    assert [e.gold for e in found] == ["(1, 2)", "1200"]


# -------------------------------------------------------------------------------------------------- examples


def test_the_trace_loses_its_think_tag_exactly_when_the_prompt_ends_with_it():
    assert trace_text("...<think>\n", "<think>\nabc") == "abc"
    assert trace_text("...<think>\n", "abc") == "abc"
    assert trace_text("...assistant\n", "<think>\nabc") == "<think>\nabc"


def test_a_trace_ends_with_eos_exactly_once():
    [plain], _ = examples([row()])
    [ended], _ = examples([row(trace="<think>\na=5\n</think>\n\\boxed{5}" + TOKENIZER.eos_token)])
    assert plain.trace == ended.trace
    assert plain.trace[-1] == TOKENIZER.eos_token_id and plain.trace.count(TOKENIZER.eos_token_id) == 1
    assert TOKENIZER.decode(plain.trace[:-1]) == "a=5\n</think>\n\\boxed{5}"
    assert plain.text.endswith("<think>\n") and TOKENIZER.decode(plain.prompt) == plain.text


def test_rows_that_are_too_long_are_counted_and_left_out():
    long_prompt, long_trace = row(question="a=1\n" * 40 + "a?"), row(trace="a=1\n" * 20)
    kept, count = examples([long_prompt, row(), long_trace])
    assert [e.index for e in kept] == [1]
    assert count == {"rows": 3, "prompt_too_long": 1, "trace_too_long": 1, "trace_empty": 0, "kept": 1}


def test_a_long_trace_can_be_cut_as_published_and_then_has_no_eos():
    [e], _ = examples([row(trace="a=1\n" * 20)], long_trace="cut")
    assert len(e.trace) == 32 and TOKENIZER.eos_token_id not in e.trace


def test_a_trace_that_fits_with_its_eos_is_kept_whole():
    trace = "1" * 31
    [e], count = examples([row(trace=trace)])
    assert len(e.trace) == 32 and count["trace_too_long"] == 0
    with pytest.raises(InputError):
        examples([row(trace="1" * 32)])


def test_an_empty_trace_is_an_error_unless_told_otherwise():
    rows = [row(), row(trace=" ")]
    with pytest.raises(InputError, match="row 1.*--empty_trace"):
        examples(rows)
    assert len(examples(rows, empty_trace="drop")[0]) == 1
    assert [e.trace is None for e in examples(rows, empty_trace="on_policy")[0]] == [False, True]
    assert len(examples(rows, traces="ignored")[0]) == 2


@pytest.mark.parametrize(
    ("column", "message"),
    [("prompt", "no shape of row has these columns"), ("target", "the trace is empty or missing"),
     ("reward_model", "the gold answer is missing")],
)  # fmt: skip
def test_a_missing_column_is_named_with_those_found(column, message):
    broken = row()
    del broken[column]
    with pytest.raises(InputError, match=f"row 1: {message}.*data_source"):
        examples([row(), broken])


@pytest.mark.parametrize(
    "broken", [{"prompt": 5}, {"prompt": []}, {"prompt": [{"role": "user", "content": None}]},
               {"reward_model": None}, {"reward_model": {}}, {"target": [{"role": "assistant"}]}, {"target": 5}],
)  # fmt: skip
def test_a_malformed_row_is_named(broken):
    with pytest.raises(InputError, match="toy.jsonl, row 1"):
        examples([row(), row() | broken])


def test_nothing_left_is_an_error_that_says_why():
    with pytest.raises(InputError, match="no row is left of 2 .*2 prompts over --max_prompt_tokens 3"):
        examples([row(), row()], max_prompt_tokens=3)


def test_a_tokenizer_without_chat_template_needs_the_flag(tmp_path):
    bare = igsm.tokenizer("symbolic")
    bare.chat_template = None
    with pytest.raises(InputError, match="--chat_template"):
        make_examples([row()], bare, source="x", max_prompt_tokens=64, max_response_tokens=32)
    (tmp_path / "template.jinja").write_text("{{ messages[0].content }}\n")
    set_template(bare, str(tmp_path / "template.jinja"))
    [e], _ = make_examples([row()], bare, source="x", max_prompt_tokens=64, max_response_tokens=32)
    assert e.text == "a=5\na?"


# --------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    "row, text, gold",
    [
        ({"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 1,004"}, "2+2?", "1004"),
        ({"problem": "P", "answer": r"\frac{1}{2}", "solution": "..."}, "P", r"\frac{1}{2}"),
        ({"problem": "P", "solution": r"so \boxed{\frac{1}{2}}.", "level": "Level 1"}, "P", r"\frac{1}{2}"),
        ({"question": "Q", "answer": 7}, "Q", "7"),
        ({"question": "Q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
         "Q\n\n1) a\n2) b", "2"),
        ({"question": "Q", "options": ["a", "b", "c"], "answer": "C", "answer_index": 2}, "Q\n\nA) a\nB) b\nC) c", "C"),
    ],
)  # fmt: skip
def test_rows_of_other_benchmarks_are_read(row, text, gold):
    item = read_row(row, "row")
    assert (item.question, item.gold) == (text, gold)
    [turn] = item.prompt
    assert turn["role"] == "user" and turn["content"].startswith(text) and r"\boxed{}" in turn["content"]


def test_gpqa_options_are_shuffled_alike_in_every_run_and_the_gold_follows():
    golds = Counter()
    for i in range(40):
        row = {"Question": f"Q{i}", "Correct Answer": "yes", **{f"Incorrect Answer {j}": f"no{j}" for j in (1, 2, 3)}}
        item = read_row(row, "row")
        assert f"{item.gold}) yes" in item.question and read_row(row, "row") == item
        golds[item.gold] += 1
    assert set(golds) == set("ABCD")


@pytest.mark.parametrize(
    "row", [{"question": "Q"}, {"problem": "P", "solution": "no box"}, {"prompt": "text", "reward_model": {}}, "text",
            {"question": "Q", "choices": ["a"], "answerKey": "A"}, {"question": None, "answer": "1"}]
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_named(row):
    with pytest.raises(InputError, match="valid.jsonl, row 7"):
        check_gold(read_row(row, "valid.jsonl, row 7"), row, "valid.jsonl, row 7")
