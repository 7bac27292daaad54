"""Supervised fine-tuning samples: dialogues to token sequences with a loss mask, in three modes.

``plain`` (this project's own): every row is kept; loss on each answer and its <_end>; chat layout as at inference.
``deepspeed`` and ``mindformers``: the two published pipelines, reproduced to the token, including the rows they lose.
They differ in the mask, so a model fine-tuned by one is not comparable with the other: choose on purpose.

A ``loss_mask`` value belongs to the token at the same place, as a target: predicting it counts when the mask is 1.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from telechat_twins.core.data.chat_layout import BuiltInLayout, ChatLayout, TemplateLayout
from telechat_twins.core.data.chat_template import render
from telechat_twins.core.data.control import BOT, END, PAD, START, SYSTEM, TOOL_TOKENS, USER
from telechat_twins.core.data.dialogues import Dialogue
from telechat_twins.core.data.packing.samples import AnySample, Sample, encode_samples, with_reasoning
from telechat_twins.core.data.tokenizer import Tokenizer
from telechat_twins.core.errors import UserError

VARIANTS = ("plain", "deepspeed", "mindformers")

# The released pipeline maps its rows in batches of this many and starts a new pack with each.
DEEPSPEED_BATCH = 1000
MINDFORMERS_SEED = 2024


@dataclass(frozen=True)
class TrainingSequence:
    """One training sequence: ids int32 [n], loss_mask uint8 [n], and where its documents start (offsets, first 0)."""

    ids: np.ndarray
    loss_mask: np.ndarray
    starts: tuple[int, ...] = (0,)


@dataclass
class Counts:
    """What happened to the rows; ``lost`` rows are in no sequence, ``systems_left_out`` without their system text, and
    of ``apart`` each answer stands alone behind its prompt."""

    rows: int = 0
    lost: int = 0
    cut: int = 0
    apart: int = 0
    truncated_tokens: int = 0
    systems_left_out: int = 0


# ---------------------------------------------------------------------------------------------------------- plain


def dialogue_samples(tokenizer: Tokenizer, dialogue: Dialogue, layout: ChatLayout | None = None) -> list[Sample]:
    """One dialogue in the ``layout`` of the model's chats (None: TeleChat2's) -> (ids, mask): one sequence, or one for
    each answer where its chats show earlier answers otherwise. UserError names the row.

    The mask is 1 on answers (tool calls included) and their end, 0 on those of weight 0. Contents are ordinary text,
    except that the four tool tags count as control tokens where the row says so (``tags``).
    """
    messages = dialogue.messages
    if dialogue.system is not None:
        # Released rows end the system text with the newline that the layout adds itself.
        system = dialogue.system.removesuffix("\n") if dialogue.released else dialogue.system
        messages = [{"role": "system", "content": system}, *messages]
    try:
        allowed = TOOL_TOKENS if dialogue.tags else False
        if isinstance(layout, TemplateLayout):
            messages = with_reasoning(messages, layout.reads, tokenizer, layout.name)
        return encode_samples(layout or BuiltInLayout(tokenizer), messages, dialogue.tools, allowed)
    except UserError as error:
        raise UserError(f"{dialogue.where}: {error}") from None


def pack_samples(samples: Iterable[AnySample], max_length: int, counts: Counts) -> Iterator[TrainingSequence]:
    """Samples in order, packed while they fit into ``max_length``; one that does not fit starts the next pack.

    A sample longer than a pack is cut into windows that overlap by one token, so each of its targets is still predicted
    exactly once (the later windows without the earlier context); ``counts.cut`` counts such samples. Streams.
    """
    pack: list[TrainingSequence] = []
    filled = 0
    for given, targets in samples:
        sample = _sequence(given, targets)
        ids, mask = sample.ids, sample.loss_mask
        if pack and filled + len(ids) > max_length:
            yield _joined(pack)
            pack, filled = [], 0
        if len(ids) <= max_length:
            pack.append(sample)
            filled += len(ids)
            continue
        counts.cut += 1
        for begin in range(0, len(ids) - 1, max_length - 1):
            piece = mask[begin : begin + max_length].copy()
            piece[0] = 0  # the overlapped token was a target of the window before
            yield _sequence(ids[begin : begin + max_length], piece)
    if pack:
        yield _joined(pack)


def counted_samples(
    dialogues: Iterable[Dialogue], tokenizer: Tokenizer, counts: Counts, layout: ChatLayout | None
) -> Iterator[Sample]:
    """What is trained of rows, which ``counts`` counts."""
    for dialogue in dialogues:
        samples = dialogue_samples(tokenizer, dialogue, layout)
        counts.rows += 1
        counts.apart += len(samples) > 1
        yield from samples


def _joined(pack: Sequence[TrainingSequence]) -> TrainingSequence:
    lengths = [len(one.ids) for one in pack]
    return _sequence(
        np.concatenate([one.ids for one in pack]),
        np.concatenate([one.loss_mask for one in pack]),
        tuple(accumulate(lengths[:-1], initial=0)),
    )


# ------------------------------------------------------------------------------------------------------ deepspeed


def deepspeed_sequences(
    dialogues: Sequence[Dialogue],
    tokenizer: Tokenizer,
    max_length: int,
    template: bool = True,
    counts: Counts | None = None,
) -> Iterator[list[int]]:
    """The released DeepSpeed pipeline's token sequences, in its order, before the collator.

    Single-turn rows without tools are grouped by system text (sorted) and packed; the row that closes a pack is lost,
    as released. All others follow, one sequence each: in the chat layout (``template``) or built by hand (not).
    ``dialogues`` is read twice and by number, so a file-backed sequence keeps memory flat (one integer a row).
    """
    counts = counts if counts is not None else Counts()
    groups: dict[str, array[int]] = {}
    others: array[int] = array("q")
    for n in range(len(dialogues)):
        dialogue = dialogues[n]
        counts.rows += 1
        _refuse_context(dialogue, "deepspeed")
        _refuse_unasked(dialogue)
        if dialogue.tool or dialogue.multiturn:
            others.append(n)
        else:
            groups.setdefault(dialogue.released_system, array("q")).append(n)
    for system in sorted(groups):
        members = groups[system]
        for begin in range(0, len(members), DEEPSPEED_BATCH):
            rows = (dialogues[n] for n in members[begin : begin + DEEPSPEED_BATCH])
            yield from _deepspeed_packs(rows, system, tokenizer, max_length, counts)
    for n in others:
        yield _deepspeed_row(dialogues[n], tokenizer, template)


def _deepspeed_packs(
    rows: Iterable[Dialogue], system: str, tokenizer: Tokenizer, max_length: int, counts: Counts
) -> Iterator[list[int]]:
    newline = _released(tokenizer, "\n")
    head = [tokenizer.control_id(SYSTEM), *_released(tokenizer, system), *newline]
    pack = list(head)
    for dialogue in rows:
        row: list[int] = []
        for message in dialogue.messages:
            row += _deepspeed_message(message, dialogue, tokenizer, newline)
        if len(pack) + len(row) > max_length:
            yield pack[: -len(newline)]
            pack = list(head)
            counts.lost += 1  # released behaviour: the row that did not fit is not carried over
        else:
            pack += row
    yield pack


def _deepspeed_row(dialogue: Dialogue, tokenizer: Tokenizer, template: bool) -> list[int]:
    if dialogue.tools:
        raise UserError(f"{dialogue.where}: 'tools' has no place in the released deepspeed pipeline; use --sft plain")
    system = dialogue.released_system
    if template:
        try:
            text = render([{"role": "system", "content": system}, *dialogue.messages], add_generation_prompt=False)
        except UserError as error:
            raise UserError(f"{dialogue.where}: {error}") from None
        return _released(tokenizer, text)
    newline = _released(tokenizer, "\n")
    ids = [tokenizer.control_id(SYSTEM), *_released(tokenizer, system), *newline]
    for n, message in enumerate(dialogue.messages, 1):
        ids += _deepspeed_message(message, dialogue, tokenizer, newline if n < len(dialogue.messages) else [])
    return ids


def _deepspeed_message(message: dict, dialogue: Dialogue, tokenizer: Tokenizer, tail: list[int]) -> list[int]:
    if message["role"] not in ("user", "bot", "assistant") or message.get("tool_calls"):
        found = "tool calls" if message.get("tool_calls") else f"a {message['role']} message"
        raise UserError(
            f"{dialogue.where}: {found}, which the released deepspeed pipeline leaves out here; use --sft plain"
        )
    if message["role"] == "user":
        return [tokenizer.control_id(USER), *_released(tokenizer, message["content"])]
    said = _released(tokenizer, message.get("content", ""))
    return [tokenizer.control_id(BOT), *said, tokenizer.control_id(END), *tail]


def deepspeed_mask(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer, where: str = "sequence") -> np.ndarray:
    """The released collator's loss mask, uint8 [len(ids)].

    Ones from the k-th <_bot> through the k-th <_end>, and on the k-th <_user> token itself. If exactly one <_end> is
    missing the last answer runs to the end. UserError where the release would stop with an index error.
    """
    tokens = np.asarray(ids)
    users = np.flatnonzero(tokens == tokenizer.control_id(USER))
    bots = np.flatnonzero(tokens == tokenizer.control_id(BOT))
    ends = np.flatnonzero(tokens == tokenizer.control_id(END))
    if len(ends) + 1 == len(bots):
        ends = np.append(ends, len(tokens))
    if len(users) < len(bots) or len(ends) < len(bots):
        raise UserError(
            f"{where}: {len(bots)} <_bot> but {len(users)} <_user> and {len(ends)} <_end>; the released mask needs one "
            "of each a turn (control tokens written inside contents count), use --sft plain"
        )
    mask = np.zeros(len(tokens), np.uint8)
    for user, bot, end in zip(users, bots, ends, strict=False):
        mask[bot : end + 1] = 1
        mask[user] = 1
    return mask


# ---------------------------------------------------------------------------------------------------- mindformers


def mindformers_pair(dialogue: Dialogue) -> tuple[str, str]:
    """A dialogue as the {input, output} texts of the MindFormers format; the system text is not part of it.

    UserError for tools and their calls, which are not part of it either, and for turns that do not alternate.
    """
    if dialogue.tools or any(message.get("tool_calls") for message in dialogue.messages):
        what = "'tools'" if dialogue.tools else "tool calls"
        raise UserError(f"{dialogue.where}: {what} have no place in the MindFormers format; use --sft plain")
    _refuse_context(dialogue, "MindFormers")
    if dialogue.pair is not None:
        return dialogue.pair
    messages = dialogue.messages
    roles = ["bot" if m["role"] == "assistant" else m["role"] for m in messages]
    if roles != ["user", "bot"] * (len(roles) // 2):
        raise UserError(
            f"{dialogue.where}: turns are {', '.join(roles)}; the MindFormers format needs user and bot in turn, "
            "ending with bot (use --sft plain)"
        )
    texts = [m.get("content", "") for m in messages]
    if len(texts) == 2:
        return texts[0], texts[1]
    history = "".join(f"{USER if n % 2 == 0 else BOT}{text}" for n, text in enumerate(texts[:-1]))
    return history, texts[-1]


def mindformers_packs(
    dialogues: Sequence[Dialogue],
    tokenizer: Tokenizer,
    max_length: int,
    seed: int | None = MINDFORMERS_SEED,
    start_token: str = START,
    counts: Counts | None = None,
) -> Iterator[TrainingSequence]:
    """The MindFormers preprocessing script's packs: [max_length + 1] tokens, padded on the left.

    ``seed`` shuffles the rows with Python's generator as released, None keeps their order; ``start_token`` "" leaves
    <_start> out. The last, unfilled pack and rows as long as a pack are lost, as released. Reads ``dialogues`` by
    number, once, so a file-backed sequence keeps memory flat (one integer a row).
    """
    counts = counts if counts is not None else Counts()
    size = max_length + 1
    order = array("q", range(len(dialogues)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    counts.rows += len(order)
    lines: list[str] = []
    filled = 0
    for n in order:
        dialogue = dialogues[n]
        counts.systems_left_out += bool(dialogue.system)
        line = start_token + _mindformers_line(*mindformers_pair(dialogue))
        length = len(_mindformers_tokens(line, tokenizer, start_token)[0])
        if filled + length < size:
            lines.append(line)
            filled += length
            continue
        text = "".join(lines)
        if USER in text:
            ids, mask = _mindformers_tokens(text, tokenizer, start_token)
            pads = size - filled
            yield _sequence([tokenizer.control_id(PAD)] * pads + ids, [0] * pads + mask)
        if length < size:
            lines, filled = [line], length
        else:
            lines, filled = [], 0
            counts.lost += 1
    counts.lost += len(lines)


def _mindformers_line(question: str, answer: str) -> str:
    """One row as marked-up text: <_user>q<_bot>a<_end> for every turn."""
    if not question.startswith(USER):
        question = USER + question
    if BOT not in question:
        return f"{question}{BOT}{answer}{END}"
    turns = question.split(USER)[1:]
    history = "".join(f"{USER}{turn}{END if BOT in turn else BOT}" for turn in turns)
    return f"{history}{answer}{END}"


def _mindformers_tokens(text: str, tokenizer: Tokenizer, start_token: str) -> tuple[list[int], list[int]]:
    """Marked-up text -> (ids, mask). Works on strings like the release, so stray markers act as they do there."""
    started = bool(start_token) and start_token in text
    ids: list[int] = []
    mask: list[int] = []
    starts = 0
    for conversation in text.split(start_token)[1:] if started else [text]:
        questions = [turn.split(BOT)[0] for turn in conversation.split(USER)[1:]]
        answers = [turn.split(BOT)[-1] for turn in conversation.split(END)[:-1]]
        for question, answer in zip(questions, answers, strict=False):
            asked, said = _released(tokenizer, question), _released(tokenizer, answer)
            ids += [tokenizer.control_id(USER), *asked, tokenizer.control_id(BOT), *said, tokenizer.control_id(END)]
            mask += [0] * (len(asked) + 2) + [1] * (len(said) + 1)
        starts += started
    # Every <_start> of a pack ends up in front of the pack: the release puts each before all that came so far.
    return [tokenizer.control_id(START)] * starts + ids, [0] * starts + mask


def _refuse_unasked(dialogue: Dialogue) -> None:
    """UserError for an answer without a question of its own: the released mask counts one of each a turn."""
    asked = sum(message["role"] == "user" for message in dialogue.messages)
    answers = sum(message["role"] in ("bot", "assistant") for message in dialogue.messages)
    if answers > asked:
        raise UserError(
            f"{dialogue.where}: {answers} answers but {asked} questions; the released mask needs a question to each "
            "answer, use --sft plain"
        )


def _refuse_context(dialogue: Dialogue, pipeline: str) -> None:
    """UserError for an answer that is not to be learnt, which the published pipelines cannot say."""
    if any(message.get("weight") == 0 for message in dialogue.messages):
        raise UserError(
            f"{dialogue.where}: an answer of weight 0 (context), which the published {pipeline} pipeline would learn; "
            "use --sft plain"
        )


def _released(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, allow_control=True)


def _sequence(
    ids: Sequence[int] | np.ndarray, mask: Sequence[int] | np.ndarray, starts: tuple[int, ...] = (0,)
) -> TrainingSequence:
    return TrainingSequence(np.asarray(ids, np.int32), np.asarray(mask, np.uint8), starts)
