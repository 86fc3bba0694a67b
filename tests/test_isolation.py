"""Planning and patching change nothing outside the model, and threads do not disturb each other."""

import contextlib
import gc
import logging
import os
import random
import signal
import sys
import threading
import time
import types
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as nn_module
from torch.utils.checkpoint import checkpoint

import invact
from invact.errors.checks import check_shapes_known
from invact.ledger.kept_storages import KeptStorages
from invact.planning.plans import decide_for_device
from invact.pytorch.checkpointing import checkpoint_generator
from invact.simulation.as_on_gpu import AsOnGpu
from invact.simulation.checkpointed_regions import checkpoints_counted
from invact.simulation.setting import Setting
from invact.simulation.simulated_tensors import fake_tensor_log_silent


class Attends(nn.Module):
    """Checkpointed, with attention and dropout: all that a probe steps in for."""

    def __init__(self, width=32, reentrant=False, waits=0.0):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.act, self.drop, self.down = (
            nn.Linear(width, 64),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(64, width),
        )
        self.reentrant, self.waits = reentrant, waits

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        time.sleep(self.waits)
        random.random(), numpy.random.random()  # as layers that drop at random may draw
        return self.feed(checkpoint(self.feed, x, use_reentrant=self.reentrant))

    def feed(self, x):
        return self.down(self.drop(self.act(self.up(x)))) + F.silu(x)


def library_functions():
    """Every function and class that a loaded module of a library holds, by where it stands."""
    libraries = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] in ("torch", "transformers")]
    kinds = (types.FunctionType, types.BuiltinFunctionType, type)
    return {
        (module.__name__, name): value
        for module in libraries
        if type(module) is types.ModuleType
        for name, value in list(vars(module).items())
        if isinstance(value, kinds)
    }


def global_state():
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "determinism": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32),
        "threads": (torch.get_num_threads(), threading.active_count()),
        "attention kernels": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "modes": (torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()),
        "hooks on all modules": [str(v) for n, v in sorted(vars(nn_module).items()) if n.startswith("_global_")],
        "stance of the compiler": torch._dynamo.eval_frame._stance.stance,
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state(legacy=False))),
        "warnings": list(warnings.filters),
        "loggers": {name: getattr(log, "disabled", None) for name, log in logging.root.manager.loggerDict.items()},
        "interpreter": (sys.gettrace(), sys.getprofile(), sys.getrecursionlimit(), gc.isenabled(), gc.get_threshold()),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGALRM, signal.SIGTERM)],
        "environment": dict(os.environ),
    }


def differences(before, after):
    return [name for name, value in before.items() if name in after and not _same(value, after[name])]


def _same(one, other):
    return one is other if callable(one) else one == other


pytestmark = pytest.mark.filterwarnings("ignore:.*reduce_op:FutureWarning")  # it warns when it is looked at

X = torch.randn(2, 8, 32)


def fails(error, model, x):
    with pytest.raises(error):
        invact.plan(model, (x,))


DOES = {
    "plan": lambda model: invact.plan(model, (X,)),
    "plan under autocast": lambda model: invact.plan(model, (X,), autocast=torch.bfloat16),
    "plan for a GPU": lambda model: decide_for_device(model, (X,), device="cuda", autocast=torch.float16),
    "patch": lambda model: invact.patch(model, (X,)),
    "patch and unpatch": lambda model: (invact.patch(model, (X,)), invact.unpatch(model)),
    "plan with the wrong inputs": lambda model: fails(AssertionError, model, X[..., :3]),
    "plan out of time": lambda model: fails(TimeoutError, model, X),
}


@pytest.fixture(scope="module")
def set_up():
    """What PyTorch itself sets up at its first use is there."""
    import transformers.masking_utils  # noqa: F401  (probes step in there, too)

    for reentrant in (False, True):
        invact.patch(Attends(reentrant=reentrant), (X,))


@pytest.mark.usefixtures("set_up")
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("do", DOES)
def test_nothing_outside_the_model_is_changed(do, reentrant, monkeypatch):
    model = Attends(reentrant=reentrant)
    if do.endswith("out of time"):
        monkeypatch.setattr("invact.probing.TIME_LIMIT", 0.0)
    state, functions = global_state(), library_functions()
    DOES[do](model)
    after = global_state()
    assert differences(state, after) == []
    assert differences(functions, library_functions()) == []
    assert functions.keys() - library_functions().keys() == set()


def test_what_a_caller_has_set_is_as_he_set_it():
    model = Attends()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        state = global_state()
        invact.patch(model, (X,))
        assert differences(state, global_state()) == []
    assert torch.get_default_dtype() is torch.float32


def in_threads(*tasks):
    """What each task returns, all of them begun at the same moment."""
    together, results = threading.Barrier(len(tasks)), [None] * len(tasks)

    def run(number, task):
        together.wait()
        try:
            results[number] = task()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=each) for each in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def told(report):
    return (report.to_dict(), str(report))


def test_two_threads_plan_two_models_as_each_would_alone():
    kinds = [{"waits": 0.03}, {"waits": 0.03, "reentrant": True}]
    alone = [told(invact.plan(Attends(**kind), (X,))) for kind in kinds]
    inverted = [sum(site["action"] == "invert" for site in report["sites"]) for report, _ in alone]
    functions = library_functions()
    for _ in range(2):
        models = [Attends(**kind) for kind in kinds]
        assert in_threads(*(lambda m=m: told(invact.plan(m, (X,))) for m in models)) == alone
        assert in_threads(*(lambda m=m: told(invact.patch(m, (X,))) for m in models)) == alone
        assert [invact.unpatch(m) for m in models] == inverted
    assert differences(functions, library_functions()) == []


def test_a_model_that_trains_in_one_thread_is_not_disturbed_by_planning_in_another(count_kept):
    trained, planned = Attends(waits=0.0), Attends(waits=0.3)
    expected = count_kept(trained, (X,))
    regions = invact.plan(planned, (X,)).notes
    stop = threading.Event()

    def train():
        seen = set()
        while not stop.is_set():
            seen.add(count_kept(trained, (X,)))
        return seen

    def plan():
        try:
            return invact.plan(planned, (X,)).notes
        finally:
            stop.set()

    assert in_threads(train, plan) == [{expected}, regions]


def probing(device="cuda", attention="fused"):
    """The circumstances of a probe for a GPU, entered."""
    stack = contextlib.ExitStack()
    stack.enter_context(checkpoints_counted([0], run_them=False))
    stack.enter_context(fake_tensor_log_silent())
    stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    stack.enter_context(AsOnGpu(Setting(torch.device(device), attention=attention)))
    return stack


@pytest.mark.parametrize("attention", ["fused", "math"])
def test_nothing_of_pytorch_is_exchanged_while_attention_is_imitated(attention):
    before = {name: getattr(F, name) for name in ("scaled_dot_product_attention", "multi_head_attention_forward")}
    switches, seen = global_state()["attention kernels"], []

    class Watches(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            hook = torch.autograd.graph.saved_tensors_hooks(lambda t: (look(), t)[1], lambda t: t)
            with hook:
                return super().forward(*args, **kwargs)

    def look():
        seen.append(
            global_state()["attention kernels"] == switches and all(getattr(F, n) is f for n, f in before.items())
        )

    with probing(attention=attention):
        x = torch.zeros(2, 8, 32)
        Watches(32, 4, batch_first=True)(x, x, x, need_weights=False)
    assert seen
    assert all(seen)


def attention_of_somebody_else(monkeypatch, name):
    """Another library's function in the place of one of F's, that calls PyTorch's."""
    called, original = [], getattr(F, name)

    def theirs(*args, **kwargs):
        called.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(F, name, theirs)
    return theirs, called


@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "multi_head_attention_forward"])
@pytest.mark.parametrize("attention", ["fused", "math"])
def test_another_librarys_attention_stays_and_counts_as_pytorchs(name, attention, monkeypatch):
    model = Attends()
    expected = told(decide_for_device(model, (X,), device="cuda", attention=attention).report)
    theirs, called = attention_of_somebody_else(monkeypatch, name)
    assert told(decide_for_device(model, (X,), device="cuda", attention=attention).report) == expected
    assert called
    assert getattr(F, name) is theirs


def test_a_patch_that_another_library_puts_on_meanwhile_stays(monkeypatch):
    generator = checkpoint_generator()
    monkeypatch.setattr(torch.utils.checkpoint, generator, getattr(torch.utils.checkpoint, generator))
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)
    model, count = Attends(), [0]
    with checkpoints_counted(count, run_them=True):
        wrapped, seen = getattr(torch.utils.checkpoint, generator), []

        def theirs(*args, **kwargs):
            seen.append(1)
            return (yield from wrapped(*args, **kwargs))

        setattr(torch.utils.checkpoint, generator, theirs)
        model(X)
        assert count == [1]
    assert getattr(torch.utils.checkpoint, generator) is theirs
    model(X).sum().backward()  # ours, still underneath, does nothing any more
    assert (count, len(seen)) == ([1], 2)
    theirs, _ = attention_of_somebody_else(monkeypatch, "scaled_dot_product_attention")
    invact.plan(model, (X,))
    assert F.scaled_dot_product_attention is theirs


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_regions_of_another_thread_are_not_counted_and_run_as_regions(reentrant, count_kept):
    model, count = Attends(reentrant=reentrant), [0]
    expected = count_kept(model, (X,))
    with checkpoints_counted(count, run_them=False):
        assert in_threads(lambda: count_kept(model, (X,))) == [expected]
        assert count == [0]
        assert count_kept(model, (X,)) > expected
        assert count == [1]
    assert "apply" not in vars(torch.utils.checkpoint.CheckpointFunction)


def test_logs_of_another_thread_are_not_silenced(caplog):
    log = logging.getLogger("torch._subclasses.fake_tensor")
    with fake_tensor_log_silent():
        log.error("mine")
        in_threads(lambda: log.error("theirs"))
    assert [record.message for record in caplog.records] == ["theirs"]


def test_math_attention_keeps_what_pytorchs_own_keeps():
    def kept(mask):
        with KeptStorages() as storages:
            q = torch.randn(2, 4, 8, 16, requires_grad=True)
            F.scaled_dot_product_attention(q, q, q, mask, 0.1, scale=0.3)
        return sorted(storages.sizes().values())

    for mask in (None, torch.ones(8, 8, dtype=torch.bool).tril(), torch.zeros(2, 1, 8, 8)):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            expected = kept(mask)
        with AsOnGpu(Setting(torch.device("cuda"), attention="math")):
            assert kept(mask) == expected


def test_a_model_with_lazy_layers_is_refused_by_the_name_of_the_first():
    model = nn.Sequential(nn.Linear(32, 32), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"`1\.weight` has no shape yet.*run the model once on real inputs first"):
        check_shapes_known(model)
    model(X)
    check_shapes_known(model)
