"""Text generation: from a prompt to text that comes bit by bit. Knows nothing of HTTP or gRPC
servers."""
