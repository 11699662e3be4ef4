"""What a run writes while it trains: metrics.jsonl, samples.jsonl, curves.png, a progress bar, seconds and a profile.

A reader of an algorithm need not know where they go. `common/run.py` calls this.
"""

import contextlib
import dataclasses
import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common.data import InputError, to_disk
from common.trainer import World


class Metrics:
    """metrics.jsonl (one object per step), samples.jsonl, curves.png, a progress bar; rank 0 alone writes."""

    def __init__(self, out: Path, args, world: World, *, start: int, steps: int, about: dict | None = None):
        """about: what args.json holds besides the flags."""
        self.out, self.world = out, world
        self.board = self.wandb = None
        self.warned: set[str] = set()
        self.drawn = time.monotonic()
        if not world.main:
            return
        try:
            if args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
            if args.wandb:
                import wandb
        except ImportError as error:
            raise InputError(f"--tensorboard and --wandb need their package: pip install {error.name}") from error
        write_whole(out / "args.json", json.dumps(dataclasses.asdict(args) | (about or {}), indent=2) + "\n")
        self.files = {}
        for name in ("metrics", "samples"):
            path = out / f"{name}.jsonl"
            # after a crash: what was logged beyond the checkpoint will be done and logged again
            kept = [line for line in complete_lines(path) if start and json.loads(line)["step"] <= start]
            write_whole(path, "".join(line + "\n" for line in kept))
            # line by line, until close()
            self.files[name] = open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        if args.tensorboard:
            self.board = SummaryWriter(out, purge_step=start + 1 if start else 0)
        if args.wandb:
            self.wandb = wandb.init(project=args.wandb, name=out.name, config=dataclasses.asdict(args), dir=out)
        self.bar = tqdm(total=steps, initial=start, desc=out.name, unit="step", dynamic_ncols=True)

    def log(self, step: int, values: dict[str, float], show: list[str]) -> None:
        """Write a row of metrics; `show`: those on the progress bar."""
        if self.world.main:
            known = {k: v for k, v in values.items() if v is not None}
            self.files["metrics"].write(json_line({"step": step, **known}))
            if self.board:
                for name, value in known.items():
                    self.board.add_scalar(name, value, step)
            if self.wandb:
                self.wandb.log(known, step=step)
            late = 1 in (known.get("verifier/timeout"), known.get("verifier/eval_timeout"))
            unread = 1 in (known.get("verifier/own_unparsable"), known.get("verifier/eval_unparsable"))
            warnings = {
                "reached its deadline on every answer, which gives them reward 0": late,
                "reads none of the model's own answers, or cannot read the golds: samples.jsonl shows why (cut by "
                "--max_response_tokens? the rule math needs </think>)": unread,
                "accepts none of the traces: do the gold answers fit it, or were the traces cut? samples.jsonl shows "
                "both; --verifier robust reads more spellings": not late and known.get("reward/teacher", 1) <= 0,
            }
            for warning, due in warnings.items():
                if due and warning not in self.warned:
                    self.warned.add(warning)
                    tqdm.write(f"WARNING: step {step}: --verifier {warning}", file=sys.stderr)
            self.bar.set_postfix({k: f"{known[k]:.3g}" for k in show if k in known}, refresh=False)
            self.bar.update(step - self.bar.n)

    def samples(self, step: int, rows: list[dict]) -> None:
        """Texts worth reading, one object a line."""
        if self.world.main:
            for row in rows:
                self.files["samples"].write(json_line({"step": step, **row}))

    def to_disk(self) -> None:
        """Wait until all that was logged is on the disk."""
        for file in self.files.values() if self.world.main else ():
            os.fsync(file.fileno())

    def close(self) -> None:
        """Draw curves.png and end the progress bar."""
        if self.world.main:
            self.bar.close()
            if self.board:
                self.board.close()
            if self.wandb:
                self.wandb.finish()
            for file in self.files.values():
                file.close()
            self.draw()

    def draw(self, every: float = 0.0) -> None:
        """Draw curves.png, if the last one is older than `every` seconds."""
        if self.world.main and time.monotonic() - self.drawn >= every:
            plot_curves({self.out.name: self.out}, None, self.out / "curves.png")
            self.drawn = time.monotonic()


def write_whole(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent}: {error}") from error
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # it may be a link
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    to_disk(partial)
    os.replace(partial, path)


def finite(values: dict) -> dict:
    """The values as JSON can hold them: it has no NaN or infinity, which become None."""
    return json.loads(json.dumps(values), parse_constant=lambda name: None)


def json_line(row: dict) -> str:
    """A row as a line of JSON."""
    return json.dumps(finite(row), ensure_ascii=False) + "\n"


def complete_lines(path: Path) -> list[str]:
    """Complete lines of a file that a crash may have cut short, also within a character."""
    return [line.decode() for line in path.read_bytes().split(b"\n")[:-1] if line] if path.exists() else []


def read_metrics(out: Path) -> list[dict]:
    """The rows of a run folder's metrics.jsonl."""
    return [json.loads(line) for line in complete_lines(Path(out) / "metrics.jsonl")]


def line_style(k: int) -> dict:
    """Colour and dashes of a plot's k-th line: 30 that differ, also for the colour-blind."""
    return dict(color=f"C{k % 10}", ls=("-", "--", ":")[k % 3])


def legend_text(name: str) -> str:
    """A name as matplotlib shows it in a legend: there dollars begin a formula, and what begins with _ is left out."""
    return " " * name.startswith("_") + name.replace("$", r"\$")


def plot_curves(runs: dict[str, Path], panels: list[list[str]] | None, path: Path) -> None:
    """Draw metrics over steps: a panel for each list of names, with a line for each run and name. panels None: a panel
    for each prefix of names, up to the first slash; a few names of another scale have one of their own."""
    from matplotlib.figure import Figure

    metrics = {label: read_metrics(out) for label, out in runs.items()}
    found = {name for rows in metrics.values() for row in rows for name in row}
    if panels is None:
        names = sorted(found - {"step", "optim/lr", "optim/entropy_coef"})
        alone = {"eval/length", "length/truncated", "mismatch/max", "optim/value_grad_norm", "policy/kl_ref",
                 "sft/demonstrations", "sft/length"} & found  # fmt: skip
        prefixes = {name.split("/")[0] for name in names} - {"seconds", "speed", "memory", "verifier", "update"}
        panels = [[n for n in names if n.split("/")[0] == prefix and n not in alone] for prefix in prefixes]
        panels = sorted([*panels, *([name] for name in alone)])
    panels = [names for names in panels if found & set(names)] or panels[:1]
    if not panels:
        return  # nothing was logged that has a panel
    across, down = min(3, len(panels)), math.ceil(len(panels) / 3)
    wide, high = 5.2 * across, 3.2 * down  # inches
    figure = Figure(figsize=(wide, high))
    # fixed margins and a fixed y of titles: else every label is measured, which takes as long as drawing them
    figure.subplots_adjust(0.7 / wide, 0.5 / high, 1 - 0.2 / wide, 1 - 0.4 / high, wspace=0.22, hspace=0.36)
    axes = figure.subplots(down, across, squeeze=False)
    shared = len(runs) > 1 and all(len(names) == 1 for names in panels)  # one legend, below all panels
    lines = {}
    for axis, names in zip(axes.flat, panels, strict=False):
        for i, (label, rows) in enumerate(metrics.items()):
            for k, name in enumerate(names, i * len(names)):  # a run has one style in all panels of one metric
                points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
                if points:
                    text = name if len(runs) == 1 else label if len(names) == 1 else f"{label}: {name}"
                    marker = "." if len(points) < 30 else ""
                    points = zip(*points, strict=True)
                    axis.plot(*points, label=legend_text(text), lw=1.3, marker=marker, **line_style(k))
        title = " and ".join(names) if len(names) < 3 else names[0].split("/")[0]
        axis.set_title(title, fontsize=10, y=1, parse_math=False)
        axis.set_xlabel("step")
        axis.locator_params(nbins=6)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        lines |= {line.get_label(): line for line in axis.lines}
        if axis.lines and not shared and (len(names) > 1 or len(runs) > 1):
            axis.legend(fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    if shared:
        figure.legend(lines.values(), lines, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0), ncols=across)
    figure.savefig(path, dpi=110, bbox_inches="tight" if shared else None, pil_kwargs={"compress_level": 2})


class Clock:
    """Seconds by act (phase of a step): `with clock("sample"): ...`; clock.flush() -> {"seconds/sample": 1.2, ...}.

    With `profile`, steps 2 to 1 + profile of this run are traced: the trace (for ui.perfetto.dev) goes to
    out/profile, and rank 0 prints the seconds by act and the costliest operations."""

    def __init__(self, profile: int = 0, out: Path = Path()):
        self.seconds: dict[str, float] = {}
        self.since = time.perf_counter()
        self.acts: set[str] = set()
        self.out, self.profiler = out, None
        if profile:  # the first step warms everything up
            steps = torch.profiler.schedule(wait=0, warmup=1, active=profile, repeat=1)
            self.profiler = torch.profiler.profile(schedule=steps, on_trace_ready=self._traced)
            self.profiler.start()

    def _traced(self, profiler) -> None:
        rank = os.environ.get("RANK", "0")
        path = self.out / "profile" / f"rank-{rank}.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        if rank == "0":
            by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            found = profiler.key_averages()
            seconds = {e.key: e.cpu_time_total / 1e6 for e in found if e.cpu_time_total}  # CUDA's copies have none
            acts = ", ".join(f"{act} {seconds[act]:.3f} s" for act in sorted(self.acts & seconds.keys()))
            table = found.table(sort_by=by, row_limit=15, max_name_column_width=50)
            tqdm.write(f"\n{path}: {acts}\n{table}")

    @contextlib.contextmanager
    def __call__(self, act: str):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.acts.add(act)
        with torch.profiler.record_function(act):
            yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[act] = self.seconds.get(act, 0.0) + time.perf_counter() - start

    def flush(self) -> dict[str, float]:
        """Seconds by act since the last flush, and the whole step's."""
        seconds = self.seconds | {"step": time.perf_counter() - self.since}
        if self.profiler:
            self.profiler.step()
        self.seconds, self.since = {}, time.perf_counter()
        return {f"seconds/{act}": s for act, s in seconds.items()}

    def close(self) -> None:
        """End the trace, if one runs, and write it."""
        if self.profiler:
            self.profiler.stop()


def peak_memory_gb(world: World) -> float:
    """Peak memory of this process in GB: the GPU's on CUDA, the resident set on CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 1e9
    unit = 1e9 if sys.platform == "darwin" else 1e9 / 1024  # macOS counts bytes, Linux 1,024 of them
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
