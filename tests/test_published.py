"""docs/published.md: every recipe's command means the published settings (tests/vectors/published.json)."""

import dataclasses
import json
import re

import pytest

from tests.conftest import ROOT, parsed, vectors

RECIPES = vectors("published")["recipes"]
COMMANDS = dict(re.findall(r"^\| ([^|`]+) \| `([^`]+)` \|", (ROOT / "docs" / "published.md").read_text(), re.M))


def test_every_recipe_has_a_command():
    assert COMMANDS.keys() == RECIPES.keys() and len(RECIPES) > 50


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_command_means_the_published_settings(recipe):
    command = COMMANDS[recipe].split()
    start = next(i for i, word in enumerate(command) if word.endswith(".py") or word.startswith("tools."))
    name, words = command[start].removesuffix(".py"), command[start + 1 :]
    settings = json.loads(json.dumps(dataclasses.asdict(parsed(name, *words))))
    assert {key: settings[key] for key in RECIPES[recipe]} == RECIPES[recipe]
