"""Projection to classes and cross entropy in slices of rows: loss and gradients in one pass.

Each slice computes its logits, its share of the loss and its logits' gradient, adds that to the
gradients of hidden states, weight and bias, and lets go: the logits of one slice are alive at a
time. The gradients wait for backward, which multiplies them by the gradient of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  as everyone writes it
from torch import Tensor

from remat.errors import ApplyError

# Any: autograd's context and its gradients have no types.

# Shapes: N rows (tokens), D width of the hidden states, C classes (words).


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicedLoss:
    """How a sliced cross entropy is computed; the fields are those of `F.cross_entropy` or ours.

    `head_dtype` is the type that autocast gives the projection, or `None`; `casts` are the types
    that the logits are then converted to, in order, the last being the one of the loss.
    """

    num_slices: int
    head_dtype: torch.dtype | None
    casts: tuple[torch.dtype, ...]
    ignore_index: int
    is_mean: bool
    label_smoothing: float

    def __call__(
        self,
        hidden_ND: Tensor,  # noqa: N803
        weight_CD: Tensor,  # noqa: N803
        bias_C: Tensor | None,  # noqa: N803
        target_N: Tensor,  # noqa: N803
        class_weight_C: Tensor | None = None,  # noqa: N803
    ) -> Tensor:
        """Return the loss, a scalar; equal to the unsliced one up to the order of summation."""
        loss: Tensor = _SlicedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden_ND, weight_CD, bias_C, target_N, class_weight_C, self
        )
        return loss


class _SlicedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        how: SlicedLoss,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            worker = _Slices(hidden, weight, bias, target, class_weight, how)
            loss = worker.run(ctx.needs_input_grad[:3])
        ctx.save_for_backward(worker.d_hidden, worker.d_weight, worker.d_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ApplyError(
                "this loss runs in slices, whose gradients cannot be differentiated again "
                "(create_graph=True): plan with chunks=False."
            )
        # In place where the graph is used once: a copy of the weight's gradient would be the peak.
        is_kept = torch._C._autograd._get_current_graph_task_keep_graph()
        scaled = (
            None if g is None else (g * upstream if is_kept else g.mul_(upstream))
            for g in ctx.saved_tensors
        )
        return (*scaled, None, None, None)


class _Slices:
    """One pass over the slices; collects loss and gradients of its inputs."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        how: SlicedLoss,
    ) -> None:
        self.hidden, self.how = hidden, how
        self.weight_dtype, self.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        self.compute_dtype = how.head_dtype or hidden.dtype
        self.weight = weight.to(self.compute_dtype)
        self.bias = None if bias is None else bias.to(self.compute_dtype)
        self.loss_dtype = how.casts[-1] if how.casts else self.compute_dtype
        self.is_valid = target != how.ignore_index
        self.target = target.masked_fill(~self.is_valid, 0)
        self.class_weight = None if class_weight is None else class_weight.to(self.loss_dtype)
        self.row_weight = self.is_valid.to(self.loss_dtype)
        if self.class_weight is not None:
            self.row_weight *= self.class_weight[self.target]
        self.d_hidden: Tensor | None = None
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None

    def run(self, needed: tuple[bool, bool, bool]) -> Tensor:
        """Return the loss, with the gradients that are needed in the attributes."""
        rows = len(self.hidden)
        wide = torch.promote_types(self.loss_dtype, torch.float32)
        # Divided by at the end, and before in each row's gradient, as the unsliced loss does.
        divisor = self.row_weight.sum(dtype=wide) if self.how.is_mean else None
        scale = self.is_valid.to(self.loss_dtype)
        if divisor is not None:
            scale *= divisor.reciprocal()
            # Where no row counts the loss is 0/0, but no row has a gradient.
            scale.masked_fill_(~self.is_valid, 0)
        if needed[0]:
            self.d_hidden = torch.empty_like(self.hidden, memory_format=torch.contiguous_format)
        total = torch.zeros((), dtype=wide, device=self.hidden.device)
        step = -(-rows // self.how.num_slices) or 1
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            hidden = self.hidden[part].to(self.compute_dtype)
            scores = self._log_probabilities(hidden)
            total += self._losses(scores, part).sum(dtype=wide)
            if any(needed):
                gradient = self._gradient(scores, part, scale[part])
                del scores
                self._add(gradient, hidden, part, needed)
        if divisor is not None:
            total /= divisor
        return total.to(self.loss_dtype)

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight, self.bias)
        for dtype in self.how.casts:
            logits = logits.to(dtype)
        return torch.log_softmax(logits, dim=-1)

    def _losses(self, scores: Tensor, part: slice) -> Tensor:
        """Return each row's loss, weighted and 0 where ignored."""
        picked = scores.gather(1, self.target[part, None]).squeeze(1)
        losses = -picked * self.row_weight[part]
        smoothing = self.how.label_smoothing
        if smoothing:
            weights = self.class_weight
            spread = scores.sum(dim=1) if weights is None else scores @ weights
            share = smoothing / scores.shape[1]
            losses = losses * (1 - smoothing) - spread * self.is_valid[part] * share
        return losses

    def _gradient(self, scores: Tensor, part: slice, scale: Tensor) -> Tensor:
        """Turn log probabilities into the gradient of the logits, in their memory.

        A row's loss is -sum_c g_c log p_c, with g_c = (1 - smoothing) w_t [c = t] + smoothing w_c
        / C; its gradient is p_c sum(g) - g_c, and w is 1 where no class weights are given.
        """
        target, smoothing = self.target[part], self.how.label_smoothing
        gradient = scores.exp_()
        at_target = torch.ones_like(scale)
        if self.class_weight is not None:
            at_target = self.class_weight[target]
        at_target = at_target * (1 - smoothing)
        share = smoothing / scores.shape[1]
        if self.class_weight is not None:
            gradient *= (at_target + share * self.class_weight.sum())[:, None]
        if smoothing:
            gradient -= share if self.class_weight is None else share * self.class_weight
        gradient.scatter_add_(1, target[:, None], -at_target[:, None])
        gradient *= scale[:, None]
        for dtype in (*reversed(self.how.casts[:-1]), self.compute_dtype):
            gradient = gradient.to(dtype)
        return gradient

    def _add(
        self, gradient: Tensor, hidden: Tensor, part: slice, needed: tuple[bool, bool, bool]
    ) -> None:
        if self.d_hidden is not None:
            self.d_hidden[part] = gradient @ self.weight
        if needed[1]:
            if self.d_weight is None:
                self.d_weight = (gradient.t() @ hidden).to(self.weight_dtype)
            elif self.weight_dtype == self.compute_dtype:
                self.d_weight.addmm_(gradient.t(), hidden)
            else:
                self.d_weight += gradient.t() @ hidden
        if needed[2] and self.bias_dtype is not None:
            summed = gradient.sum(dim=0).to(self.bias_dtype)
            self.d_bias = summed if self.d_bias is None else self.d_bias.add_(summed)
