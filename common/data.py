"""Token batches: packing, attention within packed sequences, balancing over ranks. (Rows of files: rows.py.)

A *sequence* is a prompt and a response to train on; a `TokenBatch` is several sequences packed into one row of tokens.
Nothing is padded, and no mask is ever read off a pad id:

    sequences   [p p | r r r]  [p | r r]                   p prompt, r response (its last token is eos)
    input_ids    p p   r r      p   r                      the last response token is predicted, never read
    position_ids 0 1   2 3      0   1
    predictors     ^   ^ ^      ^   ^                      positions whose next token is a response token  [N]
    targets        r   r r      r   r                                                                     [N]
    sequence       0   0 0      1   1                      which sequence each of the N tokens belongs to [N]

Sequences that begin with the same prompt, as the answers of a group do, share its tokens: it is read once.
"""

import heapq
import os
import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from common.verifiers import grade


class InputError(ValueError):
    """What the user gave cannot be used. The message names the row, the flag and the remedy; exit code 2."""


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    said = f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and lines[1:] else lines[0]
    return f"{said} is not known" if isinstance(error, KeyError) and " " not in said else said


def to_disk(path: Path) -> None:
    """Wait until everything written to a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def unrelated_to_model(error: Exception) -> bool:
    """Whether an error says nothing about the model: an InputError, out of memory, or a collective whose peer died."""
    known = isinstance(error, (InputError, torch.OutOfMemoryError, dist.DistError))
    return known or any(name in str(error) for name in ("gloo", "NCCL"))


def check_verifier(name: str) -> None:
    """Raise InputError if there is no verifier of this name or it cannot be imported: before hours of sampling."""
    try:
        grade([""], [""], verifier=name, workers=1)
    except (ValueError, ImportError, RuntimeError) as error:
        missing = f"No module named '{re.split('[:.]', name)[0]}'" in str(error)  # not one that it imports
        where = " (its file must be beside the script, or in a folder of PYTHONPATH)" if missing else ""
        raise InputError(f"--verifier {name}: {error}{where}") from error


def check_works(verifier: str, found: Sequence[tuple[str, str | None]]) -> None:
    """Raise InputError if all verdicts (status, detail) are errors: then the verifier is wrong, not the answers."""
    if found and all(status == "error" for status, _ in found):
        raise InputError(f"--verifier {verifier} failed on all {len(found)} answers ({found[0][1]}): "
                         "fix it and run the same command again")  # fmt: skip


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of the examples of a step (0, 1, ...). Each epoch is a fresh permutation; an incomplete batch is dropped.

    They depend on the arguments alone, so a run can resume at any step without a saved loader. n >= batch_size."""
    per_epoch = n // batch_size
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[position * batch_size : (position + 1) * batch_size].tolist()


def block_denominators(lengths: list[int], rows_per_mean: int) -> list[int]:
    """For each row K T: K blocks, T tokens in the row's block. Blocks are `rows_per_mean` adjacent rows (0: all rows);
    the last may have fewer. The sum over tokens of loss / (K T) is the mean over blocks of their token means.

    >>> block_denominators([5, 3, 4, 4, 2], 2), block_denominators([5, 3], 1), block_denominators([5, 3], 0)
    ([24, 24, 24, 24, 6], [10, 6], [8, 8])
    """
    size = rows_per_mean or max(1, len(lengths))
    blocks = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    return [len(blocks) * sum(block) for block in blocks for _ in block]


BLOCK = {"cpu": 0.94, "cuda": 1.0}  # shortest row of a block of attention, as a fraction of its longest
RAGGED_DTYPES = (torch.bfloat16, torch.float16)  # what CUDA's kernel for rows of any length computes in
QUERIES = 512  # queries whose scores are in memory at once in `_written_out`


@dataclass
class Packing:
    """How attention lays the T packed tokens out: a row per sequence, longest first, in blocks of rows of one width.

    A cell is one position of a row. A prompt's tokens are copied into the row of every sequence that begins with it. On
    CUDA a block's rows are equally long. On a CPU they are nearly so, and right-padded. Padding needs no mask: no token
    sees what comes after it."""

    blocks: list[tuple[int, int]]  # rows and width of each block; C cells in all
    bounds: torch.Tensor  # [B + 1] int32: the first cell of each row, and the number of cells
    cells: torch.Tensor  # [C] index into T of the token in each cell (padding: any)
    home: torch.Tensor  # [T] the first cell of each token: its attention output is the token's
    copies: torch.Tensor  # [D] the other cells of tokens that are in several rows
    shared: torch.Tensor  # [S] these tokens, in order
    copied: torch.Tensor  # [D] which of the S tokens is in each of `copies`
    dense: bool  # cells is 0 .. T-1: attention needs no reordering

    @property
    def width(self) -> int:
        return self.blocks[0][1]


@dataclass
class TokenBatch:
    """Sequences packed into one row (see the top of this file). T tokens are read, N are predicted."""

    input_ids: torch.Tensor  # [1, T]
    position_ids: torch.Tensor  # [1, T]
    packing: Packing
    predictors: torch.Tensor  # [N] index into T
    targets: torch.Tensor  # [N]
    sequence: torch.Tensor  # [N] which sequence of the list, 0 .. B-1
    largest: int  # of all ids, read or predicted


def to_device(values: torch.Tensor, device) -> torch.Tensor:
    """A CPU tensor on the device. On CUDA use pinned memory, so that the program does not wait for the GPU."""
    pinned = values.pin_memory() if torch.device(device).type == "cuda" else values
    return pinned.to(device, non_blocking=True)


def pack(sequences: list[tuple[list[int], list[int]]], device: torch.device | str = "cpu") -> TokenBatch:
    """(prompt ids, response ids) pairs -> one packed batch, which holds equal prompts once. An empty list gives one
    token that predicts nothing, so that a rank without work joins every collective. ValueError on an empty prompt.

    >>> batch = pack([([5, 6], [7, 8, 1]), ([5, 6], [9, 1])])
    >>> batch.input_ids.tolist(), batch.predictors.tolist(), batch.targets.tolist()
    ([[5, 6, 7, 8, 9]], [1, 2, 3, 1, 4], [7, 8, 1, 9, 1])
    >>> batch.packing.blocks, batch.packing.cells.tolist()  # attention's rows: 5 6 7 8, and 5 6 9
    ([(1, 4), (1, 3)], [0, 1, 2, 3, 0, 1, 4])
    """
    tokens: list[int] = []
    targets: list[int] = []
    positions: list[torch.Tensor] = []
    predictors = [torch.zeros(0, dtype=torch.long)]  # for torch.cat, if there are no sequences
    rows: list[torch.Tensor] = []  # for each sequence the indices of its tokens
    prompts: dict[tuple[int, ...], torch.Tensor] = {}
    for b, (prompt, response) in enumerate(sequences):
        if not prompt or not response:
            raise ValueError(f"sequence {b}: a prompt and a response of at least one token each are needed")
        if (key := tuple(prompt)) not in prompts:
            prompts[key] = torch.arange(len(tokens), len(tokens) + len(prompt))
            tokens += prompt
            positions.append(torch.arange(len(prompt)))
        start = len(tokens)
        tokens += response[:-1]
        targets += response
        positions.append(torch.arange(len(prompt), len(prompt) + len(response) - 1))
        rows.append(torch.cat([prompts[key], torch.arange(start, len(tokens))]))
        predictors.append(rows[-1][len(prompt) - 1 :])
    if not sequences:
        tokens, positions, rows = [0], [torch.tensor([0])], [torch.tensor([0])]

    blocks: list[list[torch.Tensor]] = []
    shortest = BLOCK[torch.device(device).type]
    for row in sorted(rows, key=len, reverse=True):
        if not blocks or len(row) < shortest * len(blocks[-1][0]):
            blocks.append([])
        blocks[-1].append(row)
    shapes = [(len(block), len(block[0])) for block in blocks]
    cells = torch.cat([pad_sequence(block, batch_first=True, padding_value=-1).flatten() for block in blocks])  # [C]
    filled = (cells >= 0).nonzero()[:, 0]  # which of them are no padding
    cells = cells.clamp(min=0)
    home = torch.full((len(tokens),), len(cells)).scatter_reduce(0, cells[filled], filled, "amin")  # a token's first
    copies = filled[home[cells[filled]] != filled]
    shared, copied = cells[copies].unique(return_inverse=True)
    dense = torch.equal(cells, torch.arange(len(tokens)))
    widths = torch.tensor([0, *(width for count, width in shapes for _ in range(count))])

    def tensor(values):
        return to_device(torch.as_tensor(values, dtype=torch.long), device)

    sizes = torch.tensor([len(response) for _, response in sequences], dtype=torch.long)
    return TokenBatch(
        tensor(tokens)[None], tensor(torch.cat(positions))[None],
        Packing(shapes, tensor(widths.cumsum(0)).int(), *map(tensor, (cells, home, copies, shared, copied)), dense),
        tensor(torch.cat(predictors)), tensor(targets), tensor(torch.arange(len(sizes)).repeat_interleave(sizes)),
        max(max(tokens), max(targets, default=0)),
    )  # fmt: skip


class _ToGrid(torch.autograd.Function):
    """[T, ...] -> [C, ...]: every cell's token. Plain indexing would do, but its backward adds C rows up one by one."""

    @staticmethod
    def forward(ctx, x, packing):
        ctx.packing = packing
        return x.index_select(0, packing.cells)

    @staticmethod
    def backward(ctx, grad):
        packing = ctx.packing
        out = grad.index_select(0, packing.home)
        if len(packing.copies):  # in float32: a prompt's gradient is a sum over its answers
            sums = out[packing.shared].float().index_add_(0, packing.copied, grad[packing.copies].float())
            out.index_copy_(0, packing.shared, sums.to(out.dtype))
        return out, None


class _FromGrid(torch.autograd.Function):
    """[C, ...] -> [T, ...]: every token's result. (No cell is read twice, so its backward may copy rows; that of plain
    indexing adds them one by one, which takes several times as long on a CPU.)"""

    @staticmethod
    def forward(ctx, x, packing):
        ctx.packing = packing
        return x.index_select(0, packing.home)

    @staticmethod
    def backward(ctx, grad):
        packing = ctx.packing
        return grad.new_zeros(len(packing.cells), *grad.shape[1:]).index_copy_(0, packing.home, grad), None


@dataclass
class Pattern:
    """Which keys of its row a query sees: what models hand to their layers in place of a mask."""

    packing: Packing
    visible: Callable  # (batch, head, query position, key position) -> bool
    local: int | None  # keys of a window or chunk; None: all that came before

    @property
    def causal(self) -> bool:
        """No row is long enough for a window to matter."""
        return self.local is None or self.packing.width <= self.local

    def __getitem__(self, all_queries) -> "Pattern":
        """Gemma 4 slices its masks to the queries whose logits are asked for, which are all."""
        return self

    def mask(self, width: int, device) -> torch.Tensor:
        """-> [width, width] bool: queries x keys."""
        i = torch.arange(width, device=device)
        return self.visible(0, 0, i[:, None], i[None])


_packing: ContextVar[Packing] = ContextVar("packing")  # of the batch that a model is reading


def packed_mask(*, mask_function, local_size=None, **_) -> Pattern:
    """A Transformers mask function."""
    if local_size is None and mask_function is not causal_mask_function:
        raise NotImplementedError("a mask that is neither causal nor a window")
    return Pattern(_packing.get(), mask_function, local_size)


def hidden_states(model, batch: TokenBatch) -> torch.Tensor:
    """Final hidden states [T, H]; the model's attn_implementation must be "packed"."""
    token = _packing.set(batch.packing)
    try:
        # this mask marks nothing as padding; without a mask Transformers would infer sequences from position_ids
        mask = torch.ones_like(batch.input_ids, dtype=torch.bool)
        out = model(input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False)
    finally:
        _packing.reset(token)
    return out.last_hidden_state[0]


COVERED = {"position_ids", "use_cache", "is_causal"}  # arguments of attention that the pattern covers already


@torch.compiler.disable
def packed_attention(
    module, query, key, value, attention_mask, *, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
    s_aux=None, **more,
):  # fmt: skip
    """Attention within each packed sequence: [1, heads, T, d] -> [1, T, heads, d], a Transformers attention function.
    Every other layer works on the T packed tokens; only here they are laid out as rows.

    sliding_window: number of keys that a query sees, its own included. softcap: scores become
    softcap * tanh(scores / softcap). s_aux: [heads], a logit for one more column of the softmax (attention sinks).
    Raises NotImplementedError if a layer hands over anything else."""
    unknown = [name for name, x in more.items() if name not in COVERED and x is not None and x is not False]
    unknown += ["dropout"] if dropout else []
    if not isinstance(attention_mask, Pattern):
        unknown.append("a mask of its own")
    elif sliding_window not in (None, attention_mask.local):
        unknown.append(f"a window of {sliding_window} beside a mask for {attention_mask.local}")
    if unknown:
        raise NotImplementedError(f"{type(module).__name__} hands {', '.join(unknown)} to attention")
    pattern, packing = attention_mask, attention_mask.packing
    # [1, heads, T, d] -> [C, heads, d]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    q, k, v = (x if packing.dense else _ToGrid.apply(x, packing) for x in (q, k, v))
    supported = (pattern.causal or sliding_window) and q.shape[-1] == v.shape[-1]  # by _ragged_attention's kernel
    if query.is_cuda and query.dtype in RAGGED_DTYPES and supported and s_aux is None and softcap is None:
        out = _ragged_attention(q, k, v, pattern, scaling)
    else:
        out = _block_attention(q, k, v, pattern, scaling, softcap=softcap, sinks=s_aux)
    return (out if packing.dense else _FromGrid.apply(out, packing))[None], None  # [1, T, heads, d]


def _block_attention(q, k, v, pattern: Pattern, scaling, *, softcap=None, sinks=None):
    """A call for each block: [C, heads, d] -> [C, heads, d]."""
    blocks, gqa = pattern.packing.blocks, q.shape[1] != k.shape[1]

    def split(x):  # -> [rows, heads, width, d] for each block
        parts = x.split([rows * width for rows, width in blocks])
        return [part.unflatten(0, block).transpose(1, 2) for part, block in zip(parts, blocks, strict=True)]

    parts = []
    for (_, width), *block in zip(blocks, split(q), split(k), split(v), strict=True):
        if softcap or sinks is not None:
            out = _written_out(*block, pattern.mask(width, q.device), scaling, softcap, sinks)
        else:
            mask = None if pattern.causal else pattern.mask(width, q.device)
            out = F.scaled_dot_product_attention(*block, mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _written_out(q, k, v, mask, scaling, softcap, sinks):
    """Compute attention with a soft cap and sinks, which SDPA lacks. The backward recomputes QUERIES at a time, so that
    the scores of a whole row are never in memory."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))

    def attend(first: int, end: int):
        scores = (q[:, :, first:end] @ k[:, :, :end].transpose(2, 3)).float() * (scaling or q.shape[-1] ** -0.5)
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        scores = scores.masked_fill(~mask[first:end, :end], -torch.inf)
        if sinks is not None:
            sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], -1)
        return scores.softmax(-1)[..., :end].to(v.dtype) @ v[:, :, :end]

    width = q.shape[2]
    pieces = [(first, min(first + QUERIES, width)) for first in range(0, width, QUERIES)]
    return torch.cat([checkpoint(attend, *piece, use_reentrant=False) for piece in pieces], 2)


def _ragged_attention(q, k, v, pattern: Pattern, scaling):
    """Compute attention with one call for rows of any length, without padding (torch's own flash attention)."""
    from torch.nn.attention.varlen import varlen_attn  # takes 2 s to import

    gqa = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}  # 2.11 does it unasked
    bounds, width = pattern.packing.bounds, pattern.packing.width
    before = -1 if pattern.causal else pattern.local - 1
    return varlen_attn(q, k, v, bounds, bounds, width, width, scale=scaling, window_size=(before, 0), **gqa)


def use_flash_attention_3() -> None:
    """Compute packed attention with FlashAttention 3's kernels from now on. Raises InputError if they cannot run."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise InputError("--flash_attention 3 needs a Hopper GPU (H100, H200)")
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(f"--flash_attention 3 needs the package flash-attn-3 (docs/gpu.md): {error}") from error


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", packed_mask)


def plan_micro_batches(lengths: list[int], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Assign sequences to micro-batches: plan[round][rank] = the indices of those in a rank's micro-batch of a round.

    A micro-batch holds at most max_tokens tokens (or one longer sequence). Ranks wait for each other in every round, so
    all micro-batches get nearly the same cost. For one rank the sequences stay in order, and so share prompts.

    >>> plan_micro_batches([5, 4, 4, 3, 2], ranks=2, max_tokens=9)
    [[[0], [3, 4]], [[1], [2]]]
    >>> plan_micro_batches([5, 4, 4, 3, 2], ranks=1, max_tokens=9)
    [[[0, 1]], [[2, 3, 4]]]
    """
    if ranks == 1:
        batches: list[list[int]] = []
        room = 0
        for i, length in enumerate(lengths):
            if not batches or length > room:
                batches.append([])
                room = max_tokens
            batches[-1].append(i)
            room -= length
        return [[batch] for batch in batches]
    rounds = -(-sum(min(n, max_tokens) for n in lengths) // (ranks * max_tokens))  # a lower bound, raised if needed
    while (bins := _fill_bins(lengths, rounds * ranks, max_tokens)) is None:
        rounds += 1 + rounds // 200
    bins.sort(key=lambda batch: -sum(cost(lengths[i]) for i in batch))
    return [bins[r * ranks : (r + 1) * ranks] for r in range(rounds)]


def cost(tokens: int) -> float:
    """Return the relative cost of a sequence in tokens: attention grows with the square of its length. (1e-4 is between
    the factors of 7B's and 1.5B's layers on an H100, 0.7e-4 and 1.9e-4.)"""
    return tokens + 1e-4 * tokens**2


def _fill_bins(lengths: list[int], n: int, max_tokens: int) -> list[list[int]] | None:
    """Put each sequence, longest first, into the cheapest bin; return the bins, or None if one does not fit."""
    bins: list[list[int]] = [[] for _ in range(n)]
    heap, room = [(0.0, b) for b in range(n)], [max_tokens] * n  # (cost, bin)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        spent, b = heap[0]
        if bins[b] and lengths[i] > room[b]:
            return None
        bins[b].append(i)
        heapq.heapreplace(heap, (spent + cost(lengths[i]), b))
        room[b] -= lengths[i]
    return [sorted(batch) for batch in bins]
