"""A MindFormers run (its YAML for ``run_mindformer.py``) <-> a run's config here, key by key.

Every key of the source is either carried or listed with the reason why it is not; none is passed over. MindFormers'
global batch is batch_size x data_parallel x micro_batch_num x micro_batch_interleave_num, and runner_config.batch_size
takes the place of train_dataset.batch_size (mindformers/dataset/utils.py, base_trainer.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from telechat_twins.convert.mindformers.carried import Carried, reason_outside
from telechat_twins.convert.mindformers.config import FIELDS, model_section, read_model_section
from telechat_twins.convert.mindformers.model_keys import SECTION, reason_of
from telechat_twins.core.config import RunConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.lora import LoraConfig
from telechat_twins.core.schema import from_mapping
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

SCHEDULES = {"CosineWithWarmUpLR": "cosine", "LinearWithWarmUpLR": "linear", "ConstantWarmUpLR": "constant"}
UNNAMED_DATA = "data/packed"


def from_mindformers(tree: JsonObject, where: str) -> Carried:
    """Our mapping from a MindFormers YAML; of one of prediction, which says nothing of training, without the sections
    ``train`` and ``optim``. UserError for a model or value that cannot be trained here."""
    out = Carried()
    flat = dict(_flat(tree))
    section = _mapping(tree, "model", where).get("model_config")
    if not isinstance(section, dict):
        raise UserError(
            f"{where}: has no section model.model_config; give the .yaml that MindFormers runs a model with"
        )
    if "pretrained_model_dir" in tree and "vocab_size" not in section:
        raise UserError(
            f"{where}: pretrained_model_dir names the folder whose config.json has the model; tele train reads it "
            "(train.init), and so does tele convert --config"
        )
    # seq_length is that of the run's rows; the model may reach further.
    reach = {key for key in ("max_position_embedding", "max_position_embeddings") if section.get(key)}
    kept = {key: value for key, value in section.items() if key != "seq_length" or not reach}
    model, notes = read_model_section(kept, where)
    out.notes += notes
    out.values["model"] = model.to_dict()
    out.carried["model.model_config"] = "model"
    out.put("model.model_config.seq_length", "data.seq_len", section.get("seq_length", model.max_seqlen))
    out.values["data"] = {"sources": [{"path": UNNAMED_DATA}], **out.values["data"]}
    _check_sections(tree, where)
    _check_kinds(flat, where)
    _check_outside(tree, where)
    if trains(tree):
        _batches(flat, out, where)
        _optimizer(flat, out, where)
        _schedule(flat, out, where)
    else:
        out.notes.append(f"{where}: is a YAML of prediction; add the sections train and optim before tele train")
        out.left |= {key: "of training" for key in flat if key == "seed" or key.endswith(".micro_batch_num")}
    for key, target, convert in _SIMPLE:
        if flat.get(key) is not None and key not in out.left:
            out.put(key, target, convert(flat[key]))
    _stages(flat, section, model.num_layers, out, where)
    if trains(tree):
        _precision(section, out)
        _recompute(flat, out)
    _callbacks(tree.get("callbacks"), out, where)
    _lora(section.get("pet_config") or _mapping(tree, "model", where).get("pet_config"), out, where)
    held = {*out.carried}
    for key in flat:
        if key not in held and key not in out.left and not _inside(key):
            out.left[key] = _reason(key)
    return out


def trains(tree: JsonObject) -> bool:
    """Whether a MindFormers YAML says how a model is trained: all do but those of prediction without a recipe."""
    recipe = tree.get("runner_config"), tree.get("lr_schedule")
    return tree.get("run_mode") != "predict" or None not in recipe


def _check_outside(tree: JsonObject, where: str) -> None:
    """UserError for what changes the model or the learning rate from outside the model's section."""
    experts = tree.get("moe_config")
    if isinstance(experts, dict) and experts.get("expert_num") not in (None, 0, 1):
        raise UserError(
            f"{where}: expert_num is {shown(experts['expert_num'])} in moe_config; mixtures of experts are not "
            "supported"
        )
    if tree.get("lr_scale"):
        raise UserError(
            f"{where}: lr_scale multiplies the learning rate by batch and devices over lr_scale_factor; set "
            "lr_schedule.learning_rate to the product and lr_scale to False"
        )


_SIMPLE: tuple[tuple[str, str, type], ...] = (
    ("seed", "train.seed", int),
    ("lr_schedule.learning_rate", "optim.lr", float),
    ("lr_schedule.lr_end", "optim.min_lr", float),
    ("lr_schedule.warmup_steps", "optim.warmup_steps", int),
    ("lr_schedule.warmup_ratio", "optim.warmup_ratio", float),
    ("parallel_config.data_parallel", "parallel.dp", int),
    ("parallel_config.model_parallel", "parallel.tp", int),
    ("parallel_config.pipeline_stage", "parallel.pp", int),
    ("parallel_config.context_parallel", "parallel.cp", int),
    ("parallel_config.use_seq_parallel", "parallel.sequence_parallel", bool),
    ("parallel.enable_parallel_optimizer", "parallel.zero1", bool),
    ("model.model_config.pp_interleave_num", "parallel.virtual", int),
    ("model.model_config.use_eod_reset", "data.isolate_documents", bool),
    ("model.model_config.eod_reset", "data.isolate_documents", bool),
)


_WHOLE = (
    "runner_config.batch_size", "train_dataset.batch_size", "runner_config.gradient_accumulation_steps",
    "parallel_config.micro_batch_num", "micro_batch_interleave_num",
)  # fmt: skip
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}


def _check(value: object, kind: type, key: str, where: str) -> None:
    """UserError for a value that is not of its kind: what a quoted number or a list means is not guessed."""
    legal = (int, float) if kind is float else (kind,)
    if not isinstance(value, legal) or isinstance(value, bool) != (kind is bool):
        raise UserError(f"{where}: {key} must be {_KINDS[kind]}, found {shown(value)}")


_SECTIONS = (
    "runner_config", "optimizer", "lr_schedule", "parallel_config", "parallel", "recompute_config", "runner_wrapper",
    "train_dataset",
)  # fmt: skip


def _check_sections(tree: JsonObject, where: str) -> None:
    """UserError for a section of another kind: none of its keys would be found."""
    for name in _SECTIONS:
        if tree.get(name) is not None and not isinstance(tree[name], dict):
            raise UserError(f"{where}: {name} must be a mapping, found {shown(tree[name])}")
    if tree.get("callbacks") is not None and not isinstance(tree["callbacks"], list):
        raise UserError(f"{where}: callbacks must be a list, found {shown(tree['callbacks'])}")


def _check_kinds(flat: JsonObject, where: str) -> None:
    """UserError for a key that is carried whose value is of another kind."""
    kinds = {key: kind for key, _, kind in _SIMPLE} | dict.fromkeys(_WHOLE, int)
    kinds |= {"runner_config.epochs": float, "runner_wrapper.max_grad_norm": float, "lr_schedule.type": str}
    kinds |= {"optimizer.type": str, "runner_wrapper.use_clip_grad": bool}
    kinds |= {f"optimizer.{name}": float for name in ("learning_rate", *_DEFAULTS["AdamW"])}
    for key, kind in kinds.items():
        if flat.get(key) is not None:
            _check(flat[key], kind, key, where)
    for key, kind in (("optimizer.betas", float), ("model.model_config.offset", int)):
        found = flat.get(key)
        for row in found if isinstance(found, list) else ():
            for one in row if isinstance(row, list) and kind is int else [row]:  # offset has a row for each chunk
                _check(one, kind, key, where)


def _batches(flat: JsonObject, out: Carried, where: str) -> None:
    micro = flat.get("runner_config.batch_size") or flat.get("train_dataset.batch_size")
    if micro is None:
        raise UserError(
            f"{where}: runner_config.batch_size is missing; it says how many sequences a device holds, add it"
        )
    pieces = flat.get("parallel_config.micro_batch_num") or 1
    # Without a pipeline MindFormers has no micro-batches.
    count = int(pieces) if (flat.get("parallel_config.pipeline_stage") or 1) > 1 else 1
    count *= int(flat.get("micro_batch_interleave_num") or 1) * int(
        flat.get("runner_config.gradient_accumulation_steps") or 1
    )
    ranks = int(flat.get("parallel_config.data_parallel") or 1)
    out.put("runner_config.batch_size", "train.micro_batch", int(micro))
    out.put("parallel_config.micro_batch_num", "train.global_batch", int(micro) * ranks * count)
    if "runner_config.gradient_accumulation_steps" in flat:
        out.carried["runner_config.gradient_accumulation_steps"] = "train.global_batch"
    if "micro_batch_interleave_num" in flat:
        out.carried["micro_batch_interleave_num"] = "train.global_batch"
    steps = flat.get("lr_schedule.total_steps")
    if isinstance(steps, int) and steps > 0:
        out.put("lr_schedule.total_steps", "train.steps", steps)
        out.left["runner_config.epochs"] = "lr_schedule.total_steps says when the run ends"
    elif flat.get("runner_config.epochs"):
        out.put("runner_config.epochs", "train.epochs", float(flat["runner_config.epochs"]))
        if steps is not None:
            out.carried["lr_schedule.total_steps"] = "train.epochs"  # -1: the length of the data


# MindFormers' values where an optimizer's YAML has none (mindformers/core/optim, base_trainer.py).
_DEFAULTS = {
    "AdamW": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
    "FP32StateAdamWeightDecay": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.0},
}


def _optimizer(flat: JsonObject, out: Carried, where: str) -> None:
    kind = flat.get("optimizer.type")
    if kind not in (*_DEFAULTS, "adamw", None):
        raise UserError(f"{where}: optimizer.type {shown(kind)} is not AdamW, which is all there is here")
    if "optimizer.type" in flat:
        out.carried["optimizer.type"] = "optim"
    betas = flat.get("optimizer.betas")
    if isinstance(betas, list) and len(betas) == 2:
        out.put("optimizer.betas", "optim.beta1", float(betas[0]))
        out.put("optimizer.betas", "optim.beta2", float(betas[1]))
        out.carried["optimizer.betas"] = "optim.beta1, optim.beta2"
    for name, default in _DEFAULTS.get(str(kind), _DEFAULTS["AdamW"]).items():
        key = f"optimizer.{name}"
        if flat.get(key) is not None:
            out.put(key, f"optim.{name}", float(flat[key]))
        elif not (name.startswith("beta") and "optimizer.betas" in out.carried):
            out.values["optim"] = {**out.values.get("optim", {}), name: default}
            out.notes.append(f"{where}: {key} is missing; MindFormers' default {default} is taken")
    if flat.get("lr_schedule.learning_rate") is None and flat.get("optimizer.learning_rate") is not None:
        out.put("optimizer.learning_rate", "optim.lr", float(flat["optimizer.learning_rate"]))
        out.values["optim"]["schedule"] = "constant"


def _schedule(flat: JsonObject, out: Carried, where: str) -> None:
    kind = flat.get("lr_schedule.type")
    if kind is not None:
        if kind not in SCHEDULES:
            raise UserError(f"{where}: lr_schedule.type {shown(kind)} is not one of {', '.join(SCHEDULES)}")
        out.put("lr_schedule.type", "optim.schedule", SCHEDULES[str(kind)])
    clipped = flat.get("runner_wrapper.use_clip_grad")
    if clipped is None:  # the wrapper of a pipeline clips unless told otherwise, the other one does not
        clipped = (flat.get("parallel_config.pipeline_stage") or 1) > 1
        out.notes.append(f"{where}: runner_wrapper.use_clip_grad is missing; MindFormers' default {clipped} is taken")
    limit = float(flat.get("runner_wrapper.max_grad_norm") or 1.0) if clipped else 0.0
    out.put("runner_wrapper.use_clip_grad", "optim.clip_grad", limit)
    if "runner_wrapper.max_grad_norm" in flat:
        out.carried["runner_wrapper.max_grad_norm"] = "optim.clip_grad"
    if flat.get("lr_schedule.warmup_ratio") is not None and flat.get("lr_schedule.warmup_steps") is not None:
        out.left["lr_schedule.warmup_steps"] = "lr_schedule.warmup_ratio takes its place in MindFormers"
    if kind == "ConstantWarmUpLR" and flat.get("lr_schedule.lr_end") is not None:
        out.left["lr_schedule.lr_end"] = "a constant schedule does not reach it"


def _precision(section: JsonObject, out: Carried) -> None:
    compute = section.get("compute_dtype")
    weights = section.get("param_init_type", section.get("params_dtype"))
    found = {types: name for name, types in _TYPES.items()}.get((str(compute), str(weights)))
    if found is not None:
        out.put("model.model_config.compute_dtype", "train.precision", found)
    else:
        out.left["model.model_config.compute_dtype"] = f"{compute} with weights in {weights} is no precision here"


# Our precisions: MindFormers' compute_dtype and param_init_type.
_TYPES = {
    "amp": ("bfloat16", "float32"), "bf16": ("bfloat16", "bfloat16"), "fp16": ("float16", "float16"),
    "fp32": ("float32", "float32"),
}  # fmt: skip


def _recompute(flat: JsonObject, out: Carried) -> None:
    recompute, selective = flat.get("recompute_config.recompute"), flat.get("recompute_config.select_recompute")
    kind = "full" if recompute else "selective" if selective else "none"
    for key, value in (("recompute_config.recompute", recompute), ("recompute_config.select_recompute", selective)):
        out.put(key, "train.recompute", kind)
        if value is None:
            del out.carried[key]
        elif not isinstance(value, bool):
            del out.carried[key]
            out.left[key] = f"layers of each stage are not told apart here; train.recompute is {kind}"


def _callbacks(callbacks: object, out: Carried, where: str) -> None:
    targets = {"save_checkpoint_steps": "checkpoint.every", "keep_checkpoint_max": "checkpoint.keep_last"}
    for one in callbacks if isinstance(callbacks, list) else ():
        if isinstance(one, dict) and one.get("type") == "CheckpointMonitor":
            for key, target in targets.items():
                if one.get(key):
                    _check(one[key], int, f"callbacks: {key}", where)
                    out.put(f"callbacks.CheckpointMonitor.{key}", target, int(one[key]))


def _stages(flat: JsonObject, section: JsonObject, layers: int, out: Carried, where: str) -> None:
    """``offset``: by how many layers each pipeline stage differs from an equal share, of each chunk in turn."""
    key, offset = "model.model_config.offset", section.get("offset")
    if offset is None:
        return
    if not isinstance(offset, list) and (type(offset) is not int or offset != 0):
        raise UserError(f"{where}: {key} must be 0 or a list of whole numbers, found {shown(offset)}")
    ranks, chunks = int(flat.get("parallel_config.pipeline_stage") or 1), int(section.get("pp_interleave_num") or 1)
    rows = offset if isinstance(offset, list) else []
    flat_offset = [n for row in rows for n in (row if isinstance(row, list) else [row])]
    stages = [layers // (ranks * chunks) + n for n in flat_offset]
    if rows and len(stages) == ranks * chunks and sum(stages) == layers:
        out.put(key, "parallel.stage_layers", stages)
    elif rows and ranks > 1:
        raise UserError(
            f"{where}: {key} is {shown(offset)}; with {ranks} stages of {chunks} chunks it does not make up the "
            f"{layers} layers"
        )
    else:
        out.left[key] = "there is one stage, without a pipeline" if rows else "an equal share of the layers a stage"


# Keys of pet_config (mindformers/pet/pet_config.py): MindFormers' default and where the value goes; why it is left.
_PET = {"lora_rank": (8, "rank"), "lora_alpha": (16, "alpha"), "lora_dropout": (0.01, "dropout")}
_PET_LEFT = {
    "lora_a_init": "A begins as a normal draw here", "lora_b_init": "B begins as 0 here",
    "param_init_type": "adapters are float32 in training", "compute_dtype": "train.precision is the model's and theirs",
}  # fmt: skip
_PET_REFUSED = {
    "exclude_layers": "name the layers with an adapter in target_modules",
    "freeze_include": "all of the base is frozen here",
    "freeze_exclude": "all of the base is frozen here",
}


def _lora(pet: object, out: Carried, where: str) -> None:
    if pet is None:
        return
    if not isinstance(pet, dict):
        raise UserError(f"{where}: pet_config: expected keys with values, found {shown(pet)}")
    if pet.get("pet_type") != "lora":
        raise UserError(
            f"{where}: pet_config.pet_type {shown(pet.get('pet_type'))} is not lora, which is all there is here"
        )
    for key, value in pet.items():
        if key in _PET_REFUSED and value not in (None, "", [], ()):
            raise UserError(f"{where}: pet_config.{key}: {shown(value)} is not taken over: {_PET_REFUSED[key]}")
        if key not in ("pet_type", "target_modules", *_PET, *_PET_LEFT, *_PET_REFUSED):
            raise UserError(f"{where}: pet_config.{key}: not a key of MindFormers' LoRA; correct or remove it")
        if key in _PET_LEFT:
            out.left[f"model.model_config.pet_config.{key}"] = _PET_LEFT[key]
    modules = pet.get("target_modules")
    if not isinstance(modules, str) or not modules.strip():
        raise UserError(f"{where}: pet_config.target_modules: must name the adapted layers, found {shown(modules)}")
    lora = {name: default if pet.get(key) is None else pet[key] for key, (default, name) in _PET.items()}
    lora["targets"] = [name for word in modules.split("|") if (name := word.strip().strip(".*"))]
    try:
        lora_config = from_mapping(LoraConfig, lora, "lora")
    except UserError as error:
        raise UserError(f"{where}: pet_config: {error}") from None
    out.put("model.model_config.pet_config", "lora", {**lora, "targets": lora_config.targets})


def to_mindformers_yaml(config: RunConfig) -> Carried:
    """MindFormers' mapping from a run's config, over the recipe of its repository. UserError for a model that it does
    not have."""
    out = Carried()
    section = {**model_section(config.model, "plain"), "max_position_embedding": config.model.max_seqlen}
    out.put("model", "model.model_config", section)
    ranks, train, optim, layout = config.parallel.dp, config.train, config.optim, config.parallel
    pieces = train.global_batch // (train.micro_batch * ranks)
    pieces_key = "parallel_config.micro_batch_num" if layout.pp > 1 else "runner_config.gradient_accumulation_steps"
    for key, target, value in (
        ("train.seed", "seed", train.seed),
        ("train.micro_batch", "runner_config.batch_size", train.micro_batch),
        ("train.global_batch", pieces_key, pieces),
        ("data.seq_len", "model.model_config.seq_length", config.data.seq_len),
        ("optim.beta1", "optimizer.betas", [optim.beta1, optim.beta2]),
        ("optim.eps", "optimizer.eps", optim.eps),
        ("optim.weight_decay", "optimizer.weight_decay", optim.weight_decay),
        ("optim.lr", "lr_schedule.learning_rate", optim.lr),
        ("optim.min_lr", "lr_schedule.lr_end", optim.min_lr),
        ("optim.warmup_steps", "lr_schedule.warmup_steps", optim.warmup_steps),
        ("optim.clip_grad", "runner_wrapper.use_clip_grad", optim.clip_grad > 0),
        ("parallel.dp", "parallel_config.data_parallel", layout.dp),
        ("parallel.tp", "parallel_config.model_parallel", layout.tp),
        ("parallel.pp", "parallel_config.pipeline_stage", layout.pp),
        ("parallel.cp", "parallel_config.context_parallel", layout.cp),
        ("parallel.sequence_parallel", "parallel_config.use_seq_parallel", layout.sequence_parallel),
        ("parallel.zero1", "parallel.enable_parallel_optimizer", layout.zero1),
        ("train.recompute", "recompute_config.recompute", train.recompute == "full"),
        ("checkpoint.every", "callbacks", [{
            "type": "CheckpointMonitor", "save_checkpoint_steps": config.checkpoint.every or 1000,
            "keep_checkpoint_max": config.checkpoint.keep_last,
        }]),
    ):  # fmt: skip
        out.put(key, target, value)
    _put_rest(config, out)
    defaults = RunConfig.__dataclass_fields__
    for key in _flat_keys(config.to_dict()):
        held = any(key == one or key.startswith(f"{one}.") for one in out.carried)
        if not held and key not in out.left and key.partition(".")[0] in defaults:
            out.left[key] = (
                "has no counterpart in MindFormers"
                if not key.startswith("data.sources")
                else "pack MindRecord data with its own tools"
            )
    return out


def _put_rest(config: RunConfig, out: Carried) -> None:
    """What MindFormers spells in several keys, or has no word for."""
    train, optim, layout = config.train, config.optim, config.parallel
    out.values["optimizer"]["type"] = "AdamW"
    out.carried |= {"optim.beta2": "optimizer.betas", "checkpoint.keep_last": "callbacks"}
    if optim.warmup_ratio is not None:
        out.put("optim.warmup_ratio", "lr_schedule.warmup_ratio", optim.warmup_ratio)
        del out.values["lr_schedule"]["warmup_steps"], out.carried["optim.warmup_steps"]
    schedules = {ours: theirs for theirs, ours in SCHEDULES.items()}
    if optim.schedule in schedules:
        out.put("optim.schedule", "lr_schedule.type", schedules[optim.schedule])
    else:
        out.left["optim.schedule"] = f"MindFormers has no {optim.schedule}"
    if layout.stage_layers:
        share, rows = config.model.num_layers // layout.stages, layout.stage_layers
        offset = [[n - share for n in rows[at : at + layout.pp]] for at in range(0, len(rows), layout.pp)]
        out.put("parallel.stage_layers", "model.model_config.offset", offset if layout.virtual > 1 else offset[0])
    if layout.virtual > 1:
        out.put("parallel.virtual", "model.model_config.pp_interleave_num", layout.virtual)
    if train.recompute == "selective":
        out.put("train.recompute", "recompute_config.select_recompute", True)
    if train.epochs is not None:
        out.put("train.epochs", "runner_config.epochs", train.epochs)
        out.values["lr_schedule"]["total_steps"] = -1
    else:
        out.put("train.steps", "lr_schedule.total_steps", train.steps)
    if train.precision in _TYPES:
        compute, weights = _TYPES[train.precision]
        out.put("train.precision", "model.model_config.compute_dtype", compute)
        out.values["model"]["model_config"]["param_init_type"] = weights
    else:
        out.left["train.precision"] = f"MindFormers has no {train.precision}"
    if config.model.family == "telechat3":
        out.put("data.isolate_documents", "model.model_config.eod_reset", config.data.isolate_documents)
    if config.lora is not None:
        out.left["lora"] = "give --base and convert the adapter; pet_config is written by hand"


def _flat(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _flat_keys(tree: JsonObject) -> list[str]:
    return [key for key, _ in _flat(tree)]


def _mapping(tree: JsonObject, key: str, where: str) -> JsonObject:
    value = tree.get(key)
    if not isinstance(value, dict):
        raise UserError(f"{where}: has no section {key}; give the .yaml that MindFormers runs a model with")
    return value


def _inside(key: str) -> bool:
    """Whether a key is in the model itself: a field of it, or one of its adapters."""
    return _name_in_section(key) in FIELDS or key.startswith("model.pet_config")


def _name_in_section(key: str) -> str:
    """Of a dotted key in the model's section its first part there; "" for a key elsewhere."""
    return key.removeprefix(f"{SECTION}.").partition(".")[0] if key.startswith(f"{SECTION}.") else ""


def _reason(key: str) -> str:
    if name := _name_in_section(key):
        return reason_of(name) or "has no value"  # another one is refused
    return reason_outside(key)
