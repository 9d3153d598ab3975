"""What ``moda-ext serve`` says before it starts vLLM, and of a vLLM that ended. Needs no vLLM."""

import json
import shutil
import socket
import sys
from importlib import metadata

import pytest

pytest.importorskip("typer", reason="typer is not installed")

from typer.testing import CliRunner  # noqa: E402  the command line may be missing

from moda_ext._version import VLLM_BELOW, VLLM_MIN, VLLM_REQUIREMENT, VLLM_TESTED, series  # noqa: E402
from moda_ext.integrations.settings import MODAConfig, modality_names  # noqa: E402
from moda_ext.integrations.vllm import ANY_FAMILY, architectures, serve, versions  # noqa: E402


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Said, so that nobody asks how much is free."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture
def tested_vllm(monkeypatch):
    monkeypatch.setattr(versions, "found", lambda: VLLM_TESTED)


@pytest.fixture
def checkpoint(tmp_path):
    """A directory with the files that a checkpoint has."""
    path = tmp_path / "llava-moda"
    path.mkdir()
    config = {"model_type": "llava_moda", "dtype": "float32", "text_config": {"moda": MODAConfig().values()}}
    for name in ("processor_config.json", "tokenizer_config.json"):
        (path / name).write_text("{}")
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").touch()
    (path / "chat_template.jinja").touch()
    return path


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def test_a_checkpoint_with_all_it_needs(tested_vllm, checkpoint, port):
    serve.check(checkpoint, "127.0.0.1", port, [])


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("config.json", "is no checkpoint: it has no config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer_config.json", "has no tokenizer: processor.save_pretrained"),
        ("processor_config.json", "has no processor: processor.save_pretrained"),
        ("chat_template.jinja", "has no chat template"),
        (".", "no such directory"),
    ],
)
def test_what_is_missing_is_said(tested_vllm, checkpoint, port, file, reason):
    shutil.rmtree(checkpoint) if file == "." else (checkpoint / file).unlink()
    with pytest.raises(serve.ServeError, match=reason):
        serve.check(checkpoint, "127.0.0.1", port, [])


@pytest.mark.parametrize(
    "change", [{"model_type": "llava"}, {"text_config": {}}, {"text_config": None}], ids=["type", "settings", "text"]
)
def test_a_model_without_moda_is_named(tested_vllm, checkpoint, port, change):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(serve.ServeError, match="is a model of type '.*' without MODA"):
        serve.check(checkpoint, "127.0.0.1", port, [])


def test_a_broken_config_and_an_adapter_are_named(tested_vllm, checkpoint, port):
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(serve.ServeError, match="config.json cannot be read"):
        serve.check(checkpoint, "127.0.0.1", port, [])
    (checkpoint / "adapter_config.json").touch()
    with pytest.raises(serve.ServeError, match="holds an adapter of PEFT"):
        serve.check(checkpoint, "127.0.0.1", port, [])


def test_a_chat_template_may_come_from_elsewhere(tested_vllm, checkpoint, port):
    (checkpoint / "chat_template.jinja").unlink()
    serve.check(checkpoint, "127.0.0.1", port, ["--chat-template", "other.jinja"])
    (checkpoint / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    serve.check(checkpoint, "127.0.0.1", port, [])


def test_a_port_that_is_taken_is_named(tested_vllm, checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(serve.ServeError, match=f"cannot listen on 127.0.0.1:{port}: .*in use"):
            serve.check(checkpoint, "127.0.0.1", port, [])


def test_a_torchvision_of_another_torch_is_named(tested_vllm, checkpoint, port, monkeypatch, tmp_path):
    """Here one that fails as that of CUDA does beside torch for the CPU."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms ...')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(serve.ServeError, match=r"torchvision does not load beside torch .*torchvision::nms"):
        serve.check(checkpoint, "127.0.0.1", port, [])


@pytest.mark.parametrize(
    ("version", "reason"),
    [(None, "vLLM is not installed"), ("0.31.1", "but found vllm 0.31.1"), ("0.33.0", "but found vllm 0.33.0")],
)
def test_a_vllm_that_is_missing_or_untested_is_named(monkeypatch, version, reason):
    monkeypatch.setattr(versions, "found", lambda: version)
    assert (
        reason in versions.unsupported_vllm() and f"pip install 'vllm{VLLM_REQUIREMENT}'" in versions.unsupported_vllm()
    )


def test_the_versions_of_vllm_agree(monkeypatch):
    assert f">={series(VLLM_MIN)},<{series(VLLM_BELOW)}" == VLLM_REQUIREMENT
    monkeypatch.setattr(versions, "found", lambda: VLLM_TESTED)
    assert versions.unsupported_vllm() is None


def test_vllm_is_found_under_the_name_of_either_build(monkeypatch):
    def version(name):
        if name == "vllm-cpu":
            return "0.32.0"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert versions.found() == "0.32.0"


def test_the_server_runs_as_the_model_was_saved(checkpoint):
    words = serve.arguments(checkpoint, "127.0.0.1", 8000, False, ["--max-model-len", "99"])
    assert words == [
        *("--model", str(checkpoint), "--host", "127.0.0.1", "--port", "8000"),
        *("--served-model-name", "llava-moda", "--dtype", "float32", "--max-model-len", "99"),
    ]
    words = serve.arguments(checkpoint, "127.0.0.1", 8000, True, ["--dtype=bfloat16", "--served-model-name", "mine"])
    assert words[6:8] == ["--additional-config", '{"moda_metrics": true}'] and words.count("--served-model-name") == 1


def test_on_a_cpu_the_server_leaves_memory_to_others(checkpoint, monkeypatch):
    pytest.importorskip("psutil", reason="psutil is not installed")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(serve.torch.version, "cuda", None)
    option = "--gpu-memory-utilization"
    words = serve.arguments(checkpoint, "127.0.0.1", 8000, False, [])
    assert 0 < float(words[words.index(option) + 1]) <= 0.5
    assert serve.arguments(checkpoint, "127.0.0.1", 8000, False, [f"{option}=0.9"]).count(option) == 0
    monkeypatch.setattr(serve.torch.version, "cuda", "13.0")
    assert option not in serve.arguments(checkpoint, "127.0.0.1", 8000, False, [])


@pytest.mark.parametrize(
    "given", (["--model-impl", "transformers"], ["--model-impl=transformers"], ["--model_impl=transformers"])
)
def test_the_transformers_backend_keeps_moda(checkpoint, given):
    words = serve.arguments(checkpoint, "127.0.0.1", 8000, False, [*given, "--seed", "1"])
    assert words[-4:] == ["--seed", "1", "--hf-overrides", json.dumps({"architectures": [ANY_FAMILY]})]
    assert ANY_FAMILY in architectures()


def test_what_a_file_of_options_says_is_kept(checkpoint, tmp_path):
    """vLLM takes what the command line says before that."""
    file = tmp_path / "options.yaml"
    file.write_text("dtype: bfloat16\nserved_model_name: mine\ngpu-memory-utilization: 0.3\n")
    words = serve.arguments(checkpoint, "127.0.0.1", 8000, False, ["--config", str(file)])
    assert not {"--dtype", "--served-model-name", "--gpu-memory-utilization"} & set(words)
    file.write_text("additional-config: {}\n")
    with pytest.raises(serve.ServeError, match="--metrics is --additional-config"):
        serve.arguments(checkpoint, "127.0.0.1", 8000, True, [f"--config={file}"])
    file.write_text("model-impl: transformers\n")
    with pytest.raises(serve.ServeError, match="must be on the command line"):
        serve.arguments(checkpoint, "127.0.0.1", 8000, False, ["--config", str(file)])
    file.write_text("- dtype\n")
    with pytest.raises(serve.ServeError, match="must hold a table of options"):
        serve.arguments(checkpoint, "127.0.0.1", 8000, False, ["--config", str(file)])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--additional-config", "{}"], "--metrics is --additional-config"),
        (["--additional_config={}"], "--metrics is --additional-config"),
        (["--additional-config.x", "1"], "--metrics is --additional-config"),
        (["--model_impl=transformers", "--hf_overrides.x", "1"], "--model-impl transformers is --hf-overrides"),
        (["--config", "nowhere.yaml"], "--config: cannot read nowhere.yaml"),
        (["--model-impl", "transformers", "--hf-overrides", "{}"], "--model-impl transformers is --hf-overrides"),
    ],
)
def test_options_that_exclude_each_other_are_named(checkpoint, options, reason):
    with pytest.raises(serve.ServeError, match=reason):
        serve.arguments(checkpoint, "127.0.0.1", 8000, True, options)


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        (["(x) NotImplementedError: MODA cannot be served here: why", "RuntimeError: later"], "MODA cannot be served"),
        (["ValueError: cause", "RuntimeError: Engine core initialization failed. See"], "status 3: ValueError: cause"),
        (["entry.py: error: unrecognized arguments: --x"], "status 3: error: unrecognized arguments: --x"),
        (["nothing", "to read"], "status 3; its last lines were:\nnothing\nto read"),
    ],
)
def test_why_vllm_ended_is_said(monkeypatch, printed, said):
    program = f"import sys; print({chr(10).join(printed)!r}); sys.exit(3)"
    server = serve.Server([], "127.0.0.1", 1, False, lambda line: None)
    server.command = [server.command[0], "-c", program]
    with server, pytest.raises(serve.ServeError) as error:
        server.wait_until_ready()
    assert said in str(error.value)


def test_the_command_says_it_in_a_sentence(tested_vllm, tmp_path):
    from moda_ext.cli import app

    result = CliRunner().invoke(app, ["serve", str(tmp_path / "nothing")])
    assert result.exit_code == 1 and "moda-ext serve: no such directory" in result.output


def test_modalities_have_the_names_of_their_tokens():
    assert modality_names({"text": 0, "image": 1, "video": 1}) == ("text", "vision")
    assert modality_names({"text": 0, "audio": 2, "image": 1, "video": 2}) == ("text", "image", "audio/video")
