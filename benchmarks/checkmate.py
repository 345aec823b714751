"""Checkmate's case: the largest batch of VGG19 in 16 GB whose step costs one extra forward at most.

    python benchmarks/checkmate.py [--out DIR]

Published by Jain et al., "Checkmate: breaking the memory wall with optimal tensor
rematerialization" (2020), arXiv:1910.02653, for 224 pixels and 1,000 labels, from static sizes and
FLOPs: store all 167, sqrt(n) 197, greedy 266, optimum 289. Nothing is run here either: the batch
sizes follow from shapes. Their accounting, as far as their paper and repository tell: one float32
tensor for the output of each layer (an activation function belongs to its layer, pooling and
flattening are layers), one as large for its gradient, no workspace; 16e9 bytes.

What is not told is whether the images and the gradients of the parameters count. Both ways are
computed, and what each makes of storing all and of the least that any schedule can hold.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.core_report import table  # noqa: E402
from benchmarks.runner import Data, environment, where  # noqa: E402
from benchmarks.shapes import Case, classification_loss, vgg19  # noqa: E402
from remat.cost.devices import Device  # noqa: E402
from remat.cost.model import CostModel  # noqa: E402
from remat.errors import BudgetError  # noqa: E402
from remat.files import write_atomically  # noqa: E402
from remat.fit import Fit  # noqa: E402
from remat.planner.policies import AllBlocks  # noqa: E402

BUDGET_BYTES = 16 * 10**9
PUBLISHED = {"store all": 167, "sqrt(n)": 197, "greedy": 266, "optimum": 289}
_PIXELS, _LABELS = 224, 1000
_STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))

# Arithmetic alone costs, traffic and dispatch are as good as free, and kernels take no workspace.
_FLOPS_ONLY = Device(
    name="FLOPs alone", memory_bytes=BUDGET_BYTES, bandwidth_bytes_per_s=1e14,
    flops={"float32": 1e9}, op_overhead_s=0.0, region_overhead_s=0.0, saved_tensor_overhead_s=0.0,
    source="as in the paper: static costs",
)  # fmt: skip
STATIC = CostModel(device=_FLOPS_ONLY, workspace={})


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """What counts against the 16 GB beside activations and their gradients."""

    label: str
    parameter_copies: int
    counts_images: bool

    def left_bytes(self, parameters: int) -> int:
        """Return what is left for activations and their gradients."""
        return BUDGET_BYTES - 4 * parameters * self.parameter_copies

    def image_bytes(self) -> int:
        """Return the bytes of one image, if they count."""
        return 4 * 3 * _PIXELS**2 if self.counts_images else 0


ACCOUNTINGS = (
    Accounting(
        label="parameters and their gradients, no images", parameter_copies=2, counts_images=False
    ),
    Accounting(label="parameters and images", parameter_copies=1, counts_images=True),
)


def layer_bytes() -> list[int]:
    """Return the bytes of each layer's output for one image, in order."""
    sizes, pixels = [], _PIXELS
    for width, convolutions in _STAGES:
        sizes += [width * pixels**2] * convolutions
        pixels //= 2
        sizes.append(width * pixels**2)
    sizes += [512 * pixels**2, 4096, 4096, _LABELS]  # flattened, three linear layers
    return [4 * size for size in sizes]


def store_all_bytes(sizes: list[int]) -> int:
    """Return what storing all holds for one image: every output to the end, and two gradients."""
    gradients = max(a + b for a, b in itertools.pairwise(sizes))
    return sum(sizes) + gradients


def least_bytes(sizes: list[int]) -> int:
    """Return what no schedule can do without: a layer's backward step with its four operands.

    These are the outputs of the layer and of the next, which the gradient of the layer's output
    depends on in their graph, the next layer's gradient, and its own.
    """
    return max(2 * (a + b) for a, b in itertools.pairwise(sizes))


def by_their_model(accounting: Accounting, parameters: int) -> Data:
    """Return the largest batches by their static model under one accounting."""
    sizes = layer_bytes()
    left, image = accounting.left_bytes(parameters), accounting.image_bytes()
    return {
        "accounting": accounting.label,
        "store all": left // (store_all_bytes(sizes) + image),
        "no schedule above": left // (least_bytes(sizes) + image),
    }


# -- ours -------------------------------------------------------------------------------------


class ConvolutionAndReLU(nn.Module):
    """One layer as Checkmate counts them."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(before, after, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, and cut off below zero in place."""
        return self.relu(self.convolution(x))


def flat_vgg19(*, batch: int) -> Case:
    """VGG19 as one flat sequence of layers, as deep as Checkmate's graph."""
    layers: list[nn.Module] = []
    before = 3
    for after, convolutions in _STAGES:
        for _ in range(convolutions):
            layers.append(ConvolutionAndReLU(before, after))
            before = after
        layers.append(nn.MaxPool2d(2))
    layers += [
        nn.Flatten(), nn.Linear(512 * 7**2, 4096), nn.ReLU(inplace=True), nn.Linear(4096, 4096),
        nn.ReLU(inplace=True), nn.Linear(4096, _LABELS),
    ]  # fmt: skip
    images = torch.randn(batch, 3, _PIXELS, _PIXELS)
    labels = torch.randint(0, _LABELS, (batch,))
    return Case(nn.Sequential(*layers), (images, labels), classification_loss)


def staged_vgg19(*, batch: int) -> Case:
    """VGG19 as most code has it: five stages and a classifier."""
    return vgg19(pixels=_PIXELS, labels=_LABELS, batch=batch)


def our_budget(accounting: Accounting, case: Case, parameters: int) -> int:
    """Return the budget of torch's whole step: what the accounting leaves out is added."""
    images = sum(t.numel() * t.element_size() for t in case.batch)
    uncounted = 0 if accounting.counts_images else images
    # Torch's step holds parameters and gradients.
    return BUDGET_BYTES + uncounted + 4 * parameters * (2 - accounting.parameter_copies)


def largest(fits: Callable[[int], bool], low: int = 32, high: int = 512) -> int:
    """Return the largest batch that fits, by bisection."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def ours(make: Callable[..., Case], accounting: Accounting, parameters: int) -> Data:
    """Return the largest batches of torch's own step: keeping all, all blocks, and planned."""
    plans: dict[int, Data] = {}

    def fit_of(batch: int) -> tuple[Fit, int]:
        with torch.device("meta"):
            case = make(batch=batch)
        case.model.train()
        fit = Fit(
            case.model, case.batch, loss=case.loss, optimizer=None, cost=STATIC, time_limit_s=30.0
        )  # fmt: skip
        return fit, our_budget(accounting, case, parameters)

    def keeps(batch: int) -> bool:
        fit, budget = fit_of(batch)
        return fit.keep_all_peak_bytes <= budget

    def recomputes_blocks(batch: int) -> bool:
        fit, budget = fit_of(batch)
        return fit.policy(AllBlocks()).predicted_peak_bytes <= budget

    def plans_within(batch: int) -> bool:
        fit, budget = fit_of(batch)
        try:
            made = fit.plan(budget)
        except BudgetError:
            return False
        plans[batch] = {
            "recompute_fraction": made.recompute_fraction,
            "predicted_peak_bytes": made.predicted_peak_bytes,
            "regions": [region.module for region in made.regions],
        }
        return made.recompute_fraction <= 1.0

    kept = largest(keeps)
    planned = largest(plans_within, low=kept - 1)
    return {
        "model": make.__name__,
        "accounting": accounting.label,
        "keep all": kept,
        "all blocks": largest(recomputes_blocks),
        "planned": planned,
        **plans.get(planned, {}),
    }


def main() -> int:
    """Compute all, print the table, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in flat_vgg19(batch=1).model.parameters())
    results: Data = {
        "schema_version": 1,
        "theme": "checkmate",
        "date": dt.datetime.now(tz=dt.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment("checkmate.py", 1),
        "budget_bytes": BUDGET_BYTES,
        "parameters": parameters,
        "published": PUBLISHED,
        "their_model": [by_their_model(a, parameters) for a in ACCOUNTINGS],
        "ours": [
            ours(make, accounting, parameters)
            for accounting in ACCOUNTINGS
            for make in (staged_vgg19, flat_vgg19)
        ],
    }
    stem = arguments.out / f"checkmate_static_{results['date'][:10]}"
    write_atomically(stem.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
    write_atomically(stem.with_suffix(".md"), markdown(results))
    print(markdown(results))
    return 0 if max(row["planned"] for row in results["ours"][:2]) >= PUBLISHED["optimum"] else 1


def markdown(results: Data) -> str:
    """Write the results as a page."""
    published = ", ".join(f"{name} {size}" for name, size in results["published"].items())
    spoken = (
        f"Largest batch of VGG19 (224 pixels, {results['parameters']:,} parameters) in "
        f"{results['budget_bytes'] / 1e9:.0f}e9 bytes whose step costs one extra forward at most, "
        f"from static sizes and FLOPs. Published: {published}. Ours counts every tensor of torch's "
        "own step under the same accounting, also those that their graph has no nodes for (the "
        "indices of pooling, a second gradient where an activation function is differentiated)."
    )
    theirs = table(
        ("accounting", "store all", "no schedule above"),
        ((r["accounting"], r["store all"], r["no schedule above"]) for r in results["their_model"]),
    )
    mine = table(
        ("model", "accounting", "keep all", "all blocks", "planned", "recomputed", "regions"),
        (
            (
                r["model"], r["accounting"], r["keep all"], r["all blocks"], r["planned"],
                f"{r['recompute_fraction']:.3f}" if "recompute_fraction" in r else "",
                len(r.get("regions", ())),
            )
            for r in results["ours"]
        ),
    )  # fmt: skip
    head = ["# Checkmate's case", "", where(results), "", spoken, ""]
    return "\n".join([*head, "Their static model:", "", *theirs, "", "Ours:", "", *mine]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
