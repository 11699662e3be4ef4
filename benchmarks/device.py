"""What a GPU does with this project's work, in minutes: the card's ceilings, attention, the head, an update, rollouts.

    python benchmarks/device.py all                       # everything: about 15 minutes on one GPU
    python benchmarks/device.py ceilings head --seconds 60
    python benchmarks/device.py attention step --flash_attention 3

ceilings   rates of the card: copies, and matrix products at the shapes that occur
attention  packed attention forward and backward on the lengths of a LUFFY batch
head       log-probs from hidden states, forward and backward, beside bare products and other people's
step       one LUFFY update on Qwen2.5-1.5B's shapes and on eight layers of 7B's: seconds, model FLOPs utilisation,
           peak memory beside the formula of benchmarks/scale.py, and a profile by kind of operation
rollout    answers through vLLM (where it is installed) and through the embedded sampler: tokens a second, seconds to
           start, sleep and sync, and how far the log-probs are from the trainer's

Every measurement prints its line as it comes and is written to benchmarks/results/device-CARD.json at once. A part
begins no further measurement after --seconds. Weights are random: the work is the same. Without CUDA the sizes are
toys, which shows that the program runs and nothing else. docs/gpu.md says what the numbers should be.
"""

import argparse
import gc
import itertools
import json
import random
import statistics
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import luffy  # noqa: E402
from benchmarks import logprobs, scale  # noqa: E402
from common import vllm  # noqa: E402
from common.data import Pattern, pack, packed_attention, use_flash_attention_3  # noqa: E402
from common.rollout import EmbeddedSampler, Sampling  # noqa: E402
from common.trainer import init_world, load_policy, make_optimizer, optimizer_step  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
TOY = scale.Shape(2, 32, 64, 4, 16, 97, tied=True)
SHAPES = {"1.5B": scale.MODELS["1.5B"], "8 layers of 7B": scale.Shape(8, 3584, 18944, 28, 512, 152064)} if CUDA else {
    "toy": TOY
}  # fmt: skip
MICRO_BATCHES = [8192, 16384, 32768] if CUDA else [256]
HEADS = [(8192, 4096, 131072), (8192, 1536, 151936), (32768, 1536, 151936), (8192, 3584, 152064)] if CUDA else [
    (64, 32, 500)
]  # fmt: skip


def seconds(function, warm: int = 2, repeats: int = 7) -> float:
    """Median seconds of a call, after `warm` calls that are not counted; by events on CUDA."""
    times = []
    for _ in range(warm + repeats):
        if CUDA:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
    return statistics.median(times[warm:])


def ceilings():
    """Copies (bytes read and written) and matrix products, in TB/s and TFLOP/s."""
    a = torch.randn(2**30 if CUDA else 2**20, device=DEVICE, dtype=DTYPE)
    b = torch.empty_like(a)
    yield {"what": "copy", "TB/s": 2 * a.nbytes / seconds(partial(b.copy_, a)) / 1e12}
    del a, b
    shapes = {(8192, 8192, 8192)} if CUDA else {(64, 64, 64)}
    for shape in SHAPES.values():
        tokens = MICRO_BATCHES[0]
        shapes |= {(tokens, shape.hidden, shape.hidden), (tokens, shape.hidden, shape.intermediate),
                   (tokens, shape.intermediate, shape.hidden), (tokens, shape.hidden, shape.vocab)}  # fmt: skip
    for m, k, n in sorted(shapes):
        x, w = torch.randn(m, k, device=DEVICE, dtype=DTYPE), torch.randn(n, k, device=DEVICE, dtype=DTYPE)
        y = torch.empty(m, n, device=DEVICE, dtype=DTYPE)
        rates = {}
        for name, product in (
            ("forward", lambda x=x, w=w, y=y: torch.mm(x, w.T, out=y)),
            ("grad_input", lambda x=x, w=w, y=y: torch.mm(y, w, out=x)),
            ("grad_weight", lambda x=x, w=w, y=y: torch.mm(y.T, x, out=w)),
        ):
            y.normal_()
            rates[f"{name} TFLOP/s"] = 2 * m * k * n / seconds(product) / 1e12
        yield {"what": f"[{m}, {k}] x [{k}, {n}]"} | rates
        del x, w, y


def luffy_rows(tokens: int, vocabulary: int, seed: int = 0) -> list[luffy.Row]:
    """Groups of 8 answers (1 of them the teacher's) with ragged lengths, about `tokens` tokens in all."""
    rng, rows = random.Random(seed), []
    longest = 8192 if CUDA else 64
    while True:
        prompt = [rng.randrange(vocabulary) for _ in range(longest // 64)]
        for i in range(8):
            length = min(int(rng.lognormvariate(0, 0.7) * longest / 6) + 2, longest, tokens // 8)
            if sum(len(row.prompt) + len(row.response) for row in rows) + len(prompt) + length > tokens:
                return rows
            response = [rng.randrange(vocabulary) for _ in range(length)]
            rows.append(luffy.Row(prompt, response, len(rows) // 8, i == 0, reward=float(i % 2), advantage=0.5 - i % 2))


def attention():
    """Forward and backward of packed attention on a micro-batch; the operations are those of the causal triangle."""
    for name, shape in SHAPES.items():
        rows = luffy_rows(MICRO_BATCHES[-1], shape.vocab)
        batch = pack([(row.prompt, row.response) for row in rows], DEVICE)
        width, tokens = shape.hidden // shape.heads, batch.input_ids.shape[1]
        heads = (shape.heads, shape.kv_width // width, shape.kv_width // width)
        q, k, v = (torch.randn(1, n, tokens, width, device=DEVICE, dtype=DTYPE, requires_grad=True) for n in heads)
        upstream = torch.randn(1, tokens, shape.heads, width, device=DEVICE, dtype=DTYPE)
        module, pattern = torch.nn.Module(), Pattern(batch.packing, None, None)

        def both(q=q, k=k, v=v, pattern=pattern, upstream=upstream, module=module):
            out, _ = packed_attention(module, q, k, v, pattern)
            torch.autograd.grad(out, (q, k, v), upstream)

        def forward(q=q, k=k, v=v, pattern=pattern, module=module):
            with torch.no_grad():
                packed_attention(module, q, k, v, pattern)

        work = 2 * shape.hidden * sum((len(row.prompt) + len(row.response)) ** 2 for row in rows)
        forward_s, both_s = seconds(forward), seconds(both)
        yield {
            "model": name, "sequences": len(rows), "tokens": tokens, "longest": batch.packing.width,
            "forward ms": 1e3 * forward_s, "forward TFLOP/s": work / forward_s / 1e12,
            "forward+backward ms": 1e3 * both_s, "forward+backward TFLOP/s": 3.5 * work / both_s / 1e12,
        }  # fmt: skip


def head():
    """Log-probs: every variant of benchmarks/logprobs.py that is installed, one process, the same tensors."""
    for n, h, v in HEADS:
        hidden = torch.randn(n, h, device=DEVICE, dtype=DTYPE, requires_grad=True)
        weight = (torch.randn(v, h, device=DEVICE) * 0.02).to(DTYPE).requires_grad_()
        targets, upstream = torch.randint(v, (n,), device=DEVICE), torch.rand(n, device=DEVICE)
        for name in ("floor", "ours", "ours again", "ours with entropy", "liger", "liger_ce", "quack", "cce"):
            row = {"N, H, V": f"{n}, {h}, {v}", "variant": name}
            try:
                function = None if name == "floor" else logprobs.variant(name, DEVICE)

                def both(name=name, function=function, h=hidden, w=weight, y=targets, upstream=upstream):
                    if name == "floor":
                        return logprobs.floor(h.detach(), w.detach(), True)
                    h.grad = w.grad = None
                    result = function(h, w, y)
                    (result * upstream).sum().backward() if result.dim() else result.backward()

                if CUDA:
                    both()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                taken = seconds(both)
                row |= {"forward+backward ms": 1e3 * taken, "TFLOP/s of 6NHV": 6 * n * h * v / taken / 1e12}
                if CUDA:
                    row["extra GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9
            except Exception as error:  # a library that is not there, or cannot do this shape: part of the result
                row["left out"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            hidden.grad = weight.grad = None
            yield row


def kind_of(kernel: str) -> str:
    """What a CUDA kernel or CPU operation of the profile works for."""
    kinds = {
        "attention": ("flash", "fmha", "scaled_dot"), "head": ("_absorb", "_gradient_kernel"),
        "optimizer": ("adam", "foreach", "multi_tensor"), "communication": ("nccl",),
        "products": ("nvjet", "gemm", "cutlass", "cublas", "::mm", "addmm"),
        "rows in and out of attention": ("index", "gather", "scatter"),
        "copies and casts": ("memcpy", "copy", "memset", "cat"),
    }  # fmt: skip
    return next((kind for kind, words in kinds.items() if any(word in kernel.lower() for word in words)), "elementwise")


def random_policy(shape: scale.Shape, world, **options):
    """A policy of a shape with random weights, whose layers can recompute their activations."""
    return load_policy("random", world, gradient_checkpointing=True, from_config=shape.config(), **options)


def step():
    """One LUFFY update of two micro-batches: warm up, time, profile. MFU counts no operation that is done again."""
    peak = 989e12 if CUDA else 1e12  # dense bf16 of an H100 or H200
    world = init_world()
    for name, shape in SHAPES.items():
        policy = random_policy(shape, world, compile=True)
        optimizer = make_optimizer(policy, lr=1e-6)
        for tokens in MICRO_BATCHES:
            rows = luffy_rows(2 * tokens, shape.vocab)
            args = luffy.Args(micro_batch_tokens=tokens, max_response_tokens=8192)
            responses = sum(len(row.response) for row in rows)
            packed = sum(batch.input_ids.shape[1] for batch, _ in luffy.micro_batches(rows, args, world))
            squares = sum((len(row.prompt) + len(row.response)) ** 2 for row in rows)
            work = scale.update_flops(shape, packed, responses, checkpointing=False)
            work += 6 * shape.layers * shape.hidden * squares  # attention, causal: half of 12 h n^2
            for again, compiled in itertools.product((shape.layers, 0), (False, True)):
                if compiled and (not CUDA or tokens != MICRO_BATCHES[len(MICRO_BATCHES) // 2]):
                    continue  # compiling takes half a minute
                row = {"model": name, "micro-batch": tokens, "tokens": packed, "responses": responses,
                       "layers computed again": again, "compiled": compiled}  # fmt: skip
                for layer in policy.lm.model.layers:
                    layer.gradient_checkpointing = again > 0

                def update(rows=rows, args=args, policy=policy, optimizer=optimizer):
                    luffy.accumulate_gradient(policy, rows, None, args, world)
                    optimizer_step(policy, optimizer, lr=1e-6, max_grad_norm=1.0)

                try:
                    if CUDA:
                        torch.cuda.empty_cache()
                        torch.cuda.reset_peak_memory_stats()
                    with torch.compiler.set_stance("default" if compiled else "force_eager"):
                        taken = seconds(update, warm=2 if compiled else 1, repeats=2)
                    row |= {"seconds": taken, "tokens/s": packed / taken, "MFU": work / taken / peak}
                    if CUDA:
                        row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
                    half = dict(tokens=packed // 2, responses=responses // 2, checkpointing=again > 0)
                    row["formula GB"] = scale.peak_bytes(shape, 1, **half) / 1e9
                    row["profile"] = profile(update)
                except torch.cuda.OutOfMemoryError:
                    row["left out"] = "out of memory"
                    optimizer.zero_grad(set_to_none=True)
                yield row
        del policy, optimizer, update, layer
        gc.collect()


def rollout():
    """Answers of full length: the embedded sampler, then vLLM with its head in float32 (as the scripts run it) and in
    bf16. Mismatch: vLLM's log-probs of its own tokens against the trainer's."""
    world, (name, shape) = init_world(), next(iter(SHAPES.items()))
    policy, rng = random_policy(shape, world), random.Random(0)
    with torch.no_grad():
        policy.lm.model.norm.weight.mul_(6)  # next tokens as uncertain as a trained model's: about one nat
    prompts = [[rng.randrange(2, shape.vocab) for _ in range(128 if CUDA else 4)] for _ in range(32 if CUDA else 2)]

    def tokens_per_second(sampler, tokens):
        how = dict(n=8, keys=list(range(len(prompts))), sampling=Sampling(tokens))
        sampler.generate(prompts, seed=0, **how | {"sampling": Sampling(min(tokens, 64))})  # warm up
        begin = time.perf_counter()
        groups = sampler.generate(prompts, seed=1, **how)
        return groups, sum(len(c.ids) for g in groups for c in g) / (time.perf_counter() - begin)

    sampler = EmbeddedSampler(policy, stop_ids=[])
    sampler.sync(policy, 0)
    yield {"model": name, "sampler": "embedded", "rows": 8 * len(prompts), "tokens/s": tokens_per_second(
        sampler, 256 if CUDA else 4)[1]}  # fmt: skip
    sampler.close()
    if not CUDA or vllm.vllm_version(cuda=True) is None:
        return
    for head_dtype in ("float32", "model"):
        row = {"model": name, "sampler": f"vLLM, head in {head_dtype}", "rows": 8 * len(prompts)}
        begin = time.perf_counter()
        sampler = vllm.VLLMSampler(policy, world, stop_ids=[], max_tokens=4096, gpu_memory=0.5,
                                   hf_overrides={"head_dtype": head_dtype})  # fmt: skip
        row["start s"] = time.perf_counter() - begin
        sampler.sync(policy, 0)
        times = {"sleep s": [], "wake and sync s": []}
        for version in (1, 2, 3):
            for what, act in (("sleep s", sampler.sleep), ("wake and sync s", partial(sampler.sync, policy, version))):
                begin = time.perf_counter()
                act()
                times[what].append(time.perf_counter() - begin)
        groups, row["tokens/s"] = tokens_per_second(sampler, 2048)
        rows = [(prompt, completion.ids) for prompt, group in zip(prompts, groups, strict=True) for completion in group]
        drawn = torch.tensor([x for group in groups for completion in group for x in completion.logps])
        with torch.no_grad():
            logp = torch.cat([policy(pack(rows[i : i + 8], DEVICE)).cpu() for i in range(0, len(rows), 8)])
        gap = (drawn - logp).abs()
        row |= {what: statistics.median(t) for what, t in times.items()}
        row |= {"mismatch": gap.mean().item(), "mismatch max": gap.max().item()}
        sampler.close()
        yield row


def profile(function) -> dict[str, float]:
    """Share of device time by kind of operation."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if CUDA else activity.CPU]) as profiler:
        function()
    shares = Counter()
    for event in profiler.key_averages():
        shares[kind_of(event.key)] += event.self_device_time_total if CUDA else event.self_cpu_time_total
    return {kind: time_ / max(1e-9, shares.total()) for kind, time_ in shares.most_common()}


def shown(row: dict) -> str:
    """A row as one line."""

    def text(value):
        if isinstance(value, dict):
            return "(" + ", ".join(f"{k} {v:.0%}" for k, v in value.items()) + ")"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {text(value)}" for name, value in row.items())


PARTS = {"ceilings": ceilings, "attention": attention, "head": head, "step": step, "rollout": rollout}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all"])
    parser.add_argument("--seconds", type=float, default=180, help="of each part: it begins nothing new after that")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--flash_attention", type=int, choices=[2, 3], default=2, help="as the flag of luffy.py")
    options = parser.parse_args()
    if options.flash_attention == 3:
        use_flash_attention_3()
    card = torch.cuda.get_device_name() if CUDA else "CPU, toy sizes"
    path = options.out / f"device-{card.lower().replace(' ', '-').replace(',', '')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in PARTS if "all" in options.parts else options.parts:
        start, rows = time.perf_counter(), []
        name = part if options.flash_attention == 2 else f"{part}, FlashAttention 3"
        print(f"{name}  ({card}, torch {torch.__version__})", flush=True)
        for row in PARTS[part]():
            rows.append(row)
            print(f"  {shown(row)}", flush=True)
            results[name] = {"machine": card, "torch": torch.__version__, "rows": rows}
            path.write_text(json.dumps(results, indent=1) + "\n")
            if time.perf_counter() - start > options.seconds:
                print(f"  stopped after {options.seconds:.0f} s (--seconds)")
                break


if __name__ == "__main__":
    main()
