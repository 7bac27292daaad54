"""Padded vocabularies: which rows are padding, that none is ever drawn, and that training and resuming say so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.data.tokenizer import check_vocabulary, load_tokenizer
from telechat_twins.core.data.vocabulary import fit_run, fit_vocabulary
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.requests import Request, turn_stops
from telechat_twins.core.inference.sampling import sampling_config
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.train import loop
from telechat_twins.core.train.start import added_note, describe_start
from tests.support.data_support import tiny_tokenizer, tiny_tokenizer_path
from tests.support.engine_support import CONFIG, PlainRunner, finish, tokens_of
from tests.support.numpy_stepper import VOCAB, MemoryBlend, NumpyStepper, run_config


def test_which_rows_are_padding() -> None:
    config = load_model_config({"preset": "telechat2-tiny", "vocab_size": 2112})
    fitted, note = fit_vocabulary(config, 2048, own=True)
    assert fitted == dataclasses.replace(config, vocab_tokens=2048)
    assert note is not None and "2112 rows and the tokenizer 2048 pieces: the last 64 rows" in note
    for pieces, own in ((2112, True), (2113, True), (1000, True), (1700, False)):  # fits, larger, another model's twice
        assert fit_vocabulary(config, pieces, own) == (config, None)
    assert fit_vocabulary(config, 1700, own=True)[0].vocab_tokens == 1700
    said = dataclasses.replace(config, vocab_tokens=2100)
    assert fit_vocabulary(said, 2048, own=True) == (said, None)  # the config's own word
    ends = dataclasses.replace(config, end_token_ids=(2050,))
    assert fit_vocabulary(ends, 2048, own=True) == (ends, None)  # a row that a token of the config stands in


def test_the_row_of_an_added_token_is_no_padding() -> None:
    """A fine-tune's added_tokens.json names tokens that tokenizer.model does not have, and their rows are trained."""
    config = load_model_config({"preset": "telechat2-tiny", "vocab_size": 2112})
    with pytest.raises(
        UserError, match=r"^m/x: '<\|im_end\|>' was added with id 2048 by a file beside it, behind the 2048 "
    ):
        fit_vocabulary(config, 2048, True, {"<_user>": 4, "<|im_end|>": 2048}, "m/x")
    # What transformers adds to a release: <unk>, of which TeleChat2 has no row.
    assert fit_vocabulary(config, 2048, True, {"<unk>": 2112, "<_user>": 4, "<x>": None})[0].vocab_tokens == 2048


def test_a_start_says_what_becomes_of_rows_of_the_vocabulary(tmp_path: Path) -> None:
    theirs = load_model_config({"preset": "telechat2-tiny", "vocab_size": 2112})
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 2049, "<_user>": 4, "<unk>": 2112}')
    source: Any = SimpleNamespace(path=tmp_path, config=theirs, notes=(), assets=[tmp_path / "added_tokens.json"])
    for rows, says in (
        (2100, ["note: of the 2112 rows of its vocabulary the first 2100 are taken"]),
        (2112, []),
        (2176, ["note: 64 rows are added to its vocabulary of 2112 as padding of zeros"]),
    ):
        ours = dataclasses.replace(theirs, vocab_size=rows, vocab_tokens=2048)
        assert describe_start(source, ours, "0" * 64)[1:] == says
        (warning,) = added_note(source, ours)
        assert "'<|im_end|>' was added to its tokenizer with id 2049 and is none of the 2048 pieces" in warning
    assert added_note(source, theirs) == []  # all rows stand for tokens
    (tmp_path / "added_tokens.json").write_text("{")
    assert added_note(source, ours) == []


def padded_logits(ids: object, vocab_size: int) -> np.ndarray:
    """The padding rows are the likeliest by far."""
    logits = np.linspace(0.0, 1.0, vocab_size, dtype=np.float32)
    logits[60:] = 1e4
    return logits


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1e6},
        {"temperature": 1.0, "top_k": 64},
        {"temperature": 1e6, "repetition_penalty": 1e6, "min_p": 0.0},
        {"frequency_penalty": 100.0, "presence_penalty": 100.0},
    ],
)
def test_a_padding_row_is_never_drawn(sampling: dict[str, float]) -> None:
    config = dataclasses.replace(CONFIG, vocab_tokens=60)
    engine = Engine(PlainRunner(config, logits=padded_logits))
    request = Request(
        prompt_ids=(5, 6), max_new_tokens=200, sampling=sampling_config(**sampling), logprobs=60, margins=True
    )
    number = engine.submit(request)
    events = finish(engine)[number]
    drawn = tokens_of(events)
    assert len(drawn) == 200 and max(drawn) < 60
    for event in events:
        assert event.choice is not None and event.choice.logprob is not None
        assert len(event.choice.top) == 60 and all(token < 60 for token, _ in event.choice.top)
        assert abs(sum(np.exp(value) for _, value in event.choice.top) - 1) < 1e-9


def test_a_padding_row_is_no_token_of_a_prompt_or_a_bias() -> None:
    engine = Engine(PlainRunner(dataclasses.replace(CONFIG, vocab_tokens=60)))
    greedy = sampling_config()
    with pytest.raises(UserError, match="prompt: token id 60 at place 1 is outside the vocabulary of 60"):
        engine.check(Request(prompt_ids=(5, 60), max_new_tokens=1, sampling=greedy))
    with pytest.raises(UserError, match="logit_bias: token id 63 at place 0 is outside the vocabulary of 60"):
        engine.check(Request(prompt_ids=(5,), max_new_tokens=1, sampling=greedy, logit_bias={63: 1.0}))


def test_every_token_that_ends_ends_an_answer() -> None:
    config = dataclasses.replace(CONFIG, end_token_ids=(9, 11), pad_token_id=None)
    tokenizer = tiny_tokenizer()
    assert turn_stops(tokenizer, config) >= {2, 9, 11} and config.stop_ids == {2, 9, 11}


def padded_run(**changes: object):  # type: ignore[no-untyped-def]
    return run_config(model=run_config().model.to_dict() | {"vocab_size": VOCAB + 8} | changes)


def test_a_run_takes_padding_out_of_the_loss_and_says_so(tmp_path, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """From data whose tokenizer has fewer pieces; on resuming from a checkpoint that did not know, too."""
    monkeypatch.setattr(loop, "open_blend", lambda *_: MemoryBlend(7))
    config, notes = fit_run(padded_run(), VOCAB)
    assert config.model.vocab_tokens == VOCAB and len(notes) == 1
    loop.train(NumpyStepper, padded_run(), tmp_path / "a")
    assert f"note: the vocabulary has {VOCAB + 8} rows and the tokenizer {VOCAB} pieces" in capsys.readouterr().err
    # A run that counted all rows, as before: one more step from it, with the rows named.
    blind = MemoryBlend(7)
    blind.vocab_size = VOCAB + 8
    monkeypatch.setattr(loop, "open_blend", lambda *_: blind)
    loop.train(NumpyStepper, padded_run(), tmp_path / "b")
    monkeypatch.setattr(loop, "open_blend", lambda *_: MemoryBlend(7))
    capsys.readouterr()
    longer = dataclasses.replace(padded_run(), train=dataclasses.replace(padded_run().train, steps=13))
    loop.train(NumpyStepper, longer, tmp_path / "b", "auto")
    assert f"warning: changed since the checkpoint: model.vocab_tokens: None -> {VOCAB}" in capsys.readouterr().err
    # The other way is another model.
    monkeypatch.setattr(loop, "open_blend", lambda *_: blind)
    with pytest.raises(UserError, match=f"vocab_tokens: {VOCAB} -> None"):
        loop.train(NumpyStepper, longer, tmp_path / "b", "auto")


def test_data_of_another_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="made by a tokenizer of 24 pieces, but 30 of the model's 32 rows stand for"):
        fit_run(padded_run(vocab_tokens=30), VOCAB)


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_a_token_of_the_config_behind_the_pieces_is_named(name: str) -> None:
    """In a row that would else be padding: neither another vocab_size nor another folder is the way out."""
    tokenizer = tiny_tokenizer()
    model = {"preset": "telechat2-tiny", "vocab_size": tokenizer.vocab_size + 40, name: tokenizer.vocab_size + 3}
    with pytest.raises(
        UserError, match=rf"has 600 pieces, and the model's {name} 603 lies behind them.*correct {name}"
    ):
        check_vocabulary(tokenizer, fit_vocabulary(load_model_config(model), tokenizer.vocab_size, own=True)[0])


def test_added_tokens_that_are_text_stand_in_rows_too(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer_path().read_bytes())
    entry = {"603": {"content": "<x>", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entry}))
    found = load_tokenizer(tmp_path).special
    assert found.described == {"<x>": 603} and not found.added
    config = load_model_config({"preset": "telechat2-tiny", "vocab_size": 640})
    with pytest.raises(UserError, match="'<x>' was added with id 603"):
        fit_vocabulary(config, 600, True, found.described)


@pytest.mark.parametrize(
    ("file", "found", "says"),
    [
        ("tokenizer_config", {"eos_token": 5}, "eos_token must be a token's name, or an object with it, found 5"),
        ("tokenizer_config", {"bos_token": {"content": 5}}, "bos_token must be"),
        ("special_tokens_map", {"pad_token": ["<_pad>"]}, "pad_token must be"),
        ("tokenizer_config", {"additional_special_tokens": "x"}, "additional_special_tokens must be names"),
        ("special_tokens_map", {"additional_special_tokens": [5]}, "additional_special_tokens must be names"),
        ("tokenizer_config", {"extra_special_tokens": {"a": 5}}, "extra_special_tokens must be names"),
        ("tokenizer_config", {"added_tokens_decoder": []}, "added_tokens_decoder must map ids to tokens, found []"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "a"}}}, "expected an id: a token"),
        ("tokenizer_config", {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "expected an id: a token"),
        ("tokenizer_config", {"added_tokens_decoder": {"1": "a"}}, "expected an id: a token"),
        ("tokenizer_config", {"added_tokens_decoder": {"1": {}}}, "added_tokens_decoder.1 has no content"),
        ("tokenizer_config", {"add_bos_token": "yes"}, "add_bos_token must be true or false, found 'yes'"),
        ("added_tokens", {"<x>": "601"}, "'<x>' must have an id, found '601'"),
        ("added_tokens", {"<x>": -1}, "'<x>' must have an id, found -1"),
    ],
)
def test_descriptions_of_tokens_of_another_shape_are_refused(
    file: str, found: dict[str, object], says: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer_path().read_bytes())
    (tmp_path / f"{file}.json").write_text(json.dumps(found))
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / file}.json: ") and says in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_descriptions_as_transformers_writes_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer_path().read_bytes())
    found = {"bos_token": None, "pad_token": "", "eos_token": {"__type": "AddedToken", "content": "<_end>"}}
    found |= {"added_tokens_decoder": {}, "extra_special_tokens": {}, "additional_special_tokens": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(found | {"add_bos_token": None}))
    assert load_tokenizer(tmp_path).special.names == {"eos_token": "<_end>"}
