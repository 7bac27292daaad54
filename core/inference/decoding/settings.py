"""Generation settings of a release: the ``generation_config.json`` of transformers, as defaults of an answer.

What an option or a request says comes first, then the file, then the default of the command. Which tokens end
generation is part of the model (convert.hf.folder reads it); everything else in the file is either taken here, or has
no effect on an answer, or is named in a note as not honoured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import load_json
from telechat_twins.core.inference.sampling import SamplingConfig, sampling_config
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

FILE = "generation_config.json"
AUTO, NONE = "auto", "none"
DRAWING = ("temperature", "top_k", "top_p", "min_p")  # without effect on greedy decoding
SAMPLING = (*DRAWING, "repetition_penalty")
LENGTHS = ("max_new_tokens", "max_length")
MAX_STOPS = 16
# Keys that cannot change the text of an answer: what describes the file, how transformers keeps its cache, what it
# returns beside the text, and how it speeds up drawing.
_WITHOUT_EFFECT = """
transformers_version cache_implementation cache_config use_cache return_legacy_cache compile_config disable_compile
return_dict_in_generate output_scores output_logits output_attentions output_hidden_states is_assistant
num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit
assistant_lookbehind target_lookbehind prompt_lookup_num_tokens max_matching_ngram_size prefill_chunk_size low_memory
decoder_start_token_id user_token_id bot_token_id chat_format trust_remote_code
"""
# Values at which a key that is not honoured asks for nothing: transformers' defaults.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "length_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "typical_p": (1,),
    "top_h": (1,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "diversity_penalty": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
}


@dataclass(frozen=True)
class Settings:
    """The file's settings. ``where``: its path, None without one. ``draws``: do_sample. ``sampling``: fields of
    SamplingConfig. ``max_length`` counts prompt and answer; ``max_new_tokens``, the answer alone, comes before it.
    ``min_new_tokens`` as in Request. ``stops``: stop strings. ``unknown``: keys that are not honoured, with their
    values."""

    where: str | None = None
    draws: bool | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    stops: tuple[str, ...] = ()
    unknown: Mapping[str, object] = field(default_factory=dict)

    def resolve(self, given: Mapping[str, object], draws: bool) -> SamplingConfig:
        """The sampling of an answer. ``given``: fields of SamplingConfig that an option or a request sets; ``draws``:
        whether the command draws where neither it nor the file says so, at temperature 1.

        A temperature that is given decides whether tokens are drawn. UserError for a value out of range.
        """
        drawing = bool(given["temperature"]) if "temperature" in given else self.draws_by(draws)
        known = {name: value for name, value in self.sampling.items() if drawing or name not in DRAWING}
        values: dict[str, object] = {"temperature": 1.0 if drawing else 0.0, **known, **given}
        return sampling_config(**values)

    def draws_by(self, draws: bool) -> bool:
        """Whether an answer is drawn where its temperature is not given."""
        return draws if self.draws is None else self.draws

    def new_tokens(self, prompt: int, default: int, trained: int) -> int:
        """Tokens of an answer to a prompt of ``prompt`` tokens: those of the file, else ``default``.

        The file's number ends at the trained length: the planned length of a request decides its rotary scaling, which
        a default is not to change. An answer has one token at least.
        """
        wanted = self.max_new_tokens
        if wanted is None and self.max_length is not None:
            wanted = self.max_length - prompt
        return default if wanted is None else max(1, min(wanted, trained - prompt))

    def least_tokens(self, new: int) -> int:
        """Tokens before which no answer of at most ``new`` tokens ends (Request.min_new_tokens)."""
        return min(self.min_new_tokens, new)

    def note(self, given: Mapping[str, object], draws: bool) -> list[str]:
        """What is taken from the file beside what is ``given``, in a line, and what is not honoured, in another.

        Empty where nothing in the file differs from the command's own defaults. ``given`` also holds max_new_tokens and
        stop where they are given; ``draws`` as in ``resolve``.
        """
        drawing = bool(given["temperature"]) if "temperature" in given else self.draws_by(draws)
        taken: list[str] = []
        idle: list[str] = []
        if self.draws is not None and self.draws != draws and "temperature" not in given:
            taken.append(f"do_sample {str(self.draws).lower()}")
        for name, value in self.sampling.items():
            if name not in given:
                (taken if drawing or name not in DRAWING else idle).append(f"{name} {value:g}")
        if "max_new_tokens" not in given:
            taken += [f"{name} {value}" for name in LENGTHS if (value := getattr(self, name)) is not None][:1]
        if self.min_new_tokens:
            taken.append(f"min_new_tokens {self.min_new_tokens}")
        if self.stops and "stop" not in given:
            taken.append(f"{len(self.stops)} stop_strings")
        notes = []
        if taken or idle:
            unused = f"; without effect on greedy decoding: {', '.join(idle)}" if idle else ""
            notes.append(
                f"{self.where}: takes {', '.join(taken) or 'nothing'}{unused} (--generation-config none: none)"
            )
        if self.unknown:
            listed = ", ".join(f"{name} {shown(value)}" for name, value in self.unknown.items())
            notes.append(f"{self.where}: not honoured: {listed}")
        return notes


def find_settings(choice: str, assets: Sequence[Path], config: ModelConfig) -> Settings:
    """The settings of --generation-config: "auto", the file among a model's ``assets`` if there is one; "none"; or the
    path of a file. UserError names the file and the key for a value of the wrong type or out of range."""
    if choice == NONE:
        return Settings()
    path = Path(choice) if choice != AUTO else next((path for path in assets if path.name == FILE), None)
    return Settings() if path is None else read_settings(load_json(path, "generation settings"), str(path), config)


def read_settings(found: JsonObject, where: str, config: ModelConfig) -> Settings:
    """The settings in the parsed file ``where`` of the model ``config``."""
    given = {key: value for key, value in found.items() if value is not None}
    draws = given.pop("do_sample", None)
    if not isinstance(draws, (bool, type(None))):
        raise _wrong(where, "do_sample", "true or false", draws)
    sampling: dict[str, float] = {}
    for name in SAMPLING:
        if name in given:
            sampling[name] = _sampling_value(where, name, given.pop(name))
    lengths = {name: _length(where, name, given.pop(name)) for name in LENGTHS if name in given}
    return Settings(
        where,
        draws,
        {name: n for name, n in sampling.items() if name == "temperature" or n != getattr(SamplingConfig(), name)},
        min_new_tokens=_length(where, "min_new_tokens", given.pop("min_new_tokens", 0), least=0),
        stops=_stops(where, given.pop("stop_strings", ())),
        unknown={key: value for key, value in given.items() if not _harmless(key, value, config)},
        **lengths,
    )


def _sampling_value(where: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _wrong(where, name, "a number", value)
    try:
        sampling_config(**{name: value})
    except UserError as error:
        reason = str(error).removeprefix("sampling.")
        raise UserError(f"{where}: {reason}; correct the file, or give --generation-config none") from None
    return value


def _length(where: str, name: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _wrong(where, name, f"a whole number of at least {least}", value)
    return value


def _stops(where: str, value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, (list, tuple)) or not all(isinstance(stop, str) and stop for stop in stops):
        raise _wrong(where, "stop_strings", "a string or a list of strings, none empty", value)
    if len(stops) > MAX_STOPS:
        raise _wrong(where, "stop_strings", f"at most {MAX_STOPS} strings", value)
    return tuple(stops)


def _harmless(key: str, value: object, config: ModelConfig) -> bool:
    """Whether a key that is not read here asks for nothing."""
    if key in _WITHOUT_EFFECT.split() or key.startswith("_"):
        return True
    if key == "eos_token_id":  # the source has read it into the config; ids outside the vocabulary are never drawn
        ends = value if isinstance(value, list) else [value]
        return all(isinstance(end, int) and (end in config.stop_ids or end >= config.num_tokens) for end in ends)
    if key in ("bos_token_id", "pad_token_id"):
        return value == getattr(config, key)
    # An empty list of words or processors, and a switch that is off.
    return value is False or value in ([], {}) or value in _NEUTRAL.get(key, ())


def _wrong(where: str, key: str, expected: str, found: object) -> UserError:
    return UserError(
        f"{where}: {key}: must be {expected}, found {shown(found)}; correct the file, or give --generation-config none"
    )
