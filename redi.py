"""REDI: reinforcement distillation, from correct and from incorrect traces, offline (Xu et al., arXiv 2505.24850).

Distillation fine-tunes on a teacher's correct traces and throws the incorrect ones away. REDI learns from both, in two
stages. c_i is a correct ("chosen") trace of problem i, r_i an incorrect ("rejected") one. log p(y) is the sum of the
log-probs of trace y's tokens, |y| their number, eos included:

    --stage sft     loss = - sum_i log p(c_i) / sum_i |c_i|                                        (Eq. 1, per token)
    --stage redi    loss = mean_i [- log p(c_i) / |c_i|  +  alpha log p(r_i) / |r_i|],  alpha = 0.8           (Eq. 5)

In stage redi a long trace weighs no more than a short one. The gradient of a pair's loss w.r.t. a token's log-prob is a
constant, -1 / |c| or alpha / |r|, whatever its probability: there is no reference model, KL, clip or sigmoid, and the
loss has no lower bound. c and r have much text in common, so lowering p(r) lowers p(c) too. Only alpha < 1 and a small
learning rate limit this. Watch logp/chosen: alarm/collapsed_at is the step at which it had fallen too far.

--loss picks the above or one of the paper's baselines. In the paper redi starts from an SFT model of 5 epochs, the
baselines from one of 3 epochs (train it with `--stage sft --epochs 3` and give it as --model):
  symmetric  alpha = 1 (Eq. 4): SimPO's limit as beta -> 0, up to a factor. Stable up to --lr 2e-7 (redi: 1e-6)
  dpo        - log sigmoid(beta [log p(c) - log ref(c) - log p(r) + log ref(r)]); ref: the policy before any update
  simpo      - log sigmoid(beta [log p(c) / |c| - log p(r) / |r|] - gamma)

Beyond the paper, a row may hold a single trace, {prompt, response, label 1 | 0, weight}. It counts as half a pair: in
stage redi, B pairs and the same traces as 2B single rows give the same gradient. A weight multiplies the row's loss and
does not change the denominator.

Departures from the published code that change numbers (the docs page has all of them, with reasons):
- One eos per trace is trained. The published SFT trained the template's end instead, its second stage both.
- A trace that is too long is left out and counted; the published code cut it.
- Log-probs are float32 and their sums float64; the published ones had the logits' dtype (bf16, if these were).
- SFT's mean is over the tokens of all GPUs; the published one took each GPU's mean over its 16 rows and averaged those.

  python redi.py --preset tiny --stage sft                             a laptop, minutes, nothing downloaded
  python redi.py --preset tiny --model runs/tiny-sft/model             the second stage, from that model
  python -m tools.redi_data                                            the data of both stages of the paper's run
  torchrun --nproc_per_node 8 redi.py --stage sft                      ... its first stage; the second without --stage
"""

import math
import random
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import igsm
from common.data import InputError, batch_indices
from common.rows import IGSM, Item, Trace, encode, held_out_examples, iter_rows, read_row, with_kept
from common.run import (
    NotNegative,
    Positive,
    Run,
    RunArgs,
    Seed,
    Share,
    mean,
    micro_batches,
    open_policy,
    open_sampler,
    open_tokenizer,
)
from common.trainer import launch, make_optimizer, parse_args, sum_over_ranks


@dataclass
class Args(RunArgs):
    stage: Literal["sft", "redi"] = "redi"  # sft: correct traces alone. redi: pairs, with --loss
    loss: Literal["redi", "symmetric", "dpo", "simpo"] = "redi"  # What stage redi minimises. It sets other defaults.
    model: str = "runs/redi-sft/model"  # Model folder or Hub name to start from
    data: str = "runs/redi-data/pairs.jsonl"  # Training rows: file, folder, Hub name (docs/data.md) or igsm:LO-HI
    out: str = "runs/redi"  # Run folder. Running the same command again resumes from its newest checkpoint.
    preset: Literal["paper", "tiny"] = "paper"  # paper: the published run. tiny: a laptop, symbolic iGSM
    igsm_problems: Positive[int] = 4000  # Problems that igsm:LO-HI makes, of LO to HI operations
    max_prompt_tokens: Positive[int] = 800  # Rows with longer prompts are left out and counted.
    # Rows with a longer trace (eos included) are left out and counted. Also the longest answer to sample
    max_response_tokens: Positive[int] = 19000
    bad_rows: Literal["error", "drop"] = "error"  # A row with an empty trace or two equal ones: stop, or drop and count
    batch_size: Positive[int] = 32  # Rows per step: pairs, or single traces
    alpha: NotNegative[float] = 0.8  # Weight of the incorrect trace in redi (symmetric: 1)
    chosen_coef: NotNegative[float] = 1.0  # Weight of the correct trace in redi and symmetric
    beta: Positive[float] = 0.001  # beta of dpo and simpo
    gamma: NotNegative[float] = 1.0  # Target margin of simpo
    # dpo's label smoothing: the assumed fraction of pairs whose labels are swapped
    label_smoothing: Annotated[float, ("from 0 to under 0.5", lambda x: 0 <= x < 0.5)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "linear"  # Learning rate after the warm-up
    warmup: Share[float] = 0.1  # Fraction of the updates in which the learning rate rises linearly
    weight_decay: NotNegative[float] = 1e-4  # AdamW weight decay
    # Collapse alarm: it fires when logp/chosen, averaged over 5 steps, falls more than this (nats/token) below step 1.
    collapse_margin: NotNegative[float] = 0.5
    seed: Seed = 42  # Seed of data order, sampling, corruption and random weights
    micro_batch_tokens: Positive[int] = 40960  # Tokens per micro-batch and rank. A pair is never split.
    eval_every: NotNegative[int] = 200  # Evaluate every this many steps, before the first and after the last. 0: never
    save_every: NotNegative[int] = 200  # Write a checkpoint every this many steps and after the last. 0: never


STAGES = {  # published: prompt and trace together 32,768 at most
    "sft": dict(model="Qwen/Qwen2.5-Math-1.5B", data="runs/redi-data/positives.jsonl", out="runs/redi-sft", lr=5e-5,
                epochs=5.0, batch_size=128, max_prompt_tokens=2048, max_response_tokens=30720, rope_theta=300000.0,
                max_positions=32768),
}  # fmt: skip
COMPARISONS = {"symmetric": dict(lr=2e-7, alpha=1.0), "dpo": dict(lr=2e-7), "simpo": dict(lr=5e-7, beta=2.0)}
PRESETS = {
    "tiny": dict(
        model="models/tiny", data="igsm:5-8", eval_data=("igsm:5-8",), out="runs/tiny-redi", verifier="boxed",
        max_prompt_tokens=160, max_response_tokens=160, rope_theta=0.0, max_positions=0, lr=1e-5, eval_every=50,
        eval_limit=128, save_every=50, micro_batch_tokens=4096,
        stage={"sft": dict(out="runs/tiny-sft", lr=5e-4, epochs=3.0, batch_size=64)},
    ),
}  # fmt: skip


def redi_loss(
    chosen_logp: Tensor, chosen_len: Tensor, rejected_logp: Tensor, rejected_len: Tensor, *, alpha: float = 0.8,
    chosen_coef: float = 1.0,
) -> Tensor:  # fmt: skip
    """- chosen_coef log p(c) / |c|  +  alpha log p(r) / |r|, for each pair (Eq. 5): [B] -> [B].

    *_logp: sums of log-probs; *_len: their numbers of tokens, where 0 (no such trace) counts as 1.

    >>> redi_loss(*(torch.tensor([x]) for x in (-3.0, 2.0, -8.0, 4.0))).tolist()
    [-0.10000002384185791]
    """
    chosen, rejected = chosen_logp / chosen_len.clamp(min=1), rejected_logp / rejected_len.clamp(min=1)
    return alpha * rejected - chosen_coef * chosen


def dpo_loss(
    chosen_logp: Tensor, rejected_logp: Tensor, ref_chosen_logp: Tensor, ref_rejected_logp: Tensor, *, beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """DPO (arXiv 2305.18290): - log sigmoid(beta h), h = log p(c) - log ref(c) - log p(r) + log ref(r). [B] -> [B].

    *_logp: sums of log-probs. With label_smoothing e: - (1 - e) log sigmoid(beta h) - e log sigmoid(- beta h).

    >>> round(dpo_loss(*(torch.tensor([x]) for x in (-3.0, -8.0, -4.0, -8.0)), beta=1.0).item(), 4)
    0.3133
    """
    h = (chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp)
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def simpo_loss(
    chosen_logp: Tensor, chosen_len: Tensor, rejected_logp: Tensor, rejected_len: Tensor, *, beta: float, gamma: float
) -> Tensor:
    """SimPO (arXiv 2405.14734): - log sigmoid(beta [log p(c) / |c| - log p(r) / |r|] - gamma), [B] -> [B].

    >>> round(simpo_loss(*(torch.tensor([x]) for x in (-3.0, 2.0, -8.0, 4.0)), beta=2.0, gamma=1.0).item(), 4)
    0.6931
    """
    return -F.logsigmoid(beta * (chosen_logp / chosen_len - rejected_logp / rejected_len) - gamma)


def pair_losses(logps: Tensor, lengths: Tensor, reference: Tensor, args: Args) -> Tensor:
    """Sums of log-probs [B, 2], numbers of tokens [B, 2], the reference's sums [B, 2] -> losses [B]."""
    (chosen, rejected), (chosen_len, rejected_len) = logps.unbind(1), lengths.unbind(1)  # [B] each
    ref_chosen, ref_rejected = reference.unbind(1)
    if args.stage == "sft":
        return -chosen
    if args.loss in ("redi", "symmetric"):
        alpha = 1.0 if args.loss == "symmetric" else args.alpha
        return redi_loss(chosen, chosen_len, rejected, rejected_len, alpha=alpha, chosen_coef=args.chosen_coef)
    if args.loss == "dpo":
        smoothing = args.label_smoothing
        return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=args.beta, label_smoothing=smoothing)
    if args.loss == "simpo":
        return simpo_loss(chosen, chosen_len, rejected, rejected_len, beta=args.beta, gamma=args.gamma)
    raise ValueError(f"--loss {args.loss} has no line in pair_losses")


NO_REFERENCE = ("redi", "symmetric", "simpo")  # losses that do not read log-probs of the model before the first update
ONE_TRACE = ("redi", "symmetric")  # losses that take rows with one trace
UNREAD = {  # flags that a loss does not read: they must keep their defaults
    "sft": ("alpha", "chosen_coef", "beta", "gamma", "label_smoothing"),
    "redi": ("beta", "gamma", "label_smoothing"),
    "symmetric": ("alpha", "beta", "gamma", "label_smoothing"),
    "dpo": ("alpha", "chosen_coef", "gamma"),
    "simpo": ("alpha", "chosen_coef", "label_smoothing"),
}


def collapsed_at(chosen_logps: list[float], margin: float, window: int = 5) -> int | None:
    """The first step at which the mean over the last `window` steps is below step 1 by more than `margin`, or None.

    chosen_logps: mean log-prob per token of correct traces in steps 1, 2, ...

    >>> collapsed_at([-0.5, -0.4, -0.9, -1.4, -1.9], margin=0.5, window=2)
    4
    """
    for step in range(window, len(chosen_logps) + 1):
        if sum(chosen_logps[step - window : step]) / window < chosen_logps[0] - margin:
            return step
    return None


@dataclass
class Pair:
    """A correct and an incorrect trace of one prompt, as ids that end with eos. A missing trace is empty.
    Arrays hold the ids of 50,000 long pairs in a tenth of the memory of lists."""

    prompt: array
    chosen: array
    rejected: array
    weight: float = 1.0
    index: int = 0  # row number in the data
    reference: tuple = (math.nan, math.nan)  # dpo: sums of log-probs before the first update, correct and incorrect
    # as of its last update: the loss, and means over the tokens of the correct and of the incorrect trace
    loss: float = 0.0
    logp: tuple = (0.0, 0.0)
    entropy: tuple = (0.0, 0.0)

    @property
    def sequences(self) -> list[tuple[array, array]]:
        return [(self.prompt, trace) for trace in (self.chosen, self.rejected) if trace]

    @property
    def tokens(self) -> int:
        return sum(len(prompt) + len(trace) for prompt, trace in self.sequences)

    def shown(self, tokenizer) -> dict:
        """The pair for samples.jsonl."""
        texts = {name: tokenizer.decode(list(getattr(self, name))) for name in ("prompt", "chosen", "rejected")}
        logps = [logp if trace else None for logp, trace in zip(self.logp, (self.chosen, self.rejected), strict=True)]
        return {"row": self.index, "loss": self.loss, "chosen_logp": logps[0], "rejected_logp": logps[1],
                "weight": self.weight} | texts  # fmt: skip


def sum_by_trace(values: Tensor, batch, pairs: list[Pair]) -> Tensor:
    """[N], one value for each response token -> [B, 2], sums over correct and incorrect traces in float64. The batch
    holds the traces in the order of `Pair.sequences`."""
    slots = [2 * i + k for i, pair in enumerate(pairs) for k, t in enumerate((pair.chosen, pair.rejected)) if t]
    slot = torch.tensor(slots, dtype=torch.long, device=values.device)[batch.sequence]  # [N]
    sums = values.new_zeros(2 * len(pairs), dtype=torch.float64)
    return sums.index_add(0, slot, values.double()).view(-1, 2)


def denominator(pairs: list[Pair], args: Args) -> float:
    """Return the denominator of an update's loss: tokens of correct traces in sft, else pairs. A single trace counts as
    half a pair."""
    if args.stage == "sft":
        return sum(len(p.chosen) for p in pairs)
    return sum(len(p.sequences) for p in pairs) / 2


def accumulate_gradient(policy, pairs: list[Pair], args: Args, world) -> dict[str, float | None]:
    """Forward and backward of one update, summed over ranks and micro-batches; the gradient is left in .grad.

    `pairs` are those of all ranks. The denominator is counted over them before the first backward, so the gradient is
    the same for any number of ranks and any micro_batch_tokens. Every rank gets the loss, log-probs and entropies of
    every pair, written into `pairs`. Returns metrics."""
    n = denominator(pairs, args)
    float64 = dict(dtype=torch.float64, device=world.device)
    lengths = torch.tensor([(len(p.chosen), len(p.rejected)) for p in pairs], **float64)  # [P, 2], P pairs on all ranks
    reference = torch.tensor([p.reference for p in pairs], **float64)  # [P, 2]
    weight = torch.tensor([p.weight for p in pairs], **float64)  # [P]
    measured = torch.zeros(len(pairs), 5, **float64)  # loss, two mean log-probs, two mean entropies
    # indices of pairs, because the results go into tensors [P]
    for batch, mine in micro_batches(range(len(pairs)), args, world, sequences=lambda i: pairs[i].sequences):
        logp, entropy = policy(batch, entropy=True)  # [N], [N]
        here = [pairs[i] for i in mine]
        logps, entropies = (sum_by_trace(x, batch, here) for x in (logp, entropy.detach()))  # [B, 2], [B, 2]
        losses = pair_losses(logps, lengths[mine], reference[mine], args)  # [B]
        ((weight[mine] * losses).sum() / n * world.size).backward()  # FSDP averages over ranks; we need the sum

        means = torch.cat([logps.detach(), entropies], 1) / lengths[mine].clamp(min=1).repeat(1, 2)  # [B, 4]
        measured[mine] = torch.cat([losses.detach()[:, None], means], 1)
    for pair, (loss, *means) in zip(pairs, sum_over_ranks(measured, world).tolist(), strict=True):
        pair.loss, pair.logp, pair.entropy = loss, tuple(means[:2]), tuple(means[2:])
    return describe(pairs, args)


@torch.no_grad()
def reference_logps(policy, pairs: list[Pair], args: Args, world) -> list[list[float]]:
    """Return the sums of log-probs of each pair's traces, [P][2], under the policy as it is."""
    sums = torch.zeros(len(pairs), 2, dtype=torch.float64, device=world.device)
    for batch, mine in micro_batches(range(len(pairs)), args, world, sequences=lambda i: pairs[i].sequences):
        sums[mine] = sum_by_trace(policy(batch), batch, [pairs[i] for i in mine])
    return sum_over_ranks(sums, world).tolist()


def describe(pairs: list[Pair], args: Args) -> dict[str, float | None]:
    """Metrics of the pairs of an update. Log-probs and entropies: means over traces of their means over tokens."""
    correct, incorrect = [p for p in pairs if p.chosen], [p for p in pairs if p.rejected]
    both = [p for p in correct if p.rejected]
    log = {
        "loss/mean": sum(p.weight * p.loss for p in pairs) / denominator(pairs, args),
        "logp/chosen": mean(p.logp[0] for p in correct), "logp/rejected": mean(p.logp[1] for p in incorrect),
        "logp/gap": mean(p.logp[0] - p.logp[1] for p in both),
        "pair/accuracy": mean(p.logp[0] > p.logp[1] for p in both),
        "entropy/chosen": mean(p.entropy[0] for p in correct),
        "entropy/rejected": mean(p.entropy[1] for p in incorrect),
        "length/chosen": mean(len(p.chosen) for p in correct),
        "length/rejected": mean(len(p.rejected) for p in incorrect),
    }  # fmt: skip
    if args.loss == "dpo":
        log["reward/margin"] = mean(
            args.beta * (len(p.chosen) * p.logp[0] - p.reference[0] - len(p.rejected) * p.logp[1] + p.reference[1])
            for p in both
        )
    return log


def read_rows(args: Args):
    """Yield the rows of --data. In stage redi those of igsm:LO-HI get a corrupted solution as the incorrect trace."""
    for row in iter_rows(args.data, problems=args.igsm_problems):
        if args.data.startswith("igsm:") and args.stage != "sft":
            rng = random.Random(f"{args.seed} {row['extra_info']['index']}")
            wrong = igsm.corrupt(row["target"][0]["content"], rng, IGSM["modulus"])
            row |= {"chosen": row["target"], "rejected": wrong}
        yield row


BAD = {"trace_empty": "a trace is missing or empty", "traces_equal": "the correct and the incorrect trace are equal"}


def make_pairs(rows: list[dict], tokenizer, args: Args, *, source: str, progress=False):
    """Rows to pairs of ids -> (pairs, counts of what was left out). Stage sft reads correct traces alone.

    Raises InputError naming `source`, the row and the remedy."""
    pairs: list[Pair] = []
    count = {"rows": len(rows), "prompt_too_long": 0, "trace_too_long": 0, "trace_empty": 0, "traces_equal": 0}
    count |= {"wrong_only": 0} if args.stage == "sft" else {}

    def read(row: dict, where: str) -> tuple[Item, Trace | None, Trace | None] | None:
        item = read_row(row, where)
        correct, incorrect = item.first(correct=True), item.first(correct=False)
        if args.stage == "sft" and incorrect and not correct:
            count["wrong_only"] += 1
            return None
        return item, correct, None if args.stage == "sft" else incorrect

    for index, item, _, prompt, correct, wrong in encode(rows, tokenizer, read, source=source, progress=progress):
        given = [trace for trace in (correct, wrong) if trace is not None]  # None: the row has no such trace
        empty = not given or not all(given)
        if empty or correct == wrong:
            reason = "trace_empty" if empty else "traces_equal"
            if args.bad_rows == "error":
                raise InputError(f"{source}, row {index}: {BAD[reason]}; remove the row or pass --bad_rows drop "
                                 f"(columns found: {', '.join(map(str, rows[index]))})")  # fmt: skip
            count[reason] += 1
        elif len(prompt) > args.max_prompt_tokens:
            count["prompt_too_long"] += 1
        elif max(map(len, given)) > args.max_response_tokens:
            count["trace_too_long"] += 1
        else:
            pairs.append(Pair(*(array("i", x or []) for x in (prompt, correct, wrong)), item.weight, index))
    return pairs, with_kept(pairs, count, source, args)


def check(args: Args) -> None:
    """Raise InputError for settings that cannot work together, and for missing files that another command makes."""
    if args.stage == "sft" and args.loss != "redi":
        raise InputError(f"--loss {args.loss} is of --stage redi, and does nothing in --stage sft")
    loss = "sft" if args.stage == "sft" else args.loss
    for name in UNREAD.get(loss, ()):
        default = COMPARISONS.get(loss, {}).get(name, getattr(Args, name))
        if (value := getattr(args, name)) != default:
            readers = [other for other, unread in UNREAD.items() if name not in unread]
            raise InputError(f"--{name} {value} is for --loss {', '.join(readers)}, and does nothing with {loss}")
    if args.alpha == args.chosen_coef == 0:
        raise InputError("--alpha 0 --chosen_coef 0 trains on nothing")
    for name, maker in (("model", "redi.py --stage sft"), ("data", "python -m tools.redi_data")):
        path = getattr(args, name)
        if path.startswith("runs/") and not Path(path).exists():
            raise InputError(f"--{name} {path}: no such file or folder; `{maker}` makes it, or name another")


def check_pairs(pairs: list[Pair], args: Args) -> None:
    """Raise InputError if the rows do not hold the traces that the loss needs."""
    alone = sum(len(p.sequences) == 1 for p in pairs)
    if args.loss not in ONE_TRACE and alone:
        raise InputError(f"--data {args.data}: {alone} rows have one trace, and --loss {args.loss} compares two")
    if args.stage != "sft" and not any(p.rejected for p in pairs):
        raise InputError(f"--data {args.data}: no row has an incorrect trace ('rejected', or label 0); `python -m "
                         "tools.redi_data` makes pairs, or use --stage sft")  # fmt: skip
    if not any(p.chosen for p in pairs):
        raise InputError(f"--data {args.data}: no row has a correct trace ('chosen', or label 1)")


def main(args: Args) -> None:
    check(args)
    run = Run(args)
    world = run.world
    tokenizer = open_tokenizer(args.model, args)
    pairs, left_out = make_pairs(list(read_rows(args)), tokenizer, args, source=args.data, progress=world.main)
    if args.stage != "sft":
        left_out["pairs"] = sum(len(p.sequences) == 2 for p in pairs)
    check_pairs(pairs, args)
    run.plan(
        pairs, held_out_examples(tokenizer, args), left_out, key=lambda p: (p.prompt, p.chosen, p.rejected, p.weight),
        sequences=lambda p: p.sequences,
    )  # fmt: skip

    policy = open_policy(args.model, args, world)
    optimizer = make_optimizer(policy, lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
    run.begin(policy, optimizer, tokenizer)
    reference = run.state.get("reference", [])  # dpo: log-probs before the first update
    if args.loss not in NO_REFERENCE and not reference:
        reference = reference_logps(policy, pairs, args, world)
    for pair, logps in zip(pairs, reference):
        pair.reference = tuple(logps)
    sampler = open_sampler(policy, tokenizer, args, world, needed=run.held_out)
    sampler.sync(policy, version=run.start)
    run.log(run.evaluate(sampler))
    followed = run.state.get("followed", [])  # [step, logp/chosen] of every update, for the alarm

    for step in run:
        batch = [pairs[i] for i in batch_indices(len(pairs), args.batch_size, step - 1, args.seed)]

        # 1. sample, 2. reward, 3. advantages: none; the data holds traces and which of them are correct

        # 4. update
        with run.clock("update"):
            sampler.sleep()  # frees its memory for the trainer until the sync
            log = accumulate_gradient(policy, batch, args, world)
            updated = run.update("policy", log, batch, lr=run.lr(), max_grad_norm=args.max_grad_norm)

        # 5. sync
        with run.clock("sync"):
            if run.evaluates:
                sampler.sync(policy, version=step)

        # 6. log, evaluate, save
        if updated and log["logp/chosen"] is not None:
            followed.append([step, log["logp/chosen"]])
        fell = collapsed_at([logp for _, logp in followed], args.collapse_margin)
        alarm = followed[fell - 1][0] if fell else None  # the n-th entry -> its step: skipped updates have no entry
        if alarm == step and world.main:
            recent = mean(logp for _, logp in followed[-5:])
            remedy = "--lr or --alpha" if (args.stage, args.loss) == ("redi", "redi") else "--lr"
            tqdm.write(f"step {step}: logp/chosen has fallen from {followed[0][1]:.2f} to {recent:.2f} (5 steps), by "
                       f"more than --collapse_margin {args.collapse_margin}: lower {remedy}")  # fmt: skip
        run.log({"alarm/collapsed_at": alarm} | run.evaluate(sampler), batch)
        run.save(reference=reference, followed=followed)
    run.finish(sampler)


if __name__ == "__main__":
    args = parse_args(Args, None, stage=STAGES, loss=COMPARISONS, preset=PRESETS)
    launch(main, args)
