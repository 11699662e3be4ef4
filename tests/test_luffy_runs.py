"""luffy.py from end to end on models that train in seconds: methods, ranks, faults of the sampler, bad input."""

import gzip
import json
import math
import re
import shutil

import pytest

import luffy
from common.data import InputError
from common.metrics import read_metrics
from tests.conftest import parsed, run_script, write_rows
from tests.faults.harness import assert_same_metrics, complete_run

pytestmark = pytest.mark.usefixtures("without_curves")
SMALL = [
    "--preset", "tiny", "--model", "models/scratch", "--data", "igsm:1-2", "--igsm_problems", "40", "--batch_size", "4",
    "--group_size", "4", "--max_response_tokens", "40", "--steps", "3", "--eval_data", "igsm:1-2", "--eval_limit",
    "6", "--eval_every", "2", "--save_every", "0", "--lr", "1e-3",
]  # fmt: skip


def settings(*words, **changes):
    return parsed("luffy", *SMALL, *words, **changes)


@pytest.mark.parametrize("method", ["luffy", "grpo", "rl_sft", "sft"])
def test_every_method_trains_and_leaves_a_run_folder(method, tmp_path):
    luffy.main(settings("--method", method, "--out", tmp_path / "run"))
    rows = complete_run(tmp_path / "run")
    assert {"eval/mean", "optim/grad_norm", "policy/entropy", "seconds/step", "memory/peak_gb"} <= rows[-1].keys()
    for name in ("reward/own", "loss/pg", "verifier/ok"):
        assert (name in rows[-1]) == (method != "sft")
    assert ("sft/loss" in rows[-1]) == (method in ("sft", "rl_sft"))
    assert ("teacher/logp" in rows[-1]) == (method != "grpo")
    if method != "sft":
        assert max(row.get("mismatch/max", 0) for row in rows) < 1e-4
    if method in ("luffy", "rl_sft"):
        assert all(row["reward/teacher"] == 1 for row in rows[1:])
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().split("\n")[0])
    assert {"step", "who", "reward", "detail", "truncated", "advantage", "gold", "prompt", "response"} == sample.keys()
    assert (sample["reward"] is None) == (method == "sft")  # nobody has graded it


@pytest.mark.parametrize("asked, traced", [(1, 1), (9, 2)])
def test_profile_traces_the_steps_after_the_first_that_there_are(asked, traced, tmp_path, capsys):
    words = ["--method", "sft", "--eval_every", "0", "--profile", str(asked)]
    luffy.main(settings("--out", str(tmp_path / "run"), *words))
    said = capsys.readouterr().out
    assert "aten::mm" in said and re.search(r"update \d+\.\d{3} s", said)
    with gzip.open(tmp_path / "run" / "profile" / "rank-0.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count("update") == traced


def test_sft_without_an_evaluation_opens_no_sampler(tmp_path, monkeypatch):
    monkeypatch.setattr("common.run.make_sampler", lambda *_, **__: pytest.fail("a sampler was opened"))
    luffy.main(settings("--out", str(tmp_path / "run"), "--method", "sft", "--eval_every", "0"))
    assert (tmp_path / "run" / "model").exists()


def test_what_was_printed_reaches_a_file_when_a_run_fails(tmp_path):
    words = ["--preset", "tiny", "--method", "sft", "--steps", "1", "--data", "igsm:1-2", "--igsm_problems", "64"]
    failed = run_script("luffy.py", *words, "--max_positions", "24", "--out", tmp_path / "run", check=False)
    assert failed.returncode == 2 and "the model 24 positions" in failed.stderr
    assert "64 of 64 rows" in failed.stdout


def test_the_trained_model_loads_as_the_model_of_a_second_run_but_not_without_its_chat_template(tmp_path):
    """The paper's SFT+RL: `sft`, then `grpo --model` of it."""
    luffy.main(settings("--method", "sft", "--out", tmp_path / "sft", "--steps", "1"))
    words = ["--method", "grpo", "--model", tmp_path / "sft" / "model", "--out"]
    luffy.main(settings(*words, tmp_path / "rl"))
    assert len(read_metrics(tmp_path / "rl")) == 4
    (tmp_path / "sft" / "model" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template: pass --chat_template"):
        luffy.main(settings(*words, tmp_path / "run"))


def test_two_ranks_log_what_one_rank_logs(tmp_path):
    """Rows are drawn from streams of their own, so the same seed gives the same rows on any number of ranks."""
    words = ["luffy.py", *SMALL, "--out"]
    run_script(*words, tmp_path / "two", ranks=2)
    run_script(*words, tmp_path / "one")
    assert_same_metrics(tmp_path / "one", tmp_path / "two")


def test_stale_weights_in_the_sampler_stop_the_run(tmp_path, monkeypatch):
    from common.rollout import EmbeddedSampler

    real = EmbeddedSampler.sync

    def forgetful(self, policy, version):
        if version == 0:
            real(self, policy, version)

    monkeypatch.setattr(EmbeddedSampler, "sync", forgetful)
    with pytest.raises(RuntimeError, match="no current weights: call sync"):  # asleep since the first step
        luffy.main(settings("--out", str(tmp_path / "asleep"), "--eval_every", "0"))
    monkeypatch.setattr(EmbeddedSampler, "sleep", lambda self: None)
    with pytest.raises(RuntimeError, match="step 2: the sampler's log-probs differ"):
        luffy.main(settings("--out", str(tmp_path / "run"), "--lr", "1e-2", "--eval_every", "0"))


def test_a_sampler_whose_log_probs_are_nan_stops_the_run(tmp_path, monkeypatch):
    from common import rollout

    real = rollout.draw
    monkeypatch.setattr(rollout, "draw", lambda *given: (real(*given)[0], real(*given)[1] * math.nan))
    with pytest.raises(InputError, match="--rollout embedded does not support .*nan standard deviations"):
        luffy.main(settings("--out", str(tmp_path / "run"), "--eval_every", "0"))
    monkeypatch.setattr(rollout.EmbeddedSampler, "_prove", lambda *_: None)  # NaN only later
    with pytest.raises(FloatingPointError, match="step 1: mismatch/mean_abs is nan"):
        luffy.main(settings("--out", str(tmp_path / "run"), "--eval_every", "0"))


def test_updates_with_and_without_a_trace_are_logged_together(tmp_path):
    rows = [row for n in range(4) for row in toy_rows(1, target=None if n else toy_rows(1)[0]["target"])]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    words = ["--data", data, "--empty_trace", "on_policy", "--batch_size", "4", "--steps", "2", "--eval_every", "0"]
    luffy.main(settings(*words, "--out", str(tmp_path / "run")))
    logged = read_metrics(tmp_path / "run")
    assert all("teacher/logp" in row and math.isfinite(row["teacher/logp"]) for row in logged) and len(logged) == 2


# -------------------------------------------------------------------------------------------------- bad input


def toy_rows(n=8, **changes):
    return [
        {"prompt": [{"role": "user", "content": "a=5\na?"}], "data_source": "toy",
         "target": [{"role": "assistant", "content": "<think>\na=5\n</think>\n\\boxed{5}"}],
         "reward_model": {"ground_truth": "5"}} | changes for _ in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "no-such-user/no-such-data"], "neither a local file or folder nor a Hub dataset"),
        (["--batch_size", "5"], "--batch_size 5 is not a multiple of --updates_per_step 2"),
        (["--teacher_rows", "4"], "--teacher_rows: luffy takes 0 to 3 if --group_size is 4"),
        (["--max_response_tokens", "3"], "no row is left: 0 of 40 rows .*40 traces over"),
        (["--temperature", "0"], "--temperature must be positive"),
        (["--group_size", "1"], "--teacher_rows: luffy takes 0 to 0 if --group_size is 1"),
        (["--method", "rl_sft", "--teacher_rows", "0"], "--teacher_rows: rl_sft takes 1 to 3"),
        (["--method", "sft", "--teacher_rows", "0"], "--teacher_rows: sft takes 1 to 1"),
        (["--method", "grpo", "--teacher_rows", "1"], "--teacher_rows: grpo takes 0 to 0"),
        (["--method", "sft", "--empty_trace", "on_policy"], "--method sft samples no answers"),
        (["--verifier", "no_such_module:grade"], "--verifier no_such_module:grade: .*No module named"),
    ],
)
def test_bad_settings_get_one_message_before_anything_is_written(tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        luffy.main(settings(*words, "--out", str(tmp_path / "run")))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_traces_alone_need_no_golds(tmp_path):
    bare = [{name: row[name] for name in ("prompt", "target")} for row in toy_rows()]
    words = ["--data", write_rows(tmp_path / "rows.jsonl", bare), "--steps", "1", "--eval_every", "0"]
    luffy.main(settings("--method", "sft", *words, "--out", str(tmp_path / "sft")))
    assert len(read_metrics(tmp_path / "sft")) == 1
    with pytest.raises(InputError, match="all 8 rows: .*reward_model"):
        luffy.main(settings(*words, "--out", str(tmp_path / "luffy")))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    words = ["--method", "sft", "--out", str(tmp_path / "run"), "--steps", "1", "--save_every", "1"]
    luffy.main(settings(*words))
    for flag, there, here in (("lr", 0.001, 0.5), ("seed", 0, 9), ("data", "'igsm:1-2'", "'igsm:1-1'")):
        with pytest.raises(InputError, match=f"--{flag} {there} there, {here} here"):
            luffy.main(settings(*words, f"--{flag}", str(here).strip("'")))


def test_a_finished_run_keeps_its_model_until_more_steps_are_trained_or_it_is_missing(tmp_path, monkeypatch):
    def train(*more):
        words = ["--method", "sft", "--eval_every", "0", "--steps", "1", "--save_every", "1", "--out", tmp_path / "run"]
        luffy.main(settings(*words, *more))
        return config.read_text()

    config = tmp_path / "run" / "model" / "config.json"
    written = train()
    config.write_text(written + "\n")  # as an older Transformers may have written it
    assert train() == written + "\n"
    shutil.rmtree(config.parent)
    assert train() == written
    config.write_text(written + "\n")
    assert train("--steps", "2") == written
    (tmp_path / "run" / "checkpoint" / "exported").unlink()  # killed before it was written
    config.write_text(written + "\n")
    assert train("--steps", "2") == written
    shutil.rmtree(tmp_path / "run" / "checkpoint" / "step-00000002")
    config.write_text(written + "\n")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("common.run.export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train("--steps", "2")  # step 2 is trained again, and killed before its model is written
    assert train("--steps", "2") == written
