#!/bin/bash
# pyarrow makes rows of a table with two columns of one name without the first of them; of a struct it refuses to.
#
# Version:      pyarrow 26.0.1 (21.0.0 is the same), CPython 3.11.
# Likely guess: Table.to_pylist() keeps every column or raises, as StructArray.to_pylist() does for the same fields; a
#               Parquet file with such a table is read without a complaint.
# Behaviour:    the later column's values stand under the name in every row, and nothing says that there was another.
# Matters:      a data set joined of two with a column "output" each trains on one of the two answers.
# Seen:         2 columns, rows [{'output': 'second'}]; as a struct: ValueError
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "pyarrow==26.0.1"
"$scratch/venv/bin/python" - "$scratch/t.parquet" <<'PYTHON'
import sys

import pyarrow as pa
import pyarrow.parquet as pq

columns, names = [pa.array(["first"]), pa.array(["second"])], ["output", "output"]
pq.write_table(pa.Table.from_arrays(columns, names), sys.argv[1])
with pq.ParquetFile(sys.argv[1]) as file:
    table = file.read()
rows = table.to_pylist()
try:
    struct = str(pa.StructArray.from_arrays(columns, names).to_pylist())
except ValueError as error:
    struct = type(error).__name__
print(f"{table.num_columns} columns, rows {rows}; as a struct: {struct}")
sys.exit(0 if table.num_columns == 2 and rows == [{"output": "second"}] and struct == "ValueError" else 1)
PYTHON
