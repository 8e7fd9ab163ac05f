"""Quantities: a number with a unit of the SI or in common use, compared exactly after conversion.

The grammar is closed: a number, then units with exponents joined by `/`, `·`, `*` or a space. Nothing is evaluated.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from keye.evaluation.choices import without_lead
from keye.evaluation.words import plain

_BASES = ("m", "kg", "s", "A", "K", "mol", "cd", "B", "currency")
_PREFIXES = {"p": -12, "n": -9, "u": -6, "μ": -6, "m": -3, "c": -2, "d": -1, "k": 3, "M": 6, "G": 9, "T": 12}
_LONG_PREFIXES = {"nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "kilo": 3, "mega": 6, "giga": 9}

# Unit: factor to the base units, exponents of the base units, symbols that take prefixes, other symbols, long names.
_TABLE = """
1      m        m               | | metre meter metres meters
0.001  kg       g               | | gram grams gramme grammes
1      s        s               | sec secs | second seconds
1      A        A               | | ampere amperes amp amps
1      K        K               | | kelvin kelvins
1      mol      mol             | | mole moles
1      cd       cd              | | candela
1      s-1      Hz              | | hertz
1      m.kg.s-2 N               | | newton newtons
1      m-1.kg.s-2 Pa            | | pascal pascals
1      m2.kg.s-2 J              | | joule joules
1      m2.kg.s-3 W              | | watt watts
1      s.A      C               | | coulomb coulombs
1      m2.kg.s-3.A-1 V          | | volt volts
1      m-2.kg-1.s4.A2 F         | | farad farads
1      m2.kg.s-3.A-2 Ω          | Ohm | ohm ohms
1      kg.s-2.A-1 T             | | tesla teslas
1      m2.kg.s-2.A-1 Wb         | | weber webers
1      m2.kg.s-2.A-2 H          | | henry henries
0.001  m3       L l             | | litre liter litres liters
1      B        B               | | byte bytes
0.125  B        bit             | | bits
1.602176634e-19 m2.kg.s-2 eV    | |
100000 m-1.kg.s-2 bar           | | bars
4.184  m2.kg.s-2 cal            | | calorie calories
60     s        -               | min mins | minute minutes
3600   s        -               | h hr hrs | hour hours
86400  s        -               | | day days
604800 s        -               | | week weeks
1000   kg       -               | t | tonne tonnes
10000  m2       -               | ha | hectare hectares
0.0254 m        -               | in | inch inches
0.3048 m        -               | ft | foot feet
0.9144 m        -               | yd | yard yards
1609.344 m      -               | mi | mile miles
1852   m        -               | | nautical_mile nautical_miles
0.45359237 kg   -               | lb lbs | pound pounds
0.028349523125 kg -             | oz | ounce ounces
0.44704 m.s-1   -               | mph |
1/3.6  m.s-1    -               | kph kmh |
1852/3600 m.s-1 -               | kn | knot knots
101325 m-1.kg.s-2 -             | atm | atmosphere atmospheres
133.322387415 m-1.kg.s-2 -      | mmHg |
3600000 m2.kg.s-2 -             | kWh |
3600   m2.kg.s-2 -              | Wh |
735.49875 m2.kg.s-3 -           | PS |
1      1        -               | rad | radian radians
3.141592653589793/180 1 -       | ° deg | degree degrees
0.01   1        -               | % | percent
1      kg       -               | | kilo kilos
1      currency -               | $ USD | dollar dollars
"""

_NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,30})?(?P<part>\.[0-9]{1,30})?"
    r"(?:[eE](?P<e>[-+]?[0-9]{1,2})(?![0-9])|\s*(?:[x×*]|\\times|\\cdot)\s*10\^\{?(?P<ten>[-+]?[0-9]{1,2})\}?(?![0-9]))?"
    r"(?:\s*/\s*(?P<below>[0-9]{1,30})(?![0-9.]))?"
)
_PIECE = re.compile(r"(?P<name>[^\W\d_]+|[°%$Ω](?:[CF]\b)?)(?:\^?\{?(?P<power>[-+]?[1-9])\}?)?")
_JOIN = re.compile(r"\s*(?P<per>/|\bper\b)\s*|\s*[·*⋅]\s*|\s+")
_TEMPERATURES = {"C": (Fraction(1), Fraction("273.15")), "F": (Fraction(5, 9), Fraction("459.67") * 5 / 9)}
_TEMPERATURE = re.compile(r"(?:°|deg(?:rees?)?)\s*([CF])|(?i:(?:(?:°|deg(?:rees?)?)\s*)?(celsius|fahrenheit))")

_CURRENCY = re.compile(r"(?:US\s?)?\$|USD\b")
_COMPOUND = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([^\W\d_]{1,12})")
_ANY_CASE = frozenset("km cm kg sec min hrs".split())
_LENGTHS = {"公里": "km", "千米": "km", "厘米": "cm", "毫米": "mm", "米": "m"}
_CHINESE_UNITS = {
    **_LENGTHS, **{f"平方{name}": f"{unit}^2" for name, unit in _LENGTHS.items()},
    **{f"立方{name}": f"{unit}^3" for name, unit in _LENGTHS.items()}, "千克": "kg", "公斤": "kg",
    "毫克": "mg", "克": "g", "吨": "t",
    "毫升": "mL", "升": "L", "小时": "h", "分钟": "min", "毫秒": "ms", "秒钟": "s", "秒": "s", "天": "day",
    "摄氏度": "°C", "度": "°", "美元": "$", "每": "/",
}  # fmt: skip
_CHINESE = re.compile("|".join(sorted(_CHINESE_UNITS, key=len, reverse=True)))

Dimension = tuple[int, ...]
"""Exponents of the base units `_BASES`."""


@dataclass(frozen=True)
class Unit:
    """base value = factor · value + offset, in base units with the exponents `dimension`."""

    factor: Fraction
    dimension: Dimension
    offset: Fraction = Fraction(0)


@dataclass(frozen=True)
class Quantity:
    """A number as written, and its unit; None without one."""

    number: Fraction
    unit: Unit | None

    @property
    def base(self) -> Fraction:
        """The value in base units."""
        return self.number if self.unit is None else self.number * self.unit.factor + self.unit.offset


def parse_quantity(text: str) -> Quantity | None:
    """The single quantity that a text consists of, after `The answer is`; None for any other text."""
    if len(text) > 200:
        return None
    text = _written(text)
    text = re.sub(r"\\(?:text|mathrm|,|;|!|\s)|[{}](?=\s*$)", " ", plain(text.replace("²", "^2").replace("³", "^3")))
    text = text.replace("µ", "μ").replace("Ω", "Ω").strip().rstrip(".。").strip()
    before, text = text, without_lead(text)
    if (sign := _CURRENCY.match(text)) and before[:1] != "":
        text = f"{text[sign.end() :].strip()} $"
    found = _NUMBER.match(text)
    if not found or not (found["whole"] or found["part"]):
        return None
    unit = text[found.end() :].strip(" {}")
    number = _fraction(found)
    if number is None:
        return None
    if not unit:
        return Quantity(number, None)
    known = parse_unit(unit)
    return _compound(text) if known is None else Quantity(number, known)


def _written(text: str) -> str:
    """Signs of LaTeX, fractions and units in Chinese in the form of the grammar."""
    text = re.sub(r"\\([%$])", r"\1", re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*", "°", text))
    text = re.sub(r"\\[dt]?frac\{(\d{1,30})\}\{(\d{1,30})\}", r"\1/\2", text)
    text = re.sub(r"(\d?)([¼½¾⅓⅔⅕⅛])", _vulgar, text)
    text = re.sub(r"[⁻⁺⁰¹²³⁴-⁹]+", lambda power: f"^{unicodedata.normalize('NFKC', power[0])}".replace("−", "-"), text)
    return text if text.isascii() else _CHINESE.sub(lambda unit: f" {_CHINESE_UNITS[unit[0]]} ", text)


def _vulgar(found: re.Match[str]) -> str:
    above, below = map(int, unicodedata.normalize("NFKC", found[2]).split("⁄"))
    return f"{int(found[1] or 0) * below + above}/{below}"


def _compound(text: str) -> Quantity | None:
    """Several parts in falling units of one dimension, such as `1 min 30 s` and `5 ft and 10 in`, as their sum."""
    parts = [(Fraction(number), parse_unit(unit)) for number, unit in _COMPOUND.findall(text)]
    if len(parts) < 2 or not re.fullmatch(rf"(?:{_COMPOUND.pattern}\s*(?:,|and)?\s*)+", text):
        return None
    units = [unit for _, unit in parts]
    if any(unit is None or unit.offset or unit.dimension != units[0].dimension for unit in units):
        return None
    pairs = zip(parts, parts[1:], strict=False)
    if any(n * unit.factor >= before.factor or unit.factor >= before.factor for (_, before), (n, unit) in pairs):
        return None
    return Quantity(sum(number * unit.factor for number, unit in parts) / units[0].factor, units[0])


def _fraction(found: re.Match[str]) -> Fraction | None:
    digits = (found["whole"] or "0").replace(",", "") + (found["part"] or "")
    number = Fraction(digits) * Fraction(10) ** int(found["e"] or found["ten"] or 0)
    if found["below"]:
        if int(found["below"]) == 0:
            return None
        number /= int(found["below"])
    return -number if found["sign"] == "-" else number


def parse_unit(text: str) -> Unit | None:
    """A unit such as `km/h`, `kg m^-3`, `N·m` or `°C`; None for an unknown one."""
    if re.fullmatch(r"(?i)per\s+cent", text):
        text = "%"
    if found := _TEMPERATURE.fullmatch(text):
        factor, offset = _TEMPERATURES[(found[1] or found[2])[0].upper()]
        return Unit(factor, _dimension("K"), offset)
    factor, exponents, at, sign = Fraction(1), [0] * len(_BASES), 0, 1
    while at < len(text):
        piece = _PIECE.match(text, at)
        unit = _named(piece["name"]) if piece else None
        if piece is None or unit is None:
            return None
        power = sign * int(piece["power"] or 1)
        factor *= unit.factor**power
        exponents = [total + power * mine for total, mine in zip(exponents, unit.dimension, strict=True)]
        at = piece.end()
        if at < len(text):
            join = _JOIN.match(text, at)
            if join is None or join.end() == len(text):
                return None
            sign, at = (-1 if join["per"] else sign), join.end()
    return Unit(factor, tuple(exponents))


def _named(name: str) -> Unit | None:
    """A unit by its symbol or name; names and a few symbols in capitals too, where they can be nothing else."""
    small = name.lower()
    return _NAMES.get(name) or (_NAMES.get(small) if len(name) > 3 or small in _ANY_CASE else None)


def _dimension(text: str) -> Dimension:
    exponents = dict.fromkeys(_BASES, 0)
    for part in text.split("."):
        found = re.fullmatch(r"([A-Za-z]+)(-?\d)?", part)
        if found:
            exponents[found[1]] = int(found[2] or 1)
    return tuple(exponents.values())


def _names() -> dict[str, Unit]:
    names: dict[str, Unit] = {}
    for line in _TABLE.strip().splitlines():
        head, others, long = (part.split() for part in line.split("|"))
        (factor, _, below), dimension = head[0].partition("/"), _dimension(head[1])
        value = Fraction(factor) / Fraction(below or 1)
        for symbol in [symbol for symbol in head[2:] if symbol != "-"]:
            names[symbol] = Unit(value, dimension)
            for prefix, power in _PREFIXES.items():
                names.setdefault(prefix + symbol, Unit(value * Fraction(10) ** power, dimension))
            for name in long:
                for prefix, power in _LONG_PREFIXES.items():
                    names[prefix + name] = Unit(value * Fraction(10) ** power, dimension)
        names |= dict.fromkeys([*others, *long], Unit(value, dimension))
    return names


_NAMES = _names()
