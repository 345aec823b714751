"""Which blocks a story is told by: few enough to look at, alike in size, in forward order."""

from __future__ import annotations

from remat.trace.records import FORWARD, StepTrace

# A block with more of the step's ops than this is told by its parts, as long as there are few.
_LARGE = 0.3
_FEW = 10


def story_blocks(trace: StepTrace) -> tuple[str, ...]:
    """Choose module calls that cover the forward of an unplanned step, none inside another.

    From the root downwards: the block with the most ops is replaced by the modules that it calls,
    while it is large and blocks are few. A block whose work is its own, and not its modules', stays
    whole. A heuristic: what is told by these blocks is exact whichever they are.
    """
    ops: dict[str, int] = {}
    children: dict[str, list[str]] = {}
    for call in trace.calls:
        if call.phase != FORWARD or call.stop_op < 0:
            continue
        parent = trace.calls[call.parent].module if call.parent >= 0 else None
        ops[call.module] = ops.get(call.module, 0) + call.stop_op - call.first_op
        below = children.setdefault("" if parent is None else parent, [])
        if call.module and call.module != parent and call.module not in below:
            below.append(call.module)
    blocks = children.get("", []) or [""]
    total = sum(ops.get(name, 0) for name in blocks) or 1
    whole: set[str] = set()
    while len(blocks) < _FEW:
        largest = max(
            (b for b in blocks if b not in whole), key=lambda b: ops.get(b, 0), default=""
        )
        parts = [name for name in children.get(largest, []) if name not in blocks]
        if not largest or (ops[largest] <= _LARGE * total and len(blocks) > 1):
            break
        if sum(ops[name] for name in parts) * 2 < ops[largest]:
            whole.add(largest)
            continue
        at = blocks.index(largest)
        blocks[at : at + 1] = parts
    return tuple(blocks)
