r"""Evaluate a model on benchmark files, and compare evaluations.

    python eval.py --model PATH --data FILE ... --out DIR       sample, grade, count: results.json, a table, a plot
    torchrun --nproc_per_node 8 eval.py ...                     the same on eight GPUs
    python eval.py --model PATH --data FILE ... --dry_run       the first prompts, as text and as ids
    python eval.py --compare DIR_A DIR_B ... --out DIR          side by side: tables, intervals, a page of samples

A *question* is what is asked, once. Benchmark files repeat rows to get several answers to a question (30 questions
x 32 rows of AIME, for "avg@32"): such rows are one question here. Each question gets --n answers, or one for each
of its rows where those are more; greedy decoding gets one. With m_q the share of right answers to question q,
n_q answers, c_q of them right, and Q questions:

    pass@1              mean of m_q; for equal n_q this is the mean over all answers (avg@n)
    pass@k              mean of 1 - C(n_q - c_q, k) / C(n_q, k): is one of k answers right? (Chen et al., 2021)
    maj@k               is the commonest of k answers right? Exact expectation over all k-subsets; ties share
    pass@1_se           sqrt(var(m_q) / Q): how pass@1 varies from one set of such questions to the next
    pass@1_se_sampling  sqrt(sum of var_q / n_q) / Q: how it varies from one run to the next on these questions
    average             mean of the benchmarks' pass@1, each counted once whatever its size

Answers are written to --out as they come. A run that is killed goes on where it was when the same command is given
again, with the same result: every answer has a random stream of its own, and batches are the same ones again.

What differs from the published evaluations, and why (docs/eval.md has each paper's protocol and command):
- All print one number a benchmark; none gives its error, truncated answers or answers without a verdict.
- LUFFY's and ReLIFT's scripts mix up data sources for n > 1. Here the files' repeats and --n do the same thing.
- The papers grade differently (strict box, whole text, after </think>), and the graders differ by many points on
  one and the same text: --verifier takes several, and results.md says where they disagree.
- The final stop token is taken off a text before it is graded; every other special token stays.
"""

import base64
import csv
import dataclasses
import functools
import hashlib
import html
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import string
import textwrap
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from statistics import fmean as mean
from statistics import variance
from typing import Annotated, Literal

import numpy as np
import torch.distributed as dist
import tyro
from tqdm import tqdm
from transformers import AutoConfig

from common.data import InputError, check_verifier
from common.rollout import EmbeddedSampler, Sampling, make_sampler
from common.rows import IN_A_BOX, check_gold, load_rows, read_row, render_prompt, set_template
from common.search import search_answers, step_ids
from common.trainer import ValueModel, gather_lists, init_world, launch, load_policy, load_tokenizer, parse_args
from common.verifiers import after_think, grade, last_boxed


@dataclass
class Args:
    model: str = ""
    """Model folder or Hub name."""
    data: tuple[str, ...] = ()
    """Benchmark files, folders, Hub names (their test split) or igsm:LO-HI, in any shape of row of README's table."""
    out: str = "runs/eval"
    """Folder for samples.jsonl, results.json, results.md and results.png."""

    # how to ask
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 8
    """Answers to each question; a question that its file repeats more often gets an answer for each of its rows.
    (Under torchrun write -n: it takes --n for an abbreviation of a flag of its own.)"""
    temperature: float = 0.6
    """Sampling temperature (LUFFY, ReLIFT, REDI: 0.6); 0 is greedy: one answer a question."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this much probability (LUFFY, ReLIFT: 1; REDI: 0.95)."""
    max_tokens: int = 8192
    """Tokens of an answer at most (LUFFY, ReLIFT: 8192)."""
    template: str = "own"
    """How a question becomes a prompt: own (the tokenizer's chat template), qwen, simplerl, prime, prime_sft,
    prime_code, no, oreo-gsm8k, oreo-math, oreo-deepseek, redi, or a file: a Jinja chat template, or plain text with
    {question}."""
    chat_template_args: tuple[str, ...] = ()
    """Settings of the switches of the tokenizer's chat template, key=value, as in enable_thinking=false."""
    system: bool = True
    """Keep the system turns of the rows under "own" and Jinja files (LUFFY's and ReLIFT's evaluations drop them)."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end an answer besides the model's own, as in <|im_end|> for a base model that is asked in ChatML."""
    seed: int = 0
    """Seed of the sampling."""
    search: Literal["none", "beam", "best_of_n", "best_of_k"] = "none"
    """Let a value model (--value; oreo.py trains one) choose: one answer a question. beam: --width states, as many next
    steps of each, the best go on. best_of_n: --width answers. best_of_k: --width next steps of one state."""
    value: str = ""
    """The value model of --search."""
    width: int = 5
    """See --search (OREO: 3, 5, 7)."""
    max_steps: int = 20
    """Steps of beam and best_of_k at most (OREO: 20); a question without an answer by then is answered by nothing."""
    step_delimiters: tuple[str, ...] = ("\n",)
    """A step ends with a token that holds one of these."""
    limit: int = 0
    """Questions of each benchmark at most, the first ones; 0 for all (igsm:LO-HI: 1000)."""
    dry_run: bool = False
    """Print the first prompts of each benchmark with their ids, and stop."""

    # how to grade
    verifier: tuple[str, ...] = ("strict_box", "math", "full")
    """Graders (common/verifiers.py): strict_box (as LUFFY's evaluation), math (the training reward: what follows
    </think>), full (whole text), mcq, exact, boxed, or "module:function", which must say 0 or 1 and is asked anew each
    time. The first one's verdicts make the numbers."""
    regrade: bool = False
    """Grade the answers in --out again by --verifier, and sample nothing. Needs neither --model nor --data."""
    buckets: str = ""
    """Folder of the base model's evaluation: accuracy by how often the base was right."""

    # how to compare
    compare: tuple[str, ...] = ()
    """Folders of evaluations: compare them (the first is what the others are measured against)."""
    page_questions: int = 200
    """Questions on the page of samples at most: those on which the runs differ most."""

    # machinery
    rollout: str = "auto"
    """Where answers are sampled. embedded: in this process. vllm: by a vLLM process beside each rank, which the script
    starts (docs/rollout.md). auto: vllm on CUDA, embedded on a CPU."""
    sampler_tokens: int = 0
    """Rows x (prompt + response) tokens that the embedded sampler decodes at once, and that are written at once (at
    least one question with all its answers); 0: 65,536 on a CPU, 524,288 on CUDA (30 GB for a Qwen2.5 of 7B)."""
    write_every: int = 2048
    """Answers that vLLM is given at once, and that are written at once."""


SAMPLER_TOKENS = {"cpu": 65536, "cuda": 524288}  # of --sampler_tokens 0
DIGEST_PART = 2**24  # bytes
FREE = {"out", "verifier", "regrade", "buckets", "rollout", "dry_run", "compare", "page_questions"}  # may change
BY_DIGEST = {"model", "value", "data"}  # names may change: digests of the contents are compared

# Text is the whole prompt; turns go through the tokenizer's chat template.
QWEN = (
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
)
PRIME = "{question}\n\nPresent the answer in LaTex format: \\boxed{Your answer}"
ASSISTANT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
    "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. The "
    "reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: {task}. Assistant:"
)
REDI = (
    "Solve the following math problem efficiently and clearly.  The last line of your response should be of the "
    "following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without quotes) "
    "where ANSWER is just the final number or expression that solves the problem. Think step by step before "
    "answering.\n\n{question}"
)
TEMPLATES = {
    "no": "{question}",
    "qwen": QWEN.replace("{system}", IN_A_BOX),
    "simplerl": QWEN.replace("{system}", "You are a helpful assistant.").replace(
        # the doubled braces are the published script's
        "{question}", "{question}\nPlease reason step by step, and put your final answer within\\boxed{{}}."
    ),
    "prime": ASSISTANT.replace("{task}", PRIME),
    "prime_sft": [("user", PRIME)],
    "prime_code": ASSISTANT.replace("{task}", "{question}\n\nWrite Python code to solve the problem. Present the code "
    "in \n```python\nYour code\n```\nat the end."),
    "oreo-gsm8k": [
        ("system", "Please reason step by step, and produce a final answer following 4 '#', like '#### 0'"),
        ("user", "{question}"),
    ],
    "oreo-math": [("system", IN_A_BOX), ("user", "{question}")],
    "oreo-deepseek": f"User: {{question}}\n{IN_A_BOX}\n\nAssistant:",  # text: the tokenizer's bos is put before it
    # no newline between "assistant" and "<think>", as in the published evaluation
    "redi": QWEN.replace("{system}", IN_A_BOX).replace("{question}", REDI).removesuffix("\n") + "<think>\n",
}


# ------------------------------------------------------------------------------------------ the mathematics


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k of n answers, drawn without replacement, hold a right one: 1 - C(n - c, k) / C(n, k).

    Unbiased for the chance that k fresh answers hold one. 1 <= k <= n.

    >>> pass_at_k(n=4, right=1, k=2)
    0.5
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority_at_k(right: int, wrong: list[int], blank: int, k: int) -> float:
    """Probability that the commonest of k answers, drawn without replacement, is the right one; ties share.

    right: answers that are right; wrong: how often each wrong answer was given; blank: answers that give none, and
    do not vote. For j votes for the right answer, the other k - j draws may give no wrong one more than j:

        sum_j C(right, j) * [x^(k-j)] (1 + x)^blank * prod_w sum_{i <= j} C(w, i) x^i / (1 + ties) / C(n, k)

    >>> majority_at_k(right=2, wrong=[1], blank=0, k=3), majority_at_k(right=1, wrong=[1, 1], blank=0, k=2)
    (1.0, 0.3333333333333333)
    """
    total = Fraction(0)
    for j in range(1, min(right, k) + 1):
        free = blank + sum(w for w in wrong if w < j)  # these cannot reach j: however many of them are drawn
        ways = {0: [math.comb(free, d) for d in range(k - j + 1)]}  # by number of ties: coefficients of x^d
        for w in (w for w in wrong if w >= j):
            more: dict[int, list[int]] = {}
            for ties, poly in ways.items():
                for i in range(min(j, k - j) + 1):
                    out = more.setdefault(ties + (i == j), [0] * (k - j + 1))
                    for d in range(k - j + 1 - i):
                        out[d + i] += math.comb(w, i) * poly[d]
            ways = more
        total += math.comb(right, j) * sum(Fraction(poly[k - j], 1 + ties) for ties, poly in ways.items())
    return float(total / math.comb(right + sum(wrong) + blank, k))


def mean_and_errors(rewards: list[list[float]]) -> tuple[float, float | None, float | None]:
    """Mean over questions of their mean rewards, and its two standard errors (see the top of this file).

    rewards: a list for each question, one reward an answer. The squares of both errors are unbiased. None where
    they are not known: one question; a question with one answer."""
    means = [mean(r) for r in rewards]  # [Q]
    error = sampling_error = None
    if len(means) > 1:
        error = math.sqrt(variance(means) / len(means))
    if min(map(len, rewards)) > 1:
        sampling_error = math.sqrt(sum(variance(r) / len(r) for r in rewards)) / len(means)
    return mean(means), error, sampling_error


def bootstrap_interval(differences: list[np.ndarray], *, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over benchmarks of their mean difference, by resampling questions.

    differences: for each benchmark [Q], run B's share of right answers minus run A's. Questions are drawn anew within
    each benchmark, the same ones for both runs (a paired bootstrap), so that what makes a question hard for both
    cancels. A question's answers are not resampled: the scatter of the shares holds their noise already."""
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)
    for values in differences:
        for start in range(0, draws, 500):  # [500, Q] indices at a time
            drawn = rng.integers(len(values), size=(min(500, draws - start), len(values)))
            means[start : start + 500] += values[drawn].mean(1) / len(differences)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def difficulty(base_rate: float) -> str:
    """ReLIFT's buckets by the base's share of right answers: of 8, easy has 6 or more, medium 3, hard 1."""
    return "easy" if base_rate >= 6 / 8 else "medium" if base_rate >= 3 / 8 else "hard" if base_rate > 0 else "hardest"


# ---------------------------------------------------------------------------------------------------- questions


@dataclass
class Question:
    id: str  # digest of benchmark, turns and gold: the same in every run that asks it
    benchmark: str
    text: str  # the question alone
    turns: list[dict]  # as its row asks it: what "own" renders
    gold: str
    where: str  # file and row, for messages
    rows: int = 1  # how often the files have it
    n: int = 1  # answers to draw
    prompt_text: str = ""
    prompt: list[int] = field(default_factory=list)


def read_questions(sources: Iterable[str], *, limit: int = 0) -> list[Question]:
    """The distinct questions of benchmark files, in order; equal rows are counted in `rows`.

    A benchmark is named by its rows' data_source, else by its file. limit: questions of each benchmark at most.
    Raises InputError naming file, row and columns."""
    read, owners = [], {}  # benchmark names, and the sources that have them
    for source in dict.fromkeys(sources):
        for index, row in enumerate(load_rows(source, split="test", problems=limit or 1000)):
            where = f"{source}, row {index}"
            item = read_row(row, where)
            check_gold(item, row, where)
            benchmark = item.source or Path(source).stem
            read.append((benchmark, source, where, item))
            owners.setdefault(benchmark, {None} if benchmark == "average" else set()).add(source)
    questions: dict[str, Question] = {}
    for benchmark, source, where, item in read:
        # the same name in two files is two benchmarks; "average" is a key of results.json
        benchmark = f"{benchmark} ({source})" if len(owners[benchmark]) > 1 else benchmark
        key = hashlib.sha256(json.dumps([benchmark, item.prompt, item.gold]).encode()).hexdigest()[:16]
        if key in questions:
            questions[key].rows += 1
        else:
            questions[key] = Question(key, benchmark, item.question, item.prompt, item.gold, where)
    kept, seen = [], Counter()
    for question in questions.values():
        seen[question.benchmark] += 1
        if not limit or seen[question.benchmark] <= limit:
            kept.append(question)
    return kept


def make_prompts(questions: list[Question], tokenizer, args: Args) -> None:
    """Render and tokenize every question by --template, and set how many answers it gets."""
    known = ", ".join(["own", *TEMPLATES])
    template, jinja = TEMPLATES.get(args.template), None
    if args.template not in ("own", *TEMPLATES):
        if not Path(args.template).is_file():
            raise InputError(f"--template {args.template}: no such file, and not one of {known}")
        template = Path(args.template).read_text()
        if "{question}" not in template:
            template, jinja = None, template
            if "messages" not in jinja:
                raise InputError(f"--template {args.template}: neither {{question}} nor messages occurs in it")
    plain = isinstance(template, str)
    if not plain and not jinja and not tokenizer.chat_template:
        raise InputError(
            f"--template {args.template}: the model's tokenizer has no chat template; pass a file with one, or "
            + ", ".join(name for name, text in TEMPLATES.items() if isinstance(text, str))
        )
    for question in questions:
        if plain:
            question.prompt_text = template.replace("{question}", question.text)
        else:
            turns = [t for t in question.turns if args.system or t["role"] != "system"]
            if template:
                turns = [{"role": r, "content": text.replace("{question}", question.text)} for r, text in template]
            try:
                question.prompt_text = render_prompt(tokenizer, turns, jinja)
            except InputError as error:
                system = any(turn["role"] == "system" for turn in turns)
                remedy = "; --no_system leaves the system turns out" if system else ""
                raise InputError(f"{question.where}: {error}{remedy}") from error
        question.n = max(args.n, question.rows) if args.temperature > 0 and args.search == "none" else 1
    # a chat template writes the bos token itself; plain text gets the tokens that the tokenizer puts around text
    encoded = tokenizer([q.prompt_text for q in questions], add_special_tokens=plain)["input_ids"]
    for question, ids in zip(questions, encoded, strict=True):
        question.prompt = ids
        if not ids:
            raise InputError(f"{question.where}: its prompt has no tokens under --template {args.template}")


# -------------------------------------------------------------------------------------------------- the samples


def digest_of(model: str) -> str:
    """Digest of a model: of all bytes of its weights and of its configuration; a Hub name's is its revision."""
    folder = Path(model)
    if not folder.is_dir():
        return getattr(AutoConfig.from_pretrained(model), "_commit_hash", None) or model
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".json", ".jinja"))
    parts = [(path, start) for path in files for start in range(0, path.stat().st_size, DIGEST_PART)]

    def digest(part: tuple[Path, int]) -> bytes:
        with open(part[0], "rb") as file:
            file.seek(part[1])
            return hashlib.sha256(file.read(DIGEST_PART)).digest()

    whole = hashlib.sha256()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # sha256 runs without Python's lock
        for (path, _), found in zip(parts, pool.map(digest, parts), strict=True):
            whole.update(path.name.encode() + found)
    return whole.hexdigest()[:16]


def fingerprint(args: Args, questions: list[Question]) -> dict:
    """Digests of the models and of all prompts, to notice when one of them changed."""
    asked = json.dumps([[q.id, q.prompt, q.n] for q in questions])
    return {
        "weights_digest": " ".join(digest_of(model) for model in (args.model, args.value) if model),
        "questions": len(questions),
        "questions_digest": hashlib.sha256(asked.encode()).hexdigest()[:16],
    }


def check_settings(args: Args, questions: list[Question], world) -> None:
    """Write args.json, or check that answers in --out were drawn with these settings; InputError if not."""
    path = Path(args.out) / "args.json"
    if path.exists() and "questions_digest" not in json.loads(path.read_text()):
        raise InputError(f"--out {args.out} is the folder of something else than an evaluation: name another")
    [found] = gather_lists([fingerprint(args, questions)] if world.main else [], world)
    settings = json.loads(json.dumps(dataclasses.asdict(args) | found))
    old = json.loads(path.read_text()) if read_records(path.parent) else settings
    changed = [k for k in settings if k not in FREE | BY_DIGEST and settings[k] != old.get(k, settings[k])]
    if changed:
        raise InputError(
            f"--out {args.out} holds an evaluation with other settings ("
            + "; ".join(f"{k} {old.get(k)!r} there, {settings[k]!r} here" for k in changed)
            + "): use the same ones to go on, or another --out"
        )
    dist.barrier()  # all have compared before one writes
    if world.main:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(partial, path)


def read_records(out: Path) -> dict[str, dict]:
    """Complete records of samples.jsonl and of what a killed run left in samples.part-*.jsonl, by question."""
    records = {}
    for path in [*sorted(out.glob("samples.part-*.jsonl")), out / "samples.jsonl"]:
        if path.exists():
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # the last one may be cut short
                record = json.loads(line)
                records[record["id"]] = record
    return records


def write_records(out: Path, ids: Iterable[str], records: dict[str, dict]) -> None:
    """samples.jsonl, one question a line with all its answers; then the parts are not needed."""
    lines = [json.dumps(records[i]) + "\n" for i in ids if i in records]
    write_whole(out / "samples.jsonl", "".join(lines))
    for path in out.glob("samples.part-*.jsonl"):
        path.unlink()


def merge(out: Path, questions: list[Question], world) -> dict[str, dict]:
    """Rank 0 puts what all ranks have written into samples.jsonl; -> its records by question, on every rank."""
    dist.barrier()  # all have written
    if world.main:
        write_records(out, [q.id for q in questions], read_records(out))
    dist.barrier()
    records = read_records(out)
    dist.barrier()  # all have read before one appends
    return records


def chunks(questions: list[Question], args: Args, *, embedded: bool) -> list[list[Question]]:
    """Questions that are sampled and written together. They depend on the settings alone, not on ranks or on what
    is done already: batches of other shapes round differently, and a draw could tip."""
    result: list[list[Question]] = []
    answers = width = 0
    each = 1 if args.search == "none" else args.width**2  # drawn at once for one of a question's answers
    for question in questions:
        answers += question.n * each
        width = max(width, len(question.prompt) + args.max_tokens)
        full = answers * width > args.sampler_tokens if embedded else answers > args.write_every
        if not result or full:
            result.append([])
            answers, width = question.n * each, len(question.prompt) + args.max_tokens
        result[-1].append(question)
    return result


def sample(questions: list[Question], tokenizer, args: Args, world, done: dict[str, dict]) -> None:
    """Draw what is not done yet; every rank appends its chunks to a file of its own as they come."""
    if all(q.id in done for q in questions):
        return
    policy = load_policy(args.model, world)
    longest = max(len(q.prompt) for q in questions) + tokens_ahead(args)
    if args.search != "none":
        value = load_policy(args.value, world, kind=ValueModel)
        ends = step_ids(tokenizer, args.step_delimiters)
        if value.lm.config.vocab_size != policy.lm.config.vocab_size:
            raise InputError(f"--value {args.value}: its vocabulary is not --model's")
    sampler = make_sampler(
        args.rollout, policy, world, stop_ids=stop_ids(policy, tokenizer, args), max_tokens=longest,
        max_batch_tokens=args.sampler_tokens,
    )
    sampler.sync(policy, version=0)
    del policy
    embedded = isinstance(sampler, EmbeddedSampler)
    todo = [c for c in chunks(questions, args, embedded=embedded) if not all(q.id in done for q in c)]
    mine = todo[world.rank :: world.size] if args.search == "none" else todo  # all ranks search together
    if args.search == "none":
        mine += [[]] * (-(-len(todo) // world.size) - len(mine))  # as many calls on every rank
    answers = sum(q.n for chunk in mine for q in chunk)
    with (
        open(Path(args.out) / f"samples.part-{world.rank}.jsonl", "a", encoding="utf-8") as file,
        tqdm(total=answers, desc=args.model, unit="answer", disable=not world.main, smoothing=0.1) as bar,
    ):
        for chunk in mine:
            prompts, keys = [q.prompt for q in chunk], [int(q.id[:8], 16) for q in chunk]
            if args.search == "none":
                groups = sampler.generate(
                    prompts, n=[q.n for q in chunk], keys=keys, seed=args.seed,
                    sampling=Sampling(args.max_tokens, args.temperature, args.top_p),
                    progress="batch" if world.main else None,
                )
                lines = [
                    make_record(q, [make_answer(c.ids, c.truncated, tokenizer) for c in g])
                    for q, g in zip(chunk, groups, strict=True)
                ]
            else:
                found = search_answers(
                    args.search, sampler, value, prompts, keys, world, width=args.width, max_steps=args.max_steps,
                    max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, step_ends=ends,
                    micro_batch_tokens=max(longest, args.sampler_tokens // 4), seed=args.seed,
                )
                best = [best_answer(candidates, sampler, tokenizer) for candidates in found]
                lines = [make_record(q, [one]) for q, one in zip(chunk, best, strict=True)]
            if args.search == "none" or world.main:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
                file.flush()
            bar.update(sum(q.n for q in chunk))
    sampler.close()


def stop_ids(policy, tokenizer, args: Args) -> list[int]:
    """Ids that end an answer: the tokenizer's eos, the generation config's, and --stop_tokens."""
    also = policy.lm.generation_config.eos_token_id or []
    stop = [tokenizer.eos_token_id, *(also if isinstance(also, list) else [also])]
    for token in args.stop_tokens:
        if token not in tokenizer.get_vocab():
            raise InputError(f"--stop_tokens {token}: not a token of {args.model}")
        stop.append(tokenizer.convert_tokens_to_ids(token))
    return stop


def make_answer(ids: list[int], truncated: bool, tokenizer) -> dict:
    """An answer of a line of samples.jsonl."""
    text = tokenizer.decode(ids if truncated else ids[:-1])  # without the token that ended it
    return {"text": text, "tokens": len(ids), "truncated": truncated}


def best_answer(found, sampler, tokenizer) -> dict:
    """Of the answers that a search found the one of the highest value; an empty one where it found none."""
    if not found:
        return {"text": "", "tokens": 0, "truncated": True, "found": 0}
    best = max(found, key=lambda candidate: candidate.value)
    ended = best.response[-1] in set(map(int, sampler.stop_ids))
    return make_answer(best.response, not ended, tokenizer) | {"found": len(found), "value": round(best.value, 6)}


def make_record(question: Question, answers: list[dict]) -> dict:
    """A line of samples.jsonl: a question and its answers."""
    return {
        "id": question.id, "benchmark": question.benchmark, "rows": question.rows, "question": question.text,
        "gold": question.gold, "row": question.where, "prompt": question.prompt_text, "answers": answers,
    }


def grader_version(verifier: str) -> str:
    """What a grader's verdicts depend on: a digest of its code, and the version of Math-Verify."""
    module = verifier.partition(":")[0] if ":" in verifier else "common.verifiers"
    file = Path(importlib.util.find_spec(module).origin)
    files = [file] if ":" in verifier else [file, *file.parent.glob("robust.py")]
    code = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:8]
    return f"code {code}, math-verify {importlib.metadata.version('math-verify')}"


def grade_records(records: list[dict], verifier: str, *, again: bool = False, progress: bool = False) -> None:
    """Give every answer a verdict of this verifier: [reward, status], and the detail if there is one.

    Verdicts of the same version stay, unless the time ran out or `again` is set. Raises InputError on a reward that is
    not 0 or 1."""
    version, todo = grader_version(verifier), []
    for record in records:
        same = record.setdefault("graded_by", {}).get(verifier) == version and not again
        record["graded_by"][verifier] = version
        for answer in record["answers"]:
            found = answer.setdefault("verdicts", {}).get(verifier, [0, "timeout"])
            if not same or found[1] in ("timeout", "error"):
                todo.append((record["gold"], answer))
    with tqdm(total=len(todo), desc=f"grade {verifier}", unit="answer", disable=not (progress and todo)) as bar:
        for start in range(0, len(todo), 256):
            part = todo[start : start + 256]
            verdicts = grade([a["text"] for _, a in part], [gold for gold, _ in part], verifier=verifier)
            for (_, answer), verdict in zip(part, verdicts, strict=True):
                if verdict.reward not in (0, 1):
                    raise InputError(f"--verifier {verifier}: a reward of {verdict.reward}; here it must be 0 or 1")
                detail = [verdict.detail] if verdict.detail else []
                answer["verdicts"][verifier] = [verdict.reward, verdict.status, *detail]
            bar.update(len(part))


def unreadable_golds(records: list[dict], verifiers: Iterable[str]) -> list[str]:
    """The rows whose gold answer one of the verifiers could not read: their answers count as wrong."""
    return [
        record.get("row", record["id"]) for record in records
        if any(detail.startswith("gold unreadable") for answer in record["answers"] for verifier in verifiers
               for detail in answer["verdicts"][verifier][2:])
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------- the numbers


def vote(text: str) -> str | None:
    r"""What an answer votes for in maj@k: its last box, else what follows the last ####, else what follows the last
    "answer is", else its last number; None for nothing. Spelled alike where cheap: 1,000.0 is 1000, \frac12 is 0.5.
    """
    text = after_think(text)[-20_000:]
    found = last_boxed(text)
    if found is None:
        said = re.findall(r"####[ \t]*([^\n]{1,200})", text) or re.findall(
            r"(?i:answer is)[ \t:*]{0,4}([^\n]{1,200}?)(?:\.\s|\.?$|\n)", text, re.M
        )
        said = said or re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?", text)
        found = said[-1] if said else ""
    found = re.sub(r"\\(?:left|right|[,;:! ])|\\?[$%]|\\text\s*\{\s*\}|\s", "", found).rstrip(".")
    found = re.sub(r"\\[dt]?frac\{?(-?\d+)\}?\{?(\d+)\}?", r"\1/\2", found)
    number = re.sub(r"(?<=\d),(?=\d{3}\b)", "", found)
    if re.fullmatch(r"-?\d{1,50}(?:\.\d{0,50}|/0*[1-9]\d{0,50})?|-?\.\d{1,50}", number):
        return str(Fraction(number))
    return found or None


def rewards_of(record: dict, verifier: str) -> list[float]:
    """The rewards of a question's answers, one each."""
    return [answer["verdicts"][verifier][0] for answer in record["answers"]]


def summarise(records: list[dict], verifiers: tuple[str, ...], base: dict[str, dict] | None = None) -> dict:
    """results.json: the numbers of each benchmark by the first verifier, and the average of their pass@1.

    base: records of the base model by question, for the numbers by difficulty."""
    results: dict = {}
    for benchmark in dict.fromkeys(r["benchmark"] for r in records):
        mine = [r for r in records if r["benchmark"] == benchmark]
        results[benchmark] = summarise_benchmark(mine, verifiers, base)
    results["average"] = mean(r["pass@1"] for r in results.values())
    return results


def summarise_benchmark(records: list[dict], verifiers: tuple[str, ...], base: dict[str, dict] | None) -> dict:
    """The numbers of one benchmark; the keys are explained in docs/eval.md."""
    first = verifiers[0]
    rewards = [rewards_of(r, first) for r in records]
    answers = [a for r in records for a in r["answers"]]
    result: dict = {
        "rows": sum(r["rows"] for r in records), "questions": len(records), "answers": len(answers),
        **dict(zip(("pass@1", "pass@1_se", "pass@1_se_sampling"), mean_and_errors(rewards), strict=True)),
    }
    n = min(map(len, rewards))
    ks = sorted({2**i for i in range(1, n.bit_length())} | {n} - {1})
    counts = [(len(r), sum(x > 0 for x in r)) for r in rewards]
    votes = [count_votes(r, first) for r in records] if ks else []
    result |= {f"pass@{k}": mean(pass_at_k(m, c, k) for m, c in counts) for k in ks}
    result |= {f"maj@{k}": mean(majority_at_k(*v, k) for v in votes) for k in ks}
    status = Counter(a["verdicts"][first][1] for a in answers)
    result |= {
        "mean_tokens": mean(a["tokens"] for a in answers),
        "truncated": mean(a["truncated"] for a in answers),
        "no_answer": status["unparsable"] / len(answers),
        "verifier": dict(status),
        "graders": {v: mean_and_errors([rewards_of(r, v) for r in records])[0] for v in verifiers},
        "graded_by": {v: versions_of(records, v) for v in verifiers},
        "unreadable_golds": unreadable_golds(records, verifiers),
    }
    if base is not None:
        result["by_difficulty"] = by_difficulty(records, first, base)
    return result


def versions_of(records: Iterable[dict], verifier: str) -> str:
    """The versions of a grader that graded these records."""
    return "; ".join(sorted({r.get("graded_by", {}).get(verifier, "?") for r in records}))


def count_votes(record: dict, verifier: str) -> tuple[int, list[int], int]:
    """-> (right answers, how often each wrong one was given, answers that give none). What the verifier accepts is
    one and the same answer, however it is written; wrong answers are told apart by `vote`."""
    wrong, right, blank = Counter(), 0, 0
    for answer in record["answers"]:
        if answer["verdicts"][verifier][0] > 0:
            right += 1
        elif answer["verdicts"][verifier][1] == "unparsable" or (voted := vote(answer["text"])) is None:
            blank += 1
        else:
            wrong[voted] += 1
    return right, sorted(wrong.values()), blank


def by_difficulty(records: list[dict], verifier: str, base: dict[str, dict]) -> dict:
    """pass@1 of this model and of the base in ReLIFT's buckets; questions that the base was not asked are counted."""
    buckets: dict = {}
    for record in records:
        name, base_rate = "not_in_base", None
        if record["id"] in base:
            base_rate = mean(rewards_of(base[record["id"]], verifier))
            name = difficulty(base_rate)
        buckets.setdefault(name, []).append((rewards_of(record, verifier), base_rate))
    result = {}
    for name in [n for n in ("easy", "medium", "hard", "hardest", "not_in_base") if n in buckets]:
        rate, error, _ = mean_and_errors([rewards for rewards, _ in buckets[name]])
        base_rates = [rate for _, rate in buckets[name] if rate is not None]
        base_mean = mean(base_rates) if base_rates else None
        result[name] = {"questions": len(buckets[name]), "pass@1": rate, "pass@1_se": error, "base": base_mean}
    return result


# ------------------------------------------------------------------------------------------------------- tables


def table(rows: list[list[str]]) -> str:
    """Rows of cells, the first row the head -> a Markdown table, aligned to be read as it is."""
    rows = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |"
             for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]) + "\n"


def percent(value: float | None, error: float | None = None) -> str:
    """A share in percent, with its error where there is one."""
    if value is None:
        return ""
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def results_tables(results: dict, records: list[dict], args: Args) -> str:
    """results.md: the numbers, where the graders disagree, and accuracy by difficulty."""
    benchmarks = [b for b in results if b != "average"]
    rows = [["benchmark", "rows", "questions", "answers", "pass@1 ± se", "se, same questions", "pass@k", "maj@k",
             "tokens", "truncated", "no answer", "verifier"]]
    for name in benchmarks:
        r = results[name]
        k = max(int(key[5:]) for key in r if re.fullmatch(r"pass@\d+", key))
        at_k = [f"{percent(r[f'{what}@{k}'])} (k={k})" if k > 1 else "" for what in ("pass", "maj")]
        status = ", ".join(f"{status} {count}" for status, count in sorted(r["verifier"].items()))
        rows.append([
            name, r["rows"], r["questions"], r["answers"], percent(r["pass@1"], r["pass@1_se"]),
            percent(r["pass@1_se_sampling"]), *at_k, f"{r['mean_tokens']:.0f}", percent(r["truncated"]),
            percent(r["no_answer"]), status,
        ])
    rows.append(["average", "", "", "", percent(results["average"]), *[""] * 7])
    drawn = "greedy" if args.temperature == 0 else f"temperature {args.temperature}, top_p {args.top_p}"
    if args.search != "none":
        drawn = f"{args.search} of width {args.width} by {args.value}, {drawn}"
    text = (f"# {args.model}\n\nTemplate {args.template}, {drawn}, at most {args.max_tokens} tokens, "
            f"graded by {args.verifier[0]} ({results[benchmarks[0]]['graded_by'][args.verifier[0]]}). "
            f"Percent.\n\n{table(rows)}")
    if bad := unreadable_golds(records, args.verifier):
        text += (f"\nA grader cannot read the gold answers of {len(bad)} questions, whose answers count as wrong: "
                 f"{'; '.join(bad[:20])}{', ...' if len(bad) > 20 else ''}\n")
    if len(args.verifier) > 1:
        text += "\n## Where the graders disagree\n\npass@1 by each grader, of the same answers:\n\n"
        text += table([["benchmark", *args.verifier]] + [
            [b, *(percent(results[b]["graders"][v]) for v in args.verifier)] for b in benchmarks
        ])
        text += "\nAnswers by who accepts them, with a question to look up in samples.jsonl:\n\n"
        rows = disagreements(records, args.verifier)
        text += table(rows) if len(rows) > 1 else "None: they agree on every answer.\n"
    if args.buckets:
        text += f"\n## By difficulty for {args.buckets}\n\n"
        text += "By the base's share of right answers: easy 6/8 or more, medium 3/8, hard above 0, hardest 0.\n\n"
        rows = [["benchmark", "bucket", "questions", "base", "pass@1 ± se"]]
        for b in benchmarks:
            rows += [[b, name, r["questions"], percent(r["base"]), percent(r["pass@1"], r["pass@1_se"])]
                     for name, r in results[b]["by_difficulty"].items()]
        text += table(rows)
    return text


def disagreements(records: list[dict], verifiers: tuple[str, ...]) -> list[list[str]]:
    """Rows of a table: for each benchmark and each set of graders that accept an answer, how many and an example."""
    found: dict[tuple, list[str]] = {}
    for record in records:
        for answer in record["answers"]:
            accepted = tuple(answer["verdicts"][v][0] > 0 for v in verifiers)
            if len(set(accepted)) > 1:
                found.setdefault((record["benchmark"], accepted), []).append(record["id"])
    rows = [["benchmark", *verifiers, "answers", "example"]]
    for (benchmark, accepted), ids in sorted(found.items(), key=lambda item: (item[0][0], -len(item[1]))):
        rows.append([benchmark, *("right" if yes else "wrong" for yes in accepted), str(len(ids)), ids[0]])
    return rows


def plot_bars(bars: dict[str, dict[str, tuple[float, float | None]]], path: Path) -> None:
    """Grouped bars of pass@1 in percent with 95 % intervals: {run: {benchmark: (mean, standard error)}}."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    benchmarks = list(dict.fromkeys(b for run in bars.values() for b in run))
    figure, axis = plt.subplots(figsize=(max(4.5, 0.5 + 0.45 * len(benchmarks) * (len(bars) + 1)), 3.6),
                                layout="constrained")
    width = 0.8 / len(bars)
    for i, (run, values) in enumerate(bars.items()):
        at = [benchmarks.index(b) + (i - (len(bars) - 1) / 2) * width for b in values]
        means = [100 * mean for mean, _ in values.values()]
        errors = [196 * (error or 0) for _, error in values.values()]
        drawn = axis.bar(at, means, width * 0.92, label=run, yerr=errors, error_kw=dict(ecolor="0.25", lw=1))
        axis.bar_label(drawn, [f"{m:.1f}" for m in means], fontsize=7, padding=2)
    axis.set_xticks(range(len(benchmarks)), benchmarks, rotation=20 if len(benchmarks) > 4 else 0)
    axis.set_ylabel("pass@1, %")
    axis.set_ylim(bottom=0)
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=len(bars), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------- comparison


@dataclass
class Run:
    """An evaluation that --compare has read."""

    name: str
    settings: dict
    records: dict[str, dict]  # of the questions that all runs were asked, by id


def load_run(folder: str, verifier: str | None) -> Run:
    """A finished evaluation. Raises InputError if the folder holds none, or no verdicts of `verifier`."""
    path = Path(folder)
    if not (path / "args.json").is_file() or not (path / "samples.jsonl").is_file():
        raise InputError(f"{folder}: no evaluation there (args.json and samples.jsonl)")
    records = read_records(path)
    if verifier and any(verifier not in a.get("verdicts", {}) for r in records.values() for a in r["answers"]):
        raise InputError(
            f"{folder}: answers without a verdict of {verifier}: run its evaluation again with --verifier {verifier} "
            "(nothing is sampled twice), or name another grader with --verifier"
        )
    return Run(path.resolve().name, json.loads((path / "args.json").read_text()), records)


def load_answers(args: Args) -> tuple[Args, dict[str, dict]]:
    """--regrade: the settings of the finished evaluation in --out, with the new graders, and its records."""
    run = load_run(args.out, None)
    if len(run.records) < run.settings.get("questions", 0):
        raise InputError(
            f"--out {args.out}: {len(run.records)} of {run.settings['questions']} questions are answered; finish the "
            "evaluation before --regrade"
        )
    old = {f.name: run.settings[f.name] for f in dataclasses.fields(Args) if f.name in run.settings}
    new = dict(out=args.out, verifier=args.verifier, buckets=args.buckets, regrade=True)
    return Args(**(old | new)), run.records


def load_runs(folders: tuple[str, ...], verifier: str) -> list[Run]:
    """Runs cut down to the questions that all of them were asked; what is left out is printed."""
    runs = [load_run(folder, verifier) for folder in folders]
    names = Counter(run.name for run in runs)
    for i, run in enumerate(runs):
        if names[run.name] > 1:
            run.name = f"{run.name} ({i + 1})"
    common = set.intersection(*(set(run.records) for run in runs))
    if not common:
        raise InputError(f"--compare {' '.join(folders)}: no question was asked in all of them")
    for run in runs:
        if len(run.records) > len(common):
            print(f"{run.name}: {len(run.records) - len(common)} questions were not asked in all runs; left out")
        run.records = {key: record for key, record in run.records.items() if key in common}
    return runs


def compare_rates(rates: dict[str, np.ndarray], names: list[str]) -> list[dict]:
    """Rows of comparison.csv: for each benchmark and their unweighted average, for each run, pass@1, its standard
    error, and the difference to the first run with its 95 % interval.

    rates: for each benchmark [runs, questions], the share of right answers; names: the runs'."""
    rows = []
    for benchmark, part in [*((b, [b]) for b in rates), ("average", list(rates))]:
        for i, name in enumerate(names):
            errors = [mean_and_errors([[rate] for rate in rates[b][i]])[1] for b in part]
            known = None not in errors
            row = {
                "benchmark": benchmark, "run": name, "questions": sum(rates[b].shape[1] for b in part),
                "pass@1": float(mean(rates[b][i].mean() for b in part)),
                "se": math.sqrt(sum(e**2 for e in errors)) / len(part) if known else None,
                "difference": None, "low": None, "high": None,
            }
            if i:
                differences = [rates[b][i] - rates[b][0] for b in part]
                low, high = bootstrap_interval(differences)
                row |= {"difference": float(mean(d.mean() for d in differences)), "low": low, "high": high}
            rows.append(row)
    return rows


def compare(args: Args) -> None:
    """--compare: comparison.md, .csv, .png and .html in --out."""
    verifier, out = args.verifier[0], Path(args.out)
    runs = load_runs(args.compare, verifier)
    first, names = runs[0], [run.name for run in runs]
    keys: dict[str, list[str]] = {}  # questions by benchmark
    for key, record in first.records.items():
        keys.setdefault(record["benchmark"], []).append(key)
    rates = {b: np.array([[mean(rewards_of(run.records[k], verifier)) for k in keys[b]] for run in runs]) for b in keys}
    rows = compare_rates(rates, names)

    cells = [["benchmark", "questions", *names, *(f"{name} - {first.name}" for name in names[1:])]]
    for start in range(0, len(rows), len(runs)):
        mine = rows[start : start + len(runs)]
        gains = [f"{100 * r['difference']:+.1f} [{100 * r['low']:+.1f}, {100 * r['high']:+.1f}]" for r in mine[1:]]
        numbers = [percent(r["pass@1"], r["se"]) for r in mine]
        cells.append([mine[0]["benchmark"], mine[0]["questions"], *numbers, *gains])
    flags = [k for k in first.settings if k not in FREE and not k.endswith("_digest")]
    settings = [[k, *(run.settings.get(k) for run in runs)] for k in flags]
    answers = ["answers", *(sum(len(r["answers"]) for r in run.records.values()) for run in runs)]
    graded = ["graded by", *(versions_of(run.records.values(), verifier) for run in runs)]
    different = [row for row in [answers, graded, *settings] if any(value != row[1] for value in row[2:])]
    text = (f"# Comparison\n\npass@1 in percent ± standard error, graded by {verifier}. In brackets: 95 % interval "
            f"of the difference on the same questions (paired bootstrap).\n\n{table(cells)}")
    if different:
        text += f"\nWhat differs between the runs:\n\n{table([['', *names], *different])}"

    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "comparison.md", text)
    with open(out / "comparison.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    bars = {name: {r["benchmark"]: (r["pass@1"], r["se"]) for r in rows if r["run"] == name} for name in names}
    plot_bars(bars, out / "comparison.png")
    write_whole(out / "comparison.html", page(runs, verifier, cells, args.page_questions))
    print(f"{text}\n{out}/comparison.html shows answers on which the runs differ; comparison.md, .csv, .png")


# The page of samples. What is on it was written by models: the page gets it as data and shows it as text. Formulas are
# turned into MathML here, of which only the elements and attributes listed pass: the converter makes links of \href and
# does not escape \text. And the page's policy lets no script run but its own.

FORMULA = re.compile(
    r"\$\$(?P<display>.+?)\$\$|\\\[(?P<brackets>.+?)\\\]|\\\((?P<inline>.+?)\\\)"
    r"|(?<![\\$])\$(?=[^\s$])(?P<dollars>[^$\n]{0,400}?[^\s$\\])\$(?!\d)"  # $5 and $10 are no formula
    r"|(?P<box>\\boxed\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})",
    re.DOTALL,
)
MATHML = {"math", "mrow", "mi", "mo", "mn", "mtext", "mspace", "mfrac", "msqrt", "mroot", "msub", "msup", "msubsup",
          "munder", "mover", "munderover", "mtable", "mtr", "mtd", "mstyle", "mpadded", "mphantom", "menclose"}
MATHML_ATTRIBUTES = {"display", "displaystyle", "scriptlevel", "mathvariant", "stretchy", "fence", "form", "accent",
                     "accentunder", "movablelimits", "minsize", "maxsize", "linethickness", "width", "columnalign"}
SHOWN = 4000  # characters of a text on the page: the end of a longer one, where its answer is


def to_html(text: str) -> str:
    """Untrusted text -> HTML: escaped, its formulas as MathML where they can be read."""
    cut, text = len(text) - SHOWN, text[-SHOWN:]
    parts, at = [f'<span class="cut">({cut:,} characters before)</span>\n'] if cut > 0 else [], 0
    for match in FORMULA.finditer(text):
        kind = match.lastgroup
        formula = to_mathml(match[kind], block=kind in ("display", "brackets"))
        parts += [html.escape(text[at : match.start()]), formula or html.escape(match[0])]
        at = match.end()
    return "".join([*parts, html.escape(text[at:])])


@functools.lru_cache(4096)
def to_mathml(formula: str, *, block: bool = False) -> str | None:
    """MathML of a LaTeX formula, or None if it is long, cannot be read, or needs an element that is not in MATHML.
    Attributes that are not in MATHML_ATTRIBUTES are taken off."""
    from latex2mathml.converter import convert

    if len(formula) > 1000:
        return None
    try:
        tree = ElementTree.fromstring(convert(formula, display="block" if block else "inline"))
    except Exception:  # the converter raises many types, down to IndexError and RecursionError
        return None
    for element in tree.iter():
        element.tag = element.tag.rpartition("}")[2]
        if element.tag not in MATHML:
            return None
        for name in element.attrib.keys() - MATHML_ATTRIBUTES:
            del element.attrib[name]
    return ElementTree.tostring(tree, encoding="unicode", short_empty_elements=False)


def page(runs: list[Run], verifier: str, summary: list[list], limit: int) -> str:
    """The page of samples, one self-contained file: eval_page.html around the questions on which the runs differ."""
    rates = {key: [mean(rewards_of(run.records[key], verifier)) for run in runs] for key in runs[0].records}
    differing = [key for key, values in rates.items() if max(values) > min(values)]
    shown = sorted(differing, key=lambda key: min(rates[key]) - max(rates[key]))[:limit]
    questions = [
        {
            "id": key, "benchmark": record["benchmark"], "gold": record["gold"], "html": to_html(record["question"]),
            "runs": [page_answers(run.records[key], verifier) for run in runs],
        }
        for key in shown
        for record in [runs[0].records[key]]
    ]
    note = (f"The runs differ on {len(differing)} of {len(rates)} questions, graded by {verifier}; here are the "
            f"{len(shown)} on which they differ most, each with a run's first right and first wrong answer.")
    data = json.dumps({"runs": [run.name for run in runs], "summary": summary, "note": note, "questions": questions})
    frame = string.Template((Path(__file__).parent / "eval_page.html").read_text(encoding="utf-8"))
    script = re.search(r"<script>(.*?)</script>", frame.template, re.DOTALL)[1]
    return frame.substitute(
        title=html.escape(" / ".join(run.name for run in runs)), data=data.replace("<", "\\u003c"),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def page_answers(record: dict, verifier: str) -> dict:
    """What the page shows of a run's answers to a question: how many are right, the first right and wrong ones."""
    rewards = rewards_of(record, verifier)
    shown = []
    for right in (True, False):
        for answer in [a for a, x in zip(record["answers"], rewards, strict=True) if (x > 0) == right][:1]:
            thought, tag, _ = answer["text"].partition("</think>")
            verdicts = {
                v: ("right" if reward > 0 else "wrong" if status == "ok" else status)
                + "".join(f" ({why})" for why in detail)
                for v, (reward, status, *detail) in answer["verdicts"].items()
            }
            shown.append({
                "right": right, "tokens": answer["tokens"], "truncated": answer["truncated"], "verdicts": verdicts,
                "thought": thought[-SHOWN:] if tag else None,
                "html": to_html(after_think(answer["text"]).strip()),
            })
    return {"right": sum(x > 0 for x in rewards), "answers": len(rewards), "shown": shown}


# --------------------------------------------------------------------------------------------------------- main


def check(args: Args) -> None:
    """Raise InputError for settings that cannot work."""
    if args.compare and len(args.compare) < 2:
        raise InputError("--compare needs two or more folders of evaluations")
    if not args.compare and not args.regrade and not (args.model and args.data):
        raise InputError("--model and --data are needed (or --regrade, or --compare)")
    for name in ("n", "max_tokens", "write_every", "width", "max_steps"):
        if getattr(args, name) <= 0:
            raise InputError(f"--{name} must be positive, not {getattr(args, name)}")
    if args.limit < 0:
        raise InputError(f"--limit must be positive, or 0 for all questions, not {args.limit}")
    if args.sampler_tokens < 0:
        raise InputError(f"--sampler_tokens must be positive, or 0 for the device's, not {args.sampler_tokens}")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise InputError(f"--temperature {args.temperature} must not be negative, --top_p {args.top_p} be in (0, 1]")
    if args.search != "none" and not args.value:
        raise InputError(f"--search {args.search} needs --value, a value model that oreo.py wrote")
    if args.value and args.search == "none":
        raise InputError(f"--value {args.value} is for --search beam, best_of_n or best_of_k")
    if args.search != "none" and args.temperature == 0:
        raise InputError(f"--search {args.search}: answers that shall differ need a positive --temperature")
    if args.chat_template_args and args.template != "own":
        raise InputError(f"--chat_template_args are for --template own, not {args.template}")
    if not args.verifier:
        raise InputError("--verifier needs at least one name")
    for name in args.verifier if not args.compare else ():
        check_verifier(name)


def tokens_ahead(args: Args) -> int:
    """Tokens that the sampler must have room for after a prompt."""
    # a state of these is a prompt with an answer so far, and a step from it may be of any length
    return 2 * args.max_tokens if args.search in ("beam", "best_of_k") else args.max_tokens


def check_lengths(questions: list[Question], args: Args) -> None:
    """Raise InputError if a prompt and --max_tokens (twice, in a search by steps) exceed the model's positions."""
    try:
        positions = getattr(AutoConfig.from_pretrained(args.model), "max_position_embeddings", None)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {args.model}: no readable config.json ({str(error).splitlines()[0]})") from error
    longest = max(questions, key=lambda q: len(q.prompt))
    length, times = len(longest.prompt), tokens_ahead(args) // args.max_tokens
    if positions and length + times * args.max_tokens > positions:
        fits = (positions - length) // times
        remedy = f"--max_tokens {fits} or less fits" if fits > 0 else "remove the row, or use another --template"
        raise InputError(
            f"{longest.where}: its prompt of {length} tokens and {times} answer{'s' * (times > 1)} of --max_tokens "
            f"{args.max_tokens} (--search {args.search}) exceed the {positions} positions of {args.model}: {remedy}"
        )


def dry_run(questions: list[Question]) -> None:
    """Print the first two prompts of each benchmark, as text and as ids."""
    for benchmark in dict.fromkeys(q.benchmark for q in questions):
        mine = [q for q in questions if q.benchmark == benchmark]
        print(f"\n{benchmark}: {sum(q.rows for q in mine)} rows, {len(mine)} questions, "
              f"{sum(q.n for q in mine)} answers to draw")
        for question in mine[:2]:
            print(textwrap.indent(question.prompt_text, "  | ", lambda line: True))
            print(f"  ids ({len(question.prompt)}): {question.prompt}\n  gold: {question.gold}")


def main(args: Args) -> None:
    check(args)
    if args.compare:
        return compare(args)
    world = init_world(timeout_minutes=24 * 60)  # ranks wait for the one with the longest answers
    if args.regrade:
        args, records = load_answers(args)
    else:
        args.sampler_tokens = args.sampler_tokens or SAMPLER_TOKENS[world.device.type]
        tokenizer, out = load_tokenizer(args.model), Path(args.out)
        set_template(tokenizer, switches=args.chat_template_args)
        questions = read_questions(args.data, limit=args.limit)
        make_prompts(questions, tokenizer, args)
        if args.dry_run:
            return dry_run(questions) if world.main else None
        check_lengths(questions, args)
    base = load_run(args.buckets, args.verifier[0]).records if args.buckets else None

    # 1. sample
    if not args.regrade:
        check_settings(args, questions, world)
        done = merge(out, questions, world)
        if world.main and done:
            print(f"{out}: {len(done)} of {len(questions)} questions are answered already")
        sample(questions, tokenizer, args, world, done)
        found = merge(out, questions, world)
        records = {q.id: found[q.id] for q in questions}

    # 2. reward
    mine = list(records.values())[world.rank :: world.size]
    start, answers = time.perf_counter(), sum(len(r["answers"]) for r in mine)
    for verifier in args.verifier:
        grade_records(mine, verifier, again=args.regrade or ":" in verifier, progress=world.main)
    seconds = time.perf_counter() - start
    graded = [(r["id"], r["graded_by"], [a["verdicts"] for a in r["answers"]]) for r in mine]
    for key, graded_by, verdicts in gather_lists(graded, world):
        records[key]["graded_by"] = graded_by
        for answer, verdict in zip(records[key]["answers"], verdicts, strict=True):
            answer["verdicts"] = verdict

    # 3. numbers
    if world.main:
        out, ordered = Path(args.out), list(records.values())
        write_records(out, records, records)
        results = summarise(ordered, args.verifier, base)
        text = results_tables(results, ordered, args)
        write_whole(out / "results.md", text)
        bars = {b: (r["pass@1"], r["pass@1_se"]) for b, r in results.items() if b != "average"}
        plot_bars({Path(args.model).name: bars | {"average": (results["average"], None)}}, out / "results.png")
        write_whole(out / "results.json", json.dumps(results, indent=2) + "\n")
        print(text)
        print(f"{answers} answers graded in {seconds:.1f} s on rank 0 by {len(args.verifier)} graders; "
              f"{out}/results.json, results.md, results.png, samples.jsonl")


if __name__ == "__main__":
    launch(main, parse_args(Args, None))
