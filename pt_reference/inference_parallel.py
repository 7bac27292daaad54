"""One step of generation through a model that is spread over ranks: stages one after another, logits gathered.

Every rank comes here with the same step, or on a ring with its share of one, as many tokens as the others have. Within
a stage the matrices are split as in training, without sequence parallelism: a step of decoding has too few tokens to
share them out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from telechat_twins.core.parallel.mesh import Mesh
from telechat_twins.pt_reference import ops
from telechat_twins.pt_reference.collectives import all_gather, broadcast, recv, send
from telechat_twins.pt_reference.model import Decoder, Rope
from telechat_twins.pt_reference.ring_pages import Places


def spread(
    stage: Decoder,
    mesh: Mesh,
    ids: Tensor,
    rope: Rope,
    pages: ops.Pages | Places,
    wanted: Tensor | None,
    num_wanted: int,
) -> Tensor:
    """Logits [R * W, V] of the ``wanted`` tokens of all R ranks of a ring, on every rank, from this rank's stage of the
    model; ids [1, N]."""
    config, tokens = stage.config, ids.shape[1]
    x = ids
    if mesh.forward_in is not None:
        x = recv((1, tokens, config.hidden_size), stage.dtypes.residual, mesh.forward_in)
    out = stage(x, rope, pages, wanted)
    sent = None if mesh.forward_out is None else send(out, mesh.forward_out)
    last = mesh.layout.pp - 1
    if mesh.coord.pp == last:
        logits = all_gather(all_gather(out[0], mesh.tp, 1)[:, : config.vocab_size], mesh.cp, 0)
    else:
        logits = torch.zeros(
            (mesh.cp.size * num_wanted, config.vocab_size), dtype=stage.dtypes.compute, device=ids.device
        )
    if sent is not None:
        sent.wait()
    # The stages' ranks are apart by all that a stage has; the first of the last stage tells everybody.
    return logits if last == 0 else broadcast(logits, mesh.world, last * mesh.layout.world // mesh.layout.pp)
