"""Made-up names, numbers and places from which the skills build their texts. Called by the skill modules only.

Lists with an English and a Chinese half are parallel: one index means the same thing in both languages.
Nothing here is about real people: names are random pairs of common parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_GIVEN = _words(
    "Maria James Wei Anna Peter Lucas Emma David Sofia Omar Nina Paul Laura Ivan Grace Henry Julia Marco Alice "
    "Felix Clara Hugo Diana Oscar Elena Victor Ruth Simon Leila Adam Irene Jonas Mei Karl Lily Noah Olga Ravi "
    "Sara Tom Uma Vera Walter Yusuf Zoe Bruno Carmen Dmitri Esther Frank Gloria Hannah Ian Jane Kevin Linda "
    "Martin Nora Patrick Rosa Samuel Tara Ursula Vincent Wendy Xavier Yara Amir Bella Carlos Daniel Eva Fatima "
    "George Helen Isaac Jorge Keiko Leon Monica Nadia Otto Priya Quinn Rita Stefan Tanya Viola Willem Chen Arthur "
    "Beatrice"
)
_FAMILY = _words(
    "Lopez Smith Zhang Novak Brown Meyer Rossi Khan Silva Jones Ivanov Tanaka Muller Garcia Wang Cohen Dubois "
    "Evans Fischer Green Hansen Ito Jensen Kim Larsen Moore Nguyen Olsen Park Quist Reyes Schmidt Taylor Usman "
    "Vargas White Xu Young Zimmer Adams Baker Clark Davies Ellis Foster Gomez Hill Irwin Jackson Keller Lewis "
    "Morgan Nash Owen Price Reed Scott Turner Underwood Vance Walsh Yates Abbott Bell Costa Diaz Eriksen Ford "
    "Grant Hoffman Jansen Kovacs Lang Mendez Norris Ortega Petrov Romero Santos Torres Weber Becker Chan Duarte "
    "Fuchs Gupta Haas"
)
_SYLLABLES = _words(
    "ba be bo da de do fa fi ga go ka ke ko la le li lo ma me mi mo na ne ni no pa pe ra re ri ro sa se so ta te "
    "ti to va ve vi za zo lan ren son ton mar len din vel kor bel"
)
_LETTERS = "eeeaaaooiiuutnnsshrrdllcmwfgypbvkxjqz"
_SURNAMES = (
    "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯董萧程曹袁邓傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶余潘杜戴钟"
    "汪姜范石姚谭廖邹熊陆郝孔崔康邱秦顾侯邵孟段雷汤尹黎贺龚"
)
_GIVEN_CHARACTERS = (
    "伟芳娜秀英敏静丽强磊洋勇艳杰娟涛超霞刚桂兰婷雪梅玲斌宇浩凯欣怡佳琪梓涵晨曦俊辉鹏飞建华志红波琳倩颖瑶璐鑫"
    "瑞博峰雯嘉豪诗萱雅茹晓思彤雨昊轩泽睿卓翔帆栋楠旭亮毅健彬莉珍莹菲蕾薇岚婧妍淑慧巧珊珠翠"
)
CITIES = (
    ("Lisbon", "里斯本"), ("Oslo", "奥斯陆"), ("Beijing", "北京"), ("Shanghai", "上海"), ("Chengdu", "成都"),
    ("Berlin", "柏林"), ("Madrid", "马德里"), ("Cairo", "开罗"), ("Toronto", "多伦多"), ("Lima", "利马"),
    ("Wuhan", "武汉"), ("Hangzhou", "杭州"), ("Nanjing", "南京"), ("Shenzhen", "深圳"), ("Delhi", "德里"),
    ("Tokyo", "东京"), ("Seoul", "首尔"), ("Vienna", "维也纳"), ("Prague", "布拉格"), ("Dublin", "都柏林"),
    ("Paris", "巴黎"), ("Rome", "罗马"), ("Athens", "雅典"), ("Boston", "波士顿"), ("Sydney", "悉尼"),
    ("Nairobi", "内罗毕"), ("Bangkok", "曼谷"), ("Hanoi", "河内"), ("Xian", "西安"), ("Suzhou", "苏州"),
)  # fmt: skip
_MONTHS = _words("January February March April May June July August September October November December")


def pick(rng: Random, options: Sequence[T]) -> tuple[int, T]:
    """A random index and what stands there."""
    index = int(rng.random() * len(options))
    return index, options[index]


def choice(rng: Random, options: list[str] | tuple[str, ...] | str) -> str:
    """A random entry; several times faster than `Random.choice`, which counts when millions are drawn."""
    return options[int(rng.random() * len(options))]


def below(rng: Random, low: int, high: int) -> int:
    """A random integer from `low` to `high`, both included."""
    return low + int(rng.random() * (high - low + 1))


def casual(rng: Random, language: str, text: str) -> str:
    """`text` as it is often typed: now and then without its last mark or (English) without capitals."""
    if rng.random() < 0.2:
        text = text.rstrip(".?!。？！") or text
    return text.lower() if language == "en" and rng.random() < 0.12 else text


def digits(rng: Random, count: int) -> str:
    """`count` random digits, the first not 0."""
    return str(below(rng, 10 ** (count - 1), 10**count - 1))


def invented_word(rng: Random) -> str:
    """A capitalised word that nobody knows, so that copying does not rest on known names."""
    if rng.random() < 0.3:
        return "".join(choice(rng, _LETTERS) for _ in range(below(rng, 4, 8))).capitalize()
    return "".join(choice(rng, _SYLLABLES) for _ in range(below(rng, 2, 3))).capitalize()


def common_character(rng: Random) -> str:
    """One of the 3755 most used Chinese characters (level 1 of GB 2312); most have no token of their own."""
    while True:
        code_bytes = bytes((below(rng, 0xB0, 0xD7), below(rng, 0xA1, 0xFE)))
        if code_bytes < b"\xd7\xfa":
            return code_bytes.decode("gb2312")


def person(rng: Random, language: str) -> str:
    """A full name: given and family name in English, two or three characters in Chinese."""
    if language == "zh":
        if rng.random() < 0.06:
            return choice(rng, _SURNAMES) + common_character(rng) + choice(rng, _GIVEN_CHARACTERS)
        count = 1 if rng.random() < 0.3 else 2
        return choice(rng, _SURNAMES) + "".join(choice(rng, _GIVEN_CHARACTERS) for _ in range(count))
    given = invented_word(rng) if rng.random() < 0.15 else choice(rng, _GIVEN)
    family = invented_word(rng) if rng.random() < 0.2 else choice(rng, _FAMILY)
    return f"{given} {family}"


def date(rng: Random, language: str) -> str:
    """A day of the year, as people write it."""
    month, day = below(rng, 1, 12), below(rng, 1, 28)
    return f"{month}月{day}日" if language == "zh" else f"{_MONTHS[month - 1]} {day}"


def code(rng: Random) -> str:
    """A short label such as `P-42` or `KX318`."""
    letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
    head = choice(rng, letters) if rng.random() < 0.6 else choice(rng, letters) + choice(rng, letters)
    return head + ("-" if rng.random() < 0.3 else "") + digits(rng, below(rng, 1, 3))


def phone(rng: Random, language: str) -> str:
    """A telephone number in a usual spelling."""
    kind = rng.random()
    if language == "zh":
        if kind < 0.7:
            return "1" + choice(rng, "3578") + digits(rng, 9)
        return choice(rng, ("010", "021", "0755", "027", "0571")) + "-" + digits(rng, 8)
    if kind < 0.4:
        return f"{digits(rng, 3)}-{digits(rng, 3)}-{digits(rng, 4)}"
    if kind < 0.7:
        return f"555-{digits(rng, 4)}"
    return f"+{below(rng, 1, 99)} {digits(rng, 3)} {digits(rng, 6)}"


def identity(rng: Random, language: str) -> str:
    """An identity number: 18 places in Chinese, a passport or social number else."""
    if language == "zh":
        if rng.random() < 0.2:
            return choice(rng, "EGP") + digits(rng, 8)
        year, month, day = below(rng, 1940, 2009), below(rng, 1, 12), below(rng, 1, 28)
        return f"{digits(rng, 6)}{year}{month:02}{day:02}{digits(rng, 3)}{choice(rng, '0123456789X')}"
    kind = rng.random()
    if kind < 0.5:
        return f"{digits(rng, 3)}-{digits(rng, 2)}-{digits(rng, 4)}"
    return choice(rng, "ABCEGKLPX") + digits(rng, below(rng, 7, 8))


def email(rng: Random) -> str:
    """An e-mail address at a domain reserved for examples."""
    first, last = choice(rng, _GIVEN).lower(), choice(rng, _FAMILY).lower()
    kind = rng.random()
    if kind < 0.3:
        local = f"{first}.{last}"
    elif kind < 0.5:
        local = f"{first}_{last}"
    elif kind < 0.75:
        local = f"{first}{below(rng, 1, 99)}"
    else:
        local = first[0] + last
    host = choice(rng, ("example", "mail", "clinic", "bank", "plant", "post", "office"))
    return f"{local}@{host}.{choice(rng, ('com', 'org', 'net', 'cn', 'example'))}"
