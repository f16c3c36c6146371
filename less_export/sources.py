"""Where a model comes from: a recipe, a hub id, a checkpoint folder or a GGUF file."""

from __future__ import annotations

import contextlib
import importlib
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from . import recipes
from .errors import ModelError

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
#: What a snapshot needs: weights, configuration, tokenizer.
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True)
class ModelSource:
    """A model on disk. ``gguf`` is the file, for GGUF; ``folder`` holds config and tokenizer otherwise."""

    name: str
    folder: Path
    gguf: Path | None = None
    recipe: recipes.Recipe | None = None

    def _arguments(self) -> dict[str, Any]:
        # Code that a checkpoint brings along is neither run nor asked about.
        return {"trust_remote_code": False, **({"gguf_file": self.gguf.name} if self.gguf else {})}

    def config(self) -> Any:
        """The Hugging Face configuration; raises :class:`ModelError`."""
        with _explained(self, "configuration"):
            return AutoConfig.from_pretrained(self.folder, **self._arguments())

    def load(self, dtype: torch.dtype | str, config: Any = None) -> PreTrainedModel:
        """The model with its weights in memory (GGUF is dequantised).

        Raises:
            ModelError: unreadable, or weights are missing (transformers would make them up).
        """
        extra = {} if config is None else {"config": config}
        with _explained(self, "weights"):
            model, report = AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype=dtype,
                attn_implementation="eager",
                output_loading_info=True,
                **self._arguments(),
                **extra,
            )
        missing = sorted(report["missing_keys"])
        if missing:
            raise ModelError(
                f"{self.gguf or self.folder} lacks {missing[0]} (and {len(missing) - 1} more): "
                "weights and config belong to different models"
            )
        return model.eval()

    def tokenizer(self) -> Any | None:
        """The tokenizer, or None where the model ships none."""
        files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
        if self.gguf is None and not any((self.folder / f).exists() for f in files):
            return None
        with _explained(self, "tokenizer"):
            return AutoTokenizer.from_pretrained(self.folder, **self._arguments())


@contextlib.contextmanager
def _explained(source: ModelSource, what: str) -> Iterator[None]:
    """Turn what transformers raises for an unreadable model into one line, and keep its bars to itself."""
    bars = hf_logging.is_progress_bar_enabled()
    level = hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        with _one_gguf_reader() if source.gguf else contextlib.nullcontext():
            yield
    except Exception as error:  # what transformers raises for damaged files shares no base class
        reason = textwrap.shorten(str(error), 200) or type(error).__name__
        raise ModelError(f"cannot read the {what} of {source.gguf or source.folder}: {reason}") from error
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


_readers: dict[tuple[str, int], Any] = {}


@contextlib.contextmanager
def _one_gguf_reader() -> Iterator[None]:
    """Let transformers parse a GGUF file once, not anew (10 s) for config, weights and tokenizer; no bars."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    original, bar = gguf.GGUFReader, loader.tqdm

    def cached(path: str | Path) -> Any:
        key = (str(path), Path(path).stat().st_mtime_ns)
        if key not in _readers:
            _readers.clear()
            _readers[key] = original(path)
        return _readers[key]

    try:
        gguf.GGUFReader, loader.tqdm = cached, lambda items, **_: items
        yield
    finally:
        gguf.GGUFReader, loader.tqdm = original, bar


def resolve(model: str) -> ModelSource:
    """Find MODEL: recipe name, .gguf file, checkpoint folder, or hub id (downloaded or from the cache).

    Raises:
        UsageError: nothing of that name. ModelError: found, but cannot be read or downloaded.
    """
    recipe = recipes.load(model)
    if recipe is not None:
        package = _gguf_of(recipe)
        if package is not None:
            return ModelSource(model, package.parent, package, recipe)
        return ModelSource(model, _download(recipe.hub), None, recipe)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{path} does not exist: give the path of a GGUF file")
        try:
            with open(path, "rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
        if magic != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file (its first bytes are not GGUF)")
        return ModelSource(path.stem, path.parent, path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json: give a Hugging Face checkpoint folder")
        return ModelSource(path.resolve().name, path)
    if path.exists():
        raise ModelError(f"{path} is a file, not a checkpoint folder; only .gguf files are read by themselves")
    if _HUB_ID.match(model) and not model.startswith("."):
        return ModelSource(model, _download(model))
    raise recipes.unknown(model)


def _gguf_of(recipe: recipes.Recipe) -> Path | None:
    """The GGUF file of the recipe's package, put together in the user's cache; None if not installed."""
    if recipe.gguf_package is None:
        return None
    try:
        package = importlib.import_module(recipe.gguf_package)
    except ImportError:
        return None
    try:
        return Path(package.assemble())
    except (OSError, ValueError) as error:
        raise ModelError(f"package {recipe.gguf_package} is damaged ({error}): reinstall it") from error


def _download(hub_id: str) -> Path:
    """Snapshot folder of a hub id, from the cache or the hub."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except errors.GatedRepoError:
        raise ModelError(
            f"{hub_id} is gated: accept its licence on the hub and run `hf auth login`, or give a local folder as MODEL"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{hub_id} is not on the hub, or private: check the id, run `hf auth login`, or give a local folder"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise ModelError(
            f"the weights of {hub_id} are not in the cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set): "
            "check the network, or give a local checkpoint folder as MODEL"
        ) from None
    except Exception as error:  # what the hub, the network and the disk raise shares no base class
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 160)
        raise ModelError(
            f"the weights of {hub_id} cannot be downloaded ({reason}): check the network and the disk, "
            "or give a local checkpoint folder as MODEL"
        ) from error
