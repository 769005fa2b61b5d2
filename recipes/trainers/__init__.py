"""Narrow trainers and the pure maths they use."""
