"""Where a program failed: from an error to the operation of the graph, and what it was for."""

from __future__ import annotations

from torch import fx

from fzero.marks import marks_of
from fzero.program.graph.collectives import ISSUES, WAIT, issue_of, name_of
from fzero.program.lower.python import NODES


def note_place(error: BaseException) -> None:
    """Note at an error out of a program's run what it waited for, where `fzero.ranks.peers` looks for it."""
    node = failed_node(error)
    if node is not None and not hasattr(error, "waiting_in"):
        error.waiting_in = described(node)  # type: ignore[attr-defined]


def failed_node(error: BaseException) -> fx.Node | None:
    """Return the innermost operation that was running when a program raised."""
    found, frame = None, error.__traceback__
    while frame is not None:
        nodes = frame.tb_frame.f_globals.get(NODES)
        if nodes is not None:
            found = nodes.get(frame.tb_lineno, found)
        frame = frame.tb_next
    return found


def described(node: fx.Node) -> str:
    """Return what an operation does and for which leaf, such as `all_gather of leaf 'w' (backward, block 'layers.0')`.

    A wait is described as the collective that it waits for.
    """
    issue = (issue_of(node) if node.target is WAIT else None) or node
    own, started = marks_of(node), marks_of(issue)
    leaf, phase, block = own.leaf or started.leaf or "", own.phase or started.phase, own.block or started.block
    packet = str(getattr(issue.target, "overloadpacket", getattr(issue.target, "__name__", issue.target)))
    name = name_of(issue) if issue.target in ISSUES else packet.rpartition(".")[2]
    leaves = [path.strip() for path in leaf.split(",") if path]
    listed = ", ".join(map(repr, leaves[:3]))
    listed += f" and {len(leaves) - 3} more" if len(leaves) > 3 else ""
    what = f"{name} of {'leaf' if len(leaves) == 1 else 'leaves'} {listed}" if leaves else f"{name} (node {issue.name})"
    where = [*([phase] if phase else []), *([f"block {block!r}"] if block else [])]
    return f"{what} ({', '.join(where)})" if where else what
