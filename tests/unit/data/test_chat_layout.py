"""A folder's own chat template: the same as the built-in layout, rendered, or refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.core import cli
from telechat_twins.core.data import chat_layout
from telechat_twins.core.data.chat_layout import (
    CHAT_TEMPLATE,
    BuiltInLayout,
    TemplateLayout,
    open_layout,
    open_training_layout,
    require_layout,
)
from telechat_twins.core.data.chat_template import encode_chat
from telechat_twins.core.data.dialogues import parse_dialogue
from telechat_twins.core.data.tokenizer import load_tokenizer
from telechat_twins.core.errors import UserError
from tests.support.data_support import encode_dialogue, tiny_tokenizer, tiny_tokenizer_path
from tests.support.shared import shared_file

pytest.importorskip("jinja2")

OWN = "{% for m in messages %}<_user>Q: {{ m['content'] }}<_bot>{% endfor %}"
ASK = [{"role": "user", "content": "fox"}]
CALL = {"name": "look_up", "arguments": {}}
CALLED = [*ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}]


def folder_with(folder: Path, template: object, name: str = "tokenizer_config.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_path().read_bytes())
    text = template if name.endswith(".jinja") else json.dumps({"chat_template": template})
    (folder / name).write_text(str(text), encoding="utf-8")
    return folder


def layout_of(folder: Path, choice: str = "auto"):
    return open_layout(load_tokenizer(folder), choice)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json", "chat_template.jinja"])
def test_a_template_of_its_own_is_rendered_and_said(tmp_path, name):
    layout, notes = layout_of(folder_with(tmp_path, OWN, name))
    tokenizer = tiny_tokenizer()
    want = tokenizer.encode("<_user>Q: fox<_bot>", allow_control=True)
    assert layout is not None and layout.encode(ASK) == want and name in notes[0]
    assert layout_of(tmp_path, "builtin")[0].encode(ASK) == encode_chat(tokenizer, ASK)
    with pytest.raises(UserError, match="chats with this model follow .*chat_template.* use --sft plain"):
        open_training_layout(load_tokenizer(tmp_path), own=False)
    assert isinstance(open_training_layout(load_tokenizer(tmp_path))[0], TemplateLayout)
    built_in, notes = open_training_layout(load_tokenizer(tmp_path), "builtin", own=False)
    assert isinstance(built_in, BuiltInLayout) and notes == []


def test_of_several_templates_tools_choose(tmp_path):
    with_tools = "\n{{ tools | length }}\n  {% if tools %}<_user>{% endif %}\n"
    named = [{"name": "tool_use", "template": with_tools}, {"name": "default", "template": OWN}]
    folders = [folder_with(tmp_path / "list", named), folder_with(tmp_path / "files", OWN, "chat_template.jinja")]
    (folders[1] / "additional_chat_templates").mkdir()
    (folders[1] / "additional_chat_templates" / "tool_use.jinja").write_text(with_tools)
    alone = TemplateLayout(tiny_tokenizer(), with_tools, "alone")
    for folder in folders:
        layout = layout_of(folder)[0]
        assert isinstance(layout, TemplateLayout)
        assert layout.render(ASK) == "<_user>Q: fox<_bot>"
        assert layout.render(ASK, [{}, {}]) == alone.render(ASK, [{}, {}]) == "\n2\n<_user>"
    (folders[1] / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="tool_use.jinja: is there without a chat_template.jinja"):
        layout_of(folders[1])
    with pytest.raises(UserError, match="or a list with one named 'default'"):
        layout_of(folder_with(tmp_path, [*named[:1], {"name": ["default"], "template": OWN}]))


def test_a_template_may_be_a_file_of_any_kind_that_holds_one(tmp_path):
    folder = folder_with(tmp_path, OWN, "tokenizer_config.json")
    (tmp_path / "own.jinja").write_text(OWN)
    for name in ("own.jinja", "tokenizer_config.json"):
        layout = layout_of(folder, str(tmp_path / name))[0]
        assert isinstance(layout, TemplateLayout) and layout.render(ASK) == "<_user>Q: fox<_bot>"
    (tmp_path / "bare.json").write_text("{}")
    for choice, says in (
        ("bultin", "--chat-template bultin: no such file; give a file or one of auto, .*; did you mean 'builtin'"),
        (str(tmp_path / "own.jinj"), "no such file; .*; did you mean '.*/own.jinja'"),
        (str(tmp_path), "must be a file, found a folder; give .*/tokenizer_config.json"),
        (str(tmp_path / "bare.json"), "bare.json: has no chat_template"),
    ):
        with pytest.raises(UserError, match=says):
            layout_of(folder, choice)


def test_dialogues_are_packed_in_the_template_of_a_file(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [*ASK, {"role": "assistant", "content": "dog"}]}))
    text = "{% for m in messages %}{% if m.role == 'user' %}<_user>Q: {{ m.content }}<_bot>{% else %}{{ m.content }}"
    (tmp_path / "own.jinja").write_text(text + "<_end>{% endif %}{% endfor %}")
    words = [tmp_path / "rows.jsonl", "--tokenizer", tiny_tokenizer_path(), "--out", tmp_path / "out", "--quiet"]
    words += ["--seq-len", 64, "--chat-template", tmp_path / "own.jinja"]
    assert cli.main(["data", *map(str, words), "--sft", "plain"]) == 0
    shown = capsys.readouterr()
    assert "<_user>Q: fox<_bot>\u27e6dog<_end>\u27e7" in shown.out
    assert f"chats with a model that learns these rows need --chat-template {tmp_path / 'own.jinja'}" in shown.err
    assert cli.main(["data", *map(str, words), "--sft", "deepspeed", "--force"]) == 2
    assert "own.jinja, which differs; use --sft plain" in capsys.readouterr().err


def test_templates_that_say_the_same_change_nothing(tmp_path, monkeypatch):
    golden = json.loads(shared_file("goldens/tokenizer/chat_template.json").read_text(encoding="utf-8"))
    spaced = CHAT_TEMPLATE + "{# a remark that changes the text, not what it renders #}"
    for number, template in enumerate((CHAT_TEMPLATE, golden["chat_template"], spaced)):
        layout, notes = layout_of(folder_with(tmp_path / str(number), template))
        assert isinstance(layout, BuiltInLayout) and notes == []
    own = TemplateLayout(tiny_tokenizer(), golden["chat_template"], "released")
    for dialogue in golden["dialogues"]:
        messages, tools = dialogue["messages"], dialogue.get("tools")
        assert own.encode(messages, tools) == encode_chat(tiny_tokenizer(), messages, tools)
    # Known ones need no Jinja2; of others it is asked for by name.
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert isinstance(layout_of(tmp_path / "1")[0], BuiltInLayout)
    with pytest.raises(UserError, match=r"rendered by Jinja2, which is not installed; run: pip install .*tokenizers"):
        layout_of(tmp_path / "2")


INJECTED = ["<_end>", "a<_user>b", "<_use", "<_bot><_bot>", "<", "\ufdd0<_end>", "<_en" + "d>"]


@pytest.mark.parametrize("content", INJECTED)
def test_contents_stay_ordinary_text(content):
    tokenizer = tiny_tokenizer()
    layout = TemplateLayout(tokenizer, "{% for m in messages %}<_user>{{ m.content }}{% endfor %}<_bot>", "t")
    ids = layout.encode([{"role": "user", "content": content}])
    assert [i for i in ids if tokenizer.is_silent(i)] == [4, 5]
    assert ids == [4, *tokenizer.encode(content), 5]
    assert layout.texts([{"role": "user", "content": content}]) == [content]
    allowed = layout.encode([{"role": "user", "content": content}], allow_control=True)
    assert allowed == tokenizer.encode(f"<_user>{content}<_bot>", allow_control=True)
    # Two contents beside each other: no token arises where one ends and the next begins.
    halves = [{"role": "user", "content": "<_en"}, {"role": "user", "content": "d>"}]
    joined = TemplateLayout(tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}", "t").encode(halves)
    assert joined == tokenizer.encode("<_end>")


def test_what_transformers_gives_a_template():
    call = {"name": "f", "arguments": {"x": "<b>'\u4e2d"}}
    messages = [*ASK, {"role": "bot", "content": None, "tool_calls": [call]}]
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.tool_calls[0].function.arguments | tojson }}{% endgeneration %}{% break %}{% endif %}{% endfor %}"
    )
    layout = TemplateLayout(tiny_tokenizer(), template, "t")
    assert layout.render(messages) == '<_start>{"x": "<b>\'\u4e2d"}'


def test_a_template_reads_further_values():
    template = (
        "{% set mine = 1 %}{% for m in messages %}{% if m.reasoning_content and keep %}({{ m['reasoning_content'] }})"
        "{% endif %}<_user>{{ m.content }}{% endfor %}{{ prefix }}{{ strftime_now }}{{ eos_token }}{{ tools }}"
    )
    tokenizer = tiny_tokenizer()
    layout = TemplateLayout(tokenizer, template, "t")
    assert layout.variables == {"keep", "prefix"} and {"reasoning_content", "content"} <= layout.reads
    messages = [{"role": "user", "content": "fox", "reasoning_content": "r"}]
    plain = TemplateLayout(tokenizer, template.replace("{{ strftime_now }}{{ eos_token }}{{ tools }}", ""), "t")
    assert plain.encode(messages) == plain.encode(messages, variables={"keep": False}) == [4, *tokenizer.encode("fox")]
    # A value is text, whatever it names, and none replaces what every template is given.
    kept = plain.encode(messages, variables={"keep": True, "prefix": "<_end>", "messages": []})
    assert kept == [*tokenizer.encode("(r)"), 4, *tokenizer.encode("fox<_end>")]
    assert BuiltInLayout(tokenizer).variables == frozenset()


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% if %}", "t: not a template that Jinja2 can read"),
        ("{{ raise_exception('only two roles') }}", "t: cannot render these messages .only two roles"),
        ("{{ messages[0].content + 1 }}", "t: cannot render these messages"),
        ("{{ ''.__class__.__mro__ }}", "t: cannot render these messages .*unsafe"),
        ("{% set _ = messages.append(1) %}", "t: cannot render these messages .*unsafe|not safely"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(template, says):
    with pytest.raises(UserError, match=says):
        TemplateLayout(tiny_tokenizer(), template, "t").encode(ASK)


def test_a_base_model_is_refused_with_the_way_out(tmp_path, capsys):
    tokenizer = load_tokenizer(tiny_tokenizer_path(), "none")
    assert open_layout(tokenizer) == (None, [])
    with pytest.raises(UserError, match="base model, which continues text; use `tele generate`"):
        require_layout(tokenizer, None)
    template = tmp_path / "mine.jinja"
    template.write_text("User: {{ messages[-1].content }}\nAnswer:")
    layout, _ = open_layout(tokenizer, str(template))
    assert layout is not None and layout.encode(ASK) == tokenizer.encode("User: fox\nAnswer:")
    folder = folder_with(tmp_path / "own", OWN)
    assert cli.main(["tokenize", "encode", "--chat", "--ids", "--tokenizer", str(folder), json.dumps(ASK)]) == 0
    said = capsys.readouterr()
    assert said.out.split() == list(map(str, tiny_tokenizer().encode("<_user>Q: fox<_bot>", allow_control=True)))
    assert "differs from TeleChat2's built-in layout" in said.err and chat_layout.BUILT_IN in said.err


TALK = [
    {"role": "system", "content": "brief <_end>"},
    {"role": "user", "content": "the quick fox"},
    {"role": "assistant", "content": "jumps"},
    {"role": "user", "content": "over <_bot>"},
    {"role": "bot", "content": "the dog", "weight": 0},
    {"role": "user", "content": "lazy"},
    {"role": "assistant", "content": " a dog. "},
]
TURNS = (
    "{% for m in messages %}<_user>{{ m.role }}: {{ m.content if m.role != 'assistant' }}"
    "{% if m.role == 'assistant' %}<_bot>SAID\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<_user>assistant: <_bot>{% endif %}"
)
SAID = "{{ m.content }}<_end>"
STABLE, MARKED = (TURNS.replace("SAID", said) for said in (SAID, "{% generation %}" + SAID + "{% endgeneration %}"))


@pytest.mark.parametrize("template", [STABLE, MARKED], ids=["by prompts", "by marks"])
def test_what_is_trained_in_a_template_is_what_a_chat_shows(template):
    tokenizer = tiny_tokenizer()
    layout = TemplateLayout(tokenizer, template, "t")
    ids, mask = layout.encode_answers(TALK)
    assert ids == layout.encode(TALK, add_generation_prompt=False)
    said = [tokenizer.encode(TALK[n]["content"]) + [tokenizer.eos_token_id] for n in (2, 6)]
    assert [i for i, learnt in zip(ids, mask, strict=True) if learnt] == said[0] + said[1]
    for n, answer in zip((2, 6), said, strict=True):
        prompt = layout.encode(TALK[:n])
        assert ids[: len(prompt)] == prompt and ids[len(prompt) :][: len(answer)] == answer
        assert mask[len(prompt) - 1] == 0 and all(mask[len(prompt) :][: len(answer)])


LINES = (
    "{% for m in messages %}{% if m.role == 'assistant' %}SAID\n{% else %}{{ m.role }}: {{ m.content }}\nA:{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("end", ["<_end>", " (end)"])
def test_an_answer_behind_plain_text_is_what_a_chat_goes_on_from(end):
    """SentencePiece puts a space in front of a text: encoded by itself, an answer behind "A:" would begin with two."""
    tokenizer = tiny_tokenizer()
    layout = TemplateLayout(tokenizer, LINES.replace("SAID", " {{ m.content }}" + end), "t")
    ids, mask = layout.encode_answers(TALK)
    assert ids == layout.encode(TALK, add_generation_prompt=False)
    for n in (2, 6):
        prompt, said = layout.encode(TALK[:n]), layout.encode(TALK[: n + 1], add_generation_prompt=False)
        assert ids[: len(prompt)] == prompt and mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]
        text, answer = tokenizer.decode(said), TALK[n]["content"]
        assert f"A: {answer}" in text and f"A:  {answer}" not in text
    taken = [token for token, learnt in zip(ids, mask, strict=True) if learnt]
    assert tokenizer.decode(taken).count("A:") == 0 and len(taken) == sum(mask) < len(ids)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        # Earlier answers are shortened; a prompt that no conversation has; marks around the question.
        (STABLE.replace(SAID, "{{ m.content if loop.last else '...' }}<_end>"), "otherwise once more follows"),
        (MARKED.replace("assistant: <_bot>", "assistant:<_bot>"), "is not the prompt that a chat would have"),
        (MARKED.replace("{% for", "{% generation %}{{ x }}{% endgeneration %}{% for"), "one answer each"),
    ],
)
def test_a_template_that_cannot_be_trained_is_refused(template, says):
    with pytest.raises(UserError, match=says):
        TemplateLayout(tiny_tokenizer(), template, "t").encode_answers(TALK)


def test_dialogues_are_packed_in_the_template_of_the_folder(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"messages": TALK[1:4]}) + "\n", encoding="utf-8")
    model, out = folder_with(tmp_path / "model", STABLE), tmp_path / "out"
    options = ["--tokenizer", str(model), "--out", str(out), "--sft", "plain", "--seq-len", "128"]
    assert cli.main(["data", str(source), *options]) == 0
    want = open_training_layout(load_tokenizer(model))[0].encode_answers(TALK[1:4])
    found = (np.fromfile(out / name, dtype).tolist() for name, dtype in (("tokens.bin", "<u2"), ("mask.bin", "u1")))
    assert tuple(found) == want
    # A fault: the built-in layout for a model whose chats follow another one.
    assert encode_dialogue(load_tokenizer(model), parse_dialogue({"messages": TALK[1:4]}, "row")) != want


@pytest.mark.parametrize(
    ("template", "talk", "tools", "says"),
    [
        ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", ASK, None, "message 0"),
        ("{{ '' }}", ASK, None, "what message 0, of role user, says"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            CALLED,
            None,
            "call",
        ),
        (OWN, ASK, [{"type": "function", "function": {"name": "look_up"}}], "the tool 'look_up'"),
    ],
)
def test_a_template_that_leaves_out_what_it_is_given_is_refused(template, talk, tools, says):
    """Jinja2 renders what it does not find as nothing: templates of models that see read lists of parts."""
    layout = TemplateLayout(tiny_tokenizer(), template, "t")
    for encode in (layout.encode, layout.encode_answers, layout.texts):
        with pytest.raises(UserError, match=f"t: leaves out .*{says}.*--chat-template builtin"):
            encode(talk, tools)


def test_contents_may_be_stripped_or_written_as_json():
    shown = "{{ m.content.strip() if m.role == 'user' else m.content | tojson }}"
    template = "{% for m in messages %}<_user>" + shown + "{% endfor %}"
    talk = [{"role": "user", "content": " q\n"}, {"role": "tool", "content": 'say "\u4e2d" <_end>\n'}]
    assert TemplateLayout(tiny_tokenizer(), template, "t").encode(talk)


def test_a_template_is_given_the_tokens_that_files_name(tmp_path):
    folder = folder_with(tmp_path, "{{ unk_token }}{{ sep_token }}" + OWN)
    described = json.loads((folder / "tokenizer_config.json").read_text()) | {"unk_token": "<u>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "special_tokens_map.json").write_text(json.dumps({"sep_token": {"content": "<_sep>"}}))
    layout, _ = open_layout(load_tokenizer(folder))
    assert isinstance(layout, TemplateLayout) and layout.render(ASK).startswith("<u><_sep>")


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("file", "says", "message"),
    [
        ("added_tokens.json", {"<|im_start|>": 600}, "token with id 600 and which that file has not"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"598": {"content": "<|im_end|>", "special": True}}}, "598"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"600": {"content": "<|im_end|>"}}}, "a token with id 600"),
        ("tokenizer_config.json", {"additional_special_tokens": ["<|im_end|>"]}, "describe as a token and"),
        ("tokenizer_config.json", {"extra_special_tokens": {"turn": "<|im_end|>"}}, "which that file has not"),
        ("special_tokens_map.json", {"eos_token": "<|im_end|>"}, "which that file has not"),
        ("special_tokens_map.json", {"additional_special_tokens": [{"content": "<|im_end|>"}]}, "has not; give the"),
    ],
)
def test_tokens_that_a_template_writes_and_the_tokenizer_lacks(file, says, message, tmp_path):
    """A fine-tune's tokens beside the release's tokenizer.model: their names would be encoded as letters."""
    folder = folder_with(tmp_path, CHATML)
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | says))
    with pytest.raises(UserError) as error:
        layout_of(folder)
    assert "chat_template: writes '<|im_" in str(error.value) and message in str(error.value)
    assert layout_of(folder, "builtin")[0].encode(ASK) == encode_chat(tiny_tokenizer(), ASK)


def test_tokens_that_a_template_writes_have_the_tokenizers_ids(tmp_path):
    decoder = {"4": {"content": "<_user>", "special": True}, "9": {"content": "<tool_call>", "special": True}}
    folder = folder_with(tmp_path, OWN + "<tool_call>{{ eos_token }}")
    path = folder / "tokenizer_config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "added_tokens_decoder": decoder, "eos_token": "<_end>"}))
    assert layout_of(folder)[0].encode(ASK)[-2:] == [9, 2]
    path.write_text(json.dumps({**about, "added_tokens_decoder": {"5": decoder["4"]}}))
    with pytest.raises(UserError, match="'<_user>', .* token with id 5 and which that file has with id 4"):
        layout_of(folder)
    path.write_text(json.dumps({**about, "eos_token": "<_bot>"}))
    with pytest.raises(UserError, match="writes eos_token, which is '<_bot>' by the files beside .* and '<_end>' here"):
        layout_of(folder)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (STABLE, None),
        (MARKED, None),
        (STABLE.replace("<_end>", ""), "writes no control token behind an answer, so a model does not learn to end"),
        (LINES.replace("SAID", " {{ m.content }} (end)"), "writes no control token behind an answer"),
        (STABLE.replace("{% if add_generation_prompt %}", "{% if true %}"), "opens a further answer behind the last"),
        ("{{ raise_exception('three turns at least') }}", None),
    ],
)
def test_hardly_meant_ends_of_answers_are_noted_before_training(tmp_path, template, says):
    _, notes = open_training_layout(load_tokenizer(folder_with(tmp_path, template)))
    assert "differs from TeleChat2's built-in layout" in notes[0]
    assert notes[1:] == [] if says is None else says in notes[1] and len(notes) == 2
