"""Loss curves as an SVG picture, without a plotting library."""

WIDTH, HEIGHT, MARGIN = 640, 360, 48  # pixels
COLOURS = ("#1f6fb4", "#d1495b", "#3a7d44", "#8d6a9f")
NUM_TICKS = 5


def nice_range(values: list[float]) -> tuple[float, float]:
    """Return the range of the values, widened where it is empty."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def draw_curves(title: str, curves: dict[str, list[tuple[float, float]]]) -> str:
    """Draw named curves of (step, loss) points, with axes and a legend; empty ones are left out."""
    curves = {name: points for name, points in curves.items() if points}
    (x0, x1), (y0, y1) = (
        nice_range([point[axis] for points in curves.values() for point in points] or [0.0])
        for axis in (0, 1)
    )

    def place(x: float, y: float) -> tuple[float, float]:
        across = MARGIN + (x - x0) / (x1 - x0) * (WIDTH - 2 * MARGIN)
        return round(across, 1), round(HEIGHT - MARGIN - (y - y0) / (y1 - y0) * (HEIGHT - 2 * MARGIN), 1)

    def text(x: float, y: float, words: str, anchor: str = "middle", colour: str = "#222") -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{words}</text>'

    parts = [text(WIDTH / 2, MARGIN / 2, title.replace("&", "&amp;").replace("<", "&lt;"))]
    for i in range(NUM_TICKS):
        step, loss = (low + (high - low) * i / (NUM_TICKS - 1) for low, high in ((x0, x1), (y0, y1)))
        (x, _), (_, y) = place(step, y0), place(x0, loss)
        parts.append(text(x, HEIGHT - MARGIN + 18, f"{step:.0f}") + text(MARGIN - 6, y, f"{loss:.2f}", "end"))
        parts.append(f'<path d="M{MARGIN} {y}H{WIDTH - MARGIN}" stroke="#ddd"/>')
    for i, (name, points) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(text(WIDTH - MARGIN, MARGIN + 16 * i, name, "end", colour))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])
