"""Make this folder's model again, into runs/tiny_base: `python models/tiny/make.py`.

RL can only teach a model what it is able to do and does not do. So the base is trained twice:
1. skill: step-by-step solutions of problems of 2 to 8 operations, from random weights;
2. habit: nothing but the answer, on problems of 1 to 8 operations.
It could work a hard problem out, and guesses. Hardly an answer of its own (one in some two thousand) shows it the
other way; a teacher's trace does.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import tyro  # noqa: E402

import igsm  # noqa: E402
from common.metrics import plot_curves  # noqa: E402
from common.rows import IGSM  # noqa: E402


@dataclass
class Make:
    out: str = "runs/tiny_base"
    """Folder of both runs, ordinary run folders: skill/ and habit/. The model is habit/model/."""
    skill_steps: int = 3000
    """Steps of 64 problems."""
    habit_steps: int = 150
    """Steps of 64 problems."""
    habit_lr: float = 3e-4
    """Peak learning rate of the second run."""


def habit_rows(n: int):
    """n problems as rows of a data set, with empty reasoning."""
    for problem in igsm.problems(n, ops=(1, 8), split="train", seed=1, **IGSM):
        row = igsm.row(problem, "train")
        [answer] = row["target"]
        answer["content"] = re.sub(r"<think>\n.*\n</think>", "<think>\n</think>", answer["content"], flags=re.DOTALL)
        yield row


def main(make: Make) -> None:
    out = Path(make.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    train = [sys.executable, "luffy.py", "--preset", "tiny", "--method", "sft", "--batch_size", "64", "--eval_limit",
             "300", "--eval_temperature", "0", "--log_samples", "0", "--save_every", "500", "--warmup", "0.02",
             "--lr_floor", "0.02", "--betas", "0.9", "0.99", "--weight_decay", "0.1"]  # fmt: skip
    skill = ["--model", "models/scratch", "--data", "igsm:2-8", "--igsm_problems", "200000", "--lr", "1.5e-3"]
    skill += ["--eval_every", "500", "--steps", str(make.skill_steps), "--out", str(out / "skill")]
    subprocess.run([*train, *skill], cwd=ROOT, check=True)

    with open(out / "habit.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in habit_rows(128 * make.habit_steps))
    habit = ["--model", str(out / "skill" / "model"), "--data", str(out / "habit.jsonl"), "--lr", str(make.habit_lr)]
    habit += ["--steps", str(make.habit_steps), "--eval_every", "50", "--out", str(out / "habit")]
    subprocess.run([*train, *habit], cwd=ROOT, check=True)
    runs = {name: out / name for name in ("skill", "habit")}
    plot_curves(runs, [["eval/mean"], ["teacher/logp"]], out / "curves.png")


if __name__ == "__main__":
    main(tyro.cli(Make, use_underscores=True))
