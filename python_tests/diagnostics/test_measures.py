"""The formulas of the diagnosis beside numbers worked out by hand."""

import math

import pytest
import torch
from diagnosed import MASS, MODALITY, ONE_HOT, WEIGHTS, close

from moda_ext.diagnostics import measures


def sum_rows(values, modality, rows=None):
    return measures.sum_rows(values, measures.choose_rows(modality, 2, rows))


def sums(mass=MASS, rows=None):
    counts = measures.key_counts(MODALITY, MODALITY)
    flow = sum_rows(mass, MODALITY, rows)
    pairs = sum_rows(counts.double(), MODALITY, rows)
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
        close(sum_rows(MASS, modality, rows), [[1.0, 0.0], [0.2, 0.8]])

    def test_sums_keep_heads_and_add_the_batch(self):
        mass = torch.stack([MASS[0], 2 * MASS[0]])[None].expand(3, -1, -1, -1)  # (B, H, N, M)
        flow = sum_rows(mass, MODALITY.expand(3, -1))
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

    def test_attention_efficiency(self):
        # text rows: weight 1.5 of 2 in 3 of 5 pairs on text, 0.5 of 2 in 2 of 5 on image; MDI is the ratio
        close(measures.attention_efficiency(*sums()), [(1.5 / 2) / (3 / 5), (0.5 / 2) / (2 / 5)])
        aei = measures.attention_efficiency(*sums())
        torch.testing.assert_close(aei[0] / aei, measures.dominance_index(*sums()))

    def test_attention_efficiency_without_pairs_or_attention(self):
        flow, pairs = torch.tensor([[1.5, 0.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [2.0, 3.0]])
        close(measures.attention_efficiency(flow, pairs), [1.0, math.nan])
        close(measures.attention_efficiency(torch.zeros(2, 2), pairs), [math.nan, math.nan])

    def test_mdi_and_aei_as_published_by_hand(self):
        """[text][image][image] is the prompt, the last row the one generated token; its own key does not count.

        0.1 + 0.2 + 0.3 goes to the prompt: 1/6 to one text token, 5/6 to two image tokens.
        """
        prompt = (WEIGHTS[3, :3] @ ONE_HOT[:3]).reshape(1, 1, 1, 2)
        flow = measures.sum_rows(measures.prompt_shares(prompt), torch.tensor([[[True, False]]]))[0]
        pairs = torch.tensor([[1, 2], [0, 0]])
        close(flow, [[1 / 6, 5 / 6], [0, 0]])
        close(measures.dominance_index(flow, pairs), [1.0, (1 / 6) / (5 / 12)])
        close(measures.attention_efficiency(flow, pairs), [(1 / 6) / (1 / 3), (5 / 6) / (2 / 3)])

    def test_shares_of_the_prompt_are_of_the_mean_over_heads(self):
        """The heads give the prompt 0.8 and 0.2, 0.5 in the mean; the second row nothing."""
        mass = torch.tensor([[[0.6, 0.2], [0.0, 0.0]], [[0.1, 0.1], [0.0, 0.0]]])
        close(measures.prompt_shares(mass), [[[1.2, 0.4], [0, 0]], [[0.2, 0.2], [0, 0]]])

    def test_thirds_of_layers(self):
        borders = [[(third.start, third.stop) for third in measures.split_in_thirds(n)] for n in (32, 6, 4, 2)]
        assert borders == [
            [(0, 11), (11, 21), (21, 32)],
            [(0, 2), (2, 4), (4, 6)],
            [(0, 1), (1, 3), (3, 4)],
            [(0, 1), (1, 1), (1, 2)],
        ]

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

    def null_of(self, question, rows="all"):
        """(text, vision) AvgDiff of uniform attention in [17 text][16 image][question]."""
        modality = torch.tensor([[0] * 17 + [1] * 16 + [0] * question])
        counts = measures.key_counts(modality, modality)
        rows = None if rows == "all" else measures.rows_that_see_all(counts, modality)
        flow = sum_rows(measures.uniform_mass(counts.double()), modality, rows)
        pairs = sum_rows(counts.double(), modality, rows)
        return measures.disparity(measures.self_weight(flow, pairs), measures.cross_weight(flow, pairs)).tolist()

    def test_the_null_of_a_layout_by_hand(self):
        """The 0.68 of text before an image: it takes a question of three tokens, and falls as the question grows.

        Text rows 1 to 17 see text only, with weight 1 over 1 to 17 keys; rows 34 to 36 see 18 to 20 text and 16 image
        keys.
        """
        within = (17 + 18 / 34 + 19 / 35 + 20 / 36) / (17 * 18 / 2 + 18 + 19 + 20)
        across = (1 / 34 + 1 / 35 + 1 / 36) / 3
        assert self.null_of(3)[0] == pytest.approx(1 - across / within)
        assert round(1 - across / within, 2) == 0.68
        assert [round(self.null_of(n)[0], 2) for n in (5, 17, 30, 100)] == [0.64, 0.48, 0.35, 0.01]

    def test_the_null_on_rows_that_see_both_by_hand(self):
        """There a text row's weights are all equal, 1 over its keys: what is left is that later rows see more text."""
        within = (18 / 34 + 19 / 35 + 20 / 36) / (18 + 19 + 20)
        across = (1 / 34 + 1 / 35 + 1 / 36) / 3
        assert self.null_of(3, "both")[0] == pytest.approx(1 - within / across)
        assert 1 - within / across == pytest.approx(0.001, abs=1e-4)
        assert [round(self.null_of(n, "both")[0], 2) for n in (5, 22, 46)] == [0.0, 0.03, 0.08]
        within = sum(k / (17 + k) for k in range(1, 17)) / sum(range(1, 17))  # image row k sees 17 + k keys
        across = sum(1 / (17 + k) for k in range(1, 17)) / 16
        assert self.null_of(3, "both")[1] == self.null_of(3)[1] == pytest.approx(1 - within / across)
        assert 1 - within / across == pytest.approx(0.10, abs=1e-3)

    def test_token_similarity(self):
        # unit rows (1, 0), (0, 1), (0.6, 0.8): products 0, 0.6, 0.8; the fourth token is left out
        hidden = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [0.6, 0.8], [5.0, 5.0]]])
        chosen = torch.tensor([[True, True, True, False]])
        close(measures.token_similarity(hidden, chosen), [1.4 / 3])
        close(measures.token_similarity(hidden, torch.tensor([[True, False, False, False]])), [math.nan])
