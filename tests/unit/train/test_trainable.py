"""train.freeze: which parameters the optimizer updates."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.checkpoint.read import open_checkpoint, write_checkpoint
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.train.resume import describe_resumption, require_optimizer_state
from telechat_twins.core.train.trainable import check_freeze, trainable
from tests.support.numpy_stepper import run_config


def test_patterns_name_parameters_by_their_logical_names() -> None:
    config = run_config(train__freeze=["embed.*", "layers.0.attn.[qk].weight", "*.bias"])
    table = parameter_table(config.model)
    kept = trainable(table, config)
    frozen = [name for name in table if name not in kept]
    assert frozen == [
        "embed.weight",
        "layers.0.attn.q.weight",
        "layers.0.attn.k.weight",
        "layers.0.attn.o.bias",
        "layers.0.ffn.down.bias",
    ]
    assert all(kept[name] is table[name] for name in kept)
    assert trainable(table, run_config()) == table
    check_freeze(table, config)


def test_thawed_parameters_without_state_are_refused(tmp_path: Path) -> None:
    weights = {name: np.zeros(spec.shape, "f4") for name, spec in parameter_table(run_config().model).items()}
    state = {f"{letter}.{name}": array for letter in "mv" for name, array in weights.items() if name != "norm.weight"}
    write_checkpoint(tmp_path / "c", 3, model={}, weights=weights.items(), optimizer=state.items(), trainer={})
    checkpoint = open_checkpoint(tmp_path / "c")
    require_optimizer_state(checkpoint, [name for name in weights if name != "norm.weight"])
    with pytest.raises(UserError, match="norm.weight trains now and has no optimizer state .* --init"):
        require_optimizer_state(checkpoint, list(weights))


def test_a_pattern_without_a_parameter_and_a_model_without_one_are_refused() -> None:
    table = parameter_table(run_config().model)
    with pytest.raises(UserError, match=r"train\.freeze\[1\]: 'embd\.weight' matches no .*'embed\.weight'"):
        check_freeze(table, run_config(train__freeze=["norm.weight", "embd.weight"]))
    with pytest.raises(UserError, match="leave at least one"):
        check_freeze(table, run_config(train__freeze=["*"]))


def test_a_base_written_otherwise_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--init keeps a whole path, YAML and --set may have one from the working folder."""
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"lora": {"rank": 2}}
    written = run_config(train__init=str(tmp_path / "base"), **settings)
    trainer = {"step": 1, "backend": "MindSpore", "config": written.to_dict(), "data_digest": "d"}
    resumed: Any = SimpleNamespace(path=tmp_path / "run", trainer=trainer)

    def changed(init: str) -> list[str]:
        lines = describe_resumption(resumed, run_config(train__init=init, **settings), [], "d")
        return [line for line in lines if "changed since" in line]

    assert changed("base") == []
    assert changed("other") == [
        f"warning: changed since the checkpoint: train.init: {tmp_path / 'base'} -> {tmp_path / 'other'}"
    ]
