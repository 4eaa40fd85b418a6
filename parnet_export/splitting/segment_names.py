"""Name segments by their place in the stream graph, never by the network they come from.

========== ==========================================================================
trunk      the only segment
stem       several segments read it, one of them nothing else, and all that
           comes before it are stems
fusion     joins several segments, and others read it
head       nobody reads it: it provides outputs of the network
stream     any other
========== ==========================================================================

Where there are several of a kind they are numbered from 1.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def name_segments(
    predecessors: Sequence[frozenset[int]], first_outputs: Sequence[int]
) -> tuple[str, ...]:
    """Return a name for each segment.

    Parameters
    ----------
    predecessors
        For each segment, in a topological order, the indices of those it reads from.
    first_outputs
        For each segment the place of its first output among the outputs of the
        network. Heads are numbered by it, all others in the given order.
    """
    count = len(predecessors)
    if count == 1:
        return ("trunk",)
    successors = [
        frozenset(later for later in range(count) if index in predecessors[later])
        for index in range(count)
    ]
    kinds: list[str] = []
    for index, before in enumerate(predecessors):
        after = successors[index]
        starts_something = any(predecessors[later] == {index} for later in after)
        if not after:
            kinds.append("head")
        elif len(after) > 1 and starts_something and all(kinds[b] == "stem" for b in before):
            kinds.append("stem")
        else:
            kinds.append("fusion" if len(before) > 1 else "stream")
    total, used = Counter(kinds), Counter[str]()
    names = [""] * count
    for index in sorted(range(count), key=lambda i: first_outputs[i] if kinds[i] == "head" else i):
        kind = kinds[index]
        used[kind] += 1
        names[index] = kind if total[kind] == 1 else f"{kind}{used[kind]}"
    return tuple(names)
