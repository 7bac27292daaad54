"""Routes of other servers that this one does not have, and where to go instead."""

from __future__ import annotations

import re
from collections.abc import Collection

from telechat_twins.core.near import nearest

_TEXT = "this server generates text only: /v1/chat/completions, /v1/completions, /v1/responses"
_TOKENS = (
    "tele tokenize counts tokens and lists them; /v1/completions with echo, logprobs 0 and max_tokens 0 lists those of "
    "a prompt"
)
_STORES = "this server stores nothing: send the whole conversation with each request"
_CHAT, _COMPLETE = "use /v1/chat/completions", "use /v1/completions"
_HEALTH = "use /health"
# Patterns of whole paths, without a trailing slash.
_ADVICE: tuple[tuple[str, str], ...] = (
    (r"(/v1)?/(embeddings|moderations|rerank|score|pooling|classify)|/v2/rerank|/v1/(audio|images|videos)/.+", _TEXT),
    (r"/api/(embed|embeddings)", _TEXT),
    (r"(/v1)?/(tokenize|detokenize|tokenizer_info)|/v1/responses/input_tokens", _TOKENS),
    (r"/v1/(responses|chat/completions|conversations)/.+|/v1/(threads|assistants|conversations)(/.+)?", _STORES),
    (r"/v1/(files|batches|uploads|vector_stores|evals|containers)(/.+)?", _STORES),
    (r"/v1/fine_tuning/.+", "tele train tunes a model, and --adapter NAME=DIR serves an adapter"),
    (r"/v1/(un)?load_lora_adapter", "adapters are named when the server starts: --adapter NAME=DIR"),
    (r"/v1/messages(/count_tokens)?|/api/chat|/openai/deployments/.+/chat/completions", _CHAT),
    (r"/(api/)?generate(_stream)?|/completion|/infill|/v1/engines/.+/completions", _COMPLETE),
    (r"/openai/deployments/.+/completions", _COMPLETE),
    (r"/api/(tags|show|ps|version)|/props|/version|/get_model_info|/info", "use /v1/models"),
    (r"(/v1)?/(healthz?|livez|readyz?|ping|status)", _HEALTH),
    (r"/(docs|redoc|openapi\.json|v1)", "docs/serving.md describes the interface"),
)
CLOSE = 0.85  # of difflib, for a slip of one or two letters


def advice(path: str, routes: Collection[str]) -> str:
    """What to do in place of asking for ``path``, a clause; empty where nothing is known. ``routes``: the paths that
    there are."""
    short = path.rstrip("/")
    meant = "/v1" + re.sub(r"^(/v1)+(?=/)", "", short)  # a base_url without /v1, or with it twice
    if (found := short if short in routes and short else meant if meant in routes else None) and found != path:
        return f"did you mean {found}?"
    for pattern, clause in _ADVICE:
        if re.fullmatch(pattern, short):
            return clause
    near = nearest(short[:60], [route for route in routes if "{" not in route], cutoff=CLOSE)
    return f"did you mean {near}?" if near else ""
