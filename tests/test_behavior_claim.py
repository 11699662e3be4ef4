"""benchmarks/behavior_injection.py: how three seeds become a verdict. (Its runs are those of test_behavior_runs.py.)"""

import json
import math

import pytest

from benchmarks import behavior_injection as bench
from benchmarks.behavior_injection import at_equal_tokens, mean_and_error, rank_correlation, verdict


def test_rank_correlation_is_spearmans():
    assert rank_correlation([1, 2, 3, 10], [0.1, 0.2, 0.3, 0.4]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)  # ties at their mean rank
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([3.0, 2.5, 3.5], "confirmed"),
        ([3.0, 0.1, 9.0], "not confirmed"),  # every seed agrees, the mean is within twice its error
        ([3.0, 3.0, -0.1], "not confirmed"),
        ([-3.0, -2.5, -3.5], "contradicted"),
        ([3.0], "open: one seed"),
    ],
)
def test_a_claim_is_confirmed_if_every_seed_agrees_and_the_mean_is_beyond_twice_its_error(differences, expected):
    assert verdict(differences) == expected


def test_the_error_is_that_of_a_mean_over_seeds():
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert math.isnan(mean_and_error([1.0])[1])


def test_gains_are_compared_where_each_arm_has_sampled_as_many_tokens(tmp_path):
    runs = {"short": [(0, 0.1), (50, 0.2), (100, 0.4)], "long": [(0, 0.2), (90, 0.5), (180, 0.9)]}
    for arm, points in runs.items():
        (tmp_path / arm / "rl").mkdir(parents=True)
        lines = [{"step": i, "tokens/sampled": t, "eval/mean": x} for i, (t, x) in enumerate(points)]
        lines.insert(1, {"step": 0.5, "tokens/sampled": 1})  # a step without evaluation
        (tmp_path / arm / "rl" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gains = at_equal_tokens(tmp_path, ["short", "long"])
    assert gains == {"short": pytest.approx(0.3), "long": pytest.approx(0.3)}


def test_all_seeds_start_from_one_base_and_end_in_one_table(tmp_path, monkeypatch):
    commands = []

    def run(*words, program="behavior_injection.py"):  # in the place of both programs: what they leave behind
        commands.append(words)
        out, arms = words[words.index("--out") + 1], words[words.index("--arms") + 1 :]
        if program == "-m tools.influence":
            for arm in arms:
                gain = 0.01 * words[words.index("--seed") + 1] + (0.3 if arm == "bridge" else 0.1)
                measured = dict.fromkeys(("dJ", "cosine", "accuracy", "never", "sometimes", "always"), gain)
                (out / arm / "influence").mkdir()
                (out / arm / "influence" / "influence.json").write_text(json.dumps(measured))
            return
        (out / "base").mkdir(parents=True, exist_ok=True)
        (out / "base" / "eval.json").write_text(json.dumps({"base": {"test_id": {"accuracy": 0.1}}}))
        results = {}
        for arm in arms:
            gain = 0.01 * words[words.index("--seed") + 1] + (0.3 if arm == "bridge" else 0.1)
            tests = {s: {f"test_{t}": dict(accuracy=0.2 + g, greedy=0.4, chain=0.1, tokens=50.0, accuracy_other=0.2)
                         for t in ("id", "ood")} for s, g in (("sft", 0.0), ("rl", gain))}  # fmt: skip
            results[arm] = tests
            (out / arm / "rl").mkdir(parents=True)
            rows = [{"step": i, "tokens/sampled": 100 * i, "eval/mean": 0.2 + i * gain} for i in range(2)]
            (out / arm / "rl" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (out / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr(bench, "run", run)
    where = tmp_path / "kept" / "bridge"
    claim = bench.Claim(out=str(tmp_path / "runs"), results=str(where), arms=("vanilla", "bridge"), extra="")
    found = bench.main(claim)
    assert [words[words.index("--stage") + 1] for words in commands[:2]] == ["data", "eval"]
    assert all(words[words.index("--model") + 1] == bench.ROOT / "models" / "tiny" for words in commands)
    assert found["table"]["bridge"]["gain_id"] == (pytest.approx(0.31), pytest.approx(0.01 / math.sqrt(3)))
    assert found["claims"]["bridge over vanilla, gain_id"]["verdict"] == "confirmed"
    assert found["claims"]["dJ ranks the arms by their gain"]["by_seed"] == [pytest.approx(1)] * 3
    assert json.loads(where.with_suffix(".json").read_text())["base"] == {"test_id": {"accuracy": 0.1}}
    assert where.with_suffix(".png").stat().st_size > 5000
