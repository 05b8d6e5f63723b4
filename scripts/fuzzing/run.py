"""The loop of the fuzzer: draw, check, shrink what fails, and tell."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fuzzing.cases import Case, Refused, parse
from fuzzing.checks import check, symptom
from fuzzing.drawing import ENGINES, draw
from fuzzing.report import Tally
from fuzzing.shrink import shrink

PROGRESS_SECONDS = 10
# failures of one kind that are made smaller; further ones are only named
SHRUNK = 3


@dataclass
class Failure:
    """A case that is wrong, and the smallest one like it."""

    number: int
    case: Case
    complaint: str
    smallest: Case


@dataclass
class Run:
    """Some cases of a seed.

    Args:
        only: kinds or methods that are tried; all where none are given.
        say: is told of every failure and, now and then, how far things are.
    """

    seed: int
    only: Sequence[str] = ()
    engines: Sequence[str] = ENGINES
    say: Callable[[str], None] = print
    shrink_seconds: float = 20.0
    tally: Tally = field(default_factory=Tally)
    failures: list[Failure] = field(default_factory=list)

    def go(
        self, *, cases: int | None = None, seconds: float | None = None, failures: int | None = None
    ) -> None:
        """Try the first cases, or what there is time for, or until so many are wrong."""
        end = None if seconds is None else time.monotonic() + seconds
        told, done = time.monotonic(), 0
        for number in itertools.count():
            now = time.monotonic()
            if done == cases or end is not None and now > end or len(self.failures) == failures:
                return
            if now - told > PROGRESS_SECONDS:
                told = now
                self.say(f"{done:,} cases, {len(self.failures)} wrong, at number {number}")
            case = draw(self.seed, number, self.engines)
            if not self.only or case.kind in self.only or case.method in self.only:
                self.one(number, case)
                done += 1

    def one(self, number: int, case: Case) -> None:
        """Try one case."""
        complaint = None
        try:
            complaint = check(case)
        except Refused:
            self.tally.refused[case.kind] += 1
        self.tally.tried[case.kind] += 1
        self.tally.methods[case.method] += 1
        if complaint is None:
            return
        self.tally.wrong[case.kind] += 1
        kind, smallest = symptom(complaint), case
        if sum(symptom(x.complaint) == kind for x in self.failures) < SHRUNK:
            smallest = shrink(
                case, lambda x: symptom(complaint_of(x) or "") == kind, self.shrink_seconds
            )
        self.failures.append(Failure(number, case, complaint, smallest))
        self.say(self.describe(self.failures[-1]))

    def describe(self, failure: Failure) -> str:
        """What failed, the command that replays it, and the smallest case."""
        engines = "" if tuple(self.engines) == ENGINES else f" --engines {','.join(self.engines)}"
        lines = [
            f"WRONG {failure.number}: {failure.complaint}"[:300],
            f"  python scripts/fuzz.py --seed {self.seed} --case {failure.number}{engines}",
        ]
        if failure.smallest != failure.case:
            lines.append(f"  python scripts/fuzz.py --case '{failure.smallest}'")
        return "\n".join(lines)


def complaint_of(case: Case) -> str | None:
    """As ``check``; nothing is wrong with what is refused as documented."""
    try:
        return check(case)
    except Refused:
        return None


def replay(text: str, seed: int, engines: Sequence[str]) -> str | None:
    """What is wrong with a case, by its number or its description; says which case it is."""
    case = parse(text) if text.startswith("{") else draw(seed, int(text), engines)
    print(case, flush=True)
    return complaint_of(case)
