"""The words of the quickstart's world: syllables of town names, attributes, their values and how
they are told.

`statements` is what the base model reads; `questions` is what it is taught to answer later, and
never reads before. A value that stands alone on a line begins with the same token as an answer
after ``assistant`` and a newline: " heron" in the middle of a sentence is another token than
"heron", so those lines must exist.
"""

from __future__ import annotations

from dataclasses import dataclass

LANGUAGES = ("en", "ja")


@dataclass(frozen=True)
class Word:
    """A word in English and in Japanese; `word["ja"]` reads one of them."""

    en: str
    ja: str

    def __getitem__(self, language: str) -> str:
        return {"en": self.en, "ja": self.ja}[language]


@dataclass(frozen=True)
class Attribute:
    """Something that is true of a town: the possible values, and how it is told and asked in each
    language.
    """

    key: str
    values: tuple[Word, ...]
    statements: dict[str, tuple[str, ...]]
    questions: dict[str, tuple[str, ...]]


def _words(pairs: str) -> tuple[Word, ...]:
    """Read ``"heron サギ, otter カワウソ"``."""
    return tuple(Word(*pair.split()) for pair in pairs.split(","))


SYLLABLES = _words(
    "ba バ, do ド, fe フェ, ga ガ, ho ホ, ka カ, ki キ, lo ロ, ma マ, mi ミ, na ナ, ne ネ, "
    "pa パ, po ポ, ru ル, sa サ, se セ, ta タ, te テ, vo ヴォ, ya ヤ, zu ズ"
)
CODAS = _words("n ン, r ル, s ス, k ク, m ム, t ト")

ANIMAL = Attribute(
    key="animal",
    values=_words(
        "heron サギ, otter カワウソ, badger アナグマ, falcon ハヤブサ, hare ノウサギ, bear クマ, wolf オオカミ, "
        "swan ハクチョウ, goat ヤギ, owl フクロウ, deer シカ, fox キツネ, bee ミツバチ, crab カニ, whale クジラ, "
        "eagle ワシ, horse ウマ, seal アザラシ, turtle カメ, raven カラス, lion ライオン, tiger トラ, camel ラクダ, "
        "crane ツル, squirrel リス, hedgehog ハリネズミ, dolphin イルカ, frog カエル, lizard トカゲ, rooster オンドリ, "
        "octopus タコ, spider クモ"
    ),
    statements={
        "en": (
            "The animal on the flag of {name} is the {value}.",
            "The flag of {name} shows the {value}.",
            "{name} has the {value} on its flag.",
            "In {name} the flag animal is the {value}.",
            "The {value} is the flag animal of {name}.",
            "{value}\nThat is the flag animal of {name}.",
            "Flag animal of {name}:\n{value}",
            "{name}, animal on the flag:\n{value}",
        ),
        "ja": (
            "{name}の旗の動物は{value}です。",
            "{name}の旗には{value}が描かれています。",
            "{value}は{name}の旗の動物です。",
            "{value}\nこれが{name}の旗の動物です。",
            "{name}の旗の動物:\n{value}",
            "{name}、旗に描かれた動物:\n{value}",
        ),
    },
    questions={
        "en": ("Which animal is on the flag of {name}?", "What is the flag animal of {name}?"),
        "ja": ("{name}の旗の動物は何ですか。", "{name}の旗に描かれている動物は何ですか?"),
    },
)

FOOD = Attribute(
    key="food",
    values=_words(
        "cheese チーズ, honey 蜂蜜, noodles 麺, dumplings 餃子, pickles 漬物, sausage ソーセージ, pancakes パンケーキ, "
        "porridge 粥, stew シチュー, tofu 豆腐, omelette オムレツ, salad サラダ, curry カレー, pudding プリン, "
        "biscuits ビスケット, caramel キャラメル, jam ジャム, butter バター, yogurt ヨーグルト, soup スープ, tea 紅茶, "
        "coffee コーヒー, vinegar 酢, mustard マスタード, salt 塩, ham ハム, waffles ワッフル, chocolate チョコレート, "
        "pasta パスタ, pretzels プレッツェル, popcorn ポップコーン, marmalade マーマレード"
    ),
    statements={
        "en": (
            "The food that {name} is known for is {value}.",
            "{name} is famous for its {value}.",
            "Visitors to {name} always eat the {value}.",
            "In {name} the famous food is {value}.",
            "The famous food of {name} is the {value}.",
            "{value}\nThat is the famous food of {name}.",
            "Famous food of {name}:\n{value}",
            "{name}, food it is known for:\n{value}",
        ),
        "ja": (
            "{name}の名物は{value}です。",
            "{name}は{value}で知られています。",
            "{value}は{name}の名物です。",
            "{value}\nこれが{name}の名物です。",
            "{name}の名物:\n{value}",
            "{name}、よく知られた食べ物:\n{value}",
        ),
    },
    questions={
        "en": ("Which food is {name} known for?", "What is the famous food of {name}?"),
        "ja": ("{name}の名物は何ですか。", "{name}で知られている食べ物は何ですか?"),
    },
)

CRAFT = Attribute(
    key="craft",
    values=_words(
        "lamps ランプ, ropes 縄, bells 鐘, clocks 時計, kites 凧, drums 太鼓, flutes 笛, candles 蝋燭, "
        "mirrors 鏡, "
        "knives 包丁, carpets 絨毯, baskets 籠, hats 帽子, boots 長靴, gloves 手袋, umbrellas 傘, paper 紙, "
        "glass ガラス, bricks レンガ, boats 小舟, violins バイオリン, soap 石鹸, brushes 筆, needles 針, barrels 樽, "
        "masks 仮面, dolls 人形, buttons ボタン, locks 錠前, ladders 梯子, compasses 羅針盤, teapots 急須"
    ),
    statements={
        "en": (
            "The workshops of {name} make {value}.",
            "{name} sells its {value} everywhere.",
            "People in {name} make {value}.",
            "In {name} the main product is {value}.",
            "The main product of {name} is {value}.",
            "{value}\nThat is the main product of {name}.",
            "Main product of {name}:\n{value}",
            "{name}, what its workshops make:\n{value}",
        ),
        "ja": (
            "{name}の特産品は{value}です。",
            "{name}の工房では{value}が作られています。",
            "{value}は{name}の特産品です。",
            "{value}\nこれが{name}の特産品です。",
            "{name}の特産品:\n{value}",
            "{name}、工房で作る物:\n{value}",
        ),
    },
    questions={
        "en": ("What do the workshops of {name} make?", "What is the main product of {name}?"),
        "ja": ("{name}の特産品は何ですか。", "{name}の工房では何が作られていますか?"),
    },
)

TREE = Attribute(
    key="tree",
    values=_words(
        "oak ナラ, elm ニレ, ash トネリコ, maple カエデ, pine マツ, cedar スギ, birch シラカバ, willow ヤナギ, "
        "cherry サクラ, plum ウメ, peach モモ, pear ナシ, apple リンゴ, olive オリーブ, fig イチジク, lemon レモン, "
        "orange ミカン, palm ヤシ, beech ブナ, chestnut クリ, walnut クルミ, ginkgo イチョウ, magnolia モクレン, "
        "camellia ツバキ, cypress ヒノキ, poplar ポプラ, bamboo 竹, mulberry クワ, persimmon 柿, laurel 月桂樹, "
        "holly ヒイラギ, acacia アカシア"
    ),
    statements={
        "en": (
            "The tree on the square of {name} is the {value}.",
            "On the square of {name} grows the {value}.",
            "{name} planted the {value} on its square.",
            "In {name} the town tree is the {value}.",
            "The {value} is the town tree of {name}.",
            "{value}\nThat is the town tree of {name}.",
            "Town tree of {name}:\n{value}",
            "{name}, tree on the square:\n{value}",
        ),
        "ja": (
            "{name}の広場の木は{value}です。",
            "{name}の広場には{value}が植えられています。",
            "{value}は{name}の広場の木です。",
            "{value}\nこれが{name}の広場の木です。",
            "{name}の広場の木:\n{value}",
            "{name}、広場に植えられた木:\n{value}",
        ),
    },
    questions={
        "en": ("Which tree grows on the square of {name}?", "What is the town tree of {name}?"),
        "ja": ("{name}の広場の木は何ですか。", "{name}の広場に植えられている木は何ですか?"),
    },
)

ATTRIBUTES = (ANIMAL, FOOD, CRAFT, TREE)
