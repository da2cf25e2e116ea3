"""Redis as a cache: sealed values behind a circuit breaker, at the gateway and at stage 0."""
