#!/bin/bash
# A folder named "kernels" beside a script makes transformers fail where it should say that a package is missing.
#
# Version:      transformers 5.0.0 to 5.9.0 (run: 5.0.0, 5.4.0, 5.9.0), CPython 3.11; 5.10.4 and later answer False.
# Likely guess: is_kernels_available() is False where Hugging Face's package "kernels" is not installed. A folder of that name
#               in the current directory that holds no Python at all, usual in repositories with operators of their own,
#               changes nothing.
# Behaviour:    such a folder is a namespace package, so importlib.util.find_spec finds it; no distribution of the name has a
#               version, the version becomes the text N/A, and comparing that with the oldest version allowed raises
#               packaging's InvalidVersion.
# Matters:      from_pretrained with attn_implementation="flash_attention_2" asks this when flash-attn is missing: the user
#               reads "Invalid version: 'N/A'" and not which package to install. It depends on the directory in which
#               Python was started. An __init__.py in the folder makes no difference.
# Seen:         without the folder: False; with the empty folder: InvalidVersion: Invalid version: 'N/A'
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "transformers==5.9.0" "packaging==25.0"
cat > "$scratch/ask.py" <<'PYTHON'
from transformers.utils import is_kernels_available

try:
    print(is_kernels_available())
except Exception as error:
    print(f"{type(error).__name__}: {error}")
PYTHON
cd "$scratch"
without=$("$scratch/venv/bin/python" ask.py 2> /dev/null)
mkdir kernels
with=$("$scratch/venv/bin/python" ask.py 2> /dev/null)
echo "without the folder: $without"
echo "with the folder:    $with"
[ "$without" = "False" ] && [ "$with" = "InvalidVersion: Invalid version: 'N/A'" ]
