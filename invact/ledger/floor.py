"""The floor: the bytes that remain when nothing is kept that could be made again by operators that only move memory.

It is the smallest number of bytes from which all that autograd kept can be had: a minimum cut between the roots, which
can not be made again, and what was kept. See `invact.ledger.operator_kinds` for which values are roots.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping

from invact.ledger.computed import Computed, Value
from invact.ledger.entries import Entry, Key
from invact.ledger.operator_kinds import RESIDUAL_SUMS

_UNMET = "other: unknown"

_AS_GOOD = 9 / 8
"""What is kept is as good as what it could be made of if that is not smaller by more than this: an inverted activation
keeps its output and a bit per element in its input's stead, attention its heads padded."""


def floor_bytes(computed: Computed, needed: Iterable[Entry]) -> int:
    """The fewest bytes from which all that a pass kept can be made again by operators that only move memory.

    A residual sum is made again only where both summands are at hand anyway, be it through another such sum.

    Args:
        computed: the record of the pass.
        needed: what autograd kept in it. What no operator was seen to make or to read counts as it is.

    Example:
        >>> import torch
        >>> from invact.ledger.ledger import Ledger
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
        >>> x = torch.ones(4, 8)
        >>> with Computed(model.parameters()) as computed, Ledger(model) as ledger:
        ...     y = model(x)
        >>> ledger.memory().total_bytes, floor_bytes(computed, ledger.entries())
        (384, 256)
    """
    values = computed.values
    numbers, unmet = _numbers(computed, needed)
    kept = _fewest(values, [value.nbytes for value in values], numbers)
    kept -= _spare(values, kept)
    return sum(unmet.values()) + sum(values[number].nbytes for number in kept)


def remains(computed: Computed, kept: Iterable[Entry]) -> dict[str, int]:
    """Bytes of what a pass with deriving in place kept, by what made it, the largest first.

    The kinds are those of `invact.ledger.operator_kinds`, such as "matrix products" or "residual sums". What only moved
    memory made counts to the kind of its largest root if it is kept in that root's stead, a cast of a product for
    example; it is under "other:" and the operator's name if it could have been made again from less.
    """
    numbers, unmet = _numbers(computed, kept)
    justified = _justified(computed.values, numbers)
    found = Counter({_UNMET: sum(unmet.values())} if unmet else {})
    for number, nbytes in numbers.items():
        value = computed.values[number]
        is_root = value.made_by is not None or number in justified
        found[_kind(value, computed.values) if is_root else f"other: {value.operator}"] += nbytes
    return dict(found.most_common())


def not_derived(computed: Computed, kept: Iterable[Entry], reasons: Mapping[Key, str] | None = None) -> dict[str, int]:
    """Bytes kept that could have been made again from less, by the plain name of the operator that made them.

    Args:
        reasons: by storage, why it was kept; it stands after the operator then: "clone: changed in place".
    """
    entries = list(kept)
    numbers, _ = _numbers(computed, entries)
    justified = _justified(computed.values, numbers)
    keys = {computed.number(entry.key): entry.key for entry in entries}
    found: Counter[str] = Counter()
    for number, nbytes in numbers.items():
        if number not in justified:
            why = (reasons or {}).get(keys[number], "")
            found[computed.values[number].operator + (why and f": {why}")] += nbytes
    return dict(found.most_common())


def _numbers(computed: Computed, entries: Iterable[Entry]) -> tuple[dict[int, int], dict[Key, int]]:
    """Bytes of each storage that is kept, by the number of its value, or by its key where no operator met it."""
    numbers: dict[int, int] = {}
    unmet: dict[Key, int] = {}
    for entry in entries:
        if entry.cast_of is not None and computed.is_weight(entry.cast_of):
            continue  # autocast's copies of weights are no activations; see `invact.ledger.entries.Memory`
        number = computed.number(entry.key)
        if number is None:
            unmet[entry.key] = entry.nbytes
        else:
            numbers[number] = entry.nbytes
    return numbers, unmet


def _justified(values: list[Value], kept: Collection[int]) -> set[int]:
    """Those of the kept values that could not be made again from what is noticeably less."""
    sizes = [value.nbytes if n in kept else int(value.nbytes * _AS_GOOD) for n, value in enumerate(values)]
    return _fewest(values, sizes, kept) - _spare(values, kept)


def _kind(value: Value, values: list[Value]) -> str:
    """The kind of root that a value is, or that the largest of its roots is."""
    if value.made_by is not None:
        return value.made_by
    largest = max(_bits(value.roots), key=lambda number: values[number].nbytes)
    return values[largest].made_by or ""


def _bits(number: int) -> Iterator[int]:
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


def _spare(values: list[Value], kept: Collection[int]) -> set[int]:
    """Those of the kept values that the others are enough for, also where these have to be added up.

    Every value is made of earlier ones, so all of them together can be let go.
    """
    spare: set[int] = set()
    at_hand: list[bool] = []
    for number, value in enumerate(values):
        is_made = value.made_by is None or (value.made_by == RESIDUAL_SUMS and bool(value.reads))
        is_made = is_made and all(at_hand[read] for read in value.reads)
        at_hand.append(is_made or number in kept)
        if is_made and number in kept:
            spare.add(number)
    return spare


# --- a minimum cut ------------------------------------------------------------------------------------


def _fewest(values: list[Value], sizes: list[int], wanted: Collection[int]) -> set[int]:
    """The values of the smallest size from which the wanted ones are made; of equals, those nearest to the wanted."""
    flow = _Flow(values, sizes)
    for number in wanted:
        flow.fill(number)
    return flow.cut()


class _Flow:
    """The largest flow from wanted values down to their roots: through each value as much as its size.

    Each value is two nodes, where flow enters and where it leaves to what the value is made of: 2n and 2n + 1.
    """

    def __init__(self, values: list[Value], sizes: list[int]) -> None:
        self._values = values
        self._sizes = sizes
        self._through: Counter[int] = Counter()  # flow within each value
        self._from: dict[int, Counter[int]] = defaultdict(Counter)  # flow to a value, by the value it comes from
        self._closed: set[int] = set()  # nodes from which no more flow gets to a root, now or later

    def fill(self, number: int) -> None:
        """Sends what flow there can be from one wanted value (Edmonds and Karp)."""
        while self._values[number].roots and 2 * number not in self._closed:
            came_from, end = self._search(2 * number)
            if end is None:
                self._closed.update(came_from)
            else:
                self._send(came_from, end)

    def cut(self) -> set[int]:
        """The values that are full: flow that enters them can not leave."""
        return {node // 2 for node in self._closed if node % 2 == 0 and node + 1 not in self._closed}

    def _search(self, start: int) -> tuple[dict[int, int], int | None]:
        """From where each node was first reached, and the root's that was reached; None if none was."""
        came_from = {start: start}
        waiting = deque([start])
        while waiting:
            node = waiting.popleft()
            for following in self._following(node):
                if following not in came_from and following not in self._closed:
                    came_from[following] = node
                    if following % 2 and self._values[following // 2].made_by is not None:
                        return came_from, following
                    waiting.append(following)
        return came_from, None

    def _following(self, node: int) -> Iterator[int]:
        """The nodes to which more flow could go, or from which less could come."""
        number, leaving = divmod(node, 2)
        if leaving:
            yield from (2 * read for read in self._values[number].reads)
            if self._through[number]:
                yield 2 * number
        else:
            if self._through[number] < self._sizes[number]:
                yield 2 * number + 1
            yield from (2 * other + 1 for other, flow in self._from[number].items() if flow)

    def _send(self, came_from: dict[int, int], end: int) -> None:
        path = [end]
        while came_from[path[-1]] != path[-1]:
            path.append(came_from[path[-1]])
        steps = list(zip(path[:0:-1], path[-2::-1], strict=True))
        amount = min(room for step in steps if (room := self._room(*step)) is not None)
        for node, following in steps:
            number, other = node // 2, following // 2
            if number == other:
                self._through[number] += amount if following % 2 else -amount
            elif node % 2:
                self._from[other][number] += amount
            else:
                self._from[number][other] -= amount

    def _room(self, node: int, following: int) -> int | None:
        """How much flow may be added from one node to another; None if any."""
        number, other = node // 2, following // 2
        if number == other:
            through = self._through[number]
            return self._sizes[number] - through if following % 2 else through
        return None if node % 2 else self._from[number][other]
