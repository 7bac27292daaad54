"""A released folder whose vocabulary is padded, in both backends: no padding row is ever drawn, by any command."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from telechat_twins.convert.hf.config import dump_config, write_config
from telechat_twins.convert.names import bind
from telechat_twins.convert.source import open_model
from telechat_twins.core import backends
from telechat_twins.core.cli import main
from telechat_twins.core.commands import serve
from telechat_twins.core.commands.options import load_model
from telechat_twins.core.inference.chat import ChatModel
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.serve.process.options import cache_sizes
from telechat_twins.core.serve.process.run import served_model, warm_up
from tests.support.data_support import VOCAB_SIZE, tiny_tokenizer_path

ROWS = VOCAB_SIZE + 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release whose padding rows win every choice that does not leave them out: for any state of the model one of
    two opposite rows has by far the largest logit. Generation settings name a second token that ends."""
    folder = tmp_path_factory.mktemp("padded")
    config = load_model_config({"preset": "telechat2-tiny", "vocab_size": ROWS})
    weights = init_weights(config, 1)
    loud = np.random.default_rng(0).normal(size=(32, config.hidden_size)).astype(np.float32) * 10
    weights["head.weight"][VOCAB_SIZE:] = np.concatenate([loud, -loud])
    released = {name: binding.join(weights, config) for name, binding in bind(config).items()}
    save_file(released, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(dump_config(write_config(config, None, "float32")))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    shutil.copy(tiny_tokenizer_path(), folder / "tokenizer.model")
    return folder


@pytest.fixture(params=["ms", "pt"])
def backend(request: pytest.FixtureRequest) -> str:
    framework = pytest.importorskip({"ms": "mindspore", "pt": "torch"}[request.param])
    if request.param == "ms":
        framework.runtime.launch_blocking()
    return str(request.param)


def generated(capsys: pytest.CaptureFixture[str], backend: str, folder: Path, *more: str) -> tuple[list[int], str]:
    """Tokens and stderr of ``tele generate --json``."""
    argv = ["generate", "--backend", backend, "--checkpoint", str(folder), "--json", "--max-new-tokens", "24", *more]
    assert main(argv) == 0
    shown = capsys.readouterr()
    return json.loads(shown.out)["ids"], shown.err


def test_no_command_draws_padding(backend: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = f"note: the vocabulary has {ROWS} rows and the tokenizer {VOCAB_SIZE} pieces: the last 64 rows are padding"
    for more in (
        ("--prompt", "word3 sound4", "--ignore-eos"),
        ("--ids", "9,8,7", "--ignore-eos"),
        ("--prompt", "the fox", "--chat", "--temperature", "1e6", "--ignore-eos"),
    ):
        ids, said = generated(capsys, backend, folder, *more)
        assert len(ids) == 24 and max(ids) < VOCAB_SIZE, more
        assert said.count(note) == 1
    runner = backends.load(backend, "generate").Runner
    chat = ChatModel(open_model(folder), runner, None, "chat", "fp32", "none")
    chat.chat("word1?", max_new_tokens=12, temperature=1e6)
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args = parser.parse_args(["--backend", backend, "--checkpoint", str(folder)])
    model = load_model(args, "tele serve")
    engine = model.engine_with(*cache_sizes(args, model.config))
    warm_up(engine)
    served = served_model(args, model, engine)
    assert served.config.num_tokens == VOCAB_SIZE and served.config.stop_ids == {2, 5}
    assert main(["generate", "--backend", backend, "--checkpoint", str(folder), "--ids", f"9,{VOCAB_SIZE}"]) == 2
    assert f"token id {VOCAB_SIZE} at place 1 is outside the vocabulary of {VOCAB_SIZE}" in capsys.readouterr().err


def test_both_backends_choose_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mindspore")
    pytest.importorskip("torch")
    ms, pt = (generated(capsys, name, folder, "--ids", "9,8,7", "--ignore-eos")[0] for name in ("ms", "pt"))
    assert ms == pt


def test_the_loss_of_a_forward_pass_leaves_padding_out(backend: str, folder: Path, tmp_path: Path) -> None:
    """One of two loud padding rows would win by far: the loss over all rows is large, over the tokens it is not."""
    ids = np.array([[5, 300, 301, 302, 2]], np.int32)
    save_file({"input_ids": ids, "labels": np.roll(ids, -1, 1)}, tmp_path / "in.safetensors")
    words = ["--checkpoint", str(folder), "--inputs", str(tmp_path / "in.safetensors")]
    assert main(["forward", "--backend", backend, *words, "--out", str(tmp_path / "out.safetensors")]) == 0
    found = load_file(tmp_path / "out.safetensors")
    padding, tokens = found["logits"][..., VOCAB_SIZE:], found["logits"][..., :VOCAB_SIZE]
    assert float(found["loss"]) < 8 and padding.max() < tokens.min()
