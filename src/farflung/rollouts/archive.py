"""Coordinator: the stored submissions, and the only place where token ids become text."""

from collections import OrderedDict
from collections.abc import Sequence

import msgspec
from tokenizers import Tokenizer

from farflung.protocol import wire
from farflung.protocol.messages import SubmissionBody
from farflung.protocol.stops import until
from farflung.store.blobs import Blobs

REMEMBERED = 256
REMEMBERED_TOKENS = 1 << 24


class Archive:
    """Submission bodies by digest, the latest ones remembered, and the run's tokenizer."""

    def __init__(self, blobs: Blobs, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.blobs, self._tokenizer, self._stop = blobs, tokenizer, stop
        self._seen: OrderedDict[str, SubmissionBody] = OrderedDict()

    async def body(self, digest: str) -> SubmissionBody:
        """The stored tokens of one submission. Raises NotFound."""
        if digest in self._seen:
            self._seen.move_to_end(digest)
            return self._seen[digest]
        body = msgspec.msgpack.decode(await self.blobs.get(digest), type=SubmissionBody)
        self._seen[digest] = body
        while len(self._seen) > REMEMBERED or self._is_too_large():
            self._seen.popitem(last=False)
        return body

    def _is_too_large(self) -> bool:
        return len(self._seen) > 1 and sum(map(_tokens, self._seen.values())) > REMEMBERED_TOKENS

    def text(self, ids: bytes) -> str:
        """Token ids as text, without special tokens and up to the first stop string."""
        return text_of(self._tokenizer, wire.unpack_ids(ids).tolist(), self._stop)


def text_of(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str]) -> str:
    """What is scored of token ids: their text without special tokens, up to the first stop string."""
    return until(tokenizer.decode(ids, skip_special_tokens=True), stop)


def _tokens(body: SubmissionBody) -> int:
    return sum(len(rollout.ids) for rollout in body.rollouts) // 4
