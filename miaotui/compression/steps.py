"""Does the steps of a compression to a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miaotui.compression.errors import CompressionError
from miaotui.compression.factorize import factorize
from miaotui.compression.methods import Step
from miaotui.compression.prune import (
    layer_losses,
    prune_heads,
    prune_layers,
    prune_neurons,
    prune_two_of_four,
    prune_weights,
    sensitivity,
)
from miaotui.compression.quantize import quantize, quantize_words
from miaotui.compression.questions import (
    Labelled,
    labelled_batches,
    labelled_passages,
    passage_texts,
    read_examples,
)
from miaotui.compression.recover import recover, recover_privately
from miaotui.compression.statistics import input_statistics
from miaotui.compression.workspace import Workspace
from miaotui.text.tokenizer import TextTokenizer

if TYPE_CHECKING:  # opacus is an extra
    from miaotui.training.dpsgd import PrivacyConfig, PrivateSteps


@dataclass(frozen=True)
class Options:
    """How to compress, beside the method.

    Attributes:
        calibrate: SQuAD files to calibrate scales, measure sensitivity and recover on.
        evaluate: SQuAD files to score before and after; others than `calibrate`'s.
        calibration_questions: at most so many of each file of `calibrate`.
        limit: at most so many of each file of `evaluate`.
        group_size: inputs, or values of a word's embedding, that share a scale, below 8 bits.
        second_order: sensitivity by the Fisher diagonal rather than by the gradient.
        recover_steps: of distillation after pruning or factorising, and through the rounding of a
            quantisation that is static or has fewer than 8 bits; 0: none.
        recover_rate: the learning rate that this begins with; it falls to 0.
        recover_questions: at most so many of each file of `calibrate` are recovered on; 0: those
            that are calibrated on, which need not be as many.
        seed: of the questions drawn.
        private: SQuAD files to recover on instead of `calibrate`, with differential privacy
            (DP-SGD): all their questions, and for nothing else.
        privacy: how much of it may be spent by all recoveries together; None: the defaults.
    """

    calibrate: tuple[Path, ...] = ()
    evaluate: tuple[Path, ...] = ()
    calibration_questions: int = 64
    limit: int = 200
    group_size: int = 32
    second_order: bool = False
    recover_steps: int = 0
    recover_rate: float = 5e-5
    seed: int = 0
    private: tuple[Path, ...] = ()
    privacy: PrivacyConfig | None = None
    recover_questions: int = 0

    def resolved(self) -> Options:
        """The same, with files by their absolute paths."""
        return replace(
            self,
            calibrate=tuple(file.resolve() for file in self.calibrate),
            evaluate=tuple(file.resolve() for file in self.evaluate),
            private=tuple(file.resolve() for file in self.private),
        )


@dataclass(frozen=True)
class PrivateRecovery:
    """The passages to recover on, each with its questions, and the account of all recoveries."""

    passages: Sequence[Sequence[Labelled]]
    steps: PrivateSteps

    @classmethod
    def of(cls, tokenizer: TextTokenizer, recoveries: int, options: Options) -> PrivateRecovery:
        """Read the private files.

        All questions: which of them a draw takes would depend on the other passages.

        Raises CompressionError: opacus is not installed, or the files are of no use.
        """
        try:
            from miaotui.training.dpsgd import PrivacyConfig, PrivateSteps
        except ModuleNotFoundError as error:
            raise CompressionError(f"{error}; pip install 'miaotui[private]'") from None
        seen = passage_texts(options.private) & passage_texts(
            (*options.calibrate, *options.evaluate)
        )
        if seen:
            raise CompressionError(
                f"{len(seen)} private passages are also in --calibrate or --evaluate, whose "
                "questions are read without noise; give other questions there"
            )
        passages = labelled_passages(read_examples(options.private, tokenizer, limit=None))
        try:
            steps = PrivateSteps(
                options.privacy or PrivacyConfig(),
                passages=len(passages),
                steps=recoveries * options.recover_steps,
            )
        except ValueError as error:
            raise CompressionError(str(error)) from None
        return cls(passages, steps)


def apply_step(
    workspace: Workspace,
    step: Step,
    batches: Sequence[Labelled],
    options: Options,
    private: PrivateRecovery | None = None,
    recovering: Sequence[Labelled] | None = None,
) -> dict[str, Any]:
    """Do one step to a model, in place; returns what to report of it.

    `batches`: to calibrate on; `recovering`: to recover on, None: the same.
    """
    done: dict[str, Any] = {}
    teacher = None
    if (step.takes_away or step.rounds_coarsely) and options.recover_steps:
        teacher = Workspace.open(workspace.directory)

    def train(*, exactly: bool = False) -> None:
        assert teacher is not None
        losses = recover(
            workspace,
            teacher,
            batches if recovering is None else recovering,
            options.recover_steps,
            learning_rate=options.recover_rate,
            exactly=exactly,
        )
        tenth = max(1, len(losses) // 10)
        done["recovery_loss"] = [
            round(sum(part) / tenth, 4) for part in (losses[:tenth], losses[-tenth:])
        ]

    if step.kind == "quantize":
        trains = teacher is not None and not options.private
        quantize(
            workspace,
            int(step.value),
            static=step.static,
            batches=batches,
            group=options.group_size,
            # In bfloat16 the rounding that it is to learn would be one of two.
            train=partial(train, exactly=True) if trains else None,
        )
        return done
    if step.kind == "words":
        quantize_words(workspace, int(step.value), options.group_size)
        return done
    if step.kind == "factorize":
        statistics = None
        if step.name == "asvd":
            statistics = input_statistics(workspace, batches, gram=True)
        done["ranks"] = factorize(workspace, step.value, statistics)
    elif step.kind == "decompose":
        workspace.decompose(int(step.value))
    elif step.name == "prune-layers":
        done["layers_taken_out"] = prune_layers(workspace, batches, int(step.value))
    else:
        found = sensitivity(workspace, batches, second_order=options.second_order)
        if step.name == "prune-weights":
            done["zeros"] = prune_weights(workspace, found, step.value)
        elif step.name == "prune-2:4":
            prune_two_of_four(workspace, found)
        elif step.name == "prune-heads":
            done["heads_kept"] = prune_heads(workspace, found, step.value)
        else:
            done["neurons_kept"] = prune_neurons(workspace, found, step.value)
    if teacher is not None and private is not None:
        recover_privately(
            workspace,
            teacher,
            private.passages,
            options.recover_steps,
            private.steps,
            learning_rate=options.recover_rate,
        )
    elif teacher is not None:
        train()
    return done


def check(steps: Sequence[Step], options: Options) -> None:
    """Refuse what cannot be done for want of questions, and settings out of range.

    Raises:
        CompressionError: says which.
    """
    needing = [str(step) for step in steps if step.needs_questions]
    recovers = bool(options.recover_steps) and any(step.takes_away for step in steps)
    rounds = bool(options.recover_steps) and any(step.rounds_coarsely for step in steps)
    if options.private and not recovers:
        raise CompressionError(
            "private questions are for recovery only; give --recover-steps, and a method that "
            "prunes, factorises or decomposes"
        )
    if (recovers or rounds) and not options.private:
        needing.append("recovery")
    if needing and not options.calibrate:
        raise CompressionError(
            f"{', '.join(needing)}: needs questions to look at; give a SQuAD file with --calibrate"
        )
    if options.recover_questions < 0:
        raise CompressionError("recover questions must be at least 0")
    if options.group_size < 1 or options.limit < 1 or options.calibration_questions < 1:
        raise CompressionError("group size, limit and calibration questions must be at least 1")
    if not 0 < options.recover_rate < 1:
        raise CompressionError(
            f"recover rate {options.recover_rate:g}: a learning rate above 0 and below 1, such as "
            "1e-4"
        )


def calibration_batches(
    tokenizer: TextTokenizer, options: Options, limit: int | None = None
) -> list[Labelled]:
    """Batches of the questions to calibrate on; none where no file is given.

    `limit`: at most so many of each file; None: as the options say.

    Raises:
        CompressionError: a file cannot be read, or holds no answer.
    """
    if not options.calibrate:
        return []
    examples = read_examples(
        options.calibrate,
        tokenizer,
        limit=limit or options.calibration_questions,
        # Other questions than those evaluated, where a file is given for both.
        seed=options.seed + 1,
    )
    # The training wants batches that are not all of one file.
    random.Random(options.seed).shuffle(examples)
    batches = list(labelled_batches(examples))
    if not batches:
        raise CompressionError(
            f"{', '.join(map(str, options.calibrate))}: no question whose answer stands in its "
            "passage; such are needed to calibrate on"
        )
    return batches


def layer_sensitivities(
    workspace: Workspace, batches: Sequence[Labelled], options: Options
) -> dict[str, Any]:
    """How much each layer matters, for the report: of its weights, and the loss without it."""
    if any(not hasattr(module, "weight") for _, _, module in workspace.linears()):
        return {}  # factorised already
    few = batches[:4]
    found = sensitivity(workspace, few, second_order=options.second_order)
    loss, without = layer_losses(workspace, few)
    return {
        "sensitivity": {
            "loss": round(loss, 4),
            "loss_without_layer": [round(value, 4) for value in without],
            "weights": [
                {part: round(value, 4) for part, value in layer.items()}
                for layer in found.by_layer()
            ],
        }
    }
