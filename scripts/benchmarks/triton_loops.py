"""Whether the loops of a Triton kernel load ahead of what they compute.

Read off its intermediate code for a GPU (TTGIR): the machine code no longer says which wait is for
which copy.
"""

from __future__ import annotations

import re

# what multiplies tiles, in the intermediate code of a GPU
PRODUCT = re.compile(r" (tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ")


def turns_ahead(ttgir: str) -> list[int]:
    """Of every innermost loop with products: how many turns before its wait a tile is copied.

    0 is a loop that waits for its own copies or has none: nothing is loaded while it computes.
    """
    lines, found = ttgir.splitlines(), []
    for begin, line in enumerate(lines):
        if " scf.for " not in line:
            continue
        closing = line[: len(line) - len(line.lstrip())] + "}"
        end = next(i for i in range(begin, len(lines)) if lines[i].startswith(closing))
        body = lines[begin + 1 : end]
        if any(PRODUCT.search(x) for x in body) and not any(" scf.for " in x for x in body):
            found.append(_turns_ahead(line, body))
    return found


def _turns_ahead(head: str, body: list[str]) -> int:
    """Of one loop: the fewest, over the waits for tiles and for whatever is copied in that turn."""
    carried = re.findall(r"(%\w+) = ", head.partition("iter_args(")[2])
    passed_on = re.findall(r"%[\w#]+", body[-1].partition(" : ")[0])
    copies, tiles, turns = set(), set(), []
    for line in body:
        name, _, operation = line.strip().partition(" = ")
        tokens = re.findall(r"%\w+", re.split(r"[{:]", operation)[0])
        if "async_copy_global_to_local" in operation:
            copies |= {name} if re.search(r"tensor<\d+x\d+x!", operation) else set()
        elif "async_commit_group" in operation:
            tiles |= {name} if copies & set(tokens) else set()
    for line in body:
        waited = re.findall(r"%\w+", line.partition("async_wait")[2].partition("{")[0])
        for token in waited:
            count = 0
            while token in carried and count < len(carried):
                token, count = passed_on[carried.index(token)], count + 1
            if token in tiles or count == 0:
                turns.append(count)
    return min(turns, default=0)
