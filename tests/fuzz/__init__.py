"""Fuzzing of every entry point: HTTP, gRPC, and the frames between stages."""
