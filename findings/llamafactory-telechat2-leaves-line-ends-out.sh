#!/bin/bash
# LLaMA-Factory's template "telechat2" is not TeleChat2's: the line ends after the system text and after each answer are
# missing, and tools are described in another form and language.
#
# Version:      llamafactory 0.9.5, transformers 5.6.0, torch 2.14.1, CPython 3.11. TeleChat2's chat template as
#               released in its tokenizer_config.json.
# Likely guess: the template of a model's name builds the prompt that the model's own chat template builds, which
#               transformers and vLLM use when the tuned model is served.
# Behaviour:    the release writes <_system>TEXT, line end, <_user>Q<_bot>A<_end>, line end; LLaMA-Factory the same
#               without any line end. Both have the default system text. Tools, which the release lists under a Chinese
#               heading in <tools>, become an English text that asks for "Action:" lines; calls come back as such, not
#               in <tool_call>. The tokenizer that is saved beside the tuned weights keeps the release's template.
# Matters:      the model is tuned on prompts that it never met before, and is then asked with others. The loss does not
#               show it, and parsers of tool calls find none. Write a template of one's own for LLaMA-Factory, or give
#               the tuned folder the one that it trained with.
# Seen:         release '<_system>S\n<_user>Q1<_bot>A1<_end>\n<_user>Q2<_bot>'; LLaMA-Factory
#               '<_system>S<_user>Q1<_bot>A1<_end><_user>Q2<_bot>'; with a tool: <tools> False, "Action:" True; saved
#               template that of the release: True
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "llamafactory==0.9.5" "transformers==5.6.0" \
    "torch==2.14.1" "numpy==2.3.5"
cd "$scratch"
"$scratch/venv/bin/python" - 2> /dev/null <<'PYTHON'
import json

from llamafactory.data.template import TEMPLATES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

bytes_alone = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
vocabulary = Tokenizer(models.BPE(bytes_alone, []))
vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
vocabulary.decoder = decoders.ByteLevel()
names = ["<_user>", "<_bot>", "<_system>"]
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=vocabulary, eos_token="<_end>", pad_token="<_pad>", extra_special_tokens=names
)
release = (
    "{{ '<_system>' + messages[0]['content'] + '\\n' }}{% for message in messages[1:] %}"
    "{% if message['role'] == 'user' %}{{ '<_user>' + message['content'] }}"
    "{% else %}{{ '<_bot>' + message['content'] + '<_end>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<_bot>' }}{% endif %}"
)
turns = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2")]
messages = [{"role": role, "content": content} for role, content in turns]
told = [{"role": "system", "content": "S"}, *messages]
right = tokenizer.apply_chat_template(told, chat_template=release, tokenize=False, add_generation_prompt=True)
template = TEMPLATES["telechat2"]
answered = [*messages, {"role": "assistant", "content": "A2"}]
pairs = template.encode_multiturn(tokenizer, answered, system="S")
found = "".join(tokenizer.decode(ids) for ids in (*pairs[0], pairs[1][0]))
print("release:", repr(right), "LLaMA-Factory:", repr(found))
tool = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}
with_tool = tokenizer.decode(template.encode_multiturn(tokenizer, answered, system="S", tools=json.dumps([tool]))[0][0])
print("<tools>", "<tools>" in with_tool, "Action:", "Action:" in with_tool)
same = found == "<_system>S<_user>Q1<_bot>A1<_end><_user>Q2<_bot>" and right.replace("\n", "") == found != right
tokenizer.chat_template = release
template.fix_jinja_template(tokenizer)
kept = tokenizer.chat_template == release
print("saved template that of the release:", kept)
raise SystemExit(0 if same and kept and "<tools>" not in with_tool and "Action:" in with_tool else 1)
PYTHON
