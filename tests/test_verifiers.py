"""common/verifiers.py: the published rules, and that no text hangs, crashes or commands it.

tests/vectors/: `luffy.json` and `bridge_reward.json` are from the originals' code (LUFFY's with Math-Verify
0.6), `val_golds.json` holds the distinct golds of LUFFY's validation file, `math_pairs.json` pairs of
answers, many after Math-Verify's own tests.
"""

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import verifiers
from common.verifiers import Verdict, boxed_reward, grade, grade_later, last_boxed, math_reward
from tests.conftest import ROOT, processes, vectors, write_rows

LUFFY = vectors("luffy")["reward_cases"]["cases"]
BRIDGE = vectors("bridge_reward")

# A user's verifiers, in a module of their own as grade() demands.
USERS = """
import os, signal, sys, time
from common.verifiers import NoAnswer, math_reward

def length(response, gold): return len(response) / 2
def hang(response, gold):
    if response == "python":
        while True: pass
    if response == "c": 9 ** 9 ** 9
    if response == "program":
        import subprocess
        program = subprocess.Popen(["sleep", "600"])
        open(gold, "a").write(f"{program.pid}\\n")
        program.wait()
    if response == "deaf":
        for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
        time.sleep(600)
    return 1.0
def bad(response, gold):
    print("noise on stdout", flush=True)
    if response == "raise": raise KeyError("no such key")
    if response == "exit": sys.exit(3)
    if response == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
    if response in ("nan", "inf"): return float(response)
    if response == "none": return None
    if response == "silent": raise NoAnswer("nothing said")
    if response == "hog": return len(bytearray(64 << 30))
    return 1.0
kept = []
def grow(response, gold):
    kept.append(b"x" * (530 << 20))
    return os.getpid()
def pid(response, gold): return os.getpid()
def hashed(response, gold): return hash(response) % 1_000_003  # sympy orders what it reads by such numbers
def torch_loaded(response, gold): return "torch" in sys.modules
def bonus(response, gold): return math_reward(response, gold) + 0.5
def half(response, gold):
    import fractions
    return fractions.Fraction(1, 2)
def address_space(response, gold):
    import resource
    return resource.getrlimit(resource.RLIMIT_AS)[0]
def refusals(response, gold):
    import subprocess
    from common import verifiers
    verifiers._math_verify()
    tries = [
        lambda: eval("1"), lambda: exec("1"), lambda: compile("1", "x", "eval"), lambda: open("/etc/passwd"),
        lambda: open(gold, "w"), lambda: os.open(gold, os.O_CREAT), lambda: os.mkdir(gold),
        lambda: os.remove(gold), lambda: os.listdir("/"), lambda: os.system("true"), lambda: os.kill(0, 0),
        lambda: subprocess.run(["true"]), lambda: __import__("socket").socket().bind(("", 0)),
    ]
    refused = 0
    for attempt in tries:
        try:
            with verifiers._seal():
                attempt()
        except PermissionError as error:
            refused += "while an answer is verified" in str(error)
    eval("1")  # and only while sealed
    return len(tries) - refused
"""


@pytest.fixture(scope="module", autouse=True)
def users(tmp_path_factory):
    folder = tmp_path_factory.mktemp("users")
    (folder / "user_verifiers.py").write_text(USERS)
    sys.path.insert(0, str(folder))
    import user_verifiers

    yield user_verifiers
    sys.path.remove(str(folder))
    verifiers.close()


# The published rules.


@pytest.mark.parametrize("case", LUFFY, ids=lambda case: case["name"])
def test_math_reward_agrees_with_luffys_code(case):
    assert math_reward(case["response"], case["gold"]) == case["reward_v3"]
    assert math_reward(case["response"], case["gold"], think_gate=False) == case["reward_v4_nothink"]
    assert grade([case["response"]], [case["gold"]], verifier="strict_box")[0].reward == case["oat_slow"]


@pytest.mark.parametrize("case", BRIDGE, ids=lambda case: case["completion"][-24:])
def test_boxed_reward_agrees_with_bridges_code(case):
    assert boxed_reward(case["completion"], case["gt"]) == case["score0"]
    assert grade([case["completion"]], [case["gt"]], verifier="boxed")[0].reward == case["score0"]


def test_boxed_compares_letter_by_letter():
    assert [boxed_reward(rf"\boxed{{{text}}}", "5") for text in ("5", " 5", "5 ", "5.", "05")] == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "response, reward, status",
    [
        (r"</think> \boxed{42}", 1, "ok"),
        (r"</think> 7 </think> \boxed{42}", 0, "ok"),
        (r"</think> \boxed{42} </think> \boxed{7}", 1, "ok"),
        (r"\boxed{42}", 0, "unparsable"),
        (r"\boxed{42} </think> done", 0, "unparsable"),
        (r"</think>", 0, "unparsable"),
        (r"</think> \boxed{41}", 0, "ok"),
    ],
)
def test_the_answer_stands_between_the_first_two_tags(response, reward, status):
    assert grade([response], ["42"])[0][:2] == (reward, status)


@pytest.mark.parametrize(
    "text, box",
    [
        (r"\boxed{42} no wait \boxed{7}", "7"),
        (r"\boxed{42} \boxed{7}", "7"),
        (r"\boxed{1} and \boxed{2}", "1,2"),
        (r"\boxed{1},\boxed{2} or \boxed{3}", "1,2,3"),
        (r"\boxed{9} is wrong, \boxed{1}, \boxed{2}", "1,2"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\fbox{3} then \boxed {4}", "4"),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxed 5", None),
        ("no box", None),
    ],
)
def test_the_last_box_wins_and_joined_boxes_are_one_answer(text, box):
    assert last_boxed(text) == box


def test_math_lets_the_last_box_win():
    responses = [r"\boxed{42} no wait \boxed{7}", r"\boxed{42} \boxed{7}", r"It is \boxed{1} and \boxed{7}"]
    assert [v.reward for v in grade(responses, ["7"] * 3, verifier="full")] == [1, 1, 0]
    assert [v.reward for v in grade(responses, ["42"] * 3, verifier="full")] == [0, 0, 0]
    assert grade(responses[2:], ["7,1"], verifier="full")[0].reward == 1


def test_every_gold_of_the_validation_file_equals_itself():
    golds = vectors("val_golds")
    verdicts = grade([f"hm </think> \\boxed{{{gold}}}" for gold in golds], golds, timeout=20)
    rejected = [gold for gold, verdict in zip(golds, verdicts, strict=True) if verdict != Verdict(1.0, "ok")]
    assert len(golds) == 1036
    assert all("$ $" in gold for gold in rejected) and len(rejected) <= 1  # Math-Verify 0.6 rejects it as well


def test_pairs_no_false_acceptance_and_97_percent_of_the_acceptances():
    pairs = vectors("math_pairs")
    golds, responses = [pair["gold"] for pair in pairs], [pair["response"] for pair in pairs]
    accepted = [verdict.reward == 1 for verdict in grade(responses, golds, verifier="full", timeout=20)]
    assert [pair for pair, yes in zip(pairs, accepted, strict=True) if yes and not pair["accept"]] == []
    missed = [pair for pair, yes in zip(pairs, accepted, strict=True) if pair["accept"] and not yes]
    assert len(missed) <= 1, missed  # of 139


@pytest.mark.parametrize(
    "response, label",
    [
        (r"</think> \boxed{C}", "C"),
        (r"\boxed{\text{(b)}}", "B"),
        (r"\boxed{D) shorter days}", "D"),
        ("The answer is A. Not B.", "A"),
        ("Maybe the answer is A.\n**Answer: B**<|im_end|>", "B"),
        ("So it must be:\nC) shorter days", "C"),
        ("It rotates faster.\n(3)", "3"),
        ("The answer is B </think> The answer is C", "C"),
        (r"The answer is Earth.", None),
        (r"\boxed{longer}", None),
        ("A good question! I cannot say.", None),
        (r"\boxed{3.5}", None),
        (r"\boxed{B)42}", "B"),
        ("**Final Answer**: B", "B"),
        (r"The answer is \textbf{C}.", "C"),
        ("The answer is C, since answer A is wrong", "C"),
        ("To answer 2 questions at once: so\nC)", "C"),
        (r"\boxed{B, C}", None),
        ("The answer is A or B", None),
        ("The answer is A dog", None),
        ("The answer is A, because B is wrong", "A"),
        ("Answer: B. 12 dogs", "B"),
        ("Answer: A. But actually B.", None),
        ("If the answer is A, it barks.\nThe answer is B.", "B"),
        ("The options are:\nA) no\nB) maybe\nC) this is", None),
        ("A) no\nB) yes\nC) no\n\nB) yes", "B"),
        ("The correct answer is:\n\nA) fast\n\nThe incorrect answer is:\n\nB) safe", "A"),
        ("**A**\n\nWait, that is wrong: dogs cannot fly. So it must be B.", None),
        ("**A**\n\nIt is the largest of them.", "A"),
        ("Option A: C\nOption B: NO_{2}\nOption C: O_{2}\nOption D: CO\n\n**B**", "B"),
        ("**Answer: B**\n\nOption A: 4 - too small\nOption C: 9 - too large", "B"),
        ("The correct answer is option B: 4.", "B"),
        ("The most popular answer is A.\n\nThe correct answer is **B** (cats).", "B"),
        ("If we ignore friction, the answer is A.\n\nWith friction, the answer is cats, B.", None),
        ("The answer is B (planetary years become longer).", "B"),
        (r"\boxed{\text{B (longer years)}}", "B"),
        ("The answer is B (C).", None),
        ("The answer is B (or C).", None),
        ("The answer is B (incorrect).", None),
        ("The answer is A.\n\nStatement A is wrong, all others are true.", "A"),  # to "Which statement is wrong?"
        ("The answer is B. One might think that B is not correct.", "B"),
        ("The correct option: B: cats", "B"),
        ("The correct answer is **B) years**.\n\nWhy the others are wrong:\n- **A) days**: This is incorrect.\n"
         "- **C) weeks**: That is not right.", "B"),
        ("The answer is B.\n\nA is tempting, but A is wrong.", "B"),
        ("The answer is **B**.\n\n- **B**: This is incorrect.", None),
        ("The answer is **B**.\n\n- **A**: This is correct.\n- **B** is incorrect, as dogs cannot fly.", "B"),
        ("The answer is B.\n\nA: I said this is wrong, but wait, that is wrong.", None),
        ("\\boxed{B}\n\n- A: too small\n- C: too large", "B"),
        ("\\boxed{B}\n\n(A) is too small", "B"),
        ("\\boxed{B} or C", None),
        ("答案是（B）。", "B"),
        ("The answer is B!", "B"),
        ("B ✅", "B"),
        (r"\boxed{\rm B}", "B"),
        ("It is larger.\n#### B", "B"),
        ("#### B. What follows\nIt is larger.", None),
        ("The answer is (B) cats or (C) dogs.", None),
        ("The answer is (D) Either B or (C).", "D"),
        (r"\boxed{B} rather than \boxed{C}", None),
        ("\\boxed{B'}", None),  # the complement of B
        ("The answer is 'B'.", "B"),
        ("The answer is (B) False, False.", "B"),  # the option's text
        ("B. Not true", "B"),
        ("答案是B或C。", None),
        ("\\boxed{B}和\\boxed{C}", None),
        ("答案是B不对。", None),
        ("答案是B。等等，不对，应该是C。", None),
        ("答案是B. 错误", "B"),
        ("答案是B，其余选项错误。", "B"),
    ],
)
def test_mcq_reads_the_label(response, label):
    for gold in "ABCD3":
        expected = (float(gold == label), "ok") if label else (0.0, "unparsable")
        assert grade([response], [gold], verifier="mcq")[0][:2] == expected


def test_mcq_names_a_gold_that_is_no_label():
    for gold in ("ii", "10", "A, C", "Paris", ""):
        assert grade([r"\boxed{A}"], [gold], verifier="mcq") == [Verdict(0.0, "unparsable", f"gold unreadable: {gold}")]


def test_no_wrong_choice_is_accepted_and_95_percent_of_the_right_ones_are():
    """Answers of many forms, two thirds of them written without knowledge of the rule."""
    cases = vectors("choices")
    for verifier, refused in (("mcq", 11), ("exact", 0)):
        mine = [case for case in cases if case["verifier"] == verifier]
        verdicts = grade([c["response"] for c in mine], [c["gold"] for c in mine], verifier=verifier)
        accepted = [case["right"] for case, verdict in zip(mine, verdicts, strict=True) if verdict.reward]
        assert accepted.count(0) == 0
        assert accepted.count(1) >= sum(case["right"] for case in mine) - refused


@pytest.mark.parametrize(
    "response, gold, reward",
    [
        ("48/2 = <<48/2=24>>24\n#### 72", "72", 1),
        (r"\boxed{ 5 } #### 6", "5", 1),
        ("5 </think> 7\n", "7", 1),
        ("5 </think> 7\n", "5", 0),
        (r"\boxed{5.0}", "5", 0),
        ("#### 2,125", "2125", 1),
        ("#### 1,2", "12", 0),
        ("#### 1,2000", "12000", 0),
        ("#### 5, no:\n#### 6", "6", 1),
        ("#### 5, no:\n#### 6", "5, no:\n#### 6", 0),
    ],
)
def test_exact_compares_the_stripped_answer(response, gold, reward):
    assert grade([response], [gold], verifier="exact") == [Verdict(reward, "ok")]


@pytest.mark.parametrize("answer", [r"3 \times 10^{8}", r"3.0 \times 10^8", "300000000", "3e8"])
def test_strict_box_reads_golds_in_e_notation(answer):
    assert grade([rf"\boxed{{{answer}}}", r"\boxed{9}"], ["3e8"] * 2, verifier="strict_box", timeout=20)[0].reward == 1
    assert grade([r"\boxed{24 e}"], ["3e8"], verifier="strict_box", timeout=20)[0].reward == 0


# No text is ever a command.

arithmetic = st.recursive(
    st.integers(0, 50).map(str) | st.sampled_from(["0.5", "2.25", "10."]),
    lambda part: (
        st.builds("{}{}{}".format, part, st.sampled_from("+-*/"), part)
        | st.builds("({})".format, part)
        | st.builds("-{}".format, part)
        | st.builds("({})**{}".format, part, st.integers(0, 3))
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(arithmetic)
def test_arithmetic_builds_the_tree_of_sympy(text):
    from sympy import srepr
    from sympy.parsing.sympy_parser import parse_expr

    def tree(parse):
        try:
            return srepr(parse(text, evaluate=False))
        except (ZeroDivisionError, TypeError) as error:
            return type(error)

    assert tree(verifiers._arithmetic) == tree(parse_expr)


@pytest.mark.parametrize(
    "text", ["x", "exit()", "().__class__", "'a'", "[1]", "1 if 1 else 2", "True", "2(3)", "1j", "f''"]
)
def test_arithmetic_knows_numbers_alone(text):
    with pytest.raises(SyntaxError):
        verifiers._arithmetic(text)


def test_series_are_summed_without_lambdify():
    sums = {"e^2": r"\frac{2^n}{n!}", "2": r"\frac{1}{2^n}", r"\frac{\pi}{4}": r"\frac{(-1)^n}{2n+1}",
            "e": r"\frac{n}{n!}"}  # fmt: skip
    responses = [r"\boxed{\sum_{n=0}^{\infty} " + term + "}" for term in sums.values()]
    assert grade(responses, list(sums), verifier="full", timeout=30) == [Verdict(1.0, "ok")] * 4
    assert grade(responses[:1], ["e"], verifier="full", timeout=30) == [Verdict(0.0, "ok")]


def test_while_sealed_cpython_refuses_to_run_open_or_start_anything(tmp_path):
    assert grade(["x"], [str(tmp_path / "canary")], verifier="user_verifiers:refusals") == [Verdict(0.0, "ok")]
    assert not (tmp_path / "canary").exists()


PLACES = [
    "%s", "$%s$", r"\boxed{%s}", r"\[ %s \]", r"The final answer is $%s$. I hope", "answer: %s", r"\boxed{\text{%s}}",
    r"\boxed{\frac{%s}{2}}", r"\boxed{x_{%s}}", r"\boxed{\operatorname{%s}}",
    r"\boxed{\begin{pmatrix}%s\end{pmatrix}}", r"\boxed{2^{%s}}",
    r"\boxed{\sum_{n=0}^{\infty} \frac{1+n\cdot\text{%s}}{n!}+0}", r"\boxed{\{%s, 1\}}", "= %s",
    r"\boxed{\text{%s}(x)}", r"\boxed{x \in %s}", r"\boxed{\variable{%s}}", "1 + %s", r"\boxed{\int_0^1 %s dx}",
]  # fmt: skip


def test_code_in_an_answer_is_not_executed(tmp_path):
    canary = tmp_path / "canary"
    codes = [
        f'__import__("os").system("touch {canary}")',
        f"open('{canary}','w')",
        f'exec(compile("open(\'{canary}\',\'w\')","","exec"))',
        f"\\input{{|touch {canary}}}\\immediate\\write18{{touch {canary}}}",
        "{0.__class__.__mro__[1].__subclasses__()}%n%s",
        # Math-Verify 0.9 calls exit() for this one, in the place of a sum
        "[poly1d[n]for[poly1d.__class_getitem__]in[[exit]]][0]",
    ]
    responses = ["</think>" + place.replace("%s", code) for place in PLACES for code in codes]
    verdicts = grade(responses, [r"\sqrt{2}"] * len(responses), timeout=5)
    assert not canary.exists()
    assert {verdict.reward for verdict in verdicts} == {0.0}
    assert {verdict.status for verdict in verdicts} <= {"ok", "unparsable"}  # "error": a worker went with exit()


# No text stops the pool.

STUCK = [r"\boxed{9^{9^{9^9}}}", r"\boxed{((9!)!)!}", r"\boxed{10^{999999999}}", "answer: 9**9**9**9",
         r"\boxed{2^{-9^{9^9}}}"]  # fmt: skip
ODD = {
    "brackets": "(" * 2**20,
    "braces": r"\boxed{" + "{" * 2**19 + "}" * 2**19 + "}",
    "deep fractions": r"\boxed{" + r"\frac{" * 400 + "1" + "}{2}" * 400 + "}",
    "zero bytes": "\\boxed{\x004\x00}",
    "surrogates": "\\boxed{\ud8003\udfff}",
    "right to left": "\\boxed{\u202e24\u202c}",
    "boxes": r"\boxed{1}" * 10_000,
    "open boxes": r"\boxed{" * 10_000,
    "digits": r"\boxed{" + "1" * 10**6 + "}",
    "decimals": "0." + "3" * 10**6,
    "input": r"\boxed{\input{/etc/passwd}}",
    "format": r"\boxed{%s%n{0!r:>99999999}}",
    "dollars": "$" * 60_000,
    "newlines": "\n" * 10**6,
    "commas": r"\boxed{" + "," * 10_000 + "}",
    "huge identity": r"\boxed{\operatorname{eye}(9999999)}",
    "empty": "",
}


def test_hostile_texts_end_by_the_deadline_and_change_no_honest_verdict():
    rng = random.Random(0)
    golds = [str(rng.randrange(1000)) for _ in range(60)]
    golds += ["\\frac{1}{" + str(n) + "}" for n in range(2, 32)]
    honest = [(f"</think> So it is \\boxed{{{gold if n % 2 else '1' + gold}}}.", gold) for n, gold in enumerate(golds)]
    hostile = [("</think>" + text, "42") for text in [*STUCK, *ODD.values()]]
    mixed = [(item, n) for n, item in enumerate(honest + hostile)]
    rng.shuffle(mixed)
    start = time.monotonic()
    verdicts = grade([r for (r, _), _ in mixed], [g for (_, g), _ in mixed], workers=2, timeout=2)
    took = time.monotonic() - start
    by_item = {n: verdict for (_, n), verdict in zip(mixed, verdicts, strict=True)}
    assert [by_item[n] for n in range(len(honest))] == [Verdict(float(n % 2), "ok") for n in range(len(honest))]
    assert all(by_item[n].reward == 0 for n in range(len(honest), len(mixed)))
    assert Counter(by_item[len(honest) + n].status for n in range(len(STUCK))) == {"timeout": len(STUCK)}
    assert took < len(hostile) * (3 * 2 + 4)


@pytest.mark.parametrize("name", sorted(verifiers.IN_PROCESS))
def test_rules_on_text_are_linear_and_start_no_worker(name):
    verifiers.close()
    texts = [r"\boxed{" * 150_000, r"\boxed{1}" * 100_000, "answer is " * 100_000, "answer" + " " * 10**6, "(" * 10**6,
             "</think>" * 100_000, "\n" * 10**6, r"\text" * 200_000, "#" * 10**6,
             r"\boxed{1}," * 100_000 + "{" * 10**6]  # fmt: skip
    start = time.process_time()
    grade(texts, ["1"] * len(texts), verifier=name)
    assert time.process_time() - start < 5 and not verifiers._pools


def test_a_stuck_worker_is_killed_and_the_others_go_on(users):
    responses = ["", "python", "", "c", "", "deaf", "", ""]
    start = time.monotonic()
    verdicts = grade(responses, [""] * 8, verifier=users.hang, workers=2, timeout=0.7)
    assert [v.status for v in verdicts] == ["timeout" if response else "ok" for response in responses]
    assert [v.reward for v in verdicts] == [float(not response) for response in responses]
    assert time.monotonic() - start < 20


def test_errors_and_crashes_are_statuses(users):
    responses = ["raise", "", "exit", "segfault", "", "nan", "inf", "none", "silent", "hog", ""]
    verdicts = grade(responses, [""] * 11, verifier=users.bad, workers=2)
    status = {"": "ok", "silent": "unparsable"}
    assert [v.status for v in verdicts] == [status.get(response, "error") for response in responses]
    assert [v.reward for v in verdicts] == [float(not response) for response in responses]
    details = {r: v.detail for r, v in zip(responses, verdicts, strict=True)}
    assert "no such key" in details["raise"] and "MemoryError" in details["hog"] and "-11" in details["segfault"]


def test_the_first_failure_of_a_reward_function_is_printed_with_its_exception(users, capfd):
    verifiers._announced.clear()
    verdicts = [grade(["none", "", "raise"], [""] * 3, verifier=users.bad, workers=1) for _ in range(2)]
    assert verdicts[0] == verdicts[1] and [v.status for v in verdicts[0]] == ["error", "ok", "error"]
    message = capfd.readouterr().err
    assert message.count("failed on 2 of 3 answers") == 1 and "returned None, not a number" in message


def test_workers_have_an_address_space_limit_and_no_torch(users):
    assert grade(["x"], ["x"], verifier=users.address_space)[0].reward == verifiers.MEMORY
    assert "torch" in sys.modules or __import__("torch")
    assert grade(["x"], ["x"], verifier=users.torch_loaded) == [Verdict(0.0, "ok")]


def test_a_worker_that_grew_is_replaced(users):
    first, second = grade(["x"] * 2, ["x"] * 2, verifier=users.grow, workers=1, timeout=60)
    assert first.status == second.status == "ok" and first.reward != second.reward


def test_every_worker_hashes_texts_alike(users):
    found = set()
    for _ in range(2):
        verifiers.close()
        found.add(grade(["x"], [""], verifier=users.hashed, workers=1)[0])
    assert len(found) == 1


def test_workers_are_reused_and_closed(users):
    first, second = (grade(["x"], ["x"], verifier=users.pid, workers=1)[0].reward for _ in range(2))
    assert first == second
    verifiers.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)
    assert grade(["x"], ["x"], verifier=users.pid, workers=1)[0].reward != first


def test_an_interrupt_on_the_terminal_reaches_no_worker(users):
    [verdict] = grade(["x"], ["x"], verifier=users.pid, workers=1)
    assert os.getsid(int(verdict.reward)) == verdict.reward  # a session of its own


def test_verdicts_do_not_depend_on_the_number_of_workers_or_the_order():
    golds = vectors("val_golds")[::12]
    items = [(f"</think> \\boxed{{{golds[i - shift]}}}", golds[i]) for i in range(len(golds)) for shift in (0, 1)]
    order = list(range(len(items)))
    random.Random(1).shuffle(order)
    one = grade(*zip(*items, strict=True), workers=1, timeout=20)
    three = grade(*zip(*(items[n] for n in order), strict=True), workers=3, timeout=20)
    assert [one[n] for n in order] == three


def test_the_ranks_of_a_machine_share_its_cores(monkeypatch):
    verifiers.close()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    grade([r"</think>\boxed{1}"] * 4, ["1"] * 4)
    assert len(verifiers._pools["math"]) == 1


def test_a_users_verifier_may_build_on_math_reward(users):
    verdicts = grade([r"</think>\boxed{1/2}", r"\boxed{1/2}"], ["0.5", "0.5"], verifier=users.bonus)
    assert [v.reward for v in verdicts] == [1.5, 0.5]
    assert grade(["x"], ["x"], verifier=users.half) == [Verdict(0.5, "ok")]  # any number


def test_order_is_kept_and_nothing_is_nothing(users):
    responses = ["x" * n for n in range(50)]
    verdicts = grade(responses, responses, verifier=users.length, workers=3)
    assert [v.reward for v in verdicts] == [n / 2 for n in range(50)]
    assert grade([], []) == []


def test_grade_from_several_threads(users):
    verifiers.close()
    results = {}

    def run(n):
        results[n] = [v.reward for v in grade(["x" * n] * 20, [""] * 20, verifier=users.length, workers=2)]

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [n / 2] * 20 for n in range(4)}
    assert len(verifiers._workers) <= 2  # of all calls together


def test_grading_later_gives_the_same_verdicts_and_leaves_the_caller_free(users):
    start = time.monotonic()
    slow = grade_later(["deaf"], ["1"], verifier=users.hang, timeout=6.0, workers=3)
    first = grade_later([""], ["1"], verifier=users.hang, workers=3)
    jobs = [grade_later(["</think>\\boxed{2}"] * n, [2] * n) for n in (3, 0, 1)]
    failing = grade_later(["2"], ["2"], verifier="nonsense")
    assert time.monotonic() - start < 0.5
    assert first.result() == [Verdict(1.0, "ok")] and not slow.done()  # an answer that hangs blocks no other call
    assert [job.result() for job in jobs] == [[Verdict(1.0, "ok")] * n for n in (3, 0, 1)]
    assert slow.result()[0].status == "timeout"
    with pytest.raises(ValueError, match="nonsense"):
        failing.result()


def test_a_call_whose_workers_are_closed_has_no_verdicts(users):
    grade(["x"], [""], verifier=users.hang)
    job = grade_later(["deaf"], ["1"], verifier=users.hang, timeout=60.0)
    time.sleep(0.5)
    verifiers.close()
    with pytest.raises(RuntimeError, match="while this call went on its workers were closed"):
        job.result(10)


def test_workers_that_died_leave_no_files_open(users):
    verifiers.close()
    grade(["x"], [""], verifier=users.length, workers=1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        idle = verifiers._pools[f"{users.__name__}:length"]
        idle.append(verifiers._Worker(f"{users.__name__}:length"))
        for worker in idle:
            worker.process.kill()
            worker.process.wait()
        assert grade(["xx"], [""], verifier=users.length, workers=1) == [Verdict(1.0, "ok")]
        assert grade(["segfault"], [""], verifier=users.bad, workers=1)[0].status == "error"
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_interrupted_call_leaves_no_answer_to_the_next(users, monkeypatch):
    both = threading.Barrier(2)  # an item that begins after the close would start a worker of its own

    def interrupt(*_, **__):
        both.wait(60)
        raise KeyboardInterrupt

    grade(["x"] * 2, [""] * 2, verifier=users.length, workers=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(verifiers, "wait", interrupt)
        grade(["xx"] * 2, [""] * 2, verifier=users.length, workers=2)
    assert not verifiers._workers
    assert [v.reward for v in grade(["xxxx"] * 2, [""] * 2, verifier=users.length, workers=2)] == [2, 2]


def test_nothing_of_an_interrupted_call_goes_on(users, monkeypatch):
    graded = []

    def grade_one(spec, response, gold, timeout):
        graded.append(response)
        if response == "interrupt":
            raise KeyboardInterrupt
        time.sleep(0.05)
        return Verdict(1.0, "ok")

    monkeypatch.setattr(verifiers, "_grade_one", grade_one)
    with pytest.raises(KeyboardInterrupt):
        grade(["interrupt"] + ["x"] * 50, [""] * 51, verifier=users.length, workers=1)
    time.sleep(0.5)
    assert len(graded) < 5  # one that had begun ended


def test_time_without_a_core_is_not_counted_up_to_twice_the_deadline(users, monkeypatch):
    grade(["x"], [""], verifier=users.hang, workers=1)  # a worker is ready
    start = time.monotonic()
    monkeypatch.setattr(verifiers._Worker, "starved", lambda self: time.monotonic() - start)  # it never gets a core
    [verdict] = grade(["python"], [""], verifier=users.hang, workers=1, timeout=0.4)
    assert verdict.status == "timeout" and 1.1 < time.monotonic() - start < 10


STOPPED = """if True:
    import os, subprocess
    from common import verifiers
    how = dict(verifier="it_is_slow:slow", workers=1, timeout=3.0)
    verifiers.grade([""], [""], **how)
    pids = f"{verifiers._pools['it_is_slow:slow'][0].process.pid} {os.getpid()}"
    stop = f"sleep 0.5; kill -STOP {pids}; sleep 4; kill -CONT {pids}"
    subprocess.Popen(["sh", "-c", stop], start_new_session=True)
    print(verifiers.grade(["x"], [""], **how)[0].status)
"""


def test_time_in_which_all_are_stopped_is_not_counted(users):
    """As those of a job that Slurm suspends."""
    folder = Path(users.__file__).parent
    (folder / "it_is_slow.py").write_text("import time\n\ndef slow(*_):\n    time.sleep(1.5)\n    return 1.0\n")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{folder}"}
    done = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True, env=environment)
    assert done.stdout == "ok\n", done.stderr


def test_bad_calls_say_what_is_wrong(users):
    with pytest.raises(ValueError, match="2 responses but 1 golds"):
        grade(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="mathh.*strict_box"):
        grade(["a"], ["a"], verifier="mathh")
    with pytest.raises(ValueError, match="lambda.*module of its own"):
        grade(["a"], ["a"], verifier=lambda response, gold: 1.0)
    with pytest.raises(TypeError, match="string"):
        grade([None], ["a"])
    with pytest.raises(ImportError, match="no_such_module"):
        grade(["a"], ["a"], verifier="no_such_module:reward")
    with pytest.raises(ImportError, match="no_such_function"):
        grade(["a"], ["a"], verifier="user_verifiers:no_such_function")


def test_a_worker_that_does_not_start_is_an_error_with_its_exit_code(users, monkeypatch):
    ends = {"dies": ("import os; os._exit(3)", 60.0, 3), "waits": ("import time; time.sleep(600)", 1.0, -9)}
    for name, (text, limit, code) in ends.items():
        (Path(users.__file__).parent / f"it_{name}.py").write_text(text)
        monkeypatch.setattr(verifiers, "START_TIMEOUT", limit)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=f"verifier it_{name}:reward: a worker did not start, exit code {code}"):
            grade(["x"], ["x"], verifier=f"it_{name}:reward", workers=1)
        assert time.monotonic() - start < 30 and not verifiers._workers


def test_a_gold_may_be_a_number():
    assert grade([r"</think>\boxed{5}"], [5])[0].reward == boxed_reward(r"\boxed{5}", 5) == 1


# Processes.


def script(users, body):
    """A fresh process that runs `body` with this repository and the users' module to hand."""
    path = os.pathsep.join([str(ROOT), str(Path(users.__file__).parent)])
    words, environment = [sys.executable, "-c", textwrap.dedent(body)], os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)


def test_the_programs_of_a_verifier_end_with_its_worker(users, tmp_path):
    [verdict] = grade(["program"], [tmp_path / "pid"], verifier=users.hang, workers=1, timeout=1)
    assert verdict.status == "timeout"
    wait_for_the_end([int((tmp_path / "pid").read_text())])


@pytest.mark.parametrize("response", ["idle", "forked", "forked and busy", "c", "deaf", "program"])
def test_workers_die_with_a_killed_parent(users, response, tmp_path):
    parent = script(
        users,
        f"""
        import os, time
        from common import verifiers
        verifiers.grade([""] * 20, [""] * 20, verifier="user_verifiers:hang", workers=2)
        print(*(worker.process.pid for worker in verifiers._pools["user_verifiers:hang"]), flush=True)
        if {response!r} == "forked and busy":
            verifiers.grade_later(["deaf"] * 2, [""] * 2, verifier="user_verifiers:hang", workers=2, timeout=600)
            time.sleep(0.2)
        if "forked" in {response!r} and os.fork() == 0:  # a child that outlives its parent
            time.sleep(20)
            os._exit(0)
        if "forked" in {response!r} or {response!r} == "idle":
            time.sleep(600)
        golds = [{str(tmp_path / "pids")!r}] * 2
        verifiers.grade([{response!r}] * 2, golds, verifier="user_verifiers:hang", workers=2, timeout=600)
        """,
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.5)  # they have their items in hand
    if response == "program":
        pids += map(int, (tmp_path / "pids").read_text().split())
        assert len(pids) == 4
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for_the_end(pids)


def wait_for_the_end(pids):
    deadline = time.monotonic() + 10
    while alive := {pid for pid, *_ in processes()} & set(pids):
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def test_a_forked_child_grades_with_workers_of_its_own(users):
    process = script(
        users,
        """
        import os
        from common.verifiers import close, grade
        mine = grade(["x"], [""], verifier="user_verifiers:pid", workers=1)[0].reward
        if os.fork() == 0:
            other = grade(["x"], [""], verifier="user_verifiers:pid", workers=1)[0].reward
            close()  # its own workers alone
            os._exit(int(other == mine))
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
        assert grade(["x"], [""], verifier="user_verifiers:pid", workers=1)[0].reward == mine
        print("done")
        """,
    )
    assert process.communicate(timeout=60)[0] == "done\n"


def test_a_session_that_imports_from_its_folder_may_change_it():
    body = "import os; from common.verifiers import grade; os.chdir('/'); print(grade(['5'], ['5'], verifier='robust'))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run([sys.executable, "-c", body], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "reward=1.0" in found.stdout, found.stderr


def test_a_verifier_of_the_script_itself_is_refused_by_name(users):
    process = script(
        users,
        """
        from common.verifiers import grade
        def reward(response, gold): return 1.0
        try:
            grade(["a"], ["a"], verifier=reward)
        except ValueError as error:
            print(error)
        """,
    )
    assert "__main__:reward" in process.communicate(timeout=60)[0]


def test_the_benchmark_grades_hostile_texts_among_honest_ones(tmp_path):
    from benchmarks import grading

    solutions = [{"is_correct": n % 2 == 0, "solution": f"A: {n + n % 2}"} for n in range(6)]
    rows = [{"question": "?", "ground_truth": f"so\nA: {n}", "small": s} for n, s in enumerate(solutions)]
    found = grading.solutions_a_second(Path(write_rows(tmp_path / "solutions.jsonl", rows)), "strict_box", 1)
    assert (found["model"], found["answers"], found["verdicts_of_the_authors"]) == ("small", 6, 6)
    found = grading.mixed(8, workers=2, timeout=1.0)
    assert found["honest_changed"] == 0 and found["hostile_rewarded"] == 0 and not found["canary"]
    assert sum(found["hostile_status"].values()) == 8
