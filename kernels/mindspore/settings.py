"""MindSpore settings of a process; import this before its first operator.

Both settings are for MindSpore's CPU device, whose operators are short. By default idle OpenMP threads spin, and so
does the asynchronous launch queue; on a machine with few cores they take processor time from the thread that computes.
Measured on two busy cores, a training step of telechat2-tiny took 3.6 s of processor time with the defaults and 0.5 s
with both settings.
"""

import contextlib
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when the OpenMP library is loaded

import mindspore  # noqa: E402

if mindspore.get_context("device_target") == "CPU":
    mindspore.runtime.launch_blocking()

_kept: list[int] = []  # threads of MindSpore's own operators, once limited


def keep_threads(threads: int) -> None:
    """Limit the threads of MindSpore's own operators on a CPU. Called before the process's first operator, which starts
    them. The first number of a process holds, ours or that of a program that uses this package: MindSpore takes one."""
    if not _kept:
        _kept.append(threads)
        with contextlib.suppress(RuntimeError):  # "can not be set repeatedly"
            mindspore.device_context.cpu.op_tuning.threads_num(threads)
