"""redi.py's mathematics against the numbers of the published code (tests/vectors/redi.json, float64)."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import igsm
from common.data import InputError, pack
from redi import (
    Args,
    Pair,
    accumulate_gradient,
    check_pairs,
    collapsed_at,
    dpo_loss,
    make_pairs,
    redi_loss,
    simpo_loss,
    sum_by_trace,
)
from tests.conftest import NANO, assert_equal, f64, vectors
from tests.ranks import ONE_RANK

CASES = {case["id"]: case for case in vectors("redi")["cases"]}


# ---------------------------------------------------------------------------------------------- losses


def losses_and_gradients(case, loss):
    """loss(chosen sums, chosen lengths, rejected sums, rejected lengths) of the vectors' pairs against the published
    losses, their mean and its gradient for each token."""
    tokens = {side: [f64(row).requires_grad_() for row in case["inputs"]["token_logps"][side]]
              for side in ("chosen", "rejected")}  # fmt: skip
    sums = {side: torch.stack([row.sum() for row in rows]) for side, rows in tokens.items()}
    lengths = {side: f64([len(row) for row in rows]) for side, rows in tokens.items()}
    losses = loss(sums["chosen"], lengths["chosen"], sums["rejected"], lengths["rejected"])
    losses.mean().backward()
    assert_equal(losses.detach(), case["outputs"]["losses"])
    assert_equal(losses.mean().detach(), case["outputs"]["loss"])
    for side, rows in tokens.items():
        for row, expected in zip(rows, case["outputs"][f"grad_token_logps_{side}"], strict=True):
            assert_equal(torch.zeros_like(row) if row.grad is None else row.grad, expected)


@pytest.mark.parametrize("name", ["redi_a0.8", "redi_a0.0_sft_only"])
def test_redi_losses_and_gradients_are_the_published_ones(name):
    flags = CASES[name]["flags"]
    losses_and_gradients(CASES[name], lambda *sums: redi_loss(*sums, alpha=flags["rc"], chosen_coef=flags["cc"]))


def test_dpo_losses_and_gradients_are_the_published_ones():
    inputs = CASES["dpo_b0.1"]["inputs"]
    ref_chosen, ref_rejected = f64(inputs["ref_seq_logps_chosen"]), f64(inputs["ref_seq_logps_rejected"])
    losses_and_gradients(
        CASES["dpo_b0.1"],
        lambda chosen, _, rejected, __: dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1),
    )


def test_simpo_losses_and_gradients_are_the_published_ones():
    losses_and_gradients(CASES["simpo_b10_g5"], lambda *sums: simpo_loss(*sums, beta=10.0, gamma=5.0))


def test_a_trace_that_is_not_there_has_length_one_and_no_part_in_the_loss():
    case = CASES["redi_zero_length_clamp"]
    chosen, rejected = (f64(case["inputs"][f"seq_logps_{side}"]).requires_grad_() for side in ("chosen", "rejected"))
    lengths = [f64(case["inputs"][f"{side}_lengths"]) for side in ("chosen", "rejected")]
    losses = redi_loss(chosen, lengths[0], rejected, lengths[1], alpha=0.8)
    losses.mean().backward()
    assert_equal(losses.detach(), case["outputs"]["losses"])
    assert_equal(chosen.grad, case["outputs"]["grad_seq_chosen"])
    assert_equal(rejected.grad, case["outputs"]["grad_seq_rejected"])


def test_dpo_of_the_reference_itself_is_log_2_and_smoothing_mixes_both_directions():
    a, b = f64([-3.0, -2.0]), f64([-5.0, -1.0])
    assert_equal(dpo_loss(a, b, a, b, beta=0.1), [math.log(2)] * 2)
    forth, back = dpo_loss(a, b, b, a, beta=0.1), dpo_loss(b, a, a, b, beta=0.1)
    smoothed = dpo_loss(a, b, b, a, beta=0.1, label_smoothing=0.2)
    assert_equal(smoothed, (0.8 * forth + 0.2 * back).tolist())


def test_symmetric_redi_is_the_slope_of_simpo_at_beta_zero():
    """Appendix B: d simpo / d beta at 0 is the sigmoid of gamma times the symmetric loss."""
    sums = f64([-3.0]), f64([2.0]), f64([-8.0]), f64([4.0])
    beta = f64(0.0).requires_grad_()
    simpo_loss(*sums, beta=beta, gamma=1.5).sum().backward()
    assert beta.grad.item() == pytest.approx(redi_loss(*sums, alpha=1.0).item() / (1 + math.exp(-1.5)), abs=1e-12)


def test_the_alarm_gives_the_step_at_which_the_mean_fell_by_more_than_the_margin():
    assert collapsed_at([-0.5] * 20, 0.1) is None
    assert collapsed_at([-0.5] * 5 + [-1.0] * 5, margin=0.25, window=4) == 8
    assert collapsed_at([-0.5, -9.0, -0.5, -0.5, -0.5], margin=2, window=5) is None  # one bad batch is no collapse
    assert collapsed_at([-0.5, -9.0], margin=0.5) is None  # too early to tell


# ----------------------------------------------------------------------------- one update, against the published


class Table(torch.nn.Module):
    """The vectors' policy: logits of the next token = table[token] + 0.1 * position * posrow."""

    def __init__(self, inputs):
        super().__init__()
        self.table = torch.nn.Parameter(f64(inputs["table"]))
        self.posrow = f64(inputs["posrow"])

    def logps(self, ids, positions):
        logits = self.table[ids] + 0.1 * positions.double()[:, None] * self.posrow
        return logits.log_softmax(-1)

    def forward(self, batch, *, entropy=False):
        at = batch.predictors
        logp = self.logps(batch.input_ids[0, at], batch.position_ids[0, at])
        chosen = logp.gather(1, batch.targets[:, None])[:, 0]
        return (chosen, -(logp.exp() * logp).sum(-1)) if entropy else chosen


def pipeline_pairs(case) -> list[Pair]:
    rows = case["inputs"]["rows"]
    return [
        Pair(row["prompt_input_ids"], row["chosen_input_ids"], row["rejected_input_ids"], index=i)
        for i, row in enumerate(rows)
    ]


def table_gradient(pairs, args, tokens=1000):
    policy = Table(CASES["pipeline_padfree1_maxlenNone_keep_end"]["inputs"])
    accumulate_gradient(policy, pairs, dataclasses.replace(args, micro_batch_tokens=tokens), ONE_RANK)
    return policy.table.grad


@pytest.mark.parametrize("tokens", [8, 20, 1000])
def test_an_update_is_the_published_one_whatever_the_micro_batches(tokens):
    case = CASES["pipeline_padfree1_maxlenNone_keep_end"]
    pairs = pipeline_pairs(case)
    assert_equal(table_gradient(pairs, Args(), tokens), case["outputs"]["grad_table"])
    assert sum(p.loss for p in pairs) / 2 == pytest.approx(case["outputs"]["loss"], abs=1e-9)
    for side, name in enumerate(("chosen", "rejected")):
        sums = [p.logp[side] * len((p.chosen, p.rejected)[side]) for p in pairs]
        assert sums == pytest.approx(case["outputs"][f"{name}_logps"], abs=1e-9)


def test_a_cut_trace_divided_by_its_whole_length_is_what_the_published_code_made_of_keep_start():
    """Not what this file does (it rejects such pairs), but the same loss function shows where the number comes from."""
    case = CASES["pipeline_padfree1_maxlen7_keep_start"]
    policy, limit = Table(case["inputs"]), case["flags"]["max_length"]
    sums, lengths = {}, {}
    for side in ("chosen", "rejected"):
        sums[side], lengths[side] = [], []
        for row in case["inputs"]["rows"]:
            prompt, response = row["prompt_input_ids"], row[f"{side}_input_ids"]
            ids = torch.tensor((prompt + response)[:limit])
            logp = policy.logps(ids[:-1], torch.arange(len(ids) - 1)).gather(1, ids[1:, None])[:, 0]
            sums[side].append(logp[len(prompt) - 1 :].sum())
            lengths[side].append(len(response))
    loss = redi_loss(torch.stack(sums["chosen"]), f64(lengths["chosen"]), torch.stack(sums["rejected"]),
                     f64(lengths["rejected"]), alpha=0.8).mean()  # fmt: skip
    loss.backward()
    assert_equal(loss.detach(), case["outputs"]["loss"])
    assert_equal(policy.table.grad, case["outputs"]["grad_table"])


def test_pairs_and_the_same_traces_as_single_rows_give_one_gradient():
    pairs = pipeline_pairs(CASES["pipeline_padfree1_maxlenNone_keep_end"])
    single = [Pair(p.prompt, p.chosen, [], index=2 * i) for i, p in enumerate(pairs)]
    single += [Pair(p.prompt, [], p.rejected, index=2 * i + 1) for i, p in enumerate(pairs)]
    for tokens in (8, 1000):
        torch.testing.assert_close(table_gradient(single, Args(), tokens), table_gradient(pairs, Args()))


def test_a_weight_multiplies_a_rows_gradient():
    pairs = pipeline_pairs(CASES["pipeline_padfree1_maxlenNone_keep_end"])
    whole = table_gradient(pairs, Args())
    pairs[0].weight, pairs[1].weight = 3.0, 0.0
    first = table_gradient(pairs, Args())
    pairs[0].weight, pairs[1].weight = 0.0, 3.0
    torch.testing.assert_close((first + table_gradient(pairs, Args())) / 3, whole)


def test_symmetric_is_alpha_one():
    pairs = pipeline_pairs(CASES["pipeline_padfree1_maxlenNone_keep_end"])
    torch.testing.assert_close(table_gradient(pairs, Args(loss="symmetric")), table_gradient(pairs, Args(alpha=1.0)))


def test_a_reference_that_was_not_computed_is_no_number(policy):
    pairs = [Pair([2, 3], [4, 1], [5, 1])]
    assert math.isnan(accumulate_gradient(policy, pairs, Args(loss="dpo"), ONE_RANK)["loss/mean"])
    assert math.isfinite(accumulate_gradient(policy, pairs, Args(), ONE_RANK)["loss/mean"])


@pytest.mark.parametrize("loss", ["redi", "dpo", "simpo"])
def test_packed_pairs_give_the_gradient_of_padded_ones(policy, loss):
    """Against right-padded rows, an attention mask and a log-softmax over whole logits."""
    generator = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(2, 61, (n,), generator=generator).tolist()

    pairs = [Pair(ids(3 + i), ids(4 + 3 * i), ids(9 - 2 * i), index=i, reference=(-9.0, -8.0)) for i in range(4)]
    args = Args(loss=loss, beta=0.5, gamma=1.0)
    accumulate_gradient(policy, pairs, args, ONE_RANK)

    plain = AutoModelForCausalLM.from_config(Qwen2Config(**{k: v for k, v in NANO.items() if k != "model_type"}))
    plain.load_state_dict(policy.lm.state_dict())
    rows = [(p.prompt, trace) for p in pairs for trace in (p.chosen, p.rejected)]
    width = max(len(prompt) + len(trace) for prompt, trace in rows)
    padded = torch.zeros(len(rows), width, dtype=torch.long)
    mask, counted = torch.zeros_like(padded), torch.zeros(len(rows), width - 1)
    for i, (prompt, trace) in enumerate(rows):
        padded[i, : len(prompt) + len(trace)] = torch.tensor(prompt + trace)
        mask[i, : len(prompt) + len(trace)] = 1
        counted[i, len(prompt) - 1 : len(prompt) + len(trace) - 1] = 1
    logp = plain(input_ids=padded, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    sums = (logp.gather(2, padded[:, 1:, None])[..., 0] * counted).sum(1).view(-1, 2)
    chosen, rejected = sums.unbind(1)
    chosen_len, rejected_len = counted.sum(1).view(-1, 2).unbind(1)
    if loss == "redi":
        losses = redi_loss(chosen, chosen_len, rejected, rejected_len)
    elif loss == "dpo":
        losses = dpo_loss(chosen, rejected, torch.full_like(chosen, -9.0), torch.full_like(chosen, -8.0), beta=0.5)
    else:
        losses = simpo_loss(chosen, chosen_len, rejected, rejected_len, beta=0.5, gamma=1.0)
    losses.mean().backward()
    for (name, p), q in zip(policy.lm.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert [p.loss for p in pairs] == pytest.approx(losses.tolist(), rel=1e-5)


# ------------------------------------------------------------------------------------------- rows and pairs


@pytest.fixture(scope="module")
def tokenizer():
    return igsm.tokenizer("symbolic", modulus=23)


def args_of(**changes) -> Args:
    return Args(max_prompt_tokens=20, max_response_tokens=12, **changes)


def pair_row(chosen="a=5", rejected="a=6", prompt="a=5\na?", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def test_eos_ends_every_trace_once_whether_or_not_the_text_has_it(tokenizer):
    rows = [pair_row(), pair_row(f"a=5{tokenizer.eos_token}", f"a=6{tokenizer.eos_token}")]
    (bare, with_eos), _ = make_pairs(rows, tokenizer, args_of(), source="rows")
    assert list(bare.chosen) == list(with_eos.chosen) == [*tokenizer("a=5")["input_ids"], tokenizer.eos_token_id]
    assert bare.rejected == with_eos.rejected
    [sft], _ = make_pairs(rows[:1], tokenizer, args_of(stage="sft"), source="rows")
    assert sft.chosen == bare.chosen and not sft.rejected


def test_over_long_rows_are_rejected_and_counted_and_nothing_is_cut(tokenizer):
    """The published code cut columns off every row, prompts included (the vectors' keep_end cases)."""
    long = "a=1+1+1+1+1+1"
    rows = [pair_row(), pair_row(chosen=long), pair_row(rejected=long), pair_row(prompt="a=5\n" * 9)]
    pairs, count = make_pairs(rows, tokenizer, args_of(), source="rows")
    assert [p.index for p in pairs] == [0]
    assert tokenizer.decode(list(pairs[0].prompt)) == "<|user|>a=5\na?<|assistant|><think>\n"
    assert (count["rows"], count["trace_too_long"], count["prompt_too_long"], count["kept"]) == (4, 2, 1, 1)
    exact = args_of(stage="redi")
    exact.max_response_tokens = len(tokenizer(long)["input_ids"]) + 1  # eos counts
    assert make_pairs(rows, tokenizer, exact, source="rows")[1]["trace_too_long"] == 0
    exact.max_response_tokens -= 1
    assert make_pairs(rows, tokenizer, exact, source="rows")[1]["trace_too_long"] == 2


def test_sft_takes_the_right_traces_and_counts_rows_that_have_a_wrong_one_alone(tokenizer):
    """Which shapes of rows hold them is in test_rows.py."""
    one = {"prompt": "a=5\na?", "response": "a=5", "label": 1}
    rows = [pair_row(), one, one | {"response": "a=6", "label": False, "weight": 0.5}]
    pairs, _ = make_pairs(rows, tokenizer, args_of(), source="rows")
    right, wrong, none = pairs[0].chosen, pairs[0].rejected, type(pairs[0].chosen)("i")
    found = [(p.chosen, p.rejected, p.weight) for p in pairs]
    assert found == [(right, wrong, 1), (right, none, 1), (none, wrong, 0.5)]
    sft, count = make_pairs(rows, tokenizer, args_of(stage="sft"), source="rows")
    assert [(p.chosen, p.rejected) for p in sft] == [(right, none)] * 2 and count["wrong_only"] == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([pair_row(rejected="a=5")], "row 0: the correct and the incorrect trace are equal; .*--bad_rows drop"),
        ([pair_row(), pair_row(chosen=" ")], "row 1: a trace is missing or empty"),
        ([pair_row(chosen="<think>\n")], "row 0: a trace is missing or empty"),
        ([pair_row(chosen="a=1+1+1+1+1+1")], "no row is left: 0 of 1 rows .*1 traces over"),
        ([{"prompt": "p", "response": "a", "label": 2}], "row 0: 'label' must be 1 .right. or 0 .wrong., not 2"),
        ([{"prompt": "p", "response": "a", "label": "1"}], "'label' must be .* not '1'"),
        ([{"prompt": "p", "label": 1}], "column 'response' is missing .found: prompt, label"),
        ([{"prompt": "p", "chosen": None, "rejected": None}], "row 0: a trace is missing or empty"),
        ([{"chosen": "a", "rejected": "b"}], "column 'prompt' is missing"),
        ([pair_row(weight=-1)], "'weight' must be a number from 0 on, not -1"),
        ([pair_row(chosen=3)], "row 0: 'chosen' .*is not text"),
        ([["not", "a", "row"]], "expected an object"),
        ([pair_row(rejected_ids=[3, 4, 1])], "row 0: the ids of a trace are not those of its text"),
    ],
)
def test_rows_that_cannot_be_trained_are_named(tokenizer, rows, message):
    with pytest.raises(InputError, match=message):
        make_pairs(rows, tokenizer, args_of(), source="rows.jsonl")


def test_sft_takes_a_row_without_any_trace_for_a_mistake_and_not_for_a_wrong_answer(tokenizer):
    nothing, wrong = {"prompt": "a=5\na?", "chosen": None, "rejected": None}, {"prompt": "a=5\na?", "response": "a=6"}
    with pytest.raises(InputError, match="row 1: a trace is missing or empty"):
        make_pairs([wrong | {"label": 0}, nothing], tokenizer, args_of(stage="sft"), source="rows.jsonl")


def test_bad_rows_drop_leaves_them_out_and_counts_them(tokenizer):
    rows = [pair_row(), pair_row(rejected="a=5"), pair_row(chosen="")]
    pairs, count = make_pairs(rows, tokenizer, args_of(bad_rows="drop"), source="rows")
    assert [p.index for p in pairs] == [0] and (count["traces_equal"], count["trace_empty"]) == (1, 1)


def test_sft_is_the_mean_negative_log_likelihood_of_right_tokens():
    case = CASES["pipeline_padfree1_maxlenNone_keep_end"]
    pairs, policy = pipeline_pairs(case), Table(case["inputs"])
    for p in pairs:
        p.rejected = []
    (-policy(pack([(p.prompt, p.chosen) for p in pairs])).mean()).backward()
    torch.testing.assert_close(table_gradient(pairs, Args(stage="sft")), policy.table.grad)


def test_the_alarm_compares_with_step_1_alone():
    assert collapsed_at([-2.0, -0.5, -0.5, -1.2, -1.2], margin=0.5, window=2) is None


def test_log_probs_of_a_trace_are_summed_in_float64():
    pair = Pair([0], [1, 2, 3], [4])
    found = sum_by_trace(torch.tensor([2.0**24, 1.0, 1.0, 5.0]), pack(pair.sequences), [pair])
    assert found.tolist() == [[2.0**24 + 2, 5.0]]


def test_a_prompt_of_the_limits_length_is_kept(tokenizer):
    length = len(make_pairs([pair_row()], tokenizer, args_of(), source="rows")[0][0].prompt)
    kept = [len(make_pairs([pair_row(), pair_row(prompt="a=5\na=5\na?")], tokenizer,
                           Args(max_prompt_tokens=n, max_response_tokens=12), source="rows")[0])
            for n in (length, length + 8)]  # fmt: skip
    assert kept == [1, 2]


@pytest.mark.parametrize("loss", ["dpo", "simpo", "one of your own"])
def test_a_loss_that_compares_two_traces_refuses_rows_of_one(loss, tokenizer):
    rows = [pair_row(), {"prompt": "a=5\na?", "response": "a=5", "label": 1}]
    pairs, _ = make_pairs(rows, tokenizer, args_of(), source="rows")
    with pytest.raises(InputError, match=f"1 rows have one trace, and --loss {loss} compares two"):
        check_pairs(pairs, args_of(loss=loss))
