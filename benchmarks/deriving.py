"""What deriving saves and what it takes: live bytes, times against the ways that others have, exactness.

python benchmarks/deriving.py --device cpu --output FILE.json [--only PART ...] [--tiny]

Needs transformers beside PyTorch, and runs from a plain checkout. Three parts:

steps   Forward and backward of a BERT and a Llama without their heads, in turns in one run: stock, invact's default,
        `exact=True`, and PyTorch's checkpointing of each layer, once selective (it keeps what matrix products and
        attention give) and once full. Bytes: all that lives at the end of forward beside weights and inputs.
host    What the host pays: a BERT so small that a step is nothing but Python and dispatch, on one thread, and
        microseconds for each tensor kept and derived.
exact   Gradients against stock's: bit for bit with `exact=True`, relative errors otherwise.

Every part is written to FILE as it is done, and its figures are printed.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

sys.path.insert(0, str(Path(__file__).resolve().parent / "card"))
from checkout import make_importable
from record import Record

make_importable()
import invact  # noqa: E402 - of this checkout
from invact.deriving.handles import Derived, kept_by  # noqa: E402
from invact.deriving.hooks import Deriving  # noqa: E402
from invact.machine import installed_versions, machine  # noqa: E402
from invact.timing import Race, wait_for, wall_seconds  # noqa: E402

Model = tuple[nn.Module, dict[str, Tensor]]
"""A model in training mode, and what it is called with."""

STOCK, INVACT, EXACT, SELECTIVE, FULL, NOTHING = "stock", "invact", "exact", "selective", "full", "hooks of nothing"


def main() -> None:
    arguments = _arguments()
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    record = Record(arguments.output)
    if not arguments.only:
        record.path.unlink(missing_ok=True)
    record["machine"] = machine(device) | {"torch_threads": torch.get_num_threads()}
    record["versions"] = installed_versions()
    record["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    for part in arguments.only or PARTS:
        load = _load()
        start = time.perf_counter()
        found = PARTS[part](device, arguments.tiny, arguments.rounds)
        found["load_before"], found["load_after"] = load, _load()
        found["seconds_in_all"], found["tiny"] = time.perf_counter() - start, arguments.tiny
        record[part] = found


# --- steps -------------------------------------------------------------------------------------------


def steps(device: torch.device, tiny: bool, rounds: int | None) -> dict[str, Any]:
    """By model and way: median seconds, ratios to stock's in the same round, and live bytes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rounds = rounds or (2 if tiny else 15 if device.type == "cuda" else 5)
    found: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "rounds": rounds}
    for name, make in {"bert": _bert_of_steps, "llama": _llama_of_steps}.items():
        model, inputs = _on(device, dtype, partial(make, device, tiny))
        found[name] = _raced(model, inputs, rounds)
        _print_steps(name, found[name])
        del model
        _collect(device)
    return found


def _raced(model: nn.Module, inputs: dict[str, Tensor], rounds: int) -> dict[str, Any]:
    runners = {way: Runner(copy.deepcopy(model), inputs, change) for way, change in _WAYS_OF_STEPS.items()}
    found: dict[str, Any] = {"inputs": " x ".join(map(str, inputs["input_ids"].shape)) + " tokens"}
    stock: list[Tensor] = []
    for way, runner in runners.items():
        gradients = runner.gradients()  # also warms up
        stock = stock or gradients
        found[way] = {"live_bytes": runner.live_bytes(), "gradients_off": relative_error(gradients, stock)}
    del stock, gradients
    race = Race()
    race.run({way: runner.seconds for way, runner in runners.items()}, rounds)
    for way, runner in runners.items():
        found[way]["live_ratio"] = found[way]["live_bytes"] / found[STOCK]["live_bytes"]
        found[way] |= _times(race, way)
        if runner.peak_bytes:
            found[way]["peak_bytes"] = runner.peak_bytes
            found[way]["peak_ratio"] = runner.peak_bytes / runners[STOCK].peak_bytes
    return found


class Runner:
    """Takes steps, forward and backward, with a model that was changed to take them in some way.

    Args:
        change: changes the model, in place; see `_WAYS_OF_STEPS`.
        around: made anew and entered for every forward.

    Attributes:
        peak_bytes: on a GPU, of the last step: the most that was allocated beyond what was before it.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        change: Callable[[nn.Module, dict[str, Tensor]], object],
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model, self.inputs, self.around = model, inputs, around
        self.device = next(model.parameters()).device
        self.peak_bytes, self._allocated = 0, 0
        self._directions: Tensor | None = None
        change(model, inputs)

    def seconds(self) -> float:
        """Of one step."""
        seconds = wall_seconds(lambda _: self._loss().backward(), self._before, self.device)
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._allocated
        return seconds

    def gradients(self) -> list[Tensor]:
        """Those of one step, which are then no longer the model's."""
        self._before()
        self._loss().backward()
        found = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.model.zero_grad()
        return found

    def live_bytes(self) -> int:
        """What lives at the end of forward that did not before; on a GPU as its allocator counts."""
        self._before()
        gc.collect()
        if self.device.type == "cuda":
            loss = self._loss()
            return torch.cuda.memory_allocated(self.device) - self._allocated
        with LivingStorages() as living:
            loss = self._loss()
        gc.collect()
        found = living.nbytes()
        del loss
        return found

    def _loss(self) -> Tensor:
        """What the last layer gives, along random directions: its mean square says little, where a norm comes last."""
        with self.around():
            last: Tensor = self.model(**self.inputs).last_hidden_state
        if self._directions is None:
            generator = torch.Generator().manual_seed(0)
            self._directions = torch.randn(last.shape, generator=generator).to(last)
        return (last * self._directions).mean(dtype=torch.float32)

    def _before(self) -> None:
        torch.manual_seed(0)
        self.model.zero_grad()
        if self.device.type == "cuda":
            wait_for(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._allocated = torch.cuda.memory_allocated(self.device)


class LivingStorages(TorchDispatchMode):
    """Sees every tensor that is made inside it, whoever asks for it, and tells how much of them still lives.

    What was there before, such as a weight of which a view is taken, is told from what is new by an operator's inputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[
            int, tuple[StorageWeakRef, int]
        ] = {}  # a weak reference keeps its number from going to others
        self._before: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for reference, _ in _storages((args, kwargs)):
            if reference.cdata not in self._found:
                self._before.setdefault(reference.cdata, reference)
        out = func(*args, **(kwargs or {}))
        for reference, nbytes in _storages(out):
            if reference.cdata not in self._before:
                self._found.setdefault(reference.cdata, (reference, nbytes))
        return out

    def nbytes(self) -> int:
        return sum(nbytes for reference, nbytes in self._found.values() if not reference.expired())


def _storages(values: Any) -> Iterator[tuple[StorageWeakRef, int]]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            yield StorageWeakRef(storage), storage.nbytes()


def _as_it_is(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    pass


def _patched(model: nn.Module, inputs: dict[str, Tensor], exact: bool = False) -> None:
    invact.patch(model, inputs, exact=exact)


def _checkpointed(model: nn.Module, inputs: dict[str, Tensor], **settings: Any) -> None:
    """Every layer runs again in backward, as far as `settings`, those of PyTorch's `checkpoint`, do not keep it."""
    (layers,) = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, **settings)


_KEPT_BY_SELECTIVE = {
    overload
    for name in dir(torch.ops.aten)
    if name in ("mm", "addmm", "bmm") or name.startswith("_scaled_dot_product")
    for overload in [getattr(torch.ops.aten, name).default]
}


def _policy(_: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT_BY_SELECTIVE else CheckpointPolicy.PREFER_RECOMPUTE


_WAYS_OF_STEPS: dict[str, Callable[[nn.Module, dict[str, Tensor]], object]] = {
    STOCK: _as_it_is,
    INVACT: _patched,
    EXACT: partial(_patched, exact=True),
    SELECTIVE: partial(_checkpointed, context_fn=partial(create_selective_checkpoint_contexts, _policy)),
    FULL: _checkpointed,
}


# --- host --------------------------------------------------------------------------------------------


def host(device: torch.device, tiny: bool, rounds: int | None) -> dict[str, Any]:
    """A step that waits for nothing but the host, and what a tensor takes of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {"bert": _host_bound(device, tiny, rounds or (3 if tiny else 60))}
        found["microseconds"] = _microseconds(device, 20, rounds or (3 if tiny else 200))
    finally:
        torch.set_num_threads(threads)
    for way, times in found["bert"].items():
        if isinstance(times, dict):
            print(f"host  bert  {way:17} {1000 * times['seconds']:7.2f} ms  x {times['ratio']:.3f}", flush=True)
    for what, times in found["microseconds"].items():
        print(f"host  {what:40} forward {times['forward']:6.2f} us  backward {times['backward']:6.2f} us", flush=True)
    return found


def _host_bound(device: torch.device, tiny: bool, rounds: int) -> dict[str, Any]:
    layers = 2 if tiny else 12
    model, inputs = _on(device, torch.float32, lambda: _bert(layers=layers, width=64, heads=4, batch=1, tokens=8))
    # Its tensors have too few elements to be derived, but for those of the feed-forward layers.
    runners = {way: Runner(copy.deepcopy(model), inputs, change) for way, change in _WAYS_OF_HOST.items()}
    runners[NOTHING].around = _hooks_of_nothing
    for runner in runners.values():
        for _ in range(3):
            runner.gradients()
    race = Race()
    race.run({way: runner.seconds for way, runner in runners.items()}, rounds)
    return {"layers": layers, "inputs": "1 x 8 tokens", "rounds": rounds} | {way: _times(race, way) for way in runners}


_WAYS_OF_HOST: dict[str, Callable[[nn.Module, dict[str, Tensor]], object]] = {
    STOCK: _as_it_is,
    NOTHING: _as_it_is,
    INVACT: _patched,
    EXACT: partial(_patched, exact=True),
}


def _hooks_of_nothing() -> saved_tensors_hooks:
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _microseconds(device: torch.device, repeats: int, rounds: int) -> dict[str, dict[str, float]]:
    """Per tensor, above what stock takes for keeping it: packed in forward, unpacked in backward.

    The rows are short: on a busy machine one that takes longer than a time slice is seldom left alone.

    A row of products keeps two tensors for each; with an activation after each, a third, and one of the three is
    derived. What that takes is what the second row takes beyond the first, the operator that is run again included.
    """
    weight = torch.eye(32, device=device).requires_grad_()  # 1024 elements: as few as are derived
    start = torch.randn(32, 32, device=device)

    def row(activated: bool) -> Tensor:
        x = start
        for _ in range(repeats):
            x = x @ weight
            if activated:
                x = nn.functional.silu(x)
        return x @ weight

    with Deriving():
        last = row(True)
    assert isinstance(kept_by(last.grad_fn, "self"), Derived)
    del last

    def both(around: Callable[[], AbstractContextManager[object]], activated: bool) -> tuple[float, float]:
        """Microseconds of forward and of backward for each product."""
        wait_for(device)
        before = time.perf_counter()
        with around():
            loss = row(activated)
        middle = time.perf_counter()
        loss.backward(start)
        after = time.perf_counter()
        wait_for(device)
        weight.grad = None
        return 1e6 * (middle - before) / repeats, 1e6 * (after - middle) / repeats

    arounds = {STOCK: nullcontext, NOTHING: _hooks_of_nothing, "deriving": Deriving}
    times: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for number in range(rounds + 1):
        for name, around in arounds.items():
            for activated in (False, True):
                taken = both(around, activated)
                if number:  # the first one warms up
                    times.setdefault((name, activated), []).append(taken)

    def beyond(name: str, activated: bool, side: int) -> list[float]:
        pairs = zip(times[name, activated], times[STOCK, activated], strict=True)
        return [own[side] - stock[side] for own, stock in pairs]

    found: dict[str, dict[str, float]] = {"by hooks of nothing": {}, "kept": {}, "derived": {}}
    for side, direction in enumerate(("forward", "backward")):
        kept = statistics.median(beyond("deriving", False, side)) / 2
        found["by hooks of nothing"][direction] = statistics.median(beyond(NOTHING, False, side)) / 2
        found["kept"][direction] = kept
        found["derived"][direction] = statistics.median(beyond("deriving", True, side)) - 2 * kept
    return found


# --- exact -------------------------------------------------------------------------------------------


def exact(device: torch.device, tiny: bool, rounds: int | None) -> dict[str, Any]:
    """By model and precision: whether `exact=True` gives stock's gradients bit for bit, and how far the default is."""
    found: dict[str, Any] = {}
    makers: dict[str, Callable[[int], Model]] = {"bert": _bert, "llama": _llama, "gpt2": _gpt2, "t5 gated": _t5}
    for name, make in makers.items():
        for precision, (dtype, autocast) in _PRECISIONS.items():
            model, inputs = _on(device, dtype, partial(make, 1 if tiny else 2))
            found[f"{name} {precision}"] = each = _compared(model, inputs, autocast)
            own = "" if each["stock_repeats_itself"] else f"  (stock itself is {each['stock_off']:.1e} off)"
            bits = "bit for bit" if each["exact_bit_for_bit"] else f"{each['exact_off']:.1e} off"
            print(f"exact {name:9} {precision:9} exact {bits:12} invact {each['invact_off']:.1e} off{own}", flush=True)
    return found


_PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "autocast": (torch.float32, torch.bfloat16),
}


def _compared(model: nn.Module, inputs: dict[str, Tensor], autocast: torch.dtype | None) -> dict[str, Any]:
    device = next(model.parameters()).device

    def around() -> torch.autocast:
        return torch.autocast(device.type, autocast, enabled=autocast is not None)

    runner = Runner(model, inputs, _as_it_is, around)
    stock = runner.gradients()
    again = [runner.gradients() for _ in range(2)]
    found: dict[str, Any] = {
        "stock_repeats_itself": all(_bits_equal(gradients, stock) for gradients in again),
        "stock_off": max(relative_error(gradients, stock) for gradients in again),
    }
    for way in (EXACT, INVACT):
        report = invact.patch(model, inputs, autocast=autocast, exact=way == EXACT)
        gradients = runner.gradients()
        invact.unpatch(model)
        found[f"{way}_bit_for_bit"] = _bits_equal(gradients, stock)
        found[f"{way}_off"] = relative_error(gradients, stock)
        found[f"{way}_saving"] = report.saving
    return found


def _bits_equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Of all gradients as one vector."""
    pairs = list(zip(found, expected, strict=True))
    off = torch.stack([(a.float() - b.float()).norm() for a, b in pairs]).norm()
    return float(off / torch.stack([b.float().norm() for _, b in pairs]).norm())


# --- models: real classes with random weights -------------------------------------------------------


def _bert_of_steps(device: torch.device, tiny: bool) -> Model:
    if tiny:
        return _bert(batch=2, tokens=16, dropout=0.0)
    batch, tokens = (32, 512) if device.type == "cuda" else (8, 128)
    return _bert(layers=12, width=768, heads=12, vocabulary=30522, batch=batch, tokens=tokens, dropout=0.0)


def _llama_of_steps(device: torch.device, tiny: bool) -> Model:
    if tiny:
        return _llama(batch=2, tokens=16)
    if device.type == "cuda":
        return _llama(layers=4, width=4096, inner=14336, heads=32, groups=8, vocabulary=32000, batch=4, tokens=1024)
    return _llama(layers=4, width=768, inner=2048, heads=12, groups=12, vocabulary=32000, batch=4, tokens=256)


def _bert(
    layers: int = 2,
    width: int = 128,
    heads: int = 4,
    vocabulary: int = 256,
    batch: int = 2,
    tokens: int = 64,
    dropout: float = 0.1,
) -> Model:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertModel(config, add_pooling_layer=False), {"input_ids": _tokens(vocabulary, batch, tokens)}


def _llama(
    layers: int = 2,
    width: int = 128,
    inner: int = 352,
    heads: int = 4,
    groups: int = 2,
    vocabulary: int = 256,
    batch: int = 2,
    tokens: int = 64,
) -> Model:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        use_cache=False,
    )
    return LlamaModel(config), {"input_ids": _tokens(vocabulary, batch, tokens)}


def _gpt2(layers: int) -> Model:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        n_embd=128, n_layer=layers, n_head=4, vocab_size=256, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    return GPT2Model(config), {"input_ids": _tokens(256, 2, 64)}


def _t5(layers: int) -> Model:
    from transformers import T5Config, T5Model

    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": layers, "num_heads": 4, "vocab_size": 256}
    model = T5Model(T5Config(**sizes, feed_forward_proj="gated-gelu", use_cache=False))
    return model, {"input_ids": _tokens(256, 2, 64), "decoder_input_ids": _tokens(256, 2, 48)}


def _tokens(vocabulary: int, batch: int, tokens: int) -> Tensor:
    return torch.randint(0, vocabulary, (batch, tokens))


def _on(device: torch.device, dtype: torch.dtype, make: Callable[[], Model]) -> Model:
    torch.manual_seed(0)
    model, inputs = make()
    return model.to(device, dtype).train(), {name: value.to(device) for name, value in inputs.items()}


# --- figures -----------------------------------------------------------------------------------------


def _times(race: Race, way: str) -> dict[str, Any]:
    return {"seconds": race.median(way), "ratio": race.ratio(way), "quartiles": race.quartiles(way)}


def _print_steps(name: str, found: dict[str, Any]) -> None:
    for way in _WAYS_OF_STEPS:
        each = found[way]
        peak = f"  peak {each['peak_ratio'] - 1:+.1%}" if "peak_ratio" in each else ""
        print(
            f"steps {name:5} {way:9} {each['live_bytes'] / 2**20:8.1f} MiB {each['live_ratio'] - 1:+6.1%}{peak}"
            f"  {each['seconds']:7.3f} s  x {each['ratio']:.3f}  gradients {each['gradients_off']:.0e} off",
            flush=True,
        )


def _load() -> float | None:
    """How many processes want the processor, on average over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


PARTS: dict[str, Callable[[torch.device, bool, int | None], dict[str, Any]]] = {
    "steps": steps,
    "host": host,
    "exact": exact,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"{', '.join(PARTS)}; adds to FILE"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="of turns, in place of each part's own number")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch on the CPU; the part host has one")
    parser.add_argument("--tiny", action="store_true", help="as small as it runs, to see that it runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
