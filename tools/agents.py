"""OREO's agents: a model plays text games; its episodes are rows for oreo.py, whose value then chooses its actions.

An episode is a conversation (Wang et al., arXiv 2412.16145, as in their ALFWorld experiments):

    user       what the game is, and how to answer            context: no action, no loss
    assistant  OK
    user       <the task and the first observation>
    assistant  Thought: ...                                   an action: all its tokens, eos included; the game gets
               Action: take key from table                    what follows the first "Action: "
    user       Observation: You take the key.                 context
    assistant  ...

Its reward is 1 if the game is won, in at most 40 actions, else 0. An answer without an action, or one that does not
end, loses. The ids of an episode are those that the sampler read and drew: only what is new is tokenized.

  pip install -r requirements-agents.txt
  python -m tools.agents --stage make --games FOLDER                     TextWorld games by seeds
  python -m tools.agents --stage expert --games FOLDER --model scratch   their walkthroughs: won episodes to start from
  python -m tools.agents --stage collect --games FOLDER --model MODEL    episodes at temperature 1: rows for oreo.py
  python -m tools.agents --games FOLDER --model MODEL --value VALUE      success rate; V chooses among --candidates

Each needs an --out of its own. docs/oreo.md has the whole sequence, with the training between these steps."""

import hashlib
import json
import os
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tqdm import tqdm

from common.checkpoints import Checkpoints, changed_settings
from common.data import InputError
from common.rollout import Sampling, make_sampler
from common.rows import render_prompt, response_ids, turn_end, with_bos
from common.run import (
    NotNegative,
    Positive,
    Seed,
    Share,
    check_fit,
    check_ranges,
    digests_of,
    keep_records,
    keep_settings,
    open_tokenizer,
    write_lines,
    write_whole,
)
from common.search import state_values
from common.trainer import ValueModel, export, gather_lists, init_world, launch, load_policy, parse_args
from igsm.tokens import ASSISTANT, CHAT_TEMPLATE, EOS, PAD, UNK, USER, word_level

NAMES = {  # for --names, by TextWorld's types
    "c": ["box", "chest", "safe", "trunk", "cabinet", "drawer", "fridge", "locker"],
    "d": ["door", "gate", "hatch", "portal", "screen", "grate", "curtain", "panel"],
    "f": ["apple", "cookie", "onion", "salad", "peanut", "pear", "banana", "bread"],
    "k": ["key", "passkey", "keycard", "latchkey", "token", "card", "fob", "badge"],
    "o": ["blanket", "broom", "laptop", "mug", "pen", "scarf", "shoe", "sponge"],
    "s": ["bed", "bowl", "chair", "counter", "rack", "shelf", "table", "workbench"],
}


@dataclass
class Args:
    stage: Literal["make", "expert", "collect", "evaluate"] = "evaluate"  # What to do
    games: str = "runs/games/train"  # Folder of TextWorld games (.z8), or alfworld:train (eval_in_distribution, ...)
    model: str = ""  # Model folder or Hub name. expert also takes "scratch": a small new model, a token per word
    value: str = ""  # Value model of oreo.py that chooses among --candidates
    out: str = "runs/agent"  # Folder of episodes.jsonl, rows.jsonl, results.json. The same command again resumes.
    chat_template: str = ""  # File with a Jinja chat template. Empty: the tokenizer's own
    chat_template_args: tuple[str, ...] = ()  # Switches of the template, such as enable_thinking=false
    trust_remote_code: bool = False  # Run the Python files that come with --model.
    repeat: Positive[int] = 5  # Episodes of each game that collect plays (published: 5)
    candidates: Positive[int] = 5  # Answers that evaluate draws at each turn if there is a --value (published: 3 to 5)
    temperature: NotNegative[float] = 1.0  # For collect and for --candidates; evaluate without --value is greedy
    max_turns: Positive[int] = 40  # Actions per episode at most (published)
    max_turn_tokens: Positive[int] = 128  # Tokens per answer at most (published: 2048). A longer answer loses.
    max_episode_tokens: Positive[int] = 4096  # Tokens per episode at most (MiniCPM's context). A longer one loses.
    parallel: Positive[int] = 32  # Episodes that each rank plays at a time
    seed: Seed = 0  # Seed of sampling
    # TextWorld: rename things, with this many names for each type, so that a small model can learn them all. 0: do not
    names: Annotated[int, ("0 to 8", lambda n: 0 <= n <= len(NAMES["c"]))] = 0
    renamed: NotNegative[int] = 0  # expert: play each game this many times more, with other --names
    count: Positive[int] = 100  # make: games to generate
    first_seed: Annotated[int, ("from 0 to 4 * 10^9", lambda seed: 0 <= seed <= 4e9)] = 0  # make: seed of the first
    rooms: Positive[int] = 1  # make: rooms per game
    objects: Positive[int] = 4  # make: objects per game
    quest_length: Positive[int] = 2  # make: actions that win a game
    # Sampler. embedded: in this process. vllm: a vLLM process beside each rank (docs/rollout.md). auto: vllm on CUDA
    rollout: Literal["auto", "embedded", "vllm"] = "auto"
    rollout_gpu_memory: Share[float] = 0.0  # Fraction of each GPU's memory for vLLM. 0: what is free, at most 0.7
    sampler_tokens: NotNegative[int] = 0  # Largest batch of the embedded sampler, as rows x tokens. 0: as fits
    micro_batch_tokens: Positive[int] = 16384  # Tokens that the value model reads at once on each rank


SPLITS = {"alfworld:train": "train", "alfworld:eval_in_distribution": "valid_seen",
          "alfworld:eval_out_of_distribution": "valid_unseen"}  # fmt: skip
SCRATCH = dict(model_type="qwen2", hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
               num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=False)  # fmt: skip


def parse_action(answer: str) -> str | None:
    """Return the command of an answer: the rest of the line after the first "Action: "; None if there is none.

    >>> parse_action("Thought: it is locked\\nAction: unlock box with key"), parse_action("open box")
    ('unlock box with key', None)
    """
    found = re.search(r"Action: *(.*)", answer)
    return found[1].strip() or None if found else None


class Episode:
    """One game as it is played: the conversation, its ids, and which of them are actions."""

    def __init__(self, name: str, number: int, game, tokenizer):
        self.name, self.number, self.game, self.tokenizer = name, number, game, tokenizer
        self.messages = [{"role": "user", "content": game.rules}, {"role": "assistant", "content": "OK"}]
        self.closing, self.stops = turn_end(tokenizer)
        self.text, self.ids, self.actions = "", [], []  # text: what the ids stand for, as the template shows it
        self.end = ""  # won | lost | max_turns | no_action | too_long
        self.turns = 0
        self.add_observation(game.reset())

    def add_observation(self, content: str) -> None:
        """Add what the game shows. The ids then end where the model's answer begins."""
        self.messages.append({"role": "user", "content": content})
        shown = render_prompt(self.tokenizer, self.messages)
        if not shown.startswith(self.text):
            raise InputError("the chat template changes earlier turns: pass a --chat_template that leaves them alone")
        [new] = response_ids(self.tokenizer, [self.text], [shown[len(self.text) :]])
        new = new if self.ids else with_bos(new, self.tokenizer)
        self.ids, self.actions, self.text = self.ids + new, self.actions + [0] * len(new), shown

    def add_answer(self, ids: list[int]) -> None:
        """Add the model's answer, with the token that ended it, and the game's reply. That token, and the spaces before
        it, are kept only if the template writes the token after an answer: otherwise no later prompt has them."""
        self.turns += 1
        ended, kept = ids[-1] in self.stops, ids
        answer = self.tokenizer.decode(ids[:-1] if ended else ids)
        self.messages.append({"role": "assistant", "content": answer})
        shown = self.tokenizer.apply_chat_template(self.messages, tokenize=False)
        if ended and ids[-1] == self.closing:
            said, mark, _ = shown[len(self.text) :].partition(self.tokenizer.decode([self.closing]))
            self.text += said + mark
        elif ended:
            kept, said = ids[:-1], answer.strip()
            self.text = shown[: shown.rindex(said) + len(said)]  # what closes a turn comes with the next observation
            while len(kept) > 1 and not self.tokenizer.decode(kept[-1:]).strip():
                kept = kept[:-1]
        self.ids, self.actions = self.ids + kept, self.actions + [1] * len(kept)
        if not ended or (action := parse_action(answer)) is None:
            self.end = "no_action"
            return
        observation, done, won = self.game.act(action)
        if done:
            self.end = "won" if won else "lost"
        else:
            self.add_observation(f"Observation: {observation}")

    def row(self) -> dict:
        """Return the episode as a row for oreo.py, without what follows the last action."""
        acted = [i for i, action in enumerate(self.actions) if action] or [len(self.ids)]
        first, end = acted[0], acted[-1] + 1
        return {
            "question": self.name, "reward": float(self.end == "won"), "end": self.end, "turns": self.turns,
            "prompt_ids": self.ids[:first], "response_ids": self.ids[first:end], "actions": self.actions[first:end],
            "conversations": self.messages if self.messages[-1]["role"] == "assistant" else self.messages[:-1],
        }  # fmt: skip


class Game:
    """A game has `rules` (the first turn) and, after a reset, `things` {name: type} and a `walkthrough` that wins it.
    reset() returns the first observation; act(command): the next one, whether the game is over, whether it is won."""

    def close(self) -> None:
        self.env.close()


class TextWorldGame(Game):
    """A generated TextWorld game (a .z8 file)."""

    rules = Path(__file__).with_name("textworld_rules.txt").read_text()

    def __init__(self, path: str):
        import textworld

        wanted = dict(won=True, objective=True, description=True, typed_entities=True, extras=["walkthrough"])
        self.env = textworld.start(path, request_infos=textworld.EnvInfos(**wanted))

    def reset(self) -> str:
        state = self.env.reset()
        self.walkthrough = state["extra.walkthrough"]
        self.things = dict(state.typed_entities)  # a type is a letter, as c for containers
        return f"{tidy(state.objective)}\n{tidy(state.description)}"

    def act(self, command: str) -> tuple[str, bool, bool]:
        state, _, done = self.env.step(command)
        return tidy(state.feedback.partition("\n>")[0]), done, bool(state.won)


class AlfworldGame(Game):
    """A game of ALFWorld (a game.tw-pddl file), by the package's own TextWorld environment."""

    rules = Path(__file__).with_name("alfworld_rules.txt").read_text()  # as published, with its slips
    things: dict[str, str] = {}  # unknown

    def __init__(self, path: str):
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler

        self.env = textworld.start(path, textworld.EnvInfos(won=True), wrappers=[AlfredDemangler])
        game = Path(path).read_text()
        self.walkthrough = json.loads(game).get("walkthrough", [])
        self.put = r"move \1 to" if "move {o} to {r}" in game else r"\g<0>"  # games of ALFWorld 0.4 know no "put"

    def reset(self) -> str:
        return re.sub(r"^-= Welcome to TextWorld, ALFRED! =-\s*", "", self.env.reset().feedback.strip())

    def act(self, command: str) -> tuple[str, bool, bool]:
        state, _, done = self.env.step(re.sub("^put (.+) in/on", self.put, command))  # as the rules name it
        return re.sub(r"^You arrive at [^.]*\. ", "", state.feedback.strip()), done or bool(state.won), bool(state.won)


class RenamedGame(Game):
    """A TextWorld game with other names {old: new} for its things. Rooms and parts of a thing's name stay."""

    def __init__(self, game: Game, names: dict[str, str]):
        self.env = self.game = game  # env: what close() closes
        self.rules, self.to_new = game.rules, names
        self.things = {names[name]: type_ for name, type_ in game.things.items()}
        self.to_old = dict.fromkeys(names, "nothing") | {new: old for old, new in names.items()}  # old names are gone

    def reset(self) -> str:
        text = replace_words(self.game.reset(), self.to_new)  # the game has a walkthrough from here on
        self.walkthrough = [replace_words(command, self.to_new) for command in self.game.walkthrough]
        return text

    def act(self, command: str) -> tuple[str, bool, bool]:
        seen, done, won = self.game.act(replace_words(command, self.to_old))
        return replace_words(seen, self.to_new), done, won


def tidy(text: str) -> str:
    """Return TextWorld's text without blank lines and runs of spaces."""
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines() if line.strip())


def replace_words(text: str, names: dict[str, str]) -> str:
    """Return the text with each name replaced as in `names`; of names that begin alike, the longest.

    >>> replace_words("a red box in the box", {"box": "chest", "red box": "bin"})
    'a bin in the chest'
    """
    names = {old.lower(): new for old, new in names.items()}
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.sub(rf"\b({pattern})\b", lambda found: names[found[0].lower()], text, flags=re.I) if names else text


def other_names(things: dict[str, str], count: int, rng: random.Random) -> dict[str, str]:
    """Return new names for a game's things, drawn from the first `count` NAMES of their type. No two share a word."""
    taken: dict[str, str] = {}
    for name, type_ in things.items():
        words = {word for other in taken.values() for word in other.lower().split()}
        free = [one for one in NAMES.get(type_, ())[:count] if not words & set(one.lower().split())]
        if type_ in NAMES and not free:
            raise InputError(f"--names: a game has more things than names of their kind, such as {name}: raise --names")
        taken[name] = rng.choice(free or [name])
    return taken


def find_games(source: str) -> list[tuple[str, str, type]]:
    """Return (name, path, class) of each game of --games, in order of their names."""
    if source.startswith("alfworld:"):
        if source not in SPLITS:
            raise InputError(f"--games {source}: expected one of {', '.join(SPLITS)}")
        data = Path(os.environ.get("ALFWORLD_DATA", Path.home() / ".cache" / "alfworld")) / "json_2.1.1"
        paths = [path for path in sorted((data / SPLITS[source]).rglob("game.tw-pddl"))
                 if not re.search("movable|Sliced", str(path.parent))  # tasks that ALFWorld leaves out too
                 and json.loads(path.read_text()).get("solvable")]  # fmt: skip
        games = [(str(path.parent), str(path), AlfworldGame) for path in paths]
    else:
        games = [(path.stem, str(path), TextWorldGame) for path in sorted(Path(source).glob("*.z8"))]
    if not games:
        remedy = "pip install alfworld, then alfworld-download (it sets $ALFWORLD_DATA)"
        raise InputError(f"--games {source}: no games there; --stage make generates TextWorld's; ALFWorld's: {remedy}")
    return games


def make_games(args: Args) -> None:
    """Generate TextWorld games. Those that exist are left alone; InputError if they are of other options."""
    import textworld

    kept = Path(args.games) / "options.json"
    options = {"rooms": args.rooms, "objects": args.objects, "quest_length": args.quest_length}
    if kept.exists() and (changed := changed_settings(json.loads(kept.read_text()), options, options)):
        raise InputError(f"--games {args.games} holds games of other options ({changed}): name another folder")
    write_whole(kept, json.dumps(options) + "\n")
    for seed in tqdm(range(args.first_seed, args.first_seed + args.count), desc="make", unit="game"):
        path = Path(args.games) / f"seed-{seed:06d}.z8"
        if not path.exists():
            game = textworld.GameOptions()
            game.seeds, game.path = seed, str(path)
            game.nb_rooms, game.nb_objects = args.rooms, args.objects
            game.chaining.min_length = game.chaining.max_length = game.chaining.max_depth = args.quest_length
            game.grammar.theme = "house"
            textworld.make(game)


def open_game(name: str, path: str, kind: type, args: Args):
    """Return a game that can be played. With --names its things are renamed, alike in every run."""
    game = kind(path)
    if not args.names:
        return game
    game.reset()  # its things are known from here on
    return RenamedGame(game, other_names(game.things, args.names, random.Random(name)))


def choose(groups: list[list], episodes: list[Episode], value, args: Args, world) -> list[list[int]]:
    """Return, of each episode's candidate answers, the one after which V is highest. A collective."""
    texts = [e.ids + answer.text_ids for e, group in zip(episodes, groups, strict=True) for answer in group]
    before = sum(gather_lists([len(texts)], world)[: world.rank])
    values = state_values(value, gather_lists(texts, world), world, args.micro_batch_tokens)
    mine = np.reshape(values[before : before + len(texts)], (len(groups), args.candidates))
    return [group[best].ids for group, best in zip(groups, mine.argmax(1), strict=True)]


def play(args: Args, tokenizer, policy, value, world, repeat: int) -> list[dict]:
    """Play every game `repeat` times; return all rows. Ranks share the games, turn by turn. OUT/episodes.jsonl keeps
    the episodes of each --parallel games: after a stop the next call plays the others."""
    games = [game for game in find_games(args.games) for _ in range(repeat)]
    sampler = make_sampler(args.rollout, policy, world, stop_ids=turn_end(tokenizer)[1],
                           max_batch_tokens=args.sampler_tokens, max_tokens=args.max_episode_tokens,
                           gpu_memory=args.rollout_gpu_memory)  # fmt: skip
    sampler.sync(policy, version=0)
    temperature = args.temperature if value or args.stage == "collect" else 0.0

    def play_part(part: list[int]) -> list[dict]:
        mine = part[world.rank :: world.size]
        episodes = [Episode(games[i][0], i, open_game(*games[i], args), tokenizer) for i in mine]
        for turn in range(args.max_turns + 1):
            for e in episodes:
                if len(e.ids) >= args.max_episode_tokens and e.end in ("", "no_action"):  # cut before its action
                    e.end = "too_long"
                elif turn == args.max_turns:
                    e.end = e.end or "max_turns"
            live = [e for e in episodes if not e.end]
            if not any(gather_lists([len(live)], world)):
                break
            room = [min(args.max_turn_tokens, args.max_episode_tokens - len(e.ids)) for e in live]
            groups = sampler.generate(
                [e.ids for e in live], n=args.candidates if value else 1, keys=[e.number for e in live],
                seed=args.seed * 1_000_003 + turn, sampling=Sampling(room, temperature),
                progress=f"turn {turn}" if world.main else None,
            )  # fmt: skip
            chosen = choose(groups, live, value, args, world) if value else [g[0].ids for g in groups]
            for e, ids in zip(live, chosen, strict=True):
                e.add_answer(ids)
        for e in episodes:
            e.game.close()
        return gather_lists([{"id": e.number} | e.row() for e in episodes], world)

    numbers, at_once = list(range(len(games))), world.size * args.parallel
    parts = [numbers[i : i + at_once] for i in numbers[::at_once]]
    rows = keep_records(Path(args.out) / "episodes.jsonl", parts, play_part, world, together=True)
    sampler.close()
    return list(rows.values())


def play_walkthroughs(args: Args, tokenizer) -> list[dict]:
    """Play every game by its walkthrough; return the rows. Raises InputError for a walkthrough that does not win."""
    rows, rng = [], random.Random(args.seed)
    for name, path, kind in tqdm(find_games(args.games), desc="expert", unit="game"):
        game = open_game(name, path, kind, args)
        for n in range(1 + args.renamed):
            version = game if not n else RenamedGame(game, other_names(game.things, args.names, rng))
            episode = Episode(name if not n else f"{name}, renamed {n}", n, version, tokenizer)
            stop = tokenizer.eos_token_id if episode.closing is None else episode.closing
            for command in version.walkthrough:
                if not episode.end:
                    episode.add_answer([*tokenizer(f"Action: {command}", add_special_tokens=False)["input_ids"], stop])
            if episode.end != "won":
                tokenized = tokenizer.decode(tokenizer(command, add_special_tokens=False)["input_ids"])
                raise InputError(f"--games {args.games}: the walkthrough of {episode.name} does not win it; its last "
                                 f"command was {command!r}, and {tokenized!r} through --model's tokenizer")  # fmt: skip
            rows.append(episode.row())
        game.close()
    return rows


def words_of_games(args: Args) -> list[str]:
    """Return all texts of every game when it is played by its walkthrough, and the names of its things."""
    texts = ["OK", "Observation: ", "Thought: ", "Action: "]
    texts += [f" {name}" for names in NAMES.values() for name in names[: args.names]]
    for name, path, kind in find_games(args.games):
        game = open_game(name, path, kind, args)
        texts += [kind.rules, game.reset(), *(f" {thing}" for thing in game.things)]  # some are hidden
        for command in game.walkthrough:
            texts += [f" {command}", f" {game.act(command)[0]}"]
        game.close()
    return texts


def word_tokenizer(texts: list[str]):
    """Return a tokenizer with one token for each word of the texts, with the space before it; others are <|unk|>."""
    pattern = r" ?[A-Za-z]+|\d|[\s\S]"
    words = sorted({piece for text in texts for piece in re.findall(pattern, text)})
    return word_level(words, pattern, [PAD, EOS, UNK, USER, ASSISTANT], CHAT_TEMPLATE.replace("<think>\n", ""))


def scratch_model(args: Args, world) -> str:
    """Make a Qwen2 of random weights in OUT/model, with a token for each word of the games; return its path."""
    tokenizer, path = word_tokenizer(words_of_games(args)), Path(args.out) / "model"
    config = dict(SCRATCH, vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0)
    export(load_policy("scratch", world, from_config=config, seed=args.seed), tokenizer, path, world)
    return str(path)


def check(args: Args) -> None:
    """Raise InputError for settings that cannot work, alone or together."""
    check_ranges(args)
    if args.renamed and (args.stage != "expert" or not args.names):
        raise InputError(f"--renamed {args.renamed} is for --stage expert with --names")
    if args.names and args.games.startswith("alfworld:"):
        raise InputError(f"--names {args.names} is for TextWorld games")
    if args.stage != "make" and not args.model:
        raise InputError(f"--stage {args.stage} needs --model")
    if args.temperature <= 0 and (args.stage == "collect" or args.value):
        raise InputError(f"--temperature {args.temperature}: answers that must differ need a positive one")
    if args.candidates != Args.candidates and not args.value:
        raise InputError(f"--candidates {args.candidates} are chosen by a --value, which is missing")


def main(args: Args) -> dict | None:
    check(args)
    try:
        if args.stage == "make":
            return make_games(args)
        world = init_world()
        remote = dict(trust_remote_code=args.trust_remote_code)
        if args.stage == "expert" and world.size > 1:
            raise InputError("--stage expert runs in one process")
        out = Path(args.out)
        scratch = args.stage == "expert" and args.model == "scratch"
        models = {"model": "" if scratch else args.model, "value": args.value}
        settings = vars(args) | {"weights_digest": " ".join(digests_of(models, world).values())}
        # episodes have the numbers of games in this order; the last two parts of a path are ALFWorld's task and trial
        games = json.dumps([Path(name).parts[-2:] for name, *_ in find_games(args.games)])
        settings["games_digest"] = hashlib.sha256(games.encode()).hexdigest()[:16]
        fixed = [name for name in settings if name not in Checkpoints.FREE | {"model", "value", "parallel"}]
        names = fixed if any(out.glob("*.jsonl")) or (scratch and (out / "model").exists()) else ()
        keep_settings(out / "args.json", settings, names, f"--out {out} has episodes of other settings", world)
        tokenizer = open_tokenizer(scratch_model(args, world) if scratch else args.model, args)
        if args.stage == "expert":
            rows = play_walkthroughs(args, tokenizer)
        else:
            policy = load_policy(args.model, world, **remote)
            value = load_policy(args.value, world, kind=ValueModel, **remote) if args.value else None
            if value:
                check_fit(f"--value {args.value}", value, policy, args.max_episode_tokens)
            rows = play(args, tokenizer, policy, value, world, args.repeat if args.stage == "collect" else 1)
    except ModuleNotFoundError as error:
        if error.name not in ("textworld", "alfworld"):
            raise
        raise InputError(f"{args.games} needs {error.name}: pip install -r requirements-agents.txt") from error
    ends = Counter(row["end"] for row in rows)
    result = {"success": ends["won"] / len(rows), "episodes": len(rows), "ends": dict(sorted(ends.items())),
              "turns": sum(row["turns"] for row in rows) / len(rows)}  # fmt: skip
    if world.main:
        if args.stage != "evaluate":  # an episode without an answer has nothing to train
            write_lines(out / "rows.jsonl", [row for row in rows if row["response_ids"]])
        write_whole(out / "results.json", json.dumps(result, indent=2) + "\n")
        print(f"{out}: {result}")
    return result


if __name__ == "__main__":
    launch(main, parse_args(Args, None))
