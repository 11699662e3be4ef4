"""Tokens per second of the embedded sampler and of vLLM, side by side in one run.

    python benchmarks/rollout.py                                              # into benchmarks/results/
    python benchmarks/rollout.py --models 0.7M 135M FOLDER --rows 128 --tokens 256 --rounds 5    # added to the file

Each model has one vLLM process that stays for all its measurements; rounds alternate between the two samplers
on the same prompts, so that what else the machine does falls on both. "equal": every completion has --tokens tokens;
"ragged": each token ends its completion with a probability of 4 / --tokens (so many ids of the vocabulary are stop
ids; with random weights all are about equally likely), which is what answers look like: most short, some long. Tokens
are those drawn; the time is that of generate(), from prompts to completions. Not in it, and reported: the seconds that
vLLM takes to start, to fall asleep (CUDA) and to sync (on CUDA that is waking, sending and proving), and how far
its log-probs are from the policy's on what it drew.

Models: a folder, or a Qwen2 with random weights of about that size: 0.7M, 10M, 50M, 135M, 500M, 1.5B.
"""

import argparse
import itertools
import json
import math
import os
import random
import statistics
import sys
import time
from operator import itemgetter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.scale import Shape  # noqa: E402
from common.data import pack  # noqa: E402
from common.rollout import EmbeddedSampler, Sampling  # noqa: E402
from common.trainer import init_world, load_policy  # noqa: E402
from common.vllm import VLLMSampler, vllm_version  # noqa: E402

SETTING = itemgetter("model", "rows", "tokens", "lengths")  # of a row of the results
SIZES = {
    "0.7M": Shape(4, 128, 256, 4, 128, 128), "10M": Shape(8, 256, 768, 8, 256, 8192),
    "50M": Shape(12, 512, 1536, 8, 512, 16384, tied=True), "135M": Shape(30, 576, 1728, 9, 576, 49152, tied=True),
    "500M": Shape(24, 896, 2688, 14, 896, 151936, tied=True),
    "1.5B": Shape(28, 1536, 4608, 24, 1536, 151936, tied=True),
}  # fmt: skip


def measure(sampler, prompts, group: int, tokens: int, seed: int) -> tuple[int, float]:
    """-> tokens drawn, seconds."""
    start = time.perf_counter()
    groups = sampler.generate(
        prompts, n=group, keys=list(range(len(prompts))), seed=seed, sampling=Sampling(tokens)
    )
    return sum(len(c.ids) for g in groups for c in g), time.perf_counter() - start


@torch.no_grad()
def mismatch(policy, sampler, prompts, tokens: int) -> dict[str, float]:
    """Reported log-probs against the policy's: mean absolute difference, estimate of KL(sampler || policy)."""
    groups = sampler.generate(prompts, n=1, keys=list(range(len(prompts))), seed=1, sampling=Sampling(tokens))
    gaps = []
    for prompt, [completion] in zip(prompts, groups, strict=True):
        logp = policy(pack([(prompt, completion.ids)], sampler.world.device)).cpu()
        gaps.append(torch.tensor(completion.logps) - logp)
    gap = torch.cat(gaps).double()
    return {"mismatch_mean_abs": gap.abs().mean().item(), "mismatch_kl": gap.mean().item()}


def compare(name: str, args, world) -> list[dict]:
    """All measurements of one model."""
    config = SIZES[name].config() if name in SIZES else None
    policy, rng, out = load_policy(name, world, from_config=config), random.Random(0), []
    vocabulary = policy.lm.get_input_embeddings().weight.shape[0]
    start = time.perf_counter()
    served = VLLMSampler(policy, world, stop_ids=[], max_tokens=args.prompt + max(args.tokens), gpu_memory=args.memory)
    started = time.perf_counter() - start
    served.sync(policy, 0)
    sleeps, syncs = [], []
    for version in range(1, 4):
        start = time.perf_counter()
        served.sleep()
        sleeps.append(time.perf_counter() - start)
        start = time.perf_counter()
        served.sync(policy, version)
        syncs.append(time.perf_counter() - start)
    for rows, tokens, lengths in itertools.product(args.rows, args.tokens, ("equal", "ragged")):
        stop_ids = rng.sample(range(vocabulary), math.ceil(4 * vocabulary / tokens)) if lengths == "ragged" else []
        embedded = EmbeddedSampler(policy, stop_ids=stop_ids, max_batch_tokens=args.batch_tokens)
        embedded.sync(policy, 0)
        served.stop_ids = stop_ids
        prompts = [[rng.randrange(vocabulary) for _ in range(args.prompt)] for _ in range(rows // args.group)]
        row = {"model": Path(name).name, "parameters": sum(p.numel() for p in policy.parameters()), "rows": rows,
               "tokens": tokens, "lengths": lengths}  # fmt: skip
        samplers, speeds = {"embedded": embedded, "vllm": served}, {"embedded": [], "vllm": []}
        for round_ in range(args.rounds + 1):
            for which, sampler in samplers.items():
                drawn, seconds = measure(sampler, prompts, args.group, tokens, seed=round_)
                if round_:  # the first one warms caches up
                    speeds[which].append(drawn / seconds)
                    row["mean_length"] = drawn / rows
        for which in samplers:
            row[f"{which}_tokens_per_second"] = statistics.median(speeds[which])
        row |= {"vllm_over_embedded": row["vllm_tokens_per_second"] / row["embedded_tokens_per_second"],
                "start_seconds": started, "sleep_seconds": statistics.median(sleeps),
                "sync_seconds": statistics.median(syncs)} | mismatch(policy, served, prompts[:8], tokens)  # fmt: skip
        out.append(row)
        print(table([row], header=len(out) == 1), flush=True)
    served.close()
    return out


def table(rows: list[dict], header: bool = True) -> str:
    """The settings measured, a line each, as Markdown."""
    names = ["model", "rows", "tokens", "lengths", "mean", "embedded, tokens/s", "vLLM, tokens/s", "ratio", "sync"]
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"] if header else []
    for r in rows:
        lines.append(
            f"| {r['model']} | {r['rows']} | {r['tokens']} | {r['lengths']} | {r['mean_length']:.0f} | "
            f"{r['embedded_tokens_per_second']:,.0f} | {r['vllm_tokens_per_second']:,.0f} | "
            f"{r['vllm_over_embedded']:.2f} | {r['sync_seconds']:.2f} s |"
        )
    return "\n".join(lines)


def main():
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["1.5B"] if cuda else ["0.7M", "10M", "50M", "135M"])
    parser.add_argument("--rows", nargs="+", type=int, default=[256] if cuda else [32, 128], help="completions at once")
    parser.add_argument("--group", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048] if cuda else [128], help="of a completion")
    parser.add_argument("--rounds", type=int, default=3, help="medians of so many")
    parser.add_argument("--batch_tokens", type=int, default=1 << 20 if cuda else 65536, help="the embedded sampler's")
    parser.add_argument("--memory", type=float, default=0.5, help="vLLM's fraction of a GPU")
    parser.add_argument("--note", default="", help="anything a reader of the results must know about this machine")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    world, rows = init_world(), []
    cpu = f"{len(os.sched_getaffinity(0))}-core {torch.backends.cpu.get_cpu_capability()} CPU"
    machine, vllm = torch.cuda.get_device_name() if cuda else cpu, vllm_version(cuda=cuda)
    for name in args.models:
        rows += compare(name, args, world)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"rollout-{machine.lower().replace(' ', '-') if cuda else 'cpu'}.json"
    about = dict(machine=machine, torch=torch.__version__, vllm=vllm, threads=torch.get_num_threads(),
                 group=args.group, prompt=args.prompt, rounds=args.rounds, batch_tokens=args.batch_tokens,
                 note=args.note)  # fmt: skip
    old = {SETTING(row): row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    rows = [*(old | {SETTING(row): row | about for row in rows}).values()]  # what the file has of others stays
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(f"\n{machine}, torch {torch.__version__}, vLLM {vllm}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
