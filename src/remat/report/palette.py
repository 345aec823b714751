"""Colours that hold for everyone: Okabe and Ito's palette, by role, for light and for dark pages.

Pictures name a colour by its CSS variable (`var(--plan-1)`), so that the page, not the picture,
decides between light and dark. See https://jfly.uni-koeln.de/color/ for the palette.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from remat.runs.records import Variant, VariantKind

# Bottom to top of the stacked picture: what recomputation cannot change lies below.
KINDS: Final = (
    "parameters",
    "buffers",
    "optimizer",
    "gradients",
    "batch",
    "activations",
    "temporaries",
)

LIGHT: Final = {
    "reference": "#1b1b1b",
    "plan-1": "#0072b2",
    "plan-2": "#009e73",
    "plan-3": "#3a9bd9",
    "plan-4": "#7a5ba8",
    "policy-1": "#d55e00",
    "policy-2": "#cc79a7",
    "policy-3": "#bf7d00",
    "kind-parameters": "#7f7f7f",
    "kind-buffers": "#b9b9b9",
    "kind-optimizer": "#cc79a7",
    "kind-gradients": "#009e73",
    "kind-batch": "#f0e442",
    "kind-activations": "#56b4e9",
    "kind-temporaries": "#e69f00",
    "act-forward": "#0072b2",
    "act-again": "#d55e00",
    "act-backward": "#007a5a",
    "budget": "#c03d00",
    "link": "#00598c",
}

DARK: Final = LIGHT | {
    "reference": "#f2f2f2",
    "plan-1": "#4fb0ec",
    "plan-2": "#2cc798",
    "plan-3": "#9ad4f7",
    "plan-4": "#b99be0",
    "policy-1": "#ff8a3d",
    "policy-2": "#e39ac2",
    "policy-3": "#f0b840",
    "kind-parameters": "#8c8c8c",
    "kind-buffers": "#c4c4c4",
    "act-forward": "#e3f1ff",
    "act-again": "#ff8a3d",
    "act-backward": "#2cc798",
    "budget": "#ff9563",
    "link": "#7cc4f4",
}


def variant_roles(variants: Sequence[Variant]) -> dict[str, str]:
    """Give every variant its colour role by label; plans and policies cycle through their own."""
    counts = {VariantKind.PLANNED: 0, VariantKind.POLICY: 0}
    roles: dict[str, str] = {}
    for variant in variants:
        if variant.kind is VariantKind.REFERENCE:
            roles[variant.label] = "reference"
            continue
        name, size = ("plan", 4) if variant.kind is VariantKind.PLANNED else ("policy", 3)
        roles[variant.label] = f"{name}-{counts[variant.kind] % size + 1}"
        counts[variant.kind] += 1
    return roles


def css_colour(role: str) -> str:
    """Name the colour of a role as CSS does."""
    return f"var(--{role})"


def css_variables(colours: dict[str, str]) -> str:
    """Write the colours as CSS declarations."""
    return " ".join(f"--{role}: {colour};" for role, colour in colours.items())
