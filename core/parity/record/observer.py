"""Where the values of a site on one rank lie in the site's whole tensor, [B, S, ...] of the global batch.

A backend's observe.py hands over what a model chunk computed for one micro-batch; here the layout is undone: rows of
the data-parallel rank, zigzag places and padding of the sequence, shards of sequence parallelism, columns of tensor
parallelism, copies that several ranks hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from telechat_twins.core.config import RunConfig
from telechat_twins.core.parallel.layout import Coord
from telechat_twins.core.parallel.sequence import LocalBatch
from telechat_twins.core.parallel.sharding import kv_copies, padded_rows
from telechat_twins.core.parity.record.sites import Site
from telechat_twins.core.parity.record.sketch import in_turn
from telechat_twins.core.parity.record.tally import Tally
from telechat_twins.core.parity.record.window import Rows

_COLUMNS = ("q", "rope_q", "core", "gate", "up", "act")  # split over tensor ranks by columns
_KEYS = ("k", "v", "rope_k")  # likewise, and copied where there are more ranks than key heads


class Observer:
    """core.train.trainer.See of one step: adds what it is given to ``tally``.

    places: the model's sites. batches: the rank's micro-batches. first: the number of their first row in the global
    batch. rows: the rows of the global batch, from the first, that are recorded. scale: gradients are divided by it (a
    loss scale).
    """

    def __init__(
        self,
        config: RunConfig,
        places: Sequence[Site],
        coord: Coord,
        batches: Sequence[LocalBatch],
        first: int,
        rows: int,
        scale: float,
        tally: Tally,
    ) -> None:
        self._model, self._layout, self._coord, self._tally = config.model, config.parallel, coord, tally
        self._rows, self._scale = rows, scale
        self._seq_len = batches[0].seq_len
        self._shapes = {site.name: site.shape(rows, self._seq_len) for site in places}
        self._copies = kv_copies(self._model, self._layout)
        self._places = [batch.index for batch in batches]
        starts = np.cumsum([0, *(len(batch.input_ids) for batch in batches)])
        self._first = [first + int(start) for start in starts]
        self._seen: set[tuple[str, int, bool]] = set()
        self._found: dict[tuple[int, bool], tuple[int, Rows, slice | np.ndarray]] = {}  # by micro-batch and split

    def wants(self, micro: int) -> bool:
        return self._first[micro] < self._rows

    def __call__(self, site: str, micro: int, array: np.ndarray, dtype: str, gradient: bool) -> None:
        """Once for each site, micro-batch and kind; what is computed again in a backward pass is not counted again."""
        key = (site, micro, gradient)
        if key in self._seen:
            return
        self._seen.add(key)
        placed = self._columns(site, array.shape[-1], gradient)
        if placed is None:
            return
        column, width = placed
        rows, real = self._matrix_rows(site, micro, array.shape)
        values = array.reshape(-1, array.shape[-1])[real, :width]
        if gradient and self._scale != 1.0:
            values = values / np.asarray(self._scale, values.dtype)
        kind = "activation_grad" if gradient else "activation"
        # Ranks that share a key head have equal keys, and each the part of their gradient that its own queries give.
        summand = gradient and self._copies > 1 and site.rpartition(".")[2] in _KEYS
        add = self._tally.add_summand if summand else self._tally.add
        add(kind, site, self._shapes[site], dtype, values, rows, column)

    def _columns(self, site: str, width: int, gradient: bool) -> tuple[int, int] | None:
        """First column of a shard in the whole tensor, and how many of its columns count; None where another rank
        counts these values."""
        model, layout, t = self._model, self._layout, self._coord.tp
        last = site.rpartition(".")[2]
        if site == "logits":
            first = t * padded_rows(model.vocab_size, layout.tp)
            return first, max(0, min(width, model.num_tokens - first))
        if last in _COLUMNS:
            return t * width, width
        if last in _KEYS:
            if t % self._copies and not gradient:
                return None
            return t // self._copies * width, width
        # The stream: a slice of the positions of each tensor rank, or a copy of it.
        return (0, width) if layout.sequence_parallel or t == 0 else None

    def _matrix_rows(self, site: str, micro: int, shape: Sequence[int]) -> tuple[Rows, slice | np.ndarray]:
        """Rows of the site's matrix, b S + position; those of [b * s] that are recorded and no padding, as a slice
        where they come first and as bool [b * s] otherwise."""
        split = self._split(site.rpartition(".")[2], site)
        if (found := self._found.get((micro, split))) is None:
            places = self._places[micro]  # [b or 1, s]
            if split:
                part = places.shape[1] // self._layout.tp
                places = places[:, self._coord.tp * part : (self._coord.tp + 1) * part]
            found = self._found[micro, split] = (places.shape[1], *self._recorded(places, micro, shape[0]))
        if found[0] != shape[1]:
            raise RuntimeError(f"{site}: {shape[1]} positions on this rank, its batch has {found[0]}")
        return found[1:]

    def _recorded(self, places: np.ndarray, micro: int, height: int) -> tuple[Rows, slice | np.ndarray]:
        numbers = self._first[micro] + np.arange(height, dtype=np.int64)[:, None]
        fine = np.broadcast_to((places < self._seq_len) & (numbers < self._rows), (height, places.shape[1])).reshape(-1)
        count = int(np.count_nonzero(fine))
        real = slice(count) if fine[:count].all() else fine
        rows = (numbers * self._seq_len + places).reshape(-1)[real]
        return range(rows[0], rows[-1] + 1) if len(rows) and in_turn(rows) else rows, real

    def _split(self, last: str, site: str) -> bool:
        """Whether sequence parallelism splits the positions of a site."""
        stream = last not in (*_COLUMNS, *_KEYS) and site != "logits"
        return stream and self._layout.tp > 1 and self._layout.sequence_parallel
