"""Converting holds a tensor or two in memory, not the model: measured on a 150 MB model in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.params import count_parameters, parameter_table

SHAPE = {
    "vocab_size": 8192, "hidden_size": 640, "ffn_hidden_size": 2560, "num_layers": 4, "num_heads": 10,
    "num_kv_heads": 10, "norm_eps": 1e-5, "training_seqlen": 64, "base_seqlen": 64, "max_seqlen": 64,
}  # fmt: skip

PROGRAM = r"""
import json, re, sys
from pathlib import Path
import numpy as np
from telechat_twins.convert.copy import canonical_to_hf, hf_to_canonical, to_canonical, to_mindformers
from telechat_twins.convert.hf.folder import HfFolder
from telechat_twins.convert.mindformers.source import Known, MindFormersSource
from telechat_twins.convert.source import open_model
from telechat_twins.core.checkpoint.read import write_checkpoint
from telechat_twins.core.config import ModelConfig
from telechat_twins.core.model.params import parameter_table

root, config = Path(sys.argv[1]), ModelConfig(**json.loads(sys.argv[2]))

def peak():  # bytes of this process so far (getrusage would count the parent's before exec)
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def tensors():
    for name, spec in parameter_table(config).items():
        yield name, np.ones(spec.shape, np.float32)

np.ones(1 << 16).astype(np.float32)
peaks = [peak()]
write_checkpoint(root / "made", 0, model={"config": config.to_dict()}, weights=tensors())
peaks.append(peak())
canonical_to_hf(open_model(root / "made"), root / "hf", max_shard_bytes=60_000_000)
peaks.append(peak())
hf_to_canonical(HfFolder(root / "hf"), root / "back")
peaks.append(peak())
to_mindformers(open_model(root / "back"), root / "ms", "qkv_concat", 2)
peaks.append(peak())
to_canonical(MindFormersSource(root / "ms", Known(root / "ms")), root / "again")
peaks.append(peak())
source = open_model(root / "again")
everything = [source.tensor(name) for name in source.names()]
peaks.append(peak())
print(json.dumps(peaks))
"""


def test_peak_memory_is_a_tensor_or_two(tmp_path):
    config = ModelConfig(**SHAPE)
    model = 4 * count_parameters(config)
    largest = 4 * max(spec.size for spec in parameter_table(config).values())
    assert model > 145e6 and largest < model / 6
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(SHAPE)],
        cwd=Path(__file__).resolve().parents[3], capture_output=True, text=True, check=True,
    )  # fmt: skip
    start, *peaks, all_loaded = json.loads(ended.stdout)
    growth = [(peak - start) / largest for peak in peaks]
    print("growth in largest tensors:", [round(g, 2) for g in growth], "model:", round(model / largest, 2))
    # One tensor, the packed copy of a smaller one, and blocks of 1 MB for hashing; the model is seven times as large.
    assert max(growth) < 2
    # The measure sees it when the model is loaded.
    assert all_loaded - start > 0.9 * model
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
