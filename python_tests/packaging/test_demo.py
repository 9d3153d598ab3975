"""What the demo prints and draws, on a small layer."""

import pytest
import torch

pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")
pytest.importorskip("PIL", reason="the demo reads a photograph with Pillow")

from moda_ext import demo  # noqa: E402


@pytest.fixture
def small(monkeypatch):
    for name, value in {"EMBEDDING": 256, "QUERY_HEADS": 4, "KEY_HEADS": 2, "HEAD_DIM": 32, "STEPS": 8}.items():
        monkeypatch.setattr(demo, name, value)


def no_progress(steps, description):
    return steps


def test_new_aligner_is_the_identity_and_training_approaches_the_target(small):
    tokens = demo.make_tokens()
    layer = demo.Layer(tokens)
    (new, trained), shares = demo.train_aligner(layer, slice(tokens.after_start, None), no_progress)
    assert all(torch.equal(view, layer.query) for view in new.views)
    assert abs(shares[-1] - demo.TARGET) < abs(shares[0] - demo.TARGET)
    mass = layer.attend(trained)[2][0, :, tokens.after_start :, demo.VISION]
    assert mass.mean().item() == pytest.approx(shares[-1], abs=1e-5)


def test_spectra_add_up_to_one_and_end_at_the_number_of_keys(small):
    layer = demo.Layer(demo.make_tokens(with_crops=True))
    text, vision = demo.make_spectra(layer)
    assert (text.keys, vision.keys) == (28, 5 * demo.GRID**2)
    for spectrum in (text, vision):
        for eigenvalues in (spectrum.eigenvalues, spectrum.null):
            assert eigenvalues.sum().item() == pytest.approx(1, abs=1e-5)
            assert (eigenvalues[spectrum.keys :].abs() < 1e-6).all()
        assert 1 <= spectrum.dimensions(spectrum.eigenvalues) < spectrum.dimensions(spectrum.null)


def test_crops_are_the_picture(small):
    tokens = demo.make_tokens()
    crops = demo.crop_colours().view(demo.CROPS, demo.CROPS, demo.GRID, demo.GRID, 3)
    fine = crops.permute(4, 0, 2, 1, 3).reshape(1, 3, demo.CROPS * demo.GRID, -1)
    coarse = torch.nn.functional.avg_pool2d(fine, demo.CROPS)[0].flatten(1).T
    assert (coarse - tokens.colours).abs().max() < 0.1  # both are means over the same parts of the photograph


def test_demo_runs_and_draws(small, tmp_path, capsys):
    demo.main(["--out", str(tmp_path / "demo.png")])
    assert (tmp_path / "demo.png").stat().st_size > 100_000
    printed = capsys.readouterr().out
    assert "a new one is the identity, bit for bit" in printed
    assert demo.ALIGNER in printed and "2880" in printed
