"""behavior_injection.py's mathematics against the numbers of the published code.

tests/vectors/behavior_injection.json. The published functions ran in float32: their results are met to the bit in
float32 and to its rounding in float64."""

import dataclasses
import math

import pytest
import torch
from torch.func import functional_call, jvp

import common.rollout
from behavior_injection import (
    Row,
    accumulate_gradient,
    accumulate_sft_gradient,
    format_reward,
    group_advantages,
    kernel_scores,
    low_variance_kl,
    micro_batches,
    per_step_influence,
    policy_token_loss,
    row_means,
)
from common.data import pack, plan_micro_batches
from common.rollout import EmbeddedSampler, Sampling
from common.verifiers import boxed_reward
from tests.conftest import assert_equal, vectors
from tests.ranks import ONE_RANK, Bigram
from tools.influence import Args, count_sketch, inner, kernel_table, objective_gradient, summarise

VECTORS = vectors("behavior_injection")
ADVANTAGES, LOSS = VECTORS["grpo_advantage"], VECTORS["policy_loss"]
PRECISIONS = [(torch.float32, 1e-9), (torch.float64, 1e-7)]


# --------------------------------------------------------------------------------------------------- GRPO


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_advantages_are_the_published_ones(dtype, tolerance):
    groups = torch.tensor([ord(name) for name in ADVANTAGES["uid"]])
    advantages = group_advantages(torch.tensor(ADVANTAGES["rewards"], dtype=dtype), groups)
    assert_equal(advantages, ADVANTAGES["advantage_per_sequence"], tolerance)


def test_equal_rewards_and_groups_of_one_have_no_advantage():
    for rewards in ([0.1, 0.1, 0.1], [1.0, 1.0, 1.0]):
        assert group_advantages(torch.tensor(rewards), torch.zeros(3)).tolist() == [0, 0, 0]
    assert group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([4, 2])).tolist() == [0, 0]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_policy_loss_and_kl_are_the_published_ones(dtype, tolerance):
    new, old, ref, mask = (torch.tensor(LOSS[name], dtype=dtype) for name in ("new", "old", "ref", "mask"))
    advantages = torch.tensor(ADVANTAGES["advantage_per_sequence"], dtype=dtype)[:, None].expand_as(mask)
    loss = (policy_token_loss(new, old, advantages, clip=LOSS["clip"]) * mask).sum(1) / mask.sum(1)
    kl = (low_variance_kl(new, ref) * mask).sum(1) / mask.sum(1)
    assert_equal(loss, LOSS["pg_loss_per_sequence"], tolerance)
    assert_equal(kl, LOSS["kl_per_sequence"], tolerance)
    assert_equal((loss + LOSS["kl_coef"] * kl).mean(), LOSS["total_mean"], tolerance)


def test_the_low_variance_kl_is_never_negative_at_most_ten_and_the_kl_on_average():
    p, q = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
    estimates = low_variance_kl(p.log(), q.log())
    assert (estimates >= 0).all() and low_variance_kl(torch.tensor(-9.0), torch.tensor(0.0)) == 10
    logp = torch.tensor(-200.0, requires_grad=True)
    low_variance_kl(logp, torch.tensor(0.0)).backward()
    assert logp.grad == 0, "e^200 is no float32"
    assert_equal((p * estimates).sum(), (p * (p / q).log()).sum())


def test_the_low_variance_kls_mean_gradient_is_that_of_the_reversed_kl():
    logits, q = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True), torch.tensor([0.6, 0.3, 0.1])
    logp, q = logits.log_softmax(-1), q.double()
    [found] = torch.autograd.grad(
        (logp.detach().exp() * low_variance_kl(logp, q.log())).sum(), logits, retain_graph=True
    )
    [reversed_kl] = torch.autograd.grad((q * (q.log() - logp)).sum(), logits, retain_graph=True)
    [kl] = torch.autograd.grad((logp.exp() * (logp - q.log())).sum(), logits)
    assert_equal(found, reversed_kl)
    assert (found - kl).abs().max() > 0.01


class Given(torch.nn.Module):
    """A policy that returns the vectors' log-probs, whatever it is given; entropies are twice as much."""

    def __init__(self, logp, lengths):
        super().__init__()
        self.logp, self.lengths = logp, lengths

    def rows(self, batch):
        starts = (batch.position_ids[0] == 0).nonzero()[:, 0]
        return [int(batch.input_ids[0, i]) for i in starts]  # a row's prompt is its number

    def forward(self, batch, *, entropy=False, **_):
        logp = torch.cat([self.logp[i, : self.lengths[i]] for i in self.rows(batch)])
        return (logp, 2 * logp) if entropy else logp


def test_without_a_clip_the_loss_is_that_of_the_ratio():
    logp, old = torch.tensor([0.6, 0.1]).log(), torch.tensor([0.2, 0.2]).log()
    torch.testing.assert_close(policy_token_loss(logp, old, torch.tensor([1.0, -1.0])), torch.tensor([-3.0, 0.5]))


def published_update(micro_batch_tokens, **changes):
    lengths = ADVANTAGES["lengths"]
    new = torch.tensor(LOSS["new"], dtype=torch.float64, requires_grad=True)
    rows = [
        Row([i], [0] * n, i // 4, False, [math.nan] * n, advantage=a)
        for i, (n, a) in enumerate(zip(lengths, ADVANTAGES["advantage_per_sequence"], strict=True))
    ]
    args = dataclasses.replace(
        Args(), clip=LOSS["clip"], kl_coef=LOSS["kl_coef"], entropy_coef=0.0, micro_batch_tokens=micro_batch_tokens
    )
    args = dataclasses.replace(args, **changes)
    order = plan_micro_batches(lengths, 1, micro_batch_tokens)
    old, ref = (
        [torch.cat([torch.tensor(LOSS[name][i][: lengths[i]]).double() for i in share]) for [share] in order]
        for name in ("old", "ref")
    )
    metrics = accumulate_gradient(Given(new, lengths), rows, old, ref, args, ONE_RANK)
    return new, metrics


def expected_gradient(loss_of):
    new, old, ref, mask = (torch.tensor(LOSS[name], dtype=torch.float64) for name in ("new", "old", "ref", "mask"))
    new.requires_grad_()
    advantages = torch.tensor(ADVANTAGES["advantage_per_sequence"], dtype=torch.float64)[:, None].expand_as(mask)
    loss = policy_token_loss(new, old, advantages, clip=LOSS["clip"])
    total = loss_of(loss, low_variance_kl(new, ref), new, mask)
    total.backward()
    return total, new.grad * mask


@pytest.mark.parametrize("micro_batch_tokens", [6, 17, 1000])
def test_an_update_is_the_mean_over_a_rows_tokens_and_then_over_rows_whatever_the_micro_batches(micro_batch_tokens):
    new, metrics = published_update(micro_batch_tokens, entropy_coef=0.01)

    def loss_of(loss, kl, logp, mask):
        return ((loss + LOSS["kl_coef"] * kl - 0.01 * 2 * logp) * mask).sum(1).div(mask.sum(1)).mean()

    _, gradient = expected_gradient(loss_of)
    assert_equal(new.grad, gradient, 1e-12)
    pg, kl = torch.tensor(LOSS["pg_loss_per_sequence"]).mean(), torch.tensor(LOSS["kl_per_sequence"]).mean()
    assert metrics["loss/pg"] == pytest.approx(pg.item(), abs=1e-7)
    assert metrics["policy/kl_ref"] == pytest.approx(kl.item(), abs=1e-7)
    assert metrics["policy/masked"] == 0


def test_answers_far_from_the_reference_are_left_out_but_count_in_the_mean():
    threshold = sorted(LOSS["kl_per_sequence"])[10] - 1e-6
    new, metrics = published_update(17, kl_mask=threshold)

    def loss_of(loss, kl, logp, mask):
        kl = (kl * mask).sum(1) / mask.sum(1)
        total = (loss * mask).sum(1) / mask.sum(1) + LOSS["kl_coef"] * kl
        return (total * (kl.detach() < threshold)).mean()

    assert_equal(new.grad, expected_gradient(loss_of)[1], 1e-12)
    assert metrics["policy/masked"] == 6 / 16


def test_metrics_of_an_update_are_of_the_answers_that_are_kept_and_means_over_tokens():
    rows = [Row([0], [1, 2], 0, logps=[-1.0] * 2, advantage=1.0),
            Row([0], [3, 4, 1], 0, logps=[-1.0] * 3, advantage=0.5)]  # fmt: skip
    policy = Bigram(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).tolist())
    logp, entropy = policy(pack([(row.prompt, row.response) for row in rows]), entropy=True)
    reference = logp.detach() - torch.tensor([0.0, 0, 3, 3, 3])  # the second answer is far from it
    log = accumulate_gradient(policy, rows, None, [reference], Args(kl_mask=0.5), ONE_RANK)
    assert (log["loss/pg"], log["policy/masked"]) == (-0.5, 0.5)
    assert log["policy/entropy"] == pytest.approx(entropy.mean().item())
    assert log["policy/kl_ref"] == pytest.approx((math.exp(-3) + 3 - 1) / 2)


# ----------------------------------------------------------------------------------------------------- SFT


@pytest.mark.parametrize("micro_batch_tokens", [6, 17, 1000])
@pytest.mark.parametrize("rows_per_mean", [1, 4, 5, 0])
def test_the_sft_loss_is_the_mean_of_token_means(rows_per_mean, micro_batch_tokens):
    lengths = ADVANTAGES["lengths"]
    logp = torch.tensor(LOSS["new"], dtype=torch.float64, requires_grad=True)
    rows = [Row([i], [0] * n, i) for i, n in enumerate(lengths)]
    args = dataclasses.replace(Args(), sft_rows_per_mean=rows_per_mean, micro_batch_tokens=micro_batch_tokens)
    metrics = accumulate_sft_gradient(Given(logp, lengths), rows, args, ONE_RANK)
    size = rows_per_mean or 16
    means = [range(first, min(first + size, 16)) for first in range(0, 16, size)]
    expected = sum(torch.cat([logp[i, : lengths[i]] for i in mean]).mean() / len(means) for mean in means)
    assert metrics["sft/loss"] == pytest.approx(-expected.item(), rel=1e-7)  # weights of tokens are float32
    assert_equal(logp.grad, -torch.autograd.grad(expected, logp)[0], 1e-8)


# ----------------------------------------------------------------------------------- rewards, ends of answers


def test_rewards_are_the_published_ones_with_and_without_the_bonus_for_form():
    for case in vectors("bridge_reward"):
        reward = boxed_reward(case["completion"], str(case["gt"]))
        assert reward == case["score0"]
        assert reward + 0.05 * format_reward(case["completion"]) == pytest.approx(case["score_fmt005"])


def test_an_answer_ends_with_its_first_eos(policy, monkeypatch):
    """What the published mask keeps is what the sampler hands out: the same tokens, eos included."""
    case = VECTORS["eos_mask"]
    script = torch.tensor(case["ids"])
    sampler = EmbeddedSampler(policy, stop_ids=[case["eos"]])
    sampler.sync(policy, version=0)
    place = iter(range(script.shape[1]))
    live = [0, 1, 2]

    def draw(logits, uniforms, sampling):
        token = script[live[: len(logits)], next(place)]
        return token, torch.zeros(len(logits))

    monkeypatch.setattr(common.rollout, "draw", draw)
    monkeypatch.setattr(common.rollout.DynamicCache, "batch_select_indices", lambda *_: None)
    monkeypatch.setattr(EmbeddedSampler, "_hidden", lambda self, ids, *_: torch.zeros(len(ids), 32))
    for i, mask in enumerate(case["mask"]):
        live[:], place = [i], iter(range(script.shape[1]))
        [[answer]] = sampler.generate([[5, 6]], n=1, keys=[0], seed=0, sampling=Sampling(script.shape[1]))
        assert answer.ids == script[i, : sum(mask)].tolist()
        assert answer.truncated == (case["eos"] not in case["ids"][i])


# ---------------------------------------------------------------------------------------------- influence

TOY = VECTORS["per_step_influence"]
GROUPS = torch.arange(4).repeat_interleave(8)


class Toy(torch.nn.Module):
    """The vectors' toy policy: logits of the t-th token of an answer to question q = phi[q, t] @ theta."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(TOY["theta"], dtype=torch.float64))
        self.phi = torch.tensor(TOY["phi"], dtype=torch.float64)

    def forward(self, batch, **_):
        starts = batch.predictors[batch.position_ids[0, batch.predictors] == 0]
        question = batch.input_ids[0, starts][batch.sequence]  # [N]: a row's prompt is its question, one token
        place = batch.position_ids[0, batch.predictors]
        return (self.phi[question, place] @ self.theta).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]


def toy_rows(biased=True):
    rewards = torch.tensor(TOY["rewards"], dtype=torch.float64).flatten()
    advantages = group_advantages(rewards, GROUPS, ddof=0, eps=0.0) if biased else group_advantages(rewards, GROUPS)
    outputs = [answer for answers in TOY["outputs"] for answer in answers]
    return [
        Row([int(q)], answer, int(q), reward=r, advantage=a)
        for q, answer, r, a in zip(GROUPS, outputs, rewards.tolist(), advantages.tolist(), strict=True)
    ]


def toy_kernel(policy, rows):
    one = [dataclasses.replace(row, advantage=1.0) for row in rows]
    gradients = torch.stack([objective_gradient(policy, [row], 1, Args(), ONE_RANK)[0] for row in one])
    return gradients @ gradients.T


def influence_of(scores, rows):
    advantages = torch.tensor([row.advantage for row in rows], dtype=torch.float64)
    d_j, queries = per_step_influence(torch.as_tensor(scores, dtype=torch.float64), advantages, GROUPS)
    assert queries.tolist() == [0, 1, 2, 3]
    return d_j


def test_advantages_with_the_biased_std_are_the_papers():
    advantages = torch.tensor([row.advantage for row in toy_rows()], dtype=torch.float64)
    assert_equal(advantages, sum(TOY["adv_biased_std"], []))


@pytest.mark.parametrize("micro_batch_tokens", [3, 11, 1000])
def test_influence_is_the_same_by_eq_5_by_inner_product_and_by_jvp(micro_batch_tokens):
    policy, rows = Toy(), toy_rows()
    args = dataclasses.replace(Args(), micro_batch_tokens=micro_batch_tokens)
    advantages = torch.tensor([row.advantage for row in rows], dtype=torch.float64)
    kernel = toy_kernel(policy, rows)
    assert_equal(kernel[:8, :8][0], TOY["K_00"][0])
    by_kernel = influence_of(kernel_scores(kernel, advantages), rows)
    assert_equal(by_kernel, TOY["deltaJ_eq5"])

    direction = objective_gradient(policy, rows, len(rows), args, ONE_RANK)
    own = [objective_gradient(policy, [r for r in rows if r.group == q], 8, args, ONE_RANK) for q in range(4)]
    products = torch.tensor([inner(gradient, direction) for gradient in own], dtype=torch.float64)
    assert_equal(products, TOY["deltaJ_direct"])

    def log_probs(theta):
        [(batch, mine)] = micro_batches(rows, Args(), ONE_RANK)
        return row_means(functional_call(policy, {"theta": theta}, (batch,)), batch, mine)

    _, scores = jvp(log_probs, (policy.theta.detach(),), (direction[0],))
    by_jvp = influence_of(scores.detach(), rows)
    assert_equal(by_jvp, TOY["deltaJ_jvp"])
    for one in (by_kernel, products):
        assert_equal(one, by_jvp, 1e-9)


def test_a_query_can_be_left_out_of_the_step_that_it_is_measured_against():
    rows = toy_rows()
    advantages = torch.tensor([row.advantage for row in rows], dtype=torch.float64)
    scores = kernel_scores(toy_kernel(Toy(), rows), advantages, GROUPS)
    assert_equal(influence_of(scores, rows), TOY["deltaJ_leave_self_out"])


def test_influence_is_the_difference_between_right_and_wrong_answers_scaled_by_accuracy():
    scores, rows = torch.randn(32, generator=torch.Generator().manual_seed(0)).double(), toy_rows()
    unbiased = influence_of(scores, toy_rows(biased=False))
    for q, d_j in enumerate(influence_of(scores, rows).tolist()):
        right = torch.tensor(TOY["rewards"][q]).bool()
        a, mine = right.double().mean(), scores[8 * q : 8 * q + 8]
        expected = (a * (1 - a)).sqrt() * (mine[right].mean() - mine[~right].mean()) if 0 < a < 1 else a * 0
        assert d_j == pytest.approx(expected.item(), abs=1e-12)
        assert unbiased[q].item() == pytest.approx(math.sqrt(7 / 8) * expected.item(), rel=1e-5)


def test_a_sketch_is_exact_where_no_two_numbers_meet_and_close_otherwise():
    generator = torch.Generator().manual_seed(0)
    a, b = ([1 + torch.randn(30, 20, generator=generator), torch.randn(7, generator=generator)] for _ in range(2))
    exact, far = inner(a, b), 10**7  # so many sums that each of the 607 numbers has one of its own
    assert count_sketch([torch.ones(30, 20), torch.ones(7)], far).abs().max() == 1
    assert (count_sketch(a, far) @ count_sketch(b, far)).item() == pytest.approx(exact, rel=1e-5)
    size = math.sqrt(inner(a, a) * inner(b, b))
    found = []
    for seed in range(200):
        found.append(((count_sketch(a, 64, seed) @ count_sketch(b, 64, seed)).item() - exact) / size)
    found = torch.tensor(found)
    assert abs(found.mean()) < 4 * found.std() / math.sqrt(200)
    assert 0.7 < found.std() * math.sqrt(64) < 1.6


def test_influence_is_measured_at_the_sampling_temperature():
    row, policy = Row([0], [1, 2, 3], 0, advantage=1.0), Bigram(torch.eye(5).tolist())
    [found] = objective_gradient(policy, [row], 1, dataclasses.replace(Args(), temperature=0.5), ONE_RANK)
    found, policy.table.grad = found.clone(), None
    policy(pack([(row.prompt, row.response)]), temperature=0.5).mean().backward()
    assert_equal(found, policy.table.grad)


def test_cosines_are_means_over_queries_that_are_solved_sometimes():
    told = ((0, 0.0), (2, 0.5), (1, 0.3), (4, 0.0))
    found = [dict(right=k, accuracy=k / 4, dJ=float(k), cosine=c, gradient_norm=1.0) for k, c in told]
    summary = summarise(found, 4)
    assert (summary["cosine"], summary["dJ_mixed"]) == (pytest.approx(0.4), 1.5)
    assert (summary["dJ"], summary["never"], summary["always"]) == (1.75, 0.25, 0.25)


def test_kernels_are_means_over_pairs_of_two_answers():
    told = [(0, True, [1.0, 0.0]), (0, True, [0.0, 1.0]), (1, True, [2.0, 0.0])]
    told += [(0, False, [-1.0, 0.0]), (0, False, [-2.0, 0.0])]
    sketches = [dict(query=q, correct=c, advantage=1.0, gradient=torch.tensor(g)) for q, c, g in told]
    kernel = kernel_table(sketches)["kernel"]
    assert {pair: (values["K"], values["pairs"]) for pair, values in kernel.items()} == {
        "same query, ++": (0.0, 1), "same query, +-": (-0.75, 4), "same query, --": (2.0, 1),
        "different query, ++": (1.0, 2), "different query, +-": (-3.0, 2),
    }  # fmt: skip


def test_inner_products_are_summed_in_float64():
    x = torch.tensor([4096.0, 1.0, 1.0, 1.0])
    assert inner([x], [x]) == 2**24 + 3


def test_the_djs_of_a_kernel_are_with_and_without_each_querys_own_answers():
    told = ((0, True, 1.0, [1.0, 0.0]), (0, False, -1.0, [-1.0, 0.0]), (1, True, 0.0, [0.0, 1.0]))
    sketches = [dict(query=q, correct=c, advantage=a, gradient=torch.tensor(g)) for q, c, a, g in told]
    found = kernel_table(sketches)["kernel_dJ"]  # G is (2/3, 0), and grad J of the first query (1, 0)
    assert found == {"with own answers": pytest.approx(1 / 3), "without": 0.0}
