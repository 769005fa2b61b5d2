"""Parallel codes: an item is a set of tokens, one of each codebook, and the model chooses the order (REG4Rec)."""

from reasonrec.recipes.policies.parallel_codes.policy import ParallelCodes

__all__ = ["ParallelCodes"]
