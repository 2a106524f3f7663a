"""Reading a client's JSON object: each value is of the right type and in range, or an InvalidRequest names it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from shared.errors import InvalidRequest

_NAMES: dict[type, str] = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", type(None): "null"}


def name_of(value: object) -> str:
    """What JSON calls the type of a value."""
    return _NAMES.get(type(value), "an array" if isinstance(value, list) else "an object")


def wrong_type(param: str, expected: str, value: object) -> NoReturn:
    """Refuse a value of another type."""
    raise InvalidRequest(f"'{param}' must be {expected}, not {name_of(value)}", param=param)


def filled(owner: Mapping[str, Any], name: str, param: str) -> str:
    """The string `name` of an object at `param`, which must not be empty. Raises InvalidRequest."""
    value = owner.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"'{param}.{name}' must be a string that is not empty", param=f"{param}.{name}")
    return value


@dataclass(frozen=True, slots=True)
class Range:
    """Closed, unless `above` is set: then the lower end is not in it."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def check(self, param: str, value: float) -> None:
        """Raise InvalidRequest for a value outside."""
        inside = (self.low < value if self.above else self.low <= value) and value <= self.high
        if not inside or math.isnan(value):
            raise InvalidRequest(f"'{param}' must be {self}, not {value}", param=param)

    def __str__(self) -> str:
        low = f"{'greater than' if self.above else 'at least'} {_shown(self.low)}"
        high = f"at most {_shown(self.high)}"
        return " and ".join(([low] if self.low > -math.inf else []) + ([high] if self.high < math.inf else []))


def _shown(bound: float) -> str:
    return f"{bound:g}" if abs(bound) < 1e5 else str(bound)


class Fields:
    """An object of the client. A missing value and null are the same."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def raw(self, name: str) -> Any:
        """The value as it came, None if there is none."""
        return self._raw.get(name)

    def present(self, names: Iterable[str]) -> list[str]:
        """Those of these names that the object has."""
        raw = self._raw
        return [name for name in names if name in raw]

    def number(self, name: str, allowed: Range) -> float | None:
        """A number in a range."""
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            wrong_type(name, "a number", value)
        allowed.check(name, value)
        return float(value)

    def integer(self, name: str, allowed: Range) -> int | None:
        """An integer in a range; 3.0 is one."""
        value = self.raw(name)
        return None if value is None else integer(name, value, allowed)

    def flag(self, name: str) -> bool | None:
        """A boolean."""
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            wrong_type(name, "a boolean", value)
        return value

    def text(self, name: str, max_chars: int | None = None) -> str | None:
        """A string."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, str):
            wrong_type(name, "a string", value)
        if max_chars is not None and len(value) > max_chars:
            raise InvalidRequest(f"'{name}' must have at most {max_chars} characters", param=name)
        return value

    def array(self, name: str) -> list[Any] | None:
        """An array of anything."""
        value = self.raw(name)
        if value is not None and not isinstance(value, list):
            wrong_type(name, "an array", value)
        return value

    def object(self, name: str) -> dict[str, Any] | None:
        """An object."""
        value = self.raw(name)
        if value is not None and not isinstance(value, dict):
            wrong_type(name, "an object", value)
        return value


def integer(param: str, value: Any, allowed: Range) -> int:
    """`value` as an integer in a range. Raises InvalidRequest."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        wrong_type(param, "an integer", value)
    allowed.check(param, value)
    return int(value)
