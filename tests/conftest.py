"""Shared by the tests: a model of a few thousand parameters, files of rows, and ways to run scripts as a user does."""

import atexit
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client: tests never wait for a network
os.environ["OMP_NUM_THREADS"] = "1"  # models this small only wait for each other's threads

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NANO = dict(
    model_type="qwen2", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    eos_token_id=1, pad_token_id=0,
)
TABLES = {  # of a script's module: flags that choose defaults of others, and its tables of them
    "luffy": dict(method="METHODS", preset="PRESETS"), "relift": dict(method="METHODS", preset="PRESETS"),
    "redi": dict(stage="STAGES", loss="COMPARISONS", preset="PRESETS"),
    "oreo": dict(stage="STAGES", variant="VARIANTS", preset="PRESETS"), "behavior_injection": dict(preset="PRESETS"),
    "tools.redi_data": dict(preset="PRESETS"), "tools.influence": dict(preset="PRESETS"),
    "tools.agents": {}, "eval": {},
}  # fmt: skip


def pytest_configure(config):
    """Tests are run on the CPU, where results are exact, also on a machine with CUDA; `-m cuda` runs those for CUDA."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels then run on the CPU


@pytest.fixture(scope="session")
def world():
    from common.trainer import init_world

    return init_world()


@pytest.fixture
def policy(world):
    from common.trainer import load_policy

    return load_policy("nano", world, from_config=NANO, seed=3)


@pytest.fixture
def without_curves(monkeypatch):
    """For runs that train in less time than their curves take to draw."""
    monkeypatch.setattr("common.metrics.plot_curves", lambda *_: None)


@pytest.fixture(scope="session")
def nano(world, tmp_path_factory):
    """A model folder of a few thousand random weights, with the tokenizer of symbolic iGSM."""
    import igsm
    from common.rows import IGSM
    from common.trainer import export, load_policy

    folder = tmp_path_factory.mktemp("nano") / "model"
    tokenizer = igsm.tokenizer("symbolic", modulus=IGSM["modulus"])
    config = NANO | dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    export(load_policy("nano", world, from_config=config, seed=3), tokenizer, folder, world)
    return str(folder)


# ------------------------------------------------------------------------------------------------ numbers, files


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def assert_equal(actual, expected, tolerance=1e-9):
    """Tensors, or a tensor and a list of numbers; the tolerance is absolute."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double(), expected, rtol=0, atol=tolerance)


def vectors(name: str):
    """Numbers and cases of the published code: tests/vectors/NAME.json, or the rows of NAME.jsonl.gz."""
    path = ROOT / "tests" / "vectors" / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    with gzip.open(path.with_suffix(".jsonl.gz"), "rt") as file:
        return [json.loads(line) for line in file]


def write_rows(path: Path, rows) -> str:
    """A .jsonl file. -> its path"""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- processes, scripts


def parsed(name: str, *words, **changes):
    """The settings of a script that its command line has after these words, then changed."""
    from common.trainer import parse_args

    script = importlib.import_module(name)
    tables = {flag: getattr(script, table) for flag, table in TABLES[name].items()}
    return dataclasses.replace(parse_args(script.Args, [str(word) for word in words], **tables), **changes)


@contextlib.contextmanager
def locked(path: Path):
    """While another process holds this lock; it ends as by kill -9."""
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    words = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        try:
            yield
        finally:
            other.kill()


@functools.lru_cache(1)
def zygote():
    """The process that forks scripts."""
    from tests.zygote import Zygote

    started = Zygote()
    atexit.register(started.close)
    return started


def free_port() -> int:
    """A port of this machine that nobody listens on at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes() -> list[tuple[int, int, str]]:
    """(id, process group, command line) of all processes that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, group, *_ = (path / "stat").read_text().rsplit(")", 1)[1].split()
            if state != "Z":
                words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append((int(path.name), int(group), words))
    return found


def gone(group: int, seconds: float = 15.0) -> bool:
    """True if no process of the group runs any more, at the latest after so many seconds."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        if all(group != other for _, other, _ in processes()):
            return True
        time.sleep(0.05)
    return False


def start_ranks(words, ranks: int, folder, by=None, **env) -> list[int]:
    """Start a script as `python` or `torchrun` do, by a zygote. -> the ranks' process ids"""
    joint = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    joint |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    pids = []
    for rank in range(ranks):
        ours = joint | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        pids.append((by or zygote()).start(words, f"{folder}/out-{rank}", f"{folder}/err-{rank}", **ours, **env))
    return pids


def run_script(*words, ranks: int = 1, check: bool = True, timeout: float = 300, by=None, **env):
    """Run a script, as `python` or `torchrun` do, with `env` besides; -> CompletedProcess. by: a zygote, if it is not
    that of the repository. (tests/faults/test_ranks.py uses torchrun itself.)"""
    with tempfile.TemporaryDirectory() as folder:
        pids = start_ranks(words, ranks, folder, by, **env)
        deadline, codes = time.monotonic() + timeout, dict.fromkeys(pids)
        while None in codes.values():
            codes = {pid: (by or zygote()).poll(pid) for pid in pids}
            failed = any(codes.values())
            if failed:
                deadline = min(deadline, time.monotonic() + 10)  # as torchrun: one is gone, the others must go too
            if time.monotonic() > deadline:
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                assert failed, f"{words[0]} hangs"
            time.sleep(0.005)
        out, err = ("".join(Path(f"{folder}/{name}-{r}").read_text() for r in range(ranks)) for name in ("out", "err"))
    code = next((code for code in codes.values() if code), 0)
    if check:
        assert code == 0, out[-2000:] + err[-4000:]
    return subprocess.CompletedProcess(words, code, out, err)


def other_weights(folder):
    """Change the weights of a model folder, as a second run of SFT to the same path does."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file({name: 1.1 * x for name, x in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def weights_digest(policy) -> str:
    """SHA-256 over all weights: equal for bit-equal models."""
    from common.trainer import full_parameters

    digest = hashlib.sha256()
    for name, value in full_parameters(policy):
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
