#!/bin/bash
# rouge-chinese, with which Chinese answers are scored nearly everywhere, counts every word and every pair of words once: an
# answer that repeats itself without end scores like one that does not.
#
# Version:      rouge-chinese 1.0.3, CPython 3.11. LLaMA-Factory, ChatGLM's examples and MindFormers' ADGENMetric use it with
#               its defaults.
# Likely guess: ROUGE-1 and ROUGE-2 are Lin's: n-grams are counted with their repetitions, matches up to the number in the
#               reference, and precision is out of the length of the answer. Only ROUGE-L here has that length in it.
# Behaviour:    both texts become sets of n-grams (exclusive=True, an argument of Rouge() that its README does not explain).
#               A reference that says a word three times is satisfied by one. exclusive=False counts as Lin does.
# Matters:      repeating a sentence until the limit of tokens is the usual fault of a small or badly fine-tuned model; ROUGE-1
#               stays at 100, ROUGE-2 falls a little, and the scores cannot be compared with papers that used another ROUGE.
# Seen:         the right answer 20 times over, F1 in percent: default rouge-1 100 rouge-2 88.9; exclusive=False rouge-1 9.5
#               rouge-2 7.8; once: 100 100 with both
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "rouge-chinese==1.0.3" "six==1.17.0"
"$scratch/venv/bin/python" - <<'PYTHON'
from rouge_chinese import Rouge

reference = "今天 北京 天气 很 好"  # words with spaces between them, as jieba cuts them
seen = {}
for times in (1, 20):
    for name, options in (("default", {}), ("exclusive=False", {"exclusive": False})):
        score = Rouge(metrics=["rouge-1", "rouge-2"], **options).get_scores(" ".join([reference] * times), reference)[0]
        seen[times, name] = [round(100 * score[n]["f"], 1) for n in ("rouge-1", "rouge-2")]
        print(f"the right answer, {times} times over, {name}: rouge-1 {seen[times, name][0]} rouge-2 {seen[times, name][1]}")
by_definition = [round(100 * 2 * n / (n + m), 1) for n, m in ((5, 100), (4, 99))]  # matches; n-grams of the answer
print("by Lin's definition, 20 times over:", *by_definition)
expected = {(1, "default"): [100, 100], (1, "exclusive=False"): [100, 100],
            (20, "default"): [100, 88.9], (20, "exclusive=False"): by_definition}  # fmt: skip
raise SystemExit(0 if seen == expected else 1)
PYTHON
