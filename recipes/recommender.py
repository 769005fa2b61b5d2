"""Load a trained recommender once and recommend many times.

Training and inference share everything that could differ between them: the tokenizer with the code tokens, the trie,
the prompt and the longest history. `Setting` holds it, training writes it into the adapter's manifest, inference reads
it back.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from reasonrec.data_gen.alignment import Renderer
from reasonrec.data_gen.prompts import Prompter
from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.models.load import (
    Method,
    add_code_rows,
    fingerprint,
    load_base,
    load_tokenizer,
    resize,
)
from reasonrec.tokenizers.artefact import Manifest, check_input, read_manifest
from reasonrec.tokenizers.decode import beam_search
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex
from reasonrec.tokenizers.prefix import padded
from reasonrec.tokenizers.state import UserState
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Setting:
    """What training and inference have to agree on.

    Attributes:
        base_model: Reference of the base model.
        method: How it was trained: full, lora or qlora.
        history_prompt: Template of histories.
        chat: Whether prompts go through the chat template.
        system: System message of the chat template.
        max_history: Longest history in items.
        one_per_prefix: Whether only answers were supervised.
        fingerprint: Fingerprint of the base model's weights.
        trust_remote_code: Whether the user allowed the base model's own code.
    """

    base_model: str
    method: Method
    history_prompt: str
    chat: bool
    system: str | None
    max_history: int
    one_per_prefix: bool = False
    fingerprint: str = ""
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Bundle:
    """Dataset, index and tokenizer as one: turns items into tokens and back.

    Attributes:
        dataset: The dataset.
        index: The item index.
        tokenizer: The LLM's tokenizer with the code tokens.
        vocabulary: Where they stand.
        trie: Trie of all items.
        renderer: Renders prompts and examples.
    """

    dataset: Dataset
    index: ItemIndex
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    trie: Trie
    renderer: Renderer = field(repr=False)

    @classmethod
    def build(cls, dataset: Dataset, index: ItemIndex, setting: Setting) -> Bundle:
        """Glue dataset, index and base model together.

        Raises:
            UserError: If the index was made from another dataset.
        """
        index.check_dataset(dataset.manifest)
        tokenizer = load_tokenizer(setting.base_model, trust_remote_code=setting.trust_remote_code)
        vocabulary = Vocabulary.extend(tokenizer, index.level_sizes)
        items = dataset.items
        texts = [" ".join(filter(None, parts)) for parts in items.select("category", "brand").iter_rows()]
        renderer = Renderer(
            Prompter(tokenizer, chat=setting.chat, system=setting.system),
            setting.history_prompt,
            [np.asarray(s) for s in dataset.train["items"].to_list()],
            vocabulary.item_token_ids(index.codes),
            items["title"].to_list(),
            texts,
            begin_id=vocabulary.begin_id,
            eos_id=tokenizer.eos_token_id,
            one_per_prefix=setting.one_per_prefix,
        )
        trie = Trie.from_codes(index.codes, index.level_sizes)
        return cls(dataset, index, tokenizer, vocabulary, trie, renderer)

    def row_texts(self) -> list[str]:
        """What each item's code rows start from."""
        items = self.dataset.items
        return [". ".join(filter(None, parts)) for parts in items.select("title", "category", "brand").iter_rows()]


def load_with_rows(setting: Setting, bundle: Bundle, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, str]:
    """The base model with freshly started code rows, and the fingerprint of its weights."""
    model = load_base(
        setting.base_model, method=setting.method, dtype=dtype, trust_remote_code=setting.trust_remote_code
    )
    print_of_base = fingerprint(model)
    add_code_rows(model, bundle.tokenizer, bundle.vocabulary, bundle.index.codes, bundle.row_texts())
    return model, print_of_base


class Recommender:
    """A trained model with its index: histories in, ranked items out.

    Attributes:
        bundle: Dataset, index and tokenizer.
        model: The causal LM, adapter included.
        setting: What it was trained with.
        trie: Trie of the items, on the model's device.
    """

    def __init__(self, bundle: Bundle, model: PreTrainedModel, setting: Setting) -> None:
        self.bundle = bundle
        self.setting = setting
        self.model = model.get_base_model() if hasattr(model, "peft_config") else model
        self.model.eval()
        self.trie = bundle.trie.to(self.model.device)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dataset: str | Path | None = None,
        index: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | None = None,
    ) -> Recommender:
        """Load what `recipes/sft.py` wrote.

        Args:
            path: Folder of the adapter or model.
            dataset: Its dataset; where the training found it by default.
            index: Its item index; likewise.
            dtype: Overrides the dtype (bfloat16).
            device: Overrides the device (the accelerator if there is one).

        Raises:
            UserError: If dataset, index or base model are not those of the training; the message names the hashes and
                the command that mends it.
        """
        bundle, model, setting, manifest = load_trained(
            path, dataset=dataset, index=index, dtype=dtype or torch.bfloat16
        )
        if setting.method != "qlora" or manifest.kind == "model":
            model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(bundle, model, setting)

    def prompts(self, histories: Sequence[Sequence[int] | np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded prompts: input_ids and attention_mask, each (users, length)."""
        return self.padded(
            [self.bundle.renderer.history_prompt_ids(h[-self.setting.max_history :]) for h in histories]
        )

    def padded(self, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded rows: input_ids and attention_mask, each (rows, length)."""
        return padded(ids, self.bundle.tokenizer.pad_token_id, self.model.device)

    def known(self, histories: Sequence[Sequence[int] | np.ndarray], *, strict: bool = False) -> list[np.ndarray]:
        """Histories without items that are not in the catalogue.

        Args:
            histories: Item numbers.
            strict: Refuse unknown items and empty histories instead of warning about them.

        Raises:
            UserError: In strict mode; it counts them.
        """
        arrays = [np.asarray(history, dtype=np.int64) for history in histories]
        known = [array[(array >= 0) & (array < self.bundle.index.n_items)] for array in arrays]
        unknown = sum(map(len, arrays)) - sum(map(len, known))
        empty = sum(len(array) == 0 for array in known)
        problems = []
        if unknown:
            rows = sum(len(a) != len(b) for a, b in zip(arrays, known, strict=True))
            problems.append(
                f"{unknown} items in {rows} histories are not in the catalogue (0..{self.bundle.index.n_items - 1})"
            )
        if empty:
            problems.append(f"{empty} of {len(known)} histories are empty")
        if problems and strict:
            raise UserError(f"{' and '.join(problems)}: correct them, or turn strict off to go on without them")
        if problems:
            warnings.warn(
                f"{' and '.join(problems)}: unknown items are skipped, an empty history is ranked by the prompt alone",
                stacklevel=3,
            )
        return known

    def recommend(
        self,
        histories: Sequence[Sequence[int] | np.ndarray],
        *,
        k: int = 10,
        num_beams: int = 50,
        exhaustive: bool = False,
        exclude: Sequence[Sequence[int] | np.ndarray] | None = None,
        batch_size: int = 16,
        strict: bool = False,
        progress: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rank items for each history.

        Args:
            histories: Item numbers, oldest first; the last `max_history` are read.
            k: Items to return.
            num_beams: Width of the search.
            exhaustive: Score the whole catalogue instead (a beam as wide as it is), for small ones.
            exclude: For each history the items that must not appear.
            batch_size: Histories read at a time; it does not change the result.
            strict: Refuse unknown items and empty histories instead of warning about them.
            progress: Show a progress bar.

        Returns:
            Items (users, k), -1 where fewer are allowed, and their log-probabilities (users, k).

        Raises:
            UserError: If a prompt is longer than the model's context, `num_beams` is smaller than `k`, an excluded
                item is unknown, or (strict) a history is empty or holds an unknown item.
        """
        histories = self.known(histories, strict=strict)
        if exclude is not None and len(exclude) != len(histories):
            raise UserError(f"exclude has {len(exclude)} lists for {len(histories)} histories: give one for each")
        if exhaustive:
            num_beams = max(self.bundle.index.n_items, k)
        # Similar lengths together, so that a batch is as short as can be. The result goes back to its place.
        order = np.argsort([min(len(h), self.setting.max_history) for h in histories], kind="stable")
        items = np.full((len(histories), k), -1, dtype=np.int64)
        scores = np.full((len(histories), k), -np.inf, dtype=np.float32)
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for chunk in tqdm(chunks, desc="recommending", unit="batch", disable=not progress):
            input_ids, mask = self.prompts([histories[i] for i in chunk])
            found = beam_search(
                self.model,
                self.trie,
                self.bundle.vocabulary,
                input_ids,
                mask,
                k=k,
                num_beams=num_beams,
                exclude=None if exclude is None else [exclude[i] for i in chunk],
            )
            items[chunk] = found.items.cpu().numpy()
            scores[chunk] = found.scores.float().cpu().numpy()
        return items, scores

    def state(self, history: Sequence[int] | np.ndarray = (), *, num_beams: int = 50) -> UserState:
        """Follow one user: items can be appended without reading the history again.

        Example:
            >>> state = recommender.state([50, 181])
            >>> state.search(k=10)
            >>> recommender.append(state, 172)
            >>> state.search(k=10)

        Args:
            history: Item numbers so far, oldest first.
            num_beams: Width of the widest search.

        Raises:
            UserError: If an item is not in the catalogue.
        """
        head, tail = self.bundle.renderer.history_prompt_parts()
        state = UserState(
            self.model,
            self.trie,
            self.bundle.vocabulary,
            head=head,
            tail=tail,
            max_history=self.setting.max_history,
            num_beams=num_beams,
        )
        for item in history:
            self.append(state, int(item))
        return state

    def append(self, state: UserState, item: int) -> None:
        """Append an item to a user's history.

        Raises:
            UserError: If it is not in the catalogue.
        """
        if not 0 <= item < self.bundle.index.n_items:
            raise UserError(f"item {item} is not in the catalogue, which has 0..{self.bundle.index.n_items - 1}")
        state.append(self.bundle.renderer.item_token_ids[item])


def load_trained(
    path: str | Path,
    *,
    dataset: str | Path | None = None,
    index: str | Path | None = None,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
) -> tuple[Bundle, Any, Setting, Manifest]:
    """Load a trained model with all that belongs to it, to recommend with or to train on.

    Args:
        path: Folder of the adapter or model.
        dataset: Its dataset; where the training found it by default.
        index: Its item index; likewise.
        dtype: Overrides the dtype, which is otherwise that of training: float32 for a full model, else bfloat16.
        trainable: Let its adapter train on.

    Returns:
        Dataset, index and tokenizer; the model (a `PeftModel` for an adapter); what it was trained with; its manifest.

    Raises:
        UserError: If dataset, index or base model are not those of the training; the message names the hashes and the
            command that mends it.
    """
    from peft import PeftModel

    path = Path(path)
    manifest = read_manifest(path)
    if manifest.kind not in ("adapter", "model"):
        raise UserError(f"{path} is a {manifest.kind}, not a trained model: give the output folder of recipes/sft.py")
    setting = Setting(**manifest.facts["setting"])
    data = Dataset.load(dataset or manifest.config["dataset"])
    item_index = ItemIndex.load(index or manifest.config["index"])
    remedy = (
        f"pass the one it was trained with, or train again: accelerate launch recipes/sft.py --index {index or '…'}"
    )
    if item_index.manifest is not None:
        check_input(manifest, "index", item_index.manifest, remedy)
    check_input(manifest, "dataset", data.manifest, remedy)
    bundle = Bundle.build(data, item_index, setting)
    if manifest.kind == "model":
        from transformers import AutoModelForCausalLM

        return bundle, AutoModelForCausalLM.from_pretrained(path, dtype=dtype or torch.float32), setting, manifest
    base = load_base(
        setting.base_model, method=setting.method, dtype=dtype, trust_remote_code=setting.trust_remote_code
    )
    check_base(manifest, base, setting)
    resize(base, bundle.vocabulary)
    return bundle, PeftModel.from_pretrained(base, path, is_trainable=trainable), setting, manifest


def check_base(manifest: Manifest, base: PreTrainedModel, setting: Setting) -> None:
    """Check that an adapter meets the base model it was trained on.

    Raises:
        UserError: If the weights differ; the message gives both fingerprints and the reference used in training.
    """
    actual = fingerprint(base)
    if actual != setting.fingerprint:
        raise UserError(
            f"this {manifest.kind} was trained on base weights {setting.fingerprint[:12]}… ({setting.base_model}), "
            f"but the base loaded now has {actual[:12]}…: load {setting.base_model} in the same revision, or train "
            "again"
        )


def setting_facts(setting: Setting) -> dict[str, Any]:
    """The setting as the manifest keeps it."""
    return {"setting": asdict(setting)}
