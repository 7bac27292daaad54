"""A release's generation_config.json: what is taken, what an option overrides, and what is named as not honoured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.decoding.settings import Settings, find_settings, read_settings
from telechat_twins.core.inference.sampling import SamplingConfig, sampling_config
from telechat_twins.core.model.config import load_model_config

CONFIG = load_model_config({"preset": "telechat2-tiny", "vocab_size": 64})
# As the 115B release has it (facts of the model), and as drawing ones look.
RELEASED = {
    **{"max_new_tokens": 40, "do_sample": False, "use_cache": True, "temperature": 0.3, "top_k": 5, "top_p": 0.85},
    **{"repetition_penalty": 1.03, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "user_token_id": 4},
    **{"bot_token_id": 5, "transformers_version": "4.30.0"},
}
DRAWING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "num_beams": 1, "stop_strings": ["END"]}


def read(found: dict) -> Settings:
    return read_settings(found, "generation_config.json", CONFIG)


def test_the_file_says_whether_and_how_tokens_are_drawn():
    released, drawing = read(RELEASED), read(DRAWING)
    assert released.resolve({}, draws=True) == sampling_config(repetition_penalty=1.03)
    # A temperature that is given draws, from the tokens that the file leaves.
    wanted = sampling_config(temperature=0.7, top_k=5, top_p=0.85, repetition_penalty=1.03)
    assert released.resolve({"temperature": 0.7}, draws=False) == wanted
    assert drawing.resolve({}, draws=False) == sampling_config(temperature=0.6, top_p=0.9, top_k=50)
    assert drawing.resolve({"top_p": 0.5, "seed": 4}, False) == sampling_config(
        temperature=0.6, top_p=0.5, top_k=50, seed=4
    )
    assert drawing.resolve({"temperature": 0.0}, draws=True).greedy
    # Without a file, or without do_sample in it, the command's own default stands.
    assert Settings().resolve({}, draws=False) == SamplingConfig()
    assert Settings().resolve({}, draws=True) == sampling_config(temperature=1.0)
    unsaid = read({"temperature": 0.6, "top_k": 3})
    assert unsaid.resolve({}, draws=True) == sampling_config(temperature=0.6, top_k=3)
    assert unsaid.resolve({}, draws=False) == SamplingConfig()
    assert read({"do_sample": True, "temperature": 0}).resolve({}, draws=True).greedy


def test_lengths_end_at_the_trained_one():
    assert read(RELEASED).new_tokens(10, 128, 2048) == 40
    assert read(RELEASED).new_tokens(2040, 128, 2048) == 8, "a default would change the rotary scaling"
    assert read(RELEASED).new_tokens(5000, 128, 2048) == 1
    assert read({"max_length": 100}).new_tokens(30, 128, 2048) == 70
    assert read({"max_length": 100, "max_new_tokens": 5}).new_tokens(30, 128, 2048) == 5
    assert read({}).new_tokens(30, 128, 2048) == 128
    least = read({"min_new_tokens": 5})
    assert [least.least_tokens(new) for new in (0, 3, 9)] == [0, 3, 5] and read({}).least_tokens(9) == 0


def test_one_line_says_what_is_taken():
    (line,) = read(RELEASED).note({}, draws=False)
    assert line == (
        "generation_config.json: takes repetition_penalty 1.03, max_new_tokens 40; without effect on greedy decoding: "
        "temperature 0.3, top_k 5, top_p 0.85 (--generation-config none: none)"
    )
    (line,) = read(DRAWING).note({"top_k": 3, "stop": True}, draws=False)
    assert line.startswith("generation_config.json: takes do_sample true, temperature 0.6, top_p 0.9 (")
    assert read({"do_sample": False, "eos_token_id": [2], "pad_token_id": 3}).note({}, draws=False) == []
    assert "takes min_new_tokens 3 (" in read({"min_new_tokens": 3}).note({}, draws=False)[0]
    assert read({"min_new_tokens": 0}).note({}, draws=False) == []
    assert "takes do_sample false" in read({"do_sample": False}).note({}, draws=True)[0]
    found = read({"num_beams": 4, "no_repeat_ngram_size": 0, "suppress_tokens": [7], "eos_token_id": [2, 9], "odd": 1})
    (line,) = found.note({}, draws=False)
    assert line == (
        "generation_config.json: not honoured: num_beams 4, suppress_tokens [7], eos_token_id [2, 9], odd 1"
    )


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"do_sample": "yes"}, "do_sample: must be true or false, found 'yes'; correct the file, or give"),
        ({"temperature": "hot"}, "temperature: must be a number, found 'hot'"),
        ({"top_p": 1.5}, ": top_p: must be at most 1.0, found 1.5.*--generation-config none"),
        ({"top_k": 2.5}, "top_k: expected.*--generation-config none"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be a whole number of at least 1, found 0"),
        ({"min_new_tokens": -1}, "min_new_tokens: must be a whole number of at least 0, found -1"),
        ({"stop_strings": ["a", ""]}, "stop_strings: must be a string or a list of strings, none empty"),
        ({"stop_strings": ["a"] * 17}, "stop_strings: must be at most 16 strings"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_key(found, message):
    with pytest.raises(UserError, match="^generation_config.json.*" + message):
        read(found)


def test_the_file_is_found_among_the_small_files(tmp_path: Path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(DRAWING))
    other = tmp_path / "other.json"
    other.write_text('{"top_k": 3}')
    assert find_settings("auto", [other, path], CONFIG).stops == ("END",)
    assert find_settings("auto", [other], CONFIG) == find_settings("none", [path], CONFIG) == Settings()
    assert find_settings(str(other), [path], CONFIG).sampling == {"top_k": 3}
    with pytest.raises(UserError, match="no such file"):
        find_settings(str(tmp_path / "none.json"), [path], CONFIG)
