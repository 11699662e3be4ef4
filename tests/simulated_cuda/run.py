"""Runs the paths for CUDA on a machine without it.

`cuda` is torch's own and cannot be made by anyone else, so the scripts are copied with `sim` in its place: a device
that has the CPU's memory and arithmetic and CUDA's strictness (device.cpp, device.py). FSDP2 shards over it in bf16,
the Triton kernels run on it (interpreted), checkpoints are written in the background. Not simulated: time, and all
that happens inside of a GPU.

    python -m tests.simulated_cuda.run --ranks 2 luffy.py --preset tiny --steps 2 --out /tmp/run
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SIM = {  # in the order in which they are replaced
    r"torch\.backends\.cuda\.enable_cudnn_sdp": "bool",
    r"cpu:gloo,cuda:nccl": "simulated",
    r"self_cuda_time_total": "self_cpu_time_total",
    r"\bcuda(?=\"|\.[a-z])": "sim",
    r"\.is_cuda\b": ".is_sim",
}


def make(folder: Path) -> dict[str, str]:
    """Compile the device and copy the scripts into `folder`. -> the environment that they need.

    Raises RuntimeError where it does not compile, FileNotFoundError without g++."""
    installed = Path(torch.__file__).parent
    include = [f"-I{installed}/include", f"-I{installed}/include/torch/csrc/api/include"]
    libraries = [f"-L{installed}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{installed}/lib"]
    source, library = Path(__file__).with_name("device.cpp"), folder / "device.so"
    flags = ["-std=c++20", "-fPIC", "-shared", *include, *libraries]
    done = subprocess.run(["g++", str(source), "-o", str(library), *flags], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source} does not compile with torch {torch.__version__}:\n{done.stderr[-3000:]}")

    copies = [*ROOT.glob("*.py"), *(p for name in ("common", "igsm", "tests") for p in (ROOT / name).rglob("*.py"))]
    for path in copies:
        text = path.read_text()
        if path.parent != Path(__file__).parent:
            for pattern, word in SIM.items():
                text = re.sub(pattern, word, text)
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
    for name in ("common", "tests"):
        (folder / name / "__init__.py").write_text("from tests.simulated_cuda import device  # noqa: F401\n")
    shutil.copytree(ROOT / "models", folder / "models")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return {**os.environ, "SIM_DEVICE": str(library), "PYTHONPATH": str(folder), "TRITON_INTERPRET": "1",
            "TORCH_FR_BUFFER_SIZE": "0"}  # torch 2.15 would record what a group without a C++ name does


def command(words: list[str], ranks: int = 1) -> list[str]:
    """Of a script with its flags."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, *words]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("words", nargs=argparse.REMAINDER, help="a script and its flags (--out: an absolute path)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = make(Path(folder))
        sys.exit(subprocess.call(command(args.words, args.ranks), cwd=folder, env=environment))


if __name__ == "__main__":
    main()
