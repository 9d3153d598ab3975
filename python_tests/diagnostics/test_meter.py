"""The meter beside dense attention weights, on layers of this package and on models of Transformers."""

import contextlib
import dataclasses
import math

import pytest
import torch
from diagnosed import FAMILIES, TOKENS, Dense, make_stack, measured
from torch import nn

from moda_ext.attention import AttentionState
from moda_ext.diagnostics import AttentionBalanceLoss, AttentionMeter, measures
from moda_ext.diagnostics import meter as meter_module
from moda_ext.diagnostics.attach import recorded


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


def dense_weights(model, *inputs):
    dense = Dense()
    with torch.no_grad(), recorded(model, dense):
        model(*inputs)
    return dense.weights


@contextlib.contextmanager
def failing(module):
    """A layer that raises when it is called."""

    def fail(*_):
        raise ArithmeticError

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


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

    def test_token_scores_of_generated_rows(self):
        stack = make_stack()
        lengths = torch.tensor([6, 8, 4, 10])  # of the prompts; the fourth has no answer
        meter = AttentionMeter(stack, token_scores=9, score_rows="generated")
        with torch.no_grad(), meter, meter.generated_after(lengths):
            stack(self.X, TOKENS)
        visible = visible_pairs(TOKENS)
        place = (TOKENS >= 0).cumsum(dim=1) - 1
        rows = (place >= lengths[:, None]) & (TOKENS == 0)
        chosen = [b for b in range(len(TOKENS)) if rows[b].any()]
        scores, weights = meter.result().token_scores, dense_weights(stack, self.X, TOKENS)
        assert len(scores) == len(chosen) > 1
        for b, found in zip(chosen, scores, strict=True):
            for layer, dense in enumerate(weights):
                torch.testing.assert_close(found.scores[layer], dense[b][:, rows[b]].mean(dim=(0, 1)))
            uniform = (visible[b] / visible[b].sum(dim=-1, keepdim=True).clamp(min=1))[rows[b]].mean(dim=0)
            torch.testing.assert_close(found.uniform, uniform)
        assert not measured(stack, self.X, TOKENS, token_scores=9, score_rows="generated").token_scores  # nobody said

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

    def test_padding_may_hold_anything(self):
        stack, x = make_stack(), self.X.clone()
        options = {"token_scores": 9, "similarity": True}
        expected = measured(stack, x, TOKENS, **options)
        x[TOKENS < 0] = torch.nan
        found = measured(stack, x, TOKENS, **options)
        for rows in ("all", "both"):
            for name in ("self", "cross", "score", "mdi"):
                torch.testing.assert_close(
                    found.figure(name, rows=rows), expected.figure(name, rows=rows), equal_nan=True
                )
        assert found.figure("self").isfinite().all()
        torch.testing.assert_close(found.similarity, expected.similarity)
        for ours, theirs in zip(found.token_scores, expected.token_scores, strict=True):
            torch.testing.assert_close(ours.scores, theirs.scores)
        with torch.no_grad(), AttentionBalanceLoss().collect(stack.eval()) as penalties:
            for inputs in (self.X, x):
                stack(inputs, TOKENS)
        torch.testing.assert_close(penalties[:2], penalties[2:])

    def test_a_pass_that_is_broken_off_leaves_no_scores(self):
        stack = make_stack()
        with torch.no_grad(), AttentionMeter(stack, token_scores=4) as meter:
            stack(self.X[:2], TOKENS[:2])
            with failing(stack.layers[1]), pytest.raises(ArithmeticError):
                stack(self.X, TOKENS)
            assert meter.num_scored == 2
            stack(self.X, TOKENS)
        scores = meter.result().token_scores
        assert len(scores) == 4
        torch.testing.assert_close(scores[2].scores, scores[0].scores)
        torch.testing.assert_close(scores[3].scores, scores[1].scores)

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
        with pytest.raises(ValueError, match="score_rows must be 'both' or 'generated', got 'all'"):
            AttentionMeter(make_stack(), score_rows="all")
        with pytest.raises(RuntimeError, match="nothing was measured"):
            AttentionMeter(make_stack()).result()
        with pytest.raises(ValueError, match="must number the model's 2 modalities from 0, got"):
            measured(make_stack(), self.X, TOKENS, modalities={"text": 0, "image": 1, "audio": 2})


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

    @pytest.mark.parametrize("window", [1, 4])
    def test_uniform_scores_are_of_all_layers(self, window):
        """Where the first has a window: uniform attention is by no means uniform over keys, and still by chance."""
        import transformers
        from vision_language import make_config, make_inputs

        config = make_config("gemma3")
        config.text_config.sliding_window = window
        layers = len(config.text_config.layer_types)
        config.text_config.layer_types = ["sliding_attention", *["full_attention"] * (layers - 1)]
        model = transformers.AutoModelForImageTextToText.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if ".q_proj.weight" in name:
                parameter.data.zero_()
        with torch.no_grad(), AttentionMeter(model, token_scores=2) as meter:
            model(**make_inputs("gemma3"))
        diagnosis = meter.result()
        assert len(diagnosis.token_scores) == meter.num_scored == 2
        for scores in diagnosis.token_scores:
            assert scores.uniform.sum() > 0
            torch.testing.assert_close(scores.scores.mean(dim=0), scores.uniform, rtol=0, atol=1e-6)
        assert not any("No text row sees a key of another" in sentence for sentence in diagnosis.undefined())

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
