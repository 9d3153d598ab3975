"""The alignment operators composed of PyTorch's own (for GPUs), against the reference, on the CPU; and their sizes."""

import pytest
import torch
from graphs import sizes_in_graphs

from moda_ext import alignment, reference
from moda_ext._ops import backend
from moda_ext.functional import composite
from moda_ext.functional.gram import causal_gram_scale

BATCH, HEADS, KV_HEADS, SIZE, MODALITIES, RANK = 2, 4, 2, 16, 3, 4


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


class Problem:
    def __init__(self, rows, columns, with_state):
        self.query = random(BATCH, HEADS, rows, SIZE)
        self.key = random(BATCH, KV_HEADS, columns, SIZE)
        self.modality = torch.randint(-1, MODALITIES, (BATCH, columns))
        self.query_modality = self.modality[:, columns - rows :]
        down, up = (MODALITIES, SIZE, RANK), (MODALITIES, RANK, SIZE)
        self.weights = [random(*shape) for shape in (down, up, down, up)]
        self.state = None
        if with_state:
            gram = torch.randn(BATCH, KV_HEADS, MODALITIES, SIZE, SIZE, dtype=torch.float64)
            trace = torch.rand(BATCH, KV_HEADS, MODALITIES, dtype=torch.float64) + 1
            self.state = ((gram @ gram.mT).requires_grad_(), trace)
        self.scale, _ = causal_gram_scale(
            self.key, self.query_modality, self.modality, MODALITIES, "l2", "trace", 1e-6, self.state
        )
        self.initial = None if self.state is None else self.state[0]
        self.inputs = [self.query, self.key, *self.weights, *([] if self.initial is None else [self.initial])]

    def expect_equal(self, results, expected):
        for result, oracle in zip(results, expected, strict=True):
            torch.testing.assert_close(result, oracle, rtol=1e-11, atol=1e-12)
            weight = torch.randn_like(oracle)
            grads = [
                torch.autograd.grad((x * weight).sum(), self.inputs, retain_graph=True, materialize_grads=True)
                for x in (result, oracle)
            ]
            for grad, grad_of_oracle in zip(*grads, strict=True):
                torch.testing.assert_close(grad, grad_of_oracle, rtol=1e-10, atol=1e-11)


SIZES = pytest.mark.parametrize(
    ("rows", "columns", "with_state"), [(300, 300, False), (128, 128, True), (1, 1, True), (170, 300, True)]
)


@SIZES
def test_causal_gram_projection(rows, columns, with_state):
    p = Problem(rows, columns, with_state)
    results = composite.causal_gram_projection(
        p.query, p.key, p.modality.int(), p.scale, p.initial, MODALITIES, True, 1e-6
    )
    projection, (gram, _) = reference.causal_gram_projection(
        p.query, p.key, p.query_modality, p.modality, MODALITIES, state=p.state, return_state=True
    )
    p.expect_equal(results, (projection, gram))


@SIZES
def test_duplex_query_views(rows, columns, with_state):
    p = Problem(rows, columns, with_state)
    views, square, gram = composite.duplex_query_views(
        p.query, p.key, p.modality.int(), p.scale, *p.weights, p.initial, MODALITIES, True, 1e-6, True, True
    )
    indicator = (square.unflatten(1, (KV_HEADS, -1)) * p.scale.unsqueeze(2)).flatten(1, 2)
    expected_views, expected_indicator, (expected_gram, _) = reference.duplex_query_views(
        p.query,
        p.key,
        p.query_modality,
        p.modality,
        *p.weights,
        MODALITIES,
        state=p.state,
        return_indicator=True,
        return_state=True,
    )
    p.expect_equal((views, indicator, gram), (expected_views, expected_indicator, expected_gram))


def test_modality_gram():
    p = Problem(1, 200, False)
    expected = reference.modality_gram(p.key, p.modality, MODALITIES, normalize=None)
    p.expect_equal([composite.modality_gram(p.key, p.modality.int(), MODALITIES, True, 1e-6)], [expected])


@pytest.mark.parametrize("position", [0, 127, 128, 250])
def test_no_row_sees_a_later_token(position):
    p = Problem(300, 300, False)
    changed = p.key.detach().clone()
    changed[:, :, position + 1 :] = 7
    rows = [
        composite.causal_gram_projection(p.query, key, p.modality.int(), p.scale, None, MODALITIES, True, 1e-6)[0]
        for key in (p.key, changed)
    ]
    assert torch.equal(rows[0][..., : position + 1, :], rows[1][..., : position + 1, :])


# Functions as users call them, on one head of 64 numbers with two modalities, so that a square of tokens is far larger
# than what there is for each token: the views, and a state for each chunk of 128.
OF_USERS = {
    "modality_gram": lambda query, key, ids, *weights: alignment.modality_gram(key, ids).sum(),
    "causal_gram_projection": lambda query, key, ids, *weights: alignment.causal_gram_projection(
        query, key, ids, ids
    ).sum(),
    "duplex_query_views": lambda query, key, ids, *weights: sum(
        result.sum() for result in alignment.duplex_query_views(query, key, ids, ids, *weights, return_indicator=True)
    ),
}


@pytest.mark.parametrize("name", OF_USERS)
def test_no_matrix_of_all_pairs_and_nothing_that_waits(name, monkeypatch):
    monkeypatch.setattr(backend, "choose", lambda *arguments, **options: backend.COMPOSITE)
    length, size = 16384, 64

    def make():
        tokens = (torch.randn(1, 1, length, size, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        shapes = ((2, size, 16), (2, 16, size)) * 2
        weights = (torch.randn(shape, requires_grad=True) for shape in shapes)
        return *tokens, torch.zeros(1, length, dtype=torch.int32), *weights

    largest = sizes_in_graphs(OF_USERS[name], make)[0]
    assert largest <= 2 * length * 128  # the pairs are 2^28: 64 times as many


@pytest.mark.parametrize("keys", [0, 4])
def test_no_rows(keys, monkeypatch):
    """And perhaps no keys: sums of nothing."""
    monkeypatch.setattr(backend, "choose", lambda *_, **__: backend.COMPOSITE)
    query, key, ids = torch.randn(2, 4, 0, 16), torch.randn(2, 2, keys, 16), torch.zeros(2, keys, dtype=torch.int64)
    found, (gram, _) = alignment.causal_gram_projection(query, key, ids[:, :0], ids, return_state=True)
    expected, (of_oracle, _) = reference.causal_gram_projection(query, key, ids[:, :0], ids, return_state=True)
    assert found.shape == expected.shape == (2, 2, 4, 0, 16)
    torch.testing.assert_close(gram, of_oracle)
