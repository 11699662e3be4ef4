"""ReLIFT: what reinforcement learning cannot learn, fine-tuned in between (Ma et al., arXiv 2506.07527).

RL makes a model better at what it sometimes gets right, and cannot move what it never does: where all answers to
a question are wrong, their advantages are zero. SFT can, but needs a demonstration for everything and wears out
what the model was good at. ReLIFT does RL, keeps the questions that a whole group of rollouts failed in a buffer,
and when it holds `sft_data_size` of them, one SFT update on their demonstrations follows the RL update.

    RL    A_i = R_i - mean(R_1 .. R_G)                   loss = - sum_i sum_t (p_t / p_old_t) A_i
    SFT   hardest questions only, newest first           loss = mean_t (- log p_t - 0.001 H_t)

Nearest to LUFFY, which puts a demonstration into every group: ReLIFT uses them only where RL has nothing to say,
apart from the RL loss, with an AdamW (own moments, own rate) and a gradient clip for the SFT updates alone.

--method picks ReLIFT or what it is compared with:
  relift   the above: no std, no clip, no KL, no length normalisation (the sum is divided by max_response_tokens)
  grpo     RL alone, as the published script runs it: PPO clip 0.2, gradient clip 1.0 (relift: none and 0.7).
           `--sft_data_size -1` is relift without its SFT updates and nothing else changed
  sft      the demonstrations alone, 3 epochs (the settings are not published: LUFFY's are taken)

Where this file departs from the published code, and why:
- The buffer and the SFT optimizer's states are in the checkpoint; the published run lost both.
- A step without a hardest question is a step like any other; the published code took the length of None.
- The SFT gradient is the true mean on any number of GPUs; the published one was that divided by their number
  (8), which Adam hides but for epsilon and the clip: sft_max_grad_norm is 8 times the published one.
- The SFT loss was a mean over the tokens of a micro-batch of 4 rows (7B-Math; 2 elsewhere), averaged: it is that
  for `sft_rows_per_mean = 4` however rows are packed. 1 is the paper's text (1/|s| a demonstration), 0 one mean.
- A question is in the buffer once, and moves to the front when it fails again; it was there for every failure.
- relift verifies a demonstration before it uses it, and counts rejected ones (--no_verify_demonstrations as
  published).
- A question without a demonstration is skipped and counted; the published code trained on an eos at once.
- So is one whose demonstration is longer than max_response_tokens; the published code cut it and wrote an eos
  over its last token (--long_trace cut).
- The SFT rate is constant; the published SFT update moved the RL schedule on (unnoticed: it had no warm-up).
- Scale of the RL loss. The published gradient is the sum over a GPU's 64 rows / 8192, averaged over 8 GPUs:
  `loss_rows = 64` times the mean over all rows of an update gives the same on any number of GPUs. The entropy
  bonus was a mean over a micro-batch, summed over the micro-batches of 32,768 tokens that a GPU happened to need:
  it is the mean over the update times that number (`published_micro_batches`), computed from the rows' mean
  length and not from how this run packs them.
- An update holds whole groups (the published one mixed the rows of 128 prompts by length): same expectation.
- The first update of a step is exactly on-policy, so its ratio is 1 and p_old is not computed twice.
- The paper reports an SFT entropy coefficient of 1e-4 as best; the default is the scripts', 0.001.
As published: at most one SFT update a step, and what is left sinks in the buffer; a question is not tried again
before its demonstration is used; cut-off answers and those without `</think>` are failures like wrong ones; groups
that are all right or all wrong stay in the RL update and get the entropy bonus only.

Commands:
  python relift.py --preset tiny                                             a laptop, some minutes, nothing downloaded
  python relift.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl     one GPU
  torchrun --nproc_per_node 8 relift.py                                      the paper's run
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
    tokens_of_means,
)
from common.rollout import Completion, Sampling, make_sampler
from common.rows import IGSM, data_digest, held_out_examples, read_examples, report_golds, set_template
from common.trainer import (
    BadBatches,
    Checkpoints,
    Clock,
    Metrics,
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
    sum_over_ranks,
)
from common.verifiers import grade, grade_later


@dataclass
class Args:
    method: Literal["relift", "grpo", "sft"] = "relift"
    """What to train; the defaults below follow it."""
    preset: Literal["paper", "tiny"] = "paper"
    """paper: the published run. tiny: a Qwen2 of under a million parameters on symbolic iGSM, for a laptop."""

    # what
    model: str = "RoadQAQ/Qwen2.5-Math-7B-16k-think"
    """Model folder or Hub name; "scratch" is a small Qwen2 with random weights and the symbolic iGSM tokenizer."""
    data: str = "Elliott/Openr1-Math-46k-8192"
    """Training rows: a file, a folder, a Hub name, or igsm:LO-HI for symbolic iGSM problems of LO to HI operations
    (modulus 23). README has a table of all shapes of rows."""
    eval_data: tuple[str, ...] = ()
    """Held-out rows, in the formats of --data. Hub names: the test split; igsm: problems whose templates are not in the
    training set."""
    igsm_problems: int = 20000
    """How many problems igsm:LO-HI makes."""
    out: str = "runs/relift"
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
    """Tokens to sample at most, the longest demonstration, and what the summed loss of a row is divided by."""
    long_trace: Literal["reject", "cut"] = "reject"
    """A demonstration longer than that: do without it, or cut it as the published code did."""

    # how: the published run
    steps: int = 0
    """Rollout steps; 0 follows --epochs."""
    epochs: float = 3.0
    """Passes over the data where --steps is 0 (published: 3, some 1050 steps)."""
    batch_size: int = 128
    """Questions a step."""
    group_size: int = 8
    """Answers a question."""
    updates_per_step: int = 2
    """Optimizer updates a step (published: mini-batches of 64 questions)."""
    temperature: float = 1.0
    """Sampling temperature; the policy that is trained is the one at this temperature."""
    clip: float = 0.0
    """PPO clip of the ratio; 0 for none (published: none for relift, 0.2 for grpo)."""
    tis_cap: float = 0.0
    """Weigh tokens by min(p_trainer / p_sampler, this): truncated importance sampling, for a sampler in
    lower precision than the trainer; 0 for none (published)."""
    std: bool = False
    """Divide advantages by the group's standard deviation (the paper's text; the published code does not)."""
    entropy_coef: float = 0.001
    """Entropy bonus of the RL loss."""
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
    max_grad_norm: float = 0.7
    """Global gradient norm to clip to (published: 0.7 for relift, 1.0 for grpo)."""

    # the SFT updates in between
    sft_data_size: int = 128
    """relift: questions of an SFT update, and how many the buffer must hold for one; -1 for RL alone."""
    sft_on: Literal["hardest", "solved", "random", "all"] = "hardest"
    """Questions of a step to buffer. hardest: those that fail. solved: as many at random from the others (the paper's
    "random" ablation). random: as many at random from all. all: every question (the paper's ablation)."""
    sft_every: int = 0
    """Fine-tune after every so many steps on what the buffer holds (its newest sft_data_size at most), full or
    not (the paper's uniform interleaving); 0 as soon as it holds sft_data_size."""
    hard_threshold: float = 0.0
    """Share of right rollouts up to which a question counts as hardest (published: 0, all fail)."""
    verify_demonstrations: bool = True
    """relift: use only demonstrations that the verifier accepts (published: no)."""
    sft_lr: float = 1e-6
    """relift: learning rate of the SFT updates, constant; their AdamW has the betas and weight decay above."""
    sft_max_grad_norm: float = 8.0
    """relift: their gradient norm to clip to (published: 1, of an eighth of this gradient)."""
    sft_entropy_coef: float = 0.001
    """Entropy bonus of the SFT loss (every published script; the paper reports 1e-4 as best)."""
    sft_rows_per_mean: int = 4
    """The SFT loss is the mean of token means of so many demonstrations each (the published micro-batches: 4 for
    7B-Math, 2 elsewhere); 1 weighs demonstrations alike, 0 tokens."""
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
    buckets: bool = False
    """Log held-out accuracy by difficulty: easy, medium, hard and hardest are the questions that the model
    answers rightly 6 to 8, 3 to 5, 1 or 2, and 0 times of 8 before training (the paper's analysis)."""
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
    "grpo": dict(out="runs/relift_grpo", clip=0.2, max_grad_norm=1.0),
    "sft": dict(out="runs/relift_sft", lr=5e-5, schedule="cosine", lr_floor=0.1, warmup=0.1, batch_size=64,
                group_size=1, updates_per_step=1, max_grad_norm=1.0, sft_entropy_coef=0.0, sft_rows_per_mean=1,
                betas=(0.9, 0.95), weight_decay=0.0),
}
PRESETS = {
    "tiny": dict(
        model="models/tiny", data="igsm:5-8", eval_data=("igsm:5-8",), out="runs/tiny_relift", verifier="boxed",
        max_prompt_tokens=160, max_response_tokens=160, steps=60, batch_size=16, lr=2e-4, sft_data_size=16,
        sft_lr=2e-4, sft_max_grad_norm=1.0, eval_every=20, eval_limit=128, buckets=True, save_every=20,
        micro_batch_tokens=4096, gradient_checkpointing=False, betas=(0.9, 0.999), weight_decay=0.01,
        method={
            "grpo": dict(out="runs/tiny_relift_grpo"), "sft": dict(out="runs/tiny_relift_sft", sft_rows_per_mean=0),
        },
    ),
}
SCRATCH = dict(
    model_type="qwen2", hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False,
)


# ------------------------------------------------------------------------------------------ the mathematics


def group_advantages(rewards, groups, *, std: bool = False):
    """A_i = R_i - mean of the rewards of i's group; with `std` also divided by their unbiased std + 1e-6.

    rewards [B] float, groups [B] int (which question a row belongs to) -> [B], of rewards' dtype.
    A group of one row has mean 0 and std 1.

    >>> group_advantages(torch.tensor([1.0, 0, 0, 0]), torch.tensor([7, 7, 7, 7])).tolist()
    [0.75, -0.25, -0.25, -0.25]
    """
    _, group = groups.unique(return_inverse=True)  # [B], 0 .. G-1
    zeros = rewards.new_zeros(int(group.max()) + 1 if len(group) else 0)
    n = zeros.index_add(0, group, torch.ones_like(rewards))  # [G]
    mean = zeros.index_add(0, group, rewards) / n
    mean = torch.where(n > 1, mean, 0.0)
    advantages = rewards - mean[group]
    if not std:
        return advantages
    variance = zeros.index_add(0, group, advantages**2) / (n - 1).clamp(min=1)
    sigma = torch.where(n > 1, variance.sqrt(), 1.0)
    return advantages / (sigma[group] + 1e-6)


def policy_token_loss(logp, old_logp, advantages, *, clip: float | None = None):
    """RL loss of each token, elementwise over any shape: - A r, r = p / p_old;
    with clip c: max(- A r, - A clamp(r, 1-c, 1+c)).

    >>> loss = policy_token_loss(torch.tensor([0.6]).log(), torch.tensor([0.4]).log(), torch.ones(1), clip=0.2)
    >>> round(loss.item(), 6)
    -1.2
    """
    ratio = (logp - old_logp).exp()
    loss = -advantages * ratio
    if clip is not None:
        loss = torch.maximum(loss, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return loss


def sft_token_loss(logp, entropy, mean_tokens, *, means: int, entropy_coef: float):
    """SFT loss of each token, to be summed: (1/M) sum_m (1/T_m) sum_{t in m} (- log p_t - c H_t).

    logp, entropy [N]; mean_tokens [N]: T_m of the mean m that a token belongs to (`tokens_of_means`); M means."""
    return (-logp - entropy_coef * entropy) / mean_tokens / means


def hardest_groups(rewards: list[float], groups: list[int], threshold: float = 0.0) -> list[int]:
    """Groups whose share of right rows (reward over 0) is at most `threshold`, in order of first appearance.

    >>> hardest_groups([0, 0, 1, 0, 0, 0], [7, 7, 3, 3, 5, 5])
    [7, 5]
    """
    right: dict[int, list[bool]] = {}
    for reward, group in zip(rewards, groups, strict=True):
        right.setdefault(group, []).append(reward > 0)
    return [group for group, flags in right.items() if sum(flags) / len(flags) <= threshold]


def questions_to_buffer(which: str, hardest: list[int], n: int, *, seed: str) -> list[int]:
    """The questions of 0 .. n - 1 that --sft_on names; "solved" gives fewer where fewer questions are not hardest.

    >>> questions_to_buffer("hardest", [1], 3, seed=""), sorted(questions_to_buffer("solved", [0, 2, 3], 5, seed=""))
    ([1], [1, 4])
    """
    if which in ("hardest", "all"):
        return hardest if which == "hardest" else list(range(n))
    pool = [i for i in range(n) if which == "random" or i not in hardest]
    return random.Random(seed).sample(pool, min(len(hardest), len(pool)))


class HardestBuffer:
    """Questions that wait for an SFT update, newest first, each at most once.

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
        """Put them in front, in their order; those that were there already move."""
        self.questions = list(dict.fromkeys([*questions, *self.questions]))

    def take(self, n: int) -> list:
        """Remove the first n (all, if there are fewer) and return them."""
        taken, self.questions = self.questions[:n], self.questions[n:]
        return taken

    def state_dict(self) -> dict:
        """What a checkpoint keeps, as plain JSON."""
        return {"questions": list(self.questions)}

    def load_state_dict(self, state: dict) -> None:
        self.questions = list(state["questions"])


def sft_is_due(step: int, held: int, args: Args) -> bool:
    """Whether an SFT update follows the RL update of `step` (1, 2, ...) when the buffer holds `held` questions."""
    if args.sft_every:
        return held > 0 and step % args.sft_every == 0
    return held >= args.sft_data_size


def difficulty(right: int) -> str:
    """Bucket of a question that the model answered rightly `right` times of 8 before training."""
    return "easy" if right >= 6 else "medium" if right >= 3 else "hard" if right >= 1 else "hardest"


def truncated_importance(old_logp, sampler_logp, cap: float):
    """w = min(p_old / p_sampler, cap), elementwise.

    p_old and p_sampler are the same weights as two programs compute them (TIS: Yao et al. 2025). No gradient.

    >>> truncated_importance(torch.log(torch.tensor([0.2, 0.9])), torch.log(torch.tensor([0.2, 0.1])), 2.0).tolist()
    [1.0, 2.0]
    """
    return (old_logp - sampler_logp).detach().exp().clamp(max=cap)


def published_micro_batches(tokens_per_row: float, rows: float = 64) -> int:
    """How many micro-batches of 32,768 tokens a GPU of the published run needed for its `rows` rows of an update.

    >>> published_micro_batches(2560), published_micro_batches(2560, rows=32)
    (5, 3)
    """
    return max(1, math.ceil(rows * tokens_per_row / 32768))


# ----------------------------------------------------------------------------------------------- one update


@dataclass
class Row:
    """An answer to a question: own (sampled) or the teacher's (its demonstration)."""

    prompt: list[int]
    response: list[int]
    group: int  # which question of the step
    teacher: bool = False
    sampler_logps: list[float] | None = None  # own rows: log-probs the sampler reported
    truncated: bool = False
    reward: float = 0.0
    status: str = ""  # the verifier's; empty: not graded
    detail: str | None = None  # why it is so
    advantage: float = 0.0
    mean_tokens: int = 0  # demonstrations: tokens of the mean that it is part of


def micro_batches(rows: list[Row], args: Args, world):
    """This rank's packed micro-batches of an update: (token batch, its rows). As many on every rank."""
    lengths = [len(row.prompt) + len(row.response) - 1 for row in rows]
    for shares in plan_micro_batches(lengths, world.size, args.micro_batch_tokens):
        mine = [rows[i] for i in shares[world.rank]]
        yield pack([(row.prompt, row.response) for row in mine], world.device), mine


def per_token(batch, values: list) -> torch.Tensor:
    """One value a row -> [N], one for each of its response tokens."""
    return torch.tensor(values, device=batch.targets.device)[batch.sequence] if values else batch.targets.new_empty(0)


def rows_with_gradient(rows: list[Row], args: Args) -> list[Row]:
    """Rows that the RL gradient depends on: without an entropy bonus, an advantage of 0 leaves nothing to compute.
    One row at least, so that there is a gradient (of zeros)."""
    return rows if args.entropy_coef else [row for row in rows if row.advantage] or rows[:1]


def accumulate_gradient(policy, rows: list[Row], old_logps: list | None, args: Args, world) -> dict[str, float]:
    """Forward and backward of one RL update, summed over ranks and micro-batches; the gradient is left in .grad.

    Every denominator is counted over the whole update before the first backward, so the gradient is the same
    for any number of ranks and any micro_batch_tokens. old_logps: the behaviour policy's log-probs, a tensor
    for each micro-batch; None where it is the policy as it is now (then the ratio is exactly 1).
    Metrics of tokens are means over `rows_with_gradient`."""
    n_tokens = sum(len(row.response) for row in rows)
    tokens_per_row = sum(len(row.prompt) + len(row.response) for row in rows) / len(rows)
    n_micro = published_micro_batches(tokens_per_row, args.loss_rows)
    row_scale = args.loss_rows / (len(rows) * args.max_response_tokens)
    names = ("pg_loss", "entropy", "clipped", "kl_old")
    sums = torch.zeros(len(names), dtype=torch.float64)
    mismatch: list[torch.Tensor] = []  # trainer's minus sampler's log-prob
    counted = rows_with_gradient(rows, args)
    for i, (batch, mine) in enumerate(micro_batches(counted, args, world)):
        logp, entropy = policy(batch, temperature=args.temperature, entropy=True)  # [N], [N]
        old = logp.detach() if old_logps is None else old_logps[i]
        advantage = per_token(batch, [row.advantage for row in mine])  # [N]
        drawn = [x for row in mine for x in row.sampler_logps]
        sampler_logp = torch.tensor(drawn, device=logp.device)  # [N]
        token_loss = policy_token_loss(logp, old, advantage, clip=args.clip or None)
        if args.tis_cap:
            token_loss = token_loss * truncated_importance(old, sampler_logp, args.tis_cap)
        loss = token_loss.sum() * row_scale
        sums[0] += loss.item()
        if args.entropy_coef:
            loss = loss - args.entropy_coef * n_micro * entropy.sum() / n_tokens
        (loss * world.size).backward()  # FSDP averages over ranks; the sum is what is wanted

        with torch.no_grad():
            ratio = (logp - old).exp()
            sums[1:] += torch.stack([
                entropy.sum(), ((ratio - 1).abs() > (args.clip or math.inf)).sum(), (old - logp).sum(),
            ]).double().cpu()
            mismatch.append((old - sampler_logp).cpu())
    total = dict(zip(names, sum_over_ranks(sums, world).tolist(), strict=True))
    metrics, n_counted = {"loss/pg": total["pg_loss"]}, sum(len(row.response) for row in counted)
    metrics |= {f"policy/{name}": total[name] / n_counted for name in ("entropy", "clipped", "kl_old")}
    return metrics | compare_logps(torch.cat(mismatch), world)


def accumulate_sft_gradient(policy, rows: list[Row], args: Args, world) -> dict[str, float]:
    """Forward and backward of one SFT update on demonstrations, at temperature 1; the gradient is left in .grad.

    The same for any number of ranks and any micro_batch_tokens; rows_per_mean follows the order of `rows`."""
    rows_per_mean = args.sft_rows_per_mean or len(rows)
    for row, tokens in zip(rows, tokens_of_means([len(r.response) for r in rows], rows_per_mean), strict=True):
        row.mean_tokens = tokens
    means = math.ceil(len(rows) / rows_per_mean)
    sums = torch.zeros(3, dtype=torch.float64)
    for batch, mine in micro_batches(rows, args, world):
        logp, entropy = policy(batch, entropy=True)  # [N], [N]
        mean_tokens = per_token(batch, [row.mean_tokens for row in mine])  # [N]
        loss = sft_token_loss(logp, entropy, mean_tokens, means=means, entropy_coef=args.sft_entropy_coef).sum()
        (loss * world.size).backward()  # FSDP averages over ranks; the sum is what is wanted
        with torch.no_grad():
            sums += torch.stack([loss, logp.sum(), entropy.sum()]).double().cpu()
    loss, logp, entropy = sum_over_ranks(sums, world).tolist()
    n_tokens = sum(len(row.response) for row in rows)
    return {"sft/loss": loss, "sft/logp": logp / n_tokens, "sft/entropy": entropy / n_tokens,
            "sft/length": n_tokens / len(rows)}


def compare_logps(difference: torch.Tensor, world) -> dict[str, float]:
    """How far the trainer's log-probs are from the sampler's on the tokens that it drew; [tokens] -> metrics."""
    d = difference.double()
    sums = sum_over_ranks(torch.tensor([len(d), d.abs().sum(), -d.sum()], dtype=torch.float64), world)
    largest = max(gather_lists([d.abs().max().item() if len(d) else 0.0], world))
    n = max(1.0, sums[0].item())
    return {"mismatch/mean_abs": sums[1].item() / n, "mismatch/kl": sums[2].item() / n, "mismatch/max": largest}


def replayed(rows: list[Row], old_logps, args: Args, world, policy) -> dict[str, float]:
    """The update of --replay."""
    if rows[0].teacher:
        return accumulate_sft_gradient(policy, rows, args, world)
    return accumulate_gradient(policy, rows, old_logps, args, world)


@torch.no_grad()
def policy_logps(policy, rows: list[Row], args: Args, world) -> list[torch.Tensor]:
    """Log-probs of the rows' tokens under the policy as it is, a tensor for each micro-batch of this rank."""
    batches = micro_batches(rows_with_gradient(rows, args), args, world)
    return [policy(batch, temperature=args.temperature) for batch, _ in batches]


# ------------------------------------------------------------------------------------------------- the loop


def read_questions(tokenizer, args: Args, *, traces: str, progress=False):
    """Examples of --data, and the counts of what was left out. Those without a demonstration stay in."""
    examples, left_out = read_examples(
        args.data, tokenizer, args, split="train", traces=traces, golds=args.method != "sft", empty_trace="on_policy",
        long_trace="cut", progress=progress,
    )
    for example in examples:
        if example.trace and example.trace[-1] != tokenizer.eos_token_id:  # it was too long, and is cut
            example.trace = [*example.trace[:-1], tokenizer.eos_token_id] if args.long_trace == "cut" else None
    return examples, left_out


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
    if args.sft_data_size < 1 and args.sft_data_size != -1:
        raise InputError(f"--sft_data_size must be positive, or -1 for RL alone, not {args.sft_data_size}")
    for name in ("sft_every", "sft_rows_per_mean"):
        if getattr(args, name) < 0:
            raise InputError(f"--{name} must not be negative, as {getattr(args, name)} is")
    if not 0 <= args.hard_threshold <= 1:
        raise InputError(f"--hard_threshold {args.hard_threshold} must be a share, from 0 to 1")
    if args.tis_cap and args.tis_cap < 1:
        raise InputError(f"--tis_cap must be 1 or more, or 0 for none, not {args.tis_cap}")
    if args.steps < 0:
        raise InputError(f"--steps must be positive, or 0 to follow --epochs, not {args.steps}")
    check_verifier(args.verifier)


def check_demonstrations(have: int, args: Args) -> None:
    """Raise InputError if the data's `have` demonstrations are too few for the SFT updates that are asked for."""
    if not have:
        raise InputError(
            f"--data {args.data}: no row has a demonstration (column 'target', at most --max_response_tokens "
            f"{args.max_response_tokens}), so there is nothing to fine-tune on; RL alone is --sft_data_size -1"
        )
    if args.method == "relift" and not args.sft_every and have < args.sft_data_size:
        raise InputError(
            f"--sft_data_size {args.sft_data_size}: only {have} questions have a demonstration, and the buffer "
            "holds each once, so it would never be full"
        )


def pass_counts(sampler, tokenizer, examples, args: Args, world) -> list[int]:
    """Right answers of 8 at the training temperature to each example; shared out over the ranks."""
    mine = range(world.rank, len(examples), world.size)
    groups = sampler.generate(
        [examples[i].prompt for i in mine], n=8, keys=[examples[i].index for i in mine], seed=args.seed + 2,
        sampling=Sampling(args.max_response_tokens, args.temperature), progress="buckets" if world.main else None,
    )
    texts = [tokenizer.decode(completion.said) for group in groups for completion in group]
    verdicts = grade(texts, [examples[i].gold for i in mine for _ in range(8)], verifier=args.verifier)
    right = [sum(v.reward > 0 for v in verdicts[8 * k : 8 * k + 8]) for k in range(len(mine))]
    return [count for _, count in sorted(gather_lists(list(zip(mine, right, strict=True)), world))]


def evaluate(sampler, tokenizer, examples, buckets: list[str], args: Args, world) -> dict[str, float]:
    """Accuracy on held-out examples, by data source and their unweighted mean; shared out over the ranks.

    buckets: also by difficulty, the name of each example's bucket; empty for none."""
    mine = examples[world.rank :: world.size]
    groups = sampler.generate(
        [e.prompt for e in mine], n=1, keys=[e.index for e in mine], seed=args.seed + 1,
        sampling=Sampling(args.max_response_tokens, args.eval_temperature),
        progress="evaluate" if world.main else None,
    )
    texts = [tokenizer.decode(g[0].said) for g in groups]
    verdicts = grade(texts, [e.gold for e in mine], verifier=args.verifier)
    report_golds(mine, verdicts)
    names = buckets[world.rank :: world.size] or [""] * len(mine)
    results = gather_lists(
        [
            (e.source, v.reward, g[0].truncated, len(g[0].ids), name)
            for e, v, g, name in zip(mine, verdicts, groups, names, strict=True)
        ], world
    )
    by_source = {s: [r[1] for r in results if r[0] == s] for s in sorted({r[0] for r in results})}
    accuracy = {f"eval/{source}": sum(r) / len(r) for source, r in by_source.items()}
    mean = sum(accuracy.values()) / len(accuracy)
    by_bucket = {b: [r[1] for r in results if r[4] == b] for b in dict.fromkeys(buckets)}
    return accuracy | {f"bucket/{b}": sum(r) / len(r) for b, r in by_bucket.items()} | {
        "eval/mean": mean, "eval/truncated": sum(r[2] for r in results) / len(results),
        "eval/length": sum(r[3] for r in results) / len(results),
    }


def with_demonstration(questions: list[int], examples, verdicts: dict[int, bool], tokenizer, args: Args, world):
    """Those of `questions` (numbers of examples) to fine-tune on, and how many were skipped and why.

    verdicts: what the verifier said of demonstrations so far; each is graded once, on one of the ranks."""
    have = [q for q in questions if examples[q].trace]
    if args.verify_demonstrations:
        new = [q for q in have if q not in verdicts]
        mine = new[world.rank :: world.size]
        texts = [tokenizer.decode(examples[q].trace[:-1]) for q in mine]
        graded = grade(texts, [examples[q].gold for q in mine], verifier=args.verifier)
        verdicts |= gather_lists([(q, v.reward > 0) for q, v in zip(mine, graded, strict=True)], world)
    accepted = [q for q in have if not args.verify_demonstrations or verdicts[q]]
    return accepted, {
        "buffer/no_demonstration": len(questions) - len(have), "buffer/rejected": len(have) - len(accepted),
    }


def main(args: Args) -> None:
    if args.replay:
        return replay(args.replay, Args, Row, replayed)
    check(args)
    world = init_world(args.timeout_minutes)
    out = Path(args.out)
    checkpoints = Checkpoints(out / "checkpoint", args, keep=args.keep)
    state = checkpoints.state()
    start = state["step"] if state else 0

    interleave = args.method == "relift" and args.sft_data_size > 0
    scratch = args.model == "scratch"
    tokenizer = igsm.tokenizer("symbolic", modulus=IGSM["modulus"]) if scratch else load_tokenizer(args.model)
    set_template(tokenizer, args.chat_template, args.chat_template_args)
    examples, left_out = read_questions(
        tokenizer, args, traces="needed" if args.method == "sft" or interleave else "ignored", progress=world.main
    )
    without = sum(e.trace is None for e in examples)
    if interleave or args.method == "sft":
        check_demonstrations(len(examples) - without, args)
        if without and world.main:
            print(f"warning: {without} of {len(examples)} questions have no demonstration to fine-tune on")
    if args.method == "sft":
        examples = [e for e in examples if e.trace]
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
    buffer, demonstrations = HardestBuffer(), 0  # questions by their place in examples; how many were trained on
    more = {}
    if interleave:
        sft_optimizer = make_optimizer(policy, lr=args.sft_lr, betas=args.betas, weight_decay=args.weight_decay)
        more = {"sft": (policy, sft_optimizer)}
    if state:
        checkpoints.load(policy, optimizer, more)
        buffer.load_state_dict(state["buffer"])
        demonstrations = state["demonstrations"]
    elif args.save_every:
        checkpoints.check_space(policy, more)
    also_stop = policy.lm.generation_config.eos_token_id or []
    stop_ids = [tokenizer.eos_token_id, *(also_stop if isinstance(also_stop, list) else [also_stop])]
    sampler = make_sampler(
        args.rollout, policy, world, stop_ids=stop_ids, max_batch_tokens=args.sampler_tokens,
        max_tokens=args.max_prompt_tokens + args.max_response_tokens, gpu_memory=args.rollout_gpu_memory,
    )
    sampler.sync(policy, version=start)
    max_mismatch = args.max_mismatch or (0.05 if world.device.type == "cuda" else 0.001)
    verdicts: dict[int, bool] = {}  # by example: is its demonstration right?
    counts = state["pass_counts"] if state else []
    if args.buckets and held_out and not state:
        counts = pass_counts(sampler, tokenizer, held_out, args, world)
    buckets = [difficulty(right) for right in counts]
    if buckets and world.main:
        sizes = ", ".join(f"{buckets.count(name)} {name}" for name in ("easy", "medium", "hard", "hardest"))
        print(f"held-out questions by the model before training: {sizes}")

    curves = [["eval/mean"], ["bucket/easy", "bucket/medium", "bucket/hard", "bucket/hardest"], ["reward/own"],
              ["group/solve_all", "group/solve_none"], ["buffer/size"], ["sft/demonstrations"], ["sft/loss"],
              ["policy/entropy"], ["eval/length", "length/own"], ["loss/pg"], ["optim/grad_norm"],
              ["mismatch/mean_abs"]]
    bad_batches, models = BadBatches(out, args, world, skip=args.skip_bad_updates), {"policy": policy}
    metrics = Metrics(out, args, world, start=start, steps=steps, curves=curves)
    if start == 0 and held_out and args.eval_every:
        metrics.log(0, evaluate(sampler, tokenizer, held_out, buckets, args, world), show=["eval/mean"])
    clock = Clock(args.profile, out)

    for step in range(start + 1, steps + 1):
        indices = batch_indices(len(examples), args.batch_size, step - 1, args.seed)
        batch = [examples[i] for i in indices]
        mine = range(world.rank, len(batch), world.size)  # questions that this rank samples and grades

        # 1. sample; the answers to a question are graded while others are still being written
        with clock("sample"):
            rows = [Row(batch[g].prompt, batch[g].trace, g, True) for g in mine] if args.method == "sft" else []
            grading: list[tuple[list[Row], Future]] = []

            def answered(i: int, group: list[Completion], rows=rows, batch=batch, mine=mine, grading=grading):
                g = mine[i]
                own = [Row(batch[g].prompt, c.ids, g, False, c.logps, c.truncated) for c in group]
                rows.extend(own)
                grading.append((own, grade_rows(own, batch, tokenizer, args)))

            if args.method != "sft":
                sampler.generate(
                    [batch[g].prompt for g in mine], n=args.group_size,
                    keys=[batch[g].index for g in mine], seed=args.seed * 1_000_003 + step,
                    sampling=Sampling(args.max_response_tokens, args.temperature),
                    progress="sample" if world.main and args.max_response_tokens > 1000 else None,
                    drawn=answered,
                )

        # 2. reward
        with clock("reward"):
            for graded, verdicts_of_group in grading:
                for row, verdict in zip(graded, verdicts_of_group.result(), strict=True):
                    row.reward, row.status, row.detail = verdict
                report_golds([batch[row.group] for row in graded], graded)
            rows = sorted(gather_lists(rows, world), key=lambda row: row.group)  # every rank has all rows now

        # 3. advantages
        rewards = torch.tensor([row.reward for row in rows])  # [B]
        question = torch.tensor([row.group for row in rows])  # [B]
        for row, a in zip(rows, group_advantages(rewards, question, std=args.std), strict=True):
            row.advantage = a.item()

        buffer_log, sft_log, taught = {}, {}, []
        if interleave:
            hardest = hardest_groups(rewards.tolist(), question.tolist(), args.hard_threshold)
            chosen = questions_to_buffer(args.sft_on, hardest, len(batch), seed=f"{args.seed} {step}")
            with clock("reward"):
                questions, buffer_log = with_demonstration(
                    [indices[g] for g in chosen], examples, verdicts, tokenizer, args, world
                )
            buffer.add(questions)
            buffer_log["group/hardest"] = len(hardest) / len(batch)

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
                    if args.method == "sft":
                        log = accumulate_sft_gradient(policy, update, args, world)
                    else:
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
                    demonstrations += len(update) if args.method == "sft" else 0
        if interleave and sft_is_due(step, len(buffer), args):
            with clock("sft"):
                questions = buffer.take(args.sft_data_size)
                taught = [Row(examples[q].prompt, examples[q].trace, i, True) for i, q in enumerate(questions)]
                texts = partial(sample_rows, taught, [examples[q] for q in questions], tokenizer)
                with bad_batches(step, taught, models, texts):
                    log = accumulate_sft_gradient(policy, taught, args, world)
                    check_finite(log, policy, world)
                    log["sft/grad_norm"] = optimizer_step(
                        policy, sft_optimizer, lr=args.sft_lr, max_grad_norm=args.sft_max_grad_norm
                    )
                    sft_log = log
                    demonstrations += len(taught)
        if interleave:
            buffer_log |= {"buffer/size": len(buffer), "sft/fired": float(bool(sft_log))}

        # 5. sync
        with clock("sync"):
            sampler.sync(policy, version=step)

        # 6. log, evaluate, save
        logged = {k: [log[k] for log in logs if k in log] for k in dict.fromkeys(k for log in logs for k in log)}
        row_log = {k: sum(values) / len(values) for k, values in logged.items()}  # means over the updates
        row_log |= describe(rows) | buffer_log | sft_log | {"sft/demonstrations": demonstrations}
        if held_out and args.eval_every and (step % args.eval_every == 0 or step == steps):
            with clock("evaluate"):
                row_log |= evaluate(sampler, tokenizer, held_out, buckets, args, world)
                if args.keep_best:
                    keep_best(policy, tokenizer, out, world, row_log["eval/mean"])
        seconds = clock.flush()
        tokens = sum(len(row.prompt) + len(row.response) for row in rows + taught)
        row_log |= seconds | {"speed/tokens_per_second": tokens / seconds["seconds/step"]}
        row_log["speed/useful_share"] = policy.useful_share()
        metrics.log(
            step, row_log | {"memory/peak_gb": peak_memory_gb(world), "update/skipped": bad_batches.skipped or None},
            show=["reward/own", "eval/mean", "policy/entropy", "buffer/size", "sft/demonstrations"],
        )
        shown = random.Random(step).sample(rows, min(args.log_samples, len(rows)))
        metrics.samples(step, sample_rows(shown, batch, tokenizer))
        if args.save_every and (step % args.save_every == 0 or step == steps):
            checkpoints.save(
                step, policy, optimizer, world, more, buffer=buffer.state_dict(), demonstrations=demonstrations,
                pass_counts=counts,
            )
    checkpoints.wait()
    export(policy, tokenizer, out / "model", world)
    sampler.close()
    metrics.close()


def describe(rows: list[Row]) -> dict[str, float]:
    """What a practitioner looks at in the rows of a step."""

    def mean(values) -> float | None:
        values = list(values)
        return sum(values) / len(values) if values else None

    own = [r for r in rows if not r.teacher]
    solved: dict[int, list[float]] = {}
    for row in own:
        solved.setdefault(row.group, []).append(row.reward)
    statuses = ("ok", "timeout", "error", "unparsable")
    return {
        "reward/own": mean(r.reward for r in own),
        "group/solve_all": mean(min(g) > 0 for g in solved.values()),
        "group/solve_none": mean(max(g) <= 0 for g in solved.values()),
        "length/own": mean(len(r.response) for r in own), "length/truncated": mean(r.truncated for r in own),
    } | {f"verifier/{s}": mean(r.status == s for r in own) for s in statuses}


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
