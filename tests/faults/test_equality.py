"""The gradient of every loss is the same on 1, 2 and 4 ranks and for any micro-batches, packed or one by one."""

import pytest
import torch

from tests.conftest import run_script
from tests.faults.equality import TABLE, TOKENS, update


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gradients")
    for n in (2, 4):
        run_script("tests/faults/equality.py", path, ranks=n)
    return path


@pytest.mark.parametrize("loss", list(TABLE))
def test_the_gradient_does_not_depend_on_ranks_or_micro_batches(loss, folder, world):
    expected, measured = update(world, loss, 10_000)
    size = expected.abs().max()
    assert size > 0 and expected.isfinite().all()
    for n, tokens in [(ranks, tokens) for ranks in TOKENS for tokens in TOKENS[ranks]]:
        path = folder / f"{loss}-{n}-{tokens}.pt"
        gradient, numbers = torch.load(path) if n > 1 else update(world, loss, tokens)
        residual = (gradient - expected) / size
        where = f"{n} ranks, {tokens} tokens a micro-batch"
        assert residual.abs().max() < 2e-6, where
        # rounding scatters around zero; a wrong denominator or a lost row would lean to one side
        slope = (gradient @ expected) / (expected @ expected)
        assert abs(slope - 1) < 2e-7, where
        torch.testing.assert_close(numbers, measured, rtol=1e-4, atol=1e-5)
        assert residual.mean().abs() <= 5 * residual.std() / len(residual) ** 0.5 + 1e-12, where
