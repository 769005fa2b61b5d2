"""The rows of an evaluation: baselines, trained models in both modes, and the controls that belong to them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl

from reasonrec.data_gen.histories import UserHistory
from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.evaluation.compare import BASELINE, CONTROL, Row
from reasonrec.recipes.evaluation.controls import other_histories
from reasonrec.recipes.keys import PrecisionName
from reasonrec.recipes.models.checkpoint import OTHER
from reasonrec.recipes.rankers import baselines, sasrec
from reasonrec.recipes.rankers.base import Ranker
from reasonrec.recipes.rankers.model import ModelRanker, may_repeat
from reasonrec.recipes.rankers.reasoning import Reasoned, Reasoner, Thinking, control_chains
from reasonrec.recipes.rankers.top_k import KS
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import check_input, read_manifest
from reasonrec.tokenizers.terminal import say


class RankingOptions(Protocol):
    """How rows are ranked; `recipes/eval_ranking.py` has them all."""

    num_beams: int
    exact: bool
    exhaustive: bool
    batch_size: int
    control: bool
    baselines: bool
    window: int
    sasrec_trials: int
    base_model: str | None
    precision: PrecisionName
    trust_remote_code: bool
    device: str | None
    seed: int


class Table:
    """Ranks the same cases with one method after the other.

    Args:
        options: How.
        dataset: The dataset.
        cases: Its held-out rows.

    Attributes:
        rows: The rows so far.
        claims: Pairs of names (a, b) whose difference is tested.
        thoughts: The first chain for each case, as text, by the name of the row.
    """

    def __init__(self, options: RankingOptions, dataset: Dataset, cases: pl.DataFrame) -> None:
        self.options, self.dataset, self.cases = options, dataset, cases
        self.rows: list[Row] = []
        self.claims: list[tuple[str, str]] = []
        self.thoughts: dict[str, list[str]] = {}
        self._direct: set[str] = set()  # hashes of the models that stand in the table
        self._histories = UserHistory.of_rows(cases)
        self._repeats = may_repeat(cases)

    def add_baselines(self) -> None:
        """Counting baselines, and SASRec tuned on validation."""
        options = self.options
        if options.baselines:
            for baseline, note in baselines.standard(self.dataset, window=options.window):
                self._rank(baseline, BASELINE, note)
        if options.sasrec_trials:
            model, tried = sasrec.tune(self.dataset, options.sasrec_trials, sasrec.SasrecConfig(seed=options.seed))
            note = f"best of {len(tried)} configurations on validation"
            self._rank(model, BASELINE, note)

    def add_direct(self, path: str) -> None:
        """A trained model, compared with those before it, and the same model given another user's history.

        That control is left out where the model that this one started from stands in the table: it was asked there.
        """
        options, recommender = self.options, self._load(path)
        how = "exact search" if options.exact else f"beam {options.num_beams}"
        if options.exhaustive or options.num_beams >= self.dataset.n_items:
            how = "exhaustive"
        name = f"{Path(path).name}, {how}"

        ranker = ModelRanker(
            recommender,
            name,
            num_beams=options.num_beams,
            exact=options.exact,
            exhaustive=options.exhaustive,
            batch_size=options.batch_size,
            progress=True,
        )
        note = f"{recommender.setting.base_model}, {recommender.setting.method}"
        self.claims += [(name, row.name) for row in self.rows if row.mode == "direct"]  # such as what it started from
        self._rank(ranker, "direct", note)
        manifest = read_manifest(path)
        if options.control and manifest.inputs.get("model") not in self._direct:
            other = f"{Path(path).name}, another user's history"
            donors = zip(self._histories, other_histories(self.cases, options.seed), strict=True)
            strangers = [replace(own, shown=np.asarray(shown)) for own, shown in donors]  # behind one's own mask
            self._add(other, CONTROL, note, lambda: ranker.rank_histories(strangers, max(KS), repeats=self._repeats))
            self.claims.append((name, other))
        if options.baselines:
            self.claims.append((name, "popularity"))
        self._direct.add(manifest.hash)

    def add_reasoning(self, path: str, thinking: Thinking) -> None:
        """A trained model behind its own chains, and behind chains that cannot help.

        The model's direct row, if it is there, is what reasoning has to beat.
        """
        options, recommender = self.options, self._load(path)
        reasoner = Reasoner(recommender, max(KS), options.num_beams, options.batch_size, progress=True)
        n, folder = thinking.chains, Path(path).name
        name = f"{folder}, {'1 greedy chain' if n == 1 else f'{n} sampled chains'}, beam {options.num_beams}"
        reasoned: list[Reasoned] = []

        def think() -> np.ndarray:
            reasoned.append(reasoner(self._histories, thinking, repeats=self._repeats))
            return reasoned[0].items

        note = f"{recommender.setting.base_model}, {recommender.setting.method}"
        self._add(name, "reasoning", note, think)
        (own,) = reasoned
        note = f"{note}; {own.cut.mean():.1%} of the chains were cut"
        self.rows[-1] = replace(self.rows[-1], tokens_per_user=float(own.tokens.mean()), note=note)
        self.thoughts[name] = [reasoner.readable(chains[0]) for chains in own.chains]
        direct = [row.name for row in self.rows if row.mode == "direct"]
        self.claims += [(name, other) for other in direct]
        if not options.control:
            return
        for control, chains in control_chains(reasoner, self._histories, own.chains, options.seed).items():
            rank = functools.partial(reasoner.behind, self._histories, chains, repeats=self._repeats)
            self._add(f"{folder}, {control}", CONTROL, "the same beam behind a chain that was put there", rank)
            self.claims.append((name, self.rows[-1].name))
        if n > 1:
            rank = functools.partial(reasoner.variants, self._histories, n, repeats=self._repeats)
            self._add(f"{folder}, {n} prompts merged", CONTROL, "what merging alone buys", rank)
            self.claims.append((name, self.rows[-1].name))

    def _load(self, path: str) -> Recommender:
        check_input(read_manifest(path), "dataset", self.dataset.manifest, OTHER)
        recommender = Recommender.load(
            path,
            base_model=self.options.base_model,
            dtype=self.options.precision,
            device=self.options.device,
            trust_remote_code=self.options.trust_remote_code,
        )
        say(f"{path}: {recommender.precision}")
        return recommender

    def _rank(self, ranker: Ranker, mode: str, note: str) -> None:
        self._add(ranker.name, mode, note, lambda: ranker.rank(self.cases, max(KS)))

    def _add(self, name: str, mode: str, note: str, rank: Callable[[], np.ndarray]) -> None:
        begin = time.perf_counter()
        ranking = rank()
        seconds = (time.perf_counter() - begin) / max(self.cases.height, 1)
        self.rows.append(Row(name, mode, ranking, seconds_per_user=seconds, note=note))
