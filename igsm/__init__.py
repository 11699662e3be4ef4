"""iGSM: synthetic word problems of an exact difficulty, a solver that reads only their text, and a checker of
every step of a solution. `python -m igsm --help` tells how to write data sets; docs/igsm.md explains."""

from igsm.checker import Check, check_solution
from igsm.problem import Problem, generate, problems, retell, row
from igsm.solver import solve
from igsm.text import corrupt
from igsm.tokens import tokenizer

__all__ = [
    "Check", "Problem", "check_solution", "corrupt", "generate", "problems", "retell", "row", "solve", "tokenizer",
]  # fmt: skip
