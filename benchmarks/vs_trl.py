"""Seconds and memory of one training step: ours, TRL's, and the bare bound. GRPO, SFT and DPO, in one run.

    pip install trl==1.16.0
    python benchmarks/vs_trl.py                                    # all of it, into benchmarks/results/
    python benchmarks/vs_trl.py --steps grpo --lengths ragged --rounds 5
    python benchmarks/vs_trl.py --model wide --memory              # vocabulary 151,936: peak memory, a process each
    python benchmarks/vs_trl.py --model wide --memory --steps grpo --lengths equal --new 160 --sides ours trl

All three train the same weights on the same prompts and traces with AdamW in float32 (bf16 compute on CUDA), in one
process and in turns, so that what else the machine does falls on all; medians of seconds, and of each round's ratios.

  ours    luffy.py --method grpo and --method sft, redi.py --loss dpo: their own functions in the order of their loops
  trl     GRPOTrainer, SFTTrainer, DPOTrainer, stepped by their own train(); gradient checkpointing off, no vLLM
  bare    what cannot be left out, as Transformers and torch have it: generate(), then forward with all logits,
          backward, AdamW; rows padded to the longest

grpo    8 prompts x 8 answers of up to 64 tokens. equal: eos has a probability of nearly 0, so all are 64 long.
        ragged: 1 in 28 at every token, so they are 25 long on average, and one of 64 is nearly always 64 long
sft     32 rows; equal: 256 tokens each; ragged: 32 to 256 (prompts of 16)
dpo     16 pairs of such rows. The reference's log-probs are in every step of all three (ours computes them once for
        all epochs, which shows from the second epoch on)
"""

import argparse
import copy
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from operator import itemgetter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402

import luffy  # noqa: E402
import redi  # noqa: E402
from benchmarks.scale import Shape  # noqa: E402
from common.metrics import peak_memory_gb  # noqa: E402
from common.rollout import EmbeddedSampler, Sampling  # noqa: E402
from common.trainer import World, check_finite, init_world, load_policy, make_optimizer, optimizer_step  # noqa: E402

MODELS = {
    "small": Shape(4, 256, 768, 4, 256, 2048),  # 4.5 million parameters
    "wide": Shape(2, 896, 2688, 14, 128, 151936),
    "1.5B": Shape(28, 1536, 8960, 12, 256, 151936),  # Qwen2.5's, with an output matrix of its own
}
SIDES = ["ours", "trl", "bare"]
SETTING = itemgetter("step", "lengths", "model", "new")  # of a row of the results
LR = 1e-6  # small enough for the weights, and with them the lengths of answers, to stay as they are
PROMPT, GROUP, QUESTIONS, NEW, TOTAL, ROWS = 16, 8, 8, 64, (32, 256), 32


def make_model(name: str, step: str, lengths: str, folder: Path) -> None:
    """A Qwen2 with random weights, and a tokenizer. For ragged answers (GRPO) eos has a probability of 1 in 28 at every
    token, else of nearly 0.

    All embeddings share a direction, which the last hidden state then has; the head's row of eos lies along it."""
    hidden, vocabulary = MODELS[name].hidden, MODELS[name].vocab
    p_eos = 1 / 28 if step == "grpo" and lengths == "ragged" else 1e-9
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name].config(), bos_token_id=None)).eval()
    direction = F.normalize(torch.randn(hidden), dim=0)
    with torch.no_grad():
        lm.model.embed_tokens.weight += direction * lm.model.embed_tokens.weight.norm(dim=1).mean() * 3
        ids = torch.randint(2, vocabulary, (8, 64))
        along = (lm.model(ids).last_hidden_state @ direction).mean()
        logits = lm(ids).logits
        rest = logits[..., 2:].logsumexp(-1).mean()
        lm.lm_head.weight[1] = direction * (rest + torch.tensor(p_eos / (1 - p_eos)).log()) / along
    lm.save_pretrained(folder)
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)


def reward(ids: list[int]) -> float:
    """Of an answer: 1 for some, 0 for others, so that groups are mixed."""
    return float(ids[0] % 2)


def make_rows(step: str, lengths: str, vocabulary: int, seed: int):
    """Prompts of a step (grpo), or (prompt, trace) pairs (sft), or (prompt, chosen, rejected); traces end with eos."""
    rng = random.Random(seed)

    def words(n):
        return [rng.randrange(2, vocabulary) for _ in range(n)]

    def trace():
        return [*words((TOTAL[1] if lengths == "equal" else rng.randint(*TOTAL)) - PROMPT - 1), 1]

    if step == "grpo":
        return [words(PROMPT) for _ in range(QUESTIONS)]
    if step == "sft":
        return [(words(PROMPT), trace()) for _ in range(ROWS)]
    return [(words(PROMPT), trace(), trace()) for _ in range(ROWS // 2)]


def padded(sequences, device):
    """(prompt, response) pairs -> ids, attention mask, and which tokens are trained, [B, L]; right-padded."""
    width = max(len(p) + len(r) for p, r in sequences)
    ids = torch.tensor([p + r + [0] * (width - len(p) - len(r)) for p, r in sequences])
    column = torch.arange(width)
    end = torch.tensor([len(p) + len(r) for p, r in sequences])[:, None]
    begin = torch.tensor([len(p) for p, _ in sequences])[:, None]
    return (t.to(device) for t in (ids, column < end, (column >= begin) & (column < end)))


class Ours:
    """This repository's step: luffy.py's for GRPO and SFT, redi.py's for DPO."""

    def __init__(self, step: str, folder: Path):
        self.step_name, self.world = step, init_world()
        if step == "dpo":
            words = ["--stage", "redi", "--loss", "dpo"]
            tables = dict(stage=redi.STAGES, loss=redi.COMPARISONS, preset=redi.PRESETS)
            self.args = redi.parse_args(redi.Args, words, **tables)
        else:
            words = ["--method", step, "--max_response_tokens", str(NEW)]
            self.args = luffy.parse_args(luffy.Args, words, method=luffy.METHODS, preset=luffy.PRESETS)
            self.args.entropy_coef = 0.0  # TRL has none
        self.policy = load_policy(str(folder), self.world)
        self.optimizer = make_optimizer(self.policy, lr=LR)
        if step == "grpo":
            self.sampler = EmbeddedSampler(self.policy, stop_ids=[1])
            self.sampler.sync(self.policy, 0)

    def step(self, data, seed: int) -> int:
        """-> response tokens trained."""
        log, tokens = {"grpo": self.grpo, "sft": self.sft, "dpo": self.dpo}[self.step_name](data, seed)
        check_finite(log, self.policy, self.world)
        optimizer_step(self.policy, self.optimizer, lr=LR, max_grad_norm=1.0)
        if self.step_name == "grpo":
            self.sampler.sync(self.policy, seed)
        return tokens

    def grpo(self, data, seed: int):
        """-> metrics of the gradient, response tokens; so do the others."""
        groups = self.sampler.generate(data, n=GROUP, keys=list(range(len(data))), seed=seed, sampling=Sampling(NEW))
        self.sampler.sleep()
        rows = [luffy.Row(data[g], c.ids, g, False, c.logps, c.truncated, reward(c.ids))
                for g, group in enumerate(groups) for c in group]  # fmt: skip
        rewards, question = torch.tensor([r.reward for r in rows]), torch.tensor([r.group for r in rows])
        for row, a in zip(rows, luffy.group_advantages(rewards, question, std=True), strict=True):
            row.advantage = a.item()
        log = luffy.accumulate_gradient(self.policy, rows, None, self.args, self.world)
        return log, sum(len(row.response) for row in rows)

    def sft(self, data, seed: int):
        rows = [luffy.Row(prompt, trace, g, True) for g, (prompt, trace) in enumerate(data)]
        log = luffy.accumulate_sft_gradient(self.policy, rows, self.args, self.world)
        return log, sum(len(row.response) for row in rows)

    def dpo(self, data, seed: int):
        pairs = [redi.Pair(*(array("i", ids) for ids in pair), index=i) for i, pair in enumerate(data)]
        for pair, sums in zip(pairs, redi.reference_logps(self.policy, pairs, self.args, self.world), strict=True):
            pair.reference = tuple(sums)
        log = redi.accumulate_gradient(self.policy, pairs, self.args, self.world)
        return log, sum(len(p.chosen) + len(p.rejected) for p in pairs)


class Bare:
    """The bound: Transformers' generate(), forward with all logits, backward, AdamW on padded rows."""

    def __init__(self, step: str, folder: Path):
        self.step_name, self.device = step, init_world().device
        self.lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.device)
        self.reference = copy.deepcopy(self.lm).requires_grad_(False) if step == "dpo" else None
        self.optimizer = torch.optim.AdamW(self.lm.parameters(), lr=LR, fused=True)

    def logps(self, lm, sequences):
        """Sums of log-probs and their numbers, [B]."""
        ids, mask, trained = padded(sequences, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = lm(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (logp * trained[:, 1:]).sum(1), trained[:, 1:].sum(1)

    def step(self, data, seed: int) -> int:
        """Sample (GRPO), forward, backward, AdamW, and nothing else. -> how many tokens were trained."""
        if self.step_name == "grpo":
            prompts = torch.tensor([p for p in data for _ in range(GROUP)], device=self.device)
            out = self.lm.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, do_sample=True, top_k=0
            )
            answers = [row[: row.index(1) + 1] if 1 in row else row for row in out[:, PROMPT:].tolist()]
            sequences = list(zip(prompts.tolist(), answers, strict=True))
            rewards = torch.tensor([reward(a) for a in answers], device=self.device).view(-1, GROUP)
            advantage = (rewards - rewards.mean(1, keepdim=True)).flatten()
            sums, counts = self.logps(self.lm, sequences)
            loss = -(advantage * sums).sum() / counts.sum()  # on-policy: the ratio's gradient is the log-prob's
        elif self.step_name == "sft":
            sums, counts = self.logps(self.lm, data)
            loss = -sums.sum() / counts.sum()
        else:
            sequences = [(p, c) for p, c, _ in data] + [(p, r) for p, _, r in data]
            with torch.no_grad():
                reference, _ = self.logps(self.reference, sequences)
            sums, counts = self.logps(self.lm, sequences)
            ratio = (sums - reference).view(2, -1)
            loss = -F.logsigmoid(0.1 * (ratio[0] - ratio[1])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.lm.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return int(counts.sum())


def train_with_trl(step: str, folder: Path, lengths: str, rounds: int, between) -> None:
    """TRL's own loop; between(round, seconds, tokens) after each of its steps."""
    import datasets
    import trl
    from transformers import TrainerCallback
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.set_verbosity_error()

    class Watch(TrainerCallback):
        """Seconds of each of TRL's steps, to `between`."""

        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            synchronize()
            between(state.global_step - 1, time.perf_counter() - self.start)

    vocabulary, batches = MODELS[folder.name].vocab, range(rounds)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def text(ids):
        return " ".join("<eos>" if i == 1 else f"w{i}" for i in ids)

    cuda = torch.cuda.is_available()
    common = dict(
        output_dir=tempfile.mkdtemp(), max_steps=rounds, learning_rate=LR, report_to=[], save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False, bf16=cuda, use_cpu=not cuda, logging_strategy="no",
        lr_scheduler_type="constant", dataloader_pin_memory=False, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    many = [make_rows(step, lengths, vocabulary, seed) for seed in batches]
    if step == "grpo":
        rows = datasets.Dataset.from_list([{"prompt": text(p)} for batch in many for p in batch])
        trainer = trl.GRPOTrainer(
            str(folder), lambda completion_ids, **_: [reward(ids) for ids in completion_ids],
            trl.GRPOConfig(**common, per_device_train_batch_size=GROUP * QUESTIONS, num_generations=GROUP,
                           max_completion_length=NEW, shuffle_dataset=False),
            train_dataset=rows, processing_class=tokenizer, callbacks=[Watch()],
        )  # fmt: skip
    elif step == "sft":
        rows = [{"input_ids": p + t, "completion_mask": [0] * len(p) + [1] * len(t)}
                for batch in many for p, t in batch]  # fmt: skip
        trainer = trl.SFTTrainer(
            str(folder), trl.SFTConfig(**common, per_device_train_batch_size=ROWS, completion_only_loss=True),
            train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Watch()],
        )  # fmt: skip
    else:
        rows = [{"prompt": text(p) + " ", "chosen": text(c[:-1]), "rejected": text(r[:-1])}
                for batch in many for p, c, r in batch]  # fmt: skip
        trainer = trl.DPOTrainer(
            str(folder), args=trl.DPOConfig(**common, per_device_train_batch_size=ROWS // 2),
            train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Watch()],
        )  # fmt: skip
    trainer.train()


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(step: str, lengths: str, model: str, rounds: int) -> dict:
    """Seconds of each round, in turns."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / model
        make_model(model, step, lengths, folder)
        mine = {"ours": Ours(step, folder), "bare": Bare(step, folder)}
        seconds: dict[str, list[float]] = {"ours": [], "trl": [], "bare": []}
        tokens: dict[str, list[int]] = {"ours": [], "bare": []}

        def between(i: int, trl_seconds: float) -> None:
            data = make_rows(step, lengths, MODELS[model].vocab, i)
            for name, stepper in mine.items():
                synchronize()
                start = time.perf_counter()
                count = stepper.step(data, seed=i + 1)
                synchronize()
                seconds[name].append(time.perf_counter() - start)
                tokens[name].append(count)
            seconds["trl"].append(trl_seconds)
            print(f"  {i}: " + ", ".join(f"{k} {v[-1]:.3f} s" for k, v in seconds.items()), file=sys.stderr)

        train_with_trl(step, folder, lengths, rounds + 1, between)
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first one warms everything up
    result = {"step": step, "lengths": lengths, "model": model,
              "tokens": {name: statistics.mean(values[1:]) for name, values in tokens.items()},
              "seconds": {name: statistics.median(values) for name, values in seconds.items()}}  # fmt: skip
    for rival in ("trl", "bare"):
        ratios = [a / b for a, b in zip(seconds["ours"], seconds[rival], strict=True)]
        result[f"ours_over_{rival}"] = statistics.median(ratios)
    return result


def resident() -> float:
    """GB of memory that this process holds now (CUDA: that tensors take)."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e9
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def peak(step: str, lengths: str, model: str, which: str) -> dict[str, float]:
    """Run two steps of one of the three. -> GB at the peak; GB of it beyond the libraries and the 16 bytes a parameter
    (weights, gradients, Adam's moments) that all three need; seconds of the second step."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / model
        make = [sys.executable, __file__, "--make", str(folder), "--lengths", lengths, "--steps", step]
        subprocess.run(make, check=True)
        if which == "trl":
            import trl  # noqa: F401
        before, seconds = resident(), []
        if which == "trl":
            train_with_trl(step, folder, lengths, 2, lambda _, s: seconds.append(s))
        else:
            stepper = {"ours": Ours, "bare": Bare}[which](step, folder)
            for i in range(2):
                start = time.perf_counter()
                stepper.step(make_rows(step, lengths, MODELS[model].vocab, i), seed=i + 1)
                synchronize()
                seconds.append(time.perf_counter() - start)
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9  # in float32
    top = peak_memory_gb(World(0, 1, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    return {"peak_gb": top, "step_gb": top - before - 4 * weights, "seconds": seconds[-1],
            "threads": torch.get_num_threads()}  # fmt: skip


def table(rows: list[dict]) -> str:
    """Seconds a step and their ratios, as Markdown."""
    lines = ["| step | lengths | model | ours, s | TRL, s | bare, s | ours / TRL | ours / bare |", "| --- " * 8 + "|"]
    for r in rows:
        s = r["seconds"]
        lines.append(f"| {r['step']} | {r['lengths']} | {r['model']} | {s['ours']:.2f} | {s['trl']:.2f} | "
                     f"{s['bare']:.2f} | {r['ours_over_trl']:.2f} | {r['ours_over_bare']:.2f} |")  # fmt: skip
    return "\n".join(lines)


def memory_table(rows: list[dict]) -> str:
    """Peak memory of each side in a process of its own, as Markdown."""
    lines = [f"| step | lengths | new tokens | | {' | '.join(SIDES)} |", "| --- " * 7 + "|"]
    kinds = {"peak_gb": "peak, GB", "step_gb": "of it for the step, GB", "seconds": "seconds"}
    for r in rows:
        for kind, title in kinds.items():
            cells = [f"{r[side][kind]:.2f}" if kind in r.get(side, {}) else "" for side in SIDES]
            lines.append(f"| {r['step']} | {r['lengths']} | {r['new']} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    global NEW
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", default=["grpo", "sft", "dpo"], choices=["grpo", "sft", "dpo"])
    parser.add_argument("--lengths", nargs="+", default=["ragged", "equal"], choices=["ragged", "equal"])
    parser.add_argument("--model", default="small", choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=7, help="medians of so many")
    parser.add_argument("--memory", action="store_true", help="peak memory instead, each in a process of its own")
    parser.add_argument("--new", type=int, default=NEW, help="grpo: most tokens of an answer")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES, help="with --memory: whose")
    parser.add_argument("--note", default="", help="anything a reader of the results must know about this machine")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a child: whose peak, or "turns"
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)  # a child: where to write the model
    args = parser.parse_args()
    NEW = args.new
    step, lengths = args.steps[0], args.lengths[0]
    if args.make:
        return make_model(args.make.name, step, lengths, args.make)
    if args.one:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        found = alternate(step, lengths, args.model, args.rounds) if args.one == "turns" else peak(
            step, lengths, args.model, args.one
        )
        print("\n" + json.dumps(found))
        return None
    rows = []
    for step in args.steps:
        for lengths in args.lengths:
            row: dict = {"step": step, "lengths": lengths, "model": args.model, "new": args.new}
            for which in args.sides if args.memory else ("turns",):
                print(f"{step}, {lengths}, {args.model}: {which}", file=sys.stderr, flush=True)
                command = [sys.executable, __file__, "--one", which, "--steps", step, "--lengths", lengths,
                           "--model", args.model, "--rounds", str(args.rounds), "--new", str(args.new)]  # fmt: skip
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found = json.loads(done.stdout.strip().splitlines()[-1])
                row = row | ({which: found} if args.memory else found)
            rows.append(row)
    import trl

    cuda = torch.cuda.is_available()
    cpu = f"{len(os.sched_getaffinity(0))}-core {torch.backends.cpu.get_cpu_capability()} CPU"
    machine = torch.cuda.get_device_name() if cuda else cpu
    name = f"vs-trl-{'memory-' if args.memory else ''}{args.model}"
    name += f"-{machine.lower().replace(' ', '-')}" if cuda else "-cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{name}.json"
    if args.memory and path.exists():  # what it has of other sides and lengths stays
        old = {SETTING(row): row for row in json.loads(path.read_text())["rows"]}
        rows = [*(old | {SETTING(row): old.get(SETTING(row), {}) | row for row in rows}).values()]
    result = dict(machine=machine, torch=torch.__version__, trl=trl.__version__, note=args.note,
                  command=" ".join(["python", "benchmarks/vs_trl.py", *sys.argv[1:]]), rows=rows)  # fmt: skip
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{machine}, torch {torch.__version__}, TRL {trl.__version__}\n")
    print((memory_table if args.memory else table)(rows))
    return None


if __name__ == "__main__":
    main()
