"""tools/redi_data.py: which traces of graded rows become REDI's training files, and a model's own answers."""

import contextlib
import json
import re

import pytest

import igsm
import redi
from common.data import InputError
from common.metrics import read_metrics
from common.rollout import Completion
from common.rows import Item, Trace
from common.trainer import load_tokenizer
from tests.conftest import parsed, read_rows, vectors, write_rows
from tests.ranks import ONE_RANK
from tests.test_redi_runs import SMALL
from tests.test_wiring import Asked
from tools import redi_data
from tools.redi_data import Args, grade_openr1, read_problem

pytestmark = pytest.mark.usefixtures("without_curves")

# ---------------------------------------------------------------------------------------- which traces are taken


def first_of_both(verdicts):
    """The numbers of the first correct and of the first incorrect generation."""
    return tuple(verdicts.index(kind) if kind in verdicts else None for kind in (True, False))


def test_openr1_selection_keeps_the_published_rows():
    selection = vectors("redi")["data_selection"]
    expected = selection["outputs"]
    chosen = {r["original_index"]: grade_openr1(r) for r in selection["inputs"]}
    kept = {i: first_of_both(c) for i, c in chosen.items() if not isinstance(c, str)}
    assert [[i, right] for i, (right, _) in kept.items() if right is not None] == expected["sft_LandMV"]
    assert [[i, *both] for i, both in kept.items() if None not in both] == expected["pairs"]
    reasons = [c for c in chosen.values() if isinstance(c, str)]
    counters = expected["counters"]
    assert reasons.count("problem not valid") == counters["filtered_invalid_count"]
    assert reasons.count("source left out") == counters["filtered_source_count"]
    assert reasons.count("no problem") == counters["no_problem_count"]
    assert reasons.count("no generations") == counters["no_generation_count"]
    assert sum("verdict" in reason for reason in reasons) == counters["mismatched_lengths_count"]
    assert sum(None in both for both in kept.values()) == counters["skipped_dpo_condition_count"]


def test_graded_traces_of_three_forms_give_the_first_right_and_the_first_wrong_one():
    rows = [
        {"problem_is_valid": "Yes", "source": "s", "problem": "p", "answer": "4", "generations": ["x", "y", "z"],
         "correctness": {"llama_verification": [True, True, True],
                         "math_verify_reparsed_answer": [False, True, True]}},
        {"prompt": "p", "responses": ["x", "y", "z"], "rewards": [0, 1.0, 1], "answer": "4", "source": "s"},
        {"question": "p", "ground_truth": "so\nA: 4", "m1": {"is_correct": False, "solution": "x"},
         "m2": {"is_correct": True, "solution": "y"}, "source": "s"},
    ]  # fmt: skip
    for row in rows:
        problem = read_problem(row, "row 0", Args())
        assert problem == Item([{"role": "user", "content": "p"}], "p", "4", [Trace("y"), Trace("x", 0.0)], "s")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "responses": ["x"], "rewards": [1, 0]}, "lists of one length"),
        ({"prompt": "p", "responses": ["x", "y"], "rewards": [1, 0.5]}, "'rewards' must be 1 .right. or 0 .wrong."),
        ({"prompt": "p", "responses": ["x", None], "rewards": [1, 0]}, "a trace is not text"),
        ({"responses": ["x"], "rewards": [1]}, "column 'prompt' is missing"),
        (["x"], "expected an object"),
    ],
)
def test_graded_traces_that_cannot_be_read_are_named(row, message):
    with pytest.raises(InputError, match=f"data, row 3: .*{message}"):
        read_problem(row, "data, row 3", Args())


@pytest.mark.parametrize(
    ("right_if", "chosen"),
    [("both", (2, 0)), ("llama", (0, 1)), ("math_verify", (1, 0)), ("either", (0, 3))],
)
def test_which_verifier_makes_a_trace_right(right_if, chosen):
    row = {"problem_is_valid": "Yes", "source": "olympiads", "problem": "p", "generations": ["a", "b", "c", "d"],
           "correctness": {"llama_verification": [True, False, True, False],
                           "math_verify_reparsed_answer": [False, True, True, None]}}  # fmt: skip
    assert first_of_both(grade_openr1(row, right_if=right_if)) == chosen
    traces = read_problem(row, "row 0", Args(right_if=right_if)).traces
    assert [t.text for t in traces] == ["abcd"[i] for i in chosen]


def test_openr1_220k_has_neither_a_validity_nor_two_verdicts_a_trace():
    row = {"problem": "Q", "answer": "4", "generations": ["5", "4"], "correctness_math_verify": [False, True]}
    item = read_problem(row, "row 0", Args())
    assert [(trace.text, trace.reward) for trace in item.traces] == [("4", 1.0), ("5", 0.0)]


def test_sources_validity_and_verifiers_act_on_every_row_that_has_them():
    row = {"problem": "Q", "answer": "4", "generations": ["5", "4"], "correctness_math_verify": [False, True],
           "source": "cn_k12", "problem_is_valid": "Yes"}  # fmt: skip
    assert read_problem(row, "row 0", Args()) == "source left out"
    assert read_problem(row | {"source": "s", "problem_is_valid": "No"}, "row 0", Args()) == "problem not valid"
    with pytest.raises(InputError, match="row 0: --right_if llama reads OpenR1-Math-Raw's column 'correctness'"):
        read_problem(row, "row 0", Args(right_if="llama", drop_sources=()))


def test_null_columns_of_another_rows_shape_leave_no_row_out():
    pair = {"prompt": "p", "chosen": "4", "rejected": "5"}
    nulls = dict.fromkeys(("problem_is_valid", "source", "generations", "correctness"))
    assert read_problem(pair | nulls, "row 0", Args()) == read_problem(pair, "row 0", Args())
    graded = {"problem": "p", "answer": "4", "generations": ["5", "4"], "correctness_math_verify": [False, True]}
    assert read_problem(graded | {"correctness": None}, "row 0", Args()) == read_problem(graded, "row 0", Args())


def test_a_verifier_that_is_not_asked_may_have_no_verdicts():
    verdicts = {"llama_verification": None, "math_verify_reparsed_answer": [False, True]}
    row = {"problem_is_valid": "Yes", "problem": "p", "answer": "4", "generations": ["5", "4"], "correctness": verdicts}
    assert [t.text for t in read_problem(row, "row 0", Args(right_if="math_verify")).traces] == ["4", "5"]
    as_text = row | {"generations": json.dumps(row["generations"]), "correctness": str(verdicts)}  # of a .csv file
    assert [t.text for t in read_problem(as_text, "row 0", Args(right_if="math_verify")).traces] == ["4", "5"]
    for right_if in ("both", "either", "llama"):
        assert "not a verdict of each verifier" in read_problem(row, "row 0", Args(right_if=right_if))
    assert "not a verdict of each verifier" in read_problem(row | {"correctness": None}, "row 0", Args())


def test_other_sources_can_be_left_out():
    verdicts = {"llama_verification": [True, False], "math_verify_reparsed_answer": [True, False]}
    row = {"problem_is_valid": "Yes", "source": "olympiads", "problem": "p", "answer": "4", "generations": ["x", "y"],
           "correctness": verdicts}  # fmt: skip
    assert read_problem(row, "row 0", Args(drop_sources=("olympiads",))) == "source left out"
    assert read_problem(row | {"source": "cn_k12"}, "row 0", Args(drop_sources=())).gold == "4"


# ---------------------------------------------------------------------------------------------------- the files


def settings(*words):
    """Settings of redi.py for a short run."""
    return parsed("redi", *SMALL, *words)


def make(out, *words):
    """The tool on the tiny preset, with few problems."""
    few = ["--preset", "tiny", "--data", "igsm:1-2", "--igsm_problems", 40, "--max_response_tokens", 60, "--out", out]
    return redi_data.main(parsed("tools.redi_data", *few, *words))


def test_data_then_sft_then_redi_on_a_models_own_wrong_answers(tmp_path):
    """The stages hand on files and a model, and what the sampler drew is what is trained, to the id."""
    redi.main(settings("--stage", "sft", "--out", tmp_path / "sft"))
    model = str(tmp_path / "sft" / "model")
    make(tmp_path / "data", "--model", model, "--own_answers", 3)
    rows, [funnel] = (read_rows(tmp_path / "data" / name) for name in ("pairs.jsonl", "funnel.json"))
    drawn = json.loads((tmp_path / "data" / "own_answers.json").read_text())
    assert sum(n for name, n in drawn.items() if name != "tokens") == 3 * 40 <= drawn["tokens"]
    assert funnel["rows"] == funnel["positives.jsonl"] == 40
    assert funnel["pairs.jsonl"] == len(rows) == 40 + sum(n for n in funnel.values() if n < 0)
    tokenizer = igsm.tokenizer("symbolic", modulus=23)
    args = settings("--model", model, "--data", tmp_path / "data" / "pairs.jsonl", "--out", tmp_path / "redi")
    pairs, _ = redi.make_pairs(rows, tokenizer, args, source="pairs")
    for pair, row in zip(pairs, rows, strict=True):
        assert list(pair.rejected) == row["rejected_ids"] and pair.rejected[-1] == tokenizer.eos_token_id
        assert row["rejected"].find("\\boxed{" + row["reward_model"]["ground_truth"] + "}") == -1
    redi.main(args)
    assert len(read_metrics(tmp_path / "redi")) == 4
    sft = settings("--stage", "sft", "--data", tmp_path / "data" / "positives.jsonl", "--out", tmp_path / "again")
    redi.main(sft)


def test_what_a_model_drew_keeps_its_ids_in_both_files(tmp_path, monkeypatch):
    tokenizer = igsm.tokenizer("symbolic", modulus=23)
    drawn = [*tokenizer("a=")["input_ids"], *tokenizer("2")["input_ids"] * 2, tokenizer.eos_token_id]
    assert drawn[:-1] != tokenizer("a=22")["input_ids"]  # as text it would be one token less

    def answer(problems, *_):
        for problem in problems:
            problem.traces.append(Trace(tokenizer.decode(drawn[:-1]), 1.0, drawn))

    monkeypatch.setattr(redi_data, "add_own_answers", answer)
    graded = [{"prompt": "a=22\na?", "responses": ["a=6"], "rewards": [0], "answer": "22"}]
    data = write_rows(tmp_path / "rows.jsonl", graded)
    make(tmp_path / "data", "--data", data)
    for stage, name in (("sft", "positives"), ("redi", "pairs")):
        [row] = read_rows(tmp_path / "data" / f"{name}.jsonl")
        [pair], _ = redi.make_pairs([row], tokenizer, settings("--stage", stage), source=name)
        assert list(pair.chosen) == drawn


def test_the_funnel_counts_every_row_once(tmp_path, capsys):
    def row(right="a=5", wrong="a=6", prompt="a=5\na?", **more):
        return {"prompt": prompt, "responses": [wrong, right, "other"], "rewards": [0, 1, 0], **more}

    rows = [row(), row(rewards=[1, 1, 1]), row(rewards=[0, 0, 0]), row(wrong="a=5"), row(wrong="+" * 70),
            row(prompt="a=5\n" * 60), row(wrong="<think>\n"), row(responses=[" ", "a=5"], rewards=[0, 1]),
            row(right=" ")]  # fmt: skip
    make(tmp_path / "data", "--own_answers", 0, "--data", write_rows(tmp_path / "rows.jsonl", rows))
    printed = re.findall(r"^ *([-+]?\d+)  (.+)$", capsys.readouterr().out, re.M)
    assert {name: int(n) for n, name in printed} == {
        "rows": 9, "no right trace": -2, "positives.jsonl": 7, "no wrong trace": -2, "prompt too long": -1,
        "trace too long": -1, "trace empty": -1, "traces equal": -1, "pairs.jsonl": 1,
    }  # fmt: skip


def test_pairs_are_the_rows_that_fit_with_their_weights_in_an_order_of_the_seed(tmp_path):
    graded = [{"prompt": f"a={i}\na?", "responses": [f"a={i}", "+" * 70 if i % 2 else "a=0"], "rewards": [1, 0],
               "weight": i} for i in range(1, 13)]  # fmt: skip
    data, orders = write_rows(tmp_path / "rows.jsonl", graded), []
    for seed in (1, 2):
        make(tmp_path / "data", "--own_answers", 0, "--data", data, "--seed", seed)
        rows = read_rows(tmp_path / "data" / "pairs.jsonl")
        assert {r["rejected"] for r in rows} == {"a=0"}
        orders.append([int(r["chosen"].removeprefix("a=")) for r in rows])
        assert [r["weight"] for r in rows] == orders[-1] and sorted(orders[-1]) == [2, 4, 6, 8, 10, 12]
    assert orders[0] != orders[1]


def test_problems_that_share_words_with_a_benchmark_are_left_out_and_counted(tmp_path, capsys):
    def row(prompt):
        return {"prompt": prompt, "responses": ["a=5", "a=6"], "rewards": [1, 0]}

    words = [f"w{i}" for i in range(20)]
    rows = [row(" ".join(words[:12])), row("X " + " ".join(words[3:16]).upper()), row("a=5\na?"), row("b=5\nb?")]
    benchmark = [{"prompt": [{"role": "user", "content": " ".join(words)}]}, {"problem": "b=5\nb?"}]
    named = write_rows(tmp_path / "bench.jsonl", benchmark)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    make(tmp_path / "data", "--own_answers", 0, "--data", data, "--decontaminate", named)
    assert f"-2  shares 13 words with {named}" in capsys.readouterr().out
    kept = [row["prompt"][0]["content"] for row in read_rows(tmp_path / "data" / "pairs.jsonl")]
    assert sorted(kept) == sorted([" ".join(words[:12]), "a=5\na?"])
    with pytest.raises(InputError, match="--ngram must be positive"):  # 0 words in a row would leave nothing out
        make(tmp_path / "data", "--data", data, "--decontaminate", named, "--ngram", 0)
    with pytest.raises(InputError, match="bench.jsonl: no rows"):  # would leave nothing out
        make(tmp_path / "data", "--data", data, "--decontaminate", write_rows(tmp_path / "bench.jsonl", []))
    with pytest.raises(InputError, match="bench.jsonl, row 0: no shape of row"):
        broken = write_rows(tmp_path / "bench.jsonl", [{"answer": 1}])
        make(tmp_path / "data", "--data", data, "--decontaminate", broken)


def test_own_answers_take_the_first_of_the_kind_that_lacks_and_spoil_no_trace(tmp_path, monkeypatch, world):
    tokenizer = load_tokenizer("models/tiny")
    texts = tokenizer(["a=1", "a=2", "\\boxed{3}"], add_special_tokens=False)["input_ids"]
    answers = [[*ids, tokenizer.eos_token_id] for ids in texts]

    class Three(Asked):
        def generate(self, prompts, *, sampling, drawn, **_):
            assert sampling.temperature == 1
            for i in range(len(prompts)):
                drawn(i, [Completion(ids, [0.0] * len(ids), "stop") for ids in answers])

    monkeypatch.setattr("common.run.open_sampler", lambda *_: Three())
    turns = [{"role": "user", "content": "a=1\na?"}]
    problems = [Item(turns, "", "9", [Trace("x")]), Item(turns, "", "9", [Trace("y", 0.0)]),
                Item(turns, "", "3", [Trace("z", 0.0)])]  # fmt: skip
    args = Args(model="models/tiny", out=str(tmp_path), verifier="boxed", own_answers=3)
    redi_data.add_own_answers(problems, tokenizer, args, ONE_RANK)
    assert problems[0].first(correct=False) == Trace("a=1", 0.0, answers[0])
    assert problems[0].first(correct=True) == Trace("x")
    assert problems[1].first(correct=False) == Trace("y", 0.0) and not problems[1].first(correct=True)
    assert problems[2].first(correct=True) == Trace("\\boxed{3}", 1.0, answers[2])
    assert problems[2].first(correct=False) == Trace("z", 0.0)


@pytest.mark.parametrize(
    ("reward", "status", "truncated", "kind"),
    [(1.0, "ok", False, "right"), (0.0, "ok", False, "wrong"), (-1.0, "ok", False, "wrong"),
     (0.0, "unparsable", False, "wrong"), (0.0, "timeout", False, "not graded"), (0.0, "error", False, "not graded"),
     (1.0, "ok", True, "cut short"), (0.0, "unparsable: gold unreadable", False, "not graded")],
)  # fmt: skip
def test_an_own_answer_is_right_if_its_reward_is_positive_and_wrong_only_if_it_was_graded(
    reward, status, truncated, kind
):
    status, _, detail = status.partition(": ")
    answer = {"reward": reward, "status": status, "truncated": truncated, "detail": detail or None}
    assert redi_data.kind_of(answer) == kind


def test_a_prompt_of_the_limits_length_is_asked_for_own_answers(tmp_path, monkeypatch):
    tokenizer, asked = load_tokenizer("models/tiny"), []
    monkeypatch.setattr(redi_data, "keep_answers", lambda path, examples, *_, **__: asked.append(examples) or [])
    problems = [Item([{"role": "user", "content": "a=1\na?"}], "", "9", [Trace("x")])]
    [(*_, prompt)] = redi_data.encode(problems, tokenizer, lambda item, where: (item,), source="")
    for limit in (len(prompt), len(prompt) - 1):
        args = Args(model="models/tiny", out=str(tmp_path), own_answers=3, max_prompt_tokens=limit)
        with contextlib.suppress(ValueError):  # no answers came
            redi_data.add_own_answers(problems, tokenizer, args, ONE_RANK)
    assert [len(examples) for examples in asked] == [1, 0]


def test_a_prompt_that_is_rendered_gets_no_template(tmp_path, monkeypatch):
    """OREO's rows hold it as text beside a response and its reward. It is asked and written as it is."""
    tokenizer = load_tokenizer("models/tiny")
    shown = "<|user|>a=5\na?<|assistant|><think>\n"
    prompt = tokenizer(shown, add_special_tokens=False)["input_ids"]
    asked = []

    class One(Asked):
        def generate(self, prompts, *, drawn, **_):
            asked.extend(prompts)
            drawn(0, [Completion([*tokenizer("a=6")["input_ids"], tokenizer.eos_token_id], [0.0] * 3, "stop")])

    monkeypatch.setattr("common.run.open_sampler", lambda *_: One())
    graded = [{"prompt": shown, "response": "a=5", "reward": 1, "answer": "5"}]
    make(tmp_path / "data", "--own_answers", 1, "--data", write_rows(tmp_path / "rows.jsonl", graded))
    assert asked == [prompt]
    for stage, name in (("sft", "positives"), ("redi", "pairs")):
        rows = read_rows(tmp_path / "data" / f"{name}.jsonl")
        [pair], _ = redi.make_pairs(rows, tokenizer, settings("--stage", stage), source=name)
        assert list(pair.prompt) == prompt


def test_without_a_pair_the_remedy_is_named(tmp_path):
    graded = [{"prompt": "p", "responses": ["x"], "rewards": [1]}]
    with pytest.raises(InputError, match="no pair is left .*--own_answers samples"):
        make(tmp_path / "data", "--own_answers", 0, "--data", write_rows(tmp_path / "rows.jsonl", graded))
    assert not (tmp_path / "data").exists()


def test_own_answers_are_sampled_once_for_the_same_model_and_settings(tmp_path, monkeypatch):
    def made():
        return (tmp_path / "data" / "pairs.jsonl").read_bytes()

    words = ["--igsm_problems", 4, "--own_answers", 2]
    make(tmp_path / "data", *words)
    before = made()
    (tmp_path / "data" / "pairs.jsonl").unlink()
    monkeypatch.setattr(redi_data, "load_policy", None)  # not needed again
    make(tmp_path / "data", *words)
    assert made() == before
    with pytest.raises(TypeError):
        make(tmp_path / "data", *words, "--seed", 43)
    given = [igsm.row(problem, "train") for problem in igsm.generate(4, ops=(1, 2), style="symbolic", modulus=23)]
    monkeypatch.undo()
    for gold in ("1", "2"):  # other golds, other answers
        rows = [row | {"reward_model": {"ground_truth": gold}} for row in given]
        make(tmp_path / "data", *words, "--data", write_rows(tmp_path / "rows.jsonl", rows))
