"""Unsupported keys of config.json, which would change the arithmetic, and the keys known to be harmless.

A key with a value outside the harmless ones is refused by name; an unknown key is named in a
note.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from telechat_twins.convert.hf.config_rotary import SECTIONS, THETA_NAMES
from telechat_twins.core.errors import UserError
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

Refused = dict[str, tuple[tuple[object, ...], str]]

_NO = (False, None)
_ONE = (1, None)
_NONE = (None,)


def _each(names: str, harmless: tuple[object, ...], reason: str) -> Refused:
    return dict.fromkeys(names.split(), (harmless, reason))


# Of every family: key -> (harmless values, reason).
EVERYWHERE: Refused = {
    **_each("quantization_config compression_config", _NONE,
            "quantised weights are not supported; convert the unquantised release"),
    **_each("embed_layernorm word_embeddings_layernorm", _NO, "a norm after the embedding is not supported"),
    **_each("apply_residual_connection_post_layernorm", _NO, "a residual taken after the norm is not supported"),
    **_each("parallel_attn use_parallel_residual parallel_residual", _NO,
            "attention and ffn side by side are not supported"),
    **_each("scale_attn_weights", (True, None), "attention without its scale is not supported"),
    **_each("partial_rotary_factor rotary_pct rotary_percentage", _ONE,
            "a rotation of part of a head's channels is not supported"),
    **_each("rope_interleave rope_interleaved rotary_interleaved", _NO,
            "a rotation of neighbouring channels is not supported; here the halves of a head rotate"),
    **_each("rope_local_base_freq local_rope_theta global_rope_theta swa_rope_theta", _NONE,
            "a rotary base that differs between layers is not supported"),
    **_each("rope_ratio rotary_ratio rope_scaling_factor rope_factor", _ONE,
            "a multiplied rotary base is not supported; write the product as rope_theta"),
    **_each("use_dynamic_ntk use_logn_attn", _NO, "a scaling by the length of the text is not supported"),
    **_each("rotary use_rope use_rotary use_rotary_emb use_rotary_embedding use_rotary_position_embeddings",
            (True, None), "a model without rotary positions is not supported"),
    **_each("position_embedding_type", ("rope", "rotary", None), "only rotary positions are supported"),
    **_each("rope_type", ("default", None), "the model has no foreign scaling of its rotary base"),
    **_each("no_rope_layers no_rope_layer_interval", (None, [], 0), "layers without rotation are not supported"),
    **_each("alibi use_alibi", _NO, "only rotary positions are supported"),
    **_each("attention_chunk_size chunk_attention_size", _NONE, "attention within chunks is not supported"),
    **_each("attn_logit_softcapping final_logit_softcapping attn_logit_softcap final_logit_softcap", _NONE,
            "capped logits are not supported"),
    **_each("clip_qkv", _NONE, "clipped queries, keys and values are not supported"),
    **_each("is_causal", (True, None), "only decoders are supported"),
    **_each("use_bidirectional_attention bidirectional_attention bidirectional", _NO, "only decoders are supported"),
    **_each("attn_temperature_tuning", _NO, "queries scaled by their position are not supported"),
    **_each("attention_sinks use_attention_sinks num_attention_sinks", (False, None, 0),
            "attention sinks are not supported"),
    **_each("lm_head_bias head_bias", _NO, "a bias of the head is not supported"),
    **_each("post_norm use_post_norm sandwich_norm use_sandwich_norm", _NO,
            "a norm behind attention or ffn is not supported"),
    **_each("final_norm use_final_norm", (True, None), "a model without its last norm is not supported"),
    **_each("zero_centered_gamma layernorm_zero_centered_gamma rms_norm_add_unit_offset norm_unit_offset", _NO,
            "norms whose weight is one more than what is stored are not supported"),
    **_each("query_pre_attn_scalar attention_multiplier attention_scale softmax_scale attn_scale query_scale", _NONE,
            "attention is scaled by the root of the head size here"),
    **_each("embedding_multiplier residual_multiplier residual_scale logits_scaling logit_scale scale_emb scale_depth",
            _ONE,
            "multipliers under this name are not supported"),
    **_each("qk_norm use_qk_norm qk_layernorm qk_layer_norm", _NO, "norms of queries and keys are not supported"),
    **_each("scale_embedding scale_embeddings normalize_embeddings", _NO, "scaled embeddings are not supported"),
    **_each("num_experts num_local_experts n_routed_experts n_shared_experts moe_num_experts num_moe_experts "
            "num_experts_per_tok moe_intermediate_size", (None, 0),
            "mixtures of experts are not supported"),
    **_each("kv_lora_rank q_lora_rank", _NONE, "latent attention is not supported"),
    **_each("pruned_heads", (None, {}), "pruned heads are not supported"),
    **_each("is_encoder_decoder add_cross_attention", _NO, "only decoders are supported"),
}  # fmt: skip

GATED: Refused = {
    **_each("hidden_act hidden_activation activation_function activation mlp_activation",
            ("silu", "swish", "swiglu", None), "the ffn of this family is gated by silu"),
    **_each("attention_bias qkv_bias add_qkv_bias use_qkv_bias qkv_has_bias", _NO,
            "biases of queries, keys and values are not supported"),
    **_each("rotary_use_xpos", _NO, "xPos is not supported in this family"),
    **_each("scale_attn_by_inverse_layer_idx", _NO, "attention scaled by the layer's number is not supported"),
    **_each("norm_type normalization", ("rmsnorm", "rms_norm", "RMSNorm", None),
            "the norms of this family are RMSNorm"),
    **_each("norm_bias layernorm_bias layer_norm_bias", _NO, "the norms of this family have no bias"),
    **_each("use_RMSNorm", (True, None), "the norms of this family are RMSNorm"),
}  # fmt: skip

# Names that say nothing of the arithmetic: bookkeeping, training, generation settings of old configs, switches of
# implementations that compute the same.
_HARMLESS_NAMES = """
    architectures model_type auto_map torch_dtype dtype transformers_version _name_or_path name_or_path tokenizer_class
    _attn_implementation _attn_implementation_autoset attn_implementation use_cache is_decoder return_dict
    output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward
    finetuning_task id2label label2id num_labels problem_type task_specific_params prefix cross_attention_hidden_size
    tie_encoder_decoder decoder_start_token_id unk_token_id sep_token_id cls_token_id mask_token_id
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    attention_softmax_in_fp32 bias_dropout_fusion masked_softmax_fusion skip_bias_add skip_bias_add_qkv slow_but_exact
    flash_attn enable_flash_attn use_flash_attn use_flash_attention pretraining_tp offset_alibi logn mup_base_width
    reorder_and_upcast_attn scale_attn_by_inverse_layer_idx hidden_dropout attention_dropout attn_pdrop embd_pdrop
    resid_pdrop seed mlp_bias bias training_seqlen base_seqlen rotary_xpos_scale_base max_window_layers
    use_sliding_window sliding_window layer_types head_dim kv_channels num_key_value_heads original_vocab_size
"""
_HARMLESS = frozenset(_HARMLESS_NAMES.split())
# Of these those that other mappings have as well: a class to load, the settings of generation.
_BOOKKEEPING = frozenset(_HARMLESS_NAMES.partition("attention_softmax_in_fp32")[0].split()) - {"is_decoder"}
# Words of names that change what a model computes, whatever else the name says; camelCase counts as with underscores.
_ROTARY = re.compile(r"(^|_)(rope|rotary|ntk|yarn|xpos|theta|freq|frequency|frequencies)(_|$)")
_ARITHMETIC = re.compile(
    r"(^|_)(mult|multiplier|scale|scaling|softcap|softcapping|cap|capping|clip|bias|norm|norms|layernorm|rmsnorm|act|"
    r"activation|activations|window|sparse|sparsity|experts?|moe|router|latent|lora|quant|quantized|quantization|"
    r"quantize|gate|gated|sink|sinks|residual|parallel|alibi|causal|tied?|interleaved?)(_|$)"
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def check_refused(released: JsonObject, refused: Refused, where: str) -> None:
    """UserError for the first key whose value would change the arithmetic."""
    for name, (harmless, reason) in {**refused, **EVERYWHERE}.items():
        if released.get(name) not in harmless:
            raise UserError(f"{where}: {name} is {released[name]!r}; {reason}")
    kinds = released.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise UserError(f"{where}: layer_types is {kinds!r}; every layer attends to all that is before, remove the key")
    # Qwen's configs carry a window that use_sliding_window switches off.
    if released.get("sliding_window") not in (None, 0) and released.get("use_sliding_window") is not False:
        raise UserError(f"{where}: sliding_window is {released['sliding_window']!r}; a window is not supported")


def check_sizes(released: JsonObject, hidden_size: int, num_heads: int, kv_heads: int, where: str) -> None:
    """UserError where a size that follows from the others here is given and is another one."""
    wanted = {"head_dim kv_channels d_kv v_head_dim qk_head_dim rotary_dim": hidden_size / num_heads}
    if kv_heads:
        wanted["num_key_value_heads num_kv_heads n_kv_heads"] = kv_heads
    for names, size in wanted.items():
        for name in names.split():
            found = released.get(name)
            if found is not None and (isinstance(found, bool) or found != size):
                says = "hidden_size / heads is" if size == hidden_size / num_heads else "this family has"
                raise UserError(f"{where}: {name} is {found!r}, but {says} {size:g}, and the format has no other")


def unknown_note(released: JsonObject, known: Iterable[str], where: str) -> list[str]:
    """A note that names the unknown keys, whose values are not read; none without such keys.

    UserError for one that names the rotation or another part of the arithmetic, and for a mapping that holds a model's
    keys (a release of several models: text and images, say); null, false, empty values and a scale of 1 pass.
    """
    heard = {*known, *_HARMLESS, *EVERYWHERE, *THETA_NAMES, *SECTIONS}
    strange = [name for name in released if name not in heard]
    for name in strange:
        value, words = released[name], _words(name)
        if value in (None, False, "", [], {}):
            continue
        if _ROTARY.search(words):
            raise UserError(
                f"{where}: {shown(name)} is {shown(value)}; no rotary key of this name is known here, write "
                "the base as rope_theta, or remove the key if it changes nothing"
            )
        if _ARITHMETIC.search(words) and (isinstance(value, bool) or value != 1):
            raise UserError(
                f"{where}: {shown(name)} is {shown(value)}, which is not known here and by its name may change what "
                "the model computes; remove the key if it does not"
            )
        if (inner := _model_key(value, heard)) is not None:
            raise UserError(
                f"{where}: {shown(name)} holds {shown(inner)}, which says what a model computes: configs inside of "
                "others (of releases for text and images, say) are not read; give the text model alone, with its "
                "keys at the top of config.json"
            )
    if not strange:
        return []
    more = f" and {len(strange) - 8} more" if len(strange) > 8 else ""
    return [f"keys that are not known here are not read: {', '.join(map(repr, strange[:8]))}{more}"]


def _words(name: str) -> str:
    return _CAMEL.sub("_", name).lower()


def _model_key(value: object, heard: Iterable[str]) -> str | None:
    """The first key inside a mapping, at any depth, that a model's config has; None in any other value."""
    ways: list[object] = [value]
    while ways:
        node = ways.pop()
        if not isinstance(node, dict):
            continue
        for name, inner in node.items():
            words = _words(name)
            if (name in heard and name not in _BOOKKEEPING) or _ROTARY.search(words) or _ARITHMETIC.search(words):
                return name
            ways.append(inner)
    return None
