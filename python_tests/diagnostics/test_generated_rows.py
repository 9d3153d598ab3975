"""MDI and AEI as published: rows of generated tokens, keys of their prompts, held against dense attention weights."""

import contextlib
import dataclasses
import inspect

import pytest
import torch
from diagnosed import Dense, Stack, make_stack, measured
from torch import nn

from moda_ext.attention import AttentionState
from moda_ext.diagnostics import AttentionMeter, Diagnosis, figures, measures
from moda_ext.diagnostics import meter as meter_module
from moda_ext.diagnostics.attach import recorded

THIRDS = (slice(0, 1), slice(1, 2), slice(2, 3))  # of the three layers of a test


def published(layers, first_token=True):
    """MDI and AEI, (L, M) each, and the same of uniform attention, in plain loops and float64.

    Args:
        layers: for each layer a list of ``(weights (H, keys) of a generated token, modality (keys,) of its prompt)``,
            the keys after the prompt being those that the modality does not reach; -1 is padding.
        first_token: whether the first key that is no padding counts.
    """
    results = {}
    for null in (False, True):
        totals = []
        for rows in layers:
            attention, tokens = [0.0, 0.0], [0, 0]
            for weights, modality in rows:
                keys = [j for j, m in enumerate(modality.tolist()) if m >= 0]
                keys = keys if first_token else keys[1:]
                row = weights.double().mean(dim=0)
                row = torch.full_like(row, 1 / len(keys)) if null else row / row[keys].sum()
                for j in keys:
                    attention[modality[j]] += row[j].item()
                    tokens[modality[j]] += 1
            totals.append((attention, tokens))
        results[null] = torch.tensor(totals, dtype=torch.float64)  # (L, 2, M)
    return results[False], results[True]


def indices(totals):
    """(mdi of vision, aei of text, aei of vision) of (..., 2, M): attention and tokens."""
    (text, vision), (text_tokens, vision_tokens) = totals.unbind(-2)[0].unbind(-1), totals.unbind(-2)[1].unbind(-1)
    share = text / (text + vision), vision / (text + vision)
    tokens = text_tokens / (text_tokens + vision_tokens), vision_tokens / (text_tokens + vision_tokens)
    mdi = (text / text_tokens) / (vision / vision_tokens)
    return torch.stack([mdi, share[0] / tokens[0], share[1] / tokens[1]], dim=-1)


def found(diagnosis, first_token=True, null=False, thirds=False, rows="generated"):
    figure = diagnosis.thirds if thirds else diagnosis.figure
    options = {"rows": rows, "first_token": first_token, "null": null}
    mdi, aei = figure("mdi", **options), figure("aei", **options)
    return torch.cat([mdi[:, 1:], aei], dim=1)


def assert_published(diagnosis, layers):
    """MDI and AEI by layer and by thirds, with the first token and without, and their nulls."""
    count = len(layers)
    assert diagnosis.unclear == []
    assert diagnosis.generated_tokens == len(layers[0])
    for first_token in (True, False):
        for null, totals in zip((False, True), published(layers, first_token), strict=True):
            expected = indices(totals)
            torch.testing.assert_close(found(diagnosis, first_token, null), expected, rtol=2e-4, atol=1e-5)
            pooled = torch.stack([totals[third].sum(dim=0) for third in measures.split_in_thirds(count)])
            torch.testing.assert_close(
                found(diagnosis, first_token, null, thirds=True),
                indices(pooled),
                rtol=2e-4,
                atol=1e-5,
                equal_nan=True,
            )


# A model of this package's layers -------------------------------------------------------------------------------------
TOKENS = torch.tensor(  # prompts of 7, 5 and 6 tokens, then three or four generated ones; the last is left-padded
    [
        [0, 1, 1, 1, 0, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0, -1, -1],
        [-1, 1, 1, 0, 0, 1, 0, 0, 0, 0],
    ]
)
LENGTHS = torch.tensor([7, 5, 6])
X = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.full_like(TOKENS, -100)
for b, stop in enumerate((7, 5, 7)):  # the column where each prompt ends
    LABELS[b, stop:] = torch.where(TOKENS[b, stop:] >= 0, 5, -100)


class WithLabels(Stack):
    """A model that takes labels, as those of Transformers do."""

    def forward(self, x, modality, labels=None):
        return super().forward(x, modality)


def with_labels(**options):
    stack = make_stack(layers=3, **options)
    stack.__class__ = WithLabels
    return stack


def rows_of(weights, borders, tokens=TOKENS):
    """What ``published`` wants, of dense weights (B, H, N, N) and ``(sequence, row, column where its prompt ends)``."""
    return [[(layer[b, :, i], tokens[b, :border]) for b, i, border in borders] for layer in weights]


def dense_weights(model, *inputs):
    dense = Dense()
    with torch.no_grad(), recorded(model, dense):
        model(*inputs)
    return dense.weights


BORDERS = [(0, i, 7) for i in (7, 8, 9)] + [(1, i, 5) for i in (5, 6, 7)] + [(2, i, 7) for i in (7, 8, 9)]


class TestOwnLayers:
    def test_one_pass_with_a_prompt_length(self):
        stack = make_stack(layers=3)
        with torch.no_grad(), AttentionMeter(stack) as meter, meter.generated_after(LENGTHS):
            stack(X, TOKENS)
        assert_published(meter.result(), rows_of(dense_weights(stack, X, TOKENS), BORDERS))

    def test_one_pass_with_labels(self):
        stack = with_labels()
        with torch.no_grad(), AttentionMeter(stack) as meter:
            stack(X, TOKENS, labels=LABELS)
        assert_published(meter.result(), rows_of(dense_weights(stack, X, TOKENS), BORDERS))

    def test_each_answer_of_a_conversation_has_the_prompt_before_it(self):
        stack, labels = with_labels(), torch.full_like(TOKENS[:1], -100)
        labels[0, 4], labels[0, 7:9] = 3, 3  # the tokens 5 and 6 are the second question, token 9 the end of the turn
        with torch.no_grad(), AttentionMeter(stack) as meter:
            stack(X[:1], TOKENS[:1], labels=labels)
        borders = [(0, 4, 4), (0, 7, 7), (0, 8, 7)]
        assert_published(meter.result(), rows_of(dense_weights(stack, X[:1], TOKENS[:1]), borders))

    def test_in_small_blocks(self, monkeypatch):
        stack = make_stack(layers=3)
        monkeypatch.setattr(meter_module, "BLOCK_ELEMENTS", 1)
        with torch.no_grad(), AttentionMeter(stack) as meter, meter.generated_after(LENGTHS):
            stack(X, TOKENS)
        assert_published(meter.result(), rows_of(dense_weights(stack, X, TOKENS), BORDERS))

    def test_decoding_with_a_state(self):
        """The first pass is the prompt; padding on both sides."""
        layer = make_stack(layers=1).layers[0]
        tokens, x = torch.tensor([[0, 1, 1, 0, 0, 0], [-1, 0, 1, 0, 0, 0]]), X[:2, :6]
        state = AttentionState()
        with torch.no_grad(), AttentionMeter(layer) as meter:
            for piece in (slice(0, 4), slice(4, 5), slice(5, 6)):
                layer(x[:, piece], tokens[:, piece], state=state)
        borders = [(b, i, 4) for b in (0, 1) for i in (4, 5)]
        assert_published(meter.result(), rows_of(dense_weights(layer, x, tokens), borders, tokens))

    def test_every_key_is_visible_in_a_layer_that_is_not_causal(self):
        stack = make_stack(layers=3, is_causal=False)
        with torch.no_grad(), AttentionMeter(stack) as meter, meter.generated_after(LENGTHS):
            stack(X, TOKENS)
        assert_published(meter.result(), rows_of(dense_weights(stack, X, TOKENS), BORDERS))

    def test_a_split_softmax(self):
        stack = make_stack(layers=3, mask={"softmax": "split"})
        with torch.no_grad(), AttentionMeter(stack) as meter, meter.generated_after(LENGTHS):
            stack(X, TOKENS)
        with_first, _ = published(rows_of(dense_weights(stack, X, TOKENS), BORDERS))
        torch.testing.assert_close(found(meter.result()), indices(with_first), rtol=2e-4, atol=1e-5)
        assert found(meter.result(), first_token=False).isnan().all()
        assert any("first token alone cannot be told" in sentence for sentence in meter.result().undefined())

    def test_a_bias_that_float32_cannot_add_up(self):
        """One number for all keys changes nothing, but that the first token's weight cannot be told; that is said."""
        stack, results = make_stack(layers=3), []
        for common in (0.0, -1e9):
            meter = AttentionMeter(stack)

            def biased(record, meter=meter, common=common):
                meter(dataclasses.replace(record, bias=record.bias + common, lse=record.lse + common))

            with torch.no_grad(), recorded(stack, biased), meter.generated_after(LENGTHS):
                stack(X, TOKENS)
            results.append(meter.result())
        plain, shifted = results
        torch.testing.assert_close(found(shifted), found(plain), rtol=0, atol=0)
        assert found(plain, first_token=False).isfinite().all()
        assert found(shifted, first_token=False).isnan().all()
        assert any("first token alone cannot be told" in sentence for sentence in shifted.undefined())

    def test_three_modalities(self):
        """MDI of each modality beside the text's; all keys after the prompts are text."""
        tokens = torch.tensor([[0, 1, 1, 2, 2, 2, 0, 0, 0, 0]])
        stack = make_stack(layers=3, num_modalities=3)
        with torch.no_grad(), AttentionMeter(stack) as meter, meter.generated_after(7):
            stack(X[:1], tokens)
        diagnosis = meter.result()
        for layer, weights in enumerate(dense_weights(stack, X[:1], tokens)):
            rows = weights[0, :, 7:, :7].double().mean(dim=0)
            rows = rows / rows.sum(dim=-1, keepdim=True)
            share = torch.stack([rows[:, tokens[0, :7] == m].sum(dim=-1).mean() for m in range(3)])
            per_token = share / torch.tensor([2, 2, 3])
            mdi, aei = (diagnosis.figure(name, rows="generated")[layer] for name in ("mdi", "aei"))
            torch.testing.assert_close(mdi, per_token[0] / per_token, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(aei, share / (torch.tensor([2, 2, 3]) / 7), rtol=1e-4, atol=1e-6)

    def test_uniform_attention_is_its_own_null(self):
        stack = make_stack(layers=3, trained=False, mask=False)
        for layer in stack.layers:
            nn.init.zeros_(layer.q_proj.weight)
        with torch.no_grad(), AttentionMeter(stack) as meter, meter.generated_after(LENGTHS):
            stack(X, TOKENS)
        diagnosis = meter.result()
        for first_token in (True, False):
            for name in ("mdi", "aei", "self", "cross", "score"):
                options = {"rows": "generated", "first_token": first_token}
                uniform = diagnosis.figure(name, **options, null=True)
                torch.testing.assert_close(
                    diagnosis.figure(name, **options), uniform, rtol=1e-5, atol=1e-7, equal_nan=True
                )
        one = measured_after(stack, X[:1], TOKENS[:1], 7)
        torch.testing.assert_close(found(one, null=True), torch.ones(3, 3, dtype=torch.float64))

    def test_heads_one_by_one_add_up_to_the_layer(self):
        diagnosis = measured_after(make_stack(layers=3), X, TOKENS, LENGTHS)
        by_head = diagnosis.mass(rows="generated", per_head=True)
        torch.testing.assert_close(by_head.mean(dim=1), diagnosis.mass(rows="generated"), equal_nan=True)
        text = torch.ones(3, dtype=torch.float64)
        torch.testing.assert_close(diagnosis.mass(rows="generated")[:, 0].sum(dim=-1), text, rtol=1e-5, atol=0)
        assert diagnosis.figure("mdi", rows="generated", per_head=True).shape == (3, 4, 2)

    def test_rows_of_generated_tokens_have_no_share_that_goes_nowhere(self):
        diagnosis = measured_after(make_stack(layers=3), X, TOKENS, LENGTHS)
        assert diagnosis.figure("sink", rows="generated").isnan().all()

    def test_a_conversation_where_each_turn_is_said(self):
        layer = make_stack(layers=1).layers[0]
        state, tokens = AttentionState(), torch.tensor([[0, 1, 1, 0, 0, 0, 1, 0, 0, 0]])
        with torch.no_grad(), AttentionMeter(layer) as meter:
            for length, pieces in ((4, ((0, 4), (4, 5))), (8, ((5, 8), (8, 9), (9, 10)))):
                with meter.generated_after(length):
                    for start, stop in pieces:
                        layer(X[:1, start:stop], tokens[:, start:stop], state=state)
        borders = [(0, 4, 4), (0, 8, 8), (0, 9, 8)]
        assert_published(meter.result(), rows_of(dense_weights(layer, X[:1], tokens), borders, tokens))


def measured_after(model, x, tokens, length):
    with torch.no_grad(), AttentionMeter(model) as meter, meter.generated_after(length):
        model(x, tokens)
    return meter.result()


def decode(layer, pieces, state=None):
    """The first sequence, from column to column."""
    state = AttentionState() if state is None else state
    with torch.no_grad():
        for start, stop in pieces:
            layer(X[:1, start:stop], TOKENS[:1, start:stop], state=state)
    return state


def assert_unclear(diagnosis, reason):
    """All figures of generated rows are NaN and one sentence says why; the others are as ever."""
    assert any(reason in sentence for sentence in diagnosis.undefined()), diagnosis.undefined()
    for thirds in (False, True):
        assert (
            found(diagnosis, thirds=thirds).isnan().all() and found(diagnosis, null=True, thirds=thirds).isnan().all()
        )
    assert diagnosis.figure("self", rows="all")[:, 0].isfinite().all()


class TestUnclearBorders:
    @pytest.fixture
    def layer(self):
        return make_stack(layers=1).layers[0]

    def test_without_generated_tokens_it_is_said(self):
        diagnosis = measured(make_stack(layers=3), X, TOKENS)
        assert diagnosis.generated_tokens == 0 and diagnosis.unclear == []
        assert found(diagnosis).isnan().all()
        (sentence,) = [s for s in diagnosis.undefined() if "No generated token was measured" in s]
        assert "MDI and AEI as published" in sentence

    def test_a_prompt_in_chunks(self, layer):
        with AttentionMeter(layer) as meter:
            decode(layer, [(0, 3), (3, 7), (7, 8)])
        assert_unclear(meter.result(), "several tokens came at once after the first pass")

    def test_a_prompt_whose_chunks_hold_one_token_of_an_image(self, layer):
        with AttentionMeter(layer) as meter:
            decode(layer, [(0, 2), (2, 3)])
        assert_unclear(meter.result(), "a token that is not text came after the first pass")

    def test_tokens_that_are_taken_back(self, layer):
        with AttentionMeter(layer) as meter:
            state = decode(layer, [(0, 7), (7, 8), (8, 9)])
            decode(layer, [(8, 9)], state=state.crop(8))
        assert_unclear(meter.result(), "tokens were taken back while decoding")
        assert any("once more over the finished sequences" in sentence for sentence in meter.result().undefined())

    def test_generations_that_take_turns(self, layer):
        with AttentionMeter(layer) as meter:
            first = decode(layer, [(0, 7)])
            decode(layer, [(0, 6)])
            decode(layer, [(7, 8)], state=first)
        assert_unclear(meter.result(), "several generations took turns")

    def test_a_meter_that_is_left_and_entered_while_decoding(self, layer):
        """Another sequence may have gone on in between, unseen."""
        with AttentionMeter(layer) as meter:
            decode(layer, [(0, 6), (6, 7)])
        other = decode(layer, [(0, 7)])
        with meter:
            decode(layer, [(7, 8)], state=other)
        assert_unclear(meter.result(), "a sequence began before the meter was entered")

    def test_a_cache_from_before_the_meter(self, layer):
        state = decode(layer, [(0, 7)])
        with AttentionMeter(layer) as meter:
            decode(layer, [(7, 8)], state=state)
        assert_unclear(meter.result(), "a sequence began before the meter was entered")

    def test_labels_on_the_prompt_too(self):
        stack = with_labels()
        labels = torch.where(TOKENS == 0, 5, -100)  # of all text
        with torch.no_grad(), AttentionMeter(stack) as meter:
            stack(X, TOKENS, labels=labels)
        assert_unclear(meter.result(), "labels began with the first token of a sequence")

    def test_prompts_of_one_modality_have_no_index(self):
        text = torch.zeros(1, 10, dtype=torch.long)
        diagnosis = measured_after(make_stack(layers=3), X[:1], text, 6)
        assert diagnosis.figure("mdi", rows="generated")[:, 1].isnan().all()
        assert any("No prompt of a generated token has text and another" in s for s in diagnosis.undefined())

    def test_a_reset_forgets_what_was_unclear(self, layer):
        with AttentionMeter(layer) as meter:
            decode(layer, [(0, 3), (3, 7)])
        meter.reset()
        with meter:
            decode(layer, [(0, 7), (7, 8)])
        assert meter.result().unclear == []
        assert found(meter.result()).isfinite().all()

    def test_errors(self, layer):
        meter = AttentionMeter(layer)
        for length in (0, torch.tensor([3, 0])):
            with (
                pytest.raises(ValueError, match="prompt_length must be at least 1, got"),
                meter.generated_after(length),
            ):
                pass
        with (
            torch.no_grad(),
            meter,
            meter.generated_after(5),
            pytest.raises(
                ValueError, match=r"must be a tensor \(B,\) of lengths without padding for a batch with padd"
            ),
        ):
            layer(X, TOKENS)
        with (
            torch.no_grad(),
            AttentionMeter(layer) as meter,
            meter.generated_after(torch.tensor([5, 5])),
            pytest.raises(ValueError, match=r"one number for each of the 3 sequences, got shape \(2,\)"),
        ):
            layer(X, TOKENS)


class TestResults:
    @pytest.fixture
    def diagnosis(self):
        return measured_after(make_stack(layers=3), X, TOKENS, LENGTHS)

    def test_json_round_trip(self, diagnosis):
        data = diagnosis.to_dict()
        assert data["thirds"]["generated rows, with first token"]["mdi"] == diagnosis.thirds("mdi").tolist()
        assert data["generated_tokens"] == 9
        again = Diagnosis.from_json(diagnosis.to_json())
        assert again.to_json() == diagnosis.to_json()

    def test_reasons_survive_json(self):
        layer = make_stack(layers=1).layers[0]
        with AttentionMeter(layer) as meter:
            decode(layer, [(0, 3), (3, 7)])
        again = Diagnosis.from_json(meter.result().to_json())
        assert again.undefined() == meter.result().undefined()
        assert_unclear(again, "several tokens came at once")

    def test_diagnoses_written_before_there_were_generated_rows_still_load(self, diagnosis):
        data = diagnosis.to_dict()
        del data["unclear"], data["thirds"], data["generated_tokens"]
        data["sums"] = [{name: values[:2] for name, values in layer.items()} for layer in data["sums"]]
        again = Diagnosis.from_dict(data)
        torch.testing.assert_close(again.figure("self"), diagnosis.figure("self"))
        assert again.generated_tokens == 0 and found(again).isnan().all()

    def test_comparison_has_the_generated_rows(self, diagnosis):
        lines = diagnosis.compare(diagnosis).to_dict()["lines"]["generated rows, with first token"]
        (line,) = [x for x in lines if (x["measure"], x["modality"]) == ("aei", "vision")]
        assert line["before"] == pytest.approx(diagnosis.figure("aei", rows="generated")[:, 1].mean().item())
        assert line["uniform_before"] == pytest.approx(
            diagnosis.figure("aei", rows="generated", null=True)[:, 1].mean().item()
        )

    def test_thirds_of_too_few_layers(self):
        diagnosis = measured_after(make_stack(layers=2), X, TOKENS, LENGTHS)
        assert diagnosis.thirds("mdi")[:, 1].isnan().tolist() == [False, True, False]
        assert any("no thirds of 2 layers" in sentence for sentence in diagnosis.undefined())

    def test_lines_of_the_figure(self, diagnosis):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        (axis,) = figures.dominance_by_layer(diagnosis).axes
        lines = {line.get_label(): line.get_ydata() for line in axis.lines}
        assert lines[diagnosis.name] == pytest.approx(diagnosis.figure("mdi", rows="generated")[:, 1].tolist())
        uniform = diagnosis.figure("mdi", rows="generated", null=True)[:, 1].tolist()
        assert lines["uniform attention"] == pytest.approx(uniform)
        broad = [line.get_ydata()[0] for line in axis.lines if line.get_linewidth() == 5]
        assert broad == pytest.approx(diagnosis.thirds("mdi")[:, 1].tolist())
        (axis,) = figures.dominance_by_layer(measured(make_stack(layers=3), X, TOKENS)).axes
        assert [text.get_text() for text in axis.texts] == ["not defined in this layout"]


# Transformers ---------------------------------------------------------------------------------------------------------
NEW_TOKENS = 5


class TestTransformers:
    @pytest.fixture(autouse=True)
    def transformers_is_installed(self):
        pytest.importorskip("transformers", reason="transformers is not installed")

    @staticmethod
    def make(family="llava", **options):
        from vision_language import make_inputs, make_model

        return make_model(family), make_inputs(family, **options)

    @staticmethod
    def modality(inputs):
        from vision_language import IMAGE

        return (inputs["input_ids"] == IMAGE).long().masked_fill(inputs["attention_mask"] == 0, -1)

    @staticmethod
    def generate(model, inputs, **options):
        """Of text: a model of random weights makes image tokens too."""
        from vision_language import IMAGE

        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "suppress_tokens": [IMAGE], **options}
        return model.generate(**inputs, **options)

    def eager(self, model, inputs):
        """What ``published`` wants, of Transformers' own eager attention while it generates."""
        before = model.config.text_config._attn_implementation
        model.set_attn_implementation({"text_config": "eager"})
        output = self.generate(model, inputs, output_attentions=True, return_dict_in_generate=True)
        model.set_attn_implementation({"text_config": before})
        modality = self.modality(inputs)
        layers = []
        for layer in range(model.config.text_config.num_hidden_layers):
            steps = [step[layer] for step in output.attentions[1:]]
            layers.append([(step[b, :, 0], modality[b]) for step in steps for b in range(len(modality))])
        return output.sequences, layers

    @pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
    def test_generation_beside_eager_attention(self, family):
        model, inputs = self.make(family)
        tokens, layers = self.eager(model, inputs)
        with AttentionMeter(model) as meter:
            assert torch.equal(self.generate(model, inputs), tokens)
        assert meter.result().generated_tokens == 2 * (NEW_TOKENS - 1)
        assert_published(meter.result(), layers)

    def test_one_pass_over_prompt_and_answer_gives_the_same(self):
        """With labels and with a prompt length, padded on either side."""
        model, inputs = self.make()
        tokens, layers = self.eager(model, inputs)
        prompt, length = inputs["input_ids"].shape[1], inputs["attention_mask"].sum(dim=1)
        new = torch.ones(2, NEW_TOKENS - 1, dtype=torch.long)
        whole = {
            "input_ids": tokens[:, :-1],
            "attention_mask": torch.cat([inputs["attention_mask"], new], dim=1),
            "pixel_values": inputs["pixel_values"],
        }
        labels = whole["input_ids"].masked_fill(torch.arange(prompt + NEW_TOKENS - 1) < prompt, -100)
        with torch.no_grad(), AttentionMeter(model) as meter:
            model(**whole, labels=labels)
        assert_published(meter.result(), layers)
        shift = -(prompt - length[1].item())
        for name in ("input_ids", "attention_mask"):
            whole[name][1] = whole[name][1].roll(shift)
        labels[1] = labels[1].roll(shift)
        for block, extra in ((contextlib.nullcontext(), {"labels": labels}), (None, {})):
            with torch.no_grad(), AttentionMeter(model) as meter, block or meter.generated_after(length):
                model(**whole, **extra)
            torch.testing.assert_close(found(meter.result()), indices(published(layers)[0]), rtol=2e-4, atol=1e-5)

    def test_labels_reach_the_meter_through_peft(self):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        model, inputs = self.make()
        inputs["labels"] = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 8, -100)
        results = []
        for wrap in (lambda m: m, lambda m: peft.get_peft_model(m, peft.LoraConfig(target_modules=["q_proj"]))):
            wrapped = wrap(model)
            with torch.no_grad(), AttentionMeter(wrapped) as meter:
                wrapped(**inputs)
            results.append(meter.result())
            assert results[-1].generated_tokens == (inputs["labels"] >= 0).sum()
        torch.testing.assert_close(found(results[0]), found(results[1]))

    def test_a_trainer_measures_its_answers(self, tmp_path):
        pytest.importorskip("accelerate", reason="accelerate is not installed")
        from transformers import Trainer, TrainingArguments

        model, rows = self.make(padding=None)
        rows["labels"] = rows["input_ids"].masked_fill(torch.arange(rows["input_ids"].shape[1]) < 8, -100)
        data = [{name: tensor[i] for name, tensor in rows.items()} for i in range(2)]
        watch = AttentionMeter(model).callback()
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
        )
        Trainer(model, arguments, train_dataset=data, callbacks=[watch]).train()
        ((_, diagnosis),) = watch.history
        assert diagnosis.unclear == [] and diagnosis.generated_tokens == (rows["labels"] >= 0).sum()
        assert found(diagnosis).isfinite().all()

    def test_a_static_cache(self):
        model, inputs = self.make(padding=None)
        _, layers = self.eager(model, inputs)
        with AttentionMeter(model) as meter:
            self.generate(model, inputs, cache_implementation="static")
        assert_published(meter.result(), layers)

    def test_a_chunked_prefill_must_say_where_the_prompt_ends(self):
        """By hand, from embeddings: ``prefill_chunk_size`` takes no raw images."""
        from transformers import DynamicCache

        model, inputs = self.make()
        _, layers = self.eager(model, inputs)
        seen = {}
        hook = model.get_decoder().register_forward_pre_hook(lambda _, __, kw: seen.update(kw), with_kwargs=True)
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        embeds, modality = seen["inputs_embeds"], self.modality(inputs).clamp(min=0).int()

        def in_chunks(length):
            cache, mask = (
                {self.cache_name(model): DynamicCache(config=model.config.text_config)},
                inputs["attention_mask"],
            )
            with (
                torch.no_grad(),
                AttentionMeter(model) as meter,
                contextlib.nullcontext() if length is None else meter.generated_after(length),
            ):
                for part in (slice(0, 4), slice(4, embeds.shape[1])):
                    pieces = {"inputs_embeds": embeds[:, part], "modality_ids": modality[:, part]}
                    output = model(**pieces, attention_mask=mask[:, : part.stop], **cache)
                for _ in range(NEW_TOKENS - 1):
                    tokens = output.logits[:, -1:].argmax(dim=-1)
                    mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
                    output = model(input_ids=tokens, attention_mask=mask, **cache)
            return meter.result()

        assert_unclear(in_chunks(None), "several tokens came at once after the first pass")
        assert_published(in_chunks(inputs["attention_mask"].sum(dim=1)), layers)

    @staticmethod
    def cache_name(model):
        """``past_key_values`` until Transformers 5.24."""
        return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def test_prompt_lookup_has_no_clear_border(self):
        model, inputs = self.make(rows=1, padding=None)
        inputs["input_ids"][0, -4:] = torch.tensor([7, 8, 7, 8])
        with AttentionMeter(model) as meter:
            self.generate(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3)
        assert_unclear(meter.result(), "Where the prompts end is unclear")

    def test_beams_share_the_prompt_of_their_sequence(self):
        model, inputs = self.make()
        results = []
        for stated in (False, True):
            with AttentionMeter(model) as meter:
                length = inputs["attention_mask"].sum(dim=1)
                with meter.generated_after(length) if stated else contextlib.nullcontext():
                    self.generate(model, inputs, num_beams=3)
            results.append(meter.result())
            assert results[-1].unclear == [] and results[-1].generated_tokens == 6 * (NEW_TOKENS - 1)
        torch.testing.assert_close(found(results[0]), found(results[1]))
        assert found(results[0]).isfinite().all()

    def test_what_fills_up_a_finished_sequence_does_not_count(self):
        model, inputs = self.make()
        tokens, layers = self.eager(model, inputs)
        prompt = inputs["input_ids"].shape[1]
        end = next(t for t in tokens[0, prompt : prompt + 3].tolist() if t not in tokens[1, prompt:].tolist())
        last = prompt + tokens[0, prompt:].tolist().index(end)
        model.generation_config.eos_token_id = end
        with AttentionMeter(model) as meter:
            ended = self.generate(model, inputs)
        assert (ended[0, last + 1 :] == 0).all() and ended.shape == tokens.shape
        expected = [[pair for k, pair in enumerate(rows) if k % 2 == 1 or prompt + k // 2 <= last] for rows in layers]
        assert_published(meter.result(), expected)

    def test_the_next_turn_must_say_where_its_prompt_ends(self):
        from transformers import DynamicCache

        model, inputs = self.make(rows=1, padding=None)
        for stated in (False, True):
            cache = DynamicCache(config=model.config.text_config)
            with AttentionMeter(model) as meter:
                tokens = self.generate(model, inputs, **{self.cache_name(model): cache})
                turn = torch.cat([tokens, torch.tensor([[5, 6, 7]])], dim=1)
                second = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
                with meter.generated_after(turn.shape[1]) if stated else contextlib.nullcontext():
                    self.generate(model, second, **{self.cache_name(model): cache})
            if stated:
                assert meter.result().unclear == [] and meter.result().generated_tokens == 2 * (NEW_TOKENS - 1)
                assert found(meter.result()).isfinite().all()
            else:
                assert_unclear(meter.result(), "several tokens came at once after the first pass")

    def test_a_window_that_drops_the_prompt_is_not_defined_in_its_layers(self):
        model, inputs = self.make("gemma3", padding=None)  # a window of 8 in the first of three layers
        _, layers = self.eager(model, inputs)
        with AttentionMeter(model) as meter:
            self.generate(model, inputs)
        diagnosis = meter.result()
        assert found(diagnosis)[0].isnan().all()
        expected = indices(published(layers[1:])[0])
        torch.testing.assert_close(found(diagnosis)[1:], expected, rtol=2e-4, atol=1e-5)
        assert diagnosis.thirds("mdi")[:, 1].isnan().tolist() == [True, False, False]
        assert diagnosis.generated_tokens == 2 * (NEW_TOKENS - 1)
        assert any("Layers 0 have a sliding window" in sentence for sentence in diagnosis.undefined())

    def test_a_model_with_moda(self):
        """A prior that favours the image lowers MDI as seen by generated tokens, by about e^-2."""
        from moda_ext.integrations.transformers import MODAConfig, apply_moda

        model, inputs = self.make()
        results = []
        for attached in (False, True):
            if attached:
                apply_moda(model, MODAConfig.fixed_prior([[0.0, 2.0], [0.0, 0.0]]))
            with AttentionMeter(model) as meter:
                self.generate(model, inputs)
            results.append(meter.result().thirds("mdi")[2, 1])
        assert results[1] < 0.3 * results[0]
