"""The blocks of benchmarks/claims.py: walks and their grader, the gate's pairs and their order, measures of rows."""

import random
from statistics import StatisticsError

import pytest
import torch

from benchmarks.blocks import bridge, oreo, shaping, walks
from common.verifiers import grade


def test_walks_are_graded_by_the_grid_and_the_closed_nodes():
    rng = random.Random(0)
    for question, walk in [walks.problem(rng) for _ in range(30)]:
        closed, last = question.split("\n")
        assert len(closed) == 4 and 4 <= len(walk) <= 8 and walk[-1] == last[2]
        wall, far = closed[0], next(n for n in walks.NODES if n not in closed + walks.neighbours(walk[-1]))
        wrong = [walk[:-1], wall + walk, walk + far + last[2], "", "<|eos|>", walk + "="]
        verdicts = grade([walk, f" {walk}\n", *wrong], [question] * 8, verifier=oreo.VERIFIER, workers=1)
        assert [v.reward for v in verdicts] == [1.0, 1.0] + [0.0] * 6 and {v.status for v in verdicts} == {"ok"}


def test_imperfect_walks_end_with_their_first_wrong_step():
    rng = random.Random(0)
    told = [(q, w, walks.imperfect(q, w, 0.2, rng)) for q, w in (walks.problem(rng) for _ in range(400))]
    steps = [right for q, _, walk in told for right in walks.right_steps(walk, q)]
    assert 0.16 < 1 - sum(steps) / len(steps) < 0.24, "a fifth of all steps"
    for question, whole, walk in told:
        right = walks.right_steps(walk, question)
        assert walk == whole if all(right) else right.index(False) == len(walk) - 1 and whole.startswith(walk[:-1])


def test_a_smaller_file_of_walks_begins_a_larger_one(tmp_path):
    for n in (3, 5):
        walks.main(walks.Flags(out=str(tmp_path / f"{n}.jsonl"), n=n, seed=1, slips=0.5))
    small, large = ((tmp_path / f"{n}.jsonl").read_text().splitlines() for n in (3, 5))
    assert len(large) == 5 and large[:3] == small


ROWS = [  # prompt 1; right walk: 2, then 3 or 4; wrong: 5 after 2, and 6 after 2, 5
    {"prompt_ids": [1], "response_ids": [2, 3, 0], "right": [True, True]},
    {"prompt_ids": [1], "response_ids": [2, 5, 6, 0], "right": [True, False, False]},
    {"prompt_ids": [1], "response_ids": [2, 5, 4, 0], "right": [True, False, False]},
    {"prompt_ids": [1], "response_ids": [2, 4], "right": [True, True]},
    {"prompt_ids": [9], "response_ids": [5, 0], "right": [False]},
]


def test_pairs_have_one_question_one_place_and_a_right_walk_so_far():
    assert oreo.matched_pairs(ROWS) == [([1, 2], [3, 4], [5])]


def test_pairs_are_in_order_if_the_right_step_has_the_higher_value(monkeypatch):
    pairs = [([1, 2], [3, 4], [5]), ([1], [7], [8, 9])]
    for score, shares in ((lambda ids: -ids[-1], [1.0, 1.0]), (lambda ids: ids[-1] == 3, [0.75, 0.5])):
        monkeypatch.setattr(oreo, "state_values", lambda value, states, *_, score=score: [score(s) for s in states])
        assert oreo.in_order(None, pairs, None) == shares


def test_the_critic_learns_labels_of_the_state_after_each_node():
    """The value that predicts token i + 1 is that of the state after node i: a value that reads the last id fits."""

    class Value(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.of = torch.nn.Embedding(10, 1)
            torch.nn.init.zeros_(self.of.weight)

        def forward(self, batch):
            return self.of(batch.input_ids[0, batch.predictors])[:, 0]

    value = Value()
    oreo.train_critic(value, ROWS * 20, oreo.Flags(out="", steps=200, lr=0.1))
    found = [round(x) for x in value.of.weight[:, 0].tolist()]
    assert [found[i] for i in (1, 2, 5, 6, 9)] == [1, 1, 0, 0, 1]


def test_dj_and_gain_are_ranked_over_arms():
    def rows(gains):
        return {f"a{i}_{kind}": measured for i, (dj, gain) in enumerate(gains)
                for kind, measured in (("dJ", {"dJ": dj}), ("sft", {"sampled": [10.0, 30.0]}),
                                       ("rl", {"sampled": [10.0 + gain, 30.0 + gain]}))}  # fmt: skip

    assert bridge.across(rows([(0.1, 1.0), (0.2, 9.0), (0.3, 5.0)])) == {"rank correlation": pytest.approx(0.5)}
    with pytest.raises(StatisticsError):
        bridge.across(rows([(0.1, 1.0), (0.1, 2.0)]))


def test_a_run_without_own_answers_has_no_curve_of_shaping(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "sft/loss": 1.0}\n')
    assert shaping.taken_up(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "length/own": 5, "length/teacher": 10}\n')
    assert shaping.taken_up(tmp_path) == [0.5]
