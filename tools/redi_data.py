"""Make REDI's training files from graded traces: positives.jsonl for `redi.py --stage sft`, pairs.jsonl for stage redi.

    python -m tools.redi_data                                               the paper's data, from OpenR1-Math-Raw
    python -m tools.redi_data --preset tiny --model runs/tiny-sft/model     that model's own incorrect answers, on iGSM

A row of --data is one problem with its traces, in any shape of docs/data.md. The first correct and the first
incorrect trace of a problem make a pair; blank ones do not count. What each rule left out is in funnel.json.

As published: of OpenR1-Math-Raw, valid problems whose source is not cn_k12; a trace is correct if both verifiers accept
it, so incorrect ones include those on which the verifiers disagree; positives are not filtered by length.
Departures: lengths count the tokens that are trained. The published filter counted the template's system prompt and
header as part of each trace, and left the generation prompt out of the prompt. Rows are shuffled by another generator.
"""

import dataclasses
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

import redi
from common.checkpoints import Checkpoints, digest_of
from common.data import InputError
from common.rows import Example, data_digest, encode, gold_unreadable, load_rows
from common.run import (
    Minutes,
    NotNegative,
    Positive,
    Seed,
    Share,
    check_flags,
    keep_answers,
    open_tokenizer,
    write_lines,
)
from common.shapes import IN_A_BOX, VERDICTS, Item, Trace, read_row, unfolded
from common.trainer import init_world, launch, load_policy, parse_args


@dataclass
class Args:
    preset: Literal["paper", "tiny"] = "paper"  # paper: the published data. tiny: a laptop, symbolic iGSM
    model: str = "Qwen/Qwen2.5-Math-1.5B"  # Model folder or Hub name whose template and tokens measure the lengths
    data: str = "open-r1/OpenR1-Math-Raw"  # Graded traces: file, folder, Hub name (docs/data.md) or igsm:LO-HI
    out: str = "runs/redi-data"  # Folder for positives.jsonl, pairs.jsonl and funnel.json
    igsm_problems: Positive[int] = 4000  # Problems that igsm:LO-HI makes, of LO to HI operations
    # Where the data has no incorrect (or no correct) trace of a problem, sample this many answers of --model at
    # temperature 1 and use the first of that kind. 0: none; igsm:LO-HI then gets corrupted solutions, as in redi.py
    own_answers: NotNegative[int] = 0
    drop_sources: tuple[str, ...] = ("cn_k12",)  # Values of the column 'source' to leave out
    # Which of OpenR1-Math-Raw's two verifiers must accept a trace as correct. All other traces are incorrect.
    right_if: Literal["both", "llama", "math_verify", "either"] = "both"
    # Benchmark files (or Hub names: their test split). Problems that share --ngram words in a row with one of their
    # questions are left out and counted (published: a check that left nothing out).
    decontaminate: tuple[str, ...] = ()
    ngram: Positive[int] = 13  # Words in a row for --decontaminate (published: 8)
    chat_template: str = ""  # File with a Jinja chat template. Empty: the tokenizer's own
    chat_template_args: tuple[str, ...] = ()  # Switches of the template, such as enable_thinking=false
    verifier: str = "math"  # Grader of own answers: math (LUFFY's), robust, boxed, ... or your module:function
    max_prompt_tokens: Positive[int] = 800  # Pairs with longer prompts are left out and counted.
    # Pairs with a longer trace (eos included) are left out and counted. Also the longest answer to sample
    max_response_tokens: Positive[int] = 19000
    # Sampler. embedded: in this process. vllm: a vLLM process beside each rank (docs/rollout.md). auto: vllm on CUDA
    rollout: Literal["auto", "embedded", "vllm"] = "auto"
    rollout_gpu_memory: Share[float] = 0.0  # Fraction of each GPU's memory for vLLM. 0: what is free, at most 0.7
    sampler_tokens: NotNegative[int] = 0  # Largest batch of the embedded sampler, as in redi.py
    seed: Seed = 42  # Seed of order, sampling and corruption
    timeout_minutes: Minutes = 30.0  # Abort if a rank does not respond for this many minutes.
    temperature, batch_size = 1.0, 256  # no flags: own answers are sampled, graded and saved 256 questions at a time


PRESETS = {"tiny": dict(model="models/tiny", data="igsm:5-8", out="runs/tiny-data", verifier="boxed", own_answers=4,
                        max_prompt_tokens=160, max_response_tokens=160)}  # fmt: skip


def grade_openr1(row: dict, drop_sources=("cn_k12",), right_if="both") -> list[bool] | str:
    """Return for each generation of a row of OpenR1-Math-Raw whether it is correct ([] for a row of other data), or the
    name of the rule that leaves the row out. A verdict that is null rejects."""
    generations, correctness = (unfolded(name, row.get(name)) for name in ("generations", "correctness"))
    if correctness is None and (generations is None or row.get("correctness_math_verify")):  # other data, with nulls
        row = {name: value for name, value in row.items() if value is not None}
    if str(row.get("problem_is_valid", "yes")).strip().lower() != "yes":
        return "problem not valid"
    if row.get("source") in drop_sources:
        return "source left out"
    if not {"generations", "correctness"} <= row.keys():
        return []
    if not row.get("problem"):
        return "no problem"
    if not generations or not isinstance(generations, list):
        return "no generations"
    correctness = correctness if isinstance(correctness, dict) else {}
    names = [name for name in VERDICTS if name.startswith(right_if)] or VERDICTS  # both and either read both verifiers
    verdicts = [correctness.get(name) for name in names]
    if not all(isinstance(v, list) and len(v) == len(generations) for v in verdicts):
        return "not a verdict of each verifier for each generation"
    return [(any if right_if == "either" else all)(marks) for marks in zip(*verdicts, strict=True)]


def read_problem(row: dict, where: str, args: Args) -> Item | str:
    """Return a row as an item with its first correct and first incorrect trace, or the rule that leaves it out."""
    graded = grade_openr1(row, args.drop_sources, args.right_if) if isinstance(row, dict) else []
    if isinstance(graded, str):
        return graded
    if args.right_if != "both" and not graded:
        raise InputError(f"{where}: --right_if {args.right_if} reads OpenR1-Math-Raw's column 'correctness'")
    if graded:  # as a row of OpenR1-Math-220k, whose traces have one mark each
        row = row | {"correctness": None, "correctness_math_verify": graded}
    item = read_row(row, where)
    item.source = str(row.get("source") or item.source)
    item.traces = [t for t in (item.first(correct=True), item.first(correct=False)) if t and not t.blank]
    return item


def row_of(problem: Item, **traces: Trace) -> dict:
    """Return a row of an output file, with these traces by column."""
    gold = {"style": "rule", "ground_truth": problem.gold}
    row = {"data_source": problem.source, "prompt": problem.prompt, "reward_model": gold}
    row |= {"prompt_text": problem.text} if problem.text else {}  # rendered already
    row |= {"weight": problem.weight} if problem.weight != 1 else {}
    row |= {name: trace.text for name, trace in traces.items()}
    return row | {f"{name}_ids": trace.ids for name, trace in traces.items() if trace.ids is not None}


def word_ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """Return the n-grams of words of a text, in lower case; a shorter text is one n-gram. The request for a box is left
    out, because all data sets share it.

    >>> sorted(word_ngrams("How  many are THERE", 3)), word_ngrams("Two", 3)
    ([('how', 'many', 'are'), ('many', 'are', 'there')], {('two',)})
    """
    words = text.replace(IN_A_BOX, "").lower().split()
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))} - {()}


def benchmark_ngrams(args: Args) -> dict[str, set[tuple[str, ...]]]:
    """{benchmark of --decontaminate: the n-grams of its questions}."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for source in args.decontaminate:
        for index, row in enumerate(load_rows(source, split="test")):
            question = read_row(row, f"--decontaminate {source}, row {index}").question
            found.setdefault(source, set()).update(word_ngrams(question, args.ngram))
    return found


def read_problems(args: Args, redi_args: redi.Args, progress: bool) -> tuple[list[Item], dict[str, int]]:
    """Return the problems of --data in random order, and the funnel: {"rows": their number, rule: -(rows left out)}."""
    benchmarks = benchmark_ngrams(args)
    if args.own_answers:
        redi_args = dataclasses.replace(redi_args, stage="sft")  # iGSM solutions are not corrupted
    problems, dropped = [], Counter()
    rows = tqdm(redi.read_rows(redi_args), desc="rows", leave=False, disable=not progress)
    for index, row in enumerate(rows):
        found = read_problem(row, f"{args.data}, row {index}", args)
        if not isinstance(found, str) and benchmarks:
            ngrams = word_ngrams(found.question, args.ngram)
            hits = (f"shares {args.ngram} words with {name}" for name, known in benchmarks.items() if ngrams & known)
            found = next(hits, found)
        if isinstance(found, str):
            dropped[found] += 1
        else:
            problems.append(found)
    random.Random(args.seed).shuffle(problems)
    return problems, {"rows": len(problems) + dropped.total()} | {rule: -n for rule, n in sorted(dropped.items())}


def add_own_answers(problems: list[Item], tokenizer, args: Args, world) -> None:
    """Sample answers of --model to the problems that lack a correct or an incorrect trace, and add them as traces.
    Counts go to own_answers.json. If the command is killed, the same command resumes.

    Answers that were cut or not graded are left out, as are problems with prompts over --max_prompt_tokens."""

    def lacking(problem: Item, where: str) -> tuple[Item] | None:
        if problem.first(correct=True) and problem.first(correct=False):
            return None
        if not problem.gold:
            raise InputError(f"{args.data}: --own_answers grades by 'reward_model' or 'answer', and a row has neither")
        return (problem,)

    source = f"{args.data}, shuffled"
    asked = [
        Example(prompt, None, problem.gold, source, index, text)
        for index, problem, text, prompt in encode(problems, tokenizer, lacking, source=source)
        if len(prompt) <= args.max_prompt_tokens
    ]
    fixed = {name: value for name, value in dataclasses.asdict(args).items() if name not in Checkpoints.FREE}
    digest = data_digest([(json.dumps(fixed), digest_of(args.model))], ((e.prompt, e.gold) for e in asked))
    kept = Path(args.out) / f"own_answers-{digest}.jsonl"  # other settings, data or weights have another file
    answers = keep_answers(
        kept, asked, lambda: load_policy(args.model, world), {}, tokenizer, args, world, n=args.own_answers
    )
    count, tokens = dict.fromkeys(("right", "wrong", "cut short", "not graded"), 0), 0
    for example, drawn in zip(asked, answers, strict=True):
        for answer in drawn:
            kind, ids = kind_of(answer), answer["response_ids"]
            count[kind] += 1
            tokens += len(ids)
            if kind in ("right", "wrong"):
                trace = Trace(tokenizer.decode(ids[:-1]), float(kind == "right"), ids)
                problems[example.index].traces.append(trace)
    if world.main:
        write_lines(Path(args.out) / "own_answers.json", [count | {"tokens": tokens}])
        print("own answers:", ", ".join(f"{n} {name}" for name, n in count.items()))


def kind_of(answer: dict) -> str:
    """Return what an own answer counts as."""
    if answer["truncated"]:
        return "cut short"
    if answer["status"] in ("timeout", "error") or gold_unreadable(answer["detail"]):
        return "not graded"
    return "right" if answer["reward"] > 0 else "wrong"


def main(args: Args) -> None:
    """Write positives.jsonl, pairs.jsonl and funnel.json; print the funnel."""
    check_flags(args)
    world = init_world(args.timeout_minutes)
    tokenizer = open_tokenizer(args.model, args)
    redi_args = redi.Args(
        data=args.data, igsm_problems=args.igsm_problems, seed=args.seed, bad_rows="drop",
        max_prompt_tokens=args.max_prompt_tokens, max_response_tokens=args.max_response_tokens,
    )  # fmt: skip
    problems, funnel = read_problems(args, redi_args, world.main)
    if args.own_answers:
        add_own_answers(problems, tokenizer, args, world)
    found = [(p, p.first(correct=True), p.first(correct=False)) for p in problems]
    positives = [(p, correct) for p, correct, _ in found if correct]
    rows = [row_of(p, chosen=correct, rejected=wrong) for p, correct, wrong in found if correct and wrong]
    funnel |= {"no right trace": len(positives) - len(problems), "positives.jsonl": len(positives)}
    funnel |= {"no wrong trace": len(rows) - len(positives)}
    if not rows:
        hint = "" if args.own_answers or not positives else "; --own_answers samples wrong ones of --model"
        raise InputError(f"{args.data}: no pair is left ({funnel}){hint}")

    pairs, count = redi.make_pairs(rows, tokenizer, redi_args, source=f"{args.data}, shuffled", progress=world.main)
    funnel |= {name.replace("_", " "): -n for name, n in count.items() if name not in ("rows", "kept")}
    funnel |= {"pairs.jsonl": len(pairs)}
    if world.main:
        out = Path(args.out)
        # 'target' for LUFFY's readers; 'chosen' where ids must be kept too
        targets = [row_of(p, **{"target" if trace.ids is None else "chosen": trace}) for p, trace in positives]
        write_lines(out / "positives.jsonl", targets)
        write_lines(out / "pairs.jsonl", [rows[pair.index] for pair in pairs])
        write_lines(out / "funnel.json", [funnel])
        print("\n".join(f"{n:>+10,}  {name}" if n <= 0 else f"{n:>10,}  {name}" for name, n in funnel.items()))


if __name__ == "__main__":
    launch(main, parse_args(Args, None, preset=PRESETS))
