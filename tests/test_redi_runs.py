"""redi.py from end to end on models that train in seconds: stages, losses, ranks, the alarm, bad input."""

import functools
import json
import math

import pytest
from transformers import AutoConfig

import redi
from common.data import InputError
from common.metrics import read_metrics
from common.trainer import load_policy
from tests import redi_ranks
from tests.conftest import parsed, run_script, write_rows
from tests.faults.harness import assert_same_metrics, complete_run

pytestmark = pytest.mark.usefixtures("without_curves")
SMALL = [
    "--preset", "tiny", "--data", "igsm:1-2", "--igsm_problems", "40", "--batch_size", "4", "--steps", "3",
    "--eval_data", "igsm:1-2", "--eval_limit", "6", "--eval_every", "2", "--save_every", "0", "--lr", "1e-3",
    "--max_response_tokens", "60",
]  # fmt: skip


@pytest.fixture
def settings(nano):
    return functools.partial(parsed, "redi", *SMALL, "--model", nano)


@pytest.mark.parametrize("words", [["--stage", "sft"], *(["--loss", x] for x in ("redi", "symmetric", "dpo", "simpo"))])
def test_every_stage_and_loss_trains_and_leaves_a_run_folder(words, settings, tmp_path):
    redi.main(settings(*words, "--out", tmp_path / "run"))
    rows = complete_run(tmp_path / "run")
    names = {"eval/mean", "loss/mean", "optim/grad_norm", "logp/chosen", "entropy/chosen", "seconds/step"}
    assert names <= rows[-1].keys()
    of_pairs = {"logp/rejected", "logp/gap", "pair/accuracy", "entropy/rejected"}
    assert (of_pairs <= rows[-1].keys()) == ("sft" not in words)
    if "dpo" in words:  # the policy is its own reference before the first update, and not after it
        assert rows[1]["loss/mean"] == pytest.approx(math.log(2), abs=1e-6)
        assert rows[1]["reward/margin"] == pytest.approx(0, abs=1e-6) != rows[3]["reward/margin"]
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().split("\n")[0])
    assert {"prompt", "chosen", "rejected", "chosen_logp", "rejected_logp", "loss"} < sample.keys()


def test_two_ranks_log_what_one_rank_logs(settings, nano, tmp_path):
    """With dpo: its reference is computed without gradients before the first update, which must leave no trace."""
    words = ["--model", nano, "--loss", "dpo", "--save_every", 3, "--out"]
    run_script("redi.py", *SMALL, *words, tmp_path / "two", ranks=2)
    redi.main(settings(*words, tmp_path / "one"))
    assert_same_metrics(tmp_path / "one", tmp_path / "two")
    [a], [b] = ((tmp_path / name).glob("checkpoint/*/state.json") for name in ("one", "two"))
    references = [json.loads(path.read_text())["reference"] for path in (a, b)]
    for x, y in zip(*references, strict=True):
        assert y == pytest.approx(x, rel=1e-5)


# ----------------------------------------------------------------------------------- reference, alarm, context


def test_the_reference_sums_the_log_probs_of_every_trace(world, policy):
    args = redi.Args(loss="dpo", micro_batch_tokens=100)
    pairs = redi_ranks.fixed_pairs("dpo")
    reference = redi.reference_logps(policy, pairs, args, world)
    redi.accumulate_gradient(policy, pairs, args, world)
    sums = [[len(p.chosen) * p.logp[0], len(p.rejected) * p.logp[1]] for p in pairs]
    assert reference == [pytest.approx(pair, rel=1e-5) for pair in sums]


def test_no_reference_is_computed_where_none_is_used(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(redi, "reference_logps", None)
    redi.main(settings("--out", tmp_path / "run", "--steps", 1, "--eval_every", 0))


def test_a_collapse_raises_the_alarm_once_with_its_step(settings, tmp_path, capsys):
    redi.main(settings("--alpha", 3, "--lr", "3e-2", "--schedule", "constant", "--warmup", 0, "--steps", 12,
                       "--eval_every", 0, "--out", tmp_path / "run"))  # fmt: skip
    rows = read_metrics(tmp_path / "run")
    [step] = {row["alarm/collapsed_at"] for row in rows if "alarm/collapsed_at" in row}
    assert step == redi.collapsed_at([row["logp/chosen"] for row in rows], 0.5)
    assert [row["step"] for row in rows if "alarm/collapsed_at" in row] == list(range(step, 13))
    said = capsys.readouterr().out
    assert said.count("logp/chosen has fallen from") == 1 and "0.5: lower --lr or --alpha\n" in said


@pytest.mark.parametrize("words", [["--stage", "sft"], ["--loss", "simpo"]])
def test_the_alarm_names_no_flag_that_does_nothing(words, settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(redi, "collapsed_at", lambda *_: 1)
    redi.main(settings(*words, "--steps", 1, "--eval_every", 0, "--out", tmp_path / "run"))
    assert "--collapse_margin 0.5: lower --lr\n" in capsys.readouterr().out


def test_a_gradient_that_is_not_finite_stops_the_run_and_its_rows_are_kept(settings, tmp_path, monkeypatch):
    real = redi.accumulate_gradient

    def spoiled(policy, pairs, args, world):
        log = real(policy, pairs, args, world)
        next(policy.parameters()).grad[0] = math.nan
        return log

    monkeypatch.setattr(redi, "accumulate_gradient", spoiled)
    with pytest.raises(FloatingPointError, match="step 1: the gradient's norm is nan. The .* rows of this update are"):
        redi.main(settings("--out", tmp_path / "run", "--eval_every", 0))
    lines = (tmp_path / "run" / "bad" / "step-00000001-1.jsonl").read_text().splitlines()
    assert len({json.loads(line)["row"] for line in lines}) == 4


def test_rope_theta_and_positions_act_in_training_and_are_saved_for_the_next_stage(settings, tmp_path, world):
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


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "runs/no-such.jsonl"], "runs/no-such.jsonl: no such file or folder; `python -m tools.redi_data`"),
        (["--model", "runs/no-such"], "runs/no-such: no such file or folder; `redi.py --stage sft`"),
        (["--max_response_tokens", "3"], "no row is left: 0 of 40 rows .*40 traces over"),
        (["--alpha", "-1"], "--alpha must be 0 or more"),
        (["--loss", "dpo", "--beta", "0"], "--beta must be positive"),
        (["--loss", "dpo", "--label_smoothing", "0.5"], "--label_smoothing must be from 0"),
        (["--stage", "sft", "--loss", "dpo"], "--loss dpo is of --stage redi"),
        (["--collapse_margin", "-1"], "--collapse_margin must be 0 or more"),
        (["--collapse_margin", "nan"], "--collapse_margin must be 0 or more"),
        (["--loss", "simpo", "--gamma", "inf"], "--gamma must be 0 or more and finite"),
        (["--loss", "symmetric", "--alpha", "0.8"], "--alpha 0.8 is for --loss redi, and does nothing with symmetric"),
        (["--loss", "dpo", "--chosen_coef", "0"], "--chosen_coef 0.0 is for --loss redi, symmetric, and does nothing"),
        (["--loss", "dpo", "--gamma", "9"], "--gamma 9.0 is for --loss simpo, and does nothing with dpo"),
        (["--loss", "simpo", "--label_smoothing", "0.2"], "--label_smoothing 0.2 is for --loss dpo"),
        (["--stage", "sft", "--beta", "3"], "--beta 3.0 is for --loss dpo, simpo, and does nothing with sft"),
        (["--alpha", "0", "--chosen_coef", "0"], "--alpha 0 --chosen_coef 0 trains on nothing"),
        (["--max_positions", "20"], "the longest row has \\d+ tokens, and the model 20 positions: lower --max_resp"),
    ],
)
def test_bad_settings_get_one_message_before_anything_is_written(settings, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        redi.main(settings(*words, "--out", tmp_path / "run"))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_loss_of_your_own_reads_every_flag_and_the_reference():
    redi.check(redi.Args(loss="mine", alpha=0.5, beta=0.1, gamma=2.0, model="models/tiny", data="igsm:1-2"))
    assert "mine" not in redi.NO_REFERENCE


def test_data_without_what_a_stage_needs_gets_one_message(settings, tmp_path):
    right = {"prompt": "a=5\na?", "response": "a=5", "label": 1}
    wrong = right | {"label": 0, "response": "a=6"}
    for words, rows, message in [
        ([], [right] * 4, "no row has an incorrect trace"),
        (["--stage", "sft"], [wrong] * 4, "no row is left: 0 of 4 rows .*4 incorrect traces alone"),
        (["--loss", "dpo"], [right, wrong] * 4, "8 rows have one trace, and --loss dpo compares two"),
        ([], [wrong] * 4, "no row has a correct trace"),
        ([], [], "rows.jsonl: no row is left: 0 of 0 rows"),
    ]:
        data = write_rows(tmp_path / "rows.jsonl", rows)
        with pytest.raises(InputError, match=message):
            redi.main(settings(*words, "--data", data, "--out", tmp_path / "run"))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "lr", "batch_size"),
    [
        ([], 1e-6, 32), (["--loss", "symmetric"], 2e-7, 32), (["--loss", "dpo"], 2e-7, 32),
        (["--loss", "simpo"], 5e-7, 32), (["--stage", "sft"], 5e-5, 128), (["--preset", "tiny"], 1e-5, 32),
        (["--preset", "tiny", "--stage", "sft"], 5e-4, 64), (["--preset", "tiny", "--lr", "1"], 1.0, 32),
    ],
)  # fmt: skip
def test_defaults_follow_stage_loss_and_preset_and_what_is_typed_wins(words, lr, batch_size):
    args = parsed("redi", *words)
    assert (args.lr, args.batch_size) == (lr, batch_size)


def test_the_alarm_follows_the_updates_that_were_taken(settings, tmp_path, monkeypatch):
    words = ["--eval_every", 0, "--save_every", 2, "--steps", 2, "--out"]

    def followed(folder):
        redi.main(settings(*words, folder))
        return json.loads((folder / "checkpoint" / "step-00000002" / "state.json").read_text())["followed"]

    found = followed(tmp_path / "run")
    assert found == [[row["step"], row["logp/chosen"]] for row in read_metrics(tmp_path / "run")] and len(found) == 2
    monkeypatch.setattr(redi.Run, "update", lambda *_, **__: False)  # as with --skip_bad_updates
    assert followed(tmp_path / "skipped") == []


def test_a_run_does_not_resume_with_other_weights_of_rows(settings, tmp_path):
    row = {"prompt": "a=5\na?", "chosen": "a=5", "rejected": "a=6"}
    words = ["--batch_size", 1, "--eval_every", 0, "--save_every", 1, "--out", tmp_path / "run"]
    redi.main(settings(*words, "--data", write_rows(tmp_path / "rows.jsonl", [row]), "--steps", 1))
    with pytest.raises(InputError, match="the data .* changed"):
        redi.main(settings(*words, "--data", write_rows(tmp_path / "rows.jsonl", [row | {"weight": 2}]), "--steps", 2))


def test_every_row_is_corrupted_from_a_stream_of_its_own(monkeypatch):
    drawn = []
    monkeypatch.setattr(redi.igsm, "corrupt", lambda text, rng, modulus: drawn.append(rng.random()) or text)
    list(redi.read_rows(redi.Args(data="igsm:1-2", igsm_problems=5)))
    assert len(set(drawn)) == 5
