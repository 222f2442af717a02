"""A program as text: readable code, one line an operation, between what comes in and what it costs.

mm_3: bf16[256, 512] = aten.mm(view_3, t_2)    # gpt.py:88 in SwiGLU.forward, blocks.0
"""

from __future__ import annotations

import operator
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fzero._torch import OpOverload
from fzero.display.listing import amount
from fzero.marks import marks_of
from fzero.program.graph.collectives import ISSUES
from fzero.program.graph.loop import loop_call, run_loop
from fzero.program.graph.trace import Trace, results
from fzero.program.graph.walk import body_of
from fzero.program.report.flops import flops_of
from fzero.program.report.memory import Memory, memory_of
from fzero.program.report.origins import Origin, origins_of
from fzero.program.report.stage import Stage
from fzero.program.report.traffic import Traffic, message_of, traffic_of

_INDENT = "    "
_WIDTH = 116
_LETTERS = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


def text_of(trace: Trace, name: str) -> str:
    """Return a program as readable code, with its inputs before it and its costs behind it."""
    lines = [f"{name}: {len(trace.inputs)} inputs", *_inputs(trace), "", f"def {_identifier(name)}:"]
    lines += [_INDENT + line for line in _code(trace)]
    return "\n".join([*lines, "", costs(memory_of(trace), traffic_of(trace), flops_of(trace))])


def costs(memory: Memory, traffic: Traffic, flops: int) -> str:
    """Return what a program takes, as text."""
    axes = ", ".join(f"{amount(size)} over {axis}" for axis, size in traffic.by_axis.items() if size)
    names = [name for name, count in traffic.calls.items() if count]
    calls = ", ".join(f"{traffic.calls[n]} × {n} {amount(traffic.by_collective[n])}" for n in names)
    return "\n".join(
        [
            f"memory   {memory.table().replace(chr(10), chr(10) + ' ' * 9)}",
            f"traffic  {amount(traffic.total)} received{': ' + axes if axes else ''}{'; ' + calls if calls else ''}",
            f"flops    {flops:.4g}",
        ]
    )


def stage_table(stages: Sequence[Stage]) -> str:
    """Return what a program was after each pass, as a table.

    Example:
        >>> print(stage_table([Stage("trace", 2**20, 0, 7, 0, 0.25)]))
        pass              peak      received    nodes  collectives  seconds
        trace         1.00 MiB           0 B        7            0     0.25
    """
    lines = [f"{'pass':<10}{'peak':>12}{'received':>14}{'nodes':>9}{'collectives':>13}{'seconds':>9}"]
    for s in stages:
        sizes = f"{amount(s.peak):>12}{amount(s.received):>14}"
        lines.append(f"{s.name:<10}{sizes}{s.nodes:>9,}{s.collectives:>13,}{s.seconds:>9.2f}")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """Return dtype and shape of what an operation returns.

    Example:
        >>> shown(torch.zeros(2, 3, dtype=torch.bfloat16)), shown(torch.tensor(1))
        ('bf16[2, 3]', 'i64[]')
    """
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        letters = name.rstrip("0123456789")
        short = _LETTERS[letters] + name.removeprefix(letters) if letters in _LETTERS else name
        return f"{short}{list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"({', '.join(shown(x) for x in value)})"
    return "None"


def _inputs(trace: Trace) -> Iterator[str]:
    nodes = trace.module.graph.find_nodes(op="placeholder")
    kinds = trace.kinds or ("inputs",) * len(nodes)
    rows = [(node.name, path, shown(node.meta["val"])) for node, path in zip(nodes, trace.inputs, strict=True)]
    names, paths, types = ([max(map(len, column), default=0) for column in zip(*rows, strict=True)] or [0] * 3)[:3]
    for i, ((name, path, type_), kind) in enumerate(zip(rows, kinds, strict=True)):
        donated = ", donated" if i in trace.donated else ""
        yield f"{_INDENT}{name:<{names}}  {path:<{paths}}  {type_:<{types}}  {kind}{donated}"


def _code(trace: Trace) -> Iterator[str]:
    """Yield a line for each operation, the body of a loop indented under it, and what is returned."""
    graph = trace.module.graph
    origins = origins_of(graph)
    for node in graph.nodes:
        if node.target is run_loop:
            yield from _loop(trace, node)
        elif node.op == "call_function":
            yield _line(node, origins[node])
    yield from _wrapped(f"return {_text([n.name for n in results(trace.module)])}")


def _line(node: fx.Node, origin: Origin) -> str:
    value = node.meta.get("val")
    code = f"{node.name}: {shown(value)} = {_call(node)}" if node.users or value is not None else _call(node)
    notes = [str(origin), origin.block, *_role(node, origin)]
    comment = ", ".join(note for note in notes if note)
    return f"{code}    # {comment}" if comment else code


def _role(node: fx.Node, origin: Origin) -> Iterator[str]:
    marks = marks_of(node)
    if marks.repeated:
        yield "again"
    elif marks.phase == "backward" and not origin.backward:
        yield "backward"
    if marks.role is not None:
        yield f"{marks.role} {_leaves((marks.leaf or '').split(', '))}"
    if node.target in ISSUES:
        message = message_of(node)
        yield f"{amount(message.received)} received over {message.axis}"


def _leaves(paths: Sequence[str]) -> str:
    """Return paths as text, what they begin with in common once."""
    if len(paths) == 1:
        return paths[0]
    split = [path.split(".") for path in paths]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == split[0][shared] for p in split):
        shared += 1
    rest = ", ".join(".".join(p[shared:]) for p in split)
    return f"{'.'.join(split[0][:shared])}: {rest}" if shared else rest


def _loop(trace: Trace, loop: fx.Node) -> Iterator[str]:
    call, body = loop_call(loop), body_of(trace, loop)
    yield f"{loop.name}: {shown(loop.meta['val'])} = {_text(call.kinds)} of"
    yield f"for each of {call.rounds} micro-batches:"
    sources = [f"{x.name}, added to" for x in call.sums] + [f"{call.index.name}[i]"]
    sources += [x.name for x in call.whole] + [f"{x.name}[i]" for x in call.batch]
    names = [node.name for node in body.module.graph.find_nodes(op="placeholder")]
    for line in _wrapped("with " + "; ".join(f"{n} = {s}" for n, s in zip(names, sources, strict=True))):
        yield _INDENT + line
    for line in _code(body):
        yield _INDENT + line


def _call(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return f"{_text(node.args[0])}[{node.args[1]}]"
    arguments = [*map(_text, node.args), *(f"{key}={_text(value)}" for key, value in node.kwargs.items())]
    return f"{_target(node.target)}({', '.join(arguments)})"


def _target(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target).removesuffix(".default").removeprefix("_").replace("c10d_functional.", "c10d.")
    return getattr(target, "__name__", type(target).__name__)


def _text(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return argument.name
    if isinstance(argument, list | tuple):
        return f"[{', '.join(a if isinstance(a, str) else _text(a) for a in argument)}]"
    if isinstance(argument, torch.dtype | torch.device | torch.layout | torch.memory_format):
        return str(argument).removeprefix("torch.")
    return repr(argument)


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, _WIDTH, subsequent_indent=_INDENT, break_long_words=False) or [line]


def _identifier(name: str) -> str:
    return f"{''.join(c if c.isalnum() or c == '_' else '_' for c in name).strip('_')}(…)"
