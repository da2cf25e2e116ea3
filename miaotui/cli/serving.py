"""The commands of `miaotui serve`: one service in the foreground."""

from __future__ import annotations

import typer

_SERVE_SETTINGS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],  # the service's own flags follow, --help among them
}

serve_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Run one service in the foreground, for a Miaotui spread over several machines.

Each takes its settings as flags or from the environment; \
[bold]miaotui serve shard --help[/] lists them.""",
    epilog="""[bold]Example[/]: two stages on two machines

  a$ miaotui serve tokenizer --model ./qa

  a$ miaotui serve shard --model ./qa --stage 0 --stages a:50060,b:50060

  b$ miaotui serve shard --model ./qa --stage 1 --stages a:50060,b:50060

  a$ miaotui serve gateway --tokenizer a:50051 --shard a:50060""",
)


@serve_app.command("tokenizer", context_settings=_SERVE_SETTINGS)
def serve_tokenizer(context: typer.Context) -> None:
    """Clean and tokenise text."""
    _serve("tokenizer", context)


@serve_app.command("shard", context_settings=_SERVE_SETTINGS)
def serve_shard(context: typer.Context) -> None:
    """Hold one stage of the model."""
    _serve("shard", context)


@serve_app.command("gateway", context_settings=_SERVE_SETTINGS)
def serve_gateway(context: typer.Context) -> None:
    """Answer over HTTP and gRPC."""
    _serve("gateway", context)


def _serve(service: str, context: typer.Context) -> None:
    from miaotui.cli.serve import serve

    serve(service, context.args)
