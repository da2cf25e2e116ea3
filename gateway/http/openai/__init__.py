"""Endpoints that speak as OpenAI's do, so that clients made for those work unchanged."""
