"""What becomes of the keys of a run's YAML between MindFormers and here, and why some have no counterpart."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import yaml

from telechat_twins.core.types import JsonObject


@dataclass
class Carried:
    """``values``: the mapping of the other side's YAML. ``carried``: key -> where it went. ``left``: key -> why not."""

    values: JsonObject = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, key: str, target: str, value: object) -> None:
        """Carry ``key`` to the dotted path ``target``."""
        *path, last = target.split(".")
        place = self.values
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
        self.carried[key] = target

    def report(self) -> str:
        """One line a key: carried, or not carried and why; then the notes."""
        lines = [f"carried: {key} -> {target}" for key, target in self.carried.items()]
        lines += [f"not carried: {key}: {reason}" for key, reason in self.left.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


# Keys without a counterpart: pattern of the dotted key -> reason. The first that fits counts.
_LEFT = (
    (r"output_dir|load_checkpoint|resume_training|src_strategy_path_or_dir|auto_trans_ckpt|only_save_strategy"
     r"|load_ckpt_format|ignore_data_skip|remote_save_url|transform_process_num|pretrained_model_dir|remove_redundancy",
     "folders are options of tele train (--out, --init, --resume); layouts are changed on loading"),
    (r"run_mode|trainer\..*|use_legacy|train_precision_sync|infer_precision_sync", "the command says what is run"),
    (r"runner_config\.(sink_mode|sink_size)|context\..*|parallel\..*|use_parallel|parallel_speed_up.*",
     "of MindSpore's graph mode and device; here each step is launched from Python"),
    (r"optimizer\.learning_rate", "lr_schedule.learning_rate takes its place in MindFormers"),
    (r"grouped_lr_schedule.*", "there is one schedule here, and optim.matrix_lr"),
    (r"train_dataset\.batch_size", "runner_config.batch_size takes its place in MindFormers"),
    (r"(train|eval)_dataset(_task)?\..*|do_eval|eval_.*|metric\..*",
     "MindRecord and Megatron data are packed anew with tele data; data.sources is to be filled in"),
    (r"processor\..*", "the tokenizer is packed with the data"),
    (r"parallel_config\.(vocab_emb_dp|gradient_aggregation_group|expert_parallel|use_seq_parallel_.*|context_parallel_algo)"
     r"|micro_batch_interleave_num", "a schedule of the graph compiler; the global batch holds its factor"),
    (r"recompute_config\..*", "finer than none, selective and full"),
    (r"callbacks.*|profile.*|init_start_profile|monitor_config.*|tensorboard.*", "metrics and profiles are options"),
    (r"runner_wrapper\..*", "losses are scaled in fp16 only, and dynamically"),
    (r"model\.arch.*", "of MindFormers' classes and of generation"),
    (r"auto_tune|filepath_prefix|autotune_per_step|layer_scale|layer_decay|lr_scale_factor|lr_scale|moe_config.*"
     r"|swap_config.*", "unused by language models, or of a tool of MindFormers"),
)  # fmt: skip


def reason_outside(key: str) -> str:
    """Why a dotted key of MindFormers' YAML outside the model's section is not carried."""
    for pattern, reason in _LEFT:
        if re.fullmatch(pattern, key):
            return reason
    return "not known here; see whether the run needs it"


def dump_yaml(carried: Carried, comment: str) -> str:
    """The text of a YAML: what was not carried, as comments in front."""
    left = "".join(f"#   {key}: {reason}\n" for key, reason in carried.left.items())
    return f"# {comment}\n# Not carried:\n{left}" + yaml.safe_dump(carried.values, sort_keys=False, allow_unicode=True)
