"""What all pictures share: altair's data and scales, and SVG text that a page can colour."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from remat.errors import MissingPackageError

# Any: altair's charts, scales and rows of data have no useful static types.
Chart = Any
Row = dict[str, Any]


def require_pictures() -> None:
    """Fail with the install command where the packages that draw are missing.

    Raises
    ------
    MissingPackageError: naming the first that is missing.
    """
    try:
        import altair as alt  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("altair", "eval", "Drawing the report") from error
    try:
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("vl-convert-python", "eval", "Drawing the report") from error


def inline_data(rows: Iterable[Row]) -> Any:
    """Give rows to altair as part of the picture; what is not finite has no place and no mark."""
    import altair as alt

    return alt.InlineData(values=[{key: _finite(value) for key, value in r.items()} for r in rows])


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fixed_scale(domain: tuple[float, float]) -> Any:
    """Fix an axis to exactly this domain."""
    import altair as alt

    return alt.Scale(domain=list(domain), nice=False, zero=False)


def literal(channel: Any, field: str) -> Any:
    """Encode a field whose values are the colours or shapes themselves, without a legend."""
    return channel(f"{field}:N", scale=None, legend=None)


def svg_text(chart: Chart, name: str, width: int, *, left: int = 0) -> str:
    """Render the chart, and make it fit to stand beside others in one page.

    `left` is kept free beside the names of rows: they are measured here in one font and shown in
    the reader's.

    Ids are made unique, because `url(#clip0)` means the first such id of the whole page. The size
    is left to the page, which may shrink the picture but not blow it up.
    """
    import vl_convert

    styled = (
        chart.configure(
            background="transparent",
            font="system-ui, sans-serif",
            padding={"left": 4 + left, "top": 4, "right": 4, "bottom": 4},
        )
        .configure_axis(
            labelColor="currentColor",
            titleColor="currentColor",
            titleFontWeight=500,
            titleFontSize=12,
            labelFontSize=11,
            domainColor="currentColor",
            tickColor="currentColor",
            domainOpacity=0.4,
            tickOpacity=0.4,
            gridColor="currentColor",
            gridOpacity=0.12,
            titlePadding=10,
            tickCount=max(3, min(8, width // 90)),
        )
        .configure_view(stroke=None)
    )
    text: str = vl_convert.vegalite_to_svg(styled.to_dict(), allowed_base_urls=[])
    slug = re.sub(r"[^a-z0-9]+", "-", f"{name}-{width}".lower())
    text = re.sub(r'\bid="', f'id="{slug}-', text)
    text = re.sub(r"url\(#", f"url(#{slug}-", text)
    return re.sub(
        r'(<svg [^>]*?)\swidth="([\d.]+)"\sheight="[\d.]+"',
        r'\1 style="max-width:\2px"',
        text,
        count=1,
    )
