"""The policies of streaming video, one file each; the file name is the registered name."""

from __future__ import annotations

from vidattn.catalog import list_policies
from vidattn.choice import parse_choice
from vidattn.streaming.policy import Policy
from vidattn.support.config import show_value
from vidattn.support.options import check_options, class_in
from vidattn.support.registry import unknown


def policy_class(name: str) -> type[Policy]:
    """The dataclass registered under a name.

    Raises:
        ValueError: no such policy; the nearest names are listed.
    """
    if name not in list_policies():
        raise unknown("policy", name, list_policies())
    return class_in(f"{__name__}.{name}", Policy)


def create_policy(name: str, **options: object) -> Policy:
    """A policy with its options set.

    Raises:
        ValueError: no such policy, no such option (the nearest are listed), or a bad value.
    """
    cls = policy_class(name)
    check_options(cls, cls.options(), options, f"policy {name!r}")
    return cls(**options)


def parse_policy(text: str) -> Policy:
    """A policy from the words of the command line, such as ``tempcache:cap=9000``.

    Raises:
        ValueError: as for ``create_policy``.
    """
    choice = parse_choice(text, "cache")
    return create_policy(choice.name, **choice.options)


def label(policy: Policy) -> str:
    """A policy with the options that differ from their defaults, as the command line reads it.

    >>> label(create_policy("rolling", window=21))
    'rolling:window=21'
    """
    package, _, name = type(policy).__module__.rpartition(".")
    options = [
        f"{option}={show_value(getattr(policy, option))}"
        for option, field in policy.options().items()
        if getattr(policy, option) != field.default
    ]
    name = name if package == __name__ else type(policy).__name__
    return ":".join([name, *([",".join(options)] if options else [])])
