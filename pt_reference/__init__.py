"""The PyTorch side. Importing it prepares the process."""

import telechat_twins.kernels.pytorch  # noqa: F401
