"""tools/compare.py: the page of samples, in a real headless browser where there is one."""

import csv
import json
import os
import shutil
import subprocess
import time
from html.parser import HTMLParser

import pytest

from tools import compare
from tools.compare import to_html, to_mathml

pytest.importorskip("latex2mathml")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

ATTACKS = [
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "</script><script>document.title = 'owned'</script>",
    r"$\href{javascript:document.title='owned'}{click}$",
    r"\(\text{<img src=x onerror=document.title='owned'>}\)",
    r"\(\text{<mi href='javascript:1' onclick='document.title=1' style='x'>y</mi>}\)",
    "$</math><img src=x onerror=document.title='owned'>$",
    "<!--<script>",
    "{{title}} $title $data ${data} %s",
    "\u202e\u2028 \x00 \ud800 &lt;b&gt;",
]


def write_run(folder, rights, *, text="So it is {answer}.", benchmark="math", n=2, **settings):
    """An evaluation as eval.py leaves it: question i has rights[i] right answers of n."""
    folder.mkdir()
    settings = {"model": "m", "verifier": ["full"], "temperature": 0.6, "questions_digest": ""} | settings
    (folder / "args.json").write_text(json.dumps(settings))
    with open(folder / "samples.jsonl", "w") as file:
        for i, right in enumerate(rights):
            answers = [
                {
                    "text": text.replace("{answer}", r"$\frac{1}{2}$" if j < right else r"$\sqrt{7}$"), "tokens": 5,
                    "truncated": j == 1, "verdicts": {"full": [float(j < right), "ok"], "math": [0.0, "unparsable"]},
                }
                for j in range(n)
            ]
            gold = "1/2 <img src=x></script><script>document.title = 'owned'</script>"
            record = dict(id=f"q{i}", benchmark=benchmark if i % 3 else "other", rows=1, gold=gold, prompt="",
                          question=f"What is half of ${i}$?", answers=answers)
            file.write(json.dumps(record) + "\n")
    return str(folder)


@pytest.fixture
def compared(tmp_path):
    """Three runs whose answers hold every attack, compared."""
    texts = "\n".join(["thinking <b>hard</b></script></think>", *ATTACKS, "It costs $5 and $10. {answer}"])
    runs = [
        write_run(tmp_path / "base", [0, 1, 2, 0, 0, 2, 0, 2, 1], text=texts),
        write_run(tmp_path / "luffy", [2, 1, 2, 0, 2, 0, 1, 2, 1], text=texts),
        write_run(tmp_path / "<i>grpo", [0, 1, 2, 0, 2, 0, 1, 0, 1], text="short: {answer}"),
    ]
    compare.main(compare.Args(tuple(runs), out=str(tmp_path / "out"), verifier="full"))
    return tmp_path / "out"


class Browser:
    """A headless Chromium, driven over the pipe of its debugging protocol."""

    def __init__(self, profile):
        (theirs_in, self.write), (self.read, theirs_out) = os.pipe(), os.pipe()
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1800"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *options],
            pass_fds=[theirs_in, theirs_out], stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in), os.close(theirs_out)
        self.buffer, self.number, self.session, self.requests = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.buffer:
            part = os.read(self.read, 1 << 16)
            assert part, "the browser ended"
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def call(self, method, **params):
        self.number += 1
        request = {"id": self.number, "method": method, "params": params}
        request |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(request).encode() + b"\0")
        while (message := self.message()).get("id") != self.number:
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
        assert "error" not in message, message
        return message["result"]

    def run(self, script):
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, path):
        self.call("Page.navigate", url=f"file://{path}")
        deadline = time.monotonic() + 30
        while not self.run("document.readyState === 'complete' && location.protocol === 'file:'"):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.read), os.close(self.write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def choose(browser, which, value):
    """Choose in the n-th filter and -> the ids of the questions that stay visible."""
    return browser.run(
        f"""(() => {{
            const box = document.querySelectorAll("nav select")[{which}];
            box.value = {json.dumps(value)};
            box.dispatchEvent(new Event("change"));
            return [...document.querySelectorAll("article")].filter(a => a.checkVisibility())
                .map(a => a.querySelector("h2 span").textContent).sort();
        }})()"""
    )


def test_the_browser_shows_the_differing_questions_and_filters_them(compared, browser):
    browser.open(compared / "comparison.html")
    assert choose(browser, 0, "") == ["q0", "q4", "q5", "q6", "q7"]  # of nine: on these the runs differ
    assert choose(browser, 0, "other") == ["q0", "q6"]
    assert choose(browser, 0, "math") == ["q4", "q5", "q7"]
    assert choose(browser, 1, "right") == ["q5", "q7"]  # math, base right
    assert choose(browser, 2, "wrong") == ["q5"]  # and luffy wrong
    assert browser.run("document.querySelector('#count').textContent") == "1 of 5 questions"
    choose(browser, 0, ""), choose(browser, 1, "")
    assert choose(browser, 2, "right") == ["q0", "q4", "q6", "q7"]  # half of its answers is right


def test_formulas_are_mathml_that_the_browser_lays_out(compared, browser):
    browser.open(compared / "comparison.html")
    fraction = browser.run(
        """(() => {
            const fraction = document.querySelector(".answer mfrac"), [top, bottom] = fraction.children;
            return [fraction.namespaceURI, top.getBoundingClientRect().bottom <= bottom.getBoundingClientRect().top];
        })()"""
    )
    assert fraction == ["http://www.w3.org/1998/Math/MathML", True]
    assert browser.run("document.body.innerText.includes('It costs $5 and $10.')")


def test_hostile_answers_are_text_and_nothing_is_fetched(compared, browser):
    browser.requests.clear()
    browser.open(compared / "comparison.html")
    time.sleep(0.3)
    assert browser.run("document.title") == "base / luffy / <i>grpo"
    foreign = "main script, main img, main a, main [href], main i, main b"
    assert browser.run(f"document.querySelectorAll('{foreign}').length") == 0
    shown = browser.run("document.querySelector('.answer').innerText")
    for attack in (ATTACKS[0], ATTACKS[1], ATTACKS[2], "<!--<script>", "{{title}} $title $data", "&lt;b&gt;"):
        assert attack in shown
    assert browser.run("[...document.querySelectorAll('.thought')].some(t => t.textContent.includes('<b>hard</b>'))")
    assert [url for url in browser.requests if not url.startswith("file:")] == []
    # what slips through all the same is refused by the page's policy
    slip = '<img src=x onerror="document.title=1">'
    browser.run(f"document.querySelector('main').insertAdjacentHTML('beforeend', {json.dumps(slip)})")
    time.sleep(0.3)
    assert browser.run("document.title") == "base / luffy / <i>grpo"


def test_the_page_needs_no_file_beside_it(compared):
    page = (compared / "comparison.html").read_text()
    assert "http:" not in page and "https:" not in page and ' src="' not in page and "<link" not in page
    assert page.count("<script") == 2  # the data and the page's own: no text opened another


@pytest.mark.parametrize("text", [*ATTACKS, r"\(\text{<mi href=x onclick=y>z</mi>}\)", r"\(\text{<a>z</a>}\)"])
def test_to_html_escapes_all_but_mathml(text):
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, attributes))
    parser.feed(to_html(text))
    assert {tag for tag, _ in found} <= compare.MATHML
    assert {name for _, attributes in found for name, _ in attributes} <= compare.MATHML_ATTRIBUTES


def test_the_page_says_why_a_verdict_is_as_it_is():
    verdicts = {"full": [0.0, "unparsable", "gold unreadable: /"]}
    answer = {"text": "7", "tokens": 1, "truncated": False, "verdicts": verdicts}
    [shown] = compare.page_answers({"answers": [answer]}, "full")["shown"]
    assert shown["verdicts"] == {"full": "unparsable (gold unreadable: /)"}


def test_the_page_has_the_questions_on_which_runs_differ_most_and_the_first_answer_of_each_kind(tmp_path):
    runs = [write_run(tmp_path / name, rights, n=4) for name, rights in (("a", [0, 1, 3, 2]), ("b", [1, 1, 0, 4]))]
    compare.main(compare.Args(tuple(runs), out=str(tmp_path / "out"), verifier="full", page_questions=2))
    text = (tmp_path / "out" / "comparison.html").read_text()
    places = {name: text.find(f'"id": "{name}"') for name in ("q0", "q1", "q2", "q3")}
    assert -1 == places["q0"] == places["q1"] < places["q2"] < places["q3"]
    answers = [dict(text=str(i), tokens=i, truncated=False, verdicts={"full": [i % 2, "ok"]}) for i in range(4)]
    shown = compare.page_answers({"answers": answers}, "full")["shown"]
    assert [(a["right"], a["tokens"]) for a in shown] == [(True, 1), (False, 0)]


def test_the_table_has_the_rates_of_each_run_on_each_benchmark(tmp_path):
    runs = [write_run(tmp_path / name, rights, n=4) for name, rights in (("a", [0, 1, 3, 2]), ("b", [4, 1, 0, 4]))]
    compare.main(compare.Args(tuple(runs), out=str(tmp_path / "out"), verifier="full"))
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").read_text().splitlines()))
    assert {(row["benchmark"], row["run"]): float(row["pass@1"]) for row in rows} == {
        ("other", "a"): 0.25, ("other", "b"): 1.0, ("math", "a"): 0.5, ("math", "b"): 0.125,
        ("average", "a"): 0.375, ("average", "b"): 0.5625,
    }  # fmt: skip


def test_dollars_of_money_are_no_formula():
    assert to_html("It costs $5 and $10, not $ 7 $.") == "It costs $5 and $10, not $ 7 $."
    assert to_html(r"$x$ and \(y\) and \[z\] and $$w$$ and \boxed{\frac{1}{v}}").count("<math") == 5


def test_formulas_of_ordinary_solutions_are_shown_as_such():
    powers = [r"x^2", r"x_1^2", r"x_1", r"\sqrt{x}", r"\sqrt[3]{x}", r"\overline{x}", r"\underbrace{x}_y"]
    tall = [r"\sum_{i=1}^n i", r"\lim_{x\to0}x", r"\frac{1}{x}", r"\binom{n}{k}", r"\begin{matrix}1&x\\3&4\end{matrix}"]
    more = [r"5\,\text{cm}", r"\displaystyle x", r"\boxed{x}", r"\phantom{x}", r"\left(x\right)", r"x \pmod{3}"]
    assert not [formula for formula in powers + tall + more if to_mathml(formula) is None]


def test_a_long_text_shows_its_end():
    html = to_html("a" * 10_000 + "END")
    assert html.endswith("END") and "6,003 characters before" in html and len(html) < 5000


@pytest.mark.parametrize(
    "formula",
    ["{" * 1000, "^" * 1000, r"\left(" * 150, r"\frac" * 190, r"\begin{matrix}" * 70, "_^" * 500, r"\sqrt" * 200,
     "&" * 999, r"\text{" * 160, "x" * 1001, "\x00", "\ud800", r"\href{javascript:alert(1)}{x}", r"\color{red}x"],
)
def test_no_formula_takes_long_or_raises(formula):
    start = time.process_time()
    result = to_mathml(formula)
    assert time.process_time() - start < 2
    assert result is None or (result.startswith("<math") and "href" not in result and "style=" not in result)
