"""A NaN stops a run or is skipped and counted, and its batch is kept."""

import importlib
import json
import math

import pytest
import torch

from common import trainer
from common.metrics import read_metrics
from common.trainer import parse_args
from tests.faults.harness import RUNS

TABLES = {
    "luffy": ("method", "preset"), "relift": ("method", "preset"), "redi": ("stage", "loss", "preset"),
    "oreo": ("stage", "variant", "preset"), "behavior_injection": ("preset",),
}  # fmt: skip
POISON = 23  # where this token is predicted, a poisoned log-prob is NaN
real = trainer.linear_logprobs


def run(name, *words):
    """The script's main, in this process."""
    module = importlib.import_module(name)
    tables = {flag: getattr(module, {"loss": "COMPARISONS"}.get(flag, f"{flag}s".upper())) for flag in TABLES[name]}
    module.main(parse_args(module.Args, [*RUNS[name][1:], *map(str, words)], **tables))


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


@pytest.mark.parametrize("name", TABLES)
def test_a_bad_update_stops_the_run_and_its_rows_are_kept(name, tmp_path, monkeypatch):
    words = ["--save_every", "1", "--eval_every", "0", "--steps", "6"]
    run(name, "--out", tmp_path / "whole", *words)
    poison(monkeypatch, range(5 if name in ("luffy", "relift") else 3, 100))  # the third step or later
    with pytest.raises(FloatingPointError, match=r"step \d: .*log-probs are NaN.* rows of this update are in"):
        run(name, "--out", tmp_path / "run", *words)
    [path] = (tmp_path / "run").glob("**/bad/*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) > 3 and all(any(isinstance(value, str) and value for value in row.values()) for row in rows)
    # the weights that the batch met are in the checkpoint before it, and the same command meets them again
    monkeypatch.undo()
    run(name, "--out", tmp_path / "run", *words)
    whole, again = (
        {str(path.relative_to(tmp_path / folder)): path.read_bytes()
         for path in (tmp_path / folder).glob("**/*.safetensors")}
        for folder in ("whole", "run")
    )
    assert whole and whole == again


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
