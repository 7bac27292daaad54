"""What dialogues hold that is read as it stands, though it is hardly meant: counted, and shown in the summary."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from telechat_twins.core.data.kinds.fields import written_messages
from telechat_twins.core.data.kinds.turns import has_call
from telechat_twins.core.types import JsonObject

_ANSWERS = ("assistant", "bot")
_SPEAKER = re.compile(r"\s*(Human|User|USER|Assistant|ASSISTANT|\u7528\u6237|\u52a9\u624b|\u95ee|\u7b54)[:\uff1a]")
# Turns as other models' templates mark them; DeepSeek's bars are full-width.
_FOREIGN = re.compile(
    r"<\|(?:im_start|im_end|eot_id|eom_id|(?:start|end)_header_id|begin_of_text|endoftext|system|user|assistant|prompter"
    r"|observation|end)\|>|<\uff5c[^<>]{1,30}\uff5c>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</s>(?=\s*\Z)"
    r"|### Response:(?=\s*\Z)"
)
_BEGINNINGS = ("<|", "<\uff5c", "INST]", "SYS>>", "_of_turn>", "</s>", "### Response:")  # faster than the pattern


def empty_turns(messages: Sequence[JsonObject]) -> Iterator[str]:
    """Questions without text, and answers without text and calls, each by itself."""
    for message in messages:
        if (message["content"] or "").strip() or message.get("tool_calls"):
            continue
        if message["role"] == "user":
            yield "questions hold no text"
        elif message["role"] in _ANSWERS:
            yield "answers hold no text, and teach a model to say nothing"


def slips(messages: Sequence[JsonObject], tags: bool) -> Iterator[str]:
    """What stands in a dialogue, each kind once; ``tags``: the tool tags in its texts count as control tokens."""
    spoken = [m["content"] for m in messages if m["role"] in ("user", *_ANSWERS) and m["content"]]
    if any(_SPEAKER.match(said) for said in spoken):
        yield "dialogues hold texts that begin with a speaker (Human:, \u95ee\uff1a), which is learnt too"
    if any(written_messages(said) for said in spoken):
        yield "dialogues hold messages written as text, in marks of JSON or Python, which are learnt too"
    if mark := next((found for said in spoken if (found := _foreign(said))), ""):
        yield f"dialogues hold {mark}, a mark of another chat layout, as letters of their texts"
    if any(m["role"] in _ANSWERS and _half_thought(m["content"] or "") for m in messages):
        yield "dialogues hold an answer with <think> or </think> alone, whose reasoning has no beginning or no end"
    if not tags and any(m["role"] in _ANSWERS and has_call(m["content"] or "") for m in messages):
        yield "dialogues hold a call in the text of an answer and no tools, so its tags are learnt as letters"
    yield from _turns_out_of_order(messages, tags)


def _half_thought(said: str) -> bool:
    """Whether an answer opens reasoning that it does not close, or the other way round."""
    return said.lstrip().startswith("<think>") != ("</think>" in said)


def _foreign(said: str) -> str:
    """The first mark of another layout in a text; "" for none."""
    found = _FOREIGN.search(said) if any(begins in said for begins in _BEGINNINGS) else None
    return found[0] if found else ""


def _turns_out_of_order(messages: Sequence[JsonObject], tags: bool) -> Iterator[str]:
    if messages[0]["role"] in _ANSWERS:
        yield "dialogues begin with an answer, which no question stands before"
    speakers = ["answer" if m["role"] in _ANSWERS else m["role"] for m in messages]
    running = {one for one, following in zip(speakers, speakers[1:], strict=False) if one == following != "tool"}
    for speaker, named in (("user", "questions"), ("answer", "answers")):
        if speaker in running:
            yield f"dialogues have two {named} running, each of which stays a turn"
    if "answer" in speakers and speakers[-1] in ("user", "tool"):
        yield "dialogues end with a turn that nothing answers, of which nothing is learnt"
    calls = False
    for message in messages:
        if message["role"] == "tool" and not calls:
            yield "dialogues hold a tool's result that no call stands before"
            return
        if message["role"] != "tool":
            calls = bool(message.get("tool_calls")) or (tags and has_call(message["content"] or ""))
