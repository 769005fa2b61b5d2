"""Who writes reasoning traces."""
