#!/bin/bash
# llguidance does not compare the tokens that a tokenizer gives for forced text with that text: SentencePiece's space in
# front makes its mask allow one token only, which the grammar then refuses.
#
# Version:      llguidance 1.9.1, sentencepiece 0.2.3, CPython 3.11.
# Likely guess: TokenizerWrapper around a SentencePiece model's encode is enough; a mask allows tokens that continue the
#               grammar, whatever encode returns.
# Behaviour:    where a grammar leaves one continuation only (here the key of a JSON object), the mask is the first
#               token of encode(continuation). SentencePiece begins every text with a space, so that is " name" and not
#               "name"; consume_token then fails, and the matcher stays in its error state, in which is_stopped() is
#               true.
# Matters:      every answer under a schema ends after its first brace, as if it were complete.
# Seen:         after '{"' the mask allows [' name']; consume_token: False; is_stopped: True
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "llguidance==1.9.1" "sentencepiece==0.2.3"
cd "$scratch"
"$scratch/venv/bin/python" - <<'PYTHON'
import io
import sys

import sentencepiece as spm
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

model = io.BytesIO()
spm.SentencePieceTrainer.train(
    sentence_iterator=iter(['a name of a name {"name": 1} name'] * 50),
    model_writer=model,
    model_type="bpe",
    vocab_size=290,
    byte_fallback=True,
    hard_vocab_limit=False,
    minloglevel=2,
)
pieces = spm.SentencePieceProcessor(model_proto=model.getvalue())


class Words:
    eos_token_id, bos_token_id = pieces.eos_id(), pieces.bos_id()
    special_token_ids = [i for i in range(pieces.vocab_size()) if pieces.is_control(i) or pieces.is_unknown(i)]
    tokens = [
        bytes([int(word[1:-1], 16)]) if pieces.is_byte(i) else word.replace("▁", " ").encode()
        for i in range(pieces.vocab_size())
        for word in [pieces.id_to_piece(i)]
    ]

    def __call__(self, text: str) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("text, not bytes")
        return pieces.encode(text)


tokenizer = LLTokenizer(TokenizerWrapper(Words()), n_vocab=pieces.vocab_size())
schema = {"type": "object", "properties": {"name": {}}, "required": ["name"], "additionalProperties": False}
matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(schema), log_level=0)
for byte in b'{"':
    assert matcher.consume_token(Words.tokens.index(bytes([byte])))
allowed = [i for i, value in enumerate(matcher.compute_logit_bias()) if value]
took = matcher.consume_token(allowed[0])
names = [Words.tokens[i].decode() for i in allowed]
print(f"after '{{\"' the mask allows {names}; consume_token: {took}; is_stopped: {matcher.is_stopped()}")
sys.exit(0 if len(names) == 1 and names[0].startswith(" ") and not took and matcher.is_stopped() else 1)
PYTHON
