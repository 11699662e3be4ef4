"""relift.py from end to end on models that train in seconds: the buffer at work, ranks, bad input."""

import json

import pytest

import relift
from common import verifiers
from common.data import InputError
from common.metrics import read_metrics
from common.verifiers import Verdict
from tests.conftest import run_script, write_rows
from tests.faults.harness import assert_same_metrics, complete_run
from tests.relift_ranks import SMALL, settings
from tests.test_luffy_runs import toy_rows

pytestmark = pytest.mark.usefixtures("without_curves")
FEW = ["--eval_every", "0", "--log_samples", "0"]


def mixed(texts, golds, *, verifier):
    """A verifier under which groups are hardest or not: demonstrations are right, some own answers too."""
    right = [f"\\boxed{{{gold}}}" in text or sum(map(ord, text)) % 7 == 0 for text, gold in zip(texts, golds)]
    return [Verdict(float(r), "ok") for r in right]


def picky(texts, golds, *, verifier):
    """A verifier that every other demonstration fails, and every own answer."""
    return [Verdict(float(f"\\boxed{{{gold}}}" in text and int(gold) % 2), "ok") for text, gold in zip(texts, golds)]


def grade_by(monkeypatch, verifier):
    monkeypatch.setattr(verifiers, "grade", verifier)


def run(tmp_path, *words):
    relift.main(settings("--out", tmp_path / "run", *words))
    return read_metrics(tmp_path / "run")


# --------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", ["relift", "grpo", "sft"])
def test_every_method_trains_and_leaves_a_run_folder(method, tmp_path):
    run(tmp_path, "--method", method)
    rows = complete_run(tmp_path / "run")
    assert {"eval/mean", "eval/length", "optim/grad_norm", "seconds/step"} <= rows[-1].keys()
    demonstrations = {"relift": [0, 7, 7], "grpo": [0, 0, 0], "sft": [4, 8, 12]}[method]
    assert [row["sft/demonstrations"] for row in rows[1:]] == demonstrations
    assert ("sft/loss" in rows[2]) == (method != "grpo") and ("sft/grad_norm" in rows[2]) == (method == "relift")
    assert ("reward/own" in rows[-1]) == (method != "sft")


def test_the_buffer_takes_what_fails_and_gives_it_to_sft(tmp_path, monkeypatch):
    grade_by(monkeypatch, mixed)
    rows = run(tmp_path, *FEW, "--steps", "6", "--batch_size", "8", "--sft_data_size", "6")
    held = 0
    for row in rows:
        held += round(8 * row["group/hardest"])
        assert row["group/hardest"] == row["group/solve_none"]
        assert row["sft/fired"] == (held >= 6) == ("sft/loss" in row)
        held -= 6 * int(row["sft/fired"])
        assert row["buffer/size"] == held
        assert row["sft/demonstrations"] == 6 * sum(r["sft/fired"] for r in rows[: row["step"]])
    assert 0 < rows[-1]["sft/demonstrations"] < 64 and any(0 < row["group/hardest"] < 1 for row in rows)


def test_without_sft_updates_the_run_is_plain_rl_and_needs_no_demonstration(tmp_path, monkeypatch):
    grade_by(monkeypatch, mixed)
    data = write_rows(tmp_path / "rows.jsonl", [{k: v for k, v in row.items() if k != "target"} for row in toy_rows()])
    rows = run(tmp_path, *FEW, "--sft_data_size", "-1", "--data", data)
    assert not any(name.startswith(("buffer/", "sft/l")) for row in rows for name in row)
    assert rows[-1]["sft/demonstrations"] == 0


@pytest.mark.parametrize(
    ("words", "fired"),
    [
        (["--sft_on", "all"], [1, 1, 1]),
        (["--hard_threshold", "1"], [1, 1, 1]),
        (["--sft_every", "2", "--sft_on", "all"], [0, 1, 0]),
    ],
)
def test_the_ablations_choose_other_questions_or_another_rhythm(tmp_path, monkeypatch, words, fired):
    grade_by(monkeypatch, mixed)
    rows = run(tmp_path, *FEW, "--sft_data_size", "4", *words)
    assert [row["sft/fired"] for row in rows] == fired
    assert rows[-1]["sft/demonstrations"] == 4 * sum(fired)  # with --sft_every too: sft_data_size at most


def test_random_questions_are_as_many_as_the_hardest_but_others(tmp_path, monkeypatch):
    """The same step, with the same rollouts, buffers other questions."""
    grade_by(monkeypatch, mixed)
    held = []
    for sft_on in ("hardest", "random"):
        words = ["--steps", "1", "--save_every", "1", "--batch_size", "8", "--sft_data_size", "40", "--sft_on", sft_on]
        relift.main(settings(*FEW, *words, "--out", tmp_path / sft_on))
        state = json.loads((tmp_path / sft_on / "checkpoint" / "step-00000001" / "state.json").read_text())
        held.append(state["buffer"]["questions"])
    assert 0 < len(held[0]) == len(held[1]) and set(held[0]) != set(held[1])


def test_random_questions_are_others_in_every_step(tmp_path, monkeypatch):
    seeds, real = [], relift.questions_to_buffer
    monkeypatch.setattr(relift, "questions_to_buffer", lambda *given, seed: (
        seeds.append(seed) or real(*given, seed=seed)))  # fmt: skip
    for seed in (1, 2):
        run(tmp_path / str(seed), *FEW, "--steps", "2", "--sft_on", "random", "--seed", seed)
    assert len(set(seeds)) == 4


# -------------------------------------------------------------------------------------------- demonstrations


def test_a_rejected_demonstration_is_skipped_and_counted_unless_none_is_verified(tmp_path, monkeypatch):
    grade_by(monkeypatch, picky)
    rows = run(tmp_path, *FEW)
    rejected, kept = sum(r["buffer/rejected"] for r in rows), rows[-1]["buffer/size"] + rows[-1]["sft/demonstrations"]
    assert rejected > 0 and kept > 0 and rejected + kept == 12
    assert [row["group/hardest"] for row in rows] == [1.0] * 3, "hardest are also questions whose trace is rejected"
    relift.main(settings(*FEW, "--no_verify_demonstrations", "--out", tmp_path / "unseen"))
    rows = read_metrics(tmp_path / "unseen")
    assert rows[-1]["buffer/size"] + rows[-1]["sft/demonstrations"] == 12


def test_demonstrations_of_which_the_verifier_accepts_none_are_warned_of(tmp_path, monkeypatch, capsys):
    words = ("--steps", "1", "--sft_data_size", "2", "--eval_every", "0", "--save_every", "0")
    run(tmp_path, *words)
    assert "WARNING: --verifier" not in capsys.readouterr().err
    grade_by(monkeypatch, lambda texts, golds, **_: [Verdict(0.0, "ok") for _ in texts])
    run(tmp_path / "none", *words)
    assert "WARNING: --verifier accepts none of the first 64 demonstrations" in capsys.readouterr().err


def test_a_question_without_a_demonstration_is_warned_of_skipped_and_counted(tmp_path, capsys):
    bare = [dict(row) for row in toy_rows(4)]
    bare[0]["target"], bare[1]["target"] = None, ""
    bare[2]["target"], bare[3]["target"] = [], [{"role": "assistant", "content": "a=5 " * 30}]
    rows = toy_rows(7) + bare + [{k: v for k, v in toy_rows(1)[0].items() if k != "target"}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    logged = run(tmp_path, *FEW, "--data", data, "--sft_on", "all", "--sft_data_size", "7", "--save_every", "3")
    assert "WARNING: 5 of 12 questions have no demonstration" in capsys.readouterr().err
    assert sum(row["buffer/no_demonstration"] for row in logged) == 5
    assert logged[-1]["buffer/size"] + logged[-1]["sft/demonstrations"] == 7
    logged = run(tmp_path / "sft", *FEW, "--data", data, "--method", "sft", "--steps", "2", "--batch_size", "7")
    assert [row["sft/demonstrations"] for row in logged] == [7, 14]  # sft trains on the others alone


def test_demonstrations_of_a_skipped_update_are_not_counted(tmp_path, monkeypatch):
    real, skipped = relift.Run.update, [False, True, False]

    def update(self, name, *given, **named):
        return not (name == "sft" and skipped.pop(0)) and real(self, name, *given, **named)

    monkeypatch.setattr(relift.Run, "update", update)
    rows = run(tmp_path, *FEW, "--sft_on", "all", "--sft_data_size", "4")
    assert [(row["sft/demonstrations"], row["sft/fired"]) for row in rows] == [(4, 1), (4, 0), (8, 1)]


# ----------------------------------------------------------------------------------------------------- ranks


def test_two_ranks_log_what_one_rank_logs_and_one_rank_goes_on_from_their_checkpoint(tmp_path):
    """The SFT of step 4 trains on what the buffer held after step 3."""
    words, two = ["--steps", "5", "--eval_every", "1"], tmp_path / "two"
    run_script("relift.py", *SMALL, "--eval_every", "1", "--save_every", "3", "--out", two, ranks=2)
    relift.main(settings(*words, "--out", two))
    one = run(tmp_path, *words)
    assert [row.get("sft/fired") for row in one] == [None, 0, 1, 0, 1, 0]
    assert_same_metrics(tmp_path / "run", two)


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch_size", "5"], "--batch_size 5 is not a multiple of --updates_per_step 2"),
        (["--sft_data_size", "0"], "--sft_data_size must be positive, or -1 for RL alone, not 0"),
        (["--sft_data_size", "41"], "only 40 questions have a demonstration, and the buffer holds each once"),
        (["--sft_every", "1", "--sft_data_size", "-1"], "-1 is RL alone"),
        (["--sft_every", "-1"], "--sft_every must be 0 or more and finite, not -1"),
        (["--temperature", "0"], "--temperature must be positive"),
        (["--hard_threshold", "1.5"], "--hard_threshold must be between 0 and 1, not 1.5"),
        (["--max_response_tokens", "3"], "no row has a demonstration \\(column 'target', at most .* 3\\)"),
    ],
)
def test_bad_settings_get_one_message_before_anything_is_written(tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        relift.main(settings(*words, "--out", tmp_path / "run"))
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize("method", ["relift", "sft"])
def test_data_without_any_demonstration_is_an_error_before_training(tmp_path, method):
    data = write_rows(tmp_path / "rows.jsonl", toy_rows(target=None))
    with pytest.raises(InputError, match="no row has a demonstration .* RL alone is --method grpo"):
        relift.main(settings("--method", method, "--data", data, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
