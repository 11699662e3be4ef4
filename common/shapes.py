"""Rows of data files -> items: every shape of row that a script accepts.

    item = read_row(row, "train.jsonl, row 7")      a row's columns -> question, gold answer, traces

A shape is a set of columns (SHAPES; docs/data.md has them as a table). To read an algorithm you can skip this file: how
datasets name and nest their columns.
"""

import ast
import contextlib
import json
import math
import random
import re
import string
from dataclasses import dataclass, field, replace
from decimal import Decimal

from common.data import InputError
from common.verifiers import boxes, last_boxed, without_commas

THINK = "<think>\n"
IN_A_BOX = "Please reason step by step, and put your final answer within \\boxed{}."

QUESTIONS = ("problem", "question", "query", "question_stem", "instruction")
PASSAGES = ("context", "passage", "article", "body", "puzzle", "theory", "story", "table")  # put before the question
RESPONSES = ("response", "completion", "output", "generation", "generated_solution")
TRACES = ("chosen", "rejected", "target", *RESPONSES)
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")  # beside a response
GOLDS = ("answer_number", "final_answer", "expected_answer", "answer", "ground_truth", "reference_answer")
AFTER_HASHES = re.compile(  # GSM8K's answer, on the last line of its solution; the mark may have a line of its own
    r"(?:(?<![^\n])####[ \t\r]*\n|(?<!#)####(?!#))((?:(?!####)[^\n])*)$"
)
NO_GOLD = {"nan", "none", "null", "n/a", "notfound", "proof"}
RIGHT_OPTION = (  # columns that may name the correct option of a multiple choice
    "answerkey", "answer_letter", "answer_idx", "correct_option", "answer", "ground_truth", "expected_answer",
    "final_answer", "reference_answer", "correct", "label",
)
VERDICTS = ("llama_verification", "math_verify_reparsed_answer")  # in OpenR1-Math-Raw's 'correctness'
MARKS = ("label", "is_correct", "correct", "kto_tag", "reward")  # columns that grade a trace; the first counts
LETTERS = string.ascii_uppercase
TURNS = re.compile(r"""\s*(\[\s*)?\{\s*["']\w+["']\s*:""")  # as text, in .csv files
NESTED = {"reward_model", "choices", "options", "responses", "rewards", "generations", "history", "correctness",
          "correctness_math_verify", "correctness_llama"}  # fmt: skip
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "developer": "system"}
UNTRAINED = ("weight", "loss", "train")  # keys that other trainers read: an assistant turn with 0 or false is context
KNOWN_ROLES = ("system", "user", "assistant", "tool", "function", "ipython", "observation")


@dataclass
class Trace:
    """A response to an item's question."""

    text: str
    reward: float | None = 1.0  # above 0: correct; None: nobody graded it
    ids: list[int] | None = None  # its ids if a model sampled it, including the one that ended it
    actions: list | None = None  # which of them are the model's own; None: all
    probs: list | None = None  # the probability that its author gave to each of its tokens

    @property
    def blank(self) -> bool:
        return not (self.ids or self.text.strip())


@dataclass
class Item:
    """What a row holds, whatever its shape."""

    prompt: list[dict]  # the turns that ask the question
    question: str  # the question alone
    gold: str = ""  # "": the row has none
    traces: list[Trace] = field(default_factory=list)
    source: str = ""  # the row's data_source
    weight: float = 1.0
    text: str | None = None  # the prompt, if the row holds it rendered
    prompt_ids: list[int] | None = None  # and if it holds its ids
    conversation: list[dict] | None = None  # the prompt and the trace, if several of its turns are to be trained

    def first(self, correct: bool) -> Trace | None:
        """The first correct (or incorrect) trace that is not blank; a blank one if all are. A trace that nobody graded
        counts as correct."""
        traces = [t for t in self.traces if (t.reward is None or t.reward > 0) == correct]
        return next((trace for trace in traces if not trace.blank), traces[0] if traces else None)


def read_row(row: dict, where: str) -> Item:
    """A row of any shape in SHAPES -> Item. Raises InputError with `where` and the reason."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with named columns, found {type(row).__name__}")
    given = ", ".join(map(str, row))
    try:
        return _read(row)
    except KeyError as error:
        raise InputError(f"{where}: column {error} is missing (found: {given})") from error
    except (TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: {error} (columns found: {given})") from error


def _read(row: dict) -> Item:
    # of names that differ in case alone the last one wins: a filled one over a blank one, then "answer" over "Answer"
    names = sorted(row, key=lambda name: (not _blank(row[name]), name.islower()))
    row = {name if len(name) == 1 else name.lower(): row[name] for name in names}  # A, B, ... are options
    row = {name: unfolded(name, value) for name, value in row.items()}
    blank = [name for name, value in row.items() if _blank(value)]  # files of mixed shapes hold nulls
    columns = row.keys() - blank
    # a trace may be blank
    row = {name: value for name, value in row.items() if name in columns or (name in TRACES and isinstance(value, str))}
    groups = {  # which SHAPES names in capitals
        "QUESTION": columns & {*QUESTIONS}, "GRADED": _graded_columns(row), "MARK": columns & {*MARKS},
        "RESPONSE": columns & {*RESPONSES} or {"response", "reward"} <= row.keys(),  # an empty one may have a reward
        "VERDICTS": columns & {"correctness", "correctness_math_verify", "correctness_llama"},
    }  # fmt: skip
    found = columns.union(group for group, names in groups.items() if names)
    read = next((read for needs, read in SHAPES if needs <= found), None)
    if read is None:
        empty = f" (blank: {', '.join(blank)})" if blank else ""
        raise ValueError(f"no shape of row in docs/data.md has these columns{empty}")
    if any(re.fullmatch(r"(image|video|audio)s?(_\d+)?", name) for name in columns):
        raise ValueError("the row has an image, a video or sound, which no script reads")
    for name in columns & {"tools", "chat_template_kwargs", "enable_thinking"}:
        if row[name] not in ("[]", "{}", "null"):
            raise ValueError(f"'{name}' is for the chat template, which takes nothing from single rows: remove the "
                             "column (--chat_template_args is for all rows)")  # fmt: skip
    if {"answers", "graded_by"} <= columns:
        raise ValueError("the row is of samples.jsonl of an evaluation, whose answers are not read as traces")
    item = read(row)
    system = row.get("system", row.get("system_prompt"))
    if system and item.prompt[:1] and item.prompt[0]["role"] != "system":
        turn = {"role": "system", "content": _text(system, "'system'")}
        item.prompt = [turn, *item.prompt]
        item.conversation = item.conversation and [turn, *item.conversation]
    item.text = _text(row.get("prompt_text") or item.text or "", "'prompt_text'") or None
    if item.text and (system or "history" in row):
        raise ValueError("'system' and 'history' stand beside a rendered prompt, which has all turns: remove them")
    item.source = _text(row.get("data_source") or item.source, "'data_source'")
    item.weight = _number(row.get("weight", 1.0), "weight")
    if item.weight < 0:
        raise ValueError(f"'weight' must be a number from 0 on, not {item.weight} (a wrong trace has label 0)")
    return item


def check_gold(item: Item, row: dict, where: str) -> None:
    """Raise InputError if a row that is to be graded has no gold answer."""
    if not item.gold:
        raise InputError(
            f"{where}: the gold answer is missing or blank ('reward_model' {{ground_truth}}, {', '.join(GOLDS)}, or a "
            f"box in 'solution'; {', '.join(sorted(NO_GOLD))} count as blank). Fill it in or remove the row (columns "
            f"found: {', '.join(map(str, row))})"
        )


def _blank(value) -> bool:
    """Whether a cell holds nothing: null, NaN, blank text, an empty list."""
    if isinstance(value, (str, list, dict)):
        return not (value.strip() if isinstance(value, str) else value)
    return value is None or (isinstance(value, float) and math.isnan(value))


def _parsed(text: str):
    """The value of a text in JSON, or as Python prints it (pandas' .csv); the text itself if it is neither."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            return read(text)
    return text


def unfolded(name: str, value):
    """Return a cell with lists and turns that are written as text (in .csv files) parsed. A list that holds one text
    alone becomes this text."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) and name not in NESTED:
        return value[0]
    if not isinstance(value, str):
        return value
    if name in NESTED:
        return _parsed(value) if value[:1] in ("[", "{") else value
    if not (turns := TURNS.match(value)):
        return value
    found = _parsed(value)
    if found is value and turns[1] and re.search(r"""["'](role|from)["']\s*:""", value):
        raise TypeError(f"'{name}' holds turns as text that is neither JSON nor Python (numpy's has no commas)")
    first = found[0] if isinstance(found, list) and found else found
    is_turn = isinstance(first, dict) and {"role", "from"} & first.keys() and {"content", "value"} & first.keys()
    return found if is_turn else value  # an answer may be JSON, too


def _text(value, name: str) -> str:
    """`value`, which must be text that a tokenizer takes. Raises TypeError naming it."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is not text")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise TypeError(f"{name} holds half a character (a lone surrogate)")
    return value


def _mark(row: dict) -> str | None:
    """The column that grades the row's one trace."""
    return next((name for name in MARKS if name in row), None)


def _reward(row: dict) -> float | None:
    """The reward of the row's one trace: 1 or 0 from a label column, any number from 'reward'; None without either."""
    name = _mark(row)
    if name not in (None, "reward") and row[name] not in (0, 1):
        raise TypeError(f"'{name}' must be 1 (right) or 0 (wrong), not {row[name]!r}; put scores into 'reward', gold "
                        "answers into 'answer'")  # fmt: skip
    return name and _number(row[name], name)


def _number(value, name: str) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"'{name}' must be a number, not {value!r}")
    return float(value)


def _ids(value, name: str) -> list[int]:
    if not (isinstance(value, list) and value and all(type(i) is int and i >= 0 for i in value)):
        raise TypeError(f"'{name}' is not a list of token ids")
    return value


def _turns(value, name: str) -> list[dict]:
    """Return turns [{role, content}, ...] without other keys; a text is one user turn. Raises TypeError with `name`."""
    if isinstance(value, str) and value.strip():
        value = [{"role": "user", "content": value}]
    if not (isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)):
        raise TypeError(f"'{name}' must be a text or [{{role, content}}, ...]")
    return [_turn(turn, name) for turn in value]


def _turn(turn: dict, name: str) -> dict:
    """Return a turn, {role, content} or {from, value}, as {role, content}; content includes an assistant's thought. An
    assistant turn that is not to be trained also has weight 0."""
    turn = {key: value for key, value in turn.items() if value is not None}  # files that mix both forms hold nulls
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if turn.get("tool_calls") or turn.get("function_call"):
        raise TypeError(f"'{name}': a turn calls a tool, which no script trains: write the call into its content")
    role = _text(role, f"'{name}': a turn's role").lower()
    role = ROLES.get(role, role)
    if role not in KNOWN_ROLES:
        raise TypeError(f"'{name}': a turn's role is {role!r}, and templates know {', '.join(KNOWN_ROLES)}")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part.get("text", "") for part in content)
    content = _text(content, f"'{name}': a turn's content")
    if role != "assistant":
        return {"role": role, "content": content}
    untrained = any(turn.get(mark, 1) == 0 for mark in UNTRAINED)
    return {"role": role, "content": _with_thought(turn, content)} | ({"weight": 0} if untrained else {})


MARKED = re.compile(
    r"\s*<(?:\|begin_of_thought\||thinking|thought)>(.*?)<(?:\|end_of_thought\||/thinking|/thought)>(.*)", re.S | re.I
)


def _with_thought(beside: dict, text: str) -> str:
    """A response with its thought between <think> and </think>: the thought may stand in a column or key beside it,
    between other marks, or without the opening one."""
    if "</think>" in text:
        return text if "<think>" in text else THINK + text.lstrip("\n")
    thoughts = [value.strip() for value in map(beside.get, THOUGHTS) if isinstance(value, str)]
    # a single word is a switch: "on"
    thought = next((t for t in thoughts if t and not (t.isascii() and t.isalpha())), None)
    if found := MARKED.fullmatch(text):
        thought, text = found[1].strip(), re.sub(r"<\|(?:begin|end)_of_solution\|>", "", found[2]).strip()
    return f"{THINK}{thought}\n</think>\n\n{text.lstrip()}" if thought else text


def _gold(*values) -> str:
    """The first of the values that is not blank, as text; "" if all are. Raises TypeError if one is no answer."""
    for value in values:
        if isinstance(value, str) and re.match(r"""\[\s*["']""", value):
            value = _parsed(value) if not re.search(r"""['"]\s+['"]""", value) else value
            if isinstance(value, str):
                raise TypeError("the gold answer is a list without commas, as numpy prints it")
        if isinstance(value, list) and len(value) > 1:
            raise TypeError(f"the gold answer is a list of {len(value)}: write it as one text, as in '1, 2'")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str) and re.fullmatch(r"-?\d(\.\d+)?e[+-]\d\d+", value.strip()):
            value = float(value)  # as pandas and Python print it
        if _blank(value) or value in (math.inf, -math.inf):
            continue
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise TypeError("the gold answer is neither text nor a number")
        if isinstance(value, float):  # 4 for 4.0, of a column that once held a NaN; not every verifier reads 2e-05
            written = Decimal(repr(value))
            value = int(written) if value.is_integer() else f"{written:f}"
        gold = _text(str(value), "the gold answer").strip()
        gold = last_boxed(gold) or re.sub(r"^(-?[\d.,/]+) \([a-z ]+\)$", r"\1", gold)  # ASDiv's "9 (apples)"
        if marked := AFTER_HASHES.search(gold):
            gold = without_commas(marked[1])
        if gold and gold.lower() not in NO_GOLD:
            return gold
    return ""


def boxed_gold(solution: str) -> str:
    r"""The answer in the last box of a MATH solution, which may lack braces or hold escaped ones; "" without a box.

    >>> boxed_gold(r"so $\boxed 2$."), boxed_gold(r"$\boxed{\left\{1\right.}$"), boxed_gold(r"\boxed{7}")
    ('2', '\\left\\{1\\right.', '7')
    """
    if (found := last_boxed(solution)) is not None:
        return found
    inside = re.split(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", solution)[1:]
    if inside and not inside[-1].startswith("{"):
        return re.split(r"\$|\\\)|\\\]|\n", inside[-1])[0].strip().rstrip(" .,;")
    return max(boxes(solution), default=(0, 0, ""))[2]  # the last one


def _asked(row: dict) -> Item:
    """The question and the gold, without traces. A question that is not in 'prompt' gets its options and a request for
    a box."""
    reward_model = row.get("reward_model") or {}
    if not isinstance(reward_model, dict):
        raise TypeError("'reward_model' must be {ground_truth}")
    gold = _gold(reward_model.get("ground_truth"), *map(row.get, GOLDS))
    history = row.get("history", [])  # LLaMA-Factory's
    if not (isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)):
        raise TypeError("'history' must be [[question, answer], ...]")
    turns = [{"role": r, "content": said} for pair in history for r, said in zip(("user", "assistant"), pair)]
    before = _turns(turns, "history") if turns else []
    name = next((name for name in QUESTIONS if name in row), None)
    if name and "prompt" not in row:
        parts = [*PASSAGES, name, *(["input"] if name == "instruction" else [])]
        text = "\n\n".join(_text(row[part], f"'{part}'") for part in parts if part in row)
        row = _gpqa(row) if "correct answer" in row else row
        options = _options(row)
        if options:  # as LUFFY's files write them, one a line
            text = "\n".join([f"{text}\n", *(f"{label}) {option}" for label, option in options.items())])
            gold = _right_option(row, options)
        asks = text if name == "instruction" and not options else f"{text}\n\n{IN_A_BOX}"
        return Item(before + _turns(asks, name), text, gold)
    prompt = _turns(row["prompt"], "prompt")
    at = int(prompt[0]["role"] == "system")
    prompt[at:at] = before
    gold = gold or _gold(boxed_gold(row["solution"]) if isinstance(row.get("solution"), str) else "")  # TRL's GRPO rows
    if prompt[-1]["role"] == "assistant":
        raise ValueError("the prompt (the turns before the answer) ends with a turn of the assistant: nothing is asked")
    questions = [turn["content"] for turn in prompt if turn["role"] == "user"]
    if not questions or not questions[-1].strip():
        raise ValueError("the question is blank: no text in a turn of the user")
    return Item(prompt, questions[-1], gold)


def _add_trace(item: Item, row: dict, name: str, **fields) -> Item:
    """Return the item with the trace in a column, if there is one: a text, an assistant turn, or the prompt's turns and
    an assistant's. fields: others of the Trace."""
    value, ids = row.get(name), row.get(f"{name}_ids")
    if value is None:
        return item
    if isinstance(value, (list, dict)):
        *before, last = _turns([value] if isinstance(value, dict) else value, name)
        if last["role"] != "assistant":
            raise TypeError(f"'{name}' ends with a turn of the {last['role']}, not of the assistant")
        asked = [turn["content"].strip() for turn in item.prompt if turn["role"] != "system"]
        before = [turn["content"].strip() for turn in before if turn["role"] != "system"]
        if before and before != asked[-len(before) :]:
            raise TypeError(f"'{name}' has several turns, of which only the last would be trained: put the others into "
                            "'prompt', or all of them into 'conversations' (oreo.py)")  # fmt: skip
        value = last["content"]
    text = _text(value, f"'{name}' (a text or [{{role, content}}])")
    if ids is not None:
        fields["ids"] = _ids(ids, f"{name}_ids")
    elif not fields.get("probs"):
        text = _with_thought({} if name in ("chosen", "rejected") else row, text)  # both would get the same thought
    item.traces.append(Trace(text, **fields))
    return item


def _graded_traces(texts: list, marks: list) -> list[Trace]:
    if not isinstance(texts, list) or not isinstance(marks, list) or len(texts) != len(marks):
        raise TypeError("the traces and their marks must be lists of one length")
    if any(mark not in (0, 1) for mark in marks):
        raise TypeError(f"'rewards' must be 1 (right) or 0 (wrong), not {marks}")
    return [Trace(_with_thought({}, _text(t, "a trace")), float(mark)) for t, mark in zip(texts, marks, strict=True)]


def _luffy(row: dict) -> Item:
    return _add_trace(_asked(row), row, "target", probs=row.get("target_probs"))


def _pair(row: dict) -> Item:
    if "initial_reason_steps" in row:
        raise ValueError("'chosen' and 'rejected' continue 'initial_reason_steps': join them into whole answers")
    whole = row["chosen"][:-1] if isinstance(row.get("chosen"), list) else None
    asked = row.get("conversations") or whole
    item = _asked({"prompt": asked} | row if asked else row)
    if whole and item.prompt[0]["role"] != "system":  # a 'prompt' beside whole conversations is their question alone
        item.prompt[:0] = [turn for turn in _turns(whole, "chosen")[:1] if turn["role"] == "system"]
    _add_trace(item, row, "chosen")
    return _add_trace(item, row, "rejected", reward=0.0)


def _single(row: dict) -> Item:
    name = next((name for name in RESPONSES if not _blank(row.get(name))), "response")
    item = _add_trace(_asked(row), row, name, reward=_reward(row))
    if not item.traces:
        raise KeyError(name)
    if _mark(row) == "reward" and isinstance(row.get("prompt"), str):
        item.text = row["prompt"]  # OREO's published rows hold the rendered prompt and the trace as the model wrote it
        item.traces[0].text = _text(row[name], f"'{name}'")
    return item


def _drawn(row: dict) -> Item:
    text = row.get("response") if isinstance(row.get("response"), str) else ""
    trace = Trace(text, _number(row["reward"], "reward"), _ids(row["response_ids"], "response_ids"), row.get("actions"))
    prompt, gold = row.get("prompt"), _gold(row.get("gold"), row.get("answer"), row.get("ground_truth"))
    turns = _turns(prompt, "prompt") if prompt else []
    return Item(turns, "", gold, [trace], text=prompt if isinstance(prompt, str) else None,
                prompt_ids=_ids(row["prompt_ids"], "prompt_ids"))  # fmt: skip


def _conversation(row: dict) -> Item:
    name = "conversations" if "conversations" in row else "messages"
    turns = _turns(row[name], name)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant" and "weight" not in turn), default=0)
    if name == "messages" and turns[-1]["role"] != "assistant":
        return _asked(row | {"prompt": turns})
    if not last:
        raise ValueError(f"'{name}' has no assistant turn that answers another and is to be trained")
    item = _asked(row | {"prompt": turns[:last], "history": []})
    item.traces, item.conversation = [Trace(turns[last]["content"], _reward(row))], turns[: last + 1]
    return item


def _responses(row: dict) -> Item:
    return replace(_asked(row), traces=_graded_traces(row["responses"], row["rewards"]))


def _generations(row: dict) -> Item:
    """Read OpenR1-Math. Raw: both verifiers must accept a trace (REDI's rule). 220k: one must; the second was run only
    where the first did not accept."""
    rule, verdicts = any, [row[name] for name in ("correctness_math_verify", "correctness_llama") if name in row]
    if "correctness" in row:
        rule, verdicts = all, [row["correctness"][name] or [None] * len(row["generations"]) for name in VERDICTS]
    item = _asked({"prompt": row["problem"]} | row)
    if any(mark not in (0, 1, None) for marks in verdicts for mark in marks):
        raise TypeError("'correctness' must have true, false or null for each generation")
    item.traces = _graded_traces(row["generations"], [rule(marks) for marks in zip(*verdicts, strict=True)])
    return item


def _graded_columns(row: dict) -> list[dict]:
    return [v for v in row.values() if isinstance(v, dict) and "is_correct" in v and v.get("solution") is not None]


def _gsm8k_graded(row: dict) -> Item:
    solutions, text = _graded_columns(row), _text(row["question"], "'question'")
    traces = _graded_traces([s["solution"] for s in solutions], [s["is_correct"] for s in solutions])
    gold = _gold(row.get("answer"), row.get("ground_truth")).rpartition("A: ")[2].strip()
    return Item(_turns(text, "question"), text, gold, traces, source="gsm8k")


def _problem(row: dict) -> Item:
    """GSM8K and MATH: the reasoning becomes the trace, and a request for a box is added to the question."""
    item = _asked(row)
    solution, answer = row.get("solution"), row.get("answer")
    reasoning = row.get("reannotated_assistant_content") or solution  # R1-Distill-SFT: R1's beside the human's
    marked = AFTER_HASHES.search(answer.rstrip()) if isinstance(answer, str) else None
    if marked:
        reasoning, item.source = answer[: marked.start()], "gsm8k"
    if _blank(reasoning):
        return item
    item.gold = item.gold or _gold(boxed_gold(_text(solution or reasoning, "'solution'")))
    said = _with_thought(row, _text(reasoning, "'solution'").strip())
    reward = _reward(row)
    if reward is not None and reward <= 0:
        item.traces = [Trace(said, reward)]
    elif item.gold and said not in (item.gold, f"\\boxed{{{item.gold}}}"):  # an answer alone is no reasoning
        whole = "</think>" in said  # a response as a model wrote it; with GSM8K's mark, its answer was cut off above
        said = said if whole else f"{THINK}{said}\n</think>"
        if not whole or (marked and last_boxed(said) is None):
            said += f"\n\n\\boxed{{{item.gold}}}"
        item.traces = [Trace(said, 1.0 if reward is None else reward)]
    return item


def _gpqa(row: dict) -> dict:
    """A row of GPQA as a multiple choice of options in random order."""
    names = ("correct answer", *(f"incorrect answer {i}" for i in (1, 2, 3)))
    options = [_text(row[name], f"'{name}'").strip() for name in names if name in row]
    right = options[0]
    if options.count(right) > 1:
        raise ValueError("the options must hold the right one only once")
    random.Random(row["question"]).shuffle(options)  # by the question: the same in every run
    return row | {"options": options, "answerkey": LETTERS[options.index(right)]}


def _options(row: dict) -> dict[str, str | int | float]:
    """{label: option}, {} if there are none: of a list, {label: option}, [{label, text}], {label: [...], text: [...]},
    or columns A, B, ..."""
    given = row.get("options", row.get("choices", {}))
    gold = next((row[name] for name in RIGHT_OPTION if name in row), "")
    small = str(gold).strip().lower() in [*string.ascii_lowercase]  # columns a, b, ... and an answer such as "a"
    for letters in (LETTERS, LETTERS.lower()) if small else (LETTERS,):
        if not given and {*letters[:2]} <= row.keys():
            given = {letter.upper(): row[letter] for letter in letters if letter in row}
    if isinstance(given, dict) and {"label", "text"} <= given.keys():
        given = dict(zip(given["label"], given["text"], strict=True))
    elif isinstance(given, list) and all(isinstance(option, dict) for option in given):
        given = {option.get("label", option.get("key")): option.get("text", option.get("value")) for option in given}
    elif isinstance(given, list):
        given = dict(zip(LETTERS[: len(given)], given, strict=True))
    elif not isinstance(given, dict):
        raise TypeError("'options' is neither a list nor {label: option}")
    options = {str(label): option for label, option in given.items()}
    while options and _blank([*options.values()][-1]):  # a question with fewer options than others of the file
        options.popitem()
    texts = {label: _text(o, "an option").strip() for label, o in options.items() if type(o) not in (int, float)}
    if given and (len(options) < 2 or not all(texts.values())):
        raise ValueError("a multiple choice needs two options or more, none of them blank")
    mark = r"(?:\)|(?<!\d)[.:]|[.:](?!\d))"  # not the point of 1.5 or the colon of 1:30 behind a label 1
    if all(re.match(rf"\(?{re.escape(label)}{mark}", texts.get(label, "")) for label in options):
        texts = {label: re.sub(r"^\(?\w+[).:]", "", text).strip() for label, text in texts.items()}  # "A) 3"
    return options | texts


def _right_option(row: dict, options: dict) -> str:
    """The label of the right option, "" if no column names it. In a row with a response, 'label' and 'correct' grade
    the response. In other rows such a column is removed if it names the option (a 'label' also if another column names
    the same option)."""
    marks = () if all(_blank(row.get(name)) for name in RESPONSES) else MARKS
    given = {name: row[name] for name in RIGHT_OPTION if name in row and name not in marks}
    for name, answer in given.items():
        if label := _label_of(answer, options):
            if name in MARKS:
                del row[name]
            if type(given.get("label")) in (int, float) and _label_of(given["label"], options) == label:
                row.pop("label", None)
            return label
    if given:
        raise ValueError(f"the answer {next(iter(given.values()))!r} is none of the labels {', '.join(options)}")
    return ""


def _label_of(answer, options: dict) -> str:
    """The label of the option that an answer names, "" if none: by its label, its index from 0 on, or its text. A text
    such as "1" is an index only if it is neither a label nor an option; so is a number if all options are numbers."""
    answer = int(answer) if isinstance(answer, float) and answer.is_integer() else answer
    text, labels, texts = str(answer).strip(), list(options), [str(option) for option in options.values()]
    text = text if text in texts else text.removesuffix(".0")  # of a column that held a NaN
    numbers = not any(isinstance(option, str) for option in options.values())
    if text in options:
        return text
    index = text not in texts or (type(answer) is int and not numbers)
    if index and text.isdecimal() and int(text) < len(labels):
        return labels[int(text)]
    if texts.count(text) == 1:
        return labels[texts.index(text)]
    bare = text.strip("().").upper()
    return bare if bare in options else ""


SHAPES = (  # the first shape whose columns a row has; blank columns do not count
    ({"prompt_ids", "response_ids", "reward"}, _drawn),  # what oreo.py and tools/agents.py collect
    ({"chosen"}, _pair),
    ({"rejected"}, _pair),
    ({"conversations"}, _conversation),
    ({"generations", "VERDICTS"}, _generations),
    ({"prompt", "target"}, _luffy),
    ({"responses", "rewards"}, _responses),
    ({"prompt", "RESPONSE"}, _single),
    ({"prompt", "reward_model"}, _luffy),
    ({"prompt", "messages"}, _conversation),  # UltraChat: the prompt is the first of the turns
    ({"prompt", "label"}, _single),
    ({"prompt"}, _luffy),
    ({"question", "GRADED"}, _gsm8k_graded),
    ({"QUESTION", "RESPONSE", "MARK"}, _single),
    ({"QUESTION", "solution"}, _problem),
    ({"QUESTION", "RESPONSE"}, _single),
    ({"QUESTION"}, _problem),
    ({"messages"}, _conversation),
)
