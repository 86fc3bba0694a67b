"""What the tests measure with: an independent count of what autograd keeps, and all gradients as one vector."""

import gc
import getpass
import importlib.util
import os
import tempfile
import weakref

# One thread per worker, before torch starts its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor keeps what it compiled for one processor and takes it for another: each that is played has a folder.
if processor := os.environ.get("ATEN_CPU_CAPABILITY"):
    folder = f"torchinductor_{getpass.getuser()}_{processor}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), folder))

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

# For the whole run: PyTorch's own operators where oneDNN's would be taken.
if os.environ.get("INVACT_TESTS_WITHOUT_ONEDNN") == "1":
    torch.backends.mkldnn.set_flags(False)


def pytest_collection_finish():
    """A plan looks through all that Python's collector follows, for who holds simulated tensors; the modules do not."""
    gc.collect()
    gc.freeze()


class Held:
    def __init__(self, tensor):
        self.tensor = tensor


def kept_bytes(model, inputs):
    """Bytes of the storages that one real forward keeps for backward, parameters and buffers left out.

    Written apart from invact's ledger: storages told apart by their address, of what is still held after the forward.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    packed = []

    def pack(tensor):
        held = Held(tensor.detach())
        packed.append(weakref.ref(held))
        return held

    with saved_tensors_hooks(pack, lambda held: held.tensor):
        output = run(model, inputs)
    alive = [held.tensor.untyped_storage() for reference in packed if (held := reference()) is not None]
    storages = {storage.data_ptr(): storage.nbytes() for storage in alive}
    del output
    return sum(nbytes for address, nbytes in storages.items() if address not in own)


def run(model, inputs):
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def first_tensors(output):
    """The floating tensors of whatever a model returns, without caches."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = [v for k, v in output.items() if k != "past_key_values"]
    if isinstance(output, (tuple, list)):
        return [t for item in output for t in first_tensors(item)]
    return []


def outputs_and_gradients(model, inputs, seed=0):
    """The outputs as one vector, and the gradient of all parameters together for a fixed quadratic loss."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    outputs = first_tensors(run(model, inputs))
    sum(t.square().mean() + t.sin().mean() for t in outputs).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([t.detach().flatten() for t in outputs]), torch.cat(gradients)


def followed_again():
    """What the tests froze is followed again, modules and what they hold."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


all_objects_followed = pytest.fixture(followed_again)
all_objects_followed_meanwhile = pytest.fixture(followed_again, scope="module", name="all_objects_followed_meanwhile")


@pytest.fixture
def count_kept():
    return kept_bytes


@pytest.fixture
def run_forward():
    return lambda model, inputs: first_tensors(run(model, inputs))


@pytest.fixture
def run_backward():
    return outputs_and_gradients


@pytest.fixture
def train_alike(x, run_backward):
    """Asserts that two models give the same outputs and gradients for the `x` of the tests' own file."""

    def check(stock, ours):
        for a, b in zip(run_backward(stock, (x,)), run_backward(ours, (x,)), strict=True):
            assert (a - b).norm() <= 1e-5 * a.norm() + 1e-7

    return check


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """Threads that spin while they wait take ten times as long where others use the same cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Runs `work(rank, **options)` in both of two processes."""
    from two_processes import TwoProcesses

    processes = TwoProcesses(tmp_path_factory.mktemp("meeting_points"))
    yield processes.run
    processes.stop()


@pytest.fixture
def images():
    """Three, of odd sizes."""
    return torch.randn(3, 5, 4, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def block_that_computes(tmp_path):
    """Makes a block with the source of one expression of x between its layers."""

    def make(expression):
        path = tmp_path / "block.py"
        path.write_text(
            "import math\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n"
            "class Block(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)\n\n"
            "    def forward(self, x):\n"
            "        x = self.up(x)\n"
            f"        return self.down({expression})\n"
        )
        spec = importlib.util.spec_from_file_location("block", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.Block()

    return make


@pytest.fixture
def fused_here(monkeypatch):
    """As if the fused operator were one kernel on this CPU: it is PyTorch's own composition of it that runs."""
    from norms_in_steps import as_if_fused

    as_if_fused(monkeypatch)
