"""Bars of numbers, as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

_COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb")
"""Paul Tol's bright scheme, which colour-blind readers can tell apart."""
_BAR, _GAP, _PLOT, _LETTER, _MARGIN = 16, 6, 520, 6.6, 12
"""Pixels; a letter's width is an average at a font size of 12."""


def bar_chart(title: str, unit: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """One bar for each row, its parts side by side, with their sum at the end and the parts' names below.

    Raises:
        ValueError: nothing to show, a negative part, or more parts than colours.
    """
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    totals = {name: sum(row.values()) for name, row in rows.items()}
    if not parts or len(parts) > len(_COLOURS) or min(min(row.values()) for row in rows.values()) < 0:
        raise ValueError(f"a chart has 1 to {len(_COLOURS)} parts, none of them negative, not {', '.join(parts)}")
    left = _MARGIN + _LETTER * max(map(len, rows)) + 8
    labels = {name: f"{_number(total)} {unit}" for name, total in totals.items()}
    scale = _PLOT / (max(totals.values()) or 1)
    width = left + _PLOT + 8 + _LETTER * max(map(len, labels.values())) + _MARGIN
    lines = [_text(_MARGIN, 24, title, weight="bold")]
    y = 40
    for name, row in rows.items():
        lines.append(_text(left - 8, y + 12, name, anchor="end"))
        x = left
        for part, value in row.items():
            lines.append(
                _box(x, y, scale * value, _COLOURS[parts.index(part)], f"{name}, {part}: {_number(value)} {unit}")
            )
            x += scale * value
        lines.append(_text(x + 6, y + 12, labels[name]))
        y += _BAR + _GAP
    y += _GAP
    if len(parts) > 1:
        x = left
        for part, colour in zip(parts, _COLOURS, strict=False):
            lines += [_box(x, y, 12, colour, part), _text(x + 18, y + 12, part)]
            x += 36 + _LETTER * len(part)
        width = max(width, x)
        y += _BAR + _GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{y + _MARGIN}" '
        'font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>", ""])


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'


def _box(x: float, y: float, width: float, colour: str, told: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}">'
        f"<title>{escape(told)}</title></rect>"
    )
