"""Schemas of the torch_npu operators in use, as declared by torch_npu 2.13.0, and a check of calls against them.

torch_npu 2.14.0 declares the same 1,457 operators, and those in use by the same schemas.

Source: torch_npu-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl, file
torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml (BSD 3-Clause, Huawei Technologies). torch_npu can be imported
only where CANN is installed; this table makes calls checkable on any machine.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

SOURCE = "torch_npu 2.13.0 and 2.14.0, torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"

_DECLARED = (
    ("npu_rms_norm(Tensor self, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)"),
    ("npu_rms_norm_backward(Tensor dy, Tensor self, Tensor gamma, Tensor rstd) -> (Tensor, Tensor)"),
    ("npu_add_rms_norm(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor, Tensor)"),
    ("npu_swiglu(Tensor self, int dim=-1) -> Tensor"),
    ("npu_swiglu_backward(Tensor grad_output, Tensor self, int dim=-1) -> Tensor"),
    ("npu_gelu(Tensor self, *, str approximate='none') -> Tensor"),
    ("npu_gelu_backward(Tensor grad_output, Tensor self, *, str approximate='none') -> Tensor"),
    ("npu_rotary_mul(Tensor self, Tensor r1, Tensor r2, str rotary_mode='half', Tensor? rotate=None) -> Tensor"),
    (
        "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? "
        "pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., int "
        "pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, int[]? "
        "actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, bool "
        'sync=False, str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, int offset=0)'
        " -> (Tensor, Tensor, Tensor, Tensor, int, int, int)"
    ),
    (
        "npu_fusion_attention_grad(Tensor query, Tensor key, Tensor value, Tensor dy, int head_num, str "
        "input_layout, *, Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, Tensor? "
        "softmax_max=None, Tensor? softmax_sum=None, Tensor? softmax_in=None, Tensor? attention_in=None, float "
        "scale_value=1., float keep_prob=1., int pre_tockens=2147483647, int next_tockens=2147483647, int "
        "inner_precise=0, int seed=0, int offset=0, int numels=0, int[]? prefix=None, int[]? actual_seq_qlen=None, "
        "int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False, str "
        'softmax_layout="", Tensor? sink=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)'
    ),
    (
        "npu_ring_attention_update(Tensor prev_attn_out, Tensor prev_softmax_max, Tensor prev_softmax_sum, Tensor "
        "cur_attn_out, Tensor cur_softmax_max, Tensor cur_softmax_sum, *, Tensor? actual_seq_qlen=None, str "
        'input_layout="SBH", str input_softmax_layout="") -> (Tensor, Tensor, Tensor)'
    ),
    (
        "npu_fused_infer_attention_score(Tensor query, Tensor key, Tensor value, *, Tensor? pse_shift=None, Tensor?"
        " atten_mask=None, SymInt[]? actual_seq_lengths=None, SymInt[]? actual_seq_lengths_kv=None, Tensor? "
        "dequant_scale1=None, Tensor? quant_scale1=None, Tensor? dequant_scale2=None, Tensor? quant_scale2=None, "
        "Tensor? quant_offset2=None, Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, Tensor? "
        "key_antiquant_scale=None, Tensor? key_antiquant_offset=None, Tensor? value_antiquant_scale=None, Tensor? "
        "value_antiquant_offset=None, Tensor? block_table=None, Tensor? query_padding_size=None, Tensor? "
        "kv_padding_size=None, Tensor? key_shared_prefix=None, Tensor? value_shared_prefix=None, SymInt[]? "
        "actual_shared_prefix_len=None, Tensor? query_rope=None, Tensor? key_rope=None, Tensor? "
        "key_rope_antiquant_scale=None, int num_heads=1, float scale=1.0, int pre_tokens=2147483647, int "
        'next_tokens=2147483647, str input_layout="BSH", int num_key_value_heads=0, int sparse_mode=0, int '
        "inner_precise=0, int block_size=0, int antiquant_mode=0, int key_antiquant_mode=0, int "
        "value_antiquant_mode=0, bool softmax_lse_flag=False) -> (Tensor, Tensor)"
    ),
    (
        "npu_apply_adam_w.out(Scalar beta1_power, Scalar beta2_power, Scalar lr, Scalar weight_decay, Scalar beta1,"
        " Scalar beta2, Scalar epsilon, Tensor grad, Tensor? max_grad_norm, bool? amsgrad, bool? maximize, *, "
        "Tensor(a!) var, Tensor(b!) m, Tensor(c!) v) -> (Tensor(a!), Tensor(b!), Tensor(c!))"
    ),
)


class Schema(NamedTuple):
    """``types``: argument -> declared type, such as "Tensor?" or "int[]?". ``results``: the types of the results."""

    name: str
    signature: inspect.Signature
    types: Mapping[str, str]
    results: tuple[str, ...]


def parse(declaration: str) -> Schema:
    """The schema of a declaration in native_functions.yaml syntax; raises ValueError for any other text."""
    match = re.fullmatch(r"([\w.]+)\((.*)\) -> (.*)", declaration)
    if match is None:
        raise ValueError(f"declaration: {declaration!r}; needs name(arguments) -> results")
    name, arguments, results = match.groups()
    keyword_only = False
    parameters, types = [], {}
    for argument in arguments.split(", "):
        if argument == "*":
            keyword_only = True
            continue
        declared, _, rest = argument.partition(" ")
        argument_name, has_default, default = rest.partition("=")
        value = default if has_default else inspect.Parameter.empty
        kind = inspect.Parameter.KEYWORD_ONLY if keyword_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.append(inspect.Parameter(argument_name, kind, default=value))
        types[argument_name] = re.sub(r"\(\w!\)", "", declared)
    return Schema(
        name, inspect.Signature(parameters), types, tuple(results.removeprefix("(").removesuffix(")").split(", "))
    )


SCHEMAS: dict[str, Schema] = {schema.name: schema for schema in map(parse, _DECLARED)}

_IS: dict[str, Callable[[object], bool]] = {
    "int": lambda x: isinstance(x, int) and not isinstance(x, bool),
    "float": lambda x: isinstance(x, int | float) and not isinstance(x, bool),
    "Scalar": lambda x: isinstance(x, int | float) and not isinstance(x, bool),
    "bool": lambda x: isinstance(x, bool),
    "str": lambda x: isinstance(x, str),
}


def bind(name: str, args: tuple[object, ...], kwargs: Mapping[str, object], tensor: type) -> dict[str, object]:
    """The arguments of a call by name, without defaults. ``tensor``: the class of tensors.

    Raises TypeError for an operator that is not in the table, an unknown or missing argument, or one of a wrong type.
    """
    if name not in SCHEMAS:
        raise TypeError(f"{name}: not an operator of the recorded table ({SOURCE})")
    schema = SCHEMAS[name]
    try:
        bound = dict(schema.signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    for argument, value in bound.items():
        if not _fits(schema.types[argument], value, tensor):
            raise TypeError(f"{name}: {argument}: {type(value).__name__}; needs {schema.types[argument]}")
    return bound


def _fits(declared: str, value: object, tensor: type) -> bool:
    if declared.endswith("?"):
        return value is None or _fits(declared[:-1], value, tensor)
    if declared.endswith("[]"):
        return isinstance(value, list | tuple) and all(_fits(declared[:-2], item, tensor) for item in value)
    if declared == "Tensor":
        return isinstance(value, tensor)
    return _IS[declared.removeprefix("Sym").replace("Int", "int")](value)
