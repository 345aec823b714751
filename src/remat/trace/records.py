"""The record of one training step: ops, storages, saved tensors and module calls on one clock.

NOTE [ Ticks ]
The clock advances by one at every op, at every tensor packed for backward and at every unpacking.
A storage born at tick b and dead at tick d is alive at every tick in [b, d]; memory at an op's tick
therefore holds both its inputs and its outputs, as an allocator sees it. Deaths do not advance the
clock: what dies between two ops carries the tick of the first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Scalars and other crumbs that kernels allocate below the dispatcher: added to every tick. At most
# 96 bytes were seen at any peak.
CRUMBS_BYTES = 512

FORWARD = "forward"
BACKWARD = "backward"
OPTIMIZER = "optimizer"
PHASES = (FORWARD, BACKWARD, OPTIMIZER)

PARAMETERS = "parameters"
BUFFERS = "buffers"
BATCH = "batch"
OPTIMIZER_STATE = "optimizer"
GRADIENTS = "gradients"
ACTIVATIONS = "activations"
TEMPORARIES = "temporaries"
# Of models wrapped for several processes: parameters that FSDP2 has gathered, and DDP's buckets.
GATHERED = "gathered"
BUCKETS = "buckets"
WRAPPED_KINDS = frozenset({GATHERED, BUCKETS})
KINDS = (
    PARAMETERS, BUFFERS, BATCH, OPTIMIZER_STATE, GRADIENTS, ACTIVATIONS, TEMPORARIES, GATHERED,
    BUCKETS,
)  # fmt: skip
BASE_KINDS = frozenset({PARAMETERS, BUFFERS, BATCH, OPTIMIZER_STATE, BUCKETS})

# Ops that take memory and move nothing: of a tensor that they are given they use the shape.
EMPTY_OPS = frozenset(
    {
        "aten.empty.memory_format", "aten.empty_like.default", "aten.empty_strided.default",
        "aten.new_empty.default", "aten.new_empty_strided.default",
    }
)  # fmt: skip

# Ops that choose by comparing: the last of what they return are indices, which another rounding of
# what they compare would change.
CHOOSING_OPS = frozenset(
    {
        "aten.topk.default", "aten.sort.default", "aten.sort.stable", "aten.argmax.default",
        "aten.argmin.default", "aten.max.dim", "aten.min.dim", "aten.kthvalue.default",
        "aten.multinomial.default",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """Shape, stride and dtype of a tensor argument, enough to make a stand-in for it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    device: str

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class OpSignature:
    """One op with the shapes and constants it was called with; equal calls share one signature."""

    name: str
    arguments: tuple[object, ...]
    keywords: tuple[tuple[str, object], ...]


@dataclass(frozen=True, slots=True)
class Op:
    """One dispatched op."""

    tick: int
    name: str
    signature: int
    call: int
    phase: str
    flops: int
    moved_bytes: int
    inputs: tuple[int, ...]
    fresh: tuple[int, ...]
    mutated: tuple[int, ...]
    is_random: bool
    dtype: str

    @property
    def is_view(self) -> bool:
        """Whether the op only looks at memory: it makes and changes none."""
        return not self.fresh and not self.mutated


@dataclass(slots=True)
class Storage:
    """Memory behind one or more tensors.

    `intervals` are the ticks at which something other than a tensor saved for backward keeps it
    alive: a Python name, a gradient, a running op.
    """

    size_bytes: int
    kind: str
    birth: int
    call: int
    intervals: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class Handle:
    """One tensor saved for backward: held from `pack` to `end`, first read at `unpack`."""

    storage: int
    call: int
    pack: int
    unpack: int = -1
    end: int = -1
    ops_before: int = 0


@dataclass(frozen=True, slots=True)
class Leaves:
    """The values inside a call's arguments or result: how they are nested, and which they are.

    `names` are equal for one and the same object, or for equal constants; `tensors` are the
    positions of those that are tensors, and `storages` the memory behind these.
    """

    nesting: tuple[object, ...]
    names: tuple[object, ...]
    tensors: tuple[int, ...]
    storages: tuple[int, ...]


NO_LEAVES = Leaves((), (), (), ())


@dataclass(slots=True)
class Call:
    """One call of a module's forward.

    `first_op` and `stop_op` bound its ops, `inputs` are the storages that its arguments hold,
    `changed_state` names an attribute or object of Python's that it, or a call inside, changed.
    It `moves_random_state` of torch if that is another one after it, whether or not an op drew.
    `arguments` and `results` say which objects it was given and gave back (see `Leaves`).
    `entered` is the tick from which backward has come to its result, -1 where it never does or in
    traces of planned steps.
    """

    module: str
    index: int
    parent: int
    start: int
    first_op: int
    end: int = -1
    stop_op: int = -1
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    arguments: Leaves = NO_LEAVES
    results: Leaves = NO_LEAVES
    draws_python_random: bool = False
    moves_random_state: bool = False
    changed_state: str = ""
    uses_grad: bool = True
    phase: str = FORWARD
    entered: int = -1


@dataclass(frozen=True, slots=True)
class Handover:
    """What a step's optimizer is given: the gradients' storages, with the tensors in them.

    `num_storages` are those that are there by then.
    """

    gradients: tuple[int, ...]
    metas: tuple[object, ...]
    num_storages: int


@dataclass(slots=True)
class StepTrace:
    """Everything that a planner needs to know of one training step; see NOTE [ Ticks ]."""

    ops: list[Op]
    storages: list[Storage]
    handles: list[Handle]
    calls: list[Call]
    signatures: list[OpSignature]
    num_ticks: int
    phase_start: dict[str, int]
    buffer_names: dict[int, tuple[str, ...]]
    device_type: str
    notes: list[str] = field(default_factory=list)
    parameter_names: dict[int, tuple[str, ...]] = field(default_factory=dict)
    replayed_ticks: list[int] = field(default_factory=list)  # ops of a forward run in backward
    handover: Handover | None = None  # of traces on fakes, not of those that follow from others

    @property
    def base_bytes(self) -> int:
        """Bytes alive for the whole step: parameters, buffers, optimizer state and batch."""
        return sum(s.size_bytes for s in self.storages if s.kind in BASE_KINDS)

    def chooses(self, op: Op) -> bool:
        """Whether an op gives indices that another rounding of what it compares would change."""
        if op.name not in CHOOSING_OPS:
            return False
        compared = self.signatures[op.signature].arguments[0]
        return isinstance(compared, TensorMeta) and "float" in compared.dtype

    def num_calls(self, module: str) -> int:
        """How often a module is called within the step's forward."""
        return sum(1 for c in self.calls if c.module == module and c.phase == FORWARD)
