"""Wire types and gRPC stubs, generated from protos/miaotui/v1 by `make protos`."""
