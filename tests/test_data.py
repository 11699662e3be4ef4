"""common/data.py: rows, templates, traces, packing, balancing."""

import itertools
import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.masking_utils import sliding_window_causal_mask_function

import igsm
from common import data
from common.data import (
    InputError,
    batch_indices,
    gsm8k_row,
    load_rows,
    make_examples,
    pack,
    plan_micro_batches,
    trace_text,
)
from common.trainer import load_policy
from tests.conftest import NANO

TOKENIZER = igsm.tokenizer("symbolic")


def row(question="a=5\na?", trace="<think>\na=5\n</think>\n\\boxed{5}", gold="5", **extra):
    return {
        "data_source": "toy", "prompt": [{"role": "user", "content": question}],
        "target": [{"role": "assistant", "content": trace}], "reward_model": {"style": "rule", "ground_truth": gold},
    } | extra


def examples(rows, **options):
    options = {"source": "toy.jsonl", "max_prompt_tokens": 64, "max_response_tokens": 32} | options
    return make_examples(rows, TOKENIZER, **options)


# -------------------------------------------------------------------------------------------------- loading


def test_rows_load_from_parquet_json_jsonl_and_folders(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [row(gold=str(i)) for i in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.json", "c.parquet"):
        assert load_rows(str(tmp_path / name)) == rows
    assert load_rows(str(tmp_path)) == rows * 3
    assert load_rows(str(tmp_path), limit=7) == (rows * 3)[:7]


def test_a_json_line_may_hold_unicode_line_separators(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\n")
    assert load_rows(str(tmp_path / "a.jsonl")) == [{"text": "a\u2028b"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.jsonl", None, "no such file"),
        ("bad.jsonl", '{"a": 1}\n{"a": ', "line 2: not valid JSON"),
        ("bad.json", "[1, 2", "not valid JSON"),
        ("bad.parquet", "not parquet", "not a readable parquet"),
        ("empty.jsonl", "", "no rows"),
    ],
)
def test_unreadable_files_are_named_with_the_reason(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        load_rows(str(tmp_path / name))
    assert name in str(error.value)


def test_a_hub_name_may_carry_its_configuration(monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *given, **named: asked.append((given, named)) or [{"a": 1}])
    assert load_rows("openai/gsm8k:main", split="test") == load_rows("some/data") == [{"a": 1}]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"}), (("some/data", None), {"split": "train"})]


@pytest.mark.parametrize("answer", ["(1, 2)", "so\n####", "#### 5"])
def test_an_answer_that_is_not_gsm8ks_is_refused(answer):
    with pytest.raises(InputError, match="row 0: 'answer' is not GSM8K's"):
        examples([{"question": "Q?", "answer": answer}])


def test_where_no_trace_is_needed_an_answer_alone_will_do():
    rows = [{"question": "Q?", "answer": answer} for answer in ("(1, 2)", "#### 1,200")]
    found, _ = examples(rows, traces="ignored", max_prompt_tokens=400)
    assert [e.gold for e in found] == ["(1, 2)", "1200"]


def test_gsm8k_rows_become_luffys_schema():
    r = gsm8k_row({"question": "Q?", "answer": "Half of 2 is <<2/2=1>>1.\n#### 1,200"})
    assert r["reward_model"]["ground_truth"] == "1200"
    assert r["target"][0]["content"].endswith("</think>\n\n\\boxed{1200}")
    assert r["prompt"][0]["content"].startswith("Q?")


# -------------------------------------------------------------------------------------------------- examples


def test_the_trace_loses_its_think_tag_exactly_when_the_prompt_ends_with_it():
    assert trace_text("...<think>\n", "<think>\nabc") == "abc"
    assert trace_text("...<think>\n", "abc") == "abc"
    assert trace_text("...assistant\n", "<think>\nabc") == "<think>\nabc"


def test_a_trace_ends_with_eos_exactly_once():
    [plain], _ = examples([row()])
    [ended], _ = examples([row(trace="<think>\na=5\n</think>\n\\boxed{5}" + TOKENIZER.eos_token)])
    assert plain.trace == ended.trace
    assert plain.trace[-1] == TOKENIZER.eos_token_id and plain.trace.count(TOKENIZER.eos_token_id) == 1
    assert TOKENIZER.decode(plain.trace[:-1]) == "a=5\n</think>\n\\boxed{5}"
    assert plain.text.endswith("<think>\n") and TOKENIZER.decode(plain.prompt) == plain.text


def test_rows_that_are_too_long_are_counted_and_left_out():
    long_prompt, long_trace = row(question="a=1\n" * 40 + "a?"), row(trace="a=1\n" * 20)
    kept, count = examples([long_prompt, row(), long_trace])
    assert [e.index for e in kept] == [1]
    assert count == {"rows": 3, "prompt_too_long": 1, "trace_too_long": 1, "trace_empty": 0, "kept": 1}


def test_a_long_trace_can_be_cut_as_published_and_then_has_no_eos():
    [e], _ = examples([row(trace="a=1\n" * 20)], long_trace="cut")
    assert len(e.trace) == 32 and TOKENIZER.eos_token_id not in e.trace


def test_a_trace_that_fits_with_its_eos_is_kept_whole():
    trace = "1" * 31
    [e], count = examples([row(trace=trace)])
    assert len(e.trace) == 32 and count["trace_too_long"] == 0
    with pytest.raises(InputError):
        examples([row(trace="1" * 32)])


def test_an_empty_trace_is_an_error_unless_told_otherwise():
    rows = [row(), row(trace=" ")]
    with pytest.raises(InputError, match="row 1.*--empty_trace"):
        examples(rows)
    assert len(examples(rows, empty_trace="drop")[0]) == 1
    assert [e.trace is None for e in examples(rows, empty_trace="on_policy")[0]] == [False, True]
    assert len(examples(rows, traces="ignored")[0]) == 2


@pytest.mark.parametrize("column", ["prompt", "target", "reward_model"])
def test_a_missing_column_is_named_with_those_found(column):
    broken = row()
    del broken[column]
    with pytest.raises(InputError, match=f"row 1: column '{column}' is missing .*data_source"):
        examples([row(), broken])


@pytest.mark.parametrize(
    "broken", [{"prompt": "text"}, {"prompt": []}, {"prompt": [{"role": "user", "content": None}]},
               {"reward_model": None}, {"reward_model": {}}, {"target": [{"role": "assistant"}]}, {"target": 5}],
)  # fmt: skip
def test_a_malformed_row_is_named(broken):
    with pytest.raises(InputError, match="toy.jsonl, row 1"):
        examples([row(), row() | broken])


def test_nothing_left_is_an_error_that_says_why():
    with pytest.raises(InputError, match="no row is left of 2 .*2 prompts over --max_prompt_tokens 3"):
        examples([row(), row()], max_prompt_tokens=3)


def test_a_tokenizer_without_chat_template_needs_the_flag():
    bare = igsm.tokenizer("symbolic")
    bare.chat_template = None
    with pytest.raises(InputError, match="--chat_template"):
        make_examples([row()], bare, source="x", max_prompt_tokens=64, max_response_tokens=32)
    [e], _ = make_examples([row()], bare, source="x", max_prompt_tokens=64, max_response_tokens=32,
                           template="{{ messages[0].content }}\n")  # fmt: skip
    assert e.text == "a=5\na?"


def test_batches_are_epochs_of_permutations():
    order = [i for step in range(4) for i in batch_indices(13, 3, step, seed=1)]
    assert len(set(order)) == 12
    assert order != [i for step in range(4, 8) for i in batch_indices(13, 3, step, seed=1)]
    assert batch_indices(13, 3, 2, seed=1) == batch_indices(13, 3, 2, seed=1)


# --------------------------------------------------------------------------------------------------- packing


def random_sequences(rng, count, vocabulary=61, longest=20):
    def ids(n):
        return [rng.randrange(vocabulary) for _ in range(n)]

    return [(ids(rng.randint(1, longest)), ids(rng.randint(1, longest))) for _ in range(count)]


def test_pack_lays_tokens_out_as_its_docstring_shows():
    batch = pack([([10, 11], [20, 21, 22]), ([12], [23, 24])])
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 12, 23]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.predictors.tolist() == [1, 2, 3, 4, 5]
    assert batch.targets.tolist() == [20, 21, 22, 23, 24]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 1]


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
@pytest.mark.parametrize("kv_heads,window", [(2, 1000), (4, 1000), (2, 50)])
def test_cudas_attention_over_rows_of_any_length_is_that_over_blocks(kv_heads, window):
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
    assert batch.targets.tolist() == [1, 2, 3, 4, 5, 6]
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
        assert len(shares) == ranks
        assert all(len(share) == 1 or sum(lengths[i] for i in share) <= budget for share in shares if share)
    if lengths:
        loads = [sum(lengths[i] for shares in plan for i in shares[rank]) for rank in range(ranks)]
        assert max(loads) - min(loads) <= max(lengths)
