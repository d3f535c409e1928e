"""Frames as text for a terminal, in color or without."""

from .frames import Frame

SHADES = "·░▒▓█"  # from m = 0, forgotten, to m = 1
RESET = "\033[0m"
COLORS = {"r": "31", "R": "31;1", "b": "34", "B": "34;1", "@": "33;1", "#": "90"}  # of the map's letters, SGR codes
DARK, BRIGHT = (40, 40, 48), (90, 220, 130)  # of a memory: red, green, blue


def as_text(frame: Frame, color: bool = False, width: int = 100) -> str:
    """The map, then one row each for what was observed, what was done, and what each layer still holds."""
    lines = [colored(row, color) for row in frame.text] + [frame.caption]
    last = slice(-(width - 9), None)
    if frame.observed:
        lines.append(f"observed {colored(frame.observed[last], color)}")
    lines.append(f"actions  {frame.actions[last]}")
    for layer, memory in enumerate(frame.memories):
        lines.append(f"layer {layer:<3}" + "".join(memory_cell(m, color) for m in memory[last]) + RESET * color)
    lines.append(frame.decision)
    if frame.ending is not None:
        lines += ["", f"episode over: {frame.ending}"]
    return "\n".join(lines)


def colored(row: str, color: bool) -> str:
    if not color:
        return row
    return "".join(f"\033[{COLORS[letter]}m{letter}{RESET}" if letter in COLORS else letter for letter in row)


def memory_cell(m: float, color: bool) -> str:
    """One character for the soft mask m."""
    if not color:
        return SHADES[-int(-m * (len(SHADES) - 1) // 1)]
    red, green, blue = (round(low + m * (high - low)) for low, high in zip(DARK, BRIGHT, strict=True))
    return f"\033[48;2;{red};{green};{blue}m "
