"""Stop strings in a text that grows token by token."""

from __future__ import annotations

from .tokenizer import Tokenizer


class StoppableText:
    """The text of a row; holds back what may still become a stop string.

    Stop strings are looked for in the text, and in the text with the special tokens in it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: tuple[str, ...]) -> None:
        self._stream = tokenizer.stream(prompt)
        self._special_texts = tokenizer.special_texts
        self._stop = stop
        #: What follows the returned text, special tokens included, and which of its characters are text.
        self._tail = ""
        self._is_text: list[bool] = []

    def push(self, token_id: int) -> tuple[str, bool]:
        """Add a token; return the text that is certain now, and whether a stop string is complete (after that text)."""
        special = self._special_texts.get(token_id)
        return self._scan(self._stream.push(token_id)) if special is None else self._scan(special, is_text=False)

    def finish(self) -> str:
        """The text that was held back, when no token follows."""
        text, _ = self._scan(self._stream.finish())
        return text + self._take(len(self._tail))

    def _scan(self, piece: str, is_text: bool = True) -> tuple[str, bool]:
        self._tail += piece
        self._is_text += [is_text] * len(piece)
        places = [i for i, is_text in enumerate(self._is_text) if is_text]
        text = "".join(self._tail[i] for i in places)
        matches, certain = [], len(self._tail)
        for stop in self._stop:
            if stop in self._tail:
                begin = self._tail.index(stop)
                matches.append((begin + len(stop), begin))
            if stop in text:
                begin = text.index(stop)
                matches.append((places[begin + len(stop) - 1] + 1, places[begin]))
            certain = min(certain, len(self._tail) - _overlap(self._tail, stop))
            overlap = _overlap(text, stop)
            if overlap:
                certain = min(certain, places[-overlap])
        if matches:  # the one that is complete first counts, however the text is cut into tokens
            _, begin = min(matches)
            before = self._take(begin)
            self._take(len(self._tail))
            return before, True
        return self._take(certain), False

    def _take(self, count: int) -> str:
        """Remove the first characters of the tail; return those that are text."""
        taken = "".join(c for c, is_text in zip(self._tail[:count], self._is_text, strict=False) if is_text)
        self._tail, self._is_text = self._tail[count:], self._is_text[count:]
        return taken


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ``text`` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
