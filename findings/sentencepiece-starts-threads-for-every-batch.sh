#!/bin/bash
# SentencePiece starts as many threads as there are processors for every list that it encodes or decodes.
#
# Version:      sentencepiece 0.2.3, CPython 3.11, x86-64, Linux.
# Likely guess: encode(list) of one process uses one core, as encode(text) does; one who wants more starts processes (what
#               every script does that prepares data), and OMP_NUM_THREADS=1 keeps each of them to its core.
# Behaviour:    a list starts new threads at every call, one for each processor that the process may use, and ends them
#               again; the number of texts, of their characters and OMP_NUM_THREADS change nothing. num_threads=1 still
#               starts one. decode of a list of lists does the same. Only a single text stays in the calling thread.
# Matters:      N processes on N cores have N x N threads that displace each other: two runs of a program that prepares data,
#               at once on the two cores of an AMD EPYC, did 1.75 times the work of one, and with num_threads=1 1.95. The
#               "one process" of a comparison uses all cores, too, so that more processes look as if they did not scale.
# Seen (2 processors, 10 calls): default 20 threads started, num_threads=1 10, num_threads=4 40, decode 20, single texts 0
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "sentencepiece==0.2.3"
OMP_NUM_THREADS=1 "$scratch/venv/bin/python" - <<'PYTHON'
import io
import os
import sys
import threading
import time

import sentencepiece

CALLS = 10
sentences = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 50
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(sentences), model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2
)
pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
texts = ["the lazy fox packs five dozen boxes with jugs " * 1500] * 8
ids = pieces.encode(texts, num_threads=1)


def started(call):
    """How many threads CALLS calls start, by the names that Linux gives them; the watching one and the caller aside."""
    seen, running = set(), True

    def watch():
        while running:
            seen.update(os.listdir("/proc/self/task"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    time.sleep(0.05)
    before = len(os.listdir("/proc/self/task"))
    for _ in range(CALLS):
        call()
    running = False
    watcher.join()
    return len(seen) - before


processors = len(os.sched_getaffinity(0))
counts = {
    "default": started(lambda: pieces.encode(texts)),
    "num_threads=1": started(lambda: pieces.encode(texts, num_threads=1)),
    "num_threads=4": started(lambda: pieces.encode(texts, num_threads=4)),
    "decode": started(lambda: pieces.decode(ids)),
    "single texts": started(lambda: [pieces.encode(text) for text in texts]),
}
print(f"{processors} processors, {CALLS} calls: " + ", ".join(f"{name} {count} threads started" for name, count in counts.items()))
# A thread that ends between two looks of the watching one is missed: four of five are enough.
each = min(processors, len(texts)) * CALLS * 0.8
holds = counts["default"] >= each and counts["decode"] >= each and counts["single texts"] == 0
holds = holds and CALLS * 0.8 <= counts["num_threads=1"] <= CALLS and counts["num_threads=4"] >= 4 * CALLS * 0.8
sys.exit(0 if holds else "changed: the threads that lists start")
PYTHON
