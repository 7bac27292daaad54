#!/bin/bash
# MindFormers trains the token after the next one when packing is "pack": its PackingHandler shifts labels that
# AlpacaInstructDataHandler has shifted already.
#
# Version:      mindformers 1.9.0, mindspore 2.9.0, datasets and transformers as mindformers 1.9.0 draws them, CPython 3.11.
#               The two handlers are the same in mindformers 2.1.0.
# Likely guess: packing: pack and packing: truncate train the same pairs of tokens. They differ in what becomes of a row that
#               does not fit any more.
# Behaviour:    AlpacaInstructDataHandler ends with labels[1:] + [-100]: the label beside a token is the next one. "truncate"
#               leaves them so. "pack" takes each row's labels[1:] + [pad_token] once more, with pad_token 0, since the
#               PackingHandler has no tokenizer: the label is the token after the next, the first token of an answer is
#               asked for before its prompt has ended, and after the end of text id 0 is trained.
# Matters:      the loss is that of a guess across a gap, falls slowly and looks plausible; the model answers by leaving out every
#               other token. Nothing is said. tele data packs the rows themselves.
# Seen:         truncate: one>two two>three three>four four></s>; pack: one>three two>four three></s> </s>><unk>
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "mindformers==1.9.0" "mindspore==2.9.0" "numpy==1.26.4"
cd "$scratch"
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$scratch/cache" GLOG_v=3
"$scratch/venv/bin/python" - 2> /dev/null <<'PYTHON' | grep -v " - mindformers/"
import json

import sentencepiece
from mindformers.dataset.dataloader.hf_dataloader import HFDataLoader

WORDS = "one two three four five six seven eight nine ten".split()
with open("rows.json", "w") as file:
    json.dump([{"instruction": "Count.", "output": " ".join(WORDS[:count])} for count in (4, 6, 8, 10)], file)
with open("text", "w") as file:
    file.write("\n".join(f"{one} {other}" for one in [*WORDS, "USER: Count."] for other in WORDS))
options = {"vocab_size": 320, "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2}
sentencepiece.SentencePieceTrainer.train(input="text", model_prefix="small", **options)
pieces = sentencepiece.SentencePieceProcessor(model_file="small.model")
TOKENIZER = {"type": "LlamaTokenizer", "vocab_file": "small.model", "add_bos_token": False}


def trained(strategy: str) -> str:
    """The first row's pairs TOKEN>LABEL that the loss counts, from the first word of its answer on."""
    handlers = [
        {"type": "AlpacaInstructDataHandler", "seq_length": 1024, "tokenizer": TOKENIZER},
        {"type": "PackingHandler", "seq_length": 1024},
    ]
    loader = HFDataLoader(
        path="json", data_files="rows.json", split="train", handler=handlers, packing=strategy,
        create_attention_mask=True, shuffle=False, python_multiprocessing=False,
    )  # fmt: skip
    row = next(loader.create_dict_iterator(output_numpy=True, num_epochs=1))
    ids, labels, mask = (row[key].reshape(-1).tolist() for key in ("input_ids", "labels", "loss_mask"))
    pairs = [(pieces.id_to_piece(i), pieces.id_to_piece(label)) for i, label, on in zip(ids, labels, mask) if on]
    start = next(place for place, pair in enumerate(pairs) if pair[0].endswith("one"))
    return " ".join(f"{one}>{other}".replace("\u2581", "") for one, other in pairs[start : start + 4])


seen = {strategy: trained(strategy) for strategy in ("truncate", "pack")}
for strategy, pairs in seen.items():
    print(f"{strategy}: {pairs}")
same = seen == {
    "truncate": "one>two two>three three>four four></s>",
    "pack": "one>three two>four three></s> </s>><unk>",
}
raise SystemExit(0 if same else 1)
PYTHON
