"""Generation: sequences that grow token by token over a paged KV cache."""
