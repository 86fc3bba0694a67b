"""The floor of small models is what can be told by hand, and no plan keeps less."""

import copy
import gc
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from small_blocks import around
from torch import nn

import invact
from invact.ledger.computed import Computed, Value
from invact.ledger.floor import _fewest, floor_bytes, not_derived, remains
from invact.ledger.ledger import Ledger
from invact.probing.probe import observe
from invact.pytorch.tensors import StorageWeakRef
from invact.simulation.setting import Setting

TOKENS, WIDTH, WIDE = 8, 64, 256
ROW, WIDE_ROW = TOKENS * WIDTH * 4, TOKENS * WIDE * 4
STATISTIC = TOKENS * 4


class Layers(nn.Module):
    """Linear layers, of one width or wider, in a forward that is given."""

    def __init__(self, forward):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.gate, self.down = nn.Linear(WIDTH, WIDE), nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.norm, self.batch_norm = nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH)
        self.table = nn.Embedding(32, WIDTH)
        self.given = forward

    def forward(self, x):
        return self.given(self, x)


def tokens():
    torch.manual_seed(0)
    return torch.randn(TOKENS, WIDTH)


def seen(forward, x=None, setting=None):
    """One pass on simulated tensors."""
    model = forward if isinstance(forward, nn.Module) else Layers(forward)
    x = tokens() if x is None else x
    return observe(model, (x,), setting or Setting(torch.device("cpu")), record_operators=True)


def floor_and_total(forward, x=None, setting=None):
    """The floor, and what stock PyTorch keeps."""
    found = seen(forward, x, setting)
    return floor_bytes(found.computed, found.entries), found.memory.total_bytes


def test_a_mlp_keeps_its_products_and_not_what_norm_and_activation_gave():
    def forward(m, x):
        return m.down(F.gelu(m.up(m.norm(m.one(x)))))

    floor, total = floor_and_total(forward)
    assert total == 3 * ROW + 2 * STATISTIC + 2 * WIDE_ROW
    assert floor == 2 * ROW + 2 * STATISTIC + WIDE_ROW  # the input, what the norm reads, its statistics, GELU's input


@pytest.mark.parametrize(
    "product",
    [
        lambda gate, up: F.silu(gate) * up,
        lambda gate, up: F.gelu(gate.clamp(max=7), approximate="tanh") * (up + 1),
        lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up,
        lambda gate, up: F.glu(torch.cat([up, gate], dim=-1), dim=-1),
    ],
)
def test_of_a_gated_product_gate_and_up_are_kept_alone(product):
    floor, _ = floor_and_total(lambda m, x: m.down(product(m.gate(x), m.up(x))))
    assert floor == ROW + 2 * WIDE_ROW


def test_a_sum_of_what_comes_of_one_product_is_made_again():
    def rotated(m, x):
        q = m.one(x)
        left, right = q.chunk(2, dim=-1)
        angles = torch.arange(WIDTH)[None] * torch.arange(TOKENS)[:, None] * 0.01
        return m.two((q * angles.cos() + torch.cat([-right, left], dim=-1) * angles.sin()).exp())

    def cubic(m, x):
        q = m.one(x)
        return m.two(torch.tanh(0.8 * (q + 0.044715 * q**3)) * q)

    for forward in (rotated, cubic):
        floor, total = floor_and_total(forward)
        assert floor == 2 * ROW < total


def test_a_residual_sum_is_kept_since_its_summands_are_not():
    def forward(m, x):
        x = m.one(x)
        return m.three(m.norm(x + m.two(x)))

    floor, _ = floor_and_total(forward)
    assert floor == 3 * ROW + 2 * STATISTIC  # the input, one's output, the sum


def test_a_residual_sum_is_not_kept_where_both_summands_are():
    def forward(m, x):
        x = m.one(x)
        x = x + m.scale * m.two(x)  # the scale's gradient keeps what two gave, two keeps what one gave
        return m.three(m.norm(x))

    floor, total = floor_and_total(forward)
    assert total == 5 * ROW + 2 * STATISTIC
    assert floor == 3 * ROW + 2 * STATISTIC


def test_what_has_no_gradient_makes_no_residual_sum():
    floor, _ = floor_and_total(lambda m, x: m.two(torch.exp(m.one(x) + x)))
    assert floor == 2 * ROW  # the input and one's output


def test_dropout_keeps_its_mask_in_bits():
    def forward(m, x):
        return m.down(F.dropout(F.gelu(m.up(x)), 0.5))

    found = seen(forward, setting=Setting(torch.device("cuda")))
    assert found.memory.total_bytes == ROW + 2 * WIDE_ROW + WIDE_ROW // 4
    assert floor_bytes(found.computed, found.entries) == ROW + WIDE_ROW + WIDE_ROW // 4 // 8
    assert remains(found.computed, found.entries)["random numbers"] == WIDE_ROW // 4


def test_activations_in_place_keep_a_copy_that_is_enough():
    floor, total = floor_and_total(lambda m, x: m.down(F.silu(m.up(x), inplace=True)))
    assert (floor, total) == (ROW + WIDE_ROW, ROW + 2 * WIDE_ROW)


def test_of_a_chain_of_casts_the_narrowest_is_kept():
    def forward(m, x):
        h = m.one(x).to(torch.bfloat16)
        return m.two(h.float().exp().sin())

    floor, total = floor_and_total(forward)
    assert total == 3 * ROW  # the input, exp's output, sin's
    assert floor == ROW + ROW // 2


def test_casts_of_weights_under_autocast_count_to_neither():
    floor, total = floor_and_total(around(nn.GELU()), torch.randn(4, 16), Setting(torch.device("cpu"), torch.bfloat16))
    assert (floor, total) == ((4 * 16 + 4 * 32) * 2, (4 * 16 + 2 * 4 * 32) * 2)


def test_batch_norm_is_made_again_from_its_statistics():
    floor, total = floor_and_total(lambda m, x: m.two(F.relu(m.batch_norm(m.one(x)))))
    assert (floor, total) == (2 * ROW + 2 * WIDTH * 4, 3 * ROW + 2 * WIDTH * 4)


def test_a_norm_written_in_steps_is_made_again():
    def forward(m, x):
        x = m.one(x)
        return m.two(m.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))

    floor, _ = floor_and_total(forward)
    assert floor == 2 * ROW


def test_attention_written_in_steps_keeps_its_scores_once():
    def forward(m, x):
        q, k, v = m.one(x), m.two(x), m.three(x)
        return torch.softmax(q @ k.T / 8, dim=-1) @ v

    floor, total = floor_and_total(forward)
    assert floor == total == 4 * ROW + TOKENS * TOKENS * 4


def test_sums_over_all_tokens_tables_and_sorts_are_not_made_again():
    def forward(m, x):
        x = m.one(x)
        ids = torch.arange(TOKENS)
        return (x.sum(0).exp() + m.table(ids).exp() + x.sort(dim=-1).values.exp()).sin()

    found = seen(forward)
    kinds = remains(found.computed, found.entries)
    # exp keeps its output, which stands for its input as well as it does; the sums of such are residual ones.
    assert kinds["other: sum"] == WIDTH * 4
    assert kinds["embeddings and indices"] == 2 * ROW + TOKENS * WIDTH * 8  # with the order that sorting found
    assert kinds["residual sums"] == ROW


def test_a_buffer_filled_in_parts_is_made_again_from_what_fills_it():
    def forward(m, x):
        left, right = m.one(x), m.two(x)
        both = torch.empty(TOKENS, 2 * WIDTH)
        both[:, :WIDTH] = left.relu()
        both[:, WIDTH:] = right.relu()
        return both.exp().sin(), left.sin(), right.sin()

    floor, total = floor_and_total(forward)
    assert (floor, total) == (3 * ROW, 7 * ROW)


def test_what_is_left_is_told_by_what_made_it():
    def forward(m, x):
        x = m.one(x)
        return m.three(m.norm(x + m.two(F.silu(x))))

    found = seen(forward)
    assert remains(found.computed, found.entries) == {
        "matrix products": ROW,
        "inputs": ROW,
        "residual sums": ROW,
        "other: silu": ROW,
        "other: layer_norm": ROW,
        "norm statistics": 2 * STATISTIC,
    }
    assert not_derived(found.computed, found.entries) == {"silu": ROW, "layer_norm": ROW}


def test_a_cast_that_is_kept_in_a_products_stead_counts_as_the_product():
    found = seen(lambda m, x: m.one(x).to(torch.bfloat16).sin())
    assert remains(found.computed, found.entries) == {"inputs": ROW, "matrix products": ROW // 2}
    assert not_derived(found.computed, found.entries) == {}


def test_what_inverting_keeps_counts_as_the_product_that_it_is_kept_instead_of():
    model, x = around(nn.GELU()), torch.randn(8, 16)
    assert invact.patch(model, (x,)).inverted
    found = seen(model, x)
    assert remains(found.computed, found.entries) == {"inputs": 8 * 16 * 4, "matrix products": 8 * 32 * 4 + 8 * 32 // 8}
    assert not_derived(found.computed, found.entries) == {}


def test_what_a_kernel_wrote_that_pytorch_does_not_know_is_not_taken_for_empty():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = torch.empty_like(x)
            y.numpy()[:] = x.detach().numpy() * 2  # as a kernel of one's own does, past PyTorch
            return y

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    model, x = Layers(lambda m, x: m.two(Doubled.apply(m.one(x)).exp())), tokens()
    with Computed(model.parameters()) as computed, Ledger(model) as ledger:
        y = model(x)
    assert floor_bytes(computed, ledger.entries()) == 2 * ROW
    assert remains(computed, ledger.entries()) == {"inputs": ROW, "other: empty_like": ROW}
    del y


def test_an_operator_of_another_library_is_not_known_by_its_name():
    @torch.library.custom_op("invact_test_floor::gelu", mutates_args=())
    def theirs(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    theirs.register_fake(torch.empty_like)
    theirs.register_autograd(lambda ctx, dy: dy * 2)
    found = seen(lambda m, x: m.two(theirs(m.one(x)).exp()))
    assert floor_bytes(found.computed, found.entries) == 2 * ROW
    assert seen_made_by(found, "gelu") == ["other: gelu"]


def seen_made_by(found, operator):
    return [value.made_by for value in found.computed.values if value.operator == operator]


def test_recording_keeps_no_tensor_alive():
    gc.disable()
    try:
        with Computed([]) as computed:
            x = torch.ones(TOKENS, WIDTH)
            storage = StorageWeakRef((x @ x.T).untyped_storage())
            assert storage.expired()
            again = x @ x.T  # the memory may be the same, the value is another
            del again
    finally:
        gc.enable()
    assert [value.operator for value in computed.values] == ["ones", "mm", "mm"]


def test_views_are_no_values_and_changes_in_place_are():
    with Computed([]) as computed:
        x = torch.ones(TOKENS, WIDTH)
        x.view(-1)[:3].add_(1)
        x.t_()
    assert [value.operator for value in computed.values] == ["ones", "add"]


def test_no_plan_keeps_less_than_the_floor():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, activation="gelu", batch_first=True)
    models = [
        (around(nn.GELU()), torch.randn(8, 16)),
        (around(nn.ReLU()), torch.randn(8, 16)),
        (nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 8, 32)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3)), torch.randn(2, 3, 9, 9)),
    ]
    for model, x in models:
        found = observe(copy.deepcopy(model), (x,), Setting(torch.device("cpu")), record_operators=True)
        assert floor_bytes(found.computed, found.entries) <= invact.plan(model, (x,)).bytes_after


def test_a_pass_that_is_not_asked_for_it_records_nothing():
    assert observe(around(nn.GELU()), (torch.randn(8, 16),), Setting(torch.device("cpu"))).computed is None


def is_at_hand(number, kept, values):
    """Whether a value is kept, or made again from what is."""
    if number in kept:
        return True
    return values[number].made_by is None and all(is_at_hand(read, kept, values) for read in values[number].reads)


def test_no_other_choice_of_values_is_smaller():
    draw = random.Random(0)
    for _ in range(200):
        values = []
        for n in range(9):
            reads = tuple(draw.sample(range(n), min(n, draw.randint(1, 2)))) if draw.random() < 0.7 else ()
            values.append(Value(draw.randint(1, 4), "any", None if reads else "matrix products", reads, 1))
        wanted = draw.sample(range(9), 4)
        sizes = [value.nbytes for value in values]
        choices = (set(kept) for size in range(5) for kept in itertools.combinations(range(9), size))
        smallest = min(
            sum(sizes[n] for n in kept)
            for kept in choices
            if all(is_at_hand(number, kept, values) for number in wanted)
        )
        assert sum(sizes[n] for n in _fewest(values, sizes, wanted)) == smallest
