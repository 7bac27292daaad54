#!/bin/bash
# lm-eval's Janitor, which takes test questions out of training text, saves the name of a file where it should save what to
# take out, and finds nothing in languages without spaces.
#
# Version:      lm_eval 0.4.13, CPython 3.11 (its Python mode; saving and loading have no other).
# Likely guess: load_contamination_ngrams(FILE) gives back what save_contamination_ngrams(FILE) saved, so that the test sets
#               are read once; a Chinese question of 54 characters is found where an English one of 28 words is.
# Behaviour:    save pickles its argument, the name. load takes that text for the set of n-grams: no error, and "in" works on
#               texts, too, so that clean() returns everything. n-grams are of 13 words between spaces: of a Chinese question
#               register_contaminant() keeps none.
# Matters:      a corpus is reported clean that was never compared with the test sets. Only the size of the saved file, a few
#               bytes, shows it. Keep dirt_ngrams yourself, and put spaces between Chinese characters before both calls.
# Seen:         taken out: English True, Chinese False, Chinese with spaces True; after saving and loading English False,
#               n-grams 'ngrams'
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "lm_eval==0.4.13"
cd "$scratch"
"$scratch/venv/bin/python" - 2> /dev/null <<'PYTHON'
import contextlib
import io

ENGLISH = (
    "Which of the two rivers that meet below the old town carried more water in the spring of the year in which the"
    " second bridge was built there?"
)
CHINESE = "下列关于法国大革命的说法中，哪一项是正确的？甲、巴士底狱在一七八九年被攻占；乙、拿破仑在一八〇四年加冕称帝。"


def taken_out(janitor, question: str) -> bool:
    text = "before " * 100 + question + " after" * 100
    return question not in "".join(janitor.clean(text))


with contextlib.redirect_stdout(io.StringIO()):  # it prints its mode at every call
    from lm_eval.decontamination.janitor import Janitor

    janitor = Janitor()
    janitor.register_contaminant(ENGLISH)
    janitor.register_contaminant(CHINESE)
    found = [taken_out(janitor, ENGLISH), taken_out(janitor, CHINESE)]
    janitor.register_contaminant(" ".join(CHINESE))
    found.append(taken_out(janitor, " ".join(CHINESE)))
    janitor.save_contamination_ngrams("ngrams")
    loaded = Janitor()
    loaded.load_contamination_ngrams("ngrams")
    found.append(taken_out(loaded, ENGLISH))
print(f"taken out: English {found[0]}, Chinese {found[1]}, Chinese with spaces {found[2]}")
print(f"after saving and loading: English {found[3]}, n-grams {loaded.dirt_ngrams!r}")
raise SystemExit(0 if found == [True, False, True, False] and loaded.dirt_ngrams == "ngrams" else 1)
PYTHON
