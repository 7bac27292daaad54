#!/bin/bash
# MindFormers reads mp_comm_recompute and parallel_optimizer_comm_recompute of a run's recompute_config, and its LayerSetting
# passes them on to no layer; recompute_slice_activation is dropped where `recompute` is a list of numbers.
#
# Version:      mindformers 1.9.0, mindspore 2.9.0, CPython 3.11.
# Likely guess: the recomputed layers get all three, as MindSpore's Cell.recompute has a keyword for each, and as MindFormers'
#               own documentation of recompute_config says of each what it changes.
# Behaviour:    with recompute: true a layer gets recompute(recompute_slice_activation=...) alone; with recompute: [2], the
#               usual form for a pipeline, it gets recompute() with nothing.
# Matters:      mp_comm_recompute: false, which should keep what was gathered and save the second communication, changes
#               neither time nor memory; with a list, the inputs of recomputed layers stay whole on every tensor rank, tp
#               times the memory that recompute_slice_activation: true promises. Nothing tells.
# Seen:         recompute true: {'recompute_slice_activation': True}; recompute [2]: {}
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "mindformers==1.9.0" "mindspore==2.9.0" "numpy==1.26.4"
cd "$scratch"
GLOG_v=3 "$scratch/venv/bin/python" - 2> /dev/null <<'PYTHON'
from types import SimpleNamespace

from mindformers.modules.transformer import TransformerRecomputeConfig
from mindformers.parallel_core.training_graph.transformer import utils

utils.is_legacy_model = lambda: True  # the models that a YAML's recompute_config belongs to


class Layer:
    """A stand-in for a decoder layer that notes what it is asked for."""

    def set_comm_fusion(self, number):
        pass

    def recompute(self, **words):
        self.seen = words


def seen(recompute):
    switches = {"mp_comm_recompute": False, "parallel_optimizer_comm_recompute": True, "recompute_slice_activation": True}
    config = TransformerRecomputeConfig(recompute=recompute, **switches)
    swap = SimpleNamespace(swap=False)
    parallel = SimpleNamespace(recompute=config, swap=swap, pipeline_stage=1, gradient_aggregation_group=4)
    layer = Layer()
    utils.LayerSetting(2, 0, parallel)(layer, 0)
    return layer.seen


whole, listed = seen(True), seen([2])
print("recompute true:", whole)
print("recompute [2]:", listed)
raise SystemExit(0 if whole == {"recompute_slice_activation": True} and listed == {} else 1)
PYTHON
