"""llama.cpp as an engine that generates, in this process: 4.5 bits a weight, on whatever its build computes on.

It holds what the canonical quantiser int4 makes of the published weights, and multiplies with activations in blocks of
8-bit integers on a processor; so its rounding is its own, and a profile measured with it says how large that is.

Legend: B rows under way, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from farflung.engine.arithmetic import QUANTISED, Own
from farflung.engine.base import Answer, Completion, Replay, Request, refuse_empty, unloaded
from farflung.engine.gguf_file import GgufFile, refuse_missing
from farflung.engine.llama_library import MOST_TEXTS, Fed, LlamaModel, device_kind
from farflung.engine.plain import pick
from farflung.protocol.errors import ConfigError
from farflung.protocol.probe import Slice
from farflung.protocol.stops import Stops

FILE = "weights.gguf"


@dataclass
class _Row:
    """A completion under way."""

    index: int
    """Of its request."""
    answer: Answer
    text: int
    """Its number in llama.cpp."""

    @property
    def request(self) -> Request:
        """What is answered."""
        return self.answer.request

    @property
    def next_fed(self) -> Fed:
        """Its last token, which is yet to be read."""
        said = self.answer.said
        return Fed(said[-1][0], len(self.request.prompt_ids) + len(said) - 1, self.text, True)


class LlamaCppEngine:
    """One policy in llama.cpp. Nothing that it remembers outlives a call."""

    def __init__(
        self,
        folder: Path,
        config: bytes,
        *,
        eos_ids: Iterable[int],
        stops: Stops | None = None,
        max_rows: int = 64,
        device: str = "cpu",
        threads: int = 1,
    ) -> None:
        """Lay out the file of the weights in `folder`; `load` must bring them.

        Sets this process's number of torch threads. Raises ConfigError for a model that llama.cpp would not compute
        as it is meant, or where a package is missing.
        """
        torch.set_num_threads(threads)
        refuse_missing()
        device_kind(device)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = GgufFile(folder / FILE, config)
        self._device, self._threads = device, threads
        self._model: LlamaModel | None = None
        self.eos_ids = frozenset(eos_ids)
        self.stops = stops
        self.max_rows = max_rows
        self.made = 0

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights by what the canonical quantiser int4 made of some.

        Raises WeightsError, also for weights that it did not make, and ConfigError where llama.cpp refuses the file.
        """
        self.close()  # the old file is still read from
        self._file.fill(tensors)
        self._model = LlamaModel(self._file.path, self._device, self._threads)

    def values(self, slices: Sequence[Slice]) -> bytes:
        """These slices of the file that llama.cpp computes from, in bfloat16."""
        self._loaded()
        return self._file.values(slices)

    def generate(
        self, requests: Sequence[Request], should_stop: Callable[[], bool] | None = None
    ) -> list[Completion | None]:
        """Generate every request, in order, `max_rows` at a time: as some end, others join.

        `should_stop` is asked before every token; once it says yes, incomplete ones stay None. Raises WeightsError
        where no weights are loaded, EngineAway where llama.cpp fails.
        """
        model = self._loaded()
        refuse_empty(requests)
        if not requests:
            return []
        batch = _Batch(model, requests, min(self.max_rows, MOST_TEXTS, len(requests)), self.eos_ids, self.stops)
        while batch.is_going and not (should_stop is not None and should_stop()):
            batch.advance()
            self.made += 1
        return batch.done

    def replay(self, items: Sequence[tuple[Request, Sequence[int]]], *, alone: bool = False) -> list[Replay]:
        """Raises ConfigError: what this engine says of a text is not to be gone by."""
        raise ConfigError(
            "llama.cpp generates and does not replay: validators replay its texts with torch, under the same quantised "
            "weights; use --engine torch where a replay is wanted"
        )

    def close(self) -> None:
        """Give the memory of the weights back; another load brings others."""
        if self._model is not None:
            self._model.close()
        self._model = None

    def _loaded(self) -> LlamaModel:
        if self._model is None:
            raise unloaded()
        return self._model


def own_llama_cpp(device: str) -> Own:
    """The numerics of a node with this engine. Raises ConfigError where a package is missing, or has no such device."""
    refuse_missing()
    return Own("llama.cpp", device_kind(device), "float32", QUANTISED["int4"])


class _Batch:
    """Completions that are generated together: texts 0 to B - 1, each moved into the place of one that ended."""

    def __init__(
        self, model: LlamaModel, requests: Sequence[Request], rows: int, eos_ids: frozenset[int], stops: Stops | None
    ) -> None:
        self._model, self._rows, self._eos_ids, self._stops = model, rows, eos_ids, stops
        self.done: list[Completion | None] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), requests[i].prompt_ids))
        self._waiting = deque((index, Answer(requests[index])) for index in order)
        self._live: list[_Row] = []
        model.make_room(rows, max(len(one.prompt_ids) + one.max_new_tokens for one in requests))

    @property
    def is_going(self) -> bool:
        """Whether a completion is yet to be made."""
        return bool(self._live or self._waiting)

    def advance(self) -> None:
        """A token of every row, and of those that join."""
        groups = self._join()
        fed = [row.next_fed for row in self._live]
        for lead, *_ in groups:
            last, prompt = lead.request.first_position, lead.request.prompt_ids
            fed += [Fed(token, at, lead.text, at == last) for at, token in enumerate(prompt)]
        logits_BV = self._model.read(fed)
        which = list(range(len(self._live)))
        for place, rows in enumerate(groups, len(self._live)):
            which += [place] * len(rows)
            for row in rows[1:]:
                self._model.copy(rows[0].text, row.text)
            self._live += rows
        self._say(logits_BV if len(which) == len(logits_BV) else logits_BV[which])

    def _join(self) -> list[list[_Row]]:
        """Rows that begin, those of one prompt together."""
        groups: list[list[_Row]] = []
        text = len(self._live)
        while self._waiting and text < self._rows:
            prompt = self._waiting[0][1].request.prompt_ids
            rows: list[_Row] = []
            while self._waiting and text < self._rows and self._waiting[0][1].request.prompt_ids == prompt:
                rows.append(_Row(*self._waiting.popleft(), text))
                text += 1
            groups.append(rows)
        return groups

    def _say(self, logits_BV: torch.Tensor) -> None:
        """Pick a token for every row; those that are complete leave."""
        requests, counts = [row.request for row in self._live], [len(row.answer.said) for row in self._live]
        token_B, logp_B = pick(logits_BV, requests, counts)
        for row, token, logp in zip(self._live, token_B.tolist(), logp_B.tolist(), strict=True):
            self.done[row.index] = row.answer.add(token, logp, self._eos_ids, self._stops)
        self._close_up()

    def _close_up(self) -> None:
        """Forget what is complete, and let the last rows have its numbers: llama.cpp reads neighbours together."""
        for row in [one for one in self._live if self.done[one.index] is not None]:
            last = self._live[-1]
            self._model.forget(row.text)
            if last is not row:
                self._model.copy(last.text, row.text)
                self._model.forget(last.text)
                last.text, self._live[row.text] = row.text, last
            self._live.pop()
