"""Draws the subpackages ("rooms") of the package and their imports as an SVG file:

    python scripts/draw_rooms.py > docs/rooms.svg

Arrows that follow from others are left out: if A imports B and B imports C, A may import C as well.
"""

from html import escape
from pathlib import Path

import grimp

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "fairseq_smoe"
BOX, GAP, FLOOR = (112, 34), 26, 92  # width and height of a box, between boxes, between floors
MARGIN = 16
STYLE = (
    "rect{fill:#eef3f8;stroke:#4a6785;rx:5} .file{fill:#f6f2ea;stroke:#94835a} "
    "text{font:14px sans-serif;text-anchor:middle;fill:#222} "
    "line{stroke:#7d8b99;stroke-width:1.2;marker-end:url(#tip)}"
)


def imported_rooms():
    """``{room: rooms that it imports}``; a module outside all subpackages is also a room."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    rooms = {
        room.rpartition(".")[2]: {
            target.split(".")[1]
            for module in {room} | graph.find_descendants(room)
            for target in graph.find_modules_directly_imported_by(module)
            if target.count(".")
        }
        for room in graph.find_children(PACKAGE)
    }
    return {
        room: imported - {room}
        for room, imported in rooms.items()
        # __main__ finds commands by name; smoe_block is only the former place of the block
        if room not in ("__main__", "smoe_block")
    }


def floors(rooms):
    """Rows of rooms. Each room is above all that it imports, and as low as possible."""
    height = {}

    def height_of(room):
        if room not in height:
            height[room] = 1 + max(map(height_of, rooms[room]), default=-1)
        return height[room]

    for room in rooms:
        height_of(room)
    return [
        sorted(room for room in rooms if height[room] == level)
        for level in reversed(range(max(height.values()) + 1))
    ]


def needed_arrows(rooms):
    """``(room, imported room)`` of the arrows that do not follow from others."""

    def all_below(room):
        return rooms[room].union(*(all_below(below) for below in rooms[room]))

    return sorted(
        (room, below)
        for room, imported in rooms.items()
        for below in imported
        if not any(below in all_below(other) for other in imported - {below})
    )


def draw(rooms):
    """The SVG file as text."""
    rows = floors(rooms)
    width = max(len(row) * (BOX[0] + GAP) - GAP for row in rows) + 2 * MARGIN
    height = (len(rows) - 1) * FLOOR + BOX[1] + 2 * MARGIN
    left = {}
    for level, row in enumerate(rows):
        start = (width - len(row) * (BOX[0] + GAP) + GAP) / 2
        # every other floor is shifted, so that arrows pass between boxes
        start += (BOX[0] + GAP) / 4 * (-1) ** level if len(row) * (BOX[0] + GAP) < width - 80 else 0
        for place, room in enumerate(row):
            left[room] = start + place * (BOX[0] + GAP), MARGIN + level * FLOOR
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}">',
        f"<style>{STYLE}</style>",
        '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="#7d8b99"/></marker>',
    ]
    for room, below in needed_arrows(rooms):
        (x1, y1), (x2, y2) = left[room], left[below]
        middle = BOX[0] / 2
        parts.append(
            f'<line x1="{x1 + middle:g}" y1="{y1 + BOX[1]:g}" x2="{x2 + middle:g}" y2="{y2:g}"/>'
        )
    for room, (x, y) in sorted(left.items()):
        kind = "" if (REPOSITORY / PACKAGE / room).is_dir() else ' class="file"'
        parts.append(
            f'<rect{kind} x="{x:g}" y="{y:g}" width="{BOX[0]}" height="{BOX[1]}"/>'
            f'<text x="{x + BOX[0] / 2:g}" y="{y + 22:g}">{escape(room)}</text>'
        )
    return "\n".join([*parts, "</svg>"])


if __name__ == "__main__":
    print(draw(imported_rooms()))
