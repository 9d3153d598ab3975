"""What a recorder sees of a model's attention equals its eager attention."""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")
from tolerance import assert_close
from trained_models import SPECIAL, family, logits_of, make_trained, positions_of
from vision_language import IMAGE, make_inputs, make_model

from moda_ext.integrations.transformers import recording


@family
def test_recording_a_plain_model_equals_its_eager_attention(family):
    model, inputs, records = make_model(family), make_inputs(family), []
    before = logits_of(family, model, inputs)
    with recording(model, records.append):
        measured = logits_of(family, model, inputs)
    assert torch.equal(logits_of(family, model, inputs), before)  # all as it was
    kept = inputs["attention_mask"] == 1
    assert (measured - before)[kept].abs().max() < 1e-5

    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        positions = positions_of(family, inputs["attention_mask"])
        attentions = model(**inputs, **positions, output_attentions=True, use_cache=False).attentions
    assert [record.layer for record in records] == list(range(len(attentions)))
    ids = (inputs["input_ids"] == IMAGE).int().masked_fill(~kept, -1)
    for record, attention in zip(records, attentions, strict=True):
        assert torch.equal(record.query_modality, ids) and torch.equal(record.key_modality, ids)
        rows = kept[:, None].expand(record.mass.shape[:3])
        expected = torch.stack([(attention * (ids == m)[:, None, None]).sum(-1) for m in (0, 1)], dim=-1)
        assert_close(record.mass[rows], expected[rows])
        assert_close(record.weights()[rows], attention[rows])
        assert torch.equal(record.weights(2, 7), record.weights()[:, :, 2:7])
        seen = torch.stack([((attention[:, 0] > 0) & (ids == m)[:, None]).sum(-1) for m in (0, 1)], dim=-1)
        assert torch.equal(record.key_counts()[kept], seen[kept])


@pytest.mark.parametrize("name", ("llava", "gemma3"))
def test_recording_a_model_with_moda(name):
    model, inputs, records = make_trained(name), make_inputs(name), []
    with recording(model, records.append), pytest.raises(ValueError, match="being recorded already"):
        recording(model, records.append).__enter__()
    before = logits_of(name, model, inputs)
    with recording(model, records.append):
        recorded = logits_of(name, model, inputs)
    assert_close(recorded[inputs["attention_mask"] == 1], before[inputs["attention_mask"] == 1])
    rows = (inputs["attention_mask"] == 1)[:, None].expand(records[-1].mass.shape[:3])
    for record in records:
        mass = torch.stack(
            [(record.weights() * (record.key_modality == m)[:, None, None]).sum(-1) for m in (0, 1)], dim=-1
        )
        assert_close(mass[rows], record.mass[rows])
        assert record.mass.sum(-1)[rows].max() < 1 + 1e-6
    assert records[-1].query.dim() == 5 and records[-1].bias is not None


def test_recording_while_decoding_with_a_static_cache():
    model, inputs, records = make_model("llava"), make_inputs("llava"), []
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    with recording(model, records.append):
        model.generate(**inputs, **options)
    for record in records:
        assert_close(record.mass.sum(-1)[0], torch.ones_like(record.mass.sum(-1)[0]))
    assert int(records[-1].key_counts()[0].sum()) == inputs["input_ids"].shape[1] + 2


def test_recording_sliding_windows_while_decoding():
    model, inputs, records = make_model("gemma3"), make_inputs("gemma3"), []
    options = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": SPECIAL}
    with recording(model, records.append):
        measured = model.generate(**copy.deepcopy(inputs), **options)
    assert torch.equal(measured, model.generate(**copy.deepcopy(inputs), **options))
    for record in records:
        assert_close(record.mass.sum(-1)[0], torch.ones_like(record.mass.sum(-1)[0]))
    last = records[-3]  # the window of the last step: 8 of the tokens, none of them of the image
    assert last.layer == 0 and last.key_counts()[0].tolist() == [[8, 0]]
    with recording(model, records.append), pytest.raises(NotImplementedError, match="static sliding-window cache"):
        model.generate(**inputs, **options, cache_implementation="static")
