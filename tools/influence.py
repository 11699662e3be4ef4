"""The per-step influence dJ of each query on an SFT model of behavior_injection.py, and the co-influence K of answers.

    python -m tools.influence --preset tiny --arms vanilla bridge            after the stages base and sft
    torchrun --nproc_per_node 2 -m tools.influence --out OUT --arms bridge   any run folder

For every arm it writes OUT/ARM/influence/ (influence.json, influence.png, queries.jsonl), then OUT/influence.png, and
prints the table of all arms. OUT/data/influence.jsonl may hold your own queries; else it is made. The equations
are in behavior_injection.py, the details on its docs page. In short:

- The model answers queries; each answer gets its advantage. G is the exact gradient on answers to other queries.
- A score <G, grad log pi(o | q)> is the central difference of the answer's log-prob along G: two forward passes.
- Each query's own gradient gives its norm, for a cosine, and dJ once more as an inner product.
- K is measured between the answers to a few queries, whose gradients are projected by a count sketch.
"""

import json
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import behavior_injection as bridge
from behavior_injection import group_advantages, kernel_scores, model_of, per_step_influence, read_set, row_means
from common.data import InputError
from common.metrics import Clock
from common.run import Grader, Positive, Row, mean, micro_batches, open_sampler, sample_rows
from common.trainer import gather_lists, init_world, launch, load_policy, parse_args, sum_over_ranks


@dataclass
class Args(bridge.Args):
    influence_queries: Positive[int] = 2000  # Queries to measure dJ of; as many others make G
    influence_group: bridge.Group = 8  # Answers per query
    influence_self: bool = False  # Let the same queries make G, as in the paper: dJ then includes their own influence.
    influence_step: Positive[float] = 4e-5  # Step along G of the central difference, relative to the weights' norm
    kernel_queries: Positive[int] = 32  # Queries to measure the co-influence K between
    kernel_dims: Positive[int] = 8192  # Dimensions that gradients are projected to for K


PRESETS = bridge.PRESETS | {"tiny": bridge.PRESETS["tiny"] | dict(influence_queries=200)}


# -------------------------------------------------------------------------------------------------- gradients


def objective_gradient(policy, rows: list[Row], n_rows: int, args: Args, world) -> list[Tensor]:
    """(1 / n_rows) sum_i A_i grad log pi(o_i | q_i) over these rows, on this rank alone; a tensor per parameter.

    log pi is the mean over an answer's tokens. Rows without an advantage have no gradient and cost nothing."""
    rows = [row for row in rows if row.advantage]
    parameters = list(policy.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for batch, mine in micro_batches(rows, args, world):
        logp = row_means(policy(batch, temperature=args.temperature), batch, mine)  # [rows]
        ((logp * logp.new_tensor([row.advantage for row in mine])).sum() / n_rows).backward()
    gradient = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return gradient


def inner(a: list[Tensor], b: list[Tensor]) -> float:
    """Inner product of two gradients, summed in float64."""
    return sum((x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)).item()


@torch.no_grad()
def scores_along(policy, direction: list[Tensor], rows: list[Row], args: Args, world) -> list[float]:
    """s_i = <direction, grad log pi_i> of every row, by a central difference in two forward passes.

    (log pi_i(theta + e d) - log pi_i(theta - e d)) / 2e with |e d| = influence_step |theta|; theta is restored."""
    parameters = list(policy.parameters())
    epsilon = args.influence_step * math.sqrt(inner(parameters, parameters) / (inner(direction, direction) or 1.0))
    before = [p.clone() for p in parameters]
    means: list[dict[int, float]] = []  # by the row's id: at theta + e d, at theta - e d
    for sign in (epsilon, -epsilon):
        for p, start, d in zip(parameters, before, direction, strict=True):
            p.copy_(start + sign * d)
        means.append({})
        for batch, mine in micro_batches(rows, args, world):
            logp = row_means(policy(batch, temperature=args.temperature), batch, mine)  # [rows]
            means[-1] |= dict(zip(map(id, mine), logp.tolist(), strict=True))
    for p, start in zip(parameters, before, strict=True):
        p.copy_(start)
    return [(means[0][id(row)] - means[1][id(row)]) / (2 * epsilon) for row in rows]


def count_sketch(tensors: list[Tensor], codes: list[Tensor], dims: int) -> Tensor:
    """Project a gradient (a list of tensors) to [dims] such that inner products are kept on average.

    Every number is added to one of the `dims` sums with a sign: `codes` holds 2 x sum + sign for each (int32), the
    same for all gradients that are compared (`sketch_codes`). The error of <x, y> is about |x| |y| / sqrt(dims)."""
    out = tensors[0].new_zeros(dims)
    for values, code in zip(tensors, codes, strict=True):
        out.index_add_(0, code >> 1, values.flatten() * (1 - 2 * (code & 1)))
    return out


def sketch_codes(parameters: list[Tensor], dims: int, seed: int = 0) -> list[Tensor]:
    """Random codes for `count_sketch`, a tensor per parameter."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(2 * dims, (p.numel(),), generator=generator, dtype=torch.int32).to(p.device) for p in parameters
    ]


# -------------------------------------------------------------------------------------------------- one model


def influence(arm: str, args: Args, world) -> dict:
    """Measure dJ and K of the SFT model of an arm; write OUT/ARM/influence/. Return the summary.

    Every rank holds the whole model in float32 and takes its share of the queries. The reward is the verdict alone,
    without --format_reward, so that a query that is never solved has no gradient."""
    alone = replace(world, rank=0, size=1)
    on_cpu = replace(alone, device=torch.device("cpu"))  # neither sharded nor in bf16
    model = model_of(args, "sft", arm)
    tokenizer = bridge.open_tokenizer(model, args)
    recompute = world.device.type == "cuda" and args.gradient_checkpointing != "none"
    policy = load_policy(model, on_cpu, gradient_checkpointing=recompute).to(world.device)
    parameters, clock = list(policy.parameters()), Clock()
    sampler, grader = open_sampler(policy, tokenizer, args, world), Grader(tokenizer, args.verifier)
    sampler.sync(policy, version=0)
    n, size = args.influence_queries, args.influence_group
    examples, left_out = read_set("influence", tokenizer, args, traces="ignored")
    if len(examples) < 2 * n:
        raise InputError(f"{args.out}/data/influence.jsonl: {len(examples)} questions fit, {2 * n} are needed "
                         f"({left_out}): choose fewer --influence_queries, or longer --max_prompt_tokens")  # fmt: skip

    def roll_out(first: int) -> list[Row]:
        """This rank's answers to n queries, in whole groups."""
        mine, counts = range(first + world.rank, first + n, world.size), [size] * len(examples)
        rows = sample_rows(sampler, examples, mine, counts, args, world, seed=args.seed + 2, grader=grader)
        grader.wait()
        rewards = torch.tensor([row.reward for row in rows], dtype=torch.float64)  # [B]
        advantages = group_advantages(rewards, torch.tensor([row.group for row in rows]))  # [B]
        return [replace(row, advantage=a) for row, a in zip(rows, advantages.tolist(), strict=True)]

    with clock("sample"):
        rows = roll_out(0)
        others = rows if args.influence_self else roll_out(n)
    sampler.close()
    with clock("gradient"):
        direction = objective_gradient(policy, others, n * size, args, alone)
        for tensor in direction:
            sum_over_ranks(tensor, world)
        norm = math.sqrt(inner(direction, direction))
    with clock("scores"):
        scores = scores_along(policy, direction, rows, args, alone)
        d_j, queries = per_step_influence(
            torch.tensor(scores, dtype=torch.float64), torch.tensor([row.advantage for row in rows]).double(),
            torch.tensor([row.group for row in rows]),
        )  # fmt: skip
    with clock("norms"):  # each query's own gradient: its length, and dJ once more as an inner product
        found = []
        for value, query in zip(d_j.tolist(), queries.tolist(), strict=True):
            group = [row for row in rows if row.group == query]
            gradient = objective_gradient(policy, group, size, args, alone)
            length, product = math.sqrt(inner(gradient, gradient)), inner(gradient, direction)
            right = sum(row.reward >= 1 for row in group)
            cosine = product / (length * norm) if length and norm else 0.0
            found.append(dict(query=query, right=right, accuracy=right / size, dJ=value, dJ_inner=product,
                              gradient_norm=length, cosine=cosine))  # fmt: skip
    with clock("kernel"):
        chosen = set(random.Random(args.seed).sample(range(n), min(args.kernel_queries, n)))
        codes, sketches = sketch_codes(parameters, args.kernel_dims), []
        for row in rows:
            if row.group in chosen:
                gradient = objective_gradient(policy, [replace(row, advantage=1.0)], 1, args, alone)
                sketch = count_sketch(gradient, codes, args.kernel_dims).cpu()
                sketches.append((row.group, row.reward >= 1, row.advantage, sketch))
    found = sorted(gather_lists(found, world), key=lambda query: query["query"])
    sketches = sorted(gather_lists(sketches, world), key=lambda sketch: sketch[0])
    seconds = {name: max(gather_lists([value], world)) for name, value in clock.flush().items()}
    summary = summarize(found, size) | kernel_table(sketches) | {"G_norm": norm} | seconds
    if world.main:
        out = Path(args.out, arm, "influence")
        out.mkdir(parents=True, exist_ok=True)
        (out / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in found))
        (out / "influence.json").write_text(json.dumps(summary, indent=2) + "\n")
        plot({arm: summary}, out / "influence.png")
    dist.barrier()
    return summary


def summarize(found: list[dict], size: int) -> dict:
    """Rollout accuracies and dJ, over all queries and by how many of a query's `size` answers are correct."""

    def mean_of(name: str, group: list[dict]) -> float | None:
        return mean(query[name] for query in group)

    groups = [[query for query in found if query["right"] == k] for k in range(size + 1)]
    mixed = [query for group in groups[1:-1] for query in group]
    differences = sum((query["dJ"] - query["dJ_inner"]) ** 2 for query in found)
    exact = sum(query["dJ_inner"] ** 2 for query in found)
    return {
        "queries": len(found), "accuracy": mean_of("accuracy", found), "never": len(groups[0]) / len(found),
        "sometimes": len(mixed) / len(found), "always": len(groups[-1]) / len(found),
        "dJ": mean_of("dJ", found), "dJ_mixed": mean_of("dJ", mixed), "cosine": mean_of("cosine", mixed) or 0.0,
        "by_right": [
            {"right": k, "queries": len(group)} | {x: mean_of(x, group) for x in ("dJ", "cosine", "gradient_norm")}
            for k, group in enumerate(groups)
        ],
        # of the central difference against the inner product, over all queries
        "relative_error": math.sqrt(differences / exact) if exact else 0.0,
    }  # fmt: skip


def kernel_table(sketches: list[tuple]) -> dict:
    """Mean K and mean cosine of pairs of answers: correct (+) or incorrect (-), to the same or to different queries;
    and the dJ of these queries with G from them alone, with and without each query's own answers."""
    groups = torch.tensor([sketch[0] for sketch in sketches])
    right = torch.tensor([sketch[1] for sketch in sketches])
    advantages = torch.tensor([sketch[2] for sketch in sketches]).double()
    features = torch.stack([sketch[3] for sketch in sketches]).double()  # [B, dims]
    kernel = features @ features.T
    norms = kernel.diagonal().clamp(min=1e-30).sqrt()
    same = groups[:, None] == groups[None]
    pairs = ~torch.eye(len(groups), dtype=torch.bool)
    table = {}
    for where, mask in (("same", same & pairs), ("different", ~same)):
        for name, a, b in (("++", right, right), ("+-", right, ~right), ("--", ~right, ~right)):
            chosen = mask & (a[:, None] & b[None])
            if chosen.any():
                cosine = (kernel / norms[:, None] / norms[None])[chosen].mean().item()
                table[f"{where} query, {name}"] = {
                    "K": kernel[chosen].mean().item(), "cosine": cosine, "pairs": int(chosen.sum()),
                }  # fmt: skip
    with_own = per_step_influence(kernel_scores(kernel, advantages), advantages, groups)[0].mean().item()
    without = per_step_influence(kernel_scores(kernel, advantages, groups), advantages, groups)[0].mean().item()
    return {"kernel": table, "kernel_dJ": {"with own answers": with_own, "without": without}}


# -------------------------------------------------------------------------------------------------- all arms


def plot(summaries: dict[str, dict], path: Path) -> None:
    """Rollout accuracies, dJ and its cosine by accuracy, and co-influence; a colour for each arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 7.5), layout="constrained")
    width = 0.8 / len(summaries)
    pairs = sorted({name for summary in summaries.values() for name in summary["kernel"]})
    for i, (arm, summary) in enumerate(summaries.items()):
        by_right, offset = summary["by_right"], (i - (len(summaries) - 1) / 2) * width
        rights = [group["right"] + offset for group in by_right]
        cosines = [summary["kernel"].get(name, {}).get("cosine", 0.0) for name in pairs]
        axes[0, 0].bar(rights, [group["queries"] / summary["queries"] for group in by_right], width, label=arm)
        axes[0, 1].bar(rights, [group["dJ"] or 0.0 for group in by_right], width)
        axes[1, 0].bar(rights, [group["cosine"] or 0.0 for group in by_right], width)
        axes[1, 1].bar([j + offset for j in range(len(pairs))], cosines, width)
    titles = ("fraction of queries", "dJ, mean", "dJ / (|G| |grad J|), mean", "co-influence: mean cosine of gradients")
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3, axis="y")
        axis.axhline(0, color="black", lw=0.6)
    for axis in axes.flat[:3]:
        axis.set_xlabel(f"correct answers of {len(by_right) - 1}")
    axes[1, 1].set_xticks(range(len(pairs)), [name.replace(" query, ", "\n") for name in pairs], fontsize=8)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: Args) -> None:
    bridge.check(replace(args, stage="eval"))
    world = init_world(args.timeout_minutes)
    path = Path(args.out, "data", "influence.jsonl")
    own_rows = path.exists() and not path.with_suffix(".settings.json").exists()
    dist.barrier()  # all ranks have looked
    if not own_rows:
        n = 2 * args.influence_queries
        bridge.write_set("influence", n, args.ops, "train", 1000 * args.seed + 500, args, world)
    summaries = {arm: influence(arm, args, world) for arm in args.arms}
    if world.main:
        plot(summaries, Path(args.out, "influence.png"))
        print(f"\n{'':11}queries solved: never  sometimes  always   mean dJ  cosine")
        for arm, found in summaries.items():
            never, sometimes, always, d_j, cosine = map(found.get, ("never", "sometimes", "always", "dJ", "cosine"))
            print(f"{arm:11}{never:21.2f}{sometimes:11.2f}{always:8.2f}{d_j:10.4f}{cosine:8.3f}")


if __name__ == "__main__":
    args = parse_args(Args, None, preset=PRESETS)
    launch(main, args)
