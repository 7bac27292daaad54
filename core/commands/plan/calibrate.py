"""`tele plan --calibrate`: a machine file of this computer's cores, from a minute of measurements."""

from __future__ import annotations

import argparse
from pathlib import Path

from telechat_twins.core import backends


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``--calibrate``."""
    parser.add_argument(
        "--backend", choices=sorted(backends.BACKENDS), help="with --calibrate: whose operators are measured (pt)"
    )
    parser.add_argument("--out", metavar="FILE", help="with --calibrate: the machine file (cpu-BACKEND.yaml)")


def run(args: argparse.Namespace) -> int:
    """Measure, write the file, and say what was found."""
    import yaml

    from telechat_twins.core.bench.calibrate import calibrate
    from telechat_twins.core.files.atomic import writable_file, write_text

    backend = args.backend or "pt"
    path = Path(args.out or f"cpu-{backend}.yaml")
    writable_file(path, "--out")
    found = calibrate(backend, path.stem)
    write_text(path, yaml.safe_dump(found, sort_keys=False, width=118))
    rates = found["efficiency"]
    print(
        f"{path}: {found['title']}; {found['peak_fp32']['value'] * rates['matmul']:.3g} TFLOP/s and "
        f"{found['memory_bandwidth']['value'] * rates['memory']:.3g} GB/s a core, {rates['launch']:.3g} us between "
        f"operators; a process with c cores is c ** {found['core_exponent']:g} as fast; steps were within "
        f"{max(rates['faster'], rates['slower']):.0%} of the forecast"
    )
    return 0
