"""A run that is killed, also while it writes a checkpoint, and started again is the run that nothing disturbed, to the
bit. As each pair of runs is compared, this is also the test that the same seed gives the same bits. `make soak` kills
more often."""

import random

import pytest

from tests.conftest import zygote
from tests.faults import harness


@pytest.mark.parametrize("name", harness.SHORT)
def test_a_killed_run_goes_on_bit_for_bit(name, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    seconds = harness.undisturbed(name, whole, zygote())
    moments = harness.disturbed(name, killed, zygote(), seconds, 3, random.Random(name))
    assert len(moments) >= 2, "it was to be killed more often"
    assert harness.assert_equal(whole, killed) > 8
