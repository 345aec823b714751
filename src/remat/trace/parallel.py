"""Models wrapped for several processes, traced in one: DDP's buckets and FSDP2's sharded state.

Under fake tensors the hooks of FSDP2 run as they are, collectives return at once, and so the record
shows what they gather, prefetch and reduce, and when. DDP's reducer is C++ that reads memory: it is
left out, and what it holds is put beside the step, one bucket of memory for each dtype.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from remat.errors import CaptureError

if TYPE_CHECKING:
    from remat.trace.recorder import Recorder
    from remat.trace.standin import FakeFactory

# Any: the state of FSDP2 has no public types.


def check_wrapping(model: nn.Module) -> None:
    """Refuse wrappers whose memory the record would not show.

    Raises
    ------
    CaptureError: for DataParallel and DeepSpeed, for FSDP1, and for FSDP2 with parameters in host
        memory.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            raise CaptureError(
                f"{name or 'the model'} is wrapped in DataParallel, whose replicas would run the "
                "regions of the first: plan the model inside (.module) for one device, or use "
                "torch.nn.parallel.DistributedDataParallel."
            )
        # DeepSpeed's engine, and parameters that its ZeRO-3 has partitioned, known by their marks.
        is_engine = any(base.__name__ == "DeepSpeedEngine" for base in type(module).__mro__)
        if is_engine or any(hasattr(p, "ds_id") for p in module.parameters(recurse=False)):
            raise CaptureError(
                f"{name or 'the model'} belongs to DeepSpeed, whose partitioned parameters are not "
                "planned: shard with torch.distributed.fsdp.fully_shard, or plan the model before "
                "deepspeed.initialize for stages 0 to 2."
            )
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise CaptureError(
                f"{name or 'the model'} is wrapped in FullyShardedDataParallel (FSDP1), whose flat "
                "parameters are not planned: use torch.distributed.fsdp.fully_shard."
            )
    for state in sharding_states(model):
        for group in state._fsdp_param_groups:
            if isinstance(group.offload_policy, fsdp.CPUOffloadPolicy):
                raise CaptureError(
                    "fully_shard with CPUOffloadPolicy is not planned: the budget counts one "
                    "device's memory. Shard without it."
                )


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a wrapped model that would have to be copied.

    Raises
    ------
    CaptureError: for DDP and FSDP2.
    """
    if is_wrapped(model):
        raise CaptureError(
            "the step's control flow depends on computed values, and a model that is wrapped for "
            "several processes cannot be copied to follow them: plan the model before wrapping it."
        )


def is_wrapped(model: nn.Module) -> bool:
    """Whether a model, or part of it, is wrapped in DDP or FSDP2."""
    return bool(data_parallel_wrappers(model) or sharding_states(model))


def sharding_states(model: nn.Module) -> list[Any]:
    """List the states of `fully_shard` in a model, each once."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    states = [m._get_fsdp_state() for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
    return list({id(state): state for state in states}.values())


def hidden_state(model: nn.Module) -> list[Any]:
    """List the objects in which FSDP2 keeps, outside of modules, where a step has got to."""
    found: list[Any] = []
    for state in sharding_states(model):
        found += [state, state._state_ctx, state._comm_ctx]
        for group in state._fsdp_param_groups:
            found += [group, group.comm_ctx, *group.fsdp_params]
    return list({id(item): item for item in found}.values())


def reshard(model: nn.Module) -> None:
    """Free gathered parameters that a forward without backward has left behind."""
    for state in sharding_states(model):
        for group in state._fsdp_param_groups:
            group.reshard()


def data_parallel_wrappers(model: nn.Module) -> list[DistributedDataParallel]:
    """List the parts of a model that are wrapped in DDP."""
    return [m for m in model.modules() if isinstance(m, DistributedDataParallel)]


def parameters_in_buckets(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters whose gradients are views of DDP's buckets once a step has run."""
    return [
        parameter
        for wrapper in data_parallel_wrappers(model)
        if wrapper.gradient_as_bucket_view
        for parameter in reduced_parameters(wrapper)
    ]


def gradients_in_buckets(model: nn.Module) -> list[Tensor]:
    """List the gradients that are views of DDP's buckets, which the next backward writes to."""
    return [p.grad for p in parameters_in_buckets(model) if p.grad is not None]


def bucket_likes(model: nn.Module) -> list[Tensor]:
    """Return tensors of the sizes of DDP's buckets, which are alive as long as the wrapper is."""
    return [
        bucket.buffer()
        for wrapper in data_parallel_wrappers(model)
        for bucket in wrapper.reducer._get_zeros_like_grad_buckets()
    ]


def reduced_parameters(wrapper: DistributedDataParallel) -> list[nn.Parameter]:
    """List the parameters whose gradients DDP reduces, each once."""
    left_out = wrapper.parameters_to_ignore
    return [
        parameter
        for name, parameter in wrapper.module.named_parameters()
        if parameter.requires_grad and name not in left_out
    ]


# -- FSDP2 --------------------------------------------------------------------------------------


def swap_sharded(model: nn.Module, fake: FakeFactory) -> None:
    """Let FSDP2 start from fake sharded parameters; `untouched` undoes it.

    To be called before the model's tensors are swapped: the fakes are noted with the factory.
    """
    for state in sharding_states(model):
        for group in state._fsdp_param_groups:
            for parameter in group.fsdp_params:
                _swap_parameter(parameter, fake)
            _set_idle(group, type(group.fsdp_params[0].sharded_state).SHARDED)
        state._training_state = type(state._training_state).IDLE
        state._modules_to_run_forward.clear()
        state._state_ctx.iter_forward_root = None
        state._state_ctx.post_optim_event = None
        for context in (state._comm_ctx, *(g.comm_ctx for g in state._fsdp_param_groups)):
            context.all_gather_state = None
            context.reduce_scatter_states = []
            context.post_forward_order = []
            context._last_post_reduce_events = {}


def _swap_parameter(parameter: Any, fake: FakeFactory) -> None:
    """Put a fake shard, padded as the real one, in the place of a sharded parameter."""
    with fake.mode, torch.no_grad():
        flat = fake(parameter._sharded_param_data)
        size = tuple(parameter.padded_sharded_param_size)
        dim = parameter.fsdp_placement.dim
        length = parameter.sharded_size[dim] if parameter.sharded_size.numel() else 0
        local = flat.view(size).narrow(dim, 0, length)
        sharded = nn.Parameter(
            parameter.to_sharded_dtensor(local),
            requires_grad=parameter.sharded_param.requires_grad,
        )
    fake.note(parameter.sharded_param, sharded)
    # What a forward without backward gathered may be there instead.
    parameter._setattr_on_modules(parameter.sharded_param)
    parameter._sharded_param_data = flat
    parameter.sharded_param = sharded
    parameter.all_gather_outputs = []
    parameter._unsharded_inner_tensors = []
    parameter.unsharded_accumulated_grad = None
    parameter.__dict__.pop("_unsharded_param", None)
    parameter._sharded_post_forward_param = None
    parameter._sharded_post_forward_param_data = None
    parameter.sharded_state = type(parameter.sharded_state).SHARDED


def _set_idle(group: Any, sharded: Any) -> None:
    group._sharded_state = sharded
    group._training_state = type(group._training_state).IDLE
    group._reset_sharded_params = True  # it would compare addresses, which fakes have not
    group._all_gather_result = None
    group._post_reduce_event = None
    group._all_reduce_state = None
    group._reshard_after_forward_event = None
    group._partial_reduce_output = None
    group._post_forward_indices.clear()


@contextlib.contextmanager
def resizes_in_sight(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Let the recorder see storages that FSDP2 empties and fills again."""
    if not sharding_states(model):
        yield
        return
    resize = torch.UntypedStorage.resize_

    def noted(storage: Any, size: int) -> Any:
        recorder.note_resize(storage, size)
        return resize(storage, size)

    torch.UntypedStorage.resize_ = noted  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        del torch.UntypedStorage.resize_  # it is the base class's own


# -- DDP ----------------------------------------------------------------------------------------


def swap_data_parallel(model: nn.Module) -> list[Tensor]:
    """Let DDP pass its calls on, and return its buckets; `untouched` undoes it.

    To be called with fake parameters in place. Where gradients are views of the buckets, each one
    that backward makes is dropped as soon as it has been added up, as the reducer does.
    """
    buckets: list[Tensor] = []
    for wrapper in data_parallel_wrappers(model):
        wrapper.__dict__["forward"] = functools.partial(_pass_on, wrapper)
        parameters = reduced_parameters(wrapper)
        for dtype in dict.fromkeys(p.dtype for p in parameters):
            alike = [p for p in parameters if p.dtype == dtype]
            bucket = torch.empty(sum(p.numel() for p in alike), dtype=dtype, device=alike[0].device)
            buckets.append(bucket)
            if wrapper.gradient_as_bucket_view:
                views = torch.split(bucket, [p.numel() for p in alike])
                for view, parameter in zip(views, alike, strict=True):
                    _drop_gradients(parameter, into=view.view(parameter.shape))
    return buckets


def _pass_on(wrapper: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
    return wrapper.module(*args, **kwargs)


def _drop_gradients(parameter: nn.Parameter, *, into: Tensor) -> None:
    def drop(parameter: Tensor) -> None:
        parameter.grad = into

    parameter.register_post_accumulate_grad_hook(drop)  # type: ignore[no-untyped-call]
