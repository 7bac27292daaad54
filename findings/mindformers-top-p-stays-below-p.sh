#!/bin/bash
# MindFormers' top_p drops the token with which the sum reaches p: what is kept has less than p, and where the first two
# tokens have most of it, sampling becomes greedy.
#
# Version:      mindformers 1.9.0, mindspore 2.9.0, transformers 4.57.1, CPython 3.11. Its forms in numpy and in mint
#               operators compare alike; the one in numpy is run.
# Likely guess: top_p is that of transformers and of the class's own documentation: the smallest set whose probabilities
#               add up to top_p or more. Models come with a generation_config that was tuned so.
# Behaviour:    kept is what has a cumulative sum below top_p, and the first token. Of 0.6 0.3 0.1 with top_p 0.8, 0.6
#               alone is kept; of 0.5 0.3 0.2 with 0.9 two tokens (0.8). top_k of the vocabulary's size or more drops
#               the last token, too (in numpy).
# Matters:      answers vary less than top_p says, most where the model is unsure between two tokens; samples for
#               rejection sampling or preference pairs come out alike. Evaluations with the same settings differ between
#               frameworks, with equal logits.
# Seen:         tokens kept, MindFormers and transformers: 0.6 0.3 0.1, top_p 0.8: 1, 2; 0.5 0.3 0.2, top_p 0.9: 2, 3;
#               0.95 0.03 0.02, top_p 0.9: 1, 1; four tokens, top_k 3, 4, 9: 3, 3, 3 and 3, 4, 4
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "mindformers==1.9.0" "mindspore==2.9.0" "numpy==1.26.4" \
    "transformers==4.57.1" "torch==2.13.0"
cd "$scratch"
GLOG_v=3 "$scratch/venv/bin/python" - 2> /dev/null <<'PYTHON'
import numpy as np
import torch
import transformers
from mindformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

nothing = np.zeros((1, 1), np.int64)


def kept(warper, scores):
    if isinstance(warper, transformers.LogitsProcessor):
        left = warper(torch.from_numpy(nothing), torch.from_numpy(scores)).numpy()
    else:
        left = warper.process_np(scores.copy(), nothing)
    return int((left > -1000).sum())


holds = True
for probabilities, top_p, expected in (
    ((0.6, 0.3, 0.1), 0.8, (1, 2)),
    ((0.5, 0.3, 0.2), 0.9, (2, 3)),
    ((0.95, 0.03, 0.02), 0.9, (1, 1)),
):
    scores = np.log(np.array([probabilities], np.float32))
    found = kept(TopPLogitsWarper(top_p), scores), kept(transformers.TopPLogitsWarper(top_p), scores)
    print(*probabilities, f"top_p {top_p}: {found[0]}, {found[1]}")
    holds = holds and found == expected
four = np.array([[1, 2, 3, 4]], np.float32)
for top_k, expected in ((3, (3, 3)), (4, (3, 4)), (9, (3, 4))):
    found = kept(TopKLogitsWarper(top_k), four), kept(transformers.TopKLogitsWarper(top_k), four)
    print(f"top_k {top_k}: {found[0]}, {found[1]}")
    holds = holds and found == expected
raise SystemExit(0 if holds else 1)
PYTHON
