#!/bin/bash
# datasets reads answers that are dates as times, and writes them back as numbers: JSONL rows that were only loaded and
# saved ask for "1969-07-20" and answer -14.
#
# Version:      datasets 4.8.5, pyarrow 21.0.0, pandas 2.3.3, CPython 3.11 (the last that work beside numpy 1.26). With
#               datasets 5.2.0, pyarrow 26.0.1 and pandas 3.1.1 the number is -14256000000.
# Likely guess: load_dataset("json") followed by to_json gives the same rows: in JSON a date is text.
# Behaviour:    pyarrow's JSON reader takes a column for timestamp[s] if every value of its first block reads as an ISO
#               date; the row then holds a datetime, which formatted into a prompt ends in " 00:00:00". to_json hands the
#               column to pandas, which takes seconds for nanoseconds on the way to milliseconds.
# Matters:      a set of questions about dates, or a shard of it, trains the wrong answers, and nothing is said. The type
#               follows the data, so one shard of a set can hold times and the next one text. Give features= with
#               Value("string"), or let `tele data` read the JSONL file itself; a saved folder with such a column is refused.
# Seen:         {"question":"When did people first stand on the Moon?","answer":-14}; {"question":"When did the year 2000 begin?","answer":946}
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "datasets==4.8.5" "pyarrow==21.0.0" "pandas==2.3.3" \
    "numpy==1.26.4"
cd "$scratch"
HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$scratch/cache" "$scratch/venv/bin/python" - 2> /dev/null <<'PYTHON'
import json

import datasets

ROWS = [
    {"question": "When did people first stand on the Moon?", "answer": "1969-07-20"},
    {"question": "When did the year 2000 begin?", "answer": "2000-01-01"},
]
with open("rows.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in ROWS)
loaded = datasets.load_dataset("json", data_files="rows.jsonl", split="train")
loaded.to_json("saved.jsonl")
with open("saved.jsonl") as file:
    lines = file.read().split("\n")[:2]
print(*lines, sep="; ")
kind = str(loaded.features["answer"].dtype)
raise SystemExit(0 if kind == "timestamp[s]" and [json.loads(line)["answer"] for line in lines] == [-14, 946] else 1)
PYTHON
