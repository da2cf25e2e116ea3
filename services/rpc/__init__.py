"""gRPC, as all services use it.

Imported before gRPC itself, it has gRPC's completion threads read sockets themselves; what the
environment asks for is left as it is. gRPC's event engine reads them on threads of its own, from
which a message goes to a completion thread, and from there to the event loop: one more wake-up
at either end of every message, 30 of the 72 that a question over two stages costs.
"""

import os

os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
