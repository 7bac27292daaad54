"""Serving benchmark (``tele bench serve``): concurrent clients of ``tele serve``, each sending one request at a time.

Prompts and answers have unequal lengths, drawn by a seed that all contestants share. Contestants are a server on each
backend and, where the transformers library is installed, Hugging Face's ``generate`` (kernels/bench/hf.py) on static
batches of the same requests: a batch is padded to its longest prompt and runs until its longest answer ends, without
HTTP. They take turns and are stopped in between, as in ``tele bench step``. The clients are threads of this process and
share the machine with the server.
"""

from __future__ import annotations

import functools
import http.client
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from telechat_twins.core.bench.decode import HF, TITLES, contestants
from telechat_twins.core.bench.step import facts, machine, model_name
from telechat_twins.core.bench.worker import Worker
from telechat_twins.core.checkpoint.save import Contents, save_checkpoint
from telechat_twins.core.data.tokenizer_training import train_tokenizer
from telechat_twins.core.launch.worker import die_with_parent
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.types import JsonObject

ROUNDS = 2
REQUESTS = 24  # of all clients together in a round; each client sends at least two
MODEL = "bench"
CACHE_POLL_S = 0.25  # between two readings of the cache's use, each of which is a request
PAGES = re.compile(r"^tele_cache_pages_(used|free) (\d+)$", re.MULTILINE)


def write_model(folder: Path, config: ModelConfig) -> Path:
    """A checkpoint of random weights, with a tokenizer of the model's vocabulary size."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    train_tokenizer(texts, folder / "tokenizer.model", config.vocab_size)
    return save_checkpoint(
        folder / "model",
        0,
        Contents(
            model={"config": config.to_dict()},
            weights=init_weights(config, 1234).items(),
            trainer={},
            assets=[folder / "tokenizer.model"],
        ),
        keep_last=1,
    )


def requests_of(clients: int, prompt: int, new: int, seed: int) -> list[list[tuple[int, int]]]:
    """The requests of each client, (tokens of the prompt, tokens of the answer).

    Each length is drawn evenly from a quarter of the longest, ``prompt`` or ``new``, up to it.
    """
    rng = random.Random(seed)
    each = max(2, REQUESTS // clients)
    return [
        [(rng.randint(-(-prompt // 4), prompt), rng.randint(-(-new // 4), new)) for _ in range(each)]
        for _ in range(clients)
    ]


class ServerProcess:
    """``tele serve`` in its own process, stopped between its turns and ended with the ``with`` block."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, "-m", "telechat_twins.core.cli", "serve", "--port", "0", *words]
        with_us = functools.partial(die_with_parent, os.getpid())
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=with_us)
        assert self._process.stdout is not None
        found = re.search(r":(\d+)$", self._process.stdout.readline().strip())
        if found is None:
            raise SystemExit(self._process.wait())  # its message is on stderr
        self.port = int(found[1])
        self._process.send_signal(signal.SIGSTOP)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        self._process.communicate()

    def turn(self, clients: int, prompt: int, new: int, vocab_size: int, seed: int) -> JsonObject:
        """One turn of ``clients`` concurrent clients with the requests of ``requests_of``.

        Returns ``seconds`` in all, ``processor``: those that the server spent on processors, ``first``: seconds to each
        answer's first text, ``next``: seconds between texts, ``tokens`` generated, ``cache``: the largest fraction of
        the cache in use. ``seed``: of the random prompts; a
        seed used before would find its prompts in the cache.
        """
        self._process.send_signal(signal.SIGCONT)
        over, shares = threading.Event(), [0.0]
        rng = random.Random(-seed - 1)
        wanted = [
            [([rng.randrange(vocab_size) for _ in range(length)], made) for length, made in mine]
            for mine in requests_of(clients, prompt, new, seed)
        ]

        def client(number: int) -> list[tuple[list[float], int]]:
            return [answer_times(self.port, ids, made) for ids, made in wanted[number]]

        def look() -> None:
            while not over.wait(CACHE_POLL_S):
                shares.append(cache_share(self.port))

        with ThreadPoolExecutor(clients + 1) as pool:
            looking = pool.submit(look)
            began, before = time.perf_counter(), processor_seconds(self._process.pid)
            answers = [one for ones in pool.map(client, range(clients)) for one in ones]
            seconds, used = time.perf_counter() - began, processor_seconds(self._process.pid) - before
            over.set()
            looking.result()
        self._process.send_signal(signal.SIGSTOP)
        return {
            "seconds": seconds,
            "processor": used,
            "tokens": sum(made for _, made in answers),
            "first": [times[1] - times[0] for times, _ in answers],
            "next": [b - a for times, _ in answers for a, b in zip(times[1:], times[2:], strict=False)],
            "cache": max(shares),
        }


def answer_times(port: int, ids: list[int], new: int) -> tuple[list[float], int]:
    """Times at which a request was sent and each piece of its text arrived, and its number of tokens."""
    body = {"model": MODEL, "prompt": ids, "max_tokens": new, "ignore_eos": True, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    times, made = [time.perf_counter()], 0
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise RuntimeError(f"the server answered: {event['error']['message']}")
            if event["choices"]:
                times.append(time.perf_counter())
            else:
                made = event["usage"]["completion_tokens"]
    connection.close()
    if made != new:
        raise RuntimeError(f"{made} tokens in place of {new}; the server's message is above")
    return times, made


def processor_seconds(pid: int) -> float:
    """Seconds that all threads of a process have spent on processors, in user and in system mode."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def cache_share(port: int) -> float:
    """The fraction of the server's cache pages in use."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("GET", "/metrics")
    pages = {kind: int(count) for kind, count in PAGES.findall(connection.getresponse().read().decode())}
    connection.close()
    return pages["used"] / (pages["used"] + pages["free"])


def measure_serving(
    options: JsonObject,
    names: list[str],
    clients: list[int],
    prompt: int,
    new: int,
    checkpoint: Path,
    config: ModelConfig,
) -> JsonObject:
    """Measure ROUNDS turns of each contestant for each number in ``clients``, after one that is not counted; prompts
    have up to ``prompt`` random tokens, answers up to ``new`` (``requests_of``)."""
    everybody, notes = contestants(names)
    turns: dict[tuple[str, int], list[JsonObject]] = {(name, count): [] for name in everybody for count in clients}
    words = ["--checkpoint", str(checkpoint), "--name", MODEL, "--precision", options["precision"]]
    words += ["--quantize", options["quantize"], "--max-running", str(max(clients)), "--max-len", str(prompt + new)]
    words += ["--cache-tokens", str(max(clients) * (prompt + new + 16))]
    with ExitStack() as stack:
        servers = {name: stack.enter_context(ServerProcess("--backend", name, *words)) for name in names}
        if HF in everybody:
            hf = stack.enter_context(
                Worker(HF, {**options, "rows": max(clients)}, module="telechat_twins.kernels.bench.hf")
            )
        for number in range(-1, ROUNDS):
            for name in everybody if number % 2 else reversed(everybody):
                for count in clients:
                    seed = 1000 * number + count
                    if name == HF:
                        # A batch is the requests that all clients have out at a time.
                        found = hf.ask({"batches": list(zip(*requests_of(count, prompt, new, seed), strict=True))})
                    else:
                        found = servers[name].turn(count, prompt, new, config.vocab_size, seed)
                    if number >= 0:
                        turns[name, count].append(found)
    rows = [{"contestant": name, "clients": count, **summarise(made)} for (name, count), made in turns.items()]
    return {**facts(options), "prompt": prompt, "new": new, "notes": notes, "rows": rows}


def summarise(turns: list[JsonObject]) -> JsonObject:
    """Statistics of the turns of one contestant with one number of clients."""
    tokens = sum(t["tokens"] for t in turns)
    found: JsonObject = {"tokens_per_s": tokens / sum(t["seconds"] for t in turns)}
    if "processor" in turns[0]:
        found["processor_s"] = sum(t["processor"] for t in turns) / tokens  # a token
    for name in ("first", "next"):
        values = [value for turn in turns for value in turn.get(name, ())]
        if values:
            cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
            found[name] = {"p50": cuts[49], "p99": cuts[98]}
    if "cache" in turns[0]:
        found["cache"] = max(turn["cache"] for turn in turns)
    return found


def serving_to_markdown(result: JsonObject) -> str:
    """Markdown table with a row for each contestant and number of clients."""
    options = result["options"]
    weights = ", weights in int8" if options["quantize"] == "int8" else ""
    lines = [
        f"{model_name(options)} ({result['parameters']:,} parameters), {options['precision']}{weights}, prompts of "
        f"{-(-result['prompt'] // 4)} to {result['prompt']} tokens, answers of {-(-result['new'] // 4)} to "
        f"{result['new']}; {machine(result)}, which the clients share; contestants in turns, all warm.",
        "",
        "| contestant | clients | tokens/s | processor a token | first text, p50 | p99 | next text, p50 | p99 | "
        "cache held |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        times = [row[name][p] if name in row else None for name in ("first", "next") for p in ("p50", "p99")]
        cells = [
            TITLES[row["contestant"]],
            row["clients"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['processor_s'] * 1e3:.2f} ms" if "processor_s" in row else "-",
            *("-" if seconds is None else f"{seconds * 1e3:.1f} ms" for seconds in times),
            f"{100 * row['cache']:.0f} %" if "cache" in row else "-",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(
        [
            *lines,
            "",
            f"{ROUNDS} turns, each with {REQUESTS} requests of all clients together and at least two of each, streamed "
            "over HTTP; Hugging Face's `generate` has the same requests in static batches of as many as there are "
            "clients, without HTTP. `processor a token`: time of all threads of the contestant on processors, without "
            "the clients'. `first text`: time from a request to the first piece of its answer. `next text`: time "
            "between pieces; a token gives a piece unless it is only part of a character. `cache held`: the "
            f"largest use of a cache for {max(row['clients'] for row in result['rows'])} sequences.",
            *result["notes"],
        ]
    )
