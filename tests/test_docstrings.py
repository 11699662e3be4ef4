"""The worked examples in docstrings are true."""

import doctest
import importlib

import pytest
import torch

from tests.conftest import ROOT


def has_examples(path) -> bool:
    return ">>>" in (ROOT / path).read_text()


FOLDERS = (".", "common", "igsm", "tools", "benchmarks", "benchmarks/blocks")
FILES = [path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("name", [str(path.with_suffix("")).replace("/", ".") for path in FILES if has_examples(path)])
def test_worked_examples_give_what_they_show(name):
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed
