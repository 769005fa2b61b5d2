"""Load a trained recommender once and recommend many times."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from reasonrec.recipes.bundle import Bundle, Setting, load_trained
from reasonrec.recipes.keys import PrecisionName
from reasonrec.recipes.models.precision import Precision, choose, load_finite
from reasonrec.tokenizers.decode import beam_search
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.prefix import padded
from reasonrec.tokenizers.state import UserState

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Recommender:
    """A trained model with its index: histories in, ranked items out.

    Attributes:
        bundle: Dataset, index and tokenizer.
        model: The causal LM, adapter included.
        setting: What it was trained with.
        precision: What it computes in, and why; None if the model was not loaded here.
        trie: Trie of the items, on the model's device.
    """

    def __init__(
        self, bundle: Bundle, model: PreTrainedModel, setting: Setting, precision: Precision | None = None
    ) -> None:
        self.bundle = bundle
        self.setting = setting
        self.precision = precision
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
        dtype: torch.dtype | PrecisionName | None = None,
        device: str | None = None,
    ) -> Recommender:
        """Load what `recipes/sft.py` wrote.

        Args:
            path: Folder of the adapter or model.
            dataset: Its dataset; where the training found it by default.
            index: Its item index; likewise.
            dtype: A dtype or its name (bf16, fp16, fp32); what the hardware is fast in if unset.
            device: Overrides the device (the accelerator if there is one).

        Raises:
            UserError: If dataset, index or base model are not those of the training; the message names the hashes and
                the command that mends it.
        """
        (bundle, model, setting, manifest), precision = load_finite(
            lambda chosen: load_trained(path, dataset=dataset, index=index, precision=chosen),
            choose(dtype, device or ("cuda" if torch.cuda.is_available() else "cpu")),
            itemgetter(1),
        )
        if setting.method != "qlora" or manifest.kind == "model":
            model = model.to(precision.device)
        return cls(bundle, model, setting, precision)

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
        exact: bool = True,
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
            exact: Search on until each list is proven to be the best of the catalogue. Off, it is a beam search: a
                little faster, and what other kits do.
            exhaustive: Score the whole catalogue instead (a beam as wide as it is), for small ones: the reference.
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
        unproven = 0
        if exhaustive:
            num_beams, exact = max(self.bundle.index.n_items, k), False
        # Similar lengths together, so that a batch is as short as can be. The result goes back to its place.
        order = np.argsort([min(len(h), self.setting.max_history) for h in histories], kind="stable")
        items = np.full((len(histories), k), -1, dtype=np.int64)
        scores = np.full((len(histories), k), -np.inf, dtype=np.float32)
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for chunk in tqdm(chunks, desc="recommending", unit="batch", disable=None if progress else True):
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
                exact=exact,
            )
            unproven += int((~found.proven).sum())
            items[chunk] = found.items.cpu().numpy()
            scores[chunk] = found.scores.float().cpu().numpy()
        if exact and unproven:
            warnings.warn(
                f"{unproven} of {len(histories)} lists may lack an item about as probable as their last one: the "
                f"search lost patience; raise num_beams={num_beams} to have them proven",
                stacklevel=2,
            )
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
