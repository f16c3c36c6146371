"""Steps of one token in ONNX Runtime's graphs: which layers have a way of their own, and what it computes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from less_export import testing
from less_export.contract import LayerSpec
from less_export.less import state16

from .oracle import table_of
from .scenarios import scenario
from .test_ops import INT8_VARIANTS, VARIANTS, empty, onnx_run
from .test_state16 import CODES, STATE16_VARIANTS

ALL = {**VARIANTS, **INT8_VARIANTS, **STATE16_VARIANTS}
#: A policy that evicts from a window may lose more tokens than one.
GENERAL = [name for name, layer in ALL.items() if layer.window and layer.policy.evicts]


def model_of(layer: LayerSpec, **options: bool) -> onnx.ModelProto:
    table = table_of(layer).shape if layer.max_distance else (0, 0)
    return onnx.load_from_string(testing.operator_model(layer, table=table, **options))


@pytest.mark.parametrize("name", ALL)
def test_which_layers_have_it(name: str) -> None:
    (function,) = model_of(ALL[name]).functions
    assert [n.op_type for n in function.node].count("If") == (name not in GENERAL)
    (function,) = model_of(ALL[name], decoding=False).functions
    assert "If" not in {n.op_type for n in function.node}


def test_unknown_sizes_take_the_general_way() -> None:
    layer = STATE16_VARIANTS["h2o distance 16"]
    (function,) = onnx.load_from_string(testing.operator_model(layer)).functions
    assert "If" not in {n.op_type for n in function.node}


@pytest.mark.parametrize("name", [name for name in ALL if name not in GENERAL])
def test_both_ways_agree(name: str) -> None:
    """Row 0 gets a token in every step, row 1 is parked in every other. The general way is taken by a chunk of two, the
    second of which is padding."""
    layer = ALL[name]
    steps = scenario(layer, [(9, 4), *[(1, i % 2) for i in range(12)]], 5)
    run, state = onnx_run(layer), empty(layer, batch=2)
    for step in steps:
        tokens = [step.inputs[n] for n in ("q", "k", "v", "log_phi_q", "psi_k")]
        rest = [x for n, x in step.inputs.items() if n not in ("q", "k", "v", "log_phi_q", "psi_k")]
        if step.inputs["new_length"].max() > 1:
            state = run([*tokens, *state, *rest])[1:]
            continue
        single = run([*(x[:, :, :1] for x in tokens), *state, *rest])
        padded = [np.concatenate([x[:, :, :1], np.full_like(x[:, :, :1], np.nan)], 2) for x in tokens]
        general = run([*padded, *state, *rest])
        np.testing.assert_allclose(single[0], general[0][:, :, :1], rtol=1e-5, atol=CODES)
        held = general[1 + 4] >= 0
        for field, a, b in zip(layer.state_fields, single[1:], general[1:], strict=True):
            mine = (a[held], b[held]) if "capacity" in field.dims else (a, b)
            if field.name == "h" and layer.state16:
                mine = tuple(state16.absorbed(x[1 + 5], x[-1], x[1 + 6]) for x in (single, general))
                np.testing.assert_allclose(*mine, atol=CODES * np.abs(mine[1]).max(), err_msg=field.name)
            else:
                np.testing.assert_allclose(*mine, rtol=1e-5, atol=1e-6, err_msg=field.name)
        state = general[1:]
