"""``python -m moda_ext``: the command ``moda-ext``."""


def main() -> None:
    try:
        from moda_ext.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        raise SystemExit(f"moda-ext needs {error.name}: pip install 'moda_ext[cli]'") from error
    app(prog_name="moda-ext")


if __name__ == "__main__":
    main()
