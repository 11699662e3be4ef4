"""The worked examples in docstrings are true."""

import doctest
import importlib

import pytest
import torch

from tests.conftest import ROOT

FOLDERS = (".", "common", "igsm", "tools", "benchmarks", "benchmarks/blocks")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py")) if ">>>" in path.read_text()]


@pytest.mark.parametrize("name", [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES])
def test_worked_examples_give_what_they_show(name):
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed
