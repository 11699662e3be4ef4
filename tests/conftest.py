"""Shared by the tests: a model of a few thousand parameters, and ways to run scripts as a user does."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client: tests never wait for a network
os.environ["OMP_NUM_THREADS"] = "1"  # models this small only wait for each other's threads

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels then run on the CPU

ROOT = Path(__file__).resolve().parent.parent
NANO = dict(
    model_type="qwen2", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    eos_token_id=1, pad_token_id=0,
)


@pytest.fixture(scope="session")
def world():
    from common.trainer import init_world

    return init_world()


@pytest.fixture
def policy(world):
    from common.trainer import load_policy

    return load_policy("nano", world, from_config=NANO, seed=3)


def run_script(*words, ranks: int = 1, check: bool = True, timeout: float = 300, **options):
    """Run a script of the repository as a user does; -> CompletedProcess with text output."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    result = subprocess.run(
        [*launcher, *map(str, words)], cwd=ROOT, timeout=timeout, capture_output=True, text=True,
        **options,
    )
    if check:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def weights_digest(policy) -> str:
    """SHA-256 over all weights: equal for bit-equal models."""
    from common.trainer import full_parameters

    digest = hashlib.sha256()
    for name, value in full_parameters(policy):
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
