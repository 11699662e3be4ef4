"""benchmarks/claims.py: statistics on known numbers, runs in their order and once, blocks whose commands exist."""

import importlib
import json
import os
import re
import shlex
import threading
from statistics import fmean as mean
from types import SimpleNamespace

import pytest

import luffy
import relift
from benchmarks import claims
from benchmarks.blocks import Claim, Run, made
from benchmarks.claims import BLOCKS, Block, Flags, check, contrast, holm, p_value, verdict
from benchmarks.held_out import error
from common.trainer import parse_args

# ------------------------------------------------------------------------------------------------ statistics


def test_p_values_are_those_of_students_t():
    for t, n, p in ((12.706, 2, 0.05), (4.303, 3, 0.05), (9.925, 3, 0.01), (2.776, 5, 0.05), (1.968, 300, 0.05)):
        assert p_value(t, 1.0, n) == p_value(-t, 1.0, n) == pytest.approx(p, rel=2e-3)
    assert p_value(0.0, 0.0, 3) == 1 and p_value(0.5, 0.0, 3) == 0


def test_seeds_that_share_problems_do_not_make_the_error_over_problems_smaller():
    one = [2.0, 0.0, 4.0, 2.0]
    alone = contrast([one])
    assert alone["half_width"] == pytest.approx(3.182 * error(one), rel=1e-3) and alone["p"] is None
    assert contrast([one] * 3)["half_width"] == alone["half_width"]  # three seeds that agree on every problem
    spread = [[2.0, 0.0, 4.0, 2.0], [0.0, 2.0, 2.0, 4.0]]  # independent ones do: means over seeds vary less
    assert error([1.0, 1.0, 3.0, 3.0]) < error(one)
    assert contrast(spread)["p"] == p_value(2.0, error([1.0, 1.0, 3.0, 3.0]), 4)


def test_a_contrast_must_hold_over_seeds_and_over_problems():
    sure, wild = [3.0] * 50, [9.0, -3.0] * 25
    seeds_agree = contrast([wild, wild, wild])
    assert seeds_agree["mean"] == 3 and seeds_agree["p"] == p_value(3.0, error(wild), 50) > 1e-4
    seeds_differ = contrast([sure, [9.0] * 50, [-3.0] * 50])
    assert seeds_differ["p"] == p_value(3.0, error([3, 9, -3]), 3) > 0.4
    assert seeds_differ["half_width"] == pytest.approx(4.303 * error([3, 9, -3]), rel=1e-3)
    assert contrast([1.0, 2.0, 3.0]) == contrast([[1.0], [2.0], [3.0]])  # a number for each seed


def test_holms_correction_is_that_of_the_number_of_claims():
    assert holm([0.01, 0.02, 0.5]) == [0.03, 0.04, 0.5] and holm([0.04]) == [0.04]
    assert holm([0.5, 0.001, 0.02, 0.6]) == [1.0, 0.004, 0.06, 1.0]


def test_a_verdict_says_whether_it_needs_the_correction():
    cases = ((3.0, 0.01, "yes"), (-3.0, 0.01, "no"), (3.0, 0.2, "hint"), (-3.0, 0.2, "hint against"))
    for value, adjusted, word in cases:
        assert verdict({"mean": value, "p": 0.01}, adjusted) == word
    assert verdict({"mean": 3.0, "p": 0.06}, 0.06) == "not shown"
    assert verdict({"mean": 3.0, "p": None}, None) == "one seed"


def test_a_claim_sums_rows_over_the_problems_that_it_names():
    a, b = {"sampled": [50.0, 100.0, 0.0], "gate": 0.9}, {"sampled": [0.0, 0.0, 0.0], "gate": 0.5}
    found = {"a": {0: a}, "b": {0: b}}
    buckets = ["hardest", "easy", "hardest"]
    assert check(Claim("", {"a": 1, "b": -1}), found, buckets)["mean"] == 50
    assert check(Claim("", {"a": 1, "b": -1}, among="hardest"), found, buckets)["mean"] == 25
    assert check(Claim("", {"a": 1}, of="gate", less=0.8), found, [])["mean"] == pytest.approx(0.1)


def test_the_correction_counts_all_blocks_of_the_page(tmp_path):
    def results(p):
        row = {"0": {"sampled": 10.0, "greedy": 20.0, "updates": 120, "sampled_tokens": 1234.0, "demonstrations": 0,
                     "operations": 3.2e12}}  # fmt: skip
        row["1"] = row["0"] | {"sampled": 20.0}
        about = {"seeds": [0, 1], "problems": 300, "tries": 8, "commit": "abc", "machine": "m", "core_seconds": 90}
        return {"buckets": dict.fromkeys(claims.BUCKETS, 0), "columns": {}, "rates": {"grpo": {"chosen": 2e-4}},
                "rows": {"grpo": row}, "claims": {f"c{p}": {"mean": 1.0, "half_width": 0.5, "p": p}},
                **about}  # fmt: skip

    (tmp_path / "quick").mkdir()
    for name, p in (("claims-luffy", 0.02), ("quick/claims-luffy", 0.5), ("quick/claims-redi", 0.04)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results(p)))
    document, names = tmp_path / "page.md", ("luffy", "claims", "oreo")
    document.write_text("".join(f"{name}\n<!-- {name} -->\nold\n<!-- end -->\n" for name in names))
    claims.page(tmp_path, document)
    text = document.read_text()
    assert "| luffy | c0.02 | 1 ± 0.5 | 0.02 | 0.04 | yes |" in text  # of the full run, not of the quick one
    assert "| redi | c0.04 | 1 ± 0.5 | 0.04 | 0.04 | yes |" in text
    assert "| grpo | 0.0002 | 15.0 ± 5.0 | 20.0 ± 0.0 | 120 | 1,234 | 0 | 3.2e+12 |" in text
    assert "Seeds 0, 1; 300 test problems, 8 answers each; commit abc; m; 2 minutes of one core to train." in text
    assert text.count("old") == 1 and text.endswith("oreo\n<!-- oreo -->\nold\n<!-- end -->\n")  # no results of it


def test_the_results_page_shows_what_the_results_files_say(tmp_path):
    page = (claims.ROOT / "docs" / "results.md").read_text()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text(re.sub(r"(?s)(<!-- \w+ -->\n).*?(\n<!-- end -->)", r"\1\2", page))
    (tmp_path / "benchmarks").symlink_to(claims.ROOT / "benchmarks")
    claims.page(tmp_path / "benchmarks" / "results", tmp_path / "docs" / "results.md")
    assert (tmp_path / "docs" / "results.md").read_text() == page


def test_what_the_page_says_of_a_full_block_are_numbers_of_its_results():
    page = (claims.ROOT / "docs" / "results.md").read_text()
    checked = 0
    for name, found in claims.load(claims.ROOT / "benchmarks" / "results").items():
        text = page.split(f"<!-- {name} -->")[1].split("<!-- end -->")[1].split("\n## ")[0]
        said = " ".join(re.findall(r"(?ms)^- \*\*(?:Found|Not shown)\*\*.*?(?=^- |^$)", text)).replace("−", "-")
        said = re.sub(r"p = [\d.]+", "", said)  # settings
        rows = [list(seeds.values()) for seeds in found["rows"].values()]
        known = [mean(seed[key] for seed in seeds) for seeds in rows for key in seeds[0]]
        known += [seed["sampled"] for seeds in rows for seed in seeds if "sampled" in seed]
        known += [claim[key] for claim in found["claims"].values() for key in ("mean", "half_width")]
        numbers = re.findall(r"(?<![\d,.])-?\d+(?:\.\d+)?(?![\d,.]*\d)", said)
        rounded = {f"{value:.{digits}f}" for v in known for value in (v, abs(v)) for digits in (0, 1, 2)}
        assert not [number for number in numbers if number not in rounded], name
        for mean_, half in re.findall(r"(-?\d[\d.]*) ± ([\d.]*\d)", said):  # both of one claim, whichever
            a, b = (len(number.partition(".")[2]) for number in (mean_, half))
            assert any(mean_ in (f"{claim['mean']:.{a}f}", f"{-claim['mean']:.{a}f}")
                       and half == f"{claim['half_width']:.{b}f}" for claim in found["claims"].values()), (name, mean_)
        checked += len(numbers)
    assert checked > 10



# ------------------------------------------------------------------------------------------------ the driver

NOTE = "-c \"open('{out}/note', 'a').write('%s')\""


def block(tmp_path, monkeypatch, **settings) -> Block:
    """A block that is not a file."""
    module = SimpleNamespace(**{"CLAIMS": [], "START": "", **settings})
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    flags = Flags(out=str(tmp_path), seeds=(0, 1), problems=4, tries=2)
    return Block("mine", flags, threading.Semaphore(2), None)


def test_a_run_is_made_once_and_after_those_that_its_command_names(tmp_path, monkeypatch):
    runs = {
        "data": made(NOTE % "d", once=True),
        "start": made(NOTE % "{data} {seed}"),
        "end": Run(NOTE % "{start} {steps} {half}", model=""),
    }

    def besides(name, seed, answered, folder):
        return {"seen": float(len((folder(name) / "note").read_text()))}

    settings = dict(RUNS=runs, STEPS=(60, 20), besides=besides, CLAIMS=[Claim("c", {"end": 1}, of="seen")])
    mine = block(tmp_path, monkeypatch, **settings)
    results = mine.run()
    folder = tmp_path / "full" / "mine"
    shown = os.path.relpath(folder, claims.ROOT)
    assert (folder / "once" / "data" / "note").read_text() == "d"
    assert (folder / "seed-1" / "start" / "note").read_text() == f"{shown}/once/data 1"
    assert (folder / "seed-1" / "end" / "note").read_text() == f"{shown}/seed-1/start 60 30"
    assert results["claims"]["c"]["by_seed"] == [float(len(f"{shown}/seed-0/start 60 30"))] * 2
    block(tmp_path, monkeypatch, **settings).run()  # resumed: nothing is made again
    assert (folder / "once" / "data" / "note").read_text() == "d"
    changed = block(tmp_path, monkeypatch, **settings | {"STEPS": (80, 20)})
    with pytest.raises(SystemExit, match="made by another command: remove it"):
        changed.run()


def test_every_row_takes_the_rate_that_validation_chose_at_seed_0(tmp_path, monkeypatch):
    runs = {"a": Run(NOTE % "{lr}", lrs=(0.1, 0.2, 0.4)), "b": Run(NOTE % "{a}")}
    mine = block(tmp_path, monkeypatch, RUNS=runs)
    asked = []

    def ask(name, seed, folder, split, problems, tries):
        asked.append((name, seed, split))
        right = float(split == "TEST" or folder.name == "a@0.2")
        return {how: [[right] * n] * problems for how, n in tries}

    monkeypatch.setattr(mine, "ask", ask)
    results = mine.run()
    assert results["rates"] == {"a": {"chosen": 0.2, "validation": {0.1: 0.0, 0.2: 100.0, 0.4: 0.0}}}
    folder = tmp_path / "full" / "mine"
    assert (folder / "seed-1" / "b" / "note").read_text() == os.path.relpath(folder, claims.ROOT) + "/seed-1/a@0.2"
    assert {run.name for run in (folder / "seed-1").iterdir()} == {"a@0.2", "b"}  # the others at seed 0 alone
    assert sorted(asked) == [("a", 0, "TEST"), *[("a", 0, "VALID")] * 3, ("a", 1, "TEST"), ("b", 0, "TEST"),
                             ("b", 1, "TEST")]  # fmt: skip


def test_a_run_that_fails_shows_how_its_log_ends(tmp_path, monkeypatch):
    mine = block(tmp_path, monkeypatch, RUNS={"a": Run("-c \"raise SystemExit('the disk is full')\"", model="")})
    with pytest.raises(SystemExit, match="(?s)ended with 1; .*the disk is full"):
        mine.run()


def test_an_unknown_block_is_named():
    with pytest.raises(SystemExit, match="luffi: no such block"):
        claims.main(Flags(blocks=("luffi",)))


def test_answers_are_kept_and_measured_by_their_verifier(tmp_path):
    problems, question = tmp_path / "rows.jsonl", [{"role": "user", "content": "a=3\na?"}]
    problems.write_text(json.dumps({"data_source": "x", "prompt": question, "answer": "3"}))
    kept, tiny = tmp_path / "kept.json", str(claims.ROOT / "models" / "tiny")
    how = (tiny, str(problems), kept, "operator:lt", 5, 1, (("sampled", 3), ("greedy", 1)))
    found = claims.measure(*how)
    assert [len(group) for group in (*found["sampled"], *found["greedy_texts"])] == [3, 1]
    assert found["sampled"] == [[float(text < "3") for text in found["sampled_texts"][0]]]
    kept.write_text('{"sampled": []}')
    assert claims.measure(*how) == {"sampled": []}


# ------------------------------------------------------------------------------------------------ the blocks

SCRIPTS = {"luffy.py": luffy, "relift.py": relift, "-m benchmarks.blocks.shaping sgd": luffy}


@pytest.mark.parametrize("name", [b for b in BLOCKS if (claims.ROOT / "benchmarks" / "blocks" / f"{b}.py").exists()])
def test_a_blocks_rows_and_commands_exist(name):
    module = importlib.import_module(f"benchmarks.blocks.{name}")
    known = {"out", "seed", "lr", "steps", "half", "tiny"}
    for row, run in module.RUNS.items():
        named = set(re.findall(r"\{([\w.]+)\}", run.command + run.model + run.test))
        assert named <= known | module.RUNS.keys() - {row} and ("lr" in named) == bool(run.lrs)
        assert row not in known and re.fullmatch(r"[\w.]+", row)
        words = [re.sub(r"\{[\w.]+\}", "1", word) for word in shlex.split(run.command)]
        for start, program in SCRIPTS.items():
            if " ".join(words).startswith(start):
                flags = words[len(start.split()) :]
                parse_args(program.Args, flags, method=program.METHODS, preset=program.PRESETS)
    rows = {row for row, run in module.RUNS.items() if run.row} | ({"all"} if hasattr(module, "across") else set())
    assert all(claim.rows.keys() <= rows for claim in module.CLAIMS)
    assert len({claim.text for claim in module.CLAIMS}) == len(module.CLAIMS)


def test_sgd_in_the_place_of_adamw_keeps_the_scale_of_the_gradient():
    import torch

    from common.trainer import make_optimizer, optimizer_step

    moved = []
    for scale in (1e-3, 1e-4):
        model = torch.nn.Linear(2, 2, bias=False)
        optimizer = make_optimizer(model, lr=0.1, weight_decay=0.0, eps=1.0)
        before = model.weight.detach().clone()
        model.weight.grad = torch.full((2, 2), scale)
        optimizer_step(model, optimizer, lr=0.1, max_grad_norm=1.0)
        moved.append((before - model.weight.detach()).abs().mean().item())
    assert moved[0] == pytest.approx(0.1 * 1e-3, rel=0.01) and moved[0] / moved[1] == pytest.approx(10, rel=0.01)
