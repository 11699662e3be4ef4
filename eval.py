r"""Evaluate a model on benchmark files.

    python eval.py --model PATH --data FILE ... --out DIR       sample, grade, count: results.json, a table, a plot
    torchrun --nproc_per_node 8 eval.py ...                     the same on eight GPUs
    python eval.py --model PATH --data FILE ... --dry_run       the first prompts, as text and as ids
    python -m tools.compare DIR_A DIR_B ... --out DIR           evaluations side by side

Benchmark files repeat rows to get several answers to a question (30 questions x 32 rows of AIME, for "avg@32"). Such
rows are one question here. A question gets --n answers, or one per row if it has more rows; greedy decoding gives one.
Question q of Q has n_q answers, c_q of them correct; m_q = c_q / n_q; var_q is the sample variance of their rewards:

    pass@1              mean of m_q; for equal n_q this is the mean over all answers (avg@n)
    pass@k              mean of 1 - C(n_q - c_q, k) / C(n_q, k): is one of k answers correct? (arXiv 2107.03374)
    maj@k               is the most frequent of k answers correct? Exact mean over all k-subsets; a tie of m counts 1/m
    pass@1_se           sqrt(var(m_q) / Q): standard error over sets of such questions
    pass@1_se_sampling  sqrt(sum of var_q / n_q) / Q: standard error over runs on these questions
    average             mean of the benchmarks' pass@1, each counted once whatever its size

Answers are written as they come, and the same command resumes a run that was killed, with the same result.
The papers differ in prompts, graders and limits: docs/eval.md has the protocols, docs/published.md the commands.
"""

import dataclasses
import hashlib
import json
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from statistics import fmean, variance
from typing import Annotated, Literal

import tyro

from common.data import InputError, check_verifier
from common.report import grade_records, load_run, plot_bars, results_tables, rewards_of, unreadable_golds, versions_of
from common.rollout import Completion, EmbeddedSampler, Sampling, make_sampler, vllm_for
from common.rows import check_gold, load_rows, read_row, render_prompt, set_template, warn_prompts, with_bos
from common.run import (
    NotNegative,
    Positive,
    Seed,
    Share,
    check_fit,
    check_ranges,
    digests_of,
    keep_records,
    keep_settings,
    lock,
    read_records,
    stop_ids,
    write_records,
    write_whole,
)
from common.search import search_answers, step_ids
from common.trainer import (
    ValueModel,
    init_world,
    launch,
    load_policy,
    load_tokenizer,
    max_positions,
    parse_args,
    read_config,
)
from common.verifiers import after_think, chosen_label, last_boxed


@dataclass
class Args:
    model: str = ""  # Model folder or Hub name
    # Benchmark files, folders, Hub names (their test split) or igsm:LO-HI, with rows of any shape in docs/data.md
    data: tuple[str, ...] = ()
    out: str = "runs/eval"  # Folder for samples.jsonl, results.json, results.md and results.png
    # Answers per question. A question that the file repeats more often gets one per row. With --search or
    # temperature 0 there is one answer. Under torchrun write -n.
    n: Annotated[Positive[int], tyro.conf.arg(aliases=["-n"])] = 8
    temperature: NotNegative[float] = 0.6  # Sampling temperature (LUFFY, ReLIFT, REDI: 0.6); 0 is greedy.
    top_p: Positive[Share[float]] = 1.0  # Draw from the likeliest tokens with this much probability (REDI: 0.95).
    max_tokens: Positive[int] = 8192  # Longest answer, in tokens (LUFFY, ReLIFT: 8192)
    # How a question becomes a prompt: own (the tokenizer's chat template), a name in benchmarks/templates.json (qwen,
    # simplerl, prime, prime_sft, prime_code, no, oreo-gsm8k, oreo-math, oreo-deepseek, redi), or a file: a Jinja chat
    # template, or plain text with {question}
    template: str = "own"
    chat_template_args: tuple[str, ...] = ()  # Switches of the chat template, such as enable_thinking=false
    system: bool = True  # Keep the rows' system turns under "own" and Jinja files (LUFFY and ReLIFT drop them).
    stop_tokens: tuple[str, ...] = ()  # Tokens that also end an answer: <|im_end|> for a base model asked in ChatML
    seed: Seed = 0  # Seed of the sampling
    # Let a value model choose: one answer per question. beam: --width next steps of each of --width states; keep the
    # best. best_of_n: --width answers. best_of_k: --width next steps of one state
    search: Literal["none", "beam", "best_of_n", "best_of_k"] = "none"
    value: str = ""  # Value model of --search (oreo.py trains one)
    width: Positive[int] = 5  # Width of --search (OREO: 3, 5, 7)
    max_steps: Positive[int] = 20  # Most steps of beam and best_of_k (OREO: 20). No answer by then is an empty answer.
    step_delimiters: tuple[str, ...] = ("\n",)  # A --search step ends with a token that holds one of these (a newline).
    limit: NotNegative[int] = 0  # First questions of each benchmark to ask; 0: all (igsm:LO-HI: 1000)
    dry_run: bool = False  # Print the first prompts of each benchmark with their ids, and exit.
    # Graders: strict_box (as LUFFY's evaluation), math (the training reward), full (math on the whole text), mcq,
    # exact, boxed, robust, or "module:function", which must return 0 or 1. The first one's verdicts make the numbers.
    verifier: Annotated[tuple[str, ...], ("one name or more", len)] = ("strict_box", "math", "full")
    regrade: bool = False  # Grade the answers in --out again, without sampling. Needs neither --model nor --data.
    buckets: str = ""  # Folder of the base model's evaluation: adds accuracy by how often the base was correct.
    # Sampler. embedded: in this process. vllm: a vLLM process beside each rank (docs/rollout.md). auto: vllm on CUDA
    rollout: Literal["auto", "embedded", "vllm"] = "auto"
    rollout_gpu_memory: Share[float] = 0.0  # Fraction of each GPU's memory for vLLM. 0: what is free, at most 0.7
    # Largest batch of the embedded sampler: rows x (prompt + response) tokens. 0: 65,536; on CUDA 524,288 (7B: 30 GB)
    sampler_tokens: NotNegative[int] = 0
    write_every: Positive[int] = 2048  # Answers per vLLM call; each call's answers are written when it ends


SAMPLER_TOKENS = {"cpu": 65536, "cuda": 524288}  # of --sampler_tokens 0
FREE = {"out", "verifier", "regrade", "buckets", "dry_run", "rollout_gpu_memory"}  # may change on resume
SAMPLER = {"rollout", "sampler_tokens", "write_every"}  # may change when all questions are answered
BY_DIGEST = {"model", "value", "data", "questions"}  # their names may change: digests of the contents are compared
# The published evaluations' prompts. Text is the whole prompt; turns go through the tokenizer's chat template.
TEMPLATES = json.loads((Path(__file__).parent / "benchmarks" / "templates.json").read_text())


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k of n answers, drawn without replacement, include a correct one: 1 - C(n - c, k) / C(n, k).

    Unbiased for the chance that k fresh answers include one. 1 <= k <= n.

    >>> pass_at_k(n=4, right=1, k=2)
    0.5
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority_at_k(right: int, wrong: list[int], blank: int, k: int) -> float:
    """Probability that the correct answer wins a vote of k answers, drawn without replacement. A tie of m counts 1/m.

    right: number of correct answers; wrong: count of each wrong answer; blank: answers that do not vote. If the
    correct answer has j votes, no wrong one may have more, and `ties` wrong ones have j too:

        sum_j C(right, j) * [x^(k-j)] (1 + x)^blank * prod_w sum_{i <= j} C(w, i) x^i / (1 + ties) / C(n, k)

    >>> majority_at_k(right=2, wrong=[1], blank=0, k=3), majority_at_k(right=1, wrong=[1, 1], blank=0, k=2)
    (1.0, 0.3333333333333333)
    """
    total = Fraction(0)
    for j in range(1, min(right, k) + 1):
        free = blank + sum(w for w in wrong if w < j)  # these cannot reach j, however many of them are drawn
        ways = Counter({(d, 0): math.comb(free, d) for d in range(k - j + 1)})  # {(power of x, ties): coefficient}
        for w in (w for w in wrong if w >= j):
            old, ways = ways, Counter()
            for (d, ties), count in old.items():
                for i in range(min(j, k - j - d) + 1):
                    ways[d + i, ties + (i == j)] += count * math.comb(w, i)
        shares = sum(Fraction(count, 1 + ties) for (d, ties), count in ways.items() if d == k - j)
        total += math.comb(right, j) * shares
    return float(total / math.comb(right + sum(wrong) + blank, k))


def mean_and_errors(rewards: list[list[float]]) -> tuple[float, float | None, float | None]:
    """Mean over questions of their mean rewards, and its two standard errors (docstring of this file).

    rewards: a list per question, one reward per answer. The squares of both errors are unbiased. An error is None if
    it is unknown: for one question, or a question with one answer."""
    means, sampling_error = [fmean(r) for r in rewards], None  # [Q]
    error = math.sqrt(variance(means) / len(means)) if len(means) > 1 else None
    if min(map(len, rewards)) > 1:
        sampling_error = math.sqrt(sum(variance(r) / len(r) for r in rewards)) / len(means)
    return fmean(means), error, sampling_error


def difficulty(base_rate: float) -> str:
    """ReLIFT's bucket for a fraction correct. Of 8: easy 6 to 8, medium 3 to 5, hard 1 or 2, hardest 0."""
    return "easy" if base_rate >= 6 / 8 else "medium" if base_rate >= 3 / 8 else "hard" if base_rate > 0 else "hardest"


@dataclass
class Question:
    id: str  # digest of the benchmark's name, turns and gold: the same in every run that asks it
    benchmark: str
    text: str  # the question alone
    turns: list[dict]  # the row's own turns, which --template own renders
    gold: str
    where: str  # file and row, for messages
    index: int  # the row's number, key of a search's random stream
    rendered: str | None = None  # the prompt's text, if the row holds it
    rows: int = 1  # number of rows with this question
    n: int = 1  # answers to draw
    prompt_text: str = ""
    prompt: list[int] = field(default_factory=list)


def digest(value) -> str:
    """Return a short digest of a value of JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def read_questions(sources: Iterable[str], *, limit: int = 0) -> list[Question]:
    """Return the distinct questions of benchmark files, in order; equal rows are counted in `rows`.

    A benchmark is named by its rows' data_source, else by its file; a name that two files share gets the file added.
    limit: first questions of each benchmark. Raises InputError naming file, row and columns."""
    read, sources_of = [], {}  # sources_of: the files by the benchmark name that their rows give
    for source in dict.fromkeys(sources):
        for index, row in enumerate(load_rows(source, split="test", problems=limit or 1000)):
            where = f"{source}, row {index}"
            item = read_row(row, where)
            check_gold(item, row, where)
            name = item.source or Path(source.removesuffix(".gz")).stem
            read.append((name, source, where, index, item))
            sources_of.setdefault(name, set()).add(source)
    questions: dict[str, Question] = {}
    seen = Counter()
    for name, source, where, index, item in read:
        # "average" is a key of results.json
        benchmark = f"{name} ({source})" if len(sources_of[name]) > 1 or name == "average" else name
        asked = [name, item.text or item.prompt, item.gold]
        while (key := digest(asked)) in questions and questions[key].benchmark != benchmark:
            asked.append("again")  # another file has the same question; no path, which may change
        if key in questions:
            questions[key].rows += 1
        elif not limit or seen[benchmark] < limit:
            seen[benchmark] += 1
            questions[key] = Question(key, benchmark, item.question, item.prompt, item.gold, where, index, item.text)
    return list(questions.values())


def read_template(name: str, tokenizer) -> str | list[dict] | None:
    """Return --template as text with {question}, or as turns; None means the row's own turns.

    A Jinja file becomes the tokenizer's chat template."""
    template = TEMPLATES.get(name)
    if name not in ("own", *TEMPLATES):
        if not Path(name).is_file():
            raise InputError(f"--template {name}: no such file, and not one of own, {', '.join(TEMPLATES)}")
        template = Path(name).read_text(encoding="utf-8-sig")
        if "{question}" not in template:
            if "messages" not in template:
                raise InputError(f"--template {name}: neither {{question}} nor messages occurs in it")
            template = None
            set_template(tokenizer, name)
    if not isinstance(template, str) and not tokenizer.chat_template:
        plain = ", ".join(name for name, text in TEMPLATES.items() if isinstance(text, str))
        raise InputError(f"--template {name}: the model has no chat template; pass a file with one, or {plain}")
    return template


def make_prompts(questions: list[Question], tokenizer, args: Args) -> None:
    """Render and tokenize every question by --template, and set its number of answers."""
    template = read_template(args.template, tokenizer)
    plain = isinstance(template, str)
    for question in questions:
        question.n = max(args.n, question.rows) if args.temperature > 0 and args.search == "none" else 1
        if plain:
            question.prompt_text = template.replace("{question}", question.text)
            continue
        if question.rendered and args.template == "own":
            question.prompt_text = question.rendered
            continue
        turns = [t for t in question.turns if args.system or t["role"] != "system"]
        if template:
            turns = [t | {"content": t["content"].replace("{question}", question.text)} for t in template]
        try:
            question.prompt_text = render_prompt(tokenizer, turns)
        except InputError as error:
            dropped = not template and any(t["role"] == "system" for t in turns)
            remedy = "; --no_system drops the system turns" if dropped else ""
            raise InputError(f"{question.where}: {error}{remedy}") from error
    # a chat template writes the bos token itself; a plain template and a row's rendered prompt get it from `with_bos`
    encoded = tokenizer([q.prompt_text for q in questions], add_special_tokens=False)["input_ids"]
    for question, ids in zip(questions, encoded, strict=True):
        question.prompt = with_bos(ids, tokenizer) if plain or question.prompt_text == question.rendered else ids
        if not ids:
            raise InputError(f"{question.where}: its prompt has no tokens under --template {args.template}")
    turns = [[] if q.prompt_text == q.rendered else q.turns for q in questions]
    warn_prompts("--data", [q.prompt for q in questions], turns, tokenizer)


def check_settings(args: Args, questions: list[Question], world) -> None:
    """Write args.json. Raise InputError if the answers in --out are of other settings, models or questions."""
    path = Path(args.out) / "args.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    if old and "questions_digest" not in old:
        raise InputError(f"--out {args.out} holds something other than an evaluation: name another")
    settings = dataclasses.asdict(args) | {
        "rollout": "vllm" if vllm_for(args.rollout, world) else "embedded",
        "weights_digest": " ".join(digests_of({"model": args.model, "value": args.value}, world).values()),
        "questions": len(questions), "questions_digest": digest([[q.id, q.prompt, q.n] for q in questions]),
    }  # fmt: skip
    answered = len(read_records(path.parent / "samples.jsonl"))
    if answered >= len(questions):
        settings |= {k: old[k] for k in SAMPLER & old.keys()}  # of the run that drew the answers
    compared = [k for k in settings if k not in FREE | BY_DIGEST] if answered else []
    keep_settings(path, settings, compared, f"--out {args.out} holds an evaluation with other settings", world)


def chunks(questions: list[Question], args: Args, *, embedded: bool) -> list[list[Question]]:
    """Return parts of the questions, each sampled at once. They depend on the settings alone, not on ranks or finished
    questions: batches of other shapes round differently, which could change a draw."""
    each = {"none": 1, "beam": args.width**2}.get(args.search, args.width)  # rows that one answer takes in a batch

    def full(part: list[Question]) -> bool:
        answers = each * sum(q.n for q in part)
        width = max(len(q.prompt) for q in part) + args.max_tokens
        return answers * width > args.sampler_tokens if embedded else answers > args.write_every

    parts: list[list[Question]] = [[]]
    for question in questions:
        if parts[-1] and full([*parts[-1], question]):
            parts.append([])
        parts[-1].append(question)
    return parts


def sample(questions: list[Question], tokenizer, args: Args, world) -> dict[str, dict]:
    """Return the records of all questions by id: those of samples.jsonl, and new ones for the others."""
    path, by_id = Path(args.out) / "samples.jsonl", {q.id: q for q in questions}
    done = read_records(path)
    if world.main:
        print(f"{args.out}: {len(done)} of {len(questions)} questions done; {sum(q.n for q in questions)} answers")
    if by_id.keys() <= done.keys():
        return {key: done[key] for key in by_id}
    policy = load_policy(args.model, world)
    searches = args.search != "none"
    longest = max(len(q.prompt) for q in questions) + args.max_tokens
    if searches:
        value = load_policy(args.value, world, kind=ValueModel)
        step_ends = step_ids(tokenizer, args.step_delimiters)
        check_fit(f"--value {args.value}", value, policy, longest)
    stops = stop_ids(policy, tokenizer, args.stop_tokens)
    sampler = make_sampler(args.rollout, policy, world, stop_ids=stops, max_tokens=longest,
                           max_batch_tokens=args.sampler_tokens, gpu_memory=args.rollout_gpu_memory)  # fmt: skip
    sampler.sync(policy, version=0)
    parts = chunks(questions, args, embedded=isinstance(sampler, EmbeddedSampler))
    del policy

    def make(ids: list[str]) -> list[dict]:
        part = [by_id[key] for key in ids]
        prompts = [q.prompt for q in part]
        if searches:
            found = search_answers(
                args.search, sampler, value, prompts, [q.index for q in part], world, width=args.width,
                max_steps=args.max_steps, max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p,
                step_ends=step_ends, micro_batch_tokens=max(longest, args.sampler_tokens // 4), seed=args.seed,
            )  # fmt: skip
            groups = [[best_answer(candidates, stops, tokenizer)] for candidates in found]
        else:
            drawn = sampler.generate(
                prompts, n=[q.n for q in part], keys=[int(q.id[:8], 16) for q in part], seed=args.seed,
                sampling=Sampling(args.max_tokens, args.temperature, args.top_p),
                progress="batch" if world.main else None,
            )  # fmt: skip
            groups = [[make_answer(completion, tokenizer) for completion in group] for group in drawn]
        return [
            {"id": q.id, "benchmark": q.benchmark, "rows": q.rows, "question": q.text, "gold": q.gold, "row": q.where,
             "prompt": q.prompt_text, "answers": answers}
            for q, answers in zip(part, groups, strict=True)
        ]  # fmt: skip

    records = keep_records(path, [[q.id for q in part] for part in parts], make, world, together=searches)
    sampler.close()
    return records


def make_answer(drawn: Completion, tokenizer) -> dict:
    """Return an answer of a line of samples.jsonl."""
    return {"text": tokenizer.decode(drawn.text_ids), "tokens": len(drawn.ids), "truncated": drawn.truncated}


def best_answer(found, stops: list[int], tokenizer) -> dict:
    """Return the answer with the highest value of those that a search found; an empty answer if it found none."""
    if not found:
        return {"text": "", "tokens": 0, "truncated": True, "found": 0}
    best = max(found, key=lambda candidate: candidate.value)
    drawn = Completion(best.response, [], "stop" if best.response[-1] in stops else "length")
    return make_answer(drawn, tokenizer) | {"found": len(found), "value": round(best.value, 6)}


def vote(text: str, *, labels: bool = False) -> str | None:
    r"""Return what an answer votes for in maj@k: its last box, else what follows the last ####, else what follows the
    last "answer is", else its last number, else its last line. Cheap spellings are made equal: 1,000.0 is 1000, \frac12
    is 0.5. labels: for a multiple choice, try the chosen label before all of these. None if there is no vote."""
    text = after_think(text)[-20_000:]
    if labels and (label := chosen_label(text, digits=True)):
        return label
    if (found := last_boxed(text)) is None:
        marks = (r"####[ \t]*([^\n]{1,200})", r"(?im)answer is[ \t:*]{0,4}([^\n]{1,200}?)(?:\.\s|\.?$|\n)",
                 r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?", r"\w[^\n]*")  # fmt: skip
        found = next((said[-1] for said in (re.findall(mark, text) for mark in marks) if said), "")
    found = re.sub(r"\\(?:left|right|[,;:! ()])|\*\*|\\?[$%]|\\text\s*\{\s*\}|\s", "", found).rstrip(".")
    found = re.sub(r"(?<!\d)\\[dt]?frac\{?(-?\d+)\}?\{?(\d+)\}?", r"\1/\2", found)
    number = re.sub(r"(?<=\d),(?=\d{3}\b)", "", found)
    if re.fullmatch(r"-?\d{1,50}(?:\.\d{0,50}|/0*[1-9]\d{0,50})?|-?\.\d{1,50}", number):
        return str(Fraction(number))
    return found or None


def count_votes(record: dict, verifier: str) -> tuple[int, list[int], int]:
    """Return (correct answers, answers with each wrong vote, answers without a vote), as numbers. Answers that the
    verifier accepts all vote for the correct one; the votes of others are those of `vote`."""
    wrong, right, blank = Counter(), 0, 0
    labels = verifier == "mcq" or bool(re.fullmatch("[A-Z]", record["gold"]))
    for answer in record["answers"]:
        reward, status, *_ = answer["verdicts"][verifier]
        if reward > 0:
            right += 1
        elif status == "unparsable" or (voted := vote(answer["text"], labels=labels)) is None:
            blank += 1
        else:
            wrong[voted] += 1
    return right, sorted(wrong.values()), blank


def summarise(records: list[dict], verifiers: tuple[str, ...], base: dict[str, dict] | None = None) -> dict:
    """Return results.json: the numbers of each benchmark by the first verifier, and the average of their pass@1.

    base: records of the base model by question, for the numbers by difficulty. docs/eval.md explains the keys."""
    results: dict = {}
    for benchmark in dict.fromkeys(r["benchmark"] for r in records):
        mine = [r for r in records if r["benchmark"] == benchmark]
        results[benchmark] = summarise_benchmark(mine, verifiers)
        if base is not None:
            results[benchmark]["by_difficulty"] = by_difficulty(mine, verifiers[0], base)
    results["average"] = fmean(r["pass@1"] for r in results.values())
    return results


def summarise_benchmark(records: list[dict], verifiers: tuple[str, ...]) -> dict:
    """Return the numbers of one benchmark."""
    first = verifiers[0]
    rewards = [rewards_of(r, first) for r in records]
    answers = [a for r in records for a in r["answers"]]
    status = Counter(a["verdicts"][first][1] for a in answers)
    fewest = min(map(len, rewards))
    ks = [k for k in range(2, fewest + 1) if k.bit_count() == 1 or k == fewest]
    counts = [(len(r), sum(x > 0 for x in r)) for r in rewards]
    votes = [count_votes(r, first) for r in records] if ks else []
    return {
        "rows": sum(r["rows"] for r in records), "questions": len(records), "answers": len(answers),
        **dict(zip(("pass@1", "pass@1_se", "pass@1_se_sampling"), mean_and_errors(rewards), strict=True)),
        **{f"pass@{k}": fmean(pass_at_k(n, c, k) for n, c in counts) for k in ks},
        **{f"maj@{k}": fmean(majority_at_k(*v, k) for v in votes) for k in ks},
        "mean_tokens": fmean(a["tokens"] for a in answers),
        "truncated": fmean(a["truncated"] for a in answers),
        "no_answer": status["unparsable"] / len(answers),
        "verifier": dict(status),
        "graders": {v: mean_and_errors([rewards_of(r, v) for r in records])[0] for v in verifiers},
        "graded_by": {v: versions_of(records, v) for v in verifiers},
        "unreadable_golds": unreadable_golds(records, verifiers),
    }  # fmt: skip


def by_difficulty(records: list[dict], verifier: str, base: dict[str, dict]) -> dict:
    """Return pass@1 of this model and of the base in ReLIFT's buckets; not_in_base: the base was not asked."""
    base_rates = {key: fmean(rewards_of(record, verifier)) for key, record in base.items()}
    buckets = {name: [] for name in ("easy", "medium", "hard", "hardest", "not_in_base")}
    for record in records:
        key = record["id"]
        buckets[difficulty(base_rates[key]) if key in base else "not_in_base"].append(record)
    result = {}
    for name, found in buckets.items():
        if found:
            rate, error, _ = mean_and_errors([rewards_of(record, verifier) for record in found])
            base_mean = None if name == "not_in_base" else fmean(base_rates[record["id"]] for record in found)
            result[name] = {"questions": len(found), "pass@1": rate, "pass@1_se": error, "base": base_mean}
    return result


def check(args: Args) -> None:
    """Raise InputError for settings that cannot work."""
    check_ranges(args)
    searches = args.search != "none"
    for wrong, message in (
        (not args.regrade and not (args.model and args.data), "--model and --data are needed (or --regrade)"),
        (args.regrade and args.dry_run, "--dry_run prints prompts, and --regrade makes none"),
        (searches and not args.value, f"--search {args.search} needs --value, a value model that oreo.py wrote"),
        (args.value and not searches, f"--value {args.value} is for --search beam, best_of_n or best_of_k"),
        (searches and args.temperature == 0,
         f"--search {args.search}: only a positive --temperature draws different answers"),
        (args.chat_template_args and args.template != "own",
         f"--chat_template_args are for --template own, not {args.template}"),
    ):  # fmt: skip
        if wrong:
            raise InputError(message)
    for name in args.verifier:
        check_verifier(name)


def check_lengths(questions: list[Question], args: Args) -> None:
    """Raise InputError if the longest prompt and its answer exceed the model's positions."""
    positions = max_positions(read_config(args.model))
    longest = max(questions, key=lambda q: len(q.prompt))
    fits = positions - len(longest.prompt) if positions else args.max_tokens
    if fits < args.max_tokens:
        remedy = f"--max_tokens {fits} or less fits" if fits > 0 else "remove the row, or use another --template"
        raise InputError(
            f"{longest.where}: its prompt of {len(longest.prompt)} tokens and --max_tokens {args.max_tokens} exceed "
            f"the {positions} positions of {args.model}: {remedy}"
        )


def show_prompts(questions: list[Question]) -> None:
    """--dry_run: print the first two prompts of each benchmark, as text and as ids."""
    for benchmark in dict.fromkeys(q.benchmark for q in questions):
        mine = [q for q in questions if q.benchmark == benchmark]
        print(f"\n{benchmark}: {sum(q.rows for q in mine)} rows, {len(mine)} questions, "
              f"{sum(q.n for q in mine)} answers to draw")  # fmt: skip
        for question in mine[:2]:
            print(textwrap.indent(question.prompt_text, "  | ", lambda line: True))
            print(f"  ids ({len(question.prompt)}): {question.prompt}\n  gold: {question.gold}")


def load_answers(args: Args) -> tuple[Args, dict[str, dict]]:
    """--regrade: return the settings of the finished evaluation in --out, with the new graders, and its records."""
    settings, records = load_run(args.out)
    names = {f.name for f in dataclasses.fields(Args)} - FREE
    return dataclasses.replace(args, **{k: v for k, v in settings.items() if k in names}), records


def main(args: Args) -> None:
    check(args)
    world = init_world(timeout_minutes=24 * 60)  # ranks wait for the one with the longest answers
    base = load_run(args.buckets, args.verifier[0])[1] if args.buckets else None

    # 1. sample
    if args.regrade:
        args, records = load_answers(args)
        _held = lock(Path(args.out), world)
    else:
        args.sampler_tokens = args.sampler_tokens or SAMPLER_TOKENS[world.device.type]
        tokenizer = set_template(load_tokenizer(args.model), switches=args.chat_template_args)
        questions = read_questions(args.data, limit=args.limit)
        make_prompts(questions, tokenizer, args)
        if args.dry_run:
            return show_prompts(questions) if world.main else None
        check_lengths(questions, args)
        check_settings(args, questions, world)
        records = sample(questions, tokenizer, args, world)
        for q in questions:  # kept records have the paths of the run that drew them
            records[q.id] |= {"benchmark": q.benchmark, "rows": q.rows, "row": q.where}

    # 2. reward
    if base:
        grade_records(base, args.verifier[:1], world)  # in memory: by the same version of the rule
    grade_records(records, args.verifier, world, again=args.regrade)

    # 3. numbers
    if world.main:
        out, ordered = Path(args.out), list(records.values())
        write_records(out / "samples.jsonl", ordered)
        results = summarise(ordered, args.verifier, base)
        text = results_tables(results, ordered, args)
        write_whole(out / "results.md", text)
        bars = {b: (r["pass@1"], r["pass@1_se"]) for b, r in results.items() if b != "average"}
        plot_bars({Path(args.model).name: bars}, out / "results.png")
        write_whole(out / "results.json", json.dumps(results, indent=2) + "\n")
        print(f"{text}\n{out}/results.json, results.md, results.png, samples.jsonl")


if __name__ == "__main__":
    launch(main, parse_args(Args, None))
