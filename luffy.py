"""LUFFY: learning to reason under off-policy guidance (Yan et al., arXiv 2504.14945).

GRPO learns from a model's own answers, so it learns nothing where all of them are wrong. LUFFY puts a trace
of a stronger model (the teacher) into every group: G - 1 own answers and 1 trace, graded alike, share one mean.

    A_i  = R_i - mean(R_1 .. R_G)                                                                (Eq. 4, no std)
    loss = - sum_teacher sum_t f(p_t) A  -  sum_own sum_t (p_t / p_old_t) A,     f(x) = x / (x + 0.1)  (Eq. 5-8)

p_t is the policy's live probability of the token. A teacher's token has no old policy: its importance ratio is
p_t / 1, and the shaping f makes the gradient w.r.t. log p_t equal to A * 0.1 p / (p + 0.1)^2, which is largest at
p = 0.1: unlikely but not hopeless tokens of the trace are learnt first. As own answers become right, the trace's
advantage falls from 7/8 to 0, and the method turns into on-policy RL by itself.

--method picks LUFFY or one of the paper's comparisons, each with its published settings:
  luffy    the above: no std, no clip, no KL, no length normalisation (the sum is divided by max_response_tokens)
  grpo     on-policy RL ("Dr. GRPO"): own answers only, PPO clip 0.2. The paper's SFT+RL is this after `sft`, on
           other questions (Elliott/Openr1-Math-48k-Complement)
  rl_sft   own answers by RL (mean over own answers, no clip) plus the mean negative log-likelihood of the trace
  sft      the trace's mean negative log-likelihood alone, 3 epochs; each trace weighs the same

Where this file departs from the published code, and why:
- Scale. The published gradient is the sum over a GPU's 64 rows / 8192, averaged over 8 GPUs, whatever the rows:
  `loss_rows = 64` times the mean over all rows of an update gives the same on any number of GPUs. The entropy
  bonus and rl_sft's SFT term were means over a micro-batch, summed over the micro-batches of 32,768 tokens that a
  GPU happened to need: they are means over the update times that number (`published_micro_batches`), computed
  from the rows' mean length and not from how this run packs them. Clip and Adam's epsilon then act as published.
- An update holds whole groups (the published one mixed the rows of 128 prompts by length): same expectation.
- A trace that does not fit is rejected and counted; the published code cut it and lost its eos (--long_trace cut).
- A row without a trace is an error unless --empty_trace says otherwise; the published code made it an own row.
- The trace costs no decoding; the published code let vLLM write up to 8192 tokens after it and threw them away.
- The first update of a step is exactly on-policy, so its ratio is 1 and p_old is not computed twice.
- Own and teacher's tokens are told apart with `where`, not by adding a term times zero (inf * 0 is NaN).
- The paper's entropy coefficient is 0.01, every published script's 0.001: the default is the scripts'.
- Stop at 500 steps, as the paper did; the script ran on to 30 epochs.
As published: the trace is graded by the same verifier as everything else (a rejected one is pushed down); eos is
trained; groups that are all right or all wrong stay in and get the entropy bonus only; `</think>` is needed.

Commands:
  python luffy.py --preset tiny                                              a laptop, 4 minutes, nothing downloaded
  python luffy.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl      one GPU
  torchrun --nproc_per_node 8 luffy.py                                       the paper's run
"""

import math
import random
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import igsm
from common.data import (
    InputError,
    batch_indices,
    check_verifier,
    pack,
    plan_micro_batches,
    to_device,
    token_scales,
)
from common.rollout import Completion, Sampling, make_sampler
from common.rows import IGSM, data_digest, held_out_examples, read_examples, report_golds, set_template
from common.trainer import (
    BadBatches,
    Checkpoints,
    Clock,
    Metrics,
    Totals,
    check_finite,
    export,
    gather_lists,
    init_world,
    keep_best,
    launch,
    learning_rate,
    load_policy,
    load_tokenizer,
    make_optimizer,
    optimizer_step,
    parse_args,
    peak_memory_gb,
    replay,
    set_context,
)
from common.verifiers import grade, grade_later

Shape = Literal["", "no_reshape", "logp", "p_logp", "square_root", "pow", "p_div_p_0.1", "p_div_p_0.3", "p_div_p_0.5"]


@dataclass
class Args:
    method: Literal["luffy", "grpo", "rl_sft", "sft"] = "luffy"
    """What to train; the defaults below follow it."""
    preset: Literal["paper", "tiny", "tiny_base"] = "paper"
    """paper: the published run. tiny: a Qwen2 of under a million parameters on symbolic iGSM, for a laptop.
    tiny_base: how the base model of tiny was made (with --method sft; models/tiny/make.py)."""

    # what
    model: str = "Elliott/Qwen2.5-Math-7B-16k-think"
    """Model folder or Hub name; "scratch" is a small Qwen2 with random weights and the symbolic iGSM tokenizer."""
    data: str = "Elliott/Openr1-Math-46k-8192"
    """Training rows: a file, a folder, a Hub name, or igsm:LO-HI for symbolic iGSM problems of LO to HI operations
    (modulus 23). README has a table of all shapes of rows."""
    eval_data: tuple[str, ...] = ()
    """Held-out rows, in the formats of --data. Hub names: the test split; igsm: problems whose templates are not in the
    training set."""
    igsm_problems: int = 20000
    """How many problems igsm:LO-HI makes."""
    out: str = "runs/luffy"
    """Run folder. Running the same command again goes on from its last checkpoint."""
    chat_template: str = ""
    """File with a Jinja chat template; empty takes the tokenizer's own. It is saved with the model."""
    chat_template_args: tuple[str, ...] = ()
    """Settings of a template's switches, key=value, as in enable_thinking=false. They are saved with the model."""
    verifier: str = "math"
    """How answers are graded: math (LUFFY's rule: what follows </think>), robust (for your own data), ... or
    "module:function" of your own, (response, gold) -> reward (common/verifiers.py)."""
    max_prompt_tokens: int = 1024
    """Rows with longer prompts are left out and counted."""
    max_response_tokens: int = 8192
    """Tokens to sample at most, the longest trace, and what the summed loss of a row is divided by."""
    long_trace: Literal["reject", "cut"] = "reject"
    """A trace longer than that: leave the row out, or cut it as the published code did."""
    empty_trace: Literal["error", "drop", "on_policy"] = "error"
    """A row without a trace: stop, leave it out, or train it with own answers only."""

    # how: the published run
    steps: int = 500
    """Rollout steps (the paper's 500); 0 follows --epochs."""
    epochs: float = 3.0
    """Passes over the data where --steps is 0 (sft, as published)."""
    batch_size: int = 128
    """Questions a step."""
    group_size: int = 8
    """Rows a question, the teacher's included."""
    teacher_rows: int = 1
    """Rows of them that are the teacher's trace."""
    updates_per_step: int = 2
    """Optimizer updates a step (published: mini-batches of 64 questions)."""
    temperature: float = 1.0
    """Sampling temperature; the policy that is trained is the one at this temperature."""
    shaping_gamma: float = 0.1
    """gamma of f(p) = p / (p + gamma) on the teacher's tokens; 0 trains on p itself (mixed policy, no shaping)."""
    shape: Shape = ""
    """Another f on the teacher's tokens, by its published name; empty follows --shaping_gamma."""
    own_shape: Shape = ""
    """The same on own tokens' ratio (the paper's Table 4: p_div_p_0.1 with --teacher_rows 0); empty for none."""
    clip: float = 0.0
    """PPO clip of the own tokens' ratio; 0 for none (published: none for luffy, 0.2 for grpo)."""
    tis_cap: float = 0.0
    """Weigh own tokens by min(p_trainer / p_sampler, this): truncated importance sampling, for a sampler in
    lower precision than the trainer; 0 for none (published)."""
    std: bool = False
    """Divide advantages by the group's standard deviation (the paper's Eq. 4; the published code does not)."""
    entropy_coef: float = 0.001
    """Entropy bonus (every published script; the paper's text says 0.01)."""
    sft_coef: float = 1.0
    """Weight of rl_sft's SFT term."""
    sft_rows_per_mean: int = 1
    """sft: the loss is the mean of token means of so many traces each (published: 1); 0 is one mean over all tokens."""
    loss_rows: float = 64.0
    """Rows of an update that one GPU of the published run held; scales the summed loss and the entropy bonus (see
    "Scale" at the top of this file). On 8 GPUs 64, on 16 GPUs 32."""
    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup: float = 0.0
    """Share of the updates over which the rate rises linearly."""
    lr_floor: float = 0.0
    """Where linear and cosine end, as a share of the peak."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    weight_decay: float = 0.01
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Global gradient norm to clip to."""
    rope_theta: float = 0.0
    """Set RoPE's base before training and save it with the model (stock Qwen2.5-Math: 40000 with 16384 positions); 0
    keeps the model's."""
    max_positions: int = 0
    """Set max_position_embeddings likewise; 0 keeps the model's."""
    seed: int = 0
    """Seeds data order, sampling and random weights."""

    # machinery
    micro_batch_tokens: int = 32768
    """Tokens of a packed micro-batch on each rank; memory, never the gradient, depends on it."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass."""
    rollout: str = "auto"
    """Where answers are sampled. embedded: in this process. vllm: by a vLLM process beside each rank, which the script
    starts (docs/rollout.md). auto: vllm on CUDA, embedded on a CPU."""
    rollout_gpu_memory: float = 0.7
    """Fraction of each GPU's memory for vLLM, which frees it while the trainer updates."""
    sampler_tokens: int = 0
    """Rows x (prompt + response) tokens that the embedded sampler decodes at once; 0: 65,536 on a CPU, what half of the
    free memory holds on a GPU."""
    max_mismatch: float = 0.0
    """Stop if the sampler's and the trainer's log-probs of the same tokens differ by more on average (stale
    weights, another template); 0 takes 0.05 on CUDA and 0.001 on a CPU."""
    eval_every: int = 10
    """Evaluate every so many steps, and before the first and after the last; 0 never."""
    eval_temperature: float = 0.6
    """Temperature of evaluation (published: 0.6); 0 is greedy."""
    eval_limit: int = 0
    """Rows of each evaluation file at most; 0 for all."""
    save_every: int = 50
    """Checkpoint every so many steps; 0 never."""
    keep: int = 2
    """Checkpoints to keep; the second last is the way out where the last one is damaged."""
    keep_best: bool = False
    """Also keep the model of the highest eval/mean, in OUT/best."""
    skip_bad_updates: bool = False
    """Go on without an update whose loss, gradient or log-probs are not finite; else stop. Either way its batch is
    written to OUT/bad/step-N."""
    replay: str = ""
    """A folder OUT/bad/step-N: show what each of its rows does to loss and gradient, with the weights it met, and
    stop."""
    timeout_minutes: float = 30.0
    """End the run if a rank has not answered the others for so long."""
    profile: int = 0
    """Trace so many steps, after the first: OUT/profile, and where their time went on the terminal."""
    log_samples: int = 4
    """Rows a step to write to samples.jsonl."""
    tensorboard: bool = False
    """Also log to TensorBoard (in the run folder)."""
    wandb: str = ""
    """Also log to this Weights & Biases project."""


METHODS = {
    "grpo": dict(teacher_rows=0, clip=0.2, out="runs/luffy_grpo"),
    "rl_sft": dict(out="runs/luffy_rl_sft"),
    "sft": dict(out="runs/luffy_sft", lr=5e-5, schedule="cosine", lr_floor=0.1, warmup=0.1, steps=0, batch_size=64,
                group_size=1, updates_per_step=1, entropy_coef=0.0, betas=(0.9, 0.95), weight_decay=0.0),
}
PRESETS = {
    "tiny": dict(
        model="models/tiny", data="igsm:5-8", eval_data=("igsm:5-8",), out="runs/tiny", verifier="boxed",
        max_prompt_tokens=160, max_response_tokens=160, steps=60, batch_size=16, lr=2e-4, eval_every=20,
        eval_limit=128, save_every=20, micro_batch_tokens=4096, gradient_checkpointing=False, betas=(0.9, 0.999),
        weight_decay=0.01, sft_rows_per_mean=0,
        method={name: dict(out=f"runs/tiny_{name}") for name in METHODS},
    ),
    "tiny_base": dict(
        model="scratch", data="igsm:2-8", igsm_problems=200000, eval_data=("igsm:5-8",),
        out="runs/tiny_base", verifier="boxed", max_prompt_tokens=160, max_response_tokens=160, steps=3000,
        batch_size=64, lr=1.5e-3, warmup=0.02, lr_floor=0.02, betas=(0.9, 0.99), weight_decay=0.1, eval_every=500,
        eval_limit=300, eval_temperature=0.0, save_every=500, log_samples=0, micro_batch_tokens=4096,
        gradient_checkpointing=False, sft_rows_per_mean=0,
    ),
}
SCRATCH = dict(
    model_type="qwen2", hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False,
)


# ------------------------------------------------------------------------------------------ the mathematics


def group_advantages(rewards, groups, *, std: bool = False, baseline=None):
    """A_i = R_i - mean of the rewards of i's group (Eq. 4); with `std` also divided by their unbiased std + 1e-6.

    rewards [B] float, groups [B] int (which question a row belongs to) -> [B], of rewards' dtype.
    baseline [B] bool: the rows that set mean and std; None takes all rows, the teacher's included. Rows that
    set no baseline get one all the same (rl_sft: own answers set it); a std of zero counts as 1 then.
    A group in which one row sets the baseline has mean 0 and std 1.

    >>> group_advantages(torch.tensor([1.0, 0, 0, 0]), torch.tensor([7, 7, 7, 7])).tolist()
    [0.75, -0.25, -0.25, -0.25]
    """
    counted = torch.ones_like(groups, dtype=torch.bool) if baseline is None else baseline
    _, group = groups.unique(return_inverse=True)  # [B], 0 .. G-1
    weight = counted.to(rewards.dtype)
    zeros = rewards.new_zeros(int(group.max()) + 1 if len(group) else 0)
    n = zeros.index_add(0, group, weight)  # [G]
    mean = zeros.index_add(0, group, weight * rewards) / n.clamp(min=1)
    mean = torch.where(n > 1, mean, 0.0)
    advantages = rewards - mean[group]
    if not std:
        return advantages
    variance = zeros.index_add(0, group, weight * advantages**2) / (n - 1).clamp(min=1)
    sigma = torch.where(n > 1, variance.sqrt(), 1.0)
    if baseline is not None:
        sigma = torch.where(sigma == 0, 1.0, sigma)
    return advantages / (sigma[group] + 1e-6)


def shaped(logp, shape: str):
    """f(p) of policy shaping by its published name: no_reshape p, p_div_p_X p / (p + X) for any number X,
    square_root (or pow) p^0.5, logp log p, p_logp p + log p.

    >>> [round(shaped(torch.tensor(0.25).log(), name).item(), 4) for name in ("no_reshape", "p_div_p_0.1", "pow")]
    [0.25, 0.7143, 0.5]
    """
    if shape.startswith("p_div_p_"):
        p = logp.exp()
        return p / (p + float(shape.removeprefix("p_div_p_")))
    return {
        "no_reshape": torch.exp, "logp": torch.clone, "p_logp": lambda x: x.exp() + x,
        "square_root": lambda x: (x / 2).exp(), "pow": lambda x: (x / 2).exp(),
    }[shape](logp)  # fmt: skip


def luffy_token_loss(
    logp, old_logp, advantages, off_policy, *, gamma: float | None = 0.1, clip: float | None = None,
    shape: str = "", own_shape: str = "no_reshape", teacher_logp=None,
):  # fmt: skip
    """Loss of each token, elementwise over any shape; what is summed in Eq. 5-8, with the sign of a loss.

    Teacher's tokens (off_policy True):  - A f(p),  f(p) = p / (p + gamma), p live: the gradient goes through f
                                         (gamma None: - A p; `shape`: another f, see `shaped`)
    own tokens:                          - A r,  r = p / p_old;  with clip c: max(- A r, - A clamp(r, 1-c, 1+c))
                                         (own_shape: r = f(p) / f(p_old), where f is a product, or f(p / p_old))
    teacher_logp, where it is not NaN, is the teacher's own log-prob: - A p / (p_teacher + 1e-6) instead of f.

    >>> loss = luffy_token_loss(torch.log(torch.tensor([0.1])), torch.zeros(1), torch.ones(1), torch.tensor([True]))
    >>> round(loss.item(), 6)
    -0.5
    """
    shape = shape or ("no_reshape" if gamma is None else f"p_div_p_{gamma}")
    off_logp = torch.where(off_policy, logp, 0.0)
    off_ratio = shaped(off_logp, shape)
    if teacher_logp is not None:
        known = ~teacher_logp.isnan()
        given = off_logp.exp() / (torch.where(known, teacher_logp, 0.0).exp() + 1e-6)
        off_ratio = torch.where(known, given, off_ratio)
    off_loss = -advantages * off_ratio
    # the branch that is not taken must not overflow: its zero gradient times inf would be NaN
    if own_shape.startswith("p_div_p_"):
        ratio = shaped(torch.where(off_policy, 0.0, logp), own_shape) / shaped(old_logp, own_shape)
    else:
        ratio = shaped(torch.where(off_policy, 0.0, logp - old_logp), own_shape)
    on_loss = -advantages * ratio
    if clip is not None:
        on_loss = torch.maximum(on_loss, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return torch.where(off_policy, off_loss, on_loss)


def truncated_importance(old_logp, sampler_logp, cap: float):
    """w = min(p_old / p_sampler, cap), elementwise; 1 where there is no sampler (NaN: the teacher's tokens).

    p_old and p_sampler are the same weights as two programs compute them (TIS: Yao et al. 2025). No gradient.

    >>> truncated_importance(torch.log(torch.tensor([0.2, 0.9])), torch.log(torch.tensor([0.2, 0.1])), 2.0).tolist()
    [1.0, 2.0]
    """
    weight = (old_logp - sampler_logp).detach().exp().clamp(max=cap)
    return torch.where(sampler_logp.isnan(), 1.0, weight)


def published_micro_batches(tokens_per_row: float, rows: float = 64) -> int:
    """How many micro-batches of 32,768 tokens a GPU of the published run needed for its `rows` rows of an update.

    >>> published_micro_batches(2560), published_micro_batches(2560, rows=32)
    (5, 3)
    """
    return max(1, math.ceil(rows * tokens_per_row / 32768))


# ----------------------------------------------------------------------------------------------- one update


@dataclass
class Row:
    """An answer to a question: own (sampled) or the teacher's."""

    prompt: list[int]
    response: list[int]
    group: int  # which question of the step
    teacher: bool = False
    sampler_logps: list[float] | None = None  # log-probs that the sampler reported, or those of the teacher if given
    truncated: bool = False
    reward: float = 0.0
    status: str = ""  # the verifier's; empty: not graded
    detail: str | None = None  # why it is so
    advantage: float = 0.0


def micro_batches(rows: list[Row], args: Args, world):
    """This rank's packed micro-batches of an update: (token batch, its rows). As many on every rank."""
    lengths = [len(row.prompt) + len(row.response) - 1 for row in rows]
    for shares in plan_micro_batches(lengths, world.size, args.micro_batch_tokens):
        mine = [rows[i] for i in shares[world.rank]]
        yield pack([(row.prompt, row.response) for row in mine], world.device), mine


def per_token(batch, values: list) -> torch.Tensor:
    """One value a row -> [N], one for each of its response tokens."""
    if not values:
        return batch.targets.new_empty(0)
    return to_device(torch.tensor(values), batch.targets.device)[batch.sequence]


def rows_with_gradient(rows: list[Row], args: Args) -> list[Row]:
    """Rows that the gradient depends on: without an entropy bonus, an advantage of 0 leaves nothing to compute.
    One row at least, so that there is a gradient (of zeros)."""
    if args.method == "sft" or args.entropy_coef:
        return rows
    return [row for row in rows if row.advantage or (row.teacher and args.method == "rl_sft")] or rows[:1]


def accumulate_gradient(policy, rows: list[Row], old_logps: list | None, args: Args, world) -> dict[str, float]:
    """Forward and backward of one update, summed over ranks and micro-batches; the gradient is left in .grad.

    Every denominator is counted over the whole update before the first backward, so the gradient is the same
    for any number of ranks and any micro_batch_tokens. old_logps: the behaviour policy's log-probs, a tensor
    for each micro-batch; None where it is the policy as it is now (then the ratio is exactly 1).
    Metrics of tokens are means over `rows_with_gradient`."""
    n_tokens = sum(len(row.response) for row in rows)
    n_teacher_tokens = sum(len(row.response) for row in rows if row.teacher)
    tokens_per_row = sum(len(row.prompt) + len(row.response) for row in rows) / len(rows)
    n_micro = published_micro_batches(tokens_per_row, args.loss_rows)
    row_scale = args.loss_rows / (len(rows) * args.max_response_tokens)
    totals, largest = Totals(world), torch.zeros((), dtype=torch.float64, device=world.device)
    counted = rows_with_gradient(rows, args)
    shape = args.shape or (f"p_div_p_{args.shaping_gamma}" if args.shaping_gamma else "no_reshape")
    scales = token_scales([len(row.response) for row in rows], args.sft_rows_per_mean)  # of sft
    scales = {id(row): scale for row, scale in zip(rows, scales, strict=True)}
    for i, (batch, mine) in enumerate(micro_batches(counted, args, world)):
        logp, entropy = policy(batch, temperature=args.temperature, entropy=True)  # [N], [N]
        old = logp.detach() if old_logps is None else old_logps[i]
        teacher = per_token(batch, [row.teacher for row in mine]).bool()  # [N]
        advantage = per_token(batch, [row.advantage for row in mine])  # [N]
        drawn = [x for row in mine for x in (row.sampler_logps or [math.nan] * len(row.response))]
        sampler_logp = to_device(torch.tensor(drawn), logp.device)  # [N]
        pg_loss = sft_loss = logp.new_zeros(())
        if args.method == "sft":
            loss = sft_loss = -(logp * per_token(batch, [scales[id(row)] for row in mine])).sum() / n_tokens
        else:
            token_loss = luffy_token_loss(
                logp, old, advantage, teacher, clip=args.clip or None, shape=shape,
                own_shape=args.own_shape or "no_reshape", teacher_logp=sampler_logp,
            )
            if args.tis_cap:
                weight = truncated_importance(old, sampler_logp, args.tis_cap)
                token_loss = token_loss * torch.where(teacher, 1.0, weight)
            if args.method == "rl_sft":
                token_loss = torch.where(teacher, 0.0, token_loss)
            loss = pg_loss = token_loss.sum() * row_scale
            if args.method == "rl_sft" and n_teacher_tokens:
                sft_loss = -torch.where(teacher, logp, 0.0).sum() / n_teacher_tokens
                loss = loss + args.sft_coef * n_micro * sft_loss
        if args.entropy_coef:
            loss = loss - args.entropy_coef * n_micro * entropy.sum() / n_tokens
        (loss * world.size).backward()  # FSDP averages over ranks; the sum is what is wanted

        with torch.no_grad():
            gone = torch.where(teacher, 0.0, logp - old)  # since the rows were sampled
            gap = torch.where(teacher, 0.0, old - sampler_logp).double()  # trainer's minus sampler's, of own tokens
            totals.add(
                pg_loss=pg_loss, sft_loss=sft_loss, entropy=entropy.sum(), kl_old=-gone.sum(),
                teacher_logp=torch.where(teacher, logp, 0.0).sum(),
                teacher_shaped=torch.where(teacher, shaped(logp, shape), 0.0).sum(),
                clipped=((gone.exp() - 1).abs() > (args.clip or math.inf)).sum(),
                mismatch=gap.abs().sum(), mismatch_kl=-gap.sum(),
            )  # fmt: skip
            largest = torch.cat([largest[None], gap.abs()]).max()
    total = totals.reduce()
    own_tokens, teacher_tokens = (sum(len(r.response) for r in counted if r.teacher == t) for t in (False, True))
    metrics = {"policy/entropy": total["entropy"] / (own_tokens + teacher_tokens)}
    if args.method in ("sft", "rl_sft"):
        metrics["loss/sft"] = total["sft_loss"]
    if teacher_tokens:
        metrics["teacher/logp"] = total["teacher_logp"] / teacher_tokens
        metrics["teacher/shaped_ratio"] = total["teacher_shaped"] / teacher_tokens
    if args.method != "sft":
        metrics["loss/pg"] = total["pg_loss"]
        metrics |= {f"policy/{name}": total[name] / max(1, own_tokens) for name in ("clipped", "kl_old")}
        # how far the trainer's log-probs are from the sampler's on the tokens that it drew
        metrics["mismatch/mean_abs"] = total["mismatch"] / max(1, own_tokens)
        metrics["mismatch/kl"] = total["mismatch_kl"] / max(1, own_tokens)
        metrics["mismatch/max"] = max(gather_lists([largest.item()], world))
    return metrics


def replayed(rows: list[Row], old_logps, args: Args, world, policy) -> dict[str, float]:
    """The update of --replay."""
    return accumulate_gradient(policy, rows, old_logps, args, world)


@torch.no_grad()
def policy_logps(policy, rows: list[Row], args: Args, world) -> list[torch.Tensor]:
    """Log-probs of the rows' tokens under the policy as it is, a tensor for each micro-batch of this rank; 0 for the
    teacher's, of which nobody asks them."""
    logps = []
    for batch, mine in micro_batches(rows_with_gradient(rows, args), args, world):
        own = pack([(row.prompt, row.response) for row in mine if not row.teacher], world.device)
        own_logp = policy(own, temperature=args.temperature)
        logp = own_logp.new_zeros(len(batch.targets))
        logp[~per_token(batch, [row.teacher for row in mine]).bool()] = own_logp
        logps.append(logp)
    return logps


# ------------------------------------------------------------------------------------------------- the loop


def grade_rows(rows: list[Row], batch, tokenizer, args: Args) -> Future:
    """The verdicts on rows of a step, in the background; of what was said before the eos."""
    texts = [tokenizer.decode(row.response if row.truncated else row.response[:-1]) for row in rows]
    return grade_later(texts, [batch[row.group].gold for row in rows], verifier=args.verifier)


def check(args: Args) -> None:
    """Raise InputError for settings that cannot work together."""
    positive = ("batch_size", "group_size", "updates_per_step", "max_response_tokens", "max_prompt_tokens", "epochs",
                "temperature", "keep")
    for name in positive:
        if getattr(args, name) <= 0:
            raise InputError(f"--{name} must be positive, not {getattr(args, name)}")
    if args.batch_size % args.updates_per_step:
        raise InputError(
            f"--batch_size {args.batch_size} does not divide into --updates_per_step {args.updates_per_step}"
        )
    if args.method == "sft":
        if args.teacher_rows != 1 or args.empty_trace == "on_policy":
            raise InputError("--method sft trains on one trace a question and on nothing else: it needs --teacher_rows "
                             f"1 and --empty_trace error or drop, not {args.teacher_rows} and {args.empty_trace}")
    elif not 0 <= args.teacher_rows < args.group_size:
        raise InputError(f"--teacher_rows {args.teacher_rows} must be under --group_size {args.group_size}")
    if args.tis_cap and args.tis_cap < 1:
        raise InputError(f"--tis_cap must be 1 or more, or 0 for none, not {args.tis_cap}")
    if args.steps < 0:
        raise InputError(f"--steps must be positive, or 0 to follow --epochs, not {args.steps}")
    check_verifier(args.verifier)


def evaluate(sampler, tokenizer, examples, args: Args, world) -> dict[str, float]:
    """Accuracy on held-out examples, by data source and their unweighted mean; shared out over the ranks."""
    mine = examples[world.rank :: world.size]
    groups = sampler.generate(
        [e.prompt for e in mine], n=1, keys=[e.index for e in mine], seed=args.seed + 1,
        sampling=Sampling(args.max_response_tokens, args.eval_temperature),
        progress="evaluate" if world.main else None,
    )
    texts = [tokenizer.decode(g[0].said) for g in groups]
    verdicts = grade(texts, [e.gold for e in mine], verifier=args.verifier)
    report_golds(mine, verdicts)
    results = gather_lists(
        [(e.source, v.reward, g[0].truncated) for e, v, g in zip(mine, verdicts, groups, strict=True)], world
    )
    by_source = {s: [r for source, r, _ in results if source == s] for s in sorted({r[0] for r in results})}
    accuracy = {f"eval/{source}": sum(r) / len(r) for source, r in by_source.items()}
    mean = sum(accuracy.values()) / len(accuracy)
    return accuracy | {"eval/mean": mean, "eval/truncated": sum(r[2] for r in results) / len(results)}


def main(args: Args) -> None:
    if args.replay:
        return replay(args.replay, Args, Row, replayed)
    check(args)
    world = init_world(args.timeout_minutes)
    out = Path(args.out)
    checkpoints = Checkpoints(out / "checkpoint", args, keep=args.keep)
    state = checkpoints.state()
    start = state["step"] if state else 0

    scratch = args.model == "scratch"
    tokenizer = igsm.tokenizer("symbolic", modulus=IGSM["modulus"]) if scratch else load_tokenizer(args.model)
    set_template(tokenizer, args.chat_template, args.chat_template_args)
    examples, left_out = read_examples(
        args.data, tokenizer, args, split="train", traces="needed" if args.teacher_rows else "ignored",
        golds=args.method != "sft", empty_trace=args.empty_trace, long_trace=args.long_trace, progress=world.main,
    )
    held_out = held_out_examples(tokenizer, args)
    digest = data_digest(*([(e.prompt, e.trace, e.gold) for e in part] for part in (examples, held_out)))
    checkpoints.check_data(state, digest, f"--data {args.data}")
    if len(examples) < args.batch_size:
        raise InputError(f"--data {args.data}: {len(examples)} rows are fewer than --batch_size {args.batch_size}")
    steps = args.steps or max(1, int(args.epochs * (len(examples) // args.batch_size)))
    if world.main:
        print(f"{args.data}: {left_out}; {len(held_out)} held-out; {steps} steps of {args.batch_size} questions")

    config = dict(SCRATCH, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
                  pad_token_id=tokenizer.pad_token_id) if scratch else None
    policy = load_policy(
        args.model, world, from_config=config, seed=args.seed, gradient_checkpointing=args.gradient_checkpointing,
        edit_config=partial(set_context, args),
    )
    optimizer = make_optimizer(policy, lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
    if state:
        checkpoints.load(policy, optimizer)
    elif args.save_every:
        checkpoints.check_space(policy)
    also_stop = policy.lm.generation_config.eos_token_id or []
    stop_ids = [tokenizer.eos_token_id, *(also_stop if isinstance(also_stop, list) else [also_stop])]
    sampler = make_sampler(
        args.rollout, policy, world, stop_ids=stop_ids, max_batch_tokens=args.sampler_tokens,
        max_tokens=args.max_prompt_tokens + args.max_response_tokens, gpu_memory=args.rollout_gpu_memory,
    )
    sampler.sync(policy, version=start)
    max_mismatch = args.max_mismatch or (0.05 if world.device.type == "cuda" else 0.001)
    teacher_verdicts: dict[int, Future] = {}  # by example: a trace is graded once

    curves = [["eval/mean"], ["reward/own", "reward/teacher"], ["group/solve_all", "group/solve_none"],
              ["policy/entropy"], ["teacher/logp"], ["length/own"], ["loss/pg"], ["loss/sft"], ["optim/grad_norm"],
              ["mismatch/mean_abs"]]
    bad_batches, models = BadBatches(out, args, world, skip=args.skip_bad_updates), {"policy": policy}
    metrics = Metrics(out, args, world, start=start, steps=steps, curves=curves)
    if start == 0 and held_out and args.eval_every:
        metrics.log(0, evaluate(sampler, tokenizer, held_out, args, world), show=["eval/mean"])
    clock = Clock(args.profile, out)

    for step in range(start + 1, steps + 1):
        batch = [examples[i] for i in batch_indices(len(examples), args.batch_size, step - 1, args.seed)]
        mine = range(world.rank, len(batch), world.size)  # questions that this rank samples and grades

        # 1. sample; the answers to a question are graded while others are still being written
        with clock("sample"):
            teachers = [args.teacher_rows if e.trace else 0 for e in batch]
            rows = [
                Row(e.prompt, e.trace, g, True, e.trace_logps, truncated=e.trace[-1] != tokenizer.eos_token_id)
                for g in mine for e in [batch[g]] * teachers[g]
            ]
            own_verdicts: list[tuple[list[Row], Future]] = []

            def answered(i: int, group: list[Completion], rows=rows, batch=batch, mine=mine, grading=own_verdicts):
                g = mine[i]
                own = [Row(batch[g].prompt, c.ids, g, False, c.logps, c.truncated) for c in group]
                rows.extend(own)
                grading.append((own, grade_rows(own, batch, tokenizer, args)))

            if args.method != "sft":
                for row in [r for r in rows if batch[r.group].index not in teacher_verdicts]:
                    teacher_verdicts[batch[row.group].index] = grade_rows([row], batch, tokenizer, args)
                sampler.generate(
                    [batch[g].prompt for g in mine], n=[args.group_size - teachers[g] for g in mine],
                    keys=[batch[g].index for g in mine], seed=args.seed * 1_000_003 + step,
                    sampling=Sampling(args.max_response_tokens, args.temperature),
                    progress="sample" if world.main and args.max_response_tokens > 1000 else None,
                    drawn=answered,
                )

        # 2. reward
        with clock("reward"):
            if args.method != "sft":
                teacher = [([r], teacher_verdicts[batch[r.group].index]) for r in rows if r.teacher]
                for graded, verdicts in own_verdicts + teacher:
                    for row, verdict in zip(graded, verdicts.result(), strict=True):
                        row.reward, row.status, row.detail = verdict
                    report_golds([batch[row.group] for row in graded], graded)
            rows = sorted(gather_lists(rows, world), key=lambda row: row.group)  # every rank has all rows now

        # 3. advantages
        rewards = torch.tensor([row.reward for row in rows])  # [B]
        question = torch.tensor([row.group for row in rows])  # [B]
        own = torch.tensor([not row.teacher for row in rows])  # [B]
        baseline = own if args.method == "rl_sft" else None
        for row, a in zip(rows, group_advantages(rewards, question, std=args.std, baseline=baseline), strict=True):
            row.advantage = a.item()

        # 4. update
        with clock("update"):
            sampler.sleep()  # its memory is the trainer's until the sync
            per_update = args.batch_size // args.updates_per_step
            updates = [[r for r in rows if r.group // per_update == u] for u in range(args.updates_per_step)]
            old = [None] + [policy_logps(policy, u, args, world) for u in updates[1:]]
            logs = []
            for u, update in enumerate(updates):
                lr = learning_rate(
                    (step - 1) * args.updates_per_step + u, lr=args.lr, steps=steps * args.updates_per_step,
                    schedule=args.schedule, warmup=args.warmup, floor=args.lr_floor,
                )
                texts = partial(sample_rows, update, batch, tokenizer)
                with bad_batches(step, update, models, texts, old[u]):
                    log = accumulate_gradient(policy, update, old[u], args, world)
                    check_finite(log, policy, world)
                    if log.get("mismatch/mean_abs", 0.0) > max_mismatch:
                        raise RuntimeError(
                            f"step {step}: the sampler's log-probs differ from the trainer's by "
                            f"{log['mismatch/mean_abs']:.4f} a token (--max_mismatch {max_mismatch}): the weights did "
                            "not arrive in the sampler, or it does not run the same model"
                        )
                    log["optim/grad_norm"] = optimizer_step(policy, optimizer, lr=lr, max_grad_norm=args.max_grad_norm)
                    logs.append(log | {"optim/lr": lr})

        # 5. sync
        with clock("sync"):
            sampler.sync(policy, version=step)

        # 6. log, evaluate, save
        logged = {k: [log[k] for log in logs if k in log] for k in dict.fromkeys(k for log in logs for k in log)}
        row_log = {k: sum(values) / len(values) for k, values in logged.items()}  # means over the updates
        row_log |= describe(rows)
        if held_out and args.eval_every and (step % args.eval_every == 0 or step == steps):
            with clock("evaluate"):
                row_log |= evaluate(sampler, tokenizer, held_out, args, world)
                if args.keep_best:
                    keep_best(policy, tokenizer, out, world, row_log["eval/mean"])
        seconds = clock.flush()
        tokens = sum(len(row.prompt) + len(row.response) for row in rows)
        row_log |= seconds | {"speed/tokens_per_second": tokens / seconds["seconds/step"]}
        row_log["speed/useful_share"] = policy.useful_share()
        metrics.log(
            step, row_log | {"memory/peak_gb": peak_memory_gb(world), "update/skipped": bad_batches.skipped or None},
            show=["reward/own", "eval/mean", "policy/entropy", "teacher/logp"],
        )
        shown = random.Random(step).sample(rows, min(args.log_samples, len(rows)))
        metrics.samples(step, sample_rows(shown, batch, tokenizer))
        if args.save_every and (step % args.save_every == 0 or step == steps):
            checkpoints.save(step, policy, optimizer, world)
    checkpoints.wait()
    export(policy, tokenizer, out / "model", world)
    sampler.close()
    metrics.close()


def describe(rows: list[Row]) -> dict[str, float]:
    """What a practitioner looks at in the rows of a step."""

    def mean(values) -> float | None:
        values = list(values)
        return sum(values) / len(values) if values else None

    own, teacher = [r for r in rows if not r.teacher], [r for r in rows if r.teacher]
    graded = [r for r in rows if r.status]  # all, or with sft none
    solved: dict[int, list[float]] = {}
    for row in own:
        solved.setdefault(row.group, []).append(row.reward)
    statuses = ("ok", "timeout", "error", "unparsable")
    return {
        "reward/own": mean(r.reward for r in own), "reward/teacher": mean(r.reward for r in graded if r.teacher),
        "group/solve_all": mean(min(g) > 0 for g in solved.values()),
        "group/solve_none": mean(max(g) <= 0 for g in solved.values()),
        "teacher/advantage": mean(r.advantage for r in graded if r.teacher),
        "length/own": mean(len(r.response) for r in own), "length/teacher": mean(len(r.response) for r in teacher),
        "length/truncated": mean(r.truncated for r in own),
    } | {f"verifier/{s}": mean(r.status == s for r in graded) for s in statuses}


def sample_rows(rows: list[Row], batch, tokenizer) -> list[dict]:
    """Rows as text, for samples.jsonl; batch: the step's examples."""
    return [
        {
            "who": "teacher" if row.teacher else "own", "reward": row.reward if row.status else None,
            "detail": row.detail, "advantage": row.advantage,
            "gold": batch[row.group].gold, "prompt": batch[row.group].text, "response": tokenizer.decode(row.response),
        }
        for row in rows
    ]


if __name__ == "__main__":
    args = parse_args(Args, None, method=METHODS, preset=PRESETS)
    launch(main, args)
