#!/bin/bash
# A cut-off character takes the whole characters before it along when Hugging Face's tokenizers decode byte pieces.
#
# Version:      tokenizers 0.22.1 beside sentencepiece 0.2.1, CPython 3.11, x86-64.
# Likely guess: a vocabulary with byte fallback decodes alike in both libraries. A reply that stops in the middle of a
#               character (a limit of tokens, a step of a stream) ends in one U+FFFD, and what came before it is there.
# Behaviour:    the ByteFallback decoder takes each run of byte pieces as one: if the run is not valid UTF-8 to its end, every
#               byte of it becomes U+FFFD, whole characters included. SentencePiece keeps the whole ones.
# Matters:      text that is spelt in bytes (rare Han characters, emoji) is decoded wrongly not only at its end but back
#               to the beginning of the run, in every streamed step that ends within a character; a stream that prints the
#               difference to the last step prints marks over characters that it had already shown.
# Seen:         bytes of two characters and the first byte of a third: tokenizers 7 x U+FFFD; sentencepiece the two
#               characters and 1 x U+FFFD
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "tokenizers==0.22.1" "sentencepiece==0.2.1"
cd "$scratch"
"$scratch/venv/bin/python" - <<'PYTHON'
import io

import sentencepiece
from tokenizers import decoders

two = "\u9f98\u9750"  # three bytes each
pieces = [f"<0x{byte:02X}>" for byte in two.encode() + b"\xe4"]
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["hello world"] * 10), model_writer=model, vocab_size=270, byte_fallback=True,
    model_type="bpe", hard_vocab_limit=False, minloglevel=2,
)
processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
ours = decoders.ByteFallback().decode(pieces)
theirs = processor.decode([processor.piece_to_id(piece) for piece in pieces])
print("tokenizers   ", ascii(ours))
print("sentencepiece", ascii(theirs))
whole = decoders.ByteFallback().decode(pieces[:-1]) == two
raise SystemExit(0 if whole and ours == "\ufffd" * 7 and theirs == two + "\ufffd" else 1)
PYTHON
