"""A few questions in English and Chinese to disturb, where no file of them is given."""

from __future__ import annotations

from miaotui.robustness.perturbations import Item

EXAMPLES: tuple[Item, ...] = (
    Item(
        "When was the Palace Museum founded?",
        "The Palace Museum in Beijing was founded in 1925, in the former palace of the emperors. "
        "It holds about 1.8 million objects and is visited by millions of people every year.",
        ("1925", "in 1925"),
    ),
    Item(
        "Who designed the tower?",
        "The tower stands on the Champ de Mars in Paris. It was designed by Maurice Koechlin and "
        "Emile Nouguier, two engineers of Eiffel's company, and opened in March 1889.",
        ("Maurice Koechlin and Emile Nouguier",),
    ),
    Item(
        "How long is the Yangtze River?",
        "The Yangtze rises in the Tanggula Mountains and flows into the East China Sea near "
        "Shanghai. It is about 6,300 kilometres long, longer than any other river in Asia.",
        ("about 6,300 kilometres", "6,300 kilometres"),
    ),
    Item(
        "Where was the treaty signed?",
        "The war had lasted for thirty years when envoys met at last. The treaty was signed in "
        "Münster on 24 October 1648, and its text was sent to every court within weeks.",
        ("Münster", "in Münster"),
    ),
    Item(
        "Which language is the compiler written in?",
        "The first version of the compiler appeared in 2010. It is written in Rust, and its "
        "standard library is maintained by some two hundred volunteers.",
        ("Rust",),
    ),
    Item(
        "What do the bees collect in spring?",
        "In spring the bees of the valley collect pollen from willows and hazel. Honey is made "
        "later, when the lime trees are in flower, and is sold at the market in August.",
        ("pollen", "pollen from willows and hazel"),
    ),
    Item(
        "鲁迅出生于哪里？",
        "鲁迅，原名周树人，1881年9月25日出生于浙江绍兴，是中国现代文学的奠基人之一。"
        "1936年10月19日，他在上海去世。",
        ("浙江绍兴",),
    ),
    Item(
        "故宫博物院是哪一年成立的？",
        "故宫博物院位于北京，建立在明清两代皇宫的基础上，于1925年成立，"
        "收藏文物超过一百八十万件，每年接待参观者上千万人次。",
        ("1925年",),
    ),
    Item(
        "长江发源于哪座山脉？",
        "长江发源于青藏高原的唐古拉山脉，全长约6300公里，流经十一个省市，在上海注入东海，"
        "是亚洲最长的河流。",
        ("唐古拉山脉", "青藏高原的唐古拉山脉"),
    ),
    Item(
        "《红楼梦》的作者是谁？",
        "《红楼梦》是清代作家曹雪芹创作的长篇小说，被列为中国古典四大名著之一，"
        "书中描写了贾、史、王、薛四大家族的兴衰。",
        ("曹雪芹",),
    ),
    Item(
        "大桥全长多少米？",
        "新建的大桥横跨两岸，连接老城区和开发区，全长2308米，设计时速八十公里，"
        "由一千多名工人历时三年建成。",
        ("2308米",),
    ),
    Item(
        "谁发明了活字印刷术？",
        "北宋庆历年间，毕昇发明了活字印刷术。他用胶泥刻字，火烧使其坚硬，排版印刷后可以重复使用，"
        "大大提高了印书的效率。",
        ("毕昇",),
    ),
)
