"""Characters that are taken for one another: across scripts, and among Chinese characters."""

from __future__ import annotations

# Cyrillic and Greek letters that look like Latin ones (Unicode's confusables.txt).
HOMOGLYPHS = str.maketrans(
    {
        "a": "а",
        "c": "с",
        "e": "е",
        "i": "і",
        "j": "ј",
        "o": "о",
        "p": "р",
        "s": "ѕ",
        "x": "х",
        "y": "у",
        "A": "А",
        "B": "В",
        "C": "С",
        "E": "Е",
        "H": "Н",
        "K": "К",
        "M": "М",
        "O": "О",
        "P": "Р",
        "T": "Т",
        "X": "Х",
    }
)

# Printable ASCII to its full-width form; the space to the ideographic one.
FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)} | {0x20: 0x3000}

# Chinese characters of similar shape, each group taken for one another in print or by hand.
_SHAPES = (
    *("己已巳", "未末", "人入八", "日曰", "土士", "天夫", "大太犬", "千干于", "白自", "鸟乌"),
    *("戊戌戍戎", "治冶", "候侯", "晴睛", "历厉", "刺剌", "徒徙", "密蜜", "拔拨", "崇祟"),
    *("壁璧", "辨辩辫", "贝见", "币巾", "兵乒乓", "博搏", "仓仑", "晨辰", "代伐", "弟第"),
    *("贷货", "旦且", "刀力", "东车", "风凤", "甲由申", "今令", "开井", "口囗", "老考"),
    *("名各", "民氏", "木本术", "牛午", "平乎", "清情请", "全金", "石右", "时对", "史吏"),
    *("手毛", "书节", "水永", "体休", "田由", "王玉主", "问间闻", "无元", "西酉", "小少"),
    *("幸辛", "学字", "牙才", "羊半", "衣农", "又叉", "元云", "直真", "中申", "住往", "准淮"),
)
SHAPES = {one: group.replace(one, "") for group in _SHAPES for one in group}

# Neighbours on a QWERTY keyboard.
NEIGHBOURS = {
    **{"q": "wa", "w": "qes", "e": "wrd", "r": "etf", "t": "ryg", "y": "tuh", "u": "yij"},
    **{"i": "uok", "o": "ipl", "p": "ol", "a": "qsz", "s": "adwx", "d": "sfec", "f": "dgrv"},
    **{"g": "fhtb", "h": "gjyn", "j": "hkum", "k": "jlim", "l": "kop", "z": "asx", "x": "zsdc"},
    **{"c": "xdfv", "v": "cfgb", "b": "vghn", "n": "bhjm", "m": "njk"},
}
# Chinese characters of the same or nearly the same sound, as input methods confuse them.
_SOUNDS = (
    *("的地得", "在再", "做作", "是事市", "他她它", "那哪", "以已", "和合", "到道", "有又"),
    *("为位", "时十", "里理", "年念", "国果", "中种", "人任", "出初", "生声", "会回", "后候"),
    *("成城", "大达", "多夺", "分份", "个各", "公工", "建见", "京经", "历立", "名明", "年粘"),
    *("如入", "始使", "书输", "数树", "由有", "于与", "长场", "者这", "之只", "主住", "最罪"),
)
SOUNDS = {one: group.replace(one, "") for group in _SOUNDS for one in group}
