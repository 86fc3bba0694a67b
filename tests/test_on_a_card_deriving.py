"""Models that derive on a card: threads, streams, CUDA graphs, transformers bit for bit, what the allocator holds."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from exactness import (
    SHORT_DTYPES,
)
from on_a_card import (
    DEVICE,
    NEEDS_A_CARD,
    Gated,
    assert_replays_to_stocks_gradients,
    assert_same_gradients,
    gradients,
    held_by_forward,
    sharding_over_one_process,
    step,
)
from small_models import small_model
from torch import Tensor, nn

import invact

pytestmark = pytest.mark.gpu


def derives_and_stock(
    dropout: float = 0.1, autocast: torch.dtype | None = None, exact: bool = False
) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    stock = nn.Sequential(*(Gated(64, dropout) for _ in range(2))).to(DEVICE)
    patched, x = copy.deepcopy(stock), torch.randn(128, 64, device=DEVICE)
    assert len(invact.patch(patched, (x,), autocast=autocast, exact=exact).derived) >= 6
    return stock, patched, x


def test_a_step_in_a_thread_of_its_own_derives_and_gets_stocks_gradients() -> None:
    stock, patched, x = derives_and_stock(exact=True)
    step(stock, x)
    torch.manual_seed(1)
    loss = (patched(x) * torch.linspace(-1, 1, x.shape[1], device=DEVICE)).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert torch.equal(gradients(patched), gradients(stock))


@NEEDS_A_CARD
def test_what_is_derived_on_a_side_stream_gets_stocks_gradients() -> None:
    """Recipes run in backward's thread, in the stream of the forward."""
    stock, patched, x = derives_and_stock()
    step(stock, x)
    side = torch.cuda.Stream()
    for _ in range(20):
        patched.zero_grad()
        own = x.clone()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.manual_seed(1)
            loss = (patched(own) * torch.linspace(-1, 1, x.shape[1], device=DEVICE)).sum()
        own.record_stream(side)
        del own
        torch.randn(128, 128, device=DEVICE)  # may take what is made again, were it free too early
        loss.record_stream(torch.cuda.current_stream())
        loss.backward()
        torch.cuda.current_stream().wait_stream(side)
        assert_same_gradients(patched, stock)


@NEEDS_A_CARD
@pytest.mark.parametrize("exact", [False, True])
def test_a_step_that_derives_is_captured_in_a_cuda_graph_and_replays_to_stocks_gradients(exact: bool) -> None:
    stock, patched, x = derives_and_stock(dropout=0.0, exact=exact)
    assert_replays_to_stocks_gradients(patched, stock, x)


@NEEDS_A_CARD
def test_graphed_callables_of_a_model_that_derives_give_stocks_gradients() -> None:
    stock, patched, x = derives_and_stock(dropout=0.0)
    graphed = torch.cuda.make_graphed_callables(patched, (x.clone(),))
    patched.zero_grad()
    step(graphed, x)
    step(stock, x)
    assert_same_gradients(patched, stock)


def test_moved_to_the_cpu_and_back_a_model_that_derives_still_gets_stocks_gradients() -> None:
    stock, patched, x = derives_and_stock(dropout=0.0)
    for device in (torch.device("cpu"), DEVICE):
        for model in (stock, patched):
            model.zero_grad()
            step(model.to(device), x.to(device))
        assert_same_gradients(patched, stock)


@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
def test_under_autocast_what_is_derived_is_stocks_bit_for_bit_with_exact(dtype: torch.dtype) -> None:
    stock, patched, x = derives_and_stock(autocast=dtype, exact=True)
    for model in (stock, patched):
        torch.manual_seed(1)
        with torch.autocast(DEVICE.type, dtype=dtype):
            loss = (model(x).float() * torch.linspace(-1, 1, x.shape[1], device=DEVICE)).sum()
        loss.backward()
    assert torch.equal(gradients(patched), gradients(stock))


def test_a_scaler_takes_the_same_steps_in_fp16_where_a_model_derives() -> None:
    stock, patched, x = derives_and_stock(autocast=torch.float16, exact=True)
    histories = []
    for model in (stock, patched):
        torch.manual_seed(1)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**24)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        scales = []
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, dtype=torch.float16):
                loss = model(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        histories.append(scales)
    assert 1 <= histories[0][-1] < 2.0**24  # it did overflow, and then did not
    assert histories[0] == histories[1]
    assert all(torch.equal(*pair) for pair in zip(patched.parameters(), stock.parameters(), strict=True))


def test_sharded_layer_by_layer_a_model_that_derives_gets_stocks_gradients(tmp_path) -> None:
    with sharding_over_one_process(tmp_path) as fully_shard:
        stock, patched, x = derives_and_stock()
        for layer in patched:
            fully_shard(layer)
        fully_shard(patched)
        for model in (stock, patched):
            step(model, x)
        assert_same_gradients(patched, stock)


def small_bert() -> nn.Module:
    model = small_model("BertModel", hidden_size=128, intermediate_size=512, vocab_size=256)
    model.pooler = None  # which nobody asks
    return model


def small_llama() -> nn.Module:
    sizes = {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 256}
    return small_model("LlamaModel", **sizes, attention_dropout=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [small_bert, small_llama])
def test_exact_gives_a_transformer_with_dropout_stocks_gradients_bit_for_bit(make, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = make().to(DEVICE, dtype).train()
    inputs = {"input_ids": torch.randint(0, 256, (4, 64), device=DEVICE)}
    directions = torch.randn(4, 64, 128, device=DEVICE)

    def step_of_it() -> Tensor:
        model.zero_grad()
        torch.manual_seed(1)
        (model(**inputs).last_hidden_state.float() * directions).sum().backward()
        return gradients(model)

    stock = step_of_it()
    if not torch.equal(stock, step_of_it()):
        pytest.skip("stock itself does not give the same bits twice on this card")
    assert invact.patch(model, inputs, exact=True).derived
    assert torch.equal(step_of_it(), stock)


@NEEDS_A_CARD
def test_what_the_allocator_holds_after_forward_falls_by_what_the_report_says(record_property) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Gated(512, 0.1) for _ in range(4))).to(DEVICE, torch.bfloat16)
    x = torch.randn(8192, 512, device=DEVICE, dtype=torch.bfloat16)

    held_by_forward(model, (x,))
    stock = held_by_forward(model, (x,))
    report = invact.patch(model, (x,))
    held_by_forward(model, (x,))
    off = (stock - held_by_forward(model, (x,))) / (report.bytes_before - report.bytes_after) - 1
    record_property("bytes held after forward, off from the report", abs(off))
    assert report.saving > 0.4
    assert abs(off) < 0.01
