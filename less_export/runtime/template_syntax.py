"""The syntax of chat templates, rewritten so that every block of statements pays before it runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.visitor import NodeTransformer

from .template_budget import MAX_BITS, LimitError

#: Characters and tokens of a template's source, and of a number in it.
MAX_SOURCE = 1_000_000
MAX_TOKENS = 30_000
MAX_DIGITS = 2000


class Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's text for training; it renders its contents. Counts tokens too."""

    tags = {"generation"}  # noqa: RUF012

    def filter_stream(self, stream: Any) -> Iterator[Any]:
        for count, token in enumerate(stream):
            if count > MAX_TOKENS:
                raise LimitError(f"its source has more than {MAX_TOKENS:,} tokens")
            yield token

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("contents"), [], [], body).set_lineno(line)

    def contents(self, caller: Any) -> Any:
        return caller()


class MeteredCodeGenerator(CodeGenerator):
    """Calls the environment's own methods directly, not through the sandbox."""

    def visit_Call(self, node: nodes.Call, frame: Any, forward_caller: bool = False) -> None:
        if not isinstance(node.node, nodes.EnvironmentAttribute):  # only metered() makes these
            super().visit_Call(node, frame, forward_caller=forward_caller)
            return
        self.visit(node.node, frame)
        self.write("(")
        for argument in node.args:
            self.visit(argument, frame)
            self.write(", ")
        self.write(")")


def metered(environment: jinja2.Environment, source: str) -> nodes.Template:
    """The syntax tree of a template that pays for what it does.

    Its blocks call ``charge`` of the environment; ``compared``, ``searched``, ``copied`` and ``joined`` stand for work
    that Jinja does without asking the environment.

    Raises:
        TemplateSyntaxError: not a template. LimitError: too large.
    """
    if len(source) > MAX_SOURCE:
        raise LimitError(f"its source has more than {MAX_SOURCE:,} characters")
    if re.search(rf"[0-9a-fA-F_]{{{MAX_DIGITS}}}", source):  # Jinja's lexer takes 250 bytes for each
        raise LimitError(f"its source has a number of {MAX_DIGITS:,} digits")
    tree: nodes.Template = _Guards().visit(environment.parse(source))
    _charge(tree.body, tree)
    tree.set_environment(environment)
    return tree


def _guard(name: str, *arguments: nodes.Expr, line: int) -> nodes.Call:
    """A call of one of the environment's methods."""
    function = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(function, list(arguments), [], None, None, lineno=line)


class _Guards(NodeTransformer):
    """Puts guards around the expressions whose work Jinja does itself."""

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, int) and node.value.bit_length() > MAX_BITS:
            raise LimitError(f"it has a number of more than {MAX_BITS:,} bits")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _guard("joined", *node.nodes, line=node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.expr, nodes.Const):
            node.expr = _guard("compared", node.expr, line=node.lineno)
        for operand in node.ops:
            if not isinstance(operand.expr, nodes.Const):
                name = "searched" if operand.op in ("in", "notin") else "compared"
                operand.expr = _guard(name, operand.expr, line=node.lineno)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _guard("compared", node.key, line=node.lineno)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _guard("copied", node, line=node.lineno) if isinstance(node.arg, nodes.Slice) else node

    def refuse(self, node: nodes.Node) -> nodes.Node:
        raise jinja2.TemplateSyntaxError("{% block %}, {% include %} and the like have no place in it", node.lineno)

    visit_Block = visit_Extends = visit_Include = visit_Import = visit_FromImport = refuse
    visit_ScopedEvalContextModifier = visit_EvalContextModifier = refuse


#: Statements whose blocks do not run once each time the statement does, and the fields of these blocks.
_BLOCKS: dict[type, tuple[str, ...]] = {
    nodes.For: ("body", "else_"),
    nodes.If: ("body", "else_"),
    nodes.Macro: ("body",),
    nodes.CallBlock: ("body",),
}
#: Steps of the nodes that take more than one.
_STEPS: dict[type, int] = dict.fromkeys((nodes.Call, nodes.Filter, nodes.Test, nodes.Pair, nodes.Macro), 5)


def _charge(body: list[nodes.Node], owner: nodes.Node) -> set[str]:
    """Let a block of statements pay for itself, and the blocks in it for themselves; returns the names it looks up."""
    steps, chars, names = 1, 0, set()
    inner: list[tuple[list[nodes.Node], nodes.Node]] = []
    stack = list(body)
    while stack:
        node = stack.pop()
        steps += _STEPS.get(type(node), 1)
        if isinstance(node, nodes.TemplateData):
            chars += len(node.data)
        elif isinstance(node, nodes.Name):
            names.add(node.name)
        for field, value in node.iter_fields():
            if field not in _BLOCKS.get(type(node), ()):
                stack += [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, nodes.Node)]
            elif value or field == "body":
                inner.append((value, node))
        if isinstance(node, nodes.For) and node.test is not None:  # it runs for items that the body never sees
            cost = _charge_call(2 + 2 * sum(1 for _ in node.test.find_all(nodes.Node)), 0, node.lineno)
            node.test = nodes.And(cost, node.test, lineno=node.lineno)
    for block, node in inner:
        inner_names = _charge(block, node)
        if isinstance(node, nodes.If):
            names |= inner_names
    if isinstance(owner, nodes.For | nodes.Macro | nodes.CallBlock):
        steps += len(names) // 2  # looked up each time, used or not
    body.insert(0, nodes.ExprStmt(_charge_call(steps, chars, owner.lineno or 1), lineno=owner.lineno or 1))
    return names


def _charge_call(steps: int, chars: int, line: int) -> nodes.Call:
    return _guard("charge", nodes.Const(steps, lineno=line), nodes.Const(chars, lineno=line), line=line)
