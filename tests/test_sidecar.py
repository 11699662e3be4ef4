"""A real vLLM server on CPU: what it draws, from which weights, and what happens when it fails."""

import copy
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from common import rollout
from common.data import pack
from common.rollout import EmbeddedSampler, Sampling, Sidecar, VLLMSampler
from common.trainer import load_policy, read_metrics
from tests.conftest import NANO, ROOT, run_script
from tests.test_rollout import gone, processes

if rollout.vllm_version(cuda=False) is None:
    pytest.skip("needs vLLM for CPU: `make vllm`, or an interpreter in ROLLOUT_PYTHON", allow_module_level=True)

CONFIG = NANO | {  # vLLM's attention heads on CPU are 32 wide or more
    "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16], [17, 18, 19, 20]]
KEYS = [3, 1, 4, 5, 9]
LONG = [random.Random(1).randrange(2, 61) for _ in range(200)]  # more than a block of the prefix cache, 128


def make_policy(world, **changes):
    return load_policy("nano", world, from_config=CONFIG | changes, seed=3)


@pytest.fixture(scope="module")
def policy(world):
    return make_policy(world)


@pytest.fixture(scope="module")
def taken_port():
    """A port on which another program listens: the server's first choice."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.fixture(scope="module")
def sampler(world, policy, taken_port):
    real, ports = rollout.free_port, [taken_port]
    rollout.free_port = lambda: ports.pop() if ports else real()
    sampler = VLLMSampler(policy, world, stop_ids=[1], max_tokens=300)
    rollout.free_port = real
    yield sampler
    sampler.close()


@pytest.fixture
def synced(sampler, policy):
    sampler.sync(policy, version=0)
    return sampler


def ids(groups):
    return [[c.ids for c in group] for group in groups]


def gap(policy, groups, prompts=PROMPTS, temperature=1.0):
    """Largest difference between reported log-probs and the trainer's."""
    pairs = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
    logp = policy(pack([(p, c.ids) for p, c in pairs]), temperature=temperature).detach()
    return (logp - torch.tensor([x for _, c in pairs for x in c.logps])).abs().max().item()


def test_a_taken_port_is_left_for_another_one(sampler, taken_port):
    assert sampler.owned[0].url != f"http://127.0.0.1:{taken_port}"
    assert sampler.owned[0].healthy()


def test_greedy_tokens_are_the_embedded_samplers(policy, synced):
    embedded = EmbeddedSampler(policy, stop_ids=[1])
    embedded.sync(policy, 0)
    how = dict(n=1, keys=KEYS, seed=0, sampling=Sampling(30, temperature=0.0))
    assert ids(synced.generate(PROMPTS, **how)) == ids(embedded.generate(PROMPTS, **how))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_reported_log_probs_are_the_trainers(policy, synced, temperature):
    groups = synced.generate(PROMPTS, n=6, keys=KEYS, seed=0, sampling=Sampling(20, temperature))
    assert gap(policy, groups, temperature=temperature) < 1e-4


def test_a_completion_ends_at_its_first_stop_id_or_at_the_limit(synced):
    groups = synced.generate(PROMPTS, n=40, keys=KEYS, seed=0, sampling=Sampling(30))
    seen = set()
    for completion in (c for group in groups for c in group):
        assert len(completion.ids) == len(completion.logps)
        assert 1 not in completion.ids[:-1]
        assert completion.finish == ("stop" if completion.ids[-1] == 1 else "length")
        assert completion.finish == "stop" or len(completion.ids) == 30
        seen.add(completion.finish)
    assert seen == {"stop", "length"}


def test_nothing_but_a_stop_id_ends_a_completion(synced, monkeypatch):
    """Not the config's eos either, which is 1."""
    monkeypatch.setattr(synced, "stop_ids", [])
    groups = synced.generate(PROMPTS, n=20, keys=KEYS, seed=0, sampling=Sampling(30))
    assert {len(c.ids) for group in groups for c in group} == {30}
    assert any(1 in c.ids for group in groups for c in group)


def test_more_prompts_than_the_server_reads_at_once_are_read_one_after_the_other(policy, synced):
    prompts = [[7 + i, *LONG] for i in range(50)]  # 10,050 tokens
    groups = synced.generate(prompts, n=2, keys=range(50), seed=0, sampling=Sampling(3))
    assert synced.restarts == 0
    assert gap(policy, groups, prompts) < 1e-4


def test_what_is_drawn_does_not_depend_on_the_batch(synced, monkeypatch):
    together = ids(synced.generate(PROMPTS, n=5, keys=KEYS, seed=7, sampling=Sampling(25)))
    assert len({tuple(c) for group in together for c in group}) == 25
    monkeypatch.setattr(rollout, "ROWS_A_REQUEST", 2)
    order = random.Random(0).sample(range(len(PROMPTS)), len(PROMPTS))
    shuffled = synced.generate(
        [PROMPTS[i] for i in order], n=5, keys=[KEYS[i] for i in order], seed=7, sampling=Sampling(25)
    )
    assert [together[i] for i in order] == ids(shuffled)
    seen = []
    ragged = synced.generate(
        PROMPTS, n=[1, 2, 3, 0, 5], keys=KEYS, seed=7, sampling=Sampling(25), drawn=lambda *pair: seen.append(pair)
    )
    assert sorted(seen, key=lambda pair: pair[0]) == [(i, group) for i, group in enumerate(ragged) if group]
    assert ids(ragged) == [group[:n] for group, n in zip(together, [1, 2, 3, 0, 5], strict=True)]
    assert ids(synced.generate(PROMPTS, n=5, keys=KEYS, seed=8, sampling=Sampling(25))) != together


@pytest.mark.parametrize("tied", [False, True])
def test_after_each_of_five_syncs_the_server_has_the_new_weights(world, sampler, tied):
    policy = make_policy(world, tie_word_embeddings=tied)
    prompts = [*PROMPTS, LONG]
    how = dict(n=2, keys=[*KEYS, 2], sampling=Sampling(10))
    sampler.sync(policy, 0)
    for version in range(1, 6):
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(torch.randn_like(p) * 0.05)
        assert gap(policy, sampler.generate(prompts, seed=version, **how), prompts) > 1e-2
        sampler.sync(policy, version)
        assert gap(policy, sampler.generate(prompts, seed=version, **how), prompts) < 1e-4


def test_prefixes_that_old_weights_computed_are_forgotten(world, sampler, monkeypatch):
    """Log-probs after a long prompt, whose keys and values the server may keep."""
    policy, how = make_policy(world), dict(n=2, keys=[0], sampling=Sampling(10))
    gaps = []
    for version, renew in enumerate([sampler._renew, lambda server: None]):
        sampler.sync(policy, 2 * version)
        sampler.generate([LONG], seed=0, **how)
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(torch.randn_like(p) * 0.05)
        monkeypatch.setattr(sampler, "_renew", renew)
        sampler.sync(policy, 2 * version + 1)
        gaps.append(gap(policy, sampler.generate([LONG], seed=0, **how), [LONG]))
    assert gaps[0] < 1e-4 < 1e-2 < gaps[1]


def test_a_sync_without_the_output_matrix_is_detected_at_once(world, sampler, monkeypatch):
    """What happens where the server's output matrix is tied to its embeddings: the old one stays."""
    policy = make_policy(world, tie_word_embeddings=True)
    sampler.sync(policy, 0)
    whole = sampler._weights
    monkeypatch.setattr(sampler, "_weights", lambda: (item for item in whole() if item[0] != "lm_head.weight"))
    with torch.no_grad():
        policy.lm.get_input_embeddings().weight.add_(0.1 * torch.randn(61, 64))
    with pytest.raises(RuntimeError, match="the weights did not arrive .*: after sync 1"):
        sampler.sync(policy, 1)
    with pytest.raises(RuntimeError, match="call sync"):
        sampler.generate(PROMPTS, n=1, keys=KEYS, seed=0, sampling=Sampling(4))


def test_a_skipped_sync_is_detected_at_once(policy, synced, monkeypatch):
    monkeypatch.setattr(synced, "send", lambda: [])  # a sync that sends nothing
    with pytest.raises(RuntimeError, match=r"drew with the weights \w+:0, not \w+:1"):
        synced.sync(policy, 1)
    monkeypatch.undo()
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


def test_every_route_asks_for_the_key_and_only_this_machine_reaches_it(synced):
    [server] = synced.owned
    stranger = rollout.Server(server.url, "guessed", 10)
    for path, body in [("/health", None), ("/metrics", None), ("/collective_rpc", {"method": "get_model"}),
                       ("/inference/v1/generate", {"token_ids": [5], "sampling_params": {}})]:  # fmt: skip
        with pytest.raises(RuntimeError, match="401"):
            stranger.request(path, body, timeout=10)
    assert not any(server.key in words for _, _, words in processes())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(("192.0.2.1", 1))
        outside = s.getsockname()[0]
    if not outside.startswith("127."):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((outside, int(server.url.rsplit(":")[-1])), timeout=5)


# ------------------------------------------------------------------------------------------------- faults


def interrupt(server, act):
    """Run `act` as soon as the server works on requests."""

    def watch():
        while "vllm:num_requests_running" not in (text := server.request("/metrics", timeout=30)) or all(
            line.endswith(" 0.0") for line in text.splitlines() if line.startswith("vllm:num_requests_running{")
        ):
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_server_killed_during_generation_is_replaced_and_no_answer_is_missing(world, synced, policy):
    [server] = synced.owned
    group, how = server.process.pid, dict(n=90, keys=KEYS, seed=5, sampling=Sampling(250))  # seconds of work
    victim = min(pid for pid, other, _ in processes() if other == group and pid != group)  # the keeper's first child
    thread = interrupt(server, lambda: os.kill(victim, signal.SIGKILL))
    groups = synced.generate(PROMPTS, **how)
    thread.join()
    assert synced.restarts == 1 and server.process.pid != group and gone(group)
    assert [len(g) for g in groups] == [90] * 5
    assert gap(policy, groups) < 1e-4
    assert ids(groups) == ids(synced.generate(PROMPTS, **how))


def test_a_hanging_server_is_noticed_and_one_of_someone_else_waited_for(world, synced, policy, monkeypatch):
    [server] = synced.owned
    monkeypatch.setenv("ROLLOUT_API_KEY", server.key)
    guest = VLLMSampler(policy, world, stop_ids=[1], max_tokens=300, urls=[server.url], patience=5)
    guest.sync(policy, 3)
    engine = [pid for pid, group, words in processes() if group == server.process.pid and words.startswith("VLLM::")]
    assert engine  # what answers HTTP goes on

    def hang():
        for pid in engine:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(10)
        for pid in engine:
            os.kill(pid, signal.SIGCONT)

    thread = interrupt(server, hang)
    groups = guest.generate(PROMPTS, n=90, keys=KEYS, seed=5, sampling=Sampling(250))
    thread.join()
    assert guest.restarts >= 1
    assert [len(g) for g in groups] == [90] * 5 and gap(policy, groups) < 1e-4
    guest.close()
    assert server.healthy()  # someone else's server is left alone
    with pytest.raises(RuntimeError, match=r"drew with the weights \w+:3, not \w+:0"):  # and another's weights noticed
        synced.generate(PROMPTS, n=1, keys=KEYS, seed=5, sampling=Sampling(5))


def test_two_ranks_share_a_server_and_a_fault_of_one_is_known_to_both(sampler, tmp_path):
    [server] = sampler.owned
    config = json.dumps(CONFIG | {"tie_word_embeddings": True})
    its = {"URL": server.url, "ROLLOUT_API_KEY": server.key}
    run_script("tests/sidecar_ranks.py", config, tmp_path / "out.json", ranks=2, **its)
    one, two = json.loads((tmp_path / "out.json").read_text())
    assert [r["rows"] for r in one] == [8, 8, 8] and [r["rows"] for r in two] == [8, 8, 0]
    assert [r["restarts"] for r in one] == [r["restarts"] for r in two] == [0, 1, 1]
    assert max(r["gap"] for r in one + two) < 1e-4


def test_a_model_that_vllm_cannot_run_is_an_error_with_its_cause(policy):
    config = copy.deepcopy(policy.lm.config)
    config.architectures = ["NoSuchForCausalLM"]
    sidecar = Sidecar(config, patience=60, max_tokens=50, flags=["--model-impl", "vllm"])
    with pytest.raises(RuntimeError, match="does not start; .* Its first error: .*ValidationError") as error:
        sidecar.start()
    assert "Model architectures ['NoSuchForCausalLM'] are not supported" in str(error.value)
    assert "The end of its log:" in str(error.value)
    assert gone(sidecar.process.pid, 1) and not sidecar.folder.exists()


def test_two_ranks_train_with_one_server_and_killing_them_leaves_nothing(tmp_path):
    words = ["luffy.py", "--preset", "tiny", "--model", "models/scratch", "--data", "igsm:1-2", "--igsm_problems", "40",
             "--batch_size", "4", "--group_size", "4", "--max_response_tokens", "40", "--steps", "1000",
             "--eval_every", "0", "--save_every", "0", "--rollout", "vllm", "--out", str(tmp_path / "run")]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    before = {pid for pid, _, _ in processes()}
    run = subprocess.Popen([*launcher, *words], cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while time.time() < deadline and run.poll() is None and len(read_metrics(tmp_path / "run")) < 3:
        time.sleep(0.2)
    started = [process for process in processes() if process[0] not in before]
    [server] = {group for _, group, words in started if "--served-model-name policy" in words}
    for pid, _, words in started:
        if "luffy.py --preset tiny" in words:  # torchrun and the ranks
            os.kill(pid, signal.SIGKILL)
    assert gone(server)
    run.wait()
    metrics = read_metrics(tmp_path / "run")
    assert len(metrics) >= 3
    assert all(row["mismatch/max"] < 1e-4 for row in metrics)
