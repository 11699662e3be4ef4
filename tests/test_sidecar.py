"""A real vLLM on a CPU: what it draws, from which weights, and what happens when it fails."""

import contextlib
import copy
import functools
import io
import json
import math
import os
import random
import re
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from common import vllm, vllm_worker
from common.data import InputError, pack
from common.metrics import read_metrics
from common.rollout import Completion, EmbeddedSampler, Sampling
from common.trainer import export, load_policy, load_tokenizer
from common.vllm import VLLMSampler, Worker, WorkerFault, fill
from tests.conftest import NANO, ROOT, gone, processes, run_script, start_ranks, zygote
from tests.test_architectures import make
from tests.test_rollout import KEYS, PROMPTS, check_batches, check_ends, ids

if vllm.vllm_version(cuda=False) is None:
    pytest.skip("needs vLLM for CPU: `make vllm`, or an interpreter in ROLLOUT_PYTHON", allow_module_level=True)

CONFIG = NANO | {  # vLLM's attention heads on CPU are 32 wide or more
    "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip
EXPERTS = dict(
    vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=512, eos_token_id=1, pad_token_id=0,
    num_experts_per_tok=2,
)  # fmt: skip
LONG = [random.Random(1).randrange(2, 61) for _ in range(200)]  # more than a block of the prefix cache, 128


def make_policy(world, **changes):
    return load_policy("nano", world, from_config=CONFIG | changes, seed=3)


@pytest.fixture(scope="module")
def policy(world):
    return make_policy(world)


@pytest.fixture(scope="module")
def sampler(world, policy):
    sampler = VLLMSampler(policy, world, stop_ids=[1], max_tokens=300)
    yield sampler
    sampler.close()


@pytest.fixture
def synced(sampler, policy):
    sampler.sync(policy, version=0)
    return sampler


def gap(policy, groups, prompts=PROMPTS, temperature=1.0):
    """Largest difference between reported log-probs and the trainer's."""
    pairs = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
    logp = policy(pack([(p, c.ids) for p, c in pairs]), temperature=temperature).detach()
    return (logp - torch.tensor([x for _, c in pairs for x in c.logps])).abs().max().item()


def change(policy):
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn_like(p) * 0.05)


def test_greedy_tokens_are_the_embedded_samplers(policy, synced):
    embedded = EmbeddedSampler(policy, stop_ids=[1])
    embedded.sync(policy, 0)
    how = dict(n=1, keys=KEYS, seed=0, sampling=Sampling(30, temperature=0.0))
    assert ids(synced.generate(PROMPTS, **how)) == ids(embedded.generate(PROMPTS, **how))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_reported_log_probs_are_the_trainers(policy, synced, temperature):
    groups = synced.generate(PROMPTS, n=6, keys=KEYS, seed=0, sampling=Sampling(20, temperature))
    assert gap(policy, groups, temperature=temperature) < 1e-5


def test_a_completion_ends_at_its_first_stop_id_or_at_the_limit(synced):
    check_ends(synced)


def test_nothing_but_a_stop_id_ends_a_completion(synced, monkeypatch):
    """Not the config's eos either, which is 1."""
    monkeypatch.setattr(synced, "stop_ids", [])
    groups = synced.generate(PROMPTS, n=20, keys=KEYS, seed=0, sampling=Sampling(30))
    assert {len(c.ids) for group in groups for c in group} == {30}
    assert any(1 in c.ids for group in groups for c in group)


def test_a_prompt_has_a_limit_and_a_call_stop_ids_and_a_nucleus_of_its_own(synced):
    limits, others = [3, 9, 1, 30, 12], tuple(range(2, 12))
    how = dict(n=20, keys=KEYS, seed=0)
    groups = synced.generate(PROMPTS, sampling=Sampling(limits, stop_ids=others), **how)
    for group, limit in zip(groups, limits, strict=True):
        for c in group:
            assert len(c.ids) == limit if c.finish == "length" else c.ids[-1] in (1, *others) and len(c.ids) <= limit
            assert not {1, *others} & set(c.ids[:-1])
    assert {c.ids[-1] for group in groups for c in group if c.finish == "stop"} > {1}
    greedy = synced.generate(PROMPTS, sampling=Sampling(12, temperature=0.0), **how)
    assert ids(synced.generate(PROMPTS, sampling=Sampling(12, top_p=1e-6), **how)) == ids(greedy)


def test_more_prompts_than_vllm_reads_at_once_are_read_one_after_the_other(policy, synced):
    prompts = [[7 + i, *LONG] for i in range(50)]  # 10,050 tokens
    groups = synced.generate(prompts, n=2, keys=range(50), seed=0, sampling=Sampling(3))
    assert synced.restarts == 0
    assert gap(policy, groups, prompts) < 1e-5


def test_what_is_drawn_does_not_depend_on_the_batch(synced):
    together = check_batches(synced)
    assert len({tuple(c) for group in together for c in group}) == 25
    assert ids(synced.generate(PROMPTS, n=5, keys=KEYS, seed=8, sampling=Sampling(25))) != together


@pytest.mark.parametrize("tied", [False, True])
def test_after_each_of_five_syncs_vllm_has_the_new_weights(world, sampler, tied):
    policy = make_policy(world, tie_word_embeddings=tied)
    prompts = [*PROMPTS, LONG]
    how = dict(n=2, keys=[*KEYS, 2], sampling=Sampling(10))
    sampler.sync(policy, 0)
    files = len(os.listdir("/proc/self/fd"))
    for version in range(1, 6):
        change(policy)
        assert gap(policy, sampler.generate(prompts, seed=version, **how), prompts) > 1e-2
        sampler.sync(policy, version)
        assert gap(policy, sampler.generate(prompts, seed=version, **how), prompts) < 1e-4
    assert len(os.listdir("/proc/self/fd")) == files


def mixture(kind, world):
    config = EXPERTS | {"model_type": kind, "moe_intermediate_size": 64, "num_experts": 4, "num_local_experts": 4}
    return load_policy(kind, world, from_config=config, seed=3)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_weights_of_experts_are_sent_under_the_names_of_a_checkpoint(world, kind, monkeypatch, tmp_path):
    """Transformers keeps them fused and under names of its own; vLLM loads the names of checkpoints."""
    policy = mixture(kind, world)
    monkeypatch.setattr(vllm, "Worker", lambda *_: SimpleNamespace(start=lambda: None))
    sent = dict(VLLMSampler(policy, world, stop_ids=[1], max_tokens=100)._weights())
    export(policy, load_tokenizer(str(ROOT / "models/tiny")), tmp_path / "model", world)
    saved = load_file(tmp_path / "model/model.safetensors")
    assert sent.keys() == saved.keys() and all(torch.equal(sent[name], saved[name]) for name in saved)


def test_a_routers_bias_is_not_rounded_to_bf16(world, monkeypatch, tmp_path):
    """GLM's lie between 6.8 and 7.1, where bf16 has steps of 0.03: other experts would be chosen."""
    policy = load_policy(str(make("deepseek_v3", tmp_path)), world)
    [(name, bias)] = [(k, b) for k, b in policy.lm.named_buffers() if k.endswith("e_score_correction_bias")]
    bias += 7
    monkeypatch.setattr(vllm, "Worker", lambda *_: SimpleNamespace(start=lambda: None))
    sampler = VLLMSampler(policy, world, stop_ids=[1], max_tokens=64)
    sampler.dtype = torch.bfloat16  # as on CUDA
    sent = dict(sampler._weights())
    assert torch.equal(sent.pop(name), bias) and not torch.equal(bias.bfloat16().float(), bias)
    assert {x.dtype for x in sent.values()} == {torch.bfloat16}


@pytest.mark.parametrize("modules", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_a_copy_of_the_embeddings_goes_where_vllm_has_an_output_matrix(modules, tmp_path):
    """Its Gemma 2 has none."""
    weights = [("model.embed_tokens.weight", torch.randn(2, 2)), ("lm_head.weight", torch.randn(2, 2))]
    path, got = tmp_path / "weights", []
    path.write_bytes(bytes(32))
    [content] = fill(torch.from_file(str(path), shared=True, size=32, dtype=torch.uint8), weights)
    model = torch.nn.ModuleDict({name: torch.nn.Embedding(2, 2) for name in modules})
    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(is_sleeping=lambda: False), apply_model=lambda act: [act(model)],
        collective_rpc=lambda name, kwargs: got.extend(kwargs["weights_iterator"]),
    )  # fmt: skip
    messages = iter([content, ()])
    pipe = SimpleNamespace(recv=lambda: next(messages), send=lambda message: None)
    vllm_worker.load(llm, pipe, (str(path), 32), "lm_head.weight")
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(got, weights))
    assert [name.split(".")[-2] for name, _ in got] == modules


def test_weights_of_experts_arrive_in_vllm_which_leaves_nothing_when_it_is_killed(world):
    policy = mixture("qwen3_moe", world)
    sampler = VLLMSampler(policy, world, stop_ids=[1], max_tokens=100)
    group, folder = sampler.worker.process.pid, sampler.worker.folder
    try:
        for version in range(2):
            change(policy)
            sampler.sync(policy, version)
            assert gap(policy, sampler.generate(PROMPTS, n=2, keys=KEYS, seed=0, sampling=Sampling(10))) < 1e-4
        os.kill(engine(sampler), signal.SIGKILL)
        with pytest.raises(WorkerFault, match="the vLLM process is gone|takes no request"):
            sampler._draw([([5], 0, 4)], Sampling(4), None)
        assert gone(group, 5) and not os.path.exists(folder)
    finally:
        memory = f"/proc/self/fd/{sampler.memory}"
        for _ in range(2):  # also after an error that has closed it
            sampler.close()
    assert not os.path.exists(memory)


@pytest.mark.parametrize("size", [64, 100, 1 << 20])
def test_a_buffer_of_weights_holds_all_of_them_in_order(size):
    weights = [(f"w{i}", torch.randn(shape).bfloat16()) for i, shape in enumerate([(4, 8), (3,), (5, 2), (32,), ()])]
    weights[2:2] = [("bias", torch.randn(5))]  # a buffer, in float32
    buffer, seen = torch.zeros(size, dtype=torch.uint8), []
    for names, shapes, sizes, dtypes in fill(buffer, weights):
        parts = [part.clone() for part in buffer[: sum(sizes)].split(sizes)]
        whole = [p.view(getattr(torch, t)).view(s) for p, t, s in zip(parts, dtypes, shapes, strict=True)]
        seen += zip(names, whole, strict=True)
    assert [name for name, _ in seen] == [name for name, _ in weights]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for (_, a), (_, b) in zip(seen, weights, strict=True))


def test_weights_that_need_many_buffers_arrive(world, sampler, monkeypatch):
    policy = make_policy(world, tie_word_embeddings=True)
    monkeypatch.setattr(vllm, "BUCKET", 1)  # as large as the largest tensor
    change(policy)
    sampler.sync(policy, 0)
    assert gap(policy, sampler.generate(PROMPTS, n=2, keys=KEYS, seed=0, sampling=Sampling(10))) < 1e-4


def test_prefixes_that_old_weights_computed_are_forgotten(world, sampler, monkeypatch):
    """Log-probs after a long prompt, whose keys and values vLLM may keep."""
    policy, how = make_policy(world), dict(n=2, keys=[0], sampling=Sampling(10))
    gaps, call = [], sampler.worker.call

    def without_reset(act, *arguments):
        return call("label" if act == "wake" else act, *arguments)

    for version, sent in enumerate([call, without_reset]):
        sampler.sync(policy, 2 * version)
        sampler.generate([LONG], seed=0, **how)
        change(policy)
        monkeypatch.setattr(sampler.worker, "call", sent)
        sampler.sync(policy, 2 * version + 1)
        gaps.append(gap(policy, sampler.generate([LONG], seed=0, **how), [LONG]))
    assert gaps[0] < 1e-4 < 1e-2 < gaps[1]


def test_a_sync_without_the_output_matrix_is_detected_at_once(world, sampler, monkeypatch):
    """What happens where vLLM's output matrix is tied to its embeddings: the old one stays."""
    policy = make_policy(world, tie_word_embeddings=True)
    sampler.sync(policy, 0)
    whole = sampler._weights
    monkeypatch.setattr(sampler, "_weights", lambda: (item for item in whole() if item[0] != "lm_head.weight"))
    with torch.no_grad():
        policy.lm.get_input_embeddings().weight.add_(0.1 * torch.randn(61, 64))
    with pytest.raises(RuntimeError, match=r"the weights did not arrive .* \(sync \d+ \(step 1\)"):
        sampler.sync(policy, 1)
    with pytest.raises(RuntimeError, match="call sync"):
        sampler.generate(PROMPTS, n=1, keys=KEYS, seed=0, sampling=Sampling(4))


@pytest.mark.parametrize(("cuda", "gap", "fits"), [
    (False, 5e-4, True), (False, 2e-3, False), (True, 0.2, True), (True, 0.3, False), (True, math.nan, False),
])  # fmt: skip
def test_the_proof_of_a_sync_allows_what_rounding_explains(cuda, gap, fits, synced, monkeypatch):
    """A sign for each token: their mean would be 0."""
    draw = synced._draw

    def differing(requests, sampling, take):
        def signed(k, c):
            take(k, Completion(c.ids, [x + gap * (-1) ** i for i, x in enumerate(c.logps)], c.finish))

        draw(requests, sampling, signed)

    monkeypatch.setattr(synced, "_draw", differing)
    monkeypatch.setattr(synced, "_free", lambda: None)
    monkeypatch.setattr(synced, "cuda", cuda)
    monkeypatch.setattr(synced, "stop_ids", [])
    with contextlib.nullcontext() if fits else pytest.raises(RuntimeError, match="the weights did not arrive in vLLM"):
        synced._prove()


def test_a_skipped_sync_is_detected_at_once(policy, synced, monkeypatch):
    monkeypatch.setattr(synced, "_send_weights", lambda: None)  # a sync that sends nothing
    with pytest.raises(RuntimeError, match=r"drew with the weights of sync \d+ \(step 0\), not \d+ \(step 1\)"):
        synced.sync(policy, 1)
    monkeypatch.undo()
    synced.worker.receive()  # the end of that draw, which a run does not live to see
    synced.sync(policy, 1)
    synced.sleep()
    with pytest.raises(RuntimeError, match="call sync"):
        synced.generate(PROMPTS, n=1, keys=KEYS, seed=0, sampling=Sampling(4))


def test_a_prompt_without_room_for_its_completion_is_refused(synced):
    with pytest.raises(ValueError, match="prompt 1 has 291 tokens: with max_tokens 10 that is more than the 300"):
        synced.generate([[5], [5] * 291], n=1, keys=[0, 1], seed=0, sampling=Sampling(10))
    with pytest.raises(ValueError, match="empty prompt"):
        synced.generate([[5], []], n=1, keys=[0, 1], seed=0, sampling=Sampling(4))
    [[completion]] = synced.generate([[5] * 290], n=1, keys=[1], seed=0, sampling=Sampling(10))
    assert len(completion.ids) <= 10


def test_vllm_serves_an_untied_copy_of_the_model_and_the_policy_stays_as_it_is(world, monkeypatch):
    monkeypatch.setattr(Worker, "start", lambda self: None)
    policy = make_policy(world, tie_word_embeddings=True)
    sampler = VLLMSampler(policy, world, stop_ids=[7, 1, 7], max_tokens=100, max_num_seqs=5)
    assert policy.lm.config.tie_word_embeddings and not sampler.worker.config.tie_word_embeddings
    assert sampler.stop_ids == [1, 7] and sampler.worker.settings["max_num_seqs"] == 5


def test_vllm_gets_the_scale_of_ministral_3s_late_queries_by_the_name_that_it_reads(world, monkeypatch):
    monkeypatch.setattr(Worker, "start", lambda self: None)
    rope = dict(rope_type="yarn", rope_theta=1e4, factor=64.0, original_max_position_embeddings=8)
    config = EXPERTS | {"model_type": "ministral3", "rope_parameters": rope | {"llama_4_scaling_beta": 0.5}}
    sampler = VLLMSampler(load_policy("tiny", world, from_config=config), world, stop_ids=[1], max_tokens=100)
    assert sampler.worker.config.llama_4_scaling == {"beta": 0.5, "original_max_position_embeddings": 8}


def test_vllm_gets_a_window_of_cohere_in_which_it_reads_as_many_keys_as_the_trainer(world, monkeypatch):
    monkeypatch.setattr(Worker, "start", lambda self: None)
    policy = load_policy("tiny", world, from_config=EXPERTS | {"model_type": "cohere2", "sliding_window": 8})
    sampler = VLLMSampler(policy, world, stop_ids=[1], max_tokens=100)
    assert (sampler.worker.config.sliding_window, policy.lm.config.sliding_window) == (7, 8)


@pytest.mark.parametrize("kind", vllm.LEFT_OUT)
def test_a_model_of_which_vllm_leaves_a_part_out_is_refused(world, kind, tmp_path):
    policy = load_policy(str(make(kind, tmp_path)), world)
    with pytest.raises(InputError, match=f"leaves out {vllm.LEFT_OUT[kind]}, .* use --rollout embedded"):
        VLLMSampler(policy, world, stop_ids=[1], max_tokens=60)


# ------------------------------------------------------------------------------------------------- faults


def engine(sampler) -> int:
    """The process that runs vLLM, a child of its guard."""
    group = sampler.worker.process.pid
    return min(pid for pid, other, _ in processes() if other == group and pid != group)


def test_stopped_in_the_middle_of_a_batch_it_gives_the_same_answers(synced, policy, monkeypatch):
    group, restarts, folder = synced.worker.process.pid, synced.restarts, synced.worker.folder
    how = dict(n=8, keys=KEYS, seed=5, sampling=Sampling(250))
    monkeypatch.setattr(synced.worker, "patience", 3.0)
    struck, told = [], []

    def watch(i, answers):
        """Strike as soon as the first group is complete."""
        told.append(i)
        if not struck:
            struck.append(i)
            os.kill(engine(synced), signal.SIGSTOP)

    groups = synced.generate([*PROMPTS, [30]], n=[*[8] * 5, 1], keys=[*KEYS, 2], seed=5, sampling=how["sampling"],
                             drawn=watch)[:5]  # fmt: skip
    assert struck and synced.restarts == restarts + 1 and gone(group) and not os.path.exists(folder)
    assert [len(g) for g in groups] == [8] * 5 and sorted(told) == list(range(6))  # each once
    assert gap(policy, groups) < 1e-4
    monkeypatch.undo()
    assert ids(groups) == ids(synced.generate(PROMPTS, **how))


def test_a_completion_that_vllm_gave_up_is_a_fault(synced, monkeypatch):
    monkeypatch.setattr(synced.worker, "send", lambda *_: None)
    monkeypatch.setattr(synced.worker, "receive", lambda: [(0, [5], [-1.0], "abort", [synced.label])])
    with pytest.raises(WorkerFault, match="a completion ended with 'abort'"):
        synced._draw([([5], 0, 4)], Sampling(4), None)


def test_a_fault_that_comes_again_after_each_restart_is_an_error(synced, policy, monkeypatch):
    draw, starts = synced._draw, []

    def failing(requests, *how, most=1):
        if len(requests) > most:
            raise WorkerFault("a fault")
        draw(requests, *how)

    monkeypatch.setattr(synced.worker, "start", lambda: starts.append(synced.version))
    monkeypatch.setattr(synced, "close", lambda: starts.append("closed"))
    monkeypatch.setattr(synced, "_draw", failing)  # the batch fails, and the proof of each sync does not
    with pytest.raises(RuntimeError, match="vLLM failed: a fault"):
        synced.generate(PROMPTS, n=1, keys=KEYS, seed=0, sampling=Sampling(4))
    assert starts == [0, 0, 0, "closed"]
    monkeypatch.setattr(synced, "_draw", functools.partial(failing, most=0))
    with pytest.raises(RuntimeError, match="vLLM failed: a fault"):
        synced.sync(policy, 1)
    assert starts[4:] == [None, None, None, "closed"]


PEER = """if True:
    import sys, time
    from multiprocessing.connection import Connection
    pipe = Connection(int(sys.argv[3]))
    if {part}:
        import os
        os.write(pipe.fileno(), b"\\0\\0\\1\\0part")  # of a message of 256 bytes
    else:
        time.sleep(1)  # a start may take longer than an answer
        pipe.send("ready")
    time.sleep(600)
"""


@pytest.mark.parametrize("part", [True, False])
def test_a_vllm_that_stops_in_the_middle_of_a_message_counts_as_hung(sampler, monkeypatch, tmp_path, part):
    (tmp_path / "peer.py").write_text(PEER.format(part=part))
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/peer.py "$@"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("ROLLOUT_PYTHON", str(tmp_path / "python"))
    worker = Worker(sampler.worker.config, {}, dict(os.environ), patience=0.5)
    start = time.monotonic()
    try:
        with pytest.raises(RuntimeError if part else WorkerFault, match="is gone" if part else "takes no request"):
            worker.start()
            worker.send("load", b"x" * (4 << 20))  # it reads nothing
    finally:
        worker.stop()
    assert time.monotonic() - start < 20


def test_two_ranks_have_a_vllm_each_and_a_fault_of_one_is_known_to_both(tmp_path):
    config = json.dumps(CONFIG | {"tie_word_embeddings": True})
    run_script("tests/sidecar_ranks.py", config, tmp_path / "out.json", ranks=2, timeout=150)
    one, two = json.loads((tmp_path / "out.json").read_text())
    assert [r["rows"] for r in one] == [8, 8, 8] and [r["rows"] for r in two] == [8, 8, 0]
    assert [r["restarts"] for r in one] == [r["restarts"] for r in two] == [0, 1, 3]
    assert max(r["gap"] for r in one + two) < 1e-4


def test_a_model_that_vllm_cannot_run_is_an_error_with_its_cause(sampler):
    config = copy.deepcopy(sampler.worker.config)
    config.architectures = ["NoSuchForCausalLM"]
    worker = Worker(config, sampler.worker.settings | {"model_impl": "vllm"}, sampler.worker.environment, 60)
    with pytest.raises(RuntimeError, match="does not start: .* Its first error: .*ValidationError") as error:
        worker.start()
    assert "Model architectures ['NoSuchForCausalLM'] are not supported" in str(error.value)
    assert "The end of its log:" in str(error.value) and "ended with exit code 1" in str(error.value)
    assert worker.process is None and not os.path.exists(worker.folder)


def test_the_first_error_is_found_behind_torchs_prefix():
    """Once its process group is there, torch writes [rank0] before each line of a traceback."""
    worker = Worker(None, {}, {}, 60)
    worker.log = io.BytesIO(b"[rank0]: Traceback (most recent call last):\n[rank0]: KeyError: 'lm_head'\nit ended\n")
    assert worker.last_words().startswith(" Its first error: KeyError: 'lm_head'\nThe end of its log:\n  Traceback")


def test_two_ranks_train_and_killing_them_in_a_batch_leaves_nothing(tmp_path):
    words = ["luffy.py", "--preset", "tiny", "--model", "models/scratch", "--data", "igsm:1-2", "--igsm_problems", "40",
             "--batch_size", "4", "--group_size", "4", "--max_response_tokens", "40", "--steps", "1000",
             "--eval_every", "0", "--save_every", "0", "--rollout", "vllm", "--out", str(tmp_path / "run")]  # fmt: skip
    ranks = start_ranks(words, 2, tmp_path)
    try:
        deadline = time.time() + 300
        while time.time() < deadline and len(read_metrics(tmp_path / "run")) < 3:
            assert [zygote().poll(pid) for pid in ranks] == [None, None], (tmp_path / "err-0").read_text()[-3000:]
            time.sleep(0.2)
        found = processes()
    finally:
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
    started = [(group, words.split()) for _, group, words in found if re.match(r"\S+ \S+vllm_worker.py \d", words)]
    workers = {(group, words[4]) for group, words in started if int(words[2]) in ranks}
    assert len(workers) == 2
    assert all(gone(group, 5) and not os.path.exists(folder) for group, folder in workers)
    metrics = read_metrics(tmp_path / "run")
    assert len(metrics) >= 3
    assert all(row["mismatch/max"] < 1e-4 for row in metrics)
