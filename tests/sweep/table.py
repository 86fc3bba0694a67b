"""The results of a sweep as a page of the documentation."""

from __future__ import annotations

import datetime
import re
from collections import Counter, defaultdict
from importlib.metadata import version

PACKAGES = ("torch", "transformers", "timm", "open_clip_torch")
LIBRARIES = ("transformers", "timm", "open_clip")


def as_table(results: list[dict], classes: Counter[str]) -> str:
    """Totals, every class that ran, and what did not with the library's reason.

    Args:
        results: of the classes that were swept.
        classes: how many each library has, by its name.
    """
    return "\n".join(
        [
            *_head(results, classes),
            *(line for library in LIBRARIES for line in _checked(library, results)),
            *_not_checked(results),
        ]
    )


def _head(results: list[dict], classes: Counter[str]) -> list[str]:
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    by_library = {library: [result for result in results if result["library"] == library] for library in LIBRARIES}
    rows = [_totals(library, found, classes[library]) for library, found in by_library.items()]
    return [
        "# Every model class we can build",
        "",
        "A small configuration of each class is built with no network and no weights, patched twice, as usual and",
        "with `exact=True`, and held against the stock model: bytes kept for backward as reported and as counted",
        "apart from invact on real tensors within 1%, before and after either; never more bytes than before; outputs",
        "within 1e-5; the gradients of all parameters together within 1e-4 in relative L2 (fp32, training mode, same",
        "seeds, so that dropout and layer drop agree), and both bit for bit the stock ones with `exact=True` and",
        "wherever nothing is inverted; bitwise the old gradients after `unpatch`. Linear layers are first rescaled to",
        "unit gain: activations then come near their minimum, where inverting is hardest. Where gradients are further",
        "off than 1e-4, they are held against float64: some models amplify every rounding, and stock fp32 is as far",
        "off (see the last column).",
        "",
        "Of transformers, the base model and one head of every architecture in the Auto mappings; of timm, the",
        "smallest member of every family of every model file; of OpenCLIP, one model of every kind of configuration,",
        "whatever the sizes. A class that does not run on inputs that we could make, or that takes too long, counts as",
        "built and not as passed.",
        "",
        f"{datetime.date.today()}, {versions}, on one CPU core ({_hours(results)} hours).",
        f"{_swept(results, classes)} Made by",
        "",
        "```sh",
        "python tests/sweep --results sweep.jsonl --table docs/models.md",
        "```",
        "",
        "| library | classes | swept | built | run | passed | passed of built | inverted | derived |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *rows,
        _totals("all", results, classes.total()),
        "",
        "*Built* counts the classes of which the library makes a model from its own default configuration, shrunk;",
        "*run*, those whose stock forward and backward work in training on inputs that we could make. Small models of",
        "narrow layers save other shares than the real ones: the columns are what this test saw. For yours, run",
        "`invact patch NAME`. *Inverted* is how many of the places with a pointwise activation were inverted (above,",
        "in how many classes any was); *derived*, the share of the bytes kept before that making tensors again saves;",
        "*saved*, the share that both save, as counted apart; *exact*, that saved with `exact=True`; *floor*, what",
        "would be saved if nothing were kept that operations without a matrix product can make again.",
        "",
    ]


def _swept(results: list[dict], classes: Counter[str]) -> str:
    """How many classes were swept, and on which commits."""
    commits = Counter(result["commit"] for result in results)
    where = " and ".join(f"{number:,} at commit {commit}" for commit, number in commits.most_common())
    rest = classes.total() - len(results)
    return f"Of {classes.total():,} classes {where} were swept" + (f"; {rest:,} were not run." if rest else ".")


def _totals(name: str, results: list[dict], classes: int) -> str:
    by_status = Counter(result["status"] for result in results)
    built = len(results) - by_status["not built"]
    run = built - by_status["not run"] - by_status["no inputs"]
    passed = [result for result in results if result["status"] == "passed"]
    inverted = sum(1 for result in passed if result["inverted"])
    derived = sum(1 for result in passed if result["derived"])
    share = _percent(len(passed), built)
    cells = [name, classes, len(results), built, run, len(passed), share, inverted, derived]
    return f"| {' | '.join(map(str, cells))} |"


def _hours(results: list[dict]) -> str:
    return f"{sum(result['seconds'] for result in results) / 3600:.1f}"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _checked(library: str, results: list[dict]) -> list[str]:
    ran = [result for result in results if result["library"] == library and "gradient_error" in result]
    lines = [
        f"## {library}",
        "",
        "| class | sites | inverted | derived | saved | exact | floor | gradient error | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for result in sorted(ran, key=lambda result: result["name"].lower()):
        before = result["kept_before"] or 1
        shares = [
            result["bytes_derived"] / before,
            *(1 - result[after] / before for after in ("kept_after", "kept_after_exact", "bytes_floor")),
        ]
        error = f"{result['gradient_error']:.0e}" if result["inverted"] else "-"
        cells = [result["name"], result["sites"], result["inverted"], *(f"{share:.1%}" for share in shares), error]
        lines.append(f"| {' | '.join(map(str, cells))} | {_remark(result)} |")
    return [*lines, ""]


def _remark(result: dict) -> str:
    if result["status"] != "passed":
        return f"**failed**: {_cell(result['why'])}"
    rounding = result.get("rounding_error")
    return f"stock fp32 is {rounding:.0e} off float64" if rounding else ""


def _not_checked(results: list[dict]) -> list[str]:
    """Classes by the reason why there is nothing to compare."""
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for result in results:
        if "gradient_error" not in result:
            reasons[result["status"], _cell(result["why"])].append(result["name"])
    lines = ["## Not checked", "", "| why | what the library says | classes |", "| --- | --- | --- |"]
    for (status, why), names in sorted(reasons.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1])):
        lines.append(f"| {status} | {why} | {', '.join(sorted(names))} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    first_line = re.sub(r"\s+", " ", text.strip())[:160]
    return re.sub(r"(/[\w.-]+){3,}", "…", first_line).replace("|", "\\|")
