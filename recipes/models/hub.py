"""The Hugging Face Hub: what is loaded from it, and what is pushed to it.

A repository of this kit *is* an artefact, with its manifest and hashes: there is no second format of settings. It is
fetched with `snapshot_download` and verified like any other folder. `ModelHubMixin.from_pretrained` would turn the
`config.json` of a stranger's repository into arguments of a constructor, which nothing here would have checked.

Who may read or write is the business of `hf auth login` and its environment variables; no key of this kit is a token.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reasonrec.recipes.models.checkpoint import TRAINED
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import KINDS
from reasonrec.tokenizers.output import MANIFEST
from reasonrec.tokenizers.terminal import one_line, shown

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_repository(name: str | Path) -> bool:
    """Whether a name is a repository's (`user/name`) and no folder that is here."""
    return isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None and not Path(name).exists()


def check_repository(name: str) -> None:
    """Check the name of a repository that is to be written.

    Raises:
        UserError: If the Hub has none of such names.
    """
    if not _REPOSITORY.fullmatch(name):
        raise UserError(f"repository={shown(name)} has to be a name on the Hub, such as you/my-recommender")


def local_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: where it is, or where the Hub's cache keeps it.

    Only files that such an artefact may have are downloaded; whether they are the ones that its manifest names is
    checked by whoever reads it.

    Args:
        path: A folder, or a repository on the Hub.
        revision: Branch, tag or commit of the repository.

    Raises:
        UserError: If the Hub does not give it, or a revision is given for a folder.
    """
    if not is_repository(path):
        if revision is not None:
            raise UserError(f"revision={shown(revision)} is for a repository on the Hub, and {path} is a folder here")
        return Path(path)
    from huggingface_hub import snapshot_download

    names = {name for kind in TRAINED for choice in KINDS[kind].required for name in choice.split("|")}
    patterns = {pattern for kind in TRAINED for pattern in (*KINDS[kind].allowed, *KINDS[kind].records)}
    at = "" if revision is None else f" in revision {shown(revision)}"
    with _hub(f"{path} is no folder here ({Path(path).absolute()}), and the Hub does not give it{at}"):
        allowed = sorted({MANIFEST, *names, *patterns})
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=allowed))


def push(folder: Path, repository: str, *, private: bool | None = None, message: str = "Publish a recommender") -> str:
    """Put a folder on the Hub as one commit; what the repository had beside it goes.

    `upload_folder` may take several commits: who loads in between, or after one failed, would get half of an artefact.

    Args:
        folder: A published folder (`recipes/publish.py`).
        repository: `user/name`; it is made if it is not there.
        private: Whether a new repository is private; as the account's default if None.
        message: Of the commit.

    Returns:
        Where it stands.

    Raises:
        UserError: If the Hub refuses or does not answer.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_repository(repository)
    with _hub(f"{repository} cannot be written"):
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        # A file of an earlier one would be a stranger to the manifest; hidden ones are the Hub's.
        stale = [name for name in api.list_repo_files(repository) if name not in files and not name.startswith(".")]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*you are about to commit a data file")  # the catalogue
            done = api.create_commit(
                repository,
                [
                    *(CommitOperationAdd(name, path) for name, path in files.items()),
                    *(CommitOperationDelete(name) for name in stale),
                ],
                commit_message=message,
            )
    return str(done.commit_url)


@contextmanager
def _hub(failed: str) -> Iterator[None]:
    """One clear line for whatever goes wrong with the Hub."""
    from huggingface_hub import constants

    try:
        yield
    except UserError:
        raise
    except Exception as error:  # answers, names, and errors of whichever HTTP library this version is built on
        offline = "; HF_HUB_OFFLINE is set, so nothing was asked for" if constants.HF_HUB_OFFLINE else ""
        raise UserError(
            f"{failed} (asked: {constants.ENDPOINT}, kept: {constants.HF_HUB_CACHE}{offline}): "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
