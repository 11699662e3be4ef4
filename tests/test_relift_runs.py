"""relift.py from end to end on models that train in seconds: the buffer at work, ranks, a crash, bad input."""

import json
import math

import pytest
import torch

import relift
from common import metrics, verifiers
from common.data import InputError
from common.metrics import read_metrics
from common.verifiers import Verdict
from tests import relift_ranks
from tests.conftest import run_script
from tests.relift_ranks import SMALL, TOKENS, VECTORS, settings
from tests.test_luffy_runs import toy_rows, write

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


@pytest.fixture(autouse=True)
def only_one_test_draws_curves(request, monkeypatch):
    """Drawing takes longer than training here."""
    if "leaves_a_run_folder[relift]" not in request.node.name:
        monkeypatch.setattr(metrics, "plot_curves", lambda *_: None)


def run(tmp_path, *words):
    relift.main(settings("--out", tmp_path / "run", *words))
    return read_metrics(tmp_path / "run")


# --------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", ["relift", "grpo", "sft"])
def test_every_method_trains_and_leaves_a_run_folder(method, tmp_path):
    rows = run(tmp_path, "--method", method)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert {"eval/mean", "eval/length", "optim/grad_norm", "seconds/step"} <= rows[-1].keys()
    demonstrations = {"relift": [0, 7, 7], "grpo": [0, 0, 0], "sft": [4, 8, 12]}[method]
    assert [row["sft/demonstrations"] for row in rows[1:]] == demonstrations
    assert ("sft/loss" in rows[2]) == (method != "grpo") and ("sft/grad_norm" in rows[2]) == (method == "relift")
    assert ("reward/own" in rows[-1]) == (method != "sft")
    for name in ("args.json", "samples.jsonl", "model/model.safetensors", "model/tokenizer.json"):
        assert (tmp_path / "run" / name).exists()
    assert (tmp_path / "run" / "curves.png").exists() == (method == "relift")


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
    data = write(tmp_path / "rows.jsonl", [{k: v for k, v in row.items() if k != "target"} for row in toy_rows()])
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
    relift.main(settings(*FEW, "--no_verify_demonstrations", "--out", tmp_path / "unseen"))
    rows = read_metrics(tmp_path / "unseen")
    assert rows[-1]["buffer/size"] + rows[-1]["sft/demonstrations"] == 12


def test_demonstrations_of_which_the_verifier_accepts_none_are_warned_of(tmp_path, monkeypatch, capsys):
    words = ("--steps", "1", "--sft_data_size", "2", "--eval_every", "0", "--save_every", "0")
    run(tmp_path, *words)
    assert "WARNING" not in capsys.readouterr().out
    grade_by(monkeypatch, lambda texts, golds, **_: [Verdict(0.0, "ok") for _ in texts])
    run(tmp_path / "none", *words)
    assert "WARNING: --verifier accepts none of the first 64 demonstrations" in capsys.readouterr().out


def test_a_question_without_a_demonstration_is_warned_of_skipped_and_counted(tmp_path, capsys):
    bare = [dict(row) for row in toy_rows(4)]
    bare[0]["target"], bare[1]["target"] = None, ""
    bare[2]["target"], bare[3]["target"] = [], [{"role": "assistant", "content": "a=5 " * 30}]
    rows = toy_rows(7) + bare + [{k: v for k, v in toy_rows(1)[0].items() if k != "target"}]
    data = write(tmp_path / "rows.jsonl", rows)
    logged = run(tmp_path, *FEW, "--data", data, "--sft_on", "all", "--sft_data_size", "7", "--save_every", "3")
    assert "warning: 5 of 12 questions have no demonstration" in capsys.readouterr().out
    assert sum(row["buffer/no_demonstration"] for row in logged) == 5
    assert logged[-1]["buffer/size"] + logged[-1]["sft/demonstrations"] == 7
    logged = run(tmp_path / "sft", *FEW, "--data", data, "--method", "sft", "--steps", "2", "--batch_size", "7")
    assert [row["sft/demonstrations"] for row in logged] == [7, 14]  # sft trains on the others alone


def test_hardest_questions_are_counted_whether_or_not_their_demonstration_is_accepted(tmp_path, monkeypatch):
    grade_by(monkeypatch, picky)
    rows = run(tmp_path, *FEW)
    assert [row["group/hardest"] for row in rows] == [1.0] * 3 and any(row["buffer/rejected"] for row in rows)


def test_demonstrations_are_counted_over_a_resume_and_those_of_a_skipped_update_are_not(tmp_path, monkeypatch):
    grade_by(monkeypatch, mixed)
    words = [*FEW, "--sft_on", "all", "--sft_data_size", "4", "--save_every", "1"]
    run(tmp_path, *words, "--steps", "1")
    assert [row["sft/demonstrations"] for row in run(tmp_path, *words, "--steps", "2")] == [4, 8]
    real = relift.Run.update
    monkeypatch.setattr(relift.Run, "update", lambda self, name, *given, **named: (
        name != "sft" and real(self, name, *given, **named)))  # fmt: skip
    rows = run(tmp_path, *words, "--steps", "3")
    assert [(row["sft/demonstrations"], row["sft/fired"]) for row in rows] == [(4, 1), (8, 1), (8, 0)]


# ----------------------------------------------------------------------------------------------------- ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What tests/relift_ranks.py writes on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    run_script("tests/relift_ranks.py", folder, ranks=2)
    return folder


@pytest.mark.parametrize("kind", ["rl", "sft"])
def test_the_gradient_is_the_same_for_one_and_two_ranks_and_any_micro_batches(two_ranks, world, kind):
    expected, metrics = relift_ranks.gradient(world, kind, 10_000)
    size = max(g.abs().max().item() for g in expected.values())
    for tokens in TOKENS:
        one, one_metrics = relift_ranks.gradient(world, kind, tokens)
        two, two_metrics = torch.load(two_ranks / f"{kind}-{tokens}.pt")
        for name, value in expected.items():
            torch.testing.assert_close(one[name], value, rtol=0, atol=2e-6 * size)
            torch.testing.assert_close(two[name], value, rtol=0, atol=2e-6 * size)
        assert one_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        assert two_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", VECTORS["sft_update_policy"]["cases"])
def test_an_sft_update_on_two_ranks_is_the_published_one_of_one_rank(two_ranks, name):
    """The published one is half as large on two ranks."""
    case = VECTORS["sft_update_policy"]["cases"][name]
    table = torch.tensor(case["W_before"], dtype=torch.float64) - case["lr"] * torch.load(two_ranks / f"{name}.pt")
    torch.testing.assert_close(table, torch.tensor(case["W_after"], dtype=torch.float64), rtol=0, atol=1e-9)


def test_two_ranks_log_what_one_rank_logs_and_one_rank_goes_on_from_their_checkpoint(two_ranks, tmp_path):
    words = ["--steps", "5", "--eval_every", "1"]
    relift.main(settings(*words, "--out", two_ranks / "two"))  # from step 3 of the two ranks
    one, two = run(tmp_path, *words), read_metrics(two_ranks / "two")
    assert len(two) == 6 and [row.get("sft/fired") for row in two] == [None, 0, 1, 0, 1, 0]
    skip = ("seconds/", "memory/", "speed/", "mismatch/")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if not name.startswith(skip):
                assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-5), (a["step"], name)


# --------------------------------------------------------------------------------------------------- a crash


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "no/such.jsonl"], "no/such.jsonl: no such file"),
        (["--data", "igsm:lots"], "igsm:LO-HI"),
        (["--batch_size", "5"], "--batch_size 5 is not a multiple of --updates_per_step 2"),
        (["--batch_size", "400"], "40 rows are fewer than --batch_size 400"),
        (["--model", "no/such/model"], "--model no/such/model"),
        (["--sft_data_size", "0"], "--sft_data_size must be positive, or -1 for RL alone, not 0"),
        (["--sft_data_size", "41"], "only 40 questions have a demonstration, and the buffer holds each once"),
        (["--sft_every", "1", "--sft_data_size", "-1"], "-1 is RL alone"),
        (["--sft_every", "-1"], "--sft_every must be 0 or more and finite, not -1"),
        (["--temperature", "0"], "--temperature must be positive"),
        (["--verifier", "oops"], "--verifier oops: no verifier 'oops': math, "),
        (["--hard_threshold", "1.5"], "--hard_threshold must be between 0 and 1, not 1.5"),
        (["--max_response_tokens", "3"], "no row has a demonstration \\(column 'target', at most .* 3\\)"),
    ],
)
def test_bad_settings_get_one_message_before_anything_is_written(tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        relift.main(settings(*words, "--out", tmp_path / "run"))
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize("method", ["relift", "sft"])
@pytest.mark.parametrize("target", [None, "", "missing"])
def test_data_without_any_demonstration_is_an_error_before_training(tmp_path, method, target):
    rows = toy_rows(target=target)
    if target == "missing":
        rows = [{k: v for k, v in row.items() if k != "target"} for row in rows]
    data = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match="no row has a demonstration .* RL alone is --method grpo"):
        relift.main(settings("--method", method, "--data", data, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_bad_input_exits_with_code_2_and_one_line(tmp_path):
    data = write(tmp_path / "rows.jsonl", toy_rows(target=None))
    result = run_script("relift.py", *SMALL, "--data", data, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(f"relift.py: error: --data {data}: no row has")
