"""Rows in, token batches out: loading, chat templates, ids, packing, balancing over ranks.

A *row* is a dict in LUFFY's schema (the columns of `Elliott/Openr1-Math-46k-8192`):

    data_source   str
    prompt        [{role, content}, ...]                   system and user turns
    target        [{role: "assistant", content}] or str    the teacher's trace (only where a method needs one)
    reward_model  {"style": "rule", "ground_truth": str}

GSM8K's `question` / `answer` columns are understood too (see `gsm8k_row`).

An *example* is a row as ids (`Example`); a *sequence* is a prompt and a response to train on; a `TokenBatch`
is several sequences packed into one row of tokens. Nothing is padded, and no mask is ever read off a pad id:

    sequences   [p p | r r r]  [p | r r]                   p prompt, r response (its last token is eos)
    input_ids    p p   r r      p   r                      the last response token is predicted, never read
    position_ids 0 1   2 3      0   1
    predictors     ^   ^ ^      ^   ^                      positions whose next token is a response token  [N]
    targets        r   r r      r   r                                                                     [N]
    sequence       0   0 0      1   1                      which sequence each of the N tokens belongs to [N]

Sequences that begin with the same prompt, as the answers of a group do, share its tokens: it is read once.
"""

import itertools
import json
import math
import re
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path

import jinja2
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AttentionInterface

from common.verifiers import grade

THINK = "<think>\n"
IN_A_BOX = "Please reason step by step, and put your final answer within \\boxed{}."


class InputError(ValueError):
    """What the user gave cannot be used. The message names the row, the flag and the remedy; exit code 2."""


# ---------------------------------------------------------------------------------------------------- rows


def load_rows(source: str, *, split: str = "train", limit: int | None = None) -> list[dict]:
    """Rows of a local .parquet / .json / .jsonl file, of a folder of such files, or of a Hub dataset.

    A Hub dataset is NAME or NAME:CONFIG. `split` is used for Hub names only. Raises InputError if there is no such
    thing or it holds no rows."""
    rows = list(iter_rows(source, split=split, limit=limit))
    if not rows:
        raise InputError(f"{source}: no rows")
    return rows


def iter_rows(source: str, *, split: str = "train", limit: int | None = None):
    """The same one at a time, for more rows than fit in memory (.json and .jsonl files are read whole)."""
    import datasets

    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in {".parquet", ".json", ".jsonl"})
        if not files:
            raise InputError(f"{source}: the folder holds no .parquet, .json or .jsonl file")
    elif path.is_file():
        files = [path]
    elif path.suffix in {".parquet", ".json", ".jsonl"} or source.startswith((".", "/", "~")):
        raise InputError(f"{source}: no such file or folder")
    else:
        try:
            name, _, config = source.partition(":")
            rows = datasets.load_dataset(name, config or None, split=split)
        except Exception as error:  # the hub client raises a dozen types, all of which mean the same to a user
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"{source}: neither a local file or folder nor a Hub dataset with a split '{split}' ({reason})"
            ) from error
        yield from map(dict, itertools.islice(rows, limit))
        return
    yield from itertools.islice((row for file in files for row in _read_file(file)), limit)


def _read_file(path: Path):
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
                yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a readable parquet file ({error})") from error
        return
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json" and text.lstrip().startswith("["):
            yield from json.loads(text)
            return
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not valid JSON in UTF-8 ({error})") from error
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON strings may hold U+2028
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not valid JSON ({error})") from error


def text_of(value, name: str) -> str:
    """`value`, which must be text that a tokenizer takes. Raises TypeError naming it."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is not text")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise TypeError(f"{name} holds half a character (a lone surrogate)")
    return value


def turns_of(value) -> list[dict]:
    """`value`, which must be [{role, content}, ...], with these two alone. Raises TypeError or KeyError naming it."""
    if not isinstance(value, list) or not value:
        raise TypeError("there are no turns")
    return [{name: text_of(turn[name], f"a turn's {name}") for name in ("role", "content")} for turn in value]


def gold_of(value) -> str:
    """A gold answer as text; it must be text or a number. Raises TypeError if it is not."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError("the gold answer is neither text nor a number")
    return text_of(str(value), "the gold answer")


def gsm8k_row(row: dict, *, needs_trace: bool = True) -> dict:
    """GSM8K's {question, answer: "reasoning #### 18"} in LUFFY's schema; the reasoning becomes the trace.

    Without needs_trace an answer alone will do. Raises TypeError where they are not text, or lack a part."""
    text_of(row["question"], "'question'")
    reasoning, mark, gold = text_of(row["answer"], "'answer'").rpartition("####")
    gold = gold.strip().replace(",", "") if mark else gold.strip()
    if not gold or (needs_trace and not reasoning.strip()):
        raise TypeError("'answer' is not GSM8K's: reasoning, then #### and the answer")
    return {
        "data_source": "gsm8k",
        "prompt": [{"role": "user", "content": f"{row['question']}\n\n{IN_A_BOX}"}],
        "target": [{"role": "assistant", "content": f"{THINK}{reasoning.strip()}\n</think>\n\n\\boxed{{{gold}}}"}],
        "reward_model": {"style": "rule", "ground_truth": gold},
    }


def check_verifier(name: str) -> None:
    """Raise InputError if the flag --verifier names none, or one that cannot be imported, before hours of sampling."""
    try:
        grade([""], [""], verifier=name, workers=1)
    except (ValueError, ImportError, RuntimeError) as error:
        raise InputError(f"--verifier {name}: {error}") from error


# ------------------------------------------------------------------------------------------------ examples


@dataclass
class Example:
    """One question as ids. `trace` is the teacher's response, eos included; None where the row has none."""

    prompt: list[int]
    trace: list[int] | None
    gold: str
    source: str
    index: int  # row number in the data, for messages and for random streams
    text: str  # the rendered prompt
    trace_logps: list[float] | None = None  # the teacher's own log-probs of the trace's tokens, where they are given


def render_prompt(tokenizer, messages: list[dict], template: str | None = None) -> str:
    """The prompt text that generation starts from. `template`: Jinja source; None takes the tokenizer's own."""
    if template is None and not tokenizer.chat_template:
        raise InputError(
            "the model folder's tokenizer has no chat template: pass --chat_template FILE with a Jinja template"
        )
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:  # a broken template, or one that refuses these roles
        raise InputError(f"the chat template cannot render {[m['role'] for m in messages]} turns ({error})") from error


def with_bos(ids: list[int], tokenizer) -> list[int]:
    """Ids of a text, begun with the bos that this tokenizer puts before text (Llama, DeepSeekMath; not Qwen), once."""
    bos = getattr(tokenizer, "bos_token_id", None)
    adds = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos, *ids] if adds and ids[:1] != [bos] else ids


def trace_text(prompt_text: str, trace: str) -> str:
    """A teacher's trace as the model would have to produce it after this prompt.

    `<think>\\n` belongs to the prompt where the template ends with it, and is then taken off the trace."""
    return trace.removeprefix(THINK) if prompt_text.endswith(THINK) else trace


def make_examples(
    rows: list[dict],
    tokenizer,
    *,
    source: str,
    max_prompt_tokens: int,
    max_response_tokens: int,
    traces: str = "needed",
    empty_trace: str = "error",
    long_trace: str = "reject",
    template: str | None = None,
    progress: bool = False,
) -> tuple[list[Example], dict[str, int]]:
    """Rows to examples, and a count of what was left out and why.

    traces:       "needed" (a row must have one) or "ignored" (on-policy methods, evaluation).
    empty_trace:  "error", "drop" the row, or "on_policy": keep the question without a teacher row.
    long_trace:   "reject" a trace (eos included) of more than max_response_tokens, or "cut" it as the
                  published code did, which loses the eos and the answer.
    Raises InputError naming `source`, the row and the field."""
    examples: list[Example] = []
    count = {"rows": len(rows), "prompt_too_long": 0, "trace_too_long": 0, "trace_empty": 0}
    eos = tokenizer.eos_token_id
    shared: dict[int, int] = {}

    def encode(texts: list[str]) -> list[list[int]]:  # one int object an id: a token takes 8 bytes, not 36
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [[shared.setdefault(i, i) for i in ids] for ids in encoded]

    for start in tqdm(range(0, len(rows), 500), desc="tokenize", unit_scale=500, leave=False, disable=not progress):
        part = []  # (index, data source, gold, prompt text, trace text) of 500 rows, then tokenized together
        for index, row in enumerate(rows[start : start + 500], start):
            origin, gold, messages, trace = read_row(row, f"{source}, row {index}", needs_trace=traces == "needed")
            text = render_prompt(tokenizer, messages, template)
            part.append((index, origin or source, gold, text, trace_text(text, trace)))
        prompts = encode([text for *_, text, _ in part])
        responses = encode([trace for *_, trace in part]) if traces == "needed" else [[]] * len(part)
        for (index, origin, gold, text, trace), prompt, ids in zip(part, prompts, responses, strict=True):
            if len(prompt) > max_prompt_tokens:
                count["prompt_too_long"] += 1
                continue
            if traces == "needed":
                if not trace.strip():
                    if empty_trace == "error":
                        raise InputError(
                            f"{source}, row {index}: the trace ('target') is empty; remove the row (or, with luffy.py, "
                            "pass --empty_trace drop | on_policy)"
                        )
                    count["trace_empty"] += 1
                    if empty_trace == "drop":
                        continue
                    ids = []
                elif ids[-1] != eos:
                    ids = [*ids, eos]
                if len(ids) > max_response_tokens:
                    count["trace_too_long"] += 1
                    if long_trace == "reject":
                        continue
                    ids = ids[:max_response_tokens]
            examples.append(Example(prompt, ids or None, gold, origin, index, text))
    if not examples:
        raise InputError(
            f"{source}: no row is left of {len(rows)} ({count['prompt_too_long']} prompts over "
            f"--max_prompt_tokens {max_prompt_tokens}, {count['trace_too_long']} traces over "
            f"--max_response_tokens {max_response_tokens}, {count['trace_empty']} empty traces)"
        )
    return examples, count | {"kept": len(examples)}


def read_row(row: dict, where: str, *, needs_trace: bool) -> tuple[str, str, list[dict], str]:
    """-> (data source, gold answer, prompt messages, trace text) of a row; InputError says what it lacks."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with named columns, found {type(row).__name__}")
    if "prompt" not in row and {"question", "answer"} <= row.keys():
        try:
            row = gsm8k_row(row, needs_trace=needs_trace)
        except TypeError as error:
            raise InputError(f"{where}: {error}") from error
    for column in ("prompt", "reward_model", *(("target",) if needs_trace else ())):
        if column not in row:
            raise InputError(f"{where}: column '{column}' is missing (found: {', '.join(map(str, row))})")
    try:
        target, gold = row.get("target") or "", gold_of(row["reward_model"]["ground_truth"])
        trace = target if isinstance(target, str) else target[0]["content"] or ""  # a text, or one assistant turn
        source = text_of(row.get("data_source") or "", "'data_source'")
        return source, gold, turns_of(row["prompt"]), text_of(trace, "'target'")
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(
            f"{where}: 'prompt' must be [{{role, content}}, ...], 'target' [{{role, content}}] or text, "
            f"'reward_model' {{ground_truth}} ({type(error).__name__}: {error})"
        ) from error


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of the examples of a step (0, 1, ...): epochs of a fresh permutation each, the rest dropped.

    A function of its arguments alone, so that a run goes on anywhere without a saved loader. n >= batch_size."""
    per_epoch = n // batch_size
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[position * batch_size : (position + 1) * batch_size].tolist()


def tokens_of_means(lengths: list[int], rows_per_mean: int) -> list[int]:
    """For each row the tokens of its mean: `rows_per_mean` rows in a row make one, the last may have fewer.

    >>> tokens_of_means([5, 3, 4, 4, 2], 2)
    [8, 8, 8, 8, 2]
    """
    first = [i - i % rows_per_mean for i in range(len(lengths))]
    return [sum(lengths[i : i + rows_per_mean]) for i in first]


def token_scales(lengths: list[int], rows_per_mean: int) -> list[float]:
    """For each row the weight of its tokens in the mean of token means of `rows_per_mean` rows each, as a multiple of
    their weight in one mean over all tokens: N / (M T_m) for N tokens, M means, T_m tokens of the row's mean.
    rows_per_mean 0: one mean, so 1.

    >>> token_scales([4, 1, 5], 1), token_scales([4, 1, 5], 2), token_scales([4, 1, 5], 0)
    ([0.8333333333333334, 3.3333333333333335, 0.6666666666666666], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    """
    rows_per_mean = rows_per_mean or max(1, len(lengths))
    means, total = math.ceil(len(lengths) / rows_per_mean), sum(lengths)
    return [total / (means * tokens) for tokens in tokens_of_means(lengths, rows_per_mean)]


# ------------------------------------------------------------------------------------------------- packing


BLOCK = {"cpu": 0.94, "cuda": 1.0}  # rows of a block of attention are at least so long, as a share of its longest
RAGGED = (torch.bfloat16, torch.float16)  # what CUDA's kernel for rows of any length computes in


@dataclass
class Packing:
    """How attention lays the T packed tokens out: one row a sequence, longest first, in blocks of rows of one width.

    A prompt's tokens stand in the row of every sequence that they begin. On CUDA a kernel takes rows of any length, so
    blocks hold rows of equal length. Elsewhere they hold rows of like length, right-padded. Causal attention over them
    needs no mask: a token never sees what comes after it, and what the padding cells compute is not read."""

    blocks: list[tuple[int, int]]  # rows and width of each block; C cells in all
    bounds: torch.Tensor  # [B + 1] int32: the cell at which each row begins, and the end
    cells: torch.Tensor  # [C] the token in each cell (padding: any token)
    home: torch.Tensor  # [T] the cell whose result is the token's
    copies: torch.Tensor  # [D] further cells of tokens that stand in several rows
    dense: bool  # the cells are the tokens, in order

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


def to_device(values: torch.Tensor, device) -> torch.Tensor:
    """A CPU tensor on the device. On CUDA through pinned memory: the program goes on while the GPU is still working."""
    pinned = values.pin_memory() if torch.device(device).type == "cuda" else values
    return pinned.to(device, non_blocking=True)


def pack(sequences: list[tuple[list[int], list[int]]], device="cpu") -> TokenBatch:
    """(prompt ids, response ids) pairs -> one packed batch. An empty list gives one token that predicts nothing,
    so that a rank without work still takes part in every collective. Raises ValueError on an empty prompt.

    Equal prompts are read once, by all sequences that begin with them: the answers of a group share one."""
    tokens: list[int] = []
    targets: list[int] = []
    none = torch.zeros(0, dtype=torch.long)
    positions, predictors, rows = [none], [none], []  # tensors; of rows one a sequence: the indices of its tokens
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

    like, blocks = BLOCK[torch.device(device).type], []
    parts, real = [], []  # of the cells: a row, its padding, the next row, ...
    for row in sorted(rows, key=len, reverse=True):
        if not blocks or len(row) < like * blocks[-1][1]:
            blocks.append((0, len(row)))
        count, width = blocks[-1]
        blocks[-1] = (count + 1, width)
        parts += [row, row[:1].expand(width - len(row))]
        real += [torch.ones(len(row), dtype=torch.bool), torch.zeros(width - len(row), dtype=torch.bool)]
    cells, filled = torch.cat(parts), torch.cat(real).nonzero()[:, 0]  # [C], which of them are no padding
    home = torch.full((len(tokens),), len(cells)).scatter_reduce(0, cells[filled], filled, "amin")  # a token's first
    copies = filled[home[cells[filled]] != filled]
    dense = torch.equal(cells, torch.arange(len(tokens)))
    widths = torch.tensor([0, *(width for count, width in blocks for _ in range(count))])

    def tensor(values):
        return to_device(torch.as_tensor(values, dtype=torch.long), device)

    sizes = torch.tensor([len(response) for _, response in sequences], dtype=torch.long)
    return TokenBatch(
        tensor(tokens)[None], tensor(torch.cat(positions))[None],
        Packing(blocks, tensor(widths.cumsum(0)).int(), tensor(cells), tensor(home), tensor(copies), dense),
        tensor(torch.cat(predictors)), tensor(targets), tensor(torch.arange(len(sizes)).repeat_interleave(sizes)),
    )  # fmt: skip


class _ToGrid(torch.autograd.Function):
    """[T, ...] -> [C, ...]: every cell's token. Plain indexing would do, but its backward adds C rows up one by one."""

    @staticmethod
    def forward(ctx, x, packing):
        ctx.packing = packing
        return x.index_select(0, packing.cells)

    @staticmethod
    def backward(ctx, grad):
        home, copies = ctx.packing.home, ctx.packing.copies
        out = grad.index_select(0, home)
        if len(copies):  # in float32: a prompt's gradient is a sum over its answers
            out = out.float().index_add_(0, ctx.packing.cells[copies], grad[copies].float()).to(grad.dtype)
        return out, None


class _FromGrid(torch.autograd.Function):
    """[C, ...] -> [T, ...]: every token's result."""

    @staticmethod
    def forward(ctx, x, packing):
        ctx.packing = packing
        return x.index_select(0, packing.home)

    @staticmethod
    def backward(ctx, grad):
        packing = ctx.packing
        return grad.new_zeros(len(packing.cells), *grad.shape[1:]).index_copy_(0, packing.home, grad), None


@torch.compiler.disable
def packed_attention(module, query, key, value, attention_mask, *, packing: Packing, scaling=None, **kwargs):
    """Causal attention within each packed sequence: [1, heads, T, d] -> [1, T, heads, d], a Transformers
    attention function. Every other layer works on the T packed tokens; only here they are laid out as rows."""
    window = getattr(module, "sliding_window", None)
    if window is not None and packing.width > window:
        raise ValueError(f"sequences of {packing.width} tokens exceed the model's sliding window of {window}")
    # [1, heads, T, d] -> [C, heads, d]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    q, k, v = (x if packing.dense else _ToGrid.apply(x, packing) for x in (q, k, v))
    if query.is_cuda and query.dtype in RAGGED:
        out = _ragged_attention(q, k, v, packing, scaling)
    else:
        out = _block_attention(q, k, v, packing, scaling)
    return (out if packing.dense else _FromGrid.apply(out, packing))[None], None  # [1, T, heads, d]


def _block_attention(q, k, v, packing: Packing, scaling):
    """A call for each block: [C, heads, d] -> [C, heads, d]."""

    def split(x):  # -> [rows, heads, width, d] for each block
        parts = x.split([rows * width for rows, width in packing.blocks])
        return [part.unflatten(0, block).transpose(1, 2) for part, block in zip(parts, packing.blocks, strict=True)]

    gqa = q.shape[1] != k.shape[1]
    attend = partial(F.scaled_dot_product_attention, is_causal=True, scale=scaling, enable_gqa=gqa)
    blocks = zip(split(q), split(k), split(v), strict=True)
    parts = [attend(*block).transpose(1, 2).flatten(0, 1) for block in blocks]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _ragged_attention(q, k, v, packing: Packing, scaling):
    """The same in one call, for rows of any length without padding (torch's own flash attention)."""
    from torch.nn.attention.varlen import varlen_attn  # takes 2 s to import

    gqa = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}  # 2.11 does it unasked
    return varlen_attn(
        q, k, v, packing.bounds, packing.bounds, packing.width, packing.width, scale=scaling, window_size=(-1, 0), **gqa
    )


AttentionInterface.register("packed", packed_attention)  # no mask function of that name: none is made


# ----------------------------------------------------------------------------------------------- balancing


def plan_micro_batches(lengths: list[int], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Share sequences out: plan[round][rank] = indices of the sequences of that micro-batch.

    Every micro-batch holds at most max_tokens tokens (or one longer sequence), ranks get nearly equal numbers of
    tokens, and every rank has the same number of rounds: empty lists fill up. A rank's sequences stay in order, so
    that those with the same prompt come together and share it.

    >>> plan_micro_batches([5, 4, 4, 3, 2], ranks=2, max_tokens=9)
    [[[0, 3], [1, 2]], [[4], []]]
    """
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for i in by_length:  # longest first to the least loaded rank
        rank = load.index(min(load))
        shares[rank].append(i)
        load[rank] += lengths[i]
    rounds: list[list[list[int]]] = []
    for rank, share in enumerate(shares):
        batches: list[list[int]] = []
        room = 0
        for i in sorted(share):
            if not batches or lengths[i] > room:
                batches.append([])
                room = max_tokens
            batches[-1].append(i)
            room -= lengths[i]
        for r, batch in enumerate(batches):
            if r == len(rounds):
                rounds.append([[] for _ in range(ranks)])
            rounds[r][rank] = batch
    return rounds
