"""The worked examples in docstrings are true."""

import doctest
import importlib

import pytest
import torch

MODULES = [
    "luffy", "relift", "redi", "oreo", "behavior_injection", "eval", "common.data", "common.logprobs", "common.rollout",
    "common.robust", "common.run", "common.search", "common.trainer", "common.verifiers", "igsm.behaviors",
    "igsm.checker", "igsm.graph", "igsm.problem", "igsm.solver", "igsm.text", "igsm.tokens", "tools.agents",
    "tools.redi_data", "benchmarks.claims", "benchmarks.blocks.luffy",
]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_worked_examples_give_what_they_show(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0
