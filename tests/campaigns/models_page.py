"""The table of presets on docs/models.md and docs/models.zh.md: python -m tests.campaigns.models_page."""

from __future__ import annotations

from telechat_twins.core.model.config import load_model_config, preset_names
from telechat_twins.core.model.params import count_parameters
from tests.house import ROOT

PAGES = ("docs/models.md", "docs/models.zh.md")
BEGIN, END = "<!-- presets -->\n", "<!-- end of presets -->"


def table() -> str:
    """A line a preset: family, sizes, and the parameters that its table of shapes adds up to."""
    lines = [
        "| preset | family | layers | width | ffn | heads (kv) | rows | parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in preset_names():
        c = load_model_config(name)
        lines.append(
            f"| `{name}` | {c.family} | {c.num_layers} | {c.hidden_size} | {c.ffn_hidden_size} | "
            f"{c.num_heads} ({c.num_kv_heads}) | {c.vocab_size} | {count_parameters(c):,} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        (ROOT / page).write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
