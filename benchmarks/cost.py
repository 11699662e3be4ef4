"""What an update costs, measured: against its tokens, the group size, the vocabulary, the model's width, the ranks.

    python benchmarks/cost.py                        # all of it, into benchmarks/results/ (five minutes on two cores)
    python benchmarks/cost.py --only tokens ranks    # these again; the file keeps what it has of the others

An update is luffy.py's: forward and backward over packed rows, and AdamW. Every number is the median of --rounds, and
rounds go through all sizes in turn, so that what else the machine does falls on all of them. The floor beside each is
arithmetic: the operations of the matrix products (benchmarks/scale.py) over the rate at which this machine multiplies
matrices of such sizes, measured in the same rounds.

ranks: torchrun with 1 and with 2 ranks, one thread each, the same rows in all; beside it what two processes that only
multiply matrices get done compared to one, which is what this machine can do at most.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import luffy  # noqa: E402
from benchmarks.scale import Shape, update_flops  # noqa: E402
from common.trainer import init_world, launch, load_policy, make_optimizer, optimizer_step  # noqa: E402

SMALL = Shape(layers=4, hidden=256, intermediate=768, heads=4, kv_width=256, vocab=2048)
ROWS = dict(questions=8, group=8, prompt=32, response=(16, 240))  # of an update, where nothing else is said


class Update:
    """A model with random weights, random rows, and updates of the model on them."""

    def __init__(self, shape: Shape, world, micro_batch_tokens: int = 4096):
        self.shape, self.world = shape, world
        self.policy = load_policy("", world, from_config=shape.config())
        self.optimizer = make_optimizer(self.policy, lr=1e-6)
        words = ["--method", "grpo", "--max_response_tokens", "256", "--micro_batch_tokens", str(micro_batch_tokens)]
        self.args = luffy.parse_args(luffy.Args, words, method=luffy.METHODS, preset=luffy.PRESETS)

    def rows(self, questions: int, group: int, prompt: int, response: tuple[int, int]) -> list[luffy.Row]:
        """`questions` groups of `group` rows: prompts of `prompt` random ids, answers of response[0] to [1]."""
        rng = random.Random(0)

        def words(n):
            return [rng.randrange(2, self.shape.vocab) for _ in range(n)]

        made = []
        for g in range(questions):
            question = words(prompt)
            for i in range(group):
                answer = words(rng.randint(*response))
                logps = [0.0] * len(answer)
                made.append(luffy.Row(question, answer, g, False, logps, advantage=1.0 if i % 2 else -1.0))
        return made

    def tokens(self, rows) -> tuple[int, int]:
        """Tokens that are read, each prompt once, and those of them that are predicted."""
        questions = {row.group: len(row.prompt) for row in rows}
        answers = sum(len(row.response) for row in rows)
        return sum(questions.values()) + answers - len(rows), answers

    def seconds(self, rows) -> float:
        """Of one update: forward, backward, AdamW."""
        start = time.perf_counter()
        luffy.accumulate_gradient(self.policy, rows, None, self.args, self.world)
        optimizer_step(self.policy, self.optimizer, lr=1e-6, max_grad_norm=1.0)
        return time.perf_counter() - start


def flops_a_second(tokens: int, shape: Shape) -> float:
    """What this machine does of the MLP's products."""
    a, b = torch.randn(tokens, shape.hidden), torch.randn(shape.intermediate, shape.hidden)
    start = time.perf_counter()
    for _ in range(8):
        torch.nn.functional.linear(a, b)
    return 8 * 2 * a.numel() * shape.intermediate / (time.perf_counter() - start)


def sweep(cases: list[tuple], rounds: int, world) -> list[dict]:
    """(label, value, shape, rows' settings) each -> seconds, tokens, floor."""
    updates = {shape: Update(shape, world) for shape in {case[2] for case in cases}}
    all_rows = [updates[shape].rows(**settings) for _, _, shape, settings in cases]
    seconds: list[list[float]] = [[] for _ in cases]
    rates: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds + 1):
        for i, (_, _, shape, _) in enumerate(cases):
            rates[i].append(flops_a_second(4096, shape))
            seconds[i].append(updates[shape].seconds(all_rows[i]))
    found = []
    for (label, value, shape, _), rows, times, rate in zip(cases, all_rows, seconds, rates, strict=True):
        read, answers = updates[shape].tokens(rows)
        floor = update_flops(shape, read, answers, checkpointing=False) / statistics.median(rate)
        median = statistics.median(times[1:])
        found.append({"sweep": label, "value": value, "tokens_read": read, "tokens_predicted": answers,
                      "seconds": median, "floor_seconds": floor, "over_floor": median / floor})  # fmt: skip
    return found


def fit_line(x: list[float], y: list[float]) -> tuple[float, float, float, float]:
    """Least squares of y = a + b x -> a, b, the residual's norm over that of y, the largest residual over its y."""
    t = torch.tensor([x, y], dtype=torch.float64)
    a, b = torch.linalg.lstsq(torch.stack([torch.ones_like(t[0]), t[0]], 1), t[1]).solution.tolist()
    off = a + b * t[0] - t[1]
    return a, b, (off.norm() / t[1].norm()).item(), (off / t[1]).abs().max().item()


def tokens_sweep(rounds, world):
    """-> what was measured, and the straight line through seconds by tokens read."""
    found = sweep([("tokens", n, SMALL, dict(ROWS, questions=n)) for n in (2, 4, 8, 12, 16)], rounds, world)
    a, b, residual, largest = fit_line([r["tokens_read"] for r in found], [r["seconds"] for r in found])
    return found, {"seconds": a, "seconds_per_token": b, "residual": residual, "largest_residual": largest}


def ranks_sweep(rounds: int) -> dict:
    """Tokens a second with 1 and with 2 ranks, in turns; and what two bare processes do compared to one."""
    speeds: dict[str, list[float]] = {name: [] for name in ("1 rank", "2 ranks", "1 product", "2 products")}
    me = [sys.executable, __file__, "--child"]
    for _ in range(2):
        for n in (1, 2):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
            command = [*torchrun, __file__, "--child", "update", "--rounds", str(rounds)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            speeds[f"{n} rank" + "s" * (n > 1)].append(float(out.strip().splitlines()[-1]))
            jobs = [subprocess.Popen([*me, "product"], stdout=subprocess.PIPE, text=True) for _ in range(n)]
            speeds[f"{n} product" + "s" * (n > 1)].append(sum(float(job.communicate()[0]) for job in jobs))
    median = {name: statistics.median(values) for name, values in speeds.items()}
    return median | {"ranks_ratio": median["2 ranks"] / median["1 rank"],
                     "products_ratio": median["2 products"] / median["1 product"]}  # fmt: skip


def child(which: str, rounds: int) -> None:
    """One of `ranks_sweep`'s processes: prints tokens a second ("update") or FLOPs a second ("product")."""
    if which == "product":
        torch.set_num_threads(1)
        deadline, rates = time.perf_counter() + 8, []
        while time.perf_counter() < deadline:
            rates.append(flops_a_second(4096, SMALL))
        return print(statistics.mean(rates))
    world = init_world()
    torch.set_num_threads(1)
    update = Update(Shape(4, 512, 1536, 8, 512, 2048), world, micro_batch_tokens=8192)
    rows = update.rows(**ROWS)
    seconds = [update.seconds(rows) for _ in range(rounds + 1)][1:]
    if world.main:
        print(update.tokens(rows)[0] / statistics.median(seconds), flush=True)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["tokens", "group", "vocabulary", "width", "ranks"]
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    parser.add_argument("--rounds", type=int, default=3, help="medians of so many")
    parser.add_argument("--note", default="", help="anything a reader of the results must know about this machine")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return launch(lambda which: child(which, options.rounds), options.child)
    world = init_world()
    cases = {
        "group": [("group", n, SMALL, dict(questions=64 // n, group=n, prompt=128, response=(32, 96)))
                  for n in (1, 2, 4, 8, 16)],
        "vocabulary": [("vocabulary", v, Shape(4, 256, 768, 4, 256, v), ROWS) for v in (1024, 8192, 32768)],
        "width": [("width", h, Shape(4, h, 3 * h, h // 64, h, 2048), ROWS) for h in (128, 256, 512)],
    }  # fmt: skip
    path = options.out / "cost-cpu.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    about = dict(machine=f"{len(os.sched_getaffinity(0))}-core {torch.backends.cpu.get_cpu_capability()} CPU",
                 torch=torch.__version__, threads=torch.get_num_threads(), rounds=options.rounds, note=options.note)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        if name == "tokens":
            rows, fit = tokens_sweep(options.rounds, world)
            result[name] = about | {"line": fit, "rows": rows}
        elif name == "ranks":
            result[name] = about | ranks_sweep(options.rounds)
        else:
            result[name] = about | {"rows": sweep(cases[name], options.rounds, world)}
        path.write_text(json.dumps(result, indent=1) + "\n")
    print("| against | | tokens read | predicted | seconds | floor, s | over the floor |\n" + "| --- " * 7 + "|")
    for r in [r for name in names if name in result for r in result[name].get("rows", ())]:
        print(f"| {r['sweep']} | {r['value']:,} | {r['tokens_read']:,} | {r['tokens_predicted']:,} | "
              f"{r['seconds']:.2f} | {r['floor_seconds']:.2f} | {r['over_floor']:.2f} |")  # fmt: skip
    if "tokens" in result:
        print(f"\ntokens: {json.dumps(result['tokens']['line'])}")
    if "ranks" in result:
        print(f"\nranks: {json.dumps(result['ranks'])}")


if __name__ == "__main__":
    main()
