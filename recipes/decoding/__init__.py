"""The engine: prefill, KV cache, packing, item search, scoring and sampling."""
