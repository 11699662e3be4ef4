"""`make demo` in small: the shipped base model, the runs, the table."""

import importlib.util
import json

from benchmarks import demo
from tests.conftest import run_script


def test_the_demo_compares_the_methods_with_the_base_on_equal_terms(tmp_path):
    result = run_script(
        "benchmarks/demo.py", "--out", tmp_path / "demo", "--problems", 12, "--tries", 2,
        "--extra=--steps 2 --eval_limit 8 --batch_size 4 --igsm_problems 200",
    )
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    models = results["models"]
    assert models.keys() == {"base", "grpo", "sft", "luffy"}
    assert [model["steps"] for model in models.values()] == [0, 2, 2, 2]
    assert [model["sampled_rows"] for model in models.values()] == [0, 64, 0, 56]
    assert all(0 <= model["accuracy"] <= 100 for model in models.values())
    assert models["base"]["never_solved"] == 0
    for name in ("curves.png", "grpo/model/model.safetensors", "luffy/samples.jsonl"):
        assert (tmp_path / "demo" / name).exists()
    assert "12 held-out problems, 2 answers each" in result.stdout


def test_what_one_problem_cannot_tell_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "drawn", lambda *_, **__: [[([1], [2], 1.0)]])  # the base solves it
    monkeypatch.setattr(demo, "plot_curves", lambda *_: None)
    demo.main(demo.Demo(out=str(tmp_path), methods=()))
    text = (tmp_path / "results.json").read_text()
    found = json.loads(text)["models"]["base"]
    assert (found["accuracy"], found["accuracy_se"], found["never_solved"]) == (100, None, None) and "NaN" not in text


def test_no_package_of_another_place_is_taken_for_the_benchmarks():
    assert importlib.util.find_spec("benchmarks").origin  # a folder without __init__.py gives way to one on any path
