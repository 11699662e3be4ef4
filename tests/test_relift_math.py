"""relift.py's mathematics against the numbers of the published code (tests/vectors/relift.json, float64)."""

import dataclasses
import json

import pytest
import torch

import luffy
import relift
from common.data import block_denominators, pack
from common.rows import read_examples
from relift import (
    Args,
    HardestBuffer,
    Row,
    accumulate_gradient,
    accumulate_sft_gradient,
    group_advantages,
    hardest_groups,
    policy_token_loss,
    sft_is_due,
    sft_token_loss,
)
from tests import ranks
from tests.conftest import assert_equal, f64, vectors, write_rows
from tests.ranks import ONE_RANK, Bigram

VECTORS = vectors("relift")
INPUTS = VECTORS["policy_loss_inputs"]
MASK = f64(INPUTS["eos_mask"])


# ------------------------------------------------------------------------------------------------- the RL loss


def test_advantages_are_the_published_ones():
    groups = torch.tensor([uid == "q" for uid in INPUTS["uid"]]).long()
    advantages = group_advantages(f64(INPUTS["rewards"]), groups)
    assert_equal(advantages, [row[0] for row in INPUTS["advantages"]])


def test_token_losses_and_gradients_are_the_published_ones():
    case = VECTORS["policy_loss"]["cases"]["train_sh(noclip,dr)"]
    logp = f64(INPUTS["log_prob"]).requires_grad_()
    loss = policy_token_loss(logp, f64(INPUTS["old_log_prob"]), f64(INPUTS["advantages"]))
    total = (loss * MASK).sum() / loss.shape[1]  # the published sum is divided by the response tensor's width
    total.backward()
    assert_equal(total.detach(), case["outputs"]["pg_loss"])
    assert_equal(logp.grad, case["grad_wrt_log_prob"])


def test_the_clipped_loss_takes_the_worse_of_ratio_and_clipped_ratio():
    logp, old = f64([0.6, 0.6, 0.1, 0.1]).log(), f64([0.4, 0.4, 0.2, 0.2]).log()  # ratios 1.5 and 0.5
    assert_equal(policy_token_loss(logp, old, f64([1, -1, 1, -1]), clip=0.2), [-1.2, 1.5, -0.5, 0.8])


@pytest.mark.parametrize("old", ["none", "given"])
def test_the_rl_update_is_the_one_of_luffy_without_a_teacher(policy, old):
    """Which test_luffy_math.py compares with the published updates."""
    rows = ranks.fixed_rows()
    for row in rows:
        row.teacher, row.logps = False, [-1.0] * len(row.response)
    mine = [Row(r.prompt, r.response, r.group, False, r.logps, advantage=r.advantage) for r in rows]
    settings = dict(max_response_tokens=30, micro_batch_tokens=100, entropy_coef=0.01, clip=0.2, tis_cap=2.0)
    args = dataclasses.replace(Args(), **settings)
    old_logps = None
    if old == "given":
        old_logps = [logp - 0.1 for logp in relift.policy_logps(policy, mine, args, ONE_RANK)]
    metrics = accumulate_gradient(policy, mine, old_logps, args, ONE_RANK)
    gradient = [p.grad for p in policy.parameters()]
    policy.zero_grad()
    its_args = luffy.Args(method="grpo", **settings)
    assert luffy.accumulate_gradient(policy, rows, old_logps, its_args, ONE_RANK) == metrics
    assert all(torch.equal(p.grad, g) for p, g in zip(policy.parameters(), gradient, strict=True))


# ------------------------------------------------------------------------------------------------ the SFT loss


def sft_loss(rows, rows_per_mean, entropy=0.0):
    """-> (loss, log-probs [rows, 5]) of some rows of the vectors, as one update."""
    logp = f64(INPUTS["log_prob"])[rows].requires_grad_()
    lengths = INPUTS["lengths"][rows]
    denominator = torch.tensor(block_denominators(lengths, rows_per_mean))[:, None].expand_as(logp)
    loss = sft_token_loss(logp, torch.full_like(logp, entropy), denominator, entropy_coef=0.5)
    return (loss * MASK[rows]).sum(), logp


def test_the_sft_loss_of_one_mean_is_the_published_one():
    loss, logp = sft_loss(slice(0, 8), 8)
    loss.backward()
    assert_equal(loss.detach(), VECTORS["sft_loss"]["sft_loss"])
    assert_equal(logp.grad, VECTORS["sft_loss"]["grad_wrt_log_prob"])


def test_the_sft_loss_of_several_means_is_the_mean_of_the_published_ones():
    first, second = VECTORS["sft_loss"]["two_micro_batches_mean_of_means"]
    assert_equal(sft_loss(slice(0, 4), 4)[0].detach(), first)
    assert_equal(sft_loss(slice(4, 8), 4)[0].detach(), second)
    assert_equal(sft_loss(slice(0, 8), 4)[0].detach(), (first + second) / 2)


def test_the_entropy_bonus_is_averaged_as_the_loss_is():
    assert_equal(sft_loss(slice(0, 8), 3)[0] - sft_loss(slice(0, 8), 3, entropy=2.0)[0], 0.5 * 2.0)


@pytest.mark.parametrize("name", VECTORS["sft_update_policy"]["cases"])
@pytest.mark.parametrize("micro_batch_tokens", [5, 9, 1000])
def test_an_sft_update_is_the_published_one_whatever_the_micro_batches(name, micro_batch_tokens):
    """The published one of one rank: it is half as large on two."""
    data = VECTORS["sft_update_policy"]
    case = data["cases"][name]
    rows = [
        Row(data["prompts"][i], data["targets"][i][: int(sum(data["response_mask"][i]))], i, True) for i in case["rows"]
    ]
    args = Args(
        sft_rows_per_mean=case["sft_micro_batch_size"], sft_entropy_coef=case["entropy_coeff"],
        micro_batch_tokens=micro_batch_tokens,
    )
    policy = Bigram(case["W_before"])
    metrics = accumulate_sft_gradient(policy, rows, args, ONE_RANK)
    assert_equal((policy.table - case["lr"] * policy.table.grad).detach(), case["W_after"])
    assert policy.table.grad.norm().item() == pytest.approx(case["metrics"]["actor/sft_grad_norm"][0], abs=1e-9)
    nll, entropy = (sum(case["metrics"][f"actor/sft_{k}"]) / 2 for k in ("loss", "entropy_loss"))
    assert metrics["sft/loss"] == pytest.approx(nll - case["entropy_coeff"] * entropy, abs=1e-9)


# ---------------------------------------------------------------------------------------------- demonstrations


class Numbers:
    """A tokenizer whose text is its ids; what read_examples needs of one."""

    chat_template, all_special_tokens, all_special_ids, added_tokens_decoder = "any", (), (), {}

    def __init__(self, eos):
        self.eos_token_id = eos

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    def convert_ids_to_tokens(self, token):
        return str(token)

    def decode(self, ids):
        return " ".join(map(str, ids))

    def apply_chat_template(self, messages, **_):
        [message] = messages
        return message["content"]


def demonstrations(case, tmp_path, **settings):
    """The vectors' rows, read as data."""

    def unpadded(ids):
        while ids and ids[-1] == case["pad_id"]:
            ids = ids[:-1]
        return " ".join(map(str, ids))

    rows = [
        {
            "prompt": [{"role": "user", "content": " ".join(str(i) for i, m in zip(prompt, mask) if m)}],
            "target": unpadded(target), "reward_model": {"ground_truth": "1"},
        }
        for prompt, mask, target in zip(
            case["prompts"], case["prompt_mask"], case["tgt_input_ids_right_padded"], strict=True
        )
    ]
    length = len(case["tgt_input_ids_right_padded"][0])
    args = Args(data=write_rows(tmp_path / "rows.jsonl", rows), max_response_tokens=length, **settings)
    how = dict(split="train", empty_trace="on_policy", long_trace=relift.LONG_TRACE[args.long_trace])
    return read_examples(args.data, Numbers(case["eos_id"]), args, **how)[0]


@pytest.mark.parametrize("name", VECTORS["replace_response_in_batch"]["cases"])
def test_demonstrations_are_the_published_sequences(name, tmp_path):
    """Also where pad is eos. An empty one is none at all, where the published code trained on an eos."""
    case = VECTORS["replace_response_in_batch"]["cases"][name]
    examples = demonstrations(case, tmp_path, long_trace="cut")
    for i, example in enumerate(examples):
        if name.startswith("empty_target"):
            assert example.trace is None
            continue
        real = [k for k, m in enumerate(case["attention_mask"][i]) if m]
        assert example.prompt + example.trace == [case["input_ids"][i][k] for k in real]
        positions = pack([(example.prompt, example.trace)]).position_ids[0].tolist()
        assert positions == [case["position_ids"][i][k] for k in real][:-1]  # the last token is never read


def test_a_demonstration_that_is_too_long_is_none_unless_it_may_be_cut(tmp_path):
    cases = VECTORS["replace_response_in_batch"]["cases"]
    [case] = [case for name, case in cases.items() if name.startswith("target_fills")]
    [example] = demonstrations(case, tmp_path)
    assert example.trace is None and example.prompt == [11, 12]


# ------------------------------------------------------------------------------------------------- the buffer


def run_buffer(steps, size):
    """The buffer's part of a step, as main has it; -> [(hardest, held before, trained, held after), ...]."""
    args, buffer, trace = Args(sft_data_size=size), HardestBuffer(), []
    for step, rewards in enumerate(steps, 1):
        names = list(rewards)
        flat = [r for name in names for r in rewards[name]]
        groups = [g for g, name in enumerate(names) for _ in rewards[name]]
        hardest = [names[g] for g in hardest_groups(flat, groups)]
        if size > 0:
            buffer.add(hardest)
        held, trained = list(buffer.questions), []
        if size > 0 and sft_is_due(step, len(buffer), args):
            trained = [buffer.take(size)]
        trace.append((hardest, held, trained, list(buffer.questions)))
    return trace


@pytest.mark.parametrize("name", VECTORS["buffer"]["cases"])
def test_the_buffer_does_what_the_published_one_does(name):
    case = VECTORS["buffer"]["cases"][name]
    trace = run_buffer([step["rewards"] for step in case["steps"]], case["sft_data_size"])
    for step, (hardest, held, trained, after) in zip(case["steps"], trace, strict=True):
        assert hardest == step["hardest"]
        assert held == step["buffer_after_collect"]
        assert trained == step["sft_batch_trained"]
        assert after == (step["buffer_after_step"] or [])


def test_a_step_without_a_hardest_question_is_a_step_like_any_other():
    """The published code stops here: at step 1, and after the buffer was emptied exactly."""
    right, wrong = [1, 0], [0, 0]
    trace = run_buffer([{"a": right}, {"b": wrong, "c": wrong}, {"d": right}, {"e": wrong}, {"f": wrong}], 2)
    assert trace == [
        ([], [], [], []), (["b", "c"], ["b", "c"], [["b", "c"]], []), ([], [], [], []),
        (["e"], ["e"], [], ["e"]), (["f"], ["f", "e"], [["f", "e"]], []),
    ]  # fmt: skip


def test_a_question_is_held_once_and_moves_to_the_front():
    buffer = HardestBuffer()
    buffer.add([1, 2, 3])
    buffer.add([4, 2])
    assert buffer.take(2) == [4, 2] and len(buffer) == 2
    buffer.add([4])
    assert buffer.take(10) == [4, 1, 3] and len(buffer) == 0 and buffer.take(1) == []


def test_the_buffer_comes_back_from_its_state_as_json():
    buffer, again = HardestBuffer(), HardestBuffer()
    buffer.add([7, 3, 9])
    again.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
    buffer.take(1)
    assert again.take(3) == [7, 3, 9]


@pytest.mark.parametrize(("threshold", "hardest"), [(0.0, [5]), (0.24, [5]), (0.25, [5, 2]), (0.5, [5, 2, 8])])
def test_the_threshold_is_the_share_of_right_rollouts_that_still_counts_as_hardest(threshold, hardest):
    rewards = [0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1]
    assert hardest_groups(rewards, [5] * 4 + [2] * 4 + [8] * 4 + [1] * 4, threshold) == hardest


def test_a_reward_of_any_size_over_zero_is_of_a_right_rollout():
    assert hardest_groups([0.2, 0, 0, 0, -1, -0.5], [7, 7, 3, 3, 5, 5]) == [3, 5]


def test_uniform_interleaving_takes_what_the_buffer_holds():
    args = Args(sft_every=3, sft_data_size=128)
    assert [sft_is_due(step, held, args) for step, held in ((3, 1), (3, 0), (2, 500), (6, 500))] == [
        True, False, False, True,
    ]  # fmt: skip
