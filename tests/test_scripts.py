"""Every script answers bad input by one message that names the flag, before anything is written, and by exit code 2."""

import importlib
import os
import subprocess
import sys

import pytest

from common.data import InputError
from tests.conftest import ROOT, parsed, run_script

SHORT = ["--preset", "tiny", "--model", "models/tiny", "--data", "igsm:1-2", "--igsm_problems", "40", "--batch_size",
         "4", "--eval_data", "igsm:1-2", "--eval_limit", "6"]  # fmt: skip
SCRIPTS = {"luffy": [], "relift": [], "redi": ["--stage", "sft"], "oreo": ["--stage", "sft"]}
BAD = [
    (["--data", "no/such.jsonl"], "no/such.jsonl: no such file"),
    (["--data", "igsm:lots"], "igsm:LO-HI"),
    (["--eval_data", "igsm:lots"], "igsm:LO-HI"),
    (["--batch_size", "400"], "40 rows are fewer than --batch_size 400"),
    (["--model", "no/such/model"], "--model no/such/model"),
    (["--chat_template", "no.jinja"], "--chat_template no.jinja: no such file"),
    (["--max_prompt_tokens", "3"], "no row is left: 0 of 40 rows .40 prompts over"),
    (["--max_response_tokens", "5000"], "tokens exceed the 1024 positions of --model: lower --max_prompt_tokens"),
    (["--verifier", "oops"], "--verifier oops: no verifier 'oops': math, "),
    (["--steps", "-1"], "--steps must be 0 or more and finite, not -1"),
]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_settings_get_one_message_before_anything_is_written(name, words, message, tmp_path):
    with pytest.raises(InputError, match=message):
        importlib.import_module(name).main(parsed(name, *SHORT, *SCRIPTS[name], "--out", tmp_path / "run", *words))
    assert words[0] == "--max_response_tokens" or not list(tmp_path.rglob("*.jsonl"))  # that needs the model


@pytest.mark.parametrize("name", [*SCRIPTS, "behavior_injection", "eval"])
def test_bad_input_exits_with_code_2_and_one_line(name, tmp_path):
    words, message = ["--data", "no/such.jsonl"], "no/such.jsonl: no such file or folder"
    if name == "behavior_injection":  # it makes its data
        words, message = ["--arms", "oops"], "--arms oops: no such arm"
    result = run_script(f"{name}.py", *words, "--model", "models/tiny", "--out", tmp_path / "run", check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(f"{name}.py: error: {message}")


@pytest.mark.parametrize("words", [["luffy.py"], ["-m", "igsm"]])
def test_a_reader_of_help_may_leave_early(words):
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")
