r"""OREO: offline reasoning optimization (Wang et al., arXiv 2412.16145).

DPO learns from pairs of whole answers, and rejection sampling from right answers alone. OREO learns from single
answers, right or wrong, of which only the end is graded, and finds out by itself which tokens mattered: a value
model V is trained beside the policy pi so that both agree with the reward R on every state of every answer,

    V(s_t) = R - beta * S_t,      S_t = sum_{i >= t} log pi(a_i | s_i) / pi_ref(a_i | s_i)           (soft Bellman)

which only the optimum of  E[R] - beta * KL(pi || pi_ref)  fulfils. s_t is the text before token a_t. Masks choose the
actions (what the model wrote) and the states (where the equation is asked for); sg stops the gradient:

    L_V  = mean_rows mean_t (V_t - R + beta sg(S_t))^2
    L_pi = mean_rows mean_t (sg(V_t) - R + beta (log pi_t / ref_t + sg(S_{t+1})))^2                 (Eq. 9, "token")
         + alpha * mean_rows mean_t KL(pi(. | s_t) || pi_ref(. | s_t))          over the actions and the vocabulary

--variant step takes the starts of steps as states and a step as an action (the gradient reaches its tokens, and is
stopped at the next step's start); response takes the answer as one action (Eq. 10), while V is trained on every state;
dqo is the paper's comparison: token states, and the gradient reaches all that follows.
At test time V guides a search over steps, which needs no verifier.

--stage picks what to do, each with its published settings:
  sft        worked solutions, 3 epochs: where everything starts
  collect    sample answers to the problems and grade them: rows of prompt, response and reward
  oreo       the above, on rows; without --rows it collects them first
  rejection, dpo, kto    the paper's comparisons, on the same rows
  iterate    oreo for three rounds, each on new rows of the round before it (--rounds also works for the others)
  search     answer held-out problems greedily, or by beam, best_of_n, best_of_k with the value

Where this file departs from the paper or from its published code, and why:
- An answer's ids are what the sampler drew, and its eos is the last action. The published rows were text, tokenised
  again with " " and eos put behind it. (Rows of text are read too. They get an eos, and the tokenizer's own bos.)
- A row over 2,048 tokens is rejected and counted; the published code cut it, kept the reward and lost the eos
  (--long_response cut).
- A step ends with a token that holds a delimiter: the same rule in training and in search, on ids. The published code
  split text on "\n", for MATH also on ". " and ".$ "; where a token holds two newlines it put the state before it.
- Search reads the value after the last token of a step, and of an answer before its eos: where training has states.
  The published script read it a token early.
- Policy and reference are read once a batch; the published code read the policy twice.
- The schedule ends with the last step; the published one had epochs^2 as many. Rewards are 0 and 1, as in every
  published script and not as in the code's defaults (+1 and -1: --reward_scale 2 --reward_shift -1).
- The SFT loss is the mean of token means of 8 rows each, in the order in which an update draws them, as in the
  published micro-batches of a GPU.
- Not here: one-step PCL, hinge, log-ratio clipping, forward or sampled KL, adaptive alpha: not in the paper.
Open in the paper: which model a round of iterate starts from and which is its reference (--round_init,
--round_reference), and KTO's beta (0.1 here, as DPO's).

Commands:
  python oreo.py --preset tiny --stage sft                                       a laptop, a minute, nothing downloaded
  python oreo.py --preset tiny --model runs/tiny-oreo-sft/model                         collects, trains, evaluates
  python oreo.py --preset tiny --stage search --model runs/tiny-oreo/model --value runs/tiny-oreo/value --width 5
  python oreo.py --stage sft --data train.jsonl; python oreo.py --data train.jsonl      one GPU
  torchrun --nproc_per_node 8 oreo.py --stage sft; torchrun --nproc_per_node 8 oreo.py  the paper's run, GSM8K and MATH
"""

import dataclasses
import itertools
import json
import math
import os
import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from common.data import (
    InputError,
    batch_indices,
    check_verifier,
    pack,
    plan_micro_batches,
    token_scales,
)
from common.rollout import Sampling, make_sampler
from common.rows import (
    IN_A_BOX,
    Item,
    Trace,
    data_digest,
    held_out_examples,
    load_rows,
    read_examples,
    read_row,
    render_prompt,
    report_golds,
    response_ids,
    set_template,
    trace_text,
    with_bos,
)
from common.search import Candidate, search_answers, step_ids
from common.trainer import (
    BadBatches,
    Checkpoints,
    Clock,
    Metrics,
    ValueModel,
    changed_settings,
    check_finite,
    export,
    gather_lists,
    gradient_norm,
    init_world,
    keep_best,
    launch,
    learning_rate,
    load_policy,
    load_tokenizer,
    logit_form,
    make_optimizer,
    max_positions,
    optimizer_step,
    parse_args,
    peak_memory_gb,
    plot_curves,
    sum_over_ranks,
)
from common.verifiers import grade


@dataclass
class Args:
    stage: Literal["sft", "collect", "oreo", "rejection", "dpo", "kto", "iterate", "search"] = "oreo"
    """What to do; the defaults below follow it."""
    variant: Literal["token", "step", "response", "dqo"] = "token"
    """OREO's policy loss; --kl_coef follows it."""
    preset: Literal["paper", "paper_7b", "paper_alfworld", "tiny"] = "paper"
    """paper: the published run of Qwen2.5-Math-1.5B. paper_7b: of DeepSeekMath-7B-Instruct. paper_alfworld: of
    MiniCPM-2B on ALFWorld, whose rows oreo_agents.py makes. tiny: the repository's model on symbolic iGSM, for a
    laptop."""

    # what
    model: str = "runs/oreo-sft/model"
    """Model folder or Hub name: what is trained, or collects, or searches."""
    value: str = ""
    """Value model to start from, or to search with; empty starts from the model's body and a head of zeros."""
    reference: str = ""
    """Frozen reference of oreo, dpo and kto; empty takes --model."""
    data: tuple[str, ...] = ("openai/gsm8k:main", "DigitalLearningGmbH/MATH-lighteval")
    """Problems to collect answers to (with worked solutions, for sft): files, folders, Hub names, or igsm:LO-HI for
    symbolic iGSM problems of LO to HI operations. README has a table of all shapes of rows."""
    ask: Literal["system", "user"] = "system"
    """How rows with GSM8K's or MATH's columns are asked. system: by the published system turn of each, as Qwen was.
    user: by a sentence after the question, as DeepSeekMath was."""
    rows: str = ""
    """Graded rows to train on: what collect wrote, or any shape with graded traces (README's table). Empty collects
    them into OUT/rows.jsonl."""
    eval_data: tuple[str, ...] = ()
    """Held-out rows, in the formats of --data. Hub names: the test split; igsm: problems whose templates are not in the
    training set."""
    igsm_problems: int = 20000
    """How many problems igsm:LO-HI makes."""
    out: str = "runs/oreo"
    """Run folder. Running the same command again goes on where it stopped."""
    chat_template: str = ""
    """File with a Jinja chat template; empty takes the tokenizer's own. It is saved with the model."""
    chat_template_args: tuple[str, ...] = ()
    """Settings of a template's switches, key=value, as in enable_thinking=false. They are saved with the model."""
    trust_remote_code: bool = False
    """Run the Python files that come with --model."""
    verifier: str = "full"
    """How answers are graded: full (Math-Verify), robust (for your own data), math, boxed, exact, ... or
    "module:function" of your own, (response, gold) -> reward (common/verifiers.py)."""
    max_prompt_tokens: int = 2048
    """Rows with longer prompts are left out and counted."""
    max_response_tokens: int = 2048
    """Tokens to sample at most (published), and the longest response to train on."""
    max_row_tokens: int = 2048
    """Tokens of prompt and response together to train on (published; ALFWorld: 4096)."""
    long_response: Literal["reject", "cut"] = "reject"
    """A row over these limits: leave it out, or cut its response as the published code did."""
    skip_turns: int = 0
    """First assistant turns of a conversation that are context and not trained (ALFWorld: 1)."""
    step_delimiters: tuple[str, ...] = ("\n",)
    """A step ends with a token that holds one of these."""

    # how: the published run
    samples: int = 10
    """Answers to collect for each problem (published: 10; 7B: 16)."""
    balance: int = 0
    """Keep at most so many right and so many wrong answers of each problem, and no more right than wrong ones (but
    one): 4 in the published 7B run; 0 keeps all."""
    temperature: float = 1.0
    """Sampling temperature of collect and search."""
    top_p: float = 1.0
    """Nucleus of collect and search (the published sampling tool: 0.95; whether collection used it is not stated)."""
    reward_scale: float = 1.0
    """R = reward * scale + shift (published: 1, 0)."""
    reward_shift: float = 0.0
    """See --reward_scale."""
    beta: float = 0.03
    """Strength of the KL in the objective (published; dpo: 0.1)."""
    kl_coef: float = 0.01
    """alpha, the weight of the KL regulariser (published: 0.01 token, 0.1 step, 0.3 response)."""
    rounds: int = 1
    """Collect and train again so many times in all."""
    round_init: Literal["last", "first"] = "last"
    """Policy and value that a round trains: those of the round before, or those of the command line."""
    round_reference: Literal["last", "first"] = "last"
    """A round's reference: the policy that collected its rows, or --reference."""
    pairs_per_question: int = 6
    """dpo: pairs of right and wrong answers to a question, drawn from all (published: 6; 7B: 10; ALFWorld: 5)."""
    steps: int = 0
    """Optimizer updates; 0 follows --epochs."""
    epochs: float = 1.0
    """Passes over the rows (published: 1; sft 3)."""
    batch_size: int = 128
    """Rows (dpo: pairs) an update; collect: problems between two writes."""
    sft_rows_per_mean: int = 8
    """sft: the loss is the mean of token means of so many rows each (the published micro-batches of 8); 0 is one mean
    over the update, as in rejection, whose micro-batches are not published."""
    lr: float = 5e-6
    """Peak learning rate of the policy's AdamW (published: sft 2e-5, dpo 5e-7, kto 5e-8)."""
    value_lr: float = 5e-6
    """Peak learning rate of the value model's (published; 7B: 1e-4 with LoRA)."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up."""
    warmup: float = 0.03
    """Share of the updates over which the rate rises linearly."""
    lr_floor: float = 0.0
    """Where linear and cosine end, as a share of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm to clip to, of policy and value each."""
    policy_lora: int = 0
    """Train the policy by LoRA of this rank on every linear layer (needs peft); 0 trains all weights."""
    value_lora: int = 0
    """The same for the value model, whose head is trained whole (published for 7B: 64)."""
    seed: int = 0
    """Seeds data order, sampling and random weights."""

    # search
    search: Literal["greedy", "beam", "best_of_n", "best_of_k"] = "beam"
    """greedy needs no value. beam: --width states, as many next steps of each, the best go on. best_of_n: --width
    answers, the best is taken. best_of_k: --width next steps of one state, the best is taken."""
    width: int = 5
    """See --search (published: 3, 5, 7)."""
    max_steps: int = 20
    """Steps of beam and best_of_k at most (published)."""

    # machinery
    micro_batch_tokens: int = 16384
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
    eval_every: int = 50
    """Evaluate every so many steps, and before the first and after the last; 0 never."""
    eval_temperature: float = 0.0
    """Temperature of evaluation; 0 is greedy (published)."""
    eval_limit: int = 0
    """Rows of each evaluation file at most; 0 for all."""
    save_every: int = 50
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
    log_samples: int = 2
    """Rows a step to write to samples.jsonl."""
    tensorboard: bool = False
    """Also log to TensorBoard (in the run folder)."""
    wandb: str = ""
    """Also log to this Weights & Biases project."""


STAGES = {
    "sft": dict(model="Qwen/Qwen2.5-Math-1.5B", out="runs/oreo-sft", lr=2e-5, epochs=3.0),
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
        value_lr=1e-3, eval_every=20, eval_limit=128, save_every=20, max_steps=40, micro_batch_tokens=4096,
        gradient_checkpointing=False, sft_rows_per_mean=0,
        stage={
            "sft": dict(out="runs/tiny-oreo-sft", igsm_problems=4000, steps=40, lr=5e-4), "dpo": dict(lr=2e-5),
            "kto": dict(lr=2e-5),
        },
    ),
}
SYSTEM = {  # the published system turns
    "gsm8k": "Please reason step by step, and produce a final answer following 4 '#', like '#### 0'", "math": IN_A_BOX,
}


# ------------------------------------------------------------------------------------------ the mathematics


def oreo_losses(logp, ref_logp, values, action_mask, state_mask, rewards, *, beta: float, variant: str = "token"):
    """-> (policy loss, value loss), scalars: the means over the rows of `oreo_row_losses`."""
    policy, value = oreo_row_losses(
        logp, ref_logp, values, action_mask, state_mask, rewards, beta=beta, variant=variant
    )
    return policy.mean(), value.mean()


def oreo_row_losses(logp, ref_logp, values, action_mask, state_mask, rewards, *, beta: float, variant: str = "token"):
    """Each row's policy loss (without the KL regulariser) and value loss, [B] each.

    Index t stands for the prediction of token t + 1: logp, ref_logp [B, T] are its log-probs, action_mask [B, T]
    says whether the model chose it, values [B, T] is V of the text up to token t, and state_mask [B, T] whether the
    equation is asked for there. rewards [B]. Padding, on either side, has both masks 0.

    variant   the policy loss is the mean over a row's states of (sg(V_t) - R + beta * x_t)^2, with x_t equal to S_t
    token     S_t = d_t + sg(S_{t+1}),             d_t = log pi_t / ref_t of an action, 0 of any other token
    step      S_t = d_t + .. + d_{u-1} + sg(S_u),  u the row's next state
    response  S_t, at the row's first state alone
    dqo       S_t, the gradient reaching every action after t (Liu et al. 2024, the paper's comparison)

    Raises ValueError for other shapes, an unknown variant, or a row without a state.

    >>> nan = float("nan")  # a prompt of two tokens, an answer of two: wrong, and its last token got likelier
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
    states = state.sum(1)  # [B]

    def row_mean(residual):  # a value where no state is may be anything
        return torch.where(state, residual, 0.0).square().sum(1) / states

    value_loss = row_mean(values - reward + beta * suffix.detach())
    if variant == "token":
        x = d + F.pad(suffix[:, 1:], (0, 1)).detach()
    elif variant == "step":
        after = F.pad(suffix, (0, 1)).gather(1, next_state(state))  # [B, T], S_u; 0 after the last state
        x = suffix - after + after.detach()
    elif variant == "dqo":
        x = suffix
    elif variant == "response":
        x = suffix
        first = state.int().argmax(1, keepdim=True)
        state, states = torch.zeros_like(state).scatter(1, first, True), torch.ones_like(states)
    else:
        raise ValueError(f"variant {variant!r}: token, step, response or dqo")
    return row_mean(values.detach() - reward + beta * x), value_loss


def next_state(state):
    """state [B, T] bool -> [B, T]: the smallest index above t that is a state, T if there is none.

    >>> next_state(torch.tensor([[0, 1, 0, 1, 0]]).bool()).tolist()
    [[1, 3, 3, 5, 5]]
    """
    width = state.shape[1]
    index = torch.where(state, torch.arange(width, device=state.device), width)  # [B, T]
    at_or_after = index.flip(1).cummin(1).values.flip(1)
    return F.pad(at_or_after[:, 1:], (0, 1), value=width)


def dpo_loss(
    chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, *, beta: float, label_smoothing: float = 0.0
):
    """- log sigmoid(beta h), h = log p(right) / ref(right) - log p(wrong) / ref(wrong), for each pair: [B] -> [B].

    All four are sums of log-probs. label_smoothing e: (1 - e) of that and e of the same with -h."""
    h = beta * ((chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp))
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def kto_loss(log_ratio, right, baseline, *, beta: float):
    """1 - sigmoid(beta (r - z)) of a right answer, 1 - sigmoid(beta (z - r)) of a wrong one (Ethayarajh et al. 2024).

    r: log_ratio [B], log pi / ref summed over the answer; right [B] bool; z: `baseline`, the KL(pi || ref) that
    `kto_baseline` estimates; both answers' weights are 1. -> [B]
    """
    gain = log_ratio - baseline
    return 1 - torch.sigmoid(beta * torch.where(right, gain, -gain))


def balanced(rewards: list[float], most: int) -> list[int]:
    """Which answers of a question to keep: `most` right and `most` wrong ones at most, and no more right than wrong
    ones (but one where none is wrong). The first ones that were drawn; most 0 keeps all.

    >>> balanced([1, 1, 0, 1, 0, 0], 2), balanced([1, 1, 1], 4), balanced([0, 1, 1], 4)
    ([0, 1, 2, 4], [0], [0, 1])
    """
    right, wrong = ([i for i, r in enumerate(rewards) if (r > 0) == side] for side in (True, False))
    if not most:
        return sorted(right + wrong)
    return sorted(right[: min(most, max(len(wrong), 1))] + wrong[:most])


def dpo_pairs(rows: list["Row"], limit: int, seed: int) -> list[list["Row"]]:
    """Up to `limit` of the pairs [right, wrong] of each question's answers, drawn without replacement."""
    questions: dict[int, list[Row]] = {}
    for row in rows:
        questions.setdefault(row.group, []).append(row)
    pairs = []
    for question, answers in questions.items():
        both = [[a, b] for a in answers if a.reward > 0 for b in answers if b.reward <= 0]
        pairs += random.Random(f"{seed} {question}").sample(both, min(limit, len(both)))
    return pairs


# ---------------------------------------------------------------------------------------------- graded rows


@dataclass
class Row:
    """A graded answer as ids. In a conversation the response is all that follows the first trained turn's start."""

    prompt: list[int]
    response: list[int]
    actions: list[bool]  # [response]: the model chose this token
    steps: list[bool]  # [response]: the text before this token is a state of the step variant
    reward: float = 1.0
    group: int = 0  # which question
    index: int = 0  # row number in the data
    # as of its last update: log pi and log pi / ref summed over the actions, their mean KL, and V at the starts of
    # steps and before the last token
    logp: float = 0.0
    log_ratio: float = 0.0
    kl: float = 0.0
    values: list[float] = field(default_factory=list)
    last_value: float = 0.0


def step_starts(response: list[int], ends: frozenset[int]) -> list[bool]:
    """Where a step starts: at the first token, and after every one that ends a step (also an empty line's).

    >>> step_starts([7, 8, 2, 2, 9], frozenset([2]))
    [True, False, False, True, True]
    """
    return [i == 0 or response[i - 1] in ends for i in range(len(response))]


def conversation_ids(messages: list[dict], tokenizer, skip_turns: int):
    """A conversation -> (prompt ids, response ids, action mask of the response).

    Every assistant turn after the first `skip_turns` is an action, with the eos that the template puts behind it;
    what stands between two turns is not. Piece by piece, so that ids are those that the sampler would have seen:

        user  assistant  user  assistant
        p p p r r r r    r r r r r r
        actions 1 1 1 1  0 0 0 1 1 1

    A template that puts no eos behind a turn (the one of the paper's agents) trains none: the model learns no stop.
    Raises InputError where the template shows earlier turns otherwise than when they were said."""
    text, ids, actions = "", [], []
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"][skip_turns:]
    if not turns:
        raise InputError(f"no action: {len(messages)} turns, none of them an assistant's after --skip_turns")
    for turn in turns:
        before = render_prompt(tokenizer, messages[:turn])
        after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        if not (before.startswith(text) and after.startswith(before)):
            raise InputError(
                f"the chat template shows turn {turn} or what is before it otherwise than when it was said; "
                "pass a --chat_template that keeps the history as it is"
            )
        said, eos, _ = after[len(before) :].partition(tokenizer.eos_token)
        for so_far, piece, action in ((text, before[len(text) :], False), (before, said + eos, True)):
            [piece_ids] = response_ids(tokenizer, [so_far], [piece])
            piece_ids = piece_ids if ids else with_bos(piece_ids, tokenizer)
            ids += piece_ids
            actions += [action] * len(piece_ids)
        text = before + said + eos
    first = actions.index(True) if any(actions) else len(ids)
    return ids[:first], ids[first:], actions[first:]


def row_ids(item: Item, trace: Trace, tokenizer, args: Args) -> tuple[list[int], list[int], list | None]:
    """(prompt ids, response ids, action mask; None for a response that is all the model's) of a trace."""
    if item.prompt_ids:
        return item.prompt_ids, trace.ids, trace.actions
    if item.conversation:
        return conversation_ids(item.conversation, tokenizer, args.skip_turns)
    prompt = item.text or render_prompt(tokenizer, item.prompt)
    prompt_ids = tokenizer([prompt], add_special_tokens=False)["input_ids"][0]
    prompt_ids = with_bos(prompt_ids, tokenizer) if item.text else prompt_ids
    said = trace.text if item.text else trace_text(prompt, trace.text)
    response, eos = trace.ids or response_ids(tokenizer, [prompt], [said])[0], tokenizer.eos_token_id
    return prompt_ids, response if response[-1:] in ([], [eos]) else [*response, eos], None


def read_rows(source: str, tokenizer, args: Args) -> tuple[list[Row], dict[str, int]]:
    """Graded rows of a file, and the counts of what was left out. Raises InputError naming the row."""
    ends = step_ids(tokenizer, args.step_delimiters)
    rows, questions, count = [], {}, {"rows": 0, "prompt_too_long": 0, "response_too_long": 0}
    graded = (
        (f"{source}, row {index}", row, item, trace)
        for index, row in enumerate(load_rows(source))
        for item in [read_row(row, f"{source}, row {index}")]
        for trace in item.traces or [None]
    )
    for index, (where, row, item, trace) in enumerate(graded):
        count["rows"] += 1
        if trace is None or trace.reward is None:
            raise InputError(f"{where}: no {'reward' if trace else 'response'}: --rows are graded (README's table)")
        reward = trace.reward
        try:
            prompt, response, mask = row_ids(item, trace, tokenizer, args)
            actions = [True] * len(response) if mask is None else [bool(a) for a in mask]
            known = all(0 <= i < len(tokenizer) for i in (*prompt, *response))
            question = str(row.get("question")), tuple(prompt)  # files of several sources may number alike
            text = row.get("response") if mask is None and item.prompt_ids else None
        except (InputError, TypeError) as error:
            raise InputError(f"{where}: {error}") from error
        known = known and (text is None or tokenizer.decode(response) == text)
        if not known or len(actions) != len(response) or not math.isfinite(reward):
            raise InputError(f"{where}: ids of another tokenizer, a mask of another length, or a reward of {reward}")
        if len(prompt) > args.max_prompt_tokens:
            count["prompt_too_long"] += 1
            continue
        if len(response) > (longest := min(args.max_response_tokens, args.max_row_tokens - len(prompt))):
            count["response_too_long"] += 1
            if args.long_response == "reject" or longest < 1:
                continue
            response, actions = response[:longest], actions[:longest]
        if not prompt or not any(actions):
            raise InputError(f"{where}: no prompt, or no action token; remove the row")
        # in a conversation a step is a turn
        steps = step_starts(response, ends) if mask is None else [
            a and not before for before, a in itertools.pairwise([False, *actions])
        ]
        group = questions.setdefault(question, len(questions))
        rows.append(Row(prompt, response, actions, steps, reward, group, index))
    if not rows:
        raise InputError(
            f"{source}: no row is left of {count['rows']} ({count['prompt_too_long']} prompts over "
            f"--max_prompt_tokens {args.max_prompt_tokens}, {count['response_too_long']} responses over "
            f"--max_response_tokens {args.max_response_tokens} or --max_row_tokens {args.max_row_tokens})"
        )
    return rows, count | {"kept": len(rows), "right": sum(row.reward > 0 for row in rows)}


def training_units(tokenizer, args: Args, progress: bool) -> tuple[list[list[Row]], dict[str, int]]:
    """What an update draws from: lists of rows that stay together, one row or a pair; and the counts."""
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
    if args.stage == "dpo":
        units = dpo_pairs(rows, args.pairs_per_question, args.seed)
        lacks = "no question has a right and a wrong answer"
    else:
        units = [[row] for row in rows if args.stage != "rejection" or row.reward > 0]
        lacks = "no answer is right"
    if not units:
        raise InputError(f"--rows {args.rows}: {lacks}: --stage {args.stage} has nothing to learn from")
    return units, count | {"units": len(units)}


# ----------------------------------------------------------------------------------------------- one update


def micro_batches(units: list[list[Row]], args: Args, world):
    """This rank's packed micro-batches of an update: (token batch, its rows). As many on every rank."""
    lengths = [sum(len(row.prompt) + len(row.response) - 1 for row in unit) for unit in units]
    for shares in plan_micro_batches(lengths, world.size, args.micro_batch_tokens):
        mine = [row for i in shares[world.rank] for row in units[i]]
        yield pack([(row.prompt, row.response) for row in mine], world.device), mine


def on_grid(values, lengths: list[int]):
    """[N], the response tokens of packed rows -> [B, T], right-padded with zeros. Differentiable."""
    inside = torch.arange(max(lengths, default=1)) < torch.tensor(lengths)[:, None]  # [B, T]
    return values.new_zeros(inside.shape).masked_scatter(inside.to(values.device), values)


def row_sums(values, batch, rows: int):
    """[N] -> [B]: the sum over each row's tokens."""
    return values.new_zeros(rows).index_add(0, batch.sequence, values)


def accumulate_gradient(policy, value, reference, units: list[list[Row]], args: Args, world) -> dict[str, float]:
    """Forward and backward of one update, summed over ranks and micro-batches; gradients are left in .grad, and what
    was measured of every row, of all ranks, in the rows. -> the losses.

    Every denominator is counted over the whole update before the first backward, so the gradient is the same for
    any number of ranks and any micro_batch_tokens. oreo's policy loss takes the values as they are before the
    update, and its value loss the log-probs: of the two steps that follow, either may be first."""
    every = {row.index: row for unit in units for row in unit}
    lengths = [sum(row.actions) for row in every.values()]
    rows_per_mean = args.sft_rows_per_mean if args.stage == "sft" else 0
    n_actions, scales = sum(lengths), dict(zip(every, token_scales(lengths, rows_per_mean), strict=True))
    baseline = kto_baseline(policy, reference, units, args, world) if args.stage == "kto" else 0.0
    losses, measured = torch.zeros(2, dtype=torch.float64), []
    for batch, mine in micro_batches(units, args, world):
        lengths, n = [len(row.response) for row in mine], len(mine)
        action = per_token([row.actions for row in mine], world).float()  # [N]
        kl, values = torch.zeros_like(action), None
        if args.stage in ("sft", "rejection"):
            logp = ref_logp = policy(batch)  # [N]
            scale = torch.tensor([scales[row.index] for row in mine], device=logp.device)[batch.sequence]  # [N]
            loss = -(logp * action * scale).sum() / n_actions
        elif args.stage in ("dpo", "kto"):
            logp = policy(batch)  # [N]
            with torch.no_grad():
                ref_logp = reference(batch)
            p, ref = (row_sums(x * action, batch, n) for x in (logp, ref_logp))  # [B], [B]
            if args.stage == "dpo":
                row_losses = dpo_loss(p[::2], p[1::2], ref[::2], ref[1::2], beta=args.beta)
            else:
                right = torch.tensor([row.reward > 0 for row in mine], dtype=torch.bool, device=world.device)
                row_losses = kto_loss(p - ref, right, baseline, beta=args.beta)
            loss = row_losses.sum() / len(units)
        else:
            logp, ref_logp, kl = policy(batch, reference=reference)  # [N] each
            values = value(batch)  # [N]
            state = per_token([row.steps for row in mine], world) if args.variant == "step" else action
            reward = torch.tensor([row.reward * args.reward_scale + args.reward_shift for row in mine])
            policy_losses, value_losses = oreo_row_losses(
                *(on_grid(x, lengths) for x in (logp, ref_logp, values, action, state)), reward.to(world.device),
                beta=args.beta, variant=args.variant,
            )  # fmt: skip
            value_loss = value_losses.sum() / len(units)
            (value_loss * world.size).backward()  # FSDP averages over ranks; the sum is what is wanted
            losses[1] += value_loss.item()
            mean_kl = row_sums(kl * action, batch, n) / row_sums(action, batch, n)  # [B]
            loss = (policy_losses.sum() + args.kl_coef * mean_kl.sum()) / len(units)
        (loss * world.size).backward()  # FSDP averages over ranks; the sum is what is wanted
        losses[0] += loss.item()

        sums = torch.stack([logp * action, (logp - ref_logp) * action, kl * action, action]).detach()  # [4, N]
        sums = [row_sums(x, batch, n).tolist() for x in sums]
        measured += zip([row.index for row in mine], *sums, values_of(mine, values), strict=True)
    for index, logp_sum, log_ratio, kl_sum, n, (at_steps, last) in gather_lists(measured, world):
        row = every[index]
        row.logp, row.log_ratio, row.kl, row.values, row.last_value = logp_sum, log_ratio, kl_sum / n, at_steps, last
    policy_loss, value_loss = sum_over_ranks(losses, world).tolist()
    return {"loss/policy": policy_loss} | ({"loss/value": value_loss} if value else {})



def per_token(lists: list[list], world) -> torch.Tensor:
    """One list a row, of one entry for each response token -> [N]."""
    return torch.tensor([x for values in lists for x in values], device=world.device)


def values_of(rows: list[Row], values) -> list[tuple[list[float], float]]:
    """Of each row: V at the starts of its steps, and before its last token."""
    if values is None:
        return [([], 0.0)] * len(rows)
    by_row = [part.tolist() for part in values.detach().split([len(row.response) for row in rows])]
    return [(list(itertools.compress(vs, row.steps)), vs[-1]) for vs, row in zip(by_row, rows, strict=True)]


@torch.no_grad()
def kto_baseline(policy, reference, units: list[list[Row]], args: Args, world) -> float:
    """z of an update: the mean of log pi / ref over its answers, each behind another row's prompt, not below 0."""
    rows = [row for unit in units for row in unit]
    others = [[dataclasses.replace(row, prompt=rows[i - 1].prompt)] for i, row in enumerate(rows)]
    total = torch.zeros(1, dtype=torch.float64)
    for batch, mine in micro_batches(others, args, world):
        action = per_token([row.actions for row in mine], world).float()  # [N]
        total += ((policy(batch) - reference(batch)) * action).sum().double().cpu()
    return max(0.0, sum_over_ranks(total, world).item() / len(rows))


# ------------------------------------------------------------------------------------------------- the loop


def open_tokenizer(args: Args):
    """The tokenizer of --model, with the template that the flags set."""
    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    return set_template(tokenizer, args.chat_template, args.chat_template_args)


def as_published(item: Item, row: dict, ask: str) -> Item:
    """A row with GSM8K's or MATH's columns as the published code asks and answers it: the solution word for word is the
    trace. Any other row as it is."""
    asked = row.get("problem") or row.get("question")
    if row.get("prompt") is not None or not asked or item.question != asked:
        return item
    kind = item.source or "math"
    prompt = [{"role": "system", "content": SYSTEM[kind]}, {"role": "user", "content": asked}]
    if ask == "user":
        prompt = [{"role": "user", "content": f"{asked}\n{IN_A_BOX}"}]
    solution = row.get("answer") if kind == "gsm8k" else row.get("solution")
    return dataclasses.replace(item, prompt=prompt, traces=[Trace(solution)] if item.traces else [], source=kind)


def read_problems(tokenizer, args: Args, *, traces: str = "needed", **options):
    """The examples of all --data, numbered through, and the counts of what was left out."""
    examples, counts, before = [], {}, 0
    options |= dict(traces=traces, long_trace=args.long_response, reshape=partial(as_published, ask=args.ask))
    for source in args.data:
        found, count = read_examples(source, tokenizer, args, split="train", **options)
        examples += [dataclasses.replace(e, index=before + e.index) for e in found]
        before += count["rows"]
        counts = {name: counts.get(name, 0) + n for name, n in count.items()}
    if traces == "needed":
        kept = [e for e in examples if len(e.prompt) + len(e.trace) <= args.max_row_tokens]
        counts |= {"row_too_long": len(examples) - len(kept), "kept": len(kept)}
        examples = kept
    return examples, counts


def check(args: Args) -> None:
    """Raise InputError for settings that cannot work together."""
    for name in ("batch_size", "max_response_tokens", "max_prompt_tokens", "max_row_tokens", "epochs", "samples",
                 "rounds", "width", "max_steps", "pairs_per_question", "beta"):  # fmt: skip
        if getattr(args, name) <= 0:
            raise InputError(f"--{name} must be positive, not {getattr(args, name)}")
    if args.steps < 0:
        raise InputError(f"--steps must be positive, or 0 to follow --epochs, not {args.steps}")
    if args.temperature <= 0 and args.search != "greedy":
        raise InputError(f"--temperature {args.temperature}: answers that shall differ need a positive one")
    if args.balance < 0:
        raise InputError(f"--balance must be positive, or 0 for all answers, not {args.balance}")
    if args.stage == "sft" and args.rows:
        raise InputError("--stage sft trains on the solutions of --data; --rows are for the other stages")
    if args.rounds > 1 and args.reference and args.round_reference == "last":
        raise InputError(f"--reference {args.reference} is not used with --round_reference last: another is init")
    if args.rounds > 1 and (args.rows or args.stage == "sft"):
        raise InputError("--rounds collects rows of its own: it goes with oreo, rejection, dpo, kto and without --rows")
    if args.stage == "search" and not args.eval_data:
        raise InputError("--stage search needs --eval_data")
    if args.stage == "search" and args.search != "greedy" and not args.value:
        raise InputError(f"--search {args.search} needs --value, a value model that --stage oreo wrote")
    if args.model.startswith("runs/") and not Path(args.model).exists():
        raise InputError(f"--model {args.model}: not there; --stage sft makes it, or name another")
    if args.eval_data or not (args.rows or args.stage == "sft"):
        check_verifier(args.verifier)


def load_value(args: Args, policy, world):
    """The value model of --value; to train one, also of --model's body with a head of zeros."""
    value = load_policy(
        args.value or args.model, world, seed=args.seed, gradient_checkpointing=args.gradient_checkpointing,
        kind=ValueModel, new_head=args.stage != "search", lora=args.value_lora,
        trust_remote_code=args.trust_remote_code,
    )
    check_fit(f"--value {args.value}", value, policy)
    return value


def check_fit(which: str, model, policy) -> None:
    """Raise InputError where the models cannot read the same ids."""
    mine, its = model.lm.config.vocab_size, policy.lm.config.vocab_size
    if mine != its:
        raise InputError(f"{which}: a vocabulary of {mine} does not fit --model's of {its}")
    if logit_form(model.lm.config) != logit_form(policy.lm.config):
        raise InputError(f"{which}: its soft cap or scale of logits is not --model's")


def open_sampler(policy, tokenizer, args: Args, world):
    """A sampler with the policy's weights."""
    also_stop = policy.lm.generation_config.eos_token_id or []
    stop_ids = [tokenizer.eos_token_id, *(also_stop if isinstance(also_stop, list) else [also_stop])]
    sampler = make_sampler(
        args.rollout, policy, world, stop_ids=stop_ids, max_batch_tokens=args.sampler_tokens,
        max_tokens=args.max_prompt_tokens + args.max_response_tokens, gpu_memory=args.rollout_gpu_memory,
    )
    sampler.sync(policy, version=0)
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


def write_whole(path: Path, text: str) -> None:
    """The file is as it was or has all of the text, whenever this is killed."""
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def collect(args: Args) -> str:
    """Sample answers to the problems of --data, grade and keep them -> OUT/rows.jsonl, complete or absent.

    Killed and started again, it goes on after the last batch of problems that was written whole."""
    world = init_world(args.timeout_minutes)
    final, partial = Path(args.out) / "rows.jsonl", Path(args.out) / "rows.partial.jsonl"
    names = ("model", "data", "ask", "igsm_problems", "chat_template", "chat_template_args", "verifier",
             "max_prompt_tokens", "max_response_tokens", "samples", "balance", "temperature", "top_p", "batch_size",
             "seed")  # fmt: skip
    tokenizer = open_tokenizer(args)
    examples, left_out = read_problems(tokenizer, args, traces="ignored", progress=world.main)
    digest = data_digest((e.prompt, e.gold) for e in examples)
    settings = json.loads(json.dumps({name: getattr(args, name) for name in names})) | {"data_digest": digest}
    described = Path(args.out) / "collect.json"
    if described.exists():
        before = json.loads(described.read_text())["settings"]
        if changed := changed_settings(before, settings, [name for name in before if name in settings]):
            raise InputError(f"{args.out} holds rows of other settings ({changed}): choose another --out")
        if final.exists():
            return str(final)

    written = partial.read_text().split("\n")[:-1] if partial.exists() else []
    done = max((json.loads(line)["step"] for line in written), default=1) - 1  # the last batch may not be whole
    policy = load_policy(args.model, world, trust_remote_code=args.trust_remote_code)
    sampler = open_sampler(policy, tokenizer, args, world)
    if world.main:
        print(f"{' '.join(args.data)}: {left_out}; {args.samples} answers each; {done} batches are there already")
        final.parent.mkdir(parents=True, exist_ok=True)
        write_whole(described, json.dumps({"settings": settings}) + "\n")
        write_whole(partial, "".join(line + "\n" for line in written if json.loads(line)["step"] <= done))

    for step in range(done + 1, math.ceil(len(examples) / args.batch_size) + 1):
        batch = examples[(step - 1) * args.batch_size : step * args.batch_size]
        mine = batch[world.rank :: world.size]

        # 1. sample
        groups = sampler.generate(
            [e.prompt for e in mine], n=args.samples, keys=[e.index for e in mine], seed=args.seed,
            sampling=Sampling(args.max_response_tokens, args.temperature, args.top_p),
            progress=f"collect, batch {step}" if world.main else None,
        )

        # 2. reward
        said = [tokenizer.decode(c.said) for group in groups for c in group]
        asked = [e for e in mine for _ in range(args.samples)]
        verdicts = grade(said, [e.gold for e in asked], verifier=args.verifier)
        report_golds(asked, verdicts)
        verdicts, rows = iter(verdicts), []
        for e, group in zip(mine, groups, strict=True):
            judged = [next(verdicts) for _ in group]
            rows += [
                {"step": step, "question": e.index, "source": e.source, "gold": e.gold, "prompt": e.text,
                 "response": tokenizer.decode(group[i].ids), "reward": judged[i].reward, "status": judged[i].status,
                 "detail": judged[i].detail, "truncated": group[i].truncated,
                 "prompt_ids": e.prompt, "response_ids": group[i].ids}
                for i in balanced([v.reward for v in judged], args.balance)
            ]  # fmt: skip
        rows = sorted(gather_lists(rows, world), key=lambda row: row["question"])
        if world.main:
            with open(partial, "a") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    sampler.close()
    if world.main:
        rows = [json.loads(line) for line in partial.read_text().split("\n") if line]
        by_question: dict[int, list[float]] = {}
        for row in rows:
            by_question.setdefault(row["question"], []).append(row["reward"])
        statuses = [row["status"] for row in rows]
        about = {
            "questions": len(by_question), "sampled": len(examples) * args.samples, "rows": len(rows),
            "right": sum(row["reward"] > 0 for row in rows),
            "all_right": sum(min(r) > 0 for r in by_question.values()),
            "all_wrong": sum(max(r) <= 0 for r in by_question.values()),
            "truncated": sum(row["truncated"] for row in rows),
            "verifier": {status: statuses.count(status) for status in sorted(set(statuses))},
        }
        write_whole(described, json.dumps({"settings": settings} | about, indent=2) + "\n")
        print(f"{final}: {about}")
        os.replace(partial, final)
    gather_lists([], world)  # nobody reads the file before it is there
    return str(final)


def train(args: Args) -> None:
    """sft, oreo, rejection, dpo or kto: model/ (and oreo's value/) in the run folder."""
    world = init_world(args.timeout_minutes)
    out = Path(args.out)
    checkpoints = Checkpoints(out / "checkpoint", args, keep=args.keep)
    state = checkpoints.state()
    start = state["step"] if state else 0

    tokenizer = open_tokenizer(args)
    units, left_out = training_units(tokenizer, args, world.main)
    held_out = held_out_examples(tokenizer, args, reshape=partial(as_published, ask=args.ask))
    digest = data_digest(
        ((row.prompt, row.response, row.actions, row.reward) for unit in units for row in unit),
        ((e.prompt, e.gold) for e in held_out),
    )
    checkpoints.check_data(state, digest, f"--rows {args.rows}" if args.rows else f"--data {' '.join(args.data)}")
    source = args.rows or " ".join(args.data)
    if len(units) < args.batch_size:
        raise InputError(f"{source}: {len(units)} to train on are fewer than --batch_size {args.batch_size}")
    steps = args.steps or max(1, int(args.epochs * len(units) / args.batch_size))
    if world.main:
        print(f"{source}: {left_out}; {len(held_out)} held-out; {steps} steps of {args.batch_size}")

    policy = load_policy(
        args.model, world, seed=args.seed, gradient_checkpointing=args.gradient_checkpointing, lora=args.policy_lora,
        trust_remote_code=args.trust_remote_code,
    )
    longest = max(len(row.prompt) + len(row.response) for unit in units for row in unit)
    if (positions := max_positions(policy.lm.config)) and longest > positions:
        raise InputError(
            f"{source}: a row has {longest} tokens, --model {positions} positions: lower "
            "--max_response_tokens"
        )
    optimizer = make_optimizer(policy, lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
    value = load_value(args, policy, world) if args.stage == "oreo" else None
    value_optimizer = value and make_optimizer(
        value, lr=args.value_lr, betas=args.betas, weight_decay=args.weight_decay
    )
    reference = None
    if args.stage in ("oreo", "dpo", "kto"):
        reference = load_policy(args.reference or args.model, world, trust_remote_code=args.trust_remote_code)
        check_fit(f"--reference {args.reference}", reference.requires_grad_(False), policy)
    more = {"value": (value, value_optimizer)} if value else {}
    if state:
        checkpoints.load(policy, optimizer, more)
    elif args.save_every:
        checkpoints.check_space(policy, more)
    sampler = open_sampler(policy, tokenizer, args, world) if held_out and args.eval_every else None

    curves = [["eval/mean"], ["loss/policy"], ["loss/value"], ["value/right", "value/wrong"], ["policy/kl"],
              ["log_ratio/right", "log_ratio/wrong"], ["optim/grad_norm", "optim/value_grad_norm"]]  # fmt: skip
    bad_batches, models = BadBatches(out, world, skip=args.skip_bad_updates), {"policy": policy}
    models |= {name: model for name, model in (("value", value), ("reference", reference)) if model}
    metrics = Metrics(out, args, world, start=start, steps=steps, curves=curves)
    if start == 0 and sampler:
        metrics.log(0, evaluate(sampler, tokenizer, held_out, args, world), show=["eval/mean"])
    clock = Clock(args.profile, out)

    for step in range(start + 1, steps + 1):
        batch = [units[i] for i in batch_indices(len(units), args.batch_size, step - 1, args.seed)]
        rows = [row for unit in batch for row in unit]
        evaluates = sampler and (step % args.eval_every == 0 or step == steps)

        # 1. sample, 2. reward: offline, collect has done both; 3. advantages: the residuals, in the loss

        # 4. update
        with clock("update"):
            if sampler:
                sampler.sleep()  # its memory is the trainer's until the sync
            schedule = dict(steps=steps, schedule=args.schedule, warmup=args.warmup, floor=args.lr_floor)
            row_log = {}
            with bad_batches(step, models, partial(sample_rows, rows, tokenizer)):
                log = accumulate_gradient(policy, value, reference, batch, args, world) | describe(rows, args)
                check_finite(log, policy, world)
                if value:
                    gradient_norm(policy)  # raises before one of the two has taken its step
                    log["optim/value_grad_norm"] = optimizer_step(
                        value, value_optimizer, lr=learning_rate(step - 1, lr=args.value_lr, **schedule),
                        max_grad_norm=args.max_grad_norm,
                    )  # fmt: skip
                lr = learning_rate(step - 1, lr=args.lr, **schedule)
                norm = optimizer_step(policy, optimizer, lr=lr, max_grad_norm=args.max_grad_norm)
                row_log = log | {"optim/grad_norm": norm, "optim/lr": lr}

        # 5. sync
        with clock("sync"):
            if evaluates:
                sampler.sync(policy, version=step)

        # 6. log, evaluate, save
        if evaluates:
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
            show=["eval/mean", "loss/policy", "value/right", "value/wrong", "policy/kl"],
        )
        shown = random.Random(step).sample(rows, min(args.log_samples, len(rows)))
        metrics.samples(step, sample_rows(shown, tokenizer))
        if args.save_every and (step % args.save_every == 0 or step == steps):
            checkpoints.save(step, policy, optimizer, world, more)
    checkpoints.wait()
    if value:
        export(value, tokenizer, out / "value", world)
    export(policy, tokenizer, out / "model", world)  # last: it says that the run is complete
    if sampler:
        sampler.close()
    metrics.close()


def describe(rows: list[Row], args: Args) -> dict[str, float]:
    """What a practitioner looks at in the rows of a step."""

    def mean(values) -> float | None:
        values = list(values)
        return sum(values) / len(values) if values else None

    right, wrong = [r for r in rows if r.reward > 0], [r for r in rows if r.reward <= 0]
    log = {"policy/logp": mean(r.logp / sum(r.actions) for r in rows), "length": mean(len(r.response) for r in rows)}
    if args.stage in ("oreo", "dpo", "kto"):
        log["log_ratio/right"], log["log_ratio/wrong"] = (mean(r.log_ratio for r in side) for side in (right, wrong))
    if args.stage == "oreo":
        log |= {
            "policy/kl": mean(r.kl for r in rows), "value/first": mean(r.values[0] for r in rows if r.values),
            "value/right": mean(r.last_value for r in right), "value/wrong": mean(r.last_value for r in wrong),
        }
    return log


def sample_rows(rows: list[Row], tokenizer) -> list[dict]:
    """Rows as text, for samples.jsonl: their steps, and the value of the state before each."""
    found = []
    for row in rows:
        starts = [i for i, start in enumerate(row.steps) if start]
        steps = [tokenizer.decode(row.response[i:j]) for i, j in zip(starts, [*starts[1:], None], strict=True)]
        found.append({
            "row": row.index, "reward": row.reward, "log_ratio": row.log_ratio, "prompt": tokenizer.decode(row.prompt),
            "steps": steps, "values": [round(v, 4) for v in row.values],
        })
    return found


def iterate(args: Args) -> None:
    """--rounds times: collect with the policy so far, train on what it wrote. Rounds that are there are not redone."""
    last = args
    for number in range(1, args.rounds + 1):
        out = Path(args.out) / f"round-{number}"
        setting = dataclasses.replace(args, out=str(out), rounds=1, seed=args.seed + 1000 * number)
        init = last if args.round_init == "last" else args
        reference = last.model if args.round_reference == "last" else args.reference or args.model
        learner = dataclasses.replace(setting, model=init.model, value=init.value, reference=reference)
        if not (out / "model").exists():
            rows = collect(dataclasses.replace(setting, model=last.model))
            train(dataclasses.replace(learner, rows=rows))
        else:
            there, here = json.loads((out / "args.json").read_text()), json.loads(json.dumps(vars(learner)))
            free = Checkpoints.FREE | {"rows"} | ({"model", "value", "reference"} if number > 1 else set())
            if changed := changed_settings(there, here, [name for name in here if name not in free]):
                raise InputError(f"{out} was made with other settings ({changed}): choose another --out")
        value = str(out / "value") if args.stage == "oreo" else ""
        last = dataclasses.replace(setting, model=str(out / "model"), value=value)
    if init_world().main:
        rounds = {f"round {n}": Path(args.out) / f"round-{n}" for n in range(1, args.rounds + 1)}
        plot_curves(rounds, [["eval/mean"], ["policy/kl"], ["loss/policy"]], Path(args.out) / "curves.png")


def find_answers(policy, value, tokenizer, examples, args: Args, world) -> list[list[Candidate]]:
    """The answers that --search finds to each example, [examples][answers]; the best has the highest value."""
    full = args.max_response_tokens
    # a state is a prompt with a response so far
    sampler = open_sampler(
        policy, tokenizer, dataclasses.replace(args, max_prompt_tokens=args.max_prompt_tokens + full), world
    )
    found = search_answers(
        args.search, sampler, value, [e.prompt for e in examples], [e.index for e in examples], world,
        width=args.width, max_steps=args.max_steps, max_tokens=full, temperature=args.temperature, top_p=args.top_p,
        step_ends=step_ids(tokenizer, args.step_delimiters), micro_batch_tokens=args.micro_batch_tokens, seed=args.seed,
    )
    sampler.close()
    return found


def search(args: Args) -> dict:
    """Answer the problems of --eval_data by --search; writes OUT/search-NAME.json and the answers beside it."""
    world = init_world(args.timeout_minutes)
    tokenizer = open_tokenizer(args)
    examples = held_out_examples(tokenizer, args, reshape=partial(as_published, ask=args.ask))
    policy = load_policy(args.model, world, trust_remote_code=args.trust_remote_code)
    value = None if args.search == "greedy" else load_value(args, policy, world)
    found = find_answers(policy, value, tokenizer, examples, args, world)
    best = [max(answers, key=lambda c: c.value, default=None) for answers in found]
    texts = [tokenizer.decode(c.response).removesuffix(tokenizer.eos_token) if c else "" for c in best]
    verdicts = grade(texts, [e.gold for e in examples], verifier=args.verifier)
    rewards: dict[str, list[float]] = {}
    for e, verdict in zip(examples, verdicts, strict=True):
        rewards.setdefault(e.source, []).append(verdict.reward)
    result = {f"eval/{source}": sum(r) / len(r) for source, r in rewards.items()}
    result |= {
        "eval/mean": sum(result.values()) / len(result), "search": args.search, "width": args.width,
        "questions": len(examples), "no_answer": best.count(None),
        "answers": sum(len(answers) for answers in found) / len(examples),
        "model": args.model, "value": args.value, "seed": args.seed,
    }
    if world.main:
        name = args.search + ("" if args.search == "greedy" else f"-{args.width}")
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        with open(out / f"search-{name}.jsonl", "w") as file:
            for e, answers, c, v in zip(examples, found, best, verdicts, strict=True):
                row = {"prompt": e.text, "gold": e.gold, "response": tokenizer.decode(c.response) if c else None,
                       "reward": v.reward, "status": v.status, "values": [round(a.value, 4) for a in answers]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        (out / f"search-{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"{name}: {result}")
    return result


def main(args: Args) -> None:
    check(args)
    if args.stage == "search":
        search(args)
    elif args.stage == "collect":
        collect(args)
    else:
        args = dataclasses.replace(args, stage="oreo") if args.stage == "iterate" else args
        if args.rounds > 1:
            iterate(args)
        else:
            needs_rows = args.stage != "sft" and not args.rows
            train(dataclasses.replace(args, rows=collect(args)) if needs_rows else args)


if __name__ == "__main__":
    args = parse_args(Args, None, stage=STAGES, variant=VARIANTS, preset=PRESETS)
    launch(main, args)
