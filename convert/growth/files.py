"""Growth of a canonical checkpoint: streamed from its pieces and written atomically beside the source."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import yaml

from telechat_twins.convert.growth.plan import GrowthPlan, Options, plan_growth
from telechat_twins.convert.growth.weights import grow_state, grow_weights, planned_state, planned_weights
from telechat_twins.convert.source import checkpoint_config
from telechat_twins.core.checkpoint.pieces import Planned
from telechat_twins.core.checkpoint.read import Checkpoint, TensorPiece, open_checkpoint, write_checkpoint
from telechat_twins.core.files.prefetch import ahead
from telechat_twins.core.files.safetensors import DTYPES
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.growth import read_history
from telechat_twins.core.model.params import parameter_table

# A model that a run can name: its configuration, without the state of its masks, which the checkpoint holds.
MODEL_FILE = "model.yaml"


def plan_checkpoint(checkpoint: Checkpoint, target: ModelConfig, options: Options) -> GrowthPlan:
    """plan_growth from a checkpoint's model, at the step it was saved at."""
    trainer = checkpoint.trainer or {}
    step, updates = int(trainer.get("step", 0)), int(trainer.get("optimizer_steps", 0))
    return plan_growth(checkpoint_config(checkpoint), target, options, step, updates)


def grow_checkpoint(
    checkpoint: Checkpoint,
    target: Path,
    plan: GrowthPlan,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> None:
    """Write the grown model of ``plan`` to ``target``: weights, and m and v where the checkpoint has them.

    The step, the data position and all else of the training state stay; the growth joins the model's history, from
    which the age of every entry follows. ``on_bytes`` is called with each piece's bytes as it is written. The source is
    verified meanwhile; UserError, and no target, if a file of it is altered.
    """
    where = str(checkpoint.path / "model.json")
    history = [growth.to_dict() for growth in (*read_history(checkpoint.model, where), plan.growth)]
    trainer = copy.deepcopy(checkpoint.trainer)
    if trainer is not None:
        trainer["config"]["model"] = plan.config.to_dict()
    dtype = checkpoint.dtype("weights", "embed.weight")
    # Weights take the processor, m and v the disk: they are made beside each other, each from an opening of its own.
    second = open_checkpoint(checkpoint.path, verify=False)
    weights = grow_weights(plan, lambda name, box: checkpoint.read("weights", name, box), dtype)
    state = grow_state(plan, lambda name, box: second.read("optimizer", name, box))
    sizes = grown_bytes(checkpoint, plan)
    specs = planned_weights(plan, lambda name: checkpoint.dtype("weights", name), dtype)
    with ThreadPoolExecutor(1, "verify") as beside, tempfile.TemporaryDirectory(prefix="tele-grow-") as folder:
        verified = beside.submit(open_checkpoint, checkpoint.path)
        described = Path(folder) / MODEL_FILE
        described.write_text(model_yaml(plan.config), encoding="utf-8")
        write_checkpoint(
            target,
            checkpoint.step,
            model={"config": plan.config.to_dict(), "grown": history},
            weights=_counted(ahead(weights), on_bytes),
            optimizer=_after(_counted(ahead(state), on_bytes) if checkpoint.names("optimizer") else (), verified),
            trainer=trainer,
            assets=[*(asset for asset in checkpoint.assets if asset.name != MODEL_FILE), described],
            planned={"weights": Planned(specs, sizes[0]), "optimizer": Planned(planned_state(plan), sizes[1])},
        )


def model_yaml(config: ModelConfig) -> str:
    """What a run's ``model`` may name to have this model."""
    # Null is what other fields are without an entry; here it means that there is no padding token.
    kept = {name: value for name, value in config.to_dict().items() if value is not None or name == "pad_token_id"}
    return yaml.safe_dump({name: value for name, value in kept.items() if name != "growth"}, sort_keys=False)


def grown_bytes(checkpoint: Checkpoint, plan: GrowthPlan) -> tuple[int, int]:
    """Bytes of the grown checkpoint's weights, and of its m and v."""
    parameters = sum(spec.size for spec in parameter_table(plan.config).values())
    weights = parameters * checkpoint.dtype("weights", "embed.weight").itemsize
    return weights, 2 * parameters * DTYPES["F32"].itemsize if checkpoint.names("optimizer") else 0


def _after(pieces: Iterable[TensorPiece], verified: Future[Checkpoint]) -> Iterator[TensorPiece]:
    """The pieces, and then the verdict on what they came from, before what was written is let appear."""
    yield from pieces
    verified.result()


def _counted(pieces: Iterable[TensorPiece], on_bytes: Callable[[int], object]) -> Iterator[TensorPiece]:
    for piece in pieces:
        on_bytes(piece.array.nbytes)
        yield piece
        del piece  # or it would stay in memory while the next one is made
