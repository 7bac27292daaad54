"""Fields of requests to other servers: the values at which they ask for nothing here, and what to write instead.

Sources: the request classes of vLLM's OpenAI server (SamplingParams and what is around it), Ollama's /api/chat,
llama.cpp's server and text-generation-inference.
"""

from __future__ import annotations

from typing import NamedTuple


class Elsewhere(NamedTuple):
    """A field of another server. ``neutral``: values that ask for nothing; ``advice``: a clause for other values."""

    advice: str
    neutral: tuple[object, ...] = ()


_REPEATS = "use repetition_penalty, frequency_penalty or presence_penalty"
_BEAMS = "this server draws or takes the likeliest token, without beam search; leave it out"
_PROMPT = "use /v1/completions with echo and logprobs, which give the log-probabilities of the prompt"
_THINKS = "use chat_template_kwargs, where the model's chat template reads such a value"
_GRAMMAR = "use response_format, or structured_outputs with json, json_object, choice or regex"
_LENGTH = "use max_tokens"
_DRAWS = "use temperature: 0 takes the likeliest token, above 0 draws"

FIELDS: dict[str, Elsewhere] = {
    # vLLM
    "add_generation_prompt": Elsewhere("a chat always ends with the opening of an answer; leave it out", (True,)),
    "add_special_tokens": Elsewhere("the server's option --add-bos decides it; leave it out"),
    "allowed_token_ids": Elsewhere(_GRAMMAR, ([],)),
    "bad_words": Elsewhere("use logit_bias, by token id", ([],)),
    "best_of": Elsewhere("use n, and choose among its answers by their logprobs", (1,)),
    "chat_template": Elsewhere("the model's own chat template is used; leave it out"),
    "continue_final_message": Elsewhere("use /v1/completions with the text of the whole prompt", (False,)),
    "documents": Elsewhere("write them into a message", ([],)),
    "early_stopping": Elsewhere(_BEAMS, (False,)),
    "enable_thinking": Elsewhere(_THINKS),
    "guided_grammar": Elsewhere(_GRAMMAR),
    "guided_decoding_backend": Elsewhere("there is one, llguidance; leave it out"),
    "include_stop_str_in_output": Elsewhere("an answer ends before its stop string; append it to the text", (False,)),
    "length_penalty": Elsewhere(_BEAMS, (1,)),
    "logits_processors": Elsewhere("use logit_bias", ([],)),
    "no_repeat_ngram_size": Elsewhere(_REPEATS, (0,)),
    "priority": Elsewhere("requests are served in the order of their arrival; leave it out", (0,)),
    "prompt_logprobs": Elsewhere(_PROMPT),
    "return_token_ids": Elsewhere("use logprobs with return_tokens_as_token_ids", (False,)),
    "skip_special_tokens": Elsewhere(
        "control tokens have no text here; use logprobs with return_tokens_as_token_ids", (True,)
    ),
    "spaces_between_special_tokens": Elsewhere("control tokens have no text here; leave it out", (True, False)),
    "thinking": Elsewhere(_THINKS),
    "truncate_prompt_tokens": Elsewhere("a prompt is never cut; shorten it"),
    "use_beam_search": Elsewhere(_BEAMS, (False,)),
    # Ollama, llama.cpp, text-generation-inference, transformers
    "do_sample": Elsewhere(_DRAWS),
    "format": Elsewhere("use response_format"),
    "grammar": Elsewhere(_GRAMMAR),
    "inputs": Elsewhere("use prompt at /v1/completions, messages at /v1/chat/completions"),
    "json_schema": Elsewhere("use response_format of type json_schema"),
    "max_new_tokens": Elsewhere(_LENGTH),
    "n_predict": Elsewhere(_LENGTH),
    "num_beams": Elsewhere(_BEAMS, (1,)),
    "num_predict": Elsewhere(_LENGTH),
    "options": Elsewhere("write its fields beside the others: temperature, top_k, seed and so on"),
    "stop_sequences": Elsewhere("use stop"),
    "system": Elsewhere("use a first message of role system"),
    "think": Elsewhere(_THINKS),
    "typical_p": Elsewhere("use top_p or min_p", (1,)),
    # OpenAI's clients spread it over the body themselves; it is in a body only by mistake.
    "extra_body": Elsewhere("write its fields beside the others"),
}


def asks_nothing(field: str, value: object) -> bool:
    """Whether ``value`` of another server's ``field`` asks for nothing."""
    known = FIELDS.get(field)
    # In Python True equals 1, in JSON it does not.
    return known is not None and any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in known.neutral
    )
