"""Offsets of an echoed prompt, also where the tokenizer changes a text before it cuts it."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from telechat_twins.core.data.tokenizer import load_tokenizer
from telechat_twins.core.serve.echo import _alignment, _place, echoed

TEXT = "hello world of numbers"


def served(folder: Path, normalizer: str) -> Any:
    """A server's part whose byte-level tokenizer normalizes: every byte is a token."""
    library = pytest.importorskip("tokenizers", reason="needs the extra tokenizers")
    made = library.Tokenizer(library.models.BPE())
    made.normalizer = getattr(library.normalizers, normalizer)()
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=258, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    made.train_from_iterator([TEXT], trainer)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return SimpleNamespace(tokenizer=load_tokenizer(folder, control="auto"))


@pytest.mark.parametrize(
    ("normalizer", "prompt", "offsets"),
    [
        ("NFC", "e\u0301x e\u0301z", (0, 0, 2, 3, 4, 4, 6)),  # two bytes for a composed character
        ("NFC", "plain", (0, 1, 2, 3, 4)),
        ("Strip", "  hi  ", (2, 3)),
        ("Lowercase", "HEllO", (0, 1, 2, 3, 4)),
        ("NFKC", "\ufb01 a", (0, 1, 1, 2)),  # a ligature: "i" begins where it ends
    ],
)
def test_offsets_count_the_prompt_as_it_was_sent(
    normalizer: str, prompt: str, offsets: tuple[int, ...], tmp_path: Path
) -> None:
    server = served(tmp_path / "t", normalizer)
    ids = server.tokenizer.encode(prompt)
    found = echoed(prompt, ids, server)
    assert (found.text, found.offsets) == (prompt, offsets)
    of_ids = echoed(ids, ids, server)
    assert of_ids.text == server.tokenizer.decode(ids)


def test_places_are_in_order_and_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Random(0)
    for limit in (1_000, 5):
        monkeypatch.setattr("telechat_twins.core.serve.echo._ALIGNED", limit)
        for _ in range(300):
            prompt = "".join(draw.choice("ae\u0301 \ufb01AB\u4e2d") for _ in range(draw.randrange(30)))
            for text in (
                unicodedata.normalize("NFKC", prompt),
                prompt.strip(),
                " ".join(prompt.split()),
                "",
                prompt + "x",
            ):
                alignment = _alignment(text, prompt)
                places = [_place(alignment, offset) for offset in range(len(text) + 1)]
                assert places == sorted(places) and places[0] >= 0 and places[-1] == len(prompt)
