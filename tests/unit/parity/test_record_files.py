"""Records as files: what is written is read, small whatever the model, and anything else is refused in one line."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from telechat_twins.core.config import load_run_config
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import show_bytes
from telechat_twins.core.parity.record import read
from telechat_twins.core.parity.record.fold import folded
from telechat_twins.core.parity.record.format import MAX_BYTES, Record, estimated_bytes, fitting_buckets, write_record
from telechat_twins.core.parity.record.read import open_record, read_full
from telechat_twins.core.parity.record.recorder import quantity_order
from telechat_twins.core.parity.record.sites import sites
from telechat_twins.core.parity.record.sketch import BUCKETS, Projection
from telechat_twins.core.parity.record.take import Wanted, rehearse
from telechat_twins.core.parity.record.taps import Taps, TensorOps
from telechat_twins.core.parity.record.write import Parts, write_tensors
from tests.support.records import sketched, synthetic_record


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return synthetic_record(tmp_path_factory.mktemp("records") / "one")


@pytest.fixture
def folder(written: Record, tmp_path: Path) -> Path:
    assert written.path is not None
    shutil.copytree(written.path, tmp_path / "rec")
    return tmp_path / "rec"


def test_a_record_is_read_as_it_was_written(written):
    found = open_record(written.path)
    assert (found.header, found.trace) == (written.header, written.trace)
    assert list(found.quantities) == list(written.quantities)
    for key, row in written.quantities.items():
        assert found.quantities[key] == row and key == row.key
        np.testing.assert_array_equal(found.quantities[key].sketch, row.sketch)
    assert sum(file.stat().st_size for file in written.path.iterdir()) < 1_000_000


def test_a_tensor_of_parts_is_what_the_library_writes_whole(tmp_path):
    parts = [np.arange(12, dtype=np.float32).reshape(3, 4), np.full((2, 1), 7, np.float32)]
    tensors = {"count": np.arange(3), "scalar": np.array(2.5), "turned": np.arange(6.0).reshape(2, 3).T}
    made = write_tensors(tmp_path / "x", {"blocks": Parts(np.dtype(np.float32), (14,), parts), **tensors})
    assert made == {"bytes": (tmp_path / "x").stat().st_size, "sha256": read.file_sha256(tmp_path / "x")}
    found = load_file(tmp_path / "x")
    expected = tensors | {"blocks": np.concatenate([part.reshape(-1) for part in parts])}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)
    for shape, dtype in (((15,), np.float32), ((14,), np.float64)):
        with pytest.raises(ValueError, match="do not make"):
            write_tensors(tmp_path / "y", {"blocks": Parts(np.dtype(dtype), shape, parts)})


def test_full_tensors_stand_beside_the_sketches(written, tmp_path, monkeypatch):
    key = "gradient:norm.weight@1"
    shape = written.quantities[key].shape
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    write_record(tmp_path / "rec", written.header, written.trace, written.quantities.values(), {key: values})
    record = open_record(tmp_path / "rec")
    assert record.full == {key: shape}
    hashed: list[Path] = []
    real = read.file_sha256
    monkeypatch.setattr(read, "file_sha256", lambda path: hashed.append(path) or real(path))
    for _ in range(2):
        np.testing.assert_array_equal(read_full(record, key), values)
    assert len(hashed) == 1, "checked once while the file is the same"
    with pytest.raises(UserError, match="does not hold 'gradient:embed.weight@1' in full"):
        read_full(record, "gradient:embed.weight@1")
    data = bytearray((tmp_path / "rec" / "full.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "rec" / "full.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="SHA-256"):
        read_full(record, key)
    (tmp_path / "rec" / "full.safetensors").unlink()
    with pytest.raises(UserError, match="full.safetensors: cannot be read"):
        read_full(record, key)


def test_a_site_that_gets_no_gradient_is_left_out() -> None:
    """A framework's hook may bring None, where what reads the tensor gives it no gradient."""
    seen = []

    class See:
        def wants(self, micro: int) -> bool:
            return True

        def __call__(self, site: str, micro: int, array: np.ndarray, dtype: str, gradient: bool) -> None:
            seen.append((site, gradient))

    for gradient, expected in ((None, [False]), (np.ones((1, 2, 3)), [False, True])):
        seen.clear()
        tensors = TensorOps(np.asarray, lambda x: "float32", lambda x, hook, g=gradient: hook(g))
        stage = SimpleNamespace(norm=object(), last=True, layers={})
        taps = Taps([stage], See(), tensors)
        taps.decoder(lambda stage, x: x)(stage, np.zeros((1, 2, 3)))
        assert seen == [("logits", known) for known in expected]


Change = Callable[[Path], None]


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "record.json"
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))

    return apply


def signed(name: str, change: Change) -> Change:
    """A change of a file by someone who also puts its new hash into the header."""

    def apply(folder: Path) -> None:
        change(folder / name)
        data = (folder / name).read_bytes()
        facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        header(lambda tree: tree["files"].update({name: facts}))(folder)

    return apply


def table(change: Callable[[list[dict[str, Any]]], object]) -> Change:
    def apply(path: Path) -> None:
        tree = json.loads(path.read_text())
        change(tree["quantities"])
        path.write_text(json.dumps(tree))

    return signed("quantities.json", apply)


def columns(change: Callable[[dict[str, np.ndarray]], object]) -> Change:
    def apply(path: Path) -> None:
        held = load_file(path)
        change(held)
        save_file(held, path)

    return signed("sketches.safetensors", apply)


def put(column: str, value: float) -> Change:
    return columns(lambda held: held[column].reshape(-1).__setitem__(3, value))


def cut(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7]) and None


def flip(name: str) -> Change:
    def apply(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return apply


HOSTILE: dict[str, tuple[Change, str]] = {
    "no header": (lambda f: (f / "record.json").unlink(), "record.json: no such file"),
    "header cut": (cut("record.json"), "record.json: damaged"),
    "header of another format": (header(lambda t: t.update(format="x")), "format must be"),
    "another version": (header(lambda t: t.update(version=4)), "version must be 1 or 2 or 3, found 4"),
    "unknown key": (header(lambda t: t.update(more=1)), "unknown key 'more'"),
    "missing key": (header(lambda t: t.pop("layout")), "layout is missing"),
    "key of another type": (header(lambda t: t.update(rows="4")), "rows: must be of type int"),
    "steps that do not rise": (header(lambda t: t.update(steps=[2, 2])), "steps: must be"),
    "digest that is none": (header(lambda t: t["digests"].update(batch="../x")), "digests: must be"),
    "odd number of buckets": (header(lambda t: t.update(buckets=48)), "buckets: must be"),
    "another number of buckets": (header(lambda t: t.update(buckets=128)), "sketch must be F64"),
    "file outside": (header(lambda t: t["files"].update({"../x": {}})), "files: must list"),
    "huge number": (header(lambda t: t["files"]["trace.jsonl"].update(bytes=10**30)), "truncated or altered"),
    "too large in all": (
        lambda f: signed("trace.jsonl", lambda p: p.write_bytes(b" " * (MAX_BYTES + 1)) and None)(f),
        "at most 32000000 bytes",
    ),
    "table cut": (cut("quantities.json"), "truncated or altered"),
    "table altered": (flip("quantities.json"), "SHA-256"),
    "sketches cut": (cut("sketches.safetensors"), "truncated or altered"),
    "sketches altered": (flip("sketches.safetensors"), "SHA-256"),
    "sketches missing": (lambda f: (f / "sketches.safetensors").unlink(), "no such file"),
    "sketches a folder": (
        lambda f: (f / "trace.jsonl").rename(f / "x") and (f / "trace.jsonl").mkdir(),
        "it is a folder",
    ),
    "table of another thing": (
        signed("quantities.json", lambda p: p.write_text("[1]") and None),
        "not a table of quantities",
    ),
    "deep nesting": (signed("quantities.json", lambda p: p.write_text("[" * 99_999) and None), "not a table"),
    "name with a path": (table(lambda t: t[0].update(name="../../etc")), "logical name"),
    "name of control characters": (table(lambda t: t[0].update(name="a\x1b[2J")), "logical name"),
    "name without end": (table(lambda t: t[0].update(name="a" * 10_000)), "logical name"),
    "kind of another": (table(lambda t: t[0].update(kind="x")), "kind: must be one of"),
    "step that is not recorded": (table(lambda t: t[0].update(step=7)), "step: must be one of"),
    "hostile shape": (table(lambda t: t[0].update(shape=[1 << 40, 1 << 40])), "shape: must be"),
    "negative shape": (table(lambda t: t[0].update(shape=[-1, 4])), "shape: must be"),
    "shape of another count": (table(lambda t: t[0].update(shape=[2, 16, 3])), "are not those of a tensor"),
    "one twice": (table(lambda t: t.__setitem__(1, t[0])), "stands twice"),
    "one missing": (table(lambda t: t.pop()), "count must be I64"),
    "not finite": (put("norm2", np.nan), "norm2 must be finite"),
    "sketch not finite": (put("sketch", np.inf), "sketch must be finite"),
    "negative norm": (put("norm2", -1.0), "are not those"),
    "more not finite than there are": (put("nonfinite", 1 << 60), "are not those"),
    "column of another type": (
        columns(lambda h: h.__setitem__("count", h["count"].astype(np.float64))),
        "count must be I64",
    ),
    "column too many": (columns(lambda h: h.__setitem__("more", h["count"])), "must hold"),
    "full tensors that are not listed": (
        lambda f: save_file({"x": np.zeros(3)}, f / "full.safetensors"),
        "is not listed",
    ),
    "full tensor of no quantity": (
        lambda f: signed("full.safetensors", lambda p: save_file({"x": np.zeros(3)}, p))(f),
        "is not a quantity",
    ),
    "trace that goes back": (
        signed("trace.jsonl", lambda p: p.write_text('{"step": 2}\n{"step": 1}\n') and None),
        "trace.jsonl:2: step must be",
    ),
    "trace with text for a loss": (
        signed("trace.jsonl", lambda p: p.write_text('{"step": 1, "loss": "low"}\n') and None),
        "loss must be a number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_faulty_record_is_refused_in_one_line(folder, name):
    change, message = HOSTILE[name]
    change(folder)
    with pytest.raises(UserError) as refusal:
        open_record(folder)
    assert message in str(refusal.value) and "\n" not in str(refusal.value) and len(str(refusal.value)) < 2000


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name, message in (("file", "is a file"), ("none", "no such folder")):
        with pytest.raises(UserError, match=message):
            open_record(tmp_path / name)


def test_records_stay_small_for_the_largest_models():
    """Bytes by rank and in all, from shapes alone: nothing of 115 billion parameters is made."""
    for name in ("telechat2-115b", "flm-101b"):
        found = rehearse(load_run_config(name, []), Wanted(steps=1))
        assert found.record < MAX_BYTES and found.buckets == BUCKETS and found.shares[1] < found.record
    assert f"limit {show_bytes(MAX_BYTES)}" in "\n".join(found.lines())
    many = fitting_buckets(40_000)
    assert many < BUCKETS and estimated_bytes(40_000, many) <= MAX_BYTES
    with pytest.raises(UserError, match="would not fit"):
        fitting_buckets(1_000_000)


def test_a_smaller_sketch_is_that_of_fewer_buckets():
    random = np.random.default_rng(0)
    for shape in ((40, 60), (200,), (3,)):
        values = random.standard_normal(shape)
        small = sketched("gradient:a.weight@1", values, 64)
        np.testing.assert_allclose(
            folded(sketched("gradient:a.weight@1", values), 64, 0).sketch, small.sketch, rtol=0, atol=1e-12
        )
        assert Projection("a.weight", shape, 64).whole == (values.size <= 64)


@pytest.mark.parametrize("name", ["telechat2-tiny", "flm-tiny", "telechat2-tiny-lora", "teleflm-tiny"])
def test_sites_are_in_execution_order_and_read_what_exists(name):
    config = load_run_config(name, [])
    seen = {key.partition(":")[2].rpartition("@")[0] for key in quantity_order(config, 1) if key.startswith("weight")}
    for site in sites(config.model, config.lora):
        assert set(site.inputs) <= seen, site
        seen.add(site.name)
    assert len(quantity_order(config, 1)) == len(set(quantity_order(config, 1)))
