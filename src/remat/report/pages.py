"""Pages: what every HTML page of remat is made with."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from typing import TYPE_CHECKING

from remat.units import format_bytes, format_rate, format_seconds, format_usd

if TYPE_CHECKING:
    import jinja2


def page_environment() -> jinja2.Environment:
    """Return the environment of the templates: everything escaped, nothing undefined."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("remat.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": format_bytes, "seconds": format_seconds, "usd": format_usd, "rate": format_rate,
        "zip": zip,
        "svg": Markup,  # our own pictures, whose texts vega has escaped
    }  # fmt: skip
    return environment


def page_script() -> str:
    """Return the one script of a run's page."""
    folder = importlib.resources.files("remat.report") / "templates"
    return (folder / "explain.js").read_text(encoding="utf-8")


def content_policy(script: str = "") -> str:
    """Forbid a page to load or send anything, and any script but this one."""
    allowed = "'none'"
    if script:
        digest = hashlib.sha256(script.encode("utf-8")).digest()
        allowed = f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )
