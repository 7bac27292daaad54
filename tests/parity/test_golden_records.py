"""Both backends against the goldens of records: every activation, gradient, weight and moment of an update."""

from __future__ import annotations

from pathlib import Path

import pytest

from telechat_twins.core.parity.compare.records import compare_records
from telechat_twins.core.parity.record.read import open_record
from tests.support.frameworks import BACKENDS
from tests.support.golden_records import FOLDER, models, smaller, take
from tests.support.records import apart

LIMIT = 2e-5  # in fp32; measured are 4e-6


@pytest.mark.parametrize("name", [name for name, _ in models()])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_record_equals_its_golden(backend: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip("mindspore" if backend == "ms" else "torch")
    golden = open_record(FOLDER / name)
    found = smaller(take(backend, name, dict(models())[name], tmp_path, "fp32"))
    assert {k: v for k, v in found.header.digests.items()} == golden.header.digests
    assert list(found.quantities) == list(golden.quantities)
    far = sorted(apart(golden, found).items(), key=lambda item: -item[1])
    assert far[0][1] <= LIMIT, far[:5]
    judged = compare_records(found, golden)
    assert judged.reference == "b" and judged.first_broken is None, judged.first_broken
