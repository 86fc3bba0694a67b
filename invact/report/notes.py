"""What else the reader of a plan should know, in sentences. Each is explained on the docs' page of reasons."""

from __future__ import annotations

from invact.report.amounts import format_bytes
from invact.report.report import Report
from invact.report.sentences import NOTICEABLE

EVALUATION_MODE = (
    "counted in evaluation mode, in which the model is: its dropouts keep nothing; call model.train() before "
    "planning if you train in that mode."
)
PATCHED_BEFORE = (
    "the model was patched before, and activations that its patched modules write out are not looked for again; "
    "invact.unpatch(model) gives it back."
)
NO_SITE_LEFT = "include and exclude leave no site: they are glob patterns over the paths of the sites."
HOOKS_REFUSED = (
    "nothing is derived, since the model enters torch.func or disable_saved_tensors_hooks in its forward, "
    "which refuse hooks on what autograd keeps; what is kept inside is not counted."
)


def changed_unseen(what: str) -> str:
    """Args:
    what: changes a tensor in place.
    """
    return (
        f"nothing is derived, since {what} changes a tensor of the graph in place "
        "where autograd does not see it, under no_grad or through detach or .data: made again, it would lack the "
        "change."
    )


def checkpointed_regions(count: int) -> str:
    return (
        f"{count} checkpointed regions keep nothing between forward and backward; bytes_saved of "
        "the sites inside tells by how much their own peak falls while they are recomputed."
    )


def already_patched(count: int) -> str:
    return f"{count} sites were patched before; invact.unpatch(model) gives them back."


def what_is_approximate(report: Report, bits: int) -> str:
    return (
        f"the gradients through {len(report.approximate)} of {len(report.sites)} sites are approximate, as "
        f"few_bits={bits} asks for: each is one of {1 << bits} slopes times the gradient of the output."
    )


def on_loss(report: Report, tokens: int, vocabulary: int) -> str | None:
    """What the loss of a language model keeps of all that is kept after, and who has one that keeps less.

    Args:
        tokens, vocabulary: as many as the loss has logits of; a vocabulary of 0 is no language model's.
    """
    if not vocabulary or report.loss_bytes < NOTICEABLE * report.bytes_after:
        return None
    return (
        f"the loss keeps {format_bytes(report.loss_bytes)}, logits of {tokens:,} tokens for {vocabulary:,} "
        "entries. A loss taken in chunks of tokens would save nearly all of that, and the largest tensors of the turn "
        "from forward to backward: TRL's SFTTrainer has one, others are Liger Kernel's fused linear cross entropy and "
        "cut-cross-entropy."
    )
