"""Converted weights in the networks of an installed MindFormers, strictly; nothing is computed (that needs Ascend).

`make mindformers-check` makes an environment with it and runs this. In the wheel (1.9.0) lie TeleChat2's network with
the mcore names (mindformers.models.telechat2) and a legacy network with the names of research/telechat2 but for the
bias of the ffn's output (mindformers.models.llama). research/telechat2 itself is not in the wheel: its plain and
qkv_concat forms as a whole are held by the published conversions (tests/unit/convert/test_convert_mindformers.py).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from telechat_twins.convert.copy import to_hf, to_mindformers
from telechat_twins.convert.source import ModelSource, open_model
from telechat_twins.core.data.chat_template import encode_chat
from telechat_twins.core.data.tokenizer import load_tokenizer
from telechat_twins.core.model.init import init_weights
from tests.house import ROOT
from tests.support.frameworks import GOLDENS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mindformers") is None,
    reason="mindformers cannot be imported here; make mindformers-check makes an environment of its own",
)

CASE = "telechat2_gqa"
PUBLISHED = GOLDENS / "mindformers_convert" / CASE / "qkv_concat.safetensors"


@pytest.fixture
def source() -> ModelSource:
    """The golden model, as if trained here."""
    model = open_model(GOLDENS / CASE)
    model.record, model.assets = None, ()
    return model


def in_mindformers(folder: Path, program: str, *words: object) -> dict[str, Any]:
    """Run a program that prints one line of JSON; MindFormers leaves logs where it runs."""
    ended = subprocess.run(
        [sys.executable, "-c", PREPARE + program, *map(str, words)],
        cwd=folder, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


PREPARE = """
import json, os, sys
os.environ["RUN_MODE"] = "predict"  # mindformers chooses the network by it
import mindspore as ms
import numpy as np
from safetensors.numpy import load_file
ms.set_device("CPU")
"""

# MindFormers' loader only logs what is missing, so the sets are compared here.
TELECHAT2 = """
from mindformers import MindFormerConfig
from mindformers.core.context.build_context import MFContextOperator
MFContextOperator(MindFormerConfig(use_legacy=False, run_mode="predict", context={}))
from mindformers.models.telechat2 import InferenceTelechat2ForCausalLM, Telechat2Config
folder, published = sys.argv[1:]
released = json.load(open(os.path.join(folder, "config.json")))
mine = {k: v for k, v in released.items() if k not in ("architectures", "model_type", "auto_map")}
network = InferenceTelechat2ForCausalLM(Telechat2Config(**mine, params_dtype="float32", compute_dtype="float32"))
inner, loaded = network.model.load_weights, []
network.model.load_weights = lambda *a, **k: loaded.append(inner(*a, **k))
network.load_weights(folder)
held, fused = network.parameters_dict(), load_file(published)
equal = {}
for i in range(network.transformer_config.num_layers):
    theirs = {"self_attention.linear_qkv": "attention.w_qkv", "mlp.linear_fc1": "feed_forward.w_gate_hidden"}
    for name, ours in theirs.items():
        array = held[f"decoder.layers.{i}.{name}.weight"].asnumpy()
        equal[f"{i}.{name}"] = bool(np.array_equal(array, fused[f"mp1.model.layers.{i}.{ours}.weight"]))
config = network.transformer_config
print(json.dumps({
    "missing": sorted(set(held) - loaded[0]), "unexpected": sorted(loaded[0] - set(held)), "equal": equal,
    "config": [config.num_layers, config.num_attention_heads, config.num_query_groups, config.ffn_hidden_size,
               config.layernorm_epsilon, config.rotary_base],
}))
"""

LLAMA = """
from mindformers.models.llama.llama import LlamaForCausalLM
from mindformers.models.llama.llama_config import LlamaConfig
file, fused = sys.argv[1], sys.argv[2] == "qkv_concat"
network = LlamaForCausalLM(LlamaConfig(
    hidden_size=48, num_layers=3, num_heads=8, n_kv_heads=4, intermediate_size=80, vocab_size=151, rms_norm_eps=1e-5,
    seq_length=64, param_init_type="float32", compute_dtype="float32", qkv_concat=fused, attn_proj_has_bias=True,
))
saved = ms.load_checkpoint(file, format=file.rpartition(".")[2])
shapes = {name: list(p.shape) for name, p in network.parameters_dict().items()}
differing = [n for n, p in saved.items() if n in shapes and list(p.shape) != shapes[n]]
missing, left = ms.load_param_into_net(network, saved, strict_load=True)
held = network.parameters_dict()
equal = all(held[n].asnumpy().tobytes() == p.asnumpy().tobytes() for n, p in saved.items() if n in held)
print(json.dumps({"missing": sorted(missing), "left": sorted(left), "differing": differing, "equal": equal}))
"""

TOKENIZER = """
import transformers
from transformers import AutoConfig, AutoTokenizer
folder, texts, messages = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
print(json.dumps({
    "config": [config.num_hidden_layers, config.num_attention_heads, config.intermediate_size, config.rms_norm_eps],
    "ids": [tokenizer(text).input_ids for text in texts],
    "decoded": [tokenizer.decode(tokenizer(text).input_ids) for text in texts],
    "chat": list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)),
    "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
}))
"""


@pytest.mark.parametrize("form", ["release", "mcore"])
def test_telechat2_takes_every_tensor(form: str, source: ModelSource, tmp_path: Path) -> None:
    """mindformers.models.telechat2 by its own loader: an exported release, and its own names."""
    if form == "release":
        to_hf(source, tmp_path / "model")
    else:
        to_mindformers(source, tmp_path / "model", "mcore")
    found = in_mindformers(tmp_path, TELECHAT2, tmp_path / "model", PUBLISHED)
    assert (found["missing"], found["unexpected"]) == ([], [])
    assert len(found["equal"]) == 6 and all(found["equal"].values())
    assert found["config"] == [3, 8, 4, 80, 1e-5, 10000.0]


def test_a_missing_tensor_is_seen(source: ModelSource, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    to_mindformers(source, tmp_path / "model", "mcore")
    held = load_file(tmp_path / "model" / "model.safetensors")
    held.pop("decoder.layers.1.mlp.linear_fc2.bias")
    save_file(held, tmp_path / "model" / "model.safetensors")
    found = in_mindformers(tmp_path, TELECHAT2, tmp_path / "model", PUBLISHED)
    assert found["missing"] == ["decoder.layers.1.mlp.linear_fc2.bias"]


@pytest.mark.parametrize("file_format", ["safetensors", "ckpt"])
@pytest.mark.parametrize("form", ["qkv_concat", "plain"])
def test_the_legacy_names_are_llamas(form: str, file_format: str, source: ModelSource, tmp_path: Path) -> None:
    """mindformers.models.llama, strictly but for what TeleChat2 has of its own: the ffn's bias, and wk_v unfused."""
    to_mindformers(source, tmp_path / "model", form, file_format=file_format)
    found = in_mindformers(tmp_path, LLAMA, tmp_path / "model" / f"model.{file_format}", form)
    bias = [f"model.layers.{i}.feed_forward.w2.bias" for i in range(3)]
    packed = [f"model.layers.{i}.attention.wk_v.weight" for i in range(3)] if form == "plain" else []
    apart = [f"model.layers.{i}.attention.w{x}.weight" for i in range(3) for x in "kv"] if form == "plain" else []
    assert found["left"] == sorted(bias + packed) and found["missing"] == apart
    assert found["differing"] == [] and found["equal"]


def test_transformers_reads_an_exported_folder(tmp_path: Path) -> None:
    """Its config class and tokenizer; ids are those of this project, text with digits and line ends included."""
    from telechat_twins.core.checkpoint.read import write_checkpoint
    from telechat_twins.core.model.config import load_model_config
    from tests.support.data_support import VOCAB_SIZE, tiny_tokenizer_path

    config = load_model_config({"preset": "telechat2-tiny", "vocab_size": VOCAB_SIZE})
    weights = init_weights(config, 0).items()
    write_checkpoint(tmp_path / "c", 0, model={"config": config.to_dict()}, weights=weights)
    to_hf(open_model(tmp_path / "c"), tmp_path / "model", tokenizer=tiny_tokenizer_path())
    texts = [
        "",
        "a",
        "Hello, world 12345!",
        "def f(self):\n\treturn _x__y___z____w",
        "  two  ",
        "生抽与老抽的区别？",
        "½ 😈",
    ]
    messages = [{"role": "user", "content": "How many?\n"}, {"role": "assistant", "content": "12"}]
    messages.append({"role": "user", "content": "Really?"})
    found = in_mindformers(tmp_path, TOKENIZER, tmp_path / "model", json.dumps(texts), json.dumps(messages))
    ours = load_tokenizer(tiny_tokenizer_path())
    assert found["ids"] == [ours.encode(text) for text in texts]
    assert found["decoded"] == texts
    assert found["chat"] == encode_chat(ours, messages)
    assert found["special"] == [1, 2, 3]
    assert found["config"] == [config.num_layers, config.num_heads, config.ffn_hidden_size, config.norm_eps]


def test_the_versions_are_the_projects() -> None:
    import tomllib
    from importlib.metadata import version

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"mindformers=={version('mindformers')}" in extras["mindformers"]
    assert f"mindspore=={version('mindspore')}" in extras["ms"]
