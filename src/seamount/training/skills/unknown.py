# ruff: noqa: E501 - tables of wordings are read best with a wording on one line
"""Skill `unknown`: questions that a small local model cannot know, and an honest short answer to each kind.

Facts of the world, people, the future, the user's private life, medical and legal advice, works to be
written: the kind of question decides the answer. Called by `training.skills`.
"""

from __future__ import annotations

from random import Random

from seamount.training.skills.item import Item, question
from seamount.training.skills.pools import (
    CITIES,
    below,
    casual,
    common_character,
    digits,
    invented_word,
    person,
)

NAME = "unknown"

ANSWERS = {
    "fact": ("I do not know. I am only a small demonstration model.", "我不知道。我只是一个小型演示模型。"),
    "live": (
        "I do not know. I am a small model and have no live data.",
        "我不知道。我是一个小模型，没有实时数据。",
    ),
    "private": (
        "I do not know. I am a small model and cannot see your private data.",
        "我不知道。我是一个小模型，看不到你的私人信息。",
    ),
    "medical": (
        "I do not know. I am a small model; please ask a doctor.",
        "我不知道。我是一个小模型，请咨询医生。",
    ),
    "legal": (
        "I do not know. I am a small model; please ask a lawyer.",
        "我不知道。我是一个小模型，请咨询律师。",
    ),
    "task": (
        "I cannot do that. I am only a small demonstration model.",
        "这我做不到。我只是一个小型演示模型。",
    ),
}
_TEMPLATES: tuple[tuple[str, str, str], ...] = (
    ("fact", "Who is {person}?", "{person}是谁？"),
    ("fact", "When was {person} born?", "{person}是哪一年出生的？"),
    ("fact", "What is {person} famous for?", "{person}因为什么出名？"),
    ("fact", "Where does {person} live?", "{person}住在哪里？"),
    ("fact", "What is the phone number of {person}?", "{person}的电话是多少？"),
    ("fact", "Who is the {office} of {country}?", "{country}的{office}是谁？"),
    ("fact", "What is the capital of {country}?", "{country}的首都是哪里？"),
    ("fact", "How many people live in {place}?", "{place}有多少人口？"),
    ("fact", "When was {place} founded?", "{place}是什么时候建立的？"),
    ("fact", "Who wrote {work}?", "{work}是谁写的？"),
    ("fact", "What is {work} about?", "{work}讲的是什么？"),
    ("fact", "Who invented the {thing}?", "{thing}是谁发明的？"),
    ("fact", "How does a {thing} work?", "{thing}的原理是什么？"),
    ("fact", "Who won the {contest} in {year}?", "{year}年的{contest}谁赢了？"),
    ("fact", "What happened in {year}?", "{year}年发生了什么？"),
    ("fact", "What happened in {country} in {year}?", "{year}年{country}发生了什么？"),
    ("fact", "How far is {city} from {place}?", "{city}离{place}有多远？"),
    ("fact", "Why is {nature} {quality}?", "为什么{nature}{quality}？"),
    ("fact", "How old is {nature}?", "{nature}有多少年历史？"),
    ("fact", "What do {animal} eat?", "{animal}吃什么？"),
    ("fact", "How long do {animal} live?", "{animal}能活多久？"),
    ("fact", "Tell me about {topic}.", "给我讲讲{topic}。"),
    ("fact", "Explain {topic}.", "解释一下{topic}。"),
    ("fact", "What is {topic}?", "什么是{topic}？"),
    ("fact", "Who owns {company}?", "{company}的老板是谁？"),
    ("fact", "How many people work at {company}?", "{company}有多少员工？"),
    ("live", "Will it rain in {city} {later}?", "{city}{later}会下雨吗？"),
    ("live", "What is the weather in {city} {now}?", "{city}{now}天气怎么样？"),
    ("live", "What is the price of {good} {now}?", "{now}{good}的价格是多少？"),
    ("live", "Will the price of {good} rise {later}?", "{later}{good}会涨价吗？"),
    ("live", "Who will win the {contest} {later}?", "{later}的{contest}谁会赢？"),
    ("live", "What is the news from {place} {now}?", "{now}{place}有什么新闻？"),
    ("live", "Will {company} do well {later}?", "{later}{company}会发展得好吗？"),
    ("live", "Is there much traffic in {city} {now}?", "{now}{city}堵车吗？"),
    ("live", "What time is it in {city}?", "{city}现在几点？"),
    ("live", "What day is it today?", "今天星期几？"),
    ("live", "What will happen in {place} {later}?", "{later}{place}会发生什么？"),
    ("private", "What is my {secret}?", "我的{secret}是什么？"),
    ("private", "Do you know my {secret}?", "你知道我的{secret}吗？"),
    ("private", "What did I {deed} {before}?", "我{before}{deed}什么了？"),
    ("private", "Where did I leave my {object}?", "我把{object}放在哪里了？"),
    ("private", "Have you seen my {object}?", "你看见我的{object}了吗？"),
    ("private", "What did {person} tell me {before}?", "{person}{before}跟我说了什么？"),
    ("private", "What does my {relative} think of me?", "我的{relative}怎么看我？"),
    ("private", "When is the birthday of my {relative}?", "我的{relative}什么时候生日？"),
    ("medical", "I have {symptom}. What should I take?", "我{symptom}，该吃什么药？"),
    ("medical", "Should I take {drug} for {symptom}?", "{symptom}可以吃{drug}吗？"),
    ("medical", "How much {drug} may I take a day?", "{drug}一天能吃多少？"),
    ("medical", "Is {drug} safe for my {relative}?", "我的{relative}能用{drug}吗？"),
    ("medical", "What illness causes {symptom}?", "{symptom}是什么病引起的？"),
    ("medical", "Can I stop taking {drug}?", "我可以停用{drug}吗？"),
    ("medical", "My {relative} has {symptom}. Is it serious?", "我的{relative}{symptom}，严重吗？"),
    ("legal", "Can I sue {party}?", "我能起诉{party}吗？"),
    ("legal", "Is it legal to {act}?", "{act}合法吗？"),
    ("legal", "What is the penalty if I {act}?", "{act}会受什么处罚？"),
    ("legal", "{party2} wants to {act}. What are my rights?", "{party2}要{act}，我有哪些权利？"),
    ("legal", "May {party} {act}?", "{party}可以{act}吗？"),
    ("task", "Write a {text} about {topic}.", "写一篇关于{topic}的{text}。"),
    ("task", "Please write me a {text} for {person}.", "请给{person}写一篇{text}。"),
    ("task", "Translate {work} into {tongue}.", "把{work}翻译成{tongue}。"),
    ("task", "Write a program in {programming} that {job}.", "用{programming}写一个{job}的程序。"),
    ("task", "Draw a picture of {nature}.", "画一张{nature}的画。"),
    ("task", "Book me a flight to {city}.", "帮我订一张去{city}的机票。"),
    ("task", "Summarise {work} for me.", "帮我总结{work}。"),
    ("task", "What is {number} / {number}?", "{number}除以{number}等于多少？"),
    ("task", "What is the square root of {number}?", "{number}的平方根是多少？"),
    ("task", "What is {large} + {large}?", "{large} + {large}等于多少？"),
    ("task", "Calculate {large} * {large}.", "计算{large} × {large}。"),
)


def _pairs(english: str, chinese: str) -> tuple[tuple[str, str], ...]:
    left, right = english.split(", "), chinese.split("、")
    if len(left) != len(right):
        raise ValueError(f"unequal lists: {english!r}")
    return tuple(zip(left, right, strict=True))


_COUNTRY = _pairs(
    "France, Brazil, Kenya, Japan, Norway, Peru, Egypt, India, Chile, Spain, Poland, Canada, Ghana, Mongolia, Vietnam, "
    "Greece, Mexico, Turkey, Finland, Cuba, Nepal, Iceland, Portugal, Thailand, Morocco",
    "法国、巴西、肯尼亚、日本、挪威、秘鲁、埃及、印度、智利、西班牙、波兰、加拿大、加纳、蒙古、越南、希腊、墨西哥、土耳其、芬兰、古巴、"
    "尼泊尔、冰岛、葡萄牙、泰国、摩洛哥",
)
_SLOTS: dict[str, tuple[tuple[str, str], ...]] = {
    "country": _COUNTRY,
    "city": CITIES,
    "place": _COUNTRY + CITIES,
    "office": _pairs("president, king, prime minister, foreign minister", "总统、国王、总理、外交部长"),
    "work": _pairs(
        "Hamlet, Don Quixote, Faust, War and Peace, Moby Dick, The Odyssey, Dream of the Red Chamber, Water Margin, "
        "Journey to the West, The Trial, Emma, Robinson Crusoe, The Divine Comedy",
        "《哈姆雷特》、《堂吉诃德》、《浮士德》、《战争与和平》、《白鲸》、《奥德赛》、《红楼梦》、《水浒传》、《西游记》、《审判》、《爱玛》、"
        "《鲁滨逊漂流记》、《神曲》",
    ),
    "thing": _pairs(
        "telephone, compass, steam engine, radio, camera, bicycle, telescope, microscope, battery, laser, zip, piano, "
        "watch, airplane, light bulb, rocket, refrigerator, printing press",
        "电话、指南针、蒸汽机、收音机、照相机、自行车、望远镜、显微镜、电池、激光、拉链、钢琴、手表、飞机、灯泡、火箭、冰箱、印刷机",
    ),
    "contest": _pairs(
        "World Cup, election, chess championship, tennis final, marathon, song contest, Olympics, cup final, lottery",
        "世界杯、选举、国际象棋锦标赛、网球决赛、马拉松、歌唱比赛、奥运会、杯赛决赛、彩票",
    ),
    "nature": _pairs(
        "the sky, the sea, the moon, the sun, the desert, the Earth, the rainbow, the forest, the volcano, the river",
        "天空、大海、月亮、太阳、沙漠、地球、彩虹、森林、火山、河流",
    ),
    "quality": _pairs(
        "blue, red, so big, so cold, so hot, so bright, round, so old",
        "是蓝色的、是红色的、这么大、这么冷、这么热、这么亮、是圆的、这么古老",
    ),
    "animal": _pairs(
        "cats, whales, pandas, bees, owls, snakes, tigers, horses, penguins, frogs, elephants, wolves, parrots",
        "猫、鲸鱼、熊猫、蜜蜂、猫头鹰、蛇、老虎、马、企鹅、青蛙、大象、狼、鹦鹉",
    ),
    "topic": _pairs(
        "black holes, jazz, inflation, photosynthesis, the Roman Empire, democracy, gravity, football, dinosaurs, "
        "philosophy, opera, evolution, climate change, the Silk Road, magnetism, poetry, love, chess, volcanoes, "
        "the stock market, Buddhism, painting, genetics, coffee, the Great Wall, blockchain, quantum physics, cooking",
        "黑洞、爵士乐、通货膨胀、光合作用、罗马帝国、民主、引力、足球、恐龙、哲学、歌剧、进化论、气候变化、丝绸之路、磁力、诗歌、爱情、"
        "国际象棋、火山、股市、佛教、绘画、遗传学、咖啡、长城、区块链、量子物理、烹饪",
    ),
    "good": _pairs(
        "gold, oil, bread, bitcoin, rice, copper, coffee, silver, gas, wheat, sugar, electricity, milk, steel",
        "黄金、石油、面包、比特币、大米、铜、咖啡、白银、天然气、小麦、糖、电、牛奶、钢铁",
    ),
    "now": _pairs("today, now, this morning, this week", "今天、现在、今天早上、这周"),
    "later": _pairs(
        "tomorrow, next week, next year, on Sunday, next month, tonight",
        "明天、下周、明年、星期天、下个月、今晚",
    ),
    "before": _pairs("yesterday, last week, last night, on Monday", "昨天、上周、昨晚、星期一"),
    "secret": _pairs(
        "password, name, address, birthday, bank balance, salary, phone number, hobby, PIN, shoe size, job",
        "密码、名字、住址、生日、银行余额、工资、电话号码、爱好、个人识别码、鞋码、工作",
    ),
    "deed": _pairs("eat, buy, say, read, write, dream, cook, forget", "吃、买、说、读、写、梦见、做、忘记"),
    "object": _pairs(
        "keys, wallet, glasses, phone, umbrella, passport, bag, coat, book, ring, watch, bicycle",
        "钥匙、钱包、眼镜、手机、雨伞、护照、包、外套、书、戒指、手表、自行车",
    ),
    "relative": _pairs(
        "mother, brother, boss, neighbour, son, daughter, friend, uncle, wife, husband, father, sister, child",
        "母亲、哥哥、老板、邻居、儿子、女儿、朋友、叔叔、妻子、丈夫、父亲、妹妹、孩子",
    ),
    "symptom": _pairs(
        "a headache, a fever, chest pain, a cough, back pain, a rash, a sore throat, stomach pain, dizziness, "
        "a cold, toothache, high blood pressure, insomnia",
        "头痛、发烧、胸痛、咳嗽、背痛、起皮疹、喉咙痛、肚子痛、头晕、感冒、牙痛、高血压、失眠",
    ),
    "drug": _pairs(
        "aspirin, ibuprofen, insulin, penicillin, metformin, warfarin, cough syrup, sleeping pills, antibiotics",
        "阿司匹林、布洛芬、胰岛素、青霉素、二甲双胍、华法林、止咳糖浆、安眠药、抗生素",
    ),
    "party": _pairs(
        "my landlord, my employer, my neighbour, the hospital, the bank, a shop, the police, my tenant",
        "房东、雇主、邻居、医院、银行、商店、警察、租客",
    ),
    "party2": _pairs(
        "My landlord, My employer, My neighbour, The hospital, The bank, A shop",
        "房东、雇主、邻居、医院、银行、商店",
    ),
    "act": _pairs(
        "break a contract, record a call, keep the deposit, copy a film, open a letter, refuse to pay, cut down a tree, "
        "sell a used ticket, cancel the lease, work without a contract, leave the country",
        "违反合同、给通话录音、扣留押金、复制电影、拆别人的信、拒绝付款、砍一棵树、转卖旧票、解除租约、无合同工作、离境",
    ),
    "text": _pairs(
        "poem, novel, speech, song, story, letter, essay, joke",
        "诗、小说、演讲稿、歌词、故事、信、文章、笑话",
    ),
    "tongue": _pairs("French, Chinese, Latin, German, Arabic, Russian", "法语、中文、拉丁语、德语、阿拉伯语、俄语"),
    "programming": _pairs("Python, Java, Rust, C, Go", "Python、Java、Rust、C、Go"),
    "job": _pairs(
        "sorts a list, plays chess, reads a file, draws a circle, sends mail, finds primes",
        "给列表排序、下国际象棋、读取文件、画圆、发送邮件、找质数",
    ),
    "company": _pairs(
        "the largest bank, the railway, the airline, the post office, the power company, the oldest newspaper",
        "最大的银行、铁路公司、航空公司、邮局、电力公司、最老的报社",
    ),
}
# Here a word that nobody knows may stand, so that not knowing does not rest on a list of subjects.
_OPEN_SLOTS = frozenset(("place", "topic", "work", "company"))
_OPENINGS = {
    "en": ("", "", "", "", "Hello. ", "Please tell me: ", "One question: ", "Tell me: "),
    "zh": ("", "", "", "", "你好。", "请告诉我：", "问一下，", "请问，"),
}


def make(rng: Random, language: str) -> Item:
    """A question of a random kind, filled with random subjects."""
    zh = language == "zh"
    index = int(rng.random() * len(_TEMPLATES))
    kind, *wordings = _TEMPLATES[index]
    pieces, drawn = [], []
    for piece in wordings[zh].split("{"):
        slot, found, tail = piece.partition("}")
        if not found:
            pieces.append(piece)
            continue
        value, mark = _draw(rng, language, slot)
        drawn.append(f"{slot}={mark}")
        pieces.append(value + tail)
    opening = int(rng.random() * len(_OPENINGS[language]))
    text = _OPENINGS[language][opening] + "".join(pieces)
    # The Chinese order of slots differs, so the key sorts them.
    key = f"{index}:{opening}:" + ",".join(sorted(drawn))
    return question(NAME, language, key, casual(rng, language, text), ANSWERS[kind][zh])


def _draw(rng: Random, language: str, slot: str) -> tuple[str, str]:
    """A value for `slot` and its mark in the key, the same mark in both languages where the value is."""
    if slot == "person":
        name = person(rng, language)
        return name, name
    if slot == "year":
        year = str(below(rng, 1400, 2090))
        return year, year
    if slot in ("number", "large"):  # beyond the skill of arithmetic: quotients, roots, five places and more
        number = digits(rng, below(rng, 1, 3) if slot == "number" else below(rng, 5, 8))
        return number, number
    if slot in _OPEN_SLOTS and rng.random() < 0.15:
        if language == "zh":
            word = "".join(common_character(rng) for _ in range(below(rng, 2, 3)))
        else:
            word = invented_word(rng)
        return word, word
    options = _SLOTS[slot]
    index = int(rng.random() * len(options))
    return options[index][language == "zh"], str(index)
