"""What a training loop stands on: processes, models, sharding, the optimizer, export. No algorithm is here.

    world = init_world()                    one process, or the ranks that torchrun started
    policy = load_policy(path, world)       Hugging Face model -> sharded module that returns log-probs
    optimizer = make_optimizer(policy)      AdamW
    export(policy, tokenizer, path, world)  -> Hugging Face model

A reader of an algorithm need not know how models are checked and sharded, and how ranks fail together.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import gc
import json
import math
import os
import shutil
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GraniteConfig,
    GranitePreTrainedModel,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from common.data import InputError, TokenBatch, first_line, hidden_states, pack, to_disk, unrelated_to_model
from common.logprobs import free_memory, linear_kl, linear_logprobs

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
transformers_logging.disable_progress_bar()  # shards read and written: noise beside a training bar


def parse_args(args_type, argv: list[str] | None, **defaults: dict[str, dict]):
    """Parse argv into the dataclass `args_type` with tyro, where some flags choose the defaults of others.

    `parse_args(Args, argv, method=METHODS, preset=PRESETS)`: METHODS[--method] and then PRESETS[--preset] replace the
    dataclass's defaults, also in --help; what is typed wins. A default can depend on an earlier flag as well: {"tiny":
    {"stage": {"sft": {"lr": 1e-3}}}} is for --stage sft --preset tiny. --print_settings prints them and exits."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if shown := "--print_settings" in argv:
        argv.remove("--print_settings")
    values, selected = {field.name: field.default for field in dataclasses.fields(args_type)}, {}
    for flag, table in defaults.items():
        reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        reader.add_argument(f"--{flag}", default=values[flag])
        chosen = selected[flag] = getattr(reader.parse_known_args(argv)[0], flag)
        values |= {flag: chosen} if chosen in table else {}  # else the default, or a value that tyro refuses
        for name, value in table.get(chosen, {}).items():
            # nested: `name` is an earlier flag, and its value chooses
            values |= value.get(selected[name], {}) if isinstance(value, dict) else {name: value}
    fields = args_type.__dataclass_fields__  # its own flags come before those of RunArgs
    args_type.__dataclass_fields__ = {name: fields[name] for name in args_type.__annotations__} | fields
    script = sys.modules["__main__"]
    title, spec = (script.__doc__ or "").partition("\n")[0], script.__spec__  # spec: of `python -m tools.NAME`
    about = f"{title} --print_settings prints the settings that a command means, and exits."
    try:
        args = tyro.cli(args_type, args=argv, default=args_type(**values), use_underscores=True, description=about,
                        prog=f"python -m {spec.name}" if spec else None)  # fmt: skip
    except BrokenPipeError:  # --help | less, left with q
        _leave(0)
    if shown:
        print(json.dumps(dataclasses.asdict(args), indent=2))
        raise SystemExit
    return args


def launch(main, args) -> None:
    """Run main(args) as a program: an InputError is one line and exit code 2; any other error ends this rank at once,
    so that torchrun ends the others. If several ranks fail, only the first prints its error."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: python luffy.py >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    with contextlib.suppress(AttributeError):  # not every stdout has it
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 is no reason to fail
    try:
        main(args)
    except BaseException as error:
        script = Path(sys.argv[0]).name
        code, said = 1, f"[rank {os.environ.get('RANK', 0)}] {traceback.format_exc()}"
        if isinstance(error, InputError):
            code, said = 2, f"{script}: error: {error}"
        elif isinstance(error, KeyboardInterrupt):
            code, said = 130, f"{script}: interrupted; run the same command to resume"
        if _first_to_fail():
            print(said, file=sys.stderr, flush=True)
        _leave(code)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()  # nobody leaves while another may still talk to it
        _leave(0)  # tearing the interpreter down with gloo's threads alive aborts now and then


def _leave(code: int) -> None:
    """Exit without the interpreter's own end; what was printed is written first."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def _first_to_fail() -> bool:
    """Whether no other rank has failed before this one."""
    rank = os.environ.get("RANK", "0")
    if not dist.is_initialized():  # without torchrun nobody knows of other ranks: RANK may be a stale one
        return rank == "0" or "TORCHELASTIC_RUN_ID" not in os.environ
    try:
        store = dist.distributed_c10d._get_default_store()  # outlives the ranks: torchrun's agent holds it
        return store.compare_set("first to fail", "", rank).decode() == rank
    except Exception:  # the store is gone with the rank that held it
        return True


@dataclasses.dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_size: int  # ranks on this host
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def init_world(timeout_minutes: float = 30.0) -> World:
    """Join the ranks that torchrun started (nccl on CUDA, gloo on CPU), or be a world of one process.

    Raises InputError if torch was built for CUDA and cannot use this machine's NVIDIA GPU."""
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    if not cuda and torch.version.cuda and os.environ.get("CUDA_VISIBLE_DEVICES") != "" and NVIDIA_DRIVER.exists():
        driver = NVIDIA_DRIVER.read_text().splitlines()[0]
        raise InputError(f"torch {torch.__version__} cannot use this machine's NVIDIA GPU: this job or container has "
                         f"none (Slurm: --gres=gpu:N; apptainer exec --nv), or the driver ({driver}) is too old for "
                         f"CUDA {torch.version.cuda} (13 needs 580). To train on the CPU set CUDA_VISIBLE_DEVICES=")
    several = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and not os.isatty(0)  # a terminal: srun --pty bash
    if "RANK" not in os.environ and several:
        raise InputError("srun starts this script several times, each a run of its own: start one torchrun per host "
                         "instead (srun --ntasks-per-node=1 torchrun ...; docs/scale.md)")  # fmt: skip
    if cuda and local_rank >= (gpus := torch.cuda.device_count()):
        raise InputError(f"rank {local_rank} of this host sees {gpus} GPUs: start torchrun --nproc_per_node {gpus}")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if "RANK" not in os.environ:  # alone: gloo need not listen to the network
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every shape, and each batch has another
        warnings.filterwarnings("ignore", r"barrier\(\): using the device under current context")  # set just above
    elif "OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun sets OMP_NUM_THREADS to 1 for each rank: share the cores out instead
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // local_size))
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        if "RANK" not in os.environ:
            store, rank, size = dist.HashStore(), 0, 1
        else:
            try:
                store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            except (ValueError, dist.DistError) as error:
                if "TORCHELASTIC_RUN_ID" in os.environ:
                    raise
                raise InputError(f"RANK is set in the environment, but not by torchrun, and these ranks do not meet "
                                 f"({first_line(error)}): unset RANK, or start torchrun") from error  # fmt: skip
            if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
                # torchrun --max_restarts keeps its store: the addresses of ranks that died must not be found there.
                # (Hosts count their own restarts; for several of them see docs/scale.md.)
                store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), local_size, device)


def gather_lists(items: list, world: World, group=None) -> list:
    """Return, on every rank, all ranks' lists of plain objects concatenated in rank order."""
    if world.size == 1:
        return items
    parts: list = [None] * world.size
    dist.all_gather_object(parts, items, group=group)
    return [item for part in parts for item in part]


def sum_over_ranks(values: torch.Tensor, world: World) -> torch.Tensor:
    """Sum of a tensor on the device over the ranks, in place."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


class Totals:
    """Metrics by name, summed over micro-batches and ranks: `add` in each micro-batch, then `reduce` once. They stay on
    the device until then, so that no micro-batch waits for the one before."""

    def __init__(self, world: World):
        self.world, self.sums, self.maxima = world, {}, {}

    def add(self, values: dict[str, torch.Tensor], per: float = 1) -> None:
        """Add scalar tensors / per, to be summed over micro-batches and ranks. (Constants: add them after `reduce`.)"""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double() / per

    def largest(self, name: str, values: torch.Tensor) -> None:
        """Keep the largest of the numbers that a name was given; never below 0."""
        so_far = self.maxima.get(name, values.new_zeros((), dtype=torch.float64))
        self.maxima[name] = torch.cat([so_far[None], values.detach().flatten().double()]).max()

    def reduce(self) -> dict[str, float]:
        """The metrics over all ranks (a collective)."""
        values = torch.stack([*self.sums.values(), *self.maxima.values()]).tolist()
        log: dict[str, list[float]] = {}
        for name, value in gather_lists([*zip([*self.sums, *self.maxima], values, strict=True)], self.world):
            log.setdefault(name, []).append(value)
        return {name: max(found) if name in self.maxima else math.fsum(found) for name, found in log.items()}


class Policy(nn.Module):
    """A causal language model whose forward returns log-probs of the predicted tokens, never logits.

    The head is applied inside forward, where FSDP2 has its weight whole."""

    auto = AutoModelForCausalLM

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm
        self.bad_logps = 0  # log-probs that were NaN or above 0, with gradients, since the last check_finite

    def forward(
        self, batch: TokenBatch, *, temperature: float = 1.0, entropy: bool = False, reference=None, raw: bool = False
    ):
        """-> log-probs [N], float32; with `entropy` also the entropies [N], both of softmax(logits / T).

        With `reference`, a frozen Policy: (the same, the reference's log-probs, KL(self || reference) over the
        whole vocabulary), [N] each. With `raw`: hidden states [N, H] and the head's weight [V, H]."""
        hidden, weight = predictor_states(self.lm, batch), self.lm.get_output_embeddings().weight
        if raw:
            return hidden, weight
        form = dict(temperature=temperature, **logit_form(self.lm.config))
        out = linear_logprobs(hidden, weight, batch.targets, entropy=entropy, **form)
        logp = out[0] if entropy else out
        if torch.is_grad_enabled():
            self.bad_logps = self.bad_logps + (~(logp.detach() <= 0)).sum()
        if reference is None:
            return out
        with torch.no_grad():
            ref_hidden, ref_weight = reference(batch, raw=True)  # FSDP2 leaves a root's own weights whole
            ref_logp = linear_logprobs(ref_hidden, ref_weight, batch.targets, **form)
        return out, ref_logp, linear_kl(hidden, weight, ref_hidden, ref_weight, **form)

    def train(self, mode: bool = True):
        """Only modules that can recompute their activations are in training mode: the others would add noise."""
        nn.Module.train(self, mode)
        for module in self.lm.modules():
            module.training = mode and hasattr(module, "gradient_checkpointing")
        return self

    def plain(self, ids: torch.Tensor, *, raw: bool = False) -> torch.Tensor:
        """-> log-probs [T - 1] of ids[1:] by the model's own forward and head; with `raw` hidden states [T - 1, H]."""
        if raw:
            return self.lm.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1].float()
        logits = self.lm(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def logit_form(config) -> dict[str, float]:
    """{"cap", "scale"} of common/logprobs.py: Gemma has a cap on its logits, Cohere multiplies, Granite divides."""
    config = config.get_text_config(decoder=True)
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    cap, factor, scaling = (float(getattr(config, name, None) or 0) for name in names)
    power = 1 if config.model_type == "hyperclovax" else -1  # it multiplies under Granite's name
    return {"cap": cap, "scale": (factor or 1.0) * (scaling or 1.0) ** power}


VALUE_HEADS = ("ForSequenceClassification", "LLMForSequenceRegression")  # architectures; the second is OREO's own


class ValueModel(Policy):
    """The same body with a linear head: forward returns the value of a state, float32.

    On disk it is a sequence-classification folder with one label, or one of the published OREO code (value_head)."""

    auto = AutoModelForSequenceClassification

    def forward(self, batch: TokenBatch, *, raw: bool = False):
        """-> values [N] of the text before each response token; with `raw` hidden states [N, H]."""
        hidden = predictor_states(self.lm, batch).float()
        return hidden if raw else self.lm.score(hidden)[:, 0].clone()  # FSDP2 warns of views


def predictor_states(lm: nn.Module, batch: TokenBatch) -> torch.Tensor:
    """Final hidden states [N, H] at the positions whose next token is a response token.

    Raises InputError on a sequence that is too long for the model, or an id that it does not know."""
    rows = len(lm.get_input_embeddings().weight)
    if (limit := max_positions(lm.config)) and batch.packing.width > limit:
        raise InputError(f"a sequence of {batch.packing.width} tokens exceeds the {limit} positions of the model")
    if batch.largest >= rows:
        raise InputError(f"token id {batch.largest}: the model has {rows} rows of embeddings; use its own tokenizer")
    return hidden_states(lm.get_decoder(), batch).index_select(0, batch.predictors)


def load_tokenizer(path: str, *, trust_remote_code: bool = False, flag: str = "--model"):
    """The tokenizer of a model folder or Hub name. InputError, with `flag`, if there is none or it has no eos."""
    try:
        settings, code = get_tokenizer_config(path), dict(trust_remote_code=trust_remote_code)
        file = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
        # as the file has it: AutoTokenizer takes the pre-tokenizer of the class that the folder names, or of the type
        # (with 5.19 DeepSeekMath's texts lose their spaces)
        as_saved = file is not None and "auto_map" not in settings
        tokenizer = (PreTrainedTokenizerFast if as_saved else AutoTokenizer).from_pretrained(path, **code)
        if as_saved and settings.get("add_bos_token"):  # Transformers 5 ignores it beside a tokenizer.json
            tokenizer.add_bos_token = True
        if tokenizer.eos_token is None:  # GPT-2's folder leaves it to the class
            tokenizer.eos_token = AutoTokenizer.from_pretrained(path, **code).eos_token
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # of some types an empty one is made
            raise ValueError("no tokenizer.json, no vocabulary")
    except Exception as error:  # transformers and the hub raise many types here; all mean: no tokenizer
        local = path[:1] in ("/", ".", "~") or path.count("/") > 1 or ("/" in path and Path(path).parent.is_dir())
        if local and not Path(path).exists():
            raise InputError(f"{flag} {path}: no such folder") from error
        hint = run_folder_hint(path, "model", "best") if Path(path).exists() else f"; {Path.cwd()} has no such folder"
        raise InputError(f"{flag} {path}: no tokenizer there ({first_line(error)}){hint}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{flag} {path}: the tokenizer has no eos token; set one in tokenizer_config.json")
    return tokenizer


def run_folder_hint(path: str, *names: str) -> str:
    """A hint for an error: the model folders in `path`, if it is a run folder, else nothing."""
    inside = [str(folder) for name in names if (folder := Path(path, name)).is_dir()]
    return f"; it is a run folder: name {' or '.join(inside)}" if inside else ""


def load_policy(
    path: str, world: World, *, from_config: dict | None = None, seed: int = 0,
    gradient_checkpointing: bool | str = False, trust_remote_code: bool = False, kind: type = Policy,
    new_head: bool = False, lora: int = 0, edit_config=None, compile: bool = False, flag: str = "",
) -> Policy:  # fmt: skip
    """A Hugging Face causal LM, float32 master weights, sharded over the ranks with FSDP2 (bf16 compute and
    float32 reduction on CUDA). Only rank 0 reads the weights; the others receive their shards from it.

    A folder without weights, or from_config (settings of a configuration), gives random weights from `seed`.
    gradient_checkpointing: "all" layers (True), "none" (False), or "auto": on CUDA what `keep_activations` leaves.
    kind: Policy, or ValueModel; new_head: a folder without a value head gets one of zeros, to be trained. lora: rank
    (and alpha) of adapters on all linear layers, a value's head included; the model's own weights are then frozen.
    edit_config: changes the configuration before the model is built; it is saved with the model. compile: compile each
    layer except attention, whose shapes change with every batch. flag: names `path` in errors. Dropout is set to 0.
    Raises InputError if the model cannot be loaded, or its log-probs are not those of plain Transformers (`prove`)."""
    flag = f"{flag or ('--model' if kind is Policy else '--value')} {path}"
    if world.device.type == "cuda":
        gc.collect()  # models that the caller has dropped: FSDP2's refer to themselves and would stay on the GPU
    lm = _load(path, world, kind, flag, from_config, seed, trust_remote_code, new_head, edit_config)
    if lora:
        _add_lora(lm, lora, seed)
    if gradient_checkpointing == "auto":
        gradient_checkpointing = world.device.type == "cuda" and lm.supports_gradient_checkpointing
    if gradient_checkpointing in (True, "all"):
        if not lm.supports_gradient_checkpointing:
            raise InputError(f"{flag}: {type(lm).__name__} has no checkpointing: use --gradient_checkpointing none")
        # its name from Transformers 5.24 on, where the older one warns
        enable = getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if compile:  # before the layers are sharded: what FSDP2 does around them is not compiled
        for layer in layers_of(lm):
            layer.__class__ = _compiled(type(layer))
    model = _shard(kind(lm), world)
    with torch.compiler.set_stance("force_eager") if compile else contextlib.nullcontext():
        prove(model, flag)
    return model


def _load(path, world, kind, flag, from_config, seed, trust_remote_code, new_head, edit_config):
    """Return Transformers' model, on other ranks than 0 without weights; a new value head is zero. Raises InputError,
    with flag, if there is none or it cannot be trained here."""
    options = dict(dtype=torch.float32, attn_implementation="packed", trust_remote_code=trust_remote_code)
    reading = dict(output_loading_info=True, ignore_mismatched_sizes=True)  # _check_weights names what does not fit
    labels = {} if kind is Policy else {"num_labels": 1}
    if (Path(path) / "adapter_config.json").is_file():
        raise InputError(f"{flag}: adapter_config.json is there: merge the adapter into the weights, or remove it")
    verbosity, report = transformers_logging.get_verbosity(), {}
    try:
        transformers_logging.set_verbosity_error()  # its loading report is an error of ours
        if from_config:
            config = AutoConfig.for_model(**from_config, **labels)
        else:
            config = read_config(path, trust_remote_code=trust_remote_code, **labels)
        if edit_config:
            edit_config(config)
        _check_config(config, flag, kind)
        _prepare_config(config)
        saved_dtype = config.dtype or torch.float32  # what export writes; building a model changes config.dtype
        has_value_head = any(name in str(config.architectures) for name in VALUE_HEADS)
        if kind is ValueModel and not (has_value_head or new_head or from_config):
            raise InputError(f"{flag}: no trained value head there: {config.architectures}; oreo.py trains one")
        random = from_config or not has_weights(path)
        if random and world.main and not from_config:
            print(f"{flag}: no weights there: the model starts from random ones")
        if world.main and not random:
            reading |= {"key_mapping": {r"^value_head\.": "score."}} if kind is ValueModel else {}
            lm, report = kind.auto.from_pretrained(path, config=config, **reading, **options)
            report["mismatched_keys"] = {name for name, *_ in report["mismatched_keys"]}
            tied = lm.get_expanded_tied_weights_keys(all_submodels=True)
            report["untied_keys"] = tied.keys() - lm.all_tied_weights_keys  # Transformers left them as they are
        else:
            with torch.random.fork_rng(devices=[]), torch.device("cpu" if world.main else "meta"):
                torch.manual_seed(seed)
                lm = kind.auto.from_config(config, **options)
    except InputError:
        raise
    except Exception as error:  # Transformers raises many types here; all mean: it cannot be loaded
        reason = OWN_ATTENTION if str(error) == "'packed'" else first_line(error)
        hint = run_folder_hint(path, "value") if kind is ValueModel else ""
        raise InputError(f"{flag}: cannot be loaded ({reason}){hint}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    lm.saved_dtype, head_is_new = saved_dtype, kind is ValueModel and not has_value_head
    _check_weights(lm, report, flag, head_is_new)
    _freeze(lm)
    if head_is_new:
        nn.init.zeros_(lm.score.weight)
    return lm


def _freeze(lm: nn.Module) -> None:
    """Make buffers of the parameters that the model's own class freezes, such as a router's bias: from_pretrained would
    have them trained, and FSDP2 rounded to bf16."""
    with torch.device("meta"):
        made = type(lm)(copy.deepcopy(lm.config))
    for name in [name for name, parameter in made.named_parameters() if not parameter.requires_grad]:
        owner, _, leaf = name.rpartition(".")
        module = lm.get_submodule(owner)
        module.register_buffer(leaf, module._parameters.pop(leaf).detach())


def _check_weights(lm: nn.Module, report: dict, flag: str, head_is_new: bool) -> None:
    """Raise InputError for weights that are not the model's (Transformers' report), or an unsupported output layer."""
    heads = ("score.weight", "lm_head.weight", "embed_out.weight", "output_projection.weight") if head_is_new else ()
    for problem in ("missing", "unexpected", "mismatched", "untied"):
        if names := sorted(name for name in report.get(f"{problem}_keys", ()) if not name.endswith((*heads, IGNORED))):
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise InputError(f"{flag}: its weights do not fit its config.json: {problem} are {some}")
    if getattr(head := lm.get_output_embeddings(), "bias", None) is not None:
        raise InputError(f"{flag}: an output layer with a bias is not supported")
    rows = len(lm.get_input_embeddings().weight)
    if lm.get_decoder() in (lm, head) or (head is not None and len(head.weight) != rows):
        raise InputError(f"{flag}: {type(lm).__name__} is not supported: no decoder in it, or rows in and out differ")


OWN_ATTENTION = "its attention does not go through Transformers' interfaces for attention and masks"
IGNORED = ".masked_bias"  # a number that old GPT-2 folders hold beside the weights


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the longest sequence whose results do not depend on the rest of its batch; None: no limit.

    Beyond the original length, longrope and dynamic RoPE use the angles of a batch's longest sequence for all of it."""
    config = config.get_text_config(decoder=True)
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in ("longrope", "dynamic"):
            limits.append(parameters.get("original_max_position_embeddings"))
    return min(filter(None, limits), default=None)


def _check_config(config: PreTrainedConfig, flag: str, kind: type) -> None:
    """Raise InputError for what is known not to work."""
    if kind is Policy and any(name in str(config.architectures) for name in VALUE_HEADS):
        raise InputError(f"{flag}: it is a value model, not a language model")
    if getattr(config, "quantization_config", None) or (config.dtype or torch.float32).itemsize < 2:
        raise InputError(f"{flag}: quantised weights cannot be trained: save them dequantised")
    if getattr(config, "prefix_lm", False):  # HRM-Text's; plain Transformers needs token_type_ids for it
        raise InputError(f"{flag}: its prompts are read in both directions (prefix_lm), which is not supported; with "
                         "prefix_lm false in config.json it is another model, a causal one")  # fmt: skip
    # some compress more tokens than the proof reads: 128 in DeepSeek-V4
    kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    if others := sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"}):
        raise InputError(f"{flag}: it has layers of a kind that is not supported: {', '.join(others)}")


def _prepare_config(config: PreTrainedConfig) -> None:
    """Set dropout and layer drop to 0, and return_dict to True, also in nested configurations."""
    config.return_dict = True
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _prepare_config(value)
        elif isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean absolute difference in standard deviations of `expected`. A deviation under 0.1 counts as 0.1: log-probs of
    a confident model hardly vary, and rounding errors are no smaller for it. NaN if a value is NaN."""
    return ((found - expected).abs().mean() / expected.std().clamp(min=0.1)).item()


def tolerance(model: nn.Module) -> float:
    """The largest `distance` that rounding can cause: 0.001 in float32 on a CPU, 0.02 there for a mixture of experts,
    where rounding may choose another expert, and 0.1 in bf16 on CUDA."""
    if next(model.parameters()).is_cuda:
        return 0.1
    return 0.02 if any("experts" in name for name, _ in model.named_parameters()) else 0.001


@torch.no_grad()
def prove(model, flag: str) -> None:
    """Raise InputError unless three short packed sequences have the log-probs (of a ValueModel: the hidden states) that
    the model's own forward gives each alone, with eager attention and in eval mode. A collective.

    It cannot see what needs more than 24 tokens, such as a wrong window of 4096."""
    lm, device = model.lm, next(model.parameters()).device
    size = max(10, min(24, max_positions(lm.config) or 24))
    ids = torch.randint(len(lm.get_input_embeddings().weight), (3, size), generator=torch.Generator().manual_seed(0))
    a, b, c = ids.tolist()
    rows = [(a[:5], a[5:-2]), (a[:5], b[5:]), (c[:2], c[2:-1])]
    states = isinstance(model, ValueModel)

    def packed(raw=states):  # -> [N] or [N, H]
        _use_attention(model.train(), "packed")
        out = model(pack(rows, device), raw=raw)
        return (out[0] if isinstance(out, tuple) else out).float()

    def plain(raw=states):  # the same
        _use_attention(model.eval(), "eager")
        return torch.cat([model.plain(torch.tensor(p + r, device=device), raw=raw)[len(p) - 1 :] for p, r in rows])

    try:
        gap, limit = distance(packed(), plain()), tolerance(model)
        if gap < limit:
            return
        if math.isnan(gap):
            raise InputError(f"{flag}: the model's log-probs are not finite: have its weights diverged?")
        if distance(packed(raw=True), plain(raw=True)) < limit:
            why = "it changes its logits after the output layer"
        else:
            why = ("packed sequences see each other (recurrent layers, positions from masks), it computes with noise "
                   f"in training, or {OWN_ATTENTION}")  # fmt: skip
        why += f" (log-probs are off by {gap:.2g} standard deviations; rounding explains {limit})"
    except NotImplementedError as error:  # raised by packed_attention or packed_mask
        why = first_line(error)
    except Exception as error:
        if unrelated_to_model(error):
            raise
        why = f"{OWN_ATTENTION} ({first_line(error)})"
    finally:
        _use_attention(model.train(), "packed")
        reshard(model)
    raise InputError(f"{flag}: {type(lm).__name__} is not supported: {why}")


def _use_attention(model: nn.Module, name: str) -> None:
    """Choose one of Transformers' attention functions, also for a model that brings its own code."""
    for module in model.modules():
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            config._attn_implementation = name


class GraniteForSequenceClassification(GenericForSequenceClassification, GranitePreTrainedModel):
    """Granite's decoder with a value head, which Transformers lacks."""


# `register` does this from Transformers 5.19 on; before, it ignores Transformers' own configurations
AutoModelForSequenceClassification._model_mapping._extra_content[GraniteConfig] = GraniteForSequenceClassification


def read_config(path: str, *, trust_remote_code: bool = False, **labels) -> PreTrainedConfig:
    """The configuration of a model folder or Hub name. MiniCPM's is the Granite configuration that computes the same
    from the same weights, so that none of its code is run; it is saved as Granite."""
    theirs, _ = PreTrainedConfig.get_config_dict(path)
    if theirs.get("model_type") != "minicpm":
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **labels)
        if config.model_type == "dbrx" and "rope_parameters" not in theirs:  # Transformers 5 would use 10000
            config.rope_parameters["rope_theta"] = config.attn_config.rope_theta
        return config
    if theirs.get("sparse_config"):  # of MiniCPM4.1; the proof's sequences are too short to show it
        raise InputError(f"{path}: sparse attention; without sparse_config in config.json it is full (below dense_len)")
    hidden, layers, heads = (theirs[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    theirs["dtype"] = theirs.get("dtype") or theirs.get("torch_dtype")  # its older name
    theirs.setdefault("tie_word_embeddings", True)  # MiniCPM's default, not Granite's
    known = GraniteConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    known |= {"rope_theta", "rope_scaling", "quantization_config"}  # understood, although not written under these names
    return GraniteConfig(
        **{name: value for name, value in theirs.items() if name in known}, **labels,
        architectures=theirs.get("architectures"), embedding_multiplier=theirs["scale_emb"],
        residual_multiplier=theirs["scale_depth"] / layers**0.5, attention_multiplier=(hidden // heads) ** -0.5,
        logits_scaling=hidden / theirs["dim_model_base"],
    )  # fmt: skip


def set_context(args, config) -> None:
    """Set RoPE's base and the number of positions as --rope_theta and --max_positions say; 0 keeps the model's."""
    config = config.get_text_config(decoder=True)
    if args.rope_theta:
        bases = getattr(config, "layer_rope_theta", None) or []  # Granite SWA's
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_theta") is None or len({*bases}) > 1:  # no RoPE, or several bases
            raise InputError(f"--rope_theta: the configuration of --model {args.model} has no single RoPE base")
        rope["rope_theta"] = args.rope_theta
        if bases:
            config.layer_rope_theta = [args.rope_theta] * len(bases)
    if args.max_positions:
        if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
            raise InputError(f"--max_positions: longrope of --model {args.model} scales attention by it; 0 keeps it")
        config.max_position_embeddings = args.max_positions


def has_weights(path: str) -> bool:
    """False for a folder with a configuration and no weights."""
    folder = Path(path)
    return not (folder / "config.json").is_file() or any(folder.glob("*.safetensors*")) or any(folder.glob("*.bin*"))


def layer_widths(config) -> tuple[list[int], int]:
    """How many numbers the keys of one token take in each layer, and the width of the MLP (of an expert at most)."""
    c, keys = config.get_text_config(decoder=True), []
    for layer in getattr(c, "per_layer_config", None) or [c] * c.num_hidden_layers:  # Gemma 4's heads have two sizes
        head = getattr(layer, "head_dim", None) or c.hidden_size // c.num_attention_heads
        keys.append(head * (getattr(layer, "num_key_value_heads", None) or c.num_attention_heads))
    inside = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    inside = max(inside) if isinstance(inside, list) else inside  # Gemma 3n has one for each layer
    return keys, inside * (1 + getattr(c, "use_double_wide_mlp", False))  # in Gemma 4's layers that share keys


def layers_to_keep(config, tokens: int, free: float) -> int:
    """How many layers can keep all activations of `tokens` bf16 tokens in `free` bytes. The others keep their input and
    recompute the rest, one layer at a time (benchmarks/scale.py: activation_bytes).

    >>> layers_to_keep(AutoConfig.for_model("qwen2", num_hidden_layers=28), 16384, 40e9)
    7
    """
    c, (keys, inside) = config.get_text_config(decoder=True), layer_widths(config)
    kept = 20 * c.hidden_size + 4 * max(keys) + 8 * inside * (getattr(c, "num_experts_per_tok", None) or 1)  # per token
    recomputed = 2 * c.hidden_size
    layers = int((free / tokens - c.num_hidden_layers * recomputed) // (kept - recomputed))
    return c.num_hidden_layers if layers >= c.num_hidden_layers else max(0, layers - 1)


def count_weights(policy: nn.Module) -> tuple[int, int, int]:
    """How many weights the policy has: in all, outside of its layers (embeddings, head), in its largest layer."""
    weights, *layers = (sum(p.numel() for p in part.parameters()) for part in (policy, *layers_of(policy.lm)))
    return weights, weights - sum(layers), max(layers, default=0)


def keep_activations(policy: Policy, tokens: int, world: World) -> None:
    """On CUDA let as many layers keep their activations as fit into nine tenths of the free memory, less what else an
    update holds. Weights and optimizer must be there already, vLLM need not."""
    if world.device.type != "cuda":
        return
    weights, root, layer = count_weights(policy)
    held = 4 * sum(p.numel() for p in policy.parameters() if p.requires_grad) / world.size  # gradients
    held += 2 * (root + 2 * layer if world.size > 1 else weights)  # gathered in bf16
    held += 2 * root + 6 * layer + 3e9  # the head's gradient; a layer's, in bf16 and float32; vLLM asleep
    kept = min(gather_lists([layers_to_keep(policy.lm.config, tokens, 0.9 * free_memory(world.device) - held)], world))
    layers = layers_of(policy.lm)
    for part in layers[:kept]:
        part.gradient_checkpointing = False
    if world.main:
        print(f"activations: {kept} of {len(layers)} layers keep theirs, the others recompute them")


def _add_lora(lm: nn.Module, rank: int, seed: int) -> None:
    """Add adapters W + (alpha / rank) B A, alpha = rank, to all linear layers, a value's head included. Only they are
    trained. Raises InputError if the body has other weight matrices, such as fused experts: they would be left out."""
    try:
        import peft
    except ImportError as error:
        raise InputError(f"LoRA needs its package: pip install -U peft ({first_line(error)})") from error
    body = lm.requires_grad_(False).get_decoder()
    known = {f"{name}.weight" for name, module in body.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    if others := [name for name, p in body.named_parameters() if p.ndim > 1 and name not in known]:
        raise InputError(f"LoRA adapts linear layers, and {type(lm).__name__} has other weight matrices ({others[0]} "
                         f"and {len(others) - 1} more), which it would leave out: train all weights")  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"), lm)


@functools.cache  # one for all layers of a type: what is compiled for one class does not fit another
def _compiled(layer: type) -> type:
    """A subclass of a layer's class with a compiled forward. Transformers 5.24 recomputes activations in the forward of
    the layer's class: a compiled one in the layer itself would keep them (FSDP2), or be recomputed as it was."""
    compiled = torch.compile(layer.forward, dynamic=True)

    def forward(self, *args, **kwargs):  # a function of its own: Dynamo takes `compiled` for the one that it replaces
        return compiled(self, *args, **kwargs)

    return type(layer.__name__, (layer,), {"forward": forward})


def layers_of(lm: nn.Module) -> list[nn.Module]:
    """The body's layers, whatever the model calls them, sharded or not."""
    names = {prefix + name for name in lm._no_split_modules or () for prefix in ("", "FSDP")}
    return [m for m in lm.get_decoder().modules() if type(m).__name__ in names]


def _shard(policy: Policy, world: World) -> Policy:
    if world.size == 1 and world.device.type == "cpu":
        return policy.train()  # nothing to shard, no precision to mix: a plain module is twice as fast
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    how = dict(
        mesh=init_device_mesh(world.device.type, (world.size,)),
        reshard_after_forward=world.size > 1,  # one rank has nothing to gather a second time
        mp_policy=bf16 if world.device.type == "cuda" else MixedPrecisionPolicy(),
    )
    weights = policy.state_dict() if world.main else {}
    buffers = dict(policy.named_buffers()) if world.main else {}
    for layer in layers_of(policy.lm):
        fully_shard(layer, **how)
    if isinstance(policy, ValueModel):
        fully_shard(policy.lm.score, mesh=how["mesh"])  # in float32 also where the rest computes in bf16
    fully_shard(policy, **how | {"reshard_after_forward": None})  # whole after a forward: OREO reads a reference's head
    register_fsdp_forward_method(policy, "plain")
    policy.to_empty(device=world.device)
    options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    dcp_state.set_model_state_dict(policy, weights, options=options)
    for name, buffer in policy.named_buffers():  # such as RoPE's frequencies, which no state dict holds
        if world.main:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)
    policy.lm.tie_weights()
    return policy.train()


def reshard(policy: nn.Module) -> None:
    """Free gathered weights: after a forward without gradients FSDP2 leaves the root's whole, in the compute dtype."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP may have sharded, whole on every rank (a collective)."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def full_parameters(policy: Policy):
    """Yield (name within the language model, whole tensor) of all that a model is saved with, parameters and
    persistent buffers, one at a time, on every rank (a collective).

    LoRA is added to the weights that it adapts: names and shapes are those of the model without it."""
    reshard(policy)
    parameters = dict(policy.lm.named_parameters())
    for name, parameter in parameters.items():
        if ".lora_" in name:
            continue
        value = whole(parameter.detach())
        if name.endswith(".base_layer.weight"):
            a, b = (name.replace("base_layer", f"lora_{x}.default") for x in "AB")
            value = value + whole(parameters[b].detach()) @ whole(parameters[a].detach())
        yield name.replace(".base_layer.", "."), value
    yield from persistent_buffers(policy.lm).items()


def persistent_buffers(lm: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are saved with a model and that training leaves alone, such as the bias of a router's scores."""
    saved = lm.state_dict().keys()
    return {name: buffer for name, buffer in lm.named_buffers() if name in saved}


def export(policy: Policy, tokenizer, path: str | Path, world: World) -> None:
    """Write the model as a Hugging Face folder (safetensors, in the dtype it was loaded from), whole or not at all."""
    dtype = policy.lm.saved_dtype
    # move each tensor off the device as it comes, so that no rank ever holds the whole model on the GPU
    buffers = persistent_buffers(policy.lm)  # keep the dtype that they compute in
    weights = {
        name: value.to("cpu", value.dtype if name in buffers else dtype) if world.main else None
        for name, value in full_parameters(policy)
    }
    if world.main:
        config = copy.deepcopy(policy.lm.config)  # from_config changes it
        with torch.device("meta"):
            empty = policy.auto.from_config(config, dtype=dtype, attn_implementation="eager")
        if type(policy) is Policy and hasattr(policy.lm, "_weight_conversions"):  # names as in its folder
            empty._weight_conversions = policy.lm._weight_conversions
        path = Path(path).resolve()  # a link may lead to a larger disk
        empty.generation_config = GenerationConfig()  # Transformers refuses to save some published generation configs
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        empty.save_pretrained(partial, state_dict=weights)
        if policy.lm.can_generate():  # as it was, and with the eos that traces end with
            generation = copy.deepcopy(policy.lm.generation_config)
            ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
            if tokenizer.eos_token_id not in ends:
                generation.eos_token_id = [i for i in (*ends, tokenizer.eos_token_id) if i is not None]
            (partial / "generation_config.json").write_text(generation.to_json_string())
        tokenizer.save_pretrained(partial)
        _write_old_names(partial)
        for file in partial.glob("*.safetensors"):  # made for its owner alone, whatever the umask
            file.chmod((partial / "config.json").stat().st_mode)
        for file in [*partial.iterdir(), partial]:
            to_disk(file)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    dist.barrier()


def _write_old_names(folder: Path) -> None:
    """Add the names by which Transformers 4, and servers that use it, read RoPE and the tokenizer. They would take the
    default base in silence, and do not know Transformers 5's class. Version 5 reads both."""
    config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    values = json.loads(config.read_bytes())  # UTF-8, whatever the locale
    for part in (values, values.get("text_config") or {}):
        rope = part.get("rope_parameters") or {}
        if "full_attention" in rope and part["model_type"].startswith(("gemma3", "olmo3")):  # others are newer
            part["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        part |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        if part.get("model_type") == "gpt_neox":
            part |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
        if rope.get("rope_type", "default") != "default":
            part["rope_scaling"] = rope
    config.write_text(json.dumps(values, indent=2))
    values = json.loads(tokenizer.read_bytes())
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    tokenizer.write_text(json.dumps(values, indent=2))


def make_optimizer(policy: nn.Module, *, lr: float, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8):
    """AdamW over every parameter that is trained (float32 states, sharded as the parameters are)."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, fused=True)
    # made here: torch's checkpoint functions create missing states by a step, which Adam would count
    for p in trained:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def learning_rate(step: int, *, lr: float, steps: int, schedule: str, warmup: float = 0.0, floor=0.0) -> float:
    """The rate of update `step` (0, 1, ...) of `steps`: linear warm-up over a fraction `warmup` of the updates, then
    "constant", or "linear" / "cosine" down to `floor` times the peak, one update after the last."""
    ramp = math.ceil(warmup * steps)
    if step < ramp:
        return lr * (step + 1) / ramp
    progress = min(1.0, (step - ramp) / max(1, steps - ramp))
    if schedule == "constant":
        return lr
    shape = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return lr * (floor + (1 - floor) * shape)


def gradient_norm(policy: nn.Module, *, clip: float = math.inf) -> float:
    """Clip the gradient to the global norm `clip`; return its norm before. FloatingPointError if it is not finite."""
    norm = nn.utils.clip_grad_norm_(policy.parameters(), clip, foreach=True)
    norm = whole(norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm}")
    return norm


def optimizer_step(policy: nn.Module, optimizer, *, lr: float, max_grad_norm: float) -> float:
    """Clip the global gradient norm, set lr, take a step, zero the gradients; return the norm before clipping.
    FloatingPointError if it is not finite: the weights are then untouched."""
    norm = gradient_norm(policy, clip=max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_finite(log: dict[str, float], policy: Policy, world: World) -> None:
    """Raise FloatingPointError on every rank if a number of the log is not finite, or a log-prob was NaN or above 0."""
    bad = sum_over_ranks(torch.tensor(float(policy.bad_logps), device=world.device), world).item()
    policy.bad_logps = 0
    if bad:
        raise FloatingPointError(f"{bad:.0f} log-probs are NaN or above 0")
    for name, value in log.items():
        if value is not None and not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}")
