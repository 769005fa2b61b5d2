"""Rewards and metrics."""
