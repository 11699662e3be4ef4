"""LUFFY: learning to reason under off-policy guidance (Yan et al., arXiv 2504.14945).

On-policy RL learns from a model's own answers, so it learns nothing from a question that all of them get wrong.
LUFFY adds a trace of a stronger model (the teacher) to every group. A group has G = 8 rows, 7 own answers and the
trace. All are graded alike and share one mean:

    A_i  = R_i - mean(R_1 .. R_G)                                            (Eq. 4; the paper divides by the std)
    loss = - S sum_{i teacher's} sum_t f(p_it) A_i  -  S sum_{i own} sum_t p_it / p_old_it A_i  -  c M mean_it H_it
    f(p) = p / (p + 0.1)                                                                               (Eq. 5-8)

p_it is the policy's probability of token t of row i, p_old_it the one before the step's updates, H_it the entropy.
S = 64 / (8192 N) for the N rows of an update: the published code divided the sum over a GPU's 64 rows by 8192
(--max_response_tokens) and averaged over GPUs. c = 0.001. M is the number of micro-batches per GPU in the published
run, which added up their mean entropies instead of averaging them (`published_micro_batches`).
A teacher's token has the ratio p / p_teacher. The published data lacks p_teacher, and LUFFY sets it to 1 (a column
'target_probs' gives it; f is then left out). With f, the gradient of -loss / S w.r.t. log p is A 0.1 p / (p + 0.1)^2.
It is largest at p = 0.1: tokens of about this probability are learnt first. If the trace and k of the 7 own answers are
correct, each of them has the advantage (7 - k) / 8.

--method picks the above or one of the paper's baselines:
  grpo     on-policy RL ("Dr. GRPO", arXiv 2503.20783): own answers only, PPO clip 0.2
  rl_sft   RL on own answers (baseline: their mean), plus SFT on the trace (weight 1 to 8: docs/luffy.md, detail 6)
  sft      the trace's mean negative log-likelihood alone, 3 epochs; each trace weighs the same (tiny: each token)

Departures from the published code that change numbers (the docs page has all of them, with reasons):
- Denominators count the rows of all GPUs, so GPUs and micro-batches do not change the gradient. S and M keep its scale.
- An update takes whole groups. The published code balanced rows over GPUs by length first, which could split one.
- A question with a too long trace is left out and counted; the published code cut it and lost the eos (--long_trace).
- A question without a trace is an error; the published code sampled another answer (--empty_trace on_policy).

  python luffy.py --preset tiny                                              a laptop, 4 minutes, nothing downloaded
  python luffy.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl      one GPU
  torchrun --nproc_per_node 8 luffy.py                                       the paper's run
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.data import InputError, batch_indices, block_denominators
from common.rows import held_out_examples, read_examples
from common.run import (
    Cap,
    Grader,
    NotNegative,
    Positive,
    Row,
    Run,
    RunArgs,
    add_drift,
    describe,
    micro_batches,
    open_policy,
    open_sampler,
    open_tokenizer,
    per_token,
    policy_logps,
    sample_rows,
    split_updates,
    trace_rows,
    truncated_importance,
)
from common.trainer import Totals, launch, make_optimizer, parse_args

Shape = Literal["", "no_reshape", "logp", "p_logp", "square_root", "pow", "p_div_p_0.1", "p_div_p_0.3", "p_div_p_0.5"]


@dataclass
class Args(RunArgs):
    method: Literal["luffy", "grpo", "rl_sft", "sft"] = "luffy"  # What to train. It sets other defaults.
    model: str = "Elliott/Qwen2.5-Math-7B-16k-think"  # Model folder or Hub name
    out: str = "runs/luffy"  # Run folder. Running the same command again resumes from its newest checkpoint.
    preset: Literal["paper", "tiny"] = "paper"  # paper: the published run. tiny: a laptop, symbolic iGSM
    data: str = "Elliott/Openr1-Math-46k-8192"  # Training rows: file, folder, Hub name (docs/data.md) or igsm:LO-HI
    long_trace: Literal["reject", "cut"] = "reject"  # Leave a too long trace out (luffy.py: its question too) or cut it
    epochs: Positive[float] = 3.0  # Passes over the data if --steps is 0 (published: 3)
    updates_per_step: Positive[int] = 2  # Optimizer updates per step (published: mini-batches of 64 questions)
    temperature: Positive[float] = 1.0  # Sampling temperature. The policy is trained at it too.
    clip: NotNegative[float] = 0.0  # PPO clip of own tokens' ratio; 0: none (published: none; grpo 0.2)
    tis_cap: Cap[float] = 0.0  # Truncated importance sampling: own tokens weigh min(p_old / p_sampler, cap); 0: off
    std: bool = False  # Divide advantages by the group's std (the paper's text; the published code does not).
    entropy_coef: NotNegative[float] = 0.001  # Weight c of the entropy bonus, before the factor M (LUFFY's text: 0.01)
    loss_rows: Positive[float] = 64.0  # The 64 in S: rows per GPU and update (published, 8 GPUs: 128 x 8 / 2 / 8)
    group_size: Positive[int] = 8  # Rows per question, the teacher's included
    empty_trace: Literal["error", "drop", "on_policy"] = "error"  # Question without trace: stop, drop it, only sample
    steps: NotNegative[int] = 500  # Steps to train (the paper's 500); 0 follows --epochs.
    teacher_rows: NotNegative[int] = 1  # How many of the group_size rows are the teacher's trace
    shaping_gamma: NotNegative[float] = 0.1  # gamma of f(p) = p / (p + gamma) on the teacher's tokens; 0: f(p) = p
    shape: Shape = ""  # Another f on the teacher's tokens, by its published name. Empty: that of --shaping_gamma
    own_shape: Shape = ""  # f on own tokens' ratio (paper's Table 4: p_div_p_0.1, --teacher_rows 0). Empty: none
    sft_coef: NotNegative[float] = 1.0  # Weight of rl_sft's SFT term (scaled as published: docs/luffy.md, detail 6)
    sft_rows_per_mean: NotNegative[int] = 1  # sft: average the token means of blocks of this many traces; 0: one block


METHODS = {
    "grpo": dict(out="runs/luffy_grpo", clip=0.2, teacher_rows=0),
    "rl_sft": dict(out="runs/luffy_rl_sft"),
    "sft": dict(lr=5e-5, schedule="cosine", lr_floor=0.1, warmup=0.1, betas=(0.9, 0.95), weight_decay=0.0,
                batch_size=64, group_size=1, updates_per_step=1, out="runs/luffy_sft", steps=0, entropy_coef=0.0),
}  # fmt: skip
PRESETS = {
    "tiny": dict(
        model="models/tiny", data="igsm:5-8", eval_data=("igsm:5-8",), verifier="boxed",
        max_prompt_tokens=160, max_response_tokens=160, steps=60, batch_size=16, lr=2e-4, eval_every=20,
        eval_limit=128, save_every=20, micro_batch_tokens=4096, betas=(0.9, 0.999), weight_decay=0.01,
        out="runs/tiny", sft_rows_per_mean=0, method={name: dict(out=f"runs/tiny_{name}") for name in METHODS},
    ),
}  # fmt: skip


def group_advantages(rewards: Tensor, groups: Tensor, *, std: bool = False, baseline: Tensor | None = None) -> Tensor:
    """A_i = R_i - mean of the rewards of i's group; `std` (LUFFY's Eq. 4) divides by their unbiased std + 1e-6.

    rewards [B] float32 or float64, groups [B] int (the question of each row) -> [B], of rewards' dtype.
    A group of one row has mean 0 and std 1.
    baseline [B] bool: only these rows count for mean and std, which apply to all rows; a std of 0 then becomes 1.

    >>> group_advantages(torch.tensor([1.0, 0, 0, 0]), torch.tensor([7, 7, 7, 7])).tolist()
    [0.75, -0.25, -0.25, -0.25]
    """
    weight = torch.ones_like(rewards) if baseline is None else baseline.to(rewards.dtype)  # [B]
    _, group = groups.unique(return_inverse=True)  # [B], 0 .. Q-1
    n = group.bincount(weight)  # [Q], rows of each question
    mean = torch.where(n > 1, group.bincount(weight * rewards) / n, 0.0)
    advantages = rewards - mean[group]
    if not std:
        return advantages
    variance = group.bincount(weight * advantages**2) / (n - 1)
    sigma = torch.where(n > 1, variance.sqrt(), 1.0)
    if baseline is not None:
        sigma = torch.where(sigma < 1e-9, 1.0, sigma)  # 0 but for rounding
    return advantages / (sigma[group] + 1e-6)


def shaped(logp: Tensor, name: str, gamma: float | None = None) -> Tensor:
    """f(p) of Eq. 7 by its published name, elementwise. p_div_p_X: p / (p + X). no_reshape: p. square_root
    and pow: p^0.5. logp: log p. p_logp: p + log p. Without a name: p / (p + gamma), or p if gamma is 0 or None.

    >>> [round(shaped(torch.tensor(0.25).log(), name).item(), 4) for name in ("no_reshape", "p_div_p_0.1", "pow")]
    [0.25, 0.7143, 0.5]
    """
    name = name or (f"p_div_p_{gamma}" if gamma else "no_reshape")
    p = logp.exp()
    if name.startswith("p_div_p_"):
        return p / (p + float(name.removeprefix("p_div_p_")))
    root = (logp / 2).exp()
    return {"no_reshape": p, "square_root": root, "pow": root, "logp": logp, "p_logp": p + logp}[name]


def luffy_token_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, off_policy: Tensor, *, gamma: float | None = 0.1,
    clip: float | None = None, shape: str = "", own_shape: str = "", teacher_logp: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Loss of each token, elementwise over any shape; what is summed in Eq. 5-8, with the sign of a loss.

    teacher's (off_policy True)   -A f(p), with gradient through f: `shaped(logp, shape, gamma)`
                                  -A p / (p_teacher + 1e-6) where teacher_logp is given and not NaN
    own                           -A r, r = p / p_old; with clip e: max(-A r, -A clamp(r, 1-e, 1+e))
                                  own_shape: r = f(p) / f(p_old) for p_div_p, f(p / p_old) for the others

    >>> loss = luffy_token_loss(torch.log(torch.tensor([0.1])), torch.zeros(1), torch.ones(1), torch.tensor([True]))
    >>> round(loss.item(), 6)
    -0.5
    """
    # torch.where backpropagates through both branches, and 0 * inf = NaN: the unused input is zeroed before exp
    off_logp = torch.where(off_policy, logp, 0.0)
    off_ratio = shaped(off_logp, shape, gamma)
    if teacher_logp is not None:
        known = ~teacher_logp.isnan()
        given = off_logp.exp() / (torch.where(known, teacher_logp, 0.0).exp() + 1e-6)
        off_ratio = torch.where(known, given, off_ratio)
    if own_shape.startswith("p_div_p_"):
        ratio = shaped(torch.where(off_policy, 0.0, logp), own_shape) / shaped(old_logp, own_shape)
    else:
        ratio = shaped(torch.where(off_policy, 0.0, logp - old_logp), own_shape)
    loss = -advantages * ratio
    if clip is not None:
        loss = torch.maximum(loss, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return torch.where(off_policy, -advantages * off_ratio, loss)


def published_micro_batches(tokens_per_row: float, rows: float = 64) -> int:
    """M: how many micro-batches of 32,768 tokens a GPU of the published run needed for its `rows` rows of an update.

    >>> published_micro_batches(2560), published_micro_batches(2560, rows=32)
    (5, 3)
    """
    return max(1, math.ceil(rows * tokens_per_row / 32768))


def rows_with_gradient(rows: list[Row], args: Args) -> list[Row]:
    """The rows that contribute to the gradient. Without an entropy bonus an advantage of 0 adds nothing to RL's loss.
    At least one row, so that there is a gradient (of zeros)."""
    if args.entropy_coef:
        return rows
    return [row for row in rows if row.advantage or (row.teacher and args.method == "rl_sft")] or rows[:1]


def accumulate_gradient(policy, rows: list[Row], old_logps: list | None, args: Args, world) -> dict[str, float]:
    """Forward and backward of one update, summed over ranks and micro-batches; the gradient is left in .grad.
    `rows` are those of all ranks. Every denominator is counted over them before the first backward, so the gradient is
    the same for any number of ranks and any micro_batch_tokens. old_logps: log-probs before the step's updates, from
    `policy_logps`; None in the first update, where p_old = p. Returns metrics; those of tokens are means over
    `rows_with_gradient`."""
    n_tokens = sum(len(row.response) for row in rows)
    n_micro = published_micro_batches(sum(row.tokens for row in rows) / len(rows), args.loss_rows)
    row_scale = args.loss_rows / (len(rows) * args.max_response_tokens)
    kept = rows_with_gradient(rows, args)
    totals = Totals(world)
    n_kept = sum(len(row.response) for row in kept)
    n_teacher = sum(len(row.response) for row in kept if row.teacher)
    for i, (batch, my_rows) in enumerate(micro_batches(kept, args, world)):
        logp, entropy = policy(batch, temperature=args.temperature, entropy=True)  # [N], [N]
        teacher = per_token(batch, [row.teacher for row in my_rows]).bool()  # [N]
        old = logp.detach() if old_logps is None else old_logps[i]  # [N], of the same micro-batches
        advantage = per_token(batch, [row.advantage for row in my_rows])  # [N]
        drawn_logp = per_token(batch, [row.drawn_logps for row in my_rows])  # [N]; NaN: unknown
        token_loss = luffy_token_loss(
            logp, old, advantage, teacher, gamma=args.shaping_gamma, clip=args.clip or None, shape=args.shape,
            own_shape=args.own_shape, teacher_logp=drawn_logp,  # own tokens do not read it
        )  # fmt: skip
        if args.tis_cap:
            weight = truncated_importance(old, drawn_logp, args.tis_cap)
            token_loss = token_loss * torch.where(teacher, 1.0, weight)
        if args.method == "rl_sft":
            token_loss = torch.where(teacher, 0.0, token_loss)
        loss = pg_loss = token_loss.sum() * row_scale
        if args.method == "rl_sft":
            sft_loss = -torch.where(teacher, logp, 0.0).sum() / max(1, n_teacher)
            n_added = n_micro * (1 - (1 - 1 / n_micro) ** (args.loss_rows * args.teacher_rows / args.group_size))
            loss = loss + args.sft_coef * n_added * sft_loss  # published: a mean per micro-batch with a trace (n_added)
            totals.add({"sft/loss": sft_loss})
        if args.entropy_coef:
            loss = loss - args.entropy_coef * n_micro * entropy.sum() / n_tokens
        (loss * world.size).backward()  # FSDP averages over ranks; we need the sum

        totals.add({"loss/pg": pg_loss})
        totals.add({"policy/entropy": entropy.sum()}, per=n_kept)
        add_drift(totals, logp.detach(), old, drawn_logp, clip=args.clip, per=n_kept - n_teacher, own=~teacher)
        if n_teacher:
            add_trace(totals, logp.detach(), teacher, args, per=n_teacher)
    return totals.reduce() | {"optim/entropy_coef": args.entropy_coef * n_micro}  # c M


def accumulate_sft_gradient(policy, rows: list[Row], args: Args, world) -> dict[str, float]:
    """Forward and backward of one SFT update on traces, at temperature 1; the gradient is left in .grad.
    It does not depend on ranks or micro_batch_tokens. Adjacent rows share a mean."""
    lengths = [len(row.response) for row in rows]
    totals = Totals(world)
    n_micro = published_micro_batches(sum(row.tokens for row in rows) / len(rows), args.loss_rows)
    denominators = block_denominators(lengths, args.sft_rows_per_mean)  # of each row
    for batch, mine in micro_batches(range(len(rows)), args, world, lambda i: [(rows[i].prompt, rows[i].response)]):
        logp, entropy = policy(batch, entropy=True)  # [N], [N]
        loss = sft_loss = -(logp / per_token(batch, [denominators[i] for i in mine])).sum()
        if args.entropy_coef:
            loss = loss - args.entropy_coef * n_micro * entropy.sum() / sum(lengths)
        (loss * world.size).backward()  # FSDP averages over ranks; we need the sum

        totals.add({"sft/loss": sft_loss})
        totals.add({"policy/entropy": entropy.sum()}, per=sum(lengths))
        add_trace(totals, logp.detach(), torch.ones_like(logp, dtype=torch.bool), args, per=sum(lengths))
    return totals.reduce()


def add_trace(totals: Totals, logp: Tensor, teacher: Tensor, args: Args, *, per: int) -> None:
    """Add to the metrics, as means over `per` teacher's tokens: log p and f(p). [N] each."""
    ratio = shaped(logp, args.shape, args.shaping_gamma)
    totals.add({"teacher/logp": torch.where(teacher, logp, 0.0).sum(),
                "teacher/shaped_ratio": torch.where(teacher, ratio, 0.0).sum()}, per=per)  # fmt: skip


def check(args: Args) -> None:
    """Raise InputError for settings that cannot work together."""
    least = {"sft": 1, "rl_sft": 1}.get(args.method, 0)
    most = {"sft": 1, "grpo": 0}.get(args.method, args.group_size - 1)
    if not least <= args.teacher_rows <= most:
        raise InputError(f"--teacher_rows: {args.method} takes {least} to {most} if --group_size is {args.group_size}")
    if args.method == "sft" and args.empty_trace == "on_policy":
        raise InputError("--method sft samples no answers: set --empty_trace error or drop")


def main(args: Args) -> None:
    check(args)
    run = Run(args)
    by_rl = args.method != "sft"
    world = run.world
    tokenizer = open_tokenizer(args.model, args)
    grader = Grader(tokenizer, args.verifier)
    examples, left_out = read_examples(
        args.data, tokenizer, args, split="train", traces="needed" if args.teacher_rows else "ignored",
        golds=by_rl, empty_trace=args.empty_trace, long_trace=args.long_trace, progress=world.main,
    )
    run.plan(examples, held_out_examples(tokenizer, args), left_out)

    policy = open_policy(args.model, args, world)
    optimizer = make_optimizer(policy, lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
    run.begin(policy, optimizer, tokenizer)
    sampler = open_sampler(policy, tokenizer, args, world, needed=by_rl or run.held_out)
    sampler.sync(policy, version=run.start)
    run.log(run.evaluate(sampler))

    for step in run:
        batch = [examples[i] for i in batch_indices(len(examples), args.batch_size, step - 1, args.seed)]
        my_questions = range(world.rank, len(batch), world.size)  # questions that this rank samples and grades

        # 1. sample: the traces, and own answers to fill each group
        with run.clock("sample"):
            n_traces = [args.teacher_rows if e.trace else 0 for e in batch]
            rows = trace_rows(batch, my_questions, n_traces)
            if by_rl:
                grader.add(rows)
                n_own = [args.group_size - n for n in n_traces]
                rows += sample_rows(sampler, batch, my_questions, n_own, args, world, seed=run.step_seed, grader=grader)

        # 2. reward (sft: nothing is graded)
        with run.clock("reward"):
            rows = grader.gather(rows, world)  # every rank has all rows now

        # 3. advantages
        rewards = torch.tensor([row.reward for row in rows], dtype=torch.float64)  # [B]
        group = torch.tensor([row.group for row in rows])  # [B], the question of each row: 0 .. batch_size - 1
        baseline = torch.tensor([not row.teacher for row in rows]) if args.method == "rl_sft" else None  # [B]
        advantages = group_advantages(rewards, group, std=args.std, baseline=baseline)  # [B]; sft: not used
        for row, advantage in zip(rows, advantages.tolist(), strict=True):
            row.advantage = advantage

        # 4. update
        with run.clock("update"):
            sampler.sleep()  # frees its memory for the trainer until the sync
            updates = split_updates(rows, args)
            # p_old of later updates is computed before the first update changes the weights; in the first, p_old = p
            old = [None] + [policy_logps(policy, rows_with_gradient(u, args), args, world) for u in updates[1:]]
            for u, update in enumerate(updates):
                if by_rl:
                    log = accumulate_gradient(policy, update, old[u], args, world)
                else:
                    log = accumulate_sft_gradient(policy, update, args, world)
                run.update("policy", log, update, lr=run.lr(u, len(updates)), max_grad_norm=args.max_grad_norm)

        # 5. sync
        with run.clock("sync"):
            sampler.sync(policy, version=step)

        # 6. log, evaluate, save
        run.log(describe(rows) | run.evaluate(sampler), rows)
        run.save()
    run.finish(sampler)


if __name__ == "__main__":
    args = parse_args(Args, None, method=METHODS, preset=PRESETS)
    launch(main, args)
