"""Token-wise calls, found in a trace: modules that treat each row of their input by itself.

NOTE [ Token-wise ]
A call is token-wise if every op in it is, followed from its one tensor, of shape (..., K), to its
one result. What an op reads is either constant (parameters, buffers, and what is made of them) or
made of rows: its last dimension lies together in memory, and those before it, in order, count the
rows. Then each row of the result follows from its own row, if the op is
1. pointwise, and what is constant broadcasts over the rows;
2. a product of rows with a constant matrix;
3. a norm, reduction, softmax or concatenation over the last dimension alone; or a copy.
Views are not looked at: what is read through them is. Ops that draw random numbers, or write to
anything from outside, are refused: in slices they would draw in another order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from remat.trace.records import BUFFERS, PARAMETERS, Call, Op, StepTrace, TensorMeta

COPIES = frozenset({"aten._to_copy", "aten.clone", "aten.alias_copy"})
_NORMS = frozenset({"aten.native_layer_norm", "aten._fused_rms_norm"})
_REDUCTIONS = frozenset({
    "aten.mean", "aten.sum", "aten.amax", "aten.amin", "aten.var", "aten.var_mean",
    "aten.linalg_vector_norm",
})  # fmt: skip
_SOFTMAXES = frozenset({"aten._softmax", "aten._log_softmax"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWise:
    """A token-wise call: its rows, what it is given and which parameters it reads.

    `argument` is the place of its tensor among the leaves of its arguments. `held_bytes` are those
    that it saves for backward of what it makes itself, `dtypes` those of its matrix products.
    """

    call: int
    given: TensorMeta
    argument: int
    num_rows: int
    held_bytes: int
    parameters: frozenset[int]
    dtypes: frozenset[str]


def token_wise(trace: StepTrace, number: int) -> TokenWise | None:
    """Say what makes a call token-wise; `None` if it is not, or cannot be seen to be."""
    call = trace.calls[number]
    tensors = call.arguments.storages
    if len(tensors) != 1 or len(call.results.names) != 1 or len(call.results.storages) != 1:
        return None
    if call.draws_python_random or call.moves_random_state or call.changed_state:
        return None
    given = _given(trace, call, tensors[0])
    if given is None or len(given.shape) < 2 or given.shape[-1] == 0:
        return None
    rows = given.num_elements // given.shape[-1]
    walk = _Walk(trace, call, tensors[0], rows)
    result = call.results.storages[0]
    if not walk.is_token_wise() or result not in walk.rows or result == tensors[0]:
        return None
    own = {
        h.storage
        for h in trace.handles
        if call.start < h.pack < call.end and trace.storages[h.storage].birth > call.start
    }
    return TokenWise(
        call=number,
        given=given,
        argument=call.arguments.tensors[0],
        num_rows=rows,
        held_bytes=sum(trace.storages[s].size_bytes for s in own & walk.rows),
        parameters=frozenset(walk.parameters),
        dtypes=frozenset(walk.dtypes),
    )


def _given(trace: StepTrace, call: Call, storage: int) -> TensorMeta | None:
    """Return the tensor that a call is given, as the first op reads it."""
    for op in trace.ops[call.first_op : call.stop_op]:
        for meta, source in _sources(trace, op) or ():
            if source == storage and meta.dtype.startswith(("float", "bfloat")):
                return meta if _num_rows(meta) is not None else None
    return None


class _Walk:
    """One pass over the ops of a call: which storages are made of rows, and which are constant."""

    def __init__(self, trace: StepTrace, call: Call, given: int, num_rows: int) -> None:
        self._trace, self._call, self._num_rows = trace, call, num_rows
        self.rows = {given}
        self.parameters: set[int] = set()
        self.dtypes: set[str] = set()
        self._given = given
        self._constant: set[int] = set()

    def is_token_wise(self) -> bool:
        """Whether every op is."""
        ops = self._trace.ops[self._call.first_op : self._call.stop_op]
        return all(self._follow(op) for op in ops)

    def _follow(self, op: Op) -> bool:
        if op.is_view:
            return True
        sources = _sources(self._trace, op)
        if sources is None or op.is_random or not self._writes_inside(op):
            return False
        if all(self._is_constant(storage) for _, storage in sources):
            self._constant.update(op.fresh)
            return not op.mutated
        for meta, storage in sources:
            if not (self._are_rows(meta) if storage in self.rows else self._is_constant(storage)):
                return False
        if not self._treats_rows_apart(op, sources):
            return False
        self.rows.update(op.fresh)
        return all(self._trace.storages[s].size_bytes % self._num_rows == 0 for s in op.fresh)

    def _writes_inside(self, op: Op) -> bool:
        made = (self._trace.storages[s].birth > self._call.start for s in op.mutated)
        return all(made) and self._given not in op.mutated

    def _is_constant(self, storage: int) -> bool:
        if self._trace.storages[storage].kind in (PARAMETERS, BUFFERS):
            self.parameters.add(storage)
            return True
        return storage in self._constant

    def _are_rows(self, meta: TensorMeta) -> bool:
        return _num_rows(meta) == self._num_rows

    def _treats_rows_apart(self, op: Op, sources: list[tuple[TensorMeta, int]]) -> bool:
        name = op.name.rpartition(".")[0]
        arguments = self._trace.signatures[op.signature].arguments
        keywords = dict(self._trace.signatures[op.signature].keywords)
        constants = [meta for meta, storage in sources if storage not in self.rows]
        # Else one of them could broadcast along the rows of another.
        if len({meta.shape[:-1] for meta, storage in sources if storage in self.rows}) > 1:
            return False
        if name in ("aten.mm", "aten.addmm"):
            *bias, left, right = sources
            self.dtypes.add(left[0].dtype)
            return (
                left[1] in self.rows
                and right[1] not in self.rows
                and all(s not in self.rows and _broadcasts(meta) for meta, s in bias)
            )
        first = sources[0][0]
        if name in _NORMS:
            shape = arguments[1]
            return isinstance(shape, tuple) and len(shape) == 1 and all(map(_broadcasts, constants))
        if name in _REDUCTIONS:
            keeps = keywords.get("keepdim", False) is True or True in arguments[2:]
            dims = next((a for a in arguments[1:] if isinstance(a, tuple)), None)
            return keeps and dims in ((-1,), (len(first.shape) - 1,))
        if name in _SOFTMAXES:
            return arguments[1] in (-1, len(first.shape) - 1)
        if name == "aten.cat":
            dim = arguments[1] if len(arguments) > 1 else keywords.get("dim", 0)
            return not constants and dim in (-1, len(first.shape) - 1)
        return (name in COPIES or is_pointwise(op.name)) and all(map(_broadcasts, constants))


def _sources(trace: StepTrace, op: Op) -> list[tuple[TensorMeta, int]] | None:
    """Pair the tensors that an op reads with their storages; `None` where that is not known."""
    signature = trace.signatures[op.signature]
    metas = [*_metas(signature.arguments), *_metas(tuple(v for _, v in signature.keywords))]
    if len(metas) == len(op.inputs):
        return list(zip(metas, op.inputs, strict=True))
    if len(op.inputs) == 1:
        return [(meta, op.inputs[0]) for meta in metas]
    return None


def _metas(value: object) -> Iterator[TensorMeta]:
    if isinstance(value, TensorMeta):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _metas(item)


def _num_rows(meta: TensorMeta) -> int | None:
    """Return how many rows a tensor has, one after another; `None` where they are not in order."""
    if len(meta.shape) < 2 or (meta.shape[-1] > 1 and meta.stride[-1] != 1):
        return None
    leading = [(n, s) for n, s in zip(meta.shape[:-1], meta.stride[:-1], strict=True) if n > 1]
    for (_, outer), (size, inner) in itertools.pairwise(leading):
        if outer != size * inner:
            return None
    count = 1
    for size, _ in leading:
        count *= size
    return count


def _broadcasts(meta: TensorMeta) -> bool:
    """Whether a constant is the same for every row."""
    return all(size == 1 for size in meta.shape[:-1])


def is_pointwise(name: str) -> bool:
    """Whether each element of an op's result follows from those in its place."""
    namespace, *path = name.split(".")
    found = getattr(torch.ops, namespace, None)
    for part in path:
        found = getattr(found, part, None)
    return torch.Tag.pointwise in getattr(found, "tags", ())
