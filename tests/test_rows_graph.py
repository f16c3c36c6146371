"""The graph of an engine with the plugin: rows of the state by index, beside what the bundle's graph has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from less_export.contract import OP_NAME, Contract
from less_export.errors import EngineError
from less_export.exporter import onnx_op
from less_export.tensorrt import engine, rows

from .trt_decoder import contract_of, decoder, serialised


def bare(contract: Contract, folder: Path) -> bytes:
    model = decoder(contract, folder)
    onnx_op.strip_bodies(model)
    return serialised(model)


def shapes(values: Any) -> dict[str, list[int | str]]:
    """Shapes by name; symbolic sizes are text."""
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


@pytest.mark.parametrize("options", [{}, {"slots": "int8", "state_bits": 16, "max_distance": 9}])
def test_every_layer_takes_rows(options: dict[str, Any], tmp_path: Path) -> None:
    """Also one that only slides: its state has rows too. The tensors are those that the contract says, in any order."""
    contract = contract_of("float16", **options)
    before = bare(contract, tmp_path)
    after = onnx.load_from_string(rows.by_index(before, contract))
    given = onnx.load_from_string(before)
    assert shapes(after.graph.input) == {s.name: [*s.shape] for s in contract.inputs(by_index=True)}
    assert shapes(after.graph.output) == {s.name: [*s.shape] for s in contract.outputs(by_index=True)}
    assert [v.name for v in after.graph.input] == [*(v.name for v in given.graph.input), "rows"]
    assert after.graph.input[-1].type.tensor_type.elem_type == onnx.TensorProto.INT32
    assert shapes(after.graph.input)["past.0.key"][0] == "state_rows"
    assert shapes(after.graph.input)["past_length"] == ["batch"]
    pairs = [*zip(given.graph.node, after.graph.node, strict=True)]
    assert sum(new.op_type == OP_NAME for _, new in pairs) == 2
    for old, new in pairs:
        if new.op_type == OP_NAME:
            assert [*new.input] == [*old.input, "rows"]
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in new.attribute}
            wanted = {a.name: onnx.helper.get_attribute_value(a) for a in old.attribute}
            assert attributes == {**wanted, "rows_by_index": 1}
        else:
            assert new == old
    assert after.graph.initializer == given.graph.initializer


def test_graphs_that_are_refused(tmp_path: Path) -> None:
    contract = contract_of("float16")
    with pytest.raises(EngineError, match="the graph is no ONNX model"):
        rows.by_index(b"garbage", contract)
    model = onnx.load_from_string(bare(contract, tmp_path))
    model.graph.node[0].output[0] = "rows"
    with pytest.raises(EngineError, match="the graph has a tensor called rows: export the bundle again"):
        rows.by_index(model.SerializeToString(), contract)
    again = rows.by_index(bare(contract, tmp_path), contract)
    with pytest.raises(EngineError, match="has a tensor called rows"):
        rows.by_index(again, contract)


def test_profiles_of_rows_by_index() -> None:
    """A step has any number of rows, and so has the state, whatever the step has."""
    contract = contract_of("float16", chunk=16, max_batch=5)
    decode, prefill = engine.profiles(contract, by_index=True)
    assert decode.shapes["rows"] == prefill.shapes["rows"] == ((1,), (5,), (5,))
    assert prefill.shapes["past.0.key"] == ((1, 2, 6, 8), (5, 2, 6, 8), (5, 2, 6, 8))
    assert set(decode.shapes) == {s.name for s in contract.inputs(by_index=True)}
    spec = next(contract.state(by_index=True)).past
    assert spec.sized(2, 1, 5) == (5, 2, 6, 8)
    assert spec.sized(2, 1) == (2, 2, 6, 8)


def test_the_rows_of_a_step_are_those_of_its_tokens(tmp_path: Path) -> None:
    """Exports may take a step's rows from the shape of a state, whose rows are others here."""

    def converted(**span: int) -> onnx.NodeProto:
        model = onnx.load_from_string(bare(contract_of("float16"), tmp_path))
        model.graph.node.insert(0, onnx.helper.make_node("Shape", ["past.0.key"], ["measured"], **span))
        return onnx.load_from_string(rows.by_index(model.SerializeToString(), contract_of("float16"))).graph.node[0]

    assert [*converted(start=0, end=1).input] == ["input_ids"]
    assert [*converted(end=1).input] == ["input_ids"]
    assert [*converted(start=1).input] == ["past.0.key"]
    with pytest.raises(EngineError, match=r"takes more than the rows from the shape of past.0.key: export it again"):
        converted()
