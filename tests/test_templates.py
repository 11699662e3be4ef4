"""Chat templates: what a script was told to use is what it trains on, and what it saves with the model."""

import re
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import behavior_injection as bridge
import eval as evaluation
import igsm
import luffy
import oreo
import redi
import relift
from common.data import InputError
from common.rows import (
    Trace,
    check_template,
    conversation_ids,
    encode_traces,
    make_examples,
    render_prompt,
    response_ids,
    set_template,
    trace_text,
    turn_end,
)
from common.trainer import load_tokenizer
from tests.conftest import ROOT, parsed, write_rows

pytestmark = pytest.mark.usefixtures("without_curves")
MODEL = str(ROOT / "models/tiny")
TINY = ["--preset", "tiny", "--model", MODEL, "--batch_size", "2", "--igsm_problems", "4", "--save_every", "0",
        "--eval_every", "0"]  # fmt: skip
TURNS = [{"role": "user", "content": "a=5\na?"}]
SWITCH = (
    "{% macro end() %}{{ '<think>\n\n</think>\n\n' if not thinking else '<think>\n' }}{% endmacro %}"
    "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}{{ end() }}"
)


HEADERS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


GENERATION = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.mark.parametrize(("template", "said"), [
    (HEADERS, "it writes '<|assistant|>' between a prompt and"),
    (HEADERS.replace("|>{{", "|>{{ '<|final|>' if m.role == 'assistant' }}{{") + GENERATION,
     "it writes '<|final|>' between a prompt and"),
    ("{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}", "prints today's date"),
    # no warning: a set date, a space, templates of questions
    (HEADERS + GENERATION, ""),
    ("{{ day if day else strftime_now('%Y') }}{{ messages[0].content }}", ""),
    ("{% for m in messages %}{{ m.role }}:{{ ' ' if m.role == 'assistant' }}{{ m.content }}{% endfor %}"
     "{{ 'assistant:' if add_generation_prompt }}", ""),
    ("{{ messages[0].content }}", ""),
    ("{{ messages[0].content }}{{ eos_token if not add_generation_prompt }}", ""),
])  # fmt: skip
def test_what_a_template_leaves_out_adds_or_changes_every_day_is_warned_of_and_nothing_else(
    template, said, tmp_path, capsys
):
    (tmp_path / "t.jinja").write_text(template)
    set_template(load_tokenizer(MODEL), str(tmp_path / "t.jinja"), ["day=1"] if "day if" in template else [])
    found = capsys.readouterr().err
    assert said in found and ("WARNING" in found) == bool(said)


@pytest.mark.parametrize(
    ("template", "closing"),
    [("User: {{ messages[-1].content }}.\nAssistant: <think>\n", "<|eos|>"),  # LUFFY's for Llama: one turn alone
     ("{{ messages[0].content }}", "<|eos|>"),
     ("{% for m in messages %}{{ m.content }}<|user|>{% endfor %}"
      "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}", "<|user|>"),  # Phi's
     ("{% for m in messages %}{{ m.content }}<|user|>{% endfor %}", "<|user|>")],
)  # fmt: skip
def test_what_ends_an_answer_is_what_the_template_puts_behind_one(template, closing):
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = template
    ids = tokenizer.convert_tokens_to_ids([closing])
    assert turn_end(tokenizer) == (ids[0], [*dict.fromkeys([tokenizer.eos_token_id, *ids])])
    [trace] = encode_traces(tokenizer, [Trace(f"a=5{closing}")], ["q"], ["row"])
    assert trace == [*tokenizer("a=5", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("space", ["\n", "\n\n", ""])
def test_a_trace_has_the_space_that_the_template_writes_before_an_answer_as_a_conversation_has(space):
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = HEADERS.replace("|>{{", "|>{{ s if m.role == 'assistant' }}{{") + GENERATION
    tokenizer.chat_template = f"{{% set s = {space!r} %}}" + tokenizer.chat_template
    prompt = render_prompt(tokenizer, TURNS)
    _, taught, _ = conversation_ids([*TURNS, {"role": "assistant", "content": "a=5"}], tokenizer, 0)

    def trace_of(prompt, text="a=5", **more):
        [ids] = encode_traces(tokenizer, [Trace(text, **more)], [prompt], ["row"])
        return tokenizer.decode(ids[:-1])

    assert trace_of(prompt) == tokenizer.decode(taught) == f"{space}a=5"
    assert trace_of("a=5\na?") == trace_of(prompt, probs=[0.5] * 3) == "a=5"  # another prompt; these tokens alone
    assert trace_of(prompt, "\na=5") == "\na=5" and encode_traces(tokenizer, [Trace("")], [prompt], ["row"]) == [[]]


def test_a_word_before_the_next_question_does_not_end_a_trace():
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}b{% endfor %}"  # as "Question" might stand there
    [trace] = encode_traces(tokenizer, [Trace("a=5b=6")], ["q"], ["row"])
    assert tokenizer.decode(trace) == "a=5b=6<|eos|>"


def test_a_turn_that_a_template_refuses_names_the_row():
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = "{{ raise_exception('no') if messages[0].role == 'system' }}{{ messages[0].content }}"
    rows = [{"prompt": [{"role": "system", "content": "x"}, *TURNS], "answer": "5", "target": "a=5"}]
    limits = SimpleNamespace(max_prompt_tokens=9, max_response_tokens=9)
    with pytest.raises(InputError, match=r"f.jsonl, row 0: the chat template cannot render \['system', 'user'\] turns"):
        make_examples(rows, tokenizer, limits, source="f.jsonl")


def test_turns_that_a_template_leaves_out_are_warned_of_once(capsys, monkeypatch):
    monkeypatch.setattr("common.rows._lost", set())
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}{% endfor %}"
    talk = [*TURNS, {"role": "assistant", "content": "a=5"}, {"role": "observation", "content": "b=6"}]
    for _ in range(2):
        render_prompt(tokenizer, talk, "f.jsonl, row 0: ")
    said = capsys.readouterr().err
    assert said.startswith("WARNING: f.jsonl, row 0: the chat template does not show 'observation' turns as they are")
    assert said.count("WARNING") == 1


@pytest.mark.parametrize("broken", ["{{ 1 / 0 }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"])
def test_what_a_broken_template_raises_is_a_message(broken):
    tokenizer = load_tokenizer("models/tiny")
    tokenizer.chat_template = broken
    check_template(tokenizer, "t.jinja")  # says nothing of templates that render nothing
    with pytest.raises(InputError, match="the chat template cannot render"):
        render_prompt(tokenizer, [{"role": "user", "content": "1+1"}])


def test_a_thought_in_a_conversation_whose_template_closes_it_is_refused():
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = HEADERS + "{% if add_generation_prompt %}<|assistant|><think>\n\n</think>\n\n{% endif %}"
    talk = [*TURNS, {"role": "assistant", "content": "<think>\na=5\n</think>\n5"}]
    with pytest.raises(InputError, match="the trace has a thought, and the chat template ends with a closed one"):
        conversation_ids(talk, tokenizer, 0)
    [trace] = encode_traces(tokenizer, [Trace("\n\na=5")], ["q<think>\n\n</think>\n\n"], ["row"])
    assert tokenizer.decode(trace) == "a=5<|eos|>"
    drawn = tokenizer("\na=5", add_special_tokens=False)["input_ids"]
    assert encode_traces(tokenizer, [Trace("\na=5", ids=drawn)], ["q</think>\n\n"], ["row"]) == [drawn]


@pytest.mark.parametrize("flag", ["--chat_template", "--template"])
def test_a_template_that_is_not_jinja_is_named(flag, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}")
    with pytest.raises(InputError, match="t.jinja: not a Jinja template"):
        if flag == "--template":
            evaluation.read_template(str(tmp_path / "t.jinja"), load_tokenizer(MODEL))
        else:
            set_template(load_tokenizer(MODEL), str(tmp_path / "t.jinja"))


@pytest.mark.parametrize(("script", "how"), [(luffy, "--method"), (relift, "--method"), (redi, "--stage"),
                                             (oreo, "--stage")])  # fmt: skip
def test_the_template_that_was_used_is_saved_with_the_model(script, how, tmp_path):
    (tmp_path / "t.jinja").write_text(SWITCH)
    words = [*TINY, how, "sft", "--steps", 1, "--out", tmp_path / "run", "--chat_template_args", "thinking=true"]
    script.main(parsed(script.__name__, *words, "--chat_template", tmp_path / "t.jinja"))
    saved = load_tokenizer(str(tmp_path / "run" / "model"))
    assert render_prompt(saved, TURNS) == "user:a=5\na?<think>\n"


def test_behavior_injection_saves_the_tag_that_it_adds_so_that_eval_asks_as_it_trained(tmp_path):
    rows = [igsm.row(p, "train") for p in igsm.problems(2, ops=(1, 2), style="symbolic", modulus=23, max_params=4)]
    (tmp_path / "data").mkdir()
    data = write_rows(tmp_path / "data" / "sft_bridge.jsonl", rows)
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}")
    words = ["--preset", "tiny", "--model", MODEL, "--sft_batch_size", "2", "--sft_steps", "1",
             "--out", str(tmp_path), "--chat_template", str(tmp_path / "t.jinja"), "--save_every", "0"]  # fmt: skip
    args = bridge.settings_of(parsed("behavior_injection", *words), "sft", "bridge")
    bridge.train(args)
    model = str(tmp_path / "bridge" / "sft" / "model")
    trained, _ = bridge.read_set("sft_bridge", bridge.open_tokenizer(MODEL, args), args, traces="needed")
    questions = evaluation.read_questions([data])
    evaluation.make_prompts(questions, load_tokenizer(model), evaluation.Args())
    assert [q.prompt for q in questions] == [e.prompt for e in trained]
    assert questions[0].prompt_text.endswith("<think>\n")


def test_switches_are_part_of_the_template_and_the_last_one_counts():
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = SWITCH
    assert render_prompt(tokenizer, TURNS).endswith("</think>\n\n")
    set_template(tokenizer, switches=["thinking=true"])
    assert render_prompt(tokenizer, TURNS) == "user:a=5\na?<think>\n"
    set_template(tokenizer, switches=["thinking=false"])
    assert render_prompt(tokenizer, TURNS).endswith("</think>\n\n") and tokenizer.chat_template.count("set ") == 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [("true", "True"), ("False", "False"), ("3", "3"), ("null", "None"), ("low", "low"), ('"a\'b"', "a'b"),
     ("🙂", "🙂")],
)
def test_a_switch_is_a_json_value_or_a_text(value, shown):
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = "{{ effort }}"
    assert render_prompt(set_template(tokenizer, switches=[f"effort={value}"]), TURNS) == shown


@pytest.mark.parametrize(
    ("words", "message"),
    [(["thinking"], "expected key=value"), (["thinkin=true"], "the chat template has no switch 'thinkin'")],
)
def test_a_switch_that_does_nothing_is_refused(words, message):
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = SWITCH
    with pytest.raises(InputError, match=f"--chat_template_args {words[0]}: {message}"):
        set_template(tokenizer, switches=words)


def test_a_switch_without_a_template_is_refused():
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="--chat_template_args: the tokenizer has no chat template"):
        set_template(tokenizer, switches=["thinking=true"])


def test_of_several_named_templates_the_default_gets_the_switch():
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = {"default": SWITCH, "tool_use": "x"}
    assert render_prompt(set_template(tokenizer, switches=["thinking=true"]), TURNS).endswith("<think>\n")


@pytest.mark.parametrize("trace", ["<think>Okay", "<think>\nOkay", "<think>\n\nOkay"])
@pytest.mark.parametrize("end", ["<think>", "<think>\n", "<think>\n\n"])
def test_one_think_tag_is_trained_whatever_white_space_template_and_trace_have(end, trace):
    whole = end + trace_text(f"assistant{end}", trace)
    assert whole.count("<think>") == 1 and whole.replace("\n", "") == "<think>Okay"
    assert whole.count("\n") == max(end.count("\n"), trace.count("\n"))


def test_a_thought_after_a_template_that_closes_it_is_refused(tmp_path):
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = SWITCH
    row = {"prompt": TURNS, "target": "<think>\na=5\n</think>\n\\boxed{5}", "reward_model": {"ground_truth": "5"}}
    limits = SimpleNamespace(max_prompt_tokens=99, max_response_tokens=99)
    with pytest.raises(InputError, match="rows, row 0: the trace has a thought.*--chat_template_args.*thinking=true"):
        make_examples([row], tokenizer, limits, source="rows")
    [example], _ = make_examples([row | {"target": "\\boxed{5}"}], tokenizer, limits, source="rows")
    assert tokenizer.decode(example.trace[:-1]) == "\\boxed{5}"
    pair = {"prompt": TURNS, "chosen": row["target"], "rejected": "6"}
    with pytest.raises(InputError, match="rows, row 0: the trace has a thought"):
        redi.make_pairs([pair], tokenizer, redi.Args(), source="rows")


def sentence_piece():
    """A tokenizer that puts a word mark before every text, as SentencePiece does with its dummy prefix."""
    pieces = ["<unk>", "\u2581", "\u2581Okay", "Okay", "\n", "\u2581is", "\u2581a", "a", "?"]
    core = Tokenizer(models.Unigram([(piece, -float(len(pieces) - i)) for i, piece in enumerate(pieces)], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.add_special_tokens([AddedToken("<think>", normalized=False), AddedToken("<eos>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", chat_template="{{ messages[0].content }}")


def test_a_trace_after_a_prompt_starts_without_the_word_mark_that_sentencepiece_adds():
    tokenizer = sentence_piece()
    alone, spaced = response_ids(tokenizer, ["a?<think>\n"] * 2, ["Okay is", " is Okay"])
    assert tokenizer.convert_ids_to_tokens(alone) == ["Okay", "\u2581is"]
    assert tokenizer.convert_ids_to_tokens(spaced) == ["\u2581is", "\u2581Okay"]  # a space of its own stays
    assert response_ids(tokenizer, ["a? "], ["Okay is"]) == [alone]  # nor does it get one beside the prompt's
    row = {"prompt": [{"role": "user", "content": "a?<think>\n"}], "target": "<think>\nOkay is", "answer": "a"}
    limits = SimpleNamespace(max_prompt_tokens=9, max_response_tokens=9)
    [example], _ = make_examples([row], tokenizer, limits, source="x")
    both = tokenizer("a?<think>\nOkay is<eos>", add_special_tokens=False)["input_ids"]
    assert example.prompt + example.trace == both
    core = tokenizer.backend_tokenizer  # as older tokenizers add it
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.pre_tokenizer = None
    assert response_ids(tokenizer, ["a?"] * 2, ["Okay is", " is Okay"]) == [alone, spaced]


@pytest.mark.parametrize("keep", [True, False])
def test_a_template_that_refuses_a_system_turn_names_the_flag(tmp_path, keep):
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    row = {"prompt": [{"role": "system", "content": "Think."}, *TURNS], "answer": "5"}
    questions = evaluation.read_questions([write_rows(tmp_path / "rows.jsonl", [row])])
    if keep:
        with pytest.raises(InputError, match="row 0: .*role not supported.*--template FILE.*--no_system"):
            evaluation.make_prompts(questions, tokenizer, evaluation.Args())
    else:
        evaluation.make_prompts(questions, tokenizer, evaluation.Args(system=False))
        assert questions[0].prompt_text == "a=5\na?"


@pytest.mark.parametrize(("bos", "template", "warned"), [
    (None, HEADERS, False), ("<s>", HEADERS, True), ("<s>", "{{ bos_token }}" + HEADERS, False),
])  # fmt: skip
def test_prompts_without_the_bos_that_the_tokenizer_puts_before_text_are_warned_of(bos, template, warned, capsys):
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = template
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
        before = processors.TemplateProcessing("<s> $A", None, [(bos, tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = before
    limits = SimpleNamespace(max_prompt_tokens=99, max_response_tokens=99)
    make_examples([{"prompt": TURNS, "answer": "5", "target": "a=5"}], tokenizer, limits, source="f.jsonl")
    assert ("1 of 1 prompts do not begin with bos" in capsys.readouterr().err) == warned


def test_the_templates_of_the_published_llamas_and_gemma_begin_with_one_bos():
    """The page's llama, gemma and turns: their original prompts had it, and only the template adds it here."""
    [block] = re.findall(r"```jinja\n(.*?)```", (ROOT / "docs/published.md").read_text(), re.DOTALL)
    tokenizer = load_tokenizer(MODEL)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    shown = []
    for template in block.splitlines():
        tokenizer.chat_template = template
        shown.append(render_prompt(tokenizer, TURNS))
    assert [(text.startswith("<s>"), text.count("<s>")) for text in shown] == [(False, 0)] + [(True, 1)] * 3
