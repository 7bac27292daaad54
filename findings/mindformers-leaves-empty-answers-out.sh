#!/bin/bash
# MindFormers' ADGENMetric, its ROUGE and BLEU for generated text, leaves out every sample to which a model answers nothing.
#
# Version:      mindformers 1.9.0, mindspore 2.9.0, CPython 3.11.
# Likely guess: an empty answer scores 0 in each of the four, as the answer to any other sample that shares no word with its
#               reference does.
# Behaviour:    a prediction without a word (empty, or white space only) is skipped before anything is counted: the means
#               are over the other samples, whose number is not reported.
# Matters:      a fine-tuned model that ends its answer at once for most prompts, a usual fault of a wrong template or stop
#               token, scores like a perfect one; of two checkpoints the one that answers less can win.
# Seen:         one right answer and nine empty ones: rouge-1 100 rouge-2 100 rouge-l 100 bleu-4 100; nine wrong ones in
#               their place: rouge-1 10 rouge-2 10 rouge-l 10 bleu-4 10
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "mindformers==1.9.0" "mindspore==2.9.0" "numpy==1.26.4"
cd "$scratch"
GLOG_v=3 "$scratch/venv/bin/python" - 2> /dev/null <<'PYTHON'
import contextlib
import io

from mindformers.core.metric import ADGENMetric

RIGHT = "今天天气很好"


def scores(other: str) -> dict[str, float]:
    metric = ADGENMetric()
    metric.clear()
    with contextlib.redirect_stdout(io.StringIO()):
        metric.update([RIGHT, *[other] * 9], [RIGHT, *["我们去公园"] * 9])
        return metric.eval()


empty, wrong = scores(""), scores("无")
for name, found in (("nine empty", empty), ("nine wrong", wrong)):
    print(f"one right answer and {name} ones:", *(f"{key} {value:.4g}" for key, value in found.items()))
same = all(value == 100 for value in empty.values()) and all(value < 15 for value in wrong.values())
raise SystemExit(0 if same else 1)
PYTHON
