"""The two kinds of failure that a user meets; everything else is our bug and keeps its traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can fix: printed once, by `cli`, without a traceback; exit code 2.

    Every argument goes to the base class, so the error survives pickling between Ray processes.

    Args:
        what: One sentence that says what is wrong.
        where: The file (and line), key, column or row.
        expected: What would have been right.
        found: What was there.
        fix: What to do now.
    """

    exit_code = 2

    def __init__(self, what: str, where: str = "", expected: str = "", found: str = "", fix: str = "") -> None:
        super().__init__(what, where, expected, found, fix)
        self.what, self.where, self.expected, self.found, self.fix = what, where, expected, found, fix

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        for label, text in (("expected", self.expected), ("found", self.found), ("fix", self.fix)):
            if text:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)


class RunFailed(Exception):
    """A run that ended without its result although the job is well formed (loss not finite, machines lost too often).

    Printed like a `UserError`, with exit code 1. Takes one message, so it survives pickling.
    """

    exit_code = 1
