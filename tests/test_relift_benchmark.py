"""benchmarks/relift.py in small: one arm, one seed, two steps; the table, the numbers, the plot."""

import json

import pytest

from benchmarks import relift as bench


def test_the_claim_run_measures_an_arm_by_difficulty_and_does_not_train_it_twice(tmp_path, monkeypatch, capsys):
    settings = bench.Bench(
        out=str(tmp_path / "runs"), results=str(tmp_path / "results"), seeds=(0,), arms=("relift",), problems=8,
        extra="--steps 2 --batch_size 4 --sft_data_size 2 --eval_limit 4",
    )  # fmt: skip
    results = bench.main(settings)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert sum(results["buckets"].values()) == 8
    row = results["runs"]["relift"]["0"]
    assert (row["steps"], row["sampled"]) == (2, 2 * 4 * 8) and row["demonstrations"] in (0, 2, 4)
    assert 0 <= row["accuracy"] <= 100 and 0 < row["length"] <= 160
    text = (tmp_path / "results.md").read_text()
    assert text.count("\n") == 4 and "| relift |" in text and text in capsys.readouterr().out
    assert (tmp_path / "results.png").stat().st_size > 5000
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: pytest.fail("trained again"))
    assert bench.train("relift", 0, settings) == tmp_path / "runs" / "relift-0"
