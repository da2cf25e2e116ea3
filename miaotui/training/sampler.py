"""Which questions a batch holds: a function of the seed and of how far the run has come."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from miaotui.training.config import TrainConfig
from miaotui.training.maker import Draw, Example, Maker


@dataclass
class Sampler:
    """Draws chunks of batches. ``taken`` (domain to questions drawn) is its whole state.

    In each domain every question is drawn once, in random order, before any is drawn again.
    """

    maker: Maker
    questions: dict[str, list[int]]
    config: TrainConfig
    taken: dict[str, int] = field(default_factory=dict)

    def _next(self, domain: str) -> int:
        pool = self.questions[domain]
        count = self.taken.get(domain, 0)
        self.taken[domain] = count + 1
        turn, place = divmod(count, len(pool))
        order = list(range(len(pool)))
        random.Random(f"{self.config.seed}/{domain}/{turn}").shuffle(order)
        return pool[order[place]]

    def chunk(self, number: int) -> list[list[Example]]:
        """``config.chunk`` batches, each of questions of like length, in random order."""
        config = self.config
        rng = random.Random(f"{config.seed}/chunk/{number}")
        step = number * config.chunk
        late, finishing = step >= config.late_from, step >= config.steps
        mixture = config.late if late else config.early
        shares = {d: s for d, s in mixture.shares().items() if self.questions.get(d)}
        domains = rng.choices(list(shares), list(shares.values()), k=config.chunk * config.batch)
        wrong = config.unanswerable_late if late else config.unanswerable
        if finishing:
            wrong = config.unanswerable_finish
        mask = 0.0 if finishing else config.mask
        draw = Draw(config.crop_low, config.crop(step), wrong, mask, one_answer=finishing)
        examples = [self.maker.make(self._next(domain), draw, rng) for domain in domains]
        examples.sort(key=lambda e: len(e.ids))
        size = config.batch
        batches = [examples[i : i + size] for i in range(0, len(examples), size)]
        rng.shuffle(batches)
        return batches
