#!/bin/bash
# msprobe's comparison of two dumped tensors, the Ascend tool for accuracy between frameworks and devices, calls +inf and
# -inf at one place, and NaN and NaN, exact agreement.
#
# Version:      mindstudio-probe (msprobe) 26.2.0, numpy 1.26.4, CPython 3.11. The two functions called are those that
#               "msprobe compare" passes each pair of tensors through.
# Likely guess: infinities of opposite sign are reported, as an infinity against a number is ("The position of inf or nan in
#               NPU and bench Tensor do not match."); two tensors of NaN are not reported as right.
# Behaviour:    np.isinf of both sides is compared, which is blind to the sign, and then every infinity and NaN of both is
#               replaced by 0 and the numbers are computed from that. Nothing in the message tells.
# Matters:      a mask added with the wrong sign, or an overflow that two devices take to different sides, is found nowhere;
#               a run that has become NaN on both sides has "passed" from there on.
# Seen:         Cosine, EucDist, MaxAbsErr, MaxRelativeErr, thousandth and five thousandths ratio of
#               [1, 2, inf, -inf] and [1, 2, -inf, inf]: [1.0, 0.0, 0.0, 0.0, 1.0, 1.0] ''; of three NaN and three NaN: the same;
#               of [1, 2, inf, 4] and [1, 2, 3, 4]: 'The position of inf or nan in NPU and bench Tensor do not match.'
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "mindstudio-probe==26.2.0" "numpy==1.26.4" "pandas==2.3.3"
cd "$scratch"
"$scratch/venv/bin/python" - 2> /dev/null <<'PYTHON'
import numpy as np
from msprobe.core.common.log import logger
from msprobe.core.compare.npy_compare import CompareResult, ValidateTensor, compare_ops_apply

logger.info = lambda *_: None


def verdict(ours, reference):
    pair = CompareResult(np.array(ours, np.float32), np.array(reference, np.float32))
    checked = ValidateTensor().check_tensor(pair)
    figures, message = compare_ops_apply(checked.n_value, checked.b_value, checked.error_flag, checked.err_msg)
    return figures, message


inf, nan = np.inf, np.nan
signs = verdict([1, 2, inf, -inf], [1, 2, -inf, inf])
nans = verdict([nan, nan, nan], [nan, nan, nan])
number = verdict([1, 2, inf, 4], [1, 2, 3, 4])
print("infinities of opposite sign:", *map(repr, signs))
print("NaN and NaN:", *map(repr, nans))
print("an infinity and a number:", repr(number[1]))
perfect = ([1.0, 0.0, 0.0, 0.0, 1.0, 1.0], "")
raise SystemExit(0 if signs == nans == perfect and "do not match" in number[1] else 1)
PYTHON
