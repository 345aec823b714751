"""The cases: a model, a batch, and a step in which checkpointing goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.conformance import parts
from tests.conformance.parts import ROWS, WIDTH, Block, Net

Results = dict[str, Any]


def square_mean(model, batch):
    """Loss: the mean square of the output."""
    return model(batch).square().mean()


def gradients(model) -> Results:
    """Copy every gradient; none is told from zero."""
    return {
        f"gradient of {n}": None if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
    }


def plain_step(model, batch) -> Results:
    """Forward and backward."""
    loss = square_mean(model, batch)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table that runs on a CPU.

    `build` makes the model, whose blocks are recomputed; `step` runs it and returns all that is
    compared beside buffers and random states. `preserve` is what users set where they went wrong.
    """

    row: int
    title: str
    thread: str
    build: Callable[[], nn.Module]
    step: Callable[[nn.Module, Any], Results] = plain_step
    batch: Callable[[], Any] = field(default=lambda: torch.randn(ROWS, WIDTH))
    preserve: bool = True
    is_compiled: bool = True

    @property
    def name(self) -> str:
        """Row and title, for tests and the table."""
        return f"{self.row} {self.title}"


def step_without_backward(model, batch) -> Results:
    with torch.enable_grad():
        return {"loss": square_mean(model, batch).detach()}


def counting_forward_hooks(model, batch) -> Results:
    """Count a user's hook on a layer inside a block."""
    calls: list[str] = []
    layer = model.blocks[0].up
    with layer.register_forward_hook(lambda *_: calls.append("forward")):
        return {**plain_step(model, batch), "calls": len(calls)}


def counting_gradient_hooks(model, batch) -> Results:
    """Count a user's hook on the gradient of a weight."""
    calls: list[str] = []
    weight = model.blocks[0].up.weight
    with weight.register_hook(lambda _: calls.append("gradient")):
        return {**plain_step(model, batch), "calls": len(calls)}


def through_autograd_grad(model, batch) -> Results:
    """Gradients by torch.autograd.grad, also for the input."""
    batch = batch.clone().requires_grad_()
    wanted = [batch, *(p for p in model.parameters() if p.requires_grad)]
    found = torch.autograd.grad(square_mean(model, batch), wanted)
    return {f"gradient {i}": g for i, g in enumerate(found)}


def double_backward(model, batch) -> Results:
    """A penalty on the gradient of the input."""
    batch = batch.clone().requires_grad_()
    (found,) = torch.autograd.grad(square_mean(model, batch), batch, create_graph=True)
    found.square().sum().backward()
    return gradients(model)


def backward_twice(model, batch) -> Results:
    """Two backward passes through one graph."""
    loss = square_mean(model, batch)
    loss.backward(retain_graph=True)
    loss.backward()
    return gradients(model)


def functional_gradient(model, batch) -> Results:
    """Gradients by torch.func."""
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def run(given):
        return torch.func.functional_call(model, given, (batch,)).square().mean()

    return dict(torch.func.grad(run)(weights))


def autocast(model, batch) -> Results:
    """The forward in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = square_mean(model, batch)
    loss.float().backward()
    return {"loss": loss.detach(), **gradients(model)}


def two_forwards(model, batch) -> Results:
    """Two forwards, and then the backward of their sum."""
    (square_mean(model, batch) + square_mean(model, 2 * batch)).backward()
    return gradients(model)


def hooks_of_the_user(model, batch) -> Results:
    """Saved tensors are moved by hooks of the user's own."""
    with torch.autograd.graph.save_on_cpu():
        loss = square_mean(model, batch)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def one_attention(model, batch) -> Results:
    """The forward alone runs in a context that chooses a kernel."""
    with sdpa_kernel(SDPBackend.MATH):
        loss = square_mean(model, batch)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def eval_before_backward(model, batch) -> Results:
    """The mode is flipped between forward and backward."""
    loss = square_mean(model, batch)
    model.eval()
    loss.backward()
    model.train()
    return gradients(model)


def in_eval(model, batch) -> Results:
    """Gradients in eval mode, as for a frozen backbone."""
    model.eval()
    results = plain_step(model, batch)
    model.train()
    return results


def bias_changed_before_backward(model, batch) -> Results:
    """A parameter that autograd does not save is written to before backward."""
    loss = square_mean(model, batch)
    with torch.no_grad():
        kept = model.blocks[0].up.bias.clone()
        model.blocks[0].up.bias.add_(1.0)
    try:
        loss.backward()
    finally:
        with torch.no_grad():
            model.blocks[0].up.bias.copy_(kept)
    return gradients(model)


def global_changed_before_backward(model, batch) -> Results:
    """A global that the forward makes a tensor from changes before backward."""
    loss = square_mean(model, batch)
    parts.SETTINGS["factor"] = 2.0
    try:
        loss.backward()
    finally:
        parts.SETTINGS["factor"] = 1.0
    return gradients(model)


def frozen_stem() -> nn.Module:
    model = Net(Block)
    model.stem.requires_grad_(requires_grad=False)
    return model


def low_rank() -> nn.Module:
    model = Net(parts.LowRank)
    model.stem.requires_grad_(requires_grad=False)
    return model


def middle(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Build the usual net with a fault in each block."""
    return lambda: Net(lambda: Block(make()))


def batch_norm() -> nn.Module:
    return nn.BatchNorm1d(2 * WIDTH)


CASES: tuple[Case, ...] = (
    Case(row=1, title="dropout", thread="pytorch#190758", build=middle(lambda: nn.Dropout(0.5))),
    Case(row=2, title="RReLU", thread="pytorch#193671", build=lambda: Net(parts.RandomReLU)),
    Case(
        row=3, title="dropout, random state not preserved", thread="OLMo-core#828",
        build=middle(lambda: nn.Dropout(0.5)), preserve=False, is_compiled=False,
    ),
    Case(
        row=4, title="noise that is not called dropout", thread="OLMo-core#828",
        build=middle(parts.Jitter), preserve=False,
    ),
    Case(
        row=5, title="Python's and NumPy's generators", thread="torch docs",
        build=middle(parts.PythonRandom), is_compiled=False,  # compiled, it draws from torch's
    ),
    Case(row=6, title="a torch generator of its own", thread="torch docs",
         build=middle(parts.OwnGenerator), is_compiled=False),
    Case(row=6, title="a NumPy generator of its own", thread="torch docs",
         build=middle(parts.NumpyGenerator), is_compiled=False),
    Case(row=8, title="batch norm's statistics", thread="pytorch#96136", build=middle(batch_norm)),
    Case(
        row=9, title="batch norm, forward without backward", thread="fairscale#1035",
        build=middle(batch_norm), step=step_without_backward,
    ),
    Case(row=11, title="moving averages and counters", thread="Automodel#3247",
         build=middle(parts.Average)),
    Case(row=12, title="spectral norm", thread="(local)", build=lambda: Net(parts.Spectral)),
    Case(row=13, title="routing that follows the load", thread="torchtitan#3146",
         build=lambda: Net(parts.Routed)),
    Case(row=13, title="routing that another rounding turns", thread="torchtitan#3146",
         build=lambda: Net(parts.CloseScores), is_compiled=False),
    Case(row=16, title="no input requires a gradient", thread="pytorch#7617",
         build=lambda: Net(Block, stem=False)),
    Case(row=17, title="frozen embeddings", thread="peft#137", build=frozen_stem),
    Case(row=18, title="low-rank adapters", thread="open-unlearning#178", build=low_rank),
    Case(row=19, title="a cache that grows", thread="transformers#28056",
         build=lambda: Net(parts.Cached), is_compiled=False),
    Case(row=20, title="a dictionary that layers add to", thread="transformers#46572",
         build=parts.Shares, is_compiled=False),
    Case(row=21, title="autocast", thread="pytorch#141896", build=lambda: Net(Block),
         step=autocast, is_compiled=False),
    Case(row=29, title="tied weights, a gradient hook", thread="pytorch#81296",
         build=parts.TiedPair, step=counting_gradient_hooks, is_compiled=False),
    Case(row=30, title="forward hooks", thread="pytorch#134310", build=lambda: Net(Block),
         step=counting_forward_hooks, is_compiled=False),
    Case(row=31, title="torch.autograd.grad", thread="pytorch#24005", build=lambda: Net(Block),
         step=through_autograd_grad, is_compiled=False),
    Case(row=32, title="double backward", thread="torch docs", build=lambda: Net(Block),
         step=double_backward, is_compiled=False),
    Case(row=33, title="retain_graph, backward twice", thread="pytorch#142862",
         build=lambda: Net(Block), step=backward_twice, is_compiled=False),
    Case(row=34, title="torch.func.grad", thread="(local)", build=lambda: Net(Block),
         step=functional_gradient, is_compiled=False),
    Case(row=35, title="draws that are scaled in place", thread="checkpoint.py message",
         build=middle(parts.ScaledDraws)),
    Case(row=36, title="in-place ops inside a block", thread="pytorch#113737",
         build=middle(lambda: nn.ReLU(inplace=True))),
    Case(row=37, title="an in-place op on a view at the end", thread="pytorch#36383",
         build=lambda: Net(parts.ViewAtTheEnd)),
    Case(row=38, title="a block writes to its input", thread="(local)",
         build=lambda: Net(parts.WritesInput)),
    Case(row=39, title="a graph break inside a block", thread="pytorch#139989",
         build=middle(parts.BreaksGraph)),
    Case(row=40, title="blocks called with two sizes", thread="pytorch#166926",
         build=lambda: parts.TwoLengths(lambda: Block(nn.Dropout(0.5)))),
    Case(row=47, title="gradients in eval mode", thread="diffusers#9850",
         build=middle(lambda: nn.Dropout(0.5)), step=in_eval, is_compiled=False),
    Case(row=49, title="eval() before backward", thread="(local)",
         build=middle(lambda: nn.Dropout(0.5)), step=eval_before_backward, is_compiled=False),
    Case(row=50, title="a global changed before backward", thread="torch docs",
         build=middle(parts.ReadsGlobal), step=global_changed_before_backward, is_compiled=False),
    Case(row=50, title="a buffer that a later block writes to", thread="(local)",
         build=parts.ReadsLater, is_compiled=False),
    Case(row=50, title="a tensor that blocks read from an attribute", thread="torch docs",
         build=parts.ReadsAttribute, step=two_forwards, is_compiled=False),
    Case(row=50, title="a tensor given, and read from an attribute", thread="torch docs",
         build=parts.ReadsWhatItIsGiven, step=two_forwards, is_compiled=False),
    Case(row=51, title="a parameter changed before backward", thread="(local)",
         build=lambda: Net(Block), step=bias_changed_before_backward, is_compiled=False),
    Case(row=52, title="tensors in dictionaries and keywords", thread="torch docs",
         build=parts.TakesDict, is_compiled=False),
    Case(row=53, title="a custom function that keeps tensors", thread="pytorch#102600",
         build=middle(parts.KeepsTensors), is_compiled=False),
    Case(row=57, title="hooks of the user's own on saved tensors", thread="pytorch#190581",
         build=middle(lambda: nn.Dropout(0.5)), step=hooks_of_the_user, is_compiled=False),
    Case(row=58, title="a context that chooses attention's kernel", thread="pytorch#155171",
         build=lambda: Net(parts.Attends), step=one_attention, is_compiled=False),
)  # fmt: skip


def tokens() -> torch.Tensor:
    return torch.randint(0, 61, (2, 16))


# The rows in which Transformers' own switch can go wrong.
LANGUAGE_CASES: tuple[Case, ...] = tuple(
    Case(row=row, title=title, thread="", build=build, step=step, batch=tokens)
    for row, title, build, step in (
        (1, "dropout", parts.LanguageModel, plain_step),
        (17, "frozen embeddings", lambda: parts.LanguageModel(frozen=True), plain_step),
        (21, "autocast", parts.LanguageModel, autocast),
        (33, "retain_graph, backward twice", parts.LanguageModel, backward_twice),
        (47, "gradients in eval mode", parts.LanguageModel, in_eval),
        (49, "eval() before backward", parts.LanguageModel, eval_before_backward),
    )
)

# Rows that no small model on a CPU shows, and where they belong.
ELSEWHERE: dict[int, tuple[str, str]] = {
    7: ("randomness on a second device", "needs CUDA: tests/gpu"),
    10: ("SyncBN's second all-reduce", "needs several GPUs: tests/gpu"),
    14: ("dispatch layouts that do not repeat", "needs CUDA: tests/gpu"),
    15: ("kernels that do not repeat", "needs CUDA: tests/gpu"),
    23: ("ZeRO-3 with frozen parameters", "needs DeepSpeed, whose engine is refused"),
    24: ("ZeRO++ takes recomputation for forward", "needs DeepSpeed, whose engine is refused"),
    25: ("checkpointing switched on twice", "`remat check` says `doubled`; two plans are refused"),
    42: ("a compiled backward holds several blocks", "tests/test_compile measures compiled peaks"),
    43: ("inductor's padding", "needs CUDA: tests/gpu"),
    44: ("a budget that is not monotone", "tests/test_fit sweeps budgets"),
    45: ("a budget that ignores checkpoint()", "`remat.plan` plans around it"),
    46: ("an evaluator that counts twice", "tests/test_fit compares with simulation"),
    48: ("a flag that does not reach the blocks", "`remat check` says `inert` or `not-reached`"),
    54: ("a fused op of a third party", "needs CUDA: tests/gpu"),
    55: ("leaks", "tests/test_verify counts what stays alive"),
    56: ("offload and copy streams", "tests/gpu; on a CPU tests/test_offload"),
    59: ("dummy inputs that change gradients", "plans need no dummy input"),
    60: ("an automatic batch size that leaves memory behind", "plans run no trial batches"),
    61: ("benchmarks without warm-up", "`measure` warms up"),
    62: ("MUST_CPU_OFFLOAD does nothing in eager", "plans do not use it"),
    63: ("determinism_check='none'", "plans leave the check on"),
}  # fmt: skip
