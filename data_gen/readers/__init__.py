"""Readers of raw data, one file a source."""
