"""What an update computes, against the formula written out: the absolute value of every term, not only its equality
over ranks and micro-batches."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import behavior_injection as bridge
import luffy
import oreo
import redi
import relift
from common.data import batch_indices, pack
from common.trainer import ValueModel, load_policy, make_optimizer
from tests import oreo_ranks, ranks
from tests.conftest import NANO, assert_equal, f64, parsed
from tests.ranks import ONE_RANK, Bigram

# ------------------------------------------------------------------------------------------- luffy and relift


def long_rows():
    """1,200 tokens a row on average: the published code made 3 micro-batches of them. The first is the teacher's."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 5, (n,), generator=generator).tolist() for n in (1100, 1300, 900, 1500)]
    return [luffy.Row(i[:1], i[1:], 0, k == 0, advantage=0.3 - 0.2 * k) for k, i in enumerate(ids)]


def gradient_of(module, rows, **settings):
    policy = Bigram(torch.eye(5).tolist())
    args = dataclasses.replace(module.Args(), max_response_tokens=1500, **settings)
    module.accumulate_gradient(policy, rows, None, args, ONE_RANK)
    return policy.table.grad


@pytest.mark.parametrize("module", [luffy, relift])
def test_the_entropy_bonus_is_a_mean_over_tokens_times_the_published_micro_batches(module):
    rows = long_rows()
    if module is relift:
        for row in rows:
            row.teacher, row.logps = False, [-1.0] * len(row.response)
    bonus = gradient_of(module, rows, entropy_coef=0.5) - gradient_of(module, rows, entropy_coef=0.0)
    policy = Bigram(torch.eye(5).tolist())
    policy(pack([(r.prompt, r.response) for r in rows]), entropy=True)[1].mean().backward()
    assert luffy.published_micro_batches(1200) == 3
    torch.testing.assert_close(bonus, -0.5 * 3 * policy.table.grad)


@pytest.mark.parametrize(("group_size", "teacher_rows"), [(8, 1), (64, 1), (10**9, 1), (64, 2)])
def test_the_sft_term_of_rl_sft_is_weighed_by_the_published_micro_batches_that_hold_a_trace(group_size, teacher_rows):
    """Of 3, with 64 rows a GPU and 8 traces, 1, none or 2 among them: a mean over random places of the traces."""
    rows = long_rows()
    settings = dict(method="rl_sft", entropy_coef=0.0, group_size=group_size, teacher_rows=teacher_rows)
    term = [gradient_of(luffy, rows, sft_coef=c, **settings) for c in (0.0, 0.7)]
    policy = Bigram(torch.eye(5).tolist())
    policy(pack([(rows[0].prompt, rows[0].response)])).mean().backward()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(3, (20000, 64 * teacher_rows // group_size), generator=generator)
    held = sum((places == m).any(1).double().mean().item() for m in range(3))
    torch.testing.assert_close(term[1] - term[0], -0.7 * held * policy.table.grad, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 0.0])
def test_gamma_of_the_settings_shapes_the_update(gamma):
    [row] = long_rows()[:1]
    policy = Bigram(torch.eye(5).tolist())
    p = policy(pack([(row.prompt, row.response)])).exp()
    (-row.advantage * (p / (p + gamma) if gamma else p)).sum().mul(64 / 1500).backward()
    torch.testing.assert_close(gradient_of(luffy, [row], shaping_gamma=gamma, entropy_coef=0.0), policy.table.grad)


@pytest.mark.parametrize("module", [luffy, relift])
def test_demonstrations_are_learnt_at_temperature_one_whatever_the_sampling(module, policy):
    rows = [module.Row(r.prompt, r.response, r.group, True) for r in ranks.fixed_rows()]
    a, b = (module.accumulate_sft_gradient(policy, rows, module.Args(temperature=t), ONE_RANK) for t in (1.0, 0.5))
    assert a == b


def test_behavior_log_probs_are_at_the_sampling_temperature(policy):
    rows = [relift.Row(r.prompt, r.response, r.group) for r in ranks.fixed_rows()]
    args = relift.Args(temperature=0.5, micro_batch_tokens=10_000)
    [logp] = relift.policy_logps(policy, rows, args, ONE_RANK)
    [(batch, _)] = relift.micro_batches(rows, args, ONE_RANK)
    torch.testing.assert_close(logp, policy(batch, temperature=0.5).detach())


# ------------------------------------------------------------------------------------------------ redi, oreo


def test_flags_of_the_losses_reach_them():
    def of(**flags):
        return redi.pair_losses(f64([[-3.0, -8.0]]), f64([[2.0, 4.0]]), f64([[-2.0, -9.0]]), redi.Args(**flags))

    dpo = redi.dpo_loss(*f64([[-3.0], [-8.0], [-2.0], [-9.0]]), beta=0.5, label_smoothing=0.2)
    assert_equal(of(loss="dpo", beta=0.5, label_smoothing=0.2), dpo.tolist())
    assert_equal(of(chosen_coef=0.3, alpha=0.6), [0.6 * -2 + 0.3 * 1.5])


def oreo_update(kind, **changes):
    """(the policy's gradient of an update on the fixed rows of oreo_ranks, its units, the policy, the reference)"""
    stage, _, variant = kind.partition("-")
    words = ["--stage", stage, *(["--variant", variant] if variant else [])]
    policy, reference = (load_policy("nano", ONE_RANK, from_config=NANO, seed=seed) for seed in (3, 4))
    value = load_policy("nano", ONE_RANK, from_config=NANO, seed=5, kind=ValueModel)
    units, args = oreo_ranks.fixed_units(kind), parsed("oreo", *words, beta=0.3, **changes)
    oreo.accumulate_gradient(policy, value, reference.requires_grad_(False), units, args, ONE_RANK)
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad()
    return gradient, units, policy, reference


def gradient_of_loss(loss, policy):
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def action_sum(model, row, prompt=None):
    """Log-prob of a row's actions."""
    return (model(pack([(prompt or row.prompt, row.response)])) * torch.tensor(row.actions)).sum()


def test_a_rejection_update_is_the_mean_over_the_actions_alone():
    gradient, units, policy, _ = oreo_update("rejection", sft_rows_per_mean=0)
    rows = [row for unit in units for row in unit]
    loss = -sum(action_sum(policy, row) for row in rows) / sum(sum(row.actions) for row in rows)
    torch.testing.assert_close(gradient, gradient_of_loss(loss, policy), rtol=1e-4, atol=1e-6)


def test_a_dpo_update_raises_the_first_of_a_pair_which_is_the_right_one():
    gradient, units, policy, reference = oreo_update("dpo")

    def gain(row):
        return action_sum(policy, row) - action_sum(reference, row)

    loss = -sum(F.logsigmoid(0.3 * (gain(right) - gain(wrong))) for right, wrong in units) / len(units)
    torch.testing.assert_close(gradient, gradient_of_loss(loss, policy), rtol=1e-4, atol=1e-6)


def test_a_kto_update_raises_right_answers_over_the_kl_of_mismatched_prompts():
    gradient, units, policy, reference = oreo_update("kto")
    rows = [row for unit in units for row in unit]

    def gain(row, prompt=None):
        return action_sum(policy, row, prompt) - action_sum(reference, row, prompt)

    with torch.no_grad():
        z = (sum(gain(row, rows[i - 1].prompt) for i, row in enumerate(rows)) / len(rows)).clamp(min=0)
    margins = [(gain(row) - z) * (1 if row.reward else -1) for row in rows]
    loss = sum(1 - torch.sigmoid(0.3 * margin) for margin in margins) / len(rows)
    torch.testing.assert_close(gradient, gradient_of_loss(loss, policy), rtol=1e-4, atol=1e-6)


def test_the_kl_of_oreo_is_weighed_and_a_mean_over_actions_and_rows():
    with_kl, units, policy, reference = oreo_update("oreo-token", kl_coef=0.3)
    without = oreo_update("oreo-token", kl_coef=0.0)[0]
    loss = torch.zeros(())
    for [row] in units:
        kl = policy(pack([(row.prompt, row.response)]), reference=reference)[2]
        loss = loss + (kl * torch.tensor(row.actions)).sum() / sum(row.actions) / len(units)
    torch.testing.assert_close(with_kl - without, 0.3 * gradient_of_loss(loss, policy), rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------- what they stand on


def test_the_optimizer_has_the_betas_and_decay_that_were_asked_for(policy):
    [group] = make_optimizer(policy, lr=1e-3, betas=(0.7, 0.8), weight_decay=0.03).param_groups
    assert (group["betas"], group["weight_decay"], group["lr"], group["eps"]) == ((0.7, 0.8), 0.03, 1e-3, 1e-8)


# --------------------------------------------------------------------------- published means over rows


def sft_rows():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 5, (n,), generator=generator).tolist() for n in (4, 9, 30, 2, 17)]
    return [(i[:1], i[1:]) for i in ids]


def mean_of_row_means(policy, pairs, rows_per_mean):
    """The SFT loss written out: the mean over groups of rows of each group's token mean."""
    groups = [pairs[i : i + rows_per_mean] for i in range(0, len(pairs), rows_per_mean)]
    return sum(-policy(pack(group)).mean() for group in groups) / len(groups)


@pytest.mark.parametrize("micro_batch_tokens", [8, 1000])
@pytest.mark.parametrize("rows_per_mean", [1, 2, 0])
@pytest.mark.parametrize(("module", "name"), [(luffy, "sft"), (relift, "sft"), (oreo, "sft"), (oreo, "rejection")])
def test_sft_is_the_mean_of_token_means_of_so_many_rows(module, name, rows_per_mean, micro_batch_tokens):
    pairs, policy = sft_rows(), Bigram(torch.eye(5).tolist())
    mean_of_row_means(policy, pairs, rows_per_mean or 5).backward()
    expected, policy.table.grad = policy.table.grad, None
    what = {"stage" if module is oreo else "method": name}
    args = dataclasses.replace(
        module.Args(), **what, sft_rows_per_mean=rows_per_mean, micro_batch_tokens=micro_batch_tokens
    )
    if module is oreo:
        masks = [[True] * len(r) for _, r in pairs]
        units = [[oreo.Row(*pair, m, m, index=i)] for i, (pair, m) in enumerate(zip(pairs, masks, strict=True))]
        oreo.accumulate_gradient(policy, None, None, units, args, ONE_RANK)
    elif module is relift:
        args.sft_entropy_coef = 0.0
        rows = [relift.Row(*pair, i, True) for i, pair in enumerate(pairs)]
        relift.accumulate_sft_gradient(policy, rows, args, ONE_RANK)
    else:
        args.entropy_coef = 0.0
        rows = [luffy.Row(*pair, i, True) for i, pair in enumerate(pairs)]
        luffy.accumulate_sft_gradient(policy, rows, args, ONE_RANK)
    torch.testing.assert_close(policy.table.grad, expected)


@pytest.mark.parametrize("module", [luffy, relift])
def test_half_the_rows_on_a_gpu_are_half_the_loss_and_their_own_micro_batches(module):
    """loss_rows 32, as on two nodes: ceil(32 x 1200 / 32768) = 2 micro-batches for the entropy bonus, not 3."""
    rows = [module.Row(r.prompt, r.response, 0, logps=[-1.0] * len(r.response), advantage=r.advantage)
            for r in long_rows()]  # fmt: skip
    plain = [gradient_of(module, rows, entropy_coef=0.0, loss_rows=n) for n in (64, 32)]
    torch.testing.assert_close(plain[1], plain[0] / 2)
    bonus = [gradient_of(module, rows, entropy_coef=0.5, loss_rows=n) - plain[n == 32] for n in (64, 32)]
    torch.testing.assert_close(bonus[1], bonus[0] * 2 / 3)


def test_solved_questions_are_drawn_from_those_that_are_not_hardest():
    drawn = relift.questions_to_buffer("solved", [0, 3, 4], 9, seed="1 1")
    assert len(drawn) == len(set(drawn)) == 3 and set(drawn) <= {1, 2, 5, 6, 7, 8}
    assert sorted(relift.questions_to_buffer("solved", [0, 1, 2], 4, seed="")) == [3]
    assert {q for i in range(9) for q in relift.questions_to_buffer("random", [0, 1], 3, seed=f"{i}")} == {0, 1, 2}


# ------------------------------------------------------------------------------------------ settings in updates


@pytest.mark.parametrize("module", [luffy, relift])
def test_prompts_fill_the_published_micro_batches_too(module):
    """900 + 300 tokens a row make 3 micro-batches; answers alone would make one."""
    row = module.Row([0] * 900, [1, 2, 3] * 100, 0, logps=[-1.0] * 300)
    policy = Bigram(torch.eye(5).tolist())
    policy(pack([(row.prompt, row.response)]), entropy=True)[1].mean().backward()
    torch.testing.assert_close(gradient_of(module, [row], entropy_coef=0.5), -0.5 * 3 * policy.table.grad)


@pytest.mark.parametrize(("loss_rows", "n_micro"), [(64, 3), (32, 2)])
def test_the_entropy_bonus_of_luffys_sft_is_that_of_its_rl(loss_rows, n_micro):
    rows, gradients = long_rows(), []
    for coef in (0.5, 0.0):
        policy = Bigram(torch.eye(5).tolist())
        args = dataclasses.replace(luffy.Args(), method="sft", entropy_coef=coef, loss_rows=loss_rows)
        luffy.accumulate_sft_gradient(policy, rows, args, ONE_RANK)
        gradients.append(policy.table.grad)
    policy = Bigram(torch.eye(5).tolist())
    policy(pack([(r.prompt, r.response) for r in rows]), entropy=True)[1].mean().backward()
    torch.testing.assert_close(gradients[0] - gradients[1], -0.5 * n_micro * policy.table.grad)


@pytest.mark.parametrize("module", [luffy, relift, bridge])
def test_temperature_and_clip_of_the_settings_reach_the_update(module):
    row = module.Row([0], [1, 2, 3], 0, logps=[-1.0] * 3, advantage=1.0)
    args = dataclasses.replace(module.Args(), temperature=0.5, clip=0.2, entropy_coef=0.0)
    policy, more = Bigram(torch.eye(5).tolist()), [None] * (module is bridge)
    module.accumulate_gradient(policy, [row], None, *more, args, ONE_RANK)
    at_half = Bigram(torch.eye(5).tolist())
    at_half(pack([(row.prompt, row.response)]), temperature=0.5).sum().backward()
    scale = 1 / 3 if module is bridge else 64 / 8192
    torch.testing.assert_close(policy.table.grad, -scale * at_half.table.grad)
    [old] = module.policy_logps(policy, [row], args, ONE_RANK)
    policy.table.grad = None
    module.accumulate_gradient(policy, [row], [old - 1], *more, args, ONE_RANK)  # a ratio of e is clipped
    assert not policy.table.grad.any()


@pytest.mark.parametrize(("flag", "teacher"), [("shape", True), ("own_shape", False)])
def test_shapes_of_the_settings_reach_the_update_and_its_metrics(flag, teacher):
    row = luffy.Row([0], [1, 2, 3], 0, teacher, advantage=0.5)
    policy = Bigram(torch.eye(5).tolist())
    logp = policy(pack([(row.prompt, row.response)]))
    given = (logp, logp.detach(), torch.tensor(0.5), torch.full_like(logp, teacher).bool())
    (luffy.luffy_token_loss(*given, **{flag: "square_root"}).sum() * 64 / 1500).backward()
    found = gradient_of(luffy, [row], entropy_coef=0.0, **{flag: "square_root"})
    torch.testing.assert_close(found, policy.table.grad)
    if teacher:
        args = luffy.Args(shape="square_root")
        log = luffy.accumulate_gradient(Bigram(torch.eye(5).tolist()), [row], None, args, ONE_RANK)
        assert log["teacher/shaped_ratio"] == pytest.approx((logp / 2).exp().mean().item())


@pytest.mark.parametrize("module", [luffy, relift, bridge])
def test_the_mismatch_is_a_mean_over_own_tokens(module):
    policy, more = Bigram(torch.eye(5).tolist()), [None] * (module is bridge)
    own = module.Row([0], [1, 2], 0, advantage=0.5)
    own.logps = (policy(pack([(own.prompt, own.response)])) + 0.25).tolist()
    rows = [luffy.Row([0], [1, 2, 3, 4], 0, True, advantage=0.5)] * (module is luffy) + [own]
    log = module.accumulate_gradient(policy, rows, None, *more, module.Args(), ONE_RANK)
    assert (log["mismatch/mean_abs"], log["mismatch/kl"]) == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize("module", [luffy, relift])
def test_rows_without_an_advantage_count_in_the_scale_of_the_others(module):
    rows = [module.Row(r.prompt, r.response, 0, logps=[-1.0] * len(r.response), advantage=0.5 * k)
            for k, r in enumerate(long_rows())]  # fmt: skip
    policy = Bigram(torch.eye(5).tolist())
    loss = -sum(row.advantage * policy(pack([(row.prompt, row.response)])).sum() for row in rows)
    (loss * 64 / 4 / 1500).backward()
    torch.testing.assert_close(gradient_of(module, rows, entropy_coef=0.0), policy.table.grad)


@pytest.mark.parametrize("module", [luffy, relift])
def test_metrics_of_tokens_are_means_over_the_rows_that_have_a_gradient(module):
    rows = [module.Row([0], [1, 2], 0, logps=[-1.0] * 2, advantage=0.5),
            module.Row([0], [3, 4, 1], 0, logps=[-1.0] * 3)]  # fmt: skip
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).tolist()
    log = module.accumulate_gradient(Bigram(table), rows, None, module.Args(entropy_coef=0.0), ONE_RANK)
    expected = Bigram(table)(pack([([0], [1, 2])]), entropy=True)[1].mean().item()
    assert log["policy/entropy"] == pytest.approx(expected)


@pytest.mark.parametrize("module", [luffy, relift])
def test_metrics_of_demonstrations_are_means_over_their_tokens(module):
    """Over all micro-batches; the loss is a mean of the rows' means."""
    sequences = [([0], [1, 2]), ([0], [3, 4, 1, 2, 0])]
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).tolist()
    logp, entropy = Bigram(table)(pack(sequences), entropy=True)
    expected = {"loss": -(logp[:2].mean() + logp[2:].mean()) / 2, "entropy": entropy.mean(), "logp": logp.mean()}
    names = {"loss": "sft/loss", "entropy": "policy/entropy", "logp": "teacher/logp"}
    args = dataclasses.replace(module.Args(), micro_batch_tokens=5, sft_rows_per_mean=1)
    if module is relift:
        names, args.sft_entropy_coef = {name: f"sft/{name}" for name in expected}, 0.0
    rows = [module.Row(prompt, response, 0, True) for prompt, response in sequences]
    log = module.accumulate_sft_gradient(Bigram(table), rows, args, ONE_RANK)
    assert [log[names[name]] for name in expected] == pytest.approx([value.item() for value in expected.values()])
    assert module is luffy or log["sft/length"] == 3.5


def test_metrics_of_traces_are_means_over_their_tokens_at_the_settings_gamma():
    """Whether RL or SFT learns them; the SFT term of rl_sft is in no policy loss."""
    row, policy = luffy.Row([0], [1, 2, 3], 0, True, advantage=0.5), Bigram(torch.eye(5).tolist())
    p = policy(pack([(row.prompt, row.response)])).exp().detach()
    args = luffy.Args(shaping_gamma=0.4)
    for log in (luffy.accumulate_gradient(policy, [row], None, args, ONE_RANK),
                luffy.accumulate_sft_gradient(policy, [row], args, ONE_RANK)):  # fmt: skip
        found = log["teacher/logp"], log["teacher/shaped_ratio"]
        assert found == pytest.approx((p.log().mean().item(), (p / (p + 0.4)).mean().item()))
    args = dataclasses.replace(args, method="rl_sft")
    assert luffy.accumulate_gradient(policy, [row], None, args, ONE_RANK)["loss/pg"] == 0


@pytest.mark.parametrize("module", [luffy, relift])
def test_tis_weighs_by_the_policy_before_the_step(module):
    row, policy = module.Row([0], [1, 2, 3], 0, advantage=1.0), Bigram(torch.eye(5).tolist())
    old = module.policy_logps(policy, [row], module.Args(), ONE_RANK)[0] - 0.5
    row.logps = old.tolist()  # the sampler is right, and the policy has changed since
    args = [dataclasses.replace(module.Args(), tis_cap=cap) for cap in (0.0, 2.0)]
    plain, weighed = (module.accumulate_gradient(policy, [row], [old], a, ONE_RANK)["loss/pg"] for a in args)
    assert weighed == pytest.approx(plain)


def test_traces_of_rl_sft_are_learnt_whatever_their_advantage():
    rows = [luffy.Row([0], [3], 0), luffy.Row([0], [1, 2], 0, True)]
    assert luffy.rows_with_gradient(rows, luffy.Args(method="rl_sft", entropy_coef=0.0)) == rows[1:]


def test_states_of_a_step_update_are_the_starts_of_steps():
    gradient, units, policy, reference = oreo_update("oreo-step", kl_coef=0.0)
    losses = []
    for [row] in units:
        batch = pack([(row.prompt, row.response)])
        logp, ref_logp = policy(batch)[None], reference(batch).detach()[None]
        masks = [torch.tensor([mask]) for mask in (row.actions, row.steps)]
        given = (logp, ref_logp, torch.zeros_like(logp), *masks, torch.tensor([row.reward]))  # the head is zeros
        losses.append(oreo.oreo_row_losses(*given, beta=0.3, variant="step")[0])
    torch.testing.assert_close(gradient, gradient_of_loss(torch.cat(losses).mean(), policy), rtol=1e-3, atol=1e-5)


def test_a_kto_baseline_over_zero_reaches_the_loss(monkeypatch):
    monkeypatch.setattr(oreo, "kto_baseline", lambda *_: 2.0)  # that of the fixed rows is clamped to 0
    policy, reference = (load_policy("nano", ONE_RANK, from_config=NANO, seed=seed) for seed in (3, 4))
    units = oreo_ranks.fixed_units("kto")
    args = oreo.Args(stage="kto", beta=0.3)
    losses = oreo.accumulate_gradient(policy, None, reference.requires_grad_(False), units, args, ONE_RANK)
    rows = [row for unit in units for row in unit]
    gain, right = (torch.tensor([x(row) for row in rows]) for x in (lambda r: r.log_ratio, lambda r: r.reward > 0))
    assert losses["loss/policy"] == pytest.approx(oreo.kto_loss(gain, right, 2.0, beta=0.3).mean().item(), abs=1e-5)


def test_neighbouring_seeds_share_no_order_of_the_data():
    assert len({tuple(batch_indices(50, 50, epoch, seed)) for seed in range(5) for epoch in range(5)}) == 25
