"""behavior_injection.py from end to end on models that train in seconds: data, stages, tables, ranks, bad input."""

import dataclasses
import json
import math
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import behavior_injection as bridge
import igsm
from common import verifiers
from common.data import InputError, batch_indices
from common.metrics import read_metrics
from common.report import read_results, write_results
from common.trainer import load_tokenizer
from common.verifiers import Verdict
from tests import behavior_ranks as ranks
from tests.conftest import other_weights, parsed, read_rows, run_script, write_rows
from tools import influence

pytestmark = pytest.mark.usefixtures("without_curves")
SMALL = [
    "--preset", "tiny", "--model", "models/scratch", "--arms", "vanilla", "bridge", "--base_problems", "80",
    "--base_steps", "2",
    "--sft_problems", "12", "--sft_batch_size", "4", "--sft_steps", "2", "--rl_problems", "20", "--eval_problems", "6",
    "--ops", "1", "3", "--val_ops", "2", "2", "--test_ops", "2", "3", "--base_ops", "1", "2", "--batch_size", "4",
    "--group_size", "4", "--max_response_tokens", "50", "--steps", "2", "--eval_every", "2", "--save_every", "0",
]  # fmt: skip
MEASURE = [*SMALL, "--influence_queries", "6", "--influence_group", "4", "--kernel_queries", "4"]


def settings(*words, **changes):
    return parsed("behavior_injection", *SMALL, *words, **changes)


def measure(*words):
    influence.main(parsed("tools.influence", *MEASURE, *words))


def half_right(patch):
    """A verifier that accepts half of the answers."""
    patch.setattr(verifiers, "grade", ranks.odd_length)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """All stages, then the influence; a folder not to be changed."""
    out = tmp_path_factory.mktemp("pipeline") / "run"
    with pytest.MonkeyPatch.context() as patch:
        half_right(patch)
        bridge.main(settings("--out", out, "--keep_best"))
        measure("--out", out)
    return out


@pytest.fixture
def folder(pipeline, tmp_path):
    """A copy to work in."""
    return shutil.copytree(pipeline, tmp_path / "run")


def test_every_set_has_its_operations(pipeline):
    ranges = {"rl": (1, 3), "influence": (1, 3), "base": (1, 2), "val": (2, 2), "test_id": (2, 2), "test_ood": (3, 3)}
    for name, (low, high) in ranges.items():
        ops = {row["extra_info"]["ops"] for row in read_rows(pipeline / "data" / f"{name}.jsonl")}
        assert ops <= set(range(low, high + 1)), name


def test_a_stage_has_its_own_settings_whatever_command_it_is_part_of():
    args = settings(lr=0.3, sft_lr=0.1, base_lr=0.2, schedule="linear", warmup=0.5, max_grad_norm=8.0, betas=(0.5, 0.6),
                    updates_per_step=2, sft_epochs=3, prompt_loss=True, sft_rows_per_mean=4)  # fmt: skip
    stages = sft, base, rl = [bridge.settings_of(args, stage, "bridge") for stage in ("sft", "base", "rl")]
    assert [(a.lr, a.schedule, a.warmup) for a in stages] == [
        (0.1, "constant", 0.0), (0.2, "cosine", 0.02), (0.3, "linear", 0.5)
    ]  # fmt: skip
    assert [a.max_grad_norm for a in stages] == [1.0, 1.0, 8.0]
    assert [a.betas for a in stages] == [(0.9, 0.95), (0.9, 0.99), (0.5, 0.6)]
    assert [(a.batch_size, a.updates_per_step) for a in stages] == [(4, 1), (64, 1), (4, 2)]
    assert (sft.epochs, sft.prompt_loss, sft.sft_rows_per_mean) == (3, True, 4)
    assert (base.prompt_loss, base.sft_rows_per_mean) == (False, 0)  # a mean over the tokens of answers


def test_the_stages_and_the_influence_leave_models_metrics_and_a_table(pipeline):
    results = json.loads((pipeline / "results.json").read_text())
    assert results.keys() == {"base", "vanilla", "bridge"}
    for arm in ("vanilla", "bridge"):
        for stage, n in (("sft", [1, 2]), ("rl", [0, 1, 2])):
            rows = read_metrics(pipeline / arm / stage)
            assert [row["step"] for row in rows] == n
            assert all(math.isfinite(value) for row in rows for value in row.values())
            assert (pipeline / arm / stage / "model" / "model.safetensors").exists()
            tests = results[arm][stage]
            for test in ("test_id", "test_ood"):
                assert {"accuracy", "chain", "accuracy_other", "reflections", "truncated"} <= tests[test].keys()
                assert tests[test]["questions"] == 6 and 0 <= tests[test]["greedy"] <= 1
        assert (pipeline / arm / "rl" / "best" / "model.safetensors").exists()
        assert rows[-1]["mismatch/max"] < 1e-4 and rows[1]["policy/kl_ref"] < 1e-9 < rows[2]["policy/kl_ref"]
        responses = read_rows(pipeline / arm / "rl" / "samples.jsonl")
        assert {"step", "who", "reward", "detail", "truncated", "advantage", "prompt", "response"} < responses[0].keys()
        assert rows[-1]["tokens/sampled"] == sum(16 * row["length/own"] for row in rows[1:])
        found = json.loads((pipeline / arm / "influence" / "influence.json").read_text())
        queries = read_rows(pipeline / arm / "influence" / "queries.jsonl")
        assert found["queries"] == len(queries) == 6 == sum(group["queries"] for group in found["by_right"])
        assert found["never"] + found["sometimes"] + found["always"] == pytest.approx(1)
        assert found["dJ"] == pytest.approx(sum(q["dJ"] for q in queries) / 6)
        assert all(q["dJ"] == 0 for q in queries if q["right"] in (0, 4))
        assert any(q["dJ"] for q in queries) and all(abs(q["cosine"]) <= 1 for q in queries)
    for name in ("curves.png", "influence.png", "bridge/influence/influence.png", "bridge/rl/curves.png"):
        assert (pipeline / name).read_bytes().startswith(b"\x89PNG")


def test_all_arms_tell_the_same_problems(pipeline, tmp_path, world):
    arms = list(bridge.arms_of(settings()))
    bridge.make_data(settings("--out", tmp_path, "--arms", *arms), world)
    told = {arm: read_rows(tmp_path / "data" / f"sft_{arm}.jsonl") for arm in arms}
    assert {arm: len(rows) for arm, rows in told.items()} == {arm: 48 if "aug" in arm else 12 for arm in arms}
    vanilla, injected, augmented = told["vanilla"], told["bridge"], told["pp_aug"]
    assert [row["prompt"] for row in vanilla] == [row["prompt"] for row in injected]
    assert [row["target"] for row in vanilla] != [row["target"] for row in injected]
    for i, row in enumerate(vanilla):
        copies = augmented[4 * i : 4 * i + 4]
        assert copies[0] == row and all(copy["target"] == row["target"] for copy in copies)
        lines = [sorted(copy["prompt"][0]["content"].split("\n")) for copy in copies]
        assert lines == [lines[0]] * 4
    templates = [{row["extra_info"]["template"] for row in read_rows(pipeline / "data" / f"{name}.jsonl")}
                 for name in ("sft_vanilla", "rl", "influence", "base", "val", "test_id", "test_ood")]  # fmt: skip
    assert not set.union(*templates[:4]) & set.union(*templates[4:])


def test_arms_are_told_with_the_chances_of_the_flags():
    ways = bridge.arms_of(settings(reflection=0.2, analysis=0.3, retry=0.4))
    assert ways["bridge"] == [dict(subgoals=True, reflection=0.2, analysis=0.3)]
    alone = [ways[arm] for arm in ("reflection", "analysis", "retry")]
    assert alone == [[dict(reflection=0.2)], [dict(analysis=0.3)], [dict(retry=0.4)]]
    assert ways["rc_aug"] == [dict(solution_variant=i) for i in range(4)]


def test_each_arm_has_its_behaviors_alone(tmp_path, world):
    arms = {"vanilla": set(), "bridge": {"subgoals", "reflections", "analyses"}, "subgoal": {"subgoals"},
            "reflection": {"reflections"}, "analysis": {"analyses"}, "retry": {"retries"},
            "pp_aug": set(), "rc_aug": set()}  # fmt: skip
    args = settings("--out", tmp_path, "--ops", 5, 8, "--reflection", 0.5, "--retry", 0.5, "--arms", *arms)
    assert arms.keys() == bridge.arms_of(args).keys()
    bridge.make_data(args, world)
    for arm, behaviors in arms.items():
        found = set()
        for row in read_rows(tmp_path / "data" / f"sft_{arm}.jsonl"):
            question, solution = row["prompt"][-1]["content"], row["target"][0]["content"]
            check = igsm.check_solution(question, solution, modulus=args.modulus)
            assert check.correct
            found |= {name for name in ("subgoals", "reflections", "analyses", "retries") if getattr(check, name)}
        assert found == behaviors, arm


def test_data_again_with_other_arms_adds_them_and_with_other_settings_forgets_the_rest(tmp_path, world):
    def data(*flags):
        bridge.make_data(settings("--out", tmp_path, *flags), world)
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").glob("*.jsonl")}

    first = data("--arms", "vanilla")
    both = data("--arms", "bridge")
    assert both.keys() - first.keys() == {"sft_bridge.jsonl"} and first.items() <= both.items()
    (tmp_path / "data" / "rl.jsonl").unlink()
    again = data("--arms", "vanilla")
    assert again.keys() == both.keys() and again["sft_bridge.jsonl"] == both["sft_bridge.jsonl"]
    with pytest.raises(InputError, match="ops must be"):
        data("--arms", "vanilla", "--ops", 9, 5)
    assert data("--arms", "vanilla") == again  # nothing was lost by that
    assert data("--arms", "vanilla", "--seed", 1).keys() == both.keys() - {"sft_bridge.jsonl"}


def test_sets_have_the_problems_of_their_settings_and_are_made_anew_with_others(tmp_path, world):
    """In sentences, with plain integers and the system prompt too, as in the paper's run. A seed changes the training
    problems alone."""

    def data(**changes):
        bridge.make_data(settings("--out", tmp_path, **dict(arms=("bridge",)) | changes), world)
        return {path.stem: read_rows(path) for path in (tmp_path / "data").glob("*.jsonl")}

    def rows(seed, *system, **more):
        return [igsm.row(p, "train", *system) for p in igsm.problems(20, ops=(1, 3), split="train", seed=seed, **more)]

    words = dict(style="natural", modulus=0, max_params=7, shuffle=True, system_prompt=True)
    assert data(**words)["rl"] == rows(200, True, style="natural", max_params=7)
    without = data(**words | dict(system_prompt=False))
    assert without["rl"] == rows(200, style="natural", max_params=7)
    more = data(**words | dict(system_prompt=False), reflection=1.0)
    assert {name for name in more if more[name] != without[name]} == {"sft_bridge"}
    symbols = dict(style="symbolic", max_params=4, shuffle=False)
    assert data(modulus=5)["rl"] == rows(200, **symbols, modulus=5)
    first, other = data(), data(seed=1)
    assert first["rl"] == rows(200, **symbols, modulus=23, max_literal=9)
    assert {name for name in first if first[name] == other[name]} == {"val", "test_id", "test_ood"}


@pytest.mark.parametrize("name", ["rl", "sft_vanilla", "test_ood"])
def test_rows_that_were_not_made_by_the_data_stage_are_never_replaced(tmp_path, world, name):
    """Neither own files, nor files that were made and then edited; files beside them stay."""
    own, beside, words = tmp_path / "data" / f"{name}.jsonl", tmp_path / "data" / f"{name}_2.jsonl", ("--out", tmp_path)
    message = re.escape(f"{own} was not made by --stage data: move it away, or use it")
    own.parent.mkdir()
    own.write_text("mine\n")
    with pytest.raises(InputError, match=message):
        bridge.make_data(settings(*words), world)
    assert own.read_text() == "mine\n"
    own.unlink()
    bridge.make_data(settings(*words), world)
    edited = own.read_text() + "mine\n"
    own.write_text(edited)
    beside.write_text("mine\n")
    bridge.make_data(settings(*words), world)  # the same settings: the file is kept
    with pytest.raises(InputError, match=message):
        bridge.make_data(settings(*words, "--max_params", 5), world)
    assert own.read_text() == edited
    own.unlink()
    bridge.make_data(settings(*words, "--max_params", 5), world)
    assert own.exists() and beside.read_text() == "mine\n"


def test_the_influence_is_the_same_for_one_and_two_ranks(pipeline, folder):
    run_script("tests/behavior_ranks.py", *MEASURE, "--arms", "bridge", "--out", folder, ranks=2)
    one, two = (read_rows(at / "bridge/influence/queries.jsonl") for at in (pipeline, folder))
    size = max(abs(row["dJ"]) for row in one)
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5 * size)
    one, two = (json.loads((at / "bridge/influence/influence.json").read_text()) for at in (pipeline, folder))
    for pair, values in one["kernel"].items():
        assert two["kernel"][pair] == pytest.approx(values, rel=1e-3, abs=1e-5)


def test_the_own_influence_is_in_the_papers_form_only(folder, monkeypatch):
    half_right(monkeypatch)
    for own in (True, False):
        measure("--out", folder, "--arms", "bridge", "--kernel_dims", 200_000, *["--influence_self"] * own)
        found = json.loads((folder / "bridge" / "influence" / "influence.json").read_text())
        queries = read_rows(folder / "bridge" / "influence" / "queries.jsonl")
        # G of the queries themselves: mean dJ = <mean grad J(q), G> = |G|^2
        squared = pytest.approx(found["G_norm"] ** 2, rel=0.01)
        assert (sum(q["dJ"] for q in queries) / 6 == squared) == own
    assert found["kernel_dJ"]["with own answers"] > found["kernel_dJ"]["without"]


def test_a_verifier_that_always_fails_ends_the_test_of_models_and_the_influence(folder, monkeypatch):
    monkeypatch.setattr(verifiers, "grade", lambda texts, *_, **__: [Verdict(0.0, "error", "boom")] * len(texts))
    with pytest.raises(InputError, match="failed on all .* answers .boom."):
        bridge.main(settings("--out", folder, "--arms", "bridge", stage="eval"))
    with pytest.raises(InputError, match="failed on all .* answers .boom."):
        measure("--out", folder, "--arms", "bridge")


@pytest.mark.parametrize("prompt_loss", [True, False])
def test_sft_trains_on_prompts_and_solutions_or_on_solutions_alone(folder, prompt_loss):
    """The logged loss of the first step is that of a plain Transformers model on the whole texts."""
    args = settings("--out", folder, prompt_loss=prompt_loss, sft_steps=1, sft_rows_per_mean=0)
    tokenizer = load_tokenizer(str(folder / "base" / "model"))
    lm = AutoModelForCausalLM.from_pretrained(folder / "base" / "model")
    examples, _ = bridge.read_set("sft_bridge", tokenizer, args, traces="needed")
    losses = []
    shutil.rmtree(folder / "bridge" / "sft")  # it is finished
    for i in batch_indices(len(examples), 4, 0, args.seed):
        example = examples[i]
        ids = torch.tensor(example.prompt + example.trace)
        assert tokenizer.decode(ids).endswith("<|eos|>")
        logp = lm(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        losses.append(-(logp if prompt_loss else logp[len(example.prompt) - 1 :]))
    bridge.train(bridge.settings_of(args, "sft", "bridge"))
    [row] = read_metrics(folder / "bridge" / "sft")
    assert row["sft/loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


def test_the_bonus_for_form_is_in_the_reward_but_solves_no_question(folder, monkeypatch):
    half_right(monkeypatch)
    monkeypatch.setattr(bridge, "format_reward", lambda said: float("<|eos|>" not in said))  # of every answer
    shutil.rmtree(folder / "bridge" / "rl")  # it is finished
    args = settings("--out", folder, format_reward=0.05, steps=1, eval_every=0, log_samples=16)
    bridge.train(bridge.settings_of(args, "rl", "bridge"))
    [row], samples = read_metrics(folder / "bridge" / "rl"), read_rows(folder / "bridge" / "rl" / "samples.jsonl")
    rewards = [sample["reward"] for sample in samples]
    assert set(rewards) == {0.05, 1.05} and row["reward/own"] == pytest.approx(sum(rewards) / 16)
    groups = {sample["prompt"]: [s["reward"] for s in samples if s["prompt"] == sample["prompt"]] for sample in samples}
    assert row["group/solve_all"] == sum(min(group) > 1 for group in groups.values()) / 4
    assert row["group/solve_none"] == sum(max(group) < 1 for group in groups.values()) / 4


def test_a_prompt_ends_with_the_tag_that_solutions_go_on_from(folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder / "base" / "model", model)
    tokenizer = bridge.open_tokenizer(str(model), settings())
    before = bridge.read_set("rl", tokenizer, settings("--out", folder), traces="ignored")[0][0]
    assert before.text.count("<think>") == 1
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("<think>\n", ""))
    tokenizer = bridge.open_tokenizer(str(model), settings())
    after = bridge.read_set("rl", tokenizer, settings("--out", folder), traces="ignored")[0][0]
    assert after.text == before.text and after.text.endswith("<think>\n") and after.prompt == before.prompt


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "bridge", "oops"], "--arms oops: no such arm; there are vanilla, bridge"),
        (["--analysis", "2"], '--analysis must be between 0 and 1, or "table", not 2'),
        (["--reflection", "2"], "--reflection must be between 0 and 1, not 2"),
        (["--stage", "base", "--base_problems", "0"], "--stage base needs --base_problems"),
        (["--data", "igsm:1-2"], "put your own rows into OUT/data .* and run --stage sft, rl or eval"),
        (["--batch_size", "5", "--updates_per_step", "2"], "--batch_size 5 is not a multiple of --updates_per_step 2"),
        (["--rl_problems", "3"], "--rl_problems 3 are fewer than --batch_size"),
        (["--sft_problems", "3"], "--sft_problems 3 are fewer than --sft_batch_size"),
        (["--chat_template", "no.jinja"], "--chat_template no.jinja: no such file"),
        (["--ops", "40", "40"], "problems of sft: no problem of 40 to 40 operations"),
        (["--stage", "sft"], "sft_vanilla.jsonl is missing: run --stage data first"),
        (["--stage", "rl", "--sft_model", "no/such"], "--sft_model no/such is one arm's: name it by --arms"),
        (["--stage", "rl", "--sft_model", "no/such", "--arms", "bridge"], "--sft_model no/such: no tokenizer there"),
        (["--stage", "rl", "--arms", "bridge"], "sft/model is missing: run the stage before this one first"),
        (["--stage", "eval"], "no model there; run --stage sft and --stage rl first"),
        (["--stage", "sft", "--sft_model", "some/model", "--arms", "bridge"], "some/model is .* --stage rl or eval"),
        (["--group_size", "1"], r"--group_size must be 2 or more \(a single answer has no advantage\), not 1"),
        (["--sft_epochs", "0"], "--sft_epochs must be positive"),
        (["--verifier", "oops"], "--verifier oops: no verifier 'oops': math, "),
    ],
)
def test_bad_settings_get_one_message(tmp_path, words, message, pipeline):
    if words[1] == "sft":  # a base model is there, the data are not
        shutil.copytree(pipeline / "base", tmp_path / "run" / "base")
    with pytest.raises(InputError, match=message):
        bridge.main(settings("--out", tmp_path / "run", *words))
    assert not list(tmp_path.rglob("metrics.jsonl")) or words[1] == "sft"


def test_too_few_rows_and_other_settings_are_named(folder):
    with pytest.raises(InputError, match="bridge/rl was made with other settings .--batch_size 4 there, 32 here"):
        bridge.train(bridge.settings_of(settings("--out", folder, "--batch_size", "32"), "rl", "bridge"))
    shutil.rmtree(folder / "bridge" / "rl")
    with pytest.raises(InputError, match="rl.jsonl: 20 rows are fewer than --batch_size 32"):
        bridge.train(bridge.settings_of(settings("--out", folder, "--batch_size", "32"), "rl", "bridge"))
    args = settings("--out", folder, "--save_every", "1", "--steps", "1", "--eval_every", "0")
    bridge.train(bridge.settings_of(args, "rl", "bridge"))
    with pytest.raises(InputError, match="--kl_coef 0.001 there, 0.5 here"):
        bridge.train(bridge.settings_of(dataclasses.replace(args, kl_coef=0.5), "rl", "bridge"))


def test_rl_does_not_go_on_from_a_checkpoint_of_another_sft_model(folder):
    shutil.rmtree(folder / "bridge" / "rl")
    args = bridge.settings_of(settings("--out", folder, "--save_every", 1, "--eval_every", 0), "rl", "bridge")
    bridge.train(dataclasses.replace(args, steps=1))
    other_weights(folder / "bridge" / "sft" / "model")  # as if it was trained anew
    with pytest.raises(InputError, match="bridge/rl was begun with other weights .--model"):
        bridge.train(args)


def test_sft_takes_own_rows_without_golds_and_names_its_batch_size(folder):
    rows = [{"prompt": f"a={i % 10}\na?", "response": f"a={i % 10}\n</think>", "label": 1} for i in range(12)]
    write_rows(folder / "data" / "sft_vanilla.jsonl", rows)
    shutil.rmtree(folder / "vanilla")
    own = ("--out", folder, "--stage", "sft", "--arms", "vanilla", "--sft_steps", "1", "--sft_batch_size")
    with pytest.raises(InputError, match="sft_vanilla.jsonl: 12 rows are fewer than --sft_batch_size 13"):
        bridge.main(settings(*own, "13"))
    bridge.main(settings(*own, "4"))
    assert (folder / "vanilla" / "sft" / "model").exists()


@pytest.mark.parametrize(("question", "message"), [
    ("a=3\na?", ""), ("0+1=?", "row 1: cannot parse .*: use eval.py"),
    ("a=22\nb=a+5\nb?", "row 1: with --modulus 23 its answer is 4, not 3"),  # 3 is of 24
])  # fmt: skip
def test_own_tests_may_have_any_shape_and_must_be_igsms(question, message, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "b=1\nb?"}], "answer": "1"}, {"prompt": question, "answer": "3"}]
    path = write_rows(tmp_path / "test_id.jsonl", rows)
    if not message:
        assert bridge.read_questions(path, settings()) == ["b=1\nb?", question]
        return
    with pytest.raises(InputError, match=message):
        bridge.read_questions(path, settings())


def arms_of_tables(printed):
    """The first cells of the printed tables' rows, without headings."""
    firsts = [line.split()[1] for line in printed.splitlines() if line.startswith("| ")]
    return [first for first in firsts if first not in ("%", "queries")]


def test_tables_hold_the_arms_of_earlier_commands_too(folder, capsys):
    (folder / "results.json").unlink()
    (folder / "influence.png").unlink()
    bridge.main(settings("--out", folder, "--stage", "eval", "--arms", "bridge"))
    assert json.loads((folder / "results.json").read_text()).keys() == {"base", "vanilla", "bridge"}
    measure("--out", folder, "--arms", "bridge")
    assert (folder / "influence.png").exists()
    assert arms_of_tables(capsys.readouterr().out) == ["base", "vanilla", "bridge", "vanilla", "bridge"]


def test_fewer_rows_are_asked_and_results_of_another_test_leave_the_table(folder, capsys):
    bridge.main(settings("--out", folder, "--stage", "eval", "--arms", "bridge", "--eval_limit", 2))
    found = json.loads((folder / "bridge" / "eval.json").read_text())
    assert {found[stage][name]["questions"] for stage in ("sft", "rl") for name in ("test_id", "test_ood")} == {2}
    printed = capsys.readouterr().out
    assert "vanilla/eval.json is left out of the table: it was measured with other settings (--eval_limit 0" in printed
    assert arms_of_tables(printed) == ["base", "bridge"]
    bridge.main(settings("--out", folder, "--stage", "data", "--test_ops", 2, 4))
    bridge.main(settings("--out", folder, "--stage", "eval", "--arms", "vanilla", "--test_ops", 2, 4))
    printed = capsys.readouterr().out
    assert "bridge/eval.json is left out" in printed and "; other test_ood.jsonl)" in printed
    assert arms_of_tables(printed) == ["base", "vanilla"] and (folder / "bridge" / "eval.json").exists()
    measure("--out", folder, "--arms", "bridge", "--ops", 2, 3)
    printed = capsys.readouterr().out
    assert "vanilla/influence/influence.json is left out" in printed and "(other influence.jsonl)" in printed
    assert arms_of_tables(printed) == ["bridge"]


def test_a_mask_alone_needs_the_reference_and_few_rows_are_held_out(pipeline, tmp_path, monkeypatch, capsys):
    for name in ("data", "bridge/sft"):
        shutil.copytree(pipeline / name, tmp_path / name)
    opened = []

    def begin(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bridge, "open_policy", lambda *_, **__: opened.append(1) or torch.nn.Linear(1, 1))
    monkeypatch.setattr(bridge.Run, "begin", begin)
    for mask, models in ((0.0, 1), (0.1, 2)):
        args = settings("--out", tmp_path, "--kl_coef", 0, "--kl_mask", mask, "--eval_limit", 2)
        opened.clear()
        with pytest.raises(KeyboardInterrupt):
            bridge.train(bridge.settings_of(args, "rl", "bridge"))
        assert len(opened) == models
    assert capsys.readouterr().out.count("; 2 held-out; ") == 2


def test_the_table_shows_sft_and_rl_and_the_chain_of_rl(tmp_path, capsys, world):
    def tests(start):
        return {name: dict(accuracy=(start + i) / 100, chain=(start + i + 1) / 100)
                for i, name in ((0, "test_id"), (2, "test_ood"))}  # fmt: skip

    args = settings("--out", tmp_path)
    bridge.make_data(args, world)
    results = {"sft": tests(10), "rl": tests(20)}
    write_results(tmp_path / "vanilla" / "eval.json", results, args, bridge.TESTED_WITH, [])
    bridge.report(args)
    cells = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| vanilla")]
    assert [cell.strip() for cell in cells[0]] == ["vanilla", "10.0", "20.0", "21.0", "12.0", "22.0", "23.0"]


@pytest.mark.parametrize("name", ["val", "test_id", "test_ood", "influence"])
def test_rows_that_are_asked_and_do_not_fit_are_told(name, folder, nano, capsys, world):
    path, args = folder / "data" / f"{name}.jsonl", settings("--out", folder)
    rows = read_rows(path)
    rows[0]["prompt"][-1]["content"] *= 99
    write_rows(path, rows)
    bridge.read_set(name, bridge.open_tokenizer(nano, args), args, traces="ignored")
    said = f"{name}.jsonl: {len(rows) - 1} of {len(rows)} rows (1 prompts over --max_prompt_tokens 160)"
    assert said in capsys.readouterr().out


def test_own_queries_stay_and_must_be_enough(folder):
    (folder / "data" / "influence.settings.json").unlink()  # what the tool leaves beside queries that it made
    before = (folder / "data" / "influence.jsonl").read_bytes()
    with pytest.raises(InputError, match="12 questions fit, 40 are needed"):
        measure("--out", folder, "--arms", "bridge", "--influence_queries", 20)
    assert (folder / "data" / "influence.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        (bridge.TESTED_WITH, dict(verifier="exact", eval_temperature=0.5, max_response_tokens=9, seed=1, modulus=7,
                                  max_prompt_tokens=9, chat_template_args=("a=1",))),
        (influence.MEASURED_WITH, dict(verifier="exact", temperature=0.5, influence_group=2, influence_self=True,
                                       influence_queries=9, kernel_queries=9, kernel_dims=9, seed=1)),
    ],
)  # fmt: skip
def test_results_of_other_settings_or_weights_leave_the_tables(tmp_path, names, changes, nano, capsys):
    path, template = tmp_path / "results.json", tmp_path / "template.jinja"
    template.write_text("a")
    args = influence.Args(out=str(tmp_path), chat_template=str(template))
    asked = [tmp_path / "data" / name for name in names.split() if name.endswith(".jsonl")]
    asked[0].parent.mkdir()
    for file in asked:
        file.write_text("asked\n")
    model = shutil.copytree(nano, tmp_path / "model")
    write_results(path, {"found": 1}, args, names, [str(model)])
    assert read_results({"arm": path}, args, names) == {"arm": {"found": 1}}
    for name, value in changes.items():
        assert not read_results({"arm": path}, dataclasses.replace(args, **{name: value}), names), name
    capsys.readouterr()
    other_weights(model)  # as training that goes on
    template.write_text("b")
    assert not read_results({"arm": path}, args, names)
    assert f"out of the table: {model}, {template} changed after it was measured" in capsys.readouterr().out


def test_no_two_sets_are_the_same_problems(tmp_path, world):
    same = ["--ops", 2, 2, "--val_ops", 2, 2, "--test_ops", 2, 2, "--base_ops", 2, 2]
    bridge.make_data(settings("--out", tmp_path, *same), world)
    names = ("sft_vanilla", "rl", "base", "val", "test_id")  # test_ood has problems of test_id, of other operations
    sets = [read_rows(tmp_path / "data" / f"{name}.jsonl") for name in names]
    assert len({json.dumps([row["prompt"] for row in rows[:6]]) for rows in sets}) == 5


def test_kernels_are_of_gradients_without_advantages(folder, monkeypatch):
    half_right(monkeypatch)
    asked, real = [], influence.objective_gradient
    monkeypatch.setattr(influence, "objective_gradient", lambda policy, rows, n, *rest: (
        asked.append((n, [row.advantage for row in rows])) or real(policy, rows, n, *rest)))  # fmt: skip
    measure("--out", folder, "--arms", "bridge")
    assert [advantages for n, advantages in asked if n == 1] == [[1.0]] * 16  # 4 queries of 4 answers
    assert [n for n, _ in asked if n > 1] == [24] + [4] * 6  # G of all answers, and each query's own mean


def test_queries_that_are_always_solved_are_counted_as_such(folder, monkeypatch):
    monkeypatch.setattr(verifiers, "grade", lambda texts, golds, **_: [verifiers.Verdict(0.5, "ok")] * len(texts))
    measure("--out", folder, "--arms", "bridge")
    found = json.loads((folder / "bridge" / "influence" / "influence.json").read_text())
    assert (found["accuracy"], found["always"], found["dJ"]) == (1.0, 1.0, 0.0)


def test_a_querys_cosine_is_its_dj_over_both_norms(pipeline):
    found = json.loads((pipeline / "bridge" / "influence" / "influence.json").read_text())
    queries = [q for q in read_rows(pipeline / "bridge" / "influence" / "queries.jsonl") if q["dJ"]]
    assert queries
    for q in queries:
        assert q["cosine"] == pytest.approx(q["dJ"] / (q["gradient_norm"] * found["G_norm"]))
