"""A release with a generation_config.json through every door, in both backends: generate, chat and serve agree."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from telechat_twins.convert.hf.config import dump_config, write_config
from telechat_twins.convert.names import bind
from telechat_twins.core.cli import main
from telechat_twins.core.commands import serve
from telechat_twins.core.commands.options import load_model
from telechat_twins.core.inference.sampling import sampling_config
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.serve.fields import Fields
from telechat_twins.core.serve.job import read_options
from telechat_twins.core.serve.process.options import cache_sizes
from telechat_twins.core.serve.process.run import served_model
from telechat_twins.core.types import JsonObject
from tests.support.data_support import VOCAB_SIZE, tiny_tokenizer_path

SETTINGS = {"do_sample": True, "temperature": 0.9, "top_k": 7, "max_new_tokens": 6, "pad_token_id": 3, "num_beams": 3}
TAKEN = "takes do_sample true, temperature 0.9, top_k 7, max_new_tokens 6 (--generation-config none: none)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settled")
    config = load_model_config({"preset": "telechat2-tiny", "vocab_size": VOCAB_SIZE})
    released = {name: binding.join(init_weights(config, 1), config) for name, binding in bind(config).items()}
    save_file(released, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(dump_config(write_config(config, None, "float32")))
    (folder / "generation_config.json").write_text(json.dumps(SETTINGS))
    shutil.copy(tiny_tokenizer_path(), folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize("backend", ["ms", "pt"])
def test_every_door_takes_the_release_at_its_word(
    backend: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    framework = pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    if backend == "ms":
        framework.runtime.launch_blocking()
    words = ["--backend", backend, "--checkpoint", str(folder)]

    def generated(*more: str) -> tuple[list[int], str]:
        assert main(["generate", *words, "--json", "--ids", "9,8,7", "--ignore-eos", *more]) == 0
        shown = capsys.readouterr()
        return json.loads(shown.out)["ids"], shown.err

    drawn, said = generated()
    assert said.count(TAKEN) == 1 and "generation_config.json: not honoured: num_beams 3" in said
    explicit = ["--temperature", "0.9", "--top-k", "7", "--max-new-tokens", "6"]
    alike, said = generated("--generation-config", "none", *explicit)
    assert alike == drawn and len(drawn) == 6 and "generation_config" not in said
    greedy, _ = generated("--greedy", "--max-new-tokens", "9")
    assert greedy == generated("--generation-config", "none", "--max-new-tokens", "9")[0] and greedy[:6] != drawn
    # A question by chat's door: its answer is that of generate.
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"word3 sound4\n")))
    assert main(["chat", *words]) == 0
    chatted = capsys.readouterr()
    assert chatted.err.count(TAKEN) == 1 and "(answer ended at --max-new-tokens 6)" in chatted.err
    assert main(["generate", *words, "--chat", "--prompt", "word3 sound4"]) == 0
    assert capsys.readouterr().out.strip() == chatted.out.strip()
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args = parser.parse_args(words)
    model = load_model(args, "tele serve")
    served = served_model(args, model, model.engine_with(*cache_sizes(args, model.config)))
    assert served.settings.resolve({}, draws=True) == sampling_config(temperature=0.9, top_k=7)


@pytest.mark.parametrize("backend", ["ms", "pt"])
def test_no_door_ends_an_answer_before_the_least_tokens_of_a_release(
    backend: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    words = ["--backend", backend, "--checkpoint", str(tmp_path)]

    def settle(**found: object) -> None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False, **found}))

    def generated(*more: str) -> JsonObject:
        assert main(["generate", *words, "--json", "--ids", "9,8,7", *more]) == 0
        return json.loads(capsys.readouterr().out)

    settle(max_new_tokens=12)
    whole = generated("--ignore-eos")["ids"]
    settle(eos_token_id=[2, whole[1]], max_new_tokens=12)
    ended = generated()
    assert ended["finish_reason"] == "stop" and ended["ids"] == whole[: whole.index(whole[1])]
    settle(eos_token_id=[2, whole[1]], max_new_tokens=12, min_new_tokens=7)
    later = generated()["ids"]
    assert len(later) >= 7 and later[: len(ended["ids"])] == ended["ids"] and whole[1] not in later[:7]
    assert len(generated("--max-new-tokens", "4")["ids"]) == 4
    # By chat's door, and by the server's, where a request may say otherwise.
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"word3 sound4\n")))
    assert main(["chat", *words]) == 0
    chatted = capsys.readouterr()
    assert "takes max_new_tokens 12, min_new_tokens 7 (" in chatted.err
    assert main(["generate", *words, "--chat", "--prompt", "word3 sound4"]) == 0
    assert capsys.readouterr().out.strip() == chatted.out.strip()
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args = parser.parse_args(words)
    model = load_model(args, "tele serve")
    served = served_model(args, model, model.engine_with(*cache_sizes(args, model.config)))
    for asked, new, least in ((None, 12, 7), (None, 4, 4), (None, 0, 0), (0, 12, 0), (2, 12, 2)):
        fields = Fields({"model": served.name, "min_tokens": asked})
        assert read_options(fields, served, "").least_of(new) == least
