"""REDI: reinforcement distillation, from right and from wrong traces, offline (Xu et al., arXiv 2505.24850).

Distillation keeps a teacher's right traces and throws the wrong ones away. REDI learns from both, in two stages:

    --stage sft    loss = - sum log p(right tokens) / number of right tokens                             (Eq. 1)
    --stage redi   loss = mean over pairs of  - log p(right) / |right|  +  alpha log p(wrong) / |wrong|   (Eq. 5)

log p(y) is the sum over the tokens of trace y, |y| their number, eos included: every trace weighs the same, however
long it is. A token's log-prob is pushed by a constant, 1 / |y| up or alpha / |y| down, whatever its probability: there
is no reference model, no KL, no clip and no sigmoid, and the loss has no lower bound. What keeps it from tearing down
right traces with the wrong ones (they share most of their tokens) is alpha < 1 and a small learning rate. Watch
logp/chosen: alarm/collapsed_at is the step at which it had fallen by more than --collapse_margin.

--loss picks REDI or one of the paper's comparisons, each with its published settings (the comparisons start from
`--stage sft --epochs 3`, redi and symmetric from 5 epochs):
  redi       the above, alpha 0.8; with alpha 0 a per-trace mean of SFT
  symmetric  alpha 1 (Eq. 4), the limit of SimPO for beta -> 0; it needs a rate of 2e-7 where redi stands 1e-6
  dpo        - log sigmoid(beta [log p(right) / ref(right) - log p(wrong) / ref(wrong)]): sums, not means
  simpo      - log sigmoid(beta [mean log p(right) - mean log p(wrong)] - gamma): no reference

--stage data makes positives and pairs from graded traces (OpenR1-Math-Raw's columns, {prompt, responses, rewards},
GSM8K's model solutions, or a model's own answers) and prints what each rule left out.

Beyond the paper: wrong and right traces without a partner, as rows {prompt, response, label 1 | 0, weight}. A trace
counts as half a pair: a file of pairs and the same traces as single rows, twice as many to a batch, give one gradient.

Where this file departs from the published code, and why:
- eos is trained in both stages and counted once. The published SFT did not train it (pad is eos in the base model),
  and its second stage trained three tokens at a trace's end: the template's <|im_end|>, a newline and eos.
- Over-long traces are rejected and counted. The published code cut them: SFT lost their end, and its "keep_end" cut
  columns off every row of a batch, prompts included, while dividing by the length before the cut.
- Lengths count the tokens that are trained. The published filter counted the template's system prompt and header as
  part of each trace, and left the generation prompt out of the prompt.
- Log-probs are float32 and their sums float64; published: the logits' own bf16.
- No reference model is loaded but for dpo, and there it is not a second model: its log-probs are computed once,
  before the first update, and kept on disk (--reference_cache).
- The mean is over the step's pairs (its right tokens in SFT) on all ranks; the published SFT, by its libraries'
  defaults, took a token mean over each GPU's 16 rows, then the mean over GPUs.
- A pair of equal traces or an empty trace is an error unless --bad_rows drop.
- Evaluation as training goes on draws at top-p 1 from max_response_tokens; the paper's tables at 0.95 from 32,768
  (eval.py).
- --stage data shuffles with its own generator: same rows, another order. Training draws its own order anyway.
As published: the first right and the first wrong generation, one pair a problem; a trace is right if both verifiers
say so, so that wrong ones include those on which they disagree; no length filter on positives.

Commands:
  python redi.py --preset tiny --stage sft                          a laptop, minutes, nothing downloaded
  python redi.py --preset tiny --model runs/tiny-sft/model
  python redi.py --stage data && torchrun --nproc_per_node 8 redi.py --stage sft && torchrun --nproc_per_node 8 redi.py
                                                                    the paper's run
"""

import hashlib
import json
import os
import random
from array import array
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from common.data import (
    InputError,
    batch_indices,
    check_verifier,
    pack,
    plan_micro_batches,
)
from common.rollout import Sampling, make_sampler
from common.rows import (
    IGSM,
    Trace,
    data_digest,
    gold_unreadable,
    held_out_examples,
    iter_rows,
    read_row,
    render_prompt,
    report_golds,
    response_ids,
    set_template,
    trace_text,
)
from common.trainer import (
    BadBatches,
    Checkpoints,
    Clock,
    Metrics,
    check_context,
    check_finite,
    export,
    full_parameters,
    gather_lists,
    init_world,
    keep_best,
    launch,
    learning_rate,
    load_policy,
    load_tokenizer,
    make_optimizer,
    max_positions,
    optimizer_step,
    parse_args,
    peak_memory_gb,
    read_metrics,
    set_context,
)
from common.verifiers import grade


@dataclass
class Args:
    stage: Literal["sft", "redi", "data"] = "redi"
    """sft: right traces alone. redi: pairs, with --loss. data: make both files from graded traces."""
    loss: Literal["redi", "symmetric", "dpo", "simpo"] = "redi"
    """What stage redi minimises; the defaults below follow it."""
    preset: Literal["paper", "tiny"] = "paper"
    """paper: the published run. tiny: a Qwen2 of under a million parameters on symbolic iGSM, for a laptop."""

    # what
    model: str = "runs/redi-sft/model"
    """Model folder or Hub name to start from (stage data: whose template and tokens measure the lengths)."""
    data: str = "runs/redi-data/pairs.jsonl"
    """Training rows: a file, a folder, a Hub name, or igsm:LO-HI for symbolic iGSM problems of LO to HI operations
    (modulus 23). README has a table of all shapes of rows. For stage data see docs/redi.md."""
    eval_data: tuple[str, ...] = ()
    """Held-out rows, in the formats of --data. Hub names: the test split; igsm: problems whose templates are not in the
    training set."""
    igsm_problems: int = 4000
    """How many problems igsm:LO-HI makes."""
    own_answers: int = 0
    """Stage data: where the data has no wrong (or no right) trace to a problem, sample so many answers of --model at
    temperature 1 and take the first that is. 0: none; igsm:LO-HI then gets corrupted solutions, as in stage redi."""
    drop_sources: tuple[str, ...] = ("cn_k12",)
    """Values of OpenR1's column 'source' that stage data leaves out."""
    right_if: Literal["both", "llama", "math_verify", "either"] = "both"
    """Stage data: which of OpenR1's two verifiers must accept a trace for it to be right; all others are wrong."""
    decontaminate: tuple[str, ...] = ()
    """Stage data: benchmark files (or Hub names: their test split). Problems that share --ngram words in a row with one
    of their questions are left out and counted. Published: a check that left nothing out."""
    ngram: int = 13
    """Words in a row for --decontaminate (published: 8)."""
    out: str = "runs/redi"
    """Run folder. Running the same command again goes on from its last checkpoint."""
    chat_template: str = ""
    """File with a Jinja chat template; empty takes the tokenizer's own. It is saved with the model."""
    chat_template_args: tuple[str, ...] = ()
    """Settings of a template's switches, key=value, as in enable_thinking=false. They are saved with the model."""
    verifier: str = "math"
    """How answers are graded: math (LUFFY's rule: what follows </think>), robust (for your own data), ... or
    "module:function" of your own, (response, gold) -> reward (common/verifiers.py)."""
    max_prompt_tokens: int = 800
    """Rows with longer prompts are left out and counted."""
    max_response_tokens: int = 19000
    """Rows with a longer trace (eos included) are left out and counted; also tokens to sample at most."""
    bad_rows: Literal["error", "drop"] = "error"
    """A pair whose traces are equal, or an empty trace: stop, or leave the row out and count it."""

    # how: the published run
    steps: int = 0
    """Optimizer steps; 0 follows --epochs."""
    epochs: float = 1.0
    """Passes over the data."""
    batch_size: int = 32
    """Rows a step: pairs, or single traces."""
    alpha: float = 0.8
    """Weight of the wrong trace in redi (symmetric: 1)."""
    chosen_coef: float = 1.0
    """Weight of the right trace in redi and symmetric."""
    rejected_gamma: float = 0.0
    """Multiply the wrong trace's term by exp(this x its mean log-prob), gradient included: the unlikelier, the less.
    In the published code, in neither the paper nor its runs; the push turns round at a mean of -1 / gamma."""
    beta: float = 0.001
    """beta of dpo and simpo."""
    gamma: float = 1.0
    """Target margin of simpo."""
    label_smoothing: float = 0.0
    """Share of pairs that dpo takes to be the wrong way round."""
    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up."""
    warmup: float = 0.1
    """Share of the updates over which the rate rises linearly."""
    lr_floor: float = 0.0
    """Where linear and cosine end, as a share of the peak."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    weight_decay: float = 1e-4
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Global gradient norm to clip to."""
    rope_theta: float = 0.0
    """Set RoPE's base before training and save it with the model; 0 keeps the model's."""
    max_positions: int = 0
    """Set max_position_embeddings likewise; 0 keeps the model's."""
    collapse_margin: float = 0.5
    """Nats a token by which logp/chosen, over the last 5 steps, may fall below the first step's before the alarm."""
    seed: int = 42
    """Seeds data order, sampling and corruption."""

    # machinery
    micro_batch_tokens: int = 40960
    """Tokens of a packed micro-batch on each rank; memory, never the gradient, depends on it. Both traces of a pair
    are in one."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass."""
    reference_cache: str = "runs/reference"
    """Folder of dpo's reference log-probs, a file for each model and data."""
    rollout: str = "auto"
    """Where answers are sampled. embedded: in this process. vllm: by a vLLM process beside each rank, which the script
    starts (docs/rollout.md). auto: vllm on CUDA, embedded on a CPU."""
    rollout_gpu_memory: float = 0.7
    """Fraction of each GPU's memory for vLLM, which frees it while the trainer updates."""
    sampler_tokens: int = 0
    """Largest batch of the embedded sampler, counted as rows x (prompt + response) tokens. 0 picks 65,536 on a CPU, and
    what fits into half of the free memory on a GPU."""
    eval_every: int = 200
    """Evaluate every so many steps, and before the first and after the last; 0 never."""
    eval_temperature: float = 0.6
    """Temperature of evaluation (published: 0.6); 0 is greedy."""
    eval_limit: int = 0
    """Rows of each evaluation file at most; 0 for all."""
    save_every: int = 200
    """Checkpoint every so many steps; 0 never."""
    keep: int = 2
    """Number of checkpoints to keep. With 2, a damaged newest one costs only the steps since the one before."""
    keep_best: bool = False
    """Also keep the model of the highest eval/mean, in OUT/best."""
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
    """Also log to TensorBoard (in the run folder)."""
    wandb: str = ""
    """Also log to this Weights & Biases project."""


STAGES = {
    # the published SFT cut prompt and trace together at 32,768
    "sft": dict(model="Qwen/Qwen2.5-Math-1.5B", data="runs/redi-data/positives.jsonl", out="runs/redi-sft", lr=5e-5,
                epochs=5.0, batch_size=128, max_prompt_tokens=2048, max_response_tokens=30720, rope_theta=300000.0,
                max_positions=32768),
    "data": dict(model="Qwen/Qwen2.5-Math-1.5B", data="open-r1/OpenR1-Math-Raw", out="runs/redi-data"),
}
LOSSES = {
    "symmetric": dict(lr=2e-7),
    "dpo": dict(lr=2e-7),
    "simpo": dict(lr=5e-7, beta=2.0),
}
PRESETS = {
    "tiny": dict(
        model="models/tiny", data="igsm:5-8", eval_data=("igsm:5-8",), out="runs/tiny-redi", verifier="boxed",
        max_prompt_tokens=160, max_response_tokens=160, rope_theta=0.0, max_positions=0, lr=1e-5, eval_every=50,
        eval_limit=128, save_every=50, micro_batch_tokens=4096, gradient_checkpointing=False,
        stage={
            "sft": dict(out="runs/tiny-sft", lr=5e-4, epochs=3.0, batch_size=64),
            "data": dict(out="runs/tiny-data", own_answers=4),
        },
    ),
}


# ------------------------------------------------------------------------------------------ the mathematics


def redi_loss(
    chosen_logp, chosen_len, rejected_logp, rejected_len, *, alpha: float = 0.8, chosen_coef: float = 1.0,
    rejected_gamma: float | None = None,
):  # fmt: skip
    """- chosen_coef log p(right) / |right|  +  alpha log p(wrong) / |wrong|, for each pair (Eq. 5): [B] -> [B].

    *_logp: sums of log-probs; *_len: their numbers of tokens, where 0 (no such trace) counts as 1.
    rejected_gamma multiplies the second term by exp(rejected_gamma log p(wrong) / |wrong|), which has a gradient too.

    >>> redi_loss(*(torch.tensor([x]) for x in (-3.0, 2.0, -8.0, 4.0))).tolist()
    [-0.10000002384185791]
    """
    chosen = chosen_logp / chosen_len.clamp(min=1)
    rejected = rejected_logp / rejected_len.clamp(min=1)
    if rejected_gamma is not None:
        rejected = rejected * (rejected_gamma * rejected).exp()
    return alpha * rejected - chosen_coef * chosen


def dpo_loss(
    chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, *, beta: float, label_smoothing: float = 0.0
):
    """- log sigmoid(beta h), h = log p(right) / ref(right) - log p(wrong) / ref(wrong), for each pair: [B] -> [B].

    All four are sums of log-probs. label_smoothing e: (1 - e) of that and e of the same with -h."""
    h = beta * ((chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp))
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def simpo_loss(chosen_logp, chosen_len, rejected_logp, rejected_len, *, beta: float, gamma: float):
    """- log sigmoid(beta [log p(right) / |right| - log p(wrong) / |wrong|] - gamma), for each pair: [B] -> [B]."""
    return -F.logsigmoid(beta * (chosen_logp / chosen_len - rejected_logp / rejected_len) - gamma)


def collapsed_at(chosen_logps: list[float], margin: float, window: int = 5) -> int | None:
    """The first step at which the mean over the last `window` steps is below step 1 by more than `margin`, or None.

    chosen_logps: mean log-prob a token of right traces in steps 1, 2, ...

    >>> collapsed_at([-0.5, -0.4, -0.9, -1.4, -1.9], margin=0.5, window=2)
    4
    """
    for step in range(window, len(chosen_logps) + 1):
        if sum(chosen_logps[step - window : step]) / window < chosen_logps[0] - margin:
            return step
    return None


# ----------------------------------------------------------------------------------------------- one update


@dataclass
class Pair:
    """A right and a wrong trace of one prompt, as ids that end with eos; nothing where there is only one. Arrays hold
    the ids of 50,000 long pairs in a tenth of the memory of lists."""

    prompt: array
    chosen: array
    rejected: array
    weight: float = 1.0
    index: int = 0  # row number in the data
    reference: tuple[float, float] = (0.0, 0.0)  # sums of log-probs under dpo's reference: right, wrong
    # as of its last update: loss, and means over the tokens of the right and of the wrong trace
    loss: float = 0.0
    logp: tuple[float, float] = (0.0, 0.0)
    entropy: tuple[float, float] = (0.0, 0.0)


def micro_batches(pairs: list[Pair], args: Args, world):
    """This rank's packed micro-batches of an update: (token batch, its pairs). As many on every rank."""
    lengths = [sum(len(p.prompt) + len(trace) - 1 for trace in (p.chosen, p.rejected) if trace) for p in pairs]
    for shares in plan_micro_batches(lengths, world.size, args.micro_batch_tokens):
        mine = [pairs[i] for i in shares[world.rank]]
        sequences = [(list(p.prompt), list(trace)) for p in mine for trace in (p.chosen, p.rejected) if trace]
        yield pack(sequences, world.device), mine


def sum_by_trace(values, batch, pairs: list[Pair]) -> torch.Tensor:
    """[N], one for each response token of the batch -> [pairs, 2], their sums over right and wrong traces, float64."""
    slots = [2 * i + side for i, p in enumerate(pairs) for side, trace in enumerate((p.chosen, p.rejected)) if trace]
    slot = torch.tensor(slots, dtype=torch.long, device=values.device)[batch.sequence]  # [N]
    sums = values.new_zeros(2 * len(pairs), dtype=torch.float64)
    return sums.index_add(0, slot, values.double()).view(-1, 2)


def pair_losses(logps, lengths, reference, args: Args):
    """Sums of log-probs [B, 2], numbers of tokens [B, 2], the reference's sums [B, 2] -> losses [B]."""
    (chosen, rejected), (chosen_len, rejected_len) = logps.unbind(1), lengths.unbind(1)
    if args.stage == "sft":
        return -chosen
    if args.loss == "dpo":
        return dpo_loss(
            chosen, rejected, *reference.unbind(1), beta=args.beta, label_smoothing=args.label_smoothing
        )
    if args.loss == "simpo":
        return simpo_loss(chosen, chosen_len, rejected, rejected_len, beta=args.beta, gamma=args.gamma)
    return redi_loss(
        chosen, chosen_len, rejected, rejected_len, alpha=1.0 if args.loss == "symmetric" else args.alpha,
        chosen_coef=args.chosen_coef, rejected_gamma=args.rejected_gamma or None,
    )  # fmt: skip


def denominator(pairs: list[Pair], args: Args) -> float:
    """What the sum of the losses of an update is divided by: its right tokens in sft, else its pairs, where a single
    trace is half of one."""
    if args.stage == "sft":
        return sum(len(p.chosen) for p in pairs)
    return sum(bool(p.chosen) + bool(p.rejected) for p in pairs) / 2


def accumulate_gradient(policy, pairs: list[Pair], args: Args, world) -> None:
    """Forward and backward of one update, summed over ranks and micro-batches; the gradient is left in .grad, and
    every pair's loss, log-probs and entropies, of all ranks, in `pairs`.

    The denominator is counted over the whole update before the first backward, so the gradient is the same for any
    number of ranks and any micro_batch_tokens."""
    n, measured = denominator(pairs, args), []
    for batch, mine in micro_batches(pairs, args, world):
        logp, entropy = policy(batch, entropy=True)  # [N], [N]
        known = [(len(p.chosen), len(p.rejected), *p.reference, p.weight) for p in mine]
        known = torch.tensor(known, dtype=torch.float64, device=logp.device).view(-1, 5)
        lengths, reference, weight = known[:, :2], known[:, 2:4], known[:, 4]  # [B, 2], [B, 2], [B]
        logps = sum_by_trace(logp, batch, mine)  # [B, 2]
        losses = pair_losses(logps, lengths, reference, args)  # [B]
        ((weight * losses).sum() / n * world.size).backward()  # FSDP averages over ranks; the sum is what is wanted

        means = (torch.cat([logps.detach(), sum_by_trace(entropy.detach(), batch, mine)], 1)
                 / lengths.clamp(min=1).repeat(1, 2)).tolist()  # fmt: skip
        measured += zip([p.index for p in mine], losses.tolist(), means, strict=True)
    results = {index: (loss, means) for index, loss, means in gather_lists(measured, world)}
    for p in pairs:
        p.loss, means = results[p.index]
        p.logp, p.entropy = (means[0], means[1]), (means[2], means[3])



@torch.no_grad()
def set_reference(policy, pairs: list[Pair], args: Args, world) -> None:
    """Give every pair its reference: log-probs under the policy as it is, computed once and kept on disk.

    The file is named after a digest of the weights, the pairs' ids and the precision (bf16 on CUDA)."""
    digest = hashlib.sha256(world.device.type.encode())
    for name, value in chain(policy.named_buffers(), full_parameters(policy)):
        if world.main:
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    for p in pairs:
        lengths = array("i", [p.index, len(p.prompt), len(p.chosen), len(p.rejected)])
        digest.update(b"".join(map(bytes, (lengths, p.prompt, p.chosen, p.rejected))))
    path = Path(args.reference_cache) / f"{digest.hexdigest()[:32]}.json"
    known = gather_lists(json.loads(path.read_text()) if world.main and path.exists() else [], world)
    if not known:
        bar = tqdm(total=len(pairs), desc="reference", unit="pair", leave=False, disable=not world.main)
        for batch, mine in micro_batches(pairs, args, world):
            logps = sum_by_trace(policy(batch), batch, mine).tolist()
            known += [[p.index, *sums] for p, sums in zip(mine, logps, strict=True)]
            bar.update(len(mine) * world.size)
        bar.close()
        if isinstance(policy, FSDPModule):
            policy.reshard()  # without a backward it stays whole, and an optimizer made now would train that copy
        known = sorted(gather_lists(known, world))
        if world.main:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".partial").write_text(json.dumps(known))
            os.replace(path.with_suffix(".partial"), path)
    by_index = {index: (chosen, rejected) for index, chosen, rejected in known}
    for p in pairs:
        p.reference = by_index[p.index]


# ------------------------------------------------------------------------------------------------ rows, pairs


def read_rows(args: Args):
    """Rows of --data, one at a time; those of igsm:LO-HI get a corrupted trace where one is needed."""
    for row in iter_rows(args.data, problems=args.igsm_problems):
        if args.data.startswith("igsm:") and args.stage != "sft" and not args.own_answers:
            rng = random.Random(f"{args.seed} {row['extra_info']['index']}")
            wrong = corrupt(row["target"][0]["content"], rng, IGSM["modulus"])
            row |= {"chosen": row["target"], "rejected": wrong}
        yield row


def corrupt(solution: str, rng: random.Random, modulus: int) -> str:
    r"""A wrong trace out of a right one: one random line ends in another number, and so does the answer.

    >>> corrupt("<think>\nz=9\nu=z+1=10\n</think>\n\\boxed{10}", random.Random(1), 23).split("\n")
    ['<think>', 'z=5', 'u=z+1=10', '</think>', '\\boxed{13}']
    """

    def other(number: str) -> str:
        return str((int(number) + rng.randrange(1, modulus)) % modulus)

    lines = solution.split("\n")
    steps = [i for i, line in enumerate(lines) if "=" in line]
    answer, slip = lines[steps[-1]].rpartition("=")[2], rng.choice(steps)
    formula, _, value = lines[slip].rpartition("=")
    value = other(value)
    lines[slip] = f"{formula}={value}"
    lines[-1] = f"\\boxed{{{value if slip == steps[-1] else other(answer)}}}"
    return "\n".join(lines)


def make_pairs(rows: list[dict], tokenizer, args: Args, *, source: str, progress=False):
    """Rows to pairs of ids -> (pairs, counts of what was left out). In stage sft only right traces are read.

    Raises InputError naming `source`, the row and the remedy."""
    pairs: list[Pair] = []
    count = {"rows": len(rows), "prompt_too_long": 0, "trace_too_long": 0, "trace_empty": 0, "traces_equal": 0}
    count |= {"wrong_only": 0} if args.stage == "sft" else {}

    def encode(traces: list[Trace | None], prompts: list[str], part: list) -> list[list[int]]:
        """Ids that end with one eos, or with what a model's own answer stopped at; [] for no trace."""
        texts = [
            trace_text(prompt, trace.text, f"{source}, row {row[0]}") if trace else ""
            for prompt, trace, row in zip(prompts, traces, part, strict=True)
        ]
        encoded = response_ids(tokenizer, prompts, texts)
        for i, (trace, ids) in enumerate(zip(traces, encoded, strict=True)):
            if trace and trace.ids is not None:
                encoded[i] = trace.ids
                if tokenizer.decode(trace.ids[:-1]) != trace.text:
                    raise InputError(
                        f"{source}, row {part[i][0]}: the ids of a trace are not those of its text: they are another "
                        "tokenizer's; remove the column '..._ids' or change --model"
                    )
            elif ids and ids[-1] != eos:
                encoded[i] = [*ids, eos]
        return encoded

    def bad(name: str, message: str) -> None:
        if args.bad_rows == "error":
            raise InputError(f"{source}, row {index}: {message}; remove the row or pass --bad_rows drop")
        count[name] += 1

    eos = tokenizer.eos_token_id
    for start in tqdm(range(0, len(rows), 500), desc="tokenize", unit_scale=500, leave=False, disable=not progress):
        part = []  # (index, prompt text, right, wrong, weight) of 500 rows, then tokenized together
        for index, row in enumerate(rows[start : start + 500], start):
            item = read_row(row, f"{source}, row {index}")
            right, wrong = item.first(correct=True), item.first(correct=False)
            if args.stage == "sft" and wrong:
                if not right:
                    count["wrong_only"] += 1
                    continue
                wrong = None
            part.append((index, item.text or render_prompt(tokenizer, item.prompt), right, wrong, item.weight))
        if not part:
            continue
        texts = [text for _, text, *_ in part]
        prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
        chosen_ids = encode([right for _, _, right, _, _ in part], texts, part)
        rejected_ids = encode([wrong for *_, wrong, _ in part], texts, part)
        for (index, _, right, wrong, weight), prompt, chosen, rejected in zip(
            part, prompts, chosen_ids, rejected_ids, strict=True
        ):
            if not (right or wrong) or any(
                t and not (t.text.strip() and ids) for t, ids in ((right, chosen), (wrong, rejected))
            ):
                bad("trace_empty", "a trace is empty")
            elif chosen == rejected:
                bad("traces_equal", "the right and the wrong trace are equal")
            elif len(prompt) > args.max_prompt_tokens:
                count["prompt_too_long"] += 1
            elif max(len(chosen), len(rejected)) > args.max_response_tokens:
                count["trace_too_long"] += 1
            else:
                pairs.append(Pair(*(array("i", ids) for ids in (prompt, chosen, rejected)), weight, index))
    if not pairs:
        raise InputError(
            f"{source}: no row is left of {len(rows)} ({count['prompt_too_long']} prompts over "
            f"--max_prompt_tokens {args.max_prompt_tokens}, {count['trace_too_long']} traces over "
            f"--max_response_tokens {args.max_response_tokens}, {count['trace_empty']} empty traces, "
            f"{count['traces_equal']} pairs of equal traces, {count.get('wrong_only', 0)} wrong traces alone)"
        )
    return pairs, count | {"kept": len(pairs)}


# ---------------------------------------------------------------------------------------------- stage data


@dataclass
class Problem:
    """A problem with its first right and its first wrong trace."""

    prompt: list[dict]
    chosen: Trace | None
    rejected: Trace | None
    gold: str
    source: str


def choose_openr1(row: dict, drop_sources=("cn_k12",), right_if="both") -> tuple[int | None, int | None] | str:
    """The first right and the first wrong generation of a row of OpenR1-Math-Raw, or the rule that leaves it out.

    A generation is right if both verifiers (correctness.llama_verification and .math_verify_reparsed_answer) say
    so, or as `right_if` says (llama, math_verify, either), else wrong; a missing verdict is a no."""
    generations, correctness = row.get("generations"), row.get("correctness")
    if str(row.get("problem_is_valid")).strip().lower() != "yes":
        return "problem not valid"
    if row.get("source") in drop_sources:
        return "source left out"
    if not row.get("problem"):
        return "no problem"
    if not generations:
        return "no generations"
    correctness = correctness if isinstance(correctness, dict) else {}
    verdicts = [correctness.get(name) for name in ("llama_verification", "math_verify_reparsed_answer")]
    if not all(isinstance(v, list) and len(v) == len(generations) for v in verdicts):
        return "not a verdict of both verifiers for each generation"
    llama, math_verify = ([bool(v) for v in verdict] for verdict in verdicts)
    return first_of_each({
        "llama": llama, "math_verify": math_verify,
        "both": [a and b for a, b in zip(llama, math_verify, strict=True)],
        "either": [a or b for a, b in zip(llama, math_verify, strict=True)],
    }[right_if])  # fmt: skip


def first_of_each(right: list[bool]) -> tuple[int | None, int | None]:
    """Index of the first True and of the first False; None where there is none."""
    return tuple(right.index(value) if value in right else None for value in (True, False))


def read_problem(row: dict, where: str, args: Args) -> Problem | str:
    """A problem from a row of any shape in common/rows.py, or the name of the rule that leaves it out.

    --own_answers adds a model's wrong trace to rows that have none."""
    chosen = None
    if isinstance(row, dict) and "generations" in row:
        chosen = choose_openr1(row, args.drop_sources, args.right_if)
    if isinstance(chosen, str):
        return chosen
    item = read_row(row, where)
    right, wrong = item.first(correct=True), item.first(correct=False)
    if chosen:
        right, wrong = (None if i is None else item.traces[i] for i in chosen)
    return Problem(item.prompt, right, wrong, item.gold, str(row.get("source") or item.source))


def word_ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """All n words in a row of a text, in lower case; a shorter text is one n-gram.

    >>> sorted(word_ngrams("How  many are THERE", 3)), word_ngrams("Two", 3)
    ([('how', 'many', 'are'), ('many', 'are', 'there')], {('two',)})
    """
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))} - {()}


def benchmark_ngrams(args: Args) -> dict[str, set[tuple[str, ...]]]:
    """{benchmark of --decontaminate: the n-grams of its questions}."""
    found = {}
    for source in args.decontaminate:
        for index, row in enumerate(iter_rows(source, split="test")):
            question = read_row(row, f"--decontaminate {source}, row {index}").question
            found.setdefault(source, set()).update(word_ngrams(question, args.ngram))
    return found


def add_own_answers(problems: list[Problem], tokenizer, args: Args, world) -> None:
    """Sample answers of --model to the problems that lack a right or a wrong trace, and take the first that fits; what
    was drawn is counted in own_answers.json.

    An answer that the limit cut short is none (it has no eos to learn from), nor is one that the verifier could not
    grade. A prompt over --max_prompt_tokens gets none."""
    lacking = [i for i, problem in enumerate(problems) if problem.chosen is None or problem.rejected is None]
    if not all(problems[i].gold for i in lacking):
        raise InputError(f"{args.data}: --own_answers grades by 'reward_model' or 'answer', and a row has neither")
    texts = [render_prompt(tokenizer, problems[i].prompt) for i in lacking]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    mine = [k for k in range(len(lacking)) if len(prompts[k]) <= args.max_prompt_tokens][world.rank :: world.size]
    sampler = open_sampler(load_policy(args.model, world), tokenizer, args, world)
    groups = sampler.generate(
        [prompts[k] for k in mine], n=args.own_answers, keys=[lacking[k] for k in mine], seed=args.seed,
        sampling=Sampling(args.max_response_tokens, 1.0), progress="sample" if world.main else None,
    )
    sampler.close()
    drawn = [(lacking[k], c.ids, c.truncated) for k, group in zip(mine, groups, strict=True) for c in group]
    texts = [tokenizer.decode(c.said) for group in groups for c in group]
    verdicts = grade(texts, [problems[i].gold for i, _, _ in drawn], verifier=args.verifier)
    count, tokens = dict.fromkeys(("right", "wrong", "cut short", "not graded"), 0), 0
    for (i, ids, cut), verdict in gather_lists(list(zip(drawn, verdicts, strict=True)), world):
        tokens += len(ids)
        if cut or verdict.status in ("timeout", "error") or gold_unreadable(verdict):
            count["cut short" if cut else "not graded"] += 1
            continue
        count["right" if verdict.reward else "wrong"] += 1
        trace = Trace(tokenizer.decode(ids[:-1]), verdict.reward, ids)
        if verdict.reward:
            problems[i].chosen = problems[i].chosen or trace
        else:
            problems[i].rejected = problems[i].rejected or trace
    if world.main:
        write_lines(Path(args.out) / "own_answers.json", [count | {"tokens": tokens}])
        print("own answers:", ", ".join(f"{n} {name}" for name, n in count.items()))


def make_data(args: Args, world) -> dict[str, int]:
    """Stage data: positives.jsonl, pairs.jsonl and funnel.json in --out; prints and returns the funnel."""
    tokenizer = set_template(load_tokenizer(args.model), args.chat_template, args.chat_template_args)
    benchmarks = benchmark_ngrams(args)
    problems, n_rows, dropped = [], 0, {}
    for row in tqdm(read_rows(args), desc="rows", leave=False, disable=not world.main):
        found = read_problem(row, f"{args.data}, row {n_rows}", args)
        n_rows += 1
        if not isinstance(found, str) and benchmarks:
            ngrams = word_ngrams(found.prompt[-1]["content"], args.ngram)
            hits = (f"shares {args.ngram} words with {name}" for name, known in benchmarks.items() if ngrams & known)
            found = next(hits, found)
        if isinstance(found, str):
            dropped[found] = dropped.get(found, 0) + 1
        else:
            problems.append(found)
    random.Random(args.seed).shuffle(problems)
    if args.own_answers:
        add_own_answers(problems, tokenizer, args, world)
    positives = [p for p in problems if p.chosen]
    both = [p for p in positives if p.rejected]
    funnel = {"rows": n_rows, **{name: -n for name, n in sorted(dropped.items())}}
    funnel |= {"no right trace": len(positives) - len(problems), "positives.jsonl": len(positives)}
    funnel |= {"no wrong trace": len(both) - len(positives)}
    if not both:
        raise InputError(f"{args.data}: no pair is left ({funnel}); --own_answers samples wrong ones of --model")

    def row(problem: Problem, **traces: Trace) -> dict:
        gold = {"style": "rule", "ground_truth": problem.gold}
        row = {"data_source": problem.source, "prompt": problem.prompt, "reward_model": gold}
        row |= {name: trace.text for name, trace in traces.items()}
        return row | {f"{name}_ids": trace.ids for name, trace in traces.items() if trace.ids is not None}

    rows = [row(p, chosen=p.chosen, rejected=p.rejected) for p in both]
    measured = replace(args, stage="redi", bad_rows="drop")
    pairs, count = make_pairs(rows, tokenizer, measured, source=args.data, progress=world.main)
    funnel |= {name.replace("_", " "): -count[name] for name in count if name not in ("rows", "kept")}
    funnel |= {"pairs.jsonl": len(pairs)}
    if world.main:
        out = Path(args.out)
        # 'target' for LUFFY's readers; 'chosen' where ids must be kept too
        targets = [row(p, target=p.chosen) if p.chosen.ids is None else row(p, chosen=p.chosen) for p in positives]
        write_lines(out / "positives.jsonl", targets)
        write_lines(out / "pairs.jsonl", [rows[pair.index] for pair in pairs])
        write_lines(out / "funnel.json", [funnel])
        print("\n".join(f"{n:>+10,}  {name}" if n <= 0 else f"{n:>10,}  {name}" for name, n in funnel.items()))
    return funnel


def write_lines(path: Path, rows: list[dict]) -> None:
    """One JSON object a line; the file is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)


# ------------------------------------------------------------------------------------------------- the loop


def check(args: Args) -> None:
    """Raise InputError for settings that cannot work together."""
    for name in ("batch_size", "max_response_tokens", "max_prompt_tokens", "epochs", "beta", "ngram"):
        if getattr(args, name) <= 0:
            raise InputError(f"--{name} must be positive, not {getattr(args, name)}")
    for name in ("steps", "own_answers", "alpha", "chosen_coef", "rejected_gamma", "rope_theta", "max_positions"):
        if getattr(args, name) < 0:
            raise InputError(f"--{name} must not be negative, but is {getattr(args, name)}")
    if not 0 <= args.label_smoothing < 0.5:
        raise InputError(f"--label_smoothing must be from 0 to under 0.5, not {args.label_smoothing}")
    if args.stage != "redi" and args.loss != "redi":
        raise InputError(f"--loss {args.loss} is of --stage redi, and does nothing in --stage {args.stage}")
    if args.decontaminate and args.stage != "data":
        raise InputError("--decontaminate leaves problems out in --stage data; train on the files that it writes")
    if args.own_answers and args.stage != "data":
        raise InputError("--own_answers samples in --stage data; train on the pairs.jsonl that it writes")
    for name, made_by in (("model", "sft"), ("data", "data")):
        path = getattr(args, name)
        if path.startswith("runs/") and not Path(path).exists():
            raise InputError(f"--{name} {path}: not there; --stage {made_by} makes it, or name another")
    if args.eval_data or args.own_answers:
        check_verifier(args.verifier)


def open_sampler(policy, tokenizer, args: Args, world, version: int = 0):
    """A sampler with the policy's weights."""
    also_stop = policy.lm.generation_config.eos_token_id or []
    stop_ids = [tokenizer.eos_token_id, *(also_stop if isinstance(also_stop, list) else [also_stop])]
    sampler = make_sampler(
        args.rollout, policy, world, stop_ids=stop_ids, max_batch_tokens=args.sampler_tokens,
        max_tokens=args.max_prompt_tokens + args.max_response_tokens, gpu_memory=args.rollout_gpu_memory,
    )
    sampler.sync(policy, version)
    return sampler


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
    check(args)
    world = init_world(args.timeout_minutes)
    if args.stage == "data":
        make_data(args, world)
        return
    out = Path(args.out)
    checkpoints = Checkpoints(out / "checkpoint", args, keep=args.keep)
    state = checkpoints.state()
    start = state["step"] if state else 0

    tokenizer = set_template(load_tokenizer(args.model), args.chat_template, args.chat_template_args)
    pairs, left_out = make_pairs(list(read_rows(args)), tokenizer, args, source=args.data, progress=world.main)
    held_out = held_out_examples(tokenizer, args)
    digest = data_digest(
        ((p.prompt, p.chosen, p.rejected, p.weight) for p in pairs), ((e.prompt, e.gold) for e in held_out)
    )
    checkpoints.check_data(state, digest, f"--data {args.data}")
    alone = sum(not p.chosen or not p.rejected for p in pairs)
    if args.stage == "redi" and args.loss in ("dpo", "simpo") and alone:
        raise InputError(f"--data {args.data}: {alone} rows have one trace, and --loss {args.loss} compares two")
    if args.stage == "redi" and not any(p.rejected for p in pairs):
        raise InputError(f"--data {args.data}: no row has a wrong trace; --stage data makes pairs, or --stage sft")
    if len(pairs) < args.batch_size:
        raise InputError(f"--data {args.data}: {len(pairs)} rows are fewer than --batch_size {args.batch_size}")
    steps = args.steps or max(1, int(args.epochs * len(pairs) / args.batch_size))
    if world.main:
        print(f"{args.data}: {left_out}; {len(held_out)} held-out; {steps} steps of {args.batch_size} rows")

    policy = load_policy(
        args.model, world, seed=args.seed, gradient_checkpointing=args.gradient_checkpointing,
        edit_config=partial(set_context, args),
    )
    longest = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
    positions = max_positions(policy.lm.config)
    if positions and longest > positions:
        raise InputError(
            f"--data {args.data}: the longest row has {longest} tokens, --model {args.model} "
            f"{positions} positions: raise --max_positions (with --rope_theta), or "
            "lower --max_response_tokens"
        )
    if args.stage == "redi" and args.loss == "dpo":
        set_reference(policy, pairs, args, world)
    optimizer = make_optimizer(policy, lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
    if state:
        checkpoints.load(policy, optimizer)
    elif args.save_every:
        checkpoints.check_space(policy)
    sampler = open_sampler(policy, tokenizer, args, world, start) if held_out and args.eval_every else None

    curves = [["logp/chosen", "logp/rejected"], ["logp/gap"], ["pair/accuracy"], ["entropy/chosen", "entropy/rejected"],
              ["eval/mean"], ["loss/mean"], ["optim/grad_norm"], ["optim/lr"]]  # fmt: skip
    bad_batches = BadBatches(out, world, skip=args.skip_bad_updates)
    metrics = Metrics(out, args, world, start=start, steps=steps, curves=curves)
    followed = [  # what the alarm looks at
        (row["step"], row["logp/chosen"]) for row in (read_metrics(out) if world.main else []) if "logp/chosen" in row
    ]
    if start == 0 and sampler:
        metrics.log(0, evaluate(sampler, tokenizer, held_out, args, world), show=["eval/mean"])
    if sampler:
        sampler.sleep()  # its memory is the trainer's until the sync
    clock = Clock(args.profile, out)

    for step in range(start + 1, steps + 1):
        batch = [pairs[i] for i in batch_indices(len(pairs), args.batch_size, step - 1, args.seed)]
        evaluates = sampler and (step % args.eval_every == 0 or step == steps)

        # 1. sample, 2. reward, 3. advantages: offline, --stage data has done all three

        # 4. update
        with clock("update"):
            lr = learning_rate(
                step - 1, lr=args.lr, steps=steps, schedule=args.schedule, warmup=args.warmup, floor=args.lr_floor
            )
            row_log = {}
            with bad_batches(step, {"policy": policy}, partial(sample_rows, batch, tokenizer)):
                accumulate_gradient(policy, batch, args, world)
                log = describe(batch, args)
                check_finite(log, policy, world)
                norm = optimizer_step(policy, optimizer, lr=lr, max_grad_norm=args.max_grad_norm)
                row_log = log | {"optim/grad_norm": norm, "optim/lr": lr}

        # 5. sync
        with clock("sync"):
            if evaluates:
                sampler.sync(policy, version=step)

        # 6. log, evaluate, save
        if row_log.get("logp/chosen") is not None:  # not an update that was skipped, or without right traces
            followed.append((step, row_log["logp/chosen"]))
        fell = collapsed_at([logp for _, logp in followed], args.collapse_margin)
        row_log["alarm/collapsed_at"] = fell and followed[fell - 1][0]
        if world.main and row_log["alarm/collapsed_at"] == step:
            tqdm.write(
                f"step {step}: logp/chosen has fallen from {followed[0][1]:.2f} to {followed[-1][1]:.2f}, by more "
                f"than --collapse_margin {args.collapse_margin}: lower --lr or --alpha"
            )
        if evaluates:
            with clock("evaluate"):
                row_log |= evaluate(sampler, tokenizer, held_out, args, world)
                if args.keep_best:
                    keep_best(policy, tokenizer, out, world, row_log["eval/mean"])
                sampler.sleep()
        seconds = clock.flush()
        tokens = sum(len(p.prompt) + len(trace) for p in batch for trace in (p.chosen, p.rejected) if trace)
        row_log |= seconds | {"speed/tokens_per_second": tokens / seconds["seconds/step"]}
        row_log["speed/useful_share"] = policy.useful_share()
        metrics.log(
            step, row_log | {"memory/peak_gb": peak_memory_gb(world), "update/skipped": bad_batches.skipped or None},
            show=["logp/chosen", "logp/rejected", "eval/mean"],
        )
        shown = random.Random(step).sample(batch, min(args.log_samples, len(batch)))
        metrics.samples(step, sample_rows(shown, tokenizer))
        if args.save_every and (step % args.save_every == 0 or step == steps):
            checkpoints.save(step, policy, optimizer, world)
    checkpoints.wait()
    export(policy, tokenizer, out / "model", world)
    check_context(out / "model", args)
    if sampler:
        sampler.close()
    metrics.close()


def describe(pairs: list[Pair], args: Args) -> dict[str, float]:
    """What a practitioner looks at in the pairs of a step. Log-probs and entropies: means over traces of their means
    over tokens."""

    def mean(values) -> float | None:
        values = list(values)
        return sum(values) / len(values) if values else None

    right, wrong = [p for p in pairs if p.chosen], [p for p in pairs if p.rejected]
    both = [p for p in right if p.rejected]
    row = {
        "loss/mean": sum(p.weight * p.loss for p in pairs) / denominator(pairs, args),
        "logp/chosen": mean(p.logp[0] for p in right), "logp/rejected": mean(p.logp[1] for p in wrong),
        "logp/gap": mean(p.logp[0] - p.logp[1] for p in both),
        "pair/accuracy": mean(p.logp[0] > p.logp[1] for p in both),
        "entropy/chosen": mean(p.entropy[0] for p in right), "entropy/rejected": mean(p.entropy[1] for p in wrong),
        "length/chosen": mean(len(p.chosen) for p in right), "length/rejected": mean(len(p.rejected) for p in wrong),
    }
    if args.stage == "redi" and args.loss == "dpo":
        row["reward/margin"] = mean(
            args.beta * (len(p.chosen) * p.logp[0] - p.reference[0] - len(p.rejected) * p.logp[1] + p.reference[1])
            for p in both
        )
    return row


def sample_rows(pairs: list[Pair], tokenizer) -> list[dict]:
    """Pairs as text, for samples.jsonl."""
    return [
        {"row": p.index, "loss": p.loss, "chosen_logp": p.logp[0], "rejected_logp": p.logp[1], "weight": p.weight}
        | {name: tokenizer.decode(list(getattr(p, name))) for name in ("prompt", "chosen", "rejected")}
        for p in pairs
    ]


if __name__ == "__main__":
    args = parse_args(Args, None, stage=STAGES, loss=LOSSES, preset=PRESETS)
    launch(main, args)
