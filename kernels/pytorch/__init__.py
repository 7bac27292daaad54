"""PyTorch's operators. Import this package before PyTorch: it prepares the process.

Idle OpenMP threads spin by default. On a CPU the C++ operators then wait for the processors that they hold: a step of
telechat2-mini on two idle cores took 1.07 times as long in fp32; in bf16, beside other work, 1.15 and 1.32 times the
processor time.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when the OpenMP library is loaded
