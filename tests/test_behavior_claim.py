"""benchmarks/behavior_injection.py: how three seeds become a verdict. (Its runs are those of test_behavior_runs.py.)"""

import json
import math

import pytest

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
