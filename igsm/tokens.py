r"""A small tokenizer for each style, made here in code. Nothing is downloaded; decode(encode(text)) == text.

symbolic         54 types: one token per character, and "<think>", "</think>", "\boxed{"; with a modulus of 11 to
                 100 also one for every two-digit number below it
natural, define  512 types: one token per word with the space before it, one per digit

    " Now, we can find"  ->  [" Now", ",", " we", " can", " find"]
    "v = 5 * (b - 12)"   ->  ["v", " = ", "5", " * ", "(", "b", " - ", "1", "2", ")"]

A conversation reads <|user|>question<|assistant|>solution<|eos|>. A generation prompt ends with "<think>\n",
with which solutions begin; what is sampled goes on from there.
"""

import re
from string import ascii_letters, ascii_lowercase, digits

from igsm import text
from igsm.vocabulary import CATEGORIES

SPECIAL = ("<|pad|>", "<|eos|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD, EOS, UNK, SYSTEM, USER, ASSISTANT = SPECIAL
MARKS = ["<think>", "</think>", "<answer>", "</answer>", "\\boxed{"]
PIECES = {
    "symbolic": r"</?think>|\\boxed\{|[\s\S]",
    "symbolic, modulus": r"</?think>|\\boxed\{|[1-9][0-9]|[\s\S]",
    # an operator takes its spaces along; a space before a number stands alone, so that a digit stays a digit
    "natural": r"</?think>|</?answer>|\\boxed\{| [=+*-] (?=[-(\w])| ?[A-Za-z]+|'s\b|[0-9]|[\s\S]",
}

# BRIDGE's, for those who want their prompts to begin with it
SYSTEM_PROMPT = (
    "A conversation that the assistant solves the user's problem. The assistant first thinks about the "
    "reasoning process in the mind and then provides the user with the answer. The reasoning process and "
    "answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "all the reasoning process here </think> <answer> final answer here </answer>."
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)


def tokenizer(style, *, modulus=None, retry=False):
    """The tokenizer for a style: a PreTrainedTokenizerFast with a chat template; eos and pad are two tokens.

    modulus (symbolic style, at most 100): numbers below it are one token each, which tiny models learn faster.

    retry: add " BACK", the only word that Meta's retries need and the natural style does not have.

    Text that a style never uses becomes <|unk|>. A system message is rendered if there is one, never added.
    """
    if style not in text.STYLES:
        raise ValueError(f"style must be one of {', '.join(text.STYLES)}, got {style!r}")
    if modulus is not None and modulus < 2:
        raise ValueError(f"modulus must be 2 or more, or None for plain integers, got {modulus}")
    if style == "symbolic":
        whole = modulus is not None and modulus <= 100
        pattern = PIECES["symbolic, modulus" if whole else "symbolic"]
        types = _symbolic_types(modulus if whole else 10)
    else:
        pattern = PIECES["natural"]
        types = [*_natural_types(pattern), *([" BACK"] if retry else [])]
    return word_level(types, pattern)


def word_level(types, pattern, special=SPECIAL, chat_template=CHAT_TEMPLATE):
    """A tokenizer with these types after the special ones, which are PAD, EOS, UNK and marks of turns."""
    # imported here because they take seconds, and nothing else in igsm needs them
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = dict.fromkeys([*special, *types])  # each once
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, unk_token=UNK, chat_template=chat_template,
        additional_special_tokens=list(special[3:]), clean_up_tokenization_spaces=False, padding_side="left",
    )  # fmt: skip


def _symbolic_types(modulus):
    two_digits = [str(number) for number in range(10, modulus)]
    return ["<think>", "</think>", "\\boxed{", "}", *"\n=+-*()?", *digits, *two_digits, *ascii_lowercase]


def _natural_types(pattern):
    """Every piece that our sentences, solutions and the system prompt can be cut into."""
    names = [name for category, items in CATEGORIES.items() for name in (category, *items)]
    said = [*text.GIVEN, *text.DENOTE, *text.FIND, *text.DEFINE, text.REMEMBER, text.ANALYSIS, *text.UNKNOWN]
    said += [
        "So Then are",
        "Define each x as",
        "The number of each x's x equals",
        "How many x does each x have?",
    ]
    said += ["more than the sum of", "times the difference of", "Thus, the answer is", "The final answer is"]
    said += [text.HEAD, SYSTEM_PROMPT] + [f" {phrase}" for phrase in said] + [f" {name}" for name in names]
    pieces = {piece for phrase in said for piece in re.findall(pattern, phrase)}
    letters = [space + letter for space in ("", " ") for letter in ascii_letters]
    operators = [space + sign + space for space in ("", " ") for sign in "=+-*"]
    return [*MARKS, "}", *"\n .,()?'", *operators, *digits, *letters, *sorted(pieces - set(letters))]
