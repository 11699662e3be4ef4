"""Checkpoints of a run: complete or absent, and an exact resume from them.

A reader of an algorithm need not know how they are written, checked and removed. `common/run.py` calls this.

    python -m common.checkpoints RUN FOLDER --step N        writes one as a Hugging Face model folder
"""

import contextlib
import dataclasses
import datetime
import hashlib
import inspect
import json
import os
import shutil
import sys
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from common.data import InputError, first_line, to_disk
from common.trainer import Policy, ValueModel, World, export, gather_lists, init_world, load_policy, load_tokenizer

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # no_dist, where one process is alone


def _sha256(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def changed_settings(saved: dict, current: dict, names) -> str:
    """Describe which of the settings `names` differ; "" for none. Values of digests are not shown."""
    changed = [name for name in names if saved.get(name) != current.get(name)]
    return "; ".join(
        f"other {name.removesuffix('_digest')}" if name.endswith("_digest")
        else f"{'' if name == 'script' else '--'}{name} {saved.get(name)!r} there, {current.get(name)!r} here"
        for name in changed
    )  # fmt: skip


def digest_of(model: str, flag: str = "--model") -> str:
    """Digest of a model folder (weights, configuration, tokenizer, template) or a file; the revision of a Hub name."""
    folder = Path(model)
    if folder.is_file():
        return _sha256(folder).hex()[:16]
    if not folder.is_dir():
        try:
            return extract_commit_hash(cached_file(model, "config.json"), None) or model
        except OSError as error:
            raise InputError(f"{flag} {model}: cannot be loaded ({first_line(error)})") from error
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json", ".jinja"))
    with ThreadPoolExecutor(16) as pool:  # sha256 runs without Python's lock
        digests = pool.map(_sha256, files)
    parts = [path.name.encode() + digest for path, digest in zip(files, digests, strict=True)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


class Checkpoints:
    """Checkpoints of a run under `folder`, each complete or absent: written beside, then renamed into place.

    A checkpoint is model and optimizer (any number of ranks can load them), state.json (the step, the settings, and
    what the algorithm keeps) and SHA256SUMS. A damaged one is set aside with a warning; the one before it is used.
    pairs: {"policy": (model, optimizer), "value": ...}, what is trained; a model that comes twice is saved once.
    On CUDA a checkpoint is copied to the host's memory and written during training; wait() returns when it is there."""

    # settings that may change between two starts of one run; those of the last lines change how sums are rounded
    FREE = {"code", "out", "steps", "epochs", "save_every", "eval_every", "log_samples", "keep", "keep_best", "wandb",
            "tensorboard", "timeout_minutes", "skip_bad_updates", "profile", "max_mismatch", "rollout_gpu_memory",
            "rollout", "sampler_tokens", "micro_batch_tokens", "gradient_checkpointing", "compile",
            "flash_attention"}  # fmt: skip

    def __init__(self, folder: Path, args, *, keep: int = 2, background: bool | None = None):
        """background: write while training goes on; None: on CUDA."""
        self.folder, self.keep = folder, keep
        script = Path(inspect.getfile(type(args)))
        self.settings = json.loads(json.dumps(dataclasses.asdict(args))) | {"script": script.name}
        code = [script, *sorted(Path(__file__).parent.glob("*.py"))]  # as they run, even if a file changes later
        self.code = hashlib.sha256(b"".join(map(_sha256, code))).hexdigest()
        self.data = None  # digest of what is trained on (check_data)
        self.background = torch.cuda.is_available() if background is None else background
        self._writer = ThreadPoolExecutor(1)
        self._written: Future | None = None  # of the checkpoint that is being written
        self._group = None  # of the writers, apart from the training's
        if self.background:
            timeout = datetime.timedelta(minutes=self.settings["timeout_minutes"])
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return max(self._complete(), default=None)

    def _complete(self) -> list[Path]:
        """All complete checkpoints, the oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if not p.suffix)

    def state(self) -> dict | None:
        """Return state.json of the newest intact checkpoint, from which this run may resume; None without one. A
        collective. Raises InputError if it, or args.json of a finished run, has other settings, or all are damaged."""
        world = World(dist.get_rank(), dist.get_world_size(), 1, torch.device("cpu"))
        damaged: list[str] = []
        while (path := self.latest()) and (damage := _damage(path, world)):
            dist.barrier()  # all have looked
            damaged.append(f"{path}: {damage}")
            if world.main:
                os.replace(path, path.with_suffix(".damaged"))
                print(f"WARNING: {damaged[-1]}; it is set aside, and the checkpoint before it is used", file=sys.stderr)
            dist.barrier()
        damaged = damaged or sorted(map(str, self.folder.glob("*.damaged")))  # also of an earlier start
        if damaged and path is None:
            raise InputError(f"{'; '.join(damaged)}: no intact checkpoint is left. Delete {self.folder} to start "
                             "anew, or choose another --out")  # fmt: skip
        state, saved, run = None, {}, self.folder.parent
        if path:
            state = json.loads((path / "state.json").read_text())
            saved = state["settings"]
        elif (run / "model").exists() and (run / "args.json").exists():
            saved = json.loads((run / "args.json").read_text())
        if changed := changed_settings(saved, self.settings, [name for name in saved if name not in self.FREE]):
            raise InputError(f"{path or run} was made with other settings ({changed}): use the same ones to resume, or "
                             "another --out to start anew")  # fmt: skip
        if state and world.main and state["ranks"] != world.size:
            print(f"{path} was made by {state['ranks']} ranks, and {world.size} resume: sums are rounded in another "
                  "order, so the run is not bit for bit the same", file=sys.stderr)  # fmt: skip
        if state and world.main and state.get("code", self.code) != self.code:
            print(f"WARNING: {self.settings['script']} or common/ has changed since {path} was written: the run goes "
                  "on with the new code; another --out starts anew", file=sys.stderr)  # fmt: skip
        return state

    def check_data(self, state: dict | None, digest: str, flags: str) -> None:
        """Save `digest` with every checkpoint. Raises InputError if `state` has another one."""
        self.data = digest
        if state and state.get("data") not in (None, digest):
            raise InputError(f"{flags}: the data (or --eval_data, the tokenizer or its template) changed since "
                             f"{self.latest()} was written; restore them, or use another --out to start anew")

    def check_space(self, pairs: dict) -> None:
        """Raise InputError if the disk cannot hold `keep` checkpoints, the one being written and the model."""
        models = [model for model, _ in pairs.values()]
        sizes = {model: 4 * sum(p.numel() for p in model.parameters()) for model in models}
        trained = [p.numel() for model in models for p in model.parameters() if p.requires_grad]
        checkpoint = sum(sizes.values()) + 8 * sum(trained)  # two moments an optimizer
        need = checkpoint * (self.keep + 1) + sizes[models[0]]
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise InputError(f"{self.folder}: {free / 1e9:.1f} GB are free, and checkpoints and the model need "
                             f"{need / 1e9:.1f} GB: free some, choose another --out, or --save_every 0")  # fmt: skip

    @staticmethod
    def _tensors(pairs: dict) -> dict:
        """The states of all models and optimizers by `_key`; a model in two pairs once, by its first name."""
        first = {model: name for name, (model, _) in reversed(pairs.items())}
        tensors = {_key("model", name): dcp_state.get_model_state_dict(model) for model, name in first.items()}
        for name, (model, optimizer) in pairs.items():
            tensors[_key("optim", name)] = dcp_state.get_optimizer_state_dict(model, optimizer)
        return tensors

    def load(self, pairs: dict) -> None:
        """Load models and optimizers in place, on any number of ranks."""
        tensors = self._tensors(pairs)
        # without gloo for one process: with gloo's thread OpenMP has more threads than cores and takes twice as long
        dcp.load(tensors, checkpoint_id=self.latest(), no_dist=dist.get_world_size() == 1)
        for name, (model, optimizer) in pairs.items():
            if _key("model", name) in tensors:
                dcp_state.set_model_state_dict(model, tensors[_key("model", name)])
            dcp_state.set_optimizer_state_dict(model, optimizer, tensors[_key("optim", name)])

    def save(self, step: int, pairs: dict, world: World, **extra) -> None:
        """Write the checkpoint of `step`; `extra` (plain JSON) comes back from state().

        Raises RuntimeError if it cannot be written (a full disk); the checkpoints before it are intact then."""
        self.wait()
        partial = self.folder / f"step-{step:08d}.partial"
        if world.main:
            for stale in [*self.folder.glob("*.partial"), *self.folder.glob("*.damaged")]:
                shutil.rmtree(stale)
        dist.barrier()
        configs = {}
        for name, (model, _) in pairs.items():  # without the path that the model was read from
            about = {"dtype": str(model.lm.saved_dtype).removeprefix("torch."), "_name_or_path": ""}
            configs[name] = model.lm.config.to_dict() | about
        state = {"step": step, "ranks": world.size, "settings": self.settings, "data": self.data, "code": self.code}
        lm = pairs["policy"][0].lm
        generation = lm.generation_config.to_dict() if lm.can_generate() else {}
        values = [name for name, (model, _) in pairs.items() if isinstance(model, ValueModel)]
        state |= {"configs": configs, "values": values, "generation": generation, **extra}
        text = json.dumps(state)  # now: the loop may extend lists of `extra` while the background writes
        start = time.perf_counter()
        tensors = self._tensors(pairs)
        with self._explain(step):
            if not self.background:
                dcp.save(tensors, checkpoint_id=partial, no_dist=world.size == 1)
                return self._commit(partial, text, world, start)
            # copy ahead: torch's thread would wait for GPU 0, and so make each rank a CUDA context on it (0.5 GB)
            writer = dcp.FileSystemWriter(partial, per_thread_copy_ahead=0)
            stager = DefaultStager(StagingOptions(False, False, False, False))  # torch's own, which copies at once
            copied = dcp.async_save(tensors, storage_writer=writer, async_stager=stager, process_group=self._group)

        def write():
            copied.result()
            self._commit(partial, text, world, start)

        self._written = self._writer.submit(write)

    def raise_if_failed(self) -> None:
        """Raise RuntimeError if the last checkpoint could not be written; one that is being written goes on."""
        if self._written and self._written.done():
            self.wait()

    def wait(self) -> None:
        """Return when the last checkpoint is complete. Raises RuntimeError if it could not be written."""
        written, self._written = self._written, None
        if written:
            with self._explain(None):
                written.result()

    @contextlib.contextmanager
    def _explain(self, step: int | None):
        try:
            yield
        except (Exception, dcp.CheckpointException) as error:  # the second is a BaseException
            last, free = self.latest(), shutil.disk_usage(self.folder).free
            failures = getattr(error, "failures", {})  # torch's, by rank: (its own error, where)
            reason = next(iter(failures.values()), (error,))[0]
            if KeyboardInterrupt in (type(reason), type(error.__cause__), type(error.__context__)):
                raise KeyboardInterrupt from error
            raise RuntimeError(
                f"the checkpoint{f' of step {step}' if step else ''} in {self.folder} could not be written ({reason}; "
                f"{free / 1e9:.1f} GB are free there). "
                + (f"{last.name} is intact: the same command resumes from it" if last else "There is none before it")
            ) from error

    def _commit(self, partial: Path, state: str, world: World, start: float) -> None:
        """Make a written checkpoint the newest one, then delete the oldest beyond --keep."""
        if world.main:
            (partial / "state.json").write_text(state)
        dist.barrier(self._group)
        sums = _sums(partial, world, self._group)
        if world.main:
            (partial / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
            size = sum(p.stat().st_size for p in partial.iterdir())
            for path in [*partial.iterdir(), partial]:
                to_disk(path)
            final = partial.with_suffix("")
            os.replace(partial, final)
            to_disk(self.folder)
            for old in self._complete()[: -self.keep]:
                # renamed first: a half-deleted checkpoint must not look complete
                os.replace(old, old.with_suffix(".partial"))
                shutil.rmtree(old.with_suffix(".partial"))
            seconds = time.perf_counter() - start
            tqdm.write(f"{final}: {size / 1e6:,.1f} MB in {seconds:.1f} s", file=sys.stderr)
        dist.barrier(self._group)


def _key(kind: str, name: str) -> str:
    """Return the key of a pair's "model" or "optim" in a checkpoint."""
    return kind if name == "policy" else f"{kind}-{name}"


def _sums(path: Path, world: World, group=None) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint except SHA256SUMS itself; the ranks share the work."""
    names = sorted(p.name for p in path.iterdir() if p.is_file() and p.name != "SHA256SUMS")
    mine = [(name, _sha256(path / name).hex()) for name in names[world.rank :: world.size]]
    return dict(sorted(gather_lists(mine, world, group)))


def _damage(path: Path, world: World) -> str | None:
    """What is wrong with a checkpoint, or None. A collective: all ranks agree. Files not in SHA256SUMS are ignored."""
    listed = path / "SHA256SUMS"
    lines = listed.read_text(errors="replace").splitlines() if listed.is_file() else []
    expected, found = {line[66:]: line[:64] for line in lines}, _sums(path, world)  # 64 digits, two spaces, a name
    for name, digest in sorted(expected.items()):
        if found.get(name) != digest:
            return f"{name} is damaged (its checksum differs)" if name in found else f"{name} is missing"
    return None if expected else "SHA256SUMS is missing or empty"


def export_checkpoint(run: str, out: str, /, step: int = 0, value: bool = False, tokenizer: str = "") -> None:
    """Write a checkpoint of a run as a model folder.

    run: the run folder. out: a new folder. step: export the checkpoint of this step; 0: the newest. value: export the
    value model, not the policy. tokenizer: folder of another tokenizer and chat template; empty: those of the run."""
    if Path(out).exists() and (Path(out).is_file() or any(Path(out).iterdir())):
        raise InputError(f"{out}: it exists already; name a new folder")
    world = init_world()
    checkpoints = sorted(Path(run).glob("checkpoint/step-????????"))
    found = {int(path.name.removeprefix("step-")): path for path in checkpoints}
    if not found or (step and step not in found):
        raise InputError(f"{run}: no checkpoint{f' of step {step}' if step else ''} there; steps: {sorted(found)}")
    path = found[step or max(found)]
    name = "value" if value else "policy"
    if damage := _damage(path, world):
        raise InputError(f"{path}: {damage}; export another --step, of {sorted(found)}")
    state = json.loads((path / "state.json").read_text())
    if name not in state.get("configs", {}):
        raise InputError(f"{path}: it holds no {name} with its configuration")
    model = load_policy(
        "", world, from_config=state["configs"][name], lora=state["settings"].get(f"{name}_lora", 0),
        kind=ValueModel if name in state.get("values", ["value"]) else Policy,
    )
    if model.lm.can_generate():
        model.lm.generation_config = GenerationConfig.from_dict(state["generation"])
    loaded = load_tokenizer(tokenizer or state.get("tokenizer", state["settings"]["model"]), flag="--tokenizer")
    if not tokenizer:
        loaded.chat_template = state["template"]
    weights = {_key("model", name): dcp_state.get_model_state_dict(model)}
    dcp.load(weights, checkpoint_id=path)
    dcp_state.set_model_state_dict(model, weights[_key("model", name)])
    export(model, loaded, Path(out), world)
    print(f"{path} -> {out}")


if __name__ == "__main__":
    try:
        tyro.cli(export_checkpoint, prog="python -m common.checkpoints", use_underscores=True)
    except (InputError, OSError) as error:
        print(f"checkpoints: error: {error}", file=sys.stderr)
        sys.exit(2)
