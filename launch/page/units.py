"""Numbers as text for people, and round places on an axis. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "BYTES",
    "BYTES_PER_S",
    "CELSIUS",
    "COUNT",
    "PLAIN",
    "SECONDS",
    "SHARE",
    "STEP",
    "WATT",
    "Unit",
    "duration",
    "ticks",
]

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SPANS = ((86_400, 3_600, "dh"), (3_600, 60, "hm"), (60, 1, "ms"))
_HUGE, _TINY = 1e300, 1e-280
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Unit:
    """How a quantity is written.

    Args:
        symbol: behind the number.
        factor: of the number that is shown.
        prefixed: whether thousands become k, M, G, ...
        whole: whether it is counted, and a number of steps is of interest to the last digit.
    """

    symbol: str = ""
    factor: float = 1.0
    prefixed: bool = False
    whole: bool = False

    def text(self, value: float) -> str:
        """A value with three digits and its unit.

        >>> SHARE.text(0.4167), BYTES_PER_S.text(12_340_000), COUNT.text(1234), PLAIN.text(0.0000321)
        ('41.7%', '12.3 MB/s', '1.23k', '3.21e-05')
        >>> PLAIN.text(float("nan"))
        'NaN'
        """
        if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
        shown = value * self.factor
        if self.whole:
            return f"{shown:,.0f}"
        scale, prefix = self._scale(shown)
        return self._joined(_digits(shown / scale), prefix)

    def labels(self, places: Sequence[float]) -> list[str]:
        """Texts of an axis, all with the same prefix and the same number of decimals.

        >>> BYTES.labels([0, 500_000, 1_000_000]), SHARE.labels([0.0, 0.25, 0.5])
        (['0', '0.5 MB', '1.0 MB'], ['0%', '25%', '50%'])
        >>> PLAIN.labels([0, 0.0005, 0.001])
        ['0', '5e-4', '1e-3']
        """
        shown = [place * self.factor for place in places]
        if self.whole and max(map(abs, shown), default=0.0) < 1e6:
            return [f"{each:,.0f}" for each in shown]
        largest = max(map(abs, shown), default=0.0)
        if 0 < largest < 0.01:
            return [self._joined(_power(each), "") if each else "0" for each in shown]
        scale, prefix = self._scale(largest)
        scaled = [each / scale for each in shown]
        decimals = next((n for n in range(4) if all(abs(each - round(each, n)) < 1e-6 for each in scaled)), 4)
        return [self._joined(f"{each:.{decimals}f}", prefix) if each or self.symbol == "%" else "0" for each in scaled]

    def _scale(self, shown: float) -> tuple[float, str]:
        if not self.prefixed:
            return 1.0, ""
        return next(((scale, prefix) for scale, prefix in _PREFIXES if abs(shown) >= 0.9995 * scale), (1.0, ""))

    def _joined(self, digits: str, prefix: str) -> str:
        gap = " " if self.symbol and self.symbol != "%" else ""
        return f"{digits}{gap}{prefix}{self.symbol}"


PLAIN, COUNT, SHARE = Unit(), Unit(prefixed=True), Unit("%", factor=100.0)
STEP = Unit(prefixed=True, whole=True)
BYTES, BYTES_PER_S = Unit("B", prefixed=True), Unit("B/s", prefixed=True)
WATT, CELSIUS, SECONDS = Unit("W"), Unit("°C"), Unit("s")


def _digits(value: float) -> str:
    """Three significant digits, all that stand before the point; powers of ten only for what is tiny or huge."""
    size = abs(value)
    if size and not 1e-3 <= size < 1e7:
        return f"{value:.3g}"
    decimals = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{value:,.{decimals}f}" if size else "0"


def _power(value: float) -> str:
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that cover a range, at most so many and at least two.

    >>> ticks(0, 9.3), ticks(1.9, 5.6), ticks(2, 2)
    ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 1.5, 2.0, 2.5, 3.0])
    """
    low, high = (max(-_HUGE, min(_HUGE, end)) for end in (low, high))  # their distance is a float, too
    if high - low <= max(1e-9 * max(abs(low), abs(high)), _TINY):
        spare = abs(low) / 2 if abs(low) > _TINY else 1.0
        low, high = low - spare, high + spare
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (nice * power for nice in (*_NICE, *(10 * nice for nice in _NICE))):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < most:
            break
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def duration(seconds: float) -> str:
    """Seconds as two units of time.

    >>> duration(4.24), duration(75), duration(7_980), duration(200_000)
    ('4.2 s', '1m 15s', '2h 13m', '2d 7h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    large, small, names = next(each for each in _SPANS if whole >= each[0] or each is _SPANS[-1])
    rest = whole % large // small
    return f"{whole // large}{names[0]}" + (f" {rest}{names[1]}" if rest else "")
