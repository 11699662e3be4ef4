"""Every claim of common/logprobs.py, against full logits in float64.

The Triton kernels run under the interpreter (TRITON_INTERPRET=1, set in conftest.py) where there is no CUDA device, and
compiled where there is one.
"""

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from common import logprobs
from common.logprobs import linear_kl, linear_logprobs, logprobs_from_logits
from tests.conftest import ROOT, free_port

INTERPRETED = logprobs.triton is not None and logprobs.INTERPRETED
PLACES = {
    "torch": ("torch", "cpu", None),
    "triton-interpreted": ("triton", "cpu", None if INTERPRETED else "needs triton and TRITON_INTERPRET=1, set by "
                           "conftest.py where there is no CUDA device"),
    "triton-cuda": ("triton", "cuda", None if torch.cuda.is_available() else "needs a CUDA device"),
    "torch-cuda": ("torch", "cuda", None if torch.cuda.is_available() else "needs a CUDA device"),
}  # fmt: skip


def place_params(*names):
    for name in names or PLACES:
        backend, device, missing = PLACES[name]
        marks = [pytest.mark.skipif(missing is not None, reason=missing or "")]
        marks += [pytest.mark.cuda] if device == "cuda" else []
        yield pytest.param((backend, device), id=name, marks=marks)


everywhere = pytest.mark.parametrize("place", list(place_params()))
with_kernels = pytest.mark.parametrize("place", list(place_params("triton-interpreted", "triton-cuda")))


def from_logits(z, targets, temperature=1.0):
    """Full logits, as anyone would write it: the yardstick in float32, the truth in float64."""
    logp = (z / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def full(hidden, weight, targets, temperature=1.0, dtype=torch.float32):
    return from_logits((hidden @ weight.T).to(dtype), targets, temperature)


def full_kl(hidden, weight, ref_hidden, ref_weight, temperature=1.0, dtype=torch.float32):
    logp = ((hidden @ weight.T).to(dtype) / temperature).log_softmax(-1)
    ref_logp = ((ref_hidden @ ref_weight.T).to(dtype) / temperature).log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def problem(case, n=24, h=16, v=200, seed=0):
    """hidden [n, h], weight [v, h], targets [n]"""
    random = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, h, generator=random), torch.randn(v, h, generator=random) / h**0.5
    targets = torch.randint(0, v, (n,), generator=random)
    match case:
        case "one huge logit":
            weight[v // 2] *= 50
        case "all equal":
            weight = weight[:1].repeat(v, 1)
        case "logits of 1e4":
            signs = torch.randn(v, 1, generator=random).sign()
            hidden, weight = 100 + hidden, signs * 100 / h + weight / 100
        case "target in the tail":
            hidden, weight, targets = 10 * hidden, 10 * weight, (hidden @ weight.T).argmin(1)
        case "target on top":
            hidden, weight, targets = 10 * hidden, 10 * weight, (hidden @ weight.T).argmax(1)
        case "tiny logits":
            hidden, weight = hidden / 1e3, weight / 1e3
    return hidden, weight, targets


CASES = ["random", "one huge logit", "all equal", "logits of 1e4", "target in the tail", "target on top", "tiny logits"]


def compare(pooled, keys, ours, yardstick, truth):
    """Adds three results' errors against truth to those pooled by key."""
    for key, a, b, c in zip(keys, ours, yardstick, truth):
        row = [(a.double() - c).abs().flatten(), (b.double() - c).abs().flatten(), c.abs().flatten()]
        pooled[key] = [torch.cat(pair) for pair in zip(pooled.get(key, row), row)]


def check(pooled, factor, *norms):
    """The mean error, and the largest where it is not a matter of luck: matrix products round differently by shape."""
    for key, errors in pooled.items():
        for norm in ("mean", *norms) if not key.startswith("grad") else ("mean",):
            mine, yardstick, size = (getattr(e, norm)().item() for e in errors)
            allowed = factor * yardstick + 2**-24 * size  # the result's own rounding is no error
            assert mine <= allowed, f"{norm} error of {key}: {mine:.3g} > {allowed:.3g}, yardstick {yardstick:.3g}"


def leaves(*tensors, dtype=None, device=None):
    return [t.detach().to(device=device, dtype=dtype).clone().requires_grad_() for t in tensors]


VALUES = ("logp", "entropy", "grad_hidden", "grad_weight")
MANY = dict(chunk_size=7, tile_size=64)


def values(function, hidden, weight, targets, **options):
    """logp, entropy and the gradients of a random sum of both."""
    h, w = leaves(hidden, weight)
    out = function(h, w, targets, **options)
    upstream = torch.randn(2, len(h), generator=torch.Generator().manual_seed(0)).to(h.device)
    return *(x.detach() for x in out), *torch.autograd.grad((torch.stack(out) * upstream).sum(), (h, w))


@everywhere
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("case", CASES)
def test_errors_in_float32_are_at_most_1_1_times_those_of_full_logits(place, case, temperature):
    backend, device = place
    one, many = {}, {}
    for seed in range(8 if backend == "torch" else 1):
        hidden, weight, targets = (x.to(device) for x in problem(case, seed=seed, n=24 if backend == "torch" else 8))
        yardstick = values(full, hidden, weight, targets, temperature=temperature)
        truth = values(full, hidden.double(), weight.double(), targets, temperature=temperature, dtype=torch.float64)
        for pooled, tiles in ((one, {}), (many, MANY)):
            if backend == "torch" or pooled is one:
                options = dict(temperature=temperature, entropy=True, backend=backend, **tiles)
                ours = values(linear_logprobs, hidden, weight, targets, **options)
                assert all(x.dtype == torch.float32 for x in ours)
                compare(pooled, VALUES, ours, yardstick, truth)
    factor = 1.1 if device == "cpu" else 1.25  # CUDA has another kernel for each shape, which sums in another order
    check(one, factor, "max")
    check(many, factor)


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_errors_in_half_precision_are_at_most_those_of_full_logits_in_that_precision(place, case, dtype):
    backend, device = place
    pooled = {}
    for seed in range(8 if backend == "torch" else 1):
        hidden, weight, targets = (x.to(device) for x in problem(case, seed=seed, n=24 if backend == "torch" else 8))
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        ours = values(linear_logprobs, hidden, weight, targets, entropy=True, backend=backend, **MANY)
        assert [x.dtype for x in ours] == [torch.float32, torch.float32, dtype, dtype]
        yardstick = values(full, hidden, weight, targets)
        truth = values(full, hidden.double(), weight.double(), targets, dtype=torch.float64)
        compare(pooled, VALUES, ours, yardstick, truth)
    if case == "logits of 1e4":  # full logits of these are off by 40 in bf16 and beyond float16
        pooled = {key: errors for key, errors in pooled.items() if errors[1].isfinite().all()}
    # on CUDA both round the logits' gradient alike; what is left is the order in which products are summed
    check(pooled, 1.0 if device == "cpu" else 1.01, "max")


@everywhere
@pytest.mark.parametrize("case", CASES)
def test_errors_of_kl_are_at_most_1_1_times_those_of_full_logits(place, case):
    backend, device = place
    pooled = {}
    for seed in range(8 if backend == "torch" else 1):
        hidden, weight, _ = problem(case, seed=seed, n=24 if backend == "torch" else 8)
        noise = torch.Generator().manual_seed(seed)
        near = [x + s * torch.randn(x.shape, generator=noise) for x, s in ((hidden, 0.1), (weight, 0.01))]
        results = []
        for function, dtype in ((linear_kl, torch.float32), (full_kl, torch.float32), (full_kl, torch.float64)):
            h, w = leaves(hidden, weight, dtype=dtype, device=device)
            ref_h, ref_w = (x.to(device, dtype) for x in near)
            options = dict(backend=backend) if function is linear_kl else dict(dtype=dtype)
            kl = function(h, w, ref_h, ref_w, temperature=0.7, **options)
            results.append((kl.detach(), *torch.autograd.grad(kl.sum(), (h, w))))
        compare(pooled, ("kl", "grad_hidden", "grad_weight"), *results)
    check(pooled, 1.1, "max")


@pytest.mark.parametrize("tiles", [{}, dict(chunk_size=2, tile_size=3)], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck_in_float64(tiles, temperature):
    torch.manual_seed(0)
    h, w, ref_h, ref_w = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), (7, 3), (5, 4), (7, 4))
    )
    targets = torch.tensor([0, 6, 3, 3, 2])
    options = dict(temperature=temperature, **tiles)
    both = dict(entropy=True, **options)
    check = torch.autograd.gradcheck
    check(lambda h, w: linear_logprobs(h, w, targets, **both), (h, w))
    check(lambda h, w: linear_logprobs(h, w, targets, **both)[1], (h, w))
    check(lambda h, w: linear_logprobs(h, w, targets, **options), (h, w))
    check(lambda h, w: linear_kl(h, w, ref_h.detach(), ref_w.detach(), **options), (h, w))
    both.pop("tile_size", None)
    check(lambda z: logprobs_from_logits(z, targets, **both), (torch.randn(5, 7).double().requires_grad_(),))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 9), h=st.integers(1, 9), v=st.sampled_from([1, 2, 37, 64, 1000]), seed=st.integers(0, 99),
    chunk_size=st.none() | st.integers(1, 11), tile_size=st.none() | st.integers(20, 1100),
    temperature=st.sampled_from([1.0, 0.5, 3.0]), entropy=st.booleans(),
    strided=st.booleans(),
)  # fmt: skip
def test_any_shape_and_any_tiling_give_the_same(
    n, h, v, seed, chunk_size, tile_size, temperature, entropy, strided
):
    check_shape("torch", "cpu", torch.float64, n, h, v, seed, chunk_size, tile_size, temperature, entropy, strided)


def check_shape(backend, device, dtype, n, h, v, seed, chunk_size, tile_size, temperature, entropy, strided):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(h, n).T, torch.randn(h, v).T  # rows lie apart
    if not strided:
        hidden, weight = hidden.contiguous(), weight.contiguous()
    ref = torch.randn(n, h + 1).to(device, dtype), torch.randn(v, h + 1).to(device, dtype)
    targets, upstream = torch.randint(0, v, (n,)).to(device), torch.randn(3, n, dtype=torch.float64).to(device)
    options = dict(temperature=temperature, chunk_size=chunk_size, backend=backend)
    results = []
    for ours, to in ((True, dtype), (False, torch.float64)):
        a, b, z = leaves(hidden, weight, hidden @ weight.T, dtype=to, device=device)
        if ours:
            first = linear_logprobs(a, b, targets, entropy=entropy, tile_size=tile_size, **options)
            second = logprobs_from_logits(z, targets, entropy=entropy, **options)
            first, second = (first, second) if entropy else ((first,), (second,))
            third = linear_kl(a, b, *ref, tile_size=tile_size, **options)
        else:
            first, second = full(a, b, targets, temperature, to), from_logits(z, targets, temperature)
            first, second = first[: 1 + entropy], second[: 1 + entropy]
            third = full_kl(a, b, *(x.double() for x in ref), temperature, to)
        loss = sum((x * u).sum() for x, u in zip((*first, *second, third), (*upstream[:2], *upstream)))
        results.append([*first, *second, third, *torch.autograd.grad(loss, (a, b, z))])
    tolerance = dict(atol=1e-10, rtol=1e-10) if dtype == torch.float64 else dict(atol=2e-4, rtol=2e-4)
    for mine, truth in zip(*results):
        torch.testing.assert_close(mine.double(), truth.double(), **tolerance)


@with_kernels
@pytest.mark.parametrize("n, v, chunk_size, tile_size", [
    (0, 10, None, None), (1, 1, None, None), (5, 37, 2, 20), (3, 1000, None, 300), (2, 5000, None, None),
])  # fmt: skip
@pytest.mark.parametrize("temperature, strided", [(1.0, False), (0.5, True)])
def test_kernels_at_any_shape_and_tiling_give_the_same(place, n, v, chunk_size, tile_size, temperature, strided):
    for entropy in (False, True):
        check_shape(*place, torch.float32, n, 6, v, 0, chunk_size, tile_size, temperature, entropy, strided)


@everywhere
def test_values_over_a_vocabulary_of_151936_are_those_of_full_logits(place):
    backend, device = place
    n = 3 if backend == "torch" else 2
    hidden, weight, targets = (x.to(device) for x in problem("random", n=n, h=8, v=151936))
    for tile_size in (None, 50_000):
        ours = linear_logprobs(hidden, weight, targets, entropy=True, backend=backend, tile_size=tile_size)
        for mine, truth in zip(ours, full(hidden.double(), weight.double(), targets, dtype=torch.float64)):
            torch.testing.assert_close(mine.double(), truth, atol=1e-6, rtol=1e-6)


@everywhere
def test_a_very_confident_token_keeps_the_relative_accuracy_of_logp_entropy_and_gradient(place):
    backend, device = place
    gaps = torch.tensor([20.0, 30.0, 60.0], device=device)  # 1 - p from 2e-9 to 9e-27; float32 sees 1 - 6e-8 at best
    hidden, weight = gaps[:, None].clone().requires_grad_(), torch.tensor([[0.0], [1.0]], device=device)
    targets = torch.ones(3, dtype=torch.int64, device=device)
    for tiles in (dict(tile_size=1), {}):
        logp, entropy = linear_logprobs(hidden, weight, targets, entropy=True, backend=backend, **tiles)
        rest = (-gaps.double()).exp()  # log p = -log1p(rest), 1 - p = rest / (1 + rest)
        # a GPU's exp(x) is exp2 of a rounded product: it is off by some 1e-7 times x
        near = dict(rtol=1e-6 if device == "cpu" else 1e-5, atol=0.0)
        torch.testing.assert_close(logp.double(), -rest.log1p(), **near)
        torch.testing.assert_close(entropy.double(), rest * gaps.double() + rest, **near)
        (grad,) = torch.autograd.grad(logp.sum(), hidden, retain_graph=True)
        torch.testing.assert_close(grad[:, 0].double(), rest, **near)
        (grad,) = torch.autograd.grad(entropy.sum(), hidden)
        torch.testing.assert_close(grad[:, 0].double(), -rest * gaps.double(), **near)


@everywhere
def test_logits_of_minus_infinity_are_words_that_cannot_be(place):
    backend, device = place
    hidden, weight, targets = (x.to(device) for x in problem("random", n=4, v=12))
    (z,) = leaves(hidden @ weight.T)
    with torch.no_grad():
        z[:, 3:9] = -torch.inf
    targets, inside = targets % 3, [0, 1, 2, 9, 10, 11]
    logp, entropy = logprobs_from_logits(z, targets, entropy=True, backend=backend)
    expected = full(hidden, weight[inside], targets)
    torch.testing.assert_close(torch.stack((logp, entropy)), torch.stack(expected))
    (gradient,) = torch.autograd.grad((logp + entropy).sum(), z)
    assert gradient.isfinite().all() and (gradient[:, 3:9] == 0).all()


@pytest.fixture
def nan_in_new_memory():
    """Memory that nobody has written to is NaN, not zero as it happens to be in a young process."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@everywhere
def test_no_tokens_give_no_values_and_zero_gradients(place, nan_in_new_memory):
    backend, device = place
    h, w = leaves(torch.zeros(0, 4), torch.randn(9, 4), device=device)
    targets = torch.zeros(0, dtype=torch.int64, device=device)
    logp, entropy = linear_logprobs(h, w, targets, entropy=True, backend=backend)
    kl = linear_kl(h, w, h.detach(), w.detach(), backend=backend)
    assert logp.shape == entropy.shape == kl.shape == (0,)
    gradients = torch.autograd.grad(logp.sum() + entropy.sum() + kl.sum(), (h, w))
    assert [g.shape for g in gradients] == [(0, 4), (9, 4)]
    assert all((g == 0).all() for g in gradients)


class Operations(TorchDispatchMode):
    """Counts matrix products, and the elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        if isinstance(result, torch.Tensor) and result._base is None:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("frozen", ["nothing", "hidden", "weight", "both"])
def test_what_is_frozen_costs_nothing_and_no_tensor_is_larger_than_a_tile_or_a_gradient(frozen):
    hidden, weight, targets = problem("random", n=40, h=4, v=600)
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    tiles = 4 * 6
    for function in (
        lambda **tiles: linear_logprobs(hidden, weight, targets, entropy=True, **tiles)[1],
        lambda **tiles: linear_kl(hidden, weight, hidden.detach() + 1, weight.detach(), **tiles),
    ):
        heads = 1 + (function.__code__.co_names[0] == "linear_kl")
        with Operations() as seen:
            value = function(chunk_size=10, tile_size=100)
            assert seen.products == tiles * heads
            if frozen != "both":
                seen.products = 0
                value.sum().backward()
                assert seen.products == tiles * (heads + hidden.requires_grad + weight.requires_grad)
        assert (hidden.grad is None) == (not hidden.requires_grad)
        assert (weight.grad is None) == (not weight.requires_grad)
        assert seen.largest <= max(weight.numel(), 10 * 100) < hidden.shape[0] * weight.shape[0]


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [case for case in CASES if case != "logits of 1e4"])  # float32 logits are off there
def test_kept_exponentials_change_the_gradient_as_rounding_it_to_bf16_does(place, case, dtype):
    backend, device = place
    hidden, weight, targets = (x.to(device) for x in problem(case, n=8))
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    upstream = torch.randn(2, len(hidden), generator=torch.Generator().manual_seed(0)).to(device)
    z = (hidden.double() @ weight.double().T).requires_grad_()
    truth = from_logits(z, targets, 0.7)
    (g,) = torch.autograd.grad((torch.stack(truth) * upstream).sum(), z)  # the logits' gradient, float64
    expected, rounded = ((x @ weight.double(), x.T @ hidden.double()) for x in (g, g.bfloat16().double()))
    for tiles in ({"tile_size": 200}, MANY):
        options = dict(entropy=True, backend=backend, temperature=0.7, **tiles)
        logps, entropy, *gradients = values(linear_logprobs, hidden, weight, targets, keep=True, **options)
        again = values(linear_logprobs, hidden, weight, targets, keep=False, **options)
        assert torch.equal(logps, again[0]) and torch.equal(entropy, again[1])
        for mine, a, b in zip(gradients, expected, rounded, strict=True):
            allowed = 1.5 * (b - a).norm() + (2**-9 if dtype == torch.bfloat16 else 2**-22) * a.norm()
            assert (mine.double() - a).norm() <= allowed


def test_kept_exponentials_save_one_product_in_four():
    hidden, weight, targets = problem("random", n=40, h=4, v=600)
    for keep, products in ((False, 4), (True, 3)):
        h, w = leaves(hidden, weight)
        with Operations() as seen:
            linear_logprobs(h, w, targets, keep=keep, chunk_size=10, tile_size=100).sum().backward()
        assert seen.products == products * 4 * 6


@pytest.mark.parametrize("keep", [False, True])
def test_backward_may_run_twice(keep):
    hidden, weight, targets = problem("random")
    for tiles in ({}, dict(chunk_size=10, tile_size=70)):
        h, w = leaves(hidden, weight)
        logp = linear_logprobs(h, w, targets, keep=keep, **tiles)
        first = torch.autograd.grad(logp.sum(), (h, w), retain_graph=True)
        second = torch.autograd.grad(logp.sum(), (h, w))
        tolerance = 2e-3 if keep else 0  # the first wrote over what was kept: the second computes it again
        for a, b in zip(first, second):
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_any_precision_and_stride_give_the_same(place, dtype):
    backend, device = place
    torch.manual_seed(0)
    z = (3 * torch.randn(70, 6)).to(device, dtype).T  # columns are contiguous, rows are not
    targets = torch.randint(0, 70, (12,)).to(device)[::2]
    (leaf,), (truth,) = leaves(z), leaves(z, dtype=torch.float64)
    ours = logprobs_from_logits(leaf, targets, entropy=True, temperature=0.9, backend=backend, chunk_size=4)
    expected = from_logits(truth, targets, 0.9)
    torch.testing.assert_close(torch.stack(ours).double(), torch.stack(expected), atol=2e-6, rtol=2e-6)
    (ours[0] + ours[1]).sum().backward()
    (expected[0] + expected[1]).sum().backward()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(leaf.grad.double(), truth.grad, atol=tolerance, rtol=tolerance)


def test_kl_of_a_policy_with_itself_is_zero_and_its_reference_gets_no_gradient():
    hidden, weight, _ = problem("target on top")
    h, w, ref_h, ref_w = leaves(hidden, weight, hidden, weight)
    kl = linear_kl(h, w, ref_h, ref_w, tile_size=30)
    assert kl.abs().max() == 0
    kl.sum().backward()
    assert ref_h.grad is None and ref_w.grad is None
    assert h.grad.abs().max() < 1e-6 and w.grad.abs().max() < 1e-6


def test_large_products_on_a_cpu_round_no_worse_than_torch_mm():
    torch.manual_seed(0)
    for a, b in ((torch.randn(500, 800), torch.randn(800, 700)), (torch.randn(800, 500).T, torch.randn(700, 800).T)):
        out, truth = torch.ones(500, 700), a.double() @ b.double()
        logprobs._mm(a, b, out)
        yardstick = (a @ b - truth).pow(2).mean()
        assert (out - truth).pow(2).mean() <= 1.05**2 * yardstick
        logprobs._mm(a, b, out, accumulate=True)
        assert (out / 2 - truth).pow(2).mean() <= 1.1**2 * yardstick


def test_one_clear_message_for_what_cannot_be():
    hidden, weight, targets = problem("random")
    with pytest.raises(IndexError, match="targets from .* to 200 in a vocabulary of 200"):
        linear_logprobs(hidden, weight, targets.index_fill(0, torch.tensor([3]), 200))
    with pytest.raises(IndexError, match="targets from -100"):
        logprobs_from_logits(hidden @ weight.T, targets.index_fill(0, torch.tensor([3]), -100))
    with pytest.raises(ValueError, match="24 tokens and targets of shape"):
        linear_logprobs(hidden, weight, targets[:3])
    with pytest.raises(ValueError, match="temperature"):
        linear_logprobs(hidden, weight, targets, temperature=0.0)
    with pytest.raises(ValueError, match="H"):
        linear_logprobs(hidden[:, 1:], weight, targets)
    with pytest.raises(ValueError, match=r"logits, \[N, V\]"):
        logprobs_from_logits((hidden @ weight.T)[None], targets[None])
    with pytest.raises(ValueError, match="backend"):
        linear_logprobs(hidden, weight, targets, backend="cuda")
    with pytest.raises(ValueError, match="float32"):
        linear_logprobs(hidden.double(), weight.double(), targets, backend="triton")
    with pytest.raises(ValueError, match="policy and reference"):
        linear_kl(hidden, weight, hidden[:3], weight)


@with_kernels
def test_an_update_of_luffy_is_the_same_with_the_kernels(place, world, monkeypatch):
    from common import trainer
    from tests.ranks import gradient

    if world.device.type != place[1]:
        pytest.skip("the world of these tests is on another device")
    results = []
    for backend in ("torch", place[0]):
        monkeypatch.setattr(trainer, "linear_logprobs", functools.partial(linear_logprobs, backend=backend, keep=False))
        results.append(gradient(world, "luffy", 64))
    (gradients, metrics), (gradients_of_kernels, metrics_of_kernels) = results
    assert metrics_of_kernels == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    for name, value in gradients.items():
        torch.testing.assert_close(gradients_of_kernels[name], value, atol=1e-6, rtol=1e-4)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from common import logprobs

types = dict(v="i32", divisor="fp32", outer="fp32", targets_ptr="*i64", state_ptr="*fp64", g_ptr="*bf16", e_ptr="*bf16")
for kernel in (logprobs._absorb_kernel, logprobs._gradient_kernel):
    for flag in (False, True):
        constants = {name: flag for name in kernel.arg_names if name.isupper()} | {"BLOCK": 4096}
        signature = {
            name: "constexpr" if name in constants else types.get(name, "i32" if "stride" in name else "*fp32")
            for name in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs={})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert compiled.asm["cubin"]
"""


@pytest.mark.skipif(logprobs.triton is None, reason="needs triton")
def test_the_kernels_compile_for_an_h200_where_there_is_none(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


class Tower(torch.nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embedding = torch.nn.Embedding(61, 16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))
        self.head = torch.nn.Linear(16, 61, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids, targets, function):
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return function(x, self.head.weight, targets)


def shard_and_compare(rank, port):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    ids, targets = 3 * torch.arange(13) % 61, 7 * torch.arange(13) % 61
    for tied in (False, True):
        gradients = []
        for sharded in (False, True):
            torch.manual_seed(0)
            model = Tower(tied)
            if sharded:
                for module in (*model.layers, model):
                    fully_shard(module)
                with pytest.raises(TypeError, match="DTensor"):
                    linear_logprobs(torch.zeros(13, 16), model.head.weight, targets)
            for tiles in ({}, dict(chunk_size=5, tile_size=16)) if sharded else (None, None):
                ours = lambda h, w, y, tiles=tiles: linear_logprobs(h, w, y, entropy=True, **tiles)  # noqa: E731
                logp, entropy = model(ids, targets, ours if sharded else full)
                (logp.sum() + entropy.sum()).backward()
            gradients.append([p.grad.full_tensor() if sharded else p.grad for p in model.parameters()])
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    dist.barrier()
    os._exit(0)  # tearing the interpreter down with gloo's threads alive aborts now and then


def test_a_head_sharded_by_fsdp2_tied_or_not():
    torch.multiprocessing.spawn(shard_and_compare, (free_port(),), nprocs=2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offsets_beyond_2_to_the_31_do_not_wrap():
    n, v = 15_000, 151_936
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB")
    logits = torch.zeros(n, v, dtype=torch.bfloat16, device="cuda")
    logits[-1, -1] = 5.0
    targets = torch.full((n,), v - 1, device="cuda")
    logits.requires_grad_()
    logp = logprobs_from_logits(logits, targets)
    logp[-1].backward()
    last = torch.zeros(v, dtype=torch.float64)
    last[-1] = 5.0
    torch.testing.assert_close(logp[-1].item(), last.log_softmax(0)[-1].item(), rtol=1e-5, atol=1e-5)
    assert logits.grad[-1, -1].item() == pytest.approx(1 - last.softmax(0)[-1].item(), rel=1e-2)


# ------------------------------------------------------------------------------------------- soft caps and scales


def changed(z, cap, scale):
    """What Gemma (cap), Cohere and Granite (scale) make of their logits."""
    return cap * (scale * z / cap).tanh() if cap else scale * z


FORMS = {  # cap, scale, temperature
    "cap": (3.0, 1.0, 0.7), "scale": (0.0, 0.25, 0.7), "both": (2.0, 0.6, 1.0), "near the cap": (0.5, 4.0, 0.7),
}  # fmt: skip


@pytest.mark.parametrize("place", list(place_params("torch", "triton-interpreted", "triton-cuda")))
@pytest.mark.parametrize("name", FORMS)
def test_soft_caps_and_scales_change_logits_and_gradients_as_written_out(place, name):
    """Log-probs, entropy, KL and all gradients against float64 autograd of the formula, in tiles and as one."""
    (backend, device), (cap, scale, temperature) = place, FORMS[name]
    hidden, weight, targets = (x.to(device) for x in problem("random", n=8, v=150, seed=3))
    ref_hidden, ref_weight = (x.to(device) for x in problem("random", n=8, v=150, seed=4)[:2])
    form = dict(temperature=temperature, cap=cap, scale=scale)

    def truth(h, w, targets, **_):
        return from_logits(changed(h @ w.T, cap, scale), targets, temperature)

    def true_kl(h, w, targets):
        logp, ref = (
            (changed(x @ y.T, cap, scale) / temperature).log_softmax(-1)
            for x, y in ((h, w), (ref_hidden.double(), ref_weight.double()))
        )
        return ((logp.exp() * (logp - ref)).sum(-1),)

    def kl(h, w, targets, **tiles):
        return (linear_kl(h, w, ref_hidden, ref_weight, backend=backend, **form, **tiles),)

    def from_product(h, w, targets, **_):
        return logprobs_from_logits(h @ w.T, targets, entropy=True, backend=backend, **form)

    def ours(h, w, targets, **tiles):
        return linear_logprobs(h, w, targets, entropy=True, backend=backend, **form, **tiles)

    exact = values(truth, hidden.double(), weight.double(), targets)
    for function, tiles in ((ours, {}), (ours, MANY), (ours, dict(keep=True)), (from_product, {})):
        for mine, right in zip(values(function, hidden, weight, targets, **tiles), exact, strict=True):
            tolerance = 1e-2 if tiles.get("keep") and not cap else 1e-4  # E is kept in bf16
            torch.testing.assert_close(mine.double(), right, rtol=tolerance, atol=tolerance / 10)
    upstream = torch.randn(8, generator=torch.Generator().manual_seed(0)).to(device)
    for tiles in ({}, MANY):
        results = []
        for function, dtype, options in ((kl, torch.float32, tiles), (true_kl, torch.float64, {})):
            h, w = leaves(hidden, weight, dtype=dtype)
            [out] = function(h, w, targets, **options)
            results.append((out.detach(), *torch.autograd.grad((out * upstream).sum(), (h, w))))
        for mine, right in zip(*results, strict=True):
            torch.testing.assert_close(mine.double(), right, rtol=3e-5, atol=1e-5)


def test_a_soft_cap_in_float64_is_exact_and_bad_ones_are_refused():
    hidden, weight, targets = problem("random", n=6)
    mine = values(linear_logprobs, hidden.double(), weight.double(), targets, entropy=True, cap=3.0, scale=0.5)

    def truth(h, w, targets):
        return from_logits(changed(h @ w.T, 3.0, 0.5), targets)

    right = values(truth, hidden.double(), weight.double(), targets)
    for a, b in zip(mine, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    for bad in (dict(cap=-1.0), dict(scale=0.0), dict(scale=-2.0)):
        with pytest.raises(ValueError, match="the cap is 0 or more, the scale above 0"):
            linear_logprobs(hidden, weight, targets, **bad)
