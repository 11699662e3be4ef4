"""benchmarks/agents.py: its table and plot on known numbers, and which games and rows each run is given."""

import json
from pathlib import Path

import pytest

from benchmarks import agents
from benchmarks.agents import Bench, main, table


def test_the_table_is_a_line_a_policy_with_means_over_seeds():
    results = {
        "candidates": [3], "sft": {"greedy": 10.0, "sampled": 5.0},
        "runs": {
            "rejection": {"0": {"greedy": 20.0, "sampled": 15.0}, "1": {"greedy": 30.0, "sampled": 15.0}},
            "oreo": {
                "0": {"greedy": 40.0, "sampled": 20.0, "value": {"3": 50.0}},
                "1": {"greedy": 40.0, "sampled": 20.0, "value": {"3": 52.0}},
            },
        },
    }  # fmt: skip
    lines = table(results).splitlines()
    assert lines[0] == "| | greedy | sampled | best of 3 by V |"
    assert lines[2:] == [
        "| sft | 10.0 | 5.0 |  |",
        "| rejection | 25.0 ± 7.1 | 15.0 ± 0.0 |  |",
        "| oreo | 40.0 ± 0.0 | 20.0 ± 0.0 | 51.0 ± 1.4 |",
    ]


@pytest.fixture
def commands(monkeypatch):
    """The scripts are not run: what they would leave is put there."""
    given = []

    def run(*words, done):
        if done.exists():
            return
        words = list(map(str, words))
        given.append(words)
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text(json.dumps({"success": 0.5}))
        if words[0] == "oreo.py":
            row = {"step": 1, "value/right": 0.5, "value/wrong": 0.25}
            (done.parent / "metrics.jsonl").write_text(json.dumps(row) + "\n")

    monkeypatch.setattr(agents, "run", run)
    return given


def value_of(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


def test_both_arms_learn_from_the_same_rows_and_every_policy_plays_the_test_games(commands, tmp_path):
    bench = Bench(out=str(tmp_path / "runs"), results=str(tmp_path / "results" / "agents"), seeds=(0, 1))
    results = main(bench)
    assert results["runs"]["oreo"]["1"] == {"greedy": 50.0, "sampled": 50.0, "value": {"3": 50.0, "5": 50.0}}
    assert json.loads((tmp_path / "results" / "agents.json").read_text())["collected"] == {"0": 50.0, "1": 50.0}
    assert (tmp_path / "results" / "agents.png").stat().st_size > 10_000
    runs = tmp_path / "runs"
    trained = [words for words in commands if words[0] == "oreo.py"]
    assert [value_of(w, "--stage") for w in trained] == ["rejection", *["rejection", "oreo"] * 2]
    for words in trained[1:]:
        assert value_of(words, "--model") == str(runs / "sft" / "model")
        assert Path(value_of(words, "--rows")).parent.name == f"collected-{value_of(words, '--seed')}"
    played = [words for words in commands if words[0] == "-m" and value_of(words, "--stage") != "make"]
    for words in played:
        expert, own = value_of(words, "--stage") == "expert", "collected-" in value_of(words, "--out")
        games = "train" if expert else "practice" if own else "test"
        assert value_of(words, "--games") == str(runs / "games" / games)
        assert value_of(words, "--names") == "6"
    before = len(commands)
    main(bench)
    assert len(commands) == before  # what is complete is not done again


def test_what_other_flags_have_made_is_not_taken_for_what_these_would_make(monkeypatch, tmp_path):
    done = tmp_path / "a" / "results.json"
    done.parent.mkdir()
    monkeypatch.setattr(agents.subprocess, "run", lambda *_, **__: done.write_text("{}"))
    for _ in range(2):
        agents.run("oreo.py", "--out", done.parent, "--steps", 4, done=done)
    with pytest.raises(SystemExit, match="a was made by another command"):
        agents.run("oreo.py", "--out", done.parent, "--steps", 5, done=done)
