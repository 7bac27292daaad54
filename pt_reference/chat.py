"""Chat with a checkpoint from Python, on this backend.

model = open_chat("TeleChat2-7B")
answer, history = model.chat("What is a model?")
for text, history in model.chat("And a question?", history, stream=True, temperature=0.7, seed=1):
    print(text, end="", flush=True)
"""

from __future__ import annotations

from telechat_twins.convert.source import open_model
from telechat_twins.core.inference.chat import ChatModel
from telechat_twins.pt_reference.generate import Runner


def open_chat(
    checkpoint: str,
    *,
    tokenizer: str | None = None,
    control: str = "chat",
    precision: str = "fp32",
    quantize: str = "none",
) -> ChatModel:
    """A chat model from a released folder, a canonical checkpoint or a training run; options as in ``tele chat``."""
    return ChatModel(open_model(checkpoint), Runner, tokenizer, control, precision, quantize)
