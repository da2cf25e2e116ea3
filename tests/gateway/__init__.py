"""Tests of the gateway: over real sockets, against fakes of the services behind it."""
