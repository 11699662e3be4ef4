"""What the documents show is true: worked examples give what they say, and excerpts are in the files."""

import doctest
import json
import re

import pytest

from common.shapes import read_row
from tests.conftest import ROOT, run_script

ALGORITHMS = ["luffy", "relift", "redi", "oreo", "behavior_injection"]


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_worked_examples_give_what_they_show(page):
    text = (ROOT / "docs" / page).read_text()
    examples = "\n".join(re.findall(r"```pycon\n(.*?)```", text, re.DOTALL))
    test = doctest.DocTestParser().get_doctest(examples, {}, page, page, 0)
    failed, attempted = doctest.DocTestRunner().run(test)
    assert failed == 0 and (attempted > 5 or page.removesuffix(".md") not in ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_lines_to_read_along_are_in_the_file(name):
    page, code = (ROOT / "docs" / f"{name}.md").read_text(), (ROOT / f"{name}.py").read_text()
    section = page.split("## Read along\n")[1].split("\n## ")[0]
    excerpts = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert excerpts and "```pycon" in section
    for excerpt in excerpts:
        assert excerpt in code, excerpt


def test_rows_to_copy_hold_what_the_pages_say():
    rows = {}
    for page in (ROOT / "docs" / "data.md", ROOT / "README.md"):
        [block] = re.findall(r"```json\n(.*?)```", page.read_text(), re.DOTALL)
        rows[page.name] = [read_row(json.loads(line), "row") for line in block.splitlines() if line.strip()]
    held = {name: [(item.gold, [t.reward for t in item.traces]) for item in items] for name, items in rows.items()}
    trace, pair = ("7", [1]), ("", [1, 0])
    assert held["data.md"] == [trace, ("7", []), trace, pair, pair, ("", [1]), ("C", [])]
    assert held["README.md"] == [trace, pair, pair]
    assert [turn["role"] for turn in rows["data.md"][5].conversation] == ["user", "assistant"] * 2


@pytest.mark.parametrize("page", sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]), ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


RESULTS = {  # page, heading of the section -> the files that its tables are from
    ("luffy", "Results"): ["demo-seed0.json", "demo-seed1.json", "demo-seed2.json"],
    ("redi", "Results"): ["redi-tiny.json"],
    ("redi", "Memory and time"): ["redi-gsm8k-sft.jsonl", "redi-gsm8k-redi.jsonl"],
    ("oreo", "Results"): ["oreo-tiny.json", "agents-textworld.md", "agents-textworld-1pass.md"],
    ("behavior_injection", "Results"): ["bridge-tiny.json"],
    ("logprobs", "Measured"): ["logprobs-cpu.json"],
    ("logprobs", "Measured on an H100"): ["device-nvidia-h100-80gb-hbm3.json"],
    ("gpu", "What the numbers should be"): ["device-nvidia-h100-80gb-hbm3.json"],
    ("rollout", "Measured"): ["rollout-cpu.json"],
    ("igsm", "Measured"): ["igsm.md"],
    ("performance", "Against TRL, and the bare bound"): ["vs-trl-small-cpu.json", "vs-trl-memory-wide-cpu.json"],
    ("performance", "What an update costs"): ["cost-cpu.json"],
}


BUSY, IDLE = (("steps_per_second", f"beside {n} busy processes") for n in (3, 0))
PROSE = {  # what a sentence says: page, words of it -> result file, where in it
    ("luffy", r"over the last five steps are (0\.\d+) instead"): ("shaping.txt", r"reward/own .*-> (\S+)$"),
    ("luffy", r"steps are 0\.\d+ instead of (0\.\d+)"): ("shaping.txt", r"reward/own .*?-> (\S+)"),
    ("luffy", r"ends\s+at ([\d.]+) % instead"): ("shaping.txt", r"eval/mean .*-> (\S+)$"),
    ("luffy", r"% instead of ([\d.]+) \(each"): ("shaping.txt", r"eval/mean .*?-> (\S+)"),
    ("luffy", r"the entropy at ([\d.]+) nats"): ("shaping.txt", r"policy/entropy .*-> (\S+)$"),
    ("luffy", r"nats instead of ([\d.]+)"): ("shaping.txt", r"policy/entropy .*?-> (\S+)"),
    ("eval", r"workers: (\d+) answers a second"): ("grading.json", ("solutions", "math", "per_second")),
    ("eval", r"by `math`, (\d+) by"): ("grading.json", ("solutions", "strict_box", "per_second")),
    ("eval", r"median ([\d.]+) ms"): ("grading.json", ("answers", "median_ms")),
    ("eval", r"mean ([\d.]+) ms"): ("grading.json", ("answers", "mean_ms")),
    ("eval", r"so (\d+) a second and core"): ("grading.json", ("answers", "per_second_and_core")),
    ("eval", r"takes (\d+) % of the time"): ("grading.json", ("answers", "slowest_tenth_share")),
    ("eval", r"reward 0 \((\d+) ok"): ("grading.json", ("mixed", "hostile_status", "ok")),
    ("eval", r"ok, (\d+) unparsable"): ("grading.json", ("mixed", "hostile_status", "unparsable")),
    ("eval", r"unparsable, (\d+) timeout"): ("grading.json", ("mixed", "hostile_status", "timeout")),
    ("luffy", r"step took (\d+) s, "): ("luffy-gsm8k.jsonl", r'"step": 3,.*"seconds/step": ([\d.]+)'),
    ("luffy", r"(\d+) s of it sampling; peak"): ("luffy-gsm8k.jsonl", r'"step": 3,.*"seconds/sample": ([\d.]+)'),
    ("luffy", r"peak memory ([\d.]+) GB"): ("luffy-gsm8k.jsonl", r'"step": 3,.*"memory/peak_gb": ([\d.]+)'),
    ("oreo", r"shared: (\d+) to"): ("oreo-gsm8k.jsonl", r'"step": 3,.*"seconds/step": ([\d.]+)'),
    ("oreo", r"shared: \d+ to (\d+) s"): ("oreo-gsm8k.jsonl", r'"step": 9,.*"seconds/step": ([\d.]+)'),
    ("oreo", r"peak memory ([\d.]+) GB"): ("oreo-gsm8k.jsonl", r'"step": 9,.*"memory/peak_gb": ([\d.]+)'),
    ("performance", r"threads.json\)\): (\d+) a second"): ("threads.json", (*BUSY, "as it is")),
    ("performance", r"(\d+) with 10,000 turns"): ("threads.json", (*BUSY, "10000")),
    ("performance", r"(\d+) without spinning"): ("threads.json", (*BUSY, "0")),
    ("performance", r"on an idle machine (\d+),"): ("threads.json", (*IDLE, "as it is")),
    ("performance", r"on an idle machine \d+, (\d+) and"): ("threads.json", (*IDLE, "10000")),
    ("performance", r"on an idle machine \d+, \d+ and (\d+)"): ("threads.json", (*IDLE, "0")),
    ("performance", r"by tokens is ([\d.]+) % of them"): ("cost-cpu.json", ("tokens", "line", "residual")),
    ("performance", r"off by at most ([\d.]+) %, the"): ("cost-cpu.json", ("tokens", "line", "largest_residual")),
    ("scale", r"the trainer's (\d+) MB grown by"): ("soak-vllm.json", ("report", "trainer MB", "middle")),
    ("scale", r"its workers' ([\d,]+) MB by"): ("soak-vllm.json", ("report", "server MB", "middle")),
    ("scale", r"its workers' [\d,]+ MB by ([\d.]+)"): ("soak-vllm.json", ("report", "server MB", "growth")),
    ("scale", r"workers' (\d+) MB by [\d.]+ MB, no more"): ("soak-vllm.json", ("report", "worker MB", "middle")),
    ("scale", r"open, ([\d.]+) s a step, grown"): ("soak-vllm.json", ("report", "seconds a step", "middle")),
    ("scale", r"the trainer's memory (\d+) MB"): ("soak-embedded.json", ("report", "trainer MB", "middle")),
}


@pytest.mark.parametrize(("page", "words"), PROSE, ids=str)
def test_numbers_in_sentences_are_those_of_the_results(page, words):
    file, where = PROSE[page, words]
    text = (ROOT / "benchmarks" / "results" / file).read_text()
    if file.endswith(".json"):
        value = json.loads(text)
        for key in where:
            value = value[key]
    else:
        value = float(re.search(where, text, re.MULTILINE)[1])
    sentences = " ".join((ROOT / "docs" / f"{page}.md").read_text().split())
    said = next(filter(None, re.search(words, sentences).groups())).replace(",", "")
    value = value * 100 if "%" in words else value
    assert round(value, len(said.partition(".")[2])) == float(said)


# a line of these tables shows several rows of the results: only what is between these is of one row
SPREAD = {("luffy", "Results"): ", |[|(]", ("redi", "Results"): "[|]", ("redi", "Memory and time"): "[|]",
          ("oreo", "Results"): "[|]", ("behavior_injection", "Results"): "[|]",
          ("logprobs", "Measured"): "[|]", ("logprobs", "Measured on an H100"): "[|]"}  # fmt: skip


def leaves(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def rows_in(value):
    """The numbers of every object or list in it: all, if they are few, else its own, without those of others in it."""
    if isinstance(value, (dict, list)):
        items = list(value.values()) if isinstance(value, dict) else value
        numbers = list(leaves(value))
        yield numbers if len(numbers) <= 20 else [*leaves([v for v in items if not isinstance(v, (dict, list))])]
        for item in items:
            yield from rows_in(item)


def results_of(name: str) -> list[set[str]]:
    """For every row of a file in benchmarks/results the numbers that it may be shown as: as they are, in percent, in
    GB."""
    text = (ROOT / "benchmarks" / "results" / name).read_text()
    if name.endswith(".json"):
        rows = list(rows_in(json.loads(text)))
    else:
        lines = re.sub(r"(?<=\d),(?=\d{3})", "", text).splitlines()
        rows = [[float(n) for n in re.findall(r"-?\d+\.?\d*", line)] for line in lines]
    if name == "logprobs-cpu.json":  # "of the floor"
        medians = [r["median_seconds"] for r in json.loads(text)["rows"] if r["mode"] != "forward"]
        rows.append([seconds / medians[0] for seconds in medians])
    return [{f"{scale * v:.{n}f}" for v in row for scale in (1, 100, 1e-9) for n in (0, 1, 2, 4)} for row in rows]


@pytest.mark.parametrize(("page", "heading"), RESULTS, ids=lambda x: x)
def test_the_numbers_of_a_table_are_in_the_results_that_it_names(page, heading):
    """Those in cells without words, at the precision shown. Those of a line (SPREAD: of a part) are of one row of the
    results."""
    section = (ROOT / "docs" / f"{page}.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    known, shown = [row for name in RESULTS[page, heading] for row in results_of(name)], 0
    for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        for line in table.splitlines()[2:]:
            cells = [cell for cell in line.strip("|").split("|")[1:] if re.fullmatch(r"[-\d.,%±()sGB ]*", cell)]
            for text in re.split(SPREAD.get((page, heading), "$"), "|".join(cells)):
                numbers = [n.replace(",", "") for n in re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)]
                assert any(row.issuperset(numbers) for row in known), (line, text)
                shown += len(numbers)
    assert shown > 5


def test_the_demos_table_is_that_of_its_results():
    found = [json.loads((ROOT / f"benchmarks/results/demo-seed{seed}.json").read_text()) for seed in range(3)]
    page = (ROOT / "docs" / "luffy.md").read_text()
    for name, title in (("grpo", "GRPO"), ("sft", "SFT"), ("luffy", "LUFFY")):
        cells = []
        for what in ("accuracy", "never_solved"):
            values = ", ".join(f"{run['models'][name][what]:.1f}" for run in found)
            cells.append(f"{values} % (± {max(run['models'][name][f'{what}_se'] for run in found):.1f})")
        sampled = found[0]["models"][name]["sampled_rows"]
        assert f"| after {title} | {cells[0]} | {cells[1]} | {f'{sampled:,} ' if sampled else ''}|" in page
    assert "took {:.0f} s, {:.0f} s and {:.0f} s".format(*(run["seconds"] for run in found)) in page


def test_the_results_page_shows_the_tables_of_the_earlier_comparison():
    made = (ROOT / "benchmarks" / "results" / "one-task.md").read_text().splitlines()
    page = (ROOT / "docs" / "results.md").read_text().splitlines()
    assert len(made) > 40 and not [line for line in made if line not in page]


def test_the_tables_of_scale_are_what_its_command_prints():
    printed = run_script("benchmarks/scale.py").stdout.splitlines()
    page = (ROOT / "docs" / "scale.md").read_text()
    assert len(printed) > 15 and not [line for line in printed if line and line not in page.splitlines()]
