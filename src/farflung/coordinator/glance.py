"""The run at a glance as it is sent, encoded once for all callers: in the thread that looked, not on the event loop."""

from starlette.responses import Response

from farflung.dashboard.prometheus import exposition
from farflung.net.server import Call, wanted
from farflung.protocol import wire
from farflung.protocol.messages import Status


class Glance:
    """One status and its encodings."""

    def __init__(self, status: Status) -> None:
        self._bodies = {kind: wire.encode(status, kind) for kind in (wire.JSON, wire.MSGPACK)}
        self.exposition = exposition(status)
        """As Prometheus reads it."""

    def answer(self, call: Call) -> Response:
        """As this caller wants it."""
        kind = wanted(dict(call.request.headers))
        return Response(self._bodies[kind], media_type=kind)
