"""Pages: what every HTML page of remat is made with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from remat.units import format_bytes, format_rate, format_seconds, format_usd

if TYPE_CHECKING:
    import jinja2


def page_environment() -> jinja2.Environment:
    """Return the environment of the templates: everything escaped, nothing undefined."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("remat.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": format_bytes, "seconds": format_seconds, "usd": format_usd, "rate": format_rate,
    }  # fmt: skip
    return environment
