"""benchmarks/threads.py in small: alone, and beside a busy process."""

import json

from tests.conftest import run_script


def test_steps_a_second_are_measured_by_load_and_turns(tmp_path):
    out = tmp_path / "threads.json"
    few = ["--seconds", 0.2, "--rounds", 1, "--beside", 0, 1, "--turns", 100]
    run_script("benchmarks/threads.py", *few, "--results", out)
    found = json.loads(out.read_text())["steps_per_second"]
    assert list(found) == ["beside 0 busy processes", "beside 1 busy processes"]
    assert all(list(by) == ["100"] and by["100"] > 1 for by in found.values())
