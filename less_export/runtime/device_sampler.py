"""Tokens chosen on a GPU: the logits of a step stay there, and 4 bytes a row come back.

What the kernel does not do (log probabilities, bias, processors), and rows whose logits are no numbers, go the way of
the host: their logits, and no others, are downloaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, EngineError
from ..native import sampler as native
from ..progress import Spoken
from .sampler import Choice, Sampler, choose_all
from .sampling import Logits
from .trt_device import Device

_LOG = logging.getLogger(__name__)


def open_sampler() -> native.Sample | None:
    """The kernel for the first GPU; None where it can be neither found nor built, which the log explains."""
    try:
        return native.load(native.library_for_this_gpu(Spoken(_LOG.info)))
    except EngineError as error:
        _LOG.info("tokens are chosen on the host: %s", error)
        return None


class DeviceSampler:
    """Chooses tokens by logits on a device, and holds there what penalties need.

    Args:
        device: its stream has the steps; this allocates on it, so the sampler ends with the device's ``release``.
        sample: the kernel.
        vocab: size of the vocabulary.
        rows: most tokens that are chosen at a time.
        wait: waits for the device, also for the step that it chooses after; default that of the device.

    A sequence with penalties has a history [V] u32 on the device, which the kernel keeps; there are ``rows`` of them,
    from the first such sequence on. It is uploaded when a sequence gets one, and when the host has chosen meanwhile.
    """

    def __init__(
        self, device: Device, sample: native.Sample, vocab: int, rows: int, wait: Callable[[], None] | None = None
    ) -> None:
        self._device = device
        self._wait = wait or device.wait
        self._sample = sample
        self._vocab = vocab
        self._capacity = rows
        self._asked = device.allocate(rows * native.ROW.itemsize)
        self._picks = device.allocate(rows * np.dtype(np.int32).itemsize)
        self._histories: int | None = None
        self._has_histories: bool | None = None  # None: not tried yet
        #: Place of a sequence's history and how many choices it has seen; the one that was used last is the last.
        self._places: dict[Sampler, tuple[int, int]] = {}
        self._steps = 0

    def suits(self, sampler: Sampler) -> bool:
        """Whether the kernel can choose the tokens of a sequence."""
        params = sampler.params
        if params.logprobs is not None or params.logit_bias or params.processors:
            return False
        return not sampler.penalises or self._allocated()

    def _allocated(self) -> bool:
        """Whether there is memory for histories."""
        if self._has_histories is None:
            try:
                self._histories = self._device.allocate(self._capacity * self._vocab * np.dtype(np.uint32).itemsize)
            except BackendError as error:
                _LOG.warning("no memory for penalties on the GPU, so the host applies them: %s", error)
            self._has_histories = self._histories is not None
        return self._has_histories

    def begin_step(self) -> None:
        """The logits of earlier steps are gone."""
        self._steps += 1

    def after_step(self, address: int, rows: npt.NDArray[np.int64]) -> DeviceLogits:
        """The logits of the latest step at an address: those of ``rows`` of [*, V]."""
        return DeviceLogits(self, address, rows, self._steps)

    def check(self, step: int) -> None:
        """Raise :class:`BackendError` if another step has overwritten the logits of ``step``."""
        if step != self._steps:
            raise BackendError("the logits of an earlier step are gone: choose before the next step")

    def download(self, address: int, rows: npt.NDArray[np.int64]) -> Logits:
        """Logits [N, V] of these rows."""
        logits = np.empty((len(rows), self._vocab), np.float32)
        for target, row in zip(logits, rows, strict=True):
            self._device.download(address + int(row) * target.nbytes, target)
        self._wait()
        return logits

    def pick(self, address: int, rows: npt.NDArray[np.int64], samplers: Sequence[Sampler]) -> list[int]:
        """A token for each of ``rows``, or NO_CHOICE; draws a number where the temperature asks for one.

        Raises:
            BackendError: the kernel cannot be launched, or the device has failed, perhaps in the step itself.
        """
        asked = np.array([self._row(*each, samplers) for each in zip(rows, samplers, strict=True)], native.ROW)
        picks = np.empty(len(rows), np.int32)
        self._device.upload(self._asked, asked)
        stream, histories = int(self._device.stream), self._histories or 0
        error = self._sample(address, self._vocab, self._asked, len(rows), histories, self._picks, stream)
        if error:
            raise BackendError(f"the sampler cannot be launched on the GPU (CUDA error {error})")
        self._device.download(self._picks, picks)
        try:
            self._wait()
        except BackendError:
            self._places.clear()  # the histories hold anything
            raise
        for sampler, token in zip(samplers, picks, strict=True):
            if sampler in self._places and token != native.NO_CHOICE:
                self._places[sampler] = (self._places[sampler][0], sampler.count + 1)
        return [int(t) for t in picks]

    def _row(self, row: int, sampler: Sampler, together: Sequence[Sampler]) -> tuple[Any, ...]:
        """The fields of a row of the kernel."""
        p = sampler.params
        uniform = sampler.rng.random() if p.temperature > 0 else 0.0
        history = self._history(sampler, together) if sampler.penalises else -1
        cuts = (uniform, p.temperature, p.top_p, p.min_p, min(p.top_k, self._vocab))
        return (*cuts, row, history, p.repetition_penalty, p.presence_penalty, p.frequency_penalty)

    def _history(self, sampler: Sampler, together: Sequence[Sampler]) -> int:
        """The place of a sequence's history, which is up to date."""
        place, seen = self._places.pop(sampler, (None, -1))
        if place is None and len(self._places) < self._capacity:
            place = next(n for n in range(self._capacity) if n not in {p for p, _ in self._places.values()})
        elif place is None:  # that of the sequence that was chosen for longest ago
            place, _ = self._places.pop(next(s for s in self._places if s not in together))
        if seen != sampler.count:
            history = history_of(sampler, self._vocab)
            assert self._histories is not None
            self._device.upload(self._histories + place * history.nbytes, history)
        self._places[sampler] = (place, sampler.count)
        return place


def history_of(sampler: Sampler, vocab: int) -> npt.NDArray[np.uint32]:
    """What a sequence's penalties count, as the kernel reads it: [V] u32."""
    history = np.zeros(vocab, np.uint32)
    for token, count in sampler.counts.items():
        history[token] = count
    history[sampler.prompt] |= native.PROMPT
    return history


class DeviceLogits:
    """Logits [B, V] f32 of a step that lie on a device until the next one.

    Indexing with a list takes rows of them; numpy gets a copy.
    """

    def __init__(self, sampler: DeviceSampler, address: int, rows: npt.NDArray[np.int64], step: int) -> None:
        self._sampler = sampler
        self._address = address
        self._rows = rows
        self._step = step

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Sequence[int]) -> DeviceLogits:
        return DeviceLogits(self._sampler, self._address, self._rows[rows], self._step)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        self._sampler.check(self._step)
        return self._sampler.download(self._address, self._rows).astype(dtype or np.float32, copy=False)

    def choose(self, samplers: Sequence[Sampler], token_ids: Sequence[Sequence[int]]) -> list[Choice | Exception]:
        """As :func:`less_export.runtime.sampler.choose_all`."""
        self._sampler.check(self._step)
        results: dict[int, Choice | Exception] = {}
        ours = [i for i, s in enumerate(samplers) if self._sampler.suits(s)]
        try:
            picks = self._sampler.pick(self._address, self._rows[ours], [samplers[i] for i in ours]) if ours else []
            for i, token in zip(ours, picks, strict=True):
                if token != native.NO_CHOICE:
                    samplers[i].chosen(token)
                    results[i] = Choice(token)
            rest = [i for i in range(len(samplers)) if i not in results]
            if rest:
                theirs = choose_all(np.asarray(self[rest]), [samplers[i] for i in rest], [token_ids[i] for i in rest])
                results.update(zip(rest, theirs, strict=True))
        except BackendError as error:  # the device has failed
            return [results.get(i, error) for i in range(len(samplers))]
        return [results[i] for i in range(len(samplers))]
