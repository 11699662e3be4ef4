"""tools/agents.py: the protocol, episodes as rows, choosing by value; and the real games where they are installed."""

import copy
import hashlib
import json
import random
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import oreo
from common.data import InputError
from common.rollout import Completion
from common.rows import conversation_ids, trace_ids, turn_end
from common.shapes import read_row
from common.trainer import ValueModel, load_policy
from tests.conftest import NANO, ROOT, read_rows, write_rows
from tests.oreo_ranks import Counts
from tests.test_templates import sentence_piece
from tools import agents
from tools.agents import (
    Args,
    Episode,
    RenamedGame,
    other_names,
    parse_action,
    play,
    replace_words,
    word_tokenizer,
)


class Door:
    """Open the door, then go: two commands win it; "jump" loses it."""

    rules = "Open the door and go."
    walkthrough = ["open door", "go out"]
    things = {"door": "d"}

    def __init__(self, path):
        self.open = False

    def reset(self):
        return "A door."

    def act(self, command):
        if command == "open door":
            self.open = True
            return "The door is open.", False, False
        over = command == "jump" or (command == "go out" and self.open)
        return "It is over." if over else "Nothing happens.", over, over and self.open

    def close(self):
        pass


TOKENIZER = word_tokenizer([
    "OK", "Observation: ", "Thought: ", "Action: ", "Open the door and go.", "A door.", " open door go out jump I wait",
    " The door is open. It is over. Nothing happens.\n",
])  # fmt: skip

CONFIG = dict(NANO, vocab_size=len(TOKENIZER), max_position_embeddings=512)


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def games(monkeypatch):
    monkeypatch.setattr(agents, "find_games", lambda source: [(f"door-{i}", "", Door) for i in range(3)])


@pytest.fixture
def agent(world):
    """Policy of random weights; its answers come from a script instead."""
    return load_policy("nano", world, from_config=CONFIG, seed=3)


def scripted(monkeypatch, answer):
    """Let `answer(prompt text, episode's number, candidate)` be what the sampler draws."""

    class Sampler:
        def sync(self, policy, version):
            pass

        def generate(self, prompts, *, n, keys, seed, sampling, progress):
            return [[Completion(ids(answer(TOKENIZER.decode(p), k, i))[:limit], [], "stop") for i in range(n)]
                    for p, k, limit in zip(prompts, keys, sampling.max_tokens, strict=True)]  # fmt: skip

        def close(self):
            pass

    monkeypatch.setattr(agents, "make_sampler", lambda *args, **options: Sampler())


@pytest.mark.parametrize(
    ("answer", "command"),
    [
        ("Thought: closed\nAction: open door", "open door"),
        ("Action: open door\nAction: go out", "open door"),
        ("Action:  take key from table \n", "take key from table"),
        ("open door", None),
        ("Action: ", None),
        ("Action: \nAction: go", None),
    ],
)
def test_the_action_is_the_rest_of_the_first_action_line(answer, command):
    assert parse_action(answer) == command


def test_an_episode_is_a_row_of_the_ids_that_were_drawn_with_the_answers_as_actions():
    episode = Episode("door", 0, Door(""), TOKENIZER)
    for answer in ("Thought: I wait\nAction: open door<|eos|>", "Action: go out<|eos|>"):
        episode.add_answer(ids(answer))
    row = episode.row()
    assert (row["reward"], row["end"], row["turns"]) == (1.0, "won", 2)
    shown = TOKENIZER.decode(row["prompt_ids"])
    assert shown == "<|user|>Open the door and go.<|assistant|>OK<|eos|><|user|>A door.<|assistant|>"
    spans = [TOKENIZER.decode([t for t, a in zip(row["response_ids"], row["actions"], strict=True) if a == side])
             for side in (1, 0)]  # fmt: skip
    assert spans[0] == "Thought: I wait\nAction: open door<|eos|>Action: go out<|eos|>"
    assert spans[1] == "<|user|>Observation: The door is open.<|assistant|>"
    # the same as the conversation's text gives, its "OK" being context
    prompt, response, actions = conversation_ids(row["conversations"], TOKENIZER, skip_turns=1)
    assert (prompt, response, [int(a) for a in actions]) == (row["prompt_ids"], row["response_ids"], row["actions"])


def test_every_end_of_an_episode_is_told_apart(games, agent, world, monkeypatch, tmp_path):
    says = ["Action: open door<|eos|>", "Action: jump<|eos|>", "I wait<|eos|>"]
    scripted(monkeypatch, lambda text, number, _: says[number])
    args = Args(stage="collect", max_turns=4, max_turn_tokens=16, parallel=2, out=str(tmp_path / "a"))
    rows = play(args, TOKENIZER, agent, None, world, 1)
    assert [(row["question"], row["end"], row["turns"]) for row in rows] == [
        ("door-0", "max_turns", 4), ("door-1", "lost", 1), ("door-2", "no_action", 1),
    ]  # fmt: skip
    assert [row["reward"] for row in rows] == [0, 0, 0]
    args = Args(stage="collect", max_turn_tokens=16, max_episode_tokens=60, out=str(tmp_path / "b"))
    rows = play(args, TOKENIZER, agent, None, world, 1)
    assert rows[0]["end"] == "too_long" and rows[0]["turns"] > 1
    args = Args(stage="collect", max_turn_tokens=16, max_episode_tokens=5, out=str(tmp_path / "c"))
    rows = play(args, TOKENIZER, agent, None, world, 1)
    assert {(row["end"], row["turns"]) for row in rows} == {("too_long", 0)}


def test_an_episode_may_fill_its_tokens(games, agent, world, monkeypatch, tmp_path):
    scripted(monkeypatch, lambda text, number, _: "Action: jump<|eos|>")
    start, answer = len(Episode("door", 0, Door(""), TOKENIZER).ids), len(ids("Action: jump<|eos|>"))
    for size, end in ((start + answer, "lost"), (start + answer - 1, "too_long"), (start, "too_long")):
        args = Args(stage="collect", max_turn_tokens=16, max_episode_tokens=size, out=str(tmp_path / str(size)))
        assert {row["end"] for row in play(args, TOKENIZER, agent, None, world, 1)} == {end}


def test_every_turn_of_every_seed_draws_from_a_stream_of_its_own(games, agent, world, monkeypatch, tmp_path):
    """At the temperature of the settings to collect, and greedily to evaluate without a value."""
    asked = []
    scripted(monkeypatch, lambda text, number, _: "Action: open door<|eos|>")
    made = agents.make_sampler

    def watched(*args, **options):
        sampler = made()
        real = sampler.generate
        sampler.generate = lambda *given, **named: (
            asked.append((named["seed"], named["sampling"])) or real(*given, **named)
        )
        return sampler

    monkeypatch.setattr(agents, "make_sampler", watched)
    for seed in (0, 1):
        args = Args(stage="collect", seed=seed, temperature=0.7, max_turns=3, out=str(tmp_path / str(seed)))
        play(args, TOKENIZER, agent, None, world, 1)
    assert len({seed for seed, _ in asked}) == len(asked) == 6 and {s.temperature for _, s in asked} == {0.7}
    play(Args(temperature=0.7, max_turns=1, out=str(tmp_path / "e")), TOKENIZER, agent, None, world, 1)
    assert asked[-1][1].temperature == 0.0


def test_an_answer_that_does_not_end_loses(games, agent, world, monkeypatch, tmp_path):
    scripted(monkeypatch, lambda text, number, _: "Action: open door")
    rows = play(Args(stage="collect", out=str(tmp_path)), TOKENIZER, agent, None, world, 1)
    assert {row["end"] for row in rows} == {"no_action"}


def test_episodes_are_kept_and_a_stopped_collection_plays_the_others(games, agent, world, monkeypatch, tmp_path):
    played = []

    def says(text, number, _):
        played.append(number)
        if len(played) == 4:
            raise KeyboardInterrupt
        return "Action: jump<|eos|>"

    scripted(monkeypatch, says)
    args = Args(stage="collect", parallel=2, out=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        play(args, TOKENIZER, agent, None, world, 2)
    rows = play(args, TOKENIZER, agent, None, world, 2)
    assert played == [0, 1, 2, 3, 2, 3, 4, 5]
    assert [row["id"] for row in rows] == list(range(6)) and {row["end"] for row in rows} == {"lost"}
    assert read_rows(tmp_path / "episodes.jsonl") == rows


def test_a_folder_holds_the_episodes_of_one_stage_its_settings_and_weights(games, agent, monkeypatch, tmp_path):
    scripted(monkeypatch, lambda text, number, _: "Action: jump<|eos|>")
    digests = {"m": "1", "moved": "1", "other": "2"}
    monkeypatch.setattr("common.run.digest_of", lambda path, flag: digests.get(path))
    monkeypatch.setattr(agents, "open_tokenizer", lambda path, args: TOKENIZER)
    monkeypatch.setattr(agents, "load_policy", lambda path, world, **options: agent)
    first = dict(stage="expert", model="m", out=str(tmp_path / "out"))
    agents.main(Args(**first))
    before = (tmp_path / "out" / "rows.jsonl").read_text()
    agents.main(Args(**first | {"model": "moved", "parallel": 7}))  # the same weights
    for changes, message in (
        (dict(stage="collect"), "--stage 'expert' there, 'collect' here"),
        (dict(seed=3), "--seed 0 there, 3 here"),
        (dict(model="other"), "(other weights)"),
    ):
        with pytest.raises(InputError, match=f"out has episodes of other settings .{message}"):
            agents.main(Args(**first | changes))
    monkeypatch.setattr(agents, "find_games", lambda source: [(f"door-{i}", "", Door) for i in (9, 10, 11)])
    with pytest.raises(InputError, match="out has episodes of other settings .other games"):
        agents.main(Args(**first))
    monkeypatch.setattr(agents, "find_games", lambda source: [(f"door-{i}", "", Door) for i in range(3)])
    assert (tmp_path / "out" / "rows.jsonl").read_text() == before
    assert agents.main(Args(**first | {"out": str(tmp_path / "b"), "stage": "evaluate"}))["episodes"] == 3
    assert agents.main(Args(**first | {"out": str(tmp_path / "b"), "stage": "evaluate"}))["success"] == 0
    run = tmp_path / "run"  # of training, or a model alone: neither is replaced
    (run / "model").mkdir(parents=True)
    with pytest.raises(InputError, match="args.json is missing, so the settings of the files beside it are unknown"):
        agents.main(Args(stage="expert", model="scratch", out=str(run)))
    (run / "args.json").write_text(json.dumps({"model": "m", "temperature": 1.0, "seed": 0}))
    with pytest.raises(InputError, match="run has episodes of other settings .other weights; other games.: use the"):
        agents.main(Args(stage="expert", model="scratch", out=str(run)))


def test_a_folder_of_games_has_one_kind(tmp_path, monkeypatch):
    made = []
    textworld = types.SimpleNamespace(make=lambda options: made.append(options.seeds), GameOptions=lambda: (
        types.SimpleNamespace(chaining=types.SimpleNamespace(), grammar=types.SimpleNamespace())))  # fmt: skip
    monkeypatch.setitem(sys.modules, "textworld", textworld)
    agents.main(Args(stage="make", games=str(tmp_path), count=2))
    agents.main(Args(stage="make", games=str(tmp_path), count=1, first_seed=7))
    with pytest.raises(InputError, match="holds games of other options .--rooms 1 there, 3 here.: name another folder"):
        agents.main(Args(stage="make", games=str(tmp_path), count=9, rooms=3))
    assert made == [0, 1, 7]


def test_the_value_chooses_among_the_candidates(games, agent, world, monkeypatch, tmp_path):
    """Of three answers one opens the door, and once it is open one goes out: a value that likes both words wins."""
    says = ["Action: wait<|eos|>", "Action: open door<|eos|>", "Action: go out<|eos|>"]
    scripted(monkeypatch, lambda text, number, i: says[i])
    [opens] = ids(" open")
    [out] = ids(" out")

    class OpenThenOut(torch.nn.Module):
        def forward(self, batch):
            opened = Counts(opens)(batch)
            return opened.clamp(max=2) + Counts(out)(batch) * (opened >= 2)

    args = Args(stage="evaluate", candidates=3, max_turns=3, out=str(tmp_path / "a"))
    rows = play(args, TOKENIZER, agent, OpenThenOut(), world, 1)  # "is open" is the second one
    assert {(row["end"], row["turns"]) for row in rows} == {("won", 2)}
    args.out = str(tmp_path / "b")
    rows = play(args, TOKENIZER, agent, Counts(ids(" wait")[0]), world, 1)
    assert {row["end"] for row in rows} == {"max_turns"}


def test_a_rank_chooses_by_the_values_of_its_own_answers_however_many_others_have(monkeypatch):
    groups = [[Completion([10 * e + i, 1], [], "stop") for i in range(2)] for e in range(2)]
    episodes = [types.SimpleNamespace(ids=[7]), types.SimpleNamespace(ids=[8])]
    monkeypatch.setattr(agents, "gather_lists", lambda items, world: [6] + items if items == [4] else [[9]] * 6 + items)
    asked = []
    values = [0.0] * 6 + [0.1, 0.2, 0.4, 0.3]
    monkeypatch.setattr(agents, "state_values", lambda value, texts, *_: asked.append(texts) or values)
    second = types.SimpleNamespace(rank=1, size=2)
    assert agents.choose(groups, episodes, None, Args(candidates=2), second) == [[1, 1], [10, 1]]
    assert asked == [[[9]] * 6 + [[7, 0], [7, 1], [8, 10], [8, 11]]]


def test_a_game_is_renamed_otherwise_each_time(games, monkeypatch):
    drawn = []
    monkeypatch.setattr(agents, "other_names", lambda things, _, rng: drawn.append(rng.random()) or {"door": "door"})
    rows = agents.play_walkthroughs(Args(stage="expert", renamed=2), TOKENIZER)
    assert len(rows) == 9 and len(set(drawn)) == 6


def test_a_walkthrough_that_loses_is_named_with_what_the_tokenizer_made_of_it(games, monkeypatch):
    monkeypatch.setattr(Door, "walkthrough", ["go out", "Wait"])
    with pytest.raises(InputError, match="of door-0 does not win it; its last command was 'Wait', and '.*'"):
        agents.play_walkthroughs(Args(stage="expert"), TOKENIZER)


def test_episodes_train_policy_and_value(games, agent, world, monkeypatch, tmp_path):
    says = ["Action: open door<|eos|>", "Action: go out<|eos|>"]
    scripted(monkeypatch, lambda text, number, _: says["is open" in text and number != 1])
    rows = play(Args(stage="collect", max_turns=3, out=str(tmp_path)), TOKENIZER, agent, None, world, 2)
    read, count = oreo.read_rows(write_rows(tmp_path / "rows.jsonl", rows), TOKENIZER, oreo.Args())
    assert count["kept"] == 6 and count["right"] == 5
    assert [sum(row.steps) for row in read] == [row["turns"] for row in rows]
    value = load_policy("nano", world, from_config=CONFIG, kind=ValueModel)
    reference = load_policy("nano", world, from_config=CONFIG, seed=3).requires_grad_(False)
    args = oreo.Args(variant="step")
    losses = oreo.accumulate_gradient(agent, value, reference, [[row] for row in read], args, world)
    assert losses["loss/value"] == pytest.approx(5 / 6)


def test_a_renamed_game_is_the_same_game_in_other_words():
    game = Door("")
    renamed = RenamedGame(game, {"door": "red gate"})
    assert renamed.reset() == "A red gate."
    assert renamed.walkthrough == ["open red gate", "go out"]
    assert renamed.act("open door") == ("Nothing happens.", False, False)  # nothing there has that name
    assert renamed.act("open red gate") == ("The red gate is open.", False, False)
    assert renamed.act("go out") == ("It is over.", True, True)


def test_names_are_replaced_whole_and_the_longest_first():
    names = {"box": "chest", "red box": "bin", "key": "Henderson's key (old)"}
    assert replace_words("Red box, box, boxes: a key.", names) == "bin, chest, boxes: a Henderson's key (old)."
    assert replace_words("nothing", {}) == "nothing"


def test_other_names_are_of_the_same_kind_and_share_no_word(monkeypatch):
    names = {"c": ["box", "red box", "chest", "trunk"], "k": ["red key", "key"], "o": ["pen"]}
    monkeypatch.setattr(agents, "NAMES", names)
    things = {"box": "c", "key": "k", "pen": "o"}
    seen = set()
    for seed in range(50):
        other = other_names(things, 3, random.Random(seed))
        assert list(other) == list(things) and all(new in names[things[old]][:3] for old, new in other.items())
        words = [word for new in other.values() for word in new.split()]
        assert len(words) == len(set(words))  # so each name can be told from the others
        seen.add(tuple(other.values()))
    assert len(seen) == 5  # all there are: 3 x 2 less the two reds together
    with pytest.raises(InputError, match="more things than names of their kind, such as box"):
        other_names({"trunk": "c", "box": "c"}, 1, random.Random(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(games="no/such/folder"), "no games there; --stage make generates"),
        (dict(games="alfworld:test"), "expected one of alfworld:train, alfworld:eval_in_distribution"),
        (dict(games="alfworld:train"), "no games there; .*pip install alfworld, then alfworld-download"),
        (dict(model=""), "--stage evaluate needs --model"),
        (dict(candidates=0), "--candidates must be positive"),
        (dict(candidates=3), "--candidates 3 are chosen by a --value, which is missing"),
        (dict(names=9), "--names must be 0 to 8, not 9"),
        (dict(stage="make", first_seed=-1), "--first_seed must be from 0 to 4 . 10.9, not -1"),
        (dict(names=2, games="alfworld:train"), "--names 2 is for TextWorld games"),
        (dict(renamed=2), "--renamed 2 is for --stage expert with --names"),
        (dict(renamed=2, stage="expert"), "--renamed 2 is for --stage expert with --names"),
        (dict(stage="collect", temperature=0.0), "answers that must differ need a positive one"),
        (dict(value="v"), "--value v: sequences of up to 4096 tokens exceed its 512 positions"),
        (dict(stage="collect", temperature=float("nan")), "--temperature must be 0 or more and finite, not nan"),
        (dict(stage="collect", temperature=float("inf")), "--temperature must be 0 or more and finite, not inf"),
    ],
)
def test_bad_settings_get_one_message(changes, message, agent, tmp_path, monkeypatch, world):
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    monkeypatch.setattr(agents, "open_tokenizer", lambda path, args: TOKENIZER)
    monkeypatch.setattr(agents, "load_policy", lambda path, world, **options: agent)
    monkeypatch.setattr("common.run.digest_of", lambda path, flag: path)
    with pytest.raises(InputError, match=message):
        (tmp_path / "game.z8").touch()
        agents.main(Args(**{"model": "m", "games": str(tmp_path), "out": str(tmp_path / "out")} | changes))


# ----------------------------------------------------------------------------------------- the real games


def test_a_generated_textworld_game_is_won_by_its_walkthrough_and_seeds_differ(tmp_path, world):
    pytest.importorskip("textworld", reason="needs requirements-agents.txt")
    args = Args(stage="make", games=str(tmp_path / "games"), count=2, out=str(tmp_path / "out"), model="scratch")
    agents.main(args)
    games = agents.find_games(args.games)
    first = [kind(path).reset() for _, path, kind in games]
    assert len(games) == 2 and first[0] != first[1]
    assert all("$" not in text and "\n\n" not in text for text in first)  # no banner
    assert agents.find_games(args.games) == games  # with what else lies there
    args.stage, args.names, args.renamed = "expert", 4, 3
    result = agents.main(args)
    assert result["success"] == 1 and result["turns"] == 2 and result["episodes"] == 8
    args.names, args.renamed, args.out = 0, 0, str(tmp_path / "unnamed")
    assert agents.main(args)["success"] == 1
    args.names = 4
    things = agents.open_game(*games[0], args).things
    assert things and all(name in agents.NAMES[kind][:4] for name, kind in things.items())
    assert things == agents.open_game(*games[0], args).things  # the same in every run
    args.stage, args.max_turns, args.max_turn_tokens = "collect", 2, 12
    args.model = str(tmp_path / "out" / "model")
    args.out, args.repeat = str(tmp_path / "played"), 2
    result = agents.main(args)
    assert result["episodes"] == 4 and result["success"] == 0  # random weights


PROBLEM = """(define (problem p) (:domain alfred)
 (:objects agent1 - agent  loc_bar_0 loc_bar_1 loc_bar_2 - location  desk_bar_1 drawer_bar_1 - receptacle
  mug_bar_1 - object  MugType ButterKnifeType KnifeType - otype
  DeskType DrawerType SinkBasinType MicrowaveType FridgeType - rtype)
 (:init (= (total-cost) 0) (atLocation agent1 loc_bar_0) (receptacleAtLocation desk_bar_1 loc_bar_1)
  (receptacleAtLocation drawer_bar_1 loc_bar_2) (receptacleType desk_bar_1 DeskType)
  (receptacleType drawer_bar_1 DrawerType) (openable drawer_bar_1) (inReceptacle mug_bar_1 drawer_bar_1)
  (objectAtLocation mug_bar_1 loc_bar_2) (objectType mug_bar_1 MugType) (pickupable mug_bar_1)
  (canContain DeskType MugType) (canContain DrawerType MugType))
 (:goal (and (exists (?r - receptacle ?o - object)
  (and (inReceptacle ?o ?r) (receptacleType ?r DeskType) (objectType ?o MugType))))))"""


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="TextWorld 1.7 needs Python 3.12 or older for these games")
def test_alfworlds_own_engine_plays_a_game_in_the_layout_of_its_data(tmp_path, monkeypatch):
    """A small game written here with ALFWorld's rules and grammar: its data is not downloaded."""
    info = pytest.importorskip("alfworld.info", reason="needs requirements-agents.txt")
    domain, grammar = (Path(path).read_text() for path in (info.ALFRED_PDDL_PATH, info.ALFRED_TWL2_PATH))
    commands = ["go to drawer 1", "open drawer 1", "take mug 1 from drawer 1", "go to desk 1", "move mug 1 to desk 1"]
    game = dict(pddl_domain=domain, pddl_problem=PROBLEM, grammar=grammar.replace("UNKNOWN GOAL", "put a mug on desk"),
                solvable=True, walkthrough=commands)  # fmt: skip
    for kind, solvable in (("Mug", True), ("movable", True), ("Cup", False)):
        folder = tmp_path / "json_2.1.1" / "valid_unseen" / f"pick-{kind}" / "trial"
        folder.mkdir(parents=True)
        (folder / "game.tw-pddl").write_text(json.dumps(game | {"solvable": solvable}))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    [(name, path, kind)] = agents.find_games("alfworld:eval_out_of_distribution")
    assert "pick-Mug" in name
    a, b = kind(path), kind(path)
    first = a.reset()
    assert first.startswith("You are in the middle of a room.") and first.endswith("task is to: put a mug on desk.")
    b.reset()
    assert a.act("dance") == ("Nothing happens.", False, False)
    seen = [a.act(command) for command in commands]
    assert seen[0] == ("The drawer 1 is closed.", False, False) and "You arrive" not in seen[3][0]
    assert [over for _, over, _ in seen] == [won for *_, won in seen] == [False] * 4 + [True]
    assert b.act("open drawer 1")[0] == "Nothing happens."  # b is a game of its own: still in the middle of the room
    older = tmp_path / "older.tw-pddl"  # its grammar is that before 0.4
    older.write_text(Path(path).read_text().replace("move {o} to {r}", "put {o} in/on {r}"))
    for played in (b, kind(str(older))):  # the published rules name the action so
        played.reset()
        assert [played.act(c) for c in [*commands[:-1], "put mug 1 in/on desk 1"]][-1][1:] == (True, True)


def with_template(template):
    """The tokenizer of these games with another chat template."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


MINICPM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'].strip() + '<|assistant|>' }}"
    "{% else %}{{ m['content'].strip() }}{% endif %}{% endfor %}"
)


CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize("end", ["<|end|>", "<|eos|>"])
def test_a_template_that_closes_turns_with_another_token_than_eos_ends_answers_with_it_too(end):
    """ChatML of a base model: <|im_end|> closes a turn, and eos is <|endoftext|>."""
    tokenizer = with_template(CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    [closing] = tokenizer("<|end|>", add_special_tokens=False)["input_ids"]
    assert turn_end(tokenizer) == (closing, [tokenizer.eos_token_id, closing, *ids("<|user|>")])
    episode = Episode("door", 0, Door(""), tokenizer)
    for answer in ("Action: open door", "Action: go out"):
        episode.add_answer(tokenizer(answer + end, add_special_tokens=False)["input_ids"])
    assert episode.end == "won"
    kept = end if end == "<|end|>" else ""  # the answer holds what ended it, if the history shows that
    shown = tokenizer.apply_chat_template(episode.messages, tokenize=False)
    assert tokenizer.decode(episode.ids) == shown.removesuffix("\n" if kept else "<|end|>\n")
    acted = [i for i, action in zip(episode.ids, episode.actions, strict=True) if action]
    assert tokenizer.decode(acted) == f"Action: open door{kept}Action: go out{kept}"


@pytest.mark.parametrize("end", ["<|eos|>", " <|eos|>", "<|user|>"])
def test_a_template_without_eos_keeps_no_stop_token_and_its_user_mark_ends_an_answer_too(end):
    assert turn_end(TOKENIZER) == (TOKENIZER.eos_token_id, [TOKENIZER.eos_token_id])
    tokenizer = with_template(MINICPM)
    assert turn_end(tokenizer) == (None, ids("<|eos|><|user|>"))
    episode = Episode("door", 0, Door(""), tokenizer)
    for answer in ("Action: open door", "Action: go out"):
        episode.add_answer(ids(answer + end))
    row = episode.row()
    assert row["end"] == "won"
    shown = "<|user|>Open the door and go.<|assistant|>OK<|user|>A door.<|assistant|>"
    assert TOKENIZER.decode(row["prompt_ids"]) == shown
    said = "Action: open door", "<|user|>Observation: The door is open.<|assistant|>", "Action: go out"
    assert TOKENIZER.decode(row["response_ids"]) == "".join(said)
    prompt, response, actions = conversation_ids(row["conversations"], tokenizer, skip_turns=1)
    assert (prompt, response, [int(a) for a in actions]) == (row["prompt_ids"], row["response_ids"], row["actions"])


def test_a_turn_in_a_row_of_its_own_trains_eos_and_is_asked_as_in_a_conversation(tmp_path, monkeypatch):
    """The published SFT of ALFWorld: the rows that docs/published.md makes, for MiniCPM's template."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<用户>", "<AI>"]})
    bos = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=bos)
    tokenizer.chat_template = MINICPM.replace("<|user|>", "<用户>").replace("<|assistant|>", "<AI>")
    said = ("human", "A door."), ("gpt", "Action: open door\n"), ("human", "It is open."), ("gpt", "Action: go out")
    talk = [{"from": who, "value": text} for who, text in said]
    (tmp_path / "ETO.json").write_text(json.dumps([{"conversations": talk}]))
    monkeypatch.chdir(tmp_path)
    exec(re.search("```python\n(.*?)```", (ROOT / "docs/published.md").read_text(), re.S)[1], {})
    rows = [json.loads(line) for line in Path("ETO.jsonl").read_text().splitlines()]
    conversation = read_row({"conversations": talk, "reward": 1}, "x").conversation
    for skipped, row in enumerate(rows):
        item = read_row(row, "x")
        prompt, response, actions = trace_ids(item, item.traces[0], tokenizer, 0)
        asked, answered, _ = conversation_ids(conversation[: 2 * skipped + 2], tokenizer, skipped)
        assert prompt == asked and prompt[0] == tokenizer.bos_token_id
        assert response == [*answered, tokenizer.eos_token_id]
        assert actions is None  # all of the response
    assert len(rows) == 2


def test_what_closes_a_turn_in_a_template_without_eos_is_in_the_ids_and_no_action():
    tokenizer = with_template(MINICPM.replace(".strip() }}{% endif", ".strip() + '\n' }}{% endif"))
    episode = Episode("door", 0, Door(""), tokenizer)
    for answer in ("Action: open door", "Action: go out"):
        episode.add_answer(ids(f"{answer}<|eos|>"))
    shown = tokenizer.apply_chat_template(episode.messages, tokenize=False)
    assert TOKENIZER.decode(episode.ids) == shown.removesuffix("\n")
    acted = [i for i, action in zip(episode.ids, episode.actions, strict=True) if action]
    assert TOKENIZER.decode(acted) == "Action: open doorAction: go out"


    prompt, response, actions = conversation_ids(episode.messages, tokenizer, skip_turns=1)
    assert (prompt + response, [0] * len(prompt) + [int(a) for a in actions]) == (episode.ids, episode.actions)


def test_an_observation_has_no_word_mark_that_sentencepiece_adds_to_a_text_alone():
    tokenizer = sentence_piece()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    episode = Episode("door", 0, Door(""), tokenizer)
    episode.add_answer(tokenizer("Okay<eos>", add_special_tokens=False)["input_ids"])
    episode.add_observation("a is")
    assert tokenizer.convert_ids_to_tokens(episode.ids)[-5:] == ["\u2581Okay", "\n", "a", "\u2581is", "\n"]


def test_an_answer_that_is_eos_alone_is_an_episode_without_an_action():
    episode = Episode("door", 0, Door(""), with_template(MINICPM))
    episode.add_answer([TOKENIZER.eos_token_id])
    row = episode.row()
    assert (row["end"], row["turns"], row["response_ids"], row["actions"]) == ("no_action", 1, [], [])


def test_the_published_rules_are_alfworlds_and_word_for_word():
    text = agents.AlfworldGame.rules
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "1315010838ff752b"
    assert "2. task {obj} from {recep}\n" in text and ':"Thought: your thoughts.\\nAction: ' in text
