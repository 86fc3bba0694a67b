"""Which operators have a rule that makes their output again, and how others register theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from invact.deriving.handles import Derived, Handle

Node = Any
Find = Callable[[Node, int], "Handle | None"]
Rule = Callable[[Node, int, Find], "Derived | None"]

RULES: dict[str, Rule] = {}
"""By the name of the operator's node in autograd's graph. Read for each tensor that is kept, so it is a plain dict."""

VIEWS: set[str] = set()
"""Those whose output is a view of what they read: they move nothing and cost nothing."""

SUMS: set[str] = set()
"""Those that add up two tensors, which are only made again where neither is made of another sum."""

ON_THE_WAY: set[str] = set()
"""Made again for another's sake alone: one that is kept itself stays, small as it is beside what it is read from."""


def register(*names: str, among: set[str] | None = None) -> Callable[[Rule], Rule]:
    """Registers a rule for operators, by the names of their nodes in autograd's graph, as `y.grad_fn.name()` has them.

    A rule is given the node of an operator, which of its outputs is asked for, and a function that finds what the
    node's producers gave. It returns a recipe, as `derived` makes it of PyTorch's own operator and of what the operator
    read, or None where that is not to be had. It is called in forward, whenever autograd is about to keep such an
    output or something made of it, and takes part in the next forward pass of models that are patched already.

    Args:
        names: of nodes. One that another rule is registered for must be taken out first.
        among: `VIEWS`, `SUMS` or `ON_THE_WAY`, if these operators are of that kind.

    Returns:
        A decorator, which returns the rule as it is.

    Raises:
        TypeError: a name is not a string, as where the parentheses after `@register` are missing; or a rule is no
            function.
        ValueError: one of the operators has a rule already, or there are no names. Then nothing is registered.

    Known limitations:
        - A rule is trusted. What it makes is not compared with what the operator gave, and a rule that is wrong gives
          wrong gradients without a word: compare every bit, for each dtype and layout, as `check` in
          tests/operator_checks.py does.
        - It sees what autograd records and no more: of an operator of PyTorch the settings and tensors of
          `derivatives.yaml`, of a `torch.autograd.Function` what its producers gave.
        - It holds for all models of the process; a plan or report that was made before does not know of it.
        - Where a rule returns None nothing is raised: the tensor is kept, as stock keeps it.
        - A report's floor may not know of it: which operators only move memory, beside those that PyTorch calls
          pointwise, is listed in `invact.ledger.operator_kinds`.

    Example:
        The entropy's node keeps what it read under the name "self", and may have got it from its first producer.

        >>> import torch
        >>> from invact.deriving import derived, operand, register, unregister
        >>> from invact.deriving.saved_by_node import kept_by
        >>> from invact.deriving.hooks import Deriving
        >>> def kept_of_an_entropy():
        ...     with Deriving():
        ...         entropy = torch.special.entr(torch.rand(64, 64, requires_grad=True))
        ...         square = entropy * entropy
        ...     return type(kept_by(square.grad_fn, "self")).__name__
        >>> kept_of_an_entropy()  # the tensor
        'Kept'
        >>> @register("SpecialEntrBackward0")
        ... def entropy(node, number, find):
        ...     return derived(torch.special.entr, operand(node, "self", 0, find))
        >>> kept_of_an_entropy()  # a recipe
        'Derived'
        >>> unregister("SpecialEntrBackward0")
        >>> kept_of_an_entropy()
        'Kept'
    """
    _check_names(names)

    def registered(rule: Rule) -> Rule:
        if not callable(rule):
            raise TypeError(
                f"A rule is a function of a node, and {rule!r} is none. Pass one, or what `pointwise(...)` makes of an "
                "operator."
            )
        if taken := [name for name in names if name in RULES]:
            raise ValueError(
                f"{taken[0]} has a rule already, from {RULES[taken[0]].__module__}, and can not have two. "
                f'To put yours in its place, call unregister("{taken[0]}") first.'
            )
        RULES.update(dict.fromkeys(names, rule))
        if among is not None:
            among.update(names)
        return rule

    return registered


def unregister(*names: str) -> None:
    """Takes the rules of operators out again: from the next forward pass on their outputs are kept, as stock does.

    A graph that holds recipes of theirs can still be run.

    Raises:
        TypeError: a name is not a string.
        ValueError: one of the operators has no rule, or there are no names. Then nothing is taken out.

    Example:
        >>> unregister("SpecialEntrBackward0")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: SpecialEntrBackward0 has no rule that could be taken out. Rules stand under ...
    """
    _check_names(names)
    if missing := [name for name in names if name not in RULES]:
        raise ValueError(
            f"{missing[0]} has no rule that could be taken out. Rules stand under the names of nodes, as "
            "y.grad_fn.name() has them: pass the name that was given to register."
        )
    for name in names:
        RULES.pop(name, None)
        for kind in (VIEWS, SUMS, ON_THE_WAY):
            kind.discard(name)


def _check_names(names: tuple[str, ...]) -> None:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"A rule stands under the name of a node, and {name!r} is no string. Pass the name as y.grad_fn.name() "
                'has it, for example @register("SiluBackward0").'
            )
    if not names:
        raise ValueError(
            "A rule stands under the name of a node, and none was given. Pass the name as y.grad_fn.name() has it, "
            'for example @register("SiluBackward0").'
        )
