"""Sound to text and pictures to text. Knows nothing of HTTP or gRPC servers."""
