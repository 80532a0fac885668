"""Checks the fields of ``config.json`` that the family's reader did not read.

The rule: *strict where it changes a number, lenient where it cannot.*

* A field in :data:`IGNORED_FIELDS` has no effect on what the model computes from tokens to logits: training,
  labels, formats, how some other program runs it. It is ignored in silence: most files have some.
* A field in :data:`NUMERIC` is one that some implementation computes logits with, of this family or another.
  Our reader did not read it, so it is rejected by name: the model would compute other numbers than its
  author got. The names are those that the text decoders of transformers 5.23 read from their configuration
  (``tests/test_config_fields.py`` derives those of every family here again), their names in older files, and
  what vLLM, MLX and the code published with weights add.
* Any other field is one that no implementation reads for inference: private marks, notes, generation
  settings. A warning names it, and loading goes on.

A field that is ``null``, ``false`` or empty is ignored in all three cases, and so is a count or a size of 0,
such as Qwen3-Coder's ``shared_expert_intermediate_size``. The same rule holds inside a RoPE scaling and a
quantisation, with the names that have an effect there.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from tpjax.config import brief
from tpjax.errors import ConfigError

log = logging.getLogger(__name__)

_MOST_NAMES_SHOWN = 20
# Names of what 0 says that there is none of; with max_window_layers=0 every layer has the window.
_COUNT = re.compile(r"(num|n)_.+|(?!max_).+_(size|rank|layers|experts)")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


IGNORED_FIELDS = _names(
    """
    _name_or_path architectures attn_implementation auto_map cache_implementation chunk_size_feed_forward
    dtype gradient_checkpointing id2label initializer_range is_decoder is_llama_config label2id
    model_max_length model_type name_or_path output_attentions output_hidden_states pretraining_tp
    problem_type reorder_and_upcast_attn return_dict task_specific_params tokenizer_class torch_dtype
    transformers.js_config transformers_version unsloth_fixed unsloth_version use_cache

    attention_dropout attn_pdrop classifier_dropout embd_pdrop embedding_dropout hidden_dropout
    resid_pdrop residual_dropout summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj

    output_router_logits router_aux_loss_coef router_jitter_noise

    bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id
    """
)

_OF_TRANSFORMERS = """
    H_cycles L_bp_cycles L_cycles _remove_final_layer_norm activation activation_function adapter_rank
    add_bias_linear add_cross_attention alibi apply_residual_connection_post_layernorm attention_bias
    attention_chunk_size attention_head_dim attention_hidden_size attention_in_multiplier attention_layers
    attention_multiplier attention_out_bias attention_out_multiplier attention_type attention_value_scale
    attn_config attn_logit_softcapping attn_scale attn_temperature_tuning bias block_auto_adjust_ff_dim
    block_ffn_dim_multiplier block_multiple_of block_size cca_time0 cca_time1 clip_qkv concat_input
    conv_L_cache conv_bias conv_kernel cross_attn_all_layers cross_attn_k d_model decoder_bias
    decoder_config decoder_sparse_step dff do_layer_norm_before embedding_multiplier embedding_scale
    embedding_size enable_bias enable_pronunciation enable_shape encoder_config expert_ffn_hidden_size
    expert_selection_fn ffn_act_fn ffn_config ffn_dim ffn_hidden_size final_logit_softcapping
    first_k_dense_replace floor_scale full_attn_alpha_factor full_attn_beta_factor gated_norm_rank gating
    hc_eps hc_magnitude hc_mult head_dim hidden_act hidden_activation hidden_mamba_act hidden_size
    hidden_size_per_layer_input hybrid_layer_ids index_head_dim index_n_heads index_topk indexer_types
    intermediate_multiple_size intermediate_size is_causal is_encoder_decoder is_moe kda_lower_bound
    kda_safe_gate keep_window_size key_multiplier kv_channels kv_lora_rank kv_sharing_modes lambda_std_dev
    layer_norm_elementwise_affine layer_norm_eps layer_norm_epsilon layer_rope_theta layer_types
    layers_block_type layers_num_experts learnable_sink_init linear_a_log_max linear_a_log_min
    linear_allow_neg_eigval linear_attn_alpha_factor linear_attn_beta_factor linear_conv_kernel_dim
    linear_head_dim linear_key_head_dim linear_num_heads linear_num_key_heads linear_num_value_heads
    linear_value_head_dim lm_head_bias lm_head_multiplier local_attention_window_len logit_scale
    logits_scaling mamba_chunk_size mamba_conv_bias mamba_d_conv mamba_d_head mamba_d_ssm mamba_d_state
    mamba_dt_rank mamba_expand mamba_head_dim mamba_headdim mamba_hidden_act mamba_n_groups mamba_n_heads
    mamba_ngroups mamba_norm_before_gate mamba_num_heads mamba_proj_bias mamba_rms_norm
    max_position_embeddings mlp_alpha_factor mlp_beta_factor mlp_bias mlp_hidden_act mlp_layer_types
    mlp_multipliers mlp_only_layers moe_intermediate_size moe_latent_size moe_layer_end_index
    moe_layer_interval moe_layer_start_index moe_norm_min moe_num_experts moe_num_shared_experts
    moe_routed_scaling_factor moe_router_logit_softcapping moe_shared_expert_intermediate_size moe_topk
    multi_query mup_enabled n_ctx n_embd n_group n_groups n_head n_heads n_inner n_layer n_layers
    n_mamba_heads n_positions n_routed_experts n_shared_experts new_decoder_architecture no_rope_layers
    norm_bias norm_eps norm_epsilon norm_topk_prob num_attention_heads num_attention_heads_per_layer
    num_dense_layers num_experts num_experts_per_tok num_heads num_hidden_layers num_key_value_heads
    num_kv_heads num_kv_shared_layers num_layers num_layers_per_stack num_ln_in_parallel_attn
    num_local_experts num_mem_blocks num_shared_experts original_max_position_embeddings parallel_attn
    per_layer_config position_embedding_type prefix_dense_intermediate_size
    prefix_dense_sliding_window_pattern prefix_lm projectors_bias pruned_heads q_lora_rank qk_head_dim
    qk_layernorm qk_nope_head_dim qk_rope_head_dim qkv_bias query_pre_attn_scalar rescale_embeddings
    rescale_prenorm_residual residual_multiplier rms_norm_eps rope_interleave rope_parameters rotary_dim
    route_scale routed_scaling_factor router_bias router_hidden_size router_scaling_factor
    scale_attn_by_inverse_layer_idx scale_attn_weights scale_depth scale_emb scale_embedding
    shared_expert_combination_strategy shared_expert_intermediate_size shared_intermediate_size
    sliding_window sliding_window_pattern ssm_in_multiplier ssm_multipliers ssm_out_multiplier
    ssm_state_size swiglu_alpha swiglu_limit text_config tie_word_embeddings time_step_floor
    time_step_limit time_step_max time_step_min topk_group topk_method type_vocab_size use_attention_gate
    use_bias use_bidirectional_attention use_conv_bias use_expert_bias use_long_context use_mem_rope
    use_parallel_residual use_post_norm use_qk_norm use_qkv_bias use_sandwich_norm
    use_shared_attention_adapter use_sliding_window v_head_dim vocab_size vocab_size_per_layer_input
    window_size word_embed_proj_dim zero_expert_num
"""
_OF_OLDER_FILES = """
    _sliding_window_pattern cross_attention_hidden_size interpolate_factor full_attn_mod
    no_rope_layer_interval partial_rotary_factor rope_interleaved rope_local_base_freq rope_scaling
    rope_theta rotary_emb_base rotary_pct
"""
_OF_OTHERS = """
    attn_layer_indices cla_share_factor compression_config dim_model_base dual_chunk_attention_config
    experts_per_token interleaved_sliding_window layer_switch logits_soft_cap max_window_layers mlp_type
    moe_layer_freq mrope_section multi_query_attention norm_type
    order_of_interleaved_layers qk_norm quantization quantization_config rope_ratio scoring_func use_cla
    use_dynamic_ntk use_embedding_sharing use_gated_activation use_logn_attn use_mrope use_parallel_block
"""
NUMERIC = _names(_OF_TRANSFORMERS + _OF_OLDER_FILES + _OF_OTHERS)

# Inside a RoPE scaling: transformers reads none of these for the types here, others do. What one type of
# scaling reads (``low_freq_factor``) is without effect on another: transformers' formulas do not look at it.
ROPE_NUMERIC = _names(
    "alpha attn_factor extrapolation_factor llama_4_scaling_beta long_mscale mrope_interleaved rope_ratio "
    "short_mscale"
)

# Inside a quantisation: what defines how stored bytes become numbers, in any method.
QUANTIZATION_NUMERIC = _names(
    """
    activation_scale_ub activation_scheme axis bits block_size channel_scale config_for_layers config_groups
    dynamic_config expert_dtype fmt format forward_dtype forward_method group_size hadamard_group_size
    hadamard_size has_zero_point in_group_size is_static kv_cache_dtype linear_class llm_int8_threshold
    nbits nbits_per_codebook num_codebooks nvfp4_embed out_group_size p pre_quant_scale pseudoquantization
    quant_algo quant_type quantization quantization_mode quantized_layers rms_norm_eps shared_layer_config
    sparsity_config sym transform_config transform_init use_rms_norm view_as_float weight_block_size weights
    zero_point
    """
)


def check_unread(
    where: str,
    unread: Mapping[str, Any],
    ignored: frozenset[str] = IGNORED_FIELDS,
    numeric: frozenset[str] = NUMERIC,
) -> None:
    """Rejects, names in a warning, or ignores the fields that no reader asked for.

    Args:
        where: name of the object in messages.
        unread: name -> value.
        ignored: names that are ignored in silence.
        numeric: names that are rejected.

    Raises:
        ConfigError: a field could change what the model computes.
    """
    left = {name: value for name, value in unread.items() if name not in ignored and not is_off(name, value)}
    for name, value in left.items():
        if name in numeric:
            raise ConfigError(f"{where}: {name}={brief(value)} is not supported")
    if left:
        more = len(left) - _MOST_NAMES_SHOWN
        names = [name if name.isidentifier() else brief(name) for name in list(left)[:_MOST_NAMES_SHOWN]]
        log.warning(
            "%s: ignored, as nothing reads it for inference: %s%s",
            where,
            ", ".join(names),
            f" and {more} more" if more > 0 else "",
        )


def is_off(name: str, value: Any) -> bool:
    """Returns whether a field is ``null``, ``false``, ``{}``, ``[]`` or ``""``, or a count of 0."""
    none_of_it = type(value) is int and value == 0 and _COUNT.fullmatch(name) is not None
    return none_of_it or value is None or value is False or value in ({}, [], "")
