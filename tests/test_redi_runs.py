"""redi.py from end to end on models that train in seconds: stages, losses, ranks, a crash, bad input."""

import dataclasses
import json
import math
import re

import pytest
import torch
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

import igsm
import redi
from common.data import InputError
from common.rows import Trace
from common.trainer import load_policy, parse_args, read_metrics
from tests import redi_ranks
from tests.conftest import NANO, run_script

SMALL = [
    "--preset", "tiny", "--data", "igsm:1-2", "--igsm_problems", "40", "--batch_size", "4", "--steps", "3",
    "--eval_data", "igsm:1-2", "--eval_limit", "6", "--eval_every", "2", "--save_every", "0", "--lr", "1e-3",
    "--max_response_tokens", "60",
]  # fmt: skip


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model folder with random weights and the tokenizer of symbolic iGSM."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), igsm.tokenizer("symbolic", modulus=23)
    torch.manual_seed(3)
    config = dict(NANO, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in config.items() if k != "model_type"})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings(model, tmp_path):
    def make(*words, **changes):
        words = [*SMALL, "--model", model, "--reference_cache", str(tmp_path / "reference"), *map(str, words)]
        args = parse_args(redi.Args, words, stage=redi.STAGES, loss=redi.LOSSES, preset=redi.PRESETS)
        return dataclasses.replace(args, **changes)

    return make


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("words", [["--stage", "sft"], *(["--loss", x] for x in ("redi", "symmetric", "dpo", "simpo"))])
def test_every_stage_and_loss_trains_and_leaves_a_run_folder(words, settings, tmp_path):
    redi.main(settings(*words, "--out", tmp_path / "run"))
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    names = {"eval/mean", "loss/mean", "optim/grad_norm", "logp/chosen", "entropy/chosen", "seconds/step"}
    assert names <= rows[-1].keys()
    of_pairs = {"logp/rejected", "logp/gap", "pair/accuracy", "entropy/rejected"}
    assert (of_pairs <= rows[-1].keys()) == ("sft" not in words)
    if "dpo" in words:  # the policy is its own reference before the first update, and not after it
        assert rows[1]["loss/mean"] == pytest.approx(math.log(2), abs=1e-6)
        assert rows[1]["reward/margin"] == pytest.approx(0, abs=1e-6) != rows[3]["reward/margin"]
    for name in ("args.json", "samples.jsonl", "curves.png", "model/model.safetensors", "model/tokenizer.json"):
        assert (tmp_path / "run" / name).exists()
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().split("\n")[0])
    assert {"prompt", "chosen", "rejected", "chosen_logp", "rejected_logp", "loss"} < sample.keys()


def test_data_then_sft_then_redi_on_a_models_own_wrong_answers(settings, tmp_path):
    """The stages hand on files and a model, and what the sampler drew is what is trained, to the id."""
    redi.main(settings("--stage", "sft", "--out", tmp_path / "sft"))
    model = str(tmp_path / "sft" / "model")
    redi.main(settings("--stage", "data", "--model", model, "--own_answers", "3", "--out", tmp_path / "data"))
    rows = [json.loads(line) for line in (tmp_path / "data" / "pairs.jsonl").read_text().splitlines()]
    [funnel] = [json.loads(line) for line in (tmp_path / "data" / "funnel.json").read_text().splitlines()]
    drawn = json.loads((tmp_path / "data" / "own_answers.json").read_text())
    assert sum(n for name, n in drawn.items() if name != "tokens") == 3 * 40 <= drawn["tokens"]
    assert funnel["rows"] == funnel["positives.jsonl"] == 40
    assert funnel["pairs.jsonl"] == len(rows) == 40 + sum(n for n in funnel.values() if n < 0)
    tokenizer = igsm.tokenizer("symbolic", modulus=23)
    args = settings("--model", model, "--data", tmp_path / "data" / "pairs.jsonl", "--out", tmp_path / "redi")
    pairs, _ = redi.make_pairs(rows, tokenizer, args, source="pairs")
    for pair, row in zip(pairs, rows, strict=True):
        assert list(pair.rejected) == row["rejected_ids"] and pair.rejected[-1] == tokenizer.eos_token_id
        assert row["rejected"].find("\\boxed{" + row["reward_model"]["ground_truth"] + "}") == -1
    redi.main(args)
    assert len(read_metrics(tmp_path / "redi")) == 4
    sft = settings("--stage", "sft", "--data", tmp_path / "data" / "positives.jsonl", "--out", tmp_path / "again")
    redi.main(sft)


def test_what_a_model_drew_keeps_its_ids_in_both_files(settings, tmp_path, monkeypatch):
    tokenizer = igsm.tokenizer("symbolic", modulus=23)
    drawn = [*tokenizer("a=")["input_ids"], *tokenizer("2")["input_ids"] * 2, tokenizer.eos_token_id]
    assert drawn[:-1] != tokenizer("a=22")["input_ids"]  # as text it would be one token less

    def answer(problems, *_):
        for problem in problems:
            problem.chosen = problem.chosen or Trace(tokenizer.decode(drawn[:-1]), 1.0, drawn)

    monkeypatch.setattr(redi, "add_own_answers", answer)
    graded = [{"prompt": "a=22\na?", "responses": ["a=6"], "rewards": [0], "answer": "22"}]
    data = write(tmp_path / "rows.jsonl", graded)
    redi.main(settings("--stage", "data", "--data", data, "--out", tmp_path / "data"))
    for stage, name in (("sft", "positives"), ("redi", "pairs")):
        [row] = [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()]
        [pair], _ = redi.make_pairs([row], tokenizer, settings("--stage", stage), source=name)
        assert list(pair.chosen) == drawn


def test_the_funnel_counts_every_row_once(settings, tmp_path, capsys):
    def row(right="a=5", wrong="a=6", prompt="a=5\na?", **more):
        return {"prompt": prompt, "responses": [wrong, right, "other"], "rewards": [0, 1, 0], **more}

    rows = [row(), row(rewards=[1, 1, 1]), row(rewards=[0, 0, 0]), row(wrong="a=5"), row(wrong="+" * 70),
            row(prompt="a=5\n" * 60), row(wrong=" ")]  # fmt: skip
    redi.main(settings("--stage", "data", "--own_answers", 0, "--data", write(tmp_path / "rows.jsonl", rows),
                       "--out", tmp_path / "data"))  # fmt: skip
    printed = re.findall(r"^ *([-+]?\d+)  (.+)$", capsys.readouterr().out, re.M)
    assert {name: int(n) for n, name in printed} == {
        "rows": 7, "no right trace": -1, "positives.jsonl": 6, "no wrong trace": -1, "prompt too long": -1,
        "trace too long": -1, "trace empty": -1, "traces equal": -1, "pairs.jsonl": 1,
    }  # fmt: skip


def test_two_ranks_log_what_one_rank_logs(settings, model, tmp_path):
    """With dpo: its reference is computed without gradients before the first update, which must leave no trace."""
    words = ["--model", model, "--loss", "dpo", "--reference_cache"]
    run_script("redi.py", *SMALL, *words, tmp_path / "cache-two", "--out", tmp_path / "two", ranks=2)
    redi.main(settings(*words, tmp_path / "cache-one", "--out", tmp_path / "one"))
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if not name.startswith(("seconds/", "memory/", "speed/")):
                assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-5), (a["step"], name)
    [a], [b] = ((tmp_path / f"cache-{n}").glob("*.json") for n in ("one", "two"))
    assert a.name == b.name  # named after weights and pairs, not after ranks
    for x, y in zip(json.loads(a.read_text()), json.loads(b.read_text()), strict=True):
        assert y == pytest.approx(x, rel=1e-5)


# ----------------------------------------------------------------------------------- reference, alarm, context


def test_the_reference_is_computed_once_and_anew_for_other_weights_or_other_pairs(tmp_path, world, policy):
    args = redi.Args(loss="dpo", reference_cache=str(tmp_path), micro_batch_tokens=100)
    pairs = redi_ranks.fixed_pairs("dpo")
    redi.set_reference(policy, pairs, args, world)
    computed = [p.reference for p in pairs]
    redi.accumulate_gradient(policy, pairs, args, world)
    assert [p.reference for p in pairs] == [
        pytest.approx((len(p.chosen) * p.logp[0], len(p.rejected) * p.logp[1]), rel=1e-5) for p in pairs
    ]
    real = policy.forward
    policy.forward = None  # not needed again
    again = redi_ranks.fixed_pairs("dpo")
    redi.set_reference(policy, again, args, world)
    assert [p.reference for p in again] == computed
    policy.forward = real
    with torch.no_grad():
        policy.lm.get_output_embeddings().weight[0, 0] += 1
    redi.set_reference(policy, again, args, world)
    redi.set_reference(policy, again[:-1], args, world)
    assert len(list(tmp_path.iterdir())) == 3 and [p.reference for p in again] != computed


def test_no_reference_is_computed_where_none_is_used(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(redi, "set_reference", None)
    redi.main(settings("--out", tmp_path / "run", "--steps", 1, "--eval_every", 0))
    assert not (tmp_path / "reference").exists()


def test_a_collapse_raises_the_alarm_once_with_its_step(settings, tmp_path, capsys):
    redi.main(settings("--alpha", 3, "--lr", "3e-2", "--schedule", "constant", "--warmup", 0, "--steps", 12,
                       "--eval_every", 0, "--out", tmp_path / "run"))  # fmt: skip
    rows = read_metrics(tmp_path / "run")
    [step] = {row["alarm/collapsed_at"] for row in rows if "alarm/collapsed_at" in row}
    assert step == redi.collapsed_at([row["logp/chosen"] for row in rows], 0.5)
    assert [row["step"] for row in rows if "alarm/collapsed_at" in row] == list(range(step, 13))
    assert capsys.readouterr().out.count("logp/chosen has fallen from") == 1


def test_a_gradient_that_is_not_finite_stops_the_run_and_its_rows_are_kept(settings, tmp_path, monkeypatch):
    real = redi.accumulate_gradient

    def spoiled(policy, pairs, args, world):
        real(policy, pairs, args, world)
        next(policy.parameters()).grad[0] = math.nan

    monkeypatch.setattr(redi, "accumulate_gradient", spoiled)
    with pytest.raises(FloatingPointError, match="step 1: the gradient's norm is nan. The .* rows of this update are"):
        redi.main(settings("--out", tmp_path / "run", "--eval_every", 0))
    lines = (tmp_path / "run" / "bad" / "step-00000001-1.jsonl").read_text().splitlines()
    assert len({json.loads(line)["row"] for line in lines}) == 4


def test_rope_theta_and_positions_act_in_training_and_are_saved_for_the_next_stage(settings, tmp_path, world, model):
    words = ["--stage", "sft", "--steps", 1, "--eval_every", 0, "--out"]
    redi.main(settings(*words, tmp_path / "plain"))
    redi.main(settings(*words, tmp_path / "long", "--rope_theta", 3e5, "--max_positions", 4096))
    plain, long = (read_metrics(tmp_path / name)[-1]["logp/chosen"] for name in ("plain", "long"))
    assert plain != long
    redi.main(settings("--model", tmp_path / "long" / "model", *words[2:], tmp_path / "two"))
    for name in ("long", "two"):
        config = AutoConfig.from_pretrained(tmp_path / name / "model")
        assert config.rope_parameters["rope_theta"] == 3e5 and config.max_position_embeddings == 4096
    policy = load_policy(str(tmp_path / "two" / "model"), world)
    assert policy.lm.get_decoder().rotary_emb.inv_freq[1].item() == pytest.approx(3e5 ** (-2 / 8))


def test_a_saved_configuration_without_the_asked_for_context_is_an_error(model):
    from pathlib import Path

    redi.check_context(Path(model), redi.Args())
    with pytest.raises(RuntimeError, match="says rope_theta 10000.0 .* not --rope_theta 300000.0"):
        redi.check_context(Path(model), redi.Args(rope_theta=3e5))
    with pytest.raises(RuntimeError, match="max_position_embeddings 256, not .* --max_positions 512"):
        redi.check_context(Path(model), redi.Args(max_positions=512))


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "no/such.jsonl"], "no/such.jsonl: no such file"),
        (["--data", "runs/no-such.jsonl"], "--data runs/no-such.jsonl: not there; --stage data makes it"),
        (["--model", "runs/no-such"], "--model runs/no-such: not there; --stage sft makes it"),
        (["--data", "igsm:lots"], "igsm:LO-HI"),
        (["--batch_size", "400"], "40 rows are fewer than --batch_size 400"),
        (["--model", "no/such/model"], "--model no/such/model"),
        (["--chat_template", "no.jinja"], "--chat_template no.jinja: no such file"),
        (["--max_prompt_tokens", "3"], "no row is left of 40 .40 prompts over"),
        (["--max_response_tokens", "3"], "no row is left of 40 .*40 traces over"),
        (["--eval_data", "igsm:5-8", "--verifier", "oops"], "--verifier oops: no verifier 'oops': math, "),
        (["--steps", "-1"], "--steps must not be negative"),
        (["--alpha", "-1"], "--alpha must not be negative"),
        (["--beta", "0"], "--beta must be positive"),
        (["--label_smoothing", "0.5"], "--label_smoothing must be from 0"),
        (["--own_answers", "2"], "--own_answers samples in --stage data"),
        (["--stage", "sft", "--loss", "dpo"], "--loss dpo is of --stage redi"),
        (["--max_positions", "20"], "the longest row has \\d+ tokens, .* 20 positions: raise --max_positions"),
    ],
)
def test_bad_settings_get_one_message_before_anything_is_written(settings, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        redi.main(settings(*words, "--out", tmp_path / "run"))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_data_without_what_a_stage_needs_gets_one_message(settings, tmp_path):
    right = {"prompt": "a=5\na?", "response": "a=5", "label": 1}
    wrong = right | {"label": 0, "response": "a=6"}
    graded = {"prompt": "p", "responses": ["x"], "rewards": [1]}
    for words, rows, message in [
        ([], [right] * 4, "no row has a wrong trace"),
        (["--stage", "sft"], [wrong] * 4, "no row is left of 4 .*4 wrong traces alone"),
        (["--loss", "dpo"], [right, wrong] * 4, "8 rows have one trace, and --loss dpo compares two"),
        (["--stage", "data", "--own_answers", "0"], [graded], "no pair is left .*--own_answers samples"),
        ([], [], "no row is left of 0"),
    ]:
        data = write(tmp_path / "rows.jsonl", rows)
        with pytest.raises(InputError, match=message):
            redi.main(settings(*words, "--data", data, "--out", tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_other_settings_is_refused(settings, tmp_path):
    words = ["--out", tmp_path / "run", "--steps", "1", "--save_every", "1", "--eval_every", "0"]
    redi.main(settings(*words))
    with pytest.raises(InputError, match="--alpha 0.8 there, 0.5 here"):
        redi.main(settings(*words, "--alpha", "0.5"))


def test_bad_input_and_unknown_flags_exit_with_code_2_and_one_line(tmp_path):
    data = write(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "x"}])
    result = run_script("redi.py", *SMALL, "--data", data, check=False)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last == f"redi.py: error: {data}, row 0: the right and the wrong trace are equal; remove the row or pass " \
                   "--bad_rows drop"  # fmt: skip
    assert "Traceback" not in result.stderr
    result = run_script("redi.py", "--learning_rate", "1", check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("words", "lr", "batch_size"),
    [
        ([], 1e-6, 32), (["--loss", "symmetric"], 2e-7, 32), (["--loss", "dpo"], 2e-7, 32),
        (["--loss", "simpo"], 5e-7, 32), (["--stage", "sft"], 5e-5, 128), (["--preset", "tiny"], 1e-5, 32),
        (["--preset", "tiny", "--stage", "sft"], 5e-4, 64), (["--preset", "tiny", "--lr", "1"], 1.0, 32),
    ],
)  # fmt: skip
def test_defaults_follow_stage_loss_and_preset_and_what_is_typed_wins(words, lr, batch_size):
    args = parse_args(redi.Args, words, stage=redi.STAGES, loss=redi.LOSSES, preset=redi.PRESETS)
    assert (args.lr, args.batch_size) == (lr, batch_size)


def test_problems_that_share_words_with_a_benchmark_are_left_out_and_counted(settings, tmp_path, capsys):
    def row(prompt):
        return {"prompt": prompt, "responses": ["a=5", "a=6"], "rewards": [1, 0]}

    words = [f"w{i}" for i in range(20)]
    rows = [row(" ".join(words[:12])), row("X " + " ".join(words[3:16]).upper()), row("a=5\na?"), row("b=5\nb?")]
    benchmark = [{"prompt": [{"role": "user", "content": " ".join(words)}]}, {"problem": "b=5\nb?"}]
    named = write(tmp_path / "bench.jsonl", benchmark)
    redi.main(settings("--stage", "data", "--own_answers", 0, "--data", write(tmp_path / "rows.jsonl", rows),
                       "--decontaminate", named, "--out", tmp_path / "data"))  # fmt: skip
    assert f"-2  shares 13 words with {named}" in capsys.readouterr().out
    kept = [json.loads(line)["prompt"][0]["content"] for line in (tmp_path / "data" / "pairs.jsonl").open()]
    assert sorted(kept) == sorted([" ".join(words[:12]), "a=5\na?"])
    with pytest.raises(InputError, match="bench.jsonl, row 0: no shape of row"):
        broken = write(tmp_path / "bench.jsonl", [{"answer": 1}])
        redi.main(settings("--stage", "data", "--data", tmp_path / "rows.jsonl", "--decontaminate", broken))
