"""Where the time of each start of the workers went, from `events.jsonl`: from asking for them to their first step."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from raylway.runs.pace import CONTINUES, STARTED, Line, seconds_of

FIT, CONTROLLER, ASKED, ALIVE = "training asked for", "controller ready", "workers asked for", "workers alive"
WAITS = "too few workers"
"""There is room for fewer than the fewest that may start; then workers are not even asked for."""
GROUP, ASSEMBLED, FIRST_STEP = "group ready", "attempt assembled", "first step"
STAGES = {
    CONTROLLER: "controller",
    ASKED: "until workers are asked for",
    ALIVE: "placement and processes",
    GROUP: "torch and process group",
    STARTED: "imports, newest checkpoint",
    ASSEMBLED: "model, data, checkpoint",
    FIRST_STEP: "first step",
}
"""The event at which each stage ends, in their order. At a restart the second one begins with the last sign of the
attempt before."""


class Start(msgspec.Struct, frozen=True):
    """One attempt that got as far as a step."""

    attempt: int
    stages: dict[str, float]
    """Seconds by the stages' names; those that its events do not tell of are left out."""

    @property
    def total_s(self) -> float:
        return sum(self.stages.values())


def starts(events: Iterable[Line]) -> list[Start]:
    """Every start whose first step was made, oldest first."""
    found = []
    at: dict[str, float] = {}
    attempt, heard = 0, None
    for line in events:
        name = line["event"]
        if name == FIT or (name == ASKED and ASKED in at):
            at, heard = {}, None
        if name == FIT or name in STAGES:
            at[name] = seconds_of(line["time"])
        if name == STARTED:
            attempt = line["attempt"]
        if name == CONTINUES and line["heard_until"]:
            heard = seconds_of(line["heard_until"])
        if name == FIRST_STEP:
            found.append(Start(attempt, _stages(at, heard)))
            at = {ASKED: at.get(ASKED, 0.0)}
    return found


def _stages(at: dict[str, float], heard: float | None) -> dict[str, float]:
    before = at.get(FIT, heard)
    stages = {}
    for event, stage in STAGES.items():
        if event not in at:
            continue
        if before is not None:
            stages[stage] = max(0.0, at[event] - before)
        before = at[event]
    return stages
