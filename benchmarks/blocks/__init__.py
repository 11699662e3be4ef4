"""The blocks of `benchmarks/claims.py`: each file is one mechanism of one paper, with a control that could refute it.

A block file defines, besides a docstring with the prediction and its reason, written before the first run:

    RUNS   {name: Run}        what is made: data files, starts, gates, and the rows of the table
    CLAIMS [Claim]            contrasts between rows
    TEST, VALID               files of problems, such as "{data}/test.jsonl"; VALID (other problems) chooses rates
    STEPS = (150, 40)         what {steps} stands for: in a full run and with --quick
and if it needs them
    VERIFIER, MAX_TOKENS      grader of the answers ("boxed") and their longest length (160)
    SEEDS                     how many seeds a verdict needs (3)
    START                     row whose other answers sort the test problems by difficulty ("base")
    CURVES {title: metric}    for the figure: metrics of runs, or functions of a run's folder, a value for each step
    COLUMNS {title: measure}  more columns of the table
    besides(name, seed, answered, folder) -> {measure: a number, or a list with one for each test problem}
                              what else is measured of a row. answered["sampled_texts"]: its answers, [problems][tries];
                              folder(NAME): the folder of a run at that seed. "updates", "sampled_tokens",
                              "demonstrations" and "operations" fill those columns
    across(found) -> {measure: number}
                              what is measured of all rows of a seed at once, {row: {measure: ...}}; the row "all"
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """A command. In it, {out} is its own folder, {seed} the seed, {lr} the rate, {steps} the block's ({half}: half of
    them), {tiny} the folder models/tiny, and {NAME} the folder of another run, which is made first."""

    command: str = ""  # a script of the repository and its flags, or "-m module ..."; empty: nothing is run
    model: str = "{out}/model"  # what a row measures. Empty: `besides` alone does
    test: str = ""  # its file of test problems; empty: TEST
    lrs: tuple[float, ...] = ()  # rates to choose from, by validation at seed 0; --quick takes the middle one
    row: bool = True  # measured, and a row of the table. False: a means, such as data
    once: bool = False  # one run for all seeds (its {seed} is 0)
    trained: float = 6  # operations per weight and token of the run: 6 a trained model, 2 a model that is read


def made(command: str, **how) -> Run:
    """A run that is no row of the table."""
    return Run(command, row=False, **how)


@dataclass(frozen=True)
class Claim:
    """That a weighted sum over rows, less a constant, is positive."""

    text: str
    rows: dict[str, float]  # row -> weight
    of: str = "sampled"  # what is summed: percent of correct answers, sampled or greedy, or a measure of `besides`
    among: str = ""  # only test problems of one difficulty for START: easy, medium, hard or hardest
    less: float = 0.0
