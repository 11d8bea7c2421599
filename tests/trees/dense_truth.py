"""Attention over a token tree in float64 with a dense mask, and inputs to compare it on."""

import torch

from cwdpo_kernels.trees import TokenTree, tree_attention

TREES = {
    "pair": TokenTree.of_answers([9], [[3, 5]]),
    "pairs": TokenTree.of_answers([9, 1, 4], [[3, 5], [0, 1], [2, 0]]),
    "eight answers": TokenTree.of_answers([17], [[1, 2, 3, 4, 5, 6, 7, 8]]),
    "no answers": TokenTree((6,), (-1,)),
    "deep": TokenTree((5, 4, 3, 2, 2, 6, 4), (-1, 0, 1, 1, 0, -1, 5)),
    "empty in between": TokenTree((5, 0, 3, 2), (-1, 0, 1, 1)),
    "long": TokenTree.of_answers([300], [[150, 20]]),
}


def visible(tree: TokenTree, window: int | None) -> torch.Tensor:
    """[T, T], token by token from the parents."""
    owner = [segment for segment, length in enumerate(tree.lengths) for _ in range(length)]
    position = tree.positions().tolist()
    allowed = torch.zeros(tree.tokens, tree.tokens, dtype=torch.bool)
    for i in range(tree.tokens):
        for j in range(tree.tokens):
            distance = position[i] - position[j]
            allowed[i, j] = owner[j] in tree.path(owner[i]) and 0 <= distance < (window or 10**9)
    return allowed


def truth(query, key, value, allowed, scale, softcap):
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    score = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    return score.masked_fill(~allowed, -torch.inf).softmax(-1) @ value


def inputs(tree, heads=4, groups=2, width=8, value_width=8, batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, width), (groups, width), (groups, value_width), (heads, value_width))
    return [
        torch.randn(batch, n, tree.tokens, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n, d in shapes
    ]


def compare(tree, tolerance=4e-6, window=None, softcap=None, scale=0.5, masks=None, allowed=None, kernel=None, **shape):
    *leaves, grad = inputs(tree, **shape)
    out = tree_attention(*leaves, tree, scale=scale, window=window, softcap=softcap, masks=masks, kernel=kernel)
    out.backward(grad)
    exact = [each.detach().double().requires_grad_() for each in leaves]
    allowed = visible(tree, window) if allowed is None else allowed
    expected = truth(*exact, allowed, scale, softcap)
    expected.backward(grad.double())
    for ours, theirs in zip([out, *(x.grad for x in leaves)], [expected, *(x.grad for x in exact)], strict=True):
        assert ours.dtype == leaves[0].dtype
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance * max(1.0, theirs.abs().max().item()), rtol=0)
