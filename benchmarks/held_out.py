"""What the benchmarks that compare methods share: answers to held-out problems, and the error of a mean."""

import math
from statistics import stdev

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


def error(values: list[float]) -> float:
    """Standard error of the mean; NaN for one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
