"""`tele serve` as users start it, on both backends with the same small random model: the same answers as from
`tele generate`, the same with and without company, and nothing left behind."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from telechat_twins.convert.hf.peft import write_peft
from telechat_twins.convert.source import open_model
from telechat_twins.core import cli
from telechat_twins.core.checkpoint.adapter import write_adapter
from tests.support.adapters import modules, random_adapter
from tests.support.docs_workspace import add_release
from tests.support.frameworks import BACKENDS
from tests.support.serve_support import ask, process, until

openai = pytest.importorskip("openai", reason="the openai client is in the dev extra")

PROMPTS = ["The quick brown fox", "def add(left, right):", "\u4e2d\u56fd\u7535\u4fe1", "word1 sound2", "x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mindspore")
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("serve")
    add_release(folder)
    return folder / "run"


@pytest.fixture(scope="module")
def adapters(model: Path) -> dict[str, str]:
    """Two adapters of the model by name, one of them in PEFT's format."""
    source = open_model(model)
    write_adapter(model.parent / "first", random_adapter(source, modules(source.config, ("q", "v")), 1))
    write_peft(random_adapter(source, modules(source.config, rank=3), 2), model.parent / "second")
    return {name: str(model.parent / name) for name in ("first", "second")}


@pytest.fixture(scope="module")
def servers(model: Path, adapters: dict[str, str]):
    """Both backends side by side: backend -> (process, port)."""
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        options = ["--checkpoint", str(model), "--cache-tokens", "4096", "--name", "tiny"]
        options += [word for name, path in adapters.items() for word in ("--adapter", f"{name}={path}")]
        made = {name: process("--backend", name, *options) for name in BACKENDS}
        entered = {name: pool.submit(stack.enter_context, one) for name, one in made.items()}
        yield {name: one.result() for name, one in entered.items()}


@pytest.fixture(scope="module")
def clients(servers):
    return {
        name: openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        for name, (_, port) in servers.items()
    }


def complete(client, prompt, **options):
    return client.completions.create(model="tiny", prompt=prompt, **{"max_tokens": 24, **options})


def test_both_backends_and_generate_say_the_same(clients, model, capsys):
    told = {name: complete(client, PROMPTS, temperature=0, logprobs=1) for name, client in clients.items()}
    texts = {name: [choice.text for choice in answer.choices] for name, answer in told.items()}
    assert texts["ms"] == texts["pt"] and len(set(texts["ms"])) == len(PROMPTS)
    for ours, theirs in zip(told["ms"].choices, told["pt"].choices, strict=True):
        # float32 logits of about 10, summed in another order: 1e-5.
        assert ours.logprobs.token_logprobs == pytest.approx(theirs.logprobs.token_logprobs, abs=1e-4)
    words = ["generate", "--backend", "pt", "--checkpoint", str(model), "--prompt", PROMPTS[0]]
    assert cli.main([*words, "--max-new-tokens", "24", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == texts["pt"][0]


def test_adapters_by_name_in_one_batch(clients, model, adapters, capsys):
    """The model and two adapters of it asked at once, in both backends: each answers as `tele generate` with it."""
    names = ("tiny", *adapters)

    def told(client, name: str, prompt: str) -> str:
        answer = client.completions.create(model=name, prompt=prompt, temperature=0, max_tokens=16)
        assert answer.model == name
        return answer.choices[0].text

    asked = [(name, prompt) for prompt in PROMPTS for name in names]
    texts = {}
    for backend, client in clients.items():
        with ThreadPoolExecutor(len(asked)) as pool:
            texts[backend] = list(pool.map(lambda pair, client=client: told(client, *pair), asked))
        cards = client.models.list().data
        assert [card.id for card in cards] == list(names)
        assert [getattr(card, "parent", None) for card in cards] == [None, "tiny", "tiny"]
        with pytest.raises(openai.NotFoundError, match="third' does not exist; this server has 'tiny', 'first', 'sec"):
            told(client, "third", "x")
    assert texts["ms"] == texts["pt"]
    for name, text in zip(names, texts["pt"], strict=False):
        words = ["generate", "--backend", "pt", "--checkpoint", str(model), "--prompt", PROMPTS[0], "--json"]
        chosen = [] if name == "tiny" else ["--adapter", adapters[name]]
        assert cli.main([*words, "--max-new-tokens", "16", *chosen]) == 0
        assert json.loads(capsys.readouterr().out)["text"] == text
    assert len(set(texts["pt"][: len(names)])) == len(names)


def test_both_backends_chat_alike(clients):
    def streamed(client) -> list[str | None]:
        messages = [{"role": "user", "content": "What is a fox?"}]
        chunks = client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=30, stream=True
        )
        return [chunk.choices[0].delta.content for chunk in chunks]

    ours, theirs = (streamed(clients[name]) for name in BACKENDS)
    assert ours == theirs and len(ours) > 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_draws_the_same_whoever_else_is_served(clients, backend):
    client = clients[backend]

    def drawn(seed: int) -> str:
        return complete(client, PROMPTS[seed % len(PROMPTS)], temperature=1.0, top_p=0.95, seed=seed).choices[0].text

    alone = [drawn(seed) for seed in range(24)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(drawn, range(24)))
    assert together == alone and len(set(alone)) > 20


def test_both_backends_draw_alike(clients):
    def drawn(client) -> list[str]:
        answer = complete(client, PROMPTS, temperature=0.8, seed=11, n=2, extra_body={"min_p": 0.02, "top_k": 50})
        return [choice.text for choice in answer.choices]

    assert drawn(clients["ms"]) == drawn(clients["pt"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_curl_as_the_page_shows_it(servers, backend):
    # A draw may be the end.
    asked = '"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0'
    body = f'{{"model": "tiny", {asked}, "stream": true}}'
    url = f"http://127.0.0.1:{servers[backend][1]}/v1/chat/completions"
    told = subprocess.run(
        ["curl", "-sN", url, "-H", "Content-Type: application/json", "-d", body],
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = told.stdout.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]" and len(lines) > 3
    assert json.loads(lines[0].removeprefix("data: "))["object"] == "chat.completion.chunk"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_terminated_server_leaves_nothing_behind(servers, backend):
    """Last: it ends the servers of this file. One answer is on its way when the signal comes, and is told whole."""
    started, port = servers[backend]
    below = psutil.Process(started.pid).children(recursive=True)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 200, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, port, "/v1/completions", body)
        assert until(lambda: b"\ntele_running 1\n" in ask(port, "/metrics").raw)
        started.send_signal(signal.SIGTERM)
        assert answer.result(60).json["usage"]["completion_tokens"] == 200
    assert started.wait(30) == 0
    assert not [one for one in below if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_mistakes_are_said_before_anything_is_loaded(model, tmp_path, capsys):
    def says(*words: str) -> str:
        assert cli.main(["serve", "--backend", "pt", "--checkpoint", str(model), *words]) == 2
        told = capsys.readouterr().err
        assert told.startswith("tele: ") and told.count("\n") == 1, told
        return told

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "Address already in use; choose another port" in says("--port", str(taken.getsockname()[1]))
    assert "it is no address of this machine; 127.0.0.1 serves" in says("--host", "192.0.2.1")
    assert "--host nowhere.invalid:" in says("--host", "nowhere.invalid")
    assert "--port: must be 0 to 65535" in says("--port", "70000")
    assert "--max-running: must be at least 1" in says("--port", "0", "--max-running", "0")
    assert "--grace: must be 0 or more" in says("--port", "0", "--grace", "-1")
    assert "--max-len: must be at least 2, for a prompt and its answer, found 1" in says(
        "--port", "0", "--max-len", "1"
    )
    assert "--cache-tokens: must be at least --max-len, 256, found 100" in says("--port", "0", "--cache-tokens", "100")
    assert "--api-key: a key must consist of" in says("--port", "0", "--api-key", "two words")
    assert "--adapter: expected NAME=DIR, found 'folder'" in says("--port", "0", "--adapter", "folder")
    assert "--adapter: the name 'run' is taken" in says("--port", "0", "--adapter", "run=folder")
    assert "folder: no such folder" in says("--port", "0", "--adapter", "a=folder")
    assert "keys.txt: cannot be read" in says("--port", "0", "--api-key-file", "keys.txt")
    (tmp_path / "empty").write_text("\n")
    assert "empty: a key must consist of" in says("--port", "0", "--api-key-file", str(tmp_path / "empty"))
    with open(tmp_path / "endless", "wb") as file:
        file.truncate(1 << 40)
    assert "endless: must have at most 1048576 bytes, found more" in says(
        "--port", "0", "--api-key-file", str(tmp_path / "endless")
    )
    from telechat_twins.core.data.tokenizer_training import train_tokenizer

    train_tokenizer(["some other text " * 50, *(f"w{n}" for n in range(300))], tmp_path / "other.model", 320)
    assert "320 pieces but model.vocab_size is 600" in says("--port", "0", "--tokenizer", str(tmp_path / "other.model"))


def test_without_the_extra_one_line_says_what_to_install(model, tmp_path):
    """In a process of its own, whose fastapi is one that is not there."""
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError(\"No module named 'fastapi'\", name='fastapi')\n")
    code = "import sys; sys.path.insert(0, sys.argv.pop()); from telechat_twins.core.cli import main; sys.exit(main())"
    told = subprocess.run(
        [sys.executable, "-c", code, "serve", "--backend", "pt", "--checkpoint", str(model), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert told.returncode == 2 and told.stdout == ""
    assert told.stderr == "tele: fastapi and uvicorn are not installed; run: pip install -e '.[serve]'\n"
