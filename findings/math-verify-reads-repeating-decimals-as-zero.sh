#!/bin/bash
# Math-Verify, by which TRL's accuracy reward scores answers, reads 0.\overline{3} as 0 and 2516_8 as 2516: wrong
# answers are right, and 1/3 is wrong.
#
# Version:      math-verify 0.9.0, latex2sympy2_extended 1.11.0, sympy 1.14.0, CPython 3.11.
# Likely guess: a repeating decimal is its fraction, a number with a base its value; what the parser does not know stays
#               a text, which is then compared as a text.
# Behaviour:    \overline{3}, \bar{3} and \dot{3} behind "0." are dropped, and with digits before them 0.1\overline{6}
#               is 0.1 times a name "bar{6}". The base of 2516_8 is dropped: any base, and none, is right. \lg 100 is
#               100 (\log 100 is 2).
# Matters:      both kinds are usual in school mathematics and in MATH. As the reference answer they reward every model
#               that answers 0 or another repeating decimal and none that gives the fraction; the mean reward shows
#               nothing of it. Look for \overline, \dot and _ in the reference answers, and write fractions.
# Seen:         0.\overline{3}: 0 True, 0.\overline{7} True, \frac{1}{3} False; 0.1\overline{6}: \frac{1}{6} False;
#               2516_8: 2516 True, 2516_9 True, 1358 False; \lg 100: 2 False, 100 True; 0.25: \frac{1}{4} True, 0 False
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "math-verify==0.9.0" "latex2sympy2_extended==1.11.0" \
    "sympy==1.14.0"
"$scratch/venv/bin/python" - <<'PYTHON'
from math_verify import parse, verify

expected = {
    r"0.\overline{3}": {"0": True, r"0.\overline{7}": True, r"\frac{1}{3}": False},
    r"0.1\overline{6}": {r"\frac{1}{6}": False},
    "2516_8": {"2516": True, "2516_9": True, "1358": False},
    r"\lg 100": {"2": False, "100": True},
    "0.25": {r"\frac{1}{4}": True, "0": False},
}
holds = True
for reference, answers in expected.items():
    found = {answer: verify(parse(f"${reference}$"), parse(f"${answer}$")) for answer in answers}
    print(f"{reference}:", ", ".join(f"{answer} {right}" for answer, right in found.items()))
    holds = holds and found == answers
raise SystemExit(0 if holds else 1)
PYTHON
