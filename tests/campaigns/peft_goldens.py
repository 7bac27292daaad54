"""Adapters made by PEFT, and what PEFT computes with them and with those that this project writes.

    python tests/campaigns/peft_goldens.py [--write]

needs peft 0.21.2 and transformers 4.57.1 or later beside the packages of the tests. The base is the golden Tele-FLM,
whose decoder is Llama's: its multipliers are folded into a copy of the embedding and into the logits. Without --write
nothing changes: PEFT computes again, and everything must agree with tests/goldens/peft within 1e-6. With it, that
folder is made: CASE/adapter_config.json and adapter_model.safetensors as PEFT saves them, logits.safetensors with
``input_ids`` and ``logits`` [S, V] float32 of each case. "written" is an adapter of this project's, from "patterns".
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from telechat_twins.convert.hf.peft import open_peft, write_peft
from telechat_twins.convert.source import ModelSource
from tests.support.frameworks import GOLDENS, golden_source

PLACE = GOLDENS / "peft"
LENGTH = 12
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "plain": LoraConfig(r=4, lora_alpha=6, target_modules=LINEARS, task_type="CAUSAL_LM"),
    # Of two patterns that match, the first in the file counts: v_proj of layer 1 has rank 2. PEFT saves them sorted.
    "patterns": LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
        layers_to_transform=[0, 1],
        rank_pattern={"layers.1.self_attn.*_proj": 2, "v_proj": 3},
        alpha_pattern={"down_proj": 5, "layers.0.*": 3},
        task_type="CAUSAL_LM",
    ),
}


def base(source: ModelSource) -> LlamaForCausalLM:
    """The golden Tele-FLM as transformers' Llama, in float64."""
    config = source.config
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.norm_eps,
            max_position_embeddings=config.max_seqlen,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    ).double()
    tensors = {
        name: torch.from_numpy(array).double()
        for name, array in load_file(GOLDENS / "teleflm" / "weights.safetensors").items()
    }
    tensors["model.embed_tokens.weight"] *= config.input_mult
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def logits(folder: Path, source: ModelSource, ids: np.ndarray) -> np.ndarray:
    """What PEFT computes with an adapter folder, float64 [S, V]."""
    model = PeftModel.from_pretrained(base(source), str(folder)).double().eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits[0].numpy() * source.config.logit_mult


def make(name: str, source: ModelSource, folder: Path) -> None:
    """An adapter with random A and B, saved by PEFT."""
    torch.manual_seed(len(name))
    model = get_peft_model(base(source), CASES[name])
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.float().save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)


def main() -> int:
    write = "--write" in sys.argv[1:]
    source = golden_source("teleflm/weights.safetensors", "teleflm/config.json")
    ids = np.random.default_rng(5).integers(4, source.config.vocab_size, (1, LENGTH))
    if write:
        shutil.rmtree(PLACE, ignore_errors=True)
        for name in CASES:
            make(name, source, PLACE / name)
        write_peft(replace(open_peft(PLACE / "patterns", source.config), record=None), PLACE / "written")
    recorded = {} if write else load_file(PLACE / "logits.safetensors")
    found = {"input_ids": ids}
    for name in (*CASES, "written"):
        found[name] = logits(PLACE / name, source, ids).astype(np.float32)
        print(f"{name}: largest logit {np.abs(found[name]).max():.4f}")
        if recorded and not np.allclose(found[name], recorded[name], rtol=0, atol=1e-6):
            print(f"{name}: PEFT computes something else than was recorded", file=sys.stderr)
            return 1
    if not np.allclose(found["written"], found["patterns"], rtol=0, atol=1e-6):
        print("written: PEFT computes something else than with the adapter it was made from", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as place:  # what the code writes today is what was recorded
        write_peft(replace(open_peft(PLACE / "patterns", source.config), record=None), Path(place) / "again")
        for file in (PLACE / "written").iterdir():
            if file.read_bytes() != (Path(place) / "again" / file.name).read_bytes():
                print(f"written/{file.name}: is no longer what is written", file=sys.stderr)
                return 1
    if write:
        save_file(found, PLACE / "logits.safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
