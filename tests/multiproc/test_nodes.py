"""Jobs on two nodes, rehearsed on one machine: they start together, meet, and when one ends, the other ends too."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.launch import nodes as nodes_module
from telechat_twins.core.launch.command import node_logs
from telechat_twins.core.launch.nodes import JobEnd, Nodes, bind, meet
from telechat_twins.core.launch.worker import relayed_path
from tests.multiproc.test_launch_real import SCRIPT, Launched

# Joins the cluster the way each framework does, and adds up the ranks' numbers.
JOINING = """
import os, sys, time
from telechat_twins.core.launch.heartbeat import open_heartbeat
heartbeat = open_heartbeat()
if "MS_ROLE" in os.environ:
    import mindspore, numpy
    from mindspore import communication
    communication.init()
    rank, size = communication.get_rank(), communication.get_group_size()
    def add(number):
        return float(mindspore.ops.AllReduce()(mindspore.Tensor(numpy.array([number], numpy.float32))).asnumpy()[0])
else:
    import torch
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    def add(number):
        value = torch.tensor([number])
        torch.distributed.all_reduce(value)
        return float(value)
def all_reduce(number):
    heartbeat.enter("all_reduce", "world", tuple(range(size)))
    total = add(number)
    heartbeat.leave()
    return total
print(f"rank {rank} of {size}: sum {all_reduce(rank + 1.0)}", flush=True)
if sys.argv[1] == "killed":
    if rank == 0:
        os.kill(os.getpid(), 9)
    all_reduce(1.0)
if sys.argv[1] == "dies":
    if rank == 0:
        raise RuntimeError("planted failure in rank 0")
    all_reduce(1.0)
if sys.argv[1] == "hangs":
    if rank == 1:
        time.sleep(600)
    all_reduce(1.0)
print(f"rank {rank} at the end", flush=True)
"""


def free_ports() -> int:
    """A port that is free together with the one after it."""
    while True:
        with bind("127.0.0.1", 0) as first:
            port = first.getsockname()[1]
            try:
                bind("127.0.0.1", port + 1).close()
            except OSError:
                continue
        return port


def two_nodes(folder: Path, backend: str, case: str, text: str, **arguments: Any) -> list[Launched]:
    """Node 1 first: the order of starting must not matter."""
    common = {"nproc": 1, "text": text, "nnodes": 2, "master": f"127.0.0.1:{free_ports()}", **arguments}
    second = Launched(folder, backend, case, node_rank=1, **common)
    return [Launched(folder, backend, case, node_rank=0, **common), second]


@pytest.fixture(scope="module", params=["pt", "ms"])
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("torch" if request.param == "pt" else "mindspore")
    return request.param


def test_two_nodes_meet_and_finish(backend: str, tmp_path: Path) -> None:
    runs = two_nodes(tmp_path, backend, "good", JOINING)
    for run in runs:
        code, out, err = run.finish()
        assert code == 0, err
        rank = run.node
        assert f"rank {rank} of 2: sum 3.0\nrank {rank} at the end".encode() in out
    assert runs[0].left_over() == [] and runs[1].left_over() == []
    assert sorted(p.name for p in tmp_path.glob("*/worker_*.log")) == ["worker_0.log", "worker_1.log"]
    assert (tmp_path / "logs-node1" / "worker_1.log").exists()
    if backend == "ms":
        assert not list((tmp_path / "logs-node1").glob("status_scheduler.json")), "node 0 has the only scheduler"


def test_when_node_0_dies_node_1_ends_and_says_why(backend: str, tmp_path: Path) -> None:
    runs = two_nodes(tmp_path, backend, "dies", JOINING)
    code, out, err = runs[0].finish()
    dead = time.monotonic()
    assert code == 1
    assert b"Traceback" in out and "tele: rank 0 failed: RuntimeError: planted failure in rank 0" in err
    code, out, err = runs[1].finish()
    assert code == 1
    assert time.monotonic() - dead < 20
    assert "rank 0 failed: RuntimeError: planted failure in rank 0" in err, "the cause, not what followed from it"
    assert runs[0].left_over() == [] and runs[1].left_over() == []


def test_a_lost_connection_is_not_taken_for_the_cause(tmp_path: Path) -> None:
    """Gloo tells rank 1 that rank 0 is gone, sooner than node 0's launcher may have told its own."""
    pytest.importorskip("torch")
    runs = two_nodes(tmp_path, "pt", "killed", JOINING)
    code, out, err = runs[1].finish()
    assert code == 1
    said = re.search(
        r"tele: node 0 (failed first|ended the job): rank 0 was killed or crashed \(no Python error\)", err
    )
    assert said, err
    assert "rank 1 failed" not in err[: said.start()], "the cause comes first"
    code, out, err = runs[0].finish()
    assert code == 1 and "tele: rank 0 was killed or crashed" in err
    assert runs[0].left_over() == [] and runs[1].left_over() == []


def test_each_node_says_where_its_ranks_wait(tmp_path: Path) -> None:
    """A launcher sees the heartbeats of its own ranks only; the one that waits is not the one that is missing."""
    pytest.importorskip("torch")
    runs = two_nodes(tmp_path, "pt", "hangs", JOINING, collective_timeout=3.0)
    code, out, err = runs[0].finish()
    assert code == 1
    assert err.count("in all_reduce over world (ranks 0 1); who waits where:") == 1, err
    code, out, err = runs[1].finish()
    assert code == 1
    assert "tele: node 1: who waits where:" in err and "not in a collective (last: all_reduce over world" in err
    assert "tele: node 0 ended the job: rank 0 has waited" in err
    assert runs[0].left_over() == [] and runs[1].left_over() == []


def test_an_interrupt_reaches_both_nodes(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    runs = two_nodes(tmp_path, "pt", "saves", SCRIPT)
    for run in runs:
        run.wait_for_output("waiting")
    os.kill(runs[1].process.pid, signal.SIGTERM)
    for run in runs:
        code, out, err = run.finish()
        assert code == 130, err
        assert relayed_path(node_logs(tmp_path / "logs", run.node)).read_text() == "SIGTERM"
        assert b"saved" in out
        assert ("tele: node 1 was interrupted; ending here too" in err) == (run.node == 0)
    assert runs[0].left_over() == [] and runs[1].left_over() == []


def test_a_launcher_killed_outright_ends_the_other_node(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    runs = two_nodes(tmp_path, "pt", "wait", SCRIPT)
    for run in runs:
        run.wait_for_output("waiting")
    runs[0].process.kill()
    code, out, err = runs[1].finish()
    assert code == 1
    assert "tele: node 0 ended the job: the launcher of node 0 is gone" in err
    runs[0].process.communicate()
    assert runs[0].left_over() == [] and runs[1].left_over() == []


# The line itself, without a launch.

FACTS = {"--nproc": 2, "--backend": "pt"}


def met(count: int, facts: dict[int, dict[str, Any]] | None = None, patience: float = 10.0) -> dict[int, Any]:
    """What ``meet`` gives each node, or the UserError it raises, with all nodes as threads."""
    port, results = free_ports(), dict[int, Any]()

    def one(rank: int) -> None:
        try:
            theirs = (facts or {}).get(rank, FACTS)
            results[rank] = meet(rank, count, "127.0.0.1", port, theirs, patience, lambda text: None)
        except UserError as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def soon(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("nothing came")


def test_the_last_to_finish_ends_the_job() -> None:
    nodes = met(3)
    nodes[0].done()
    nodes[2].done()
    for _ in range(5):
        assert [node.look() for node in nodes.values()] == [None] * 3
        assert not any(node.finished for node in nodes.values())
        time.sleep(0.02)
    nodes[1].done()
    soon(lambda: [node.look() for node in nodes.values()] and all(node.finished for node in nodes.values()))
    nodes[0].close()
    assert [nodes[1].look(0.2), nodes[2].look(0.2)] == [None, None], "leaving after the end is no failure"


@pytest.mark.parametrize("source", [0, 2])
def test_the_reason_reaches_every_node_once(source: int) -> None:
    nodes = met(3)
    before = time.time()
    nodes[source].end(2, "x" * 5000)
    nodes[source].end(1, "a second reason")
    for rank in {0, 1, 2} - {source}:
        word = soon(nodes[rank].look)
        assert word._replace(when=0.0) == JobEnd(source, 2, "x" * nodes_module.MAX_REASON_CHARACTERS, 0.0)
        assert before <= word.when <= time.time()
        assert nodes[rank].look(0.1) is None
    for node in nodes.values():
        node.close()


def test_a_lost_launcher_is_noticed_and_passed_on() -> None:
    nodes = met(3)
    nodes[2].close()
    for rank in (0, 1):
        word = soon(nodes[rank].look)
        assert (word.node, word.code) == (2, 1) and "the launcher of node 2 is gone" in word.why


def test_alone_there_is_nobody_to_ask() -> None:
    alone = meet(0, 1, "127.0.0.1", 0, FACTS)
    assert alone.look(5.0) is None and not alone.finished
    alone.done()
    alone.end(1, "nobody hears this")
    assert alone.finished


def test_nodes_started_differently_are_sent_away() -> None:
    results = met(3, {1: FACTS | {"--nproc": 4}}, patience=1.5)
    assert str(results[1]) == (
        "--nproc: must be the same on every node, node 1 was started with 4 and node 0 with 2; start all nodes alike"
    )
    # Node 2 came, and may have lost patience a moment before node 0 did.
    assert re.match(
        r"--nnodes: node 1(, 2)? of 3 did not connect to 127.0.0.1 port \d+ in time; start", str(results[0])
    )
    assert str(results[2]).startswith("--master: node 0 was not found at 127.0.0.1 port")


def test_a_node_number_taken_twice() -> None:
    port, said = free_ports(), list[str]()
    results: dict[str, Any] = {}

    def one(name: str, rank: int) -> None:
        try:
            results[name] = meet(rank, 3, "127.0.0.1", port, FACTS, 5.0, said.append)
        except UserError as error:
            results[name] = str(error)

    threads = [threading.Thread(target=one, args=pair) for pair in (("zero", 0), ("one", 1), ("again", 1))]
    for thread in threads:
        thread.start()
    soon(lambda: "--node-rank: node 1 is connected already; give each node its own number" in results.values())
    assert len(results) == 1
    last = threading.Thread(target=one, args=("two", 2))
    for thread in (last, *threads):
        if not thread.is_alive() and thread is last:
            thread.start()
        thread.join()
    assert sum(isinstance(result, Nodes) for result in results.values()) == 3
    # Node 1 may have come before node 0 looked around.
    assert any(re.search(r"waits for node (1, )?2 at", text) for text in said), said


def test_a_second_node_0_is_told_of_the_first() -> None:
    """Of the same job or of another; the first goes on and is told, too."""
    port, said, results = free_ports(), list[str](), list[Nodes]()
    node_0 = threading.Thread(target=lambda: results.append(meet(0, 2, "127.0.0.1", port, FACTS, 10.0, said.append)))
    node_0.start()
    soon(lambda: _connects(port + 1))
    for facts in (FACTS, {**FACTS, "--nproc": 7}):
        with pytest.raises(UserError, match=f"--master: another node 0, .* already waits at 127.0.0.1 port {port + 1}"):
            meet(0, 2, "127.0.0.1", port, facts, 5.0, lambda text: None)
    other = meet(1, 2, "127.0.0.1", port, FACTS, 10.0, lambda text: None)
    node_0.join()
    assert len(results) == 1 and any("refused a node" in text for text in said)
    other.close()
    results[0].close()


def test_strangers_at_the_port_do_no_harm() -> None:
    port = free_ports()
    result: list[Nodes] = []
    gather = threading.Thread(
        target=lambda: result.append(meet(0, 2, "127.0.0.1", port, FACTS, 10.0, lambda text: None))
    )
    gather.start()
    soon(lambda: _connects(port + 1))
    kept = []
    for text in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"[]\n",
        b'{"hello": 3}\n',
        b'{"hello": {"node": 9, "facts": {}}}\n',
        b"x" * 99_999,
    ):
        stranger = socket.create_connection(("127.0.0.1", port + 1))
        stranger.sendall(text)
        kept.append(stranger)
    other = meet(1, 2, "127.0.0.1", port, FACTS, 10.0, lambda text: None)
    gather.join()
    for stranger in kept:
        stranger.close()
    other.end(1, "enough")
    assert soon(result[0].look).why == "enough"


def test_what_comes_over_the_line_is_taken_with_care() -> None:
    nodes = met(2)
    line = nodes[1]._lines[0]
    for message in ({"other": 1}, {"end": None}):
        line.send(message)
    word = soon(nodes[0].look)
    assert (word.node, word.code, word.why) == (1, 1, "no reason given")
    line._socket.sendall(json.dumps({"end": {"code": 77, "why": 5, "when": "x", "node": "y"}}).encode() + b"\n{]\n")
    word = soon(nodes[0].look)
    assert (word.node, word.code, word.why, word.hang) == (1, 1, "5", False)


def test_no_such_host() -> None:
    with pytest.raises(UserError, match="--master: host 'no.such.host.invalid' cannot be resolved on this machine"):
        meet(1, 2, "no.such.host.invalid", 29500, FACTS, 1.0)


def test_a_node_may_be_given_by_name() -> None:
    """A name is served at every address of node 0: the others may know it by another one than node 0 itself."""
    port, results = free_ports(), list[Nodes]()
    node_0 = threading.Thread(
        target=lambda: results.append(meet(0, 2, "localhost", port, FACTS, 10.0, lambda text: None))
    )
    node_0.start()
    other = meet(1, 2, "127.0.0.1", port, FACTS, 10.0, lambda text: None)
    node_0.join()
    assert len(results) == 1
    other.done()
    results[0].done()
    soon(lambda: results[0].look() or results[0].finished)
    soon(lambda: other.look() or other.finished)


def test_the_second_port_must_be_free_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] - 1
        with pytest.raises(UserError, match=rf"--master: port {port + 1} \(the given one plus 1\) is needed too"):
            meet(0, 2, "127.0.0.1", port, FACTS, 1.0)


def _connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
