r"""Completion + gold answer -> reward. Never hangs, never executes what a model wrote.

    grade(responses, golds, verifier="math")  ->  [Verdict(reward=1.0, status="ok"), ...]

Rules by name (`VERIFIERS`); a user's own is a function (response, gold) -> float of some module, or "module:function":

    math        LUFFY's reward: the text between the first and the second </think>, by Math-Verify; no tag: 0
    full        the same on the whole text (LUFFY's reward 4, for models that do not think in tags)
    strict_box  as LUFFY's evaluation (oat): after </think> if there is one; only the last \boxed{} counts
    boxed       BRIDGE's reward: the FIRST \boxed{...} up to its first "}", equal to the gold as a string, unstripped
    exact       the last \boxed{}, else what follows the last ####, else the whole text after </think>: equal stripped
    mcq         the letter (or digit) of a multiple-choice answer: last \boxed{}, else "answer is X", else last line

Status: "ok": a verdict was reached, right or wrong. "unparsable": nothing to compare, as no answer could be extracted
from the response (or from the gold). "timeout": the deadline came first. "error": the verifier raised, or its process
died. The reward is 0 in all but the first, and `detail` says why: count them, a high share is a fault and not a policy.

Traps
- `\boxed{42} no wait \boxed{7}` is 7: the last box wins. Math-Verify 0.6, with which LUFFY was published, joined boxes
  only across ",", "and" or "or"; 0.9 joins whatever is close and reads {42, 7}. The rule of 0.6 is kept.
- sympy's parse_expr is eval, and lambdify writes Python source with the names of symbols in it. Both are reached by
  ordinary answers: \sum_{n=0}^\infty \frac{1+n\text{[...]}}{n!} runs what stands in the brackets. While a text is in
  Math-Verify's hands here, both are replaced and CPython itself refuses to run, open or start anything (`_audit`).
- Math-Verify's own time-outs (SIGALRM) are off. They need a main thread, cannot stop a long C call, leave sympy's
  caches half-written and turn a slow answer into a wrong one. Here the parent kills the process and starts another.
"""

import ast
import atexit
import collections
import contextlib
import fcntl
import functools
import importlib
import json
import logging
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import wait
from typing import NamedTuple

MAX_CHARS = 65_536        # only the end of a longer text is examined by math, full and mcq: the last answer wins
MEMORY = 4 << 30          # bytes of address space that one worker may have
GROWTH = 512 << 10        # kilobytes of resident memory by which a worker may grow before it is replaced
START_TIMEOUT = 120.0     # seconds in which a worker must have imported its verifier


class NoAnswer(ValueError):
    """A verifier raises this when there is nothing to compare: reward 0, status "unparsable"."""


class Verdict(NamedTuple):
    reward: float
    status: str  # "ok" | "timeout" | "error" | "unparsable"
    detail: str | None = None


# ---------------------------------------------------------------------------------------------- rules on text alone
# No regular expression here can take more than linear time: they run in the caller's process, without a deadline.


def boxed_reward(response: str, gold: str) -> float:
    r"""BRIDGE's rule (`reward/naive.py`): 1.0 iff the first `\boxed{...}`, up to its first "}", is `gold` exactly.

    >>> boxed_reward(r"x \boxed{5} then \boxed{4}", "5"), boxed_reward(r"\boxed{5.0}", "5")
    (1.0, 0.0)
    """
    return _judge(_boxed, response, gold).reward


def _boxed(response, gold):
    # the regular expression \\boxed\{([^}]*)\} of the original, without its quadratic time on unclosed boxes
    start = response.find(r"\boxed{")
    end = response.find("}", start)
    if start < 0 or end < 0:
        raise NoAnswer("no closed box")
    return response[start + len(r"\boxed{") : end] == str(gold)


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{}` or `\fbox{}`, braces balanced; None if there is none or it is not closed.

    Boxes with nothing but a comma, "and" or "or" between them are one answer: `\boxed{1} and \boxed{2}` is "1,2".
    """
    found, end = collections.deque(), len(text)
    while (start := max(text.rfind(r"\boxed", 0, end), text.rfind(r"\fbox", 0, end))) >= 0:
        depth, close, opening = 0, None, re.compile(r"\\f?box(?:ed)?\s*(?=\{)").match(text, start, end)
        for brace in re.compile("[{}]").finditer(text, opening.end(), end) if opening else ():
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                close = brace.end()
                break
        if close is None or (found and not re.compile(r"\s*(?:and|or|,)\s*").fullmatch(text, close, end)):
            break
        found.appendleft(text[opening.end() + 1 : close - 1].strip())
        end = start
    return ",".join(found) if found else None


def _after_think(response):
    """What follows </think>, up to a second one; the whole text if there is no tag."""
    return response.split("</think>", 2)[min(1, response.count("</think>"))]


def _exact(response, gold):
    text = _after_think(response)
    answer = last_boxed(text)
    if answer is None:
        answer = text.rpartition("####")[2]
    if not answer.strip():
        raise NoAnswer("no answer")
    return answer.strip() == str(gold).strip()


def _mcq(response, gold):
    text = _after_think(response)[-MAX_CHARS:]
    box = last_boxed(text)
    if box is not None:
        label = _label(re.sub(r"\\(?:text|mathrm|mathbf|textbf)\b|[{}$]", "", box))
    else:
        said = re.findall(r"(?i:answer)(?i: is)?[ :*]{0,4}(?i:option |choice )?[(*$]{0,3}([A-Z]|[0-9])\b(?!['.]\w)", text)
        label = said[-1] if said else _label(text.rstrip().rpartition("\n")[2])
    if label is None:
        raise NoAnswer("no label")
    return label == (_label(str(gold)) or str(gold).strip().upper())


def _label(text):
    found = re.match(r"[\s(*]{0,4}([A-Za-z]|[0-9])(?:[).:,*]|\s{0,4}(?:<\||$))", text)
    return found[1].upper() if found else None


# --------------------------------------------------------------------------------------------- rules by Math-Verify
# These run in worker processes only: they may take for ever, or all memory.


def math_reward(response: str, gold: str, *, think_gate: bool = True) -> float:
    r"""LUFFY's reward, 1.0 or 0.0 (`mix_src/math_verify_reward.py`; specs A4).

    think_gate: the answer is what stands between the first and the second </think>, and without one the reward is 0
    (`reward_impl_version` 3, all published runs); False: the whole text (version 4). It is `grade` of one item, in a
    worker: safe on any text and from any thread, 0.0 after five seconds.

    >>> math_reward("<think>\nhm </think>\nIt is \\boxed{0.5}", r"\frac{1}{2}"), math_reward(r"\boxed{2}", "2")
    (1.0, 0.0)
    """
    name = "math" if think_gate else "full"
    if _in_worker:  # a user's verifier builds on this one
        return _judge(VERIFIERS[name], response, gold).reward
    return grade([response], [gold], verifier=name, workers=1)[0].reward


def _math(response, gold):
    if "</think>" not in response:
        raise NoAnswer("no </think>")
    return _compare(_after_think(response), gold)


def _full(response, gold):
    return _compare(response, gold)


def _strict_box(response, gold):
    box = last_boxed(_after_think(response))
    if not box:
        raise NoAnswer("no closed box")
    return box == str(gold).strip() or _compare(r"\boxed{%s}" % box.replace("\n", " "), gold)


def _compare(text, gold):
    parse, verify, seed = _math_verify()
    with _seal():
        seed(0)  # sympy draws random points and random orders: the same text must get the same verdict
        answer = parse(text[-MAX_CHARS:], parsing_timeout=None)
        truth = parse(f"${gold}$", parsing_timeout=None)
        if not answer or not truth:
            raise NoAnswer("no answer in the response" if truth else "no answer in the gold")
        return verify(truth, answer, timeout_seconds=None)


VERIFIERS = {"math": _math, "full": _full, "strict_box": _strict_box, "boxed": _boxed, "exact": _exact, "mcq": _mcq}
IN_PROCESS = {"boxed", "exact", "mcq"}  # string comparison can neither hang nor crash: no worker needed


# ------------------------------------------------------------------------------------------------------- the seal


_sealed = False  # while True, a model's text is in Math-Verify's hands
_in_worker = False


@contextlib.contextmanager
def _seal():
    global _sealed
    _sealed = True
    try:
        yield
    finally:
        _sealed = False


@functools.cache
def _math_verify():
    """Import Math-Verify and close its ways to eval and exec; -> (parse, verify, seed). Changes sympy: workers only."""
    import latex2sympy2_extended.latex2sympy2 as latex
    import latex2sympy2_extended.math_normalization as normalization
    import math_verify.parser
    import sympy.core.evalf
    import sympy.core.random
    import sympy.parsing.sympy_parser
    import sympy.polys.rootoftools

    def swap(function, safe, *modules):
        def either(*args, **kwargs):
            return (safe if _sealed and not _importing() else function)(*args, **kwargs)

        for module in modules:
            setattr(module, function.__name__, either)

    swap(sympy.parse_expr, _arithmetic, sympy.parsing.sympy_parser, math_verify.parser, latex)
    swap(sympy.lambdify, _polynomial, sympy.core.evalf, sympy.polys.rootoftools)
    extract = normalization.extract_boxed_content
    normalization.extract_boxed_content = lambda text, mode="last": (
        mode == "last" and last_boxed(text) or extract(text, mode)
    )
    # rollouts of one prompt share the gold and often the answer; the parser's own cache holds 20
    parse_latex = math_verify.parser.parse_latex_cached.__wrapped__
    math_verify.parser.parse_latex_cached = functools.lru_cache(2048)(parse_latex)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # else it warns that its time-outs are off
    sys.addaudithook(_audit)
    return math_verify.parse, math_verify.verify, sympy.core.random.seed


def _arithmetic(text, *_, **__):
    """What sympy.parse_expr(text, evaluate=False) gives for numbers and + - * / ** ( ), from the syntax tree, not eval."""
    from sympy import Add, Float, Integer, Mul, Pow

    def build(node):
        match node:
            case ast.Constant(value=int(value)):
                return Integer(value)
            case ast.Constant(value=float()):
                return Float(ast.get_source_segment(text, node))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -build(operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return build(operand)
            case ast.BinOp(op=ast.Add() | ast.Sub()):
                return Add(*terms(node), evaluate=False)
            case ast.BinOp(op=ast.Mult() | ast.Div()):
                return Mul(*factors(node), evaluate=False)
            case ast.BinOp(op=ast.Pow(), left=left, right=right):
                return Pow(build(left), build(right), evaluate=False)
        raise SyntaxError(f"not arithmetic: {text[:80]}")

    def terms(node):
        match node:
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                return [*terms(left), *terms(right)]
            case ast.BinOp(op=ast.Sub(), left=left, right=right):
                return [*terms(left), Mul(-1, build(right), evaluate=False)]
        return [build(node)]

    def factors(node):
        match node:
            case ast.BinOp(op=ast.Mult(), left=left, right=right):
                return [*factors(left), *factors(right)]
            case ast.BinOp(op=ast.Div(), left=left, right=right):
                return [*factors(left), Pow(build(right), -1, evaluate=False)]
        return [build(node)]

    text = text.strip()
    return build(ast.parse(text, mode="eval").body)


def _polynomial(symbol, expression, *_, **__):
    """In place of lambdify, whose two callers here (sums of series, roots) want integer polynomials."""
    from mpmath import mpc
    from sympy import Poly

    coefficients = []
    for real, imaginary in (c.as_real_imag() for c in Poly(expression, symbol).all_coeffs()):
        if not (real.is_Integer and imaginary.is_Integer):
            raise NotImplementedError("not an integer polynomial")
        coefficients.append(mpc(int(real), int(imaginary)) if imaginary else int(real))
    return lambda x: functools.reduce(lambda total, c: total * x + c, coefficients, 0)


HARMLESS = {"import", "marshal.loads", "sys._getframe", "builtins.id", "object.__getattr__", "object.__setattr__"}


def _audit(event, args):
    """The second lock: while sealed, CPython may import what is installed, and run, open or start nothing else."""
    if not _sealed or event in HARMLESS or _importing():
        return
    if event == "compile" and args[1] == "<unknown>":  # ast.parse: a tree, no code
        return
    if event in ("compile", "exec") and sys._getframe(1).f_globals["__name__"] == "sympy.polys.monomials":
        return  # writes its products of monomials from a number of variables alone
    raise PermissionError(f"{event} while an answer is verified")


def _importing():
    """Is this called by a module of sympy that is being imported only now? Such code is not the answer's."""
    frame = sys._getframe(2)
    while frame and frame.f_code is not _compare.__code__:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


# ------------------------------------------------------------------------------------------------------- the pool


def grade(responses, golds, *, verifier="math", workers=None, timeout=5.0) -> list[Verdict]:
    """Grade each response against its gold, in order: one Verdict an item, whatever the text.

    verifier: a name in VERIFIERS, a function (response, gold) -> float that a fresh process can import, or
    "module:function". workers: processes; None: the cores this process may use, shared among the ranks of this
    machine. timeout: seconds for one item; its worker is then killed and replaced. The whole call ends within
    timeout * ceil(items / workers), and the verdicts do not depend on `workers`.
    Raises ValueError (lengths differ, unknown or unimportable verifier), TypeError (a response that is no string).
    """
    if len(responses) != len(golds):
        raise ValueError(f"{len(responses)} responses but {len(golds)} golds")
    if not all(isinstance(response, str) for response in responses):
        raise TypeError("every response must be a string")
    golds = [str(gold) for gold in golds]
    spec = _spec(verifier)
    if spec in IN_PROCESS:
        return [_judge(VERIFIERS[spec], response, gold) for response, gold in zip(responses, golds)]
    if workers is None:
        workers = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with _lock:
        try:
            return _run(spec, responses, golds, max(1, workers), timeout)
        except BaseException:  # Ctrl-C among them: no worker may keep an item of this call in hand
            close()
            raise


def close() -> None:
    """Stop all workers. The next `grade` starts new ones; at exit it happens by itself."""
    for worker in [worker for pool in _pools.values() for worker in pool]:
        worker.kill()
    _pools.clear()


_pools: dict[str, list["_Worker"]] = {}  # a worker serves one verifier, from its first use to the end of the process
_lock = threading.RLock()
atexit.register(close)


def _forget():  # a forked child (DataLoader) must not write into its parent's pipes
    global _lock
    _lock = threading.RLock()
    _pools.clear()


os.register_at_fork(after_in_child=_forget)


def _spec(verifier):
    """A name that a worker can resolve."""
    if isinstance(verifier, str):
        if verifier not in VERIFIERS and ":" not in verifier:
            raise ValueError(f"no verifier {verifier!r}: one of {', '.join(VERIFIERS)}, a function or module:function")
        return verifier
    spec = f"{verifier.__module__}:{verifier.__qualname__}"
    if verifier.__module__ == "__main__" or "<" in spec:
        raise ValueError(f"workers cannot import {spec}: define the verifier at the top of a module of its own")
    return spec


def _run(spec, responses, golds, workers, timeout):
    verdicts, todo = [None] * len(responses), collections.deque(range(len(responses)))
    pool = _pools.setdefault(spec, [])
    while todo or any(worker.item is not None for worker in pool):
        pool[:] = [worker for worker in pool if worker.alive()]
        busy = sum(worker.item is not None for worker in pool)
        while len(pool) < min(workers, busy + len(todo)):
            pool.append(_Worker(spec))
        for worker in pool[:workers]:
            if todo and worker.ready and worker.item is None:
                item = todo.popleft()
                worker.give(item, responses[item], golds[item], timeout)
        waiting = [worker for worker in pool if worker.item is not None or not worker.ready]
        left = min(worker.deadline for worker in waiting) - time.monotonic()
        answered = wait([worker.sock for worker in waiting], timeout=max(0.0, left))
        for worker in waiting:
            if worker.sock in answered or time.monotonic() >= worker.deadline:
                item, verdict = worker.item, worker.take(worker.sock in answered)
                if item is not None:
                    verdicts[item] = verdict
    return verdicts


class _Worker:
    """A process that grades one item at a time; the parent's side of it."""

    BOOT = """if True:
        import importlib.util, json, sys
        sys.path[:], name, file, *args = json.loads(sys.argv[1])
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module._serve(*args)"""

    def __init__(self, spec):
        # Neither fork (a CUDA process must not) nor multiprocessing's spawn (it would run the training script and
        # import torch): a bare interpreter that loads this file. JSON both ways: no pickle from such a process.
        self.sock, theirs = socket.socketpair()
        argument = json.dumps([sys.path, __name__, __file__, spec, theirs.fileno(), MEMORY])
        environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self.BOOT, argument],
                stdin=subprocess.PIPE,  # nothing is ever written: it is how a worker learns of our death
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C is ours to handle
            )
        self.spec, self.ready, self.item = spec, False, None
        self.lines = self.sock.makefile("r", encoding="ascii")
        self.deadline = time.monotonic() + START_TIMEOUT

    def alive(self):
        return self.item is not None or self.process.poll() is None

    def give(self, item, response, gold, timeout):
        self.item, self.deadline = item, time.monotonic() + timeout
        self.sock.settimeout(timeout)
        with contextlib.suppress(OSError):  # it died, or stopped reading: `take` says so
            self.sock.sendall(json.dumps([response, gold]).encode() + b"\n")

    def take(self, answered):
        """The worker's word on its item, or ours if it has none; a worker that failed is killed."""
        self.item, failed = None, "deadline"
        if answered:
            with contextlib.suppress(OSError, ValueError):
                reward, status, detail, retire = json.loads(self.lines.readline())
                if status == "failed":
                    raise ImportError(f"verifier {self.spec}: {detail}")
                self.ready = True
                if retire:
                    self.kill()
                return Verdict(reward, status, detail)
            failed = "crash"
        code = self.kill()
        if not self.ready:
            raise RuntimeError(f"verifier {self.spec}: worker did not start ({failed}, exit code {code})")
        if failed == "deadline":
            return Verdict(0.0, "timeout", "deadline")
        return Verdict(0.0, "error", f"worker died, exit code {code}")

    def kill(self):
        self.sock.close()
        self.lines.close()
        code = self.process.poll()
        self.process.kill()
        self.process.stdin.close()
        return self.process.wait() if code is None else code


# ------------------------------------------------------------------------------------------------- in the worker


def _judge(verify, response, gold):
    try:
        reward = float(verify(response, gold))
    except NoAnswer as error:
        return Verdict(0.0, "unparsable", str(error))
    except (Exception, SystemExit) as error:
        return Verdict(0.0, "error", f"{type(error).__name__}: {error}"[:200])
    return Verdict(reward, "ok") if math.isfinite(reward) else Verdict(0.0, "error", f"reward {reward}")


def _serve(spec, fd, memory):
    """A worker's whole life. It ends with its parent's, whatever it is doing and however the parent dies."""
    global _in_worker
    _in_worker = True
    # When the parent's end of stdin closes, the kernel sends SIGIO, whose default is to terminate: it needs no
    # cooperation of a verifier that sits in a C call. (PR_SET_PDEATHSIG would follow the thread that started us.)
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # verifiers may print
    sock = socket.socket(fileno=fd)

    def send(verdict, retire=False):
        sock.sendall(json.dumps([*verdict, retire]).encode() + b"\n")

    try:
        if spec in VERIFIERS:
            verify = VERIFIERS[spec]
            _judge(verify, r"</think>\boxed{1}", "1")  # imports, regular expressions and tables are not the first item's
        else:
            module, _, name = spec.partition(":")
            verify = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as error:
        return send(Verdict(0.0, "failed", f"{type(error).__name__}: {error}"))
    send(Verdict(0.0, "ready"))
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for line in sock.makefile("r", encoding="ascii"):
        verdict = _judge(verify, *json.loads(line))
        send(verdict, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start > GROWTH)
