"""The two lines that the docs add to the training scripts of timm and OpenCLIP, put where the docs put them and run."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "living_with_others.md"


def with_the_two_lines(script: str, marker: str) -> str:
    """The script, changed as the diff on the page says that has `marker` in it."""
    diffs = re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    (diff,) = [diff for diff in diffs if marker in diff]
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] == " ")
    after = "".join(line[1:] for line in lines)
    assert sum(line[0] == "+" for line in lines) == 2
    assert script.count(before) == 1, f"The script has no such place, or several:\n{before}"
    return script.replace(before, after)


def losses(script: str, folder: Path, *arguments: object) -> tuple[list[float], str]:
    """What the script logs, run in a process of its own."""
    folder.mkdir()
    (folder / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "script.py", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    found = [float(loss) for loss in re.findall(r"\bLoss: ([\d.]+)", output)]
    assert found, output
    return found, output


# --- OpenCLIP: its script is part of its package --------------------------------------------------------

SMALL_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 8, "width": 32, "heads": 2, "layers": 2},
}
SMALL_CLIP_FIRST = "import open_clip\nopen_clip.add_model_config('small.json')\n"
COUNTED = "print('inverted:', sum(len(getattr(m, '_invact_sites', ())) for m in model.modules()))\n"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A table of images of digits and their names, as OpenCLIP reads it."""
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["filepath", "title"])
        for number, (row, label) in enumerate(zip(pixels[:16], labels, strict=False)):
            image = Image.fromarray((row * 15.9).astype("uint8").reshape(8, 8)).resize((16, 16))
            image.save(tmp_path / f"{number}.png")
            rows.writerow([tmp_path / f"{number}.png", f"the digit {label}"])
    return tmp_path / "pairs.csv"


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_open_clips_own_script_trains_the_same_with_the_two_lines(precision: str, pairs: Path, tmp_path: Path):
    for needed in ("open_clip_train", "pandas", "webdataset"):
        pytest.importorskip(needed)
    (tmp_path / "small.json").write_text(json.dumps(SMALL_CLIP))
    spec = importlib.util.find_spec("open_clip_train.main")
    assert spec is not None
    assert spec.origin is not None
    stock = SMALL_CLIP_FIRST.replace("small.json", str(tmp_path / "small.json")) + Path(spec.origin).read_text()
    patched = with_the_two_lines(stock, "args.distributed and not args.horovod")
    counting = patched.replace("    # create optimizer and scaler\n", f"    {COUNTED}")
    options = f"--model small --dataset-type csv --train-data {pairs} --batch-size 4 --epochs 2 --workers 0 --warmup 1"
    options += f" --precision {precision} --log-every-n-steps 1 --device cpu --logs {tmp_path}/logs --lr 1e-3"
    before, _ = losses(stock, tmp_path / "stock", *options.split(), "--name", "stock")
    after, output = losses(counting, tmp_path / "patched", *options.split(), "--name", "patched")
    assert "inverted: 4" in output
    assert after == pytest.approx(before, abs=1e-4 if precision == "fp32" else 0.05)


# --- timm: its train.py is not part of its package; these are its steps ------------------------------


def main() -> None:
    """What train.py does between the model and the last epoch, with the functions of timm that it does it with."""
    import sys
    from contextlib import nullcontext

    import timm.utils
    import torch
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    amp_dtype, use_amp = torch.bfloat16, "native" if "--amp" in sys.argv else None
    timm.utils.random_seed(0)
    model = timm.create_model("test_vit", num_classes=10, img_size=32, drop_path_rate=0.1)
    if "--grad-checkpointing" in sys.argv:
        model.set_grad_checkpointing(enable=True)
    model.to(device="cpu", memory_format=torch.channels_last)

    optimizer = create_optimizer_v2(
        model,
        opt="adamw",
        lr=1e-3,
    )
    scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=2)
    average = timm.utils.ModelEmaV3(model)
    saver = timm.utils.CheckpointSaver(model, optimizer, model_ema=average, max_history=1)
    images, labels = torch.randn(24, 3, 32, 32), torch.randint(10, (24,))
    for epoch in range(epochs):
        model.train()
        for step, (input, target) in enumerate(zip(images.split(8), labels.split(8), strict=True)):
            with torch.autocast("cpu", amp_dtype) if use_amp else nullcontext():
                loss = torch.nn.functional.cross_entropy(model(input), target)
            optimizer.zero_grad()
            loss.backward()
            timm.utils.dispatch_clip_grad(model.parameters(), value=1.0)
            optimizer.step()
            average.update(model, step=step)
            print(f"Loss: {loss.item():.5f}")
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=loss.item())
    print("inverted:", sum(len(getattr(m, "_invact_sites", ())) for m in model.modules()))
    timm.create_model("test_vit", num_classes=10, img_size=32, checkpoint_path="model_best.pth.tar")


@pytest.mark.parametrize("option", ["--fp32", "--amp", "--grad-checkpointing"])
def test_the_steps_of_timms_script_train_the_same_with_the_two_lines(option: str, tmp_path: Path):
    pytest.importorskip("timm")
    stock = f"{inspect.getsource(main)}\n\nmain()\n"
    patched = with_the_two_lines(stock, "create_optimizer_v2")
    before, _ = losses(stock, tmp_path / "stock", option)
    after, output = losses(patched, tmp_path / "patched", option)
    assert int(re.findall(r"inverted: (\d+)", output)[0]) >= 2
    assert after == pytest.approx(before, abs=0.05 if option == "--amp" else 1e-4)
