"""Start of a run from the weights of another model (`train.init`): what must fit, and what travels with the run.

Optimizer, schedule, data position and step are those of a new run; only weights are taken over. Each rank reads the
boxes that it holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from telechat_twins.core.checkpoint.fingerprint import fingerprint
from telechat_twins.core.checkpoint.read import Checkpoint, open_checkpoint
from telechat_twins.core.checkpoint.save import Asset
from telechat_twins.core.checkpoint.source import OpenInitial, ReadBox, WeightSource
from telechat_twins.core.config import RunConfig
from telechat_twins.core.data.encoders.special import read_special
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.model.lora import AdapterRecord, described_ranks
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

# Fields of ModelConfig in which a run may differ from the model it starts from. None changes what the weights compute:
# the longest row, which rows of the vocabulary pad, how new weights would be drawn, the rounding of rotary tables, and
# where generation ends. Masks of growth are taken over.
FREE = ("max_seqlen", "vocab_size", "vocab_tokens", "init_std", "matrix_init_std", "table_dtype", "end_token_ids")
VOCABULARY = ("embed.weight", "head.weight")
TOKENIZER, GROWN_MODEL = "tokenizer.model", "model.yaml"


@dataclass(frozen=True)
class Lineage:
    """What a run's checkpoints pass on besides its own state.

    ``release``: config and file layout of the release that the weights came from (model.json's "hf"), so that the run
    can be exported; ``assets``: that release's small files, without the tokenizer.model, which is the data's;
    ``init``: path and fingerprint of the weights that the run began from (trainer.json).
    """

    release: JsonObject | None = None
    assets: Sequence[Asset] = ()
    init: JsonObject | None = None

    @property
    def model_entries(self) -> JsonObject:
        """Its part of model.json."""
        return {} if self.release is None else {"hf": self.release}

    @property
    def trainer_entries(self) -> JsonObject:
        """Its part of trainer.json."""
        return {} if self.init is None else {"init": self.init}


def lineage_of(model: Checkpoint | WeightSource, first: bool, init: JsonObject | None = None) -> Lineage:
    """The lineage of a checkpoint that is resumed, or of weights that a run begins from (then with ``init``).

    Small files are read on the ``first`` rank only, which writes them.
    """
    if isinstance(model, Checkpoint):
        release = model.model.get("hf")
        init = (model.trainer or {}).get("init")
    else:
        release = model.record
    kept = [path for path in model.assets if path.name not in (TOKENIZER, GROWN_MODEL)] if first else []
    return Lineage(release, tuple(Asset(path.name, path.read_bytes()) for path in kept), init)


def init_override(folder: str | None) -> list[str]:
    """``--init`` as an override of the config (core.schema.set_dotted)."""
    return [] if folder is None else [f"train.init={json.dumps(os.path.abspath(folder), ensure_ascii=False)}"]


def is_new(out: Path) -> bool:
    """Whether a run's folder has no checkpoint yet: ``--resume auto`` then begins anew."""
    return not (out / "latest").exists()


def model_of_run(init: str, out: Path, resume: str | None, open_initial: OpenInitial | None) -> ModelConfig:
    """The model of a run whose config has no ``model:``: of the checkpoint to resume if there is one, else of
    ``train.init``."""
    if resume is not None and (resume != "auto" or not is_new(out)):
        checkpoint = open_checkpoint(out if resume == "auto" else resume, verify=False)
        return load_model_config(checkpoint.model["config"], f"{checkpoint.path / 'model.json'}: config")
    return _opened(init, None, open_initial).config


def open_start(config: RunConfig, open_initial: OpenInitial | None) -> WeightSource:
    """The model that ``train.init`` names, opened and held against the run's; UserError where it does not fit."""
    assert config.train.init is not None
    source = _opened(config.train.init, config.model, open_initial)
    require_fitting_model(source, config.model)
    return source


def _opened(init: str, model: ModelConfig | None, open_initial: OpenInitial | None) -> WeightSource:
    if open_initial is None:
        raise UserError("train.init: this way of training reads no other model's weights; leave it out")
    return open_initial(init, model)


def require_fitting_model(source: WeightSource, model: ModelConfig) -> None:
    """UserError, naming the first field that differs, unless the run's model computes what the source's does."""
    theirs, ours = source.config.to_dict(), model.to_dict()
    for name in (field.name for field in dataclasses.fields(ModelConfig)):
        # A field that says nothing may be absent from a mapping.
        if name not in FREE and name != "growth" and theirs.get(name) != ours.get(name):
            raise UserError(
                f"model.{name}: the run has {ours.get(name)}, {source.path} has {theirs.get(name)}; leave `model:` out "
                f"to take the model of train.init. Only {', '.join(FREE)} may differ"
            )
    if model.num_tokens > source.config.vocab_size:
        raise UserError(
            f"model.vocab_size: {model.num_tokens} of the run's {model.vocab_size} rows stand for tokens, "
            f"{source.path} has {source.config.vocab_size} rows; later rows must be padding (set model.vocab_tokens)"
        )
    growth = source.config.growth
    if growth is not None and growth.mask > 0.0:
        raise UserError(
            f"{source.path}: its masks of growth are at {growth.mask:g}; go on with --resume until they are 1, and "
            "start from the checkpoint after that"
        )


def adopt_start(source: WeightSource, config: RunConfig) -> RunConfig:
    """``config`` with the masks of a grown model, which begin at this run's first step."""
    growth = source.config.growth
    growth = None if growth is None else dataclasses.replace(growth, start_step=0)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, growth=growth))


def describe_start(source: WeightSource, model: ModelConfig, digest: str) -> list[str]:
    """Lines for the log of a run of ``model``."""
    lines = [
        f"starts from the weights of {source.path} (fingerprint {digest[:12]}); optimizer, schedule and data position "
        "are new"
    ]
    rows = source.config.vocab_size
    if model.vocab_size < rows:
        lines.append(f"note: of the {rows} rows of its vocabulary the first {model.vocab_size} are taken")
    elif model.vocab_size > rows:
        lines.append(f"note: {model.vocab_size - rows} rows are added to its vocabulary of {rows} as padding of zeros")
    return lines + [f"note: {note}" for note in source.notes]


def added_note(source: WeightSource, model: ModelConfig) -> list[str]:
    """A warning where a token that was added to the source's tokenizer has a row that ``model`` does not use."""
    beside = {path.parent for path in source.assets}
    lines = []
    for folder in sorted(beside):
        rows: dict[str, int] = {}
        with contextlib.suppress(UserError):  # the data have a tokenizer of their own
            rows = {name: index for name, index in read_special(folder).described.items() if index is not None}
        behind = sorted(name for name, index in rows.items() if model.num_tokens <= index < source.config.vocab_size)
        if behind:
            lines.append(
                f"warning: {folder}: {shown(behind[0])} was added to its tokenizer with id {rows[behind[0]]} and is "
                f"none of the {model.num_tokens} pieces that the data were packed with: its row is not used. "
                "Pack with the tokenizer.json that holds it, which transformers writes"
            )
    return lines


def tokenizer_note(source: WeightSource, name: str, packed: bytes) -> list[str]:
    """A warning where the data were packed with another tokenizer (file ``name``) than the one beside the weights."""
    own = next((path for path in source.assets if path.name == name), None)
    if own is None or own.read_bytes() == packed:
        return []
    return [
        f"warning: the data were packed with another {name} than {own}; ids may stand for other text than the weights "
        f"have learnt. Pack with --tokenizer {own}"
    ]


def start_record(source: WeightSource) -> JsonObject:
    """``init`` of trainer.json."""
    return {"path": str(source.path.resolve()), "fingerprint": fingerprint(source.config, source.read)}


def start_reader(source: WeightSource, model: ModelConfig) -> ReadBox:
    """``read(name, box)`` of the source as the run's model: its vocabulary may have fewer or more rows of padding.

    Rows that the source does not have are zeros.
    """
    rows = source.config.vocab_size
    if model.vocab_size <= rows:
        return source.read

    def read(name: str, box: tuple[slice, ...]) -> np.ndarray:
        if name not in VOCABULARY or box[0].stop <= rows:
            return source.read(name, box)
        held = source.read(name, (slice(min(box[0].start, rows), rows), *box[1:]))
        return np.pad(held, ((0, box[0].stop - box[0].start - held.shape[0]), (0, 0)))

    return read


def require_base(config: RunConfig) -> None:
    """UserError for a run with `lora` that names no base."""
    if config.lora is not None and config.train.init is None:
        raise UserError(
            "lora: adapters are trained on the weights of a model; set train.init (--init DIR) to that model, or leave "
            "`lora:` out to train a model from its initial weights"
        )


def describe_adapter(record: AdapterRecord) -> str:
    """A line for the log."""
    base, modules = record.base, record.modules or []
    dropout = f", dropout {record.dropout:g}" if record.dropout else ""
    alphas = [module.alpha for module in modules] or [record.alpha]
    alpha = f"{min(alphas):g}{'' if min(alphas) == max(alphas) else f' to {max(alphas):g}'}"
    return (
        f"trains adapters of {described_ranks(record, [m.rank for m in modules])}, alpha {alpha}{dropout}, of "
        f"{base.path} (fingerprint {base.fingerprint[:12]}), which is frozen"
    )
