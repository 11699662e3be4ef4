"""vLLM beside the trainer on one GPU: weights by CUDA IPC, sleep and wake, what they cost and whether they arrive."""

import time

import pytest
import torch

from common import rollout
from common.data import pack
from common.rollout import Sampling, VLLMSampler
from common.trainer import load_policy
from tests.conftest import NANO

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(rollout.vllm_version(cuda=True) is None, reason="needs vLLM (requirements-gpu.txt)"),
]
SMALL = NANO | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
LARGE = dict(  # Qwen2.5-1.5B
    model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
    num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
    eos_token_id=1, pad_token_id=0,
)  # fmt: skip


def served(world, config):
    policy = load_policy("random", world, from_config=config, seed=3)
    return policy, VLLMSampler(policy, world, stop_ids=[1], max_tokens=256, gpu_memory=0.4)


def mismatch(policy, sampler, seed: int) -> torch.Tensor:
    """Reported minus own log-probs of 64 completions."""
    prompts = [[5 + i, 6, 7] for i in range(8)]
    groups = sampler.generate(prompts, n=8, keys=list(range(8)), seed=seed, sampling=Sampling(128))
    rows = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
    with torch.no_grad():
        logp = policy(pack([(p, c.ids) for p, c in rows], policy.lm.device)).cpu()
    return torch.tensor([x for _, c in rows for x in c.logps]) - logp


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_change_arrive_through_shared_memory(world, tied, monkeypatch):
    policy, sampler = served(world, SMALL | {"tie_word_embeddings": tied})
    try:
        for version in range(3):
            sampler.sync(policy, version)
            assert mismatch(policy, sampler, version).abs().mean() < 0.05
            sampler.sleep()
            with pytest.raises(RuntimeError, match="call sync"):
                mismatch(policy, sampler, version)
            policy.reshard()  # to the weights that are trained, from the copies that the last forward made
            with torch.no_grad():
                for p in policy.parameters():
                    p.add_(torch.randn_like(p) * 0.05)
    finally:
        sampler.close()


def test_a_1_5b_model_syncs_in_a_second_and_its_memory_comes_back_in_two(world):
    policy, sampler = served(world, LARGE)
    try:
        sampler.sync(policy, 0)
        for version in (1, 2):
            awake = torch.cuda.mem_get_info()[0]
            start = time.perf_counter()
            sampler.sleep()
            asleep, slept = torch.cuda.mem_get_info()[0], time.perf_counter() - start
            start = time.perf_counter()
            sampler.sync(policy, version)
            synced = time.perf_counter() - start
            print(f"sleep {slept:.2f} s, {(asleep - awake) / 2**30:.1f} GiB; wake and sync {synced:.2f} s")
        assert asleep - awake > 0.3 * torch.cuda.mem_get_info()[1]  # of the 0.4 that it was given
        assert slept < 2 and synced < 3  # sync: waking under 2, weights under 1
        gap = mismatch(policy, sampler, 0).double()
        assert gap.mean() < 0.01 and gap.abs().mean() < 0.1
    finally:
        sampler.close()
