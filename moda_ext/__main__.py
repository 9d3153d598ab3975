"""``python -m moda_ext``: the command ``moda-ext``."""


def main() -> None:
    try:
        from moda_ext.cli import app

        app(prog_name="moda-ext")
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "matplotlib", "PIL", "scipy", "transformers"):
            raise
        raise SystemExit(f"moda-ext needs {error.name}: pip install 'moda_ext[cli]'") from error


if __name__ == "__main__":
    main()
