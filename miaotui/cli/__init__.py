"""The command line, `miaotui`."""


def main() -> None:
    """Entry point; imports nothing before it is called, so that `--help` is quick."""
    from miaotui.cli.app import app

    app(prog_name="miaotui")
