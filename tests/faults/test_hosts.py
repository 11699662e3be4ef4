"""Two hosts, as network namespaces: torchrun with a rendezvous across them trains, and survives the loss of one."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid

import pytest

from common.metrics import read_metrics
from tests.conftest import ROOT
from tests.faults.harness import ONLINE


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Names of two namespaces that a cable joins: 10.77.0.1 and 10.77.0.2."""
    if not shutil.which("ip"):
        pytest.skip("needs Debian's iproute2")
    names = [f"host{i}-{uuid.uuid4().hex[:6]}" for i in (1, 2)]
    if any(ip("netns", "add", name).returncode for name in names):
        pytest.skip("needs the right to make network namespaces")
    try:
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable0", "netns", names[1])
        for i, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "cable0")
            for link in ("lo", "cable0"):
                assert ip("-n", name, "link", "set", link, "up").returncode == 0
        yield names
    finally:
        for name in names:
            for pid in ip("netns", "pids", name).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            ip("netns", "del", name)


def start(number, host, out, log):
    """torchrun on one of the two hosts, one rank each; both have the machine's name, so addresses are given."""
    words = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", "3",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "10.77.0.1:29400", "--rdzv_id", "run", "--rdzv_conf",
        f"is_host={int(number == 1)},last_call_timeout=1", "--local_addr", f"10.77.0.{number}", "luffy.py", *ONLINE,
        "--steps", "7", "--save_every", "1", "--eval_every", "0", "--timeout_minutes", "0.1", "--out", str(out),
    ]  # fmt: skip
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *words], cwd=ROOT, stdout=log, stderr=log,
        # torchrun keeps the address of its first round otherwise, and a host that joins later never learns it
        env={**os.environ, "GLOO_SOCKET_IFNAME": "cable0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )  # fmt: skip


def test_two_hosts_train_and_survive_the_loss_of_one(hosts, tmp_path):
    out = tmp_path / "run"
    with open(tmp_path / "log", "w") as log:
        first, second = (start(i, host, out, log) for i, host in enumerate(hosts, 1))
        deadline = time.monotonic() + 150
        while len(read_metrics(out) if (out / "metrics.jsonl").exists() else []) < 3:
            assert time.monotonic() < deadline and first.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.05)
        for pid in ip("netns", "pids", hosts[1]).stdout.split():
            os.kill(int(pid), signal.SIGKILL)  # the second host is gone: its agent, its rank, everything
        second.wait()
        again = start(2, hosts[1], out, log)
        codes = first.wait(timeout=200), again.wait(timeout=200)
    assert codes == (0, 0), (tmp_path / "log").read_text()[-3000:]
    assert [row["step"] for row in read_metrics(out)] == list(range(1, 8))
    said = (tmp_path / "log").read_text()
    assert said.count("steps of 4") >= 2, "the run was to start twice"
