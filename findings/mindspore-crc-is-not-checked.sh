#!/bin/bash
# MindSpore's load_checkpoint gives changed weights for a damaged file that holds its own checksum.
#
# Version:      mindspore 2.9.0, CPython 3.11, x86-64.
# Likely guess: save_checkpoint(..., crc_check=True) puts a CRC into the file so that damage is noticed; load_checkpoint,
#               which must recognise and cut off the CRC to parse the file at all, compares it.
# Behaviour:    it cuts the CRC off and does not compare unless load_checkpoint is itself called with crc_check=True, whose
#               default is False: one flipped bit in a weight comes back as another weight, without a warning. Asked for,
#               the check works, and for a file without a CRC it only warns.
# Matters:      whoever saves with the checksum believes the copies on other machines are guarded; loading with the
#               defaults, as every example does, they are not.
# Seen:         saved [1. 2. 3.] loaded [1. 2. 3.0000002]; with crc_check=True: ValueError; without a CRC: loads
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "mindspore==2.9.0" "numpy==1.26.4"
cd "$scratch"
GLOG_v=3 "$scratch/venv/bin/python" - <<'PYTHON'
import pathlib

import mindspore as ms
import numpy as np

weight = np.array([1, 2, 3], np.float32)
path = pathlib.Path("model.ckpt")
ms.save_checkpoint([{"name": "w", "data": ms.Tensor(weight)}], str(path), crc_check=True)
content = bytearray(path.read_bytes())
place = content.index(weight.tobytes()) + 8  # the lowest bits of the last element
content[place] ^= 1
path.write_bytes(content)
loaded = ms.load_checkpoint(str(path))["w"].asnumpy()
print("saved", weight, "loaded", loaded)
try:
    ms.load_checkpoint(str(path), crc_check=True)
    noticed = False
except ValueError as error:
    noticed = True
    print("with crc_check=True: ValueError")
ms.save_checkpoint([{"name": "w", "data": ms.Tensor(weight)}], "plain.ckpt")
plain = ms.load_checkpoint("plain.ckpt", crc_check=True)["w"].asnumpy()
print("without a CRC: loads", plain)
same = noticed and not np.array_equal(loaded, weight) and np.array_equal(plain, weight)
raise SystemExit(0 if same else 1)
PYTHON
