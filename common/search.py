"""Search at test time, guided by a value model, which can judge an unfinished text before there is an answer.

    found = search_answers("beam", sampler, value, prompts, keys, world, width=5, ...)      [questions][answers]

best_of_n    `width` whole answers; the value chooses one
beam         `width` next steps of each of `width` states; the value chooses the states to continue, and the answer
best_of_k    `width` next steps of one state; the value chooses the one to continue

The value model reads the text so far. The eos of a finished answer is removed, because a token-level value model is
not trained on the state after it (oreo.py). Steps end with a token that holds a delimiter, such as a newline.
"""

from dataclasses import dataclass

import torch

from common.data import InputError, pack, plan_micro_batches
from common.rollout import Sampling
from common.trainer import gather_lists


@dataclass
class Candidate:
    """A state of the search: a question's response so far."""

    response: list[int]
    finished: bool = False
    value: float = 0.0


def select_beam(values: list[float], finished: list[bool], width: int, *, compete: bool = False):
    """One question's candidates -> indices of those that go on, best first, and of its new answers (finished ones).

    The `width` best that are not finished go on. With `compete` only the `width` best of all are kept.

    >>> select_beam([0.2, 0.9, 0.7, 0.5], [False, True, False, False], 2)
    ([2, 3], [1])
    >>> select_beam([0.2, 0.9, 0.7, 0.5], [False, True, False, False], 2, compete=True)
    ([2], [1])
    """
    best = sorted(range(len(values)), key=lambda i: -values[i])
    if compete:
        best = best[:width]
    going = [i for i in best if not finished[i]]
    return going[:width], sorted(i for i in best if finished[i])


def beam_search(questions: int, sample, score, *, width: int, max_steps: int, compete: bool = False):
    """Step-level beam search: -> each question's answers, as a list of Candidates that may be empty.

    sample(states, step): the next steps of every state (question, Candidate), as lists of Candidates.
    score(states): their values. A state starts as the empty response, so the first step has the fewest candidates.
    """
    beams = [[Candidate([])] for _ in range(questions)]
    answers = [[] for _ in range(questions)]
    for step in range(max_steps):
        states = [(q, state) for q, beam in enumerate(beams) for state in beam]
        if not states:
            break
        new = [(q, c) for (q, _), group in zip(states, sample(states, step), strict=True) for c in group]
        for (_, candidate), value in zip(new, score(new), strict=True):
            candidate.value = value
        for q in range(questions):
            group = [candidate for p, candidate in new if p == q]
            kept, done = select_beam([c.value for c in group], [c.finished for c in group], width, compete=compete)
            beams[q] = [group[i] for i in kept]
            answers[q] += [group[i] for i in done]
    return answers


def step_ids(tokenizer, delimiters: tuple[str, ...]) -> frozenset[int]:
    """Ids of the tokens that end a step: those whose text holds a delimiter.

    Raises InputError for a delimiter that no token holds, that is empty, or a backslash and an n."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    for delimiter in delimiters:
        if delimiter in ("", "\\n") or not any(delimiter in text for text in texts):
            raise InputError(f"--step_delimiters {delimiter!r}: each must be text that one token holds; for a newline "
                             "write $'\\n' in the shell, not '\\n'")  # fmt: skip
    return frozenset(i for i, text in enumerate(texts) if any(d in text for d in delimiters))


def step_starts(response: list[int], ends: frozenset[int]) -> list[bool]:
    """Return where a step starts: at the first token, and after every token that ends a step.

    >>> step_starts([7, 8, 2, 2, 9], frozenset([2]))
    [True, False, False, True, True]
    """
    return [i == 0 or response[i - 1] in ends for i in range(len(response))]


@torch.no_grad()
def state_values(value, states: list[list[int]], world, micro_batch_tokens: int) -> list[float]:
    """Return V of each text (ids). A collective: every rank passes all texts, computes some and gets all values."""
    values = []  # (index of the text, its value)
    for by_rank in plan_micro_batches([len(ids) for ids in states], world.size, micro_batch_tokens):
        mine = by_rank[world.rank]
        batch = pack([(states[i], [0]) for i in mine], world.device)  # the token that is predicted is never read
        values += zip(mine, value(batch).tolist(), strict=True)
    return [v for _, v in sorted(gather_lists(values, world))]


def search_answers(
    kind: str, sampler, value, prompts: list[list[int]], keys: list[int], world, *, width: int, max_steps: int,
    max_tokens: int, step_ends: frozenset[int], micro_batch_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
    seed: int = 0,
) -> list[list[Candidate]]:  # fmt: skip
    """The answers that a search finds to each prompt within max_steps, [prompts][answers]. A collective: every rank
    passes all prompts and gets all answers. keys: an int for each prompt, for its draws. step_ends: see step_ids."""
    eos, whole = set(map(int, sampler.stop_ids)), kind == "best_of_n"
    stops = () if whole else tuple(sorted(step_ends))

    def sample(states, step):
        mine = range(world.rank, len(states), world.size)
        first: dict[int, int] = {}  # a question's states are neighbours
        place = [i - first.setdefault(question, i) for i, (question, _) in enumerate(states)]
        room = [max_tokens - len(states[i][1].response) for i in mine]
        groups = sampler.generate(
            [prompts[states[i][0]] + states[i][1].response for i in mine], n=width,
            keys=[keys[states[i][0]] * 1000 + place[i] for i in mine],  # draws do not depend on the other questions
            seed=seed * 1_000_003 + step, sampling=Sampling(room, temperature, top_p, stops),
            progress=f"step {step + 1}" if world.main else None,
        )  # fmt: skip
        drawn = sorted(gather_lists([(i, [c.ids for c in g]) for i, g in zip(mine, groups, strict=True)], world))
        found = []
        for (_, state), (_, steps) in zip(states, drawn, strict=True):
            longer = [state.response + ids for ids in steps]
            found.append([Candidate(ids, ids[-1] in eos or len(ids) == max_tokens) for ids in longer])
        return found

    def score(states):
        texts = [prompts[q] + (c.response[:-1] if c.response[-1] in eos else c.response) for q, c in states]
        return state_values(value, texts, world, micro_batch_tokens)

    return beam_search(
        len(prompts), sample, score, width=1 if kind == "best_of_k" else width, max_steps=1 if whole else max_steps,
        compete=kind == "best_of_k",
    )  # fmt: skip
