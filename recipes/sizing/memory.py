"""Whether a training fits: its memory, term by term, from a model's configuration and nothing else.

Weights, gradients and Adam's two moments are counted exactly, on a model without memory (PyTorch's `meta` device).
Activations follow the usual count of what a layer of a Llama-like decoder keeps for its backward pass (as Korthikanti
et al. 2022, https://arxiv.org/abs/2205.05198, without the attention matrix, which fused kernels do not keep). What is
left out: buffers of kernels, fragmentation, and whatever else runs on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reasonrec.recipes.models.load import Method
from reasonrec.recipes.models.precision import Precision

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NF4_BYTES = 0.516  # 4 bits, and 8-bit absolute maxima of 64 weights, themselves scaled in blocks of 256
FLOAT32 = 4


@dataclass(frozen=True)
class Shape:
    """What of a decoder decides its memory.

    Attributes:
        layers: Layers.
        hidden: Width of the residual stream.
        inner: Width inside the feed-forward layers.
        queries: Width of all queries together.
        keys: Width of all keys together.
        vocabulary: Rows of the embedding.
        linear: Weights of linear layers, the output layer left out: what 4 bits and LoRA are for.
        others: All other weights, each once.
        lora_per_rank: Weights of LoRA on all linear layers, for each unit of its rank.
    """

    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int
    vocabulary: int
    linear: int
    others: int
    lora_per_rank: int

    @classmethod
    def of(cls, config: PretrainedConfig, layers: int | None = None, *, trust_remote_code: bool = False) -> Shape:
        """The shape of a base model.

        Args:
            config: Its configuration.
            layers: How many of its layers are used; all if unset.
            trust_remote_code: Run code that comes with it.
        """
        from transformers import AutoModelForCausalLM

        text: Any = config.get_text_config()
        if layers is not None:
            text.num_hidden_layers = layers
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        head = model.get_output_embeddings()
        linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        weights = sum(m.weight.numel() for m in linear)
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            queries=heads * head_dim,
            keys=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
            vocabulary=model.get_input_embeddings().weight.shape[0],
            linear=weights,
            others=sum(p.numel() for p in model.parameters()) - weights,
            lora_per_rank=sum(m.in_features + m.out_features for m in linear),
        )

    @property
    def kept(self) -> int:
        """Numbers that a layer keeps of a token: norms, residuals, projections before and after rotation, SwiGLU."""
        return 5 * self.hidden + 3 * self.queries + 3 * self.keys + 4 * self.inner


@dataclass(frozen=True)
class Load:
    """What a training puts on it.

    Attributes:
        method: full, lora or qlora.
        batch: Examples in a batch.
        length: Tokens of the longest example.
        checkpointing: Whether activations are computed twice instead of kept.
        rank: LoRA's rank.
        code_rows: Rows of the embedding that are trained with LoRA.
        words: Whether words are trained on, and not codes alone: their loss is over the whole vocabulary.
    """

    method: Method
    batch: int
    length: int
    checkpointing: bool
    rank: int = 16
    code_rows: int = 0
    words: bool = False


def memory(shape: Shape, load: Load, precision: Precision) -> dict[str, float]:
    """The terms of a training's memory.

    Args:
        shape: The base model's.
        load: What is trained, and on how much at a time.
        precision: What is computed in, and where: a CPU expands 4-bit weights.

    Returns:
        Bytes by name.
    """
    width, full = precision.dtype.itemsize, load.method == "full"
    all_weights = shape.linear + shape.others
    if full:
        trained, weights = all_weights, float(all_weights * FLOAT32)
        if width < FLOAT32:  # autocast keeps a copy of what it has cast
            weights += shape.linear * width
    else:
        trained = shape.lora_per_rank * load.rank + load.code_rows * shape.hidden
        four_bit = load.method == "qlora" and precision.device.type != "cpu"
        weights = shape.linear * (NF4_BYTES if four_bit else width) + shape.others * width + trained * FLOAT32
    tokens = load.batch * load.length
    if load.checkpointing:  # the inputs of all layers, and one layer while it is computed again
        activations = tokens * width * (shape.layers * shape.hidden + shape.kept)
    else:
        activations = tokens * width * shape.layers * shape.kept
    # Logits, their softmax, and its gradient.
    columns = shape.vocabulary if load.words else max(load.code_rows, 1)
    return {
        "weights": weights,
        "gradients": trained * FLOAT32,
        "optimiser": trained * 2 * FLOAT32,
        "activations": activations,
        "logits": tokens * columns * 3 * FLOAT32,
    }
