"""common/data.py: packing, attention, balancing."""

import itertools
import random
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from common import data
from common.data import batch_indices, cost, first_line, pack, plan_micro_batches, unrelated_to_model
from common.trainer import load_policy
from tests.conftest import NANO


def test_batches_are_epochs_of_permutations():
    order = [i for step in range(4) for i in batch_indices(13, 3, step, seed=1)]
    assert len(set(order)) == 12
    assert order != [i for step in range(4, 8) for i in batch_indices(13, 3, step, seed=1)]
    assert batch_indices(13, 3, 2, seed=1) == batch_indices(13, 3, 2, seed=1)


@pytest.mark.parametrize(("error", "said"), [
    (ValueError("these differ:\n  a\n  b"), "these differ: a"), (ValueError("cut short:"), "cut short:"),
    (ValueError("first\nsecond"), "first"), (KeyError("swiglu"), "'swiglu' is not known"), (ValueError(), "ValueError"),
])  # fmt: skip
def test_an_error_is_said_in_one_line(error, said):
    assert first_line(error) == said


@pytest.mark.parametrize("error", [
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
    RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1"), torch.OutOfMemoryError("CUDA out of memory"),
])  # fmt: skip
def test_a_lost_rank_and_a_full_memory_are_not_blamed_on_the_model(error):
    assert unrelated_to_model(error) and not unrelated_to_model(RuntimeError("size mismatch"))


# --------------------------------------------------------------------------------------------------- packing


def random_sequences(rng, count, vocabulary=61, longest=20):
    def ids(n):
        return [rng.randrange(vocabulary) for _ in range(n)]

    return [(ids(rng.randint(1, longest)), ids(rng.randint(1, longest))) for _ in range(count)]


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch documents of the CUDA kernel of this name, for causal attention and windows of the past."""
    before, after = window_size
    assert cu_seq_q.dtype == torch.int32 and cu_seq_q[-1] == len(query) and before >= -1 and after == 0
    assert max_q == max_k == cu_seq_q.diff().max() and enable_gqa
    visible = torch.ones(max_q, max_q, dtype=torch.bool).tril()
    if before >= 0:
        visible = visible.triu(-before)  # at most `before` keys ahead of the query
    rows = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[start:end].transpose(0, 1) for x in (query, key, value)),
            visible[: end - start, : end - start], scale=scale, enable_gqa=enable_gqa,
        ).transpose(0, 1)
        for start, end in itertools.pairwise(cu_seq_q.tolist())
    ]  # fmt: skip
    return torch.cat(rows)


@pytest.mark.parametrize("lengths", ["ragged", "equal", "groups"])
@pytest.mark.parametrize("kernel", ["blocks", "ragged"])
@pytest.mark.parametrize("window", [None, 8])
def test_packed_log_probs_and_gradients_are_those_of_separate_sequences(world, lengths, kernel, window, monkeypatch):
    changes = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1} if window else {}
    policy = load_policy("nano", world, from_config=NANO | changes, seed=3)  # the first layer sees all
    if kernel == "ragged":  # CUDA's way, with a stand-in for its kernel
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        monkeypatch.setattr(data, "_block_attention", lambda *given, **_: data._ragged_attention(*given))
        monkeypatch.setitem(data.BLOCK, "cpu", 1.0)
    rng = random.Random(0)
    sequences = random_sequences(rng, 7)
    if lengths == "equal":
        sequences = [((p * 5)[:5], (r * 6)[:6]) for p, r in sequences]
    if lengths == "groups":  # answers to three questions, one of a single token, as they come and as they are sorted
        prompts = [sequences[0][0], sequences[1][0] * 2, sequences[1][0]]
        sequences = [(prompts[i % 3], r) for i, (_, r) in enumerate(sequences)] + [(prompts[0], [5])]
    logp = policy(pack(sequences))
    (logp * torch.arange(1, len(logp) + 1)).sum().backward()
    packed = {name: p.grad.clone() for name, p in policy.named_parameters()}

    plain = AutoModelForCausalLM.from_config(type(policy.lm.config)(**policy.lm.config.to_dict()))
    plain.load_state_dict(policy.lm.state_dict())
    start, expected = 0, []
    for prompt, response in sequences:
        logits = plain(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        each = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]
        (each * torch.arange(start + 1, start + 1 + len(each))).sum().backward()
        start += len(each)
        expected.append(each.detach())
    torch.testing.assert_close(logp.detach(), torch.cat(expected), rtol=0, atol=2e-6)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(packed["lm." + name], p.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("kv_heads,window", [(2, 1000), (4, 1000), (2, 50)])
def test_cudas_attention_over_rows_of_any_length_is_that_over_blocks(kv_heads, window, version, request):
    if version == 3:
        try:
            data.use_flash_attention_3()
        except data.InputError as error:
            pytest.skip(str(error))
        request.addfinalizer(torch.nn.attention.restore_flash_attention_impl)
    sequences = random_sequences(random.Random(0), 9, longest=300)
    packing = pack([*sequences, (sequences[0][0], [5, 6])], "cuda").packing
    pattern = data.Pattern(packing, sliding_window_causal_mask_function(window), window)
    torch.manual_seed(0)
    qkv = [
        torch.randn(len(packing.home), heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    ]
    upstream = torch.randn(len(packing.home), 4, 64, device="cuda", dtype=torch.bfloat16)
    found = []
    for attention in (data._ragged_attention, data._block_attention):
        out = data._FromGrid.apply(attention(*(data._ToGrid.apply(x, packing) for x in qkv), pattern, None), packing)
        found.append([out, *torch.autograd.grad(out, qkv, upstream)])
    for ragged, block in zip(*found, strict=True):
        torch.testing.assert_close(ragged, block, rtol=0.05, atol=0.05)


def test_flash_attention_3_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(data.InputError, match="needs a Hopper GPU"):
        data.use_flash_attention_3()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # not installed
    with pytest.raises(data.InputError, match="needs the package flash-attn-3"):
        data.use_flash_attention_3()


def test_an_empty_batch_predicts_nothing_and_still_has_a_gradient(policy):
    logp, entropy = policy(pack([]), entropy=True)
    assert logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in policy.parameters())


def test_the_mask_comes_from_lengths_when_pad_is_eos(policy):
    """Ids equal to pad and eos inside a sequence count like any other."""
    batch = pack([([1, 0, 1], [0, 1, 0, 1]), ([0], [1])])
    assert batch.targets.tolist() == [0, 1, 0, 1, 1]
    assert policy(batch).shape == (5,)


def test_a_prompt_is_read_once_by_all_its_answers():
    batch = pack([([7, 8, 9], [1, 2]), ([7], [3]), ([7, 8, 9], [4, 5, 6])])
    assert batch.input_ids.tolist() == [[7, 8, 9, 1, 7, 4, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 3, 4]]
    assert batch.predictors.tolist() == [2, 3, 4, 2, 5, 6]
    assert batch.targets.tolist() == [1, 2, 3, 4, 5, 6] and batch.sequence.tolist() == [0, 0, 1, 2, 2, 2]
    # rows 7 8 9 4 5 | 7 8 9 1 | 7: no row is much shorter than its block's longest, so no cell is padding
    assert batch.packing.blocks == [(1, 5), (1, 4), (1, 1)]
    assert batch.packing.cells.tolist() == [0, 1, 2, 5, 6, 0, 1, 2, 3, 4]
    assert batch.packing.copies.tolist() == [5, 6, 7]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 90)), min_size=1, max_size=40))
def test_little_of_the_attention_is_padding(sizes):
    packing = pack([(list(range(100, 100 + p)), [1] * r) for p, r in sizes]).packing
    lengths = [p + r - 1 for p, r in sizes]
    assert sum(rows for rows, _ in packing.blocks) == len(lengths)
    assert len(packing.cells) == len(packing.home) + len(packing.copies) + sum(
        rows * width for rows, width in packing.blocks
    ) - sum(lengths)
    assert sum(lengths) >= 0.94 * len(packing.cells)


@pytest.mark.parametrize("sequence", [([], [1]), ([1], [])])
def test_an_empty_prompt_or_response_is_refused(sequence):
    with pytest.raises(ValueError, match="at least one token"):
        pack([([1], [2]), sequence])


# ------------------------------------------------------------------------------------------------- balancing


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 5), st.integers(1, 120))
def test_plans_hold_every_sequence_once_within_the_budget(lengths, ranks, budget):
    plan = plan_micro_batches(lengths, ranks, budget)
    assert sorted(i for shares in plan for share in shares for i in share) == list(range(len(lengths)))
    for shares in plan:
        assert len(shares) == ranks and any(shares)
        assert all(len(share) == 1 or sum(lengths[i] for i in share) <= budget for share in shares if share)
    if lengths and ranks > 1:
        costs = [sum(cost(lengths[i]) for i in share) for shares in plan for share in shares]
        assert max(costs) - min(costs) <= max(map(cost, lengths)) + 1e-6


def test_ranks_hardly_wait_for_each_other():
    rng = random.Random(0)
    lengths = [min(8192, 300 + int(1500 * rng.lognormvariate(0, 0.7))) for _ in range(512)]
    plan = plan_micro_batches(lengths, 8, 32768)
    waiting = sum(max(sum(cost(lengths[i]) for i in share) for share in shares) for shares in plan)
    assert waiting < 1.01 * sum(map(cost, lengths)) / 8


def test_a_plan_of_a_whole_data_set_takes_seconds():
    rng = random.Random(0)  # the lengths of REDI's 53,175 pairs, about; its DPO asks the reference for all at once
    lengths = [min(19_000, int(rng.lognormvariate(8.3, 0.7))) for _ in range(2 * 53_175)]
    start = time.process_time()
    rounds = len(plan_micro_batches(lengths, 8, 40_960))
    assert rounds < 1.15 * sum(lengths) / 8 / 40_960 and time.process_time() - start < 60  # hours with a search per bin


def test_a_window_matters_from_the_first_row_that_is_longer():
    for size, causal in ((4, True), (5, False)):
        packing = pack([([3], [4] * size)]).packing
        assert data.Pattern(packing, None, 4).causal == causal


@pytest.mark.parametrize(("given", "message"), [(dict(sliding_window=3), "a window of 3 beside a mask for 4"),
                                                (dict(dropout=0.1), "dropout")])  # fmt: skip
def test_a_window_that_is_not_the_masks_and_dropout_are_refused(given, message):
    packing = pack([([3], [4] * 6)]).packing
    x = torch.zeros(1, 2, 6, 8)
    visible = sliding_window_causal_mask_function(4)
    out, _ = data.packed_attention(None, x, x, x, data.Pattern(packing, visible, 4), sliding_window=4)
    assert out.shape == (1, 6, 2, 8)
    with pytest.raises(NotImplementedError, match=message):
        data.packed_attention(None, x, x, x, data.Pattern(packing, visible, 4), **given)


def test_attention_that_is_written_out_is_torchs_where_the_cap_is_high():
    torch.manual_seed(0)
    pattern = data.Pattern(pack([([3], [4] * 6)]).packing, causal_mask_function, None)
    query, (key, value) = torch.randn(1, 4, 6, 8), torch.randn(2, 1, 2, 6, 8)
    expected, _ = data.packed_attention(None, query, key, value, pattern)
    written_out, _ = data.packed_attention(None, query, key, value, pattern, softcap=1e4)
    torch.testing.assert_close(written_out, expected, rtol=1e-3, atol=1e-4)
