"""PyTorch's settings of a process; import this before PyTorch.

Idle OpenMP threads spin by default. On a CPU the C++ operators then wait for the processors that they hold: a step of
telechat2-mini on two cores took 1.07 times as long in fp32, and 1.13 to 1.5 times in bf16.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when the OpenMP library is loaded
