"""Settings reach what they name, and draws their streams: each script's loop with settings that are not the defaults,
seen from outside."""

import importlib
import json

import pytest
import torch

import eval as evaluation
import igsm
import luffy
import oreo
import relift
from common import run, search, verifiers
from common.data import InputError
from common.metrics import read_metrics
from common.rollout import Completion, EmbeddedSampler
from common.trainer import learning_rate, load_policy, load_tokenizer
from common.verifiers import Verdict
from tests import oreo_ranks, relift_ranks, test_luffy_runs
from tests.conftest import parsed, write_rows
from tests.faults.harness import RUNS
from tests.ranks import ONE_RANK

pytestmark = pytest.mark.usefixtures("without_curves")
ODD = ["--steps", "3", "--save_every", "0", "--eval_every", "1", "--schedule", "linear", "--warmup", "0.4",
       "--lr_floor", "0.3", "--betas", "0.7", "0.8", "--weight_decay", "0.03", "--max_grad_norm", "0.37",
       "--eval_temperature", "0.3", "--seed", "5"]  # fmt: skip
MORE = {"oreo": ["--value_lr", "3e-3"], "relift": ["--sft_lr", "3e-3", "--sft_on", "all"],
        "behavior_injection": ["--updates_per_step", "2"]}  # fmt: skip


class Seen(list):
    """The calls of a function: (positional, named)."""

    def watch(self, monkeypatch, where, name):
        real = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *given, **named: self.append((given, named)) or real(*given, **named))
        return self


@pytest.mark.parametrize("name", ["luffy", "relift", "redi", "oreo", "behavior_injection"])
def test_flags_reach_what_they_name(name, tmp_path, monkeypatch):
    script = importlib.import_module(name)
    steps = Seen().watch(monkeypatch, run if hasattr(script, "Run") else script, "optimizer_step")
    drawn = Seen().watch(monkeypatch, EmbeddedSampler, "generate")
    slept = Seen().watch(monkeypatch, EmbeddedSampler, "sleep")
    problems = Seen().watch(monkeypatch, igsm, "problems")
    args, out = parsed(name, *RUNS[name][1:], *ODD, *MORE.get(name, []), "--out", tmp_path), tmp_path
    if name == "behavior_injection":  # its other stages have settings of their own
        args.stage = "data"
        script.main(args)
        args.stage, args.model, args.base_problems = "sft", "models/tiny", 0
        script.main(args)
        steps.clear()
        drawn.clear()
        slept.clear()
        args.stage, out = "rl", tmp_path / "bridge" / "rl"
    script.main(args)
    samplers = 1 + (name == "oreo")
    assert len(slept) == 2 * samplers + 3  # when one is made and closed, and for the update of every step

    # the rate follows the schedule, update by update
    rates = [row["optim/lr"] for row in read_metrics(out) if "optim/lr" in row]
    per_step = getattr(args, "updates_per_step", 1)
    every = [learning_rate(i, lr=args.lr, steps=3 * per_step, schedule="linear", warmup=0.4, floor=args.lr_floor)
             for i in range(3 * per_step)]  # fmt: skip
    assert rates == pytest.approx([sum(every[i : i + per_step]) / per_step for i in range(0, len(every), per_step)])
    if name == "oreo":
        ours = [learning_rate(i, lr=args.value_lr, steps=3, schedule="linear", warmup=0.4, floor=0.3) for i in range(3)]
        assert [named["lr"] for _, named in steps][::2] == pytest.approx(ours)
    # AdamW's settings and the clip; relift's SFT updates have an AdamW, a rate and a clip of their own
    for given, _ in steps:
        for group in given[1].param_groups:
            assert (tuple(group["betas"]), group["weight_decay"]) == ((0.7, 0.8), 0.03)
    sft = [(given, named) for given, named in steps if name == "relift" and named["lr"] == args.sft_lr]
    rl = [step for step in steps if step not in sft]
    assert {named["max_grad_norm"] for _, named in rl} == {0.37} and bool(sft) == (name == "relift")
    if sft:
        assert {named["max_grad_norm"] for _, named in sft} == {args.sft_max_grad_norm}
        assert {id(given[1]) for given, _ in sft}.isdisjoint(id(given[1]) for given, _ in rl)
    # evaluation and rollouts
    calls = [named for _, named in drawn]
    evaluations = [call for call in calls if call["sampling"].temperature == 0.3]
    assert len(evaluations) == 4 and all({*call["n"]} == {1} for call in evaluations)
    if name in ("luffy", "relift", "behavior_injection"):
        rollouts = [call["seed"] for call in calls if call["n"] != 8 and call not in evaluations]
        assert len(rollouts) == len(set(rollouts)) == 3  # a step's draws are not those of another
    if name != "behavior_injection":
        assert [named["split"] for _, named in problems] == ["train"] * (len(problems) - 1) + ["test"]


# ---------------------------------------------------------------------------------------- advantages of a step


def odd_text(texts, golds, *, verifier):
    return [Verdict(float(sum(map(ord, text)) % 2), "ok") for text in texts]


@pytest.mark.parametrize(("method", "std"), [("luffy", False), ("rl_sft", False), ("grpo", True), ("relift", True)])
def test_advantages_of_a_step_are_those_of_its_rewards(method, std, tmp_path, monkeypatch):
    monkeypatch.setattr(verifiers, "grade", odd_text)
    words = ["--out", str(tmp_path), "--steps", "1", "--eval_every", "0", "--log_samples", "99", "--group_size", "5"]
    words += ["--std"] * std
    if method == "relift":
        relift.main(relift_ranks.settings(*words, "--no_verify_demonstrations"))
    else:
        luffy.main(test_luffy_runs.settings("--method", method, *words))
    groups: dict[str, list[dict]] = {}
    for line in (tmp_path / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        groups.setdefault(row["prompt"], []).append(row)
    assert len(groups) == 4 and any(len({r["reward"] for r in g}) > 1 for g in groups.values())
    for rows in groups.values():
        rewards = torch.tensor([r["reward"] for r in rows])
        base = rewards[[r["who"] == "own" for r in rows]] if method == "rl_sft" else rewards
        expected = (rewards - base.mean()) / (base.std() + 1e-6 if std else 1)
        assert len(rows) == 5
        assert [r["advantage"] for r in rows] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_question_without_a_trace_gets_a_whole_group_of_own_answers(tmp_path, monkeypatch):
    drawn = Seen().watch(monkeypatch, EmbeddedSampler, "generate")
    rows = test_luffy_runs.toy_rows(2) + test_luffy_runs.toy_rows(2, target=None)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    words = ["--data", data, "--empty_trace", "on_policy", "--batch_size", "4", "--steps", "1", "--eval_every", "0"]
    luffy.main(test_luffy_runs.settings(*words, "--out", str(tmp_path / "run")))
    [(_, named)] = drawn
    assert sorted(named["n"]) == [3, 3, 4, 4]


# ------------------------------------------------------------------------------------------------------ draws


class Asked:
    """A sampler that remembers what it was asked for; its answers are two tokens long and never end."""

    def __init__(self, stop_ids=(1,)):
        self.calls, self.stop_ids = [], stop_ids

    def sync(self, *_, **__):
        pass

    sleep = close = sync

    def generate(self, prompts, *, n, keys, seed, sampling, progress=None, drawn=None):
        self.calls.append((keys, seed, sampling))
        counts = [n] * len(prompts) if isinstance(n, int) else n
        return [[Completion([5 + j, 6], [-1.0, -1.0], "length") for j in range(count)] for count in counts]


@pytest.fixture
def search_asked(monkeypatch):
    """A beam search with a sampler whose answers are steps that end with 6. -> (answers, texts that were valued)"""
    valued = []
    monkeypatch.setattr(search, "state_values", lambda value, states, *_: valued.extend(states) or [0.0] * len(states))

    def searched(sampler, prompts=([3],), keys=(7,), *, width=1, **settings):
        found = search.search_answers(
            "beam", sampler, None, prompts, keys, ONE_RANK, width=width, step_ends=frozenset([6]),
            micro_batch_tokens=100, **settings,
        )  # fmt: skip
        return found, valued

    return searched


def test_each_state_and_step_of_a_search_draws_from_a_stream_of_its_own(search_asked):
    sampler = Asked()
    search_asked(sampler, [[3], [4]], [7, 8], width=2, max_steps=3, max_tokens=9, temperature=0.7, top_p=0.8, seed=2)
    assert [len(set(keys)) for keys, *_ in sampler.calls] == [2, 4, 4]
    assert len({seed for _, seed, _ in sampler.calls}) == 3
    assert {(s.temperature, s.top_p, s.stop_ids) for *_, s in sampler.calls} == {(0.7, 0.8, (6,))}


def test_collect_draws_with_the_temperature_and_top_p_that_it_is_given(tmp_path, monkeypatch):
    sampler = Asked()
    monkeypatch.setattr(run, "open_sampler", lambda *_: sampler)
    words = ["--stage", "collect", "--temperature", "0.7", "--top_p", "0.8", "--out", tmp_path]
    oreo.main(oreo_ranks.settings("models/tiny", *words))
    assert {(s.temperature, s.top_p) for *_, s in sampler.calls} == {(0.7, 0.8)}


def evaluate(tmp_path, questions, **settings):
    """eval.py on so many questions."""
    rows = [igsm.row(p, "test") for p in igsm.problems(questions, ops=(1, 2), style="symbolic", modulus=23)]
    evaluation.main(evaluation.Args(
        model="models/tiny", data=(write_rows(tmp_path / "rows.jsonl", rows),), out=str(tmp_path / "out"),
        verifier=("boxed",), max_tokens=8, rollout="embedded", **settings,
    ))  # fmt: skip


def test_an_evaluation_draws_with_its_seed_and_top_p_each_question_of_the_test_split_from_its_stream(
    tmp_path, monkeypatch
):
    drawn = Seen().watch(monkeypatch, EmbeddedSampler, "generate")
    loaded = Seen().watch(monkeypatch, evaluation, "load_rows")
    evaluate(tmp_path, 3, n=2, top_p=0.7, temperature=0.9, seed=4, sampler_tokens=1)
    keys = [key for _, named in drawn for key in named["keys"]]
    assert len(drawn) == 3 and len(set(keys)) == 3
    assert {(n["seed"], n["sampling"].top_p, n["sampling"].temperature) for _, n in drawn} == {(4, 0.7, 0.9)}
    assert [named["split"] for _, named in loaded] == ["test"]


def test_stop_tokens_end_answers():
    policy, tokenizer = load_policy("models/tiny", ONE_RANK), load_tokenizer("models/tiny")
    assert tokenizer.convert_tokens_to_ids("=") in evaluation.stop_ids(policy, tokenizer, ("=",))


# ------------------------------------------------------------------------------------------ what loops hand over


@pytest.mark.parametrize("name", ["luffy", "relift"])
def test_old_log_probs_are_those_of_the_rows_that_are_trained_on(name, tmp_path, monkeypatch):
    monkeypatch.setattr(verifiers, "grade", odd_text)
    script = importlib.import_module(name)
    read = Seen().watch(monkeypatch, script, "policy_logps")
    settings = relift_ranks.settings if name == "relift" else test_luffy_runs.settings
    words = ["--out", str(tmp_path), "--steps", "2", "--eval_every", "0", "--entropy_coef", "0", "--batch_size", "8"]
    script.main(settings(*words, "--method", "grpo"))
    assert len(read) == 2 and all(row.advantage for given, _ in read for row in given[1])
    assert any(len(given[1]) < 16 for given, _ in read)  # an update has 4 questions of 4 answers


def test_a_round_collects_with_the_model_of_the_round_before_and_a_seed_of_its_own(tmp_path, monkeypatch):
    collected = []
    monkeypatch.setattr(oreo, "collect", lambda args: collected.append(args) or "rows")
    monkeypatch.setattr(oreo, "train", lambda args, **_: None)
    monkeypatch.setattr(oreo, "plot_curves", lambda *_: None)
    oreo.iterate(oreo_ranks.settings("models/tiny", "--rounds", "3", "--round_init", "first", "--out", tmp_path))
    models = [str(tmp_path / f"round-{n}" / "model") for n in (1, 2)]
    assert [args.model for args in collected] == ["models/tiny", *models]
    assert len({args.seed for args in collected}) == 3


def test_a_search_of_eval_draws_with_its_seed_temperature_and_delimiters(tmp_path, monkeypatch):
    found = Seen()
    monkeypatch.setattr(evaluation, "search_answers", lambda *given, **named: found.append((given, named)) or [[]] * 2)
    monkeypatch.setattr(evaluation, "check_fit", lambda *_: None)
    monkeypatch.setattr(evaluation, "load_policy", lambda path, world, **_: load_policy("models/tiny", world))
    evaluate(tmp_path, 2, value="models/tiny", search="beam", top_p=0.7, temperature=0.9, seed=4,
             step_delimiters=("=",))  # fmt: skip
    [(_, named)] = found
    assert (named["seed"], named["top_p"], named["temperature"]) == (4, 0.7, 0.9)
    assert named["step_ends"] == search.step_ids(load_tokenizer("models/tiny"), ("=",))


def test_a_search_leaves_room_for_what_was_said(search_asked):
    sampler = Asked()
    found, _ = search_asked(sampler, max_steps=9, max_tokens=4)
    assert [sampling.max_tokens for *_, sampling in sampler.calls] == [[4], [2]]
    assert [len(answer.response) for [answer] in found] == [4]


@pytest.mark.parametrize(("eos", "valued"), [(6, [3, 5]), (1, [3, 5, 6])])
def test_the_value_of_an_answer_is_that_of_its_text_without_eos(eos, valued, search_asked):
    assert search_asked(Asked([eos]), max_steps=1, max_tokens=9)[1] == [valued]


def test_searches_of_neighbouring_seeds_share_no_stream(search_asked):
    sampler = Asked()
    for seed in (2, 3):
        search_asked(sampler, width=2, max_steps=3, max_tokens=9, seed=seed)
    assert len({seed for _, seed, _ in sampler.calls}) == 6


def test_switches_of_the_chat_template_reach_the_tokenizer_of_an_evaluation(tmp_path):
    with pytest.raises(InputError, match="the chat template has no switch 'enable_thinking'"):
        evaluate(tmp_path, 1, dry_run=True, chat_template_args=("enable_thinking=false",))
