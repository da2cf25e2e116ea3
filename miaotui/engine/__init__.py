"""A stage's work: scheduling, batches, compute. Plain Python: no gRPC, no HTTP."""
