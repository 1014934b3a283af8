"""Examples of all kernels."""

from tests.kernels.triton import attention_examples, moe_examples

EXAMPLES = [*attention_examples.EXAMPLES, *moe_examples.EXAMPLES]


def targets_of(kernel: str) -> set[str]:
    """Those that have its types."""
    return {target for example in EXAMPLES if example.kernel == kernel for target in example.targets}
