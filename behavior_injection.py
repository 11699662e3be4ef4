"""Behavior injection (BRIDGE): preparing a model for reinforcement learning (Cen et al., arXiv 2505.18917).

Two models with the same accuracy after SFT can gain very differently from RL. The paper asks which, and answers with
a measure and a method. The measure is how much one step of RL on all queries changes the objective of query q:

    J(q)  = E[R],  grad J(q) = mean_i A_i grad log pi(o_i | q),   log pi = mean over an answer's tokens
    dJ(q) = eta mean_{q',o'} A(q',o') sqrt(a (1-a)) (mean_+ K - mean_- K)   (Eq. 5)     = eta <G, grad J(q)>
    K     = <grad log pi(o' | q'), grad log pi(o | q)>,   G = grad J over all queries,   a = share of right answers

so it takes queries that are neither always nor never solved, and answers that teach each other (K, co-influence). The
method is to inject behaviours into the SFT data that raise both, at equal rows and problems: looking ahead and coming
back (reflection), saying the information once more (analysis), one operation at a time (subgoals). Then GRPO:

    A_i  = (R_i - mean R) / (std R + 1e-6)                     r = p / p_old,  d = log p_ref - log p
    loss = mean_i mean_t [ max(-A r, -A clamp(r, 1 - c, 1 + c)) + kl_coef (e^d - d - 1) - entropy_coef H ]

--stage does one part of it, for every arm of --arms (ways to write the same solutions, `arms_of`); all does all:
  data       problems, and each arm's solutions of them, as files in OUT/data
  base       a base model from scratch on easy plain problems (--preset tiny; the paper takes a pretrained one)
  sft        OUT/ARM/sft: the base model, fine-tuned on the arm's solutions
  rl         OUT/ARM/rl: GRPO from there, with the SFT model as reference
  influence  OUT/ARM/influence: rollout accuracies, dJ and K of the SFT model
  eval       OUT/ARM/eval.json: accuracy of both models, in distribution and beyond; then the table of all arms

Where this file departs from the published code, and why:
- All arms tell the same problems (igsm.retell). Published: one stream drew problems and phrases, so that two arms
  shared 1 problem of 2000. Templates of test problems are in no training set; intermediate values are bounded.
- Multipliers and literals begin at 1. Published: at 0, so that always answering 0 scored 27 % in distribution.
- The RL gradient is the true mean over rows. Published: 1/8 of it (a division by 512 micro-batches of which 64
  existed), which Adam hides, but the clip acted on the small one: max_grad_norm is 8 times the published one.
- Prompts are in the tokenizer's own chat template; published: Llama's bare turns. Llama-3.2's own names today's date,
  so a run of several days wants --chat_template.
- Prompts end with "<think>\\n", where solutions go on. Published: SFT with the newline, RL without it.
- The response ends with the first eos. Published: generation stopped on text, and a pad was trained as an eos.
- G is measured on other queries than those whose dJ is taken: a query's influence on itself is |grad J(q)|^2 / M,
  always positive, and dominates for few queries (--influence_self is the paper's form). dJ is also reported divided
  by |G| and |grad J(q)|: raw, it grows with the gradient, which differs between models.
- No LoRA, no projection for dJ: G is one exact gradient, and a score <G, grad log pi(o | q)> is the central
  difference of the answer's log-prob along G. K alone is projected (count sketch).
As published: SFT's loss is on prompts too (--no_prompt_loss: solutions alone) and is the mean of token means of 4 rows
each; PP-Aug and RC-Aug have four rows a problem and so four times the SFT steps (--sft_steps sets equal ones); analyses
follow the code's table (--analysis 0.1 is the paper's text); one update a step, so that the clip never acts.

Commands:
  python behavior_injection.py --preset tiny                           a laptop, everything, nothing downloaded
  python behavior_injection.py --stage data
  torchrun --nproc_per_node 2 behavior_injection.py --stage sft        the paper's run, a stage at a time;
  torchrun --nproc_per_node 2 behavior_injection.py --stage rl         its Llama: --preset paper_llama
"""

import dataclasses
import json
import math
import os
import random
import re
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

import igsm
from common.data import (
    InputError,
    batch_indices,
    check_verifier,
    pack,
    plan_micro_batches,
    tokens_of_means,
)
from common.rollout import Sampling, make_sampler
from common.rows import data_digest, load_rows, make_examples, report_golds, set_template
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
    plot_curves,
    sum_over_ranks,
)
from common.verifiers import grade


@dataclass
class Args:
    stage: Literal["all", "data", "base", "sft", "rl", "influence", "eval"] = "all"
    """What to do, for every arm."""
    preset: Literal["paper", "paper_llama", "tiny"] = "paper"
    """paper: the published run of Qwen2.5-1.5B (3B: --model Qwen/Qwen2.5-3B --steps 100). paper_llama: of
    Llama-3.2-1B. tiny: a Qwen2 of under a million parameters, from scratch, on symbolic iGSM, for a laptop."""
    arms: tuple[str, ...] = ("vanilla", "pp_aug", "rc_aug", "bridge")
    """vanilla, bridge (all three behaviours), subgoal, reflection, analysis (one each), pp_aug (4 orders of the
    conditions), rc_aug (4 orders of the solution), retry (Meta's retries, the nearest rival)."""

    # what
    model: str = "Qwen/Qwen2.5-1.5B"
    """Base model: folder or Hub name; "scratch" makes one with --base_problems."""
    sft_model: str = ""
    """What rl and influence start from, for one arm; empty takes what the stage sft wrote."""
    out: str = "runs/behavior_injection"
    """Folder of everything. Running the same command again goes on from the last checkpoint of each part."""
    chat_template: str = ""
    """File with a Jinja chat template; empty takes the tokenizer's own. Either gets "<think>\\n" at the prompt's end
    if it has no such tag, and is saved with the model."""
    chat_template_args: tuple[str, ...] = ()
    """Settings of a template's switches, key=value, as in enable_thinking=false. They are saved with the model."""
    verifier: str = "boxed"
    """How answers are graded: boxed (BRIDGE's: the first box), or another of common/verifiers.py."""
    max_prompt_tokens: int = 1024
    """Rows with longer prompts are left out and counted."""
    max_response_tokens: int = 2560
    """Tokens to sample at most, and the longest solution."""

    # the problems
    style: Literal["natural", "symbolic"] = "natural"
    """Sentences, or equations between letters for tiny models."""
    modulus: int = 0
    """Arithmetic mod this number; 0 for plain integers."""
    max_params: int = 20
    """Most sentences of a question."""
    shuffle: bool = True
    """Conditions in random order; off: in the solution's order (much easier)."""
    system_prompt: bool = True
    """Prompts begin with BRIDGE's system message."""
    ops: tuple[int, int] = (15, 20)
    """Operations of SFT, RL and influence problems, fewest and most."""
    val_ops: tuple[int, int] = (21, 25)
    """Operations of the problems that RL is evaluated on as it goes."""
    test_ops: tuple[int, int] = (20, 25)
    """Exact operations of the tests in and out of distribution."""
    sft_problems: int = 2000
    """Problems of the SFT sets, the same for every arm."""
    rl_problems: int = 10000
    """Problems of RL."""
    eval_problems: int = 500
    """Problems of the validation and of each test set."""
    reflection: float = 0.1
    """Chance of a look-ahead before a line."""
    analysis: str = "table"
    """Chance of an analysis of a line, or "table": 0.1, 0.4, 0.8, 1 by its number of parents (published code)."""
    retry: float = 0.1
    """Chance of a retry before a line."""
    base_problems: int = 0
    """Plain problems for a base model from scratch; 0 where --model is pretrained."""
    base_ops: tuple[int, int] = (1, 4)
    """Their operations."""

    # how: supervised fine-tuning
    sft_steps: int = 0
    """Updates; 0 follows --sft_epochs (published: 75, and 310 for pp_aug and rc_aug)."""
    sft_epochs: int = 5
    """Passes over the arm's rows."""
    sft_batch_size: int = 128
    """Rows an update."""
    sft_lr: float = 5e-6
    """Learning rate, constant (published: warm-up only with a cosine, which was off)."""
    prompt_loss: bool = True
    """Train on the tokens of prompts too."""
    sft_rows_per_mean: int = 4
    """The loss is the mean of token means of so many rows each (published micro-batches); 0: one mean."""
    base_steps: int = 3500
    """Updates of the base model from scratch, 64 problems each."""
    base_lr: float = 1.5e-3
    """Its peak learning rate."""

    # how: RL
    steps: int = 200
    """Rollout steps."""
    batch_size: int = 32
    """Questions a step."""
    group_size: int = 32
    """Answers a question."""
    updates_per_step: int = 1
    """Optimizer updates a step; with 1 the ratio is 1 and the clip never acts, as published."""
    temperature: float = 1.0
    """Sampling temperature; the policy that is trained is the one at this temperature."""
    clip: float = 0.2
    """PPO clip of the ratio; 0 for none."""
    kl_coef: float = 0.001
    """Weight of the KL to the SFT model; 0 does without a reference."""
    kl_mask: float = 0.0
    """Leave out answers whose mean KL is this or more; 0 for none (published: 0.15 for Llama)."""
    entropy_coef: float = 0.001
    """Entropy bonus."""
    format_reward: float = 0.0
    """Added to the reward of an answer in the form <think>...</think><answer>...</answer> (0.05 for Llama)."""
    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup: float = 0.0
    """Share of the updates over which the rate rises linearly."""
    lr_floor: float = 0.0
    """Where linear and cosine end, as a share of the peak."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas of RL (SFT: 0.9, 0.95)."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    max_grad_norm: float = 8.0
    """Global gradient norm of RL to clip to (published: 1, for Llama 0.2, of an eighth of this gradient). SFT: 1."""
    seed: int = 0
    """Seeds training problems, data order, sampling and random weights. Test problems stay the same."""

    # influence
    influence_queries: int = 2000
    """Queries whose dJ is measured; as many others make G."""
    influence_group: int = 8
    """Answers to each."""
    influence_self: bool = False
    """The paper's form: the same queries make G, each its own influence included."""
    influence_step: float = 4e-5
    """How far the weights move along G for the central difference, as a share of their norm."""
    kernel_queries: int = 32
    """Queries whose answers the co-influence K is measured between."""
    kernel_dims: int = 8192
    """Dimensions that gradients are projected to for K."""

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
    """Largest batch of the embedded sampler, counted as rows x (prompt + response) tokens. 0 picks 65,536 on a CPU, and
    what fits into half of the free memory on a GPU."""
    max_mismatch: float = 0.0
    """Stop if the sampler's and the trainer's log-probs of the same tokens differ by more on average (stale
    weights, another template); 0 takes 0.05 on CUDA and 0.001 on a CPU."""
    eval_every: int = 5
    """Evaluate RL every so many steps, and before the first and after the last; 0 never."""
    eval_temperature: float = 0.0
    """Temperature of evaluation; 0 is greedy."""
    save_every: int = 50
    """Checkpoint every so many steps; 0 never."""
    keep: int = 2
    """Number of checkpoints to keep. With 2, a damaged newest one costs only the steps since the one before."""
    keep_best: bool = False
    """Also keep the model of the highest eval/mean, in OUT/ARM/rl/best."""
    skip_bad_updates: bool = False
    """Go on without an update whose loss, gradient or log-probs are not finite; else stop. Either way its batch is
    written to OUT/bad/step-N."""
    timeout_minutes: float = 30.0
    """Abort if a rank does not respond for this many minutes."""
    profile: int = 0
    """Profile this many steps, starting with the second. Traces go to OUT/profile, a summary to the terminal."""
    log_samples: int = 4
    """Rows a step to write to samples.jsonl."""
    tensorboard: bool = False
    """Also log to TensorBoard (in the run folders)."""
    wandb: str = ""
    """Also log to this Weights & Biases project."""


PRESETS = {
    "paper_llama": dict(
        model="meta-llama/Llama-3.2-1B-Instruct", out="runs/behavior_injection_llama", kl_coef=0.01, kl_mask=0.15,
        entropy_coef=0.0, max_grad_norm=1.6, format_reward=0.05,
    ),
    "tiny": dict(
        model="scratch", out="runs/tiny_bridge", style="symbolic", modulus=23, max_params=4, shuffle=False,
        system_prompt=False, max_prompt_tokens=160, max_response_tokens=240, ops=(5, 8), val_ops=(5, 8),
        test_ops=(6, 9), eval_problems=600, eval_temperature=1.0, base_problems=160000, sft_steps=75, sft_lr=5e-4,
        prompt_loss=False, steps=80, batch_size=16, group_size=8, lr=5e-5, max_grad_norm=1.0,
        influence_queries=200, eval_every=20, save_every=40, micro_batch_tokens=4096, gradient_checkpointing=False,
    ),
}
SCRATCH = dict(
    model_type="qwen2", hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False,
)
FORMAT = re.compile(r"^<think>.*?</think>\s*<answer>.*?</answer>$", re.DOTALL | re.MULTILINE)


def arms_of(args: Args) -> dict[str, list[dict]]:
    """How each arm tells a problem: settings of igsm.retell, one dict for each row that it makes of it."""
    reflection, analysis = dict(reflection=args.reflection), dict(analysis=args.analysis)
    if args.analysis != "table":
        analysis = dict(analysis=float(args.analysis))
    return {
        "vanilla": [{}],
        "bridge": [dict(subgoals=True, **reflection, **analysis)],
        "subgoal": [dict(subgoals=True)],
        "reflection": [reflection],
        "analysis": [analysis],
        "pp_aug": [dict(question_variant=i) for i in range(4)],
        "rc_aug": [dict(solution_variant=i) for i in range(4)],
        "retry": [dict(retry=args.retry)],
    }


# ------------------------------------------------------------------------------------------ the mathematics


def group_advantages(rewards, groups, *, ddof: int = 1, eps: float = 1e-6):
    """A_i = (R_i - mean) / (std + eps) over the rewards of i's group; 0 where they are all equal.

    rewards [B] float, groups [B] int (which question a row belongs to) -> [B], of rewards' dtype.
    ddof 1 divides the variance by n - 1, as the published code; 0 by n, as the paper, where the std is
    sqrt(a (1 - a)) for a share a of right answers.

    >>> group_advantages(torch.tensor([1.0, 0, 0, 0]), torch.tensor([7, 7, 7, 7]), eps=0.0).tolist()
    [1.5, -0.5, -0.5, -0.5]
    """
    _, group = groups.unique(return_inverse=True)  # [B], 0 .. G-1
    zeros = rewards.new_zeros(int(group.max()) + 1 if len(group) else 0)
    n = zeros.index_add(0, group, torch.ones_like(rewards))  # [G]
    centered = rewards - (zeros.index_add(0, group, rewards) / n)[group]
    sigma = (zeros.index_add(0, group, centered**2) / (n - ddof).clamp(min=1)).sqrt()
    return centered / torch.where(sigma > 0, sigma + eps, 1.0)[group]


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


def low_variance_kl(logp, ref_logp):
    """Estimate of KL(pi || ref) from each token, elementwise: e^d - d - 1, d = log ref - log pi; at most 10.

    Never negative, and its mean over tokens drawn from pi is the KL. Its gradient is that of the KL at pi = ref."""
    d = ref_logp - logp
    return (d.exp() - d - 1).clamp(max=10)


def format_reward(completion: str) -> float:
    """1.0 if the completion of a prompt that ends with <think> has the form ...</think><answer>...</answer>.

    Text may follow after a newline, as published."""
    return float(FORMAT.match("<think>" + completion) is not None)


def kernel_scores(kernel, advantages, groups=None):
    """The inner mean of Eq. 5: s_i = mean_j A_j K_ji = <G, grad log pi_i>, with G = mean_j A_j grad log pi_j.

    kernel [B, B], advantages [B] -> [B]. groups [B]: leave out the answers j to i's own question."""
    others = torch.ones_like(kernel) if groups is None else (groups[:, None] != groups[None]).to(kernel.dtype)
    return (kernel * others) @ advantages / others.sum(1).clamp(min=1)


def per_step_influence(scores, advantages, groups):
    """dJ(q) = mean_i A_i s_i over the answers i to q: how much a step along G raises J(q), without eta (Eq. 5).

    scores [B]: s_i = <G, grad log pi_i>, of log-probs that are means over an answer's tokens, by `kernel_scores`,
    by an inner product or by a difference along G. advantages [B], groups [B] -> (dJ [Q], the Q groups in order).
    The same as sqrt(a (1 - a)) (mean of s over right answers - mean over wrong ones) if the advantages are those
    with ddof 0; with ddof 1 it is sqrt((N - 1) / N) of that.

    >>> scores, advantages = torch.tensor([3.0, 1.0, 7.0]), torch.tensor([1.0, -1.0, 0.0])
    >>> per_step_influence(scores, advantages, torch.tensor([4, 4, 9]))[0].tolist()
    [1.0, 0.0]
    """
    queries, group = groups.unique(return_inverse=True)
    zeros = scores.new_zeros(len(queries))
    n = zeros.index_add(0, group, torch.ones_like(scores))
    return zeros.index_add(0, group, advantages * scores) / n, queries


def count_sketch(tensors, codes, dims: int):
    """Project a gradient (a list of tensors) to [dims] such that inner products are kept on average.

    Every number is added to one of the `dims` sums with a sign: `codes` holds 2 x sum + sign for each (int32), the
    same for all gradients that are compared (`sketch_codes`). The error of <x, y> is about |x| |y| / sqrt(dims)."""
    out = tensors[0].new_zeros(dims)
    for values, code in zip(tensors, codes, strict=True):
        out.index_add_(0, code >> 1, values.flatten() * (1 - 2 * (code & 1)))
    return out


def sketch_codes(parameters, dims: int, seed: int = 0):
    """Random codes for `count_sketch`, a tensor for each parameter."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(2 * dims, (p.numel(),), generator=generator, dtype=torch.int32).to(p.device) for p in parameters
    ]


# ----------------------------------------------------------------------------------------------- one update


@dataclass
class Row:
    """An answer to a question, sampled or an arm's solution."""

    prompt: list[int]
    response: list[int]
    group: int  # which question of the step
    sampler_logps: list[float] | None = None  # sampled rows: log-probs the sampler reported
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
    return torch.tensor(values, device=batch.targets.device)[batch.sequence] if values else batch.targets.new_empty(0)


def row_means(values, batch, rows: list[Row]) -> torch.Tensor:
    """[N], one value a token -> [rows], their mean over each row's response tokens."""
    lengths = values.new_tensor([len(row.response) for row in rows])
    return values.new_zeros(len(rows)).index_add(0, batch.sequence, values) / lengths


def accumulate_gradient(
    policy, rows: list[Row], old_logps: list | None, ref_logps: list | None, args: Args, world
) -> dict[str, float]:
    """Forward and backward of one RL update, summed over ranks and micro-batches; the gradient is left in .grad.

    Every denominator is counted over the whole update before the first backward, so the gradient is the same
    for any number of ranks and any micro_batch_tokens. old_logps: the behaviour policy's log-probs, a tensor
    for each micro-batch; None where it is the policy as it is now (then the ratio is exactly 1). ref_logps: the
    reference's, likewise; None without a KL."""
    n_tokens = sum(len(row.response) for row in rows)
    names = ("pg_loss", "kl_loss", "masked", "entropy", "clipped", "kl_old")
    sums = torch.zeros(len(names), dtype=torch.float64)
    mismatch: list[torch.Tensor] = []  # trainer's minus sampler's log-prob
    for i, (batch, mine) in enumerate(micro_batches(rows, args, world)):
        logp, entropy = policy(batch, temperature=args.temperature, entropy=True)  # [N], [N]
        old = logp.detach() if old_logps is None else old_logps[i]
        advantage = per_token(batch, [row.advantage for row in mine])  # [N]
        drawn = [x for row in mine for x in row.sampler_logps]
        sampler_logp = torch.tensor(drawn, device=logp.device)  # [N]
        token_loss = policy_token_loss(logp, old, advantage, clip=args.clip or None)
        kl = torch.zeros_like(logp) if ref_logps is None else low_variance_kl(logp, ref_logps[i])
        total = row_means(token_loss + args.kl_coef * kl - args.entropy_coef * entropy, batch, mine)  # [rows]
        row_kl = row_means(kl.detach(), batch, mine)
        kept = row_kl < args.kl_mask if args.kl_mask else torch.ones_like(row_kl, dtype=torch.bool)
        loss = torch.where(kept, total, 0.0).sum() / len(rows)
        (loss * world.size).backward()  # FSDP averages over ranks; the sum is what is wanted

        with torch.no_grad():
            ratio = (logp - old).exp()
            sums += torch.stack([
                row_means(token_loss, batch, mine).sum() / len(rows), row_kl.sum() / len(rows), (~kept).sum(),
                entropy.sum(), ((ratio - 1).abs() > (args.clip or math.inf)).sum(), (old - logp).sum(),
            ]).double().cpu()
            mismatch.append((old - sampler_logp).cpu())
    total = dict(zip(names, sum_over_ranks(sums, world).tolist(), strict=True))
    metrics = {"loss/pg": total["pg_loss"], "policy/kl_ref": total["kl_loss"]}
    metrics |= {"policy/masked": total["masked"] / len(rows)}
    metrics |= {f"policy/{name}": total[name] / n_tokens for name in ("entropy", "clipped", "kl_old")}
    return metrics | compare_logps(torch.cat(mismatch), world)


def accumulate_sft_gradient(policy, rows: list[Row], args: Args, world) -> dict[str, float]:
    """Forward and backward of one SFT update, at temperature 1; the gradient is left in .grad.

    loss = - (1/M) sum_m (1/T_m) sum_{t in m} log p_t over means m of sft_rows_per_mean rows of T_m tokens each. The
    same for any number of ranks and any micro_batch_tokens; the means follow the order of `rows`."""
    rows_per_mean = args.sft_rows_per_mean or len(rows)
    tokens = tokens_of_means([len(row.response) for row in rows], rows_per_mean)
    weight = {id(row): 1 / (n * math.ceil(len(rows) / rows_per_mean)) for row, n in zip(rows, tokens, strict=True)}
    sums = torch.zeros(3, dtype=torch.float64)
    for batch, mine in micro_batches(rows, args, world):
        logp, entropy = policy(batch, entropy=True)  # [N], [N]
        loss = -(logp * per_token(batch, [weight[id(row)] for row in mine])).sum()
        (loss * world.size).backward()  # FSDP averages over ranks; the sum is what is wanted
        with torch.no_grad():
            sums += torch.stack([loss, logp.sum(), entropy.sum()]).double().cpu()
    loss, logp, entropy = sum_over_ranks(sums, world).tolist()
    n_tokens = sum(len(row.response) for row in rows)
    return {"sft/loss": loss, "sft/logp": logp / n_tokens, "sft/entropy": entropy / n_tokens}


def compare_logps(difference: torch.Tensor, world) -> dict[str, float]:
    """How far the trainer's log-probs are from the sampler's on the tokens that it drew; [tokens] -> metrics."""
    d = difference.double()
    sums = sum_over_ranks(torch.tensor([len(d), d.abs().sum(), -d.sum()], dtype=torch.float64), world)
    largest = max(gather_lists([d.abs().max().item() if len(d) else 0.0], world))
    n = max(1.0, sums[0].item())
    return {"mismatch/mean_abs": sums[1].item() / n, "mismatch/kl": sums[2].item() / n, "mismatch/max": largest}



@torch.no_grad()
def policy_logps(policy, rows: list[Row], args: Args, world) -> list[torch.Tensor]:
    """Log-probs of the rows' tokens under the policy as it is, a tensor for each micro-batch of this rank."""
    return [policy(batch, temperature=args.temperature) for batch, _ in micro_batches(rows, args, world)]


# ------------------------------------------------------------------------------------------------- the data


def make_data(args: Args, world) -> None:
    """Write OUT/data: sft_ARM.jsonl for every arm, rl, val, test_id, test_ood, influence and base.jsonl.

    Rows are in LUFFY's schema; row i of each sft file tells the same problem (4 i .. 4 i + 3 for pp_aug, rc_aug)."""
    folder = Path(args.out) / "data"
    seed = 1000 * args.seed
    told = dict(style=args.style, modulus=args.modulus or None, max_params=args.max_params, shuffle=args.shuffle,
                max_literal=min(9, args.modulus - 1) if args.modulus else 9)  # fmt: skip
    plain = {"": [{}]}
    sets = [  # name, arms, problems, operations, split, seed
        ("sft_", {arm: arms_of(args)[arm] for arm in args.arms}, args.sft_problems, args.ops, "train", seed + 100),
        ("rl", plain, args.rl_problems, args.ops, "train", seed + 200),
        ("influence", plain, 2 * args.influence_queries, args.ops, "train", seed + 500),
        ("base", plain, args.base_problems, args.base_ops, "train", seed + 600),
        ("val", plain, args.eval_problems, args.val_ops, "test", 300),
        ("test_id", plain, args.eval_problems, (args.test_ops[0],) * 2, "test", 400),
        ("test_ood", plain, args.eval_problems, (args.test_ops[1],) * 2, "test", 400),
    ]
    for name, arms, n, ops, split, set_seed in sets if world.main else []:
        files = {arm: folder / f"{name}{arm}.jsonl" for arm in arms}
        settings = dict(told, ops=ops, split=split, seed=set_seed, n=n, rows=arms, system=args.system_prompt)
        settings = json.loads(json.dumps(settings))
        made = folder / f"{name}.settings.json"  # written last: what it describes is complete
        before = json.loads(made.read_text()) if made.exists() else {}
        same = before | {"rows": arms} == settings | {"rows": arms}
        if same:  # other arms tell the same problems: they stay
            settings["rows"] = before["rows"] | settings["rows"]
            arms = {arm: how for arm, how in arms.items() if before["rows"].get(arm) != how or not files[arm].exists()}
        if not n or not arms:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with ExitStack() as stack:
                out = {arm: stack.enter_context(open(f"{files[arm]}.partial", "w")) for arm in arms}
                problems = igsm.problems(n, ops=ops, split=split, seed=set_seed, **told)
                for problem in tqdm(problems, total=n, desc=f"data {name}".rstrip("_"), unit="problem", leave=False):
                    for arm, variants in arms.items():
                        for how in variants:
                            row = igsm.row(igsm.retell(problem, **how), split, args.system_prompt)
                            out[arm].write(json.dumps(row) + "\n")
        except ValueError as error:
            raise InputError(f"problems of {name.rstrip('_')}: {error}") from error
        if not same:
            for stale in [made, *(folder.glob("sft_*.jsonl") if name == "sft_" else [])]:
                stale.unlink(missing_ok=True)
        for arm in arms:
            os.replace(f"{files[arm]}.partial", files[arm])
        made.write_text(json.dumps(settings) + "\n")
    dist.barrier()


def open_tokenizer(model: str, args: Args, made=None):
    """The tokenizer of a model (or `made`) with the template of all stages, which is saved with their models."""
    return set_template(made or load_tokenizer(model), args.chat_template, args.chat_template_args, think=True)


def read_examples(name: str, tokenizer, args: Args, *, traces: str = "ignored", progress=False):
    """Examples of OUT/data/NAME.jsonl, their questions' texts, and the counts of what was left out."""
    path = Path(args.out) / "data" / f"{name}.jsonl"
    if not path.exists():
        raise InputError(f"{path} is missing: run --stage data first (with --arms that name it)")
    rows = load_rows(str(path))
    examples, counts = make_examples(
        rows, tokenizer, source=name, traces=traces, max_prompt_tokens=args.max_prompt_tokens,
        max_response_tokens=args.max_response_tokens, progress=progress,
    )
    for e in examples:
        e.source = name
    return examples, [rows[e.index]["prompt"][-1]["content"] for e in examples], counts


# ------------------------------------------------------------------------------------------------- the loop


def check(args: Args) -> None:
    """Raise InputError for settings that cannot work together."""
    positive = ("batch_size", "sft_batch_size", "group_size", "updates_per_step", "max_response_tokens", "steps",
                "max_prompt_tokens", "sft_problems", "rl_problems", "eval_problems", "influence_queries",
                "influence_group", "influence_step", "kernel_queries", "kernel_dims", "temperature", "sft_epochs",
                "base_steps", "keep")
    for name in positive:
        if getattr(args, name) <= 0:
            raise InputError(f"--{name} must be positive, not {getattr(args, name)}")
    for name in ("group_size", "influence_group"):
        if getattr(args, name) == 1:
            raise InputError(f"--{name} 1: the only answer to a question has no advantage over others; 2 or more")
    if args.sft_steps < 0:
        raise InputError(f"--sft_steps must be positive, or 0 to follow --sft_epochs, not {args.sft_steps}")
    if args.stage == "base" and not args.base_problems:
        raise InputError("--stage base makes a base model from scratch: --model scratch --base_problems N")
    if args.batch_size % args.updates_per_step:
        raise InputError(
            f"--batch_size {args.batch_size} does not divide into --updates_per_step {args.updates_per_step}"
        )
    try:
        known = arms_of(args)
    except ValueError as error:
        raise InputError(f'--analysis must be a chance from 0 to 1 or "table", not {args.analysis}') from error
    for arm in args.arms:
        if arm not in known:
            raise InputError(f"--arms {arm}: no such arm; there are {', '.join(known)}")
    if args.sft_model and len(args.arms) != 1:
        raise InputError(f"--sft_model {args.sft_model} is the model of one arm: name that arm with --arms")
    if (args.model == "scratch") != (args.base_problems > 0):
        raise InputError(f"--model {args.model} and --base_problems {args.base_problems}: a base model from scratch "
                         "is --model scratch with problems for it; any other --model needs --base_problems 0")
    if args.sft_model and args.stage in ("all", "sft"):
        raise InputError(f"--sft_model {args.sft_model} is what --stage rl, influence and eval start from: one of them")
    check_verifier(args.verifier)


def settings_of(args: Args, stage: str, arm: str) -> Args:
    """Settings of one stage of one arm, whatever command it is part of; `out` stays the folder of everything."""
    args = dataclasses.replace(args, stage=stage, arms=(arm,))
    if stage == "base":
        return dataclasses.replace(
            args, steps=args.base_steps, batch_size=64, lr=args.base_lr, schedule="cosine", warmup=0.02, lr_floor=0.02,
            betas=(0.9, 0.99), weight_decay=0.1, max_grad_norm=1.0, prompt_loss=False, sft_rows_per_mean=0,
            group_size=1, updates_per_step=1,
        )
    if stage == "sft":
        return dataclasses.replace(
            args, steps=args.sft_steps, batch_size=args.sft_batch_size, lr=args.sft_lr, schedule="constant", warmup=0.0,
            betas=(0.9, 0.95), max_grad_norm=1.0, group_size=1, updates_per_step=1,
        )
    return args


def model_of(args: Args, stage: str, arm: str) -> str:
    """The model that a stage leaves behind; of stage "base", the one that every arm starts from."""
    if stage == "base":
        return f"{args.out}/base/model" if args.base_problems else args.model
    return args.sft_model if stage == "sft" and args.sft_model else f"{args.out}/{arm}/{stage}/model"


def start_sampler(policy, tokenizer, args: Args, world):
    """The sampler that --rollout names; it needs a sync before it can draw."""
    also_stop = policy.lm.generation_config.eos_token_id or []
    stop_ids = [tokenizer.eos_token_id, *(also_stop if isinstance(also_stop, list) else [also_stop])]
    return make_sampler(
        args.rollout, policy, world, stop_ids=stop_ids, max_batch_tokens=args.sampler_tokens,
        max_tokens=args.max_prompt_tokens + args.max_response_tokens, gpu_memory=args.rollout_gpu_memory,
    )


def sample(sampler, batch, mine, group_size: int, seed: int, args: Args, world) -> list[Row]:
    """Answers to the questions `mine` of a batch of examples."""
    groups = sampler.generate(
        [batch[g].prompt for g in mine], n=group_size, keys=[batch[g].index for g in mine], seed=seed,
        sampling=Sampling(args.max_response_tokens, args.temperature),
        progress="sample" if world.main and args.max_response_tokens > 1000 else None,
    )
    pairs = zip(mine, groups, strict=True)
    return [Row(batch[g].prompt, c.ids, g, c.logps, c.truncated) for g, group in pairs for c in group]


def answer_text(row: Row, tokenizer) -> str:
    """What the model said, without the eos."""
    return tokenizer.decode(row.response if row.truncated else row.response[:-1])


def reward(rows: list[Row], batch, tokenizer, args: Args) -> None:
    """Grade the rows in place."""
    texts = [answer_text(row, tokenizer) for row in rows]
    golds = [batch[row.group].gold for row in rows]
    for row, text, verdict in zip(rows, texts, grade(texts, golds, verifier=args.verifier), strict=True):
        row.reward, row.status, row.detail = verdict
        if args.format_reward:
            row.reward += args.format_reward * format_reward(text)
    report_golds([batch[row.group] for row in rows], rows)


def set_advantages(rows: list[Row]) -> None:
    """Advantages of the rows, in place; whole groups must be among them."""
    rewards = torch.tensor([row.reward for row in rows], dtype=torch.float64)  # [B]
    question = torch.tensor([row.group for row in rows])  # [B]
    for row, a in zip(rows, group_advantages(rewards, question), strict=True):
        row.advantage = a.item()


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


def train(args: Args, world) -> None:
    """The stages base, sft and rl of an arm: from a model to OUT/ARM/STAGE/model."""
    [arm], sft = args.arms, args.stage != "rl"
    out = Path(args.out) / ("base" if args.stage == "base" else f"{arm}/{args.stage}")
    checkpoints = Checkpoints(out / "checkpoint", args, keep=args.keep)
    state = checkpoints.state()
    start = state["step"] if state else 0

    scratch = args.stage == "base"
    model = model_of(args, "base" if args.stage == "sft" else "sft", arm)
    made = igsm.tokenizer(args.style, modulus=args.modulus or None, retry=True) if scratch else None
    tokenizer = open_tokenizer(model, args, made)
    data = {"base": "base", "sft": f"sft_{arm}", "rl": "rl"}[args.stage]
    examples, _, left_out = read_examples(
        data, tokenizer, args, traces="needed" if sft else "ignored", progress=world.main
    )
    held_out = [] if sft or not args.eval_every else read_examples("val", tokenizer, args)[0]
    digest = data_digest(*([(e.prompt, e.trace, e.gold) for e in part] for part in (examples, held_out)))
    checkpoints.check_data(state, digest, f"{args.out}/data/{data}.jsonl")
    if len(examples) < args.batch_size:
        raise InputError(f"{args.out}/data/{data}.jsonl: {len(examples)} rows are fewer than a batch of "
                         f"{args.batch_size}")
    steps = args.steps or args.sft_epochs * (len(examples) // args.batch_size)
    if world.main:
        print(f"{out}: {left_out}; {len(held_out)} held-out; {steps} steps of {args.batch_size} questions")

    config = dict(SCRATCH, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
                  pad_token_id=tokenizer.pad_token_id) if scratch else None
    policy = load_policy(
        model, world, from_config=config, seed=args.seed, gradient_checkpointing=args.gradient_checkpointing
    )
    optimizer = make_optimizer(policy, lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
    reference = sampler = None
    if not sft:
        if args.kl_coef or args.kl_mask:
            reference = load_policy(model, world).requires_grad_(False)
        sampler = start_sampler(policy, tokenizer, args, world)
    if state:
        checkpoints.load(policy, optimizer)
    elif args.save_every:
        checkpoints.check_space(policy)
    if sampler:
        sampler.sync(policy, version=start)
    sampled = state["sampled"] if state else 0  # tokens so far
    max_mismatch = args.max_mismatch or (0.05 if world.device.type == "cuda" else 0.001)

    curves = [["sft/loss"], ["sft/entropy"], ["optim/grad_norm"]] if sft else [
        ["eval/mean"], ["reward/own"], ["group/solve_all", "group/solve_none"], ["policy/entropy"], ["policy/kl_ref"],
        ["length/own"], ["loss/pg"], ["optim/grad_norm"], ["mismatch/mean_abs"],
    ]
    bad_batches, models = BadBatches(out, world, skip=args.skip_bad_updates), {"policy": policy}
    if reference:
        models["reference"] = reference
    metrics = Metrics(out, args, world, start=start, steps=steps, curves=curves)
    if start == 0 and held_out:
        first = evaluate(sampler, tokenizer, held_out, args, world) | {"tokens/sampled": 0}
        metrics.log(0, first, show=["eval/mean"])
    clock = Clock(args.profile, out)

    for step in range(start + 1, steps + 1):
        batch = [examples[i] for i in batch_indices(len(examples), args.batch_size, step - 1, args.seed)]
        mine = range(world.rank, len(batch), world.size)  # questions that this rank samples and grades

        # 1. sample
        with clock("sample"):
            if sft:
                whole = [(e.prompt[:1], e.prompt[1:] + e.trace) if args.prompt_loss else (e.prompt, e.trace)
                         for e in batch]
                rows = [Row(*whole[g], g) for g in mine]
            else:
                rows = sample(sampler, batch, mine, args.group_size, args.seed * 1_000_003 + step, args, world)

        # 2. reward
        with clock("reward"):
            if not sft:
                reward(rows, batch, tokenizer, args)
            rows = sorted(gather_lists(rows, world), key=lambda row: row.group)  # every rank has all rows now

        # 3. advantages
        if not sft:
            set_advantages(rows)
            sampled += sum(len(row.response) for row in rows)

        # 4. update
        with clock("update"):
            if sampler:
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
                with bad_batches(step, models, texts):
                    if sft:
                        log = accumulate_sft_gradient(policy, update, args, world)
                    else:
                        ref = policy_logps(reference, update, args, world) if reference else None
                        log = accumulate_gradient(policy, update, old[u], ref, args, world)
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
            if sampler:
                sampler.sync(policy, version=step)

        # 6. log, evaluate, save
        row_log = {k: sum(log[k] for log in logs) / len(logs) for k in (logs or [{}])[0]}  # means over the updates
        row_log |= {} if sft else describe(rows) | {"tokens/sampled": sampled}
        if held_out and (step % args.eval_every == 0 or step == steps):
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
            show=["sft/loss", "reward/own", "eval/mean", "policy/entropy", "policy/kl_ref"],
        )
        if not sft:
            shown = random.Random(step).sample(rows, min(args.log_samples, len(rows)))
            metrics.samples(step, sample_rows(shown, batch, tokenizer))
        if args.save_every and (step % args.save_every == 0 or step == steps):
            checkpoints.save(step, policy, optimizer, world, sampled=sampled)
    checkpoints.wait()
    export(policy, tokenizer, out / "model", world)
    if sampler:
        sampler.close()
    metrics.close()


def describe(rows: list[Row]) -> dict[str, float]:
    """What a practitioner looks at in the rows of a step."""

    def mean(values) -> float | None:
        values = list(values)
        return sum(values) / len(values) if values else None

    solved: dict[int, list[float]] = {}
    for row in rows:
        solved.setdefault(row.group, []).append(row.reward)
    statuses = ("ok", "timeout", "error", "unparsable")
    return {
        "reward/own": mean(r.reward for r in rows),
        "group/solve_all": mean(min(g) >= 1 for g in solved.values()),
        "group/solve_none": mean(max(g) < 1 for g in solved.values()),
        "length/own": mean(len(r.response) for r in rows), "length/truncated": mean(r.truncated for r in rows),
    } | {f"verifier/{s}": mean(r.status == s for r in rows) for s in statuses}


def sample_rows(rows: list[Row], batch, tokenizer) -> list[dict]:
    """Rows as text, for samples.jsonl; batch: the step's examples."""
    return [
        {
            "reward": row.reward if row.status else None, "detail": row.detail, "advantage": row.advantage,
            "gold": batch[row.group].gold, "prompt": batch[row.group].text, "response": tokenizer.decode(row.response),
        }
        for row in rows
    ]


# ------------------------------------------------------------------------------------------------ influence


def objective_gradient(policy, rows: list[Row], n_rows: int, args: Args, world) -> list[torch.Tensor]:
    """(1 / n_rows) sum_i A_i grad log pi(o_i | q_i) over these rows, on this rank alone; a tensor a parameter.

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


def inner(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Inner product of two gradients, summed in float64."""
    return sum((x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)).item()


@torch.no_grad()
def scores_along(policy, direction, rows: list[Row], args: Args, world) -> list[float]:
    """s_i = <direction, grad log pi_i> of every row, by a central difference in two forward passes.

    (log pi_i(theta + e d) - log pi_i(theta - e d)) / 2e with |e d| = influence_step |theta|; theta comes back."""
    parameters = list(policy.parameters())
    epsilon = args.influence_step * math.sqrt(inner(parameters, parameters) / (inner(direction, direction) or 1.0))
    before = [p.clone() for p in parameters]
    means = []
    for sign in (epsilon, -epsilon):
        for p, start, d in zip(parameters, before, direction, strict=True):
            p.copy_(start + sign * d)
        means.append({
            id(row): x for batch, mine in micro_batches(rows, args, world)
            for row, x in zip(mine, row_means(policy(batch, temperature=args.temperature), batch, mine).tolist())
        })
    for p, start in zip(parameters, before, strict=True):
        p.copy_(start)
    return [(means[0][id(row)] - means[1][id(row)]) / (2 * epsilon) for row in rows]


def influence(args: Args, world) -> None:
    """Measure dJ and K of an arm's SFT model; writes influence.json, queries.jsonl and influence.png.

    Every rank holds the whole model in float32 and takes its share of the queries. Rewards are of right answers alone,
    without --format_reward: a query that is never solved has no gradient."""
    args = dataclasses.replace(args, format_reward=0.0)
    [arm] = args.arms
    alone = dataclasses.replace(world, rank=0, size=1)
    on_cpu = dataclasses.replace(alone, device=torch.device("cpu"))  # neither sharded nor in bf16
    model = model_of(args, "sft", arm)
    tokenizer = open_tokenizer(model, args)
    policy = load_policy(model, on_cpu, gradient_checkpointing=args.gradient_checkpointing).to(world.device)
    parameters, clock = list(policy.parameters()), Clock()
    sampler = start_sampler(policy, tokenizer, args, world)
    sampler.sync(policy, version=0)
    n, size = args.influence_queries, args.influence_group
    examples, _, left_out = read_examples("influence", tokenizer, args)
    if len(examples) < 2 * n:
        raise InputError(f"{args.out}/data/influence.jsonl: {len(examples)} questions fit, {2 * n} are needed "
                         f"({left_out}): fewer --influence_queries, or --stage data again")

    def roll_out(first: int) -> list[Row]:  # this rank's answers to n queries, in whole groups
        mine = range(first + world.rank, first + n, world.size)
        rows = sample(sampler, examples, mine, size, args.seed + 2, args, world)
        reward(rows, examples, tokenizer, args)
        set_advantages(rows)
        return rows

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
        )
    with clock("norms"):  # each query's own gradient: its length, and dJ once more as an inner product
        found = []
        for value, query in zip(d_j.tolist(), queries.tolist(), strict=True):
            group = [row for row in rows if row.group == query]
            gradient = objective_gradient(policy, group, size, args, alone)
            length, product = math.sqrt(inner(gradient, gradient)), inner(gradient, direction)
            right = sum(row.reward >= 1 for row in group)
            found.append(dict(query=query, right=right, accuracy=right / size, dJ=value, dJ_inner=product,
                              gradient_norm=length, cosine=product / (length * norm) if length and norm else 0.0))
    with clock("kernel"):
        chosen = set(random.Random(args.seed).sample(range(n), min(args.kernel_queries, n)))
        codes = sketch_codes(parameters, args.kernel_dims)
        sketches = []
        for row in rows:
            if row.group in chosen:
                one = dataclasses.replace(row, advantage=1.0)
                gradient = objective_gradient(policy, [one], 1, args, alone)
                sketches.append((row.group, row.reward >= 1, row.advantage,
                                 count_sketch(gradient, codes, args.kernel_dims).cpu()))
    found = sorted(gather_lists(found, world), key=lambda q: q["query"])
    sketches = sorted(gather_lists(sketches, world), key=lambda s: s[0])
    seconds = {k: max(gather_lists([v], world)) for k, v in clock.flush().items()}
    if world.main:
        out = Path(args.out) / arm / "influence"
        out.mkdir(parents=True, exist_ok=True)
        summary = summarize(found, size) | kernel_table(sketches) | {"G_norm": norm} | seconds
        (out / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in found))
        (out / "influence.json").write_text(json.dumps(summary, indent=2) + "\n")
        plot_influence({arm: summary}, out / "influence.png")
        print(f"{out}: mean dJ {summary['dJ']:.4g}, cosine {summary['cosine']:.3f}, solved "
              f"never/sometimes/always {summary['never']:.2f}/{summary['sometimes']:.2f}/{summary['always']:.2f}")
    dist.barrier()


def summarize(found: list[dict], size: int) -> dict:
    """Rollout accuracies and dJ, over all queries and by how many of a query's `size` answers are right."""

    def mean(name, group):
        return sum(q[name] for q in group) / len(group) if group else None

    groups = [[q for q in found if q["right"] == k] for k in range(size + 1)]
    mixed = [q for group in groups[1:-1] for q in group]
    differences = sum((q["dJ"] - q["dJ_inner"]) ** 2 for q in found)
    exact = sum(q["dJ_inner"] ** 2 for q in found)
    return {
        "queries": len(found), "accuracy": mean("accuracy", found), "never": len(groups[0]) / len(found),
        "sometimes": len(mixed) / len(found), "always": len(groups[-1]) / len(found),
        "dJ": mean("dJ", found), "dJ_mixed": mean("dJ", mixed), "cosine": mean("cosine", mixed) or 0.0,
        "by_right": [
            {"right": k, "queries": len(group)} | {x: mean(x, group) for x in ("dJ", "cosine", "gradient_norm")}
            for k, group in enumerate(groups)
        ],
        # of the central difference against the inner product, over all queries
        "relative_error": math.sqrt(differences / exact) if exact else 0.0,
    }


def kernel_table(sketches: list[tuple]) -> dict:
    """Mean K and mean cosine of pairs of answers: right or wrong, to the same or to different queries; and the dJ of
    these queries with G from them alone, with and without each query's own answers."""
    groups = torch.tensor([s[0] for s in sketches])
    right, advantages = torch.tensor([s[1] for s in sketches]), torch.tensor([s[2] for s in sketches]).double()
    features = torch.stack([s[3] for s in sketches]).double()  # [B, dims]
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
                }
    with_own = per_step_influence(kernel_scores(kernel, advantages), advantages, groups)[0].mean().item()
    without = per_step_influence(kernel_scores(kernel, advantages, groups), advantages, groups)[0].mean().item()
    return {"kernel": table, "kernel_dJ": {"with own answers": with_own, "without": without}}


def plot_influence(summaries: dict[str, dict], path: Path) -> None:
    """Rollout accuracies, dJ and its cosine by accuracy, and co-influence; a colour for each arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 7.5), layout="constrained")
    width = 0.8 / len(summaries)
    pairs = sorted({name for s in summaries.values() for name in s["kernel"]})
    for i, (arm, summary) in enumerate(summaries.items()):
        by_right = summary["by_right"]
        x = [group["right"] + (i - (len(summaries) - 1) / 2) * width for group in by_right]
        for axis, name in ((axes[0, 1], "dJ"), (axes[1, 0], "cosine")):
            axis.bar(x, [group[name] or 0.0 for group in by_right], width, label=arm)
        axes[0, 0].bar(x, [group["queries"] / summary["queries"] for group in by_right], width, label=arm)
        axes[1, 1].bar([j + (i - (len(summaries) - 1) / 2) * width for j in range(len(pairs))],
                       [summary["kernel"].get(name, {}).get("cosine", 0.0) for name in pairs], width, label=arm)
    titles = ("share of queries", "dJ, mean", "dJ / (|G| |grad J|), mean", "co-influence: mean cosine of gradients")
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3, axis="y")
        axis.axhline(0, color="black", lw=0.6)
    for axis in axes.flat[:3]:
        axis.set_xlabel(f"right answers of {len(by_right) - 1}")
    axes[1, 1].set_xticks(range(len(pairs)), [name.replace(" query, ", "\n") for name in pairs], fontsize=8)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------- evaluation


def test_model(model: str, args: Args, world) -> dict[str, dict]:
    """A model's answers to both test sets: {test: {accuracy, chain, ...}}.

    chain: share of answers whose every step is right (igsm.check_solution); accuracy_zero: of answers that are 0;
    greedy: accuracy without sampling, where the others are sampled at eval_temperature (RL can raise these by making
    a model surer of what it would say anyway)."""
    tokenizer = open_tokenizer(model, args)
    policy = load_policy(model, world)
    sampler = start_sampler(policy, tokenizer, args, world)
    sampler.sync(policy, version=0)
    results = {}
    for name in ("test_id", "test_ood"):
        examples, questions, _ = read_examples(name, tokenizer, args)
        mine = range(world.rank, len(examples), world.size)
        drawn = {}
        for temperature in sorted({0.0, args.eval_temperature}):
            how = dataclasses.replace(args, temperature=temperature, format_reward=0.0)
            drawn[temperature] = sample(sampler, examples, mine, 1, args.seed + 1, how, world)
            reward(drawn[temperature], examples, tokenizer, how)
        greedy = gather_lists([row.reward for row in drawn[0.0]], world)
        answers = []
        for row in drawn[args.eval_temperature]:
            found = igsm.check_solution(
                questions[row.group], answer_text(row, tokenizer), modulus=args.modulus or None
            )
            answers.append(dict(
                accuracy=row.reward, chain=float(found.correct), zero=examples[row.group].gold == "0",
                tokens=len(row.response), truncated=row.truncated, reflections=found.reflections,
                analyses=found.analyses, subgoals=found.subgoals, retries=found.retries,
            ))
        answers = gather_lists(answers, world)

        def mean(name, chosen):
            return sum(answer[name] for answer in chosen) / len(chosen) if chosen else None

        zeros, rest = [a for a in answers if a["zero"]], [a for a in answers if not a["zero"]]
        results[name] = {k: mean(k, answers) for k in answers[0]} | {
            "questions": len(answers), "accuracy_zero": mean("accuracy", zeros),
            "accuracy_other": mean("accuracy", rest), "greedy": sum(greedy) / len(greedy),
        }
    sampler.close()
    return results


def evaluate_arm(args: Args, world) -> None:
    """Test an arm's SFT and RL models; writes OUT/ARM/eval.json. The base model's is OUT/base/eval.json."""
    [arm] = args.arms
    given = {"sft"} if args.sft_model else set()  # a folder or a Hub name
    trained = [stage for stage in ("sft", "rl") if stage in given or Path(model_of(args, stage, arm)).exists()]
    stages = ["base"] if arm == "base" else trained
    if not stages:
        raise InputError(f"{args.out}/{arm}: no model there; run --stage sft and --stage rl first")
    results = {stage: test_model(model_of(args, stage, arm), args, world) for stage in stages}
    if world.main:
        path = Path(args.out) / arm / "eval.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")
    dist.barrier()


def report(args: Args) -> dict:
    """All arms in one table; writes OUT/results.json, influence.png and curves.png."""
    out, results = Path(args.out), {}
    for arm in ("base", *args.arms):
        if (out / arm / "eval.json").exists():
            results[arm] = json.loads((out / arm / "eval.json").read_text())
        if (out / arm / "influence" / "influence.json").exists():
            results.setdefault(arm, {})["influence"] = json.loads((out / arm / "influence/influence.json").read_text())
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    measured = {arm: r["influence"] for arm, r in results.items() if "influence" in r}
    if measured:
        plot_influence(measured, out / "influence.png")
    runs = {arm: out / arm / "rl" for arm in args.arms if (out / arm / "rl" / "metrics.jsonl").exists()}
    if runs:
        panels = [["eval/mean"], ["reward/own"], ["group/solve_none"], ["policy/entropy"], ["policy/kl_ref"],
                  ["length/own"]]
        plot_curves(runs, panels, out / "curves.png")

    def percent(arm, stage, test, name="accuracy"):
        value = results[arm].get(stage, {}).get(test, {}).get(name)
        return f"{100 * value:6.1f}" if value is not None else "     -"

    print(f"\n{'':11}in distribution, %      out of distribution, %     queries solved, share       dJ")
    print(f"{'':11}   SFT ->   RL (chain)      SFT ->   RL (chain)   never  sometimes  always    mean")
    for arm, found in results.items():
        line = f"{arm:10}"
        for test in ("test_id", "test_ood"):
            before = percent(arm, "base" if arm == "base" else "sft", test)
            line += f" {before} -> {percent(arm, 'rl', test)[1:]} ({percent(arm, 'rl', test, 'chain').strip():>5})  "
        if "influence" in found:
            line += f"   {found['influence']['never']:.2f}     {found['influence']['sometimes']:.2f}     "
            line += f"{found['influence']['always']:.2f}   {found['influence']['dJ']:8.4f}"
        print(line)
    print(f"\n{out}: results.json{', influence.png' * bool(measured)}{', curves.png' * bool(runs)}")
    return results


def main(args: Args) -> None:
    check(args)
    world = init_world(args.timeout_minutes)
    stages = ["data", "base", "sft", "rl", "influence", "eval"] if args.stage == "all" else [args.stage]
    if "data" in stages:
        make_data(args, world)
    if "base" in stages and args.base_problems:
        train(settings_of(args, "base", "base"), world)
    for arm in args.arms:
        for stage, run in (("sft", train), ("rl", train), ("influence", influence), ("eval", evaluate_arm)):
            if stage in stages:
                run(settings_of(args, stage, arm), world)
    if "eval" in stages:
        if args.base_problems or not args.arms:
            evaluate_arm(settings_of(args, "eval", "base"), world)
        if world.main:
            report(args)


if __name__ == "__main__":
    args = parse_args(Args, None, preset=PRESETS)
    launch(main, args)
