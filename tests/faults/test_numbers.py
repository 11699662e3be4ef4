"""A NaN stops a run or is skipped and counted, and its batch is kept."""

import importlib
import math

import pytest
import torch

from common import trainer
from common.metrics import read_metrics
from tests.conftest import parsed, read_rows
from tests.faults.harness import RUNS

pytestmark = pytest.mark.usefixtures("without_curves")
POISON = 23  # where this token is predicted, a poisoned log-prob is NaN
real = trainer.linear_logprobs


def run(name, *words):
    """The script's main, in this process."""
    importlib.import_module(name).main(parsed(name, *RUNS[name][1:], *words))


def poison(monkeypatch, calls):
    """Make the log-probs of one token NaN in those forwards with gradient whose numbers are in `calls`; None: all."""
    made = []

    def poisoned(hidden, weight, targets, **options):
        out = real(hidden, weight, targets, **options)
        made.append(torch.is_grad_enabled())
        if not made[-1] or (calls is not None and sum(made) not in calls):  # loading a model proves it without gradient
            return out
        logp = torch.where(targets == POISON, math.nan, out[0] if options.get("entropy") else out)
        return (logp, out[1]) if options.get("entropy") else logp

    monkeypatch.setattr(trainer, "linear_logprobs", poisoned)


@pytest.mark.parametrize("name", ["luffy", "relift", "redi", "oreo", "behavior_injection"])
def test_a_bad_update_stops_the_run_and_its_rows_are_kept(name, tmp_path, monkeypatch):
    words = ["--save_every", "0", "--eval_every", "0", "--steps", "6"]
    poison(monkeypatch, range(5 if name in ("luffy", "relift") else 3, 100))  # the third step or later
    with pytest.raises(FloatingPointError, match=r"step \d: .*log-probs are NaN.* rows of this update are in"):
        run(name, "--out", tmp_path / "run", *words)
    [path] = (tmp_path / "run").glob("**/bad/*.jsonl")
    rows = read_rows(path)
    assert len(rows) > 3 and all(any(isinstance(value, str) and value for value in row.values()) for row in rows)


def test_the_weights_that_a_bad_update_met_are_in_the_checkpoint_before_it(tmp_path, monkeypatch):
    """So the same command meets them again, and without the fault it ends as a run that nothing stopped."""
    words = ["--save_every", "1", "--eval_every", "0", "--steps", "6", "--out"]
    run("luffy", *words, tmp_path / "whole")
    poison(monkeypatch, range(5, 100))
    with pytest.raises(FloatingPointError):
        run("luffy", *words, tmp_path / "run")
    monkeypatch.setattr(trainer, "linear_logprobs", real)
    run("luffy", *words, tmp_path / "run")
    whole, again = (tmp_path / folder / "model" / "model.safetensors" for folder in ("whole", "run"))
    assert whole.read_bytes() == again.read_bytes()


def test_a_bad_update_can_be_skipped_and_is_counted(tmp_path, monkeypatch):
    words = ["--save_every", "0", "--eval_every", "0", "--steps", "4", "--updates_per_step", "1"]
    run("luffy", "--out", tmp_path / "whole", *words)
    poison(monkeypatch, {3})
    run("luffy", "--out", tmp_path / "run", *words, "--skip_bad_updates")
    rows, whole = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "whole")
    assert [row.get("update/skipped", 0) for row in rows] == [0, 0, 1, 1]
    assert "loss/pg" not in rows[2] and "reward/own" in rows[2]
    assert [row["reward/own"] for row in rows[:3]] == [row["reward/own"] for row in whole[:3]]
    assert math.isfinite(rows[3]["optim/grad_norm"]) and (tmp_path / "run" / "model").exists()
