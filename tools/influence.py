"""The per-step influence dJ of each query on an SFT model of behavior_injection.py, and the co-influence K of answers.

    python -m tools.influence --preset tiny --arms vanilla bridge            after --stage sft with the same flags
    torchrun --nproc_per_node 2 -m tools.influence --out OUT --arms bridge   on two GPUs; OUT is the run of --stage sft

dJ(q) = <G, grad J(q)>: how much an RL step, per unit of its size, raises the objective J of one question, the query q
(Eq. 5 without eta). The tool writes OUT/ARM/influence/ (influence.json, influence.png, queries.jsonl) for every arm.
Then OUT/influence.png and a printed table compare all arms that were measured so far. OUT/data/influence.jsonl may hold
your own queries; else it is made. The docs page of behavior_injection.py has the details. In short:

- G is the gradient of J, by backpropagation from sampled answers to other questions than the queries
  (--influence_self: from the answers to the queries, as in the paper).
- grad J(q) is that of the answers to q alone. dJ(q) divided by both norms is a cosine.
- K is measured between the answers to a few queries, whose gradients are projected by a count sketch.
"""

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import behavior_injection as bridge
from behavior_injection import group_advantages, kernel_scores, model_of, per_step_influence, read_set, row_means
from common.data import InputError, check_works
from common.report import read_results, table, write_results
from common.rows import in_words
from common.run import Grader, Positive, Row, mean, micro_batches, open_sampler, sample_rows, write_lines
from common.trainer import gather_lists, init_world, launch, load_policy, parse_args, sum_over_ranks


@dataclass
class Args(bridge.Args):
    influence_queries: Positive[int] = 2000  # Queries to measure dJ of; as many other questions make G
    influence_group: bridge.Group = 8  # Answers per query
    influence_self: bool = False  # Let the same queries make G, as in the paper: dJ then includes their own influence.
    kernel_queries: Positive[int] = 32  # Queries to measure the co-influence K between
    kernel_dims: Positive[int] = 8192  # Dimensions that gradients are projected to for K


PRESETS = bridge.PRESETS | {"tiny": bridge.PRESETS["tiny"] | dict(influence_queries=200)}
MEASURED_WITH = """verifier temperature max_prompt_tokens max_response_tokens seed chat_template chat_template_args
    influence_queries influence_group influence_self kernel_queries kernel_dims influence.jsonl"""


def objective_gradient(policy, rows: list[Row], n_rows: int, args: Args, world) -> list[Tensor]:
    """(1 / n_rows) sum_i A_i grad log pi(o_i | q_i) over these rows, on this rank alone; a tensor per parameter.

    log pi is the mean over an answer's tokens. Rows without an advantage have no gradient and cost nothing."""
    rows = [row for row in rows if row.advantage]
    for batch, mine in micro_batches(rows, args, world):
        logp = row_means(policy(batch, temperature=args.temperature), batch, mine)  # [rows]
        ((logp * logp.new_tensor([row.advantage for row in mine])).sum() / n_rows).backward()
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
    policy.zero_grad()
    return gradient


def inner(a: list[Tensor], b: list[Tensor]) -> float:
    """Inner product of two gradients, summed in float64."""
    return sum((x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)).item()


def count_sketch(gradient: list[Tensor], dims: int, seed: int = 0) -> Tensor:
    """Project a gradient to [dims]: add each number, with a random sign, to a random entry. Inner products of sketches
    of one seed are unbiased; the error of <x, y> is about |x| |y| / sqrt(dims)."""
    device, sketch = gradient[0].device, gradient[0].new_zeros(dims)
    generator = torch.Generator(device).manual_seed(seed)
    for values in gradient:
        code = torch.randint(2 * dims, (values.numel(),), generator=generator, device=device, dtype=torch.int32)
        sketch.index_add_(0, code >> 1, values.flatten() * (1 - 2 * (code & 1)))  # the last bit is the sign
    return sketch


def influence(arm: str, args: Args, world) -> None:
    """Measure dJ and K of the SFT model of an arm; write OUT/ARM/influence/.

    Every rank holds the whole model in float32 and takes its share of the queries. The reward is the verdict alone,
    without --format_reward, so that a query that is never solved has no gradient."""
    alone = replace(world, rank=0, size=1)
    on_cpu = replace(alone, device=torch.device("cpu"))  # loaded there, the model is neither sharded nor in bf16
    model = model_of(args, "sft", arm)
    tokenizer = bridge.open_tokenizer(model, args)
    recompute = world.device.type == "cuda" and args.gradient_checkpointing != "none"
    policy = load_policy(model, on_cpu, gradient_checkpointing=recompute).to(world.device)
    sampler, grader = open_sampler(policy, tokenizer, args, world), Grader(tokenizer, args.verifier)
    sampler.sync(policy, version=0)
    n, size = args.influence_queries, args.influence_group
    examples, left_out = read_set("influence", tokenizer, args, traces="ignored")
    if len(examples) < 2 * n:
        raise InputError(f"{args.out}/data/influence.jsonl: {len(examples)} questions fit, {2 * n} are needed "
                         f"({in_words(left_out, args)}): choose fewer --influence_queries, or longer "
                         "--max_prompt_tokens")  # fmt: skip

    def roll_out(first: int) -> list[Row]:
        """Return this rank's answers to n questions, in whole groups."""
        mine = range(first + world.rank, first + n, world.size)
        rows = sample_rows(sampler, examples, mine, size, args, world, seed=args.seed + 2, grader=grader)
        grader.wait()
        check_works(args.verifier, gather_lists([(row.status, row.detail) for row in rows], world))
        rewards = torch.tensor([row.reward for row in rows], dtype=torch.float64)  # [B]
        advantages = group_advantages(rewards, torch.tensor([row.group for row in rows]))  # [B]
        return [replace(row, advantage=a) for row, a in zip(rows, advantages.tolist(), strict=True)]

    rows = roll_out(0)
    others = rows if args.influence_self else roll_out(n)
    sampler.close()
    direction = objective_gradient(policy, others, n * size, args, alone)  # G
    for tensor in direction:
        sum_over_ranks(tensor, world)
    direction_norm = math.sqrt(inner(direction, direction))
    kernel_queries = set(random.Random(args.seed).sample(range(n), min(args.kernel_queries, n)))
    found, sketches = [], []
    for start in tqdm(range(0, len(rows), size), desc=f"{arm}: influence", unit="query", disable=not world.main):
        answers = rows[start : start + size]  # to one query
        gradient = objective_gradient(policy, answers, size, args, alone)
        norm = math.sqrt(inner(gradient, gradient))
        d_j = inner(gradient, direction)
        correct = sum(row.reward > 0 for row in answers)
        found.append({
            "query": answers[0].group, "right": correct, "accuracy": correct / size, "dJ": d_j,
            "gradient_norm": norm, "cosine": d_j / (norm * direction_norm) if norm and direction_norm else 0.0,
        })  # fmt: skip
        for row in answers if answers[0].group in kernel_queries else []:
            gradient = objective_gradient(policy, [replace(row, advantage=1.0)], 1, args, alone)
            sketches.append({
                "query": row.group, "correct": row.reward > 0, "advantage": row.advantage,
                "gradient": count_sketch(gradient, args.kernel_dims).cpu(),
            })  # fmt: skip
    found = sorted(gather_lists(found, world), key=lambda query: query["query"])
    sketches = sorted(gather_lists(sketches, world), key=lambda sketch: sketch["query"])
    summary = summarise(found, size) | kernel_table(sketches) | {"G_norm": direction_norm}
    if world.main:
        out = Path(args.out, arm, "influence")
        write_lines(out / "queries.jsonl", found)
        write_results(out / "influence.json", summary, args, MEASURED_WITH, [model])
        plot({arm: summary}, out / "influence.png")


def summarise(found: list[dict], size: int) -> dict:
    """Rollout accuracies and dJ, over all queries and by how many of a query's `size` answers are correct."""

    def means(group: list[dict]) -> dict[str, float | None]:
        return {name: mean(query[name] for query in group) for name in ("dJ", "cosine", "gradient_norm")}

    groups = [[query for query in found if query["right"] == k] for k in range(size + 1)]
    mixed = [query for query in found if 0 < query["right"] < size]
    return {
        "queries": len(found), "accuracy": mean(query["accuracy"] for query in found),
        "never": len(groups[0]) / len(found), "sometimes": len(mixed) / len(found),
        "always": len(groups[-1]) / len(found),
        "dJ": means(found)["dJ"], "dJ_mixed": means(mixed)["dJ"], "cosine": means(mixed)["cosine"] or 0.0,
        "by_right": [{"right": k, "queries": len(group)} | means(group) for k, group in enumerate(groups)],
    }  # fmt: skip


def kernel_table(sketches: list[dict]) -> dict:
    """Mean K and mean cosine of pairs of answers: correct (+) or incorrect (-), to the same or to different queries.
    Also the dJ of these queries. Here G comes only from their answers, including or excluding each query's own."""
    groups = torch.tensor([sketch["query"] for sketch in sketches])  # [B]
    correct = torch.tensor([sketch["correct"] for sketch in sketches])  # [B]
    advantages = torch.tensor([sketch["advantage"] for sketch in sketches], dtype=torch.float64)  # [B]
    gradients = torch.stack([sketch["gradient"] for sketch in sketches]).double()  # [B, dims]
    kernel = gradients @ gradients.T  # [B, B]
    norms = kernel.diagonal().clamp(min=1e-30).sqrt()
    cosines = kernel / norms[:, None] / norms[None]
    same = groups[:, None] == groups[None]
    other_answer = ~torch.eye(len(groups), dtype=torch.bool)
    found = {}
    for where, mask in (("same", same & other_answer), ("different", ~same)):
        for name, a, b in (("++", correct, correct), ("+-", correct, ~correct), ("--", ~correct, ~correct)):
            pairs = mask & (a[:, None] & b[None])
            if pairs.any():
                found[f"{where} query, {name}"] = {
                    "K": kernel[pairs].mean().item(), "cosine": cosines[pairs].mean().item(),
                    "pairs": int(pairs.sum()) // (1 if name == "+-" else 2),  # the mask has each pair of equals twice
                }  # fmt: skip
    d_j = {}
    for name, own_left_out in (("with own answers", None), ("without", groups)):
        scores = kernel_scores(kernel, advantages, own_left_out)
        d_j[name] = per_step_influence(scores, advantages, groups)[0].mean().item()
    return {"kernel": found, "kernel_dJ": d_j}


def plot(summaries: dict[str, dict], path: Path) -> None:
    """Rollout accuracies, dJ and its cosine by accuracy, and co-influence; a colour for each arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    width = 0.8 / len(summaries)
    kinds = sorted({name for summary in summaries.values() for name in summary["kernel"]})
    for i, (arm, summary) in enumerate(summaries.items()):
        by_right, offset = summary["by_right"], (i - (len(summaries) - 1) / 2) * width
        bars = [group["right"] + offset for group in by_right]
        cosines = [summary["kernel"].get(name, {}).get("cosine", 0.0) for name in kinds]
        axes[0, 0].bar(bars, [group["queries"] / summary["queries"] for group in by_right], width, label=arm)
        axes[0, 1].bar(bars, [group["dJ"] or 0.0 for group in by_right], width)
        axes[1, 0].bar(bars, [group["cosine"] or 0.0 for group in by_right], width)
        axes[1, 1].bar([j + offset for j in range(len(kinds))], cosines, width)
    titles = ("fraction of queries", "dJ, mean", "dJ / (|G| |grad J|), mean", "co-influence: mean cosine of gradients")
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3, axis="y")
        axis.axhline(0, color="black", lw=0.6)
    for axis in axes.flat[:3]:
        axis.set_xlabel(f"correct answers of {len(by_right) - 1}")
    axes[1, 1].set_xticks(range(len(kinds)), [name.replace(" query, ", "\n") for name in kinds], fontsize=8)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(args: Args) -> None:
    bridge.check(replace(args, stage="eval"))  # which may have --sft_model and needs no --rl_problems
    if not args.arms:
        raise InputError("--arms is empty: name one arm or more")
    world = init_world(args.timeout_minutes)
    for arm in args.arms:
        bridge.open_tokenizer(model_of(args, "sft", arm), args)  # an InputError if it is not there
    if world.main:
        queries = Path(args.out, "data", "influence.jsonl")
        if not queries.exists() or queries.with_suffix(".settings.json").exists():  # else they are your own
            print(f"{queries}: {2 * args.influence_queries} problems of iGSM")
            bridge.write_set("influence", 2 * args.influence_queries, args.ops, "train", 1000 * args.seed + 500, args)
    dist.barrier()
    for arm in args.arms:
        influence(arm, args, world)
    if world.main:
        paths = {arm: Path(args.out, arm, "influence", "influence.json") for arm in bridge.arms_of(args)}
        summaries = read_results(paths, args, MEASURED_WITH)
        plot(summaries, Path(args.out, "influence.png"))
        names = ("never", "sometimes", "always", "dJ", "cosine")
        lines = [[arm, *(f"{found[name]:.4f}" for name in names)] for arm, found in summaries.items()]
        print(f"\n{table([['queries solved', *names], *lines])}")


if __name__ == "__main__":
    launch(main, parse_args(Args, None, preset=PRESETS))
