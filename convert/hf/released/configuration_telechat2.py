"""TeleChat2's config for transformers and what builds on it, such as vLLM. The numbers are in config.json."""

from transformers import PretrainedConfig


class Telechat2Config(PretrainedConfig):
    """What config.json holds, under TeleChat2's names and under Llama's."""

    model_type = "telechat"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "ffn_hidden_size",
        "rms_norm_eps": "layer_norm_epsilon",
    }
