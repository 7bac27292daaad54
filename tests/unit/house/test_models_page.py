"""docs/models.md holds the presets as they are."""

from __future__ import annotations

import pytest

from tests.campaigns.models_page import BEGIN, END, PAGES, table
from tests.house import ROOT


@pytest.mark.parametrize("page", PAGES)
def test_the_table_is_what_the_presets_say(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == table(), "run python -m tests.campaigns.models_page"
