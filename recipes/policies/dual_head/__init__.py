"""R2ec's dual head: the LLM writes chains with its language head, and ranks items by vectors it reads itself."""

from reasonrec.recipes.policies.dual_head.policy import DualHead

__all__ = ["DualHead"]
