"""The versions that a training runs under: a run that goes on under others is not the same bit for bit."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from reasonrec.tokenizers.artefact import kit_version

_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")


def versions() -> dict[str, str]:
    """The kit's version and those of the libraries that decide what a step computes, `none` where one is missing."""
    return {"reasonrec": kit_version()} | {name: _version(name) for name in _LIBRARIES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # bitsandbytes is not on every machine
        return "none"
