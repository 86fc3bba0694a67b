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


# --- OpenCLIP: its script is part of its package --------------------------------------------------------

SMALL_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 8, "width": 32, "heads": 2, "layers": 2},
}
SMALL_CLIP_FIRST = "import open_clip\nopen_clip.add_model_config('small.json')\n"
COUNTED = "print('inverted:', sum(len(getattr(m, '_invact_sites', ())) for m in model.modules()))\n"


IN_ONE_PROCESS = """
import logging, os, runpy, sys
sys.path.insert(0, "")
for precision in ("fp32", "amp_bf16"):
    for name in ("stock", "patched"):
        os.chdir(os.path.join({folder!r}, name))
        sys.argv = ["script.py", *{options!r}, "--precision", precision, "--name", f"{{name}} {{precision}}"]
        print("RUN", name, precision, flush=True)
        runpy.run_path("script.py", run_name="__main__")
        logging.root.handlers.clear()
"""


def save_pairs(folder: Path) -> Path:
    """A table of images of digits and their names, as OpenCLIP reads it."""
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    with (folder / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["filepath", "title"])
        for number, (row, label) in enumerate(zip(pixels[:16], labels, strict=False)):
            image = Image.fromarray((row * 15.9).astype("uint8").reshape(8, 8)).resize((16, 16))
            image.save(folder / f"{number}.png")
            rows.writerow([folder / f"{number}.png", f"the digit {label}"])
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def logged_by_open_clip(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the script logs, by whether it has the two lines and by precision; all in one process of their own."""
    for needed in ("open_clip_train", "pandas", "webdataset"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "small.json").write_text(json.dumps(SMALL_CLIP))
    spec = importlib.util.find_spec("open_clip_train.main")
    assert spec is not None
    assert spec.origin is not None
    stock = SMALL_CLIP_FIRST.replace("small.json", str(folder / "small.json")) + Path(spec.origin).read_text()
    patched = with_the_two_lines(stock, "args.distributed and not args.horovod")
    counting = patched.replace("    # create optimizer and scaler\n", f"    {COUNTED}")
    for name, script in (("stock", stock), ("patched", counting)):
        (folder / name).mkdir()
        (folder / name / "script.py").write_text(script)
    options = f"--model small --dataset-type csv --train-data {save_pairs(folder)} --batch-size 4 --epochs 2"
    options += f" --workers 0 --warmup 1 --log-every-n-steps 1 --device cpu --logs {folder}/logs --lr 1e-3"
    done = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS.format(folder=str(folder), options=options.split())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout
    _, *runs = re.split(r"^RUN (.*)\n", done.stdout, flags=re.MULTILINE)
    return dict(zip(runs[::2], runs[1::2], strict=True))


def losses(output: str) -> list[float]:
    found = [float(loss) for loss in re.findall(r"\bLoss: ([\d.]+)", output)]
    assert found, output
    return found


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_open_clips_own_script_trains_the_same_with_the_two_lines(
    precision: str, logged_by_open_clip: dict[str, str]
) -> None:
    stock, patched = (logged_by_open_clip[f"{name} {precision}"] for name in ("stock", "patched"))
    assert "inverted: 4" in patched
    assert losses(patched) == pytest.approx(losses(stock), abs=1e-4 if precision == "fp32" else 0.05)


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
def test_the_steps_of_timms_script_train_the_same_with_the_two_lines(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("timm")

    def losses_here(script: str) -> tuple[list[float], str]:
        """In this process: it is no script of anybody's."""
        exec(compile(script, "train.py", "exec"), {})
        output = capsys.readouterr().out
        return losses(output), output

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", option])
    stock = f"{inspect.getsource(main)}\n\nmain()\n"
    patched = with_the_two_lines(stock, "create_optimizer_v2")
    before, _ = losses_here(stock)
    after, output = losses_here(patched)
    assert len(before) == 6
    assert int(re.findall(r"inverted: (\d+)", output)[0]) >= 2
    assert after == pytest.approx(before, abs=0.05 if option == "--amp" else 1e-4)
