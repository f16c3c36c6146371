"""Nodes of the operator's ONNX bodies, appended one by one, and the attributes of a LessAttention node."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

#: Attributes of every node, in the operator's order.
ATTRIBUTES = {
    "scale": ir.AttributeType.FLOAT,
    **dict.fromkeys(("policy", "heavy", "recent", "window", "absorb"), ir.AttributeType.INT),
    "decay": ir.AttributeType.FLOAT,
}
#: Attribute of nodes with int8 slots: the bits of a code. Others lack it.
SLOT_BITS = "slot_bits"
#: Attribute of nodes that rotate q and k. Others lack it.
MAX_DISTANCE = "max_distance"
#: Attribute of nodes with a low-rank state of 16 bits. Others lack it.
STATE_BITS = "state_bits"


class Nodes(ir.tape.Tape):
    """``op.Add(a, b, axis=1)`` appends a node; ``op.f32(0.5)`` and the like make constants."""

    def __getattr__(self, op_type: str) -> Any:
        def node(*inputs: ir.Value, _outputs: int = 1, **attributes: Any) -> Any:
            if _outputs == 1:
                return self.op(op_type, inputs, attributes)
            return self.op_multi_out(op_type, inputs, attributes, num_outputs=_outputs)

        return node

    def f32(self, value: float) -> ir.Value:
        return self.Constant(value_float=value)

    def i32(self, value: int) -> ir.Value:
        return self.Cast(self.Constant(value_int=value), to=ir.DataType.INT32)

    def ints(self, *values: int) -> ir.Value:
        return self.Constant(value_ints=list(values))

    def attribute(self, name: str) -> ir.Value:
        """The node's attribute as a scalar (ints as int32)."""
        kind = ATTRIBUTES.get(name, ir.AttributeType.INT)
        target = "value_float" if kind is ir.AttributeType.FLOAT else "value_int"
        value = self.op("Constant", [], {target: ir.RefAttr(target, name, kind)})
        return value if kind is ir.AttributeType.FLOAT else self.Cast(value, to=ir.DataType.INT32)

    def dim(self, x: ir.Value, axis: int, end: int | None = None) -> ir.Value:
        return self.Shape(x, start=axis, end=axis + 1 if end is None else end)

    def to_f32(self, x: ir.Value) -> ir.Value:
        return self.Cast(x, to=ir.DataType.FLOAT)

    def shape(self, *parts: ir.Value) -> ir.Value:
        return self.Concat(*parts, axis=0)

    def rows(self, mask: ir.Value, x: ir.Value) -> ir.Value:
        """``x`` [..., N, E] with the rows that ``mask`` [..., N] excludes set to zero, never multiplied."""
        return self.Where(self.Unsqueeze(mask, self.ints(-1)), x, self.f32(0.0))

    def codes(self, x: ir.Value) -> ir.Value:
        """f32 whole numbers ``x`` as int8."""
        return self.Cast(x, to=ir.DataType.INT8)

    def where_codes(self, mask: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        """``Where`` of int8 tensors, through f32: ONNX Runtime's CUDA provider has no kernel for int8."""
        return self.codes(self.Where(mask, self.to_f32(x), self.to_f32(y)))
