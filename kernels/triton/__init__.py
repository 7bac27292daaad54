"""Fused operators in Triton, one source for NVIDIA GPUs and for Ascend; ``kernels.triton.ops`` is the set."""
