#!/bin/bash
# llama.cpp's tojson, in the chat templates of GGUF files, writes numbers with six digits.
#
# Version:      llama.cpp as in xllamacpp 2026.10.11549 (CPU wheel), gguf 0.19.0, jinja2 3.1.6, CPython 3.11.
# Likely guess: "tool | tojson" and "arguments | tojson", which most templates for tools hold, give the JSON that transformers
#               gives (json.dumps), as the template that came with the model was trained with.
# Behaviour:    numbers with a fraction go through C++'s default format: 31.2304167 becomes 31.2304 and 1735689600.5 becomes
#               1.73569e+09, another time by half an hour. 1.0 becomes 1. Whole numbers and everything else are the same.
# Matters:      coordinates, prices and times in a tool's schema, or in the calls of earlier turns, reach the model changed;
#               it then repeats the changed ones. The server's answer does not show it: only /apply-template does.
# Seen:         transformers' way: {"lat": 31.2304167, "time": 1735689600.5, "price": 1234567.89, "factor": 1.0};
#               llama.cpp: {"lat": 31.2304, "time": 1.73569e+09, "price": 1.23457e+06, "factor": 1}
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "xllamacpp==2026.10.11549" "gguf==0.19.0" "numpy==1.26.4" \
    "jinja2==3.1.6"
cat > "$scratch/ask.py" <<'PYTHON'
import json
import sys
from urllib.request import Request, urlopen

import numpy as np
import xllamacpp
from gguf import GGUFWriter
from jinja2.sandbox import ImmutableSandboxedEnvironment

SIZE, WIDTH, FILE = 259, 64, f"{sys.argv[1]}/model.gguf"
TEMPLATE = (
    "{% for message in messages %}{% if message.tool_calls %}{{ message.tool_calls[0].function.arguments | tojson }}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)
ARGUMENTS = {"lat": 31.2304167, "time": 1735689600.5, "price": 1234567.89, "factor": 1.0}

made = GGUFWriter(FILE, "llama")
made.add_context_length(256)
made.add_embedding_length(WIDTH)
made.add_block_count(1)
made.add_feed_forward_length(WIDTH)
made.add_head_count(1)
made.add_head_count_kv(1)
made.add_layer_norm_rms_eps(1e-5)
made.add_tokenizer_model("llama")
made.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
made.add_token_scores([0.0] * SIZE)
made.add_token_types([2, 3, 3, *[6] * 256])
made.add_chat_template(TEMPLATE)
for name, *shape in (
    ("token_embd", SIZE, WIDTH), ("output", SIZE, WIDTH), ("output_norm", WIDTH), ("blk.0.attn_norm", WIDTH),
    ("blk.0.attn_q", WIDTH, WIDTH), ("blk.0.attn_k", WIDTH, WIDTH), ("blk.0.attn_v", WIDTH, WIDTH),
    ("blk.0.attn_output", WIDTH, WIDTH), ("blk.0.ffn_norm", WIDTH), ("blk.0.ffn_gate", WIDTH, WIDTH),
    ("blk.0.ffn_up", WIDTH, WIDTH), ("blk.0.ffn_down", WIDTH, WIDTH),
):  # fmt: skip
    made.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
made.write_header_to_file()
made.write_kv_data_to_file()
made.write_tensors_to_file()
made.close()

settings = xllamacpp.CommonParams()
settings.model.path = FILE
settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.warmup = 256, 1, 0, False
settings.use_jinja = True
server = xllamacpp.Server(settings)


def messages(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "set", "arguments": arguments}}
    return [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "", "tool_call_id": "1"}]


body = json.dumps({"messages": messages(json.dumps(ARGUMENTS))}).encode()
with urlopen(Request(f"{server.listening_address}/apply-template", body, {"Content-Type": "application/json"})) as answer:
    theirs = json.load(answer)["prompt"]
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
ours = environment.from_string(TEMPLATE).render(messages=messages(ARGUMENTS))
print("transformers' way:", ours)
print("llama.cpp:        ", theirs)
given = json.loads(theirs)
changed = [key for key, value in ARGUMENTS.items() if given[key] != value]
sys.exit(0 if changed == ["lat", "time", "price"] and abs(given["time"] - ARGUMENTS["time"]) > 60 else 1)
PYTHON
"$scratch/venv/bin/python" "$scratch/ask.py" "$scratch" 2> /dev/null
