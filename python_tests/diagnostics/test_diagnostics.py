"""The diagnosis: every formula beside numbers worked out by hand, the meter beside dense attention weights."""

import dataclasses
import importlib
import math
import os
import time
import types

import pytest
import torch
from torch import nn

from moda_ext.attention import AttentionState, ModularDuplexAttention
from moda_ext.diagnostics import AttentionBalanceLoss, AttentionMeter, Diagnosis, figures, measures
from moda_ext.diagnostics import meter as meter_module
from moda_ext.diagnostics.attach import recorded

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


# The meter beside dense weights ---------------------------------------------------------------------------------------
TOKENS = torch.tensor(  # text, image, text; with padding on the left; an image first; text alone
    [
        [0, 0, 0, 1, 1, 1, 1, 0, 0, 0],
        [-1, -1, 0, 1, 1, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, -1, -1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)


def dense_figures(weights, modality, visible, rows, first_token):
    """s_m, c_m and r_m from dense weights (B, H, N, N), one pair after the other in float64: head means."""
    weights = weights.double().mean(dim=1)
    both = {m: (modality == m).any(dim=1) for m in (0, 1)}
    of = {"self": {0: [], 1: []}, "cross": {0: [], 1: []}, "score": {0: [], 1: []}}
    for b in range(len(modality)):
        first = next(j for j, m in enumerate(modality[b].tolist()) if m >= 0)
        for i, a in enumerate(modality[b].tolist()):
            seen = [j for j, m in enumerate(modality[b].tolist()) if visible[b, i, j] and m >= 0]
            if a < 0:
                continue
            kinds = {modality[b, j].item() for j in seen}
            if rows == "both" and not (both[0][b] and both[1][b] and kinds == {0, 1}):
                continue
            for j in seen:
                if j == first and not first_token:
                    continue
                m = modality[b, j].item()
                of["self" if m == a else "cross"][a].append(weights[b, i, j].item())
                of["score"][m].append(weights[b, i, j].item())
    return {
        name: torch.tensor([sum(v) / len(v) if v else math.nan for v in values.values()], dtype=torch.float64)
        for name, values in of.items()
    }


def assert_equals_dense(diagnosis, weights, modality, visible, tolerance=1e-5):
    """``weights``: one (B, H, N, N) for each layer."""
    for rows in ("all", "both"):
        for first_token in (True, False):
            for name in ("self", "cross", "score"):
                found = diagnosis.figure(name, rows=rows, first_token=first_token)
                by_head = diagnosis.figure(name, rows=rows, first_token=first_token, per_head=True)
                for layer, dense in enumerate(weights):
                    expected = dense_figures(dense, modality, visible, rows, first_token)[name]
                    torch.testing.assert_close(found[layer], expected, rtol=0, atol=tolerance, equal_nan=True)
                    head = dense_figures(dense[:, 1:2], modality, visible, rows, first_token)[name]
                    torch.testing.assert_close(by_head[layer, 1], head, rtol=0, atol=tolerance, equal_nan=True)
            uniform = visible / visible.sum(dim=-1, keepdim=True).clamp(min=1)
            if not first_token:  # uniform over the pairs that are left
                first = (modality >= 0).int().argmax(dim=1)
                others = visible.clone()
                others[torch.arange(len(first)), :, first] = False
                uniform = others / others.sum(dim=-1, keepdim=True).clamp(min=1)
            for name in ("self", "cross", "score"):
                expected = dense_figures(uniform[:, None], modality, visible, rows, first_token)[name]
                found = diagnosis.figure(name, rows=rows, first_token=first_token, null=True)
                torch.testing.assert_close(found[0], expected, rtol=0, atol=tolerance, equal_nan=True)


def visible_pairs(modality, is_causal=True):
    """(B, N, N), bool."""
    n = modality.shape[1]
    visible = (modality >= 0)[:, None].expand(-1, n, -1)
    return visible & torch.ones(n, n, dtype=torch.bool).tril() if is_causal else visible.clone()


class Stack(nn.Module):
    """A model of layers of this package."""

    def __init__(self, layers=2, **options):
        super().__init__()
        self.layers = nn.ModuleList(ModularDuplexAttention(32, 4, 2, **options) for _ in range(layers))

    def forward(self, x, modality):
        for layer in self.layers:
            x = x + layer(x, modality)
        return x


def make_stack(trained=True, **options):
    torch.manual_seed(0)
    stack = Stack(**options)
    for name, parameter in stack.named_parameters():
        if trained and "_proj" not in name:
            nn.init.normal_(parameter, std=0.5)
    for layer in stack.layers:
        nn.init.normal_(layer.q_proj.weight, std=0.5)
    return stack


class Dense:
    """A recorder that keeps the weights of each layer, (B, H, N, N)."""

    def __init__(self):
        self.weights = []

    def __call__(self, record):
        self.weights.append(record.weights().detach())


def measured(model, *inputs, **options):
    with torch.no_grad(), AttentionMeter(model, **options) as meter:
        model(*inputs)
    return meter.result()


def dense_weights(model, *inputs):
    dense = Dense()
    with torch.no_grad(), recorded(model, dense):
        model(*inputs)
    return dense.weights


class TestMeterOnOwnLayers:
    X = torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize("is_causal", [True, False])
    def test_equals_dense_weights(self, is_causal):
        stack = make_stack(is_causal=is_causal)
        diagnosis = measured(stack, self.X, TOKENS)
        weights = dense_weights(stack, self.X, TOKENS)
        assert_equals_dense(diagnosis, weights, TOKENS, visible_pairs(TOKENS, is_causal))
        assert diagnosis.sequences == 4
        assert diagnosis.tokens == {"text": 24, "vision": 12}

    def test_recorded_weights_are_those_of_the_output(self):
        """The oracle above, held against a layer whose attention is plain: torch's own softmax."""
        stack = make_stack(layers=1, aligner=False, mask=False, rope_base=None)
        layer = stack.layers[0]
        query, key = (
            project(self.X).unflatten(-1, (-1, 8)).transpose(1, 2) for project in (layer.q_proj, layer.k_proj)
        )
        scores = query @ key.repeat_interleave(2, dim=1).mT * 8**-0.5
        visible = visible_pairs(TOKENS)[:, None]
        expected = scores.masked_fill(~visible, -1e30).softmax(dim=-1).masked_fill(~visible, 0.0)
        (found,) = dense_weights(stack, self.X, TOKENS)
        rows = (TOKENS >= 0)[:, None, :, None]
        torch.testing.assert_close(found * rows, expected * rows)

    def test_a_split_softmax_has_no_figures_without_the_first_token(self):
        diagnosis = measured(make_stack(mask={"softmax": "split"}), self.X, TOKENS)
        assert diagnosis.figure("self").isfinite().all()
        assert diagnosis.figure("self", first_token=False).isnan().all()
        assert any("first token alone cannot be told" in sentence for sentence in diagnosis.undefined())

    def test_a_split_softmax_has_token_scores(self):
        stack = make_stack(mask={"softmax": "split"})
        (scores,) = measured(stack, self.X, TOKENS, token_scores=1).token_scores
        for layer, dense in enumerate(dense_weights(stack, self.X, TOKENS)):
            torch.testing.assert_close(scores.scores[layer], dense[0, :, 7:].mean(dim=(0, 1)))

    def test_batches_add_up(self):
        stack = make_stack()
        whole = measured(stack, self.X, TOKENS)
        with torch.no_grad(), AttentionMeter(stack) as meter:
            for b in (2, 0, 3, 1):
                kept = TOKENS[b : b + 1] >= 0  # without padding
                stack(self.X[b][kept[0]][None], TOKENS[b][kept[0]][None])
        assert meter.result().sequences == 4
        for name in ("self", "cross", "score", "sink"):
            for null in (False, True):
                torch.testing.assert_close(
                    meter.result().figure(name, null=null), whole.figure(name, null=null), rtol=1e-5, atol=1e-6
                )

    def test_decoding_steps_add_up_to_one_call(self):
        stack = make_stack()
        layer = stack.layers[0]
        x, modality = self.X[:1], TOKENS[:1]
        with torch.no_grad(), AttentionMeter(layer) as whole:
            layer(x, modality)
        state = AttentionState()
        with torch.no_grad(), AttentionMeter(layer) as steps:
            layer(x[:, :8], modality[:, :8], state=state)
            for i in (8, 9):
                layer(x[:, i : i + 1], modality[:, i : i + 1], state=state)
        assert steps.result().sequences == 1
        for name in ("self", "cross", "score", "sink"):
            for first_token in (True, False):
                a, b = (meter.result().figure(name, first_token=first_token) for meter in (whole, steps))
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def test_token_scores_are_the_columns_of_the_text_rows(self):
        stack = make_stack()
        scores = measured(stack, self.X, TOKENS, token_scores=9).token_scores
        weights = dense_weights(stack, self.X, TOKENS)
        chosen = {0: [7, 8, 9], 1: [5, 8, 9], 2: [4, 5, 6, 7]}  # text rows that see both; the fourth has none
        assert len(scores) == 3
        visible = visible_pairs(TOKENS)
        for (b, rows), found in zip(chosen.items(), scores, strict=True):
            torch.testing.assert_close(found.modality.long(), TOKENS[b])
            for layer, dense in enumerate(weights):
                torch.testing.assert_close(found.scores[layer], dense[b, :, rows].mean(dim=(0, 1)))
            uniform = (visible[b] / visible[b].sum(dim=-1, keepdim=True).clamp(min=1))[rows].mean(dim=0)
            torch.testing.assert_close(found.uniform, uniform)

    def test_token_scores_in_small_blocks(self, monkeypatch):
        stack = make_stack(is_causal=False)
        whole = measured(stack, self.X, TOKENS, token_scores=9).token_scores
        monkeypatch.setattr(meter_module, "BLOCK_ELEMENTS", 4 * 4 * 10 * 3)  # three rows
        for a, b in zip(whole, measured(stack, self.X, TOKENS, token_scores=9).token_scores, strict=True):
            torch.testing.assert_close(a.scores, b.scores)

    def test_token_scores_of_the_first_sequences_only(self):
        stack = make_stack()
        with torch.no_grad(), AttentionMeter(stack, token_scores=4) as meter:
            stack(self.X, TOKENS)
            stack(self.X, TOKENS)
        scores = meter.result().token_scores
        assert len(scores) == 4
        torch.testing.assert_close(scores[3].scores, scores[0].scores)

    def test_similarity_of_the_outputs(self):
        stack = make_stack(layers=1)
        with torch.no_grad():
            hidden = stack.layers[0](self.X, TOKENS)
        expected = []
        for b in range(4):
            unit = nn.functional.normalize(hidden[b][TOKENS[b] >= 0], dim=-1)
            product = unit @ unit.T
            n = len(unit)
            expected.append((product.sum() - product.diagonal().sum()) / (n * (n - 1)))
        found = measured(stack, self.X, TOKENS, similarity=True).similarity
        torch.testing.assert_close(found, torch.stack(expected).mean()[None].double(), rtol=1e-5, atol=1e-6)

    def test_sink_share(self):
        (weights,) = dense_weights(make_stack(layers=1), self.X, TOKENS)
        expected = 1 - weights[:3].sum(dim=-1).mean(dim=1)[TOKENS[:3] == 1].mean()  # vision rows
        found = measured(make_stack(layers=1), self.X, TOKENS).figure("sink", rows="all")[0, 1]
        torch.testing.assert_close(found.float(), expected)
        assert found > 0.01

    def test_under_autocast_sums_stay_in_float32(self):
        stack, masses = make_stack(layers=1), []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            with recorded(stack, lambda record: masses.append(record.mass)):
                stack(self.X, TOKENS)
            with AttentionMeter(stack) as meter:
                stack(self.X, TOKENS)
        text = (TOKENS == 0)[:, None, :, None]
        expected = (masses[0].double() * text).sum(dim=(0, 2)).mean(dim=0) / text.sum()
        torch.testing.assert_close(meter.result().mass(rows="all")[0, 0], expected, rtol=1e-5, atol=0)

    def test_the_model_is_left_as_it_was(self):
        stack = make_stack()
        expected = stack(self.X, TOKENS)
        with AttentionMeter(stack, similarity=True) as meter:
            torch.testing.assert_close(stack(self.X, TOKENS), expected, rtol=0, atol=0)
            with pytest.raises(RuntimeError, match="has a recorder already"), AttentionMeter(stack):
                pass
            with pytest.raises(RuntimeError, match="entered already"), meter:
                pass
        assert all(layer.recorder is None and not layer._forward_hooks for layer in stack.layers)

    def test_image_first_is_said_instead_of_printed(self):
        diagnosis = measured(make_stack(), self.X[2:3], TOKENS[2:3])
        assert diagnosis.figure("cross", rows="all")[:, 1].isnan().all()
        assert math.isnan(diagnosis.summary()["avg_diff"]["vision"])
        assert diagnosis.to_dict()["summary"]["both rows, with first token"]["avg_diff"]["vision"] is None
        sentence, generated = diagnosis.undefined()
        assert sentence.startswith("No vision row sees a key of another modality")
        assert generated.startswith("No generated token was measured")

    def test_errors(self):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
            AttentionMeter("llava")
        with pytest.raises(ValueError, match="token_scores must be at least 0, got -1"):
            AttentionMeter(make_stack(), token_scores=-1)
        with pytest.raises(RuntimeError, match="nothing was measured"):
            AttentionMeter(make_stack()).result()
        with pytest.raises(ValueError, match="must number the model's 2 modalities from 0, got"):
            measured(make_stack(), self.X, TOKENS, modalities={"text": 0, "image": 1, "audio": 2})


class TestResults:
    @pytest.fixture
    def diagnosis(self):
        x = torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(1))
        return measured(make_stack(), x, TOKENS, token_scores=2, similarity=True, name="before")

    def test_json_round_trip(self, diagnosis, tmp_path):
        text = diagnosis.to_json(tmp_path / "d.json")
        assert (tmp_path / "d.json").read_text() == text
        again = Diagnosis.from_json(text)
        assert again.to_json() == text
        torch.testing.assert_close(again.token_scores[0].scores, diagnosis.token_scores[0].scores)

    def test_dataframe(self, diagnosis):
        pytest.importorskip("pandas", reason="pandas is not installed")
        frame = diagnosis.to_dataframe()
        line = frame.query("measure == 'cross' and layer == 1 and modality == 'vision' and rows == 'both'")
        assert line[line.first_token].value.item() == diagnosis.figure("cross")[1, 1].item()
        assert line[line.first_token].uniform.item() == diagnosis.figure("cross", null=True)[1, 1].item()
        heads = diagnosis.to_dataframe(per_head=True)
        assert len(heads) == 4 * len(frame)
        chosen = heads.query("measure == 'self' and layer == 0 and modality == 'text' and rows == 'all' and head == 3")
        expected = diagnosis.figure("self", rows="all", per_head=True)[0, 3, 0].item()
        assert chosen[chosen.first_token].value.item() == expected

    def test_heads_one_by_one(self, diagnosis):
        """Mass, AvgDiff and decay of one head are those of a diagnosis of that head alone."""
        layers = [dataclasses.replace(layer, flow=layer.flow[:, :, 2:3]) for layer in diagnosis.layers]
        alone = dataclasses.replace(diagnosis, layers=layers)
        for options in ({}, {"null": True}, {"rows": "all", "first_token": False}):
            by_head = diagnosis.mass(**options, per_head=True)
            assert by_head.shape == (2, 4, 2, 2)
            torch.testing.assert_close(by_head[:, 2], alone.mass(**options))
            for measure, expected in alone.summary(**options).items():
                found = diagnosis.summary(**options, per_head=True)[measure]
                for name, value in expected.items():
                    assert len(found[name]) == 4 and found[name][2] == pytest.approx(value, nan_ok=True)

    def test_compare(self, diagnosis):
        x = torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(2))
        after = measured(make_stack(), x, TOKENS, name="after")
        comparison = diagnosis.compare(after)
        line = next(x for x in comparison.lines() if (x["measure"], x["modality"]) == ("avg_diff", "vision"))
        before, now = (d.figure("disparity").mean(dim=0)[1].item() for d in (diagnosis, after))
        assert line["change"] == pytest.approx(now - before)
        assert line["uniform_before"] == pytest.approx(diagnosis.figure("disparity", null=True).mean(dim=0)[1].item())
        assert Diagnosis.from_dict(comparison.to_dict()["after"]).name == "after"
        assert len(comparison.to_json()) > 1000
        with pytest.raises(ValueError, match="must have the modalities text, vision, got text, audio"):
            diagnosis.compare(dataclasses.replace(after, modalities=("text", "audio")))
        with pytest.raises(TypeError, match="other must be a Diagnosis, got dict"):
            diagnosis.compare({})

    def test_errors(self, diagnosis):
        with pytest.raises(ValueError, match="measure must be one of self, cross, .*, got 'avg'"):
            diagnosis.figure("avg")
        with pytest.raises(ValueError, match="rows must be one of all, both, generated, got 'text'"):
            diagnosis.figure("self", rows="text")
        two = dataclasses.replace(diagnosis.layers[0], flow=diagnosis.layers[0].flow[:, :, :2])
        uneven = dataclasses.replace(diagnosis, layers=[diagnosis.layers[0], two])
        with pytest.raises(ValueError, match=r"equal numbers of heads, got \[2, 4\]"):
            uneven.figure("self", per_head=True)
        assert uneven.figure("self").shape == (2, 2)


class TestBalanceLoss:
    """MODALITY, causal: the rows 1, 2 and 3 see both; visible keys (1, 1), (1, 2), (2, 2)."""

    def test_uniform_target_by_hand(self):
        # shares of the rows: (0.5, 0.5), (0.2, 0.8), (0.5, 0.5); targets (1/2, 1/2), (1/3, 2/3), (1/2, 1/2)
        expected = (1 / 3 * math.log((1 / 3) / 0.2) + 2 / 3 * math.log((2 / 3) / 0.8)) / 3
        close(AttentionBalanceLoss()(MASS[:, None], MODALITY), expected)

    def test_equal_target_by_hand(self):
        expected = (0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)) / 3
        close(AttentionBalanceLoss("equal")(MASS[:, None], MODALITY), expected)

    def test_shares_of_each_row_modality_by_hand(self):
        loss = AttentionBalanceLoss(torch.tensor([[1.0, 3.0], [1.0, 1.0]]))  # text rows: 1/4 text, 3/4 image
        image = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
        text = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
        close(loss(MASS[:, None], MODALITY), (image + text) / 3)

    def test_a_sink_changes_nothing(self):
        loss = AttentionBalanceLoss()
        torch.testing.assert_close(loss(0.3 * MASS[:, None], MODALITY), loss(MASS[:, None], MODALITY))

    def test_uniform_attention_has_no_loss_and_text_alone_neither(self):
        counts = measures.key_counts(TOKENS, TOKENS)
        mass = measures.uniform_mass(counts.double())[:, None].requires_grad_()
        loss = AttentionBalanceLoss()(mass, TOKENS)
        assert abs(loss.item()) < 1e-7
        text = AttentionBalanceLoss()(mass[3:], TOKENS[3:])
        assert text.item() == 0
        text.backward()
        assert mass.grad.abs().max() == 0

    def test_gradient(self):
        mass = MASS[:, None].clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda m: AttentionBalanceLoss("equal")(m, MODALITY), mass)

    def test_a_hidden_modality_gives_a_bounded_loss(self):
        mass = torch.tensor([[[[1.0, 0.0]] * 4]], requires_grad=True)
        loss = AttentionBalanceLoss(eps=1e-4)(mass, MODALITY)
        loss.backward()
        assert loss.isfinite() and mass.grad.isfinite().all()

    def test_training_on_it_balances(self):
        stack, x = make_stack(trained=False), torch.randn(4, 10, 32)
        balance = AttentionBalanceLoss("equal")
        optimizer = torch.optim.Adam(stack.parameters(), lr=0.02)
        losses = []
        for _ in range(30):
            with balance.collect(stack) as penalties:
                stack(x, TOKENS)
            assert len(penalties) == 2
            loss = torch.stack(penalties).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]

    def test_without_gradients_in_training_is_an_error(self):
        stack = make_stack().train()
        message = "no gradient reaches the attention mass"
        with AttentionBalanceLoss().collect(stack), torch.no_grad(), pytest.raises(RuntimeError, match=message):
            stack(torch.randn(4, 10, 32), TOKENS)
        with AttentionBalanceLoss().collect(stack.eval()) as penalties, torch.no_grad():
            stack(torch.randn(4, 10, 32), TOKENS)
        assert len(penalties) == 2

    def test_errors(self):
        with pytest.raises(ValueError, match="target must be uniform, equal or a tensor, got 'fair'"):
            AttentionBalanceLoss("fair")
        with pytest.raises(ValueError, match=r"shape \(M,\) or \(M, M\) and no negative entry, got shape \(2, 3\)"):
            AttentionBalanceLoss(torch.ones(2, 3))
        with pytest.raises(ValueError, match="eps must lie between 0 and 1, got 0"):
            AttentionBalanceLoss(eps=0)
        with pytest.raises(ValueError, match=r"got \(1, 4, 2\) and \(1, 4\)"):
            AttentionBalanceLoss()(MASS, MODALITY)
        with pytest.raises(ValueError, match="target is for 3 modalities, and mass has 2"):
            AttentionBalanceLoss(torch.ones(3))(MASS[:, None], MODALITY)


class TestFigures:
    @pytest.fixture
    def diagnosis(self):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        x = torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(1))
        return measured(make_stack(), x, TOKENS, token_scores=1, similarity=True, name="ours")

    def test_disparity_lines_are_the_figures(self, diagnosis):
        other = dataclasses.replace(diagnosis, name="theirs")
        text, vision = figures.disparity_by_layer([diagnosis, other]).axes
        lines = {line.get_label().split(",")[0]: line for line in vision.lines}
        assert set(lines) == {"ours", "theirs", "uniform attention"}
        assert lines["ours"].get_ydata() == pytest.approx(diagnosis.figure("disparity")[:, 1].tolist())
        expected = diagnosis.figure("disparity", null=True)[:, 1].tolist()
        assert lines["uniform attention"].get_ydata() == pytest.approx(expected)
        assert f"AvgDiff {100 * diagnosis.figure('disparity')[:, 1].mean():.1f} %" in lines["ours"].get_label()

    def test_attention_lines_are_the_figures(self, diagnosis):
        text, vision = figures.attention_by_layer(diagnosis, rows="all").axes
        lines = {line.get_label(): line.get_ydata() for line in text.lines}
        assert lines["text to others"] == pytest.approx(diagnosis.figure("cross", rows="all")[:, 0].tolist())
        expected = diagnosis.figure("self", rows="all", null=True)[:, 0].tolist()
        assert lines["text to text, uniform"] == pytest.approx(expected)

    def test_score_bars_are_the_figures(self, diagnosis):
        (axis,) = figures.token_scores(diagnosis).axes
        heights = [bar.get_height() for bar in axis.patches]
        assert heights == pytest.approx(diagnosis.figure("score").mean(dim=0).tolist())

    def test_heads_and_similarity(self, diagnosis):
        shown = figures.heads(diagnosis, "self").axes[1].images[0].get_array()
        assert shown.shape == (2, 4)
        assert shown[1, 3] == pytest.approx(diagnosis.figure("self", per_head=True)[1, 3, 1].item())
        (axis,) = figures.similarity(diagnosis).axes
        assert axis.lines[0].get_ydata() == pytest.approx(diagnosis.similarity.tolist())

    def test_image_attention_is_relative_to_chance(self, diagnosis):
        scores, uniform = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), torch.full((6,), 0.1)
        figure = figures.image_attention(torch.zeros(40, 60, 3), scores, (2, 3), uniform=uniform)
        shown = figure.axes[1].images[1]
        assert shown.get_array().tolist() == [pytest.approx([1, 2, 3]), pytest.approx([4, 5, 6])]
        assert shown.get_extent() == figure.axes[1].images[0].get_extent()
        with pytest.raises(ValueError, match=r"shape \(4,\) for a 2 x 2 grid, got \(6,\)"):
            figures.image_attention(torch.zeros(40, 60, 3), scores, (2, 2))

    def test_a_layout_without_cross_pairs_is_said(self, diagnosis):
        image_first = measured(make_stack(), torch.randn(1, 10, 32), TOKENS[2:3])
        for draw in (figures.disparity_by_layer, figures.attention_by_layer):
            figure = draw(image_first, rows="all")
            words = [figure.axes[1].get_title(), *(text.get_text() for text in figure.axes[1].texts)]
            assert any("not defined in this layout" in word for word in words)

    def test_errors(self, diagnosis):
        with pytest.raises(ValueError, match="at least one Diagnosis"):
            figures.token_scores([])
        with pytest.raises(ValueError, match="the modalities differ"):
            figures.token_scores([diagnosis, dataclasses.replace(diagnosis, modalities=("text", "audio"))])
        with pytest.raises(ValueError, match="ours was not measured with"):
            figures.similarity(dataclasses.replace(diagnosis, similarity=None))


# Transformers ---------------------------------------------------------------------------------------------------------
FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl")
FAMILIES += ("idefics3", "smolvlm")


class TestMeterOnTransformers:
    @pytest.fixture(autouse=True)
    def transformers_is_installed(self):
        pytest.importorskip("transformers", reason="transformers is not installed")

    @pytest.mark.parametrize("family", FAMILIES)
    def test_equals_dense_weights_of_eager_attention(self, family):
        """Also that token scores are columns of the eager weights, and that the model is as it was afterwards."""
        from vision_language import IMAGE, make_inputs, make_model

        model, inputs = make_model(family), make_inputs(family)
        before = model.config.text_config._attn_implementation
        with torch.no_grad(), AttentionMeter(model, token_scores=2) as meter:
            model(**inputs)
        assert model.config.text_config._attn_implementation == before
        model.set_attn_implementation({"text_config": "eager"})
        with torch.no_grad():
            weights = model(**inputs, output_attentions=True).attentions
        mask = inputs["attention_mask"].bool()
        modality = (inputs["input_ids"] == IMAGE).long().masked_fill(~mask, -1)
        diagnosis = meter.result()
        assert diagnosis.modalities == ("text", "vision")
        assert diagnosis.sequences == 2
        for layer, dense in enumerate(weights):
            visible = (dense > 0).any(dim=1) & mask[:, None]
            one = dataclasses.replace(diagnosis, layers=diagnosis.layers[layer : layer + 1])
            assert_equals_dense(one, [dense], modality, visible)
            for b, scores in enumerate(diagnosis.token_scores):
                kinds = [visible[b] & (modality[b] == m) for m in (0, 1)]
                rows = kinds[0].any(dim=-1) & kinds[1].any(dim=-1) & (modality[b] == 0)
                expected = dense[b][:, rows].mean(dim=(0, 1)) * mask[b]
                torch.testing.assert_close(scores.scores[layer], expected, rtol=0, atol=1e-5)

    def test_generated_tokens_are_measured(self):
        from vision_language import make_inputs, make_model

        model, inputs = make_model("llava"), make_inputs("llava")
        with AttentionMeter(model) as meter:
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        diagnosis = meter.result()
        padding = (inputs["attention_mask"] == 0).sum().item()
        assert diagnosis.sequences == 2
        assert sum(diagnosis.tokens.values()) == tokens.numel() - padding - 2  # the last one is not fed back
        with torch.no_grad(), AttentionMeter(model) as whole:
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
            model(input_ids=tokens[:, :-1], attention_mask=mask, pixel_values=inputs["pixel_values"])
        torch.testing.assert_close(diagnosis.figure("self"), whole.result().figure("self"), rtol=0, atol=1e-5)

    def test_a_static_cache_is_measured_as_a_dynamic_one(self):
        from vision_language import make_inputs, make_model

        model, inputs = make_model("llava"), make_inputs("llava", padding=None)
        found = []
        for cache in ("dynamic", "static"):
            with AttentionMeter(model) as meter:
                model.generate(**inputs, max_new_tokens=4, do_sample=False, cache_implementation=cache)
            found.append(meter.result())
        assert found[0].tokens == found[1].tokens
        assert found[0].sequences == found[1].sequences == 2
        for name in ("self", "cross"):
            torch.testing.assert_close(found[0].figure(name), found[1].figure(name), rtol=0, atol=1e-5)

    def test_a_model_with_moda_and_its_modalities(self):
        from vision_language import IMAGE, make_inputs, make_model

        from moda_ext.integrations.transformers import MODAConfig, apply_moda

        model, inputs = make_model("llava"), make_inputs("llava")
        with torch.no_grad(), AttentionMeter(model) as plain:
            model(**inputs)
        apply_moda(model, MODAConfig.fixed_prior([[0.0, 2.0], [0.0, 0.0]], modalities={"text": 0, "image": 1}))
        with torch.no_grad(), AttentionMeter(model) as meter:
            model(**inputs)
        diagnosis = meter.result()
        assert diagnosis.modalities == ("text", "image")
        assert diagnosis.figure("mdi")[0, 1] < 0.3 * plain.result().figure("mdi")[0, 1]  # e^-2 before the softmax
        assert diagnosis.tokens["image"] == (inputs["input_ids"] == IMAGE).sum()

    def test_similarity_is_that_of_the_hidden_states(self):
        from vision_language import make_inputs, make_model

        model, inputs = make_model("llava"), make_inputs("llava", padding=None)
        with torch.no_grad(), AttentionMeter(model, similarity=True) as meter:
            hidden = model(**inputs, output_hidden_states=True).hidden_states
        mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        expected = measures.token_similarity(hidden[1], mask).mean()  # after the first layer
        torch.testing.assert_close(meter.result().similarity[0].float(), expected)

    def test_balance_loss_trains_through_gradient_checkpointing(self):
        from vision_language import make_inputs, make_model

        gradients = []
        for checkpointing in (False, True):
            model, inputs = make_model("llava").train(), make_inputs("llava")
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            balance = AttentionBalanceLoss("equal")
            with balance.collect(model) as penalties:
                model(**inputs)
                torch.stack(penalties).mean().backward()
            assert len(penalties) == 2
            gradients.append(model.get_decoder().layers[0].self_attn.q_proj.weight.grad)
        assert gradients[0].abs().max() > 0
        torch.testing.assert_close(gradients[0], gradients[1])

    def test_trainer_callback(self, tmp_path):
        pytest.importorskip("accelerate", reason="accelerate is not installed")
        from transformers import Trainer, TrainingArguments
        from vision_language import make_inputs, make_model

        model = make_model("llava")
        rows = make_inputs("llava", rows=4, padding=None)
        rows["labels"] = rows["input_ids"]
        data = [{name: tensor[i] for name, tensor in rows.items()} for i in range(4)]
        watch = AttentionMeter(model).callback(every=2)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
        )
        Trainer(model, arguments, train_dataset=data, callbacks=[watch]).train()
        assert [step for step, _ in watch.history] == [1, 3]
        assert all(diagnosis.sequences == 2 for _, diagnosis in watch.history)
        with pytest.raises(ValueError, match="every must be at least 1, got 0"):
            AttentionMeter(model).callback(every=0)

    def test_a_model_of_an_unknown_family_is_refused(self):
        with (
            pytest.raises(ValueError, match="unknown model family 'Linear'; known are llava"),
            AttentionMeter(nn.Linear(2, 2)),
        ):
            pass


class TestCost:
    @staticmethod
    def make_model(width, intermediate):
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        torch.manual_seed(0)
        small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=intermediate,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=8192,
        )
        vision = transformers.CLIPVisionConfig(**small, image_size=64, patch_size=8)
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=60)
        return transformers.LlavaForConditionalGeneration(config).eval()

    @staticmethod
    def inputs(length):
        ids = torch.randint(1, 60, (1, length), generator=torch.Generator().manual_seed(1))
        ids[:, 10:74] = 60
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 64, 64), "use_cache": False, "logits_to_keep": 1}

    @pytest.mark.parametrize("prompt_length", [768, 640], ids=["no generated rows", "128 generated rows"])
    def test_measuring_costs_at_most_5_percent_of_a_forward(self, prompt_length):
        """The meter's own time beside a forward pass with sdpa; mass and lse cost the kernel nothing.

        In a text stack 1024 wide: the share falls with the width. On one thread, in processor time and the least of
        several runs, as other processes share the machine.
        """

        def processor_time(call, *arguments, **keywords):
            start = time.process_time()
            call(*arguments, **keywords)
            return time.process_time() - start

        model, inputs, threads = self.make_model(1024, 2816), self.inputs(768), torch.get_num_threads()
        forward, measuring = [], []
        torch.set_num_threads(1)
        try:
            for _ in range(14):
                meter, of_layers = AttentionMeter(model), []
                with torch.no_grad():
                    forward.append(processor_time(model, **inputs))
                    with (
                        meter.generated_after(prompt_length),
                        recorded(model, lambda record, m=meter, t=of_layers: t.append(processor_time(m, record))),
                    ):
                        model(**inputs)
                measuring.append(sum(of_layers))
        finally:
            torch.set_num_threads(threads)
        assert meter.result().tokens == {"text": 704, "vision": 64}
        assert meter.result().generated_tokens == 768 - prompt_length
        assert min(measuring) <= 0.05 * min(forward), (min(measuring), min(forward))

    @pytest.mark.parametrize("prompt_length", [4096, 100], ids=["no generated rows", "3996 generated rows"])
    def test_4096_tokens_need_no_matrix_of_all_pairs(self, prompt_length):
        """The largest allocation of a measured forward pass: a boolean matrix of all pairs would take N * N bytes."""
        model = self.make_model(512, 512)
        length, meter = 4096, AttentionMeter(model, similarity=True)
        stated, profiled = meter.generated_after(prompt_length), torch.profiler.profile(profile_memory=True)
        with torch.no_grad(), meter, stated, profiled as profile:
            model(**self.inputs(length))
        sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert max(sizes) >= length * 512 * 4  # the hidden states are seen
        assert max(sizes) < length * length
        assert meter.result().tokens == {"text": 4032, "vision": 64}

    @pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak memory counter to reset")
    def test_peak_memory_of_4096_tokens(self):
        """Over the same forward pass unmeasured; a float matrix of all pairs of one head would take 64 MB."""

        def peak(context):
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            with torch.no_grad(), context:
                model(**inputs)
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024

        model, inputs = self.make_model(512, 512), self.inputs(4096)
        peak(AttentionMeter(model))  # the allocator keeps some memory
        plain = peak(recorded(model, lambda record: None))
        assert peak(AttentionMeter(model)) - plain < 32
        meter = AttentionMeter(model)
        with meter.generated_after(100):
            assert peak(meter) - plain < 64


class TestPictures:
    """Where the tokens of an image are, and in which order."""

    SIZE = {"height": 8, "width": 8}
    CLIP = {"size": {"shortest_edge": 8}, "crop_size": SIZE}
    IDEFICS = {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 8}}
    QWEN = {"patch_size": 2, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 64}}
    PAN_AND_SCAN = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 4,
        "pan_and_scan_max_num_crops": 2,
        "pan_and_scan_min_ratio_to_activate": 1.0,
    }
    PROCESSORS = {  # family: (its image processor, how it is set, image tokens of each piece of the prompt)
        "llava": ("clip.CLIP", CLIP, [4]),
        "llava_next": ("llava_next.LlavaNext", {**CLIP, "image_grid_pinpoints": [[16, 16]]}, [4 + 4 * 5]),
        "llava_onevision": (
            "llava_onevision.LlavaOnevision",
            {"size": SIZE, "image_grid_pinpoints": [[16, 16]]},
            [4 + 4 * 5],
        ),
        "qwen2_vl": ("qwen2_vl.Qwen2VL", QWEN, [4]),
        "qwen2_5_vl": ("qwen2_vl.Qwen2VL", QWEN, [4]),
        "qwen3_vl": ("qwen2_vl.Qwen2VL", QWEN, [4]),
        "gemma3": ("gemma3.Gemma3", {"size": SIZE, **PAN_AND_SCAN}, [4, 4, 4]),
        "internvl": ("got_ocr2.GotOcr2", {"size": SIZE, "crop_to_patches": True, "max_patches": 4}, [5 * 4]),
        "idefics3": ("idefics3.Idefics3", IDEFICS, [4] * 5),
        "smolvlm": ("smolvlm.SmolVLM", IDEFICS, [4] * 5),
    }

    def layout(self, family, colours, pieces=None):
        """``_layout`` of an image of four colours in Transformers' own tiles, and what the text stack gets of it."""
        from vision_language import FAMILIES, IMAGE, make_model

        from moda_ext.diagnostics.runner import _layout

        model, (name, options, lengths) = make_model(family), self.PROCESSORS[family]
        model.config.image_grid_pinpoints = options.get("image_grid_pinpoints")
        for place, parameter in model.named_parameters():  # random attention would carry every patch to every token
            outputs = (".attn.proj.", ".out_proj.", ".projection_layer.")
            if ("vision" in place or "visual" in place) and any(name in place for name in outputs):
                parameter.data.zero_()
        module, name = name.split(".")
        module = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
        of_image = getattr(module, f"{name}ImageProcessorPil")(**options)
        square = torch.tensor(colours, dtype=torch.uint8).reshape(2, 2, 3).repeat_interleave(8, 0)
        image = pillow_image().fromarray(square.repeat_interleave(8, 1).numpy())
        ids = [5, 6]
        for length in lengths if pieces is None else pieces:
            ids += [*FAMILIES[family].before, *[IMAGE] * length, *FAMILIES[family].after, 7]
        ids = torch.tensor([ids])
        inputs = {"input_ids": ids, **of_image(images=[image], return_tensors="pt"), **FAMILIES[family].extra(ids)}
        inputs.pop("num_crops", None), inputs.pop("num_patches", None)
        seen = []
        if pieces is None:
            stack = model.get_decoder()
            stack.register_forward_pre_hook(lambda _, __, kw: seen.append(kw["inputs_embeds"][0]), with_kwargs=True)
            with torch.no_grad():
                model(**inputs, use_cache=False)
        return _layout(model, types.SimpleNamespace(image_processor=of_image), inputs, image), seen

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_token_of_a_quarter_of_the_picture_sees_that_quarter(self, family):
        """In the tile of the whole image: the other tiles see quarters of it only, and their tokens are not drawn."""
        colours = [[250, 20, 20], [20, 250, 20], [20, 20, 250], [240, 240, 240]]
        (picture, grid, start, reason), (before,) = self.layout(family, colours)
        assert reason is None and grid == (2, 2)
        side = picture.shape[0] // 2
        found = picture[side // 2 :: side, side // 2 :: side]  # the middle of each quarter
        torch.testing.assert_close(found, torch.tensor(colours).reshape(2, 2, 3) / 255, rtol=0, atol=0.1)
        for cell in range(4):
            changed = [[90, 130, 90] if k == cell else colour for k, colour in enumerate(colours)]
            _, (after,) = self.layout(family, changed)
            moved = (after - before).norm(dim=-1)[start : start + 4]
            assert moved.argmax() == cell

    def test_tokens_that_do_not_fit_have_no_picture_and_a_reason(self):
        colours = [[250, 20, 20]] * 4
        (picture, *_, reason), _ = self.layout("idefics3", colours, [4, 4, 4, 4, 3])
        assert picture is None and reason == "its 19 tokens are not 5 square tiles"
        (picture, *_, reason), _ = self.layout("idefics3", colours, [4, 4, 4, 5, 3])
        assert picture is None and reason == "its tokens do not hold a grid of 2 x 2 in one piece"


def pillow_image():
    return pytest.importorskip("PIL.Image", reason="pillow is not installed")
