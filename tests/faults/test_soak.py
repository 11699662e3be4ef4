"""The short version of `make soak`: 40 steps, and a watcher that sees a leak."""

from tests.faults import soak


def test_files_and_memory_stay_flat(tmp_path):
    report = soak.soak(40, tmp_path / "run")
    assert {"trainer MB", "trainer files", "worker MB", "seconds a step"} <= report.keys()
    assert [name for name in soak.too_much(report) if "step" not in name] == []  # time is another test's neighbour's


def test_a_leak_would_be_seen():
    times = list(range(100))
    change, middle = soak.growth(times, [400 + 0.5 * t for t in times])
    assert soak.too_much({"trainer MB": {"growth": change, "middle": middle}}) == ["trainer MB"]
    change, middle = soak.growth(times, [40 + (t % 2) for t in times])
    assert soak.too_much({"trainer files": {"growth": change, "middle": middle}}) == []
    assert soak.too_much({"trainer files": {"growth": 4.0, "middle": 40.0}}) == ["trainer files"]
    assert soak.too_much({"seconds a step": {"growth": 0.02, "middle": 0.1}}) == ["seconds a step"]
