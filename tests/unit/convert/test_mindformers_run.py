"""A MindFormers run's YAML and a run's config here: what is carried, what is listed, the same run on the way back."""

from __future__ import annotations

import argparse
import copy
import resource
from pathlib import Path
from typing import Any

import pytest
import yaml

from telechat_twins.convert.mindformers.config import FIELDS
from telechat_twins.convert.mindformers.run_config import from_mindformers, to_mindformers_yaml
from telechat_twins.core.commands import convert
from telechat_twins.core.config import load_run_config, run_config_from_dict
from telechat_twins.core.errors import UserError
from tests.house import ROOT

# The numbers of TeleChat2-115B's published recipe, without the keys that say nothing here.
RECIPE: dict[str, Any] = {
    "seed": 0, "output_dir": "./output", "run_mode": "finetune",
    "runner_config": {"epochs": 10, "batch_size": 1, "sink_mode": True},
    "optimizer": {"type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
    "lr_schedule": {"type": "CosineWithWarmUpLR", "learning_rate": 1.5e-4, "lr_end": 1.5e-5, "warmup_ratio": 0.0,
                    "total_steps": -1},
    "train_dataset": {"batch_size": 6, "data_loader": {"type": "MindDataset", "dataset_dir": ""}},
    "parallel": {"enable_parallel_optimizer": True, "full_batch": True},
    "parallel_config": {"data_parallel": 8, "model_parallel": 8, "pipeline_stage": 8, "use_seq_parallel": True,
                        "micro_batch_num": 8},
    "micro_batch_interleave_num": 1,
    "recompute_config": {"recompute": False, "select_recompute": True},
    "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 1500, "keep_checkpoint_max": 300}],
    "runner_wrapper": {"type": "MFTrainOneStepCell", "use_clip_grad": True},
    "model": {"model_config": {
        "type": "TelechatConfig", "seq_length": 8192, "hidden_size": 8192, "num_layers": 96, "num_heads": 64,
        "n_kv_heads": 8, "vocab_size": 131072, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 3, "intermediate_size": 40960, "compute_dtype": "bfloat16", "param_init_type": "float32",
        "pp_interleave_num": 3,
        "offset": [[-1, -1, 0, 0, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, -1]],
    }},
    "wild_guess": 3,
}  # fmt: skip
# Sums of the published offsets: 24 stages of 4 layers, changed by them.
STAGES = [3, 3, *[4] * 6, 3, *[4] * 7, 4, 4, 4, 5, 5, 5, 5, 3]


def changed(path: str, value: object) -> dict[str, Any]:
    tree = copy.deepcopy(RECIPE)
    *parents, last = path.split(".")
    place = tree
    for key in parents:
        place = place[key]
    place[last] = value
    return tree


def test_the_published_recipe() -> None:
    found = from_mindformers(RECIPE, "f.yaml")
    run = run_config_from_dict(found.values)
    assert (run.train.micro_batch, run.train.global_batch) == (1, 64)  # not the 6 of train_dataset
    assert (run.parallel.dp, run.parallel.tp, run.parallel.pp, run.parallel.virtual) == (8, 8, 8, 3)
    assert run.parallel.stage_layers == STAGES and sum(STAGES) == run.model.num_layers
    assert (run.train.epochs, run.train.recompute, run.train.precision) == (10, "selective", "amp")
    assert (run.optim.lr, run.optim.min_lr, run.optim.schedule, run.optim.clip_grad) == (1.5e-4, 1.5e-5, "cosine", 1.0)
    assert (run.checkpoint.every, run.checkpoint.keep_last, run.model.norm_eps) == (1500, 300, 1e-5)


def test_every_key_is_carried_or_listed() -> None:
    found = from_mindformers(RECIPE, "f.yaml")
    assert found.left["train_dataset.batch_size"] == "runner_config.batch_size takes its place in MindFormers"
    assert found.left["wild_guess"] == "not known here; see whether the run needs it"
    assert "folders are options" in found.left["output_dir"]
    assert not set(found.left) & set(found.carried)
    assert "not carried: wild_guess: not known here" in found.report()


# Keys of the published YAMLs (research/telechat, telechat2 and telechat3 of MindFormers 1.1 to 1.8 and master) that the
# recipe above lacks, with their values.
PUBLISHED: dict[str, object] = {
    "auto_register": "telechat_config.TelechatConfig", "auto_map": {"AutoModel": "telechat.TelechatForCausalLM"},
    "batch_size": 1, "block_size": 16, "num_blocks": 512, "is_dynamic": True, "use_past": True, "use_past_shard": False,
    "checkpoint_name_or_path": "telechat_7b", "do_sample": False, "top_k": 3, "top_p": 1, "repetition_penalty": 1,
    "max_decode_length": 512, "run_mode": "predict", "model_name": "telechat_12b",
    "embed_dropout_prob": 0.0, "hidden_dropout_prob": 0.1, "attention_dropout_prob": 0.1,
    "res_dtype": "float32", "layernorm_compute_type": "float32", "softmax_compute_type": "float16",
    "rotary_dtype": "float32", "extend_method": "None", "ffn_dim_multiplier": 12288, "fine_grain_interleave": 2,
    "ignore_token_id": -100, "mean": 0.0, "sigma": 0.0048, "out_proj_has_bias": True, "wo_has_bias": True,
    "parallel_optimizer": True, "pretrain_seqlen": 8192, "qkv_concat": True, "use_flash_attention": True,
    "use_rope_slice": False, "layers_group": 1, "embedding_size": 1, "eod_reset": True,
}  # fmt: skip


def test_every_published_key_is_carried_or_listed() -> None:
    tree = copy.deepcopy(RECIPE)
    tree["model"]["model_config"] |= PUBLISHED
    tree["model"]["arch"] = {"type": "TelechatForCausalLM", "auto_register": "telechat.TelechatForCausalLM"}
    tree |= {"infer_precision_sync": True, "layer_decay": 0.65, "lr_scale_factor": 256, "moe_config": {"expert_num": 1}}
    found = from_mindformers(tree, "f.yaml")
    told = set(found.left) | set(found.carried) | {"model.model_config.pretrain_seqlen"}
    assert not [key for key in PUBLISHED if key not in FIELDS and f"model.model_config.{key}" not in told | ALSO]
    assert [key for key, why in found.left.items() if why.startswith("not known")] == ["wild_guess"]
    assert run_config_from_dict(found.values).data.isolate_documents


ALSO = {"model.model_config.auto_map"}  # its parts are listed


def test_prediction_has_no_training_to_carry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = ("seed", "run_mode", "parallel_config", "model")
    tree = {key: RECIPE[key] for key in kept} | {"run_mode": "predict"}
    (tmp_path / "predict.yaml").write_text(yaml.safe_dump(tree))
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    words = ["--from", "mindformers", "--to", "canonical", str(tmp_path / "predict.yaml"), str(tmp_path / "ours.yaml")]
    assert convert.run(parser.parse_args(words)) == 0
    said = capsys.readouterr().out
    assert "predict.yaml: is a YAML of prediction; add the sections train and optim" in said
    assert "not carried: seed: of training" in said
    ours = yaml.safe_load((tmp_path / "ours.yaml").read_text())
    assert set(ours) == {"model", "data", "parallel"} and ours["model"]["num_layers"] == 96


def test_mindformers_defaults_and_not_ours_are_taken() -> None:
    tree = copy.deepcopy(RECIPE)
    tree["optimizer"] = {"type": "FP32StateAdamWeightDecay", "beta1": 0.8, "beta2": 0.9, "learning_rate": 1.5e-4}
    del tree["runner_wrapper"]
    found = from_mindformers(tree, "f.yaml")
    optim = run_config_from_dict(found.values).optim
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay, optim.clip_grad) == (0.8, 0.9, 1e-6, 0.0, 1.0)
    assert "f.yaml: optimizer.weight_decay is missing; MindFormers' default 0.0 is taken" in found.notes
    assert found.left["optimizer.learning_rate"] == "lr_schedule.learning_rate takes its place in MindFormers"
    tree["parallel_config"]["pipeline_stage"], tree["model"]["model_config"]["offset"] = 1, 0
    assert from_mindformers(tree, "f.yaml").values["optim"]["clip_grad"] == 0.0
    del tree["lr_schedule"]
    assert from_mindformers(tree, "f.yaml").values["optim"]["schedule"] == "constant"


@pytest.mark.parametrize(
    ("change", "trained"),
    [
        ({"pretrain_seqlen": 4096}, 8192),  # MindFormers rotates plainly at any length
        ({"pretrain_seqlen": 4096, "extend_method": "DYNAMIC_NTK"}, 4096),
        ({"pretrain_seqlen": 4096, "base_seqlen": 4096}, 4096),  # as written here
    ],
)
def test_the_rotation_is_plain_where_mindformers_is(change: dict[str, object], trained: int) -> None:
    tree = copy.deepcopy(RECIPE)
    tree["model"]["model_config"] |= change
    model = from_mindformers(tree, "f.yaml").values["model"]
    assert (model["training_seqlen"], model["base_seqlen"]) == (trained, trained)


OTHERS = {
    "a constant schedule has no end": ("lr_schedule.type", "ConstantWarmUpLR", "optim", {"schedule": "constant"}),
    "steps before epochs": ("lr_schedule.total_steps", 500, "train", {"steps": 500}),
    "no pipeline, no micro-batches": ("parallel_config.pipeline_stage", 1, "train", {"global_batch": 8}),
    "interleaved micro-batches": ("micro_batch_interleave_num", 2, "train", {"global_batch": 128}),
    "recomputed layers of stages": ("recompute_config.recompute", [3, 0], "train", {"recompute": "full"}),
    "fp16": ("model.model_config.compute_dtype", "float16", "train", {"precision": None}),
    "the ratio before the steps": ("lr_schedule.warmup_steps", 7, "optim", {"warmup_ratio": 0.0, "warmup_steps": None}),
    "accumulation": ("runner_config.gradient_accumulation_steps", 4, "train", {"global_batch": 256}),
    "no clipping": ("runner_wrapper.use_clip_grad", False, "optim", {"clip_grad": 0.0}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_values(case: str) -> None:
    path, value, section, expected = OTHERS[case]
    values = from_mindformers(changed(path, value), "f.yaml").values[section]
    assert {key: values.get(key) for key in expected} == expected
    assert case != "a constant schedule has no end" or "min_lr" not in values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.model_config.offset", "x", r"offset must be 0 or a list of whole numbers, found 'x'"),
        (
            "model.model_config.offset",
            [[1]],
            r"offset is \[\[1\]\]; with 8 stages of 3 chunks it does not make up",
        ),
        ("model.model_config.scaling_factor", 5, "scaling_factor is 5; only TeleChat3's YARN has one"),
        ("callbacks", {"a": 1}, r"callbacks must be a list, found \{'a': 1\}"),
        ("optimizer", [], r"optimizer must be a mapping, found \[\]"),
        ("runner_config.batch_size", "4", "runner_config.batch_size must be a whole number, found '4'"),
        ("parallel_config.data_parallel", [2], r"data_parallel must be a whole number, found \[2\]"),
        ("parallel_config.use_seq_parallel", "False", "use_seq_parallel must be true or false, found 'False'"),
        ("optimizer.betas", [0.9, [0.95]], r"optimizer.betas must be a number, found \[0.95\]"),
        ("lr_schedule.type", ["x"], r"lr_schedule.type must be a name, found \['x'\]"),
        ("optimizer.type", "Came", "optimizer.type .*Came.* is not AdamW"),
        ("lr_schedule.type", "PolynomialWithWarmUpLR", "lr_schedule.type .*Polynomial.*is not one of Cosine"),
        ("moe_config", {"expert_num": 16}, "expert_num is 16 in moe_config; mixtures of experts are not supported"),
        ("lr_scale", True, "lr_scale multiplies the learning rate"),
        ("model.model_config.net_name", "telechat_7b", "TeleChat-7B's head is its embedding"),
        ("model.model_config.moe_config", {"expert_num": 16}, "mixtures of experts are not supported"),
        ("model.model_config.untie_embeddings_and_output_weights", False, "a head tied to the embedding is not"),
        ("model.model_config.gated_linear_unit", False, "the ffn of these models is gated by silu"),
        ("model.model_config.normalization", "LayerNorm", "the norms of these models are RMSNorm"),
        ("model.model_config.multi_latent_attention", True, "latent attention is not supported"),
        ("model.model_config.rotary_percent", 0.5, "a rotation of part of a head's channels is not supported"),
        ("model.model_config.mtp_num_layers", 1, "layers that predict further tokens are not supported"),
        ("model.model_config.window_size", [128, 0], "a window of attention is not supported"),
        ("model.model_config.add_qkv_bias", True, "biases of queries, keys and values are not supported"),
    ],
)
def test_what_cannot_be_trained_here_is_refused(path: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_mindformers(changed(path, value), "f.yaml")


def test_a_key_of_the_model_that_is_not_known_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changed("model.model_config.attention_temprature", 2)))
    lines = (tmp_path / "run.yaml").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "attention_temprature" in text)
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    words = ["--from", "mindformers", "--to", "canonical", str(tmp_path / "run.yaml"), str(tmp_path / "ours.yaml")]
    with pytest.raises(UserError, match=rf"run.yaml:{line}: 'attention_temprature' is 2; .*may change the arithmetic"):
        convert.run(parser.parse_args(words))
    assert not (tmp_path / "ours.yaml").exists()


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("layernorm_compute_dtype", "float32", "train.precision says in what each part is computed"),
        ("use_flash_attention", True, "a choice between implementations of the same arithmetic"),
        ("qk_layernorm", False, "its value is what this decoder computes with"),
        ("moe_z_loss_coeff", 0.1, "of mixtures of experts, of which this model has none"),
        ("not_a_key", None, "has no value"),
    ],
)
def test_keys_of_the_model_have_a_reason(key: str, value: object, reason: str) -> None:
    found = from_mindformers(changed(f"model.model_config.{key}", value), "f.yaml")
    assert found.left[f"model.model_config.{key}"] == reason


def test_dropout_is_listed_as_not_applied() -> None:
    found = from_mindformers(changed("model.model_config.hidden_dropout_prob", 0.1), "f.yaml")
    assert found.left["model.model_config.hidden_dropout_prob"] == "dropout is not applied here, whatever its value"


def test_biases_of_telechat3_are_refused() -> None:
    tree = changed("model.model_config.model_type", "telechat3")
    tree["model"]["model_config"]["add_bias_linear"] = True
    with pytest.raises(UserError, match="add_bias_linear is True; TeleChat3 has no biases"):
        from_mindformers(tree, "f.yaml")


@pytest.mark.parametrize("run", ["telechat2-115b", "telechat2-7b", "telechat2-tiny", "ratio"])
def test_ours_there_and_back(run: str) -> None:
    if run == "ratio":
        config = run_config_from_dict(from_mindformers(changed("lr_schedule.warmup_ratio", 0.03), "f.yaml").values)
    else:
        config = load_run_config(ROOT / "configs" / "train" / f"{run}.yaml")
    theirs = to_mindformers_yaml(config)
    again = run_config_from_dict(from_mindformers(theirs.values, "f.yaml").values)
    assert again.model == config.model
    for section in ("train", "optim", "parallel"):
        for key, value in vars(getattr(config, section)).items():
            if f"{section}.{key}" in theirs.carried:
                assert getattr(getattr(again, section), key) == value, (section, key)
    assert theirs.left["health.window"] == "has no counterpart in MindFormers"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RECIPE))
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    words = ["--from", "mindformers", "--to", "canonical", str(tmp_path / "run.yaml"), str(tmp_path / "ours.yaml")]
    assert convert.run(parser.parse_args(words)) == 0
    assert load_run_config(tmp_path / "ours.yaml").train.global_batch == 64
    assert "carried: seed -> train.seed" in capsys.readouterr().out
    with pytest.raises(UserError, match="ours.yaml: exists already; give --force"):
        convert.run(parser.parse_args(words))
    with pytest.raises(UserError, match="SRC is a run's .yaml: give a .yaml as DST"):
        convert.run(parser.parse_args([*words[:5], str(tmp_path / "folder")]))


def test_a_full_disk_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # capsys: pytest's own files would be limited, too.
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RECIPE))
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    words = ["--from", "mindformers", "--to", "canonical", str(tmp_path / "run.yaml"), str(tmp_path / "ours.yaml")]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
        with pytest.raises(UserError, match="ours.yaml: a file-size limit was exceeded"):
            convert.run(parser.parse_args(words))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


PET = {"pet_type": "lora", "target_modules": ".*wq|.*wk_v|.*wo"}


def test_adapters_of_a_run() -> None:
    """What is not written has MindFormers' default, a dropout of 0.01 among them; every other key is listed."""
    pet = {
        **PET,
        "lora_rank": 4,
        "lora_alpha": 8,
        "lora_a_init": "normal",
        "compute_dtype": "bfloat16",
    }
    found = from_mindformers(changed("model.model_config.pet_config", pet), "f.yaml")
    lora = found.values["lora"]
    assert lora == {"rank": 4, "alpha": 8, "dropout": 0.01, "targets": ["q", "k", "v", "o"]}
    assert "float32" not in found.left["model.model_config.pet_config.compute_dtype"]
    assert "model.model_config.pet_config.lora_a_init" in found.left


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pet_type": "ptuning2"}, "pet_type 'ptuning2' is not lora"),
        ({"exclude_layers": ".*wo"}, r"exclude_layers: '.\*wo' is not taken over: name the layers"),
        ({"freeze_exclude": ["*norm*"]}, "freeze_exclude: .* is not taken over: all of the base is frozen"),
        ({"freeze_include": ["*"]}, "freeze_include: .* is not taken over"),
        ({"lora_rnk": 4}, "lora_rnk: not a key of MindFormers' LoRA"),
        ({"target_modules": None}, "target_modules: must name the adapted layers, found None"),
        ({"target_modules": ".*wq|.*router"}, "lora.targets: 'router' is not a linear layer"),
        ({"lora_rank": 0}, "lora.rank: must be at least 1, found 0"),
        ({"lora_alpha": "x"}, "lora.alpha: "),
        ({"lora_dropout": 1.5}, "lora.dropout: must be at most 0.99, found 1.5"),
    ],
)
def test_adapters_that_are_not_carried(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"f.yaml: pet_config.*{message}"):
        from_mindformers(changed("model.model_config.pet_config", PET | change), "f.yaml")
