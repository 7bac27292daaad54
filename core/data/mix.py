"""Tokens drawn from each source of a run, and the passes over it that this makes (`tele plan --config`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from telechat_twins.core.config import DataConfig, DataSourceConfig


@dataclass(frozen=True)
class SourceShare:
    """One source: its ``share`` of the samples, the ``tokens`` drawn of it, and how many times these are its own.

    ``held``: the tokens of a pass, counted in the packed folder (``counted``) or named in the config; None: neither.
    Tokens are places of rows: of a source of shorter sequences, padding included.
    """

    path: str
    share: float
    tokens: float
    held: int | None
    counted: bool

    @property
    def epochs(self) -> float | None:
        return self.tokens / self.held if self.held and self.tokens else None


def plan_mix(data: DataConfig, tokens: float | None) -> list[SourceShare]:
    """What a run of ``tokens`` draws of each source; None: of a run whose length is not known yet, nothing."""
    total = sum(source.weight for source in data.sources)
    found = []
    for source in data.sources:
        held, counted = _held(source, data.seq_len)
        share = source.weight / total
        found.append(SourceShare(source.path, share, share * (tokens or 0.0), held, counted))
    return found


def samples_of(data: DataConfig) -> int | None:
    """Samples of one pass over all sources; None unless all are packed."""
    if not all(_packed(source) for source in data.sources):
        return None
    return sum(_samples(source, data.seq_len) for source in data.sources)


def describe_mix(shares: Sequence[SourceShare]) -> list[str]:
    """A table: share of the samples, tokens drawn, passes."""
    width = max(len("source"), *(len(Path(source.path).name) for source in shares))
    lines = [f"  {'source':<{width}}  {'share':>8}  {'tokens drawn':>12}  {'of':>10}  {'epochs':>7}"]
    for source in shares:
        drawn = f"{source.tokens / 1e9:,.2f} B" if source.tokens else "-"
        held = "not packed" if source.held is None else f"{source.held / 1e9:,.2f} B"
        epochs = "-" if source.epochs is None else f"{source.epochs:.3g}"
        note = "" if source.counted or source.held is None else "  (by the config)"
        lines.append(
            f"  {Path(source.path).name:<{width}}  {source.share:>8.3%}  {drawn:>12}  {held:>10}  {epochs:>7}{note}"
        )
    return lines


def _packed(source: DataSourceConfig) -> bool:
    return (Path(source.path) / "meta.json").is_file()


def _held(source: DataSourceConfig, seq_len: int) -> tuple[int | None, bool]:
    if _packed(source):
        return _samples(source, seq_len) * seq_len, True
    return source.tokens, False


def _samples(source: DataSourceConfig, seq_len: int) -> int:
    from telechat_twins.core.data.packed import PackedDataset  # not needed before the data are there

    return PackedDataset(source.path).num_samples(seq_len)
