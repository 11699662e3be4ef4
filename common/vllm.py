"""vLLM as a process at the end of a pipe: one engine beside each rank, on the rank's GPU or on the CPU.

    sampler = VLLMSampler(policy, world, stop_ids=[eos], max_tokens=9216)       the interface is common/rollout.py's

A worker (common/vllm_worker.py) ends with its trainer, and nobody else can reach it. Weights go through memory that
both processes share: a buffer on the GPU (CUDA IPC), or shared memory on a CPU. docs/rollout.md has the picture.
"""

import contextlib
import copy
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch.multiprocessing.reductions import reduce_tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from common.data import InputError, pack
from common.rollout import Completion, Sampler, Sampling, cache_size
from common.trainer import Policy, World, count_weights, full_parameters, gather_lists, reshard

VLLM = "0.32.0"  # the version whose calls are used here
LEFT_OUT = {"laguna": "the bias of its routers", "gemma3n_text": "its embeddings per layer"}  # by vLLM, without a word
MAX_RESTARTS = 3  # of one generate or sync
SEQUENCES = 256  # decoded at once on a CPU
BUCKET = 512 << 20  # bytes of weights that are sent at once; a larger tensor is sent alone


def vllm_python() -> str:
    """The interpreter that runs vLLM: $ROLLOUT_PYTHON, or on a CPU that of .venv-vllm (`make vllm`), or this one."""
    made = Path(__file__).resolve().parent.parent / ".venv-vllm" / "bin" / "python"
    this = torch.cuda.is_available() or not made.exists()
    return os.environ.get("ROLLOUT_PYTHON") or (sys.executable if this else str(made))


def vllm_version(*, cuda: bool) -> str | None:
    """Version of the vLLM for CUDA, or for a CPU, in that interpreter's environment; None where there is none."""
    code = "from importlib.metadata import distributions as d; print({x.name: x.version for x in d()})"
    try:
        found = subprocess.run([vllm_python(), "-c", code], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    builds = re.findall(r"'vllm(-cpu)?': '(.+?)'", found)
    return next((version for cpu, version in builds if cuda != (bool(cpu) or "cpu" in version)), None)


class WorkerFault(Exception):
    """The worker is gone or hangs; a restart may help."""


class Worker:
    """The process, its pipe and its log. patience: seconds of silence after which it counts as hung."""

    def __init__(self, config, settings: dict, environment: dict[str, str], patience: float):
        """config: the Transformers config of the model to serve. settings: arguments of vllm.LLM."""
        self.config, self.settings, self.environment, self.patience = config, settings, environment, patience
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it (again) and wait until it is ready. Raises RuntimeError with the cause if it does not start."""
        self.stop()
        self.folder = folder = tempfile.mkdtemp(prefix="vllm-")  # the worker's own: removed when the worker ends
        self.config.save_pretrained(f"{folder}/model")
        ours, theirs = socket.socketpair()
        for limit in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # also in the middle of a message
            ours.setsockopt(socket.SOL_SOCKET, limit, struct.pack("ll", math.ceil(self.patience), 0))
        self.pipe, self.log = Connection(ours.detach()), tempfile.TemporaryFile()  # noqa: SIM115
        script = str(Path(__file__).with_name("vllm_worker.py"))
        settings = json.dumps(self.settings | {"model": f"{folder}/model"})
        self.process = subprocess.Popen(
            [vllm_python(), script, str(os.getpid()), str(theirs.fileno()), folder, settings],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT, pass_fds=[theirs.fileno()],
            env=self.environment | {"TMPDIR": folder}, start_new_session=True,
        )  # fmt: skip
        theirs.close()
        try:
            self.receive(1200)
        except WorkerFault as fault:
            log = self.last_words()
            self.stop()
            raise RuntimeError(f"vLLM does not start: {fault}; --rollout embedded works without it.{log}") from fault

    def send(self, *message) -> None:
        """Send a request (the name of a function of common/vllm_worker.py, its arguments), or what "load" waits for."""
        try:
            self.pipe.send(message)
        except OSError as error:
            raise WorkerFault(f"the vLLM process takes no request ({error})") from error

    def receive(self, seconds: float | None = None):
        """Return the next message. Raises WorkerFault if none comes in `seconds`, or `patience`."""
        seconds = seconds or self.patience
        try:
            if self.pipe.poll(seconds):
                return self.pipe.recv()
        except (EOFError, OSError) as error:
            raise WorkerFault("the vLLM process is gone") from error
        raise WorkerFault(f"the vLLM process hangs: no sign of life in {seconds:.0f} s")

    def call(self, *message):
        """Send a request; return what the function returns."""
        self.send(*message)
        return self.receive()[1]  # of ("done", result)

    def last_words(self) -> str:
        """The first error in the log, and the log's last lines."""
        self.log.seek(0)
        text = self.log.read().decode(errors="replace")
        prefixes = r"^(\[rank0\]: ?|\(\w+ pid=\d+\) (ERROR \S+ \S+ \[\S+\] )?)"  # torch's and vLLM's
        text = re.sub(prefixes, "", text, flags=re.M)
        errors = re.findall(r"^((?:\w+\.)*\w*(?:Error|Exception): .+(?:\n  .+)?)", text, re.M)
        noise = re.compile(r"nanobind: | - |See https://nanobind|.*resource_tracker|\s*warnings\.warn|\s*$")
        lines = [line for line in text.splitlines() if not noise.match(line)][-20:]
        first = f" Its first error: {errors[0]}" if errors else ""
        return "".join([first, "\nThe end of its log:\n", *(f"  {line}\n" for line in lines)]) if lines else ""

    def stop(self) -> None:
        """End it, with everything that it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: of one that is dead
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.pipe.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.process = None


def free_share(policy: Policy, world: World) -> float:
    """The fraction of a GPU that vLLM may take: at most 0.7. Models and optimizers keep theirs; 3 GB stay free for
    contexts and buffers, and room for the bf16 weights that a sync's proof gathers (FSDP2 copies the root module's)."""
    free, total = torch.cuda.mem_get_info(world.device)
    weights, root, layer = count_weights(policy)
    room = min(0.7 * total, free - (4 * (root + layer) if world.size > 1 else 2 * weights) - 3e9)
    if room < 2 * weights:
        raise InputError(f"vLLM needs {2 * weights / 1e9:.1f} GB for the model's weights, and training leaves it "
                         f"{max(0.0, room) / 1e9:.1f} of this GPU's {total / 1e9:.1f} GB: use more GPUs or a smaller "
                         "model, or try --rollout_gpu_memory")  # fmt: skip
    return room / total


class VLLMSampler(Sampler):
    """Samples from a vLLM engine beside this rank. Every method is a collective (a rank without prompts passes []).

    A worker that dies or hangs is restarted with the weights, and the missing answers are drawn again, at most
    MAX_RESTARTS times per call. If it has never worked, the error is raised at once."""

    def __init__(
        self, policy: Policy, world: World, *, stop_ids: list[int], max_tokens: int, gpu_memory: float = 0.0, **settings
    ):
        """stop_ids: ids that end a completion. max_tokens: of a prompt with its completion. gpu_memory: fraction of the
        GPU for vLLM; 0: `free_share`. settings: more arguments of vllm.LLM."""
        self.world, self.policy, self.max_tokens = world, policy, max_tokens
        self.stop_ids = sorted(set(stop_ids))
        self.cuda = world.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.proven, self.restarts, self.syncs, self.label = False, 0, 0, ""  # label: of the last sync's weights
        self.memory = None  # shared with the worker on a CPU
        # the model as Transformers saves it: its checkpoint's names are those that vLLM loads
        config = copy.deepcopy(policy.lm.config)
        if part := LEFT_OUT.get(config.model_type):
            raise InputError(f"--rollout vllm: vLLM {VLLM} leaves out {part}, so it would not sample from the "
                             "model that is trained; use --rollout embedded")  # fmt: skip
        with torch.device("meta"):
            self.empty = AutoModelForCausalLM.from_config(config)
        names = dict(self.empty.named_parameters())
        self.renamed = revert_weight_conversion(self.empty, names).keys() != names.keys()
        config.architectures = [type(policy.lm).__name__]
        # an output matrix of its own: a tied one keeps its old values when weights are reloaded on a CPU
        config.tie_word_embeddings = False
        rope, length = getattr(config, "rope_parameters", None) or {}, "original_max_position_embeddings"
        if beta := rope.get("llama_4_scaling_beta"):  # Ministral 3's scale of queries: vLLM knows it by another name
            config.llama_4_scaling = {"beta": beta, length: rope[length]}
        if config.model_type in ("cohere2", "cohere2_moe") and config.sliding_window:
            config.sliding_window -= 1  # vLLM reads one key more than Transformers
        if self.cuda:
            torch.cuda.empty_cache()  # vLLM does not start where its share of the memory is not free
            special = {
                "dtype": "bfloat16", "hf_overrides": {"head_dtype": "float32"}, "enable_sleep_mode": True,
                "gpu_memory_utilization": gpu_memory or free_share(policy, world),
            }  # fmt: skip
        else:
            special = cpu_settings(config, max_tokens, world)
        settings = {
            "load_format": "dummy", "max_model_len": max_tokens, "skip_tokenizer_init": True,
            "generation_config": "vllm",  # nothing but what a request asks for
            "logprobs_mode": "processed_logprobs",  # those of softmax(logits / temperature)
        } | special | settings  # fmt: skip
        self.worker = Worker(config, settings, environment(world), 120.0 if self.cuda else 1200.0)
        self.worker.start()

    @torch.no_grad()
    def sync(self, policy: Policy, version: int) -> None:
        """Wake vLLM, give it the policy's weights, and empty its prefix cache. Then it draws a short completion.
        RuntimeError if vLLM reports the version of other weights, or other log-probs than the policy's."""
        self.version, self.policy = None, policy
        self.syncs += 1
        self.label = f"{self.syncs} (step {version})"
        for attempt in range(MAX_RESTARTS + 1):
            if not (self._fails(self._send_weights, attempt) or self._fails(self._prove, attempt)):
                break
        self.version, self.proven = version, True

    def sleep(self) -> None:
        """Give the GPU's memory to the trainer (sync resends the weights); until the next sync nothing can be drawn."""
        self.version = None
        if self.cuda:
            with contextlib.suppress(WorkerFault):  # sync finds it dead, and starts another
                self.worker.call("sleep")

    def close(self) -> None:
        """End vLLM."""
        self.worker.stop()
        if self.memory is not None:
            os.close(self.memory)
            self.memory = None

    def _fails(self, act, attempt: int) -> bool:
        """Run act; if a rank's worker fails, start that worker again and return True on all ranks (a collective)."""
        mine = []
        try:
            act()
        except WorkerFault as fault:
            mine = [f"{fault}.{self.worker.last_words()}"]
        faults = gather_lists(mine, self.world)
        if faults and (attempt == MAX_RESTARTS or not self.proven):
            self.close()
            raise RuntimeError(f"vLLM failed: {faults[0]}")
        self.restarts += bool(faults)
        if mine:
            print(f"rollout: {mine[0]}Restart {attempt + 1} of {MAX_RESTARTS}.", file=sys.stderr, flush=True)
            self.worker.start()
        return bool(faults)

    def _weights(self):
        """(name in a checkpoint, whole tensor) of every weight, one at a time; a collective. Parameters come in vLLM's
        dtype, buffers in their own: bf16 may round away by how much a router's bias differs between experts."""
        lm = self.policy.lm
        buffers = {name for name, _ in lm.named_buffers()}
        embeddings, head = self._tied()
        for name, value in full_parameters(self.policy):
            named = {name: value if name in buffers else value.to(self.dtype)}
            yield from (revert_weight_conversion(self.empty, named) if self.renamed else named).items()
            if name == embeddings:
                yield head, named[name]

    def _tied(self) -> tuple[str, str]:
        """Names of the embeddings and of the output matrix where they are one; else two empty ones."""
        lm = self.policy.lm
        names = {id(module): f"{name}.weight" for name, module in lm.named_modules()}
        ends = lm.get_input_embeddings(), lm.get_output_embeddings()
        return tuple(names[id(x)] for x in ends) if ends[0].weight is ends[1].weight else ("", "")

    def _send_weights(self) -> None:
        """Wake the weights' memory, fill it through a shared buffer, free the buffer, wake the KV cache."""
        needed = [p.numel() * self.dtype.itemsize for p in self.empty.parameters()]
        size = max(*needed, min(sum(needed), BUCKET))
        weights = self._weights()
        try:
            buffer, address = self._buffer(size)
            self.worker.send("load", address, self._tied()[1])
            for content in fill(buffer, weights):
                if self.cuda:
                    torch.cuda.synchronize()
                self.worker.send(*content)
                self.worker.receive()  # it has a copy
            self.worker.send()  # an empty message: no more weights
            self.worker.receive()
        finally:
            for _ in weights:  # after a fault this rank still joins the collectives that gather the weights
                pass
            buffer = address = None
            self._free()
        loaded = self.worker.call("wake", self.label)
        if loaded != self.label:
            raise WorkerFault(f"vLLM has the weights of sync {loaded}, not {self.label}")

    def _buffer(self, size: int):
        """Return a buffer of bytes that the worker reads too, and what it needs to find it."""
        if self.cuda:
            torch.cuda.empty_cache()  # release to vLLM the memory that the trainer's allocator caches
            buffer = torch.empty(size, dtype=torch.uint8, device=self.world.device)
            address = list(reduce_tensor(buffer)[1])
            address[6] = 0  # the device index: the worker sees only this GPU
            return buffer, address
        if self.memory is None:
            self.memory = os.memfd_create("weights")
            os.ftruncate(self.memory, size)
        path = f"/proc/{os.getpid()}/fd/{self.memory}"
        return torch.from_file(path, shared=True, size=size, dtype=torch.uint8), (path, size)

    def _free(self) -> None:
        """Give what the trainer's allocator holds to vLLM."""
        if self.cuda:
            reshard(self.policy)
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    def _prove(self) -> None:
        """Compare vLLM's log-probs of a short completion with the policy's own, at a temperature that is not 1."""
        rng = np.random.default_rng(self.syncs)
        vocabulary = self.policy.lm.get_input_embeddings().weight.shape[0]
        length = max(1, min(8, self.max_tokens // 2))
        prompt = rng.integers(vocabulary, size=length).tolist()
        most = min(64, self.max_tokens - length)
        drawn: dict[int, Completion] = {}
        try:
            self._draw([(prompt, 0, most)], Sampling(most, temperature=0.5), drawn.__setitem__)
        finally:  # after a fault this rank still joins the forward, a collective
            ids = drawn[0].ids if drawn else [0]
            logp = self.policy(pack([(prompt, ids)], self.world.device), temperature=0.5).cpu()
            self._free()
        gap = (logp - torch.tensor(drawn[0].logps)).abs().mean().item()
        limit = 0.25 if self.cuda else 1e-3  # bf16: 0.02 on average
        if not gap < limit:
            raise RuntimeError("the weights did not arrive in vLLM, or it does not run the same model: its log-probs "
                               f"differ from the policy's by {gap:.4f} per token (sync {self.label}; limit {limit})")

    def _generate(self, prompts, groups, keys, seed, sampling, bar, drawn) -> None:
        limits = sampling.max_tokens
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            if len(prompt) + limit > self.max_tokens:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens: with max_tokens {limit} that is more than the "
                                 f"{self.max_tokens} that vLLM was started for")  # fmt: skip
        version = self.version
        streams = [int(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=7).hexdigest(), 16) for key in keys]
        for attempt in range(MAX_RESTARTS + 1):
            missing = [(i, j) for i, group in enumerate(groups) for j, answer in enumerate(group) if answer is None]

            def take(k: int, completion: Completion, missing=missing) -> None:
                i, j = missing[k]
                groups[i][j] = completion
                bar.update()
                if None not in groups[i]:
                    drawn(i, groups[i])

            requests = [(prompts[i], streams[i] + j, limits[i]) for i, j in missing]
            if not self._fails(functools.partial(self._draw, requests, sampling, take), attempt):
                break
            self.sync(self.policy, version)

    def _draw(self, requests: list[tuple[list[int], int, int]], sampling: Sampling, take) -> None:
        """Draw for each (prompt, seed, max_tokens); take(k, completion) when k ends."""
        if not requests:
            return
        params = {
            "temperature": sampling.temperature, "top_p": sampling.top_p, "logprobs": 0, "detokenize": False,
            "stop_token_ids": [*self.stop_ids, *sampling.stop_ids],
            "ignore_eos": True,  # the eos of the config: stop_ids has all ids that end a completion
        }  # fmt: skip
        self.worker.send("generate", requests, params)
        while isinstance(answers := self.worker.receive(), list):
            for k, ids, logps, finish, versions in answers:
                if set(versions) != {self.label}:
                    raise RuntimeError(f"vLLM drew with the weights of sync {', '.join(versions)}, not {self.label}")
                if finish not in ("stop", "length"):
                    raise WorkerFault(f"a completion ended with {finish!r}")
                take(k, Completion(ids, logps, finish))


def environment(world: World) -> dict[str, str]:
    """Return the worker's environment: ours without torchrun's variables, with this rank's GPU or number of cores."""
    launchers = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    ours = {k: v for k, v in os.environ.items() if k not in launchers and "TORCHELASTIC" not in k} | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the worker itself
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it ignores seeds
    }  # fmt: skip
    # outside of the worker's TMPDIR, which is removed with the worker: the next one finds the compiled code
    ours.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor-vllm-{os.getuid()}")
    if world.device.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        index = world.device.index
        return ours | {"CUDA_VISIBLE_DEVICES": visible[index] if visible != [""] else str(index)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ours | {
        "OMP_NUM_THREADS": str(max(1, cores // world.local_size)),  # while vLLM works its rank waits
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound beside a busy process it would starve
        "TORCH_COMPILE_DISABLE": "1",  # a minute of compiling for what takes microseconds
    }


def cpu_settings(config, max_tokens: int, world: World) -> dict:
    """vLLM's settings on a CPU, whose KV cache must be given in bytes."""
    row = cache_size(config) * 4 * (math.ceil(max_tokens / 128) * 128)  # bytes
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local_size
    return {
        "dtype": "float32", "enforce_eager": True, "max_num_seqs": SEQUENCES,
        "kv_cache_memory_bytes": max(min(SEQUENCES * row, memory // 4), 64 << 20),
        # a prompt that is read in parts kills the engine if it has a seed ("CPU Generator does not use offset")
        "enable_chunked_prefill": False, "max_num_batched_tokens": max(max_tokens, 8192),
    }  # fmt: skip


def fill(buffer: torch.Tensor, weights):
    """Copy (name, tensor) pairs into a buffer of bytes, one after the other. Yield names, shapes, sizes in bytes and
    dtypes of its content whenever the next tensor does not fit, and at the end. No tensor may be larger than it."""
    names, shapes, sizes, dtypes = [], [], [], []
    for name, value in weights:
        flat = value.contiguous().view(-1).view(torch.uint8)
        if sum(sizes) + len(flat) > len(buffer):
            yield names, shapes, sizes, dtypes
            names, shapes, sizes, dtypes = [], [], [], []
        buffer[sum(sizes) : sum(sizes) + len(flat)].copy_(flat)
        names.append(name)
        shapes.append(list(value.shape))
        sizes.append(len(flat))
        dtypes.append(str(value.dtype).removeprefix("torch."))
    yield names, shapes, sizes, dtypes
