"""Manifests from strangers: every damage in the table is refused in one line that names it, at once."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from less_export.bundle import schema, strict_json
from less_export.bundle.artifact import (
    MANIFEST,
    Bundle,
    Manifest,
    OnDisk,
)
from less_export.cli.main import main
from less_export.errors import BundleError, printable

from .manifest_cases import CASES, FINE, MODEL, TINY, Case, write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose files are what the manifest says; none of them can be run."""
    path = tmp_path / "bundle"
    manifest = write_bundle(path, "ort", b"graph")
    file = path / MANIFEST
    file.write_bytes(dataclasses.replace(manifest, on_disk=OnDisk.of(file, [path / "model.safetensors"])).dump())
    return path


def values(bundle: Path) -> dict[str, Any]:
    return dict(json.loads((bundle / MANIFEST).read_text()))


def sign(bundle: Path, **changes: Any) -> None:
    """Change fields of the manifest and sign it again."""
    data = {**values(bundle), **changes}
    (bundle / MANIFEST).write_bytes(Case("", "", ("format_version",), 1).render(data))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bad_manifests(case: Case, bundle: Path) -> None:
    whole = values(bundle)
    (bundle / MANIFEST).write_bytes(case.render(whole))
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle)
    reason = str(caught.value)
    assert case.reason in reason
    assert len(reason) < len(str(bundle)) + 300
    assert reason.isprintable(), reason


@pytest.mark.parametrize("case", FINE, ids=lambda c: c.name)
def test_odd_manifests_that_are_fine(case: Case, bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(case.render(values(bundle)))
    contract = Bundle.open(bundle).manifest.artifacts[0].contract
    assert contract == TINY or case.path[:3] == ("artifacts", 0, "contract")


def test_case_names_are_unique() -> None:
    assert len({c.name for c in CASES}) == len(CASES) > 300


def test_the_table_covers_every_field(bundle: Path) -> None:
    """Each field of the schema that may not be anything is damaged by a case."""
    damaged = {tuple(k for k in c.path if isinstance(k, str)) for c in CASES if c.path}
    tables = {
        (): schema.MANIFEST,
        ("artifacts",): schema.ARTIFACT,
        ("artifacts", "contract"): schema.CONTRACT,
        ("artifacts", "contract", "layers"): schema.LAYER,
        ("weights",): schema.WEIGHT,
        ("model",): schema.MODEL,
        ("tokenizer",): schema.TOKENIZER,
        ("kernels",): schema.KERNELS,
    }
    for path, record in tables.items():
        for field in (*record.required, *record.optional):
            assert (*path, field) in damaged, field


def test_a_manifest_is_what_it_was(bundle: Path) -> None:
    manifest = Bundle.open(bundle, full=True).manifest
    assert manifest.on_disk is not None
    assert Manifest.parse(manifest.dump(), "x") == manifest
    old = {k: v for k, v in values(bundle).items() if k != "on_disk"}  # written by a version without it
    (bundle / MANIFEST).write_bytes(Case("", "", ("format_version",), 1).render(old))
    assert Bundle.open(bundle).manifest.on_disk is None


def test_numbers_that_json_lacks(bundle: Path) -> None:
    """A configuration may hold them; they travel as transformers writes them."""
    config = {"limits": [0.0, math.inf], "x": {"y": -math.inf}}
    manifest = dataclasses.replace(Bundle.open(bundle).manifest, model={**MODEL, "config": config})
    parsed = Manifest.parse(manifest.dump(), "x").model["config"]
    assert parsed["x"] == {"y": {"__float__": "-Infinity"}}
    assert strict_json.untag_floats(parsed) == config
    assert strict_json.untag_floats({"__float__": "x"}) == {"__float__": "x"}


# ------------------------------------------------------------------ files outside


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "kernels.safetensors"])
def test_links_out_of_the_bundle(name: str, bundle: Path, tmp_path: Path) -> None:
    outside = (bundle / name).rename(tmp_path / name)
    (bundle / name).symlink_to(outside)
    with pytest.raises(BundleError, match=f"{name} is a link to a file outside the bundle"):
        Bundle.open(bundle)
    (bundle / name).unlink()
    (bundle / "inside").write_bytes(outside.read_bytes())
    (bundle / name).symlink_to("inside")
    Bundle.open(bundle)
    moved = bundle.rename(tmp_path / "moved")  # a link to the whole folder is the user's own
    bundle.symlink_to(moved)
    Bundle.open(bundle)


def test_weights_behind_a_link_are_hashed(bundle: Path, tmp_path: Path) -> None:
    """The checkpoint's own file may be linked to, if its hash is the manifest's."""
    weights = bundle / "model.safetensors"
    outside = weights.rename(tmp_path / "w.safetensors")
    weights.symlink_to(outside)
    Bundle.open(bundle)
    data = bytearray(outside.read_bytes())
    data[-1] ^= 1
    outside.write_bytes(data)
    with pytest.raises(BundleError, match=r"model.safetensors is damaged \(its hash differs"):
        Bundle.open(bundle)


# ------------------------------------------------------------------ weights that changed


def change(file: Path) -> None:
    """Other values in the same tensors, written into the file itself."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def replace_file(file: Path) -> None:
    """Another file of that name and date."""
    facts = file.stat()
    other = file.with_name("other")
    shutil.copyfile(file, other)
    change(other)
    os.utime(other, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    os.replace(other, file)


@pytest.mark.parametrize("damage", [change, replace_file])
def test_linked_weights_that_changed(damage: Any, bundle: Path, tmp_path: Path) -> None:
    """A warning names the file; ``full`` compares the hash instead."""
    weights, checkpoint = bundle / "model.safetensors", tmp_path / "checkpoint.safetensors"
    os.link(weights, checkpoint)
    facts = weights.stat()
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns - 10**10))
    sign(bundle, on_disk=vars(OnDisk.of(bundle / MANIFEST, [weights])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Bundle.open(bundle)
    damage(checkpoint if damage is change else weights)
    with pytest.warns(UserWarning, match=r"model.safetensors is not as the export left it .*: less-export check"):
        Bundle.open(bundle)
    with pytest.raises(BundleError, match="its hash differs"):
        Bundle.open(bundle, full=True)


def test_no_warning_for_copies_and_whole_weights(bundle: Path, tmp_path: Path) -> None:
    """Copies have dates and inodes of their own; a new date alone is settled by the hash."""
    shutil.copytree(bundle, tmp_path / "kept", copy_function=shutil.copy2)
    shutil.copytree(bundle, tmp_path / "new", copy_function=shutil.copyfile)
    bundle.rename(tmp_path / "moved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("kept", "new", "moved"):
            Bundle.open(tmp_path / name)
        os.utime(tmp_path / "moved" / "model.safetensors")
        Bundle.open(tmp_path / "moved", full=True)


# ------------------------------------------------------------------ terminals


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain \u00e9\u4e2d", "plain \u00e9\u4e2d"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m \u202e \ud800", "\\x9b31m \\u202e \\ud800"),
        ("a\nb\tc\r", "a\nb\tc\\r"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text, keep="\n\t") == shown
    assert "\n" not in printable(text)


def test_names_of_a_bundle_do_not_control_the_terminal(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor do they mean anything to the library that draws the tables."""
    sign(
        bundle, model={**MODEL, "name": "x\x1b[2J\u202e[bold]y", "class": "A\x9b"}, settings={"weights": "[red]\x1b[1m"}
    )
    assert main(["info", str(bundle)]) == 0
    out = capsys.readouterr().out
    assert "x\\x1b[2J\\u202e[bold]y (A\\x9b, 6 parameters)" in out
    assert "linear layers in [red]\\x1b[1m" in out
    assert main(["info", str(bundle), "--json"]) == 0
    out += capsys.readouterr().out
    assert not {c for c in out if not c.isprintable()} - {"\n"}
