"""Triton without a GPU: a script in a process whose kernels are interpreted, and kernels compiled for other chips."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

triton = pytest.importorskip("triton")


def assert_agrees_interpreted(script: str) -> None:
    """Triton reads TRITON_INTERPRET when it is imported: it needs a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("agreed"), done.stderr[-3000:]


def compiled(kernel: Any, tensors: dict[str, str], constants: dict[str, Any], target: Any) -> Any:
    """A kernel built for a chip that need not be there, with pointers and lengths divisible by 16."""
    from triton.compiler import ASTSource

    names = list(inspect.signature(kernel.fn).parameters)
    aligned = [names.index(name) for name in tensors]
    if "constexprs" in inspect.signature(ASTSource.__init__).parameters:
        source = ASTSource(
            fn=kernel,
            signature={name: tensors.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )
    else:
        from triton.backends.compiler import AttrsDescriptor

        divisible = AttrsDescriptor.from_dict(
            {"arg_properties": {"tt.divisibility": aligned}, "cls": "AttrsDescriptor"}
        )
        source = ASTSource(fn=kernel, signature=tensors, constants=constants, attrs=divisible)
    return triton.compile(source, target=target)


def built_for_amd(build: Callable[[Any], Any]) -> Any:
    """What `build` makes of the target, where this version of Triton can build for AMD."""
    from triton.backends.compiler import GPUTarget

    try:
        return build(GPUTarget("hip", "gfx942", 64))
    except Exception as error:
        if "ld.lld not found" in str(error):
            pytest.skip("this version of Triton needs ROCm's linker to build for AMD")
        raise
