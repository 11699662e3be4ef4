"""benchmarks/device.py runs to its end, at toy sizes."""

import json

from tests.conftest import run_script


def test_every_part_measures_and_writes(tmp_path):
    said = run_script("benchmarks/device.py", "all", "--out", tmp_path).stdout
    [path] = tmp_path.glob("device-*.json")
    parts = json.loads(path.read_text())
    assert list(parts) == ["ceilings", "attention", "head", "step", "rollout"]
    for part in parts.values():
        for row in part["rows"]:
            numbers = [value for value in row.values() if isinstance(value, float)]
            assert "left out" in row or (numbers and all(value > 0 for value in numbers))
            assert str(list(row.values())[0]) in said
