"""The loss that asks for balanced attention."""

import math

import pytest
import torch
from diagnosed import MASS, MODALITY, TOKENS, close, make_stack

from moda_ext.diagnostics import AttentionBalanceLoss, measures


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

    def test_padding_may_hold_anything(self):
        mass = torch.rand(4, 2, 10, 2)
        padded = torch.where((TOKENS < 0)[:, None, :, None], torch.nan, mass).requires_grad_()
        loss = AttentionBalanceLoss()(padded, TOKENS)
        torch.testing.assert_close(loss, AttentionBalanceLoss()(mass, TOKENS))
        loss.backward()
        assert padded.grad.isfinite().all() and padded.grad.any()

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
