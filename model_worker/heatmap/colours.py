"""The colours of heat maps, the same in pictures and pages: from almost white over orange to dark brown."""

from __future__ import annotations

STOPS = ("#fbf8f1", "#fde9b8", "#fdc165", "#f38b2a", "#cf4f0f", "#8f2d0a", "#4a1606")
UNKNOWN = "#e9e9ee"  # Nothing is known of this place.
WINDOW, SESSION, DOCUMENTS, UNTOLD = "#9aa5b8", "#5b7ba6", "#e0701a", "#cfcfd6"


def heat(value: float, most: float) -> float:
    """0 to 1. The square root shows small masses, which are most of them."""
    return min(1.0, max(0.0, value / most)) ** 0.5 if most > 0 else 0.0


def shade(value: float, most: float) -> str:
    """The colour of a mass, where `most` is the darkest."""
    place = heat(value, most) * (len(STOPS) - 1)
    lower = min(int(place), len(STOPS) - 2)
    return _between(STOPS[lower], STOPS[lower + 1], place - lower)


def grey(value: float) -> str:
    """The colour of what many documents got together, out of all attention."""
    level = heat(value, 1.0)
    return "#" + "".join(
        f"{round(light + (dark - light) * level):02x}" for light, dark in ((247, 128), (247, 132), (250, 148))
    )


def ink(value: float, most: float) -> str:
    """A colour to write on `shade` with."""
    return "#ffffff" if heat(value, most) > 0.6 else "#22242a"


def percent(mass: float) -> str:
    """12.3 %, 0.04 %, <0.01 %; the same width of numbers whatever the size."""
    share = 100 * mass
    if share >= 99.95:
        return "100 %"
    if share >= 1 or share == 0:
        return f"{share:.1f} %" if share else "0 %"
    return f"{share:.2f} %" if share >= 0.01 else "<0.01 %"


def _between(low: str, high: str, place: float) -> str:
    parts = ((int(low[at : at + 2], 16), int(high[at : at + 2], 16)) for at in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * place):02x}" for a, b in parts)
