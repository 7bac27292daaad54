#!/bin/bash
# rouge_score, which lm-eval's tasks call for ROUGE, leaves everything out but ASCII letters and digits: two
# Chinese answers that say the opposite are equal if their numbers are.
#
# Version:      rouge_score 0.1.2 with nltk 3.10.4, CPython 3.11.
# Likely guess: text without spaces is cut badly, so Chinese scores are too low; one who finds a score of 0 puts spaces between
#               the characters, or jieba's words, as for other tools.
# Behaviour:    the tokenizer replaces every character but a-z and 0-9 by a space, before it looks for words. What is left of
#               Chinese are the digits, names and units in it; precision and recall are of those alone. Spaces
#               change nothing. A text without any of them scores 0, whatever it says.
# Matters:      the mean over a Chinese test set is that of the numbers in it and not plainly wrong, so models are chosen by
#               who repeats the digits. Give RougeScorer a tokenizer of your own.
# Seen:         2024年营收增长3% and 2024年营收下降3%: rouge1 1 rougeL 1, with spaces 1 1; 今天天气很好 and itself: 0 0, with
#               spaces 0 0; a tokenizer of characters: 0.82 0.82 and 1 1
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "rouge_score==0.1.2" "nltk==3.10.4" "numpy==1.26.4" \
    "absl-py==2.5.1" "six==1.17.0"
"$scratch/venv/bin/python" - <<'PYTHON'
from rouge_score.rouge_scorer import RougeScorer


class Characters:
    def tokenize(self, text: str) -> list[str]:
        return [character for character in text if not character.isspace()]


opposite = ("2024年营收增长3%", "2024年营收下降3%")
same = ("今天天气很好", "今天天气很好")
seen = {}
for name, pair in (("opposite", opposite), ("same", same)):
    for how, tokenizer, texts in (
        ("as they are", None, pair),
        ("with spaces", None, [" ".join(text) if name == "same" else text.replace("年", " 年 ") for text in pair]),
        ("characters", Characters(), pair),
    ):
        scores = RougeScorer(["rouge1", "rougeL"], tokenizer=tokenizer).score(*texts)
        seen[name, how] = [round(scores[kind].fmeasure, 2) for kind in ("rouge1", "rougeL")]
        print(f"{pair[0]} and {pair[1]}, {how}: rouge1 {seen[name, how][0]:g} rougeL {seen[name, how][1]:g}")
right = [seen["opposite", how] == [1, 1] and seen["same", how] == [0, 0] for how in ("as they are", "with spaces")]
raise SystemExit(0 if all(right) and seen["same", "characters"] == [1, 1] else 1)
PYTHON
