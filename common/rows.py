"""Data files -> rows -> items -> examples: files, chat templates, ids.

A *row* is one object of a file; common/shapes.py turns it into an *item*: the turns that ask the question, the gold
answer, and traces. An *example* is an item as ids. A row that does not fit is counted, or named in an InputError.
"""

import contextlib
import csv
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from tqdm import tqdm

import igsm
from common.data import InputError, first_line
from common.shapes import MARKS, Item, Trace, check_gold, read_row

IGSM = dict(style="symbolic", modulus=23, max_params=4, max_literal=9, shuffle=False, subgoals=True)  # of igsm:LO-HI
ENDINGS = (".parquet", ".jsonl", ".json", ".csv")  # the last three also with .gz
ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
CAPITAL = re.compile("(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # where a word begins: Math|Train, MATH|Test
SPLIT = re.compile(  # in names of files: math_train, trainset
    r"(?<![a-z])(train(?:ing)?|test(?:ing)?|eval(?:uation)?|val(?:id(?:ation)?)?|dev)(?:_?sets?)?(?![a-z])"
)


def load_rows(source: str, *, split: str = "train", limit: int | None = None, problems: int = 1000) -> list[dict]:
    """Return the rows of `source`; see `iter_rows`. Raises InputError if it does not exist or holds no rows."""
    rows = list(iter_rows(source, split=split, limit=limit, problems=problems))
    if not rows:
        raise InputError(f"{source}: no rows")
    return rows


def iter_rows(source: str, *, split: str = "train", limit: int | None = None, problems: int = 1000) -> Iterator[dict]:
    """Yield the rows of a file, a folder of files or from `save_to_disk`, a Hub dataset (NAME or NAME:CONFIG), or
    igsm:LO-HI.

    split: of a dataset, of igsm problems, and of a folder that holds files of several splits.
    problems: how many problems igsm:LO-HI has if there is no `limit`."""
    path = Path(source)
    if not source:
        raise InputError("--data or --eval_data is empty")
    if re.search("[\ud800-\udfff]", source):  # bytes that are no text; tables and plots name a benchmark by its file
        raise InputError(f"{source}: the name is not UTF-8: rename it, or export PYTHONUTF8=1")
    if source.startswith("igsm:"):
        rows = _igsm_rows(source, split, limit or problems)
    elif path.is_dir() and ((path / "dataset_dict.json").exists() or any(path.glob("*.arrow"))):
        rows = _dataset_rows(source, split, saved=True)
    elif path.is_dir():
        rows = itertools.chain.from_iterable(map(_read_file, _files_of_split(path, split)))
    elif path.is_file():
        rows = _read_file(path)
    elif _ending(path) or source.startswith((".", "/", "~")):
        raise InputError(f"{source}: no such file or folder")
    else:
        rows = _dataset_rows(source, split)
    yield from itertools.islice(rows, limit)


def _igsm_rows(source: str, split: str, n: int) -> Iterator[dict]:
    try:
        lo, hi = (int(x) for x in source.removeprefix("igsm:").split("-"))
        for problem in igsm.problems(n, ops=(lo, hi), split=split, **IGSM):
            yield igsm.row(problem, split)
    except ValueError as error:
        raise InputError(f"{source}: expected igsm:LO-HI, as in igsm:5-6 ({error})") from error


def _dataset_rows(source: str, split: str, saved: bool = False) -> Iterator[dict]:
    """Read with the library `datasets`: a Hub dataset, or a folder that its `save_to_disk` wrote."""
    import datasets

    name, _, config = source.partition(":")
    try:
        splits = datasets.load_from_disk(source) if saved else datasets.load_dataset(name, config or None)
    except Exception as error:  # the library raises a dozen types, all of which mean the same to a user
        what = "what save_to_disk wrote cannot be read" if saved else "neither a local file or folder nor a Hub dataset"
        raise InputError(f"{source}: {what} ({first_line(error)})") from error
    splits = {"": splits} if isinstance(splits, datasets.Dataset) else splits
    rows = _of_split(splits, split)
    if rows is None:
        raise InputError(f"{source}: there is no split '{split}' ({', '.join(splits)})")
    types = getattr(rows, "features", {})
    short = [name for name, kind in types.items() if getattr(kind, "dtype", "") == "float32"]
    return (row | {name: row[name] and float(str(np.float32(row[name]))) for name in short} for row in map(dict, rows))


def _of_split(splits: dict, split: str):
    """Return the only value of splits, or splits[split] (of "validation" if "test" is missing), or None."""
    wanted = "validation" if split == "test" and "test" not in splits else split
    return next(iter(splits.values())) if len(splits) == 1 else splits.get(wanted)


def _ending(path: Path) -> str:
    """The ending of a file that can be read, in lower case and without .gz; "" for other files."""
    name = path.name.lower().removesuffix(".gz")
    return next((e for e in ENDINGS if name.endswith(e) and not path.name.lower().endswith(".parquet.gz")), "")


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """Return the data files of a folder; if their names say different splits, those of `split` (`_of_split`).

    Copies that editors keep (.ipynb_checkpoints) and what `datasets` writes about its files are left out."""
    by_split: dict[str, list[Path]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and _ending(p) and p.name not in ABOUT_DATA):
        inside = path.relative_to(folder)
        if not any(part.startswith((".", "__")) for part in inside.parts):
            word = (SPLIT.findall(CAPITAL.sub("_", str(inside)).lower()) or [""])[-1]
            kind = {"tr": "train", "te": "test", "ev": "test", "va": "validation", "de": "validation"}.get(word[:2], "")
            by_split.setdefault(kind, []).append(path)
    if not by_split:
        raise InputError(f"{folder}: the folder holds no {', '.join(ENDINGS)} file")
    paths = _of_split(by_split, split)
    if paths is None or (len(by_split) > 1 and "" in by_split):
        found = "; ".join(f"{kind or 'no split'}: {', '.join(p.name for p in ps)}" for kind, ps in by_split.items())
        raise InputError(f"{folder}: unclear which files are the split '{split}' ({found}): name the file")
    return paths


def _read_file(path: Path) -> Iterator[dict]:
    ending = _ending(path)
    if not ending:
        raise InputError(f"{path}: cannot be read; data files end in {', '.join(ENDINGS)} (the last three also + .gz)")
    if ending == ".parquet":
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
                for i, field in enumerate(batch.schema):
                    if pyarrow.types.is_float32(field.type) or pyarrow.types.is_decimal(field.type):
                        column = batch.column(i).cast("string").cast("float64")  # 0.1, not 0.10000000149011612
                        batch = batch.set_column(i, field.name, column)
                yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:
            raise InputError(f"{path}: not a readable parquet file ({error})") from error
        return
    where = str(path)
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.name.lower().endswith(".gz") else content
        text = content.decode("utf-8-sig")  # without the byte order mark that some editors write
        if ending == ".csv":
            csv.field_size_limit(2**31 - 1)
            table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            named = [name for name in table.fieldnames or () if name]
            if len({*named}) < len(named):
                raise ValueError(f"the header names a column twice: {', '.join(named)}")
            for row in table:
                if any(row.pop(None, ())):
                    raise ValueError(f"line {table.line_num} has more cells than the header: quote cells with commas")
                yield _csv_row(row)
        elif ending == ".json" and text.lstrip().startswith("["):
            yield from json.loads(text)
        else:
            for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON strings may hold U+2028
                where = f"{path}, line {number}"
                if line.strip():
                    yield json.loads(line)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError, MemoryError, csv.Error) as error:
        wanted = "" if ending == ".csv" else "; a file holds one row a line, or a list [...] of rows"
        raise InputError(f"{where}: not valid {ending[1:].upper().rstrip('L')} in UTF-8 ({error}{wanted})") from error


def _csv_row(row: dict) -> dict:
    """A row of a .csv file: an empty cell holds nothing, and marks and the weight are numbers."""
    row = {name: value for name, value in row.items() if value}
    for name in [name for name in row if name.lower() in {*MARKS, "weight"}]:
        with contextlib.suppress(ValueError):  # other values raise an error later
            said = row[name].lower()
            row[name] = said == "true" if said in ("true", "false") else float(said)
    return row


SWITCHES = "{# --chat_template_args #}"  # ends the settings of switches in front of a template


def set_template(tokenizer, file: str = "", switches: Iterable[str] = (), *, think: bool = False):
    """Give the tokenizer the template of --chat_template and --chat_template_args, saved with the model; return it.

    switches: "key=value" for templates with switches. think: prompts end with "<think>\\n" if the template has no
    tag. Raises InputError for a file that does not exist or is not Jinja, and for a switch that the template lacks."""
    if file and not Path(file).is_file():
        raise InputError(f"--chat_template {file}: no such file")
    if file:
        tokenizer.chat_template = Path(file).read_text(encoding="utf-8-sig")
    if not tokenizer.chat_template:
        if switches:
            raise InputError("--chat_template_args: the tokenizer has no chat template; pass --chat_template FILE "
                             "(eval.py: --template FILE, without switches)")  # fmt: skip
        return tokenizer  # render_prompt says what is missing, if it is called
    before, _, template = tokenizer.get_chat_template().rpartition(SWITCHES)
    for switch in switches:
        key, equals, value = switch.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--chat_template_args {switch}: expected key=value, as in enable_thinking=false")
        if not re.search(rf"\b{key}\b", template):
            raise InputError(f"--chat_template_args {switch}: the chat template has no switch '{key}'")
        before = re.sub(rf"\{{% set {key} = .*? %\}}", "", before) + f"{{% set {key} = {_literal(value)} %}}"
    template = f"{before}{SWITCHES}{template}" if before else template
    if think and "<think>" not in template:
        template = template.removesuffix("\n")  # which Jinja drops at the end alone
        template += "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    if switches or think:
        tokenizer.chat_template = template
    check_template(tokenizer, file or "the tokenizer's chat template")
    return tokenizer


def check_template(tokenizer, name: str) -> None:
    """Raise InputError if the template is not Jinja. Warn if it writes text before an assistant turn but not at the end
    of a prompt: answers are sampled, and traces trained, without it. Warn if it prints the date."""
    try:
        prompt, between = _opening(tokenizer, str(tokenizer.chat_template))
        dated = "strftime_now" in tokenizer.get_chat_template() and time.strftime("%Y") in prompt
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{name}: not a Jinja template ({error})") from error
    except Exception:  # what the template raises, for example because it does not accept these turns
        return
    missing = between.strip() and "<think>" not in between
    doubts = {
        f"it writes {between!r} between a prompt and its answer, but not at the end of prompts, so samples and traces "
        "lack it: let it write this if add_generation_prompt, or put it into the traces": missing,
        "it prints today's date, so a run cannot resume tomorrow: set one (--chat_template_args date_string=..., where "
        "it has this switch) or pass a template without": dated,
    }
    for doubt, holds in doubts.items():
        if holds and os.environ.get("RANK", "0") == "0":
            print(f"WARNING: {name}: {doubt}", file=sys.stderr)


@functools.lru_cache(4)  # called for every row
def _opening(tokenizer, template) -> tuple[str, str]:
    """A prompt, and what the template writes between it and an answer ("" if it shows no answer behind it)."""
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    answered = tokenizer.apply_chat_template([question, answer], tokenize=False)
    between, shown, _ = answered.removeprefix(prompt).partition("answer")
    return prompt, between if answered.startswith(prompt) and shown else ""


def answer_space(tokenizer, prompt_text: str) -> str:
    """The white space that the template writes before an answer, such as the space in "Assistant: ", if this is one of
    its prompts and does not end with it. A conversation's answers have it, so traces have it too."""
    with contextlib.suppress(jinja2.TemplateError, TypeError, ValueError):  # no template, or one that refuses turns
        prompt, between = _opening(tokenizer, str(tokenizer.chat_template))
        end = prompt.rpartition("question")[2]
        return between if between.isspace() and end and prompt_text.endswith(end) else ""
    return ""


def _literal(value: str) -> str:
    """A JSON value, or a text, as Jinja writes it."""
    with contextlib.suppress(json.JSONDecodeError):
        value = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def render_prompt(tokenizer, messages: list[dict], where: str = "", *, add_generation_prompt: bool = True) -> str:
    """The prompt text that generation starts from, or the conversation as it is. Warns once of turns of a role that are
    not in it. Raises InputError, with `where`."""
    if not tokenizer.chat_template:
        raise InputError(f"{where}the tokenizer of --model has no chat template: pass --chat_template FILE (a Jinja "
                         "template)")  # fmt: skip
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a broken template can raise anything, and some refuse these roles
        roles = [m["role"] for m in messages]
        raise InputError(f"{where}the chat template cannot render {roles} turns ({error}): pass another "
                         "--chat_template (eval.py: --template FILE), or change the turns") from error  # fmt: skip
    asked = [m for m in messages if m["role"] != "assistant"]  # templates cut thoughts out of answers
    for role in sorted({m["role"] for m in asked if m["content"].strip() not in text} - _lost):
        _lost.add(role)
        if os.environ.get("RANK", "0") == "0":
            print(f"WARNING: {where}the chat template does not show '{role}' turns as they are: pass another, or give "
                  "them a role that it shows", file=sys.stderr)  # fmt: skip
    return text


_lost: set[str] = set()  # roles whose turns a warning has named


def trace_text(prompt_text: str, trace: str, where: str = "") -> str:
    """Return a teacher's trace as the model would have to produce it after this prompt. If the prompt ends with an open
    `<think>`, this tag and the prompt's white space are removed from the trace; after a closed thought, its first blank
    lines are. Raises InputError, with `where`, if the prompt ends with a closed thought and the trace has one."""
    if not trace.lstrip().startswith("<think>"):
        return trace.lstrip("\n") if re.search(r"</think>\n+$", prompt_text) else trace
    if prompt_text.rstrip().endswith("</think>"):
        raise InputError(f"{where}the trace has a thought, and the chat template ends with a closed one: pass "
                         "--chat_template_args with the template's switch (such as enable_thinking=true or "
                         "thinking=true), or a --chat_template FILE")  # fmt: skip
    opened = re.search(r"<think>(\s*)$", prompt_text)
    if not opened:
        return trace
    trace, space = trace.lstrip().removeprefix("<think>"), opened[1]
    return trace.removeprefix(space) if trace.startswith(space) else trace.lstrip()


def response_ids(tokenizer, prompts: list[str], responses: list[str]) -> list[list[int]]:
    """The ids of each response after its prompt, without an eos. A SentencePiece tokenizer adds a word mark to a text
    that is tokenized alone, so such a response is tokenized together with its prompt."""
    encoded = tokenizer(responses, add_special_tokens=False)["input_ids"]
    for i, (prompt, response, ids) in enumerate(zip(prompts, responses, encoded, strict=True)):
        if ids and tokenizer.convert_ids_to_tokens(ids[0]).startswith("\u2581"):
            for start in (prompt, "\n"):  # a space that ends the prompt would join the response's first word
                before, both = tokenizer([start, start + response], add_special_tokens=False)["input_ids"]
                if both[: len(before)] == before:
                    encoded[i] = both[len(before) :]
                    break
    return encoded


def encode_traces(tokenizer, traces: list[Trace | None], prompts: list[str], rows: list[str]) -> list[list[int] | None]:
    """The ids of each trace after its prompt, with the white space that the template writes before an answer and one
    eos at the end; [] for a blank trace, None for None. Ids that a model drew are kept (a cut answer has no eos),
    unless the prompt opens the thought that the text begins with.

    rows: "NAME: " of each row, for errors. Raises InputError for ids of another text, and for text after an eos."""
    texts = [trace_text(prompt, t.text, row) if t else "" for prompt, t, row in zip(prompts, traces, rows, strict=True)]
    encoded: list[list[int] | None] = []
    # a word that the template puts before the next question does not end a trace
    ends = [i for i in turn_end(tokenizer)[1] if i in special_tokens(tokenizer)]
    spaced = [  # but for a text that begins with space, or whose 'target_probs' are those of its tokens alone
        answer_space(tokenizer, prompt) + text if text[:1].strip() and trace.probs is None else text
        for trace, prompt, text in zip(traces, prompts, texts, strict=True)
    ]
    for trace, text, ids, row in zip(traces, texts, response_ids(tokenizer, prompts, spaced), rows, strict=True):
        if trace is None:
            ids = None
        elif trace.ids is not None and text.lstrip("\n") == trace.text.lstrip("\n"):
            ids = trace.ids
            if trace.text not in (tokenizer.decode(ids), tokenizer.decode(ids[:-1])):  # the last id may have ended it
                raise InputError(f"{row}the ids of a trace are not those of its text, but another tokenizer's: remove "
                                 "the column '..._ids' or change --model")  # fmt: skip
        elif text.strip():
            end = min((ids.index(i) for i in ends if i in ids), default=len(ids))
            behind = [i for i in ids[end:] if i not in ends]
            if behind and tokenizer.decode(behind).strip():
                mark = tokenizer.decode([ids[end]])
                raise InputError(f"{row}a trace continues after {mark}: put turns into 'conversations'")
            ids = [*ids[:end], tokenizer.eos_token_id]
        else:
            ids = []
        encoded.append(ids)
    return encoded


@functools.lru_cache(4)  # called for every row
def special_tokens(tokenizer) -> dict[int, str]:
    """{id: text} of the tokens that stand for no text: eos, <|im_end|> and the like."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    added = {i: str(token) for i, token in added.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def encode(rows: list, tokenizer, read, *, source: str, progress: bool = False) -> Iterator[tuple]:
    """Yield (row number, item, prompt text, prompt ids, the ids of each trace), tokenizing 500 rows at a time.

    read(row, where) -> (item, trace or None, ...), the same number for each row, or None to leave the row out."""
    counts: Counter[str] = Counter()  # of what a warning says
    shared: dict[int, int] = {}  # one int object an id: a token takes 8 bytes, not 36

    def share(ids: list[int] | None) -> list[int] | None:
        return ids and list(map(shared.setdefault, ids, ids))

    bar = tqdm(total=len(rows), desc="tokenize", leave=False, disable=not progress)
    for start in range(0, len(rows), 500):
        bar.update(min(500, len(rows) - start))
        part = [(i, read(row, f"{source}, row {i}")) for i, row in enumerate(rows[start : start + 500], start)]
        part = [(index, *found) for index, found in part if found]
        if not part:
            continue
        numbers, items, *columns = zip(*part, strict=True)
        names = [f"{source}, row {index}: " for index in numbers]
        texts = [item.text or render_prompt(tokenizer, item.prompt, name) for item, name in zip(items, names)]
        prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
        prompts = [with_bos(p, tokenizer) if item.text else p for p, item in zip(prompts, items, strict=True)]
        if not all(prompts):
            raise InputError(f"{names[prompts.index([])]}the prompt is empty: the chat template renders nothing of it; "
                             "pass another --chat_template")  # fmt: skip
        encoded = [[*map(share, encode_traces(tokenizer, column, texts, names))] for column in columns]
        for item, text, prompt, *both in zip(items, texts, prompts, *columns, *encoded, strict=True):
            traces, ids = both[: len(columns)], both[len(columns) :]
            counts.update(doubts_of([] if item.text else item.prompt, text, prompt, traces, ids, tokenizer))
        yield from zip(numbers, items, texts, map(share, prompts), *encoded, strict=True)
    bar.close()
    warn(source, counts, len(rows))


def doubts_of(turns: list[dict], end: str, prompt: list[int], traces: list, ids: list, tokenizer) -> list[str]:
    """What the warnings about a row say. turns: those of the question, [] if the row holds it rendered; end: the end of
    the prompt, or all of it; ids: those of each trace."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    unknown = None if unknown == tokenizer.eos_token_id else unknown  # as for GPT-2's tokenizer, which knows all text
    not_known = "hold text that the tokenizer of --model does not know (models/tiny reads igsm:LO-HI alone)"
    control = any(token in turn["content"] for turn in turns for token in special_tokens(tokenizer).values())
    endless = end.rstrip().endswith("<think>") and any(trace and "</think>" not in trace.text for trace in traces)
    found = {
        f"prompts {not_known}": unknown in prompt,
        "prompts hold special tokens as text, which are read as such": control,
        f"traces {not_known}": any(unknown in trace for trace in ids if trace),
        "rows have a trace without </think>, though the prompt opens a thought": endless,
        "prompts do not begin with bos, which the tokenizer puts before every text: let the chat template write "
        "{{ bos_token }}, unless the model was trained without": turns and with_bos(prompt, tokenizer) != prompt,
    }
    return [what for what, holds in found.items() if holds]


def warn_prompts(source: str, prompts: list[list[int]], turns: list[list[dict]], tokenizer) -> None:
    """Print the warnings about prompts without traces. turns: of each prompt; [] of one that is rendered already."""
    doubts = [doubts_of(asked, "", ids, [], [], tokenizer) for asked, ids in zip(turns, prompts, strict=True)]
    warn(source, Counter(itertools.chain.from_iterable(doubts)), len(prompts))


def warn(source: str, counts: dict[str, int], rows: int) -> None:
    """Print a warning, "N of ROWS WHAT", for each count {WHAT: N} that is not 0. Rank 0 does."""
    for what, n in counts.items():
        if n and os.environ.get("RANK", "0") == "0":
            print(f"WARNING: {source}: {n} of {rows} {what}", file=sys.stderr)


LEFT_OUT = {  # counts of rows and traces that are left out, in words
    "gold_missing": "without a gold answer",
    "prompt_too_long": "prompts over --max_prompt_tokens {max_prompt_tokens}",
    "trace_too_long": "traces over --max_response_tokens {max_response_tokens}",
    "response_too_long": "responses over --max_response_tokens {max_response_tokens} "
    "or --max_row_tokens {max_row_tokens}",
    "trace_empty": "empty or without a correct trace",
    "traces_equal": "pairs of equal traces",
    "row_too_long": "over --max_row_tokens {max_row_tokens}",
    "wrong_only": "incorrect traces alone",
}


def in_words(count: dict[str, int], args) -> str:
    """Counts of rows as text: 960 of 1000 rows (30 prompts over --max_prompt_tokens 1024, 10 without a gold answer).
    Counts that are not of LEFT_OUT follow as they are: 960 of 1000 rows, 480 pairs."""
    why = ", ".join(f"{count[name]} {LEFT_OUT[name]}".format(**vars(args)) for name in LEFT_OUT if count.get(name))
    more = [f"{n} {name}" for name, n in count.items() if name not in ("rows", "kept", *LEFT_OUT)]
    return ", ".join([f"{count.get('kept', 0)} of {count['rows']} rows" + (f" ({why})" if why else ""), *more])


def with_kept(found: list, count: dict[str, int], source: str, args) -> dict[str, int]:
    """Return the counts with the number of rows kept. Raises InputError if none was kept."""
    if not found:
        raise InputError(f"{source}: no row is left: {in_words(count, args)}")
    return count | {"kept": len(found)}


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
    where: str = ""  # "train.jsonl, row 7", for messages


def given_logps(given: Trace, trace: list[int], prompt: str, tokenizer, where: str) -> list[float] | None:
    """The teacher's log-probs of a trace from the column 'target_probs': a probability for each of its tokens, with or
    without the eos (then NaN: the loss uses no teacher probability there). None without the column. If the prompt ends
    with the <think> that the trace begins with, probabilities of this tag are removed, as the tag is."""
    if given.probs is None:
        return None
    try:
        logps = [math.log(p) for p in given.probs]
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: 'target_probs' must be a list of numbers above 0 ({error})") from error
    if trace != given.ids and trace_text(prompt, given.text) != given.text:
        whole = len(tokenizer(given.text, add_special_tokens=False)["input_ids"])
        removed = whole - (len(trace) - 1)  # tokens of the tag; the trace has the eos besides
        if len(logps) == whole == len(trace):
            raise InputError(f"{where}: 'target_probs' has {whole} entries, with eos or with what the prompt "
                             "has too (<think>): give both")
        logps = logps[removed:] if len(logps) >= whole else logps
    if len(trace) - len(logps) not in (0, 1) or not all(logp <= 0 for logp in logps):  # a NaN is not
        raise InputError(f"{where}: 'target_probs' has {len(logps)} entries for a trace of {len(trace)} tokens (eos "
                         "included), or one outside (0, 1]: remove the column, or make it with this tokenizer")
    return logps + [math.nan] * (len(trace) - len(logps))


def with_bos(ids: list[int], tokenizer) -> list[int]:
    """Ids of a text, with one bos in front if this tokenizer puts it before text (Llama, DeepSeekMath; not Qwen)."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos, *ids] if bos is not None and ids[:1] != [bos] and _begins_with(tokenizer, bos) else ids


@functools.lru_cache(4)  # called for every row
def _begins_with(tokenizer, bos: int) -> bool:
    return tokenizer("a")["input_ids"][:1] == [bos]


def turn_end(tokenizer) -> tuple[int | None, list[int]]:
    """Return the token that the template puts behind an answer (None if it puts none), and all ids that end an answer.
    That token is eos, or another one that closes a turn, such as <|im_end|>. MiniCPM's template puts none: there the
    mark that opens the user's next turn ends an answer, if it is one token, as the published stop string does."""
    return _turn_end(tokenizer, str(tokenizer.chat_template))


@functools.lru_cache(4)  # called for every row
def _turn_end(tokenizer, template):
    turns = ("user", "question"), ("assistant", "answer"), ("user", "question")
    talk = [{"role": role, "content": content} for role, content in turns]
    try:
        asked, shown, more = (tokenizer.apply_chat_template(talk[:n], tokenize=False) for n in (1, 2, 3))
    except (jinja2.TemplateError, TypeError, ValueError):  # no template, or one that refuses these turns
        return tokenizer.eos_token_id, [tokenizer.eos_token_id]
    eos, (_, answered, rest) = tokenizer.eos_token, more.rpartition("answer")
    closing, between = shown.rpartition("answer")[2], rest.partition("question")[0]
    if asked.endswith(eos) and not between.startswith(closing):
        closing = closing.removesuffix(eos)  # Phi's templates put eos behind whatever comes last
    if not answered or eos in closing:  # not answered: the template shows one turn alone
        return tokenizer.eos_token_id, [tokenizer.eos_token_id]
    user_mark = between.removeprefix(closing)
    tokens = tokenizer.convert_tokens_to_ids([closing.strip(), user_mark.strip()])
    tokens = [None if token == tokenizer.unk_token_id else token for token in tokens]
    return tokens[0], [tokenizer.eos_token_id, *(token for token in tokens if token is not None)]


def conversation_ids(messages: list[dict], tokenizer, skip_turns: int) -> tuple[list[int], list[int], list[bool]]:
    """Return (prompt ids, response ids, action mask of the response) of a conversation.

    Every assistant turn after the first `skip_turns` is an action, with the token that closes it (`turn_end`), unless
    its weight is 0; what is between two turns is not. The pieces are tokenized one by one, so the ids are those that a
    sampler reads:

        user  assistant  user  assistant
        p p p r r r r    r r r r r r
        actions 1 1 1 1  0 0 0 1 1 1

    If the template closes turns with no token, none is trained. InputError if new turns change earlier ones."""
    text, ids, actions, (closing, _) = "", [], [], turn_end(tokenizer)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"][skip_turns:]
    if not turns:
        raise InputError(f"no action: {len(messages)} turns, none of them an assistant's after --skip_turns")
    for turn in turns:
        before = render_prompt(tokenizer, messages[:turn])
        trace_text(before, messages[turn]["content"])  # raises if the template has closed the thought
        after = render_prompt(tokenizer, messages[: turn + 1], add_generation_prompt=False)
        if not (before.startswith(text) and after.startswith(before)):
            raise InputError(f"the chat template changes turn {turn} or earlier ones later on (some drop <think> from "
                             "them); pass a --chat_template that keeps the history as it is")  # fmt: skip
        said = after[len(before) :]
        if closing is not None:
            said, mark, _ = said.partition(tokenizer.decode([closing]))
            if mark and mark in messages[turn]["content"].rstrip().removesuffix(mark):
                raise InputError(f"turn {turn} holds {mark}, which ends turns: it would be cut there")
            said += mark
        else:
            said = said.rstrip()  # line breaks that the template puts behind an answer are no action
        trained = "weight" not in messages[turn]
        for so_far, piece, action in ((text, before[len(text) :], False), (before, said, trained)):
            [piece_ids] = response_ids(tokenizer, [so_far], [piece])
            piece_ids = piece_ids if ids else with_bos(piece_ids, tokenizer)
            ids += piece_ids
            actions += [action] * len(piece_ids)
        text = before + said
    first = actions.index(True) if any(actions) else len(ids)
    return ids[:first], ids[first:], actions[first:]


def trace_ids(item: Item, trace: Trace | None, tokenizer, skip_turns: int) -> tuple[list[int], list[int], list | None]:
    """Return (prompt ids, response ids, action mask) of a graded trace. The mask is None if the model chose all tokens.

    Ids of a prompt and a response are taken as they are; else `encode_traces` makes those of the response. Raises
    InputError if there is no reward, if ids are of another tokenizer, or if the mask has another length."""
    if trace is None or trace.reward is None:
        raise InputError(f"no {'reward' if trace else 'response'}: --rows needs graded responses (docs/data.md)")
    if item.conversation:
        return conversation_ids(item.conversation, tokenizer, skip_turns)
    if not item.prompt_ids:
        prompt = item.text or render_prompt(tokenizer, item.prompt)
        [prompt_ids] = tokenizer([prompt], add_special_tokens=False)["input_ids"]
        [ids] = encode_traces(tokenizer, [trace], [prompt], [""])
        return with_bos(prompt_ids, tokenizer) if item.text else prompt_ids, ids, None
    known = max(item.prompt_ids + trace.ids) < len(tokenizer)
    if not known or (trace.text and trace.actions is None and tokenizer.decode(trace.ids) != trace.text):
        raise InputError("ids of another tokenizer")
    if trace.actions is not None and len(trace.actions) != len(trace.ids):
        raise InputError(f"'actions' is a mask of another length ({len(trace.actions)}) than 'response_ids'")
    return item.prompt_ids, trace.ids, None if trace.actions is None else [bool(a) for a in trace.actions]


def read_traces(source: str, tokenizer, args) -> tuple[list[tuple], dict[str, int]]:
    """Return the graded traces of a file, all of each row, and counts of traces that were left out. A trace is (prompt
    ids, response ids, action mask or None, reward, question and trace number). Raises InputError naming the row.
    Reads --skip_turns, --max_row_tokens and --long_response, which oreo.py has."""
    found, questions, count = [], {}, {"rows": 0, "prompt_too_long": 0, "response_too_long": 0}
    doubtful: Counter[str] = Counter()  # of what a warning says
    for row_number, row in enumerate(load_rows(source)):
        where = f"{source}, row {row_number}"
        item = read_row(row, where)
        for trace in item.traces or [None]:
            count["rows"] += 1  # of traces
            try:
                prompt, response, mask = trace_ids(item, trace, tokenizer, args.skip_turns)
            except (InputError, TypeError) as error:
                raise InputError(f"{where}: {error}") from error
            if not item.prompt_ids:  # ids are what a model read and drew
                end, texts = tokenizer.decode(prompt[-8:]), [] if item.conversation else [trace]
                turns = [] if item.text else item.prompt
                doubtful.update(doubts_of(turns, end, prompt, texts, [response], tokenizer))
            if len(prompt) > args.max_prompt_tokens:
                count["prompt_too_long"] += 1
                continue
            longest = min(args.max_response_tokens, args.max_row_tokens - len(prompt))
            if len(response) > longest:
                count["response_too_long"] += 1
                if args.long_response == "reject" or longest < 1:
                    continue
                response, mask = response[:longest], mask and mask[:longest]
            if not prompt or not response or (mask and not any(mask)):
                raise InputError(f"{where}: no prompt, or no action token; remove the row")
            question = str(row.get("question")), tuple(prompt)  # 'question' may be a number, which other files use too
            number = questions.setdefault(question, len(questions))
            found.append((prompt, response, mask, trace.reward, number, count["rows"] - 1))
    warn(source, doubtful, count["rows"])
    return found, with_kept(found, count, source, args)


def make_examples(
    rows: list[dict], tokenizer, args, *, source: str, traces: str = "needed", golds: bool = True,
    empty_trace: str = "error", long_trace: str = "reject", reshape=None, progress: bool = False,
) -> tuple[list[Example], dict[str, int]]:  # fmt: skip
    """Rows to examples, and a count of what was left out and why. The trace is the first correct one of the row.

    traces:       "needed" (a row must have one) or "ignored" (on-policy methods, evaluation).
    golds:        rows without a gold answer are left out.
    empty_trace:  "error", "drop" the row, or "on_policy": keep the question without a teacher row.
    long_trace:   what becomes of a trace (eos included) over args.max_response_tokens. "reject" the row; "drop" the
                  trace; "cut" it, which loses the eos and the answer; "end": cut it, with an eos as its last token.
    reshape:      (item, row) -> item, for a method that asks a question in its own way.
    Raises InputError naming `source`, the row and the field."""
    examples: list[Example] = []
    count = {"rows": len(rows), "gold_missing": 0, "prompt_too_long": 0, "trace_too_long": 0, "trace_empty": 0}

    def read(row: dict, where: str) -> tuple[Item, Trace | None] | None:
        item = read_row(row, where)
        item = reshape(item, row) if reshape else item
        if golds and not item.gold:
            count["gold_missing"] += 1
            if count["gold_missing"] == len(rows):
                check_gold(item, row, f"{source}, all {len(rows)} rows")
            return None
        return item, item.first(correct=True) if traces == "needed" else None

    for index, item, text, prompt, ids in encode(rows, tokenizer, read, source=source, progress=progress):
        ids, where = ids or [], f"{source}, row {index}"
        if len(prompt) > args.max_prompt_tokens:
            count["prompt_too_long"] += 1
            continue
        if traces == "needed" and not ids:
            if empty_trace == "error":
                why = "the trace is empty or missing ('target', 'solution', ...: docs/data.md has the shapes of rows)"
                if item.traces and not item.first(correct=True):
                    why = "none of its traces is correct (its label or reward)"
                raise InputError(f"{where}: {why}; remove the row (or pass --empty_trace drop | on_policy, where there "
                                 f"is this flag; columns found: {', '.join(map(str, rows[index]))})")  # fmt: skip
            count["trace_empty"] += 1
            if empty_trace == "drop":
                continue
        logps = given_logps(item.traces[0], ids, text, tokenizer, where) if ids else None
        if len(ids) > args.max_response_tokens:
            count["trace_too_long"] += 1
            if long_trace == "reject":
                continue
            ids = [] if long_trace == "drop" else ids[: args.max_response_tokens]
            logps = logps and logps[: len(ids)]
            if long_trace == "end":
                ids[-1] = tokenizer.eos_token_id
                logps = logps and [*logps[:-1], math.nan]
        examples.append(Example(prompt, ids or None, item.gold, item.source or source, index, text, logps, where))
    return examples, with_kept(examples, count, source, args)


def gold_unreadable(detail: str | None = None) -> bool:
    """Whether a verdict's detail says that the gold answer cannot be read, so that no response is accepted."""
    return (detail or "").startswith("gold unreadable")


def report_golds(examples: Iterable[Example], verdicts: Iterable) -> None:
    """Print each row whose gold answer the verifier cannot read, once."""
    for example, verdict in zip(examples, verdicts, strict=True):
        where = example.where or f"{example.source}, row {example.index}"
        if gold_unreadable(verdict.detail) and where not in _reported:
            _reported.add(where)
            print(f"WARNING: {where}: {verdict.detail}; every response to it counts as wrong", file=sys.stderr)


_reported: set[str] = set()


def read_examples(source: str, tokenizer, args, *, split: str, limit: int = 0, **options):
    """Examples of a data flag, and the counts of what was left out. `options`: those of `make_examples`."""
    rows = load_rows(source, split=split, limit=limit or None, problems=args.igsm_problems)
    return make_examples(rows, tokenizer, args, source=source, **options)


def held_out_examples(tokenizer, args, **options) -> list[Example]:
    """The examples of --eval_data; rank 0 says how many are left out. `options`: those of `make_examples`."""
    options |= dict(split="test", limit=args.eval_limit, traces="ignored")
    found = []
    for source in args.eval_data:
        examples, count = read_examples(source, tokenizer, args, **options)
        found += examples
        if count["kept"] < count["rows"] and os.environ.get("RANK", "0") == "0":
            print(f"--eval_data {source}: {in_words(count, args)}", file=sys.stderr)
    return found


def data_digest(*parts: Iterable[tuple]) -> str:
    """Digest of what was tokenized: tuples of lists of ids, texts and numbers. Other data have another digest."""
    digest = hashlib.sha256()
    for part in parts:
        for value in itertools.chain.from_iterable(part):
            plain = isinstance(value, (str, int, float))
            value = str(value).encode() if plain else array("i", value or []).tobytes()
            digest.update(len(value).to_bytes(8, "little") + value)
        digest.update(b"part")
    return digest.hexdigest()[:16]
