"""The weight files of a checkpoint folder, by transformers' own rules, and what beside them must not be left out."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

from ..errors import ModelError, one_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Key of config.json that names the weight file, or its index.
_STATED = "transformers_weights"
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTERS = (_ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")


def stated_names(folder: Path) -> list[str] | None:
    """The weight files that config.json names; None if it names none.

    Raises:
        ModelError: they are no safetensors files of the folder, or the index that it names is damaged.
    """
    name = _json(folder / "config.json").get(_STATED)
    if name is None:
        return None
    if not (isinstance(name, str) and name.endswith((".safetensors", ".safetensors.index.json"))):
        raise ModelError(f"config.json names {one_line(name, 80)} as {_STATED}: only safetensors files can be read")
    if _outside(name):
        raise ModelError(f"config.json names {name} as {_STATED}, which is not in its folder")
    return [name] if name.endswith(".safetensors") else _index_names(folder / name)


def names(folder: Path) -> list[str] | None:
    """The weight files by what is in the folder: those of config.json, the single one, or those of the index.

    A single file comes before an index, as in transformers. None where there is none of these.

    Raises:
        ModelError: the index is damaged, or names files outside the folder.
    """
    stated = stated_names(folder)
    if stated is not None:
        return stated
    if (folder / SINGLE).is_file():
        return [SINGLE]
    return _index_names(folder / INDEX) if (folder / INDEX).is_file() else None


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, single or sharded; raises :class:`ModelError` without them."""
    found = names(folder)
    if found is None:
        files = [p for p in sorted(folder.glob("*.safetensors")) if not p.name.startswith("adapter_model")]
    else:
        files = [folder / n for n in found]
    missing = [f.name for f in files if not f.exists()]
    if missing or not files:
        kinds = sorted(p.suffix for p in folder.glob("*.bin")) and " (convert pytorch .bin files to safetensors first)"
        what = f"{missing[0]} is missing" if missing else "no .safetensors file"
        raise ModelError(f"{folder}: {what}{kinds or ''}")
    return files


def refuse_adapter(folder: Path, name: str | Path) -> None:
    """Refuse a checkpoint with an adapter beside its weights, or an adapter alone: the export would leave it out.

    Args:
        name: what the message calls the checkpoint.

    Raises:
        ModelError: there is an adapter.
    """
    adapter = next((n for n in _ADAPTERS if (folder / n).is_file()), None)
    if adapter is None:
        return
    merge = (
        "merge it with peft (AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(FOLDER))"
    )
    if (folder / "config.json").is_file():
        raise ModelError(
            f"{name} has an adapter beside its weights ({adapter}), which would be left out: {merge} and export "
            "FOLDER, or move the adapter away"
        )
    base = _json(folder / _ADAPTER_CONFIG).get("base_model_name_or_path")
    of = f" for {one_line(base, 80)}" if isinstance(base, str) and base else ""
    raise ModelError(f"{name} is an adapter{of} ({adapter}), not a whole model: {merge} and export FOLDER")


def _index_names(index: Path) -> list[str]:
    try:
        found = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [n for n in found if _outside(n)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{index.name} is not a usable index ({one_line(error)}): download it again") from error
    if outside:
        raise ModelError(f"{index.name} names {outside[0]}, which is not in its folder: download the checkpoint again")
    return found


def _outside(name: str) -> bool:
    return PurePath(name).is_absolute() or ".." in PurePath(name).parts


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where it cannot be read, which whoever needs the file reports."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
