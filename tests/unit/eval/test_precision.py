"""The arithmetic of an evaluation that names none."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace

import pytest

from telechat_twins.core.eval import session


@pytest.mark.parametrize(
    ("names", "given", "quantize", "off_cpu", "expected"),
    [
        (("ms", "pt"), None, "none", (), "fp64"),
        (("pt",), None, "none", (), "fp32"),
        (("ms", "pt"), None, "none", ("ms",), "fp32"),  # an accelerator without float64
        (("ms", "pt"), None, "int8", (), "fp32"),
        (("ms", "pt"), "bf16", "none", (), "bf16"),
    ],
)
def test_backends_are_compared_beyond_fp32s_rounding_where_float64_is_at_hand(
    names: tuple[str, ...],
    given: str | None,
    quantize: str,
    off_cpu: tuple[str, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(session, "load", lambda name, module: SimpleNamespace(on_cpu=lambda: name not in off_cpu))
    args = Namespace(precision=given, quantize=quantize)
    session.choose_precision(args, names)
    assert args.precision == expected
    assert ("note: compared in fp64" in capsys.readouterr().err) == (expected == "fp64")
