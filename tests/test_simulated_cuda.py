"""The paths for CUDA on a simulated device (simulated_cuda/run.py): bf16 under FSDP2, the kernels, attention over rows
of any length, checkpoints in the background. Their numbers are the CPU's, to what bf16 rounds."""

import shutil
import sys

import pytest

from common.metrics import read_metrics
from tests.conftest import run_script
from tests.faults import harness
from tests.simulated_cuda.run import make
from tests.zygote import Zygote

if sys.platform != "linux" or not shutil.which("g++"):
    pytest.skip("needs Linux and g++", allow_module_level=True)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """A zygote of the scripts for the simulated device."""
    folder = tmp_path_factory.mktemp("simulated")
    started = Zygote(folder, **make(folder))
    yield started
    started.close()


@pytest.mark.parametrize(("name", "ranks"), [("luffy", 2), ("oreo", 1)])
def test_a_run_is_that_of_the_cpu(simulated, name, ranks, tmp_path):
    short = ["--steps", "2", "--eval_every", "0", "--gradient_checkpointing", "none"]  # the device has little memory
    words = [*harness.words_of(name, tmp_path / "there"), *short]
    run_script(*words, ranks=ranks, by=simulated)
    run_script(*harness.words_of(name, tmp_path / "here"), *short)
    there, here = (read_metrics(tmp_path / folder) for folder in ("there", "here"))
    assert [row["step"] for row in there] == [row["step"] for row in here] == [1, 2]
    # bf16: processors with AVX-512 round otherwise than those without. The second step comes after an update, and some
    # answers are others then
    for row, expected, relative, absolute in zip(there, here, (0.03, 0.15), (0.002, 0.01)):
        for key in expected:
            if key.startswith(("policy/", "teacher/", "value/", "log_ratio/", "loss/", "optim/")):
                assert row[key] == pytest.approx(expected[key], rel=relative, abs=absolute), (row["step"], key)
    assert 0 < there[0]["memory/peak_gb"] < 0.1 < here[0]["memory/peak_gb"], "of the device, not of the process"


def test_the_tests_for_cuda_pass(simulated):
    words = ["-m", "pytest", "tests/test_logprobs.py", "tests/test_data.py", "-m", "cuda", "-p", "no:cacheprovider"]
    # extreme numbers, which the same kernels get on the CPU too
    same = "(errors or kept_exponentials) and (huge or equal or 1e4 or tail or top or tiny)"
    assert " passed" in run_script(*words, "-v", "-k", f"not ({same})", by=simulated).stdout
