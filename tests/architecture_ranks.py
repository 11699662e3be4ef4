"""Run by test_architectures.py on two ranks: python tests/architecture_ranks.py FOLDER ...; each FOLDER/model is
loaded, read, sampled from and exported to FOLDER/ranks; log-probs and samples go to FOLDER/ranks.pt."""

import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.data import pack  # noqa: E402
from common.rollout import EmbeddedSampler, Sampling  # noqa: E402
from common.trainer import export, init_world, launch, layers_of, load_policy  # noqa: E402
from tests.test_architectures import SEQUENCES, NoTokenizer, ids  # noqa: E402


def main(folders):
    world = init_world()
    for folder in map(Path, folders):
        policy = load_policy(str(folder / "model"), world)
        assert all(isinstance(p, DTensor) for p in policy.parameters())
        logp = policy(pack(SEQUENCES))
        layers = layers_of(policy.lm)  # each is gathered for its own forward alone
        assert len(layers) == 2 and all(isinstance(p, DTensor) for layer in layers for p in layer.parameters())
        logp.sum().backward()
        sampler = EmbeddedSampler(policy, stop_ids=[1])
        sampler.sync(policy, version=0)
        [[answer]] = sampler.generate([ids(12, 9)], n=1, keys=[0], seed=0, sampling=Sampling(16))
        export(policy, NoTokenizer(), folder / "ranks", world)
        if world.main:
            torch.save((logp.detach(), answer.ids, answer.logps), folder / "ranks.pt")


if __name__ == "__main__":
    launch(main, sys.argv[1:])
