"""Random language models of Hugging Face families, so small that building one takes no time.

Each has one of the tokenizers of conftest.py, and what those can do to padding: an id that the model knows, an id
that is left over in its table, or one after its last.
"""

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

N, LAYERS = 32, 3
SIZES = dict(
    hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
    max_position_embeddings=N, pad_token_id=None, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    "gpt2": (
        GPT2Config,
        dict(vocab_size=300, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=N, bos_token_id=2, eos_token_id=2),
    ),
    "llama": (LlamaConfig, dict(vocab_size=300, **SIZES)),
    "qwen2": (Qwen2Config, dict(vocab_size=320, **SIZES)),
    "qwen3": (Qwen3Config, dict(vocab_size=320, head_dim=6, **SIZES)),
    "mistral": (MistralConfig, dict(vocab_size=330, sliding_window=6, **SIZES)),
    "gemma": (GemmaConfig, dict(vocab_size=300, head_dim=8, **SIZES)),
}
TOKENIZERS = {
    "gpt2": "gpt2", "llama": "bpe", "qwen2": "llama3", "qwen3": "llama3", "mistral": "llama2", "gemma": "bpe",
}  # fmt: skip


def language_model(family: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A model whose every weight matters: norms and biases are moved off 1 and 0. Dropout is there, but off."""
    kind, sizes = CONFIGS[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**{**sizes, **changes}))
    move(model)
    return model.eval()


@torch.no_grad()
def move(module: torch.nn.Module) -> None:
    for weight in module.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
