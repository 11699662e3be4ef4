"""common/trainer.py: loading, schedules, checkpoints, metrics."""

import concurrent.futures
import contextlib
import dataclasses
import gc
import importlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig

import luffy
from common import checkpoints, trainer
from common.checkpoints import Checkpoints
from common.data import InputError, pack
from common.metrics import Metrics, complete_lines, read_metrics
from common.rollout import EmbeddedSampler, Sampling, change_logits
from common.rows import with_bos
from common.run import RunArgs
from common.trainer import (
    ValueModel,
    export,
    learning_rate,
    load_policy,
    load_tokenizer,
    make_optimizer,
    optimizer_step,
    parse_args,
)
from tests.conftest import NANO, run_script, weights_digest
from tests.test_luffy_runs import settings


@dataclasses.dataclass
class Settings:
    lr: float = 1e-3
    steps: int = 10
    preset: str = "paper"
    timeout_minutes: float = 30.0
    method: str = "a"
    tensorboard: bool = False
    wandb: str = ""


def train_a_little(policy, optimizer, updates, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        ids = torch.randint(2, 61, (2, 8), generator=generator).tolist()
        (-policy(pack([(ids[0][:3], ids[0][3:]), (ids[1][:5], ids[1][5:])])).mean()).backward()
        optimizer_step(policy, optimizer, lr=1e-2, max_grad_norm=1.0)


# ------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(("error", "code", "said"), [
    (InputError("--lr 0: no"), 2, "error: --lr 0: no"), (KeyboardInterrupt(), 130, "run the same command to resume"),
    (RuntimeError("broken"), 1, "RuntimeError: broken"),
])  # fmt: skip
def test_an_error_of_the_user_is_one_line_and_an_interrupt_says_how_to_go_on(error, code, said, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(trainer, "_leave", codes.append)
    monkeypatch.setattr(trainer, "_first_to_fail", lambda: True)

    def main(args):
        raise error

    trainer.launch(main, None)
    printed = capsys.readouterr().err
    assert codes == [code] and said in printed and (printed.count("\n") == 1) == (code != 1)
    monkeypatch.setattr(trainer, "_first_to_fail", lambda: False)
    trainer.launch(main, None)
    assert codes == [code, code] and not capsys.readouterr().err, "another rank has said it"


def test_a_terminal_that_cannot_show_a_character_is_no_reason_to_fail(monkeypatch):
    codes = []
    monkeypatch.setattr(trainer, "_leave", codes.append)
    for stdout in (io.TextIOWrapper(io.BytesIO(), encoding="ascii"), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stdout)
        trainer.launch(print, "π")
    assert codes == []
    monkeypatch.setattr(sys, "stdout", None)  # closed, as by >&-
    trainer.launch(lambda _: sys.stdout.flush(), None)
    assert codes == []


def test_a_flag_chooses_the_defaults_of_others_and_what_is_typed_wins():
    tables = dict(method={"b": dict(lr=0.5, steps=7)}, preset={"tiny": dict(steps=3)})
    assert parse_args(Settings, [], **tables) == Settings()
    assert parse_args(Settings, ["--method", "b"], **tables) == Settings(lr=0.5, steps=7, method="b")
    assert parse_args(Settings, ["--method=b", "--preset=tiny"], **tables).steps == 3
    assert parse_args(Settings, ["--method", "b", "--preset", "tiny", "--steps", "9"], **tables).steps == 9


def test_an_unknown_flag_exits_with_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(Settings, ["--learning_rat", "1"])
    assert stop.value.code == 2
    assert "learning" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ schedules


def test_the_rate_warms_up_linearly_and_then_follows_its_schedule_over_the_updates_that_are_left():
    def rates(schedule, **kw):
        return [learning_rate(s, lr=1.0, steps=10, schedule=schedule, **kw) for s in range(10)]

    assert rates("constant") == rates("constant", floor=0.5) == [1.0] * 10
    assert rates("constant", warmup=0.2) == [0.5] + [1.0] * 9
    assert rates("linear")[0] == 1.0 and rates("linear")[5] == 0.5
    assert rates("cosine", warmup=0.1)[0] == 1.0
    assert rates("cosine", floor=0.1)[-1] > 0.1
    cosine = [learning_rate(s, lr=2.0, steps=4, schedule="cosine", floor=0.1) for s in range(5)]
    assert cosine == pytest.approx([2.0, 1.1 + 0.9 * 0.5**0.5, 1.1, 1.1 - 0.9 * 0.5**0.5, 0.2])
    assert rates("linear", warmup=0.2, floor=0.2) == pytest.approx([0.5, 1.0] + [1 - 0.1 * k for k in range(8)])
    assert rates("constant", warmup=0.15)[:3] == [0.5, 1.0, 1.0]  # of part of an update: a whole one


# --------------------------------------------------------------------------------------------- optimizer step


def test_the_gradient_is_clipped_to_the_global_norm(policy):
    optimizer = make_optimizer(policy, lr=0.0)
    (policy(pack([([3, 4], [5, 6])])).sum() * 1e4).backward()
    seen = {}
    optimizer.register_step_pre_hook(
        lambda *_: seen.update(norm=torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item())
    )
    assert optimizer_step(policy, optimizer, lr=0.0, max_grad_norm=0.5) > 100
    assert seen["norm"] == pytest.approx(0.5, rel=1e-4)
    assert all(p.grad is None for p in policy.parameters())


def test_a_bad_log_prob_is_that_of_the_update_that_reads_it_with_a_gradient(policy, world):
    """What is read ahead for a later update must not stop the one before it."""
    batch = pack([([3, 4], [5, 6])])
    with torch.no_grad():
        policy.lm.lm_head.weight[5] = math.nan
        policy(batch)
    trainer.check_finite({}, policy, world)
    for _ in range(3):  # micro-batches
        policy(batch)
    with pytest.raises(FloatingPointError, match="6 log-probs are NaN or above 0"):
        trainer.check_finite({}, policy, world)
    trainer.check_finite({}, policy, world)  # told once


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(policy, bad):
    optimizer = make_optimizer(policy, lr=1.0)
    before = weights_digest(policy)
    policy(pack([([3, 4], [5, 6])])).sum().backward()
    next(policy.parameters()).grad[0, 0] = bad
    with pytest.raises(FloatingPointError):
        optimizer_step(policy, optimizer, lr=1.0, max_grad_norm=1.0)
    assert weights_digest(policy) == before


# ----------------------------------------------------------------------------------------- models and folders


def test_an_exported_tokenizer_is_the_same_whatever_the_locale(policy, world, tmp_path, monkeypatch):
    tokenizer = load_tokenizer("models/tiny")
    tokenizer.add_special_tokens({"bos_token": "<｜begin▁of▁sentence｜>"})  # DeepSeek's
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "latin-1")  # of the locale
    export(policy, tokenizer, tmp_path / "model", world)
    assert load_tokenizer(str(tmp_path / "model")).bos_token == tokenizer.bos_token


@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_model_is_the_model(policy, world, tmp_path, tied):
    import igsm

    policy = load_policy("nano", world, from_config=NANO | {"tie_word_embeddings": tied}, seed=3)
    policy.lm.generation_config.eos_token_id = None
    (tmp_path / "disk.partial").mkdir()
    (tmp_path / "disk.partial" / "old.json").touch()  # a crash left it
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    export(policy, igsm.tokenizer("symbolic"), tmp_path / "model", world)
    again = load_policy(str(tmp_path / "model"), world)
    assert weights_digest(again) == weights_digest(policy)
    [problem] = igsm.generate(1, ops=(4, 4), style="symbolic")
    text = f"{problem.question}<think>{problem.solution}"  # AutoTokenizer would take a Qwen2's own pre-tokenizer
    loaded, made = load_tokenizer(str(tmp_path / "model")), igsm.tokenizer("symbolic")
    assert loaded.chat_template == made.chat_template
    assert loaded(text)["input_ids"] == made(text)["input_ids"] and loaded.decode(made(text)["input_ids"]) == text
    settings = tmp_path / "model" / "tokenizer_config.json"
    old = json.loads(settings.read_text())  # Transformers 4 does not know the names of version 5
    assert old["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in old
    assert loaded.all_special_tokens == made.all_special_tokens and len(old["additional_special_tokens"]) == 3
    settings.write_text(settings.read_text().replace("PreTrainedTokenizerFast", "TokenizersBackend"))
    assert load_tokenizer(str(tmp_path / "model"))(text)["input_ids"] == made(text)["input_ids"]
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [made.eos_token_id]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "model"] and (tmp_path / "model").is_symlink()
    assert (tmp_path / "model" / "model.safetensors").exists() and not (tmp_path / "model" / "old.json").exists()


def test_a_folder_without_model_or_tokenizer_is_named(world, tmp_path):
    with pytest.raises(InputError, match=f"--model {tmp_path}.*tokenizer"):
        load_tokenizer(str(tmp_path))
    for kind in ("qwen2", "gpt2"):  # Transformers makes an empty one of these without a file
        AutoConfig.for_model(kind).save_pretrained(tmp_path / kind)
        with pytest.raises(InputError, match=f"--model .*/{kind}: no tokenizer there .no tokenizer.json"):
            load_tokenizer(str(tmp_path / kind))
    with pytest.raises(InputError, match=f"--model {tmp_path}.*cannot be loaded"):
        load_policy(str(tmp_path), world)
    tokenizer = load_tokenizer("models/tiny")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(InputError, match="--model .*/endless: the tokenizer has no eos token"):
        load_tokenizer(str(tmp_path / "endless"))
    with pytest.raises(InputError, match="--tokenizer .*/endless: the tokenizer has no eos token"):
        load_tokenizer(str(tmp_path / "endless"), flag="--tokenizer")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("llama", {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}),  # as DeepSeekMath's folder
     ("exaone4", {"tokenizer_class": "GPT2Tokenizer"}), ("gpt2", {})],
)  # fmt: skip
def test_a_tokenizer_is_what_its_file_has_whatever_class_its_folder_names(kind, settings, tmp_path):
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "34"]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, [("3", "4")]))
    three_digits = pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([three_digits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    core.save(str(tmp_path / "tokenizer.json"))
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<s>", "eos_token": "</s>"}))
    text = "a 1234  b\n"
    for folder in (tmp_path, tmp_path / "saved"):
        tokenizer = load_tokenizer(str(folder))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == core.encode(text).ids and tokenizer.decode(ids) == text
        assert with_bos(ids, tokenizer) == ([tokenizer.bos_token_id] if "add_bos_token" in settings else []) + ids
        tokenizer.save_pretrained(tmp_path / "saved")
        (tmp_path / "saved" / "config.json").write_text((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("settings", ["{}", '{"tokenizer_class": "GPT2Tokenizer"}'])
def test_an_eos_that_a_folder_leaves_to_its_models_type_is_found(settings, tmp_path):
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    core = Tokenizer(models.BPE({"a": 0, "<|endoftext|>": 1}, []))
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(settings)
    assert load_tokenizer(str(tmp_path)).eos_token == "<|endoftext|>"


def test_code_that_comes_with_a_tokenizer_runs_by_flag_only(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = shutil.copytree("models/tiny", tmp_path / "model")
    (model / "own.py").write_text("import transformers\n\nclass Own(transformers.PreTrainedTokenizerFast): ...")
    (model / "config.json").unlink()  # of a type that has a tokenizer in Transformers
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    settings = json.loads((model / "tokenizer_config.json").read_text()) | own
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="--model .*custom code which must be executed"):
        load_tokenizer(str(model))
    assert type(load_tokenizer(str(model), trust_remote_code=True)).__name__ == "Own"


CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM

class OwnConfig(Qwen2Config):
    model_type = "own"

class OwnForCausalLM(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_by_flag_only(nano, world, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = shutil.copytree(nano, tmp_path / "model")
    (model / "own.py").write_text(CODE)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="--model .*custom code which must be executed"):
        load_policy(str(model), world)
    own = load_policy(str(model), world, trust_remote_code=True)
    assert type(own.lm).__name__ == "OwnForCausalLM"
    export(own, load_tokenizer(nano), tmp_path / "exported", world)
    assert (tmp_path / "exported" / "model.safetensors").exists()


def test_gradient_checkpointing_changes_nothing(world):
    grads = []
    for flag in ("none", "auto", "all", True):  # auto: none on a CPU
        policy = load_policy("nano", world, from_config=NANO, seed=3, gradient_checkpointing=flag)
        policy(pack([([3, 4], [5, 6, 7])])).sum().backward()
        grads.append([p.grad for p in policy.parameters()])
        recompute = [layer.training and layer.gradient_checkpointing for layer in trainer.layers_of(policy.lm)]
        assert recompute == [flag in ("all", True)] * 2
    for one, *others in zip(*grads, strict=True):
        for other in others:
            torch.testing.assert_close(other, one)


def test_compiled_layers_compute_the_same_and_are_recomputed_compiled(world, monkeypatch):
    runs, aot_eager, compiler = [], torch._dynamo.lookup_backend("aot_eager"), torch.compile

    def backend(graph, inputs):  # differentiated as for a GPU; inductor would write C++ for a CPU, which takes a minute
        compiled = aot_eager(graph, inputs)
        return lambda *given: runs.append(graph) or compiled(*given)

    trainer._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: compiler(forward, backend=backend, dynamic=False))
    results, kept = [], []
    for flag in (False, True):
        small = NANO | {"num_hidden_layers": 1}
        policy = load_policy("nano", world, from_config=small, seed=3, gradient_checkpointing=True, compile=flag)
        for part in (*trainer.layers_of(policy.lm), policy):  # as on GPUs: FSDP2 gives a layer another class
            fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            logp = policy(pack([([3, 4], [5, 6, 7]), ([3, 4], [9, 8]), ([5], [6] * 9)]))
        forward = len(runs)
        logp.sum().backward()
        assert len(runs) == 2 * forward and bool(runs) == flag
        kept.append(sum(sizes))
        results.append([logp.detach(), *(trainer.whole(p.grad) for p in policy.parameters())])
    trainer._compiled.cache_clear()
    assert kept[0] == kept[1], "activations are recomputed"
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ checkpoints


def checkpoint(tmp_path, **settings):
    return Checkpoints(tmp_path / "checkpoint", Settings(**settings))


@pytest.fixture
def pairs(policy):
    """What a run trains, as its checkpoints have it."""
    return {"policy": (policy, make_optimizer(policy, lr=1e-2))}


def full(*_, **__):
    raise OSError(28, "No space left on device")


def second_pair(kind, policy, world, seed):
    """What ReLIFT keeps (a second optimizer of the policy), or OREO (a second model and its optimizer)."""
    model = policy if kind == "sft" else load_policy("nano", world, from_config=NANO, seed=seed)
    return model, make_optimizer(model, lr=1e-2)


@pytest.mark.parametrize("kind", ["sft", "value"])
def test_a_second_optimizer_or_model_comes_back_from_a_checkpoint_bit_for_bit(policy, world, tmp_path, kind):
    def train(policy, optimizer, second, second_optimizer, seed):
        train_a_little(policy, optimizer, 1, seed=seed)
        train_a_little(second, second_optimizer, 2, seed=seed + 1)

    optimizer, second = make_optimizer(policy, lr=1e-2), second_pair(kind, policy, world, 7)
    train(policy, optimizer, *second, seed=1)
    checkpoint(tmp_path).save(1, {"policy": (policy, optimizer), kind: second}, world)
    train(policy, optimizer, *second, seed=5)

    again = load_policy("nano", world, from_config=NANO, seed=99)
    its_optimizer, its_second = make_optimizer(again, lr=1e-2), second_pair(kind, again, world, 98)
    checkpoint(tmp_path).load({"policy": (again, its_optimizer), kind: its_second})
    train(again, its_optimizer, *its_second, seed=5)
    assert weights_digest(again) == weights_digest(policy)
    assert weights_digest(its_second[0]) == weights_digest(second[0])


def test_saving_an_optimizer_that_has_not_stepped_changes_nothing(policy, world, tmp_path):
    """Adam's count of steps stays 0, in the run that goes on and in the one that loads the checkpoint."""
    optimizer, second = make_optimizer(policy, lr=1e-2), make_optimizer(policy, lr=1e-2)
    train_a_little(policy, optimizer, 1)
    checkpoint(tmp_path).save(1, {"policy": (policy, optimizer), "sft": (policy, second)}, world)
    again = load_policy("nano", world, from_config=NANO, seed=99)
    its_optimizer, its_second = make_optimizer(again, lr=1e-2), make_optimizer(again, lr=1e-2)
    checkpoint(tmp_path).load({"policy": (again, its_optimizer), "sft": (again, its_second)})
    for steps, expected in ((optimizer, 1), (second, 0), (its_optimizer, 1), (its_second, 0)):
        assert {state["step"].item() for state in steps.state.values()} == {expected}


def test_only_the_newest_checkpoints_are_kept_and_partial_ones_do_not_count(policy, world, tmp_path):
    optimizer = make_optimizer(policy, lr=1e-2)
    train_a_little(policy, optimizer, 1)
    saved = checkpoint(tmp_path)
    for step in (1, 2, 3):
        saved.save(step, {"policy": (policy, optimizer)}, world)
    assert sorted(p.name for p in saved.folder.iterdir()) == ["step-00000002", "step-00000003"]
    (saved.folder / "step-00000009.partial").mkdir()  # what a crash while saving leaves
    assert saved.latest().name == "step-00000003"
    saved.save(4, {"policy": (policy, optimizer)}, world)
    assert sorted(p.name for p in saved.folder.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_process_alone_saves_and_loads_without_gloo(policy, world, tmp_path, monkeypatch):
    """gloo's thread would compute, and OpenMP with more threads than cores is half as fast ever after."""
    asked = []

    def noted(act):
        return lambda *given, no_dist, **how: asked.append(no_dist) or act(*given, no_dist=no_dist, **how)

    for name in ("save", "load"):
        monkeypatch.setattr(checkpoints.dcp, name, noted(getattr(checkpoints.dcp, name)))
    mine, optimizer = Checkpoints(tmp_path, Settings()), make_optimizer(policy, lr=1e-2)
    mine.save(1, {"policy": (policy, optimizer)}, world)
    mine.load({"policy": (policy, optimizer)})
    assert asked == [True, True]


def test_a_failed_save_leaves_the_last_checkpoint(policy, world, tmp_path, monkeypatch):
    optimizer = make_optimizer(policy, lr=1e-2)
    train_a_little(policy, optimizer, 1)
    saved = checkpoint(tmp_path)
    saved.save(1, {"policy": (policy, optimizer)}, world)

    monkeypatch.setattr(checkpoints, "to_disk", full)
    with pytest.raises(RuntimeError, match=r"step 2 .* could not be written .*No space.* step-00000001 is intact"):
        saved.save(2, {"policy": (policy, optimizer)}, world)
    assert saved.state()["step"] == 1


@pytest.mark.parametrize("damage", ["flip a bit", "cut", "remove", "flip state.json"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(damage, policy, world, tmp_path, capsys):
    optimizer, saved = make_optimizer(policy, lr=1e-2), checkpoint(tmp_path)
    for step in (1, 2):
        train_a_little(policy, optimizer, 1)
        saved.save(step, {"policy": (policy, optimizer)}, world)
    path = saved.folder / "step-00000002" / ("state.json" if "state" in damage else "__0_0.distcp")
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    assert saved.state()["step"] == 1
    assert "WARNING" in (said := capsys.readouterr().err) and path.name in said
    saved.load({"policy": (policy, optimizer)})
    saved.save(2, {"policy": (policy, optimizer)}, world)  # the run comes by again
    assert sorted(p.name for p in saved.folder.iterdir()) == ["step-00000001", "step-00000002"]
    assert saved.state()["step"] == 2


def test_a_rank_looks_for_the_next_checkpoint_when_the_first_rank_has_set_a_damaged_one_aside(
    policy, world, tmp_path, monkeypatch
):
    saved, optimizer, done, sums = checkpoint(tmp_path), make_optimizer(policy, lr=1e-2), [], checkpoints._sums
    for step in (1, 2):
        saved.save(step, {"policy": (policy, optimizer)}, world)
    damaged = saved.latest()
    (damaged / "state.json").write_text("{}")

    def barrier():
        done.append("all have come")
        if done.count("all have come") == 2:  # meanwhile the first rank did this
            os.replace(damaged, damaged.with_suffix(".damaged"))

    monkeypatch.setattr(checkpoints, "_sums", lambda path, _: done.append(path.name) or sums(path, world))
    monkeypatch.setattr(checkpoints.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(checkpoints.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(checkpoints.dist, "barrier", barrier)
    assert saved.state()["step"] == 1
    assert done == ["step-00000002", "all have come", "all have come", "step-00000001"]


def test_without_an_intact_checkpoint_a_run_does_not_start_anew_in_silence(pairs, world, tmp_path):
    saved = checkpoint(tmp_path)
    saved.save(1, pairs, world)
    (saved.folder / "step-00000001" / "SHA256SUMS").unlink()
    for _ in range(2):  # a second start finds that it was set aside
        with pytest.raises(InputError, match="no intact checkpoint is left.*start anew"):
            saved.state()


def test_what_a_file_manager_leaves_in_a_checkpoint_does_not_damage_it(pairs, world, tmp_path, capsys):
    saved = checkpoint(tmp_path)
    saved.save(1, pairs, world)
    (saved.latest() / ".DS_Store").write_text("x")
    (saved.latest() / "@eaDir").mkdir()
    assert saved.state()["step"] == 1 and "WARNING" not in capsys.readouterr().err


def test_a_script_that_changed_since_the_checkpoint_is_warned_of(pairs, world, tmp_path, capsys, monkeypatch):
    """By its text when the run began: while it runs the file may be edited."""
    script = tmp_path / "mine.py"
    script.write_text("loss = 1")
    monkeypatch.setattr("common.checkpoints.inspect.getfile", lambda _: str(script))
    (tmp_path / "common").mkdir()
    monkeypatch.setattr(checkpoints, "__file__", str(tmp_path / "common" / "checkpoints.py"))
    saved = checkpoint(tmp_path)
    script.write_text("loss = 2")
    saved.save(1, pairs, world)
    assert saved.state()["step"] == 1 and "WARNING" not in capsys.readouterr().err
    assert checkpoint(tmp_path).state()["step"] == 1
    assert "WARNING: mine.py or common/ has changed since" in capsys.readouterr().err
    script.write_text("loss = 1")
    assert checkpoint(tmp_path).state()["step"] == 1 and "WARNING" not in capsys.readouterr().err
    (tmp_path / "common" / "data.py").write_text("import os")
    assert checkpoint(tmp_path).state()["step"] == 1
    assert "WARNING: mine.py or common/ has changed since" in capsys.readouterr().err


def test_sha256sum_reads_the_checksums(pairs, world, tmp_path):
    saved = checkpoint(tmp_path)
    saved.save(1, pairs, world)
    words = ["sha256sum", "-c", "--strict", "SHA256SUMS"]
    said = subprocess.run(words, cwd=saved.latest(), check=True, capture_output=True, text=True).stdout
    files = {path.name for path in saved.latest().iterdir()} - {"SHA256SUMS"}
    assert {line.removesuffix(": OK") for line in said.splitlines()} == files


def test_a_checkpoint_written_in_the_background_is_that_of_its_moment(policy, world, tmp_path):
    optimizer = make_optimizer(policy, lr=1e-2)
    train_a_little(policy, optimizer, 1)
    saved = checkpoints.Checkpoints(tmp_path / "checkpoint", Settings(), background=True)
    then = {name: p.detach().clone() for name, p in policy.named_parameters()}
    mark = [7]
    saved.save(1, {"policy": (policy, optimizer)}, world, mark=mark)
    mark.append(8)  # while it is written
    train_a_little(policy, optimizer, 3)
    saved.wait()
    assert saved.state()["mark"] == [7]
    saved.load({"policy": (policy, optimizer)})
    assert all(torch.equal(p, then[name]) for name, p in policy.named_parameters())


def test_a_checkpoint_waits_for_the_one_before_it(pairs, world, tmp_path, monkeypatch):
    saved = checkpoints.Checkpoints(tmp_path / "checkpoint", Settings(), background=True)
    commit, begun = saved._commit, threading.Event()

    def slowly(*given):
        begun.set()
        time.sleep(0.2)
        commit(*given)

    monkeypatch.setattr(saved, "_commit", slowly)
    for step in (1, 2):
        saved.save(step, pairs, world)
        begun.wait(10)
    saved.wait()
    assert [path.name for path in saved._complete()] == ["step-00000001", "step-00000002"]


def test_the_ranks_meet_before_and_after_what_the_first_one_does_to_a_checkpoint(pairs, world, tmp_path, monkeypatch):
    saved, done = checkpoint(tmp_path), []
    saved.keep = 1
    (saved.folder / "step-00000001.partial").mkdir(parents=True)

    def note(owner, name):
        act = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: done.append(name) or act(*given, **named))

    for name, owner in {"rmtree": checkpoints.shutil, "barrier": checkpoints.dist, "save": checkpoints.dcp,
                        "_sums": checkpoints, "replace": checkpoints.os}.items():  # fmt: skip
        note(owner, name)
    saved.save(1, pairs, world)
    assert done == ["rmtree", "barrier", "save", "barrier", "_sums", "replace", "barrier"]
    done.clear()
    saved.save(2, pairs, world)  # the first one has another name before it is deleted: it must not look complete
    assert done == ["barrier", "save", "barrier", "_sums", "replace", "replace", "rmtree", "barrier"]


def test_a_checkpoint_in_the_background_has_a_group_of_its_own(pairs, world, tmp_path, monkeypatch):
    """Its collectives would meet the training's otherwise."""
    saved, groups = checkpoints.Checkpoints(tmp_path / "checkpoint", Settings(), background=True), []
    save, barrier = checkpoints.dcp.async_save, checkpoints.dist.barrier

    def async_save(*given, process_group, **named):
        groups.append(process_group)
        return save(*given, process_group=process_group, **named)

    monkeypatch.setattr(checkpoints.dcp, "async_save", async_save)
    monkeypatch.setattr(checkpoints.dist, "barrier", lambda group=None: groups.append(group) or barrier(group))
    monkeypatch.setattr(checkpoints, "gather_lists", lambda items, world, group: groups.append(group) or items)
    saved.save(1, pairs, world)
    saved.wait()
    assert saved._group and groups == [None, *[saved._group] * 4]


def test_a_checkpoint_in_the_background_leaves_gpus_alone(pairs, world, tmp_path, monkeypatch):
    """A new thread's GPU is the first one: what it asked of CUDA would make each rank a context there."""
    saved = checkpoints.Checkpoints(tmp_path / "checkpoint", Settings(), background=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: pytest.fail("asked for the GPU's stream"))
    saved.save(1, pairs, world)
    saved.wait()
    assert saved.latest()


def test_a_model_that_comes_twice_is_saved_once_under_its_first_name(policy):
    optimizers = [make_optimizer(policy, lr=1e-2) for _ in range(2)]
    pairs = {name: (policy, optimizer) for name, optimizer in zip(("policy", "sft"), optimizers, strict=True)}
    assert Checkpoints._tensors(pairs).keys() == {"model", "optim", "optim-sft"}


def test_what_goes_wrong_in_the_background_is_not_lost(pairs, world, tmp_path, monkeypatch):
    saved = checkpoints.Checkpoints(tmp_path / "checkpoint", Settings(), background=True)

    monkeypatch.setattr(checkpoints, "to_disk", full)
    saved.save(2, pairs, world)
    concurrent.futures.wait([saved._written], 30)
    with pytest.raises(RuntimeError, match="could not be written .*No space.*There is none before it"):
        saved.raise_if_failed()


def test_a_bad_log_prob_of_one_rank_stops_all(policy, monkeypatch):
    monkeypatch.setattr(trainer.dist, "all_reduce", lambda values: values.add_(4))  # another rank's
    with pytest.raises(FloatingPointError, match="4 log-probs are NaN"):
        trainer.check_finite({}, policy, trainer.World(0, 2, 2, torch.device("cpu")))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_named(bad, policy, world):
    trainer.check_finite({"loss/pg": 1.0, "eval": None}, policy, world)
    with pytest.raises(FloatingPointError, match="loss/pg is"):
        trainer.check_finite({"entropy": 0.0, "loss/pg": bad}, policy, world)


def test_an_id_beyond_the_embeddings_is_refused(policy):
    size = len(policy.lm.get_input_embeddings().weight)
    assert policy(pack([([1, size - 1], [size - 1])])).isfinite().all()
    for prompt, response in ([size], [1]), ([1], [size]):
        with pytest.raises(InputError, match=f"token id {size}: the model has {size} rows of embeddings"):
            policy(pack([(prompt, response)]))


def test_a_log_prob_of_exactly_0_is_a_number_and_one_above_it_is_an_error(policy, world, monkeypatch):
    with torch.no_grad():
        policy.lm.get_output_embeddings().weight.mul_(1e5)  # the likeliest token has probability 1
        hidden, weight = policy(pack([([1, 2], [3])]), raw=True)
        likeliest = (hidden @ weight.T).argmax().item()
    assert policy(pack([([1, 2], [likeliest])])).item() == 0.0
    trainer.check_finite({}, policy, world)
    monkeypatch.setattr(trainer, "linear_logprobs", lambda *_, **__: torch.tensor([1e-3, -1.0]))
    policy(pack([([1, 2], [3, 4])]))
    with pytest.raises(FloatingPointError, match="1 log-probs are NaN or above 0"):
        trainer.check_finite({}, policy, world)


def test_another_configuration_is_refused_and_the_difference_named(policy, world, tmp_path):
    optimizer = make_optimizer(policy, lr=1e-2)
    train_a_little(policy, optimizer, 1)
    checkpoint(tmp_path).save(1, {"policy": (policy, optimizer)}, world)
    assert checkpoint(tmp_path, steps=20).state()["step"] == 1  # more steps of the same run are fine
    with pytest.raises(InputError, match=r"--lr 0\.001 there, 0\.5 here"):
        checkpoint(tmp_path, lr=0.5).state()


# ---------------------------------------------------------------------------------------------------- metrics


def test_metrics_after_a_crash_have_no_step_missing_or_doubled(world, tmp_path):
    first = Metrics(tmp_path, Settings(), world, start=0, steps=5)
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step), "none": None}, show=["loss"])
    first.samples(3, [{"text": "é"}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # the crash came while this was written
    second = Metrics(tmp_path, Settings(), world, start=2, steps=5)
    for step in (3, 4, 5):
        second.log(step, {"loss": step * 10.0}, show=["loss"])
    second.close()
    rows = read_metrics(tmp_path)
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert (tmp_path / "samples.jsonl").read_text() == ""
    assert os.path.getsize(tmp_path / "curves.png") > 5000
    assert json.loads((tmp_path / "args.json").read_text())["steps"] == 10


# ------------------------------------------------------------------------- models out of runs, and their settings


def test_a_file_that_a_full_disk_cut_within_a_character_keeps_its_complete_lines(tmp_path):
    (tmp_path / "samples.jsonl").write_bytes('{"gold": "≤5"}\n{"gold": "≤'.encode()[:-1])
    assert complete_lines(tmp_path / "samples.jsonl") == ['{"gold": "≤5"}']


def test_a_finished_run_without_a_checkpoint_is_not_replaced(tmp_path):
    words = ["--save_every", "0", "--eval_every", "0", "--steps", "1", "--out", str(tmp_path / "run")]
    luffy.main(settings(*words))
    with pytest.raises(InputError, match="run was made with other settings .--lr 0.001"):
        luffy.main(settings(*words, "--lr", "0.5"))
    assert json.loads((tmp_path / "run" / "args.json").read_text())["lr"] != 0.5


def test_the_curves_are_drawn_before_the_model_marks_the_run_as_complete(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("common.run.export", killed)
    with pytest.raises(KeyboardInterrupt):
        luffy.main(settings("--out", tmp_path / "run", "--method", "sft", "--eval_every", "0"))
    assert (tmp_path / "run" / "curves.png").exists() and not (tmp_path / "run" / "model").exists()


def test_the_best_model_is_kept_from_the_step_on_at_which_it_is_asked_for(tmp_path, monkeypatch):
    accuracies = iter([0.9, 0.9, 0.5, 0.4])
    monkeypatch.setattr("common.run.evaluate", lambda *_: {"eval/mean": next(accuracies)})
    words = ["--save_every", "1", "--eval_every", "1", "--out", str(tmp_path / "run")]
    luffy.main(settings(*words, "--steps", "1"))
    luffy.main(settings(*words, "--steps", "3", "--keep_best"))
    kept = read_metrics(tmp_path / "run")
    assert [row["eval/mean"] for row in kept] == [0.9, 0.9, 0.5, 0.4] and (tmp_path / "run" / "best").is_dir()


def test_the_best_model_is_kept_and_any_checkpoint_comes_out_as_a_folder(tmp_path, world, monkeypatch):
    """Accuracies of steps 1 to 4: the second is the best, not only better than the one before it."""
    accuracies = iter([0.9, 0.2, 0.5, 0.3, 0.4])  # the first is the base model's
    monkeypatch.setattr("common.run.evaluate", lambda *_: {"eval/mean": next(accuracies)})
    words = ["--steps", "4", "--save_every", "1", "--keep", "4", "--eval_every", "1", "--keep_best"]
    words += ["--rope_theta", "3e4", "--max_positions", "2048", "--out", str(tmp_path / "run")]
    luffy.main(settings(*words))
    for step in (1, 2, 0):  # 0: the newest
        words = ["--step", step, "--tokenizer", tmp_path / "run" / "model"]  # --model scratch has no folder
        run_script("-m", "common.checkpoints", tmp_path / "run", tmp_path / f"{step}", *words)
    digests = [weights_digest(load_policy(str(tmp_path / f"{step}"), world)) for step in (1, 2, 0)]
    assert len(set(digests)) == 3
    assert weights_digest(load_policy(str(tmp_path / "run" / "best"), world)) == digests[1]
    assert weights_digest(load_policy(str(tmp_path / "run" / "model"), world)) == digests[2]
    config = json.loads((tmp_path / "2" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 3e4 and config["max_position_embeddings"] == 2048
    assert len(load_tokenizer(str(tmp_path / "2"))) > 20
    weights = tmp_path / "run" / "checkpoint" / "step-00000001" / "__0_0.distcp"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    errors = {"no checkpoint of step 7 there; steps: .1, 2, 3, 4.": ["--step", 7], "holds no value": ["--value"],
              "step-00000001: __0_0.distcp is damaged .*; export another --step": ["--step", 1]}  # fmt: skip
    for message, words in errors.items():
        failed = run_script("-m", "common.checkpoints", tmp_path / "run", tmp_path / "no", *words, check=False)
        assert failed.returncode == 2 and re.search(message, failed.stderr), failed.stderr


def test_an_exported_checkpoint_is_asked_and_stops_as_the_runs_model_and_replaces_no_folder(tmp_path):
    base, out = tmp_path / "base", tmp_path / "exported"
    shutil.copytree("models/tiny", base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0}))
    config = json.loads((base / "config.json").read_text()) | {"dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))
    template = base / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}<think>\n")
    words = ["--model", str(base), "--chat_template", str(template), "--steps", "1", "--save_every", "1"]
    luffy.main(settings(*words, "--eval_every", "0", "--out", str(tmp_path / "run")))
    template.unlink()  # the checkpoint holds its text
    checkpoints.export_checkpoint(str(tmp_path / "run"), str(out))
    for folder in (tmp_path / "run" / "model", out):
        assert load_tokenizer(str(folder)).chat_template.startswith("{% for m in messages %}{{ m.content }}")
        ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        assert ends == [2, load_tokenizer(str(folder)).eos_token_id], "traces end with the second"
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "all files can be read by the same users"
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("precious")
    for folder in (mine, mine / "notes.txt"):
        with pytest.raises(InputError, match="exists already; name a new folder"):
            checkpoints.export_checkpoint(str(tmp_path / "run"), str(folder))
    assert (mine / "notes.txt").read_text() == "precious"


def test_settings_are_printed_instead_of_run(capsys):
    table = {"tiny": {"lr": 7.0}}
    with pytest.raises(SystemExit) as stopped:
        trainer.parse_args(Settings, ["--print_settings", "--preset", "tiny"], preset=table)
    assert not stopped.value.code and json.loads(capsys.readouterr().out)["lr"] == 7.0


# --------------------------------------------------------------------------------- models that change their logits

SMALL = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1, pad_token_id=0, initializer_range=0.4,
)  # fmt: skip
CHANGED = {
    "gemma2": dict(head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=None, sliding_window=256),
    "cohere": dict(logit_scale=0.3), "granite": dict(logits_scaling=2.5, embedding_multiplier=3.0),
}  # fmt: skip


@pytest.mark.parametrize("model_type", CHANGED)
def test_a_temperature_and_the_kl_to_a_reference_are_of_logits_as_a_model_changes_them(model_type, world):
    """That its plain log-probs, answers and files are those of Transformers is in test_architectures.py."""
    config = SMALL | CHANGED[model_type] | {"model_type": model_type}
    policy, other = (load_policy("x", world, from_config=config, seed=seed) for seed in (3, 4))
    pairs, form = [([5, 6, 7], [8, 9, 10, 1]), ([11, 12], [13, 14])], trainer.logit_form(policy.lm.config)
    out, ref, kl = policy(pack(pairs), reference=other, temperature=0.7)
    torch.testing.assert_close((out, ref), tuple(model(pack(pairs), temperature=0.7) for model in (policy, other)))
    raw = [model(pack(pairs), raw=True) for model in (policy, other)]
    p, q = ((change_logits(hidden @ head.T, **form) / 0.7).log_softmax(-1) for hidden, head in raw)
    torch.testing.assert_close(out, p.gather(1, pack(pairs).targets[:, None])[:, 0])
    torch.testing.assert_close(kl, (p.exp() * (p - q)).sum(-1))
    assert not ref.requires_grad
    sampler = EmbeddedSampler(policy, stop_ids=[1])
    sampler.sync(policy, version=0)
    [[drawn]] = sampler.generate([[5, 6, 7]], n=1, keys=[0], seed=0, sampling=Sampling(6, 0.8))
    expected = policy(pack([([5, 6, 7], drawn.ids)]), temperature=0.8).tolist()
    assert drawn.logps == pytest.approx(expected, abs=1e-4)


def test_logit_forms_are_read_from_nested_configurations_too():
    text = AutoConfig.for_model("gemma3n_text", final_logit_softcapping=30.0)
    nested = AutoConfig.for_model("gemma3n", text_config=text.to_dict())
    assert trainer.logit_form(nested) == {"cap": 30.0, "scale": 1.0}
    assert trainer.logit_form(AutoConfig.for_model("qwen2")) == {"cap": 0.0, "scale": 1.0}
    logits = torch.tensor([-3.0, 0.0, 50.0])
    torch.testing.assert_close(change_logits(logits, **trainer.logit_form(text)), 30 * (logits / 30).tanh())


def test_minicpm_is_read_as_granite_without_its_own_code(world, tmp_path):
    """Against Llama, into whose weights MiniCPM's scales of embeddings, residuals and logits are multiplied."""
    scale_emb, scale_depth, base = 12.0, 1.4, 16
    config = SMALL | dict(model_type="llama", rms_norm_eps=1e-5, tie_word_embeddings=True)
    config["rope_parameters"] = dict(rope_type="linear", factor=2.0, rope_theta=100.0)
    minicpm, tokenizer = load_policy("x", world, from_config=config, seed=5), load_tokenizer("models/tiny")
    export(minicpm, tokenizer, tmp_path / "minicpm", world)
    theirs = json.loads((tmp_path / "minicpm" / "config.json").read_text()) | {
        "model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"], "scale_emb": scale_emb,
        "scale_depth": scale_depth, "dim_model_base": base,
        "auto_map": {"AutoConfig": "modeling_minicpm.MiniCPMConfig"}, "dtype": None, "torch_dtype": "float64",
        "rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 2.0},
    }  # fmt: skip
    del theirs["rope_parameters"], theirs["tie_word_embeddings"]  # which published folders do not have
    (tmp_path / "minicpm" / "config.json").write_text(json.dumps(theirs))
    llama = load_policy("x", world, from_config=config | {"tie_word_embeddings": False}, seed=5)
    weights = dict(minicpm.lm.named_parameters())
    with torch.no_grad():
        for name, p in llama.lm.named_parameters():
            p.copy_(weights["model.embed_tokens.weight" if name == "lm_head.weight" else name])
            p.mul_(scale_emb if "embed_tokens" in name else base / 32 if "lm_head" in name else 1.0)
            if "o_proj" in name or "down_proj" in name:
                p.mul_(scale_depth / 2**0.5)
    pairs = pack([([5, 6, 7], [8, 9, 10, 1]), ([11, 12], [13, 14])])
    ours = load_policy(str(tmp_path / "minicpm"), world)
    assert ours.lm.saved_dtype == torch.float64
    torch.testing.assert_close(ours(pairs), llama(pairs), rtol=1e-4, atol=1e-4)
    export(ours, tokenizer, tmp_path / "granite", world)
    torch.testing.assert_close(load_policy(str(tmp_path / "granite"), world)(pairs), ours(pairs))
    value = load_policy(str(tmp_path / "minicpm"), world, kind=trainer.ValueModel, new_head=True)
    assert value(pairs).abs().max() == 0
    export(value, tokenizer, tmp_path / "value", world)
    load_policy(str(tmp_path / "value"), world, kind=trainer.ValueModel)
    for setting, message in (
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights cannot be trained"),
        ({"sparse_config": {"dense_len": 8192}}, "sparse attention; without sparse_config in"),
    ):
        (tmp_path / "minicpm" / "config.json").write_text(json.dumps(theirs | setting))
        with pytest.raises(InputError, match=message):
            load_policy(str(tmp_path / "minicpm"), world)


def test_weights_that_are_not_numbers_are_refused_at_load(policy):
    with torch.no_grad():
        policy.lm.lm_head.weight[5] = math.nan
    with pytest.raises(InputError, match="--model m: the model's log-probs are not finite"):
        trainer.prove(policy, "--model m")


@pytest.mark.parametrize(("experts", "gap", "fits"), [
    (False, 5e-5, True), (False, 2e-4, False), (True, 1.5e-3, True), (True, 3e-3, False),
])  # fmt: skip
def test_the_proof_of_a_model_allows_what_rounding_explains(experts, gap, fits, policy, monkeypatch):
    """Of log-probs that do not vary: their deviation counts as 0.1."""
    plain = policy.plain
    torch.nn.init.zeros_(policy.lm.lm_head.weight)
    if experts:
        policy.experts = torch.nn.Linear(1, 1)

    def differing(ids, raw=False):
        return plain(ids, raw=raw) + (0 if raw else gap * (-1.0) ** torch.arange(len(ids) - 1))

    monkeypatch.setattr(policy, "plain", differing)
    with contextlib.nullcontext() if fits else pytest.raises(InputError, match="log-probs are off by"):
        trainer.prove(policy, "--model m")


def test_a_peer_that_died_is_not_reported_as_a_model_that_is_not_supported(policy, monkeypatch):
    def lost(*_, **__):
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:537] Connection reset by peer")

    monkeypatch.setattr(policy, "forward", lost)
    with pytest.raises(RuntimeError, match="reset by peer"):
        trainer.prove(policy, "--model m")
    sampler = EmbeddedSampler(policy, stop_ids=[1])
    with pytest.raises(RuntimeError, match="reset by peer"):
        sampler.sync(policy, version=0)


def test_a_dropped_model_leaves_the_gpu_before_the_next_is_loaded(world, monkeypatch):
    def load(*_):
        raise InputError(f"{dropped()} is still there")

    gc.disable()  # it may come at any time
    try:
        policy = fully_shard(load_policy("nano", world, from_config=NANO), mesh=init_device_mesh("cpu", (1,)))
        dropped = weakref.ref(policy)
        del policy
        monkeypatch.setattr(trainer, "_load", load)
        with pytest.raises(InputError, match="None is still there"):
            load_policy("x", dataclasses.replace(world, device=torch.device("cuda")))
    finally:
        gc.enable()


def test_a_path_that_is_no_model_folder_is_named_with_what_to_name_instead(tmp_path, world):
    for path in (f"{tmp_path}/typo", "/typo", "./typo", "~/typo", "no/typo/model", "models/typo"):
        with pytest.raises(InputError, match=f"^--tokenizer {path}: no such folder"):
            load_tokenizer(path, flag="--tokenizer")
    for name in ("org/typo", "typo"):  # of the Hub
        with pytest.raises(InputError, match=f"^--tokenizer {name}: no tokenizer there .*; {os.getcwd()} has no such"):
            load_tokenizer(name, flag="--tokenizer")
    shutil.copytree("models/tiny", tmp_path / "run" / "model")
    with pytest.raises(InputError, match=f"it is a run folder: name {tmp_path}/run/model$"):
        load_tokenizer(f"{tmp_path}/run")
    (tmp_path / "run" / "best").mkdir()
    with pytest.raises(InputError, match=f"it is a run folder: name {tmp_path}/run/model or {tmp_path}/run/best$"):
        load_tokenizer(f"{tmp_path}/run")
    (tmp_path / "run" / "value").mkdir()
    with pytest.raises(InputError, match=f"cannot be loaded .*it is a run folder: name {tmp_path}/run/value"):
        load_policy(str(tmp_path / "run"), world, kind=ValueModel)


def test_a_model_is_saved_in_the_dtype_that_it_was_loaded_from(policy, world, tmp_path):
    for dtype in (torch.bfloat16, torch.float32):
        policy.lm.saved_dtype = dtype
        export(policy, load_tokenizer("models/tiny"), tmp_path / "model", world)
        saved = load_file(tmp_path / "model" / "model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {dtype}
        assert load_policy(str(tmp_path / "model"), world).lm.saved_dtype == dtype


def test_a_model_is_saved_from_the_weights_that_are_trained(policy, monkeypatch):
    """Not from the copies that a forward on CUDA leaves, in bf16."""
    done = []
    monkeypatch.setattr(trainer, "reshard", lambda model: done.append("reshard"))
    monkeypatch.setattr(trainer, "whole", lambda value: done.append("gather") or value)
    assert dict(trainer.full_parameters(policy)) and done[:2] == ["reshard", "gather"]


@pytest.mark.parametrize(("frozen", "copies"), [(False, 3), (True, 1)])  # frozen weights have no moments
def test_the_disk_must_hold_moments_the_checkpoint_that_is_written_and_the_model(
    frozen, copies, policy, tmp_path, monkeypatch
):
    policy.requires_grad_(not frozen)
    need = 4 * sum(p.numel() for p in policy.parameters()) * (copies * (2 + 1) + 1)  # --keep 2
    for free in (need, need - 1):
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with contextlib.nullcontext() if free == need else pytest.raises(InputError, match="GB are free"):
            checkpoint(tmp_path).check_space({"policy": (policy, None)})
        if free == need and not frozen:  # the second optimizer of a model has moments of its own
            with pytest.raises(InputError, match="GB are free"):
                checkpoint(tmp_path).check_space({"policy": (policy, None), "sft": (policy, None)})


def test_a_value_model_can_be_what_a_run_trains(world, tmp_path):
    value = load_policy("nano", world, from_config=NANO, kind=ValueModel)
    torch.nn.init.ones_(value.lm.score.weight)
    pairs = {"policy": (value, make_optimizer(value, lr=1e-3))}
    checkpoint(tmp_path / "run").save(1, pairs, world)
    before = weights_digest(value)
    torch.nn.init.zeros_(value.lm.score.weight)
    checkpoint(tmp_path / "run").load(pairs)
    assert weights_digest(value) == before
    checkpoints.export_checkpoint(str(tmp_path / "run"), str(tmp_path / "model"), tokenizer="models/tiny")
    assert weights_digest(load_policy(str(tmp_path / "model"), world, kind=ValueModel)) == before


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(pairs, world, tmp_path, monkeypatch):
    done, replace, saved = [], checkpoints.os.replace, checkpoint(tmp_path)
    monkeypatch.setattr(checkpoints, "to_disk", lambda path: done.append(path.name))
    monkeypatch.setattr(checkpoints.os, "replace", lambda old, new: done.append(new.name) or replace(old, new))
    saved.save(1, pairs, world)
    named = done.index("step-00000001")
    assert {path.name for path in saved.latest().iterdir()} < set(done[:named]) and saved.folder.name in done[named:]


def test_a_model_is_on_the_disk_before_it_has_its_name_and_has_it_before_another_rank_goes_on(
    policy, world, tmp_path, monkeypatch
):
    done = []

    def note(owner, name):
        act = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *paths, **how: done.append((name, *(p.name for p in paths[:1]))) or act(*paths, **how)
        )

    for owner, name in ((trainer, "to_disk"), (shutil, "rmtree"), (os, "replace"), (trainer.dist, "barrier")):
        note(owner, name)
    (tmp_path / "model").mkdir()
    export(policy, load_tokenizer("models/tiny"), tmp_path / "model", world)
    begun, *written = done[: done.index(("rmtree", "model"))]
    assert begun == ("rmtree", "model.partial") and done[-2:] == [("replace", "model.partial"), ("barrier",)]
    assert {name for _, name in written} == {*os.listdir(tmp_path / "model"), "model.partial"}


def test_a_setting_that_one_side_lacks_is_another_one():
    assert checkpoints.changed_settings({"a": 1}, {}, ["a"]) == "--a 1 there, None here"
    assert checkpoints.changed_settings({}, {"a": 1}, ["a"]) == "--a None there, 1 here"


def test_no_setting_that_is_an_algorithms_may_change_on_resume():
    common = {field.name for field in dataclasses.fields(RunArgs)}
    for name in ("behavior_injection", "luffy", "oreo", "redi", "relift"):
        args = importlib.import_module(name).Args
        assert not Checkpoints.FREE & {field.name for field in dataclasses.fields(args)} - common
    for name in ("lr", "betas", "batch_size", "schedule", "seed", "max_grad_norm", "weight_decay"):
        assert name not in Checkpoints.FREE


def test_the_rate_of_a_step_is_the_one_that_it_is_given_and_decay_is_adamws(policy):
    optimizer, weight = make_optimizer(policy, lr=1e-3, weight_decay=0.1), policy.lm.get_output_embeddings().weight
    for lr in (0.5, 0.25):
        before = weight.detach().clone()
        (policy(pack([([3, 4], [5, 6])])).sum() * 0).backward()
        optimizer_step(policy, optimizer, lr=lr, max_grad_norm=1.0)
        torch.testing.assert_close(weight.detach(), before * (1 - lr * 0.1))  # without a gradient: decay alone


# ---------------------------------------------------------------------- what is measured, limits, digests, settings


def test_a_sequence_may_have_as_many_tokens_as_there_are_positions(policy):
    limit = NANO["max_position_embeddings"]
    with torch.no_grad():
        assert len(policy(pack([([3], [4] * limit)]))) == limit  # the last one is never read
        with pytest.raises(InputError, match=f"a sequence of {limit + 1} tokens exceeds the {limit} positions"):
            policy(pack([([3], [4] * (limit + 1))]))


def test_the_context_is_the_one_that_was_asked_for_and_a_model_without_one_rope_base_is_refused():
    config = AutoConfig.for_model("qwen2", max_position_embeddings=256)
    asked = SimpleNamespace(rope_theta=500.0, max_positions=64, model="m")
    trainer.set_context(asked, config)
    assert (config.rope_parameters["rope_theta"], trainer.max_positions(config)) == (500.0, 64)
    trainer.set_context(SimpleNamespace(rope_theta=0.0, max_positions=0, model="m"), config)
    assert (config.rope_parameters["rope_theta"], trainer.max_positions(config)) == (500.0, 64), "0 keeps them"
    nested = AutoConfig.for_model("llava", text_config=dict(model_type="qwen2"))
    trainer.set_context(asked, nested)
    assert (nested.text_config.rope_parameters["rope_theta"], trainer.max_positions(nested)) == (500.0, 64)
    for kind in ("gpt2", "gemma3_text"):  # no RoPE; a base for each kind of layer
        with pytest.raises(InputError, match="--rope_theta: the configuration of --model m has no single RoPE base"):
            trainer.set_context(asked, AutoConfig.for_model(kind))
    longrope = AutoConfig.for_model("qwen2", rope_scaling=dict(
        type="longrope", short_factor=[1.0] * 64, long_factor=[4.0] * 64, original_max_position_embeddings=4096
    ))  # fmt: skip
    with pytest.raises(InputError, match="--max_positions: longrope of --model m scales attention by it; 0 keeps it"):
        trainer.set_context(asked, longrope)


def test_positions_end_where_rope_begins_to_depend_on_the_longest_sequence():
    def limit(**rope):
        return trainer.max_positions(AutoConfig.for_model("qwen2", max_position_embeddings=256, rope_parameters=rope))

    ends = dict(rope_theta=1e4, factor=8.0, original_max_position_embeddings=32)
    assert [limit(rope_type=kind, **ends) for kind in ("dynamic", "yarn", "linear")] == [32, 256, 256]
    by_layer = {"full_attention": dict(rope_type="dynamic", **ends), "sliding_attention": dict(rope_type="default")}
    config = AutoConfig.for_model("gemma3_text", max_position_embeddings=256)
    config.rope_parameters = by_layer
    assert trainer.max_positions(config) == 32


def test_layers_of_a_kind_that_is_not_supported_are_found_in_nested_configurations_too():
    config = AutoConfig.for_model("llava", text_config=dict(model_type="qwen3_next"))
    with pytest.raises(InputError, match="layers of a kind that is not supported: linear_attention"):
        trainer._check_config(config, "--model m", trainer.Policy)


def test_dropout_is_zero_in_nested_configurations_too():
    config = AutoConfig.for_model("llava", text_config=dict(model_type="qwen2", attention_dropout=0.3))
    trainer._prepare_config(config)
    assert config.text_config.attention_dropout == 0.0


def test_an_interrupt_while_a_checkpoint_is_written_is_an_interrupt(tmp_path):
    wrapped = RuntimeError("PytorchStreamWriter failed")
    wrapped.__context__ = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path, RunArgs())._explain(3):
        raise wrapped


def test_lora_trains_adapters_alone_and_a_values_head_has_one_and_all_are_exported(world, tmp_path):
    pytest.importorskip("peft")  # published: on the value head too, whose own zeros stay as they are
    for kind, layers in ((trainer.Policy, 28), (trainer.ValueModel, 29)):
        model = load_policy("models/tiny", world, kind=kind, new_head=True, lora=2)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert len(trained) == 2 * layers and all(".lora_" in name for name in trained)
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        export(model, load_tokenizer("models/tiny"), tmp_path / kind.__name__, world)
        again, batch = load_policy(str(tmp_path / kind.__name__), world, kind=kind), pack([([5, 6], [7, 8, 9])])
        torch.testing.assert_close(again(batch), model(batch), rtol=1e-3, atol=1e-4)
        assert model(batch).all()


def test_adapters_begin_from_the_seed(world):
    pytest.importorskip("peft")
    a, b, c = (load_policy("models/tiny", world, lora=2, seed=seed).state_dict() for seed in (1, 1, 2))
    names = [name for name in a if "lora_A" in name]
    assert names and all(a[name].equal(b[name]) and not a[name].equal(c[name]) for name in names)


def test_a_models_digest_is_of_its_weights_configurations_and_template_under_their_names(tmp_path):
    files = {"a.safetensors": "1", "b.safetensors": "2", "config.json": "{}", "chat_template.jinja": "x",
             "generation_config.json": "{}"}  # fmt: skip

    def digest(name, **changes):
        (tmp_path / name).mkdir()
        for file, text in (files | changes).items():
            (tmp_path / name / file).write_text(text)
        return checkpoints.digest_of(str(tmp_path / name))

    plain = digest("one")
    (tmp_path / "two").mkdir()
    for file in files:
        shutil.copy(tmp_path / "one" / file, tmp_path / "two")
    (tmp_path / "two" / "README.md").write_text("no part of it")
    assert checkpoints.digest_of(str(tmp_path / "two")) == plain
    others = ("config.json", "b.safetensors", "generation_config.json")
    changed = [digest(f"other {file}", **{file: "3"}) for file in others]
    (tmp_path / "two" / "chat_template.jinja").write_text("y")
    changed.append(checkpoints.digest_of(str(tmp_path / "two")))
    (tmp_path / "one" / "b.safetensors").rename(tmp_path / "one" / "c.safetensors")
    changed.append(checkpoints.digest_of(str(tmp_path / "one")))
    assert len({plain, *changed}) == 6


def test_a_checkpoint_of_before_there_was_a_flag_is_gone_on_from(tmp_path, world):
    mine = checkpoint(tmp_path, method="b")
    there = {name: value for name, value in mine.settings.items() if name != "method"}
    (tmp_path / "model").mkdir()
    (tmp_path / "args.json").write_text(json.dumps(there))
    assert mine.state() is None
    (tmp_path / "args.json").write_text(json.dumps(there | {"method": "a"}))
    with pytest.raises(InputError, match="--method 'a' there, 'b' here"):
        mine.state()
    mine.check_data({"settings": there}, "digest", "--data")  # nor had it a digest
    with pytest.raises(InputError, match="--data: the data .* changed"):
        mine.check_data({"settings": there, "data": "other"}, "digest", "--data")
