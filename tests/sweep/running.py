"""A process of its own that checks one class after another, with limits of time and memory."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import time
import warnings
from importlib import import_module

MEMORY = 10 * 2**30  # bytes a child may allocate


class Child:
    """A process that checks one class after another; killed and started anew when one takes too long."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error) -> None:
        self._process.kill()

    def result(self, library: str, name: str) -> dict:
        began = time.monotonic()
        self._pipe.send((library, name))
        found = {"library": library, "name": name}
        try:
            if self._pipe.poll(self._timeout):
                found |= self._pipe.recv()
            else:
                found |= {"status": "too slow", "why": f"not done after {self._timeout:.0f} s"}
                self._restart()
        except EOFError:
            self._process.join()
            found |= {"status": "crashed", "why": f"the process ended with {self._process.exitcode}"}
            self._start()
        return {**found, "seconds": round(time.monotonic() - began, 1)}

    def _restart(self) -> None:
        self._process.kill()
        self._process.join()
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()  # it has imported what is slow to import


def _serve(pipe) -> None:
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    pipe.send("ready")
    while True:
        pipe.send(_checked(*pipe.recv()))


def _checked(library: str, name: str) -> dict:
    """The first attempt at a class that runs as stock, checked; or why none did."""
    import torch
    from checking import CannotRunError, awaken, check
    from limits import check_size

    gc.collect()
    gc.freeze()  # the libraries need not be looked through at every count
    reasons: dict[str, list[str]] = {"not run": [], "no inputs": [], "not built": []}
    try:
        attempts = list(import_module(f"{library}_models").attempts(name))
    except Exception as error:  # the library refuses its own default configuration
        return {"status": "not built", "why": _in_words(error)}
    for build, input_makers in attempts:
        torch.manual_seed(0)
        try:
            model = build()
            check_size(model)
            awaken(model)
        except Exception as error:
            reasons["not built"].append(_in_words(error))
            continue
        for make_inputs in input_makers:
            try:
                inputs = make_inputs(model)
            except Exception as error:
                reasons["no inputs"].append(_in_words(error))
                continue
            try:
                found = check(model, inputs)
            except CannotRunError as error:
                reasons["not run"].append(str(error))
                continue
            except RuntimeError as error:
                if "allocate memory" not in str(error):
                    raise
                reasons["not run"].append(f"it takes more than the {MEMORY >> 30} GiB that the sweep gives it")
                continue
            found["inputs"] = sorted(inputs) if isinstance(inputs, dict) else len(inputs)
            return {"status": "failed" if found["failures"] else "passed", "why": "; ".join(found["failures"]), **found}
    status = next(status for status, why in reasons.items() if why)
    return {"status": status, "why": reasons[status][0], "reasons": reasons}


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}"
