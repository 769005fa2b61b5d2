"""From a dataset to items as codes: what is read of them, what codes are made of, and how good they are."""
