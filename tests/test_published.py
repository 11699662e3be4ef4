"""docs/published.md: every recipe's command means the published settings (tests/vectors/published.json)."""

import dataclasses
import importlib
import json
import re

import pytest

from common.trainer import parse_args
from tests.conftest import ROOT

RECIPES = json.loads((ROOT / "tests" / "vectors" / "published.json").read_text())["recipes"]
COMMANDS = dict(re.findall(r"^\| ([^|`]+) \| `([^`]+)` \|", (ROOT / "docs" / "published.md").read_text(), re.M))
TABLES = {
    "luffy": {"method": "METHODS", "preset": "PRESETS"}, "relift": {"method": "METHODS", "preset": "PRESETS"},
    "redi": {"stage": "STAGES", "loss": "COMPARISONS", "preset": "PRESETS"},
    "behavior_injection": {"preset": "PRESETS"}, "tools.redi_data": {"preset": "PRESETS"},
    "oreo": {"stage": "STAGES", "variant": "VARIANTS", "preset": "PRESETS"}, "tools.agents": {}, "eval": {},
}  # fmt: skip


def test_every_recipe_has_a_command():
    assert COMMANDS.keys() == RECIPES.keys() and len(RECIPES) > 50


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_command_means_the_published_settings(recipe):
    command = COMMANDS[recipe].split()
    start = next(i for i, word in enumerate(command) if word.endswith(".py") or word.startswith("tools."))
    name, words = command[start].removesuffix(".py"), command[start + 1 :]
    script = importlib.import_module(name)
    tables = {flag: getattr(script, table) for flag, table in TABLES[name].items()}
    settings = json.loads(json.dumps(dataclasses.asdict(parse_args(script.Args, words, **tables))))
    assert {key: settings[key] for key in RECIPES[recipe]} == RECIPES[recipe]
