"""Baseline for decoding: llama.cpp through xllamacpp's Python API, on a Llama of the measured model's shapes.

``python -m telechat_twins.kernels.bench.llama_cpp llama.cpp OPTIONS`` is a worker of ``tele bench decode --peers
llama.cpp``. It writes a GGUF file of random weights in the measured precision (F32, BF16, or Q8_0 for int8) and decodes
one greedy sequence. xllamacpp and gguf are not dependencies of this project; this module is used only where they are
installed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

from telechat_twins.core.bench.worker import Handle, answer_orders, bench_config
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.types import JsonObject
from telechat_twins.kernels.bench.decode import reading
from telechat_twins.kernels.bench.process import open_bench
from telechat_twins.kernels.cpu.engine import usual_threads

ERRORS = 1  # llama.cpp's level of messages; by default it writes ten lines a turn
BYTES = 256  # pieces of single bytes, which a tokenizer of kind "llama" needs
TYPES = {
    "fp32": gguf.GGMLQuantizationType.F32,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "int8": gguf.GGMLQuantizationType.Q8_0,
}


def matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Shapes of the weight matrices by their names in a GGUF file."""
    E, F, D = config.hidden_size, config.ffn_hidden_size, config.head_dim
    queries, keys = config.num_heads * D, config.num_kv_heads * D
    shapes = {"token_embd": (config.vocab_size, E), "output": (config.vocab_size, E)}
    for number in range(config.num_layers):
        block = {"attn_q": (queries, E), "attn_k": (keys, E), "attn_v": (keys, E), "attn_output": (E, queries)}
        block |= {"ffn_gate": (F, E), "ffn_up": (F, E), "ffn_down": (E, F)}
        shapes |= {f"blk.{number}.{name}": shape for name, shape in block.items()}
    return shapes


def write_gguf(file: Path, config: ModelConfig, kind: str) -> None:
    """A Llama of the model's shapes with random matrices of ``kind``, a key of TYPES, and gains of 1 in float32. It
    lacks TeleChat2's biases and length scaling, whose cost is negligible."""
    random, E = np.random.default_rng(0), config.hidden_size
    made = gguf.GGUFWriter(str(file), "llama")
    made.add_context_length(config.max_seqlen)
    made.add_embedding_length(E)
    made.add_block_count(config.num_layers)
    made.add_feed_forward_length(config.ffn_hidden_size)
    made.add_head_count(config.num_heads)
    made.add_head_count_kv(config.num_kv_heads)
    made.add_layer_norm_rms_eps(config.norm_eps)
    made.add_rope_dimension_count(config.head_dim)
    made.add_rope_freq_base(config.rope_theta)
    made.add_tokenizer_model("llama")
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(BYTES))]
    rest = config.vocab_size - len(words)
    made.add_token_list([*words, *(f"w{number}" for number in range(rest))][: config.vocab_size])
    made.add_token_scores([0.0] * config.vocab_size)
    made.add_token_types([2, 3, 3, *[6] * BYTES, *[1] * rest][: config.vocab_size])
    for name, shape in matrices(config).items():
        values = random.normal(0.0, 0.02, shape).astype(np.float32)
        made.add_tensor(f"{name}.weight", gguf.quants.quantize(values, TYPES[kind]), raw_dtype=TYPES[kind])
    norms = [f"blk.{number}.{which}_norm" for number in range(config.num_layers) for which in ("attn", "ffn")]
    for name in ("output_norm", *norms):
        made.add_tensor(f"{name}.weight", np.ones(E, np.float32))
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()


def opened(file: Path, length: int, kind: str) -> xllamacpp.Server:
    """The server, which decodes in this process, for one sequence of ``length`` tokens; keys and values are float32 in
    an fp32 run, else float16, its default."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.verbosity = ERRORS
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.warmup = max(length, 256), 1, 0, True
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = usual_threads()
    if kind == "fp32":
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(settings)


def step_seconds(server: xllamacpp.Server, config: ModelConfig, prompt: int, count: int) -> tuple[float, float]:
    """Mean seconds of a token over ``count`` greedy steps after ``prompt`` random tokens, and the seconds of these, by
    llama.cpp's own clock."""
    first = min(3 + BYTES, config.vocab_size - 1)  # no control tokens
    ids = np.random.default_rng(1).integers(first, config.vocab_size, prompt).tolist()
    asked = {"prompt": ids, "n_predict": count, "ignore_eos": True, "temperature": 0.0, "cache_prompt": False}
    timings = server.handle_completions(asked)["timings"]
    if timings["predicted_n"] != count:
        raise RuntimeError(f"llama.cpp made {timings['predicted_n']} tokens, not the {count} asked for")
    return float(timings["predicted_ms"]) / 1e3 / count, float(timings["prompt_ms"]) / 1e3


def main(argv: list[str]) -> int:
    """Entry point of the worker: its name and options as JSON."""

    def prepare() -> tuple[JsonObject, Handle]:
        options = json.loads(argv[1])
        config = bench_config(options).model
        kind = "int8" if options["quantize"] == "int8" else options["precision"]
        with tempfile.TemporaryDirectory(prefix="tele-bench-gguf-") as folder:
            file = Path(folder) / "model.gguf"
            write_gguf(file, config, kind)
            server = opened(file, options["length"] + 1, kind)  # maps the file, which may then lose its name
        bench = open_bench("pt", {**options, "compile": False})

        def handle(order: JsonObject) -> JsonObject:
            mean, prompt = step_seconds(server, config, order["prompt"], order["steps"])
            return {"seconds": [mean] * order["steps"], "prompt": [prompt], "read": reading(bench)}

        return {"backend": f"llama.cpp {TYPES[kind].name} (xllamacpp {version('xllamacpp')})"}, handle

    return answer_orders(prepare)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
