"""Request fields shared by both endpoints, and the generation job that a request becomes."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from telechat_twins.core.inference.chat import default_answer_length
from telechat_twins.core.inference.decoding.grammar import Grammars
from telechat_twins.core.inference.decoding.settings import Settings
from telechat_twins.core.inference.requests import MAX_BIAS, MAX_SAMPLES, Request
from telechat_twins.core.inference.sampling import SamplingConfig
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.serve.errors import ApiError, shown
from telechat_twins.core.serve.fields import Fields
from telechat_twins.core.serve.frames import Frame, Head
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from telechat_twins.core.data.chat_layout import ChatLayout
    from telechat_twins.core.data.tokenizer import Tokenizer

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000  # of a stop string: each new text is compared with all of its prefixes
MAX_END_IDS = 64
MAX_LOGPROBS = 20
MAX_BIASED = 1024  # entries of logit_bias
MAX_SALT_CHARACTERS = 256
SEEDS = 2**63
# Fields of the OpenAI API that do not affect the text of an answer, with their types.
IGNORED: dict[str, type] = {
    "user": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "prompt_cache_options": dict,
    "service_tier": str,
    "store": bool,
    "metadata": dict,
    "prediction": dict,
}


@dataclass(frozen=True, kw_only=True)
class Served:
    """The served model and its limits in tokens: ``context`` of prompt and answer together, ``max_prompt`` and
    ``max_new`` of each. ``adapters``: names of the adapters that the model is offered with. ``settings``: defaults of
    requests, from the model's generation_config.json. ``grammars``: the engine's."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    context: int
    max_prompt: int
    max_new: int
    created: int
    fingerprint: str
    add_bos: bool = False
    layout: ChatLayout | None = None  # None: the model holds no dialogues
    adapters: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    grammars: Grammars

    @property
    def names(self) -> tuple[str, ...]:
        """Names that a request's `model` may have; the index of a name is its adapter's number (Request.adapter)."""
        return (self.name, *self.adapters)

    @property
    def has(self) -> str:
        """The names in a message."""
        return "this server has " + ", ".join(f"'{name}'" for name in self.names)

    @property
    def prompt_limit(self) -> str:
        """The limit on prompts, in the OpenAI API's wording, for which clients search messages."""
        if self.max_prompt >= self.context - 1:
            return f"This model's maximum context length is {self.context} tokens"
        return f"This server takes prompts of at most {self.max_prompt} tokens"


@dataclass(frozen=True)
class AnswerJob:
    """A request ready for the engine. ``requests``: one for each prompt, all with one adapter and as many samples.
    ``frame``: makes the layout of its response."""

    requests: tuple[Request, ...]
    frame: Callable[[Head], Frame]
    stream: bool

    @property
    def samples(self) -> int:
        return self.requests[0].samples

    @property
    def adapter(self) -> int:
        return self.requests[0].adapter


@dataclass(frozen=True)
class Draft:
    """A parsed request, checked except for the length of its prompts. ``answers``: number of answers it asks for.
    ``encode`` tokenizes the prompts, which may take seconds; ApiError when one is too long."""

    answers: int
    encode: Callable[[], AnswerJob]


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """What every endpoint lets a request say about its answers; the fields are those of Request."""

    adapter: int
    sampling: SamplingConfig
    stops: tuple[str, ...]
    ends: frozenset[int]
    bias: dict[int, float]
    salt: str
    ignore_eos: bool
    least: int | None
    settings: Settings

    def stop_ids(self, usual: frozenset[int]) -> frozenset[int]:
        """The tokens that end an answer which ``usual`` ones do unless they are ignored."""
        return self.ends | (frozenset() if self.ignore_eos else usual)

    def least_of(self, new: int) -> int:
        """``min_tokens`` of answers of at most ``new`` tokens, by default those of the model's settings. ApiError where
        the answers are shorter."""
        if self.least is None:
            return self.settings.least_tokens(new)
        if self.least > new:
            message = f"min_tokens: must be at most the answer's limit of {new} tokens, found {shown(self.least)}"
            raise ApiError(400, message, "min_tokens", "invalid_value")
        return self.least


def read_options(fields: Fields, served: Served, tenant: str) -> AnswerOptions:
    """The options in a request of ``tenant``. Other fields that every endpoint ignores are checked as well."""
    options = AnswerOptions(
        adapter=read_model(fields, served),
        sampling=read_sampling(fields, served.settings),
        stops=read_stops(fields, served.settings),
        ends=read_ends(fields, served.config.num_tokens),
        bias=read_bias(fields, served.config.num_tokens),
        salt=read_salt(fields, tenant),
        ignore_eos=fields.boolean("ignore_eos"),
        least=fields.integer("min_tokens", 0, None),
        settings=served.settings,
    )
    read_ignored(fields)
    return options


def read_model(fields: Fields, served: Served) -> int:
    """Number of the adapter that the request names, 0 for the model itself; ApiError 404 for another model's name, as
    in the OpenAI API."""
    name = fields.text("model")
    if name is None:
        fields.refuse("model", f"is missing; {served.has}", "missing_required_parameter")
    if name not in served.names:
        raise ApiError(404, f"The model {shown(name)} does not exist; {served.has}", "model", "model_not_found")
    return served.names.index(name)


def read_stream(fields: Fields) -> tuple[bool, bool]:
    """(stream, stream_options.include_usage)."""
    stream, options = fields.boolean("stream"), fields.object("stream_options")
    if options is None:
        return stream, False
    if not stream:
        fields.refuse("stream_options", "is only allowed with stream; set stream to true, or leave it out")
    inner = Fields(options, "stream_options")
    include = inner.boolean("include_usage")
    inner.boolean("include_obfuscation")  # would pad chunks against eavesdroppers; has no effect here
    inner.done()
    return stream, include


def read_sampling(fields: Fields, settings: Settings) -> SamplingConfig:
    """The sampling options. What a request leaves out is as in the model's ``settings``, else the OpenAI API's default:
    temperature 1. The seed is random by default."""
    seed, top_k = fields.integer("seed", -SEEDS, 2 * SEEDS - 1), fields.integer("top_k", -1, None)
    found: dict[str, float | None] = {
        "temperature": fields.number("temperature", 0.0, 2.0),
        "top_p": fields.number("top_p", 0.0, 1.0),
        "min_p": fields.number("min_p", 0.0, 1.0),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100.0),
        "presence_penalty": fields.number("presence_penalty", -2.0, 2.0),
        "frequency_penalty": fields.number("frequency_penalty", -2.0, 2.0),
        "top_k": None if top_k is None else max(top_k, 0),
    }
    given: JsonObject = {name: value for name, value in found.items() if value is not None}
    if "top_p" in given:  # the OpenAI API allows 0, which keeps the likeliest token only; any small share does the same
        given["top_p"] = max(given["top_p"], 1e-9)
    given["seed"] = secrets.randbits(63) if seed is None else seed % (2 * SEEDS)
    return settings.resolve(given, draws=True)


def read_ignored(fields: Fields) -> None:
    """Check the types of fields that are accepted and ignored."""
    for name, kind in IGNORED.items():
        {str: fields.text, bool: fields.boolean, dict: fields.object}[kind](name)


def read_stops(fields: Fields, settings: Settings) -> tuple[str, ...]:
    """The stop strings: none, one or several; by default those of the model's ``settings``."""
    found = fields.any("stop")
    if found is None:
        return settings.stops
    stops = [found] if isinstance(found, str) else found
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        fields.refuse("stop", f"expected a string or a list of strings, found {shown(found)}", "invalid_type")
    if len(stops) > MAX_STOPS or any(not 1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        message = f"must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters"
        fields.refuse("stop", message, "invalid_value")
    return tuple(stops)


def read_salt(fields: Fields, tenant: str) -> str:
    """The salt of a request: prompts share cached pages only among equal salts. It is made of the client's ``tenant``
    ("" where no keys are required) and the field ``cache_salt``."""
    salt = fields.text("cache_salt") or ""
    if len(salt) > MAX_SALT_CHARACTERS:
        message = f"must have at most {MAX_SALT_CHARACTERS} characters, found {len(salt)}"
        fields.refuse("cache_salt", message, "invalid_value")
    return f"{tenant}/{salt}" if tenant or salt else ""


def read_bias(fields: Fields, vocab_size: int) -> dict[int, float]:
    """logit_bias: token id (a string in JSON) -> value added to its logit."""
    bias: dict[int, float] = {}
    found = fields.object("logit_bias") or {}
    if len(found) > MAX_BIASED:
        fields.refuse("logit_bias", f"must have at most {MAX_BIASED} tokens, found {len(found)}", "invalid_value")
    for key, value in found.items():
        where = f"logit_bias[{shown(key)}]"
        if not (key.isascii() and key.isdecimal() and len(key) < 12 and int(key) < vocab_size):
            fields.refuse("logit_bias", f"{shown(key)} is not a token id of this vocabulary of {vocab_size}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -MAX_BIAS <= value <= MAX_BIAS:
            fields.refuse("logit_bias", f"{where} must be a number from -100 to 100, found {shown(value)}")
        bias[int(key)] = float(value)
    return bias


def read_ends(fields: Fields, vocab_size: int) -> frozenset[int]:
    """``stop_token_ids``: further tokens that end an answer and are not part of it."""
    found = fields.list("stop_token_ids") or []
    if len(found) > MAX_END_IDS:
        message = f"must have at most {MAX_END_IDS} tokens, found {len(found)}"
        fields.refuse("stop_token_ids", message, "invalid_value")
    ends: set[int] = set()
    for token in found:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            message = f"{shown(token)} is not a token id of this vocabulary of {vocab_size}"
            fields.refuse("stop_token_ids", message, "invalid_value")
        ends.add(token)
    return frozenset(ends)


def read_samples(fields: Fields) -> int:
    return fields.integer("n", 1, MAX_SAMPLES) or 1


def room(
    served: Served,
    prompts: Sequence[Sequence[int]],
    asked: int | None,
    default: int | None,
    param: str,
    limit: str = "max_tokens",
) -> int:
    """Token limit of each answer: ``asked``, or else ``default`` as far as it fits.

    ``default`` None: what the prompt leaves of the trained length, since a request's total length decides the rotary
    scaling; for a prompt beyond the trained length, the default of ``tele chat``. The model's settings come before
    ``default``. ``param`` and ``limit``: the fields of the prompts and of ``asked``. ApiError 400, in the OpenAI API's
    wording, when a prompt or the requested tokens do not fit the context.
    """
    longest = max(map(len, prompts))
    if longest > min(served.max_prompt, served.context - 1):
        raise ApiError(
            400,
            f"{served.prompt_limit}. However, your {param} resulted in {longest} tokens. "
            f"Please reduce the length of the {param}.",
            param,
            "context_length_exceeded",
        )
    free = min(served.context - longest, served.max_new)
    if asked is None:
        trained = served.config.training_seqlen
        within = trained - longest
        fits = default or (within if within > 0 else default_answer_length(served.config))
        return min(free, served.settings.new_tokens(longest, fits, trained))
    if longest + asked > served.context:
        raise ApiError(
            400,
            f"This model's maximum context length is {served.context} tokens. However, you requested "
            f"{longest + asked} tokens ({longest} in the {param}, {asked} in the completion). Please reduce the length "
            f"of the {param} or completion.",
            param,
            "context_length_exceeded",
        )
    if asked > served.max_new:
        raise ApiError(
            400,
            f"{limit} is too large: {asked}. This server generates at most {served.max_new} tokens per answer.",
            limit,
            "invalid_value",
        )
    return asked
