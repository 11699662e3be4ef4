"""benchmarks/scale.py's formulas, against a model of our own that is small enough to be measured."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scale import MODELS, Shape, activation_bytes, peak_bytes, state_bytes, update_flops
from common.data import pack
from common.trainer import load_policy, make_optimizer
from tests.conftest import ROOT

SHAPES = [Shape(3, 64, 128, 2, 32, 97), Shape(2, 128, 256, 4, 128, 61), Shape(4, 64, 160, 2, 64, 50, tied=True)]


def policy_of(shape, world, checkpointing):
    return load_policy("small", world, from_config=shape.config(), gradient_checkpointing=checkpointing)


def test_the_shapes_have_the_numbers_of_parameters_of_the_published_models():
    assert [round(shape.parameters / 1e9, 2) for shape in MODELS.values()] == [1.54, 7.62, 32.76]


@pytest.mark.parametrize("shape", SHAPES)
def test_states_are_16_bytes_a_parameter(shape, world):
    policy = policy_of(shape, world, False)
    optimizer = make_optimizer(policy, lr=1e-3)
    policy(pack([([1, 2], [3, 4])])).sum().backward()
    assert sum(p.numel() for p in policy.parameters()) == shape.parameters
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    tensors = [*policy.parameters(), *(p.grad for p in policy.parameters()), *moments]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == state_bytes(shape, 1)


def kept_bytes(shape, world, checkpointing, dtype) -> int:
    """What the forward pass of 512 tokens keeps for the backward pass, besides weights."""
    policy, kept, held = policy_of(shape, world, checkpointing).to(dtype), {}, []
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # so that no storage is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(pack([([2] * 256, [3] * 257)]), raw=True)
    return sum(kept.values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_that_a_layer_keeps_are_those_of_the_formula(shape, checkpointing, dtype, world):
    fewer = dataclasses.replace(shape, layers=shape.layers - 1)  # the difference is one layer's
    found, predicted = (
        [measure(s) for s in (shape, fewer)]
        for measure in (
            lambda s: kept_bytes(s, world, checkpointing, dtype),
            lambda s: activation_bytes(s, 512, checkpointing=checkpointing, element=dtype.itemsize),
        )
    )
    assert found[0] - found[1] == pytest.approx(predicted[0] - predicted[1], rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_of_an_update_are_those_that_torch_counts(shape, checkpointing, world):
    policy, batch = policy_of(shape, world, checkpointing), pack([([2] * 32, [3] * 33)])
    with FlopCounterMode(display=False) as counter:
        policy(batch, raw=True)[0].sum().backward()
    products = {op: n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)}
    predicted = update_flops(shape, 64, 0, checkpointing=checkpointing)
    assert sum(products.values()) == pytest.approx(predicted, rel=0.01)


DEVICES = sorted((ROOT / "benchmarks" / "results").glob("device-*.json"))


@pytest.mark.parametrize("path", DEVICES, ids=lambda path: path.stem)
def test_peak_memory_is_the_formulas(path):
    for row in json.loads(path.read_text())["step"]["rows"]:
        if row["layers computed again"] == MODELS[row["model"]].layers:
            halves = row["tokens"] // 2, row["responses"] // 2  # two micro-batches
            predicted = peak_bytes(MODELS[row["model"]], 1, *halves, checkpointing=True)
            assert row["peak GB"] == pytest.approx(predicted / 1e9, rel=0.03)
