"""What is counted, logged and kept: metrics of a step, verdicts, pairs that are made of a model's own answers."""

import dataclasses
import itertools
import json
import math
import random
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import pytest
import torch

import behavior_injection as bridge
import igsm
import luffy
import oreo
import redi
from benchmarks import vs_trl
from common import report
from common.data import InputError
from common.metrics import Clock, Metrics, line_style, peak_memory_gb, plot_curves, read_metrics, write_whole
from common.rows import Example, report_golds
from common.trainer import load_tokenizer
from common.verifiers import Verdict
from tests import oreo_ranks
from tests.ranks import ONE_RANK
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
    own[0].truncated = True
    ungraded = luffy.Row([1], [1] * 5, 3, True, advantage=9.0)
    teacher.response, teacher.advantage = [1] * 3, 0.5
    log = luffy.describe([*own, teacher, ungraded])
    assert log["length/truncated"] == 1 / 6  # of own answers
    assert (log["length/own"], log["length/teacher"]) == (1, 4)
    assert (log["reward/teacher"], log["teacher/advantage"]) == (1.0, 0.5)  # of graded traces
    assert (log["group/solve_all"], log["group/solve_none"], log["reward/own"]) == (0.25, 0.5, 2 / 6)


def test_what_is_logged_of_pairs():
    a = redi.Pair([1], [1, 2], [1], 2.0, 0, (-3.0, -5.0), loss=0.5, logp=(-1.0, -4.0), entropy=(0.1, 0.2))
    b = redi.Pair([1], [1], [], 1.0, 1, loss=-0.25, logp=(-2.0, 0.0), entropy=(0.3, 0.0))
    log = redi.describe([a, b], redi.Args(loss="dpo", beta=0.5))
    assert log["loss/mean"] == (2 * 0.5 - 0.25) / 1.5
    assert (log["logp/chosen"], log["logp/rejected"], log["logp/gap"], log["pair/accuracy"]) == (-1.5, -4.0, 3.0, 1.0)
    assert log["reward/margin"] == 0.5 * ((2 * -1.0 + 3.0) - (1 * -4.0 + 5.0))
    assert (log["entropy/chosen"], log["entropy/rejected"]) == (0.2, 0.2)
    assert (log["length/chosen"], log["length/rejected"]) == (1.5, 1)
    shown = a.shown(Says(*"abc"))
    assert (shown["chosen_logp"], shown["rejected_logp"], shown["weight"]) == (-1.0, -4.0, 2.0)


def test_what_is_logged_of_rows_with_tokens_of_an_environment():
    """Means over actions alone."""
    row = oreo.Row([1], [1, 2, 3, 4], [True, False, True, False], [True, False, True, False], 1.0)
    vars(row).update(oreo.measurements(row, torch.tensor([-3.0, 0.5, 0.8]), torch.tensor([0.1, 0.2, 0.3, 0.4])))
    log = oreo.describe([row], oreo.Args())
    assert (log["policy/logp"], log["length"]) == (-1.5, 4)
    found = (log["policy/kl"], log["value/first"], log["value/right"], log["log_ratio/right"])
    assert found == pytest.approx((0.4, 0.1, 0.4, 0.5))
    wrong = oreo.Row([1], [1], [True], [True], 0.0, 0, last_value=0.2)
    log = oreo.describe([row, wrong], oreo.Args())
    assert (log["value/right"], log["value/wrong"]) == pytest.approx((0.4, 0.2))


def test_seconds_are_those_since_the_last_step_and_an_act_may_come_twice(monkeypatch):
    now = iter([10.0, 11.0, 13.0, 14.0, 18.0, 20.0, 25.0])
    monkeypatch.setattr("common.metrics.time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock = Clock()
    with clock("reward"):
        pass
    with clock("reward"):
        pass
    seconds = clock.flush()
    assert seconds == {"seconds/reward": 2.0 + 4.0, "seconds/step": 20.0 - 10.0}


def test_the_second_step_is_timed_from_the_end_of_the_first(monkeypatch):
    now = iter([10.0, 12.0, 12.0, 15.0, 15.0])
    monkeypatch.setattr("common.metrics.time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock = Clock()
    assert [clock.flush()["seconds/step"] for _ in range(2)] == [2.0, 3.0]


def test_memory_is_in_gigabytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    now = pages * resource.getpagesize() / 1e9
    assert 0.9 * now < peak_memory_gb(ONE_RANK) < 1000 * now


def test_the_comparison_with_trl_counts_memory_as_metrics_do(monkeypatch):
    monkeypatch.setattr(vs_trl.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(vs_trl, "make_rows", lambda *_: [])
    monkeypatch.setattr(vs_trl, "Bare", lambda *_: SimpleNamespace(step=lambda *_, **__: 0))
    found = vs_trl.peak("sft", "equal", "small", "bare")
    assert found["peak_gb"] == pytest.approx(peak_memory_gb(ONE_RANK), rel=1e-3)  # Linux counts 1,024 bytes


def test_a_metric_of_zero_is_logged_and_curves_are_over_steps(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, x, y, **_: drawn.append((x, y)))
    metrics = Metrics(tmp_path, luffy.Args(), ONE_RANK, start=0, steps=9)
    for step in (3, 6):
        metrics.log(step, {"reward/own": 0.0, "eval/mean": None}, [])
    metrics.close()
    assert read_metrics(tmp_path) == [{"step": 3, "reward/own": 0.0}, {"step": 6, "reward/own": 0.0}]
    assert drawn == [((3, 6), (0.0, 0.0))]


def test_the_curves_of_several_runs_are_told_apart_by_name(tmp_path, monkeypatch):
    drawn, runs = [], {name: tmp_path / name for name in "ab"}
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *_, **__: drawn.append(self))
    for folder in runs.values():
        write_whole(folder / "metrics.jsonl", '{"step": 3, "eval/mean": 0.5, "eval/x": 0.25}\n')
    plot_curves(runs, [["reward/own"], ["eval/mean"], ["eval/mean", "eval/x"]], tmp_path / "two.png")
    plot_curves({"a": runs["a"]}, None, tmp_path / "one.png")
    legends = [[[text.get_text() for text in axis.get_legend().get_texts()] for axis in f.axes] for f in drawn]
    both = [f"{run}: {name}" for run in "ab" for name in ("eval/mean", "eval/x")]
    assert legends == [[["a", "b"], both], [["eval/mean", "eval/x"]]]


def test_dollars_in_the_name_of_a_run_or_benchmark_are_no_formula(tmp_path):
    name = r"a$\b$"  # no command that matplotlib knows
    write_whole(tmp_path / "metrics.jsonl", json.dumps({"step": 3, f"eval/{name}": 0.5, "eval/b": 0.5}) + "\n")
    plot_curves({name: tmp_path}, None, tmp_path / "one.png")
    plot_curves({name: tmp_path, "b": tmp_path}, [[f"eval/{name}"]], tmp_path / "two.png")
    report.plot_bars({name: {name: (0.5, None)}, "b": {name: (0.5, None)}}, tmp_path / "bars.png")
    assert {file.name for file in tmp_path.glob("*.png")} == {"one.png", "two.png", "bars.png"}


def test_a_run_whose_name_begins_with_an_underscore_is_in_the_legend(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *_, **__: drawn.append(self))
    write_whole(tmp_path / "metrics.jsonl", '{"step": 3, "eval/mean": 0.5}\n')
    plot_curves({"_old": tmp_path, "b": tmp_path}, [["eval/mean"]], tmp_path / "two.png")
    report.plot_bars({"_old": {"math": (0.5, None)}, "b": {"math": (0.5, None)}}, tmp_path / "bars.png")
    names = [[text.get_text().strip() for text in figure.legends[0].get_texts()] for figure in drawn]
    assert names == [["_old", "b"]] * 2


def test_a_run_has_one_style_in_all_panels_and_one_entry_in_the_legend_below(tmp_path, monkeypatch):
    drawn, runs = [], {name: tmp_path / name for name in "ab"}
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *_, **__: drawn.append(self))
    write_whole(runs["a"] / "metrics.jsonl", '{"step": 3, "eval/mean": 0.5}\n')
    write_whole(runs["b"] / "metrics.jsonl", '{"step": 3, "eval/mean": 0.5, "value/right": 0.25}\n')
    plot_curves(runs, [["eval/mean"], ["value/right"]], tmp_path / "two.png")
    (mean, right), [legend] = drawn[0].axes, drawn[0].legends
    assert [(line.get_color(), line.get_linestyle()) for line in mean.lines] == [("C0", "-"), ("C1", "--")]
    assert [(line.get_color(), line.get_linestyle()) for line in right.lines] == [("C1", "--")]
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"] and not mean.get_legend()


def test_thirty_lines_of_a_plot_look_different():
    assert len({tuple(line_style(k).values()) for k in range(30)}) == 30


def test_a_run_that_logged_nothing_ends_without_curves(tmp_path):
    Metrics(tmp_path, luffy.Args(), ONE_RANK, start=0, steps=9).close()
    assert read_metrics(tmp_path) == [] and not (tmp_path / "curves.png").exists()


def test_ranks_but_the_first_write_nothing(tmp_path):
    metrics = Metrics(tmp_path, luffy.Args(), SimpleNamespace(main=False), start=0, steps=9)
    metrics.log(1, {"reward/own": 0.5}, [])
    metrics.samples(1, [{"text": "a"}])
    metrics.to_disk()
    metrics.draw()
    metrics.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("start", "kept"), [(0, []), (1, [0, 1])])
def test_a_run_that_begins_anew_keeps_no_row_and_one_that_resumes_keeps_those_before(start, kept, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(3)))
    Metrics(tmp_path, luffy.Args(), ONE_RANK, start=start, steps=9)
    assert [row["step"] for row in read_metrics(tmp_path)] == kept


def test_the_progress_bar_shows_the_step_and_what_was_logged(tmp_path):
    metrics = Metrics(tmp_path, luffy.Args(), ONE_RANK, start=0, steps=9)
    metrics.bar = MagicMock(n=2)
    metrics.log(6, {"reward/own": 0.25}, ["reward/own", "eval/mean"])
    assert metrics.bar.set_postfix.call_args[0] == ({"reward/own": "0.25"},)
    assert metrics.bar.update.call_args == call(4)


def test_half_a_character_does_not_keep_a_file_from_being_written(tmp_path):
    write_whole(tmp_path / "a.md", "x\ud800y")
    assert (tmp_path / "a.md").read_text() == "x\\ud800y"


# --------------------------------------------------------------------------------------------- tests of models


def test_the_tests_of_an_arm_are_graded_at_both_temperatures_and_by_steps(monkeypatch):
    drawn = igsm.problems(40, ops=(2, 3), style="symbolic", modulus=23, max_params=4, max_literal=9, shuffle=False)
    first, second = [p for p in drawn if p.answer][:2]
    corrupted = igsm.corrupt(first.solution, random.Random(0), 23)
    wrong_step = corrupted.rpartition("\n")[0] + "\n" + first.solution.rpartition("\n")[2]  # a right box after it
    tokenizer, said = Says(first.solution, "no", wrong_step, second.solution), {0.0: 0, 0.6: 2}
    examples = [Example([1], None, str(p.answer), "t", i, "") for i, p in enumerate((first, second), 1)]
    questions = ["of a row that is left out", *(problem.question for problem in (first, second))]
    monkeypatch.setattr(bridge, "load_tokenizer", lambda *_, **__: tokenizer)
    monkeypatch.setattr(bridge, "load_policy", lambda *_: None)
    monkeypatch.setattr(bridge, "open_sampler", lambda *_: Asked())
    monkeypatch.setattr(bridge, "read_set", lambda *_, **options: (examples, {"rows": 2, "kept": 2}))
    monkeypatch.setattr(bridge, "read_questions", lambda *_: questions)

    def sample_rows(sampler, batch, mine, counts, args, world, *, seed, grader, temperature):
        ids = {g: [said[temperature] + g, *[1] * (1 + bool(temperature))] for g in mine}
        rows = [bridge.Row([1], ids[g], g, example=batch[g]) for g in mine]
        grader.add(rows)
        return rows

    monkeypatch.setattr(bridge, "sample_rows", sample_rows)
    args = bridge.Args(eval_temperature=0.6, modulus=23, verifier="boxed", format_reward=0.05)
    found = bridge.test_model("m", args, ONE_RANK)["test_id"]
    assert (found["greedy"], found["accuracy"], found["chain"]) == (0.5, 1.0, 0.5)
    assert (found["accuracy_other"], found["accuracy_zero"], found["tokens"]) == (1.0, None, 3)


def test_answers_that_were_not_graded_in_time_are_graded_again():
    verdicts = ([0.0, "timeout"], [0.0, "error"], [0.0, "ok"])
    answers = [{"text": "\\boxed{5}", "verdicts": {"boxed": verdict}} for verdict in verdicts]
    record = {"gold": "5", "answers": answers, "graded_by": {"boxed": report.grader_version("boxed")}}
    report.give_verdicts([record], "boxed")
    assert [a["verdicts"]["boxed"] for a in answers] == [[1.0, "ok"], [1.0, "ok"], [0.0, "ok"]]


@pytest.mark.parametrize("count", [1, 256, 257, 512])
def test_every_answer_is_graded_however_many_there_are(count):
    record = {"gold": "5", "answers": [{"text": "\\boxed{5}"} for _ in range(count)]}
    report.give_verdicts([record], "boxed")
    assert [a["verdicts"]["boxed"] for a in record["answers"]] == [[1.0, "ok"]] * count


def test_an_evaluation_with_one_answer_that_was_not_graded_is_refused(tmp_path):
    answers = [{"text": "", "verdicts": {"boxed": [1, "ok"]}}, {"text": ""}]
    (tmp_path / "args.json").write_text('{"questions_digest": ""}')
    (tmp_path / "samples.jsonl").write_text(json.dumps({"id": "q", "answers": answers}) + "\n")
    with pytest.raises(InputError, match="answers without a verdict of boxed"):
        report.load_run(str(tmp_path), "boxed")


def test_what_a_killed_evaluation_left_is_not_taken_for_an_evaluation(tmp_path):
    (tmp_path / "args.json").write_text('{"questions_digest": ""}')
    (tmp_path / "samples.part-0.jsonl").write_text('{"id": "q", "answers": []}\n')
    with pytest.raises(InputError, match="no evaluation there"):
        report.load_run(str(tmp_path))


def test_golds_that_a_second_grader_cannot_read_are_listed_too():
    verdicts = {"boxed": [0, "ok"], "math": [0, "unparsable", "gold unreadable: 1/2/"]}
    records = [{"id": "q", "row": "r.jsonl, row 3", "answers": [{"text": "", "verdicts": verdicts}]}]
    assert report.unreadable_golds(records, ("boxed", "math")) == ["r.jsonl, row 3"]


def test_bars_show_95_percent_intervals(tmp_path, monkeypatch):
    bars = []
    keep = lambda self, at, means, width, *, yerr, **_: bars.append((means, yerr))  # noqa: E731
    monkeypatch.setattr("matplotlib.axes.Axes.bar", keep)
    monkeypatch.setattr("matplotlib.axes.Axes.bar_label", lambda *_, **__: None)
    monkeypatch.setattr("matplotlib.figure.Figure.legend", lambda *_, **__: None)
    report.plot_bars({"run": {"math": (0.5, 0.01), "amc": (0.25, None)}}, tmp_path / "a.png")
    report.plot_bars({"run": {"math": (0.5, 0.03), "amc": (0.25, 0.04)}}, tmp_path / "b.png")
    report.plot_bars({"run": {"math": (0.5, 0.01)}}, tmp_path / "c.png")
    assert bars == [  # the last of several is the average's: sqrt(0.03^2 + 0.04^2) / 2
        ([50, 25, 37.5], [pytest.approx(1.96), 0, 0]), ([50, 25, 37.5], pytest.approx([5.88, 7.84, 4.9])),
        ([50], [pytest.approx(1.96)]),
    ]  # fmt: skip


def test_names_of_runs_that_do_not_fit_beside_each_other_stand_in_several_rows(tmp_path, monkeypatch):
    columns = []
    monkeypatch.setattr("matplotlib.figure.Figure.legend", lambda self, *_, ncols, **__: columns.append(ncols))
    for names in ("ab", ("qwen2.5-math-7b-base", "qwen2.5-math-7b-luffy", "qwen2.5-math-7b-relift")):
        report.plot_bars({name: {"math": (0.5, None)} for name in names}, tmp_path / "a.png")
    assert columns == [6, 2]


def test_a_bar_stands_over_the_name_of_its_benchmark_also_in_a_run_of_fewer(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *_, **__: drawn.append(self))
    runs = {"a": {"math": (0.5, None), "amc": (0.25, None)}, "b": {"amc": (0.75, None)}}
    report.plot_bars(runs, tmp_path / "a.png")
    [axis] = drawn[0].axes
    names = dict(zip(axis.get_xticks(), (label.get_text() for label in axis.get_xticklabels()), strict=True))
    bars = sorted((bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in axis.patches)
    assert [(names[round((a + b) / 2)], high) for a, b, high in bars] == [("math", 50), ("amc", 25), ("amc", 75)]
    assert all(end <= start for (_, end, _), (start, *_) in itertools.pairwise(bars))
    assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > 75


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
        "WARNING: math, row 3: gold unreadable: 1/2/; every response to it counts as wrong"
    ]
    for file in ("a.jsonl", "b.jsonl"):  # of one source
        report_golds([dataclasses.replace(examples[0], where=f"{file}, row 3")], [cannot])
    said = capsys.readouterr().err
    assert "WARNING: a.jsonl, row 3: gold" in said and "WARNING: b.jsonl, row 3: gold" in said
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


@pytest.mark.parametrize(("values", "said"), [
    ({"verifier/timeout": 1.0, "reward/teacher": 0.0}, "reached its deadline on every answer"),
    ({"verifier/eval_timeout": 1.0}, "reached its deadline on every answer"),
    ({"verifier/eval_unparsable": 1.0}, "reads none of the model's own answers"),
    ({"verifier/own_unparsable": 1.0}, "reads none of the model's own answers"),
    ({"reward/teacher": -1.0}, "accepts none of the traces"),
    ({"verifier/timeout": 0.5, "reward/teacher": 0.5}, ""),
])  # fmt: skip
def test_a_verifier_that_never_answers_is_warned_of_by_its_cause(values, said, tmp_path, capsys):
    """Once, however often it happens."""
    metrics = Metrics(tmp_path, luffy.Args(), ONE_RANK, start=0, steps=3)
    for step in (1, 2):
        metrics.log(step, values, [])
    warned = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert len(warned) == (said != "") and all(said in line for line in warned)


def test_unparsable_answers_are_a_share_of_the_models_own():
    rows = [luffy.Row([1], [1], 0, status="unparsable"), luffy.Row([1], [1], 0, True, reward=1.0, status="ok")]
    assert luffy.describe(rows)["verifier/own_unparsable"] == 1
    assert luffy.describe([*rows, luffy.Row([1], [1], 0, status="ok")])["verifier/own_unparsable"] == 0.5


def test_numbers_that_are_not_finite_are_null_in_files_and_half_characters_do_not_stop_a_run(tmp_path):
    metrics = Metrics(tmp_path, luffy.Args(), ONE_RANK, start=0, steps=3)
    text = "ä\ud83d"  # and half a character
    metrics.samples(1, [{"loss": math.nan, "values": [1.0, {"V": math.inf}], "text": text}])
    written = (tmp_path / "samples.jsonl").read_text()
    assert written == '{"step": 1, "loss": null, "values": [1.0, {"V": null}], "text": "ä\\ud83d"}\n'


def test_metrics_also_go_to_tensorboard_and_wandb(tmp_path, monkeypatch):
    board, wandb = MagicMock(), MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args = luffy.Args(tensorboard=True, wandb="project")
    metrics = Metrics(tmp_path, args, ONE_RANK, start=2, steps=3)
    metrics.log(3, {"reward/own": 0.5, "reward/teacher": None}, [])
    metrics.close()
    assert board.SummaryWriter.call_args == call(tmp_path, purge_step=3)  # what a crash left beyond step 2 goes
    assert board.SummaryWriter().add_scalar.call_args_list == [call("reward/own", 0.5, 3)]
    config = dataclasses.asdict(args)
    assert wandb.init.call_args == call(project="project", name=tmp_path.name, config=config, dir=tmp_path)
    assert wandb.init().log.call_args_list == [call({"reward/own": 0.5}, step=3)]
    assert board.SummaryWriter().close.called and wandb.init().finish.called
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        Metrics(tmp_path, args, ONE_RANK, start=0, steps=3)


def test_a_run_that_starts_anew_shows_nothing_of_the_one_before_in_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board := MagicMock())
    Metrics(tmp_path, luffy.Args(tensorboard=True), ONE_RANK, start=0, steps=3)
    assert board.SummaryWriter.call_args == call(tmp_path, purge_step=0)  # the row of step 0 goes too


def test_curves_are_drawn_while_a_run_goes_on_at_most_every_so_often(tmp_path):
    metrics, curves = Metrics(tmp_path, luffy.Args(), ONE_RANK, start=0, steps=3), tmp_path / "curves.png"
    metrics.log(1, {"eval/mean": 0.5}, [])
    metrics.draw(every=60)
    assert not curves.exists()
    metrics.drawn -= 61
    metrics.draw(every=60)
    curves.unlink()
    metrics.draw(every=60)
    assert not curves.exists()


def test_lengths_have_panels_of_their_own(tmp_path, monkeypatch):
    metrics, titles = Metrics(tmp_path, luffy.Args(), ONE_RANK, start=0, steps=3), []
    log = {"reward/teacher": 0.0, "eval/mean": 0.5, "eval/b": 0.4, "eval/length": 900.0, "length/own": 900.0}
    metrics.log(1, log | {"length/truncated": 0.1}, [])
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda self, title, **_: titles.append(title))
    metrics.close()
    assert titles == ["eval/b and eval/mean", "eval/length", "length/own", "length/truncated", "reward/teacher"]
