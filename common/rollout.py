"""Prompts (ids) in, completions (ids, log-probs, why they ended) out.

    sampler = EmbeddedSampler(policy, ...)
    sampler.sync(policy, version=step)                  weights in; nothing can be drawn before it
    groups = sampler.generate(prompts, n=8, keys=keys, seed=seed, sampling=Sampling(...))

Every completion has a random stream of its own, keyed by (seed, key of its prompt, its place in the group).
What is drawn therefore depends on the weights alone: not on the number of ranks, on how prompts are batched
or on which rows finish first, up to a draw that float rounding tips (about one token in a million).
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache

from common.trainer import Policy, full_parameters


@dataclass(frozen=True)
class Sampling:
    """How to draw: temperature 0 is greedy; top_p keeps the likeliest tokens that hold that much mass."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass
class Completion:
    """One answer. `logps` are those of the model at the sampling temperature (1 if greedy), before top_p."""

    ids: list[int]  # eos included where it was drawn
    logps: list[float]
    finish: str  # "stop": eos was drawn; "length": max_tokens were

    @property
    def truncated(self) -> bool:
        return self.finish == "length"


class EmbeddedSampler:
    """Batched decoding with a whole copy of the policy on this rank's device: no server, nothing to install.

    Ranks never wait for each other's tokens. Right for tiny models and for machines without vLLM."""

    def __init__(self, policy: Policy, *, stop_ids: list[int], max_batch_tokens: int = 65536):
        """stop_ids: ids that end a completion. max_batch_tokens bounds rows x (prompt + max_tokens) at once."""
        self.device = next(policy.parameters()).device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        config = copy.deepcopy(policy.lm.config)
        lm = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation="sdpa")
        lm.tie_weights()
        self.lm: nn.Module = lm.to(self.device).eval().requires_grad_(False)
        self.stop_ids = torch.tensor(sorted(set(stop_ids)), device=self.device)
        self.max_batch_tokens = max_batch_tokens
        self.version: int | None = None

    @torch.no_grad()
    def sync(self, policy: Policy, version: int) -> None:
        """Copy the policy's current weights in (a collective: shards are gathered one tensor at a time)."""
        mine = dict(self.lm.named_parameters())
        for name, value in full_parameters(policy):
            mine[name].copy_(value)
        self.version = version

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        *,
        n: int | list[int],
        keys: list[int],
        seed: int,
        sampling: Sampling,
        progress: str | None = None,
    ) -> list[list[Completion]]:
        """n (or n[i]) completions of each prompt, in order. keys: one int a prompt, naming its random stream.

        Raises RuntimeError before the first sync, ValueError on an empty prompt."""
        if self.version is None:
            raise RuntimeError("the sampler has no weights yet: call sync() before generate()")
        if not all(prompts):
            raise ValueError("an empty prompt cannot be continued")
        counts = [n] * len(prompts) if isinstance(n, int) else n
        groups: list[list[Completion]] = [[] for _ in prompts]
        bar = tqdm(total=sum(counts), desc=progress, unit="answer", leave=False, disable=progress is None)
        # prompts of like length go together, and as many rows as the budget of tokens allows
        batch: list[int] = []
        for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
            width = len(prompts[batch[0] if batch else i]) + sampling.max_tokens
            if batch and (sum(counts[j] for j in batch) + counts[i]) * width > self.max_batch_tokens:
                self._generate_batch(batch, prompts, counts, keys, seed, sampling, groups, bar)
                batch = []
            batch.append(i)
        if batch:
            self._generate_batch(batch, prompts, counts, keys, seed, sampling, groups, bar)
        bar.close()
        return groups

    def _generate_batch(self, batch, prompts, counts, keys, seed, sampling, groups, bar) -> None:
        device, width = self.device, max(len(prompts[i]) for i in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for b, i in enumerate(batch):  # left-padded, so that all rows go on at the same column
            ids[b, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[b, width - len(prompts[i]) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        position = (mask.cumsum(1) - 1).clamp(min=0)  # [b, width]
        cache = DynamicCache(config=self.lm.config)
        hidden = self._hidden(ids, mask, position, cache)  # each prompt is read once ...
        rows = [(i, j) for i in batch for j in range(counts[i])]
        expand = torch.tensor([b for b, i in enumerate(batch) for _ in range(counts[i])], device=device)
        cache.batch_select_indices(expand)  # ... and shared by its completions
        hidden, position, mask = hidden[expand], position[expand, -1], mask[expand]
        mask = torch.cat([mask, mask.new_ones(len(rows), sampling.max_tokens)], 1)
        uniforms = None
        if sampling.temperature > 0:
            draws = [
                np.random.default_rng((seed, keys[i], j)).random(sampling.max_tokens, dtype=np.float32)
                for i, j in rows
            ]
            uniforms = torch.from_numpy(np.stack(draws)).to(device)  # [rows, max_tokens]

        drawn = torch.zeros(len(rows), sampling.max_tokens, dtype=torch.long, device=device)
        logps = torch.zeros(len(rows), sampling.max_tokens, device=device)
        length = torch.full((len(rows),), sampling.max_tokens, device=device)
        live = torch.arange(len(rows), device=device)  # rows still being written; the batch holds just these
        done = torch.zeros(len(rows), dtype=torch.bool, device=device)  # of the live ones
        for t in range(sampling.max_tokens):
            u = uniforms[live, t] if uniforms is not None else None
            token, logp = draw(self.lm.get_output_embeddings()(hidden).float(), u, sampling)
            drawn[live, t], logps[live, t] = token, logp
            stopped = torch.isin(token, self.stop_ids) & ~done
            length[live[stopped]] = t + 1
            done |= stopped
            finished = int(done.sum())
            if finished == len(live) or t + 1 == sampling.max_tokens:
                break
            if finished * 4 >= len(live):  # drop finished rows once they are a quarter: dropping copies the cache
                keep = (~done).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                live, token, position, mask, done = live[keep], token[keep], position[keep], mask[keep], done[keep]
                bar.update(finished)
            position = position + 1
            hidden = self._hidden(token[:, None], mask[:, : width + t + 1], position[:, None], cache)
        bar.update(len(live))
        drawn, logps, length = drawn.tolist(), logps.tolist(), length.tolist()
        stop_ids = set(self.stop_ids.tolist())
        for (i, _), row, row_logps, count in zip(rows, drawn, logps, length, strict=True):
            finish = "stop" if row[count - 1] in stop_ids else "length"
            groups[i].append(Completion(row[:count], row_logps[:count], finish))

    def _hidden(self, ids, mask, position, cache):
        """Final hidden state of each row's last token, [b, H]; the cache grows by ids' tokens."""
        decoder = self.lm.get_decoder()
        out = decoder(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        )
        return out.last_hidden_state[:, -1]

    def close(self) -> None:
        """Free the copy of the weights."""
        self.lm = None  # type: ignore[assignment]


def draw(logits: torch.Tensor, uniforms: torch.Tensor | None, sampling: Sampling):
    """logits [b, V] float32, uniforms [b] in [0, 1) -> tokens [b] and their log-probs [b].

    By the inverse of the cumulative distribution, summed in float64: one uniform number a token, and a token
    of probability zero is never drawn. uniforms None takes the likeliest token."""
    if uniforms is None:
        logp = torch.log_softmax(logits, -1)
        token = logp.argmax(-1)
    else:
        logp = torch.log_softmax(logits / sampling.temperature, -1)
        p = logp.exp().double()
        if sampling.top_p < 1.0:
            p_sorted, order = p.sort(dim=-1, descending=True, stable=True)
            before = p_sorted.cumsum(-1) - p_sorted  # mass of the likelier ones: the first is always kept
            p = p.masked_fill((before >= sampling.top_p).gather(-1, order.argsort(-1)), 0.0)
        cdf = p.cumsum(-1)
        target = uniforms.double()[:, None] * cdf[:, -1:]
        token = torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None])[:, 0]
