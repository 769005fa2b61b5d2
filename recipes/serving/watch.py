"""Picking up later versions of a catalogue while a server runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from reasonrec.recipes.serving.service import Service
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.output import MANIFEST

logger = logging.getLogger("reasonrec.serve")


class CatalogueWatch:
    """Looks at a catalogue's folder, and lets a service recommend from what takes its place.

    `grow_catalogue.py --overwrite` puts a whole folder where the one before was; a link that leads elsewhere will do
    as well. What cannot be taken over is said once, and the version before stays.

    Args:
        service: Who recommends.
        folder: The folder, whose present version is the service's.
        without: Experts of the checkpoint that are not to be heard.
        seconds: Between two looks.
    """

    def __init__(
        self, service: Service, folder: str | Path, without: Sequence[str] = (), seconds: float = 2.0
    ) -> None:
        self._service, self._folder, self._without, self._seconds = service, Path(folder), without, seconds
        self._seen = self._manifest()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="reasonrec-catalogue", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()

    def _manifest(self) -> bytes:
        """What is there; nothing for the moment in which one version takes the place of another."""
        try:
            return (self._folder / MANIFEST).read_bytes()
        except OSError:
            return b""

    def _watch(self) -> None:
        while not self._stop.wait(self._seconds):
            found = self._manifest()
            if not found or found == self._seen:
                continue
            self._seen = found
            try:
                later = self._service.recommender.with_catalogue(self._folder, self._without)
            except UserError as error:
                logger.error("the catalogue stays as it was: %s", error)
                continue
            self._service.take(later)
            catalogue = later.policy.catalogue
            logger.warning(
                "%s is recommended from now: %d items, %d of them retired",
                self._folder,
                catalogue.n_items,
                len(catalogue.retired),
            )
