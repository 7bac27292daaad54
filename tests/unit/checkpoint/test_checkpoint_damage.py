"""Damaged checkpoints: truncated, altered and missing files, and manifests that contradict them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from telechat_twins.core.checkpoint.read import (
    manifest_digest,
    open_checkpoint,
)
from telechat_twins.core.errors import UserError
from telechat_twins.core.files import safetensors as safetensors_io
from tests.unit.checkpoint.test_checkpoint import save


def test_truncated_file_is_named_with_both_hashes(tmp_path):
    folder = save(tmp_path)
    file = folder / "optimizer-00001.safetensors"
    expected = json.loads((folder / "manifest.json").read_text())["files"][file.name]["sha256"]
    os.truncate(file, file.stat().st_size - 1)
    found = safetensors_io.file_sha256(file)
    for verify in (True, False):
        with pytest.raises(UserError) as caught:
            open_checkpoint(folder, verify)
        assert str(file) in str(caught.value) and "truncated" in str(caught.value)
        assert expected in str(caught.value) and found in str(caught.value)


@pytest.mark.parametrize("name", ["weights-00001.safetensors", "model.json", "trainer.json"])
def test_one_altered_byte_is_named_with_both_hashes(tmp_path, name):
    file = save(tmp_path) / name
    expected = safetensors_io.file_sha256(file)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError) as caught:
        open_checkpoint(tmp_path).verify()
    message = str(caught.value)
    if name == "weights-00001.safetensors":  # a damaged JSON file may already fail to parse
        assert expected in message and safetensors_io.file_sha256(file) in message
    assert str(file) in message and "\n" not in message


def test_missing_files_are_named(tmp_path):
    folder = save(tmp_path)
    (folder / "weights-00001.safetensors").unlink()
    with pytest.raises(UserError, match="weights-00001.safetensors: missing; the manifest lists it with"):
        open_checkpoint(folder)
    with pytest.raises(UserError, match="no such folder"):
        open_checkpoint(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither manifest.json nor latest"):
        open_checkpoint(tmp_path / "empty")
    for text, message in (
        ("step-00000099\n", "names 'step-00000099', which"),
        ("../x\n", "is not the name of a step folder"),
    ):
        (tmp_path / "latest").write_text(text)
        with pytest.raises(UserError, match=message):
            open_checkpoint(tmp_path)


def rewritten(tmp_path, change) -> Path:
    """A checkpoint with ``change`` applied to its manifest, digest made to fit: an attacker, not an accident."""
    folder = save(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("digest")
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": manifest_digest(manifest)}))
    return folder


def piece(manifest, name="embed.weight"):
    return manifest["tensors"]["weights"][name]["pieces"][0]


ALTERED = {
    "version": (lambda m: m.update(version=2), "format version 2 is unknown; this program reads version 1"),
    "format": (lambda m: m.update(format="zip"), "format 'zip' is not"),
    "up": (
        lambda m: m["files"].update({"../x": {"size": 1, "sha256": ""}}),
        "inside the checkpoint folder, found '../x'",
    ),
    "absolute": (
        lambda m: m["files"].update({"/etc/hosts": {"size": 1, "sha256": ""}}),
        "must stay inside the checkpoint folder",
    ),
    "nul": (lambda m: m["files"].update({"a\0": {"size": 1, "sha256": ""}}), "must stay inside the checkpoint folder"),
    "unlisted": (lambda m: piece(m).update(file="../y"), "'../y', is not listed"),
    "no model": (lambda m: m["files"].pop("model.json"), "must list model.json"),
    "key": (lambda m: piece(m).update(key="norm.weight"), "'norm.weight': expected F32 .11, 6. .* found F16 .6."),
    "no key": (lambda m: piece(m).update(key="gone"), "has no tensor 'gone'"),
    "extent": (lambda m: piece(m).update(extent=[10, 6]), "cover 60 of 66 elements"),
    "offset": (lambda m: piece(m).update(offset=[1, 0]), "cover 66 of 66"),
    "overlap": (
        lambda m: m["tensors"]["weights"]["embed.weight"]["pieces"].append(dict(piece(m))),
        "cover 132 of 66 elements and overlap",
    ),
    "shape": (lambda m: m["tensors"]["weights"]["embed.weight"].update(shape=[12, 6]), "cover 66 of 72"),
    "negative": (lambda m: piece(m).update(offset=[-1, 0]), "is not a list of sizes"),
    "dimensions": (lambda m: piece(m).update(offset=[0], extent=[66]), "another number of dimensions"),
    "dtype": (lambda m: m["tensors"]["weights"]["embed.weight"].update(dtype="F3"), "unknown dtype 'F3'"),
    "other dtype": (lambda m: m["tensors"]["weights"]["embed.weight"].update(dtype="I32"), "expected I32 .* found F32"),
    "no tensors": (lambda m: m.pop("tensors"), "manifest.json: damaged, KeyError 'tensors'"),
}


@pytest.mark.parametrize("case", ALTERED)
def test_altered_manifest_is_refused(tmp_path, case):
    change, message = ALTERED[case]
    folder = rewritten(tmp_path, change)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_accidental_change_of_the_manifest_is_seen(tmp_path):
    folder = save(tmp_path)
    text = (folder / "manifest.json").read_text()
    for altered, message in ((text.replace('"step": 7', '"step": 8'), "its digest is"), (text[:500], "damaged")):
        (folder / "manifest.json").write_text(altered)
        with pytest.raises(UserError, match=message):
            open_checkpoint(folder, verify=False)


def test_a_link_that_leads_outside_is_refused(tmp_path):
    folder = save(tmp_path / "run")
    file = folder / "weights-00001.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="must stay inside the checkpoint folder"):
        open_checkpoint(folder)
