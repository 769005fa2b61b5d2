"""Which base model an adapter belongs to: a fingerprint of its stored weights, whatever they are loaded in.

Every tensor of the checkpoint counts with its name, shape and dtype: vectors whole, matrices by some blocks spread
over them. That tells other weights apart, a revision or a fine-tuned copy; who wants to forge one can.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from reasonrec.recipes.models.load import load_base, resolve_model
from reasonrec.tokenizers.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "v2_"  # the version; the first had none
PLACES = 8  # blocks of a matrix
STACK = 256  # most blocks of stacked matrices, such as the experts of a layer; each gets one if there are no more
ROWS, COLUMNS = 4, 64  # of a block: short runs, so that little is read


def fingerprint(reference: str) -> str:
    """The fingerprint of a model's stored weights, in any order of its files.

    Args:
        reference: Hub id, folder, or `package:NAME`; what is in the Hub's cache is read there.

    Raises:
        UserError: If it has no readable safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    parts = []
    try:
        with ExitStack() as stack:
            for path in weight_files(resolve_model(reference)):
                file = stack.enter_context(safe_open(path, framework="pt"))
                parts += [_digest_tensor(file, name) for name in file.keys()]  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"model={reference}: its safetensors files cannot be read: {error}") from error
    return PREFIX + hashlib.sha256(b"".join(sorted(parts))).hexdigest()


def weight_files(path: str) -> list[str]:
    """The files that `from_pretrained` loads weights from.

    Args:
        path: Folder or Hub id.

    Raises:
        OSError: If there are none, or the Hub does not answer.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    try:
        return [str(cached_file(path, SAFE_WEIGHTS_NAME))]
    except OSError:  # several files, or none
        index = Path(str(cached_file(path, SAFE_WEIGHTS_INDEX_NAME)))
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [str(cached_file(path, name)) for name in sorted(names)]


def _digest_tensor(file: Any, name: str) -> bytes:
    stored = file.get_slice(name)
    shape = list(stored.get_shape())
    digest = hashlib.sha256(json.dumps([name, stored.get_dtype(), shape]).encode())
    blocks = (stored[block] for block in _blocks(shape)) if len(shape) > 1 else [file.get_tensor(name)]
    for block in blocks:
        digest.update(block.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _blocks(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Where a matrix, or a stack of them, is read."""
    if 0 in shape:
        return
    *leading, rows, columns = shape
    width = min(columns, COLUMNS)
    height = min(rows, max(ROWS, ROWS * COLUMNS // width))
    stacked = math.prod(leading)  # 1 of a single matrix
    places = max(PLACES, min(stacked, STACK))
    for place in range(places):
        one = np.unravel_index(place * stacked // places, leading) if leading else ()
        top = place % PLACES * (rows - height) // (PLACES - 1)
        left = place * 3 % PLACES * (columns - width) // (PLACES - 1)  # not along the diagonal only
        yield (*(slice(int(i), int(i) + 1) for i in one), slice(top, top + height), slice(left, left + width))


def fingerprint_like(stored: str, model: PreTrainedModel, reference: str, *, trust_remote_code: bool = False) -> str:
    """A base model's fingerprint in the version of another one, to compare them.

    Args:
        stored: The other one.
        model: The model as it was loaded.
        reference: Where from.
        trust_remote_code: As it was loaded.
    """
    if stored.startswith(PREFIX):
        return fingerprint(reference)
    if model.get_input_embeddings().weight.dtype == torch.float16:  # it cannot hold all that bfloat16 can
        model = load_base(reference, method="full", trust_remote_code=trust_remote_code)
    return loaded_fingerprint(model)


def loaded_fingerprint(model: PreTrainedModel, n_rows: int = 256) -> str:
    """The first version, which older adapters have: some embedding rows and all 1-D weights of the loaded model."""
    digest = hashlib.sha256()
    weight = model.get_input_embeddings().weight
    tensors = [
        weight[:n_rows],
        *(p for name, p in sorted(model.named_parameters()) if p.ndim == 1 and "lora" not in name),
    ]
    for tensor in tensors:
        digest.update(tensor.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
