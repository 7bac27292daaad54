"""The range of xPos's scales (core.model.position.xpos_scales), and whether a precision can hold it.

The scales of queries and of keys are reciprocals, so one number bounds both: 3.5^(d / scale_base), of the
slowest channel (zeta_0 = 0.4 / 1.4) at the largest distance d from their fixed origin, the middle of max_seqlen. The
product of a query's and a key's scale is at most 1 where the key is visible; what a later, hidden key's product
overflows to is masked. So it is the scales alone that a rotated query or key, in the compute dtype, must survive.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

from telechat_twins.core.errors import UserError

if TYPE_CHECKING:
    from telechat_twins.core.model.config import ModelConfig

_EXPONENT = math.log2(1.4 / 0.4)
# -log2 of the smallest normal number of the compute dtype. Scales within 2^-e .. 2^e leave keys of size 1 all their
# digits and queries a factor of 4 below the largest number.
_NORMAL = {"fp16": 14, "fp64": 1022}
_WIDE = 126  # of float32 and of bfloat16
_WARNED = 0.75  # the share of these exponents beyond which queries of 2^(e / 4) overflow, or keys as far below 1 vanish


def xpos_reach(config: ModelConfig, length: int) -> float:
    """log2 of the largest scale of queries or keys at positions 0 .. length - 1; 0 without xPos."""
    if config.position != "xpos":
        return 0.0
    origin = config.max_seqlen // 2
    return max(origin, length - 1 - origin) / config.xpos_scale_base * _EXPONENT


def check_xpos_range(config: ModelConfig, precision: str, length: int) -> str | None:
    """A warning where rows of ``length`` tokens come near the precision's range, None where they are well inside.

    UserError, naming the fields and the way out, where the scales leave the range: queries then overflow, keys vanish.
    """
    reach, held = xpos_reach(config, length), _NORMAL.get(precision, _WIDE)
    if reach <= _WARNED * held:
        return None
    rows = math.floor(2 * held / _EXPONENT * config.xpos_scale_base)
    distance = max(config.max_seqlen // 2, length - 1 - config.max_seqlen // 2)
    found = (
        f"model.max_seqlen {config.max_seqlen}, model.xpos_scale_base {config.xpos_scale_base:g}: {distance} tokens "
        f"from the middle of max_seqlen, where xPos's scales are 1, they are 2^{reach:.1f} and its inverse"
    )
    way = "use precision fp64" if held == _WIDE else "use precision bf16 or fp32"
    if precision == "fp64":
        way = "shorten the rows"
    ways = f"{way}, or lower max_seqlen to the longest row in use (nothing else follows it; at most {rows} here)"
    if reach > held:
        raise UserError(f"{found}, and {precision} holds 2^{held}; {ways}")
    return f"{found}; {precision} holds 2^{held}, so that large queries may overflow and small keys vanish; {ways}"


def say_xpos_range(config: ModelConfig, precision: str, length: int) -> None:
    """``check_xpos_range`` with its warning on stderr."""
    warning = check_xpos_range(config, precision, length)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
