"""ReLIFT: reinforcement learning interleaved with fine-tuning on the hardest questions (Ma et al., arXiv 2506.07527).

On-policy RL learns from a model's own answers, so it learns nothing from a question that all of them get wrong.
SFT can teach such questions, but it needs a demonstration for every question and degrades what the model already does
well. ReLIFT does RL and keeps in a buffer the questions whose whole group of G = 8 answers failed. Whenever the buffer
holds `sft_data_size` of them, one SFT update on their demonstrations follows the RL updates of the step:

    A_i  = R_i - mean(R_1 .. R_G)
    loss = - S sum_i sum_t p_it / p_old_it A_i  -  c M mean_it H_it                      (RL)
    loss = mean over blocks of 4 demonstrations of mean_it (- log p_it - 0.001 H_it)     (SFT, newest hardest questions)

p_it is the policy's probability of token t of row i, p_old_it the one before the step's updates, H_it the entropy.
S = 64 / (8192 N) for the N rows of an update: the published code divided the sum over a GPU's 64 rows by 8192
(--max_response_tokens) and averaged over GPUs. c = 0.001. M is the number of micro-batches per GPU in the published
run, which added up their mean entropies instead of averaging them (`published_micro_batches`).
LUFFY puts a demonstration into every group. ReLIFT uses them only where all answers fail, so that all advantages are
0, and in updates of their own: SFT has its own AdamW (moments and learning rate) and its own gradient clip.

--method picks the above or one of the paper's baselines:
  grpo     RL alone, as published: PPO clip 0.2, gradient clip 1.0 (relift: none and 0.7). `--sft_data_size -1` is
           relift without its SFT updates and nothing else changed
  sft      the demonstrations alone, 3 epochs (the settings are not published: LUFFY's are taken)

Departures from the published code that change numbers (the docs page has all of them, with reasons):
- Denominators count the rows of all GPUs, so GPUs and micro-batches do not change the gradient. S and M keep its scale.
- The SFT gradient is the true mean; the published one was an eighth of it (8 GPUs), so sft_max_grad_norm is 8, not 1.
- The SFT loss averages over the tokens of `sft_rows_per_mean` rows, then over these blocks (published: micro-batches).
- A question is in the buffer once, however often it failed. Its demonstration is verified (--no_verify_demonstrations).
- A question whose demonstration is missing or too long is trained by RL alone, and counted (or --long_trace cut).

  python relift.py --preset tiny                                             a laptop, 4 minutes, nothing downloaded
  python relift.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl     one GPU
  torchrun --nproc_per_node 8 relift.py                                      the paper's run
"""

import math
import random
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

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
    Share,
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


@dataclass
class Args(RunArgs):
    method: Literal["relift", "grpo", "sft"] = "relift"  # What to train. It sets other defaults.
    model: str = "RoadQAQ/Qwen2.5-Math-7B-16k-think"  # Model folder or Hub name
    out: str = "runs/relift"  # Run folder. Running the same command again resumes from its newest checkpoint.
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
    group_size: Positive[int] = 8  # Answers per question
    max_grad_norm: Positive[float] = 0.7  # Clip the global gradient norm of RL to this (published; grpo: 1.0).
    # Questions per SFT update. An update runs when the buffer holds this many. -1: RL alone
    sft_data_size: Annotated[int, ("positive, or -1 for RL alone", lambda n: n > 0 or n == -1)] = 128
    # Questions of the step that enter the buffer. hardest: all answers failed. solved: as many of the others, or all if
    # they are fewer (the paper's "random" ablation). random: as many of any questions. all: every question
    sft_on: Literal["hardest", "solved", "random", "all"] = "hardest"
    sft_every: NotNegative[int] = 0  # SFT every this many steps, buffer full or not (the paper's ablation); 0: if full
    hard_threshold: Share[float] = 0.0  # Fraction of correct answers up to which a question is hardest (published: 0)
    verify_demonstrations: bool = True  # Use only demonstrations that the verifier accepts (published: no).
    sft_lr: NotNegative[float] = 1e-6  # Learning rate of the SFT updates, constant
    sft_max_grad_norm: Positive[float] = 8.0  # Clip the SFT gradient norm to this (published: 1, on 1/8 of the norm)
    sft_entropy_coef: NotNegative[float] = 0.001  # SFT entropy bonus (the paper reports 1e-4 as best)
    # SFT loss: mean over blocks of this many demonstrations of their token means (published micro-batches: 4 for
    # 7B-Math, else 2). 1 weighs all demonstrations equally; 0 is one block, which weighs all tokens equally.
    sft_rows_per_mean: NotNegative[int] = 4


LONG_TRACE = {"reject": "drop", "cut": "end"}  # for read_examples. drop: leave out the trace only. end: cut, eos last
METHODS = {
    "grpo": dict(out="runs/relift_grpo", clip=0.2, max_grad_norm=1.0),
    "sft": dict(lr=5e-5, schedule="cosine", lr_floor=0.1, warmup=0.1, betas=(0.9, 0.95), weight_decay=0.0,
                batch_size=64, group_size=1, updates_per_step=1, out="runs/relift_sft", max_grad_norm=1.0,
                sft_entropy_coef=0.0, sft_rows_per_mean=1),
}  # fmt: skip
PRESETS = {
    "tiny": dict(
        model="models/tiny", data="igsm:5-8", eval_data=("igsm:5-8",), verifier="boxed",
        max_prompt_tokens=160, max_response_tokens=160, steps=60, batch_size=16, lr=2e-4, eval_every=20,
        eval_limit=128, save_every=20, micro_batch_tokens=4096, betas=(0.9, 0.999), weight_decay=0.01,
        out="runs/tiny_relift", sft_data_size=16, sft_lr=2e-4, sft_max_grad_norm=1.0,
        method={"grpo": dict(out="runs/tiny_relift_grpo"),
                "sft": dict(out="runs/tiny_relift_sft", sft_rows_per_mean=0)},
    ),
}  # fmt: skip


def group_advantages(rewards: Tensor, groups: Tensor, *, std: bool = False) -> Tensor:
    """A_i = R_i - mean of the rewards of i's group; `std` (LUFFY's Eq. 4) divides by their unbiased std + 1e-6.

    rewards [B] float32 or float64, groups [B] int (the question of each row) -> [B], of rewards' dtype.
    A group of one row has mean 0 and std 1.

    >>> group_advantages(torch.tensor([1.0, 0, 0, 0]), torch.tensor([7, 7, 7, 7])).tolist()
    [0.75, -0.25, -0.25, -0.25]
    """
    _, group = groups.unique(return_inverse=True)  # [B], 0 .. Q-1
    n = group.bincount()  # [Q], rows of each question
    mean = torch.where(n > 1, group.bincount(rewards) / n, 0.0)
    advantages = rewards - mean[group]
    if not std:
        return advantages
    variance = group.bincount(advantages**2) / (n - 1)
    sigma = torch.where(n > 1, variance.sqrt(), 1.0)
    return advantages / (sigma[group] + 1e-6)


def policy_token_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip: float | None = None) -> Tensor:
    """RL loss of each token, elementwise over any shape: - A r, r = p / p_old;
    with clip e: max(- A r, - A clamp(r, 1-e, 1+e)).

    >>> loss = policy_token_loss(torch.tensor([0.6]).log(), torch.tensor([0.4]).log(), torch.ones(1), clip=0.2)
    >>> round(loss.item(), 6)
    -1.2
    """
    ratio = (logp - old_logp).exp()
    loss = -advantages * ratio
    if clip is not None:
        loss = torch.maximum(loss, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return loss


def sft_token_loss(logp: Tensor, entropy: Tensor, denominator: Tensor, *, entropy_coef: float) -> Tensor:
    """SFT loss of each token, to be summed: (1/K) sum_k (1/T_k) sum_{t in k} (- log p_t - c H_t).

    logp, entropy [N]; denominator [N]: K T_k for K blocks, T_k tokens in a token's block (`block_denominators`)."""
    return (-logp - entropy_coef * entropy) / denominator


def hardest_groups(rewards: list[float], groups: list[int], threshold: float = 0.0) -> list[int]:
    """Groups whose fraction of correct rows (reward over 0) is at most `threshold`, in order of first appearance.

    >>> hardest_groups([0, 0, 1, 0, 0, 0], [7, 7, 3, 3, 5, 5])
    [7, 5]
    """
    correct: dict[int, list[bool]] = {}
    for reward, group in zip(rewards, groups, strict=True):
        correct.setdefault(group, []).append(reward > 0)
    return [group for group, flags in correct.items() if sum(flags) / len(flags) <= threshold]


def questions_to_buffer(which: str, hardest: list[int], n: int, *, seed: str) -> list[int]:
    """Return those of the questions 0 .. n - 1 that --sft_on selects. solved, random: at most as many as hardest.

    >>> questions_to_buffer("hardest", [1], 3, seed=""), sorted(questions_to_buffer("solved", [0, 2, 3], 5, seed=""))
    ([1], [1, 4])
    """
    if which in ("hardest", "all"):
        return hardest if which == "hardest" else list(range(n))
    pool = [i for i in range(n) if which == "random" or i not in hardest]
    return random.Random(seed).sample(pool, min(len(hardest), len(pool)))


class HardestBuffer:
    """Questions (any hashable objects) that wait for an SFT update, newest first, each at most once.

    >>> buffer = HardestBuffer()
    >>> buffer.add([1, 2]); buffer.add([3, 1])
    >>> len(buffer), buffer.take(2), len(buffer)
    (3, [3, 1], 1)
    """

    def __init__(self):
        self.questions: list = []

    def __len__(self) -> int:
        return len(self.questions)

    def add(self, questions: list) -> None:
        """Put questions in front, in their order. Those that the buffer already holds move to the front."""
        self.questions = list(dict.fromkeys([*questions, *self.questions]))

    def take(self, n: int) -> list:
        """Remove the first n, or all if there are fewer, and return them."""
        taken, self.questions = self.questions[:n], self.questions[n:]
        return taken

    def state_dict(self) -> dict:
        """Return what a checkpoint keeps, as plain JSON."""
        return {"questions": list(self.questions)}

    def load_state_dict(self, state: dict) -> None:
        self.questions = list(state["questions"])


def sft_is_due(step: int, held: int, args: Args) -> bool:
    """Whether an SFT update follows the RL updates of `step` (1, 2, ...) if the buffer holds `held` questions."""
    if args.sft_every:
        return held > 0 and step % args.sft_every == 0
    return held >= args.sft_data_size


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
    return [row for row in rows if row.advantage] or rows[:1]


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
    for i, (batch, my_rows) in enumerate(micro_batches(kept, args, world)):
        logp, entropy = policy(batch, temperature=args.temperature, entropy=True)  # [N], [N]
        old = logp.detach() if old_logps is None else old_logps[i]  # [N], of the same micro-batches
        advantage = per_token(batch, [row.advantage for row in my_rows])  # [N]
        drawn_logp = per_token(batch, [row.drawn_logps for row in my_rows])  # [N]; NaN: unknown
        token_loss = policy_token_loss(logp, old, advantage, clip=args.clip or None)
        if args.tis_cap:
            weight = truncated_importance(old, drawn_logp, args.tis_cap)
            token_loss = token_loss * weight
        loss = pg_loss = token_loss.sum() * row_scale
        if args.entropy_coef:
            loss = loss - args.entropy_coef * n_micro * entropy.sum() / n_tokens
        (loss * world.size).backward()  # FSDP averages over ranks; we need the sum

        totals.add({"loss/pg": pg_loss})
        totals.add({"policy/entropy": entropy.sum()}, per=n_kept)
        add_drift(totals, logp.detach(), old, drawn_logp, clip=args.clip, per=n_kept)
    return totals.reduce() | {"optim/entropy_coef": args.entropy_coef * n_micro}  # c M


def accumulate_sft_gradient(policy, rows: list[Row], args: Args, world) -> dict[str, float]:
    """Forward and backward of one SFT update on traces, at temperature 1; the gradient is left in .grad.
    It does not depend on ranks or micro_batch_tokens. Adjacent rows share a mean."""
    lengths = [len(row.response) for row in rows]
    totals = Totals(world)
    denominators = block_denominators(lengths, args.sft_rows_per_mean)  # of each row
    for batch, mine in micro_batches(range(len(rows)), args, world, lambda i: [(rows[i].prompt, rows[i].response)]):
        logp, entropy = policy(batch, entropy=True)  # [N], [N]
        denominator = per_token(batch, [denominators[i] for i in mine])  # [N]
        loss = sft_token_loss(logp, entropy, denominator, entropy_coef=args.sft_entropy_coef).sum()
        (loss * world.size).backward()  # FSDP averages over ranks; we need the sum

        totals.add({"sft/loss": loss})
        totals.add({"sft/logp": logp.sum(), "sft/entropy": entropy.sum()}, per=sum(lengths))
    return totals.reduce() | {"sft/length": sum(lengths) / len(rows)}


def check(args: Args) -> None:
    """Raise InputError for settings that cannot work together."""
    if args.sft_every and args.sft_data_size < 0:
        raise InputError("--sft_every N fine-tunes on --sft_data_size questions, and -1 is RL alone: drop one of them")


def check_demonstrations(examples: list, grader: Grader, args: Args, world) -> None:
    """Raise InputError if there are too few demonstrations for SFT; warn if some are missing, or none is accepted."""
    have = [q for q, example in enumerate(examples) if example.trace]
    if not have:
        raise InputError(f"--data {args.data}: no row has a demonstration (column 'target', at most --max_response_"
                         f"tokens {args.max_response_tokens}) to fine-tune on; RL alone is --method grpo")  # fmt: skip
    if args.method == "relift" and not args.sft_every and len(have) < args.sft_data_size:
        raise InputError(f"--sft_data_size {args.sft_data_size}: only {len(have)} questions have a demonstration, and "
                         "the buffer holds each once, so it would never be full")  # fmt: skip
    if len(have) < len(examples) and world.main:
        missing = len(examples) - len(have)
        print(f"WARNING: {missing} of {len(examples)} questions have no demonstration", file=sys.stderr)
    if args.method == "relift" and not with_demonstration(have[:64], examples, grader, args, world)[0] and world.main:
        print("WARNING: --verifier accepts none of the first 64 demonstrations, so SFT may never run: do they fit it?",
              file=sys.stderr)  # fmt: skip


def with_demonstration(questions: list[int], examples, grader: Grader, args: Args, world):
    """Return those of `questions` (indices of examples) to fine-tune on, and counts of the others by reason. The ranks
    share the demonstrations that must be verified."""
    accepted = have = [q for q in questions if examples[q].trace]
    if args.verify_demonstrations:
        rows = trace_rows([examples[q] for q in have], range(world.rank, len(have), world.size))
        grader.add(rows)
        accepted = [have[row.group] for row in grader.gather(rows, world) if row.reward > 0]  # group: place in have
    counts = {"buffer/no_demonstration": len(questions) - len(have), "buffer/rejected": len(have) - len(accepted)}
    return accepted, counts


def main(args: Args) -> None:
    check(args)
    run = Run(args)
    by_rl = args.method != "sft"
    world = run.world
    interleave = args.method == "relift" and args.sft_data_size > 0
    tokenizer = open_tokenizer(args.model, args)
    grader = Grader(tokenizer, args.verifier)
    needed = interleave or not by_rl
    examples, left_out = read_examples(
        args.data, tokenizer, args, split="train", traces="needed" if needed else "ignored",
        golds=by_rl, empty_trace="on_policy", long_trace=LONG_TRACE[args.long_trace], progress=world.main,
    )
    if needed:
        check_demonstrations(examples, grader, args, world)
    examples = examples if by_rl else [e for e in examples if e.trace]
    left_out["kept"] = len(examples)
    run.plan(examples, held_out_examples(tokenizer, args), left_out)

    policy = open_policy(args.model, args, world)
    optimizer = make_optimizer(policy, lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
    more = {}
    if interleave:
        sft_optimizer = make_optimizer(policy, lr=args.sft_lr, betas=args.betas, weight_decay=args.weight_decay)
        more = {"sft": (policy, sft_optimizer)}
    run.begin(policy, optimizer, tokenizer, **more)
    sampler = open_sampler(policy, tokenizer, args, world, needed=by_rl or run.held_out)
    sampler.sync(policy, version=run.start)
    n_taught = run.state.get("demonstrations", 0)  # demonstrations that SFT has trained on so far
    buffer = HardestBuffer()  # of indices of examples
    buffer.load_state_dict(run.state.get("buffer", buffer.state_dict()))
    run.log(run.evaluate(sampler))

    for step in run:
        indices = batch_indices(len(examples), args.batch_size, step - 1, args.seed)
        batch = [examples[i] for i in indices]
        my_questions = range(world.rank, len(batch), world.size)  # questions that this rank samples and grades

        # 1. sample: own answers alone (sft: demonstrations alone)
        with run.clock("sample"):
            if by_rl:
                n = args.group_size
                rows = sample_rows(sampler, batch, my_questions, n, args, world, seed=run.step_seed, grader=grader)
            else:
                rows = trace_rows(batch, my_questions)

        # 2. reward (sft: nothing is graded)
        with run.clock("reward"):
            rows = grader.gather(rows, world)  # every rank has all rows now

        # 3. advantages
        rewards = torch.tensor([row.reward for row in rows], dtype=torch.float64)  # [B]
        group = torch.tensor([row.group for row in rows])  # [B], the question of each row: 0 .. batch_size - 1
        advantages = group_advantages(rewards, group, std=args.std)  # [B]; sft: not used
        for row, advantage in zip(rows, advantages.tolist(), strict=True):
            row.advantage = advantage
        buffer_log = {}
        if interleave:  # the hardest questions go into the buffer
            hardest = hardest_groups(rewards.tolist(), group.tolist(), args.hard_threshold)
            chosen = questions_to_buffer(args.sft_on, hardest, len(batch), seed=f"{args.seed} {step}")
            with run.clock("reward"):
                accepted, counts = with_demonstration([indices[g] for g in chosen], examples, grader, args, world)
            buffer.add(accepted)
            buffer_log |= counts | {"group/hardest": len(hardest) / len(batch)}

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
                done = run.update("policy", log, update, lr=run.lr(u, len(updates)), max_grad_norm=args.max_grad_norm)
                n_taught += len(update) if done and not by_rl else 0
        taught, fired = [], False  # an SFT update follows if it is due
        if interleave and sft_is_due(step, len(buffer), args):
            with run.clock("sft"):
                questions = buffer.take(args.sft_data_size)
                taught = trace_rows([examples[q] for q in questions], range(len(questions)))
                log = accumulate_sft_gradient(policy, taught, args, world)
                fired = run.update(
                    "sft", log, taught, lr=args.sft_lr, max_grad_norm=args.sft_max_grad_norm, norm="sft/grad_norm"
                )
                n_taught += len(taught) if fired else 0
        if interleave:
            buffer_log |= {"buffer/size": len(buffer), "sft/fired": float(fired)}

        # 5. sync
        with run.clock("sync"):
            sampler.sync(policy, version=step)

        # 6. log, evaluate, save
        buffer_log["sft/demonstrations"] = n_taught
        run.log(describe(rows) | buffer_log | run.evaluate(sampler), rows, taught)
        run.save(buffer=buffer.state_dict(), demonstrations=n_taught)
    run.finish(sampler)


if __name__ == "__main__":
    args = parse_args(Args, None, method=METHODS, preset=PRESETS)
    launch(main, args)
