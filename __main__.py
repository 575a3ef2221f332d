"""``xtoken`` and ``python -m xtoken``: the command line, or a line about what keeps it from starting."""

import sys


def main() -> None:
    """Run the command line; where a package that it needs is broken, ``xtoken doctor`` still says which."""
    try:
        from xtoken.cli import app
    except Exception as error:  # a package may fail to import in any way
        from xtoken.schemas.ui.doctor import without_command_line

        sys.stderr.write(f"{without_command_line(error, sys.argv[1:])}\n")
        raise SystemExit(1) from None
    app()


if __name__ == "__main__":
    main()
