"""Texts from files, folders and datasets, cut into sequences and mixed in equal shares."""

from __future__ import annotations

import hashlib
import importlib.resources
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import panics
from ..errors import UsageError, install_hint, one_line
from .recipes import user_path
from .special_tokens import adds_bos

#: Most characters read of one source. Bounds memory; training uses far fewer.
MAX_CHARACTERS = 64_000_000

#: Texts in the package.
SHIPPED = ("calibration", "held_out")

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Source:
    """A text and its name."""

    name: str
    text: str

    def facts(self) -> dict[str, Any]:
        """Provenance of the text: its name, size and hash."""
        return {
            "name": self.name,
            "characters": len(self.text),
            "sha256": hashlib.sha256(self.text.encode()).hexdigest(),
        }


def read(names: Sequence[str]) -> list[Source]:
    """Read the texts that ``--data`` names: UTF-8 files, folders of ``*.txt``, ``hf:NAME[/CONFIG][:SPLIT]``, or
    ``calibration`` and ``held_out``, the texts in the package.

    Raises:
        UsageError: a text is missing, not UTF-8, or empty.
    """
    sources = []
    for name in names:
        if name in SHIPPED and not Path(name).exists():
            sources.append(shipped(name))
            continue
        text = _dataset(name[3:]) if name.startswith("hf:") else _files(user_path(name))
        if not text.strip():
            raise UsageError(f"--data {name} is empty: give a text")
        sources.append(Source(name if name.startswith("hf:") else Path(name).name, plain(text)))
    return sources


def distinct(sources: Sequence[Source]) -> tuple[list[Source], list[str]]:
    """Drop sources whose text repeats an earlier one: the same text would be used for training and validation.

    Returns:
        The distinct sources, and the names of the dropped ones.
    """
    by_hash: dict[str, Source] = {}
    duplicates = [s.name for s in sources if by_hash.setdefault(s.facts()["sha256"], s) is not s]
    return list(by_hash.values()), duplicates


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens of a Hugging Face tokenizer, as they are written."""
    return tuple(map(str, getattr(tokenizer, "all_special_tokens", ())))


def warn_of_special_tokens(sources: Sequence[Source], tokens: Collection[str]) -> None:
    """Warn of sources in which special tokens of a model are written: it reads them as such, and not as text.

    WikiText writes rare words as ``<unk>``: what was gained on it came from that token.
    """
    for source in sources:
        counts = {t: source.text.count(t) for t in tokens if len(t) > 2}
        found = [f"{t} ({n:,} times)" for t, n in counts.items() if n]
        if found:
            named = f"{', '.join(found[:3])}{' and others' if len(found) > 3 else ''}"
            advice = "remove them, unless it is to read them so"
            warnings.warn(f"{source.name} contains special tokens of the model: {named}; {advice}", stacklevel=3)


def shipped(folder: str) -> Source:
    """A text in the package: ``calibration`` to train on, ``held_out`` to evaluate on."""
    files = importlib.resources.files("less_export") / "data" / folder
    names = sorted(f.name for f in files.iterdir() if f.name.endswith(".txt"))
    return Source(folder, "\n\n".join((files / n).read_text(encoding="utf-8") for n in names))


def _files(path: Path) -> str:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*.txt") if p.is_file())
        if not files:
            raise UsageError(f"--data {path} holds no .txt file")
    else:
        files = [path]
    texts, remaining = [], MAX_CHARACTERS
    for file in files:
        try:
            with open(file, encoding="utf-8") as opened:
                texts.append(opened.read(remaining))
        except UnicodeDecodeError:
            raise UsageError(f"--data {file} is not UTF-8 text: convert it, e.g. with iconv") from None
        except OSError as error:
            raise UsageError(f"cannot read --data {file}: {error.strerror or error}") from error
        remaining -= len(texts[-1])
        if remaining <= 0:
            break
    return "\n\n".join(texts)


def _dataset(name: str) -> str:
    """The column ``text`` of a dataset on the hub, or of a local one that the datasets library can load."""
    try:
        import datasets
    except ImportError:
        raise UsageError(f"--data hf:... needs the datasets library: {install_hint('eval')}") from None
    path, _, split = name.partition(":")
    config = None
    if not Path(path).exists() and path.count("/") == 2:
        path, _, config = path.rpartition("/")
    try:
        rows = datasets.load_dataset(path, config, split=split or "train", streaming=True)
        texts, remaining = [], MAX_CHARACTERS
        for row in rows:
            texts.append(str(row["text"]))
            remaining -= len(texts[-1])
            if remaining <= 0:
                break
    except KeyError:
        raise UsageError(f"--data hf:{name} has no column 'text'") from None
    except Exception as error:  # errors of the hub, the network and the library share no base class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"--data hf:{name} cannot be loaded ({reason}): check its name, or give a file") from error
    return "\n".join(texts)


def plain(text: str) -> str:
    """Undo WikiText's tokenisation (`` @-@ ``, spaced punctuation); other texts are returned unchanged."""
    if not re.search(r" @[-,.]@ ", text):
        return text
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([.,;:!?)\]'])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text).replace(" n't", "n't").replace("$ ", "$")
    text = re.sub(r"^ *(?:= )+(.*?)(?: =)+ *$", r"\1", text, flags=re.M)
    return re.sub(r"\n{2,}", "\n", re.sub(r"\n +", "\n", text))


@dataclass(frozen=True)
class Corpus:
    """Sequences ``ids`` [N, L] and the name of the source that each came from."""

    ids: Tensor
    origin: tuple[str, ...]

    def hash(self) -> str:
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()


def sequences(
    sources: Sequence[Source], encode: Encode, bos: int | None, count: int, length: int, seed: int | None
) -> Corpus:
    """Cut the sources into sequences of ``length`` tokens and take ``count`` of them, in equal shares.

    A source with too few gives all it has, and the others make up the difference. Sequences start with ``bos``
    unless it is None. They are spread evenly over each text; ``seed`` shuffles them, None leaves them in text order.

    Raises:
        UsageError: the texts are shorter than one sequence.
    """
    step = length - (bos is not None)
    pieces: list[tuple[str, Tensor]] = []
    lengths = []
    for source in sources:
        needed = 24 * step * count  # no tokenizer gives fewer than one token per 24 characters of text
        ids = torch.tensor(encode(source.text[: max(needed, 1)]), dtype=torch.long)
        rows = ids[: len(ids) // step * step].view(-1, step)
        lengths.append(len(ids))
        if bos is not None:
            rows = torch.cat([torch.full((len(rows), 1), bos), rows], 1)
        pieces.append((source.name, rows))
    if sum(len(rows) for _, rows in pieces) == 0:
        raise UsageError(
            f"the text has {max(lengths, default=0)} tokens, fewer than one sequence of {length}: "
            "give more text or a smaller --seq-len"
        )
    chosen: list[tuple[str, Tensor]] = []
    remaining = count
    for number, (name, rows) in enumerate(sorted(pieces, key=lambda p: len(p[1]))):
        share = min(len(rows), -(-remaining // (len(pieces) - number)))
        picks = torch.linspace(0, len(rows) - 1, share).long() if share else torch.empty(0, dtype=torch.long)
        chosen += [(name, rows[i]) for i in picks.tolist()]
        remaining -= share
    if seed is not None:
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [chosen[i] for i in order]
    return Corpus(torch.stack([row for _, row in chosen]), tuple(name for name, _ in chosen))


def encoder(tokenizer: Any) -> tuple[Encode, int | None]:
    """``(encode, bos)`` of a Hugging Face tokenizer; bos is None for models that start without one."""

    def encode(text: str) -> list[int]:
        try:
            with panics.as_exceptions():
                return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        except Exception as error:  # the library raises plain Exception
            raise UsageError(f"the model's tokenizer fails on the text: {one_line(error)}") from error

    bos = tokenizer.bos_token_id
    return encode, int(bos) if bos is not None and adds_bos(tokenizer) else None
