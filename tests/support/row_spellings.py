"""Random conversations, and each in the spellings of every kind of row that can say it."""

from __future__ import annotations

import json
import random
from typing import Any

from telechat_twins.core.types import JsonObject

_WORDS = (
    *("fox", "the dog", "\u4e2d\u56fd", "\u5929\u6c14\uff1f", "\U0001f608", "3.14", "[1, 2]", "{x}", "true", "null"),
    *("<_end>", "<_user>", "<tool_call>", "</tool_call>", "<unk>", "\n", "  ", "\t", '"', "\\"),
)


def words(draw: random.Random, least: int = 1) -> str:
    """A text that holds letters, control names, quotes and line breaks."""
    return "".join(draw.choices(_WORDS, k=draw.randint(least, 6)))


class Conversation:
    """What is meant: ``system`` or None, ``tools`` or None, and messages as the chat template takes them."""

    def __init__(
        self, draw: random.Random, turns: int, tools: bool = False, weights: bool = False, several: bool = True
    ):
        self.system = words(draw) if draw.random() < 0.5 else None
        self.tools = [{"type": "function", "function": {"name": "f", "description": words(draw)}}] if tools else None
        self.messages: list[JsonObject] = []
        for _ in range(turns):
            self.messages.append({"role": "user", "content": words(draw)})
            if tools and draw.random() < 0.6:
                calls = [_call(draw) for _ in range(draw.randint(1, 2 if several else 1))]
                self.messages.append(
                    {"role": "assistant", "content": words(draw, 0) if several else "", "tool_calls": calls}
                )
                self.messages += [{"role": "tool", "content": words(draw)} for _ in calls]
            answer = {"role": "assistant", "content": words(draw)}
            if weights and draw.random() < 0.3:
                answer["weight"] = 0
            self.messages.append(answer)

    @property
    def shown(self) -> list[JsonObject]:
        """The messages with the system message in front, as ``tele chat`` is given them."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self.messages]


def _call(draw: random.Random) -> JsonObject:
    return {
        "name": draw.choice(("f", "get_x")),
        "arguments": {words(draw): draw.choice((1, 2.5, "a</tool_call>", None, [1], {}))},
    }


def dialog(draw: random.Random) -> tuple[Conversation, JsonObject]:
    meant = Conversation(draw, draw.randint(1, 3))
    messages = [{**m, "role": {"assistant": "bot"}.get(m["role"], m["role"])} for m in meant.messages]
    row = {"dialog": messages, "tool": False, "multiturn": len(messages) > 2}
    if meant.system is not None:
        # The layout adds the newline with which released system texts end.
        meant.system = meant.system.removesuffix("\n")
        row["system"] = meant.system + "\n"
    return meant, row


def messages(draw: random.Random) -> tuple[Conversation, JsonObject]:
    meant = Conversation(draw, draw.randint(1, 3), tools=draw.random() < 0.5, weights=True)
    written, pending = [], list[str]()
    for message in meant.messages:
        one: JsonObject = dict(message)
        if "tool_calls" in one:
            pending = [f"call_{n}" for n in range(len(one["tool_calls"]))]
            one["tool_calls"] = [_openai_call(draw, call, pending[n]) for n, call in enumerate(one["tool_calls"])]
            one["content"] = one["content"] or None
        elif one["role"] == "tool":
            one["tool_call_id"] = pending.pop(0)
            if draw.random() < 0.3:
                one["content"] = draw.choice(({words(draw): [1, None]}, [{"x": words(draw)}], 2.5))
                message["content"] = json.dumps(one["content"], ensure_ascii=False)
                written.append(one)
                continue
        if one["content"] and draw.random() < 0.3:
            cut = draw.randint(0, len(one["content"]))
            texts = (one["content"][:cut], one["content"][cut:])
            one["content"] = [{"type": "text", "text": text} for text in texts]
        if one["role"] == "assistant" and "weight" not in one and draw.random() < 0.3:
            one["weight"] = 1
        written.append(one)
    row: JsonObject = {"messages": written, "id": draw.randint(0, 9)}
    if meant.system is not None:
        if draw.random() < 0.5:
            row["system"] = meant.system
        else:
            written.insert(0, {"role": draw.choice(("system", "developer")), "content": meant.system})
    if meant.tools is not None:
        row |= draw.choice(
            ({"tools": meant.tools}, {"tools": json.dumps(meant.tools)}, {"functions": [meant.tools[0]["function"]]})
        )
    return meant, row


def _openai_call(draw: random.Random, call: JsonObject, name: str) -> JsonObject:
    arguments: Any = call["arguments"]
    if draw.random() < 0.6:
        arguments = json.dumps(arguments, ensure_ascii=draw.random() < 0.5, indent=draw.choice((None, 2)))
    function = {"name": call["name"], "arguments": arguments}
    return {"id": name, "type": "function", "function": function} if draw.random() < 0.7 else {"id": name, **function}


_IN_ONE = (("human", "assistant"), ("input", "output"), ("user", "assistant"), ("question", "answer"))


def sharegpt(draw: random.Random) -> tuple[Conversation, JsonObject]:
    meant = Conversation(draw, draw.randint(1, 3), tools=draw.random() < 0.5, several=False)
    names = {
        "user": ("human", "user"),
        "assistant": ("gpt", "assistant", "bard", "bing", "chatgpt"),
        "tool": ("observation", "tool", "function"),
    }
    turns = []
    for message in meant.messages:
        if "tool_calls" in message:
            call = message["tool_calls"][0]
            turns.append({"from": draw.choice(("function_call", "tool_call")), "value": json.dumps(call)})
        else:
            turns.append({"from": draw.choice(names[message["role"]]), "value": message["content"]})
    if draw.random() < 0.3:
        turns = [{"role": turn["from"], "content": turn["value"]} for turn in turns]
    spelled: list[object] = list(turns)
    if meant.tools is None and draw.random() < 0.3:
        texts = [message["content"] for message in meant.messages]
        pairs = zip(texts[::2], texts[1::2], strict=True)
        spelled = draw.choice((list(texts), [dict(zip(draw.choice(_IN_ONE), pair, strict=True)) for pair in pairs]))
    row: JsonObject = {draw.choice(("conversations", "conversation", "items", "turns", "data")): spelled}
    if meant.system is not None:
        if draw.random() < 0.5 or spelled != turns:
            row["system"] = meant.system
        else:
            spelled.insert(0, {"from": "system", "value": meant.system})
    if meant.tools is not None:
        row["tools"] = json.dumps(meant.tools, ensure_ascii=False)
    return meant, row


def _with_history(draw: random.Random, meant: Conversation, row: JsonObject) -> JsonObject:
    earlier = meant.messages[:-2]
    pairs = [[asked["content"], said["content"]] for asked, said in zip(earlier[::2], earlier[1::2], strict=True)]
    if pairs:
        row["history"] = draw.choice((pairs, json.dumps(pairs), [dict(message) for message in earlier]))
    return row | ({"system": meant.system} if meant.system is not None else {})


def alpaca(draw: random.Random) -> tuple[Conversation, JsonObject]:
    meant = Conversation(draw, draw.randint(1, 3))
    if draw.random() < 0.3:
        return _belle(draw, meant)
    instruction, given = words(draw), words(draw) if draw.random() < 0.5 else ""
    meant.messages[-2]["content"] = f"{instruction}\n{given}" if given else instruction
    row = {
        "instruction": instruction,
        draw.choice(("input", "context")): given,
        draw.choice(("output", "response", "target")): meant.messages[-1]["content"],
    }
    return meant, _with_history(draw, meant, row)


def _bare(draw: random.Random, meant: Conversation) -> None:
    """Takes off what a transcript cannot say: spaces around a text, and control tokens in it."""
    for message in meant.messages:
        text = message["content"].strip()
        for name in ("<_user>", "<_end>", "<tool_call>", "</tool_call>"):
            text = text.replace(name, draw.choice(("<", "fox")))
        message["content"] = text.strip() or "fox"


def _belle(draw: random.Random, meant: Conversation) -> tuple[Conversation, JsonObject]:
    """Earlier turns written as lines of Human: and Assistant: in the question."""
    _bare(draw, meant)
    colon = draw.choice((":", ": ", "\uff1a"))
    lines = [
        f"{'Human' if message['role'] == 'user' else 'Assistant'}{colon}{message['content']}"
        for message in meant.messages[:-1]
    ]
    row: JsonObject = {"instruction": "\n".join([*lines, f"Assistant{colon.strip()}"]), "input": ""}
    row["output"] = meant.messages[-1]["content"]
    return meant, row | ({"system": meant.system} if meant.system is not None else {})


_STYLES = {
    "text": (
        ("<_user>{}", "<_bot>{}<_end>\n"),
        ("<_user>{}", "<_bot>{}<_end>"),
        ("<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n{}<|im_end|>\n"),
        ("\n\nHuman: {}", "\n\nAssistant: {}"),
        ("### Human: {}", "### Assistant: {}"),
        ("Human:{}\n", "Assistant:{}\n"),
    ),
    "chat": (("USER: {}\n\n\n", "ASSISTANT: {} <|endoftext|>\n\n\n"),),
    "plain_text": (("[Human]: {}<eoh> ", "[MOSS]: {}<eoa> "), ("<|Human|>: {}<eoh>\n", "<|MOSS|>: {}<eom>\n")),
}


def transcript(draw: random.Random) -> tuple[Conversation, JsonObject]:
    meant = Conversation(draw, draw.randint(1, 3))
    _bare(draw, meant)
    key = draw.choice(list(_STYLES))
    asked, said = draw.choice(_STYLES[key])
    row: JsonObject = {
        key: "".join((asked if one["role"] == "user" else said).format(one["content"]) for one in meant.messages)
    }
    if meant.system is not None:
        meant.system = meant.system.strip() or "fox"
        row[draw.choice(("system", "system_prompt", "prefix"))] = meant.system
    return meant, row


def query(draw: random.Random) -> tuple[Conversation, JsonObject]:
    if draw.random() < 0.3:
        return _called(draw)
    meant = Conversation(draw, draw.randint(1, 3))
    row = {
        draw.choice(("query", "question", "problem")): meant.messages[-2]["content"],
        draw.choice(("response", "answer", "solution")): meant.messages[-1]["content"],
    }
    return meant, _with_history(draw, meant, row)


def _called(draw: random.Random) -> tuple[Conversation, JsonObject]:
    """A question whose answer is calls, tools and calls as JSON text (xLAM)."""
    meant = Conversation(draw, 1)
    meant.tools = [{"name": "f", "description": words(draw), "parameters": {}}]
    calls = [_call(draw) for _ in range(draw.randint(1, 3))]
    row: JsonObject = {
        "query": meant.messages[0]["content"],
        "tools": json.dumps(meant.tools),
        "answers": json.dumps(calls, ensure_ascii=draw.random() < 0.5) if draw.random() < 0.7 else calls,
    }
    meant.messages[-1] = {"role": "assistant", "content": "", "tool_calls": calls}
    return meant, row | ({"system": meant.system} if meant.system is not None else {})


def completion(draw: random.Random) -> tuple[Conversation, JsonObject]:
    as_text = draw.random() < 0.5
    meant = Conversation(draw, 1 if as_text else draw.randint(1, 3))
    if as_text:
        row: JsonObject = {"prompt": meant.messages[0]["content"], "completion": meant.messages[1]["content"]}
        return meant, row | ({"system": meant.system} if meant.system is not None else {})
    row = {"prompt": [dict(m) for m in meant.shown[:-1]], "completion": [dict(meant.messages[-1])]}
    for message in meant.messages[:-1]:
        if message["role"] == "assistant":
            message["weight"] = 0  # of a prompt only the answer is learnt
    return meant, row


SPELLINGS = {f.__name__: f for f in (dialog, messages, sharegpt, alpaca, query, completion, transcript)}
