"""The policies of one stream: what is kept of the past, and what is read of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vidattn.cache import label, parse_policy
from vidattn.streaming.policy import CachePolicy, Policy, QueryPolicy, TextPolicy

# what a policy of each kind decides
DECIDES = {
    "cache": "what the cache keeps",
    "queries": "what of it a query reads",
    "text": "which words are read",
}
Given = str | Policy | Sequence[str | Policy] | None


@dataclass(frozen=True)
class Policies:
    """What makes a stream cheaper.

    Args:
        cache: what is kept of the past.
        queries: what of the cache a query reads; None for all.
        text: which words of the prompt are read; None for all.
    """

    cache: CachePolicy
    queries: QueryPolicy | None = None
    text: TextPolicy | None = None

    @property
    def label(self) -> str:
        """The policies in the words of the command line."""
        given = (self.cache, self.queries, self.text)
        return "+".join(label(policy) for policy in given if policy is not None)


def find_policies(given: Given, usual: str) -> Policies:
    """The policies that are given, in words or themselves.

    Args:
        given: one, or several of different kinds; words may have several with a + between them.
        usual: those of kinds of which none is given.

    Raises:
        ValueError: an unknown policy or option, or two policies of one kind.
    """
    found: dict[str, Any] = {}
    for policy in _listed(given):
        if policy.kind in found:
            raise ValueError(
                f"{label(found[policy.kind])} and {label(policy)} exclude each other: both decide "
                f"{DECIDES[policy.kind]}"
            )
        found[policy.kind] = policy
    for policy in _listed(usual):
        found.setdefault(policy.kind, policy)
    return Policies(**found)


def _listed(given: Given) -> list[Policy]:
    """The policies in words, or in a sequence."""
    if given is None:
        return []
    if isinstance(given, str):
        return [parse_policy(words) for words in given.split("+")]
    if isinstance(given, Policy):
        return [given]
    if not isinstance(given, Sequence):
        raise ValueError(f"a policy is given by its name or itself, got {given!r}")
    return [policy for one in given for policy in _listed(one)]
