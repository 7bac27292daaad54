"""Every key that MindFormers reads in ``model.model_config`` beside those that are fields of the model: what it is for,
and the values that leave the arithmetic as it is here.

Sources: TelechatConfig of research/telechat, telechat2 and telechat3, and LlamaConfig (1.1 to 1.8, master);
TransformerConfig and TeleChat3Config of MindFormers 1.9.0 and 2.1.0; the YAMLs of these folders. A key that is in none
of these lists may change what a model computes, and is refused.
"""

from __future__ import annotations

from telechat_twins.convert.hf.config_refused import EVERYWHERE, Refused
from telechat_twins.core.errors import UserError
from telechat_twins.core.near import nearest
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

SECTION = "model.model_config"
_NO, _NONE, _GATE = (False, None), (None,), ("silu", "swish", "swiglu", "fusedswiglu", None)


def _each(names: str, harmless: tuple[object, ...], reason: str) -> Refused:
    return dict.fromkeys(names.split(), (harmless, reason))


# key -> (values that change nothing, why another one is refused), beside those of every family (EVERYWHERE).
NEUTRAL: Refused = {
    **_each("qkv_has_bias add_qkv_bias attention_bias", _NO, "biases of queries, keys and values are not supported"),
    **_each("add_mlp_fc1_bias_linear", _NO, "biases of gate and up are not supported"),
    **_each("tie_word_embeddings", _NO, "a head tied to the embedding is not supported"),
    **_each("untie_embeddings_and_output_weights", (True, None), "a head tied to the embedding is not supported"),
    **_each("quant quantization_bit", ("", 0, None), "quantised weights are not supported"),
    **_each("quant_config quantization", _NONE, "quantised weights are not supported"),
    **_each("extend_method", ("None", "DYNAMIC_NTK", None),
            "only None and DYNAMIC_NTK are TeleChat2's; set theta to the base that the model was trained with"),
    **_each("hidden_act activation_func", _GATE, "the ffn of these models is gated by silu"),
    **_each("gated_linear_unit", (True, None), "the ffn of these models is gated by silu"),
    **_each("activation_func_clamp_value", _NONE, "a clamped activation is not supported"),
    **_each("normalization", ("RMSNorm", "FusedRMSNorm", None), "the norms of these models are RMSNorm"),
    **_each("rmsnorm", (True, None), "the norms of these models are RMSNorm"),
    **_each("moe_config", _NONE, "mixtures of experts are not supported"),
    **_each("first_k_dense_replace shared_expert_num num_experts", (None, 0), "mixtures of experts are not supported"),
    **_each("multi_latent_attention", _NO, "latent attention is not supported"),
    **_each("rotary_percent", (1, None), "a rotation of part of a head's channels is not supported"),
    **_each("rotary_cos_format", ("rotate_half", 2, None), "here the halves of a head rotate"),
    **_each("rotary_seq_len_interpolation_factor rotary_scaling_factor", (1, None),
            "a rotation scaled by a factor is not supported"),
    **_each("nope_layer_interval", _NONE, "layers without rotation are not supported"),
    **_each("use_alibi_mask", _NO, "only rotary positions are supported"),
    **_each("mtp_num_layers num_nextn_predict_layers", (0, None),
            "layers that predict further tokens are not supported"),
    **_each("window_size window_attn_skip_freq", _NONE, "a window of attention is not supported"),
    **_each("experimental_attention_variant", _NONE, "only attention to all that is before is supported"),
    **_each("mask_func_type", ("attn_mask_fill", None), "only causal masks are supported"),
    **_each("sparse_mode", (0, 2, 3, None), "only causal masks are supported"),
    **_each("use_attention_mask", (True, None), "attention without a mask is not supported"),
    **_each("model_architecture", ("decoder_only", None), "only decoders are supported"),
    **_each("num_encoder_layers num_decoder_layers", _NONE, "only decoders are supported"),
    **_each("enable_hyper_connections enable_hc_head", _NO, "hyper-connections are not supported"),
    **_each("apply_query_key_layer_scaling", _NO, "attention scaled by the layer's number is not supported"),
    **_each("fp16_lm_cross_entropy", _NO, "the loss is computed in float32 or wider here"),
    **_each("ignore_token_id", (-100, None), "positions without a target are marked by -100 here"),
    **_each("post_layer_norm", (True, None), "a model without its last norm is not supported"),
}  # fmt: skip

# Reason why keys are not carried -> the keys.
_GROUPS: dict[str, str] = {
    "of MindFormers' classes and of generation": """
        type auto_register auto_map arch architectures model_type net_name model_name run_mode batch_size use_past
        use_past_shard is_dynamic
        block_size num_blocks max_decode_length max_length min_decode_length max_new_tokens repetition_penalty top_k
        top_p do_sample temperature use_cache checkpoint_name_or_path return_extra_loss return_hidden_states
        is_sample_acceleration llm_backend chunk_prefill parallel_decoding_params use_paged_attention
        tokenizer_class torch_dtype transformers_version dispatch_global_max_bs pre_process post_process prefill_only
        max_seq_len unk_token_id is_encoder_decoder keys_to_ignore_at_inference name_or_path is_flexible_shape
        use_kvcache_op use_incre_flash_attention use_prompt_flash_attention pretrained_model_dir mindformers_version""",
    "MindFormers keeps it and reads it nowhere": "layers_group embedding_size",
    "data.isolate_documents says whether the documents of a row see each other": "eod_reset use_eod_reset",
    "dropout is not applied here, whatever its value": """
        embed_dropout_prob hidden_dropout_prob attention_dropout_prob embedding_dropout_prob hidden_dropout
        attention_dropout hidden_dropout_rate attention_dropout_rate dropout_prob""",
    "train.precision says in what each part is computed": """
        layernorm_compute_type layernorm_compute_dtype softmax_compute_type softmax_compute_dtype rotary_dtype
        residual_dtype res_dtype embedding_init_type embedding_params_dtype fp32_residual_connection
        attention_softmax_in_fp32 router_dense_type rmsnorm_compute_2d compute_in_2d
        rl_config compute_dtype param_init_type params_dtype""",
    "a choice between implementations of the same arithmetic": """
        qkv_concat mlp_concat mla_qkv_concat use_flash_attention flash_attn use_ring_attention
        use_attn_mask_compression use_eod_attn_mask_compression use_rotary_position_ids use_rope_slice
        fused_norm fused_rms_norm fused_kernel bias_swiglu_fusion bias_dropout_fusion apply_rope_fusion input_layout
        input_sliced_sig enable_high_performance use_contiguous_weight_layout_attention
        use_interleaved_weight_layout_mlp chunk_loss_num pretraining_tp masked_softmax_fusion
        track_max_attention_logit print_separate_loss multiple_of ffn_dim_multiplier logn share_attention share_ffn
        actual_vocab_size mlp_bias""",
    "a schedule of the graph compiler or of its communication; the layout is in parallel": """
        parallel_config parallel_optimizer fine_grain_interleave pp_interleave_num offset context_parallel_algo
        comp_comm_parallel comp_comm_parallel_degree attn_reduce_scatter attn_allgather attn_allreduce
        ffn_reduce_scatter ffn_allgather ffn_allreduce use_alltoall disable_lazy_inline data_parallel_size
        tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size sequence_parallel
        context_parallel_size hierarchical_context_parallel_sizes micro_batch_num seq_split_num
        gradient_aggregation_group ulysses_degree_in_cp vocab_emb_dp cpu_offloading cpu_offloading_num_layers op_swap
        default_prefetch recompute select_recompute parallel_optimizer_comm_recompute select_comm_recompute
        mp_comm_recompute recompute_slice_activation select_recompute_exclude select_comm_recompute_exclude
        pipeline_stage cp_comm_type swap_config swap npu_nums_per_device tp_comm_overlap""",
    "initial weights have the deviations of the model's preset": """
        init_method output_layer_init_method param_init_std_rules mean""",
    "the loss is the mean over the targets of the global batch": "calculate_per_token_loss",
    "of mixtures of experts, of which this model has none": """
        norm_topk_prob use_fused_ops_topkrouter use_shared_expert_gating topk_method use_pad_tokens
        callback_moe_droprate coeff expert_model_parallel_size expert_tensor_parallel_size print_expert_load
        enable_expert_relocation expert_relocation_initial_iteration expert_relocation_freq group_wise_a2a
        routed_scaling_factor scoring_func n_group topk_group router_aux_loss_coef mtp_loss_factor
        mtp_loss_scaling_factor mtp_layer_list""",
    "of attention of other models": """
        use_sliding_window sliding_window max_window_layers layer_types use_fused_mla training_seqlen embed_layernorm
        num_residual_streams mhc_sinkhorn_iterations mhc_init_gating_factor mhc_layernorm_epsilon use_fused_mhc""",
}
_FAMILIES = {"moe_": "of mixtures of experts, of which this model has none", "dsa_": "of attention of other models",
             "return_": "of MindFormers' classes and of generation"}  # fmt: skip
_REASONS = {name: reason for reason, names in _GROUPS.items() for name in names.split()}
_AS_HERE = "its value is what this decoder computes with"


def reason_of(key: str) -> str | None:
    """Why a key (of the section, the first part of a dotted one) is not carried; None for a key that is not known."""
    if key in _REASONS:
        return _REASONS[key]
    if key in NEUTRAL or key in EVERYWHERE:
        return _AS_HERE
    return next((reason for start, reason in _FAMILIES.items() if key.startswith(start)), None)


def refuse_unknown(section: JsonObject, fields: frozenset[str], where: str) -> None:
    """UserError for a key that is neither a field of the model nor in the lists above; null says nothing."""
    for key, value in section.items():
        if value is None or key in fields or reason_of(key) is not None:
            continue
        near = nearest(key, sorted({*fields, *_REASONS, *NEUTRAL}))
        hint = f"did you mean '{near}'?" if near else "remove it if the model does not depend on it"
        raise UserError(
            f"{where}: {shown(key)} is {shown(value)}; no key of {SECTION} has this name here, so it may change the "
            f"arithmetic; {hint}"
        )
