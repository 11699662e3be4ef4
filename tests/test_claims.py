"""benchmarks/claims.py: verdicts and tables on numbers whose answer is known; runs start from what they should."""

import json
import math

import pytest

from benchmarks import claims
from benchmarks.claims import RUNS, Claims, check, error, paired, tables, verdict
from benchmarks.held_out import roc_area, valued
from common.trainer import ValueModel, export, load_policy, load_tokenizer


def test_a_verdict_needs_twice_the_standard_error():
    assert verdict([2.0, 3.0, 4.0], [math.nan] * 3)["verdict"] == "yes"  # 3 +- 0.58
    assert verdict([2.0, 3.0, 4.0], [2.0] * 3)["se"] == pytest.approx(2 / 3**0.5)  # over problems: 3 +- 1.15
    assert verdict([3.0, 3.01], [3.0] * 2)["verdict"] == "not significant"  # two seeds that agree by chance
    assert verdict([-2.0, -3.0, -4.0], [0.1] * 3)["verdict"] == "no"
    assert verdict([-2.0, 3.0, 4.0], [0.1] * 3)["verdict"] == "not significant"
    assert verdict([3.0], [1.0])["verdict"] == "yes"  # one seed: its error over problems
    assert verdict([3.0], [2.0])["verdict"] == "not significant"
    assert verdict([3.0], [math.nan])["verdict"] == "not significant"
    assert verdict([1e-6], [0.0])["verdict"] == "yes"  # exact
    assert verdict([0.0], [0.0])["verdict"] == "not significant"


def test_differences_are_paired_by_problem_and_may_be_of_some_problems_alone():
    assert paired([1.0, 0.5, 0.0], [0.5, 0.0, 0.0]) == (pytest.approx(100 / 3), pytest.approx(error([50, 50, 0])))
    assert paired([1.0, 0.5, 0.0], [0.5, 0.0, 0.0], [2]) == (0.0, pytest.approx(math.nan, nan_ok=True))


def test_the_area_under_the_roc_curve_counts_pairs():
    assert roc_area([(1.0, 0.9), (1.0, 0.2), (0.0, 0.5), (0.0, 0.2)]) == (2 + 0.5) / 4
    assert math.isnan(roc_area([(1.0, 0.9), (1.0, 0.2)])) and math.isnan(roc_area([(0.0, 0.9)]))


def test_answers_are_valued_where_the_next_token_would_be_the_last(world, tmp_path):
    tiny, value = str(claims.ROOT / "models" / "tiny"), tmp_path / "value"
    zero = load_policy(tiny, world, kind=ValueModel, new_head=True)  # its head
    export(zero, load_tokenizer(tiny), value, world)
    groups = valued(tiny, str(value), "igsm:5-8", 3, tries=2, progress=False)
    assert [len(group) for group in groups] == [2, 2, 2]
    assert {value for group in groups for _, value in group} == {0.0}


def test_every_run_starts_from_the_base_or_from_another_row():
    for name, run in RUNS.items():
        seen = {name}
        while run.start != "base":
            assert run.start in RUNS and run.start not in seen
            seen.add(run.start)
            run = RUNS[run.start]
    assert {RUNS[name].start for name in ("oreo_token", "rejection", "dpo", "redi", "simpo")} == {"sft"}


def log(folder, rows):
    folder.mkdir(parents=True)
    text = "".join(json.dumps({"step": i + 1, **row}) + "\n" for i, row in enumerate(rows))
    (folder / "metrics.jsonl").write_text(text)


def test_claims_are_checked_on_the_right_rows(tmp_path):
    settings = Claims(out=str(tmp_path), seeds=(0,), only=("base", "luffy", "grpo"))
    log(tmp_path / "seed-0" / "grpo", [{"group/solve_none": s} for s in (1.0, 0.75, 0.5)])
    rates = {"base": [0.0, 0.0, 1.0, 1.0], "luffy": [0.5, 0.75, 1.0, 1.0], "grpo": [0.0, 0.0, 1.0, 1.0]}
    found = {name: {0: {"id": r, "ood": r}} for name, r in rates.items()}
    checked = check(found, settings)
    never = checked["luffy over grpo where the base never succeeds (points)"]
    assert never["by_seed"] == [62.5] and never["se"] == pytest.approx(12.5) and never["verdict"] == "yes"
    [share] = [c for text, c in checked.items() if "all of grpo's answers" in text]
    assert share["by_seed"] == [0.75]
    assert not any("relift" in text or "BRIDGE" in text for text in checked)


def test_the_table_has_means_over_seeds_and_what_a_run_cost():
    row = {"id": 10.0, "never": 5.0, "ood": 1.0, "updates": 120, "sampled_tokens": 1234, "demonstrations": 0,
           "operations": 3.2e12, "peak_gb": 0.7,
           "seconds_a_step": {"step": 2.0, "sample": 0.0, "update": 1.0}}  # fmt: skip
    other = row | {"id": 20.0, "seconds_a_step": {"step": 4.0, "sample": 0.0, "update": 2.0}}
    text = tables({"rows": {"base": {"0": {"id": 1.0, "never": 0.0, "ood": 1.0}}, "grpo": {"0": row, "1": other}},
                   "claims": {"a > b": verdict([1.0], [0.1])}})  # fmt: skip
    assert "| grpo | 15.0 ± 5.0 | 5.0 ± 0.0 | 1.0 ± 0.0 | 120 | 1,234 | 0 | 3.2e+12 |" in text
    assert "| a > b | 1 ± 0.1 | yes |" in text
    steps = text.split("\n\n")[2].splitlines()
    assert steps[2:] == ["| grpo | 3.00 |  | 1.50 | 0.70 |"]


def test_an_unknown_row_is_named():
    with pytest.raises(SystemExit, match="luffi"):
        claims.main(Claims(only=("luffi",)))
