"""Boxes of logical tensors read out of packed ones: as cut from the whole tensor, and no other bytes are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from telechat_twins.convert.copy import to_mindformers
from telechat_twins.convert.initial import is_mindformers, open_initial
from telechat_twins.convert.mindformers.source import MindFormersSource
from telechat_twins.convert.names import bind, mindformers_rules
from telechat_twins.convert.source import HfSource, open_model
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.params import parameter_table
from tests.support.frameworks import GOLDENS, golden_source

FORMS = ("plain", "qkv_concat", "mcore")
FAMILIES = ("telechat2_gqa", "teleflm", "telechat52b_like", "flm101b_like")


def boxes(shape: tuple[int, ...], random: np.random.Generator) -> list[tuple[slice, ...]]:
    """The whole, single rows, quarters, and boxes anywhere."""
    whole = tuple(slice(0, n) for n in shape)
    found = [whole, (slice(shape[0] - 1, shape[0]), *whole[1:])]
    found += [(slice(q * shape[0] // 4, (q + 1) * shape[0] // 4), *whole[1:]) for q in range(4)]
    for _ in range(4):
        ends = [np.sort(random.integers(0, n + 1, 2)) for n in shape]
        found.append(tuple(slice(int(a), int(b)) for a, b in ends))
    return found


@pytest.mark.parametrize("case", FAMILIES)
def test_boxes_of_a_release(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = golden_source(f"{case}/weights.safetensors", f"{case}/config.json")
    assert isinstance(source, HfSource)
    random = np.random.default_rng(0)
    taken: list[int] = []
    read = type(source.folder).read

    def counted(self, name, index=None):
        out = read(self, name, index)
        taken.append(out.size)
        return out

    for name, spec in parameter_table(source.config).items():
        whole = source.tensor(name)
        for box in boxes(spec.shape, random):
            taken.clear()
            monkeypatch.setattr(type(source.folder), "read", counted)
            got = source.read(name, box)
            monkeypatch.undo()
            assert got.dtype == whole.dtype and got.tobytes() == whole[box].tobytes(), (name, box)
            assert sum(taken) == whole[box].size, "reads the box and nothing else"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mp", [1, 2])
def test_boxes_of_every_packing_of_mindformers(form: str, mp: int) -> None:
    source = open_model(GOLDENS / "telechat2_gqa")
    random = np.random.default_rng(1)
    for binding in bind(source.config, mindformers_rules(source.config, form, mp)).values():
        parts = {name: source.tensor(name) for name in binding.logical}
        released = binding.join(parts, source.config)
        for name, whole in parts.items():
            for box in boxes(whole.shape, random):
                got = binding.read(released.__getitem__, name, box, source.config)
                assert got.tobytes() == whole[box].tobytes(), (name, box)


@pytest.mark.parametrize(("form", "mp"), [("plain", 2), ("qkv_concat", 2), ("qkv_concat", 1), ("mcore", 1)])
def test_a_mindformers_checkpoint_is_recognised(form: str, mp: int, tmp_path: Path) -> None:
    source = open_model(GOLDENS / "telechat2_gqa")
    to_mindformers(source, tmp_path / "m", form, mp)
    opened = open_initial(tmp_path / "m")
    assert isinstance(opened, MindFormersSource) and opened.config == source.config
    random = np.random.default_rng(2)
    for name, array in source.logical():
        assert opened.tensor(name).tobytes() == array.tobytes()
        for box in boxes(array.shape, random):
            assert opened.read(name, box).tobytes() == array[box].tobytes(), (name, box)
    # As MindFormers itself leaves them: without a word on the model, which then is the run's.
    for file in ("model.json", "config.json", "model_config.yaml"):
        (tmp_path / "m" / file).unlink(missing_ok=True)
    bare = open_initial(tmp_path / "m", source.config)
    assert all(bare.tensor(name).tobytes() == array.tobytes() for name, array in source.logical())
    assert not is_mindformers(GOLDENS / "telechat2_gqa")


def test_one_file_of_a_released_model_leads_to_its_folder() -> None:
    folder = GOLDENS / "telechat2_gqa"
    with pytest.raises(UserError, match=f"is one file of a model; give the folder that holds it, .*{folder.name}$"):
        open_initial(folder / "weights.safetensors")
