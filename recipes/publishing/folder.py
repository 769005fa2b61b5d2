"""The folder that is published: a checkpoint without what belongs to the run it came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from reasonrec.recipes.models.checkpoint import Setting, base_of, trained_manifest
from reasonrec.recipes.models.fingerprint import PREFIX, fingerprint, weight_files
from reasonrec.recipes.models.load import is_hub_id, resolve_model
from reasonrec.recipes.policies.base import POLICIES
from reasonrec.recipes.publishing.card import About, Base, base_licence, card
from reasonrec.recipes.publishing.commands import lineage, stage_of
from reasonrec.recipes.publishing.merge import merge
from reasonrec.recipes.publishing.scan import scan
from reasonrec.tokenizers.artefact import read_manifest, staged
from reasonrec.tokenizers.catalogue import CATALOGUE_FILE, TEXTS, Catalogue
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import Manifest
from reasonrec.tokenizers.output import MANIFEST
from reasonrec.tokenizers.places import own_name

if TYPE_CHECKING:
    from reasonrec.recipes.publish import PublishConfig

_INPUTS = ("dataset", "index", "traces", "model", "direct")


def build_folder(config: PublishConfig, out: Path) -> Path:
    """Write the folder.

    Args:
        config: What is published, and how.
        out: Where to; the caller claimed it.

    Raises:
        UserError: If the checkpoint is none, its base or report is another one, its titles may not be published, or a
            file holds what is private.
    """
    source = Path(config.model)
    manifest = trained_manifest(source)
    setting, catalogue = Setting.stored(manifest), Catalogue.load(source, manifest.facts)
    check_titles(config, catalogue, setting)
    measured, own = (None, []) if config.report is None else read_report(Path(config.report), source, manifest)
    kind = "model" if config.merge else manifest.kind
    if config.merge and manifest.kind == "model":
        raise UserError(f"merge=true, but {source} is a whole model already: leave it out")
    base = check_base_weights(config, source, manifest, setting)
    reduced = {
        "stage": stage_of(manifest),
        "base_model": base.name,
        "base_revision": base.revision,
        "seed": manifest.seed,
    }
    inputs = {name: manifest.inputs[name] for name in _INPUTS if name in manifest.inputs}
    about: dict[str, Any] = {"kind": kind, "config": reduced, "seed": manifest.seed}
    about["inputs"] = inputs | {"published": manifest.hash}
    with staged(out, overwrite=config.overwrite, **about) as (folder, facts):
        facts.update(manifest.facts)
        for name in manifest.files:  # no logs, no pictures, nothing that was put there later
            if not config.merge or name.startswith("expert_") or name == "train_metrics.json":
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, folder / name)
        if config.merge:
            base_model = config.base_model or base_of(manifest, source)
            facts.update(merge(source, folder, base_model=base_model, trust_remote_code=config.trust_remote_code))
        if not config.titles:
            without_titles(catalogue.items).write_parquet(folder / CATALOGUE_FILE, compression="zstd")
        text = card(
            About(
                repository=config.repository or "you/my-recommender",
                kind=kind,
                manifest=manifest,
                setting=setting,
                catalogue=catalogue,
                base=base,
                lineage=lineage(source, manifest),
                rows=manifest.facts.get("rows"),
                measured=measured,
                own=own,
                licence=config.license,
                titles=config.titles,
            )
        )
        (folder / "README.md").write_text(text, encoding="utf-8")
        scan(folder, {MANIFEST: json.dumps(about | {"facts": facts}, indent=2)})
    return out


def check_titles(config: PublishConfig, catalogue: Catalogue, setting: Setting) -> None:
    """Check that the texts of the items may be published, before any work.

    Raises:
        UserError: If they may not, or a model that reads them is to be published without.
    """
    if not config.titles and not POLICIES.find(setting.policy).with_codes:
        raise UserError(f"titles=false, but policy={setting.policy} reads titles: it cannot be published without them")
    if config.titles and not config.dry_run and catalogue.facts.get("redistributable") is not True:
        unknown = "redistributable" not in catalogue.facts
        terms = "it does not say (made by an older version)" if unknown else catalogue.facts.get("terms") or "no terms"
        raise UserError(
            f"the titles of {catalogue.name} may not be published ({terms}): pass --titles false, which puts raw ids "
            "in their place, or --dry_run true for a folder of your own"
        )


def without_titles(items: pl.DataFrame) -> pl.DataFrame:
    """Items with their raw ids for titles, and no other text."""
    empty = [pl.lit("").alias(name) for name in TEXTS if name != "title"]
    return items.with_columns(pl.col("item_id").alias("title"), *empty).select(items.columns)


def check_base_weights(config: PublishConfig, source: Path, manifest: Manifest, setting: Setting) -> Base:
    """The base model, its weights checked where an adapter needs them.

    Raises:
        UserError: If they are others than those of the training, or not to be found.
    """
    reference = config.base_model or base_of(manifest, source)
    name, on_hub = own_name(reference), is_hub_id(reference)
    if manifest.kind == "model":
        return Base(name, on_hub)
    found = fingerprint(reference)
    if setting.fingerprint.startswith(PREFIX) and found != setting.fingerprint:
        raise UserError(
            f"{source} was trained on base weights {setting.fingerprint[:12]}… ({setting.base_model}), but {name} has "
            f"{found[:12]}…: pass the base of the training as --base_model"
        )
    file = Path(weight_files(resolve_model(reference))[0])
    snapshot = file.parent.name if file.parent.parent.name == "snapshots" else None
    return Base(name, on_hub, snapshot, base_licence(file.parent))


def read_report(report: Path, source: Path, manifest: Manifest) -> tuple[Mapping[str, Any], list[str]]:
    """The metrics of a report, and which of its rows are this checkpoint's, or of the one it is a copy of.

    Raises:
        UserError: If the checkpoint is not among the models that it compares.
    """
    made = read_manifest(report, "report")
    same = {manifest.hash, manifest.inputs.get("published")}
    if stage_of(manifest) == "judge_reasoning":  # the model as it was, with a verdict
        same.add(manifest.inputs.get("model"))
    names = [Path(place).name for place, found in made.inputs.items() if found in same]
    if not names:
        raise UserError(
            f"report={report} compares {', '.join(sorted(set(made.inputs) - {'dataset'})) or 'no models'}, and "
            f"none of them is {source} ({manifest.hash[:12]}…) as it is now: evaluate it with recipes/eval_ranking.py"
        )
    metrics = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    rows = [row for row in metrics["rows"] if row["mode"] in ("direct", "reasoning")]
    return metrics, [row["name"] for row in rows if row["name"].partition(",")[0] in names]
