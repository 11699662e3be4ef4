"""Time and memory of log-probs, forward and forward + backward, of ours and of everything else that computes them.

    python benchmarks/logprobs.py                      # the shapes that fit this machine, into benchmarks/results/
    python benchmarks/logprobs.py --shapes 4096,896,151936 --variants ours full --rounds 5

floor: the bare matrix products, 2NHV operations forward and 6NHV with the backward. ours: as the scripts call it; kept
and again: what it keeps for the backward (exponentials in bf16), or computes again. full: logits in torch; compile:
torch.compile of it; liger_ce: Liger's fused linear loss (one scalar upstream gradient only); liger: its per-token one
for Hopper; quack: QuACK's (likewise one scalar); cce: Apple's cut-cross-entropy (which leaves out small gradients by
default); trl: its chunked log-prob function; verl: its fused kernel (always with entropy). Whatever is not installed or
does not run on this device is left out, with its reason in the results.

On a CPU every measurement is a process of its own, its memory the peak of that process, and rounds alternate between
the variants. On CUDA every variant is a process, timed by events; extra memory is the peak beyond what was allocated
before, with the gradients in it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
VARIANTS = ("floor", "ours", "ours kept", "ours again", "ours with entropy", "full", "compile", "liger", "liger_ce",
            "quack", "cce", "trl", "verl")  # fmt: skip
SHAPES = {
    "cuda": [(8192, 896, 151936), (8192, 1536, 151936), (8192, 3584, 152064), (8192, 4096, 131072)],
    "cpu": [(4096, 896, 151936)],
}  # fmt: skip


def full_logits(hidden, weight, targets):
    """Log-probs from the whole [N, V] tensor of logits: what everything here is compared with."""
    return F.linear(hidden, weight).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def variant(name, device):
    """A function of hidden, weight and targets; its result is log-probs, or minus their sum."""
    from common.logprobs import linear_logprobs

    if name in ("liger", "liger_ce", "quack", "cce", "verl") and device == "cpu":
        raise RuntimeError("needs CUDA")
    if name.startswith("ours") and name != "ours with entropy":
        return partial(linear_logprobs, keep={"ours": None, "ours kept": True, "ours again": False}[name])
    if name == "ours with entropy":
        return lambda h, w, y: sum(linear_logprobs(h, w, y, entropy=True))
    if name == "full":
        return full_logits
    if name == "compile":
        return torch.compile(full_logits)
    if name == "liger":
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        return LigerFusedLinearScaledCrossEntropyFunction.apply
    if name == "quack":
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return lambda h, w, y: chunked_linear_cross_entropy(h, w, y, reduction="sum")
    if name == "liger_ce":
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return lambda h, w, y: loss(w, h, y)
    if name == "cce":
        from cut_cross_entropy import linear_cross_entropy

        return lambda h, w, y: linear_cross_entropy(h, w, y, reduction="none")
    if name == "trl":
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk_size

        return lambda h, w, y: ChunkedLogProbFunction.apply(h, w, None, y, 1.0, chunk_size, None, 1.0, ())[0]
    if name == "verl":
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        return lambda h, w, y: linear_cross_entropy(h, w, y, 1.0, "none")[0]


def floor(hidden, weight, backward):
    """The products alone, in tiles that are reused, rounded to the inputs' precision."""
    from common.logprobs import _mm, _tiling

    rows, cols = _tiling(hidden, weight, None, None)
    buffer = torch.empty(rows[0].stop * cols[0].stop, dtype=hidden.dtype, device=hidden.device)
    grads = (torch.empty_like(hidden), torch.empty_like(weight)) if backward else None
    for c in cols:
        for r in rows:
            z = buffer[: (r.stop - r.start) * (c.stop - c.start)].view(r.stop - r.start, -1)
            _mm(hidden[r], weight[c].T, z)
            if backward:
                _mm(z, weight[c], grads[0][r])
                _mm(z.T, hidden[r], grads[1][c])
    return grads


def measure(name, shape, mode, device, repeats):
    """One process's work: seconds of every repeat, and bytes."""
    n, h, v = shape
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    hidden = torch.empty(n, h, dtype=dtype, device=device).normal_().requires_grad_(mode != "forward")
    weight = torch.empty(v, h, dtype=dtype, device=device).normal_(std=0.02).requires_grad_(mode != "forward")
    targets = torch.randint(0, v, (n,), device=device)
    upstream = torch.rand(n, device=device)
    function = None if name == "floor" else variant(name, device)

    def run(hidden, weight, targets, upstream):
        if name == "floor":
            return floor(hidden.detach(), weight.detach(), mode != "forward")
        with torch.set_grad_enabled(mode != "forward"):
            result = function(hidden, weight, targets)
        if mode != "forward":
            hidden.grad = weight.grad = None
            (result * upstream).sum().backward() if result.dim() else result.backward()

    seconds, cpu_seconds, problem = [], [], (hidden, weight, targets, upstream)
    if device == "cpu":
        import resource

        if name == "compile":  # for one shape; the others warm up on a small problem
            run(*problem)
        else:
            few = [t.detach()[:64].requires_grad_(mode != "forward") for t in (hidden, weight)]
            run(*few, targets[:64] % 64, upstream[:64])
        hidden.grad = weight.grad = None
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        for _ in range(repeats):
            start, cpu_start = time.perf_counter(), time.process_time()
            run(*problem)
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        for _ in range(3):
            run(*problem)
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(*problem)
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        peak = torch.cuda.max_memory_allocated()
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak, "extra_bytes": peak - before}


def child(name, shapes, modes, device, repeats):
    """Prints one JSON line for every shape and mode."""
    for shape in shapes:
        for mode in modes:
            row = dict(variant=name, n=shape[0], h=shape[1], v=shape[2], mode=mode)
            try:
                row |= measure(name, shape, mode, device, repeats)
            except Exception as error:  # a peer that is not there or cannot do this: part of the result
                row["left_out"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print("RESULT " + json.dumps(row), flush=True)


def spawn(name, shapes, modes, device, repeats):
    """Run one variant in a process of its own; -> its RESULT rows."""
    words = [json.dumps(x) for x in (name, shapes, modes, device, repeats)]
    process = subprocess.run([sys.executable, __file__, "--child", *words], capture_output=True, text=True)
    lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    if process.returncode:
        tail = (process.stderr.strip().splitlines() or ["killed"])[-1][:200]
        row = dict(variant=name, mode=modes[0], left_out=f"exit {process.returncode}: {tail}")
        lines.append("RESULT " + json.dumps(row | dict(zip("nhv", shapes[0]))))
    for line in lines:
        print(line, file=sys.stderr)
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def collect(rows):
    """Rounds of the same measurement become one row with their median."""
    merged = {}
    for row in rows:
        key = tuple(row[k] for k in ("n", "h", "v", "mode", "variant"))
        known = merged.setdefault(key, row)
        if known is not row and "seconds" in row and "seconds" in known:
            known["seconds"] += row["seconds"]
            known["cpu_seconds"] += row["cpu_seconds"]
            known["peak_bytes"] = max(known["peak_bytes"], row["peak_bytes"])
            known["extra_bytes"] = max(known["extra_bytes"], row["extra_bytes"])
    for row in merged.values():
        if "seconds" in row:
            row["median_seconds"] = statistics.median(row["seconds"])
    return list(merged.values())


def table(rows):
    """The rows as a markdown table, with each time over the floor's."""
    lines = ["| N, H, V | mode | variant | time | of the floor | peak | extra |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        where = f"| {row['n']}, {row['h']}, {row['v']} | {row['mode']} | {row['variant']} | "
        if "left_out" in row:
            lines.append(where + f"left out: {row['left_out']} | | | |")
            continue
        base = [r for r in rows if r["variant"] == "floor" and all(r[k] == row[k] for k in ("n", "h", "v", "mode"))]
        ratio = f"{row['median_seconds'] / base[0]['median_seconds']:.2f}" if base else ""
        seconds, giga = row["median_seconds"], 1e9
        shown = f"{seconds:.1f} s" if seconds > 1 else f"{1e3 * seconds:.1f} ms"
        lines.append(
            where + f"{shown} | {ratio} | {row['peak_bytes'] / giga:.2f} GB | {row['extra_bytes'] / giga:.2f} GB |"
        )
    return "\n".join(lines)


def plot(rows, path, title):
    """Time and peak memory of every variant, a pair of bars for forward and forward + backward."""
    from matplotlib.figure import Figure

    rows = [r for r in rows if "seconds" in r]
    shapes = sorted({(r["h"], r["v"], r["n"]) for r in rows})
    figure = Figure(figsize=(11, 1.2 + 2.4 * len(shapes)))
    axes = figure.subplots(len(shapes), 2, squeeze=False)
    for (h, v, n), (time_axis, memory_axis) in zip(shapes, axes):
        here = [r for r in rows if (r["h"], r["v"], r["n"]) == (h, v, n)]
        names = [name for name in VARIANTS if any(r["variant"] == name for r in here)][::-1]
        for offset, (mode, colour) in enumerate((("forward+backward", "#33608c"), ("forward", "#a5bfd6"))):
            picked = {r["variant"]: r for r in here if r["mode"] == mode}
            places = [i + 0.2 - 0.4 * (1 - offset) for i, name in enumerate(names) if name in picked]
            values = [picked[name] for name in names if name in picked]
            time_axis.barh(places, [r["median_seconds"] for r in values], 0.38, color=colour, label=mode)
            memory_axis.barh(places, [r["peak_bytes"] / 1e9 for r in values], 0.38, color=colour)
        time_axis.set_title(f"N={n}, H={h}, V={v}", fontsize=9, loc="left")
        for axis, label in ((time_axis, "seconds"), (memory_axis, "peak memory, GB")):
            axis.set_yticks(range(len(names)), names, fontsize=8)
            axis.set_xlabel(label, fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(*(json.loads(word) for word in sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--shapes", nargs="+", type=lambda s: tuple(map(int, s.split(","))), help="N,H,V ...")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--modes", nargs="+", default=["forward", "forward+backward"])
    parser.add_argument("--rounds", type=int, default=3, help="CPU: processes per measurement; CUDA: 5 repeats each")
    parser.add_argument("--note", default="", help="anything a reader of the results must know about this machine")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    shapes, rows = args.shapes or SHAPES[args.device], []
    if args.device == "cuda":
        name, machine = torch.cuda.get_device_name().lower().replace(" ", "-"), torch.cuda.get_device_name()
        for variant_name in args.variants:
            rows += spawn(variant_name, shapes, args.modes, "cuda", 5 * args.rounds)
    else:
        name, machine = "cpu", f"{torch.get_num_threads()}-core {torch.backends.cpu.get_cpu_capability()} CPU"
        missing = set()
        for _ in range(args.rounds):
            for shape in shapes:
                for mode in args.modes:
                    for variant_name in args.variants:
                        if variant_name not in missing:
                            rows += spawn(variant_name, [shape], [mode], "cpu", 1)
                            missing |= {row["variant"] for row in rows if "left_out" in row}
    rows = collect(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    result = dict(machine=machine, torch=torch.__version__, note=args.note, rows=rows)
    (args.out / f"logprobs-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, args.out / f"logprobs-{name}.png", f"{machine}, torch {torch.__version__}")
    print(table(rows))


if __name__ == "__main__":
    main()
