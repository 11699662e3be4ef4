"""common/run.py: flags and their ranges, grading, updates of several models; memory that decides what is recomputed."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoConfig

import behavior_injection as bridge
import luffy
import oreo
import redi
import relift
from benchmarks.scale import MODELS, activation_bytes, gathered_bytes, state_bytes
from common import run, trainer, verifiers
from common.data import InputError, pack
from common.rollout import Completion
from common.rows import Example
from common.run import Grader, Row, Run, RunArgs, check_fit, check_flags, micro_batches, per_token, trace_rows
from common.trainer import Totals, World, layers_to_keep, load_policy, make_optimizer
from common.verifiers import Verdict
from common.vllm import free_share
from tests.conftest import NANO, ROOT, locked, other_weights, parsed
from tests.ranks import ONE_RANK
from tools import influence, redi_data

EXAMPLES = [Example([3, 4], [5, 6, 1], "6", "s", 0, "q"), Example([3], [7, 1], "7", "s", 1, "r")]
COUNT = {"rows": len(EXAMPLES), "kept": len(EXAMPLES)}


# ------------------------------------------------------------------------------------------------------- flags


def test_a_second_model_fits_by_the_vocabulary_of_a_nested_configuration_too():
    def model(size):
        text = dict(model_type="qwen2", vocab_size=size)
        return SimpleNamespace(lm=SimpleNamespace(config=AutoConfig.for_model("llava", text_config=text)))

    check_fit("--reference m", model(50), model(50), 10)
    with pytest.raises(InputError, match="--reference m: a vocabulary of 40 does not fit --model's of 50"):
        check_fit("--reference m", model(40), model(50), 10)


def test_help_begins_with_the_flags_of_the_script(capsys):
    with pytest.raises(SystemExit):
        parsed("luffy", "--preset", "tiny", "--help")
    said = capsys.readouterr().out
    assert "(default: tiny)" in said and "--print_settings prints" in said
    assert said.index("--method {") < said.index("--shaping_gamma") < said.index("--eval_data") < said.index("--wandb")


@pytest.mark.parametrize("script", [luffy, relift, redi, redi_data, bridge, influence])
def test_every_flag_has_a_help_text(script, capsys, monkeypatch):
    """A field that is declared again without its comment loses it."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parsed(script.__name__, "--help")
    _, *parts = re.split(r"^[│ ] --(\w+)", capsys.readouterr().out, flags=re.MULTILINE)
    helps = {name: re.sub(r"[│\s]+", " ", text) for name, text in zip(parts[::2], parts[1::2], strict=True)}
    assert helps.keys() == {field.name for field in dataclasses.fields(script.Args)}
    values = r"(, --no_\w+)?( [A-Z]+| \{[^}]*\}| \[STR \[STR \.\.\.\]\])*"
    assert not [name for name, text in helps.items() if re.fullmatch(values + r" \(default.*", text)]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("keep", 0, "--keep must be positive and finite, not 0"), ("epochs", -1.0, "--epochs must be positive"),
        ("eval_every", -1, "--eval_every must be 0 or more"), ("verifier", "oops", "--verifier oops"),
        ("lr", float("nan"), "--lr must be 0 or more and finite"), ("epochs", float("inf"), "--epochs must be"),
        ("betas", (1.0, 0.9), "--betas must be two numbers"), ("warmup", 2, "--warmup must be between 0 and 1"),
        ("betas", (-0.1, 0.9), "--betas must be two numbers"), ("warmup", -1, "--warmup must be between 0 and 1"),
        ("seed", -1, r"--seed must be from 0 to 10\^12, not -1"), ("seed", 20261128050000, "--seed must be from 0"),
        ("schedule", "linaer", "--schedule must be one of .constant., .linear., .cosine., not linaer"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named_with_its_flag(name, value, words):
    check_flags(RunArgs())
    with pytest.raises(InputError, match=words):
        check_flags(dataclasses.replace(RunArgs(), **{name: value}))


def test_who_types_no_flag_has_what_the_pages_say():
    args = RunArgs()
    assert (args.keep, args.seed, args.eval_limit, args.timeout_minutes) == (2, 0, 0, 30.0)
    assert args.rollout == args.gradient_checkpointing == "auto" and not args.skip_bad_updates


def test_the_best_model_needs_an_evaluation_before_anything_is_read():
    with pytest.raises(InputError, match="--keep_best .* needs --eval_every"):
        check_flags(dataclasses.replace(RunArgs(), keep_best=True, eval_every=0))


# --------------------------------------------------------------------------------------------------------- run


def planned(tmp_path, **settings) -> Run:
    """A run of the two EXAMPLES, one a step."""
    args = RunArgs(out=str(tmp_path / "run"), batch_size=1, rollout="embedded", verifier="boxed", **settings)
    mine = Run(args)
    mine.plan(EXAMPLES, [], COUNT)
    return mine


def test_a_row_longer_than_the_models_positions_stops_a_run_before_its_first_step(tmp_path, world):
    mine, policy = planned(tmp_path), load_policy("", world, from_config=NANO)
    assert mine.longest == 5
    policy.lm.config.max_position_embeddings = 4
    with pytest.raises(InputError, match="--data : the longest row has 5 tokens, and the model 4 positions: lower --m"):
        mine.begin(policy, make_optimizer(policy, lr=0.0), None)


def test_a_run_that_is_past_its_last_step_is_not_given_out_as_a_shorter_one(tmp_path, world):
    mine = Run(RunArgs(out=str(tmp_path / "run"), batch_size=1, steps=2))
    mine.start = 4
    with pytest.raises(InputError, match="has a checkpoint of step 4, after the last of 2 steps: raise --steps"):
        mine.plan(EXAMPLES, [], COUNT)


def test_a_question_without_a_trace_has_no_row_for_it():
    untaught = dataclasses.replace(EXAMPLES[0], trace=None)
    assert [row.group for row in trace_rows([untaught, EXAMPLES[1]], range(2))] == [1]


def test_totals_take_metrics_that_one_rank_alone_has(monkeypatch):
    theirs = [("a", 2.0), ("c", 5.0), ("b/max", 7.0)]
    monkeypatch.setattr("common.trainer.gather_lists", lambda items, world: items + theirs)
    totals = Totals(World(0, 2, 2, torch.device("cpu")))
    totals.add({"d": torch.tensor(3.0)})
    totals.add({"a": torch.tensor(4.0)}, per=2)
    totals.largest("b/max", torch.tensor([1.0, 4.0]))
    assert totals.reduce() == {"d": 3.0, "a": 4.0, "b/max": 7.0, "c": 5.0}


def test_a_copied_script_does_not_resume_the_runs_of_the_first(tmp_path, world):
    ours = planned(tmp_path).checkpoints.settings
    assert ours["script"] == "run.py"
    (tmp_path / "run" / "model").mkdir()
    for saved in (ours | {"script": "mine.py"}, {name: ours[name] for name in ours if name != "script"}):
        (tmp_path / "run" / "args.json").write_text(json.dumps(saved))
        refused = pytest.raises(InputError, match="script 'mine.py' there, 'run.py' here")
        with refused if "script" in saved else contextlib.nullcontext():  # without: of a run that was made before
            planned(tmp_path)


def test_a_run_does_not_go_on_from_another_start_model_of_the_same_path(tmp_path, world):
    shutil.copytree(ROOT / "models/tiny", tmp_path / "model")
    planned(tmp_path, model=str(tmp_path / "model"))
    written = json.loads((tmp_path / "run" / "weights.json").read_text())

    def resumed():
        mine = Run(RunArgs(out=str(tmp_path / "run"), batch_size=1, model=str(tmp_path / "model")))
        mine.state = {"step": 1}
        mine.plan(EXAMPLES, [], COUNT)

    resumed()
    other_weights(tmp_path / "model")
    with pytest.raises(InputError, match="weights.json .delete it if .*run was begun with other weights .--model"):
        resumed()
    assert json.loads((tmp_path / "run" / "weights.json").read_text()) == written
    (tmp_path / "run" / "weights.json").unlink()  # a run of a version that did not write it
    resumed()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (luffy.Args(out=""), "--out is empty"),
        (luffy.Args(out="~/run"), "--out ~/run: the shell has not replaced ~"),
        (RunArgs(out="a", timeout_minutes=1e13), "--timeout_minutes must be above 0 and at most 10.7"),
        (oreo.Args(data=()), "--data is empty"),
        (oreo.Args(reward_shift=math.nan), "--reward_shift must be finite, not nan"),
        (luffy.Args(temperature=1e-40), "--temperature must be 0.01 or more, not 1e-40"),
        (luffy.Args(tis_cap=0.5), "--tis_cap must be 1 or more"),
        (luffy.Args(eval_temperature=1e-3), "--eval_temperature must be 0.01 or more, not 0.001 .0, where"),
    ],
)  # fmt: skip
def test_a_value_that_no_flag_takes_is_named(args, message):
    with pytest.raises(InputError, match=message):
        check_flags(args)


def test_a_run_replaces_no_model_but_its_own(tmp_path, world):
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    planned(tmp_path)  # an empty folder, for example behind a link to a larger disk
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(ROOT / "models/tiny", model)
    with pytest.raises(InputError, match="model is there already, and no run has made it: name another --out"):
        planned(tmp_path)
    (tmp_path / "run" / "weights.json").write_text("{}")
    planned(tmp_path)  # of this run, which starts anew
    with pytest.raises(InputError, match="--model .*: the trained model would replace it: name another --out"):
        planned(tmp_path, model=str(model))
    shutil.copytree(model, reference := tmp_path / "run" / "reference")  # is never written, so may lie there
    mine = Run(RunArgs(out=str(tmp_path / "run"), batch_size=1))
    mine.plan(EXAMPLES, [], COUNT, models={"model": "", "reference": str(reference)})


def test_an_answer_alone_is_refused_where_it_is_compared_with_others():
    for module in (luffy, relift):
        method = "grpo" if module is luffy else "relift"
        with pytest.raises(InputError, match="--group_size 1: an answer without others"):
            check_flags(module.Args(method=method, group_size=1))
        check_flags(module.Args(method="sft", group_size=1))


def test_the_digest_of_the_data_is_of_golds_and_given_probabilities_and_of_held_out_rows_too(tmp_path, world):
    """A run whose data have another one than its checkpoint is refused: of OREO and REDI to the end."""
    digests, other = [], dataclasses.replace(EXAMPLES[1], gold="8")
    held_out = [(EXAMPLES, rows) for rows in ([], [], EXAMPLES[:1], EXAMPLES[1:], [other])]
    given = dataclasses.replace(EXAMPLES[1], trace_logps=[-1.0, -2.0])
    for rows, asked in [*held_out, ([EXAMPLES[0], other], []), ([EXAMPLES[0], given], [])]:
        mine = Run(RunArgs(out=str(tmp_path / "run"), batch_size=1))
        mine.plan(rows, asked, COUNT)
        digests.append(mine.checkpoints.data)
    assert digests[0] == digests[1] and len(set(digests)) == 6


def test_an_epoch_is_as_many_steps_as_its_batches_are(tmp_path, world, capsys):
    mine = Run(RunArgs(out=str(tmp_path / "run"), batch_size=2, epochs=3.0))
    mine.plan([*EXAMPLES, EXAMPLES[0]], [], COUNT)  # the third row waits for the next epoch's order
    assert mine.steps == 3 and "3 steps of 2 (3 epochs)" in capsys.readouterr().out


def test_a_run_that_is_complete_or_longer_than_it_was_says_so(tmp_path, world, capsys):
    linear, constant = dict(schedule="linear"), dict(schedule="constant")
    for before, now, words in (
        (dict(steps=3), dict(steps=3, **linear), "all 3 steps of"), (dict(steps=4), dict(steps=3, **linear), "all 3"),
        (dict(steps=3), dict(steps=5, **linear), "a run of 3 steps; the schedule now has 5"),
        (dict(steps=3), dict(steps=5, **constant), "resumes after step 3"),
        (dict(steps=3), dict(steps=5, warmup=0.1, **constant), "a run of 3 steps; the schedule now has 5"),
        (dict(steps=4), dict(steps=4, epochs=3.0, **linear), "resumes after step 3"),
        (dict(steps=0, epochs=2.0), dict(steps=4, **linear), "resumes after step 3"),
    ):  # fmt: skip
        mine = Run(RunArgs(out=str(tmp_path / "run"), batch_size=1, **now))
        mine.state, mine.start = {"step": 3, "settings": {"epochs": 1.0} | before}, 3
        mine.checkpoints.latest = lambda: Path("step-00000003")
        mine.plan(EXAMPLES, [], COUNT)
        said = "".join(capsys.readouterr())
        assert words in said and ("WARNING" in said) == ("schedule" in words)


def test_a_run_folder_belongs_to_one_process(tmp_path, world):
    planned(tmp_path)  # again in the same process: no other one writes there
    message = "another process writes there: end it, or name another folder"
    with locked(tmp_path / "run" / ".lock"), pytest.raises(InputError, match=message):
        planned(tmp_path)
    planned(tmp_path)


def test_a_file_in_the_run_folders_place_is_named_before_a_model_is_loaded(tmp_path, world):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="--out .*run: .*exists"):
        planned(tmp_path)


def test_of_two_updates_the_larger_maximum_is_logged(tmp_path, world):
    mine, logged = planned(tmp_path), []
    mine.policy, mine.step = load_policy("", world, from_config=NANO), 1
    mine.metrics = SimpleNamespace(log=lambda step, values, shown: logged.append(values), samples=lambda *_: None)
    mine.logs = [{"mismatch/max": 1.0, "loss/pg": 1.0}, {"mismatch/max": 4.0, "loss/pg": 2.0}]
    mine.log({})
    assert (logged[0]["mismatch/max"], logged[0]["loss/pg"]) == (4.0, 1.5)


# -------------------------------------------------------------------------------------------------------- rows


def test_a_trace_is_graded_once_and_own_answers_every_time(monkeypatch):
    graded = []

    def grade_later(texts, golds, *, verifier):
        graded.extend(texts)
        future = Future()
        future.set_result([Verdict(float(gold in text), "ok") for text, gold in zip(texts, golds, strict=True)])
        return future

    class Tokenizer:
        eos_token_id, all_special_ids, all_special_tokens, added_tokens_decoder = 1, [1, 2], "ab", {}

        def decode(self, ids):
            return " ".join(map(str, ids))

    monkeypatch.setattr(run, "grade_later", grade_later)
    grader = Grader(Tokenizer(), "math")
    for _ in range(2):
        rows = trace_rows(EXAMPLES, range(2), [2, 1])
        rows.append(Row([3], [8, 9], 1, truncated=True, example=EXAMPLES[1]))
        grader.add(rows)
        grader.wait()
        assert [(row.reward, row.status) for row in rows] == [(1.0, "ok")] * 3 + [(0.0, "ok")]
    assert sorted(graded) == ["5 6", "7", "8 9", "8 9"]  # without the eos; what was cut has none
    [later] = trace_rows([dataclasses.replace(EXAMPLES[1], index=2, gold="8")], [0])  # question 0 of another step
    grader.add([later])
    grader.wait()
    assert later.reward == 0.0


def test_records_of_a_killed_run_are_kept_and_those_missing_are_made(tmp_path, world):
    path, made = tmp_path / "rows.jsonl", []

    def make(part):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(part)
        return [{"id": i, "square": i * i} for i in part]

    with pytest.raises(KeyboardInterrupt):
        run.keep_records(path, [[3, 1], [4], [2]], make, world)
    assert not path.read_text() and made == [[3, 1], [4]]
    with open(tmp_path / "rows.part-5.jsonl", "w") as file:  # of a rank that this run does not have
        file.write('{"id": 4, "square": 16}\n{"id": 2, "squ')
    made.pop(0)
    records = run.keep_records(path, [[3, 1], [4], [2]], make, world)
    assert made == [[4], [2]] and list(records) == [3, 1, 4, 2] and records == run.read_records(path)
    assert records[4] == {"id": 4, "square": 16} and [*tmp_path.glob("[!.]*")] == [path]


def test_what_was_made_with_a_template_is_not_gone_on_with_once_its_file_was_edited(tmp_path, world):
    template, settings = tmp_path / "a.jinja", {"chat_template": str(tmp_path / "a.jinja"), "seed": 0}
    template.write_text("{{ messages }}")
    for compared in ((), settings):
        run.keep_settings(tmp_path / "args.json", settings, compared, "other answers", world)
    template.write_text("{{ messages }}\n")
    with pytest.raises(InputError, match="other answers .other chat_template."):
        run.keep_settings(tmp_path / "args.json", settings, settings, "other answers", world)


def test_records_belong_to_one_process(tmp_path, world):
    with locked(tmp_path / ".rows.lock"), pytest.raises(InputError, match="another process writes there"):
        run.keep_records(tmp_path / "rows.jsonl", [[1]], None, world)
    records = run.keep_records(tmp_path / "rows.jsonl", [[1]], lambda part: [{"id": i} for i in part], world)
    assert records == {1: {"id": 1}}


def test_answers_are_not_kept_if_the_verifier_fails_on_all_of_them(tmp_path, world, monkeypatch):
    failed = [Row([1], [2], 0, status="error", detail="TypeError: oops")]
    monkeypatch.setattr(run, "open_sampler", lambda *_: SimpleNamespace(sync=lambda *_, **__: None))
    monkeypatch.setattr(run, "sample_rows", lambda *_, **__: failed)
    with pytest.raises(InputError, match="failed on all 1 answers .TypeError: oops.: fix it and run the same command"):
        run.keep_answers(tmp_path / "a.jsonl", EXAMPLES[:1], lambda: None, {}, None, luffy.Args(), ONE_RANK, n=1)
    assert not run.read_records(tmp_path / "a.jsonl")
    drawn = [[Row([1], [2], 0, status="ok")], failed]  # by part: one question alone may make it fail
    sampler = SimpleNamespace(sync=lambda *_, **__: None, close=lambda: None)
    monkeypatch.setattr(run, "open_sampler", lambda *_: sampler)
    monkeypatch.setattr(run, "sample_rows", lambda *_, **__: drawn.pop(0))
    tokenizer, args = SimpleNamespace(decode=str), luffy.Args(batch_size=1)
    run.keep_answers(tmp_path / "b.jsonl", EXAMPLES, lambda: None, {}, tokenizer, args, ONE_RANK, n=1)
    assert len(run.read_records(tmp_path / "b.jsonl")) == 2
    monkeypatch.setattr(run, "gather_lists", lambda mine, world: [("ok", None), *mine])  # as another rank's
    drawn = [failed]
    run.keep_answers(tmp_path / "c.jsonl", EXAMPLES[:1], lambda: None, {}, tokenizer, args, ONE_RANK, n=1)


def test_a_corrected_verifier_of_ones_own_grades_kept_answers_again(tmp_path, world, monkeypatch):
    module = tmp_path / "corrected.py"
    monkeypatch.syspath_prepend(tmp_path)
    sampler = SimpleNamespace(sync=lambda *_, **__: None, close=lambda: None)
    monkeypatch.setattr(run, "open_sampler", lambda *_: sampler)
    drawn = [Row([3], [4, 1], 0, example=EXAMPLES[0]), Row([3], [5], 0, truncated=True, example=EXAMPLES[0])]
    for rule, rewards in (("0", [0, 0]), ("response == '[4]'", [1, 0])):  # without the eos
        module.write_text(f"def rule(response, gold):\n    return float({rule})\n")
        monkeypatch.setattr(run, "sample_rows", lambda *_, grader, **__: grader.add(drawn) or drawn)
        tokenizer, args = SimpleNamespace(decode=str), luffy.Args(verifier="corrected:rule")
        [answers] = run.keep_answers(
            tmp_path / "a.jsonl", EXAMPLES[:1], lambda: None, {}, tokenizer, args, ONE_RANK, n=2
        )
        assert [answer["reward"] for answer in answers] == rewards
        verifiers.close()
        monkeypatch.setattr(run, "sample_rows", None)  # nothing is sampled twice
        with monkeypatch.context() as patch:
            patch.setattr(run, "grade_later", None)  # nor graded: by a model, say, that might judge otherwise now
            again = run.keep_answers(
                tmp_path / "a.jsonl", EXAMPLES[:1], lambda: None, {}, tokenizer, args, ONE_RANK, n=2
            )
        assert again == [answers]
    asked, shares = [tmp_path / "a.jsonl", EXAMPLES[:1], lambda: None, {}, tokenizer, args], []
    with monkeypatch.context() as patch:
        patch.setattr(run, "gather_lists", lambda mine, _: shares.append(mine) or mine * 2)
        for rank in (0, 1):
            module.write_text(f"{module.read_text()}# as {rank} reads it\n")
            run.keep_answers(*asked, World(rank, 2, 2, torch.device("cpu")), n=2)
    assert [reward for [(reward, *_)] in shares] == [1, 0]  # each rank grades its half
    verifiers.close()
    module.write_text("def rule(response, gold):\n    return 1 / 0\n")
    with pytest.raises(InputError, match="corrected:rule failed on all 2 answers .ZeroDivisionError"):
        run.keep_answers(*asked, ONE_RANK, n=2)
    verifiers.close()


def test_values_of_rows_become_values_of_tokens():
    batch = pack([([3], [4, 5]), ([3], [6]), ([7], [8, 9, 1])])
    assert per_token(batch, [0.5, 2.0, 3.0]).tolist() == [0.5, 0.5, 2.0, 3.0, 3.0, 3.0]
    assert per_token(batch, [[1, 2], [3], [4, 5, 6]]).tolist() == [1, 2, 3, 4, 5, 6]
    assert len(per_token(pack([]), [])) == 0


def test_sequences_of_one_row_stay_in_one_micro_batch():
    pairs = [[([3], [4] * n), ([3], [5] * n)] for n in (4, 3, 2)]
    args = dataclasses.replace(RunArgs(), micro_batch_tokens=10)
    batches = list(micro_batches(pairs, args, ONE_RANK, sequences=lambda pair: pair))
    assert [mine for _, mine in batches] == [pairs[:1], pairs[1:]]
    assert [len(batch.targets) for batch, _ in batches] == [8, 10]


# ----------------------------------------------------------------------------------------------------- updates


def test_of_two_models_both_take_their_step_or_none(tmp_path, world):
    policy, other = (load_policy("nano", world, from_config=NANO, seed=seed) for seed in (3, 4))
    args = dataclasses.replace(RunArgs(), out=str(tmp_path), save_every=0, skip_bad_updates=True, batch_size=2)
    it = Run(args)
    it.plan(EXAMPLES, [], COUNT)
    it.begin(policy, make_optimizer(policy, lr=1.0), None, other=(other, make_optimizer(other, lr=1.0)))
    before = [p.clone() for p in other.parameters()]
    for model in (policy, other):
        model(pack([([3], [4, 5])])).sum().backward()
    next(policy.parameters()).grad[0] = torch.nan
    assert not it.update("other", {}, [], lr=1.0, max_grad_norm=1.0) and it.skipped == 1
    assert all(torch.equal(p, b) for p, b in zip(other.parameters(), before, strict=True))
    assert all(p.grad is None for model in (policy, other) for p in model.parameters())
    policy.bad_logps += 1  # a log-prob of the policy that is NaN stops the other's step too
    assert not it.update("other", {}, [], lr=1.0, max_grad_norm=1.0) and it.skipped == 2
    other(pack([([3], [4, 5])])).sum().backward()
    assert it.update("other", {"loss": 1.0}, [], lr=1.0, max_grad_norm=1.0, norm="other/grad_norm")
    assert it.logs[0].keys() == {"loss", "other/grad_norm"} and not torch.equal(before[0], next(other.parameters()))


@pytest.mark.parametrize(("device", "flags", "limit"), [
    ("cpu", {}, 0.001), ("cuda", {}, 0.05), ("cpu", {"max_mismatch": 0.2}, 0.2),
])  # fmt: skip
def test_a_run_stops_where_sampler_and_trainer_differ_by_more_than_rounding(
    device, flags, limit, policy, tmp_path, monkeypatch
):
    monkeypatch.setattr(run, "check_finite", lambda *_: None)
    mine = planned(tmp_path, **flags)
    mine.policy, mine.pairs = policy, {"policy": (policy, make_optimizer(policy, lr=0.0))}
    mine.world = World(0, 1, 1, torch.device(device))
    policy(pack([([3], [4])])).sum().backward()
    assert mine.update("policy", {"mismatch/mean_abs": 0.9 * limit}, [], lr=0.0, max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match=f"differ from the trainer's .*--max_mismatch {limit}.: stale weights"):
        mine.update("policy", {"mismatch/mean_abs": 1.1 * limit}, [], lr=0.0, max_grad_norm=1.0)


def test_totals_are_sums_maxima_and_means(world):
    totals = trainer.Totals(world)
    for values in ([1.0, -5.0], [2.0, 4.0], []):
        x = torch.tensor(values)
        totals.add({"mean": x.sum()}, per=4)
        totals.largest("largest", x.abs())
    assert totals.reduce() == {"mean": 0.5, "largest": 5.0}


def test_totals_are_summed_in_float64(world):
    totals = trainer.Totals(world)
    for value in (2.0**24, 1.0, 1.0):
        totals.add({"sum": torch.tensor(value)})
    assert totals.reduce() == {"sum": 2.0**24 + 2}


def test_a_checkpoint_that_another_process_wrote_meanwhile_is_not_mixed_with_what_was_read(tmp_path):
    mine = Run(RunArgs(out=str(tmp_path), batch_size=1))
    (tmp_path / "checkpoint" / "step-00000008").mkdir(parents=True)
    with pytest.raises(InputError, match="another process has written there meanwhile; run the command again"):
        mine.plan(EXAMPLES, [], COUNT)


def test_ranks_of_two_jobs_that_meet_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "gather_lists", lambda items, world: [*items, "RunArgs(lr=1.0)"])
    with pytest.raises(InputError, match="the ranks have different flags: do two jobs share one --rdzv_id"):
        Run(RunArgs(out=str(tmp_path)))


def test_settings_are_written_by_the_process_that_holds_the_folder(tmp_path, world):
    with locked(tmp_path / ".lock"), pytest.raises(InputError, match="another process writes there"):
        run.keep_settings(tmp_path / "args.json", {"model": "a"}, (), "x", world)
    assert not (tmp_path / "args.json").exists()
    run.keep_settings(tmp_path / "args.json", {"model": "a"}, (), "x", world)
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path / ".lock")], capture_output=True, text=True)
    assert "BlockingIOError" in other.stderr, "this process does not hold the folder any more"


@pytest.mark.parametrize(("gpus", "environment", "message"), [
    (0, {"SLURM_STEP_NUM_TASKS": "8"}, "srun starts this script several times"),
    (4, {"RANK": "4", "LOCAL_RANK": "4", "WORLD_SIZE": "8"}, "rank 4 of this host sees 4 GPUs"),
])  # fmt: skip
def test_starts_that_give_ranks_no_gpu_or_no_others_are_named(gpus, environment, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        trainer.init_world()


def test_a_rank_of_the_environment_that_no_torchrun_set_is_named(monkeypatch):
    monkeypatch.setattr(trainer.dist, "is_initialized", lambda: False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():  # without MASTER_ADDR
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="MASTER_ADDR expected, but not set.: unset RANK, or start torchrun"):
        trainer.init_world()


@pytest.mark.parametrize(("tasks", "terminal", "environment"), [
    ("1", False, {}), ("", False, {}), ("8", True, {}), ("8", False, {"RANK": "0"}),
])  # fmt: skip
def test_one_task_of_slurm_its_terminal_and_torchrun_under_srun_are_no_mistake(
    tasks, terminal, environment, world, monkeypatch
):
    monkeypatch.setattr(trainer.os, "isatty", lambda _: terminal)
    for name, value in (environment | {"SLURM_STEP_NUM_TASKS": tasks}).items():
        monkeypatch.setenv(name, value)
    assert trainer.init_world() == world


def test_a_gpu_that_torch_cannot_use_is_named_with_its_driver(tmp_path, monkeypatch):
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA 535.1\nGCC\n")
    monkeypatch.setattr(trainer, "NVIDIA_DRIVER", driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    message = r"this job or container has none .*or the driver .NVRM version: NVIDIA 535.1. is too old for CUDA 13.0"
    with pytest.raises(InputError, match=message):
        trainer.init_world()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as the message says
    trainer.init_world()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)  # a torch for CPUs
    trainer.init_world()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    driver.unlink()
    trainer.init_world()


@pytest.mark.parametrize(("environment", "threads"), [
    ({}, 8), ({"OMP_NUM_THREADS": "3"}, None), ({"LOCAL_WORLD_SIZE": "16"}, 1),
    ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "run"}, 4),  # torchrun's 1
])  # fmt: skip
def test_the_ranks_of_a_host_share_its_cores_unless_the_user_says_how_many(environment, threads, world, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(trainer.os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert trainer.init_world().local_size == int(environment.get("LOCAL_WORLD_SIZE", 1))
    assert asked == ([threads] if threads else [])


def test_a_process_alone_needs_no_network_and_ranks_use_the_one_that_they_are_given(world, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("RANK", "0")
    trainer.init_world()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.delenv("RANK")
    trainer.init_world()
    assert os.environ["GLOO_SOCKET_IFNAME"].startswith("lo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    trainer.init_world()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth9"


@pytest.mark.parametrize("world_known", [True, False])
def test_of_ranks_that_fail_the_first_alone_prints_its_error(world_known, monkeypatch):
    """And every rank if nobody can be asked. Before torchrun's ranks know each other it is rank 0."""
    store, said = trainer.dist.HashStore(), []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(trainer.dist, "is_initialized", lambda: world_known)
    monkeypatch.setattr(trainer.dist.distributed_c10d, "_get_default_store", lambda: store)
    for rank in "102":
        monkeypatch.setenv("RANK", rank)
        said.append(trainer._first_to_fail())
    assert said == ([True, False, False] if world_known else [False, True, False])
    store = None  # it was with a rank that is gone
    assert trainer._first_to_fail() == world_known
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert trainer._first_to_fail()  # a stale RANK is no reason to be silent
    monkeypatch.delenv("RANK")
    assert trainer._first_to_fail()


def test_held_out_questions_that_are_trained_on_are_counted(tmp_path, capsys):
    Run(RunArgs(out=str(tmp_path / "a"), batch_size=1)).plan(EXAMPLES, [EXAMPLES[1]] * 2, COUNT)
    assert "WARNING: 2 of the 2 held-out questions are trained on too" in capsys.readouterr().err


def test_a_trace_is_graded_without_the_token_that_ended_it():
    tokenizer = Mock(eos_token_id=1, all_special_ids=[1], all_special_tokens=["a"], decode=lambda ids: (
        " ".join(map(str, ids))), added_tokens_decoder={2: SimpleNamespace(special=True)})  # fmt: skip
    assert [Row([3], [5, end], 0, teacher=True).text(tokenizer) for end in (1, 2, 6)] == ["5", "5", "5 6"]


# ------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("shape", list(MODELS.values()), ids=list(MODELS))
def test_as_many_layers_keep_their_activations_as_memory_allows(shape):
    config = AutoConfig.for_model(**shape.config())
    tokens, one = 16384, dataclasses.replace(shape, layers=1)
    kept = activation_bytes(one, tokens, checkpointing=False)
    recomputed = tokens * 2 * shape.hidden  # the input of the layer
    for layers in (1, shape.layers // 2, shape.layers - 1):
        room = (layers + 1) * kept + (shape.layers - layers - 1) * recomputed  # one is whole while it is recomputed
        assert layers_to_keep(config, tokens, 1.01 * room) in (layers, layers + 1, shape.layers)
        assert layers_to_keep(config, tokens, 0.98 * room) < layers
    assert layers_to_keep(config, tokens, 1e15) == shape.layers and layers_to_keep(config, tokens, -1e9) == 0


@functools.lru_cache(2)
def qwen(size: str) -> trainer.Policy:
    """A model of Qwen2.5's shape, without memory."""
    with torch.device("meta"):
        lm = trainer.AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[size].config()))
        return trainer.Policy(lm)


@pytest.mark.parametrize(("ranks", "tokens"), [(8, 32768), (8, 40960), (16, 32768), (64, 32768)])
def test_what_is_kept_of_7b_leaves_room_for_all_else_on_80_gb(monkeypatch, ranks, tokens):
    shape, card = MODELS["7B"], 84.9e9  # what torch may use of an H100
    policy = qwen("7B")
    for layer in trainer.layers_of(policy.lm):
        layer.gradient_checkpointing = True
    context = 2e9  # CUDA's and NCCL's
    states = state_bytes(shape, ranks)
    monkeypatch.setattr(trainer, "free_memory", lambda device: card - context - 0.75 * states)  # no gradients yet
    monkeypatch.setattr(trainer, "gather_lists", lambda items, world: items)
    trainer.keep_activations(policy, tokens, World(0, ranks, 8, SimpleNamespace(type="cuda")))
    kept = sum(not layer.gradient_checkpointing for layer in trainer.layers_of(policy.lm))
    one = dataclasses.replace(shape, layers=1)
    activations = (kept + 1) * activation_bytes(one, tokens, checkpointing=False) + 2 * (27 - kept) * tokens * 3584
    root = 2 * shape.vocab * shape.hidden
    asleep, reference = 2.6e9, 2 * root  # vLLM, and the embeddings and head of a second model
    held = states + gathered_bytes(shape, ranks) + root + 6 * shape.layer + asleep + reference + context
    assert kept > 2 and 0.8 * card < held + activations < 0.97 * card


@pytest.mark.parametrize(("size", "ranks", "card", "trained", "share"), [
    ("7B", 8, 84.9e9, 12, 0.7), ("7B", 8, 84.9e9, 20, 0.67), ("1.5B", 1, 84.9e9, 12, 0.7),
    ("1.5B", 1, 84.9e9, 20, 0.55), ("7B", 1, 149e9, 12, 0.26), ("1.5B", 1, 47e9, 12, 0.455),
])  # fmt: skip
def test_vllm_has_what_training_leaves_of_a_gpu(monkeypatch, size, ranks, card, trained, share):
    shape, context = MODELS[size], 1e9
    free = card - context - trained * shape.parameters / ranks  # bytes of states a weight: ReLIFT 20, the others 12
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, card))
    found = free_share(qwen(size), World(0, ranks, 8, "cuda:0"))
    assert found == pytest.approx(share, abs=0.006)
    gathered = gathered_bytes(shape, ranks) + (2 * (1 if shape.tied else 2) * shape.vocab * shape.hidden) * (ranks > 1)
    assert found * card + gathered + 2.9e9 < free


def test_a_gpu_that_is_too_small_for_training_and_vllm_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6e9, 25.4e9))
    message = r"needs 3.1 GB for the model's weights, and training leaves it 0.0 of this GPU's 25.4 GB: use more GPUs"
    with pytest.raises(InputError, match=message):
        free_share(qwen("1.5B"), World(0, 1, 1, "cuda:0"))


def test_a_folder_without_weights_gives_the_model_of_its_seed(world, capsys):
    a, b, c = (load_policy("models/scratch", world, seed=seed) for seed in (1, 1, 2))
    weights = [next(model.parameters()) for model in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert "models/scratch: no weights there: the model starts from random ones" in capsys.readouterr().out
    assert trainer.has_weights("org/name"), "of the Hub"


# ------------------------------------------------------------------------------- seeds, metrics, evaluation, rows


def test_neighbouring_seeds_share_no_stream(tmp_path, world):
    seeds = []
    for mine in [Run(RunArgs(out=str(tmp_path / "run"), seed=seed)) for seed in range(3)]:
        for mine.step in range(1, 101):
            seeds.append(mine.step_seed)
    assert len(set(seeds)) == 300


def test_drift_is_from_before_the_step_and_from_who_drew():
    totals = trainer.Totals(ONE_RANK)
    logp, old, drawn = torch.tensor([[0.36, 0.9], [0.5, 0.5], [0.4, 0.8]]).log()  # ratios 0.72 and 1.8
    run.add_drift(totals, logp, old, drawn, clip=0.3, per=2)
    log = totals.reduce()
    assert log["policy/clipped"] == 0.5
    assert log["policy/kl_old"] == pytest.approx((old - logp).mean().item())
    assert log["mismatch/kl"] == pytest.approx((drawn - old).mean().item())
    assert log["mismatch/mean_abs"] == pytest.approx((drawn - old).abs().mean().item())
    assert log["mismatch/max"] == pytest.approx((drawn - old).abs().max().item())


def test_an_evaluation_grades_what_was_said_and_weighs_sources_alike(monkeypatch):
    class Sampler:
        def generate(self, prompts, *, sampling, drawn, **_):
            assert (sampling.max_tokens, sampling.temperature) == (7, 0.6)
            for i, ids in enumerate(prompts):
                drawn(i, [Completion([ids[0], 1], [-1.0, -1.0], "stop")])

    def grade(texts, golds, *, verifier):
        broken = ["7", "8", "9"] if verifier == "m:broken" else ["9"]
        found = [Verdict(float(text == gold), "ok") for text, gold in zip(texts, golds, strict=True)]
        return [Verdict(0.0, "error", "boom") if t in broken else v for t, v in zip(texts, found, strict=True)]

    monkeypatch.setattr(verifiers, "grade", grade)
    told = [(7, "7", "a"), (8, "x", "a"), (9, "9", "length")]
    examples = [Example([n], None, gold, source, i, "") for i, (n, gold, source) in enumerate(told)]
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)), eos_token_id=1)  # eos: no part of it
    args = RunArgs(max_response_tokens=7)
    found = run.evaluate(Sampler(), tokenizer, examples, args, ONE_RANK)
    assert (found["eval/a"], found["eval/source length"], found["eval/mean"]) == (0.5, 0.0, 0.25)
    assert found["eval/length"] == 2 and found["verifier/eval_error"] == 1 / 3 and found["verifier/eval_timeout"] == 0
    with pytest.raises(InputError, match=r"--verifier m:broken failed on all 3 answers .boom."):  # 0.0 would be a lie
        run.evaluate(Sampler(), tokenizer, examples, dataclasses.replace(args, verifier="m:broken"), ONE_RANK)


def test_an_evaluation_at_temperature_zero_is_greedy_whatever_the_rollouts_are():
    asked = []

    class Sampler:
        def generate(self, prompts, *, sampling, drawn, **_):
            asked.append(sampling.temperature)
            raise KeyboardInterrupt

    args = luffy.Args(eval_temperature=0.0, temperature=0.7)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(Sampler(), SimpleNamespace(), EXAMPLES, args, ONE_RANK)
    assert asked == [0.0]


def test_a_question_draws_from_the_same_stream_wherever_it_stands_in_a_batch():
    asked = []
    sampler = SimpleNamespace(generate=lambda prompts, *, n, keys, **_: asked.append((prompts, n, keys)))
    examples = [dataclasses.replace(e, index=40 + e.index) for e in EXAMPLES]
    for batch, mine in ((examples, range(1, 2)), (examples[::-1], range(2))):
        run.sample_rows(sampler, batch, mine, [1, 2], luffy.Args(), ONE_RANK, seed=0, grader=None)
    assert asked == [([[3]], [2], [41]), ([[3], [3, 4]], [1, 2], [41, 40])]
    assert [row.group for row in trace_rows(EXAMPLES, range(1, 2), [1, 2])] == [1, 1]  # those of another rank


def test_kept_answers_are_of_their_golds(tmp_path, world, monkeypatch):
    """They were graded by them."""
    sampler = SimpleNamespace(sync=lambda *_, **__: None, close=lambda: None, generate=lambda *_, **__: None)
    monkeypatch.setattr(run, "open_sampler", lambda *_: sampler)

    def keep(examples):
        args = luffy.Args(batch_size=1)
        run.keep_answers(tmp_path / "a.jsonl", examples, lambda: None, {}, None, args, ONE_RANK, n=1)

    keep(EXAMPLES)
    keep(EXAMPLES)
    with pytest.raises(InputError, match="has answers of other settings .other data"):
        keep([dataclasses.replace(EXAMPLES[0], gold="8"), EXAMPLES[1]])


def test_rows_of_all_ranks_are_in_the_order_of_the_questions():
    rows = [Row([1], [1], group) for group in (0, 2, 1, 3)]  # as two ranks hold them
    assert [row.group for row in Grader(None, "math").gather(rows, ONE_RANK)] == [0, 1, 2, 3]


def test_a_step_whose_answers_all_make_the_verifier_fail_ends_the_run():
    rows = [Row([1], [1], 0, status="error", detail="boom"), Row([1], [1], 1, status="error", detail="bang")]
    grader, trace = Grader(None, "math"), Row([1], [1], 0, teacher=True, status="error")
    for others in ([Row([1], [1], 2, status="ok")], [Row([1], [1], 2, teacher=True, status="ok")]):
        assert len(grader.gather(rows + others, ONE_RANK)) == 3
    assert grader.gather([trace], ONE_RANK) == [trace]  # ReLIFT's demonstrations of a step can be one
    with pytest.raises(InputError, match="--verifier math failed on all 3 answers .boom."):
        grader.gather([*rows, trace], ONE_RANK)


def test_an_answer_ends_with_every_eos_of_the_generation_config(policy):
    policy.lm.generation_config.eos_token_id = [7, 9]
    tokenizer = trainer.load_tokenizer("models/tiny")
    assert run.stop_ids(policy, tokenizer) == [tokenizer.eos_token_id, 7, 9]


def test_models_are_opened_as_the_flags_say_and_their_code_stays_unrun(world, monkeypatch):
    opened = []
    for name in ("load_policy", "load_tokenizer"):
        monkeypatch.setattr(run, name, lambda *_, **options: opened.append(options))
    monkeypatch.setattr(run, "set_template", lambda *_: None)
    for args in (RunArgs(), oreo.Args(trust_remote_code=True, compile=True, gradient_checkpointing="none", seed=5)):
        run.open_tokenizer("x", args)
        run.open_policy("x", args, world)
        assert [options["trust_remote_code"] for options in opened[-2:]] == [isinstance(args, oreo.Args)] * 2
        names = ("compile", "gradient_checkpointing", "seed")
        assert [opened[-1][name] for name in names] == [getattr(args, name) for name in names]


def test_a_path_that_is_not_utf_8_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    """The model could not be written there after training."""
    refused = pytest.raises(InputError, match="the path is not UTF-8: rename it, or export PYTHONUTF8=1")
    with refused:
        Run(luffy.Args(out=str(tmp_path / "\udce9")))
    monkeypatch.setattr(os, "fsencode", lambda path: path.encode("latin-1"))  # of a locale
    with refused:
        Run(luffy.Args(out=str(tmp_path / "é")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a Hopper GPU")
def test_flash_attention_3_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(InputError, match="--flash_attention 3 needs a Hopper GPU"):
        Run(RunArgs(out=str(tmp_path), flash_attention=3))


def test_an_update_takes_whole_groups():
    rows = [Row([1], [1], group) for group in (0, 0, 1, 1, 2, 2, 3, 3)]
    updates = run.split_updates(rows, luffy.Args(batch_size=4, updates_per_step=2))
    assert [[row.group for row in update] for update in updates] == [[0, 0, 1, 1], [2, 2, 3, 3]]


def test_a_reward_of_a_users_verifier_is_taken_as_it_is(monkeypatch):
    future = Future()
    future.set_result([Verdict(0.25, "ok", "half of a half"), Verdict(-1.0, "ok")])
    monkeypatch.setattr(run, "grade_later", lambda *_, **__: future)
    rows = [Row([3], [8, 1], i, example=EXAMPLES[i]) for i in range(2)]
    grader = Grader(SimpleNamespace(decode=str), "math")
    grader.add(rows)
    grader.wait()
    assert [(row.reward, row.detail) for row in rows] == [(0.25, "half of a half"), (-1.0, None)]


def test_the_last_step_has_a_checkpoint_too(tmp_path, world):
    mine, saved, drawn = planned(tmp_path, save_every=2, steps=3), [], []
    mine.checkpoints.save = lambda step, *_, **__: saved.append(step)
    mine.metrics = SimpleNamespace(draw=lambda every: drawn.append(every), to_disk=lambda: None)
    mine.pairs = {"policy": (None, None)}
    mine.tokenizer = SimpleNamespace(chat_template="", name_or_path="")
    for _ in mine:
        mine.save()
    assert saved == [2, 3] and drawn == [60, 60]  # curves too, at most once a minute


def test_a_sampler_has_room_for_the_longest_prompt_with_the_longest_answer(policy, world, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "make_sampler", lambda *_, **named: asked.append(named["max_tokens"]))
    args = RunArgs(max_prompt_tokens=5, max_response_tokens=7)
    run.open_sampler(policy, trainer.load_tokenizer("models/tiny"), args, world)
    assert asked == [12]
