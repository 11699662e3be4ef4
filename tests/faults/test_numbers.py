"""A NaN stops a run or is skipped and counted, and its batch is kept."""

import importlib
import json
import math

import pytest
import torch

from common import trainer
from common.trainer import parse_args, read_metrics
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
    tables = {flag: getattr(module, {"loss": "LOSSES"}.get(flag, f"{flag}s".upper())) for flag in TABLES[name]}
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


REPLAYED = [name for name in TABLES if name not in ("luffy", "relift")]


@pytest.mark.parametrize("name", [name for name in TABLES if name not in REPLAYED])
def test_a_bad_update_stops_the_run_and_its_rows_are_kept(name, tmp_path, monkeypatch):
    words = ["--save_every", "1", "--eval_every", "0", "--steps", "4"]
    run(name, "--out", tmp_path / "whole", *words)
    poison(monkeypatch, range(5, 100))
    with pytest.raises(FloatingPointError, match=r"step \d: .*log-probs are NaN.* rows of this update are in"):
        run(name, "--out", tmp_path / "run", *words)
    [path] = (tmp_path / "run" / "bad").iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 8 and all(row["prompt"] and row["response"] for row in rows)
    # the weights that the batch met are in the checkpoint before it, and the same command meets them again
    monkeypatch.undo()
    run(name, "--out", tmp_path / "run", *words)
    a, b = (tmp_path / folder / "model" / "model.safetensors" for folder in ("whole", "run"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("name", REPLAYED)
def test_a_bad_batch_is_kept_and_replay_names_its_rows(name, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, range(3, 100))
    with pytest.raises(FloatingPointError, match=r"step \d: .*log-probs are NaN.*--replay"):
        run(name, "--out", tmp_path / "run", "--save_every", "0", "--eval_every", "0")
    [folder] = (tmp_path / "run").glob("**/bad/step-*")
    rows = json.loads((folder / "rows.json").read_text())
    texts = (folder / "rows.jsonl").read_text().splitlines()
    assert len(rows) == len(texts) > 0
    assert "NaN" in json.loads((folder / "about.json").read_text())["error"]

    poison(monkeypatch, None)
    capsys.readouterr()
    run(name, "--replay", folder)
    said = capsys.readouterr().out.splitlines()
    lines = [line for line in said if line[:6].strip().isdigit()]
    assert len(lines) == len(rows) and said[-1].split()[0] == "all" and "<-" in said[-1]
    traces = [[t for part in (row if isinstance(row, list) else [row]) for key in ("response", "chosen", "rejected")
               for t in part.get(key, [])] for row in rows]  # fmt: skip
    assert ["<-" in line for line in lines] == [POISON in trace for trace in traces]
    assert 0 < sum(POISON in trace for trace in traces) < len(rows)


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
