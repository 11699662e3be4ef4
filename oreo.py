"""OREO: offline reasoning optimization (Wang et al., arXiv 2412.16145).

DPO learns from pairs of whole answers, rejection sampling from correct answers alone. OREO learns from single answers,
correct or not. Only the end of an answer is graded; the value model V does the credit assignment to tokens. OREO trains
V and the policy pi so that both satisfy one equation at every state of every answer. R is the reward:

    V(s_t) = R - beta S_t,      S_t = sum_{i >= t} log [pi(a_i | s_i) / pi_ref(a_i | s_i)]           (soft Bellman)

Only the optimum of  E[R] - beta KL(pi || pi_ref)  satisfies this for all possible answers (with an environment's
observations: on average). s_t is the text before token a_t. Actions are the tokens that the model wrote, states the
texts at which the equation is imposed. pi_t is pi(a_t | s_t), ref_t pi_ref(a_t | s_t). sg stops the gradient.

    L_V  = mean_rows mean_states (V_t - R + beta sg(S_t))^2
    L_pi = mean_rows mean_states (sg(V_t) - R + beta (log [pi_t / ref_t] + sg(S_{t+1})))^2          (Eq. 9, "token")
         + alpha mean_rows mean_actions KL(pi(. | s_t) || pi_ref(. | s_t))                          over the vocabulary

--variant chooses the states, and which tokens get the gradient of a state's policy residual:
  token      every token is a state; the gradient goes to this token alone
  step       the starts of steps are states; the gradient goes to the tokens of the step
  response   the policy loss has the first state alone (Eq. 10), V has all; the gradient goes to the whole answer
  dqo        every token is a state; the gradient goes to all tokens from it on (the paper's baseline)

--stage sft trains the starting model on solutions, 3 epochs. collect samples and grades answers to the problems. oreo
trains by the losses above on --rows, or on rows that it collects first. rejection, dpo, kto: the paper's baselines on
the same rows. iterate: three rounds of oreo. At test time V guides a search without a verifier: eval.py --search.

Departures from the published code that change numbers (the docs page has all of them, with reasons):
- An answer's ids are those that were sampled, eos included. The published rows were text, tokenized again.
- A row over 2,048 tokens is left out and counted; the published code cut it and lost its eos (--long_response cut).
- A step ends with a token that holds a delimiter, in training and in search. The published code split text.

  python oreo.py --preset tiny --stage sft                        a laptop, a minute, nothing downloaded
  python oreo.py --preset tiny --model runs/tiny-oreo-sft/model   collects, trains, evaluates
  torchrun --nproc_per_node 8 oreo.py --stage sft; torchrun --nproc_per_node 8 oreo.py              the paper's run
"""

import dataclasses
import itertools
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoints import Checkpoints, changed_settings
from common.data import InputError, batch_indices, block_denominators
from common.metrics import plot_curves
from common.rows import held_out_examples, in_words, read_examples, read_traces, with_kept
from common.run import (
    Betas,
    NotNegative,
    Positive,
    Run,
    RunArgs,
    Share,
    check_fit,
    check_flags,
    digests_of,
    keep_answers,
    keep_digests,
    mean,
    micro_batches,
    open_policy,
    open_sampler,
    open_tokenizer,
    per_token,
    write_lines,
)
from common.search import step_ids, step_starts
from common.shapes import AFTER_HASHES, IN_A_BOX, Item
from common.trainer import Totals, ValueModel, gather_lists, init_world, launch, make_optimizer, parse_args


@dataclass
class Args(RunArgs):
    # What to do. It also sets defaults of other flags.
    stage: Literal["sft", "collect", "oreo", "rejection", "dpo", "kto", "iterate"] = "oreo"
    variant: Literal["token", "step", "response", "dqo"] = "token"  # OREO's policy loss. --kl_coef follows it.
    # The published runs. paper: Qwen2.5-Math-1.5B. paper_7b: DeepSeekMath-7B. paper_alfworld: MiniCPM-2B on ALFWorld,
    # with rows of tools/agents.py. tiny: a laptop, symbolic iGSM
    preset: Literal["paper", "paper_7b", "paper_alfworld", "tiny"] = "paper"
    model: str = "runs/oreo-sft/model"  # Model folder or Hub name: to train, or to sample with in collect
    value: str = ""  # Value model to start from. Empty: the model's body and a head of zeros
    reference: str = ""  # Frozen reference of oreo, dpo and kto. Empty: --model
    trust_remote_code: bool = False  # Run the Python files that come with --model.
    # Problems to collect answers to (sft: with solutions): file, folder, Hub name (docs/data.md) or igsm:LO-HI
    data: tuple[str, ...] = ("openai/gsm8k:main", "DigitalLearningGmbH/MATH-lighteval")
    # How GSM8K's and MATH's rows are asked: with a system turn (Qwen), or with a sentence after the question (DeepSeek)
    ask: Literal["system", "user"] = "system"
    rows: str = ""  # Graded rows: from collect, or any with graded traces (docs/data.md). Empty: collect first
    out: str = "runs/oreo"  # Run folder. Running the same command again resumes from its newest checkpoint.
    verifier: str = "full"  # Grader: full (Math-Verify), robust (for your own data), boxed, ... or your module:function
    max_prompt_tokens: Positive[int] = 2048  # Rows with longer prompts are left out and counted.
    max_response_tokens: Positive[int] = 2048  # Longest answer to sample (published) and longest response to train on
    max_row_tokens: Positive[int] = 2048  # Prompt and response together, to train on (published; SFT 8192)
    long_response: Literal["reject", "cut"] = "reject"  # Response or row too long: reject, or cut the response
    skip_turns: NotNegative[int] = 0  # First assistant turns of a conversation that are not trained on (ALFWorld: 1)
    step_delimiters: tuple[str, ...] = ("\n",)  # A step ends with a token that contains one (a newline).
    samples: Positive[int] = 10  # Answers to collect per problem (published: 10; 7B: 16)
    # Keep at most this many correct and this many incorrect answers per problem, also of --rows. Keep no more correct
    # than incorrect ones, but one correct answer if none is incorrect (published 7B run: 4). 0 keeps all.
    balance: NotNegative[int] = 0
    temperature: Positive[float] = 1.0  # Sampling temperature of collect
    top_p: Positive[Share[float]] = 1.0  # Nucleus of collect (published: not stated for collection)
    reward_scale: float = 1.0  # R = reward * scale + shift (published: 1 and 0). An answer is correct if R > 0.
    reward_shift: float = 0.0  # See --reward_scale.
    beta: Positive[float] = 0.03  # Strength of the KL penalty in the objective (published; dpo: 0.1)
    kl_coef: NotNegative[float] = 0.01  # alpha, weight of the additional KL loss (published; step 0.1, response 0.3)
    rounds: Positive[int] = 1  # Collect and train this many times, except in sft.
    round_init: Literal["last", "first"] = "last"  # last: start from the previous round's models; first: --model
    round_reference: Literal["last", "first"] = "last"  # last: the model that sampled the rows; first: --reference
    pairs_per_question: Positive[int] = 6  # dpo: pairs to draw per question (published: 6; 7B: 10; ALFWorld: 5)
    epochs: Positive[float] = 1.0  # Passes over the rows if --steps is 0 (published: 1; sft: 3)
    batch_size: Positive[int] = 128  # Rows (dpo: pairs) per update; collect: problems to sample at once
    sft_rows_per_mean: NotNegative[int] = 8  # sft, rejection: average token means of blocks of this many rows (0: all)
    lr: NotNegative[float] = 5e-6  # Peak learning rate of AdamW (published: sft 2e-5, dpo 5e-7, kto 5e-8)
    value_lr: NotNegative[float] = 5e-6  # Peak learning rate of the value model's AdamW (published; 7B: 1e-4)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # Learning rate after the warm-up
    warmup: Share[float] = 0.03  # Fraction of the updates in which the learning rate rises linearly
    betas: Betas = (0.9, 0.95)  # AdamW betas
    weight_decay: NotNegative[float] = 0.0  # AdamW weight decay
    policy_lora: NotNegative[int] = 0  # Train the policy by LoRA of this rank, on all linear layers (needs peft). 0: no
    value_lora: NotNegative[int] = 0  # Train the value by LoRA of this rank, its head too (published 7B: 64). 0: no
    micro_batch_tokens: Positive[int] = 16384  # Tokens per micro-batch and rank. The gradient does not depend on it.
    gradient_checkpointing: Literal["auto", "all", "none"] = "all"  # Layers that recompute their activations
    eval_every: NotNegative[int] = 50  # Evaluate every this many steps, before the first and after the last. 0: never
    eval_temperature: NotNegative[float] = 0.0  # Sampling temperature of evaluation; 0 is greedy (published).
    log_samples: NotNegative[int] = 2  # Rows per step to write to samples.jsonl


STAGES = {
    "sft": dict(model="Qwen/Qwen2.5-Math-1.5B", out="runs/oreo-sft", lr=2e-5, epochs=3.0, max_row_tokens=8192),
    "dpo": dict(lr=5e-7, beta=0.1),
    "kto": dict(lr=5e-8, beta=0.1),
    "iterate": dict(rounds=3),
}
VARIANTS = {"step": dict(kl_coef=0.1), "response": dict(kl_coef=0.3), "dqo": dict(kl_coef=0.0)}
PRESETS = {
    "paper_7b": dict(
        model="deepseek-ai/deepseek-math-7b-instruct", out="runs/oreo_7b", ask="user", samples=16, balance=4,
        epochs=2.0, value_lora=64, value_lr=1e-4, pairs_per_question=10,
        stage={"rejection": dict(epochs=1.0), "dpo": dict(epochs=1.0), "kto": dict(lr=1e-7)},
    ),
    "paper_alfworld": dict(
        model="jwhj/MiniCPM-ALFWorld-SFT", out="runs/oreo_alfworld", epochs=5.0, max_prompt_tokens=4096,
        max_response_tokens=4096, max_row_tokens=4096, skip_turns=1, pairs_per_question=5, eval_every=0,
        stage={"rejection": dict(lr=2e-5, epochs=1.0), "dpo": dict(epochs=1.0), "kto": dict(epochs=1.0)},
    ),
    "tiny": dict(
        model="models/tiny", data=("igsm:5-8",), igsm_problems=500, eval_data=("igsm:5-8",), out="runs/tiny-oreo",
        verifier="boxed", max_prompt_tokens=160, max_response_tokens=160, samples=8, batch_size=64, lr=1e-4,
        value_lr=1e-3, eval_every=20, eval_limit=128, save_every=20, micro_batch_tokens=4096,
        gradient_checkpointing="none", sft_rows_per_mean=0,
        stage={"sft": dict(out="runs/tiny-oreo-sft", igsm_problems=4000, steps=40, lr=5e-4), "dpo": dict(lr=2e-5),
               "kto": dict(lr=2e-5)},
    ),
}  # fmt: skip
ON_ROWS = ("oreo", "rejection", "dpo", "kto")
# The stages that use a flag. In the others it must keep its default.
STAGES_OF = dict(rows=ON_ROWS, rounds=ON_ROWS, reference=("oreo", "dpo", "kto"), value=("oreo",), variant=("oreo",),
                 reward_scale=("collect", *ON_ROWS), reward_shift=("collect", *ON_ROWS))  # fmt: skip
SYSTEM = {"math": IN_A_BOX,  # the published system turns
          "gsm8k": "Please reason step by step, and produce a final answer following 4 '#', like '#### 0'"}  # fmt: skip


def oreo_losses(logp, ref_logp, values, action_mask, state_mask, rewards, *, beta: float, variant: str = "token"):
    """Return (policy loss, value loss), scalars: the means over the rows of `oreo_row_losses`."""
    given = (logp, ref_logp, values, action_mask, state_mask, rewards)
    policy, value = oreo_row_losses(*given, beta=beta, variant=variant)
    return policy.mean(), value.mean()


def oreo_row_losses(
    logp: Tensor, ref_logp: Tensor, values: Tensor, action_mask: Tensor, state_mask: Tensor, rewards: Tensor, *,
    beta: float, variant: str = "token",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return each row's policy loss (without the KL regulariser) and value loss, [B] each.

    Index t predicts token t + 1 (a_t above): logp, ref_logp [B, T] are its log-probs, action_mask [B, T] is 1 if the
    model chose it, values [B, T] is V of the text up to token t, and state_mask [B, T] is 1 if the equation is imposed
    there. rewards [B]. Padding, on either side, has 0 in both masks.

    The policy loss is the mean over a row's states of (sg(V_t) - R + beta x_t)^2. x_t is S_t; its gradient is that of:
    token     S_t = d_t + sg(S_{t+1}),             d_t = log [pi_t / ref_t] of an action, 0 of any other token
    step      S_t = d_t + .. + d_{u-1} + sg(S_u),  u the row's next state
    response  S_t, at the row's first state alone
    dqo       S_t, the gradient reaching every action from t on (arXiv 2410.09302, the paper's baseline)

    Raises ValueError for other shapes, an unknown variant, or a row without a state.

    >>> nan = float("nan")  # a prompt of two tokens, an answer of two: incorrect, and its last token got likelier
    >>> logp, ref = torch.tensor([[nan, -1.0, -1.0]]), torch.tensor([[nan, -1.0, -2.0]])
    >>> mask, values = torch.tensor([[0, 1, 1]]), torch.tensor([[9.0, 0.5, 0.0]])
    >>> policy, value = oreo_row_losses(logp, ref, values, mask, mask, torch.zeros(1), beta=0.5)
    >>> value.tolist()  # ((0.5 + 0.5)^2 + (0 + 0.5)^2) / 2
    [0.625]
    """
    shapes = [tuple(x.shape) for x in (logp, ref_logp, values, action_mask, state_mask)]
    if len(set(shapes)) > 1 or logp.dim() != 2 or rewards.shape != logp.shape[:1]:
        raise ValueError(f"not five [B, T] and one [B]: {shapes} and {tuple(rewards.shape)}")
    state = state_mask.bool()
    if not state.any(1).all():
        raise ValueError(f"rows without a state: {(~state.any(1)).nonzero()[:, 0].tolist()}")
    d = torch.where(action_mask.bool(), logp - ref_logp, 0.0)  # [B, T]
    suffix = d.flip(1).cumsum(1).flip(1)  # [B, T], S_t
    reward = rewards[:, None].to(d.dtype)

    def mean_square(residual, state):  # over the states of each row: [B, T] -> [B]
        return torch.where(state, residual, 0.0).square().sum(1) / state.sum(1)

    value_loss = mean_square(values - reward + beta * suffix.detach(), state)
    if variant == "token":
        reach = d  # [B, T], what a state's gradient reaches: this token
    elif variant == "step":
        reach = suffix - F.pad(suffix, (0, 1)).gather(1, next_state(state))  # to the end of its step, S_t - S_u
    elif variant in ("response", "dqo"):
        reach = suffix  # to the end of the answer
    else:
        raise ValueError(f"variant {variant!r}: token, step, response or dqo")
    x = suffix.detach() + (reach - reach.detach())  # [B, T], the value of S_t with the gradient of `reach`
    if variant == "response":  # each row's first state alone
        state = torch.zeros_like(state).scatter(1, state.int().argmax(1, keepdim=True), True)
    return mean_square(values.detach() - reward + beta * x, state), value_loss


def next_state(state: Tensor) -> Tensor:
    """Return, for each position t of state [B, T] bool, the smallest index above t that is a state; T if there is none.

    >>> next_state(torch.tensor([[0, 1, 0, 1, 0]]).bool()).tolist()
    [[1, 3, 3, 5, 5]]
    """
    width = state.shape[1]
    index = torch.where(state, torch.arange(width, device=state.device), width)  # [B, T]
    at_or_after = index.flip(1).cummin(1).values.flip(1)
    return F.pad(at_or_after[:, 1:], (0, 1), value=width)


def dpo_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, *, beta: float) -> Tensor:
    """DPO (arXiv 2305.18290): - log sigmoid(beta (h_chosen - h_rejected)), [B] -> [B]. h: sums of log [pi / ref]."""
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio))


def kto_loss(log_ratio: Tensor, right: Tensor, baseline: float, *, beta: float) -> Tensor:
    """1 - sigmoid(beta (r - z)) of a correct answer, 1 - sigmoid(beta (z - r)) of an incorrect one (arXiv 2402.01306).

    r: log_ratio [B], log [pi / ref] summed over the answer; right [B] bool; z: `baseline`, from `kto_baseline`.
    KTO's weights lambda_D, lambda_U are 1. -> [B]"""
    gain = log_ratio - baseline
    return 1 - torch.sigmoid(beta * torch.where(right, gain, -gain))


def balanced(rewards: list[float], most: int) -> list[int]:
    """Return which answers of a question to keep: at most the first `most` correct and the first `most` incorrect ones.
    Keep no more correct than incorrect ones, but one correct answer if none is incorrect. most 0 keeps all.

    >>> balanced([1, 1, 0, 1, 0, 0], 2), balanced([1, 1, 1], 4), balanced([0, 1, 1], 4)
    ([0, 1, 2, 4], [0], [0, 1])
    """
    right, wrong = ([i for i, r in enumerate(rewards) if (r > 0) == side] for side in (True, False))
    if not most:
        return sorted(right + wrong)
    return sorted(right[: min(most, max(len(wrong), 1))] + wrong[:most])


def by_question(rows: list["Row"]) -> list[list["Row"]]:
    """Return the answers to each question."""
    grouped = itertools.groupby(sorted(rows, key=lambda row: row.group), key=lambda row: row.group)
    return [list(answers) for _, answers in grouped]


def dpo_pairs(rows: list["Row"], limit: int, seed: int) -> list[list["Row"]]:
    """Draw up to `limit` pairs [correct, incorrect] of each question's answers, without replacement."""
    pairs = []
    for answers in by_question(rows):
        both = [[a, b] for a in answers if a.reward > 0 for b in answers if b.reward <= 0]
        pairs += random.Random(f"{seed} {answers[0].group}").sample(both, min(limit, len(both)))
    return pairs


@dataclass
class Row:
    """A graded answer as ids. In a conversation the response starts at the first trained turn."""

    prompt: list[int]
    response: list[int]
    actions: list[bool]  # [response]: the model chose this token
    steps: list[bool]  # [response]: the text before this token is a state of the step variant
    reward: float = 1.0  # R
    group: int = 0  # which question
    index: int = 0  # which answer in the data: a row of the file may hold several
    # As of its last update: log pi and log [pi / ref], summed over the actions; their mean KL; V at the starts of steps
    # and before the last token
    logp: float = 0.0
    log_ratio: float = 0.0
    kl: float = 0.0
    values: list[float] = field(default_factory=list)
    last_value: float = 0.0

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.response)

    def shown(self, tokenizer) -> dict:
        """The row for samples.jsonl: its steps, and the value of the state before each."""
        starts = [i for i, start in enumerate(self.steps) if start]
        steps = [tokenizer.decode(self.response[i:j]) for i, j in zip(starts, [*starts[1:], None], strict=True)]
        return {
            "answer": self.index, "reward": self.reward, "log_ratio": self.log_ratio,
            "prompt": tokenizer.decode(self.prompt), "steps": steps, "values": [round(v, 4) for v in self.values],
        }  # fmt: skip


def read_rows(source: str, tokenizer, args: Args) -> tuple[list[Row], dict[str, int]]:
    """Return the graded rows of a file that --balance keeps, and counts. Raises InputError naming the row."""
    rows, ends = [], step_ids(tokenizer, args.step_delimiters)
    traces, count = read_traces(source, tokenizer, args)
    for prompt, response, mask, reward, group, index in traces:
        if mask is None:
            actions, steps = [True] * len(response), step_starts(response, ends)
        else:  # in a conversation a step is a turn
            actions, steps = mask, [here and not before for before, here in itertools.pairwise([False, *mask])]
        rows.append(Row(prompt, response, actions, steps, reward * args.reward_scale + args.reward_shift, group, index))
    kept = [group[i] for group in by_question(rows) for i in balanced([row.reward for row in group], args.balance)]
    rows = sorted(kept, key=lambda row: row.index)
    return rows, count | {"kept": len(rows), "right": sum(row.reward > 0 for row in rows)}


def as_published(item: Item, row: dict, ask: str) -> Item:
    """Return a row with GSM8K's or MATH's columns in the published form: prompt by `ask`, and the unchanged solution as
    trace. Return any other row unchanged, also one whose traces are not its solution (a model's generations)."""
    row = {str(name).lower(): value for name, value in row.items()}
    asked, kind = row.get("problem") or row.get("question"), item.source or "math"
    solution = row["answer"] if AFTER_HASHES.search(str(row.get("answer")).rstrip()) else row.get("solution")
    own = all(solution and solution.partition("####")[0].strip() in trace.text for trace in item.traces)
    if str(row.get("prompt") or "").strip() or not asked or item.question != asked or kind not in SYSTEM or not own:
        return item
    prompt = [{"role": "system", "content": SYSTEM[kind]}, {"role": "user", "content": asked}]
    if ask == "user":
        prompt = [{"role": "user", "content": f"{asked}\n{IN_A_BOX}"}]
    traces = [dataclasses.replace(trace, text=solution) for trace in item.traces]
    return dataclasses.replace(item, prompt=prompt, traces=traces, source=kind)


def read_problems(tokenizer, args: Args, *, traces: str = "needed", **options):
    """Return all examples of --data, index over all files, and counts of what was left out."""
    examples, counts, before = [], {}, 0
    options |= dict(traces=traces, long_trace=args.long_response, reshape=partial(as_published, ask=args.ask))
    for source in args.data:
        found, count = read_examples(source, tokenizer, args, split="train", **options)
        examples += [dataclasses.replace(e, index=before + e.index) for e in found]
        before += count["rows"]
        counts = {name: counts.get(name, 0) + n for name, n in count.items()}
    if traces == "needed":
        if args.long_response == "cut":
            examples = [dataclasses.replace(e, trace=e.trace[: max(1, args.max_row_tokens - len(e.prompt))])
                        for e in examples]  # fmt: skip
        kept = [e for e in examples if len(e.prompt) + len(e.trace) <= args.max_row_tokens]
        counts |= {"row_too_long": len(examples) - len(kept), "kept": len(kept)}
        examples, counts = kept, with_kept(kept, counts, " ".join(args.data), args)
    return examples, counts


def training_units(tokenizer, args: Args, progress: bool) -> tuple[list[list[Row]], dict[str, int]]:
    """Return units: lists of rows that stay together in an update (one row, or a pair); and the counts."""
    if args.stage == "sft":
        examples, count = read_problems(tokenizer, args, golds=False, progress=progress)
        masks = [[True] * len(e.trace) for e in examples]
        return [[Row(e.prompt, e.trace, m, m, index=e.index)] for e, m in zip(examples, masks, strict=True)], count
    rows, count = read_rows(args.rows, tokenizer, args)
    rewards = {row.reward for row in rows}
    if args.stage != "rejection" and len(rewards) == 1:
        raise InputError(
            f"--rows {args.rows}: all {len(rows)} rewards are {rewards.pop():g}, so there is nothing to tell apart: "
            "collect more --samples, at a higher --temperature, or to other problems"
        )
    units, lacks = [[row] for row in rows if args.stage != "rejection" or row.reward > 0], "no answer is right"
    if args.stage == "dpo":
        units, lacks = dpo_pairs(rows, args.pairs_per_question, args.seed), "no question has a right and a wrong answer"
    if not units:
        raise InputError(f"--rows {args.rows}: {lacks}: --stage {args.stage} has nothing to learn from")
    return units, count | {"units": len(units)}


def row_batches(units: list[list[Row]], args: Args, world):
    """Yield this rank's micro-batches of an update: (token batch, its rows, which tokens are actions, 0 or 1 [N])."""
    for batch, mine in micro_batches(units, args, world, lambda unit: [(row.prompt, row.response) for row in unit]):
        rows = [row for unit in mine for row in unit]
        yield batch, rows, per_token(batch, [row.actions for row in rows]).float()


def on_grid(values: Tensor, lengths: list[int]) -> Tensor:
    """[N], the response tokens of packed rows -> [B, T], right-padded with zeros. Differentiable."""
    inside = torch.arange(max(lengths, default=1)) < torch.tensor(lengths)[:, None]  # [B, T]
    return values.new_zeros(inside.shape).masked_scatter(inside.to(values.device), values)


def row_sums(values: Tensor, batch, rows: int) -> Tensor:
    """[N] -> [B]: the sum over each row's tokens."""
    return values.new_zeros(rows).index_add(0, batch.sequence, values)


def accumulate_gradient(policy, value, reference, units: list[list[Row]], args: Args, world) -> dict[str, float]:
    """Forward and backward of one update, summed over ranks and micro-batches; gradients are left in .grad.
    Measurements are written into the rows of all ranks. Returns the losses.

    `units` are those of all ranks. Every denominator is counted over them before the first backward, so the gradient is
    the same for any number of ranks and any micro_batch_tokens. Both losses of oreo read the values and log-probs from
    before the update, so the order of the two optimizer steps does not matter."""
    row_of = {row.index: row for unit in units for row in unit}
    n_units = len(units)  # the denominator: rows (dpo: pairs). In sft and rejection each row has its own:
    denominators = block_denominators([sum(row.actions) for row in row_of.values()], args.sft_rows_per_mean)
    denominator_of = dict(zip(row_of, denominators, strict=True))
    baseline = kto_baseline(policy, reference, units, args, world) if args.stage == "kto" else 0.0
    totals, measured = Totals(world), []
    for batch, rows, action in row_batches(units, args, world):
        lengths = [len(row.response) for row in rows]
        values, kl = None, torch.zeros_like(action)  # of oreo alone
        if args.stage == "oreo":
            logp, ref_logp, kl = policy(batch, reference=reference)  # [N] each
            values = value(batch)  # [N]
            state = per_token(batch, [row.steps for row in rows]) if args.variant == "step" else action
            reward = torch.tensor([row.reward for row in rows], device=world.device)  # [B]
            grids = [on_grid(x, lengths) for x in (logp, ref_logp, values, action, state)]  # [B, T] each
            policy_losses, value_losses = oreo_row_losses(*grids, reward, beta=args.beta, variant=args.variant)
            value_loss = value_losses.sum() / n_units
            (value_loss * world.size).backward()  # FSDP averages over ranks; we need the sum
            totals.add({"loss/value": value_loss})
            mean_kl = row_sums(kl * action, batch, len(rows)) / row_sums(action, batch, len(rows))  # [B]
            loss = (policy_losses.sum() + args.kl_coef * mean_kl.sum()) / n_units
        elif args.stage in ("dpo", "kto"):
            logp = policy(batch)  # [N]
            with torch.no_grad():
                ref_logp = reference(batch)  # [N]
            ratios = row_sums((logp - ref_logp) * action, batch, len(rows))  # [B]; subtract first, less error
            if args.stage == "dpo":
                losses = dpo_loss(ratios[::2], ratios[1::2], beta=args.beta)  # [B / 2]
            else:
                right = torch.tensor([row.reward > 0 for row in rows], dtype=torch.bool, device=world.device)
                losses = kto_loss(ratios, right, baseline, beta=args.beta)  # [B]
            loss = losses.sum() / n_units
        else:  # sft, rejection
            logp = ref_logp = policy(batch)  # [N]
            loss = -(logp * action / per_token(batch, [denominator_of[row.index] for row in rows])).sum()
        (loss * world.size).backward()  # FSDP averages over ranks; we need the sum

        totals.add({"loss/policy": loss})
        sums = [row_sums((x * action).detach(), batch, len(rows)) for x in (logp, logp - ref_logp, kl)]  # [B] each
        row_values = [None] * len(rows) if values is None else values.detach().split(lengths)
        measured += zip(rows, torch.stack(sums, 1), row_values, strict=True)
    for index, fields in gather_lists([(row.index, measurements(row, *x)) for row, *x in measured], world):
        vars(row_of[index]).update(fields)
    return totals.reduce()


def measurements(row: Row, sums: Tensor, values: Tensor | None) -> dict:
    """Return the fields of a row that an update measures. sums [3]: log pi, log [pi / ref] and KL over the actions."""
    logp, log_ratio, kl = sums.tolist()
    fields = {"logp": logp, "log_ratio": log_ratio, "kl": kl / sum(row.actions)}
    if values is not None:
        by_token = values.tolist()
        fields |= {"values": list(itertools.compress(by_token, row.steps)), "last_value": by_token[-1]}
    return fields


@torch.no_grad()
def kto_baseline(policy, reference, units: list[list[Row]], args: Args, world) -> float:
    """Return KTO's z: the mean log-ratio of the update's answers, each after another row's prompt, clamped at 0."""
    rows = [row for unit in units for row in unit]
    others = [[dataclasses.replace(row, prompt=rows[i - 1].prompt)] for i, row in enumerate(rows)]
    totals = Totals(world)
    for batch, _, action in row_batches(others, args, world):
        totals.add({"log_ratio": ((policy(batch) - reference(batch)) * action).sum()})
    return max(0.0, totals.reduce()["log_ratio"] / len(rows))


def check(args: Args) -> None:
    """Raise InputError for settings that cannot work, alone or together."""
    check_flags(args)
    for name, stages in STAGES_OF.items():
        if (value := getattr(args, name)) != getattr(Args, name) and args.stage not in stages:
            raise InputError(f"--{name} {value} is for --stage {', '.join(stages)}, not {args.stage}")
    if args.rounds > 1 and args.reference and args.round_reference == "last":
        raise InputError(f"--reference {args.reference} has no effect with --round_reference last: a round's reference "
                         "is the model that collected its rows; add --round_reference first")  # fmt: skip
    if args.stage == "kto" and args.batch_size < 2:
        raise InputError(f"--batch_size {args.batch_size}: kto compares with another row's prompt: 2 or more")
    if args.rounds > 1 and args.rows:
        raise InputError("--rounds collects rows of its own: remove --rows")
    if args.model.startswith("runs/") and not Path(args.model).exists():
        raise InputError(f"--model {args.model}: not there; --stage sft makes it, or name another")


def describe(rows: list[Row], args: Args) -> dict[str, float | None]:
    """Metrics of the rows of a step."""
    right, wrong = [r for r in rows if r.reward > 0], [r for r in rows if r.reward <= 0]
    log = {"policy/logp": mean(r.logp / sum(r.actions) for r in rows), "length": mean(len(r.response) for r in rows)}
    if args.stage in ("oreo", "dpo", "kto"):
        log["log_ratio/right"], log["log_ratio/wrong"] = (mean(r.log_ratio for r in side) for side in (right, wrong))
    if args.stage == "oreo":
        log |= {
            "policy/kl": mean(r.kl for r in rows), "value/first": mean(r.values[0] for r in rows if r.values),
            "value/right": mean(r.last_value for r in right), "value/wrong": mean(r.last_value for r in wrong),
        }  # fmt: skip
    return log


def models_of(args: Args) -> dict[str, str]:
    """The models that training starts from, by their flags."""
    return {"model": args.model, "value": args.value, "reference": args.reference}


def train(args: Args, **found: str) -> None:
    """Train by --stage sft, oreo, rejection, dpo or kto; write model/ (and oreo's value/) to the run folder. found:
    paths that `collect` and `iterate` made; a resume compares their files' contents, so that OUT can be renamed."""
    run = Run(args)
    args = dataclasses.replace(args, **found)
    world, tokenizer = run.world, open_tokenizer(args.model, args)
    units, left_out = training_units(tokenizer, args, world.main)
    # kto reads each answer after another row's prompt too
    swapped = [max((row.prompt for unit in units for row in unit), key=len)] if args.stage == "kto" else []
    run.plan(
        units, held_out_examples(tokenizer, args, reshape=partial(as_published, ask=args.ask)), left_out,
        key=lambda unit: [x for row in unit for x in (row.prompt, row.response, row.actions, row.reward)],
        sequences=lambda unit: [(prompt, row.response) for row in unit for prompt in (row.prompt, *swapped)],
        source=f"--rows {args.rows}" if args.rows else f"--data {' '.join(args.data)}", models=models_of(args),
    )  # fmt: skip

    adam = dict(betas=args.betas, weight_decay=args.weight_decay)
    policy = open_policy(args.model, args, world, lora=args.policy_lora)
    optimizer = make_optimizer(policy, lr=args.lr, **adam)
    more, value, reference = {}, None, None
    if args.stage == "oreo":
        value = open_policy(args.value or args.model, args, world, kind=ValueModel, new_head=True, lora=args.value_lora)
        more = {"value": (value, make_optimizer(value, lr=args.value_lr, **adam))}
    if args.stage in ("oreo", "dpo", "kto"):
        flag = "--reference" if args.reference else "--model"
        reference = open_policy(args.reference or args.model, args, world, gradient_checkpointing="none", flag=flag)
        reference.requires_grad_(False)
    for name, model in (("value", value), ("reference", reference)):
        if model and (path := getattr(args, name)):
            check_fit(f"--{name} {path}", model, policy, run.longest)
    run.begin(policy, optimizer, tokenizer, **more)
    sampler = open_sampler(policy, tokenizer, args, world, needed=run.held_out)
    sampler.sync(policy, version=run.start)
    run.log(run.evaluate(sampler))

    for step in run:
        batch = [units[i] for i in batch_indices(len(units), args.batch_size, step - 1, args.seed)]
        rows = [row for unit in batch for row in unit]

        # 1. sample, 2. reward: none; rows are given. 3. advantages: the loss has residuals instead

        # 4. update
        with run.clock("update"):
            sampler.sleep()  # frees its memory for the trainer until the sync
            log = accumulate_gradient(policy, value, reference, batch, args, world) | describe(rows, args)
            clip, norm = dict(max_grad_norm=args.max_grad_norm), "optim/value_grad_norm"
            # both models take their step, or none: `update` checks the gradients of both first
            if not value or run.update("value", log, rows, lr=run.lr(peak=args.value_lr), norm=norm, **clip):
                run.update("policy", log, rows, lr=run.lr(), **clip)

        # 5. sync
        with run.clock("sync"):
            if run.evaluates:
                sampler.sync(policy, version=step)

        # 6. log, evaluate, save
        run.log(run.evaluate(sampler), rows)
        run.save()
    run.finish(sampler)


def collect(args: Args) -> str:
    """Sample --samples answers to each problem of --data and grade them; write those that --balance keeps to
    OUT/rows.jsonl, and return its path. After a stop it resumes."""
    world, out = init_world(args.timeout_minutes), Path(args.out)
    tokenizer = open_tokenizer(args.model, args)
    examples, left_out = read_problems(tokenizer, args, traces="ignored", progress=world.main)

    names = ("model data ask igsm_problems chat_template chat_template_args verifier samples max_prompt_tokens seed "
             "max_response_tokens temperature top_p batch_size rope_theta max_positions")  # fmt: skip
    settings = {name: getattr(args, name) for name in names.split()}
    settings["weights_digest"] = " ".join(digests_of({"model": args.model}, world).values())
    answers = keep_answers(
        out / "answers.jsonl", examples, partial(open_policy, args.model, args, world, gradient_checkpointing="none"),
        settings, tokenizer, args, world, n=args.samples, top_p=args.top_p,
    )
    if world.main:
        rows = []
        for e, found in zip(examples, answers, strict=True):
            about = dict(question=e.index, source=e.source, gold=e.gold, prompt=e.text, prompt_ids=e.prompt)
            known = [a for a in found if a["status"] not in ("timeout", "error")]  # else right or wrong is not known
            rewards = [answer["reward"] * args.reward_scale + args.reward_shift for answer in known]
            rows += [about | known[i] for i in balanced(rewards, args.balance)]
        write_lines(out / "rows.jsonl", rows)
        statuses = Counter(answer["status"] for found in answers for answer in found)
        right = sum(row["reward"] * args.reward_scale + args.reward_shift > 0 for row in rows)
        print(f"{' '.join(args.data)}: {in_words(left_out, args)}; {len(rows)} answers, {right} right; "
              f"sampled: {dict(statuses)}")  # fmt: skip
    torch.distributed.barrier()  # no rank reads the file before it is there
    return str(out / "rows.jsonl")


def iterate(args: Args) -> None:
    """Collect and train --rounds times, each time with the policy so far. Rounds that are complete are not redone."""
    world = init_world(args.timeout_minutes)
    first = last = dict(model=args.model, value=args.value)  # last: of the round before
    for number in range(1, args.rounds + 1):
        out = Path(args.out) / f"round-{number}"
        its_args = dataclasses.replace(args, out=str(out), rounds=1, seed=(args.seed + 1000 * number) % 10**12)
        reference = last["model"] if args.round_reference == "last" else args.reference or args.model
        models = (last if args.round_init == "last" else first) | dict(reference=reference)
        if not (out / "model").exists():
            train(its_args, rows=collect(dataclasses.replace(its_args, model=last["model"])), **models)
        else:
            there, here = json.loads((out / "args.json").read_text()), json.loads(json.dumps(vars(its_args)))
            if changed := changed_settings(there, here, here.keys() - (Checkpoints.FREE - {"steps", "epochs"})):
                raise InputError(f"{out} was made with other settings ({changed}): choose another --out")
            keep_digests(out, models_of(dataclasses.replace(its_args, **models)), True, world)
            if world.main:
                print(f"{out}: round {number} is complete")
        last = dict(model=str(out / "model"), value=str(out / "value") if args.stage == "oreo" else "")
    if world.main:
        rounds = {f"round {n}": Path(args.out) / f"round-{n}" for n in range(1, args.rounds + 1)}
        plot_curves(rounds, None, Path(args.out) / "curves.png")


def main(args: Args) -> None:
    args = dataclasses.replace(args, stage="oreo") if args.stage == "iterate" else args  # iterate only set --rounds 3
    check(args)
    if args.stage == "collect":
        collect(args)
    elif args.rounds > 1:
        iterate(args)
    elif args.stage == "sft" or args.rows:
        train(args)
    else:
        train(args, rows=collect(args))


if __name__ == "__main__":
    args = parse_args(Args, None, stage=STAGES, variant=VARIANTS, preset=PRESETS)
    launch(main, args)
