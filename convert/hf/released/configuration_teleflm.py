"""Tele-FLM's config for transformers and what builds on it, such as vLLM. The numbers are in config.json."""

from transformers import LlamaConfig


class TeleFLMConfig(LlamaConfig):
    """Llama's, with the multipliers of muP (use_mup, input_mult, output_mult, mup_scale_factor) beside."""

    model_type = "TeleFLM"
