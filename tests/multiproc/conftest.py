"""Ranks that the tests of a file share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.warm_ranks import Pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with Pool(tmp_path_factory.mktemp("ranks")) as made:
        yield made
