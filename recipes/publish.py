"""Publish a trained recommender on the Hugging Face Hub, with a model card filled from its run.

accelerate launch recipes/publish.py --config recipes/configs/demo/publish.yaml

The folder holds all that recommending needs beside an adapter's base model, and nothing of the run: no interaction, no
user, no path, no name of a machine. It is scanned before it is pushed. Log in with `hf auth login`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from reasonrec.recipes.args import parse, run
from reasonrec.recipes.keys import TRUST_HELP
from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.output import claim_output, releasing_outputs
from reasonrec.tokenizers.terminal import say


@dataclass
class PublishConfig:
    """Configuration of a publication."""

    model: str = field(metadata={"help": "folder of the trained model (sft.py, grpo.py, fuse.py)", "path": True})
    output_dir: str = field(metadata={"help": "folder that is published", "path": "name"})
    repository: str | None = field(default=None, metadata={"help": "where on the Hub: you/my-recommender"})
    report: str | None = field(
        default=None, metadata={"help": "report (eval_ranking.py) whose numbers the card shows", "path": True}
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "an adapter's base model (Hub id or folder), if it moved since the training", "path": True},
    )
    merge: bool = field(default=False, metadata={"help": "merge the adapter into its base: one checkpoint in float32"})
    titles: bool = field(default=True, metadata={"help": "publish titles; false puts raw ids in their place"})
    license: str | None = field(default=None, metadata={"help": "licence of what is published, such as apache-2.0"})
    private: bool | None = field(
        default=None, metadata={"help": "is a new repository private? As the account's default if unset"}
    )
    dry_run: bool = field(default=False, metadata={"help": "make the folder, and push nothing"})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST_HELP})
    overwrite: bool = field(default=False, metadata={"help": "move an existing output_dir aside"})

    def __post_init__(self) -> None:
        if self.repository is None and not self.dry_run:
            raise UserError("repository is not set: say where to publish (you/my-recommender), or pass --dry_run true")


@releasing_outputs()
def publish(config: PublishConfig) -> str | None:
    """Make the folder, and push it unless this is a dry run.

    Returns:
        Where it stands on the Hub; None after a dry run.

    Raises:
        UserError: If something must not be published, or the Hub refuses.
    """
    from reasonrec.recipes.models.hub import check_repository, push
    from reasonrec.recipes.publishing.folder import build_folder
    from reasonrec.tokenizers.artefact import read_manifest

    if config.repository is not None:
        check_repository(config.repository)
    out = claim_output(config.output_dir, overwrite=config.overwrite)
    build_folder(config, out)
    manifest = read_manifest(out)
    facts = manifest.facts["catalogue"]
    say(f"{out} holds the {manifest.kind}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if config.dry_run or config.repository is None:
        if config.titles and facts.get("redistributable") is not True:
            say(
                f"the titles in it are for you alone ({facts.get('terms') or 'their terms are not known'}): a push "
                "would take --titles false"
            )
        say("dry run: nothing was pushed")
        return None
    where = push(out, config.repository, private=config.private)
    say(f"published: {where}")
    return where


def publish_again(path: Path | None, base_model: str, repository: str, **options: Any) -> str:
    """Publish a checkpoint that is loaded.

    Args:
        path: The folder it was loaded from.
        base_model: Where its base model is.
        repository: Where to.
        **options: Further keys of `PublishConfig`.

    Returns:
        Where it stands.

    Raises:
        UserError: If there is no folder, or as `publish`.
    """
    if path is None:
        raise UserError("this recommender was not loaded from a folder: save it, and load that")
    with TemporaryDirectory() as folder:
        out = str(Path(folder) / "published")
        where = publish(PublishConfig(str(path), out, repository, base_model=base_model, **options))
    return str(where)


def main() -> None:
    """Parse, build, scan, push."""
    (config,) = parse([PublishConfig])

    # PyTorch and what is built on it take seconds to import; by now it is known that they are needed.
    if is_first_process():
        publish(config)


if __name__ == "__main__":
    run(main)()
