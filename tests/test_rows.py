"""common/rows.py: files, shapes of rows, templates, traces."""

import gzip
import json
import math
from collections import Counter
from types import SimpleNamespace

import datasets
import pyarrow
import pytest
from pyarrow import parquet

import eval as evaluation
import igsm
import oreo
import redi
from common.data import InputError
from common.rows import (
    Trace,
    _dataset_rows,
    check_gold,
    conversation_ids,
    data_digest,
    encode_traces,
    given_logps,
    held_out_examples,
    in_words,
    load_rows,
    make_examples,
    read_row,
    set_template,
    trace_ids,
    trace_text,
)
from tests.conftest import write_rows
from tools import redi_data

TOKENIZER = igsm.tokenizer("symbolic")


def row(question="a=5\na?", trace="<think>\na=5\n</think>\n\\boxed{5}", gold="5", **extra):
    return {
        "data_source": "toy", "prompt": [{"role": "user", "content": question}],
        "target": [{"role": "assistant", "content": trace}], "reward_model": {"style": "rule", "ground_truth": gold},
    } | extra


def limits(prompt=64, response=32):
    return SimpleNamespace(max_prompt_tokens=prompt, max_response_tokens=response)


def examples(rows, args=limits(), **options):  # noqa: B008
    return make_examples(rows, TOKENIZER, args, source="toy.jsonl", **options)


# -------------------------------------------------------------------------------------------------- loading


def test_rows_load_from_parquet_json_jsonl_and_folders(tmp_path):
    rows = [row(gold=str(i)) for i in range(5)]
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
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
        ("data.json", '{\n  "data": [{"a": 1}]\n}', "line 1: not valid JSON .*a file holds one row a line, or a list"),
        ("wide.csv", "prompt,chosen,rejected\nWhat?,one,two\nWhat?,one, two,three", "line 3 has more cells than "),
        ("twice.csv", "question,answer,answer\nQ,1,2", "the header names a column twice: question, answer, answer"),
        ("bad.parquet", "not parquet", "not a readable parquet"),
        ("bad.jsonl.gz", "x", "not valid JSON"),
        ("bad.csv", 'a,b\n"x,1\n', "not valid CSV"),
        ("a.txt", "x", "cannot be read; data files end in .parquet, .jsonl"),
        ("a.xlsx", "PK", "cannot be read"),
        ("empty.jsonl", "", "no rows"),
        pytest.param("digits.jsonl", f'{{"question": {"9" * 5000}}}', "line 1: not valid JSON", id="endless digits"),
        pytest.param("lists.jsonl", f'{{"question": {"[" * 100_000}}}', "line 1: not valid JSON", id="endless lists"),
    ],
)
def test_unreadable_files_are_named_with_the_reason(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        load_rows(str(tmp_path / name))


def test_a_hub_name_may_carry_its_configuration(monkeypatch):
    asked = []
    splits = {"test": [{"a": 1}], "train": []}
    monkeypatch.setattr("datasets.load_dataset", lambda *given: asked.append(given) or splits)
    assert load_rows("openai/gsm8k:main", split="test") == load_rows("some/data", split="test") == [{"a": 1}]
    assert asked == [("openai/gsm8k", "main"), ("some/data", None)]


def test_of_a_hub_dataset_the_only_split_is_read_and_validation_for_a_missing_test(monkeypatch, tmp_path):
    """AIME 2024 has its problems in 'train'."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data"  # the library reads a folder as it reads the Hub
    data.mkdir()
    (data / "train.jsonl").write_text('{"a": 1}\n')
    assert list(_dataset_rows(str(data), "test")) == list(_dataset_rows(str(data), "train")) == [{"a": 1}]
    (data / "validation.jsonl").write_text('{"a": 3}\n')
    assert list(_dataset_rows(str(data), "test")) == [{"a": 3}]
    (data / "train.jsonl").rename(data / "test.jsonl")
    with pytest.raises(InputError, match="there is no split 'train' .validation, test."):
        list(_dataset_rows(str(data), "train"))


def test_a_short_float_of_a_hub_dataset_is_the_number_that_was_written(monkeypatch):
    rows = datasets.Dataset(pyarrow.table({"answer": pyarrow.array([0.1, None, 2.0], pyarrow.float32())}))
    monkeypatch.setattr("datasets.load_dataset", lambda *given: {"train": rows})
    assert [row["answer"] for row in load_rows("some/data")] == [0.1, None, 2.0]


def test_what_save_to_disk_wrote_is_read_as_a_hub_dataset_is(tmp_path):
    rows = datasets.Dataset(pyarrow.table({"answer": pyarrow.array([0.1, 2.0], pyarrow.float32())}))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    rows.save_to_disk(one)
    assert load_rows(one) == load_rows(one, split="test") == [{"answer": 0.1}, {"answer": 2.0}]
    datasets.DatasetDict(train=rows, validation=rows.select([1])).save_to_disk(two)
    assert load_rows(two, limit=1) == [{"answer": 0.1}]
    assert load_rows(two, split="test") == [{"answer": 2.0}]
    next((tmp_path / "two" / "train").glob("*.arrow")).write_text("")
    with pytest.raises(InputError, match="two: what save_to_disk wrote cannot be read"):
        load_rows(two)


@pytest.mark.parametrize(
    ("answer", "message"),
    [("(1, 2)", "row 0: the trace is empty"), ("so\n####", "all 1 rows: the gold answer is missing"),
     ("#### 5", "row 0: the trace is empty")],
)
def test_an_answer_that_is_not_gsm8ks_is_refused(answer, message):
    with pytest.raises(InputError, match=f"toy.jsonl, {message}"):
        examples([{"question": "Q?", "answer": answer}], limits(400))


@pytest.mark.parametrize(
    ("answer", "gold"), [("so\n#### 18 # apples", "18 # apples"), ("so\n####\n18", "18"), ("#### 1 #### C#", "C#")]
)
def test_what_follows_the_last_hashes_is_the_gold(answer, gold):
    assert read_row({"prompt": "Q?", "answer": answer}, "row 0").gold == gold


@pytest.mark.parametrize("gold", ["#### tests ####\nassert f([1,200]) == 3", "## One\n#### Details\nText.", "##### 5"])
def test_a_gold_text_keeps_its_headings(gold):
    assert read_row({"prompt": "Q?", "answer": gold}, "row 0").gold == gold
    item = read_row({"question": "Q?", "answer": gold}, "row 0")
    assert (item.gold, item.traces, item.source) == (gold, [], "")


def test_where_no_trace_is_needed_an_answer_alone_will_do():
    rows = [{"question": "Q?", "answer": answer} for answer in ("(1, 2)", "#### 1,200")]
    found, _ = examples(rows, limits(400), traces="ignored")
    assert [e.gold for e in found] == ["(1, 2)", "1200"]


# -------------------------------------------------------------------------------------------------- examples


def test_the_trace_loses_its_think_tag_exactly_when_the_prompt_ends_with_it():
    assert trace_text("...<think>\n", "<think>\nabc") == trace_text("...<think>\n", "\n<think>\nabc") == "abc"
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
    assert count == {"rows": 3, "gold_missing": 0, "prompt_too_long": 1, "trace_too_long": 1, "trace_empty": 0,
                     "kept": 1}


def test_rows_keep_their_numbers_however_many_there_are():
    found, _ = examples([row()] * 501)  # 500 are tokenized at a time; a trace is graded once by its row's number
    assert [e.index for e in found] == list(range(501))


def test_a_long_trace_can_be_cut_as_published_and_then_has_no_eos():
    [e], _ = examples([row(trace="a=1\n" * 20)], long_trace="cut")
    assert len(e.trace) == 32 and TOKENIZER.eos_token_id not in e.trace


def test_a_cut_trace_keeps_the_probabilities_of_what_is_left():
    trace = "a=1\n" * 20
    n = len(TOKENIZER(trace)["input_ids"])
    for long_trace, last_is_known in (("cut", True), ("end", False)):
        [e], _ = examples([row(trace=trace) | {"target_probs": [0.5] * n}], long_trace=long_trace)
        assert len(e.trace_logps) == len(e.trace) == 32
        assert e.trace_logps[:-1] == [math.log(0.5)] * 31 and (e.trace_logps[-1] == e.trace_logps[-1]) == last_is_known


def test_held_out_rows_are_of_every_file_and_too_long_prompts_are_counted_on_the_terminal(tmp_path, capsys):
    path = write_rows(tmp_path / "test.jsonl", [row(), row(question="a=1\n" * 40 + "a?")])
    args = SimpleNamespace(**vars(limits()), eval_data=(path,), eval_limit=0, igsm_problems=1)
    assert len(held_out_examples(TOKENIZER, args)) == 1
    assert "1 of 2 rows (1 prompts over --max_prompt_tokens" in capsys.readouterr().err
    args.eval_data = path, write_rows(tmp_path / "more.jsonl", [row(gold="6")] * 3)
    args.eval_limit = 2  # of each file
    assert [e.gold for e in held_out_examples(TOKENIZER, args)] == ["5", "6", "6"]


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
    wrong = {"prompt": "Q?", "response": "A", "label": 0, "answer": "5"}
    with pytest.raises(InputError, match="row 0: none of its traces is correct .its label or reward.; remove the row"):
        examples([wrong])


@pytest.mark.parametrize(
    ("column", "message"),
    [("prompt", "no shape of row in docs/data.md has these columns"), ("target", "the trace is empty or missing")],
)
def test_a_missing_column_is_named_with_those_found(column, message):
    broken = row()
    del broken[column]
    with pytest.raises(InputError, match=f"row 1: {message}.*data_source"):
        examples([row(), broken])


@pytest.mark.parametrize(
    "broken", [{"prompt": 5}, {"prompt": []}, {"prompt": [{"role": "user", "content": None}]},
               {"target": [{"role": "assistant"}]}, {"target": 5}],
)  # fmt: skip
def test_a_malformed_row_is_named(broken):
    with pytest.raises(InputError, match="toy.jsonl, row 1"):
        examples([row(), row() | broken])


def test_nothing_left_is_an_error_that_says_why():
    with pytest.raises(InputError, match="no row is left: 0 of 2 rows .*2 prompts over --max_prompt_tokens 3"):
        examples([row(), row()], limits(3))


def test_a_tokenizer_without_chat_template_needs_the_flag(tmp_path):
    bare = igsm.tokenizer("symbolic")
    bare.chat_template = None
    with pytest.raises(InputError, match="--chat_template"):
        make_examples([row()], bare, limits(), source="x")
    (tmp_path / "template.jinja").write_text("{{ messages[0].content }}\n")
    set_template(bare, str(tmp_path / "template.jinja"))
    [e], _ = make_examples([row()], bare, limits(), source="x")
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


USER = [{"role": "user", "content": "a=5\na?"}]
SAID = [{"role": "assistant", "content": "a=5"}]
VERDICTS = {"llama_verification": [True, True], "math_verify_reparsed_answer": [False, True]}
ROWS = {  # a row of each shape: correct traces, incorrect ones, gold
    "LUFFY": (row(trace="a=5"), ["a=5"], [], "5"),
    "GSM8K": ({"question": "a?", "answer": "a=5\n#### 5"}, ["<think>\na=5\n</think>\n\n\\boxed{5}"], [], "5"),
    "GSM8K graded": (
        {"question": "a?", "ground_truth": "a is\nA: 5", "175b": {"is_correct": True, "solution": "a=5"},
         "6b": {"is_correct": False, "solution": "a=6"}}, ["a=5"], ["a=6"], "5"),
    "MATH": (
        {"problem": "a?", "solution": "a=\\boxed{5}", "level": "Level 1"},
        ["<think>\na=\\boxed{5}\n</think>\n\n\\boxed{5}"], [], "5"),
    "OpenR1": (
        {"problem": "a?", "answer": "5", "generations": ["a=6", "a=5"], "correctness": VERDICTS,
         "problem_is_valid": "Yes"}, ["a=5"], ["a=6"], "5"),
    "responses": (
        {"prompt": "a?", "responses": ["a=6", "a=5", "a=7"], "rewards": [0, 1, 0], "answer": 5}, ["a=5"],
        ["a=6", "a=7"], "5"),
    "pair": ({"prompt": "a?", "chosen": "a=5", "rejected": "a=6", "ground_truth": "5"}, ["a=5"], ["a=6"], "5"),
    "conversations of a pair": (
        {"chosen": USER + SAID, "rejected": [*USER, {"role": "assistant", "content": "a=6"}], "answer": "5"}, ["a=5"],
        ["a=6"], "5"),
    "label": ({"prompt": USER, "response": "a=6", "label": 0, "answer": "5"}, [], ["a=6"], "5"),
    "reward": ({"prompt": "a?", "response": "a=5", "reward": 1, "answer": "5"}, ["a=5"], [], "5"),
    "conversation": (
        {"conversations": [*USER, {"role": "assistant", "content": "<think>\na=5"}], "reward": 1.0, "answer": "5"},
        ["<think>\na=5"], [], "5"),
    "ARC": (
        {"question": "a?", "choices": {"text": ["4", "5"], "label": ["A", "B"]}, "answerKey": "B"}, [], [], "B"),
    "MMLU-Pro": ({"question": "a?", "options": ["4", "5"], "answer": "B"}, [], [], "B"),
}  # fmt: skip


@pytest.mark.parametrize("shape", ROWS)
def test_every_script_reads_every_shape(shape, tmp_path):
    """As docs/data.md says, for what a script needs of a row: a gold, a correct trace, or a graded one."""
    row, correct, incorrect, gold = ROWS[shape]
    path = write_rows(tmp_path / "rows.jsonl", [row])
    item = read_row(row, "row 0")
    assert [t.text for t in item.traces if t.reward > 0] == correct and item.gold == gold
    assert [t.text for t in item.traces if t.reward <= 0] == incorrect
    [question] = evaluation.read_questions([path])
    assert question.gold == gold
    [example], _ = make_examples([row], TOKENIZER, limits(400, 99), source=path, traces="ignored")
    assert example.gold == gold
    if correct:
        [example], _ = make_examples([row], TOKENIZER, limits(400, 99), source=path)
        assert TOKENIZER.decode(example.trace[:-1]) == correct[0].removeprefix("<think>\n")
    if correct or incorrect:
        rows, _ = oreo.read_rows(path, TOKENIZER, oreo.Args())
        assert [r.reward for r in rows] == [t.reward for t in item.traces]
        assert len({r.index for r in rows}) == len(rows) and len({r.group for r in rows}) == 1
        [pair], _ = redi.make_pairs([row], TOKENIZER, redi.Args(), source=path)
        for ids, texts in ((pair.chosen, correct), (pair.rejected, incorrect)):
            expected = texts[0].removeprefix("<think>\n") + TOKENIZER.eos_token if texts else ""
            assert TOKENIZER.decode(list(ids)) == expected
        problem = redi_data.read_problem(row, "row 0", redi_data.Args())
        assert (bool(problem.first(correct=True)), problem.gold) == (bool(correct), gold)


ASK, TURN = "2+2?", {"role": "user", "content": "2+2?"}
ANSWER = "<think>\nTwo and two.\n</think>\n\n\\boxed{4}"
MARKED = (
    "<|begin_of_thought|>\n\nTwo and two.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\n\\boxed{4}\n\n<|end_of_solution|>"
)
R1 = {"problem": ASK, "solution": "by hand: \\boxed{4}", "answer": "4", "generations": ["5", ANSWER]}
HUMAN = [{"from": "human", "value": ASK}]
OTHERS = {  # rows as other projects write them: (row, gold, [(reward, trace)], roles of the prompt)
    "messages": ({"messages": [TURN, {"role": "assistant", "content": ANSWER}]}, "", [(None, ANSWER)], ["user"]),
    "messages without an answer": ({"messages": [TURN], "ground_truth": "4"}, "4", [], ["user"]),
    "from, value, system": (
        {"system": "Think.", "conversations": [*HUMAN, {"from": "gpt", "value": MARKED}]}, "", [(None, ANSWER)],
        ["system", "user"]),
    "the thought beside the content": (
        {"messages": [TURN, {"role": "assistant", "content": "\\boxed{4}", "reasoning_content": "Two and two."}]}, "",
        [(None, ANSWER)], ["user"]),
    "content in parts": (
        {"prompt": [{"role": "User", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}],
         "target": ANSWER, "answer": 4}, "4", [(1.0, ANSWER)], ["user"]),
    "turns as text": (
        {"prompt": json.dumps([TURN]), "target": str([{"role": "assistant", "content": ANSWER}]),
         "reward_model": "{'ground_truth': '4'}"}, "4", [(1.0, ANSWER)], ["user"]),
    "prompt and completion": (
        {"prompt": [TURN], "completion": [{"role": "assistant", "content": ANSWER}]}, "", [(None, ANSWER)], ["user"]),
    "KTO": ({"prompt": ASK, "completion": "5", "label": False}, "", [(0.0, "5")], ["user"]),
    "a pair and its conversation": (
        {"conversations": HUMAN, "chosen": {"from": "gpt", "value": ANSWER}, "rejected": {"from": "gpt", "value": "5"}},
        "", [(1.0, ANSWER), (0.0, "5")], ["user"]),
    "generated_solution": (
        {"problem": ASK, "generated_solution": ANSWER, "expected_answer": "4"}, "4", [(None, ANSWER)], ["user"]),
    "a thought that nobody opened": (
        {"query": ASK, "response": ANSWER.removeprefix("<think>\n"), "correct": True}, "", [(1.0, ANSWER)], ["user"]),
    "instruction": ({"instruction": "Add.", "input": "2, 2", "output": "4"}, "", [(None, "4")], ["user"]),
    "OpenR1-Math-220k": (R1 | {"correctness_math_verify": [False, True]}, "4", [(0.0, "5"), (1.0, ANSWER)], ["user"]),
    "OpenR1-Math-220k, by Llama": (
        R1 | {"correctness_math_verify": [False, False], "correctness_llama": [False, True]}, "4",
        [(0.0, "5"), (1.0, ANSWER)], ["user"]),
    "a solution that is marked wrong": (
        {"problem": ASK, "solution": "5", "answer": "4", "label": 0}, "4", [(0.0, "5")], ["user"]),
    "a solution with a reward": (
        {"problem": ASK, "solution": "two and two", "answer": "4", "reward": 0.5}, "4",
        [(0.5, "<think>\ntwo and two\n</think>\n\n\\boxed{4}")], ["user"]),
    "a thought beside a pair is neither's": (
        {"prompt": ASK, "chosen": "4", "rejected": "5", "reasoning": "Two and two."}, "", [(1.0, "4"), (0.0, "5")],
        ["user"]),
    "a solution that is the answer alone": ({"problem": ASK, "solution": "4", "answer": "4"}, "4", [], ["user"]),
    "target beside responses": (row(responses=["a"], trace="a=5"), "5", [(1.0, "a=5")], ["user"]),
    "blank columns of other shapes": (
        row(trace="a=5", response="", conversations=[], options=[], chosen=math.nan), "5", [(1.0, "a=5")], ["user"]),
    "a list of one answer": ({"prompt": ASK, "reward_model": {"ground_truth": '["4"]'}}, "4", [], ["user"]),
    "an answer in a box": ({"prompt": ASK, "answer": "so \\boxed{4}"}, "4", [], ["user"]),
    "an answer that is none": ({"problem": ASK, "answer": "notfound", "solution": "..."}, "", [], ["user"]),
    "a list after ####": (
        {"question": ASK, "answer": "both\n#### 1,200, 4"}, "1200, 4",
        [(1.0, "<think>\nboth\n</think>\n\n\\boxed{1200, 4}")], ["user"]),
    "capitals": ({"Question": ASK, "Answer": 4}, "4", [], ["user"]),
    "worked answer beside its number": ({"question": ASK, "answer": "It is 4.", "answer_number": 4}, "4", [], ["user"]),
    "MMLU": ({"question": ASK, "choices": ["3", "4", "5", "6"], "answer": 1}, "B", [], ["user"]),
    "options by label": (
        {"question": ASK, "options": {"A": "3", "B": "4"}, "answer_idx": "B", "answer": "4"}, "B", [], ["user"]),
    "options in columns": ({"question": ASK, "A": "3", "B": "4", "answer": "(b)"}, "B", [], ["user"]),
    "the text of an option": ({"question": ASK, "options": ["A) 3", "B) 4"], "answer": "4"}, "B", [], ["user"]),
    "a marked conversation": (
        {"messages": [TURN, {"role": "assistant", "content": "5"}], "label": False}, "", [(0.0, "5")], ["user"]),
    "a reward beside a mark": (
        {"prompt": [TURN], "response": "5", "reward": 0.4, "correct": 0}, "", [(0.0, "5")], ["user"]),
    "an empty response with its reward": ({"prompt": [TURN], "response": "", "reward": 0}, "", [(0.0, "")], ["user"]),
    "a thought without a space": (
        {"messages": [TURN, {"role": "assistant", "content": "4", "reasoning_content": "二加二等于四。"}]}, "",
        [(None, "<think>\n二加二等于四。\n</think>\n\n4")], ["user"]),
    "a solution beside another output": (
        {"question": ASK, "solution": "so \\boxed{4}", "output": "x"}, "4",
        [(1.0, "<think>\nso \\boxed{4}\n</think>\n\n\\boxed{4}")], ["user"]),
    "responses that nobody graded": (
        {"question": ASK, "reference_answer": "4", "responses": [{"response": "x"}]}, "4", [], ["user"]),
    "system_prompt": (
        {"system_prompt": "Think.", "question": ASK, "response": "4"}, "", [(None, "4")], ["system", "user"]),
    "the final answer beside a worked one": (
        {"question": ASK, "answer": "Well, it is four.", "final_answer": "4"}, "4", [], ["user"]),
    "labelled options": (
        {"question": ASK, "options": [{"label": "A", "text": "3"}, {"label": "B", "text": "4"}], "answer": "B"}, "B",
        [], ["user"]),
    "an option's letter before a number of correct ones": (
        {"question": ASK, "choices": ["x", "y", "z"], "answer": "C", "correct": 1}, "C", [], ["user"]),
    "an option that is a letter": ({"question": ASK, "options": ["b", "a"], "answer": "b"}, "A", [], ["user"]),
    "fewer options than columns": (
        {"question": ASK, "A": 3, "B": 4, "C": None, "answer": "B"}, "B", [], ["user"]),
    "labels that are numbers": (
        {"question": ASK, "choices": {"label": ["1", "2"], "text": ["3", "4"]}, "answerKey": 2}, "2", [], ["user"]),
    "a label that is a float, as where a column held a NaN": (
        {"question": ASK, "choices": {"label": ["1", "2"], "text": ["4", "3"]}, "answerKey": 1.0}, "1", [], ["user"]),
    "a label that was a float in a .csv file": (
        {"question": ASK, "choices": "{'label': ['1', '2'], 'text': ['4', '3']}", "answerKey": "1.0"}, "1", [],
        ["user"]),
    "an option's index as text": ({"question": ASK, "options": ["3", "4"], "answer": "1"}, "B", [], ["user"]),
    "a text that could be an index": ({"question": ASK, "options": ["1", "4"], "answer": "1"}, "A", [], ["user"]),
    "an option that could be the mark of a solution": (
        {"question": ASK, "options": ["3", "4"], "label": 1, "solution": "four"}, "B",
        [(1.0, "<think>\nfour\n</think>\n\n\\boxed{B}")], ["user"]),
    "capitals of every column": ({"QUESTION": ASK, "ANSWER": "4"}, "4", [], ["user"]),
    "history": (
        {"instruction": ASK, "input": "", "output": "4", "history": [["1+1?", "2"]]}, "", [(None, "4")],
        ["user", "assistant", "user"]),
    "UltraChat": (
        {"prompt": ASK, "prompt_id": "x", "messages": [TURN, {"role": "assistant", "content": "4"}]}, "",
        [(None, "4")], ["user"]),
    "OlympiadBench": (
        {"question": ASK, "solution": ["four"], "final_answer": ["4"]}, "4",
        [(1.0, "<think>\nfour\n</think>\n\n\\boxed{4}")], ["user"]),
    "turns with nulls": (
        {"conversations": [TURN | {"from": None, "value": None},
                           {"from": "gpt", "value": "4", "role": None, "content": None}]}, "",
        [(None, "4")], ["user"]),
    "R1-Distill-SFT": (
        {"problem": ASK, "solution": "by hand: \\boxed{4}", "reannotated_assistant_content": ANSWER}, "4",
        [(1.0, ANSWER)], ["user"]),
    "ASDiv": ({"body": "Two and two.", "question": ASK, "answer": "4 (apples)"}, "4", [], ["user"]),
    "GSM-Plus": ({"question": ASK, "answer": "None"}, "", [], ["user"]),
    "OpenR1-Math-Raw without a verdict": (
        R1 | {"correctness": {"llama_verification": None, "math_verify_reparsed_answer": [False, True]}}, "4",
        [(0.0, "5"), (0.0, ANSWER)], ["user"]),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_rows_of_other_projects_are_read(name):
    given, gold, traces, roles = OTHERS[name]
    item = read_row(given, "row 0")
    assert item.gold == gold and [(t.reward, t.text) for t in item.traces] == traces
    assert [turn["role"] for turn in item.prompt] == roles


@pytest.mark.parametrize(
    ("more", "traces"),
    [
        ({"chosen": "B.", "rejected": "A."}, [(1.0, "B."), (0.0, "A.")]),
        ({"responses": ["B.", "A."], "rewards": [1, 0]}, [(1.0, "B."), (0.0, "A.")]),
        ({"response": "A.", "label": 0}, [(0.0, "A.")]),
        ({"response": "B.", "correct": True}, [(1.0, "B.")]),
        ({"response": "B."}, [(None, "B.")]),
    ],
)
@pytest.mark.parametrize("options", [{"options": ["3", "4"]}, {"A": "3", "B": "4"}])
def test_traces_of_a_multiple_choice_stand_beside_its_options(options, more, traces):
    item = read_row({"question": ASK, "answer": "B"} | options | more, "row 0")
    assert item.gold == "B" and [(t.reward, t.text) for t in item.traces] == traces
    assert item.question == f"{ASK}\n\nA) 3\nB) 4" and item.prompt[-1]["content"].startswith(item.question)
    assert not read_row({"question": ASK} | options | more, "row 0").gold  # a pair needs none
    gpqa = {"Question": ASK, "Correct Answer": "4", "Incorrect Answer 1": "3"} | more
    assert [(t.reward, t.text) for t in read_row(gpqa, "row 0").traces] == traces
    assert read_row({"question": ASK, "expected_answer": "B"} | options, "row 0").gold == "B"


def test_a_history_stands_before_the_instruction():
    row = {"instruction": ASK, "output": "4", "history": [["1+1?", "2"], ["1+2?", "3"]]}
    assert [turn["content"] for turn in read_row(row, "row").prompt] == ["1+1?", "2", "1+2?", "3", ASK]
    for named in ({"query": ASK, "response": "4"}, {"prompt": ASK, "response": "4"}):
        assert [turn["role"] for turn in read_row(named | {"history": row["history"]}, "row").prompt[1:3]] == [
            "assistant", "user"]  # fmt: skip
    system = {"role": "system", "content": "Add."}
    turns = read_row({"prompt": [system, TURN], "answer": "4", "history": [["1+1?", "2"]]}, "row").prompt
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    assert read_row({"prompt": ASK, "answer": "4", "history": " "}, "row").prompt == [TURN]
    with pytest.raises(InputError, match="'history' must be"):
        read_row(row | {"history": "1+1?"}, "row")


def test_an_input_stands_behind_its_instruction():
    item = read_row({"instruction": "Add.", "input": "2, 2", "output": "4"}, "row 0")
    assert item.question == item.prompt[0]["content"] == "Add.\n\n2, 2"


def test_chosen_and_rejected_may_be_whole_conversations():
    """Of several turns; a system turn that stands in one column alone is no other question."""
    asked = [TURN, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}]
    chosen, rejected = ([*asked, {"role": "assistant", "content": text}] for text in ("Yes.", "No."))
    item = read_row({"chosen": chosen, "rejected": [{"role": "system", "content": "Think."}, *rejected]}, "row 0")
    assert item.prompt == asked and [(t.reward, t.text) for t in item.traces] == [(1.0, "Yes."), (0.0, "No.")]
    system, *pair = {"role": "system", "content": "In French."}, TURN, {"role": "assistant", "content": "Quatre."}
    item = read_row({"prompt": ASK, "chosen": [system, *pair], "rejected": [system, *pair]}, "row 0")
    assert item.prompt == [system, TURN]  # a prompt beside whole conversations is their question alone


def test_a_question_stands_behind_its_passage_and_before_its_options():
    given = {"context": "Tom has 3 apples.", "question": "How many?", "options": ["A. 3", "B. 4"], "answer": "A"}
    item = read_row(given, "row 0")
    assert item.question == "Tom has 3 apples.\n\nHow many?\n\nA) 3\nB) 4"


def test_the_text_of_an_option_is_not_taken_for_the_label_of_another():
    options = {"label": ["1", "2", "3", "4"], "text": ["0.5", "1.0", "1.5", "2.0"]}
    assert read_row({"question": "How long?", "choices": options, "answer": "2.0"}, "row 0").gold == "4"


@pytest.mark.parametrize("options", [{"A": "3.5", "B": "4"}, {"1": "1.5 m", "2": "2.5 m"}, {"1": "1:30", "2": "2:30"}])
def test_a_number_with_which_an_option_begins_is_not_its_label(options):
    item = read_row({"question": "How long?", "options": options, "answer": [*options][0]}, "row 0")
    assert item.question == "How long?\n\n" + "\n".join(f"{label}) {text}" for label, text in options.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (row() | {"prompt": [{"role": "narrator", "content": "x"}]}, "a turn's role is 'narrator', and templates know"),
        (row() | {"prompt": [TURN, {"role": "assistant", "content": "4"}]}, "ends with a turn of the assista"),
        (row() | {"target": [TURN]}, "'target' ends with a turn of the user"),
        ({"question": ASK, "image": {"bytes": "x"}, "answer": "4"}, "the row has an image"),
        ({"prompt": [TURN | {"content": [{"type": "image"}, {"type": "text", "text": ASK}]}]}, "a turn's content is "),
        (row(weight=-1), "'weight' must be a number from 0 on, not -1"),
        ({"question": ASK, "audios": ["a.wav"], "answer": "4"}, "the row has an image, a video or sound"),
        ({"prompt": [TURN], "answer": "4", "tools": '[{"name": "add"}]'}, "'tools' is for the chat template"),
        ({"prompt": [TURN], "response": "4", "chat_template_kwargs": {"enable_thinking": False}}, "'chat_template_kw"),
        ({"prompt": [TURN, {"role": "assistant", "content": "", "function_call": {"name": "f"}}, TURN], "answer": "4"},
         "'prompt': a turn calls a tool"),
        ({"prompt": ASK, "initial_reason_steps": "a", "chosen": "b", "rejected": "c"}, "continue 'initial_reason_st"),
        ({"prompt": ASK, "answer": ["4", "5"]}, "the gold answer is a list of 2: write it as one text"),
        ({"prompt": ASK, "answer": True}, "the gold answer is neither text nor a number"),
        ({"prompt": ASK, "answer": {"value": 4}}, "the gold answer is neither text nor a number"),
        ({"prompt": ASK, "response": "4", "label": "1"}, "'label' must be 1 .right. or 0"),
        ({"prompt": ASK, "label": "72"}, "put scores into 'reward', gold answers into 'answer'"),
        ({"prompt": "[{'role': 'user', 'content': 'x'}\n {'role': 'user'}]", "answer": "4"}, "'prompt' holds turns"),
        ({"prompt": [TURN], "target": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "'target': a turn"),
        ({"prompt": [TURN | {"content": ""}], "answer": "4"}, "the question is blank"),
        ({"prompt": [TURN | {"role": "system"}], "answer": "4"}, "the question is blank"),
        ({"question": ASK, "context": {"title": ["x"]}, "answer": "4"}, "'context' is not text"),
        ({"question": ASK, "image_1": {"bytes": "x"}, "answer": "4"}, "the row has an image"),
        ({"question": ASK, "gold": "4", "answers": [{"text": "5"}], "graded_by": {"math": "1"}}, "of an evaluation"),
        ({"question": ASK, "final_answer": "['4' '5']"}, "a list without commas, as numpy prints it"),
        ({"problem": ASK, "solution": "5", "answer": "4", "is_correct": "False"}, "'is_correct' must be 1"),
        (R1 | {"correctness_math_verify": ["False", "True"]}, "'correctness' must have true, false or null"),
        ({"question": ASK, "options": ["a", None, "c"], "answer": "A"}, "an option is not text"),
        ({"question": ASK, "options": ["1", " ", "4"], "answer": "A"}, "none of them blank"),
        ({"question": ASK, "options": ["3", "4"], "answer": "7"}, "the answer '7' is none of the labels A, B"),
        ({"problem": " ", "answer": "4"}, "these columns .blank: problem"),
    ],
)  # fmt: skip
def test_a_row_that_would_be_misread_is_refused(given, message):
    with pytest.raises(InputError, match=f"row 0: .*{message}"):
        read_row(given, "row 0")


def test_text_that_the_tokenizer_does_not_know_is_counted_on_the_terminal(capsys):
    examples([row()])
    assert "WARNING" not in capsys.readouterr().err
    examples([row(), row(question="Tom?")])
    assert "toy.jsonl: 1 of 2 prompts hold text that the tokenizer of --model does not" in capsys.readouterr().err


def test_columns_that_are_null_do_not_count():
    """A file of several shapes has every column in every row."""
    mixed = dict.fromkeys(("conversations", "generations", "responses", "label", "question", "problem", "options"))
    assert read_row(mixed | row(), "row 0") == read_row(row(), "row 0")


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        (r"Thus $x = \boxed 2$. Done.", "2"), (r"\[ \boxed 12 \]", "12"), (r"so $\boxed\frac{1}{2}$", r"\frac{1}{2}"),
        (r"$f(x) = \boxed{\left\{ \begin{array}{cl} 1 \\ 2 \end{array} \right.}$",
         r"\left\{ \begin{array}{cl} 1 \\ 2 \end{array} \right."),
        (r"$\boxed{\{1, 2)}$ and so on", r"\{1, 2)"), (r"first \boxed{3}, then \fbox{4}", "4"), (r"\boxed 5", "5"),
    ],
)  # fmt: skip
def test_boxes_of_math_without_braces_or_with_escaped_ones_are_read(solution, gold):
    assert read_row({"problem": "P", "solution": solution}, "row").gold == gold


def test_a_response_of_a_model_is_a_trace_as_it_is_and_a_boxed_or_whole_gold_is_its_number():
    said = "<think>\nso\n</think>\n\n\\boxed{10}"
    item = read_row({"problem": "P", "solution": said, "answer": "\\boxed{10}"}, "row")
    assert (item.gold, item.traces[0].text) == ("10", said)
    assert read_row({"problem": "P", "answer": 10.0}, "row").gold == "10"
    assert read_row({"problem": "P", "answer": 0.5}, "row").gold == "0.5"
    assert read_row({"problem": "P", "answer": -0.00002}, "row").gold == "-0.00002", "Math-Verify reads no -2e-05"


@pytest.mark.parametrize("answer", ["", " ", None, float("nan")])
def test_a_blank_answer_beside_a_solution_is_the_solutions_box(answer):
    assert read_row({"problem": "P", "answer": answer, "solution": r"so \boxed{7}"}, "row").gold == "7"


@pytest.mark.parametrize("gold", ["", "  ", float("nan"), float("-inf"), None])
def test_a_blank_gold_is_left_out_of_training_and_refused_by_row_in_an_evaluation(gold, tmp_path):
    with pytest.raises(InputError, match=r"rows.jsonl, row 1: the gold answer is missing or blank.*remove the row"):
        evaluation.read_questions([write_rows(tmp_path / "rows.jsonl", [row(), row(gold=gold)])])
    found, count = examples([row(), row(gold=gold)])
    assert [e.index for e in found] == [0] and count["gold_missing"] == 1
    assert in_words(count, limits()).startswith("1 of 2 rows (1 without a gold answer)")
    with pytest.raises(InputError, match="toy.jsonl, all 2 rows: the gold answer is missing or blank"):
        examples([row(gold=gold)] * 2)
    assert len(examples([row(), row(gold=gold)], golds=False)[0]) == 2


def test_gpqa_options_lose_their_white_space_and_null_ones_are_left_out():
    gpqa = {"Question": "Q", "Correct Answer": "yes\n", "Incorrect Answer 1": " no", "Incorrect Answer 2": None}
    item = read_row(gpqa | {"Incorrect Answer 3": "never\n"}, "row")
    assert sorted(line[3:] for line in item.question.split("\n")[2:]) == ["never", "no", "yes"]
    assert f"{item.gold}) yes" in item.question
    with pytest.raises(InputError, match="the right one only once"):
        read_row(gpqa | {"Incorrect Answer 3": "yes"}, "row")


def test_a_target_of_several_turns_is_named_unless_the_others_are_the_prompt():
    several = [*SAID, {"role": "user", "content": "b?"}, {"role": "assistant", "content": "b=6"}]
    with pytest.raises(InputError, match="row 0: 'target' has several turns, .*'conversations'"):
        examples([row() | {"target": several}])
    [e], _ = examples([row() | {"target": USER + SAID}])
    assert TOKENIZER.decode(e.trace[:-1]) == "a=5"


# ---------------------------------------------------------------------------------------------------- files


def test_files_come_with_a_byte_order_mark_in_upper_case_gzipped_and_as_csv(tmp_path):
    rows, text = [row(), row(gold="6")], "".join(json.dumps(row(gold=gold)) + "\n" for gold in "56")
    (tmp_path / "a.JSONL").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    for name in ("a.JSONL", "b.jsonl.gz", "c.json"):
        assert load_rows(str(tmp_path / name)) == rows
    (tmp_path / "d.csv").write_bytes(b'\xef\xbb\xbfquestion,answer\r\n"x, y\nz",7\r\n' + b"x," + b"1" * 200_000)
    assert load_rows(str(tmp_path / "d.csv")) == [
        {"question": "x, y\nz", "answer": "7"}, {"question": "x", "answer": "1" * 200_000},
    ]  # fmt: skip
    assert len(load_rows(str(tmp_path))) == 8


def files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"question": name, "answer": "1"}) + "\n")
    return str(folder)


def names_of(rows):
    return [r["question"] for r in rows]


def test_a_blank_column_in_lower_case_does_not_hide_the_one_in_capitals():
    assert read_row({"question": "Q?", "Answer": "5", "answer": ""}, "x").gold == "5"
    assert read_row({"question": "Q?", "Answer": "5", "answer": "6"}, "x").gold == "6"


def test_a_csv_file_holds_numbers_and_empty_cells(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response,label,weight,chosen\nQ?,A,1,0.5,\nQ?,B,0,,\nQ?,C,True,,\nQ?,D,False,,\n")
    first, second, third, fourth = (read_row(r, "x") for r in load_rows(str(path)))
    assert third.first(correct=True).text == "C" and fourth.first(correct=False).text == "D"
    assert first.first(correct=True).text == "A" and first.weight == 0.5
    assert second.first(correct=False).text == "B" and second.weight == 1.0
    for name in ("is_correct", "correct", "kto_tag", "Label"):
        path.write_text(f"prompt,response,{name}\nQ?,A,1\nQ?,B,true\nQ?,C,False\n")
        marked = [read_row(r, "x").traces[0].reward for r in load_rows(str(path))]
        assert marked == [1.0, 1.0, 0.0]


def test_turns_that_pandas_wrote_as_text_are_read_and_json_that_is_an_answer_stays_text():
    turn, answer = {"value": "4", "from": "gpt"}, {"from": "Paris", "to": "Rome"}
    for written in (str, json.dumps):
        pair = read_row({"prompt": written([{"value": ASK, "from": "human"}]), "chosen": written(turn),
                         "rejected": written(answer)}, "row 0")  # fmt: skip
        assert pair.prompt == [TURN] and [t.text for t in pair.traces] == ["4", written(answer)]
    for text in ("{'value': 4}, {'value': 5}", '[{"value": 1}, {"value": 2}] are the values. \\boxed{4}'):
        assert read_row({"prompt": ASK, "target": text}, "row 0").traces[0].text == text
    options = "[{'value': 'Rome', 'key': 'A'}, {'value': 'Paris', 'key': 'B'}]"
    assert read_row({"question": ASK, "options": options, "answer": "B"}, "row 0").gold == "B"


def test_a_box_in_the_solution_beside_a_prompt_is_the_gold_and_a_response_beside_a_reward_model_the_trace():
    assert read_row({"prompt": [TURN], "solution": "2+2 is \\boxed{4}"}, "row 0").gold == "4"  # TRL's GRPO rows
    item = read_row({"prompt": [TURN], "response": "It is 4.", "reward_model": {"ground_truth": "4"}}, "row 0")
    assert item.gold == "4" and [t.text for t in item.traces] == ["It is 4."]


def test_lists_that_pandas_wrote_as_text_are_read(tmp_path):
    path = tmp_path / "rows.csv"
    for name, marks in (("correctness_math_verify", [False, True]), ("correctness", VERDICTS)):
        path.write_text(f'problem,generations,{name}\nQ?,"[\'5\', \'4\']","{marks}"\n')
        [row] = load_rows(str(path))
        assert [t.reward for t in read_row(row, "x").traces] == [0.0, 1.0]
    path.write_text("question,A,B,answer\n2+2?,3,4,1\n")
    assert read_row(*load_rows(str(path)), "x").gold == "B"  # its index, as no option is 1


def test_ids_that_end_with_another_stop_token_are_those_of_their_text():
    ids = TOKENIZER("a=5", add_special_tokens=False)["input_ids"]
    for end in (TOKENIZER.eos_token_id, 10):
        trace = Trace("a=5", ids=[*ids, end])
        assert encode_traces(TOKENIZER, [trace], ["p"], ["row"]) == [[*ids, end]]
    with pytest.raises(InputError, match="another tokenizer's"):
        encode_traces(TOKENIZER, [Trace("a=6", ids=[*ids, 1])], ["p"], ["row"])
    row = {"prompt": "a=5\na?", "response": "a=5", "response_ids": [*ids, 1], "label": 1}
    item = read_row(row, "row")
    assert trace_ids(item, item.traces[0], TOKENIZER, 0)[1] == [*ids, 1]
    item.traces[0].text = "a=6"
    with pytest.raises(InputError, match="^the ids of a trace are not those of its text"):
        trace_ids(item, item.traces[0], TOKENIZER, 0)


def test_ids_of_a_cut_answer_get_no_eos_in_any_script():
    ids = TOKENIZER("a=5", add_special_tokens=False)["input_ids"]
    row = {"prompt": [{"role": "user", "content": "a=5\na?"}], "response": "a=5", "response_ids": ids, "reward": 0}
    item = read_row(row, "row")
    assert trace_ids(item, item.traces[0], TOKENIZER, 0)[1] == ids
    opened = Trace("<think>\na=5", 0.0, TOKENIZER("<think>\na=5", add_special_tokens=False)["input_ids"])
    assert trace_ids(item, opened, TOKENIZER, 0)[1] == [*ids, TOKENIZER.eos_token_id]  # the prompt has opened it
    nothing = Trace("", 0.0, [TOKENIZER.eos_token_id])  # a model that ended at once
    assert trace_ids(item, nothing, TOKENIZER, 0)[1] == nothing.ids


def test_what_follows_an_eos_is_cut_if_it_is_blank_and_refused_if_it_is_not():
    eos, once = TOKENIZER.eos_token, [*TOKENIZER("a=5", add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]
    for end in ("", eos, f"{eos}\n", f"{eos}{eos}\n"):
        [e], _ = examples([row(trace=f"a=5{end}")])
        assert e.trace == once
    said = {"prompt": "a?", "response": f"a=5{eos}\na=6", "reward": 1}
    for read in (examples, redi_pairs):
        with pytest.raises(InputError, match=r"toy.jsonl, row 0: a trace continues after .*'conversations'"):
            read([row(trace=said["response"])])
    item = read_row(said, "row")
    with pytest.raises(InputError, match="^a trace continues after"):
        trace_ids(item, item.traces[0], TOKENIZER, 0)


def redi_pairs(rows):
    return redi.make_pairs(rows, TOKENIZER, redi.Args(), source="toy.jsonl")


def test_a_template_that_renders_nothing_is_named():
    bare = igsm.tokenizer("symbolic")
    bare.chat_template = "{% for m in messages if m['role'] == 'x' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="x, row 0: the prompt is empty: .*--chat_template"):
        make_examples([row()], bare, limits(), source="x")


def test_ids_that_a_model_drew_are_what_every_script_trains_on():
    ids = TOKENIZER("a=5", add_special_tokens=False)["input_ids"]
    drawn = {"prompt": [{"role": "user", "content": "a=5\na?"}], "response": "a=5", "response_ids": [*ids, 10],
             "label": 1, "answer": "5"}  # fmt: skip
    [example], _ = examples([drawn])
    assert example.trace == [*ids, 10]  # tokenized again it would end with eos
    trace = Trace("<think>\na=5", ids=[5, 6, 7])  # the prompt has its first tokens already
    assert encode_traces(TOKENIZER, [trace], ["q <think>\n"], ["row"]) == [[*ids, TOKENIZER.eos_token_id]]


@pytest.mark.parametrize("answer", ["2", 2])
def test_the_published_trace_is_the_column_that_holds_the_solution(answer):
    row = {"data_source": "gsm8k", "question": "1+1", "solution": "1+1=\\boxed{2}", "answer": answer}
    [trace] = oreo.as_published(read_row(row, "x"), row, "system").traces
    assert trace.text == "1+1=\\boxed{2}"
    row = {"data_source": "math", "question": "1+1", "answer": "1+1=2\n#### 2"}
    [trace] = oreo.as_published(read_row(row, "x"), row, "system").traces
    assert trace.text == "1+1=2\n#### 2"


@pytest.mark.parametrize("row", [
    {"question": "q?", "solution": "so \\boxed{9}", "response": "\\boxed{8}", "label": 0, "answer": "9"},
    {"problem": "q?", "solution": "so \\boxed{9}", "generations": ["\\boxed{8}", "\\boxed{9}"], "answer": "9",
     "correctness_math_verify": [False, True]},
    {"problem": "q?", "solution": "so \\boxed{9}", "reannotated_assistant_content": "<think>\n9\n</think>\n9"},
    {"question": "q?", "response": "4"},
])  # fmt: skip
def test_a_trace_that_is_not_the_solution_stays_the_trace(row):
    assert oreo.as_published(read_row(row, "x"), row, "system") == read_row(row, "x")


def test_an_incorrect_solution_stays_incorrect_as_published():
    row = {"Problem": "q?", "Solution": "so \\boxed{9}", "answer": "0", "label": 0}
    [trace] = oreo.as_published(read_row(row, "x"), row, "system").traces
    assert (trace.text, trace.reward) == ("so \\boxed{9}", 0)


def test_an_index_of_the_right_option_is_no_verdict_on_the_solution():
    given = {"question": "Even?", "options": ["yes", "no"], "label": 0, "answer": "A", "solution": "2 is even."}
    item = read_row(given, "x")
    assert item.gold == "A" and [t.reward for t in item.traces] == [1.0]
    for verdict in ({"label": 0}, {"label": False}, {"correct": 0}, {"correct": False}):
        assert read_row(given | {"answer": "B", "label": None} | verdict, "x").traces[0].reward == 0


def test_options_in_columns_of_small_letters_are_read_where_the_answer_is_one():
    given = {"question": "Capital?", "a": "Paris", "b": "Rome"}
    item = read_row(given | {"answer": "a"}, "x")
    assert item.gold == "A" and item.question.endswith("A) Paris\nB) Rome")
    assert read_row({"question": "a + b?", "a": 3, "b": 4, "answer": 7}, "x").question == "a + b?"


def test_a_prompt_with_a_verdict_is_no_rendered_text():
    given = {"prompt": "2+2?", "response": "4", "reward": 0.5}
    assert read_row(given, "x").text == "2+2?" and read_row(given | {"is_correct": True}, "x").text is None


def test_a_thought_that_a_parser_took_out_stands_before_its_answer_with_one_blank_line():
    item = read_row({"prompt": "2+2?", "response": "\n\n4", "reasoning_content": "\ntwo more\n"}, "x")
    assert item.traces[0].text == "<think>\ntwo more\n</think>\n\n4"
    assert read_row({"prompt": "2+2?", "response": "\nfour</think>4"}, "x").traces[0].text == "<think>\nfour</think>4"


def test_a_blank_trace_is_no_trace_where_there_is_another():
    assert read_row({"prompt": "2+2?", "responses": ["", "4"], "rewards": [1, 1]}, "x").first(correct=True).text == "4"


def test_given_probabilities_may_be_those_of_the_whole_trace_or_of_what_is_trained():
    ids = TOKENIZER("<think>\na=5\n</think>\n\\boxed{5}", add_special_tokens=False)["input_ids"]
    given = row(target_probs=[0.5 - 0.01 * i for i in range(len(ids))])
    [example], _ = examples([given])
    cut = len(ids) + 1 - len(example.trace)
    expected = [math.log(0.5 - 0.01 * i) for i in range(cut, len(ids))]
    assert cut == 2 and example.trace_logps[:-1] == expected and math.isnan(example.trace_logps[-1])
    [example], _ = examples([row(target_probs=[0.25] * (len(ids) - 2))])
    assert example.trace_logps[:-1] == [math.log(0.25)] * (len(ids) - 2)
    opened = {"prompt_text": "a=5\na?\n<think>", "target": "<think>a=5\n</think>\n\\boxed{5}"}
    n = len(TOKENIZER(opened["target"], add_special_tokens=False)["input_ids"])
    with pytest.raises(InputError, match="with eos or with what the prompt has too .*: give both"):
        examples([row(**opened, target_probs=[0.5] * n)])


def test_a_pair_without_a_prompt_misses_the_column():
    with pytest.raises(InputError, match="f, row 0: column 'prompt' is missing .found: chosen, rejected"):
        read_row({"chosen": "Human: 1+1?", "rejected": "Human: 1+1?"}, "f, row 0")


def test_probabilities_of_ids_that_a_model_drew_are_theirs_whatever_the_prompt_ends_with():
    drawn = Trace("\na=5", ids=[5, 6, 7, 8], probs=[0.5] * 4)
    assert given_logps(drawn, drawn.ids, "a?<think>\n\n</think>\n\n", TOKENIZER, "row 0") == [math.log(0.5)] * 4


def test_control_tokens_in_texts_are_counted_or_refused(capsys):
    chat = igsm.tokenizer("symbolic")
    chat.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    chat.chat_template = ("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    with pytest.raises(InputError, match=r"a trace continues after <\|im_end\|>: put turns into 'conversations'"):
        encode_traces(chat, [Trace("a=5<|im_end|>a=6")], ["q"], ["row 0: "])
    turns = [{"role": "user", "content": "a=5"}, {"role": "assistant", "content": "a=5<|im_end|>a=6"}]
    with pytest.raises(InputError, match=r"turn 1 holds <\|im_end\|>, which ends turns"):
        conversation_ids(turns, chat, 0)
    make_examples([row(), row(question="a=5<|im_end|>a?")], chat, limits(), source="f")
    assert "WARNING: f: 1 of 2 prompts hold special tokens as text" in capsys.readouterr().err


def test_a_thought_that_never_closes_is_counted(capsys):
    opened = dict(prompt_text="a=5\na?\n<think>\n")
    examples([row(**opened), row(**opened, trace="<think>\na=5")])
    assert "toy.jsonl: 1 of 2 rows have a trace without </think>, though the prompt opens a" in capsys.readouterr().err


def test_files_of_splits_have_many_names(tmp_path):
    for name in ("MathTrain", "MATHTest", "GSM8KTest", "trainset", "test_set"):
        folder = tmp_path / name
        other = name.replace("rain", "est") if "rain" in name else name.replace("est", "rain")
        files(folder, f"{name}.jsonl", f"{other}.jsonl")
        assert names_of(load_rows(str(folder), split="train" if "rain" in name else "test")) == [f"{name}.jsonl"]
    assert len(load_rows(files(tmp_path / "none", "VALUES.jsonl", "TRAINER.jsonl"), split="test")) == 2


def test_a_file_whose_name_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "\udce9.jsonl").write_text('{"question": "a", "answer": 1}\n')
    with pytest.raises(InputError, match="the name is not UTF-8"):
        load_rows(str(tmp_path / "\udce9.jsonl"))


def test_copies_that_an_editor_keeps_are_not_read(tmp_path):
    found = load_rows(files(tmp_path, "a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "__MACOSX/._a.jsonl"))
    assert names_of(found) == ["a.jsonl"]


def test_of_a_folder_with_several_splits_the_one_that_is_meant_is_read(tmp_path):
    folder = files(tmp_path / "a", "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test.jsonl")
    assert names_of(load_rows(folder)) == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert names_of(load_rows(folder, split="test")) == ["test.jsonl"]
    folder = files(tmp_path / "b", "train/a.jsonl", "validation/a.jsonl")
    assert names_of(load_rows(folder, split="test")) == ["validation/a.jsonl"]
    assert names_of(load_rows(folder)) == ["train/a.jsonl"]
    only = files(tmp_path / "c", "train-a.jsonl", "train-b.jsonl")
    files(tmp_path / "c", "dataset_infos.json")  # what `datasets` writes about its files
    assert len(load_rows(only, split="test")) == 2  # nothing to choose from
    with pytest.raises(InputError, match="unclear which files are the split 'train' .*no split: x.jsonl.*name the"):
        load_rows(files(tmp_path / "a", "x.jsonl"))
    with pytest.raises(InputError, match="unclear which files are the split 'train'"):
        load_rows(files(tmp_path / "d", "test.jsonl", "validation.jsonl"))


def test_the_last_word_of_a_path_says_its_split(tmp_path):
    folder = files(tmp_path, "train_and_test/train.jsonl", "train_and_test/test.jsonl", "training/test_1.jsonl")
    assert names_of(load_rows(folder)) == ["train_and_test/train.jsonl"]
    assert names_of(load_rows(folder, split="test")) == ["train_and_test/test.jsonl", "training/test_1.jsonl"]


def test_the_gold_of_the_reward_model_goes_before_other_columns():
    assert read_row(row(answer="6", ground_truth="7"), "x").gold == "5"


def test_a_system_column_stands_before_the_prompt_and_the_conversation():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    item = read_row({"conversations": turns, "system": "S", "reward": 1}, "x")
    system = {"role": "system", "content": "S"}
    assert item.prompt == [system, turns[0]] and item.conversation == [system, *turns]


def test_the_last_answer_of_a_conversation_is_the_trace_and_what_came_before_asks():
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "qarb", strict=True)]
    item = read_row({"messages": turns}, "x")
    assert item.prompt == turns[:3] and [trace.text for trace in item.traces] == ["b"]


def test_a_thought_of_one_word_is_a_switch_and_blank_options_behind_the_others_are_none():
    item = read_row({"prompt": "q", "response": "a", "thinking": "on", "label": 1}, "x")
    assert [trace.text for trace in item.traces] == ["a"]
    item = read_row({"question": "Q?", "options": ["x", "y", ""], "answer": "y"}, "x")
    assert item.gold == "B" and item.question.endswith("A) x\nB) y")


def test_a_response_that_nobody_graded_counts_as_correct():
    item = read_row({"prompt": "q", "response": "a"}, "x")
    assert item.traces[0].reward is None
    assert item.first(correct=True) is item.traces[0] and item.first(correct=False) is None


def test_a_gsm8k_solution_with_a_thought_keeps_its_answer():
    box = "<think>\nTwo.\n</think>\n\nIt is four.\n\n\\boxed{4}"
    beside = {"answer": "It is four.\n#### 4", "reasoning": "Two and two."}
    thought = "<think>\nTwo.\n</think>\n\nIt is four.\n#### 4"
    assert read_row({"question": "2+2?", "answer": thought}, "").traces == [Trace(box)]
    [trace] = read_row({"question": "2+2?", **beside}, "").traces
    assert trace.text == "<think>\nTwo and two.\n</think>\n\nIt is four.\n\n\\boxed{4}"
    boxed = "<think>\nTwo.\n</think>\n\n\\boxed{4}\n#### 4"
    assert read_row({"question": "2+2?", "answer": boxed}, "").traces == [Trace(boxed.removesuffix("\n#### 4"))]


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"problem": "p", "answer": "4", "generations": ["4"], "correctness_math_verify": [True]}, "prompt"),
        ({"question": "q", "options": ["x", "y"], "label": 0, "solution": "so"}, "response"),
        ({"prompt": "p", "response": "4", "label": 1, "reasoning": "Two and two."}, "reasoning_content"),
        ({"prompt": [{"role": "user", "content": "p"}], "target": "t"}, "prompt_text"),
        ({"problem": "p", "solution": "so \\boxed{4}"}, "reannotated_assistant_content"),
        ({"question": "q", "answer": "so\n#### 4"}, "label"),
        ({"question": "q", "answer": "so\n#### 4"}, "weight"),
        ({"prompt": "p", "target": "t"}, "reward_model"),
    ],
)
def test_a_cell_of_blank_text_is_as_good_as_none(row, column):
    for blank in ("", " ", None, math.nan):
        assert read_row(row | {column: blank}, "row 0") == read_row(row, "row 0")
    turn = {"role": "assistant", "content": "4", "reasoning": "Two and two."}
    talk = [{"role": "user", "content": "2+2?"}, turn | {"reasoning_content": ""}]
    assert read_row({"messages": talk}, "").traces[0].text.startswith("<think>\nTwo and two.")


@pytest.mark.parametrize(
    ("options", "answer", "label"),
    [([1, 2, 3, 4], 3, "C"), ([2, 3, 5, 7], 2, "A"), ([10, 20, 30], 2, "C"), (["1", "2", "3", "4"], 3, "D"),
     ([1, 2, 3, 4], "3", "C"), ({"A": 1, "B": 2, "C": 3}, 2, "B"), ({"label": ["A", "B"], "text": [1, 0]}, 1, "A"),
     ([{"label": "A", "text": 1}, {"label": "B", "text": 0}], 1, "A"), ([1.5, 2.5], 1, "B"), ([3, "none"], 1, "B"),
     (["1", "4"], "1.0", "A")],
)  # fmt: skip
def test_a_number_names_an_option_of_numbers_and_is_the_index_of_one_of_texts(options, answer, label):
    assert read_row({"question": "q", "options": options, "answer": answer}, "").gold == label


@pytest.mark.parametrize(
    ("gold", "text"),
    [(2e-6, "0.000002"), (6.02e23, "602" + "0" * 21), (4.0, "4"), ("2e-05", "0.00002"), ("1e+16", "1" + "0" * 16),
     ("-1.5e-07", "-0.00000015"), ("2e5", "2e5"), ("1E-5", "1E-5"), ("e+10", "e+10")],
)  # fmt: skip
def test_numbers_that_python_printed_with_an_exponent_are_written_out(gold, text):
    assert read_row({"question": "q", "answer": gold}, "").gold == text


def test_a_multiple_choice_is_the_same_from_csv_jsonl_and_parquet(tmp_path):
    row = {"question": "q", "A": "x", "B": "y", "answer": "A", "label": 0, "solution": "so"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (tmp_path / "a.csv").write_text(",".join(row) + "\n" + ",".join(map(str, row.values())))
    parquet.write_table(pyarrow.Table.from_pylist([row | {"label": 0.0}]), tmp_path / "a.parquet")
    files = [load_rows(str(tmp_path / f"a.{kind}"), split="train") for kind in ("jsonl", "csv", "parquet")]
    first, *others = [read_row(only, "") for [only] in files]
    assert others == [first, first] and first.gold == "A" and first.traces[0].reward == 1


def test_numbers_of_single_precision_and_decimals_in_parquet_are_those_that_were_meant(tmp_path):
    answers = pyarrow.array([0.1, None, 2.0], pyarrow.float32())
    rewards = pyarrow.array(["0.5", "1.0", "0.0"]).cast(pyarrow.decimal128(3, 1))
    table = pyarrow.table({"prompt": ["p"] * 3, "response": ["r"] * 3, "answer": answers, "reward": rewards})
    parquet.write_table(table, tmp_path / "a.parquet")
    items = [read_row(row, "") for row in load_rows(str(tmp_path / "a.parquet"), split="train")]
    assert [item.gold for item in items] == ["0.1", "", "2"]
    assert [item.traces[0].reward for item in items] == [0.5, 1.0, 0.0]


def test_what_stands_beside_a_rendered_prompt_is_refused_and_a_thought_beside_a_target_is_its_own():
    for beside in ({"system": "s"}, {"history": [["a", "b"]]}):
        with pytest.raises(InputError, match="row 0: 'system' and 'history' stand beside a rendered prompt"):
            read_row({"prompt": "<u>p", "response": "r", "reward": 1, **beside}, "row 0")
    target = {"prompt": "p", "target": "\\boxed{4}", "reasoning_content": "Two and two."}
    assert read_row(target, "").traces[0].text == "<think>\nTwo and two.\n</think>\n\n\\boxed{4}"


def test_igsm_is_a_data_name_of_its_own():
    assert len(load_rows("igsm:5-6", limit=3)) == len(load_rows("igsm:5-6", problems=3)) == 3
    train, test = (
        {r["extra_info"]["template"] for r in load_rows("igsm:5-6", split=s, limit=50)} for s in ("train", "test")
    )
    assert not train & test
    assert {r["extra_info"]["ops"] for r in load_rows("igsm:5-6", limit=50)} == {5, 6}
    with pytest.raises(InputError, match="igsm:5: expected igsm:LO-HI"):
        load_rows("igsm:5")


def test_a_digest_tells_ids_lists_and_texts_apart():
    parts = [[([1, 2], [3], "5")], [([1], [2, 3], "5")], [([1, 2], None, "5")], [([1, 2], [3], "6")]]
    assert len({data_digest(part) for part in parts} | {data_digest(parts[0], []), data_digest([], parts[0])}) == 6
    assert len({data_digest([([1], value)]) for value in (False, True, 0, 1, 1.5, None)}) == 6


def test_counts_in_words_say_what_was_left_out_apart_from_other_counts():
    count = {"rows": 4, "gold_missing": 1, "prompt_too_long": 0, "kept": 3, "pairs": 2}
    assert in_words(count, limits()) == "3 of 4 rows (1 without a gold answer), 2 pairs"
