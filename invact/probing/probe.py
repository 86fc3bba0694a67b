"""One forward pass of a model under the ledger, on fake tensors where possible, that leaves no trace."""

from __future__ import annotations

import contextvars
import functools
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from invact import probing
from invact.deriving.derived_tensor import DerivedTensor
from invact.deriving.hooks import Deriving
from invact.deriving.journal import Journal
from invact.errors.arguments import (
    Inputs,
    check_autocast,
    check_inputs,
    check_model,
    check_trainable_here,
    device_of,
)
from invact.errors.own_errors import raised_by_invact, users_call
from invact.ledger.computed import Computed
from invact.ledger.ledger import Entry, Key, Ledger, Memory, dense_parts, storage_sizes
from invact.ledger.own_loss import OwnLoss, own_loss
from invact.patchers import as_on_real_tensors
from invact.pytorch.inside import FakeTensorMode, changes_in_place, transforms_active, tree_map_only
from invact.recognition.found import Found
from invact.recognition.norms import FoundNorm
from invact.recognition.rewriting import Runner, Written
from invact.simulation.leftovers import check_no_leftovers, references_to
from invact.simulation.simulation import (
    AsOnGpu,
    Setting,
    Simulation,
    autocast_as_set,
    autocast_here,
    checkpoints_counted,
    fake_tensor_log_silent,
    hooks_standing_aside,
    stand_in,
)
from invact.simulation.time_limit import TimeLimit, TookTooLongError
from invact.snapshot.snapshot import as_it_was
from invact.swapping.swaps import swap_in

_NO_HOOKS: Mapping[str, bool] = types.MappingProxyType({})

# A probe swaps a model's parameters for fake ones and back: one at a time in a process.
ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class Call:
    """One call of a watched module during the forward pass."""

    path: str
    simple: bool  # one floating tensor in, one of the same shape and device out
    needs_grad: bool
    y_key: Key
    y_nbytes: int  # of the output as inversion would make it: dense, in the dtype of the input
    y_cast: bool  # the module's own output has another dtype than its input
    dtype: torch.dtype  # of the input
    bit_nbytes: int  # of one bit per element
    changed_later: bool
    input_changed_later: bool
    input_contiguous: bool
    in_place: bool  # the output is the input, changed
    hooked: bool  # a hook changes the output, or gives another
    elsewhere: bool  # in another thread than the probe's


@dataclass(frozen=True)
class Stock:
    """What stock PyTorch would have kept in the same pass."""

    entries: list[Entry]
    memory: Memory


@dataclass
class Observation:
    """What one forward pass kept for backward."""

    entries: list[Entry]
    memory: Memory
    calls: list[Call]
    labels: dict[str, str]  # class names, or expressions, by path
    checkpoints: int = 0
    without_hooks: int = 0  # how often the model entered torch.func or the like, where no hooks may be
    computed: Computed | None = None  # what made what, if that was asked for
    stock: Stock | None = None  # without what is derived, if that was asked for
    derived: list[DerivedTensor] = field(default_factory=list)
    loss: OwnLoss | None = None  # if the forward gave one
    why_kept: dict[Key, str] = field(default_factory=dict)  # and why what is kept is not
    read: set[Key] = field(default_factory=set)  # the storages that derived tensors are made again from
    notes: list[str] = field(default_factory=list)


def activation_memory(model: nn.Module, example_inputs: Inputs, *, autocast: torch.dtype | None = None) -> Memory:
    """What autograd keeps for backward in one training forward pass of `model`, by module and by class.

    The pass runs on fake tensors and leaves the model as it was; see `observe`.

    Args:
        model: counted in the mode in which it is, training or evaluation, on the device where it is.
        example_inputs: a dict is passed as keyword arguments, a tuple as positional ones.
        autocast: the dtype of torch.autocast in training, or None: as it is where this is called.

    Raises:
        TypeError: the model is no module or the inputs are neither dict nor tuple.
        ValueError: the model can not be trained as it is here; see `invact.plan`.
        TimeoutError: the pass takes longer than `invact.probing.TIME_LIMIT`.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> activation_memory(model, (torch.randn(8, 64),)).by_class
        {'Linear': 10240, 'GELU': 8192}
    """
    check_model(model)
    check_trainable_here(model)
    check_inputs(example_inputs)
    check_autocast(autocast)
    device = device_of(model)
    return observe(model, example_inputs, Setting(device, autocast or autocast_here(device))).memory


def observe(
    model: nn.Module,
    inputs: Inputs,
    setting: Setting,
    *,
    watch: Sequence[Found | FoundNorm] = (),
    checkpointing: bool = True,
    computed: bool = False,
    derived: bool = False,
    derives: Mapping[str, bool] = _NO_HOOKS,
) -> Observation:
    """Runs `model` forward once, in the mode in which it is, and reports what autograd kept.

    The pass runs on fake tensors. Where the model cannot (it branches on values, say) one real pass at the
    smallest batch takes its place, with a note. Whatever can be reached from the model is afterwards what it was;
    see `invact.snapshot.snapshot`.

    Args:
        watch: the sites and norms whose calls are to be recorded.
        checkpointing: False runs checkpointed regions as if they were not.
        computed: whether to record what made what, for the floor.
        derived: whether to record what is derived, of a model in which hooks are set for that.
        derives: where hooks are to be set for the length of the pass; see `invact.deriving.placing`.

    Raises:
        TimeoutError: a forward pass takes longer than `invact.probing.TIME_LIMIT`.
        LeftoverError: something holds on to simulated tensors.
        Exception: the model's own, if it fails in its forward with these inputs on real tensors as well.
    """
    probe = _Probe(model, inputs, setting, watch, checkpointing, computed, derived, derives)
    with ONE_AT_A_TIME:
        mode = Simulation(setting)
        at_first = references_to(mode)
        found = probe.on_simulated_tensors(mode)
        if isinstance(found, str):
            why, found = found, probe.on_real_tensors()
            found.notes.append(
                f"counted in one real forward pass at the smallest batch, since the model does not run on fake tensors "
                f"({why})"
            )
        if references_to(mode) > at_first:
            check_no_leftovers(mode)
        return found


@dataclass(frozen=True)
class _Probe:
    """One forward pass of a model; the arguments are those of `observe`."""

    model: nn.Module
    inputs: Inputs
    setting: Setting
    watch: Sequence[Found | FoundNorm]
    checkpointing: bool
    computed: bool
    derived: bool
    derives: Mapping[str, bool]

    def on_simulated_tensors(self, mode: Simulation) -> Observation | str:
        """What was kept, or why the model does not run so."""
        device = stand_in(self.setting.device)
        try:
            with (
                as_on_real_tensors(self.inputs),
                simulated(self.model, self.inputs, self.setting, mode) as (weights, inputs),
            ):
                as_on_gpu = AsOnGpu(self.setting) if self.setting.device.type == "cuda" else nullcontext()
                with as_on_gpu, fake_tensor_log_silent():
                    found = self._run(weights, inputs, mode.limited(probing.TIME_LIMIT))
        except Exception as error:
            if _ends_the_probe(error):
                raise
            if any(p.is_meta for p in self.model.parameters()):  # there are no numbers to run it on
                raise _with_inputs_named(error, self.inputs) from None
            return f"{type(error).__name__}: {str(error).strip()[:120]}"
        if device.type != self.setting.device.type and self.setting.autocast is not None:
            found.notes.append(
                "this PyTorch cannot imitate a GPU where there is none, so autocast followed the rules of the CPU, "
                "which leave more operations in low precision; PyTorch 2.15 can"
            )
        return found

    def on_real_tensors(self) -> Observation:
        """What was kept by the first example alone, or by all where the model does not run on one."""
        try:
            return self._run_real(_smallest_batch(self.inputs))
        except Exception as error:  # batch norm wants more than one value, some models fixed batches
            if _ends_the_probe(error):
                raise
        try:
            return self._run_real(self.inputs)
        except Exception as error:
            if _ends_the_probe(error):
                raise
            raise _with_inputs_named(error, self.inputs) from None

    def _run_real(self, inputs: Inputs) -> Observation:
        with as_it_was(self.model, self.inputs, tensors=True):
            return self._run(_weights(self.model), inputs, TimeLimit(probing.TIME_LIMIT))

    def _run(self, weights: dict[str, Tensor], inputs: Any, time_limit: AbstractContextManager[Any]) -> Observation:
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        calls: list[_OpenCall] = []
        checkpoints, without_hooks = [0], [0]
        ledger = Ledger(self.model, weights.values())
        computed = Computed(weights.values()) if self.computed else None
        journal = Journal(ledger) if self.derived else None
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # the ledger sees no compiled operation
            stack.enter_context(checkpoints_counted(checkpoints, run_them=self.checkpointing))
            stack.enter_context(hooks_standing_aside(packs_for_us, without_hooks))
            stack.enter_context(autocast_as_set(self.setting))
            stack.enter_context(_recorded(self.model, self.watch, ledger, calls, self.derives))
            stack.enter_context(time_limit)
            with computed or nullcontext(), ledger, journal.open() if journal else nullcontext():
                # In a context of its own: what forward sets context variables to ends with it.
                call = contextvars.copy_context().run
                output = users_call(call, torch.func.functional_call, self.model, weights, args, kwargs)
            entries = ledger.entries()
            found = Observation(
                entries=entries,
                memory=ledger.memory(),
                calls=[call.closed() for call in calls],
                labels={entry.path: ledger.label(entry.path) for entry in entries},
                checkpoints=checkpoints[0],
                without_hooks=without_hooks[0],
                computed=computed,
                loss=own_loss(output),
            )
            if journal is not None:
                stock = journal.stock_entries()
                found.stock = Stock(stock, ledger.memory(stock))
                found.labels |= {entry.path: ledger.label(entry.path) for entry in stock}
                found.derived, found.why_kept, found.read = journal.derived(), journal.why_kept(), journal.read()
            if ledger.of_other_threads:
                path = min(ledger.of_other_threads)
                found.notes.append(f"{path!r} runs in another thread: what is kept there is not counted.")
            del output
        return found


@contextmanager
def simulated(
    model: nn.Module, inputs: Inputs, setting: Setting, mode: FakeTensorMode
) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """The model's weights and the inputs as simulated tensors; after the block the model is what it was."""
    device, moved = stand_in(setting.device), setting.device != device_of(model)
    with as_it_was(model, inputs), mode:
        weights = {name: _fake(mode, tensor, device, moved) for name, tensor in _weights(model).items()}
        yield weights, tree_map_only(Tensor, lambda tensor: _fake(mode, tensor, device, moved), inputs)


def packs_for_us(pack: Any) -> bool:
    return isinstance(getattr(pack, "__self__", None), Ledger | Deriving)


def _fake(mode: FakeTensorMode, tensor: Tensor, device: torch.device, moved: bool) -> Tensor:
    """A simulated tensor on `device`, or, of a model that is planned for where it is, where it is."""
    if not moved and not tensor.is_meta:
        device = tensor.device
    fake: Tensor
    if tensor.device == device:
        fake = users_call(mode.from_tensor, tensor)
    else:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    # A parameter among simulated tensors as well: what is made of parameters is not derived as other tensors are.
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, tensor.requires_grad)
    return fake.detach().requires_grad_(tensor.requires_grad)


def _ends_the_probe(error: Exception) -> bool:
    """Whether to run the model in another way would not help: a fault of ours, out of time, out of memory."""
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    return out_of_memory or isinstance(error, TookTooLongError) or raised_by_invact(error)


def _with_inputs_named(error: Exception, inputs: Inputs) -> Exception:
    """The model's own error, told with what the model was given (before Python 3.11, the error alone)."""
    if hasattr(error, "add_note"):
        given = tree_map_only(Tensor, lambda t: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}", inputs)
        error.add_note(
            f"invact ran the model's forward on example inputs {given} to see what it keeps for backward, and the "
            "forward failed; what it had changed was put back. Pass example_inputs with which the model runs."
        )
    return error


@dataclass
class _OpenCall:
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
            nothing = (False, 0, 0, False, torch.float32, 0, False, False, False, False, False)
            return Call(self.path, self.simple, *nothing, self.elsewhere)
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
            bit_nbytes=-(-numel // 8),
            changed_later=changes_in_place(self.y) != self.version,
            input_changed_later=changes_in_place(self.x) != self.version_of_input,
            input_contiguous=self.x.is_contiguous(),
            in_place=self.in_place,
            hooked=self.hooked,
            elsewhere=self.elsewhere,
        )


@contextmanager
def _recorded(
    model: nn.Module,
    watch: Sequence[Found | FoundNorm],
    ledger: Ledger,
    calls: list[_OpenCall],
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


def _record_calls(module: nn.Module, path: str, ledger: Ledger, calls: list[_OpenCall], stack: ExitStack) -> None:
    """Looks at the output as forward gives it, before any hook, one for all modules included, and after the last."""
    running: list[tuple[_OpenCall, Any]] = []  # calls that hooks are still to see
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
    calls: list[_OpenCall]

    def __call__(self, module: nn.Module, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with self.ledger.named(self.site.path, self.site.label):
            y = users_call(original, x)
        self.calls.append(_opened(self.site.path, (x,), y, self.ledger))
        return y


def _opened(path: str, args: tuple[Any, ...], output: Any, ledger: Ledger) -> _OpenCall:
    elsewhere = not ledger.is_here()
    if transforms_active() or not (len(args) == 1 and _is_plain(args[0]) and _is_plain(output)):
        return _OpenCall(path, simple=False, elsewhere=elsewhere)
    x, y = args[0], output
    return _OpenCall(
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


# --- the model, untouched -----------------------------------------------------------------------------


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _smallest_batch(inputs: Any) -> Any:
    """The first example alone, of every tensor that has the batch as its first dimension."""
    sizes: list[int] = []
    tree_map_only(Tensor, lambda tensor: sizes.append(tensor.shape[0] if tensor.dim() else 0), inputs)
    batch = sizes[0] if sizes else 0
    return tree_map_only(
        Tensor, lambda tensor: tensor[:1] if tensor.dim() and tensor.shape[0] == batch else tensor, inputs
    )
