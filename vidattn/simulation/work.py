"""The work of attention under a plan, and what it lets one hope for."""

from __future__ import annotations

from vidattn.plan import AnyPlan


def visited_share(plan: AnyPlan) -> float:
    """Pairs an engine computes over all pairs of the sequence, text included."""
    video, total = plan.grid.num_video_tokens**2, plan.grid.num_tokens**2
    return (plan.visited_density * video + total - video) / total


def speedup_bound(plan: AnyPlan, attention_share: float = 1.0) -> float:
    """The most a plan can speed up a run whose dense attention takes a share of the time.

    It assumes sparse attention as fast per pair as dense attention, so no measurement beats it by
    much; with the default share it is about attention alone.

    Raises:
        ValueError: a share outside (0, 1].
    """
    if not 0 < attention_share <= 1:
        raise ValueError(f"attention_share must be above 0 and at most 1, got {attention_share}")
    return 1 / (1 - attention_share + attention_share * visited_share(plan))
