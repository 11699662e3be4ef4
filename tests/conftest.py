"""Shared by the tests: a model of a few thousand parameters, and ways to run scripts as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # models this small only wait for each other's threads

NANO = dict(
    model_type="qwen2", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    eos_token_id=1, pad_token_id=0,
)


@pytest.fixture(scope="session")
def world():
    from common.trainer import init_world

    world = init_world()
    torch.set_num_threads(1)
    return world


@pytest.fixture
def policy(world):
    from common.trainer import load_policy

    return load_policy("nano", world, from_config=NANO, seed=3)


def run_script(*words, ranks: int = 1, check: bool = True, timeout: float = 300, **options):
    """Run a script of the repository as a user does; -> CompletedProcess with text output."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    result = subprocess.run(
        [*launcher, *map(str, words)], cwd=ROOT, env=environment, timeout=timeout, capture_output=True, text=True,
        **options,
    )
    if check:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result
