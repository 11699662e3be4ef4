"""`make demo` in small: the shipped base model, three runs, the table."""

import json

from tests.conftest import run_script


def test_the_demo_compares_the_methods_with_the_base_on_equal_terms(tmp_path):
    result = run_script(
        "benchmarks/demo.py", "--out", tmp_path / "demo", "--problems", 12, "--tries", 2,
        "--extra=--steps 2 --eval_limit 8 --batch_size 4",
    )
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    models = results["models"]
    assert models.keys() == {"base", "grpo", "sft", "luffy"}
    assert {models[name]["steps"] for name in ("grpo", "sft", "luffy")} == {2}
    assert [models[name]["sampled_rows"] for name in ("grpo", "sft", "luffy")] == [64, 0, 56]
    assert all(0 <= model["accuracy"] <= 100 and 0 <= model["greedy"] <= 100 for model in models.values())
    for name in ("curves.png", "grpo/model/model.safetensors", "luffy/samples.jsonl", "log-sft.txt"):
        assert (tmp_path / "demo" / name).exists()
    assert "12 held-out problems, 2 answers each" in result.stdout
    traces = (tmp_path / "demo" / "train.jsonl").read_text()
    assert traces.count("\n") == 5000 and "no_subgoals" not in traces
