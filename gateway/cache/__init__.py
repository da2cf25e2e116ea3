"""Answer cache and prompt cache, embedded or in Redis."""
