"""A small decoder without pre-training, for benchmarks that need many training runs on two CPU cores.

python tests/benchmarks/scratch_base.py runs/demo/scratch_base --dataset runs/demo/dataset

What it writes is a base model like any other: `sft.py --model runs/demo/scratch_base --method full`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reasonrec.data_gen.schema import Dataset


def make_scratch_base(
    folder: Path,
    texts: Iterable[str],
    *,
    hidden: int = 192,
    layers: int = 4,
    heads: int = 6,
    initializer_range: float = 0.02,
    seed: int = 0,
) -> Path:
    """Write a randomly initialised Llama and a byte-pair tokenizer trained on the items' text.

    Args:
        folder: Where to; an existing one is used as it is.
        texts: Text to train the tokenizer on.
        hidden: Width.
        layers: Number of layers.
        heads: Attention heads.
        initializer_range: Standard deviation of the weights; narrow models learn faster from about 1/√hidden.
        seed: Seed of the weights.

    Returns:
        The folder.
    """
    if (folder / "config.json").is_file():
        return folder
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            initializer_range=initializer_range,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=fast.eos_token_id,
            bos_token_id=None,
            pad_token_id=fast.pad_token_id,
        )
    )
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def main() -> None:
    """Write one for a dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", default="runs/demo/scratch_base")
    parser.add_argument("--dataset", default="runs/demo/dataset")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not Path(options.dataset).exists():
        print(f"no titles to make a tokenizer of: {options.dataset} is not there (make demo)")
        return
    titles = Dataset.load(options.dataset).items["title"].to_list()
    print(make_scratch_base(Path(options.out), titles, seed=options.seed))


if __name__ == "__main__":
    main()
