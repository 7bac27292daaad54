"""`tele serve --layout`: rank 0 serves, the others follow; answers are those of one process, in both backends."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import save_file

from telechat_twins.convert.hf.config import dump_config, write_config
from telechat_twins.convert.names import bind
from telechat_twins.core import cli
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from tests.house import ROOT
from tests.support.data_support import VOCAB_SIZE, tiny_tokenizer_path
from tests.support.serve_support import ask

pytestmark = pytest.mark.slow
IDS = [9, 8, 7, 300]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared-model")
    config = load_model_config({"preset": "telechat2-tiny", "vocab_size": VOCAB_SIZE})
    weights = init_weights(config, 1)
    save_file({name: b.join(weights, config) for name, b in bind(config).items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(dump_config(write_config(config, None, "float32")))
    shutil.copy(tiny_tokenizer_path(), folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    """The greedy answer of one process, from PyTorch, whose margins are far above the backends' differences."""
    pytest.importorskip("torch")
    printed = io.StringIO()
    asked = ["--ids", ",".join(map(str, IDS)), "--tokenizer", str(folder), "--max-new-tokens", "9", "--json"]
    with contextlib.redirect_stdout(printed):
        assert cli.main(["generate", "--backend", "pt", "--checkpoint", str(folder), *asked]) == 0
    found = json.loads(printed.getvalue())
    assert min(found["top2_margins"]) > 1e-3
    return found["text"]


@pytest.mark.parametrize(("backend", "layout"), [("pt", "tp2"), ("ms", "pp2")])
def test_answers_are_those_of_one_process(
    backend: str, layout: str, folder: Path, expected: str, tmp_path: Path
) -> None:
    if backend == "ms" and importlib.util.find_spec("mindspore") is None:
        pytest.skip("needs MindSpore")
    pytest.importorskip("fastapi")
    words = ["--backend", backend, "--checkpoint", str(folder)]
    command = [sys.executable, "-m", "telechat_twins.core.cli", "serve", *words, "--layout", layout, "--port", "0"]
    command += ["--api-key", "the-key"]
    with open(tmp_path / "err", "w") as err:
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, cwd=ROOT)
    assert started.stdout is not None
    try:
        for line in started.stdout:
            if found := re.search(r"serving \S+ at http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise AssertionError((tmp_path / "err").read_text())
        port = int(found[1])
        body = {"model": folder.name, "prompt": IDS, "max_tokens": 9, "temperature": 0, "logprobs": 0}
        for _ in range(2):
            answer = ask(port, "/v1/completions", body, headers={"Authorization": "Bearer the-key"})
            assert answer.status == 200, answer.raw
            assert answer.json["choices"][0]["text"] == expected
        assert ask(port, "/v1/completions", body).status == 401
        children = psutil.Process(started.pid).children(recursive=True)
        assert len(children) >= 3
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 0, (tmp_path / "err").read_text()
        # A zombie has ended: msrun does not wait for its ranks, and init has not yet.
        left = [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        assert not left, "a process was left behind"
    finally:
        if started.poll() is None:
            started.terminate()
            started.wait(30)
