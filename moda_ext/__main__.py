"""``python -m moda_ext``: the command ``moda-ext``."""

EXTRAS = {
    "cli": ("typer", "rich", "matplotlib", "PIL", "scipy", "transformers"),
    "train": ("accelerate", "datasets", "gguf", "peft", "yaml"),
}


def main() -> None:
    try:
        from moda_ext.cli import app

        app(prog_name="moda-ext")
    except ModuleNotFoundError as error:
        extra = next((extra for extra, names in EXTRAS.items() if error.name in names), None)
        if extra is None:
            raise
        raise SystemExit(f"moda-ext needs {error.name}: pip install 'moda_ext[{extra}]'") from error


if __name__ == "__main__":
    main()
