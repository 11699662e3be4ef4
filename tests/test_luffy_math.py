"""luffy.py's mathematics against the numbers of the published code (tests/vectors/luffy.json, float64)."""

import dataclasses
import math

import pytest
import torch

import luffy
import relift
from common.data import InputError, pack, plan_micro_batches
from common.rows import Trace, given_logps
from luffy import Args, Row, accumulate_gradient, group_advantages, luffy_token_loss, policy_logps
from tests.conftest import assert_equal, f64, vectors
from tests.ranks import ONE_RANK, Bigram

VECTORS = vectors("luffy")
INPUTS = VECTORS["policy_loss_inputs"]


# ---------------------------------------------------------------------------------------------- advantages


def row_values(per_token):
    """The vectors broadcast a row's advantage over its tokens; the first token is never masked."""
    return [row[0] if isinstance(row, list) else row for row in per_token]


@pytest.mark.parametrize("case", VECTORS["advantages"]["cases"], ids=lambda c: c["case"])
def test_group_advantages_are_the_published_ones(case):
    rewards = f64(case["rewards"])
    names = case.get("uid", ["p"] * len(rewards))
    groups = torch.tensor([sorted(set(names)).index(name) for name in names])
    if "grpo" in case:
        assert_equal(group_advantages(rewards, groups, std=case.get("use_std", False)), row_values(case["grpo"]))
    if "grpo_split" in case:
        own = torch.arange(len(rewards)) > 0
        assert_equal(
            group_advantages(rewards, groups, std=case.get("use_std", False), baseline=own),
            row_values(case["grpo_split"]),
        )


@pytest.mark.parametrize("group_advantages", [luffy.group_advantages, relift.group_advantages])
def test_std_is_the_unbiased_one_plus_epsilon(group_advantages):
    """In groups of one (std 1), two and four rows."""
    rewards, groups = f64([1, 0, 0, 0, 1, 0, 0.7]), torch.tensor([3, 3, 3, 3, 5, 5, 1])
    expected = [*((rewards[:4] - 0.25) / (0.5 + 1e-6)).tolist(), *[x / (0.5**0.5 + 1e-6) for x in (0.5, -0.5)],
                0.7 / (1 + 1e-6)]  # fmt: skip
    assert_equal(group_advantages(rewards, groups, std=True), expected)
    assert group_advantages(f64([1, 1]), torch.zeros(2, dtype=torch.long), std=True).abs().max() == 0


def test_equal_rewards_of_any_size_give_no_advantage():
    for reward in (0.1, 0.3, 0.7, 0.9, 1e-3, 123.4):
        rewards, groups = torch.full((8,), reward, dtype=torch.float64), torch.zeros(8, dtype=torch.long)
        assert group_advantages(rewards, groups, std=True).abs().max() < 1e-7
        own = torch.arange(8) < 7
        found = group_advantages(rewards + 0.2 * ~own, groups, std=True, baseline=own)
        assert found[:7].abs().max() < 1e-7 and found[7].item() == pytest.approx(0.2, rel=1e-5)


def test_a_zero_std_of_the_baseline_rows_counts_as_one():
    rewards, groups = f64([1, 0, 0]), torch.zeros(3, dtype=torch.long)
    own = torch.tensor([False, True, True])
    assert_equal(group_advantages(rewards, groups, std=True, baseline=own), [1 / (1 + 1e-6), 0, 0])


def test_a_small_std_of_the_baseline_rows_is_taken_as_it_is():
    """Of rewards of one's own that differ in the third digit."""
    rewards, own = f64([1, 0.002, 0]), torch.tensor([False, True, True])
    found = group_advantages(rewards, torch.zeros(3, dtype=torch.long), std=True, baseline=own)
    assert_equal(found, [x / (0.002 * 0.5**0.5 + 1e-6) for x in (0.999, 0.001, -0.001)], 1e-6)


def test_a_group_of_one_has_mean_zero():
    assert_equal(group_advantages(f64([1, 0]), torch.tensor([3, 9])), [1, 0])
    assert_equal(group_advantages(f64([1]), torch.tensor([5]), std=True), [1 / (1 + 1e-6)])


@pytest.mark.parametrize("right", range(8))
def test_the_traces_advantage_falls_from_seven_eighths_to_zero(right):
    rewards = f64([1] + [1] * right + [0] * (7 - right))
    assert group_advantages(rewards, torch.zeros(8, dtype=torch.long))[0].item() == pytest.approx((7 - right) / 8)


# ---------------------------------------------------------------------------------------------- token losses


def token_losses(rows=slice(None), *, gamma, clip, all_own=False):
    logp = f64(INPUTS["log_prob"])[rows].requires_grad_()
    teacher = torch.tensor(INPUTS["prefix_mask"])[rows] & (not all_own)
    loss = luffy_token_loss(
        logp, f64(INPUTS["old_log_prob"])[rows], f64(INPUTS["advantages"])[rows], teacher, gamma=gamma, clip=clip
    )
    return logp, loss, f64(INPUTS["eos_mask"])[rows]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("LUFFY_train_sh", dict(gamma=0.1, clip=None)),
        ("LUFFY_shaping_with_on_clip", dict(gamma=0.1, clip=0.2)),
        ("mixed_policy_no_shaping_no_clip", dict(gamma=None, clip=None)),
        ("on_policy_script_(all_on,clip)", dict(gamma=None, clip=0.2, all_own=True)),
        ("LUFFY_token_mean", dict(gamma=0.1, clip=None)),
    ],
)
def test_token_losses_and_gradients_are_the_published_ones(name, settings):
    case = VECTORS["policy_loss"]["cases"][name]
    logp, loss, mask = token_losses(**settings)
    # the published sum is divided by the width of the response tensor (5), the token mean by the tokens
    total = (loss * mask).sum() / (mask.sum() if name == "LUFFY_token_mean" else loss.shape[1])
    total.backward()
    assert_equal(total.detach(), case["outputs"]["pg_loss"])
    assert_equal(logp.grad * mask, case["grad_wrt_log_prob"])


@pytest.mark.parametrize("name", ["clip_dr", "noclip_dr"])
def test_own_tokens_alone_give_the_plain_policy_loss(name):
    case = VECTORS["plain_policy_loss"]["cases"][name]
    logp, loss, mask = token_losses(gamma=None, clip=0.2 if name == "clip_dr" else None, all_own=True)
    total = (loss * mask).sum() / loss.shape[1]
    total.backward()
    assert_equal(total.detach(), case["pg_loss"])
    assert_equal(logp.grad * mask, case["grad_wrt_log_prob"])


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.5, None])
def test_the_gradient_of_a_teachers_token_is_shaped(gamma):
    """A gamma p / (p + gamma)^2 times the gradient of log p, largest at p = gamma."""
    table = VECTORS["shaping_gradient_weight"]
    logp = f64(table["p"]).log().requires_grad_()
    luffy_token_loss(
        logp, torch.zeros_like(logp), torch.ones_like(logp), torch.ones_like(logp).bool(), gamma=gamma
    ).sum().backward()
    name = "no_reshape" if gamma is None else f"p_div_p_{gamma}"
    assert_equal(-logp.grad, table["table"][name]["minus_grad_wrt_logp_times_width"])


def test_a_probability_near_zero_in_the_branch_not_taken_makes_no_nan():
    logp = torch.tensor([-1e4, -1e4, 0.0, -1e4], requires_grad=True)
    old = torch.tensor([0.0, -1e9, -1e9, -1e4])  # exp(logp - old) overflows for the teacher's tokens
    teacher = torch.tensor([True, True, True, False])
    loss = luffy_token_loss(logp, old, torch.ones(4), teacher)
    loss.sum().backward()
    assert loss.isfinite().all() and logp.grad.isfinite().all()


# ----------------------------------------------------------------------------- one update, against the published


def integration(name, method, micro_batch_tokens):
    data = VECTORS["integration_update_policy"]
    case = data["cases"][name]
    rows = [
        Row(prompt, response[: sum(mask)], group, teacher[0] and method == "luffy", advantage=advantage[0])
        for prompt, response, mask, teacher, group, advantage in zip(
            data["prompts"], data["responses"], data["response_mask"], data["prefix_mask"],
            [uid == "q" for uid in data["uid"]], case["advantages"], strict=True,
        )
    ]
    args = dataclasses.replace(
        Args(), method=method, max_response_tokens=4, entropy_coef=case["entropy_coeff"],
        loss_rows=case["ppo_mini_batch_rows"], clip=0.0 if method == "luffy" else 0.2,
        micro_batch_tokens=micro_batch_tokens,
    )
    return case, rows, args


@pytest.mark.parametrize("micro_batch_tokens", [5, 12, 1000])
def test_an_update_of_luffy_is_the_published_one_whatever_the_micro_batches(micro_batch_tokens):
    case, rows, args = integration("luffy_one_minibatch_one_micro_sgd_noclip", "luffy", micro_batch_tokens)
    policy = Bigram(case["W_before"])
    metrics = accumulate_gradient(policy, rows, None, args, ONE_RANK)
    assert_equal((policy.table - case["lr"] * policy.table.grad).detach(), case["W_after"])
    assert metrics["policy/entropy"] == pytest.approx(case["metrics"]["actor/entropy_loss"][0])
    assert metrics["teacher/shaped_ratio"] == pytest.approx(case["metrics"]["actor/off_ratio_mean"][0])


@pytest.mark.parametrize("micro_batch_tokens", [5, 1000])
def test_two_updates_of_on_policy_rl_are_the_published_ones(micro_batch_tokens):
    """The second update is off-policy: its ratio is taken to the policy before the first."""
    case, rows, args = integration("on_policy_script_clip_all_rows_on", "grpo", micro_batch_tokens)
    policy = Bigram(case["W_before"])
    with torch.no_grad():
        assert_equal(policy_logps(policy, rows[:1], args, ONE_RANK)[0], case["old_log_probs"][0])
    old = policy_logps(policy, rows[4:], args, ONE_RANK)
    for update, old_logps in ((rows[:4], None), (rows[4:], old)):
        accumulate_gradient(policy, update, old_logps, args, ONE_RANK)
        with torch.no_grad():
            policy.table -= case["lr"] * policy.table.grad
        policy.table.grad = None
    assert_equal(policy.table.detach(), case["W_after"])


def test_rl_with_sft_loss_is_the_published_one():
    """RL on own rows (their mean is the baseline) plus the mean negative log-likelihood of teachers' tokens."""
    case = VECTORS["rl_with_sft_loss"]
    logp, _, mask = token_losses(gamma=None, clip=None)
    rewards = f64(INPUTS["rewards"])
    teacher = torch.tensor(INPUTS["prefix_mask"]).any(1)
    groups = torch.tensor([uid == "q" for uid in INPUTS["uid"]]).long()
    advantages = group_advantages(rewards, groups, baseline=~teacher)
    assert_equal(advantages, row_values(case["advantages_split"]))
    rows = [
        Row([0], list(range(length)), int(g), bool(t), advantage=a)
        for length, g, t, a in zip(INPUTS["lengths"], groups, teacher, advantages.tolist(), strict=True)
    ]
    args = dataclasses.replace(Args(), method="rl_sft", max_response_tokens=5, loss_rows=8)

    [[order]] = plan_micro_batches(INPUTS["lengths"], 1, 1000)  # the one micro-batch's rows, in its order

    class Given(torch.nn.Module):  # returns the vectors' log-probs, and entropies of 0
        def forward(self, batch, **_):
            values = torch.cat([logp[i, : INPUTS["lengths"][i]] for i in order])
            return values, torch.zeros_like(values)

    old = torch.cat([f64(INPUTS["old_log_prob"])[i, : INPUTS["lengths"][i]] for i in order])
    accumulate_gradient(Given(), rows, [old], args, ONE_RANK)
    assert_equal(logp.grad * mask, case["whole_batch"]["grad_wrt_log_prob"], 1e-7)


def test_rows_without_an_advantage_are_left_out_where_nothing_else_needs_them(monkeypatch):
    """Two updates without an entropy bonus: the gradients are those of all rows, and fewer tokens are read."""
    case, rows, args = integration("luffy_one_minibatch_one_micro_sgd_noclip", "luffy", 1000)
    assert luffy.rows_with_gradient(rows, args) == rows  # the entropy bonus needs them
    args = dataclasses.replace(args, entropy_coef=0.0)
    for row in rows[:5]:
        row.advantage = 0.0
    assert luffy.rows_with_gradient(rows, args) == rows[5:]
    assert luffy.rows_with_gradient(rows[:5], args) == rows[:1]  # a gradient of zeros all the same

    def gradient():
        policy = Bigram(case["W_before"])
        old = policy_logps(policy, luffy.rows_with_gradient(rows, args), args, ONE_RANK)
        accumulate_gradient(policy, rows, [x - 0.1 for x in old], args, ONE_RANK)
        return policy.table.grad

    fewer = gradient()
    monkeypatch.setattr(luffy, "rows_with_gradient", lambda rows, args: rows)
    torch.testing.assert_close(fewer, gradient(), rtol=0, atol=1e-12)
    assert fewer.abs().max() > 0


def test_nobody_reads_the_teachers_trace_for_its_behavior_log_probs():
    case, rows, args = integration("luffy_one_minibatch_one_micro_sgd_noclip", "luffy", 1000)
    read = []

    class Counting(Bigram):
        def forward(self, batch, **how):
            read.append(len(batch.targets))
            return super().forward(batch, **how)

    logps = torch.cat(policy_logps(Counting(case["W_before"]), rows, args, ONE_RANK))
    teacher = sum(len(row.response) for row in rows if row.teacher)
    assert teacher and sum(read) == len(logps) - teacher == (~logps.isnan()).sum()


def test_the_published_number_of_micro_batches_follows_the_rows_length():
    assert luffy.published_micro_batches(100) == 1
    assert luffy.published_micro_batches(512) == 1
    assert luffy.published_micro_batches(2560) == 5


@pytest.mark.parametrize("shape", list(VECTORS["shaping_gradient_weight"]["table"]) + ["pow"])
def test_every_published_shape_has_the_published_gradient(shape):
    table = VECTORS["shaping_gradient_weight"]
    logp = f64(table["p"]).log().requires_grad_()
    ones = torch.ones_like(logp)
    luffy_token_loss(logp, torch.zeros_like(logp), ones, ones.bool(), shape=shape).sum().backward()
    expected = table["table"]["square_root" if shape == "pow" else shape]["minus_grad_wrt_logp_times_width"]
    assert_equal(-logp.grad, expected)


@pytest.mark.parametrize("shape", ["no_reshape", "logp", "p_logp", "square_root", "pow", "p_div_p_0.1", "p_div_p_0.5"])
def test_own_tokens_can_be_shaped_too(shape):
    """The published ratio: f(p) / f(p_old) for p_div_p; f of the ratio for the others (logp: its log)."""
    logp, old = f64([0.3, 0.02]).log().requires_grad_(), f64([0.2, 0.05]).log()
    p, q, r = logp.exp(), old.exp(), (logp - old).exp()
    expected = {
        "no_reshape": r, "logp": r.log(), "p_logp": r + r.log(), "square_root": r.sqrt(), "pow": r.sqrt(),
        "p_div_p_0.1": p / (p + 0.1) / (q / (q + 0.1)), "p_div_p_0.5": p / (p + 0.5) / (q / (q + 0.5)),
    }[shape]  # fmt: skip
    advantages, own = f64([0.7, -0.4]), torch.zeros(2, dtype=torch.bool)
    got = luffy_token_loss(logp, old, advantages, own, own_shape=shape)
    torch.testing.assert_close(got, -advantages * expected)
    [grad], [wanted] = (torch.autograd.grad(x.sum(), logp, retain_graph=True) for x in (got, -advantages * expected))
    torch.testing.assert_close(grad, wanted)


def test_a_given_teachers_probability_replaces_the_shape():
    logp = f64([0.3, 0.3, 0.3]).log().requires_grad_()
    teacher_logp, advantages = f64([0.6, math.nan, 0.6]).log(), f64([1.0, 1.0, 1.0])
    teacher = torch.tensor([True, True, False])
    loss = luffy_token_loss(logp, logp.detach(), advantages, teacher, teacher_logp=teacher_logp)
    assert_equal(loss.detach(), [-0.3 / (0.6 + 1e-6), -0.75, -1.0])
    loss.sum().backward()
    assert_equal(logp.grad, [-0.3 / (0.6 + 1e-6), -0.3 * 0.1 / 0.4**2, -1.0])


def test_the_teachers_probabilities_come_from_the_column_target_probs():
    def found(probs):
        return given_logps(Trace("a", probs=probs), [7, 8, 1], "q", None, "x")

    logps = found([0.5, 0.25])
    assert logps[:2] == [math.log(0.5), math.log(0.25)] and math.isnan(logps[2])  # the eos has none
    assert found(None) is None
    for probs in ([0.5], [0.5, 0.5, 0.5, 0.5], [0.5, 0.0, 1.0], [0.5, 2.0], [math.nan, 2.0], "no", [None, 0.1]):
        with pytest.raises(InputError, match="x: 'target_probs' "):
            found(probs)


def test_truncated_importance_is_the_capped_ratio_and_1_without_a_sampler():
    old = torch.tensor([0.2, 0.9, 0.5, 0.5], dtype=torch.float64).log().requires_grad_()
    sampler = torch.tensor([0.4, 0.1, 0.5, math.nan], dtype=torch.float64).log()
    weight = luffy.truncated_importance(old, sampler, 2.0)
    torch.testing.assert_close(weight, torch.tensor([0.5, 2.0, 1.0, 1.0], dtype=torch.float64))
    assert not weight.requires_grad


def test_given_probabilities_reach_the_update_and_tis_weighs_own_tokens_alone():
    case, rows, args = integration("luffy_one_minibatch_one_micro_sgd_noclip", "luffy", 1000)
    policy = Bigram(case["W_before"])
    own = policy_logps(policy, rows, args, ONE_RANK)[0]
    start = 0
    for row in rows:
        drawn = own[start : start + len(row.response)]
        row.logps = [math.log(0.4)] * len(row.response) if row.teacher else (drawn - math.log(2)).tolist()
        start += len(row.response)
    batch = pack([(row.prompt, row.response) for row in rows])
    teacher = torch.tensor([row.teacher for row in rows])[batch.sequence]
    advantage = f64([row.advantage for row in rows])[batch.sequence]
    for tis_cap, weight in ((0.0, 1.0), (1.5, 1.5), (4.0, 2.0)):  # the sampler's probabilities are half of the policy's
        settings = dataclasses.replace(args, entropy_coef=0.0, tis_cap=tis_cap)
        policy.table.grad = None
        accumulate_gradient(policy, rows, None, settings, ONE_RANK)
        gradient, policy.table.grad = policy.table.grad, None
        logp = policy(batch)
        loss = -advantage * torch.where(teacher, logp.exp() / (0.4 + 1e-6), weight * (logp - logp.detach()).exp())
        (loss.sum() * args.loss_rows / len(rows) / args.max_response_tokens).backward()
        torch.testing.assert_close(gradient, policy.table.grad, rtol=1e-6, atol=1e-9)
