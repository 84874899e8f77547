"""A run against the results of an earlier one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xattn_ops.benchmarks.runner import Row, Settings

SAME = 0.05  # of the time: less is noise whatever the spread


@dataclass(frozen=True)
class Change:
    """One case in both runs; `factor` is how many times faster it is now."""

    case: str
    before: float
    now: float
    verdict: str

    @property
    def factor(self) -> float:
        return self.before / self.now


def load(path: Path) -> dict[str, Any]:
    """The results that `bench --json` wrote.

    Raises:
        ValueError: no such file, or one that holds something else.
    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"no results at {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict) or not {"schema", "machine", "rows"} <= data.keys():
        raise ValueError(f"{path} holds no benchmark results")
    return data


def changes(old: dict[str, Any], rows: Sequence[Row], settings: Settings) -> list[Change]:
    """The cases that both runs measured, in the order of this one."""
    before = {row.key: row for row in map(Row.from_dict, old["rows"]) if row.timing}
    found = []
    for row in rows:
        then = before.get(row.key)
        if then is None or then.timing is None or row.timing is None:
            continue
        limits = settings.max_spread, settings.max_waited
        busy = row.timing.busy("now", *limits) or then.timing.busy("then", *limits)
        times = then.timing.median, row.timing.median
        noise = max(SAME, then.timing.spread, row.timing.spread)
        found.append(
            Change(
                f"{row.label} {row.dtype} {row.direction}", *times, busy or _verdict(*times, noise)
            )
        )
    return found


def _verdict(before: float, now: float, noise: float) -> str:
    if abs(before - now) <= noise * min(before, now):
        return "same"
    return "faster" if now < before else "slower"


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What besides the code changed between the two runs' machines."""
    before, now = old["machine"], new["machine"]
    names = ("cpu", "accelerator", "cores", "threads", "isa")
    pairs = [(name, before.get(name), now.get(name)) for name in names]
    torch_versions = (machine.get("versions", {}).get("torch") for machine in (before, now))
    pairs.append(("torch", *torch_versions))
    return [f"{name} was {then}, is {is_now}" for name, then, is_now in pairs if then != is_now]
