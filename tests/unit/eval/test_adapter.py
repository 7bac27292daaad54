"""The harness's model class over the engine, on a runner without a model: what each kind of request becomes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.data.chat_layout import BuiltInLayout
from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.journal import Journal
from telechat_twins.core.eval.scorer import Scorer
from telechat_twins.core.inference.engine import Engine, EngineLimits
from tests.support.data_support import tiny_tokenizer
from tests.support.engine_support import CHAT_CONFIG, PlainRunner, fake_logits
from tests.support.lm_eval_stub import harness_modules

V = CHAT_CONFIG.vocab_size
TEXTS = ("The quick brown fox", " jumps over", " sleeps", "")


@pytest.fixture(scope="module")
def harness() -> Iterator[tuple[ModuleType, type]]:
    with harness_modules() as instance:
        from telechat_twins.core.eval import adapter

        yield adapter, instance


class Made:
    """A model with its journal at ``path``; ``ask(kind, *arguments)`` gives the answers to several requests."""

    def __init__(self, harness: tuple[ModuleType, type], path: Path, max_len: int = 200) -> None:
        adapter, self.instance = harness
        self.tokenizer = tiny_tokenizer()
        self.runner = PlainRunner(CHAT_CONFIG, num_pages=800)
        engine = Engine(self.runner, self.tokenizer, limits=EngineLimits(max_len=max_len + 1, max_running=8))
        stops = frozenset({CHAT_CONFIG.eos_token_id})
        served = adapter.Served(CHAT_CONFIG, self.tokenizer, max_len, stops, BuiltInLayout(self.tokenizer))
        self.journal = Journal(path / "journal.jsonl", {})
        bar = SimpleNamespace(update=lambda count=1: None)
        self.model = adapter.EngineModel(served, Scorer(engine), self.journal, lambda what, total: nullcontext(bar))

    def ask(self, kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
        requests = [self.instance(kind, {}, given, number) for number, given in enumerate(arguments)]
        return list(getattr(self.model, kind)(requests))


def logprob(ids: list[int], first: int) -> tuple[float, bool]:
    """Of ids[first:] after what precedes them, and whether they are the likeliest."""
    total, greedy = 0.0, True
    for place in range(first, len(ids)):
        logits = fake_logits(ids[:place], V).astype(np.float64)
        total += logits[ids[place]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        greedy = greedy and int(logits.argmax()) == ids[place]
    return total, greedy


def test_log_likelihoods_are_those_of_the_texts_ids(harness, tmp_path) -> None:
    made = Made(harness, tmp_path)
    tokenizer = made.tokenizer
    found = made.ask("loglikelihood", *((TEXTS[0], text) for text in TEXTS[1:3]), ("", "fox"))
    context = tokenizer.encode(TEXTS[0])
    for answer, text in zip(found, TEXTS[1:3], strict=False):
        whole = tokenizer.encode(TEXTS[0] + text)
        assert whole[: len(context)] == context
        assert answer[0] == pytest.approx(logprob(whole, len(context))[0], rel=1e-6)
        assert answer[1] is False
    assert made.model.prefix_token_id == CHAT_CONFIG.bos_token_id
    alone = [CHAT_CONFIG.bos_token_id, *tokenizer.encode("fox")]
    assert found[2][0] == pytest.approx(logprob(alone, 1)[0], rel=1e-6)
    # Known answers come from the journal: nothing is computed.
    before = len(made.runner.sizes)
    again = made.ask("loglikelihood", (TEXTS[0], TEXTS[1]))
    assert again[0] == tuple(found[0]) and len(made.runner.sizes) == before
    with pytest.raises(UserError, match="has no token of its own"):
        made.ask("loglikelihood", (TEXTS[0], ""))


def test_tokens_over_the_border_of_context_and_choice_are_counted(harness, tmp_path) -> None:
    made = Made(harness, tmp_path)
    made.ask("loglikelihood", (TEXTS[0], TEXTS[1]), (TEXTS[0] + " ", TEXTS[1][1:]))
    assert made.model.crossed == 0
    context, choice = TEXTS[0][:-1], TEXTS[0][-1] + TEXTS[1]
    first, whole = made.tokenizer.encode(context), made.tokenizer.encode(context + choice)
    assert whole[: len(first)] != first, "no token lies over the border"
    (found,) = made.ask("loglikelihood", (context, choice))
    assert made.model.crossed == 1
    assert found[0] == pytest.approx(logprob([*first, *whole[len(first) :]], len(first))[0], rel=1e-6)


def test_rolling_likelihoods_count_every_token_once(harness, tmp_path) -> None:
    made = Made(harness, tmp_path, max_len=10)
    text = " ".join(["the quick brown fox"] * 6)
    ids = made.tokenizer.encode(text)
    assert len(ids) > 20
    expected, done = 0.0, 0
    while done < len(ids):  # windows of 10, the last one full
        count = min(10, len(ids) - done)
        seen = [CHAT_CONFIG.bos_token_id] if done == 0 else ids[max(0, done - 1 - (10 - count)) : done]
        expected += logprob([*seen, *ids[done : done + count]], len(seen))[0]
        done += count
    assert made.ask("loglikelihood_rolling", (text,)) == [pytest.approx(expected, rel=1e-6)]
    # A context that does not fit is cut from the left, and counted.
    (answer,) = made.ask("loglikelihood", (text, " fox"))
    whole = made.tokenizer.encode(text + " fox")
    assert answer[0] == pytest.approx(logprob(whole[-11:], 11 - (len(whole) - len(ids)))[0], rel=1e-6)
    assert made.model.cut == 1


def test_answers_end_before_stop_strings(harness, tmp_path) -> None:
    made = Made(harness, tmp_path)
    (whole,) = made.ask("generate_until", (TEXTS[0], {"until": [], "max_gen_toks": 12, "do_sample": False}))
    assert whole
    (stop,) = [text for text in [whole[3:5]] if text]
    (cut,) = made.ask("generate_until", (TEXTS[0], {"until": stop, "max_new_tokens": 12}))
    assert cut == whole[: whole.index(stop)]
    with pytest.raises(UserError, match="generation_kwargs: num_beams cannot be honoured here"):
        made.ask("generate_until", (TEXTS[0], {"until": [], "num_beams": 4}))
    with pytest.raises(UserError, match="max_gen_toks: must be 1 to 199, found 200"):
        made.ask("generate_until", (TEXTS[0], {"until": [], "max_gen_toks": 200}))


def test_conversations_are_encoded_by_the_chat_template(harness, tmp_path) -> None:
    """Names of control tokens inside a message stay text, though the template's text has real ones beside them."""
    made = Made(harness, tmp_path)
    history = [{"role": "user", "content": "Say <_bot> twice"}]
    text = made.model.apply_chat_template(history)
    expected = BuiltInLayout(made.tokenizer).encode(history)
    assert made.model.tok_encode(text) == expected
    assert made.model.tok_encode(text + " fox") == expected + made.tokenizer.encode(" fox")
    assert made.model.chat_template(True) and made.model.chat_template(False) is None
