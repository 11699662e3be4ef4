"""eval.py end to end on the repository's tiny model: files, ranks, killed and resumed, other graders, bad input."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval as evaluation
import igsm
from common import checkpoints, report
from common.data import InputError
from common.run import read_records, write_records
from common.trainer import ValueModel, export, init_world, load_policy, load_tokenizer
from common.verifiers import Verdict, grade
from tests.conftest import ROOT, locked, other_weights, read_rows, run_script, vectors, write_rows
from tools import compare

MODEL, POSITIONS = str(ROOT / "models/tiny"), 1024


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two small benchmarks; of the first every row comes twice."""
    symbolic = dict(style="symbolic", modulus=23, max_params=4, max_literal=9, shuffle=False)
    rows = []
    for name, ops, repeats, seed in (("short", (1, 2), 2, 1), ("long", (3, 4), 1, 2)):
        problems = [igsm.row(p, "test") for p in igsm.problems(6, ops=ops, seed=seed, **symbolic)]
        rows += [row | {"data_source": name} for row in problems] * repeats
    return write_rows(tmp_path_factory.mktemp("data") / "problems.jsonl", rows)


def args(data, out, **settings):
    usual = dict(model=MODEL, n=3, max_tokens=48, temperature=1.0, sampler_tokens=450, rollout="embedded",
                 verifier=("boxed", "exact"))  # fmt: skip
    return evaluation.Args(data=(data,), out=str(out), **usual | settings)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of one process that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished")
    evaluation.main(args(data, out))
    return out


@pytest.fixture
def out(finished, tmp_path):
    """A copy of that run, to be changed."""
    return shutil.copytree(finished, tmp_path / "out")


def command(data, out):
    """The same run as a command."""
    settings = ["-n", "3", "--max_tokens", "48", "--temperature", "1.0", "--sampler_tokens", "450"]
    settings += ["--rollout", "embedded", "--verifier", "boxed", "exact"]
    return ["eval.py", "--model", MODEL, "--data", data, "--out", str(out), *settings]


def test_a_run_leaves_numbers_samples_and_tables(finished, data):
    results = json.loads((finished / "results.json").read_text())
    assert list(results) == ["short", "long", "average"]
    assert (results["short"]["rows"], results["short"]["questions"], results["short"]["answers"]) == (12, 6, 18)
    assert (results["long"]["rows"], results["long"]["questions"]) == (6, 6)
    assert results["average"] == pytest.approx((results["short"]["pass@1"] + results["long"]["pass@1"]) / 2)
    assert sum(results["short"]["verifier"].values()) == 18
    records = read_rows(finished / "samples.jsonl")
    assert [r["benchmark"] for r in records] == ["short"] * 6 + ["long"] * 6
    tokens = [a["tokens"] for r in records[:6] for a in r["answers"]]
    assert results["short"]["mean_tokens"] == pytest.approx(sum(tokens) / 18)
    assert max(tokens) <= 48 and all(a["truncated"] <= (a["tokens"] == 48) for r in records for a in r["answers"])
    assert not any("<|" in a["text"] for r in records for a in r["answers"] if not a["truncated"])  # no stop token
    assert "| short" in (finished / "results.md").read_text() and (finished / "results.png").stat().st_size > 5000
    assert not list(finished.glob("*part*"))


def test_answers_are_not_graded_again_while_another_process_writes_them(out):
    with locked(out / ".lock"), pytest.raises(InputError, match="another process writes there"):
        evaluation.main(evaluation.Args(out=str(out), regrade=True))


def test_a_resumed_run_names_benchmarks_as_it_reads_them_now(data, finished, out):
    """As if the first half had been asked when the file had another path, which is part of a name in two files."""
    records = read_records(out / "samples.jsonl")
    write_records(out / "samples.jsonl", [r | {"benchmark": "short (old.jsonl)", "row": "old.jsonl, row 0"}
                                          for r in [*records.values()][:4]])  # fmt: skip
    evaluation.main(args(data, out))
    assert (out / "samples.jsonl").read_text() == (finished / "samples.jsonl").read_text()


@pytest.fixture(scope="module")
def value(tmp_path_factory):
    """A value model with a random head, as oreo.py writes one."""
    world, path = init_world(), tmp_path_factory.mktemp("value") / "value"
    model = load_policy(MODEL, world, kind=ValueModel, new_head=True)
    torch.nn.init.normal_(model.lm.score.weight, generator=torch.Generator().manual_seed(0))
    export(model, load_tokenizer(MODEL), path, world)
    return str(path)


def searched(data, out, value, search, width, **settings):
    """The only answer to each question."""
    evaluation.main(args(data, out, search=search, value=value, width=width, max_steps=30, **settings))
    records = read_rows(out / "samples.jsonl")
    assert len(records) == 12 and all(len(r["answers"]) == 1 for r in records)
    return [r["answers"][0] for r in records]


def test_search_answers_with_what_the_value_prefers(data, tmp_path, value):
    one, five = (searched(data, tmp_path / str(n), value, "best_of_n", n) for n in (1, 5))
    assert [a["found"] for a in one + five] == [1] * 12 + [5] * 12
    # the first of the five is the one, but for rounding
    assert all(wide["value"] > narrow["value"] - 1e-4 for narrow, wide in zip(one, five, strict=True))
    assert sum(wide["text"] != narrow["text"] for narrow, wide in zip(one, five, strict=True)) > 3
    beam = searched(data, tmp_path / "beam", value, "beam", 2)
    assert any(a["found"] > 1 for a in beam)
    shutil.copytree(tmp_path / "beam", tmp_path / "again")
    lines = (tmp_path / "beam" / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "again" / "samples.jsonl").write_text("".join(lines[:7]))  # as if killed: the rest is searched again
    assert searched(data, tmp_path / "again", value, "beam", 2) == beam
    with pytest.raises(InputError, match="--search beam needs --value"):
        evaluation.main(args(data, tmp_path / "none", search="beam"))


@pytest.mark.parametrize("kind", ["beam", "best_of_n", "best_of_k"])
def test_a_search_finds_what_the_search_stage_of_oreo_found(kind, data, value, tmp_path):
    """The vectors are from `oreo.py --stage search` as it was: same model, value, questions and seed."""
    single = tmp_path / "single.jsonl"
    with open(data) as file:
        single.write_text("".join(dict.fromkeys(file)))
    expected = vectors("search")[kind]
    answers = searched(str(single), tmp_path / "out", value, kind, 3, top_p=0.95)
    assert [a["text"] for a in answers] == expected["texts"] and [a["found"] for a in answers] == expected["found"]
    assert [a["value"] for a in answers] == pytest.approx(expected["values"], abs=1e-3)
    assert json.loads((tmp_path / "out/results.json").read_text())["average"] == pytest.approx(expected["average"])


def test_a_run_that_is_killed_goes_on_and_ends_alike(finished, data, tmp_path):
    process = subprocess.Popen([sys.executable, *command(data, tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL)
    part, deadline = tmp_path / "samples.part-0.jsonl", time.monotonic() + 120
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < part.read_bytes().count(b"\n") < 12, "it was to be killed while it samples"
    evaluation.main(args(data, tmp_path))
    for name in ("samples.jsonl", "results.json", "results.md"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_of_what_a_killed_run_left_nothing_is_lost_or_doubled(finished, data, tmp_path):
    whole = (finished / "samples.jsonl").read_bytes()
    shutil.copy(finished / "args.json", tmp_path)
    (tmp_path / "samples.jsonl").write_bytes(whole[: whole.index(b"\n") + 1])  # a merge was completed, parts remain
    (tmp_path / "samples.part-0.jsonl").write_bytes(whole[: int(0.3 * len(whole))])
    (tmp_path / "samples.part-3.jsonl").write_bytes(b'{"id": "cut')
    evaluation.main(args(data, tmp_path))
    assert (tmp_path / "samples.jsonl").read_bytes() == whole
    assert not list(tmp_path.glob("*part*"))


def test_two_ranks_share_the_questions_and_draw_the_same(finished, data, tmp_path):
    run_script(*command(data, tmp_path), ranks=2)
    for name in ("samples.jsonl", "results.json"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_other_graders_grade_what_is_there_and_nothing_is_sampled(finished, out, data, monkeypatch):
    monkeypatch.setattr(evaluation, "load_policy", None)
    evaluation.main(args(data, out, verifier=("mcq", "boxed")))
    results = json.loads((out / "results.json").read_text())
    before = json.loads((finished / "results.json").read_text())
    assert results["short"]["graders"]["boxed"] == before["short"]["pass@1"]
    assert set(results["short"]["graders"]) == {"mcq", "boxed"}


def test_another_sampler_may_not_draw_the_rest_and_nothing_is_asked_when_nothing_is_left(out, data):
    evaluation.main(args(data, out, sampler_tokens=7000, write_every=5))
    settings = json.loads((out / "args.json").read_text())
    assert settings["rollout"] == "embedded" and settings["sampler_tokens"] != 7000  # of those who drew
    lines = (out / "samples.jsonl").read_text().splitlines(keepends=True)
    (out / "samples.jsonl").write_text("".join(lines[:2]))
    (out / "args.json").write_text(json.dumps(settings | {"rollout": "vllm"}))
    with pytest.raises(InputError, match="rollout 'vllm' there, 'embedded' here"):
        evaluation.main(args(data, out))


def test_a_search_needs_room_for_one_answer_alone_and_fills_the_batch():
    asked = evaluation.Question("q", "b", "text", [], "1", "row 0", 0, prompt=[5] * 100)
    settings = evaluation.Args(model=MODEL, search="beam", value="v", max_tokens=POSITIONS - 100)
    evaluation.check_lengths([asked], settings)
    with pytest.raises(InputError, match=f"exceed the {POSITIONS} positions"):
        evaluation.check_lengths([asked], evaluation.Args(model=MODEL, max_tokens=POSITIONS - 99))
    sizes = {}
    for kind in ("none", "beam", "best_of_n", "best_of_k"):
        how = evaluation.Args(search=kind, width=5, max_tokens=100, sampler_tokens=200 * 25)
        sizes[kind] = len(evaluation.chunks([asked] * 25, how, embedded=True)[0])
    assert sizes == {"none": 25, "beam": 1, "best_of_n": 5, "best_of_k": 5}


def test_other_settings_need_another_folder(out, data):
    with pytest.raises(InputError, match="temperature 1.0 there, 0.5 here"):
        evaluation.main(args(data, out, temperature=0.5))


def test_the_same_model_by_another_path_goes_on_and_other_weights_do_not(out, data, tmp_path, monkeypatch):
    model = shutil.copytree(MODEL, tmp_path / "model")
    moved = args(data, out, model=str(model))
    monkeypatch.setattr(evaluation, "load_policy", None)  # nothing is sampled again
    evaluation.main(moved)
    other_weights(model)
    with pytest.raises(InputError, match="other weights"):
        evaluation.main(moved)


def test_a_verifier_that_fails_on_every_answer_gives_no_numbers(out, data, tmp_path, monkeypatch):
    (tmp_path / "failing_verifier.py").write_text("def reward(response, gold):\n    raise KeyError('answer')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"failing_verifier:reward failed on all 36 answers \(KeyError"):
        evaluation.main(args(data, out, verifier=("boxed", "failing_verifier:reward")))
    evaluation.main(args(data, out))  # nothing was lost


def test_a_hub_name_whose_revision_moved_is_another_model(monkeypatch):
    revision = "a" * 40
    monkeypatch.setattr(checkpoints, "cached_file", lambda name, file: f"models--{name}/snapshots/{revision}/{file}")
    before = checkpoints.digest_of("some/model")
    revision = "b" * 40
    assert before == "a" * 40 != checkpoints.digest_of("some/model")


def test_regrade_needs_neither_model_nor_data_and_says_rule_and_version(finished, out, data, monkeypatch):
    monkeypatch.setattr(evaluation, "load_policy", None)
    before = json.loads((finished / "results.json").read_text())
    for verifier in ("full", "boxed"):
        evaluation.main(evaluation.Args(out=str(out), regrade=True, verifier=(verifier,)))
        results = json.loads((out / "results.json").read_text())
        assert results["short"]["graded_by"] == {verifier: report.grader_version(verifier)}
        assert report.grader_version(verifier) in (out / "results.md").read_text()
    assert results["short"]["pass@1"] == before["short"]["pass@1"]
    lines = (out / "samples.jsonl").read_text().splitlines(keepends=True)
    (out / "samples.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(InputError, match="11 of 12 questions are answered; resume it"):
        evaluation.main(evaluation.Args(out=str(out), regrade=True, verifier=("full",)))


def test_verdicts_of_another_version_of_a_grader_are_given_anew(out, data, monkeypatch):
    monkeypatch.setattr(evaluation, "load_policy", None)
    graded = []

    def watch(texts, golds, verifier):
        graded.append((verifier, len(texts)))
        return grade(texts, golds, verifier=verifier)

    monkeypatch.setattr(report, "grade", watch)
    evaluation.main(args(data, out))
    assert not graded
    monkeypatch.setattr(report, "grader_version", lambda verifier: "new" if verifier == "boxed" else verifier)
    evaluation.main(args(data, out))
    assert set(graded) == {("boxed", 36), ("exact", 36)}


def test_verdicts_are_given_again_if_asked_and_always_by_a_users_verifier(monkeypatch, world):
    """What a user's file imports is in no digest."""
    graded, records = [], {"q": {"id": "q", "gold": "1", "answers": [{"text": "x"}]}}
    monkeypatch.setattr(report, "grade", lambda texts, *_, **__: graded.extend(texts) or [Verdict(1.0, "ok")])
    asked = (("boxed", False), ("boxed", False), ("boxed", True), *[("tests.rewards:even_length", False)] * 2)
    counts = []
    for verifier, again in asked:
        report.grade_records(records, [verifier], world, again=again)
        counts.append(len(graded))
    assert counts == [1, 1, 2, 3, 4]


def test_the_version_of_a_grader_is_that_of_both_its_files(monkeypatch):
    before, read = report.grader_version("robust"), Path.read_bytes
    for name in ("verifiers.py", "robust.py"):
        monkeypatch.setattr(Path, "read_bytes", lambda path, name=name: b"" if path.name == name else read(path))
        assert report.grader_version("robust") != before


def test_a_gold_that_no_grader_can_read_is_named_by_row_once(out, monkeypatch):
    samples = out / "samples.jsonl"
    records = read_records(samples)
    bad = list(records)[1]

    def refuses(texts, golds, verifier):
        cannot = Verdict(0.0, "unparsable", "gold unreadable: 1/2/")
        return [cannot if gold == "1/2/" else Verdict(1.0, "ok") for gold in golds]

    monkeypatch.setattr(report, "grade", refuses)
    records[bad]["gold"] = "1/2/"
    write_records(samples, list(records.values()))
    evaluation.main(evaluation.Args(out=str(out), regrade=True, verifier=("full",)))
    where = records[bad]["row"]
    assert where.endswith("problems.jsonl, row 1")
    assert json.loads((out / "results.json").read_text())["short"]["unreadable_golds"] == [where]
    text = (out / "results.md").read_text()
    assert text.count(where) == 1 and "cannot read the gold answers of 1 questions" in text
    told = [a["verdicts"]["full"] for a in read_records(samples)[bad]["answers"]]
    assert told == [[0.0, "unparsable", "gold unreadable: 1/2/"]] * 3


def test_names_of_benchmarks_never_hide_one_another(data, tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text(json.dumps({"question": folder, "answer": "1"}) + "\n")
    average = tmp_path / "average.jsonl"
    average.write_text(json.dumps({"question": "c", "answer": "1"}) + "\n")
    sources = [str(tmp_path / "a" / "test.jsonl"), str(tmp_path / "b" / "test.jsonl"), str(average), data]
    questions = evaluation.read_questions(sources)
    names = [q.benchmark for q in questions]
    assert names[:3] == [f"test ({sources[0]})", f"test ({sources[1]})", f"average ({average})"]
    assert set(names[3:]) == {"short", "long"}
    assert questions[0].id == evaluation.read_questions(sources[:1])[0].id  # whatever else is asked
    both = tmp_path / "b" / "test.jsonl"
    both.write_text(both.read_text() + (tmp_path / "a" / "test.jsonl").read_text())
    assert len({q.id for q in evaluation.read_questions(sources[:2])}) == 3  # one question in two files is two
    assert evaluation.read_questions([data, data]) == evaluation.read_questions([data])  # the same file, twice


def test_a_file_for_a_folder_is_named(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: .*exists"):
        evaluation.main(args(data, tmp_path / "file"))


def test_igsm_problems_are_asked_by_their_data_name(tmp_path):
    evaluation.main(evaluation.Args(model=MODEL, data=("igsm:2-3",), out=str(tmp_path), verifier=("boxed",), limit=2,
                                    n=1, max_tokens=16, rollout="embedded"))  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text())["igsm-symbolic"]["questions"] == 2


def test_a_prompt_that_leaves_no_room_is_named(tmp_path):
    row = {"prompt": [{"role": "user", "content": "a=5\n" * 2000}], "answer": "5"}
    long = args(write_rows(tmp_path / "rows.jsonl", [row]), tmp_path / "out")
    with pytest.raises(InputError, match="rows.jsonl, row 0: its prompt of .* tokens .*: remove the row"):
        evaluation.main(long)


def test_difficulty_is_that_of_another_run(finished, data, tmp_path):
    evaluation.main(args(data, tmp_path, n=1, temperature=0, limit=3, buckets=str(finished)))
    results = json.loads((tmp_path / "results.json").read_text())
    buckets = results["short"]["by_difficulty"]
    assert sum(b["questions"] for b in buckets.values()) == results["short"]["questions"] == 3
    assert results["short"]["answers"] == 3 and "| by_difficulty" in (tmp_path / "results.md").read_text()
    assert f"Difficulty by the answers in {finished}." in (tmp_path / "results.md").read_text()
    old = shutil.copytree(finished, tmp_path / "old")  # graded by another version of the rule, which refused everything
    records = read_records(old / "samples.jsonl")
    for record in records.values():
        record["graded_by"] = {"boxed": "code OLD"}
        for answer in record["answers"]:
            answer["verdicts"] = {"boxed": [0.0, "ok"]}
    write_records(old / "samples.jsonl", [*records.values()])
    evaluation.main(args(data, tmp_path, n=1, temperature=0, limit=3, buckets=str(old)))
    assert json.loads((tmp_path / "results.json").read_text())["short"]["by_difficulty"] == buckets


def test_an_evaluation_that_lacks_answers_is_no_base_and_is_not_compared(finished, data, tmp_path):
    cut = shutil.copytree(finished, tmp_path / "cut")
    lines = (cut / "samples.jsonl").read_text().splitlines()
    (cut / "samples.jsonl").write_text("\n".join(lines[:3]) + "\n")
    message = f"cut: 3 of {len(lines)} questions are answered; resume it first"
    with pytest.raises(InputError, match=message):
        evaluation.main(args(data, tmp_path / "out", buckets=str(cut)))
    with pytest.raises(InputError, match=message):
        compare.main(compare.Args((str(finished), str(cut)), out=str(tmp_path / "out"), verifier="boxed"))


def test_comparing_uses_the_questions_that_all_runs_have(finished, data, tmp_path, capsys):
    evaluation.main(args(data, tmp_path / "greedy", temperature=0, limit=4))
    out = tmp_path / "out"
    runs = (str(finished), str(tmp_path / "greedy"))
    compare.main(compare.Args(runs, out=str(out), verifier="boxed"))
    assert "4 questions were not asked in all runs" in capsys.readouterr().out
    text = (out / "comparison.md").read_text()
    assert "| average" in text and "| temperature" in text and (out / "comparison.png").exists()
    assert (out / "comparison.csv").read_text().count("\n") == 1 + 3 * 2
    with pytest.raises(InputError, match="two or more"):
        compare.main(compare.Args(runs[:1], out=str(out)))


def test_dry_run_prints_prompts_and_ids_and_writes_nothing(data, tmp_path, capsys):
    evaluation.main(args(data, tmp_path / "out", dry_run=True))
    said = capsys.readouterr().out
    assert "short: 12 rows, 6 questions, 18 answers to draw" in said and "ids (" in said and "gold: " in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(sampler_tokens=-1), "--sampler_tokens must be 0 or more"),
        (dict(n=0), "--n must be positive"), (dict(top_p=0), "--top_p must be positive"),
        (dict(top_p=2), "--top_p must be between 0 and 1"),
        (dict(temperature=-1), "--temperature must be 0 or more"),
        (dict(max_tokens=5000), "--max_tokens .* or less fits"), (dict(stop_tokens=("<|im_end|>",)), "--stop_tokens"),
        (dict(regrade=True, dry_run=True), "--dry_run prints prompts"),
        (dict(buckets="nowhere"), "nowhere: no evaluation there"),
        (dict(buckets="training"), "training: a training run, not an evaluation"),
        (dict(template="no-such"), "--template no-such"),
        (dict(search="beam", value="no/such"), "--value no/such: cannot be loaded"),
        (dict(template="qwen", chat_template_args=("a=1",)), "--chat_template_args are for --template own, not qwen"),
        (dict(verifier=("boxed", "no_such_module:reward")), "--verifier no_such_module:reward: .*beside the script"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(data, tmp_path, monkeypatch, settings, message):
    if settings.get("buckets") == "training":
        monkeypatch.chdir(tmp_path)
        (tmp_path / "training").mkdir()
        (tmp_path / "training" / "args.json").write_text("{}")
        (tmp_path / "training" / "samples.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(InputError, match=message):
        evaluation.main(args(data, tmp_path / "out", **settings))
    assert not [*(tmp_path / "out").glob("samples*")]
