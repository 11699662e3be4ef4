"""Behavior injection (BRIDGE): preparing a model for reinforcement learning (Cen et al., arXiv 2505.18917).

BRIDGE changes the SFT data, not RL. It makes a model in three steps:
1. Write the SFT solutions with behaviors: look ahead and come back (reflection), repeat what the question says
   (analysis), one operation at a time (subgoals). An arm is one way to write them: `arms_of`, igsm/behaviors.py.
2. SFT: the token mean of -log p, prompts included, of a block of 4 rows, averaged over blocks.
3. GRPO, with the SFT model as reference. R_i is 1 for a correct answer, else 0, plus --format_reward for its form:

    A_i  = (R_i - mean R) / (std R + 1e-6)                               over the N answers to q, std over N - 1
    loss = mean_i mean_t [ max(-A_i r, -A_i clamp(r, 1 - c, 1 + c)) + kl_coef min(k, 10) - entropy_coef H ]

For token t of answer i: r = p / p_old, k = e^d - d - 1 with d = log p_ref - log p, H is the entropy, c is --clip. The
loss of an answer whose mean of min(k, 10) reaches --kl_mask is 0.

Why behaviors may help: J(q) is GRPO's objective for one question, without KL and entropy; J is its mean over questions.
A gradient step of size eta on J raises J(q), to first order, by

    dJ(q) = eta <G, grad J(q)> = eta mean_{q',o'} A(q',o') sqrt(a(q) (1 - a(q))) (mean_+ K - mean_- K)          (Eq. 5)
    K     = <grad log pi(o' | q'), grad log pi(o | q)>,    G = grad J, the mean of grad J(q') over questions q'

o is one of N answers to q, a(q) the fraction of correct ones; mean_+ is over correct o, mean_- over incorrect ones; log
pi is a mean over tokens. (GRPO's std is over N - 1: dJ is (N - 1) / N of this.) So RL needs questions that are solved
sometimes, and correct answers whose gradients agree across questions, more than with those of incorrect ones.

Departures from the published code that change numbers (the docs page has all of them, with reasons):
- All arms use the same problems, with numbers from 1. Published: from 0, so "0" is right in 17 to 27 % of them.
- The RL gradient is the true mean over rows; the published one was an eighth of it, so max_grad_norm is 8, not 1.
- A response ends with its first eos. In the published code a pad after the answer was trained on as an eos.

  python behavior_injection.py --preset tiny               all stages on two CPU cores in 15 minutes, no download
  torchrun --nproc_per_node 2 behavior_injection.py        the paper's run (Llama: --preset paper_llama)
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import igsm
from common.data import InputError, batch_indices, block_denominators
from common.metrics import plot_curves
from common.report import read_results, table, write_results
from common.rows import in_words, load_rows, read_examples, read_row, set_template
from common.run import (
    Grader,
    NotNegative,
    Positive,
    Row,
    Run,
    RunArgs,
    Share,
    add_drift,
    check_flags,
    describe,
    lock,
    mean,
    micro_batches,
    open_policy,
    open_sampler,
    per_token,
    policy_logps,
    sample_rows,
    split_updates,
    trace_rows,
    write_whole,
)
from common.trainer import Totals, init_world, launch, load_policy, load_tokenizer, make_optimizer, parse_args

Group = Annotated[int, ("2 or more (a single answer has no advantage)", lambda n: n > 1)]
Chance = Annotated[float | Literal["table"], ('between 0 and 1, or "table"', lambda x: x == "table" or 0 <= x <= 1)]


@dataclass
class Args(RunArgs):
    # data: write problems, and each arm's solutions, into OUT/data. base: train --model on --base_problems easy plain
    # problems. sft: fine-tune the base model on the arm's solutions. rl: GRPO from there. eval: test both models and
    # print the table of all arms. all: these five
    stage: Literal["all", "data", "base", "sft", "rl", "eval"] = "all"
    # paper: the published run of Qwen2.5-1.5B. paper_llama: of Llama-3.2-1B. tiny: a laptop, symbolic iGSM
    preset: Literal["paper", "paper_llama", "tiny"] = "paper"
    # Ways to write the solutions. vanilla: plain. subgoal, reflection, analysis: one behavior. bridge: all three.
    # pp_aug: each problem four times, its question's sentences in other orders. rc_aug: its solution's steps in other
    # orders. retry: Meta's retries
    arms: tuple[str, ...] = ("vanilla", "pp_aug", "rc_aug", "bridge")
    model: str = "Qwen/Qwen2.5-1.5B"  # Model folder or Hub name that the first trained stage starts from
    sft_model: str = ""  # Model that rl, eval and the influence of one arm start from. Empty: the SFT stage's
    out: str = "runs/behavior_injection"  # Folder of all stages: data, base, ARM/sft, ARM/rl. Rerun to resume each.
    data: str = ""  # Unused: put your own rows into OUT/data (sft_ARM.jsonl, rl.jsonl) and run --stage sft or rl.
    eval_data: tuple[str, ...] = ()  # Unused: your own rows for the evaluation during RL are OUT/data/val.jsonl.
    igsm_problems: Positive[int] = 20000  # Unused: see --sft_problems, --rl_problems, --eval_problems.
    verifier: str = "boxed"  # Grader: boxed (BRIDGE's: the first box), robust, math, ... or your module:function
    max_response_tokens: Positive[int] = 2560  # Longest answer to sample and longest solution to train on

    style: Literal["natural", "symbolic"] = "natural"  # Problems in sentences, or in equations for tiny models
    modulus: NotNegative[int] = 0  # Compute modulo this number; 0: with plain integers
    max_params: Positive[int] = 20  # Largest number of sentences in a question
    shuffle: bool = True  # Sentences in random order. Off: in the solution's order, which is much easier
    system_prompt: bool = True  # Begin prompts with BRIDGE's system message.
    ops: tuple[int, int] = (15, 20)  # Fewest and most operations of problems for SFT, RL and influence
    val_ops: tuple[int, int] = (21, 25)  # Fewest and most operations of problems for evaluation during RL
    test_ops: tuple[int, int] = (20, 25)  # Operations per problem: in-distribution test, out-of-distribution test
    sft_problems: Positive[int] = 2000  # Problems for SFT, the same for every arm
    rl_problems: Positive[int] = 10000  # Problems for RL
    eval_problems: Positive[int] = 500  # Problems for the evaluation during RL, and for each test
    reflection: Share[float] = 0.1  # Chance of a look-ahead before a line of the solution
    # Chance of an analysis of a line. table (published): 0.1, 0.4, 0.8, 1 for a line with 1, 2, 3, more quantities
    analysis: Chance = "table"
    retry: Share[float] = 0.1  # Chance of a retry before a line
    base_problems: NotNegative[int] = 0  # Plain problems to train the base model on; 0: --model is the base model
    base_ops: tuple[int, int] = (1, 4)  # Fewest and most operations of these

    sft_steps: NotNegative[int] = 0  # SFT updates; 0 follows --sft_epochs (published: 75; pp_aug and rc_aug 310).
    sft_epochs: Positive[float] = 5  # Passes over the arm's rows if --sft_steps is 0
    sft_batch_size: Positive[int] = 128  # Rows per SFT update
    sft_lr: NotNegative[float] = 5e-6  # Learning rate of SFT, constant; betas 0.9 0.95 (--lr, --schedule, ...: RL's)
    prompt_loss: bool = True  # Train SFT on the tokens of prompts too.
    # SFT loss: average the token means of blocks of this many rows; 0: one block, the mean over all tokens
    sft_rows_per_mean: NotNegative[int] = 4
    base_steps: Positive[int] = 3500  # Updates of the base model, of 64 problems each
    base_lr: NotNegative[float] = 1.5e-3  # Peak learning rate of the base model

    steps: NotNegative[int] = 200  # RL: steps; 0 follows --epochs (SFT: --sft_steps).
    batch_size: Positive[int] = 32  # RL: questions per step (SFT: --sft_batch_size)
    group_size: Group = 32  # RL: answers per question
    updates_per_step: Positive[int] = 1  # RL: updates per step (SFT: 1). With 1, as published, the clip never acts.
    temperature: Positive[float] = 1.0  # RL: sampling temperature. The policy is trained at it too.
    clip: NotNegative[float] = 0.2  # RL: PPO clip of the ratio; 0: none
    kl_coef: NotNegative[float] = 0.001  # RL: weight of the KL to the SFT model (not loaded if this and kl_mask are 0)
    kl_mask: NotNegative[float] = 0.0  # RL: leave out answers whose mean KL is this or more; 0: none (Llama: 0.15)
    entropy_coef: NotNegative[float] = 0.001  # RL: weight of the entropy bonus
    format_reward: NotNegative[float] = 0.0  # RL: bonus for <think>...</think><answer>...</answer> (Llama: 0.05)
    # RL: clip the gradient norm (8 here is 1 in the published code, whose gradient was 8 times smaller). SFT: 1
    max_grad_norm: Positive[float] = 8.0
    eval_every: NotNegative[int] = 5  # RL: evaluate every this many steps, before step 1 and after the last; 0: never
    eval_temperature: NotNegative[float] = 0.0  # Sampling temperature of evaluation; 0 is greedy.
    keep_best: bool = False  # RL: also keep the model of the highest eval/mean, in OUT/ARM/rl/best.


PRESETS = {
    "paper_llama": dict(
        model="meta-llama/Llama-3.2-1B-Instruct", out="runs/behavior_injection_llama", kl_coef=0.01, kl_mask=0.15,
        entropy_coef=0.0, max_grad_norm=1.6, format_reward=0.05,
    ),
    "tiny": dict(
        model="models/tiny", out="runs/tiny_bridge", style="symbolic", modulus=23, max_params=4, shuffle=False,
        system_prompt=False, max_prompt_tokens=160, max_response_tokens=240, ops=(5, 8), val_ops=(5, 8),
        test_ops=(6, 9), eval_problems=600, eval_temperature=1.0, sft_steps=75, sft_lr=5e-4,
        prompt_loss=False, steps=80, batch_size=16, group_size=8, lr=5e-5, max_grad_norm=1.0, eval_every=20,
        save_every=40, micro_batch_tokens=4096,
    ),
}  # fmt: skip
TESTED_WITH = """verifier eval_temperature eval_limit max_prompt_tokens max_response_tokens seed chat_template
    chat_template_args modulus test_id.jsonl test_ood.jsonl"""  # arms are compared if these are the same


def arms_of(args: Args) -> dict[str, list[dict]]:
    """{arm: keyword arguments of igsm.retell}: a list with one dictionary for each row that it makes from a problem."""
    reflection, analysis = dict(reflection=args.reflection), dict(analysis=args.analysis)
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


def group_advantages(rewards: Tensor, groups: Tensor, *, ddof: int = 1, eps: float = 1e-6) -> Tensor:
    """A_i = (R_i - mean) / (std + eps) over the rewards of i's group; 0 if all are equal (float64: but for rounding).

    rewards [B] float32 or float64, groups [B] int (the question of each row) -> [B], of rewards' dtype.
    ddof 1 divides the variance by n - 1, as the published code does. ddof 0 divides it by n, as in the paper: the std
    is then sqrt(a (1 - a)) for a fraction a of correct answers.

    >>> group_advantages(torch.tensor([1.0, 0, 0, 0]), torch.tensor([7, 7, 7, 7]), eps=0.0).tolist()
    [1.5, -0.5, -0.5, -0.5]
    """
    _, group = groups.unique(return_inverse=True)  # [B], 0 .. Q-1
    n = group.bincount()  # [Q], rows of each question
    centered = rewards - (group.bincount(rewards) / n)[group]
    sigma = (group.bincount(centered**2) / (n - ddof).clamp(min=1)).sqrt()
    return centered / torch.where(sigma > 1e-9, sigma + eps, 1.0)[group]


def policy_token_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip: float | None = None) -> Tensor:
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


def low_variance_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate of KL(pi || ref) from each token, elementwise: e^d - d - 1, d = log ref - log pi; at most 10.

    Never below 0, except for rounding (float32: down to -1e-7). Over tokens drawn from pi, without the cap, its mean
    is KL(pi || ref), but the mean of its gradient is the gradient of KL(ref || pi)."""
    d = (ref_logp - logp).clamp(max=20)  # far above the cap: its gradient is 0, not 0 times inf
    return (d.exp() - d - 1).clamp(max=10)


def format_reward(completion: str) -> float:
    """1.0 if the completion of a prompt that ends with <think> has the form ...</think><answer>...</answer>. Text may
    follow after a newline, as published.

    >>> format_reward("1 + 1 = 2</think><answer>2</answer>"), format_reward("2")
    (1.0, 0.0)
    """
    return float(bool(re.match(r".*?</think>\s*<answer>.*?</answer>$", completion, re.DOTALL | re.MULTILINE)))


def kernel_scores(kernel: Tensor, advantages: Tensor, groups: Tensor | None = None) -> Tensor:
    """The inner mean of Eq. 5: s_i = mean_j A_j K_ji = <G, grad log pi_i>, with G = mean_j A_j grad log pi_j.

    kernel [B, B], advantages [B] -> [B]. groups [B]: G without the answers j to i's own question."""
    others = torch.ones_like(kernel) if groups is None else (groups[:, None] != groups[None]).to(kernel.dtype)
    return (kernel * others) @ advantages / others.sum(1).clamp(min=1)


def per_step_influence(scores: Tensor, advantages: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """dJ(q) / eta = mean_i A_i s_i over the answers i to q: how much a small step along G raises J(q) (Eq. 5).

    scores [B]: s_i = <G, grad log pi_i>, of log-probs that are means over an answer's tokens, by `kernel_scores`,
    by an inner product or by a difference along G. advantages [B], groups [B] -> (dJ / eta [Q], the Q groups in order).
    With advantages of ddof 0 it equals sqrt(a (1 - a)) (mean of s over correct answers - mean over incorrect ones).
    With ddof 1 it is sqrt((N - 1) / N) times that; if those in G have ddof 1 too, (N - 1) / N times.

    >>> scores, advantages = torch.tensor([3.0, 1.0, 7.0]), torch.tensor([1.0, -1.0, 0.0])
    >>> per_step_influence(scores, advantages, torch.tensor([4, 4, 9]))[0].tolist()
    [1.0, 0.0]
    """
    questions, group = groups.unique(return_inverse=True)
    return group.bincount(advantages * scores) / group.bincount(), questions


def row_means(values: Tensor, batch, rows: list[Row]) -> Tensor:
    """Mean of `values` [N] over the response tokens of each row of a micro-batch -> [rows]."""
    lengths = values.new_tensor([len(row.response) for row in rows])
    return values.new_zeros(len(rows)).index_add(0, batch.sequence, values) / lengths


def accumulate_gradient(
    policy, rows: list[Row], old_logps: list | None, ref_logps: list | None, args: Args, world
) -> dict[str, float]:
    """Forward and backward of one RL update, summed over ranks and micro-batches; the gradient is left in .grad.

    `rows` are those of all ranks. Divide by counts over all ranks: each token by its row's length, each row by the
    number of rows. So the gradient is the same for any number of ranks and any micro_batch_tokens.
    old_logps: log-probs before the step's updates, from `policy_logps`; None in the first update, where p_old = p.
    ref_logps: those of the reference; None without one."""
    n_tokens, totals = sum(len(row.response) for row in rows), Totals(world)
    for i, (batch, my_rows) in enumerate(micro_batches(rows, args, world)):
        logp, entropy = policy(batch, temperature=args.temperature, entropy=True)  # [N], [N]
        old = logp.detach() if old_logps is None else old_logps[i]  # [N]
        advantage = per_token(batch, [row.advantage for row in my_rows])  # [N]
        token_loss = policy_token_loss(logp, old, advantage, clip=args.clip or None)  # [N]
        kl = torch.zeros_like(logp) if ref_logps is None else low_variance_kl(logp, ref_logps[i])  # [N]
        row_loss = row_means(token_loss + args.kl_coef * kl - args.entropy_coef * entropy, batch, my_rows)  # [rows]
        row_kl = row_means(kl.detach(), batch, my_rows)  # [rows]
        kept = row_kl < (args.kl_mask or math.inf)  # [rows]; the others still count in the mean
        loss = torch.where(kept, row_loss, 0.0).sum() / len(rows)
        (loss * world.size).backward()  # FSDP averages over ranks; we need the sum

        pg = torch.where(kept, row_means(token_loss, batch, my_rows), 0.0).sum()
        totals.add({"loss/pg": pg, "policy/kl_ref": row_kl.sum(), "policy/masked": (~kept).sum()}, per=len(rows))
        totals.add({"policy/entropy": entropy.sum()}, per=n_tokens)
        drawn_logp = per_token(batch, [row.drawn_logps for row in my_rows])  # [N]
        add_drift(totals, logp.detach(), old, drawn_logp, clip=args.clip, per=n_tokens)
    return totals.reduce()


def accumulate_sft_gradient(policy, rows: list[Row], args: Args, world) -> dict[str, float]:
    """Forward and backward of one SFT update, at temperature 1; the gradient is left in .grad.

    loss = - (1/n) sum_k (1/T_k) sum_{t in k} log p_t over n blocks of sft_rows_per_mean neighbors in `rows`, with T_k
    tokens each. The gradient is the same for any number of ranks and any micro_batch_tokens."""
    lengths = [len(row.response) for row in rows]
    totals = Totals(world)
    denominators = block_denominators(lengths, args.sft_rows_per_mean)  # of each row
    for batch, mine in micro_batches(range(len(rows)), args, world, lambda i: [(rows[i].prompt, rows[i].response)]):
        logp, entropy = policy(batch, entropy=True)  # [N], [N]
        loss = -(logp / per_token(batch, [denominators[i] for i in mine])).sum()
        (loss * world.size).backward()  # FSDP averages over ranks; we need the sum

        totals.add({"sft/loss": loss})
        totals.add({"sft/logp": logp.sum(), "sft/entropy": entropy.sum()}, per=sum(lengths))
    return totals.reduce()


def make_data(args: Args, world) -> None:
    """Write the data sets of all stages into OUT/data. All files sft_ARM have the same problems. No problem of val,
    test_id or test_ood shares its solution template with a training problem."""
    _held = lock(Path(args.out, "data"), world, wait=True)  # all arms share a set's settings file: one process writes
    if world.main:
        seed, ways = 1000 * args.seed, arms_of(args)
        write_set("sft_", args.sft_problems, args.ops, "train", seed + 100, args, {arm: ways[arm] for arm in args.arms})
        write_set("rl", args.rl_problems, args.ops, "train", seed + 200, args)
        write_set("base", args.base_problems, args.base_ops, "train", seed + 600, args)
        write_set("val", args.eval_problems, args.val_ops, "test", 300, args)
        for name, ops in zip(("test_id", "test_ood"), args.test_ops, strict=True):
            write_set(name, args.eval_problems, (ops, ops), "test", 400, args)
    dist.barrier()


def write_set(name: str, n: int, ops: tuple, split: str, seed: int, args: Args, arms: dict | None = None) -> None:
    """Write OUT/data/NAME.jsonl, rows in LUFFY's schema: n problems, seeded by `seed`. With arms (of `arms_of`): a file
    NAMEARM.jsonl for each, of the same problems. Files of the same settings are kept. InputError if it would replace a
    file that it has not written. One rank calls it."""
    settings = dict(ops=ops, split=split, seed=seed, style=args.style, modulus=args.modulus or None,
                    max_params=args.max_params, shuffle=args.shuffle,
                    max_literal=min(9, args.modulus - 1) if args.modulus else 9)  # fmt: skip
    problems = json.loads(json.dumps(settings | dict(n=n, system_prompt=args.system_prompt)))  # lists, as in the file
    folder, arms = Path(args.out, "data"), {"": [{}]} if arms is None else arms
    record_file = folder / f"{name}.settings.json"  # written last: the files that it describes are complete
    old = json.loads(record_file.read_text()) if record_file.exists() else {"problems": None, "checksums": {}}
    record = old if old["problems"] == problems else {"problems": problems, "arms": {}, "checksums": {}}
    files = {arm: folder / f"{name}{arm}.jsonl" for arm in old["checksums"] | arms}
    missing = [arm for arm in arms if record["arms"].get(arm) != arms[arm] or not files[arm].exists()]
    if not n or not missing:
        return
    for arm in missing if record is old else files:  # arms of other problems must not stay beside the new ones
        if files[arm].exists() and crc32(files[arm].read_bytes()) != old["checksums"].get(arm):
            raise InputError(f"{files[arm]} was not made by --stage data: move it away, or use it with --stage sft, rl "
                             f"or eval (tools.influence: delete {record_file.name})")  # fmt: skip

    lines = {arm: [] for arm in missing}
    try:
        for problem in tqdm(igsm.problems(n, **settings), f"data {name.rstrip('_')}", n, unit="problem", leave=False):
            for arm in missing:
                for way in arms[arm]:
                    row = igsm.row(igsm.retell(problem, **way), split, args.system_prompt)
                    lines[arm].append(json.dumps(row) + "\n")
    except ValueError as error:
        raise InputError(f"problems of {name.rstrip('_')}: {error} (--ops, --val_ops, ... set them)") from error
    if record is not old:
        for file in [record_file, *files.values()]:
            file.unlink(missing_ok=True)
    for arm in missing:
        write_whole(files[arm], "".join(lines[arm]))
        record["arms"][arm], record["checksums"][arm] = arms[arm], crc32(files[arm].read_bytes())
    write_whole(record_file, json.dumps(record) + "\n")


def read_set(name: str, tokenizer, args: Args, **options):
    """Return the examples of OUT/data/NAME.jsonl, and counts of what was left out (options: `make_examples`)."""
    path = Path(args.out, "data", f"{name}.jsonl")
    if not path.exists():
        raise InputError(f"{path} is missing: run --stage data first (with --arms naming it; val: or --eval_every 0)")
    examples, left_out = read_examples(str(path), tokenizer, args, split="train", **options)
    asked = name in ("val", "test_id", "test_ood", "influence")  # of the others Run.plan says it
    if asked and left_out["kept"] < left_out["rows"] and dist.get_rank() == 0:
        print(f"{path}: {in_words(left_out, args)}")
    return [replace(example, source=name) for example in examples], left_out


def check(args: Args) -> None:
    """Raise InputError for settings that cannot work together."""
    check_flags(args)
    if unknown := [arm for arm in args.arms if arm not in arms_of(args)]:
        raise InputError(f"--arms {unknown[0]}: no such arm; there are {', '.join(arms_of(args))}")
    if args.stage == "base" and not args.base_problems:
        raise InputError("--stage base needs --base_problems, the number of problems to train on")
    for few, batch in (("sft_problems", "sft_batch_size"), ("rl_problems", "batch_size")):
        if args.stage == "all" and getattr(args, few) < getattr(args, batch):
            raise InputError(f"--{few} {getattr(args, few)} are fewer than --{batch} {getattr(args, batch)}")
    if args.sft_model and (len(args.arms) != 1 or args.stage not in ("rl", "eval")):
        raise InputError(f"--sft_model {args.sft_model} is one arm's: name it by --arms, with --stage rl or eval")
    if args.data or args.eval_data:
        raise InputError("--data and --eval_data: put your own rows into OUT/data (sft_ARM, rl and val.jsonl) instead, "
                         "and run --stage sft, rl or eval")  # fmt: skip


def settings_of(args: Args, stage: str, arm: str) -> Args:
    """The settings of one stage of one arm, the same in every command."""
    changes = {
        "base": dict(steps=args.base_steps, batch_size=64, lr=args.base_lr, schedule="cosine", warmup=0.02,
                     lr_floor=0.02, betas=(0.9, 0.99), weight_decay=0.1, prompt_loss=False, sft_rows_per_mean=0),
        "sft": dict(steps=args.sft_steps, epochs=args.sft_epochs, batch_size=args.sft_batch_size, lr=args.sft_lr,
                    schedule="constant", warmup=0.0, betas=(0.9, 0.95)),
    }.get(stage, {})  # fmt: skip
    if stage != "rl":
        changes |= dict(updates_per_step=1, max_grad_norm=1.0, eval_every=0, keep_best=False)
    return replace(args, stage=stage, arms=(arm,), **changes)


def folder_of(args: Args, stage: str, arm: str) -> str:
    """The run folder of a stage."""
    return f"{args.out}/base" if stage == "base" else f"{args.out}/{arm}/{stage}"


def model_of(args: Args, stage: str, arm: str) -> str:
    """The model that a stage leaves to the next one."""
    given = {"base": "" if args.base_problems else args.model, "sft": args.sft_model}
    return given.get(stage) or f"{folder_of(args, stage, arm)}/model"


def open_tokenizer(model: str, args: Args):
    """Return the tokenizer of a model. Its template ends prompts with "<think>", where the solutions go on."""
    if model.startswith(f"{args.out}/") and not Path(model).exists():
        raise InputError(f"{model} is missing: run the stage before this one first (--stage base or sft)")
    tokenizer = load_tokenizer(model, flag="--sft_model" if model == args.sft_model else "--model")
    return set_template(tokenizer, args.chat_template, args.chat_template_args, think=True)


def train(args: Args) -> None:
    """Train one stage of one arm: base and sft on solutions, rl on own answers."""
    [arm], rl = args.arms, args.stage == "rl"
    name = {"base": "base", "sft": f"sft_{arm}", "rl": "rl"}[args.stage]
    model = {"base": args.model, "sft": model_of(args, "base", arm), "rl": model_of(args, "sft", arm)}[args.stage]
    run = Run(args, out=folder_of(args, args.stage, arm))
    world, tokenizer = run.world, open_tokenizer(model, args)
    traces = "ignored" if rl else "needed"
    examples, left_out = read_set(name, tokenizer, args, traces=traces, golds=rl, progress=world.main)
    if args.prompt_loss and not rl:  # the prompt's tokens join the response, except the first, which nothing predicts
        examples = [replace(e, prompt=e.prompt[:1], trace=e.prompt[1:] + e.trace) for e in examples]
    evaluates = rl and (args.eval_every or Path(args.out, "data", "val.jsonl").exists())  # the digest is of val too
    held_out = read_set("val", tokenizer, args, traces="ignored")[0] if evaluates else []
    flag = {"rl": "--batch_size", "sft": "--sft_batch_size"}.get(args.stage, "a batch of")
    run.plan(examples, held_out[: args.eval_limit or None], left_out, source=f"{args.out}/data/{name}.jsonl",
             batch_flag=flag, models={"model": model})  # fmt: skip

    policy = open_policy(model, args, world)
    optimizer = make_optimizer(policy, lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
    has_kl = rl and (args.kl_coef or args.kl_mask)
    reference = open_policy(model, args, world, gradient_checkpointing="none").requires_grad_(False) if has_kl else None
    run.begin(policy, optimizer, tokenizer)
    sampler = open_sampler(policy, tokenizer, args, world, needed=rl or run.held_out)
    sampler.sync(policy, version=run.start)
    grader, sampled = Grader(tokenizer, args.verifier), run.state.get("sampled", 0)  # tokens so far
    if first := run.evaluate(sampler):
        run.log(first | {"tokens/sampled": 0})

    for step in run:
        batch = [examples[i] for i in batch_indices(len(examples), args.batch_size, step - 1, args.seed)]
        my_questions = range(world.rank, len(batch), world.size)  # questions that this rank samples and grades

        # 1. sample: own answers (base, sft: the arm's solutions)
        with run.clock("sample"):
            if rl:
                n = args.group_size
                rows = sample_rows(sampler, batch, my_questions, n, args, world, seed=run.step_seed, grader=grader)
            else:
                rows = trace_rows(batch, my_questions)

        # 2. reward (base, sft: nothing is graded)
        with run.clock("reward"):
            rows = grader.gather(rows, world)  # every rank has all rows now
            row_log = describe(rows) if rl else {}
            if rl and args.format_reward:  # after `describe`: the bonus does not make a question a solved one
                for row in rows:
                    row.reward += args.format_reward * format_reward(row.text(tokenizer))
                row_log["reward/own"] = mean(row.reward for row in rows)

        # 3. advantages (base, sft: not used)
        rewards = torch.tensor([row.reward for row in rows], dtype=torch.float64)  # [B]
        question = torch.tensor([row.group for row in rows])  # [B]
        for row, advantage in zip(rows, group_advantages(rewards, question).tolist(), strict=True):
            row.advantage = advantage

        # 4. update
        with run.clock("update"):
            sampler.sleep()  # frees its memory for the trainer until the sync
            updates = split_updates(rows, args)
            old = [None] + [policy_logps(policy, update, args, world) for update in updates[1:]]
            for u, update in enumerate(updates):
                if rl:
                    ref = policy_logps(reference, update, args, world) if reference else None
                    log = accumulate_gradient(policy, update, old[u], ref, args, world)
                else:
                    log = accumulate_sft_gradient(policy, update, args, world)
                run.update("policy", log, update, lr=run.lr(u, len(updates)), max_grad_norm=args.max_grad_norm)

        # 5. sync
        with run.clock("sync"):
            sampler.sync(policy, version=step)

        # 6. log, evaluate, save
        if rl:
            sampled += sum(len(row.response) for row in rows)
            row_log["tokens/sampled"] = sampled
        run.log(row_log | run.evaluate(sampler), rows)
        run.save(sampled=sampled)
    run.finish(sampler)


def read_questions(path: str, args: Args) -> list[str]:
    """Return the questions of a file. Raises InputError if one is not of iGSM or its gold is of another --modulus."""
    items = [read_row(row, f"{path}, row {i}") for i, row in enumerate(load_rows(path))]
    for i, item in enumerate(items):
        try:
            answer = igsm.solve(item.question, modulus=args.modulus or None)
        except ValueError as error:
            raise InputError(f"{path}, row {i}: {error}; --stage eval checks steps of iGSM: use eval.py") from error
        if str(answer) != item.gold:
            raise InputError(f"{path}, row {i}: with --modulus {args.modulus} its answer is {answer}, not {item.gold}")
    return [item.question for item in items]


def test_model(model: str, args: Args, world) -> dict[str, dict]:
    """Return {test: {accuracy, chain, ...}} of a model's answers to both test sets, sampled at eval_temperature.

    chain: fraction of answers whose every step is correct (igsm.check_solution). accuracy_zero: accuracy on problems
    whose result is 0. greedy: accuracy at temperature 0. RL can raise the sampled one alone, by low entropy."""
    tokenizer, policy = open_tokenizer(model, args), load_policy(model, world)
    sampler, grader = open_sampler(policy, tokenizer, args, world), Grader(tokenizer, args.verifier)
    sampler.sync(policy, version=0)
    results = {}
    for name in ("test_id", "test_ood"):
        examples = read_set(name, tokenizer, args, traces="ignored")[0][: args.eval_limit or None]
        asked = read_questions(f"{args.out}/data/{name}.jsonl", args)
        mine = range(world.rank, len(examples), world.size)
        rows = {t: sample_rows(sampler, examples, mine, 1, args, world, seed=args.seed + 1, grader=grader,
                               temperature=t) for t in sorted({0.0, args.eval_temperature})}  # fmt: skip
        greedy, sampled = (grader.gather(rows[t], world) for t in (0.0, args.eval_temperature))
        checks = [igsm.check_solution(asked[row.example.index], row.text(tokenizer), modulus=args.modulus or None)
                  for row in sampled]  # fmt: skip
        results[name] = {
            "questions": len(sampled),
            "accuracy": mean(row.reward for row in sampled),
            "accuracy_zero": mean(row.reward for row in sampled if row.example.gold == "0"),
            "accuracy_other": mean(row.reward for row in sampled if row.example.gold != "0"),
            "greedy": mean(row.reward for row in greedy),
            "chain": mean(check.correct for check in checks),
            "tokens": mean(len(row.response) for row in sampled),
            "truncated": mean(row.truncated for row in sampled),
        } | {behavior: mean(getattr(check, behavior) for check in checks)
             for behavior in ("reflections", "analyses", "subgoals", "retries")}  # fmt: skip
    sampler.close()
    return results


def evaluate_arm(arm: str, args: Args, world) -> None:
    """Test an arm's SFT and RL models (of the arm "base": the base model); write OUT/ARM/eval.json."""
    models = {stage: model_of(args, stage, arm) for stage in (["base"] if arm == "base" else ["sft", "rl"])}
    models = {s: m for s, m in models.items() if s == "base" or m == args.sft_model or Path(m).exists()}
    if not models:
        raise InputError(f"{args.out}/{arm}: no model there; run --stage sft and --stage rl first")
    results = {stage: test_model(model, args, world) for stage, model in models.items()}
    if world.main:
        write_results(Path(args.out, arm, "eval.json"), results, args, TESTED_WITH, models.values())
    dist.barrier()


def report(args: Args) -> None:
    """Print the table of all arms that were tested alike, now or before; write OUT/results.json and curves.png."""
    out, arms = Path(args.out), ("base", *arms_of(args))
    results = read_results({arm: out / arm / "eval.json" for arm in arms}, args, TESTED_WITH)
    runs = {arm: out / arm / "rl" for arm in arms if (out / arm / "rl" / "metrics.jsonl").exists()}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if runs:
        names = ("eval/mean", "reward/own", "group/solve_none", "policy/entropy", "policy/kl_ref", "length/own")
        plot_curves(runs, [[name] for name in names], out / "curves.png")

    lines = [["%", "in distribution: SFT", "RL", "chain", "out of distribution: SFT", "RL", "chain"]]
    for arm, models in results.items():
        before, after = models.get("base" if arm == "base" else "sft", {}), models.get("rl", {})
        shown = [(before, "accuracy"), (after, "accuracy"), (after, "chain")]
        values = [model.get(test, {}).get(name) for test in ("test_id", "test_ood") for model, name in shown]
        lines.append([arm, *("" if value is None else f"{100 * value:.1f}" for value in values)])
    print(f"\n{table(lines)}\n{out}: results.json" + (", curves.png" if runs else ""))


def main(args: Args) -> None:
    check(args)
    world = init_world(args.timeout_minutes)
    if args.stage in ("all", "data"):
        make_data(args, world)
    runs = [("base", "base")] if args.base_problems else []
    runs += [(stage, arm) for arm in args.arms for stage in ("sft", "rl")]
    for stage, arm in runs:
        if args.stage in ("all", stage):
            train(settings_of(args, stage, arm))
    if args.stage in ("all", "eval"):
        for arm in [*args.arms, "base"] if args.base_problems or not args.arms else args.arms:
            evaluate_arm(arm, args, world)
        if world.main:
            report(args)


if __name__ == "__main__":
    launch(main, parse_args(Args, None, preset=PRESETS))
