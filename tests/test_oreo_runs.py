"""oreo.py from end to end on models that train in seconds: stages, ranks, a crash, search, bad input."""

import contextlib
import dataclasses
import json
import math
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

import eval as evaluation
import igsm
import oreo
from common.checkpoints import export_checkpoint
from common.data import InputError, pack
from common.metrics import read_metrics
from common.rows import IGSM, conversation_ids, make_examples, read_row, trace_ids
from common.trainer import Policy, ValueModel, export, load_policy, load_tokenizer
from tests import oreo_ranks
from tests.conftest import NANO, other_weights, read_rows, run_script, write_rows
from tests.faults.harness import assert_same_metrics, complete_run
from tests.oreo_ranks import Counts, search, settings
from tools import agents

pytestmark = pytest.mark.usefixtures("without_curves")


@pytest.fixture(scope="session")
def nano_value(nano, world, tmp_path_factory):
    """A value model with a random head, as --stage oreo leaves one."""
    folder = tmp_path_factory.mktemp("nano-value") / "value"
    model = load_policy(nano, world, kind=ValueModel, new_head=True)
    torch.nn.init.normal_(model.lm.score.weight, generator=torch.Generator().manual_seed(0))
    export(model, load_tokenizer(nano), folder, world)
    return str(folder)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A file of worked solutions, every second of which has a wrong answer."""
    lines = []
    for i, problem in enumerate(igsm.problems(12, **IGSM, ops=(1, 2))):
        row = igsm.row(problem, "train")
        right = row["target"][0]["content"].removeprefix("<think>\n")
        wrong = right.replace("\\boxed{", "\\boxed{1")
        lines += [{"prompt": row["prompt"], "response": text, "reward": reward, "question": i}
                  for text, reward in ((right, 1), (wrong, 0))]  # fmt: skip
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", lines)


@pytest.mark.parametrize("stage", ["sft", "rejection", "dpo", "kto", "oreo", "oreo-step", "oreo-response"])
def test_every_stage_trains_and_leaves_a_run_folder(stage, nano, rows, tmp_path):
    stage, _, variant = stage.partition("-")
    source = [] if stage == "sft" else ["--rows", rows]
    oreo.main(settings(nano, "--stage", stage, "--variant", variant or "token", *source, "--out", tmp_path / "run"))
    log = complete_run(tmp_path / "run")
    assert {"eval/mean", "loss/policy", "optim/grad_norm", "policy/logp", "seconds/step"} <= log[-1].keys()
    assert ("log_ratio/right" in log[-1]) == (stage in ("dpo", "kto", "oreo"))
    assert ("value/right" in log[-1]) == ("optim/value_grad_norm" in log[-1]) == (stage == "oreo")
    assert (tmp_path / "run" / "value").exists() == (stage == "oreo")
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().split("\n")[0])
    assert {"step", "answer", "reward", "log_ratio", "prompt", "steps", "values"} == sample.keys()
    assert len(sample["values"]) == (len(sample["steps"]) if stage == "oreo" else 0)


def test_before_the_first_update_values_are_zero_and_policy_and_reference_agree(nano, rows, tmp_path):
    oreo.main(settings(nano, "--rows", rows, "--reward_scale", "2", "--reward_shift", "-1", "--out", tmp_path / "run"))
    first = read_metrics(tmp_path / "run")[1]
    assert first["value/first"] == first["value/right"] == first["policy/kl"] == first["log_ratio/right"] == 0
    assert first["loss/value"] == first["loss/policy"] == pytest.approx(1)  # (0 - R)^2 with R = +1 or -1


@pytest.mark.parametrize("kind", oreo_ranks.KINDS)
def test_every_weight_of_the_policy_and_of_oreos_value_learns(kind, world):
    found, _ = oreo_ranks.gradients(world, kind, 10_000)
    assert any("score" in name for name in found) == kind.startswith("oreo")
    assert not [name for name, gradient in found.items() if not gradient.any()]


def test_two_ranks_collect_train_and_search_as_one_does(nano, tmp_path, world):
    one, two = tmp_path / "one", tmp_path / "two"
    run_script("tests/oreo_ranks.py", nano, two, ranks=2)
    oreo_ranks.run(nano, str(one))
    assert (one / "rows.jsonl").read_text() == (two / "rows.jsonl").read_text()
    assert_same_metrics(one, two)
    for kind, name in ((ValueModel, "value"), (Policy, "model")):
        models = [load_policy(str(folder / name), world, kind=kind) for folder in (one, two)]
        for a, b in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    found = [json.loads((folder / "found.json").read_text()) for folder in (one, two)]
    assert found[0] == found[1] and all(found[0])


def test_a_collection_that_was_cut_short_goes_on_and_is_the_same(nano, tmp_path):
    words = ("--stage", "collect", "--batch_size", "4", "--out")
    oreo.main(settings(nano, *words, tmp_path / "whole"))
    whole = (tmp_path / "whole" / "rows.jsonl").read_text()
    answers = (tmp_path / "whole" / "answers.jsonl").read_text()
    assert len(whole.splitlines()) == 48 and len(answers.splitlines()) == 12

    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copy(tmp_path / "whole" / "answers.json", cut)
    lines = answers.splitlines(keepends=True)
    (cut / "answers.part-0.jsonl").write_text("".join(lines[:4]) + lines[4][:30])  # the second batch was cut short
    oreo.main(settings(nano, *words, cut))
    assert (cut / "rows.jsonl").read_text() == whole and (cut / "answers.jsonl").read_text() == answers
    assert not list(cut.glob("*part*"))
    with pytest.raises(InputError, match="--samples 4 there, 5 here"):
        oreo.main(settings(nano, *words, cut, "--samples", "5"))
    (cut / "answers.json").unlink()  # whose answers these are cannot be known
    with pytest.raises(InputError, match="answers.json is missing, so the settings of the files beside it are unknown"):
        oreo.main(settings(nano, *words, cut))


def test_collected_ids_are_trained_as_they_were_drawn(nano, tmp_path):
    args = settings(nano, "--stage", "collect", "--out", tmp_path / "run", "--balance", "1")
    oreo.main(args)
    rows, count = oreo.read_rows(str(tmp_path / "run" / "rows.jsonl"), load_tokenizer(nano), args)
    written = read_rows(tmp_path / "run" / "rows.jsonl")
    assert [(r.prompt, r.response) for r in rows] == [(w["prompt_ids"], w["response_ids"]) for w in written]
    assert count["kept"] == len(written) and all(all(row.actions) for row in rows)
    kinds = [(row.group, row.reward) for row in rows]
    assert len(kinds) == len(set(kinds))  # --balance 1: one right and one wrong answer of a question


def test_rounds_collect_and_train_on_what_came_before(nano, tmp_path, monkeypatch, capsys):
    seen = []
    real = oreo.train
    monkeypatch.setattr(oreo, "train", lambda args, **found: (
        seen.append(dataclasses.replace(args, **found)), real(args, **found)))  # fmt: skip
    words = ["--igsm_problems", "8", "--samples", "3", "--eval_every", "0", "--steps", "1", "--rounds", "2"]
    oreo.main(settings(nano, "--stage", "iterate", *words, "--out", tmp_path / "run"))
    model, value = (str(tmp_path / "run" / "round-1" / name) for name in ("model", "value"))
    assert [args.model for args in seen] == [args.reference for args in seen] == [nano, model]
    assert [args.value for args in seen] == ["", value]
    rows = [(tmp_path / "run" / f"round-{n}" / "rows.jsonl").read_text() for n in (1, 2)]
    assert rows[0] != rows[1]
    assert (tmp_path / "run" / "round-2" / "value").exists() and len(seen) == 2
    oreo.main(settings(nano, "--stage", "iterate", *words, "--out", tmp_path / "run"))
    assert len(seen) == 2  # what is done is not done again
    assert capsys.readouterr().out.count("is complete") == 2
    with pytest.raises(InputError, match="round-1 was made with other settings .--beta"):
        oreo.main(settings(nano, "--stage", "iterate", *words, "--beta", "9", "--out", tmp_path / "run"))

    seen.clear()
    first = ["--stage", "dpo", "--round_init", "first", "--round_reference", "first", *words]
    oreo.main(settings(nano, *first, "--out", tmp_path / "first"))
    assert [(args.model, args.reference) for args in seen] == [(nano, nano)] * 2
    assert len({args.rows for args in seen}) == 2


def test_a_run_does_not_resume_with_another_reference(nano, rows, tmp_path):
    """In all stages: what `models_of` names is compared."""
    shutil.copytree(nano, tmp_path / "reference")
    words = ["--stage", "dpo", "--rows", rows, "--eval_every", "0", "--save_every", "1", "--out", tmp_path / "run"]
    words += ["--reference", tmp_path / "reference"]
    oreo.main(settings(nano, *words, "--steps", "1"))
    oreo.main(settings(nano, *words, "--steps", "2"))
    other_weights(tmp_path / "reference")
    with pytest.raises(InputError, match="run was begun with other weights .--reference .* there, .* here"):
        oreo.main(settings(nano, *words, "--steps", "3"))
    assert len(read_metrics(tmp_path / "run")) == 2


def test_complete_rounds_of_another_model_are_not_taken_for_its_own(nano, tmp_path):
    shutil.copytree(nano, tmp_path / "model")
    words = ["--stage", "iterate", "--rounds", "2", "--igsm_problems", "8", "--samples", "3", "--eval_every", "0"]
    words += ["--steps", "1", "--out", tmp_path / "run"]
    oreo.main(settings(str(tmp_path / "model"), *words))
    other_weights(tmp_path / "model")
    with pytest.raises(InputError, match="round-1 was begun with other weights .--model"):
        oreo.main(settings(str(tmp_path / "model"), *words))


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_renamed_run_folder_resumes(rounds, nano, tmp_path):
    words = ["--rounds", rounds, "--igsm_problems", "8", "--samples", "3", "--eval_every", "0", "--save_every", "1"]
    oreo.main(settings(nano, *words, "--steps", "1", "--out", tmp_path / "a"))
    last = f"round-{rounds}" if rounds > 1 else "."
    shutil.rmtree(tmp_path / "a" / last / "model")  # as if it had been stopped before
    (tmp_path / "a").rename(tmp_path / "b")
    oreo.main(settings(nano, *words, "--steps", "2" if rounds == 1 else "1", "--out", f"{tmp_path}/./b/"))
    assert [row["step"] for row in read_metrics(tmp_path / "b" / last)] == ([1, 2] if rounds == 1 else [1])
    assert (tmp_path / "b" / last / "model").exists() and not (tmp_path / "a").exists()


def test_a_collection_is_of_its_weights_and_context_wherever_the_model_lies(nano, tmp_path):
    words = ["--stage", "collect", "--igsm_problems", "4", "--out", tmp_path / "run"]
    oreo.main(settings(nano, *words))
    shutil.copytree(nano, tmp_path / "moved")
    oreo.main(settings(str(tmp_path / "moved"), *words))
    for flag, value in (("--rope_theta", "500"), ("--max_positions", "300"), ("--temperature", "0.5"),
                        ("--top_p", "0.5"), ("--ask", "user"), ("--seed", "1"), ("--samples", "2")):  # fmt: skip
        with pytest.raises(InputError, match=f"answers of other settings .{flag}"):
            oreo.collect(settings(nano, *words, flag, value))


def test_a_run_does_not_resume_with_other_rewards(nano, tmp_path):
    words = ["--rows", tmp_path / "rows.jsonl", "--batch_size", "1", "--eval_every", "0", "--save_every", "1"]
    for rewards, steps in (((1, 0), 1), ((0, 1), 2)):
        write_rows(tmp_path / "rows.jsonl", [GOOD | {"reward": r, "response": f"a={i}"}
                                        for i, r in enumerate(rewards)])  # fmt: skip
        with pytest.raises(InputError, match="the data .* changed") if steps == 2 else contextlib.nullcontext():
            oreo.main(settings(nano, *words, "--steps", steps, "--out", tmp_path / "run"))


def test_collected_answers_are_balanced_by_their_scaled_rewards(nano, tmp_path, monkeypatch):
    answers = [[{"reward": r, "status": "ok", "response": str(i)} for i, r in enumerate((0.2, 0.3, 0.9))]] * 12
    unknown = [{"reward": 0.0, "status": status, "response": status} for status in ("timeout", "error")]
    answers[0] = unknown + answers[0]  # neither right nor wrong
    monkeypatch.setattr(oreo, "keep_answers", lambda *_, **__: answers)
    words = ["--reward_shift", "-0.5", "--balance", "1", "--out", tmp_path]
    oreo.collect(settings(nano, *words))
    kept = [row["response"] for row in read_rows(tmp_path / "rows.jsonl")]
    assert kept == ["0", "2"] * 12  # at most one right and one wrong answer to a question


def test_problems_of_several_files_are_numbered_through_counted_together_and_named_by_file(nano, tmp_path):
    turns = [{"role": "user", "content": "a=5\na?"}]
    row = {"prompt": turns, "target": "a=5\n\\boxed{5}", "reward_model": {"ground_truth": "5"}}
    long = row | {"prompt": [{"role": "user", "content": "a=5\n" * 99}]}
    files = [write_rows(tmp_path / "a.jsonl", [long, row]), write_rows(tmp_path / "b.jsonl", [row, row])]
    examples, count = oreo.read_problems(load_tokenizer(nano), settings(nano, "--data", *files))
    assert [e.index for e in examples] == [1, 2, 3]  # keys of their draws
    assert examples[2].where == f"{files[1]}, row 1"
    assert (count["rows"], count["prompt_too_long"], count["kept"]) == (4, 1, 3)


@pytest.mark.parametrize("stage", ["rejection", "dpo", "kto", "oreo"])
def test_an_answer_is_right_in_every_stage_if_its_scaled_reward_is_positive(stage, nano, tmp_path):
    graded = [GOOD | {"response": f"a={i}\n\\boxed{{{i}}}", "reward": r} for i, r in enumerate((0.2, 0.7, 0.9))]
    data = write_rows(tmp_path / "rows.jsonl", graded)
    args = settings(nano, "--stage", stage, "--rows", data, "--reward_shift", "-0.5")
    units, count = oreo.training_units(load_tokenizer(nano), args, False)
    assert count["right"] == 2
    found = {round(row.reward, 6) for unit in units for row in unit}
    assert found == ({0.2, 0.4} if stage == "rejection" else {-0.3, 0.2, 0.4})


def test_balance_keeps_as_many_of_rows_that_are_given_as_of_those_that_are_collected(nano, tmp_path):
    answers = [(i % 2, i > 3) for i in range(12)]  # (question, right), questions mixed
    graded = [{"prompt": f"a={q}\na?", "response": f"a={i}\n\\boxed{{{q}}}", "reward": int(right)}
              for i, (q, right) in enumerate(answers)]  # fmt: skip
    data = write_rows(tmp_path / "rows.jsonl", graded)
    kept, count = oreo.read_rows(data, load_tokenizer(nano), settings(nano, "--rows", data, "--balance", "1"))
    assert [row.index for row in kept] == [0, 1, 4, 5] and (count["kept"], count["right"]) == (4, 2)
    every, _ = oreo.read_rows(data, load_tokenizer(nano), settings(nano, "--rows", data))
    assert [row.index for row in every] == list(range(12))


def test_lora_changes_linear_layers_and_the_values_head_and_saves_whole_models(nano, rows, tmp_path, world):
    pytest.importorskip("peft")
    words = ["--rows", rows, "--policy_lora", "2", "--value_lora", "4", "--save_every", "2", "--out", tmp_path / "run"]
    oreo.main(settings(nano, *words))
    log = read_metrics(tmp_path / "run")
    assert log[1]["policy/kl"] == 0 and log[3]["policy/kl"] > 0 and log[3]["value/first"] != 0
    for name, kind in (("model", Policy), ("value", ValueModel)):
        before = load_policy(nano, world, kind=kind, new_head=kind is ValueModel)
        after = load_policy(str(tmp_path / "run" / name), world, kind=kind)
        changed = {n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not a.equal(b)}
        assert changed and all("proj" in n or "score" in n for n in changed)
        export_checkpoint(str(tmp_path / "run"), str(tmp_path / name), value=kind is ValueModel)
        exported, run = (load_file(folder / name / "model.safetensors") for folder in (tmp_path, tmp_path / "run"))
        assert exported.keys() == run.keys() and all(torch.equal(x, run[n]) for n, x in exported.items())
    oreo.main(settings(nano, *words, "--steps", "4"))  # goes on from a checkpoint with adapters
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]


def test_lora_without_its_package_says_how_to_get_it(nano, rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="LoRA needs its package: pip install -U peft"):
        oreo.main(settings(nano, "--rows", rows, "--value_lora", "4", "--out", tmp_path / "run"))


# ------------------------------------------------------------------------------------------------- search


def test_search_takes_the_answer_of_the_highest_value_and_wider_is_higher(nano):
    likes = load_tokenizer(nano)("=", add_special_tokens=False)["input_ids"][0]
    heights = {}
    for kind, width in (("best_of_n", 1), ("best_of_n", 8), ("beam", 1), ("beam", 3), ("beam", 5), ("best_of_k", 5)):
        examples, found = search(kind, width, nano, Counts(likes))
        best = [max(answers, key=lambda c: c.value) for answers in found]
        for e, c in zip(examples, best, strict=True):  # eos is not read, and the prompt's are counted
            assert c.value == (e.prompt + c.response).count(likes)
        heights[kind, width] = sum(c.response.count(likes) for c in best)
    assert heights["beam", 1] < heights["beam", 3] < heights["beam", 5]
    assert heights["best_of_n", 1] < heights["best_of_n", 8]
    assert heights["beam", 1] < heights["best_of_k", 5]


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "no/such.jsonl"], "no/such.jsonl: no such file"),
        (["--model", "runs/no-such/model"], "--model runs/no-such/model: not there; --stage sft makes it"),
        (["--batch_size", "400"], "24 rows are fewer than --batch_size 400"),
        (["--max_prompt_tokens", "3"], "no row is left: 0 of 24 rows .24 prompts over"),
        (["--max_response_tokens", "3"], "no row is left: 0 of 24 rows .*24 responses over"),
        (["--beta", "0"], "--beta must be positive"),
        (["--temperature", "0"], "--temperature must be positive"),
        (["--stage", "iterate"], "--rounds collects rows of its own"),
        (["--stage", "collect", "--rows", "x.jsonl"], "--rows x.jsonl is for --stage oreo, rej"),
        (["--stage", "rejection", "--value", "v"], "--value v is for --stage oreo, not rejection"),
        (["--stage", "kto", "--variant", "step"], "--variant step is for --stage oreo, not kto"),
        (["--stage", "rejection", "--reference", "r"], "--reference r is for --stage oreo, dpo, kto, not rejection"),
        (["--stage", "sft", "--rounds", "2", "--rows", ""], "--rounds 2 is for --stage oreo, rejection, dpo, kto"),
        (["--stage", "kto", "--batch_size", "1", "--rows", "x.jsonl"], "--batch_size 1: kto compares"),
        (["--value", "no/such/value"], "--value no/such/value: cannot be loaded"),
        (["--reference", "no/such/model"], "--reference no/such/model: cannot be loaded"),
        (["--balance", "-1"], "--balance must be 0 or more"),
        (["--stage", "sft"], "--rows .* is for --stage oreo, rejection, dpo, kto, not sft"),
        (["--stage", "sft", "--reward_shift", "-1", "--rows", ""], "--reward_shift -1.0 is for --stage collect, oreo"),
        (["--step_delimiters", "\\n"], "for a newline write [$]'"),
        (["--rounds", "2", "--reference", "some/model"], "--reference some/model has no effect with --round_reference"),
    ],
)
def test_bad_settings_get_one_message_before_anything_is_written(nano, rows, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        oreo.main(settings(nano, "--rows", rows, "--out", tmp_path / "run", *words))
    assert not list(tmp_path.rglob("*.jsonl"))


GOOD = {"prompt": "a=1\na?", "response": "a=1\n\\boxed{1}", "reward": 1}
IDS = {"prompt_ids": [5], "response_ids": [6, 7], "reward": 1}


@pytest.mark.parametrize(
    ("lines", "words", "message"),
    [
        ([GOOD] * 9, [], "all 9 rewards are 1, so there is nothing to tell apart"),
        ([GOOD | {"reward": 0}] * 9, ["--stage", "rejection"], "no answer is right"),
        ([GOOD, GOOD | {"prompt": "b=1\na?", "reward": 0}], ["--stage", "dpo"], "no question has a right and a wrong"),
        ([GOOD, GOOD | {"response": ""}], [], "row 1: no prompt, or no action token"),
        ([GOOD, GOOD | {"prompt": ""}], [], "row 1: no shape of row .* has these columns .blank: prompt"),
        ([GOOD, {"prompt": "x", "response": "y"}], [], "row 1: no reward: --rows needs graded responses"),
        ([GOOD, GOOD | {"reward": "good"}], [], "row 1: 'reward' must be a number, not 'good'"),
        ([GOOD, GOOD | {"reward": math.nan}], [], "row 1: no reward: --rows needs graded responses"),
        ([[1, 2]], [], "row 0: expected"),
        ([GOOD | {"prompt_ids": [5], "response_ids": [9999]}], [], "row 0: ids of another tokenizer"),
        ([GOOD | {"prompt_ids": [5], "response_ids": [6, 7]}], [], "row 0: ids of another tokenizer"),
        ([IDS | {"actions": [1]}], [], "a mask of another length"),
        ([IDS | {"actions": [0, 0]}], [], "row 0: no prompt, or no action"),
        ([GOOD | {"question": 0}, GOOD | {"question": 0, "prompt": "b=1\na?", "reward": 0}], ["--stage", "dpo"],
         "no question has a right and a wrong"),
        ([{"conversations": [{"role": "user", "content": "x"}], "reward": 1}], [],
         "row 0: 'conversations' has no assistant turn"),
    ],
)  # fmt: skip
def test_bad_rows_get_one_message_that_names_the_row(nano, tmp_path, lines, words, message):
    data = write_rows(tmp_path / "rows.jsonl", lines)
    with pytest.raises(InputError, match=message):
        oreo.main(settings(nano, "--rows", data, "--batch_size", "1", "--out", tmp_path / "run", *words))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_value_checkpoint_that_does_not_fit_is_refused(nano, rows, tmp_path, world):
    tokenizer = load_tokenizer(nano)
    other = load_policy("nano", world, from_config=dict(NANO, vocab_size=50), kind=ValueModel)
    export(other, tokenizer, tmp_path / "value", world)
    words = ["--rows", rows, "--out", tmp_path / "run"]
    with pytest.raises(InputError, match="a vocabulary of 50 does not fit --model's of"):
        oreo.main(settings(nano, *words, "--value", tmp_path / "value"))
    export(load_policy("nano", world, from_config=dict(NANO, vocab_size=50)), tokenizer, tmp_path / "model", world)
    with pytest.raises(InputError, match="--reference .*model: a vocabulary of 50 does not fit --model's of"):
        oreo.main(settings(nano, *words, "--reference", tmp_path / "model"))
    own = dict(NANO, vocab_size=len(tokenizer), max_position_embeddings=20)
    short = load_policy("nano", world, from_config=own, kind=ValueModel)
    export(short, tokenizer, tmp_path / "short", world)
    export(load_policy("nano", world, from_config=own), tokenizer, tmp_path / "few", world)
    for flag, name in (("--value", "short"), ("--reference", "few")):
        with pytest.raises(InputError, match=f"{flag} .*{name}: sequences of up to .* exceed its 20 positions"):
            oreo.main(settings(nano, *words, flag, tmp_path / name))
    data = write_rows(tmp_path / "data.jsonl", [igsm.row(p, "test") for p in igsm.problems(1, **IGSM, ops=(1, 2))])
    with pytest.raises(InputError, match="--value .*short: sequences of up to .* exceed its 20 positions"):
        ask = dict(data=(data,), out=str(tmp_path / "eval"), max_tokens=40, verifier=("boxed",), temperature=1.0)
        evaluation.main(evaluation.Args(model=nano, value=str(tmp_path / "short"), search="beam", **ask))
    config = json.loads((tmp_path / "value" / "config.json").read_text())
    (tmp_path / "value" / "config.json").write_text(json.dumps(config | {"hidden_size": 16}))
    with pytest.raises(InputError, match="--value .*value: its weights do not fit .*mismatched are"):
        oreo.main(settings(nano, *words, "--value", tmp_path / "value"))
    with pytest.raises(InputError, match="--model .*value: it is a value model"):
        oreo.main(settings(str(tmp_path / "value"), *words))


def test_a_folder_without_a_trained_head_searches_nothing_and_says_so(nano, rows, tmp_path, world):
    data = write_rows(tmp_path / "data.jsonl", [igsm.row(p, "test") for p in igsm.problems(1, **IGSM, ops=(1, 2))])
    with pytest.raises(InputError, match="--value .*no trained value head there: .*Qwen2ForCausalLM"):
        ask = dict(data=(data,), out=str(tmp_path / "eval"), max_tokens=40, verifier=("boxed",))
        evaluation.main(evaluation.Args(model=nano, value=nano, search="beam", **ask))
    (tmp_path / "game.z8").touch()
    with pytest.raises(InputError, match="no trained value head"):
        agents.main(agents.Args(model=nano, value=nano, games=str(tmp_path)))
    words = ["--rows", rows, "--steps", "1", "--value", nano, "--out", tmp_path / "run"]
    oreo.main(settings(nano, *words))  # it trains one


def test_the_published_value_models_head_is_read(nano, nano_value, tmp_path, world):
    """Architecture LLMForSequenceRegression, weight value_head.weight."""
    folder = tmp_path / "value"
    shutil.copytree(nano_value, folder)
    weights = load_file(folder / "model.safetensors")
    weights["value_head.weight"] = weights.pop("score.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LLMForSequenceRegression"]}
    (folder / "config.json").write_text(json.dumps(config))
    theirs, ours = (load_policy(path, world, kind=ValueModel) for path in (folder, nano_value))
    batch = pack([([5, 6], [7, 8, 9])])
    torch.testing.assert_close(theirs(batch), ours(batch))  # files of other headers lie otherwise in memory: rounding
    assert ours(batch).abs().min() > 0
    with pytest.raises(InputError, match="it is a value model"):
        load_policy(str(folder), world)


@pytest.mark.parametrize("words", [[], ["--ask", "user"]])
def test_gsm8k_and_math_are_asked_and_answered_as_published(nano, words, tmp_path):
    gsm8k = {"question": "q?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004"}
    math_row = {"problem": "p?", "solution": "so \\boxed{\\frac{1}{2}}.", "level": "Level 1", "type": "Algebra"}
    ask = "user" if words else "system"
    items = [oreo.as_published(read_row(row, "x"), row, ask) for row in (gsm8k, math_row)]
    box = "Please reason step by step, and put your final answer within \\boxed{}."
    if words:
        prompts = [[{"role": "user", "content": f"{q}\n{box}"}] for q in ("q?", "p?")]
    else:
        hashes = "Please reason step by step, and produce a final answer following 4 '#', like '#### 0'"
        prompts = [[{"role": "system", "content": s}, {"role": "user", "content": q}]
                   for s, q in ((hashes, "q?"), (box, "p?"))]  # fmt: skip
    assert [item.prompt for item in items] == prompts
    assert [[t.text for t in item.traces] for item in items] == [[gsm8k["answer"]], [math_row["solution"]]]
    assert [item.gold for item in items] == ["1004", "\\frac{1}{2}"]
    other = {"question": "q?", "options": ["a", "b"], "answer": "A"}
    assert oreo.as_published(read_row(other, "x"), other, ask) == read_row(other, "x")
    files = [write_rows(tmp_path / "gsm8k.jsonl", [gsm8k] * 3), write_rows(tmp_path / "math.jsonl", [math_row] * 2)]
    args = settings(nano, "--stage", "sft", "--data", *files, *words, "--max_prompt_tokens", "900")
    units, count = oreo.training_units(load_tokenizer(nano), args, False)
    assert [unit[0].index for unit in units] == [0, 1, 2, 3, 4] and count["kept"] == count["rows"] == 5
    bad = write_rows(tmp_path / "math.jsonl", [math_row | {"solution": "no"}])
    with pytest.raises(InputError, match="math.jsonl, all 1 rows: the gold answer is missing"):
        oreo.read_problems(load_tokenizer(nano), settings(nano, "--data", bad), traces="ignored")


def test_rows_of_text_and_conversations_begin_with_the_tokenizers_bos(nano, tmp_path):
    tokenizer = load_tokenizer(nano)

    def ids_of(row):
        item = read_row(row, "x")
        return trace_ids(item, item.traces[0], tokenizer, 0)

    plain = ids_of(GOOD)
    turns = [{"role": "user", "content": "a=1"}, {"role": "assistant", "content": "a=1"}]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    talk = conversation_ids(turns, tokenizer, 0)
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", bos)])
    prompt, response, _ = ids_of(GOOD)
    assert prompt == [bos, *plain[0]] and response == plain[1]
    assert ids_of(GOOD | {"prompt": "<|bos|>a=1\na?"})[0] == prompt  # not twice
    assert conversation_ids(turns, tokenizer, 0) == ([bos, *talk[0]], *talk[1:])
    rows, how = [GOOD, {"prompt": turns[:1]}], dict(source="x", traces="ignored", golds=False)
    assert [e.prompt for e in make_examples(rows, tokenizer, oreo.Args(), **how)[0]] == [prompt, talk[0]]  # by template


def test_rows_are_warned_of_as_in_every_script(nano, tmp_path, capsys):
    asked = {"prompt": [{"role": "user", "content": "a=1<|eos|>"}], "response": "Seven", "reward": 1}
    drawn = {"prompt_ids": [5], "response_ids": [2, 1], "reward": 1}  # 2: the unknown token
    data = write_rows(tmp_path / "rows.jsonl", [asked, drawn])
    oreo.read_rows(data, load_tokenizer(nano), settings(nano, "--rows", data))
    warned = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    said = ["prompts hold special tokens", "traces hold text that the tokenizer", "rows have a trace without </think>"]
    assert len(warned) == 3 and all(f": 1 of 2 {text}" in line for line, text in zip(warned, said, strict=True))


def test_prompt_and_response_have_one_limit_together(nano, rows, tmp_path):
    tokenizer = load_tokenizer(nano)
    every, _ = oreo.read_rows(rows, tokenizer, settings(nano, "--rows", rows))
    longest = max(len(row.prompt) + len(row.response) for row in every) - 3
    words = ["--rows", rows, "--max_row_tokens", str(longest)]
    kept, count = oreo.read_rows(rows, tokenizer, settings(nano, *words))
    assert [row.index for row in kept] == [r.index for r in every if len(r.prompt) + len(r.response) <= longest]
    assert count["response_too_long"] == len(every) - len(kept) > 0
    cut, _ = oreo.read_rows(rows, tokenizer, settings(nano, *words, "--long_response", "cut"))
    assert max(len(row.prompt) + len(row.response) for row in cut) == longest and len(cut) == len(every)


def test_a_long_solution_is_left_out_or_cut_to_the_rows_limit(nano, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"problem": "a=1 a?", "solution": "a=1 " * 9 + "\\boxed{1}"}] * 4)
    words = ["--stage", "sft", "--data", data, "--ask", "user"]
    words += ["--max_prompt_tokens", "900", "--max_response_tokens", "900"]
    [[whole], *_], _ = oreo.training_units(load_tokenizer(nano), settings(nano, *words), False)
    limit = len(whole.prompt) + len(whole.response) - 3
    words += ["--max_row_tokens", str(limit)]
    with pytest.raises(InputError, match="no row is left: 0 of 4 rows .4 over --max_row_tokens"):
        oreo.training_units(load_tokenizer(nano), settings(nano, *words), False)
    [[cut], *_], _ = oreo.training_units(load_tokenizer(nano), settings(nano, *words, "--long_response", "cut"), False)
    assert len(cut.prompt) + len(cut.response) == limit and cut.response == whole.response[:-3]


def test_long_responses_are_counted_and_left_out_or_cut(nano, rows, tmp_path):
    args = settings(nano, "--rows", rows, "--max_response_tokens", "14")
    kept, count = oreo.read_rows(rows, load_tokenizer(nano), args)
    assert 0 < count["response_too_long"] < 24 and len(kept) == 24 - count["response_too_long"] == count["kept"]
    cut, count = oreo.read_rows(rows, load_tokenizer(nano), dataclasses.replace(args, long_response="cut"))
    assert len(cut) == 24 and max(len(row.response) for row in cut) == 14 and count["response_too_long"] > 0


def test_conversations_train_on_assistant_turns_alone(nano, tmp_path):
    said = (("user", "a=1\na?"), ("assistant", "<think>\na=1"), ("user", "b?"), ("assistant", "<think>\nb=2"))
    turns = [{"role": role, "content": content} for role, content in said]
    data = write_rows(tmp_path / "rows.jsonl", [{"conversations": turns, "reward": i % 2} for i in range(8)])
    args = settings(nano, "--rows", data, "--out", tmp_path / "run")
    tokenizer = load_tokenizer(nano)
    [row, *_], _ = oreo.read_rows(data, tokenizer, args)
    spans = [tokenizer.decode([t for t, a in zip(row.response, row.actions, strict=True) if a == side])
             for side in (True, False)]  # fmt: skip
    assert spans == ["a=1<|eos|>b=2<|eos|>", "<|user|>b?<|assistant|><think>\n"]
    assert sum(row.steps) == 2
