"""``python -m miaotui.training``: run, export, evaluate, split, private."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from miaotui.training.config import TrainConfig

DEFAULTS = TrainConfig()

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)

DataOption = Annotated[Path, typer.Option(help="folder of the SQuAD-format files")]
BUNDLED = Path(__file__).resolve().parent.parent / "bundled" / "qa"
SeedOption = Annotated[int, typer.Option(help="decides all randomness")]
FractionOption = Annotated[float, typer.Option(help="part of the training questions used")]
LimitOption = Annotated[int, typer.Option(help="most questions of each domain")]
SettingsOption = Annotated[
    str, typer.Option(help="other settings as JSON, for example '{\"steps\": 100}'")
]
WorkOption = Annotated[Path, typer.Option(help="folder for checkpoints and logs")]


@app.callback()
def main() -> None:
    """Train, score and export the bundled question-answering model."""


def configure(data: Path, work: Path, seed: int, fraction: float, settings: str) -> TrainConfig:
    """The defaults with the options, and with ``settings`` (JSON) over both."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    given = TrainConfig.model_validate_json(settings).model_dump(exclude_unset=True)
    options = {"data": data, "work": work, "seed": seed, "fraction": fraction}
    return TrainConfig(**{**options, **given})


@app.command()
def run(
    data: DataOption = DEFAULTS.data,
    work: WorkOption = DEFAULTS.work,
    seed: SeedOption = DEFAULTS.seed,
    fraction: FractionOption = DEFAULTS.fraction,
    resume: Annotated[bool, typer.Option(help="go on from the checkpoint, if any")] = True,
    settings: SettingsOption = "{}",
) -> None:
    """Train from the base, or go on from the last checkpoint."""
    from miaotui.training.pipeline import make_trainer, set_up

    config = configure(data, work, seed, fraction, settings)
    trainer = make_trainer(set_up(config))
    if resume and trainer.checkpoint_path.exists():
        trainer.resume()
    trainer.run()


@app.command()
def export(
    data: DataOption = DEFAULTS.data,
    work: WorkOption = DEFAULTS.work,
    out: Annotated[Path, typer.Option(help="folder to write")] = BUNDLED,
    limit: LimitOption = 400,
    settings: SettingsOption = "{}",
) -> None:
    """Write the trained model for transformers, calibrate it, score it, write its card."""
    from miaotui.training import pipeline

    config = configure(data, work, DEFAULTS.seed, DEFAULTS.fraction, settings)
    typer.echo(pipeline.export(pipeline.set_up(config), out, limit).model_dump_json(indent=2))


@app.command()
def evaluate(
    data: DataOption = DEFAULTS.data,
    model: Annotated[Path, typer.Option(help="folder of an exported model")] = BUNDLED,
    limit: LimitOption = 400,
    calibrate: Annotated[bool, typer.Option(help="find the thresholds anew")] = False,
    card: Annotated[bool, typer.Option(help="write the scores to its model card")] = False,
) -> None:
    """Score an exported model on the held-out questions, with the thresholds it carries."""
    from miaotui.training import pipeline

    config = configure(data, DEFAULTS.work, DEFAULTS.seed, DEFAULTS.fraction, "{}")
    found = pipeline.evaluate(config, model, limit, calibrate=calibrate, card=card)
    typer.echo(found.model_dump_json(indent=2))


@app.command()
def split(
    out: Annotated[Path, typer.Argument(help="folder to write")],
    data: DataOption = DEFAULTS.data,
) -> None:
    """Write each domain's train, dev and heldout questions as SQuAD files of their own."""
    from miaotui.training.data import DOMAINS, SPLITS, read_corpus, write_squad

    corpus = read_corpus(data)
    out.mkdir(parents=True, exist_ok=True)
    for part in SPLITS:
        for domain in DOMAINS:
            questions = corpus.select(part, domain.name)
            file = out / f"{part}-{domain.name}.json"
            write_squad(file, corpus, questions)
            typer.echo(f"{file}: {len(questions)} questions")


@app.command()
def private(
    questions: Annotated[list[Path], typer.Argument(help="SQuAD-format files of your own")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    model: Annotated[Path, typer.Option(help="folder of the model to start from")] = BUNDLED,
    epsilon: Annotated[float, typer.Option(help="privacy to be spent at most")] = 8.0,
    settings: SettingsOption = "{}",
) -> None:
    """Fine-tune on your own questions with differential privacy, and print what was spent."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        from miaotui.training.private import PrivateConfig, PrivateTrainer, read_questions
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"{error}; pip install 'miaotui[private]'") from None

    given = PrivateConfig.model_validate_json(settings).model_dump(exclude_unset=True)
    trainer = PrivateTrainer(
        model, read_questions(questions), PrivateConfig(**{"epsilon": epsilon, **given})
    )
    steps = trainer.config.steps
    every = max(1, steps // 20)
    try:
        for spent in trainer.run():
            if spent.steps % every == 0 or spent.steps == steps:
                typer.echo(f"step {spent.steps} of {steps}: epsilon {spent.epsilon:g} spent")
    except KeyboardInterrupt:
        typer.echo("interrupted: what is trained so far is kept")
    trainer.save(out)
    typer.echo(trainer.spent.model_dump_json(indent=2))


if __name__ == "__main__":
    app()
