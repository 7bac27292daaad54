"""The range of xPos's scales against the tables themselves, and who refuses a precision that cannot hold it."""

from __future__ import annotations

import argparse
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from telechat_twins.core.checkpoint.read import whole, write_checkpoint
from telechat_twins.core.commands import forward, generate
from telechat_twins.core.config import run_config_from_dict
from telechat_twins.core.data.encoders.special import SpecialTokens
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.chat import ChatModel
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.model.position import xpos_scales
from telechat_twins.core.model.xpos_range import check_xpos_range, xpos_reach

FLM = load_model_config({"preset": "flm-tiny", "vocab_size": 64})
FAR = dataclasses.replace(FLM, max_seqlen=4096, xpos_scale_base=64.0)
NEAR = dataclasses.replace(FAR, xpos_scale_base=300.0)  # 2^12.3: fp16 holds it, with little to spare
REFUSED = (
    r"model.max_seqlen 4096, model.xpos_scale_base 64: 2048 tokens .* 2\^57.8 .* fp16 holds 2\^14; use precision bf16"
)


@pytest.mark.parametrize(("max_seqlen", "base", "length"), [(2048, 512, 2048), (4096, 64, 7), (256, 32, 1000)])
def test_the_reach_is_that_of_the_tables(max_seqlen: int, base: float, length: int) -> None:
    config = dataclasses.replace(FLM, max_seqlen=max_seqlen, xpos_scale_base=base)
    tables = np.stack(xpos_scales(config, np.arange(length), np.float64))
    assert np.abs(np.log2(tables)).max() == pytest.approx(xpos_reach(config, length), rel=1e-12)
    assert xpos_reach(dataclasses.replace(config, position="rope"), length) == 0.0


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_the_limit_is_what_the_format_holds(precision: str) -> None:
    """Just inside, all scales are normal numbers of the compute dtype, a factor of 4 to spare; outside is refused."""
    exponent = {"fp16": 14, "bf16": 126, "fp32": 126}[precision]
    base = 2048 * np.log2(3.5) / exponent
    inside = dataclasses.replace(FAR, xpos_scale_base=base * 1.0001)
    warning = check_xpos_range(inside, precision, 4096)
    assert warning is not None and f"2^{exponent}" in warning
    if precision != "bf16":  # which numpy does not have
        kind = np.finfo(np.float16 if precision == "fp16" else np.float32)
        tables = np.stack(xpos_scales(inside, np.arange(4096)))
        assert tables.min() >= kind.tiny and 4 * tables.max() <= kind.max * 1.01
    with pytest.raises(UserError, match=rf"{precision} holds 2\^{exponent}"):
        check_xpos_range(dataclasses.replace(FAR, xpos_scale_base=base * 0.9999), precision, 4096)


def test_released_lengths_are_well_inside() -> None:
    """FLM-101B: 2048 tokens, scale base 512."""
    for precision in ("fp16", "bf16", "amp", "fp32", "fp64"):
        assert check_xpos_range(load_model_config("flm-101b"), precision, 2048) is None
    assert check_xpos_range(FAR, "bf16", 4096) is None and check_xpos_range(FAR, "fp64", 4096) is None
    with pytest.raises(UserError, match=REFUSED):
        check_xpos_range(FAR, "fp16", 8)  # the first position of any row is half of max_seqlen from the origin
    with pytest.raises(UserError, match="3999 tokens from the middle"):
        check_xpos_range(dataclasses.replace(FAR, max_seqlen=2), "fp16", 4001)  # rows longer than max_seqlen


def test_the_named_way_out_is_one() -> None:
    """max_seqlen lowered as the message says: inside, and the products of visible pairs are the same."""
    lower = dataclasses.replace(FAR, max_seqlen=991)
    check_xpos_range(lower, "fp16", 991)
    with pytest.raises(UserError, match="at most 991 here"):
        check_xpos_range(FAR, "fp16", 991)
    places = np.arange(991)
    (q, k), (low_q, low_k) = (xpos_scales(c, places, np.float64) for c in (FAR, lower))
    np.testing.assert_allclose(q[-1] * k, low_q[-1] * low_k, rtol=1e-9)


def run_config(precision: str, base: float):
    return run_config_from_dict(
        {
            "model": {"preset": "flm-tiny", "max_seqlen": 4096, "xpos_scale_base": base},
            "data": {"sources": [], "seq_len": 64},
            "train": {"steps": 2, "global_batch": 1, "micro_batch": 1, "precision": precision},
            "optim": {"lr": 1e-3},
        }
    )


def test_training_refuses() -> None:
    with pytest.raises(UserError, match=REFUSED):
        run_config("fp16", 64.0)
    assert run_config("bf16", 64.0) and run_config("fp16", 300.0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of FAR and NEAR, and inputs."""
    top = tmp_path_factory.mktemp("xpos")
    weights = [whole(name, array) for name, array in init_weights(FLM, 0).items()]
    for name, config in (("far", FAR), ("near", NEAR)):
        write_checkpoint(top / name, 0, model={"config": config.to_dict()}, weights=weights)
    save_file({"input_ids": np.arange(8, dtype=np.int32)[None]}, top / "f.safetensors")
    return top


def forward_args(top, model: str, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    forward.add_arguments(parser)
    words = ["--backend", "pt", "--checkpoint", top / model, "--inputs", top / "f.safetensors", "--out", top / "g"]
    return parser.parse_args([*map(str, words), "--precision", "fp16", *more])


def test_forward_refuses_before_weights_are_read_and_warns(checkpoints, monkeypatch, capsys) -> None:
    monkeypatch.setattr("telechat_twins.pt_reference.forward.run", lambda *_: pytest.fail("the model was run"))
    monkeypatch.setattr(forward, "launch_tasks", lambda *_, **__: pytest.fail("processes were started"))
    for more in ((), ("--layout", "tp2")):
        with pytest.raises(UserError, match=REFUSED):
            forward.run(forward_args(checkpoints, "far", *more))
    monkeypatch.undo()
    assert forward.run(forward_args(checkpoints, "near")) == 0
    assert "warning: model.max_seqlen 4096, model.xpos_scale_base 300" in capsys.readouterr().err


def test_generation_refuses_before_weights_are_read(checkpoints, monkeypatch, capsys) -> None:
    """`tele generate`, `chat` and `serve` open their model by load_model, Python by ChatModel."""
    monkeypatch.setattr("telechat_twins.pt_reference.generate.Runner", lambda *_: pytest.fail("weights were read"))
    args = {"backend": "pt", "precision": "fp16", "table_dtype": None, "tokenizer": None, "control": "auto"}
    args |= {"quantize": "none", "rescale": "request"}

    def opened(model: str):
        return generate.load_model(argparse.Namespace(checkpoint=str(checkpoints / model), **args), None)

    with pytest.raises(UserError, match=REFUSED):
        opened("far")
    model = opened("near")
    assert "xpos_scale_base 300" in capsys.readouterr().err
    with pytest.raises(UserError, match="fp16 holds 2"):
        model.engine(6000)  # longer than max_seqlen
    pieces = SimpleNamespace(vocab_size=model.config.vocab_size, special=SpecialTokens())
    monkeypatch.setattr("telechat_twins.core.inference.chat.load_tokenizer", lambda *_, **__: pieces)
    monkeypatch.setattr("telechat_twins.core.inference.chat.check_vocabulary", lambda *_: None)
    monkeypatch.setattr("telechat_twins.core.inference.chat.open_layout", lambda *_, **__: (None, []))
    with pytest.raises(UserError, match=REFUSED):
        ChatModel(model.source.__class__(_checkpoint(checkpoints / "far")), pytest.fail, "t", "auto", "fp16", "none")


def _checkpoint(path):
    from telechat_twins.core.checkpoint.read import open_checkpoint

    return open_checkpoint(path)
