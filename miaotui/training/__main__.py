"""``python -m miaotui.training``: run, evaluate, export."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from miaotui.training.config import TrainConfig

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)

DataOption = Annotated[Path, typer.Option(help="folder of the SQuAD-format files")]
WorkOption = Annotated[Path, typer.Option(help="folder for checkpoints and logs")]


@app.callback()
def main() -> None:
    """Train, score and export the bundled question-answering model."""


@app.command()
def run(
    data: DataOption = TrainConfig().data,
    work: WorkOption = TrainConfig().work,
    seed: Annotated[int, typer.Option()] = TrainConfig().seed,
    fraction: Annotated[float, typer.Option(help="part of the questions")] = 1.0,
    resume: Annotated[bool, typer.Option(help="go on from the checkpoint, if any")] = True,
    settings: Annotated[
        str, typer.Option(help="other settings as JSON, for example '{\"steps\": 100}'")
    ] = "{}",
) -> None:
    """Train from the base, or go on from the last checkpoint."""
    from miaotui.training.pipeline import make_trainer, set_up

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    given = TrainConfig.model_validate_json(settings).model_dump(exclude_unset=True)
    config = TrainConfig(
        **{"data": data, "work": work, "seed": seed, "fraction": fraction, **given}
    )
    trainer = make_trainer(set_up(config))
    if resume and trainer.checkpoint_path.exists():
        trainer.resume()
    trainer.run()


if __name__ == "__main__":
    app()
