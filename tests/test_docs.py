"""What the documents show is true: worked examples give what they say, and excerpts are in the files."""

import doctest
import re

import pytest

from tests.conftest import ROOT

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


@pytest.mark.parametrize("page", sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]), ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
