"""Shipped configurations, one folder per recipe."""
