"""Markdown tables that are aligned in plain text as well."""


def aligned(header, rows, left):
    """Lines of a Markdown table, the first ``left`` columns aligned to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]

    def line(cells):
        aligned = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(aligned) + " |"

    rule = [
        f"{'-' * (width + 2)}" if i < left else f"{'-' * (width + 1)}:"
        for i, width in enumerate(widths)
    ]
    return [line(header), f"|{'|'.join(rule)}|", *map(line, rows)]
