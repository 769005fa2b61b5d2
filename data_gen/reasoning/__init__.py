"""Reasoning traces: cases, checks, synthesis."""
