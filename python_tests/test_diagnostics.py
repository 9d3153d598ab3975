"""The diagnosis: every formula beside numbers worked out by hand, the meter beside dense attention weights."""

import math

import pytest
import torch

from moda_ext.diagnostics import measures

# One head over [text][image][image][text], causal. Weights p_ij, row by row:
WEIGHTS = torch.tensor(
    [
        [1.0, 0.0, 0.0, 0.0],  # text sees itself
        [0.5, 0.5, 0.0, 0.0],  # image
        [0.2, 0.4, 0.4, 0.0],  # image
        [0.1, 0.2, 0.3, 0.4],  # text
    ],
    dtype=torch.float64,
)
MODALITY = torch.tensor([[0, 1, 1, 0]])
ONE_HOT = torch.nn.functional.one_hot(MODALITY[0], 2).double()
MASS = (WEIGHTS @ ONE_HOT)[None]  # (B, N, M)


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=1e-6, atol=1e-7, equal_nan=True)


def sums(mass=MASS, rows=None):
    counts = measures.key_counts(MODALITY, MODALITY)
    flow = measures.sum_rows(mass, MODALITY, 2, rows)
    pairs = measures.sum_rows(counts.double(), MODALITY, 2, rows)
    return flow, pairs


class TestFormulas:
    def test_key_counts_of_causal_rows(self):
        assert measures.key_counts(MODALITY, MODALITY).tolist() == [[[1, 0], [1, 1], [1, 2], [2, 2]]]

    def test_key_counts_without_causality(self):
        assert measures.key_counts(MODALITY, MODALITY, is_causal=False).tolist() == [[[2, 2]] * 4]

    def test_key_counts_of_the_last_rows_and_of_padding(self):
        keys = torch.tensor([[-1, 0, 1, 0]])
        assert measures.key_counts(MODALITY[:, 2:], keys).tolist() == [[[1, 1], [2, 1]]]

    def test_uniform_mass(self):
        counts = torch.tensor([[1, 0], [1, 1], [1, 2], [0, 0]])
        close(measures.uniform_mass(counts), [[1, 0], [0.5, 0.5], [1 / 3, 2 / 3], [0, 0]])

    def test_rows_that_see_all(self):
        counts = measures.key_counts(MODALITY, MODALITY)
        assert measures.rows_that_see_all(counts, MODALITY).tolist() == [[False, True, True, True]]

    def test_no_row_of_a_text_sees_two_modalities(self):
        text = torch.zeros(1, 3, dtype=torch.int64)
        assert not measures.rows_that_see_all(measures.key_counts(text, text), text).any()

    def test_a_third_modality_that_is_absent_hides_no_row(self):
        counts = measures.key_counts(MODALITY, MODALITY, 3)
        assert measures.rows_that_see_all(counts, MODALITY).tolist() == [[False, True, True, True]]

    def test_sums_over_rows(self):
        flow, pairs = sums()
        # text rows: 1 and 0.1 + 0.4 on text, 0.2 + 0.3 on image; image rows: 0.5 + 0.2 and 0.5 + 0.8
        close(flow, [[1.5, 0.5], [0.7, 1.3]])
        close(pairs, [[3, 2], [2, 3]])

    def test_sums_skip_padding_and_rows_not_chosen(self):
        modality = torch.tensor([[0, -1, 1, 0]])
        rows = torch.tensor([[True, True, True, False]])
        close(measures.sum_rows(MASS, modality, 2, rows), [[1.0, 0.0], [0.2, 0.8]])

    def test_sums_keep_heads_and_add_the_batch(self):
        mass = torch.stack([MASS[0], 2 * MASS[0]])[None].expand(3, -1, -1, -1)  # (B, H, N, M)
        flow = measures.sum_rows(mass, MODALITY.expand(3, -1), 2)
        close(flow[0], [[4.5, 1.5], [2.1, 3.9]])
        close(flow[1], [[9.0, 3.0], [4.2, 7.8]])

    def test_self_weight(self):
        close(measures.self_weight(*sums()), [1.5 / 3, 1.3 / 3])

    def test_cross_weight(self):
        close(measures.cross_weight(*sums()), [0.5 / 2, 0.7 / 2])

    def test_cross_weight_pools_all_other_modalities(self):
        flow = torch.tensor([[9.0, 1.0, 2.0], [0.0, 9.0, 0.0], [4.0, 0.5, 9.0]])
        pairs = torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, 0.0], [4.0, 5.0, 1.0]])
        close(measures.cross_weight(flow, pairs), [3 / 6, math.nan, 4.5 / 9])

    @pytest.mark.parametrize(
        ("normalizer", "expected"),
        [
            ("max", [0.25 / 0.5, (1.3 / 3 - 0.35) / (1.3 / 3)]),
            ("sum", [0.25 / 0.75, (1.3 / 3 - 0.35) / (1.3 / 3 + 0.35)]),
            ("self", [0.25 / 0.5, (1.3 / 3 - 0.35) / (1.3 / 3)]),
        ],
    )
    def test_disparity(self, normalizer, expected):
        flow, pairs = sums()
        s, c = measures.self_weight(flow, pairs), measures.cross_weight(flow, pairs)
        close(measures.disparity(s, c, normalizer), expected)

    def test_disparity_where_cross_is_larger(self):
        s, c = torch.tensor([0.2]), torch.tensor([0.8])
        close(measures.disparity(s, c, "max"), [0.75])
        close(measures.disparity(s, c, "sum"), [0.6])
        close(measures.disparity(s, c, "self"), [3.0])

    def test_disparity_refuses_an_unknown_normalizer(self):
        with pytest.raises(ValueError, match="normalizer must be one of max, sum, self, got 'cross'"):
            measures.disparity(torch.ones(2), torch.ones(2), "cross")

    def test_average_difference_is_the_mean_over_layers(self):
        s = torch.tensor([[0.5, 0.4], [0.2, 0.1]])
        c = torch.tensor([[0.25, 0.1], [0.4, 0.1]])
        close(measures.average_difference(s, c), [(0.5 + 0.5) / 2, (0.75 + 0.0) / 2])

    def test_per_token_score(self):
        # text keys get 1 + 0.5 + 0.2 + 0.1 + 0.4 in 5 pairs, image keys 0.5 + 0.8 + 0.5 in 5
        close(measures.per_token_score(*sums()), [2.2 / 5, 1.8 / 5])

    def test_mean_mass(self):
        close(measures.mean_mass(sums()[0], torch.tensor([2.0, 2.0])), [[0.75, 0.25], [0.35, 0.65]])

    def test_dominance_index(self):
        close(measures.dominance_index(*sums()), [1.0, 0.5 / 0.25])

    def test_decay_slope(self):
        c = torch.tensor([[1.0, 0.1], [math.exp(-2), 0.1], [math.exp(-1), 0.1]])
        close(measures.decay_slope(c), [-0.5, 0.0])  # (-1) * 0 + 1 * (-1), over (-1)^2 + 1^2

    def test_decay_slope_needs_two_layers_and_weights(self):
        close(measures.decay_slope(torch.tensor([[0.5, 0.5]])), [math.nan, math.nan])
        close(measures.decay_slope(torch.tensor([[0.5, 0.5], [0.0, math.nan]])), [math.nan, math.nan])

    def test_the_null_of_every_figure(self):
        counts = measures.key_counts(MODALITY, MODALITY)
        flow, pairs = sums(measures.uniform_mass(counts).double())
        s, c = measures.self_weight(flow, pairs), measures.cross_weight(flow, pairs)
        close(s, [1.5 / 3, (1 / 2 + 2 / 3) / 3])
        close(c, [0.5 / 2, (1 / 2 + 1 / 3) / 2])

    def test_the_null_on_rows_that_see_all_is_small_where_that_of_all_rows_is_not(self):
        modality = torch.tensor([[0] * 17 + [1] * 16 + [0] * 5])
        counts = measures.key_counts(modality, modality)
        uniform = measures.uniform_mass(counts)
        text = []
        for rows in (None, measures.rows_that_see_all(counts, modality)):
            flow = measures.sum_rows(uniform, modality, 2, rows)
            pairs = measures.sum_rows(counts.float(), modality, 2, rows)
            text.append(measures.disparity(measures.self_weight(flow, pairs), measures.cross_weight(flow, pairs))[0])
        assert text[0] > 0.6
        assert text[1] < 0.01

    def test_token_similarity(self):
        # unit rows (1, 0), (0, 1), (0.6, 0.8): products 0, 0.6, 0.8; the fourth token is left out
        hidden = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [0.6, 0.8], [5.0, 5.0]]])
        chosen = torch.tensor([[True, True, True, False]])
        close(measures.token_similarity(hidden, chosen), [1.4 / 3])
        close(measures.token_similarity(hidden, torch.tensor([[True, False, False, False]])), [math.nan])
