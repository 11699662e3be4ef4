"""What the benchmarks that compare methods share: answers to held-out problems, and means over seeds."""

import json
import math
from pathlib import Path

import luffy
from common.rollout import EmbeddedSampler, Sampling
from common.rows import read_examples
from common.trainer import init_world, load_policy, load_tokenizer, parse_args
from common.verifiers import grade


def drawn(
    model: str, source: str, problems: int, *, tries: int = 8, temperature: float = 1.0, max_tokens: int = 160,
    seed: int = 12345, verifier: str = "boxed", name: str = "", progress: bool = True,
) -> list[list[tuple[list[int], list[int], float]]]:
    """(prompt, answer, reward) of each of `tries` answers to each of the first `problems` held-out problems of a source
    (a file, or igsm:LO-HI): [problems][tries], prompts and answers as ids. The same seed asks every model with the same
    random streams."""
    world, tokenizer = init_world(), load_tokenizer(model)
    flags = ["--preset", "tiny", "--max_prompt_tokens", "1024"]
    args = parse_args(luffy.Args, flags, method=luffy.METHODS, preset=luffy.PRESETS)
    examples, _ = read_examples(source, tokenizer, args, split="test", traces="ignored", limit=problems)
    policy = load_policy(model, world)
    sampler = EmbeddedSampler(policy, stop_ids=[tokenizer.eos_token_id])
    sampler.sync(policy, version=0)
    groups = sampler.generate(
        [e.prompt for e in examples], n=tries, keys=[e.index for e in examples], seed=seed,
        sampling=Sampling(max_tokens, temperature), progress=f"evaluate {name or model}" if progress else None,
    )  # fmt: skip
    texts = [tokenizer.decode(c.text_ids) for group in groups for c in group]
    golds = [e.gold for e in examples for _ in range(tries)]
    rewards = iter(v.reward for v in grade(texts, golds, verifier=verifier))
    return [[(e.prompt, c.ids, next(rewards)) for c in group] for e, group in zip(examples, groups, strict=True)]


def answers(model: str, source: str, problems: int, **how) -> list[list[tuple[float, int]]]:
    """(reward, tokens) of each answer, [problems][tries]; `how` as in `drawn`."""
    return [[(reward, len(ids)) for _, ids, reward in group] for group in drawn(model, source, problems, **how)]


def solve_rates(model: str, source: str, problems: int, **how) -> list[float]:
    """Share of right answers to each held-out problem, [problems]; `how` as in `answers`."""
    return [mean([reward for reward, _ in group]) for group in answers(model, source, problems, **how)]


def mean(values) -> float:
    """Of at least one value."""
    values = list(values)
    return math.fsum(values) / len(values)  # from Python 3.12 on `sum` rounds otherwise


def error(values) -> float:
    """Standard error of the mean; NaN for one value."""
    values = list(values)
    if len(values) < 2:
        return math.nan
    return math.sqrt(math.fsum((v - mean(values)) ** 2 for v in values) / (len(values) - 1) / len(values))


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (of the sample; 0 for one value)."""
    return mean(values), error(values) * math.sqrt(len(values)) if len(values) > 1 else 0.0


def cell(values: list[float]) -> str:
    """Mean ± standard deviation over seeds, where there are some."""
    middle, spread = mean_and_spread(values)
    return f"{middle:.1f}" + (f" ± {spread:.1f}" if len(values) > 1 else "")


def save(results: dict, table: str, path: str) -> Path:
    """Write PATH.json and PATH.md -> PATH, for the plot beside them."""
    found = Path(path)
    found.parent.mkdir(parents=True, exist_ok=True)
    found.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    found.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    return found
