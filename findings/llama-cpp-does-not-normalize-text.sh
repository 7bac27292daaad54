#!/bin/bash
# llama.cpp's SentencePiece tokenizer (tokenizer.ggml.model "llama") does not normalize: with a model of SentencePiece's usual
# settings every Chinese comma, parenthesis and full-width digit becomes bytes.
#
# Version:      llama.cpp as in xllamacpp 2026.10.11549 (CPU wheel), gguf 0.19.0, sentencepiece 0.2.3, CPython 3.11.
# Likely guess: a GGUF file with the pieces, scores and types of a tokenizer.model, and with the two keys that GGUF has for
#               its normalization (precompiled_charsmap, remove_extra_whitespaces), gives the ids of SentencePiece.
# Behaviour:    both keys are read for the tokenizer type "t5" only. SentencePiece's default, nmt_nfkc, makes ASCII of
#               full-width forms, one space of several, of tabs and of line ends before it looks for pieces; here the
#               text goes in as it is, and what was never a piece is spelled in bytes. With "identity" the ids are the same.
# Matters:      Chinese prompts become several times as long and consist of tokens that the model hardly saw; English ones
#               with single spaces are right, so a short check passes. Nothing is reported. TeleChat2's tokenizer has
#               "identity"; one trained with SentencePiece's defaults has not.
# Seen:         nmt_nfkc: 5 of 6 texts differ, the first has 6 tokens, here 23; identity: 0 of 6 texts differ
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "xllamacpp==2026.10.11549" "gguf==0.19.0" "numpy==1.26.4" \
    "sentencepiece==0.2.3" "protobuf==7.36.2"
cat > "$scratch/ask.py" <<'PYTHON'
import io
import json
import os
import sys
from urllib.request import Request, urlopen

import numpy as np
import sentencepiece
import xllamacpp
from gguf import GGUFWriter
from sentencepiece import sentencepiece_model_pb2

FILE, WIDTH = f"{sys.argv[1]}/model.gguf", 64
LINES = ["价格 数量 模型 训练 (元), 123 456 7890 the model is trained (x), y!"] * 200
TEXTS = ["价格（元），１２３！", "模型　训练", "a  b", "tab\there", "line\nend", "the model is trained"]


def trained(rule):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, model_type="bpe", vocab_size=340, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, normalization_rule_name=rule, remove_extra_whitespaces=rule != "identity",
    )  # fmt: skip
    return model.getvalue()


def write(model):
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    spec = sentencepiece_model_pb2.ModelProto.FromString(model).normalizer_spec
    size = pieces.vocab_size()
    kinds = {1: pieces.is_unknown, 2: pieces.is_control, 3: pieces.is_byte}
    made = GGUFWriter(FILE, "llama")
    made.add_context_length(256)
    made.add_embedding_length(WIDTH)
    made.add_block_count(1)
    made.add_feed_forward_length(WIDTH)
    made.add_head_count(1)
    made.add_head_count_kv(1)
    made.add_layer_norm_rms_eps(1e-5)
    made.add_tokenizer_model("llama")
    made.add_token_list([pieces.id_to_piece(i) for i in range(size)])
    made.add_token_scores([pieces.get_score(i) for i in range(size)])
    made.add_token_types([next(({1: 2, 2: 3, 3: 6}[k] for k, test in kinds.items() if test(i)), 1) for i in range(size)])
    made.add_add_space_prefix(True)
    made.add_remove_extra_whitespaces(spec.remove_extra_whitespaces)
    if spec.precompiled_charsmap:
        made.add_precompiled_charsmap(spec.precompiled_charsmap)
    for name, *shape in (
        ("token_embd", size, WIDTH), ("output", size, WIDTH), ("output_norm", WIDTH), ("blk.0.attn_norm", WIDTH),
        ("blk.0.attn_q", WIDTH, WIDTH), ("blk.0.attn_k", WIDTH, WIDTH), ("blk.0.attn_v", WIDTH, WIDTH),
        ("blk.0.attn_output", WIDTH, WIDTH), ("blk.0.ffn_norm", WIDTH), ("blk.0.ffn_gate", WIDTH, WIDTH),
        ("blk.0.ffn_up", WIDTH, WIDTH), ("blk.0.ffn_down", WIDTH, WIDTH),
    ):  # fmt: skip
        made.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    return pieces


found = {}
for rule in ("nmt_nfkc", "identity"):
    pieces = write(trained(rule))
    settings = xllamacpp.CommonParams()
    settings.model.path = FILE
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.warmup = 256, 1, 0, False
    server = xllamacpp.Server(settings)
    both = []
    for text in TEXTS:
        body = json.dumps({"content": text, "add_special": False}).encode()
        request = Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        with urlopen(request) as answer:
            both.append((pieces.encode(text), json.load(answer)["tokens"]))
    found[rule] = [ours != theirs for ours, theirs in both]
    lengths = [len(ids) for ids in both[0]]
    print(f"{rule}: {sum(found[rule])} of {len(TEXTS)} texts differ; the first has {lengths[0]} tokens, here {lengths[1]}")
sys.stdout.flush()
os._exit(0 if found == {"nmt_nfkc": [True] * 5 + [False], "identity": [False] * 6} else 1)
PYTHON
"$scratch/venv/bin/python" "$scratch/ask.py" "$scratch" 2> /dev/null
