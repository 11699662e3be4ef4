"""What is counted, logged and kept: metrics of a step, verdicts, pairs that are made of a model's own answers."""

import random

import pytest

import behavior_injection as bridge
import igsm
import luffy
import oreo
import redi
from common import report
from common.data import InputError
from common.metrics import Metrics
from common.rows import Example, report_golds
from common.trainer import load_tokenizer
from common.verifiers import Verdict
from tests import oreo_ranks
from tests.test_luffy_math import ONE_RANK
from tests.test_wiring import Asked


class Says:
    """A tokenizer whose one-token texts are given."""

    chat_template = None

    def __init__(self, *texts):
        self.texts = texts

    def decode(self, ids):
        return self.texts[ids[0]]


# ------------------------------------------------------------------------------------------- metrics of a step


def test_what_is_logged_of_rows():
    told = ((0, 1.0), (0, 0.0), (1, 0.0), (1, 0.0), (2, 1.0), (3, 0.0))
    own = [luffy.Row([1], [1], group, reward=reward, status="ok") for group, reward in told]
    teacher = luffy.Row([1], [1], 1, True, reward=1.0, status="ok")  # does not make its question a solved one
    log = luffy.describe([*own, teacher])
    assert (log["group/solve_all"], log["group/solve_none"], log["reward/own"]) == (0.25, 0.5, 2 / 6)


def test_what_is_logged_of_values():
    told = ((1.0, 0.9), (0.0, 0.2))
    rows = [oreo.Row([1], [1], [True], [True], reward, 0, last_value=value) for reward, value in told]
    log = oreo.describe(rows, oreo.Args())
    assert (log["value/right"], log["value/wrong"]) == (0.9, 0.2)


def test_what_is_logged_of_pairs():
    a = redi.Pair([1], [1, 2], [1], 2.0, 0, (-3.0, -5.0), loss=0.5, logp=(-1.0, -4.0), entropy=(0.1, 0.2))
    b = redi.Pair([1], [1], [], 1.0, 1, loss=-0.25, logp=(-2.0, 0.0), entropy=(0.3, 0.0))
    log = redi.describe([a, b], redi.Args(loss="dpo", beta=0.5))
    assert log["loss/mean"] == (2 * 0.5 - 0.25) / 1.5
    assert (log["logp/chosen"], log["logp/rejected"], log["logp/gap"], log["pair/accuracy"]) == (-1.5, -4.0, 3.0, 1.0)
    assert log["reward/margin"] == 0.5 * ((2 * -1.0 + 3.0) - (1 * -4.0 + 5.0))


# --------------------------------------------------------------------------------------------- tests of models


def test_the_tests_of_an_arm_are_graded_at_both_temperatures_and_by_steps(monkeypatch):
    drawn = igsm.problems(40, ops=(2, 3), style="symbolic", modulus=23, max_params=4, max_literal=9, shuffle=False)
    first, second = [p for p in drawn if p.answer][:2]
    corrupted = igsm.corrupt(first.solution, random.Random(0), 23)
    wrong_step = corrupted.rpartition("\n")[0] + "\n" + first.solution.rpartition("\n")[2]  # a right box after it
    tokenizer, said = Says(first.solution, "no", wrong_step, second.solution), {0.0: 0, 0.6: 2}
    examples = [Example([1], None, str(p.answer), "t", i, "") for i, p in enumerate((first, second))]
    questions = [problem.question for problem in (first, second)]
    monkeypatch.setattr(bridge, "load_tokenizer", lambda *_: tokenizer)
    monkeypatch.setattr(bridge, "load_policy", lambda *_: None)
    monkeypatch.setattr(bridge, "open_sampler", lambda *_: Asked())
    monkeypatch.setattr(bridge, "read_set", lambda *_, **options: (examples, {}))
    monkeypatch.setattr(bridge, "read_questions", lambda *_: questions)

    def sample_rows(sampler, batch, mine, counts, args, world, *, seed, grader):
        rows = [bridge.Row([1], [said[args.temperature] + g, 1], g, example=batch[g]) for g in mine]
        grader.add(rows)
        return rows

    monkeypatch.setattr(bridge, "sample_rows", sample_rows)
    args = bridge.Args(eval_temperature=0.6, modulus=23, verifier="boxed", format_reward=0.05)
    found = bridge.test_model("m", args, ONE_RANK)["test_id"]
    assert (found["greedy"], found["accuracy"], found["chain"]) == (0.5, 1.0, 0.5)
    assert (found["accuracy_other"], found["accuracy_zero"]) == (1.0, None)


def test_answers_that_were_not_graded_in_time_are_graded_again():
    verdicts = ([0.0, "timeout"], [0.0, "error"], [0.0, "ok"])
    answers = [{"text": "\\boxed{5}", "verdicts": {"boxed": verdict}} for verdict in verdicts]
    record = {"gold": "5", "answers": answers, "graded_by": {"boxed": report.grader_version("boxed")}}
    report.give_verdicts([record], "boxed")
    assert [a["verdicts"]["boxed"] for a in answers] == [[1.0, "ok"], [1.0, "ok"], [0.0, "ok"]]


@pytest.mark.parametrize("reward", [0.5, -1.0])
def test_a_reward_between_or_below_is_refused(reward, monkeypatch):
    monkeypatch.setattr(report, "grade", lambda texts, golds, verifier: [Verdict(reward, "ok")] * len(texts))
    with pytest.raises(InputError, match=f"a reward of {reward}"):
        report.give_verdicts([{"gold": "5", "answers": [{"text": "x"}]}], "boxed")


def test_a_gold_that_the_verifier_cannot_read_is_named_by_row_once(capsys):
    examples = [Example([1], None, "1/2/", "math", i, "") for i in (3, 3, 4)]
    cannot = Verdict(0.0, "unparsable", "gold unreadable: 1/2/")
    for _ in range(2):
        report_golds(examples, [cannot, cannot, Verdict(0.0, "unparsable", "no answer in the response")])
    said = capsys.readouterr().err
    assert said.splitlines() == [
        "warning: math, row 3: gold unreadable: 1/2/; every response to it counts as wrong"
    ]
    row = luffy.Row([1], [1], 0, reward=0.0, status="unparsable", detail=cannot.detail, example=examples[0])
    shown = row.shown(load_tokenizer("models/tiny"))
    assert shown["detail"] == "gold unreadable: 1/2/"


# ------------------------------------------------------------------------------------------- rows to learn from


def test_rejection_trains_on_right_answers_alone(tmp_path):
    answers = [f'{{"prompt": "a=5\\na?", "response": "a={5 + i}", "reward": {int(i == 0)}}}\n' for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(answers))
    args = oreo_ranks.settings("models/tiny", "--stage", "rejection", "--rows", tmp_path / "rows.jsonl")
    units, _ = oreo.training_units(load_tokenizer("models/tiny"), args, False)
    assert [row.reward for unit in units for row in unit] == [1.0]


def test_traces_that_the_verifier_all_refuses_are_said_once_and_lengths_have_panels_of_their_own(tmp_path, capsys):
    metrics = Metrics(tmp_path, luffy.Args(), ONE_RANK, start=0, steps=3)
    for step in (1, 2):
        log = {"reward/teacher": 0.0, "eval/mean": 0.5, "eval/b": 0.4, "eval/length": 900.0, "length/own": 900.0}
        metrics.log(step, log | {"length/truncated": 0.1}, [])
    assert capsys.readouterr().err.count("--verifier accepts none of the traces") == 1
    titles = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.axes.Axes.set_title", lambda self, title, **_: titles.append(title))
        metrics.close()
    assert titles == ["eval/b and eval/mean", "eval/length", "length/own", "length/truncated", "reward/teacher"]
