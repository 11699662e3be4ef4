"""vLLM beside the trainer on one GPU: weights by CUDA IPC, sleep and wake, faults, and what they cost.

    python -m pytest tests/test_sidecar_cuda.py -m cuda -s -p no:cacheprovider"""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from common import vllm
from common.data import pack
from common.rollout import Sampling
from common.trainer import load_policy
from common.vllm import VLLMSampler
from tests.conftest import NANO, ROOT, gone, processes
from tests.test_rollout import ids

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(vllm.vllm_version(cuda=True) is None, reason="needs vLLM (requirements-gpu.txt)"),
]
SMALL = NANO | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
LARGE = dict(  # Qwen2.5-1.5B
    model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
    num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
    eos_token_id=1, pad_token_id=0,
)  # fmt: skip
GIB = 2**30


def free() -> float:
    return torch.cuda.mem_get_info()[0] / GIB


def served(world, config, **settings):
    policy = load_policy("random", world, from_config=config, seed=3)
    start = time.perf_counter()
    sampler = VLLMSampler(policy, world, stop_ids=[1], max_tokens=256, gpu_memory=0.4, **settings)
    print(f"\nstart {time.perf_counter() - start:.1f} s")
    return policy, sampler


@pytest.fixture(scope="module")
def tied(world):
    policy, sampler = served(world, SMALL | {"tie_word_embeddings": True, "vocab_size": 32768})
    yield policy, sampler
    print(sampler.worker.last_words())
    sampler.close()


def draw(sampler, seed: int, rows: int = 8, tokens: int = 128):
    prompts = [[5 + i, 6, 7] for i in range(8)]
    how = dict(n=rows, keys=list(range(8)), seed=seed, sampling=Sampling(tokens))
    return prompts, sampler.generate(prompts, **how)


def mismatch(policy, sampler, seed: int, temperature=1.0) -> torch.Tensor:
    """Reported minus own log-probs of 64 completions."""
    prompts, groups = draw(sampler, seed)
    rows = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
    with torch.no_grad():
        logp = policy(pack([(p, c.ids) for p, c in rows], policy.lm.device)).cpu()
    policy.reshard()  # to the weights that are trained, from the copies that the forward made
    return torch.tensor([x for _, c in rows for x in c.logps]) - logp


def test_each_sync_brings_the_new_weights_and_sleep_takes_them(tied):
    policy, sampler = tied
    answers = []
    for version in range(3):
        start = time.perf_counter()
        sampler.sync(policy, version)
        synced = time.perf_counter() - start
        gap = mismatch(policy, sampler, 0).abs().mean()
        answers.append(ids(draw(sampler, 0)[1]))
        print(f"sync {version}: {synced:.2f} s, mismatch {gap:.5f}")
        assert gap < 0.05
        awake = free()
        sampler.sleep()
        print(f"asleep: {free() - awake:+.1f} GiB free")
        assert free() - awake > 0.3 * torch.cuda.mem_get_info()[1] / GIB  # of the 0.4 that it was given
        with pytest.raises(RuntimeError, match="call sync"):
            draw(sampler, 0)
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(torch.randn_like(p) * 0.05)
    assert answers[0] != answers[1] != answers[2]


def test_killed_or_stopped_in_the_middle_of_a_batch_it_gives_the_same_answers(tied):
    policy, sampler = tied
    sampler.sync(policy, 10)
    how = dict(seed=5, rows=64, tokens=250)
    before = ids(draw(sampler, **how)[1])
    sampler.worker.patience = 10
    for number in (signal.SIGKILL, signal.SIGSTOP):
        restarts, group = sampler.restarts, sampler.worker.process.pid
        [worker] = [pid for pid, other, _ in processes() if other == group and pid != group][:1]
        thread = threading.Timer(0.3, os.kill, (worker, number))
        thread.start()
        start = time.perf_counter()
        after = ids(draw(sampler, **how)[1])
        print(f"{number.name}: {sampler.restarts - restarts} restart, {time.perf_counter() - start:.1f} s")
        assert sampler.restarts == restarts + 1 and gone(group, 5)
        # other rows of a batch round differently in bf16: most answers are equal, token by token
        same = sum(a == b for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
        print(f"{same} of 512 answers are the same")
        assert same > 400
    sampler.worker.patience = 120


def test_the_head_in_float32_is_nearer_to_the_trainers(world, tied):
    policy, sampler = tied
    sampler.sync(policy, 20)
    gaps = {"float32": mismatch(policy, sampler, 0).abs().mean().item()}
    sampler.sleep()
    rounded = VLLMSampler(policy, world, stop_ids=[1], max_tokens=256, gpu_memory=0.4, enforce_eager=True,
                          hf_overrides={"head_dtype": "model"})  # fmt: skip
    try:
        rounded.sync(policy, 0)
        gaps["bfloat16"] = mismatch(policy, rounded, 0).abs().mean().item()
    finally:
        rounded.close()
    print(f"mismatch by head: {gaps}")
    assert gaps["float32"] < gaps["bfloat16"]


def test_it_is_gone_after_its_trainers_death():
    code = """if True:
        import sys, time
        from common.trainer import init_world
        from tests.test_sidecar_cuda import SMALL, draw, served
        policy, sampler = served(init_world(), SMALL, enforce_eager=True)
        sampler.sync(policy, 0)
        print("group", sampler.worker.process.pid, flush=True)
        while True:
            draw(sampler, 0, rows=64, tokens=250)
    """
    before = free()
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    group = next(int(line.split()[1]) for line in trainer.stdout if line.startswith("group"))
    time.sleep(1)
    trainer.kill()
    trainer.wait()
    start = time.perf_counter()
    assert gone(group, 5)
    print(f"gone {time.perf_counter() - start:.1f} s after its trainer")
    deadline = time.time() + 10
    while free() < before - 1 and time.time() < deadline:
        time.sleep(0.1)
    assert free() > before - 1


def test_a_1_5b_model_syncs_in_seconds_and_its_memory_comes_back(world):
    policy, sampler = served(world, LARGE, enforce_eager=True)
    try:
        sampler.sync(policy, 0)
        for version in (1, 2):
            awake, start = free(), time.perf_counter()
            sampler.sleep()
            asleep, slept = free(), time.perf_counter() - start
            start = time.perf_counter()
            sampler.sync(policy, version)
            synced = time.perf_counter() - start
            print(f"sleep {slept:.2f} s, {asleep - awake:.1f} GiB; wake and sync {synced:.2f} s")
        gap = mismatch(policy, sampler, 0).double()
        print(f"mismatch {gap.abs().mean():.5f}, KL {gap.mean():.5f}, max {gap.abs().max():.4f}")
        assert slept < 2 and synced < 5
        assert gap.mean().abs() < 0.01 and gap.abs().mean() < 0.05
    finally:
        print(sampler.worker.last_words())
        sampler.close()
