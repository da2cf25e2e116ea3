"""Two questions with their passages, for a first look: `miaotui up --demo`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """A question over a passage."""

    question: str
    context: str


DEMO: tuple[Asked, ...] = (
    Asked(
        "Who designed the Eiffel Tower?",
        "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. "
        "It is named after the engineer Gustave Eiffel, whose company designed and built the "
        'tower from 1887 to 1889. Locally nicknamed "La dame de fer", it was constructed as the '
        "centrepiece of the 1889 World's Fair. The tower is 330 metres tall, about the same "
        "height as an 81-storey building, and the tallest structure in Paris.",
    ),
    Asked(
        "什么是BERT模型？",
        "BERT模型是谷歌在2018年发布的一种预训练语言模型，全称是“来自变换器的双向编码器表示”。"
        "它由多层变换器的编码器堆叠而成，先在大量无标注文本上预训练，再在具体任务上微调，"
        "在问答、分类、命名实体识别等任务上都取得了很好的效果。",
    ),
)
