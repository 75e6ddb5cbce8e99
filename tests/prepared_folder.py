"""What the preparation of text leaves."""


def contents(folder):
    """``{name: bytes}`` of what training and a reader need: all but work/ and the times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "work" not in path.parts and path.name not in ("steps.json", ".lock")
    }
