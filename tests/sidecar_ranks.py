"""Run by test_sidecar.py under torchrun: two ranks sample, each from its own vLLM; one of them sees a fault."""

import json
import sys

import torch

sys.path.insert(0, ".")
from common.data import pack  # noqa: E402
from common.rollout import Sampling  # noqa: E402
from common.trainer import gather_lists, init_world, launch, load_policy  # noqa: E402
from common.vllm import VLLMSampler, WorkerFault  # noqa: E402


def main(words: list[str]) -> None:
    config, out = json.loads(words[0]), words[1]
    world = init_world()
    torch.set_num_threads(1)
    policy = load_policy("nano", world, from_config=config, seed=3)
    sampler = VLLMSampler(policy, world, stop_ids=[1], max_tokens=100)
    sampler.worker.start = lambda: None  # a fault below leaves vLLM as it is
    results = []

    def once(name):
        """Rank 1's next call of this method is a fault, while the others go on, or are in a collective."""
        whole = getattr(sampler, name)

        def fault(*given):
            setattr(sampler, name, whole)
            raise WorkerFault(f"a fault of one rank, in {name}")

        if world.rank == 1:
            setattr(sampler, name, fault)

    for version in range(3):
        if version == 2:
            once("_buffer")  # in a sync: rank 0 gathers weights
            once("_draw")  # in its proof: rank 0 is in the forward
        sampler.sync(policy, version)
        if version == 1:
            once("_draw")  # in a batch: rank 0 has its answers, and waits
        prompts = [] if version == 2 and world.rank == 1 else [[5 + world.rank, 6, 7], [8, 9]]
        groups = sampler.generate(
            prompts, n=4, keys=list(range(len(prompts))), seed=version, sampling=Sampling(20)
        )
        rows = [(prompt, c.ids) for prompt, group in zip(prompts, groups, strict=True) for c in group]
        gap = policy(pack(rows)).detach() - torch.tensor([x for group in groups for c in group for x in c.logps])
        largest = gap.abs().max().item() if rows else 0.0
        results.append({"rows": len(rows), "gap": largest, "restarts": sampler.restarts})
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.02)
    results = gather_lists([results], world)
    if world.main:
        with open(out, "w") as file:
            json.dump(results, file)
    sampler.close()


if __name__ == "__main__":
    launch(main, sys.argv[1:])
