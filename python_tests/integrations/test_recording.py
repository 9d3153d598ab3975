"""What a recorder sees of an attention call: its weights, held against the float64 reference."""

import math

import pytest
import torch

from moda_ext import reference
from moda_ext.integrations.recording import AttentionRecord

NUM_MODALITIES = 3
QUERY_MODALITY = torch.tensor([[0, 2, 1, 0, 0], [1, 1, 0, 0, -1]], dtype=torch.int32)
KEY_MODALITY = torch.tensor([[-1, 0, 1, 0, 2, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0, -1]], dtype=torch.int32)
LOWEST = torch.finfo(torch.float32).min


def make_record(bias=None, *, sink=-1.0, views=False, visible=None, split=False, dtype=torch.float32):
    """``(record in dtype, weights in float64)``; the mass and the lse are those of float64, rounded once.

    The oracle gets bias and sink without the number that is common to a row, which even float64 could not hold.
    """
    torch.manual_seed(0)
    shape = (NUM_MODALITIES, 2, 4, 5, 8) if views else (2, 4, 5, 8)
    query, key = torch.randn(shape, dtype=torch.float64), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    bias = None if bias is None else torch.as_tensor(bias, dtype=torch.float64).expand(2, 4, 5, NUM_MODALITIES)
    sink, common = torch.full((2, 4, 5), sink, dtype=torch.float64), torch.zeros(2, 4, 5, dtype=torch.float64)
    if bias is not None:
        common = bias.amax(dim=-1)
        common = common.masked_fill(common == -math.inf, 0.0)
    eye = torch.eye(8, dtype=torch.float64).expand(2, 4, 8, 8)  # the output of these values is the weights

    def dense(bias):
        return reference.dense_attention(
            query,
            key.repeat_interleave(2, dim=1),
            eye,
            KEY_MODALITY.long(),
            num_modalities=NUM_MODALITIES,
            modality_bias=None if bias is None else bias - common[..., None],
            sink=sink - common,
            is_causal=visible is None,
            visible=visible,
            scale=0.7,
        )

    if split:
        own = QUERY_MODALITY[:, None, :, None] == torch.arange(NUM_MODALITIES)
        zero = torch.zeros(()) if bias is None else bias
        sides = [dense(zero.masked_fill(side, -math.inf)) for side in (~own, own)]
        weights, mass = (torch.lerp(cross, self, 0.3) for self, cross in ((sides[0][i], sides[1][i]) for i in (0, 2)))
        lse = None
    else:
        weights, lse, mass = dense(bias)
        lse = lse + common
    record = AttentionRecord(
        layer=0,
        mass=mass.to(dtype),
        lse=None if lse is None else lse.to(dtype),
        query_modality=QUERY_MODALITY,
        key_modality=KEY_MODALITY,
        query=query.to(dtype),
        key=key.to(dtype),
        scale=0.7,
        bias=None if bias is None else bias.to(dtype),
        visible=visible,
    )
    return record, weights * (QUERY_MODALITY >= 0)[:, None, :, None]


def assert_exact(found, expected):
    assert not found.isnan().any()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


class TestWeights:
    """``mass`` times the softmax within a modality: neither the bias nor the log-sum-exp is needed."""

    @pytest.mark.parametrize(
        "bias",
        [
            None,
            0.0,
            [0.3, -0.7, 1.1],
            -1e9,
            [-1e9, -1e9, 0.0],
            [-1e9, -1e9, -math.inf],
            LOWEST,
            [LOWEST, 0.0, LOWEST],
            [-math.inf, 0.0, -math.inf],
            -math.inf,
            1e9,
        ],
        ids=str,
    )
    def test_do_not_feel_how_large_the_bias_is(self, bias):
        sink = -math.inf if bias in (-1e9, LOWEST) else -1.0  # beside a sink nothing would be left
        record, expected = make_record(bias, sink=sink)
        assert_exact(record.weights(), expected)

    @pytest.mark.parametrize("bias", [None, -1e9, LOWEST])
    def test_of_query_views(self, bias):
        record, expected = make_record(bias, sink=-math.inf, views=True)
        assert_exact(record.weights(), expected)

    @pytest.mark.parametrize("bias", [None, [0.3, -0.7, 1.1], [-1e9, -1e9, 0.0]], ids=str)
    def test_of_a_split_softmax(self, bias):
        record, expected = make_record(bias, split=True)
        assert_exact(record.weights(), expected)

    def test_under_a_mask_of_the_model(self):
        visible = torch.rand(2, 1, 5, 8, generator=torch.Generator().manual_seed(3)) > 0.4
        visible[:, :, 2] = False  # a row that sees nothing
        record, expected = make_record([-1e9, 0.0, LOWEST], visible=visible)
        assert_exact(record.weights(), expected)
        assert record.weights()[:, :, 2].abs().max() == 0

    def test_in_blocks(self):
        record, expected = make_record(-1e9, sink=-math.inf, views=True)
        found = torch.cat([record.weights(start, start + 2) for start in (0, 2, 4)], dim=2)
        assert_exact(found, expected)
        assert record.weights(3, 3).shape == (2, 4, 0, 8)

    @pytest.mark.parametrize("views", [False, True])
    def test_mass_on_some_keys_is_their_sum(self, views):
        """In any order of the columns, also with columns that are of another modality in one of the sequences."""
        record, expected = make_record([-1e9, 0.0, 0.5], views=views)
        generator = torch.Generator().manual_seed(4)
        for m in range(NUM_MODALITIES):
            members = torch.eq(KEY_MODALITY, m)
            keys = members.any(dim=0).nonzero()[:, 0].flip(0)
            chosen = torch.rand(2, 3, len(keys), generator=generator) > 0.5
            of_m = members[:, None, None, keys] & chosen[:, None]
            total = (expected[:, :, 1:4, keys] * of_m).sum(dim=-1)
            assert_exact(record.mass_on(chosen, m, 1, keys), total)

    @pytest.mark.parametrize("views", [False, True])
    @pytest.mark.parametrize("bias", [None, [0.3, -0.7, 1.1], -math.inf], ids=str)
    def test_mass_besides_some_keys_is_that_on_the_others(self, bias, views):
        record, expected = make_record(bias, views=views)
        rows, columns = QUERY_MODALITY[:, 1:4] >= 0, torch.arange(8)
        chosen = (columns == 4).expand(2, 3, 8)
        asked = 0
        for m in range(NUM_MODALITIES):
            members = torch.eq(KEY_MODALITY, m)[:, None]
            left = (expected[:, :, 1:4] * (members & ~chosen)[:, None]).sum(dim=-1)
            total = (expected[:, :, 1:4] * members[:, None]).sum(dim=-1)
            found = record.mass_besides(chosen, m, 1, columns, rows)
            error = (1 + record.lse[:, :, 1:4].abs()) * torch.finfo(torch.float32).eps * total
            assert (found is None) == bool(((error > 1e-4 * left) & rows[:, None]).any())
            for keys in (columns, torch.tensor([4, 2]), columns.flip(0)):
                found = record.mass_besides(chosen[..., keys], m, 1, keys, rows)
                if found is not None:
                    asked += 1
                    rows_of_heads = rows[:, None].expand_as(left)
                    torch.testing.assert_close(found[rows_of_heads].double(), left[rows_of_heads], rtol=1e-4, atol=0.0)
        assert asked

    def test_mass_besides_is_none_where_a_difference_would_cost_digits(self):
        columns, rows = torch.arange(8), QUERY_MODALITY >= 0
        some, every = torch.zeros(2, 5, 8, dtype=torch.bool), torch.ones(2, 5, 8, dtype=torch.bool)
        for given in ({"split": True}, {"bias": 1e6}):
            record, _ = make_record(**{"bias": None, **given})
            assert record.mass_besides(some, 0, 0, columns, rows) is None
        record, _ = make_record(None)
        assert record.mass_besides(every, 0, 0, columns, rows) is None
        assert record.mass_besides(every, 0, 0, columns, torch.zeros_like(rows)) is not None
        assert_exact(record.mass_besides(some, 0, 0, columns, rows)[0], record.mass[0, ..., 0].double())

    def test_padding_may_hold_anything(self):
        record, expected = make_record([0.3, -0.7, 1.1])
        record.key.mT[:, :, :, 0][0] = math.nan
        record.query[1, :, 4] = math.inf
        record.mass[1, :, 4] = math.nan
        assert_exact(record.weights(), expected)


class TestWeightOfOneKey:
    INDEX = torch.tensor([2, 0])

    @pytest.mark.parametrize("views", [False, True])
    @pytest.mark.parametrize("bias", [None, [0.3, -0.7, 1.1], [LOWEST, 0.0, -math.inf], -math.inf], ids=str)
    def test_is_a_column_of_the_weights(self, bias, views):
        record, expected = make_record(bias, views=views)
        found = record.weight_of(self.INDEX).masked_fill((QUERY_MODALITY < 0)[:, None], 0.0)
        assert_exact(found, torch.stack([expected[b, :, :, j] for b, j in enumerate(self.INDEX)]))

    @pytest.mark.parametrize("bias", [-1e9, LOWEST, 1e9])
    def test_is_nan_where_float32_cannot_hold_it(self, bias):
        record, expected = make_record(bias, sink=-math.inf)
        seen = torch.stack([expected[b, :, :, j] for b, j in enumerate(self.INDEX)]) > 0
        found = record.weight_of(self.INDEX)
        assert torch.equal(found.isnan() | (QUERY_MODALITY < 0)[:, None], seen | (QUERY_MODALITY < 0)[:, None])
        in_double, _ = make_record(-1e9, sink=-math.inf, dtype=torch.float64)
        assert not in_double.weight_of(self.INDEX).isnan().any()

    def test_is_nan_in_a_split_softmax(self):
        record, _ = make_record(split=True)
        assert torch.equal(record.weight_of(self.INDEX)[0].isnan(), record.sees(self.INDEX)[0].expand(4, -1))
