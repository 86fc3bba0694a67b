"""How the calls of watched sites are recorded during a probe's pass, past hooks and changes in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from invact.errors.own_errors import users_call
from invact.ledger.ledger import Ledger
from invact.ledger.storages import dense_parts, storage_sizes
from invact.probing.records import Call
from invact.pytorch.circumstances import transforms_active
from invact.pytorch.tensors import changes_in_place
from invact.recognition.found_site import Found
from invact.recognition.norms_in_steps import FoundNorm
from invact.recognition.rewriting import Runner
from invact.recognition.written_expression import Written
from invact.swapping.swaps import swap_in


@dataclass
class OpenCall:
    """A call whose output may still be changed in place."""

    path: str
    simple: bool
    x: Tensor | None = None
    y: Tensor | None = None
    needs_grad: bool = False
    version: int = 0
    version_of_input: int = 0
    in_place: bool = False
    hooked: bool = False
    elsewhere: bool = False

    def closed(self) -> Call:
        """The call as it turned out."""
        if self.x is None or self.y is None:
            return Call(self.path, self.simple, elsewhere=self.elsewhere)
        ((key, nbytes),) = storage_sizes(self.y).items()
        numel = sum(part.numel() for part in dense_parts(self.x))  # of a DTensor, what is here
        return Call(
            path=self.path,
            simple=self.simple,
            needs_grad=self.needs_grad,
            y_key=key,
            y_nbytes=nbytes if self.in_place else numel * self.x.element_size(),
            y_cast=self.x.dtype is not self.y.dtype,
            dtype=self.x.dtype,
            numel=numel,
            bit_nbytes=-(-numel // 8),
            changed_later=changes_in_place(self.y) != self.version,
            input_changed_later=changes_in_place(self.x) != self.version_of_input,
            input_contiguous=self.x.is_contiguous(),
            in_place=self.in_place,
            hooked=self.hooked,
            elsewhere=self.elsewhere,
        )


@contextmanager
def recorded(
    model: nn.Module,
    watch: Sequence[Found | FoundNorm],
    ledger: Ledger,
    calls: list[OpenCall],
    derives: Mapping[str, bool],
) -> Iterator[None]:
    """Adds to `calls` every call of a watched site; hooks are set over that, or there were no method to rewrite."""
    by_module: dict[str, dict[Written, Runner]] = {}
    for site in watch:
        if site.written is not None:
            by_module.setdefault(site.module_path, {})[site.written] = _Recorder(site, ledger, calls)
    swaps = swap_in(model, {}, by_module, derives)
    try:
        with ExitStack() as stack:
            for site in watch:
                if site.written is None:
                    _record_calls(model.get_submodule(site.path), site.path, ledger, calls, stack)
            yield
    finally:
        swaps.undo()


def _record_calls(module: nn.Module, path: str, ledger: Ledger, calls: list[OpenCall], stack: ExitStack) -> None:
    """Looks at the output as forward gives it, before any hook, one for all modules included, and after the last."""
    running: list[tuple[OpenCall, Any]] = []  # calls that hooks are still to see
    stock = module.forward

    @functools.wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with ledger.named(path, type(module).__name__):  # no hook tells of a forward that is called by its name
            output = users_call(stock, *args, **kwargs)
        call = _opened(path, args if not kwargs else (), output, ledger)
        calls.append(call)
        running.append((call, output))
        return output

    def after_hooks(module: nn.Module, args: Any, output: Any) -> None:
        call, raw = running.pop()
        call.hooked = output is not raw or (call.y is not None and changes_in_place(call.y) != call.version)

    own = vars(module)
    was_there = "forward" in own
    object.__setattr__(module, "forward", forward)  # past a `__setattr__` of the user's
    stack.callback(own.__setitem__ if was_there else own.pop, "forward", stock)
    stack.callback(module.register_forward_hook(after_hooks).remove)


@dataclass(frozen=True, eq=False)
class _Recorder:
    """Runs an expression as it stands, and notes it as a call."""

    site: Found
    ledger: Ledger
    calls: list[OpenCall]

    def __call__(self, module: nn.Module, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with self.ledger.named(self.site.path, self.site.label):
            y = users_call(original, x)
        self.calls.append(_opened(self.site.path, (x,), y, self.ledger))
        return y


def _opened(path: str, args: tuple[Any, ...], output: Any, ledger: Ledger) -> OpenCall:
    """A call that has just ended, with what it read and gave where that is one plain tensor each."""
    elsewhere = not ledger.is_here()
    if transforms_active() or not (len(args) == 1 and _is_plain(args[0]) and _is_plain(output)):
        return OpenCall(path, simple=False, elsewhere=elsewhere)
    x, y = args[0], output
    return OpenCall(
        path,
        simple=x.shape == y.shape and x.device == y.device,
        x=x.detach(),
        y=y.detach(),  # not y: its graph must be free to go if the model drops this branch
        needs_grad=y.requires_grad,
        version=changes_in_place(y),
        version_of_input=changes_in_place(x),
        in_place=y is x,
        elsewhere=elsewhere,
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and value.is_floating_point()
