"""The authors' checkpoints: the same phi(q) psi(k) as their code computes, and nothing executed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from less_export.contract import Heads
from less_export.errors import KernelError
from less_export.less.feature_maps import Kernels
from less_export.training.authors import read_layer

from . import bundles
from .bundles import Run, refused

pytest_plugins = ["tests.bundles"]

D, HIDDEN, RANK = 8, 12, 3


def checkpoint(heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """Tensors as the authors' training saves them; one KV head gives plain linear layers."""
    g = torch.Generator().manual_seed(heads)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g) * 0.4

    saved = {"kernel_q_mat1": some(heads, D, HIDDEN), "kernel_q_mat2": some(heads, HIDDEN, RANK)}
    if kv_heads == 1:
        saved |= {"kernel_k_mat1.weight": some(HIDDEN, D), "kernel_k_mat2.weight": some(RANK, HIDDEN)}
        saved |= {"interaction_k.weight": some(RANK, RANK)}
    else:
        saved |= {"kernel_k_mat1": some(heads, D, HIDDEN), "kernel_k_mat2": some(heads, HIDDEN, RANK)}
        saved |= {"interaction_k": some(heads, RANK, RANK)}
    return saved | {"scalingD": some(1, kv_heads, 1, RANK) * 1e-4, "scalingD2": some(1, kv_heads, 1, RANK)}


def similarity(saved: dict[str, torch.Tensor], q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """phi(q) psi(k) [B,H,T,T] as in section 3.2 of the paper, in float64."""

    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        if name in saved:
            return torch.einsum("bhsd,hde->bhse", x, saved[name].double())
        return x @ saved[f"{name}.weight"].double().T

    phi = F.gelu(product(F.gelu(product(q.double(), "kernel_q_mat1")), "kernel_q_mat2")).abs()
    psi = saved["scalingD"].double().abs() * F.gelu(
        product(F.gelu(product(k.double(), "kernel_k_mat1")), "kernel_k_mat2")
    )
    psi = (psi + product(psi, "interaction_k") * saved["scalingD2"].double()).abs()
    return phi @ psi.mT


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1)])
def test_the_same_similarities(heads: int, kv_heads: int, tmp_path: Path) -> None:
    saved = checkpoint(heads, kv_heads)
    torch.save(saved, tmp_path / "layer_0.pth")
    feature_map = read_layer(tmp_path / "layer_0.pth", Heads(heads, kv_heads, D))
    g = torch.Generator().manual_seed(9)
    q, k = torch.randn(2, heads, 5, D, generator=g), torch.randn(2, kv_heads, 5, D, generator=g)
    got = feature_map.log_phi(q).exp() @ feature_map.psi(k).mT
    torch.testing.assert_close(got.double(), similarity(saved, q, k), rtol=1e-4, atol=1e-12)
    assert 0.05 < float(feature_map.psi(k).mean()) < 50  # suitable for 16-bit slots, unlike the original 1e-4


def test_the_command(run: Run, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "authors"
    folder.mkdir()
    torch.save(checkpoint(4, 4), folder / "layer_1.pth")
    wanted = bundles.checkpoint(tmp_path / "model", num_key_value_heads=4)
    out = tmp_path / "k.safetensors"
    assert run("import-kernels", folder, "--model", wanted, "--out", out).code == 0
    kernels = Kernels.load(out)
    assert (list(kernels.layers), kernels.parametrisation, kernels.layers[1].rank) == ([1], "paper", RANK)
    refused(
        run("import-kernels", folder, "--model", source, "--out", out),
        "layer_1.pth: k_in has shape [4, 8, 12], the model needs [2, 8, 12]",
    )
    torch.save(checkpoint(4, 4), folder / "layer_7.pth")
    refused(run("import-kernels", folder, "--model", wanted, "--out", out), "layer_7.pth, but", "has 2 layers")
    refused(run("import-kernels", tmp_path, "--model", wanted, "--out", out), "holds no layer_0.pth")


class Trap:
    """A pickle that would run code."""

    def __reduce__(self) -> Any:
        return (open, ("/tmp/less-export-trap", "w"))


def test_damaged_checkpoints(tmp_path: Path) -> None:
    file = tmp_path / "layer_0.pth"
    good = checkpoint(4, 4)
    cases: list[tuple[Any, str]] = [
        ({n: x for n, x in good.items() if n != "scalingD2"}, "lacks scalingD2"),
        ({**good, "kernel_k_mat1": good["kernel_k_mat1"][:, :5]}, "k_in has shape"),
        ({**good, "kernel_q_mat1": good["kernel_q_mat1"] * torch.nan}, "q_in holds NaN"),
        ([1, 2], "holds a list"),
        ({"x": Trap()}, "not a checkpoint of tensors"),
    ]
    for content, says in cases:
        torch.save(content, file)
        with pytest.raises(KernelError, match=says):
            read_layer(file, Heads(4, 4, D))
    file.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(KernelError, match="not a checkpoint of tensors"):
        read_layer(file, Heads(4, 4, D))
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(KernelError, match="not a checkpoint of tensors"):
        read_layer(file, Heads(4, 4, D))
    assert not Path("/tmp/less-export-trap").exists()
