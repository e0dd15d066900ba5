"""The thinking dial: every spelling clients send -> one setting, or a 400 that names both."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from autoglm.errors import RequestError

ReasoningMode = Literal["inline", "split", "drop"]
MAX_BUDGET = 1 << 24
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class ThinkingSetting(Struct, frozen=True):
    """What one request asked for.

    enabled  True = think, False = no thought token at all, None = as the model does by itself
    budget   thought tokens after which the thought is closed; None = no limit
    mode     where the thought goes: inline (in content), split (own field), drop
    """

    enabled: bool | None
    budget: int | None
    mode: ReasoningMode
    mode_is_chosen: bool = False


class _Votes:
    """Collects the spellings of one setting and refuses two that disagree."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.value: Any = None

    def add(self, name: str, value: Any) -> None:
        if value is None:
            return
        if self.name is not None and self.value != value:
            raise RequestError(
                f"{self.name} and {name} contradict each other; send one of them", param=name, code="conflicting_values"
            )
        self.name, self.value = name, value


def _boolean(name: str, value: object) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise RequestError(f"{name} must be true or false", param=name, code="invalid_value")


def _budget(name: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= MAX_BUDGET:
        raise RequestError(
            f"{name} must be a number of tokens from 0 to {MAX_BUDGET}, or -1 for no limit",
            param=name,
            code="invalid_value",
        )
    return value


def _mapping(name: str, value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be an object", param=name, code="invalid_value")
    return value


class _Dial:
    """One pass over a body and the places in it that may carry the dial."""

    def __init__(self) -> None:
        self.enabled, self.budget, self.split = _Votes(), _Votes(), _Votes()

    def read(self, fields: dict[str, Any], prefix: str, depth: int = 0) -> None:
        """Read the settings of one object; extra_body and chat_template_kwargs are objects of the same kind."""
        for name in ("enable_thinking",):
            self.enabled.add(prefix + name, _boolean(prefix + name, fields.get(name)))
        self._read_effort(prefix + "reasoning_effort", fields.get("reasoning_effort"))
        reasoning = fields.get("reasoning")
        if isinstance(reasoning, dict):
            self._read_effort(prefix + "reasoning.effort", reasoning.get("effort"))
        self._read_thinking(prefix + "thinking", fields.get("thinking"))
        self.budget.add(prefix + "thinking_budget", _budget(prefix + "thinking_budget", fields.get("thinking_budget")))
        for name in ("return_reasoning", "include_reasoning"):
            self.split.add(prefix + name, _boolean(prefix + name, fields.get(name)))
        if depth < 2:
            for name in ("chat_template_kwargs", "extra_body"):
                self.read(_mapping(prefix + name, fields.get(name)), f"{prefix}{name}.", depth + 1)

    def _read_effort(self, name: str, value: object) -> None:
        if value is None:
            return
        if not isinstance(value, str) or value not in EFFORTS:
            raise RequestError(f"{name} must be one of {', '.join(EFFORTS)}", param=name, code="invalid_value")
        self.enabled.add(name, value != "none")

    def _read_thinking(self, name: str, value: object) -> None:
        if value is None or isinstance(value, bool):
            self.enabled.add(name, value)
            return
        fields = _mapping(name, value)
        kind = fields.get("type")
        if kind not in (None, "enabled", "disabled", "auto", "adaptive"):
            raise RequestError(f"{name}.type must be enabled, disabled or auto", param=f"{name}.type")
        if kind in ("enabled", "disabled"):
            self.enabled.add(f"{name}.type", kind == "enabled")
        self.budget.add(f"{name}.budget_tokens", _budget(f"{name}.budget_tokens", fields.get("budget_tokens")))


def read_thinking(fields: dict[str, Any]) -> ThinkingSetting:
    """One setting out of all spellings in a request body.

    fields  the body's JSON object; only the names of the dial are looked at
    Raises RequestError if two spellings contradict each other. A budget of 0 is a way to say off;
    a budget beside an explicit off is taken as "if it thought", not as a contradiction.
    """
    dial = _Dial()
    dial.read(fields, "")
    enabled, budget = dial.enabled.value, dial.budget.value
    if budget == 0:
        dial.enabled.add(str(dial.budget.name), False)
        enabled = False
    if budget is not None and (budget <= 0 or enabled is False):
        budget = None
    split = dial.split.value
    mode: ReasoningMode = "inline" if split is None else "split" if split else "drop"
    return ThinkingSetting(enabled=enabled, budget=budget, mode=mode, mode_is_chosen=split is not None)
