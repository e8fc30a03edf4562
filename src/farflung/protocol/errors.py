"""Every error this project raises on purpose, and how it looks on the wire.

    FarflungError
    ├── ConfigError            a setting, path or file that the operator gave is wrong
    ├── IllegalTransition      a status change that its lifecycle does not have
    ├── WeightsError           weights that do not match their manifest or their model
    ├── ScoreFault             a scorer that timed out, crashed or spoke nonsense
    ├── Unreachable            a peer that does not answer
    ├── EngineAway             an engine in another process that does not answer
    └── Refusal                an answer to a request, sent as application/problem+json
        ├── Malformed          400
        ├── BadSignature       401
        │   ├── Replayed
        │   └── ClockSkew
        ├── Forbidden          403
        │   └── Ejected
        ├── NotFound           404
        ├── Conflict           409
        │   ├── LeaseGone
        │   └── StepTaken
        ├── TooLarge           413
        ├── OutOfRange         416
        ├── Misdirected        421
        ├── Rejected           422   a submission that fails sanity
        │   ├── WrongWeights
        │   └── FailedCanary
        ├── TooOld             426
        ├── Busy               429
        └── Unavailable        503
            └── Broken         500

A class's docstring is its default message. A message says what happened, the offending value and what to do.
"""

import inspect


class FarflungError(Exception):
    """Something went wrong."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message or inspect.getdoc(type(self)) or "")


class ConfigError(FarflungError):
    """The configuration is wrong."""


class IllegalTransition(FarflungError):
    """This lifecycle has no such change of status."""


class WeightsError(FarflungError):
    """The weights do not match their manifest."""


class ScoreFault(FarflungError):
    """The scorer failed; the rollout stays unscored and is tried again."""


class Unreachable(FarflungError):
    """The peer does not answer."""


class EngineAway(FarflungError):
    """The engine does not answer; it is asked again."""


class Refusal(FarflungError):
    """The request was refused."""

    status: int = 400
    code: str = "refused"

    def __init__(self, message: str = "", *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def problem(self) -> dict[str, object]:
        """The body of an application/problem+json answer (RFC 9457)."""
        return {
            "type": f"about:farflung#{self.code}",
            "title": self.code.replace("-", " "),
            "status": self.status,
            "code": self.code,
            "detail": str(self),
        }


class Malformed(Refusal):
    """The body is not a valid message of this route."""

    status, code = 400, "malformed"


class BadSignature(Refusal):
    """The request's signature does not verify; sign the covered components with the key named by keyid."""

    status, code = 401, "bad-signature"


class Replayed(BadSignature):
    """This nonce was seen before; sign each request with a fresh nonce."""

    code = "replayed"


class ClockSkew(BadSignature):
    """The request's time is too far from the coordinator's clock; set this machine's clock."""

    code = "clock-skew"


class Forbidden(Refusal):
    """This key may not do that."""

    status, code = 403, "forbidden"


class Ejected(Forbidden):
    """This node was ejected for failing verification; its work is no longer taken."""

    code = "ejected"


class NotFound(Refusal):
    """There is no such thing here."""

    status, code = 404, "not-found"


class Conflict(Refusal):
    """The request does not fit the present state."""

    status, code = 409, "conflict"


class LeaseGone(Conflict):
    """The lease is no longer open; ask for another."""

    code = "lease-gone"


class StepTaken(Conflict):
    """The step was committed with other contents; load the latest checkpoint and claim again."""

    code = "step-taken"


class TooLarge(Refusal):
    """The body is larger than this route takes."""

    status, code = 413, "too-large"


class OutOfRange(Refusal):
    """The range lies outside of the blob."""

    status, code = 416, "out-of-range"


class Misdirected(Refusal):
    """The Host header names another server than this one."""

    status, code = 421, "misdirected"


class Rejected(Refusal):
    """The submission fails a sanity check and was not taken."""

    status, code = 422, "rejected"


class WrongWeights(Rejected):
    """The engine holds other weights than those of the lease; load them anew and go on."""

    code = "wrong-weights"


class FailedCanary(Rejected):
    """This validator has not passed the step's canaries, so its evidence does not count; load the weights anew."""

    code = "failed-canary"


class TooOld(Refusal):
    """This node's protocol version is no longer spoken here; upgrade with: pip install -U farflung."""

    status, code = 426, "too-old"


class Busy(Refusal):
    """Too much at once; come back later."""

    status, code = 429, "busy"


class Unavailable(Refusal):
    """The coordinator cannot answer now; try again."""

    status, code = 503, "unavailable"


class Broken(Unavailable):
    """The coordinator failed at this request; its log says why. Try again later."""

    status, code = 500, "broken"


def by_code() -> dict[str, type[Refusal]]:
    """Every refusal by its stable code, for clients that turn problems back into errors."""
    found: dict[str, type[Refusal]] = {}
    queue: list[type[Refusal]] = [Refusal]
    while queue:
        cls = queue.pop()
        found[cls.code] = cls
        queue.extend(cls.__subclasses__())
    return found
