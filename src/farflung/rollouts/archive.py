"""Coordinator: the stored submissions, and the only place where token ids become text."""

from collections import OrderedDict

import msgspec
from tokenizers import Tokenizer

from farflung.protocol import wire
from farflung.protocol.messages import SubmissionBody
from farflung.store.blobs import Blobs

REMEMBERED = 256


class Archive:
    """Submission bodies by digest, the latest ones remembered, and the run's tokenizer."""

    def __init__(self, blobs: Blobs, tokenizer: Tokenizer) -> None:
        self._blobs, self._tokenizer = blobs, tokenizer
        self._seen: OrderedDict[str, SubmissionBody] = OrderedDict()

    async def body(self, digest: str) -> SubmissionBody:
        """The stored tokens of one submission. Raises NotFound."""
        if digest not in self._seen:
            self._seen[digest] = msgspec.msgpack.decode(await self._blobs.get(digest), type=SubmissionBody)
            while len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
        self._seen.move_to_end(digest)
        return self._seen[digest]

    def text(self, ids: bytes) -> str:
        """Token ids as text, without special tokens."""
        return self._tokenizer.decode(wire.unpack_ids(ids).tolist(), skip_special_tokens=True)
