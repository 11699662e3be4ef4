"""benchmarks/compare.py: two run folders side by side."""

import json

import pytest

from benchmarks.compare import Compare, main
from tests.conftest import write_rows


def run(folder, gamma, rewards):
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"out": str(folder), "lr": 1e-4, "shaping_gamma": gamma}))
    rows = [{"step": i + 1, "reward/own": r, **({"eval/mean": r} if i % 3 == 0 else {})} for i, r in enumerate(rewards)]
    write_rows(folder / "metrics.jsonl", rows)
    return str(folder)


def test_settings_that_differ_and_both_ends_of_every_metric(tmp_path):
    a = run(tmp_path / "published", 0.1, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    b = run(tmp_path / "mine", 0.5, [0.0] * 7)
    lines = main(Compare((a, b), out=str(tmp_path / "c.png"))).splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert cells["--shaping_gamma"] == ["0.1", "0.5"] and "--lr" not in cells and "--out" not in cells
    assert cells["first"] == ["->", "last", "published", "mine"]  # without the folder that both are in
    assert cells["reward/own"] == ["0.2", "->", "0.8", "0", "->", "0"]  # means of the first and last five
    assert cells["eval/mean"] == ["0", "->", "0.9", "0", "->", "0"]  # evaluations: the first and the last
    assert "policy/entropy" not in cells and (tmp_path / "c.png").stat().st_size > 5000


def test_the_ends_of_a_short_run_do_not_overlap(tmp_path):
    lines = main(Compare((run(tmp_path / "a", 0.1, [1.0, 2.0, 4.0, 6.0]),), out=str(tmp_path / "c.png"))).splitlines()
    assert next(line for line in lines if line.startswith("reward/own")).split()[1:] == ["1.5", "->", "5"]


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(SystemExit, match="nowhere: no metrics.jsonl"):
        main(Compare((str(tmp_path / "nowhere"),)))
    with pytest.raises(SystemExit, match="no run has logged eval/men"):
        main(Compare((run(tmp_path / "a", 0.1, [0.5]),), metrics=("reward/own", "eval/men")))
