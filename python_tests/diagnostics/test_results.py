"""What a diagnosis is written to: JSON, data frames, figures, pictures."""

import dataclasses
import importlib
import types

import pytest
import torch
from diagnosed import FAMILIES, TOKENS, make_stack, measured

from moda_ext.diagnostics import Diagnosis, figures


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
        """``image_layout`` of an image of four colours in Transformers' own tiles, and what the text stack gets."""
        from vision_language import FAMILIES, IMAGE, make_model

        from moda_ext.diagnostics.runner import image_layout

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
        return image_layout(model, types.SimpleNamespace(image_processor=of_image), inputs, image), seen

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
