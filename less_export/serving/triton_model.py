"""The model that Triton's python backend runs: requests into the engine, tokens out of it as they come.

Imported by ``model.py`` of a repository (:mod:`less_export.serving.triton_repository`), in Triton's own process.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from ..errors import LessExportError, UsageError, one_line
from ..runtime.backend import RowState
from ..runtime.engine import Engine
from ..runtime.open import open_bundle
from ..runtime.sampling import SamplingParams
from ..runtime.scheduler import Event
from ..runtime.sequence import Sequence
from .triton_repository import TritonOptions

_LOG = logging.getLogger(__name__)
#: Seconds that what was accepted may take when Triton unloads the model.
_LAST_SECONDS = 60


class TritonPythonModel:
    """A decoupled model: every request gets one response for each token, and runs beside all others.

    Inputs: ``prompt`` (text) or ``input_ids``, and ``sampling``: a JSON object with fields of
    :class:`less_export.SamplingParams`. Outputs: ``text``, ``token_id``, and ``finish_reason``, which is "" but in the
    last response. With sequences, a request goes on where the latest one of its sequence ended.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle that the configuration names."""
        parameters = json.loads(args["model_config"]).get("parameters", {})
        options = TritonOptions.parse({name: value["string_value"] for name, value in parameters.items()})
        threads = {} if options.threads is None else {"threads": options.threads}
        model = open_bundle(options.bundle, options.backend, trust_code=options.trust_code, **threads)
        self._engine = Engine(model, rows=options.rows, piece=options.piece, max_queue=options.max_queue)
        self._sequences = SequenceStates(options.sequences)
        self._events: queue.SimpleQueue[tuple[_Answer, Event] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="less-export answers", daemon=True)
        self._thread.start()

    def execute(self, requests: Iterable[Any]) -> None:
        """Queue requests; their responses are sent later."""
        for request in requests:
            self._begin(request)

    def finalize(self) -> None:
        """Finish what was accepted, within a minute."""
        if not self._engine.drain(_LAST_SECONDS):
            self._engine.stop()
        self._events.put(None)
        self._thread.join()

    def _begin(self, request: Any) -> None:
        sender = request.get_response_sender()
        claim = None
        try:
            start, end, name = (_value(request, n) for n in ("START", "END", "CORRID"))
            if name is not None:
                claim = self._sequences.claim(int(name), bool(start), bool(end))
            ids, text = _input(request, "input_ids"), _value(request, "prompt")
            if (ids is None) == (text is None):
                raise UsageError("give either prompt or input_ids")
            prompt = ids if text is None else _text(text)
            prefix = None if claim is None else claim.state
            keep = claim is not None and not claim.last
            params = _params(_value(request, "sampling"))
            sequence = self._engine.sequence(prompt, params, prefix=prefix, keep_state=keep)
            answer = _Answer(sender, sequence, claim)
            self._engine.submit([sequence], lambda event: self._events.put((answer, event)))
        except Exception as error:
            if claim is not None:
                claim.release(claim.state)
            _refuse(sender, error)

    def _send(self) -> None:
        """Send responses on a thread of their own: Triton may take its time, and the engine must not wait."""
        while (item := self._events.get()) is not None:
            answer, event = item
            try:
                if not answer.send(event):
                    self._engine.cancel([answer.sequence])
            except Exception as error:  # Triton's, of this response
                _LOG.error("a response could not be sent: %s", one_line(error))
                self._engine.cancel([answer.sequence])
                answer.end()


class SequenceStates:
    """The states of sequences between their requests, ``most`` at a time: the one that waits longest makes space."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._states: OrderedDict[int, RowState | None] = OrderedDict()
        self._busy: set[int] = set()
        self._lock = threading.Lock()

    def claim(self, name: int, start: bool, last: bool) -> Claim:
        """A sequence for one request.

        Raises:
            UsageError: it was not started, was dropped to make space, or its latest request has not ended.
        """
        with self._lock:
            if name in self._busy:
                raise UsageError(f"the latest request of sequence {name} has not ended: wait for its last response")
            if not start and name not in self._states:
                raise UsageError(f"sequence {name} was not started, or was dropped to make space: start it again")
            state = self._states.pop(name, None)
            self._busy.add(name)
            return Claim(self, name, None if start else state, last)

    def release(self, name: int, state: RowState | None, keep: bool) -> None:
        """Take back a sequence."""
        with self._lock:
            self._busy.discard(name)
            if keep:
                self._states[name] = state
            while len(self._states) > self._most:
                self._states.popitem(last=False)


class Claim:
    """A sequence while a request of it runs; ``state`` is what it goes on from, ``last`` whether it ends with it."""

    def __init__(self, states: SequenceStates, name: int, state: RowState | None, last: bool) -> None:
        self._states, self._name = states, name
        self.state, self.last = state, last

    def release(self, state: RowState | None) -> None:
        """Leave ``state`` for the next request; None leaves nothing."""
        self._states.release(self._name, state, keep=state is not None and not self.last)


class _Answer:
    """The responses to one request."""

    def __init__(self, sender: Any, sequence: Sequence, claim: Claim | None) -> None:
        self.sequence = sequence
        self._sender, self._claim, self._ended = sender, claim, False

    def send(self, event: Event) -> bool:
        """Send a token or an error; False if nobody wants more."""
        if self._ended:
            return False
        token = event.token
        last = token is None or token.finish_reason is not None or self._sender.is_cancelled()
        if last:  # before the client hears of it, and goes on
            self.end()
        if token is None:
            _refuse(self._sender, event.error)
        else:
            outputs = [
                pb.Tensor("text", _strings(token.text)),
                pb.Tensor("token_id", np.array([token.token_id], np.int64)),
                pb.Tensor("finish_reason", _strings(token.finish_reason or "")),
            ]
            self._sender.send(pb.InferenceResponse(outputs), flags=_FINAL if last else 0)
        return not last

    def end(self) -> None:
        """Let other requests have the sequence."""
        if not self._ended and self._claim is not None:
            self._claim.release(self.sequence.state)
        self._ended = True


_FINAL: int = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def _refuse(sender: Any, error: Exception | None) -> None:
    # Errors that are not ours may name anything: files, other requests.
    message = str(error) if isinstance(error, LessExportError) else "internal error"
    if not isinstance(error, LessExportError):
        _LOG.error("a request failed", exc_info=error)
    sender.send(pb.InferenceResponse(error=pb.TritonError(message)), flags=_FINAL)


def _params(text: Any) -> SamplingParams:
    """Sampling parameters of a JSON object."""
    if text is None:
        return SamplingParams()
    try:
        fields = json.loads(_text(text))
    except ValueError as error:
        raise UsageError(f"sampling is not JSON: {one_line(error)}") from None
    if not isinstance(fields, dict) or "processors" in fields:
        raise UsageError("sampling must be a JSON object with fields of SamplingParams, without processors")
    bias = fields.get("logit_bias")
    if isinstance(bias, dict):  # keys of JSON are texts
        try:
            fields["logit_bias"] = {int(i): value for i, value in bias.items()}
        except ValueError:
            raise UsageError("logit_bias must map token ids to numbers") from None
    return SamplingParams().with_overrides(**fields)


def _input(request: Any, name: str) -> Any:
    """The values of an input in one row; None if the request has none."""
    tensor = pb.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().ravel()


def _value(request: Any, name: str) -> Any:
    values = _input(request, name)
    if values is None:
        return None
    if len(values) != 1:
        raise UsageError(f"{name} must hold one value, not {len(values)}")
    return values[0]


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise UsageError("a text is not UTF-8") from None
    return str(value)


def _strings(text: str) -> Any:
    return np.array([text.encode()], np.object_)
