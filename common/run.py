"""What surrounds a training loop and is the same in every script: flags, the run folder, rows of a step, metrics.

    def main(args):                                     a RunArgs; the script ends with launch(main, args)
        run = Run(args)                                 starts the ranks, finds the newest checkpoint of OUT
        run.plan(examples, held_out, left_out)          checks the data (lists of Example), counts the steps
        run.begin(policy, optimizer, tokenizer)         after plan: loads the checkpoint, or checks the free disk space
        for step in run:                                from the step after the checkpoint to the last step
            rows = ...                                  a list of Row: answers, or traces, with rewards and advantages
            with run.clock("update"):
                log = accumulate_gradient(...)          the script's forward and backward; {name of a metric: number}
                run.update("policy", log, rows, lr=run.lr(), max_grad_norm=args.max_grad_norm)
            run.log(describe(rows), rows)               metrics.jsonl, samples.jsonl
            run.save()
        run.finish(sampler)                             the model, curves.png

To read an algorithm you can skip this file: how flags are checked, where metrics, samples and checkpoints go, how rows
are graded in the background, split into micro-batches and turned into vectors.
"""

import contextlib
import fcntl
import functools
import json
import math
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.checkpoints import Checkpoints, changed_settings, digest_of
from common.data import (
    InputError,
    check_verifier,
    check_works,
    pack,
    plan_micro_batches,
    to_device,
    use_flash_attention_3,
)
from common.metrics import Clock, Metrics, complete_lines, json_line, peak_memory_gb, read_metrics, write_whole
from common.rollout import Sampler, Sampling, make_sampler
from common.rows import Example, data_digest, in_words, report_golds, set_template, special_tokens
from common.trainer import (
    Totals,
    World,
    check_finite,
    export,
    gather_lists,
    gradient_norm,
    init_world,
    keep_activations,
    learning_rate,
    load_policy,
    load_tokenizer,
    logit_form,
    max_positions,
    optimizer_step,
    set_context,
)
from common.verifiers import grade_later, grader_version

T = TypeVar("T")
Positive = Annotated[T, ("positive and finite", lambda x: 0 < x < math.inf)]
NotNegative = Annotated[T, ("0 or more and finite", lambda x: 0 <= x < math.inf)]
Betas = Annotated[tuple[float, float], ("two numbers from 0 up to 1, 1 excluded", lambda b: 0 <= min(b) <= max(b) < 1)]
Share = Annotated[T, ("between 0 and 1", lambda x: 0 <= x <= 1)]
Seed = Annotated[int, ("from 0 to 10^12", lambda seed: 0 <= seed <= 10**12)]
Minutes = Annotated[float, ("above 0 and at most 10^7", lambda minutes: 0 < minutes <= 1e7)]
Cap = Annotated[T, ("1 or more, or 0 for none", lambda x: x == 0 or x >= 1)]


@dataclass
class RunArgs:
    """Flags of every training script. The comment of a flag is its help. `Checkpoints.FREE` lists the flags that may
    change when a run resumes.

    Scripts that sample add --temperature, those with RL also --updates_per_step: functions here read both."""

    model: str = ""  # Model folder or Hub name. A folder without weights starts from random ones.
    data: str = ""  # Training rows: file, folder, Hub name (docs/data.md) or igsm:LO-HI
    eval_data: tuple[str, ...] = ()  # Held-out rows, as --data. Hub: the test split; igsm: templates not trained on
    igsm_problems: Positive[int] = 20000  # Problems that igsm:LO-HI makes, of LO to HI operations
    out: str = ""  # Run folder. Running the same command again resumes from its newest checkpoint.
    chat_template: str = ""  # File with a Jinja chat template, saved with the model. Empty: the tokenizer's own
    chat_template_args: tuple[str, ...] = ()  # Switches of the template, such as enable_thinking=false; saved too
    verifier: str = "math"  # Grader: math (LUFFY's), robust (for your own data), boxed, ... or your module:function
    max_prompt_tokens: Positive[int] = 1024  # Rows with longer prompts are left out and counted.
    max_response_tokens: Positive[int] = 8192  # Longest answer to sample and longest trace to train on
    steps: NotNegative[int] = 0  # Steps to train; 0 follows --epochs.
    epochs: Positive[float] = 1.0  # Passes over the data if --steps is 0
    batch_size: Positive[int] = 128  # Questions per step
    lr: NotNegative[float] = 1e-6  # Peak learning rate of AdamW
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # Learning rate after the warm-up
    warmup: Share[float] = 0.0  # Fraction of the updates in which the learning rate rises linearly
    lr_floor: Share[float] = 0.0  # Fraction of the peak that linear and cosine would reach one update after the last
    betas: Betas = (0.9, 0.999)  # AdamW betas
    weight_decay: NotNegative[float] = 0.01  # AdamW weight decay
    max_grad_norm: Positive[float] = 1.0  # Clip the global gradient norm to this.
    rope_theta: NotNegative[float] = 0.0  # Set RoPE's base, also in the saved model; 0: the model's (docs/published.md)
    max_positions: NotNegative[int] = 0  # Set max_position_embeddings, also in the saved model; 0: the model's
    seed: Seed = 0  # Seed of data order, sampling and random weights
    micro_batch_tokens: Positive[int] = 32768  # Tokens per micro-batch and rank. The gradient does not depend on it.
    # Layers that recompute their activations in the backward pass. auto: as many as memory demands (on a CPU none)
    gradient_checkpointing: Literal["auto", "all", "none"] = "auto"
    compile: bool = False  # Fuse each layer's small operations with torch.compile.
    flash_attention: Literal[2, 3] = 2  # Attention's kernels on CUDA. 3 needs a Hopper GPU and a package (docs/gpu.md).
    # Sampler. embedded: in this process. vllm: a vLLM process beside each rank (docs/rollout.md). auto: vllm on CUDA
    rollout: Literal["auto", "embedded", "vllm"] = "auto"
    # Fraction of each GPU's memory for vLLM, which frees it during the update. 0: what training leaves, at most 0.7
    rollout_gpu_memory: Share[float] = 0.0
    # Largest batch of the embedded sampler, as rows x (prompt + response) tokens; at least the answers to one question.
    # 0: 65,536, on a GPU more if half of the free memory holds it
    sampler_tokens: NotNegative[int] = 0
    # Stop if log-probs of sampler and trainer differ by more than this on average. 0: 0.05 on CUDA, else 0.001
    max_mismatch: NotNegative[float] = 0.0
    eval_every: NotNegative[int] = 10  # Evaluate every this many steps, before the first and after the last. 0: never
    eval_temperature: NotNegative[float] = 0.6  # Sampling temperature of evaluation; 0 is greedy.
    eval_limit: NotNegative[int] = 0  # Rows to read of each evaluation file; 0 reads all.
    save_every: NotNegative[int] = 50  # Write a checkpoint every this many steps and after the last. 0: never
    keep: Positive[int] = 2  # Checkpoints to keep. If the newest is damaged, the run resumes from the one before it.
    keep_best: bool = False  # Also keep the trained model of the highest eval/mean, in OUT/best.
    skip_bad_updates: bool = False  # Skip an update with a non-finite loss or gradient instead of stopping.
    timeout_minutes: Minutes = 30.0  # Abort if a rank does not respond for this many minutes.
    profile: NotNegative[int] = 0  # Profile this many steps from the second on: a summary, and traces in OUT/profile.
    log_samples: NotNegative[int] = 4  # Rows per step to write to samples.jsonl
    tensorboard: bool = False  # Also log to TensorBoard (in the run folder).
    wandb: str = ""  # Also log to this Weights & Biases project.


def check_ranges(args) -> None:
    """Raise InputError for a flag whose value is outside the range of its type, and for values that no flag takes."""
    for name, kind in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        for rule in getattr(kind, "__metadata__", ()):
            if isinstance(rule, tuple) and not rule[1](value):
                raise InputError(f"--{name} must be {rule[0]}, not {value}")
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        if choices and value not in choices:  # tyro has checked typed values, but not a preset's
            raise InputError(f"--{name} must be one of {', '.join(map(repr, choices))}, not {value}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name} must be finite, not {value}")
        if name in ("temperature", "eval_temperature") and 0 < value < 0.01:  # vLLM would take 0.01
            raise InputError(f"--{name} must be 0.01 or more, not {value} (0, where it is allowed, is greedy)")
        if name in ("data", "out") and not value and getattr(type(args), name, None):
            raise InputError(f"--{name} is empty")
        if name == "out" and value.startswith("~"):  # bash leaves --out=~/runs as it is
            raise InputError(f"--out {value}: the shell has not replaced ~; write it without = and quotes, or in full")


def check_flags(args) -> None:
    """Raise InputError for a value outside the range of its type, and for combinations that no script accepts."""
    check_ranges(args)
    if args.batch_size % (updates := getattr(args, "updates_per_step", 1)):
        raise InputError(f"--batch_size {args.batch_size} is not a multiple of --updates_per_step {updates}")
    if getattr(args, "group_size", 2) < 2 and getattr(args, "method", "") != "sft":
        raise InputError("--group_size 1: an answer without others to its question has no advantage; 2 or more do")
    if getattr(args, "keep_best", False) and not args.eval_every:
        raise InputError("--keep_best keeps the best evaluation's model: it needs --eval_every")
    check_verifier(args.verifier)


def count_steps(settings: dict, per_epoch: int) -> int:
    """Return the number of steps: --steps, or if it is 0, what --epochs gives at `per_epoch` batches per epoch."""
    return settings["steps"] or max(1, int(round(settings["epochs"] * per_epoch, 6)))


SHOWN = ("reward/own", "eval/mean", "policy/entropy", "teacher/logp", "buffer/size", "sft/demonstrations", "sft/loss",
         "logp/chosen", "logp/rejected", "loss/policy", "value/right", "value/wrong", "policy/kl")  # fmt: skip


class Run:
    """A run folder and the steps that are left to do. All ranks call its methods.

    Rows that are logged have `tokens` and `shown(tokenizer)`, a dictionary for samples.jsonl."""

    def __init__(self, args, out: str = ""):
        """out: the run folder, if it is not --out."""
        check_flags(args)
        self.args, self.out, self.world = args, Path(out or args.out), init_world(args.timeout_minutes)
        if len({*gather_lists([repr(args)], self.world)}) > 1:
            raise InputError("the ranks have different flags: do two jobs share one --rdzv_id (docs/scale.md)?")
        path = str(self.out.absolute())
        if os.fsencode(path) != path.encode(errors="replace"):  # what writes the model takes UTF-8 alone
            raise InputError(f"--out {path}: the path is not UTF-8: rename it, or export PYTHONUTF8=1")
        if args.flash_attention == 3:
            use_flash_attention_3()
        self.clock = Clock()
        self.checkpoints = Checkpoints(self.out / "checkpoint", args, keep=args.keep)
        self.state = self.checkpoints.state() or {}  # what `save` was given when the newest checkpoint was written
        self.start = self.step = self.state.get("step", 0)
        self.logs: list[dict] = []  # of the updates of this step
        self.skipped = 0

    def plan(self, items: list, held_out: list[Example], left_out: dict, *, key=None, sequences=None,
             source: str = "", batch_flag: str = "--batch_size", models: dict | None = None) -> None:  # fmt: skip
        """Check that data and start models match the checkpoint and that the data fills a batch; lock OUT; count steps.

        items: what the loop trains on. Items that are not Examples need key and sequences. key(item): a tuple of lists
        of ids, texts and numbers, from which the digest of the data is made. sequences(item): the (prompt, response)
        pairs that the model reads. source, batch_flag: what messages call the data and the batch size, if not --data
        and --batch_size. models: {flag: path} of the models that training starts from, if not --model alone."""
        args = self.args
        sequences = sequences or (lambda e: [(e.prompt, e.trace or [])])
        key = key or (lambda e: (e.prompt, e.trace, e.gold, *([str(e.trace_logps)] if e.trace_logps else [])))
        self.source = source = source or f"--data {args.data}"
        digest = data_digest(map(key, items), ((e.prompt, e.trace, e.gold) for e in held_out))
        self.checkpoints.check_data(self.state, digest, source)
        if len(items) < args.batch_size:
            raise InputError(f"{source}: {len(items)} rows are fewer than {batch_flag} {args.batch_size}")
        self.longest = max(len(prompt) + len(response) for item in items for prompt, response in sequences(item))
        per_epoch = len(items) // args.batch_size
        self.steps = count_steps(vars(args), per_epoch)
        if self.start > self.steps:
            raise InputError(f"--out {self.out} has a checkpoint of step {self.start}, after the last of {self.steps} "
                             "steps: raise --steps (or --epochs), or name another --out")  # fmt: skip
        self.held_out = held_out if args.eval_every else []
        if self.held_out and self.world.main:
            asked = {tuple(prompt) for item in items for prompt, _ in sequences(item)}
            if n := sum(tuple(e.prompt) in asked for e in held_out):
                print(f"WARNING: {n} of the {len(held_out)} held-out questions are trained on too", file=sys.stderr)
        if args.keep_best and not self.held_out:
            raise InputError("--keep_best keeps the best evaluation's model: it needs --eval_data and --eval_every")
        models = models or {"model": args.model}
        written = [name for name in models if name != "reference"]  # to OUT
        written += ["best"] if args.keep_best else []
        check_replaced(self.out, written, models, new=not self.state)
        self.lock, newest = lock(self.out, self.world), self.checkpoints.latest()
        if self.start != (int(newest.name.removeprefix("step-")) if newest else 0):
            raise InputError(f"--out {self.out}: another process has written there meanwhile; run the command again")
        keep_digests(self.out, models, bool(self.state), self.world)
        if self.world.main:
            anew = f"; {self.out} has no checkpoint: its model is trained anew" if (self.out / "model").exists() else ""
            resumes = f"; {self.out} resumes after step {self.start}" if self.start else anew
            if self.start == self.steps:
                resumes = f"; all {self.steps} steps of {self.out} are done"
            print(f"{source}: {in_words(left_out, args)}; {len(self.held_out)} held-out; {self.steps} steps of "
                  f"{args.batch_size} ({self.steps / per_epoch:.3g} epochs){resumes}")  # fmt: skip
            before = count_steps(self.state.get("settings", vars(args)), per_epoch)  # when the checkpoint was written
            if self.start < self.steps and before != self.steps and (args.schedule != "constant" or args.warmup):
                print(f"WARNING: the checkpoint is of a run of {before} steps; the schedule now has {self.steps}, so "
                      "the learning rate may rise", file=sys.stderr)  # fmt: skip

    def begin(self, policy, optimizer, tokenizer, **more) -> None:
        """Load the newest checkpoint, or check the disk's free space. more: further pairs that are trained, such as
        value=(model, optimizer) or sft=(policy, a second optimizer)."""
        if (limit := max_positions(policy.lm.config)) and self.longest > limit:
            raise InputError(f"{self.source}: the longest row has {self.longest} tokens, and the model {limit} "
                             "positions: lower --max_response_tokens, or raise --max_positions and --rope_theta")
        self.policy, self.tokenizer = policy, tokenizer
        self.pairs = {"policy": (policy, optimizer)} | more
        if self.state:
            self.checkpoints.load(self.pairs)
        elif self.args.save_every:
            self.checkpoints.check_space(self.pairs)
        if self.args.gradient_checkpointing == "auto":
            keep_activations(policy, self.args.micro_batch_tokens, self.world)
        about = {"script": self.checkpoints.settings["script"], "code": self.checkpoints.code[:12]}
        self.metrics = Metrics(self.out, self.args, self.world, start=self.start, steps=self.steps, about=about)

    def __iter__(self) -> Iterator[int]:
        self.clock = Clock(self.args.profile, self.out)
        while self.step < self.steps:
            self.checkpoints.raise_if_failed()
            self.step += 1
            yield self.step

    @property
    def evaluates(self) -> bool:
        """Whether this step evaluates: before the first step, every --eval_every steps, and after the last."""
        due = self.held_out and (self.step % self.args.eval_every == 0 or self.step == self.steps)
        return bool(due and (self.step > self.start or not self.start))

    def evaluate(self, sampler) -> dict[str, float | None]:
        """Evaluate if this step does, and keep the best model; return metrics, else {}."""
        if not self.evaluates:
            return {}
        with self.clock("evaluate"):
            found = evaluate(sampler, self.tokenizer, self.held_out, self.args, self.world)
            if self.args.keep_best and self.step:
                logged = read_metrics(self.out) if self.world.main and (self.out / "best").exists() else []
                before = [row["eval/mean"] for row in logged if row["step"] and "eval/mean" in row]
                if found["eval/mean"] > max(gather_lists(before, self.world), default=-math.inf):
                    export(self.policy, self.tokenizer, self.out / "best", self.world)
                    if self.world.main:
                        tqdm.write(f"{self.out}/best: step {self.step}, eval/mean {found['eval/mean']:.3f}")
        return found

    @property
    def step_seed(self) -> int:
        """Seed of what this step draws."""
        return self.args.seed * 1_000_003 + self.step

    def lr(self, update: int = 0, updates: int = 1, peak: float | None = None) -> float:
        """Return the learning rate of update 0, 1, ... of the `updates` of this step. peak: --lr if None."""
        args, peak = self.args, self.args.lr if peak is None else peak
        return learning_rate((self.step - 1) * updates + update, lr=peak, steps=self.steps * updates,
                             schedule=args.schedule, warmup=args.warmup, floor=args.lr_floor)  # fmt: skip

    def update(self, name: str, log: dict, rows: list, *, lr: float, max_grad_norm: float,
               norm: str = "optim/grad_norm") -> bool:  # fmt: skip
        """Check the metrics of an update, clip the gradient of the pair `name`, take its optimizer's step; return True.

        log: the metrics. norm: what the gradient's norm is called among them. If a number is not finite, `rows` are
        written to OUT/bad, and the run stops, or with --skip_bad_updates the update is skipped: return False."""
        model, optimizer = self.pairs[name]
        try:
            check_finite(log, self.policy, self.world)
            limit = self.args.max_mismatch or (0.05 if self.world.device.type == "cuda" else 0.001)
            if (gap := log.get("mismatch/mean_abs", 0.0)) > limit:
                raise RuntimeError(f"step {self.step}: the sampler's log-probs differ from the trainer's by {gap:.2g} "
                                   f"per token (--max_mismatch {limit}): stale weights, or another model")  # fmt: skip
            for other, _ in self.pairs.values():
                if other is not model:
                    gradient_norm(other)  # raises if not finite: either all trained models take their step, or none
            log[norm] = optimizer_step(model, optimizer, lr=lr, max_grad_norm=max_grad_norm)
        except FloatingPointError as error:
            self._skip_or_stop(error, rows)
            return False
        self.logs.append(log | ({"optim/lr": lr} if name == "policy" else {}))
        return True

    def _skip_or_stop(self, error: FloatingPointError, rows: list) -> None:
        for _, optimizer in self.pairs.values():
            optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        path = self.out / "bad" / f"step-{self.step:08d}-{self.skipped}.jsonl"
        message = f"step {self.step}: {error}. The {len(rows)} rows of this update are in {path}"
        if self.world.main:
            write_lines(path, [row.shown(self.tokenizer) for row in rows])
        dist.barrier()  # the file is complete before a rank ends
        if not self.args.skip_bad_updates:
            after = "resumes from the last checkpoint" if self.checkpoints.latest() else "starts anew"
            raise FloatingPointError(f"{message}. The same command {after}") from error
        if self.world.main:
            tqdm.write(f"{message}. The update is skipped (--skip_bad_updates)")

    def log(self, values: dict, rows: Sequence = (), also: Sequence = ()) -> None:
        """Log means over the step's updates (of /max: maxima), `values` and what the step cost; write samples of
        `rows`. also: other rows that were trained on. Before the first step log `values` alone, if there are any."""
        if self.step == self.start:
            return self.metrics.log(self.step, values, SHOWN) if values else None
        seconds = self.clock.flush()
        tokens = sum(row.tokens for row in [*rows, *also])
        names = dict.fromkeys(name for log in self.logs for name in log)
        logged = {name: [log[name] for log in self.logs if log.get(name) is not None] for name in names}
        means = {name: max(found) if name.endswith("/max") else mean(found) for name, found in logged.items()}
        costs = seconds | {
            "speed/tokens_per_second": tokens / seconds["seconds/step"],
            "memory/peak_gb": peak_memory_gb(self.world), "update/skipped": self.skipped or None,
        }
        self.logs = []
        self.metrics.log(self.step, means | values | costs, SHOWN)
        sample = random.Random(self.step).sample(rows, min(self.args.log_samples, len(rows)))
        self.metrics.samples(self.step, [row.shown(self.tokenizer) for row in sample])

    def save(self, **state) -> None:
        """Write a checkpoint if it is due. A resumed run finds `state` (plain JSON) in run.state."""
        every = self.args.save_every
        if every and (self.step % every == 0 or self.step == self.steps):
            # for an export of the checkpoint
            name = self.tokenizer.name_or_path
            name = str(Path(name).resolve()) if Path(name).is_dir() else name
            state |= {"template": self.tokenizer.chat_template, "tokenizer": name}
            with self.clock("save"):  # counted with the next step
                self.metrics.to_disk()  # first: they must have the steps of every checkpoint
                if self.world.main:
                    self.exported.unlink(missing_ok=True)
                self.checkpoints.save(self.step, self.pairs, self.world, **state)
            self.metrics.draw(every=60)

    @property
    def exported(self) -> Path:
        """The file that holds the step whose models are in OUT."""
        return self.checkpoints.folder / "exported"

    def finish(self, sampler) -> None:
        """Draw curves.png, write the trained models to OUT/model and OUT/NAME, end the sampler. Models that an earlier
        start has written stay: a newer Transformers would write other config.json files, which later stages refuse."""
        self.checkpoints.wait()
        self.metrics.close()
        models = {name: model for name, (model, _) in self.pairs.items() if model is not self.policy}
        models["model"] = self.policy  # last: OUT/model marks the run as complete
        done = self.start == self.steps and all((self.out / name).is_dir() for name in models)
        done = done and self.exported.exists() and self.exported.read_text() == str(self.step)
        if not all(gather_lists([done], self.world)):
            for name, model in models.items():
                export(model, self.tokenizer, self.out / name, self.world)
            if self.world.main and self.checkpoints.folder.exists():
                write_whole(self.exported, str(self.step))
        sampler.close()
        self.clock.close()
        if self.world.main:
            print(f"{self.out}: {', '.join(models)}, metrics.jsonl, samples.jsonl, curves.png")
            if self.skipped:
                print(f"WARNING: {self.skipped} updates were skipped since the last start (OUT/bad)", file=sys.stderr)


def check_replaced(out: Path, names: list[str], models: dict[str, str], *, new: bool) -> None:
    """Raise InputError if the models that training writes to OUT/NAME would replace something that no run there has
    made, or one of the models {flag: path} that it starts from. new: OUT has no checkpoint."""
    for folder in (out / name for name in names if (out / name).is_dir() and any((out / name).iterdir())):
        if new and not (out / "weights.json").exists():
            raise InputError(f"--out {out}: {folder} is there already, and no run has made it: name another --out")
        for flag, path in models.items():
            if path and Path(path).resolve() == folder.resolve():
                raise InputError(f"--{flag} {path}: the trained model would replace it: name another --out than {out}")


def digests_of(models: dict[str, str], world: World) -> dict[str, str]:
    """{flag: digest} of the models {flag: path}, on all ranks; a flag without a path has none. Rank 0 reads them."""
    mine = {flag: digest_of(path, f"--{flag}") for flag, path in models.items() if path} if world.main else {}
    return dict(gather_lists([*mine.items()], world))


def keep_digests(out: Path, models: dict[str, str], compare: bool, world: World) -> None:
    """Write digests of the models {flag: path} to OUT/weights.json. InputError if `compare` and OUT has others."""
    digests, path = digests_of(models, world), out / "weights.json"
    hint = f"{path} (delete it if newer code has only written the model's config.json anew)"
    wrong = f"{hint}: {out} was begun with other weights"
    keep_settings(path, digests, models if compare and path.exists() else (), wrong, world)


def lock(out: Path, world: World, name: str = ".lock", *, wait: bool = False):
    """Make the run folder if needed, lock it and return the lock file. Closing any handle of that file ends the lock.
    Raises InputError if the folder cannot be made or another process holds the lock, such as a rank of a torchrun that
    was killed. With `wait` it waits for that process instead."""
    if not world.main:
        return None
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / name, "a")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"--out {out}: {error}") from error
    with contextlib.suppress(OSError):  # some file systems of clusters have no locks
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise InputError(f"--out {out}: another process writes there: end it, or name another folder") from error
    return file


def stop_ids(policy, tokenizer, more: Iterable[str] = ()) -> list[int]:
    """Return the ids that end an answer: the tokenizer's eos, the generation config's, and the tokens `more`."""
    also = policy.lm.generation_config.eos_token_id or []
    if unknown := [token for token in more if token not in tokenizer.get_vocab()]:
        raise InputError(f"--stop_tokens {unknown[0]}: not a token of --model")
    eos = [tokenizer.eos_token_id, *(also if isinstance(also, list) else [also])]
    return eos + tokenizer.convert_tokens_to_ids(list(more))


def open_tokenizer(path: str, args):
    """Load a tokenizer with the template that the flags set."""
    tokenizer = load_tokenizer(path, trust_remote_code=getattr(args, "trust_remote_code", False))
    return set_template(tokenizer, args.chat_template, args.chat_template_args)


def open_policy(path: str, args, world: World, **options):
    """Load a model by the flags of RunArgs. options: those of `load_policy`, which replace the flags."""
    flags = dict(
        seed=args.seed, gradient_checkpointing=args.gradient_checkpointing, compile=args.compile,
        edit_config=functools.partial(set_context, args), trust_remote_code=getattr(args, "trust_remote_code", False),
    )  # fmt: skip
    return load_policy(path, world, **flags | options)


def open_sampler(policy, tokenizer, args, world: World, *, needed=True):
    """Return the sampler that --rollout names; it draws after its first sync. One that is not needed does nothing."""
    if not needed:
        return Sampler()
    return make_sampler(
        args.rollout, policy, world, stop_ids=stop_ids(policy, tokenizer), max_batch_tokens=args.sampler_tokens,
        max_tokens=args.max_prompt_tokens + args.max_response_tokens, gpu_memory=args.rollout_gpu_memory,
    )  # fmt: skip


def check_fit(flag: str, model, policy, longest: int) -> None:
    """Raise InputError if the model of a flag has another vocabulary than the policy, fewer positions than `longest`,
    or another soft cap or scale of its logits."""
    size, expected = (m.lm.config.get_text_config(decoder=True).vocab_size for m in (model, policy))
    if size != expected:
        raise InputError(f"{flag}: a vocabulary of {size} does not fit --model's of {expected}")
    if logit_form(model.lm.config) != logit_form(policy.lm.config):
        raise InputError(f"{flag}: its logits have another soft cap or scale: name a model of --model's type")
    if (limit := max_positions(model.lm.config)) and longest > limit:
        raise InputError(f"{flag}: sequences of up to {longest} tokens exceed its {limit} positions: lower the flags "
                         "that limit tokens (--max_...tokens), or name another model")  # fmt: skip


def evaluate(sampler, tokenizer, examples: list[Example], args, world: World) -> dict[str, float | None]:
    """Return accuracy by data source and its unweighted mean, truncation, length, and how often the verifier failed."""
    mine = range(world.rank, len(examples), world.size)
    grader = Grader(tokenizer, args.verifier)
    rows = sample_rows(sampler, examples, mine, 1, args, world, seed=args.seed + 1, grader=grader,
                       temperature=args.eval_temperature)  # fmt: skip
    grader.wait()
    # gather a few numbers per row: with ids and log-probs, the rows would take gigabytes on every rank
    results = [(r.example.source, r.reward, r.truncated, len(r.response), (r.status, r.detail)) for r in rows]
    sources, rewards, truncated, lengths, verdicts = zip(*gather_lists(results, world), strict=True)
    check_works(args.verifier, verdicts)
    names = {s: f"source {s}" if s in ("mean", "truncated", "length") else s for s in sorted(set(sources))}
    accuracy = {f"eval/{names[name]}": mean(r for s, r in zip(sources, rewards) if s == name) for name in names}
    return accuracy | {
        "eval/mean": mean(accuracy.values()), "eval/truncated": mean(truncated), "eval/length": mean(lengths),
    } | {f"verifier/eval_{s}": mean(status == s for status, _ in verdicts) for s in ("timeout", "error", "unparsable")}


@dataclass
class Row:
    """An answer to a question: the model's own, or the teacher's trace."""

    prompt: list[int]
    response: list[int]
    group: int  # which question of the step
    teacher: bool = False
    logps: list[float] | None = None  # log-probs under the policy that wrote the response, if they are known
    truncated: bool = False
    reward: float = 0.0
    status: str = ""  # the verifier's; empty: not graded
    detail: str | None = None  # the verifier's reason, if the status is not "ok"
    advantage: float = 0.0
    example: Example | None = None

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.response)

    @property
    def drawn_logps(self) -> list[float]:
        """`logps`, NaN if they are unknown."""
        return self.logps or [math.nan] * len(self.response)

    def text(self, tokenizer) -> str:
        """The response as text, as a verifier reads it: without the token that ended it (a cut trace has none)."""
        cut = self.response[-1] not in special_tokens(tokenizer) if self.teacher else self.truncated
        return tokenizer.decode(self.response if cut else self.response[:-1])

    def shown(self, tokenizer) -> dict:
        """The row as a dictionary for samples.jsonl."""
        return {
            "who": "teacher" if self.teacher else "own", "reward": self.reward if self.status else None,
            "detail": self.detail, "truncated": self.truncated, "advantage": self.advantage, "gold": self.example.gold,
            "prompt": self.example.text, "response": tokenizer.decode(self.response),
        }  # fmt: skip


def trace_rows(batch: list[Example], mine, counts: list[int] | None = None) -> list[Row]:
    """Return the traces of the questions `mine` of a batch as rows: counts[g] copies of question g's (None: one)."""
    copies = counts or [int(bool(e.trace)) for e in batch]
    chosen = [(g, batch[g]) for g in mine for _ in range(copies[g])]
    return [Row(e.prompt, e.trace, g, True, e.trace_logps, example=e) for g, e in chosen]


def sample_rows(
    sampler, batch: list[Example], mine, counts: int | list[int], args, world: World, *, seed: int, grader: "Grader",
    top_p: float = 1.0, temperature: float | None = None,
) -> list[Row]:  # fmt: skip
    """Sample counts (or counts[g]) answers to question g of a batch, for the questions `mine`, at --temperature or
    another one. The answers to a question are graded while others are still being sampled."""
    counts = [counts] * len(batch) if isinstance(counts, int) else counts
    groups: list[list[Row]] = [[] for _ in mine]

    def drawn(i: int, answers) -> None:
        example = batch[mine[i]]
        groups[i] = [Row(example.prompt, a.ids, mine[i], False, a.logps, a.truncated, example=example) for a in answers]
        grader.add(groups[i])

    sampler.generate(
        [batch[g].prompt for g in mine], n=[counts[g] for g in mine], keys=[batch[g].index for g in mine], seed=seed,
        sampling=Sampling(args.max_response_tokens, args.temperature if temperature is None else temperature, top_p),
        drawn=drawn, progress="sample" if world.main else None,
    )  # fmt: skip
    return [row for group in groups for row in group]


def keep_answers(
    path: Path, examples: list[Example], load, settings: dict, tokenizer, args, world: World, *, n: int,
    top_p: float = 1.0,
) -> list[list[dict]]:  # fmt: skip
    """Sample n answers to each example, grade them, keep them in `path` (a question per line), and return them:
    [examples][n], each with "response", "response_ids", "truncated", "reward", "status", "detail".

    Makes the answers to --batch_size questions at a time; an interrupted call can be resumed. load() -> policy is
    called if answers are missing. settings: what they depend on, kept beside `path`. InputError if kept ones differ.
    If the file of a module:function has changed, it grades kept answers again."""
    settings = settings | {"data_digest": data_digest((e.prompt, e.gold) for e in examples)}
    kept = len(read_records(path))
    names = [name for name in settings if kept and name != "model"]  # model: by its digest
    keep_settings(path.with_suffix(".json"), settings, names, f"{path} has answers of other settings", world)
    sampler, verdicts = None, []  # of the first parts of all ranks: a single question can make a verifier fail
    grader, version = Grader(tokenizer, args.verifier), grader_version(args.verifier)
    if kept < len(examples):
        policy = load()
        sampler = open_sampler(policy, tokenizer, args, world)
        sampler.sync(policy, version=0)
        del policy  # the sampler has what it needs

    def answer(part: list[int]) -> list[dict]:
        batch = [examples[i] for i in part]
        records = [{"id": i, "graded_by": version, "answers": []} for i in part]
        every = range(len(batch))
        rows = sample_rows(sampler, batch, every, n, args, world, seed=args.seed, grader=grader, top_p=top_p)
        grader.wait()
        if not verdicts:
            verdicts.extend(gather_lists([(row.status, row.detail) for row in rows], world))
            check_works(args.verifier, verdicts)
        for row in rows:
            records[row.group]["answers"].append({
                "response": tokenizer.decode(row.response), "response_ids": row.response, "truncated": row.truncated,
                "reward": row.reward, "status": row.status, "detail": row.detail,
            })  # fmt: skip
        return records

    ids = list(range(len(examples)))
    parts = [ids[i : i + args.batch_size] for i in ids[:: args.batch_size]]
    records = keep_records(path, parts, answer, world)
    if sampler:
        sampler.close()
    stale = [r for r in records.values() if ":" in args.verifier and r.get("graded_by", version) != version]
    if stale:
        answers = [(examples[r["id"]], answer) for r in stale for answer in r["answers"]]
        first, end = (len(answers) * rank // world.size for rank in (world.rank, world.rank + 1))
        rows = [Row([], a["response_ids"], 0, truncated=a["truncated"], example=e) for e, a in answers[first:end]]
        grader.add(rows)
        grader.wait()
        verdicts = gather_lists([(row.reward, row.status, row.detail) for row in rows], world)
        for (_, answer), verdict in zip(answers, verdicts, strict=True):
            answer["reward"], answer["status"], answer["detail"] = verdict
        check_works(args.verifier, [verdict[1:] for verdict in verdicts])
        if world.main:
            write_records(path, [record | {"graded_by": version} for record in records.values()])
        dist.barrier()
    return [record["answers"] for record in records.values()]


class Grader:
    """Grades rows in the background: `add`, then `wait` or `gather`. A trace is graded once in a run."""

    def __init__(self, tokenizer, verifier: str):
        self.tokenizer, self.verifier = tokenizer, verifier
        self.jobs: list[tuple[list[Row], Future]] = []
        self.traces: dict[int, Future] = {}  # by the number of the example

    def add(self, rows: list[Row]) -> None:
        """Start to grade rows."""
        if own := [row for row in rows if not row.teacher]:
            self.jobs.append((own, self._start(own)))
        for row in [row for row in rows if row.teacher]:
            if row.example.index not in self.traces:
                self.traces[row.example.index] = self._start([row])
            self.jobs.append(([row], self.traces[row.example.index]))

    def _start(self, rows: list[Row]) -> Future:
        texts, golds = [row.text(self.tokenizer) for row in rows], [row.example.gold for row in rows]
        return grade_later(texts, golds, verifier=self.verifier)

    def wait(self) -> None:
        """Return when all rows that were added have their reward and status."""
        for rows, verdicts in self.jobs:
            for row, verdict in zip(rows, verdicts.result(), strict=True):
                row.reward, row.status, row.detail = verdict
            report_golds([row.example for row in rows], rows)
        self.jobs = []

    def gather(self, rows: list[Row], world: World) -> list[Row]:
        """Wait, then return the rows of all ranks, on every rank, sorted by question. Raises InputError if the verifier
        failed on every row, unless all rows are traces."""
        self.wait()
        rows = sorted(gather_lists(rows, world), key=lambda row: row.group)
        if not all(row.teacher for row in rows):
            check_works(self.verifier, [(row.status, row.detail) for row in rows])
        return rows


def keep_settings(path: Path, settings: dict, compared: Iterable[str], message: str, world: World) -> None:
    """Write settings to a JSON file. compared: names of the settings that must equal those in the existing file;
    empty if nothing was made with them yet. Raises InputError, beginning with `message`, if some differ. A flag
    that the file lacks does not count (an older version wrote it); a digest does (another script wrote it)."""
    settings = json.loads(json.dumps(settings))  # lists, as in the file
    if (template := Path(settings.get("chat_template", ""))).is_file():  # it may be edited
        settings["chat_template_digest"] = digest_of(str(template))
    _locks[path] = lock(path.parent, world)  # until this process ends, nobody else makes anything of other settings
    if compared and not path.exists():
        raise InputError(f"{path} is missing, so the settings of the files beside it are unknown: name another --out")
    saved = json.loads(path.read_text()) if compared else {}
    known = [name for name in compared if name in saved or name.endswith("_digest")]
    known += ["chat_template_digest"] if "chat_template_digest" in saved else []
    if changed := changed_settings(saved, settings, known):
        raise InputError(f"{message} ({changed}): use the same settings to resume, or another --out")
    dist.barrier()  # all have compared before one writes
    if world.main:
        write_whole(path, json.dumps(settings, indent=2) + "\n")


_locks: dict = {}  # lock files by settings file: an open file is a held lock


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line; the file is complete or absent."""
    write_whole(path, "".join(map(json_line, rows)))


def part_files(path: Path) -> list[Path]:
    """The files beside `path` to which the ranks of `keep_records` append."""
    return sorted(path.parent.glob(f"{path.stem}.part-*.jsonl"))


def read_records(path: Path) -> dict:
    """Return {id: record} of the JSON lines of `path`, and of those that a killed run left beside it."""
    lines = [line for file in [*part_files(path), path] for line in complete_lines(file)]
    return {record["id"]: record for record in map(json.loads, lines)}


def write_records(path: Path, records: list[dict]) -> None:
    """Write `path`, one record per line, and delete the ranks' part files, which it replaces."""
    write_lines(path, records)
    for part in part_files(path):
        part.unlink()


def keep_records(path: Path, parts: list[list], make, world: World, *, together: bool = False) -> dict:
    """Make a record for each id, keep them in `path`, and return {id: record} in the order of the ids.

    parts: lists of ids that are made at once. make(part) returns their records, each with its "id". One rank makes a
    part (or calls make([]), if none is left); with `together` all ranks make every part, as a collective. Each rank
    appends to a file of its own. If the run is killed, the next call makes only the parts that are missing."""

    def merge() -> dict:
        dist.barrier()  # all have written
        if world.main:
            found = read_records(path)
            write_records(path, [found[i] for part in parts for i in part if i in found])
        dist.barrier()
        found = read_records(path)
        dist.barrier()  # all have read before one appends
        return found

    _held = lock(path.parent, world, f".{path.stem}.lock")  # a second process would delete this one's part files
    done = merge()
    todo = [part for part in parts if not all(i in done for i in part)]
    if not together:  # every rank gets as many parts; its last one may be empty
        todo = (todo + [[]] * (-len(todo) % world.size))[world.rank :: world.size]
    part_file = path.with_name(f"{path.stem}.part-{world.rank}.jsonl")
    with open(part_file, "a", buffering=1, encoding="utf-8") as file:
        for part in tqdm(todo, desc=path.name, unit="part", disable=not (todo and world.main)):
            records = make(part)
            if world.main or not together:
                file.write("".join(json.dumps(record) + "\n" for record in records))
    return merge()


def mean(values) -> float | None:
    """The mean of some numbers, None if there are none.

    >>> mean([1, 2]), mean([])
    (1.5, None)
    """
    values = list(values)
    return sum(values) / len(values) if values else None


def describe(rows: list[Row]) -> dict[str, float | None]:
    """Metrics of the rows of a step: rewards, advantages and lengths, solved groups, the verifier's statuses."""
    own, teacher = [r for r in rows if not r.teacher], [r for r in rows if r.teacher]
    graded = [r for r in rows if r.status]  # all, or with sft none
    solved: dict[int, list[float]] = {}
    for row in own:
        solved.setdefault(row.group, []).append(row.reward)
    return {
        "reward/own": mean(r.reward for r in own),
        "reward/teacher": mean(r.reward for r in graded if r.teacher),
        "teacher/advantage": mean(r.advantage for r in graded if r.teacher),
        "group/solve_all": mean(min(g) > 0 for g in solved.values()),
        "group/solve_none": mean(max(g) <= 0 for g in solved.values()),
        "length/own": mean(len(r.response) for r in own), "length/teacher": mean(len(r.response) for r in teacher),
        "length/truncated": mean(r.truncated for r in own),
        "verifier/own_unparsable": mean(r.status == "unparsable" for r in own),
    } | {f"verifier/{s}": mean(r.status == s for r in graded) for s in ("ok", "timeout", "error", "unparsable")}


def split_updates(rows: list[Row], args) -> list[list[Row]]:
    """Split the rows of a step into its updates: whole groups, the same number of questions in each update.
    Row.group is 0 .. batch_size - 1. Every update must have rows: the callers divide by their number."""
    size = args.batch_size // args.updates_per_step
    return [[row for row in rows if row.group // size == u] for u in range(args.updates_per_step)]


def micro_batches(rows: Sequence, args, world: World, sequences=lambda row: [(row.prompt, row.response)]):
    """Yield this rank's packed micro-batches of an update: (token batch, its rows). Every rank gets the same number.

    sequences(row): its (prompt, response) pairs, which stay in one micro-batch. Repeated calls give the same split."""
    parts = [sequences(row) for row in rows]
    lengths = [sum(len(prompt) + len(response) - 1 for prompt, response in part) for part in parts]
    plan = plan_micro_batches(lengths, world.size, args.micro_batch_tokens)
    for by_rank in tqdm(plan, desc="micro-batches", delay=5, leave=False, disable=None if world.main else True):
        mine = by_rank[world.rank]
        yield pack([pair for i in mine for pair in parts[i]], world.device), [rows[i] for i in mine]


def per_token(batch, values: list) -> torch.Tensor:
    """[N], a value for each response token. values: for each row one number, or a list with one for each token."""
    if values and isinstance(values[0], list):
        return to_device(torch.tensor([x for row in values for x in row]), batch.targets.device)
    return to_device(torch.tensor(values), batch.targets.device)[batch.sequence]


@torch.no_grad()
def policy_logps(policy, rows: list[Row], args, world: World) -> list[torch.Tensor]:
    """Log-probs of the rows' tokens, a tensor for each of `micro_batches`; NaN for the teacher's tokens."""
    logps = []
    for batch, mine in micro_batches(rows, args, world):
        own = pack([(row.prompt, row.response) for row in mine if not row.teacher], world.device)
        own_logp = policy(own, temperature=args.temperature)
        logp = own_logp.new_full((len(batch.targets),), math.nan)
        logp[~per_token(batch, [row.teacher for row in mine]).bool()] = own_logp
        logps.append(logp)
    return logps


def add_drift(totals: Totals, logp, old_logp, sampler_logp, *, clip: float, per: int, own=None) -> None:
    """Add to the metrics, as means over `per` own tokens: how far the policy is from the one that sampled them, and how
    far the trainer's log-probs are from the sampler's (mismatch/). [N] each; own None: all tokens."""
    if not per:
        return
    own = torch.ones_like(logp, dtype=torch.bool) if own is None else own
    log_ratio = torch.where(own, logp - old_logp, 0.0)
    gap = torch.where(own, old_logp - sampler_logp, 0.0).double()
    clipped = (log_ratio.exp() - 1).abs() > (clip or math.inf)
    totals.add({"policy/clipped": clipped.sum(), "policy/kl_old": -log_ratio.sum(),
                "mismatch/mean_abs": gap.abs().sum(), "mismatch/kl": -gap.sum()}, per=per)  # fmt: skip
    totals.largest("mismatch/max", gap.abs())


def truncated_importance(old_logp: torch.Tensor, sampler_logp: torch.Tensor, cap: float) -> torch.Tensor:
    """w = min(p_old / p_sampler, cap), elementwise, without gradient (TIS: Yao et al. 2025): the same policy's
    probabilities, computed by trainer and sampler. w is 1 where the sampler's is unknown (NaN).

    >>> truncated_importance(torch.log(torch.tensor([0.2, 0.9])), torch.log(torch.tensor([0.2, 0.1])), 2.0).tolist()
    [1.0, 2.0]
    """
    weight = (old_logp - sampler_logp).detach().exp().clamp(max=cap)
    return torch.where(sampler_logp.isnan(), 1.0, weight)
