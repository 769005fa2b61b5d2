"""Serving a recommender over HTTP: the engine that batches, the interface, its limits, and the page."""
